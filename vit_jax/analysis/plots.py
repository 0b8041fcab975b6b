"""Pictures of a run."""

import pathlib
import textwrap
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from PIL import Image


def curves(rows: Sequence[Mapping[str, float | None]], path: pathlib.Path, title: str, split: str) -> None:
    """Draws loss and accuracy over epochs from the rows of metrics.csv; `split` names what val_* was measured on."""
    epochs = [row["epoch"] for row in rows]
    figure = Figure(figsize=(10, 4.6), layout="constrained")
    loss, accuracy = figure.subplots(1, 2)
    lines = [
        (loss, "train_loss", "train", "C0"),
        (loss, "val_loss", split, "C1"),
        (accuracy, "train_accuracy", "train", "C0"),
        (accuracy, "val_accuracy", split, "C1"),
        (accuracy, "ema_val_accuracy", f"{split}, averaged weights", "C2"),
    ]
    marker = "o" if len(rows) < 30 else None
    for axes, column, label, color in lines:
        values = [row[column] for row in rows]
        if any(v is not None for v in values):
            points = [float("nan") if v is None else v for v in values]
            last = next(v for v in reversed(values) if v is not None)
            shown = f"{100 * last:.1f} %" if axes is accuracy else f"{last:.3f}"
            alone = len([v for v in values if v is not None]) == 1  # a line of one point shows only by its marker
            axes.plot(
                epochs,
                points,
                color=color,
                marker="o" if alone else marker,
                markersize=3,
                label=f"{label} ({shown} at the end)",
            )
    for axes, name in ((loss, "loss"), (accuracy, "accuracy")):
        axes.set(xlabel="epoch", ylabel=name)
        axes.grid(alpha=0.3)
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), frameon=False)  # beside the lines, not over them
    accuracy.yaxis.set_major_formatter(PercentFormatter(1.0))
    figure.suptitle(title, parse_math=False)
    figure.savefig(path, dpi=120)


# A contact sheet's measures, in pixels
TILE = 160  # side of a picture, or a little less, to be a multiple of the picture's own
GAP = 10  # between pictures
MARGIN = 24
LONGEST_NAME = 16  # characters of a class name that stand under a picture
LINE = 16  # of a label, or of a note
DPI = 128  # a power of two: the sheet's size in inches gives back its whole pixels

Cell = tuple[np.ndarray, str]  # a picture, and what stands under it
Scale = tuple[str, np.ndarray, str]  # a bar of colours, uint8 [h, w, 3], between what its ends mean


def sheet(
    cells: Sequence[Cell],
    across: int,
    headings: Sequence[str],
    path: pathlib.Path,
    title: str,
    notes: Sequence[str],
    scale: Scale | None = None,
) -> None:
    """A contact sheet of at most `across` cells a row, under the headings again and again."""
    across = min(across, len(cells))
    rows = [cells[i : i + across] for i in range(0, len(cells), across)]
    contact_sheet(rows, [headings[i % len(headings)] for i in range(across)], path, title, notes, scale)


def contact_sheet(
    rows: Sequence[Sequence[Cell]],
    headings: Sequence[str],
    path: pathlib.Path,
    title: str,
    notes: Sequence[str],
    scale: Scale | None = None,
) -> None:
    """Draws pictures, uint8 [h, w, 1 or 3], in rows under the columns' headings, each with its label beneath.

    Small pictures are enlarged by a whole factor, so that their pixels stay what they are. `scale` explains colours.
    """
    tiles = [[tile(picture) for picture, _ in row] for row in rows]
    pitch, tallest = TILE + GAP, max(len(x) for row in tiles for x in row)
    lines = max(label.count("\n") + 1 for row in rows for _, label in row)
    width = 2 * MARGIN + len(headings) * pitch - GAP
    titles = textwrap.wrap(title, (width - 2 * MARGIN) // 12) or [""]
    notes = [line for note in notes for line in textwrap.wrap(note, (width - 2 * MARGIN) // 7)]
    first_note = MARGIN + (1 + 2 * len(titles)) * LINE
    end_of_notes = first_note + len(notes) * LINE + (LINE + LINE // 2 if scale is not None else 0)
    top = end_of_notes + 2 * LINE  # of the first row
    step = tallest + lines * LINE + 2 * GAP
    height = top + len(rows) * step + MARGIN - GAP

    figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI)
    canvas = np.full((height, width, 3), 255, np.uint8)

    def text(x, y, words, **style):  # y: where its letters stand
        figure.text(x / width, 1 - y / height, words, parse_math=False, **style)

    for i, words in enumerate(titles):
        text(MARGIN, MARGIN + (1 + 2 * i) * LINE, words, fontsize=12, weight="bold")
    for i, note in enumerate(notes):
        text(MARGIN, first_note + i * LINE, note, fontsize=7, color="0.35")
    if scale is not None:
        least, bar, most = scale
        x, y = MARGIN + 7 * len(least) + GAP, end_of_notes - LINE
        canvas[y - bar.shape[0] : y, x : x + bar.shape[1]] = bar
        text(MARGIN, y, least, fontsize=7, color="0.35")
        text(x + bar.shape[1] + GAP, y, most, fontsize=7, color="0.35")
    for column, words in enumerate(headings):
        text(MARGIN + column * pitch + TILE / 2, top - GAP, words, fontsize=7, weight="bold", color="0.35", ha="center")
    for i, row in enumerate(rows):
        for column, (_, label) in enumerate(row):
            x, y, pixels = MARGIN + column * pitch, top + i * step, tiles[i][column]
            down, right = y + (tallest - pixels.shape[0]) // 2, x + (TILE - pixels.shape[1]) // 2
            canvas[down : down + pixels.shape[0], right : right + pixels.shape[1]] = pixels
            for n, words in enumerate(label.split("\n"), start=1):
                text(x + TILE / 2, y + tallest + n * LINE - 2, words, fontsize=6.75, ha="center")
    figure.figimage(canvas, zorder=-1)  # pixel for pixel: axes would resample it
    figure.savefig(path, dpi=DPI)


def shorten(name: str, most: int = LONGEST_NAME) -> str:
    """A class name of at most `most` characters, in one line."""
    name = " ".join(name.split())
    return name if len(name) <= most else f"{name[: most - 1].rstrip()}…"


def tile(picture: np.ndarray) -> np.ndarray:
    """The picture, uint8 [h, w, C] -> [h, w, 3], enlarged by the largest whole factor that fits a tile; a large one
    resampled to it.
    """
    picture = np.broadcast_to(picture[..., :3], (*picture.shape[:2], 3))
    factor = TILE // max(picture.shape[:2])
    if factor >= 2:
        return picture.repeat(factor, axis=0).repeat(factor, axis=1)
    scaled = Image.fromarray(np.ascontiguousarray(picture))
    scale = TILE / max(picture.shape[:2])
    size = [max(1, round(scale * n)) for n in scaled.size]
    return np.asarray(scaled.resize((size[0], size[1]), Image.Resampling.LANCZOS))

"""Drawings of what was measured and of what a model has learned: arrays in, PNG files out."""

import pathlib
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from PIL import Image

from vit_jax.analysis.metrics import worst_confusions
from vit_jax.analysis.plots import Scale, shorten, tile

DPI = 120
MOST_CELLS = 30  # classes whose confusions are drawn as a grid
WORST = 20  # confusions drawn by name where there are more classes
MOST_PLACES = 8  # rows or columns of patches whose similarities are drawn
LETTERS = 9  # of a title, an inch
LONGEST_NAME = 22  # characters of a class name beside a plot


# Of a measurement


def reliability(sums: np.ndarray, path: pathlib.Path, title: str) -> None:
    """Draws accuracy over confidence from `metrics.reliability`'s sums, and how many examples each bin has."""
    examples, correct, confidence = sums
    bins, total = len(examples), examples.sum()
    left = np.arange(bins) / bins
    seen = examples > 0
    accuracy, mean = (np.divide(x, examples, out=np.zeros(bins), where=seen) for x in (correct, confidence))
    error = np.abs(correct - confidence).sum() / total

    figure = Figure(figsize=(5, 6), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    style: dict[str, Any] = {"width": 1 / bins, "align": "edge", "edgecolor": "white", "linewidth": 0.8}
    above.bar(left, accuracy, color="C0", alpha=0.5, label="accuracy", **style)
    gap: dict[str, Any] = style | {"facecolor": "none", "edgecolor": "C3", "hatch": "////"}
    above.bar(left[seen], (mean - accuracy)[seen], bottom=accuracy[seen], label="gap to the confidence", **gap)
    above.plot([0, 1], [0, 1], color="0.3", linestyle="--", linewidth=1, label="perfectly calibrated")
    above.set(ylabel="accuracy", xlim=(0, 1), ylim=(0, 1))
    above.set_title(f"expected calibration error {error:.2%}", fontsize="medium")
    below.bar(left, examples / total, color="0.6", **style)
    for value, color, name in ((correct, "C0", "accuracy"), (confidence, "C3", "mean confidence")):
        share = value.sum() / total
        below.axvline(share, color=color, label=f"{name} {share:.1%}")
    below.set(xlabel="confidence: probability of the predicted class", ylabel="share of\npictures")
    handles, labels = (a + b for a, b in zip(*(x.get_legend_handles_labels() for x in (above, below)), strict=True))
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)  # inside it would hide bars
    for axes in (above, below):
        axes.xaxis.set_major_formatter(PercentFormatter(1.0))
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.set_axisbelow(True)
        axes.grid(alpha=0.3)
    _finish(figure, path, title)


def confusions(matrix: np.ndarray, class_names: Sequence[str], path: pathlib.Path, title: str) -> None:
    """Draws a confusion matrix; of more than 30 classes, whose grid nobody could read, the 20 worst by name."""
    if len(matrix) <= MOST_CELLS:
        _confusion_grid(matrix, class_names, path, title)
    else:
        _worst_confusions(matrix, class_names, path, title)


def _confusion_grid(matrix: np.ndarray, class_names: Sequence[str], path: pathlib.Path, title: str) -> None:
    count = len(matrix)
    side = max(4.5, 0.45 * count + 2)
    figure = Figure(figsize=(side + 0.5, side), layout="compressed")
    axes = figure.subplots()
    shares = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    # The square root brings out the mistakes, which are few beside the right ones.
    drawn = axes.imshow(shares, cmap="Blues", norm=PowerNorm(0.5, 0, 1))
    for (row, column), number in np.ndenumerate(matrix):
        if number:
            color = "white" if shares[row, column] > 0.4 else "0.15"
            axes.text(column, row, str(number), ha="center", va="center", fontsize=7, color=color)
    names = [shorten(name, LONGEST_NAME) for name in class_names]
    axes.set_xticks(range(count), names, rotation=45, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(count), names)
    axes.set(xlabel="predicted class", ylabel="true class")
    _plain(axes)
    figure.colorbar(drawn, ax=axes, label="share of the true class", format=PercentFormatter(1.0), shrink=0.8)
    _finish(figure, path, title)


def _worst_confusions(matrix: np.ndarray, class_names: Sequence[str], path: pathlib.Path, title: str) -> None:
    pairs = worst_confusions(matrix, WORST)
    counts = [matrix[pair] for pair in pairs]
    figure = Figure(figsize=(8, 1.5 + 0.28 * len(pairs)), layout="constrained")
    axes = figure.subplots()
    bars = axes.barh(range(len(pairs)), counts, color="C0")
    shares = [f"{count} ({count / matrix[row].sum():.0%})" for count, (row, _) in zip(counts, pairs, strict=True)]
    axes.bar_label(bars, shares, padding=3, fontsize=8)
    names = [
        f"{shorten(class_names[row], LONGEST_NAME)} → {shorten(class_names[column], LONGEST_NAME)}"
        for row, column in pairs
    ]
    axes.set_yticks(range(len(pairs)), names)
    axes.invert_yaxis()
    axes.margins(x=0.15, y=0.01)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(xlabel="pictures (and their share of the true class)", ylabel="true class → predicted class")
    _plain(axes)
    _finish(figure, path, title)


# Of a model


def positions(similarity: np.ndarray, path: pathlib.Path, title: str) -> None:
    """Draws `embeddings.position_similarity`, a small map a patch; of a large grid at most eight rows and columns."""
    height, width = similarity.shape[:2]
    rows, columns = (np.arange(0, n, -(-n // MOST_PLACES)) for n in (height, width))
    mosaic = np.full((len(rows) * (height + 1) - 1, len(columns) * (width + 1) - 1), np.nan)
    for i, row in enumerate(rows):
        for j, column in enumerate(columns):
            y, x = i * (height + 1), j * (width + 1)
            mosaic[y : y + height, x : x + width] = similarity[row, column]
    figure = Figure(figsize=(7, 6), layout="compressed")
    axes = figure.subplots()
    drawn = axes.imshow(mosaic, vmin=-1, vmax=1, cmap="viridis", interpolation="nearest")
    axes.set_xticks(np.arange(len(columns)) * (width + 1) + (width - 1) / 2, [str(n + 1) for n in columns])
    axes.set_yticks(np.arange(len(rows)) * (height + 1) + (height - 1) / 2, [str(n + 1) for n in rows])
    axes.set(xlabel="column of the patch", ylabel="row of the patch")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    figure.colorbar(drawn, ax=axes, label="cosine similarity with the patch at each place", shrink=0.85)
    _finish(figure, path, title)


def distances(distance: np.ndarray, even: float, path: pathlib.Path, title: str) -> None:
    """Draws `attention.attention_distance` [L, H], pixels, a dot a head; `even` is that of attention to all alike."""
    layers, heads = distance.shape
    figure = Figure(figsize=(6.5, 4.5), layout="constrained")
    axes = figure.subplots()
    number = np.arange(1, layers + 1)
    axes.plot(number, distance.mean(1), color="0.7", zorder=1, label="mean of the layer's heads")
    label = f"each of {heads} heads" if heads > 1 else "the one head"
    axes.scatter(number.repeat(heads), distance.ravel(), s=28, alpha=0.8, label=label)
    axes.axhline(even, color="C3", linestyle="--", linewidth=1, label="attention to all patches alike")
    highest = 1.08 * max(even, distance.max())
    axes.set(xlabel="layer", ylabel="mean attention distance, pixels", ylim=(0, highest or 1))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend()
    _finish(figure, path, title)


def heat(values: np.ndarray) -> np.ndarray:
    """Numbers [h, w] as colours, from the darkest for 0 to the brightest for the largest: uint8 [h, w, 3]."""
    return (255 * matplotlib.colormaps["inferno"](_relative(values))[..., :3]).round().astype(np.uint8)


def scale() -> Scale:
    """What the colours of `heat` mean."""
    return "0", heat(np.linspace(0, 1, 160)[None].repeat(10, axis=0)), "the largest"


def overlay(picture: np.ndarray, values: np.ndarray) -> np.ndarray:
    """A picture in grey, enlarged to a tile, under the smoothed colours of `heat`: uint8 [h, w, 3]."""
    grey = tile(picture).mean(-1, keepdims=True)
    size = grey.shape[1], grey.shape[0]
    smooth = Image.fromarray(_relative(values).astype(np.float32)).resize(size, Image.Resampling.BICUBIC)
    return (0.4 * grey + 0.6 * heat(np.maximum(np.asarray(smooth), 0))).round().astype(np.uint8)


def _relative(values: np.ndarray) -> np.ndarray:
    return values / max(values.max(), np.finfo(np.float32).tiny)


# Of several runs


def comparison(runs: Mapping[str, Sequence[Mapping[str, Any]]], path: pathlib.Path, title: str) -> None:
    """Draws the curves of several runs: by name, rows with epoch, val_loss and score (an accuracy)."""
    figure = Figure(figsize=(10, 4 + 0.22 * len(runs)), layout="constrained")
    loss, accuracy = figure.subplots(1, 2)
    for place, (name, rows) in enumerate(runs.items()):
        line: dict[str, Any] = {"color": f"C{place % 10}", "linestyle": ("-", "--", ":", "-.")[place // 10 % 4]}
        line |= {"marker": "o" if len(rows) < 30 else None, "markersize": 3}
        label = f"{rows[-1]['score']:.2%} last   {name}"
        for axes, column in ((loss, "val_loss"), (accuracy, "score")):
            axes.plot([row["epoch"] for row in rows], [row[column] for row in rows], label=label, **line)
    for axes, name in ((loss, "loss"), (accuracy, "accuracy")):
        axes.set(xlabel="epoch", ylabel=name)
        axes.grid(alpha=0.3)
    accuracy.yaxis.set_major_formatter(PercentFormatter(1.0))
    legend = figure.legend(*accuracy.get_legend_handles_labels(), loc="outside lower left", frameon=False)
    for text in legend.get_texts():
        text.set_parse_math(False)
    _finish(figure, path, title)


def _plain(axes: Axes) -> None:
    """Class names may hold $, which is no formula here."""
    for text in (*axes.get_xticklabels(), *axes.get_yticklabels()):
        text.set_parse_math(False)


def _finish(figure: Figure, path: pathlib.Path, title: str) -> None:
    figure.suptitle(textwrap.fill(title, round(LETTERS * figure.get_figwidth())), parse_math=False)
    figure.savefig(path, dpi=DPI)

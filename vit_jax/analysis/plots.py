"""Pictures of a run."""

import pathlib
from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter


def curves(rows: Sequence[Mapping[str, float | None]], path: pathlib.Path, title: str, split: str) -> None:
    """Draws loss and accuracy over epochs from the rows of metrics.csv; `split` names what val_* was measured on."""
    epochs = [row["epoch"] for row in rows]
    figure = Figure(figsize=(10, 4), layout="constrained")
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
            axes.plot(epochs, points, color=color, marker=marker, markersize=3, label=f"{label} ({shown} at the end)")
    for axes, name in ((loss, "loss"), (accuracy, "accuracy")):
        axes.set(xlabel="epoch", ylabel=name)
        axes.grid(alpha=0.3)
        axes.legend()
    accuracy.yaxis.set_major_formatter(PercentFormatter(1.0))
    figure.suptitle(title)
    figure.savefig(path, dpi=120)

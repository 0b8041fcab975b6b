"""What a run writes besides its weights: metrics.csv, TensorBoard events, JSON files, and lines on the terminal."""

import contextlib
import csv
import io
import json
import math
import os
import pathlib
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, BinaryIO, TextIO

from tqdm import tqdm

from vit_jax.errors import UserError

COLUMNS = (
    "step",
    "epoch",
    "learning_rate",
    "train_loss",
    "train_accuracy",
    "val_loss",
    "val_accuracy",
    "val_accuracy_top5",
    "ema_val_accuracy",
    "images_per_second",
    "seconds",
)
NEVER_EMPTY = ("step", "epoch", "val_accuracy", "images_per_second", "seconds")
Row = dict[str, Any]  # a number a column, None where there is none


@contextlib.contextmanager
def replacing(path: pathlib.Path) -> Iterator[BinaryIO]:
    """A file to write, which then replaces `path` as a whole: after a crash there is the old one or the new one.

    A pipe or a device is written to, and a link keeps leading to its file.
    """
    if path.exists() and not path.is_file():
        with path.open("wb") as pipe:
            yield pipe
        return
    path = path.resolve()
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        try:
            file = part.open("wb+")
        except FileNotFoundError as error:
            raise UserError(f"cannot write {path}: {path.parent} takes no new files; give another path") from error
        with file:
            yield file
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_text(path: pathlib.Path, text: str) -> None:
    with replacing(path) as file:
        file.write(text.encode(errors="surrogateescape"))  # paths may be any bytes


def write_json(path: pathlib.Path, values: Any) -> None:
    """What is not finite, which JSON cannot hold, becomes null."""
    write_text(path, json.dumps(_finite(values), indent=1) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_csv(path: pathlib.Path, rows: Sequence[Any]) -> None:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    write_text(path, text.getvalue())


class Metrics:
    """The rows of metrics.csv, one an evaluation, and the same for TensorBoard.

    The file is the run's memory of its evaluations: after a resume from `step`, the rows after it, which will come
    again, are taken out.

    Args:
      writes: False where another process of the same run writes the same rows: they are only kept here.
    """

    def __init__(self, workdir: pathlib.Path, step: int, writes: bool = True):
        self.path = workdir / "metrics.csv"
        self.rows = [row for row in read_metrics(self.path) if row["step"] <= step]
        self._events = None
        if not writes:
            return
        with _hidden("torch", "comet_ml"):  # it would import them where they are installed, for seconds and no use
            from tensorboardX import SummaryWriter

        lines = [",".join(COLUMNS), *(",".join(_cell(row[c]) for c in COLUMNS) for row in self.rows)]
        write_text(self.path, "\n".join(lines) + "\n")
        self._events = SummaryWriter(str(workdir), purge_step=step + 1)

    def add(self, row: Row) -> None:
        self.rows.append(row)
        if self._events is None:
            return
        with self.path.open("a") as file:
            file.write(",".join(_cell(row[c]) for c in COLUMNS) + "\n")
        for name in COLUMNS[2:]:
            if row[name] is not None:
                self._events.add_scalar(name, row[name], row["step"])
        self._events.flush()

    def patience_is_over(self, patience: int) -> bool:
        """Whether the last `patience` evaluations brought no better score; never with a patience of 0."""
        if patience == 0 or not self.rows:
            return False
        return len(self.rows) - 1 - self.rows.index(best_row(self.rows)) >= patience

    def close(self) -> None:
        if self._events is not None:
            self._events.close()


@contextlib.contextmanager
def _hidden(*modules: str) -> Iterator[None]:
    """Makes these modules, but for those that are there already, impossible to import for a while."""
    absent = [name for name in modules if name not in sys.modules]
    sys.modules.update(dict.fromkeys(absent))  # type: ignore[arg-type]  # None: Python's own sign for that
    try:
        yield
    finally:
        for name in absent:
            del sys.modules[name]


def score(row: Row) -> float:
    """What decides which evaluation is best: the accuracy of the averaged weights where there are any."""
    ema = row["ema_val_accuracy"]
    return float(row["val_accuracy"] if ema is None else ema)


def best_row(rows: Sequence[Row]) -> Row:
    """The evaluation with the best score, the first of equals."""
    return max(rows, key=score)


def read_metrics(path: pathlib.Path) -> list[Row]:
    """The rows of a metrics.csv, None where a cell is empty; none where there is no file."""
    if not path.exists():
        return []
    try:
        lines = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
        # What is left out was cut short by a crash, and comes again.
        rows = [row for row in csv.reader(lines[1:]) if len(row) == len(COLUMNS)]
        found = [{c: float(v) if v else None for c, v in zip(COLUMNS, row, strict=True)} for row in rows]
        if any(row[c] is None for row in found for c in NEVER_EMPTY):
            raise ValueError("an empty cell")
        return found
    except (ValueError, csv.Error) as error:
        raise UserError(f"{path} is damaged ({error}): restore it, or start in another --workdir") from error


def _cell(value: float | None) -> str:
    if value is None:
        return ""
    return str(int(value)) if float(value).is_integer() and abs(value) < 1e15 else repr(float(value))


class Progress:
    """A bar on a terminal, a line every ten seconds elsewhere: step, loss, pictures a second, time left."""

    def __init__(self, step: int, total: int, batch_size: int, file: TextIO | None = None):
        self._file = file or sys.stderr
        self._total, self._batch_size = total, batch_size
        self._bar = tqdm(total=total, initial=step, unit="step", file=self._file, disable=not self._file.isatty())
        self._since = self._said = time.monotonic()
        self._first = step

    def update(self, step: int, loss: float | None) -> None:
        """`step` steps are done; `loss` is the mean since the last evaluation, None where it is not known yet."""
        now = time.monotonic()
        shown = "" if loss is None else f"loss {loss:.4f}, "
        rate = (step - self._first) / max(now - self._since, 1e-9)
        if not self._bar.disable:
            self._bar.set_postfix_str(f"{shown}{rate * self._batch_size:.0f} images/s")
            self._bar.update(step - self._bar.n)
        elif now - self._said >= 10:
            self._said = now
            left = time.strftime("%H:%M:%S", time.gmtime((self._total - step) / max(rate, 1e-9)))
            self.say(f"step {step}/{self._total}: {shown}{rate * self._batch_size:.0f} images/s, {left} left")

    def say(self, line: str) -> None:
        if self._bar.disable:
            print(line, file=self._file, flush=True)
        else:
            self._bar.write(line, file=self._file)

    def close(self) -> None:
        self._bar.close()


class Clock:
    """Seconds spent on training alone, over all of the run's sessions, and the speed since the last row."""

    def __init__(self, seconds: float):
        self.seconds = seconds
        self._interval, self._steps = 0.0, 0
        self.start()

    def start(self) -> None:
        self._since = time.monotonic()

    def count(self, steps: int) -> None:
        self._steps += steps

    def stop(self) -> None:
        elapsed = time.monotonic() - self._since
        self.seconds += elapsed
        self._interval += elapsed

    def rate(self, batch_size: int) -> Row:
        rate = self._steps * batch_size / max(self._interval, 1e-9)
        self._interval, self._steps = 0.0, 0
        return {"images_per_second": rate, "seconds": self.seconds}

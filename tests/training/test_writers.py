"""metrics.csv as a run's memory, and the lines of progress."""

import io
import json
import math
import os
import pathlib

import pytest

from vit_jax.errors import UserError
from vit_jax.training import writers


def row(step, accuracy, ema=None, **more):
    measured = {"epoch": step / 10, "images_per_second": 100.0, "seconds": 1.5 * step}
    values = {"step": step, "val_accuracy": accuracy, "ema_val_accuracy": ema}
    return dict.fromkeys(writers.COLUMNS) | measured | values | more


@pytest.fixture
def metrics(tmp_path):
    opened = writers.Metrics(tmp_path, 0)
    yield opened
    opened.close()


def test_rows_survive_a_round_trip_and_later_ones_go_on_resume(metrics, tmp_path):
    for step, loss in ((3, 0.1 + 0.2), (6, 1.0), (9, float("nan"))):
        metrics.add(row(step, 0.5, train_loss=loss))
    before = metrics.path.read_text()
    resumed = writers.Metrics(tmp_path, 6)
    assert [r["step"] for r in resumed.rows] == [3, 6]
    assert resumed.rows[0] == row(3, 0.5, train_loss=0.1 + 0.2)
    assert metrics.path.read_text() == "".join(before.splitlines(keepends=True)[:3])
    resumed.add(row(9, 0.5, train_loss=float("nan")))
    assert metrics.path.read_text() == before
    resumed.close()


def test_a_row_cut_short_by_a_crash_is_forgotten(metrics):
    metrics.add(row(3, 0.5))
    with metrics.path.open("a") as file:
        file.write("6,0.6,0.1,,,,0.25,,,100,1")  # of 15 seconds: all its commas are there
    assert [r["step"] for r in writers.read_metrics(metrics.path)] == [3]


@pytest.mark.parametrize("damage", [b"x" + b",x" * 10 + b"\n", b"," * 10 + b"\n", b"\xff\xfe\n"])
def test_a_damaged_file_is_named(metrics, damage):
    with metrics.path.open("ab") as file:
        file.write(damage)
    with pytest.raises(UserError, match="metrics.csv is damaged"):
        writers.read_metrics(metrics.path)


def test_the_best_is_the_first_of_equals_and_by_the_average_where_there_is_one(metrics):
    rows = [row(1, 0.2), row(2, 0.6), row(3, 0.6), row(4, 0.1)]
    assert writers.best_row(rows)["step"] == 2
    assert writers.best_row([row(1, 0.9, 0.1), row(2, 0.1, 0.2)])["step"] == 2


def test_patience(metrics):
    assert not metrics.patience_is_over(1)
    for step, accuracy in enumerate((0.5, 0.4, 0.6, 0.6, 0.5)):
        metrics.add(row(step, accuracy))
    assert metrics.patience_is_over(2) and metrics.patience_is_over(1)
    assert not metrics.patience_is_over(3) and not metrics.patience_is_over(0)


def test_a_file_is_replaced_as_a_whole(tmp_path):
    path = tmp_path / "a.json"
    writers.write_json(path, {"a": 1})
    writers.write_json(path, {"a": [1.5, None]})
    assert path.read_text().split() == ["{", '"a":', "[", "1.5,", "null", "]", "}"]
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_pipes_and_links_stay_what_they_are(tmp_path):
    (tmp_path / "target").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    writers.write_text(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "target").read_text() == "new"
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    writers.write_text(tmp_path / "pipe", "through")
    assert os.read(reader, 99) == b"through" and (tmp_path / "pipe").is_fifo()
    os.close(reader)


def test_where_no_file_can_be_made(tmp_path):
    with pytest.raises(UserError, match="cannot write /proc/x.json"):
        writers.write_json(pathlib.Path("/proc/x.json"), {})


def test_json_has_no_numbers_that_it_cannot_hold(tmp_path):
    writers.write_json(tmp_path / "x.json", {"a": [math.nan, 1.5], "b": {"c": (-math.inf, "d")}})
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": [None, 1.5], "b": {"c": [None, "d"]}}


def test_a_bar_on_a_terminal_and_plain_lines_elsewhere(monkeypatch):
    now = iter(range(0, 1000, 15))  # 15 seconds between updates
    monkeypatch.setattr(writers.time, "monotonic", lambda: next(now))
    log = io.StringIO()
    progress = writers.Progress(10, 110, 20, file=log)
    progress.update(15, 1.25)
    progress.close()
    assert log.getvalue() == "step 15/110: loss 1.2500, 7 images/s, 00:04:45 left\n"
    terminal = Terminal()
    progress = writers.Progress(10, 110, 20, file=terminal)
    progress.update(15, 1.25)
    progress.say("a line")
    progress.close()
    assert "loss 1.2500" in terminal.getvalue() and "15/110" in terminal.getvalue() and "a line" in terminal.getvalue()

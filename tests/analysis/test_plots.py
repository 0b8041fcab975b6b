"""The drawings that other tests do not reach: what a contact sheet shows, pixel for pixel."""

import numpy as np
import pytest
from PIL import Image

from vit_jax.analysis import plots

RANDOM = np.random.default_rng(0)


def draw(path, rows, headings=("one", "two"), notes=("a note",)):
    plots.contact_sheet(rows, headings, path, "title", notes)
    with Image.open(path) as sheet:
        return np.array(sheet.convert("RGB"))


def where(sheet, tile):
    """The corners (y, x) at which the tile lies in the sheet."""
    h, w = tile.shape[:2]
    corners = np.argwhere((sheet[: 1 - h or None, : 1 - w or None] == tile[0, 0]).all(-1))
    return [(y, x) for y, x in corners if np.array_equal(sheet[y : y + h, x : x + w], tile)]


def test_a_run_may_be_called_anything(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(plots.Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    row = dict.fromkeys(("train_accuracy", "ema_val_accuracy")) | {"epoch": 1.0, "train_loss": 1.0, "val_loss": 1.0}
    plots.curves([row | {"val_accuracy": 0.1}], tmp_path / "curves.png", "a $_$ ü", "test")
    (text,) = [text for text in drawn[0].texts if text.get_text() == "a $_$ ü"]
    assert not text.get_parse_math()


def test_each_curve_is_the_column_that_its_label_names(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(plots.Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    names = ("train_loss", "val_loss", "train_accuracy", "val_accuracy", "ema_val_accuracy")
    rows = [{"epoch": e} | {name: (e + i) / 10 for i, name in enumerate(names)} for e in (1.0, 2.0)]
    plots.curves(rows, tmp_path / "curves.png", "title", "held out")
    (figure,) = drawn
    found = {
        (axes.get_ylabel(), line.get_label().split(" (")[0]): line.get_xydata().tolist()
        for axes in figure.axes
        for line in axes.lines
    }
    assert found == {
        ("loss", "train"): [[1, 0.1], [2, 0.2]],
        ("loss", "held out"): [[1, 0.2], [2, 0.3]],
        ("accuracy", "train"): [[1, 0.3], [2, 0.4]],
        ("accuracy", "held out"): [[1, 0.4], [2, 0.5]],
        ("accuracy", "held out, averaged weights"): [[1, 0.5], [2, 0.6]],
    }


def test_a_curve_of_one_point_is_seen(tmp_path):
    """Of thirty rows only the last has a training accuracy, the others' labels being mixed."""
    empty = dict.fromkeys(("val_loss", "ema_val_accuracy", "train_accuracy")) | {"val_accuracy": 0.1}
    rows = [empty | {"epoch": float(i), "train_loss": 1.0} for i in range(30)]
    drawn = []
    for accuracy in (None, 0.5):
        rows[-1]["train_accuracy"] = accuracy
        plots.curves(rows, tmp_path / "curves.png", "title", "test")
        with Image.open(tmp_path / "curves.png") as picture:
            drawn.append(np.asarray(picture.convert("RGB"))[:, 600:])  # the right half: accuracy
    blue = [(np.abs(half.astype(int) - [31, 119, 180]).sum(-1) < 30) for half in drawn]
    assert not blue[0].any() and blue[1].any(axis=0).sum() > 5


@pytest.mark.parametrize(
    "shape, factor", [((8, 8, 1), 20), ((32, 32, 3), 5), ((64, 64, 3), 2), ((20, 50, 3), 3), ((160, 160, 3), 1)]
)
def test_small_pictures_are_enlarged_pixel_for_pixel(tmp_path, shape, factor):
    rows = [[(RANDOM.integers(0, 256, shape, np.uint8), "label") for _ in range(2)] for _ in range(3)]
    sheet = draw(tmp_path / "sheet.png", rows)
    found = [[where(sheet, np.kron(p.repeat(4 - p.shape[2], 2)[..., :3], enlarge(factor))) for p, _ in r] for r in rows]
    assert all(len(corners) == 1 for row in found for corners in row)
    (y, x), steps = found[0][0][0], (found[1][0][0][0] - found[0][0][0][0], found[0][1][0][1] - found[0][0][0][1])
    assert steps[0] > shape[0] * factor + plots.LINE and steps[1] == plots.TILE + plots.GAP  # labels have room
    for i, row in enumerate(found):
        assert row == [[(y + i * steps[0], x)], [(y + i * steps[0], x + steps[1])]]


def enlarge(factor):
    return np.ones((factor, factor, 1), np.uint8)


@pytest.mark.parametrize("shape", [(224, 224, 3), (100, 300, 1), (90, 90, 3)])
def test_other_pictures_are_brought_to_the_tile(tmp_path, shape):
    sheet = draw(tmp_path / "sheet.png", [[(np.full(shape, 7, np.uint8), "x")]], headings=("one",))
    rows, columns = np.nonzero((sheet == 7).all(-1).sum(1) > 40)[0], np.nonzero((sheet == 7).all(-1).sum(0) > 40)[0]
    scale = plots.TILE / max(shape)
    assert (len(rows), len(columns)) == (round(shape[0] * scale), round(shape[1] * scale))


def test_texts_are_drawn_as_they_are_and_long_notes_make_the_sheet_higher(tmp_path):
    picture = np.zeros((8, 8, 1), np.uint8)
    plain = draw(tmp_path / "plain.png", [[(picture, "a")]], headings=("one",))
    odd = draw(tmp_path / "odd.png", [[(picture, "$\\frac{ $a_b^c$")]], headings=("one",))  # no formula
    more = draw(tmp_path / "more.png", [[(picture, "a\n+ b")]], headings=("one",), notes=("word " * 40,))
    assert plain.shape == odd.shape and not np.array_equal(plain, odd)
    assert more.shape[0] > plain.shape[0] + 5 * plots.LINE and more.shape[1] == plain.shape[1]

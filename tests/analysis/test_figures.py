"""Drawings: that they show the numbers they are given, and that all that is written in them can be read."""

import itertools

import matplotlib
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from vit_jax.analysis import figures, metrics, plots

RANDOM = np.random.default_rng(0)
TITLE = "a run of a $_$ name that is as long as it can be, and longer: something that is drawn of it, with numbers"
LONG = "a $_$ class, whose name\nis longer than any label"


@pytest.fixture
def saved(monkeypatch):
    """The figures that were saved, in order."""
    kept, save = [], Figure.savefig

    def keep(figure, *arguments, **options):
        save(figure, *arguments, **options)
        kept.append(figure)

    monkeypatch.setattr(Figure, "savefig", keep)
    return kept


def outside(figure):
    """The labels of ticks beyond the axes' limits, which are not drawn."""
    for axis in itertools.chain.from_iterable((axes.xaxis, axes.yaxis) for axes in figure.axes):
        low, high = sorted(axis.get_view_interval())
        for tick in (*axis.get_major_ticks(), *axis.get_minor_ticks()):
            if not low - 1e-9 <= tick.get_loc() <= high + 1e-9:
                yield from (tick.label1, tick.label2)


def written(figure):
    """All texts that are drawn, by what they say."""
    hidden = {id(label) for label in outside(figure)}
    return [t for t in figure.findobj(Text) if t.get_text().strip() and t.get_visible() and id(t) not in hidden]


def assert_readable(figure):
    """No text leaves the picture, and none lies on another. (Slanted ones have boxes larger than they are.)"""
    FigureCanvasAgg(figure).draw()
    boxes = [(t.get_text(), t.get_window_extent(), t.get_rotation()) for t in written(figure)]
    for words, box, _ in boxes:
        assert box.x0 >= -1 and box.y0 >= -1 and box.x1 <= figure.bbox.x1 + 1 and box.y1 <= figure.bbox.y1 + 1, words
    upright = [(words, box.shrunk(0.9, 0.9)) for words, box, rotation in boxes if rotation % 90 == 0]
    for (one, a), (other, b) in itertools.combinations(upright, 2):
        assert not a.overlaps(b), (one, other)


def words(figure):
    return [t.get_text() for t in written(figure)]


def test_reliability_shows_accuracy_and_confidence_by_bin(saved, tmp_path):
    confidence = RANDOM.uniform(0.2, 1, 5000)
    correct = RANDOM.random(5000) < confidence**2  # overconfident
    sums = metrics.reliability(confidence, correct)
    figures.reliability(sums, tmp_path / "r.png", TITLE)
    above, below = saved[0].axes
    accuracy, gap = above.containers
    examples, right, sure = sums[:, sums[0] > 0]
    np.testing.assert_allclose([bar.get_height() for bar in accuracy if bar.get_height()], right / examples)
    np.testing.assert_allclose([bar.get_y() + bar.get_height() for bar in gap], sure / examples)
    np.testing.assert_allclose([bar.get_height() for bar in below.containers[0]], sums[0] / 5000)
    assert f"{metrics.calibration_error(confidence, correct):.2%}" in " ".join(words(saved[0]))
    assert above.get_ylabel() == "accuracy" and "confidence" in below.get_xlabel()
    assert_readable(saved[0])


@pytest.mark.parametrize("count", [2, 10, 30])
def test_confusions_of_few_classes_are_a_grid(saved, tmp_path, count):
    matrix = RANDOM.integers(0, 1000, (count, count)) * (RANDOM.random((count, count)) < 0.7)
    figures.confusions(matrix, [f"{i} {LONG}" for i in range(count)], tmp_path / "c.png", TITLE)
    axes, bar = saved[0].axes
    np.testing.assert_allclose(axes.images[0].get_array(), matrix / np.maximum(matrix.sum(1, keepdims=True), 1))
    numbers = {(round(t.get_position()[1]), round(t.get_position()[0])): t.get_text() for t in axes.texts}
    assert numbers == {(row, column): str(n) for (row, column), n in np.ndenumerate(matrix) if n}
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert labels == [f"{i} a $_$ class, whose name is longer"[:21].rstrip() + "…" for i in range(count)]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("predicted class", "true class") and bar.get_ylabel()
    assert_readable(saved[0])


def test_confusions_of_many_classes_are_named(saved, tmp_path):
    matrix = np.diag(np.full(31, 50)) + np.eye(31, k=1, dtype=int) * np.arange(31)
    names = [f"class {i}" for i in range(31)]
    figures.confusions(matrix, names, tmp_path / "c.png", TITLE)
    (axes,) = saved[0].axes
    assert [bar.get_width() for bar in axes.patches] == list(range(30, 10, -1))
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert len(labels) == 20 and labels[0] == "class 29 → class 30"
    assert "30 (38%)" in words(saved[0])  # 30 of 80
    assert_readable(saved[0])


def test_confusions_of_many_classes_without_a_mistake(saved, tmp_path):
    figures.confusions(np.diag(np.full(40, 2)), [str(i) for i in range(40)], tmp_path / "c.png", TITLE)
    assert not saved[0].axes[0].patches


@pytest.mark.parametrize("grid, step", [((4, 6), 1), ((14, 14), 2), ((1, 1), 1)])
def test_positions_are_a_map_a_patch(saved, tmp_path, grid, step):
    similarity = RANDOM.uniform(-1, 1, (*grid, *grid))
    figures.positions(similarity, tmp_path / "p.png", TITLE)
    axes, bar = saved[0].axes
    mosaic = axes.images[0].get_array()
    height, width = grid
    for i, j in np.ndindex(*(-(-n // step) for n in grid)):
        y, x = i * (height + 1), j * (width + 1)
        np.testing.assert_array_equal(mosaic[y : y + height, x : x + width], similarity[step * i, step * j])
    assert [t.get_text() for t in axes.get_xticklabels()] == [str(n + 1) for n in range(0, width, step)]
    assert axes.images[0].get_clim() == (-1, 1) and "cosine" in bar.get_ylabel()
    assert_readable(saved[0])


@pytest.mark.parametrize("layers, heads", [(1, 1), (12, 12), (24, 16)])
def test_distances_are_a_dot_a_head(saved, tmp_path, layers, heads):
    distance = RANDOM.uniform(10, 120, (layers, heads))
    figures.distances(distance, 110.0, tmp_path / "d.png", TITLE)
    (axes,) = saved[0].axes
    dots = np.asarray(axes.collections[0].get_offsets())
    np.testing.assert_array_equal(dots[:, 0], np.arange(1, layers + 1).repeat(heads))
    np.testing.assert_array_equal(dots[:, 1], distance.ravel())
    assert axes.get_ylim()[0] == 0 and axes.get_ylim()[1] > max(110, distance.max()) and "pixels" in axes.get_ylabel()
    assert any(f"{heads} heads" in x if heads > 1 else "one head" in x for x in words(saved[0]))
    assert_readable(saved[0])


def test_runs_are_compared_by_name(saved, tmp_path):
    def rows(count, final):
        return [{"epoch": i, "val_loss": 1 / i, "score": final * i / count} for i in range(1, count + 1)]

    runs = {f"runs/a $_$ {i}": rows(3 + 10 * i, 0.5 + i / 100) for i in range(12)}
    figures.comparison(runs, tmp_path / "c.png", TITLE)
    loss, accuracy = saved[0].axes
    assert len(loss.lines) == len(accuracy.lines) == 12
    np.testing.assert_allclose(accuracy.lines[2].get_ydata(), [row["score"] for row in runs["runs/a $_$ 2"]])
    assert len({(line.get_color(), line.get_linestyle()) for line in loss.lines}) == 12  # told apart
    assert "52.00% last   runs/a $_$ 2" in words(saved[0])
    assert_readable(saved[0])


# --- colours over pictures ------------------------------------------------------------------------------------------


def test_heat_is_darkest_at_0_and_brightest_at_the_largest():
    colours = figures.heat(np.array([[0, 1], [2, 4.0]]))
    assert colours.shape == (2, 2, 3) and colours.dtype == np.uint8
    light = colours.astype(int).sum(-1)
    assert light[0, 0] < light[0, 1] < light[1, 0] < light[1, 1]
    expected = np.round(255 * np.array(matplotlib.colormaps["inferno"](0.25))[:3])
    np.testing.assert_array_equal(colours[0, 1], expected)
    np.testing.assert_array_equal(figures.heat(100 * np.array([[0, 1], [2, 4.0]])), colours)  # its own scale
    np.testing.assert_array_equal(
        figures.heat(np.zeros((1, 2))), figures.heat(np.array([[0, 1.0]]))[:, :1].repeat(2, 1)
    )


@pytest.mark.parametrize("shape", [(8, 8, 1), (32, 32, 3), (224, 224, 3), (20, 40, 3), (16, 16, 4)])
def test_an_overlay_is_brightest_where_the_number_is_largest(shape):
    picture = np.full(shape, 100, np.uint8)
    values = np.zeros((4, 4))
    values[1, 3] = 1
    found = figures.overlay(picture, values)
    assert found.shape == plots.tile(picture).shape and found.dtype == np.uint8
    light = found.astype(int).sum(-1)
    y, x = np.unravel_index(light.argmax(), light.shape)
    assert (y * 4 // light.shape[0], x * 4 // light.shape[1]) == (1, 3)
    np.testing.assert_allclose(found[-1, 0], 40, atol=3)  # nothing there: the picture, darker
    assert np.ptp(figures.overlay(picture, np.ones((4, 4))).reshape(-1, 3), axis=0).max() == 0  # even stays even


def test_a_sheet_with_a_scale(saved, tmp_path):
    """Room for a long title, notes and the bar of colours above the pictures."""
    picture = RANDOM.integers(0, 256, (32, 32, 3), np.uint8)
    rows = [[(picture, f"{layer}\n{head}") for head in range(3)] for layer in range(2)]
    path = tmp_path / "sheet.png"
    title = "a run with a long name: attention of all tokens, on average"
    plots.contact_sheet(rows, ["one", "two", "three"], path, title, ["words " * 40], figures.scale())
    assert_readable(saved[0])
    with Image.open(path) as image:
        sheet = np.asarray(image.convert("RGB"))
    bar = figures.scale()[1]
    places = np.argwhere((sheet[:, :, None] == bar[0, :1]).all((2, 3)))
    found = [(y, x) for y, x in places if np.array_equal(sheet[y : y + len(bar), x : x + bar.shape[1]], bar)]
    assert len(found) == 1
    y, tile = found[0][0], plots.tile(picture)
    first = [i for i in range(len(sheet) - 160) if np.array_equal(sheet[i : i + 160, 24:184], tile)][0]
    assert y + len(bar) < first - 2 * plots.GAP
    assert {"0", "the largest"} <= set(words(saved[0]))

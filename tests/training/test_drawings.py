"""Drawings of a trained run: which pictures and numbers reach them, and what is left out."""

import pathlib
import shutil

import jax
import numpy as np
import pytest
from PIL import Image

from vit_jax.analysis import attention, embeddings, plots
from vit_jax.data.load import load
from vit_jax.errors import Absent, UserError
from vit_jax.training import drawings
from vit_jax.training.drawings import Subject


@pytest.fixture(scope="module")
def run(finished, tmp_path_factory):
    """A run to draw into."""
    ignored = shutil.ignore_patterns("figures")
    return shutil.copytree(finished, tmp_path_factory.mktemp("drawn") / "run", ignore=ignored)


@pytest.fixture(scope="module")
def subject(run):
    return Subject(run)


@pytest.fixture
def sheets(monkeypatch):
    """The arguments of each contact sheet."""
    drawn = []
    monkeypatch.setattr(plots, "contact_sheet", lambda *arguments: drawn.append(arguments))
    return drawn


@pytest.fixture(scope="module")
def other_run(commands, tmp_path_factory):
    """A run of a model with neither a table of positions nor filters over pixels, with a class token."""
    workdir = tmp_path_factory.mktemp("other") / "run"
    commands.train(workdir, model__position_embedding="none", model__stem="conv", model__pool="cls", train__steps=6)
    return workdir


def test_some_test_pictures_are_shown_each_of_another_class(subject):
    images, names = subject.shown
    test = load("digits", "test")
    assert names == [str(digit) for digit in (0, 1, 3, 4, 5, 6, 8, 9)]
    for image, name in zip(images, names, strict=True):
        first = np.flatnonzero(test.labels == int(name))[0]
        np.testing.assert_array_equal(image, test.images[first])
    indices = [round(i * (len(test.labels) - 1) / 63) for i in range(64)]  # from the first to the last
    np.testing.assert_array_equal(subject.measured, test.images[indices])


def test_ones_own_pictures_are_shown_as_the_model_takes_them(run, tmp_path):
    Image.new("RGB", (40, 20), (255, 0, 0)).save(tmp_path / "red.png")
    Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).save(tmp_path / "grey.png")
    subject = Subject(run, [tmp_path / "red.png", tmp_path / "grey.png"])
    images, names = subject.shown
    assert images.shape == (2, 8, 8, 1) and names == ["red.png", "grey.png"]
    assert (images[0] == 76).all()  # of red, Pillow's luma
    np.testing.assert_array_equal(images[1].ravel(), np.arange(64))
    assert subject.measured is images


def test_arrays_are_those_of_all_pictures_at_once(subject):
    images = load("digits", "test").images[:11]  # a full batch, and a part of one
    found = subject.compute(attention.attention_weights, images)
    inputs = subject.run.inputs(images)
    expected = attention.attention_weights(subject.model, subject.run.params, inputs)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    logits = subject.model.apply({"params": subject.run.params}, inputs, train=False)
    np.testing.assert_allclose(logits, subject.run.classifier.logits(subject.run.params, images), atol=1e-5)


def test_attention_is_drawn_by_layer_and_head(run, subject, sheets):
    (run / "figures").mkdir(exist_ok=True)
    stale = run / "figures" / "attention_99.png"
    stale.write_text("of an earlier drawing")
    paths = drawings.attention_maps(subject)
    assert [path.name for path in paths] == [f"attention_{i}.png" for i in range(1, 9)] and not stale.exists()
    images, names = subject.shown
    weights = attention.attention_weights(subject.model, subject.run.params, subject.run.inputs(images))
    for (rows, headings, path, _, _, _), image, name, own, expected in zip(
        sheets, images, names, paths, weights, strict=True
    ):
        assert headings == [name, "head 1", "head 2"] and path == own and len(rows) == 1
        (first, label), *heads = rows[0]
        np.testing.assert_array_equal(first, image)
        assert label == "layer 1"
        for (picture, under), head in zip(heads, expected[0], strict=True):
            mean_query = head.mean(0).reshape(4, 4)
            place = np.unravel_index(mean_query.argmax(), (4, 4))
            assert picture.shape == (4, 4, 3) and picture.astype(int).sum(-1).max() == picture[place].astype(int).sum()
            assert under == f"{mean_query.max():.3f}"


def test_relevance_is_that_of_the_two_most_probable_classes(subject, sheets, monkeypatch):
    asked = []
    monkeypatch.setattr(
        attention,
        "relevance",
        lambda model, params, inputs, classes: asked.append(classes) or np.ones((len(classes), 4, 4)),
    )
    drawings.relevance(subject)
    images, names = subject.shown
    logits = subject.run.classifier.logits(subject.run.params, images)
    order = np.argsort(-logits, axis=1)[:, :2]
    np.testing.assert_array_equal(np.stack(asked, axis=1), order)
    ((rows, headings, _, _, _, _),) = sheets
    assert headings == ["picture", "most probable", "second"] * 2
    cells = [cell for row in rows for cell in row]
    probabilities = np.asarray(jax.nn.softmax(logits))
    for i, name in enumerate(names):
        labels = [label for _, label in cells[3 * i : 3 * i + 3]]
        best = [f"{c}  {probabilities[i, c]:.3f}".replace(" 0.", " .") for c in order[i]]
        assert labels == [name, *best]


def test_rollout_says_how_uneven_it_is(subject, sheets):
    drawings.rollout(subject)
    ((rows, headings, _, _, _, _),) = sheets
    assert headings == ["picture", "rollout"] * 3 and [len(row) for row in rows] == [6, 6, 4]
    images, _ = subject.shown
    weights = attention.attention_weights(subject.model, subject.run.params, subject.run.inputs(images))
    flow = np.asarray(attention.rollout(weights)).mean(1)  # [B, N]
    labels = [label for row in rows for _, label in row[1::2]]
    assert labels == [f"{16 * x.min():.2f} to {16 * x.max():.2f}" for x in flow]  # of the mean, a sixteenth


def test_distances_positions_and_filters_are_drawn_as_they_were_found(subject, sheets, monkeypatch):
    drawn = {}
    for name in ("distances", "positions"):
        monkeypatch.setattr(drawings.figures, name, lambda *arguments, name=name: drawn.update({name: arguments}))
    drawings.distance(subject)
    drawings.positions(subject)
    drawings.filters(subject)
    model, params, grid = subject.model, subject.run.params, (4, 4)
    weights = attention.attention_weights(model, params, subject.run.inputs(subject.measured))
    expected = attention.attention_distance(weights, grid, model.patch_size).mean(0)
    far, even = drawn["distances"][:2]
    np.testing.assert_allclose(far, expected, rtol=1e-5)
    assert even == pytest.approx(attention.patch_distances(grid, model.patch_size).mean())
    np.testing.assert_array_equal(drawn["positions"][0], embeddings.position_similarity(model, params, grid))
    ((rows, _, _, _, _, _),) = sheets
    cells = [cell for row in rows for cell in row]
    components = embeddings.patch_filters(model, params)
    assert [label for _, label in cells] == [str(i + 1) for i in range(len(components))]
    for (picture, _), component in zip(cells, components, strict=True):
        grey = picture.astype(float) - 127.5
        assert np.corrcoef(grey.ravel(), component.ravel())[0, 1] > 0.999


def test_curves_name_what_they_were_measured_on(commands, tmp_path, monkeypatch):
    commands.train(tmp_path / "held", train__steps=3, data__holdout=0.2)
    drawn = []
    monkeypatch.setattr(plots, "curves", lambda *arguments: drawn.append(arguments))
    monkeypatch.chdir(tmp_path / "held")
    assert drawings.curves(Subject(pathlib.Path("."))) == [pathlib.Path("curves.png")]
    assert drawn[0][2:] == ("held", "held out")


def test_what_a_model_has_not_is_left_out_or_an_error(other_run):
    subject = Subject(other_run)
    paths, left_out = drawings.draw(subject, "all")
    assert [line.partition(":")[0] for line in left_out] == ["positions left out", "filters left out"]
    assert "position_embedding=none" in left_out[0] and "stem=conv" in left_out[1]
    names = {path.name for path in paths}
    assert names == {f"attention_{i}.png" for i in range(1, 9)} | {
        *("rollout.png", "relevance.png", "distance.png", "curves.png", "evaluation.json", "reliability.png"),
        *("confusion.csv", "confusion.png", "classes.csv", "mistakes.png"),
    }
    assert all(path.exists() for path in paths)
    for name in ("positions", "filters"):
        with pytest.raises(Absent):
            drawings.draw(subject, name)


def test_the_class_tokens_share_is_told_apart(other_run, sheets):
    subject = Subject(other_run)
    drawings.attention_maps(subject)
    weights = attention.attention_weights(subject.model, subject.run.params, subject.run.inputs(subject.shown[0]))
    (_, (picture, under), _) = sheets[0][0][0]
    assert picture.shape == (4, 4, 3)
    assert under == f"{weights[0, 0, 0, 0, 1:].max():.3f}   cls {weights[0, 0, 0, 0, 0]:.3f}"


def test_curves_of_several_runs(run, other_run, monkeypatch):
    drawn = []
    monkeypatch.setattr(drawings.figures, "comparison", lambda *arguments: drawn.append(arguments))
    (path,) = drawings.curves(Subject(run, compare=[other_run]))
    ((rows, drawn_to, _),) = drawn
    assert path == drawn_to == run / "figures" / "comparison.png"
    assert list(rows) == [f"{run} (test)", f"{other_run} (test)"]
    assert [row["score"] for row in rows[f"{run} (test)"]] == [
        row["ema_val_accuracy"] for row in drawings.read_metrics(run / "metrics.csv")
    ]
    with pytest.raises(UserError, match="no run in"):
        drawings.curves(Subject(run, compare=[run / "checkpoints"]))
    (other_run / "metrics.csv").rename(other_run / "moved")
    with pytest.raises(Absent, match="no evaluation yet"):
        drawings.curves(Subject(other_run))
    (other_run / "moved").rename(other_run / "metrics.csv")

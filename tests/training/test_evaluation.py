"""Measuring a run: on another source, with mirror images, and what is written about it."""

import csv
import dataclasses
import json

import jax
import numpy as np
import pytest
from PIL import Image

from vit_jax.data.splits import Split
from vit_jax.errors import UserError
from vit_jax.training import evaluation, setup, trained


@pytest.fixture(scope="module")
def run(finished):
    return trained.open_run(finished)


def pictures_in(folder, classes, count=3):
    """PATH/CLASS/*.png, RGB noise of 9 x 11 pixels."""
    random = np.random.default_rng(0)
    for name in classes:
        (folder / name).mkdir(parents=True)
        for i in range(count):
            Image.fromarray(random.integers(0, 256, (9, 11, 3), np.uint8)).save(folder / name / f"{i}.png")
    return folder


def test_mirror_images_share_their_probabilities(run, finished):
    split = trained.measured_split(run)
    measured = evaluation.evaluate(trained.open_run(finished), flip_tta=True)
    alone = evaluation.evaluate(trained.open_run(finished))
    assert {k: v for k, v in measured.report.items() if not k.endswith("_flip")} == alone.report
    views = split.images, split.images[:, :, ::-1]
    one, other = (np.float64(jax.nn.softmax(run.classifier.logits(run.params, view))) for view in views)
    probabilities = (one + other) / 2
    assert not np.allclose(one, other)
    report = measured.report
    assert report["accuracy_flip"] == pytest.approx(np.mean(probabilities.argmax(1) == split.labels))
    likelihood = probabilities[np.arange(len(split.labels)), split.labels]
    assert report["loss_flip"] == pytest.approx(-np.log(likelihood).mean(), rel=1e-5)
    assert report["accuracy_top5_flip"] > report["accuracy_flip"] and 0 < report["ece_flip"] < 1
    assert report["loss_flip"] != report["loss"]


def test_a_run_is_opened_where_there_are_fewer_devices(run, monkeypatch):
    """A run of 8 devices on one; and 64 pictures at once on 3 devices, which cannot share them."""
    config = run.config.copy_and_resolve_references()
    config.mesh.data = 8
    assert trained._devices(config) == (1, 1)
    monkeypatch.setattr(jax, "local_device_count", lambda: 3)
    config.mesh.data = -1
    assert setup.part_size(config) == 64 and trained._devices(config) == (1, 1)
    monkeypatch.setattr(jax, "local_device_count", lambda: 4)
    assert trained._devices(config) == (4, 1)
    config.mesh.model = 2
    assert trained._devices(config) == (2, 2)
    config.mesh.data = 1
    assert trained._devices(config) == (1, 2)
    config.mesh.model = 8
    assert trained._devices(config) == (1, 1)


# --- another source -------------------------------------------------------------------------------------------------


@pytest.fixture
def coloured(run, tmp_path):
    """The run, as if it had been trained on RGB pictures of these classes, in this order."""
    config = run.config.copy_and_resolve_references()
    config.data.update({"mean": (0.5, 0.5, 0.5), "std": (0.2, 0.2, 0.2), "dir": str(tmp_path / "cache")})
    return dataclasses.replace(run, config=config, class_names=("pear", "apple", "fig"))


def test_a_folder_of_the_same_classes_in_another_order(coloured, tmp_path):
    folder = pictures_in(tmp_path / "fruit", ["apple", "fig", "pear"])
    split = trained.measured_split(coloured, f"folder:{folder}")
    assert split.class_names == coloured.class_names and split.images.shape == (9, 8, 8, 3)
    np.testing.assert_array_equal(split.labels, [1, 1, 1, 2, 2, 2, 0, 0, 0])


def test_a_folders_test_pictures_are_taken_where_there_are_any(coloured, tmp_path):
    for split, count in (("train", 4), ("val", 2)):
        pictures_in(tmp_path / "fruit" / split, ["apple", "fig", "pear"], count)
    assert len(trained.measured_split(coloured, f"folder:{tmp_path / 'fruit'}").labels) == 6


@pytest.mark.parametrize(
    "classes, words",
    [
        (["apple", "fig", "pear", "plum"], ["only there: plum)"]),
        (["apple", "fig"], ["only in the run: pear)"]),
        (["Apple", "fig", "pear"], ["only there: Apple", "only in the run: apple"]),
        ([*"abcdefg"], ["only there: a, b, c, d, e and 2 more", "only in the run: pear, apple, fig"]),
    ],
)
def test_other_classes_are_named(coloured, tmp_path, classes, words):
    folder = pictures_in(tmp_path / "fruit", classes, count=1)
    with pytest.raises(UserError) as error:
        trained.measured_split(coloured, f"folder:{folder}")
    assert all(word in str(error.value) for word in words), error.value


def test_pictures_of_other_channels_are_refused(run, tmp_path):
    """Digits are grey."""
    config = run.config.copy_and_resolve_references()
    config.data.dir = str(tmp_path / "cache")
    folder = pictures_in(tmp_path / "digits", "0123456789", count=1)
    with pytest.raises(UserError, match="3 channels.* 1: give another"):
        trained.measured_split(dataclasses.replace(run, config=config), f"folder:{folder}")


# --- what is written ------------------------------------------------------------------------------------------------


def of(labels, predictions, confidence, names=("cat", "a, dog", "cow")):
    labels, predictions = np.int32(labels), np.int32(predictions)
    images = np.random.default_rng(0).integers(0, 256, (len(labels), 8, 8, 3), np.uint8)
    results = {
        "prediction": predictions,
        "confidence": np.float32(confidence),
        "correct": np.float32(labels == predictions),
    }
    report = {"accuracy": float(np.mean(labels == predictions)), "dataset": "farm", "checkpoint_step": None}
    return evaluation.Evaluation(report, Split(images, labels, tuple(names), (), ()), results)


def test_tables_and_pictures(tmp_path):
    measured = of([0, 0, 0, 1, 1, 2], [0, 0, 1, 1, 0, 0], [0.9, 0.8, 0.7, 0.6, 0.99, 0.5])
    paths = evaluation.write(measured, tmp_path)
    assert sorted(paths) == sorted(path for path in tmp_path.rglob("*") if path.is_file())
    assert {path.name for path in paths} == {
        *("evaluation.json", "reliability.png", "confusion.csv", "confusion.png", "classes.csv", "mistakes.png")
    }
    assert json.loads((tmp_path / "evaluation.json").read_text()) == measured.report
    with (tmp_path / "figures" / "confusion.csv").open(newline="") as file:
        header, *rows = csv.reader(file)
    assert header[1:] == [row[0] for row in rows] == ["cat", "a, dog", "cow"]
    assert [row[1:] for row in rows] == [["2", "1", "0"], ["1", "1", "0"], ["1", "0", "0"]]
    with (tmp_path / "figures" / "classes.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows[0] == {
        "class": "cat",
        "examples": "3",
        "accuracy": str(2 / 3),
        "precision": "0.5",
        "mistaken_for": "a, dog",
    }
    assert rows[2]["precision"] == "" and float(rows[1]["accuracy"]) == 0.5


def test_the_most_confident_mistakes_come_first(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(evaluation.plots, "contact_sheet", lambda *arguments: drawn.append(arguments))
    confidence = np.linspace(0.3, 0.9999, 60)
    labels = np.arange(60) % 3
    measured = of(labels, np.where(np.arange(60) < 5, labels, (labels + 1) % 3), confidence)
    evaluation.draw_mistakes(measured, tmp_path / "mistakes.png", "title")
    ((rows, headings, _, _, notes, _),) = drawn
    cells = [cell for row in rows for cell in row]
    assert [len(row) for row in rows] == [8, 8, 8, 8] and len(headings) == 8
    for (picture, label), i in zip(cells, range(59, 27, -1), strict=True):
        np.testing.assert_array_equal(picture, measured.split.images[i])
        names = measured.split.class_names
        probability = f"{confidence[i]:.3f}".lstrip("0")
        assert label == f"{names[labels[i]]}\n→ {names[(labels[i] + 1) % 3]}  {probability}"
    assert cells[0][1].endswith("1.000") and "55 of 60" in notes[0]


def test_a_model_without_mistakes(tmp_path):
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "mistakes.png").write_text("of an earlier evaluation")
    paths = evaluation.write(of([0, 1, 2], [0, 1, 2], [0.9, 0.9, 1]), tmp_path)
    assert not any(path.name == "mistakes.png" for path in paths)
    assert not (tmp_path / "figures" / "mistakes.png").exists()

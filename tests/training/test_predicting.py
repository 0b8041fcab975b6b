"""Predictions: pictures of any kind and size reach the model as in evaluation, in batches of one shape."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from PIL import Image

import vit_jax
from vit_jax.errors import UserError
from vit_jax.training import dispatch, predicting, setup, trained
from vit_jax.training.predicting import Predictor
from vit_jax.training.step import Classifier


@pytest.fixture(scope="module")
def run(finished):
    return trained.open_run(finished)


@pytest.fixture(scope="module")
def split(run):
    return trained.measured_split(run)


def untrained(run, **fields):
    """The run with other fields, dots written as __, and random weights."""
    config = run.config.copy_and_resolve_references()
    for name, value in (fields | {"model__head_zero_init": False}).items():
        group, _, field = name.partition("__")
        config[group][field] = value
    classifier = setup.make_classifier(config, len(run.class_names), run.classifier.mesh)
    return dataclasses.replace(run, config=config, classifier=classifier, params=classifier.init(3))


@pytest.fixture(scope="module")
def coloured(run):
    """A model of RGB pictures from a folder, stored with 8 x 8 pixels."""
    data = {"data__name": "folder:fruit", "data__mean": (0.5, 0.5, 0.5), "data__std": (0.2, 0.2, 0.2)}
    return Predictor(untrained(run, **data))


def saved(folder, images):
    paths = [folder / f"{i}.png" for i in range(len(images))]
    for image, path in zip(images, paths, strict=True):
        Image.fromarray(image.squeeze()).save(path)
    return paths


@pytest.mark.parametrize("image_size", [8, 16])  # of the model's input: the device resizes the 8 x 8 pixels
def test_pictures_of_the_datas_own_size_are_predicted_as_evaluation_does(run, split, tmp_path, image_size):
    run = run if image_size == 8 else untrained(run, data__image_size=image_size, model__patch_size=4)
    few = dataclasses.replace(split, images=split.images[:20], labels=split.labels[:20])
    measured = dispatch.make_evaluator(run.classifier, few, 64)(run.params)
    predictor = Predictor(run)
    paths = saved(tmp_path, few.images)
    for path, image in zip(paths, few.images, strict=True):
        np.testing.assert_array_equal(run.read(path), image)
    found = predictor.predict(paths, top=10)
    np.testing.assert_array_equal([p[0]["index"] for p in found], measured["prediction"])
    np.testing.assert_allclose([p[0]["probability"] for p in found], measured["confidence"], rtol=1e-5)
    probabilities = np.array(
        [{p["index"]: p["probability"] for p in f}[y] for f, y in zip(found, few.labels, strict=True)]
    )
    np.testing.assert_allclose(-np.log(probabilities), measured["loss"], rtol=1e-4)


def test_the_most_probable_come_first_and_are_named(run, split):
    image = split.images[0]
    probabilities = np.asarray(jax.nn.softmax(run.classifier.logits(run.params, image[None])))[0]
    order = np.argsort(-probabilities)
    found = Predictor(run).predict(image, top=3)
    assert [p["index"] for p in found] == order[:3].tolist()
    assert [p["label"] for p in found] == [run.class_names[i] for i in order[:3]]
    np.testing.assert_allclose([p["probability"] for p in found], probabilities[order[:3]], rtol=1e-5)
    every = Predictor(run).predict(image, top=99)
    assert len(every) == 10 and sum(p["probability"] for p in every) == pytest.approx(1, abs=1e-6)


def test_three_lines_do_it(finished, split, tmp_path):
    classifier = vit_jax.load(finished)
    paths = saved(tmp_path, split.images[:2])
    expected = classifier.predict(split.images[:2])
    for images in (paths, [str(p) for p in paths], [Image.open(p) for p in paths], [*split.images[:2, ..., 0]]):
        assert classifier.predict(images) == expected
        one = classifier.predict(images[0])
        assert [p["label"] for p in one] == [p["label"] for p in expected[0]]
    assert classifier.predict([]) == [] and len(classifier.predict(paths[0], top=2)) == 2
    with pytest.raises(UserError, match=r"uint8 .* not float32 \[8, 8\]"):
        classifier.predict(np.zeros((8, 8), np.float32))


def picture(mode):
    """A picture of 8 x 8 pixels, each quarter another colour, in a mode, and as RGB."""
    quarters = np.array([[[200, 30, 40], [10, 220, 60]], [[15, 25, 230], [250, 250, 250]]], np.uint8)
    rgb = Image.fromarray(quarters.repeat(4, axis=0).repeat(4, axis=1))
    return rgb.quantize(4) if mode == "P" else rgb.convert(mode)


@pytest.mark.parametrize("mode, kind", [("RGB", "webp"), ("P", "gif"), ("RGBA", "png"), ("L", "bmp"), ("LA", "png")])
def test_modes_and_formats(coloured, tmp_path, mode, kind):
    path = tmp_path / f"picture.{kind}"
    picture(mode).save(path, **({"lossless": True} if kind == "webp" else {}))
    grey = mode.startswith("L")
    expected = np.asarray((picture("L") if grey else picture("RGB")).convert("RGB"))
    np.testing.assert_array_equal(coloured.run.read(path), expected)


def test_what_is_transparent_lies_on_white(coloured, tmp_path):
    image = picture("RGBA")
    image.putalpha(Image.fromarray(np.repeat(np.uint8([[0], [255]]), 4, axis=0).repeat(8, axis=1)))
    image.save(tmp_path / "clear.png")
    found = coloured.run.read(tmp_path / "clear.png")
    assert (found[:4] == 255).all()
    np.testing.assert_array_equal(found[4:], np.asarray(picture("RGB"))[4:])


def test_a_step_may_be_a_number_and_other_names_of_weights_are_errors(finished):
    assert vit_jax.load(finished, checkpoint=24).run.step == 24
    with pytest.raises(UserError, match="no weights 'average'"):
        vit_jax.load(finished, weights="average")


def test_coloured_pictures_for_a_grey_model_and_sixteen_bits(run, tmp_path):
    np.testing.assert_array_equal(run.read(picture("RGB"))[..., 0], picture("L"))
    levels = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000
    Image.fromarray(levels).save(tmp_path / "deep.png")
    np.testing.assert_array_equal(run.read(tmp_path / "deep.png")[..., 0], levels >> 8)


def test_pictures_are_turned_upright(coloured, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter, clockwise
    picture("RGB").save(tmp_path / "turned.png", exif=exif)
    np.testing.assert_array_equal(coloured.run.read(tmp_path / "turned.png"), np.rot90(np.asarray(picture("RGB")), -1))


def test_of_a_picture_of_another_shape_the_middle_is_seen(coloured, run):
    wide = np.zeros((40, 120, 3), np.uint8)
    wide[:, 40:80] = 200
    for shape in (wide, wide.transpose(1, 0, 2), np.full((3, 3, 3), 200, np.uint8)):
        seen = coloured.run.read(shape)
        assert seen.shape == (8, 8, 3) and (seen[1:-1, 1:-1] > 190).all()
    assert untrained(run, data__name="cifar10", data__image_size=16).read(wide).shape == (32, 32, 1)


def test_batches_of_one_shape_compile_once(run, split, monkeypatch):
    traced = []
    logits = Classifier.logits

    def counted(self, params, images):
        traced.append(images.shape)
        return logits(self, params, images)

    expected = Predictor(run).predict(split.images[:11])
    monkeypatch.setattr(Classifier, "logits", counted)
    predictor = Predictor(run, batch_size=4)
    found = predictor.predict(split.images[:11])
    assert traced == [(4, 8, 8, 1)]
    predictor.predict(split.images[0])
    predictor.predict(split.images[1])
    assert traced == [(4, 8, 8, 1), (1, 8, 8, 1)]  # one picture is not filled up to four
    for one, other in zip(found, expected, strict=True):
        assert [p["index"] for p in one] == [p["index"] for p in other]
        np.testing.assert_allclose(*([p["probability"] for p in x] for x in (one, other)), rtol=1e-5)


def test_unreadable_pictures_are_named_and_the_others_go_on(run, split, tmp_path):
    paths = saved(tmp_path, split.images[:5])
    paths[1].write_bytes(paths[1].read_bytes()[:60])
    paths[3].write_text("no picture")
    paths.append(tmp_path / "missing.png")
    predictor = Predictor(run, batch_size=2)
    found = list(predictor.results(paths))
    bad = {i: str(result) for i, result in enumerate(found) if isinstance(result, UserError)}
    assert [*bad] == [1, 3, 5] and all(str(paths[i]) in words for i, words in bad.items())
    assert bad[5].endswith("No such file or directory") and "Pillow" in bad[3]
    expected = predictor.predict(split.images[[0, 2, 4]])
    assert [[p["index"] for p in found[i]] for i in (0, 2, 4)] == [[p["index"] for p in f] for f in expected]
    with pytest.raises(UserError, match="1.png"):
        predictor.predict(paths)


def test_folders_give_their_pictures_sorted(tmp_path):
    for name in ("b/2.png", "b/10.JPG", "a/deep/1.webp", "c.gif", ".hidden/1.png", "b/.2.png", "b/notes.txt"):
        (tmp_path / "all" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "all" / name).touch()
    (tmp_path / "empty").mkdir()
    paths, wrong = predicting.expanded(["first.xyz", f"{tmp_path}/all", f"{tmp_path}/empty", "last.png"])
    found = [f"{tmp_path}/all/{name}" for name in ("a/deep/1.webp", "b/10.JPG", "b/2.png", "c.gif")]
    assert paths == ["first.xyz", *found, "last.png"]
    assert [str(error) for error in wrong] == [f"{tmp_path}/empty: no pictures in this folder"]


def test_files_of_predictions(tmp_path):
    three = [{"label": "a, cat", "index": 2, "probability": 0.75}, {"label": "dog", "index": 0, "probability": 0.25}]
    predicting.write([("x.png", three), ("\udcff.png", three[:1])], tmp_path / "new" / "a.json", tmp_path / "a.csv")
    assert json.loads((tmp_path / "new" / "a.json").read_text()) == [
        {"path": "x.png", "predictions": three},
        {"path": "\udcff.png", "predictions": three[:1]},
    ]
    assert (tmp_path / "a.csv").read_bytes().splitlines() == [
        b"path,rank,label,index,probability",
        b'x.png,1,"a, cat",2,0.75',
        b"x.png,2,dog,0,0.25",
        b'\xff.png,1,"a, cat",2,0.75',
    ]
    assert {path.name for path in tmp_path.iterdir()} == {"new", "a.csv"}

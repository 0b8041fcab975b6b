"""The cache, the splits and their statistics, on pictures made here."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from vit_jax.data import load, sources, splits, stand_in
from vit_jax.errors import UserError

ROOT = pathlib.Path(__file__).resolve().parents[2]
BLOCKED = ("tensorflow", "tensorflow_datasets", "sklearn", "jax")


def make_folder(path: pathlib.Path, train: int = 4, test: int = 2) -> pathlib.Path:
    """Writes train and test pictures of one colour each: class "dark" below 100, "light" above."""
    for split, count in (("train", train), ("test", test)):
        for name, level in (("dark", 20), ("light", 200)):
            (path / split / name).mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (12, 10), (level + i, level, level)).save(path / split / name / f"{i}.png")
    return path


@pytest.fixture
def folder(tmp_path):
    return make_folder(tmp_path / "pictures")


@pytest.fixture
def cached(folder, tmp_path):
    """The name of a cached folder, its data_dir and its cache's directory."""
    _, directory = load.build(f"folder:{folder}", tmp_path / "data", image_size=8)
    return f"folder:{folder}", tmp_path / "data", directory


@pytest.fixture
def no_child(monkeypatch):
    def fail(request):
        raise AssertionError(f"{request.name} is cached, yet it is prepared again")

    monkeypatch.setattr(load, "_prepare_in_child", fail)


def test_digits_are_scikit_learns_in_a_fixed_stratified_split():
    from sklearn.datasets import load_digits

    train, test = load.load("digits", "train"), load.load("digits", "test")
    assert train.images.shape == (1438, 8, 8, 1) and test.images.shape == (359, 8, 8, 1)
    assert train.images.dtype == np.uint8 and train.labels.dtype == np.int32
    assert train.class_names == tuple("0123456789")
    ours = np.concatenate([train.images, test.images]).reshape(-1, 64)
    theirs = np.rint(load_digits().data / 16 * 255)
    assert sorted(map(bytes, ours)) == sorted(map(bytes, theirs.astype(np.uint8)))
    share = np.bincount(test.labels) / np.bincount(np.concatenate([train.labels, test.labels]))
    assert np.abs(share - 0.2).max() < 0.01
    np.testing.assert_array_equal(train.images, load.load("digits", "train").images)


def test_made_up_pictures_have_the_shapes_of_the_real():
    real, made_up = load.load_splits("digits"), stand_in.stand_in("digits")
    for ours, like in ((made_up.train, real.train), (made_up.test, real.test)):
        assert ours.images.shape == like.images.shape and ours.labels.shape == like.labels.shape
        assert len(ours.class_names) == len(like.class_names) and len(ours.mean) == len(like.mean)


@pytest.mark.parametrize("fraction", [0.01, 0.1, 1 / 3, 0.5, 0.9])
@pytest.mark.parametrize("counts", [[50] * 10, [1, 2, 3, 500], [7, 11, 13], [2, 2]])
def test_stratified_split_partitions_every_class(counts, fraction):
    labels = np.random.default_rng(1).permutation(np.repeat(np.arange(len(counts)), counts))
    kept, held = load.stratified_split(labels, fraction)
    np.testing.assert_array_equal(np.sort(np.concatenate([kept, held])), np.arange(len(labels)))
    assert (np.diff(kept) > 0).all() and (np.diff(held) > 0).all()
    held_counts = np.bincount(labels[held], minlength=len(counts))
    for count, got in zip(counts, held_counts, strict=True):
        assert got == 0 if count == 1 else 1 <= got <= count - 1
        assert abs(got - fraction * count) <= 1
    again = load.stratified_split(labels.copy(), fraction)
    np.testing.assert_array_equal(held, again[1])


@pytest.mark.parametrize("count, fraction", [(5000, 0.1), (7, 0.1), (501, 0.29), (3, 0.5)])
def test_stratified_split_holds_the_rounded_fraction(count, fraction):
    labels = np.arange(10 * count) % 10
    assert len(load.stratified_split(labels, fraction)[1]) == max(10, round(fraction * 10 * count))


def test_stratified_split_of_nothing():
    kept, held = load.stratified_split(np.array([0, 1, 1]), 0.0)
    assert kept.tolist() == [0, 1, 2] and held.tolist() == []


@pytest.mark.parametrize("shape", [(5, 3, 4, 3), (70, 64, 64, 1), (1, 600, 600, 3)])
def test_channel_statistics_are_those_of_float64(shape):
    images = np.random.default_rng(2).integers(0, 256, shape, np.uint8)
    mean, std = load.channel_statistics(images)
    np.testing.assert_allclose(mean, (images / 255.0).mean((0, 1, 2)), rtol=1e-12)
    np.testing.assert_allclose(std, (images / 255.0).std((0, 1, 2)), rtol=1e-12)


def test_channel_statistics_of_one_colour():
    assert load.channel_statistics(np.full((3, 2, 2, 1), 51, np.uint8)) == ((0.2,), (0.0,))


def test_a_missing_cache_is_prepared_in_a_child_and_then_mapped(folder, tmp_path):
    train = load.load(f"folder:{folder}", "train", tmp_path / "data", image_size=8)
    assert train.images.shape == (8, 8, 8, 3)
    assert isinstance(train.images, np.memmap) and not train.images.flags.writeable
    assert train.images.dtype == np.uint8 and train.labels.dtype == np.int32
    assert train.class_names == ("dark", "light")
    levels = train.images[:, 0, 0]
    np.testing.assert_array_equal(levels[:, 1], np.where(train.labels == 0, 20, 200))
    assert (train.images == levels[:, None, None]).all()


def test_a_cache_is_used_again(cached, no_child, capfd):
    name, data_dir, _ = cached
    splits = load.load_splits(name, data_dir, image_size=8)
    assert (len(splits.train.labels), splits.validation, len(splits.test.labels)) == (8, None, 4)
    assert capfd.readouterr().err == ""


def test_statistics_are_of_the_training_pictures_in_every_split(cached, no_child):
    name, data_dir, _ = cached
    splits = load.load_splits(name, data_dir, image_size=8, holdout=0.25)
    whole = load.load(name, "train", data_dir, image_size=8)
    mean, std = load.channel_statistics(np.asarray(whole.images))
    for split in (splits.train, splits.validation, splits.test):
        assert (split.mean, split.std) == (mean, std)


def test_holdout_is_taken_from_train_and_leaves_test_alone(cached, no_child):
    name, data_dir, _ = cached
    whole = load.load_splits(name, data_dir, image_size=8)
    splits = load.load_splits(name, data_dir, image_size=8, holdout=0.25)
    assert np.bincount(splits.validation.labels).tolist() == [1, 1]
    both = np.concatenate([splits.train.images, splits.validation.images])
    assert sorted(i.tobytes() for i in both) == sorted(i.tobytes() for i in whole.train.images)
    np.testing.assert_array_equal(splits.test.images, whole.test.images)


def test_rows_of_a_set_larger_than_memory_are_read_when_they_are_asked_for():
    terabyte = np.broadcast_to(np.arange(10**6, dtype=np.uint8)[:, None], (10**6, 10**6))
    odd = splits.Rows(splits.Rows(terabyte, np.arange(1, 10**6)), np.arange(0, 10**6 - 1, 2))
    assert (len(odd), odd.shape, odd.nbytes) == (500_000, (500_000, 10**6), 5 * 10**11)
    np.testing.assert_array_equal(odd[2:5][:, 0], [5, 7, 9])
    np.testing.assert_array_equal(odd[np.array([9, 0])][:, -1], [19, 1])
    with pytest.raises(IndexError):
        odd[500_000]


@pytest.mark.parametrize("holdout", [-0.1, 1.0])
def test_holdout_out_of_range(holdout):
    with pytest.raises(UserError, match="data.holdout"):
        load.load_splits("digits", holdout=holdout)


def truncate_images(directory):
    os.truncate(directory / "train" / "images.npy", 300)


def truncate_to_nothing(directory):
    os.truncate(directory / "test" / "labels.npy", 0)


def append(directory):
    with open(directory / "train" / "images.npy", "ab") as file:
        file.write(b"more")


def replace_labels(directory):
    np.save(directory / "train" / "labels.npy", np.full(8, 2, np.int32))  # there are two classes


def replace_images(directory):
    np.save(directory / "train" / "images.npy", np.zeros((8, 4, 4, 3), np.uint8))


def replace_by_objects(directory):
    np.save(directory / "train" / "images.npy", np.array([{}, None]), allow_pickle=True)


def remove_labels(directory):
    (directory / "test" / "labels.npy").unlink()


def cut_meta(directory):
    os.truncate(directory / "train" / "meta.json", 40)


def list_for_meta(directory):
    (directory / "train" / "meta.json").write_text("[]")


def nest_meta(directory):
    (directory / "train" / "meta.json").write_text("[" * 100_000)


def other_format(directory):
    path = directory / "test" / "meta.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": -1}))


def remove_split(directory):
    for path in (directory / "test").iterdir():
        path.unlink()
    (directory / "test").rmdir()


@pytest.mark.parametrize(
    "damage",
    [
        truncate_images,
        truncate_to_nothing,
        append,
        replace_labels,
        replace_images,
        replace_by_objects,
        remove_labels,
        cut_meta,
        list_for_meta,
        nest_meta,
        other_format,
        remove_split,
    ],
)
def test_a_truncated_or_foreign_cache_is_noticed_and_rebuilt(damage, cached, capsys):
    name, data_dir, directory = cached
    before = {path: path.read_bytes() for path in directory.rglob("*.*")}
    damage(directory)
    load.build(name, data_dir, image_size=8)
    notices = capsys.readouterr().err.splitlines()
    assert [line.split()[0] for line in notices] == ["rebuilding", "decoding"] and str(directory) in notices[0]
    assert {path: path.read_bytes() for path in directory.rglob("*.*")} == before
    assert sorted(path.name for path in directory.parent.iterdir() if path.name.endswith(".tmp")) == []


def test_load_rebuilds_a_damaged_cache(cached, capfd):
    name, data_dir, directory = cached
    truncate_images(directory)
    assert load.load(name, "train", data_dir, image_size=8).images.shape == (8, 8, 8, 3)
    assert capfd.readouterr().err.count("rebuilding the cache") == 1


def test_changed_pictures_rebuild(cached, folder):
    name, data_dir, _ = cached
    Image.new("RGB", (9, 9), (7, 7, 7)).save(folder / "train" / "dark" / "new.png")
    splits, _ = load.build(name, data_dir, image_size=8)
    assert splits["train"].labels.tolist() == [0] * 5 + [1] * 4


def test_a_cache_that_cannot_be_rebuilt_is_the_users_error(tmp_path, monkeypatch):
    for variable in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(variable, "http://127.0.0.1:9")  # nothing answers there: no network
    split = tmp_path / "vit_jax" / "cifar100" / "train"
    split.mkdir(parents=True)
    (split / "images.npy").write_bytes(b"not an array")
    with pytest.raises(UserError, match="cifar-100-binary.tar.gz") as caught:
        load.load("cifar100", "train", tmp_path)
    assert str(tmp_path / "downloads" / "manual" / "cifar-100-binary.tar.gz") in str(caught.value)
    assert (split / "images.npy").read_bytes() == b"not an array"


def test_a_build_that_is_interrupted_leaves_nothing(folder, tmp_path, monkeypatch):
    def interrupted(pictures, **kwargs):
        yield np.zeros((1, 8, 8, 3), np.uint8), np.zeros(1, np.int32)
        raise KeyboardInterrupt

    monkeypatch.setattr(sources, "read_batches", interrupted)
    with pytest.raises(KeyboardInterrupt):
        load.build(f"folder:{folder}", tmp_path / "data", image_size=8)
    assert [path.suffix for path in (tmp_path / "data" / "vit_jax").iterdir()] == [".lock"]


def test_builders_at_the_same_time_do_not_disturb_each_other(folder, tmp_path):
    command = [sys.executable, "-m", "vit_jax.prepare", "--dataset", f"folder:{folder}", "--image_size", "8"]
    command += ["--data_dir", str(tmp_path / "data")]
    children = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) for _ in range(3)]
    outputs = [child.communicate()[0] for child in children]
    assert [child.returncode for child in children] == [0, 0, 0]
    assert outputs[0] == outputs[1] == outputs[2]


def test_a_data_dir_that_cannot_be_written(folder, tmp_path):
    (tmp_path / "data").write_text("a file")
    with pytest.raises(UserError, match="cannot write"):
        load.build(f"folder:{folder}", tmp_path / "data", image_size=8)


def test_cached_pictures_load_without_tensorflow(cached, tmp_path):
    name, data_dir, _ = cached
    blocked = tmp_path / "blocked"
    blocked.mkdir()
    for module in BLOCKED:
        (blocked / f"{module}.py").write_text(f"raise ImportError('{module} is blocked')")
    code = "import sys; from vit_jax.data import load; print(load.load(*sys.argv[1:4], image_size=8).images.shape)"
    environment = {**os.environ, "PYTHONPATH": f"{blocked}{os.pathsep}{ROOT}"}
    command = [sys.executable, "-c", code, name, "train", str(data_dir)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert (result.stdout.strip(), result.stderr) == ("(8, 8, 8, 3)", "")


@pytest.mark.parametrize("name, nearest", [("cifar1000", "cifar100"), ("digit", "digits"), ("SVHN", "known")])
def test_an_unknown_name_is_told_the_nearest(name, nearest, tmp_path):
    with pytest.raises(UserError, match="unknown data set") as caught:
        load.load(name, "train", tmp_path)
    assert nearest in str(caught.value).lower() and "folder:PATH" in str(caught.value)


def test_the_data_dir_comes_from_the_environment(cached, monkeypatch, no_child):
    name, data_dir, _ = cached
    monkeypatch.setenv("TFDS_DATA_DIR", str(data_dir))
    assert len(load.load(name, "test", image_size=8).labels) == 4


@pytest.mark.parametrize("size", [10, 11, 700, 1430, 1437, 1438])
def test_as_many_training_pictures_as_asked_in_proportion(size):
    all_of_it = load.load_splits("digits").train
    some = load.load_splits("digits", train_examples=size).train
    assert len(some.labels) == len(some.images) == size and (some.mean, some.std) == (all_of_it.mean, all_of_it.std)
    share = np.bincount(some.labels, minlength=10) / size - np.bincount(all_of_it.labels) / len(all_of_it.labels)
    assert np.abs(share).max() <= 1 / size and set(some.labels) == set(range(10))
    again = load.load_splits("digits", train_examples=size).train
    np.testing.assert_array_equal(again.images, some.images)


def test_a_sample_keeps_the_smallest_classes():
    labels = np.array([0] * 97 + [1, 2, 2])
    for size in (3, 4, 50, 99):
        sample = load.stratified_sample(labels, size)
        assert len(set(sample)) == size and set(labels[sample]) == {0, 1, 2}


@pytest.mark.parametrize("size", [9, 1439])
def test_too_few_or_too_many_training_pictures(size):
    with pytest.raises(UserError, match=f"data.train_examples is {size}: there are 1438 pictures of 10 classes"):
        load.load_splits("digits", train_examples=size)


def test_held_out_pictures_are_not_trained_on():
    splits = load.load_splits("digits", holdout=0.5, train_examples=100)
    whole = load.load_splits("digits", holdout=0.5)
    assert len(splits.train.labels) == 100 and len(splits.validation.labels) == len(whole.validation.labels)
    rows = {image.tobytes() for image in whole.train.images}
    assert all(image.tobytes() in rows for image in splits.train.images)


NOBODYS = "~nobody_of_this_name/x"


@pytest.mark.parametrize("name, data_dir", [(f"folder:{NOBODYS}", None), ("cifar10", NOBODYS)])
def test_a_home_that_nobody_has(name, data_dir):
    with pytest.raises(UserError, match=NOBODYS):
        load.is_cached(name, data_dir)

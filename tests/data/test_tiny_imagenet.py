"""Our Tiny ImageNet builder on a small copy of the official layout."""

import io
import pathlib
import shutil
import types
import zipfile

import numpy as np
import pytest
from PIL import Image

from vit_jax.data import load, sources
from vit_jax.errors import UserError

WNIDS = ["n03", "n01", "n02"]  # wnids.txt is not sorted


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    for variable in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.setenv(variable, "http://127.0.0.1:9")  # nothing answers there


def jpeg(seed, mode="RGB", size=64):
    pixels = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).resize((size, size)).save(buffer, "jpeg")
    return buffer.getvalue()


@pytest.fixture
def official(tmp_path):
    """The official layout in tfds's manual directory: 3 classes, 2 training and 1 validation picture each."""
    root = tmp_path / "downloads" / "manual" / "tiny-imagenet-200"
    (root / "val" / "images").mkdir(parents=True)
    (root / "test" / "images").mkdir(parents=True)
    (root / "test" / "images" / "test_0.JPEG").write_bytes(jpeg(99))
    (root / "wnids.txt").write_text("".join(f"{wnid}\n" for wnid in WNIDS))
    (root / "words.txt").write_text("n00\tentity\nn01\tgoldfish, Carassius auratus\nn02\tcrane\nn03\tcrane\n")
    rows = []
    for i, wnid in enumerate(WNIDS):
        images = root / "train" / wnid / "images"
        images.mkdir(parents=True)
        for j in range(2):
            (images / f"{wnid}_{j}.JPEG").write_bytes(jpeg(10 * i + j, mode="L" if j else "RGB"))
        (images.parent / f"{wnid}_boxes.txt").write_text("".join(f"{wnid}_{j}.JPEG\t0\t0\t62\t63\n" for j in range(2)))
        (root / "val" / "images" / f"val_{i}.JPEG").write_bytes(jpeg(100 + i))
        rows.append(f"val_{i}.JPEG\t{wnid}\t0\t0\t63\t63\n")
    (root / "val" / "val_annotations.txt").write_text("".join(rows))
    return root


def zipped(root, *, prefix="tiny-imagenet-200/", remove=True):
    path = root.with_name("tiny-imagenet-200.zip")
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(root.rglob("*")):
            archive.write(file, prefix + file.relative_to(root).as_posix())
    if remove:
        shutil.rmtree(root)
    return path


def split_generators(root):
    """Runs the builder's checks on what is in tfds's manual directory; returns its splits as lists."""
    from vit_jax.data import tiny_imagenet

    downloads = root.parent.parent
    builder = tiny_imagenet.TinyImagenet(data_dir=downloads.parent, file_format="array_record")
    splits = builder._split_generators(types.SimpleNamespace(download_dir=downloads))
    return {name: [example for _, example in examples] for name, examples in splits.items()}


@pytest.mark.parametrize("form", ["folder", "zip"])
def test_pictures_labels_and_names(form, official, tmp_path):
    expected = {}
    for path in official.rglob("*.JPEG"):
        expected[sources.decode(path).tobytes()] = path
    rows = (official / "val" / "val_annotations.txt").read_text().split("\n")
    wnid_of = dict(row.split("\t")[:2] for row in rows if row)
    if form == "zip":
        zipped(official)
    splits = load.load_splits("tiny_imagenet", tmp_path)
    assert splits.train.images.shape == (6, 64, 64, 3) and splits.test.images.shape == (3, 64, 64, 3)
    assert splits.train.class_names == ("goldfish", "crane (n02)", "crane (n03)")
    for split in (splits.train, splits.test):
        for image, label in zip(split.images, split.labels, strict=True):
            path = expected.pop(image.tobytes())  # grey pictures as RGB, every picture once
            wnid = wnid_of[path.name] if split is splits.test else path.parts[-3]
            assert sorted(WNIDS)[label] == wnid
    assert [path.name for path in expected.values()] == ["test_0.JPEG"]


def test_jpeg_files_go_in_as_they_are(official):
    splits = split_generators(official)
    files = {path.read_bytes() for path in (official / "train").rglob("*.JPEG")}
    assert {example["image"] for example in splits["train"]} == files


def test_too_few_pictures_or_annotations_name_both_counts(official):
    (official / "val" / "images" / "val_1.JPEG").rename(official / "val_1.JPEG")
    with pytest.raises(UserError, match=r"names 3 pictures, val/images has 2 \(val_1.JPEG\)"):
        split_generators(official)
    (official / "val_1.JPEG").rename(official / "val" / "images" / "val_1.JPEG")
    (official / "train" / "n02" / "n02_boxes.txt").write_text("n02_0.JPEG\t0\t0\t1\t1\n")
    with pytest.raises(UserError, match="names 1 pictures, train/n02/images has 2"):
        split_generators(official)


def test_the_right_count_of_the_wrong_pictures_is_an_error(official):
    images = official / "val" / "images"
    (images / "val_1.JPEG").rename(images / "val_9.JPEG")
    with pytest.raises(UserError, match=r"names 3 pictures, val/images has 3 \(val_1.JPEG\)"):
        split_generators(official)


def test_a_mismatch_reaches_the_user_and_leaves_nothing(official, tmp_path):
    (official / "val" / "images" / "val_1.JPEG").unlink()
    with pytest.raises(UserError, match="names 3 pictures, val/images has 2"):
        load.load("tiny_imagenet", "train", tmp_path)
    assert not (tmp_path / "vit_jax" / "tiny_imagenet").exists()


def test_an_unknown_label_is_an_error(official):
    path = official / "val" / "val_annotations.txt"
    path.write_text(path.read_text().replace("n02", "n77"))
    with pytest.raises(UserError, match="label 'n77'"):
        split_generators(official)


@pytest.mark.parametrize("name", ["wnids.txt", "words.txt", "val/val_annotations.txt", "train/n01/n01_boxes.txt"])
def test_a_missing_file_is_named(name, official):
    (official / name).unlink()
    with pytest.raises(UserError, match=f"has no {name}"):
        split_generators(official)


@pytest.mark.parametrize("content", [b"text", jpeg(0, size=32)])
def test_what_is_no_jpeg_of_64_pixels_is_named(content, official):
    (official / "train" / "n01" / "images" / "n01_0.JPEG").write_bytes(content)
    with pytest.raises(UserError, match="n01_0.JPEG, which is no JPEG of 64 x 64"):
        split_generators(official)


@pytest.mark.parametrize("name", ["tiny-imagenet-200/../../evil", "/etc/evil", "evil", "tiny-imagenet-200/..\\evil"])
def test_a_zip_with_a_path_that_escapes_is_refused(name, official):
    path = zipped(official)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(name, "evil")
    with pytest.raises(UserError, match="outside tiny-imagenet-200/"):
        split_generators(official)
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_a_zip_that_unpacks_to_too_much_is_refused(official):
    path = zipped(official)
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("tiny-imagenet-200/words2.txt", bytes(2**26 + 1))
    assert path.stat().st_size < 2**20
    with pytest.raises(UserError, match="words2.txt' of more than 64 MB"):
        split_generators(official)


def test_half_a_zip_is_refused(official):
    path = zipped(official)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(UserError, match="not a whole zip"):
        split_generators(official)


def test_a_damaged_picture_in_the_zip_is_refused(official):
    content = (official / "train" / "n02" / "images" / "n02_1.JPEG").read_bytes()
    path = zipped(official)
    whole = path.read_bytes()
    assert content in whole  # stored, not compressed
    path.write_bytes(whole.replace(content, content[:-9] + b"123456789"))
    with pytest.raises(UserError, match="damaged at train/n02/images/n02_1.JPEG"):
        split_generators(official)


def test_a_bad_download_is_not_kept(tmp_path):
    from vit_jax.data import tiny_imagenet

    path = tmp_path / "fetched.zip"
    path.write_bytes(b"<html>sorry</html>")
    manager = types.SimpleNamespace(download_dir=tmp_path, download=lambda url: path)
    with pytest.raises(UserError, match="not a whole zip"):
        tiny_imagenet._find(manager)
    assert not path.exists()


def test_without_zip_or_network_the_error_names_the_file(tmp_path):
    with pytest.raises(UserError) as caught:
        load.load("tiny_imagenet", "train", tmp_path)
    assert str(pathlib.Path(tmp_path, "downloads", "manual", "tiny-imagenet-200.zip")) in str(caught.value)

"""Decoding, folders, and tensorflow-datasets' own builders on small archives made here."""

import io
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tarfile
import zlib

import numpy as np
import pytest
from PIL import Image, PngImagePlugin, UnidentifiedImageError

from vit_jax.data import load, sources
from vit_jax.errors import UserError

ROOT = pathlib.Path(__file__).resolve().parents[2]
SHA256 = {  # of the official archives: tfds names its downloads by them
    "https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz": (
        "58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec"
    ),
    "http://ufldl.stanford.edu/housenumbers/train_32x32.mat": (
        "435e94d69a87fde4fd4d7f3dd208dfc32cb6ae8af2240d066de1df7508d083b8"
    ),
    "http://ufldl.stanford.edu/housenumbers/test_32x32.mat": (
        "cdce80dfb2a2c4c6160906d0bd7c68ec5a99d7ca4831afa54f09182025b6a75b"
    ),
    "http://ufldl.stanford.edu/housenumbers/extra_32x32.mat": (
        "a133a4beb38a00fcdda90c9489e0c04f900b660ce8a316a5e854838379a71eb3"
    ),
}


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    for variable in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.setenv(variable, "http://127.0.0.1:9")  # nothing answers there


def random_images(count, *shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, *shape), np.uint8)


def save(array, path, **options):
    Image.fromarray(array).save(path, **options)
    return path


def pairs(images, labels):
    """The multiset of (picture, label), for sets whose order is tfds's own."""
    return sorted((image.tobytes(), int(label)) for image, label in zip(images, labels, strict=True))


# Decoding


def test_postscript_is_not_executed_whatever_its_name(tmp_path, monkeypatch):
    """Pillow would call Ghostscript."""
    for name in ("Popen", "run", "check_call", "check_output"):
        monkeypatch.setattr(subprocess, name, lambda *a, **k: pytest.fail("a program was started"))
    path = tmp_path / "a.jpg"
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n")
    assert Image.open(path).format == "EPS"
    with pytest.raises(UnidentifiedImageError):
        sources.decode(path, 8)


def test_a_small_file_of_a_huge_picture_is_not_unpacked(monkeypatch):
    """Its header is enough to tell."""
    image = io.BytesIO()
    Image.new("1", (8, 8)).save(image, "png")
    data = bytearray(image.getvalue())
    data[16:24] = (20_000).to_bytes(4) * 2  # width and height
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4)
    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", lambda self: pytest.fail("it was unpacked"))
    with pytest.raises(Image.DecompressionBombError):
        sources.decode(io.BytesIO(data), 8)


def test_a_pipe_is_no_picture_and_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "x.png")
    with pytest.raises(OSError, match="a pipe"):
        sources.decode(tmp_path / "x.png")


def test_decode_of_a_lossless_picture_is_its_pixels(tmp_path):
    pixels = random_images(1, 7, 5, 3)[0]
    np.testing.assert_array_equal(sources.decode(save(pixels, tmp_path / "a.png")), pixels)


def test_decode_of_grey_repeats_it_in_rgb_and_keeps_it_in_grey(tmp_path):
    pixels = random_images(1, 7, 5)[0]
    path = save(pixels, tmp_path / "a.png")
    np.testing.assert_array_equal(sources.decode(path), np.repeat(pixels[..., None], 3, -1))
    np.testing.assert_array_equal(sources.decode(path, mode="L"), pixels[..., None])


def test_decode_takes_the_high_byte_of_16_bits(tmp_path):
    pixels = np.array([[0, 255, 256, 65535]], np.uint16)
    path = save(pixels, tmp_path / "a.png")
    assert sources.decode(path, mode="L")[..., 0].tolist() == [[0, 0, 1, 255]]


@pytest.mark.parametrize("mode", ["RGBA", "P", "LA", "1", "CMYK"])
def test_decode_gives_rgb_whatever_the_mode(mode, tmp_path):
    path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    Image.new("RGB", (4, 4), (255, 255, 255)).convert(mode).save(path)
    assert (sources.decode(path) == 255).all() and sources.decode(path).shape == (4, 4, 3)


def test_decode_honours_the_exif_orientation(tmp_path):
    pixels = random_images(1, 6, 4, 3)[0]
    exif = Image.Exif()
    exif[0x0112] = 6  # taken with the camera turned: show it turned by 90 degrees clockwise
    path = save(pixels, tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(sources.decode(path), np.rot90(pixels, -1))


@pytest.mark.parametrize("size", [(30, 10), (10, 30), (10, 10)])
def test_decode_crops_the_centre_of_the_short_side(size, tmp_path):
    """A picture that is white in its central square and black elsewhere becomes white."""
    width, height = size
    pixels = np.zeros((height, width), np.uint8)
    top, left = (height - 10) // 2, (width - 10) // 2
    pixels[top : top + 10, left : left + 10] = 255
    assert (sources.decode(save(pixels, tmp_path / "a.png"), 10) == 255).all()


def test_decode_resizes_as_pillow_does(tmp_path):
    pixels = random_images(1, 20, 20, 3)[0]
    expected = np.asarray(Image.fromarray(pixels).resize((8, 8), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(sources.decode(save(pixels, tmp_path / "a.png"), 8), expected)


def test_decode_of_a_large_jpeg_is_close_to_its_full_decoding(tmp_path):
    ramp = np.linspace(0, 255, 800).astype(np.uint8)
    path = save(np.stack([np.tile(ramp, (600, 1))] * 3, -1), tmp_path / "a.jpg", quality=95)
    exact = Image.open(path).crop((100, 0, 700, 600)).resize((16, 16), Image.Resampling.BICUBIC)
    difference = sources.decode(path, 16).astype(int) - np.asarray(exact).astype(int)
    assert np.abs(difference).max() <= 2


# Folders


def make_class(folder, *names, size=(9, 9)):
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        Image.new("RGB", size, (len(name), 0, 0)).save(folder / name)


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "pictures"
    for split in ("train", "test"):
        make_class(root / split / "b", "1.png", "2.JPG", "3.webp")
        make_class(root / split / "a", "1.bmp", "2.gif", "3.tif", size=(20, 11))
    return root


def read_all(pictures, **options):
    return [np.concatenate(arrays) for arrays in zip(*sources.read_batches(pictures, **options), strict=True)]


def test_a_folder_is_read_in_sorted_order_whatever_the_formats_and_sizes(folder, monkeypatch):
    monkeypatch.setattr(sources, "BATCH", 4)
    splits = sources.folder(folder, 8)
    assert list(splits) == ["train", "test"] and splits["test"].class_names == ("a", "b")
    images, labels = read_all(splits["train"])
    assert images.shape == (6, 8, 8, 3) and images.dtype == np.uint8
    assert labels.tolist() == [0, 0, 0, 1, 1, 1] and labels.dtype == np.int32


@pytest.mark.parametrize("name", ["val", "valid", "validation"])
def test_the_test_pictures_may_be_called_val(folder, name):
    (folder / "test").rename(folder / name)
    assert sources.folder(folder, 8)["test"].count == 6


def test_hidden_files_and_other_files_are_ignored(folder):
    (folder / "train" / ".cache").mkdir()
    (folder / "train" / "a" / ".hidden.png").write_text("")
    (folder / "train" / "a" / "notes.txt").write_text("")
    (folder / "train" / "README").write_text("")
    pictures = sources.folder(folder, 8)["train"]
    assert (pictures.class_names, pictures.count) == (("a", "b"), 6)


def test_class_folders_alone_are_train(folder, tmp_path):
    name = f"folder:{folder / 'train'}"
    splits = load.load_splits(name, tmp_path / "data", image_size=8, holdout=0.34)
    assert splits.test is None and len(splits.train.labels) == 4
    assert splits.validation.labels.tolist() == [0, 1]
    with pytest.raises(UserError, match="data.holdout"):
        load.load(name, "test", tmp_path / "data", image_size=8)
    with pytest.raises(UserError, match="data.holdout"):
        load.load_splits(name, tmp_path / "data", image_size=8)


def test_the_fingerprint_follows_names_sizes_and_times(folder):
    path = folder / "train" / "a" / "1.bmp"

    def fingerprint():
        return sources.folder(folder, 8)["train"].fingerprint

    first = fingerprint()
    assert fingerprint() == first
    os.utime(path, (1, 1))
    second = fingerprint()
    path.rename(path.with_name("0.bmp"))
    assert len({first, second, fingerprint()}) == 3


def test_folder_errors_say_what_to_do(folder):
    with pytest.raises(UserError, match="data.image_size"):
        sources.folder(folder, None)
    with pytest.raises(UserError, match="no folder"):
        sources.folder(folder / "nowhere", 8)
    with pytest.raises(UserError, match="no class folders"):
        sources.folder(folder / "train" / "a", 8)
    make_class(folder / "train" / "c")
    with pytest.raises(UserError, match="no pictures in the class folder .*/c"):
        sources.folder(folder, 8)
    make_class(folder / "train" / "c", "1.png")
    with pytest.raises(UserError, match="not the same classes: c"):
        sources.folder(folder, 8)
    (folder / "train").rename(folder / "training")
    with pytest.raises(UserError, match="no .*/train"):
        sources.folder(folder, 8)


def test_a_text_file_named_jpg_is_named_and_stops(folder, tmp_path):
    bad = folder / "train" / "a" / "bad.jpg"
    bad.write_text("not a picture")
    with pytest.raises(UserError, match="skip_unreadable") as caught:
        load.load(f"folder:{folder}", "train", tmp_path / "data", image_size=8)
    assert str(bad) in str(caught.value)
    assert not list((tmp_path / "data" / "vit_jax").glob("folder*"))


def test_a_broken_link_is_an_unreadable_picture(folder, tmp_path):
    broken = next(path for path in sorted((folder / "train").iterdir()) if path.is_dir()) / "broken.jpg"
    broken.symlink_to(tmp_path / "nowhere.jpg")
    with pytest.raises(UserError, match="broken.jpg"):
        load.load(f"folder:{folder}", "train", tmp_path / "data", image_size=8)
    load.load(f"folder:{folder}", "train", tmp_path / "data", image_size=8, skip_unreadable=True)


def test_unreadable_pictures_are_skipped_counted_and_listed_on_request(folder, tmp_path, capfd):
    name, bad, cut = f"folder:{folder}", folder / "train" / "a" / "bad.jpg", folder / "train" / "b" / "cut.png"
    bad.write_text("not a picture")
    cut.write_bytes((folder / "train" / "b" / "1.png").read_bytes()[:50])
    split = load.load(name, "train", tmp_path / "data", image_size=8, skip_unreadable=True)
    assert split.images.shape == (6, 8, 8, 3) and split.labels.tolist() == [0, 0, 0, 1, 1, 1]
    notice = capfd.readouterr().err
    assert "skipped 2 unreadable" in notice and str(bad) in notice and str(cut) in notice
    with pytest.raises(UserError, match="unreadable"):  # what was skipped once is not skipped for ever
        load.load(name, "train", tmp_path / "data", image_size=8)


def test_a_split_without_a_readable_picture_is_an_error(folder, tmp_path):
    for path in (folder / "test").rglob("*.*"):
        path.write_text("not a picture")
    with pytest.raises(UserError, match="no readable picture"):
        load.build(f"folder:{folder}", tmp_path / "data", image_size=8, skip_unreadable=True)


# tensorflow-datasets' builders


def install(data_dir, url, content):
    """Puts `content` where tfds looks for what it downloaded from `url`."""
    from tensorflow_datasets.core.download import resource

    path = data_dir / "downloads" / resource.get_dl_fname(url, SHA256[url])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    path.with_name(path.name + ".INFO").write_text(json.dumps({"original_fname": url.rpartition("/")[2]}))


def test_cifar100_by_its_official_builder(tmp_path):
    images, labels = random_images(12, 32, 32, 3), np.arange(12, dtype=np.uint8) * 9
    records = np.concatenate(
        [labels[:, None] // 5, labels[:, None], images.transpose(0, 3, 1, 2).reshape(12, -1)], axis=1
    )  # coarse label, fine label, then the channels one after the other
    files = {
        "train.bin": records[:8].tobytes(),
        "test.bin": records[8:].tobytes(),
        "fine_label_names.txt": "".join(f"fine{i}\n" for i in range(100)).encode(),
        "coarse_label_names.txt": "".join(f"coarse{i}\n" for i in range(20)).encode(),
    }
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(f"cifar-100-binary/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    install(tmp_path, "https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz", buffer.getvalue())
    splits = load.load_splits("cifar100", tmp_path, image_size=224)  # no size is needed, and none is heeded
    assert pairs(splits.train.images, splits.train.labels) == pairs(images[:8], labels[:8])
    assert pairs(splits.test.images, splits.test.labels) == pairs(images[8:], labels[8:])
    assert splits.test.class_names[99] == "fine99"
    # Where tfds has prepared the set in its default format, that is left alone and the archive prepared again.
    (info,) = (tmp_path / "cifar100").glob("*/dataset_info.json")
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    shutil.rmtree(tmp_path / "vit_jax")
    again = load.load("cifar100", "train", tmp_path)
    assert pairs(again.images, again.labels) == pairs(images[:8], labels[:8])
    blocked = tmp_path / "blocked"
    blocked.mkdir()
    for module in ("tensorflow", "tensorflow_datasets"):
        (blocked / f"{module}.py").write_text(f"raise ImportError('{module} is blocked')")
    code = "import sys; from vit_jax.data import load; print(load.load('cifar100', 'train', sys.argv[1]).images.shape)"
    environment = {**os.environ, "PYTHONPATH": f"{blocked}{os.pathsep}{ROOT}"}
    result = subprocess.run([sys.executable, "-c", code, tmp_path], env=environment, capture_output=True, text=True)
    assert (result.stdout, result.stderr) == ("(8, 32, 32, 3)\n", "")


def test_svhn_by_its_official_builder(tmp_path):
    from scipy import io as scipy_io

    expected = {}
    for seed, split in enumerate(("train", "test", "extra")):
        images, digits = random_images(10, 32, 32, 3, seed=seed), np.arange(10)
        buffer = io.BytesIO()  # SVHN's files call the digit 0 "10" and have the pictures along the last axis
        scipy_io.savemat(buffer, {"X": images.transpose(1, 2, 3, 0), "y": np.where(digits == 0, 10, digits)[:, None]})
        install(tmp_path, f"http://ufldl.stanford.edu/housenumbers/{split}_32x32.mat", buffer.getvalue())
        expected[split] = pairs(images, digits)
    splits = load.load_splits("svhn", tmp_path)
    assert pairs(splits.train.images, splits.train.labels) == expected["train"]
    assert pairs(splits.test.images, splits.test.labels) == expected["test"]
    assert splits.train.class_names == tuple("0123456789")


BUILDER = """
import io, sys
import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

class TinyPictures(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        shape, dtype = {"fixed": ((6, 6, 1), "uint8"), "varying": ((None, None, 3), "uint8")}[sys.argv[2]]
        features = {"image": tfds.features.Image(shape=shape), "label": tfds.features.ClassLabel(names=["no", "yes"])}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples(first) for first, split in enumerate(sys.argv[3].split(","))}

    def _generate_examples(self, first):
        for i in range(4):
            size = (6, 6) if sys.argv[2] == "fixed" else (6 + i, 9)
            buffer = io.BytesIO()
            Image.new("L" if sys.argv[2] == "fixed" else "RGB", size, i + 10 * first).save(buffer, "png")
            yield i, {"image": buffer.getvalue(), "label": i % 2}

TinyPictures(data_dir=sys.argv[1], file_format="array_record").download_and_prepare()
"""


def make_tfds(data_dir, kind, splits):
    script = data_dir / "tiny_pictures.py"
    script.write_text(BUILDER)
    subprocess.run([sys.executable, str(script), str(data_dir), kind, splits], check=True)


def test_any_tfds_set_with_validation_for_test(tmp_path):
    make_tfds(tmp_path, "fixed", "train,validation")
    splits = load.load_splits("tfds:tiny_pictures", tmp_path, image_size=99)  # not resized: it has one size
    assert splits.train.images.shape == (4, 6, 6, 1) and splits.train.class_names == ("no", "yes")
    assert sorted(splits.train.images[:, 0, 0, 0].tolist()) == [0, 1, 2, 3]
    np.testing.assert_array_equal(splits.test.images[:, 0, 0, 0] % 2, splits.test.labels)
    assert [path.name for path in (tmp_path / "vit_jax").iterdir() if path.is_dir()] == ["tfds-tiny_pictures"]


def test_a_tfds_set_of_varying_sizes_needs_an_image_size(tmp_path):
    make_tfds(tmp_path, "varying", "train,test")
    with pytest.raises(UserError, match="data.image_size"):
        load.load("tfds:tiny_pictures", "train", tmp_path)
    split = load.load("tfds:tiny_pictures", "train", tmp_path, image_size=5)
    assert split.images.shape == (4, 5, 5, 3)


def test_a_tfds_set_without_test_pictures_is_refused(tmp_path):
    make_tfds(tmp_path, "fixed", "train,extra")
    with pytest.raises(UserError, match="splits .*extra"):
        load.load("tfds:tiny_pictures", "train", tmp_path)


@pytest.mark.parametrize(
    "name, message",
    [
        ("tfds:mnits", "did you mean .*mnist"),
        ("tfds:imdb_reviews", "not image classification"),
        ("tfds:mnist", "train-images-idx3-ubyte.gz as .*/downloads/manual/train-images-idx3-ubyte.gz"),
        ("svhn", "train_32x32.mat as .*/downloads/manual/train_32x32.mat"),
        ("cifar10", "cifar-10-binary.tar.gz as .*/downloads/manual/cifar-10-binary.tar.gz"),
    ],
)
def test_without_a_network_the_error_says_which_file_to_put_where(name, message, tmp_path):
    with pytest.raises(UserError, match=message):
        load.load(name, "train", tmp_path)
    assert not [path for path in (tmp_path / "vit_jax").iterdir() if path.is_dir()]


def test_a_damaged_archive_is_named(tmp_path):
    path = tmp_path / "downloads" / "manual" / "cifar-10-binary.tar.gz"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"half of it")
    with pytest.raises(UserError, match="is damaged, remove it, then try again") as caught:
        load.load("cifar10", "train", tmp_path)
    assert "cifar-10-binary" in str(caught.value)

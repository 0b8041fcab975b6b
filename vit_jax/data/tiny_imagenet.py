"""Tiny ImageNet as a tensorflow-datasets builder, from the official zip or its unpacked folder.

JPEG files go in as they are, so preparing needs no TensorFlow. "validation" is the official val folder; the official
test folder has no labels and is left out.
"""

import io
import os
import pathlib
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import tensorflow_datasets as tfds
from PIL import Image
from tensorflow_datasets.core.download import resource

from vit_jax.errors import UserError

URL = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
ROOT = "tiny-imagenet-200"
SIDE = 64
MOST_BYTES = 2**26  # of a file in the zip, which could claim to unpack to anything; the largest has 2.6 million


class Files:
    """The files of an unpacked folder or a zip, by their names below `tiny-imagenet-200`; nothing is unpacked.

    Raises UserError where the zip is damaged or has a file outside that folder.
    """

    def __init__(self, where: pathlib.Path):
        self.where = where
        self.by_folder: dict[str, set[str]] = {}  # folder → names of the files in it, hidden ones left out
        if where.is_dir():
            names: Iterable[str] = (
                pathlib.Path(folder, file).relative_to(where).as_posix()
                for folder, _, files in os.walk(where)
                for file in files
            )
            self._read: Callable[[str], bytes] = lambda name: (where / name).read_bytes()
        else:
            try:
                archive = zipfile.ZipFile(where)
            except (zipfile.BadZipFile, OSError) as error:
                raise self.error(f"is not a whole zip ({error}): get it again from {URL}") from error
            names = [self._inside(name) for name in archive.namelist() if not name.endswith("/")]
            large = [info.filename for info in archive.infolist() if info.file_size > MOST_BYTES]
            if large:
                raise self.error(f"has a file {large[0]!r} of more than 64 MB: get the official zip from {URL}")
            self._read = lambda name: archive.read(f"{ROOT}/{name}")
        for name in names:
            folder, _, file = name.rpartition("/")
            if not file.startswith("."):
                self.by_folder.setdefault(folder, set()).add(file)

    def error(self, message: str) -> UserError:
        """Returns an error that begins with where these files are."""
        return UserError(f"{self.where} {message}")

    def _inside(self, name: str) -> str:
        parts = name.split("/")
        if parts[0] != ROOT or ".." in parts or "\\" in name:
            raise self.error(f"has a file {name!r}, outside {ROOT}/: get the official zip from {URL}")
        return "/".join(parts[1:])

    def read(self, name: str) -> bytes:
        """Returns the content of the file `name`. Raises UserError where it is missing or damaged."""
        try:
            return self._read(name)
        except (KeyError, FileNotFoundError) as error:
            raise self.error(f"has no {name}: get the official zip from {URL}") from error
        except (zipfile.BadZipFile, zlib.error, EOFError) as error:
            raise self.error(f"is damaged at {name} ({error}): get it again from {URL}") from error

    def annotations(self, name: str, images: str) -> list[list[str]]:
        """Returns the rows of the annotation file `name`, checked against the pictures in the folder `images`.

        Raises UserError where the two do not name the same pictures.
        """
        rows = [line.split("\t") for line in self.read(name).decode().splitlines() if line.strip()]
        pictures = {file for file in self.by_folder.get(images, ()) if file.lower().endswith((".jpeg", ".jpg"))}
        if Counter(row[0] for row in rows) != Counter(pictures):
            odd = min({row[0] for row in rows} ^ pictures, default="a picture named twice")
            raise self.error(f"does not fit: {name} names {len(rows)} pictures, {images} has {len(pictures)} ({odd})")
        return sorted(rows)


class TinyImagenet(tfds.core.GeneratorBasedBuilder):
    """200 classes of ImageNet at 64 x 64; labels are the positions of the wnids in sorted order."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="Tiny ImageNet: 200 classes of ImageNet at 64 x 64 pixels (Stanford CS231n).",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(SIDE, SIDE, 3), encoding_format="jpeg"),
                    "label": tfds.features.ClassLabel(),
                    "id": tfds.features.Text(),
                }
            ),
            supervised_keys=("image", "label"),
            homepage="http://cs231n.stanford.edu",
        )

    def missing_archives(self, downloads: pathlib.Path) -> dict[str, pathlib.Path]:
        """Returns URL → where to put it, or nothing where there is something to prepare from."""
        manual = downloads / "manual"
        fetched = downloads / self.name / resource.get_dl_fname(URL)
        there = any(path.exists() for path in (manual / ROOT, manual / f"{ROOT}.zip", fetched))
        return {} if there else {URL: manual / f"{ROOT}.zip"}

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        files = _find(dl_manager)
        wnids = sorted(files.read("wnids.txt").decode().split())
        words = dict(line.split("\t", 1) for line in files.read("words.txt").decode().splitlines() if "\t" in line)
        self.info.features["label"].names = class_names(wnids, words)
        train = [
            (f"train/{wnid}/images/{row[0]}", label)
            for label, wnid in enumerate(wnids)
            for row in files.annotations(f"train/{wnid}/{wnid}_boxes.txt", f"train/{wnid}/images")
        ]
        rows = files.annotations("val/val_annotations.txt", "val/images")
        unknown = {row[1] if len(row) > 1 else "" for row in rows} - set(wnids)
        if unknown:
            raise files.error(f"has the label {min(unknown)!r} in val/val_annotations.txt, which is not in wnids.txt")
        validation = [(f"val/images/{row[0]}", wnids.index(row[1])) for row in rows]
        return {
            "train": self._generate_examples(files, train),
            "validation": self._generate_examples(files, validation),
        }

    def _generate_examples(self, files: Files, items: list[tuple[str, int]]) -> Iterator[tuple[str, dict[str, Any]]]:
        for name, label in items:
            content = files.read(name)
            try:
                with Image.open(io.BytesIO(content)) as image:
                    if image.format != "JPEG" or image.size != (SIDE, SIDE):
                        raise OSError(f"{image.format} of {image.size}")
            except OSError as error:
                raise files.error(f"has {name}, which is no JPEG of {SIDE} x {SIDE} pixels ({error})") from error
            yield name, {"image": content, "label": label, "id": name}


def class_names(wnids: list[str], words: dict[str, str]) -> list[str]:
    """Returns the first word of each wnid, with the wnid where several begin alike."""
    names = [words.get(wnid, wnid).split(",")[0].strip() for wnid in wnids]
    return [f"{n} ({w})" if names.count(n) > 1 else n for n, w in zip(names, wnids, strict=True)]


def _find(dl_manager: tfds.download.DownloadManager) -> Files:
    """Returns the unpacked folder, else the zip, in tfds's manual directory, else what it downloads."""
    manual = pathlib.Path(dl_manager.download_dir) / "manual"
    for path in (manual / ROOT, manual / f"{ROOT}.zip"):
        if path.exists():
            return Files(path)
    path = pathlib.Path(dl_manager.download(URL))
    try:
        return Files(path)
    except UserError:
        path.unlink()  # or tfds would take it for the archive for ever
        raise

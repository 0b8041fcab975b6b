"""Where pictures come from: scikit-learn's digits, tensorflow-datasets builders, folders. Nothing here is cached.

Every source gives `Pictures`: encoded pictures that `read_batches` decodes with Pillow in threads. tensorflow_datasets
is imported inside the functions that need it, which only `vit_jax.prepare` calls.
"""

import contextlib
import dataclasses
import difflib
import errno
import hashlib
import io
import os
import pathlib
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent import futures
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from PIL import Image, ImageOps

from vit_jax.errors import FULL, UserError

EXTENSIONS = frozenset("jpg jpeg jfif png webp bmp gif tif tiff ppm pgm".split())
TEST_FOLDERS = ("test", "val", "valid", "validation")
BATCH = 256  # pictures decoded at a time: enough to keep the threads busy, little memory
MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # Pillow's names, by channels
PROBE_SECONDS = 5
DISK_ERRORS = (*FULL, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST)

Encoded = str | os.PathLike | BinaryIO


class Public(NamedTuple):
    """A data set that goes by a name of its own."""

    builder: str  # its name in tensorflow-datasets, where it comes from there
    side: int  # pixels
    channels: int
    train: int  # pictures
    test: int
    classes: int


PUBLIC = {
    "digits": Public("", 8, 1, 1438, 359, 10),
    "cifar10": Public("cifar10", 32, 3, 50_000, 10_000, 10),
    "cifar100": Public("cifar100", 32, 3, 50_000, 10_000, 100),
    "svhn": Public("svhn_cropped", 32, 3, 73_257, 26_032, 10),
    "tiny_imagenet": Public("tiny_imagenet", 64, 3, 100_000, 10_000, 200),
}


@dataclasses.dataclass(frozen=True)
class Pictures:
    """The encoded pictures of one split. `fetch(range)` gives file, label and name for messages of each."""

    class_names: tuple[str, ...]
    count: int
    fetch: Callable[[range], list[tuple[Encoded, int, str]]]
    mode: str = "RGB"
    image_size: int | None = None  # None: all have one size already
    fingerprint: str = ""
    remedy: str = ""  # what to do about an unreadable picture


def decode(file: Encoded, image_size: int | None = None, mode: str = "RGB") -> np.ndarray:
    """Decodes one picture, upright, in `mode`, the transparent on white; with `image_size`, its short side resized to
    that and centre-cropped.

    Returns uint8 [H, W, C]. Raises whatever Pillow raises on an unreadable picture, or one of 180 million pixels.
    """
    if isinstance(file, str | os.PathLike) and os.path.exists(file) and not os.path.isfile(file):
        raise OSError("a pipe, a device or a folder")  # of which reading might never end
    with Image.open(file, formats=_formats()) as image:
        if image_size is not None:
            image.draft(None, (2 * image_size, 2 * image_size))  # a JPEG far too large is decoded at a fraction
        return pixels(image, image_size, mode)


def _formats() -> list[str]:
    """All that Pillow reads, but for PostScript, which it has another program execute."""
    Image.init()
    return [name for name in Image.ID if name != "EPS"]


def pixels(image: Image.Image, image_size: int | None = None, mode: str = "RGB") -> np.ndarray:
    """What `decode` makes of a picture that is open."""
    image = ImageOps.exif_transpose(image)
    if image.mode == "P":
        image = image.convert("RGBA")  # Pillow warns where a palette's transparency goes straight to RGB
    if image.mode.startswith("I;16"):  # Pillow would clip 16 bits to 8 where the high byte is meant
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if mode != "RGBA" and image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(
            Image.new("RGBA", image.size, "white"), image
        )  # what lies beneath may be anything
    image = image.convert(mode)
    if image_size is not None:
        image = ImageOps.fit(image, (image_size, image_size), Image.Resampling.BICUBIC)
    array = np.asarray(image)
    return array if array.ndim == 3 else array[..., None]


def read_batches(
    pictures: Pictures, *, skip_unreadable: bool = False, unreadable: list[str] | None = None
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields uint8 images [n, H, W, C] and int32 labels [n] in order; appends what it skips to `unreadable`."""

    def read(item: tuple[Encoded, int, str]) -> tuple[np.ndarray | None, int, str]:
        file, label, name = item
        try:
            return decode(file, pictures.image_size, pictures.mode), label, name
        except Exception as error:  # Pillow's plugins raise OSError, SyntaxError, ValueError, struct.error and more
            if not skip_unreadable:
                raise UserError(f"unreadable picture {name} ({error}); {pictures.remedy}") from error
            return None, label, name

    with futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        for start in range(0, pictures.count, BATCH):
            batch = list(pool.map(read, pictures.fetch(range(start, min(start + BATCH, pictures.count)))))
            if unreadable is not None:
                unreadable += [name for image, _, name in batch if image is None]
            images = [(image, label) for image, label, _ in batch if image is not None]
            if images:
                yield np.stack([image for image, _ in images]), np.array([label for _, label in images], np.int32)


def digits() -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    """Returns scikit-learn's handwritten digits: uint8 [1797, 8, 8, 1], int32 [1797], class names."""
    from sklearn import datasets

    bundle = datasets.load_digits()
    images = np.rint(bundle.images * (255 / 16)).astype(np.uint8)[..., None]
    return images, bundle.target.astype(np.int32), tuple(str(name) for name in bundle.target_names)


# Folders


def listed(folder: pathlib.Path) -> list[pathlib.Path]:
    """All pictures in and below `folder`, sorted; hidden ones are left out. Raises OSError where it cannot be read."""

    def fail(error: OSError) -> None:
        raise error

    found = []
    for place, folders, files in os.walk(folder, onerror=fail):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [pathlib.Path(place, name) for name in files if not name.startswith(".") and _is_picture(name)]
    return sorted(found)


def _is_picture(name: str) -> bool:
    return name.rpartition(".")[2].lower() in EXTENSIONS


def _entries(folder: pathlib.Path, directories: bool) -> list[os.DirEntry]:
    """Returns the visible sub-folders, or files, of `folder` in the order of their names."""
    with os.scandir(folder) as scan:
        found = [e for e in scan if not e.name.startswith(".") and e.is_dir() == directories]
    return sorted(found, key=lambda entry: entry.name)


def _folder_pictures(folder: pathlib.Path, image_size: int) -> Pictures:
    """Lists CLASS/PICTURE below `folder`. Raises UserError where there is no class or a class has no picture."""
    classes = _entries(folder, directories=True)
    if not classes:
        raise UserError(f"no class folders in {folder}: expected {folder}/CLASS/PICTURE.jpg")
    items, digest = [], hashlib.sha256()
    for label, entry in enumerate(classes):
        files = [f for f in _entries(pathlib.Path(entry.path), False) if _is_picture(f.name)]
        if not files:
            raise UserError(
                f"no pictures in the class folder {entry.path}: add some ({', '.join(sorted(EXTENSIONS))}) or remove it"
            )
        for file in files:
            status = file.stat(follow_symlinks=file.is_file())  # a broken link is a picture that cannot be read
            digest.update(
                f"{entry.name}/{file.name}\0{status.st_size}\0{status.st_mtime_ns}\n".encode(errors="surrogateescape")
            )
            items.append((file.path, label))
    return Pictures(
        class_names=tuple(entry.name for entry in classes),
        count=len(items),
        fetch=lambda indices: [(*items[i], items[i][0]) for i in indices],
        image_size=image_size,
        fingerprint=digest.hexdigest(),
        remedy="remove it, or set data.skip_unreadable (prepare: --skip_unreadable)",
    )


def folder(path: pathlib.Path, image_size: int | None) -> dict[str, Pictures]:
    """Lists PATH/{train,test|val}/CLASS/PICTURE, or PATH/CLASS/PICTURE as "train" alone.

    Raises UserError where the folder is not so, or train and test have not the same classes.
    """
    if image_size is None:
        raise UserError(f"the pictures of folder:{path} need one size: set data.image_size (prepare: --image_size)")
    if not path.is_dir():
        raise UserError(f"no folder {path}: folder:PATH wants PATH/train/CLASS/PICTURE.jpg")
    test = next((path / name for name in TEST_FOLDERS if (path / name).is_dir()), None)
    if not (path / "train").is_dir():
        if test is not None:
            raise UserError(f"{test} is there but no {path / 'train'}: folder:PATH wants PATH/train/CLASS/PICTURE.jpg")
        return {"train": _folder_pictures(path, image_size)}
    splits = {"train": _folder_pictures(path / "train", image_size)}
    if test is not None:
        splits["test"] = _folder_pictures(test, image_size)
        different = sorted(set(splits["train"].class_names) ^ set(splits["test"].class_names))
        if different:
            raise UserError(
                f"{path / 'train'} and {test} have not the same classes: {', '.join(different[:5])} only in one"
            )
    return splits


# tensorflow-datasets


@contextlib.contextmanager
def _quiet_tfds() -> Iterator[Any]:
    """Imports tfds with TensorFlow silenced and no GPU or cloud storage touched; yields the module, stdout muted."""
    os.environ.update(TF_CPP_MIN_LOG_LEVEL="3", TF_ENABLE_ONEDNN_OPTS="0", CUDA_VISIBLE_DEVICES="-1")
    with contextlib.redirect_stdout(io.StringIO()):
        import tensorflow_datasets as tfds
        from absl import logging
        from tensorflow_datasets.core.utils import gcs_utils

        logging.set_verbosity(logging.ERROR)
        gcs_utils._is_gcs_disabled = True  # without a network, asking it for metadata takes a minute
        if not sys.stderr.isatty():
            tfds.disable_progress_bar()
        yield tfds


def _missing_archives(builder: Any, downloads: pathlib.Path) -> dict[str, pathlib.Path]:
    """Returns URL → where tfds looks for it, for the registered archives that are not there."""
    from tensorflow_datasets.core.download import resource

    if hasattr(builder, "missing_archives"):
        return builder.missing_archives(downloads)
    missing = {}
    for url, info in (builder.url_infos or {}).items():
        manual = downloads / "manual" / (info.filename or url.rpartition("/")[2])
        fetched = resource.get_dl_fname(url, info.checksum)
        if not any(path.exists() for path in (manual, downloads / fetched, downloads / builder.name / fetched)):
            missing[url] = manual
    return missing


def reachable(url: str) -> bool:
    """Whether the server of `url` answers within a few seconds, whatever it answers."""
    try:
        urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=PROBE_SECONDS).close()
    except urllib.error.HTTPError:
        return True
    except (OSError, ValueError):
        return False
    return True


def _prepare(tfds: Any, builder: Any, downloads: pathlib.Path) -> None:
    """Downloads and prepares `builder`. Raises UserError that says which file is missing or damaged, and where."""
    from tensorflow_datasets.core.download import downloader

    missing = _missing_archives(builder, downloads)
    offline = bool(missing) and not reachable(next(iter(missing)))
    advice = ", ".join(f"{url} as {path}" for url, path in list(missing.items())[:4])
    advice = advice and f"save {advice}" + (f" and {len(missing) - 4} more" if len(missing) > 4 else "")
    if offline:
        if len(missing) >= len(builder.url_infos or ()):
            raise UserError(f"no network to download {builder.name}: {advice}, then try again")
        downloader.MAX_RETRIES = 0  # tfds would try ten times, for minutes
    print(f"preparing {builder.name} in {builder.data_path} (once)", file=sys.stderr, flush=True)
    config = tfds.download.DownloadConfig(try_download_gcs=False)
    try:
        builder.download_and_prepare(download_dir=downloads, download_config=config, file_format="array_record")
    except UserError:
        raise
    except Exception as error:  # requests, tarfile, zlib, tfds's own: all mean the archives
        if isinstance(error, OSError) and error.errno in DISK_ERRORS:
            raise
        kind = type(error).__name__
        advice = advice or f"if an archive in {downloads} is damaged, remove it"
        raise UserError(
            f"cannot prepare {builder.name}: {kind}: {str(error)[:300]}; {advice}, then try again"
        ) from error


def _open_builder(tfds: Any, name: str, data_dir: pathlib.Path) -> Any:
    """Returns the builder of `name`. Raises UserError where tfds has none."""
    if name == "tiny_imagenet":
        from vit_jax.data import tiny_imagenet

        return tiny_imagenet.TinyImagenet(data_dir=data_dir, file_format="array_record")
    try:
        try:
            return tfds.builder(name, data_dir=data_dir, file_format="array_record")
        except ValueError as error:
            if "file format" not in str(error).lower():
                raise  # else it is there as TFRecords, tfds's default, which only TensorFlow reads: leave them alone
            return tfds.builder(name, data_dir=data_dir / "vit_jax" / "tfds", file_format="array_record")
    except (tfds.core.DatasetNotFoundError, tfds.core.registered.DatasetNotFoundError) as error:
        near = difflib.get_close_matches(name, tfds.list_builders(with_community_datasets=False), 3)
        hint = f"did you mean {' or '.join(near)}?" if near else "see https://www.tensorflow.org/datasets/catalog"
        raise UserError(f"tensorflow-datasets has no data set {name!r}: {hint}") from error
    except (ValueError, AssertionError) as error:  # an unknown config or version
        raise UserError(f"tensorflow-datasets cannot open {name!r}: {str(error)[:300]}") from error


def from_tfds(name: str, data_dir: pathlib.Path, image_size: int | None) -> dict[str, Pictures]:
    """Prepares the tfds set `name` in `data_dir`; "test" is its test split, else validation.

    Raises UserError where it cannot be had, or is not pictures of one label each.
    """
    with _quiet_tfds() as tfds:
        builder = _open_builder(tfds, name, data_dir)
        features = builder.info.features
        image, label = (features[key] if key in features else None for key in ("image", "label"))
        if not isinstance(image, tfds.features.Image) or not isinstance(label, tfds.features.ClassLabel):
            raise UserError(
                f"tfds:{name} is not image classification: it has {', '.join(features)}, not image and label"
            )
        if image.np_dtype != np.uint8:
            raise UserError(f"the pictures of tfds:{name} are {np.dtype(image.np_dtype).name}; only uint8 is supported")
        if None not in image.shape:
            image_size = None
        elif image_size is None:
            raise UserError(f"the pictures of tfds:{name} vary in size: set data.image_size (prepare: --image_size)")
        if not builder.is_prepared():
            _prepare(tfds, builder, data_dir / "downloads")
        available = list(builder.info.splits)
        test = next((split for split in ("test", "validation") if split in available), None)
        if "train" not in available or test is None:
            raise UserError(
                f"tfds:{name} has the splits {', '.join(available)}; train and test (or validation) are needed"
            )
        return {
            ours: _tfds_pictures(tfds, builder, theirs, image_size)
            for ours, theirs in (("train", "train"), ("test", test))
        }


def _tfds_pictures(tfds: Any, builder: Any, split: str, image_size: int | None) -> Pictures:
    """Opens one prepared split; pictures stay encoded until they are read."""
    if not builder.info.available_file_formats() & tfds.core.FileFormat.with_random_access():
        raise UserError(
            f"{builder.data_path} is not in tfds's array_record format: remove it, or choose another data_dir"
        )
    source = builder.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()})

    def fetch(indices: range) -> list[tuple[Encoded, int, str]]:
        examples = source.__getitems__(list(indices))  # several times faster than one by one
        if any(example["label"] < 0 for example in examples):
            raise UserError(f"the split {split} of tfds:{builder.name} has no labels")
        names = [f"{split} {i} {os.fsdecode(e.get('id', ''))}" for i, e in zip(indices, examples, strict=True)]
        return [(io.BytesIO(e["image"]), int(e["label"]), name) for e, name in zip(examples, names, strict=True)]

    return Pictures(
        class_names=tuple(builder.info.features["label"].names),
        count=len(source),
        fetch=fetch,
        mode=MODES.get(builder.info.features["image"].shape[-1], "RGB"),
        image_size=image_size,
        remedy=f"remove {builder.data_path} to prepare it again",
    )

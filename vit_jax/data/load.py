"""A data set's name → uint8 arrays, memory-mapped from a cache of plain .npy files.

The cache is built once by `vit_jax.prepare`, which `load` runs as a child process, so that neither TensorFlow nor a
download is ever in the process that trains.
"""

import dataclasses
import difflib
import functools
import hashlib
import os
import pathlib
import re
import shutil
import subprocess
import sys
import uuid
from typing import Any

import numpy as np

from vit_jax.data import cache, sources
from vit_jax.data.splits import Split, Splits, channel_statistics, picked, stratified_sample, stratified_split
from vit_jax.errors import FULL, RunError, UserError, one_line

KNOWN = (*sources.PUBLIC, "tfds:NAME", "folder:PATH")
FORMAT = 1  # of the cache; a change of it rebuilds


def load(
    name: str,
    split: str,
    data_dir: str | os.PathLike | None = None,
    *,
    image_size: int | None = None,
    skip_unreadable: bool = False,
) -> Split:
    """Returns one split, "train" or "test", of the data set `name`, which is prepared first where it is not cached.

    `data_dir` None means $TFDS_DATA_DIR or ~/tensorflow_datasets. `image_size` is for pictures that vary in size.
    Raises UserError where the data set, or its test split, cannot be had; RunError where preparing it failed.
    """
    splits = _load(name, data_dir, image_size, skip_unreadable)
    if split not in splits:
        raise UserError(f"{name} has no {split} pictures: set data.holdout to hold some of train out")
    return splits[split]


def is_cached(
    name: str,
    data_dir: str | os.PathLike | None = None,
    *,
    image_size: int | None = None,
    skip_unreadable: bool = False,
) -> bool:
    """Whether `load` has nothing to prepare. Raises UserError where there is no such data set."""
    return (
        name == "digits" or _read(_Request.of(name, data_dir, image_size, skip_unreadable), say_why=False) is not None
    )


def load_measured(
    name: str,
    data_dir: str | os.PathLike | None = None,
    *,
    image_size: int | None = None,
    skip_unreadable: bool = False,
) -> Split:
    """Returns the test pictures of a source that a model was not trained on; all where it has no such; as `load`."""
    splits = _load(name, data_dir, image_size, skip_unreadable)
    return splits.get("test", splits["train"])


def load_splits(
    name: str,
    data_dir: str | os.PathLike | None = None,
    *,
    holdout: float = 0.0,
    train_examples: int | None = None,
    image_size: int | None = None,
    skip_unreadable: bool = False,
) -> Splits:
    """Returns train, the stratified fraction `holdout` of it held out as validation, and test; raises like `load`.

    With `train_examples`, train is as many of its pictures, chosen class by class; its statistics stay those of all.
    """
    if not 0 <= holdout < 1:
        raise UserError(f"data.holdout is {holdout}: it must be at least 0 and less than 1")
    splits = _load(name, data_dir, image_size, skip_unreadable)
    train, test = splits["train"], splits.get("test")
    if holdout == 0 and test is None:
        raise UserError(f"{name} has no test pictures: set data.holdout to hold some of train out")
    held = None
    if holdout:
        train, held = (picked(train, indices) for indices in stratified_split(train.labels, holdout))
        if not len(held.labels):
            count = len(splits["train"].labels)
            raise UserError(
                f"data.holdout {holdout} of {count} pictures holds none out: raise it; a class of one has none"
            )
    if train_examples is not None:
        count, classes = len(train.labels), len(np.unique(train.labels))
        if not classes <= train_examples <= count:
            raise UserError(
                f"data.train_examples is {train_examples}: there are {count} pictures of {classes} classes, "
                "and each class needs one"
            )
        train = train if train_examples == count else picked(train, stratified_sample(train.labels, train_examples))
    return Splits(train, held, test)


# Where its cache is


def expanded(path: str | os.PathLike) -> pathlib.Path:
    """The path with ~ or ~user replaced by the home directory. Raises UserError where there is no such user."""
    try:
        return pathlib.Path(path).expanduser()
    except RuntimeError as error:
        raise UserError(f"{path}: {error}") from error


def _normalise(name: str) -> str:
    """Returns `name` with an absolute folder. Raises UserError on a name that no source has."""
    kind, _, rest = name.partition(":")
    if name in sources.PUBLIC or (kind == "tfds" and re.fullmatch(r"[\w./+-]+", rest)):
        return name
    if kind == "folder" and rest:
        return f"folder:{expanded(rest).resolve()}"
    near = difflib.get_close_matches(name, sources.PUBLIC, 1, cutoff=0.4)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise UserError(f"unknown data set {name!r}: {hint}Known are {', '.join(KNOWN)}")


def _data_dir(data_dir: str | os.PathLike | None) -> pathlib.Path:
    default = os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    return expanded(data_dir or default).resolve()


@dataclasses.dataclass(frozen=True)
class _Request:
    """What a cache must have been built from."""

    name: str
    data_dir: pathlib.Path
    image_size: int | None
    skip_unreadable: bool
    fingerprints: dict[str, str]  # of a folder's listing, per split; empty strings for others

    @classmethod
    def of(cls, name: str, data_dir: str | os.PathLike | None, image_size: int | None, skip: bool) -> "_Request":
        name = _normalise(name)
        if name in sources.PUBLIC:
            image_size = None  # one size by nature; the training step resizes
        fingerprints = {"train": "", "test": ""}
        if name.startswith("folder:"):
            listing = sources.folder(pathlib.Path(name.removeprefix("folder:")), image_size)
            fingerprints = {split: pictures.fingerprint for split, pictures in listing.items()}
        return cls(name, _data_dir(data_dir), image_size, skip, fingerprints)

    def key(self, split: str, image_size: int | None) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "dataset": self.name,
            "split": split,
            "image_size": image_size,
            "fingerprint": self.fingerprints[split],
        }

    def directory(self, image_size: int | None) -> pathlib.Path:
        kind, _, rest = self.name.partition(":")
        safe = self.name
        if kind == "folder":
            digest = hashlib.sha256(os.fsencode(rest)).hexdigest()[:8]  # folders may share their last name
            safe = f"folder-{pathlib.Path(rest).name}-{digest}"
        safe += f"-{image_size}" if image_size is not None else ""
        return self.data_dir / "vit_jax" / re.sub(r"[^\w.-]", "-", safe)

    def sizes(self) -> list[int | None]:
        """Returns the sizes its cache may have: only its builder knows whether a tfds set varies in size."""
        if self.name.startswith("tfds:") and self.image_size is not None:
            return [None, self.image_size]
        return [self.image_size]


def _read(request: _Request, say_why: bool = True) -> dict[str, Split] | None:
    """Returns the cached splits, or None; `say_why` a cache that is there is not used, on stderr."""
    for image_size in request.sizes():
        directory = request.directory(image_size)
        if not directory.exists():
            continue
        try:
            return {
                split: cache.read_split(directory / split, request.key(split, image_size), request.skip_unreadable)
                for split in request.fingerprints
            }
        except cache.Unusable as error:
            if say_why:
                reason = one_line(error)
                print(f"rebuilding the cache {directory}: {reason}", file=sys.stderr, flush=True)
    return None


def _load(
    name: str, data_dir: str | os.PathLike | None, image_size: int | None, skip_unreadable: bool
) -> dict[str, Split]:
    """Returns all splits of `name`, preparing them in a child process where they are not cached."""
    if name == "digits":
        return _digits()
    request = _Request.of(name, data_dir, image_size, skip_unreadable)
    splits = _read(request, say_why=False)  # the child says it
    if splits is None:
        _prepare_in_child(request)
        splits = _read(request)
    if splits is None:
        raise RunError(f"preparing {name} left no usable cache in {request.data_dir / 'vit_jax'}")
    return splits


@functools.cache  # scikit-learn takes most of a second for it
def _digits() -> dict[str, Split]:
    images, labels, class_names = sources.digits()
    train, test = stratified_split(labels, 0.2)
    statistics = channel_statistics(images[train])
    return {
        split: Split(images[indices], labels[indices], class_names, *statistics)
        for split, indices in (("train", train), ("test", test))
    }


def _prepare_in_child(request: _Request) -> None:
    """Runs `vit_jax.prepare` with this process's stderr, so that its bar shows; its error comes back on stdout."""
    command = [sys.executable, "-m", "vit_jax.prepare", "--child", "--dataset", request.name]
    command += ["--data_dir", str(request.data_dir)]
    command += ["--image_size", str(request.image_size)] if request.image_size is not None else []
    command += ["--skip_unreadable"] if request.skip_unreadable else []
    root = str(pathlib.Path(__file__).resolve().parents[2])  # so that a checkout need not be installed
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": path}) as child:
        try:
            output, _ = child.communicate()
        except BaseException:
            child.terminate()  # it removes what it had half written
            raise
    if child.returncode:
        lines = [line.removeprefix("error: ") for line in output.splitlines() if line.startswith("error: ")]
        if child.returncode == UserError.exit_code and lines:
            raise UserError(lines[-1])
        raise RunError(lines[-1] if lines else f"preparing {request.name} failed (exit {child.returncode}), see above")


# Building it: called by vit_jax.prepare only


def build(
    name: str,
    data_dir: str | os.PathLike | None = None,
    *,
    image_size: int | None = None,
    skip_unreadable: bool = False,
) -> tuple[dict[str, Split], pathlib.Path | None]:
    """Prepares the cache of `name` in this process, unless it is there; returns its splits and its directory.

    Raises UserError where the pictures cannot be had or read, or the directory not written; RunError on a full disk.
    """
    if name == "digits":
        return _digits(), None
    request = _Request.of(name, data_dir, image_size, skip_unreadable)
    try:
        with cache.locked(request.directory(None)):
            splits = _read(request)  # another process may have built it meanwhile
            if splits is None:
                splits = _build(request)
    except OSError as error:
        if error.errno in FULL:
            raise RunError(
                f"no space left for {name} in {request.data_dir}: free some or choose another data_dir"
            ) from error
        if error.errno in sources.DISK_ERRORS:
            raise UserError(f"cannot write {name} to {request.data_dir}: {error}; choose another data_dir") from error
        raise
    return splits, pathlib.Path(splits["train"].images.filename).parents[1]  # type: ignore[attr-defined]


def _build(request: _Request) -> dict[str, Split]:
    kind, _, rest = request.name.partition(":")
    if kind == "folder":
        pictures = sources.folder(pathlib.Path(rest), request.image_size)
    else:
        builder = sources.PUBLIC[request.name].builder if request.name in sources.PUBLIC else rest
        pictures = sources.from_tfds(builder, request.data_dir, request.image_size)
    image_size = pictures["train"].image_size
    final = request.directory(image_size)
    for stale in final.parent.glob(f".{final.name}.*.tmp"):  # of a process that was killed
        shutil.rmtree(stale, ignore_errors=True)
    print(f"decoding {request.name} into {final} (once)", file=sys.stderr, flush=True)
    temporary = final.with_name(f".{final.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        statistics = None
        for split, source in pictures.items():
            key = {**request.key(split, image_size), "fingerprint": source.fingerprint}
            statistics = cache.write_split(temporary / split, key, source, statistics, request.skip_unreadable)
        if final.exists():
            final.rename(temporary / "replaced")  # whoever has it mapped keeps it
        temporary.rename(final)
        shutil.rmtree(final / "replaced", ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    splits = _read(request)
    if splits is None:
        raise UserError(f"the pictures of {request.name} changed while they were read: try again")
    return splits

"""The cache of one split: images.npy, labels.npy and meta.json in a directory of their own."""

import contextlib
import json
import os
import pathlib
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import tqdm

from vit_jax.data import sources
from vit_jax.data.splits import Split, channel_statistics
from vit_jax.errors import UserError


class Unusable(Exception):
    """A cache that is truncated, foreign or of other pictures."""


def read_split(directory: pathlib.Path, key: dict[str, Any], skip_unreadable: bool) -> Split:
    """Opens one cached split. Raises Unusable, saying why, where it is not what `key` names."""
    try:
        meta = json.loads((directory / "meta.json").read_text())
        if {name: meta[name] for name in key} != key:
            raise Unusable("it was made from other pictures or by another version")
        images = np.load(directory / "images.npy", mmap_mode="r", allow_pickle=False)
        labels = np.load(directory / "labels.npy", allow_pickle=False)
        names = tuple(meta["class_names"])
        whole = (images.dtype, list(images.shape)) == (np.uint8, meta["shape"]) and images.ndim == 4
        whole &= (directory / "images.npy").stat().st_size == images.offset + images.nbytes
        whole &= (labels.dtype, labels.shape) == (np.int32, images.shape[:1])
        if not whole or not 0 <= labels.min() <= labels.max() < len(names):
            raise Unusable("its arrays are not those that its meta.json describes")
        if meta["unreadable"] and not skip_unreadable:
            raise Unusable(f"{len(meta['unreadable'])} unreadable pictures were skipped in it")
        return Split(images, labels, names, tuple(meta["mean"]), tuple(meta["std"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError, RecursionError) as error:
        raise Unusable(f"{type(error).__name__}: {error}") from error


def write_split(
    directory: pathlib.Path,
    key: dict[str, Any],
    pictures: sources.Pictures,
    statistics: tuple[tuple[float, ...], tuple[float, ...]] | None,
    skip_unreadable: bool,
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Decodes `pictures` into `directory`, batch by batch; returns `statistics`, or these pictures' own where None."""
    directory.mkdir(parents=True)
    unreadable: list[str] = []
    labels: list[np.ndarray] = []
    shape: tuple[int, ...] = ()
    batches = sources.read_batches(pictures, skip_unreadable=skip_unreadable, unreadable=unreadable)
    title = f"{key['dataset']} {key['split']}"
    with (
        open(directory / "images.npy", "wb") as file,
        tqdm.tqdm(total=pictures.count, desc=title, unit=" pictures", disable=None) as bar,
    ):
        for images, batch in batches:
            if not labels:
                shape = images.shape[1:]
                _write_header(file, (0, *shape))  # NumPy pads it so that the first axis can grow in place
            file.write(images.tobytes())
            labels.append(batch)
            bar.update(len(batch))
        if not labels:
            raise UserError(f"{title} has no readable picture")
        file.seek(0)
        _write_header(file, (sum(map(len, labels)), *shape))
        _flush(file)
    with open(directory / "labels.npy", "wb") as file:
        np.save(file, np.concatenate(labels))
        _flush(file)
    if unreadable:
        print(f"skipped {len(unreadable)} unreadable pictures: {', '.join(unreadable)}", file=sys.stderr, flush=True)
    images = np.load(directory / "images.npy", mmap_mode="r")
    mean, std = statistics or channel_statistics(images)
    meta = {
        "class_names": pictures.class_names,
        "shape": images.shape,
        "mean": mean,
        "std": std,
        "unreadable": unreadable,
    }
    with open(directory / "meta.json", "w") as text:
        json.dump({**key, **meta}, text, indent=1)
        _flush(text)
    return mean, std


def _write_header(file: Any, shape: tuple[int, ...]) -> None:
    np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})


def _flush(file: Any) -> None:
    """Brings `file` to the disk before its directory gets its final name."""
    file.flush()
    os.fsync(file.fileno())


@contextlib.contextmanager
def locked(path: pathlib.Path) -> Iterator[None]:
    """Keeps other builders of the same data set waiting."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_name(f".{path.name}.lock"), "w") as file:
        with contextlib.suppress(OSError, ImportError):  # a system without locks: the last to finish wins
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
        yield

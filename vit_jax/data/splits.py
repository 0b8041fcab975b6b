"""Pictures with their labels, what a run trains and measures on, and choosing some of them, class by class."""

import dataclasses
import math
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Split:
    """Pictures and labels of one split; `mean` and `std` per channel, in [0, 1] units, are the training pictures'."""

    images: Any  # uint8 [N, H, W, C]: memory-mapped from the cache, or rows of that; features, float32 [N, D]
    labels: np.ndarray  # int32 [N]
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class Splits:
    """What a run trains, chooses and reports on."""

    train: Split
    validation: Split | None  # held out of train; None where holdout is 0
    test: Split | None  # None where the source has no test pictures (then validation is there)

    @property
    def watched(self) -> Split:
        """What curves and choices are measured on: the held-out pictures where there are any."""
        split = self.validation or self.test
        assert split is not None
        return split

    @property
    def reported(self) -> Split:
        """What the result is measured on: test where there is one."""
        return self.test or self.watched


class Rows:
    """Some rows of an array, [N, ...] of [M, ...], read when they are asked for: all may be more than memory holds."""

    def __init__(self, array: np.ndarray, rows: np.ndarray):
        self._array, self._rows = array, rows
        self.shape, self.dtype = (len(rows), *array.shape[1:]), array.dtype
        self.nbytes = math.prod(self.shape) * array.dtype.itemsize

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> np.ndarray:
        return self._array[self._rows[index]]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self[:], dtype)


def picked(split: Split, indices: np.ndarray) -> Split:
    return dataclasses.replace(split, images=Rows(split.images, indices), labels=split.labels[indices])


def stratified_split(labels: np.ndarray, fraction: float) -> tuple[np.ndarray, np.ndarray]:
    """Splits the indices of `labels` [N] into (kept, held), sorted, with `fraction` of every class held.

    The same labels always give the same split. A class of two or more is on both sides (a class of one is kept);
    within that, round(fraction * N) are held in all, the roundings going to the largest remainders.
    """
    labels = np.asarray(labels)
    classes, counts = np.unique(labels, return_counts=True)
    if fraction <= 0 or not len(labels):
        return np.arange(len(labels)), np.arange(0)
    quota = _quotas(fraction * counts, np.minimum(1, counts - 1), counts - 1, round(fraction * len(labels)))
    held = _drawn(labels, classes, quota)
    return np.setdiff1d(np.arange(len(labels)), held), held


def stratified_sample(labels: np.ndarray, size: int) -> np.ndarray:
    """The indices, sorted, of `size` of `labels` [N], each class in proportion and at least once; always the same."""
    classes, counts = np.unique(labels, return_counts=True)
    quota = _quotas(size * counts / len(labels), np.minimum(1, counts), counts, size)
    while quota.sum() > size:  # classes too small for their share had one more
        quota[np.argmax(quota)] -= 1
    return _drawn(labels, classes, quota)


def _quotas(ideal: np.ndarray, least: np.ndarray, most: np.ndarray, total: int) -> np.ndarray:
    """`ideal` in whole numbers that sum up to `total`, the roundings going to the largest remainders."""
    quota = np.clip(np.floor(ideal).astype(np.int64), least, most)
    for index in np.argsort(quota - ideal, kind="stable"):  # furthest below its share first
        quota[index] += quota.sum() < total and quota[index] < most[index]
    return quota


def _drawn(labels: np.ndarray, classes: np.ndarray, quota: np.ndarray) -> np.ndarray:
    random = np.random.RandomState(0)  # NumPy keeps this stream for ever, unlike Generator's
    return np.sort(
        np.concatenate(
            [random.permutation(np.flatnonzero(labels == c))[:n] for c, n in zip(classes, quota, strict=True)]
        )
    )


def channel_statistics(images: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Returns mean and standard deviation per channel of uint8 `images` [N, H, W, C], in [0, 1] units.

    Exact: integers below 2**53 add up without error in float64. A few megabytes of memory, whatever the size.
    """
    channels = images.shape[-1]
    pixels = images.size // channels
    total, squares = np.zeros(channels), np.zeros(channels)
    rows = max(1, 2**18 // (images.shape[1] * images.shape[2]))
    for start in range(0, len(images), rows):
        chunk = np.asarray(images[start : start + rows], np.float64).reshape(-1, channels)
        total += chunk.sum(0)
        squares += np.einsum("nc,nc->c", chunk, chunk)
    sums = [(int(s), int(q)) for s, q in zip(total, squares, strict=True)]
    mean = tuple(s / pixels / 255 for s, _ in sums)
    std = tuple((pixels * q - s * s) ** 0.5 / pixels / 255 for s, q in sums)
    return mean, std

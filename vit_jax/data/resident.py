"""A whole split on the devices, and the order in which training reads it."""

import numpy as np


def epoch_order(seed: int, epoch: int, size: int) -> np.ndarray:
    """The order of epoch `epoch`: a permutation of range(size), int32 [N], fixed by seed and epoch alone."""
    return np.random.default_rng([seed, epoch]).permutation(size).astype(np.int32)


class BatchIndices:
    """Which pictures each training step reads, as a function of the step alone.

    The epochs' permutations are laid end to end and cut into batches, so a batch may run on into the next epoch:
    over the run every picture is read equally often (within one), and no tail is dropped.
    """

    def __init__(self, seed: int, size: int, batch_size: int):
        self.seed, self.size, self.batch_size = seed, size, batch_size
        self._orders: dict[int, np.ndarray] = {}

    def __call__(self, first_step: int, count: int) -> np.ndarray:
        """The indices of `count` steps from `first_step` on, int32 [count, B]."""
        start, stop = first_step * self.batch_size, (first_step + count) * self.batch_size
        first, last = start // self.size, (stop - 1) // self.size
        known = self._orders
        self._orders = {e: known[e] if e in known else self._order(e) for e in range(first, last + 1)}
        run = np.concatenate(list(self._orders.values()))
        offset = first * self.size
        return run[start - offset : stop - offset].reshape(count, self.batch_size)

    def _order(self, epoch: int) -> np.ndarray:
        return epoch_order(self.seed, epoch, self.size)


def padded(images: np.ndarray, labels: np.ndarray, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Repeats the last example until batches are full: [N, ...] -> [ceil(N / B) * B, ...]. Callers cut results to N."""
    missing = -len(labels) % batch_size
    if missing == 0:
        return images, labels
    return (
        np.concatenate([images, np.repeat(images[-1:], missing, axis=0)]),
        np.concatenate([labels, np.repeat(labels[-1:], missing, axis=0)]),
    )

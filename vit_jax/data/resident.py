"""The order in which training reads a split, wherever that lies, and the padding with which evaluation does."""

import numpy as np


def epoch_order(seed: int, epoch: int, size: int) -> np.ndarray:
    """The order of epoch `epoch`: a permutation of range(size), int32 [N], fixed by seed and epoch alone."""
    return _permutation(size, seed, epoch)


def _permutation(size: int, *seeds: int) -> np.ndarray:
    stream = np.random.RandomState(np.random.MT19937(np.random.SeedSequence(seeds)))
    return stream.permutation(size).astype(np.int32)  # RandomState: NumPy keeps its streams for ever


class BatchIndices:
    """Which pictures each training step reads, as a function of the step alone.

    The epochs' permutations are laid end to end and cut into batches, so a batch may run on into the next epoch:
    over the run every picture is read equally often (within one), and no tail is dropped.

    With `repeats` a batch of B reads B / repeats pictures, each as often (repeated augmentation, Hoffer et al. 2020,
    arXiv 1901.09335), in as many stretches. Each stretch has them in another order, for neighbours are mixed.
    """

    def __init__(self, seed: int, size: int, batch_size: int, repeats: int = 1):
        self.seed, self.size, self.batch_size, self.repeats = seed, size, batch_size // repeats, repeats
        self._orders: dict[int, np.ndarray] = {}

    def __call__(self, first_step: int, count: int) -> np.ndarray:
        """The indices of `count` steps from `first_step` on, int32 [count, B]."""
        start, stop = first_step * self.batch_size, (first_step + count) * self.batch_size
        first, last = start // self.size, (stop - 1) // self.size
        known = self._orders
        new = range(first, last + 1)
        orders = {e: known[e] if e in known else epoch_order(self.seed, e, self.size) for e in new}
        self._orders = orders  # at once: several threads may ask
        run = np.concatenate(list(orders.values()))
        offset = first * self.size
        batches = run[start - offset : stop - offset].reshape(count, self.batch_size)
        return np.stack([self._repeated(batch, first_step + i) for i, batch in enumerate(batches)])

    def _repeated(self, batch: np.ndarray, step: int) -> np.ndarray:
        orders = [_permutation(len(batch), self.seed, step, stretch) for stretch in range(1, self.repeats)]
        return np.concatenate([batch, *(batch[order] for order in orders)])


def padded(images: np.ndarray, labels: np.ndarray, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Repeats the last example until batches are full: [N, ...] -> [ceil(N / B) * B, ...]. Callers cut results to N."""
    missing = -len(labels) % batch_size
    if missing == 0:
        return images, labels
    return (
        np.concatenate([images, np.repeat(images[-1:], missing, axis=0)]),
        np.concatenate([labels, np.repeat(labels[-1:], missing, axis=0)]),
    )

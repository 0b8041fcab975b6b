"""Pictures that do not fit on the devices: batches in training's order, read ahead of it by threads."""

from collections.abc import Iterator

import numpy as np

from vit_jax.data.resident import BatchIndices

THREADS = 4


class Stream:
    """The batches of consecutive steps, read from (memory-mapped) arrays with grain.

    A step's batch is a function of the step alone, so a stream's position is the step it stands at, and nothing of it
    need be saved.

    Attributes:
      rows: which of each batch this process reads, int [R].
      ahead: how many batches are read before they are asked for.
    """

    def __init__(self, images: np.ndarray, labels: np.ndarray, order: BatchIndices, rows: np.ndarray, ahead: int):
        import grain  # it takes a second, which runs on resident pictures need not wait

        def read(step):
            index = order(step, 1)[0, rows]
            return images[index], labels[index]

        self._batches = grain.MapDataset.range(2**31 - 1).map(read)
        self._options = grain.ReadOptions(num_threads=THREADS, prefetch_buffer_size=ahead)
        self._step = -1
        self._iterator: Iterator[tuple[np.ndarray, np.ndarray]] = iter(())

    def __call__(self, first: int, count: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """The images uint8 [R, H, W, C] and labels int32 [R] of `count` steps from `first` on."""
        if first != self._step:
            self._iterator = iter(self._batches[first:].to_iter_dataset(self._options))
        self._step = first + count
        return [next(self._iterator) for _ in range(count)]

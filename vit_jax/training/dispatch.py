"""The jitted programs bound to pictures on the devices: training dispatches, and evaluation of a whole split."""

import dataclasses
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from vit_jax.data.load import Split
from vit_jax.data.resident import BatchIndices, padded
from vit_jax.training import mesh as meshes
from vit_jax.training import processes
from vit_jax.training.step import (
    TABLE_STEPS,
    Classifier,
    Probe,
    Task,
    TrainState,
    copy,
    make_evaluate,
    make_features,
    make_train_steps,
)

SECONDS_PER_CALL = 2.0


class Dispatcher:
    """Training steps on a resident split, many a dispatch, by one compiled program.

    Attributes:
      compile_seconds: what compiling took, or reading the program from the compilation cache.
    """

    def __init__(self, task: Task, state: TrainState, train: Split, batch_size: int):
        mesh = task.classifier.mesh
        self._order = BatchIndices(task.seed, len(train.labels), batch_size, task.augmentation.repeats)
        self._pictures = meshes.place((train.images, train.labels), mesh)
        self._table = np.zeros((TABLE_STEPS, batch_size), np.int32)
        started = time.monotonic()
        self._size_at = task.size_at
        sizes = {task.size_at(0), task.classifier.image_size}
        arguments = (state, *self._pictures, self._table, np.int32(0))
        self._train_steps = {size: make_train_steps(task, size).lower(*arguments).compile() for size in sizes}
        self.compile_seconds = time.monotonic() - started

    def __call__(self, state: TrainState, first: int, stop: int) -> tuple[TrainState, dict[str, jax.Array]]:
        """Trains from step `first` to step `stop`, all of them on pictures of the size of the first.

        Gives the new state (the old one is gone) and a copy of its sums.
        """
        table = self._table.copy()  # the dispatch before may still read its own
        table[: stop - first] = self._order(first, stop - first)
        return self._train_steps[self._size_at(first)](state, *self._pictures, table, np.int32(stop - first))

    def choose_steps_per_call(self, state: TrainState, step: int) -> int:
        """How many steps of the first size take about two seconds here, TABLE_STEPS at most; on a copy of the state."""

        def seconds(count: int) -> float:
            given_away = jax.block_until_ready(copy(state))
            started = time.monotonic()
            jax.block_until_ready(self(given_away, step, step + count))
            return processes.of_first(time.monotonic() - started)  # so that all choose the same

        seconds(1)  # the first one is slower
        one = seconds(1)  # with all that a dispatch costs besides its steps: on a CPU as much as a step
        if one >= SECONDS_PER_CALL:
            return 1
        count = 2
        while (more := seconds(count) - one) < SECONDS_PER_CALL / 10 and count < TABLE_STEPS:
            count = min(4 * count, TABLE_STEPS)
        return int(np.clip(SECONDS_PER_CALL / (max(more, 1e-9) / (count - 1)), 1, TABLE_STEPS))


def make_evaluator(classifier: Classifier, split: Split, batch_size: int) -> Callable[[Any], dict[str, np.ndarray]]:
    """A function of parameters that gives per-example results of a resident split, each [N] (see `make_evaluate`)."""
    pictures = meshes.place(padded(split.images, split.labels, batch_size), classifier.mesh)
    program = make_evaluate(classifier, batch_size)

    def evaluate(params):
        results = jax.device_get(program(params, *pictures))
        return {name: values[: len(split.labels)] for name, values in results.items()}

    return evaluate


def featured(probe: Probe, params: Any, split: Split, batch_size: int) -> Split:
    """The split with the trunk's features, float32 [N, D], in place of its pictures."""
    program = make_features(probe)
    images, _ = padded(split.images, split.labels, batch_size)
    found = []
    pace = 0.1 if sys.stderr.isatty() else 10  # seconds between looks at it: in a log each is a line
    shown = {"mininterval": pace, "file": sys.stderr, "disable": not processes.is_first()}
    with tqdm(total=len(split.labels), desc="features", unit=" pictures", **shown) as bar:
        for start in range(0, len(images), batch_size):
            batch = meshes.place(images[start : start + batch_size], probe.mesh, meshes.batch_sharded(probe.mesh))
            found.append(jax.device_get(program(params, batch)))
            bar.update(min(batch_size, len(split.labels) - start))
    return dataclasses.replace(split, images=np.concatenate(found)[: len(split.labels)])

"""The jitted programs bound to pictures on the devices: training dispatches, and evaluation of a whole split."""

import dataclasses
import functools
import math
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from vit_jax.data.resident import BatchIndices, padded
from vit_jax.data.splits import Split
from vit_jax.data.stream import Stream
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
    pick_resident,
    pick_streamed,
)

SECONDS_PER_CALL = 2.0
STREAMED_BYTES = 256 * 2**20  # of pictures that go to the devices at once


Data = tuple[jax.Array, ...]


class Resident:
    """Feeds dispatches from a split that lies on the devices: nothing moves but a table of indices.

    Attributes:
      capacity: most steps that can be fed at once.
    """

    pick = staticmethod(pick_resident)
    capacity = TABLE_STEPS

    def __init__(self, split: Split, order: BatchIndices, batch_size: int, mesh: Mesh, shared: bool):
        put = meshes.place_examples if shared else meshes.place
        self._pictures = put((split.images, split.labels), mesh)
        self._order, self._mesh = order, mesh
        self._table = np.zeros((TABLE_STEPS, batch_size), np.int32)

    def __call__(self, first: int, count: int) -> Data:
        """The data of `count` steps from `first` on, of the same shapes for any count."""
        table = self._table.copy()  # the dispatch before may still read its own
        table[:count] = self._order(first, count)
        return *self._pictures, meshes.place(table, self._mesh)


class Streamed:
    """Feeds dispatches from a split that lies on the disk: their batches move, while those before are trained on.

    Attributes:
      capacity: most steps that can be fed at once.
    """

    pick = staticmethod(pick_streamed)

    def __init__(self, split: Split, order: BatchIndices, batch_size: int, mesh: Mesh):
        self._shape = batch_size, *split.images.shape[1:]
        self.capacity = int(np.clip(STREAMED_BYTES // math.prod(self._shape), 1, TABLE_STEPS))
        self._mesh, rows = mesh, meshes.own_rows(batch_size, mesh)
        self._stream = Stream(split.images, split.labels, order, rows, ahead=2 * self.capacity)

    def __call__(self, first: int, count: int) -> Data:
        """The data of `count` steps from `first` on, of the same shapes for any count."""
        batches = self._stream(first, count)
        batches += [batches[-1]] * (self.capacity - count)
        images, labels = (np.stack(x) for x in zip(*batches, strict=True))
        return meshes.place_batches((images, labels), self._shape[0], self._mesh)


class Dispatcher:
    """Training steps on a split, many a dispatch, by one compiled program.

    Attributes:
      compile_seconds: what compiling took, or reading the program from the compilation cache.
      programs: by the side of the pictures, pixels.
    """

    def __init__(self, task: Task, state: TrainState, train: Split, batch_size: int, placement: str = "whole"):
        mesh = task.classifier.mesh
        order = BatchIndices(task.seed, len(train.labels), batch_size, task.augmentation.repeats)
        self._feed: Resident | Streamed = (
            Streamed(train, order, batch_size, mesh)
            if placement == "streamed"
            else Resident(train, order, batch_size, mesh, shared=placement == "shared")
        )
        self._place = functools.partial(meshes.place, mesh=mesh)
        self._size_at = task.size_at
        sizes = {task.size_at(0), task.classifier.image_size}
        arguments = (state, self._place(np.int32(0)), *self._feed(int(state.step), 1))
        started = time.monotonic()
        self.programs = {
            size: make_train_steps(task, size, self._feed.pick).lower(*arguments).compile() for size in sizes
        }
        self.compile_seconds = time.monotonic() - started

    def __call__(self, state: TrainState, first: int, stop: int) -> tuple[TrainState, dict[str, Any]]:
        """Trains from step `first` to step `stop`, all of them on pictures of the size of the first.

        Gives the new state (the old one is gone) and a copy of its progress.
        """
        program, progress = self.programs[self._size_at(first)], state.progress
        while first < stop:
            count = min(stop - first, self._feed.capacity)
            state, progress = program(state, self._place(np.int32(count)), *self._feed(first, count))
            first += count
        return state, progress

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


def program_bytes(program: jax.stages.Compiled) -> int:
    """What a compiled program takes of a device: arguments, results and what it needs besides."""
    memory: Any = program.memory_analysis()
    used = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
    return used - memory.alias_size_in_bytes


def make_evaluator(
    classifier: Classifier, split: Split, batch_size: int, streamed: bool = False
) -> Callable[[Any], dict[str, np.ndarray]]:
    """A function of parameters that gives per-example results of a split, each [N] (see `make_evaluate`).

    The split lies on the devices, or, `streamed`, goes there part by part.
    """
    program = make_evaluate(classifier, batch_size)
    images, labels = split.images, split.labels
    batches = max(STREAMED_BYTES // (batch_size * math.prod(images.shape[1:])), 1) if streamed else len(labels)
    size = min(batches, -(-len(labels) // batch_size)) * batch_size
    parts = [slice(start, start + size) for start in range(0, len(labels), size)]

    def placed(part):
        return meshes.place(padded(images[part], labels[part], size), classifier.mesh)

    resident = None if streamed else placed(parts[0])

    def evaluate(params):
        found = [jax.device_get(program(params, *(resident or placed(part)))) for part in parts]
        return {name: np.concatenate([x[name] for x in found])[: len(labels)] for name in found[0]}

    return evaluate


def featured(probe: Probe, params: Any, split: Split, batch_size: int) -> Split:
    """The split with the trunk's features, float32 [N, D], in place of its pictures."""
    program = make_features(probe)
    found = []
    pace = 0.1 if sys.stderr.isatty() else 10  # seconds between looks at it: in a log each is a line
    shown = {"mininterval": pace, "file": sys.stderr, "disable": not processes.is_first()}
    with tqdm(total=len(split.labels), desc="features", unit=" pictures", **shown) as bar:
        for start in range(0, len(split.labels), batch_size):
            part = slice(start, start + batch_size)
            images, _ = padded(split.images[part], split.labels[part], batch_size)
            batch = meshes.place(images, probe.mesh, meshes.batch_sharded(probe.mesh))
            found.append(jax.device_get(program(params, batch)))
            bar.update(min(batch_size, len(split.labels) - start))
    return dataclasses.replace(split, images=np.concatenate(found)[: len(split.labels)])

"""What a run costs, in numbers that do not hang on the machine: compilations, dispatches, fetches, products, bytes."""

import collections
import gc
import logging
import re

import jax
import numpy as np
import pytest
from jax._src.array import ArrayImpl

from vit_jax import command_line
from vit_jax.data.splits import Split
from vit_jax.models.vit import VisionTransformer
from vit_jax.training import dispatch, loop, mesh, optim, step

RUN = {
    **{"model.width": 16, "model.depth": 1, "model.num_heads": 2, "model.mlp_dim": 16, "model.dropout": 0.1},
    **{"train.steps": 60, "train.steps_per_call": 5, "train.eval_every": 1.0, "checkpoint.every": 2.0},
}
STOPS = [5, 10, 15, 20, 22, 25, 30, 35, 40, 45, 50, 55, 60]  # of dispatches; an epoch is 22.5 steps
PAUSES = [22, 45, 60]  # evaluations and checkpoints


class Counted:
    """What happens in a run: the names of compiled functions, dispatches, fetches, and values read outside of these."""

    def __init__(self):
        self.compiled = collections.Counter()
        self.stops, self.fetches, self.read = [], [], []
        self.fetching = False


@pytest.fixture(scope="module")
def counted(tmp_path_factory):
    """A run of 60 steps on digits, watched."""
    seen = Counted()
    workdir = tmp_path_factory.mktemp("counted")

    class Log(logging.Handler):
        def emit(self, record):
            if found := re.match(r"Compiling (\S+) with global shapes and types (.*)", record.getMessage()):
                seen.compiled[found.groups()] += 1

    class Watched(loop.Dispatcher):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            self.programs = {size: self.watched(program) for size, program in self.programs.items()}

        def watched(self, program):
            def run(state, count, *data):
                seen.stops.append(int(np.from_dlpack(count)) + (seen.stops[-1] if seen.stops else 0))
                return program(state, count, *data)

            return run

    fetch, value, logger, log = jax.device_get, ArrayImpl._value.fget, logging.getLogger("jax"), Log()

    def device_get(tree):
        seen.fetching = True
        try:
            return fetch(tree)
        finally:
            seen.fetching = False
            seen.fetches.append(seen.stops[-1] if seen.stops else 0)

    def read(array):
        if not seen.fetching and array._npy_value is None:
            seen.read.append((seen.stops[-1] if seen.stops else 0, array.shape))
        return value(array)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "Dispatcher", Watched)
        patch.setattr(jax, "device_get", device_get)
        patch.setattr(ArrayImpl, "_value", property(read))
        logger.addHandler(log)
        jax.config.update("jax_log_compiles", True)
        try:
            config, _ = command_line.parse(
                "configs/digits.py", [f"--config.{name}={number}" for name, number in RUN.items()]
            )
            loop.train(config, workdir / "run")
        finally:
            jax.config.update("jax_log_compiles", False)
            logger.removeHandler(log)
    return seen


def test_each_function_is_compiled_once_for_each_shape(counted):
    names = collections.Counter(name for name, _ in counted.compiled.elements())
    assert names["jit(train_steps)"] == names["jit(evaluate)"] == 1
    # Those without arguments hang on numbers that the log does not tell.
    again = [what for what, times in counted.compiled.items() if times > 1 and not what[1].startswith("().")]
    assert again == []


def test_an_epoch_takes_as_few_dispatches_as_its_steps_and_stops_allow(counted):
    assert counted.stops == STOPS


def test_a_dispatch_is_looked_at_once_and_in_one_place(counted):
    """After those that end in an evaluation or a checkpoint also for what these need."""
    fetched = collections.Counter(counted.fetches)
    quiet = [stop for stop in STOPS if stop not in PAUSES]
    assert {stop: fetched[stop] for stop in quiet} == dict.fromkeys(quiet, 1)
    assert [(stop, shape) for stop, shape in counted.read if stop in quiet] == []


# A task of two blocks, 12 parameters a matrix or more, on made-up pictures

PICTURES = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 3), np.uint8)
SPLIT = Split(PICTURES, np.arange(40, dtype=np.int32) % 5, tuple("abcde"), (0.5,) * 3, (0.25,) * 3)


@pytest.fixture(scope="module")
def training():
    """A dispatcher and the state that it begins with."""
    network = VisionTransformer(num_classes=5, patch_size=4, width=16, depth=2, num_heads=2, mlp_dim=24, dropout=0.1)
    classifier = step.Classifier(network, 8, (0.5,) * 3, (0.25,) * 3, mesh.make_mesh(1))
    rate = optim.make_schedule("cosine", 1e-3, 2, 99)
    rule = optim.make_optimizer("adamw", rate, weight_decay=0.1, momentum=0.9, b2=0.99, clip_norm=1.0)
    task = step.Task(classifier, rule, step.Augmentation("pad", 1, flip=True), 0.1, 1, ema_decay=0.9, seed=0)
    state = step.init_state(task)
    return dispatch.Dispatcher(task, state, SPLIT, 16), state


def test_products_of_a_compiled_step(training):
    """A block: q, k and v in one, scores, values, out and the MLP's two, each with two more for its gradients; besides
    the head with its two, and the patch embedding with one, for nobody asks how pictures should change.
    """
    run, _ = training
    (program,) = run.programs.values()
    assert len(re.findall(r" dot\(", program.as_text())) == 2 * 6 * 3 + 3 + 2


def test_no_dispatch_leaves_bytes_behind(training):
    run, state = training

    def living():
        gc.collect()
        return sum(x.nbytes for x in jax.live_arrays())

    sizes = []
    for i in range(12):
        state, done = run(state, 3 * i, 3 * i + 3)
        jax.block_until_ready(state)
        sizes.append(living())
    assert len(set(sizes[2:])) == 1

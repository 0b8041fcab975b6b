"""What a run costs, in numbers that do not hang on the machine: compilations, dispatches, fetches, products, bytes."""

import collections
import gc
import logging
import re

import jax
import numpy as np
import pytest
from jax._src.array import ArrayImpl
from jax.experimental.compilation_cache import compilation_cache

from vit_jax import command_line
from vit_jax.data.load import Split
from vit_jax.models.vit import VisionTransformer
from vit_jax.training import dispatch, loop, mesh, optim, step

RUN = {
    **{"model.width": 16, "model.depth": 1, "model.num_heads": 2, "model.mlp_dim": 16, "model.dropout": 0.1},
    **{"train.steps": 60, "train.steps_per_call": 5, "train.eval_every": 1.0, "checkpoint.every": 2.0},
}
STOPS = [5, 10, 15, 20, 22, 25, 30, 35, 40, 45, 50, 55, 60]  # of dispatches; an epoch is 22.5 steps
EVALUATED = [22, 45, 60]


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
    before = jax.config.values["jax_compilation_cache_dir"]
    workdir = tmp_path_factory.mktemp("counted")

    class Log(logging.Handler):
        def emit(self, record):
            if found := re.match(r"Compiling (\S+) with global shapes and types (.*?)\. Argument", record.getMessage()):
                seen.compiled[found.groups()] += 1

    class Watched(loop.Dispatcher):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            self.programs = {size: self.watched(program) for size, program in self.programs.items()}

        def watched(self, program):
            def run(state, count, *data):
                seen.stops.append(int(np.asarray(count)) + (seen.stops[-1] if seen.stops else 0))
                seen.read.clear()  # what this test has read itself
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
            seen.read.append(array.shape)
        return value(array)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(workdir / "cache"))
        patch.setattr(loop, "Dispatcher", Watched)
        patch.setattr(jax, "device_get", device_get)
        logger.addHandler(log)
        jax.config.update("jax_log_compiles", True)
        try:
            config, _ = command_line.parse(
                "configs/digits.py", [f"--config.{name}={number}" for name, number in RUN.items()]
            )
            loop.train(config, workdir / "run")
        finally:
            jax.config.update("jax_log_compiles", False)
            jax.config.update("jax_compilation_cache_dir", before)
            compilation_cache.reset_cache()
            logger.removeHandler(log)
    return seen


def test_each_function_is_compiled_once_for_each_shape(counted):
    names = collections.Counter(name for name, _ in counted.compiled.elements())
    assert names["jit(train_steps)"] == names["jit(evaluate)"] == 1
    assert not {what: times for what, times in counted.compiled.items() if times > 1}


def test_an_epoch_takes_as_few_dispatches_as_its_steps_and_stops_allow(counted):
    assert counted.stops == STOPS


def test_a_dispatch_is_looked_at_once(counted):
    """In one place; and after those that end in an evaluation or checkpoint once more for each of what these need."""
    fetched = collections.Counter(counted.fetches)
    quiet = [stop for stop in STOPS if stop not in EVALUATED]
    assert {stop: fetched[stop] for stop in quiet} == dict.fromkeys(quiet, 1)

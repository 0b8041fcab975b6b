"""What a config's training takes: its own dispatches, timed; and what a part of it takes, by leaving that part out."""

import contextlib
import dataclasses
import math
import pathlib
import re
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import jax
import optax
from jax.experimental.compilation_cache import compilation_cache
from ml_collections import ConfigDict

from vit_jax.analysis import traces
from vit_jax.config import default_config
from vit_jax.data import load
from vit_jax.data.resident import padded
from vit_jax.data.sources import PUBLIC
from vit_jax.data.splits import Splits
from vit_jax.data.stand_in import stand_in
from vit_jax.errors import RunError
from vit_jax.training import mesh as meshes
from vit_jax.training import rows, setup
from vit_jax.training.checkpoint import Checkpoints
from vit_jax.training.dispatch import Dispatcher, featured, program_bytes
from vit_jax.training.setup import Job
from vit_jax.training.step import Augmentation, Probe, Task, init_state

PROFILED_STEPS = 10  # at most: enough to see a kernel's mean


@dataclasses.dataclass(frozen=True)
class Subject:
    """A config made ready to train, as `main` does it.

    Attributes:
      fabricated: whether its pictures are noise of the right shape, for the data set is not here.
      data_seconds: what reading its pictures took.
    """

    job: Job
    splits: Splits
    fabricated: bool
    data_seconds: float


@dataclasses.dataclass(frozen=True)
class Pace:
    """How a config is timed: in `windows` stretches of at least `seconds` each."""

    windows: int
    seconds: float


def bare(config: ConfigDict) -> ConfigDict:
    """A copy of the config without augmentation, dropout and averaged weights."""
    config, default = config.copy_and_resolve_references(), default_config()
    config.augment, config.ema.decay = default.augment, 0.0
    config.model.update({"dropout": 0.0, "attention_dropout": 0.0, "drop_path": 0.0})
    return config


def opened(config: ConfigDict) -> Subject:
    """A config made ready to train on whole pictures. Weights of init.checkpoint are not read: they cost the same.

    Raises:
      UserError: the config or its data is wrong.
    """
    meshes.enable_compilation_cache()
    config = setup.resolve_model(config)
    config.augment.update({"small_size": 0, "small_until": default_config().augment.small_until})
    mesh = meshes.make_mesh(config.mesh.data, config.mesh.model)
    started = time.perf_counter()
    splits, fabricated = _pictures(config)
    seconds = time.perf_counter() - started
    job = setup.make_job(setup.resolve_data(config, splits.train, mesh), splits.train, mesh)
    if isinstance(job.classifier, Probe):
        params, size = init_state(job.task).params, setup.evaluation_size(job.config)
        train, watched = (featured(job.classifier, params, split, size) for split in (splits.train, splits.watched))
        splits = Splits(train, None, watched)
    return Subject(job, splits, fabricated, seconds)


def _pictures(config: ConfigDict) -> tuple[Splits, bool]:
    """The config's pictures, and whether they are fabricated: where they would have to be downloaded."""
    data = config.data
    if data.name not in PUBLIC or load.is_cached(data.name, data.dir):
        return setup.load_data(config), False
    return stand_in(data.name, data.train_examples, data.holdout), True


class Training:
    """A run's dispatches from new weights on, one after the other as in the loop, without its evaluations.

    Attributes:
      seconds: what came before the first step was done: placing (of the pictures), init, compile, step.
      steps_per_call: as the config says, or as `main` would choose it.
    """

    def __init__(self, subject: Subject, task: Task | None = None, steps_per_call: int = 1):
        task, config, train = task or subject.job.task, subject.job.config, subject.splits.train
        started = time.perf_counter()
        self.state = jax.block_until_ready(init_state(task))
        made = time.perf_counter()
        placement = setup.placement(config, train, subject.job.classifier.mesh)
        self.dispatch = Dispatcher(task, self.state, train, config.train.batch_size, placement)
        placed, compiling = time.perf_counter() - made, self.dispatch.compile_seconds
        self.seconds = {"placing": placed - compiling, "init": made - started, "compile": compiling}
        self.step, self.steps_per_call = 0, 1
        self.seconds["step"] = self(1)
        self.steps_per_call = steps_per_call

    def choose(self, steps_per_call: int) -> None:
        self.steps_per_call = steps_per_call or self.dispatch.choose_steps_per_call(self.state, self.step)

    def __call__(self, steps: int) -> float:
        """The seconds of as many steps.

        Raises:
          RunError: the loss or its gradient was not finite: steps that are not made have no speed.
        """
        started, end = time.perf_counter(), self.step + steps
        before = None
        while self.step < end:
            stop = min(self.step + self.steps_per_call, end)
            self.state, done = self.dispatch(self.state, self.step, stop)
            jax.device_get(before)  # a dispatch late, as in the loop
            self.step, before = stop, done
        found = jax.device_get(before)
        seconds = time.perf_counter() - started
        if found["step"] != self.step or found["skipped"]:
            raise RunError(f"the loss or its gradient is not finite at step {found['step']}: lower optim.learning_rate")
        return seconds


# A row of numbers


def measure(subject: Subject, pace: Pace, import_seconds: float | None = None) -> tuple[dict[str, Any], Training]:
    """The row of a config's speed and start, and the training that it was measured on.

    Its `parts` are None: `parts` measures them.
    """
    cold, training = started(subject)
    training.choose(subject.job.config.train.steps_per_call)
    steps = steps_per_window(training, pace.seconds)
    seconds = [training(steps) for _ in range(pace.windows)]
    row = rates(subject, [steps / s for s in seconds])
    memory, source = peak_memory(training.dispatch)
    before = {"import": import_seconds or 0.0, "data": subject.data_seconds}
    startup = {
        name: (parts := before | found) | {"total": sum(parts.values())}
        for name, found in (("cold", cold), ("warm", training.seconds))
    }
    mesh, train = subject.job.classifier.mesh, subject.splits.train
    return row | {
        "steps_per_call": training.steps_per_call,
        "steps_per_window": steps,
        "parameters": sum(x.size for x in jax.tree.leaves(training.state.params)),
        "compile_seconds": cold["compile"],
        "compile_seconds_warm": training.seconds["compile"],
        "startup_seconds": startup,
        "peak_memory_bytes": memory,
        "peak_memory_source": source,
        "peak_host_memory_bytes": peak_host_memory(),
        "parts": None,
        "placement": setup.placement(subject.job.config, train, mesh),
        "fabricated": subject.fabricated,
        "devices": mesh.size,
    } | rows.about(), training


def rates(subject: Subject, steps_per_second: list[float]) -> dict[str, Any]:
    """A row's speed: the median over windows, and how far the slowest and the fastest lie apart, as a part of it."""
    middle, batch_size = statistics.median(steps_per_second), subject.job.config.train.batch_size
    device = jax.devices()[0].device_kind
    speed = middle * batch_size
    return {
        "images_per_second": speed,
        "milliseconds_per_step": 1e3 / middle,
        "spread": (max(steps_per_second) - min(steps_per_second)) / middle,
        "windows": len(steps_per_second),
        "mfu": subject.job.mfu(speed),
        "flops_per_image": subject.job.flops,
        "batch_size": batch_size,
        "image_size": subject.job.classifier.image_size,
        "dtype": subject.job.config.train.dtype,
        "device": device,
    }


def started(subject: Subject) -> tuple[dict[str, float], Training]:
    """What starting takes with nothing compiled before; and a training started after that, from the compiled."""
    with _empty_cache():
        jax.clear_caches()
        cold = Training(subject).seconds
        jax.clear_caches()
        return cold, Training(subject)


@contextlib.contextmanager
def _empty_cache() -> Iterator[None]:
    """A compilation cache of its own, which begins empty."""
    usual = jax.config.values["jax_compilation_cache_dir"]
    with tempfile.TemporaryDirectory() as folder:
        _cache_in(folder)
        try:
            yield
        finally:
            _cache_in(usual)


def _cache_in(folder: str | None) -> None:
    jax.config.update("jax_compilation_cache_dir", folder)
    compilation_cache.reset_cache()  # or jax goes on with the one before


def steps_per_window(training: Training, seconds: float) -> int:
    """Whole dispatches that take at least about as long."""
    calls = max(math.ceil(seconds / training(training.steps_per_call)), 1)
    return calls * training.steps_per_call


def peak_memory(dispatch: Dispatcher) -> tuple[int, str]:
    """Bytes a device had in use at most in this process, "device"; where it does not say, "compiler": the program's."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"], "device"
    return program_bytes(next(iter(dispatch.programs.values()))), "compiler"


def peak_host_memory() -> int:
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most  # kibibytes everywhere else


# Parts of the time


def parts(subject: Subject, training: Training, steps: int, pace: Pace) -> dict[str, float]:
    """What parts take, each by leaving it out: augmentation and optimizer of a step, the others of the whole run.

    Windows with everything and windows without a part take turns, for a machine's speed drifts. Also the seconds of
    an evaluation (of raw and averaged weights) and of a checkpoint, and which part of the former the bare forward pass
    takes.
    """
    task = subject.job.task
    # The subtraction stays: weights that never change would be moved out of the loop, with all that is made of them.
    plain = dataclasses.replace(task, optimizer=optax.sgd(0.0), ema_decay=0.0)
    still = dataclasses.replace(task, augmentation=Augmentation())
    without = [Training(subject, less, training.steps_per_call) for less in (still, plain)]
    turns = [[run(steps) for run in (training, *without)] for _ in range(pace.windows)]
    whole, *less = (statistics.median(times) for times in zip(*turns, strict=True))
    del without
    one, forward = evaluation_seconds(subject, training, pace)
    evaluation = (1 + bool(task.ema_decay)) * one
    checkpoint = checkpoint_seconds(training, steps, whole, pace)
    plan = subject.job.plan
    train = plan.total * whole / steps
    evaluations, checkpoints = len(plan.evaluations) * evaluation, len(plan.checkpoints) * checkpoint
    total = train + evaluations + checkpoints
    return {
        "augmentation": 1 - less[0] / whole,
        "optimizer_and_ema": 1 - less[1] / whole,
        "evaluation": evaluations / total,
        "checkpointing": checkpoints / total,
        "evaluation_seconds": evaluation,
        "evaluation_of_forward": forward / one,
        "checkpoint_seconds": checkpoint,
    }


def evaluation_seconds(subject: Subject, training: Training, pace: Pace) -> tuple[float, float]:
    """Of one set of weights on the split that the run watches; and of the bare forward pass over as many pictures."""
    job, params, split = subject.job, training.state.params, subject.splits.watched
    evaluate, size = setup.make_evaluator(job.config, job.classifier, split), setup.evaluation_size(job.config)
    logits, count = jax.jit(job.classifier.logits), -(-len(split.labels) // size)
    pictures = jax.device_put(padded(split.images[:size], split.labels[:size], size)[0])

    def forward(params):
        for _ in range(count):
            found = logits(params, pictures)
        return jax.block_until_ready(found)

    times = []
    for _ in range(pace.windows + 1):
        begun = time.perf_counter()
        evaluate(params)
        between = time.perf_counter()
        forward(params)
        times.append((between - begun, time.perf_counter() - between))
    one, bare = (statistics.median(values) for values in zip(*times[1:], strict=True))  # the first ones compile
    return one, bare


def checkpoint_seconds(training: Training, steps: int, without: float, pace: Pace) -> float:
    """What a window takes longer with a checkpoint that is written meanwhile, and waited for at its end."""
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = Checkpoints(pathlib.Path(folder))
        times = []
        for _ in range(pace.windows + 1):
            begun = time.perf_counter()
            checkpoints.save(training.state, None, 0.0)
            training(steps)
            checkpoints.finish_writing()
            times.append(time.perf_counter() - begun)
        checkpoints.close()
    return statistics.median(times[1:]) - without  # the first one prepares


def profile(training: Training, folder: pathlib.Path) -> list[dict[str, Any]]:
    """Leaves a trace of a dispatch in a folder; gives its ten costliest kernels, and `where` in the code they are.

    See `traces.costliest`; seconds and calls are those of one step.
    """
    folder.mkdir(parents=True, exist_ok=True)
    steps = min(training.steps_per_call, PROFILED_STEPS)
    with jax.profiler.trace(str(folder)):
        training(steps)
    program = next(iter(training.dispatch.programs.values())).as_text() or ""
    of = dict(re.findall(r'^\s*(?:ROOT )?%?([\w.-]+) = .*op_name="([^"]*)"', program, re.MULTILINE))
    kernels = traces.costliest(traces.newest_trace(folder))
    for kernel in kernels:
        kernel["seconds"], kernel["calls"] = kernel["seconds"] / steps, kernel["calls"] / steps
        kernel["where"] = of.get(kernel["name"].partition(" ")[0], "").rpartition("train_steps)/")[2]
    return kernels

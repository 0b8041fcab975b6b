"""The training loop: restore, dispatch, evaluate, write, save. Reads top to bottom."""

import contextlib
import dataclasses
import math
import os
import pathlib
import shlex
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from clu import parameter_overview
from ml_collections import ConfigDict

from vit_jax.analysis.metrics import summarize
from vit_jax.config import to_dict
from vit_jax.data.splits import Split, Splits
from vit_jax.errors import RunError, Stopped, UserError, out_of_memory
from vit_jax.training import drawings, processes, reporting, runs, setup, starting
from vit_jax.training import mesh as meshes
from vit_jax.training.checkpoint import Checkpoints
from vit_jax.training.dispatch import Dispatcher, featured
from vit_jax.training.lock import Lock, holder
from vit_jax.training.rules import EVERYTHING, rule_table
from vit_jax.training.setup import Job
from vit_jax.training.signals import Signals, caught
from vit_jax.training.step import (
    Probe,
    Task,
    TrainState,
    abstract_state,
    all_finite,
    copy,
    init_state,
    zero_sums,
)
from vit_jax.training.trackers import Tracking
from vit_jax.training.writers import Clock, Metrics, Progress, Row, best_row, score, write_json


@dataclasses.dataclass(frozen=True)
class Run:
    """The parts of a run that stay the same while its state goes from step to step."""

    job: Job
    workdir: pathlib.Path
    splits: Splits
    dispatch: Dispatcher
    evaluate: Callable[[Any], dict[str, np.ndarray]]
    checkpoints: Checkpoints
    metrics: Metrics
    tracking: Tracking
    lock: Lock | None
    signals: Signals

    def epochs(self, steps: int) -> float:
        return steps * self.job.config.train.batch_size / len(self.splits.train.labels)

    @property
    def selects(self) -> bool:
        """Whether pictures were held out to choose on."""
        return self.splits.validation is not None


def train(config: ConfigDict, workdir: pathlib.Path, command: str = "") -> dict[str, Any]:
    """Trains what the config says in `workdir`, or goes on with it; returns what summary.json holds.

    `command` is what was typed, which config.json keeps.

    Raises:
      UserError: the config, the data or the workdir is wrong, or another process trains there; nothing was written.
      RunError: the loss or its gradient is not finite, or a device has too little memory.
      Stopped: a signal came; the run was saved.
    """
    with caught(processes.end_all) as signals, contextlib.ExitStack() as stack, _sizes_named(config):
        return _train(config, workdir, command, signals, stack)


def _train(
    config: ConfigDict, workdir: pathlib.Path, command: str, signals: Signals, stack: contextlib.ExitStack
) -> dict[str, Any]:
    """`train`; what is opened for all of it is closed by `stack`."""
    processes.see_same("workdir", lambda: runs.contents(workdir))
    config = runs.same_run(setup.resolve_model(config), workdir)
    processes.check_same("config", to_dict(config))
    if (summary := runs.read_summary(workdir)) is not None:
        print(f"the run in {workdir} is finished: nothing to do")
        return summary
    meshes.enable_compilation_cache()
    new = not runs.has_checkpoints(workdir)
    job, splits = _prepared(config, workdir, new)
    config = job.config
    notes, initial = list(job.notes), None
    if config.init.checkpoint and new:
        initial, origin = starting.weights(config, job.classifier, splits.train.class_names)
        notes += origin

    lock = stack.enter_context(contextlib.closing(Lock(workdir))) if processes.is_first() else None
    processes.wait("lock")
    processes.see_same("workdir", lambda: [holder(workdir), runs.contents(workdir)])
    if runs.has_checkpoints(workdir) == new or runs.read_summary(workdir):
        raise RunError(f"another process trained in {workdir} meanwhile: run the same command again")
    checkpoints = stack.enter_context(contextlib.closing(Checkpoints(workdir, config.checkpoint.keep)))
    tracking = stack.enter_context(contextlib.closing(Tracking(workdir, config)))
    notes += tracking.notes
    state, seconds = _new_state(job.task, initial) if new else checkpoints.restore_newest(abstract_state(job.task))
    _check_allowed(config, int(state.skipped))
    begin = "from new weights" if initial is None else "from these weights"
    notes.append(f"going on from step {state.step}" if state.step else begin)
    _announce(job, splits, workdir, state.params, notes)
    if isinstance(job.classifier, Probe):
        splits = _featured(splits, job.classifier, state.params, setup.evaluation_size(config))

    placement = setup.placement(config, splits.train, job.classifier.mesh)
    dispatch = Dispatcher(job.task, state, splits.train, config.train.batch_size, placement)
    if not config.train.steps_per_call:
        config.train.steps_per_call = dispatch.choose_steps_per_call(state, int(state.step))
    if processes.is_first():
        runs.write_config(workdir, config, splits.train.class_names, command)
    print(f"compiled in {dispatch.compile_seconds:.1f} s; {config.train.steps_per_call} steps a dispatch", flush=True)

    evaluate = setup.make_evaluator(config, job.classifier, splits.watched)
    metrics = stack.enter_context(contextlib.closing(Metrics(workdir, int(state.step), writes=processes.is_first())))
    if lost := job.plan.evaluations_until(int(state.step)) - {row["step"] for row in metrics.rows}:
        raise UserError(f"{metrics.path} has lost the row of step {min(lost)}: restore it, or give another --workdir")
    run = Run(job, workdir, splits, dispatch, evaluate, checkpoints, metrics, tracking, lock, signals)
    for row in metrics.rows:
        tracking.add(row)
    with signals.saving():
        try:
            state, seconds = _run_steps(run, state, seconds)
        finally:
            checkpoints.finish_writing()
    return _summarize(run, state, seconds)


def _run_steps(run: Run, state: TrainState, seconds: float) -> tuple[TrainState, float]:
    """From the state's step, reached in `seconds`, to the end of the run; gives the last state and its seconds."""
    config, plan, metrics = run.job.config, run.job.plan, run.metrics
    step, batch_size = int(state.step), config.train.batch_size
    done = jax.device_get(state.progress)  # the state itself is given away
    clock = Clock(seconds)
    vote = processes.Vote()
    file = None if processes.is_first() else open(os.devnull, "w")
    bar = Progress(step, plan.total, batch_size, file)
    with file or contextlib.nullcontext(), contextlib.closing(bar):
        while step < plan.total and not metrics.patience_is_over(config.train.patience):
            stop = plan.next_stop(step, config.train.steps_per_call)
            clock.count(stop - step)
            before, (state, done) = done, run.dispatch(state, step, stop)
            step = stop
            stopping = vote(run.signals.stop())  # in all processes at the same step
            pause = stopping or step in plan.evaluations or step in plan.checkpoints
            # Without a pause, look at the dispatch before: to wait for this one would idle the device.
            seen = jax.device_get(done if pause else before)
            _check_unfrozen(run.job, seen)
            bar.update(step, _mean_loss(seen["sums"]))
            if not pause:
                continue

            clock.stop()
            if run.lock is not None:
                run.lock.check()
            evaluated = step in plan.evaluations
            if evaluated:
                row = _row(run, seen) | clock.rate(batch_size) | _validate(run, state)
                metrics.add(row)
                run.tracking.add(row)
                bar.say(_describe(row, plan.total))
                state = dataclasses.replace(state, sums=meshes.place(zero_sums(), run.job.classifier.mesh))
                done = jax.device_get(state.progress)
            best = run.selects and evaluated and best_row(metrics.rows)["step"] == step
            if stopping or best or step in plan.checkpoints:
                _check_weights(run.job, state)
                run.checkpoints.save(state, score(row) if run.selects and evaluated else None, clock.seconds)
            if stopping and step < plan.total:
                if metrics.rows and processes.is_first():
                    drawings.curves(drawings.Subject(run.workdir))
                raise Stopped(f"saved step {step} of {plan.total} in {run.workdir}; the same command goes on")
            clock.start()
        _check_weights(run.job, state)
        run.checkpoints.save(state, None, clock.seconds)  # where patience ended the run before its last step
    return state, clock.seconds


# What a run begins with


def _prepared(config: ConfigDict, workdir: pathlib.Path, new: bool) -> tuple[Job, Splits]:
    """A run's job and pictures; what the config leaves automatic is filled in, or as the run has it already."""
    mesh = meshes.make_mesh(config.mesh.data, config.mesh.model)
    if new:
        with processes.first_goes_first("weights"):  # of a URL it fetches them
            config = starting.resolve(config)
    with processes.first_goes_first("data"):
        splits = setup.load_data(config)
    config = runs.same_run(setup.resolve_data(config, splits.train, mesh), workdir)
    processes.check_same("data set", [to_dict(config)["data"], splits.train.labels.tolist()])
    return setup.make_job(config, splits.train, mesh), splits


def _announce(job: Job, splits: Splits, workdir: pathlib.Path, params: Any, notes: list[str]) -> None:
    """Prints what will be trained, on what, where; and what a person should be told."""
    print(parameter_overview.get_parameter_overview(params, include_stats=False))
    if job.rules != EVERYTHING:
        print(rule_table(job.rules, params))
    steps, batch = job.plan.total, job.config.train.batch_size
    print(f"{steps} steps of {batch} in {workdir}; {setup.protocol(job.config, splits)}")
    print("\n".join(notes), flush=True)


def _new_state(task: Task, initial: dict[str, jax.Array] | None) -> tuple[TrainState, float]:
    """The state before the first step, with `initial` weights if given."""
    state = init_state(task)
    if initial is not None:
        params = starting.placed(state.params, initial)
        state = dataclasses.replace(state, params=params, ema=copy(params) if task.ema_decay else None)
    return state, 0.0


def _featured(splits: Splits, probe: Probe, params: Any, batch_size: int) -> Splits:
    """The splits with the trunk's features for pictures."""

    def one(split: Split | None) -> Split | None:
        return None if split is None else featured(probe, params, split, batch_size)

    return Splits(featured(probe, params, splits.train, batch_size), one(splits.validation), one(splits.test))


# A row of metrics.csv


def _mean_loss(sums: Mapping[str, Any]) -> float | None:
    """The mean training loss since the last evaluation; None where no update was made."""
    examples = float(sums["examples"])
    return float(sums["loss"]) / examples if examples else None


def _check_allowed(config: ConfigDict, skipped: int) -> None:
    """Raises UserError where a run that goes on has skipped more updates than its config allows by now."""
    if skipped > config.train.skip_nonfinite:
        raise UserError(
            f"train.skip_nonfinite={config.train.skip_nonfinite}, but the run skipped {skipped} updates "
            "so far: give at least that many"
        )


def _check_unfrozen(job: Job, done: Mapping[str, Any]) -> None:
    """Raises RunError where a dispatch met a step that may not be skipped."""
    if done["skipped"] > job.config.train.skip_nonfinite:
        raise _diverged(job, "loss or its gradient is", done)


def _check_weights(job: Job, state: TrainState) -> None:
    """Raises RunError where finite gradients broke the weights: the loss shows that a step later."""
    if not all_finite(state.params):
        raise _diverged(job, "weights are", jax.device_get(state.progress))


def _diverged(job: Job, what: str, done: Mapping[str, Any]) -> RunError:
    rate = _rate(job, int(done["step"]), job.config.train.skip_nonfinite)
    return RunError(
        f"the {what} not finite at step {done['step']} (learning rate {rate:.3g}, gradient norm {done['norm']:.3g}); "
        "checkpoints before it are kept; lower optim.learning_rate or set optim.clip_norm in a new --workdir, or "
        "leave out up to N such updates with train.skip_nonfinite=N"
    )


def _rate(job: Job, step: int, skipped: int) -> float:
    """The learning rate of `step`: the optimizer does not count the steps that were skipped."""
    return float(job.schedule(max(step - skipped, 0)))


@contextlib.contextmanager
def _sizes_named(config: ConfigDict) -> Iterator[None]:
    """Says what memory was asked for where there is too little."""
    try:
        yield
    except Exception as error:
        if not out_of_memory(error):
            raise
        train, accumulate, remat = config.train, config.optim.accumulate, config.model.remat
        at_once = (
            f"{train.batch_size // accumulate} pictures at once" if accumulate else f"batches of {train.batch_size}"
        )
        parts = accumulate or "automatic"
        ways = [f"lower train.batch_size (now {train.batch_size})", f"raise optim.accumulate (now {parts})"]
        ways += [] if remat else ["set model.remat=True"]
        ways += [] if train.dtype == "bfloat16" else ["set train.dtype=bfloat16"]
        raise RunError(f"out of memory with {at_once}: {', or '.join(ways)}") from error


def _row(run: Run, done: Mapping[str, Any]) -> Row:
    step, sums = int(done["step"]), {name: float(value) for name, value in done["sums"].items()}
    accuracy = sums["correct"] / sums["examples"] if sums["examples"] else math.nan
    return {
        "step": step,
        "epoch": run.epochs(step),
        "learning_rate": _rate(run.job, step - 1, int(done["skipped"])),
        "train_loss": _mean_loss(sums),
        "train_accuracy": None if math.isnan(accuracy) else accuracy,
    }


def _validate(run: Run, state: TrainState) -> Row:
    raw = summarize(run.evaluate(state.params))
    ema = None if state.ema is None else summarize(run.evaluate(state.ema))["accuracy"]
    return {
        "val_loss": raw["loss"],
        "val_accuracy": raw["accuracy"],
        "val_accuracy_top5": raw["accuracy_top5"],
        "ema_val_accuracy": ema,
    }


def _describe(row: Row, total: int) -> str:
    raw = "" if row["ema_val_accuracy"] is None else f" (raw {row['val_accuracy']:.2%})"
    train = "mixed" if row["train_accuracy"] is None else f"{row['train_accuracy']:.2%}"
    loss = "none" if row["train_loss"] is None else f"{row['train_loss']:.4f}"
    return (
        f"step {row['step']}/{total}  epoch {row['epoch']:.2f}  loss {loss}  "
        f"train {train}  val {score(row):.2%}{raw}  {row['images_per_second']:.0f} images/s"
    )


# The end


def _summarize(run: Run, state: TrainState, seconds: float) -> dict[str, Any]:
    """Measures the last weights on test, writes report.html with its drawings, tells the trackers, and at last writes
    summary.json, which says that the run is finished.
    """
    evaluate = run.evaluate
    if run.splits.reported is not run.splits.watched:
        evaluate = setup.make_evaluator(run.job.config, run.job.classifier, run.splits.reported)
    results = evaluate(state.params if state.ema is None else state.ema)
    test = summarize(results)
    best = best_row(run.metrics.rows) if run.selects else None
    speed = statistics.median(row["images_per_second"] for row in run.metrics.rows)
    if run.job.plan.small:  # neither size's own speed says how long the run takes
        speed = int(state.step) * run.job.config.train.batch_size / max(seconds, 1e-9)
    summary = {
        "test_accuracy": test["accuracy"],
        "test_accuracy_top5": test["accuracy_top5"],
        "test_loss": test["loss"],
        "best_val_accuracy": best and score(best),
        "best_step": best and int(best["step"]),
        "parameters": sum(x.size for x in jax.tree.leaves(state.params)),
        "epochs": run.epochs(int(state.step)),
        "steps": int(state.step),
        "skipped_updates": int(state.skipped),
        "train_seconds": seconds,
        "compile_seconds": run.dispatch.compile_seconds,
        "images_per_second": speed,
        "mfu": None if run.job.plan.small else run.job.mfu(speed),  # the formula is for whole pictures
        "device": jax.devices()[0].device_kind,
        "protocol": setup.protocol(run.job.config, run.splits),
    }
    if processes.is_first():
        _report(run.workdir, results, summary)
        run.tracking.finish(summary)
        write_json(run.workdir / "summary.json", summary)
    return summary


def _report(workdir: pathlib.Path, results: Mapping[str, np.ndarray], summary: Mapping[str, Any]) -> None:
    """Writes report.html and draws the curves. By now the run is done, and no fault in drawing it may lose it."""
    try:
        reporting.write(workdir, results, summary)
    except Exception as error:
        again = f"python -m vit_jax.report --workdir {shlex.quote(str(workdir))}"
        print(f"warning: no report.html ({error}); {again} tries again", file=sys.stderr)

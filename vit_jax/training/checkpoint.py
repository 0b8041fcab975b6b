"""Checkpoints: orbax's CheckpointManager, a folder a step with params, ema, optimizer and progress in it."""

import hashlib
import itertools
import json
import logging
import pathlib
import sys
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import absl.logging
import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import traverse_util
from orbax.checkpoint.checkpoint_managers import preservation_policy as keep_policy

from vit_jax import errors
from vit_jax.errors import RunError, UserError
from vit_jax.training import processes
from vit_jax.training.step import TrainState
from vit_jax.training.writers import write_json

ITEMS = ("params", "ema", "optimizer", "progress")
METRICS = {"score", "step", "seconds"}
CHECKSUMS = "checksums.json"
Read = TypeVar("Read")


class Damaged(UserError):
    """A checkpoint is not as it was written."""


class Checkpoints:
    """The checkpoints of one workdir. Writing is atomic and in the background; `close` waits for it.

    All processes of a run write together and restore the same step, of which the first one says that it is whole; each
    reads by itself where it is `read_only`.

    A checkpoint may carry a score (the held-out accuracy); the latest `keep` ones and the best one are kept. Each holds
    the checksums of its files, for the library does not notice every damaged file.
    """

    def __init__(self, workdir: pathlib.Path, keep: int = 2, read_only: bool = False):
        absl.logging.set_verbosity(absl.logging.FATAL)  # orbax warns of ordinary doings, and prints what it raises
        self.folder = workdir / "checkpoints"
        self._writes = not read_only and processes.is_first()  # what is beside orbax's own
        self._read_only = read_only
        alone = jax.process_index()
        together = ocp.options.MultiprocessingOptions()
        if read_only:
            together = ocp.options.MultiprocessingOptions(alone, {alone}, barrier_sync_key_prefix=f"reader{alone}")
        # Without metrics is what is left of a checkpoint whose deletion was killed.
        best = keep_policy.BestN(get_metric_fn=_rank, n=1, keep_checkpoints_without_metrics=False)
        policy = keep_policy.AnyPreservationPolicy(policies=[keep_policy.LatestN(n=keep), best])
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policy,
            best_fn=_rank,  # without it orbax does not write the metrics
            cleanup_tmp_directories=not read_only,
            create=not read_only,
            read_only=read_only,
            async_options=ocp.AsyncOptions(post_finalization_callback=self._sum_up_before_commit),
            multiprocessing_options=together,
        )
        handlers = {name: ocp.StandardCheckpointHandler() for name in ITEMS}
        self._manager = _Manager(self.folder.absolute(), options=options, item_handlers=handlers)
        self._told = sys.unraisablehook
        if not read_only:
            sys.unraisablehook = _without_echoes
        self._verified: set[int] = set()
        self._summed_up: set[int] = set()

    def steps(self) -> list[int]:
        return sorted(self._manager.all_steps())

    def newest_whole(self) -> int:
        """The newest step whose files are as they were written; damaged ones after it are named on stderr.

        Raises:
          UserError: there is none.
        """
        step, _, damaged = self._newest(self.check)
        for error in damaged.values():
            print(f"warning: {error}; using step {step}", file=sys.stderr)
        return step

    def restore_newest(self, like: TrainState) -> tuple[TrainState, float]:
        """The state of the newest whole checkpoint, like `restore`, and what training took up to it.

        Damaged ones after it are named on stderr and moved aside: their steps come again.

        Raises:
          UserError: there is none (and nothing was moved), or it does not fit.
        """
        step, state, damaged = self._newest(lambda step: self.restore(step, like))
        for bad, error in damaged.items():
            if self._writes:
                aside = _free(self.folder / f"{bad}.damaged")
                (self.folder / str(bad)).rename(aside)
                print(f"warning: {error}; moved to {aside.name}, going on from step {step}", file=sys.stderr)
        if damaged:
            processes.wait("damaged")
            self._manager.reload()
        return state, self.seconds(step)

    def _newest(self, read: Callable[[int], Read]) -> tuple[int, Read, dict[int, Damaged]]:
        """The newest step that can be read, what that gave, and the damaged ones after it."""
        damaged: dict[int, Damaged] = {}
        for step in reversed(self.steps()):
            try:
                return step, read(step), damaged
            except Damaged as error:
                damaged[step] = error
        reasons = "; ".join(map(str, damaged.values())) or "none was finished"
        raise UserError(
            f"no whole checkpoint in {self.folder} ({reasons}): move that folder away to begin again, or give another "
            "--workdir"
        )

    def seconds(self, step: int) -> float:
        """What training took up to `step`."""
        return (self._manager.metrics(step) or {}).get("seconds", 0.0)

    def best_step(self) -> int | None:
        """The step with the highest score, the first of equals; None where no checkpoint has one.

        Raises:
          UserError: a score cannot be read.
        """
        for step in self.steps():
            if self._manager.metrics(step) is None and (self.folder / str(step) / "metrics" / "metrics").exists():
                self.check(step)
        metrics = [found for step in self.steps() if (found := self._manager.metrics(step))]
        scored = [m for m in metrics if m["score"] is not None]
        return max(scored, key=_rank)["step"] if scored else None

    def save(self, state: TrainState, score: float | None, seconds: float) -> None:
        """Starts writing `state` under its step; a step that is there already stays as it is.

        `seconds` is what training took so far; being a measurement, it is kept beside the state and not in it.
        """
        step = int(state.step)
        if step in self._manager.all_steps():
            return
        self.finish_writing()
        metrics = {"score": score, "step": step, "seconds": seconds}
        items = {name: ocp.args.StandardSave(tree) for name, tree in _items(state).items()}
        self._manager.save(step, args=ocp.args.Composite(**items), metrics=metrics)

    def restore(self, step: int, like: TrainState) -> TrainState:
        """The state of `step`, with the shapes and shardings of `like`, a state of arrays or of their shapes.

        Raises:
          UserError: it cannot be read.
        """
        items = self._restore(step, _items(like))
        return TrainState(
            params=items["params"], ema=items.get("ema"), optimizer=items["optimizer"], **items["progress"]
        )

    def restore_weights(self, step: int, name: str, like: Any) -> Any:
        """The tree "params" or "ema" of `step` alone, with the names and shapes of `like`.

        Raises:
          UserError: it cannot be read, or has other names or shapes; they are listed.
        """
        saved = self.shapes(step, name)
        expected = _shapes(like)
        wrong = [f"{key} is not in the checkpoint" for key in expected if key not in saved]
        wrong += [f"{key} is only in the checkpoint" for key in saved if key not in expected]
        wrong += [
            f"{key} has shape {saved[key]} there and {shape} here"
            for key, shape in expected.items()
            if key in saved and saved[key] != shape
        ]
        if wrong:
            raise UserError(f"the weights in {self.folder / str(step)} do not fit this model: {'; '.join(wrong)}")
        return self._restore(step, {name: like})[name]

    def shapes(self, step: int, name: str) -> dict[str, tuple[int, ...]]:
        """Path → shape of the tree "params" or "ema" of `step`. Raises UserError where it cannot be read."""
        self.check(step)
        try:
            tree = self._manager.item_metadata(step)[name]
            return _shapes(getattr(tree, "tree", tree))
        except Exception as error:
            raise self._unreadable(step, error) from error

    def read_weights(self, step: int, name: str) -> dict[str, np.ndarray]:
        """The tree "params" or "ema" of `step` as it is there: path → array.

        Raises:
          UserError: it cannot be read.
        """
        here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        shapes = {
            tuple(path.split("/")): jax.ShapeDtypeStruct(shape, np.float32, sharding=here)
            for path, shape in self.shapes(step, name).items()
        }
        tree = self._restore(step, {name: traverse_util.unflatten_dict(shapes)})[name]
        return jax.device_get(traverse_util.flatten_dict(tree, sep="/"))

    def finish_writing(self) -> None:
        """Waits for what is being written. Raises what went wrong with it."""
        try:
            self._manager.wait_until_finished()
        except Exception:
            logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # it tells of each array that was not written
            raise
        if self._writes:
            for step in set(self.steps()) - self._summed_up:
                folder = self.folder / str(step)
                if folder.exists():  # it is not where writing failed
                    _sum_up(folder, _files(folder))
                    self._summed_up.add(step)

    def close(self) -> None:
        try:
            self.finish_writing()
        finally:
            self._manager.close()
        sys.unraisablehook = self._told  # not where writing failed: its echoes still come

    def _sum_up_before_commit(self) -> None:
        """Writes the checksums of what is being written, but for the few files that are still to come.

        In orbax's thread, once a checkpoint is complete and before it gets its name: there is none without checksums.
        """
        for folder in self.folder.glob("*.orbax-checkpoint-tmp*") if self._writes else ():
            _sum_up(folder, [path for path in _files(folder) if path.parent != folder])

    def check(self, step: int) -> None:
        """Raises Damaged where a file of `step` is not as it was written, RunError where that cannot be told now."""
        if step in self._verified:
            return
        folder = self.folder / str(step)
        try:
            name = _damaged(folder) if self._writes or self._read_only else ""
        except OSError as error:
            if errors.expected(error):
                raise
            raise RunError(
                f"checkpoint {folder} cannot be read now ({error}): run the same command again, or move it away"
            ) from error
        known, damaged = (x if self._read_only else processes.of_first(x) for x in (name is not None, bool(name)))
        if damaged:
            raise Damaged(f"checkpoint {folder} is damaged ({name or 'a file'} is not as it was written)")
        if known:
            self._verified.add(step)

    def _restore(self, step: int, like: dict[str, Any]) -> dict[str, Any]:
        self.check(step)
        items = {name: ocp.args.StandardRestore(jax.tree.map(_abstract, tree)) for name, tree in like.items()}
        try:
            return dict(self._manager.restore(step, args=ocp.args.Composite(**items)))
        except Exception as error:  # orbax and tensorstore raise many kinds for a damaged folder
            if errors.expected(error):
                raise
            raise self._unreadable(step, error) from error

    def _unreadable(self, step: int, error: Exception) -> UserError:
        reason = str(error).strip().split("\n")[0][:200]
        message = f"checkpoint {self.folder / str(step)} cannot be read ({type(error).__name__}: {reason})"
        known = step in self._verified
        if not known and (self._read_only or jax.process_count() == 1):  # else others may have read it
            return Damaged(message)
        files = "its files are as they were written" if known else "it has no checksums"
        return UserError(f"{message}: {files}, so perhaps by another version: give another --workdir")


def _without_echoes(unraisable: Any) -> None:
    """Says what was raised where nothing catches it, but for what tensorstore's threads add to a write that failed."""
    if "Event loop is closed" not in str(unraisable.exc_value):
        sys.__unraisablehook__(unraisable)


class _Manager(ocp.CheckpointManager):
    """One that opens a folder in which a checkpoint's metrics are damaged."""

    def metrics(self, step: int) -> dict[str, Any] | None:
        try:
            found = super().metrics(step)
        except ValueError:
            return None
        return found if isinstance(found, dict) and found.keys() == METRICS else None


def _files(folder: pathlib.Path) -> list[pathlib.Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != CHECKSUMS)


def _sums(folder: pathlib.Path) -> dict[str, str] | None:
    """File → checksum, empty where they are damaged; None where there are none."""
    try:
        found = json.loads((folder / CHECKSUMS).read_text())
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _damaged(folder: pathlib.Path) -> str | None:
    """The first file that is not as it was written, "" where all are; None where that is not known."""
    sums = _sums(folder)
    if sums is None:  # as of another version
        return None
    if not sums:
        return CHECKSUMS
    return next((name for name, value in sums.items() if _sha256(folder / name) != value), "")


def _sum_up(folder: pathlib.Path, files: Iterable[pathlib.Path]) -> None:
    """Adds those of the files to the checksums in `folder` that have none yet."""
    sums = _sums(folder)
    new = {name: _sha256(file) for file in files if (name := str(file.relative_to(folder))) not in (sums or {})}
    if new and sums != {}:
        write_json(folder / CHECKSUMS, (sums or {}) | new)


def _free(path: pathlib.Path) -> pathlib.Path:
    """The path, with a number more where there is something."""
    others = (path.with_name(f"{path.name}.{i}") for i in itertools.count(2))
    return next(p for p in itertools.chain([path], others) if not p.exists())


def _sha256(path: pathlib.Path) -> str:
    """Empty where there is no such file."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        return ""


def _rank(metrics: dict[str, Any]) -> tuple[float, int]:
    """Higher scores are better, and of equals the first; without scores the latest, which is kept anyway."""
    score, step = metrics["score"], metrics["step"]
    return (-1.0, step) if score is None else (score, -step)


def _items(state: TrainState) -> dict[str, Any]:
    items = {"params": state.params, "optimizer": state.optimizer, "progress": state.progress}
    return items | ({} if state.ema is None else {"ema": state.ema})


def _abstract(x: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {"/".join(str(getattr(k, "key", k)) for k in path): tuple(leaf.shape) for path, leaf in leaves}

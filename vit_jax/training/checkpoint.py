"""Checkpoints: orbax's CheckpointManager, a folder a step with params, ema, optimizer and progress in it."""

import hashlib
import json
import os
import pathlib
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from flax import traverse_util
from orbax.checkpoint.checkpoint_managers import preservation_policy as keep_policy

from vit_jax.errors import UserError
from vit_jax.training import processes
from vit_jax.training.step import TrainState
from vit_jax.training.writers import write_json

ITEMS = ("params", "ema", "optimizer", "progress")
CHECKSUMS = "checksums.json"


class Checkpoints:
    """The checkpoints of one workdir. Writing is atomic and in the background; `close` waits for it.

    All processes of a run write together, and each reads by itself where it is `read_only`.

    A checkpoint may carry a score (the held-out accuracy); the latest `keep` ones and the best one are kept. Each gets
    the checksums of its files once it is written, for the library does not notice every damaged file.
    """

    def __init__(self, workdir: pathlib.Path, keep: int = 2, read_only: bool = False):
        logging.set_verbosity(logging.ERROR)  # orbax warns of its ordinary doings
        self.folder = workdir / "checkpoints"
        self._writes = not read_only and processes.is_first()  # what is beside orbax's own
        alone = jax.process_index()
        together = ocp.options.MultiprocessingOptions()
        if read_only:
            together = ocp.options.MultiprocessingOptions(alone, {alone}, barrier_sync_key_prefix=f"reader{alone}")
        self._lock = _lock(self.folder) if self._writes else None
        best = keep_policy.BestN(get_metric_fn=_rank, n=1)
        policy = keep_policy.AnyPreservationPolicy(policies=[keep_policy.LatestN(n=keep), best])
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policy,
            best_fn=_rank,  # without it orbax does not write the metrics
            cleanup_tmp_directories=not read_only,
            create=not read_only,
            read_only=read_only,
            multiprocessing_options=together,
        )
        handlers = {name: ocp.StandardCheckpointHandler() for name in ITEMS}
        self._manager = ocp.CheckpointManager(self.folder.absolute(), options=options, item_handlers=handlers)

    def steps(self) -> list[int]:
        return sorted(self._manager.all_steps())

    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    def seconds(self, step: int) -> float:
        """What training took up to `step`."""
        return (self._manager.metrics(step) or {}).get("seconds", 0.0)

    def best_step(self) -> int | None:
        """The step with the highest score, the first of equals; None where no checkpoint has one."""
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
        progress = items["progress"]
        return TrainState(progress["step"], items["params"], items.get("ema"), items["optimizer"], progress["sums"])

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
        self._check_files(step)
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
        """Waits for what is being written."""
        self._manager.wait_until_finished()
        for step in self.steps():
            folder = self.folder / str(step)
            if self._writes and folder.exists() and not (folder / CHECKSUMS).exists():  # it is not where writing failed
                write_json(folder / CHECKSUMS, _checksums(folder))

    def close(self) -> None:
        self.finish_writing()
        self._manager.close()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _check_files(self, step: int) -> None:
        """Raises UserError where a file is not as it was written, unless its writer was killed before it said how."""
        folder = self.folder / str(step)
        try:
            expected = json.loads((folder / CHECKSUMS).read_text())
        except FileNotFoundError:
            return
        except ValueError as error:
            raise self._unreadable(step, error) from error
        found = _checksums(folder)
        damaged = [name for name in expected if found.get(name) != expected[name]]
        if damaged:
            raise self._unreadable(step, ValueError(f"{damaged[0]} is not as it was written"))

    def _restore(self, step: int, like: dict[str, Any]) -> dict[str, Any]:
        self._check_files(step)
        items = {name: ocp.args.StandardRestore(jax.tree.map(_abstract, tree)) for name, tree in like.items()}
        try:
            return dict(self._manager.restore(step, args=ocp.args.Composite(**items)))
        except Exception as error:  # orbax and tensorstore raise many kinds for a damaged folder
            raise self._unreadable(step, error) from error

    def _unreadable(self, step: int, error: Exception) -> UserError:
        reason = str(error).strip().split("\n")[0][:200]
        return UserError(
            f"checkpoint {self.folder / str(step)} cannot be read ({type(error).__name__}: {reason}); "
            "move that folder away to go on from the one before it, or start in another --workdir"
        )


def _checksums(folder: pathlib.Path) -> dict[str, str]:
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != CHECKSUMS)
    return {str(path.relative_to(folder)): _sha256(path) for path in files}


def _sha256(path: pathlib.Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _rank(metrics: dict[str, Any]) -> tuple[float, int]:
    """Higher scores are better, and of equals the first; without scores the latest, which is kept anyway."""
    score, step = metrics["score"], metrics["step"]
    return (-1.0, step) if score is None else (score, -step)


def _items(state: TrainState) -> dict[str, Any]:
    items = {
        "params": state.params,
        "optimizer": state.optimizer,
        "progress": {"step": state.step, "sums": state.sums},
    }
    return items | ({} if state.ema is None else {"ema": state.ema})


def _abstract(x: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {"/".join(str(getattr(k, "key", k)) for k in path): tuple(leaf.shape) for path, leaf in leaves}


def _lock(folder: pathlib.Path) -> int | None:
    """Keeps other processes from writing in `folder`, until the descriptor that it returns is closed.

    Raises:
      UserError: another process does so.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        import fcntl

        descriptor = os.open(folder, os.O_RDONLY)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise UserError(f"another process trains in {folder.parent}: wait for it, or give another --workdir") from None
    except (ImportError, OSError):  # a system or a network disk without locks
        return None
    return descriptor

"""A run's folder: its config.json, and the weights in it."""

import functools
import json
import os
import pathlib
import platform
from collections.abc import Callable
from typing import Any

import flax
import jax
import numpy as np
import optax
from ml_collections import ConfigDict

from vit_jax.config import AUTOMATIC, FIELDS, differences, from_dict, get, put, to_dict
from vit_jax.errors import UserError
from vit_jax.training import mesh as meshes
from vit_jax.training.checkpoint import Checkpoints, Damaged
from vit_jax.training.step import Classifier
from vit_jax.training.writers import write_json

# Filled in once, when a run begins, where they are left at their defaults; the data's own are found anew.
CHOSEN = tuple(path for path in AUTOMATIC if not path.startswith("data."))


def versions() -> dict[str, str]:
    """Of Python and of what computes."""
    return {"python": platform.python_version()} | {m.__name__: m.__version__ for m in (jax, flax, optax)}


def write_config(workdir: pathlib.Path, config: ConfigDict, class_names: tuple[str, ...], command: str) -> None:
    """Writes config.json; `command` is what was typed, where that is known."""
    about = {"class_names": list(class_names), "versions": versions(), "device": jax.devices()[0].device_kind}
    about |= {"command": command} if command else {}
    write_json(workdir / "config.json", to_dict(config) | about)


def read_config(workdir: pathlib.Path) -> tuple[ConfigDict, tuple[str, ...]]:
    """A run's resolved config and class names. Raises UserError where there is no run or its config is damaged."""
    path = workdir / "config.json"
    if not path.is_file():
        raise UserError(f"no run in {workdir}: it has no config.json")
    try:
        values = json.loads(path.read_text())
        return from_dict(values), tuple(values["class_names"])
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({type(error).__name__}: {error})") from error


def read_about(workdir: pathlib.Path) -> dict[str, Any]:
    """All that config.json says: config, class_names, versions, device, and command where known."""
    return json.loads((workdir / "config.json").read_text())


def name_of(workdir: pathlib.Path) -> str:
    """What a run is called: as its folder, also where that is given as . or .. ."""
    return pathlib.Path(os.path.abspath(workdir)).name


def has_checkpoints(workdir: pathlib.Path) -> bool:
    folder = workdir / "checkpoints"
    return folder.is_dir() and any(path.name.isdigit() for path in folder.iterdir())


def contents(workdir: pathlib.Path) -> list[Any]:
    """What a run that begins reads in its folder, as all of its processes must: config, newest step, if finished."""
    steps = [int(path.name) for path in workdir.glob("checkpoints/*") if path.name.isdigit()]
    config = [path.read_text(errors="replace") for path in workdir.glob("config.json")]
    return [config, max(steps, default=None), (workdir / "summary.json").exists()]


def read_summary(workdir: pathlib.Path) -> dict[str, Any] | None:
    """What a finished run reported; None where it is not finished."""
    path = workdir / "summary.json"
    if not path.exists():
        return None
    try:
        summary = json.loads(path.read_text())
        if not {"test_accuracy", "protocol"} <= dict(summary).keys():
            raise ValueError("it has no result")
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({error}): remove it, and the run measures its end again") from error
    return summary


def same_run(config: ConfigDict, workdir: pathlib.Path) -> ConfigDict:
    """The config to run in `workdir`: as given where it is new, else with what was chosen or read from weights there.

    Raises:
      UserError: another config has been run there; the fields that differ are named.
    """
    if workdir.exists() and not workdir.is_dir() or (workdir / "checkpoints").is_file():
        raise UserError(f"{workdir} is no run's folder: give another --workdir")
    if not (workdir / "config.json").exists():
        if has_checkpoints(workdir):
            raise UserError(f"{workdir} has checkpoints but no config.json: give another --workdir")
        return config
    stored, _ = read_config(workdir)
    config = config.copy_and_resolve_references()
    for path in CHOSEN + (("data.mean", "data.std") if config.init.checkpoint else ()):
        if has_checkpoints(workdir) and get(config, path) == FIELDS[path].default:
            put(config, path, get(stored, path))
    differing = differences(config, stored)
    if differing:
        fields = "; ".join(differing)
        raise UserError(f"{workdir} holds a run of another config; give another --workdir. They differ in: {fields}")
    return config


def load_weights(
    workdir: pathlib.Path, classifier: Classifier, checkpoint: str | int | None = None, weights: str | None = None
) -> tuple[Any, int, str]:
    """Weights that a run saved, for a classifier of the same names and shapes; their step; and "ema" or "raw".

    Args:
      checkpoint, weights: as for `trained.open_run`.

    Raises:
      UserError: there is no such run, checkpoint or average, or it does not fit.
    """
    config, _ = read_config(workdir)
    weights = weights or ("ema" if config.ema.decay else "raw")
    if weights not in ("ema", "raw"):
        raise UserError(f"no weights {weights!r}: there are ema and raw")
    if weights == "ema" and not config.ema.decay:
        raise UserError(f"the run in {workdir} keeps no average (ema.decay=0): use --weights raw")
    like = meshes.with_sharding(jax.eval_shape(lambda: classifier.init(0)), classifier.mesh)
    checkpoints = Checkpoints(workdir, read_only=True)
    step = _choose(checkpoints, "last" if checkpoint is None else str(checkpoint), workdir)
    params = checkpoints.restore_weights(step, "ema" if weights == "ema" else "params", like)
    checkpoints.close()
    return params, step, weights


def last_weights(workdir: pathlib.Path) -> tuple[dict[str, tuple[int, ...]], Callable[[], dict[str, np.ndarray]]]:
    """The last weights of a run, whatever its model is; its average where it keeps one.

    Returns path → shape, and a function that reads them (once): path → array.
    """
    config, _ = read_config(workdir)
    checkpoints = Checkpoints(workdir, read_only=True)
    step, name = _choose(checkpoints, "last", workdir), "ema" if config.ema.decay else "params"
    return checkpoints.shapes(step, name), functools.cache(lambda: checkpoints.read_weights(step, name))


def _choose(checkpoints: Checkpoints, which: str, workdir: pathlib.Path) -> int:
    steps = checkpoints.steps()
    if not steps:
        raise UserError(f"the run in {workdir} has no checkpoint yet")
    if which == "last":
        return checkpoints.newest_whole()
    if which == "best":
        best = checkpoints.best_step()
        if best is None:
            raise UserError(f"the run in {workdir} has no best checkpoint: it held no pictures out (data.holdout=0)")
        which = str(best)
    if not (which.isascii() and which.isdigit()) or int(which) not in steps:
        raise UserError(f"no checkpoint {which!r} in {workdir}: there are last, best and {', '.join(map(str, steps))}")
    try:
        checkpoints.check(int(which))
    except Damaged as error:
        raise UserError(f"{error}: take another step, or --checkpoint last, the newest whole one") from error
    return int(which)

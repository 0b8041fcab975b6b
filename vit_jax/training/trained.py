"""A trained model, from a run's workdir or a file of weights: what evaluation and the drawings start from."""

import dataclasses
import math
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from vit_jax.augment import ops
from vit_jax.data.load import Split, load_measured
from vit_jax.errors import UserError
from vit_jax.training import mesh as meshes
from vit_jax.training import setup, starting
from vit_jax.training import workdir as runs
from vit_jax.training.step import Classifier


@dataclasses.dataclass(frozen=True)
class Trained:
    """A classifier with its weights: a run's "ema" or "raw" ones of `step`, or of the file that `weights` names."""

    workdir: pathlib.Path
    config: ConfigDict
    class_names: tuple[str, ...]
    classifier: Classifier
    params: Any
    step: int | None
    weights: str

    def inputs(self, images: np.ndarray) -> jax.Array:
        """Pictures as the model takes them: uint8 [B, H, W, C] of any size -> floats [B, S, S, C]."""
        how = self.classifier
        return ops.normalize(ops.resize(jnp.asarray(images), how.image_size), how.mean, how.std, how.model.dtype)


def open_run(
    workdir: pathlib.Path, checkpoint: str = "last", weights: str | None = None, data_dir: str | None = None
) -> Trained:
    """Opens a finished or stopped run.

    Args:
      checkpoint: "last", "best" or a step.
      weights: "ema" or "raw"; None: the average where the run keeps one.
      data_dir: where data sets lie, if not where the run found them.

    Raises:
      UserError: there is no such run, checkpoint or average.
    """
    meshes.enable_compilation_cache()
    config, class_names = runs.read_config(workdir)
    if data_dir is not None:
        config.data.dir = data_dir
    classifier = setup.make_classifier(
        config, len(class_names), meshes.make_mesh(_devices(config), jax.local_devices())
    )
    params, step, kind = runs.load_weights(workdir, classifier, checkpoint, weights)
    return Trained(workdir, config, class_names, classifier, params, step, kind)


def open_weights(config: ConfigDict, workdir: pathlib.Path) -> tuple[Trained, list[str]]:
    """Opens the weights that a config starts from, as they are; and lines that tell what came how.

    Args:
      workdir: where drawings and measurements of them go.

    Raises:
      UserError: the config names no weights, or they do not fit it and its data, head included.
    """
    if not config.init.checkpoint:
        raise UserError("no weights to open: set --config.init.checkpoint=FILE, or give a run's --workdir alone")
    meshes.enable_compilation_cache()
    config, splits, classifier = starting.prepared(config)
    found, notes = starting.weights(config, classifier, splits.train.class_names, whole=True)
    params = starting.placed({}, found)
    names = splits.train.class_names
    return Trained(workdir, config, names, classifier, params, None, config.init.checkpoint), notes


def _devices(config: ConfigDict) -> int:
    """As many as the run was measured on; here, where there are fewer, as many as can share its batches."""
    here = jax.local_device_count()
    wanted = here if config.mesh.data == -1 else min(config.mesh.data, here)
    return math.gcd(wanted, setup.evaluation_size(config))


def measured_split(run: Trained, dataset: str | None = None) -> Split:
    """The run's own test pictures (the held-out ones where it has no others), or those of another data set.

    Raises:
      UserError: the data cannot be had, or its classes or channels are not the run's.
    """
    if dataset is None:
        return setup.load_data(run.config).reported
    data = run.config.data
    split = load_measured(
        dataset,
        data_dir=None if data.dir is None else setup.expanded(data.dir),
        image_size=data.image_size,
        skip_unreadable=data.skip_unreadable,
    )
    if split.images.shape[-1] != len(data.mean):
        raise UserError(
            f"the pictures of {dataset} have {split.images.shape[-1]} channels, and those that the run in "
            f"{run.workdir} was trained on {len(data.mean)}: give another --dataset"
        )
    unknown, missing = (
        _differ(*names) for names in ((split.class_names, run.class_names), (run.class_names, split.class_names))
    )
    if unknown or missing:
        only = [f"only there: {unknown}"] * bool(unknown) + [f"only in the run: {missing}"] * bool(missing)
        raise UserError(
            f"the classes of {dataset} are not those of the run in {run.workdir} ({'; '.join(only)}): name its folders "
            "like the run's classes"
        )
    order = np.array([run.class_names.index(name) for name in split.class_names], np.int32)
    return dataclasses.replace(split, labels=order[split.labels], class_names=run.class_names)


def _differ(names: Sequence[str], others: Sequence[str]) -> str:
    """Up to five of the names that are not among the others."""
    found = [name for name in names if name not in others]
    return ", ".join(found[:5]) + (f" and {len(found) - 5} more" if len(found) > 5 else "")

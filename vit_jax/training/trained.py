"""A trained model, from a run's workdir or a file of weights: what evaluation and the drawings start from."""

import dataclasses
import math
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict
from PIL import Image, UnidentifiedImageError

from vit_jax.augment import ops
from vit_jax.data import sources
from vit_jax.data.load import load_measured
from vit_jax.data.splits import Split
from vit_jax.errors import UserError
from vit_jax.training import mesh as meshes
from vit_jax.training import runs, setup, starting
from vit_jax.training.step import Classifier

Picture = str | os.PathLike | Image.Image | np.ndarray  # an array is uint8 [H, W] or [H, W, C]


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

    @property
    def side(self) -> int:
        """Of pictures as they are stored, pixels; the classifier resizes them where its input is another."""
        public = sources.PUBLIC.get(self.config.data.name)
        return public.side if public else self.classifier.image_size

    def read(self, picture: Picture) -> np.ndarray:
        """Any picture as one of the run's own would be stored: uint8 [side, side, C].

        Raises:
          UserError: it cannot be read.
        """
        mode = sources.MODES[len(self.classifier.mean)]
        try:
            if isinstance(picture, np.ndarray):
                picture = _image_of(picture)
            if isinstance(picture, Image.Image):
                return sources.pixels(picture, self.side, mode)
            return sources.decode(picture, self.side, mode)
        except Exception as error:  # Pillow's plugins raise OSError, SyntaxError, ValueError, struct.error and more
            name = os.fspath(picture) if isinstance(picture, str | os.PathLike) else "this picture"
            raise UserError(f"{name}: {_reason(error)}") from error

    def inputs(self, images: np.ndarray) -> jax.Array:
        """Pictures as the model takes them: uint8 [B, H, W, C] of any size -> floats [B, S, S, C]."""
        return self.classifier.inputs(ops.resize(jnp.asarray(images), self.classifier.image_size))


def _image_of(array: np.ndarray) -> Image.Image:
    if array.dtype != np.uint8 or array.ndim not in (2, 3):
        raise ValueError(f"an array must be uint8 [height, width, channels], not {array.dtype} {list(array.shape)}")
    return Image.fromarray(array[..., 0] if array.ndim == 3 and array.shape[2] == 1 else array)


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "no picture of a kind that Pillow reads"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) or type(error).__name__


def open_run(
    workdir: pathlib.Path, checkpoint: str | int | None = None, weights: str | None = None, data_dir: str | None = None
) -> Trained:
    """Opens a finished or stopped run.

    Args:
      checkpoint: "last", "best" or a step; None: the last.
      weights: "ema" or "raw"; None: the average where the run keeps one.
      data_dir: where data sets lie, if not where the run found them.

    Raises:
      UserError: there is no such run, checkpoint or average.
    """
    meshes.enable_compilation_cache()
    config, class_names = runs.read_config(workdir)
    if data_dir is not None:
        config.data.dir = data_dir
    mesh = meshes.make_mesh(*_devices(config), jax.local_devices())
    classifier = setup.make_classifier(config, len(class_names), mesh)
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


def _devices(config: ConfigDict) -> tuple[int, int]:
    """The mesh that the run was measured on; here, where there are fewer devices, one that can share its batches."""
    here = jax.local_device_count()
    model = config.mesh.model if config.mesh.model <= here else 1
    wanted = here // model if config.mesh.data == -1 else min(config.mesh.data, here // model)
    return math.gcd(wanted, setup.evaluation_size(config)), model


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
        data_dir=data.dir,
        image_size=run.side,
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

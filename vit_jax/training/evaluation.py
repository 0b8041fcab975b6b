"""A run's weights, or those a config starts from, measured on test pictures."""

import pathlib
from typing import Any

from ml_collections import ConfigDict

from vit_jax.analysis.metrics import calibration_error, summarize
from vit_jax.data.load import Split
from vit_jax.errors import UserError
from vit_jax.training import mesh as meshes
from vit_jax.training import setup, starting
from vit_jax.training import workdir as runs
from vit_jax.training.dispatch import featured, make_evaluator
from vit_jax.training.step import Classifier, Probe


def evaluate(
    workdir: pathlib.Path, checkpoint: str = "last", weights: str | None = None, data_dir: str | None = None
) -> dict[str, Any]:
    """What evaluation.json holds: the run's weights on its test pictures (the held-out ones where it has no others).

    The pictures go through the program that the run itself was measured with, so the last checkpoint gives the
    numbers of summary.json to the last bit.

    Args:
      checkpoint: "last", "best" or a step.
      weights: "ema" or "raw"; None: the average where the run keeps one.

    Raises:
      UserError: there is no such run, checkpoint, average or data.
    """
    meshes.enable_compilation_cache()
    config, class_names = runs.read_config(workdir)
    if data_dir is not None:
        config.data.dir = data_dir
    mesh = meshes.make_mesh(config.mesh.data)
    classifier = setup.make_classifier(config, len(class_names), mesh)
    classifier = setup.as_probe(config, classifier, setup.make_rules(config, classifier))
    params, step, kind = runs.load_weights(workdir, classifier, checkpoint, weights)
    split = setup.load_data(config).reported
    return _measured(classifier, params, split, setup.evaluation_size(config)) | {
        "checkpoint_step": step,
        "weights": kind,
    }


def evaluate_start(config: ConfigDict) -> tuple[dict[str, Any], list[str]]:
    """The same of the weights that a config starts from, as they are; and lines that tell what came how.

    Raises:
      UserError: the config names no weights, or they do not fit it and its data, head included.
    """
    if not config.init.checkpoint:
        raise UserError("nothing to evaluate: set --config.init.checkpoint=FILE, or give a run's --workdir alone")
    meshes.enable_compilation_cache()
    config, splits, classifier = starting.prepared(config)
    found, notes = starting.weights(config, classifier, splits.train.class_names, whole=True)
    params = starting.placed({}, found)
    report = _measured(classifier, params, splits.reported, setup.evaluation_size(config))
    return report | {"checkpoint_step": None, "weights": config.init.checkpoint}, notes


def _measured(classifier: Classifier, params: Any, split: Split, batch_size: int) -> dict[str, Any]:
    if isinstance(classifier, Probe):
        split = featured(classifier, params, split, batch_size)
    results = make_evaluator(classifier, split, batch_size)(params)
    ece = calibration_error(results["confidence"], results["correct"])
    return summarize(results) | {"ece": ece, "examples": len(split.labels)}

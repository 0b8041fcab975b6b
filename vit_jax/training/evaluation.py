"""A finished or stopped run, measured again from its workdir alone."""

import pathlib
from typing import Any

from vit_jax.analysis.metrics import calibration_error, summarize
from vit_jax.training import mesh as meshes
from vit_jax.training import setup
from vit_jax.training import workdir as runs
from vit_jax.training.dispatch import make_evaluator


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
    params, step, kind = runs.load_weights(workdir, classifier, checkpoint, weights)
    splits = setup.load_data(config)
    split = splits.reported
    results = make_evaluator(classifier, split, setup.part_size(config))(params)
    return summarize(results) | {
        "ece": calibration_error(results["confidence"], results["correct"]),
        "examples": len(split.labels),
        "checkpoint_step": step,
        "weights": kind,
    }

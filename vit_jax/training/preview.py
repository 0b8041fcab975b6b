"""What a config does to its training pictures, drawn before a run, without a model's weights."""

import pathlib
from collections.abc import Sequence

import jax
import numpy as np
from ml_collections import ConfigDict

from vit_jax.analysis import plots
from vit_jax.config import FIELDS, get
from vit_jax.data.resident import BatchIndices
from vit_jax.training import mesh as meshes
from vit_jax.training import setup, starting
from vit_jax.training.setup import Plan
from vit_jax.training.step import Task, training_pictures

STEPS = 8  # columns
SMALLEST_SHARE = 0.01  # of a class that is worth its name


def augmentation(config: ConfigDict, name: str, workdir: pathlib.Path, rows: int) -> pathlib.Path:
    """Draws the first `rows` pictures of a run's first batch: as they are, and as steps 0, 1, ... would change them.

    Returns the path of the drawing, figures/augmentation.png in `workdir`, where it replaces an earlier one.

    Raises:
      UserError: the config or the data is wrong; nothing was written.
    """
    meshes.enable_compilation_cache()
    config, splits, classifier = starting.prepared(config)
    train = splits.train
    plan, _ = setup.make_plan(config, len(train.labels))
    task, _ = setup.make_task(config, classifier, plan)

    repeats = task.augmentation.repeats
    batch = BatchIndices(task.seed, len(train.labels), config.train.batch_size, repeats)(0, 1)[0]
    rows = min(rows, len(batch) // repeats)
    images, labels = train.images[batch], train.labels[batch]
    seen = views(task, images, labels, rows)
    names = train.class_names
    sheet = [
        [(images[row], label([1.0], [names[labels[row]]]))]
        + [(pictures[row], label(shares[row], names)) for pictures, shares in seen]
        for row in range(rows)
    ]
    path = workdir / "figures" / "augmentation.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    headings = ["stored", *(f"step {step}" for step in range(STEPS))]
    plots.contact_sheet(sheet, headings, path, f"{name}: what the model sees", notes(config, task, plan))
    return path


def views(task: Task, images: np.ndarray, labels: np.ndarray, rows: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """The first `rows` of a batch as each of the first steps would change it: pictures, and the classes' shares.

    The whole batch goes through the step's own function, for its pictures are mixed with each other.
    """
    change = jax.jit(training_pictures, static_argnums=(0, 1))
    seen = []
    for step in range(STEPS):
        pictures, targets, _ = change(task, task.size_at(step), np.int32(step), images, labels)
        pictures, targets = jax.device_get((pictures[:rows], targets[:rows]))
        spread = task.label_smoothing / task.classifier.num_classes
        seen.append((pictures, (targets - spread) / (1 - task.label_smoothing)))
    return seen


def label(shares: Sequence[float] | np.ndarray, class_names: Sequence[str]) -> str:
    """The one or two classes that a picture shows, a line each: "cat", or "cat  .70" and "+ dog  .30"."""
    best = np.argsort(-np.asarray(shares), kind="stable")[:2]
    shown = [(plots.shorten(class_names[i]), shares[i]) for i in best if shares[i] > SMALLEST_SHARE]
    if len(shown) == 1:
        return shown[0][0]
    return "\n+ ".join(f"{name}  {f'{share:.2f}'.lstrip('0')}" for name, share in shown)


def notes(config: ConfigDict, task: Task, plan: Plan) -> list[str]:
    """What a person must know to read the sheet: the fields that made it, and what its columns are."""
    paths = [path for path in FIELDS if path.startswith("augment.") and get(config, path) != FIELDS[path].default]
    fields = "   ".join(f"{path.removeprefix('augment.')}={_text(get(config, path))}" for path in paths)
    lines = [
        fields or "no augmentation: all augment fields are at their defaults",
        f"Column “step 0” is what a run with seed {config.train.seed} sees in its first step; the others show the same "
        f"pictures with the draws of steps 1 to {STEPS - 1}.",
    ]
    how = task.augmentation
    if task.size_at(0) < task.classifier.image_size:
        lines[-1] += f" Until step {how.small_steps} of {plan.total} the model sees crops of {how.small_size} pixels."
    if how.mixing is not None:
        ends = f", until step {how.mix_steps} of {plan.total}" if how.mix_steps < plan.total else ""
        lines[-1] += f" Pictures are mixed in pairs, the first with the second and so on{ends}."
    if config.train.label_smoothing:
        lines[-1] += f" Labels are shown without their smoothing of {config.train.label_smoothing:g}."
    return lines


def _text(value: object) -> str:
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)

"""Weights measured on test pictures, and drawings of where they fail."""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vit_jax.analysis import figures, metrics, plots
from vit_jax.data.splits import Split
from vit_jax.training import runs, setup, trained
from vit_jax.training.dispatch import featured
from vit_jax.training.step import Classifier, Probe
from vit_jax.training.trained import Trained
from vit_jax.training.writers import write_csv, write_json

MISTAKES = (4, 8)  # rows and columns of pictures


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What was measured, on what.

    Attributes:
      report: what evaluation.json holds.
      results: of each picture, each [N] (see `step.make_evaluate`).
    """

    report: dict[str, Any]
    split: Split
    results: Mapping[str, np.ndarray]


class TwoViews(Classifier):
    """A classifier that gives a picture and its mirror image the mean of their probabilities."""

    def logits(self, params: Any, images: jax.Array) -> jax.Array:
        one, other = (Classifier.logits(self, params, view) for view in (images, images[:, :, ::-1]))
        return jnp.logaddexp(jax.nn.log_softmax(one), jax.nn.log_softmax(other)) - jnp.log(2)


def evaluate(run: Trained, dataset: str | None = None, flip_tta: bool = False) -> Evaluation:
    """Measures weights on their data's test pictures (a run's held-out ones where it has no others).

    The pictures go through the program that a run itself was measured with, so its last checkpoint gives the numbers of
    summary.json to the last bit.

    Args:
      dataset: another source to measure on, of the same classes.
      flip_tta: also measure the mean of each picture's and its mirror image's probabilities, as `accuracy_flip` ...

    Raises:
      UserError: the data cannot be had, or its classes are others.
    """
    split = trained.measured_split(run, dataset)
    size = setup.evaluation_size(run.config)
    classifier, seen = setup.as_probe(run.config, run.classifier, setup.make_rules(run.config, run.classifier)), split
    if isinstance(classifier, Probe):
        seen = featured(classifier, run.params, split, size)
    measured = of_results(run, split, setup.make_evaluator(run.config, classifier, seen)(run.params), dataset)
    if flip_tta:
        both = TwoViews(**{field.name: getattr(run.classifier, field.name) for field in dataclasses.fields(Classifier)})
        flipped = summarize(setup.make_evaluator(run.config, both, split)(run.params))
        measured.report.update({f"{name}_flip": value for name, value in flipped.items()})
    return measured


def of_results(run: Trained, split: Split, results: Mapping[str, np.ndarray], dataset: str | None = None) -> Evaluation:
    """What results of the pictures of `split`, the run's own or those of `dataset`, say."""
    report = summarize(results) | {
        "examples": len(split.labels),
        "checkpoint_step": run.step,
        "weights": run.weights,
        "dataset": dataset or run.config.data.name,
    }
    return Evaluation(report, split, results)


def summarize(results: Mapping[str, np.ndarray]) -> dict[str, float]:
    return metrics.summarize(results) | {"ece": metrics.calibration_error(results["confidence"], results["correct"])}


def write(evaluation: Evaluation, workdir: pathlib.Path) -> list[pathlib.Path]:
    """Writes evaluation.json in `workdir` and what can be seen of it in its figures/; gives the paths."""
    paths = draw(evaluation, workdir)
    write_json(workdir / "evaluation.json", evaluation.report)
    return [workdir / "evaluation.json", *paths]


def draw(evaluation: Evaluation, workdir: pathlib.Path) -> list[pathlib.Path]:
    """Writes, in the workdir's figures/, reliability.png, confusion.csv and .png, classes.csv (accuracy by class), and
    the most confident mistakes, mistakes.png, where there are any; gives the paths.
    """
    results, split = evaluation.results, evaluation.split
    names, folder = split.class_names, workdir / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    of_step = "" if evaluation.report["checkpoint_step"] is None else ", {weights} weights of step {checkpoint_step}"
    title = f"{runs.name_of(workdir)} on {evaluation.report['dataset']}{of_step.format(**evaluation.report)}"

    matrix = metrics.confusion(split.labels, results["prediction"], len(names))
    rows = metrics.per_class(matrix, names)
    write_csv(folder / "classes.csv", [list(rows[0]), *(row.values() for row in rows)])
    write_csv(
        folder / "confusion.csv",
        [["true \\ predicted", *names], *([n, *r] for n, r in zip(names, matrix, strict=True))],
    )
    figures.confusions(matrix, names, folder / "confusion.png", f"{title}: what is taken for what")
    sums = metrics.reliability(results["confidence"], results["correct"])
    figures.reliability(sums, folder / "reliability.png", f"{title}: calibration")
    draw_mistakes(evaluation, folder / "mistakes.png", title)
    files = ("reliability.png", "confusion.csv", "confusion.png", "classes.csv", "mistakes.png")
    return [folder / name for name in files if (folder / name).exists()]


def draw_mistakes(evaluation: Evaluation, path: pathlib.Path, title: str) -> None:
    """Draws the wrong predictions that were made with the most confidence; none where all are right."""
    results, split = evaluation.results, evaluation.split
    wrong = np.flatnonzero(results["correct"] == 0)
    path.unlink(missing_ok=True)
    if not len(wrong):
        return
    rows, columns = MISTAKES
    worst = wrong[np.argsort(-results["confidence"][wrong], kind="stable")][: rows * columns]
    cells = []
    for i in worst:
        true, predicted = (plots.shorten(split.class_names[j]) for j in (split.labels[i], results["prediction"][i]))
        probability = f"{results['confidence'][i]:.3f}".lstrip("0")
        cells.append((split.images[i], f"{true}\n→ {predicted}  {probability}"))
    share = f"{len(wrong)} of {len(split.labels)} pictures are mistaken; these with the most confidence."
    notes = [share, "Under each picture: its class → what it was taken for, with which probability."]
    plots.sheet(cells, columns, [""], path, f"{title}: the most confident mistakes", notes)

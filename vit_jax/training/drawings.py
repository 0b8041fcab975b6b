"""What a run has learned, drawn from its workdir into its figures/."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from vit_jax.analysis import attention, embeddings, figures, plots
from vit_jax.data.splits import Split
from vit_jax.errors import Absent
from vit_jax.training import evaluation, runs, trained
from vit_jax.training.trained import Trained
from vit_jax.training.writers import Row, read_metrics, score

SHOWN = 8  # test pictures, each of another class
MEASURED = 64  # test pictures that the attention distance is a mean of
BATCH = 8  # pictures at once: their attention weights are large
FILTERS_A_ROW = 7


@dataclasses.dataclass(frozen=True)
class Subject:
    """A run to draw, and what to draw on. What a drawing does not need is not loaded.

    Attributes:
      files: pictures; none: some test pictures.
      compare: other runs, whose curves are drawn beside this one's.
      checkpoint, weights, data_dir: as for `trained.open_run`.
    """

    workdir: pathlib.Path
    files: Sequence[pathlib.Path] = ()
    compare: Sequence[pathlib.Path] = ()
    checkpoint: str | None = None
    weights: str | None = None
    data_dir: str | None = None

    @functools.cached_property
    def run(self) -> Trained:
        return trained.open_run(self.workdir, self.checkpoint, self.weights, self.data_dir)

    @property
    def model(self) -> Any:
        return self.run.classifier.model

    @property
    def grid(self) -> tuple[int, int]:
        return self.run.classifier.grid

    @property
    def reader(self) -> str:
        """Whose attention is drawn."""
        return "the class token" if self.model.pool == "cls" else "all tokens, on average"

    @functools.cached_property
    def split(self) -> Split:
        """The run's own test pictures."""
        return trained.measured_split(self.run)

    @functools.cached_property
    def shown(self) -> tuple[np.ndarray, list[str]]:
        """Pictures to draw on, uint8 [B, H, W, C], and their names."""
        if self.files:
            return np.stack([self.run.read(path) for path in self.files]), [path.name for path in self.files]
        classes, firsts = np.unique(self.split.labels, return_index=True)
        some = np.linspace(0, len(classes) - 1, min(SHOWN, len(classes))).round().astype(int)
        return self.split.images[firsts[some]], [self.split.class_names[c] for c in classes[some]]

    @functools.cached_property
    def measured(self) -> np.ndarray:
        """Pictures to take means over, uint8 [B, H, W, C]."""
        if self.files:
            return self.shown[0]
        count = len(self.split.labels)  # evenly, for they may be sorted by class
        return self.split.images[np.linspace(0, count - 1, min(MEASURED, count)).round().astype(int)]

    def compute(self, function: Callable, images: np.ndarray, *others: np.ndarray) -> Any:
        """`function(model, params, inputs, *others)` of a few pictures at a time, put together on the host."""
        starts = range(0, len(images), BATCH)
        batches = ([x[start : start + BATCH] for x in (images, *others)] for start in starts)
        parts = [function(self.model, self.run.params, self.run.inputs(x), *rest) for x, *rest in batches]
        return jax.tree.map(lambda *x: np.concatenate(x), *parts)

    def rollout(self, images: np.ndarray) -> np.ndarray:
        """How much of each patch reaches what the head reads, [B, h, w], where 1 is an even share."""

        def read(*arguments):
            return attention.read_by_head(attention.rollout(attention.attention_weights(*arguments)), self.grid)[0]

        maps = self.compute(read, images)
        return maps / maps.mean((1, 2), keepdims=True)

    def path(self, name: str) -> pathlib.Path:
        return self.workdir / "figures" / f"{name}.png"

    def title(self, words: str) -> str:
        return f"{runs.name_of(self.workdir)}: {words}"


def draw(subject: Subject, what: str) -> tuple[list[pathlib.Path], list[str]]:
    """Draws `what`, a key of DRAWINGS, or "all" that there is; gives the paths, and what was left out and why.

    Raises:
      UserError: there is no such run, picture or data, or the model has not what was asked for by name.
    """
    runs.read_config(subject.workdir)  # is there a run at all? Then it may have a folder more
    (subject.workdir / "figures").mkdir(exist_ok=True)
    if what != "all":
        return DRAWINGS[what](subject), []
    paths, left_out = [], []
    for name, drawing in DRAWINGS.items():
        try:
            paths += drawing(subject)
        except Absent as error:
            left_out.append(f"{name} left out: {error}")
    return paths, left_out


def curves(subject: Subject) -> list[pathlib.Path]:
    """Loss and accuracy over epochs, of this run alone, or of it and others."""
    workdirs = [subject.workdir, *subject.compare]
    rows = [_rows(workdir) for workdir in workdirs]
    splits = ["held out" if runs.read_config(w)[0].data.holdout else "test" for w in workdirs]
    if not subject.compare:
        path = subject.workdir / "curves.png"
        plots.curves(rows[0], path, runs.name_of(subject.workdir), splits[0])
        return [path]
    path = subject.path("comparison")
    names = [f"{workdir} ({split})" for workdir, split in zip(workdirs, splits, strict=True)]
    figures.comparison(dict(zip(names, rows, strict=True)), path, f"{len(set(names))} runs compared")
    return [path]


def _rows(workdir: pathlib.Path) -> list[Row]:
    runs.read_config(workdir)
    rows = read_metrics(workdir / "metrics.csv")
    if not rows:
        raise Absent(f"the run in {workdir} has no evaluation yet")
    return [row | {"score": score(row)} for row in rows]


def positions(subject: Subject) -> list[pathlib.Path]:
    """How alike the position embeddings are, a small map a patch."""
    similarity = embeddings.position_similarity(subject.model, subject.run.params, subject.grid)
    path = subject.path("positions")
    figures.positions(similarity, path, subject.title("similarity of position embeddings"))
    return [path]


def filters(subject: Subject) -> list[pathlib.Path]:
    """Which patterns the patch embedding looks for: its filters' first principal components."""
    components = embeddings.patch_filters(subject.model, subject.run.params)
    largest = np.abs(components).max((1, 2, 3), keepdims=True)
    pictures = (127.5 + 127.5 * components / largest).round().astype(np.uint8)
    cells = [(picture, str(i)) for i, picture in enumerate(pictures, start=1)]
    size = subject.model.patch_size
    notes = [f"What its filters of {size} x {size} pixels are made of, the strongest first; grey is 0."]
    path = subject.path("filters")
    plots.sheet(cells, FILTERS_A_ROW, [""], path, subject.title("principal components of the patch embedding"), notes)
    return [path]


def attention_maps(subject: Subject) -> list[pathlib.Path]:
    """What the classifier's head reads of the patches, by layer and head: a file a picture."""

    def read(*arguments):
        return attention.read_by_head(attention.attention_weights(*arguments), subject.grid)

    images, names = subject.shown
    maps, kept = subject.compute(read, images)  # [B, L, H, h, w], [B, L, H]
    for stale in (subject.workdir / "figures").glob("attention_*.png"):
        stale.unlink()
    cls = subject.model.pool == "cls"
    notes = [
        "Under each map the share of attention that its brightest patch gets; to all tokens alike would be "
        f"{1 / (maps[0, 0, 0].size + cls):.3f}." + " cls: what the class token keeps for itself." * cls
    ]
    heads = [f"head {i + 1}" for i in range(maps.shape[2])]
    title = subject.title(f"attention of {subject.reader}")
    paths = []
    for i, (image, name) in enumerate(zip(images, names, strict=True)):
        rows = []
        for layer, (seen, own) in enumerate(zip(maps[i], kept[i], strict=True), start=1):
            under = [f"{x.max():.3f}" + f"   cls {share:.3f}" * cls for x, share in zip(seen, own, strict=True)]
            rows.append([(image, f"layer {layer}"), *zip(map(figures.heat, seen), under, strict=True)])
        paths.append(subject.path(f"attention_{i + 1}"))
        plots.contact_sheet(rows, [plots.shorten(name), *heads], paths[-1], title, notes, figures.scale())
    return paths


def rollout(subject: Subject) -> list[pathlib.Path]:
    """Attention followed from the head down to the picture, on the pictures."""
    images, names = subject.shown
    cells = []
    for image, name, flow in zip(images, names, subject.rollout(images), strict=True):
        cells += [(image, plots.shorten(name)), (figures.overlay(image, flow), f"{flow.min():.2f} to {flow.max():.2f}")]
    notes = [
        f"How much of each patch reaches {subject.reader}: the heads' mean and the residual connection, multiplied up "
        "over the layers. Beneath: the smallest and the largest share, where 1 is an even one."
    ]
    path = subject.path("rollout")
    plots.sheet(cells, 6, ["picture", "rollout"], path, subject.title("attention rollout"), notes, figures.scale())
    return [path]


def relevance(subject: Subject) -> list[pathlib.Path]:
    """What speaks for the two most probable classes, on the pictures."""
    images, names = subject.shown
    if len(subject.run.class_names) < 2:
        raise Absent("relevance tells classes apart, and the run knows one alone")
    logits = jax.jit(subject.run.classifier.logits)(subject.run.params, images)
    probabilities = np.asarray(jax.nn.softmax(logits))
    best = np.argsort(-probabilities, axis=1, kind="stable")[:, :2].astype(np.int32)
    maps = [subject.compute(attention.relevance, images, classes) for classes in best.T]
    cells = []
    for i, (image, name) in enumerate(zip(images, names, strict=True)):
        cells.append((image, plots.shorten(name)))
        for rank, c in enumerate(best[i]):
            probability = f"{probabilities[i, c]:.3f}".lstrip("0")
            cells.append(
                (figures.overlay(image, maps[rank][i]), f"{plots.shorten(subject.run.class_names[c])}  {probability}")
            )
    notes = [
        "Where the model finds what speaks for a class and against the others: gradient-weighted attention, carried "
        "through the layers, each picture to its own scale. Beneath: the class and its probability."
    ]
    path = subject.path("relevance")
    headings = ["picture", "most probable", "second"]
    plots.sheet(cells, 6, headings, path, subject.title("relevance for a class"), notes, figures.scale())
    return [path]


def confusion(subject: Subject) -> list[pathlib.Path]:
    """What is taken for what, with all else that an evaluation draws and writes."""
    return evaluation.write(evaluation.evaluate(subject.run), subject.workdir)


def distance(subject: Subject) -> list[pathlib.Path]:
    """How far each head looks."""

    def read(*arguments):
        weights = attention.attention_weights(*arguments)
        return attention.attention_distance(weights, subject.grid, subject.model.patch_size)

    images = subject.measured
    far = subject.compute(read, images).mean(0)
    even = float(attention.patch_distances(subject.grid, subject.model.patch_size).mean())
    path = subject.path("distance")
    figures.distances(far, even, path, subject.title(f"attention distance, mean of {len(images)} pictures"))
    return [path]


DRAWINGS: dict[str, Callable[[Subject], list[pathlib.Path]]] = {
    "attention": attention_maps,
    "rollout": rollout,
    "relevance": relevance,
    "positions": positions,
    "filters": filters,
    "distance": distance,
    "confusion": confusion,
    "curves": curves,
}

"""What a trained model says of pictures: files, Pillow's images or arrays of any size."""

import dataclasses
import functools
import os
import pathlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent import futures
from typing import Any

import jax
import numpy as np

from vit_jax.data import sources
from vit_jax.errors import UserError
from vit_jax.training import trained
from vit_jax.training.trained import Picture, Trained
from vit_jax.training.writers import write_csv, write_json

Predictions = list[dict[str, Any]]  # label, index and probability, the most probable first


@dataclasses.dataclass(frozen=True)
class Predictor:
    """A trained classifier, to be asked about pictures.

    Attributes:
      batch_size: most pictures that the model is given at once.
    """

    run: Trained = dataclasses.field(repr=False)
    batch_size: int = 64

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.run.class_names

    def predict(self, images: Picture | Sequence[Picture], top: int = 5) -> Predictions | list[Predictions]:
        """The `top` most probable classes of a picture; of a list of pictures, or uint8 [N, H, W, C], of each.

        Raises:
          UserError: a picture cannot be read.
        """
        if isinstance(images, Picture) and not (isinstance(images, np.ndarray) and images.ndim == 4):
            return next(self._predicted([images], top))
        return list(self._predicted(list(images), top))

    def _predicted(self, images: Sequence[Picture], top: int) -> Iterator[Predictions]:
        for result in self.results(images, top):
            if isinstance(result, UserError):
                raise result
            yield result

    def results(self, images: Sequence[Picture], top: int = 5) -> Iterator[Predictions | UserError]:
        """The predictions for each picture in turn, or why there are none."""
        # Few pictures are not filled up to a whole batch; powers of two, so that few programs are compiled.
        size = min(self.batch_size, 1 << max(len(images) - 1, 0).bit_length())
        with futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            for start in range(0, len(images), size):
                read = list(pool.map(self._try_to_read, images[start : start + size]))
                good = [picture for picture in read if isinstance(picture, np.ndarray)]
                ranked = iter(self.ranked(np.stack(good), size, top) if good else [])
                yield from (next(ranked) if isinstance(picture, np.ndarray) else picture for picture in read)

    def ranked(self, pictures: np.ndarray, size: int, top: int) -> list[Predictions]:
        """The predictions for pictures as `Trained.read` gives them, at most `size`: the model gets as many."""
        padding = [(0, size - len(pictures)), (0, 0), (0, 0), (0, 0)]
        probabilities = np.asarray(self._program(self.run.params, np.pad(pictures, padding, mode="edge")))
        best = np.argsort(-probabilities[: len(pictures)], axis=1, kind="stable")[:, :top]
        return [
            [{"label": self.class_names[i], "index": int(i), "probability": float(row[i])} for i in order]
            for order, row in zip(best, probabilities, strict=False)
        ]

    @functools.cached_property
    def _program(self) -> jax.stages.Wrapped:
        logits = self.run.classifier.logits
        return jax.jit(lambda params, images: jax.nn.softmax(logits(params, images)))

    def _try_to_read(self, picture: Picture) -> np.ndarray | UserError:
        try:
            return self.run.read(picture)
        except UserError as error:
            return error


def load(
    workdir: str | os.PathLike, checkpoint: str | int | None = None, weights: str | None = None, batch_size: int = 64
) -> Predictor:
    """A run's classifier; see `trained.open_run`."""
    return Predictor(trained.open_run(pathlib.Path(workdir), checkpoint, weights), batch_size)


# For the command


def expanded(places: Iterable[str]) -> tuple[list[str], list[UserError]]:
    """Files as they are and folders' pictures; and what is wrong with other folders."""
    paths: list[str] = []
    wrong = []
    for place in places:
        try:
            found = [str(path) for path in sources.listed(pathlib.Path(place))] if os.path.isdir(place) else [place]
            paths += found
            wrong += [UserError(f"{place}: no pictures in this folder")] * (not found)
        except OSError as error:
            wrong.append(UserError(f"{error.filename}: {error.strerror}"))
    return paths, wrong


def write(
    found: Sequence[tuple[str, Predictions]], json_file: pathlib.Path | None, csv_file: pathlib.Path | None
) -> None:
    """Writes paths and what was predicted of them to the files that are given."""
    for path in filter(None, (json_file, csv_file)):
        path.parent.mkdir(parents=True, exist_ok=True)
    if json_file is not None:
        write_json(json_file, [{"path": path, "predictions": predictions} for path, predictions in found])
    if csv_file is not None:
        rows = [(path, rank, *p.values()) for path, predictions in found for rank, p in enumerate(predictions, 1)]
        write_csv(csv_file, [("path", "rank", "label", "index", "probability"), *rows])

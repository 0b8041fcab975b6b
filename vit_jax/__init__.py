"""Small Vision Transformers trained from scratch, in JAX, Flax and optax."""

import os
import typing

if typing.TYPE_CHECKING:
    from vit_jax.training.predicting import Predictor

__all__ = ["load"]
__version__ = "0.1.0"


def load(
    workdir: str | os.PathLike, checkpoint: str | int | None = None, weights: str | None = None, batch_size: int = 64
) -> "Predictor":
    """A trained run's classifier: `vit_jax.load("runs/digits").predict("three.png")`.

    Args:
      checkpoint: "last", "best" or a step; None: the last.
      weights: "ema" or "raw"; None: the average where the run keeps one.
      batch_size: most pictures that the model is given at once.

    Raises:
      vit_jax.errors.UserError: there is no such run, checkpoint or average.
    """
    from vit_jax.training import predicting  # here, for it takes seconds

    return predicting.load(workdir, checkpoint, weights, batch_size)

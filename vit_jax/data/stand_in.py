"""Pictures in the place of a known data set that is not here: of its number, size and classes, and without memory."""

import numpy as np

from vit_jax.data.sources import PUBLIC
from vit_jax.data.splits import Split, Splits


def stand_in(name: str, train_examples: int | None = None, holdout: float = 0.0) -> Splits:
    """Splits with the shapes of a public data set: one picture of noise over and over, any labels."""
    public = PUBLIC[name]
    random = np.random.default_rng(0)
    picture = random.integers(0, 256, (public.side, public.side, public.channels), np.uint8)

    def split(count: int) -> Split:
        labels = random.integers(0, public.classes, count).astype(np.int32)
        images = np.broadcast_to(picture, (count, *picture.shape))
        names, each = tuple(map(str, range(public.classes))), public.channels
        return Split(images, labels, names, (0.5,) * each, (0.25,) * each)

    return Splits(split(train_examples or round(public.train * (1 - holdout))), None, split(public.test))

"""Pictures in the place of a known data set that is not here: of its number, size and classes, and without memory."""

import numpy as np

from vit_jax.data.load import SIDES
from vit_jax.data.splits import Split, Splits

# Training and test pictures and classes.
SHAPES = {
    "cifar10": (50_000, 10_000, 10),
    "cifar100": (50_000, 10_000, 100),
    "svhn": (73_257, 26_032, 10),
    "tiny_imagenet": (100_000, 10_000, 200),
}


def stand_in(name: str, train_examples: int | None = None, holdout: float = 0.0) -> Splits:
    """Splits with the shapes of the data set `name`, one of SHAPES: one picture of noise over and over, any labels."""
    train, test, classes = SHAPES[name]
    random = np.random.default_rng(0)
    picture = random.integers(0, 256, (SIDES[name], SIDES[name], 3), np.uint8)

    def split(count: int) -> Split:
        labels = random.integers(0, classes, count).astype(np.int32)
        images = np.broadcast_to(picture, (count, *picture.shape))
        return Split(images, labels, tuple(map(str, range(classes))), (0.5,) * 3, (0.25,) * 3)

    return Splits(split(train_examples or round(train * (1 - holdout))), None, split(test))

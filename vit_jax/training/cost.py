"""What a model costs by the formula, wherever it runs."""

import math

from vit_jax.analysis.metrics import training_flops
from vit_jax.training.step import Classifier


def flops_per_image(classifier: Classifier) -> float | None:
    """See `training_flops`; None for a model with parts that are not counted: a ResNet, convolutions in the MLP."""
    model, size, channels = classifier.model, classifier.image_size, len(classifier.mean)
    if model.stem == "resnet" or model.mlp_conv:
        return None
    patch_size, stem = model.patch_size, 0
    patches = math.prod(classifier.grid)
    if model.stem == "shifted":
        channels *= 5
    elif model.stem == "conv":
        halvings = patch_size.bit_length() - 1
        for i in range(halvings):
            wide = max(model.width >> (halvings - 1 - i), 8)
            stem += 2 * (size >> (i + 1)) ** 2 * 9 * channels * wide
            channels = wide
        patch_size = 1
    return training_flops(
        tokens=patches + (model.pool == "cls"),
        patches=patches,
        channels=channels,
        patch_size=patch_size,
        width=model.width,
        depth=model.depth,
        mlp_dim=model.mlp_dim,
        classes=classifier.num_classes,
        stem=stem,
    )

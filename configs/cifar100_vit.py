"""CIFAR-100 from scratch with at most 6.3M parameters, by the recipes of `cifar10_vit.py`.

    python -m vit_jax.main --config configs/cifar100_vit.py
    python -m vit_jax.main --config configs/cifar100_vit.py:reference

`:reference` has 6,303,460 parameters here; its README: 66.54 % after 200 epochs, 2 h 14 min on a V100. Neither has been
run to its end: that wants a GPU.
"""

import cifar10_vit


def get_config(variant=""):
    config = cifar10_vit.get_config(variant)
    config.data.name = "cifar100"
    if variant == "reference":
        config.train.label_smoothing = 0.1 * 100 / 99  # 0.1 over the 99 other classes
    return config

"""SVHN (73,257 training pictures) from scratch with at most 6.3M parameters, by the recipes of `cifar10_vit.py`.

    python -m vit_jax.main --config configs/svhn_vit.py
    python -m vit_jax.main --config configs/svhn_vit.py:reference

Digits are not mirrored. `:reference` takes SVHN's own AutoAugment policy and has 6,268,810 parameters; its README:
97.31 % after 200 epochs, 3 h 24 min on a V100. Ours mixes less: half of a digit may be another digit. Neither has been
run to its end: that wants a GPU.
"""

import cifar10_vit


def get_config(variant=""):
    config = cifar10_vit.get_config(variant)
    config.data.name = "svhn"
    config.augment.flip = False
    if variant == "reference":
        config.augment.policy = "autoaugment_svhn"
    else:
        config.augment.mix_probability = 0.5
        config.train.epochs = 300
    return config

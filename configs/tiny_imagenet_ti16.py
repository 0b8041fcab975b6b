"""Tiny ImageNet at 224 pixels with a ViT-Ti/16 that others trained: measured as it is, or fine-tuned.

    python -m vit_jax.evaluate --config configs/tiny_imagenet_ti16.py --config.init.checkpoint=FILE --workdir DIR
    python -m vit_jax.main     --config configs/tiny_imagenet_ti16.py --config.init.checkpoint=FILE

FILE is a ViT-Ti/16 as an official .npz or a .safetensors; one of 200 classes keeps its head. Pictures stay 64 x 64
until they are on the device. Arguments are those of `cifar10_b16.py`.
"""

import cifar10_b16


def get_config(variant=""):
    config = cifar10_b16.get_config(variant)
    config.data.name = "tiny_imagenet"
    config.model.preset = "Ti/16"
    config.train.dtype = "float32"
    config.optim.learning_rate = 0.03
    return config

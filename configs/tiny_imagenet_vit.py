"""Tiny ImageNet (64 x 64 pixels, 200 classes) from scratch with at most 6.4M parameters.

    python -m vit_jax.main --config configs/tiny_imagenet_vit.py
    python -m vit_jax.main --config configs/tiny_imagenet_vit.py:reference

`:reference` is the recipe that the README of the published experiment "VisionTransformer-TinyImageNet" states
(21,264,072 parameters; best validation accuracy 32.60 %, at epoch 183 of a notebook whose network is another one).
Kept: sizes, batch, AdamW at 3e-5, label smoothing, averaged weights, half precision (here bfloat16), dropout, warm-up
and cosine over 300 epochs, stopping after 20 epochs without progress. Not kept: stopping on the pictures that are
reported (here on a held-out 5 % of train, and by its accuracy, not its loss), augmented validation, crops of 32 of the
64 pixels, a first epoch at rate 0, identical initial layers, dropout on the logits and none on the embeddings, norms
after the blocks, ReLU. Its augmentation (brightness, contrast and saturation by up to 0.2, hue by 0.1, rotation by up
to 15 degrees) is replaced by two operations a picture: the first three by 0.24, or rotation by 8 degrees, either way.

Ours is the network of `cifar10_vit.py` on patches of 8. Neither has been run to its end: that wants a GPU. Both compute
in bfloat16; on a CPU add --config.train.dtype=float32.
"""

import cifar10_vit

from vit_jax.config import default_config


def get_config(variant=""):
    if variant == "reference":
        config = default_config()
        config.model.update({"width": 512, "depth": 10, "num_heads": 8, "mlp_dim": 1024, "dropout": 0.1})
        config.model.attention_dropout = 0.1
        config.model.update({"pool": "cls", "gelu": "exact", "norm_epsilon": 1e-5, "head_zero_init": False})
        config.data.holdout = 0.05
        config.augment.update({"crop": "pad", "padding": 4, "flip": True})
        config.augment.update({"policy": "randaugment", "magnitude": 8.0})
        config.augment.operations = ("rotate", "brightness", "contrast", "color")
        config.train.update({"batch_size": 128, "epochs": 300, "patience": 20, "label_smoothing": 0.01})
        config.train.dtype = "bfloat16"
        config.optim.update({"name": "adamw", "learning_rate": 3e-5, "weight_decay": 1e-4, "warmup_epochs": 10})
        config.ema.decay = 0.996
        config.checkpoint.every = 5
    else:
        config = cifar10_vit.get_config(variant)
        config.augment.padding = 8
        config.train.epochs = 300
    config.data.name = "tiny_imagenet"
    config.model.patch_size = 8
    return config

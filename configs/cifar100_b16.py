"""CIFAR-100 with a ViT-B/16 that was trained on ImageNet-21k, by the recipe and the arguments of `cifar10_b16.py`.

    python -m vit_jax.main --config configs/cifar100_b16.py --config.init.checkpoint=ViT-B_16.npz
    python -m vit_jax.main --config configs/cifar100_b16.py:mlp,steps=1000 --config.init.checkpoint=ViT-B_16.npz
    python -m vit_jax.main --config configs/cifar100_b16.py:reference --config.init.checkpoint=ViT-B_16.npz

`:reference` is the best run of the published experiment "ViT-B/16 on CIFAR-100", MLPs, their norms and the head (its
README: 92.48 %). Kept: what is trained, 20 epochs of batches of 64, SGD at 1e-2 with momentum and a decay of 1e-4, the
rate that its cosine of 100 epochs had come to after 20, dropout, crops of 64 to 100 % of the picture, mirrored, the
data's own mean and deviation. Not kept: square crops alone, random crops of test pictures, decay of biases and norms.
Neither has been run: that wants the file and a GPU.
"""

import math

import cifar10_b16


def get_config(variant=""):
    if variant == "reference":
        config = cifar10_b16.get_config("mlp")
        config.data.update({"mean": (0.5071, 0.4867, 0.4408), "std": (0.2675, 0.2565, 0.2761)})
        config.model.dropout = 0.1
        config.augment.min_area = 0.64
        config.train.update({"batch_size": 64, "steps": None, "epochs": 20, "eval_every": 1, "dtype": "float32"})
        config.optim.update({"learning_rate": 1e-2, "weight_decay": 1e-4, "momentum_dtype": "float32"})
        config.optim.final_learning_rate = 1e-2 * (1 + math.cos(math.pi * 20 / 100)) / 2
        config.optim.update({"clip_norm": 0.0, "warmup_epochs": None, "accumulate": 2})
    else:
        config = cifar10_b16.get_config(variant)
        config.optim.learning_rate = 0.03
    config.data.name = "cifar100"
    return config

"""CIFAR-100 with a ViT-B/16 that was trained on ImageNet-21k, by the recipe and the arguments of `cifar10_b16.py`.

python -m vit_jax.main --config configs/cifar100_b16.py --config.init.checkpoint=ViT-B_16.npz
python -m vit_jax.main --config configs/cifar100_b16.py:mlp,res=224 --config.init.checkpoint=ViT-B_16.npz
"""

import cifar10_b16


def get_config(variant=""):
    config = cifar10_b16.get_config(variant)
    config.data.name = "cifar100"
    config.optim.learning_rate = 0.03
    return config

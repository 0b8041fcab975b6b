"""Your own pictures with a ViT-B/16 that was trained on ImageNet-21k, by the recipe of `cifar10_b16.py`.

    python -m vit_jax.main --config configs/folder_b16.py --workdir runs/flowers \\
        --config.data.name=folder:PATH --config.init.checkpoint=ViT-B_16.npz

PATH holds train/CLASS/*.jpg and test/CLASS/*.jpg; where there are no test pictures, add --config.data.holdout=0.1 to
hold a tenth of train out. Arguments are those of `cifar10_b16.py`; here a run is of 1,000 steps of 128 pictures, enough
for some thousand.
"""

import cifar10_b16


def get_config(variant=""):
    config = cifar10_b16.get_config(variant, steps=1000)
    config.data.name = "folder:PATH"
    config.train.batch_size = 128
    config.optim.accumulate //= 4  # the same parts
    return config

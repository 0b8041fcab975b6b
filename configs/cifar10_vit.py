"""CIFAR-10 from scratch with at most 6.3M parameters: the recipe that `cifar100_vit.py` and `svhn_vit.py` share.

    python -m vit_jax.main --config configs/cifar10_vit.py
    python -m vit_jax.main --config configs/cifar10_vit.py:reference

`:reference` is the recipe of the published experiment "ViT-CIFAR" (6,268,810 parameters; its README: 90.92 % after 200
epochs, 2 h 14 min on a V100). Kept: sizes, epochs, batch, Adam with coupled L2, rate and its end, warm-up and cosine,
AutoAugment, crop and flip, label smoothing (0.1 spread over the other classes, so 1/9 over all ten). Not kept: a first
epoch at rate 0, scores divided by the root of the whole width, a second GELU after the MLP, decay of biases and norms,
PyTorch's initial weights, rotations in one direction only, half precision.

Ours is deeper and narrower, has a convolutional stem, rotary position embedding and mean pooling, and trains longer and
on mixed pictures; it computes in bfloat16, which a CPU does slowly: add --config.train.dtype=float32 there.
Neither has been run to its end: that wants a GPU.
"""

from vit_jax.config import default_config, variant_error


def get_config(variant=""):
    config = default_config()
    config.data.name = "cifar10"
    config.model.patch_size = 4
    config.augment.update({"crop": "pad", "padding": 4, "flip": True})
    if variant == "reference":
        config.model.update({"width": 384, "depth": 7, "num_heads": 12, "mlp_dim": 384})
        config.model.update({"pool": "cls", "gelu": "exact", "norm_epsilon": 1e-5, "head_zero_init": False})
        config.augment.policy = "autoaugment_cifar10"
        config.train.update({"batch_size": 128, "epochs": 200, "eval_every": 2, "label_smoothing": 1 / 9})
        config.optim.update({"name": "adam", "learning_rate": 1e-3, "weight_decay": 5e-5, "warmup_epochs": 5})
        config.optim.final_learning_rate = 1e-5
        config.checkpoint.every = 10
    elif variant:
        raise variant_error(variant, "reference")
    else:
        config.model.update({"width": 256, "depth": 11, "num_heads": 4, "mlp_dim": 512, "stem": "conv"})
        config.model.update({"position_embedding": "rotary", "qk_norm": True, "drop_path": 0.1})
        config.augment.update({"policy": "randaugment", "magnitude": 15.0, "erasing": 0.25})
        config.augment.update({"mixup": 0.8, "cutmix": 1.0, "mix_until": 0.9})
        config.train.update({"batch_size": 512, "epochs": 600, "eval_every": 10, "dtype": "bfloat16"})
        config.train.label_smoothing = 0.1
        config.optim.update({"name": "muon", "learning_rate": 3e-3, "weight_decay": 0.05, "warmup_epochs": 10})
        config.optim.update({"momentum": 0.95, "b2": 0.98})
        config.ema.decay = 0.9995
        config.checkpoint.every = 50
    return config

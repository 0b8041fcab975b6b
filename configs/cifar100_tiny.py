"""CIFAR-100 from scratch with 1.53M parameters (width 192, depth 6, patch 4).

    python -m vit_jax.main --config configs/cifar100_tiny.py
    python -m vit_jax.main --config configs/cifar100_tiny.py:cpu
    python -m vit_jax.main --config configs/cifar100_tiny.py:reference

`:reference` is the recipe of the published experiment "Tiny-ViT from scratch on CIFAR-100" (1,528,228 parameters; its
README: 62.58 %, the best test accuracy over 200 epochs, 10 minutes on an RTX 5090). Kept: sizes, epochs, batch, Adam
with coupled L2, warm-up and cosine, crop and flip, dropout. Not kept: the statistics of another data set, a first
epoch at rate 0, the choice of the epoch on test, decay of biases and norms, PyTorch's initial weights.

Of the reference only the beginning was run, on two cores of a Xeon (jax 0.10): the training loss, 4.61 for a guess, is
3.80 on average over steps 104 to 178 of a run of 300; 110 images/s with the cores to itself; 2.9 GB of memory.

`:cpu` is made for two cores and about three hours: a hybrid of 1,529,764 parameters, with a 3x3 depthwise convolution
in each MLP and rotary position embedding, that sees crops of 24 pixels (36 tokens in place of 64) for most of its 30
epochs, and CutMix in every second batch.

Our recipe has the same size (1,528,132 parameters: mean pooling, normalised queries and keys). Neither has been run to
its end yet: that wants a GPU.
"""

from vit_jax.config import default_config, variant_error


def get_config(variant=""):
    config = default_config()
    config.data.name = "cifar100"
    config.model.update({"patch_size": 4, "width": 192, "depth": 6, "num_heads": 8, "mlp_dim": 256})
    config.train.update({"batch_size": 256, "epochs": 200, "eval_every": 2})
    config.augment.update({"crop": "pad", "padding": 4, "flip": True})
    config.optim.warmup_epochs = 10
    config.checkpoint.every = 10
    if variant == "reference":
        config.model.update({"pool": "cls", "dropout": 0.1, "gelu": "exact", "norm_epsilon": 1e-5})
        config.model.head_zero_init = False
        config.optim.update({"name": "adam", "learning_rate": 1e-3, "weight_decay": 5e-4})
    elif variant == "cpu":
        config.model.update({"num_heads": 6, "mlp_conv": True, "position_embedding": "rotary", "qk_norm": True})
        config.augment.update({"small_size": 24, "small_until": 0.6})
        config.augment.update({"cutmix": 1.0, "mix_probability": 0.5, "mix_until": 0.85})
        config.train.update({"batch_size": 128, "epochs": 30, "eval_every": 3, "label_smoothing": 0.1})
        config.train.steps_per_call = 20
        config.optim.update({"name": "muon", "learning_rate": 1e-2, "weight_decay": 0.05, "warmup_epochs": 2})
        config.optim.update({"momentum": 0.95, "b2": 0.98})
        config.ema.decay = 0.999
        config.checkpoint.every = 0.5
    elif variant:
        raise variant_error(variant, "cpu", "reference")
    else:
        config.model.update({"qk_norm": True, "drop_path": 0.1})
        config.train.label_smoothing = 0.1
        config.optim.update({"name": "muon", "learning_rate": 1e-2, "weight_decay": 0.05})
        config.optim.update({"momentum": 0.95, "b2": 0.98})
        config.ema.decay = 0.999
    return config

from vit_jax.config import default_config, variant_error


def get_config(variant=""):
    config = default_config()
    config.data.name = "cifar10"
    config.model.update({"patch_size": 4, "width": 64, "depth": 4, "num_heads": 4, "mlp_dim": 256})
    config.train.epochs = 10
    if variant == "reference":
        config.model.update({"pool": "cls", "attention_dropout": 0.1, "gelu": "exact", "norm_epsilon": 1e-5})
        config.model.head_zero_init = False
        config.train.batch_size = 64
        config.optim.update({"name": "adam", "learning_rate": 3e-4, "schedule": "constant"})
    elif variant:
        raise variant_error(variant, "reference")
    else:
        config.model.qk_norm = True
        config.augment.flip = True
        config.train.update({"batch_size": 128, "label_smoothing": 0.1})
        config.optim.update({"name": "muon", "learning_rate": 1e-2, "weight_decay": 0.05, "warmup_epochs": 1})
        config.optim.update({"momentum": 0.95, "b2": 0.98})
        config.ema.decay = 0.99
    return config

from vit_jax.config import default_config, variant_error


def get_config(variant=""):
    config = default_config()
    config.data.name = "cifar100"
    config.model.update({"patch_size": 4, "width": 192, "depth": 6, "num_heads": 8, "mlp_dim": 256})
    config.train.epochs = 200
    config.augment.update({"crop": "pad", "padding": 4, "flip": True})
    if variant == "reference":
        config.model.update(
            {"pool": "cls", "dropout": 0.1, "gelu": "exact", "norm_epsilon": 1e-5, "head_zero_init": False}
        )
        config.train.batch_size = 256
        config.optim.update({"name": "adam", "learning_rate": 1e-3, "weight_decay": 5e-4, "warmup_epochs": 10})
    elif variant:
        raise variant_error(variant, "reference")
    else:
        config.train.update({"batch_size": 256, "label_smoothing": 0.1})
        config.model.drop_path = 0.1
        config.optim.update({"name": "muon", "learning_rate": 1e-2, "weight_decay": 0.05, "warmup_epochs": 10})
        config.optim.update({"momentum": 0.95, "b2": 0.98})
        config.ema.decay = 0.999
    return config

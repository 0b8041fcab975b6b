"""Every field of a config, in one place: its meaning, unit, default and check.

A config is an `ml_collections.ConfigDict` with the groups below; `None` means "not set". `command_line.py` reads it.
"""

import dataclasses
import difflib
from collections.abc import Callable, Mapping
from typing import Any

from ml_collections import ConfigDict

from vit_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Field:
    """One field: default, type, whether None is allowed, what it means, and which values are allowed."""

    default: Any
    kind: type | tuple[type, ...]
    meaning: str
    allowed: str
    check: Callable[[Any], bool]
    optional: bool = False


def whole(default: int | None, meaning: str, minimum: int = 1, maximum: int = 2**31 - 1) -> Field:
    allowed = f"a whole number of at least {minimum} and at most {maximum}"
    return Field(default, int, meaning, allowed, lambda v: minimum <= v <= maximum, optional=default is None)


def names(meaning: str) -> Field:
    return Field((), tuple, meaning, "texts in brackets, as ('a','b')", lambda v: all(isinstance(x, str) for x in v))


def probability(default: float, meaning: str) -> Field:
    return Field(default, float, meaning, "a number of at least 0 and at most 1", lambda v: 0 <= v <= 1)


def real(default: float | None, meaning: str) -> Field:
    allowed = "a number of at least 0"
    return Field(default, float, meaning, allowed, lambda v: 0 <= v < float("inf"), optional=default is None)


def fraction(default: float, meaning: str) -> Field:
    return Field(default, float, meaning, "a number of at least 0 and below 1", lambda v: 0 <= v < 1)


def positive(default: float | None, meaning: str) -> Field:
    allowed = "a number above 0"
    return Field(default, float, meaning, allowed, lambda v: 0 < v < float("inf"), optional=default is None)


def choice(default: str | None, meaning: str, *options: str) -> Field:
    allowed = "one of " + ", ".join(options)
    return Field(default, str, meaning, allowed, lambda v: v in options, optional=default is None)


def text(default: str | None, meaning: str) -> Field:
    return Field(default, str, meaning, "a text", lambda v: True, optional=default is None)


def switch(default: bool, meaning: str) -> Field:
    return Field(default, bool, meaning, "True or False", lambda v: True)


def tracker_names(value: str | tuple[str, ...]) -> list[str]:
    """Names in brackets, or in one text with commas; each once."""
    given = value.split(",") if isinstance(value, str) else value
    return list(dict.fromkeys(name.strip() for name in given if name.strip()))


def numbers(meaning: str, check: Callable[[float], bool], allowed: str) -> Field:
    return Field((), tuple, meaning, allowed, lambda v: all(isinstance(x, float) and check(x) for x in v))


def _is_pair(value: Any) -> bool:
    return isinstance(value, tuple) and tuple(map(type, value)) == (str, float)


TRACKERS = ("wandb", "mlflow", "comet")
FIELDS: dict[str, Field] = {
    # The model. What is left unset is taken from the preset.
    "model.preset": text(
        "", "size and patch, such as Ti/16, B/32, or a hybrid, R50+B/16; fills what is unset of the shape"
    ),
    "model.patch_size": whole(None, "side of a patch, pixels"),
    "model.width": whole(None, "length of a token's vector"),
    "model.depth": whole(None, "number of encoder blocks"),
    "model.num_heads": whole(None, "attention heads; divides the width"),
    "model.mlp_dim": whole(None, "hidden width of the MLP"),
    "model.pool": choice(
        "gap", "what the head reads: the class token, the tokens' mean, or a learned mean", "cls", "gap", "seq"
    ),
    "model.position_embedding": choice(
        "learned",
        "one learned vector a token, fixed 2-D sines and cosines, queries and keys turned by row and column, or none",
        "learned",
        "sincos2d",
        "rotary",
        "none",
    ),
    "model.stem": choice(
        None,
        "one convolution a patch, stride-2 3x3 convolutions, patches beside their shifted selves (SPT), or a ResNet; "
        "unset: the preset's, else patch",
        "patch",
        "conv",
        "shifted",
        "resnet",
    ),
    "model.resnet_blocks": Field(
        None,
        tuple,
        "units in each stage of the ResNet stem, () for its root alone; unset: the preset's",
        "whole numbers in brackets, as (3,4,9)",
        lambda v: all(type(x) is int and 0 < x < 100 for x in v),
        optional=True,
    ),
    "model.dropout": fraction(0.0, "dropout rate, to 1/256, after the position embedding, attention and in the MLP"),
    "model.attention_dropout": fraction(0.0, "dropout rate, to 1/256, of the attention probabilities"),
    "model.drop_path": fraction(0.0, "stochastic depth: chance to skip the last block; linear from 0 at the first"),
    "model.gelu": choice(
        None, "GELU by its tanh approximation, or exact; unset: as init.checkpoint says, else tanh", "tanh", "exact"
    ),
    "model.norm_epsilon": positive(None, "epsilon of the norms; unset: as init.checkpoint says, else 1e-6"),
    "model.layer_scale": real(0.0, "initial LayerScale of each residual branch; 0: none"),
    "model.qk_norm": switch(False, "layer-normalise queries and keys, head by head"),
    "model.learned_temperature": switch(False, "learn how sharp attention is, head by head (LSA)"),
    "model.mask_self": switch(False, "no token attends to itself (LSA)"),
    "model.mlp_conv": switch(False, "3x3 depthwise convolution in the MLP: a hybrid, no plain ViT"),
    "model.head_zero_init": switch(True, "start the head at zero"),
    "model.representation_size": whole(0, "width of a tanh layer before the head (pre_logits); 0: none", minimum=0),
    "model.remat": switch(False, "recompute each block's activations in the backward pass: less memory, more time"),
    # The pictures.
    "data.name": text("digits", "digits, cifar10, cifar100, svhn, tiny_imagenet, tfds:NAME or folder:PATH"),
    "data.dir": text(None, "where data sets and their caches lie; unset: $TFDS_DATA_DIR or ~/tensorflow_datasets"),
    "data.holdout": fraction(0.0, "fraction of train that is held out for choices, class by class"),
    "data.image_size": whole(None, "side of the model's square input, pixels; unset: the data's own"),
    "data.train_examples": whole(None, "train on this many pictures only, chosen class by class; unset: on all"),
    "data.skip_unreadable": switch(False, "leave out a folder's unreadable pictures (they are listed), or stop"),
    "data.resident": choice(
        "auto", "pictures lie on the devices, or stream from the disk; auto: where they fit", "auto", "always", "never"
    ),
    "data.mean": numbers(
        "a mean a channel, in [0, 1]; empty: as init.checkpoint says, else the training pictures' own; 0.5 with "
        "deviation 0.5: inputs in [-1, 1]",
        lambda x: 0 <= x <= 1,
        "numbers from 0 to 1 in brackets, as (0.5,0.5,0.5)",
    ),
    "data.std": numbers(
        "a deviation a channel; empty: as init.checkpoint says, else the training pictures' own",
        lambda x: 0 < x < float("inf"),
        "numbers above 0 in brackets, as (0.5,0.5,0.5)",
    ),
    # What training pictures go through, on the device.
    "augment.crop": choice(
        "none", "random crop of the zero-padded picture, or of a random area resized", "none", "pad", "resized"
    ),
    "augment.padding": whole(4, "zero padding on each side for crop=pad, pixels", minimum=0, maximum=256),
    "augment.small_size": whole(0, "side of the crops in the first part of the run, pixels; 0: the model's", minimum=0),
    "augment.small_until": probability(0.5, "share of the run that trains on augment.small_size"),
    "augment.min_area": Field(
        0.08, float, "smallest area for crop=resized, fraction of the picture", "in (0, 1]", lambda v: 0 < v <= 1
    ),
    "augment.flip": switch(False, "mirror left to right at random; not for digits"),
    "augment.policy": choice(
        "none",
        "learned or random operations on colour and geometry",
        "none",
        "autoaugment_cifar10",
        "autoaugment_svhn",
        "autoaugment_imagenet",
        "randaugment",
        "trivialaugment",
        "3augment",
    ),
    "augment.num_ops": whole(2, "randaugment: operations a picture, one after another", maximum=16),
    "augment.magnitude": Field(9.0, float, "randaugment: strength", "from 0 to 30", lambda v: 0 <= v <= 30),
    "augment.magnitude_std": Field(
        0.0, float, "randaugment: deviation of the strength", "from 0 to 30", lambda v: 0 <= v <= 30
    ),
    "augment.operations": names("randaugment, trivialaugment: the operations to choose from; empty: their usual 14"),
    "augment.crop_paste": switch(False, "blend a random box of each picture into it elsewhere"),
    "augment.erasing": probability(0.0, "chance that a box of a picture is erased"),
    "augment.erasing_fill": choice("pixel", "what erased boxes hold: random levels, or data.mean", "pixel", "mean"),
    "augment.mixup": real(0.0, "alpha of mixup's Beta(alpha, alpha): two pictures blended; 0: none"),
    "augment.cutmix": real(0.0, "alpha of CutMix's Beta(alpha, alpha): a box of another picture; 0: none"),
    "augment.cutmix_share": probability(0.5, "where mixup and CutMix are both on: the chance of CutMix"),
    "augment.mix_probability": probability(1.0, "chance that a batch (an example) is mixed at all"),
    "augment.mix_by": choice("batch", "one draw for all of a batch, or one an example", "batch", "example"),
    "augment.mix_until": probability(1.0, "share of the run after which pictures are mixed no more"),
    "augment.repeats": whole(
        1, "times that a batch holds each of its pictures, augmented anew; an epoch then reads as many times fewer"
    ),
    # The run.
    "train.batch_size": whole(128, "pictures an optimizer step, over all devices"),
    "train.epochs": positive(None, "length of the run in epochs; or set train.steps"),
    "train.steps": whole(None, "length of the run in optimizer steps; or set train.epochs"),
    "train.seed": whole(0, "seed of initial weights, order, augmentation and dropout", minimum=0),
    "train.label_smoothing": fraction(0.0, "probability spread evenly over all classes"),
    "train.dtype": choice("float32", "what the network computes in; parameters stay float32", "float32", "bfloat16"),
    "train.steps_per_call": whole(0, "training steps a dispatch; 0: two seconds' worth, or 512", 0, maximum=512),
    "train.eval_every": positive(1.0, "epochs between evaluations"),
    "train.patience": whole(
        0, "stop after this many evaluations without a better held-out accuracy; 0: never", minimum=0
    ),
    "train.skip_nonfinite": whole(
        0, "updates that may be left out because loss or gradient are not finite; one more ends the run", minimum=0
    ),
    "train.trackers": Field(
        (),
        (str, tuple),
        "where the run is also recorded, each by its own library (an extra)",
        f"any of {', '.join(TRACKERS)}, as wandb,mlflow or ('wandb','mlflow')",
        lambda v: (isinstance(v, str) or all(isinstance(x, str) for x in v)) and set(tracker_names(v)) <= set(TRACKERS),
    ),
    # The optimizer.
    "optim.name": choice(
        "adamw", "adam adds weight decay to the gradient (L2); muon: block matrices", "adamw", "adam", "sgd", "muon"
    ),
    "optim.learning_rate": positive(1e-3, "peak learning rate"),
    "optim.weight_decay": real(0.0, "decay of matrices; not of biases, norms, cls and position embeddings"),
    "optim.momentum": fraction(0.9, "momentum of sgd and muon"),
    "optim.momentum_dtype": choice("float32", "what momentum and first moments are kept in", "float32", "bfloat16"),
    "optim.b2": fraction(0.999, "decay of Adam's second moment (adamw, adam, and what muon leaves to AdamW)"),
    "optim.warmup_epochs": real(None, "linear warm-up from 0, epochs; or set optim.warmup_steps"),
    "optim.warmup_steps": whole(None, "linear warm-up from 0, steps; or set optim.warmup_epochs", minimum=0),
    "optim.schedule": choice("cosine", "after warm-up: to the final rate, or constant", "cosine", "linear", "constant"),
    "optim.final_learning_rate": real(0.0, "what cosine and linear schedules end at; at most optim.learning_rate"),
    "optim.clip_norm": real(0.0, "largest global gradient norm; 0: no clipping"),
    "optim.accumulate": whole(
        0,
        "parts of a batch whose gradients are averaged, one after the other; 0: as many as fit a CPU's cache, else 1",
        0,
    ),
    # Weights that are averaged, saved and started from.
    "ema.decay": fraction(0.0, "exponential moving average of the weights, a step; 0: none"),
    "checkpoint.every": positive(1.0, "epochs between checkpoints"),
    "checkpoint.keep": whole(2, "latest checkpoints kept (the best one besides)", minimum=2),
    "init.checkpoint": text(
        "", "start from these weights: a .npz or .safetensors file (a path or a URL), or another run's workdir"
    ),
    "init.skip": names("regexes of parameters that start new, and of arrays of init.checkpoint that are left out"),
    "init.resample_patches": switch(False, "resample the patch embedding where init.checkpoint has another patch size"),
    "init.multipliers": Field(
        "full",
        (str, tuple),
        "what is trained: a preset, or pairs of a regex of parameters and what their learning rate is multiplied by, "
        "first match wins, 0: frozen",
        "full, head, mlp, attention, layers:DECAY as layers:0.75, or pairs as (('^head/',1),('.*',0))",
        lambda v: isinstance(v, str) or v and all(map(_is_pair, v)),
    ),
    # Devices.
    "mesh.data": Field(
        -1, int, "devices that share a batch; -1: all", "-1 or a whole number of at least 1", lambda v: v == -1 or v > 0
    ),
    "mesh.model": whole(1, "devices that share each matrix product, by attention head and MLP unit; divides both"),
    "mesh.fsdp": switch(False, "each device keeps a part of weights, optimizer and average, not all of them"),
    "mesh.shard_data": choice(
        "auto", "each device holds a share of the training pictures; auto: above 2 GiB", "auto", "always", "never"
    ),
}

# Giving the one clears the other.
EITHER = {
    "train.epochs": "train.steps",
    "train.steps": "train.epochs",
    "optim.warmup_epochs": "optim.warmup_steps",
    "optim.warmup_steps": "optim.warmup_epochs",
}
# Filled in from the data, or measured, where they are left at these defaults.
AUTOMATIC = (
    *("model.gelu", "model.norm_epsilon", "data.image_size", "data.mean", "data.std"),
    *("train.steps_per_call", "optim.accumulate"),
)
# Their pictures mean something else when mirrored.
SYMBOLS = ("digits", "svhn", "tfds:svhn_cropped", "tfds:mnist", "tfds:mnist_corrupted", "tfds:emnist", "tfds:kmnist")
# Where and how a run runs: these may change between its start and its resume.
CHANGEABLE = ("mesh.", "data.dir", "data.resident", "checkpoint.", "train.trackers", "train.skip_nonfinite")


def default_config() -> ConfigDict:
    """Returns a config with every field at its default, locked against unknown fields."""
    groups: dict[str, dict[str, Any]] = {}
    for path, field in FIELDS.items():
        group, name = path.split(".")
        groups.setdefault(group, {})[name] = field.default
    return ConfigDict(groups, type_safe=False).lock()


def get(config: ConfigDict, path: str) -> Any:
    group, name = path.split(".")
    return config[group][name]


def put(config: ConfigDict, path: str, value: Any) -> None:
    group, name = path.split(".")
    config[group][name] = value


def variant_error(variant: str, *known: str) -> UserError:
    """What `get_config` raises for an argument that it does not know."""
    return UserError(f"unknown variant {variant!r} of this config; known: {', '.join(known)} (or none)")


# Checking a config


def check(config: ConfigDict) -> None:
    """Brings every field to its type and checks it, alone and together with the others.

    Raises:
      UserError: names the first field that is wrong, its value and the allowed ones.
    """
    for path in [f"{group}.{name}" for group, fields in config.items() for name in _names(group, fields)]:
        if path not in FIELDS:
            raise unknown(path)
    for path, field in FIELDS.items():
        try:
            value = get(config, path)
        except KeyError:
            raise UserError(f"the config lacks the field {path}: it must start from default_config()") from None
        put(config, path, checked(path, field, value))
    model, data, train, optim = config.model, config.data, config.train, config.optim
    if (train.epochs is None) == (train.steps is None):
        raise UserError("set one of train.epochs and train.steps")
    if optim.warmup_epochs is not None and optim.warmup_steps is not None:
        raise UserError("set only one of optim.warmup_epochs and optim.warmup_steps")
    if optim.accumulate and train.batch_size % optim.accumulate:
        raise UserError(f"train.batch_size={train.batch_size} is not divisible by optim.accumulate={optim.accumulate}")
    if model.width and model.num_heads and model.width % model.num_heads:
        raise UserError(f"model.width={model.width} is not divisible by model.num_heads={model.num_heads}")
    if data.image_size and model.patch_size and data.image_size % model.patch_size:
        raise UserError(f"data.image_size={data.image_size} is not divisible by model.patch_size={model.patch_size}")
    if config.augment.flip and data.name.split("/")[0] in SYMBOLS:
        raise UserError(f"augment.flip=True would mirror the symbols of {data.name}: set augment.flip=False")
    _check_augment(config)
    _check_init(config)
    if optim.final_learning_rate > optim.learning_rate:
        raise UserError(
            f"optim.final_learning_rate={optim.final_learning_rate} is above optim.learning_rate={optim.learning_rate}"
        )
    if train.patience and not data.holdout:
        raise UserError("train.patience needs held-out pictures to watch: set data.holdout, 0.1 for example")
    if data.mean and data.std and len(data.mean) != len(data.std):
        raise UserError(f"data.mean has {len(data.mean)} channels and data.std has {len(data.std)}")


def _check_init(config: ConfigDict) -> None:
    for field in ("skip", "resample_patches"):
        if config.init[field] and not config.init.checkpoint:
            raise UserError(f"init.{field} is for the weights of init.checkpoint: set that, or leave init.{field} out")
    blocks, stem = config.model.resnet_blocks, config.model.stem
    if blocks and stem != "resnet" and not (stem is None and config.model.preset):
        raise UserError(f"model.resnet_blocks={blocks} is for model.stem=resnet: set that too, or leave it out")


def _check_augment(config: ConfigDict) -> None:
    augment, batch_size = config.augment, config.train.batch_size
    for field, policies in (
        ("num_ops", ("randaugment",)),
        ("magnitude", ("randaugment",)),
        ("magnitude_std", ("randaugment",)),
        ("operations", ("randaugment", "trivialaugment")),
    ):
        if augment[field] != FIELDS[f"augment.{field}"].default and augment.policy not in ("none", *policies):
            raise UserError(
                f"augment.{field}={augment[field]} is for augment.policy={' or '.join(policies)}, not "
                f"{augment.policy}: set augment.{field}={FIELDS[f'augment.{field}'].default}"
            )
    _check_small_size(config)
    if batch_size % augment.repeats:
        raise UserError(f"train.batch_size={batch_size} is not divisible by augment.repeats={augment.repeats}")
    if (augment.mixup or augment.cutmix) and batch_size // augment.repeats < 2:
        of = f" with augment.repeats={augment.repeats}" if augment.repeats > 1 else ""
        raise UserError(
            f"train.batch_size={batch_size}{of} holds one example, which has no other to mix with: "
            "set a larger one, or augment.mixup=0 and augment.cutmix=0"
        )


def _check_small_size(config: ConfigDict) -> None:
    small, size, patch_size = config.augment.small_size, config.data.image_size, config.model.patch_size
    if not small:
        return
    if config.augment.crop != "pad":
        raise UserError(f"augment.small_size={small} needs augment.crop=pad, which cuts smaller crops")
    if config.model.position_embedding == "sincos2d":
        raise UserError(f"augment.small_size={small} does not go with the fixed table of position_embedding=sincos2d")
    if patch_size and small % patch_size:
        raise UserError(f"augment.small_size={small} is not divisible by model.patch_size={patch_size}")
    if size and small >= size:
        raise UserError(f"augment.small_size={small} is not smaller than the pictures: data.image_size={size}")


def _names(group: str, fields: Any) -> list[str]:
    if not isinstance(fields, ConfigDict):
        raise UserError(f"the config's group {group!r} must hold fields, not be {fields!r}")
    return list(fields)


def unknown(path: str) -> UserError:
    near = difflib.get_close_matches(path, FIELDS, 1, cutoff=0.0)[0]
    return UserError(f"unknown config field {path!r}; the nearest is {near!r}")


def checked(path: str, field: Field, value: Any) -> Any:
    if value is None and field.optional:
        return None
    given = value
    value = _plain(value, path != "model.resnet_blocks" and field.kind is not int)
    right_type = isinstance(value, field.kind) and (field.kind is bool or not isinstance(value, bool))
    if not right_type or not field.check(value):
        raise UserError(f"{path}={given!r} is not allowed: it must be {field.allowed}")
    return value


def _plain(value: Any, floats: bool) -> Any:
    """Lists as tuples, and where `floats` are wanted whole numbers as such."""
    if isinstance(value, list | tuple):
        return tuple(_plain(x, floats) for x in value)
    small = isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**1000
    return float(value) if floats and small else value


# A run's own config


def to_dict(config: ConfigDict) -> dict[str, dict[str, Any]]:
    """The config as plain dictionaries, lists and numbers, as JSON holds them."""
    return {
        group: {name: list(v) if isinstance(v, tuple) else v for name, v in fields.items()}
        for group, fields in config.to_dict().items()
    }


def from_dict(values: Mapping[str, Any]) -> ConfigDict:
    """The config that `to_dict` wrote; other groups are ignored. Raises UserError where a field is missing or wrong."""
    config = default_config()
    for path in FIELDS:
        group, name = path.split(".")
        if name not in values.get(group, {}):
            if path.startswith(CHANGEABLE):  # newer than the run, which does not hang on it
                continue
            raise UserError(f"the stored config lacks the field {path}: it is of another version of vit_jax")
        put(config, path, checked(path, FIELDS[path], values[group][name]))
    check(config)
    return config


def differences(config: ConfigDict, stored: ConfigDict) -> list[str]:
    """The fields in which a run's config differs from the stored one, apart from those that may and the unset ones."""
    found = []
    for path, field in FIELDS.items():
        now, there = get(config, path), get(stored, path)
        automatic = path in AUTOMATIC and now == field.default
        if now != there and not automatic and not path.startswith(CHANGEABLE):
            found.append(f"{path} ({there!r} there, {now!r} now)")
    return found

"""From a config and its data to the parts of a run: the resolved config, the plan of its steps, the model, the task."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from vit_jax.analysis.metrics import peak_flops
from vit_jax.augment.mix import Mixing
from vit_jax.augment.policies import Policy
from vit_jax.config import check, get, put
from vit_jax.data.load import load_splits
from vit_jax.data.splits import Split, Splits
from vit_jax.errors import UserError
from vit_jax.models.presets import preset
from vit_jax.models.pretrained import Facts
from vit_jax.models.vit import VisionTransformer
from vit_jax.training import dispatch, processes
from vit_jax.training import mesh as meshes
from vit_jax.training.cost import flops_per_image
from vit_jax.training.optim import make_optimizer, make_schedule
from vit_jax.training.rules import (
    EVERYTHING,
    Rules,
    check_rules,
    multiplier_rules,
    partition,
    path_name,
)
from vit_jax.training.step import Augmentation, Classifier, Probe, Task

MOST_STEPS = 2**31 - 1  # the step is an int32
MOST_EVENTS = 1_000_000  # evaluations, or checkpoints, of a run
SMALLEST_EVALUATION = 64  # pictures at once
MOST_ON_EACH = 2 * 2**30  # bytes of training pictures that every device has all of
MOST_OF_MEMORY = 1 / 2  # of a device, that training pictures take
MOST_WATCHED = 1 / 8  # of each device, that pictures to evaluate on take
CACHED = 2**18  # numbers: what the tokens of pictures that are computed together come to, a MiB
SMALLEST_PART = 8  # pictures
MODEL_DEFAULTS = {"gelu": "tanh", "norm_epsilon": 1e-6}  # where nothing else is known of the weights


@dataclasses.dataclass(frozen=True)
class Plan:
    """The steps of a run: how many, how many warm up, after which ones it evaluates and saves, how many are small."""

    total: int
    warmup: int
    evaluations: frozenset[int]
    checkpoints: frozenset[int]
    small: int = 0

    def evaluations_until(self, step: int) -> set[int]:
        return {s for s in self.evaluations if s <= step}

    def next_stop(self, step: int, steps_per_call: int) -> int:
        """Where the dispatch that starts at `step` ends; the same steps, wherever a run was resumed."""
        stop = (step // steps_per_call + 1) * steps_per_call
        between = range(step + 1, min(stop, self.total) + 1)
        ends = (s for s in between if s in self.evaluations or s in self.checkpoints or s == self.small)
        return next(ends, between[-1])


@dataclasses.dataclass(frozen=True)
class Job:
    """What a resolved config comes to on its data and devices.

    Attributes:
      schedule: step → learning rate.
      notes: what a person should be told about the plan.
    """

    config: ConfigDict
    plan: Plan
    task: Task
    schedule: Callable[[int], Any]
    notes: list[str]

    @property
    def classifier(self) -> Classifier:
        return self.task.classifier

    @property
    def rules(self) -> Rules:
        return self.task.multipliers

    @property
    def flops(self) -> float | None:
        """Model FLOPs of a training step for one picture; None where a part is frozen: the formula is for all."""
        return flops_per_image(self.classifier) if self.rules == EVERYTHING else None

    def mfu(self, images_per_second: float) -> float | None:
        """The part of the devices' peak that a speed comes to; None where the FLOPs or the peak are unknown."""
        peak = peak_flops(jax.devices()[0].device_kind)
        return peak and self.flops and images_per_second * self.flops / (peak * self.classifier.mesh.size)


def make_job(config: ConfigDict, train: Split, mesh: Mesh) -> Job:
    """The job of a config that `resolve_data` has resolved. Raises UserError where its parts do not fit together."""
    plan, notes = make_plan(config, len(train.labels))
    classifier = make_classifier(config, len(train.class_names), mesh)
    rules = make_rules(config, classifier)
    classifier = as_probe(config, classifier, rules)
    task, schedule = make_task(config, classifier, plan, rules)
    return Job(config, plan, task, schedule, notes)


def facts(config: ConfigDict) -> Facts:
    """How the weights of a resolved config are made: what a file of them says of itself."""
    model, data = config.model, config.data
    made = {name: model[name] for name in ("norm_epsilon", "gelu", "num_heads", "position_embedding", "mask_self")}
    return Facts(mean=tuple(data.mean), std=tuple(data.std), **made)


def load_data(config: ConfigDict) -> Splits:
    """The splits that the config names, from the cache or prepared first."""
    data = config.data
    return load_splits(
        data.name,
        data_dir=data.dir,
        holdout=data.holdout,
        train_examples=data.train_examples,
        image_size=data.image_size,
        skip_unreadable=data.skip_unreadable,
    )


def resolve_model(config: ConfigDict) -> ConfigDict:
    """A copy of the config in which the preset has filled the model's unset fields.

    Raises:
      UserError: the preset or an operation of the policy is unknown, or a field stays unset.
    """
    config = config.copy_and_resolve_references()
    shape = {"stem": "patch"} | (preset(config.model.preset) if config.model.preset else {})
    for name in ("stem", "patch_size", "width", "depth", "num_heads", "mlp_dim"):
        if config.model[name] is None:
            if name not in shape:
                raise UserError(f"model.{name} is not set: set it, or model.preset")
            config.model[name] = shape[name]
    if config.model.resnet_blocks is None:
        config.model.resnet_blocks = shape.get("resnet_blocks", ()) if config.model.stem == "resnet" else ()
    make_policy(config)
    if multiplier_rules(config.init.multipliers, config.model.depth) != EVERYTHING and not config.init.checkpoint:
        raise UserError(
            "init.multipliers is for weights that are there already: set init.checkpoint too, or leave it at full"
        )
    return config


def resolve_data(config: ConfigDict, train: Split, mesh: Mesh) -> ConfigDict:
    """A copy of the config in which all that was left automatic is filled, but for `train.steps_per_call`.

    Raises:
      UserError: the config does not fit the data or the devices.
    """
    config = config.copy_and_resolve_references()
    for name, value in MODEL_DEFAULTS.items():
        if config.model[name] is None:
            config.model[name] = value
    height, width, channels = train.images.shape[1:]
    if config.data.image_size is None:
        if height != width:
            raise UserError(f"the pictures of {config.data.name} are {height}x{width}, not square: set data.image_size")
        config.data.image_size = height
    for name in ("mean", "std"):
        if not get(config, f"data.{name}"):
            put(config, f"data.{name}", getattr(train, name))
        if len(get(config, f"data.{name}")) == 1:
            put(config, f"data.{name}", get(config, f"data.{name}") * channels)
        if len(get(config, f"data.{name}")) != channels:
            raise UserError(f"data.{name} needs one number, or {channels}, one a channel of {config.data.name}")
        if name == "std" and 0 in config.data.std:
            raise UserError(f"the training pictures of {config.data.name} are of one colour: set data.std")
    check(config)
    small, size = config.augment.small_size, config.data.image_size
    if small and min(height, width) * small < size:
        raise UserError(
            f"augment.small_size={small} of data.image_size={size} is less than a pixel of {height}x{width} pictures"
        )
    data, model = mesh.shape["data"], mesh.shape["model"]
    if not config.optim.accumulate:
        config.optim.accumulate = _parts_for_a_cache(config, mesh)
    if part_size(config) % data:
        of = f" / optim.accumulate={config.optim.accumulate}" if config.optim.accumulate > 1 else ""
        by = f"the {data} devices of mesh.data"
        raise UserError(f"train.batch_size={config.train.batch_size}{of} is not divisible by {by}")
    for name in ("num_heads", "mlp_dim"):
        if config.model[name] % model:
            raise UserError(f"model.{name}={config.model[name]} is not divisible by mesh.model={model}")
    return config


def _parts_for_a_cache(config: ConfigDict, mesh: Mesh) -> int:
    """Parts of a batch so small that a CPU's cache holds the tokens of one; elsewhere one part."""
    if mesh.devices.flat[0].platform != "cpu":
        return 1
    batch, devices, model = config.train.batch_size, mesh.shape["data"], config.model
    tokens = (config.data.image_size // model.patch_size) ** 2
    most = max(CACHED // (tokens * model.width), SMALLEST_PART)
    sizes = [size for size in range(devices, min(most, batch) + 1, devices) if batch % size == 0]
    return batch // max(sizes, default=batch)


def placement(config: ConfigDict, split: Split, mesh: Mesh) -> str:
    """Where a split's pictures lie: "whole" on every device, "shared" among them, or "streamed" from the disk."""
    how, size = config.mesh.shard_data, split.images.nbytes
    shared = how == "always" or how == "auto" and size > MOST_ON_EACH
    share = size // mesh.shape["data"] if shared else size
    if _streamed(config, share, MOST_OF_MEMORY, mesh):
        return "streamed"
    return "shared" if shared else "whole"


def _streamed(config: ConfigDict, size: int, most: float, mesh: Mesh) -> bool:
    """Whether pictures that would take `size` bytes of each device are read from the disk when they are needed."""
    if config.data.resident == "auto":
        return size > most * processes.of_first(meshes.memory_bytes(mesh))  # so that all decide the same
    return config.data.resident == "never"


def make_plan(config: ConfigDict, examples: int) -> tuple[Plan, list[str]]:
    """The plan of a run on `examples` training pictures, and what a person should be told about it."""
    train, optim = config.train, config.optim

    def steps(epochs: float) -> int:
        count = epochs * examples / train.batch_size
        if count > MOST_STEPS:
            raise UserError(f"{epochs:g} epochs are {count:.3g} steps: {MOST_STEPS} are the most")
        return round(count)

    def every(epochs: float, total: int) -> frozenset[int]:
        interval = max(epochs * examples / train.batch_size, 1.0)
        if total / interval > MOST_EVENTS:
            raise UserError(
                f"train.eval_every or checkpoint.every={epochs:g} epochs comes {total / interval:.3g} times in a run "
                f"of {total} steps: {MOST_EVENTS} are the most"
            )
        return frozenset(round(i * interval) for i in range(1, int(total / interval) + 1)) | {total}

    total = train.steps if train.steps is not None else max(steps(train.epochs), 1)
    notes = []
    if optim.warmup_steps is not None:
        warmup = optim.warmup_steps
        if warmup >= total:
            raise UserError(f"optim.warmup_steps={warmup} leaves nothing of a run of {total} steps")
    else:
        asked = steps(optim.warmup_epochs or 0.0)
        warmup = min(asked, round(total / 10))
        if warmup < asked:
            notes.append(f"warm-up cut from {asked} to {warmup} steps, a tenth of the run")
    small = round(config.augment.small_until * total) if config.augment.small_size else 0
    return Plan(total, warmup, every(train.eval_every, total), every(config.checkpoint.every, total), small), notes


def part_size(config: ConfigDict) -> int:
    """How many pictures the model sees at once in training."""
    return config.train.batch_size // config.optim.accumulate


def evaluation_size(config: ConfigDict) -> int:
    """How many it sees at once in evaluation: several parts where these are small, for no gradient is kept."""
    part = part_size(config)
    return part * -(-SMALLEST_EVALUATION // part)


def make_classifier(config: ConfigDict, num_classes: int, mesh: Mesh) -> Classifier:
    """The model of a resolved config with its input's size and statistics; UserError where they do not fit."""
    fields = {name: value for name, value in config.model.items() if name != "preset"}
    model = VisionTransformer(num_classes=num_classes, dtype=jnp.dtype(config.train.dtype), **fields)
    data = config.data
    model.check(data.image_size, data.image_size)
    return Classifier(model, data.image_size, tuple(data.mean), tuple(data.std), mesh)


def make_evaluator(config: ConfigDict, classifier: Classifier, split: Split) -> Callable[[Any], dict[str, np.ndarray]]:
    """See `dispatch.make_evaluator`."""
    streamed = _streamed(config, split.images.nbytes, MOST_WATCHED, classifier.mesh)
    return dispatch.make_evaluator(classifier, split, evaluation_size(config), streamed)


def make_rules(config: ConfigDict, classifier: Classifier) -> Rules:
    """What is trained of a classifier, and how fast. Raises UserError where the rules do not suit its parameters."""
    rules = multiplier_rules(config.init.multipliers, config.model.depth)
    check_rules(rules, classifier.shapes())
    return rules


def as_probe(config: ConfigDict, classifier: Classifier, rules: Rules) -> Classifier:
    """The classifier as a Probe, where only its head is trained and the trunk sees the same in every epoch."""
    model, augment = config.model, config.augment
    changing = [augment.crop != "none", augment.flip, augment.policy != "none", augment.crop_paste, augment.erasing]
    changing += [augment.mixup, augment.cutmix, model.dropout, model.attention_dropout, model.drop_path]
    trained, _ = partition(classifier.shapes(), rules)
    names = [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(trained)]
    if any(changing) or not all(name.startswith("head/") for name in names):
        return classifier
    return Probe(classifier.model, classifier.image_size, classifier.mean, classifier.std, classifier.mesh)


def make_task(config: ConfigDict, classifier: Classifier, plan: Plan, rules: Rules = EVERYTHING) -> tuple[Task, Any]:
    """The training task of a resolved config, and its schedule (step → learning rate)."""
    optim = config.optim
    if plan.small:
        classifier.model.check(config.augment.small_size, config.augment.small_size)
    schedule = make_schedule(optim.schedule, optim.learning_rate, plan.warmup, plan.total, optim.final_learning_rate)
    optimizer = make_optimizer(
        optim.name,
        schedule,
        weight_decay=optim.weight_decay,
        momentum=optim.momentum,
        b2=optim.b2,
        clip_norm=optim.clip_norm,
        momentum_dtype=optim.momentum_dtype,
        multipliers=rules,
    )
    task = Task(
        classifier,
        optimizer,
        make_augmentation(config, plan),
        label_smoothing=config.train.label_smoothing,
        accumulate=optim.accumulate,
        ema_decay=config.ema.decay,
        seed=config.train.seed,
        multipliers=rules,
        fsdp=config.mesh.fsdp,
        skip_nonfinite=config.train.skip_nonfinite,
    )
    return task, schedule


def make_policy(config: ConfigDict) -> Policy | None:
    """The learned or random operations of a config; UserError for one that is unknown."""
    augment = config.augment
    if augment.policy == "none":
        return None
    return Policy(
        augment.policy, augment.num_ops, augment.magnitude, augment.magnitude_std, only=tuple(augment.operations)
    )


def make_augmentation(config: ConfigDict, plan: Plan) -> Augmentation:
    """What the training pictures of a resolved config go through."""
    augment = config.augment
    mixing = None
    if augment.mixup or augment.cutmix:
        mixing = Mixing(
            mixup=augment.mixup,
            cutmix=augment.cutmix,
            probability=augment.mix_probability,
            cutmix_share=augment.cutmix_share,
            per_example=augment.mix_by == "example",
        )
    return Augmentation(
        crop=augment.crop,
        padding=augment.padding,
        min_area=augment.min_area,
        flip=augment.flip,
        policy=make_policy(config),
        crop_paste=augment.crop_paste,
        erasing=augment.erasing,
        erasing_fill=augment.erasing_fill,
        mean=tuple(config.data.mean),
        mixing=mixing,
        mix_steps=round(augment.mix_until * plan.total),
        repeats=augment.repeats,
        small_size=augment.small_size,
        small_steps=plan.small,
    )


def protocol(config: ConfigDict, splits: Splits) -> str:
    """What the run's numbers were measured on, in a sentence."""
    holdout, few = config.data.holdout, config.data.train_examples
    trained = f"{few} pictures" if few is not None else f"{1 - holdout:g}" if holdout else "all"
    if splits.validation is None:
        return f"trained on {trained} of train; curves on test; no selection; test_* is the last step"
    held = f"trained on {trained} of train; curves and choices on the held-out {holdout:g}"
    if splits.test is None:
        return f"{held}; the source has no test pictures, so test_* is the last step on the held-out ones"
    return f"{held}; test_* is the last step, measured once"

"""The plan of a run's steps, and what a config resolves to."""

import functools
import pathlib

import jax
import numpy as np
import pytest

from vit_jax.augment.mix import Mixing
from vit_jax.augment.policies import Policy
from vit_jax.command_line import parse
from vit_jax.config import default_config
from vit_jax.data.splits import Split, Splits
from vit_jax.errors import UserError
from vit_jax.training import mesh, setup
from vit_jax.training.step import Augmentation, abstract_state, train_step

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"


def config_of(**fields):
    config = default_config()
    config.train.update({"batch_size": 10, "epochs": 3})
    for name, value in fields.items():
        group, field = name.split("__")
        config[group][field] = value
    return config


def split_of(side=8, channels=3, size=40):
    images = np.zeros((size, side, side, channels), np.uint8)
    return Split(images, np.zeros(size, np.int32), ("a", "b"), (0.4,) * channels, (0.2,) * channels)


@pytest.mark.parametrize(
    "fields, examples, total, evaluations, checkpoints",
    [
        ({}, 40, 12, {4, 8, 12}, {4, 8, 12}),
        ({"train__epochs": 2.5, "train__eval_every": 1.0}, 40, 10, {4, 8, 10}, {4, 8, 10}),
        ({"train__epochs": None, "train__steps": 5}, 40, 5, {4, 5}, {4, 5}),
        ({"train__eval_every": 0.5, "checkpoint__every": 9.0}, 40, 12, {2, 4, 6, 8, 10, 12}, {12}),
        ({"train__eval_every": 0.01}, 40, 12, set(range(1, 13)), {4, 8, 12}),  # no row before the first step
        ({"train__epochs": 4}, 37, 15, {4, 7, 11, 15}, {4, 7, 11, 15}),  # 3.7 steps an epoch
        ({"train__epochs": 0.01}, 40, 1, {1}, {1}),
    ],
)
def test_plan(fields, examples, total, evaluations, checkpoints):
    plan, _ = setup.make_plan(config_of(**fields), examples)
    assert (plan.total, plan.evaluations, plan.checkpoints) == (total, evaluations, checkpoints)


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"train__epochs": 1e308}, "1e\\+308 epochs"),
        ({"optim__warmup_epochs": 1e308}, "1e\\+308 epochs"),
        ({"train__epochs": 1e7, "train__eval_every": 1e-9}, "eval_every"),
    ],
)
def test_a_plan_that_would_never_end(fields, words):
    with pytest.raises(UserError, match=words):
        setup.make_plan(config_of(**fields), 40)


@pytest.mark.parametrize(
    "name, classes, size, parameters",
    [
        ("cifar10_tinyvit", 10, 32, 208_202),
        ("cifar10_tinyvit:reference", 10, 32, 208_074),
        ("cifar100_tiny", 100, 32, 1_515_940),
        ("cifar100_tiny:cpu", 100, 32, 1_529_764),
        ("cifar100_tiny:reference", 100, 32, 1_528_228),
        ("cifar10_vit", 10, 32, 6_167_562),
        ("cifar10_vit:reference", 10, 32, 6_268_810),
        ("cifar100_vit", 100, 32, 6_190_692),
        ("cifar100_vit:reference", 100, 32, 6_303_460),
        ("svhn_vit", 10, 32, 6_167_562),
        ("svhn_vit:reference", 10, 32, 6_268_810),
        ("tiny_imagenet_vit", 200, 64, 6_288_520),
        ("tiny_imagenet_vit:reference", 200, 64, 21_264_072),
        ("cifar10_b16:steps=500", 10, 32, 85_806_346),
        ("cifar10_b16:res=384", 10, 32, 86_098_186),
        ("cifar100_b16", 100, 32, 85_875_556),
        ("cifar100_b16:head,res=384", 100, 32, 86_167_396),
        ("cifar100_b16:mlp", 100, 32, 85_875_556),
        ("cifar100_b16:reference", 100, 32, 85_875_556),
        ("folder_b16:mlp", 100, 32, 85_875_556),
        ("tiny_imagenet_ti16", 200, 64, 5_563_016),
    ],
)
def test_parameters_of_the_shipped_configs(name, classes, size, parameters):
    file, _, variant = name.partition(":")
    config, _ = parse(f"{CONFIGS / file}.py:{variant}", [])
    data = np.zeros((2, size, size, 3), np.uint8)
    split = Split(data, np.zeros(2, np.int32), tuple(map(str, range(classes))), (0.4,) * 3, (0.2,) * 3)
    devices = mesh.make_mesh(1)
    config = setup.resolve_data(setup.resolve_model(config), split, devices)
    shapes = setup.make_classifier(config, classes, devices).shapes()
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == parameters
    config.model.depth = 2  # enough to see that a training step fits together, at each size of the pictures
    plan, _ = setup.make_plan(config, 50_000)
    task, _ = setup.make_task(config, setup.make_classifier(config, classes, devices), plan)
    state = abstract_state(task)
    batch = config.train.batch_size
    images = jax.ShapeDtypeStruct((batch, size, size, 3), np.uint8)
    labels = jax.ShapeDtypeStruct((batch,), np.int32)
    for side in {task.size_at(0), task.size_at(plan.total - 1)}:
        after = jax.eval_shape(functools.partial(train_step, task, side), state, images, labels)
        assert jax.tree.structure(after) == jax.tree.structure(state)


# What the reference experiments' own files say; batch, epochs, optimizer, rate, decay, warm-up.
REFERENCES = {
    "cifar100_b16": (
        64,
        20,
        "sgd",
        1e-2,
        1e-4,
        None,
        {"dropout": 0.1, "min_area": 0.64, "norm_epsilon": None, "multipliers": "mlp"},
    ),
    "cifar10_tinyvit": (64, 10, "adam", 3e-4, 0.0, None, {"schedule": "constant"}),
    "cifar100_tiny": (256, 200, "adam", 1e-3, 5e-4, 10, {"dropout": 0.1, "attention_dropout": 0.0, "flip": True}),
    "cifar10_vit": (128, 200, "adam", 1e-3, 5e-5, 5, {"policy": "autoaugment_cifar10", "final_learning_rate": 1e-5}),
    "cifar100_vit": (128, 200, "adam", 1e-3, 5e-5, 5, {"policy": "autoaugment_cifar10", "label_smoothing": 10 / 99}),
    "svhn_vit": (128, 200, "adam", 1e-3, 5e-5, 5, {"policy": "autoaugment_svhn", "flip": False, "dropout": 0.0}),
    "tiny_imagenet_vit": (
        *(128, 300, "adamw", 3e-5, 1e-4, 10),
        {"label_smoothing": 0.01, "attention_dropout": 0.1, "patience": 20, "holdout": 0.05, "dtype": "bfloat16"},
    ),
}


@pytest.mark.parametrize("name", REFERENCES)
def test_references_train_as_published(name):
    batch_size, epochs, optimizer, rate, decay, warmup, others = REFERENCES[name]
    config, _ = parse(f"{CONFIGS / name}.py:reference", [])
    assert (config.train.batch_size, config.train.epochs) == (batch_size, epochs)
    assert (config.optim.name, config.optim.learning_rate, config.optim.weight_decay) == (optimizer, rate, decay)
    assert config.optim.warmup_epochs == warmup and config.model.pool == "cls"
    assert config.model.norm_epsilon == others.get("norm_epsilon", 1e-5)
    assert not (config.augment.mixup or config.augment.cutmix or config.augment.erasing or config.augment.small_size)
    fields = {field: value for group in config.values() for field, value in group.items()}
    for field, value in others.items():
        assert fields[field] == (pytest.approx(value) if isinstance(value, float) else value), field


def test_augmentation_follows_the_config():
    config = config_of(augment__policy="randaugment", augment__num_ops=3, augment__operations=("rotate", "color"))
    config.augment.update({"mixup": 0.8, "cutmix": 1.0, "cutmix_share": 0.3, "mix_by": "example", "mix_until": 0.75})
    config.augment.update({"erasing": 0.25, "erasing_fill": "mean", "mix_probability": 0.9, "crop_paste": True})
    config.augment.update({"crop": "pad", "padding": 3, "min_area": 0.4, "flip": True, "repeats": 5, "small_size": 4})
    config.data.mean = (0.1, 0.2, 0.3)
    how = setup.make_augmentation(config, setup.make_plan(config, 40)[0])
    assert how == Augmentation(
        crop="pad",
        padding=3,
        min_area=0.4,
        flip=True,
        policy=Policy("randaugment", 3, 9.0, 0.0, only=("rotate", "color")),
        crop_paste=True,
        erasing=0.25,
        erasing_fill="mean",
        mean=(0.1, 0.2, 0.3),
        mixing=Mixing(mixup=0.8, cutmix=1.0, probability=0.9, cutmix_share=0.3, per_example=True),
        mix_steps=9,
        repeats=5,
        small_size=4,
        small_steps=6,
    )
    plain = setup.make_augmentation(config_of(), setup.Plan(12, 0, frozenset(), frozenset()))
    assert plain.policy is None and plain.mixing is None and not plain.crop_paste and not plain.erasing


def test_small_crops_must_suit_the_model():
    config = config_of(augment__crop="pad", augment__small_size=4)
    config.model.update({"patch_size": 4, "width": 16, "depth": 1, "num_heads": 2, "mlp_dim": 8, "stem": "shifted"})
    devices = mesh.make_mesh(1)
    config = setup.resolve_data(config, split_of(), devices)
    plan, _ = setup.make_plan(config, 40)
    with pytest.raises(UserError, match="4x4 pixels are too small"):
        setup.make_task(config, setup.make_classifier(config, 2, devices), plan)


def test_an_unknown_operation_is_named():
    config = config_of(augment__policy="trivialaugment", augment__operations=("rotat",))
    with pytest.raises(UserError, match="'rotat'.*'rotate'"):
        setup.make_augmentation(config, setup.make_plan(config, 40)[0])


def test_dispatches_end_on_the_same_steps_from_wherever_a_run_goes_on():
    plan = setup.Plan(50, 0, frozenset({13, 26, 39, 50}), frozenset({20, 50}))

    def stops(step):
        while step < plan.total:
            yield (step := plan.next_stop(step, 8))

    whole = list(stops(0))
    assert whole == [8, 13, 16, 20, 24, 26, 32, 39, 40, 48, 50]
    for step in whole:
        assert list(stops(step)) == [s for s in whole if s > step]


def test_a_dispatch_has_pictures_of_one_size():
    config = config_of(augment__small_size=4, augment__small_until=0.45, augment__crop="pad")
    plan, _ = setup.make_plan(config, 40)
    assert plan.small == 5 and plan.next_stop(4, 8) == 5 and plan.next_stop(5, 8) == 8
    assert setup.make_augmentation(config, plan).small_steps == 5
    assert setup.make_plan(config_of(), 40)[0].small == 0


def test_warm_up_is_a_tenth_of_the_run_at_most_and_says_so():
    plan, notes = setup.make_plan(config_of(optim__warmup_epochs=1.0, train__epochs=20), 40)
    assert plan.warmup == 4 and notes == []
    plan, notes = setup.make_plan(config_of(optim__warmup_epochs=5.0, train__epochs=20), 40)
    assert plan.warmup == 8 and "from 20 to 8 steps" in notes[0]
    plan, notes = setup.make_plan(config_of(optim__warmup_steps=11), 40)  # asked for in steps: as asked
    assert plan.warmup == 11 and notes == []
    with pytest.raises(UserError, match="warmup_steps=12"):
        setup.make_plan(config_of(optim__warmup_steps=12), 40)


def test_a_preset_fills_what_is_unset_and_a_set_field_wins():
    config = config_of(model__preset="Ti/4", model__depth=3)
    resolved = setup.resolve_data(setup.resolve_model(config), split_of(), mesh.make_mesh(1))
    model = resolved.model
    assert (model.patch_size, model.width, model.depth, model.num_heads, model.mlp_dim) == (4, 192, 3, 3, 768)
    assert resolved.data.image_size == 8 and resolved.data.mean == (0.4,) * 3
    assert config.model.width is None  # the given config stays as it was


@pytest.mark.parametrize(
    "fields, split, words",
    [
        ({}, {}, "model.patch_size is not set"),
        ({"model__preset": "Ti/3"}, {}, "8.*3"),
        (
            {"model__preset": "Ti/4", "data__mean": (0.5,) * 2, "data__std": (1.0,) * 2},
            {},
            "data.mean needs one number, or 3",
        ),
    ],
)
def test_what_does_not_fit_the_data(fields, split, words):
    with pytest.raises(UserError, match=words):
        config = setup.resolve_model(config_of(**fields))
        setup.resolve_data(config, split_of(**split), mesh.make_mesh(1))


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"model__width": 66, "model__position_embedding": "sincos2d", "model__num_heads": 3}, "66"),
        ({"model__patch_size": 6, "model__stem": "conv", "data__image_size": 12}, "6"),
    ],
)
def test_a_model_that_cannot_be_is_refused_before_anything_is_written(fields, words):
    config = setup.resolve_model(config_of(model__preset="Ti/4", **fields))
    config = setup.resolve_data(config, split_of(), mesh.make_mesh(1))
    with pytest.raises(UserError, match=words):
        setup.make_classifier(config, 2, mesh.make_mesh(1))


@pytest.mark.parametrize(
    "fields, parts",
    [
        ({"model.width": 64, "train.batch_size": 64}, 1),  # 16 tokens: 256 pictures would do
        ({"model.width": 1024, "train.batch_size": 60}, 4),  # 16 pictures would do: 15 divide the batch
        ({"model.width": 2**16, "train.batch_size": 60}, 10),  # at least 8 would do: 6 divide it
        ({"model.width": 2**16, "train.batch_size": 60, "optim.accumulate": 2}, 2),
    ],
)
def test_a_batch_is_cut_for_a_cpus_cache(fields, parts):
    config = setup.resolve_model(parse(f"{CONFIGS}/digits.py", [f"--config.{k}={v}" for k, v in fields.items()])[0])
    images = np.arange(2 * 64, dtype=np.uint8).reshape(2, 8, 8, 1)
    split = Split(images, np.zeros(2, np.int32), ("a", "b"), (0.4,), (0.2,))
    assert setup.resolve_data(config, split, mesh.make_mesh(1)).optim.accumulate == parts


def test_more_devices_than_there_are():
    with pytest.raises(UserError, match="mesh.data=4096"):
        mesh.make_mesh(4096)


def test_the_protocol_says_what_was_measured_on_what():
    train = split_of()
    assert "no selection" in setup.protocol(config_of(), Splits(train, None, train))
    held = config_of(data__holdout=0.25)
    assert "held-out 0.25; test_* is the last step, measured once" in setup.protocol(held, Splits(train, train, train))
    assert "no test pictures" in setup.protocol(held, Splits(train, train, None))

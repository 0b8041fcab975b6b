"""Freezing and multiplied learning rates: the rules themselves, the optimizers, and whole training steps."""

import contextlib
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vit_jax.data.splits import Split
from vit_jax.errors import UserError
from vit_jax.models.presets import preset
from vit_jax.models.vit import VisionTransformer
from vit_jax.training import dispatch, mesh, optim, step
from vit_jax.training.checkpoint import Checkpoints
from vit_jax.training.rules import check_rules, match_rules, merge, multiplier_rules, partition, path_name, rule_table

PICTURES = np.random.default_rng(0).integers(0, 256, (16, 8, 8, 3), np.uint8)
LABELS = np.random.default_rng(1).integers(0, 5, 16).astype(np.int32)
OPTIMIZERS = ("sgd", "adam", "adamw", "muon")
PRESETS = ("full", "head", "mlp", "attention", "layers:0.75", "layers:1")
MODELS = (
    dict(pool="cls"),
    dict(pool="gap", position_embedding="none", stem="conv", depth=1),
    dict(pool="seq", position_embedding="sincos2d", stem="shifted", depth=12),  # blocks 1, 10 and 11
    dict(representation_size=8, layer_scale=0.1, qk_norm=True, mlp_conv=True, learned_temperature=True),
)


def make_model(**fields):
    shape = dict(num_classes=5, patch_size=4, width=16, depth=2, num_heads=2, mlp_dim=24, head_zero_init=False)
    return VisionTransformer(**(shape | fields))


@functools.cache
def shapes(model, size=8):
    pictures = jnp.zeros((1, size, size, 3))
    return jax.eval_shape(lambda: model.init(jax.random.key(0), pictures, train=False)["params"])


def named(tree):
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def flat(tree):
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])


# The rules


@pytest.mark.parametrize("spec", PRESETS)
@pytest.mark.parametrize("fields", MODELS, ids=str)
def test_presets_fit_every_model(spec, fields):
    model = make_model(**fields)
    rules = multiplier_rules(spec, model.depth)
    check_rules(rules, shapes(model))
    multipliers = named(match_rules(rules, shapes(model)))
    layers = {"mlp": ("LayerNorm_2", "MlpBlock_3"), "attention": ("LayerNorm_0", "MultiHeadDotProductAttention_1")}
    if spec in ("head", "mlp", "attention"):
        trained = {name for name, multiplier in multipliers.items() if multiplier}
        parts = {"head"} | {f"encoderblock_{i}/{x}" for i in range(model.depth) for x in layers.get(spec, ())}
        expected = {name for name in multipliers if any(f"/{part}/" in f"/{name}" for part in parts)}
        assert trained == expected and len(expected) >= 2 * len(parts)
    elif spec in ("full", "layers:1"):
        assert set(multipliers.values()) == {1.0}


@pytest.mark.parametrize("spec, trained", [("full", 85_875_556), ("mlp", 56_764_516), ("head", 76_900)])
def test_parameters_of_b16_with_100_classes(spec, trained):
    params = shapes(VisionTransformer(num_classes=100, **preset("B/16")), 224)
    parts = partition(params, multiplier_rules(spec, 12))
    assert [sum(x.size for x in jax.tree.leaves(part)) for part in parts] == [trained, 85_875_556 - trained]


def test_layer_decay_counts_from_the_head():
    params = shapes(make_model(depth=12, representation_size=8))
    below = ("cls", "embedding/kernel", "Transformer/posembed_input/pos_embedding")
    stems = shapes(make_model(depth=12, pool="seq", stem="conv"))
    stems |= {"conv_root": {"kernel": 0}, "gn_root": {"scale": 0}, "block1": {"unit1": {"conv1": {"kernel": 0}}}}
    rules = multiplier_rules("layers:0.5", 12)
    plain, stemmed = (named(match_rules(rules, tree)) for tree in (params, stems))
    for i in range(12):
        block = {value for name, value in plain.items() if f"/encoderblock_{i}/" in name}
        assert block == {2.0 ** (i - 12)}, i
    assert all(plain[name] == 2.0**-13 for name in below)
    above = ("head/bias", "head/kernel", "pre_logits/kernel", "Transformer/encoder_norm/scale")
    assert all(plain[name] == 1 for name in above) and stemmed["pool/kernel"] == 1
    before = (
        "stem/conv_0/kernel",
        "stem/norm_0/bias",
        "conv_root/kernel",
        "gn_root/scale",
        "block1/unit1/conv1/kernel",
    )
    assert all(stemmed[name] == 2.0**-13 for name in before)


def test_rules_of_ones_own_stay_as_they_are():
    rules = (("^head/", 2.0), (".*", 0.5))
    assert multiplier_rules(rules, 3) is rules


@pytest.mark.parametrize(
    "spec", ["heads", "", "layer:0.75", "layers", "layers:", "layers:0", "layers:1.5", "layers:-1", "layers:nan"]
)
def test_unknown_presets_and_decays_are_errors(spec):
    with pytest.raises(UserError, match="^unknown init.multipliers|from 0.1 to 1"):
        multiplier_rules(spec, 3)


@pytest.mark.parametrize(
    "rules, message",
    [
        ((("head(", 1.0), (".*", 0.0)), r"'head\(' is not a regex"),
        ((("head", -1.0), (".*", 1.0)), "'head' has -1.0: allowed"),
        ((("head", float("nan")), (".*", 1.0)), "'head' has nan: allowed"),
        (((".*", float("inf")),), r"'\.\*' has inf: allowed"),
        ((("^haed/", 1.0), (".*", 0.0)), r"'\^haed/' matches no parameter"),
        ((("head", 1.0), ("kernel", 0.5), ("head/bias", 2.0), (".*", 0.0)), "'head/bias' is never reached"),
        ((("head", 1.0), ("embedding", 0.5), (".*", 0.0)), r"'\.\*' is never reached"),
        ((("head", 1.0),), "no rule covers embedding/kernel"),
        ((), "no rule covers embedding/kernel"),
        ((("head", 0.0), (".*", 0.0)), "freezes every parameter"),
    ],
    ids=str,
)
def test_rules_that_do_not_fit_say_why(rules, message):
    params = {"embedding": {"kernel": np.zeros(3)}, "head": {"bias": np.zeros(2), "kernel": np.zeros((3, 2))}}
    with pytest.raises(UserError, match=message):
        check_rules(rules, params)


def test_table_of_rules():
    params = shapes(make_model(width=64, mlp_dim=128))
    rules = (("^head/", 1.0), ("/encoderblock_1/", 0.0625), ("^nothing$", 3.0), (".*", 0.0))
    assert rule_table(rules, params).splitlines() == [
        "multiplier  parameters  rule",
        "         1         325  ^head/",
        "    0.0625      33,472  /encoderblock_1/",
        "         0      37,120  .*",
        "33,797 of 70,917 parameters are trained",
    ]


def test_a_tree_in_two_parts_is_the_same_tree_again():
    params = {"a": {"x": 1, "y": 2}, "b": {"x": 3}}
    trained, frozen = partition(params, (("y", 0.5), ("b", 1.0), (".*", 0.0)))
    assert trained == {"a": {"x": None, "y": 2}, "b": {"x": 3}}
    assert frozen == {"a": {"x": 1, "y": None}, "b": {"x": None}}
    assert merge(trained, frozen) == params


# The optimizers


def make_optimizer(name, learning_rate=0.1, **options):
    options = dict(weight_decay=0.5, momentum=0.9, b2=0.99, clip_norm=0.0) | options
    return optim.make_optimizer(name, optax.constant_schedule(learning_rate), **options)


def small_params():
    """A leaf of every kind that an optimizer tells apart: Muon's or not, decayed or not."""
    draw = np.random.default_rng(2).standard_normal
    mlp = {"Dense_0": {"kernel": draw((4, 6)), "bias": draw(6)}}
    block = {"MlpBlock_3": mlp, "LayerNorm_2": {"scale": draw(4)}}
    tree = {"Transformer": {"encoderblock_0": block}, "head": {"kernel": draw((4, 3))}, "cls": draw((1, 1, 4))}
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)


def run(optimizer, params, steps=3):
    """Parameters and state after steps whose gradients are each parameter's own affair."""
    state = optimizer.init(params)
    for i in range(steps):
        gradients = jax.tree.map(lambda x, i=i: jnp.cos(3 * x + i), params)
        updates, state = optimizer.update(gradients, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_multiplier_is_another_learning_rate(name):
    """Decay included."""
    params = small_params()
    rules = (("^head/", 1.0), ("/MlpBlock_3/", 0.5), (".*", 0.25))
    multipliers = named(match_rules(rules, params))
    found = named(run(make_optimizer(name, 0.1, multipliers=rules), params)[0])
    for _, multiplier in rules:
        slowed = named(run(make_optimizer(name, 0.1 * multiplier), params)[0])
        keys = [key for key in found if multipliers[key] == multiplier]
        assert keys
        for key in keys:
            np.testing.assert_allclose(found[key], slowed[key], rtol=2e-6, atol=1e-7, err_msg=key)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_frozen_parameters_have_no_optimizer_state(name):
    params = small_params()
    rules = (("/MlpBlock_3/", 1.0), (".*", 0.0))
    trained, _ = partition(params, rules)
    optimizer = make_optimizer(name, clip_norm=1.0, multipliers=rules)
    new, state = run(optimizer, trained)
    assert jax.tree.structure(new) == jax.tree.structure(trained)
    # Momentum of 30 numbers, and Adam's second moment of those that are not Muon's matrix; Muon has 3 coefficients.
    arrays = sum(x.size for x in jax.tree.leaves(state) if x.ndim)
    assert arrays == {"sgd": 30, "adam": 60, "adamw": 60, "muon": 24 + 3 + 12}[name]
    # And what is trained goes as it would among others.
    whole, _ = run(make_optimizer(name), params)
    alone, _ = run(make_optimizer(name), trained)
    for key, value in named(alone).items():
        np.testing.assert_array_equal(value, named(whole)[key], err_msg=key)


def test_muon_leaves_frozen_parameters_to_nobody():
    params = small_params()
    trained, _ = partition(params, (("kernel", 1.0), (".*", 0.0)))
    assert named(optim.muon_labels(trained)) == {
        "Transformer/encoderblock_0/MlpBlock_3/Dense_0/kernel": "muon",
        "head/kernel": "adamw",
    }
    assert set(named(optim.muon_labels(params)).values()) == {"muon", "adamw"}
    assert len(named(optim.muon_labels(params))) == 5


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_momentum_in_bfloat16(name):
    params = small_params()
    results = {
        dtype: run(make_optimizer(name, momentum_dtype=dtype), params) for dtype in (None, "float32", "bfloat16")
    }
    jax.tree.map(np.testing.assert_array_equal, results[None], results["float32"])
    (exact, before), (new, state) = results[None], results["bfloat16"]
    assert jax.tree.structure(state) == jax.tree.structure(before)
    types = [x.dtype.name for x in jax.tree.leaves(state) if x.shape not in ((), (3,))]  # not counters, coefficients
    # Five parameters with a first moment each; Adam's second moments stay float32.
    second = {"sgd": 0, "adam": 5, "adamw": 5, "muon": 4}[name]
    assert sorted(types) == ["bfloat16"] * 5 + ["float32"] * second
    assert {x.dtype.name for x in jax.tree.leaves((new, before)) if x.shape} == {"float32"}
    change, error = flat(exact) - flat(params), flat(new) - flat(exact)
    assert 0 < np.linalg.norm(error) < 0.02 * np.linalg.norm(change)


def test_bfloat16_momentum_rounds_what_is_kept_and_not_the_update():
    gradient = {"w": jnp.float32([1 + 2.0**-10])}
    optimizer = make_optimizer("sgd", 1.0, weight_decay=0.0, momentum=0.5, momentum_dtype="bfloat16")
    updates, state = optimizer.update(gradient, optimizer.init(gradient), gradient)
    assert updates["w"] == -(1 + 2.0**-10)
    updates, _ = optimizer.update(gradient, state, gradient)
    assert updates["w"] == -(1.5 + 2.0**-10)


# Whole steps


def make_task(spec, name="sgd", accumulate=1, ema_decay=0.0, width=16, **options):
    model = make_model(pool="gap", depth=1, width=width, mlp_dim=2 * width)
    rules = multiplier_rules(spec, model.depth)
    classifier = step.Classifier(model, 8, (0.5,) * 3, (0.25,) * 3, mesh.make_mesh(-1))
    optimizer = make_optimizer(name, multipliers=rules, **options)
    return step.Task(classifier, optimizer, step.Augmentation(), 0.0, accumulate, ema_decay, 0, rules)


@pytest.fixture(scope="module")
def one_step():
    return jax.jit(step.train_step, static_argnums=(0, 1))


@pytest.mark.parametrize("name, spec", [("sgd", "head"), ("adamw", "mlp"), ("muon", "attention")])
def test_frozen_parameters_and_their_average_keep_their_bits(one_step, name, spec):
    task = make_task(spec, name, ema_decay=0.9, clip_norm=1.0)
    state = step.new_state(task)
    # An average apart from the parameters, whose 0.9 x + 0.1 x would be rounded.
    before = state = state.replace(ema=jax.tree.map(lambda x: x + jnp.float32(0.3), state.params))
    for _ in range(3):
        state = one_step(task, 8, state, PICTURES, LABELS)
    trained, frozen = partition(before.params, task.multipliers)
    for field in ("params", "ema"):
        old, new = (named(getattr(x, field)) for x in (before, state))
        assert old.keys() == new.keys()
        still = {key for key in old if np.array_equal(old[key], new[key])}
        # A bias of all keys alike changes no attention: its gradient is rounding error, or nothing.
        assert named(frozen).keys() == {key for key in still if key in named(frozen) or not key.endswith("/key/bias")}
    for at in (before, state):
        assert jax.tree.structure(at.optimizer) == jax.tree.structure(task.optimizer.init(trained))
    assert len(jax.tree.leaves(state.optimizer)) < len(jax.tree.leaves(task.optimizer.init(before.params)))


def test_only_the_head_trained_needs_no_backward_pass_of_the_rest(one_step):
    flops = {}
    for spec in ("full", "head"):
        task = make_task(spec, width=64)
        program = one_step.lower(task, 8, step.abstract_state(task), PICTURES, LABELS).compile()
        flops[spec] = program.cost_analysis()["flops"]
    assert flops["head"] < 0.4 * flops["full"]  # forward is a third


@pytest.mark.parametrize("accumulate", [1, 4])
def test_trained_parameters_go_as_if_none_were_frozen(one_step, accumulate):
    """In the first step, before the others' own course makes a difference; in parts of the batch too."""
    task = make_task("mlp", accumulate=accumulate, momentum=0.0, weight_decay=0.1)
    whole = make_task("full", momentum=0.0, weight_decay=0.1)
    start = step.new_state(task)
    new = one_step(task, 8, start, PICTURES, LABELS)
    expected = one_step(whole, 8, step.new_state(whole), PICTURES, LABELS)
    trained, frozen = partition(expected.params, task.multipliers)
    found = named(new.params)
    for key, value in named(trained).items():
        np.testing.assert_allclose(found[key], value, atol=1e-6, err_msg=key)
    for key in named(frozen):
        np.testing.assert_array_equal(found[key], named(start.params)[key], err_msg=key)
    assert float(new.sums["loss"]) == pytest.approx(float(expected.sums["loss"]), rel=1e-5)


def test_clipping_measures_trained_gradients_alone(one_step):
    task = make_task("head", momentum=0.0, weight_decay=0.0, clip_norm=1e-3)
    state = step.new_state(task)
    new = one_step(task, 8, state, PICTURES, LABELS)
    moved = np.linalg.norm(flat(new.params) - flat(state.params))
    assert moved == pytest.approx(0.1 * 1e-3, rel=1e-3)


def test_a_dispatched_run_resumes_to_the_same_bits(tmp_path):
    """Without state for what is frozen, with momentum in bfloat16, and with the state given away."""
    task = make_task("layers:0.5", "adamw", ema_decay=0.9, momentum_dtype="bfloat16")
    task = dataclasses.replace(task, multipliers=(("^embedding/", 0.0), *task.multipliers))
    split = Split(PICTURES, LABELS, tuple("abcde"), (0.5,) * 3, (0.25,) * 3)
    abstract = step.abstract_state(task)
    assert {x.dtype.name for x in jax.tree.leaves(abstract.optimizer)} == {"bfloat16", "float32", "int32"}
    start = step.init_state(task)
    train = dispatch.Dispatcher(task, start, split, batch_size=8)
    given_away = step.copy(start)
    whole, _ = train(given_away, 0, 5)
    assert all(x.is_deleted() for x in jax.tree.leaves(given_away))
    jax.tree.map(np.testing.assert_array_equal, whole.params["embedding"], start.params["embedding"])
    half, _ = train(start, 0, 2)
    with contextlib.closing(Checkpoints(tmp_path)) as checkpoints:
        checkpoints.save(half, None, 0.0)
        checkpoints.finish_writing()
        restored = checkpoints.restore(2, abstract)
    assert jax.tree.structure(restored) == jax.tree.structure(half)
    resumed, _ = train(restored, 2, 5)
    jax.tree.map(np.testing.assert_array_equal, resumed, whole)

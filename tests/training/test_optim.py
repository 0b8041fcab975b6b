"""Schedule, optimizers, masks and averages against closed forms and NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax.contrib import MuonDimensionNumbers

from vit_jax.models.vit import VisionTransformer
from vit_jax.training import optim
from vit_jax.training.rules import match_rules, path_name


@pytest.fixture(scope="module")
def params():
    fields = dict(patch_size=4, width=16, depth=2, num_heads=2, mlp_dim=24, pool="cls", layer_scale=0.1, qk_norm=True)
    fields |= dict(mlp_conv=True, learned_temperature=True)
    model = VisionTransformer(num_classes=5, representation_size=8, head_zero_init=False, **fields)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)), train=False)["params"])
    chance = np.random.default_rng(4)  # no matrix is nearly singular: that would take Muon more iterations
    return jax.tree.map(lambda x: chance.normal(size=x.shape).astype(np.float32), shapes)


def names(tree, wanted):
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: isinstance(x, MuonDimensionNumbers | None))
    return {path_name(path) for path, leaf in leaves if wanted(leaf)}


def test_the_first_matching_rule_wins_and_every_parameter_must_be_covered():
    tree = {"a": {"kernel": 1, "bias": 2}, "b": 3}
    rules = [("a/bias", "first"), ("^a/", "second"), ("b", "third")]
    assert match_rules(rules, tree) == {"a": {"kernel": "second", "bias": "first"}, "b": "third"}
    with pytest.raises(ValueError, match="a/kernel"):
        match_rules([("bias", 1), ("b$", 2)], tree)


def test_exactly_the_matrices_decay(params):
    decayed = names(match_rules(optim.DECAY_RULES, params), bool)
    assert decayed and all(name.endswith("/kernel") for name in decayed)
    kernels = {path_name(p) for p, _ in jax.tree_util.tree_leaves_with_path(params) if p[-1].key == "kernel"}
    assert decayed == kernels
    assert {"head/kernel", "embedding/kernel", "pre_logits/kernel"} < decayed


def test_muon_has_the_six_matrices_of_each_block_and_nothing_else(params):
    muon = names(optim.muon_axes(params), lambda axes: axes is not None)
    attention, mlp = "MultiHeadDotProductAttention_1", "MlpBlock_3"
    parts = [f"{attention}/{m}" for m in ("query", "key", "value", "out")] + [f"{mlp}/Dense_0", f"{mlp}/Dense_1"]
    assert muon == {f"Transformer/encoderblock_{i}/{part}/kernel" for i in range(2) for part in parts}


@pytest.mark.parametrize("name", ["cosine", "linear", "constant"])
def test_schedule(name):
    rate = optim.make_schedule(name, 0.4, warmup_steps=10, total_steps=110)
    for step in (0, 3, 9):
        assert rate(step) == pytest.approx(0.4 * step / 10)
    for step in (10, 35, 60, 109, 110):
        along = (step - 10) / 100
        closed = {"cosine": 0.2 * (1 + np.cos(np.pi * along)), "linear": 0.4 * (1 - along), "constant": 0.4}[name]
        assert rate(step) == pytest.approx(closed, abs=1e-7)
    assert optim.make_schedule(name, 0.4, 0, 100)(0) == pytest.approx(0.4)
    last = optim.make_schedule(name, 0.4, 9, 10)(10)  # of one step that is no warm-up
    assert last == pytest.approx(0.4 if name == "constant" else 0.0, abs=1e-7)
    rate = optim.make_schedule(name, 0.4, 10, 110, final=0.1)
    assert rate(10) == pytest.approx(0.4) and rate(110) == pytest.approx(0.4 if name == "constant" else 0.1)
    middle = {"cosine": 0.25, "linear": 0.25, "constant": 0.4}[name]
    assert rate(60) == pytest.approx(middle)


def one_step(name, params, gradients, **options):
    options = dict(weight_decay=0.0, momentum=0.9, b2=0.99, clip_norm=0.0) | options
    optimizer = optim.make_optimizer(name, optax.constant_schedule(0.1), **options)

    @jax.jit
    def second_updates(params, gradients):  # they show what the first step left in the state
        _, state = optimizer.update(gradients, optimizer.init(params), params)
        return optimizer.update(gradients, state, params)[0]

    return jax.tree.map(np.asarray, second_updates(params, gradients))


def ones(params):
    return jax.tree.map(jnp.ones_like, params)


def test_adamw_decays_beside_the_gradient_and_adam_through_it(params):
    gradients = jax.tree.map(lambda p: 0.01 * p, params)
    plain = one_step("adamw", params, gradients)
    decoupled = one_step("adamw", params, gradients, weight_decay=0.5)
    kernel, norm = plain["head"]["kernel"], plain["Transformer"]["encoder_norm"]["scale"]
    weights = np.asarray(params["head"]["kernel"])
    np.testing.assert_allclose(decoupled["head"]["kernel"], kernel - 0.1 * 0.5 * weights, rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(decoupled["Transformer"]["encoder_norm"]["scale"], norm)
    # The same gradient all along: Adam's step is the rate, towards lower loss plus decay.
    coupled = one_step("adam", params, jax.tree.map(lambda p: -0.01 * p, params), weight_decay=0.5)
    np.testing.assert_allclose(coupled["head"]["kernel"], -0.1 * np.sign(weights), rtol=1e-3)
    np.testing.assert_allclose(coupled["cls"], 0.1 * np.sign(params["cls"]), rtol=1e-3)  # not decayed


def test_sgd_with_momentum_and_coupled_decay(params):
    updates = one_step("sgd", params, ones(params), weight_decay=0.5)
    decayed = 1 + 0.5 * np.asarray(params["head"]["kernel"])
    np.testing.assert_allclose(updates["head"]["kernel"], -0.1 * (1 + 0.9) * decayed, rtol=1e-5)
    np.testing.assert_allclose(updates["head"]["bias"], -0.1 * 1.9 * np.ones(5), rtol=1e-6)


def test_clipping_bounds_the_global_norm(params):
    scale = optax.tree.norm(ones(params))
    clipped = one_step("sgd", params, ones(params), momentum=0.0, clip_norm=0.5)
    assert float(optax.tree.norm(clipped)) == pytest.approx(0.1 * 0.5, rel=1e-5)
    loose = one_step("sgd", params, ones(params), momentum=0.0, clip_norm=2 * float(scale))
    assert float(optax.tree.norm(loose)) == pytest.approx(0.1 * float(scale), rel=1e-5)


def test_muon_orthogonalises_each_matrix_for_itself(params):
    gradients = jax.tree.map(lambda p: p**3, params)
    updates = one_step("muon", params, gradients, momentum=0.95)
    block = updates["Transformer"]["encoderblock_0"]
    attention, mlp = block["MultiHeadDotProductAttention_1"], block["MlpBlock_3"]
    matrices = [attention[m]["kernel"].reshape(16, 16) for m in ("query", "key", "value")]
    matrices += [attention["out"]["kernel"].reshape(16, 16), mlp["Dense_0"]["kernel"], mlp["Dense_1"]["kernel"]]
    for matrix in matrices:
        singular = np.linalg.svd(matrix / (0.1 * 0.2 * np.sqrt(max(matrix.shape))), compute_uv=False)
        assert 0.5 < singular.min() and singular.max() < 1.3, singular  # Newton-Schulz brings them near 1
    adamw = one_step("adamw", params, gradients)
    for name in ("head", "embedding"):
        np.testing.assert_array_equal(updates[name]["kernel"], adamw[name]["kernel"])


def test_muon_decays_matrices_only(params):
    gradients = jax.tree.map(lambda p: p**3, params)
    plain, decayed = (one_step("muon", params, gradients, weight_decay=w) for w in (0.0, 0.5))
    for path, update in jax.tree_util.tree_leaves_with_path(plain):
        other, weights = decayed, params
        for key in path:
            other, weights = other[key.key], weights[key.key]
        expected = update - 0.1 * 0.5 * np.asarray(weights) if path[-1].key == "kernel" else update
        np.testing.assert_allclose(other, expected, rtol=1e-4, atol=1e-6, err_msg=path_name(path))


def test_the_average_forgets_the_start_and_then_decays_as_told():
    assert optim.ema_decay(0.99, jnp.int32(0)) == pytest.approx(0.1)
    assert optim.ema_decay(0.99, jnp.int32(90)) == pytest.approx(0.91)
    assert optim.ema_decay(0.99, jnp.int32(10_000)) == pytest.approx(0.99)
    new = optim.update_ema({"w": jnp.float32(2.0)}, {"w": jnp.float32(3.0)}, jnp.float32(0.9))
    assert new["w"] == pytest.approx(0.9 * 2 + 0.1 * 3)

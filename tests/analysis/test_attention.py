"""Attention, rollout, distance and relevance: closed forms, NumPy, an independent forward pass, and planted patches."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.spatial.distance import cdist

from vit_jax.analysis import attention
from vit_jax.models.vit import VisionTransformer

SHAPE = (2, 8, 12, 3)  # not square: rows and columns cannot be mixed up
GRID = (4, 6)


def make(seed=1, **fields):
    """A small model, and parameters that are random in every array."""
    sizes = dict(num_classes=5, patch_size=2, width=16, depth=2, num_heads=2, mlp_dim=24)
    model = VisionTransformer(**(sizes | fields))
    rng = np.random.default_rng(seed)
    params = jax.tree.map(lambda x: np.float32(rng.normal(size=x.shape, scale=0.5)), shapes_of(model, SHAPE))
    return model, params, jnp.asarray(rng.normal(size=SHAPE), jnp.float32)


def shapes_of(model, shape):
    return jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros(shape), train=False))["params"]


def edited(params, edit):
    """The parameters with `edit(path, array)` in place of each array, by a path such as "head/kernel"."""
    return jax.tree_util.tree_map_with_path(lambda path, x: edit("/".join(key.key for key in path), x), params)


# --- weights --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields", [{}, {"pool": "gap", "remat": True}, {"pool": "seq", "mask_self": True, "dtype": jnp.bfloat16}], ids=str
)
def test_rows_of_attention_sum_to_1(fields):
    model, params, inputs = make(**fields)
    weights = attention.attention_weights(model, params, inputs)
    tokens = 24 + (model.pool == "cls")
    assert weights.shape == (2, 2, 2, tokens, tokens) and weights.dtype == jnp.float32
    np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-5)
    assert np.ptp(weights) > 0.1  # and they are not all alike
    np.testing.assert_allclose(attention.rollout(weights).sum(-1), 1, atol=1e-5)


def test_what_the_head_reads():
    matrices = np.random.default_rng(0).random((2, 3, 7, 7))
    maps, own = attention.read_by_head(matrices, (2, 3))
    np.testing.assert_array_equal(maps, matrices[..., 0, 1:].reshape(2, 3, 2, 3))  # the class token's row
    np.testing.assert_array_equal(own, matrices[..., 0, 0])
    maps, own = attention.read_by_head(matrices, (7, 1))
    np.testing.assert_allclose(maps[..., 0], matrices.mean(2))
    assert maps.shape == (2, 3, 7, 1) and not own.any()


# --- rollout --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pool", ["cls", "gap", "seq"])
def test_rollout_of_even_attention_is_flat(pool):
    model, params, inputs = make(pool=pool, depth=3)
    params = edited(params, lambda path, x: jnp.zeros_like(x) if "/query/" in path else x)
    flow = attention.rollout(attention.attention_weights(model, params, inputs))
    n = flow.shape[-1]
    closed = 2.0**-3 * np.eye(n) + (1 - 2.0**-3) / n  # (I / 2 + J / 2N)^3, for (J / N)^2 = J / N
    np.testing.assert_allclose(flow, np.broadcast_to(closed, flow.shape), atol=1e-6)
    maps, _ = attention.read_by_head(flow, GRID)
    assert np.ptp(maps) < 1e-6 and maps.min() > 0.5 / n
    params = make(pool=pool, depth=3)[1]
    maps, _ = attention.read_by_head(attention.rollout(attention.attention_weights(model, params, inputs)), GRID)
    assert np.ptp(maps) > 0.01  # where attention is not even, it is not flat


def test_rollout_is_the_papers():
    """Heads' mean, plus the identity, rows renormalised, multiplied from the first layer on, in float64."""
    weights = np.random.default_rng(0).random((2, 3, 4, 5, 5))
    weights /= weights.sum(-1, keepdims=True)
    expected = []
    for picture in weights:
        joint = np.eye(5)
        for layer in picture:
            added = layer.mean(0) + np.eye(5)
            joint = (added / added.sum(-1, keepdims=True)) @ joint
        expected.append(joint)
    np.testing.assert_allclose(attention.rollout(jnp.asarray(weights, jnp.float32)), expected, atol=1e-6)


# --- distance -------------------------------------------------------------------------------------------------------


def test_attention_distance_in_closed_form():
    places = np.indices(GRID).reshape(2, -1).T
    apart = cdist(places, places)
    np.testing.assert_allclose(attention.patch_distances(GRID, 4), 4 * apart, atol=1e-5)

    right = np.zeros((24, 24))  # each patch looks to the next one in its row, the last one at itself
    for i, (_, column) in enumerate(places):
        right[i, i + (column < 5)] = 1
    weights = np.stack([np.eye(24), np.full((24, 24), 1 / 24), right])[None, None]
    found = attention.attention_distance(weights, GRID, 4)
    np.testing.assert_allclose(found, [[[0, 4 * apart.mean(), 4 * 5 / 6]]], rtol=1e-6)

    with_cls = np.full((1, 1, 3, 25, 25), 0.3)  # whatever goes to and comes from the class token says nothing
    with_cls[..., 1:, 1:] = 0.7 * weights
    np.testing.assert_allclose(attention.attention_distance(with_cls, GRID, 4), found, rtol=1e-6)


# --- gradients ------------------------------------------------------------------------------------------------------


def forward(model, params, inputs, nudges):
    """The logits, written out, with `nudges` [B, L, H, N, N] added to the attention weights."""

    def norm(x, p):
        x = (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + model.norm_epsilon)
        return x * p["scale"] + p["bias"]

    patches = inputs.reshape(2, 4, 2, 6, 2, 3).transpose(0, 1, 3, 2, 4, 5).reshape(2, 24, 12)
    x = patches @ params["embedding"]["kernel"].reshape(12, -1) + params["embedding"]["bias"]
    if model.pool == "cls":
        x = jnp.concatenate([jnp.tile(params["cls"], (2, 1, 1)), x], axis=1)
    x = x + params["Transformer"]["posembed_input"]["pos_embedding"]
    for i in range(model.depth):
        block = params["Transformer"][f"encoderblock_{i}"]
        parts = block["MultiHeadDotProductAttention_1"]
        y = norm(x, block["LayerNorm_0"])
        q, k, v = (
            jnp.einsum("bnd,dhc->bhnc", y, parts[name]["kernel"]) + parts[name]["bias"][:, None]
            for name in ("query", "key", "value")
        )
        weights = jax.nn.softmax(q @ k.swapaxes(-1, -2) / np.sqrt(q.shape[-1])) + nudges[:, i]
        x = x + jnp.einsum("bhnc,hcd->bnd", weights @ v, parts["out"]["kernel"]) + parts["out"]["bias"]
        mlp, y = block["MlpBlock_3"], norm(x, block["LayerNorm_2"])
        hidden = jax.nn.gelu(y @ mlp["Dense_0"]["kernel"] + mlp["Dense_0"]["bias"])
        x = x + hidden @ mlp["Dense_1"]["kernel"] + mlp["Dense_1"]["bias"]
    x = norm(x, params["Transformer"]["encoder_norm"])
    x = x[:, 0] if model.pool == "cls" else x.mean(1)
    return x @ params["head"]["kernel"] + params["head"]["bias"]


@pytest.mark.parametrize("fields", [{}, {"pool": "gap", "remat": True}], ids=str)
def test_gradients_are_those_of_the_weights(fields):
    model, params, inputs = make(**fields)
    classes = jnp.array([3, 0], jnp.int32)
    gradients, weights = jax.jit(attention.attention_gradients, static_argnums=0)(model, params, inputs, classes)

    def log_odds(nudges):
        logits = forward(model, params, inputs, nudges)
        probabilities = jax.nn.softmax(logits)[jnp.arange(2), classes]
        return jnp.sum(jnp.log(probabilities) - jnp.log(1 - probabilities)), logits

    expected, logits = jax.jit(jax.grad(log_odds, has_aux=True))(jnp.zeros_like(weights))
    plain = model.apply({"params": params}, inputs, train=False)
    np.testing.assert_allclose(logits, plain, rtol=1e-4, atol=1e-4)  # it is the same model
    np.testing.assert_allclose(gradients, expected, rtol=0, atol=1e-4 * np.abs(expected).max())
    np.testing.assert_array_equal(weights, attention.attention_weights(model, params, inputs))

    carried = np.maximum(np.asarray(expected, np.float64) * weights, 0).mean(2)  # [B, L, N, N]
    n = carried.shape[-1]
    flow = np.stack([(np.eye(n) + last) @ (np.eye(n) + first) - np.eye(n) for first, last in carried])
    row = flow[:, 0, 1:] if model.pool == "cls" else flow.mean(1)
    found = attention.relevance(model, params, inputs, classes)
    assert found.shape == (2, *GRID) and found.min() >= 0
    np.testing.assert_allclose(found.reshape(2, -1), row, rtol=0, atol=1e-4 * row.max())


# --- planted patches ------------------------------------------------------------------------------------------------


def planted(rng, count, both):
    """Noise with one 2 x 2 patch of the class's channel at 2; with `both` a patch of the next class's as well."""
    inputs = rng.normal(size=(count, 8, 8, 3), scale=0.3).astype(np.float32)
    classes = rng.integers(0, 3, count)
    places = rng.permuted(np.tile(np.arange(16), (count, 1)), axis=1)[:, :2]
    for i in range(count):
        for place, channel in zip(places[i], [classes[i], (classes[i] + 1) % 3][: 1 + both], strict=False):
            row, column = divmod(place, 4)
            inputs[i, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2] = 2 * np.eye(3)[channel]
    return jnp.asarray(inputs), classes.astype(np.int32), places


def share_on(maps, places):
    """Which share of each map lies on its patch in `places`."""
    flat = np.asarray(maps).reshape(len(maps), -1)
    return flat[np.arange(len(flat)), places] / flat.sum(1)


def patch_classifier(pool):
    """A model, set by hand, whose even attention sums up the patches' red, green and blue, which are its classes."""
    model = VisionTransformer(
        num_classes=3, patch_size=2, width=8, depth=1, num_heads=1, mlp_dim=4, pool=pool, position_embedding="none"
    )
    colours = np.zeros((2, 2, 3, 8), np.float32)
    colours[..., :3] = np.eye(3) / 4  # features 0, 1, 2: the patch's mean red, green and blue
    set_by_hand = {
        "embedding/kernel": colours,
        "embedding/bias": 4 * np.eye(8)[3],  # or the norm would blow the noise up
        "head/kernel": np.eye(8)[:, :3],
    }

    def edit(path, x):
        if path.endswith(("value/kernel", "out/kernel")):
            return jnp.eye(8).reshape(x.shape)
        if path in set_by_hand:
            return jnp.asarray(set_by_hand[path], jnp.float32)
        return jnp.full(x.shape, float(path.endswith("scale")))

    return model, edited(shapes_of(model, (1, 8, 8, 3)), edit)


@pytest.mark.parametrize("pool", ["cls", "gap"])
def test_relevance_lights_the_planted_patch_of_the_class_asked_for(pool):
    model, params = patch_classifier(pool)
    inputs, classes, places = planted(np.random.default_rng(0), 40, both=True)
    logits = jax.jit(lambda: model.apply({"params": params}, inputs, train=False))()
    other = (classes + 1) % 3
    np.testing.assert_array_equal(logits.argmin(1), (classes + 2) % 3)  # it classifies: the third is not there

    for asked, place in ((classes, places[:, 0]), (other, places[:, 1])):
        maps = attention.relevance(model, params, inputs, jnp.asarray(asked))
        np.testing.assert_array_equal(maps.reshape(40, -1).argmax(1), place)
        assert share_on(maps, place).mean() > 0.5
    third = attention.relevance(model, params, inputs, jnp.asarray((classes + 2) % 3))
    lit = third.reshape(40, -1).argmax(1)
    assert not ((lit == places[:, 0]) | (lit == places[:, 1])).any()  # what is not there is not seen in what is
    # Attention itself, being even, knows nothing of this.
    flow = attention.rollout(attention.attention_weights(model, params, inputs))
    assert np.ptp(attention.read_by_head(flow, (4, 4))[0]) < 1e-6


def test_relevance_of_a_classifier_that_has_learned_to_find_a_patch():
    model = VisionTransformer(
        num_classes=3, patch_size=2, width=16, depth=1, num_heads=2, mlp_dim=32, pool="gap", head_zero_init=False
    )
    inputs, classes, _ = planted(np.random.default_rng(0), 2048, both=False)
    optimizer = optax.adam(1e-2)

    @jax.jit
    def train(params):
        def step(carry, batch):
            def loss(params):
                logits = model.apply({"params": params}, batch[0], train=True)
                return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()

            value, gradient = jax.value_and_grad(loss)(carry[0])
            updates, state = optimizer.update(gradient, carry[1])
            return (optax.apply_updates(carry[0], updates), state), value

        batches = inputs.reshape(32, 64, 8, 8, 3), classes.reshape(32, 64)
        batches = jax.tree.map(lambda x: jnp.tile(x, (3, *[1] * (x.ndim - 1))), batches)
        (params, _), losses = jax.lax.scan(step, (params, optimizer.init(params)), batches)
        return params, losses[-1]

    params, loss = train(model.init(jax.random.key(0), inputs[:1], train=False)["params"])
    assert loss < 0.1
    inputs, classes, places = planted(np.random.default_rng(1), 200, both=True)
    for asked, place in ((classes, places[:, 0]), ((classes + 1) % 3, places[:, 1])):
        maps = attention.relevance(model, params, inputs, jnp.asarray(asked, jnp.int32))
        assert (maps.reshape(200, -1).argmax(1) == place).mean() > 0.95
        assert share_on(maps, place).mean() > 0.5  # an even map has a sixteenth there


def test_nothing_speaks_for_a_class_where_the_head_is_deaf():
    model, params, inputs = make()
    params = edited(params, lambda path, x: jnp.zeros_like(x) if path.startswith("head") else x)
    assert not attention.relevance(model, params, inputs, jnp.array([0, 1])).any()

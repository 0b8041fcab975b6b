"""The ViT: its parameters against the official file's, its output against the paper's equations in NumPy."""

import functools
import math
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from vit_jax.errors import UserError
from vit_jax.models.blocks import Dropout, EncoderBlock, SelfAttention, depthwise, rotate
from vit_jax.models.presets import preset
from vit_jax.models.vit import VisionTransformer, middle_positions, sincos2d

SMALL = dict(num_classes=7, patch_size=4, width=24, depth=2, num_heads=3, mlp_dim=40)
IMAGES = np.random.default_rng(0).normal(size=(5, 12, 8, 3))  # not square: rows and columns cannot be mixed up


def shapes(image_size, **fields):
    """{path: shape} of a model's parameters, none of them allocated."""
    images = jax.ShapeDtypeStruct((1, image_size, image_size, 3), jnp.float32)
    model = VisionTransformer(**fields)
    tree = jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), images)["params"]
    return {path: leaf.shape for path, leaf in flatten_dict(tree, sep="/").items()}


def count(image_size, **fields):
    return sum(math.prod(shape) for shape in shapes(image_size, **fields).values())


def make(seed=1, **fields):
    """A small model and parameters that are random and not zero in every array."""
    model = VisionTransformer(**SMALL | fields)
    rng = np.random.default_rng(seed)

    def fill(path, leaf):
        name = path[-1].key
        if name == "kernel":
            fan_in = leaf.shape[0] if leaf.ndim < 4 else math.prod(leaf.shape[:3])
            return rng.normal(size=leaf.shape, scale=fan_in**-0.5).astype(np.float32)
        return rng.normal(size=leaf.shape, loc=float("scale" in name), scale=0.3).astype(np.float32)

    tree = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.asarray(IMAGES, jnp.float32), train=False))
    return model, jax.tree_util.tree_map_with_path(fill, tree)


@functools.partial(jax.jit, static_argnums=0, static_argnames=("train", "mutable"))
def apply(model, params, **options):
    return model.apply(params, jnp.asarray(IMAGES, jnp.float32), **options)


# --- the parameters -------------------------------------------------------------------------------------------------

CIFAR_TINY = dict(patch_size=4, width=192, depth=6, num_heads=8, mlp_dim=256)
TINY_VIT = dict(patch_size=4, width=64, depth=4, num_heads=4, mlp_dim=256)
VIT_CIFAR = dict(patch_size=4, width=384, depth=7, num_heads=12, mlp_dim=384)
TINY_IMAGENET = dict(patch_size=8, width=512, depth=10, num_heads=8, mlp_dim=1024)
TINY_IMAGENET_NOTEBOOK = dict(patch_size=4, width=512, depth=12, num_heads=8, mlp_dim=1024)


@pytest.mark.parametrize(
    ("image_size", "fields", "expected"),
    [
        # patches + cls + positions + blocks + last norm + head, spelled out for the first one
        (32, CIFAR_TINY | dict(num_classes=100), 9_408 + 192 + 65 * 192 + 6 * 247_744 + 384 + 19_300),
        (32, CIFAR_TINY | dict(num_classes=100), 1_528_228),
        (32, CIFAR_TINY | dict(num_classes=10), 1_510_858),
        (32, CIFAR_TINY | dict(num_classes=100, pool="gap"), 1_527_844),  # neither cls nor its position: 2 * 192 fewer
        (32, CIFAR_TINY | dict(num_classes=100, position_embedding="sincos2d"), 1_528_228 - 65 * 192),
        # S2 and S3 of the references have no norm at the end of the encoder but one in their head: the same number.
        (32, TINY_VIT | dict(num_classes=10), 208_074),
        (32, VIT_CIFAR | dict(num_classes=10), 6_268_810),
        (32, VIT_CIFAR | dict(num_classes=100), 6_303_460),
        (32, VIT_CIFAR | dict(num_classes=10, pool="gap"), 6_268_042),
        # The size that S1's README states; its notebook trains another: patch 4, 12 blocks, 25,494,216 parameters.
        # Its 257 position slots are for 64 px, but it crops to 32 px: 192 of them, 512 numbers each, never train.
        (64, TINY_IMAGENET | dict(num_classes=200), 21_264_072),
        (64, TINY_IMAGENET_NOTEBOOK | dict(num_classes=200), 25_494_216),
        (32, TINY_IMAGENET_NOTEBOOK | dict(num_classes=200), 25_494_216 - 192 * 512),
        (224, preset("B/16") | dict(num_classes=1000), 86_567_656),
        (224, preset("B/16") | dict(num_classes=100), 85_875_556),
        (384, preset("B/16") | dict(num_classes=100), 86_167_396),
        (384, preset("B/16") | dict(num_classes=10), 86_098_186),
        (224, preset("B/16") | dict(num_classes=21843, representation_size=768), 103_186_515),
        # The options: two scales a block; a scale for q and one for k over the head's 24 features.
        (32, CIFAR_TINY | dict(num_classes=100, layer_scale=1e-4), 1_528_228 + 6 * 2 * 192),
        (32, CIFAR_TINY | dict(num_classes=100, qk_norm=True), 1_528_228 + 6 * 2 * 24),
        (32, CIFAR_TINY | dict(num_classes=100, learned_temperature=True), 1_528_228 + 6 * 8),
        (32, CIFAR_TINY | dict(num_classes=100, mask_self=True), 1_528_228),
        (32, CIFAR_TINY | dict(num_classes=100, mlp_conv=True), 1_528_228 + 6 * 9 * 256),
        (32, CIFAR_TINY | dict(num_classes=100, pool="seq"), 1_527_844 + 193),
        (32, CIFAR_TINY | dict(num_classes=100, position_embedding="rotary"), 1_528_228 - 65 * 192),
        (32, CIFAR_TINY | dict(num_classes=100, position_embedding="none"), 1_528_228 - 65 * 192),
        # Five pictures instead of one under each patch, and a norm over them.
        (32, CIFAR_TINY | dict(num_classes=100, stem="shifted"), 1_528_228 + 4 * 48 * 192 + 2 * 5 * 48),
        # SPT's own model (2,692,426 with its biases of q, k and v left out), so published sizes can be told apart.
        (
            32,
            dict(patch_size=4, width=192, depth=9, num_heads=12, mlp_dim=384, num_classes=10),
            2_692_426 + 9 * 3 * 192,
        ),
    ],
)
def test_parameter_count(image_size, fields, expected):
    assert count(image_size, **fields) == expected


def test_tree_is_the_official_file():
    """Names and shapes of imagenet21k/ViT-B_16.npz."""
    expected = {
        "cls": (1, 1, 768),
        "embedding/kernel": (16, 16, 3, 768),
        "embedding/bias": (768,),
        "Transformer/posembed_input/pos_embedding": (1, 197, 768),
        "Transformer/encoder_norm/scale": (768,),
        "Transformer/encoder_norm/bias": (768,),
        "pre_logits/kernel": (768, 768),
        "pre_logits/bias": (768,),
        "head/kernel": (768, 21843),
        "head/bias": (21843,),
    }
    for i in range(12):
        block = f"Transformer/encoderblock_{i}"
        for norm in ("LayerNorm_0", "LayerNorm_2"):
            expected |= {f"{block}/{norm}/scale": (768,), f"{block}/{norm}/bias": (768,)}
        attention = f"{block}/MultiHeadDotProductAttention_1"
        for name in ("query", "key", "value"):
            expected |= {f"{attention}/{name}/kernel": (768, 12, 64), f"{attention}/{name}/bias": (12, 64)}
        expected |= {f"{attention}/out/kernel": (12, 64, 768), f"{attention}/out/bias": (768,)}
        expected |= {f"{block}/MlpBlock_3/Dense_0/kernel": (768, 3072), f"{block}/MlpBlock_3/Dense_0/bias": (3072,)}
        expected |= {f"{block}/MlpBlock_3/Dense_1/kernel": (3072, 768), f"{block}/MlpBlock_3/Dense_1/bias": (768,)}
    found = shapes(224, **preset("B/16"), num_classes=21843, representation_size=768)
    assert len(found) == 202
    assert found == expected


def test_options_have_names_of_their_own():
    plain = set(shapes(32, **TINY_VIT, num_classes=10))
    block = "Transformer/encoderblock_0"
    scaled = set(shapes(32, **TINY_VIT, num_classes=10, layer_scale=0.1)) - plain
    assert {f"{block}/layer_scale_attention", f"{block}/layer_scale_mlp"} <= scaled and len(scaled) == 8
    normed = set(shapes(32, **TINY_VIT, num_classes=10, qk_norm=True)) - plain
    attention = f"{block}/MultiHeadDotProductAttention_1"
    assert {f"{attention}/query_ln/scale", f"{attention}/key_ln/scale"} <= normed and len(normed) == 8


@pytest.mark.parametrize(
    "fields, names",
    [
        (dict(learned_temperature=True), {"MultiHeadDotProductAttention_1/temperature"}),
        (dict(mlp_conv=True), {"MlpBlock_3/conv/kernel"}),
    ],
)
def test_a_block_s_options_add_their_own_parameters_and_change_no_other(fields, names):
    plain = set(shapes(32, **TINY_VIT, num_classes=10))
    new = set(shapes(32, **TINY_VIT, num_classes=10, **fields))
    assert new - plain == {f"Transformer/encoderblock_{i}/{name}" for i in range(4) for name in names}
    assert plain <= new


def initialise(model):
    images = jnp.zeros((1, 64, 64, 3))
    return jax.jit(lambda key: model.init(key, images, train=False))(jax.random.key(0))["params"]


def test_initial_values():
    model = VisionTransformer(num_classes=10, patch_size=8, width=128, depth=1, num_heads=2, mlp_dim=512)
    params = initialise(model)
    flat = {path: np.asarray(leaf) for path, leaf in flatten_dict(params, sep="/").items()}
    block = "Transformer/encoderblock_0"
    for path, rows, columns in [
        ("MultiHeadDotProductAttention_1/query/kernel", 128, 128),
        ("MultiHeadDotProductAttention_1/out/kernel", 128, 128),
        ("MlpBlock_3/Dense_0/kernel", 128, 512),
        ("MlpBlock_3/Dense_1/kernel", 512, 128),
    ]:
        limit = math.sqrt(6 / (rows + columns))  # xavier: uniform up to here
        assert 0.98 * limit < np.abs(flat[f"{block}/{path}"]).max() <= limit
    assert flat[f"{block}/MlpBlock_3/Dense_0/bias"].std() == pytest.approx(1e-6, rel=0.2)
    assert flat["Transformer/posembed_input/pos_embedding"].std() == pytest.approx(0.02, rel=0.05)
    assert flat["embedding/kernel"].std() == pytest.approx((8 * 8 * 3) ** -0.5, rel=0.05)
    for path in (
        "cls",
        "embedding/bias",
        "head/kernel",
        "head/bias",
        f"{block}/MultiHeadDotProductAttention_1/key/bias",
    ):
        assert not flat[path].any()
    other = model.clone(head_zero_init=False, layer_scale=0.1)
    params = initialise(other)
    assert np.asarray(params["head"]["kernel"]).std() == pytest.approx(128**-0.5, rel=0.1)
    assert (np.asarray(params["Transformer"]["encoderblock_0"]["layer_scale_mlp"]) == np.float32(0.1)).all()


# --- the function ---------------------------------------------------------------------------------------------------


def reference(params, images, fields):
    """The paper's equations, float64, one thing at a time; also each block's attention weights."""
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)["params"]

    def norm(x, p):
        mean, variance = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
        return (x - mean) / np.sqrt(variance + fields["norm_epsilon"]) * p["scale"] + p.get("bias", 0)

    def gelu(x):
        if fields["gelu"] == "exact":
            return x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2
        return x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2

    def attention(x, p):
        heads, all_weights = [], []
        for h in range(fields["num_heads"]):
            q, k, v = (x @ p[name]["kernel"][:, h] + p[name]["bias"][h] for name in ("query", "key", "value"))
            if fields["qk_norm"]:
                q, k = norm(q, p["query_ln"]), norm(k, p["key_ln"])
            if fields["position_embedding"] == "rotary":
                q, k = turned(q, grid), turned(k, grid)
            temperature = p["temperature"][h] if fields["learned_temperature"] else math.sqrt(q.shape[-1])
            scores = q @ k.swapaxes(-1, -2) / temperature
            if fields["mask_self"]:
                scores[:, range(len(q[0])), range(len(q[0]))] = -1e9
            weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
            heads.append(weights @ v @ p["out"]["kernel"][h])
            all_weights.append(weights)
        return sum(heads) + p["out"]["bias"], np.stack(all_weights, axis=1)

    def conv(hidden, p):
        """Token by token: each adds what lies under the kernel around it."""
        out, cls = hidden.copy(), hidden.shape[1] - grid[0] * grid[1]
        for row, column in np.ndindex(*grid):
            for i, j in np.ndindex(3, 3):
                if 0 <= row + i - 1 < grid[0] and 0 <= column + j - 1 < grid[1]:
                    under = hidden[:, cls + (row + i - 1) * grid[1] + column + j - 1]
                    out[:, cls + row * grid[1] + column] += p["kernel"][i, j] * under
        return out

    size, (height, width) = fields["patch_size"], images.shape[1:3]
    grid = height // size, width // size
    if fields["stem"] == "shifted":
        images = shifted(images, size, params["stem"]["norm"], norm)
        size, (height, width) = 1, grid
    tokens = []
    for row in range(0, height, size):
        for column in range(0, width, size):
            patch = images[:, row : row + size, column : column + size]
            tokens.append(np.tensordot(patch, params["embedding"]["kernel"], 3) + params["embedding"]["bias"])
    x = np.stack(tokens, axis=1)
    positions = waves(*grid, x.shape[-1])
    if fields["pool"] == "cls":
        x = np.concatenate([np.repeat(params["cls"], len(x), axis=0), x], axis=1)
        positions = np.concatenate([np.zeros((1, x.shape[-1])), positions])
    encoder = params["Transformer"]
    if fields["position_embedding"] == "sincos2d":
        x = x + positions
    elif fields["position_embedding"] == "learned":
        x = x + encoder["posembed_input"]["pos_embedding"]
    weights = []
    for i in range(fields["depth"]):
        p = encoder[f"encoderblock_{i}"]
        y, w = attention(norm(x, p["LayerNorm_0"]), p["MultiHeadDotProductAttention_1"])
        weights.append(w)
        x = x + y * p.get("layer_scale_attention", 1)
        first, second = p["MlpBlock_3"]["Dense_0"], p["MlpBlock_3"]["Dense_1"]
        hidden = norm(x, p["LayerNorm_2"]) @ first["kernel"] + first["bias"]
        if fields["mlp_conv"]:
            hidden = conv(hidden, p["MlpBlock_3"]["conv"])
        y = gelu(hidden) @ second["kernel"] + second["bias"]
        x = x + y * p.get("layer_scale_mlp", 1)
    x = norm(x, encoder["encoder_norm"])
    if fields["pool"] == "seq":
        scores = np.exp(x @ params["pool"]["kernel"] + params["pool"]["bias"])
        x = (x * scores / scores.sum(axis=1, keepdims=True)).sum(axis=1)
    else:
        x = x[:, 0] if fields["pool"] == "cls" else x.mean(axis=1)
    if fields["representation_size"]:
        x = np.tanh(x @ params["pre_logits"]["kernel"] + params["pre_logits"]["bias"])
    return x @ params["head"]["kernel"] + params["head"]["bias"], weights


def turned(x, grid):
    """Rotary embedding of queries or keys [B, N, Dh]: feature i with i + Dh / 2 is a complex number that turns."""
    half, quarter = x.shape[-1] // 2, x.shape[-1] // 4
    numbers = x[..., :half] + 1j * x[..., half:]
    cls = x.shape[1] - grid[0] * grid[1]
    for row, column in np.ndindex(*grid):
        for i in range(quarter):
            speed = 100 ** (-i / quarter)
            numbers[:, cls + row * grid[1] + column, i] *= np.exp(1j * row * speed)
            numbers[:, cls + row * grid[1] + column, quarter + i] *= np.exp(1j * column * speed)
    return np.concatenate([numbers.real, numbers.imag], axis=-1)


def shifted(images, size, p, norm):
    """Each patch's own pixels and, pixel by pixel beside them, those half a patch away in four directions."""
    rows, columns = images.shape[1] // size, images.shape[2] // size
    out = np.zeros((len(images), rows, columns, size * size * 15))
    for row, column, y, x in np.ndindex(rows, columns, size, size):
        for s, (down, right) in enumerate([(0, 0), (-1, -1), (-1, 1), (1, -1), (1, 1)]):
            at_y, at_x = row * size + y + down * (size // 2), column * size + x + right * (size // 2)
            if 0 <= at_y < images.shape[1] and 0 <= at_x < images.shape[2]:
                start = (y * size + x) * 15 + 3 * s
                out[:, row, column, start : start + 3] = images[:, at_y, at_x]
    return norm(out, p)


def waves(rows, columns, width):
    """sin and cos of the row, then of the column, number by number."""
    table = np.zeros((rows * columns, width))
    quarter = width // 4
    for row in range(rows):
        for column in range(columns):
            for i in range(quarter):
                frequency = 1 / 10_000 ** (i / quarter)
                angles = row * frequency, row * frequency, column * frequency, column * frequency
                for part, (wave, angle) in enumerate(zip((math.sin, math.cos) * 2, angles, strict=True)):
                    table[row * columns + column, part * quarter + i] = wave(angle)
    return table


@pytest.mark.parametrize(
    "fields",
    [
        dict(),
        dict(pool="gap"),
        dict(position_embedding="sincos2d"),
        dict(pool="gap", position_embedding="sincos2d", gelu="exact"),
        dict(gelu="exact", norm_epsilon=1e-2, layer_scale=0.1),
        dict(qk_norm=True, norm_epsilon=1e-5),
        dict(pool="gap", representation_size=16),
        dict(qk_norm=True, layer_scale=0.1, representation_size=16, position_embedding="sincos2d", remat=True),
        dict(position_embedding="rotary"),
        dict(position_embedding="none", pool="gap"),
        dict(learned_temperature=True),
        dict(mask_self=True, pool="gap"),
        dict(mlp_conv=True),
        dict(pool="seq", mlp_conv=True, remat=True),
        dict(stem="shifted"),
        dict(stem="shifted", pool="seq", position_embedding="rotary", learned_temperature=True, mask_self=True),
    ],
    ids=str,
)
def test_forward_pass_is_the_papers(fields):
    model, params = make(**fields)
    all_fields = {name: getattr(model, name) for name in model.__dataclass_fields__}
    expected, expected_weights = reference(params, IMAGES, all_fields)
    logits, state = apply(model, params, train=False, mutable=("intermediates",))
    assert logits.shape == (5, 7) and logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    for i, weights in enumerate(expected_weights):
        block = state["intermediates"]["Transformer"][f"encoderblock_{i}"]
        (found,) = block["MultiHeadDotProductAttention_1"]["attention_weights"]
        np.testing.assert_allclose(found, weights, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "fields", [dict(), dict(pool="gap"), dict(pool="seq"), dict(representation_size=16, dtype=jnp.bfloat16)], ids=str
)
def test_without_classes_comes_out_what_the_head_reads(fields):
    model, params = make(**fields)
    headless = model.clone(num_classes=0)
    fresh = jax.eval_shape(lambda: headless.init(jax.random.key(0), jnp.asarray(IMAGES, jnp.float32), train=False))
    body = {name: leaf for name, leaf in params["params"].items() if name != "head"}
    assert jax.tree.structure(fresh["params"]) == jax.tree.structure(body)
    features = apply(headless, {"params": body}, train=False)
    assert features.shape == (5, model.representation_size or model.width) and features.dtype == jnp.float32
    head = params["params"]["head"]
    logits = np.float64(features) @ head["kernel"] + head["bias"]
    np.testing.assert_allclose(apply(model, params, train=False), logits, rtol=0, atol=1e-5 * np.abs(logits).max())


def test_sincos_table():
    np.testing.assert_allclose(sincos2d((3, 5), 16), waves(3, 5, 16), atol=1e-6)
    assert len(np.unique(sincos2d((8, 8), 64), axis=0)) == 64  # no two places look alike


def test_depthwise_convolution_and_its_gradient():
    rng = np.random.default_rng(0)
    x, kernel = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((2, 5, 4, 6), (3, 3, 6)))
    layout = ("NHWC", "HWIO", "NHWC")

    def native(x, kernel):
        return jax.lax.conv_general_dilated(
            x, kernel[:, :, None], (1, 1), "SAME", dimension_numbers=layout, feature_group_count=6
        )

    weights = jnp.asarray(rng.normal(size=x.shape), jnp.float32)
    for found, expected in zip(
        *(
            jax.value_and_grad(lambda x, k, f=f: (weights * f(x, k)).sum(), (0, 1))(x, kernel)
            for f in (depthwise, native)
        ),
        strict=True,
    ):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found, expected)
    exact = jax.grad(lambda k: depthwise(x, k).sum())(kernel)
    half = jax.grad(lambda k: depthwise(x.astype(jnp.bfloat16), k).sum().astype(jnp.float32))(
        kernel.astype(jnp.bfloat16)
    )
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(half.astype(jnp.float32), exact, rtol=0, atol=0.02 * np.abs(exact).max())


@pytest.mark.parametrize("cls", [0, 1])
def test_middle_positions(cls):
    """Six by six patches, and the middle four by four of them: the same numbers, and the class token's."""
    table = jnp.arange(cls + 36.0)[None, :, None] * jnp.ones(2)
    params = {"Transformer": {"posembed_input": {"pos_embedding": table}, "other": 1}, "head": 2}
    found = middle_positions(params, 6, 4)
    middle = [cls + row * 6 + column for row in range(1, 5) for column in range(1, 5)]
    np.testing.assert_array_equal(found["Transformer"]["posembed_input"]["pos_embedding"][0, :, 0], [0] * cls + middle)
    assert found["Transformer"]["other"] == 1 and found["head"] == 2
    assert middle_positions(params, 6, 6) is params
    assert middle_positions({"Transformer": {}}, 6, 4) == {"Transformer": {}}  # no learned positions


def test_rotary_scores_depend_on_the_distance_alone():
    """The same query and key, put at all pairs of places: the product is a function of the offset between them."""
    rng = np.random.default_rng(0)
    rows, columns = 4, 5
    q, k = (jnp.asarray(np.tile(rng.normal(size=8), (1, rows * columns, 1, 1)), jnp.float32) for _ in range(2))
    products = np.einsum("qd,kd->qk", *(np.asarray(rotate(x, (rows, columns)))[0, :, 0] for x in (q, k)))
    places = np.indices((rows, columns)).reshape(2, -1)
    offsets = (places[:, :, None] - places[:, None, :]).reshape(2, -1).T
    groups = {tuple(offset): products.ravel()[(offsets == offset).all(axis=1)] for offset in offsets}
    assert len(groups) == 7 * 9
    assert max(np.ptp(group) for group in groups.values()) < 1e-5
    assert len(np.unique(np.round([group[0] for group in groups.values()], 4))) > 55  # and tells offsets apart
    assert groups[(0, 0)][0] == pytest.approx(float(q[0, 0, 0] @ k[0, 0, 0]), abs=1e-5)


def test_no_token_attends_to_itself():
    model, params = make(mask_self=True)
    _, state = apply(model, params, train=False, mutable=("intermediates",))
    for weights in jax.tree.leaves(state):
        assert not np.diagonal(weights, axis1=-2, axis2=-1).any()
        np.testing.assert_allclose(weights.sum(axis=-1), 1, atol=1e-6)


def test_huge_scores_do_not_overflow():
    model, params = make()
    attention = params["params"]["Transformer"]["encoderblock_0"]["MultiHeadDotProductAttention_1"]
    attention["query"]["kernel"] = attention["query"]["kernel"] * 1e4
    gradient = jax.jit(jax.grad(lambda params: apply(model, params, train=False).sum()))(params)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


def equations(jaxpr):
    """All equations of a jaxpr, those inside its calls too."""
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


def test_query_key_and_value_are_one_product():
    model, params = make()
    jaxpr = jax.make_jaxpr(lambda p, x: model.apply(p, x, train=False))(params, jnp.asarray(IMAGES, jnp.float32))
    products = [equation for equation in equations(jaxpr.jaxpr) if equation.primitive.name == "dot_general"]
    assert len(products) == 1 + model.depth * (1 + 2 + 1 + 2) + 1  # patches; qkv, scores and values, out, MLP; head
    assert sum(product.outvars[0].aval.shape == (5 * 7, 3 * 24) for product in products) == model.depth


# --- numbers and memory ---------------------------------------------------------------------------------------------


def loss_and_gradient(model, params, **options):
    images = jnp.asarray(IMAGES, jnp.float32)

    def loss(params):
        return (model.apply(params, images, train=True, **options) ** 2).sum()

    return jax.jit(jax.value_and_grad(loss))(params)


def test_bfloat16_computes_and_float32_stays():
    model, params = make(norm_epsilon=1e-5)
    images = jnp.asarray(IMAGES, jnp.float32)
    half = model.clone(dtype=jnp.bfloat16)
    fresh = jax.eval_shape(lambda: half.init(jax.random.key(0), images, train=False))
    assert {leaf.dtype for leaf in jax.tree.leaves(fresh)} == {jnp.dtype(jnp.float32)}
    logits, state = apply(half, params, train=False, mutable=("intermediates",))
    exact = apply(model, params, train=False)
    assert logits.dtype == jnp.float32
    assert 1e-6 < np.abs(logits - exact).max() / np.abs(exact).max() < 0.05  # coarser, but the same function
    for weights in jax.tree.leaves(state):
        assert weights.dtype == jnp.float32
        np.testing.assert_allclose(weights.sum(axis=-1), 1, atol=1e-6)
    _, gradient = loss_and_gradient(half, params)
    assert {leaf.dtype for leaf in jax.tree.leaves(gradient)} == {jnp.dtype(jnp.float32)}
    jaxpr = jax.make_jaxpr(lambda p, x: half.apply(p, x, train=False))(params, images)
    for equation in equations(jaxpr.jaxpr):
        dtype = equation.outvars[0].aval.dtype
        if equation.primitive.name in ("exp", "rsqrt"):  # softmax and norms
            assert dtype == jnp.float32
        if equation.primitive.name == "dot_general":  # only the head's operands are float32
            head = equation.outvars[0].aval.shape == (5, 7)
            assert {x.aval.dtype for x in equation.invars} == {jnp.dtype(jnp.float32 if head else jnp.bfloat16)}


def test_remat_changes_memory_and_nothing_else():
    options = dict(mlp_conv=True, position_embedding="rotary", learned_temperature=True, mask_self=True, pool="seq")
    model, params = make(dropout=0.1, attention_dropout=0.1, drop_path=0.2, **options)
    rngs = {"rngs": {"dropout": jax.random.key(3)}}
    value, gradient = loss_and_gradient(model, params, **rngs)
    other_value, other_gradient = loss_and_gradient(model.clone(remat=True), params, **rngs)
    np.testing.assert_allclose(value, other_value, rtol=1e-6)
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(gradient))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * largest), gradient, other_gradient
    )

    def has_remat(model):
        jaxpr = jax.make_jaxpr(lambda p: loss_and_gradient(model, p, **rngs))(params)
        return any(equation.primitive.name in ("remat", "remat2", "checkpoint") for equation in equations(jaxpr.jaxpr))

    assert has_remat(model.clone(remat=True)) and not has_remat(model)


# --- what is random -------------------------------------------------------------------------------------------------


def dropouts(model, params):
    """(path, rate, axes that share a draw) of each dropout that a training pass goes through, in its order."""
    sites = []

    def spy(call, args, kwargs, context):
        module = context.module
        if isinstance(module, nn.Dropout | Dropout) and context.method_name == "__call__" and not module.deterministic:
            sites.append(("/".join(module.path[:-1]), module.rate, tuple(getattr(module, "broadcast_dims", ()))))
        return call(*args, **kwargs)

    images = jnp.asarray(IMAGES, jnp.float32)
    with nn.intercept_methods(spy):
        jax.eval_shape(lambda key: model.apply(params, images, train=True, rngs={"dropout": key}), jax.random.key(0))
    return sites


@pytest.mark.parametrize("rate, dropped", [(0.1, 26 / 256), (0.5, 0.5), (0.9, 230 / 256), (0.999, 255 / 256)])
def test_dropout_drops_its_rate_and_keeps_the_mean(rate, dropped):
    dropout = Dropout(rate, deterministic=False)
    x = jnp.full((50, 30, 67), 3.0)  # 67: not a whole number of words of four draws
    out = np.asarray(dropout.apply({}, x, rngs={"dropout": jax.random.key(0)}))
    np.testing.assert_allclose(np.unique(out), [0, 3 / (1 - dropped)], rtol=1e-6)
    assert np.mean(out == 0) == pytest.approx(dropped, abs=0.005)
    assert np.abs(np.mean(out == 0, axis=(0, 1)) - dropped).max() < 0.06  # at the row's end as anywhere
    neighbours = np.corrcoef((out[..., :-1] == 0).ravel(), (out[..., 1:] == 0).ravel())[0, 1]
    assert abs(neighbours) < 0.02  # the bytes of one word are four draws
    assert Dropout(rate, deterministic=True).apply({}, x) is x
    half = dropout.apply({}, x.astype(jnp.bfloat16), rngs={"dropout": jax.random.key(0)})
    assert half.dtype == jnp.bfloat16 and np.array_equal(half == 0, out == 0)


def test_dropout_sites_and_rates():
    model, params = make(depth=3, dropout=0.1, attention_dropout=0.2, drop_path=0.3)
    expected = [("Transformer", 0.1, ())]
    for i, drop_path in enumerate((0.0, 0.15, 0.3)):  # linear over the depth
        block = f"Transformer/encoderblock_{i}"
        expected += [
            (f"{block}/MultiHeadDotProductAttention_1", 0.2, ()),
            (block, 0.1, ()),
            (block, pytest.approx(drop_path), (1, 2)),
            (f"{block}/MlpBlock_3", 0.1, ()),
            (f"{block}/MlpBlock_3", 0.1, ()),
            (block, pytest.approx(drop_path), (1, 2)),
        ]
    assert dropouts(model, params) == expected


def test_one_block_is_never_dropped():
    model, params = make(depth=1, drop_path=0.5)
    assert [rate for *_, rate, axes in dropouts(model, params) if axes] == [0.0, 0.0]


def test_stochastic_depth_drops_examples_and_keeps_the_mean():
    rate = 0.3
    block = EncoderBlock(
        num_heads=2,
        mlp_dim=8,
        dropout=0.0,
        attention_dropout=0.0,
        drop_path=rate,
        gelu="tanh",
        norm_epsilon=1e-6,
        layer_scale=0.0,
        qk_norm=False,
        learned_temperature=False,
        mask_self=False,
        rotary=False,
        mlp_conv=False,
        dtype=jnp.float32,
    )
    grid = (1, 3)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4096, 3, 8)), jnp.float32)
    params = jax.jit(lambda key: block.init(key, x, grid, False))(jax.random.key(0))
    mlp = params["params"]["MlpBlock_3"]["Dense_1"]
    mlp["kernel"], mlp["bias"] = jnp.zeros_like(mlp["kernel"]), jnp.zeros_like(mlp["bias"])  # leaves the first branch
    whole = block.apply(params, x, grid, False) - x
    drawn = block.apply(params, x, grid, True, rngs={"dropout": jax.random.key(1)}) - x
    kept = np.abs(drawn).max(axis=(1, 2)) > 0
    np.testing.assert_allclose(drawn, np.where(kept[:, None, None], whole / (1 - rate), 0), atol=1e-5)
    assert kept.mean() == pytest.approx(1 - rate, abs=0.03)  # 4 standard deviations


def test_evaluation_is_deterministic_and_training_is_not():
    model, params = make(dropout=0.2, attention_dropout=0.2, drop_path=0.2)
    plain = apply(make()[0], params, train=False)
    np.testing.assert_array_equal(apply(model, params, train=False), plain)  # and asks for no rng
    one, same, other = (apply(model, params, train=True, rngs={"dropout": jax.random.key(seed)}) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one, same)
    assert np.abs(one - other).max() > 0.01


def test_training_without_rates_needs_no_rng():
    model, params = make()
    np.testing.assert_array_equal(apply(model, params, train=True), apply(model, params, train=False))


def test_attention_dropout_keeps_the_mean():
    switches = dict.fromkeys(("qk_norm", "learned_temperature", "mask_self", "rotary"), False)
    attention = SelfAttention(num_heads=2, dropout=0.5, norm_epsilon=1e-6, dtype=jnp.float32, **switches)
    grid = (1, 5)
    x = jax.random.normal(jax.random.key(0), (1, 5, 8))
    params = attention.init(jax.random.key(1), x, grid, train=False)
    drawn = jax.jit(jax.vmap(lambda key: attention.apply(params, x, grid, train=True, rngs={"dropout": key})))
    outputs = np.asarray(drawn(jax.random.split(jax.random.key(2), 4000)))
    error = outputs.mean(axis=0) - attention.apply(params, x, grid, train=False)
    assert outputs.std(axis=0).min() > 0
    assert np.abs(error / (outputs.std(axis=0) / math.sqrt(4000))).max() < 5  # standard errors


# --- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(patch_size=5), r"images of 12x8 pixels .* patch_size 5: .* 1, 2, 4$"),
        (dict(patch_size=0), r"patch_size 0: .* 1, 2, 4$"),
        (dict(num_heads=5), r"width 24 .* num_heads 5: .* 1, 2, 3, 4, 6, 8, 12, 24$"),
        (dict(num_heads=0), r"num_heads 0: "),
        (dict(width=30, position_embedding="sincos2d"), r"width is 30: .* 28 or 32$"),
        (dict(patch_size=1, stem="conv"), r"patch_size is 1: allowed are 2, 4, 8"),
        (dict(pool="max"), r"pool is 'max': allowed are cls, gap, seq$"),
        (dict(num_heads=4, position_embedding="rotary"), r"24 / num_heads 4 is 6: allowed are multiples of 4$"),
        (dict(patch_size=1, stem="shifted"), r"patch_size 1: allowed are sizes from 2 to half"),
        (dict(gelu="relu"), r"gelu is 'relu': allowed are tanh, exact$"),
    ],
    ids=str,
)
def test_sizes_that_do_not_fit(fields, message):
    with pytest.raises(UserError) as error:
        VisionTransformer(**SMALL | fields).init(jax.random.key(0), jnp.zeros((1, 12, 8, 3)), train=False)
    assert re.search(message, str(error.value)) and "\n" not in str(error.value)


@pytest.mark.parametrize("size", [(0, 8), (8, 0), (0, 0)])
def test_pictures_without_pixels(size):
    with pytest.raises(UserError, match="images of .* pixels are not divisible by patch_size 4"):
        VisionTransformer(**SMALL).check(*size)


def test_one_token_cannot_leave_itself_out():
    with pytest.raises(UserError, match="mask_self leaves the one token"):
        VisionTransformer(**SMALL | dict(mask_self=True, pool="gap")).check(4, 4)
    VisionTransformer(**SMALL | dict(mask_self=True, pool="cls")).check(4, 4)


def test_shifted_patches_want_a_neighbour():
    model = VisionTransformer(**SMALL | dict(patch_size=8, stem="shifted"))
    with pytest.raises(UserError, match="16x8 pixels are too small for patch_size 8: .* from 2 to half the image"):
        model.init(jax.random.key(0), jnp.zeros((1, 16, 8, 3)), train=False)


@pytest.mark.parametrize("patch_size", [2, 4, 8])
def test_conv_stem_takes_the_powers_of_two(patch_size):
    VisionTransformer(**SMALL | dict(patch_size=patch_size, stem="conv")).check(16, 8)


def test_conv_stem_wants_a_power_of_two():
    with pytest.raises(UserError, match="patch_size is 6: allowed are 2, 4, 8"):
        VisionTransformer(**SMALL | dict(patch_size=6, stem="conv")).init(
            jax.random.key(0), jnp.zeros((1, 12, 12, 3)), train=False
        )

"""The ResNet stem: its parameters against Google's, its output against NumPy and PyTorch in float64."""

import functools
import math
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from numpy.lib.stride_tricks import sliding_window_view

from vit_jax.errors import UserError
from vit_jax.models.presets import HYBRIDS, preset
from vit_jax.models.resnet import resnet, total_stride
from vit_jax.models.vit import VisionTransformer

SMALL = dict(num_classes=7, width=24, depth=1, num_heads=3, mlp_dim=40, stem="resnet")
# Sides on the way through the stem: 52, 26, 13, 7 and 37, 19, 10, 5, so that SAME pads even and odd ones.
ODD = (2, 52, 37, 3)


class Stem(nn.Module):
    """The stem alone: a function needs a compact method to live in."""

    blocks: tuple[int, ...]
    dtype: type = jnp.float32

    @nn.compact
    def __call__(self, images):
        return resnet(images, self.blocks, 1e-6, self.dtype)


@functools.cache
def make(model, shape, **options):
    """Random images, and parameters that are random and not zero in every array."""
    rng = np.random.default_rng(0)
    images = rng.normal(size=shape).astype(np.float32)
    tree = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.asarray(images), **options))["params"]

    def fill(path, leaf):  # kernels of a mean and a deviation that standardising them takes away
        loc, scale = (0.02, 0.1) if path[-1].key == "kernel" else (0.7, 0.3)
        return rng.normal(loc, scale, leaf.shape).astype(np.float32)

    return images, jax.tree_util.tree_map_with_path(fill, tree)


@functools.partial(jax.jit, static_argnums=0, static_argnames="train")
def apply(model, params, images, **options):
    return model.apply({"params": params}, images, **options)


# --- the parameters -------------------------------------------------------------------------------------------------


def shapes(fields, image_size=224):
    images = jax.ShapeDtypeStruct((1, image_size, image_size, 3), jnp.float32)
    model = VisionTransformer(**fields)
    tree = jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), images)["params"]
    return {path: leaf.shape for path, leaf in flatten_dict(tree, sep="/").items()}


def stem_size(blocks):
    """Weights of the root, then unit by unit: three convolutions and norms, the first with a fourth of each."""
    total, channels = 7 * 7 * 3 * 64 + 2 * 64, 64
    for width, units in zip((64, 128, 256, 512), blocks, strict=False):
        total += channels * 4 * width + 2 * 4 * width
        for _ in range(units):
            total += channels * width + 2 * width + 9 * width * width + 2 * width + width * 4 * width + 2 * 4 * width
            channels = 4 * width
    return total, channels


COUNTS = {  # tokens of 224 px, side of the embedding's kernel, and the parameters that Google's own tests expect
    "R+Ti/16": (7 * 7, 8, 6_337_704),
    "R26+S/32": (7 * 7, 1, 36_431_912),
    "R26+B/32": (7 * 7, 1, 101_383_976),
    "R50+B/16": (14 * 14, 1, 98_659_112),
    "R50+L/32": (7 * 7, 1, 328_994_856),
}


@pytest.mark.parametrize("name", HYBRIDS)
def test_parameter_count(name):
    tokens, patch, expected = COUNTS[name]
    fields = preset(name)
    width, mlp_dim = fields["width"], fields["mlp_dim"]
    found = shapes(fields | dict(num_classes=1000))
    stem, channels = stem_size(fields["resnet_blocks"])
    block = 4 * (width + 1) * width + (width + 1) * mlp_dim + (mlp_dim + 1) * width + 4 * width
    embedding = (patch * patch * channels + 1) * width
    vit = embedding + width + (tokens + 1) * width + fields["depth"] * block + 2 * width + (width + 1) * 1000
    assert sum(math.prod(shape) for shape in found.values()) == stem + vit == expected
    assert found["embedding/kernel"] == (patch, patch, channels, width)


def test_tree_is_the_official_file():
    """Names and shapes of R50+ViT-B_16 at 224 px: the stem's lie beside the embedding, under no name of their own."""
    expected = {
        "conv_root/kernel": (7, 7, 3, 64),
        "gn_root/scale": (64,),
        "gn_root/bias": (64,),
        "embedding/kernel": (1, 1, 1024, 768),
        "embedding/bias": (768,),
        "cls": (1, 1, 768),
        "Transformer/posembed_input/pos_embedding": (1, 197, 768),
        "head/kernel": (768, 1000),
        "head/bias": (1000,),
    }
    for block, units, width, before in ((1, 3, 64, 64), (2, 4, 128, 256), (3, 9, 256, 512)):
        expected[f"block{block}/unit1/conv_proj/kernel"] = (1, 1, before, 4 * width)
        expected |= {f"block{block}/unit1/gn_proj/{name}": (4 * width,) for name in ("scale", "bias")}
        for unit in range(1, units + 1):
            path = f"block{block}/unit{unit}"
            expected[f"{path}/conv1/kernel"] = (1, 1, before if unit == 1 else 4 * width, width)
            expected[f"{path}/conv2/kernel"] = (3, 3, width, width)
            expected[f"{path}/conv3/kernel"] = (1, 1, width, 4 * width)
            for norm, channels in (("gn1", width), ("gn2", width), ("gn3", 4 * width)):
                expected |= {f"{path}/{norm}/{name}": (channels,) for name in ("scale", "bias")}
    found = shapes(preset("R50+B/16") | dict(num_classes=1000))
    encoder = {path for path in found if path.startswith(("Transformer/encoderblock_", "Transformer/encoder_norm"))}
    assert len(encoder) == 12 * 16 + 2
    assert {path: shape for path, shape in found.items() if path not in encoder} == expected


def test_initial_values():
    """A new unit adds nothing to its residual, and has a gradient all the same."""
    images, _ = make(Stem((1,)), ODD)
    params = jax.jit(Stem((1,)).init)(jax.random.key(0), images)["params"]
    for path, leaf in flatten_dict(params, sep="/").items():
        if path.endswith("kernel"):
            assert np.std(leaf) == pytest.approx(math.prod(leaf.shape[:3]) ** -0.5, rel=0.1)
        else:
            assert (leaf == float(path.endswith("scale") and "gn3" not in path)).all()
    gradient = jax.jit(jax.grad(lambda params: (apply(Stem((1,)), params, images) ** 2).sum()))(params)
    assert np.abs(gradient["block1"]["unit1"]["gn3"]["scale"]).min() > 0


# --- the function ---------------------------------------------------------------------------------------------------


def padding(side, size, stride):
    """What XLA and TensorFlow call SAME: as many places as strides begun, the odd zero at the end."""
    outputs = math.ceil(side / stride)
    total = max((outputs - 1) * stride + size - side, 0)
    return total // 2, math.ceil(total / 2)


class InNumpy:
    """[B, H, W, C], float64."""

    @staticmethod
    def windows(x, size, stride, fill):
        """[B, h, w, C, size, size]: what the kernel sees at each of its places."""
        around = [(0, 0), *(padding(side, size, stride) for side in x.shape[1:3]), (0, 0)]
        seen = sliding_window_view(np.pad(x, around, constant_values=fill), (size, size), axis=(1, 2))
        return seen[:, ::stride, ::stride]

    def conv(self, x, kernel, stride):
        kernel = (kernel - kernel.mean(axis=(0, 1, 2))) / (kernel.std(axis=(0, 1, 2)) + 1e-5)
        return np.einsum("bhwcij,ijcd->bhwd", self.windows(x, len(kernel), stride, 0), kernel, optimize=True)

    def norm(self, x, p):
        groups = x.reshape(*x.shape[:3], 32, -1)
        mean, variance = groups.mean((1, 2, 4), keepdims=True), groups.var((1, 2, 4), keepdims=True)
        return ((groups - mean) / np.sqrt(variance + 1e-6)).reshape(x.shape) * p["scale"] + p["bias"]

    def relu(self, x):
        return np.maximum(x, 0)

    def pool(self, x):
        return self.windows(x, 3, 2, -np.inf).max(axis=(4, 5))


class InTorch:
    """[B, C, H, W], by PyTorch's own convolution, norm and pooling."""

    def __init__(self, torch):
        self.torch, self.functional = torch, torch.nn.functional

    def padded(self, x, size, stride, fill):
        (top, bottom), (left, right) = (padding(side, size, stride) for side in x.shape[2:])
        return self.functional.pad(x, (left, right, top, bottom), value=fill)

    def conv(self, x, kernel, stride):
        deviation, mean = self.torch.std_mean(kernel, dim=(0, 1, 2), correction=0)
        kernel = ((kernel - mean) / (deviation + 1e-5)).permute(3, 2, 0, 1)
        return self.functional.conv2d(self.padded(x, kernel.shape[-1], stride, 0.0), kernel, stride=stride)

    def norm(self, x, p):
        return self.functional.group_norm(x, 32, p["scale"], p["bias"], eps=1e-6)

    def relu(self, x):
        return self.functional.relu(x)

    def pool(self, x):
        return self.functional.max_pool2d(self.padded(x, 3, 2, -math.inf), 3, 2)


def reference(of, params, x, blocks):
    """Google's stem, written once on the operations of `of`."""
    x = of.pool(of.relu(of.norm(of.conv(x, params["conv_root"]["kernel"], 2), params["gn_root"])))
    for i, units in enumerate(blocks, 1):
        for j in range(1, units + 1):
            p = params[f"block{i}"][f"unit{j}"]
            stride = 2 if i > 1 and j == 1 else 1
            y = of.relu(of.norm(of.conv(x, p["conv1"]["kernel"], 1), p["gn1"]))
            y = of.relu(of.norm(of.conv(y, p["conv2"]["kernel"], stride), p["gn2"]))
            y = of.norm(of.conv(y, p["conv3"]["kernel"], 1), p["gn3"])
            if j == 1:
                x = of.norm(of.conv(x, p["conv_proj"]["kernel"], stride), p["gn_proj"])
            x = of.relu(x + y)
    return x


@pytest.mark.parametrize(
    ("blocks", "shape", "expected_shape"),
    [((), ODD, (2, 13, 10, 64)), ((1, 2), (1, 70, 41, 4), (1, 9, 6, 512))],
    ids=str,
)
def test_stem_in_numpy(blocks, shape, expected_shape):
    images, params = make(Stem(blocks), shape)
    exact = jax.tree.map(np.float64, params)
    expected = reference(InNumpy(), exact, np.float64(images), blocks)
    found = apply(Stem(blocks), params, images)
    assert found.shape == expected.shape == expected_shape and found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_stem_and_its_gradient_in_torch():
    torch = pytest.importorskip("torch", reason="pip install '.[parity]'")
    blocks = (2, 1)
    images, params = make(Stem(blocks), ODD)
    weights = np.random.default_rng(1).normal(size=(2, 7, 5, 512)).astype(np.float32)

    def objective(params, images):
        out = Stem(blocks).apply({"params": params}, images)
        return (weights * out).sum(), out

    (_, found), gradients = jax.jit(jax.value_and_grad(objective, (0, 1), has_aux=True))(params, images)

    leaves = jax.tree.map(lambda leaf: torch.tensor(leaf, dtype=torch.float64, requires_grad=True), (params, images))
    out = reference(InTorch(torch), leaves[0], leaves[1].permute(0, 3, 1, 2), blocks).permute(0, 2, 3, 1)
    (torch.tensor(weights) * out).sum().backward()
    expected = out.detach().numpy()
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())

    def compare(found, leaf):
        expected = leaf.grad.numpy()
        assert np.abs(expected).max() > 0
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * np.abs(expected).max())

    jax.tree.map(compare, gradients, leaves)


@pytest.mark.parametrize(("blocks", "patch_size", "left"), [((), 8, 2), ((1, 1), 8, 1)], ids=str)
def test_the_tokens_are_patches_of_the_feature_map(blocks, patch_size, left):
    """The hybrid is the plain ViT on the stem's output, in patches whose side the stem leaves `left` of."""
    model = VisionTransformer(**SMALL, resnet_blocks=blocks, patch_size=patch_size)
    images, params = make(model, (2, 64, 32, 3), train=False)
    plain = VisionTransformer(**SMALL | dict(stem="patch"), patch_size=left)
    stem = {name: leaf for name, leaf in params.items() if name.startswith(("conv_root", "gn_root", "block"))}
    features = apply(Stem(blocks), stem, images)
    rest = {name: leaf for name, leaf in params.items() if name not in stem}
    assert rest["Transformer"]["posembed_input"]["pos_embedding"].shape[1] == 1 + 64 * 32 // patch_size**2
    expected = apply(plain, rest, features, train=False)
    found = apply(model, params, images, train=False)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_bfloat16_is_close_and_float32_stays():
    images, params = make(Stem((1,)), ODD)
    half = Stem((1,), jnp.bfloat16)
    fresh = jax.eval_shape(lambda: half.init(jax.random.key(0), jnp.asarray(images)))
    assert {leaf.dtype for leaf in jax.tree.leaves(fresh)} == {jnp.dtype(jnp.float32)}
    exact, found = apply(Stem((1,)), params, images), apply(half, params, images)
    assert found.dtype == jnp.bfloat16
    error = np.abs(found.astype(jnp.float32) - exact)
    assert 1e-4 < error.max() / np.abs(exact).max() < 0.05 and error.mean() / np.abs(exact).mean() < 0.02
    jaxpr = str(jax.make_jaxpr(lambda: half.apply({"params": params}, images))())
    statistics = re.findall(r"(\w+)\[[\d,]*\] = (?:reduce_sum|rsqrt|sqrt)\b", jaxpr)  # of filters and of groups
    assert len(statistics) > 10 and set(statistics) == {"f32"}
    # Filters are standardised before they are rounded: here their mean is a hundred times their deviation.
    moved = params | {"conv_root": {"kernel": params["conv_root"]["kernel"] + 10}}
    error = np.abs(apply(half, moved, images).astype(jnp.float32) - exact)
    assert error.mean() / np.abs(exact).mean() < 0.02


# --- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("blocks", "stride"), [((), 4), ((2,), 4), ((3, 4, 9), 16), ((3, 4, 6, 3), 32)], ids=str)
def test_patch_sizes_that_the_stem_does_not_divide(blocks, stride):
    assert total_stride(blocks) == stride
    for factor in (1, 3):
        VisionTransformer(**SMALL, resnet_blocks=blocks, patch_size=factor * stride).check(192, 96)
    for patch_size in (stride // 2, stride + stride // 2):
        with pytest.raises(UserError, match=rf"stem resnet .* {stride} times.* is {patch_size}: .* of {stride}$"):
            VisionTransformer(**SMALL, resnet_blocks=blocks, patch_size=patch_size).check(192, 96)


def test_a_stage_without_units():
    with pytest.raises(UserError, match=r"resnet_blocks is \(3, 0\): each stage needs"):
        VisionTransformer(**SMALL, resnet_blocks=(3, 0), patch_size=8).check(16, 16)

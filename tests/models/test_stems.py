import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from vit_jax.models.stems import ConvStem, HalvingConv, PatchEmbedding
from vit_jax.models.vit import VisionTransformer

CONV = dict(num_classes=10, patch_size=4, width=64, depth=1, num_heads=4, mlp_dim=64, stem="conv", head_zero_init=False)


def test_patch_embedding_is_a_convolution():
    images = jax.random.normal(jax.random.key(0), (2, 12, 8, 3))
    stem = PatchEmbedding(patch_size=4, width=16, dtype=jnp.float32)
    params = stem.init(jax.random.key(1), images)
    params = jax.tree.map(lambda leaf: leaf + 0.1, params)
    kernel, bias = params["params"]["kernel"], params["params"]["bias"]
    layout = ("NHWC", "HWIO", "NHWC")
    expected = jax.lax.conv_general_dilated(images, kernel, (4, 4), "VALID", dimension_numbers=layout) + bias
    found = jax.jit(stem.apply)(params, images)
    assert found.shape == (2, 3, 2, 16)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_halving_convolution_is_a_convolution():
    images = jax.random.normal(jax.random.key(0), (2, 12, 8, 5))
    conv = HalvingConv(width=7, dtype=jnp.float32)
    params = conv.init(jax.random.key(1), images)
    layout = ("NHWC", "HWIO", "NHWC")
    kernel, padding = params["params"]["kernel"], [(1, 1), (1, 1)]
    expected = jax.lax.conv_general_dilated(images, kernel, (2, 2), padding, dimension_numbers=layout)
    np.testing.assert_allclose(conv.apply(params, images), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("patch_size", "channels"), [(2, [64]), (4, [32, 64]), (16, [8, 16, 32, 64]), (32, [8, 8, 16, 32, 64])]
)
def test_conv_stem_halves_and_doubles(patch_size, channels):
    stem = ConvStem(patch_size=patch_size, width=64, norm_epsilon=1e-6, gelu="tanh", dtype=jnp.float32)
    images = jax.ShapeDtypeStruct((2, 64, 32, 3), jnp.float32)
    out, variables = jax.eval_shape(lambda x: stem.init_with_output(jax.random.key(0), x), images)
    assert out.shape == (2, 64 // patch_size, 32 // patch_size, 64)
    flat = flatten_dict(variables["params"], sep="/")
    for i, (before, after) in enumerate(zip([3, *channels], channels, strict=False)):
        assert flat[f"conv_{i}/kernel"].shape == (3, 3, before, after)
        assert flat[f"norm_{i}/scale"].shape == flat[f"norm_{i}/bias"].shape == (after,)
    assert len(flat) == 3 * len(channels)


def test_conv_stem_in_the_model():
    model = VisionTransformer(**CONV)
    images = jax.random.normal(jax.random.key(0), (6, 32, 32, 3))
    params = jax.jit(model.init, static_argnames="train")(jax.random.key(1), images, train=False)
    assert params["params"]["embedding"]["kernel"].shape == (1, 1, 64, 64)
    assert params["params"]["Transformer"]["posembed_input"]["pos_embedding"].shape == (1, 65, 64)
    apply = jax.jit(lambda images: model.apply(params, images, train=True))
    logits = apply(images)
    # No batch statistics: an example's logits do not depend on its neighbours, in training either.
    np.testing.assert_allclose(apply(images[2:3]), logits[2:3], atol=1e-5)

"""The ResNet before the official hybrid ViTs, where the tokens are places of its feature map.

Its names are those of Google's checkpoints, and lie beside `embedding` at the top of the tree:

    conv_root/kernel, gn_root/{scale, bias}                    [7, 7, C, 64], [64]
    block{i}/unit{j}/{conv1, conv2, conv3}/kernel              1x1, 3x3, 1x1; i and j count from 1
    block{i}/unit{j}/{gn1, gn2, gn3}/{scale, bias}
    block{i}/unit1/conv_proj/kernel, gn_proj/{scale, bias}     the residual's

Letters in the shape comments: B examples, C channels; h, w: a side over the stride, rounded up.
"""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from vit_jax.errors import UserError
from vit_jax.models.stems import convolve

WIDTH = 64  # channels of the root, and of the first stage's 3x3 convolutions


def total_stride(blocks: Sequence[int]) -> int:
    """How many times smaller the stem makes a side: the root 4 times, each stage after the first twice."""
    return 4 * 2 ** max(len(blocks) - 1, 0)


def check(blocks: Sequence[int], patch_size: int) -> None:
    """Raises UserError where a stage has no unit, or the stem cannot leave whole patches of its feature map."""
    if any(units < 1 for units in blocks):
        raise UserError(f"resnet_blocks is {tuple(blocks)}: each stage needs at least one unit")
    stride = total_stride(blocks)
    if patch_size % stride:
        raise UserError(
            f"stem resnet with resnet_blocks {tuple(blocks)} shrinks the image {stride} times, and patch_size is "
            f"{patch_size}: allowed are multiples of {stride}"
        )


def resnet(images: jax.Array, blocks: Sequence[int], norm_epsilon: float, dtype: Any) -> jax.Array:
    """Feature map of images, [B, height, width, C] -> [B, h, w, 256 * 2**(stages - 1)], or 64 channels of no stage.

    A function and no module, so that its parameters get their official names: call it in a compact method. Group norms
    and standardised weights instead of batch norms (section 4.1 of the ViT paper, arXiv 2010.11929).

    Args:
      blocks: units in each stage; () is the root alone.
    """
    # From float32: with jax 0.12, XLA's compiler for the CPU dies of these strides over bfloat16 pixels.
    x = StandardisedConv(WIDTH, size=7, stride=2, dtype=dtype, name="conv_root")(images.astype(jnp.float32))
    x = nn.relu(nn.GroupNorm(epsilon=norm_epsilon, dtype=dtype, name="gn_root")(x))
    x = nn.max_pool(x, (3, 3), strides=(2, 2), padding="SAME")
    for i, units in enumerate(blocks):
        x = Stage(units, WIDTH * 2**i, 1 if i == 0 else 2, norm_epsilon, dtype, name=f"block{i + 1}")(x)
    return x


def same_padding(side: int, size: int, stride: int) -> tuple[int, int]:
    """Zeros before and after a side for ceil(side / stride) places of a kernel, the odd one after (TensorFlow's)."""
    missing = max((-(-side // stride) - 1) * stride + size - side, 0)
    return missing // 2, missing - missing // 2


class StandardisedConv(nn.Module):
    """A convolution whose filters have mean 0 and deviation 1, [B, H, W, C] -> [B, h, w, features].

    Weight standardisation (Qiao et al. 2019, arXiv 1903.10520), in float32.
    """

    features: int
    size: int
    stride: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (self.size, self.size, x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape, jnp.float32)
        kernel = kernel - kernel.mean(axis=(0, 1, 2))
        kernel = kernel / (kernel.std(axis=(0, 1, 2)) + 1e-5)
        padding = [same_padding(side, self.size, self.stride) for side in x.shape[1:3]]
        return convolve(x, kernel.astype(self.dtype), self.stride, padding)


class Unit(nn.Module):
    """A bottleneck, relu(x + f(x)) (He et al. 2016, arXiv 1512.03385, figure 5): [B, H, W, C] -> [B, h, w, 4 width]."""

    width: int
    stride: int
    norm_epsilon: float
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        def conv(x, features, size, stride, name):
            return StandardisedConv(features, size, stride, self.dtype, name=name)(x)

        def norm(x, name, scale=nn.initializers.ones):
            return nn.GroupNorm(epsilon=self.norm_epsilon, dtype=self.dtype, scale_init=scale, name=name)(x)

        width = self.width
        y = nn.relu(norm(conv(x, width, 1, 1, "conv1"), "gn1"))
        y = nn.relu(norm(conv(y, width, 3, self.stride, "conv2"), "gn2"))
        y = norm(conv(y, 4 * width, 1, 1, "conv3"), "gn3", nn.initializers.zeros)  # a new unit adds nothing
        if x.shape[-1] != 4 * width or self.stride != 1:
            x = norm(conv(x, 4 * width, 1, self.stride, "conv_proj"), "gn_proj")
        return nn.relu(x + y)


class Stage(nn.Module):
    """Units of one width, the first with the stride: [B, H, W, C] -> [B, h, w, 4 width]."""

    units: int
    width: int
    stride: int
    norm_epsilon: float
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for i in range(self.units):
            stride = self.stride if i == 0 else 1
            x = Unit(self.width, stride, self.norm_epsilon, self.dtype, name=f"unit{i + 1}")(x)
        return x

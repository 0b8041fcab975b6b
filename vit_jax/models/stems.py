"""From pixels to tokens: float images [B, height, width, C] -> [B, rows, columns, D]."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp


class PatchEmbedding(nn.Module):
    """One affine map of each patch (equation 1 of the ViT paper): a convolution whose stride is its kernel's size."""

    patch_size: int
    width: int
    dtype: Any

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        batch, height, width, channels = images.shape
        p = self.patch_size
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (p, p, channels, self.width), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (self.width,), jnp.float32)
        # Patches do not overlap, so the convolution is a transpose and one GEMM, whatever the channels and the device.
        patches = images.astype(self.dtype).reshape(batch, height // p, p, width // p, p, channels).swapaxes(2, 3)
        patches = patches.reshape(batch, height // p, width // p, p * p * channels)
        return patches @ kernel.reshape(-1, self.width).astype(self.dtype) + bias.astype(self.dtype)


def convolve(x: jax.Array, kernel: jax.Array, stride: int, padding: Sequence[tuple[int, int]]) -> jax.Array:
    """[B, H, W, C], [k, k, C, D] -> [B, h, w, D]; `padding` is (before, after) of the rows, then of the columns.

    Written as one GEMM over the pixels under the kernel: XLA's own convolution runs on one core inside a loop on the
    CPU, and made the whole training step of a small ViT four times as slow, that of a ResNet forty times.
    """
    x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    size, (height, width) = len(kernel), x.shape[1:3]
    rows, columns = height - size + 1, width - size + 1  # places of the kernel, were the stride 1
    under = [x[:, i : i + rows : stride, j : j + columns : stride] for i in range(size) for j in range(size)]
    return jnp.concatenate(under, axis=-1).astype(kernel.dtype) @ kernel.reshape(-1, kernel.shape[-1])


class HalvingConv(nn.Module):
    """A 3x3 convolution of stride 2, [B, 2h, 2w, C] -> [B, h, w, D]; no bias, for the norm after it has one."""

    width: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (3, 3, x.shape[-1], self.width)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape, jnp.float32)
        return convolve(x, kernel.astype(self.dtype), 2, [(1, 1), (1, 1)])  # padded as in the paper


class ConvStem(nn.Module):
    """Halves the image log2(patch_size) times by 3x3 convolutions (Xiao et al. 2021, arXiv 2106.14881).

    Channels double up to `width`; a PatchEmbedding of patch size 1 follows. Each convolution is normalised over a
    pixel's channels, not over the batch as in the paper: no running statistics, and an example's logits stay its own.
    """

    patch_size: int
    width: int
    norm_epsilon: float
    gelu: str
    dtype: Any

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        x = images.astype(self.dtype)
        halvings = self.patch_size.bit_length() - 1
        for i in range(halvings):
            channels = max(self.width >> (halvings - 1 - i), 8)
            x = HalvingConv(channels, self.dtype, name=f"conv_{i}")(x)
            x = nn.LayerNorm(epsilon=self.norm_epsilon, dtype=self.dtype, name=f"norm_{i}")(x)
            x = nn.gelu(x, approximate=self.gelu == "tanh")
        return x


class ShiftedPatches(nn.Module):
    """Each patch beside those half a patch up and down its diagonals, normalised: [B, H, W, C] -> [B, h, w, 5 P P C].

    Shifted patch tokenisation (Lee et al. 2021, arXiv 2112.13492, section 3.1): a token sees four times a patch's area.
    A PatchEmbedding of patch size 1 follows.
    """

    patch_size: int
    norm_epsilon: float
    dtype: Any

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        batch, height, width, channels = images.shape
        p, half = self.patch_size, self.patch_size // 2
        padded = jnp.pad(images, ((0, 0), (half, half), (half, half), (0, 0)))
        shifts = [(half, half), (0, 0), (0, 2 * half), (2 * half, 0), (2 * half, 2 * half)]
        seen = [padded[:, row : row + height, column : column + width] for row, column in shifts]
        x = jnp.concatenate(seen, axis=-1).reshape(batch, height // p, p, width // p, p, 5 * channels)
        x = x.swapaxes(2, 3).reshape(batch, height // p, width // p, p * p * 5 * channels)
        return nn.LayerNorm(epsilon=self.norm_epsilon, dtype=self.dtype, name="norm")(x)

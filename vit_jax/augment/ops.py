"""Operations on batches of pictures, uint8 [B, height, width, C] in and out, inside the compiled step.

All random numbers of a batch are drawn at once from its key, and every picture goes the same way through the code:
under `vmap` a branch would cost all its sides for each picture.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike


def random_crop(key: jax.Array, images: jax.Array, padding: int) -> jax.Array:
    """Pads with black by `padding` pixels on each side, then cuts out the old size at a random place."""
    pad = (padding, padding)
    padded = jnp.pad(images, ((0, 0), pad, pad, (0, 0)))
    offsets = jax.random.randint(key, (len(images), 2), 0, 2 * padding + 1)  # [B, 2]: of the top and of the left edge

    def cut(image, offset):
        return jax.lax.dynamic_slice(image, (offset[0], offset[1], 0), images.shape[1:])

    return jax.vmap(cut)(padded, offsets)


def random_flip(key: jax.Array, images: jax.Array) -> jax.Array:
    """Swaps left and right in every second picture on average."""
    flip = jax.random.bernoulli(key, shape=(len(images), 1, 1, 1))
    return jnp.where(flip, images[:, :, ::-1], images)


def random_resized_crop(
    key: jax.Array,
    images: jax.Array,
    size: int,
    min_area: float,
    max_area: float = 1.0,
    min_ratio: float = 3 / 4,
    max_ratio: float = 4 / 3,
) -> jax.Array:
    """Resizes a random box of each picture to `size` x `size` (Szegedy et al. 2015, arXiv 1409.4842, section 6).

    The box has a uniform share of the picture's area and a log-uniform ratio of width to height; a side longer than
    the picture is cut to it, where torchvision draws again. Its place is uniform and need not be a whole pixel.
    Sampling is `resize`'s, so it reaches over the box's edge, and at the picture's edge stays inside.
    """
    batch, height, width, channels = images.shape
    draws = jax.random.uniform(key, (4, batch))
    area = height * width * (min_area + draws[0] * (max_area - min_area))
    ratio = jnp.exp(math.log(min_ratio) + draws[1] * (math.log(max_ratio) - math.log(min_ratio)))
    box = jnp.minimum(jnp.sqrt(jnp.stack([area / ratio, area * ratio])), jnp.array([[height], [width]]))  # [2, B]
    corner = draws[2:] * (jnp.array([[height], [width]]) - box)  # [2, B]
    scale = size / box

    def cut(image, scale, shift):
        return jax.image.scale_and_translate(image, (size, size, channels), (0, 1), scale, shift, "bilinear")

    return to_uint8(jax.vmap(cut, in_axes=(0, 1, 1))(images.astype(jnp.float32), scale, -corner * scale))


def resize(images: jax.Array, size: int) -> jax.Array:
    """To `size` x `size` pixels, bilinear with half-pixel centres, averaging where it shrinks (as Pillow does)."""
    batch, *shape, channels = images.shape
    if shape == [size, size]:
        return images
    return to_uint8(jax.image.resize(images.astype(jnp.float32), (batch, size, size, channels), "bilinear"))


def to_uint8(images: jax.Array) -> jax.Array:
    """Rounded to whole levels, not cut off: that would darken each picture by half a level."""
    return jnp.round(images).astype(jnp.uint8)


def normalize(images: jax.Array, mean: Sequence[float], std: Sequence[float], dtype: DTypeLike) -> jax.Array:
    """Levels 0..255 as (level / 255 - mean) / std, `mean` and `std` a number a channel, computed in float32."""
    levels = images.astype(jnp.float32) / 255
    return ((levels - jnp.asarray(mean, jnp.float32)) / jnp.asarray(std, jnp.float32)).astype(dtype)

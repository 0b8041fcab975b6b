"""Operations on batches of pictures, uint8 [B, height, width, C] in and out, inside the compiled step.

All random numbers of a batch are drawn at once from its key, and every picture goes the same way through the code:
under `vmap` a branch would cost all its sides for each picture.
"""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

# All that `apply` can do. Each of the first three groups is one stage: a table of levels, a blend, a warp.
TABLES = ("posterize", "solarize", "auto_contrast", "equalize", "invert")
BLENDS = ("brightness", "color", "contrast", "sharpness", "greyscale", "blur")
GEOMETRY = ("shear_x", "shear_y", "translate_x", "translate_y", "rotate")
OPERATIONS: tuple[str, ...] = (
    *("identity", "shear_x", "shear_y", "translate_x", "translate_y", "rotate", "brightness", "color", "contrast"),
    *("sharpness", "posterize", "solarize", "auto_contrast", "equalize", "invert", "greyscale", "blur"),
)
# What a warp brings in from outside the picture. Mid-grey is what the AutoAugment code that CIFAR recipes start from
# uses (DeepVoltaire/AutoAugment, and omihub777/ViT-CIFAR after it); torchvision's default is black.
FILL = 128
BLUR_RADIUS = 6  # in pixels: three standard deviations of the widest blur asked for, 2


def random_crop(key: jax.Array, images: jax.Array, padding: int, shape: tuple[int, int]) -> jax.Array:
    """Pads with black by `padding` pixels on each side, then cuts out `shape` (height, width) at a random place."""
    height, width = shape
    pad = (padding, padding)
    padded = jnp.pad(images, ((0, 0), pad, pad, (0, 0)))
    places = jnp.array([padded.shape[1] - height + 1, padded.shape[2] - width + 1])
    offsets = jax.random.randint(key, (len(images), 2), 0, places)  # [B, 2]: of the top and of the left edge

    def cut(image, offset):
        return jax.lax.dynamic_slice(image, (offset[0], offset[1], 0), (height, width, image.shape[-1]))

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


def apply(
    images: jax.Array, operation: jax.Array, magnitude: jax.Array, operations: Sequence[str] = OPERATIONS
) -> jax.Array:
    """Does to each picture what `operation` [B] says, an index into `operations`, by its `magnitude` [B], a float.

    Results are Pillow's; C is 1 or 3. `operations` names all that may be drawn, and only what they need is compiled.
    Every picture goes through all of them, and those not meant for it leave it as it is. What magnitude means:

    shear_x, shear_y: tangent; the top (left) edge stays and what is below (right) moves left (up) in proportion
    translate_x, translate_y: by how many pixels the content moves left (up); may be a fraction
    rotate: degrees, counter-clockwise about the centre
    brightness, color, contrast, sharpness: factor, 1 is unchanged; 0 is black, grey, mean grey, smoothed
    posterize: bits kept, 1 to 8
    solarize: levels from here on are inverted; 256 is none
    blur: standard deviation of the Gaussian in pixels, up to 2; 0 or less is none
    identity, auto_contrast, equalize, invert, greyscale: nothing
    """
    if unknown := set(operations) - set(OPERATIONS):
        raise ValueError(f"no such operations: {sorted(unknown)}; there are {OPERATIONS}")
    if len(set(operations)) < len(operations):
        raise ValueError(f"an operation is named twice in {operations}")
    chosen = {name: operation == i for i, name in enumerate(operations)}  # [B] each
    if chosen.keys() & set(TABLES):
        images = _look_up(images, _tables(images, chosen, magnitude))
    if chosen.keys() & set(BLENDS):
        images = _blend(images, chosen, magnitude)
    if chosen.keys() & set(GEOMETRY):
        images = warp(images, _matrices(chosen, magnitude, *images.shape[1:3]), FILL)
    return images


def warp(images: jax.Array, matrices: jax.Array, fill: int) -> jax.Array:
    """Pillow's affine `Image.transform`, nearest: output pixel (x, y) shows the input's place `matrix @ (x, y, 1)`.

    `matrices` [B, 2, 3] take x to the right and y down, centres of pixels at halves. Places outside the picture show
    `fill`. Right while no place is further than 2**15 pixels off.
    """
    batch, height, width, channels = images.shape
    column, row = jnp.arange(width), jnp.arange(height)[:, None]
    size = jnp.array([width, height])[:, None, None]
    a, b, c = jnp.moveaxis(matrices, 2, 0)[..., None, None]  # [B, 2, 1, 1] each
    # In units of 2**-16 pixels, like Pillow: where two pixels meet, both choose the same.
    a, b, c = (jnp.floor(v * 2**16 + 0.5).astype(jnp.int32) for v in (a, b, c + (a + b) / 2))
    place = (a * column + b * row + c) >> 16  # [B, 2, height, width]
    inside = ((place >= 0) & (place < size)).all(axis=1)
    x, y = jnp.moveaxis(jnp.clip(place, 0, size - 1), 1, 0)  # outside any pixel will do
    flat, index = images.reshape(batch, -1, channels), (y * width + x).reshape(batch, -1, 1)
    warped = jnp.take_along_axis(flat, index, axis=1, mode="promise_in_bounds").reshape(images.shape)
    return jnp.where(inside[..., None], warped, jnp.uint8(fill))


def _mix(first: jax.Array, second: jax.Array, share: jax.Array) -> jax.Array:
    """From `first` the given share of the way to `second`."""
    first, second = first.astype(jnp.float32), second.astype(jnp.float32)
    return first + share * (second - first)


def _matrices(chosen: dict[str, jax.Array], magnitude: jax.Array, height: int, width: int) -> jax.Array:
    """One matrix per picture for `warp`, the unit matrix where no geometric operation is chosen."""

    def only(name):
        return jnp.where(chosen[name], magnitude, 0) if name in chosen else jnp.zeros_like(magnitude)

    angle = jnp.deg2rad(only("rotate"))
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    x, y = width / 2, height / 2
    first = [cos, only("shear_x") - sin, only("translate_x") + x - cos * x + sin * y]
    second = [only("shear_y") + sin, cos, only("translate_y") + y - sin * x - cos * y]
    return jnp.stack([*first, *second], axis=-1).reshape(-1, 2, 3)


def _look_up(images: jax.Array, tables: jax.Array) -> jax.Array:
    """Each level replaced by its entry in the picture's and channel's table of `tables` [B, C, 256]."""
    batch, height, width, channels = images.shape
    levels = images.reshape(batch, -1, channels).transpose(2, 0, 1)  # [C, B, pixels]

    def one_channel(both):
        return jnp.take_along_axis(both[0], both[1].astype(jnp.int32), axis=1, mode="promise_in_bounds")

    # A loop, as XLA would otherwise merge the making of the tables in here, and make an entry anew for each pixel.
    found = jax.lax.map(one_channel, (tables.transpose(1, 0, 2), levels))
    return found.transpose(1, 2, 0).reshape(images.shape)


def _tables(images: jax.Array, chosen: dict[str, jax.Array], magnitude: jax.Array) -> jax.Array:
    """Tables for `_look_up`, each level's own where no such operation is chosen."""
    level = jnp.arange(256)
    strength = magnitude[:, None, None]
    lost = jnp.clip(8 - strength.astype(jnp.int32), 0, 8)  # bits
    makers = {
        "posterize": lambda: level >> lost << lost,
        "solarize": lambda: jnp.where(level < strength, level, 255 - level),
        "auto_contrast": lambda: _auto_contrast(images),
        "equalize": lambda: _equalize(images),
        "invert": lambda: 255 - level,
    }
    tables = jnp.broadcast_to(level, (len(images), images.shape[-1], 256)).astype(jnp.uint8)
    for name, table in makers.items():
        if name in chosen:
            tables = jnp.where(chosen[name][:, None, None], table().astype(jnp.uint8), tables)
    return tables


def _auto_contrast(images: jax.Array) -> jax.Array:
    """Tables [B, C, 256] that stretch each channel from its darkest and lightest level to 0 and 255."""
    level, levels = jnp.arange(256, dtype=jnp.uint32), images.astype(jnp.uint32)  # unsigned: `//` is much faster
    low, high = levels.min(axis=(1, 2))[..., None], levels.max(axis=(1, 2))[..., None]
    span = jnp.maximum(high, low + 1) - low
    above = jnp.clip(level, low, high) - low
    stretched = above * 255 // span
    # Pillow computes in float64 and cuts: where whole levels come out, it sometimes is just below and loses one.
    missed, start, hits = (jnp.asarray(array) for array in _whole_levels_missed())
    hit = start[span] + low * hits[span] + stretched * hits[span] // 255 - 1
    short = (above > 0) & (stretched * span == above * 255) & jnp.take(missed, hit, mode="clip")
    return jnp.where(high > low, stretched - short, level)


@functools.cache
def _whole_levels_missed() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where float64 falls short of a whole level in `level * (255 / span) - low * (255 / span)`.

    Above `low` a whole level comes out `hits[span]` times, at equal steps. `missed[start[span] + low * hits[span] + i]`
    says of the i-th whether it is missed.
    """
    spans = np.arange(1, 256)
    hits = np.gcd(255, spans)
    missed = []
    for span, hit in zip(spans, hits, strict=True):
        scale, low = 255.0 / span, np.arange(256 - span)[:, None]
        above = np.arange(1, hit + 1) * (span // hit)
        missed.append((((low + above) * scale + -low * scale).astype(int) < above * 255 // span).ravel())
    start = np.cumsum([0, 0, *(len(part) for part in missed[:-1])])
    return np.concatenate(missed), start.astype(np.uint32), np.array([0, *hits], np.uint32)


def _equalize(images: jax.Array) -> jax.Array:
    """Tables [B, C, 256] that spread each channel's levels evenly by how many pixels are below them."""

    channels = images.shape[-1]

    def count(image):
        bins = image.astype(jnp.int32) + 256 * jnp.arange(channels)
        return jnp.zeros(256 * channels, jnp.uint32).at[bins].add(1, mode="promise_in_bounds").reshape(channels, 256)

    counts = jax.vmap(count)(images)  # [B, C, 256]
    below = jnp.cumsum(counts, axis=2) - counts
    step = jnp.where(counts > 0, below, 0).max(axis=2, keepdims=True) // 255  # of those below the lightest level
    spread = jnp.minimum((below + step // 2) // jnp.maximum(step, 1), 255)
    return jnp.where(step > 0, spread, jnp.arange(256, dtype=jnp.uint32))


def _blend(images: jax.Array, chosen: dict[str, jax.Array], magnitude: jax.Array) -> jax.Array:
    """From another picture to this one by a factor and, above 1, beyond; parts of levels are cut off."""
    grey = _grey(images)
    makers = {
        "brightness": lambda: jnp.zeros_like(images),
        "color": lambda: grey,
        "contrast": lambda: _mean(grey),
        "sharpness": lambda: _smooth(images),
        "greyscale": lambda: grey,
        "blur": lambda: _blur(images, magnitude),
    }
    start, factor = images, jnp.ones_like(magnitude)
    for name, other in makers.items():
        if name in chosen:
            start = jnp.where(chosen[name][:, None, None, None], other(), start)
            factor = jnp.where(chosen[name], 0 if name in ("greyscale", "blur") else magnitude, factor)
    return jnp.clip(_mix(start, images, factor[:, None, None, None]), 0, 255).astype(jnp.uint8)


def _grey(images: jax.Array) -> jax.Array:
    """Brightness in all channels, by the weights of ITU-R 601-2."""
    if images.shape[-1] == 1:
        return images
    red, green, blue = jnp.moveaxis(images.astype(jnp.int32), -1, 0)
    grey = (red * 19595 + green * 38470 + blue * 7471 + 2**15) >> 16
    return jnp.broadcast_to(grey.astype(jnp.uint8)[..., None], images.shape)


def _mean(images: jax.Array) -> jax.Array:
    """Of each picture and channel, rounded to a level: [B, 1, 1, C]."""
    pixels = images.shape[1] * images.shape[2]
    total = images.astype(jnp.int32).sum(axis=(1, 2), keepdims=True)
    return ((2 * total + pixels) // (2 * pixels)).astype(jnp.uint8)


def _smooth(images: jax.Array) -> jax.Array:
    """Mean of 3 x 3 pixels, the middle one counted five times; pixels at the edge stay as they are."""
    height, width = images.shape[1:3]
    padded = jnp.pad(images.astype(jnp.int32), ((0, 0), (1, 1), (1, 1), (0, 0)))
    rows = padded[:, :-2] + padded[:, 1:-1] + padded[:, 2:]
    total = rows[:, :, :-2] + rows[:, :, 1:-1] + rows[:, :, 2:] + 4 * padded[:, 1:-1, 1:-1]
    row, column = jnp.arange(height)[:, None, None], jnp.arange(width)[:, None]
    inner = (row > 0) & (row < height - 1) & (column > 0) & (column < width - 1)
    return jnp.where(inner, ((2 * total + 13) // 26).astype(jnp.uint8), images)


def _blur(images: jax.Array, sigma: jax.Array) -> jax.Array:
    """Gaussian blur with standard deviations `sigma` [B] in pixels, cut off at `BLUR_RADIUS`; edges are repeated."""
    height, width = images.shape[1:3]
    taps = np.arange(-BLUR_RADIUS, BLUR_RADIUS + 1)
    weights = jnp.exp(-0.5 * (taps / jnp.maximum(sigma, 1e-3)[:, None]) ** 2)
    weights /= weights.sum(axis=1, keepdims=True)

    def matrix(size):  # [B, size, size]: from pixels along a line to blurred ones
        source = np.clip(np.arange(size)[:, None] + taps, 0, size - 1)
        return jnp.einsum("bt,itj->bij", weights, jax.nn.one_hot(source, size), precision="highest")

    blurred = images.astype(jnp.float32)
    blurred = jnp.einsum("bij,bjxc->bixc", matrix(height), blurred, precision="highest")
    blurred = jnp.einsum("bij,byjc->byic", matrix(width), blurred, precision="highest")
    return to_uint8(blurred)


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

"""Pictures mixed with each other, covered in part, or pasted into themselves, inside the compiled step.

Batches are uint8 [B, height, width, C] in and out, and as in `ops` every picture goes the same way through the code.
A box is a pair of `start` and `stop`, each [2, n]: its first row and column, and the first ones behind it. What says
how much of a picture stays is a share, 1 where all of it does, so a picture left alone needs no branch.
"""

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from vit_jax.augment import ops


@dataclasses.dataclass(frozen=True)
class Mixing:
    """How pictures are mixed with others, and their labels with them: plain values, fixed for the run.

    Attributes:
      mixup: alpha of mixup's Beta(alpha, alpha); 0 is off.
      cutmix: the same for CutMix.
      probability: chance that a batch, or with `per_example` an example, is mixed at all.
      cutmix_share: where both are on, the chance that it is CutMix.
      per_example: whether each example has its own share, box and decisions, or the batch has one of each.
    """

    mixup: float
    cutmix: float
    probability: float
    cutmix_share: float
    per_example: bool


def mix(
    key: jax.Array, images: jax.Array, targets: jax.Array, how: Mixing, enabled: bool | jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Mixes the pictures of each pair in the batch, and their targets, float32 [B, K], if `enabled`.

    Mixup (Zhang et al. 2018, arXiv 1710.09412) blends the two; CutMix (Yun et al. 2019, arXiv 1905.04899) puts a box
    of the other in, at the same place. The label's share is the mean of the pixels': with CutMix one minus the area
    the box really has after it is cut at the edges.

    Training batches come in random order, so a neighbour is as random a partner as any. Pairs of them, unlike the
    reversed batch, seldom lie on two devices; and nothing meets itself, where copies of a picture do not lie next to
    each other.
    """
    if not (how.mixup or how.cutmix):
        return images, targets
    draws = len(images) if how.per_example else 1
    decision, choice, *centre, radius, angle = jax.random.uniform(key, (6, draws))
    cut = choice < (how.cutmix_share if how.mixup and how.cutmix else float(how.cutmix > 0))
    alpha = jnp.where(cut, how.cutmix, how.mixup)
    mixed = enabled & (decision < how.probability)
    share = jnp.where(mixed, _symmetric_beta(radius, angle, alpha), 1.0)  # [draws]

    pixel_share = _per_picture(share)
    if how.cutmix:
        inside = _inside(*_centred_box(share, jnp.stack(centre), images), images)
        pixel_share = jnp.where(_per_picture(cut), 1.0 - inside, pixel_share)
    share = jnp.mean(pixel_share, axis=(1, 2))  # [draws, 1]
    targets = share * targets + (1 - share) * _partners(targets)
    return _blend(pixel_share, images, _partners(images)), targets


def erase(key: jax.Array, images: jax.Array, probability: float, fill: str, mean: Sequence[float]) -> jax.Array:
    """Covers a box in each picture with the given probability (Zhong et al. 2017, arXiv 1708.04896).

    Its share of the picture is uniform in 0.02..1/3, its ratio of height to width log-uniform in 0.3..3.3, its place
    uniform inside the picture. A side longer than the picture is cut to it, where torchvision and timm draw again: on
    square pictures that is one box in 250, and at most 5% of its length.

    `fill` is "pixel", a random level for each pixel and channel, or "mean", the training set's: a number in 0..1 a
    channel.
    """
    batch, height, width, channels = images.shape
    draw_key, fill_key = jax.random.split(key)
    decision, area, ratio, *place = jax.random.uniform(draw_key, (5, batch))
    area = height * width * (0.02 + area * (1 / 3 - 0.02))
    ratio = jnp.exp(math.log(0.3) + ratio * (math.log(3.3) - math.log(0.3)))
    size = jnp.round(jnp.sqrt(jnp.stack([area * ratio, area / ratio])))
    size = jnp.clip(size, 1, _lengths(images)).astype(jnp.int32)  # [2, B]
    start = _place(jnp.stack(place), size, images)
    covered = _inside(start, start + size, images) & _per_picture(decision < probability)
    if fill == "mean":
        return jnp.where(covered, ops.to_uint8(255 * jnp.asarray(mean, jnp.float32)), images)
    # Four levels out of each random word: drawn as bytes, each would cost a word.
    levels = height * width * channels
    words = jax.random.bits(fill_key, (batch, -(-levels // 4)), jnp.uint32)
    noise = jax.lax.bitcast_convert_type(words, jnp.uint8).reshape(batch, -1)[:, :levels]
    return jnp.where(covered, noise.reshape(images.shape), images)


def crop_paste(key: jax.Array, images: jax.Array) -> jax.Array:
    """Blends a box of each picture into the picture itself, elsewhere: "RandomCropPaste" of omihub777/ViT-CIFAR.

    The box is CutMix's with lambda from Beta(1, 1), which is uniform, so after the edges have cut it, it may be empty.
    Its content and the picture are each mirrored half of the time; its new place is uniform inside the picture, and
    there the picture keeps a uniform share. The original works on normalized pictures, which differs by rounding only.
    """
    draws = jax.random.uniform(key, (8, len(images)))
    start, stop = _centred_box(draws[0], draws[1:3], images)
    place = _place(draws[3:5], stop - start, images)
    mirror_box, mirror_all = draws[5:7] < 0.5
    pixel_share = jnp.where(_inside(place, place + stop - start, images), _per_picture(draws[7]), 1.0)

    # Where each pixel of the pasted box comes from; outside of it any pixel will do, as its share is 0 there.
    row, column = (jnp.arange(n) - p[:, None] for n, p in zip(images.shape[1:3], place, strict=True))  # within the box
    row = start[0][:, None] + row  # [B, height]
    column = jnp.where(mirror_box[:, None], stop[1][:, None] - 1 - column, start[1][:, None] + column)  # [B, width]
    pasted = images.at[jnp.arange(len(images))[:, None, None], row[:, :, None], column[:, None, :]].get(mode="clip")

    return _blend(pixel_share, jnp.where(_per_picture(mirror_all), images[:, :, ::-1], images), pasted)


def _symmetric_beta(radius: jax.Array, angle: jax.Array, alpha: jax.Array) -> jax.Array:
    """A number of Beta(alpha, alpha) for each two uniform ones.

    1/2 + t / (2 sqrt(2 alpha + t^2)) is one if t has Student's distribution with 2 alpha degrees of freedom, as has
    sqrt(2 alpha (u^(-1/alpha) - 1)) cos(2 pi v) (Bailey 1994, Mathematics of Computation 62, page 779). The loops of
    `jax.random.beta` would take seconds to compile.
    """
    power = radius ** (1 / alpha)
    tangent = jnp.sqrt(1 - power) * jnp.cos(2 * math.pi * angle), jnp.sqrt(power)  # t / sqrt(2 alpha), as a fraction
    return jnp.clip(0.5 + 0.5 * jnp.sin(jnp.arctan2(*tangent)), 0, 1)


def _partners(x: jax.Array) -> jax.Array:
    """The other one of each pair, [B, ...]; an odd last one's is the first."""
    pairs = x[: len(x) // 2 * 2].reshape(-1, 2, *x.shape[1:])
    return jnp.concatenate([pairs[:, ::-1].reshape(-1, *x.shape[1:]), x[: len(x) % 2]])


def _blend(share: jax.Array, images: jax.Array, others: jax.Array) -> jax.Array:
    """In whole levels; where `share` is 1, exactly `images`."""
    return ops.to_uint8(share * images + (1 - share) * others)


def _per_picture(values: jax.Array) -> jax.Array:
    """[n] → [n, 1, 1, 1]."""
    return values[:, None, None, None]


def _lengths(images: jax.Array) -> jax.Array:
    """Height and width, [2, 1]."""
    return jnp.array(images.shape[1:3])[:, None]


def _centred_box(share: jax.Array, centre: jax.Array, images: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The pixels whose centres lie in a box that leaves `share` [n] of the picture, but is cut at its edges.

    `centre` [2, n] is in parts of the picture's height and width; the box's sides are sqrt(1 - share) of them.
    """
    half = jnp.sqrt(1 - share) / 2
    edges = jnp.clip(jnp.stack([centre - half, centre + half]), 0, 1) * _lengths(images)
    start, stop = jnp.round(edges).astype(jnp.int32)
    return start, stop


def _place(draw: jax.Array, size: jax.Array, images: jax.Array) -> jax.Array:
    """The start, in whole pixels, of a box that is `size` large and inside the picture; `draw` is uniform."""
    return jnp.floor(draw * (_lengths(images) - size + 1)).astype(jnp.int32)


def _inside(start: jax.Array, stop: jax.Array, images: jax.Array) -> jax.Array:
    """Which pixels lie in the box: bool [n, height, width, 1]."""
    position = [jnp.arange(n) for n in images.shape[1:3]]
    rows, columns = ((a[:, None] <= p) & (p < b[:, None]) for a, b, p in zip(start, stop, position, strict=True))
    return (rows[:, :, None] & columns[:, None, :])[..., None]

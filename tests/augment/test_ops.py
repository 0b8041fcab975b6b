import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from vit_jax.augment import ops

RNG = np.random.default_rng(0)
PICTURES = RNG.integers(0, 256, (600, 12, 10, 3), dtype=np.uint8)
SMOOTH = np.asarray(
    [
        Image.fromarray(p).resize((32, 32), Image.Resampling.BICUBIC)
        for p in RNG.integers(0, 256, (4, 6, 6, 3), np.uint8)
    ]
)
RANDOM = {
    "crop": functools.partial(ops.random_crop, padding=2),
    "flip": ops.random_flip,
    "resized_crop": functools.partial(ops.random_resized_crop, size=10, min_area=0.2),
}


@pytest.mark.parametrize("name", RANDOM)
def test_random_operations_depend_on_the_key_and_the_place_in_the_batch(name):
    operation = jax.jit(RANDOM[name])
    same = jnp.asarray(np.repeat(PICTURES[:1], 64, axis=0))
    one, again, other = (operation(jax.random.key(seed), same) for seed in (0, 0, 1))
    assert one.dtype == jnp.uint8 and len(one) == 64
    np.testing.assert_array_equal(one, again)
    assert (one != other).any()
    assert len(np.unique(one, axis=0)) > 1


@pytest.mark.parametrize("padding", [0, 1, 2])
def test_crop_is_a_window_of_the_padded_picture(padding):
    cropped = np.asarray(jax.jit(ops.random_crop, static_argnums=2)(jax.random.key(0), PICTURES, padding))
    padded = np.pad(PICTURES, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    places = [(y, x) for y in range(2 * padding + 1) for x in range(2 * padding + 1)]
    windows = np.stack([padded[:, y : y + 12, x : x + 10] for y, x in places], axis=1)  # [B, places, 12, 10, 3]
    matches = (windows == cropped[:, None]).all(axis=(2, 3, 4))
    assert (matches.sum(axis=1) == 1).all()
    counts, expected = matches.sum(axis=0), len(PICTURES) / len(places)
    assert np.abs(counts - expected).max() <= 4 * np.sqrt(expected)  # each place equally often


def test_flip_mirrors_half_of_them():
    flipped = np.asarray(jax.jit(ops.random_flip)(jax.random.key(0), PICTURES))
    mirrored = (flipped == PICTURES[:, :, ::-1]).all(axis=(1, 2, 3))
    kept = (flipped == PICTURES).all(axis=(1, 2, 3))
    assert (mirrored ^ kept).all()
    assert mirrored.mean() == pytest.approx(0.5, abs=4 * 0.5 / np.sqrt(600))


@pytest.mark.parametrize("size", [8, 16, 31, 48, 224])
def test_resize_is_pillows(size):
    expected = [Image.fromarray(picture).resize((size, size), Image.Resampling.BILINEAR) for picture in SMOOTH]
    resized = np.asarray(ops.resize(jnp.asarray(SMOOTH), size))
    assert resized.dtype == np.uint8
    assert np.abs(resized.astype(int) - np.asarray(expected).astype(int)).max() <= 1


def test_resize_of_pictures_that_are_not_square():
    expected = [Image.fromarray(picture).resize((20, 20), Image.Resampling.BILINEAR) for picture in PICTURES[:4]]
    resized = np.asarray(ops.resize(jnp.asarray(PICTURES[:4]), 20))
    assert np.abs(resized.astype(int) - np.asarray(expected).astype(int)).max() <= 1


def test_resize_to_the_same_size_is_nothing():
    images = jnp.asarray(SMOOTH)
    assert ops.resize(images, 32) is images


def test_rounding_reaches_both_ends():
    ends = jnp.asarray(np.stack([np.zeros((7, 7, 3)), np.full((7, 7, 3), 255)]).astype(np.uint8))
    for out in (ops.resize(ends, 23), ops.random_resized_crop(jax.random.key(0), ends, 23, 0.1)):
        assert (out[0] == 0).all() and (out[1] == 255).all()


@pytest.mark.parametrize("size", [16, 32, 48])
def test_resized_crop_of_everything_is_resize(size):
    crop = functools.partial(ops.random_resized_crop, size=size, min_area=1.0, min_ratio=1.0, max_ratio=1.0)
    found = np.asarray(crop(jax.random.key(0), jnp.asarray(SMOOTH))).astype(int)
    difference = np.abs(found - np.asarray(ops.resize(jnp.asarray(SMOOTH), size)).astype(int))
    assert difference.max() <= 1 and (difference > 0).mean() < 0.01  # a half may round either way


def test_resized_crop_boxes():
    """On a picture whose levels are its coordinates, the crop shows which box it is."""
    y, x = np.meshgrid(np.arange(100), np.arange(200), indexing="ij")
    ramp = jnp.asarray(np.repeat(np.stack([y, x], axis=-1)[None], 2000, axis=0).astype(np.uint8))
    crop = functools.partial(ops.random_resized_crop, size=64, min_area=0.1, max_area=0.4)
    out = np.asarray(jax.jit(crop)(jax.random.key(0), ramp)).astype(float)
    # From the second to the second last row is 61/64 of the box, and the same for its columns.
    heights = (out[:, -2, 0, 0] - out[:, 1, 0, 0]) * 64 / 61
    widths = (out[:, 0, -2, 1] - out[:, 0, 1, 1]) * 64 / 61
    areas, ratios = heights * widths / 20_000, widths / heights
    assert areas.min() > 0.08 and areas.max() < 0.43  # and what rounding to levels makes of them
    assert areas.mean() == pytest.approx(0.25, abs=0.01) and areas.std() == pytest.approx(0.3 / np.sqrt(12), rel=0.05)
    assert 0.70 < ratios.min() < 0.78 and 1.28 < ratios.max() < 1.43
    assert np.log(ratios).mean() == pytest.approx(0, abs=0.02)
    # Places: as often in the upper as in the lower half, and up to the edges.
    assert out[:, 32, 0, 0].mean() == pytest.approx(49.5, abs=2) and out[:, 0, 32, 1].mean() == pytest.approx(
        99.5, abs=4
    )
    assert out.min(axis=(1, 2)).min() <= 1 and out[..., 0].max() >= 98 and out[..., 1].max() >= 198


def test_resized_crop_box_larger_than_the_picture_is_cut():
    tall = jnp.asarray(RNG.integers(0, 256, (3, 40, 10, 3), dtype=np.uint8))  # ratio 1 of the whole area: 20 x 20
    out = ops.random_resized_crop(jax.random.key(0), tall, 8, 1.0, 1.0, 1.0, 1.0)
    assert out.shape == (3, 8, 8, 3) and out.std() > 20


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_normalize(dtype):
    mean, std = (0.5071, 0.4866, 0.4409), (0.2673, 0.2564, 0.2762)
    out = ops.normalize(jnp.asarray(PICTURES), mean, std, dtype)
    assert out.dtype == dtype
    expected = (PICTURES / 255.0 - np.array(mean)) / np.array(std)
    np.testing.assert_allclose(np.asarray(out, np.float64), expected, atol=1e-5 if dtype == jnp.float32 else 0.01)


def test_normalize_to_minus_one_and_one():
    ends = ops.normalize(jnp.asarray([[[[0, 255, 0]]]], jnp.uint8), (0.5,) * 3, (0.5,) * 3, jnp.float32)
    np.testing.assert_allclose(ends[0, 0, 0], [-1, 1, -1])

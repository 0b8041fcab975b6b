import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from vit_jax.augment import mix as mixing
from vit_jax.augment.mix import Mixing

KEY = jax.random.key(0)
SHAPES = [(32, 8, 8, 3), (7, 9, 14, 3), (6, 13, 5, 1)]  # even, odd, one channel; square, wide, tall
MIXUP = Mixing(mixup=0.8, cutmix=0.0, probability=1.0, cutmix_share=0.5, per_example=True)
CUTMIX = Mixing(mixup=0.0, cutmix=1.0, probability=1.0, cutmix_share=0.5, per_example=True)
BOTH = Mixing(mixup=0.8, cutmix=1.0, probability=1.0, cutmix_share=0.5, per_example=True)
mix = jax.jit(mixing.mix, static_argnums=3)
erase = jax.jit(mixing.erase, static_argnums=(3, 4))
crop_paste = jax.jit(mixing.crop_paste)
RANDOM = {
    "mixup": lambda key, x: mix(key, x, jnp.eye(len(x)), MIXUP, True)[0],
    "cutmix": lambda key, x: mix(key, x, jnp.eye(len(x)), CUTMIX, True)[0],
    "erase_mean": lambda key, x: erase(key, x, 0.5, "mean", (0.5,)),
    "erase_pixel": lambda key, x: erase(key, x, 0.5, "pixel", (0.5,)),
    "crop_paste": crop_paste,
}


def replace(how, **changes):
    return Mixing(**{**vars(how), **changes})


def levels(shape):
    """A level of its own for each picture: far from those of its neighbours."""
    level = (np.arange(shape[0]) * 97 % 251).astype(np.uint8)
    return level, np.broadcast_to(level[:, None, None, None], shape)


def partners(number):
    """Whom each is mixed with: the other of its pair, an odd last one with the first."""
    return np.append(np.arange(number // 2 * 2) ^ 1, [0] * (number % 2)).astype(int)


def near(frequency, expected, draws):
    return abs(frequency - expected) <= 4 * np.sqrt(expected * (1 - expected) / draws)


def random_pictures(*shape, low=0, high=256):
    return np.random.default_rng(0).integers(low, high, shape, dtype=np.uint8)


def own_shares(how, shape=(1, 1), probability=1.0, cutmix_share=0.5):
    """What each of 4000 examples keeps of its own label; without `per_example`, each of 4000 batches."""
    return np.asarray(jitted_own_shares(how, shape, probability, cutmix_share))


@functools.partial(jax.jit, static_argnums=(0, 1))
def jitted_own_shares(how, shape, probability, cutmix_share):  # both traced, so that a program tries several
    how = replace(how, probability=probability, cutmix_share=cutmix_share)
    if how.per_example:
        targets = jnp.tile(jnp.eye(2), (2000, 1))
        mixed = mixing.mix(KEY, jnp.zeros((4000, *shape, 1), jnp.uint8), targets, how, True)[1]
        return (mixed * targets).sum(axis=1)
    batch = jnp.zeros((2, *shape, 1), jnp.uint8)
    return jax.vmap(lambda key: mixing.mix(key, batch, jnp.eye(2), how, True)[1][0, 0])(jax.random.split(KEY, 4000))


@pytest.mark.parametrize("name", RANDOM)
def test_they_depend_on_the_key_and_the_place_in_the_batch(name):
    pictures = jnp.asarray(random_pictures(32, 10, 12, 3))
    one, again, other = (RANDOM[name](jax.random.key(seed), pictures) for seed in (0, 0, 1))
    assert one.dtype == jnp.uint8 and one.shape == pictures.shape
    np.testing.assert_array_equal(one, again)
    assert (one != other).any()
    same = jnp.tile(pictures[:2], (16, 1, 1, 1))
    assert len(np.unique(RANDOM[name](KEY, same), axis=0)) > 2


# Mixing


@pytest.mark.parametrize("shape,per_example", [*((shape, True) for shape in SHAPES), (SHAPES[1], False)])
def test_mixup_blends_pairs_by_the_labels_shares(shape, per_example):
    level, pictures = levels(shape)
    own, other = np.eye(len(level), dtype=np.float32), partners(len(level))
    mixed, targets = map(np.asarray, mix(KEY, pictures, own, replace(MIXUP, per_example=per_example), True))
    share = np.diag(targets)
    np.testing.assert_allclose(targets, share[:, None] * own + (1 - share)[:, None] * own[other])
    expected = share * level + (1 - share) * level[other]
    assert np.abs(mixed - expected[:, None, None, None]).max() <= 0.5 + 1e-4  # whole levels, rounded
    assert len(np.unique(share)) == (len(level) if per_example else 1)


@pytest.mark.parametrize("shape,per_example", [*((shape, True) for shape in SHAPES), (SHAPES[1], False)])
def test_cutmix_puts_a_box_of_the_other_in_and_counts_its_pixels(shape, per_example):
    number = 10 * shape[0] - 1
    third = np.append(np.arange(number - 1) % 2, 2)  # of the levels: another one than the partner's
    pictures = (85 * third[:, None, None, None] + random_pictures(number, *shape[1:], high=85)).astype(np.uint8)
    others, own = pictures[partners(number)], np.eye(len(pictures), dtype=np.float32)
    how, boxes = replace(CUTMIX, per_example=per_example), []
    for seed in range(1 if per_example else 20):
        mixed, targets = map(np.asarray, mix(jax.random.key(seed), pictures, own, how, True))
        inside = (mixed == others).all(axis=-1)
        assert (inside ^ (mixed == pictures).all(axis=-1)).all()
        assert (inside == inside.any(axis=2, keepdims=True) & inside.any(axis=1, keepdims=True)).all()  # rectangles
        for axis in (1, 2):
            line = inside.any(axis=3 - axis).astype(int)
            assert (np.abs(np.diff(line, axis=1, prepend=0, append=0)).sum(axis=1) <= 2).all()  # without gaps
        share = 1 - inside.mean(axis=(1, 2))
        np.testing.assert_allclose(np.diag(targets), share, atol=1e-6)
        np.testing.assert_allclose(targets.sum(axis=1), 1, atol=1e-6)
        assert per_example or (inside == inside[0]).all()
        boxes.append(inside)
    boxes = np.concatenate(boxes)
    assert boxes.any(axis=0).all() and not boxes.all(axis=0).any()  # every pixel is sometimes inside, sometimes not
    assert len(np.unique(boxes, axis=0)) > 5


def test_cutmix_areas():
    """A side r covers r - r²/4 of a line on average when its centre is uniform and the ends cut it; here r² is uniform,
    and the mean of (r - r²/4)² is 1/2 - 1/5 + 1/48. The whole distribution is that of the paper's continuous boxes."""
    areas, rng = 1 - own_shares(CUTMIX, (64, 64)), np.random.default_rng(0)
    assert areas.mean() == pytest.approx(1 / 2 - 1 / 5 + 1 / 48, abs=4 * areas.std() / np.sqrt(4000))
    half, centre = np.sqrt(rng.random(20_000)) / 2, rng.random((2, 20_000))
    expected = np.prod(np.minimum(centre + half, 1) - np.maximum(centre - half, 0), axis=0)
    assert scipy.stats.ks_2samp(areas, expected).pvalue > 0.001


def test_cutmix_sides_are_in_proportion():
    _, pictures = levels((2000, 40, 80, 1))
    inside = np.asarray(mix(KEY, pictures, jnp.zeros((2000, 1)), CUTMIX, True)[0] != pictures)[..., 0]
    ends = inside.any(axis=2)[:, [0, -1]].any(axis=1) | inside.any(axis=1)[:, [0, -1]].any(axis=1)
    heights, widths = inside.any(axis=2).sum(axis=1)[~ends], inside.any(axis=1).sum(axis=1)[~ends]
    assert len(heights) > 100 and heights.max() > 20
    assert np.abs(widths - 2 * heights).max() <= 3  # each rounded to whole pixels


@pytest.mark.parametrize("alpha,per_example", [(0.2, True), (0.8, True), (0.8, False), (1.0, True), (3.0, True)])
def test_shares_are_beta(alpha, per_example):
    shares = own_shares(replace(MIXUP, mixup=alpha, per_example=per_example))
    assert shares.min() >= 0 and shares.max() <= 1
    assert shares.var() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.1)
    assert scipy.stats.kstest(shares, scipy.stats.beta(alpha, alpha).cdf).pvalue > 0.001


def test_shares_at_the_ends_of_the_draws():
    """Also for an alpha that makes nearly all shares 0 or 1, they are numbers and in between."""
    draws = jnp.array([0.0, 1e-7, 0.25, 0.5, 0.75, 1 - 2**-23])
    for alpha in (1e-3, 0.1, 1.0, 100.0):
        shares = jax.jit(mixing._symmetric_beta)(draws[:, None], draws, alpha)
        assert (shares >= 0).all() and (shares <= 1).all()


@pytest.mark.parametrize("per_example", [False, True])
def test_probability(per_example):
    for probability in (0.0, 0.3, 1.0):
        shares = own_shares(replace(MIXUP, per_example=per_example), probability=probability)
        assert near((shares < 1).mean(), probability, 4000)


@pytest.mark.parametrize("per_example", [False, True])
def test_switch(per_example):
    """With this alpha mixup takes half of each, and CutMix on a single pixel all or nothing."""
    for cutmix_share in (0.0, 0.3, 1.0):
        shares = own_shares(replace(BOTH, mixup=1e4, per_example=per_example), cutmix_share=cutmix_share)
        mixup = np.abs(shares - 0.5) < 0.1
        assert (mixup | (shares < 1e-6) | (shares > 1 - 1e-6)).all()
        assert near((~mixup).mean(), cutmix_share, 4000)


def test_each_of_both_has_its_own_alpha():
    alone = replace(BOTH, mixup=0.2, cutmix=1e4)  # CutMix's boxes have half of the area, less what the edges cut
    shares = own_shares(alone, (32, 32))
    boxes = own_shares(alone, (32, 32), cutmix_share=1.0)
    assert boxes.min() > 0.45
    assert near((shares < 0.45).mean(), 0.5 * scipy.stats.beta(0.2, 0.2).cdf(0.45), 4000)


@pytest.mark.parametrize("how", [MIXUP, CUTMIX, BOTH, replace(BOTH, per_example=False)])
def test_nothing_happens_where_it_is_not_enabled(how):
    pictures = random_pictures(31, 8, 8, 3)
    smooth = 0.9 * np.eye(10, dtype=np.float32)[np.arange(31) % 10] + np.float32(0.01)
    off, on = (mix(KEY, pictures, smooth, how, jnp.asarray(enabled)) for enabled in (False, True))
    assert off[0].dtype == jnp.uint8 and off[1].dtype == jnp.float32
    np.testing.assert_array_equal(off[0], pictures)
    np.testing.assert_array_equal(off[1], smooth)
    # And where it is, targets stay distributions with their smoothing.
    assert (on[0] != pictures).any() and (on[1] != smooth).any()
    np.testing.assert_allclose(on[1].sum(axis=1), 1, atol=1e-5)
    assert on[1].min() >= 0.01 - 1e-6


def test_enabled_may_be_a_constant():
    pictures, targets = random_pictures(9, 8, 8, 3), np.eye(9, dtype=np.float32)
    found = jax.jit(functools.partial(mixing.mix, how=BOTH, enabled=False))(KEY, pictures, targets)
    np.testing.assert_array_equal(found[0], pictures)
    np.testing.assert_array_equal(found[1], targets)


def test_mixup_has_no_boxes_and_what_is_off_has_nothing():
    def program(how):
        args = (KEY, jnp.zeros((4, 8, 8, 3), jnp.uint8), jnp.eye(4))
        return str(jax.make_jaxpr(functools.partial(mixing.mix, how=how, enabled=True))(*args))

    assert "iota" not in program(MIXUP) and "iota" in program(CUTMIX)
    assert program(Mixing(0.0, 0.0, 1.0, 0.5, True)).count("=") == 0


# Erasing


def test_erase_happens_as_often_as_asked():
    pictures = jnp.full((2000, 12, 10, 1), 9, jnp.uint8)
    for probability in (0.0, 0.25, 1.0):
        out = np.asarray(erase(KEY, pictures, probability, "mean", (0.5,)))
        assert near((out != 9).any(axis=(1, 2, 3)).mean(), probability, 2000)


@pytest.mark.parametrize("height,width", [(64, 64), (48, 80)])
def test_erased_boxes(height, width):
    pictures, rng = jnp.zeros((4000, height, width, 1), jnp.uint8), np.random.default_rng(0)
    erased = np.asarray(erase(KEY, pictures, 1.0, "mean", (1.0,)))[..., 0] > 0
    heights, widths = erased.any(axis=2).sum(axis=1), erased.any(axis=1).sum(axis=1)
    assert (erased.sum(axis=(1, 2)) == heights * widths).all()  # rectangles
    area = height * width * rng.uniform(0.02, 1 / 3, 40_000)
    ratio = np.exp(rng.uniform(np.log(0.3), np.log(3.3), 40_000))
    expected = np.minimum(np.round(np.sqrt([area * ratio, area / ratio])), [[height], [width]])
    for found, other in ((heights * widths, expected[0] * expected[1]), (heights / widths, expected[0] / expected[1])):
        assert scipy.stats.ks_2samp(found, other).pvalue > 0.001
    if height == width:
        assert erased.mean() == pytest.approx((0.02 + 1 / 3) / 2, abs=4 * (1 / 3 - 0.02) / np.sqrt(12 * 4000))
    # Given its size, a box is as often at each place inside: so its share of the free way is uniform.
    for side, length, line in ((heights, height, erased.any(axis=2)), (widths, width, erased.any(axis=1))):
        free, start = length - side, line.argmax(axis=1)
        assert (start <= free).all()
        where = ((start + rng.random(4000)) / (free + 1))[free > 0]
        assert scipy.stats.kstest(where, "uniform").pvalue > 0.001
        assert (start == 0).any() and (start == free).any()


def test_erased_box_longer_than_the_picture_is_cut_to_it():
    erased = np.asarray(erase(KEY, jnp.zeros((300, 4, 400, 1), jnp.uint8), 1.0, "mean", (1.0,)))[..., 0] > 0
    assert (erased.all(axis=1) == erased.any(axis=1)).all() and erased.any(axis=(1, 2)).all()


def test_erased_with_the_mean():
    mean = (0.5071, 0.4866, 0.4409)
    pictures = random_pictures(50, 10, 12, 3, high=100)
    out = np.asarray(erase(KEY, pictures, 1.0, "mean", mean))
    changed = (out != pictures).any(axis=-1)
    assert changed.any(axis=(1, 2)).all()
    np.testing.assert_array_equal(np.unique(out[changed], axis=0), [[129, 124, 112]])


@pytest.mark.parametrize("channels", [1, 3])
def test_erased_with_random_levels(channels):
    out = np.asarray(erase(KEY, jnp.zeros((400, 31, 33, channels), jnp.uint8), 1.0, "pixel", (0.5,) * channels))
    box = (out > 0).any(axis=-1)
    box = box.any(axis=2, keepdims=True) & box.any(axis=1, keepdims=True)
    drawn = out[box].ravel()
    counts = np.bincount(drawn, minlength=256)
    assert len(drawn) > 50_000 and scipy.stats.chisquare(counts[1:]).pvalue > 0.001  # a 0 may have hidden an edge
    assert near(counts[0] / len(drawn), 1 / 256, len(drawn))
    for lag in range(1, 7):  # other channels, neighbours, levels out of one random word
        assert abs(np.corrcoef(drawn[lag:], drawn[:-lag])[0, 1]) < 4 / np.sqrt(len(drawn))


# Crop and paste


def explanations(height, width):
    """Every box, new place and mirroring: where pixels come from and which are new, [N, height, width], and itself."""

    def line(n):
        places = [(size, range(n - size + 1)) for size in range(1, n + 1)]
        return [(start, size, to) for size, free in places for start in free for to in free]

    sources, insides, found = [], [], []
    for (top, tall, y), (left, wide, x), flip in itertools.product(line(height), line(width), (False, True)):
        source, inside = np.zeros((height, width), int), np.zeros((height, width), bool)
        box = np.arange(height * width).reshape(height, width)[top : top + tall, left : left + wide]
        source[y : y + tall, x : x + wide] = box[:, ::-1] if flip else box
        inside[y : y + tall, x : x + wide] = True
        sources.append(source), insides.append(inside), found.append((top, tall, y, left, wide, x, flip))
    return np.array(sources), np.array(insides), np.array(found)


def test_crop_paste_is_explained_by_one_box_place_mirroring_and_share():
    """For each picture, all there could be are tried; the share is the least squares' one."""
    height, width, channels = 3, 4, 6
    sources, insides, parameters = explanations(height, width)
    pictures = random_pictures(400, height, width, channels)
    outputs = np.asarray(crop_paste(KEY, pictures)).astype(float)
    found, untouched = [], 0
    for picture, out in zip(pictures.astype(float), outputs, strict=True):
        best = (np.inf,)
        pasted = picture.reshape(-1, channels)[sources]  # [N, height, width, C]
        for mirrored in (False, True):
            base = picture[:, ::-1] if mirrored else picture
            untouched += np.array_equal(out, base)
            direction = (base - pasted) * insides[..., None]
            square = (direction**2).sum(axis=(1, 2, 3))
            share = ((out - pasted) * direction).sum(axis=(1, 2, 3)) / np.maximum(square, 1e-9)
            share = np.clip(share, 0, 1)
            blend = base + (share - 1)[:, None, None, None] * direction
            error = np.abs(out - blend).max(axis=(1, 2, 3))
            i = error.argmin()
            best = min(best, (error[i], share[i], mirrored, *parameters[i]))
        assert best[0] < 1.5  # the rounding's half, and the half that the share's fit loses to it
        found.append(best[1:])
    share, mirrored, top, tall, y, left, wide, x, flip = np.array(found).T
    sure = (share < 0.9) & (tall * wide > 1) & (tall * wide < 12)  # elsewhere others are as good
    assert sure.sum() > 150
    assert near(mirrored[sure].mean(), 0.5, sure.sum())
    assert near(flip[sure & (wide > 1)].mean(), 0.5, (sure & (wide > 1)).sum())
    assert scipy.stats.kstest(share[sure] / 0.9, "uniform").pvalue > 0.001
    independent = np.stack([2 * top + tall, 2 * left + wide, tall * wide, share, mirrored, flip])[:, sure & (wide > 1)]
    assert np.abs(np.corrcoef(independent) - np.eye(6)).max() < 4 / np.sqrt(independent.shape[1])
    for start, size, to, length in ((top, tall, y, height), (left, wide, x, width)):
        assert (start[sure] + size[sure] <= length).all()
        seen = {(a, b, c) for a, b, c in zip(start[sure], size[sure], to[sure], strict=True)}
        assert {c for a, b, c in seen if b == 1} == set(range(length))  # every place
        assert {b for a, b, c in seen} == set(range(1, length + 1))  # every size
    assert 0 < untouched < 100  # empty boxes, and shares near one


@pytest.mark.parametrize("shape", SHAPES[1:])
def test_crop_paste_of_one_level_is_the_same(shape):
    pictures = levels(shape)[1]
    np.testing.assert_array_equal(crop_paste(KEY, pictures), pictures)

import collections
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

from vit_jax.augment import ops, policies
from vit_jax.augment.policies import AUTOAUGMENT, POLICIES, Policy
from vit_jax.errors import UserError

BATCH = 200_000
INDEX = ops.OPERATIONS.index
IMAGENET = Policy("autoaugment_imagenet")
HEIGHT, WIDTH = 24, 40
SIGNED = {
    "autoaugment": {
        **dict.fromkeys(("shear_x", "shear_y"), (0, 0.3)),
        "translate_x": (0, 40 * 150 / 331),
        "translate_y": (0, 24 * 150 / 331),
        "rotate": (0, 30),
        **dict.fromkeys(("brightness", "color", "contrast", "sharpness"), (1, 0.9)),
    },
    "trivialaugment": {
        **dict.fromkeys(("shear_x", "shear_y"), (0, 0.99)),
        **dict.fromkeys(("translate_x", "translate_y"), (0, 32)),
        "rotate": (0, 135),
        **dict.fromkeys(("brightness", "color", "contrast", "sharpness"), (1, 0.99)),
    },
    "3augment": dict.fromkeys(("brightness", "contrast", "color"), (1, 0.3)),
}  # operation: the magnitude that changes nothing, and how far from it the top bin is, either side
SIGNED.update({name: SIGNED["autoaugment"] for name in (*AUTOAUGMENT, "randaugment")})
UNMOVED = {"identity", "auto_contrast", "equalize", "invert", "greyscale"}  # they have no magnitude
RNG = np.random.default_rng(0)
PICTURES = RNG.integers(0, 256, (48, HEIGHT, WIDTH, 3), np.uint8)


@functools.cache
def drawn(policy: Policy, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Operations as indices into `ops.OPERATIONS`, and magnitudes, [K, B] each."""
    operation, magnitude = policies.draw(jax.random.key(seed), BATCH, HEIGHT, WIDTH, policy)
    steps = policies.operations(policy)
    assert operation.shape == magnitude.shape == (len(steps), BATCH)
    assert operation.dtype == jnp.int32 and magnitude.dtype == jnp.float32
    chosen = [np.array([*map(INDEX, step)])[np.asarray(k)] for step, k in zip(steps, operation, strict=True)]
    return np.stack(chosen), np.asarray(magnitude)


def magnitudes(policy: Policy, name: str) -> np.ndarray:
    operation, magnitude = drawn(policy)
    return magnitude[operation == INDEX(name)].astype(np.float64)


def assert_frequencies(found: np.ndarray, expected: dict) -> None:
    """Each key of `expected` is in `found` [N, or N x columns] at its share within 5 standard deviations; no other."""
    values, counts = np.unique(found, axis=0, return_counts=True)
    count = dict(zip(map(tuple, np.atleast_2d(values.T).T.tolist()), counts.tolist(), strict=True))
    expected = {key if isinstance(key, tuple) else (key,): share for key, share in expected.items() if share > 0}
    assert sum(expected.values()) == pytest.approx(1) and set(count) <= set(expected)
    for key, share in expected.items():
        spread = np.sqrt(share * (1 - share) / len(found))
        assert count.get(key, 0) / len(found) == pytest.approx(share, abs=5 * spread + 1e-9), key


# The tables


@pytest.mark.parametrize(
    "name, bins, first, second",
    [
        (
            "autoaugment_cifar10",
            (90, 97),
            "auto_contrast 2.2 brightness 1.0 color 2.0 contrast 0.6 equalize 2.1 invert 0.1 rotate 0.7 sharpness 1.1 "
            "shear_y 0.7 solarize 0.9 translate_y 2.0",
            "auto_contrast 2.8 brightness 1.3 color 0.9 contrast 0.2 equalize 2.6 invert 0.1 posterize 0.3 sharpness "
            "1.7 solarize 1.0 translate_x 0.8 translate_y 1.4",
        ),
        (
            "autoaugment_svhn",
            (85, 58),
            "contrast 0.3 equalize 2.7 invert 4.1 shear_x 4.2 shear_y 6.1 solarize 0.7",
            "auto_contrast 2.3 equalize 1.2 invert 3.5 rotate 3.4 solarize 1.5 translate_x 0.9 translate_y 2.0",
        ),
        (
            "autoaugment_imagenet",
            (89, 70),
            "color 2.4 equalize 3.4 invert 1.2 posterize 1.8 rotate 2.2 sharpness 0.4 shear_x 0.6 solarize 1.8",
            "auto_contrast 1.2 color 1.4 contrast 2.0 equalize 7.8 invert 0.6 posterize 1.0 rotate 1.4 solarize 1.8",
        ),
    ],
)
def test_tables_add_up_to_the_published_ones(name, bins, first, second):
    """Sums over torchvision's tables, entry for entry the same when this was written."""
    table = AUTOAUGMENT[name]
    assert len(table) == 25
    for step, total, text in zip(zip(*table, strict=True), bins, (first, second), strict=True):
        assert sum(place for _, _, place in step) == total
        sums: collections.Counter = collections.Counter()
        for operation, probability, _ in step:
            sums[operation] += probability
        words = text.split()
        assert sums == pytest.approx(dict(zip(words[::2], map(float, words[1::2]), strict=True)))


def test_every_name_is_an_operation():
    for name in POLICIES:
        for step in policies.operations(Policy(name)):
            assert set(step) <= set(ops.OPERATIONS) and len(set(step)) == len(step)


def test_number_of_steps():
    steps = {name: len(policies.operations(Policy(name))) for name in POLICIES}
    assert steps == dict.fromkeys(AUTOAUGMENT, 2) | {"randaugment": 2, "trivialaugment": 1, "3augment": 4}
    assert len(policies.operations(Policy("randaugment", num_ops=5))) == 5


# Which operation


@pytest.mark.parametrize("name", AUTOAUGMENT)
def test_autoaugment_frequencies(name):
    for k, operation in enumerate(drawn(Policy(name))[0]):
        expected: collections.Counter = collections.Counter()
        for sub_policy in AUTOAUGMENT[name]:
            chosen, probability, _ = sub_policy[k]
            expected[INDEX(chosen)] += probability / 25
            expected[INDEX("identity")] += (1 - probability) / 25
        assert_frequencies(operation, expected)


@pytest.mark.parametrize("name", AUTOAUGMENT)
def test_autoaugment_pairs(name):
    """Both operations of a sub-policy, with their magnitudes, as often as their probabilities say."""
    ranges = SIGNED[name] | {"posterize": (8, 4), "solarize": (256, 256)}
    start, reach = (np.array([ranges.get(n, (0, 0))[i] for n in ops.OPERATIONS]) for i in (0, 1))

    def outcomes(operation, probability, place):
        strong = reach[INDEX(operation)] * place / 9
        strong = np.round(strong) if operation == "posterize" else strong
        return ((INDEX(operation), round(strong * 100)), probability), ((INDEX("identity"), 0), 1 - probability)

    expected: collections.Counter = collections.Counter()
    for first, second in AUTOAUGMENT[name]:
        for one, share in outcomes(*first):
            for two, other in outcomes(*second):
                expected[*one, *two] += share * other / 25
    operation, magnitude = drawn(Policy(name))
    strong = np.round(np.abs(magnitude - start[operation]) * 100).astype(int)
    assert_frequencies(np.stack([operation[0], strong[0], operation[1], strong[1]], axis=1), expected)


def test_probabilities_of_zero_and_one():
    (first, second), (amount, _) = drawn(Policy("autoaugment_cifar10"))
    solarized = (first == INDEX("solarize")) & (amount > 150)  # bin 2; the other one is 5
    assert solarized.sum() > 1000 and (second[solarized] == INDEX("identity")).all()
    first, second = drawn(Policy("autoaugment_imagenet"))[0]
    sheared = first == INDEX("shear_x")
    assert sheared.sum() > 1000 and (second[sheared] == INDEX("equalize")).all()
    first, second = drawn(Policy("autoaugment_svhn"))[0]
    assert not ((first == INDEX("invert")) & (second == INDEX("translate_y"))).any()


@pytest.mark.parametrize("name", ["randaugment", "trivialaugment", "3augment"])
def test_uniform_frequencies(name):
    steps = policies.operations(Policy(name))
    if name == "3augment":
        assert steps == (("greyscale", "solarize", "blur"), ("brightness",), ("contrast",), ("color",))
    else:
        assert all(len(step) == 14 for step in steps) and not {"invert", "greyscale", "blur"} & set(steps[0])
    for step, operation in zip(steps, drawn(Policy(name))[0], strict=True):
        assert_frequencies(operation, dict.fromkeys(map(INDEX, step), 1 / len(step)))


def test_steps_and_neighbours_are_independent():
    operation, magnitude = drawn(Policy("randaugment"))
    step = [*map(INDEX, policies.operations(Policy("randaugment"))[0])]
    pairs = {(one, two): 1 / 14**2 for one in step for two in step}
    assert_frequencies(operation.T, pairs)
    assert_frequencies(operation[0].reshape(-1, 2), pairs)
    sides = np.sign(magnitude)[:, (operation == INDEX("rotate")).all(axis=0)]  # of those rotated twice
    assert abs(np.mean(sides[0] * sides[1])) < 5 / np.sqrt(sides.shape[1])


# How strongly


def test_magnitudes_by_hand():
    """AutoAugment's bins worked out by hand, for pictures of 24 x 40."""
    cifar, svhn, imagenet = (Policy(f"autoaugment_{name}") for name in ("cifar10", "svhn", "imagenet"))
    expected = [
        (cifar, "rotate", [-6.6667, 6.6667]),
        (cifar, "translate_x", [-18.1269, -16.1128, 16.1128, 18.1269]),
        (cifar, "translate_y", [-10.8761, -3.6254, 3.6254, 10.8761]),
        (cifar, "shear_y", [-0.2667, -0.2333, 0.2333, 0.2667]),
        (cifar, "brightness", [0.1, 0.3, 0.4, 0.7, 1.3, 1.6, 1.7, 1.9]),
        (cifar, "contrast", [0.3, 0.4, 1.6, 1.7]),
        (cifar, "posterize", [5]),
        (cifar, "solarize", [28.4444, 113.7778, 170.6667, 199.1111]),
        (svhn, "rotate", [-13.3333, -10, 10, 13.3333]),
        (svhn, "shear_x", [-0.3, -0.2, -0.1333, -0.0667, 0.0667, 0.1333, 0.2, 0.3]),
        (svhn, "solarize", [28.4444, 85.3333, 170.6667, 199.1111]),
        (imagenet, "posterize", [4, 5, 6]),
        (imagenet, "color", [0.2, 0.6, 0.8, 1, 1.2, 1.4, 1.8]),
        (imagenet, "equalize", [0]),
        (imagenet, "identity", [0]),
    ]
    for policy, operation, values in expected:
        found = np.unique(np.round(magnitudes(policy, operation), 4) + 0.0)
        np.testing.assert_allclose(found, values, atol=1e-4, err_msg=f"{policy.name} {operation}")


@pytest.mark.parametrize(
    "magnitude, bits, threshold", [(0, 8, 255), (3, 8, 229.5), (4, 7, 221), (9, 7, 178.5), (15, 6, 127.5), (30, 4, 0)]
)
def test_randaugment_magnitudes(magnitude, bits, threshold):
    policy = Policy("randaugment", magnitude=magnitude)
    for name, (start, reach) in SIGNED["randaugment"].items():
        swing = reach * magnitude / 30
        np.testing.assert_allclose(np.abs(magnitudes(policy, name) - start), swing, atol=1e-5)
    assert set(magnitudes(policy, "posterize").tolist()) == {bits}
    assert set(magnitudes(policy, "solarize").tolist()) == {threshold}  # exactly: a level on it is inverted


def test_trivialaugment_magnitudes():
    policy = Policy("trivialaugment")
    for name, (start, reach) in SIGNED["trivialaugment"].items():
        bins = np.abs(magnitudes(policy, name) - start) / reach * 30
        np.testing.assert_allclose(bins, np.round(bins), atol=1e-4)
        assert_frequencies(np.round(bins), dict.fromkeys(range(31), 1 / 31))
    assert_frequencies(magnitudes(policy, "solarize"), {255 - 8.5 * place: 1 / 31 for place in range(31)})
    bits = {8: 3, 7: 5, 6: 5, 5: 5, 4: 5, 3: 5, 2: 3}  # from how many of the bins
    assert_frequencies(magnitudes(policy, "posterize"), {bit: count / 31 for bit, count in bits.items()})


def test_3augment_magnitudes():
    policy = Policy("3augment")
    assert set(magnitudes(policy, "solarize").tolist()) == {128}
    for name, low, high in [("blur", 0.1, 2), ("brightness", 0.7, 1.3), ("contrast", 0.7, 1.3), ("color", 0.7, 1.3)]:
        share = np.sort((magnitudes(policy, name) - low) / (high - low))
        steps = np.linspace(0, 1, len(share))
        assert np.abs(share - steps).max() < 2 / np.sqrt(len(share))  # uniform: Kolmogorov and Smirnov at 0.0007
        assert share.min() >= -1e-5 and share.max() <= 1 + 1e-5


@pytest.mark.parametrize("name", POLICIES)
def test_signs_are_half_and_half(name):
    operation, magnitude = drawn(Policy(name))
    for k, step in enumerate(policies.operations(Policy(name))):
        for chosen in set(step) & set(SIGNED[name]):
            away = magnitude[k, operation[k] == INDEX(chosen)] - SIGNED[name][chosen][0]
            away = away[away != 0]
            assert np.mean(away > 0) == pytest.approx(0.5, abs=5 * 0.5 / np.sqrt(len(away)))
        for chosen in set(step) & UNMOVED:
            assert (magnitude[k, operation[k] == INDEX(chosen)] == 0).all()


def test_magnitude_noise():
    policy = Policy("randaugment", magnitude=15, magnitude_std=2)
    bins = np.abs(magnitudes(policy, "rotate"))  # degrees are bins
    assert bins.mean() == pytest.approx(15, abs=5 * 2 / np.sqrt(len(bins)))
    assert bins.std() == pytest.approx(2, abs=5 * 2 / np.sqrt(2 * len(bins)))
    assert set(magnitudes(policy, "posterize").tolist()) <= {5, 6, 7}  # bits, whole ones
    operation, magnitude = drawn(policy)
    twice = np.abs(magnitude[:, (operation == INDEX("rotate")).all(axis=0)])
    assert abs(np.corrcoef(twice)[0, 1]) < 5 / np.sqrt(twice.shape[1])  # drawn anew at each step
    for edge in (0, 30):
        bins = np.abs(magnitudes(Policy("randaugment", magnitude=edge, magnitude_std=1.5), "rotate"))
        assert bins.min() >= 0 and bins.max() <= 30
        assert np.mean(bins == edge) == pytest.approx(0.5, abs=5 * 0.5 / np.sqrt(len(bins)))


# The pictures


@functools.cache
def augmented(policy: Policy) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`PICTURES` after `policy`; its operations, as indices into `ops.OPERATIONS`, and magnitudes, [B, K] each."""
    pictures, (operation, magnitude) = compiled(jax.random.key(0), PICTURES, policy)
    steps = zip(policies.operations(policy), operation, strict=True)
    chosen = np.stack([np.array([*map(INDEX, step)], np.int32)[np.asarray(k)] for step, k in steps])
    return np.asarray(pictures), chosen.T, np.asarray(magnitude).T


@functools.partial(jax.jit, static_argnums=2)
def compiled(key, pictures, policy):
    return policies.augment(key, pictures, policy), policies.draw(key, len(pictures), HEIGHT, WIDTH, policy)


apply_one = jax.jit(lambda picture, operation, magnitude: ops.apply(picture[None], operation[None], magnitude[None])[0])


@pytest.mark.parametrize("policy", [IMAGENET, Policy("randaugment", 2, 15, 3), Policy("3augment")])
def test_augment_is_its_operations_one_after_another(policy):
    found, operations, magnitudes = augmented(policy)
    assert found.dtype == np.uint8 and found.shape == PICTURES.shape
    for picture, result, operation, magnitude in zip(PICTURES, found, operations, magnitudes, strict=True):
        for chosen, amount in zip(operation, magnitude, strict=True):
            picture = apply_one(picture, chosen, amount)
        np.testing.assert_array_equal(result, picture)


def test_autoaugment_is_pillows():
    """Operations of Pillow's composed; compiled blends that end on a whole level may fall to either side."""
    move = {"resample": Image.Resampling.NEAREST, "fillcolor": (ops.FILL,) * 3}
    pillow = {
        "identity": lambda picture, _: picture,
        "shear_x": lambda picture, x: picture.transform(
            picture.size, Image.Transform.AFFINE, (1, x, 0, 0, 1, 0), **move
        ),
        "rotate": lambda picture, degrees: picture.rotate(degrees, **move),
        "color": lambda picture, factor: ImageEnhance.Color(picture).enhance(factor),
        "contrast": lambda picture, factor: ImageEnhance.Contrast(picture).enhance(factor),
        "sharpness": lambda picture, factor: ImageEnhance.Sharpness(picture).enhance(factor),
        "posterize": lambda picture, bits: ImageOps.posterize(picture, int(bits)),
        "solarize": ImageOps.solarize,
        "auto_contrast": lambda picture, _: ImageOps.autocontrast(picture),
        "equalize": lambda picture, _: ImageOps.equalize(picture),
        "invert": lambda picture, _: ImageOps.invert(picture),
    }
    seen = set()
    for picture, result, operation, magnitude in zip(PICTURES, *augmented(IMAGENET), strict=True):
        image = Image.fromarray(picture)
        names = [ops.OPERATIONS[chosen] for chosen in operation]
        for name, amount in zip(names, magnitude.tolist(), strict=True):
            image = pillow[name](image, amount)
        allowed = 0.02 if {"color", "contrast", "sharpness"} & set(names) else 0
        assert np.mean(result != np.asarray(image)) <= allowed, names
        seen.update(names)
    assert len(seen) >= 9


def test_randaugment_of_magnitude_0_leaves_pictures():
    """Of those whose histograms are not changed; at a threshold of 255 only white is inverted."""
    operation, magnitude = (array[:, :200] for array in drawn(Policy("randaugment", magnitude=0)))
    picture = np.minimum(PICTURES[0], 254)
    pairs = {(int(o), float(m)) for o, m in zip(operation.ravel(), magnitude.ravel(), strict=True)}
    kept = {ops.OPERATIONS[o] for o, m in pairs if (apply_one(picture, np.int32(o), np.float32(m)) == picture).all()}
    assert kept == set(policies.UNIFORM) - {"auto_contrast", "equalize"}


def test_pictures_do_not_mind_their_neighbours():
    """The same draws with other pictures around give the same; the same picture at other places gives others."""
    other, same = PICTURES[::-1].copy(), np.repeat(PICTURES[:1], 48, axis=0)
    other[::2] = PICTURES[::2]
    found, _ = compiled(jax.random.key(0), other, IMAGENET)
    np.testing.assert_array_equal(found[::2], augmented(IMAGENET)[0][::2])
    assert len(np.unique(compiled(jax.random.key(0), same, IMAGENET)[0], axis=0)) > 12


# Keys, and errors


@pytest.mark.parametrize("name", POLICIES)
def test_draws_depend_on_the_key_only(name):
    policy = Policy(name)
    one, other = drawn(policy), drawn(policy, seed=1)
    again = drawn.__wrapped__(policy)
    for a, b, c in zip(one, again, other, strict=True):
        np.testing.assert_array_equal(a, b)
        assert (a != c).any()


def test_the_other_policies_ignore_randaugments_fields():
    for name in set(POLICIES) - {"randaugment"}:
        for a, b in zip(drawn(Policy(name)), drawn(Policy(name, 5, 30, 2.0)), strict=True):
            np.testing.assert_array_equal(a, b)


def test_policies_draw_only_from_what_they_are_told():
    policy = Policy("randaugment", num_ops=3, only=("invert", "rotate"))
    assert policies.operations(policy) == (("invert", "rotate"),) * 3
    operation, magnitude = map(np.asarray, policies.draw(jax.random.key(0), 2000, 32, 32, policy))
    assert set(np.unique(operation)) == {0, 1} and abs(operation.mean() - 0.5) < 0.03
    assert not magnitude[operation == 0].any()
    np.testing.assert_allclose(np.abs(magnitude[operation == 1]), 9.0, rtol=1e-6)
    assert policies.operations(Policy("trivialaugment", only=("color",))) == (("color",),)


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"name": "randaug"}, "unknown augmentation policy 'randaug': did you mean 'randaugment'?"),
        ({"name": "autoaugment_cifar100"}, "did you mean 'autoaugment_cifar10'?"),
        ({"name": ""}, "3augment"),
        ({"name": None}, "unknown augmentation policy None"),
        (
            {"only": ("rotate", "sharpen")},
            "unknown operation 'sharpen' of an augmentation policy: did you mean 'sharpness'?",
        ),
        ({"only": ("blur",)}, "unknown operation 'blur'"),  # which has no magnitude on this scale
        ({"only": ("rotate", "color", "rotate")}, "named twice: rotate, color, rotate"),
    ],
)
def test_wrong_policies(arguments, words):
    with pytest.raises(UserError) as error:
        Policy(**{"name": "randaugment", **arguments})
    assert words in str(error.value) and "\n" not in str(error.value)

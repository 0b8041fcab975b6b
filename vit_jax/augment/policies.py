"""Which operations of `ops` a picture goes through, and how strongly: AutoAugment, RandAugment and their like.

A policy takes a number of steps. At each, every picture of a batch draws one of the step's operations and a magnitude
for it: a bin on the policy's scale, that `_ranges` turns into degrees, pixels or levels.
"""

import dataclasses
import difflib

import jax
import jax.numpy as jnp

from vit_jax.augment import ops
from vit_jax.errors import UserError

# The policies that Cubuk et al. 2019 found (arXiv 1805.09501, appendix): 25 sub-policies, each two operations with the
# probability and the bin, 0..9, of each; 0 where an operation has no magnitude. Checked entry for entry against
# torchvision and DeepVoltaire/AutoAugment. EfficientNet's "v0" for ImageNet is another policy, in no paper.
SubPolicy = tuple[tuple[str, float, int], tuple[str, float, int]]
AUTOAUGMENT: dict[str, tuple[SubPolicy, ...]] = {
    "autoaugment_cifar10": (
        (("invert", 0.1, 0), ("contrast", 0.2, 6)),
        (("rotate", 0.7, 2), ("translate_x", 0.3, 9)),
        (("sharpness", 0.8, 1), ("sharpness", 0.9, 3)),
        (("shear_y", 0.5, 8), ("translate_y", 0.7, 9)),
        (("auto_contrast", 0.5, 0), ("equalize", 0.9, 0)),
        (("shear_y", 0.2, 7), ("posterize", 0.3, 7)),
        (("color", 0.4, 3), ("brightness", 0.6, 7)),
        (("sharpness", 0.3, 9), ("brightness", 0.7, 9)),
        (("equalize", 0.6, 0), ("equalize", 0.5, 0)),
        (("contrast", 0.6, 7), ("sharpness", 0.6, 5)),
        (("color", 0.7, 7), ("translate_x", 0.5, 8)),
        (("equalize", 0.3, 0), ("auto_contrast", 0.4, 0)),
        (("translate_y", 0.4, 3), ("sharpness", 0.2, 6)),
        (("brightness", 0.9, 6), ("color", 0.2, 8)),
        (("solarize", 0.5, 2), ("invert", 0.0, 0)),
        (("equalize", 0.2, 0), ("auto_contrast", 0.6, 0)),
        (("equalize", 0.2, 0), ("equalize", 0.6, 0)),
        (("color", 0.9, 9), ("equalize", 0.6, 0)),
        (("auto_contrast", 0.8, 0), ("solarize", 0.2, 8)),
        (("brightness", 0.1, 3), ("color", 0.7, 0)),
        (("solarize", 0.4, 5), ("auto_contrast", 0.9, 0)),
        (("translate_y", 0.9, 9), ("translate_y", 0.7, 9)),
        (("auto_contrast", 0.9, 0), ("solarize", 0.8, 3)),
        (("equalize", 0.8, 0), ("invert", 0.1, 0)),
        (("translate_y", 0.7, 9), ("auto_contrast", 0.9, 0)),
    ),
    "autoaugment_svhn": (
        (("shear_x", 0.9, 4), ("invert", 0.2, 0)),
        (("shear_y", 0.9, 8), ("invert", 0.7, 0)),
        (("equalize", 0.6, 0), ("solarize", 0.6, 6)),
        (("invert", 0.9, 0), ("equalize", 0.6, 0)),
        (("equalize", 0.6, 0), ("rotate", 0.9, 3)),
        (("shear_x", 0.9, 4), ("auto_contrast", 0.8, 0)),
        (("shear_y", 0.9, 8), ("invert", 0.4, 0)),
        (("shear_y", 0.9, 5), ("solarize", 0.2, 6)),
        (("invert", 0.9, 0), ("auto_contrast", 0.8, 0)),
        (("equalize", 0.6, 0), ("rotate", 0.9, 3)),
        (("shear_x", 0.9, 4), ("solarize", 0.3, 3)),
        (("shear_y", 0.8, 8), ("invert", 0.7, 0)),
        (("equalize", 0.9, 0), ("translate_y", 0.6, 6)),
        (("invert", 0.9, 0), ("equalize", 0.6, 0)),
        (("contrast", 0.3, 3), ("rotate", 0.8, 4)),
        (("invert", 0.8, 0), ("translate_y", 0.0, 2)),
        (("shear_y", 0.7, 6), ("solarize", 0.4, 8)),
        (("invert", 0.6, 0), ("rotate", 0.8, 4)),
        (("shear_y", 0.3, 7), ("translate_x", 0.9, 3)),
        (("shear_x", 0.1, 6), ("invert", 0.6, 0)),
        (("solarize", 0.7, 2), ("translate_y", 0.6, 7)),
        (("shear_y", 0.8, 4), ("invert", 0.8, 0)),
        (("shear_x", 0.7, 9), ("translate_y", 0.8, 3)),
        (("shear_y", 0.8, 5), ("auto_contrast", 0.7, 0)),
        (("shear_x", 0.7, 2), ("invert", 0.1, 0)),
    ),
    "autoaugment_imagenet": (
        (("posterize", 0.4, 8), ("rotate", 0.6, 9)),
        (("solarize", 0.6, 5), ("auto_contrast", 0.6, 0)),
        (("equalize", 0.8, 0), ("equalize", 0.6, 0)),
        (("posterize", 0.6, 7), ("posterize", 0.6, 6)),
        (("equalize", 0.4, 0), ("solarize", 0.2, 4)),
        (("equalize", 0.4, 0), ("rotate", 0.8, 8)),
        (("solarize", 0.6, 3), ("equalize", 0.6, 0)),
        (("posterize", 0.8, 5), ("equalize", 1.0, 0)),
        (("rotate", 0.2, 3), ("solarize", 0.6, 8)),
        (("equalize", 0.6, 0), ("posterize", 0.4, 6)),
        (("rotate", 0.8, 8), ("color", 0.4, 0)),
        (("rotate", 0.4, 9), ("equalize", 0.6, 0)),
        (("equalize", 0.0, 0), ("equalize", 0.8, 0)),
        (("invert", 0.6, 0), ("equalize", 1.0, 0)),
        (("color", 0.6, 4), ("contrast", 1.0, 8)),
        (("rotate", 0.8, 8), ("color", 1.0, 2)),
        (("color", 0.8, 8), ("solarize", 0.8, 7)),
        (("sharpness", 0.4, 7), ("invert", 0.6, 0)),
        (("shear_x", 0.6, 5), ("equalize", 1.0, 0)),
        (("color", 0.4, 0), ("equalize", 0.6, 0)),
        (("equalize", 0.4, 0), ("solarize", 0.2, 4)),
        (("solarize", 0.6, 5), ("auto_contrast", 0.6, 0)),
        (("invert", 0.6, 0), ("equalize", 1.0, 0)),
        (("color", 0.6, 4), ("contrast", 1.0, 8)),
        (("equalize", 0.8, 0), ("equalize", 0.6, 0)),
    ),
}
POLICIES = (*AUTOAUGMENT, "randaugment", "trivialaugment", "3augment")
# RandAugment (Cubuk et al. 2019, arXiv 1909.13719) and TrivialAugment (Müller and Hutter 2021, arXiv 2103.10158)
# choose from these.
UNIFORM = (
    *("identity", "shear_x", "shear_y", "translate_x", "translate_y", "rotate", "brightness", "color", "contrast"),
    *("sharpness", "posterize", "solarize", "auto_contrast", "equalize"),
)
RANGED = (*UNIFORM, "invert")  # and can be told to choose from these
TOP_BIN = 30  # of these two, from 0


@dataclasses.dataclass(frozen=True)
class Policy:
    """One of `POLICIES`; the numbers are RandAugment's, the names TrivialAugment's too, and the others ignore them.

    `num_ops` steps, at `magnitude` on torchvision's scale of 0..30. `magnitude_std` is timm's `mstd`: each picture adds
    normal noise at each step. timm's scale is 0..10, so its m9-mstd0.5 would be 27 and 1.5 here, but it also skips each
    step with probability 0.5 and chooses from other operations. `only` names what to choose from, if not `UNIFORM`.
    """

    name: str
    num_ops: int = 2
    magnitude: float = 9.0
    magnitude_std: float = 0.0
    only: tuple[str, ...] = ()

    def __post_init__(self):
        if self.name not in POLICIES:
            near = difflib.get_close_matches(str(self.name), POLICIES, 1, cutoff=0.0)[0]
            raise UserError(
                f"unknown augmentation policy {self.name!r}: did you mean {near!r}? Known are {', '.join(POLICIES)}"
            )
        if unknown := [name for name in self.only if name not in RANGED]:
            near = difflib.get_close_matches(str(unknown[0]), RANGED, 1, cutoff=0.0)[0]
            raise UserError(
                f"unknown operation {unknown[0]!r} of an augmentation policy: did you mean {near!r}? "
                f"Known are {', '.join(RANGED)}"
            )
        if len(set(self.only)) < len(self.only):
            raise UserError(f"an operation of an augmentation policy is named twice: {', '.join(self.only)}")


def operations(policy: Policy) -> tuple[tuple[str, ...], ...]:
    """The names that each step of `policy` draws from, K tuples."""
    if policy.name in AUTOAUGMENT:
        steps = zip(*AUTOAUGMENT[policy.name], strict=True)
        return tuple(tuple(dict.fromkeys(("identity", *(name for name, _, _ in step)))) for step in steps)
    if policy.name == "3augment":  # colour jitter's order is fixed here; torchvision's is random
        return ("greyscale", "solarize", "blur"), ("brightness",), ("contrast",), ("color",)
    return (policy.only or UNIFORM,) * (policy.num_ops if policy.name == "randaugment" else 1)


def draw(key: jax.Array, batch: int, height: int, width: int, policy: Policy) -> tuple[jax.Array, jax.Array]:
    """What happens to each of `batch` pictures of `height` x `width` pixels at each of the K steps.

    Returns the operation, int32 [K, B], an index into the step's `operations(policy)`, and its magnitude, float32
    [K, B], in the unit of `ops.apply`.
    """
    choice_key, bin_key, sign_key = jax.random.split(key, 3)
    draw_choices = _draw_sub_policies if policy.name in AUTOAUGMENT else _draw_uniformly
    operation, bins = draw_choices(choice_key, bin_key, batch, policy)
    sign = jax.random.rademacher(sign_key, operation.shape, jnp.float32)
    ranges = _ranges(policy.name, height, width)
    rows = [
        jnp.asarray([(*ranges[name], name == "posterize") for name in names], jnp.float32)[chosen]
        for names, chosen in zip(operations(policy), operation, strict=True)
    ]
    start, slope, swing, whole = jnp.moveaxis(jnp.stack(rows), -1, 0)  # each [K, B]
    magnitude = start + (slope + sign * swing) * bins
    return operation, jnp.where(whole == 1, jnp.round(magnitude), magnitude)


def augment(key: jax.Array, images: jax.Array, policy: Policy) -> jax.Array:
    """Takes uint8 images [B, height, width, C] through the steps of `policy`, one after another."""
    batch, height, width, _ = images.shape
    operation, magnitude = draw(key, batch, height, width, policy)
    for names, chosen, amount in zip(operations(policy), operation, magnitude, strict=True):
        images = ops.apply(images, chosen, amount, names)
    return images


def _draw_sub_policies(choice_key, chance_key, batch: int, policy: Policy) -> tuple[jax.Array, jax.Array]:
    """AutoAugment's operations and bins, [2, B] each: a sub-policy a picture, its halves applied by chance or not."""
    halves = list(zip(*AUTOAUGMENT[policy.name], strict=True))  # 2 x 25 entries
    steps = zip(operations(policy), halves, strict=True)
    index = jnp.asarray([[names.index(name) for name, _, _ in half] for names, half in steps])
    probability = jnp.asarray([[probability for _, probability, _ in half] for half in halves])
    bins = jnp.asarray([[float(place) for _, _, place in half] for half in halves])
    chosen = jax.random.randint(choice_key, (batch,), 0, index.shape[1])
    applied = jax.random.uniform(chance_key, (len(halves), batch)) < probability[:, chosen]
    return jnp.where(applied, index[:, chosen], 0), bins[:, chosen]  # 0 is the identity


def _draw_uniformly(choice_key, bin_key, batch: int, policy: Policy) -> tuple[jax.Array, jax.Array]:
    """The other policies' operations and bins, [K, B] each."""
    counts = jnp.asarray([[len(names)] for names in operations(policy)])
    shape = (len(counts), batch)
    operation = jax.random.randint(choice_key, shape, 0, counts)
    if policy.name == "randaugment":
        bins = jnp.clip(policy.magnitude + policy.magnitude_std * jax.random.normal(bin_key, shape), 0, TOP_BIN)
    elif policy.name == "trivialaugment":
        bins = jax.random.randint(bin_key, shape, 0, TOP_BIN + 1).astype(jnp.float32)
    else:
        bins = jax.random.uniform(bin_key, shape)
    return operation, bins


def _ranges(policy: str, height: int, width: int) -> dict[str, tuple[float, float, float]]:
    """What an operation's magnitude is at bin b: `start + slope * b`, give or take `swing * b` with even odds.

    AutoAugment's are the paper's, RandAugment's the same, as torchvision has them. AutoAugment's threshold is from 256
    here, as in the paper, and from 255 there, which moves it by less than a level; and torchvision cuts translations to
    whole pixels. Sources differ: the authors' code divides bins by 10, not 9, and has 0.1 + 0.18 * bin for factors of
    colour, where the others have 1 and a random sign; DeepVoltaire/AutoAugment never flips the sign of rotations.
    TrivialAugment's are its "wide" ones, again torchvision's.
    """
    if policy == "3augment":  # one bin, 0..1: DeiT III's numbers, arXiv 2204.07118 and its code
        jitter = dict.fromkeys(("brightness", "contrast", "color"), (1, 0, 0.3))
        return {"greyscale": (0, 0, 0), "solarize": (128, 0, 0), "blur": (0.1, 1.9, 0), **jitter}
    if policy == "trivialaugment":
        shear, across, down, turn, enhance, bits, threshold, top = 0.99, 32.0, 32.0, 135, 0.99, 6, 255, TOP_BIN
    else:
        across, down = width * 150 / 331, height * 150 / 331  # the paper's 150 pixels, as a share of 331
        shear, turn, enhance, bits = 0.3, 30, 0.9, 4
        threshold, top = (255, TOP_BIN) if policy == "randaugment" else (256, 9)
    return {
        **dict.fromkeys(("identity", "auto_contrast", "equalize", "invert"), (0, 0, 0)),
        **dict.fromkeys(("shear_x", "shear_y"), (0, 0, shear / top)),
        "translate_x": (0, 0, across / top),
        "translate_y": (0, 0, down / top),
        "rotate": (0, 0, turn / top),
        **dict.fromkeys(("brightness", "color", "contrast", "sharpness"), (1, 0, enhance / top)),
        "posterize": (8, -bits / top, 0),
        "solarize": (threshold, -threshold / top, 0),
    }

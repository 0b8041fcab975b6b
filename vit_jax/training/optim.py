"""Schedule, optimizer, the rules that say which parameters it touches how, and the moving average."""

import collections
import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers

from vit_jax.errors import UserError

# (regex on a parameter's path, what its learning rate is multiplied by); the first match wins, 0 freezes.
Rules = tuple[tuple[str, float], ...]

EVERYTHING: Rules = ((".*", 1.0),)
LEAST_DECAY = 0.1  # by the layer: less would freeze what nobody asked to be frozen
PARTS: dict[str, Rules] = {
    "full": EVERYTHING,
    "head": (("^head/", 1.0), (".*", 0.0)),
    "mlp": (("^head/", 1.0), ("/(LayerNorm_2|MlpBlock_3)/", 1.0), (".*", 0.0)),
    "attention": (("^head/", 1.0), ("/(LayerNorm_0|MultiHeadDotProductAttention_1)/", 1.0), (".*", 0.0)),
}
# (regex on a parameter's path, whether it is decayed); the first match wins.
DECAY_RULES = [
    (r"/kernel$", True),
    (r".*", False),
]
# Muon orthogonalises the block matrices, each of q, k and v for itself; AdamW does the rest.
# The pair names the axes that a matrix reads from and writes to: query is [D, H, D/H], out is [H, D/H, D].
MUON_RULES = [
    (r"/(query|key|value)/kernel$", MuonDimensionNumbers(0, (1, 2))),
    (r"/MultiHeadDotProductAttention_1/out/kernel$", MuonDimensionNumbers((0, 1), 2)),
    (r"/MlpBlock_3/Dense_\d/kernel$", MuonDimensionNumbers(0, 1)),
    (r".*", None),
]


def path_name(path: Sequence[Any]) -> str:
    """A parameter's name as the official files write it: `Transformer/encoderblock_0/LayerNorm_0/scale`."""
    return jax.tree_util.keystr(tuple(path), simple=True, separator="/")


def match_rules(rules: Sequence[tuple[str, Any]], params: Any) -> Any:
    """The tree of the values of the first rule whose regex is found in each parameter's path.

    Raises:
      ValueError: no rule covers a parameter.
    """

    def first(path, _):
        name = path_name(path)
        for pattern, value in rules:
            if re.search(pattern, name):
                return value
        raise ValueError(f"no rule covers the parameter {name}")

    return jax.tree_util.tree_map_with_path(first, params)


def multiplier_rules(spec: str | Rules, depth: int) -> Rules:
    """The rules called "full", "head", "mlp", "attention" or "layers:DECAY", for `depth` blocks; rules stay themselves.

    Layer-wise decay (BEiT, arXiv 2106.08254; MAE, arXiv 2111.06377): 1 for what follows the blocks, times DECAY with
    each block further down, and once more for what comes before them.

    Raises:
      UserError: no such rules, or DECAY is out of bounds.
    """
    if not isinstance(spec, str):
        return spec
    if spec in PARTS:
        return PARTS[spec]
    name, _, text = spec.partition(":")
    if name != "layers":
        raise UserError(
            f"unknown init.multipliers {spec!r}: use {', '.join(PARTS)}, layers:DECAY as in layers:0.75, "
            "or pairs of a regex and a multiplier"
        )
    try:
        decay = float(text)
    except ValueError:
        decay = math.nan
    if not LEAST_DECAY <= decay <= 1:
        raise UserError(f"init.multipliers={spec}: the decay is a number from {LEAST_DECAY} to 1, as in layers:0.75")
    blocks = tuple((f"/encoderblock_{i}/", decay ** (depth - i)) for i in reversed(range(depth)))
    return (("^(head|pre_logits|pool)/|/encoder_norm/", 1.0), *blocks, (".*", decay ** (depth + 1)))


def check_rules(rules: Rules, params: Any) -> None:
    """Holds the rules against the parameters, arrays or their shapes.

    Raises:
      UserError: a regex is not valid, or a multiplier negative or not finite; a rule matches no parameter, or none that
        rules before it left; a parameter has no rule; all of them are frozen.
    """
    for pattern, multiplier in rules:
        try:
            re.compile(pattern)
        except (re.error, OverflowError, RecursionError) as error:
            raise UserError(f"init.multipliers: {pattern!r} is not a regex ({error}): correct it") from error
        if not 0 <= multiplier < math.inf:
            raise UserError(f"init.multipliers: {pattern!r} has {multiplier}: allowed are 0, which freezes, and above")
    names = [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    owners = _owners(rules, params)
    for i, (pattern, _) in enumerate(rules):
        if i not in owners and any(re.search(pattern, name) for name in names):
            raise UserError(
                f"init.multipliers: {pattern!r} is never reached, for the rules before it match all that it matches: "
                "put it before them, or leave it out"
            )
        if i not in owners:
            raise UserError(f"init.multipliers: {pattern!r} matches no parameter: correct it, or leave it out")
    if len(rules) in owners:
        name = names[owners.index(len(rules))]
        raise UserError(f"init.multipliers: no rule covers {name}: end with ('.*', 0.0) to freeze the rest, or another")
    if not any(multiplier for _, multiplier in rules):
        raise UserError("init.multipliers freezes every parameter: give a part of them a multiplier above 0")


def rule_table(rules: Rules, params: Any) -> str:
    """A line for each rule that has parameters, arrays or their shapes, and one of how many are trained."""
    counts: collections.Counter[int] = collections.Counter()
    for owner, leaf in zip(_owners(rules, params), jax.tree.leaves(params), strict=True):
        counts[owner] += leaf.size
    rows = [("multiplier", "parameters", "rule")]
    rows += [(f"{rules[i][1]:g}", f"{counts[i]:,}", rules[i][0]) for i in sorted(counts)]
    left, middle = (max(len(row[column]) for row in rows) for column in (0, 1))
    lines = [f"{multiplier:>{left}}  {count:>{middle}}  {pattern}" for multiplier, count, pattern in rows]
    trained = sum(count for i, count in counts.items() if rules[i][1])
    return "\n".join([*lines, f"{trained:,} of {counts.total():,} parameters are trained"])


def _owners(rules: Rules, params: Any) -> list[int]:
    """The place of each parameter's rule among the rules; `len(rules)` where none covers it."""
    patterns = [pattern for pattern, _ in rules]
    return jax.tree.leaves(match_rules([(pattern, i) for i, pattern in enumerate([*patterns, ""])], params))


def partition(params: Any, rules: Rules) -> tuple[Any, Any]:
    """The trained and the frozen parameters: trees of the same form, each with None for what is in the other.

    None is no leaf to jax: a gradient or an optimizer's state of the trained ones has nothing for the others.
    """
    multipliers = match_rules(rules, params)
    trained = jax.tree.map(lambda x, multiplier: x if multiplier else None, params, multipliers)
    frozen = jax.tree.map(lambda x, multiplier: None if multiplier else x, params, multipliers)
    return trained, frozen


def merge(trained: Any, frozen: Any) -> Any:
    """The whole tree of which `partition` made two."""
    return jax.tree.map(lambda x, other: other if x is None else x, trained, frozen, is_leaf=lambda x: x is None)


def make_schedule(
    name: str, learning_rate: float, warmup_steps: int, total_steps: int, final: float = 0.0
) -> optax.Schedule:
    """Step → rate: linear from 0 over the warm-up, then "cosine" or "linear" to `final` at the end, or "constant"."""
    rest = max(total_steps - warmup_steps, 1)
    decay = {
        "cosine": optax.cosine_decay_schedule(learning_rate, rest, alpha=final / learning_rate),
        "linear": optax.linear_schedule(learning_rate, final, rest),
        "constant": optax.constant_schedule(learning_rate),
    }[name]
    if warmup_steps == 0:
        return decay
    return optax.join_schedules([optax.linear_schedule(0.0, learning_rate, warmup_steps), decay], [warmup_steps])


def make_optimizer(
    name: str,
    schedule: optax.Schedule,
    *,
    weight_decay: float,
    momentum: float,
    b2: float,
    clip_norm: float,
    multipliers: Rules = EVERYTHING,
    momentum_dtype: str | None = None,
) -> optax.GradientTransformation:
    """The optimizer called "adamw", "adam" (decay added to the gradient), "sgd" (likewise, with momentum) or "muon".

    Args:
      multipliers: scale the last update, so that AdamW's and Muon's decay goes with the rate.
      momentum_dtype: what gradients' first moments are kept in; None: as the parameters.
    """

    def decayed(params):
        return match_rules(DECAY_RULES, params)

    coupled = optax.add_decayed_weights(weight_decay, decayed)
    adamw = optax.adamw(schedule, b2=b2, weight_decay=weight_decay, mask=decayed, mu_dtype=momentum_dtype)
    muon = _muon(schedule, momentum, weight_decay, momentum_dtype)
    optimizer = {
        "adamw": adamw,
        "adam": optax.chain(coupled, optax.adam(schedule, b2=b2, mu_dtype=momentum_dtype)),
        "sgd": optax.chain(coupled, optax.sgd(schedule, momentum, accumulator_dtype=momentum_dtype)),
        "muon": optax.partition({"muon": muon, "adamw": adamw}, muon_labels),
    }[name]
    first = [optax.clip_by_global_norm(clip_norm)] if clip_norm else []
    last = [_multiply(multipliers)] if any(multiplier != 1 for _, multiplier in multipliers) else []
    return optax.chain(*first, optimizer, *last) if first or last else optimizer


def _multiply(multipliers: Rules) -> optax.GradientTransformation:
    """Multiplies each parameter's update by its rule's number."""

    def update(updates, _):
        return jax.tree.map(lambda x, multiplier: multiplier * x, updates, match_rules(multipliers, updates))

    return optax.stateless(update)


def muon_axes(params: Any) -> Any:
    """The tree of each parameter's matrix axes; None where it is not Muon's."""
    return match_rules(MUON_RULES, params)


def muon_labels(params: Any) -> Any:
    """The tree of "muon" and "adamw": whose each parameter is. Frozen ones, None, are nobody's."""
    return match_rules([(pattern, "adamw" if axes is None else "muon") for pattern, axes in MUON_RULES], params)


def _muon(
    schedule: optax.Schedule, momentum: float, weight_decay: float, momentum_dtype: str | None
) -> optax.GradientTransformation:
    """Muon (Jordan et al. 2024) with updates of AdamW's usual size, 0.2 (Liu et al. 2025, arXiv 2502.16982)."""
    return optax.contrib.muon(
        schedule,
        beta=momentum,
        weight_decay=weight_decay,
        mu_dtype=momentum_dtype,
        consistent_rms=0.2,
        muon_weight_dimension_numbers=muon_axes,
    )


def ema_decay(decay: float, step: jax.Array) -> jax.Array:
    """The decay at `step`, small at first so that the average soon forgets the initial weights."""
    return jnp.minimum(decay, (1.0 + step) / (10.0 + step))


def update_ema(ema: Any, params: Any, decay: jax.Array) -> Any:
    return jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, ema, params)

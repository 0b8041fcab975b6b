"""Which parameters something concerns, by regexes on their paths; what is trained, and what is frozen."""

import collections
import math
import re
from collections.abc import Sequence
from typing import Any

import jax

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

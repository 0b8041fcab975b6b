"""Schedule, optimizer, the masks that say which parameters it touches how, and the moving average."""

import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers

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
    return "/".join(str(key.key) for key in path)


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
) -> optax.GradientTransformation:
    """The optimizer called "adamw", "adam" (decay added to the gradient), "sgd" (likewise, with momentum) or "muon"."""

    def decayed(params):
        return match_rules(DECAY_RULES, params)

    coupled = optax.add_decayed_weights(weight_decay, decayed)
    adamw = optax.adamw(schedule, b2=b2, weight_decay=weight_decay, mask=decayed)
    optimizer = {
        "adamw": adamw,
        "adam": optax.chain(coupled, optax.adam(schedule, b2=b2)),
        "sgd": optax.chain(coupled, optax.sgd(schedule, momentum)),
        "muon": optax.partition(
            {"muon": _muon(schedule, momentum, weight_decay), "adamw": adamw},
            lambda params: jax.tree.map(
                lambda axes: "adamw" if axes is None else "muon", muon_axes(params), is_leaf=_is_axes
            ),
        ),
    }[name]
    return optax.chain(optax.clip_by_global_norm(clip_norm), optimizer) if clip_norm else optimizer


def muon_axes(params: Any) -> Any:
    """The tree of each parameter's matrix axes; None where it is not Muon's."""
    return match_rules(MUON_RULES, params)


def _is_axes(node: Any) -> bool:
    return node is None or isinstance(node, MuonDimensionNumbers)


def _muon(schedule: optax.Schedule, momentum: float, weight_decay: float) -> optax.GradientTransformation:
    """Muon (Jordan et al. 2024) with updates of AdamW's usual size, 0.2 (Liu et al. 2025, arXiv 2502.16982)."""
    return optax.contrib.muon(
        schedule,
        beta=momentum,
        weight_decay=weight_decay,
        consistent_rms=0.2,
        muon_weight_dimension_numbers=muon_axes,
    )


def ema_decay(decay: float, step: jax.Array) -> jax.Array:
    """The decay at `step`, small at first so that the average soon forgets the initial weights."""
    return jnp.minimum(decay, (1.0 + step) / (10.0 + step))


def update_ema(ema: Any, params: Any, decay: jax.Array) -> Any:
    return jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, ema, params)

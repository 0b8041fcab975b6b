"""Schedule, optimizer, which parameters it treats how, and the moving average."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers

from vit_jax.training.rules import EVERYTHING, Rules, match_rules

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

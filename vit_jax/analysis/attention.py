"""Where a model looks: its attention weights, and what they say of a picture's parts. Arrays, which `figures` draws.

`inputs` are pictures as the model takes them: normalised floats [B, height, width, C].
Letters in the shape comments: B examples, L layers, H heads, N tokens (the class token first, where there is one),
D width, h x w the grid of patches.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vit_jax.models.blocks import SelfAttention
from vit_jax.models.vit import VisionTransformer

Grid = tuple[int, int]


@functools.partial(jax.jit, static_argnums=0)
def attention_weights(model: VisionTransformer, params: Any, inputs: jax.Array) -> jax.Array:
    """Who reads whom, in evaluation mode, float32 [B, L, H, N, N]: row q is what query q reads, and sums to 1."""
    _, state = model.apply({"params": params}, inputs, train=False, mutable=["intermediates"])
    blocks = state["intermediates"]["Transformer"]
    attentions = [blocks[f"encoderblock_{i}"]["MultiHeadDotProductAttention_1"] for i in range(model.depth)]
    return jnp.stack([attention["attention_weights"][0] for attention in attentions], axis=1)


def read_by_head(matrices: jax.Array, grid: Grid) -> tuple[jax.Array, jax.Array]:
    """What the classifier's head reads, of matrices [..., N, N]: the class token's row, else the mean of all rows.

    Returns the patches' part [..., h, w], and the class token's own [...], 0 where there is none.
    """
    cls = matrices.shape[-1] - grid[0] * grid[1]
    row = matrices[..., 0, :] if cls else matrices.mean(-2)
    return row[..., cls:].reshape(*row.shape[:-1], *grid), row[..., :cls].sum(-1)


def rollout(weights: jax.Array) -> jax.Array:
    """How much of each input token is in each output token: attention weights [B, L, H, N, N] -> [B, N, N].

    Attention rollout (Abnar & Zuidema 2020, arXiv 2005.00928, section 3): the heads' mean, half of it kept by the
    residual connection, multiplied up from the first layer to the last. Rows sum to 1 as those of the weights do.
    """
    eye = jnp.eye(weights.shape[-1])
    flow = eye
    for layer in range(weights.shape[1]):
        flow = (0.5 * weights[:, layer].mean(1) + 0.5 * eye) @ flow
    return flow


def attention_distance(weights: jax.Array, grid: Grid, patch_size: int) -> jax.Array:
    """How far the heads look, in pixels: attention weights [B, L, H, N, N] -> [B, L, H].

    The distance between a query's patch and the others', weighted by attention, and its mean over queries (figure 7 on
    the right of the ViT paper, arXiv 2010.11929). The class token is nowhere, so it is left out.
    """
    cls = weights.shape[-1] - grid[0] * grid[1]
    between = weights[..., cls:, cls:]
    between = between / between.sum(-1, keepdims=True)
    return (between * patch_distances(grid, patch_size)).sum(-1).mean(-1)


def patch_distances(grid: Grid, patch_size: int) -> np.ndarray:
    """From each patch's centre to each other's, in pixels, [h * w, h * w]."""
    places = np.indices(grid).reshape(2, -1)
    return patch_size * np.hypot(*(places[:, :, None] - places[:, None]))


@functools.partial(jax.jit, static_argnums=0)
def relevance(model: VisionTransformer, params: Any, inputs: jax.Array, classes: jax.Array) -> jax.Array:
    """How much attention brings of each patch to its picture's class in `classes` [B]: at least 0, [B, h, w].

    Gradient-weighted attention (Chefer et al. 2021, arXiv 2103.15679, section 3): R <- R + A' R from the first layer
    to the last, starting with the identity, where A' is the heads' mean of max(gradient * A, 0). Read like attention:
    the class token's row, else the mean of all rows; the identity, which says nothing of the picture, is taken out.
    """
    gradients, weights = attention_gradients(model, params, inputs, classes)
    carried = jnp.maximum(gradients * weights, 0).mean(2)  # [B, L, N, N]
    eye = jnp.eye(weights.shape[-1])
    flow = eye
    for layer in range(model.depth):
        flow = flow + carried[:, layer] @ flow
    return read_by_head(flow - eye, model.grid(*inputs.shape[1:3]))[0]


def attention_gradients(
    model: VisionTransformer, params: Any, inputs: jax.Array, classes: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The gradient of a class's log odds with respect to the attention weights, and these, both [B, L, H, N, N].

    Log odds, not the logit: only differences of logits mean anything, and a probability's own gradient fades near 1.
    """
    model = model.clone(remat=False)  # what `nudge` keeps must not leave another transformation
    weights = attention_weights(model, params, inputs)
    zeros = jnp.zeros((model.depth, len(inputs), weights.shape[-1], model.width))

    def log_odds(nudges):
        read = {}  # by layer, what goes into attention

        def nudge(call, args, kwargs, context):
            out = call(*args, **kwargs)
            if not isinstance(context.module, SelfAttention) or context.method_name != "__call__":
                return out
            layer = int(context.module.path[-2].removeprefix("encoderblock_"))
            read[layer] = args[0]
            return out + nudges[layer].astype(out.dtype)

        with nn.intercept_methods(nudge):
            logits = model.apply({"params": params}, inputs, train=False)
        chosen = jax.nn.one_hot(classes, model.num_classes, dtype=bool)
        rivals = jax.nn.logsumexp(jnp.where(chosen, -jnp.inf, logits), axis=-1)
        return (logits.sum(where=chosen, axis=-1) - rivals).sum(), read

    slopes, read = jax.grad(log_odds, has_aux=True)(zeros)  # slopes: at what comes out of attention
    gradients = []
    for layer in range(model.depth):
        parts = params["Transformer"][f"encoderblock_{layer}"]["MultiHeadDotProductAttention_1"]
        # What comes out is (A v) W + b, so A's gradient is the slope brought back through W, times v.
        value = jnp.einsum("bnd,dhc->bnhc", read[layer], parts["value"]["kernel"]) + parts["value"]["bias"]
        mixed = jnp.einsum("bnd,hcd->bnhc", slopes[layer], parts["out"]["kernel"])
        gradients.append(jnp.einsum("bqhc,bkhc->bhqk", mixed, value))
    return jnp.stack(gradients, axis=1), weights

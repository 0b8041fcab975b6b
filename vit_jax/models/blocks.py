"""The encoder block: attention and the MLP, with what may be added to them.

Letters in the shape comments: B examples, N tokens, D width, H heads, Dh = D / H, M MLP width.
"""

import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

Dtype = Any


class Affine(nn.Module):
    """Parameters of the map `in_shape` -> `out_shape`: handed out, not applied, so that several can share one GEMM."""

    in_shape: tuple[int, ...]
    out_shape: tuple[int, ...]

    @nn.compact
    def __call__(self) -> tuple[jax.Array, jax.Array]:
        def xavier(key, shape, dtype):  # fan in and fan out are those of the matrix, not of its axes split into heads
            matrix = (math.prod(self.in_shape), math.prod(self.out_shape))
            return nn.initializers.xavier_uniform()(key, matrix, dtype).reshape(shape)

        kernel = self.param("kernel", xavier, self.in_shape + self.out_shape, jnp.float32)
        return kernel, self.param("bias", nn.initializers.zeros, self.out_shape, jnp.float32)


class Dropout(nn.Module):
    """Sets elements to 0 at `rate`, rounded to 1/256, and scales the others up, so that the mean stays.

    Eight random bits an element, four times as cheap as `nn.Dropout`'s 32: on a CPU these took a fifth of the step.
    """

    rate: float
    deterministic: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        if self.deterministic or self.rate == 0:
            return x
        dropped = min(max(round(256 * self.rate), 1), 255)
        *outer, last = x.shape
        words = jax.random.bits(self.make_rng("dropout"), (*outer, -(-last // 4)), jnp.uint32)
        draws = jax.lax.bitcast_convert_type(words, jnp.uint8).reshape(*outer, -1)[..., :last]  # 0..255
        return jnp.where(draws >= dropped, x / (1 - dropped / 256), 0).astype(x.dtype)


class SelfAttention(nn.Module):
    """Multi-head self-attention (section 3.1 and appendix A of the ViT paper), [B, N, D] -> [B, N, D]."""

    num_heads: int
    dropout: float
    qk_norm: bool
    learned_temperature: bool
    mask_self: bool
    rotary: bool
    norm_epsilon: float
    dtype: Dtype

    @nn.compact
    def __call__(self, x: jax.Array, grid: tuple[int, int], *, train: bool) -> jax.Array:
        batch, tokens, width = x.shape
        heads = (self.num_heads, width // self.num_heads)
        # Three parameters, as in the official files, but one GEMM: it is three times as wide, hence faster.
        kernels, biases = zip(
            *(Affine((width,), heads, name=name)() for name in ("query", "key", "value")), strict=True
        )
        # By head, for heads may lie on several devices: [D, H, 3, Dh] as a matrix, whose product is plain and so fast.
        kernel = jnp.stack(kernels, axis=2).astype(self.dtype).reshape(width, 3 * width)
        bias = jnp.stack(biases, axis=1).astype(self.dtype).reshape(3 * width)
        qkv = (x.reshape(batch * tokens, width) @ kernel + bias).reshape(batch, tokens, heads[0], 3 * heads[1])
        q, k, v = jnp.split(qkv, 3, axis=-1)  # [B, N, H, Dh] each
        if self.qk_norm:  # Dehghani et al. 2023 (arXiv 2302.05442): keeps the scores small however long training runs
            norm = functools.partial(nn.LayerNorm, epsilon=self.norm_epsilon, use_bias=False, dtype=self.dtype)
            q, k = norm(name="query_ln")(q), norm(name="key_ln")(k)
        if self.rotary:
            q, k = rotate(q, grid), rotate(k, grid)
        mixed = self.attend(*(x.swapaxes(1, 2) for x in (q, k, v)), train=train)  # a CPU's products are faster so
        mixed = mixed.swapaxes(1, 2).reshape(batch * tokens, width)
        kernel, bias = Affine(heads, (width,), name="out")()
        out = mixed @ kernel.reshape(width, width).astype(self.dtype) + bias.astype(self.dtype)
        return out.reshape(batch, tokens, width)

    def attend(self, q: jax.Array, k: jax.Array, v: jax.Array, *, train: bool) -> jax.Array:
        """The mean of the values, weighted by the softmax of the scores: [B, H, N, Dh] each -> [B, H, N, Dh]."""
        tokens, size = q.shape[2:]
        temperature: jax.Array | float = math.sqrt(size)
        # Lee et al. 2021 (arXiv 2112.13492, section 3.2): sharper scores, and no token asks for what it knows already.
        if self.learned_temperature:
            init = nn.initializers.constant(temperature)
            learned = self.param("temperature", init, (self.num_heads,), jnp.float32)
            temperature = learned[:, None, None].astype(self.dtype)
        scores = jnp.einsum("bhqd,bhkd->bhqk", q / temperature, k, preferred_element_type=jnp.float32)
        if self.mask_self:
            scores = jnp.where(jnp.eye(tokens, dtype=bool), -jnp.inf, scores)
        # Softmax, its division put off until after the product with v: that divides Dh numbers a query, not N.
        exps = jnp.exp(scores - jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True)))  # [B, H, N, N]
        total = exps.sum(axis=-1, keepdims=True)  # [B, H, N, 1]
        self.sow("intermediates", "attention_weights", exps / total)  # not computed unless "intermediates" is asked for
        exps = Dropout(self.dropout, deterministic=not train)(exps.astype(self.dtype))
        return (jnp.einsum("bhqk,bhkd->bhqd", exps, v) / total).astype(self.dtype)


def rotate(x: jax.Array, grid: tuple[int, int], base: float = 100.0) -> jax.Array:
    """Turns queries or keys [B, N, H, Dh] by their row and column, so that scores depend on the distance alone.

    Axial rotary embedding (Heo et al. 2024, arXiv 2403.13298, section 3.2): the first half of the Dh / 2 pairs turns
    with the row, the second half with the column; a cls token before the grid's stays as it is.
    """
    batch, tokens, heads, size = x.shape
    frequencies = base ** (-np.arange(size // 4) / (size // 4))  # [Dh / 4], radians a step
    rows, columns = np.indices(grid).reshape(2, -1, 1)
    angles = np.concatenate([rows * frequencies, columns * frequencies], axis=1)  # [rows * columns, Dh / 2]
    angles = np.pad(angles, ((tokens - len(angles), 0), (0, 0)))[:, None]  # [N, 1, Dh / 2]
    sine, cosine = jnp.asarray(np.sin(angles), x.dtype), jnp.asarray(np.cos(angles), x.dtype)
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cosine - second * sine, first * sine + second * cosine], axis=-1)


@jax.custom_vjp
def depthwise(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Each channel's own 3x3 convolution with zeros around the picture: [B, h, w, C], [3, 3, C] -> [B, h, w, C].

    Written out over the nine shifted pictures, and its gradient likewise: on the CPU this takes a twentieth of what
    differentiating the sum takes, and XLA's own depthwise convolution inside a loop thousands of times as long.
    """
    return functools.reduce(jnp.add, (kernel[i, j] * shifted for (i, j), shifted in _shifts(x)))


def _shifts(x: jax.Array) -> list[tuple[tuple[int, int], jax.Array]]:
    """What lies under each of the kernel's nine places."""
    _, height, width, _ = x.shape
    # Behind a barrier, or XLA tests for the border at every multiplication.
    padded = jax.lax.optimization_barrier(jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0))))
    return [((i, j), padded[:, i : i + height, j : j + width]) for i in range(3) for j in range(3)]


def _depthwise_forward(x, kernel):
    return depthwise(x, kernel), (x, kernel)


def _depthwise_backward(saved, gradient):
    x, kernel = saved
    for_kernel = [jnp.sum(shifted * gradient, axis=(0, 1, 2), dtype=jnp.float32) for _, shifted in _shifts(x)]
    for_x = depthwise(gradient, kernel[::-1, ::-1])
    return for_x, jnp.stack(for_kernel).reshape(kernel.shape).astype(kernel.dtype)


depthwise.defvjp(_depthwise_forward, _depthwise_backward)


class DepthwiseConv(nn.Module):
    """A 3x3 convolution of each channel with itself over the grid's tokens, [B, N, M] -> [B, N, M]; cls comes out 0."""

    dtype: Dtype

    @nn.compact
    def __call__(self, x: jax.Array, grid: tuple[int, int]) -> jax.Array:
        batch, tokens, channels = x.shape
        init = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal", in_axis=(0, 1), out_axis=())
        kernel = self.param("kernel", init, (3, 3, channels), jnp.float32).astype(self.dtype)
        cls = tokens - math.prod(grid)
        y = depthwise(x[:, cls:].reshape(batch, *grid, channels), kernel)
        return jnp.pad(y.reshape(batch, tokens - cls, channels), ((0, 0), (cls, 0), (0, 0)))


class Mlp(nn.Module):
    """Two dense layers with a GELU between them, the same for each token, [B, N, D] -> [B, N, D].

    With `conv` the hidden layer also sees its neighbours: then the model is a hybrid, no plain ViT.
    """

    mlp_dim: int
    dropout: float
    gelu: str
    conv: bool
    dtype: Dtype

    @nn.compact
    def __call__(self, x: jax.Array, grid: tuple[int, int], *, train: bool) -> jax.Array:
        dense = functools.partial(
            nn.Dense,
            dtype=self.dtype,
            kernel_init=nn.initializers.xavier_uniform(),
            bias_init=nn.initializers.normal(1e-6),
        )
        drop = functools.partial(Dropout, self.dropout, deterministic=not train)
        hidden = dense(self.mlp_dim, name="Dense_0")(x)  # [B, N, M]
        if self.conv:
            hidden += DepthwiseConv(self.dtype, name="conv")(hidden, grid)
        hidden = nn.gelu(hidden, approximate=self.gelu == "tanh")
        return drop()(dense(x.shape[-1], name="Dense_1")(drop()(hidden)))


class EncoderBlock(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)) (equations 2 and 3 of the ViT paper), [B, N, D] -> [B, N, D]."""

    num_heads: int
    mlp_dim: int
    dropout: float
    attention_dropout: float
    drop_path: float
    gelu: str
    norm_epsilon: float
    layer_scale: float
    qk_norm: bool
    learned_temperature: bool
    mask_self: bool
    rotary: bool
    mlp_conv: bool
    dtype: Dtype

    @nn.compact
    def __call__(self, x: jax.Array, grid: tuple[int, int], train: bool) -> jax.Array:
        norm = functools.partial(nn.LayerNorm, epsilon=self.norm_epsilon, dtype=self.dtype)
        attention = SelfAttention(
            num_heads=self.num_heads,
            dropout=self.attention_dropout,
            qk_norm=self.qk_norm,
            learned_temperature=self.learned_temperature,
            mask_self=self.mask_self,
            rotary=self.rotary,
            norm_epsilon=self.norm_epsilon,
            dtype=self.dtype,
            name="MultiHeadDotProductAttention_1",
        )
        mlp = Mlp(self.mlp_dim, self.dropout, self.gelu, self.mlp_conv, self.dtype, name="MlpBlock_3")
        y = attention(norm(name="LayerNorm_0")(x), grid, train=train)
        y = Dropout(self.dropout, deterministic=not train)(y)
        x = x + self.branch(y, "layer_scale_attention", train)
        y = mlp(norm(name="LayerNorm_2")(x), grid, train=train)
        return x + self.branch(y, "layer_scale_mlp", train)

    def branch(self, y: jax.Array, scale_name: str, train: bool) -> jax.Array:
        """What of a branch reaches the residual stream: LayerScale (arXiv 2103.17239), then stochastic depth."""
        if self.layer_scale:
            scale = self.param(scale_name, nn.initializers.constant(self.layer_scale), y.shape[-1:], jnp.float32)
            y = y * scale.astype(self.dtype)
        # Stochastic depth (arXiv 1603.09382): one draw an example, the survivors scaled by 1 / (1 - rate).
        return nn.Dropout(self.drop_path, broadcast_dims=(1, 2), deterministic=not train)(y)

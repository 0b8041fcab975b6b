"""The Vision Transformer of Dosovitskiy et al. 2021 (arXiv 2010.11929) as one Linen module.

The names of the modules are those of Google's published checkpoints, numbers included, so that an official file is
this parameter tree and needs no renaming:

    cls                                                        [1, 1, D]
    embedding/{kernel, bias}                                   [P, P, C, D], [D]
    Transformer/posembed_input/pos_embedding                   [1, N, D], slot 0 is cls
    Transformer/encoderblock_{i}/LayerNorm_0                   before attention
    Transformer/encoderblock_{i}/MultiHeadDotProductAttention_1/{query, key, value, out}
    Transformer/encoderblock_{i}/LayerNorm_2                   before the MLP
    Transformer/encoderblock_{i}/MlpBlock_3/{Dense_0, Dense_1}
    Transformer/encoder_norm, pre_logits, head

Letters in the shape comments: B examples, N tokens, D width, H heads, Dh = D / H, M MLP width.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vit_jax.errors import UserError
from vit_jax.models import stems

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
        dropped = round(256 * self.rate)
        if self.deterministic or dropped == 0:
            return x
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
        kernel = jnp.stack(kernels, axis=1).reshape(width, 3 * width).astype(self.dtype)  # [D, 3D]
        bias = jnp.stack(biases).reshape(3 * width).astype(self.dtype)
        qkv = x.reshape(batch * tokens, width) @ kernel + bias  # [B * N, 3D]
        q, k, v = jnp.moveaxis(qkv.reshape(batch, tokens, 3, *heads), 2, 0)  # [B, N, H, Dh] each
        if self.qk_norm:  # Dehghani et al. 2023 (arXiv 2302.05442): keeps the scores small however long training runs
            norm = functools.partial(nn.LayerNorm, epsilon=self.norm_epsilon, use_bias=False, dtype=self.dtype)
            q, k = norm(name="query_ln")(q), norm(name="key_ln")(k)
        if self.rotary:
            q, k = rotate(q, grid), rotate(k, grid)
        temperature: jax.Array | float = math.sqrt(heads[1])
        if self.learned_temperature:  # Lee et al. 2021 (arXiv 2112.13492, section 3.2): sharper scores, one number a head
            init = nn.initializers.constant(temperature)
            temperature = self.param("temperature", init, (self.num_heads,), jnp.float32)[:, None].astype(self.dtype)
        scores = jnp.einsum("bqhd,bkhd->bhqk", q / temperature, k, preferred_element_type=jnp.float32)
        if self.mask_self:  # the same paper: what a token knows already is not asked for again
            scores = jnp.where(jnp.eye(tokens, dtype=bool), -jnp.inf, scores)
        # Softmax, its division put off until after the product with v: that divides Dh numbers a query, not N.
        exps = jnp.exp(scores - jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True)))  # [B, H, N, N]
        total = exps.sum(axis=-1, keepdims=True)  # [B, H, N, 1]
        self.sow("intermediates", "attention_weights", exps / total)  # not computed unless "intermediates" is asked for
        exps = Dropout(self.dropout, deterministic=not train)(exps.astype(self.dtype))
        mixed = jnp.einsum("bhqk,bkhd->bqhd", exps, v) / total.swapaxes(1, 2)  # [B, N, H, Dh]
        mixed = mixed.astype(self.dtype).reshape(batch * tokens, width)
        kernel, bias = Affine(heads, (width,), name="out")()
        out = mixed @ kernel.reshape(width, width).astype(self.dtype) + bias.astype(self.dtype)
        return out.reshape(batch, tokens, width)


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


class DepthwiseConv(nn.Module):
    """A 3x3 convolution of each channel with itself over the grid's tokens, [B, N, M] -> [B, N, M]; cls comes out 0."""

    dtype: Dtype

    @nn.compact
    def __call__(self, x: jax.Array, grid: tuple[int, int]) -> jax.Array:
        batch, tokens, channels = x.shape
        init = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal", in_axis=(0, 1), out_axis=())
        kernel = self.param("kernel", init, (3, 3, channels), jnp.float32).astype(self.dtype)
        cls = tokens - math.prod(grid)
        y = stems.depthwise(x[:, cls:].reshape(batch, *grid, channels), kernel)
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


class PositionEmbedding(nn.Module):
    """Adds to each token where it is, [B, N, D] -> [B, N, D]; the N tokens are `grid` row by row, after cls if any."""

    kind: str
    dtype: Dtype

    @nn.compact
    def __call__(self, x: jax.Array, grid: tuple[int, int]) -> jax.Array:
        places: jax.Array | np.ndarray
        if self.kind == "sincos2d":
            places = sincos2d(grid, x.shape[-1])
            places = np.pad(places, ((x.shape[1] - len(places), 0), (0, 0)))  # the cls token is nowhere: zeros
        else:
            places = self.param("pos_embedding", nn.initializers.normal(0.02), (1, *x.shape[1:]), jnp.float32)
        return x + jnp.asarray(places, self.dtype)


def middle_positions(params: Any, side: int, smaller: int) -> Any:
    """The parameters for the middle `smaller` x `smaller` patches of a grid of `side` x `side`: with their positions."""
    if smaller == side or "pos_embedding" not in params["Transformer"].get("posembed_input", {}):
        return params
    table = params["Transformer"]["posembed_input"]["pos_embedding"]  # [1, N, D]
    cls, start = table.shape[1] - side**2, (side - smaller) // 2
    grid = table[:, cls:].reshape(1, side, side, -1)[:, start : start + smaller, start : start + smaller]
    table = jnp.concatenate([table[:, :cls], grid.reshape(1, smaller**2, -1)], axis=1)
    return params | {"Transformer": params["Transformer"] | {"posembed_input": {"pos_embedding": table}}}


def sincos2d(grid: tuple[int, int], width: int) -> np.ndarray:
    """Fixed embedding of a grid's rows and columns, float32 [rows * columns, width] (MoCo v3, arXiv 2104.02057)."""
    rows, columns = np.indices(grid).reshape(2, -1, 1)  # [N, 1]
    frequencies = 10_000.0 ** (-np.arange(width // 4) / (width // 4))  # [D / 4], from 1 down to almost 1 / 10000
    angles = rows * frequencies, columns * frequencies
    return np.concatenate([wave(angle) for angle in angles for wave in (np.sin, np.cos)], axis=1).astype(np.float32)


class Encoder(nn.Module):
    """Position embedding, the stack of blocks and the last norm, [B, N, D] -> float32 [B, N, D]."""

    depth: int
    drop_path: float
    dropout: float
    position_embedding: str
    norm_epsilon: float
    make_block: Callable[..., nn.Module]
    dtype: Dtype

    @nn.compact
    def __call__(self, x: jax.Array, grid: tuple[int, int], *, train: bool) -> jax.Array:
        if self.position_embedding in ("learned", "sincos2d"):
            x = PositionEmbedding(self.position_embedding, self.dtype, name="posembed_input")(x, grid)
        x = Dropout(self.dropout, deterministic=not train)(x)
        for i in range(self.depth):
            rate = self.drop_path * i / max(self.depth - 1, 1)  # early blocks matter most: linear from 0
            x = self.make_block(drop_path=rate, name=f"encoderblock_{i}")(x, grid, train)
        return nn.LayerNorm(epsilon=self.norm_epsilon, dtype=jnp.float32, name="encoder_norm")(x)


CHOICES = {
    "pool": ("cls", "gap", "seq"),
    "position_embedding": ("learned", "sincos2d", "rotary", "none"),
    "stem": ("patch", "conv", "shifted"),
    "gelu": ("tanh", "exact"),
}


class VisionTransformer(nn.Module):
    """Normalised float images [B, height, width, C] -> float32 logits [B, num_classes].

    Parameters are float32 whatever `dtype` computes; norms, softmax and logits are float32 too. A training pass needs
    the rng "dropout" where a rate is above 0.
    """

    num_classes: int
    patch_size: int
    width: int
    depth: int
    num_heads: int
    mlp_dim: int
    pool: str = "cls"
    position_embedding: str = "learned"
    stem: str = "patch"
    dropout: float = 0.0  # after the position embedding, after attention, twice in the MLP
    attention_dropout: float = 0.0  # on the attention weights
    drop_path: float = 0.0  # stochastic depth of the last block
    gelu: str = "tanh"
    norm_epsilon: float = 1e-6
    layer_scale: float = 0.0  # initial value, 0: none
    qk_norm: bool = False
    learned_temperature: bool = False  # of the attention scores, a number a head
    mask_self: bool = False  # no token attends to itself
    mlp_conv: bool = False  # a 3x3 depthwise convolution in the MLP: a hybrid
    head_zero_init: bool = True
    representation_size: int = 0  # features of a tanh layer before the head, 0: none
    remat: bool = False  # keep only the blocks' inputs and compute the rest again going backward: less memory, slower
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        self.check(*images.shape[1:3])
        patch_size = self.patch_size
        if self.stem == "conv":
            stem = stems.ConvStem(patch_size, self.width, self.norm_epsilon, self.gelu, self.dtype, name="stem")
            images, patch_size = stem(images), 1
        elif self.stem == "shifted":
            stem = stems.ShiftedPatches(patch_size, self.norm_epsilon, self.dtype, name="stem")
            images, patch_size = stem(images), 1
        x = stems.PatchEmbedding(patch_size, self.width, self.dtype, name="embedding")(images)
        batch, rows, columns, width = x.shape
        x = x.reshape(batch, rows * columns, width)  # [B, N, D]
        if self.pool == "cls":
            cls = self.param("cls", nn.initializers.zeros, (1, 1, width), jnp.float32)
            x = jnp.concatenate([jnp.broadcast_to(cls.astype(x.dtype), (batch, 1, width)), x], axis=1)
        encoder = Encoder(
            depth=self.depth,
            drop_path=self.drop_path,
            dropout=self.dropout,
            position_embedding=self.position_embedding,
            norm_epsilon=self.norm_epsilon,
            make_block=self.make_block(),
            dtype=self.dtype,
            name="Transformer",
        )
        x = encoder(x, (rows, columns), train=train)  # float32 from here on
        x = self.pooled(x)  # [B, D]
        if self.representation_size:
            x = jnp.tanh(nn.Dense(self.representation_size, name="pre_logits")(x))
        init = nn.initializers.zeros if self.head_zero_init else nn.initializers.lecun_normal()
        return nn.Dense(self.num_classes, kernel_init=init, name="head")(x)

    def pooled(self, x: jax.Array) -> jax.Array:
        """What the head reads of the tokens, [B, N, D] -> [B, D]."""
        if self.pool == "cls":
            return x[:, 0]
        if self.pool == "gap":
            return x.mean(axis=1)
        # Sequence pooling (Hassani et al. 2021, arXiv 2104.05704, section 3.2): a mean whose weights are learned.
        weights = nn.softmax(nn.Dense(1, name="pool")(x), axis=1)  # [B, N, 1]
        return (weights * x).sum(axis=1)

    def make_block(self) -> Callable[..., nn.Module]:
        """What the blocks have in common; a block's own are its name and its drop_path."""
        block = nn.remat(EncoderBlock, static_argnums=(2, 3)) if self.remat else EncoderBlock  # 2, 3: grid, train
        return functools.partial(
            block,
            num_heads=self.num_heads,
            mlp_dim=self.mlp_dim,
            dropout=self.dropout,
            attention_dropout=self.attention_dropout,
            gelu=self.gelu,
            norm_epsilon=self.norm_epsilon,
            layer_scale=self.layer_scale,
            qk_norm=self.qk_norm,
            learned_temperature=self.learned_temperature,
            mask_self=self.mask_self,
            rotary=self.position_embedding == "rotary",
            mlp_conv=self.mlp_conv,
            dtype=self.dtype,
        )

    def check(self, height: int, width: int) -> None:
        """Raises UserError where the sizes do not fit together."""
        for field, allowed in CHOICES.items():
            if getattr(self, field) not in allowed:
                raise UserError(f"{field} is {getattr(self, field)!r}: allowed are {', '.join(allowed)}")
        p = self.patch_size
        if p < 1 or height % p or width % p or not height * width:
            sizes = f"allowed patch sizes are {divisors(math.gcd(height, width))}"
            raise UserError(f"images of {height}x{width} pixels are not divisible by patch_size {p}: {sizes}")
        if self.num_heads < 1 or self.width % self.num_heads:
            sizes = f"allowed numbers of heads are {divisors(self.width)}"
            raise UserError(f"width {self.width} is not divisible by num_heads {self.num_heads}: {sizes}")
        if self.position_embedding == "sincos2d" and self.width % 4:
            sizes = f"allowed are multiples of 4, as {self.width // 4 * 4} or {self.width // 4 * 4 + 4}"
            raise UserError(f"position_embedding sincos2d splits the width in 4, and width is {self.width}: {sizes}")
        if self.position_embedding == "rotary" and self.width // self.num_heads % 4:
            size = self.width // self.num_heads
            sizes = f"allowed are multiples of 4: set num_heads to {divisors(self.width // 4) if self.width % 4 == 0 else 1}"
            raise UserError(f"position_embedding rotary splits a head's features in 4, and it has {size}: {sizes}")
        if self.stem == "shifted" and (p < 2 or min(height, width) < 2 * p):
            raise UserError(
                f"stem shifted looks half a patch beyond each patch; images of {height}x{width} pixels in patches of {p} "
                "are too small: allowed are patch sizes from 2 to half the image"
            )
        if self.stem == "conv" and (p < 2 or p & (p - 1)):
            raise UserError(
                f"stem conv halves the image log2(patch_size) times, patch_size is {p}: allowed are 2, 4, 8, ..."
            )


def divisors(number: int) -> str:
    """1, 2, 3, 6 for 6."""
    return ", ".join(str(i) for i in range(1, number + 1) if number % i == 0)

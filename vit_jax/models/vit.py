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

A hybrid's ResNet adds its own, named in `vit_jax.models.resnet`.

Letters in the shape comments: B examples, N tokens, D width.
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
from vit_jax.models import resnet, stems
from vit_jax.models.blocks import Dropout, EncoderBlock

Dtype = Any


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
    """The parameters for the middle `smaller` x `smaller` patches of a grid of `side` x `side`: their positions."""
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
    "stem": ("patch", "conv", "shifted", "resnet"),
    "gelu": ("tanh", "exact"),
}


class VisionTransformer(nn.Module):
    """Normalised float images [B, height, width, C] -> float32 logits [B, num_classes].

    Parameters are float32 whatever `dtype` computes; norms, softmax and logits are float32 too. A training pass needs
    the rng "dropout" where a rate is above 0. `num_classes` 0: no head, what it would read comes out, [B, D].
    """

    num_classes: int
    patch_size: int  # side of a token's area in the image, pixels, whatever the stem
    width: int
    depth: int
    num_heads: int
    mlp_dim: int
    pool: str = "cls"
    position_embedding: str = "learned"
    stem: str = "patch"
    resnet_blocks: tuple[int, ...] = ()  # units in each stage of stem resnet
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
        if self.stem == "resnet":
            images = resnet.resnet(images, self.resnet_blocks, self.norm_epsilon, self.dtype)
            patch_size //= resnet.total_stride(self.resnet_blocks)
        elif self.stem != "patch":
            images, patch_size = self.make_stem()(images), 1
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
        if not self.num_classes:
            return x
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

    def make_stem(self) -> nn.Module:
        if self.stem == "conv":
            return stems.ConvStem(self.patch_size, self.width, self.norm_epsilon, self.gelu, self.dtype, name="stem")
        return stems.ShiftedPatches(self.patch_size, self.norm_epsilon, self.dtype, name="stem")

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

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of tokens that a picture becomes."""
        return height // self.patch_size, width // self.patch_size

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
        if self.position_embedding == "rotary" and self.width % (4 * self.num_heads):
            raise UserError(
                f"position_embedding rotary splits a head's features in 4, and width {self.width} / num_heads "
                f"{self.num_heads} is {self.width // self.num_heads}: allowed are multiples of 4"
            )
        if self.mask_self and self.pool != "cls" and height * width == p * p:
            raise UserError(
                "mask_self leaves the one token of a one-patch image nothing to attend to: set mask_self=False"
            )
        if self.stem == "shifted" and (p < 2 or min(height, width) < 2 * p):
            raise UserError(
                f"stem shifted looks half a patch beyond each patch: images of {height}x{width} pixels are too small "
                f"for patch_size {p}: allowed are sizes from 2 to half the image"
            )
        if self.stem == "conv" and (p < 2 or p & (p - 1)):
            raise UserError(
                f"stem conv halves the image log2(patch_size) times, patch_size is {p}: allowed are 2, 4, 8, ..."
            )
        if self.stem == "resnet":
            resnet.check(self.resnet_blocks, p)


def divisors(number: int) -> str:
    """1, 2, 3, 6 for 6."""
    return ", ".join(str(i) for i in range(1, number + 1) if number % i == 0)

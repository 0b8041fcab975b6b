"""The names under which files keep a Vision Transformer's arrays, read into this project's and written back.

Our names are those of Google's .npz files. Later Flax numbers a block's modules otherwise, big_vision keeps the
position embedding apart, and PyTorch's libraries have names and layouts of their own: one table serves both ways.
"""

import re
from collections.abc import Mapping

import numpy as np

from vit_jax.errors import UserError
from vit_jax.models.archives import Arrays, Stored

BLOCK = "Transformer/encoderblock_{i}/"
ATTENTION = BLOCK + "MultiHeadDotProductAttention_1/"
POSITIONS = "Transformer/posembed_input/pos_embedding"
# Ours, timm's, transformers'. timm keeps query, key and value as one; `#` tells which third.
TABLE = (
    ("cls", "cls_token", "vit.embeddings.cls_token"),
    (POSITIONS, "pos_embed", "vit.embeddings.position_embeddings"),
    ("embedding", "patch_embed.proj", "vit.embeddings.patch_embeddings.projection"),
    (BLOCK + "LayerNorm_0", "blocks.{i}.norm1", "vit.encoder.layer.{i}.layernorm_before"),
    (ATTENTION + "query", "blocks.{i}.attn.qkv#0", "vit.encoder.layer.{i}.attention.attention.query"),
    (ATTENTION + "key", "blocks.{i}.attn.qkv#1", "vit.encoder.layer.{i}.attention.attention.key"),
    (ATTENTION + "value", "blocks.{i}.attn.qkv#2", "vit.encoder.layer.{i}.attention.attention.value"),
    (ATTENTION + "out", "blocks.{i}.attn.proj", "vit.encoder.layer.{i}.attention.output.dense"),
    (BLOCK + "LayerNorm_2", "blocks.{i}.norm2", "vit.encoder.layer.{i}.layernorm_after"),
    (BLOCK + "MlpBlock_3/Dense_0", "blocks.{i}.mlp.fc1", "vit.encoder.layer.{i}.intermediate.dense"),
    (BLOCK + "MlpBlock_3/Dense_1", "blocks.{i}.mlp.fc2", "vit.encoder.layer.{i}.output.dense"),
    ("Transformer/encoder_norm", "norm", "vit.layernorm"),
    ("pre_logits", "pre_logits.fc", "vit.pooler.dense"),
    ("head", "head", "classifier"),
)
SCHEMES = ("official", "timm", "transformers")
# How later Flax numbers the modules of a block.
LINEN = {"MultiHeadDotProductAttention_0": "MultiHeadDotProductAttention_1", "LayerNorm_1": "LayerNorm_2"}
LINEN |= {"MlpBlock_0": "MlpBlock_3"}


def table(scheme: str, depth: int) -> dict[str, str]:
    """Our name of each array of a model of `depth` blocks → "timm"'s or "transformers"' name."""
    column = SCHEMES.index(scheme)
    names = {}
    for row in TABLE:
        ours, theirs = row[0], row[column]
        leaves = {"scale": "weight", "bias": "bias"} if "norm" in ours.lower() else {"kernel": "weight", "bias": "bias"}
        for i in range(depth) if "{i}" in ours else [0]:
            if ours in ("cls", POSITIONS):
                names[ours] = theirs
                continue
            for leaf, their_leaf in leaves.items():
                layer, _, third = theirs.format(i=i).partition("#")
                names[f"{ours.format(i=i)}/{leaf}"] = f"{layer}.{their_leaf}" + (third and f"#{third}")
    return names


# Reading


def recognized(arrays: Arrays) -> tuple[str, dict[str, Stored]]:
    """The scheme of a file's names, and its arrays under ours, in our layout but for merged heads (`merged`).

    Arrays that are none of a ViT's keep the file's names.

    Raises:
      UserError: the names are not those of a Vision Transformer.
    """
    if "embedding/kernel" in arrays or "params/embedding/kernel" in arrays:
        return "official", _from_flax(arrays)
    if "patch_embed.proj.weight" in arrays:
        return "timm", _from_torch("timm", arrays)
    bare = "embeddings.patch_embeddings.projection.weight"
    if bare in arrays:  # a model without a head has no prefix
        arrays = {f"vit.{name}": stored for name, stored in arrays.items()}
    if f"vit.{bare}" in arrays:
        return "transformers", _from_torch("transformers", arrays)
    some = ", ".join(sorted(arrays)[:4]) or "nothing"
    raise UserError(f"it holds no Vision Transformer that is known here, but {some}{', ...' * (len(arrays) > 4)}")


def _from_flax(arrays: Arrays) -> dict[str, Stored]:
    linen = any("/MultiHeadDotProductAttention_0/" in name for name in arrays)

    def ours(name: str) -> str:
        name = name.removeprefix("params/")
        if linen:
            name = "/".join(LINEN.get(part, part) for part in name.split("/"))
        return POSITIONS if name == "pos_embedding" else name

    return _collected([(ours(name), _flat(name, stored)) for name, stored in arrays.items()])


def _collected(pairs: list[tuple[str, Stored]]) -> dict[str, Stored]:
    found: dict[str, Stored] = {}
    for name, stored in pairs:
        if name in found:
            raise UserError(f"it holds two arrays for {name}: it mixes the names of several kinds of files")
        found[name] = stored
    return found


def _flat(name: str, stored: Stored) -> Stored:
    """Old files keep a group norm's scale and bias as [1, 1, 1, C]."""
    if re.search(r"(^|/)gn\w*/(scale|bias)$", name) and stored.shape[:3] == (1, 1, 1) and len(stored.shape) == 4:
        return Stored(stored.shape[3:], lambda: stored.read().reshape(-1))
    return stored


def _from_torch(scheme: str, arrays: Arrays) -> dict[str, Stored]:
    depth = 1 + max((int(i) for name in arrays for i in re.findall(r"(?:blocks|layer)\.(\d{1,3})\.", name)), default=-1)
    found, used = [], set()
    for ours, theirs in table(scheme, depth).items():
        name, _, third = theirs.partition("#")
        if name in arrays:
            found.append((ours, _our_layout(name, arrays[name], int(third) if third else None)))
            used.add(name)
    return _collected(found + [(name, stored) for name, stored in arrays.items() if name not in used])


def _our_layout(name: str, stored: Stored, third: int | None) -> Stored:
    """PyTorch's matrices are [out, in], its convolutions [out, in, height, width]."""
    shape = stored.shape
    rows = slice(None)
    if third is not None:
        if not shape or shape[0] % 3:
            raise UserError(f"{name} has shape {shape}: query, key and value are no thirds of it")
        size = shape[0] // 3
        rows, shape = slice(third * size, (third + 1) * size), (size, *shape[1:])
    axes = {4: (2, 3, 1, 0), 2: (1, 0)}.get(len(shape), tuple(range(len(shape))))
    return Stored(tuple(shape[a] for a in axes), lambda: stored.read()[rows].transpose(axes))


def merged(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of our array `name` where heads are not told apart: [D, H, D/H] → [D, D]."""
    if re.search(r"/(query|key|value)/kernel$", name):
        return (shape[0], shape[1] * shape[2])
    if re.search(r"/(query|key|value)/bias$", name):
        return (shape[0] * shape[1],)
    if re.search(r"/MultiHeadDotProductAttention_1/out/kernel$", name):
        return (shape[0] * shape[1], shape[2])
    return shape


# Writing


def renamed(params: Mapping[str, np.ndarray], scheme: str) -> dict[str, np.ndarray]:
    """Our arrays under the names and in the layout of "timm" or "transformers" ("official": as they are).

    Raises:
      UserError: they have no name for an array.
    """
    if scheme == "official":
        return dict(params)
    names = table(scheme, sum(name.endswith("/LayerNorm_0/scale") for name in params))
    if unknown := sorted(params.keys() - names.keys()):
        raise UserError(f"{scheme} has no name for {', '.join(unknown[:4])}: only plain Vision Transformers go there")
    thirds: dict[str, list[np.ndarray]] = {}
    for ours in (name for name in names if name in params):  # the table's order: query, key, value
        array = np.asarray(params[ours])
        array = array.reshape(merged(ours, array.shape))
        array = array.transpose({4: (3, 2, 0, 1), 2: (1, 0)}.get(array.ndim, range(array.ndim)))
        thirds.setdefault(names[ours].partition("#")[0], []).append(array)
    return {name: np.concatenate(arrays) if len(arrays) > 1 else arrays[0] for name, arrays in thirds.items()}

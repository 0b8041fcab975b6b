"""Weights of other models for this one: the official .npz, PyTorch's .safetensors, or another run's.

Names are matched strictly; what may differ is the head, the grid of the position embedding and, if asked, the patch.
"""

import contextlib
import dataclasses
import json
import math
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO

import jax
import numpy as np

from vit_jax.errors import UserError
from vit_jax.models import archives, names
from vit_jax.models.archives import Arrays
from vit_jax.models.names import POSITIONS, merged
from vit_jax.models.presets import size_named

HEAD = ("head/kernel", "head/bias")
MOST_POSITIONS = 2**20  # tokens of a position embedding that is worth resizing
LARGEST_PATCH = 256  # pixels
LARGEST_JSON = 2**24  # bytes
SHOWN = 8  # names of each kind in an error


@dataclasses.dataclass(frozen=True)
class Facts:
    """How weights were made, as far as their file says or its kind implies: what a model must do alike.

    Attributes:
      mean, std: of the inputs, a number a channel, or one for all; empty where they are not known.
      num_heads, position_embedding, mask_self: as of the model; None where they are not known.
    """

    norm_epsilon: float
    gelu: str
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    num_heads: int | None = None
    position_embedding: str | None = None
    mask_self: bool | None = None


# What each kind of file implies. The official models see every channel in [-1, 1]; timm's and transformers' vary.
KINDS = {
    "official": Facts(1e-6, "tanh", (0.5,), (0.5,)),
    "timm": Facts(1e-6, "exact"),
    "transformers": Facts(1e-12, "exact"),
}
GELUS = {"gelu": "exact", "gelu_python": "exact", "gelu_pytorch_tanh": "tanh", "gelu_new": "tanh", "gelu_fast": "tanh"}


@dataclasses.dataclass(frozen=True)
class Source:
    """Weights to start from: arrays under our names, `heads_merged` where heads are not told apart in their shapes.

    Attributes:
      class_names: what the head tells apart, where that is known.
    """

    name: str
    arrays: Arrays
    facts: Facts
    kind: str = "official"
    class_names: tuple[str, ...] = ()

    @property
    def heads_merged(self) -> bool:
        return self.kind != "official"


@contextlib.contextmanager
def opened(path: pathlib.Path) -> Iterator[Source]:
    """The weights in a .npz or .safetensors file, or in a folder with a model.safetensors as transformers saves it.

    Raises:
      UserError: there is no such file, it is damaged, or it holds no Vision Transformer.
    """
    if path.is_dir():
        path = path / "model.safetensors"
    with archives.opened(path) as (arrays, metadata):
        try:
            kind, arrays = names.recognized(arrays)
        except UserError as error:
            raise UserError(f"{path}: {error}") from error
        yield Source(str(path), arrays, _facts(path, kind, metadata), kind)


# What a file says of itself


def _facts(path: pathlib.Path, kind: str, metadata: Mapping[str, Any]) -> Facts:
    """From the file's own metadata, or the config.json and preprocessor_config.json that PyTorch's libraries keep."""
    said = dict(metadata) or ({} if kind == "official" else _said_beside(path))
    read: dict[str, Callable[[Any], Any]] = {
        "norm_epsilon": float,
        "gelu": lambda name: {"exact": "exact", "tanh": "tanh"}[name],
        "mean": lambda numbers: tuple(map(float, numbers)),
        "std": lambda numbers: tuple(map(float, numbers)),
        "num_heads": int,
        "position_embedding": str,
        "mask_self": bool,
    }
    facts: dict[str, Any] = {}
    for name, convert in read.items():
        if said.get(name) is not None:
            try:
                facts[name] = convert(said[name])
            except (TypeError, ValueError, KeyError, OverflowError) as error:
                raise UserError(
                    f"{path} or a config.json beside it says that {name} is {said[name]!r}: mend or remove what says so"
                ) from error
    return dataclasses.replace(KINDS[kind], **facts)


def _said_beside(path: pathlib.Path) -> dict[str, Any]:
    """What transformers' and timm's JSON files in the folder of a file of weights say."""
    model, inputs = (_beside(path, name) for name in ("config.json", "preprocessor_config.json"))
    timm = model.get("pretrained_cfg", model)
    timm = timm if isinstance(timm, dict) else {}
    act = model.get("hidden_act")
    return {
        "norm_epsilon": model.get("layer_norm_eps"),
        "gelu": GELUS.get(act, act) if isinstance(act, str) else act,
        "mean": inputs.get("image_mean", timm.get("mean")),
        "std": inputs.get("image_std", timm.get("std")),
        "num_heads": model.get("num_attention_heads"),
    }


def _beside(path: pathlib.Path, name: str) -> dict[str, Any]:
    """A JSON file in the weights' folder; empty where there is none."""
    found = path.parent / name
    if not found.exists():
        return {}
    try:
        if not found.is_file() or found.stat().st_size > LARGEST_JSON:
            raise ValueError("it is no file of some kilobytes")
        values = json.loads(found.read_text())
    except (ValueError, OSError, RecursionError) as error:
        raise UserError(f"{found} is damaged ({error}): mend it, or move it away") from error
    return values if isinstance(values, dict) else {}


# Fitting weights to a model


def fit(
    source: Source,
    like: Mapping[str, jax.ShapeDtypeStruct],
    grid: tuple[int, int],
    *,
    skip: Sequence[str] = (),
    resample_patches: bool = False,
    whole: bool = False,
) -> tuple[dict[str, jax.Array], list[str]]:
    """The parameters of a model that come from `source`, placed as `like` says, and lines that tell what was changed.

    Every parameter of `like` (path → shape and sharding) comes from the source, but for those that a regex of `skip`
    allows to be new, and the head where the number of classes is another one. Arrays are read one at a time.

    Args:
      grid: rows and columns of the model's patches.
      skip: regexes, searched in a path: parameters that stay new, and arrays of the source that are left out.
      resample_patches: whether a patch embedding of another patch size may be resampled (FlexiViT).
      whole: whether nothing may be new, the head included.

    Raises:
      UserError: an array is missing, is of no use or has another shape (all are named), or a regex matches nothing.
    """
    skipped = _skipped(skip, {*source.arrays, *like})
    if whole and (new := sorted(skipped & like.keys())):
        raise UserError(f"init.skip leaves out {_some(new)}, without which nothing can be measured: take it away")
    arrays = {name: stored for name, stored in source.arrays.items() if name not in skipped}
    wanted = {name: leaf for name, leaf in like.items() if name not in skipped}
    wanted, left_out, notes = _without_head(arrays, wanted, whole)
    arrays = {name: stored for name, stored in arrays.items() if name not in left_out}
    _check(source, arrays, wanted, resample_patches)
    notes += _check_heads(source, wanted)

    params: dict[str, jax.Array] = {}
    for name, leaf in wanted.items():
        array = arrays[name].read()
        if name == POSITIONS:
            array, changes = fitted_positions(array, grid, leaf.shape[1] - math.prod(grid))
            notes += changes
        elif name == "embedding/kernel" and array.shape != leaf.shape:
            notes.append(f"patches resampled from {array.shape[0]} to {leaf.shape[0]} pixels")
            array = resampled_patches(array, leaf.shape[:2])
        array = array.reshape(leaf.shape)
        params[name] = jax.make_array_from_callback(leaf.shape, leaf.sharding, array.__getitem__)
    if not params:
        raise UserError(f"init.skip leaves nothing of {source.name} to start from: take some of it away")
    if new := sorted(like.keys() - params.keys() - set(HEAD)):
        notes.append(f"new: {_some(new)}")
    if skipped_there := sorted(skipped & source.arrays.keys()):
        notes.append(f"left out: {_some(skipped_there)}")
    return params, notes


def _without_head(
    arrays: Arrays, wanted: Mapping[str, Any], whole: bool
) -> tuple[dict[str, Any], list[str], list[str]]:
    """What is still wanted, which arrays are left out, and lines that say so, where the head starts new."""
    drops_layer = "pre_logits/kernel" in arrays and "pre_logits/kernel" not in wanted
    if drops_layer and whole:
        width = arrays["pre_logits/kernel"].shape[-1]
        raise UserError(f"the head there reads a pre_logits layer: set model.representation_size={width}")
    left_out = ["pre_logits/kernel", "pre_logits/bias"] if drops_layer else []
    notes = ["pre_logits is left out (model.representation_size is 0)"] if drops_layer else []
    if HEAD[1] not in wanted:
        return dict(wanted), left_out, notes
    classes = arrays[HEAD[1]].shape[0] if HEAD[1] in arrays and arrays[HEAD[1]].shape else "no"
    if whole or classes == wanted[HEAD[1]].shape[0] and not drops_layer:
        return dict(wanted), left_out, notes + [f"the head comes along: {classes} classes"]
    notes.append(f"the head is new: there are {classes} classes in it")
    return {n: leaf for n, leaf in wanted.items() if n not in HEAD}, left_out + list(HEAD), notes


def _check_heads(source: Source, wanted: Mapping[str, Any]) -> list[str]:
    """Where heads are not told apart by shapes, their number is the file's; else it is said that nobody knows."""
    queries = [leaf.shape for name, leaf in wanted.items() if name.endswith("/query/kernel")]
    if not (source.heads_merged and queries):
        return []
    there, here = source.facts.num_heads, queries[0][1]
    if there is None:
        return [f"the file does not say how many heads it has: they are taken to be {here}"]
    if there != here:
        raise UserError(f"the weights in {source.name} have {there} heads: set model.num_heads={there}, not {here}")
    return []


def _skipped(skip: Sequence[str], paths: set[str]) -> set[str]:
    found: set[str] = set()
    for pattern in skip:
        try:
            matches = {path for path in paths if re.search(pattern, path)}
        except (re.error, OverflowError, RecursionError) as error:
            raise UserError(f"init.skip: {pattern!r} is not a regex ({error}): correct it") from error
        if not matches:
            raise UserError(
                f"init.skip: {pattern!r} matches no parameter and no array of the weights, as {_some(sorted(paths))}"
            )
        found |= matches
    return found


def _check(source: Source, arrays: Arrays, wanted: Mapping[str, Any], resample_patches: bool) -> None:
    """Raises UserError with all that is missing, surplus or misshapen."""
    missing = [name for name in wanted if name not in arrays]
    surplus = [name for name in arrays if name not in wanted]
    misshapen = []
    for name in (name for name in wanted if name in arrays):
        there, here = arrays[name].shape, tuple(wanted[name].shape)
        same = there == (merged(name, here) if source.heads_merged else here)
        positions = name == POSITIONS and len(there) == 3 and there[::2] == here[::2] and there[1] <= MOST_POSITIONS
        patches = name == "embedding/kernel" and len(there) == 4 and there[2:] == here[2:]
        patches = patches and 0 < there[0] == there[1] <= LARGEST_PATCH
        if not (same or positions or (patches and resample_patches)):
            hint = " (init.resample_patches=True resamples it)" if patches else ""
            misshapen.append(f"{name} is {there} there and {here} here{hint}")
    wrong = [f"{len(missing)} arrays are missing there: {_some(missing)}"] if missing else []
    wrong += [f"{len(surplus)} arrays have no place here: {_some(surplus)}"] if surplus else []
    wrong += [f"{len(misshapen)} have another shape: {_some(misshapen)}"] if misshapen else []
    if wrong:
        looks = variant({name: stored.shape for name, stored in arrays.items()})
        looks = None if looks == variant({name: leaf.shape for name, leaf in wanted.items()}) else looks
        looks = f"; this looks like {looks}: set model.preset or the model's sizes to it" if looks and misshapen else ""
        remedy = "" if misshapen else "; init.skip takes regexes of what may be new or left out"
        raise UserError(f"the weights in {source.name} do not fit this model: {'; '.join(wrong)}{looks}{remedy}")


def _some(texts: Sequence[str]) -> str:
    more = f" and {len(texts) - SHOWN} more" if len(texts) > SHOWN else ""
    return ", ".join(texts[:SHOWN]) + more


def variant(shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """What weights plainly are, "L/16" as a rule, from their shapes; None where they are no ViT of patches."""
    kernel = shapes.get("embedding/kernel", ())
    mlp = shapes.get("Transformer/encoderblock_0/MlpBlock_3/Dense_0/kernel", ())
    if len(kernel) != 4 or len(mlp) != 2:
        return None
    query = shapes.get("Transformer/encoderblock_0/MultiHeadDotProductAttention_1/query/kernel", ())
    heads = query[1] if len(query) == 3 else None
    depth = sum(name.endswith("/MlpBlock_3/Dense_0/kernel") for name in shapes)
    size = size_named(width=kernel[3], depth=depth, num_heads=heads, mlp_dim=mlp[1])
    if size and "conv_root/kernel" not in shapes:
        return f"{size}/{kernel[0]}"
    stem = " behind a ResNet" if "conv_root/kernel" in shapes else ""
    return f"width {kernel[3]}, depth {depth}, mlp_dim {mlp[1]}, patches of {kernel[0]}{stem}"


# Position embeddings and patches of another size


def fitted_positions(table: np.ndarray, grid: tuple[int, int], slots: int) -> tuple[np.ndarray, list[str]]:
    """A position embedding [1, N, D] for another grid, with `slots` (0 or 1) for the class token; and what was done.

    The table's own grid is square, with a slot for the class token before it or (as in big_vision) none: then that
    token's is zero. Another table must have the right number of tokens.

    Raises:
      UserError: it has not, and its grid is not square.
    """
    tokens = table.shape[1]
    side = math.isqrt(tokens)
    there = tokens - side**2  # slots
    if there > 1 or side == 0:
        if tokens == slots + math.prod(grid):
            return table, []
        raise UserError(f"{POSITIONS} has {tokens} tokens, which are no square grid: it cannot be resized")
    changes = [] if grid == (side, side) else [f"resized from {side}x{side} to {grid[0]}x{grid[1]}"]
    if there != slots:
        changes.append("with a slot of zeros for the class token" if slots else "without the class token's slot")
    if not changes:
        return table, []
    patches = resized_positions(table[:, there:].reshape(side, side, -1), grid)
    cls = table[:, :there] if there else np.zeros_like(table[:, :1])
    table = np.concatenate([cls[:, :slots], patches.reshape(1, -1, table.shape[2])], axis=1)
    return table, [f"position embedding {', '.join(changes)}"]


def resized_positions(table: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """[h, w, D] → [*grid, D], bilinear from corner to corner, as the official code's `scipy.ndimage.zoom`, order 1."""
    rows, columns = (_corner_to_corner(new, old) for new, old in zip(grid, table.shape[:2], strict=True))
    resized = np.einsum("ih,jw,hwd->ijd", rows, columns, table.astype(np.float64))
    return resized.astype(table.dtype)


def _corner_to_corner(new: int, old: int) -> np.ndarray:
    """The matrix [new, old] of linear interpolation in which the first and the last points stay where they are."""
    places = np.linspace(0, old - 1, new)
    return np.maximum(0, 1 - np.abs(places[:, None] - np.arange(old)))


def resampled_patches(kernel: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """A patch embedding's kernel [P, P, C, D] for patches of another `shape` (FlexiViT, arXiv 2212.08013, section 3.4).

    Where patches grow, resized patches give the very tokens that the old ones gave; else the nearest there are.
    """
    resize = [
        np.asarray(jax.image.resize(np.eye(old), (new, old), "linear", antialias=False), np.float64)
        for new, old in zip(shape, kernel.shape[:2], strict=True)
    ]
    rows, columns = (np.linalg.pinv(matrix.T) for matrix in resize)  # [new, old]
    return np.einsum("ip,jq,pqcd->ijcd", rows, columns, kernel.astype(np.float64)).astype(kernel.dtype)


# Writing


def write(file: BinaryIO, arrays: Mapping[str, np.ndarray], format: str, facts: Facts) -> None:
    """Writes arrays, named and laid out as `names.renamed` does, as an "npz" or "safetensors" file."""
    writer = {"npz": archives.write_npz, "safetensors": archives.write_safetensors}[format]
    writer(file, arrays, dataclasses.asdict(facts))

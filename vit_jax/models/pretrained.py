"""Weights of other models for this one: the official .npz, PyTorch's .safetensors, or another run's.

Names are matched strictly; what may differ is the head, the grid of the position embedding and, if asked, the patch.
"""

import contextlib
import dataclasses
import json
import math
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence
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
SHOWN = 8  # names of each kind in an error


@dataclasses.dataclass(frozen=True)
class Facts:
    """How weights were made, as far as their file says or its kind implies: what a model must do alike.

    Attributes:
      mean, std: of the inputs, a number a channel; empty where they are not known.
    """

    norm_epsilon: float
    gelu: str
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()


# What each kind of file implies. The official models see every channel in [-1, 1]; timm's and transformers' vary.
KINDS = {
    "official": Facts(1e-6, "tanh", (0.5,), (0.5,)),
    "timm": Facts(1e-6, "exact"),
    "transformers": Facts(1e-12, "exact"),
}
GELUS = {"gelu": "exact", "gelu_new": "tanh", "gelu_pytorch_tanh": "tanh", "gelu_fast": "tanh"}


@dataclasses.dataclass(frozen=True)
class Source:
    """Weights to start from: arrays under our names, `heads_merged` where heads are not told apart in their shapes."""

    name: str
    arrays: Arrays
    facts: Facts
    kind: str = "official"

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
        first = arrays.get("conv_root/kernel") or arrays.get("embedding/kernel")
        channels = first.shape[2] if first and len(first.shape) == 4 else 1
        yield Source(str(path), arrays, _facts(path, kind, metadata, channels), kind)


# What a file says of itself


def _facts(path: pathlib.Path, kind: str, metadata: Mapping[str, Any], channels: int) -> Facts:
    """From the file's own metadata, or the config.json and preprocessor_config.json that PyTorch's libraries keep."""
    facts = KINDS[kind]
    if kind == "official":
        facts = dataclasses.replace(facts, mean=facts.mean * channels, std=facts.std * channels)
        said = metadata
    else:
        model, inputs = (_beside(path, name) for name in ("config.json", "preprocessor_config.json"))
        timm = model.get("pretrained_cfg", model) if isinstance(model.get("pretrained_cfg", model), dict) else {}
        said = {
            "norm_epsilon": model.get("layer_norm_eps"),
            "gelu": GELUS.get(str(model.get("hidden_act"))),
            "mean": inputs.get("image_mean", timm.get("mean")),
            "std": inputs.get("image_std", timm.get("std")),
        } | dict(metadata)
    try:
        changes: dict[str, Any] = {
            "norm_epsilon": said.get("norm_epsilon") and float(said["norm_epsilon"]),
            "gelu": said["gelu"] if said.get("gelu") in ("tanh", "exact") else None,
            "mean": tuple(float(x) for x in said.get("mean") or ()),
            "std": tuple(float(x) for x in said.get("std") or ()),
        }
    except (TypeError, ValueError) as error:
        raise UserError(f"{path} or the config.json beside it says {error}: mend or remove what it says") from error
    return dataclasses.replace(facts, **{name: value for name, value in changes.items() if value})


def _beside(path: pathlib.Path, name: str) -> dict[str, Any]:
    """A JSON file in the weights' folder; empty where there is none."""
    try:
        values = json.loads((path.parent / name).read_text())
    except FileNotFoundError:
        return {}
    except (ValueError, OSError) as error:
        raise UserError(f"{path.parent / name} is damaged ({error}): mend it, or move it away") from error
    return values if isinstance(values, dict) else {}


# Fitting weights to a model


def fit(
    source: Source,
    like: Mapping[str, jax.ShapeDtypeStruct],
    grid: tuple[int, int],
    *,
    skip: Sequence[str] = (),
    resample_patches: bool = False,
    keep_head: bool = False,
) -> tuple[dict[str, jax.Array], list[str]]:
    """The parameters of a model that come from `source`, placed as `like` says, and lines that tell what was changed.

    Every parameter of `like` (path → shape and sharding) comes from the source, but for those that a regex of `skip`
    allows to be new, and the head where the number of classes is another one. Arrays are read one at a time.

    Args:
      grid: rows and columns of the model's patches.
      skip: regexes, searched in a path: parameters that stay new, and arrays of the source that are left out.
      resample_patches: whether a patch embedding of another patch size may be resampled (FlexiViT).
      keep_head: whether the head must come from the source.

    Raises:
      UserError: an array is missing, is of no use or has another shape (all are named), or a regex matches nothing.
    """
    skipped = _skipped(skip, {*source.arrays, *like})
    arrays = {name: stored for name, stored in source.arrays.items() if name not in skipped}
    wanted = {name: leaf for name, leaf in like.items() if name not in skipped}
    notes, left_out = [], []
    head = [arrays[name].shape if name in arrays else None for name in HEAD]
    if not keep_head and head[1] != wanted.get(HEAD[1], np.zeros(())).shape:
        classes = head[1][0] if head[1] else "no"
        notes += [f"the head is new: there are {classes} classes in it"] if HEAD[1] in wanted else []
        left_out += [name for name in HEAD if name in arrays]
        wanted = {name: leaf for name, leaf in wanted.items() if name not in HEAD}
    if "pre_logits/kernel" not in like and "pre_logits/kernel" in arrays:
        left_out += ["pre_logits/kernel", "pre_logits/bias"]
        notes.append("pre_logits is left out (model.representation_size is 0)")
    arrays = {name: stored for name, stored in arrays.items() if name not in left_out}
    _check(source, arrays, wanted, resample_patches)

    params = {}
    for name, leaf in wanted.items():
        array = arrays[name].read()
        if name == POSITIONS and array.shape != leaf.shape:
            array, note = fitted_positions(array, grid, leaf.shape[1] - math.prod(grid))
            notes.append(note)
        elif name == "embedding/kernel" and array.shape != leaf.shape:
            notes.append(f"patches resampled from {array.shape[0]} to {leaf.shape[0]} pixels")
            array = resampled_patches(array, leaf.shape[:2])
        params[name] = jax.device_put(array.reshape(leaf.shape), leaf.sharding)
    if new := sorted(like.keys() - params.keys() - set(HEAD)):
        notes.append(f"new: {_some(new)}")
    if skipped_there := sorted(skipped & source.arrays.keys()):
        notes.append(f"left out: {_some(skipped_there)}")
    return params, notes


def _skipped(skip: Sequence[str], paths: set[str]) -> set[str]:
    found: set[str] = set()
    for pattern in skip:
        try:
            matches = {path for path in paths if re.search(pattern, path)}
        except re.error as error:
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
        patches = name == "embedding/kernel" and len(there) == 4 and there[2:] == here[2:] and there[0] == there[1] > 0
        if not (same or positions or (patches and resample_patches)):
            hint = " (init.resample_patches=True resamples it)" if patches else ""
            misshapen.append(f"{name} is {there} there and {here} here{hint}")
    wrong = [f"{len(missing)} arrays are missing there: {_some(missing)}"] if missing else []
    wrong += [f"{len(surplus)} arrays have no place here: {_some(surplus)}"] if surplus else []
    wrong += [f"{len(misshapen)} have another shape: {_some(misshapen)}"] if misshapen else []
    if wrong:
        looks = variant(arrays)
        looks = f"; this looks like {looks}: set model.preset or the model's sizes to it" if looks and misshapen else ""
        remedy = "" if misshapen else "; init.skip takes regexes of what may be new or left out"
        raise UserError(f"the weights in {source.name} do not fit this model: {'; '.join(wrong)}{looks}{remedy}")


def _some(texts: Sequence[str]) -> str:
    more = f" and {len(texts) - SHOWN} more" if len(texts) > SHOWN else ""
    return ", ".join(texts[:SHOWN]) + more


def variant(arrays: Arrays) -> str | None:
    """What a file plainly is, "L/16" as a rule, from its shapes; None where it is no ViT of patches."""
    shapes = {name: stored.shape for name, stored in arrays.items()}
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


def fitted_positions(table: np.ndarray, grid: tuple[int, int], slots: int) -> tuple[np.ndarray, str]:
    """A position embedding [1, N, D] for another grid, with `slots` (0 or 1) for the class token; and what was done.

    The table's own grid is square, with a slot for the class token before it or (as in big_vision) none: then that
    token's is zero.

    Raises:
      UserError: its grid is not square.
    """
    tokens = table.shape[1]
    side = math.isqrt(tokens)
    there = tokens - side**2  # slots
    if there > 1 or side == 0:
        raise UserError(f"{POSITIONS} has {tokens} tokens, which are no square grid: it cannot be resized")
    patches = resized_positions(table[:, there:].reshape(side, side, -1), grid)
    cls = table[:, :there] if there else np.zeros_like(table[:, :1])
    changes = [] if grid == (side, side) else [f"resized from {side}x{side} to {grid[0]}x{grid[1]}"]
    if there != slots:
        changes.append("with a slot of zeros for the class token" if slots else "without the class token's slot")
    note = f"position embedding {', '.join(changes)}"
    return np.concatenate([cls[:, :slots], patches.reshape(1, -1, table.shape[2])], axis=1), note


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


def write(file: BinaryIO, params: Mapping[str, np.ndarray], format: str, scheme: str, facts: Facts) -> None:
    """Writes parameters (path → array) as an "npz" or "safetensors" file under the names of a scheme.

    Raises:
      UserError: the scheme has no name for a parameter.
    """
    writer = {"npz": archives.write_npz, "safetensors": archives.write_safetensors}[format]
    writer(file, names.renamed(params, scheme), dataclasses.asdict(facts))

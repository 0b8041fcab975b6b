"""Devices: the mesh, and where arrays lie on it.

The mesh has two axes. A batch is cut along "data"; matrices can be cut along "model" (tensor parallelism, Shoeybi et
al. 2019, arXiv 1909.08053: attention by head, the MLP by hidden unit), and all of the state along "data" besides (FSDP;
ZeRO, Rajbhandari et al. 2020, arXiv 1910.02054, stage 3).
"""

import os
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from vit_jax.errors import UserError
from vit_jax.training.rules import match_rules

# (regex on a parameter's path, which of its axes lies along "model"; None: none); the first match wins. Optimizers keep
# what they know of a parameter under its name, so the rules are theirs too.
MODEL_RULES = [
    (r"/(query|key|value)/kernel$", 1),  # [D, H, D / H]
    (r"/(query|key|value)/bias$", 0),  # [H, D / H]
    (r"/MultiHeadDotProductAttention_1/out/kernel$", 0),  # [H, D / H, D]
    (r"/MlpBlock_3/Dense_0/kernel$", 1),  # [D, M]
    (r"/MlpBlock_3/Dense_0/bias$", 0),  # [M]
    (r"/MlpBlock_3/Dense_1/kernel$", 0),  # [M, D]
    (r".*", None),
]


def enable_compilation_cache() -> None:
    """Keeps compiled programs in the user's own cache directory, so that a second start compiles nothing.

    The cache holds executable code, so it must not be shared with people one does not trust.
    $JAX_COMPILATION_CACHE_DIR moves it and JAX_ENABLE_COMPILATION_CACHE=false turns it off (both are jax's own).
    """
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "xla"))


def cache_folder() -> pathlib.Path:
    """The user's own folder for what can be made or fetched again."""
    return pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "vit_jax"


def make_mesh(data: int, model: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh of `data` x `model` devices (data of -1: as many as there are) along the axes "data" and "model".

    Args:
      devices: to choose from; None: those of all processes, each of which must have one in the mesh.

    Raises:
      UserError: there are not as many devices.
    """
    everywhere = devices is None
    devices = jax.devices() if devices is None else devices
    there = f"there are {len(devices)} devices ({devices[0].device_kind})"
    if data == -1:
        if len(devices) % model:
            raise UserError(f"mesh.model={model} does not divide what is there: {there}")
        data = len(devices) // model
    asked = f"mesh.data={data}" + (f", mesh.model={model}" if model > 1 else "")
    if data * model > len(devices):
        raise UserError(f"{asked}, but {there}")
    devices = devices[: data * model]
    if everywhere and len({device.process_index for device in devices}) < jax.process_count():
        raise UserError(f"{asked} leaves processes without a device: {there}")
    axes = AxisType.Auto, AxisType.Auto
    return jax.make_mesh((data, model), ("data", "model"), axis_types=axes, devices=devices)


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def batch_sharded(mesh: Mesh) -> NamedSharding:
    """Sharding of an array whose first axis is the batch."""
    return NamedSharding(mesh, PartitionSpec("data"))


def second_axis_sharded(mesh: Mesh) -> NamedSharding:
    """Sharding of an array whose second axis is the batch: of its parts, or of many batches."""
    return NamedSharding(mesh, PartitionSpec(None, "data"))


def shardings(tree: Any, mesh: Mesh, fsdp: bool = False) -> Any:
    """The tree of the shardings of parameters, or of a state with them: of arrays or of their shapes.

    Args:
      fsdp: whether each device of "data" keeps a part of what is not cut along "model".
    """

    def sharding(x, axis):
        axes: list[str | None] = [None] * x.ndim
        if axis is not None:
            axes[axis] = "model"
        # The longest axis that can be cut, so that as little as possible stays whole.
        free = [i for i, n in enumerate(x.shape) if axes[i] is None and n % mesh.shape["data"] == 0]
        if fsdp and free:
            axes[max(free, key=lambda i: x.shape[i])] = "data"
        return NamedSharding(mesh, PartitionSpec(*axes))

    return jax.tree.map(sharding, tree, match_rules(MODEL_RULES, tree))


def with_sharding(shapes: Any, mesh: Mesh, fsdp: bool = False) -> Any:
    """The tree of `jax.ShapeDtypeStruct` with the sharding that its arrays shall have."""
    placed = shardings(shapes, mesh, fsdp)
    return jax.tree.map(lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), shapes, placed)


def constrained(tree: Any, mesh: Mesh, fsdp: bool = False) -> Any:
    """Within a program: the tree, lying as `shardings` says."""
    return lax.with_sharding_constraint(tree, shardings(tree, mesh, fsdp))


def place(tree: Any, mesh: Mesh, sharding: NamedSharding | None = None) -> Any:
    """Puts host arrays, the same in all processes, on the devices: replicated, or as `sharding` says."""
    where = sharding or replicated(mesh)

    def one(x: Any) -> jax.Array:
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, where, lambda index: x[index])

    return jax.tree.map(one, tree)


def own_rows(batch_size: int, mesh: Mesh) -> np.ndarray:
    """Which rows of a batch lie on this process's devices, sorted: on a pod not always one after the other."""
    cuts = second_axis_sharded(mesh).addressable_devices_indices_map((1, batch_size)).values()
    return np.unique(np.concatenate([np.arange(batch_size)[cut[1]] for cut in cuts if cut is not None]))


def place_batches(tree: Any, batch_size: int, mesh: Mesh) -> Any:
    """Puts host arrays on the devices: of batches [T, B, ...] the `own_rows` of each, which its devices share."""
    rows = own_rows(batch_size, mesh)

    def put(x):
        def shard(index):
            start, stop, _ = index[1].indices(batch_size)
            first = np.searchsorted(rows, start)
            return x[:, first : first + stop - start]

        return jax.make_array_from_callback((len(x), batch_size, *x.shape[2:]), second_axis_sharded(mesh), shard)

    return jax.tree.map(put, tree)


def memory_bytes(mesh: Mesh) -> int:
    """The memory of a device; 16 GiB where it does not say how much that is."""
    return (mesh.local_devices[0].memory_stats() or {}).get("bytes_limit", 16 * 2**30)


def place_examples(tree: Any, mesh: Mesh) -> Any:
    """Puts host arrays on the devices, each of which gets an equal share of their examples, the first axis.

    The last example is repeated until they can be shared.
    """

    def shared(x):
        share = -(-len(x) // mesh.shape["data"])

        def shard(index):
            part = x[index]  # all of `x` may be more than memory holds
            missing = share - len(part)
            return np.concatenate([part, np.repeat(x[-1:], missing, axis=0)]) if missing else part

        return jax.make_array_from_callback((share * mesh.shape["data"], *x.shape[1:]), batch_sharded(mesh), shard)

    return jax.tree.map(shared, tree)

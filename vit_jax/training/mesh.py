"""Devices: the mesh, and where arrays lie on it. No other module knows how many devices there are."""

import os
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from vit_jax.errors import UserError


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


def make_mesh(data: int, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh of `data` devices (-1: all) along the one axis "data".

    Args:
      devices: to choose from; None: those of all processes, each of which must have one in the mesh.

    Raises:
      UserError: there are not as many devices.
    """
    everywhere = devices is None
    devices = devices or jax.devices()
    count = len(devices) if data == -1 else data
    if count > len(devices):
        raise UserError(f"mesh.data={data}, but there are {len(devices)} devices ({devices[0].device_kind})")
    if everywhere and len({device.process_index for device in devices[:count]}) < jax.process_count():
        raise UserError(f"mesh.data={data} leaves processes without a device: there are {len(devices)} in all")
    return jax.make_mesh((count,), ("data",), axis_types=(AxisType.Auto,), devices=devices[:count])


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def batch_sharded(mesh: Mesh) -> NamedSharding:
    """Sharding of an array whose first axis is the batch."""
    return NamedSharding(mesh, PartitionSpec("data"))


def with_sharding(shapes: Any, mesh: Mesh) -> Any:
    """The tree of `jax.ShapeDtypeStruct` with the sharding that its arrays shall have."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated(mesh)), shapes)


def place(tree: Any, mesh: Mesh, sharding: NamedSharding | None = None) -> Any:
    """Puts host arrays, the same in all processes, on the devices: replicated, or as `sharding` says."""
    where = sharding or replicated(mesh)

    def one(x: Any) -> jax.Array:
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, where, lambda index: x[index])

    return jax.tree.map(one, tree)


def part_sharded(mesh: Mesh) -> NamedSharding:
    """Sharding of an array whose second axis is the batch, the first being the parts it is cut into."""
    return NamedSharding(mesh, PartitionSpec(None, "data"))

"""A config's training dispatch, compiled for TPUs that are not there: whether it fits, and what it will exchange."""

import os
import re
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh
from ml_collections import ConfigDict

from vit_jax.data.sources import PUBLIC
from vit_jax.data.stand_in import stand_in
from vit_jax.errors import UserError, one_line
from vit_jax.training import mesh as meshes
from vit_jax.training import setup
from vit_jax.training.dispatch import program_bytes
from vit_jax.training.step import TABLE_STEPS, Probe, abstract_state, make_train_steps, pick_resident

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")

# Settings of libtpu's own: no TPU is used, so none is looked for, and other processes may compile too.
LIBTPU = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
}


def compile_ahead(config: ConfigDict, topology: str) -> dict[str, Any]:
    """Compiles the config's dispatch for the TPUs of a `topology`, as v5e:2x4, under its mesh. Needs libtpu, no TPU.

    The pictures lie on the devices; weights of init.checkpoint are not read.

    Returns:
      devices; bytes_per_chip: state, pictures and what a step needs besides; flops_per_chip: of a step, as the compiler
      counts those of one part of the batch, times the parts; collectives: how many of each kind the program has.

    Raises:
      UserError: there is no such topology or no libtpu, or the config does not fit it.
    """
    devices = _devices(topology)
    program, arguments = training_dispatch(config, meshes.make_mesh(config.mesh.data, config.mesh.model, devices))
    compiled: Any = program.lower(*arguments).compile()
    text = compiled.as_text()
    found = {name: len(re.findall(rf" {name}(?:-start)?\(", text)) for name in COLLECTIVES}
    return {
        "devices": f"{arguments[0].step.sharding.num_devices} x {devices[0].device_kind}",
        "bytes_per_chip": program_bytes(compiled),
        "flops_per_chip": compiled.cost_analysis()["flops"] * (config.optim.accumulate or 1),  # 0 is 1 part on a TPU
        "collectives": {name: number for name, number in found.items() if number},
    }


def training_dispatch(config: ConfigDict, mesh: Mesh) -> tuple[jax.stages.Wrapped, tuple[Any, ...]]:
    """The program that a config's run would have on the devices of `mesh`, and its arguments' shapes and shardings."""
    data = config.data
    splits = stand_in(data.name, data.train_examples, data.holdout) if data.name in PUBLIC else setup.load_data(config)
    train = splits.train
    config = setup.resolve_data(setup.resolve_model(config), train, mesh)
    config.data.resident = "always"
    job = setup.make_job(config, train, mesh)
    each = meshes.replicated(mesh)
    lying, count = each, len(train.labels)
    if setup.placement(config, train, mesh) == "shared":
        lying, count = meshes.batch_sharded(mesh), count + -count % mesh.shape["data"]

    def at(shape, dtype, where):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=where)

    picture, dtype = train.images.shape[1:], "uint8"
    if isinstance(job.classifier, Probe):
        picture, dtype = (config.model.width,), "float32"
    feed = [at((count, *picture), dtype, lying), at((count,), np.int32, lying)]
    feed += [at((TABLE_STEPS, config.train.batch_size), np.int32, each)]
    program = make_train_steps(job.task, job.classifier.image_size, pick_resident)
    return program, (abstract_state(job.task), at((), np.int32, each), *feed)


def _devices(topology: str) -> list[Any]:
    for name, value in LIBTPU.items():
        os.environ.setdefault(name, value)
    chip = {"chip_config_name": "megacore"} if topology.startswith("v4:") else {}  # its two cores are one device
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=topology, **chip).devices)
    except Exception as error:  # of the library, of its absence, or of the name
        reason = one_line(error, 200)
        raise UserError(
            f"cannot compile for {topology} ({reason}): give a topology as v5e:2x4, and pip install 'vit_jax[tpu]'"
        ) from error

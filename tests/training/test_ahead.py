"""A training dispatch compiled for TPUs, where libtpu is installed; what is refused, everywhere."""

import json

import jax
import jax.export
import pytest

from vit_jax import command_line
from vit_jax.config import default_config
from vit_jax.errors import UserError
from vit_jax.training import ahead, mesh

QUICK = {"JAX_EXEC_TIME_OPTIMIZATION_EFFORT": "-1.0", "JAX_MEMORY_FITTING_EFFORT": "-1.0"}  # a third of the time
FSDP = "--config.mesh.fsdp=True"


@pytest.mark.parametrize(
    "config,least,collectives",
    [
        (["configs/cifar100_tiny.py"], 50_000 * 32 * 32 * 3, {"all-reduce"}),
        (["configs/cifar100_b16.py", FSDP], 85_876_324 * (4 + 2) / 8, {"all-reduce", "all-gather"}),
    ],
    ids=["data parallel", "B/16, FSDP"],
)
def test_training_compiled_for_tpus_fits(commands, tmp_path, config, least, collectives):
    """In 16 GB a chip; and data-parallel training only adds up gradients."""
    pytest.importorskip("libtpu", reason="pip install '.[tpu]'")
    aot = ["--aot", "v5e:2x4", "--json", tmp_path / "found.json"]
    commands.run("benchmark", "--config", *config, *aot, environment=QUICK)
    (found,) = json.loads((tmp_path / "found.json").read_text())
    assert found["devices"].startswith("8 x ")
    assert found["collectives"].keys() == collectives
    assert least < found["bytes_per_chip"] < 16e9 and found["flops_per_chip"] > 1e9


@pytest.mark.parametrize("name", ["cifar100_tiny", "cifar10_tinyvit"])
def test_training_can_be_lowered_for_cuda_without_a_gpu(name):
    config, _ = command_line.parse(f"configs/{name}.py", {})
    program, arguments = ahead.training_dispatch(config, mesh.make_mesh(1))
    lowered = jax.export.export(program, platforms=["cuda"])(*arguments)
    assert lowered.platforms == ("cuda",) and "stablehlo.while" in lowered.mlir_module()


def test_a_topology_that_there_is_not():
    with pytest.raises(UserError, match="cannot compile for v5e:nine"):
        ahead.compile_ahead(default_config(), "v5e:nine")

"""A training dispatch compiled for TPUs, where libtpu is installed; what is refused, everywhere."""

import json

import pytest

from vit_jax.config import default_config
from vit_jax.errors import UserError
from vit_jax.training import ahead


def test_data_parallel_training_fits_and_only_adds_up(commands, tmp_path):
    """But for the pictures that mixing takes from a neighbour."""
    pytest.importorskip("libtpu", reason="pip install '.[tpu]', tried with jax 0.12 (Python 3.12)")
    aot = ["--aot", "v5e:2x4", "--json", tmp_path / "found.json"]
    commands.run("benchmark", "--config", "configs/cifar100_tiny.py", *aot)
    (found,) = json.loads((tmp_path / "found.json").read_text())
    assert found["devices"].startswith("8 x ")
    assert found["collectives"].keys() == {"all-reduce", "collective-permute"}
    pictures = 50_000 * 32 * 32 * 3
    assert pictures < found["bytes_per_chip"] < 16e9 and found["flops_per_chip"] > 1e9


def test_a_topology_that_there_is_not():
    with pytest.raises(UserError, match="cannot compile for v5e:nine"):
        ahead.compile_ahead(default_config(), "v5e:nine")


def test_what_is_needed_is_named(commands):
    assert "--aot is needed" in commands.fails("benchmark", "--config", "configs/digits.py")

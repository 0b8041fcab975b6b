"""Fixtures shared by all tests: small runs that are made, never downloaded."""

import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
# A model that trains on digits in a second: enough for everything but accuracy.
TINY = [
    "--config.model.width=16",
    "--config.model.depth=1",
    "--config.model.num_heads=2",
    "--config.model.mlp_dim=16",
    "--config.train.steps=24",
    "--config.train.steps_per_call=5",
    "--config.train.eval_every=0.5",
    "--config.checkpoint.every=0.25",
    "--config.augment.crop=pad",
    "--config.model.dropout=0.1",
]


@pytest.fixture(scope="session")
def cache_home(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def command(cache_home):
    """Runs `python -m vit_jax.NAME ...` from the repository's root as a user would; gives the finished process."""

    def run(name, *arguments, environment=None, timeout=300):
        env = os.environ | {"JAX_PLATFORMS": "cpu", "XDG_CACHE_HOME": str(cache_home)} | (environment or {})
        call = [sys.executable, "-m", f"vit_jax.{name}", *map(str, arguments)]
        return subprocess.run(call, cwd=ROOT, env=env, capture_output=True, text=True, timeout=timeout)

    return run


@pytest.fixture
def fails(command):
    """Runs a command that must end with exit code 2 and one `error:` line on stderr; gives that line."""

    def run(*arguments, **options):
        done = command(*arguments, **options)
        errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert done.returncode == 2, (done.returncode, done.stdout, done.stderr)
        assert len(errors) == 1 and "Traceback" not in done.stderr, done.stderr
        return errors[0]

    return run

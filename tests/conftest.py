"""Fixtures shared by all tests: real commands on small runs that are made, never downloaded."""

import gc
import json
import os
import pathlib
import subprocess
import sys
import tempfile

import pytest

# Compiling is what the tests take their time for: a quick compiler gives slower programs, here and in child processes,
# and what one test compiled is there for the next. Workers have their parent's folder.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    COMPILED = tempfile.TemporaryDirectory(prefix="vit_jax-compiled-")
    os.environ |= {"JAX_COMPILATION_CACHE_DIR": COMPILED.name, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
ROOT = pathlib.Path(__file__).parents[1]
# A model that trains on digits in a moment: enough for everything but accuracy.
TINY = {
    "model.width": 16,
    "model.depth": 1,
    "model.num_heads": 2,
    "model.mlp_dim": 16,
    "model.dropout": 0.1,
    "train.steps": 24,
    "train.steps_per_call": 5,
    "train.eval_every": 0.4,
    "checkpoint.every": 0.25,
}


def pytest_collection_finish(session):
    """What is loaded by now is no garbage, and much: it is not to be looked through again and again."""
    gc.collect()
    gc.freeze()


class Commands:
    """The project's commands, as a user types them in the repository's root."""

    def __init__(self, cache: pathlib.Path, printed: pathlib.Path):
        cached = {"XDG_CACHE_HOME": str(cache), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        self.environment = os.environ | {"JAX_PLATFORMS": "cpu"} | cached
        del self.environment["JAX_COMPILATION_CACHE_DIR"]
        self.printed = printed
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        call = [sys.executable, "tests/forked.py"]
        self.forked = subprocess.Popen(call, cwd=ROOT, env=self.environment, text=True, **pipes)

    def popen(self, name, *arguments, environment=None):
        call = [sys.executable, "-m", f"vit_jax.{name}", *map(str, arguments)]
        env = self.environment | (environment or {})
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.Popen(call, cwd=ROOT, env=env, text=True, **pipes)

    def run(self, name, *arguments, code=0, environment=None):
        """Runs a command to its end; gives what it printed on stdout and on stderr."""
        if (environment or {}).keys() <= {"XLA_FLAGS"}:  # others are read as libraries are loaded
            out, err, found = self._run_forked(name, arguments, environment or {})
        else:
            process = self.popen(name, *arguments, environment=environment)
            out, err = process.communicate(timeout=300)
            found = process.returncode
        assert found == code, f"exit {found}, not {code}:\n{out}\n{err}"
        return out, err

    def _run_forked(self, name, arguments, environment):
        out, err = self.printed / "out", self.printed / "err"
        out.unlink(missing_ok=True)  # what a command left behind may still write into it
        err.unlink(missing_ok=True)
        call = {"module": f"vit_jax.{name}", "arguments": list(map(str, arguments)), "environment": environment}
        print(json.dumps(call | {"out": str(out), "err": str(err)}), file=self.forked.stdin, flush=True)
        code = int(self.forked.stdout.readline())
        return out.read_text(), err.read_text(), code

    def fails(self, name, *arguments, **options):
        """Runs a command that must end with code 2 and one `error:` line on stderr; gives that line."""
        _, err = self.run(name, *arguments, code=2, **options)
        errors = [line for line in err.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1 and "Traceback" not in err, err
        return errors[0]

    def training(self, workdir, **fields):
        """The arguments of `main` for digits with the tiny model and the given fields, dots written as __."""
        fields = TINY | {name.replace("__", "."): value for name, value in fields.items()}
        overrides = [f"--config.{name}={value}" for name, value in fields.items()]
        return ["--config", "configs/digits.py", "--workdir", workdir, *overrides]

    def train(self, workdir, code=0, environment=None, **fields):
        """Runs that training; gives what it printed, or its error line where `code` is 2."""
        call = self.training(workdir, **fields)
        if code == 2:
            return self.fails("main", *call, environment=environment)
        return self.run("main", *call, code=code, environment=environment)


@pytest.fixture(scope="session")
def commands(tmp_path_factory):
    base = tmp_path_factory.getbasetemp()
    workers = "PYTEST_XDIST_WORKER" in os.environ  # which then share their parent's folder
    commands = Commands((base.parent if workers else base) / "cache", tmp_path_factory.mktemp("printed"))
    yield commands
    commands.forked.stdin.close()
    commands.forked.wait()


@pytest.fixture(scope="session")
def finished(tmp_path_factory, commands):
    """The workdir of an uninterrupted run of 24 steps."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    commands.train(workdir)
    return workdir

"""Runs the project's commands in processes forked from this one, which has their libraries loaded: to load them takes
most of a short command's time.

Reads a command a line, as JSON (see `run`), and writes its exit code when it has ended. Nothing of the project is
loaded before the fork.
"""

import gc
import importlib
import json
import os
import runpy
import signal
import sys

LIBRARIES = ("jax", "flax.linen", "optax", "orbax.checkpoint", "clu.parameter_overview", "matplotlib.figure", "grain")
LIBRARIES += ("sklearn.datasets",)
SECONDS = 300  # that a command may take


def run(module: str, arguments: list[str], environment: dict[str, str], out: str, err: str) -> None:
    """As `python -m module arguments`, from the folder that this process is in; what it prints goes to two files."""
    os.environ.update(environment)
    for descriptor, path in ((0, os.devnull), (1, out), (2, err)):
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC), descriptor)
    signal.alarm(SECONDS)
    sys.argv, sys.path[0] = [module, *arguments], os.getcwd()
    runpy.run_module(module, run_name="__main__", alter_sys=True)


for library in LIBRARIES:
    importlib.import_module(library)
gc.freeze()  # what is loaded by now is no garbage: not to be looked through again and again
for line in sys.stdin:
    if not (child := os.fork()):
        run(**json.loads(line))
        break
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)

"""The same training in PyTorch, in a process of its own, beside ours: window by window in turn."""

import contextlib
import importlib.util
import json
import math
import pathlib
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

import jax

from vit_jax.errors import RunError, UserError
from vit_jax.training import rows
from vit_jax.training.measuring import Pace, Subject, Training, rates
from vit_jax.training.rows import ROOT
from vit_jax.training.rules import EVERYTHING

SCRIPT = ROOT / "benchmarks" / "torch_peer.py"
FIELDS = ("patch_size", "width", "depth", "num_heads", "mlp_dim", "pool", "position_embedding", "stem", "gelu")
# What the peer's model has of ours; with another value it would be another model.
ALLOWED = {
    "stem": ("patch", "conv"),
    "position_embedding": ("learned", "rotary", "none"),
    "layer_scale": (0.0,),
    "learned_temperature": (False,),
    "mask_self": (False,),
    "mlp_conv": (False,),
    "representation_size": (0,),
    "remat": (False,),
}


class Peer:
    """The process that trains in PyTorch.

    Attributes:
      about: what it says of itself: parameters, device, torch, peak_memory_bytes, compile_seconds.
    """

    def __init__(self, process: subprocess.Popen):
        self._process = process
        self.about = self._answer()

    def __call__(self, steps: int) -> float:
        """The seconds of as many steps. Raises RunError where the process has ended."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # its end is told by what it does not answer
            self._process.stdin.write(f"{steps}\n")
            self._process.stdin.flush()
        return self._answer()["seconds"]

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RunError(f"{SCRIPT.name} ended with exit code {self._process.wait()}: its own message is above")
        return json.loads(line)


def check() -> None:
    """Raises UserError where the peer cannot be had."""
    if importlib.util.find_spec("torch") is None:
        raise UserError("--peer needs PyTorch, which is not installed: pip install torch, or leave --peer out")
    if not SCRIPT.exists():
        raise UserError(f"--peer needs {SCRIPT}: run the benchmark in a clone of the repository")


def specification(subject: Subject) -> dict[str, Any]:
    """What the peer is told of a config that was made ready. Raises UserError where it has no such training."""
    config, classifier = subject.job.config, subject.job.classifier
    for name, allowed in ALLOWED.items():
        if config.model[name] not in allowed:
            raise UserError(f"--peer has no model.{name}={config.model[name]}: set {' or '.join(map(str, allowed))}")
    if subject.job.rules != EVERYTHING:
        raise UserError("--peer trains the whole model: set init.multipliers=full")
    names = ("name", "learning_rate", "weight_decay", "momentum", "b2", "clip_norm")
    return {
        "model": {name: config.model[name] for name in (*FIELDS, "norm_epsilon", "qk_norm")},
        "image_size": classifier.image_size,
        "channels": len(classifier.mean),
        "classes": classifier.num_classes,
        "batch_size": config.train.batch_size,
        "accumulate": config.optim.accumulate,
        "optimizer": {name: config.optim[name] for name in names},
        "label_smoothing": config.train.label_smoothing,
        "dtype": config.train.dtype,
    }


@contextlib.contextmanager
def started(subject: Subject) -> Iterator[Peer]:
    """The peer of a config that was made ready; it ends with the block."""
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "specification.json"
        path.write_text(json.dumps(specification(subject)))
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        with subprocess.Popen([sys.executable, str(SCRIPT), str(path)], text=True, **pipes) as process:  # type: ignore[call-overload]
            try:
                yield Peer(process)
            finally:
                process.kill()


def compare(subject: Subject, training: Training, steps: int, pace: Pace) -> tuple[dict[str, Any], dict[str, Any]]:
    """Our speed and the peer's row, of windows that took turns.

    Raises:
      UserError: the peer has no such training.
      RunError: it failed, or is another model.
    """
    with started(subject) as peer:
        count = sum(x.size for x in jax.tree.leaves(training.state.params))
        if peer.about["parameters"] != count:
            raise RunError(f"the peer has {peer.about['parameters']} parameters, and ours {count}")
        few = max(math.ceil(pace.seconds / peer(1)), 1)
        turns = [(steps / training(steps), few / peer(few)) for _ in range(pace.windows)]
        ours, theirs = map(list, zip(*turns, strict=True))
        row = rates(subject, theirs) | {"torch": peer.about["torch"], "steps_per_window": few}
        row |= {name: peer.about[name] for name in ("parameters", "device", "compile_seconds", "peak_memory_bytes")}
        row |= rows.about()
        ratio = statistics.median(ours) / statistics.median(theirs)
        return rates(subject, ours) | {"ratio_to_peer": ratio}, row

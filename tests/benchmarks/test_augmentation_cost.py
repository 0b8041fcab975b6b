"""The script that times augmentation beside a training step."""

import pathlib
import re
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[2]


def test_counts_are_whole_numbers():
    call = [sys.executable, "benchmarks/augmentation_cost.py", "--config", "configs/cifar10_vit.py", "--steps", "0"]
    done = subprocess.run(call, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2 and "--steps: '0' is not a whole number" in done.stderr


def test_both_times_are_printed(commands):
    small = ["width=16", "depth=1", "num_heads=2", "mlp_dim=16"]
    call = [sys.executable, "benchmarks/augmentation_cost.py", "--config", "configs/cifar10_vit.py", "--steps", "2"]
    call += ["--rounds", "2", "--config.train.batch_size=16", "--config.train.dtype=float32"]
    call += [f"--config.model.{field}" for field in small]
    done = subprocess.run(call, cwd=ROOT, env=commands.environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = re.search(r"cifar10_vit, 16 pictures .* augmentation ([\d.]+) ms, training step ([\d.]+) ms: ", done.stdout)
    assert found and 0 < float(found[1]) and 0 < float(found[2])

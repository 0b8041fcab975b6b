"""A benchmark's rows: what they say of the machine and the code, kept, and in words."""

import datetime
import json
import pathlib
import subprocess
from collections.abc import Mapping
from typing import Any

from vit_jax.errors import UserError
from vit_jax.training import runs

ROOT = pathlib.Path(__file__).parents[2]  # of the checkout, where there is one
RESULTS = ROOT / "benchmarks" / "results.jsonl"


def about() -> dict[str, Any]:
    """When, with what and of which commit (with a + where files differ from it; None outside a checkout)."""
    call = ["git", f"--git-dir={ROOT / '.git'}", f"--work-tree={ROOT}"]  # not a repository in which it is installed
    call += ["describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*"]
    try:
        commit = subprocess.run(call, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = None
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return {"versions": runs.versions(), "commit": commit, "date": now}


def check_record() -> None:
    """Raises UserError where there is no place to keep rows."""
    if not RESULTS.parent.is_dir():
        raise UserError(f"--record appends to {RESULTS}: run the benchmark in a clone of the repository")


def record(rows: list[dict[str, Any]]) -> None:
    """Appends rows to those of other machines and commits, a line of JSON each."""
    with RESULTS.open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def describe(row: Mapping[str, Any]) -> str:
    """A row in words."""

    def percent(share: float | None) -> str:
        return "unknown" if share is None else f"{share:.1%}"

    of = f"torch {row['torch']}" if "torch" in row else row["config"]
    lines = [
        f"{of}: {row['parameters']:,} parameters, batches of {row['batch_size']} at {row['image_size']} px in "
        f"{row['dtype']} on {row['device']}" + (", made-up pictures" * bool(row.get("fabricated"))),
        f"{row['images_per_second']:.1f} images/s, {row['milliseconds_per_step']:.2f} ms a step (spread "
        f"{row['spread']:.1%} over {row['windows']} windows of {row['steps_per_window']} steps), MFU "
        f"{percent(row['mfu'])}",
    ]
    for kind, seconds in row.get("startup_seconds", {}).items():
        each = ", ".join(f"{name} {value:.2f}" for name, value in seconds.items() if name != "total")
        lines.append(f"first step after {seconds['total']:.2f} s, {kind}: {each}")
    if row["peak_memory_bytes"] is not None:
        by = " (as compiled)" * (row.get("peak_memory_source") == "compiler")
        host = (
            f", of the host {row['peak_host_memory_bytes'] / 2**20:.0f} MiB" if "peak_host_memory_bytes" in row else ""
        )
        lines.append(f"most memory of a device {row['peak_memory_bytes'] / 2**20:.0f} MiB{by}{host}")
    if parts := row.get("parts"):
        lines.append(
            f"of a step: augmentation {parts['augmentation']:.1%}, optimizer and average "
            f"{parts['optimizer_and_ema']:.1%}; of the run: evaluation {parts['evaluation']:.1%} "
            f"({parts['evaluation_seconds']:.2f} s each, {parts['evaluation_of_forward']:.0%} of them the bare forward "
            f"pass), checkpoints {parts['checkpointing']:.1%} "
            f"({parts['checkpoint_seconds']:.2f} s each)"
        )
    if "ratio_to_peer" in row:
        lines.append(f"{row['ratio_to_peer']:.2f} times as fast as torch")
    return "\n  ".join(lines)


def describe_kernels(kernels: list[dict[str, Any]]) -> str:
    """The costliest kernels as a table."""
    lines = [f"{'share':>6} {'ms a step':>9} {'calls':>6}  kernel"]
    lines += [
        f"{k['share']:>6.1%} {1e3 * k['seconds']:>9.3f} {k['calls']:>6.1f}  {k['name']}  {k['where']}" for k in kernels
    ]
    return "\n".join(lines)


def describe_growth(field: str, values: list[str], rows: list[dict[str, Any]]) -> str:
    """How a step's time and a picture's grow from the first row on, as a table."""
    lines = [f"{field:>18} {'images/s':>10} {'ms a step':>10} {'growth':>7} {'us a picture':>13} {'growth':>7}"]
    steps = [row["milliseconds_per_step"] for row in rows]
    pictures = [1e6 / row["images_per_second"] for row in rows]
    for value, step, picture in zip(values, steps, pictures, strict=True):
        growth = step / steps[0], picture / pictures[0]
        lines.append(
            f"{value:>18} {1e6 / picture:>10.1f} {step:>10.2f} {growth[0]:>7.2f} {picture:>13.2f} {growth[1]:>7.2f}"
        )
    return "\n".join(lines)

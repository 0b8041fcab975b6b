"""Times a config's training on this machine, and says where the time goes.

python -m vit_jax.benchmark --config configs/cifar100_tiny.py --json rows.json
python -m vit_jax.benchmark --config configs/cifar100_tiny.py --peer
python -m vit_jax.benchmark --config configs/cifar100_tiny.py --sweep batch=128,256,512
python -m vit_jax.benchmark --config configs/cifar100_tiny.py --aot v5e:2x4

The pictures are the config's own where they are here, and otherwise noise of the same shape. The first command also
says what augmentation, optimizer, evaluation and checkpoints take, each by leaving it out. The last one times nothing:
it compiles the training for TPUs that are not there, and says what it takes of each.
"""

import argparse
import math
import os
import pathlib
import time
from typing import Any

from ml_collections import ConfigDict

from vit_jax import command_line, errors

ALIASES = {"batch": "train.batch_size"}  # of swept fields


def main(arguments: list[str]) -> None:
    args, overrides = _parse(arguments)
    field, values = args.sweep or ("", [])
    given = [[*overrides, f"--config.{field}={value}"] for value in values] or [overrides]
    configs = [command_line.parse(args.config, one) for one in given]
    if args.peer:  # it needs memory on the same device
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

    started = time.perf_counter()
    from vit_jax.training import loop  # noqa: F401  # as main does, once the config is known to be right

    import_seconds = time.perf_counter() - started
    from vit_jax.training import comparing, rows
    from vit_jax.training.writers import write_json

    if args.aot:
        table = [_ahead(configs[0][0], args.aot)]
    else:
        if args.record:
            rows.check_record()
        if args.peer:
            comparing.check()
        table, ours = [], []
        for (config, name), overridden in zip(configs, given, strict=True):
            found = _rows(config, {"config": name, "overrides": overridden}, import_seconds, args)
            ours.append(found[0])
            table += found
            if args.record:
                rows.record(found)
            if args.json:  # at once: the next may need more memory than there is
                write_json(args.json, table)
        if args.sweep:
            print(rows.describe_growth(field, values, ours))
    if args.json:
        write_json(args.json, table)


def _ahead(config: ConfigDict, topology: str) -> dict[str, Any]:
    """What the config's training takes of TPUs that are not there."""
    from vit_jax.training import ahead

    found = ahead.compile_ahead(config, topology)
    collectives = ", ".join(f"{number} {name}" for name, number in found["collectives"].items()) or "none"
    print(f"{found['devices']}: {found['bytes_per_chip'] / 2**30:.2f} GiB a chip")
    print(f"{found['flops_per_chip']:.3g} FLOPs a chip and step; collectives in the program: {collectives}")
    return found


def _rows(config: ConfigDict, named: dict[str, Any], import_seconds: float, args: Any) -> list[dict[str, Any]]:
    """The rows of one config, ours and that of the peer, if it is asked for; they are printed too."""
    from vit_jax.training import comparing, measuring, rows

    is_bare, pace = args.bare or args.peer, measuring.Pace(args.windows, args.seconds)
    subject = measuring.opened(measuring.bare(config) if is_bare else config)
    if args.peer:
        comparing.specification(subject)  # what it does not have is said before anything is timed
    row, training = measuring.measure(subject, pace, import_seconds)
    table = [named | {"bare": is_bare} | row]
    if args.peer:
        speed, peer = comparing.compare(subject, training, row["steps_per_window"], pace)
        table = [table[0] | speed, named | {"bare": True} | peer]
    elif not (args.bare or args.sweep):
        table[0]["parts"] = measuring.parts(subject, training, row["steps_per_window"], pace)
    print("\n".join(map(rows.describe, table)), flush=True)
    if args.profile:
        kernels = measuring.profile(training, args.profile)
        table[0]["kernels"] = kernels
        print(rows.describe_kernels(kernels), flush=True)
    return table


def _parse(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """What is asked for, and the fields of the config that are given."""
    parser = errors.ArgumentParser(
        prog="python -m vit_jax.benchmark",
        description=__doc__,
        epilog="Fields of the config can be given as to vit_jax.main: --config.mesh.fsdp=True",
    )
    parser.add_argument("--config", metavar="CONFIG[:VARIANT]", help="what is trained (needed)")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="also write the numbers as JSON")
    parser.add_argument("--record", action="store_true", help="also append them to benchmarks/results.jsonl")
    parser.add_argument("--bare", action="store_true", help="without augmentation, dropout and averaged weights")
    parser.add_argument("--peer", action="store_true", help="beside --bare, in turn, the same training in PyTorch")
    parser.add_argument("--profile", type=pathlib.Path, metavar="DIR", help="leave a trace, and name costly kernels")
    parser.add_argument("--sweep", type=_sweep, metavar="FIELD=A,B,...", help="a row for each value, as batch=128,256")
    parser.add_argument("--windows", type=_count, default=5, metavar="N", help="stretches that are timed (5)")
    parser.add_argument("--seconds", type=_seconds, default=2.0, metavar="S", help="least length of each (2)")
    parser.add_argument("--aot", metavar="TOPOLOGY", help="the TPUs, as v5e:2x4; pip install 'vit_jax[tpu]'")
    args, rest = parser.parse_known_args(arguments)
    if args.config is None:
        parser.error("--config is needed: --config cifar100_tiny")
    for name in ("record", "bare", "peer", "profile", "sweep"):
        if args.aot and getattr(args, name):
            parser.error(f"--aot times nothing: leave out --{name}")
    return args, command_line.overrides_in(rest)


def _count(text: str) -> int:
    if not (text.isascii() and text.isdigit() and 0 < int(text) <= 1000):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 to 1000")
    return int(text)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds <= 600:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds from 0 to 600")
    return seconds


def _sweep(text: str) -> tuple[str, list[str]]:
    field, equals, values = text.partition("=")
    if not equals or not all(values.split(",")):
        raise argparse.ArgumentTypeError(f"{text!r} is no field with values: as batch=128,256")
    return ALIASES.get(field, field), values.split(",")


if __name__ == "__main__":
    errors.run(main)

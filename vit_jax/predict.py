"""Says what pictures show: python -m vit_jax.predict --workdir runs/digits three.png folder/

Files of any kind that Pillow reads, and folders, whose pictures are taken with those of folders in them; - reads names
from stdin, one a line. A picture that cannot be read is named on stderr; the others go on, and the exit code is 2.

python -m vit_jax.predict --config configs/X.py --config.init.checkpoint=FILE.npz three.png
"""

import argparse
import os
import pathlib
import sys
from collections.abc import Iterable, Iterator

from vit_jax import command_line, errors


def main(arguments: list[str]) -> None:
    parser = errors.ArgumentParser(
        prog="python -m vit_jax.predict",
        description=__doc__,
        epilog="With --config, its fields can be given as to vit_jax.main: --config.data.dir=DIR",
    )
    parser.add_argument("pictures", nargs="*", metavar="IMAGE_OR_FOLDER", help="pictures, folders of them, or -")
    parser.add_argument("--workdir", type=pathlib.Path, help="the run's folder")
    parser.add_argument("--top", type=_count, default=5, help="how many classes to name (default: 5)")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="also write the predictions as JSON")
    parser.add_argument("--csv", type=pathlib.Path, metavar="FILE", help="also write the predictions as CSV")
    command_line.add_run_arguments(parser, "checkpoint", "weights")
    parser.add_argument("--batch_size", type=_count, default=64, help="most pictures at once (default: 64)")
    parser.add_argument("--config", metavar="CONFIG[:VARIANT]", help="use its init.checkpoint instead of a run")
    args, rest = parser.parse_known_intermixed_args(arguments)
    overrides = command_line.overrides_in(rest)
    if (args.workdir is None) == (args.config is None):
        parser.error("one of --workdir and --config is needed: --workdir runs/digits")
    if args.config is None and overrides:
        parser.error(f"{overrides[0]} is for a --config: a run predicts as it was trained")
    if args.config is not None and (args.checkpoint or args.weights):
        parser.error("--checkpoint and --weights choose among a run's weights: leave --config out")
    if not args.pictures:
        parser.error("no pictures: name some, or folders of them, or - to read their names from stdin")
    for name in ("json", "csv"):
        path = getattr(args, name)
        if path is not None and path.is_dir():
            parser.error(f"--{name} {path} is a folder: give a file in it")
    config, name = (None, "") if args.config is None else command_line.parse(args.config, overrides)

    from vit_jax.training import predicting, trained  # after the arguments are known to be right: it takes seconds

    if config is None:
        run = trained.open_run(args.workdir, args.checkpoint, args.weights)
    else:
        run, notes = trained.open_weights(config, pathlib.Path("runs") / name)
        print(*notes, sep="\n", file=sys.stderr)
    paths, wrong = predicting.expanded(_names(args.pictures))
    for error in wrong:
        say(error)
    found = []
    results = predicting.Predictor(run, args.batch_size).results(paths, args.top)
    widths = max(map(len, paths), default=0), max(map(len, run.class_names))
    escape = "surrogateescape" if sys.stdout.encoding == "utf-8" else "backslashreplace"  # paths may be any bytes
    sys.stdout.reconfigure(errors=escape)  # type: ignore[union-attr]
    for path, result in zip(paths, results, strict=True):
        if isinstance(result, errors.UserError):
            say(result)
            wrong.append(result)
        else:
            cells = [f"{p['label']:<{widths[1]}} {p['probability']:6.1%}" for p in result]
            print(f"{path:<{widths[0]}}", *cells, sep="  ", flush=True)
            found.append((path, result))
    predicting.write(found, args.json, args.csv)
    if wrong:
        sys.exit(errors.UserError.exit_code)


def say(error: errors.UserError) -> None:
    print(f"error: {errors.one_line(error)}", file=sys.stderr, flush=True)


def _names(arguments: Iterable[str]) -> Iterator[str]:
    """The arguments, with the lines of stdin in place of -."""
    for argument in arguments:
        if argument == "-":
            yield from filter(None, (os.fsdecode(line.rstrip(b"\r\n")) for line in sys.stdin.buffer))
        else:
            yield argument


def _count(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text)):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 on")
    return int(text)


if __name__ == "__main__":
    errors.run(main)

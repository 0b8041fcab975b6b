"""Writes a run's weights as a file for other programs.

python -m vit_jax.export --workdir runs/digits --format npz --output digits.npz

--format npz                              the official names and layout; init.checkpoint reads it, as does timm
--format safetensors [--names timm]       the same arrays with the names of official, timm or transformers
--format stablehlo                        the network itself: uint8 pictures to logits, for jax.export.deserialize
"""

import pathlib

from vit_jax import command_line, errors

SUFFIXES = {"npz": ".npz", "safetensors": ".safetensors", "stablehlo": None}


def main(arguments: list[str]) -> None:
    parser = errors.ArgumentParser(prog="python -m vit_jax.export", description=__doc__)
    parser.add_argument("--workdir", type=pathlib.Path, required=True, help="the run's folder")
    parser.add_argument("--format", choices=SUFFIXES, required=True, help="what kind of file")
    parser.add_argument("--output", type=pathlib.Path, required=True, metavar="FILE", help="the file to write")
    parser.add_argument("--names", choices=["official", "timm", "transformers"], help="of arrays (default: official)")
    command_line.add_run_arguments(parser, "checkpoint", "weights")
    args = parser.parse_args(arguments)
    if args.names and args.format != "safetensors":
        parser.error(f"--names is for --format safetensors, not {args.format}")
    if (suffix := SUFFIXES[args.format]) and args.output.suffix != suffix:
        parser.error(f"--output {args.output} must end in {suffix}")
    if args.output.is_dir():
        parser.error(f"--output {args.output} is a folder: give a file in it")

    from vit_jax.training import exporting  # after the arguments are known to be right: it takes seconds

    names = args.names or "official"
    usage = exporting.export(args.workdir, args.format, args.output, names, args.checkpoint, args.weights)
    print(f"{args.output}: {args.output.stat().st_size:,} bytes; {usage}")


if __name__ == "__main__":
    errors.run(main)

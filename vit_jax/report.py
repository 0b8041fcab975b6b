"""Writes a run's report.html, one page to read offline: python -m vit_jax.report --workdir runs/digits"""

import pathlib

from vit_jax import command_line, errors


def main(arguments: list[str]) -> None:
    parser = errors.ArgumentParser(
        prog="python -m vit_jax.report",
        description=__doc__,
        epilog="A run writes its report when it ends; this writes it anew, or that of a run that is not finished yet.",
    )
    parser.add_argument("--workdir", type=pathlib.Path, help="the run's folder (needed); the report goes there")
    command_line.add_run_arguments(parser, "data_dir")
    args = parser.parse_args(arguments)
    if args.workdir is None:
        parser.error("--workdir is needed: --workdir runs/digits")

    from vit_jax.training import reporting  # after the arguments are known to be right: it takes seconds

    path, left_out = reporting.write(args.workdir, data_dir=args.data_dir)
    print(*(f"left out: {line}" for line in left_out), path, sep="\n")


if __name__ == "__main__":
    errors.run(main)

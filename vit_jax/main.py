"""Trains what a config file says: python -m vit_jax.main --config configs/digits.py"""

import pathlib
import shlex

from vit_jax import command_line, errors


def main(arguments: list[str]) -> None:
    parser = errors.ArgumentParser(
        prog="python -m vit_jax.main",
        description=__doc__,
        epilog="Started again, a run goes on. Every field of its config can be given here:\n\n"
        + command_line.field_help(),
    )
    parser.add_argument("--config", metavar="FILE.py[:VARIANT]", help="what to train, and how (needed)")
    parser.add_argument("--workdir", type=pathlib.Path, help="the run's folder (default: runs/<config name>)")
    args, rest = parser.parse_known_args(arguments)
    overrides = command_line.overrides_in(rest)
    if args.config is None:
        parser.error("--config is needed: --config configs/digits.py")
    config, name = command_line.parse(args.config, overrides)
    workdir = args.workdir or pathlib.Path("runs") / name

    from vit_jax.training import loop  # after the config is known to be right: it takes seconds

    summary = loop.train(config, workdir, shlex.join(["python", "-m", "vit_jax.main", *arguments]))
    print(f"test accuracy {summary['test_accuracy']:.2%} ({summary['protocol']}); results in {workdir}")


if __name__ == "__main__":
    errors.run(main, errors.INTERRUPTION)

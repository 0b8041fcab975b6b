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
    parser.add_argument("--config", metavar="CONFIG[:VARIANT]", help="a file, or a shipped one's name (needed)")
    parser.add_argument("--workdir", type=pathlib.Path, help="the run's folder (default: runs/<config name>)")
    processes = parser.add_argument_group("several processes", "see the README; without these flags there is one")
    processes.add_argument("--coordinator", metavar="HOST:PORT|auto", help="process 0; or: ask the cluster")
    processes.add_argument("--num_processes", type=int, metavar="N", help="how many there are")
    processes.add_argument("--process_id", type=int, metavar="I", help="which one this is, 0 to N - 1")
    args, rest = parser.parse_known_args(arguments)
    overrides = command_line.overrides_in(rest)
    if args.config is None:
        parser.error("--config is needed: --config digits")
    config, name = command_line.parse(args.config, overrides)
    workdir = args.workdir or pathlib.Path("runs") / name

    from vit_jax.training import loop  # after the config is known to be right: it takes seconds
    from vit_jax.training.processes import joined

    with joined(args.coordinator, args.num_processes, args.process_id):
        summary = loop.train(config, workdir, shlex.join(["python", "-m", "vit_jax.main", *arguments]))
        print(f"test accuracy {summary['test_accuracy']:.2%} ({summary['protocol']}); results in {workdir}")


if __name__ == "__main__":
    errors.run(main, errors.INTERRUPTION)

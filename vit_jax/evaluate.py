"""Measures a run, or the weights that a config starts from, on test pictures.

python -m vit_jax.evaluate --workdir runs/digits
python -m vit_jax.evaluate --config configs/X.py --config.init.checkpoint=FILE --workdir DIR
"""

import pathlib

from vit_jax import command_line, errors


def main(arguments: list[str]) -> None:
    parser = errors.ArgumentParser(
        prog="python -m vit_jax.evaluate",
        description=__doc__,
        epilog="With --config, its fields can be given as to vit_jax.main: --config.data.image_size=384",
    )
    parser.add_argument("--workdir", type=pathlib.Path, help="the run's folder; with --config: where the result goes")
    command_line.add_run_arguments(parser, "checkpoint", "weights", "data_dir")
    parser.add_argument("--config", metavar="CONFIG[:VARIANT]", help="measure its init.checkpoint, nothing trained")
    parser.add_argument("--dataset", metavar="NAME", help="other pictures of the same classes, as folder:PATH")
    parser.add_argument(
        "--flip_tta", action="store_true", help="also measure pictures and their mirror images together"
    )
    args, rest = parser.parse_known_args(arguments)
    overrides = command_line.overrides_in(rest)
    if args.workdir is None:
        parser.error("--workdir is needed: --workdir runs/digits")
    if args.config is None and overrides:
        parser.error(f"{overrides[0]} is for a --config: a run is measured as it was trained")
    if args.config is not None and (args.checkpoint or args.weights):
        parser.error("--checkpoint and --weights choose among a run's weights: leave --config out")
    config = None
    if args.config is not None:
        config, _ = command_line.parse(args.config, overrides)
        config.data.dir = args.data_dir or config.data.dir
        if (args.workdir / "config.json").exists():
            parser.error(f"{args.workdir} holds a run: give another --workdir for what is measured of the --config")

    from vit_jax.training import evaluation, trained  # after the arguments are known to be right: it takes seconds

    if config is None:
        run = trained.open_run(args.workdir, args.checkpoint, args.weights, args.data_dir)
        origin = f"{run.weights} weights of step {run.step}"
    else:
        run, notes = trained.open_weights(config, args.workdir)
        origin = run.weights
        print("\n".join(notes), flush=True)
    measured = evaluation.evaluate(run, args.dataset, args.flip_tta)
    paths = evaluation.write(measured, args.workdir)
    report = measured.report
    print(
        f"accuracy {report['accuracy']:.2%}, top-5 {report['accuracy_top5']:.2%}, loss {report['loss']:.4f}, "
        f"calibration error {report['ece']:.2%}: {report['examples']} pictures of {report['dataset']}, {origin}"
    )
    if args.flip_tta:
        print(f"with mirror images: accuracy {report['accuracy_flip']:.2%}, loss {report['loss_flip']:.4f}")
    print(*paths, sep="\n")


if __name__ == "__main__":
    errors.run(main)

"""Measures a run on its test pictures: python -m vit_jax.evaluate --workdir runs/digits"""

import pathlib

from vit_jax import errors


def main(arguments: list[str]) -> None:
    parser = errors.ArgumentParser(prog="python -m vit_jax.evaluate", description=__doc__)
    parser.add_argument("--workdir", type=pathlib.Path, required=True, help="the run's folder")
    parser.add_argument("--checkpoint", default="last", metavar="last|best|STEP", help="the checkpoint (default: last)")
    parser.add_argument("--weights", choices=["ema", "raw"], help="averaged or raw (default: ema where there are)")
    parser.add_argument("--data_dir", help="where data sets lie, if not where the run found them")
    parser.add_argument("--dataset", metavar="NAME", help="other pictures of the same classes, as folder:PATH")
    parser.add_argument(
        "--flip_tta", action="store_true", help="also measure pictures and their mirror images together"
    )
    args = parser.parse_args(arguments)

    from vit_jax.training import evaluation

    measured = evaluation.evaluate(
        args.workdir, args.checkpoint, args.weights, args.data_dir, args.dataset, args.flip_tta
    )
    paths = evaluation.write(measured, args.workdir)
    report = measured.report
    print(
        f"accuracy {report['accuracy']:.2%}, top-5 {report['accuracy_top5']:.2%}, loss {report['loss']:.4f}, "
        f"calibration error {report['ece']:.2%}: {report['examples']} pictures of {report['dataset']}, "
        f"{report['weights']} weights of step {report['checkpoint_step']}"
    )
    if args.flip_tta:
        print(f"with mirror images: accuracy {report['accuracy_flip']:.2%}, loss {report['loss_flip']:.4f}")
    print(*paths, sep="\n")


if __name__ == "__main__":
    errors.run(main)

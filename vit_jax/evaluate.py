"""Measures a run on its test pictures: python -m vit_jax.evaluate --workdir runs/digits"""

import pathlib

from vit_jax import errors


def main(arguments: list[str]) -> None:
    parser = errors.ArgumentParser(prog="python -m vit_jax.evaluate", description=__doc__)
    parser.add_argument("--workdir", type=pathlib.Path, required=True, help="the run's folder")
    parser.add_argument("--checkpoint", default="last", metavar="last|best|STEP", help="the checkpoint (default: last)")
    parser.add_argument("--weights", choices=["ema", "raw"], help="averaged or raw (default: ema where there are)")
    parser.add_argument("--data_dir", help="where data sets lie, if not where the run found them")
    args = parser.parse_args(arguments)

    from vit_jax.training import evaluation
    from vit_jax.training.writers import write_json

    report = evaluation.evaluate(args.workdir, args.checkpoint, args.weights, args.data_dir)
    write_json(args.workdir / "evaluation.json", report)
    print(
        f"accuracy {report['accuracy']:.2%}, top-5 {report['accuracy_top5']:.2%}, loss {report['loss']:.4f}, "
        f"calibration error {report['ece']:.2%}: {report['examples']} pictures, {report['weights']} weights of step "
        f"{report['checkpoint_step']}; {args.workdir / 'evaluation.json'}"
    )


if __name__ == "__main__":
    errors.run(main)

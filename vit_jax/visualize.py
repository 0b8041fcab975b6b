"""Draws what a run has learned: python -m vit_jax.visualize --workdir runs/digits

--what all            the next eight, as far as the model has them (default); PNG files in the run's figures/
--what attention      what the classifier's head reads, by layer and head: a file a picture
--what rollout        attention followed through all layers down to the picture
--what relevance      what speaks for the two most probable classes: gradient-weighted attention
--what positions      how alike the position embeddings are
--what filters        the principal components of the patch embedding's filters
--what distance       how far each head looks, by layer
--what curves         loss and accuracy over epochs, curves.png; with --compare of several runs in one picture
--what confusion      what is taken for what, and what else vit_jax.evaluate measures and draws
--what augmentation   what a config's training sees, without a run: needs --config, as digits
"""

import argparse
import pathlib

from vit_jax import command_line, errors

MOST_ROWS = 100
OF_PICTURES = ("attention", "rollout", "relevance", "distance")
OF_A_RUN = (*OF_PICTURES[:3], "positions", "filters", "distance", "curves", "confusion")


def main(arguments: list[str]) -> None:
    parser = errors.ArgumentParser(
        prog="python -m vit_jax.visualize",
        description=__doc__,
        epilog="Fields of the config can be given as to vit_jax.main: --config.augment.mixup=0.8",
    )
    parser.add_argument("--what", default="all", choices=["all", *OF_A_RUN, "augmentation"], help="what to draw")
    parser.add_argument("--workdir", type=pathlib.Path, help="the run's folder; figures/ goes there")
    parser.add_argument(
        "--images", type=pathlib.Path, nargs="+", default=[], help="pictures, or folders (default: some of test)"
    )
    parser.add_argument("--compare", type=pathlib.Path, nargs="+", default=[], help="other runs' folders, for curves")
    command_line.add_run_arguments(parser, "checkpoint", "weights", "data_dir")
    parser.add_argument("--config", metavar="CONFIG[:VARIANT]", help="for augmentation: what would be trained")
    parser.add_argument("--rows", type=_rows, help=f"for augmentation: 1 to {MOST_ROWS} pictures (default: 8)")
    args, rest = parser.parse_known_args(arguments)
    uses = {
        "images": ("all", *OF_PICTURES),
        "compare": ("all", "curves"),
        "checkpoint": ("all", *OF_A_RUN),
        "weights": ("all", *OF_A_RUN),
        "config": ("augmentation",),
        "rows": ("augmentation",),
    }
    for name, whats in uses.items():
        if getattr(args, name) and args.what not in whats:
            parser.error(f"--{name} is for --what {', '.join(whats)}, not {args.what}: leave it out")
    if args.what == "augmentation":
        print(augmentation(args, command_line.overrides_in(rest)))
    else:
        trained(args, rest)


def _rows(text: str) -> int:
    if not (text.isascii() and text.isdigit() and 1 <= int(text) <= MOST_ROWS):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 to {MOST_ROWS}")
    return int(text)


def trained(args: argparse.Namespace, rest: list[str]) -> None:
    if rest:
        raise errors.UserError(f"unknown argument {rest[0]!r} (see --help)")
    if args.workdir is None:
        raise errors.UserError("--workdir is needed: the folder of a run (see --help)")

    from vit_jax.training import drawings, predicting

    pictures, wrong = predicting.expanded(map(str, args.images))
    if wrong:
        raise wrong[0]
    files = [pathlib.Path(picture) for picture in pictures]
    subject = drawings.Subject(args.workdir, files, args.compare, args.checkpoint, args.weights, args.data_dir)
    paths, left_out = drawings.draw(subject, args.what)
    print(*left_out, *paths, sep="\n")


def augmentation(args: argparse.Namespace, overrides: list[str]) -> pathlib.Path:
    if args.config is None:
        raise errors.UserError("--what augmentation needs --config: --config digits (see --help)")
    config, name = command_line.parse(args.config, overrides)

    from vit_jax.training import preview  # after the config is known to be right: it takes seconds

    return preview.augmentation(config, name, args.workdir or pathlib.Path("runs") / name, args.rows or 8)


if __name__ == "__main__":
    errors.run(main)

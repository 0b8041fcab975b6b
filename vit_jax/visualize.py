"""Draws what a config's training sees: python -m vit_jax.visualize --config configs/digits.py --what augmentation

--what augmentation   training pictures as they lie in the data set, and as the model sees them, with their labels
"""

import argparse
import pathlib

from vit_jax import command_line, errors

MOST_ROWS = 100


def main(arguments: list[str]) -> None:
    parser = errors.ArgumentParser(
        prog="python -m vit_jax.visualize",
        description=__doc__,
        epilog="Fields of the config can be given as to vit_jax.main: --config.augment.mixup=0.8",
    )
    parser.add_argument("--what", required=True, choices=DRAWINGS, help="what to draw")
    parser.add_argument("--config", metavar="FILE.py[:VARIANT]", help="what would be trained (needed)")
    parser.add_argument("--workdir", type=pathlib.Path, help="where figures/ goes (default: runs/<config name>)")
    parser.add_argument("--rows", type=_rows, default=8, help=f"pictures, 1 to {MOST_ROWS} (default: 8)")
    args, rest = parser.parse_known_args(arguments)
    print(DRAWINGS[args.what](args, command_line.overrides_in(rest)))


def _rows(text: str) -> int:
    if not (text.isascii() and text.isdigit() and 1 <= int(text) <= MOST_ROWS):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 to {MOST_ROWS}")
    return int(text)


def augmentation(args: argparse.Namespace, overrides: list[str]) -> pathlib.Path:
    if args.config is None:
        raise errors.UserError("--what augmentation needs --config: --config configs/digits.py (see --help)")
    config, name = command_line.parse(args.config, overrides)

    from vit_jax.training import preview  # after the config is known to be right: it takes seconds

    return preview.augmentation(config, name, args.workdir or pathlib.Path("runs") / name, args.rows)


DRAWINGS = {"augmentation": augmentation}

if __name__ == "__main__":
    errors.run(main)

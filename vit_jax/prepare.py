"""Downloads, decodes and caches a data set ahead of time.

python -m vit_jax.prepare --dataset cifar100 [--data_dir DIR]

Data sets: digits, cifar10, cifar100, svhn, tiny_imagenet, tfds:NAME (any image-classification set of
tensorflow-datasets), folder:PATH (PATH/{train,test}/CLASS/PICTURE.jpg). Training does the same first where needed.
"""

import argparse
import pathlib
import signal
import sys

from vit_jax import errors
from vit_jax.data import load


def main(arguments: list[str]) -> None:
    """Prepares the data set that `arguments` name and prints a line per split."""
    parser = errors.ArgumentParser(prog="python -m vit_jax.prepare", description=__doc__)
    parser.add_argument("--dataset", required=True, help="the data set's name")
    parser.add_argument("--data_dir", help="where (default: $TFDS_DATA_DIR or ~/tensorflow_datasets)")
    parser.add_argument("--image_size", type=int, help="side to which pictures of varying sizes are resized, in pixels")
    parser.add_argument("--skip_unreadable", action="store_true", help="go on without the pictures that cannot be read")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)  # load's: errors go to stdout
    args = parser.parse_args(arguments)
    if args.image_size is not None and args.image_size < 1:
        raise errors.UserError(f"--image_size is {args.image_size}: it must be at least 1")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)
    try:
        splits, directory = load.build(
            args.dataset, args.data_dir, image_size=args.image_size, skip_unreadable=args.skip_unreadable
        )
    except (errors.UserError, errors.RunError) as error:
        if not args.child or args.debug:
            raise
        print(f"error: {errors.one_line(error)}", flush=True)
        sys.exit(error.exit_code)
    if not args.child:
        for name, split in splits.items():
            print(_summary(args.dataset, name, split, directory))


def _stop(number: int, _) -> None:
    """Ends the process by an exception, so that what is half written is removed, undisturbed by a second signal."""
    for other in (signal.SIGINT, signal.SIGTERM):
        signal.signal(other, signal.SIG_IGN)
    sys.exit(128 + number)


def _summary(dataset: str, name: str, split: load.Split, directory: pathlib.Path | None) -> str:
    count, *shape = split.images.shape
    where = f"in {directory / name}" if directory else "within scikit-learn"
    size = f"{'x'.join(map(str, shape))}, {len(split.class_names)} classes, {split.images.nbytes / 2**20:.1f} MiB"
    return f"{dataset} {name}: {count:,} pictures of {size} {where}"


if __name__ == "__main__":
    errors.run(main)

"""What a config's augmentation costs beside its whole training step.

    python benchmarks/augmentation_cost.py --config configs/cifar10_vit.py --config.train.batch_size=128

Made-up pictures, --size pixels a side in --classes classes; both are timed in turn, with the gathering of the batch,
inside a compiled loop as in training, and the medians are printed.
"""

import argparse
import functools
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from ml_collections import ConfigDict

from vit_jax import command_line, errors
from vit_jax.data.cache import Split, channel_statistics
from vit_jax.training import mesh as meshes
from vit_jax.training import setup
from vit_jax.training.step import Task, TrainState, init_state, train_step, training_pictures

PICTURES = 2048  # at least a batch


def main(arguments: list[str]) -> None:
    parser = errors.ArgumentParser(prog="python benchmarks/augmentation_cost.py", description=__doc__)
    parser.add_argument("--config", required=True, metavar="FILE.py[:VARIANT]")
    parser.add_argument("--size", type=_count, default=32, help="side of the stored pictures (default: 32)")
    parser.add_argument("--classes", type=_count, default=10, help="number of classes (default: 10)")
    parser.add_argument("--steps", type=_count, default=5, help="training steps a measurement (default: 5)")
    parser.add_argument("--rounds", type=_count, default=5, help="measurements (default: 5)")
    args, rest = parser.parse_known_args(arguments)
    config, name = command_line.parse(args.config, command_line.overrides_in(rest))
    batch = config.train.batch_size
    split = made_up(max(PICTURES, batch), args.size, args.classes)
    task = make_task(config, split)
    pictures, labels = jnp.asarray(split.images), jnp.asarray(split.labels)

    augmenting = jax.jit(functools.partial(augment, task, batch))
    training = jax.jit(functools.partial(train, task, batch), donate_argnums=0)
    state = init_state(task)
    augmentation, steps = [], []
    for _ in range(args.rounds + 1):
        started = time.perf_counter()
        jax.block_until_ready(augmenting(pictures, labels, 4 * args.steps))
        between = time.perf_counter()
        state = jax.block_until_ready(training(state, pictures, labels, args.steps))
        augmentation.append((between - started) / (4 * args.steps))
        steps.append((time.perf_counter() - between) / args.steps)
    one, whole = (1e3 * statistics.median(values[1:]) for values in (augmentation, steps))  # the first one compiled
    print(
        f"{name}, {batch} pictures of {args.size} px on {jax.devices()[0].device_kind}: augmentation {one:.2f} ms, "
        f"training step {whole:.1f} ms: {one / whole:.1%}"
    )


def _count(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def made_up(count: int, size: int, classes: int) -> Split:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (count, size, size, 3), np.uint8)
    names = tuple(map(str, range(classes)))
    return Split(images, rng.integers(0, classes, count).astype(np.int32), names, *channel_statistics(images))


def make_task(config: ConfigDict, split: Split) -> Task:
    mesh = meshes.make_mesh(config.mesh.data, config.mesh.model)
    config = setup.resolve_data(setup.resolve_model(config), split, mesh)
    plan, _ = setup.make_plan(config, len(split.labels))
    return setup.make_task(config, setup.make_classifier(config, len(split.class_names), mesh), plan)[0]


def batch_at(i: jax.Array, batch: int, pictures: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
    index = (i * batch + jnp.arange(batch)) % len(labels)
    return pictures[index], labels[index]


def augment(task: Task, batch: int, pictures: jax.Array, labels: jax.Array, count: jax.Array) -> jax.Array:
    def body(i, total):
        cut = batch_at(i, batch, pictures, labels)
        images, targets, _ = training_pictures(task, task.classifier.image_size, i, *cut)
        return total + jnp.sum(images.astype(jnp.float32)) + jnp.sum(targets)  # so that all of it is computed

    return lax.fori_loop(0, count, body, jnp.zeros(()))


def train(
    task: Task, batch: int, state: TrainState, pictures: jax.Array, labels: jax.Array, count: jax.Array
) -> TrainState:
    def body(i, state):
        return train_step(task, task.classifier.image_size, state, *batch_at(i, batch, pictures, labels))

    return lax.fori_loop(0, count, body, state)


if __name__ == "__main__":
    errors.run(main)

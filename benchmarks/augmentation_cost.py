"""What a config's augmentation costs beside its whole training step.

    python benchmarks/augmentation_cost.py --config configs/cifar10_vit.py --config.train.batch_size=128

Made-up pictures of the data set's size; both are timed in turn, inside a compiled loop as in training, and the medians
are printed. --size and --classes say what pictures to make up (default: 32 pixels, 10 classes).
"""

import argparse
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from vit_jax import config as configs
from vit_jax import errors
from vit_jax.data.cache import Split, channel_statistics
from vit_jax.training import mesh as meshes
from vit_jax.training import setup
from vit_jax.training.step import init_state, train_step, training_pictures

ROUNDS = 5


def main(arguments: list[str]) -> None:
    parser = errors.ArgumentParser(
        prog="python benchmarks/augmentation_cost.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", required=True, metavar="FILE.py[:VARIANT]")
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--classes", type=int, default=10)
    args, rest = parser.parse_known_args(arguments)
    config, name = configs.parse(args.config, configs.overrides_in(rest))
    task, pictures, labels = made_up(config, args.size, args.classes)
    size = task.classifier.image_size

    def augment(i, total):
        images, targets, _ = training_pictures(task, size, i, pictures, labels)
        return total + jnp.sum(images.astype(jnp.float32)) + jnp.sum(targets)  # all of it must be computed

    augmenting = jax.jit(lambda count: lax.fori_loop(0, count, augment, jnp.zeros(())))
    training = jax.jit(
        lambda state, n: lax.fori_loop(0, n, lambda _, s: train_step(task, size, s, pictures, labels), state)
    )
    state = init_state(task)
    times: dict[str, list[float]] = {"augmentation": [], "step": []}
    for round_ in range(ROUNDS + 1):  # the first one compiles
        for kind, run, count in (("augmentation", augmenting, 20), ("step", lambda n: training(state, n), 2)):
            started = time.perf_counter()
            jax.block_until_ready(run(count))
            if round_:
                times[kind].append((time.perf_counter() - started) / count * 1e3)
    augmentation, step = (statistics.median(values) for values in times.values())
    print(
        f"{name}, {len(labels)} pictures of {args.size} px, {jax.devices()[0].device_kind}: augmentation "
        f"{augmentation:.2f} ms of a step of {step:.1f} ms, {augmentation / step:.1%}"
    )


def made_up(config, size: int, classes: int):
    """The config's task, and one batch of random pictures on the devices."""
    rng = np.random.default_rng(0)
    batch = config.train.batch_size
    images = rng.integers(0, 256, (batch, size, size, 3), np.uint8)
    labels = rng.integers(0, classes, batch).astype(np.int32)
    split = Split(images, labels, tuple(map(str, range(classes))), *channel_statistics(images))
    mesh = meshes.make_mesh(config.mesh.data)
    config = setup.resolve_data(setup.resolve_model(config), split, mesh)
    plan, _ = setup.make_plan(config, 50_000)
    task, _ = setup.make_task(config, setup.make_classifier(config, classes, mesh), plan)
    return task, jnp.asarray(images), jnp.asarray(labels)


if __name__ == "__main__":
    errors.run(main)

"""The training state, one training step and one evaluation, and the only place where they are jitted."""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import Mesh

from vit_jax.augment import ops
from vit_jax.training import mesh as meshes
from vit_jax.training import optim

# Most steps of a dispatch. Programs are compiled for index tables of this many steps, however many of them a dispatch
# makes: the same program runs them all, so `steps_per_call` cannot change a result.
TABLE_STEPS = 512


@flax.struct.dataclass
class TrainState:
    """All that a run carries from step to step, and all that a checkpoint holds.

    Attributes:
      step: optimizer steps done, int32 [].
      params: float32 parameters, named as in the official checkpoints.
      ema: their moving average, or None.
      optimizer: optax's state.
      sums: sums over the steps since the last evaluation: loss, correct, examples; float32 [].
    """

    step: jax.Array
    params: Any
    ema: Any
    optimizer: Any
    sums: dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """What training pictures go through; fields as in `vit_jax.config`."""

    crop: str
    padding: int
    min_area: float
    flip: bool


@dataclasses.dataclass(frozen=True)
class Classifier:
    """A model with all that lies between stored pictures and its input: what training and evaluation share."""

    model: nn.Module
    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    mesh: Mesh

    @property
    def num_classes(self) -> int:
        return self.model.num_classes

    def init(self, seed: int) -> Any:
        """New parameters, a function of the seed alone."""
        pictures = jnp.zeros((1, self.image_size, self.image_size, len(self.mean)))
        return self.model.init(jax.random.key(seed), pictures, train=False)["params"]

    def logits(self, params: Any, images: jax.Array, train: bool = False, rngs: Any = None) -> jax.Array:
        """uint8 [B, H, W, C] → float32 [B, K]."""
        inputs = ops.normalize(ops.resize(images, self.image_size), self.mean, self.std, self.model.dtype)
        return jnp.asarray(self.model.apply({"params": params}, inputs, train=train, rngs=rngs))


@dataclasses.dataclass(frozen=True)
class Task:
    """What a training step needs besides the state and the pictures: plain values, fixed for the run."""

    classifier: Classifier
    optimizer: optax.GradientTransformation
    augmentation: Augmentation
    label_smoothing: float
    accumulate: int
    ema_decay: float
    seed: int


def zero_sums() -> dict[str, jax.Array]:
    return {name: jnp.zeros((), jnp.float32) for name in ("loss", "correct", "examples")}


def new_state(task: Task) -> TrainState:
    """The state before the first step, a function of the seed alone."""
    params = task.classifier.init(task.seed)
    ema = jax.tree.map(jnp.copy, params) if task.ema_decay else None
    return TrainState(jnp.zeros((), jnp.int32), params, ema, task.optimizer.init(params), zero_sums())


def abstract_state(task: Task) -> TrainState:
    """Shapes, dtypes and shardings of the state, without its arrays."""
    return meshes.with_sharding(jax.eval_shape(lambda: new_state(task)), task.classifier.mesh)


def init_state(task: Task) -> TrainState:
    """The state before the first step, made where it will lie."""
    shardings = jax.tree.map(lambda x: x.sharding, abstract_state(task))
    return jax.jit(lambda: new_state(task), out_shardings=shardings)()


@jax.jit
def all_finite(params: Any) -> jax.Array:
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(params)]))


@jax.jit
def copy(tree: Any) -> Any:
    return jax.tree.map(jnp.copy, tree)


def augment(key: jax.Array, images: jax.Array, size: int, how: Augmentation) -> jax.Array:
    """uint8 [B, H, W, C] → uint8 [B, size, size, C]."""
    crop_key, flip_key = jax.random.split(key)
    if how.crop == "pad":
        images = ops.random_crop(crop_key, images, how.padding)
    elif how.crop == "resized":
        images = ops.random_resized_crop(crop_key, images, size, how.min_area)
    if how.flip:
        images = ops.random_flip(flip_key, images)
    return ops.resize(images, size)


def cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Softmax cross-entropy with soft targets [B, K] → [B], in float32."""
    return optax.softmax_cross_entropy(logits.astype(jnp.float32), targets)


def train_step(task: Task, state: TrainState, images: jax.Array, labels: jax.Array) -> TrainState:
    """One optimizer step on uint8 images [B, H, W, C] and labels [B]."""
    augment_key, dropout_key = jax.random.split(jax.random.fold_in(jax.random.key(task.seed), state.step))
    images = augment(augment_key, images, task.classifier.image_size, task.augmentation)
    targets = optax.smooth_labels(jax.nn.one_hot(labels, task.classifier.num_classes), task.label_smoothing)

    def loss_fn(params, part, images, labels, targets):
        rngs = {"dropout": jax.random.fold_in(dropout_key, part)}
        logits = task.classifier.logits(params, images, train=True, rngs=rngs)
        correct = jnp.sum(jnp.argmax(logits, -1) == labels).astype(jnp.float32)
        return jnp.mean(cross_entropy(logits, targets)), correct

    def add_part(total, part):
        (loss, correct), gradients = jax.value_and_grad(loss_fn, has_aux=True)(state.params, *part)
        return jax.tree.map(jnp.add, total, (loss, correct, gradients)), None

    parts = task.accumulate
    # Every device keeps its own examples: a part takes each `parts`-th of them.
    split = jax.tree.map(lambda x: x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1), (images, labels, targets))
    split = lax.with_sharding_constraint(split, meshes.part_sharded(task.classifier.mesh))
    zeros = (jnp.zeros(()), jnp.zeros(()), jax.tree.map(jnp.zeros_like, state.params))
    (loss, correct, gradients), _ = lax.scan(add_part, zeros, (jnp.arange(parts), *split))
    loss, gradients = jax.tree.map(lambda x: x / parts, (loss, gradients))

    updates, optimizer = task.optimizer.update(gradients, state.optimizer, state.params)
    params = optax.apply_updates(state.params, updates)
    ema = state.ema
    if ema is not None:
        ema = optim.update_ema(ema, params, optim.ema_decay(task.ema_decay, state.step))
    batch = {"loss": loss * len(labels), "correct": correct, "examples": jnp.float32(len(labels))}
    sums = jax.tree.map(jnp.add, state.sums, batch)
    return TrainState(state.step + 1, params, ema, optimizer, sums)


def make_train_steps(task: Task) -> jax.stages.Wrapped:
    """One dispatch of training: (state, images, labels, indices, count) → (state, a copy of its sums).

    images: uint8 [N, H, W, C] and labels: int32 [N], the whole training split, on the devices.
    indices: int32 [T, B], the pictures of each step; the first `count` steps are made. The state is donated.
    """
    mesh = task.classifier.mesh

    def train_steps(state, images, labels, indices, count):
        def body(i, state):
            index = lax.with_sharding_constraint(indices[i], meshes.batch_sharded(mesh))
            return train_step(task, state, images[index], labels[index])

        state = lax.fori_loop(0, count, body, state)
        return state, state.sums

    everywhere = meshes.replicated(mesh)
    return jax.jit(train_steps, donate_argnums=0, in_shardings=everywhere, out_shardings=everywhere)


def make_evaluate(classifier: Classifier, batch_size: int) -> jax.stages.Wrapped:
    """Evaluation: (params, images, labels) → per-example results, each [N].

    images: uint8 [N, H, W, C] and labels: int32 [N] with N a multiple of `batch_size` (the caller pads, and cuts the
    results back to the examples that exist). Results: loss, correct, correct_top5 (float32), prediction (int32) and
    confidence, the probability of the prediction.
    """
    shard = functools.partial(lax.with_sharding_constraint, shardings=meshes.batch_sharded(classifier.mesh))

    def results(params, images, labels):
        logits = classifier.logits(params, images)
        top = lax.top_k(logits, min(5, classifier.num_classes))[1]  # [B, 5], best first
        return {
            "loss": cross_entropy(logits, jax.nn.one_hot(labels, classifier.num_classes)),
            "correct": (top[:, 0] == labels).astype(jnp.float32),
            "correct_top5": jnp.any(top == labels[:, None], axis=-1).astype(jnp.float32),
            "prediction": top[:, 0],
            "confidence": jnp.max(jax.nn.softmax(logits), axis=-1),
        }

    def evaluate(params, images, labels):
        def one(start):
            cut = functools.partial(lax.dynamic_slice_in_dim, start_index=start, slice_size=batch_size)
            return results(params, shard(cut(images)), shard(cut(labels)))

        batches = lax.map(one, jnp.arange(0, len(labels), batch_size))
        return jax.tree.map(lambda x: x.reshape(-1), batches)

    everywhere = meshes.replicated(classifier.mesh)
    return jax.jit(evaluate, in_shardings=everywhere, out_shardings=everywhere)

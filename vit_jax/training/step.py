"""The training state, one training step and one evaluation, and the only place where they are jitted."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import Mesh

from vit_jax.augment import mix, ops, policies
from vit_jax.models.vit import middle_positions
from vit_jax.training import mesh as meshes
from vit_jax.training import optim
from vit_jax.training.rules import EVERYTHING, Rules, merge, partition

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
      optimizer: optax's state; of frozen parameters it has none.
      sums: sums over the steps since the last evaluation: loss, correct, examples; float32 [].
      skipped: steps so far whose update was left out, for it was not finite; int32 [].
      norm: global norm of the last step's gradient, float32 [].
    """

    step: jax.Array
    params: Any
    ema: Any
    optimizer: Any
    sums: dict[str, jax.Array]
    skipped: jax.Array
    norm: jax.Array

    @property
    def progress(self) -> dict[str, Any]:
        """All but the weights and the optimizer's state: what the loop looks at."""
        return {name: getattr(self, name) for name in ("step", "sums", "skipped", "norm")}


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """What training pictures go through, in this order; most fields as in `vit_jax.config`.

    Attributes:
      policy: None for none.
      mean: what erased boxes are filled with where `erasing_fill` is "mean", a number in 0..1 a channel.
      mixing: None for none; after `mix_steps` steps there is none any more.
      repeats: times that a batch holds each of its pictures.
      small_size: side of the crops, pixels, in the first `small_steps` steps.
    """

    crop: str = "none"
    padding: int = 0
    min_area: float = 1.0
    flip: bool = False
    policy: policies.Policy | None = None
    crop_paste: bool = False
    erasing: float = 0.0
    erasing_fill: str = "pixel"
    mean: tuple[float, ...] = ()
    mixing: mix.Mixing | None = None
    mix_steps: int = 0
    repeats: int = 1
    small_size: int = 0
    small_steps: int = 0


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

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of tokens of a whole picture."""
        return self.model.grid(self.image_size, self.image_size)

    def init(self, seed: int) -> Any:
        """New parameters, a function of the seed alone."""
        pictures = jnp.zeros((1, self.image_size, self.image_size, len(self.mean)))
        return self.model.init(jax.random.key(seed), pictures, train=False)["params"]

    def shapes(self) -> Any:
        """The tree of the parameters' shapes."""
        return jax.eval_shape(lambda: self.init(0))

    def inputs(self, images: jax.Array) -> jax.Array:
        """Pictures of the model's size as it takes them: uint8 [B, S, S, C] → [B, S, S, C] of the model's dtype."""
        return ops.normalize(images, self.mean, self.std, self.model.dtype)

    def logits(self, params: Any, images: jax.Array) -> jax.Array:
        """As evaluation sees pictures of any size: uint8 [B, H, W, C] → float32 [B, K]."""
        return self.apply(params, ops.resize(images, self.image_size), train=False)

    def apply(self, params: Any, images: jax.Array, train: bool, rngs: Any = None) -> jax.Array:
        """uint8 [B, S, S, C] → float32 [B, K], where S is `image_size` or, for crops, less."""
        inputs = self.inputs(images)
        params = middle_positions(params, self.grid[0], self.model.grid(*images.shape[1:3])[0])
        return jnp.asarray(self.model.apply({"params": params}, inputs, train=train, rngs=rngs))


@dataclasses.dataclass(frozen=True)
class Probe(Classifier):
    """A classifier whose trunk stays as it is: what the trunk makes of pictures is computed once for all.

    Wherever training and evaluation speak of images, a Probe is given these features instead, float32 [B, D].
    """

    def features(self, params: Any, images: jax.Array) -> jax.Array:
        """What the head reads of pictures as evaluation sees them: uint8 [B, H, W, C] → float32 [B, D]."""
        trunk = Classifier(self.model.clone(num_classes=0), self.image_size, self.mean, self.std, self.mesh)
        return trunk.logits(params, images)

    def logits(self, params: Any, images: jax.Array) -> jax.Array:
        return self.apply(params, images, train=False)

    def apply(self, params: Any, images: jax.Array, train: bool, rngs: Any = None) -> jax.Array:
        return jnp.asarray(nn.Dense(self.num_classes).apply({"params": params["head"]}, images))


@dataclasses.dataclass(frozen=True)
class Task:
    """What a training step needs besides the state and the pictures: plain values, fixed for the run.

    Attributes:
      multipliers: the optimizer's; what has 0 stays as it is.
      fsdp: whether each device keeps a part of the state, and has the parameters whole only while a step uses them.
      skip_nonfinite: as many steps whose loss or gradient is not finite change no weights; one more freezes the state.
    """

    classifier: Classifier
    optimizer: optax.GradientTransformation
    augmentation: Augmentation
    label_smoothing: float
    accumulate: int
    ema_decay: float
    seed: int
    multipliers: Rules = EVERYTHING
    fsdp: bool = False
    skip_nonfinite: int = 0

    def size_at(self, step: int) -> int:
        """The side of the pictures that step `step` trains on, pixels."""
        how = self.augmentation
        return how.small_size if step < how.small_steps else self.classifier.image_size


def zero_sums() -> dict[str, jax.Array]:
    return {name: jnp.zeros((), jnp.float32) for name in ("loss", "correct", "examples")}


def new_state(task: Task) -> TrainState:
    """The state before the first step, a function of the seed alone."""
    params = task.classifier.init(task.seed)
    ema = jax.tree.map(jnp.copy, params) if task.ema_decay else None
    trained, _ = partition(params, task.multipliers)
    none = jnp.zeros((), jnp.int32)
    return TrainState(none, params, ema, task.optimizer.init(trained), zero_sums(), none, jnp.zeros(()))


def abstract_state(task: Task) -> TrainState:
    """Shapes, dtypes and shardings of the state, without its arrays."""
    return meshes.with_sharding(jax.eval_shape(lambda: new_state(task)), task.classifier.mesh, task.fsdp)


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


def step_keys(seed: int, step: jax.Array) -> jax.Array:
    """The keys of a step's augmentation, mixing and dropout, in this order: [3]."""
    return jax.random.split(jax.random.fold_in(jax.random.key(seed), step), 3)


def augment(key: jax.Array, images: jax.Array, size: int, full_size: int, how: Augmentation) -> jax.Array:
    """What is done to each picture alone, uint8 [B, H, W, C] → uint8 [B, size, size, C].

    Where the whole picture would be `full_size` large, a smaller `size` is a crop of it.
    """
    crop_key, flip_key, policy_key, paste_key, erase_key = jax.random.split(key, 5)
    if how.crop == "pad":
        height, width = (n * size // full_size for n in images.shape[1:3])
        images = ops.random_crop(crop_key, images, how.padding, (height, width))
    elif how.crop == "resized":
        images = ops.random_resized_crop(crop_key, images, size, how.min_area)
    if how.flip:
        images = ops.random_flip(flip_key, images)
    if how.policy is not None:
        images = policies.augment(policy_key, images, how.policy)
    images = ops.resize(images, size)
    if how.crop_paste:
        images = mix.crop_paste(paste_key, images)
    if how.erasing:
        images = mix.erase(erase_key, images, how.erasing, how.erasing_fill, how.mean)
    return images


def training_pictures(
    task: Task, size: int, step: jax.Array, images: jax.Array, labels: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What the model sees of a batch at `step`: pictures, targets [B, K], and whether they may be mixed (bool []).

    `size` is the task's `size_at(step)`.
    """
    how, classifier = task.augmentation, task.classifier
    augment_key, mix_key, _ = step_keys(task.seed, step)
    if not isinstance(classifier, Probe):
        images = augment(augment_key, images, size, classifier.image_size, how)
    targets = optax.smooth_labels(jax.nn.one_hot(labels, classifier.num_classes), task.label_smoothing)
    if how.mixing is None:
        return images, targets, jnp.zeros((), bool)
    mixed = step < how.mix_steps
    images, targets = mix.mix(mix_key, images, targets, how.mixing, mixed)
    return images, targets, mixed


def cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Softmax cross-entropy with soft targets [B, K] → [B], in float32."""
    return optax.softmax_cross_entropy(logits.astype(jnp.float32), targets)


def train_step(task: Task, size: int, state: TrainState, images: jax.Array, labels: jax.Array) -> TrainState:
    """One optimizer step on uint8 images [B, H, W, C] and labels [B], cut or resized to `size`.

    Where the loss or the gradient's norm is not finite, weights, optimizer and sums stay as they are; the step counts
    if `task.skip_nonfinite` allows as many of them.
    """
    images, targets, mixed = training_pictures(task, size, state.step, images, labels)
    *_, dropout_key = step_keys(task.seed, state.step)
    mesh = task.classifier.mesh
    trained, frozen = partition(state.params, task.multipliers)

    def loss_fn(trained, part, images, labels, targets):
        rngs = {"dropout": jax.random.fold_in(dropout_key, part)}
        params = meshes.constrained(merge(trained, frozen), mesh)  # gathered, where the devices keep parts
        logits = task.classifier.apply(params, images, train=True, rngs=rngs)
        correct = jnp.sum(jnp.argmax(logits, -1) == labels).astype(jnp.float32)
        return jnp.mean(cross_entropy(logits, targets)), correct

    def add_part(total, part):
        (loss, correct), gradients = jax.value_and_grad(loss_fn, has_aux=True)(trained, *part)
        gradients = meshes.constrained(gradients, mesh, task.fsdp)
        return jax.tree.map(jnp.add, total, (loss, correct, gradients)), None

    parts = task.accumulate
    # Every device keeps its own examples: a part takes each `parts`-th of them.
    split = jax.tree.map(lambda x: x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1), (images, labels, targets))
    split = lax.with_sharding_constraint(split, meshes.second_axis_sharded(mesh))
    zeros = (jnp.zeros(()), jnp.zeros(()), jax.tree.map(jnp.zeros_like, trained))
    (loss, correct, gradients), _ = lax.scan(add_part, zeros, (jnp.arange(parts), *split))
    loss, gradients = jax.tree.map(lambda x: x / parts, (loss, gradients))

    updates, optimizer = task.optimizer.update(gradients, state.optimizer, trained)
    trained = optax.apply_updates(trained, updates)
    params, ema = merge(trained, frozen), state.ema
    if ema is not None:
        average, kept = partition(ema, task.multipliers)
        average = optim.update_ema(average, trained, optim.ema_decay(task.ema_decay, state.step))
        ema = merge(average, kept)
    correct = jnp.where(mixed, jnp.nan, correct)  # a mixed picture has no one class to be right about
    batch = {"loss": loss * len(labels), "correct": correct, "examples": jnp.float32(len(labels))}
    sums = jax.tree.map(jnp.add, state.sums, batch)

    norm = optax.tree.norm(gradients)
    finite = jnp.isfinite(loss) & jnp.isfinite(norm)
    skipped = state.skipped + ~finite
    count = state.step + (skipped <= task.skip_nonfinite)
    new, old = (params, ema, optimizer, sums), (state.params, state.ema, state.optimizer, state.sums)
    params, ema, optimizer, sums = jax.tree.map(functools.partial(jnp.where, finite), new, old)
    return TrainState(count, params, ema, optimizer, sums, skipped, norm)


Pick = Callable[..., tuple[jax.Array, jax.Array]]  # (i, mesh, *data) → a dispatch's i-th batch, images and labels


def pick_resident(
    i: jax.Array, mesh: Mesh, images: jax.Array, labels: jax.Array, indices: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Row i of the indices, int32 [T, B], taken from the whole split: uint8 [N, H, W, C] and int32 [N]."""
    index = lax.with_sharding_constraint(indices[i], meshes.batch_sharded(mesh))
    return images[index], labels[index]


def pick_streamed(i: jax.Array, mesh: Mesh, images: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The i-th of the batches that lie one after the other: uint8 [T, B, H, W, C] and int32 [T, B]."""
    return images[i], labels[i]


def make_train_steps(task: Task, size: int, pick: Pick) -> jax.stages.Wrapped:
    """One dispatch of training at a `size`: (state, count, *data) → (state, a copy of its progress).

    It makes `count` steps, up to one that freezes the state, on the batches that `pick` finds in the data. The state is
    donated.
    """
    mesh = task.classifier.mesh

    def train_steps(state, count, *data):
        def unfrozen(carry):
            i, state = carry
            return (i < count) & (state.skipped <= task.skip_nonfinite)

        def body(carry):
            i, state = carry
            return i + 1, train_step(task, size, state, *pick(i, mesh, *data))

        _, state = lax.while_loop(unfrozen, body, (jnp.int32(0), state))
        return state, state.progress

    where = jax.tree.map(lambda x: x.sharding, abstract_state(task))
    return jax.jit(train_steps, donate_argnums=0, out_shardings=(where, meshes.replicated(mesh)))


def make_features(probe: Probe) -> jax.stages.Wrapped:
    """(params, images uint8 [B, H, W, C]) → features, float32 [B, D]."""
    sharded = meshes.batch_sharded(probe.mesh)

    def features(params, images):
        images = lax.with_sharding_constraint(images, sharded)
        return probe.features(meshes.constrained(params, probe.mesh), images)

    return jax.jit(features, out_shardings=meshes.replicated(probe.mesh))


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
        params = meshes.constrained(params, classifier.mesh)

        def one(start):
            cut = functools.partial(lax.dynamic_slice_in_dim, start_index=start, slice_size=batch_size)
            return results(params, shard(cut(images)), shard(cut(labels)))

        batches = lax.map(one, jnp.arange(0, len(labels), batch_size))
        return jax.tree.map(lambda x: x.reshape(-1), batches)

    return jax.jit(evaluate, out_shardings=meshes.replicated(classifier.mesh))

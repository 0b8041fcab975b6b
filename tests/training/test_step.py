"""One training step and the evaluation: what they compute, and that nothing else changes it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vit_jax.data.load import Split
from vit_jax.models.vit import VisionTransformer
from vit_jax.training import dispatch, mesh, optim, step

PICTURES = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 3), np.uint8)
LABELS = np.random.default_rng(1).integers(0, 5, 40).astype(np.int32)
SPLIT = Split(PICTURES, LABELS, tuple("abcde"), (0.5,) * 3, (0.25,) * 3)
STILL = step.Augmentation("none", 1, 1.0, False)


def make_task(augmentation=STILL, label_smoothing=0.0, accumulate=1, ema_decay=0.0, seed=0, **model):
    fields = dict(patch_size=4, width=16, depth=2, num_heads=2, mlp_dim=24, pool="gap", head_zero_init=False) | model
    network = VisionTransformer(num_classes=5, **fields)
    classifier = step.Classifier(network, 8, (0.5,) * 3, (0.25,) * 3, mesh.make_mesh(-1))
    optimizer = optim.make_optimizer(
        "sgd", optax.constant_schedule(0.1), weight_decay=0.0, momentum=0.9, b2=0.999, clip_norm=0.0
    )
    return step.Task(classifier, optimizer, augmentation, label_smoothing, accumulate, ema_decay, seed)


@pytest.fixture(scope="module")
def one_step():
    return jax.jit(step.train_step, static_argnums=0)


def flat(tree):
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])


def test_a_step_follows_the_gradient_of_the_smoothed_cross_entropy(one_step):
    task = make_task(label_smoothing=0.2, ema_decay=0.5)
    state = step.init_state(task)

    def loss(params):
        inputs = (PICTURES / 255.0 - 0.5) / 0.25
        logp = jax.nn.log_softmax(task.classifier.model.apply({"params": params}, inputs, train=False))
        targets = 0.8 * np.eye(5)[LABELS] + 0.2 / 5
        return -jnp.mean(jnp.sum(targets * logp, -1)), logp

    (value, logp), gradient = jax.value_and_grad(loss, has_aux=True)(state.params)
    new = one_step(task, state, PICTURES, LABELS)
    np.testing.assert_allclose(flat(new.params), flat(state.params) - 0.1 * flat(gradient), atol=1e-6)
    assert float(new.sums["loss"]) == pytest.approx(40 * float(value), rel=1e-5)
    assert float(new.sums["correct"]) == np.sum(np.argmax(logp, -1) == LABELS)
    assert float(new.sums["examples"]) == 40 and int(new.step) == 1
    # decay min(0.5, 1/10) at step 0
    np.testing.assert_allclose(flat(new.ema), 0.1 * flat(state.params) + 0.9 * flat(new.params), atol=1e-6)


def test_accumulated_parts_give_the_gradient_of_the_whole_batch(one_step):
    states = []
    for parts in (1, 4):
        task = make_task(accumulate=parts, augmentation=step.Augmentation("pad", 2, 1.0, True))
        states.append(one_step(task, step.init_state(task), PICTURES, LABELS))
    np.testing.assert_allclose(flat(states[0].params), flat(states[1].params), atol=1e-6)
    assert states[0].sums["correct"] == states[1].sums["correct"]


def test_randomness_is_a_function_of_seed_and_step_alone(one_step):
    task = make_task(augmentation=step.Augmentation("pad", 2, 1.0, True), dropout=0.3)
    state = step.init_state(task)
    first, again = one_step(task, state, PICTURES, LABELS), one_step(task, state, PICTURES, LABELS)
    np.testing.assert_array_equal(flat(first.params), flat(again.params))
    later = one_step(task, state.replace(step=jnp.int32(1)), PICTURES, LABELS)
    other = one_step(dataclasses.replace(task, seed=1), state, PICTURES, LABELS)
    assert not np.array_equal(flat(first.params), flat(later.params))
    assert not np.array_equal(flat(first.params), flat(other.params))


def test_steps_a_dispatch_change_nothing():
    task = make_task(augmentation=step.Augmentation("pad", 2, 1.0, True), dropout=0.3, ema_decay=0.9)
    ends = []
    for stops in ([12], [1, 2, 7, 12], list(range(1, 13))):
        state = step.init_state(task)
        run = dispatch.Dispatcher(task, state, SPLIT, batch_size=16)
        first = 0
        for stop in stops:
            state, sums = run(state, first, stop)
            first = stop
        ends.append(flat(state))
        np.testing.assert_array_equal(flat(sums), flat(state.sums))
        assert float(sums["examples"]) == 12 * 16
    np.testing.assert_array_equal(ends[0], ends[1])
    np.testing.assert_array_equal(ends[0], ends[2])


def test_a_dispatch_trains_on_the_pictures_of_its_steps(one_step):
    task = make_task()
    run = dispatch.Dispatcher(task, step.init_state(task), SPLIT, batch_size=16)
    state = step.init_state(task)
    for i in range(5):  # 80 pictures: two epochs of 40, with a batch across their border
        index = run._order(i, 1)[0]
        state = one_step(task, state, PICTURES[index], LABELS[index])
    dispatched, _ = run(step.init_state(task), 0, 5)
    np.testing.assert_allclose(flat(dispatched.params), flat(state.params), atol=1e-6)


def test_a_dispatch_is_given_the_state_to_keep():
    """Donated: the new state lies where the old one did, but for what the caller gets a copy of."""
    task = make_task(ema_decay=0.9)
    state = step.init_state(task)
    run = dispatch.Dispatcher(task, state, SPLIT, batch_size=16)
    reused = run._train_steps.memory_analysis().alias_size_in_bytes
    assert reused >= sum(x.nbytes for x in jax.tree.leaves(state))
    run(state, 0, 1)
    assert all(x.is_deleted() for x in jax.tree.leaves(state))


def test_broken_weights_are_noticed():
    assert step.all_finite({"a": jnp.ones(3), "b": jnp.zeros(())})
    assert not step.all_finite({"a": jnp.array([1.0, jnp.inf]), "b": jnp.zeros(())})


@pytest.mark.parametrize("size, batch_size", [(40, 8), (40, 16), (37, 16), (3, 16)])
def test_evaluation_counts_every_example_once(size, batch_size):
    task = make_task()
    classifier, params = task.classifier, step.init_state(task).params
    split = Split(PICTURES[:size], LABELS[:size], tuple("abcde"), (0.5,) * 3, (0.25,) * 3)
    results = dispatch.make_evaluator(classifier, split, batch_size)(params)
    logits = np.asarray(classifier.logits(params, jnp.asarray(split.images)), np.float64)
    probability = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    own = probability[np.arange(size), split.labels]
    np.testing.assert_allclose(results["loss"], -np.log(own), rtol=1e-4)
    np.testing.assert_array_equal(results["prediction"], logits.argmax(-1))
    np.testing.assert_array_equal(results["correct"], logits.argmax(-1) == split.labels)
    np.testing.assert_allclose(results["confidence"], probability.max(-1), rtol=1e-4)
    assert results["correct_top5"].all()  # five classes


def test_top5_of_more_than_five_classes():
    task = make_task()
    network = task.classifier.model.clone(num_classes=9)
    classifier = dataclasses.replace(task.classifier, model=network)
    params = classifier.init(0)
    results = dispatch.make_evaluator(classifier, SPLIT, 8)(params)
    logits = np.asarray(classifier.logits(params, jnp.asarray(PICTURES)))
    better = np.sum(logits > logits[np.arange(40), LABELS][:, None], axis=-1)
    np.testing.assert_array_equal(results["correct_top5"], better < 5)
    assert 0 < results["correct_top5"].mean() < 1


def test_evaluation_sees_the_pictures_as_they_are(one_step):
    """Crops and flips change training only, dropout too."""
    still = make_task()
    moved = make_task(augmentation=step.Augmentation("resized", 4, 0.1, True), dropout=0.5)
    params = step.init_state(still).params
    results = [dispatch.make_evaluator(task.classifier, SPLIT, 8)(params) for task in (still, moved)]
    np.testing.assert_array_equal(results[0]["loss"], results[1]["loss"])
    losses = [
        one_step(t, step.init_state(t).replace(params=params), PICTURES, LABELS).sums["loss"] for t in (still, moved)
    ]
    assert losses[0] != losses[1]


def test_bfloat16_computes_in_bfloat16_and_keeps_float32(one_step):
    task = make_task(dtype=jnp.bfloat16, ema_decay=0.9)
    state = one_step(task, step.init_state(task), PICTURES, LABELS)
    assert {x.dtype.name for x in jax.tree.leaves((state.params, state.ema, state.sums))} == {"float32"}
    full = make_task(ema_decay=0.9)
    exact = one_step(full, step.init_state(full), PICTURES, LABELS)
    difference = abs(float(state.sums["loss"] - exact.sums["loss"])) / float(exact.sums["loss"])
    assert 0 < difference < 0.02


def test_pictures_are_resized_to_the_models_input(one_step):
    task = make_task()
    larger = dataclasses.replace(task, classifier=dataclasses.replace(task.classifier, image_size=16))
    state = one_step(larger, step.init_state(larger), PICTURES, LABELS)
    assert state.params["Transformer"]["posembed_input"]["pos_embedding"].shape == (1, 16, 16)
    assert len(dispatch.make_evaluator(larger.classifier, SPLIT, 8)(state.params)["loss"]) == 40

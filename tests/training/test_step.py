"""One training step and the evaluation: what they compute, and that nothing else changes it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vit_jax.augment import mix, ops, policies
from vit_jax.data.resident import BatchIndices
from vit_jax.data.splits import Split
from vit_jax.models.vit import VisionTransformer
from vit_jax.training import dispatch, mesh, optim, step

PICTURES = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 3), np.uint8)
LABELS = np.random.default_rng(1).integers(0, 5, 40).astype(np.int32)
SPLIT = Split(PICTURES, LABELS, tuple("abcde"), (0.5,) * 3, (0.25,) * 3)
STILL = step.Augmentation()
MOVED = step.Augmentation(crop="pad", padding=2, flip=True)
MIXED = mix.Mixing(mixup=0.8, cutmix=1.0, probability=1.0, cutmix_share=0.5, per_example=False)
EVERYTHING = step.Augmentation(
    crop="resized",
    min_area=0.3,
    flip=True,
    policy=policies.Policy("randaugment", only=("rotate", "equalize", "color")),
    crop_paste=True,
    erasing=0.5,
    mixing=MIXED,
    mix_steps=7,
)


def make_task(augmentation=STILL, label_smoothing=0.0, accumulate=1, ema_decay=0.0, seed=0, **model):
    fields = dict(patch_size=4, width=16, depth=1, num_heads=2, mlp_dim=24, pool="gap", head_zero_init=False) | model
    network = VisionTransformer(num_classes=5, **fields)
    classifier = step.Classifier(network, 8, (0.5,) * 3, (0.25,) * 3, mesh.make_mesh(-1))
    optimizer = optim.make_optimizer(
        "sgd", optax.constant_schedule(0.1), weight_decay=0.0, momentum=0.9, b2=0.999, clip_norm=0.0
    )
    return step.Task(classifier, optimizer, augmentation, label_smoothing, accumulate, ema_decay, seed)


@pytest.fixture(scope="module")
def one_step():
    jitted = jax.jit(step.train_step, static_argnums=(0, 1))
    return lambda task, state, *batch: jitted(task, task.size_at(int(state.step)), state, *batch)


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


@pytest.mark.parametrize("per_example", [False, True])
def test_accumulated_parts_give_the_gradient_of_the_whole_batch(one_step, per_example):
    states = []
    mixed = dataclasses.replace(MOVED, mixing=dataclasses.replace(MIXED, per_example=per_example), mix_steps=1)
    for parts in (1, 4):
        task = make_task(accumulate=parts, augmentation=mixed)
        states.append(one_step(task, step.init_state(task), PICTURES, LABELS))
    np.testing.assert_allclose(flat(states[0].params), flat(states[1].params), atol=1e-6)
    assert float(states[0].sums["loss"]) == pytest.approx(float(states[1].sums["loss"]), rel=1e-5)
    states = [one_step(t, step.init_state(t), PICTURES, LABELS) for t in (make_task(), make_task(accumulate=4))]
    assert states[0].sums["correct"] == states[1].sums["correct"]


def test_randomness_is_a_function_of_seed_and_step_alone(one_step):
    task = make_task(augmentation=MOVED, dropout=0.3)
    state = step.init_state(task)
    first, again = one_step(task, state, PICTURES, LABELS), one_step(task, state, PICTURES, LABELS)
    np.testing.assert_array_equal(flat(first.params), flat(again.params))
    later = one_step(task, state.replace(step=jnp.int32(1)), PICTURES, LABELS)
    other = one_step(dataclasses.replace(task, seed=1), state, PICTURES, LABELS)
    assert not np.array_equal(flat(first.params), flat(later.params))
    assert not np.array_equal(flat(first.params), flat(other.params))


def test_steps_a_dispatch_change_nothing():
    task = make_task(augmentation=EVERYTHING, dropout=0.3, ema_decay=0.9)
    ends = []
    for stops in ([12], [1, 2, 7, 12], list(range(1, 13))):
        state = step.init_state(task)
        run = dispatch.Dispatcher(task, state, SPLIT, batch_size=16)
        first = 0
        for stop in stops:
            state, done = run(state, first, stop)
            first = stop
        ends.append(flat(state))
        np.testing.assert_array_equal(flat(done), flat(state.progress))
        assert float(done["sums"]["examples"]) == 12 * 16
    np.testing.assert_array_equal(ends[0], ends[1])
    np.testing.assert_array_equal(ends[0], ends[2])


def test_a_dispatch_trains_on_the_pictures_of_its_steps(one_step):
    task = make_task()
    run = dispatch.Dispatcher(task, step.init_state(task), SPLIT, batch_size=16)
    state = step.init_state(task)
    order = BatchIndices(task.seed, 40, 16)
    for i in range(5):  # 80 pictures: two epochs of 40, with a batch across their border
        index = order(i, 1)[0]
        state = one_step(task, state, PICTURES[index], LABELS[index])
    dispatched, _ = run(step.init_state(task), 0, 5)
    np.testing.assert_allclose(flat(dispatched.params), flat(state.params), atol=1e-6)


def test_streamed_pictures_give_the_same_numbers(monkeypatch):
    """From any step on; also where no more than three steps' pictures may be on the way at once."""
    monkeypatch.setattr(dispatch, "STREAMED_BYTES", 3 * 16 * PICTURES[0].size)
    task = make_task(augmentation=MOVED, dropout=0.3)
    ends = []
    for placement, stops in (("whole", [9]), ("streamed", [9]), ("streamed", [1, 6, 9])):
        state = step.init_state(task)
        run = dispatch.Dispatcher(task, state, SPLIT, 16, placement)
        for first, stop in zip([0, *stops], stops, strict=False):
            state, _ = run(state, first, stop)
        ends.append(flat(state))
    np.testing.assert_allclose(ends[1], ends[0], atol=1e-6)
    np.testing.assert_array_equal(ends[2], ends[1])
    results = [
        dispatch.make_evaluator(task.classifier, SPLIT, 16, streamed)(state.params) for streamed in (False, True)
    ]
    for name, values in results[0].items():
        np.testing.assert_allclose(results[1][name], values, rtol=1e-5, err_msg=name)


def test_a_dispatch_is_given_the_state_to_keep():
    """Donated: the new state lies where the old one did, but for what the caller gets a copy of."""
    task = make_task(ema_decay=0.9)
    state = step.init_state(task)
    run = dispatch.Dispatcher(task, state, SPLIT, batch_size=16)
    reused = run.programs[8].memory_analysis().alias_size_in_bytes
    assert reused >= sum(x.nbytes for x in jax.tree.leaves(state))
    run(state, 0, 1)
    assert all(x.is_deleted() for x in jax.tree.leaves(state))


def test_mixed_pictures_have_mixed_targets_until_mixing_ends(one_step):
    task = make_task(augmentation=dataclasses.replace(STILL, mixing=MIXED, mix_steps=7), label_smoothing=0.1)
    seen = functools.partial(jax.jit(step.training_pictures, static_argnums=(0, 1)), task, 8)
    images, targets, mixed = seen(jnp.int32(6), PICTURES, LABELS)
    one_hot = 0.9 * np.eye(5)[LABELS] + 0.1 / 5
    others = np.arange(len(LABELS)) ^ 1
    partners, differ = one_hot[others], LABELS != LABELS[others]
    share = ((targets - partners) / (one_hot - partners + (one_hot == partners)))[differ].max(axis=1)
    assert mixed and np.ptp(share) < 1e-5 and 0 < share[0] < 1  # by the batch
    np.testing.assert_allclose(targets, share[0] * one_hot + (1 - share[0]) * partners, atol=1e-6)
    assert (images != PICTURES).any()
    images, targets, mixed = seen(jnp.int32(7), PICTURES, LABELS)
    assert not mixed
    np.testing.assert_array_equal(images, PICTURES)
    np.testing.assert_allclose(targets, one_hot, atol=1e-6)


def test_where_labels_are_mixed_there_is_no_accuracy(one_step):
    task = make_task(augmentation=dataclasses.replace(STILL, mixing=MIXED, mix_steps=1))
    state = step.init_state(task)
    first = one_step(task, state, PICTURES, LABELS)
    later = one_step(task, state.replace(step=jnp.int32(1)), PICTURES, LABELS)
    assert np.isnan(first.sums["correct"]) and np.isfinite(first.sums["loss"])
    assert later.sums["correct"] == one_step(make_task(), state, PICTURES, LABELS).sums["correct"]


@pytest.mark.parametrize(
    "how",
    [
        dict(policy=policies.Policy("trivialaugment", only=("invert",))),
        dict(crop_paste=True),
        dict(erasing=1.0, erasing_fill="mean", mean=(0.0, 1.0, 0.0)),
    ],
    ids=str,
)
def test_each_kind_of_augmentation_is_used(how):
    images = step.augment(jax.random.key(0), jnp.asarray(PICTURES), 8, 8, step.Augmentation(**how))
    if "policy" in how:
        np.testing.assert_array_equal(images, 255 - PICTURES)
    elif "erasing" in how:
        erased = (images == np.array([0, 255, 0])).all(axis=-1)
        assert erased.any(axis=(1, 2)).all() and (images == PICTURES)[~erased].all()
    else:
        expected = mix.crop_paste(jax.random.split(jax.random.key(0), 5)[3], jnp.asarray(PICTURES))
        np.testing.assert_array_equal(images, expected)
        assert (images != PICTURES).any()


def test_policies_work_on_the_stored_pictures_and_erasing_on_the_resized_ones():
    """Operations cost by the pixel, so they come before pictures are enlarged; boxes are whole pixels of the input."""
    how = step.Augmentation(policy=policies.Policy("trivialaugment", only=("equalize",)), erasing=1.0)
    keys = jax.random.split(jax.random.key(0), 5)
    expected = ops.resize(policies.augment(keys[2], jnp.asarray(PICTURES), how.policy), 16)
    expected = mix.erase(keys[4], expected, 1.0, "pixel", ())
    np.testing.assert_array_equal(step.augment(jax.random.key(0), jnp.asarray(PICTURES), 16, 16, how), expected)


def test_small_crops_first_then_whole_pictures(one_step):
    """One patch of 4 pixels at first, anywhere in the padded picture; then all four."""
    small = dataclasses.replace(MOVED, padding=1, small_size=4, small_steps=3)
    task = make_task(augmentation=small)
    assert [task.size_at(i) for i in (0, 2, 3, 9)] == [4, 4, 8, 8]
    seen = functools.partial(jax.jit(step.training_pictures, static_argnums=(0, 1)), task)
    crops = np.asarray(seen(4, jnp.int32(0), PICTURES, LABELS)[0])
    padded = np.pad(PICTURES, ((0, 0), (1, 1), (1, 1), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (4, 4), axis=(1, 2)).transpose(0, 1, 2, 4, 5, 3)
    windows = np.stack([windows, windows[:, :, :, :, ::-1]], axis=1)  # or mirrored
    matches = (windows == crops[:, None, None, None]).all(axis=(4, 5, 6)).any(axis=1)  # [B, 7, 7]
    assert matches.any(axis=(1, 2)).all() and matches.any(axis=0).sum() > 20  # anywhere
    run = dispatch.Dispatcher(task, step.init_state(task), SPLIT, batch_size=16)
    state, _ = run(step.init_state(task), 0, 3)
    by_hand, order = step.init_state(task), BatchIndices(task.seed, 40, 16)
    for i in range(3):
        index = order(i, 1)[0]
        by_hand = one_step(task, by_hand, PICTURES[index], LABELS[index])
    np.testing.assert_allclose(flat(state.params), flat(by_hand.params), atol=1e-6)
    state, done = run(state, 3, 6)
    assert float(done["sums"]["examples"]) == 96 and np.isfinite(float(done["sums"]["loss"]))


@pytest.mark.parametrize("size, small", [(16, 12), (16, 16), (4, 4)])
def test_crops_of_pictures_of_another_size_than_the_models(size, small):
    """Stored with 8 pixels: padded and cut as stored, at most as large a part as the crop is of the input."""
    how = step.Augmentation(crop="pad", padding=1, repeats=1)
    found = step.augment(jax.random.key(0), jnp.asarray(PICTURES), small, size, how)
    side = 8 * small // size
    cut = ops.random_crop(jax.random.split(jax.random.key(0), 5)[0], jnp.asarray(PICTURES), 1, (side, side))
    assert found.shape == (40, small, small, 3)
    np.testing.assert_array_equal(found, ops.resize(cut, small))


def test_a_batch_holds_its_pictures_as_often_as_asked():
    task = make_task(augmentation=step.Augmentation(repeats=4))
    run = dispatch.Dispatcher(task, step.init_state(task), SPLIT, batch_size=16)
    indices = np.asarray(run._feed(0, 10)[2])[:10]  # every picture, four times
    assert indices.shape == (10, 16)
    assert all(len(set(batch)) == 4 for batch in indices)
    np.testing.assert_array_equal(np.sort(indices, axis=None), np.repeat(np.arange(40), 4))
    state, done = run(step.init_state(task), 0, 3)
    assert float(done["sums"]["examples"]) == 48


class Breaking(step.Classifier):
    """One whose loss is not a number for a white picture, and its gradient alone for a black one."""

    def apply(self, params, images, train, rngs=None):
        logits = super().apply(params, images, train, rngs)
        white, black = (jnp.all(images == level, axis=(1, 2, 3))[:, None] for level in (255, 0))
        steep = jnp.sqrt(jnp.where(black, 0 * logits, 1)) - ~black
        return jnp.where(white, jnp.nan, logits + steep)


def test_steps_that_are_not_finite_are_skipped_then_freeze_the_state():
    optimizer = optim.make_optimizer(
        "adamw", optax.constant_schedule(0.1), weight_decay=0.1, momentum=0.9, b2=0.9, clip_norm=1.0
    )
    task = make_task(accumulate=2, ema_decay=0.9)
    fields = {field.name: getattr(task.classifier, field.name) for field in dataclasses.fields(task.classifier)}
    task = dataclasses.replace(task, optimizer=optimizer, classifier=Breaking(**fields), skip_nonfinite=1)
    images = PICTURES.copy()
    images[38], images[39] = 0, 255
    run = dispatch.Dispatcher(task, step.init_state(task), dataclasses.replace(SPLIT, images=images), batch_size=4)
    order = BatchIndices(task.seed, 40, 4)(0, 10)  # an epoch
    black, white = (int(np.flatnonzero((order == i).any(axis=1))[0]) for i in (38, 39))
    first, second = sorted((black, white))
    assert 0 < first and first + 1 < second

    by_hand = step.init_state(task)
    for i in range(second):
        if i == first:
            by_hand = by_hand.replace(step=by_hand.step + 1)
        else:
            by_hand, done = run(by_hand, i, i + 1)
    assert int(done["skipped"]) == 0
    expected = flat((by_hand.params, by_hand.ema, by_hand.optimizer, by_hand.sums))
    assert np.isfinite(expected).all() and by_hand.sums["examples"] == 4 * (second - 1)

    state = step.init_state(task)
    for start in (0, 12):  # the loop may have sent off the next dispatch
        state, done = run(state, start, start + 12)
        assert (int(done["step"]), int(done["skipped"])) == (second, 2)
        assert np.isnan(done["norm"]) == (second == black)
        np.testing.assert_array_equal(flat((state.params, state.ema, state.optimizer, state.sums)), expected)


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
    """Whatever is done to pictures changes training only, dropout too."""
    still = make_task()
    moved = make_task(augmentation=EVERYTHING, dropout=0.5)
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

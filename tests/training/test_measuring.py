"""What is measured, and how rows are made of it; the clock itself is not tested."""

import dataclasses
import os
import time

import jax
import numpy as np
import pytest

from vit_jax import command_line
from vit_jax.config import FIELDS, get
from vit_jax.data import sources
from vit_jax.data.splits import Split
from vit_jax.errors import RunError
from vit_jax.training import comparing, cost, measuring, mesh, rows, setup
from vit_jax.training.step import Augmentation, augment

ONE = measuring.Pace(windows=1, seconds=0.0)
TINY = {"width": 16, "depth": 1, "num_heads": 2, "mlp_dim": 16}
FLAT = [f"--config.model.{name}={value}" for name, value in TINY.items()]


def config_of(file, *overrides):
    return command_line.parse(f"configs/{file}", overrides)[0]


@pytest.fixture(scope="module")
def subject():
    config = config_of("digits.py", *FLAT, "--config.train.steps=24", "--config.train.steps_per_call=3")
    return measuring.opened(config)


@pytest.fixture(scope="module")
def measured(subject):
    row, training = measuring.measure(subject, measuring.Pace(windows=3, seconds=0.0), 1.25)
    return row, training, training.step  # tests make more steps


# FLOPs


def block(n, d, m):
    """Multiplications of one block's forward pass for n tokens: q, k, v; scores; values; out; the MLP's two."""
    return n * d * 3 * d + n * n * d + n * n * d + n * d * d + n * d * m + n * m * d


@pytest.mark.parametrize(
    "file, multiplications",
    [
        ("cifar100_tiny.py", 64 * 48 * 192 + 6 * block(64, 192, 256) + 192 * 100),
        ("cifar100_tiny.py:reference", 64 * 48 * 192 + 6 * block(65, 192, 256) + 192 * 100),
        ("cifar100_vit.py:reference", 64 * 48 * 384 + 7 * block(65, 384, 384) + 384 * 100),
        # 16x16 places see 3x3x3 numbers, then 8x8 places 3x3x128; the patch embedding is 1x1
        (
            "cifar100_vit.py",
            256 * 27 * 128 + 64 * 1152 * 256 + 64 * 256 * 256 + 11 * block(64, 256, 512) + 256 * 100,
        ),
        ("cifar100_b16.py", 196 * 768 * 768 + 12 * block(197, 768, 3072) + 768 * 100),
        ("cifar100_tiny.py:cpu", None),
    ],
)
def test_flops_by_hand(file, multiplications):
    config = setup.resolve_model(config_of(file))
    split = Split(np.zeros((9, 32, 32, 3), np.uint8), np.zeros(9, np.int32), tuple("ab"), (0.5,) * 3, (0.5,) * 3)
    one = mesh.make_mesh(1)
    config = setup.resolve_data(config, split, one)
    flops = cost.flops_per_image(setup.make_classifier(config, 100, one))
    assert flops == (multiplications and 3 * 2 * multiplications)


# What is trained


def test_bare_is_without_what_is_random_and_without_average():
    config = config_of("cifar10_vit.py", "--config.model.dropout=0.1", "--config.model.attention_dropout=0.1")
    stripped = measuring.bare(config)
    different = {path for path in FIELDS if get(config, path) != get(stripped, path)}
    assert different - {"model.dropout", "model.attention_dropout", "model.drop_path", "ema.decay"} == {
        path for path in different if path.startswith("augment.")
    }
    left = setup.make_augmentation(setup.resolve_model(stripped), setup.Plan(9, 0, frozenset(), frozenset()))
    images = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), np.uint8)
    np.testing.assert_array_equal(augment(jax.random.key(0), images, 8, 8, left), images)
    assert left.mixing is None and left.repeats == 1
    assert stripped.ema.decay == stripped.model.drop_path == stripped.model.dropout == 0


def test_pictures_that_are_not_here_are_made_up_and_said_to_be(tmp_path, monkeypatch):
    monkeypatch.setitem(sources.PUBLIC, "cifar100", sources.PUBLIC["cifar100"]._replace(train=300, test=40))
    missing = ["--config.data.holdout=0.1", f"--config.data.dir={tmp_path}", *FLAT]
    subject = measuring.opened(config_of("cifar100_tiny.py", *missing, "--config.train.batch_size=10"))
    train, test = subject.splits.train, subject.splits.watched
    assert subject.fabricated and train.images.shape == (270, 32, 32, 3) and len(test.labels) == 40
    assert subject.job.classifier.num_classes == 100 and train.labels.max() < 100 and np.ptp(train.images) == 255


def test_whole_pictures_are_timed_where_a_run_begins_with_crops():
    crops = ["--config.augment.small_size=6", "--config.augment.small_until=0.5"]
    subject = measuring.opened(config_of("digits.py", *FLAT, *crops))
    assert subject.job.plan.small == 0 and subject.job.task.size_at(0) == 8


def test_a_probe_is_timed_on_features():
    config = config_of("cifar10_b16.py:head", *FLAT, "--config.data.name=digits", "--config.data.image_size=8")
    config.model.update({"preset": "", "patch_size": 4})
    subject = measuring.opened(config)
    assert subject.splits.train.images.shape == (1438, 16) and subject.job.flops is None


def test_steps_that_are_not_made_have_no_speed():
    subject = measuring.opened(config_of("digits.py", *FLAT, "--config.optim.learning_rate=1e30"))
    training = measuring.Training(subject)
    with pytest.raises(RunError, match="not finite at step"):
        training(9)


# Rows


def test_a_row_says_what_the_contract_says(subject, measured):
    row, training, step = measured
    assert row["images_per_second"] * row["milliseconds_per_step"] == pytest.approx(1e3 * row["batch_size"])
    assert row["parameters"] == sum(x.size for x in jax.tree.leaves(training.state.params))
    assert row["mfu"] is None and row["device"] == "cpu" and row["batch_size"] == 64
    assert row["flops_per_image"] == 3 * 2 * (16 * 4 * 16 + block(16, 16, 16) + 16 * 10)
    cold, warm = row["startup_seconds"]["cold"], row["startup_seconds"]["warm"]
    assert cold["compile"] == row["compile_seconds"] > 0 and warm["compile"] == row["compile_seconds_warm"]
    for seconds in (cold, warm):
        assert seconds["import"] == 1.25 and seconds["data"] == subject.data_seconds
        assert seconds["total"] == pytest.approx(sum(s for name, s in seconds.items() if name != "total"))
    assert row["peak_memory_bytes"] > subject.splits.train.images.nbytes
    assert row["peak_host_memory_bytes"] > row["peak_memory_bytes"]
    assert row["steps_per_call"] == 3 and row["windows"] == 3 and row["versions"]["jax"] == jax.__version__
    assert not row["fabricated"] and row["placement"] == "whole" and row["devices"] == subject.job.classifier.mesh.size
    assert step == 1 + 3 + 3 * row["steps_per_window"]


def test_the_usual_compilation_cache_is_back(measured):
    assert jax.config.values["jax_compilation_cache_dir"] == os.environ["JAX_COMPILATION_CACHE_DIR"]


def test_the_second_start_reads_what_the_first_compiled(subject):
    kept = dict.fromkeys(("jax_persistent_cache_min_compile_time_secs", "jax_persistent_cache_min_entry_size_bytes"), 0)
    before = {name: jax.config.values[name] for name in kept}
    found = []
    jax.monitoring.register_event_listener(listener := lambda name, **_: found.append(name.rpartition("/")[2]))
    try:
        for name, value in kept.items():
            jax.config.update(name, value)
        measuring.started(subject)
    finally:
        jax.monitoring.unregister_event_listener(listener)
        for name, value in before.items():
            jax.config.update(name, value)
    assert found.count("cache_hits") == found.count("cache_misses") > 1


def test_speed_is_the_median_and_mfu_by_the_peak(subject, monkeypatch):
    monkeypatch.setattr(setup, "peak_flops", lambda kind: 1e9)
    row = measuring.rates(subject, [1.0, 4.0, 2.0])
    assert row["images_per_second"] == 128 and row["milliseconds_per_step"] == 500 and row["spread"] == 1.5
    assert row["mfu"] == pytest.approx(128 * row["flops_per_image"] / 1e9 / subject.job.classifier.mesh.size)


def test_parts_by_leaving_them_out(subject, monkeypatch):
    class Timed:
        """Takes as long as what it has been given to do."""

        def __init__(self, subject, task, steps_per_call=3):
            self.seconds = 6.0
            self.seconds += 3.0 * (task.augmentation != Augmentation())
            self.seconds += 1.0 * (task.optimizer is subject.job.task.optimizer and task.ema_decay > 0)
            self.steps_per_call = steps_per_call

        def __call__(self, steps):
            assert steps == 6
            return self.seconds

    monkeypatch.setattr(measuring, "Training", Timed)
    monkeypatch.setattr(measuring, "evaluation_seconds", lambda *_: (0.5, 0.4))
    monkeypatch.setattr(measuring, "checkpoint_seconds", lambda *_: 0.25)
    plan = setup.Plan(24, 0, frozenset({9, 18, 24}), frozenset({12, 24}))
    subject = dataclasses.replace(subject, job=dataclasses.replace(subject.job, plan=plan))
    parts = measuring.parts(subject, Timed(subject, subject.job.task), 6, ONE)
    assert parts["augmentation"] == pytest.approx(0.3) and parts["optimizer_and_ema"] == pytest.approx(0.1)
    total = 24 * 10 / 6 + 3 * 2 * 0.5 + 2 * 0.25  # each evaluation measures raw and averaged weights
    assert parts["evaluation"] == pytest.approx(3 / total) and parts["checkpointing"] == pytest.approx(0.5 / total)
    assert parts["evaluation_seconds"] == 1.0 and parts["evaluation_of_forward"] == pytest.approx(0.8)


def test_parts_of_a_real_run(subject, measured):
    _, training, _ = measured
    step = training.step
    begun = time.perf_counter()
    parts = measuring.parts(subject, training, 3, ONE)
    whole = time.perf_counter() - begun
    assert training.step == step + 3 + 2 * 3  # with all, and twice with a checkpoint
    assert 0 < parts["evaluation"] < 1 and 0 < parts["evaluation_seconds"] < 2 * whole  # of raw and averaged weights
    assert 0 < parts["evaluation_of_forward"] * parts["evaluation_seconds"] < 2 * whole


def test_the_costliest_kernels_of_a_profile(measured, tmp_path):
    _, training, _ = measured
    kernels = measuring.profile(training, tmp_path / "trace")
    assert len(kernels) == 10 and 0 < sum(kernel["share"] for kernel in kernels) <= 1
    assert list(tmp_path.glob("trace/plugins/profile/*/*.xplane.pb"))
    assert any("while/body" in kernel["where"] for kernel in kernels)
    assert all(kernel["name"] in rows.describe_kernels(kernels) for kernel in kernels)


def test_the_peer_is_told_the_resolved_config(subject):
    told = comparing.specification(subject)
    assert told["model"]["depth"] == 1 and told["model"]["gelu"] == "tanh" and told["model"]["norm_epsilon"] == 1e-6
    assert told["optimizer"]["name"] == "muon" and told["batch_size"] == 64 and told["channels"] == 1

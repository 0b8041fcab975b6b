"""The loop's words and rows where something went wrong."""

import types

import numpy as np
import pytest

from vit_jax.config import default_config
from vit_jax.errors import RunError, UserError
from vit_jax.training import loop


def of_run(step, skipped, allowed, **sums):
    """A run, and what it fetched after a dispatch."""
    config = default_config()
    config.train.skip_nonfinite = allowed
    job = types.SimpleNamespace(config=config, schedule=lambda step: 0.5 * step)
    run = types.SimpleNamespace(job=job, epochs=lambda step: step / 10)
    done = {"step": np.int32(step), "skipped": np.int32(skipped), "norm": np.float32("nan"), "sums": sums}
    return run, done


def test_a_row_of_skipped_steps_alone_is_empty_and_all_of_it_finite():
    run, done = of_run(7, 7, 9, loss=np.float32(0), correct=np.float32(0), examples=np.float32(0))
    row = loop._row(run, done)
    assert row == {"step": 7, "epoch": 0.7, "learning_rate": 0, "train_loss": None, "train_accuracy": None}
    measured = {"val_accuracy": 0.5, "ema_val_accuracy": None, "images_per_second": 1.0}
    assert "loss none" in loop._describe(row | measured, 10)


def test_the_rate_is_the_optimizers_which_does_not_count_skipped_steps():
    run, done = of_run(7, 2, 9, loss=np.float32(6), correct=np.float32(1), examples=np.float32(4))
    row = loop._row(run, done)
    assert (row["learning_rate"], row["train_loss"], row["train_accuracy"]) == (2.0, 1.5, 0.25)


def test_one_step_too_many_ends_the_run():
    run, done = of_run(7, 2, 2)
    loop._check_unfrozen(run.job, done)
    run, done = of_run(7, 3, 2)
    with pytest.raises(RunError, match=r"not finite at step 7 \(learning rate 2.5, gradient norm nan\)"):
        loop._check_unfrozen(run.job, done)


def test_a_run_that_goes_on_may_not_be_allowed_less_than_it_skipped():
    config = default_config()
    config.train.skip_nonfinite = 2
    loop._check_allowed(config, 2)
    with pytest.raises(UserError, match="train.skip_nonfinite=2, .* skipped 3 updates"):
        loop._check_allowed(config, 3)


def test_out_of_memory_names_the_sizes_and_what_is_left_to_lower():
    config = default_config()
    config.train.batch_size, config.optim.accumulate, config.model.remat = 96, 4, True
    with pytest.raises(RunError) as error, loop._sizes_named(config):
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 bytes")
    told = str(error.value)
    assert "out of memory with 24 pictures at once" in told and "train.batch_size (now 96)" in told
    assert "optim.accumulate (now 4)" in told and "train.dtype=bfloat16" in told and "remat" not in told
    config.optim.accumulate = 0  # chosen for the machine, which the config does not know
    with pytest.raises(RunError, match=r"with batches of 96: .*optim.accumulate \(now automatic\)"):
        with loop._sizes_named(config):
            raise MemoryError
    with pytest.raises(ValueError, match="No space left"), loop._sizes_named(config):
        raise ValueError("RESOURCE_EXHAUSTED: Failed writing: No space left on device")  # tensorstore's

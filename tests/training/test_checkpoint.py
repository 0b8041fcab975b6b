"""Checkpoints: what comes back, which are kept, and what a damaged or foreign one says."""

import contextlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_jax.errors import UserError
from vit_jax.training.checkpoint import Checkpoints
from vit_jax.training.step import TrainState


def state_of(step, ema=True, width=3):
    params = {"head": {"kernel": jnp.full((width, 2), step, jnp.float32), "bias": jnp.arange(2.0)}}
    average = jax.tree.map(lambda x: x + 0.5, params) if ema else None
    optimizer = ({"mu": params}, jnp.int32(step))
    sums = {"loss": jnp.float32(step / 7), "correct": jnp.float32(1), "examples": jnp.float32(2)}
    return TrainState(jnp.int32(step), params, average, optimizer, sums)


@pytest.fixture
def checkpoints(tmp_path):
    with contextlib.closing(Checkpoints(tmp_path, keep=2)) as opened:
        yield opened


def saved(checkpoints, *steps, scores=None):
    for step in steps:
        checkpoints.save(state_of(step), (scores or {}).get(step), 10.0 * step)
    checkpoints.finish_writing()


def test_one_process_alone_writes(checkpoints, tmp_path):
    saved(checkpoints, 1)
    with pytest.raises(UserError, match=f"another process trains in {tmp_path}"):
        Checkpoints(tmp_path)
    with contextlib.closing(Checkpoints(tmp_path, read_only=True)) as reading:
        assert reading.steps() == [1]
    checkpoints.close()
    Checkpoints(tmp_path).close()


@pytest.mark.parametrize("ema", [True, False])
def test_the_whole_state_comes_back_bit_for_bit(checkpoints, ema):
    state = state_of(7, ema)
    checkpoints.save(state, None, 1.5)
    checkpoints.finish_writing()
    restored = checkpoints.restore(7, state_of(0, ema))
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    jax.tree.map(np.testing.assert_array_equal, restored, state)
    assert (restored.ema is None) == (not ema) and checkpoints.seconds(7) == 1.5


def test_the_latest_ones_and_the_best_are_kept(checkpoints):
    saved(checkpoints, 1, 2, 3, 4, 5, 6, scores={1: 0.3, 2: 0.7, 4: 0.7, 5: 0.1})
    assert checkpoints.steps() == [2, 5, 6]  # of equals the first is best
    assert (checkpoints.best_step(), checkpoints.latest_step()) == (2, 6)
    assert sorted(p.name for p in checkpoints.folder.iterdir()) == ["2", "5", "6"]


def test_without_scores_there_is_no_best(checkpoints):
    saved(checkpoints, 1, 2, 3)
    assert checkpoints.steps() == [2, 3] and checkpoints.best_step() is None


def test_a_step_is_saved_once(checkpoints):
    saved(checkpoints, 1)
    checkpoints.save(state_of(1).replace(ema=state_of(9).ema), None, 0.0)
    checkpoints.finish_writing()
    assert checkpoints.restore(1, state_of(0)).ema["head"]["kernel"][0, 0] == 1.5


def test_weights_alone(checkpoints):
    saved(checkpoints, 4)
    like = state_of(0).params
    assert checkpoints.restore_weights(4, "params", like)["head"]["kernel"][0, 0] == 4
    assert checkpoints.restore_weights(4, "ema", like)["head"]["kernel"][0, 0] == 4.5


def test_weights_of_another_model_are_listed(checkpoints):
    saved(checkpoints, 4)
    with pytest.raises(UserError) as error:
        other = {"head": {"kernel": jnp.zeros((5, 2))}, "neck": jnp.zeros(3)}
        checkpoints.restore_weights(4, "params", other)
    message = str(error.value)
    assert "head/kernel has shape (3, 2) there and (5, 2) here" in message
    assert "neck is not in the checkpoint" in message and "head/bias is only in the checkpoint" in message


def test_a_checkpoint_whose_writer_was_killed_before_the_checksums_is_good(tmp_path):
    with contextlib.closing(Checkpoints(tmp_path)) as checkpoints:
        saved(checkpoints, 4)
    (tmp_path / "checkpoints" / "4" / "checksums.json").unlink()
    with contextlib.closing(Checkpoints(tmp_path)) as checkpoints:
        assert checkpoints.restore(4, state_of(0)).params["head"]["kernel"][0, 0] == 4


def remove(folder):
    shutil.rmtree(folder / "params")


def truncate(folder):
    files = [p for p in (folder / "params").rglob("*") if p.is_file() and p.parent.name == "d"]
    for path in files:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_a_bit(folder):
    path = max((p for p in (folder / "params").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def spoil_the_checksums(folder):
    (folder / "checksums.json").write_text("{")


@pytest.mark.parametrize("damage", [remove, truncate, flip_a_bit, spoil_the_checksums])
def test_a_damaged_checkpoint_is_named(tmp_path, damage):
    with contextlib.closing(Checkpoints(tmp_path)) as checkpoints:
        saved(checkpoints, 4)
    damage(tmp_path / "checkpoints" / "4")
    with contextlib.closing(Checkpoints(tmp_path)) as checkpoints:
        with pytest.raises(UserError, match=f"{tmp_path}/checkpoints/4"):
            checkpoints.restore(4, state_of(0))
        with pytest.raises(UserError, match=f"{tmp_path}/checkpoints/4"):
            checkpoints.restore_weights(4, "params", state_of(0).params)

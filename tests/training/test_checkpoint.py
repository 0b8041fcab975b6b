"""Checkpoints: what comes back, which are kept, and what a damaged or foreign one says."""

import contextlib
import errno
import json
import os
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_jax import errors
from vit_jax.errors import UserError
from vit_jax.training import checkpoint, processes
from vit_jax.training.checkpoint import Checkpoints
from vit_jax.training.step import TrainState


def state_of(step, ema=True, width=3):
    params = {"head": {"kernel": jnp.full((width, 2), step, jnp.float32), "bias": jnp.arange(2.0)}}
    average = jax.tree.map(lambda x: x + 0.5, params) if ema else None
    optimizer = ({"mu": params}, jnp.int32(step))
    sums = {"loss": jnp.float32(step / 7), "correct": jnp.float32(1), "examples": jnp.float32(2)}
    return TrainState(jnp.int32(step), params, average, optimizer, sums, jnp.int32(step % 2), jnp.float32(0.1))


@pytest.fixture
def checkpoints(tmp_path):
    with contextlib.closing(Checkpoints(tmp_path, keep=2)) as opened:
        yield opened


def saved(checkpoints, *steps, scores=None):
    for step in steps:
        checkpoints.save(state_of(step), (scores or {}).get(step), 10.0 * step)
    checkpoints.finish_writing()


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
    assert (checkpoints.best_step(), checkpoints.newest_whole()) == (2, 6)
    assert sorted(p.name for p in checkpoints.folder.iterdir()) == ["2", "5", "6"]


def test_what_a_killed_deletion_left_is_deleted_later(two, tmp_path):
    shutil.copytree(two, tmp_path, dirs_exist_ok=True)
    for item in ("metrics", "params"):
        shutil.rmtree(tmp_path / "checkpoints" / "2" / item)
    with contextlib.closing(Checkpoints(tmp_path)) as checkpoints:
        assert checkpoints.restore_newest(state_of(0))[0].step == checkpoints.best_step() == 4
        saved(checkpoints, 6, 8, scores={6: 0.1, 8: 0.1})
        assert checkpoints.steps() == [4, 6, 8]


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


def test_a_checkpoint_has_its_checksums_before_its_name(checkpoints, monkeypatch):
    """So that there is none without, whenever its writer is killed."""
    sum_up, seen = checkpoint._sum_up, []

    def recorded(folder, files):
        seen.append((folder.name, sorted(str(path.relative_to(folder)) for path in files)))
        sum_up(folder, files)

    monkeypatch.setattr(checkpoint, "_sum_up", recorded)
    saved(checkpoints, 4)
    (unnamed, before), (named, after) = seen
    assert unnamed.startswith("4.") and named == "4"
    assert set(after) - set(before) == {"_CHECKPOINT_METADATA", "commit_success.txt"} & set(after)
    assert json.loads((checkpoints.folder / "4" / "checksums.json").read_text()).keys() == set(after)


def remove(folder):
    shutil.rmtree(folder / "params")


def truncate(folder):
    for path in (folder / "params" / "d").iterdir():
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_a_bit(folder, item="params"):
    path = max((p for p in (folder / item).rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def spoil_metrics(folder):
    (folder / "metrics" / "metrics").write_bytes(b"\xff{")


def spoil_the_checksums(folder):
    (folder / "checksums.json").write_text("[" * 100_000)


def spoil_without_checksums(folder):
    truncate(folder)
    (folder / "checksums.json").unlink()


DAMAGES = [remove, truncate, flip_a_bit, spoil_metrics, spoil_the_checksums]


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """A workdir with the checkpoints of steps 2 and 4."""
    workdir = tmp_path_factory.mktemp("two")
    with contextlib.closing(Checkpoints(workdir)) as checkpoints:
        saved(checkpoints, 2, 4, scores={2: 0.1, 4: 0.2})
    return workdir


@pytest.mark.parametrize("damage", [*DAMAGES, spoil_without_checksums])
def test_a_damaged_checkpoint_is_moved_aside_and_the_one_before_goes_on(two, tmp_path, damage, capsys):
    shutil.copytree(two, tmp_path, dirs_exist_ok=True)
    folder = tmp_path / "checkpoints"
    damage(folder / "4")
    damaged = {path.name: data for path, data in contents(folder / "4").items()}
    for aside in ("4.damaged", "4.damaged.2"):
        with contextlib.closing(Checkpoints(tmp_path)) as checkpoints:
            state, seconds = checkpoints.restore_newest(state_of(0))
            (line,) = capsys.readouterr().err.splitlines()
            assert f"{folder}/4" in line and f"moved to {aside}, going on from step 2" in line
            jax.tree.map(np.testing.assert_array_equal, state, state_of(2))
            assert seconds == 20.0 and checkpoints.steps() == [2]
            saved(checkpoints, 4, scores={4: 0.2})
            assert checkpoints.restore_newest(state_of(0))[0].step == checkpoints.best_step() == 4
        damage(folder / "4")
    assert {path.name: data for path, data in contents(folder / "4.damaged").items()} == damaged


@pytest.mark.parametrize("damage", DAMAGES)
def test_reading_takes_the_newest_whole_checkpoint_and_moves_nothing(two, tmp_path, damage, capsys):
    shutil.copytree(two, tmp_path, dirs_exist_ok=True)
    damage(tmp_path / "checkpoints" / "4")
    before = contents(tmp_path)
    with contextlib.closing(Checkpoints(tmp_path, read_only=True)) as checkpoints:
        assert checkpoints.newest_whole() == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert f"{tmp_path}/checkpoints/4 is damaged" in line and "step 2" in line
        for read in (checkpoints.check, lambda step: checkpoints.restore_weights(step, "params", state_of(0).params)):
            with pytest.raises(UserError, match=f"{tmp_path}/checkpoints/4 is damaged"):
                read(4)
        if damage is spoil_metrics:
            with pytest.raises(UserError, match=f"{tmp_path}/checkpoints/4 is damaged"):
                checkpoints.best_step()
        else:
            assert checkpoints.best_step() == 4
    assert contents(tmp_path) == before


def test_where_no_checkpoint_is_whole_all_are_named_and_nothing_is_moved(two, tmp_path):
    shutil.copytree(two, tmp_path, dirs_exist_ok=True)
    for step in (2, 4):
        flip_a_bit(tmp_path / "checkpoints" / str(step))
    before = contents(tmp_path)
    with contextlib.closing(Checkpoints(tmp_path)) as checkpoints:
        for search in (checkpoints.newest_whole, lambda: checkpoints.restore_newest(state_of(0))):
            with pytest.raises(UserError, match=r"no whole checkpoint in .*/4 is damaged .*/2 is damaged"):
                search()
    assert contents(tmp_path) == before


def test_a_disk_that_cannot_be_read_now_damages_nothing(two, tmp_path, monkeypatch):
    shutil.copytree(two, tmp_path, dirs_exist_ok=True)

    def unreadable(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(checkpoint.hashlib, "file_digest", unreadable)
    with contextlib.closing(Checkpoints(tmp_path)) as checkpoints:
        with pytest.raises(errors.RunError, match=f"{tmp_path}/checkpoints/4 cannot be read now"):
            checkpoints.restore_newest(state_of(0))
        assert checkpoints.steps() == [2, 4]


def test_of_several_processes_the_first_says_what_is_whole(two, tmp_path, monkeypatch):
    shutil.copytree(two, tmp_path, dirs_exist_ok=True)
    verdicts = iter([True, True, True, False])  # step 4: known, damaged; step 2: known, whole
    flip_a_bit(tmp_path / "checkpoints" / "2", "metrics")  # which this process does not look at
    with monkeypatch.context() as patch:
        patch.setattr(processes, "is_first", lambda: False)
        patch.setattr(processes, "of_first", lambda _: next(verdicts))
        with contextlib.closing(Checkpoints(tmp_path)) as checkpoints:
            assert checkpoints.restore_newest(state_of(0))[0].step == 2
            assert checkpoints.steps() == [2, 4]  # it moves nothing


def test_a_whole_checkpoint_that_does_not_fit_is_not_called_damaged(two, tmp_path):
    shutil.copytree(two, tmp_path, dirs_exist_ok=True)
    with contextlib.closing(Checkpoints(tmp_path)) as checkpoints:
        with pytest.raises(UserError, match="files are as they were written") as error:
            checkpoints.restore_newest(state_of(0).replace(optimizer=({"other": jnp.zeros(3)},)))
        assert f"{tmp_path}/checkpoints/4" in str(error.value) and checkpoints.steps() == [2, 4]


@pytest.fixture
def small_disk(tmp_path):
    if (
        shutil.which("mount") is None
        or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", tmp_path], capture_output=True).returncode
    ):
        pytest.skip("no small disk can be mounted")
    yield tmp_path
    subprocess.run(["umount", "--lazy", tmp_path], check=True)


def test_a_full_disk_is_said_and_earlier_checkpoints_stay(small_disk):
    large = small_disk / "large"
    with pytest.raises(Exception) as error, contextlib.closing(Checkpoints(small_disk)) as checkpoints:
        saved(checkpoints, 2)
        with pytest.raises(OSError), large.open("wb", buffering=0) as file:
            while file.write(bytes(4096)):
                pass
        checkpoints.save(state_of(4), None, 0.0)  # in the background: it is told when that is waited for
    assert isinstance(errors.expected(error.value), errors.RunError) and "no space" in str(errors.expected(error.value))
    large.unlink()
    with contextlib.closing(Checkpoints(small_disk)) as checkpoints:
        assert checkpoints.steps() == [2]
        assert checkpoints.restore_newest(state_of(0))[0].step == 2
        saved(checkpoints, 4)
        assert checkpoints.restore_newest(state_of(0))[0].step == 4


ELSEWHERE = """
import sys, pathlib, contextlib
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import PartitionSpec as P
from vit_jax.training import mesh
from vit_jax.training.checkpoint import Checkpoints
from vit_jax.training.step import TrainState

assert jax.device_count() == 8
number = jnp.int32(3)
params = {"kernel": jnp.asarray(np.random.default_rng(0).normal(size=(16, 3)), jnp.float32)}
sums = {"loss": jnp.float32(1 / 3)}
state = TrainState(number, params, params, (params, number), sums, number, sums["loss"])
one, eight = (mesh.replicated(mesh.make_mesh(n)) for n in (1, 8))
sharded = mesh.shardings(state, eight.mesh, fsdp=True)
assert sharded.params["kernel"].spec == P("data", None)
everywhere = {name: jax.tree.map(lambda x: where, state) for name, where in (("one", one), ("eight", eight))}
everywhere["fsdp"] = sharded
for name, shardings in everywhere.items():
    with contextlib.closing(Checkpoints(pathlib.Path(sys.argv[1]) / name)) as checkpoints:
        checkpoints.save(jax.device_put(state, shardings), None, 0.0)
        checkpoints.finish_writing()
        for like in everywhere.values():
            found = checkpoints.restore(3, jax.device_put(jax.tree.map(jnp.zeros_like, state), like))
            jax.tree.map(np.testing.assert_array_equal, found, state)
            assert jax.tree.map(lambda x: x.sharding, found) == like
"""


def test_a_checkpoint_is_restored_to_the_bit_on_other_devices_and_shardings(tmp_path):
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    subprocess.run([sys.executable, "-c", ELSEWHERE, tmp_path], env=environment, check=True)

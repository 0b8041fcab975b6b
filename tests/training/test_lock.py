"""One run a workdir: who holds it, and from whom it is taken over."""

import contextlib
import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import pytest

from vit_jax.errors import RunError, UserError
from vit_jax.training import lock

ME = lock.this_process()
CHILD = "import sys; sys.stdin.read()"


@pytest.fixture
def slept(monkeypatch):
    """The seconds slept so far; sleeping takes no time, but for the locks it does."""
    now, seconds = lock._now, []
    monkeypatch.setattr(lock.time, "sleep", seconds.append)
    monkeypatch.setattr(lock, "_now", lambda folder: now(folder) + sum(seconds))
    return seconds


def left_behind(workdir, process, age=0.0):
    """The lock of a process that was last heard of `age` seconds ago."""
    path = workdir / "lock.json"
    path.write_text(json.dumps(dataclasses.asdict(process)) if isinstance(process, lock.Process) else process)
    time = path.stat().st_mtime - age
    os.utime(path, (time, time))
    return path


def taken(workdir):
    """Whether it can be locked, which says afterwards who did, and leaves what was there before."""
    new = not workdir.exists()
    with contextlib.closing(lock.Lock(workdir)) as held:
        assert json.loads(held.path.read_text()) == dataclasses.asdict(ME)
        held.check()
    assert not workdir.exists() if new else list(workdir.iterdir()) == []
    return True


def test_the_second_is_refused_until_the_first_is_closed(tmp_path, slept):
    with contextlib.closing(lock.Lock(tmp_path / "run")):
        with pytest.raises(UserError, match=f"process {os.getpid()} on {ME.host}. trains in {tmp_path}/run"):
            lock.Lock(tmp_path / "run")
    assert taken(tmp_path / "run") and not slept


def test_a_killed_process_leaves_nothing_to_wait_for(tmp_path, slept):
    child = subprocess.Popen([sys.executable, "-c", CHILD], stdin=subprocess.PIPE)
    process = dataclasses.replace(ME, id=child.pid, started=lock.start_of(child.pid))
    left_behind(tmp_path, process)
    assert lock.is_alive(process)
    with pytest.raises(UserError, match=f"process {child.pid} "):
        lock.Lock(tmp_path)
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # dead, but its exit code was not asked for yet
    assert taken(tmp_path)
    child.communicate()
    left_behind(tmp_path, process)
    assert taken(tmp_path) and not slept


def test_a_restarted_container_is_not_taken_for_the_process_before_it(tmp_path, slept):
    """Both have the same process id."""
    left_behind(tmp_path, dataclasses.replace(ME, started="1"))
    assert taken(tmp_path) and not slept


@pytest.mark.parametrize(
    "process",
    [
        dataclasses.replace(ME, host="other", machine="other"),
        dataclasses.replace(ME, machine=f"{ME.machine} another container"),
        dataclasses.replace(ME, machine="", started=""),  # a system that does not tell
        "",  # killed before it was written
        '["foreign"]',
        '{"host": "a"}',
        "[" * 100_000,
    ],
    ids=lambda process: str(process)[:20],
)
def test_of_other_machines_a_sign_of_life_is_awaited(tmp_path, slept, process, monkeypatch, capsys):
    path = left_behind(tmp_path, process, age=20.5)
    assert taken(tmp_path) and sum(slept) == pytest.approx(40, abs=1)
    assert "waiting 39 s" in capsys.readouterr().err
    left_behind(tmp_path, process, age=-3600)  # by a clock that is ahead
    slept.clear()
    assert taken(tmp_path) and sum(slept) == pytest.approx(60, abs=1)
    left_behind(tmp_path, process, age=61)
    slept.clear()
    assert taken(tmp_path) and not slept
    left_behind(tmp_path, process)
    monkeypatch.setattr(lock.time, "sleep", lambda seconds: os.utime(path, (1, 1 + path.stat().st_mtime)))
    with pytest.raises(UserError, match="another process .*trains in"):
        lock.Lock(tmp_path)
    assert path.exists()


def test_a_lock_is_kept_fresh_and_loss_of_it_is_noticed(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "BEAT", 0.001)
    held = lock.Lock(tmp_path)
    os.utime(held.path, (0, 0))
    while held.path.stat().st_mtime == 0:
        pass
    left_behind(tmp_path, dataclasses.replace(ME, started="1"))
    with pytest.raises(RunError, match=f"took over {tmp_path}"):
        held.check()
    held.close()
    held.path.unlink()  # by the other, which took over and is done
    with pytest.raises(RunError, match=f"took over {tmp_path}"):
        held.check()


def test_of_two_that_take_over_one_wins(tmp_path, monkeypatch):
    path = left_behind(tmp_path, dataclasses.replace(ME, started="1"))
    dead, await_death, write_text = path.read_text(), lock._await_death, lock.write_text

    def meanwhile(path, text):
        with pytest.raises(RunError, match=f"takes over {tmp_path} now"):
            lock.Lock(tmp_path)
        write_text(path, text)

    monkeypatch.setattr(lock, "write_text", meanwhile)
    with contextlib.closing(lock.Lock(tmp_path)):
        seen = [dead]  # by another one, before this one took over
        monkeypatch.setattr(lock, "_await_death", lambda path: seen.pop() if seen else await_death(path))
        with pytest.raises(UserError, match="trains in"):
            lock.Lock(tmp_path)
        assert not seen and path.read_text() != dead and list(tmp_path.iterdir()) == [path]


def test_a_take_over_that_was_killed_is_not_waited_for_long(tmp_path, monkeypatch):
    def killed(path, text):
        raise KeyboardInterrupt

    left_behind(tmp_path, dataclasses.replace(ME, started="1"))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(lock, "write_text", killed)
        patch.setattr(pathlib.Path, "unlink", lambda path, missing_ok: None)
        lock.Lock(tmp_path)
    (claim,) = tmp_path.glob("lock.json.*")
    with pytest.raises(RunError, match="takes over"):
        lock.Lock(tmp_path)
    os.utime(claim, (0, 0))
    assert taken(tmp_path)


def test_a_full_disk_leaves_no_empty_lock(tmp_path, monkeypatch):
    def full(path, mode):
        path.touch()
        return open("/dev/full", "w")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr(pathlib.Path, "open", full)
        lock._create(tmp_path / "lock.json", "a")
    assert list(tmp_path.iterdir()) == []

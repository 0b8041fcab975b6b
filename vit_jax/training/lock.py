"""One run a workdir: a file in it says which process trains there, and by its time of change that it is alive."""

import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import socket
import sys
import tempfile
import threading
import time

from vit_jax.errors import RunError, UserError
from vit_jax.training.writers import write_text

NAME = "lock.json"
BEAT = 10.0  # seconds between signs of life
PATIENCE = 60.0  # seconds without one after which a process counts as dead


@dataclasses.dataclass(frozen=True)
class Process:
    """A process, such that no other is taken for it.

    Attributes:
      machine: where process ids mean the same: a boot of a host, and in it a container. "" where that is not known.
      started: when it started, by the machine's clock; with it an id that is used again is told apart.
    """

    host: str
    machine: str
    id: int
    started: str


class Lock:
    """Keeps other processes from training in `workdir`, until it is closed or this process is dead.

    It is taken over from a process that is dead on this machine, or that gave no sign of life for a minute: where that
    cannot be told at once, it is waited for. No process id is trusted alone, for in a container each may be 1.

    Raises:
      UserError: another process trains there.
      RunError: another process takes over there right now.
    """

    def __init__(self, workdir: pathlib.Path):
        self.path = workdir / NAME
        self._mine = json.dumps(dataclasses.asdict(this_process()))
        self._closed = threading.Event()
        self._made = not workdir.exists()
        workdir.mkdir(parents=True, exist_ok=True)
        _acquire(self.path, self._mine)
        self._beating = threading.Thread(target=self._beat, daemon=True)
        self._beating.start()

    def check(self) -> None:
        """Raises RunError where the lock is another's by now, or gone with it: this process was suspended too long."""
        if _read(self.path) != self._mine:
            raise RunError(f"another process took over {self.path.parent} while this one was suspended: it stops")

    def close(self) -> None:
        self._closed.set()
        self._beating.join()
        if _read(self.path) == self._mine:
            self.path.unlink()
        if self._made:
            with contextlib.suppress(OSError):  # it is not empty: something came of the run
                self.path.parent.rmdir()

    def _beat(self) -> None:
        while not self._closed.wait(BEAT):
            with contextlib.suppress(OSError):  # a disk that is away for a moment
                if _read(self.path) == self._mine:
                    os.utime(self.path)


def holder(workdir: pathlib.Path) -> str | None:
    """What the lock in `workdir` says; None where there is none."""
    return _read(workdir / NAME)


def _acquire(path: pathlib.Path, mine: str) -> None:
    """Writes `mine` to the lock at `path` once nobody holds it; of several that take it over, one can claim it."""
    while not _create(path, mine):
        dead = _await_death(path)
        if dead is None:  # it was closed
            continue
        claim = path.with_name(f"{path.name}.{hashlib.sha256(dead.encode()).hexdigest()[:16]}")
        if not _create(claim, mine):
            if (seen := _look(claim)) and _now(path.parent) - seen[1] <= PATIENCE:
                raise RunError(f"another process takes over {path.parent} now: run the same command again")
            claim.unlink(missing_ok=True)  # of one that was killed meanwhile
            continue
        try:
            if _read(path) == dead:
                return write_text(path, mine)
        finally:
            claim.unlink(missing_ok=True)


def _await_death(path: pathlib.Path) -> str | None:
    """What the lock at `path` says once its process counts as dead; None where it is gone.

    Raises:
      UserError: the process is alive.
    """
    first, waited = None, 0
    while (seen := _look(path)) is not None:
        text, beat = seen
        process = _parse(text)
        alive = process and is_alive(process)
        silent = max(_now(path.parent) - beat, waited)  # a clock may be wrong
        left = PATIENCE - silent
        if alive is False or left < 0:
            return text
        if alive or first not in (None, seen):  # it gave a sign of life
            who = f" (process {process.id} on {process.host})" if process else ""
            raise UserError(f"another process{who} trains in {path.parent}: wait for it, or give another --workdir")
        if first is None:
            print(f"{path} is of a process that may be dead: waiting {left:.0f} s for a sign of life", file=sys.stderr)
        first = seen
        time.sleep(1)
        waited += 1
    return None


def this_process() -> Process:
    """Who this process is."""
    boot, container = "", ""
    with contextlib.suppress(OSError):
        boot = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        container = os.readlink("/proc/self/ns/pid")
    started = start_of(os.getpid())
    host = socket.gethostname()
    return Process(host, f"{host} {boot} {container}" if started and container else "", os.getpid(), started)


def start_of(id: int) -> str:
    """When a process of this machine started, in its clock's ticks; "" where there is none, or no way to tell."""
    try:
        after_name = pathlib.Path(f"/proc/{id}/stat").read_text().rpartition(")")[2].split()
        return "" if after_name[0] in "ZX" else after_name[19]  # Z, X: killed, and only its exit code is left
    except (OSError, IndexError):
        return ""


def is_alive(process: Process) -> bool | None:
    """Whether it is alive; None where that cannot be told from here."""
    if not process.machine or process.machine != this_process().machine:
        return None
    return start_of(process.id) == process.started


def _create(path: pathlib.Path, text: str) -> bool:
    """Writes a new file; False where there is one."""
    try:
        file = path.open("x")
    except FileExistsError:
        return False
    try:
        with file:
            file.write(text)
    except OSError:  # the disk is full
        path.unlink()
        raise
    return True


def _read(path: pathlib.Path) -> str | None:
    try:
        return path.read_text(errors="replace")
    except FileNotFoundError:
        return None


def _look(path: pathlib.Path) -> tuple[str, float] | None:
    """What the file holds and when it changed; None where there is none."""
    try:
        return path.read_text(errors="replace"), path.stat().st_mtime
    except FileNotFoundError:
        return None


def _parse(text: str) -> Process | None:
    """The process that the text of a lock names; None where it was cut short or is something else."""
    try:
        return Process(**json.loads(text))
    except (ValueError, TypeError, RecursionError):
        return None


def _now(folder: pathlib.Path) -> float:
    """The time by the clock of the folder's disk, which may be another machine's."""
    with tempfile.TemporaryFile(dir=folder) as file:
        return os.fstat(file.fileno()).st_mtime

"""Several processes that train one run: how they find each other, agree, and end together.

Each runs the same program on its own devices, and all see one workdir, on a filesystem that they share. The first one,
number 0, writes what is written, but for checkpoints, which all write together.
"""

import atexit
import contextlib
import hashlib
import itertools
import json
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax._src.distributed import global_state  # its client: barriers and keys that need no device
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from vit_jax.errors import INTERRUPTED, RunError, Stopped, UserError, expected

JOIN_SECONDS = 300  # for all processes to start
PAUSE_SECONDS = 1  # between looks at how the others are
SEEN_SECONDS = 60  # after which a network filesystem shows all of them what one wrote
SILENT_SECONDS = 15  # a process of which nothing was heard for so long is gone
HEARTBEAT_SECONDS = 40  # the same for jax itself, which ends the process with less to say
LONG = 7 * 24 * 3600 * 1000  # milliseconds: others' work may take its time, and whoever dies meanwhile ends all
FAILED, ALIVE = "vit_jax/failed/", "vit_jax/alive/"
GO_ON = "the same command, in all processes, goes on from the last checkpoint"
# What devices say of a process that is gone: gloo's words, NCCL's, and the coordination service's.
GONE = re.compile(
    r"gloo|nccl.*(remote|abort|connection)|connection (closed|reset)|coordination service|UNAVAILABLE|heartbeat",
    re.IGNORECASE | re.DOTALL,
)


def is_first() -> bool:
    """Whether this is the process that writes; so is one that is alone."""
    return jax.process_index() == 0


@contextlib.contextmanager
def joined(coordinator: str | None, count: int | None, index: int | None) -> Iterator[None]:
    """Joins the other processes of the run for the block, before anything touches a device.

    Without a coordinator, jax's JAX_COORDINATOR_ADDRESS and a SLURM step of several tasks are heeded; else this process
    is alone. What goes wrong in the block, in any of them, ends all of them, with its message and its exit code.

    Args:
      coordinator: HOST:PORT of the first process, for the others to reach it, or "auto": jax asks the cluster.
      count: how many processes there are.
      index: which one this is, 0 to count - 1.

    Raises:
      UserError: the arguments do not fit together, or there is no cluster to ask.
      RunError: the others cannot be reached, or one of them is gone.
    """
    client = _join(coordinator, count, index)
    if client is None:
        yield
        return
    ending = threading.Lock()  # whoever holds it ends this process
    over = threading.Event()
    watch = threading.Thread(target=_watch, args=(ending, over, client), daemon=True)
    watch.start()
    silent = contextlib.nullcontext() if is_first() else contextlib.redirect_stdout(open(os.devnull, "w"))
    try:
        with silent:
            yield
    except Stopped:
        _leave_together(ending, over, watch)
        if is_first():
            raise
        sys.exit(Stopped.exit_code)
    except BaseException as error:
        if gone := _of_another(error):
            error = RunError(f"another process of this run is gone; {GO_ON} ({_first_line(gone)})")
        _fail(ending, client, error)
        raise error
    _leave_together(ending, over, watch)


@contextlib.contextmanager
def first_goes_first(name: str) -> Iterator[None]:
    """The others enter the block, which has a name of its own, when the first process has left it."""
    if not is_first():
        wait(name)
    yield
    if is_first():
        wait(name)


def wait(name: str) -> None:
    """Until all processes wait for `name`, which they do once."""
    if global_state.client is not None:
        global_state.client.wait_at_barrier(f"vit_jax/{name}", timeout_in_ms=LONG)


def of_first(value: float) -> float:
    """The first process's value, in all (float32)."""
    return float(multihost_utils.broadcast_one_to_all(np.float32(value)))


def check_same(what: str, value: Any) -> None:
    """Raises UserError in the processes where `value`, of what JSON can hold, is not what the first one has."""
    if jax.process_index() in _differing(value):
        raise UserError(
            f"process {jax.process_index()} has another {what} than process 0: give all the same command and data"
        )


def see_same(what: str, read: Callable[[], Any]) -> None:
    """Waits until `read` gives in all processes what it gives in the first, of what JSON can hold.

    A network filesystem may show the others later what one wrote.

    Raises:
      RunError: there still is a difference after a minute.
    """
    for _ in range(SEEN_SECONDS):
        if not (differing := _differing(read())):
            return
        time.sleep(1)
    raise RunError(
        f"process {differing[0]} sees another {what} than process 0 after {SEEN_SECONDS} seconds: give all the same "
        "--workdir, on a filesystem that all share, and run the same command again"
    )


def end_all(code: int, message: str) -> bool:
    """Ends all processes of the run, this one too, in a moment; False where this one is alone."""
    if global_state.client is None:
        return False
    _tell(global_state.client, global_state.process_id, code, message)
    return True


class Vote:
    """Whether any process says yes: each call's answer is that to the call before, so that no device waits for it.

    Alone, the answer is one's own at once.
    """

    def __init__(self) -> None:
        mesh = Mesh(np.array(jax.devices()), "all")
        self._each, everywhere = NamedSharding(mesh, PartitionSpec("all")), NamedSharding(mesh, PartitionSpec())
        self._any = jax.jit(lambda votes: votes.any(), out_shardings=everywhere)
        self._asked: jax.Array | None = None

    def __call__(self, mine: bool) -> bool:
        if jax.process_count() == 1:
            return mine
        before = self._asked
        shape = (jax.device_count(),)
        self._asked = self._any(jax.make_array_from_callback(shape, self._each, lambda _: np.array([mine])))
        return before is not None and bool(before)


def _join(coordinator: str | None, count: int | None, index: int | None) -> Any:
    """Joins the others; gives jax's client of what they share, None where there are no others."""
    alone = not int(os.environ.get("SLURM_STEP_NUM_TASKS") or 1) > 1 and "JAX_COORDINATOR_ADDRESS" not in os.environ
    how: dict[str, Any] = {}
    if coordinator not in (None, "auto"):
        _check(coordinator, count, index)
        how = {"coordinator_address": coordinator, "num_processes": count, "process_id": index}
        how |= {"cluster_detection_method": "deactivate"}
    elif count is not None or index is not None:
        raise UserError("--num_processes and --process_id are for a --coordinator HOST:PORT: give it too")
    elif coordinator is None and alone:
        return None
    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM for itself
    give_up = threading.Timer(JOIN_SECONDS, _give_up, (coordinator or "the cluster's coordinator",))
    give_up.daemon = True
    give_up.start()
    try:
        jax.distributed.initialize(
            **how,
            initialization_timeout=2 * JOIN_SECONDS,  # then it aborts the process
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
        )
    except ValueError as error:
        raise UserError(
            f"no other processes are found here ({_first_line(error)}): give each --coordinator HOST:PORT of process "
            "0, --num_processes and --process_id"
        ) from error
    except (RuntimeError, OSError) as error:
        raise RunError(
            f"the processes did not meet ({_first_line(error)}): run the same command again, in all"
        ) from error
    finally:
        give_up.cancel()
    return global_state.client


def _check(coordinator: str, count: int | None, index: int | None) -> None:
    host, _, port = coordinator.rpartition(":")
    if not host or not re.fullmatch(r"[0-9]{1,5}", port) or not 0 < int(port) < 2**16:
        raise UserError(f"--coordinator {coordinator} is not HOST:PORT (as node1:1234), nor auto")
    if count is None or index is None:
        raise UserError(f"--coordinator {coordinator} needs --num_processes and --process_id")
    if not 0 <= index < count:
        raise UserError(f"--process_id {index} of --num_processes {count}: it must be at least 0 and below that")
    if index == 0:
        try:
            socket.create_server(("", int(port))).close()
        except OSError as error:
            raise UserError(
                f"--coordinator {coordinator}: port {port} is in use here ({error.strerror}): choose another"
            ) from error


def _give_up(where: str) -> None:
    print(f"error: not all processes met at {where} within {JOIN_SECONDS} seconds: start all", file=sys.stderr)
    _exit(RunError.exit_code)


def _differing(value: Any) -> list[int]:
    """The processes that have another value than the first."""
    digest = hashlib.sha256(json.dumps(value, sort_keys=True).encode()).digest()
    mine = np.frombuffer(digest, np.uint8).astype(np.int32)
    each = np.reshape(multihost_utils.process_allgather(mine), (-1, mine.size))
    return np.flatnonzero((each != each[0]).any(axis=1)).tolist()


# Ending


def _leave_together(ending: threading.Lock, over: threading.Event, watch: threading.Thread) -> None:
    """Waits for all, then lets go of them."""
    wait("end")
    ending.acquire()
    over.set()
    watch.join()  # as Python ends, a thread that is within the client would abort the process
    jax.distributed.shutdown()


def _fail(ending: threading.Lock, client: Any, error: BaseException) -> None:
    """Tells the others what went wrong here."""
    ending.acquire()
    known = expected(error) if isinstance(error, Exception) else None
    code = known.exit_code if known else INTERRUPTED if isinstance(error, KeyboardInterrupt) else RunError.exit_code
    _tell(client, jax.process_index(), code, str(known or f"{type(error).__name__} {error}"))
    _linger()
    atexit.register(_exit, code)  # before jax's own end, which would wait for the others


def _watch(ending: threading.Lock, over: threading.Event, client: Any) -> None:
    """Ends this process when another one failed or is gone; a thread, for the main one may wait for that for ever."""
    pulses: dict[str, tuple[str, float]] = {}  # of each process: what it said last, and when it was heard first
    failed: list[tuple[str, str]] = []
    for beat in itertools.count():
        if failed or over.wait(PAUSE_SECONDS):
            break
        try:
            client.key_value_set(f"{ALIVE}{jax.process_index()}", str(beat), allow_overwrite=True)
            if is_first():
                _tell_who_is_gone(client, pulses)
            failed = client.key_value_dir_get(FAILED)
        except Exception as error:  # jax mostly ends the process first
            failed = [(f"{FAILED}0", json.dumps([RunError.exit_code, f"it does not answer ({_first_line(error)})"]))]
    if failed and ending.acquire(blocking=False):
        key, value = failed[0]
        code, message = json.loads(value)
        label = "stopped" if code == Stopped.exit_code else "error"
        print(f"{label}: process {key.removeprefix(FAILED)} ended: {message}", file=sys.stderr, flush=True)
        _linger()
        _exit(code)


def _of_another(error: BaseException | None) -> BaseException | None:
    """What devices or jax say of another process that is gone, where that and nothing known led to `error`."""
    while error is not None and not (isinstance(error, Exception) and expected(error)):
        if isinstance(error, RuntimeError | ValueError) and GONE.search(str(error)):
            return error
        error = error.__cause__ or error.__context__
    return None


def _tell_who_is_gone(client: Any, pulses: dict[str, tuple[str, float]]) -> None:
    now = time.monotonic()
    for key, beat in client.key_value_dir_get(ALIVE):
        if pulses.get(key, ("", 0.0))[0] != beat:
            pulses[key] = beat, now
        elif now - pulses[key][1] > SILENT_SECONDS:
            gone = key.removeprefix(ALIVE)
            _tell(client, gone, RunError.exit_code, f"it was not heard of for {SILENT_SECONDS} seconds; {GO_ON}")


def _tell(client: Any, process: int | str, code: int, message: str) -> None:
    with contextlib.suppress(Exception):  # it is told already, or who would hear it is gone
        client.key_value_set(f"{FAILED}{process}", json.dumps([code, " ".join(message.split())]))


def _exit(code: int) -> None:
    sys.stdout.flush()
    os._exit(code)


def _linger() -> None:
    """The others hear of everything through the first process."""
    if is_first():
        time.sleep(3 * PAUSE_SECONDS)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0][:200]

"""Signals that ask a run to stop: it saves first, and leaves at once at a second Ctrl-C or with nothing to save."""

import contextlib
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator

from vit_jax.errors import INTERRUPTED, INTERRUPTION, Stopped

NOTHING_TO_SAVE = "nothing was left to save; the same command goes on"
ASKING = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name)]


class Signals:
    """What came of SIGTERM, SIGINT and SIGUSR1, which ask a run to stop (see `caught`).

    A thread notes them: Python's own handlers wait for what the main thread is in, a dispatch or a compilation. It can
    end the process at any moment, for a run survives kill -9.

    Args:
      end_all: ends all processes of the run, with an exit code and a message; False where this one is alone.
    """

    def __init__(self, end_all: Callable[[int, str], bool]) -> None:
        self._end_all = end_all
        self._received: list[int] = []
        self._saving = False

    def stop(self) -> bool:
        """Whether the run shall save and stop; asked once a dispatch, where all processes of a run must agree."""
        return bool(self._received)

    @contextlib.contextmanager
    def saving(self) -> Iterator[None]:
        """While there is something to save: signals wait until `stop` is asked, but for a second SIGINT."""
        self._saving = True
        try:
            yield
        finally:
            self._saving = False

    def note(self, number: int) -> None:
        self._received.append(number)
        if self._received.count(signal.SIGINT) > 1:
            _leave(INTERRUPTED, INTERRUPTION)
        stopped = (Stopped.exit_code, NOTHING_TO_SAVE)
        if not self._saving and number != signal.SIGINT and not self._end_all(*stopped):
            _leave(*stopped)

    def interrupt(self, number: int, _) -> None:
        """The handler in the main thread: Ctrl-C is as usual where nothing is to be saved."""
        if number == signal.SIGINT and not self._saving:
            raise KeyboardInterrupt


@contextlib.contextmanager
def caught(end_all: Callable[[int, str], bool] = lambda code, message: False) -> Iterator[Signals]:
    """Catches signals that ask to stop; in the main thread. See `Signals`."""
    signals = Signals(end_all)
    reading, writing = socket.socketpair()
    writing.setblocking(False)

    def watch():
        while numbers := reading.recv(16):
            for number in numbers:
                if number in ASKING:
                    signals.note(number)

    watching = threading.Thread(target=watch, daemon=True)
    watching.start()
    wakeup = signal.set_wakeup_fd(writing.fileno(), warn_on_full_buffer=False)
    handlers = {number: signal.signal(number, signals.interrupt) for number in ASKING}
    try:
        yield signals
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(wakeup)
        writing.close()
        watching.join()
        reading.close()


def _leave(code: int, message: str) -> None:
    """Ends the process now, whatever its other threads are in or hold."""
    os.write(2, f"stopped: {message}\n".encode())
    os._exit(code)

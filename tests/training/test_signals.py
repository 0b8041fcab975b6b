"""Signals that ask a run to stop, while the main thread is where no Python handler runs."""

import signal
import subprocess
import sys

import pytest

from vit_jax import errors
from vit_jax.training import signals

CHILD = """
import hashlib, sys, threading
from vit_jax.training import signals

def tell(caught):
    while not caught.stop():
        pass
    print("noted", flush=True)

with signals.caught() as caught:
    threading.Thread(target=tell, args=(caught,), daemon=True).start()
    if sys.argv[1] == "saving":
        with caught.saving():
            print("ready", flush=True)
            if sys.argv[2] == "returns":
                while not caught.stop():
                    pass
                sys.exit(3)
            hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)  # as in a dispatch: C code for minutes
    print("ready", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)
"""
LEFT = "stopped: nothing was left to save; the same command goes on\n"


def run(numbers, *arguments):
    """Sends the signals, each once the one before was noted; gives exit code and stderr."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", CHILD, *arguments], **pipes) as child:
        try:
            for number in numbers:
                assert child.stdout.readline() in ("ready\n", "noted\n")
                child.send_signal(number)
            _, err = child.communicate(timeout=60)
        finally:
            child.kill()
    return child.returncode, err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_waits_for_the_run_to_be_saved(number):
    assert run([number], "saving", "returns") == (3, "")


def test_a_second_interrupt_leaves_from_within_a_dispatch():
    code, err = run([signal.SIGINT, signal.SIGINT], "saving", "stays")
    assert (code, err) == (errors.INTERRUPTED, f"stopped: {errors.INTERRUPTION}\n")


def test_with_nothing_to_save_the_others_of_a_run_are_told(monkeypatch):
    told = []
    monkeypatch.setattr(signals, "_leave", lambda *_: told.append("left"))
    caught = signals.Signals(lambda *message: told.append(message) or True)
    caught.note(signal.SIGTERM)
    with caught.saving():
        caught.note(signal.SIGTERM)
    assert told == [(errors.Stopped.exit_code, signals.NOTHING_TO_SAVE)]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_with_nothing_to_save_the_process_ends_at_once(number):
    assert run([number], "compiling") == (errors.Stopped.exit_code, LEFT)

"""What goes wrong, and the exit code that says so: 0 done, 1 failed, 2 wrong input, 75 stopped after saving."""

import argparse
import errno
import os
import sys
from collections.abc import Callable

DENIED = (
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST),
    *(errno.ENAMETOOLONG, errno.ELOOP),
)
FULL = (errno.ENOSPC, errno.EDQUOT)
DISK_FULL = tuple(map(os.strerror, FULL))  # the system's words, also within the libraries' own errors
INTERRUPTED = 130  # as a shell says it of SIGINT
UNREAD = 141  # and of SIGPIPE
INTERRUPTION = "interrupted; the same command goes on from the last checkpoint"  # of a run


class UserError(Exception):
    """The user's input is wrong (exit 2). One line: what is wrong, where, and what to do."""

    exit_code = 2


class Absent(UserError):
    """What was asked for by name is not there, nor need be: with "all" it is left out."""


class RunError(Exception):
    """The run failed, and not through its input: it diverged, or ran out of memory or disk (exit 1)."""

    exit_code = 1


class Stopped(Exception):
    """A signal stopped the run after it was saved; the same command goes on (exit 75)."""

    exit_code = 75


class ArgumentParser(argparse.ArgumentParser):
    """argparse whose errors look like all others here, with the `--debug` that every command has."""

    def __init__(self, **kwargs):
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **kwargs)
        self.add_argument("--debug", action="store_true", help="show the whole traceback of an error")

    def error(self, message: str):
        raise UserError(f"{message} (see --help)")


def run(command: Callable[[list[str]], None], interruption: str = "interrupted") -> None:
    """Runs `command(arguments)` and ends the process; expected errors become one line on stderr.

    `interruption` is what a person who interrupts it is told.
    """
    arguments = sys.argv[1:]
    try:
        command(arguments)
    except KeyboardInterrupt:
        print(f"stopped: {interruption}", file=sys.stderr, flush=True)
        sys.exit(INTERRUPTED)
    except BrokenPipeError:  # who reads our output has read enough, as `head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains when it empties its buffer
        sys.exit(UNREAD)
    except Exception as error:
        known = expected(error)
        if known is None or "--debug" in arguments:
            raise
        label = "stopped" if isinstance(known, Stopped) else "error"
        print(f"{label}: {one_line(known)}", file=sys.stderr, flush=True)
        sys.exit(known.exit_code)


def one_line(error: BaseException, most: int | None = None) -> str:
    """An error's message as a line, of `most` characters."""
    return " ".join(str(error).split())[:most]


def expected(error: Exception) -> UserError | RunError | Stopped | None:
    """What the user is told of `error`; None where it is a bug, whose traceback is wanted."""
    if isinstance(error, UserError | RunError | Stopped):
        return error
    message = str(error)
    if isinstance(error, OSError) and error.errno in DENIED:
        return UserError(f"cannot use {error.filename}: {error.strerror}; give another path")
    if _disk_full(message):
        return RunError("no space left on the disk: free some and run the same command again")
    if out_of_memory(error):
        return RunError(
            "out of memory: lower train.batch_size, or raise optim.accumulate, or set model.remat=True or "
            "train.dtype=bfloat16"
        )
    return None


def _disk_full(message: str) -> bool:
    return any(words in message for words in DISK_FULL)


def out_of_memory(error: BaseException) -> bool:
    """Whether the host or a device had too little memory."""
    message = str(error)
    if _disk_full(message):  # tensorstore, too, says that it is exhausted
        return False
    return (
        isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in message or "Out of memory" in message
    )  # XLA's words

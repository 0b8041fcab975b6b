"""What goes wrong, and the exit code that says so: 0 done, 1 failed, 2 wrong input, 75 stopped after saving."""

import argparse
import sys
from collections.abc import Callable


class UserError(Exception):
    """The user's input is wrong (exit 2). One line: what is wrong, where, and what to do."""

    exit_code = 2


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


def run(command: Callable[[list[str]], None]) -> None:
    """Runs `command(arguments)` and ends the process; expected errors become one line on stderr."""
    arguments = sys.argv[1:]
    try:
        command(arguments)
    except (UserError, RunError, Stopped) as error:
        if "--debug" in arguments:
            raise
        label = "stopped" if isinstance(error, Stopped) else "error"
        print(f"{label}: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        sys.exit(error.exit_code)

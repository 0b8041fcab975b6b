"""What the user is told of each kind of error, and with which exit code."""

import errno
import subprocess
import sys

import pytest

from vit_jax import errors


def test_expected_errors_pass_through():
    for error in (errors.UserError("a"), errors.RunError("b"), errors.Stopped("c")):
        assert errors.expected(error) is error


@pytest.mark.parametrize(
    "error, code, words",
    [
        (OSError(errno.EACCES, "Permission denied", "/root/x"), 2, "/root/x"),
        (NotADirectoryError(errno.ENOTDIR, "Not a directory", "/a/b"), 2, "/a/b"),
        (OSError(errno.ENOSPC, "No space left on device", "/tmp/x"), 1, "no space left"),
        (ValueError("UNKNOWN: write failed: No space left on device [tensorstore]"), 1, "no space left"),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 bytes"), 1, "train.batch_size"),
        (
            RuntimeError("INTERNAL: Error dispatching computation: Out of memory allocating 9 bytes."),
            1,
            "train.batch_size",
        ),
        (ValueError("RESOURCE_EXHAUSTED: Failed writing: No space left on device"), 1, "no space left"),
        (OSError(errno.EDQUOT, "Disk quota exceeded", "/home/x"), 1, "no space left"),
        (MemoryError(), 1, "train.batch_size"),
    ],
)
def test_the_world_s_errors(error, code, words):
    told = errors.expected(error)
    assert told.exit_code == code and words in str(told)


@pytest.mark.parametrize("bug", [ValueError("x"), KeyError("y"), FileNotFoundError(errno.ENOENT, "No such file", "z")])
def test_bugs_keep_their_traceback(bug):
    assert errors.expected(bug) is None


@pytest.mark.parametrize(
    "error, code, line",
    [
        (errors.UserError("two\nlines"), 2, "error: two lines\n"),
        (errors.RunError("it broke"), 1, "error: it broke\n"),
        (errors.Stopped("saved"), 75, "stopped: saved\n"),
        (KeyboardInterrupt(), 130, "stopped: interrupted; go on\n"),
    ],
)
def test_one_line_and_an_exit_code(error, code, line, monkeypatch, capsys):
    def command(arguments):
        raise error

    monkeypatch.setattr(errors.sys, "argv", ["command"])
    with pytest.raises(SystemExit) as end:
        errors.run(command, "interrupted; go on")
    assert end.value.code == code and capsys.readouterr().err == line


def test_a_reader_that_has_read_enough_is_no_error():
    print_all = "from vit_jax import errors; errors.run(lambda _: [print(i) for i in range(100_000)])"
    with subprocess.Popen([sys.executable, "-c", print_all], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"0\n"
        process.stdout.close()
        assert process.stderr.read() == b"" and process.wait() == 141

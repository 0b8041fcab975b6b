"""Several processes on this machine: they train as one does, end together, and go on together."""

import csv
import json
import pathlib
import re
import shutil
import socket
import subprocess
import sys
import threading
from typing import ClassVar

import jax
import numpy as np
import pytest

from vit_jax.errors import RunError, UserError
from vit_jax.training import processes, runs

ROOT = pathlib.Path(__file__).parents[2]
HASTY = "from vit_jax import errors, main; from vit_jax.training import processes; processes.SEEN_SECONDS = 1; "
HASTY += "errors.run(main.main)"  # main, which waits less


def on_a_free_port(calls):
    """Each call as that of one of several processes on this machine."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        where = ["--coordinator", f"localhost:{free.getsockname()[1]}", "--num_processes", len(calls)]
    return [[*call, *where, "--process_id", i] for i, call in enumerate(calls)]


def start(commands, workdir, *fields):
    """One process for each of `fields`."""
    return [
        commands.popen("main", *call) for call in on_a_free_port([commands.training(workdir, **own) for own in fields])
    ]


def numbers(workdir):
    with (workdir / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    timed = ("images_per_second", "seconds")
    return {(row["step"], name): float(x) for row in rows for name, x in row.items() if name not in timed and x}


def test_two_that_are_killed_and_go_on_give_the_numbers_of_one(finished, commands, tmp_path):
    first, second = start(commands, tmp_path, *2 * [{"checkpoint__every": 0.1}])
    while not (line := first.stderr.readline()).startswith("step 9/24"):
        assert line, first.communicate()
    second.kill()
    _, said = first.communicate(timeout=60)
    second.communicate()
    assert first.returncode == 1 and re.search("error: .*goes on from the last checkpoint", said), said
    assert not (tmp_path / "summary.json").exists()
    before, damaged = sorted(
        (p for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit()), key=lambda p: int(p.name)
    )[-2:]
    shutil.rmtree(damaged / "params")

    config, *rest = map(str, commands.training(tmp_path)[1:])
    together = subprocess.run(
        ["launch/local.sh", "2", config, *rest],
        cwd=ROOT,
        env=commands.environment | {"PYTHON": sys.executable},
        text=True,
        capture_output=True,
        timeout=300,
    )
    assert together.returncode == 0, together.stderr
    assert re.findall(r"going on from step \d+", together.stdout) == [f"going on from step {before.name}"]  # one writes
    assert together.stderr.count(f"moved to {damaged.name}.damaged") == 1
    assert together.stderr.count("step 24/24") == 1
    assert numbers(tmp_path) == pytest.approx(numbers(finished), rel=1e-5)
    summaries = [json.loads((workdir / "summary.json").read_text()) for workdir in (finished, tmp_path)]
    assert summaries[0]["test_loss"] == pytest.approx(summaries[1]["test_loss"], rel=1e-5)
    assert len(list(tmp_path.glob("events*"))) == 2 and (tmp_path / "report.html").exists()
    (_, read_one), (_, read_two) = map(runs.last_weights, (finished, tmp_path))
    one, two = read_one(), read_two()
    assert one.keys() == two.keys() and len(one) > 20
    for name in one:
        if not name.endswith("key/bias"):  # whose gradient is 0, but for rounding
            np.testing.assert_allclose(two[name], one[name], rtol=0, atol=5e-6, err_msg=name)


def test_what_is_wrong_in_one_ends_all_and_nothing_is_written(commands, tmp_path):
    workdir = tmp_path / "run"
    for index, process in enumerate(start(commands, workdir, {}, {"train__seed": 1})):
        _, err = process.communicate(timeout=120)
        assert process.returncode == 2 and "Traceback" not in err, err
        about = "error: process 1 ended: process 1 has another" if index == 0 else "error: process 1 has another"
        assert len(re.findall(f"^{about} config than process 0", err, re.MULTILINE)) == 1, err
    assert not workdir.exists()


def test_processes_that_share_no_workdir_say_so_and_nothing_is_written(commands, tmp_path):
    started = [
        subprocess.Popen(
            [sys.executable, "-c", HASTY, *map(str, call)],
            cwd=ROOT,
            env=commands.environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for call in on_a_free_port([commands.training(tmp_path / name) for name in ("a", "b")])
    ]
    for process in started:
        _, err = process.communicate(timeout=120)
        assert process.returncode == 1 and "Traceback" not in err, err
        assert re.search("^error: .*process 1 sees another workdir than process 0 after 1 ", err, re.MULTILINE), err
    assert list(tmp_path.iterdir()) == []


def test_what_others_wrote_is_waited_for(monkeypatch):
    seen, slept = [[1], [1, 2], []], []
    monkeypatch.setattr(processes, "_differing", lambda value: seen.pop(0))
    monkeypatch.setattr(processes.time, "sleep", slept.append)
    processes.see_same("workdir", lambda: "a")
    assert not seen and len(slept) == 2
    monkeypatch.setattr(processes, "_differing", lambda value: [2])
    with pytest.raises(RunError, match="process 2 sees another workdir than process 0 after 60 seconds"):
        processes.see_same("workdir", lambda: "a")


def test_one_that_stops_with_nothing_to_save_stops_all(monkeypatch, capsys):
    class Client:
        keys: ClassVar = {}

        def key_value_set(self, key, value, allow_overwrite=False):
            self.keys[key] = value

        def key_value_dir_get(self, folder):
            return [pair for pair in self.keys.items() if pair[0].startswith(folder)]

    codes = []
    monkeypatch.setattr(processes, "PAUSE_SECONDS", 0)
    monkeypatch.setattr(processes, "_exit", codes.append)
    assert not processes.end_all(75, "nothing")
    monkeypatch.setattr(processes.global_state, "client", Client())
    monkeypatch.setattr(processes.global_state, "process_id", 3)
    assert processes.end_all(75, "nothing")
    processes._watch(threading.Lock(), threading.Event(), Client())
    assert codes == [75] and capsys.readouterr().err == "stopped: process 3 ended: nothing\n"


def raised(error, cause):
    try:
        raise error from cause
    except Exception as found:
        return found


@pytest.mark.parametrize(
    "error, gone",
    [
        (RuntimeError("Gloo all-reduce failed: Connection closed by peer"), True),
        (RuntimeError("NCCL operation ncclAllReduce failed:\nremote process exited"), True),
        (raised(KeyError("a"), RuntimeError("UNAVAILABLE: heartbeat")), True),
        (RuntimeError("NCCL operation failed: unhandled cuda error"), False),
        (RuntimeError("Out of memory: NCCL aborted"), False),
        (raised(RunError("diverged"), RuntimeError("UNAVAILABLE")), False),
        (KeyError("gloo"), False),
    ],
)
def test_what_tells_of_another_process_that_is_gone(error, gone):
    assert (processes._of_another(error) is not None) == gone


@pytest.mark.parametrize("error, kind", [(RuntimeError("deadline"), RunError), (ValueError("no cluster"), UserError)])
def test_not_to_meet_is_no_wrong_input_but_to_find_no_cluster_is(error, kind, monkeypatch):
    def fails(**_):
        raise error

    monkeypatch.setattr(jax.distributed, "initialize", fails)
    with pytest.raises(kind, match=str(error)), processes.joined("auto", None, None):
        pass


@pytest.mark.parametrize(
    "arguments, said",
    [
        (("node1", 2, 0), "not HOST:PORT"),
        (("node1:0", 2, 0), "not HOST:PORT"),
        (("node1:99999", 2, 0), "not HOST:PORT"),
        (("node1:1234", None, 0), "needs --num_processes and --process_id"),
        (("node1:1234", 2, 2), "--process_id 2 of --num_processes 2"),
        (("node1:1234", 2, -1), "--process_id -1"),
        ((None, 2, None), "for a --coordinator"),
        (("auto", 2, 0), "for a --coordinator"),
    ],
)
def test_arguments_that_do_not_fit_together(arguments, said):
    with pytest.raises(UserError, match=said), processes.joined(*arguments):
        pass


def test_a_port_that_is_taken_and_others_that_do_not_come(commands):
    with socket.create_server(("", 0)) as taken:
        address = f"localhost:{taken.getsockname()[1]}"
        with pytest.raises(UserError, match="is in use here"), processes.joined(address, 2, 0):
            pass
    code = "from vit_jax.training import processes; processes.JOIN_SECONDS = 1; " + (
        f"processes.joined('{address}', 2, 1).__enter__()"
    )
    call = [sys.executable, "-c", code]
    late = subprocess.run(call, env=commands.environment, cwd=ROOT, text=True, capture_output=True, timeout=60)
    assert late.returncode == 1 and late.stderr == (
        f"error: not all processes met at {address} within 1 seconds: start all\n"
    )


def test_without_others_there_is_nothing_to_agree_on(monkeypatch):
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")
    with processes.joined(None, None, None):
        assert not jax.distributed.is_initialized() and processes.is_first()
        vote = processes.Vote()
        assert [vote(mine) for mine in (False, True, False)] == [False, True, False]
        assert processes.of_first(2.5) == 2.5
        processes.check_same("config", [1, "a"])

"""The sweep: what it refuses, what its table says of made-up runs, and two real recipes on digits."""

import argparse
import csv
import importlib.util
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from vit_jax.errors import UserError
from vit_jax.training import writers

ROOT = pathlib.Path(__file__).parents[2]
MODEL = {"width": 16, "depth": 1, "num_heads": 2, "mlp_dim": 16}
TINY = [*(f"--config.model.{name}={value}" for name, value in MODEL.items()), "--config.train.steps=24"]
TINY += ["--config.train.steps_per_call=6", "--config.train.eval_every=0.5"]


def load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # where dataclasses look their annotations up
    spec.loader.exec_module(module)
    return module


sweep = load(ROOT / "launch" / "sweep.py")


@pytest.fixture(autouse=True)
def in_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def popen(commands, *arguments):
    environment = commands.environment | {"PYTHONPATH": str(ROOT)}
    call = [sys.executable, "launch/sweep.py", "--config", "configs/digits.py", *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(call, cwd=ROOT, env=environment, text=True, **pipes)


def run(commands, *arguments, code=0):
    process = popen(commands, *arguments)
    out, err = process.communicate(timeout=300)
    assert process.returncode == code, f"exit {process.returncode}, not {code}:\n{out}\n{err}"
    return out, err


def made_up(workdir, recipes, final=False, holdout=0.1):
    """A sweep of which nothing has run yet."""
    made = sweep.Sweep(workdir, "configs/digits.py", [], final, recipes, {"data": {"holdout": holdout}})
    sweep.write_sweep(made)
    return made


def finish(made, recipe, seed, held_out, test, raw=0.01, seconds=60.0, speed=100.0):
    """Leaves what a finished run leaves: a better evaluation halfway, `held_out` at the end, `test` in its summary."""
    folder = made.folder(recipe, seed)
    folder.mkdir(parents=True)
    metrics = writers.Metrics(folder, 0)
    for step, accuracy in ((5, 0.99), (10, held_out)):
        measured = {"val_accuracy": raw, "ema_val_accuracy": accuracy, "images_per_second": speed, "seconds": seconds}
        metrics.add(dict.fromkeys(writers.COLUMNS) | {"step": step, "epoch": step / 10} | measured)
    metrics.close()
    costs = {"parameters": 1234, "epochs": 1.0, "train_seconds": seconds, "images_per_second": speed, "device": "cpu"}
    summary = {"test_accuracy": test, "protocol": "made up"} | costs
    writers.write_json(folder / "summary.json", summary)


def read_csv(path):
    with path.open() as file:
        return list(csv.DictReader(file))


@pytest.fixture
def compared(tmp_path):
    """Three seeds of one recipe, one of a better one, and one that failed beside one that is done."""
    made = made_up(tmp_path / "sweep", {"": 3, "model.pool=seq": 1, "model.stem=conv": 2})
    for seed, accuracy in enumerate((0.50, 0.53, 0.59)):
        finish(made, "", seed, accuracy, 0.111, seconds=60.0 * (seed + 1), speed=100.0 + seed)
    finish(made, "model.pool=seq", 0, 0.7, 0.222)
    finish(made, "model.stem=conv", 0, 0.2, 0.333)
    log = made.folder("model.stem=conv", 1).with_suffix(".log")
    log.write_text("$ python\nstep 1\nerror: the loss\nfailed (exit 1): the loss is not finite\n")
    return made


def test_the_table_holds_mean_and_sample_deviation_the_best_first(compared):
    sweep.write_all(compared)
    best, base, failed = read_csv(compared.workdir / "table.csv")
    assert [row["recipe"] for row in (best, base, failed)] == ["model.pool=seq", "base", "model.stem=conv"]
    assert float(base["accuracy"]) == pytest.approx(0.54)
    assert float(base["accuracy_sd"]) == pytest.approx(((0.04**2 + 0.01**2 + 0.05**2) / 2) ** 0.5)
    assert float(base["minutes"]) == pytest.approx(2.0) and float(base["images_per_second"]) == pytest.approx(101.0)
    assert (best["accuracy"], best["accuracy_sd"], best["seeds_done"]) == ("0.7", "", "1")
    assert (failed["seeds_done"], failed["seeds"], failed["failed"]) == ("1", "2", "1")


def test_the_table_for_people_says_what_it_is_and_what_failed(compared, monkeypatch):
    drawn = []
    monkeypatch.setattr(sweep.Figure, "savefig", lambda figure, path, **_: drawn.append((path, figure)))
    text = sweep.write_all(compared)
    assert text == (compared.workdir / "table.md").read_text()
    assert "| 54.00 ± 4.58 " in text and "| 70.00 (1 run) " in text and "| 1 of 2, 1 failed " in text
    assert "- `model.stem=conv`, seed 1: failed (exit 1): the loss is not finite" in text
    assert "held-out accuracy, %" in text and "0.1 of train" in text
    ((path, figure),) = drawn
    legend = [entry.get_text().split()[-1] for entry in figure.legends[0].get_texts()]
    assert path == compared.workdir / "sweep.png" and legend == ["model.pool=seq", "base", "model.stem=conv"]
    thick = {line.get_color(): line.get_ydata()[-1] for line in figure.axes[0].lines if line.get_lw() == 2}
    assert (thick["C0"], thick["C1"]) == pytest.approx((0.7, 0.54))


@pytest.mark.parametrize("name", ["table.md", "table.csv", "runs.csv"])
def test_accuracy_on_test_is_shown_only_by_final(tmp_path, compared, name):
    sweep.write_all(compared)
    text = (compared.workdir / name).read_text()
    assert "test accuracy" not in text and not any(hidden in text for hidden in ("0.111", "11.1", "0.222", "22.2"))
    made = made_up(tmp_path / "final", {"": 2}, final=True, holdout=0.0)
    finish(made, "", 0, 0.5, 0.111)
    finish(made, "", 1, 0.5, 0.113)
    sweep.write_all(made)
    text = (made.workdir / name).read_text()
    assert {"table.md": "11.20 ± 0.14", "table.csv": "0.112,", "runs.csv": "0.111,"}[name] in text
    assert "held-out" not in text


def test_runs_csv_has_a_row_and_a_command_a_run(compared):
    sweep.write_all(compared)
    rows = read_csv(compared.workdir / "runs.csv")
    assert [row["status"] for row in rows] == ["done"] * 5 + ["failed"]
    folder = compared.workdir / "model.pool=seq" / "seed0"
    start = f"python -m vit_jax.main --config configs/digits.py --workdir {folder} "
    assert rows[3]["command"] == start + "--config.model.pool=seq --config.train.seed=0"


def test_a_damaged_summary_is_named(compared):
    (compared.folder("", 0) / "summary.json").write_text("{")
    with pytest.raises(UserError, match="seed0 is damaged"):
        sweep.write_all(compared)


def test_folders_are_readable_and_differ():
    assert sweep.slug("") == "base"
    assert sweep.slug("optim.learning_rate=2e-2 model.pool=seq") == "optim.learning_rate=2e-2+model.pool=seq"
    recipes = ["data.name=folder:a/b", "data.name=folder:a_b", "model.preset=" + "x" * 300, "model.preset=" + "x" * 301]
    names = {sweep.slug(recipe) for recipe in recipes}
    assert len(names) == 4 and all("/" not in name and len(name) < 120 for name in names)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["", "modle.stem=conv"], r"recipe 'modle.stem=conv': unknown config field .* 'model.stem'"),
        (["", "model.stem=wrong"], "recipe 'model.stem=wrong': model.stem='wrong' is not allowed"),
        (["", "data.holdout=0"], "are the same for all recipes"),
        (["augment.policy=randaugment augment.operations=('foo',)"], "'foo'"),
        (["augment.operations=('rotate', 'color')"], "is not FIELD=VALUE .a value must not hold blanks"),
        (["train.seed=3"], "are the same for all recipes"),
        (["", "--config.train.seed=3"], "train.seed is what --seeds counts"),
        (["", "--config.model.width"], "needs a value"),
        (["", "--sedes", "3"], "unknown argument '--sedes'"),
        (["--seeds", "0"], "at least 1"),
        (["--seeds", "many"], "invalid int"),
        (["--table", ""], "--table needs --workdir and nothing else"),
        (["--config", "configs/digit.py"], "did you mean configs/digits.py"),
    ],
)
def test_wrong_input_is_found_before_anything_is_written(tmp_path, arguments, message):
    call = ["--config", "configs/digits.py", "--workdir", str(tmp_path / "sweep"), *arguments]
    with pytest.raises(UserError, match=message):
        sweep.main(call)
    assert not (tmp_path / "sweep").exists()


def test_one_folder_holds_one_sweep(tmp_path):
    call = ["--config", "configs/digits.py", "--workdir", str(tmp_path)]
    args = argparse.Namespace(config="configs/digits.py", workdir=tmp_path, seeds=2, final=False)
    sweep.write_sweep(sweep.make_sweep(args, [], ["", "model.pool=seq"]))
    args.seeds = 1
    more = sweep.make_sweep(args, ["--config.data.dir=elsewhere"], ["model.pool=seq", "model.pool=cls"])
    assert more.recipes == {"": 2, "model.pool=seq": 2, "model.pool=cls": 1}
    with pytest.raises(UserError, match=r"They differ in: train.epochs \(100.0 there, 5.0 now\)"):
        sweep.main([*call, "--config.train.epochs=5"])
    with pytest.raises(UserError, match=r"--final \(False there, True now\)"):
        sweep.main([*call, "--final", "--config.data.holdout=0.1"])


def test_recipes_may_stand_between_options(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(sweep, "train_all", lambda sweep, runs: asked.extend(runs))
    options = ["--config", "configs/digits.py", "--config.train.epochs=5", "--seeds", "2"]
    sweep.main(["", *options, " model.pool=cls  model.depth=1", "--workdir", str(tmp_path), ""])
    assert asked == [("", 0), ("", 1), ("model.pool=cls model.depth=1", 0), ("model.pool=cls model.depth=1", 1)]


def test_two_real_recipes_then_nothing_to_do_then_a_failure(commands, tmp_path):
    """Finished runs are not touched again; a recipe added later that diverges does not keep the rest from going on."""
    workdir = tmp_path / "sweep"
    arguments = ["--workdir", workdir, "", "model.pool=cls", *TINY]
    out, _ = run(commands, *arguments)
    assert "data.holdout=0.1: recipes are compared on a part of train" in out and "test accuracy" not in out
    rows = read_csv(workdir / "runs.csv")
    scores = [
        writers.score(writers.read_metrics(workdir / n / "seed0" / "metrics.csv")[-1])
        for n in ("base", "model.pool=cls")
    ]
    assert [float(row["accuracy"]) for row in rows] == scores
    config = json.loads((workdir / "base" / "seed0" / "config.json").read_text())
    assert config["data"]["holdout"] == 0.1 and config["train"]["seed"] == 0

    written = {path: path.stat().st_mtime_ns for path in workdir.rglob("seed0/*")}
    again, _ = run(commands, *arguments)
    assert again.count("(finished before)") == 2 and len(written) > 5
    assert {path: path.stat().st_mtime_ns for path in workdir.rglob("seed0/*")} == written
    table = (workdir / "table.md").read_text()
    assert out.endswith(table) and again.endswith(table)

    out, err = run(commands, "--workdir", workdir, "optim.name=sgd optim.learning_rate=1e30", "", *TINY, code=1)
    assert "error: 1 of 2 runs failed" in err and "not finite" in out and "| 0 of 1, 1 failed |" in out
    assert "[2/2] base, seed 0: held-out accuracy" in out


def test_a_signal_reaches_the_run_which_saves_and_the_sweep_stops(commands, tmp_path):
    fields = ["--config.train.steps=4000", "--config.checkpoint.every=10"]
    arguments = ["--workdir", tmp_path, *TINY, *fields]
    process = popen(commands, *arguments)
    metrics = tmp_path / "base" / "seed0" / "metrics.csv"
    deadline = time.monotonic() + 120
    while len(writers.read_metrics(metrics)) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    os.kill(process.pid, signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 75, f"{out}\n{err}"
    log = metrics.parent.with_suffix(".log").read_text()
    assert "stopped: saved step" in log and "stopped: in run 1 of 1" in err and "| 0 of 1 " in out
    assert read_csv(tmp_path / "runs.csv")[0]["status"] == "unfinished"

"""Compares recipes: trains each over a number of seeds, one run after another, and gathers one table.

    python launch/sweep.py --config configs/cifar10_tinyvit.py --workdir runs/sweep --seeds 3 \\
        "" "model.stem=conv" "optim.learning_rate=2e-2 model.pool=seq" --config.train.epochs=3

A recipe is a list of overrides without `--config.`, separated by blanks ("": the config as it is, which the table calls
base). `--config.FIELD=VALUE` holds for all recipes. Choices are made on pictures held out of train (data.holdout, 0.1
where the config has none): the table shows the held-out accuracy of the last step, and never that on test. With --final
the config's own data.holdout stays and the table shows the test accuracy of the last step, for a recipe that is chosen.

The folder gets table.md, table.csv (a row a recipe), runs.csv (a row a run, with its exact command), sweep.png, and for
each run RECIPE/seedN and its output, RECIPE/seedN.log. The same command again goes on: finished runs are not run again,
interrupted and failed ones go on from their last checkpoint; further recipes and seeds are added to the table.
Exit codes: 0 done, 1 a run failed, 2 wrong input, 75 stopped by a signal after the run was saved.
"""

import argparse
import contextlib
import csv
import dataclasses
import hashlib
import json
import os
import pathlib
import re
import shlex
import signal
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from vit_jax import command_line, errors
from vit_jax import config as configs
from vit_jax.errors import UserError
from vit_jax.training import writers

HOLDOUT = 0.1  # of train, where the config holds nothing out
FAILED = "failed (exit "  # how the last line of a failed run's log begins
COSTS = ("parameters", "epochs", "minutes", "images_per_second")
Row = dict[str, Any]  # of a table, a value a column, None where there is none


@dataclasses.dataclass(frozen=True)
class Sweep:
    """What is compared: a config with overrides common to all recipes, and the number of seeds of each recipe."""

    workdir: pathlib.Path
    config: str  # FILE.py[:VARIANT]
    common: list[str]
    final: bool
    recipes: dict[str, int]
    base: dict[str, Any]  # the config with the common overrides, resolved

    def folder(self, recipe: str, seed: int) -> pathlib.Path:
        return self.workdir / slug(recipe) / f"seed{seed}"

    def overrides(self, recipe: str, seed: int) -> list[str]:
        own = [f"--config.{override}" for override in recipe.split()]
        return [*self.common, *own, f"--config.train.seed={seed}"]

    def command(self, recipe: str, seed: int) -> list[str]:
        place = ["--config", self.config, "--workdir", str(self.folder(recipe, seed))]
        return ["python", "-m", "vit_jax.main", *place, *self.overrides(recipe, seed)]


def slug(recipe: str) -> str:
    """A folder's name for a recipe, readable and its own."""
    name = recipe.replace(" ", "+") or "base"
    safe = re.sub(r"[^\w.=+,()-]", "_", name)[:100]
    return safe if safe == name else f"{safe}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


# What to run


def make_sweep(args: argparse.Namespace, common: list[str], recipes: Sequence[str]) -> Sweep:
    """The sweep that the arguments name; every config in it is known to be right, and nothing is written yet."""
    base, name = command_line.parse(args.config, common)
    if not args.final and base.data.holdout == 0:
        common = [*common, f"--config.data.holdout={HOLDOUT}"]
        base, _ = command_line.parse(args.config, common)
        print(f"data.holdout={HOLDOUT}: recipes are compared on a part of train, as the config holds none out")
    workdir = args.workdir or pathlib.Path("runs") / f"sweep-{name}{'-final' * args.final}"
    sweep = Sweep(workdir, args.config, common, args.final, dict.fromkeys(recipes, args.seeds), configs.to_dict(base))
    if any(override.startswith("--config.train.seed=") for override in common):
        raise UserError("train.seed is what --seeds counts: leave it out")
    parsed = {}
    for recipe in recipes:
        if any(override.startswith(("train.seed=", "data.holdout=")) for override in recipe.split()):
            raise UserError(f"recipe {recipe!r}: train.seed and data.holdout are the same for all recipes")
        if parts := [override for override in recipe.split() if "=" not in override]:
            raise UserError(f"recipe {recipe!r}: {parts[0]!r} is not FIELD=VALUE (a value must not hold blanks)")
        try:
            for seed in range(args.seeds):
                parsed[recipe, seed], _ = command_line.parse(args.config, sweep.overrides(recipe, seed))
        except UserError as error:
            raise UserError(f"recipe {recipe!r}: {error}") from error
    sweep = joined(sweep) if (workdir / "sweep.json").exists() else sweep

    # After the configs are known to be right: it takes seconds.
    from vit_jax.training import runs, setup

    for (recipe, seed), config in parsed.items():
        runs.same_run(setup.resolve_model(config), sweep.folder(recipe, seed))
    return sweep


def joined(sweep: Sweep) -> Sweep:
    """The sweep with the recipes and seeds that its folder has already. Raises UserError where they do not compare."""
    stored = read_sweep(sweep.workdir)
    fields = configs.differences(configs.from_dict(sweep.base), configs.from_dict(stored.base))
    fields += [f"--final ({stored.final} there, {sweep.final} now)"] if stored.final != sweep.final else []
    if fields:
        what = "; ".join(fields)
        raise UserError(f"{sweep.workdir} holds another sweep; give another --workdir. They differ in: {what}")
    seeds = {r: max(sweep.recipes.get(r, 0), stored.recipes.get(r, 0)) for r in stored.recipes | sweep.recipes}
    return dataclasses.replace(sweep, recipes=seeds)


def read_sweep(workdir: pathlib.Path) -> Sweep:
    path = workdir / "sweep.json"
    if not path.is_file():
        raise UserError(f"no sweep in {workdir}: it has no sweep.json")
    try:
        return Sweep(workdir, **json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}): remove it and run the sweep again") from error


def write_sweep(sweep: Sweep) -> None:
    sweep.workdir.mkdir(parents=True, exist_ok=True)
    values = {name: value for name, value in vars(sweep).items() if name != "workdir"}
    writers.write_json(sweep.workdir / "sweep.json", values)


# Running


@contextlib.contextmanager
def collected_signals() -> Iterator[list[int]]:
    """Collects what should stop the run, to be passed on to it; a closed terminal stops as SIGTERM does."""
    received: list[int] = []
    numbers = [n for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) != signal.SIG_IGN]

    def receive(number, _):
        received.append(signal.SIGTERM if number == signal.SIGHUP else number)

    before = {number: signal.signal(number, receive) for number in numbers}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run_child(command: Sequence[str], log: pathlib.Path, signals: list[int]) -> int:
    """Runs a command with its output in `log`, passes signals on to it, and gives its exit code, noted where failed."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab", buffering=0) as file:
        file.write(f"$ {shlex.join(command)}\n".encode())
        start = file.tell()
        # In a process group of its own: Ctrl-C in a terminal would reach it twice else, and the second one interrupts.
        options: Row = {"stdin": subprocess.DEVNULL, "stdout": file, "stderr": subprocess.STDOUT, "process_group": 0}
        child = subprocess.Popen([sys.executable, *command[1:]], env=os.environ | {"PYTHONUNBUFFERED": "1"}, **options)
        passed, code = 0, None
        while code is None:
            while passed < len(signals):
                child.send_signal(signals[passed])
                passed += 1
            with contextlib.suppress(subprocess.TimeoutExpired):
                code = child.wait(0.2)
        if code not in (0, errors.Stopped.exit_code) and not signals:
            lines = log.read_bytes()[start:].decode(errors="replace").split("\n")
            said = [x for x in lines if x.startswith("error: ")] or [x for x in lines if x.strip()] or ["no output"]
            file.write(f"{FAILED}{code}): {said[-1].strip().removeprefix('error: ')}\n".encode())
    return code


def train_all(sweep: Sweep, runs: Sequence[tuple[str, int]]) -> None:
    """Trains what is not finished, a line a run; raises Stopped after a signal, and RunError after failures."""
    failed = 0
    with collected_signals() as signals:
        for number, (recipe, seed) in enumerate(runs, 1):
            print(f"[{number}/{len(runs)}] {recipe or 'base'}, seed {seed}: ", end="", flush=True)
            folder = sweep.folder(recipe, seed)
            finished = (folder / "summary.json").exists()
            code = 0 if finished else run_child(sweep.command(recipe, seed), folder.with_suffix(".log"), signals)
            if code == errors.Stopped.exit_code or signals:
                print("stopped", flush=True)
                raise errors.Stopped(f"in run {number} of {len(runs)}; the same command goes on")
            run = gather_run(sweep, recipe, seed)
            failed += run["status"] != "done"
            result = run["error"] or f"{measure(sweep)} {run['accuracy']:.2%} in {run['minutes']:.1f} minutes"
            print(f"{result}{' (finished before)' if finished else ''}", flush=True)
            write_all(sweep)
    if failed:
        raise errors.RunError(f"{failed} of {len(runs)} runs failed: see the table and the logs in {sweep.workdir}")


# Gathering


def measure(sweep: Sweep) -> str:
    return "test accuracy" if sweep.final else "held-out accuracy"


def gather_run(sweep: Sweep, recipe: str, seed: int) -> Row:
    """A row of runs.csv, and the run's curve; the accuracy is that of the last step, and of finished runs only."""
    folder = sweep.folder(recipe, seed)
    path, log = folder / "summary.json", folder.with_suffix(".log")
    curve = [(row["epoch"], writers.score(row)) for row in writers.read_metrics(folder / "metrics.csv")]
    costs: Row = dict.fromkeys((*COSTS, "accuracy", "device", "protocol"))
    last = log.read_text(errors="replace").rstrip("\n").rpartition("\n")[2] if log.exists() else ""
    status, failure = ("failed", last) if last.startswith(FAILED) else ("unfinished" if curve else "not run", "")
    if path.exists():
        status, failure = "done", ""
        try:
            summary = json.loads(path.read_text())
            costs = {name: summary[name] for name in costs if name in summary}
            costs["minutes"] = summary["train_seconds"] / 60
            costs["accuracy"] = summary["test_accuracy"] if sweep.final else curve[-1][1]
        except (ValueError, TypeError, LookupError) as error:
            raise UserError(f"the run in {folder} is damaged ({error!r}): remove the folder, run again") from error
    about = {"recipe": recipe or "base", "seed": seed, "status": status, "error": failure, "curve": curve}
    return about | costs | {"command": shlex.join(sweep.command(recipe, seed))}


def tabulate(runs: Sequence[Row]) -> list[Row]:
    """A row a recipe, the best first: mean and sample SD of its finished runs' accuracy, and their mean costs."""
    table = []
    for recipe in dict.fromkeys(run["recipe"] for run in runs):
        own = [run for run in runs if run["recipe"] == recipe]
        done = [run for run in own if run["status"] == "done"]
        scores = [run["accuracy"] for run in done]
        row = {"recipe": recipe, "seeds_done": len(done), "seeds": len(own)}
        row["failed"] = sum(run["status"] == "failed" for run in own)
        row["accuracy"] = statistics.fmean(scores) if done else None
        row["accuracy_sd"] = statistics.stdev(scores) if len(done) > 1 else None
        row |= {name: statistics.fmean(run[name] for run in done) if done else None for name in COSTS}
        row["device"] = ", ".join(sorted({run["device"] for run in done}))
        table.append(row)
    return sorted(table, key=lambda row: -1 if row["accuracy"] is None else row["accuracy"], reverse=True)


def accuracy_text(row: Row) -> str:
    if row["accuracy"] is None:
        return ""
    spread = "(1 run)" if row["accuracy_sd"] is None else f"± {100 * row['accuracy_sd']:.2f}"
    return f"{100 * row['accuracy']:.2f} {spread}"


def markdown(sweep: Sweep, table: Sequence[Row], runs: Sequence[Row]) -> str:
    """The table for people, with what it was measured on, and what failed."""
    lines = [["recipe", "seeds done", f"{measure(sweep)}, %", "parameters", "epochs", "minutes", "images/s", "device"]]
    for row in table:
        failed = f", {row['failed']} failed" if row["failed"] else ""
        cells = [f"`{row['recipe']}`", f"{row['seeds_done']} of {row['seeds']}{failed}", accuracy_text(row)]
        formats = zip(COSTS, (",.0f", ".4g", ".1f", ".0f"), strict=True)
        cells += ["" if row[name] is None else format(row[name], style) for name, style in formats]
        lines.append([*cells, row["device"]])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    text = ["| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |" for line in lines]
    said = " / ".join(sorted({run["protocol"] for run in runs if run["protocol"]})) or "no run is finished yet"
    about = f"Accuracy of the last step on the {sweep.base['data']['holdout']:g} of train that is held out."
    about = f"Test accuracy of the last step ({said})." if sweep.final else about
    about += " Mean ± sample SD over seeds, finished runs only; minutes of training and images/s are means a run."
    failures = [f"- `{run['recipe']}`, seed {run['seed']}: {run['error']}" for run in runs if run["error"]]
    call = shlex.join(["--config", sweep.config, *sweep.common])
    return "\n".join([f"`{call}`", "", *text, "", about, *failures]) + "\n"


def write_csv(path: pathlib.Path, rows: Sequence[Row], columns: Sequence[str]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def write_all(sweep: Sweep) -> str:
    """Writes table.md, table.csv, runs.csv and sweep.png; gives the first."""
    runs = [gather_run(sweep, recipe, seed) for recipe, seeds in sweep.recipes.items() for seed in range(seeds)]
    table = tabulate(runs)
    text = markdown(sweep, table, runs)
    writers.write_text(sweep.workdir / "table.md", text)
    write_csv(sweep.workdir / "table.csv", table, list(table[0]))
    columns = ["recipe", "seed", "status", "accuracy", *COSTS, "device", "error", "command"]
    write_csv(sweep.workdir / "runs.csv", runs, columns)
    draw(sweep, table, runs)
    return text


def draw(sweep: Sweep, table: Sequence[Row], runs: Sequence[Row]) -> None:
    """Draws accuracy over epochs: a thick line a recipe, the mean of its finished runs; a thin one a run."""
    watched = "held-out accuracy" if sweep.base["data"]["holdout"] else "test accuracy (for the eye only)"
    figure = Figure(figsize=(8, 5 + 0.2 * len(table)), layout="constrained")
    axes = figure.subplots()
    for place, row in enumerate(table):
        style: Row = {"color": f"C{place % 10}", "linestyle": ("-", "--", ":", "-.")[place // 10 % 4]}
        own = [run for run in runs if run["recipe"] == row["recipe"]]
        for run in own:
            axes.plot(
                *zip(*run["curve"], strict=True) if run["curve"] else (), **style, lw=0.7, alpha=0.5, marker=".", ms=3
            )
        done = [dict(run["curve"]) for run in own if run["status"] == "done"]
        epochs = sorted(set.intersection(*map(set, done))) if done else []
        means = [statistics.fmean(curve[epoch] for curve in done) for epoch in epochs]
        label = f"{accuracy_text(row) or 'no finished run'}   {row['recipe']}"
        axes.plot(epochs, means, **style, lw=2, marker="o" if len(epochs) < 30 else None, markersize=4, label=label)
    axes.set(xlabel="epoch", ylabel=watched)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.grid(alpha=0.3)
    title = f"{measure(sweep)} of the last step in %, best first"
    legend = figure.legend(loc="outside lower left", frameon=False, title=title, alignment="left")
    for text in legend.get_texts():
        text.set_parse_math(False)  # a recipe may hold $
    figure.savefig(sweep.workdir / "sweep.png", dpi=120)


def main(arguments: list[str]) -> None:
    parser = errors.ArgumentParser(prog="python launch/sweep.py", description=__doc__)
    parser.add_argument("recipes", nargs="*", metavar="RECIPE", help='overrides, "A.B=C D.E=F"; none: the config as is')
    parser.add_argument("--config", metavar="CONFIG[:VARIANT]", help="what the recipes start from (needed to train)")
    parser.add_argument("--workdir", type=pathlib.Path, help="the sweep's folder (default: runs/sweep-<config name>)")
    parser.add_argument("--seeds", type=int, default=1, help="runs a recipe, with train.seed 0, 1, ... (default: 1)")
    parser.add_argument("--final", action="store_true", help="measure a chosen recipe: no holdout added, test accuracy")
    parser.add_argument("--table", action="store_true", help="train nothing: gather and print what --workdir has")
    args, rest = parser.parse_known_args(arguments)
    common = command_line.overrides_in([x for x in rest if x.startswith("-")])
    recipes = args.recipes + [x for x in rest if not x.startswith("-")]  # argparse leaves those after an override
    if args.table:
        if args.workdir is None or args.config or recipes or common or args.final:
            parser.error("--table needs --workdir and nothing else: it gathers all that is there")
        print(write_all(read_sweep(args.workdir)), end="")
        return
    if args.config is None:
        parser.error("--config is needed: --config digits")
    if args.seeds < 1:
        parser.error(f"--seeds {args.seeds}: it must be at least 1")
    recipes = list(dict.fromkeys(" ".join(recipe.split()) for recipe in recipes)) or [""]
    sweep = make_sweep(args, common, recipes)
    write_sweep(sweep)
    try:
        train_all(sweep, [(recipe, seed) for recipe in recipes for seed in range(args.seeds)])
    finally:
        print("\n" + write_all(sweep), end="", flush=True)


if __name__ == "__main__":
    errors.run(main)

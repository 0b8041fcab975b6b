"""A run's report.html: what was run and what came of it, in one file with its pictures in it, to be read offline."""

import base64
import pathlib
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from string import Template
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from vit_jax.config import FIELDS, get
from vit_jax.errors import RunError, UserError
from vit_jax.training import drawings, evaluation, runs
from vit_jax.training.drawings import Subject
from vit_jax.training.evaluation import Evaluation
from vit_jax.training.writers import Row, read_metrics, write_text

# The policy keeps the page from loading anything, whatever a class is named.
PAGE = Template("""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>$title</title>
<style>
body { max-width: 60rem; margin: 0 auto; padding: 1rem; color: #222; background: #fff;
       font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere }
h1 { margin: 0.5rem 0 0; line-height: 1.2 }
h2 { margin: 2.5rem 0 0.75rem; padding-bottom: 0.25rem; border-bottom: 1px solid #ddd }
p { margin: 0.5rem 0 }
.status, figcaption { color: #666 }
.numbers { display: flex; flex-wrap: wrap; gap: 0.75rem 2.5rem; margin: 0.75rem 0 }
.numbers div { color: #666 }
.numbers b { display: block; font-size: 1.6rem; line-height: 1.2; color: #222 }
pre { padding: 0.75rem; background: #f4f4f4; white-space: pre-wrap }
table { border-collapse: collapse; margin: 0.75rem 0 }
th, td { padding: 0.25rem 1.5rem 0.25rem 0; border-bottom: 1px solid #eee; text-align: left; vertical-align: top }
figure { margin: 1.5rem 0; overflow-x: auto }
figure img { max-width: 100% }
summary { cursor: pointer }
@media (max-width: 45rem) { figure img.wide { max-width: none; width: 42rem } }
</style>
<h1>$title</h1>
$body
</html>
""")
OF_RESULTS = {
    "confusion": "What is taken for what.",
    "mistakes": "The mistakes it was surest of.",
    "reliability": "How often it is right, by how sure it is.",
}
OF_MODEL = {
    "relevance": "Where it finds what speaks for a class.",
    "rollout": "Where attention leads, followed through all layers.",
}


def write(
    workdir: pathlib.Path,
    results: Mapping[str, np.ndarray] | None = None,
    summary: Mapping[str, Any] | None = None,
    data_dir: str | None = None,
) -> tuple[pathlib.Path, list[str]]:
    """Writes report.html into the folder of a run, finished or not; gives its path, and what was left out and why.

    The drawings in it also go to the run's figures/, and what was measured to evaluation.json.

    Args:
      results: of the last weights on the run's own test pictures, where they are known (see `step.make_evaluate`).
      summary: what summary.json will hold, where it is not there yet.
      data_dir: where data sets lie, if not where the run found them.

    Raises:
      UserError: there is no run.
    """
    config, _ = runs.read_config(workdir)
    about, summary = runs.read_about(workdir), summary or runs.read_summary(workdir)
    rows = read_metrics(workdir / "metrics.csv")
    subject = Subject(workdir, data_dir=data_dir)
    (workdir / "figures").mkdir(exist_ok=True)
    left_out: list[str] = []

    def attempt(what: str, make: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return make(*arguments)
        except (UserError, RunError) as error:
            left_out.append(f"{what}: {error}")

    curves = attempt("curves", drawings.curves, subject)
    measured = attempt("results and drawings of the model", _measure, subject, results)
    failures, looks = {}, {}
    if measured is not None:
        failures = {path.stem: path for path in evaluation.write(measured, workdir)}
        looks = {name: attempt(name, drawings.DRAWINGS[name], subject) for name in OF_MODEL}
        if "mistakes" not in failures:
            left_out.append("mistakes: there are none")
    parts = {
        "Result": _result(summary, measured, rows),
        "What was run": _origin(config, about),
        "Curves": curves and _picture(curves[0], "Loss and accuracy over epochs."),
        "Where it fails": _pictures(failures, OF_RESULTS),
        "Where it looks": _pictures({name: paths[0] for name, paths in looks.items() if paths}, OF_MODEL),
        "Speed and cost": _cost(summary, rows, about, measured and subject.run.params),
        "Left out": left_out and "<ul>" + "".join(f"<li>{escape(line)}</li>" for line in left_out) + "</ul>",
    }
    body = "\n".join(f"<h2>{heading}</h2>\n{part}" for heading, part in parts.items() if part)
    path = workdir / "report.html"
    write_text(path, PAGE.substitute(title=escape(runs.name_of(workdir)), body=body))
    return path, left_out


def _measure(subject: Subject, results: Mapping[str, np.ndarray] | None) -> Evaluation:
    if results is None:
        return evaluation.evaluate(subject.run)
    return evaluation.of_results(subject.run, subject.split, results)


# The parts, as HTML


def _result(summary: Mapping[str, Any] | None, measured: Evaluation | None, rows: Sequence[Row]) -> str:
    found = measured.report if measured else {}
    if summary is not None:
        found = found | {name: summary[f"test_{name}"] for name in ("accuracy", "accuracy_top5", "loss")}
        status = f"Finished: {summary['epochs']:.4g} epochs, {summary['steps']:,} steps."
        protocol = f"Protocol: {summary['protocol']}."
    else:
        status = f"Not finished: it was last evaluated in epoch {rows[-1]['epoch']:.4g}." if rows else "Not finished."
        protocol = (
            f"The numbers are of the checkpoint of step {measured.report['checkpoint_step']}." if measured else ""
        )
    numbers = {
        "test accuracy": _percent(found.get("accuracy")),
        "test accuracy, top 5": _percent(found.get("accuracy_top5")),
    }
    numbers["test loss"] = f"{found['loss']:.4f}" if found else "–"
    numbers["calibration error"] = _percent(found.get("ece"))
    if summary is not None and summary["best_val_accuracy"] is not None:
        numbers[f"best held out, step {summary['best_step']}"] = _percent(summary["best_val_accuracy"])
    shown = "".join(f"<div><b>{value}</b>{name}</div>" for name, value in numbers.items())
    of = f"Measured on {measured.report['examples']:,} pictures of {measured.report['dataset']}." if measured else ""
    return f'<p class="status">{status}</p><div class="numbers">{shown}</div><p>{escape(of)} {escape(protocol)}</p>'


def _origin(config: ConfigDict, about: Mapping[str, Any]) -> str:
    command = about.get("command", "")
    words = shlex.split(command)
    typed = {word.partition("=")[0].removeprefix("--config.") for word in words}
    changed = [path for path in FIELDS if path in typed]
    others = [path for path, field in FIELDS.items() if get(config, path) != field.default]
    lines = " ".join("\\\n  " * word.startswith("--") + shlex.quote(word) for word in words)
    parts = [f"<pre>{escape(lines)}</pre>" if command else "<p>The command was not kept.</p>"]
    if changed:
        parts.append(
            "<p>Set in the command, over the recipe:</p>" + _table((path, _text(get(config, path))) for path in changed)
        )
    elif command:
        parts.append("<p>The recipe as it is.</p>")
    fields = ((path, _text(get(config, path)), _text(FIELDS[path].default)) for path in others)
    parts.append(
        f"<details><summary>{len(others)} fields that differ from the defaults</summary>"
        + _table(fields, ("field", "value", "default"))
        + "</details>"
    )
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    return "".join(parts) + f"<p>{escape(versions)}; on {escape(about['device'])}.</p>"


def _cost(summary: Mapping[str, Any] | None, rows: Sequence[Row], about: Mapping[str, Any], params: Any) -> str:
    last = rows[-1] if rows else {}
    known = summary or {
        "train_seconds": last.get("seconds"),
        "images_per_second": last.get("images_per_second"),
        "parameters": sum(x.size for x in jax.tree.leaves(params)) or None,
        "device": about["device"],
    }
    formats: dict[str, tuple[str, Callable[[Any], str]]] = {
        "parameters": ("parameters", "{:,}".format),
        "images_per_second": ("pictures a second", "{:,.0f}".format),
        "train_seconds": ("training", lambda x: f"{x / 60:.1f} minutes" if x >= 60 else f"{x:.1f} seconds"),
        "compile_seconds": ("compiling", "{:.1f} seconds".format),
        "mfu": ("model FLOPs utilisation", "{:.1%}".format),
        "device": ("device", str),
    }
    return _table(
        (label, "–" if known.get(key) is None else show(known[key])) for key, (label, show) in formats.items()
    )


def _pictures(paths: Mapping[str, pathlib.Path], captions: Mapping[str, str]) -> str:
    return "".join(_picture(paths[name], caption) for name, caption in captions.items() if name in paths)


def _picture(path: pathlib.Path, caption: str) -> str:
    data = path.read_bytes()
    wide = ' class="wide"' * (int.from_bytes(data[16:20]) > 900)  # pixels, by the PNG's header
    image = f'<img{wide} alt="{caption}" src="data:image/png;base64,{base64.b64encode(data).decode()}">'
    return f"<figure>{image}<figcaption>{caption}</figcaption></figure>\n"


def _table(rows: Iterable[Sequence[str]], headings: Sequence[str] = ()) -> str:
    lines = [[f"<td>{escape(cell)}</td>" for cell in row] for row in rows]
    if headings:
        lines.insert(0, [f"<th>{heading}</th>" for heading in headings])
    return "<table>" + "".join(f"<tr>{''.join(cells)}</tr>" for cells in lines) + "</table>"


def _text(value: Any) -> str:
    if isinstance(value, tuple):
        return ", ".join(map(_text, value)) or "none"
    return "unset" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value) or "none"


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{share:.2%}"

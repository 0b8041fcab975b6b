"""report.html: that it says what was run and what came of it, holds all it shows, and leaves out what is not there."""

import base64
import io
import json
import pathlib
import re
import shlex
import shutil
from html.parser import HTMLParser

import pytest
from PIL import Image

from vit_jax import command_line
from vit_jax.errors import Absent, UserError
from vit_jax.training import drawings, loop, reporting


class Page(HTMLParser):
    """A page's tags with their attributes, its text, and the text of its table's rows."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.words, self.rows = [], [], []
        self.feed(path.read_text())
        self.text = " ".join(" ".join(self.words).split())
        self.headings = re.findall(r"<h2>(.*?)</h2>", path.read_text())
        self.captions = [attributes["alt"] for tag, attributes in self.tags if tag == "img"]

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_data(self, data):
        last = self.tags[-1][0] if self.tags else ""
        if last != "style":
            self.words.append(data)
        if last in ("td", "th"):
            self.rows[-1][-1] += data.strip()


@pytest.fixture
def run(finished, tmp_path):
    """A copy of the finished run."""
    return shutil.copytree(finished, tmp_path / "run")


def report(run, **options):
    path, left_out = reporting.write(run, **options)
    assert path == run / "report.html"
    return Page(path), left_out


def rewrite(path, change):
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


CAPTIONS = [
    "Loss and accuracy over epochs.",
    *("What is taken for what.", "The mistakes it was surest of.", "How often it is right, by how sure it is."),
    *("Where it finds what speaks for a class.", "Where attention leads, followed through all layers."),
]


def test_a_finished_run_has_left_its_report(finished, commands):
    page = Page(finished / "report.html")
    summary = json.loads((finished / "summary.json").read_text())
    about = json.loads((finished / "config.json").read_text())
    headings = ["Result", "What was run", "Curves", "Where it fails", "Where it looks", "Speed and cost"]
    assert page.headings == headings and page.captions == CAPTIONS
    assert f"{summary['test_accuracy']:.2%} test accuracy" in page.text
    assert f"{summary['test_loss']:.4f} test loss" in page.text and "Finished: 1.068 epochs, 24 steps." in page.text
    assert f"Measured on 359 pictures of digits. Protocol: {summary['protocol']}." in page.text
    typed = shlex.join(["python", "-m", "vit_jax.main", *map(str, commands.training(finished))])
    (shown,) = [words for words in page.words if words.startswith("python -m")]
    assert about["command"] == typed and shlex.split(shown.replace("\\\n", "")) == shlex.split(typed)
    assert all(f"{name} {version}" in page.text for name, version in about["versions"].items())
    typed = {str(word).partition("=")[0] for word in commands.training(finished) if str(word).startswith("--config.")}
    changed, differing = page.rows[: len(typed)], page.rows[len(typed) :]
    assert {f"--config.{name}" for name, _ in changed} == typed and ["train.steps", "24"] in changed
    assert ["field", "value", "default"] in differing and ["optim.name", "muon", "adamw"] in differing
    assert ["data.mean", "0.305822", "none"] in differing and ["model.depth", "1", "unset"] in differing
    assert not any(row[0] == "model.remat" for row in page.rows)
    cost = dict(row for row in page.rows if len(row) == 2)
    assert cost["parameters"] == f"{summary['parameters']:,}" and cost["device"] == "cpu"
    assert cost["model FLOPs utilisation"] == "–" and cost["compiling"] == f"{summary['compile_seconds']:.1f} seconds"
    assert re.fullmatch(r"[\d.]+ seconds", cost["training"])


def test_the_command_writes_the_same_page_again(run, commands):
    """The run measured itself; the command measures its last checkpoint."""
    before = (run / "report.html").read_bytes()
    (run / "report.html").unlink()
    out, _ = commands.run("report", "--workdir", run)
    assert out.splitlines() == [str(run / "report.html")]
    assert (run / "report.html").read_bytes() == before


def test_nothing_is_fetched_and_every_picture_is_in_it(finished):
    page = Page(finished / "report.html")
    assert not {tag for tag, _ in page.tags} & {"script", "link", "iframe", "object", "a", "base"}
    assert "url(" not in (finished / "report.html").read_text() and "@import" not in page.text
    for tag, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on") or name in ("href", "srcset", "style")]
        assert ("src" in attributes) == (tag == "img")
        if tag == "img":
            kind, _, data = attributes["src"].partition(",")
            assert kind == "data:image/png;base64"
            Image.open(io.BytesIO(base64.b64decode(data, validate=True))).verify()
    (policy,) = [a["content"] for tag, a in page.tags if a.get("http-equiv") == "Content-Security-Policy"]
    assert "default-src 'none'" in policy


def test_what_was_typed_and_named_is_text(finished, tmp_path):
    name = '<img src=x onerror="alert(1)">&amp; $title'
    run = shutil.copytree(finished, tmp_path / name)
    command = f"python -m vit_jax.main --config a.py --workdir {tmp_path}/'{name}' --config.train.seed 0"
    rewrite(run / "config.json", lambda values: values.update(command=command, device="<i>cpu"))
    page, _ = report(run)
    (shown,) = [words for words in page.words if words.startswith("python -m")]
    assert shlex.split(shown.replace("\\\n", "")) == shlex.split(command)
    assert "on <i>cpu." in page.text and ["train.seed", "0"] in page.rows
    assert [attributes.get("src", "")[:5] for tag, attributes in page.tags if tag == "img"] == ["data:"] * 6
    assert page.words.count(name) == 2  # the title, and the heading


def test_a_run_that_is_not_finished(run):
    (run / "summary.json").unlink()
    page, left_out = report(run)
    assert "Not finished: it was last evaluated in epoch 1.068." in page.text and left_out == []
    assert "The numbers are of the checkpoint of step 24." in page.text and page.captions == CAPTIONS
    cost = dict(row for row in page.rows if len(row) == 2)
    assert re.fullmatch(r"[\d,]+", cost["parameters"]) and cost["compiling"] == "–"


def test_a_run_that_has_only_begun(finished, tmp_path):
    shutil.copy(finished / "config.json", tmp_path)
    page, left_out = report(tmp_path)
    assert [line.partition(":")[0] for line in left_out] == ["curves", "results and drawings of the model"]
    assert "no evaluation yet" in left_out[0] and "no checkpoint yet" in left_out[1]
    assert page.headings == ["Result", "What was run", "Speed and cost", "Left out"] and page.captions == []
    assert "Not finished." in page.text and all(line in page.text for line in left_out)
    assert ["parameters", "–"] in page.rows and "– test accuracy" in page.text


def test_what_cannot_be_drawn_or_read_is_left_out(run, tmp_path, monkeypatch):
    def absent(subject):
        raise Absent("the model has <none>")

    monkeypatch.setitem(drawings.DRAWINGS, "rollout", absent)
    page, left_out = report(run)
    assert left_out == ["rollout: the model has <none>"] and left_out[0] in page.text
    assert page.captions == CAPTIONS[:-1]
    rewrite(run / "config.json", lambda values: values["data"].update(name=f"folder:{tmp_path / 'gone'}"))
    page, (line,) = report(run)
    assert "gone" in line and page.captions == CAPTIONS[:1]
    assert f"{json.loads((run / 'summary.json').read_text())['test_accuracy']:.2%} test accuracy" in page.text


def test_an_older_run_does_not_know_its_command(run):
    rewrite(run / "config.json", lambda values: values.pop("command"))
    assert "The command was not kept." in report(run)[0].text


def test_known_results_are_not_measured_again(run, monkeypatch):
    results = reporting.evaluation.evaluate(reporting.Subject(run).run).results
    monkeypatch.setattr(reporting.evaluation, "evaluate", None)
    before = (run / "report.html").read_bytes()
    report(run, results=results)
    assert (run / "report.html").read_bytes() == before


def test_a_fault_in_the_report_does_not_lose_the_run(commands, tmp_path, monkeypatch, capsys):
    def fault(*arguments):
        raise RuntimeError("no fonts")

    monkeypatch.setattr(reporting, "_measure", fault)
    overrides = commands.training(tmp_path, train__steps=2)[4:]
    config, _ = command_line.parse("configs/digits.py", overrides)
    summary = loop.train(config, tmp_path / "a run", "as typed")
    assert json.loads((tmp_path / "a run" / "summary.json").read_text()) == summary
    warning = f"warning: no report.html (no fonts); python -m vit_jax.report --workdir '{tmp_path}/a run' tries again"
    assert warning in capsys.readouterr().err and (tmp_path / "a run" / "curves.png").exists()
    assert json.loads((tmp_path / "a run" / "config.json").read_text())["command"] == "as typed"


def test_wrong_input(commands, tmp_path):
    assert "no run in" in commands.fails("report", "--workdir", tmp_path)
    assert "--workdir is needed" in commands.fails("report")
    with pytest.raises(UserError, match="no run in"):
        reporting.write(pathlib.Path(tmp_path))
    assert list(tmp_path.iterdir()) == []
    out, _ = commands.run("report", "--help")
    assert "--data_dir" in out and "--debug" in out

"""The documentation: its commands are understood, its links lead somewhere, and its diffs apply and run."""

import json
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "RESULTS.md", *sorted((ROOT / "docs").glob("*.md"))]
EXTEND = ROOT / "docs" / "extend.md"  # whose commands need its diffs
DIFFS = re.findall(r"```diff\n(.*?)```", EXTEND.read_text(), re.DOTALL)
# Reads commands from stdin and gives what is wrong with each. A command ends where it would leave its own file: with
# the import of the room that does the work, which is not there.
PARSE = """
import importlib, json, shlex, sys
from vit_jax.data import load

class Understood(Exception): pass
def build(*_, **__): raise Understood
load.build = build
sys.modules["vit_jax.training"] = None
wrong = []
for command in json.load(sys.stdin):
    try:
        module, *arguments = shlex.split(command.removesuffix("&"), comments=True)[2:]
        importlib.import_module(module).main(arguments)
        wrong.append(f"{command}: does nothing")
    except Understood:
        pass
    except (Exception, SystemExit) as error:
        if getattr(error, "name", None) != "vit_jax.training":
            wrong.append(f"{command}: {error}")
json.dump(wrong, sys.stdout)
"""
# Trains without the report, which the diffs do not change and which takes a third of the time.
TRAIN = """
import sys
from vit_jax import main
from vit_jax.training import reporting

reporting.write = lambda *_: None
main.main(sys.argv[1:])
"""


def prose(text):
    """The page without its blocks of code."""
    return re.sub(r"^```.*?^```$|^ {4}.*$", "", text, flags=re.DOTALL | re.MULTILINE)


def commands_in(text):
    """Its `python -m vit_jax...` lines, continued ones put together."""
    return re.findall(r"^(?:[ !]|.* && )*(python -m vit_jax\.\w+.*)$", text.replace("\\\n", " "), re.MULTILINE)


def wrong_commands(found, root=ROOT):
    call = [sys.executable, "-c", PARSE]
    done = subprocess.run(call, input=json.dumps(found), cwd=root, text=True, capture_output=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])  # others may have printed too


def broken_links(page):
    """The relative links of a page that lead nowhere."""
    text = prose(page.read_text())
    targets = re.findall(r"\]\(([^)\s]+)\)|<img src=\"([^\"]+)\"", text)
    targets += [(name, "") for name in re.findall(r"^```{image} (\S+)", page.read_text(), re.MULTILINE)]
    broken = []
    for target in (one or other for one, other in targets):
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        if not re.match("https?://", target) and (not file.exists() or anchor and anchor not in anchors(file)):
            broken.append(target)
    return broken


def anchors(page):
    """As GitHub and MyST make them of headings."""
    headings = re.findall(r"^#+ (.*)$", prose(page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_command_is_understood():
    found = [command for page in PAGES if page != EXTEND for command in commands_in(page.read_text())]
    assert len(found) > 30
    assert wrong_commands(found) == []


def test_a_wrong_command_is_found():
    good = "python -m vit_jax.main --config configs/digits.py  # trains"
    bad = [good.replace(".py", ".py --config.train.epoch=3"), good.replace("digits", "digit"), good + " --works"]
    bad += ["python -m vit_jax.prepare --dataset", "python -m vit_jax.man", "python -m vit_jax.main --help"]
    bad[2] = bad[2].replace("# trains ", "")
    assert [line.split(": ")[0] for line in wrong_commands([good, *bad])] == bad


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_files_are_there(page):
    assert broken_links(page) == []
    files = r"(?<![\w/.])(?:configs|launch|benchmarks|vit_jax|docs)/[\w/-]+\.(?:py|sh|sbatch|yaml|md|png|jpg)\b"
    named = re.findall(files, page.read_text())
    assert [name for name in named if "NAME" not in name and not (ROOT / name).exists()] == []


def test_a_broken_link_is_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# A heading: `so`\n[a](page.md#a-heading-so) [b](#a-heading) [c](other.md) [d](https://x.org/#y)")
    assert broken_links(page) == ["#a-heading", "other.md"]


def test_the_diffs_apply_and_run(tmp_path, commands):
    for name in ("vit_jax", "configs"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    assert len(DIFFS) == 3
    for diff in DIFFS:
        assert len(re.findall(r"^[+-](?!\+\+ |-- )", diff, re.MULTILINE)) <= 30
        subprocess.run(["git", "apply", "-"], input=diff, cwd=tmp_path, text=True, check=True)
    assert wrong_commands(commands_in(EXTEND.read_text()), tmp_path) == []
    snippet = re.search(r"```python\n(.*?)```", EXTEND.read_text(), re.DOTALL).group(1)
    subprocess.run([sys.executable, "-c", snippet], cwd=tmp_path, check=True)
    fields = {"data.name": "npz:digits.npz", "data.dir": "data", "train.steps": 1, "train.steps_per_call": 1}
    fields |= {"augment.flip_vertical": True, "model.patch_norm": True, "model.dropout": 0.0, "ema.decay": 0.0}
    call = [sys.executable, "-c", TRAIN, *commands.training("run", **fields)]
    environment = commands.environment | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(call, cwd=tmp_path, env=environment, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert "embedding/norm_before" in done.stdout
    assert json.loads((tmp_path / "run" / "config.json").read_text())["augment"]["flip_vertical"]

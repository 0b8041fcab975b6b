"""What the repository promises: README and CI run the same commands, and each dependency is used."""

import ast
import pathlib
import re
import sys
import tomllib

import pytest
import yaml

import vit_jax

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
SOURCES = sorted((ROOT / "vit_jax").rglob("*.py"))
# How a distribution is imported, where its name does not say so; tfds's own needs are used through it.
IMPORTED_AS = {
    "absl-py": "absl",
    "orbax-checkpoint": "orbax",
    "pillow": "PIL",
    "scikit-learn": "sklearn",
    "tensorflow-datasets": "tensorflow_datasets",
}
FOR_TFDS = {"array-record", "importlib_resources", "tensorflow-cpu", "tensorflow"}


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


@pytest.mark.parametrize("start", ["pip install -e . && python", 'pip install -e ".[test]" && pytest'])
def test_ci_runs_exactly_the_commands_of_the_readme(start):
    commands = [line.strip() for line in README.splitlines() if line.startswith(f"    {start}")]
    assert len(commands) == 1
    assert commands[0] in (ROOT / ".ci" / "run").read_text().splitlines()


def test_every_config_and_file_that_the_readme_names_is_there():
    paths = set(re.findall(r"\b(?:configs|vit_jax)/[\w/]+\.py", README))
    assert len(paths) > 10
    assert [path for path in paths if not (ROOT / path).exists() and "NAME" not in path] == []


def test_declared_dependencies_are_those_that_are_imported():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = project["dependencies"] + project["optional-dependencies"]["demo"]
    declared = {re.match(r"[\w-]+", line).group() for line in lines} - FOR_TFDS
    declared = {IMPORTED_AS.get(name, name) for name in declared}
    used = {name.split(".")[0] for path in SOURCES for name in imports(path)}
    assert used - sys.stdlib_module_names - {"vit_jax"} == declared


def test_there_is_one_version():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    (latest, date), *_ = re.findall(r"^## \[([\d.]+)\] - (\S+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert cited["version"] == latest == vit_jax.__version__
    assert cited["date-released"] == date


def test_what_is_installed_is_every_room_and_the_configs():
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    rooms = {".".join(path.relative_to(ROOT).parent.parts) for path in SOURCES}
    assert set(setuptools["packages"]) == rooms | {"vit_jax.configs", "vit_jax.training.page"}
    assert setuptools["package-dir"] == {"vit_jax.configs": "configs"}


def test_the_training_process_never_imports_tensorflow_in_code():
    users = {p.name for p in SOURCES if any(name.split(".")[0].startswith("tensorflow") for name in imports(p))}
    assert users <= {"sources.py", "tiny_imagenet.py"}

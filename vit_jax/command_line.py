"""Reads a config from its file and the command line.

A config file defines `get_config(variant="")`, which starts from `default_config()`; `--config.GROUP.FIELD=VALUE`
overrides a field. The shipped ones are also found by their names alone.
"""

import argparse
import ast
import difflib
import importlib.util
import inspect
import pathlib
import sys
import traceback
from collections.abc import Sequence
from typing import Any

from ml_collections import ConfigDict

from vit_jax.config import EITHER, FIELDS, check, checked, put, unknown
from vit_jax.errors import UserError

PACKAGE = pathlib.Path(__file__).parent
INSTALLED = PACKAGE / "configs"
SHIPPED = INSTALLED if INSTALLED.is_dir() else PACKAGE.parent / "configs"  # the latter in a checkout


def parse(argument: str, overrides: Sequence[str]) -> tuple[ConfigDict, str]:
    """Reads a config and its `--config.FIELD=VALUE` overrides; returns the checked config and its name.

    Args:
      argument: `FILE.py` or the name of a shipped config, and `:variant` where it has some.

    Raises:
      UserError: the file, an override or the config as a whole is wrong.
    """
    filename, _, variant = argument.partition(":")
    path = _find(filename)
    config = _load_file(path, variant)
    given = dict(_split_override(override) for override in overrides)
    for field, value in given.items():
        other = EITHER.get(field)
        if other in given and value is not None and given[other] is not None:
            raise UserError(f"--config.{field} and --config.{other} are both given: give one")
        put(config, field, checked(field, FIELDS[field], value))
        if other is not None and value is not None and other not in given:
            put(config, other, None)
    check(config)
    return config, path.stem + (f"-{variant}" if variant else "")


def _find(name: str) -> pathlib.Path:
    """The config file of that path or, where there is none, the shipped config of that name."""
    path, shipped = pathlib.Path(name), SHIPPED / f"{name}.py"
    if path.is_file():
        return path
    if path.name == name and shipped.is_file():
        return shipped
    names = sorted(p.stem for p in SHIPPED.glob("*.py"))
    known = {p.name: str(p) for p in path.parent.glob("*.py") if p.is_file()} | {stem: stem for stem in names}
    near = difflib.get_close_matches(path.name, known, 1)
    hint = f"did you mean {known[near[0]]}?" if near else f"the shipped ones are {', '.join(names)}"
    raise UserError(f"no config file {path}; {hint}")


def _load_file(path: pathlib.Path, variant: str) -> ConfigDict:
    spec = importlib.util.spec_from_file_location(f"vit_jax_config_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise UserError(f"config file {path} is not a Python file (its name must end in .py)")
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.parent))  # as for a script: a config may import its neighbours
    try:
        spec.loader.exec_module(module)
        get_config = module.get_config
        takes_variant = bool(inspect.signature(get_config).parameters)
        if variant and not takes_variant:
            raise UserError(f"config file {path} has no variants, so {path}:{variant} is none")
        config = get_config(variant) if takes_variant else get_config()
    except UserError:
        raise
    except SyntaxError as error:
        where = f", line {error.lineno}" if error.lineno else ""
        raise UserError(f"config file {path}{where}: {error.msg}") from error
    except (Exception, SystemExit) as error:  # a config is the user's own Python: whatever it raises is wrong input
        frames = [f for f in traceback.extract_tb(sys.exc_info()[2]) if f.filename == str(path.resolve())]
        frames = frames or [f for f in traceback.extract_tb(sys.exc_info()[2]) if f.filename == str(path)]
        where = f", line {frames[-1].lineno}" if frames else ""
        message = str(error.args[0] if error.args else error)
        raise UserError(f"config file {path}{where}: {type(error).__name__}: {message}") from error
    finally:
        sys.path.remove(str(path.parent))
    if not isinstance(config, ConfigDict):
        raise UserError(f"config file {path}: get_config must return a ConfigDict, not {type(config).__name__}")
    return config


def overrides_in(arguments: Sequence[str]) -> list[str]:
    """The `--config.FIELD=VALUE` (or `--config.FIELD VALUE`) in what the parser left; UserError for anything else."""
    overrides: list[str] = []
    for argument in arguments:
        if argument.startswith("--config."):
            overrides.append(argument)
        elif overrides and "=" not in overrides[-1]:
            overrides[-1] += f"={argument}"
        else:
            raise UserError(f"unknown argument {argument!r} (see --help)")
    return overrides


def add_run_arguments(parser: argparse.ArgumentParser, *names: str) -> None:
    """Adds those of the arguments that say which weights of a run are meant, and where its data set is."""
    options: dict[str, dict[str, Any]] = {
        "checkpoint": {"metavar": "last|best|STEP", "help": "the run's checkpoint (default: last)"},
        "weights": {"choices": ["ema", "raw"], "help": "averaged or raw (default: ema where there are)"},
        "data_dir": {"help": "where data sets lie, if not where the run found them"},
    }
    for name in names:
        parser.add_argument(f"--{name}", **options[name])


def field_help() -> str:
    """A line a field, for --help."""
    lines = []
    for path, field in FIELDS.items():
        default = "unset" if field.default is None else repr(field.default)
        allowed = "" if field.kind in (str, bool) and not field.allowed.startswith("one of") else f" ({field.allowed})"
        lines.append(f"  --config.{path:<28} {field.meaning}{allowed} [{default}]")
    return "\n".join(lines)


def _split_override(override: str) -> tuple[str, Any]:
    path, equals, value = override.removeprefix("--config.").partition("=")
    if path not in FIELDS:
        raise unknown(path)
    if not equals:
        raise UserError(f"--config.{path} needs a value: --config.{path}=VALUE")
    return path, _parse_value(path, value)


def _parse_value(path: str, value: str) -> Any:
    field = FIELDS[path]
    if value == "None" and field.optional:
        return None
    if field.kind is str:
        return value
    if field.kind is bool and value.lower() in ("true", "false"):
        return value.lower() == "true"
    try:
        return ast.literal_eval(value)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return value  # of the wrong type: `check` says so

"""The weights that a run starts from: those that `init.checkpoint` names, a file's or another run's."""

import contextlib
import functools
import hashlib
import os
import pathlib
import sys
import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import fsspec
import jax
import numpy as np
from flax import traverse_util
from fsspec.callbacks import TqdmCallback
from ml_collections import ConfigDict

from vit_jax.data.load import expanded
from vit_jax.data.splits import Splits
from vit_jax.errors import DENIED, FULL, UserError, one_line
from vit_jax.models import pretrained
from vit_jax.models.archives import Stored
from vit_jax.models.pretrained import Facts, Source
from vit_jax.training import mesh as meshes
from vit_jax.training import runs, setup
from vit_jax.training.step import Classifier


def resolve(config: ConfigDict) -> ConfigDict:
    """A copy of the config in which what is known of the weights that it starts from has filled what was left unset."""
    config = config.copy_and_resolve_references()
    if not config.init.checkpoint:
        return config
    with opened(config.init.checkpoint) as source:
        facts = source.facts
    for name in ("gelu", "norm_epsilon"):
        if config.model[name] is None:
            config.model[name] = getattr(facts, name)
    for name in ("mean", "std"):
        config.data[name] = config.data[name] or getattr(facts, name)
    return config


def weights(
    config: ConfigDict, classifier: Classifier, class_names: Sequence[str], whole: bool = False
) -> tuple[dict[str, jax.Array], list[str]]:
    """The parameters (path → array) of `init.checkpoint` for a classifier, and lines that tell what came how.

    Args:
      class_names: the classifier's; the head of a run with others starts new.
      whole: whether nothing may be new.

    Raises:
      UserError: the weights cannot be had, or do not fit.
    """
    like = traverse_util.flatten_dict(
        meshes.with_sharding(classifier.shapes(), classifier.mesh, config.mesh.fsdp), sep="/"
    )
    with opened(config.init.checkpoint) as source:
        skip, notes = tuple(config.init.skip), []
        if source.class_names and source.class_names != tuple(class_names) and source.arrays.keys() & pretrained.HEAD:
            if whole:
                raise UserError(f"the classes of {source.name} are not those of {config.data.name}: nothing to measure")
            notes.append(f"the classes of {source.name} are others")
            skip += ("^head/",)
        params, changes = pretrained.fit(
            source, like, classifier.grid, skip=skip, resample_patches=config.init.resample_patches, whole=whole
        )
        count = sum(array.size for array in params.values())
        notes = [f"{len(params)} arrays, {count:,} parameters from {source.name}", *notes, *changes]
        return params, notes + _differences(config, source.facts)


def _differences(config: ConfigDict, facts: Facts) -> list[str]:
    """In what the config's model is another one than the weights were made with, as far as that is known."""
    names = ("gelu", "norm_epsilon", "position_embedding", "mask_self")
    pairs = {f"model.{name}": (config.model[name], getattr(facts, name)) for name in names}
    for name in ("mean", "std"):
        here, there = config.data[name], getattr(facts, name)
        pairs[f"data.{name}"] = (here, (there * len(here) if len(there) == 1 else there) or None)
    lines = [
        f"{path} is {here} here and {there} there" for path, (here, there) in pairs.items() if there not in (None, here)
    ]
    if not facts.mean:
        scaled = f"data.mean {config.data.mean}, data.std {config.data.std}"
        lines.append(f"the file does not say how its inputs were scaled: here by {scaled}")
    return lines


def placed(params: Any, new: dict[str, jax.Array]) -> Any:
    """The tree of parameters with the `new` ones (path → array) in their places."""
    return traverse_util.unflatten_dict(traverse_util.flatten_dict(params, sep="/") | new, sep="/")


def prepared(config: ConfigDict) -> tuple[ConfigDict, Splits, Classifier]:
    """The resolved config, its data and its classifier, where there is no run to resume.

    Raises:
      UserError: the config, its data or its weights are wrong.
    """
    config = resolve(setup.resolve_model(config))
    mesh = meshes.make_mesh(config.mesh.data, config.mesh.model)
    splits = setup.load_data(config)
    config = setup.resolve_data(config, splits.train, mesh)
    return config, splits, setup.make_classifier(config, len(splits.train.class_names), mesh)


@contextlib.contextmanager
def opened(checkpoint: str) -> Iterator[Source]:
    """The weights at a path or URL: a .npz or .safetensors file, a folder of transformers', or a run's workdir."""
    path = fetched(checkpoint) if "://" in checkpoint else expanded(checkpoint)
    if (path / "checkpoints").is_dir():
        yield _of_run(path)
        return
    if path.is_dir() and not (path / "model.safetensors").exists():
        raise UserError(f"no run in {path}, and no model.safetensors: give a file of weights, or a run's workdir")
    with pretrained.opened(path) as source:
        yield source


def _of_run(workdir: pathlib.Path) -> Source:
    """A run's last weights, averaged where it keeps an average; they are read when the first of them is."""
    config, class_names = runs.read_config(workdir)
    shapes, read_all = runs.last_weights(workdir)
    arrays = {name: Stored(shape, functools.partial(_item, read_all, name)) for name, shape in shapes.items()}
    return Source(str(workdir), arrays, setup.facts(config), class_names=class_names)


def _item(read_all: Callable[[], dict[str, np.ndarray]], name: str) -> np.ndarray:
    return read_all()[name]


def fetched(url: str) -> pathlib.Path:
    """The local copy of the file at a URL (https://, gs:// and what else fsspec knows), made where there is none.

    Raises:
      UserError: it cannot be had.
    """
    name = pathlib.PurePosixPath(url.partition("?")[0]).name
    path = meshes.cache_folder() / "weights" / f"{hashlib.sha256(url.encode()).hexdigest()[:16]}-{name}"
    if path.exists():
        return path
    part = path.with_name(f"{uuid.uuid4().hex}-{path.name}")  # another container has the same process id
    try:
        files, remote = fsspec.url_to_fs(url)
        if files.isdir(remote):
            raise UserError(f"{url} is a folder: give the address of a file of weights")
        path.parent.mkdir(parents=True, exist_ok=True)
        bar = TqdmCallback({"unit": "B", "unit_scale": True, "desc": name, "file": sys.stderr})
        files.get_file(remote, str(part), callback=bar)
        with pretrained.opened(part):  # what is none, as a server's page of apologies, is not kept
            os.replace(part, path)
    except UserError as error:
        raise UserError(f"what {url} gave: {error}") from error
    except ImportError as error:
        raise UserError(f'{url} needs another package: pip install "vit_jax[remote]" ({error})') from error
    except Exception as error:  # each of fsspec's file systems has errors of its own
        if isinstance(error, OSError) and error.errno in (*DENIED, *FULL):
            raise
        reason = one_line(error, 200)
        raise UserError(
            f"cannot fetch {url} ({type(error).__name__}: {reason}): check the address, or download it yourself"
        ) from error
    finally:
        part.unlink(missing_ok=True)
    return path

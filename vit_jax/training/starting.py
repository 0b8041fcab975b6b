"""The weights that a run starts from: those that `init.checkpoint` names, a file's or another run's."""

import contextlib
import functools
import os
import pathlib
import re
import sys
from collections.abc import Iterator
from typing import Any

import fsspec
import jax
import numpy as np
from flax import traverse_util
from fsspec.callbacks import TqdmCallback
from ml_collections import ConfigDict

from vit_jax.data.load import Splits
from vit_jax.errors import UserError
from vit_jax.models import pretrained
from vit_jax.models.archives import Stored
from vit_jax.models.pretrained import Facts, Source
from vit_jax.training import mesh as meshes
from vit_jax.training import setup
from vit_jax.training import workdir as runs
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
    config: ConfigDict, classifier: Classifier, keep_head: bool = False
) -> tuple[dict[str, jax.Array], list[str]]:
    """The parameters (path → array) of `init.checkpoint` for a classifier, and lines that tell what came how.

    Args:
      keep_head: whether the head must come from there too.

    Raises:
      UserError: the weights cannot be had, or do not fit.
    """
    shapes = jax.eval_shape(lambda: classifier.init(0))
    like = traverse_util.flatten_dict(meshes.with_sharding(shapes, classifier.mesh), sep="/")
    side = classifier.image_size // classifier.model.patch_size
    with opened(config.init.checkpoint) as source:
        params, notes = pretrained.fit(
            source,
            like,
            (side, side),
            skip=config.init.skip,
            resample_patches=config.init.resample_patches,
            keep_head=keep_head,
        )
        count = sum(array.size for array in params.values())
        notes = [f"{len(params)} arrays, {count:,} parameters from {source.name}"] + notes
        return params, notes + _differences(config, source.facts)


def _differences(config: ConfigDict, facts: Facts) -> list[str]:
    """In what the config's model is another one than the weights were made with."""
    model, data = config.model, config.data
    pairs = {
        "model.gelu": (model.gelu, facts.gelu),
        "model.norm_epsilon": (model.norm_epsilon, facts.norm_epsilon),
        "data.mean": (data.mean, facts.mean),
        "data.std": (data.std, facts.std),
    }
    lines = [f"{path} is {here} here and {there} there" for path, (here, there) in pairs.items() if here != there != ()]
    if not facts.mean:
        lines.append(
            f"the file does not say how its inputs were scaled: here by data.mean {data.mean}, data.std {data.std}"
        )
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
    mesh = meshes.make_mesh(config.mesh.data)
    splits = setup.load_data(config)
    config = setup.resolve_data(config, splits.train, mesh)
    return config, splits, setup.make_classifier(config, len(splits.train.class_names), mesh)


@contextlib.contextmanager
def opened(checkpoint: str) -> Iterator[Source]:
    """The weights at a path or URL: a .npz or .safetensors file, a folder of transformers', or a run's workdir."""
    path = fetched(checkpoint) if "://" in checkpoint else setup.expanded(checkpoint)
    if path.is_dir() and not (path / "model.safetensors").exists():
        yield _of_run(path)
        return
    with pretrained.opened(path) as source:
        yield source


def _of_run(workdir: pathlib.Path) -> Source:
    """A run's last weights, averaged where it keeps an average."""
    config, _ = runs.read_config(workdir)
    arrays = {
        name: Stored(array.shape, functools.partial(np.asarray, array))
        for name, array in runs.last_weights(workdir).items()
    }
    made = Facts(config.model.norm_epsilon, config.model.gelu, config.data.mean, config.data.std)
    return Source(str(workdir), arrays, made)


def fetched(url: str) -> pathlib.Path:
    """The local copy of the file at a URL (https://, gs:// and what else fsspec knows), made where there is none.

    Raises:
      UserError: it cannot be had.
    """
    folder = meshes.cache_folder() / "weights"
    path = folder / re.sub(r"[^\w.-]", "-", url)
    if path.exists():
        return path
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        files, remote = fsspec.url_to_fs(url)
        folder.mkdir(parents=True, exist_ok=True)
        bar = TqdmCallback({"unit": "B", "unit_scale": True, "desc": url, "file": sys.stderr})
        files.get_file(remote, str(part), callback=bar)
        os.replace(part, path)
    except ImportError as error:
        raise UserError(f'{url} needs another package: pip install "vit_jax[remote]" ({error})') from error
    except Exception as error:  # each of fsspec's file systems has errors of its own
        if isinstance(error, OSError) and part.exists() and error.errno:  # of the local disk
            raise
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"cannot fetch {url} ({type(error).__name__}: {reason}): check the address, or download it yourself"
        ) from error
    finally:
        part.unlink(missing_ok=True)
    return path

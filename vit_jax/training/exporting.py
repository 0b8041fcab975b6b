"""A run's weights as a file for other programs."""

import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util
from jax import export as jax_export
from ml_collections import ConfigDict

from vit_jax.errors import UserError
from vit_jax.models import names, pretrained
from vit_jax.training import setup, trained
from vit_jax.training.step import Classifier
from vit_jax.training.writers import replacing, write_json

PLATFORMS = ("cpu", "cuda", "tpu")
PROCESSOR = ("image_processor_type", "ViTImageProcessor")
# What a model must be for timm's and transformers' Vision Transformer to compute the same.
PLAIN = {"pool": "cls", "position_embedding": "learned", "mask_self": False, "representation_size": 0}


def export(
    workdir: pathlib.Path,
    format: str,
    output: pathlib.Path,
    scheme: str = "official",
    checkpoint: str | None = None,
    weights: str | None = None,
) -> str:
    """Writes a run's weights as "npz", "safetensors" or "stablehlo"; returns a line that tells how to use the file.

    Args:
      scheme: names and layout of a safetensors file: "official", "timm" or "transformers", which also gets its two
        JSON files beside it.
      checkpoint, weights: as for `trained.open_run`.

    Raises:
      UserError: there is no such run, checkpoint or average, or the file cannot hold this model; nothing was written.
    """
    output = output.absolute().resolve()
    _check_output(output)
    run = trained.open_run(workdir, checkpoint, weights)
    config, class_names, classifier = run.config, run.class_names, run.classifier
    if scheme != "official":
        _check_plain(config, scheme)
    if scheme == "transformers":
        _check_neighbours(output)
    params = jax.device_get(run.params)
    if format == "stablehlo":
        data = stablehlo(classifier, params)
        output.parent.mkdir(parents=True, exist_ok=True)
        with replacing(output) as file:
            file.write(data)
        size, channels = classifier.image_size, len(classifier.mean)
        call = f"jax.export.deserialize(bytearray(open({str(output)!r}, 'rb').read())).call(pictures)"
        return f"{call} gives logits of uint8 pictures [B, {size}, {size}, {channels}]"
    arrays = names.renamed(traverse_util.flatten_dict(params, sep="/"), scheme)
    output.parent.mkdir(parents=True, exist_ok=True)
    with replacing(output) as file:
        pretrained.write(file, arrays, format, setup.facts(config))
    if scheme == "transformers":
        write_json(output.with_name("config.json"), transformers_config(config, class_names))
        write_json(output.with_name("preprocessor_config.json"), transformers_inputs(config))
        return f"transformers.ViTForImageClassification.from_pretrained({str(output.parent)!r}) loads it"
    if scheme == "timm":
        return f"{timm_call(config, len(class_names))} is its network"
    return f"--config.init.checkpoint={output} starts from it"


def stablehlo(classifier: Classifier, params: Any) -> bytes:
    """The classifier as one serialised program for CPU, CUDA and TPU: uint8 [B, S, S, C] → float32 logits [B, K].

    B is free; weights and normalisation are inside. `jax.export.deserialize` reads it, without this package.
    """
    size, channels = classifier.image_size, len(classifier.mean)
    (batch,) = jax_export.symbolic_shape("batch")
    pictures = jax.ShapeDtypeStruct((batch, size, size, channels), jnp.uint8)
    program = jax.jit(lambda images: classifier.logits(params, images))
    return bytes(jax_export.export(program, platforms=PLATFORMS)(pictures).serialize())


def _check_plain(config: ConfigDict, scheme: str) -> None:
    other = [f"model.{name}={config.model[name]}" for name, value in PLAIN.items() if config.model[name] != value]
    if other:
        raise UserError(f"{scheme}'s Vision Transformer has no {', '.join(other)}: use --format npz or stablehlo")


def _check_output(output: pathlib.Path) -> None:
    """Raises UserError where `output` is no ordinary file, or a run's own."""
    if output.exists() and not output.is_file():
        raise UserError(f"{output} is no file: give another --output")
    for folder in output.parents:
        if (folder / "checkpoints").is_dir() and (folder / "config.json").exists():
            if output.exists() or (folder / "checkpoints") in output.parents:
                raise UserError(f"{output} belongs to the run in {folder}: give another --output")


def _check_neighbours(output: pathlib.Path) -> None:
    """transformers looks for a file of one name, and its JSON files may not take the place of another program's."""
    if output.name != "model.safetensors":
        raise UserError(f"transformers looks for a model.safetensors, not {output.name}: give --output that name")
    for name, key, value in (("config.json", "model_type", "vit"), ("preprocessor_config.json", *PROCESSOR)):
        path = output.with_name(name)
        try:
            ours = not path.exists() or path.is_file() and json.loads(path.read_text()).get(key) == value
        except (ValueError, AttributeError, OSError, RecursionError):
            ours = False
        if not ours:
            raise UserError(f"{path} is there already, and transformers needs a {name} of its own: give a new folder")


def transformers_config(config: ConfigDict, class_names: tuple[str, ...]) -> dict[str, Any]:
    model = config.model
    return {
        "architectures": ["ViTForImageClassification"],
        "model_type": "vit",
        "hidden_size": model.width,
        "num_hidden_layers": model.depth,
        "num_attention_heads": model.num_heads,
        "intermediate_size": model.mlp_dim,
        "hidden_act": "gelu" if model.gelu == "exact" else "gelu_pytorch_tanh",
        "layer_norm_eps": model.norm_epsilon,
        "hidden_dropout_prob": model.dropout,
        "attention_probs_dropout_prob": model.attention_dropout,
        "image_size": config.data.image_size,
        "patch_size": model.patch_size,
        "num_channels": len(config.data.mean),
        "qkv_bias": True,
        "id2label": {str(i): name for i, name in enumerate(class_names)},
        "label2id": {name: i for i, name in enumerate(class_names)},
    }


def transformers_inputs(config: ConfigDict) -> dict[str, Any]:
    size = config.data.image_size
    return {
        PROCESSOR[0]: PROCESSOR[1],
        "do_resize": True,
        "size": {"height": size, "width": size},
        "resample": 2,  # bilinear
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(config.data.mean),
        "image_std": list(config.data.std),
    }


def timm_call(config: ConfigDict, num_classes: int) -> str:
    model, data = config.model, config.data
    # timm rounds the MLP's width down: half a feature more keeps it from losing one.
    act = "" if model.gelu == "exact" else ", act_layer='gelu_tanh'"
    return (
        f"timm.models.VisionTransformer(img_size={data.image_size}, patch_size={model.patch_size}, "
        f"in_chans={len(data.mean)}, num_classes={num_classes}, embed_dim={model.width}, depth={model.depth}, "
        f"num_heads={model.num_heads}, mlp_ratio={model.mlp_dim + 0.5} / {model.width}{act}, "
        f"norm_layer=functools.partial(torch.nn.LayerNorm, eps={model.norm_epsilon:g}))"
    )

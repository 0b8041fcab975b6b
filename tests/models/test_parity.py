"""The same network as in other libraries: transformers (and timm, where it imports) give the same logits.

`pip install -e ".[parity]"` brings what this needs, as CI does.
"""

import json

import numpy as np
import pytest

from vit_jax.config import default_config
from vit_jax.models import names, pretrained
from vit_jax.models.presets import preset
from vit_jax.training import exporting

torch = pytest.importorskip("torch", reason="pip install '.[parity]'")
transformers = pytest.importorskip("transformers", reason="pip install '.[parity]'")

# name, depth, side of the pictures the file was made for, and of those it is asked about
MODELS = [
    pytest.param("Ti/16", 2, 48, 48, id="Ti/16"),
    pytest.param("Ti/16", 2, 48, 80, id="Ti/16 larger"),
    pytest.param("B/16", 12, 32, 32, id="B/16 at full depth"),
    pytest.param("B/16", 2, 224, 224, id="B/16 native"),
    pytest.param("B/16", 2, 224, 384, id="B/16 larger"),
    pytest.param("L/32", 2, 224, 224, id="L/32"),
    pytest.param("L/32", 2, 64, 96, id="L/32 larger"),
]


@pytest.fixture
def files(fabric, tmp_path):
    """Makes an official file of random weights, reads it for pictures of another size, and exports what was read."""

    def make(name, depth, native, size, gelu="tanh"):
        fields = preset(name) | {"depth": depth, "num_classes": 7, "gelu": gelu}
        model = fabric.model(**fields)
        np.savez(tmp_path / "official.npz", **fabric.params(model, native))
        side = size // model.patch_size
        with pretrained.opened(tmp_path / "official.npz") as source:
            params, _ = pretrained.fit(source, fabric.like(model, size), (side, side), whole=True)
        return model, {path: np.asarray(array) for path, array in params.items()}

    return make


def assert_close(found, expected):
    """Relative to the largest logit, in float32."""
    found = found.detach().numpy()
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    assert np.abs(expected).max() > 0.1 and np.ptp(expected, axis=0).max() > 0.01


def channels_first(pictures):
    return torch.from_numpy(pictures.transpose(0, 3, 1, 2).copy())


def write(path, params, scheme):
    with path.open("wb+") as file:
        pretrained.write(file, names.renamed(params, scheme), path.suffix[1:], pretrained.KINDS[scheme])


def config_of(model, size):
    config = default_config()
    for name in ("patch_size", "width", "depth", "num_heads", "mlp_dim", "gelu", "norm_epsilon"):
        config.model[name] = getattr(model, name)
    config.data.update({"image_size": size, "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)})
    return config


@pytest.mark.parametrize("name, depth, native, size", MODELS)
def test_transformers(fabric, files, tmp_path, name, depth, native, size):
    gelu = "exact" if size == 224 else "tanh"
    model, params = files(name, depth, native, size, gelu)
    folder = tmp_path / "hf"
    folder.mkdir()
    write(folder / "model.safetensors", params, "transformers")
    class_names = tuple(f"class {i}" for i in range(7))
    hf_config = exporting.transformers_config(config_of(model, size), class_names)
    (folder / "config.json").write_text(json.dumps(hf_config))
    loaded, report = transformers.ViTForImageClassification.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    assert loaded.config.id2label[3] == "class 3"
    pictures = fabric.pictures(size)
    with torch.no_grad():
        logits = loaded.eval()(channels_first(pictures)).logits
    assert_close(logits, fabric.logits(model, params, pictures))


def test_a_model_that_transformers_made_and_saved(fabric, tmp_path):
    """Its own names, epsilon and GELU, read with nothing told: the same logits."""
    torch.manual_seed(0)
    sizes = dict(hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=40)
    hf_config = transformers.ViTConfig(image_size=24, patch_size=8, num_labels=5, layer_norm_eps=1e-3, **sizes)
    made = transformers.ViTForImageClassification(hf_config).eval()
    with torch.no_grad():
        for parameter in made.parameters():  # biases and norms start at 0 and 1, which hides what is mistaken
            parameter.add_(0.2 * torch.randn_like(parameter))
    made.save_pretrained(tmp_path)
    with pretrained.opened(tmp_path) as source:
        assert (source.facts.norm_epsilon, source.facts.gelu) == (1e-3, "exact")
        model = fabric.model(
            patch_size=8, width=24, mlp_dim=40, gelu=source.facts.gelu, norm_epsilon=source.facts.norm_epsilon
        )
        params, notes = pretrained.fit(source, fabric.like(model, 24), (3, 3), whole=True)
    assert notes == ["the head comes along: 5 classes"]
    pictures = fabric.pictures(24)
    with torch.no_grad():
        logits = made(channels_first(pictures)).logits
    assert_close(logits, fabric.logits(model, params, pictures))


def test_the_processor_that_is_exported_scales_as_we_do(tmp_path):
    """uint8 pictures of the model's own size, through transformers' processor: (level / 255 - mean) / std."""
    config = default_config()
    config.data.update({"image_size": 8, "mean": (0.1, 0.2, 0.3), "std": (0.5, 0.6, 0.7)})
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(exporting.transformers_inputs(config)))
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    picture = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    found = processor(picture, return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
    np.testing.assert_allclose(
        found, (picture / 255 - np.array([0.1, 0.2, 0.3])) / np.array([0.5, 0.6, 0.7]), atol=1e-5
    )


@pytest.mark.parametrize("name, depth, native, size", MODELS[:2])
def test_timm(fabric, files, tmp_path, name, depth, native, size):
    """timm's own reader of the official file, and its names."""
    timm = pytest.importorskip("timm", reason="it needs a torchvision that fits torch, which not every index has")
    model, params = files(name, depth, native, size, "exact")
    network = eval(
        exporting.timm_call(config_of(model, size), 7),
        {"timm": timm, "torch": torch, "functools": __import__("functools")},
    )
    pictures = fabric.pictures(size)
    expected = fabric.logits(model, params, pictures)
    write(tmp_path / "exported.npz", params, "official")
    network.load_pretrained(tmp_path / "exported.npz")
    with torch.no_grad():
        assert_close(network.eval()(channels_first(pictures)), expected)
    write(tmp_path / "timm.safetensors", params, "timm")
    from safetensors.torch import load_file

    network.load_state_dict({k: torch.zeros_like(v) for k, v in network.state_dict().items()})
    network.load_state_dict(load_file(tmp_path / "timm.safetensors"))
    with torch.no_grad():
        assert_close(network.eval()(channels_first(pictures)), expected)

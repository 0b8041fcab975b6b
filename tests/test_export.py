"""What `export` writes is the run's network: bit for bit in files of weights, to rounding in other programs."""

import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from flax import traverse_util

from vit_jax.data.load import load
from vit_jax.errors import UserError
from vit_jax.models import pretrained
from vit_jax.models.pretrained import Facts
from vit_jax.training import exporting, mesh, runs, setup

PLAIN = {"model__pool": "cls", "train__steps": 6, "optim__learning_rate": 0.05}


@pytest.fixture(scope="session")
def plain(tmp_path_factory, commands):
    """A run of a plain Vision Transformer."""
    workdir = tmp_path_factory.mktemp("plain") / "run"
    commands.train(workdir, **PLAIN)
    return workdir


@pytest.fixture(scope="module")
def network(plain):
    """The run's classifier and parameters."""
    config, class_names = runs.read_config(plain)
    classifier = setup.make_classifier(config, len(class_names), mesh.make_mesh(1))
    return classifier, jax.device_get(runs.load_weights(plain, classifier)[0])


@pytest.fixture(scope="module")
def pictures():
    return np.array(load("digits", "test").images[:5])


@pytest.fixture(scope="module")
def logits(network, pictures):
    classifier, params = network
    return np.asarray(jax.jit(classifier.logits)(params, pictures))


def export(commands, workdir, output, *arguments):
    out, _ = commands.run("export", "--workdir", workdir, "--output", output, *arguments)
    assert f"{output.stat().st_size:,} bytes" in out
    return out


def assert_holds(path, params):
    with pretrained.opened(path) as source:
        for key, array in traverse_util.flatten_dict(params, sep="/").items():
            np.testing.assert_array_equal(source.arrays[key].read().reshape(array.shape), array, err_msg=key)


@pytest.mark.parametrize(
    "name, scheme",
    [
        ("a.npz", "official"),
        ("a.safetensors", "official"),
        ("a.safetensors", "timm"),
        ("model.safetensors", "transformers"),
    ],
)
def test_files_hold_the_very_weights_and_how_they_were_made(plain, network, tmp_path, name, scheme):
    exporting.export(plain, name.partition(".")[2], tmp_path / "new" / name, scheme)
    assert_holds(tmp_path / "new" / name, network[1])
    classifier = network[0]
    with pretrained.opened(tmp_path / "new" / name) as source:
        assert source.facts == Facts(1e-6, "tanh", classifier.mean, classifier.std, 2, "learned", False)


def test_a_run_starts_from_what_was_exported(commands, plain, network, tmp_path):
    path = tmp_path / "new" / "a.safetensors"
    out = export(commands, plain, path, "--format", "safetensors", "--names", "timm")
    assert "act_layer='gelu_tanh'" in out
    fields = [f"--config.init.checkpoint={path}", *commands.training(None, **PLAIN)[4:]]
    out, _ = commands.run("evaluate", "--config", "configs/digits.py", "--workdir", tmp_path / "measured", *fields)
    measured = json.loads((tmp_path / "measured" / "evaluation.json").read_text())
    summary = json.loads((plain / "summary.json").read_text())
    assert measured["accuracy"] == summary["test_accuracy"] and measured["loss"] == summary["test_loss"]
    assert " there" not in out  # gelu, epsilon, mean and deviation came with the file


def test_raw_weights_and_a_step(plain, network, tmp_path):
    exporting.export(plain, "npz", tmp_path / "raw.npz", checkpoint="6", weights="raw")
    raw, _, _ = runs.load_weights(plain, network[0], "6", "raw")
    with np.load(tmp_path / "raw.npz") as file:
        np.testing.assert_array_equal(file["head/kernel"], raw["head"]["kernel"])
        assert np.abs(file["head/kernel"] - network[1]["head"]["kernel"]).max() > 0


def test_stablehlo_runs_without_this_package(commands, plain, pictures, logits, tmp_path):
    export(commands, plain, tmp_path / "network.bin", "--format", "stablehlo")
    np.save(tmp_path / "pictures.npy", pictures)
    program = f"""
import sys
sys.modules["vit_jax"] = None
import jax, numpy as np
exported = jax.export.deserialize(bytearray(open(r"{tmp_path}/network.bin", "rb").read()))
assert set(exported.platforms) == {{"cpu", "cuda", "tpu"}}, exported.platforms
pictures = np.load(r"{tmp_path}/pictures.npy")
for count in (1, 2, 5):
    logits = exported.call(pictures[:count])
    assert logits.shape == (count, 10) and logits.dtype == np.float32
np.save(r"{tmp_path}/logits.npy", logits)
"""
    subprocess.run([sys.executable, "-c", program], env=commands.environment, cwd=tmp_path, check=True)
    np.testing.assert_allclose(np.load(tmp_path / "logits.npy"), logits, rtol=0, atol=1e-5 * np.abs(logits).max())


def test_stablehlo_of_every_ingredient(tmp_path):
    """Only the batch is free, whatever the model is made of."""
    config = setup.resolve_model(_digits(stem="conv", pool="seq", mlp_conv=True, position_embedding="rotary"))
    config.model.update({"gelu": "exact", "norm_epsilon": 1e-6})
    config.data.update({"image_size": 8, "mean": (0.3,), "std": (0.4,)})
    classifier = setup.make_classifier(config, 10, mesh.make_mesh(1))
    params = jax.tree.map(np.asarray, classifier.init(0))
    exported = jax.export.deserialize(bytearray(exporting.stablehlo(classifier, params)))
    images = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 1), np.uint8)
    np.testing.assert_allclose(exported.call(images), jax.jit(classifier.logits)(params, images), atol=1e-5)
    with pytest.raises(ValueError):
        exported.call(images[:, :4])


def _digits(**fields):
    from vit_jax.config import default_config

    config = default_config()
    config.model.update({"patch_size": 2, "width": 16, "depth": 1, "num_heads": 2, "mlp_dim": 16} | fields)
    return config


def test_wrong_arguments(commands, plain, tmp_path):
    def fails(*arguments):
        return commands.fails("export", "--workdir", plain, *arguments)

    assert "must end in .npz" in fails("--format", "npz", "--output", tmp_path / "a.safetensors")
    assert "--names is for" in fails("--format", "npz", "--output", tmp_path / "a.npz", "--names", "timm")
    assert "is a folder" in fails("--format", "stablehlo", "--output", tmp_path)


def test_what_cannot_be_exported(plain, finished, tmp_path):
    path = tmp_path / "model.safetensors"
    with pytest.raises(UserError, match="has no model.pool=gap"):
        exporting.export(finished, "safetensors", path, "timm")
    with pytest.raises(UserError, match="not a.safetensors: give --output that name"):
        exporting.export(plain, "safetensors", tmp_path / "a.safetensors", "transformers")
    with pytest.raises(UserError, match="no run in"):
        exporting.export(tmp_path, "safetensors", path)
    (tmp_path / "config.json").write_text('{"mine": 1}')
    with pytest.raises(UserError, match="config.json is there already"):
        exporting.export(plain, "safetensors", path, "transformers")
    (tmp_path / "config.json").rename(tmp_path / "preprocessor_config.json")
    with pytest.raises(UserError, match="preprocessor_config.json is there already"):
        exporting.export(plain, "safetensors", path, "transformers")
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("preprocessor_config.json", '{"mine": 1}')]
    (tmp_path / "preprocessor_config.json").unlink()
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(UserError, match="config.json is there already"):
        exporting.export(plain, "safetensors", path, "transformers")


def test_nothing_else_is_written_over(plain, tmp_path):
    os.mkfifo(tmp_path / "pipe.npz")
    with pytest.raises(UserError, match="pipe.npz is no file"):
        exporting.export(plain, "npz", tmp_path / "pipe.npz")
    for output in (plain / "config.json", plain / "checkpoints" / "6" / "params" / "new.npz"):
        with pytest.raises(UserError, match="belongs to the run"):
            exporting.export(plain, "npz", output)
    (tmp_path / "a.npz.part").write_text("precious")
    (tmp_path / "link.npz").symlink_to(tmp_path / "target.npz")
    exporting.export(plain, "npz", tmp_path / "a.npz")
    exporting.export(plain, "npz", tmp_path / "link.npz")
    assert (tmp_path / "a.npz.part").read_text() == "precious"
    assert (tmp_path / "link.npz").is_symlink() and (tmp_path / "target.npz").stat().st_size > 1000

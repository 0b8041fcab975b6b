"""The command that predicts, and the package's own `load`."""

import io
import json
import os
import pathlib
import subprocess
import sys

import pytest
from PIL import Image

import vit_jax
from vit_jax import predict
from vit_jax.data.load import load
from vit_jax.training import exporting

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder of three digits, one in a folder of its own, one with a name that is no text."""
    folder = tmp_path_factory.mktemp("pictures")
    (folder / "more").mkdir()
    for name, image in zip(
        (b"one.png", b"two\xff.png", b"more/three.png"), load("digits", "test").images, strict=False
    ):
        Image.fromarray(image[..., 0]).save(folder / os.fsdecode(name))
    return folder


def test_a_folder_a_list_and_bad_files(commands, finished, pictures, tmp_path, monkeypatch, capfd):
    (tmp_path / "bad.png").write_text("no picture")
    lines = f"{tmp_path}/bad.png\n{pictures}/one.png\r\n\n".encode()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines)))
    files = ["--json", tmp_path / "new" / "found.json", "--csv", tmp_path / "found.csv"]
    call = ["--workdir", finished, "--top", 2, pictures, "-", *files, "missing.png"]
    with pytest.raises(SystemExit) as end:
        predict.main([str(argument) for argument in call])
    assert end.value.code == 2
    paths = [f"{pictures}/{name}" for name in ("more/three.png", "one.png", "two\udcff.png", "one.png")]
    entries = json.loads((tmp_path / "new" / "found.json").read_text())
    classifier = vit_jax.load(finished)
    assert [entry["path"] for entry in entries] == paths
    for entry in entries:
        expected = classifier.predict(entry["path"], top=2)
        assert [p["label"] for p in entry["predictions"]] == [p["label"] for p in expected]
        assert entry["predictions"][0]["probability"] == pytest.approx(expected[0]["probability"], rel=1e-5)
    out, err = capfd.readouterr()
    assert len(out.splitlines()) == 4 and len((tmp_path / "found.csv").read_bytes().splitlines()) == 1 + 8
    for line, entry in zip(out.splitlines(), entries, strict=True):
        words = [word for p in entry["predictions"] for word in (p["label"], f"{p['probability']:.1%}")]
        assert line.split()[1:] == words
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert [line.split(": ")[1] for line in errors] == [f"{tmp_path}/bad.png", "missing.png"] and "Traceback" not in err


def test_the_command_itself(commands, finished, pictures):
    out, err = commands.run("predict", "--workdir", finished, pictures / "one.png")
    assert out.startswith(f"{pictures}/one.png  ") and out.count("%") == 5 and "error" not in err
    assert "missing.png: No such file" in commands.fails("predict", "--workdir", finished, "missing.png")


def test_exported_weights_predict_the_same(commands, finished, pictures, tmp_path, capsys):
    exporting.export(finished, "npz", tmp_path / "a.npz")
    fields = [f"--config.init.checkpoint={tmp_path}/a.npz", *commands.training(None)[4:]]
    picture = str(pictures / "one.png")
    config = ["--config", f"{ROOT}/configs/digits.py"]
    predict.main([*config, "--json", str(tmp_path / "a.json"), *fields, picture])
    (entry,) = json.loads((tmp_path / "a.json").read_text())
    assert entry == {"path": picture, "predictions": vit_jax.load(finished).predict(picture)}
    assert "arrays" in capsys.readouterr().err


def test_wrong_arguments(commands, tmp_path):
    def fails(*arguments):
        return commands.fails("predict", *arguments)

    assert "--workdir" in fails("a.png")
    assert "no pictures" in fails("--workdir", tmp_path)
    assert "no run in" in fails("--workdir", tmp_path, "a.png")
    assert "--top" in fails("--workdir", tmp_path, "a.png", "--top", "0")
    assert "is a folder" in fails("--workdir", tmp_path, "a.png", "--json", tmp_path)
    assert "is for a --config" in fails("--workdir", tmp_path, "a.png", "--config.data.name=digits")


def test_importing_the_package_alone_is_cheap():
    assert vit_jax.__all__ == ["load"]
    code = "import sys, vit_jax; assert not {'jax', 'numpy', 'PIL'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)

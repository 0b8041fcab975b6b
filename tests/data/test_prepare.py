"""The command `python -m vit_jax.prepare`."""

import pathlib
import subprocess
import sys

import pytest
from PIL import Image

ROOT = pathlib.Path(__file__).resolve().parents[2]


def prepare(*arguments):
    command = [sys.executable, "-m", "vit_jax.prepare", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.fixture
def folder(tmp_path):
    for split in ("train", "test"):
        for name in ("a", "b"):
            (tmp_path / "pictures" / split / name).mkdir(parents=True)
            Image.new("RGB", (9, 9)).save(tmp_path / "pictures" / split / name / "1.png")
    return tmp_path / "pictures"


def test_a_line_per_split_says_count_size_and_where(folder, tmp_path):
    arguments = ("--dataset", f"folder:{folder}", "--data_dir", tmp_path / "data", "--image_size", 8)
    first, second = prepare(*arguments), prepare(*arguments)
    lines = first.stdout.splitlines()
    assert first.returncode == 0 and len(lines) == 2
    assert "train: 2 pictures of 8x8x3, 2 classes" in lines[0] and str(tmp_path / "data" / "vit_jax") in lines[0]
    assert "test: 2 pictures" in lines[1]
    assert (second.returncode, second.stdout) == (0, first.stdout)


def test_digits_need_no_preparing(tmp_path):
    result = prepare("--dataset", "digits", "--data_dir", tmp_path / "data")
    assert result.returncode == 0 and "train: 1,438 pictures of 8x8x1" in result.stdout
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((), "--dataset"),
        (("--dataset", "cifra10"), "did you mean 'cifar10'"),
        (("--dataset", "digits", "--size", "3"), "--size"),
        (("--dataset", "folder:/nowhere", "--image_size", "0"), "--image_size is 0"),
        (("--dataset", "folder:/nowhere", "--image_size", "8"), "/nowhere"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(arguments, message, tmp_path):
    result = prepare(*arguments, "--data_dir", tmp_path)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1 and message in result.stderr


def test_an_unreadable_picture_can_be_skipped(folder, tmp_path):
    (folder / "train" / "a" / "2.jpg").write_text("text")
    arguments = ("--dataset", f"folder:{folder}", "--data_dir", tmp_path / "data", "--image_size", 8)
    result = prepare(*arguments)
    assert result.returncode == 2 and "2.jpg" in result.stderr and "--skip_unreadable" in result.stderr
    result = prepare(*arguments, "--skip_unreadable")
    assert result.returncode == 0 and "skipped 1 unreadable" in result.stderr and "2.jpg" in result.stderr


def test_help_describes_every_flag():
    result = prepare("--help")
    assert result.returncode == 0
    for flag in ("--dataset", "--data_dir", "--image_size", "--skip_unreadable", "--debug"):
        assert flag in result.stdout
    assert "--child" not in result.stdout

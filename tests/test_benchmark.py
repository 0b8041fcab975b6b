"""The door: what each option prints, writes and refuses."""

import json
import subprocess

import pytest

from vit_jax import benchmark
from vit_jax.errors import UserError
from vit_jax.training import comparing, rows

SMALL = ["--config", "configs/digits.py", "--windows", "2", "--seconds", "0", "--config.train.steps_per_call=2"]
SMALL += [f"--config.model.{field}" for field in ("width=16", "depth=1", "num_heads=2", "mlp_dim=16")]
CONTRACT = {"images_per_second", "milliseconds_per_step", "mfu", "parameters", "batch_size", "compile_seconds"}
CONTRACT |= {"peak_memory_bytes", "device"}


def test_rows_are_printed_written_and_recorded(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(rows, "RESULTS", tmp_path / "results.jsonl")
    (tmp_path / "results.jsonl").write_text('{"of": "another machine"}\n')
    benchmark.main([*SMALL, "--record", "--json", str(tmp_path / "rows.json"), "--profile", str(tmp_path / "trace")])
    (row,) = json.loads((tmp_path / "rows.json").read_text())
    assert row.keys() >= CONTRACT and row["config"] == "digits" and not row["bare"]
    assert "--config.model.width=16" in row["overrides"]
    assert row["parts"].keys() >= {"augmentation", "optimizer_and_ema", "evaluation", "checkpointing"}
    other, recorded = map(json.loads, (tmp_path / "results.jsonl").read_text().splitlines())
    assert other == {"of": "another machine"} and recorded == row
    out = capsys.readouterr().out
    assert f"{row['parameters']:,} parameters" in out and f"{row['images_per_second']:.1f} images/s" in out
    assert "MFU unknown" in out and "first step after" in out and "of a step: augmentation" in out
    assert all(kernel["name"] in out for kernel in row["kernels"])


def test_a_sweep_has_a_row_for_each_value(tmp_path, capsys):
    benchmark.main([*SMALL, "--bare", "--sweep", "batch=16,32", "--json", str(tmp_path / "rows.json")])
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [row["batch_size"] for row in rows] == [16, 32] and all(row.keys() >= CONTRACT for row in rows)
    assert all(row["bare"] and row["parts"] is None for row in rows)
    *_, header, first, second = capsys.readouterr().out.splitlines()
    assert header.split()[0] == "train.batch_size" and first.split()[3] == "1.00"
    growth = rows[1]["milliseconds_per_step"] / rows[0]["milliseconds_per_step"]
    assert second.split()[0] == "32" and second.split()[3] == f"{growth:.2f}"


def test_beside_torch(tmp_path, capsys):
    pytest.importorskip("torch", reason="pip install '.[parity]'")
    benchmark.main([*SMALL, "--peer", "--json", str(tmp_path / "rows.json")])
    ours, theirs = json.loads((tmp_path / "rows.json").read_text())
    assert ours["bare"] and theirs["torch"] and ours["parameters"] == theirs["parameters"]
    assert theirs.keys() >= CONTRACT
    ratio = ours["images_per_second"] / theirs["images_per_second"]
    assert ours["ratio_to_peer"] == pytest.approx(ratio)
    assert f"{ratio:.2f} times as fast as torch" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "--config is needed"),
        ([*SMALL, "--sweep", "batch"], "no field with values"),
        ([*SMALL, "--sweep", "batch=16,,32"], "no field with values"),
        ([*SMALL, "--sweep", "batch=16,few"], "train.batch_size"),
        ([*SMALL, "--sweep", "bach=16"], "unknown config field 'bach'"),
        ([*SMALL, "--windows", "0"], "whole number from 1"),
        ([*SMALL, "--seconds", "nan"], "number of seconds"),
        ([*SMALL, "--aot", "v5e:2x4", "--peer"], "leave out --peer"),
        ([*SMALL, "--peer", "--config.model.stem=shifted"], "--peer has no model.stem=shifted"),
        ([*SMALL, "--peer", "--config.init.multipliers=head", "--config.init.checkpoint=x.npz"], "multipliers=full"),
        ([*SMALL, "everything"], "unknown argument 'everything'"),
    ],
)
def test_wrong_input_is_named(arguments, message, monkeypatch):
    monkeypatch.setattr(comparing, "check", lambda: None)  # whether torch is here or not
    with pytest.raises(UserError, match=message):
        benchmark.main(arguments)


def test_rows_are_recorded_in_a_clone(tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "RESULTS", tmp_path / "nowhere" / "results.jsonl")
    with pytest.raises(UserError, match="in a clone"):
        benchmark.main([*SMALL, "--record"])


def test_the_commit_is_that_of_the_checkout_and_not_of_a_repository_around_an_install(tmp_path, monkeypatch):
    git = ["git", "-C", str(tmp_path), "-c", "user.name=x", "-c", "user.email=x"]
    for command in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "x"]):
        subprocess.run([*git, *command], check=True)
    monkeypatch.setattr(rows, "ROOT", tmp_path)
    assert rows.about()["commit"]
    monkeypatch.setattr(rows, "ROOT", tmp_path / "site-packages")
    assert rows.about()["commit"] is None

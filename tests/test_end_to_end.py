"""The real commands on tiny runs: what they leave behind, that they resume exactly, and what they refuse."""

import csv
import hashlib
import json
import pathlib
import random
import re
import shutil
import signal
import struct
import subprocess

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from PIL import Image
from tensorboardX.proto.event_pb2 import Event

from vit_jax.errors import UserError
from vit_jax.training import trained
from vit_jax.training.lock import Lock
from vit_jax.training.runs import read_summary

COLUMNS = (
    "step,epoch,learning_rate,train_loss,train_accuracy,val_loss,val_accuracy,val_accuracy_top5,ema_val_accuracy,"
    "images_per_second,seconds"
).split(",")
EXAMPLES = 1438  # of digits, for training


def read_rows(workdir):
    with (workdir / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def timeless(rows):
    return [{k: v for k, v in row.items() if k not in ("images_per_second", "seconds")} for row in rows]


def read_arrays(workdir, step):
    """Every array of a checkpoint, by name."""
    names = ("params", "ema", "optimizer", "progress")
    with ocp.CheckpointManager(workdir.absolute() / "checkpoints") as manager:
        items = ocp.args.Composite(**{name: ocp.args.StandardRestore() for name in names})
        restored = dict(manager.restore(step, args=items))
    return {jax.tree_util.keystr(path): np.asarray(x) for path, x in jax.tree_util.tree_leaves_with_path(restored)}


def assert_same_end(one, other, step):
    first, second = read_arrays(one, step), read_arrays(other, step)
    assert first.keys() == second.keys() and len(first) > 60
    for name in first:
        np.testing.assert_array_equal(first[name], second[name], err_msg=name)
    assert timeless(read_rows(one)) == timeless(read_rows(other))


def fingerprint(folder):
    return {str(p): hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.rglob("*") if p.is_file()}


def tensorboard_scalars(workdir):
    """{(tag, step): value} of the event files; a record is its length, a checksum, the event, a checksum."""
    values = {}
    for path in workdir.glob("events.out.tfevents.*"):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            event = Event.FromString(data[12 : 12 + length])
            values |= {(value.tag, event.step): value.simple_value for value in event.summary.value}
            data = data[16 + length :]
    return values


def test_what_a_run_leaves(finished):
    config = json.loads((finished / "config.json").read_text())
    assert config["model"]["patch_size"] == 2 and config["data"]["image_size"] == 8
    assert config["data"]["mean"] == pytest.approx([0.3055], abs=1e-3)  # of the training digits
    assert config["train"]["steps_per_call"] == 5
    assert config["versions"].keys() == {"python", "jax", "flax", "optax"} and config["device"] == "cpu"
    assert config["class_names"] == list("0123456789")

    rows = read_rows(finished)
    assert list(rows[0]) == COLUMNS
    assert [int(row["step"]) for row in rows] == [9, 18, 24]
    assert float(rows[-1]["epoch"]) == pytest.approx(24 * 64 / EXAMPLES)
    assert float(rows[-1]["train_loss"]) < float(rows[0]["train_loss"]) < 2.4
    assert all(0 < float(row["val_accuracy"]) < float(row["val_accuracy_top5"]) < 1 for row in rows)

    scalars = tensorboard_scalars(finished)
    for row in rows:
        for name in COLUMNS[2:]:
            assert scalars[name, int(row["step"])] == pytest.approx(float(row[name]), rel=1e-6)

    summary = json.loads((finished / "summary.json").read_text())
    assert summary["test_accuracy"] == float(rows[-1]["ema_val_accuracy"])
    assert summary["parameters"] == sum(
        v.size for k, v in read_arrays(finished, 24).items() if k.startswith("['params']")
    )
    assert summary["best_step"] is summary["best_val_accuracy"] is summary["mfu"] is None
    assert summary["protocol"].startswith("trained on all of train; curves on test; no selection")
    assert summary["steps"] == 24 and summary["train_seconds"] == float(rows[-1]["seconds"])

    assert len(list((finished / "checkpoints").iterdir())) == 2 and (finished / "checkpoints" / "24").is_dir()
    with Image.open(finished / "curves.png") as picture:
        assert picture.width > 800 and len(np.unique(picture.convert("L"))) > 20


def test_a_finished_run_says_so_and_changes_nothing(finished, commands):
    before = fingerprint(finished)
    out, _ = commands.train(finished, checkpoint__keep=5)  # what may change does not make it another run
    assert "finished" in out and fingerprint(finished) == before


def test_another_config_is_refused_in_the_same_workdir(finished, commands):
    before = fingerprint(finished)
    error = commands.train(finished, code=2, optim__learning_rate=0.5, model__qk_norm=True)
    assert "optim.learning_rate (0.01 there, 0.5 now)" in error and "model.qk_norm" in error
    assert "train." not in error and fingerprint(finished) == before


@pytest.mark.parametrize("weights", ["ema", "raw"])
def test_evaluate_reproduces_the_runs_own_numbers(finished, commands, weights):
    commands.run("evaluate", "--workdir", finished, "--weights", weights)
    report, summary = (json.loads((finished / f"{name}.json").read_text()) for name in ("evaluation", "summary"))
    last = read_rows(finished)[-1]
    if weights == "ema":
        assert report["accuracy"] == summary["test_accuracy"] and report["loss"] == summary["test_loss"]
        assert report["accuracy_top5"] == summary["test_accuracy_top5"]
    else:
        assert report["accuracy"] == float(last["val_accuracy"]) and report["loss"] == float(last["val_loss"])
    assert (report["examples"], report["checkpoint_step"], report["weights"]) == (359, 24, weights)
    assert 0 < report["ece"] < 1
    (finished / "evaluation.json").unlink()


def test_evaluate_refuses_what_is_not_there(finished, commands, tmp_path):
    before = fingerprint(finished)
    assert "24" in commands.fails("evaluate", "--workdir", finished, "--checkpoint", "7")
    assert "holdout" in commands.fails("evaluate", "--workdir", finished, "--checkpoint", "best")
    assert "no run in" in commands.fails("evaluate", "--workdir", tmp_path)
    assert fingerprint(finished) == before


# Long enough to be stopped, with held-out pictures, so that there is a best checkpoint to keep too; with all that is
# random in a step, small crops at first and mixing until late.
LONG = {"train__steps": 160, "train__eval_every": 1, "checkpoint__every": 0.3, "data__holdout": 0.2}
LONG |= {"augment__crop": "pad", "augment__padding": 1, "augment__small_size": 6, "augment__small_until": 0.4}
LONG |= {"augment__policy": "trivialaugment", "augment__crop_paste": True, "augment__erasing": 0.2}
LONG |= {"augment__mixup": 0.2, "augment__cutmix": 1, "augment__mix_until": 0.8, "augment__repeats": 2}
LONG |= {"model__mlp_conv": True, "model__position_embedding": "rotary", "model__drop_path": 0.1}


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory, commands):
    workdir = tmp_path_factory.mktemp("uninterrupted") / "run"
    commands.train(workdir, **LONG)
    return workdir


def test_accuracy_is_left_out_where_labels_were_mixed(uninterrupted):
    rows = read_rows(uninterrupted)
    unmixed = [int(row["step"]) for row in rows if row["train_accuracy"]]
    assert unmixed == [int(row["step"]) for row in rows if int(row["step"]) > 128 + 18]  # a row is of 18 steps
    assert all(float(row["train_loss"]) > 0 for row in rows)


def assert_same_run(workdir, uninterrupted):
    assert_same_end(uninterrupted, workdir, 160)
    steps = [sorted(int(p.name) for p in (w / "checkpoints").iterdir()) for w in (uninterrupted, workdir)]
    assert steps[0] == steps[1]
    summaries = [json.loads((w / "summary.json").read_text()) for w in (uninterrupted, workdir)]
    for name in ("test_accuracy", "test_loss", "best_val_accuracy", "best_step"):
        assert summaries[0][name] == summaries[1][name] is not None


def test_kill_9_at_random_moments_and_the_same_bits(uninterrupted, commands, tmp_path):
    call = commands.training(tmp_path, **LONG)
    chance = random.Random(0)
    for kill in range(3):
        process = commands.popen("main", *call)
        for _ in range(chance.randint(1, 2)):  # an evaluation's line: a checkpoint is being written
            assert process.stderr.readline().startswith("step "), process.communicate()
        try:
            process.wait(timeout=chance.uniform(0, 0.1))
        except subprocess.TimeoutExpired:
            process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL, f"kill {kill} came too late"
        assert (tmp_path / "lock.json").exists()  # which must keep nobody waiting
        assert not (tmp_path / "summary.json").exists()
    out, _ = commands.run("main", *call)
    assert "going on from step" in out
    assert_same_run(tmp_path, uninterrupted)


@pytest.mark.parametrize("number, steps_per_call", [(signal.SIGTERM, 5), (signal.SIGINT, 0)])
def test_a_signal_saves_and_the_same_command_goes_on(uninterrupted, commands, tmp_path, number, steps_per_call):
    call = commands.training(tmp_path, **LONG, train__steps_per_call=steps_per_call)
    process = commands.popen("main", *call)
    assert process.stderr.readline().startswith("step 18/160")
    with pytest.raises(UserError, match=f"process {process.pid} on .* trains in {tmp_path}"):
        Lock(tmp_path)
    process.send_signal(number)
    _, err = process.communicate()
    assert process.returncode == 75 and "stopped: saved step" in err, err
    assert not (tmp_path / "lock.json").exists() and (tmp_path / "curves.png").exists()
    chosen = json.loads((tmp_path / "config.json").read_text())["train"]["steps_per_call"]
    assert chosen == 5 if steps_per_call else 1 <= chosen <= 512
    commands.run("main", *call)
    assert json.loads((tmp_path / "config.json").read_text())["train"]["steps_per_call"] == chosen
    assert_same_run(tmp_path, uninterrupted)  # bit for bit, whatever the steps a dispatch
    assert "steps_per_call" in commands.train(tmp_path, code=2, **LONG, train__steps_per_call=chosen + 1)


def test_a_run_killed_before_its_first_checkpoint_begins_again(finished, commands, tmp_path):
    for name in ("config.json", "metrics.csv"):
        shutil.copy(finished / name, tmp_path)
    out, _ = commands.train(tmp_path)
    assert "from new weights" in out
    assert_same_end(finished, tmp_path, 24)


def test_choices_are_made_on_held_out_pictures(commands, tmp_path):
    fields = {"data__holdout": 0.2, "train__steps": 400, "train__patience": 2, "train__eval_every": 0.5}
    commands.train(tmp_path, **fields)
    summary, rows = json.loads((tmp_path / "summary.json").read_text()), read_rows(tmp_path)
    scores = [float(row["ema_val_accuracy"]) for row in rows]
    best = int(np.argmax(scores))
    assert summary["best_step"] == int(rows[best]["step"]) and summary["best_val_accuracy"] == scores[best]
    assert len(rows) == best + 3 and summary["steps"] == int(rows[-1]["step"]) < 400  # patience of two
    assert "held-out 0.2" in summary["protocol"]
    commands.run("evaluate", "--workdir", tmp_path, "--checkpoint", "best")
    report = json.loads((tmp_path / "evaluation.json").read_text())
    assert report["checkpoint_step"] == summary["best_step"] and report["examples"] == 359
    out, _ = commands.train(tmp_path, **fields)
    assert "finished" in out


def test_starting_from_another_runs_weights(finished, commands, tmp_path):
    commands.train(tmp_path / "more", init__checkpoint=finished, train__steps=1, optim__learning_rate=1e-9)
    summary, before = (json.loads((w / "summary.json").read_text()) for w in (tmp_path / "more", finished))
    assert summary["test_accuracy"] == before["test_accuracy"]
    error = commands.train(tmp_path / "wider", code=2, init__checkpoint=finished, model__mlp_dim=24)
    assert "MlpBlock_3/Dense_0/kernel is (16, 16) there and (16, 24) here" in error
    assert "no file of weights" in commands.train(tmp_path / "nothing", code=2, init__checkpoint=tmp_path / "nowhere")
    assert not (tmp_path / "wider").exists() and not (tmp_path / "nothing").exists()


def test_the_weights_a_run_started_from_are_not_needed_to_go_on(finished, commands, tmp_path):
    shutil.copytree(finished, tmp_path / "source")
    fields = {"init__checkpoint": tmp_path / "source", "train__steps": 12}
    commands.train(tmp_path / "run", **fields)
    shutil.rmtree(tmp_path / "source")
    (tmp_path / "run" / "summary.json").unlink()
    out, _ = commands.train(tmp_path / "run", **fields)
    assert "going on from step 12" in out


def test_a_diverging_run_ends_with_1_and_keeps_its_checkpoint(commands, tmp_path):
    # The rate is 0 at step 0 and then enormous: step 1 is good, what follows is not.
    fields = {"optim__name": "sgd", "optim__learning_rate": 1e38, "optim__warmup_steps": 12, "checkpoint__every": 0.01}
    _, err = commands.train(tmp_path, code=1, **fields)
    (line,) = (line for line in err.splitlines() if line.startswith("error: "))
    assert re.search(r"not finite at step \d+ \(learning rate \d\.\d+e\+37, gradient norm \S+\)", line), line
    assert "Traceback" not in err and not (tmp_path / "summary.json").exists()
    kept = sorted(int(p.name) for p in (tmp_path / "checkpoints").iterdir())
    assert kept and all(np.isfinite(x).all() for x in read_arrays(tmp_path, kept[-1]).values())


def test_two_devices_train_as_one(finished, commands, tmp_path):
    """From weights that are there, each device with a part of the state, and with pictures read from the disk.

    Through the end of the small crops, at step 5, and of mixing, at step 10.
    """
    fields = LONG | {"train__steps": 12, "train__eval_every": 0.2, "init__checkpoint": finished}
    fields |= {"model__mlp_conv": False, "model__position_embedding": "learned", "ema__decay": 0.9}
    commands.train(tmp_path / "one", **fields)
    two = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    apart = {"mesh__fsdp": True, "data__resident": "never"}
    commands.train(tmp_path / "two", **fields, **apart, environment=two)
    rows = list(zip(read_rows(tmp_path / "one"), read_rows(tmp_path / "two"), strict=True))
    assert [int(one["step"]) for one, _ in rows] == [4, 7, 11, 12] and rows[-1][0]["train_accuracy"]
    for one, two in rows:
        assert float(two["train_loss"]) == pytest.approx(float(one["train_loss"]), rel=1e-5)
        assert float(two["val_loss"]) == pytest.approx(float(one["val_loss"]), rel=1e-4)


@pytest.fixture
def pictures(tmp_path):
    """A folder of red and blue pictures of several sizes and kinds."""
    colors = {"red": (250, 10, 10), "blue": (10, 10, 250)}
    chance = np.random.default_rng(0)
    for split, count in (("train", 40), ("test", 10)):
        for name, color in colors.items():
            folder = tmp_path / "pictures" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                noise = chance.integers(-10, 6, (chance.integers(8, 20), chance.integers(8, 20), 3))
                picture = Image.fromarray(np.clip(np.array(color) + noise, 0, 255).astype(np.uint8))
                picture.save(folder / f"{i}.{('png', 'jpg', 'webp')[i % 3]}")
    return tmp_path / "pictures"


def of_folder(pictures, tmp_path):
    name = {"data__name": f"folder:{pictures}", "data__dir": tmp_path / "cache", "data__image_size": 8}
    return name | {"train__batch_size": 16, "train__eval_every": 2, "checkpoint__every": 2}


def test_ones_own_pictures_without_tensorflow(pictures, commands, tmp_path):
    for module in ("tensorflow", "tensorflow_datasets"):
        (tmp_path / "blocked" / module).mkdir(parents=True)
        (tmp_path / "blocked" / module / "__init__.py").write_text(f"raise ImportError('{module} is blocked')\n")
    blocked = {"PYTHONPATH": str(tmp_path / "blocked")}
    commands.train(tmp_path / "run", environment=blocked, **of_folder(pictures, tmp_path))
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["test_accuracy"] == 1.0
    commands.run("evaluate", "--workdir", tmp_path / "run", environment=blocked)
    assert json.loads((tmp_path / "run" / "evaluation.json").read_text())["examples"] == 20


def test_pictures_without_a_test_folder(pictures, commands, tmp_path):
    shutil.rmtree(pictures / "test")
    fields = of_folder(pictures, tmp_path)
    assert "data.holdout" in commands.train(tmp_path / "run", code=2, **fields)
    commands.train(tmp_path / "run", data__holdout=0.25, **fields)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert "no test pictures" in summary["protocol"] and summary["best_step"] is not None
    commands.run("evaluate", "--workdir", tmp_path / "run", "--checkpoint", "best")
    assert json.loads((tmp_path / "run" / "evaluation.json").read_text())["examples"] == 20


def test_a_text_file_named_jpg(pictures, commands, tmp_path):
    (pictures / "train" / "red" / "note.jpg").write_text("not a picture")
    fields = of_folder(pictures, tmp_path)
    assert "note.jpg" in commands.train(tmp_path / "run", code=2, **fields)
    assert not (tmp_path / "run").exists()
    _, err = commands.train(tmp_path / "run", data__skip_unreadable=True, **fields)
    assert "note.jpg" in err


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"data__name": "cifar11"}, ["cifar11", "cifar10"]),
        ({"model__patch_size": 3}, ["8", "3"]),
        ({"model__width": 17}, ["model.width=17", "model.num_heads=2"]),
        ({"train__batch_size": 0}, ["train.batch_size=0"]),
        ({"optim__learning_rate": -1e-3}, ["optim.learning_rate=-0.001"]),
        ({"train__bach_size": 3}, ["train.bach_size", "train.batch_size"]),
        ({"mesh__data": 64}, ["mesh.data=64"]),
        ({"model__preset": "XL/16", "model__width": "None"}, ["XL/16"]),
        ({"optim__warmup_steps": 24}, ["optim.warmup_steps=24", "24"]),
        ({"model__width": 18, "model__position_embedding": "sincos2d"}, ["18"]),
        ({"augment__policy": "randaugment", "augment__operations": "('rotat',)"}, ["'rotat'", "'rotate'"]),
        ({"augment__policy": "auto"}, ["'auto'", "autoaugment_cifar10"]),
        ({"augment__mix_by": "pixel", "augment__mixup": 1}, ["'pixel'", "batch, example"]),
        ({"augment__erasing": 1.2}, ["augment.erasing=1.2"]),
        ({"augment__mixup": 1, "train__batch_size": 1}, ["train.batch_size=1", "mix"]),
        ({"augment__repeats": 3}, ["train.batch_size=64", "augment.repeats=3"]),
        ({"model__stem": "shifted", "model__patch_size": 8}, ["8x8", "too small"]),
        ({"augment__small_size": 2, "augment__crop": "pad", "data__image_size": 32}, ["small_size=2", "8x8"]),
        ({"data__mean": "(1e999,)"}, ["data.mean=(inf,)", "from 0 to 1"]),
        ({"augment__small_size": 8, "augment__crop": "pad"}, ["augment.small_size=8", "data.image_size=8"]),
        ({"data__mean": "(0.5,0.5)", "data__std": "(1,1)"}, ["data.mean", "1"]),
    ],
)
def test_wrong_fields(commands, tmp_path, fields, words):
    error = commands.train(tmp_path / "run", code=2, **fields)
    assert all(word in error for word in words), error
    assert not (tmp_path / "run").exists()


def test_a_batch_that_the_devices_cannot_share(commands, tmp_path):
    three = {"XLA_FLAGS": "--xla_force_host_platform_device_count=3"}
    error = commands.train(tmp_path / "run", code=2, environment=three, augment__cutmix=1)
    assert "train.batch_size=64" in error and "3 devices" in error and not (tmp_path / "run").exists()


def test_wrong_commands_and_files(commands, tmp_path):
    (tmp_path / "broken.py").write_text("def get_config(:\n    pass\n")
    assert "broken.py, line 1" in commands.fails("main", "--config", tmp_path / "broken.py")
    assert "no config file" in commands.fails("main", "--config", tmp_path / "none.py")
    assert "--confg" in commands.fails("main", "--confg", "configs/digits.py")
    assert "--config" in commands.fails("main")
    assert "--workdir" in commands.fails("evaluate")
    (tmp_path / "file").touch()
    assert f"cannot use {tmp_path}/file" in commands.train(tmp_path / "file" / "run", code=2)


def test_compiled_programs_are_kept_in_the_users_cache(finished, commands):
    cache = pathlib.Path(commands.environment["XDG_CACHE_HOME"]) / "vit_jax" / "xla"
    assert any("train_steps" in path.name for path in cache.iterdir())


@pytest.mark.parametrize("name", ["main", "evaluate", "prepare", "visualize"])
def test_help(commands, name):
    out, _ = commands.run(name, "--help")
    assert "--debug" in out and len(out.splitlines()) > 8
    if name == "main":
        assert all(f"--config.{field} " in out for field in ("model.width", "optim.name", "mesh.data"))


def test_debug_shows_the_traceback(commands):
    _, err = commands.run("main", "--config", "nothing.py", "--debug", code=1)
    assert "Traceback" in err and "UserError" in err


def test_a_damaged_workdir_is_named(finished, commands, tmp_path):
    for name, damage in {"truncated": '{"model": {', "foreign": '{"a": 1}', "empty": ""}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(damage)
        assert f"{name}" in commands.fails("evaluate", "--workdir", tmp_path / name)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "checkpoints").write_text("hi")
    assert "no run's folder" in commands.train(tmp_path / "taken", code=2)
    lost = tmp_path / "lost"
    (lost / "checkpoints" / "24").mkdir(parents=True)
    assert "config.json" in commands.train(lost, code=2)


def test_a_summary_or_rows_that_are_gone_or_damaged(finished, commands, tmp_path):
    run = shutil.copytree(finished, tmp_path / "run")
    for damage in ("{}", "[" * 100_000):
        (run / "summary.json").write_text(damage)
        with pytest.raises(UserError, match="summary.json is damaged"):
            read_summary(run)
    assert "summary.json is damaged" in commands.train(run, code=2)
    (run / "summary.json").unlink()
    (run / "metrics.csv").unlink()
    assert "lost the row of step 9" in commands.train(run, code=2)
    shutil.copy(finished / "metrics.csv", run)
    commands.train(run)
    again, before = (json.loads((w / "summary.json").read_text()) for w in (run, finished))
    assert again["test_loss"] == before["test_loss"] and again["train_seconds"] == before["train_seconds"]


def truncate(checkpoint):
    for path in checkpoint.rglob("*"):
        if path.is_file() and path.parent.name == "d":
            path.write_bytes(path.read_bytes()[:10])


def test_a_corrupt_checkpoint_is_moved_aside_and_its_steps_come_again(finished, commands, tmp_path, capsys):
    run = shutil.copytree(finished, tmp_path / "run")
    (run / "summary.json").unlink()
    truncate(run / "checkpoints" / "24")
    before = fingerprint(run)
    (last, earlier) = sorted((int(p.name) for p in (run / "checkpoints").iterdir()), reverse=True)
    assert trained.open_run(run).step == earlier
    assert f"{run}/checkpoints/24 is damaged" in (err := capsys.readouterr().err) and f"using step {earlier}" in err
    with pytest.raises(UserError, match=f"{run}/checkpoints/24 is damaged"):
        trained.open_run(run, "24")
    assert fingerprint(run) == before
    out, err = commands.train(run)
    assert f"{run}/checkpoints/24 is damaged" in err and "moved to 24.damaged" in err
    assert f"going on from step {earlier}" in out
    shutil.move(run / "checkpoints" / "24.damaged", tmp_path)
    assert_same_end(finished, run, 24)

    for step in (earlier, last):
        truncate(run / "checkpoints" / str(step))
    (run / "summary.json").unlink()
    before = fingerprint(run)
    error = commands.train(run, code=2)
    assert f"no whole checkpoint in {run}/checkpoints" in error and fingerprint(run) == before

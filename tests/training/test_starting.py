"""Runs that start from other weights: what they take over, freeze, compute once, and refuse."""

import json
import shutil

import fsspec
import jax
import numpy as np
import pytest
from flax import traverse_util

from vit_jax.config import default_config
from vit_jax.data.load import load
from vit_jax.errors import UserError
from vit_jax.models import names, pretrained
from vit_jax.models.archives import write_safetensors
from vit_jax.models.pretrained import Facts
from vit_jax.training import evaluation, loop, mesh, runs, setup, starting, trained
from vit_jax.training.step import Probe, init_state, train_step

SIZES = {"patch_size": 2, "width": 16, "depth": 2, "num_heads": 2, "mlp_dim": 24, "pool": "cls"}


@pytest.fixture(autouse=True)
def without_report(monkeypatch):
    """Of runs that nobody looks at."""
    monkeypatch.setattr(loop, "_report", lambda *_: None)


def config_of(checkpoint, **fields):
    """Some steps on digits from `checkpoint`."""
    config = default_config()
    config.model.update(SIZES)
    config.train.update({"batch_size": 32, "steps": 12, "steps_per_call": 4, "eval_every": 0.1})
    config.checkpoint.update({"every": 0.1})
    config.optim.learning_rate = 1e-2
    config.init.checkpoint = str(checkpoint)
    for name, value in fields.items():
        group, field = name.split("__")
        config[group][field] = value
    return config


@pytest.fixture(scope="module")
def official(tmp_path_factory):
    """An official file of a network for digits, and its arrays."""
    config = setup.resolve_data(setup.resolve_model(config_of("")), load("digits", "train"), mesh.make_mesh(1))
    shapes = jax.eval_shape(lambda: setup.make_classifier(config, 10, mesh.make_mesh(1)).init(0))
    rng = np.random.default_rng(3)
    arrays = {
        name: (0.3 * rng.normal(size=leaf.shape) + ("scale" in name)).astype(np.float32)
        for name, leaf in traverse_util.flatten_dict(shapes, sep="/").items()
    }
    path = tmp_path_factory.mktemp("official") / "official.npz"
    with path.open("wb+") as file:
        pretrained.write(file, arrays, "npz", Facts(1e-5, "exact", (0.2,), (0.5,)))
    return path, arrays


def last_weights(workdir):
    return runs.last_weights(workdir)[1]()


def stored(workdir):
    return json.loads((workdir / "config.json").read_text())


def test_training_a_part_leaves_the_files_own_bits_elsewhere(official, tmp_path, capsys):
    path, arrays = official
    config = config_of(path, init__multipliers=(("^head/", 1.0), ("encoderblock_1/Mlp", 0.5), (".*", 0.0)))
    config.optim.weight_decay, config.ema.decay = 0.1, 0.9
    loop.train(config, tmp_path)
    found = last_weights(tmp_path)
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        trained = name.startswith(("head/", "Transformer/encoderblock_1/Mlp"))
        assert np.array_equal(found[name], array) != trained, name
    out = capsys.readouterr().out
    assert f"{len(arrays)} arrays, " in out and f"from {path}" in out
    table = out[out.index("multiplier") :].splitlines()
    trained = sum(a.size for n, a in arrays.items() if n.startswith(("head/", "Transformer/encoderblock_1/Mlp")))
    total = sum(a.size for a in arrays.values())
    assert table[1].split() == ["1", "170", "^head/"] and table[3].split()[2] == ".*"
    assert table[4] == f"{trained:,} of {total:,} parameters are trained"
    model, data = stored(tmp_path)["model"], stored(tmp_path)["data"]
    assert (model["gelu"], model["norm_epsilon"], data["mean"], data["std"]) == ("exact", 1e-5, [0.2], [0.5])


def test_what_the_user_sets_wins_and_is_told(official, tmp_path, capsys):
    config = config_of(official[0], model__gelu="tanh", data__mean=(0.3,), train__steps=1)
    loop.train(config, tmp_path)
    assert stored(tmp_path)["model"]["gelu"] == "tanh" and stored(tmp_path)["data"]["mean"] == [0.3]
    out = capsys.readouterr().out
    assert "model.gelu is tanh here and exact there" in out and "data.mean is (0.3,) here and (0.2,) there" in out
    assert "norm_epsilon is" not in out


def test_a_resumed_run_needs_no_weights_file_and_ends_with_the_same_bits(official, tmp_path):
    path = shutil.copy(official[0], tmp_path / "mine.npz")
    config = config_of(path, init__multipliers="mlp")
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    loop.train(config, whole)
    shutil.copytree(whole, cut)
    (cut / "summary.json").unlink()
    steps = sorted(int(p.name) for p in (cut / "checkpoints").iterdir())
    shutil.rmtree(cut / "checkpoints" / str(steps[-1]))
    path.unlink()
    loop.train(config, cut)
    assert steps[-2] < 12
    expected, found = last_weights(whole), last_weights(cut)
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)


# The linear probe


def probe(path, **fields):
    return config_of(path, init__multipliers="head", **fields)


def test_a_probe_on_cached_features_is_the_training_of_the_head(official, tmp_path, monkeypatch):
    loop.train(probe(official[0]), tmp_path / "cached")
    monkeypatch.setattr(setup, "as_probe", lambda config, classifier, rules: classifier)
    loop.train(probe(official[0]), tmp_path / "whole")
    cached, whole = last_weights(tmp_path / "cached"), last_weights(tmp_path / "whole")
    for name, array in official[1].items():
        if name.startswith("head/"):
            np.testing.assert_allclose(cached[name], whole[name], rtol=1e-4, atol=1e-5)
            assert np.abs(cached[name] - array).max() > 0.01
        else:
            np.testing.assert_array_equal(cached[name], array)


def test_a_probe_is_evaluated_to_the_bit_and_resumed_to_the_bit(official, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    summary = loop.train(probe(official[0]), whole)
    report = evaluation.evaluate(trained.open_run(whole)).report
    assert (report["accuracy"], report["loss"]) == (summary["test_accuracy"], summary["test_loss"])
    assert summary["mfu"] is None
    shutil.copytree(whole, cut)
    (cut / "summary.json").unlink()
    shutil.rmtree(cut / "checkpoints" / "12")
    loop.train(probe(official[0]), cut)
    for name, array in last_weights(whole).items():
        np.testing.assert_array_equal(last_weights(cut)[name], array, err_msg=name)


@pytest.mark.parametrize(
    "fields, cached",
    [
        ({}, True),
        ({"init__multipliers": (("^head/kernel", 1.0), (".*", 0.0))}, True),
        ({"augment__crop_paste": True}, False),
        ({"augment__crop": "pad"}, False),
        ({"augment__cutmix": 1.0}, False),
        ({"augment__erasing": 0.1}, False),
        ({"augment__policy": "trivialaugment"}, False),
        ({"model__dropout": 0.1}, False),
        ({"model__drop_path": 0.1}, False),
        ({"init__multipliers": "mlp"}, False),
        ({"init__multipliers": "full"}, False),
    ],
)
def test_features_are_computed_once_only_where_they_stay_the_same(fields, cached):
    config = config_of("FILE", **{"init__multipliers": "head"} | fields)
    devices = mesh.make_mesh(1)
    config = setup.resolve_data(setup.resolve_model(config), load("digits", "train"), devices)
    classifier = setup.make_classifier(config, 10, devices)
    assert isinstance(setup.as_probe(config, classifier, setup.make_rules(config, classifier)), Probe) is cached


def test_a_cached_probe_does_no_work_of_the_trunk(official, tmp_path):
    """Its compiled steps have the products of a linear layer, and no more."""
    config = setup.resolve_model(probe(official[0]))
    config = setup.resolve_data(starting.resolve(config), load("digits", "train"), mesh.make_mesh(1))
    plan, _ = setup.make_plan(config, 1438)
    classifier = setup.make_classifier(config, 10, mesh.make_mesh(1))
    rules = setup.make_rules(config, classifier)
    task, _ = setup.make_task(config, setup.as_probe(config, classifier, rules), plan, rules)
    features = np.zeros((32, 16), np.float32)
    step = jax.jit(train_step, static_argnums=(0, 1)).lower(task, 8, init_state(task), features, np.zeros(32, np.int32))
    assert step.compile().as_text().count(" dot(") <= 2


# Sources


def test_a_run_is_a_source_too(official, tmp_path):
    """Its head goes where the classes are others, its positions follow the size; its average is taken."""
    loop.train(config_of(official[0], ema__decay=0.9, train__steps=4), tmp_path / "run")
    average = last_weights(tmp_path / "run")
    config = setup.resolve_model(config_of(tmp_path / "run", data__image_size=12))
    config = setup.resolve_data(starting.resolve(config), load("digits", "train"), mesh.make_mesh(1))
    assert config.model.gelu == "exact" and config.data.mean == (0.2,)
    classifier = setup.make_classifier(config, 7, mesh.make_mesh(1))
    params, notes = starting.weights(config, classifier, tuple("abcdefg"))
    assert f"the classes of {tmp_path / 'run'} are others" in notes
    classifier = setup.make_classifier(config, 10, mesh.make_mesh(1))
    assert "head/kernel" not in starting.weights(config, classifier, tuple("abcdefghij"))[0]
    config.mesh.fsdp = True
    parts = starting.placed(classifier.init(0), starting.weights(config, classifier, tuple("0123456789"))[0])
    shared = mesh.shardings(parts, classifier.mesh, fsdp=True)
    different = jax.tree.map(lambda x, where: None if x.sharding == where else (x.sharding, where), parts, shared)
    assert not jax.tree.leaves(different)
    assert "head/kernel" in starting.weights(config, classifier, tuple("0123456789"))[0]
    assert "position embedding resized from 4x4 to 6x6" in notes
    same = params.keys() - {pretrained.POSITIONS}
    assert same == average.keys() - {pretrained.POSITIONS, "head/kernel", "head/bias"}
    for name in same:
        np.testing.assert_array_equal(params[name], average[name])


def test_a_url_is_fetched_once(official, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    files = fsspec.filesystem("memory")
    files.pipe("/weights/a.npz", official[0].read_bytes())
    local = starting.fetched("memory://weights/a.npz")
    assert local.read_bytes() == official[0].read_bytes() and tmp_path in local.parents
    files.rm("/weights/a.npz")
    assert starting.fetched("memory://weights/a.npz") == local
    with starting.opened("memory://weights/a.npz") as source:
        np.testing.assert_array_equal(source.arrays["cls"].read(), official[1]["cls"])
    with pytest.raises(UserError, match="cannot fetch memory://weights/b.npz"):
        starting.fetched("memory://weights/b.npz")
    files.pipe("/weights-a.npz", official[0].read_bytes())
    other = starting.fetched("memory://weights-a.npz")
    assert other != local and other.suffix == ".npz"  # addresses that look alike are told apart
    files.pipe("/login.npz", b"<html>log in first</html>")
    with pytest.raises(UserError, match="what memory://login.npz gave: .*cannot be read"):
        starting.fetched("memory://login.npz")
    for odd in ("memory://", "http://[x/y.npz"):
        with pytest.raises(UserError):
            starting.fetched(odd)
    with pytest.raises(UserError, match=r'pip install "vit_jax\[remote\]"'):
        starting.fetched("smb://nowhere/share/b.npz")
    assert {p.name for p in local.parent.iterdir()} == {local.name, other.name}


# What is refused, before anything is written


def made(folder, name, **arrays):
    np.savez(folder / name, **arrays)
    return folder / name


@pytest.mark.parametrize(
    "kind, words",
    [
        ("missing", "no weights file"),
        ("folder", "no run in"),
        ("truncated", "cannot be read"),
        ("zero bytes", "cannot be read"),
        ("no zip", "cannot be read"),
        ("integers", "int64, no floating-point numbers"),
        ("not a number", "not finite"),
        ("another architecture", "no Vision Transformer"),
        ("another size", "37 have another shape: Transformer/"),
        ("pickled", "pickled objects"),
    ],
)
def test_bad_weights_end_in_one_line(official, tmp_path, kind, words):
    path, arrays = official
    data = path.read_bytes()
    sources = {
        "missing": tmp_path / "none.npz",
        "folder": tmp_path,
        "truncated": tmp_path / "truncated.npz",
        "zero bytes": tmp_path / "empty.npz",
        "no zip": tmp_path / "text.npz",
    }
    (tmp_path / "truncated.npz").write_bytes(data[: len(data) // 2])
    (tmp_path / "empty.npz").write_bytes(b"")
    (tmp_path / "text.npz").write_bytes(b"no zip at all")
    if kind == "integers":
        sources[kind] = made(tmp_path, "a.npz", **arrays | {"cls": np.ones((1, 1, 16), int)})
    elif kind == "not a number":
        sources[kind] = made(tmp_path, "a.npz", **arrays | {"cls": np.full((1, 1, 16), np.nan, np.float32)})
    elif kind == "another architecture":
        sources[kind] = made(tmp_path, "a.npz", **{"conv1/kernel": np.ones((3, 3, 3, 8), np.float32)})
    elif kind == "pickled":
        sources[kind] = made(tmp_path, "a.npz", **{"embedding/kernel": np.array([{}], object)})
    config = config_of(sources.get(kind, path))
    if kind == "another size":
        config.model.update({"width": 32, "num_heads": 4})
    with pytest.raises(UserError) as caught:
        loop.train(config, tmp_path / "run")
    assert words in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"data__image_size": 9}, "not divisible by model.patch_size"),
        ({"init__skip": ("nothing_like_it",)}, "'nothing_like_it' matches no parameter"),
        ({"init__multipliers": (("nothing_like_it", 1.0), (".*", 0.0))}, "'nothing_like_it' matches no parameter"),
        ({"init__multipliers": (("^head/", 1.0),)}, "no rule covers"),
        ({"init__multipliers": ((".*", 0.0),)}, "freezes every parameter"),
        ({"init__multipliers": "heads"}, "unknown init.multipliers 'heads'"),
        ({"init__multipliers": "layers:2"}, "layers:0.75"),
        ({"init__checkpoint": "", "init__multipliers": "head"}, "set init.checkpoint too"),
        ({"init__skip": ("a{99999999999999999999}",)}, "is not a regex"),
        ({"init__multipliers": (("a{99999999999999999999}", 1.0), (".*", 0.0))}, "is not a regex"),
        ({"init__skip": (".*",)}, "leaves nothing"),
        ({"init__multipliers": "layers:1e-200"}, "from 0.1 to 1"),
        ({"model__depth": 3}, "arrays are missing there: Transformer/encoderblock_2/"),
        ({"model__preset": "Ti/2", "model__width": None}, "have another shape"),
    ],
)
def test_bad_fields_end_in_one_line(official, tmp_path, fields, words):
    with pytest.raises(UserError) as caught:
        loop.train(config_of(official[0], **fields), tmp_path / "run")
    assert words in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_wrong_file_on_the_command_line(commands, official, tmp_path):
    (tmp_path / "bad.npz").write_bytes(b"no zip")
    fields = ["--config.init.checkpoint=" + str(tmp_path / "bad.npz")]
    error = commands.fails("main", *commands.training(tmp_path / "run"), *fields)
    assert str(tmp_path / "bad.npz") in error and not (tmp_path / "run").exists()


def test_evaluating_weights_as_they_are_needs_their_head(official, tmp_path):
    config = config_of(official[0])
    run, notes = trained.open_weights(config, tmp_path)
    report = evaluation.evaluate(run).report
    assert report["examples"] == 359 and report["checkpoint_step"] is None and "arrays" in notes[0]
    headless = {name: array for name, array in official[1].items() if not name.startswith("head/")}
    with (tmp_path / "a.safetensors").open("wb+") as file:
        write_safetensors(file, names.renamed(headless, "timm"), {})
    with pytest.raises(UserError, match="2 arrays are missing there: head/"):
        trained.open_weights(config_of(tmp_path / "a.safetensors"), tmp_path)
    with pytest.raises(UserError, match="init.skip leaves out cls"):
        trained.open_weights(config_of(official[0], init__skip=("^cls$",)), tmp_path)
    with pytest.raises(UserError, match="no weights to open"):
        trained.open_weights(config_of(""), tmp_path)


def test_arguments_of_evaluate(commands, official, tmp_path):
    fields = [f"--config.init.checkpoint={official[0]}", "--config.model.pool=cls"]
    here = ["--config", "configs/digits.py", "--workdir", tmp_path]
    error = commands.fails("evaluate", *here, "--weights", "raw", *fields)
    assert "leave --config out" in error
    assert "--workdir is needed" in commands.fails("evaluate")
    assert "as it was trained" in commands.fails("evaluate", "--workdir", tmp_path, "--config.model.pool=cls")
    (tmp_path / "config.json").write_text("{}")
    assert "holds a run: give another --workdir" in commands.fails("evaluate", *here, *fields)


def test_a_run_that_holds_an_export_is_still_the_run(official, tmp_path):
    loop.train(config_of(official[0], train__steps=4), tmp_path / "run")
    with (tmp_path / "run" / "model.safetensors").open("wb+") as file:
        write_safetensors(file, {name: np.zeros_like(array) for name, array in official[1].items()}, {})
    with starting.opened(str(tmp_path / "run")) as source:
        assert np.abs(source.arrays["cls"].read()).max() > 0


def test_a_run_of_other_classes_is_not_measured(official, tmp_path):
    loop.train(config_of(official[0], train__steps=1), tmp_path / "run")
    config = setup.resolve_model(config_of(tmp_path / "run"))
    config = setup.resolve_data(starting.resolve(config), load("digits", "train"), mesh.make_mesh(1))
    classifier = setup.make_classifier(config, 10, mesh.make_mesh(1))
    with pytest.raises(UserError, match="are not those of digits"):
        starting.weights(config, classifier, tuple("abcdefghij"), whole=True)


def test_automatic_values_of_a_run_without_a_checkpoint_are_taken_anew(official, tmp_path):
    loop.train(config_of(official[0], train__steps=1), tmp_path / "run")
    (tmp_path / "run" / "summary.json").unlink()
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    config = setup.resolve_model(config_of(official[0], train__steps=1))
    assert runs.same_run(config, tmp_path / "run").model.gelu is None

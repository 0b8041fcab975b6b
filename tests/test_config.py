"""The config: every field checked, read and documented; overrides; what may change on resume."""

import ast
import pathlib
import re
import sys

import pytest

from vit_jax import command_line
from vit_jax import config as configs
from vit_jax.augment.policies import POLICIES
from vit_jax.errors import UserError
from vit_jax.models.vit import CHOICES, VisionTransformer

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture
def write(tmp_path):
    def write(body, name="some.py"):
        path = tmp_path / name
        path.write_text("from vit_jax.config import default_config, variant_error\n" + body)
        return str(path)

    return write


GOOD = "def get_config():\n    config = default_config()\n    config.train.epochs = 2\n    return config\n"


def attributes_read():
    """(a, b) of every `a.b` or `x.a.b` that the package's code reads."""
    for path in (ROOT / "vit_jax").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load) and path.name != "config.py":
                yield getattr(node.value, "attr", getattr(node.value, "id", None)), node.attr


READ = set(attributes_read())
# Handed on as a whole, by name, to dataclasses.
HANDED_ON = {"model": VisionTransformer.__dataclass_fields__}


@pytest.mark.parametrize("path", configs.FIELDS)
def test_every_field_is_read_by_the_package(path):
    group, name = path.split(".")
    assert (group, name) in READ or name in HANDED_ON.get(group, ()), f"nothing reads {path}"


@pytest.mark.parametrize("path", configs.FIELDS)
def test_every_field_has_a_meaning_and_a_default_that_passes_its_own_check(path):
    field = configs.FIELDS[path]
    assert len(field.meaning) > 10
    assert field.default is None and field.optional or field.check(field.default)
    assert path in command_line.field_help()


WRONG = {
    int: ["2.5", "zero", "True"],
    float: ["much", "nan", "True"],
    bool: ["perhaps", "1"],
    tuple: ["red", "3", "(1, None)"],
    str: [],
    (str, tuple): [f"(('.*',1{'0' * 400}),)", "3", "(('a',),)", "('head',)", "((1,'a'),)"],
}


@pytest.mark.parametrize("path", [p for p, f in configs.FIELDS.items() if f.kind is not str])
def test_a_wrong_value_names_the_field_and_the_allowed_values(path, write):
    field = configs.FIELDS[path]
    for value in WRONG[field.kind]:
        with pytest.raises(UserError, match=re.escape(path)) as error:
            command_line.parse(write(GOOD), [f"--config.{path}={value}"])
        assert field.allowed in str(error.value)


@pytest.mark.parametrize(
    "override, words",
    [
        ("train.batch_sise=3", ["train.batch_sise", "train.batch_size"]),
        ("lerning_rate=3", ["optim.learning_rate"]),
        ("train.batch_size=0", ["train.batch_size=0", "at least 1"]),
        ("optim.learning_rate=-1e-3", ["optim.learning_rate", "above 0"]),
        ("optim.name=adamax", ["'adamax'", "adamw, adam, sgd, muon"]),
        ("checkpoint.keep=1", ["checkpoint.keep", "at least 2"]),
        ("model.dropout=1", ["model.dropout", "below 1"]),
        ("train.batch_size", ["needs a value"]),
        ("augment.flip=True", ["augment.flip", "digits"]),
        ("optim.accumulate=3", ["128", "accumulate=3"]),
        ("train.patience=3", ["data.holdout"]),
        ("mesh.data=0", ["mesh.data"]),
        ("init.multipliers=()", ["init.multipliers", "full, head"]),
        ("train.trackers=wandb,mlfow", ["'wandb,mlfow'", "wandb, mlflow, comet"]),
        ("train.seed=2147483648", ["train.seed", "at most 2147483647"]),
        ("data.mean=[[1]]", ["data.mean=[[1]]"]),
        ("optim.clip_norm=1e999", ["optim.clip_norm"]),
        ("augment.policy=randaug", ["'randaug'", "randaugment"]),
        ("augment.mix_by=pixel", ["'pixel'", "batch, example"]),
        ("augment.erasing=1.5", ["augment.erasing=1.5", "at most 1"]),
        ("augment.mix_probability=-0.1", ["augment.mix_probability", "at least 0"]),
        ("augment.cutmix_share=2", ["augment.cutmix_share", "at most 1"]),
        ("augment.mix_until=1.01", ["augment.mix_until", "at most 1"]),
        ("augment.erasing_fill=black", ["'black'", "pixel, mean"]),
        ("augment.magnitude=31", ["augment.magnitude", "0 to 30"]),
        ("augment.repeats=3", ["128", "augment.repeats=3"]),
        ("augment.repeats=0", ["augment.repeats", "at least 1"]),
        ("optim.final_learning_rate=1", ["final_learning_rate=1", "learning_rate=0.001"]),
        ("model.stem=spt", ["'spt'", "shifted"]),
        ("train.steps_per_call=513", ["train.steps_per_call", "at most 512"]),
    ],
)
def test_wrong_overrides(override, words, write):
    with pytest.raises(UserError) as error:
        command_line.parse(write(GOOD), [f"--config.{override}"])
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize(
    "overrides, words",
    [
        (["model.width=64", "model.num_heads=5"], ["64", "num_heads=5"]),
        (["data.image_size=30", "model.patch_size=4"], ["30", "patch_size=4"]),
        (["train.epochs=3", "train.steps=3"], ["train.epochs", "train.steps"]),
        (["train.epochs=None"], ["train.epochs", "train.steps"]),
        (["data.mean=(.5,.5)", "data.std=(.5,)"], ["2 channels", "1"]),
        (["augment.mixup=1", "train.batch_size=1"], ["train.batch_size=1", "mix"]),
        (["augment.cutmix=1", "train.batch_size=4", "augment.repeats=4"], ["augment.repeats=4", "mix"]),
        (["augment.small_size=24"], ["augment.small_size=24", "crop=pad"]),
        (["augment.small_size=24", "augment.crop=pad", "data.image_size=24"], ["small_size=24", "image_size=24"]),
        (["augment.small_size=24", "augment.crop=pad", "model.patch_size=16"], ["small_size=24", "patch_size=16"]),
        (
            ["augment.small_size=24", "augment.crop=pad", "model.position_embedding=sincos2d"],
            ["small_size=24", "sincos2d"],
        ),
        (["augment.policy=trivialaugment", "augment.magnitude=3"], ["augment.magnitude", "not trivialaugment"]),
        (
            ["augment.policy=3augment", "augment.operations=('rotate',)"],
            ["augment.operations", "randaugment or trivialaugment"],
        ),
    ],
)
def test_fields_that_do_not_go_together(overrides, words, write):
    with pytest.raises(UserError) as error:
        command_line.parse(write(GOOD), [f"--config.{o}" for o in overrides])
    assert all(word in str(error.value) for word in words), error.value


def test_overrides_have_the_types_of_their_fields(write):
    given = [
        "train.steps_per_call=7",
        "optim.learning_rate=1",
        "model.qk_norm=true",
        "data.mean=[0, 0.5]",
        "data.std=(1,2)",
    ]
    config, name = command_line.parse(write(GOOD, "my.py"), [f"--config.{g}" for g in given])
    assert (config.train.steps_per_call, config.optim.learning_rate, config.model.qk_norm) == (7, 1.0, True)
    assert isinstance(config.optim.learning_rate, float) and config.data.mean == (0.0, 0.5)
    assert name == "my"


def test_overrides_may_be_two_words_and_nothing_else_is_let_through():
    assert command_line.overrides_in(["--config.a.b", "3", "--config.c.d=4"]) == ["--config.a.b=3", "--config.c.d=4"]
    with pytest.raises(UserError, match="--typo"):
        command_line.overrides_in(["--config.a.b=3", "--typo"])


@pytest.mark.parametrize("given, cleared", configs.EITHER.items())
def test_giving_one_of_two_clears_the_other(given, cleared, write):
    body = f"def get_config():\n    config = default_config()\n    config.train.epochs = 2\n    config.{cleared} = 7\n"
    body += f"    config.{given} = None\n    return config\n"
    config, _ = command_line.parse(write(body), [f"--config.{given}=5"])
    assert configs.get(config, given) == 5 and configs.get(config, cleared) is None
    config, _ = command_line.parse(write(body), [f"--config.{given}=None"])  # which gives nothing
    assert configs.get(config, cleared) == 7


def test_variants(write):
    body = (
        "def get_config(variant=''):\n    config = default_config()\n    config.train.epochs = 1\n"
        "    if variant not in ('', 'long'):\n        raise variant_error(variant, 'long')\n    return config\n"
    )
    path = write(body, "v.py")
    assert command_line.parse(f"{path}:long", [])[1] == "v-long"
    with pytest.raises(UserError, match="'short'.*long"):
        command_line.parse(f"{path}:short", [])
    with pytest.raises(UserError, match="no variants"):
        command_line.parse(f"{write(GOOD)}:long", [])


@pytest.mark.parametrize(
    "body, words",
    [
        ("def get_config(:\n", ["line 2"]),
        (GOOD.replace("epochs", "epoch"), ["line 4", "epochs"]),
        (GOOD.replace("config.train.epochs = 2", "1 / 0"), ["line 4", "ZeroDivisionError"]),
        ("import no_such_module\n", ["line 2", "no_such_module"]),
        ("x = 1\n", ["get_config"]),
        ("def get_config():\n    return 3\n", ["ConfigDict", "int"]),
        ("raise SystemExit(0)\n", ["line 2", "SystemExit"]),
        (GOOD.replace("config.train.epochs = 2", "config.unlock()\n    config.train.epoch = 2"), ["epoch", "epochs"]),
        (
            "from ml_collections import ConfigDict\ndef get_config():\n    return ConfigDict({'model': 3})\n",
            ["model", "3"],
        ),
        ("x = 'a\\0b'\n\0", ["null"]),
    ],
)
def test_a_broken_config_file_is_the_users_error(body, words, write):
    with pytest.raises(UserError) as error:
        command_line.parse(write(body), [])
    assert all(word in str(error.value) for word in words), error.value


def test_the_choices_are_those_of_the_package():
    """The config knows nothing of the rooms, so their names stand there again."""
    policies = configs.FIELDS["augment.policy"]
    assert all(policies.check(name) for name in ("none", *POLICIES)) and ", ".join(POLICIES) in policies.allowed
    for field, choices in CHOICES.items():
        assert configs.FIELDS[f"model.{field}"].allowed == "one of " + ", ".join(choices)


def test_a_config_may_import_its_neighbour(write):
    write(GOOD, "neighbour_of_a_config.py")
    body = "import neighbour_of_a_config\n\ndef get_config():\n    return neighbour_of_a_config.get_config()\n"
    before = list(sys.path)
    assert command_line.parse(write(body), [])[0].train.epochs == 2
    assert sys.path == before


def test_a_missing_config_file_names_the_nearest(write):
    path = write(GOOD, "digits.py")
    with pytest.raises(UserError, match=r"no config file.*digit\.py; did you mean .*digits\.py"):
        command_line.parse(path.replace("digits", "digit"), [])


def test_a_shipped_config_is_found_by_its_name_where_there_is_no_such_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "digits").mkdir()  # no file
    assert command_line.parse("digits", []) == command_line.parse(f"{ROOT}/configs/digits.py", [])
    found, name = command_line.parse("cifar100_tiny:cpu", ["--config.train.epochs=2"])
    assert name == "cifar100_tiny-cpu" and found.model.mlp_conv and found.train.epochs == 2
    (tmp_path / "digits").rmdir()
    (tmp_path / "digits").write_text("no Python")
    with pytest.raises(UserError, match="must end in .py"):
        command_line.parse("digits", [])


@pytest.mark.parametrize(
    "name, words",
    [
        ("digit", "no config file digit; did you mean digits?"),
        ("cifar100_tini:cpu", "no config file cifar100_tini; did you mean cifar100_tiny?"),
        ("configs/digits.py", "did you mean digits?"),
        ("../digits", "did you mean digits?"),
        ("nowhere.py", "the shipped ones are cifar100_b16, cifar100_tiny, "),
        ("", "the shipped ones are"),
    ],
)
def test_an_unknown_name_names_what_there_is(name, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        command_line.parse(name, [])
    assert words in str(error.value)


def test_a_config_survives_json_and_differences_skip_what_may_change(write):
    config, _ = command_line.parse(write(GOOD), ["--config.data.mean=(0.1,0.2,0.3)", "--config.data.std=(1,1,1)"])
    again = configs.from_dict(configs.to_dict(config))
    assert again == config and configs.differences(config, again) == []
    again.optim.learning_rate, again.train.epochs, again.data.dir, again.checkpoint.keep = 0.5, 3.0, "/else", 9
    differences = configs.differences(config, again)
    assert len(differences) == 2 and "train.epochs" in differences[0] and "0.5" in differences[1]
    unset, _ = command_line.parse(write(GOOD), [])  # mean and std to be filled in: no difference yet
    assert configs.differences(unset, config) == []


def test_a_stored_config_of_another_version_is_refused():
    values = configs.to_dict(configs.default_config())
    del values["optim"]["b2"]
    with pytest.raises(UserError, match="optim.b2"):
        configs.from_dict(values)


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.py")), ids=lambda p: p.name)
def test_shipped_configs_are_right_and_say_how_to_run_them(path):
    config, _ = command_line.parse(str(path), [])
    assert f"--config configs/{path.name}" in path.read_text()
    assert config.data.holdout == 0  # shipped configs train on all of train
    if ":reference" in path.read_text():
        command_line.parse(f"{path}:reference", [])

"""What visualize draws: of a trained run, and of what training sees, that it is that, and how it is named."""

import shutil

import jax
import numpy as np
import pytest
from PIL import Image

from vit_jax import command_line
from vit_jax.data.load import load
from vit_jax.data.resident import BatchIndices, epoch_order
from vit_jax.training import dispatch, mesh, preview, setup, step

MIXED = {"augment.crop": "pad", "augment.erasing": 0.5, "augment.mixup": 0.8, "augment.cutmix": 1.0}
SMALL = {"model.width": 16, "model.depth": 1, "model.num_heads": 2, "model.mlp_dim": 16, "model.dropout": 0.0}
NAMES = ("cat", "dog", "sweet_pepper", "Egyptian cat, of the Nile")


def digits_task(**fields):
    overrides = [f"--config.{k}={v}" for k, v in (SMALL | MIXED | fields).items()]
    config, _ = command_line.parse("configs/digits.py", overrides)
    devices, train = mesh.make_mesh(1), load("digits", "train")
    config = setup.resolve_data(setup.resolve_model(config), train, devices)
    plan, _ = setup.make_plan(config, len(train.labels))
    return config, plan, setup.make_task(config, setup.make_classifier(config, 10, devices), plan)[0], train


@pytest.mark.parametrize("fields", [{}, {"augment.small_size": 6, "train.steps": 8}])  # four steps of small crops
def test_it_shows_the_arrays_of_each_step(fields):
    _, _, task, train = digits_task(**fields)
    images, labels = train.images[:16], train.labels[:16]
    training_pictures = jax.jit(step.training_pictures, static_argnums=(0, 1))
    seen = preview.views(task, images, labels, rows=5)
    assert len(seen) == preview.STEPS
    for number, (pictures, shares) in enumerate(seen):
        changed, targets, _ = training_pictures(task, task.size_at(number), np.int32(number), images, labels)
        assert pictures.shape[1] == (6 if fields and number < 4 else 8)
        np.testing.assert_array_equal(pictures, changed[:5])
        np.testing.assert_allclose(0.9 * shares + 0.1 / 10, targets[:5], atol=1e-6)
        assert task.label_smoothing == 0.1 and np.allclose(shares.sum(1), 1) and (shares > -1e-6).all()
    assert not np.array_equal(seen[0][0], seen[1][0])


@pytest.mark.parametrize("repeats", [1, 2])
def test_the_first_step_of_a_run_sees_them(repeats):
    """The loss that a real first dispatch reports is that of the pictures and labels shown as step 0."""
    config, _, task, train = digits_task(**{"augment.repeats": repeats})
    state = step.init_state(task)
    params = jax.tree.map(np.array, state.params)  # copies: the state is given away
    size = config.train.batch_size
    _, done = dispatch.Dispatcher(task, state, train, size)(state, 0, 1)

    batch = BatchIndices(task.seed, len(train.labels), size, repeats)(0, 1)[0]
    pictures, shares = preview.views(task, train.images[batch], train.labels[batch], size)[0]
    logits = task.classifier.logits(params, pictures)
    targets = (1 - task.label_smoothing) * shares + task.label_smoothing / 10
    assert float(done["sums"]["loss"]) / size == pytest.approx(
        float(step.cross_entropy(logits, targets).mean()), rel=1e-5
    )


@pytest.mark.parametrize(
    "shares, text",
    [
        ([1, 0, 0, 0], "cat"),
        ([0.3, 0.7, 0, 0], "dog  .70\n+ cat  .30"),
        ([0.5, 0, 0.5, 0], "cat  .50\n+ sweet_pepper  .50"),
        ([0.991, 0.009, 0, 0], "cat"),  # less than a hundredth is not said
        ([1e-8, -1e-8, 1, 0], "sweet_pepper"),  # smoothing taken out, to rounding
        ([0, 0, 0, 1], "Egyptian cat, o…"),
        ([0.02, 0, 0, 0.98], "Egyptian cat, o…  .98\n+ cat  .02"),
    ],
)
def test_labels(shares, text):
    assert preview.label(np.array(shares, np.float32), NAMES) == text


def test_notes_say_what_was_changed_and_until_when():
    config, plan, task, _ = digits_task(
        **{"augment.mix_until": 0.5, "augment.small_size": 4, "train.epochs": 10, "train.seed": 3}
    )
    fields, columns = preview.notes(config, task, plan)
    assert fields.split() == "crop=pad padding=1 small_size=4 erasing=0.5 mixup=0.8 cutmix=1 mix_until=0.5".split()
    assert "seed 3" in columns and f"until step {task.augmentation.mix_steps} of {plan.total}" in columns
    assert task.augmentation.mix_steps == round(plan.total / 2) and "smoothing of 0.1" in columns
    assert "mixed in pairs" in columns
    assert f"Until step {plan.small} of {plan.total}" in columns and "crops of 4 pixels" in columns
    none = dict.fromkeys(("augment.mixup", "augment.cutmix", "augment.erasing", "train.label_smoothing"), 0)
    fields, columns = preview.notes(*still(none))
    assert fields.startswith("no augmentation") and "mixed" not in columns and "smoothing" not in columns


def still(fields):
    config, plan, task, _ = digits_task(**fields, **{"augment.crop": "none", "augment.padding": 4})
    return config, task, plan


def test_the_command_draws_the_data(commands, tmp_path):
    (tmp_path / "config.json").write_text("another run's")
    call = ["--what", "augmentation", "--config", "configs/digits.py", "--workdir", tmp_path, "--rows", 3]
    out, _ = commands.run("visualize", *call, "--config.augment.mixup=0.8")
    path = tmp_path / "figures" / "augmentation.png"
    assert out.splitlines()[-1] == str(path)
    assert [p.name for p in sorted(tmp_path.rglob("*"))] == ["config.json", "figures", "augmentation.png"]

    with Image.open(path) as picture:
        sheet = np.array(picture.convert("RGB"))
    assert 1500 < sheet.shape[1] <= 1600 and 500 < sheet.shape[0] < 900
    train = load("digits", "train")
    stored = train.images[epoch_order(0, 0, len(train.labels))[:3]]
    tiles = [np.kron(x, np.ones((20, 20, 3), np.uint8)) for x in stored]
    height, left = len(sheet), 24
    rows = [[y for y in range(height - 160) if np.array_equal(sheet[y : y + 160, left : left + 160], t)] for t in tiles]
    assert [len(r) for r in rows] == [1, 1, 1] and rows[0] < rows[1] < rows[2]


def test_wrong_input(commands, tmp_path):
    digits = ["--config", "configs/digits.py", "--workdir", tmp_path / "run"]
    augmentation = ["--what", "augmentation"]
    error = commands.fails("visualize", *digits, "--what", "attentoin")
    assert "attentoin" in error and "augmentation" in error
    assert "--config is for --what augmentation" in commands.fails("visualize", *digits)
    assert "--workdir" in commands.fails("visualize")
    assert "--fields" in commands.fails("visualize", "--workdir", tmp_path, "--fields")
    assert "no run in" in commands.fails("visualize", "--workdir", tmp_path / "run")
    assert "--config" in commands.fails("visualize", *augmentation)
    assert "--rows" in commands.fails("visualize", *digits, *augmentation, "--rows", "0")
    error = commands.fails("visualize", "--workdir", tmp_path, "--what", "positions", "--images", tmp_path)
    assert error.startswith("error: --images is for --what all, attention, rollout, relevance, distance, not positions")
    assert "augment.mixpu" in commands.fails("visualize", *digits, *augmentation, "--config.augment.mixpu=1")
    assert not (tmp_path / "run").exists()
    (tmp_path / "file").touch()
    error = commands.fails("visualize", *digits[:2], *augmentation, "--workdir", tmp_path / "file")
    assert f"cannot use {tmp_path}/file" in error


def test_the_command_draws_a_run(finished, commands, tmp_path):
    Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).save(tmp_path / "picture.png")
    run = shutil.copytree(finished, tmp_path / "run", ignore=shutil.ignore_patterns("figures"))
    out, _ = commands.run("visualize", "--workdir", run, "--images", tmp_path / "picture.png")
    names = "attention_1 rollout relevance positions filters distance".split()
    evaluated = ["reliability.png", "confusion.csv", "confusion.png", "classes.csv", "mistakes.png"]
    drawn = [f"figures/{name}" for name in [*(f"{name}.png" for name in names), *evaluated]]
    assert out.splitlines() == [str(run / path) for path in [*drawn[:6], "evaluation.json", *drawn[6:], "curves.png"]]
    for path in filter(lambda path: path.endswith(".png"), out.splitlines()):
        with Image.open(path) as picture:
            assert min(picture.size) > 250 and len(np.unique(picture.convert("L"))) > 20
    compare = ["--what", "curves", "--compare", finished]
    out, _ = commands.run("visualize", "--workdir", run, *compare)
    assert out.splitlines() == [str(run / "figures" / "comparison.png")]
    (tmp_path / "note.jpg").write_text("not a picture")
    images = ["--what", "rollout", "--images", tmp_path / "picture.png", tmp_path / "note.jpg"]
    assert f"{tmp_path / 'note.jpg'}" in commands.fails("visualize", "--workdir", run, *images)

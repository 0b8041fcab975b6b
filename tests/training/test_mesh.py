"""Eight devices, in every layout, train as one: in a process of its own, which alone has eight."""

import json
import os
import re
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from vit_jax.augment.mix import Mixing
from vit_jax.data.splits import Split
from vit_jax.errors import UserError
from vit_jax.models.vit import VisionTransformer
from vit_jax.training import mesh, optim, step
from vit_jax.training.dispatch import Dispatcher, make_evaluator
from vit_jax.training.rules import match_rules, path_name

STEPS = 20
# Name: data, model, fsdp, where the pictures lie.
LAYOUTS = {
    "one device": (1, 1, False, "whole"),
    "data": (8, 1, False, "streamed"),
    "fsdp": (8, 1, True, "shared"),
    "model": (2, 4, True, "whole"),
}


def task_of(data, model, fsdp):
    how = {"patch_size": 2, "width": 64, "depth": 1, "num_heads": 4, "mlp_dim": 128, "dropout": 0.1, "qk_norm": True}
    network = VisionTransformer(num_classes=16, attention_dropout=0.1, pool="cls", head_zero_init=False, **how)
    classifier = step.Classifier(network, 8, (0.5,) * 3, (0.25,) * 3, mesh.make_mesh(data, model))
    optimizer = optim.make_optimizer(
        "adamw", optim.make_schedule("cosine", 1e-2, 4, STEPS), weight_decay=0.1, momentum=0.9, b2=0.98, clip_norm=1.0
    )
    augmentation = step.Augmentation(
        "pad",
        1,
        flip=True,
        erasing=0.5,
        mixing=Mixing(mixup=0.0, cutmix=1.0, probability=1.0, cutmix_share=1.0, per_example=False),
        mix_steps=10,
    )
    return step.Task(classifier, optimizer, augmentation, 0.1, accumulate=2, ema_decay=0.9, seed=0, fsdp=fsdp)


def split_of():
    chance = np.random.default_rng(0)
    images = chance.integers(0, 256, (203, 8, 8, 3), dtype=np.uint8)  # no multiple of eight
    return Split(
        images, chance.integers(0, 16, 203).astype(np.int32), tuple("abcdefghijklmnop"), (0.5,) * 3, (0.25,) * 3
    )


def own_bytes(tree):
    """The largest share that a device holds of the arrays' bytes."""
    whole = sum(x.nbytes for x in jax.tree.leaves(tree))
    of = {device: 0 for device in jax.devices()}
    for x in jax.tree.leaves(tree):
        for shard in x.addressable_shards:
            of[shard.device] += shard.data.nbytes
    return max(of.values()) / whole


def measure(data, model, fsdp, placement):
    """What a run in this layout comes to, as JSON holds it."""
    task, split = task_of(data, model, fsdp), split_of()
    state = step.init_state(task)
    first = dict(state=own_bytes((state.params, state.ema, state.optimizer)))
    dispatch = Dispatcher(task, state, split, 16, placement)
    program = dispatch.programs[8].as_text()
    losses = []
    for start in range(STEPS):
        state, _ = dispatch(state, start, start + 1)
        losses.append(float(state.sums["loss"]))
        state = state.replace(sums=jax.device_put(step.zero_sums(), mesh.replicated(task.classifier.mesh)))
    kept = own_bytes((state.params, state.ema, state.optimizer))
    evaluated = make_evaluator(task.classifier, split, 64, placement == "streamed")(state.ema)["loss"]
    collectives = re.findall(r" (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)\(", program)
    return first | dict(losses=losses, kept=kept, evaluated=evaluated.tolist(), collectives=collectives)


def test_every_layout_trains_as_one_device():
    """In one test, for each worker that runs a part of it would train all of them."""
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # compiling is what takes the time
    }
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True, check=False)
    assert not done.returncode, done.stderr
    layouts = json.loads(done.stdout.splitlines()[-1])
    one = layouts.pop("one device")
    for name, found in layouts.items():
        np.testing.assert_allclose(found["losses"], one["losses"], rtol=1e-5, err_msg=name)
        np.testing.assert_allclose(found["evaluated"], one["evaluated"], rtol=1e-3, err_msg=name)
    for when in ("state", "kept"):  # of a device's share: an eighth and a twentieth of that, at the start and the end
        assert layouts["fsdp"][when] <= 0.131 and layouts["data"][when] == 1
    # Gradients are added up, all in one, and the pictures that were known; nothing else moves.
    assert layouts["data"]["collectives"] == 2 * ["all-reduce"]
    assert "all-gather" in layouts["fsdp"]["collectives"]


def test_a_process_has_the_rows_of_its_devices_wherever_they_are(monkeypatch):
    """As on a pod of four hosts, whose devices do not lie one host after the other."""
    cuts = {"a": (slice(None), slice(6, 8)), "b": (slice(None), slice(0, 2)), "c": (slice(None), slice(6, 8))}
    own = types.SimpleNamespace(addressable_devices_indices_map=lambda shape: cuts)
    monkeypatch.setattr(mesh, "second_axis_sharded", lambda _: own)
    assert mesh.own_rows(8, mesh.make_mesh(1)).tolist() == [0, 1, 6, 7]


def test_the_rules_cut_heads_and_hidden_units():
    shapes = jax.eval_shape(lambda: step.new_state(task_of(1, 1, False)))
    axes = match_rules(mesh.MODEL_RULES, shapes)
    block = "Transformer/encoderblock_0"
    named = {
        path_name(p): (x.shape, axis)
        for (p, x), axis in zip(
            jax.tree_util.tree_leaves_with_path(shapes), jax.tree.leaves(axes, is_leaf=lambda x: x is None), strict=True
        )
    }
    cut = {name for name, (_, axis) in named.items() if axis is not None}
    parameters = {name for name in cut if name.startswith("params/")}
    assert len(parameters) == 3 + 3 + 1 + 3
    for name in parameters:  # the average and the optimizer go with them
        assert name.replace("params/", "ema/", 1) in cut
        assert sum(other.endswith(name.removeprefix("params")) for other in cut) >= 3
    assert named[f"params/{block}/MultiHeadDotProductAttention_1/query/kernel"] == ((64, 4, 16), 1)
    assert named[f"params/{block}/MlpBlock_3/Dense_1/kernel"] == ((128, 64), 0)


def test_meshes_that_cannot_be_had():
    with pytest.raises(UserError, match="mesh.data=4096, but there are 1 devices"):
        mesh.make_mesh(4096)
    with pytest.raises(UserError, match="mesh.data=1, mesh.model=2, but there are 1 devices"):
        mesh.make_mesh(1, 2)
    with pytest.raises(UserError, match="mesh.model=2 does not divide"):
        mesh.make_mesh(-1, 2)


def test_one_device_has_all():
    tree = {"query": {"kernel": jnp.zeros((4, 2, 2))}}
    where = mesh.shardings(tree, mesh.make_mesh(1), fsdp=True)["query"]["kernel"]
    assert where.is_fully_replicated and where.spec != PartitionSpec()


if __name__ == "__main__":
    print(json.dumps({name: measure(*layout) for name, layout in LAYOUTS.items()}))

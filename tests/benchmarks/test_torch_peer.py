"""The peer in PyTorch is the same model, trained by the same optimizer."""

import importlib.util
import io
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import traverse_util

from vit_jax.errors import RunError, UserError
from vit_jax.models.vit import VisionTransformer
from vit_jax.training import comparing, optim

SCRIPT = pathlib.Path(__file__).parents[2] / "benchmarks" / "torch_peer.py"
FIELDS = {"patch_size": 4, "width": 16, "depth": 2, "num_heads": 2, "mlp_dim": 24, "norm_epsilon": 1e-5}
PLAIN = {"stem": "patch", "pool": "cls", "position_embedding": "learned", "gelu": "exact", "qk_norm": False}
RICH = {"stem": "conv", "pool": "seq", "position_embedding": "rotary", "gelu": "tanh", "qk_norm": True}
BATCH, CLASSES, RATE = 6, 5, 0.01


@pytest.fixture(scope="module")
def peer():
    pytest.importorskip("torch", reason="pip install '.[parity]'")
    spec = importlib.util.spec_from_file_location("torch_peer", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def specification(model, optimizer="adamw", clip_norm=0.0, accumulate=1):
    how = {"name": optimizer, "learning_rate": RATE, "weight_decay": 0.1, "momentum": 0.9, "b2": 0.99}
    return {
        "model": FIELDS | model,
        "image_size": 8,
        "channels": 3,
        "classes": CLASSES,
        "batch_size": BATCH,
        "accumulate": accumulate,
        "optimizer": how | {"clip_norm": clip_norm},
        "label_smoothing": 0.1,
        "dtype": "float32",
    }


def same_weights(peer, module, model):
    """Our model and its parameters: random ones, which the peer's module is given too."""
    ours = VisionTransformer(num_classes=CLASSES, head_zero_init=False, **FIELDS, **model)
    params = ours.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)), train=False)["params"]
    leaves, form = jax.tree.flatten(params)
    random = np.random.default_rng(0)
    leaves = [x + np.float32(0.1 * random.standard_normal(x.shape)) for x in leaves]
    params = jax.tree.unflatten(form, leaves)
    arrays = as_theirs(traverse_util.flatten_dict(params, sep="/"), model["qk_norm"], FIELDS["depth"])
    module.load_state_dict({name: peer.torch.tensor(np.array(x)) for name, x in arrays.items()})
    return ours, params


def as_theirs(ours, qk_norm, depth):
    """Names and shapes as the peer has them."""
    theirs = {}

    def dense(there, here):
        kernel = ours[f"{here}/kernel"]
        theirs[f"{there}.weight"] = kernel.transpose(3, 2, 0, 1) if kernel.ndim == 4 else kernel.T
        if f"{here}/bias" in ours:
            theirs[f"{there}.bias"] = ours[f"{here}/bias"]

    def norm(there, here):
        theirs[f"{there}.weight"] = ours[f"{here}/scale"]
        if f"{here}/bias" in ours:
            theirs[f"{there}.bias"] = ours[f"{here}/bias"]

    for i in range(2 if "stem/conv_0/kernel" in ours else 0):
        dense(f"stem.{3 * i}", f"stem/conv_{i}")
        norm(f"stem.{3 * i + 1}", f"stem/norm_{i}")
    dense("embed", "embedding")
    if "cls" in ours:
        theirs["cls"] = ours["cls"]
        theirs["positions"] = ours["Transformer/posembed_input/pos_embedding"]
    for i in range(depth):
        there, here = f"blocks.{i}", f"Transformer/encoderblock_{i}"
        attention = f"{here}/MultiHeadDotProductAttention_1"
        qkv = [(ours[f"{attention}/{x}/kernel"], ours[f"{attention}/{x}/bias"]) for x in ("query", "key", "value")]
        theirs[f"{there}.attention.qkv.weight"] = np.concatenate([w.reshape(len(w), -1).T for w, _ in qkv])
        theirs[f"{there}.attention.qkv.bias"] = np.concatenate([b.reshape(-1) for _, b in qkv])
        out = ours[f"{attention}/out/kernel"]
        theirs[f"{there}.attention.out.weight"] = out.reshape(-1, out.shape[-1]).T
        theirs[f"{there}.attention.out.bias"] = ours[f"{attention}/out/bias"]
        for j in range(2 * qk_norm):
            norm(f"{there}.attention.norms.{j}", f"{attention}/{('query_ln', 'key_ln')[j]}")
        norm(f"{there}.norm1", f"{here}/LayerNorm_0")
        norm(f"{there}.norm2", f"{here}/LayerNorm_2")
        dense(f"{there}.mlp.0", f"{here}/MlpBlock_3/Dense_0")
        dense(f"{there}.mlp.2", f"{here}/MlpBlock_3/Dense_1")
    norm("norm", "Transformer/encoder_norm")
    if "pool/kernel" in ours:
        dense("weigh", "pool")
    dense("head", "head")
    return theirs


@pytest.mark.parametrize(
    "model, optimizer, clip_norm, accumulate",
    [
        (PLAIN, "adam", 0.0, 1),
        (PLAIN, "sgd", 0.5, 3),
        (RICH, "adamw", 0.0, 1),
        (RICH | {"pool": "gap"}, "muon", 0.0, 1),
    ],
    ids=["adam", "sgd", "adamw", "muon"],
)
def test_two_steps_give_the_weights_that_ours_have(peer, model, optimizer, clip_norm, accumulate):
    training = peer.Training(specification(model, optimizer, clip_norm, accumulate))
    ours, params = same_weights(peer, training.model, model)
    images = training.images.reshape(BATCH, 3, 8, 8).numpy().transpose(0, 2, 3, 1)
    labels = training.labels.reshape(BATCH).numpy()
    schedule, decay = optax.constant_schedule(RATE), {"weight_decay": 0.1, "momentum": 0.9, "b2": 0.99}
    rule = optim.make_optimizer(optimizer, schedule, clip_norm=clip_norm, **decay)
    targets = optax.smooth_labels(jax.nn.one_hot(labels, CLASSES), 0.1)

    def logits(params):
        return ours.apply({"params": params}, images, train=False)

    @jax.jit
    def step(params, state):
        gradient = jax.grad(lambda p: optax.softmax_cross_entropy(logits(p), targets).mean())(params)
        updates, state = rule.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    def theirs():
        return training.model(training.images.reshape(BATCH, 3, 8, 8)).detach().numpy()

    before = logits(params)
    np.testing.assert_allclose(theirs(), before, atol=2e-5)
    state = rule.init(params)
    for _ in range(2):
        params, state = step(params, state)
    training(2)
    assert np.abs(logits(params) - before).max() > 0.01
    np.testing.assert_allclose(theirs(), logits(params), atol=2e-3)


def test_a_compiled_gpu_step_is_asked_for_where_there_is_a_gpu(peer):
    about = peer.Training(specification(PLAIN)).about()
    assert about["device"] == "cpu" or about["peak_memory_bytes"] > 0


def test_it_answers_a_line_with_the_seconds_of_as_many_steps(peer, monkeypatch, tmp_path, capsys):
    (tmp_path / "specification.json").write_text(json.dumps(specification(PLAIN)))
    monkeypatch.setattr("sys.argv", ["torch_peer.py", str(tmp_path / "specification.json")])
    monkeypatch.setattr("sys.stdin", io.StringIO("1\n2\n"))
    peer.main()
    first, *answers = map(json.loads, capsys.readouterr().out.splitlines())
    assert first["parameters"] > 1000 and first["compile_seconds"] > 0
    assert [answer["seconds"] > 0 for answer in answers] == [True, True]


def test_without_torch(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install torch"):
        comparing.check()


def test_outside_a_clone(monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(comparing, "SCRIPT", tmp_path / "torch_peer.py")
    with pytest.raises(UserError, match="in a clone"):
        comparing.check()


def test_a_peer_that_ends_is_an_error(tmp_path):
    class Ended:
        stdin, stdout = io.StringIO(), io.StringIO("")

        def wait(self):
            return 3

    with pytest.raises(RunError, match="exit code 3"):
        comparing.Peer(Ended())

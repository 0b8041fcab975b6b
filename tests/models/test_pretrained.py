"""Weights of other models: every kind of file gives the same network, and what does not fit is refused by name."""

import dataclasses
import io
import json
import math
import tracemalloc
import zipfile

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from scipy import ndimage, special

from vit_jax.errors import UserError
from vit_jax.models import archives, names, pretrained
from vit_jax.models.presets import preset
from vit_jax.models.pretrained import POSITIONS, Facts

SIZE = 12
BLOCK = "Transformer/encoderblock_0/"


@pytest.fixture(scope="module")
def model(fabric):
    return fabric.model()


@pytest.fixture(scope="module")
def params(fabric, model):
    return fabric.params(model, SIZE)


MADE = Facts(1e-6, "tanh", num_heads=3)


def save(path, arrays, format=None, scheme="official", facts=MADE):
    with path.open("wb+") as file:
        pretrained.write(file, names.renamed(arrays, scheme), format or path.suffix[1:], facts)
    return path


def load(fabric, path, model, size=SIZE, **options):
    height, width = size if isinstance(size, tuple) else (size, size)
    grid = height // model.patch_size, width // model.patch_size
    with pretrained.opened(path) as source:
        found, notes = pretrained.fit(source, fabric.like(model, size), grid, **options)
    return {name: np.asarray(array) for name, array in found.items()}, notes


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)


# Kinds of files


@pytest.mark.parametrize("suffix, scheme", [(".npz", "official"), *((".safetensors", s) for s in names.SCHEMES)])
def test_a_round_trip_keeps_every_bit(fabric, model, params, tmp_path, suffix, scheme):
    path = save(tmp_path / f"a{suffix}", params, scheme=scheme)
    found, notes = load(fabric, path, model)
    assert_same(found, params)
    assert notes == ["the head comes along: 5 classes"]


def test_the_official_file_is_the_tree_itself(fabric, model, params, tmp_path):
    np.savez(tmp_path / "official.npz", **params)
    assert_same(load(fabric, tmp_path / "official.npz", model)[0], params)


def test_later_flax_and_big_vision(fabric, model, params, tmp_path):
    """big_vision adds the class token after the positions: its slot is zero here."""
    linen = {"MultiHeadDotProductAttention_1": "MultiHeadDotProductAttention_0", "LayerNorm_2": "LayerNorm_1"}
    linen |= {"MlpBlock_3": "MlpBlock_0"}

    def renamed(name):
        return "/".join(linen.get(part, part) for part in name.split("/"))

    later = {renamed(name): array for name, array in params.items()}
    np.savez(tmp_path / "linen.npz", **later)
    assert_same(load(fabric, tmp_path / "linen.npz", model)[0], params)

    later["pos_embedding"] = later.pop(POSITIONS)[:, 1:]
    np.savez(tmp_path / "big_vision.npz", **{f"params/{name}": array for name, array in later.items()})
    found, notes = load(fabric, tmp_path / "big_vision.npz", model)
    table = params[POSITIONS].copy()
    table[:, 0] = 0
    assert_same(found, params | {POSITIONS: table})
    assert "position embedding with a slot of zeros for the class token" in notes


def test_bfloat16_as_raw_bytes(fabric, model, params, tmp_path):
    np.savez(tmp_path / "a.npz", **{name: array.astype(ml_dtypes.bfloat16) for name, array in params.items()})
    with np.load(tmp_path / "a.npz") as file:
        assert file["cls"].dtype == np.dtype("V2")
    found, _ = load(fabric, tmp_path / "a.npz", model)
    assert_same(found, {n: a.astype(ml_dtypes.bfloat16).astype(np.float32) for n, a in params.items()})


def test_old_group_norms_have_four_axes(fabric, tmp_path):
    model = fabric.model(stem="resnet", resnet_blocks=(1, 1), patch_size=16)
    params = fabric.params(model, 32)
    norms = {name for name in params if "/gn" in f"/{name}"}
    assert len(norms) == 2 * (1 + 2 * 4)
    old = {name: array.reshape(1, 1, 1, -1) if name in norms else array for name, array in params.items()}
    np.savez(tmp_path / "hybrid.npz", **old)
    assert_same(load(fabric, tmp_path / "hybrid.npz", model, 32)[0], params)


def test_a_model_without_its_head_as_transformers_saves_it(fabric, model, params, tmp_path):
    theirs = names.renamed(params, "transformers")
    theirs = {n.removeprefix("vit."): a for n, a in theirs.items() if not n.startswith("classifier")}
    with (tmp_path / "model.safetensors").open("wb+") as file:
        archives.write_safetensors(file, theirs, {})
    found, notes = load(fabric, tmp_path, model)  # the folder, as it is downloaded
    assert_same(found, {name: array for name, array in params.items() if not name.startswith("head")})
    assert notes[0] == "the head is new: there are no classes in it"
    assert notes[1] == "the file does not say how many heads it has: they are taken to be 3"


def test_the_names_of_timm_and_transformers(params):
    """Spelled out for a block; layouts by closed form."""
    timm, hf = (names.renamed(params, scheme) for scheme in ("timm", "transformers"))
    query, value = (params[f"{BLOCK}MultiHeadDotProductAttention_1/{n}/kernel"] for n in ("query", "value"))
    np.testing.assert_array_equal(timm["blocks.0.attn.qkv.weight"][:12], query.reshape(12, 12).T)
    np.testing.assert_array_equal(timm["blocks.0.attn.qkv.weight"][24:], value.reshape(12, 12).T)
    np.testing.assert_array_equal(hf["vit.encoder.layer.0.attention.attention.value.weight"], value.reshape(12, 12).T)
    out = params[f"{BLOCK}MultiHeadDotProductAttention_1/out/kernel"]
    np.testing.assert_array_equal(timm["blocks.0.attn.proj.weight"], out.reshape(12, 12).T)
    kernel = params["embedding/kernel"]
    assert timm["patch_embed.proj.weight"][7, 2, 1, 3] == kernel[1, 3, 2, 7]
    assert {"cls_token", "pos_embed", "norm.weight", "blocks.1.mlp.fc2.bias", "head.weight"} < timm.keys()
    assert len(timm) == len(params) - 2 * 4 and len(hf) == len(params)


@pytest.mark.parametrize("name", ["Transformer/encoderblock_1/layer_scale_mlp", "stem/conv_0/kernel"])
def test_what_other_libraries_have_no_name_for(params, name):
    with pytest.raises(UserError, match=name):
        names.renamed(params | {name: np.ones(3)}, "timm")


# What a file says of itself


def test_facts_of_our_own_files(params, tmp_path):
    facts = Facts(1e-5, "exact", (0.1, 0.2, 0.3), (0.5, 0.6, 0.7), 3, "learned", False)
    for name, scheme in (("a.npz", "official"), ("a.safetensors", "official"), ("b.safetensors", "timm")):
        with pretrained.opened(save(tmp_path / name, params, scheme=scheme, facts=facts)) as source:
            assert source.facts == facts and source.kind == scheme


def test_facts_of_others(params, tmp_path):
    np.savez(tmp_path / "official.npz", **params)
    with pretrained.opened(tmp_path / "official.npz") as source:
        assert source.facts == Facts(1e-6, "tanh", (0.5,), (0.5,))
    for scheme, facts in (("timm", Facts(1e-6, "exact")), ("transformers", Facts(1e-12, "exact"))):
        with (tmp_path / f"{scheme}.safetensors").open("wb+") as file:
            archives.write_safetensors(file, names.renamed(params, scheme), {})
        with pretrained.opened(tmp_path / f"{scheme}.safetensors") as source:
            assert source.facts == facts
    config = {"layer_norm_eps": 1e-5, "hidden_act": "gelu_pytorch_tanh", "num_attention_heads": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "preprocessor_config.json").write_text('{"image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.5, 0.5]}')
    with pretrained.opened(tmp_path / "transformers.safetensors") as source:
        assert source.facts == Facts(1e-5, "tanh", (0.1, 0.2, 0.3), (0.5, 0.5, 0.5), num_heads=4)
    (tmp_path / "preprocessor_config.json").unlink()
    (tmp_path / "config.json").write_text('{"pretrained_cfg": {"mean": [0.4, 0.4, 0.4], "std": [0.2, 0.2, 0.2]}}')
    with pretrained.opened(tmp_path / "timm.safetensors") as source:
        assert source.facts == Facts(1e-6, "exact", (0.4, 0.4, 0.4), (0.2, 0.2, 0.2))


@pytest.mark.parametrize(
    "text",
    [
        "[" * 200_000,
        '{"num_attention_heads": 1e999}',
        "{",
        '{"layer_norm_eps": "small"}',
        '{"pretrained_cfg": {"mean": ["a"]}}',
        '{"hidden_act": "relu"}',
        "[]{",
        "{}" + " " * 2**24,
    ],
    ids=lambda text: text[:24],
)
def test_a_damaged_config_beside_the_file(params, tmp_path, text):
    path = tmp_path / "a.safetensors"
    with path.open("wb+") as file:
        archives.write_safetensors(file, names.renamed(params, "timm"), {})
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match="config.json"), pretrained.opened(path):
        pass


# Strictness


def refused(fabric, tmp_path, arrays, model, size=SIZE, **options):
    np.savez(tmp_path / "refused.npz", **arrays)
    with pytest.raises(UserError) as caught:
        load(fabric, tmp_path / "refused.npz", model, size, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def without(params, *names):
    return {name: array for name, array in params.items() if name not in names}


def test_missing_surplus_and_misshapen_arrays_are_named(fabric, model, params, tmp_path):
    wrong = without(params, "cls", f"{BLOCK}LayerNorm_0/bias")
    wrong |= {"extra/kernel": np.ones(3, np.float32), f"{BLOCK}MlpBlock_3/Dense_0/bias": np.ones(7, np.float32)}
    message = refused(fabric, tmp_path, wrong, model)
    assert f"2 arrays are missing there: {BLOCK}LayerNorm_0/bias, cls;" in message
    assert "1 arrays have no place here: extra/kernel" in message
    assert f"{BLOCK}MlpBlock_3/Dense_0/bias is (7,) there and (20,) here" in message


def test_a_deeper_file_is_not_cut(fabric, model, params, tmp_path):
    shallow = fabric.model(depth=1)
    assert "16 arrays have no place here: Transformer/encoderblock_1/" in refused(fabric, tmp_path, params, shallow)
    assert "16 arrays are missing there" in refused(fabric, tmp_path, fabric.params(shallow, SIZE), model)


def test_other_heads_are_no_match_even_where_the_size_is(fabric, params, tmp_path):
    assert "(12, 3, 4) there and (12, 2, 6) here" in refused(fabric, tmp_path, params, fabric.model(num_heads=2))


def test_the_number_of_heads_of_merged_files(fabric, model, params, tmp_path):
    path = save(tmp_path / "a.safetensors", params, scheme="timm")
    with pytest.raises(UserError, match="have 3 heads: set model.num_heads=3, not 2"):
        load(fabric, path, fabric.model(num_heads=2))


@pytest.mark.parametrize(
    "change, words",
    [
        ({"params/cls": np.ones((1, 1, 12), np.float32)}, "two arrays for cls"),
        (
            {f"{BLOCK}MultiHeadDotProductAttention_0/x": np.ones(1), f"{BLOCK}LayerNorm_1/bias": np.ones(12)},
            "two arrays",
        ),
    ],
)
def test_a_file_that_mixes_names(fabric, model, params, tmp_path, change, words):
    assert words in refused(fabric, tmp_path, params | change, model)


def test_thirds_must_be_thirds(fabric, model, params, tmp_path):
    theirs = names.renamed(params, "timm") | {"blocks.0.attn.qkv.weight": np.ones((38, 12), np.float32)}
    with (tmp_path / "a.safetensors").open("wb+") as file:
        archives.write_safetensors(file, theirs, {})
    with pytest.raises(UserError, match="no thirds"):
        load(fabric, tmp_path / "a.safetensors", model)


@pytest.mark.parametrize("shape", [(0, 0, 10**7, 0), (2, 2), (10**6, 10**6, 3, 12), (0, 0, 0, 0), ()])
def test_odd_shapes_are_refused_in_little_memory(fabric, model, params, tmp_path, shape):
    """Only the header says so; nothing of that size is read or made."""
    buffer = io.BytesIO()
    header = {"descr": "<f4", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(buffer, header)
    buffer.write(b"\0" * (4 if shape == () else 48 * (shape == (2, 2)) // 3))
    np.savez(tmp_path / "a.npz", **without(params, "embedding/kernel"))
    with zipfile.ZipFile(tmp_path / "a.npz", "a") as archive:
        archive.writestr("embedding/kernel.npy", buffer.getvalue())
    tracemalloc.start()
    with pytest.raises(UserError):
        load(fabric, tmp_path / "a.npz", model, resample_patches=True)
    assert tracemalloc.get_traced_memory()[1] < 20 * 2**20
    tracemalloc.stop()


def test_positions_of_more_tokens_than_any_picture_has_are_refused_unread(fabric, model, params, tmp_path):
    with pretrained.opened(save(tmp_path / "a.npz", params)) as source:
        positions = archives.Stored((1, 2**20 + 1, model.width), pytest.fail)
        claiming = dataclasses.replace(source, arrays={**source.arrays, names.POSITIONS: positions})
        with pytest.raises(UserError, match="pos_embedding is .1, 1048577, 12. there"):
            pretrained.fit(claiming, fabric.like(model, SIZE), (2, 2))


@pytest.mark.parametrize("count, end", [(8, ""), (9, " and 1 more")])
def test_an_error_names_some_arrays_and_counts_the_rest(fabric, model, params, tmp_path, count, end):
    missing = sorted(params)[:count]
    np.savez(tmp_path / "a.npz", **without(params, *missing))
    with pytest.raises(UserError) as caught:
        load(fabric, tmp_path / "a.npz", model)
    assert f"{count} arrays are missing there: {', '.join(missing[:8])}{end}; " in str(caught.value)


def test_another_variant_is_recognised(fabric, tmp_path):
    large = fabric.like(fabric.model(**preset("L/16") | {"num_classes": 10}), 32)
    # The shapes of L/16, made of almost nothing: each array repeats one number.
    arrays = {name: archives.Stored(leaf.shape, lambda: np.zeros(1)) for name, leaf in large.items()}
    base = fabric.like(fabric.model(**preset("B/16")), 32)
    with pytest.raises(UserError, match=r"this looks like L/16: set model\.preset"):
        pretrained.fit(pretrained.Source("FILE", arrays, Facts(1e-6, "tanh")), base, (2, 2))


def test_no_vision_transformer(tmp_path, fabric, model):
    message = refused(fabric, tmp_path, {"conv1/kernel": np.ones(3, np.float32), "fc/bias": np.ones(2)}, model)
    assert "no Vision Transformer" in message and "conv1/kernel, fc/bias" in message


def test_skip_allows_new_and_leaves_out(fabric, model, params, tmp_path):
    np.savez(tmp_path / "a.npz", **without(params, "cls") | {"extra": np.ones(3, np.float32)})
    found, notes = load(fabric, tmp_path / "a.npz", model, skip=("^cls$", "extra", "encoderblock_1/"))
    expected = {n: a for n, a in params.items() if n != "cls" and "encoderblock_1" not in n}
    assert_same(found, expected)
    assert notes[1].startswith("new: Transformer/encoderblock_1/") and notes[2].startswith("left out: ")
    with pytest.raises(UserError, match="'nothing' matches no parameter"):
        load(fabric, tmp_path / "a.npz", model, skip=("nothing",))
    with pytest.raises(UserError, match=r"init.skip: '\(' is not a regex"):
        load(fabric, tmp_path / "a.npz", model, skip=("(",))


def test_the_class_token_can_be_left_out(fabric, params, tmp_path):
    pooled = fabric.model(pool="gap")
    assert "1 arrays have no place here: cls" in refused(fabric, tmp_path, params, pooled)
    found, notes = load(fabric, tmp_path / "refused.npz", pooled, skip=("^cls$",))
    np.testing.assert_array_equal(found[POSITIONS], params[POSITIONS][:, 1:])
    assert "position embedding without the class token's slot" in notes


def test_the_head_is_kept_where_its_classes_are_as_many(fabric, model, params, tmp_path):
    np.savez(tmp_path / "a.npz", **params)
    assert_same(load(fabric, tmp_path / "a.npz", model, whole=True)[0], params)
    other = fabric.model(num_classes=7)
    found, notes = load(fabric, tmp_path / "a.npz", other)
    assert_same(found, without(params, "head/kernel", "head/bias"))
    assert notes == ["the head is new: there are 5 classes in it"]
    assert "looks like" not in refused(fabric, tmp_path, params, other, whole=True)  # it is the very variant
    message = refused(fabric, tmp_path, params, other, whole=True)
    assert "head/kernel is (12, 5) there and (12, 7) here" in message
    found, _ = load(fabric, tmp_path / "a.npz", model, skip=("^head/",))
    assert "head/kernel" not in found


def test_pre_logits_is_kept_with_a_representation_and_dropped_else(fabric, model, tmp_path):
    with_it = fabric.model(representation_size=8)
    params = fabric.params(with_it, SIZE)
    np.savez(tmp_path / "a.npz", **params)
    assert_same(load(fabric, tmp_path / "a.npz", with_it)[0], params)
    found, notes = load(fabric, tmp_path / "a.npz", model)  # as many classes, but the head read what is left out
    assert not [name for name in found if name.startswith(("pre_logits", "head"))]
    assert "pre_logits is left out (model.representation_size is 0)" in notes
    with pytest.raises(UserError, match="set model.representation_size=8"):
        load(fabric, tmp_path / "a.npz", model, whole=True)
    missing = refused(fabric, tmp_path, fabric.params(model, SIZE), with_it)
    assert "pre_logits/kernel" in missing


# Other grids and patches


@pytest.mark.parametrize("old, new", [((14, 14), (24, 24)), ((3, 5), (7, 4)), ((6, 6), (3, 3)), ((4, 4), (1, 9))])
def test_positions_are_resized_as_scipy_zoom_does(old, new):
    table = np.random.default_rng(0).normal(size=(*old, 3)).astype(np.float32)
    expected = ndimage.zoom(table, (new[0] / old[0], new[1] / old[1], 1), order=1)
    assert expected.shape == (*new, 3)
    np.testing.assert_allclose(pretrained.resized_positions(table, new), expected, atol=1e-6)


def test_jaxs_own_resize_would_be_another():
    table = np.random.default_rng(0).normal(size=(14, 14, 3)).astype(np.float32)
    half_pixel = jax.image.resize(table, (24, 24, 3), "bilinear")
    assert np.abs(pretrained.resized_positions(table, (24, 24)) - half_pixel).max() > 0.1


def test_a_larger_resolution_and_one_that_is_not_square(fabric, model, params, tmp_path):
    np.savez(tmp_path / "a.npz", **params)
    for size, grid in ((20, (5, 5)), ((8, 24), (2, 6)), ((4, 36), (1, 9))):  # the last has as many patches
        found, notes = load(fabric, tmp_path / "a.npz", model, size)
        table = params[POSITIONS]
        patches = pretrained.resized_positions(table[0, 1:].reshape(3, 3, 12), grid).reshape(1, -1, 12)
        assert_same(found, params | {POSITIONS: np.concatenate([table[:, :1], patches], axis=1)})
        assert f"position embedding resized from 3x3 to {grid[0]}x{grid[1]}" in notes


def test_a_grid_that_is_not_square_cannot_be_resized(fabric, model, params, tmp_path):
    wrong = params | {POSITIONS: np.ones((1, 7, 12), np.float32)}
    assert "7 tokens, which are no square grid" in refused(fabric, tmp_path, wrong, model)


def test_patches_are_resampled_only_when_asked(fabric, model, params, tmp_path):
    larger = fabric.model(patch_size=6)
    message = refused(fabric, tmp_path, params, larger, 18)
    assert "embedding/kernel is (4, 4, 3, 12) there and (6, 6, 3, 12) here (init.resample_patches=True" in message
    found, notes = load(fabric, tmp_path / "refused.npz", larger, 18, resample_patches=True)
    assert "patches resampled from 4 to 6 pixels" in notes
    # A picture and its enlargement have the same tokens.
    patch = np.random.default_rng(2).normal(size=(4, 4, 3))
    enlarged = jax.image.resize(patch, (6, 6, 3), "bilinear")
    old, new = (
        np.tensordot(x, k, 3) for x, k in ((patch, params["embedding/kernel"]), (enlarged, found["embedding/kernel"]))
    )
    np.testing.assert_allclose(new, old, atol=1e-5)
    # What is smaller cannot say all: the pseudo-inverse is the best in the least-squares sense.
    smaller = pretrained.resampled_patches(params["embedding/kernel"], (3, 3))
    assert smaller.shape == (3, 3, 3, 12) and np.isfinite(smaller).all()


# The same network


def numpy_logits(params, pictures, epsilon, heads, exact):
    """The paper's equations 1 to 4 in float64, straight from the arrays of a file."""
    p = {name: array.astype(np.float64) for name, array in params.items()}
    kernel = p["embedding/kernel"]
    size, _, _, width = kernel.shape

    def norm(x, name):
        x = x - x.mean(-1, keepdims=True)
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + epsilon) * p[f"{name}/scale"] + p[f"{name}/bias"]

    def gelu(x):
        if exact:
            return x * 0.5 * (1 + special.erf(x / math.sqrt(2)))
        return x * 0.5 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

    batch, height, columns, _ = pictures.shape
    rows = pictures.astype(np.float64).reshape(batch, height // size, size, columns // size, size, 3)
    tokens = np.einsum("bipjqc,pqcd->bijd", rows, kernel).reshape(batch, -1, width) + p["embedding/bias"]
    x = np.concatenate([np.broadcast_to(p["cls"], (batch, 1, width)), tokens], axis=1) + p[POSITIONS]
    depth = sum(name.endswith("/LayerNorm_0/scale") for name in p)
    for block in (f"Transformer/encoderblock_{i}" for i in range(depth)):
        y = norm(x, f"{block}/LayerNorm_0")
        attention = f"{block}/MultiHeadDotProductAttention_1"
        q, k, v = (
            np.einsum("bnd,dhe->bhne", y, p[f"{attention}/{n}/kernel"]) + p[f"{attention}/{n}/bias"][:, None]
            for n in ("query", "key", "value")
        )
        scores = np.einsum("bhqe,bhke->bhqk", q, k) / math.sqrt(width // heads)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        mixed = np.einsum("bhqk,bhke->bhqe", weights / weights.sum(-1, keepdims=True), v)
        x = x + np.einsum("bhqe,hed->bqd", mixed, p[f"{attention}/out/kernel"]) + p[f"{attention}/out/bias"]
        y, mlp = norm(x, f"{block}/LayerNorm_2"), f"{block}/MlpBlock_3"
        hidden = gelu(y @ p[f"{mlp}/Dense_0/kernel"] + p[f"{mlp}/Dense_0/bias"])
        x = x + hidden @ p[f"{mlp}/Dense_1/kernel"] + p[f"{mlp}/Dense_1/bias"]
    x = norm(x, "Transformer/encoder_norm")[:, 0]
    if "pre_logits/kernel" in p:
        x = np.tanh(x @ p["pre_logits/kernel"] + p["pre_logits/bias"])
    return x @ p["head/kernel"] + p["head/bias"]


@pytest.mark.parametrize("x64, bound", [(False, 1e-5), (True, 1e-6)])
@pytest.mark.parametrize("fields", [dict(depth=4, representation_size=8), dict(gelu="exact", norm_epsilon=1e-5)])
def test_logits_of_a_file_are_those_of_the_papers_equations(fabric, tmp_path, fields, x64, bound):
    fields = dict(width=48, mlp_dim=96) | fields
    model = fabric.model(**fields)
    params = fabric.params(model, 20)
    np.savez(tmp_path / "a.npz", **params)
    found, _ = load(fabric, tmp_path / "a.npz", model, 20)
    pictures = fabric.pictures(20, count=3)
    with jax.enable_x64(x64):
        wide = model.clone(dtype=jnp.float64 if x64 else jnp.float32)
        logits = fabric.logits(wide, found, pictures)
    expected = numpy_logits(params, pictures, model.norm_epsilon, model.num_heads, model.gelu == "exact")
    np.testing.assert_allclose(logits, expected, rtol=0, atol=bound * np.abs(expected).max())

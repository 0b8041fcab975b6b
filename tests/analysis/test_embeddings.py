"""Position embeddings and patch filters: closed forms, and scikit-learn's principal components."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.decomposition import PCA

from vit_jax.analysis import embeddings
from vit_jax.errors import Absent, UserError
from vit_jax.models.vit import VisionTransformer

GRID = (4, 6)
RANDOM = np.random.default_rng(0)


def make(**fields):
    return VisionTransformer(num_classes=3, patch_size=2, width=16, depth=1, num_heads=2, mlp_dim=8, **fields)


def positions(table):
    return {"Transformer": {"posembed_input": {"pos_embedding": jnp.asarray(table, jnp.float32)[None]}}}


@pytest.mark.parametrize("pool", ["cls", "gap"])
def test_similarity_is_the_cosine_between_patches(pool):
    table = RANDOM.normal(size=(24 + (pool == "cls"), 16)) * RANDOM.uniform(0.1, 5, size=(24 + (pool == "cls"), 1))
    found = embeddings.position_similarity(make(pool=pool), positions(table), GRID)
    patches = table[-24:]
    for (i, j, k, m), value in np.ndenumerate(found):
        a, b = patches[6 * i + j], patches[6 * k + m]
        assert value == pytest.approx(a @ b / np.linalg.norm(a) / np.linalg.norm(b), abs=1e-6)
    assert found.shape == (4, 6, 4, 6)


def test_similarity_of_fixed_waves_depends_on_the_offset_alone():
    found = embeddings.position_similarity(make(position_embedding="sincos2d"), {}, GRID)
    frequencies = 10_000.0 ** (-np.arange(4) / 4)
    for (i, j, k, m), value in np.ndenumerate(found):  # |x|^2 is D / 2, and sin sin + cos cos is cos of the difference
        expected = (np.cos((i - k) * frequencies).sum() + np.cos((j - m) * frequencies).sum()) / 8
        assert value == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("kind", ["rotary", "none"])
def test_a_model_without_a_table_of_positions(kind):
    with pytest.raises(Absent, match=f"position_embedding={kind}") as error:
        embeddings.position_similarity(make(position_embedding=kind), {"Transformer": {}}, GRID)
    assert isinstance(error.value, UserError)


def test_filters_are_principal_components():
    kernel = RANDOM.normal(size=(4, 2, 3, 40)) * RANDOM.uniform(0.1, 3, size=(4, 2, 3, 1)) + 1
    found = embeddings.patch_filters(make(), {"embedding": {"kernel": kernel}}, count=5)
    assert found.shape == (5, 4, 2, 3)
    expected = PCA(5, svd_solver="full").fit(kernel.reshape(24, 40).T).components_
    np.testing.assert_allclose(np.abs((found.reshape(5, 24) * expected).sum(1)), 1, atol=1e-9)  # up to the sign
    np.testing.assert_allclose(found.reshape(5, 24) @ found.reshape(5, 24).T, np.eye(5), atol=1e-9)
    assert all(x.ravel()[np.abs(x).argmax()] > 0 for x in found)


def test_there_are_no_more_filters_than_pixels_or_features():
    assert embeddings.patch_filters(make(), {"embedding": {"kernel": RANDOM.normal(size=(2, 2, 1, 40))}}).shape[0] == 4
    assert embeddings.patch_filters(make(), {"embedding": {"kernel": RANDOM.normal(size=(4, 4, 3, 9))}}).shape[0] == 8
    kernel = RANDOM.normal(size=(8, 8, 3, 64))
    assert embeddings.patch_filters(make(), {"embedding": {"kernel": kernel}}).shape == (28, 8, 8, 3)


@pytest.mark.parametrize("stem", ["conv", "shifted"])
def test_a_model_whose_embedding_sees_no_pixels(stem):
    shapes = jax.eval_shape(lambda: make(stem=stem).init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)), train=False))
    with pytest.raises(Absent, match=f"stem={stem}"):
        embeddings.patch_filters(make(stem=stem), shapes["params"])

"""Summaries, calibration, confusions and cost against hand counts."""

import numpy as np
import pytest
from sklearn.metrics import confusion_matrix

from vit_jax.analysis import metrics


def test_summaries_are_means_over_examples():
    results = {"correct": [1, 0, 1, 1], "correct_top5": [1, 1, 1, 1], "loss": [0.5, 2.5, 1.0, 0.0]}
    results = {name: np.float32(values) for name, values in results.items()}
    assert metrics.summarize(results) == {"accuracy": 0.75, "accuracy_top5": 1.0, "loss": 1.0}


def test_calibration_error_of_two_bins_by_hand():
    confidence = np.array([0.95, 0.95, 0.55, 0.55, 0.55, 0.55])
    correct = np.array([1, 0, 1, 1, 1, 1])
    # bin of .95: |1/2 - .95| of 2 examples; bin of .55: |1 - .55| of 4
    assert metrics.calibration_error(confidence, correct) == pytest.approx((2 * 0.45 + 4 * 0.45) / 6)


def test_a_calibrated_and_an_overconfident_model():
    generator = np.random.default_rng(0)
    confidence = generator.uniform(0.1, 1, 200_000)
    correct = generator.random(200_000) < confidence
    assert metrics.calibration_error(confidence, correct) < 0.005
    assert metrics.calibration_error(np.ones(100), np.arange(100) < 70) == pytest.approx(0.3)
    assert metrics.calibration_error(np.array([0.0, 1.0]), np.array([0, 1])) == 0  # both ends have a bin


def test_reliability_sums_by_hand():
    confidence = np.float32([0.0, 0.25, 0.26, 0.5, 0.9, 1.0])
    correct = np.float32([1, 0, 1, 1, 0, 1])
    found = metrics.reliability(confidence, correct, bins=4)  # a bin holds its upper end, and the first one 0
    np.testing.assert_allclose(found, [[2, 2, 0, 2], [1, 2, 0, 1], [0.25, 0.76, 0, 1.9]], atol=1e-6)
    gaps = np.abs(np.float64([1 - 0.25, 2 - 0.76, 0, 1 - 1.9])).sum() / 6
    assert metrics.calibration_error(confidence, correct, bins=4) == pytest.approx(gaps)


def test_confusions():
    random = np.random.default_rng(0)
    labels, predictions = random.integers(0, 7, (2, 500)).astype(np.int32)
    expected = confusion_matrix(labels, predictions, labels=range(8))
    np.testing.assert_array_equal(metrics.confusion(labels, predictions, 8), expected)

    matrix = np.array([[9, 1, 0], [5, 0, 0], [0, 5, 7]])
    assert metrics.worst_confusions(matrix, 2) == [(1, 0), (2, 1)]
    assert metrics.worst_confusions(matrix, 20) == [(1, 0), (2, 1), (0, 1)]  # and no others
    assert metrics.worst_confusions(np.diag([3, 4]), 20) == []


def test_results_by_class():
    matrix = np.array([[8, 2, 0, 0], [0, 0, 0, 0], [3, 1, 6, 0], [0, 0, 2, 0]])
    keys = ("class", "examples", "accuracy", "precision", "mistaken_for")
    rows = [("a", 10, 0.8, 8 / 11, "b"), ("b", 0, None, 0, None), ("c", 10, 0.6, 0.75, "a"), ("d", 2, 0, None, "c")]
    assert metrics.per_class(matrix, "abcd") == [dict(zip(keys, row, strict=True)) for row in rows]


@pytest.mark.parametrize(
    "shape, gigaflops",
    [
        # tokens, patches, patch size, width, depth, MLP, classes; from the reference table, training GFLOP a picture
        ((65, 64, 4, 384, 7, 384, 10), 2.56),
        ((64, 64, 4, 384, 7, 384, 10), 2.52),
        ((65, 64, 4, 192, 6, 256, 100), 0.64),
        ((256, 256, 2, 192, 12, 768, 10), 9.97),
    ],
)
def test_flops_by_the_formula(shape, gigaflops):
    names = ("tokens", "patches", "patch_size", "width", "depth", "mlp_dim", "classes")
    flops = metrics.training_flops(channels=3, **dict(zip(names, shape, strict=True)))
    assert flops / 1e9 == pytest.approx(gigaflops, rel=0.01)


def test_flops_of_one_block_by_hand():
    # 2 tokens of width 4, MLP 8: q, k, v, out: 4 products 2x4x4; scores and values: 2 products 2x2x4; MLP: 2 of 2x4x8
    block = 2 * (4 * 2 * 4 * 4 + 2 * 2 * 2 * 4 + 2 * 2 * 4 * 8)
    stem, head = 2 * 2 * 4 * 3 * 9, 2 * 4 * 5
    shape = dict(tokens=2, patches=2, channels=3, patch_size=3, width=4, depth=1, mlp_dim=8, classes=5)
    assert metrics.training_flops(**shape) == 3 * (block + stem + head)


def test_peaks_are_known_or_not_said():
    assert metrics.peak_flops("NVIDIA H200") == 989.4e12
    assert metrics.peak_flops("cpu") is None and metrics.peak_flops("NVIDIA H100 PCIe") is None

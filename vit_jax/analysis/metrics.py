"""What results are summed up to: accuracies, calibration, confusions, and the cost of training."""

from collections.abc import Mapping, Sequence

import numpy as np

# Dense bfloat16 peaks (V100: float16) in FLOP/s by the device's name, from the makers' data sheets.
PEAK_FLOPS = {
    "NVIDIA H200": 989.4e12,
    "NVIDIA H100 80GB HBM3": 989.4e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "Tesla V100-SXM2-16GB": 125e12,
    "NVIDIA GeForce RTX 5090": 209.5e12,
    "NVIDIA GeForce RTX 4090": 165.2e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
}


def summarize(results: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Means over examples, in float64: accuracy, accuracy_top5 and loss."""
    return {
        "accuracy": float(np.mean(results["correct"], dtype=np.float64)),
        "accuracy_top5": float(np.mean(results["correct_top5"], dtype=np.float64)),
        "loss": float(np.mean(results["loss"], dtype=np.float64)),
    }


def calibration_error(confidence: np.ndarray, correct: np.ndarray, bins: int = 15) -> float:
    """Expected calibration error (Guo et al. 2017, eq. 3) with `bins` bins of equal width.

    confidence: [N], the predicted class's probability; correct: [N], 1 where the prediction is right.
    """
    _, sum_correct, sum_confidence = reliability(confidence, correct, bins)
    return float(np.sum(np.abs(sum_correct - sum_confidence)) / len(confidence))


def reliability(confidence: np.ndarray, correct: np.ndarray, bins: int = 15) -> np.ndarray:
    """Sums over `bins` bins of confidence, of equal width in 0..1: examples, correct and confidence, float64 [3, bins].

    A bin holds its upper end, and the first one 0. Arguments as for `calibration_error`.
    """
    bin_of = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    sums = (None, np.asarray(correct, np.float64), confidence)
    return np.stack([np.bincount(bin_of, weights, minlength=bins) for weights in sums])


def confusion(labels: np.ndarray, predictions: np.ndarray, classes: int) -> np.ndarray:
    """How often each class (row) was taken for each class (column), int [K, K]."""
    return np.bincount(labels * classes + predictions, minlength=classes**2).reshape(classes, classes)


def worst_confusions(matrix: np.ndarray, count: int) -> list[tuple[int, int]]:
    """The at most `count` pairs (class, what it was taken for) that are most frequent in a confusion matrix."""
    wrong = mistakes_only(matrix)
    order = np.argsort(-wrong, axis=None, kind="stable")[:count]
    pairs = np.stack(np.unravel_index(order, wrong.shape), axis=1)
    return [(int(row), int(column)) for row, column in pairs if wrong[row, column]]


def mistakes_only(matrix: np.ndarray) -> np.ndarray:
    return np.where(np.eye(len(matrix), dtype=bool), 0, matrix)


def per_class(matrix: np.ndarray, class_names: Sequence[str]) -> list[dict[str, str | int | float | None]]:
    """A row a class of a confusion matrix, None where nothing can be said.

    accuracy: the share of the class's pictures that were known; precision: the share of right ones where the class was
    predicted; mistaken_for: what it was most often taken for.
    """
    wrong = mistakes_only(matrix)
    rows: list[dict[str, str | int | float | None]] = []
    for i, name in enumerate(class_names):
        examples, predicted, right = int(matrix[i].sum()), int(matrix[:, i].sum()), int(matrix[i, i])
        rows.append(
            {
                "class": name,
                "examples": examples,
                "accuracy": right / examples if examples else None,
                "precision": right / predicted if predicted else None,
                "mistaken_for": class_names[wrong[i].argmax()] if wrong[i].any() else None,
            }
        )
    return rows


def training_flops(
    *,
    tokens: int,
    patches: int,
    channels: int,
    patch_size: int,
    width: int,
    depth: int,
    mlp_dim: int,
    classes: int,
    stem: int = 0,
) -> float:
    """Model FLOPs of one training step for one picture: three times the forward pass's matrix products.

    A block costs 8 D^2 + 4 D M for the projections and the MLP and 4 N D for attention, a token; the patch embedding is
    a convolution of `channels`; `stem` is what is multiplied and added before it, in FLOPs.
    """
    blocks = depth * tokens * (8 * width**2 + 4 * width * mlp_dim + 4 * tokens * width)
    embedding = 2 * patches * width * channels * patch_size**2
    return 3.0 * (blocks + stem + embedding + 2 * width * classes)


def peak_flops(device_kind: str) -> float | None:
    """The device's bfloat16 peak in FLOP/s, to which MFU refers whatever a run computes in; None where not known."""
    return PEAK_FLOPS.get(device_kind)

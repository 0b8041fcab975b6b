"""What results are summed up to: accuracies, calibration, and the cost of training."""

from collections.abc import Mapping

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
    bin_of = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    gaps = np.bincount(bin_of, np.asarray(correct, np.float64) - confidence, minlength=bins)
    return float(np.sum(np.abs(gaps)) / len(confidence))


def training_flops(
    *, tokens: int, patches: int, channels: int, patch_size: int, width: int, depth: int, mlp_dim: int, classes: int
) -> float:
    """Model FLOPs of one training step for one picture: three times the forward pass's matrix products.

    A block costs 8 D^2 + 4 D M for the projections and the MLP and 4 N D for attention, a token; the stem is counted
    as one patch convolution.
    """
    blocks = depth * tokens * (8 * width**2 + 4 * width * mlp_dim + 4 * tokens * width)
    embedding = 2 * patches * width * channels * patch_size**2
    return 3.0 * (blocks + embedding + 2 * width * classes)


def peak_flops(device_kind: str) -> float | None:
    """The device's bfloat16 peak in FLOP/s, to which MFU refers whatever a run computes in; None where not known."""
    return PEAK_FLOPS.get(device_kind)

"""Batches that are read ahead: those of training's order, from any step on."""

import numpy as np

from vit_jax.data.resident import BatchIndices
from vit_jax.data.stream import Stream

IMAGES = np.arange(37 * 4, dtype=np.uint8).reshape(37, 2, 2, 1)
LABELS = np.arange(37, dtype=np.int32)


def stream(rows=range(8)):
    return Stream(IMAGES, LABELS, BatchIndices(3, 37, 8, repeats=2), np.array(rows), ahead=5)


def test_it_reads_what_a_resident_set_would_be_trained_on():
    read = stream()
    order = BatchIndices(3, 37, 8, repeats=2)(0, 40)
    found = read(0, 1) + read(1, 25) + read(26, 14)
    np.testing.assert_array_equal([labels for _, labels in found], order)
    np.testing.assert_array_equal([images for images, _ in found], IMAGES[order])


def test_it_goes_on_from_any_step():
    read = stream()
    later = read(30, 3)
    np.testing.assert_array_equal([labels for _, labels in later], BatchIndices(3, 37, 8, repeats=2)(30, 3))
    again = read(30, 3)  # as where the speed is measured
    np.testing.assert_array_equal([labels for _, labels in again], [labels for _, labels in later])


def test_a_process_reads_its_own_rows_wherever_they_are():
    order = BatchIndices(3, 37, 8, repeats=2)(7, 4)
    for rows in ([0, 1, 6], [2, 3, 4, 5, 7]):
        np.testing.assert_array_equal([labels for _, labels in stream(rows)(7, 4)], order[:, rows])

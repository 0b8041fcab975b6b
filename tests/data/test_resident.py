"""The order of training: every picture equally often, the same from any step on; padding for evaluation."""

import numpy as np
import pytest

from vit_jax.data.resident import BatchIndices, epoch_order, padded


@pytest.mark.parametrize("size, batch_size", [(100, 10), (101, 16), (7, 3), (5, 12), (1, 4)])
def test_epochs_follow_each_other_without_a_gap(size, batch_size):
    steps = -(-5 * size // batch_size)
    stream = BatchIndices(3, size, batch_size)(0, steps).reshape(-1)
    for epoch in range(5):
        window = stream[epoch * size : (epoch + 1) * size]
        np.testing.assert_array_equal(window, epoch_order(3, epoch, size))
        assert sorted(window) == list(range(size))


def test_any_cut_of_the_steps_reads_the_same():
    whole = BatchIndices(0, 37, 8)(0, 30)
    pieces = BatchIndices(0, 37, 8)
    np.testing.assert_array_equal(np.concatenate([pieces(0, 1), pieces(1, 12), pieces(13, 17)]), whole)
    np.testing.assert_array_equal(BatchIndices(0, 37, 8)(13, 17), whole[13:])  # resumed at 13
    for step in range(30):  # some end an epoch, or begin one with their last picture
        np.testing.assert_array_equal(BatchIndices(0, 37, 8)(step, 1), whole[step : step + 1])
    assert whole.dtype == np.int32


@pytest.mark.parametrize("repeats", [1, 2, 4])
def test_repeats_read_the_same_stream_in_smaller_bites(repeats):
    batches = BatchIndices(0, 37, 8, repeats)(3, 20)
    assert batches.shape == (20, 8)
    stretches = batches.reshape(20, repeats, 8 // repeats)
    np.testing.assert_array_equal(stretches[:, 0], BatchIndices(0, 37, 8 // repeats)(3, 20))
    np.testing.assert_array_equal(np.sort(stretches, axis=2), np.sort(stretches[:, :1].repeat(repeats, axis=1), axis=2))
    np.testing.assert_array_equal(BatchIndices(0, 37, 8, repeats)(13, 10), batches[10:])  # resumed


def test_repeated_pictures_have_other_neighbours_each_time():
    batches = BatchIndices(0, 10_000, 64, repeats=4)(0, 50)
    before = np.roll(batches, 1, axis=1)
    partners = [len(set(before[i][batches[i] == picture])) for i in range(50) for picture in set(batches[i])]
    assert len(partners) == 50 * 16 and np.mean(partners) > 3.5


def test_seeds_and_epochs_have_their_own_orders():
    orders = [tuple(epoch_order(seed, epoch, 50)) for seed in (0, 1) for epoch in (0, 1, 2)]
    assert len(set(orders)) == 6


@pytest.mark.parametrize("size", [1, 7, 8, 9])
def test_padding_fills_the_last_batch_and_keeps_the_rest(size):
    images, labels = np.arange(size * 4, dtype=np.uint8).reshape(size, 2, 2, 1), np.arange(size, dtype=np.int32)
    more_images, more_labels = padded(images, labels, 4)
    assert len(more_images) == len(more_labels) == -(-size // 4) * 4
    np.testing.assert_array_equal(more_images[:size], images)
    np.testing.assert_array_equal(more_labels[:size], labels)

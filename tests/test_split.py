"""Inputs in two parts: fits and training hold the same ones back."""

from __future__ import annotations

import numpy as np

from graphfold.calibration.split import fitted_part, held_samples


def feeds(*lengths):
    starts = np.cumsum([0, *lengths])
    arrays = [np.arange(start, start + n) for start, n in zip(starts[:-1], lengths, strict=True)]
    return [{"x": array, "size": np.float32(4)} for array in arrays]


def numbers(parts):
    return [int(number) for part in parts for number in part["x"]]


def test_every_fifth_batch_is_held_back():
    given = feeds(3, 3, 3, 3, 3, 2)
    assert np.flatnonzero(held_samples([3, 3, 3, 3, 3, 2])).tolist() == [12, 13, 14]
    assert numbers(fitted_part(given)) == [*range(12), 15, 16]
    assert all(part["size"] == 4 for part in fitted_part(given))


def test_of_many_batches_repair_has_every_tenth_to_itself():
    given = feeds(*[2] * 11)
    assert np.flatnonzero(held_samples([2] * 11)).tolist() == [18, 19]
    assert numbers(fitted_part(given)) == [*range(18), 20, 21]


def test_of_few_batches_every_fifth_sample_is():
    given = feeds(7, 5)
    assert np.flatnonzero(held_samples([7, 5])).tolist() == [4, 9]
    assert numbers(fitted_part(given)) == [0, 1, 2, 3, 5, 6, 7, 8, 10, 11]
    assert numbers(given) == list(range(12))
    assert numbers(fitted_part(feeds(1, 1, 1))) == [0, 1, 2]

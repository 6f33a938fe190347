"""Least squares from moments against least squares from all rows; elimination against trying."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from graphfold.calibration.narrow import narrow, weights_for
from graphfold.calibration.regression import (
    Moments,
    fit_groups,
    fit_linear,
    fit_low_rank,
    ridge_solve,
)


def moments_of(x, y=None, batches=3):
    found = Moments(x.shape[1], 0 if y is None else y.shape[1])
    for part in np.array_split(np.arange(len(x)), batches):
        found.add(x[part], None if y is None else y[part])
    return found


def rows(seed, count=400, features=6, targets=3):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(count, features)) @ rng.normal(size=(features, features)) + 2
    y = x @ rng.normal(size=(features, targets)) + rng.normal(size=(count, targets)) - 1
    return x, y


def test_streamed_moments_are_those_of_all_rows_at_once():
    x, y = rows(0)
    streamed, whole = moments_of(x, y, batches=7), moments_of(x, y, batches=1)
    np.testing.assert_allclose(streamed.gram, whole.gram)
    np.testing.assert_allclose(streamed.gram[:-1, :-1], x.T @ x)
    np.testing.assert_allclose(streamed.gram[-1], [*x.sum(axis=0), len(x)])
    np.testing.assert_allclose(streamed.cross[:-1], x.T @ y)
    assert streamed.count == len(x)


@given(seed=st.integers(0, 1000), features=st.integers(1, 8), targets=st.integers(1, 4))
@settings(max_examples=30, deadline=None)
def test_a_fit_without_ridge_is_least_squares(seed, features, targets):
    x, y = rows(seed, features=features, targets=targets)
    wide = np.column_stack([x, np.ones(len(x))])
    # What nearly repeats itself, or the offset, determines no weights.
    assume(np.linalg.cond(wide / np.linalg.norm(wide, axis=0)) < 100)
    fit = fit_linear(moments_of(x, y), 0.0)
    expected, *_ = np.linalg.lstsq(wide, y, rcond=None)
    np.testing.assert_allclose(x @ fit.weight.T + fit.bias, wide @ expected, atol=1e-5)
    residual = y - x @ fit.weight.T - fit.bias
    variance = ((y - y.mean(axis=0)) ** 2).sum()
    assert fit.error == pytest.approx((residual**2).sum() / variance, abs=1e-6)


def test_a_ridge_pulls_towards_its_start_and_scaling_a_feature_changes_nothing():
    x, y = rows(1)
    start = np.random.default_rng(2).normal(size=(3, 6))
    far = fit_linear(moments_of(x, y), 1e9, start)
    np.testing.assert_allclose(far.weight, start, atol=1e-5)
    plain = fit_linear(moments_of(x, y), 0.1)
    scale = np.array([1, 10, 100, 1e3, 1e-3, 1])
    scaled = fit_linear(moments_of(x * scale, y), 0.1)
    np.testing.assert_allclose(scaled.weight * scale, plain.weight, rtol=1e-6)


def test_dead_and_repeated_features_do_no_harm():
    x, y = rows(3)
    x = np.column_stack([x, np.zeros(len(x)), x[:, 0]])
    fit = fit_linear(moments_of(x, y), 0.0)
    assert np.isfinite(fit.weight).all()
    residual = y - x @ fit.weight.T - fit.bias
    best = fit_linear(moments_of(x[:, :6], y), 0.0)
    assert (residual**2).sum() == pytest.approx(
        ((y - x[:, :6] @ best.weight.T - best.bias) ** 2).sum(), rel=1e-4
    )


def test_a_matrix_that_is_not_positive_falls_back():
    gram = np.diag([1.0, -1e-3, 5.0])
    assert np.isfinite(ridge_solve(gram, np.ones((3, 1)), 0.0)).all()


def test_groups_are_fits_of_their_own():
    rng = np.random.default_rng(4)
    x = rng.normal(size=(300, 6)) + 1
    y = np.column_stack([x[:, :2] @ [1, 2], x[:, 2:4] @ [3, -1], x[:, 4:] @ [0.5, 0]]) + 4
    y += 0.1 * rng.normal(size=y.shape)
    fit = fit_groups(moments_of(x, y), 3, 0.0)
    for group in range(3):
        part = slice(2 * group, 2 * group + 2)
        alone = fit_linear(moments_of(x[:, part], y[:, group : group + 1]), 0.0)
        np.testing.assert_allclose(fit.weight[group], alone.weight[0], atol=1e-6)
        np.testing.assert_allclose(fit.bias[group], alone.bias[0], atol=1e-6)


def test_low_rank_is_the_best_of_its_rank():
    x, y = rows(5, features=6, targets=5)
    full = fit_linear(moments_of(x, y), 0.0)
    errors = []
    for rank in range(1, 6):
        second, first = fit_low_rank(moments_of(x, y), rank, full)
        whole = second @ first.weight
        assert np.linalg.matrix_rank(whole, tol=1e-8) == min(rank, 5)
        residual = ((y - x @ whole.T - first.bias) ** 2).sum()
        variance = ((y - y.mean(axis=0)) ** 2).sum()
        assert first.error == pytest.approx(residual / variance, abs=1e-8)
        # Eckart and Young on what the full fit predicts.
        predicted = x @ full.weight.T
        predicted -= predicted.mean(axis=0)
        values = np.linalg.svd(predicted, compute_uv=False)
        best = full.error * variance + (values[rank:] ** 2).sum()
        assert residual == pytest.approx(best, rel=1e-6)
        errors.append(first.error)
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] == pytest.approx(full.error, abs=1e-8)


@pytest.mark.parametrize("columns", [1, 2])
def test_elimination_is_what_trying_every_channel_finds(columns):
    rng = np.random.default_rng(6)
    channels, outputs = 7, 4
    features = channels * columns
    z = rng.normal(size=(3000, features)) @ rng.normal(size=(features, features)) + 1
    weight, bias = rng.normal(size=(outputs, features)), rng.normal(size=outputs)
    gram = moments_of(z).gram
    y = z @ weight.T + bias
    found = narrow(gram, weight, columns)
    left = list(range(channels))
    for step in range(channels - 1):
        errors = {}
        for channel in left:
            kept = np.array([each for each in left if each != channel])
            new, new_bias = weights_for(gram, weight, bias, kept, columns, ridge=0.0)
            index = (kept[:, None] * columns + np.arange(columns)).ravel()
            errors[channel] = ((y - z[:, index] @ new.T - new_bias) ** 2).sum()
        best = min(errors, key=errors.get)
        # Costs that are alike to a tenth may change places: the order is damped a little.
        assert errors[found.order[step]] <= 1.1 * errors[best]
        left.remove(int(found.order[step]))
        if step > 2:
            lost = found.costs[: step + 1].sum()
            assert lost == pytest.approx(errors[found.order[step]], rel=0.15)
    assert sorted(found.order) == list(range(channels))


def test_a_copy_of_a_channel_goes_first_and_costs_nothing():
    rng = np.random.default_rng(7)
    z = rng.normal(size=(500, 6)) + 0.5
    z[:, 4] = 2 * z[:, 1]
    weight, bias = rng.normal(size=(3, 6)), rng.normal(size=3)
    gram = moments_of(z).gram
    found = narrow(gram, weight, 1)
    assert found.order[0] in (1, 4)
    assert found.error(5) < 1e-3 < found.error(4)
    kept = found.kept(5)
    new, new_bias = weights_for(gram, weight, bias, kept, 1, ridge=0.0)
    np.testing.assert_allclose(z[:, kept] @ new.T + new_bias, z @ weight.T + bias, atol=1e-6)


def test_a_dead_channel_goes_before_all_others():
    rng = np.random.default_rng(8)
    z = rng.normal(size=(500, 5))
    z[:, 2] = 0
    weight = rng.normal(size=(3, 5))
    found = narrow(moments_of(z).gram, weight, 1)
    assert found.order[0] == 2
    assert np.isfinite(found.costs).all()


def test_all_weights_and_no_ridge_are_the_present_ones():
    x, _ = rows(9)
    rng = np.random.default_rng(10)
    weight, bias = rng.normal(size=(3, 6)), rng.normal(size=3)
    for ridge, width in itertools.product((0.0, 0.1), (6,)):
        new, new_bias = weights_for(
            moments_of(x).gram, weight, bias, np.arange(width), 1, ridge=ridge
        )
        np.testing.assert_allclose(new, weight, atol=1e-6)
        np.testing.assert_allclose(new_bias, bias, atol=1e-6)

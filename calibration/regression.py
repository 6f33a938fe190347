r"""Least squares from moments: everything that is fitted comes from one set of normal equations.

Rows of features x (a constant one appended) and of targets y are never kept; only their second
moments are, summed in float64 batch by batch:

    G = sum x x',   C = sum x y',   S = sum y y'

From them every fit follows in closed form: ridge regression towards given weights W0

    min_W  tr(S - 2 W C + W G W') + r tr((W - W0) D (W - W0)'),    D = diag(G) but for the bias

so W = (C' + r W0 D)(G + r D)^-1, for all features or any part of them (smaller kernels are some of
the taps of larger ones; a depthwise filter takes its own channel's taps); the best map of rank r
(reduced-rank regression: project the targets on the leading eigenvectors of what is predicted).
The ridge is a share of each feature's own power, so scaling a channel changes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.linalg
from numpy.typing import NDArray

Matrix = NDArray[np.float64]

# Features that repeat one another leave the equations singular without any ridge at all.
_SMALLEST_RIDGE = 1e-10


class Moments:
    """Second moments of features and targets, a constant feature last.

    Args:
        features: their number, without the constant.
        targets: their number; 0 where only the features' own moments are wanted.

    Attributes:
        cross: [features + 1, targets].
        power: [targets], sums of squares of the targets.
        count: rows summed.
    """

    def __init__(self, features: int, targets: int = 0) -> None:
        # The upper triangle is summed in place, in the order of columns that BLAS wants.
        self._gram: Matrix = np.zeros((features + 1, features + 1), order="F")
        self._is_whole = True
        self.cross: Matrix = np.zeros((features + 1, targets))
        self.power: Matrix = np.zeros(targets)
        self.count = 0

    def add(self, x: NDArray[np.floating], y: NDArray[np.floating] | None = None) -> None:
        """Add rows: x [rows, features], y [rows, targets]."""
        rows = np.empty((len(x), len(self._gram)))
        rows[:, :-1] = x
        rows[:, -1] = 1.0
        # Half the work of a product: the Gram matrix is symmetric.
        self._gram = scipy.linalg.blas.dsyrk(
            1.0, rows.T, beta=1.0, c=self._gram, overwrite_c=True, trans=0, lower=0
        )
        self._is_whole = False
        if y is not None:
            targets = np.asarray(y, np.float64)
            self.cross += rows.T @ targets
            self.power += np.einsum("rt,rt->t", targets, targets)
        self.count += len(x)

    @property
    def gram(self) -> Matrix:
        """Of the features, the constant last."""
        if not self._is_whole:
            upper = np.triu(self._gram)
            self._gram = np.asfortranarray(upper + np.triu(upper, 1).T)
            self._is_whole = True
        return self._gram

    def part(self, features: NDArray[np.intp]) -> Moments:
        """The moments of some of the features, ascending, the constant kept."""
        if len(features) == len(self._gram) - 1:
            return self
        chosen = np.append(features, len(self._gram) - 1)
        found = Moments(0, 0)
        found._gram = self.gram[np.ix_(chosen, chosen)]
        found.cross, found.power, found.count = self.cross[chosen], self.power, self.count
        return found


@dataclass(frozen=True)
class Fit:
    """An affine map, and what it leaves unexplained.

    Attributes:
        weight: [targets, features].
        bias: [targets].
        error: sum of squared residuals over the sum of squares of the targets around their mean,
            on the rows it was fitted on.
    """

    weight: Matrix
    bias: Matrix
    error: float


def ridge_solve(gram: Matrix, right: Matrix, ridge: float) -> Matrix:
    """(G + r D)^-1 right, by Cholesky; a matrix that is singular to rounding falls back.

    Args:
        gram: [n, n], the constant feature last; it has no ridge.
        right: [n, m].
        ridge: share of every feature's own power.
    """
    powers = np.diag(gram)[:-1]
    damping = (ridge + _SMALLEST_RIDGE) * np.abs(powers)
    # A feature that is always zero (a dead channel) has no power to take a share of.
    damping[powers == 0] = max(np.abs(powers).max(initial=0.0), 1.0)
    damped = gram.copy()
    np.fill_diagonal(damped[:-1, :-1], powers + damping)
    try:
        factor = scipy.linalg.cho_factor(damped, lower=True, overwrite_a=True, check_finite=False)
        found: Matrix = scipy.linalg.cho_solve(factor, right, check_finite=False)
    except np.linalg.LinAlgError:
        found = scipy.linalg.pinvh(gram + np.diag(np.append(damping, 0.0))) @ right
    return found


def fit_linear(moments: Moments, ridge: float, start: Matrix | None = None) -> Fit:
    """Ridge regression of all targets on all features.

    Args:
        moments: of features and targets.
        ridge: share of every feature's own power.
        start: weights [targets, features] that the ridge pulls towards; zero by default.
    """
    right = moments.cross
    if start is not None:
        right = right.copy()
        right[:-1] += ridge * np.diag(moments.gram)[:-1, None] * start.T
    return _as_fit(ridge_solve(moments.gram, right, ridge), moments)


def _as_fit(solution: Matrix, moments: Moments) -> Fit:
    residual = (
        moments.power
        - 2 * np.einsum("ft,ft->t", solution, moments.cross)
        + np.einsum("ft,ft->t", solution, moments.gram @ solution)
    )
    mean = moments.cross[-1] / max(1, moments.count)
    variance = float((moments.power - moments.count * mean**2).sum())
    error = float(np.maximum(residual, 0.0).sum()) / variance if variance > 0 else 0.0
    return Fit(solution[:-1].T.copy(), solution[-1].copy(), error)


def fit_groups(moments: Moments, groups: int, ridge: float) -> Fit:
    """A fit where every group of targets sees the features of its own group alone.

    Features and targets are ordered by group; with one target per group this is a depthwise
    convolution. The weight is [targets, features per group].
    """
    features = (len(moments.gram) - 1) // groups
    targets = moments.cross.shape[1] // groups
    last = len(moments.gram) - 1
    index = np.arange(groups * features).reshape(groups, features)
    index = np.concatenate([index, np.full((groups, 1), last)], axis=1)
    grams = moments.gram[index[:, :, None], index[:, None, :]]
    columns = np.arange(groups * targets).reshape(groups, targets)
    crosses = moments.cross[index[:, :, None], columns[:, None, :]]
    powers = np.einsum("gff->gf", grams).copy()
    powers[:, -1] = 0.0
    damping = ridge * powers + 1e-12 * powers.max(axis=1, keepdims=True) + 1e-300
    solutions = np.linalg.solve(
        grams + np.einsum("gf,fh->gfh", damping, np.eye(features + 1)), crosses
    )
    residual = (
        moments.power.reshape(groups, targets)
        - 2 * np.einsum("gft,gft->gt", solutions, crosses)
        + np.einsum("gft,gfh,ght->gt", solutions, grams, solutions)
    )
    mean = moments.cross[-1] / max(1, moments.count)
    variance = float((moments.power - moments.count * mean**2).sum())
    error = float(np.maximum(residual, 0.0).sum()) / variance if variance > 0 else 0.0
    weight = solutions[:, :-1].transpose(0, 2, 1).reshape(groups * targets, features)
    return Fit(weight.copy(), solutions[:, -1].reshape(-1).copy(), error)


def fit_low_rank(moments: Moments, rank: int, linear: Fit) -> tuple[Matrix, Fit]:
    """Reduced-rank regression: the best map through `rank` numbers.

    Args:
        moments: of features and targets.
        rank: of the map.
        linear: the fit of full rank (`fit_linear`).

    Returns:
        the map from those numbers to the targets [targets, rank], and the fit of the first map:
        weight [rank, features], a zero bias replaced by one of the targets' size in `Fit.bias`.
    """
    full = np.vstack([linear.weight.T, linear.bias])
    mean = moments.cross[-1] / max(1, moments.count)
    # Of what is predicted, around the mean: only that has to go through the narrow place.
    predicted = full.T @ moments.gram @ full - moments.count * np.outer(mean, mean)
    size = len(predicted)
    chosen = [max(0, size - rank), size - 1]
    _, vectors = scipy.linalg.eigh((predicted + predicted.T) / 2, subset_by_index=chosen)
    first = full[:-1] @ vectors
    bias = full[-1] @ (vectors @ vectors.T) + mean - vectors @ (vectors.T @ mean)
    whole = np.vstack([first @ vectors.T, bias])
    fit = _as_fit(whole, moments)
    return vectors, Fit(first.T.copy(), bias, fit.error)

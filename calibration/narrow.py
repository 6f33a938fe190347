r"""Fewer inner channels: which go, and what the layer behind makes of those that stay.

Let z be the channels that a linear layer y = W z + b reads (a constant one appended, taps of one
channel together) and G = E[z z'] their moments. Leaving channel j out, with the best update of
all other weights, costs

    tr(W_j [(G^-1)_jj]^-1 W_j'),     W <- W - W_j [(G^-1)_jj]^-1 (G^-1)_j

(optimal brain surgeon, with a whole channel at a time: W_j are its columns, one for each tap), and
G^-1 of what is left follows by a downdate of rank one for each tap. Repeating that orders all
channels in one run, so every width comes from it. Weights for a width are then solved for anew
from G, which is exact whatever rounding the downdates have gathered.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy.linalg
from numpy.typing import NDArray

from graphfold.calibration.regression import Matrix, ridge_solve

# G is inverted once; this share of every channel's power keeps that stable.
_DAMPING = 1e-4
# Downdates that are gathered before they are carried out.
_MOST_FACTORS = 64


@dataclass(frozen=True)
class Narrowing:
    """An order in which channels go.

    Attributes:
        order: all channels, the first to go first.
        costs: squared error that each removal adds, summed over positions.
        power: sum of squares of the layer's result around its mean: what costs compare with.
    """

    order: NDArray[np.intp]
    costs: Matrix
    power: float

    def kept(self, width: int) -> NDArray[np.intp]:
        """The channels that stay at a width, ascending."""
        return np.sort(self.order[len(self.order) - width :])

    def error(self, width: int) -> float:
        """Share of the result's variance that is lost at a width."""
        lost = float(self.costs[: len(self.costs) - width].sum())
        return lost / self.power if self.power > 0 else 0.0


def narrow(
    gram: Matrix, weight: Matrix, columns: int, sensitivity: Matrix | None = None
) -> Narrowing:
    """Order channels by backward elimination.

    Args:
        gram: moments of the channels with a constant last, [channels * columns + 1] squared.
        weight: the layer's, [outputs, channels * columns].
        columns: per channel: taps of the kernel, positions behind a flattening.
        sensitivity: [outputs, outputs], positive: how much errors of the result matter; the
            identity by default.
    """
    features = len(gram) - 1
    channels = features // columns
    damped = gram.copy()
    powers = np.diag(gram)[:-1]
    floor = max(powers.max(initial=0.0) * 1e-10, 1e-300)
    np.fill_diagonal(damped[:-1, :-1], powers * (1 + _DAMPING) + floor)
    inverse = scipy.linalg.inv(damped, overwrite_a=True, check_finite=False)
    inverse = (inverse + inverse.T) / 2
    whitened = weight if sensitivity is None else _root(sensitivity) @ weight
    current = np.hstack([whitened, np.zeros((len(weight), 1))])
    mean = whitened @ gram[:-1, -1]
    count = max(float(gram[-1, -1]), 1.0)
    power = float(np.einsum("of,fg,og->", whitened, gram[:-1, :-1], whitened)) - float(
        mean @ mean / count
    )
    order, costs = _eliminate(inverse, current, channels, columns)
    return Narrowing(order, costs, power)


def _root(matrix: Matrix) -> Matrix:
    """R with R'R = matrix."""
    values, vectors = scipy.linalg.eigh(matrix)
    root: Matrix = (vectors * np.sqrt(np.maximum(values, 0.0))).T
    return root


def _eliminate(
    inverse: Matrix, weight: Matrix, channels: int, columns: int
) -> tuple[NDArray[np.intp], Matrix]:
    """The elimination itself, one channel at a time.

    Downdates are gathered as G^-1 = A - F F' and carried out together, so that most of the work
    is products of matrices; what a step needs before is one block of rows and the diagonal.
    """
    order = np.empty(channels, np.intp)
    costs = np.empty(channels)
    state = _Elimination(inverse, weight, channels, columns)
    for step in range(channels):
        order[step], costs[step] = state.remove_cheapest()
    return order, costs


class _Elimination:
    """Channels that are left, with their part of G^-1 and of the layer's weights.

    Args:
        inverse: G^-1, the constant last.
        weight: [outputs, features + 1].
        channels, columns: features are columns of channels, then the constant.
    """

    def __init__(self, inverse: Matrix, weight: Matrix, channels: int, columns: int) -> None:
        self.columns = columns
        self.names = np.arange(channels)
        self.inverse = inverse
        self.weight = weight
        self.factors = np.empty((len(inverse), 0))
        self.gone = np.zeros(channels, bool)
        self.blocks = self._diagonal()

    def _diagonal(self) -> Matrix:
        index = np.arange(len(self.names) * self.columns).reshape(-1, self.columns)
        found: Matrix = self.inverse[index[:, :, None], index[:, None, :]]
        return found

    def remove_cheapest(self) -> tuple[int, float]:
        """Let the channel go that costs least; which, and what it costs."""
        scores = self._scores()
        scores[self.gone] = np.inf
        place = int(np.argmin(scores))
        taken = slice(place * self.columns, (place + 1) * self.columns)
        rows = self.inverse[taken] - self.factors[taken] @ self.factors.T
        block = rows[:, taken]
        lower = scipy.linalg.cholesky((block + block.T) / 2, lower=True, check_finite=False)
        rows = scipy.linalg.solve_triangular(lower, rows, lower=True, check_finite=False)
        share = scipy.linalg.solve_triangular(
            lower, self.weight[:, taken].T, lower=True, check_finite=False
        )
        self.weight -= share.T @ rows
        inner = rows[:, :-1].reshape(self.columns, -1, self.columns)
        self.blocks -= np.einsum("rca,rcb->cab", inner, inner)
        self.factors = np.hstack([self.factors, rows.T])
        self.gone[place] = True
        name = int(self.names[place])
        if self.gone.sum() * 8 >= len(self.gone) or self.factors.shape[1] >= _MOST_FACTORS:
            self._carry_out()
        return name, max(float(scores[place]), 0.0)

    def _carry_out(self) -> None:
        left = np.flatnonzero(~self.gone)
        features = (left[:, None] * self.columns + np.arange(self.columns)).ravel()
        chosen = np.append(features, len(self.inverse) - 1)
        factors = self.factors[chosen]
        self.inverse = self.inverse[np.ix_(chosen, chosen)] - factors @ factors.T
        self.weight = np.ascontiguousarray(self.weight[:, chosen])
        self.factors = np.empty((len(chosen), 0))
        self.names, self.gone = self.names[left], np.zeros(len(left), bool)
        self.blocks = self._diagonal()

    def _scores(self) -> Matrix:
        weight = self.weight[:, :-1]
        if self.columns == 1:
            powers = np.einsum("of,of->f", weight, weight)
            with np.errstate(divide="ignore", invalid="ignore"):
                scores: Matrix = powers / self.blocks[:, 0, 0]
            return scores
        parts = weight.reshape(len(weight), -1, self.columns)
        squares = np.einsum("oca,ocb->cab", parts, parts, optimize=True)
        blocks = self.blocks.copy()
        blocks[self.gone] = np.eye(self.columns)
        found: Matrix = np.trace(np.linalg.solve(blocks, squares), axis1=1, axis2=2)
        return found


def weights_for(
    gram: Matrix,
    weight: Matrix,
    bias: Matrix,
    kept: NDArray[np.intp],
    columns: int,
    *,
    ridge: float,
) -> tuple[Matrix, Matrix]:
    """The layer's best weights on the channels that stay.

    Args:
        gram: moments of all channels, a constant last.
        weight: the layer's own, [outputs, channels * columns].
        bias: the layer's own, [outputs].
        kept: channels that stay, ascending.
        columns: per channel.
        ridge: share of every channel's power that pulls its weights towards their present ones.

    Returns:
        weight [outputs, kept * columns] and bias [outputs].
    """
    features = (kept[:, None] * columns + np.arange(columns)).ravel()
    chosen = np.append(features, len(gram) - 1)
    part = gram[np.ix_(chosen, chosen)]
    cross = gram[chosen] @ np.vstack([weight.T, bias])
    cross[:-1] += ridge * np.diag(part)[:-1, None] * weight[:, features].T
    solution = ridge_solve(part, cross, ridge)
    return solution[:-1].T.copy(), solution[-1].copy()


def channel_columns(kernel: Sequence[int], columns: int) -> int:
    """Features per channel of a layer: its taps times the positions that a Flatten spreads."""
    return int(np.prod(kernel, dtype=int)) * columns

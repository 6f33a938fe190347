"""A convolution as expansion, depthwise and projection: what an expanded one starts with.

Expansion E, depthwise D and projection P with nothing between them are the convolution
W[o, i, t] = sum over hidden channels m of P[o, m] D[m, t] E[m, i], for taps t. `exact_factors`
solves this for a given W. With an orthogonal basis B of the taps,
A_j = sum over t of B[j, t] W[:, :, t] gives W[:, :, t] = sum over j of B[j, t] A_j, and each A_j
is (A_j Q_j^T) Q_j for any orthogonal Q_j: so the hidden channels of group j have the filter B[j],
E = Q_j and P = A_j Q_j^T, or the other way round where outputs are fewer. Everything but A_j itself
is orthogonal, so that no error grows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Factors:
    """Weights in float64.

    Attributes:
        expansion: [hidden, in].
        depthwise: [hidden, taps].
        projection: [out, hidden].
    """

    expansion: Array
    depthwise: Array
    projection: Array

    def merged(self) -> Array:
        """The convolution that they are together: [out, in, taps]."""
        found: Array = np.einsum(
            "om,mt,mi->oit", self.projection, self.depthwise, self.expansion, optimize=True
        )
        return found


def hidden_for_exactness(weight_shape: tuple[int, ...]) -> int:
    """Hidden channels that suffice for every convolution of a shape [out, in, *kernel]."""
    return min(weight_shape[:2]) * math.prod(weight_shape[2:])


def exact_factors(weight: NDArray[Any], hidden: int, rng: np.random.Generator) -> Factors:
    """Factors whose product is the weight, up to rounding in float64.

    Args:
        weight: [out, in, *kernel].
        hidden: channels between the factors, at least `hidden_for_exactness`. Those beyond it
            are projected by zeros: they take part as soon as these have moved.
        rng: what the orthogonal matrices are drawn from.
    """
    outputs, inputs = weight.shape[:2]
    wide = weight.astype(np.float64).reshape(outputs, inputs, -1)
    taps, width = wide.shape[2], min(outputs, inputs)
    assert hidden >= taps * width
    basis = _orthogonal(taps, rng)
    parts = np.einsum("jt,oit->joi", basis, wide)
    # Factors of equal size learn equally fast: the root of what W does to a unit vector.
    norm = float(np.linalg.norm(parts))
    root = math.sqrt(norm / math.sqrt(taps * width)) if norm > 0 else 1.0
    expansion = rng.standard_normal((hidden, inputs)) * root / math.sqrt(inputs)
    depthwise = rng.standard_normal((hidden, taps)) / math.sqrt(taps)
    projection = np.zeros((outputs, hidden))
    for number, part in enumerate(parts):
        place = slice(number * width, (number + 1) * width)
        turn = _orthogonal(width, rng)
        depthwise[place] = basis[number]
        if inputs == width:
            expansion[place], projection[:, place] = turn * root, part @ turn.T / root
        else:
            expansion[place], projection[:, place] = turn.T @ part / root, turn * root
    return Factors(expansion, depthwise, projection)


def random_factors(weight_shape: tuple[int, ...], hidden: int, rng: np.random.Generator) -> Factors:
    """He et al.'s normal numbers for layers that rectifiers follow.

    Args:
        weight_shape: [out, in, *kernel].
        hidden: channels between the factors.
        rng: what they are drawn from.
    """
    outputs, inputs = weight_shape[:2]
    taps = math.prod(weight_shape[2:])
    return Factors(
        rng.standard_normal((hidden, inputs)) * math.sqrt(2 / inputs),
        rng.standard_normal((hidden, taps)) * math.sqrt(2 / taps),
        rng.standard_normal((outputs, hidden)) * math.sqrt(2 / hidden),
    )


def _orthogonal(size: int, rng: np.random.Generator) -> Array:
    found, triangle = np.linalg.qr(rng.standard_normal((size, size)))
    turned: Array = found * np.sign(np.diag(triangle))
    return turned

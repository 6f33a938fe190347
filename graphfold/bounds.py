"""Rounding error of a single fold: a bound that always holds, and an estimate of what to expect.

A fold computes y = W * x + B * 1 + b with weights cast once to the model's type. With unit roundoff
u and n terms per output, in any order of summation,

    |y' - y| <= gamma_m (|W| * |x| + |B| * 1 + |b|),   gamma_m = m u / (1 - m u),   m = n + 2,

the two extra roundings being the cast of the weights and the addition of a border map (Higham,
Accuracy and Stability of Numerical Algorithms, 2002, sections 3.1 and 3.4). With sqrt(m) u in place
of gamma_m this is the probabilistic estimate (Higham and Mary, 2019). Both are per fold, on the
fold's own input: nothing is claimed for a whole network, where worst cases grow exponentially with
depth.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from graphfold.maps import AffineMap

# Unit roundoff by element type; ml_dtypes' bfloat16 is not known to numpy.finfo.
_ROUNDOFF = {"float64": 2.0**-53, "float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
# Below the smallest normal number rounding is absolute.
_TINY = {"float64": 2.0**-1074, "float32": 2.0**-149, "float16": 2.0**-24, "bfloat16": 2.0**-133}


@dataclass(frozen=True)
class Coefficients:
    """What a bound needs to know of a fold, whatever its input.

    Attributes:
        terms: products and additions per output.
        gain: largest row sum of |W|: |W * x| is at most gain * max|x|.
        offset: largest constant part, |B| and |b| together.
    """

    terms: int
    gain: float
    offset: float


@dataclass(frozen=True)
class RoundingError:
    """One fold on its actual input, against the same fold in float64; all absolute.

    Attributes:
        bound: largest value of the bound over all outputs.
        estimate: the same with the probabilistic factor.
        measured: largest error.
        holds: whether every output's error is within its own bound.
    """

    bound: float
    estimate: float
    measured: float
    holds: bool


def coefficients(affine: AffineMap) -> Coefficients:
    """The input-free part of a fold's bound."""
    return Coefficients(terms=affine.terms, gain=affine.gain, offset=affine.offset)


def rounding_error(
    affine: AffineMap, source: NDArray[Any], result: NDArray[Any]
) -> RoundingError | None:
    """A fold's measured error and its bound on what it actually read.

    Args:
        affine: the fold in float64.
        source: [N, I, ...] what the fold read.
        result: [N, O, ...] what it computed, in any shape, in the model's type.

    Returns:
        None where a value is not finite or the type has no roundoff (integers).
    """
    kind = str(result.dtype)
    if kind not in _ROUNDOFF or not (_finite(source) and _finite(result)):
        return None
    x = source.astype(np.float64)
    exact = affine.apply(x)
    magnitude = affine.absolute().apply(np.abs(x))
    steps = affine.terms + 2
    unit = _ROUNDOFF[kind]
    bound = steps * unit / (1 - steps * unit) * magnitude + steps * _TINY[kind]
    error = np.abs(result.astype(np.float64).reshape(exact.shape) - exact)
    return RoundingError(
        bound=float(bound.max()),
        estimate=float(math.sqrt(steps) * unit * magnitude.max()),
        measured=float(error.max()),
        holds=bool(np.all(error <= bound)),
    )


def _finite(array: NDArray[Any]) -> bool:
    return bool(np.all(np.isfinite(array.astype(np.float64))))

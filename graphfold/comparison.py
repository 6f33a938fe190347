"""How far two tensors are apart, and what that means for each element type.

Errors are absolute (`max_abs`) and relative to the tensor's own scale `max|y|` (`max_rel`);
never relative element by element, which says nothing where values are close to zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

DEFAULT_TOLERANCE = 1e-4
ABSOLUTE_FLOOR = 1e-6
# In units of the type's roundoff u: 1.6e-2 for float16, 0.13 for bfloat16. Scaling float32's 1e-4
# (1,678 u) in proportion would allow errors as large as the values themselves.
_HALF_TOLERANCE_ROUNDOFFS = 32
_ROUNDOFF = {"float16": 2.0**-11, "bfloat16": 2.0**-8}


def tolerance_for(dtype: str, tolerance: float | None = None) -> float:
    """Largest accepted error relative to max|y|; a given `tolerance` holds for all types."""
    if tolerance is not None:
        return tolerance
    if dtype in _ROUNDOFF:
        return _HALF_TOLERANCE_ROUNDOFFS * _ROUNDOFF[dtype]
    return DEFAULT_TOLERANCE


@dataclass(frozen=True)
class Difference:
    """What separates two lists of arrays, one array per feed.

    Attributes:
        scale: max|y| of the reference over finite values.
        max_abs: largest absolute difference; infinite where shapes, or the places of NaN and
            infinities, differ.
        mean_abs: mean absolute difference.
        differing: number of values that are not equal.
        total: number of values compared.
    """

    scale: float
    max_abs: float
    mean_abs: float
    differing: int
    total: int

    @property
    def max_rel(self) -> float:
        """`max_abs` over the scale (over one where the reference is all zero)."""
        return self.max_abs / self.scale if self.scale > 0 else self.max_abs


def is_float(array: NDArray[Any]) -> bool:
    """Whether errors of this array are a matter of rounding; integers are counted instead."""
    return array.dtype.kind in "fcV" or array.dtype.name in _ROUNDOFF


def difference(reference: Sequence[NDArray[Any]], candidate: Sequence[NDArray[Any]]) -> Difference:
    """Compare feed by feed; lists of unequal length differ infinitely."""
    scale = max_abs = total_abs = 0.0
    differing = total = 0
    if len(reference) != len(candidate):
        max_abs = float("inf")
    for expected, actual in zip(reference, candidate, strict=False):
        total += expected.size
        if expected.shape != actual.shape:
            max_abs = float("inf")
            differing += max(expected.size, actual.size)
            continue
        if not is_float(expected):
            count = int(np.count_nonzero(expected != actual))
            differing += count
            error = _integer_error(expected, actual)
        else:
            error = absolute_error(expected, actual)
            differing += int(np.count_nonzero(error))
            scale = max(scale, finite_scale(expected))
        max_abs = max(max_abs, float(error.max(initial=0.0)))
        total_abs += float(error.sum())
    return Difference(scale, max_abs, total_abs / max(total, 1), differing, total)


def absolute_error(expected: NDArray[Any], actual: NDArray[Any]) -> NDArray[np.float64]:
    """|expected - actual| in float64; 0 where both are the same NaN or infinity, else infinite."""
    left = np.asarray(expected, dtype=np.float64)
    right = np.asarray(actual, dtype=np.float64)
    with np.errstate(invalid="ignore", over="ignore"):
        error: NDArray[np.float64] = np.abs(left - right)
    odd = ~np.isfinite(left) | ~np.isfinite(right)
    if odd.any():
        same = (left == right) | (np.isnan(left) & np.isnan(right))
        error[odd] = np.where(same[odd], 0.0, np.inf)
    return error


def _integer_error(expected: NDArray[Any], actual: NDArray[Any]) -> NDArray[np.float64]:
    if expected.dtype.kind in "iub" and actual.dtype.kind in "iub":
        error: NDArray[np.float64] = np.abs(expected.astype(float) - actual.astype(float))
        return error
    unequal: NDArray[np.float64] = (expected != actual).astype(np.float64)
    return unequal


def finite_scale(array: NDArray[Any]) -> float:
    """max|y| over finite values, 0 for an empty tensor."""
    values = np.abs(np.asarray(array, dtype=np.float64))
    finite = values[np.isfinite(values)] if not np.isfinite(values).all() else values
    return float(finite.max(initial=0.0))


def border_split(
    expected: NDArray[Any], actual: NDArray[Any], reach: Sequence[tuple[int, int]]
) -> tuple[float | None, float | None]:
    """Largest absolute errors of an [N, C, ...] tensor's interior and of its border.

    Args:
        expected: the reference's tensor.
        actual: the candidate's, of equal shape.
        reach: per spatial axis, the rows at its begin and its end that are border.

    Returns:
        (interior, border); None for a part without elements. Where `reach` does not fit the
        tensor's rank, everything is interior.
    """
    error = absolute_error(expected, actual)
    if error.ndim != len(reach) + 2:
        return _max_or_none(error), None
    inner = tuple(
        slice(min(begin, size), max(size - end, min(begin, size)))
        for (begin, end), size in zip(reach, error.shape[2:], strict=True)
    )
    index = (slice(None), slice(None), *inner)
    interior = _max_or_none(error[index])
    has_border = any(begin or end for begin, end in reach)
    if not has_border or error[index].size == error.size:
        return interior, None
    error[index] = 0.0
    return interior, _max_or_none(error)


def _max_or_none(error: NDArray[np.float64]) -> float | None:
    return float(error.max()) if error.size else None


@dataclass(frozen=True)
class Agreement:
    """Classification-like figures of [N, classes] outputs: top-1 agreement and mean KL."""

    top1: float
    kl: float
    rows: int


def agreement(
    reference: Sequence[NDArray[Any]], candidate: Sequence[NDArray[Any]]
) -> Agreement | None:
    """Top-1 agreement and KL(reference || candidate) in nats, mean over rows.

    Rows that are non-negative and sum to one count as probabilities, others as logits. None
    where the output is not a float [N, classes] tensor with at least two classes.
    """
    pairs = list(zip(reference, candidate, strict=False))
    if not pairs or any(
        not is_float(left) or left.ndim != 2 or left.shape[1] < 2 or left.shape != right.shape
        for left, right in pairs
    ):
        return None
    left = np.concatenate([pair[0] for pair in pairs]).astype(np.float64)
    right = np.concatenate([pair[1] for pair in pairs]).astype(np.float64)
    if not left.size or not (np.isfinite(left).all() and np.isfinite(right).all()):
        return None
    logs = _log_softmax if not _are_probabilities(left) else _safe_log
    log_left, log_right = logs(left), logs(right)
    kl = float((np.exp(log_left) * (log_left - log_right)).sum(axis=1).mean())
    top1 = float((left.argmax(axis=1) == right.argmax(axis=1)).mean())
    return Agreement(top1, max(kl, 0.0), len(left))


def _are_probabilities(rows: NDArray[np.float64]) -> bool:
    return bool((rows >= 0).all() and np.allclose(rows.sum(axis=1), 1.0, atol=1e-3))


def _log_softmax(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    shifted = rows - rows.max(axis=1, keepdims=True)
    result: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return result


def _safe_log(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    result: NDArray[np.float64] = np.log(np.clip(rows, 1e-12, None))
    return result

"""What a change of a network does to its outputs, on given images."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from graphfold.comparison import agreement, is_float
from graphfold.errors import DataError
from graphfold.runtime import Runnable, Session

if TYPE_CHECKING:
    from graphfold.model import Model

Outputs = list[dict[str, NDArray[Any]]]


@dataclass(frozen=True)
class Damage:
    """What separates a network's outputs from the original's.

    Attributes:
        kl: KL divergence to the original's classes in nats, mean over images; None where no
            output is of classes.
        agreement: share of images with the same first class; None likewise.
        error: squared error of all outputs over their variance.
    """

    kl: float | None
    agreement: float | None
    error: float

    @property
    def value(self) -> float:
        """What is to be small: the divergence where there is one, else the error."""
        return self.error if self.kl is None else self.kl

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        return {"kl": self.kl, "agreement": self.agreement, "error": self.error}


def outputs_of(model: Model, feeds: Iterable[Mapping[str, NDArray[Any]]]) -> Outputs:
    """What a network, as onnxruntime optimizes it, makes of feeds.

    Raises:
        RunError: onnxruntime cannot run it.
    """
    with Runnable(model) as runnable:
        session = Session(runnable, optimize=True)
    return [session.run(feed) for feed in feeds]


def damage_between(expected: Outputs, actual: Outputs) -> Damage:
    """How far outputs are from those of the original, feed by feed.

    Raises:
        DataError: no feeds.
    """
    if not expected:
        raise DataError("no images to judge on")
    divergences, agreements, errors = [], [], []
    for name, first in expected[0].items():
        if not is_float(first):
            continue
        left, right = [each[name] for each in expected], [each[name] for each in actual]
        classes = agreement(left, right)
        if classes is not None:
            divergences.append(classes.kl)
            agreements.append(classes.top1)
        errors.append(_relative_error(left, right))
    return Damage(
        kl=float(np.mean(divergences)) if divergences else None,
        agreement=min(agreements, default=None),
        error=float(np.mean(errors)) if errors else 0.0,
    )


def _relative_error(left: Sequence[NDArray[Any]], right: Sequence[NDArray[Any]]) -> float:
    total, square, count, error = 0.0, 0.0, 0, 0.0
    for one, other in zip(left, right, strict=True):
        wide = one.astype(np.float64)
        total += float(wide.sum())
        square += float((wide**2).sum())
        count += wide.size
        error += float(((wide - other) ** 2).sum())
    variance = square - total**2 / max(count, 1)
    return error / variance if variance > 0 else error

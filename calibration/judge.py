"""How much of what a network said is still said: damage, measured on its outputs.

An output of rank two with a class in every column is taken for logits, or for probabilities where
its rows are positive and sum to one: damage is the Kullback-Leibler divergence from the original's
distribution. Any other output is values: damage is the squared error over the variance of the
original's values. Either is zero for no change, and small changes in different places nearly add
up. Of several outputs the mean counts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from graphfold.errors import DataError

Kind = Literal["logits", "probabilities", "values"]
_SMALLEST = 1e-12
_SUM_ERROR = 1e-3


@dataclass(frozen=True)
class Verdict:
    """What is left of a network's answers, over all samples.

    Attributes:
        damage: mean over samples: nats of divergence, or a share of variance.
        agreement: share of samples with the original's class; None where outputs are values.
        worst_agreement: of the class (the original's) that suffers most, among those with at
            least five samples; None where there is none.
        accuracy: share of samples with the labelled class, where there are labels.
        psnr: decibels of the values' error against the original's range; None for classes.
        max_error: largest error of the outputs over the original's largest value.
    """

    damage: float
    agreement: float | None
    worst_agreement: float | None = None
    accuracy: float | None = None
    psnr: float | None = None
    max_error: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        return {name: value for name, value in vars(self).items() if value is not None}


_FEWEST_OF_A_CLASS = 5


class Judge:
    """The original's answers, and what others' are worth against them.

    Args:
        originals: the original's outputs, feed by feed.
        labels: classes of all samples in order, where they are known.

    Raises:
        DataError: there are no samples, or no output is of floating point.
    """

    def __init__(
        self,
        originals: Sequence[Mapping[str, NDArray[Any]]],
        labels: NDArray[Any] | None = None,
    ) -> None:
        if not originals:
            raise DataError("there are no inputs to judge on", hint="give more data")
        self.originals = originals
        names = [name for name, value in originals[0].items() if value.dtype.kind == "f"]
        if not names:
            raise DataError("the model has no output of floating point to judge")
        self.kinds = {name: _kind([each[name] for each in originals]) for name in names}
        self.labels = labels
        self._scales = {
            name: _variance([each[name] for each in originals])
            for name, kind in self.kinds.items()
            if kind == "values"
        }

    @property
    def is_classifier(self) -> bool:
        """Whether any output tells classes apart."""
        return any(kind != "values" for kind in self.kinds.values())

    @property
    def outputs(self) -> list[str]:
        """The outputs that are judged."""
        return list(self.kinds)

    def damages(self, number: int, results: Mapping[str, NDArray[Any]]) -> NDArray[np.float64]:
        """Damage of every sample of a feed."""
        original = self.originals[number]
        found = [self._damage(name, original[name], results[name]) for name in self.kinds]
        return np.asarray(np.mean(found, axis=0), dtype=np.float64)

    def _damage(
        self, name: str, original: NDArray[Any], result: NDArray[Any]
    ) -> NDArray[np.float64]:
        kind = self.kinds[name]
        if kind == "values":
            error = np.asarray(result, np.float64) - original
            samples = len(error) if error.ndim else 1
            squares = (error.reshape(samples, -1) ** 2).mean(axis=1)
            return np.asarray(np.nan_to_num(squares / self._scales[name], nan=np.inf))
        first, second = _log_probabilities(original, kind), _log_probabilities(result, kind)
        found = (np.exp(first) * (first - second)).sum(axis=1)
        return np.asarray(np.nan_to_num(found, nan=np.inf))

    def verdict(self, results: Sequence[Mapping[str, NDArray[Any]]]) -> Verdict:
        """Everything there is to say about another network's answers to all feeds."""
        damage = np.concatenate([self.damages(number, each) for number, each in enumerate(results)])
        largest = max(_largest_error(self.originals, results, name) for name in self.kinds)
        if not self.is_classifier:
            psnr = min(_psnr(self.originals, results, name) for name in self.kinds)
            return Verdict(float(damage.mean()), None, psnr=psnr, max_error=largest)
        name = next(name for name, kind in self.kinds.items() if kind != "values")
        wanted = np.concatenate([each[name].argmax(axis=1) for each in self.originals])
        given = np.concatenate([each[name].argmax(axis=1) for each in results])
        right = wanted == given
        accuracy = None
        if self.labels is not None:
            accuracy = float((given == self.labels[: len(given)]).mean())
        return Verdict(
            float(damage.mean()),
            float(right.mean()),
            _worst(wanted, right),
            accuracy,
            max_error=largest,
        )


def _kind(outputs: Sequence[NDArray[Any]]) -> Kind:
    first = outputs[0]
    if first.ndim != 2 or first.shape[1] < 2:
        return "values"
    sums = np.concatenate([each.sum(axis=1) for each in outputs])
    positive = all(each.min(initial=0.0) >= 0 for each in outputs)
    if positive and np.abs(sums - 1).max(initial=0.0) < _SUM_ERROR:
        return "probabilities"
    return "logits"


def _log_probabilities(values: NDArray[Any], kind: Kind) -> NDArray[np.float64]:
    wide = np.asarray(values, np.float64)
    if kind == "probabilities":
        return np.log(np.maximum(wide, _SMALLEST))
    wide = wide - wide.max(axis=1, keepdims=True)
    return np.asarray(wide - np.log(np.exp(wide).sum(axis=1, keepdims=True)))


def _variance(outputs: Sequence[NDArray[Any]]) -> float:
    """Of all values around the mean of each position, where several samples tell it."""
    total = np.concatenate(
        [np.asarray(each, np.float64).reshape(len(each), -1) for each in outputs]
    )
    spread = float(total.var(axis=0).mean()) if len(total) > 1 else float(total.var())
    return max(spread, _SMALLEST)


def _largest_error(
    originals: Sequence[Mapping[str, NDArray[Any]]],
    results: Sequence[Mapping[str, NDArray[Any]]],
    name: str,
) -> float:
    scale = max(float(np.abs(each[name]).max(initial=0.0)) for each in originals)
    error = max(
        float(np.abs(np.asarray(b[name], np.float64) - a[name]).max(initial=0.0))
        for a, b in zip(originals, results, strict=True)
    )
    return error / scale if scale > 0 else error


def _psnr(
    originals: Sequence[Mapping[str, NDArray[Any]]],
    results: Sequence[Mapping[str, NDArray[Any]]],
    name: str,
) -> float:
    low = min(float(each[name].min()) for each in originals)
    high = max(float(each[name].max()) for each in originals)
    squares = [
        float(((np.asarray(b[name], np.float64) - a[name]) ** 2).mean())
        for a, b in zip(originals, results, strict=True)
    ]
    error = float(np.mean(squares))
    return (
        float("inf")
        if error == 0
        else 10 * float(np.log10(max(high - low, _SMALLEST) ** 2 / error))
    )


def _worst(wanted: NDArray[np.intp], right: NDArray[np.bool_]) -> float | None:
    counts = np.bincount(wanted)
    hits = np.bincount(wanted, weights=right)
    enough = counts >= _FEWEST_OF_A_CLASS
    return float((hits[enough] / counts[enough]).min()) if enough.any() else None

"""How much of what a network said is still said: damage, measured on its outputs.

An output of rank two with a class in every column is taken for logits, or for probabilities where
its rows are positive and sum to one: damage is the Kullback-Leibler divergence from the original's
distribution. Any other output is values: damage is the squared error over the variance of the
original's values. Either is zero for no change, and small changes in different places nearly add
up. Of several outputs the mean counts. Where none is of floating point, damage is the share of the
integers that differ.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from graphfold.errors import DataError
from graphfold.runtime import Runnable, Session

if TYPE_CHECKING:
    from graphfold.model import Model

Kind = Literal["logits", "probabilities", "values", "integers"]
Outputs = dict[str, NDArray[Any]]
_SMALLEST = 1e-12
_SUM_ERROR = 1e-3


@dataclass(frozen=True)
class Verdict:
    """What is left of a network's answers, over all samples.

    Attributes:
        damage: mean over samples: nats of divergence, a share of variance, or of integers.
        agreement: share of samples with the original's class; None where outputs are values.
        worst_agreement: of the class (the original's) that suffers most, among those with at
            least five samples; None where there is none.
        accuracy: share of samples with the labelled class, where there are labels.
        psnr: decibels of the values' error against the original's range; None for classes and
            integers.
        max_error: largest error of the outputs over the original's largest value.
    """

    damage: float
    agreement: float | None
    worst_agreement: float | None = None
    accuracy: float | None = None
    psnr: float | None = None
    max_error: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """As a JSON object, without what is not known or not finite."""
        return {
            name: value
            for name, value in vars(self).items()
            if value is not None and math.isfinite(value)
        }


_FEWEST_OF_A_CLASS = 5


def outputs_of(model: Model, feeds: Iterable[Mapping[str, NDArray[Any]]]) -> list[Outputs]:
    """What a network, as onnxruntime optimizes it, makes of feeds.

    Raises:
        RunError: onnxruntime cannot run it.
    """
    with Runnable(model) as runnable:
        session = Session(runnable, optimize=True)
    return [session.run(feed) for feed in feeds]


class Judge:
    """The original's answers, and what others' are worth against them.

    Args:
        originals: the original's outputs, feed by feed.
        labels: classes of all samples in order, where they are known.

    Raises:
        DataError: there are no samples, or no output holds numbers.
    """

    def __init__(
        self,
        originals: Sequence[Mapping[str, NDArray[Any]]],
        labels: NDArray[Any] | None = None,
    ) -> None:
        if not originals:
            raise DataError("there are no inputs to judge on", hint="give more data")
        self.originals = originals
        types = {name: value.dtype.kind for name, value in originals[0].items()}
        names = [name for name, kind in types.items() if kind == "f"]
        names = names or [name for name, kind in types.items() if kind in "iub"]
        if not names:
            raise DataError("the model has no output of numbers to judge")
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
        return self.classes is not None

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
        if kind == "integers":
            differ = np.asarray(result != original, np.float64)
            samples = len(differ) if differ.ndim else 1
            return np.asarray(differ.reshape(samples, -1).mean(axis=1))
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
        tally = Tally(self)
        for each in results:
            tally.add(each)
        return tally.verdict()

    @cached_property
    def classes(self) -> str | None:
        """The output that tells classes apart."""
        found = (name for name, kind in self.kinds.items() if kind in ("logits", "probabilities"))
        return next(found, None)

    @cached_property
    def ranges(self) -> dict[str, tuple[float, float]]:
        """Smallest and largest value of every output."""
        return {
            name: (
                min((float(each[name].min()) for each in filled), default=np.inf),
                max((float(each[name].max()) for each in filled), default=-np.inf),
            )
            for name in self.kinds
            for filled in [[each for each in self.originals if each[name].size]]
        }


class Tally:
    """Answers of another network, counted feed by feed: no output is kept.

    Args:
        judge: knows the original's.
    """

    def __init__(self, judge: Judge) -> None:
        self._judge = judge
        self._damages: list[NDArray[np.float64]] = []
        self._given: list[NDArray[np.intp]] = []
        self._errors: dict[str, list[tuple[float, float]]] = {name: [] for name in judge.kinds}

    def add(self, results: Mapping[str, NDArray[Any]]) -> None:
        """The answers to the next feed."""
        judge, number = self._judge, len(self._damages)
        self._damages.append(judge.damages(number, results))
        if judge.classes is not None:
            self._given.append(results[judge.classes].argmax(axis=1))
        for name, found in self._errors.items():
            error = np.asarray(results[name], np.float64) - judge.originals[number][name]
            found.append((float(np.abs(error).max(initial=0.0)), float((error**2).mean())))

    @property
    def damage(self) -> float:
        """Mean over all samples."""
        return float(np.concatenate(self._damages).mean())

    def verdict(self) -> Verdict:
        """Everything there is to say, once all feeds were answered."""
        judge = self._judge
        largest = max(self._largest_error(name) for name in judge.kinds)
        if judge.classes is None:
            values = "integers" not in judge.kinds.values()
            psnr = min(self._psnr(name) for name in judge.kinds) if values else None
            return Verdict(self.damage, None, psnr=psnr, max_error=largest)
        wanted = np.concatenate([each[judge.classes].argmax(axis=1) for each in judge.originals])
        given = np.concatenate(self._given)
        right = wanted == given
        accuracy = None
        if judge.labels is not None:
            accuracy = float((given == judge.labels[: len(given)]).mean())
        return Verdict(
            self.damage, float(right.mean()), _worst(wanted, right), accuracy, max_error=largest
        )

    def _largest_error(self, name: str) -> float:
        scale = max(map(abs, self._judge.ranges[name]))
        error = max(largest for largest, _ in self._errors[name])
        return error / scale if scale > 0 else error

    def _psnr(self, name: str) -> float:
        low, high = self._judge.ranges[name]
        error = float(np.mean([square for _, square in self._errors[name]]))
        if error == 0:
            return float("inf")
        return 10 * float(np.log10(max(high - low, _SMALLEST) ** 2 / error))


def _kind(outputs: Sequence[NDArray[Any]]) -> Kind:
    first = outputs[0]
    if first.dtype.kind != "f":
        return "integers"
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


def _worst(wanted: NDArray[np.intp], right: NDArray[np.bool_]) -> float | None:
    counts = np.bincount(wanted)
    hits = np.bincount(wanted, weights=right)
    enough = counts >= _FEWEST_OF_A_CLASS
    return float((hits[enough] / counts[enough]).min()) if enough.any() else None

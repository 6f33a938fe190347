"""How much of what a network said is still said: damage, measured on its outputs.

An output of rank two with a class in every column is taken for probabilities where its rows are
positive and sum to one, and otherwise for logits, if nothing speaks against it: damage is the
Kullback-Leibler divergence from the original's distribution. Any other output is values: damage is
the squared error over the variance of the original's values. Either is zero for no change, and
small changes in different places nearly add up. Of several outputs the mean counts. Where none is
of floating point, damage is the share of the integers that differ.

What speaks against logits: another output that is probabilities (whoever normalises one, normalises
all), rows of one length (an embedding), columns that differ much more from each other than from
sample to sample (coordinates). Labels that fit the columns speak for them, whatever else.
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
# What an output is taken for is told from so many samples or more.
_FEWEST_TO_TELL = 8
# Rows whose lengths differ by less, of the longest, were normalised.
_SAME_LENGTH = 1e-3
# Variance of columns' means over columns' variance: of classifiers below 1, of points of a face 10
# and more.
_MOST_APART = 4.0


@dataclass(frozen=True)
class Verdict:
    """What is left of a network's answers, over all samples.

    Attributes:
        damage: mean over samples: nats of divergence, a share of variance, or of integers.
        agreement: share of samples with the original's class, in every output that tells classes;
            None where no output does.
        worst_agreement: of the class (the original's) that suffers most, among those with at
            least five samples; None where there is none. Of the first output that tells classes.
        accuracy: share of samples with the labelled class, where there are labels; likewise.
        psnr: decibels of the values' error against the original's range, of the output with the
            least; None where no output is values.
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
        self.kinds = kinds_of({name: [each[name] for each in originals] for name in names}, labels)
        self.labels = labels
        self._scales = {
            name: _variance([each[name] for each in originals])
            for name, kind in self.kinds.items()
            if kind == "values"
        }

    @property
    def is_classifier(self) -> bool:
        """Whether any output tells classes apart."""
        return bool(self.classes)

    @property
    def outputs(self) -> list[str]:
        """The outputs that are judged."""
        return list(self.kinds)

    def damages(self, number: int, results: Mapping[str, NDArray[Any]]) -> NDArray[np.float64]:
        """Damage of every sample of a feed."""
        original = self.originals[number]
        found = [self._damage(name, original[name], results[name]) for name in self.kinds]
        if len({len(each) for each in found}) > 1:
            # An output without a batch axis: no sample has a share of its own.
            found = [each.mean(keepdims=True) for each in found]
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
        found = np.maximum((np.exp(first) * (first - second)).sum(axis=1), 0.0)
        return np.asarray(np.nan_to_num(found, nan=np.inf))

    def verdict(self, results: Sequence[Mapping[str, NDArray[Any]]]) -> Verdict:
        """Everything there is to say about another network's answers to all feeds."""
        tally = Tally(self)
        for each in results:
            tally.add(each)
        return tally.verdict()

    @cached_property
    def classes(self) -> list[str]:
        """The outputs that tell classes apart."""
        return [name for name, kind in self.kinds.items() if kind in ("logits", "probabilities")]

    @cached_property
    def wanted(self) -> NDArray[np.intp]:
        """The original's classes: a row for every output that tells them, a column per sample."""
        return np.stack(
            [
                np.concatenate([each[name].argmax(axis=1) for each in self.originals])
                for name in self.classes
            ]
        )

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
        if judge.classes:
            self._given.append(np.stack([results[name].argmax(axis=1) for name in judge.classes]))
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
        values = [self._psnr(name) for name, kind in judge.kinds.items() if kind == "values"]
        psnr = min(values, default=None)
        if not judge.classes:
            return Verdict(self.damage, None, psnr=psnr, max_error=largest)
        given = np.concatenate(self._given, axis=1)
        wanted = judge.wanted[:, : given.shape[1]]
        right = wanted == given
        accuracy = None
        if judge.labels is not None:
            accuracy = float((given[0] == judge.labels[: given.shape[1]]).mean())
        agreement = float(right.all(axis=0).mean())
        worst = _worst(wanted[0], right[0])
        return Verdict(self.damage, agreement, worst, accuracy, psnr, largest)

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


def kinds_of(
    outputs: Mapping[str, Sequence[NDArray[Any]]], labels: NDArray[Any] | None = None
) -> dict[str, Kind]:
    """What every output is, from its values feed by feed and the samples' labels if known."""
    found: dict[str, Kind] = {}
    for name, arrays in outputs.items():
        if arrays[0].dtype.kind != "f":
            found[name] = "integers"
            continue
        is_table = all(each.ndim == 2 and each.shape[1] > 1 for each in arrays)
        if not is_table or len({each.shape[1] for each in arrays}) > 1:
            found[name] = "values"
        else:
            found[name] = "probabilities" if _sum_to_one(arrays) else "logits"
    is_normalised = "probabilities" in found.values()
    for name, kind in found.items():
        if kind == "logits" and (is_normalised or not _may_be_logits(outputs[name], labels)):
            found[name] = "values"
    return found


def _sum_to_one(arrays: Sequence[NDArray[Any]]) -> bool:
    sums = np.concatenate([each.sum(axis=1) for each in arrays])
    positive = all(each.min(initial=0.0) >= 0 for each in arrays)
    return positive and bool(np.abs(sums - 1).max(initial=0.0) < _SUM_ERROR)


def _may_be_logits(arrays: Sequence[NDArray[Any]], labels: NDArray[Any] | None) -> bool:
    values = np.concatenate([np.asarray(each, np.float64) for each in arrays])
    if labels is not None and len(labels) and 0 <= labels.min() <= labels.max() < values.shape[1]:
        return True
    if len(values) < _FEWEST_TO_TELL:
        return True
    lengths = np.sqrt((values**2).sum(axis=1))
    if np.ptp(lengths) <= _SAME_LENGTH * lengths.max(initial=0.0):
        return False
    if len(set(values.argmax(axis=1))) == 1:
        return True  # one class: of few inputs, or of a network that was never trained
    return bool(values.mean(axis=0).var() <= _MOST_APART * values.var(axis=0).mean())


def _log_probabilities(values: NDArray[Any], kind: Kind) -> NDArray[np.float64]:
    wide = np.asarray(values, np.float64)
    if kind == "probabilities":
        return np.log(np.maximum(wide, _SMALLEST))
    wide = wide - wide.max(axis=1, keepdims=True)
    return np.asarray(wide - np.log(np.exp(wide).sum(axis=1, keepdims=True)))


def _variance(outputs: Sequence[NDArray[Any]]) -> float:
    """Of all values around the mean of each position, where several samples tell it.

    Feed by feed: of large pictures not even one more copy is made.
    """
    shapes = {each.shape[1:] for each in outputs}
    samples = sum(len(each) if each.ndim else 1 for each in outputs)
    whole = len(shapes) > 1 or samples < 2 or outputs[0].ndim < 1
    axis = None if whole else 0
    count = sum(each.size for each in outputs) if whole else samples
    mean = sum(np.sum(each, axis=axis, dtype=np.float64) for each in outputs) / max(count, 1)
    squares = sum(np.sum((each - mean) ** 2, axis=axis) for each in outputs) / max(count, 1)
    return max(float(np.mean(squares)), _SMALLEST)


def _worst(wanted: NDArray[np.intp], right: NDArray[np.bool_]) -> float | None:
    counts = np.bincount(wanted)
    hits = np.bincount(wanted, weights=right)
    enough = counts >= _FEWEST_OF_A_CLASS
    return float((hits[enough] / counts[enough]).min()) if enough.any() else None

"""Measuring many snippets, batch by batch, with a journal: what is done stays done."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence

from graphfold.calibration.journal import Journal
from graphfold.calibration.latency import LARGEST_SPREAD
from graphfold.calibration.snippets import Snippet
from graphfold.calibration.timing import Sample, Timer
from graphfold.progress import Progress

_MOST_IN_A_BATCH = 24
_MOST_BYTES_IN_A_BATCH = 1 << 27
_ROUNDS = 20
_TRIES = 3
# A spread that is less than this share of the network says nothing about any plan.
_NEGLIGIBLE = 0.003
# Long operators are steady in fewer rounds: no batch needs more time than this.
_LONGEST_SECONDS = 10.0


class Measuring:
    """Measures those snippets that the journal does not hold yet.

    Args:
        timer: what measures.
        journal: where measurements are kept.
        distinct: what to measure, by digest.
        opsets: the operator sets' versions.
        time_budget: seconds that it may take; None for as many rounds as are useful.
        progress: called with (stage, done, total).
    """

    def __init__(
        self,
        timer: Timer,
        journal: Journal,
        distinct: Mapping[str, Snippet],
        opsets: Mapping[str, int],
        time_budget: float | None,
        progress: Progress,
    ) -> None:
        self._timer = timer
        self._journal = journal
        self._distinct = distinct
        self._opsets = opsets
        self._budget = time_budget
        self._progress = progress
        self._started = time.monotonic()
        self._missing = [key for key in distinct if key not in journal.entries]
        self._cost = sum(distinct[key].cost for key in self._missing)
        self._cost_done = 0.0

    def run(self) -> None:
        """Measure all that is missing; each batch is in the journal when it is done."""
        for keys in _batches(self._missing, self._distinct):
            self._tell()
            samples = self._batch([self._distinct[key] for key in keys])
            self._journal.add(
                {
                    key: [sample.ratio, sample.spread]
                    for key, sample in zip(keys, samples, strict=True)
                }
            )
            self._cost_done += sum(self._distinct[key].cost for key in keys)
        self._tell()

    def _batch(self, parts: Sequence[Snippet]) -> list[Sample]:
        """The steadiest of several measurements of each; more only of those that need it."""
        seconds = self._share_of_time(parts)
        samples = self._timer.measure(parts, self._opsets, _ROUNDS, seconds)
        for _ in range(_TRIES - 1):
            unsteady = [index for index, sample in enumerate(samples) if is_unsteady(sample)]
            if not unsteady or self._is_late():
                break
            again = self._timer.measure(
                [parts[index] for index in unsteady], self._opsets, _ROUNDS, seconds
            )
            for index, sample in zip(unsteady, again, strict=True):
                samples[index] = min(samples[index], sample, key=lambda each: each.spread)
        return samples

    def _share_of_time(self, parts: Sequence[Snippet]) -> float:
        if self._budget is None:
            return _LONGEST_SECONDS
        left = self._budget - (time.monotonic() - self._started)
        share = sum(part.cost for part in parts) / max(self._cost - self._cost_done, 1.0)
        return min(max(0.0, left * share), _LONGEST_SECONDS)

    def _is_late(self) -> bool:
        if self._budget is None:
            return False
        passed = (time.monotonic() - self._started) / max(self._budget, 1e-9)
        return passed > self._cost_done / max(self._cost, 1.0)

    def _tell(self) -> None:
        done = sum(key in self._journal.entries for key in self._distinct)
        stage = "measuring"
        if 0 < self._cost_done < self._cost:
            passed = time.monotonic() - self._started
            stage += f", {_duration(passed * (self._cost / self._cost_done - 1))} left"
        self._progress(stage, done, len(self._distinct))


def is_unsteady(sample: Sample) -> bool:
    """Whether a measurement spreads by more than 10 %, and by enough to matter."""
    return sample.spread > max(LARGEST_SPREAD * sample.ratio, _NEGLIGIBLE)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def _batches(keys: Sequence[str], distinct: Mapping[str, Snippet]) -> Iterator[list[str]]:
    """A session's worth of snippets at a time: bounded in number and in memory."""
    batch: list[str] = []
    weight = 0
    for key in keys:
        size = distinct[key].weight_bytes
        if batch and (len(batch) == _MOST_IN_A_BATCH or weight + size > _MOST_BYTES_IN_A_BATCH):
            yield batch
            batch, weight = [], 0
        batch.append(key)
        weight += size
    if batch:
        yield batch

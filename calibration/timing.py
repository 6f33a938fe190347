"""Timing on this device: batches of snippets against the whole network, round by round.

On the CPU the runtime's profiler tells how long each kernel takes in place. Other providers only
queue work while it watches, so there a session is timed as a whole, and what makes the snippet's
input is timed beside it and taken off.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from graphfold import specs
from graphfold.calibration.kernels import (
    Batch,
    interquartile_range,
    profile_batch,
    undisturbed,
)
from graphfold.calibration.latency import cpu_name
from graphfold.calibration.snippets import Shape, Snippet, maker
from graphfold.errors import UsageError
from graphfold.feeds import first_that_runs
from graphfold.runtime import Runnable, Session

if TYPE_CHECKING:
    from graphfold.model import Model

_CPU = "CPUExecutionProvider"
_FEWEST_ROUNDS = 4
# A longer network fills the caches by itself in one run.
_SHORT_SECONDS = 0.05
_WARM_UP_RUNS = 3
_COMPARED_ROUNDS = 30
_COMPARED_SECONDS = 0.05

Run = Callable[[], object]


@dataclass(frozen=True)
class Settings:
    """How to measure: execution provider, threads, and the sizes that a model leaves open."""

    provider: str = _CPU
    threads: int = 1
    batch: int = 1
    input_shapes: Mapping[str, Sequence[int]] = field(default_factory=dict)


@dataclass(frozen=True)
class Sample:
    """A latency and its spread over rounds, as shares of the whole network's latency."""

    ratio: float
    spread: float


class Timer(Protocol):
    """What measures a network's parts, and what it is."""

    device: str
    processor: str
    runtime: str
    batch: int
    input_shapes: Mapping[str, Shape]

    def measure(
        self,
        parts: Sequence[Snippet],
        opsets: Mapping[str, int],
        rounds: int,
        seconds: float,
    ) -> tuple[list[Sample], float]:
        """Time snippets, in so many rounds or fewer when the seconds are over.

        Returns:
            a sample of each, and the whole network's milliseconds meanwhile.
        """

    def compare(self, other: Model) -> Sample:
        """The latency of another network with the same inputs."""


class DeviceTimer:
    """onnxruntime on this machine.

    Args:
        model: the whole network.
        settings: how to measure.
        kernels: use the runtime's profiler; by default where its times are those of the work.

    Raises:
        UsageError: an unknown provider, or a batch that the model does not take.
        RunError: onnxruntime cannot run the model.
    """

    def __init__(self, model: Model, settings: Settings, *, kernels: bool | None = None) -> None:
        import onnxruntime

        self._settings = settings
        self._kernels = settings.provider == _CPU if kernels is None else kernels
        session = self._session(model)
        given = specs.check_input_shapes(session.inputs, settings.input_shapes)
        _, self._feed, _ = first_that_runs(session, given, 0, batch=settings.batch)
        self.input_shapes: Mapping[str, Shape] = {
            name: array.shape for name, array in self._feed.items()
        }
        self.batch: int = next((array.shape[0] for array in self._feed.values() if array.ndim), 1)
        if settings.batch not in (1, self.batch):
            raise UsageError(
                f"the model's batch is {self.batch}, not {settings.batch}",
                hint="export it with an open batch, or leave --batch out",
            )
        self._whole = session.prepared(self._feed)
        self.device = platform.node() or "unknown"
        self.processor = cpu_name()
        self.runtime = f"onnxruntime {onnxruntime.__version__}"
        self._seconds = min(_timed(self._whole) for _ in range(_WARM_UP_RUNS))

    def _session(self, model: Model | bytes) -> Session:
        with Runnable(model) as runnable:
            return Session(
                runnable,
                optimize=True,
                threads=self._settings.threads,
                provider=self._settings.provider,
            )

    def measure(
        self,
        parts: Sequence[Snippet],
        opsets: Mapping[str, int],
        rounds: int,
        seconds: float,
    ) -> tuple[list[Sample], float]:
        """Time snippets against the whole network, see `Timer`."""
        measure = self._with_profiler if self._kernels else self._one_by_one
        runs, wholes = measure(parts, opsets, rounds, seconds)
        samples = [_sample(column, wholes) for column in zip(*runs, strict=True)]
        return samples, undisturbed(wholes)

    def _with_profiler(
        self,
        parts: Sequence[Snippet],
        opsets: Mapping[str, int],
        rounds: int,
        seconds: float,
    ) -> tuple[list[list[float]], list[float]]:
        wholes: list[float] = []
        runs = profile_batch(
            Batch(parts, opsets),
            threads=self._settings.threads,
            provider=self._settings.provider,
            between=lambda run: wholes.extend(self._alternate(run, rounds, seconds)),
        )
        return [[run[number] for number in range(len(parts))] for run in runs], wholes

    def _one_by_one(
        self,
        parts: Sequence[Snippet],
        opsets: Mapping[str, int],
        rounds: int,
        seconds: float,
    ) -> tuple[list[list[float]], list[float]]:
        pairs = [(self._runs([part], opsets), self._runs(_made(part), opsets)) for part in parts]
        runs: list[list[float]] = []

        def run() -> None:
            runs.append([_milliseconds(own) - _milliseconds(made) for own, made in pairs])

        wholes = self._alternate(run, rounds, seconds)
        return runs, wholes

    def _runs(self, parts: Sequence[Snippet], opsets: Mapping[str, int]) -> Run | None:
        if not parts:
            return None
        batch = Batch(parts, opsets)
        session = self._session(batch.proto.SerializeToString())
        session.run(batch.feed())
        return session.prepared(batch.feed())

    def _alternate(self, run: Run, rounds: int, seconds: float) -> list[float]:
        """Run something between runs of the network; its milliseconds around each time."""
        wholes: list[float] = []
        begin = time.perf_counter()
        before = self._time_whole()
        while len(wholes) < rounds:
            run()
            after = self._time_whole()
            wholes.append(min(before, after))
            before = after
            passed = time.perf_counter() - begin
            if len(wholes) >= _FEWEST_ROUNDS and passed > seconds:
                break
        return wholes

    def _time_whole(self) -> float:
        if self._seconds < _SHORT_SECONDS:
            self._whole()  # what ran before has filled the caches with its own weights
        return 1000 * _timed(self._whole)

    def compare(self, other: Model) -> Sample:
        """The latency of another network against the whole, see `Timer`."""
        run = self._session(other).prepared(self._feed)
        seconds = [min(_timed(each) for _ in range(_WARM_UP_RUNS)) for each in (self._whole, run)]
        repeats = [max(1, round(_COMPARED_SECONDS / max(each, 1e-6))) for each in seconds]
        wholes, others = [], []
        for _ in range(_COMPARED_ROUNDS):
            wholes.append(_repeated(self._whole, repeats[0]))
            others.append(_repeated(run, repeats[1]))
        return _sample(others, wholes)


def _sample(parts: Sequence[float], wholes: Sequence[float]) -> Sample:
    """Latency and spread in units of the whole network, timed in the same rounds."""
    ratios = [part / whole for part, whole in zip(parts, wholes, strict=True)]
    return Sample(undisturbed(parts) / undisturbed(wholes), interquartile_range(ratios))


def _made(part: Snippet) -> list[Snippet]:
    """What makes a snippet's inputs, where an operator does."""
    return [] if part.at_input else [maker(item) for item in part.inputs if item.is_image]


def _repeated(run: Run, count: int) -> float:
    run()
    return undisturbed([_timed(run) for _ in range(count)])


def _milliseconds(run: Run | None) -> float:
    return 0.0 if run is None else 1000 * _timed(run)


def _timed(run: Run) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin

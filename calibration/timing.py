"""Timing on this device: batches of snippets against the whole network, round by round."""

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
    middle_mean,
    profile_batch,
)
from graphfold.calibration.latency import LARGEST_SPREAD, cpu_name
from graphfold.calibration.snippets import Shape, Snippet
from graphfold.errors import UsageError
from graphfold.feeds import first_that_runs
from graphfold.runtime import Runnable, Session

if TYPE_CHECKING:
    from graphfold.model import Model

__all__ = ["LARGEST_SPREAD", "DeviceTimer", "Sample", "Settings", "Timer"]

_FEWEST_ROUNDS = 5
# A longer network fills the caches by itself in one run.
_SHORT_SECONDS = 0.05
_WARM_UP_RUNS = 3


@dataclass(frozen=True)
class Settings:
    """How to measure: execution provider, threads, and the sizes that a model leaves open."""

    provider: str = "CPUExecutionProvider"
    threads: int = 1
    batch: int = 1
    input_shapes: Mapping[str, Sequence[int]] = field(default_factory=dict)


@dataclass(frozen=True)
class Sample:
    """A snippet's latency and its spread over rounds, as shares of the whole network's."""

    ratio: float
    spread: float


class Timer(Protocol):
    """What measures snippets, and what it is."""

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
        seconds: float | None,
    ) -> tuple[list[Sample], float]:
        """Time snippets, in so many rounds or fewer where seconds are given.

        Returns:
            a sample of each, and the whole network's milliseconds meanwhile.
        """


class DeviceTimer:
    """onnxruntime on this machine.

    Raises:
        UsageError: an unknown provider, or a batch that the model does not take.
        RunError: onnxruntime cannot run the model.
    """

    def __init__(self, model: Model, settings: Settings) -> None:
        import onnxruntime

        self._settings = settings
        with Runnable(model) as runnable:
            session = Session(
                runnable, optimize=True, threads=settings.threads, provider=settings.provider
            )
        given = specs.check_input_shapes(session.inputs, settings.input_shapes)
        _, feed, _ = first_that_runs(session, given, 0, batch=settings.batch)
        self.input_shapes = {name: array.shape for name, array in feed.items()}
        self.batch = next((array.shape[0] for array in feed.values() if array.ndim), 1)
        if settings.batch not in (1, self.batch):
            raise UsageError(
                f"the model's batch is {self.batch}, not {settings.batch}",
                hint="export it with an open batch, or leave --batch out",
            )
        self._whole = session.prepared(feed)
        self.device = platform.node() or "unknown"
        self.processor = cpu_name()
        self.runtime = f"onnxruntime {onnxruntime.__version__}"
        self._seconds = min(_timed(self._whole) for _ in range(_WARM_UP_RUNS))

    def measure(
        self,
        parts: Sequence[Snippet],
        opsets: Mapping[str, int],
        rounds: int,
        seconds: float | None,
    ) -> tuple[list[Sample], float]:
        """Time snippets against the whole network, see `Timer`."""
        wholes: list[float] = []

        def alternate(run: Callable[[], object]) -> None:
            begin = time.perf_counter()
            before = self._time_whole()
            while len(wholes) < rounds:
                run()
                after = self._time_whole()
                wholes.append((before + after) / 2)
                before = after
                passed = time.perf_counter() - begin
                if seconds is not None and len(wholes) >= _FEWEST_ROUNDS and passed > seconds:
                    break

        settings = self._settings
        runs = profile_batch(
            Batch(parts, opsets),
            threads=settings.threads,
            provider=settings.provider,
            between=alternate,
        )
        samples = []
        for number in range(len(parts)):
            ratios = [
                run[number].milliseconds / whole for run, whole in zip(runs, wholes, strict=True)
            ]
            samples.append(Sample(middle_mean(ratios), interquartile_range(ratios)))
        return samples, middle_mean(wholes)

    def _time_whole(self) -> float:
        if self._seconds < _SHORT_SECONDS:
            self._whole()  # the batch has filled the caches with its own weights
        return 1000 * _timed(self._whole)


def _timed(run: Callable[[], object]) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin

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
from typing import TYPE_CHECKING, Any, Protocol

from graphfold import specs
from graphfold.calibration.kernels import (
    Batch,
    Profiled,
    all_kernels,
    interquartile_range,
    own_kernels,
    undisturbed,
)
from graphfold.calibration.latency import cpu_name
from graphfold.calibration.quantize import roughly_quantized
from graphfold.calibration.snippets import Shape, Snippet, maker
from graphfold.errors import UsageError
from graphfold.feeds import first_that_runs
from graphfold.model import adopt
from graphfold.runtime import Runnable, Session
from graphfold.specs import Arrays

if TYPE_CHECKING:
    from graphfold.model import Model

_CPU = "CPUExecutionProvider"
_FEWEST_ROUNDS = 4
# What takes so long in two rounds is steady enough after them.
_FEWEST_LONG_ROUNDS = 2
_LONG_SECONDS = 5.0
# A longer network fills the caches by itself in one run.
_SHORT_SECONDS = 0.05
_WARM_UP_RUNS = 3
_WARM_UP_SECONDS = 1.0
_COMPARED_ROUNDS = 30
_COMPARED_SECONDS = 0.05
_LONGEST_COMPARISON = 10.0

Run = Callable[[], object]


@dataclass(frozen=True)
class Settings:
    """How to measure: execution provider, threads, sizes that a model leaves open, and the type.

    With dtype `int8` networks and snippets are quantized before they are timed, so that kernels,
    fusions and the places where types change are those of a quantized network.
    """

    provider: str = _CPU
    threads: int = 1
    batch: int = 1
    input_shapes: Mapping[str, Sequence[int]] = field(default_factory=dict)
    dtype: str = "float32"


@dataclass(frozen=True)
class Sample:
    """A latency and its spread over rounds, as shares of the whole network's kernels."""

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
    ) -> list[Sample]:
        """Time snippets, in so many rounds or fewer when the seconds are over."""

    def compare(self, other: Model | None) -> tuple[float, float]:
        """The whole network's milliseconds, and another's latency as a share of them.

        The other one has the same inputs; without one the share is 1.
        """


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
        self._model = self._typed(model, self._feed)
        self._whole = self._session(self._model).prepared(self._feed)
        self.device = platform.node() or "unknown"
        self.processor = cpu_name()
        self.runtime = f"onnxruntime {onnxruntime.__version__}"
        self._seconds = _warm_seconds(self._whole)

    def _typed(self, model: Model, feed: Arrays) -> Model:
        return model if self._settings.dtype == "float32" else roughly_quantized(model, feed)

    def _batch(self, batch: Batch) -> Model | bytes:
        if self._settings.dtype == "float32":
            return bytes(batch.proto.SerializeToString())
        return self._typed(adopt(batch.proto, check=False), batch.feed())

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
    ) -> list[Sample]:
        """Time snippets against the whole network, see `Timer`."""
        measure = self._with_profiler if self._kernels else self._one_by_one
        return measure(parts, opsets, rounds, seconds)

    def _with_profiler(
        self, parts: Sequence[Snippet], opsets: Mapping[str, int], rounds: int, seconds: float
    ) -> list[Sample]:
        batch = Batch(parts, opsets)
        with (
            self._profiled(self._batch(batch)) as own,
            self._profiled(self._model) as whole,
        ):
            run, run_whole = own.session.prepared(batch.feed()), whole.session.prepared(self._feed)
            run()
            count = self._alternate(run, run_whole, rounds, seconds)
            wholes = self._warm(whole.runs())
            runs = [own_kernels(events) for events in own.runs()[-count:]]
        total = all_kernels(wholes)
        samples = []
        for number in range(len(parts)):
            times = [found.get(number, 0.0) for found in runs]
            samples.append(Sample(undisturbed(times) / total, interquartile_range(times) / total))
        return samples

    def _one_by_one(
        self, parts: Sequence[Snippet], opsets: Mapping[str, int], rounds: int, seconds: float
    ) -> list[Sample]:
        pairs = [(self._runs([part], opsets), self._runs(_made(part), opsets)) for part in parts]
        runs: list[list[float]] = []
        wholes: list[float] = []

        def run() -> None:
            runs.append([_seconds(own) - _seconds(made) for own, made in pairs])

        def run_whole() -> None:
            wholes.append(_timed(self._whole))

        self._alternate(run, run_whole, rounds, seconds)
        total = undisturbed(self._warm(wholes))
        return [
            Sample(undisturbed(times) / total, interquartile_range(times) / total)
            for times in zip(*runs, strict=True)
        ]

    def _runs(self, parts: Sequence[Snippet], opsets: Mapping[str, int]) -> Run | None:
        if not parts:
            return None
        batch = Batch(parts, opsets)
        session = self._session(self._batch(batch))
        session.run(batch.feed())
        return session.prepared(batch.feed())

    def _profiled(self, model: Model | bytes) -> Profiled:
        return Profiled(model, threads=self._settings.threads, provider=self._settings.provider)

    def _warm(self, runs: Sequence[Any]) -> Sequence[Any]:
        """Of runs of the network in a row, the last."""
        return runs[self._runs_of_whole - 1 :: self._runs_of_whole]

    @property
    def _runs_of_whole(self) -> int:
        """Runs of the network in a row, the first of which finds its weights out of the caches."""
        return 2 if self._seconds < _SHORT_SECONDS else 1

    def _alternate(self, run: Run, run_whole: Run, rounds: int, seconds: float) -> int:
        """Run one thing and the whole network in turn; how many times."""
        begin = time.perf_counter()
        for done in range(1, rounds + 1):
            run()
            for _ in range(self._runs_of_whole):
                run_whole()
            passed = time.perf_counter() - begin
            if done >= _FEWEST_ROUNDS and passed > seconds:
                return done
            if done >= _FEWEST_LONG_ROUNDS and passed > max(seconds, _LONG_SECONDS):
                return done
        return rounds

    def compare(self, other: Model | None) -> tuple[float, float]:
        """The whole network's milliseconds and another's share of them, see `Timer`."""
        runs = [self._whole]
        if other is not None:
            typed = self._typed(other, self._feed)
            runs.append(self._session(typed).prepared(self._feed))
        repeats = [max(1, round(_COMPARED_SECONDS / max(_warm_seconds(run), 1e-6))) for run in runs]
        found: list[list[float]] = [[] for _ in runs]
        begin = time.perf_counter()
        for done in range(_COMPARED_ROUNDS):
            if done >= _FEWEST_ROUNDS and time.perf_counter() - begin > _LONGEST_COMPARISON:
                break
            for run, count, times in zip(runs, repeats, found, strict=True):
                if self._seconds < _SHORT_SECONDS:
                    run()  # the network before has filled the caches with its own weights
                times += [_timed(run) for _ in range(count)]
        whole, last = undisturbed(found[0]), undisturbed(found[-1])
        return 1000 * whole, last / whole


def as_timed(
    models: Sequence[Model],
    dtype: str,
    input_shapes: Mapping[str, Sequence[int]] | None = None,
    batch: int = 1,
) -> list[Model]:
    """Networks with the same inputs as they run in a type, `float32` or `int8`.

    Raises:
        ModelError: a network cannot be quantized. RunError: onnxruntime cannot run it.
    """
    if dtype == "float32":
        return list(models)
    with Runnable(models[0]) as runnable:
        session = Session(runnable, optimize=True)
    given = specs.check_input_shapes(session.inputs, input_shapes)
    _, feed, _ = first_that_runs(session, given, 0, batch=batch)
    return [roughly_quantized(model, feed) for model in models]


def _made(part: Snippet) -> list[Snippet]:
    """What makes a snippet's inputs, where an operator does."""
    return [] if part.at_input else [maker(item) for item in part.inputs if item.is_image]


def _seconds(run: Run | None) -> float:
    return 0.0 if run is None else _timed(run)


def _warm_seconds(run: Run) -> float:
    """Seconds of the quickest of a few runs; of a long one, fewer."""
    begin = time.perf_counter()
    seconds = [_timed(run)]
    while len(seconds) < _WARM_UP_RUNS and time.perf_counter() - begin < _WARM_UP_SECONDS:
        seconds.append(_timed(run))
    return min(seconds)


def _timed(run: Run) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin

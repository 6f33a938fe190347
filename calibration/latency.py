"""Latency on this machine, measured so that a difference means something.

Models alternate round by round, so that whatever disturbs one disturbs all; the ratio of two
models is the median over rounds of the ratio of their medians in the same round. A spread
(interquartile range over median) above 10 % is flagged: such a measurement decides nothing.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from graphfold import specs
from graphfold.errors import UsageError
from graphfold.feeds import describe_feed, first_that_runs
from graphfold.progress import Progress, no_progress
from graphfold.runtime import Runnable, Session
from graphfold.tables import Table, make_table

if TYPE_CHECKING:
    from graphfold.calibration.blocks import BlockTimes
    from graphfold.model import Model

LARGEST_SPREAD = 0.10
_SMALLEST_SHARE = 0.9
_WARM_UP_RUNS = 3
_WARM_UP_SECONDS = 0.2
_PROFILED_RUNS = 20
_FEWEST_ROUNDS = 5


@dataclass(frozen=True)
class OperatorTime:
    """Median time of one node of the optimized model, in milliseconds per run."""

    node: str
    op_type: str
    milliseconds: float


@dataclass(frozen=True)
class ModelLatency:
    """One model's latency, in milliseconds per run.

    Attributes:
        name: as the user knows it.
        median: of the rounds' medians.
        p5: fifth percentile of all runs, the least disturbed ones.
        spread: interquartile range of the rounds' medians over their median.
        speedup: median over rounds of the first model's median over this one's.
        speedup_spread: interquartile range of those ratios over their median.
        runs: number of timed runs.
        cpu_share: processor time over wall time while it ran on one thread; below one, others
            were using the processor. None with several threads or another provider.
        operators: per node, where asked for.
    """

    name: str
    median: float
    p5: float
    spread: float
    speedup: float
    speedup_spread: float
    runs: int
    cpu_share: float | None = None
    operators: tuple[OperatorTime, ...] = ()

    @property
    def is_reliable(self) -> bool:
        """Whether latency and ratio spread by no more than 10 % and the processor was free."""
        return max(self.spread, self.speedup_spread) <= LARGEST_SPREAD and not self.was_disturbed

    @property
    def was_disturbed(self) -> bool:
        """Whether something else took the processor away for a good part of the time."""
        return self.cpu_share is not None and self.cpu_share < _SMALLEST_SHARE

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        return {
            "model": self.name,
            "median_ms": self.median,
            "p5_ms": self.p5,
            "spread": self.spread,
            "speedup": self.speedup,
            "speedup_spread": self.speedup_spread,
            "runs": self.runs,
            "cpu_share": self.cpu_share,
            "reliable": self.is_reliable,
            "operators": [
                {"node": item.node, "op_type": item.op_type, "ms": item.milliseconds}
                for item in self.operators
            ],
        }


@dataclass(frozen=True)
class LatencyComparison:
    """Latencies of several models, measured together.

    Attributes:
        models: in the order given; the first is what ratios refer to.
        environment: where and how: cpu, cores, onnxruntime, provider, threads, batch, inputs.
        rounds: number of alternating rounds.
        warnings: for the user.
        blocks: times of the first model's blocks in all models, where asked for.
    """

    models: tuple[ModelLatency, ...]
    environment: dict[str, Any]
    rounds: int
    warnings: tuple[str, ...] = field(default=())
    blocks: BlockTimes | None = None

    def to_json(self) -> dict[str, Any]:
        """The JSON document of `bench --json`."""
        return {
            "models": [item.to_json() for item in self.models],
            "environment": self.environment,
            "rounds": self.rounds,
            "warnings": list(self.warnings),
            "blocks": None if self.blocks is None else self.blocks.to_json(),
        }

    def tables(self) -> list[Table]:
        """Latencies, and times per operator and per block where they were measured."""
        rows = [
            (
                item.name,
                f"{item.median:.3f}",
                f"{item.p5:.3f}",
                f"{100 * item.spread:.1f} %",
                f"{item.speedup:.2f}x",
                f"{100 * item.speedup_spread:.1f} %",
            )
            for item in self.models
        ]
        columns = ("model", "median ms", "p5 ms", "spread", "speedup", "its spread")
        note = ", ".join(f"{key} {value}" for key, value in self.environment.items())
        found = [make_table("Latency", columns, rows, note=note)]
        if any(item.operators for item in self.models):
            found.append(self._operators())
        if self.blocks is not None:
            found.append(self.blocks.table())
        return found

    def _operators(self) -> Table:
        totals: dict[str, list[float]] = {}
        for index, item in enumerate(self.models):
            for node in item.operators:
                row = totals.setdefault(node.op_type, [0.0] * len(self.models))
                row[index] += node.milliseconds
        rows = [
            (name, *(f"{value:.3f}" if value else None for value in values))
            for name, values in sorted(totals.items(), key=lambda pair: -max(pair[1]))
        ]
        columns = ("operator, ms per run", *(item.name for item in self.models))
        return make_table("Operators", columns, rows, note="Measured apart, with the profiler on.")


def compare(
    models: Sequence[Model | Path | bytes],
    *,
    names: Sequence[str] | None = None,
    inputs: Iterator[Mapping[str, NDArray[Any]]]
    | Sequence[Mapping[str, NDArray[Any]]]
    | None = None,
    input_shapes: Mapping[str, Sequence[int]] | None = None,
    batch: int = 1,
    threads: int = 1,
    provider: str = "CPUExecutionProvider",
    rounds: int = 20,
    seconds: float = 10.0,
    operators: bool = False,
    blocks: bool = False,
    seed: int = 0,
    progress: Progress | None = None,
) -> LatencyComparison:
    """Measure models against each other on the same inputs.

    Args:
        models: the first is what ratios refer to; all take the same inputs.
        names: for tables; file names where left out.
        inputs: the first feed is used; None for random values.
        input_shapes: sizes that the models leave open ("" for the only input).
        batch: where the models leave it open; other unknown sizes are 224, 64 or 32, the first
            that the first model runs.
        threads: intra-op threads of each session; spinning is off.
        provider: onnxruntime execution provider.
        rounds: alternating rounds; fewer where they take much longer than `seconds`.
        seconds: time to measure, all models together.
        operators: also time each operator, in sessions of their own.
        blocks: also time the first model's blocks in all models, in sessions of their own and for
            as long again; models are matched by tensor names.
        seed: of the random values.
        progress: called with (stage, done, total).

    Raises:
        RunError: onnxruntime cannot load or run one of the models.
        UsageError: no models, an unknown provider, or models without a block in common.
    """
    if not models:
        raise UsageError("no model to measure")
    labels = list(names) if names else [_label(model, i) for i, model in enumerate(models)]
    block_timer = _block_timer(models, labels, provider) if blocks else None
    report = progress or no_progress
    with contextlib.ExitStack() as stack:
        runnables = [stack.enter_context(Runnable(model)) for model in models]
        report("loading", 0, len(models))
        sessions = [
            Session(runnable, optimize=True, threads=threads, provider=provider)
            for runnable in runnables
        ]
        feed = _feed(sessions[0], inputs, input_shapes, batch, seed)
        for session in sessions:
            session.run(feed)  # the checked way, for a message where a model cannot take the feed
        timings = _measure(
            [session.prepared(feed) for session in sessions], rounds, seconds, report
        )
        del sessions
        times = [
            _operator_times(runnable, feed, threads, provider) if operators else ()
            for runnable in runnables
        ]
    found = (
        block_timer(feed, threads=threads, rounds=rounds, seconds=seconds, progress=report)
        if block_timer is not None
        else None
    )
    is_alone = threads == 1 and provider == "CPUExecutionProvider"
    measured = tuple(
        _summary(label, own, timings[0].rounds, nodes, own.cpu_share if is_alone else None)
        for label, own, nodes in zip(labels, timings, times, strict=True)
    )
    return LatencyComparison(
        models=measured,
        environment=environment(threads, provider, feed),
        rounds=len(timings[0].rounds),
        warnings=tuple(_warnings(measured)),
        blocks=found,
    )


def _block_timer(
    models: Sequence[Model | Path | bytes], names: Sequence[str], provider: str
) -> Callable[..., BlockTimes]:
    """What measures the blocks that the models have in common, found before any measuring."""
    from graphfold.calibration.blocks import match_blocks, measure_blocks
    from graphfold.optimizer import load_any

    loaded = [load_any(model) for model in models]
    return partial(measure_blocks, loaded, names, match_blocks(loaded, names, provider))


def _label(model: Model | Path | bytes, index: int) -> str:
    if isinstance(model, Path):
        return model.name
    path = getattr(model, "path", None)
    return path.name if path is not None else f"model {index + 1}"


def _feed(
    session: Session,
    inputs: Iterator[Mapping[str, NDArray[Any]]] | Sequence[Mapping[str, NDArray[Any]]] | None,
    input_shapes: Mapping[str, Sequence[int]] | None,
    batch: int,
    seed: int,
) -> specs.Arrays:
    if inputs is not None:
        return specs.fit_inputs(session.inputs, next(iter(inputs), {}))
    given = specs.check_input_shapes(session.inputs, input_shapes)
    _, feed, _ = first_that_runs(session, given, seed, batch=batch)
    return feed


def _measure(
    runs: Sequence[Callable[[], object]], rounds: int, seconds: float, progress: Progress
) -> list[_Timing]:
    """Timed runs of each model, round by round."""
    repeats = []
    for run in runs:
        once = _warm_up(run)
        repeats.append(max(1, round(seconds / (rounds * len(runs) * once))))
    timings = [_Timing() for _ in runs]
    started = time.perf_counter()
    with _no_garbage_collection():
        for number in range(rounds):
            if number >= _FEWEST_ROUNDS and time.perf_counter() - started > 2 * seconds:
                break  # of long runs, fewer rounds tell as much
            progress("measuring", number, rounds)
            for offset in range(len(runs)):
                index = (number + offset) % len(runs)  # nobody is always first
                timings[index].add(runs[index], repeats[index])
    return timings


@dataclass
class _Timing:
    """Milliseconds of one model by round and repetition, and how busy it kept the processor."""

    rounds: list[list[float]] = field(default_factory=list)
    wall: float = 0.0
    cpu: float = 0.0

    @property
    def cpu_share(self) -> float:
        return self.cpu / self.wall if self.wall else 1.0

    def add(self, run: Callable[[], object], repeats: int) -> None:
        run()  # the model before has filled the caches with its own weights
        samples = []
        cpu, wall = time.process_time(), time.perf_counter()
        for _ in range(repeats):
            begin = time.perf_counter()
            run()
            samples.append(1000 * (time.perf_counter() - begin))
        self.wall += time.perf_counter() - wall
        self.cpu += time.process_time() - cpu
        self.rounds.append(samples)


def _warm_up(run: Callable[[], object]) -> float:
    """Seconds that one run takes once caches and memory are warm."""
    started = time.perf_counter()
    durations: list[float] = []
    while len(durations) < _WARM_UP_RUNS or time.perf_counter() - started < _WARM_UP_SECONDS:
        begin = time.perf_counter()
        run()
        durations.append(time.perf_counter() - begin)
    return max(statistics.median(durations), 1e-6)


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _summary(
    name: str,
    timing: _Timing,
    first: Sequence[Sequence[float]],
    operators: tuple[OperatorTime, ...],
    cpu_share: float | None,
) -> ModelLatency:
    medians = [statistics.median(samples) for samples in timing.rounds]
    ratios = [statistics.median(base) / own for base, own in zip(first, medians, strict=True)]
    every = [sample for samples in timing.rounds for sample in samples]
    return ModelLatency(
        name=name,
        median=statistics.median(medians),
        p5=float(np.percentile(every, 5)),
        spread=relative_spread(medians),
        speedup=statistics.median(ratios),
        speedup_spread=relative_spread(ratios),
        runs=len(every),
        cpu_share=cpu_share,
        operators=operators,
    )


def relative_spread(values: Sequence[float]) -> float:
    """Interquartile range over median."""
    low, middle, high = np.percentile(values, [25, 50, 75])
    return float((high - low) / middle)


def _warnings(models: Sequence[ModelLatency]) -> Iterator[str]:
    for item in models:
        spread = 100 * max(item.spread, item.speedup_spread)
        if item.was_disturbed:
            yield (
                f"{item.name}: got {100 * (item.cpu_share or 0):.0f} % of a processor, others "
                "were using it: times are too long, measure on a quieter machine"
            )
        elif not item.is_reliable:
            yield (
                f"{item.name}: spread {spread:.0f} % is above {100 * LARGEST_SPREAD:.0f} %, "
                "measure on a quieter machine or for longer (--seconds)"
            )


def _operator_times(
    runnable: Runnable, feed: specs.Arrays, threads: int, provider: str
) -> tuple[OperatorTime, ...]:
    with tempfile.TemporaryDirectory(prefix="graphfold-") as folder:
        session = Session(
            runnable,
            optimize=True,
            threads=threads,
            provider=provider,
            profile=str(Path(folder) / "profile"),
        )
        run = session.prepared(feed)
        for _ in range(_PROFILED_RUNS):
            run()
        events = json.loads(session.end_profiling().read_text(encoding="utf-8"))
    return tuple(_node_times(events))


def _node_times(events: Sequence[Mapping[str, Any]]) -> Iterator[OperatorTime]:
    """Median time per node from onnxruntime's trace events, in order of first execution."""
    durations: dict[tuple[str, str], list[float]] = {}
    for event in events:
        name = str(event.get("name", ""))
        if event.get("cat") == "Node" and name.endswith("_kernel_time"):
            key = (name.removesuffix("_kernel_time"), str(event["args"].get("op_name", "?")))
            durations.setdefault(key, []).append(float(event["dur"]) / 1000)
    for (node, op_type), values in durations.items():
        yield OperatorTime(node, op_type, statistics.median(values))


def environment(threads: int, provider: str, feed: specs.Arrays) -> dict[str, Any]:
    """Where and how a latency was measured."""
    import onnxruntime

    first = next(iter(feed.values()), None)
    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "onnxruntime": onnxruntime.__version__,
        "provider": provider,
        "threads": threads,
        "batch": int(first.shape[0]) if first is not None and first.ndim else 1,
        "inputs": describe_feed(feed),
    }


def cpu_name() -> str:
    """The processor's name as the operating system tells it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()

"""Latency tables: what every unchanged step and every candidate of a model costs on this device.

Every latency is measured against the whole network: snippets are timed in batches
(`graphfold.calibration.kernels`), the runs of a batch alternate with runs of the network, and
what is kept is the ratio of the two. So a machine that becomes slower or faster between two
batches, or between two halves of a run that was interrupted, changes nothing. In the end ratios
become milliseconds, and `rest` is what the steps' latencies lack to the whole.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graphfold import __version__
from graphfold.calibration.journal import Journal
from graphfold.calibration.snippets import Shape, Snippet, Snippets, is_hopeless
from graphfold.calibration.timing import LARGEST_SPREAD, DeviceTimer, Sample, Settings, Timer
from graphfold.candidates import Candidate, Candidates, Choice, find_candidates
from graphfold.cuts import CutLayout, choice_row, cut_layout, is_no_change
from graphfold.errors import UsageError
from graphfold.graph import Graph
from graphfold.measures import LatencyHeader, LatencyRow, LatencyTable, Row, write_table
from graphfold.model import digest
from graphfold.plan import ModelReference
from graphfold.sizes import resolved_shapes

if TYPE_CHECKING:
    from graphfold.model import Model

Progress = Callable[[str, int, int], None]

_MOST_IN_A_BATCH = 24
_MOST_BYTES_IN_A_BATCH = 1 << 26
_ROUNDS = 20
_FEWEST_ROUNDS = 5
_TRIES = 3
# A spread that is less than this share of the network says nothing about any plan.
_NEGLIGIBLE = 0.001


@dataclass(frozen=True)
class Profile:
    """A latency table, and what is to be said about it.

    Attributes:
        table: one row for every step and every choice that may pay.
        whole: latency of the whole network, in milliseconds.
        distinct: number of different operators that were measured.
        continued: how many of them an interrupted run had measured before.
        left_out: choices without a row, since by their size they can never pay.
        warnings: for the user.
    """

    table: LatencyTable
    whole: float
    distinct: int
    continued: int
    left_out: int
    warnings: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """The JSON document of `profile --json`."""
        return {
            "header": self.table.header.model_dump(mode="json", exclude_none=True),
            "whole_ms": self.whole,
            "rest_ms": self.table.rest,
            "rows": len(self.table.rows),
            "distinct": self.distinct,
            "continued": self.continued,
            "left_out": self.left_out,
            "warnings": list(self.warnings),
        }


@dataclass(frozen=True)
class _Entry:
    """A row to be, and the snippet that is measured for it."""

    row: Row
    snippet: Snippet


def profile_model(
    model: Model,
    output: Path | None = None,
    *,
    provider: str = "CPUExecutionProvider",
    threads: int = 1,
    batch: int = 1,
    dtype: str = "float32",
    input_shapes: Mapping[str, Sequence[int]] | None = None,
    time_budget: float | None = None,
    progress: Progress | None = None,
    make_timer: Callable[[Model, Settings], Timer] = DeviceTimer,
) -> Profile:
    """Measure the latency table of a model on this device.

    Args:
        model: the model; it is not modified.
        output: where to write the table; beside it lies a journal (`.partial`) until it is
            complete, from which an interrupted run continues. None writes nothing.
        provider: onnxruntime execution provider.
        threads: intra-op threads.
        batch: where the model leaves it open.
        dtype: of the weights, as the model has them: float32.
        input_shapes: sizes of inputs that the model leaves open, by name ("" for the only one).
        time_budget: seconds that measuring may take; None for as many rounds as are useful.
        progress: called with (stage, done, total).
        make_timer: what measures.

    Raises:
        UsageError: an unknown provider or dtype, nothing to plan for, or a journal of another
            model or other settings.
        RunError: onnxruntime cannot run the model.
        OutputError: the table or its journal cannot be written.
    """
    if dtype != "float32":
        raise UsageError(f"dtype {dtype!r} cannot be profiled", hint="float32 can")
    report = progress or _no_progress
    report("looking for candidates", 0, 0)
    graph = Graph(model)
    candidates = find_candidates(graph)
    cuts = cut_layout(candidates)
    settings = Settings(provider, threads, batch, dict(input_shapes or {}))
    timer = make_timer(model, settings)
    snippets = Snippets(graph, candidates.sites, resolved_shapes(graph, timer.input_shapes))
    steps, choices, left_out = _entries(candidates, cuts, snippets)
    entries = [*steps, *choices]
    header = _header(model, settings, timer)
    distinct = _distinct(entry.snippet for entry in entries)
    path = None if output is None else output.with_name(f"{output.name}.partial")
    with Journal(path, _journal_header(header, timer.input_shapes, distinct)) as journal:
        continued = len(journal.entries.keys() & distinct.keys())
        _Run(timer, journal, distinct, time_budget, snippets.opsets, report).measure()
        samples, whole = _results(journal, distinct)
        table, warnings = _table(header, steps, choices, samples, whole)
        if output is not None:
            write_table(table, output)
        journal.remove()
    return Profile(table, whole, len(distinct), continued, left_out, tuple(warnings))


def _no_progress(stage: str, done: int, total: int) -> None:
    del stage, done, total


# What there is to measure ---------------------------------------------------------------------


def _entries(
    candidates: Candidates, cuts: CutLayout, snippets: Snippets
) -> tuple[list[_Entry], list[_Entry], int]:
    """Rows of the steps, rows of the choices, and how many choices are left out."""
    steps = [_Entry(step.row(), snippets.unchanged(step)) for step in cuts.steps]
    holder = {
        node: number for number, step in enumerate(cuts.steps) for node in step.nodes
    }
    choices: list[_Entry] = []
    left_out = 0
    for candidate, choice in _changes(candidates):
        snippet = snippets.chosen(candidate, choice)
        numbers = dict.fromkeys(holder[node] for node in candidate.nodes if node in holder)
        if is_hopeless(snippet, [steps[number].snippet for number in numbers]):
            left_out += 1
        else:
            choices.append(_Entry(choice_row(candidate, choice), snippet))
    return steps, choices, left_out


def _changes(candidates: Candidates) -> Iterator[tuple[Candidate, Choice]]:
    for candidate in candidates.found:
        for choice in candidate.choices:
            if not is_no_change(candidate, choice):
                yield candidate, choice


def _distinct(snippets: Iterable[Snippet]) -> dict[str, Snippet]:
    """Snippets by digest, those of the same operator at the same shapes once."""
    found: dict[str, Snippet] = {}
    for snippet in snippets:
        for part in snippet.measured_parts():
            found.setdefault(part.digest, part)
    return found


def _header(model: Model, settings: Settings, timer: Timer) -> LatencyHeader:
    source = model if model.path is None else model.path
    name = None if model.path is None else model.path.name
    return LatencyHeader(
        created_by=f"graphfold {__version__}",
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        model=ModelReference(name=name, sha256=digest(source)),
        device=timer.device,
        processor=timer.processor,
        runtime=timer.runtime,
        provider=settings.provider,
        threads=settings.threads,
        batch=timer.batch,
        dtype="float32",
    )


def _journal_header(
    header: LatencyHeader, shapes: Mapping[str, Shape], distinct: Mapping[str, Snippet]
) -> dict[str, Any]:
    stated = header.model_dump(mode="json", exclude={"created"})
    return {
        "graphfold_profile": 1,
        **stated,
        "inputs": {name: list(shape) for name, shape in shapes.items()},
        "operators": len(distinct),
    }


# Measuring ------------------------------------------------------------------------------------


class _Run:
    """Measures what the journal does not hold yet, batch by batch."""

    def __init__(
        self,
        timer: Timer,
        journal: Journal,
        distinct: Mapping[str, Snippet],
        time_budget: float | None,
        opsets: Mapping[str, int],
        report: Progress,
    ) -> None:
        self._timer = timer
        self._journal = journal
        self._distinct = distinct
        self._opsets = opsets
        self._report = report
        self._started = time.monotonic()
        self._budget = time_budget
        self._missing = [key for key in distinct if key not in journal.entries]
        self._cost = sum(distinct[key].cost for key in self._missing)
        self._cost_done = 0.0

    def measure(self) -> None:
        for keys in _batches(self._missing, self._distinct):
            self._tell()
            samples, whole = self._batch(keys)
            # One line for the batch: its ratios and its whole belong together.
            for key, sample in zip(keys, samples, strict=True):
                self._journal.add(key, [sample.ratio, sample.spread, whole])
            self._cost_done += sum(self._distinct[key].cost for key in keys)
        self._tell()

    def _batch(self, keys: Sequence[str]) -> tuple[list[Sample], float]:
        """The steadiest of several measurements of each; more only of those that need it."""
        parts = [self._distinct[key] for key in keys]
        seconds = self._share_of_time(parts)
        samples, whole = self._timer.measure(parts, self._opsets, _ROUNDS, seconds)
        for _ in range(_TRIES - 1):
            unsteady = [index for index, each in enumerate(samples) if is_unsteady(each)]
            if not unsteady or self._is_late():
                break
            again, _ = self._timer.measure(
                [parts[index] for index in unsteady], self._opsets, _ROUNDS, seconds
            )
            for index, sample in zip(unsteady, again, strict=True):
                samples[index] = min(samples[index], sample, key=lambda each: each.spread)
        return samples, whole

    def _share_of_time(self, parts: Sequence[Snippet]) -> float | None:
        if self._budget is None:
            return None
        left = self._budget - (time.monotonic() - self._started)
        share = sum(part.cost for part in parts) / max(self._cost - self._cost_done, 1.0)
        return max(0.0, left * share)

    def _is_late(self) -> bool:
        if self._budget is None:
            return False
        passed = (time.monotonic() - self._started) / max(self._budget, 1e-9)
        return passed > self._cost_done / max(self._cost, 1.0)

    def _tell(self) -> None:
        done = sum(key in self._journal.entries for key in self._distinct)
        stage = "measuring"
        if self._cost_done:
            passed = time.monotonic() - self._started
            left = passed * (self._cost / self._cost_done - 1)
            stage += f", {_duration(left)} left"
        self._report(stage, done, len(self._distinct))


def is_unsteady(sample: Sample) -> bool:
    """Whether a measurement spreads by more than 10 %, and by enough to matter."""
    return sample.spread > max(LARGEST_SPREAD * sample.ratio, _NEGLIGIBLE)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def _batches(keys: Sequence[str], distinct: Mapping[str, Snippet]) -> Iterator[list[str]]:
    batch: list[str] = []
    weight = 0
    for key in keys:
        size = distinct[key].weight_bytes
        if batch and (
            len(batch) == _MOST_IN_A_BATCH or weight + size > _MOST_BYTES_IN_A_BATCH
        ):
            yield batch
            batch, weight = [], 0
        batch.append(key)
        weight += size
    if batch:
        yield batch


# Results --------------------------------------------------------------------------------------


def _results(
    journal: Journal, distinct: Mapping[str, Snippet]
) -> tuple[dict[str, Sample], float]:
    values = {key: journal.entries[key] for key in distinct}
    samples = {key: Sample(value[0], value[1]) for key, value in values.items()}
    return samples, statistics.median(value[2] for value in values.values())


def _table(
    header: LatencyHeader,
    steps: Sequence[_Entry],
    choices: Sequence[_Entry],
    samples: Mapping[str, Sample],
    whole: float,
) -> tuple[LatencyTable, list[str]]:
    rows = [_row(entry, samples, whole) for entry in (*steps, *choices)]
    covered = sum(row.value for row in rows[: len(steps)])
    table = LatencyTable(header=header, rest=max(0.0, whole - covered), rows=tuple(rows))
    return table, list(_warnings(rows, covered, whole))


def _row(entry: _Entry, samples: Mapping[str, Sample], whole: float) -> LatencyRow:
    found = entry.snippet.value({key: each.ratio for key, each in samples.items()})
    spread = max(samples[part.digest].spread for part in entry.snippet.measured_parts())
    stated = entry.row.model_dump(exclude_none=True)
    return LatencyRow(**stated, value=max(0.0, found) * whole, spread=spread * whole)


def _warnings(rows: Sequence[LatencyRow], covered: float, whole: float) -> Iterator[str]:
    unsteady = [
        row for row in rows if is_unsteady(Sample(row.value / whole, (row.spread or 0) / whole))
    ]
    if unsteady:
        worst = max(unsteady, key=lambda row: (row.spread or 0) / max(row.value, 1e-9))
        yield (
            f"{len(unsteady)} of {len(rows)} latencies spread by more than "
            f"{100 * LARGEST_SPREAD:.0f} %, most that of {worst}: measure on a quieter machine"
        )
    if covered > 1.05 * whole:
        yield (
            f"the steps take {covered:.3f} ms one by one and {whole:.3f} ms together: what the "
            "runtime does with them together is not in the table"
        )

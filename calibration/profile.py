"""Latency tables: what every unchanged step and every candidate of a model costs on this device.

Every latency is measured against the whole network: snippets are timed in batches
(`graphfold.calibration.kernels`), the runs of a batch alternate with runs of the network, and
what is kept is the ratio to the sum of the network's own kernels. So a machine that becomes
slower or faster between two batches, or between two halves of a run that was interrupted,
changes nothing. In the end one folded network sets the scale (`graphfold.calibration.wholes`),
ratios become milliseconds, and `rest` is what the steps' latencies lack to the whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graphfold import __version__
from graphfold.calibration.families import Alternatives
from graphfold.calibration.fitted_rows import narrow_rows, sketch
from graphfold.calibration.journal import Journal
from graphfold.calibration.latency import LARGEST_SPREAD
from graphfold.calibration.measuring import Measuring, is_unsteady
from graphfold.calibration.sketch import Sketch
from graphfold.calibration.snippets import Snippet, Snippets, amounts, is_hopeless
from graphfold.calibration.timing import DeviceTimer, Sample, Settings, Timer
from graphfold.calibration.wholes import find_fastest, fold_fastest, scale_of
from graphfold.candidates import Candidates, find_candidates
from graphfold.cuts import CutLayout, choice_row, cut_layout, is_no_change
from graphfold.depth_table import Ends
from graphfold.drops import find_drops, is_drop
from graphfold.errors import UsageError
from graphfold.graph import Graph
from graphfold.identity import model_reference
from graphfold.measures import LatencyHeader, LatencyRow, LatencyTable, Row, write_table
from graphfold.plan import Family
from graphfold.progress import Progress, no_progress
from graphfold.sizes import resolved_shapes
from graphfold.tables import Table, make_table

if TYPE_CHECKING:
    from graphfold.model import Model

_DTYPES = ("float32", "int8")
_LARGEST_CORRECTION = 0.25
_CONVOLUTIONS: tuple[Family, ...] = ("pointwise", "dense", "depthwise", "low_rank")


@dataclass(frozen=True)
class Profile:
    """A latency table, and what is to be said about it.

    Attributes:
        table: one row for every step and every choice that may pay, for every drop of a segment
            and every place that an activation may be put at.
        whole: latency of the whole network, in milliseconds.
        steps: number of the table's rows that are of unchanged steps; they come first.
        distinct: number of different operators that were measured.
        continued: how many of them an interrupted run had measured before.
        left_out: choices without a row, since by their size they can never pay.
        scale: by which latencies measured one by one were multiplied.
        warnings: for the user.
    """

    table: LatencyTable
    whole: float
    steps: int
    distinct: int
    continued: int
    left_out: int
    scale: float
    warnings: tuple[str, ...]

    @property
    def drops(self) -> int:
        """Number of the rows with nothing in a segment's place."""
        return sum(is_drop(row) for row in self.table.rows)

    @property
    def fits(self) -> int:
        """Number of the rows of what only fitted weights allow."""
        return sum(row.is_fitted for row in self.table.rows)

    @property
    def additions(self) -> int:
        """Number of the rows of an activation where the network has none."""
        return sum(row.input == row.output for row in self.table.rows)

    def to_json(self) -> dict[str, Any]:
        """The JSON document of `profile --json`."""
        return {
            "header": self.table.header.model_dump(mode="json", exclude_none=True),
            "whole_ms": self.whole,
            "rest_ms": self.table.rest,
            "rows": len(self.table.rows),
            "unchanged": self.steps,
            "drops": self.drops,
            "additions": self.additions,
            "fits": self.fits,
            "distinct": self.distinct,
            "continued": self.continued,
            "left_out": self.left_out,
            "scale": self.scale,
            "warnings": list(self.warnings),
        }

    def tables(self) -> list[Table]:
        """What was measured, in figures for people."""
        others = self.steps + self.drops + self.additions + self.fits
        changed = len(self.table.rows) - others
        rows = [
            ("whole network", f"{self.whole:.3f} ms"),
            ("of that, steps that a plan may change", f"{self.whole - self.table.rest:.3f} ms"),
            ("rows of unchanged steps", str(self.steps)),
            ("rows of replacements", str(changed)),
            ("rows of segments that may be dropped", str(self.drops)),
            ("rows of activations that may be added", str(self.additions)),
            ("rows of what only fitted weights allow", str(self.fits)),
            ("replacements left out, too large to pay", str(self.left_out)),
            ("different operators measured", str(self.distinct)),
        ]
        header = self.table.header
        note = (
            f"{header.processor}, {header.runtime}, {header.provider}, threads {header.threads}, "
            f"dtype {header.dtype}"
        )
        return [make_table("Latency table", ("", ""), rows, note=note)]


@dataclass(frozen=True)
class _Entry:
    """A row to be, and the snippet that is measured for it; None where nothing takes time."""

    row: Row
    snippet: Snippet | None

    @property
    def parts(self) -> tuple[Snippet, ...]:
        """What is measured."""
        return () if self.snippet is None else self.snippet.measured_parts()


@dataclass(frozen=True)
class _Entries:
    """All rows to be, and the number of choices left out.

    Attributes:
        steps: unchanged.
        choices: convolutions that segments may become.
        others: drops of segments, and activations where the network has none.
    """

    steps: tuple[_Entry, ...]
    choices: tuple[_Entry, ...]
    others: tuple[_Entry, ...]
    left_out: int

    @property
    def every(self) -> tuple[_Entry, ...]:
        return (*self.steps, *self.choices, *self.others)


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
    fitted: bool = False,
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
        dtype: in which convolutions are computed: float32, or int8 as quantized networks do.
        input_shapes: sizes of inputs that the model leaves open, by name ("" for the only one).
        time_budget: seconds that measuring operators may take; None for as many rounds as are
            useful.
        fitted: also measure what only fitted weights allow: fewer inner channels, depthwise
            convolutions and maps of low rank in a segment's place.
        progress: called with (stage, done, total).
        make_timer: what measures.

    Raises:
        UsageError: an unknown provider or dtype, nothing to plan for, or a journal of another
            model or other settings.
        RunError: onnxruntime cannot run the model.
        OutputError: the table or its journal cannot be written.
    """
    if dtype not in _DTYPES:
        raise UsageError(f"dtype {dtype!r} cannot be profiled", hint=" and ".join(_DTYPES) + " can")
    report = progress or no_progress
    settings = Settings(provider, threads, batch, dict(input_shapes or {}), dtype)
    timer = make_timer(model, settings)
    report("looking for candidates", 0, 0)
    graph = Graph(model)
    candidates = find_candidates(graph)
    cuts = cut_layout(candidates)
    snippets = Snippets(
        graph,
        candidates.sites,
        resolved_shapes(graph, timer.input_shapes),
        amounts(graph, cuts.steps, timer.input_shapes),
    )
    bench = sketch(model) if fitted else None
    entries = _entries(candidates, cuts, snippets, bench)
    header = _header(model, settings, timer)
    distinct = _distinct(entries.every)
    path = None if output is None else output.with_name(f"{output.name}.partial")
    with Journal(path, _journal_header(header, distinct)) as journal:
        continued = len(journal.entries.keys() & distinct.keys())
        Measuring(timer, journal, distinct, snippets.opsets, time_budget, report).run()
        report("measuring a folded network", 0, 0)
        found = _assemble(model, header, entries, cuts, timer, journal)
        if bench is not None:
            rows = narrow_rows(
                bench, found.table, cuts, timer.input_shapes, settings, journal, report
            )
            table = found.table.model_copy(update={"rows": (*found.table.rows, *rows)})
            found = replace(found, table=table)
        if output is not None:
            write_table(found.table, output)
        journal.remove()
    return Profile(
        **vars(found),
        steps=len(entries.steps),
        distinct=len(distinct),
        continued=continued,
        left_out=entries.left_out,
    )


# What there is to measure ---------------------------------------------------------------------


def _entries(
    candidates: Candidates, cuts: CutLayout, snippets: Snippets, bench: Sketch | None
) -> _Entries:
    unchanged = [snippets.unchanged(step) for step in cuts.steps]
    holder = {node: number for number, step in enumerate(cuts.steps) for node in step.nodes}
    choices: list[_Entry] = []
    left_out = 0
    for candidate in candidates.found:
        numbers = dict.fromkeys(holder[node] for node in candidate.nodes if node in holder)
        replaced = [unchanged[number] for number in numbers]
        for choice in candidate.choices:
            if is_no_change(candidate, choice):
                continue
            if choice.family == "identity":
                continue  # is a drop
            snippet = snippets.chosen(candidate, choice)
            if is_hopeless(snippet, replaced):
                left_out += 1
            else:
                choices.append(_Entry(choice_row(candidate, choice), snippet))
    steps = [
        _Entry(step.row(), snippet) for step, snippet in zip(cuts.steps, unchanged, strict=True)
    ]
    others = [*_drops(candidates, snippets), *_additions(candidates, snippets)]
    if bench is not None:
        known = {entry.row for entry in choices}
        listed = Alternatives(candidates, cuts, bench, snippets, unchanged)
        others += [
            _Entry(each.row, each.snippet)
            for each in listed.found(_CONVOLUTIONS)
            if each.row.model_copy(update={"weights": None}) not in known
        ]
    return _Entries(tuple(steps), tuple(choices), tuple(others), left_out)


def _drops(candidates: Candidates, snippets: Snippets) -> Iterator[_Entry]:
    """Nothing in a segment's place: what takes time is an activation that stays alone."""
    for drop in find_drops(candidates):
        yield _Entry(drop.row, snippets.left(drop))


def _additions(candidates: Candidates, snippets: Snippets) -> Iterator[_Entry]:
    """An activation where the network has none: rows from a tensor to itself."""
    ends = Ends(candidates)
    for place in ends.free:
        assert ends.usual is not None
        name = place.name or ""
        row = Row(input=name, output=name, end_active=True)
        yield _Entry(row, snippets.activation(ends.usual, place))


def _distinct(entries: Iterable[_Entry]) -> dict[str, Snippet]:
    """Snippets by digest, those of the same operator at the same shapes once."""
    found: dict[str, Snippet] = {}
    for entry in entries:
        for part in entry.parts:
            found.setdefault(part.digest, part)
    return found


def _header(model: Model, settings: Settings, timer: Timer) -> LatencyHeader:
    return LatencyHeader(
        created_by=f"graphfold {__version__}",
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        model=model_reference(model),
        device=timer.device,
        processor=timer.processor,
        runtime=timer.runtime,
        provider=settings.provider,
        threads=settings.threads,
        batch=timer.batch,
        dtype=settings.dtype,
        inputs={name: tuple(shape) for name, shape in timer.input_shapes.items()},
    )


def _journal_header(header: LatencyHeader, distinct: Mapping[str, Snippet]) -> dict[str, Any]:
    """What must be the same for measurements to be continued; a file's name need not be."""
    stated = header.model_dump(mode="json", exclude={"created": True, "model": {"name"}})
    return {
        "graphfold_profile": 1,
        **stated,
        "operators": len(distinct),
    }


# The table ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Assembled:
    table: LatencyTable
    whole: float
    scale: float
    warnings: tuple[str, ...]


def _assemble(
    model: Model,
    header: LatencyHeader,
    entries: _Entries,
    cuts: CutLayout,
    timer: Timer,
    journal: Journal,
) -> _Assembled:
    measured = {
        part.digest: Sample(*journal.entries[part.digest])
        for entry in entries.every
        for part in entry.parts
    }
    shares = [(entry.row, _share(entry, measured)) for entry in entries.every]
    merges = shares[: len(shares) - len(entries.others)]
    whole, scale, reason = _scale(model, merges, len(entries.steps), cuts, timer, journal)
    rows = tuple(
        LatencyRow(
            **row.model_dump(exclude_none=True),
            value=scale * share.ratio * whole,
            spread=scale * share.spread * whole,
        )
        for row, share in shares
    )
    covered = sum(row.value for row in rows[: len(entries.steps)])
    table = LatencyTable(header=header, rest=max(0.0, whole - covered), rows=rows)
    warnings = [*_unsteady(shares), *([] if reason is None else [reason])]
    return _Assembled(table, whole, scale, tuple(warnings))


def _share(entry: _Entry, measured: Mapping[str, Sample]) -> Sample:
    """What a snippet adds to what makes its inputs, where the two are fused."""
    if entry.snippet is None:
        return Sample(0.0, 0.0)
    own, *makers = (measured[part.digest] for part in entry.parts)
    ratio = own.ratio - sum(each.ratio for each in makers)
    return Sample(max(0.0, ratio), own.spread)


def _scale(
    model: Model,
    shares: Sequence[tuple[Row, Sample]],
    steps: int,
    cuts: CutLayout,
    timer: Timer,
    journal: Journal,
) -> tuple[float, float, str | None]:
    """The whole network's milliseconds, the factor for all rows, a warning if it is doubtful."""
    covered = sum(share.ratio for _, share in shares[:steps])
    fastest = find_fastest([(row, share.ratio) for row, share in shares], cuts)
    folded = None if fastest is None else fold_fastest(model, fastest)
    reason = None
    if isinstance(folded, str):
        fastest, folded, reason = None, None, f"no folded network sets the scale: {folded}"
    key = "whole" if fastest is None else f"plan {fastest.plan.digest}"
    if key not in journal.entries:
        journal.add({key: timer.compare(folded)})
    whole, ratio = journal.entries[key]
    if fastest is None:
        return whole, min(1.0, 1 / covered), reason
    scale = scale_of(covered, fastest.covered, ratio)
    if abs(scale - 1) > _LARGEST_CORRECTION:
        reason = (
            f"operators measured one by one and networks measured whole differ by "
            f"{100 * abs(scale - 1):.0f} %: predictions are rough here"
        )
    return whole, scale, reason


def _unsteady(shares: Sequence[tuple[Row, Sample]]) -> Iterator[str]:
    unsteady = [(row, share) for row, share in shares if is_unsteady(share)]
    if unsteady:
        row, share = max(unsteady, key=lambda pair: pair[1].spread)
        yield (
            f"{len(unsteady)} of {len(shares)} latencies spread by more than "
            f"{100 * LARGEST_SPREAD:.0f} %, from {row.input!r} to {row.output!r} by "
            f"{100 * share.spread:.1f} % of the whole network: measure on a quieter machine"
        )

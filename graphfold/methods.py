"""The papers' methods as choices of candidates for one solver.

- layermerge: every candidate; segments may merge and drop convolutions (Kim, Oh et al. 2024).
- depth: merges only, activation states at both ends, two stages (Kim et al. 2023).
- layer-only: every layer stays or goes by itself: a 0-1 knapsack.
- sequential: depth within a first budget, then layer-only on what it left; for the first budget
  that is best for the whole, where none is given.
- depthshrinker: every block stays as it is or becomes one convolution (Fu et al. 2022).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from graphfold.depth import Ends, Run, Span, depth_entries
from graphfold.errors import MeasuresError, Problem, UsageError
from graphfold.layout import Layout
from graphfold.measures import Candidate, Row
from graphfold.solver import Entry, Floor, Frontier, GapError, Solution, frontier

Method = Literal["layermerge", "depth", "layer-only", "sequential", "depthshrinker"]
Pieces = tuple[Row, ...]
_Placed = list[tuple[Span, Candidate]]
# First budgets that sequential tries, where the first method's frontier has more points.
_MOST_FIRST_BUDGETS = 64


def may_choose(method: Method, row: Row) -> bool:
    """Whether a method looks at what a row of a table does to its segment."""
    if row.unchanged or method == "layermerge":
        return True
    dropped = row.family == "identity"
    if method == "layer-only":
        return dropped
    return _merges_only(row) or (dropped and method == "sequential")


def solve(
    candidates: Iterable[Candidate],
    layout: Layout,
    method: Method = "layermerge",
    *,
    compat: Floor | None = None,
    alpha: float = 0.0,
    first_budget: float | None = None,
    blocks: Collection[tuple[str, str]] = (),
    additions: Mapping[str, float] | None = None,
) -> Frontier[Pieces]:
    """Every budget's best choice by one of the methods; a choice is a row of segments.

    Args:
        candidates: both figures of every replacement, unchanged segments included. Joins of
            branches without one cost nothing.
        layout: where their tensors are.
        method: which candidates may be chosen, and together.
        compat: the published discretisation.
        alpha: depth's normalisation of importances.
        first_budget: milliseconds, for the depth stage of sequential; None tries many, and every
            budget's choice is the best of them.
        blocks: input and output of each block, for depthshrinker.
        additions: milliseconds of an activation where the network has none, by the tensor before
            it; for depth and sequential. 0 where left out.

    Raises:
        MeasuresError: candidates at tensors where no segment ends; all of them.
        UsageError: what the method needs is not given, or candidates do not cover the network.
        BudgetError: nothing fits the first budget.
    """
    placed = _place(candidates, layout)
    if method in ("depth", "sequential"):
        tolls = _Tolls(layout, additions or {})
        first = _frontier(_depth(placed, tolls, alpha), layout, compat)
        if method == "depth":
            return first
        if first_budget is None:
            return _frontier(_after_any(first, placed, tolls), layout, compat)
        left = _after_depth(first.within(first_budget), placed, tolls)
        return _frontier(left, layout, compat)
    if method == "depthshrinker":
        placed = _blocks_only(placed, layout, blocks)
    elif method == "layer-only":
        placed = [(span, found) for span, found in placed if span[1] == span[0] + 1]
    return _frontier([_entry(span, found, layout) for span, found in placed], layout, compat)


def _frontier(
    entries: Sequence[Entry[Pieces]], layout: Layout, compat: Floor | None
) -> Frontier[Pieces]:
    priced = {(entry.start, entry.end) for entry in entries}
    free: list[Entry[Pieces]] = [
        Entry(join.start, join.end, 0.0, 0.0, ())
        for join in layout.joins
        if (join.start, join.end) not in priced
    ]
    try:
        return frontier([*entries, *free], layout.positions, compat=compat)
    except GapError as error:
        raise UsageError(
            f"no choice of segments leads on from {layout.name_at(error.position)!r}",
            hint="every part of the network needs a candidate, its unchanged form at least",
        ) from None


def _place(candidates: Iterable[Candidate], layout: Layout) -> _Placed:
    placed: _Placed = []
    problems: list[Problem] = []
    for candidate in candidates:
        span = layout.span(candidate.row.input, candidate.row.output)
        if isinstance(span, Problem):
            problems.append(span)
        else:
            placed.append((span, candidate))
    if problems:
        raise MeasuresError(list(dict.fromkeys(problems)))
    return placed


def _entry(span: Span, candidate: Candidate, layout: Layout) -> Entry[Pieces]:
    row = candidate.row
    ends = (
        (layout.cut(row.input), row.start_active),
        (layout.place(row.output), row.end_active),
    )
    agree = tuple((place, state) for place, state in ends if state is not None)
    return Entry(*span, candidate.latency, candidate.importance, (row,), agree)


def _blocks_only(placed: _Placed, layout: Layout, blocks: Collection[tuple[str, str]]) -> _Placed:
    """Unchanged segments, and whole blocks from which nothing but activations goes."""
    if not blocks:
        raise UsageError("depthshrinker chooses among blocks, and there are none")
    ends = {(layout.cut(source), layout.cut(target)) for source, target in blocks}
    return [
        (span, found)
        for span, found in placed
        if found.row.unchanged
        or (
            (layout.cut(found.row.input), layout.cut(found.row.output)) in ends
            and _merges_only(found.row)
        )
    ]


def _merges_only(row: Row) -> bool:
    return not row.removed_convs and row.family != "identity"


# --- depth ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Tolls:
    """What activations cost where the network has none; a segment that ends there pays."""

    layout: Layout
    additions: Mapping[str, float]

    def of(self, pieces: Pieces) -> float:
        """Milliseconds of the activation that is put behind the last of these."""
        place = self.layout.place(pieces[-1].output)
        is_added = pieces[-1].end_active is True and place not in self.layout.activations
        return self.additions.get(place, 0.0) if is_added else 0.0


def _depth(placed: _Placed, tolls: _Tolls, alpha: float) -> list[Entry[Pieces]]:
    layout = tolls.layout
    merges = _faster_of_two([each for each in placed if _merges_only(each[1].row)])
    rows = {span: found.row for span, found in merges}
    latencies = _one_latency_each(merges)
    importances: dict[Ends, float] = {}
    for span, found in merges:
        importances[_ends(span, found.row)] = found.importance
    labels = {span: _labels(span, row, layout) for span, row in rows.items()}
    entries = depth_entries(latencies, importances, alpha=alpha, labels=labels)
    return [_with_choice(entry, tuple(_pieces(entry.choice, rows)), tolls) for entry in entries]


def _faster_of_two(merges: _Placed) -> _Placed:
    """Of a step that stays and the merge of its branches, what is faster: both do the same."""
    times: dict[Span, dict[bool, float]] = {}
    for span, found in merges:
        times.setdefault(span, {})[found.row.unchanged] = found.latency
    best = {span: min(both, key=lambda key: (both[key], not key)) for span, both in times.items()}
    return [(span, found) for span, found in merges if found.row.unchanged is best[span]]


def _labels(span: Span, row: Row, layout: Layout) -> tuple[Hashable, Hashable]:
    """What must agree at a span's ends; where a row states nothing, it agrees with anything."""
    return (
        (span, "start") if row.start_active is None else layout.cut(row.input),
        (span, "end") if row.end_active is None else layout.place(row.output),
    )


def _with_choice(entry: Entry[Run], pieces: Pieces, tolls: _Tolls) -> Entry[Pieces]:
    latency = entry.latency + tolls.of(pieces)
    return Entry(entry.start, entry.end, latency, entry.importance, pieces, entry.agree)


def _one_latency_each(merges: _Placed) -> dict[Span, float]:
    """Depth's table has one merge per segment; more means a table of another method."""
    latencies: dict[Span, float] = {}
    for span, found in merges:
        if latencies.setdefault(span, found.latency) != found.latency:
            what = f"has several latencies: {latencies[span]} and {found.latency} ms"
            raise MeasuresError([Problem(str(found.row), what, "depth needs one per segment")])
    return latencies


def _pieces(run: Run, rows: dict[Span, Row]) -> Iterable[Row]:
    """One segment for each convolution of a run; the activations between them go."""
    for span in run.split.spans:
        row = rows[span]
        start, end = (state is not None for state in (row.start_active, row.end_active))
        before = run.start_active if start else None
        after = run.end_active if end else None
        yield row.model_copy(
            update={
                "start_active": before if span[0] == run.split.breaks[0] else False,
                "end_active": after if span[1] == run.split.breaks[-1] else False,
            }
        )


def _after_any(first: Frontier[Pieces], placed: _Placed, tolls: _Tolls) -> list[Entry[Pieces]]:
    """What may follow on each of depth's choices, which may not be mixed."""
    count = min(len(first), _MOST_FIRST_BUDGETS)
    numbers = {round(at * (len(first) - 1) / max(count - 1, 1)) for at in range(count)}
    return [
        replace(entry, agree=(*entry.agree, ("first", number)))
        for number in sorted(numbers)
        for entry in _after_depth(first[number], placed, tolls)
    ]


def _after_depth(first: Solution[Pieces], placed: _Placed, tolls: _Tolls) -> list[Entry[Pieces]]:
    """What depth chose, and for every entry the candidates that drop it altogether."""
    known = {_ends(span, found.row): found for span, found in placed if found.row.unchanged}
    left = [part for entry in first.entries for part in _parted(entry, known, tolls.layout)]
    chosen = {(entry.start, entry.end): entry for entry in left}
    entries = list(left)
    for span, found in placed:
        if span in chosen and found.row.family == "identity":
            kept = chosen[span]
            row = found.row.model_copy(
                update={
                    "start_active": kept.choice[0].start_active,
                    "end_active": kept.choice[-1].end_active,
                }
            )
            latency = found.latency + tolls.of((row,))
            entries.append(
                replace(kept, latency=latency, importance=found.importance, choice=(row,))
            )
    return entries


def _ends(span: Span, row: Row) -> Ends:
    return (*span, row.start_active is not False, row.end_active is not False)


def _parted(
    entry: Entry[Pieces], known: Mapping[Ends, Candidate], layout: Layout
) -> list[Entry[Pieces]]:
    """A run of steps that stay is worth what they are, one by one, and each may go by itself."""
    parts: list[Entry[Pieces]] = []
    for row in entry.choice:
        span = layout.span(row.input, row.output)
        if isinstance(span, Problem) or not row.unchanged:
            return [entry]
        found = known.get(_ends(span, row))
        if found is None:
            return [entry]
        parts.append(_entry(span, Candidate(row, found.latency, found.importance), layout))
    total = math.fsum(part.importance for part in parts)
    # More than the sum has an activation behind the last, which stays with the run.
    same = len(parts) > 1 and math.isclose(total, entry.importance, abs_tol=1e-12)
    if not same or entry.latency > math.fsum(part.latency for part in parts) * (1 + 1e-9):
        return [entry]
    return parts

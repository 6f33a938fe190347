"""From a model and two tables to plans: the candidates' importances, the frontier, the choice.

Glue between what is found on the graph (`graphfold.candidates`, `graphfold.cuts`), what was
measured (`graphfold.measures`) and the solver (`graphfold.methods`). The whole network's latency is
the rows of a choice plus the table's rest; a speedup is over all steps unchanged.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from graphfold import __version__
from graphfold.assembly import assemble_plan, changes_anything, objective
from graphfold.candidates import Candidates, find_candidates
from graphfold.cuts import CutLayout, choice_row, cut_layout, is_no_change
from graphfold.depth_table import Ends, depth_rows
from graphfold.drops import find_drops, is_drop, with_whole_blocks
from graphfold.errors import BudgetError, UsageError
from graphfold.graph import Graph
from graphfold.importance import Change, DataFree, data_free
from graphfold.losses import Losses
from graphfold.masking import find_blocks
from graphfold.measures import (
    ImportanceHeader,
    ImportanceRow,
    ImportanceTable,
    LatencyTable,
    Row,
    check_names,
    join,
)
from graphfold.methods import Method, Pieces, may_choose, solve
from graphfold.plan import ModelReference, Plan
from graphfold.reasons import what_ends_segments, why_nothing_changes
from graphfold.solver import Floor, Frontier, Solution

if TYPE_CHECKING:
    from graphfold.model import Model

# A budget that equals a sum of the table must still find it.
_ROUNDING = 1e-9


@dataclass(frozen=True)
class Point:
    """One plan of the frontier: what it is predicted to cost and to be worth.

    Attributes:
        latency: of the whole network, in milliseconds.
        speedup: over the network as it is.
        importance: sum over the segments; 0 for no change where importances are differences.
        segments: number of segments that change.
    """

    latency: float
    speedup: float
    importance: float
    segments: int


@dataclass(frozen=True)
class Planning:
    """Everything that can be chosen for a model on a device: the whole frontier.

    Attributes:
        candidates, cuts: what was found on the graph.
        latencies, importances: the tables.
        frontier: of the solver, on the tables' rows alone.
        original: latency of the network as it is, in milliseconds.
        method: what could be chosen.
    """

    candidates: Candidates
    cuts: CutLayout
    latencies: LatencyTable
    importances: ImportanceTable
    frontier: Frontier[Pieces]
    original: float
    method: Method = "layermerge"

    def points(self) -> list[Point]:
        """The frontier for people, the fastest first."""
        return [self.point(solution) for solution in self.frontier]

    def point(self, solution: Solution[Pieces]) -> Point:
        """What one solution is predicted to do to the whole network."""
        latency = solution.latency + self.latencies.rest
        layout = self.cuts.layout
        changed = sum(changes_anything(pieces, layout) for pieces in solution.choices)
        return Point(latency, self.original / latency, solution.importance, changed)

    def within(self, budget: float) -> Solution[Pieces]:
        """The most important choice whose whole latency is within a budget in milliseconds.

        Raises:
            BudgetError: even the fastest takes longer; says what it takes.
        """
        try:
            return self.frontier.within(budget - self.latencies.rest + _ROUNDING * budget)
        except BudgetError:
            fastest = self.point(self.frontier.fastest)
            asked = f"{budget:.3f} ms was asked for"
            if not fastest.segments and self.method == "layermerge":
                raise BudgetError(
                    f"nothing can be gained: {self._why_no_gain()}",
                    hint="`graphfold inspect --segments` lists every segment and what ends it",
                ) from None
            if not fastest.segments:
                raise BudgetError(
                    f"nothing that {self.method} may choose is faster than the model as it is, "
                    f"which takes {fastest.latency:.3f} ms; {asked}",
                    hint="another --method may choose something else",
                ) from None
            raise BudgetError(
                f"the fastest plan takes {fastest.latency:.3f} ms, {fastest.speedup:.2f} times the "
                f"speed of the model as it is; {asked}; {what_ends_segments(self.candidates)}",
                hint="ask for less; `graphfold plan --frontier` lists what there is",
            ) from None

    def _why_no_gain(self) -> str:
        changes = sum(not row.unchanged for row in self.latencies.rows)
        if changes == 1:
            return "the only replacement is not faster than what it replaces"
        if changes:
            return (
                f"none of the {changes} replacements that were measured is faster than what it "
                f"replaces"
            )
        changing = (
            not is_no_change(each, choice)
            for each in self.candidates.found
            for choice in each.choices
        )
        if any(changing):
            return "every replacement is so much larger than what it replaces that none can pay"
        return f"no convolution can be merged or dropped: {why_nothing_changes(self.candidates)}"

    def plan(
        self,
        solution: Solution[Pieces],
        *,
        budget: float | None = None,
        boundary: str = "exact",
        model: ModelReference | None = None,
    ) -> Plan:
        """The plan file's content for a solution, with what it was made for."""
        usual = Ends(self.candidates).usual
        return assemble_plan(
            self._with_whole_blocks(solution),
            self.cuts.layout,
            boundary="hoist" if boundary == "hoist" else "exact",
            activation=None if usual is None else {"like": usual.name},
            model=model,
            objective=objective(solution, self.latencies, self.importances, budget=budget),
        )

    def _with_whole_blocks(self, solution: Solution[Pieces]) -> Solution[Pieces]:
        """A residual block without any of its convolutions goes whole; that is faster still."""
        rows = [row for pieces in solution.choices for row in pieces]
        instead = with_whole_blocks(rows, find_drops(self.candidates))
        entries = [
            replace(
                entry,
                choice=tuple(
                    found for row in entry.choice if (found := instead.get(row, row)) is not None
                ),
            )
            for entry in solution.entries
        ]
        return replace(solution, entries=tuple(entries))


def prepare(
    model: Model,
    latencies: LatencyTable,
    importance: ImportanceTable | DataFree,
    *,
    method: Method = "layermerge",
    compat: float | None = None,
    input_shapes: Mapping[str, Sequence[int]] | None = None,
) -> Planning:
    """Solve for every budget at once.

    Args:
        model: the model that the latencies were measured on.
        latencies: of its steps and candidates.
        importance: a table, or how to make one without data.
        method: which candidates may be chosen, and together.
        compat: steps per millisecond of the published discretisation; None is exact.
        input_shapes: sizes that the model leaves open, for MAC counts.

    Raises:
        MeasuresError: tables that name other tensors, or do not match.
        UsageError: the model has nothing to plan for, or nothing that the method may choose.
    """
    graph = Graph(model)
    tensors = {name for name in graph.values() if name}
    check_names(latencies, tensors)
    candidates = find_candidates(graph)
    cuts = cut_layout(candidates)
    measured = isinstance(importance, ImportanceTable) and is_measured(importance)
    _check_method(method, measured)
    scope = _Scope(candidates, cuts, method, drops=measured)
    offered = scope.of(latencies)
    if isinstance(importance, ImportanceTable):
        check_names(importance, tensors)
        table = importance
        worth = scope.of(importance)
        offered = scope.without_unknown_drops(offered, worth)
        offered = without_unknown_fits(offered, worth)
    else:
        offered = without_unknown_fits(offered, None)
        table = worth = importance_without_data(
            candidates, importance, method=method, latencies=offered, input_shapes=input_shapes
        )
    scope.check_any_drop(latencies, offered)
    frontier = solve(
        join(offered, worth),
        cuts.layout,
        method,
        compat=None if compat is None else Floor(compat),
        blocks=scope.blocks(),
        additions=additions(latencies),
    )
    unchanged = sum(row.value for row in latencies.rows if row.unchanged)
    return Planning(
        candidates, cuts, latencies, table, frontier, unchanged + latencies.rest, method
    )


def is_measured(importances: ImportanceTable) -> bool:
    """Whether importances are measured damages, of fitted weights."""
    return importances.header.method == "regress"


def _check_method(method: Method, measured: bool) -> None:
    if measured and method != "layermerge":
        raise UsageError(
            f"--method {method} is about merged weights, and the importances are of fitted ones",
            hint="--method layermerge",
        )


def without_unknown_fits(
    latencies: LatencyTable, importances: ImportanceTable | None
) -> LatencyTable:
    """The table without fitted replacements whose importance is not known: not to be chosen."""
    known: defaultdict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in importances.rows if importances is not None else ():
        known[row.input, row.output].append(row)
    rows = tuple(
        row
        for row in latencies.rows
        if not row.is_fitted
        or any(row.common(other) is not None for other in known[row.input, row.output])
    )
    return latencies.model_copy(update={"rows": rows})


def additions(latencies: LatencyTable) -> dict[str, float]:
    """Latencies of an activation where the model has none, by tensor; rows that lead nowhere."""
    return {row.input: row.value for row in latencies.rows if row.input == row.output}


_Table = TypeVar("_Table", LatencyTable, ImportanceTable)


class _Scope:
    """What of a table's rows one method may choose."""

    def __init__(
        self, candidates: Candidates, cuts: CutLayout, method: Method, *, drops: bool = False
    ) -> None:
        self._drops = drops
        self._candidates = candidates
        self._layout = cuts.layout
        self._method = method
        self._lone = {
            (each.input.name, each.output.name)
            for each in candidates.found
            if any(choice.family == "identity" for choice in each.choices)
        }

    def of(self, table: _Table) -> _Table:
        """The table with these rows alone."""
        rows = tuple(row for row in table.rows if self._may_choose(row))
        return table.model_copy(update={"rows": rows})

    def _may_choose(self, row: Row) -> bool:
        if row.input == row.output or not may_choose(self._method, row):
            return False
        if not is_drop(row) or self._method == "sequential" or self._drops:
            return True
        if self._method == "layer-only":
            span = self._layout.span(row.input, row.output)
            # What is wrong with its tensors is told where all rows are placed.
            return not isinstance(span, tuple) or span[1] == span[0] + 1
        return (row.input, row.output) in self._lone

    def without_unknown_drops(
        self, latencies: LatencyTable, importances: ImportanceTable
    ) -> LatencyTable:
        """What may be dropped is what the importances tell the worth of."""
        known = {(row.input, row.output) for row in importances.rows if is_drop(row)}
        rows = tuple(
            row
            for row in latencies.rows
            if not is_drop(row) or (row.input, row.output) in known | self._lone
        )
        return latencies.model_copy(update={"rows": rows})

    def check_any_drop(self, latencies: LatencyTable, offered: LatencyTable) -> None:
        """Tell why there is nothing to drop, where the method does nothing else.

        Raises:
            UsageError: the model has no convolution that may go, or a table no row for one.
        """
        if self._method != "layer-only" or any(is_drop(row) for row in offered.rows):
            return
        if any(is_drop(row) for row in self.of(latencies).rows):
            raise UsageError("the importance table has no row of a convolution dropped by itself")
        if any(len(each.candidate.convs) == 1 for each in find_drops(self._candidates)):
            raise UsageError(
                "the latency table has no row of a convolution dropped by itself",
                hint="`graphfold profile` of this version makes them",
            )
        raise UsageError(
            "no convolution of this model may be dropped by itself: each changes the number of "
            "channels or the resolution",
            hint="--method layermerge",
        )

    def blocks(self) -> list[tuple[str, str]]:
        """Ends of the blocks that depthshrinker chooses among: inverted residuals, else residuals.

        Raises:
            UsageError: the method needs blocks, and the model has none.
        """
        if self._method != "depthshrinker":
            return []
        found = find_blocks(self._candidates)
        if not found:
            raise UsageError(
                "the model has no inverted-residual or residual blocks to choose among",
                hint="--method layermerge chooses among all segments",
            )
        return [(block.input.name or "", block.output.name or "") for block in found]


def importance_without_data(
    candidates: Candidates,
    kind: DataFree,
    *,
    method: Method = "layermerge",
    latencies: LatencyTable | None = None,
    input_shapes: Mapping[str, Sequence[int]] | None = None,
) -> ImportanceTable:
    """Importances of candidates by what they remove; see `graphfold.importance`.

    Args:
        candidates: of a graph.
        kind: what is counted.
        method: whose choices.
        latencies: only what this table has a row for; all by default.
        input_shapes: sizes that the model leaves open.

    Raises:
        UsageError: MACs depend on sizes that are not known.
    """
    losses = Losses(candidates, input_shapes)
    changes = list(_changes(candidates, losses, method))
    if latencies is not None:
        keys = {_short_key(row) for row in latencies.rows}
        changes = [(row, change) for row, change in changes if _short_key(row) in keys]
    values = data_free(kind, [change for _, change in changes], losses.whole())
    rows = tuple(
        ImportanceRow(**_fields(row), value=value)
        for (row, _), value in zip(changes, values, strict=True)
    )
    header = ImportanceHeader(created_by=f"graphfold {__version__}", method=kind)
    return ImportanceTable(header=header, no_change=0.0, rows=rows)


def _changes(
    candidates: Candidates, losses: Losses, method: Method
) -> Iterator[tuple[Row, Change]]:
    """What a method may do to each segment; for depth also what leaves it as it is."""
    if method in ("depth", "sequential"):
        yield from _changes_with_states(candidates, losses)
    elif method != "layer-only":
        for candidate in candidates.found:
            for choice in candidate.choices:
                row = choice_row(candidate, choice)
                if not is_no_change(candidate, choice) and may_choose(method, row):
                    yield row, losses.change(candidate, choice)
    if method in ("layer-only", "sequential"):
        for drop in find_drops(candidates):
            yield drop.row, losses.change(drop.candidate, drop.choice)


def _changes_with_states(candidates: Candidates, losses: Losses) -> Iterator[tuple[Row, Change]]:
    ends = Ends(candidates)
    found = {(each.input.name, each.output.name): each for each in candidates.found}
    steps = {(step.input, step.output) for step in cut_layout(candidates).steps}
    for row in depth_rows(candidates):
        candidate = found[row.input, row.output]
        added = int(bool(row.end_active) and ends.may_end_without(candidate.output))
        if row.unchanged:
            yield row, Change(activations=added)
            continue
        merge = next(choice for choice in candidate.choices if not choice.removed_convs)
        change = losses.change(candidate, merge)
        yield row, replace(change, activations=change.activations + added)
        if (row.input, row.output) in steps:
            # Branches without cuts inside, which may stay as they are with the same states.
            kept = Row(
                input=row.input,
                output=row.output,
                unchanged=True,
                start_active=row.start_active,
                end_active=row.end_active,
            )
            yield kept, Change(activations=added)


def _short_key(row: Row) -> tuple[object, ...]:
    """What tells the choices of one graph apart."""
    if row.unchanged:
        return row.input, row.output
    return row.input, row.output, row.kernel, row.family


def _fields(row: Row) -> dict[str, Any]:
    return {name: getattr(row, name) for name in row.model_fields_set}


def spread_over(points: Sequence[Point], count: int) -> list[Point]:
    """About `count` of a frontier's points, evenly over the speedups they reach, for people."""
    if len(points) <= count:
        return list(points)
    ordered = sorted(points, key=lambda point: point.speedup)
    low, high = ordered[0].speedup, ordered[-1].speedup
    wanted = np.linspace(low, high, count)
    chosen = {min(range(len(ordered)), key=lambda at: abs(ordered[at].speedup - x)) for x in wanted}
    return [ordered[at] for at in sorted(chosen)]

"""From a model and two tables to plans: the candidates' importances, the frontier, the choice.

Glue between what is found on the graph (`graphfold.candidates`, `graphfold.cuts`), what was
measured (`graphfold.measures`) and the solver (`graphfold.methods`). The whole network's latency is
the rows of a choice plus the table's rest; a speedup is over all steps unchanged.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from graphfold import __version__
from graphfold.assembly import assemble_plan, objective
from graphfold.candidates import Candidate, Candidates, find_candidates
from graphfold.choices import Choice
from graphfold.cuts import CutLayout, choice_row, cut_layout, is_no_change
from graphfold.errors import BudgetError
from graphfold.graph import Graph
from graphfold.importance import DataFree, data_free
from graphfold.losses import Losses
from graphfold.measures import (
    ImportanceHeader,
    ImportanceRow,
    ImportanceTable,
    LatencyTable,
    Row,
    check_names,
    join,
)
from graphfold.methods import Method, Pieces, solve
from graphfold.plan import ModelReference, Plan
from graphfold.reasons import what_ends_segments, why_nothing_changes
from graphfold.segments import inverted_residuals
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
    """

    candidates: Candidates
    cuts: CutLayout
    latencies: LatencyTable
    importances: ImportanceTable
    frontier: Frontier[Pieces]
    original: float

    def points(self) -> list[Point]:
        """The frontier for people, the fastest first."""
        return [self.point(solution) for solution in self.frontier]

    def point(self, solution: Solution[Pieces]) -> Point:
        """What one solution is predicted to do to the whole network."""
        latency = solution.latency + self.latencies.rest
        changed = sum(not row.unchanged for pieces in solution.choices for row in pieces)
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
            if not fastest.segments:
                raise BudgetError(
                    f"nothing can be gained: {self._why_no_gain()}",
                    hint="`graphfold inspect --segments` lists every segment and what ends it",
                ) from None
            raise BudgetError(
                f"the fastest plan takes {fastest.latency:.3f} ms, {fastest.speedup:.2f} times the "
                f"speed of the model as it is; {budget:.3f} ms was asked for; "
                f"{what_ends_segments(self.candidates)}",
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
        if any(_changing(self.candidates)):
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
        return assemble_plan(
            solution,
            self.cuts.layout,
            boundary="hoist" if boundary == "hoist" else "exact",
            model=model,
            objective=objective(solution, self.latencies, self.importances, budget=budget),
        )


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
        UsageError: the model has nothing to plan for.
    """
    graph = Graph(model)
    tensors = {name for name in graph.values() if name}
    check_names(latencies, tensors)
    candidates = find_candidates(graph)
    cuts = cut_layout(candidates)
    if isinstance(importance, ImportanceTable):
        check_names(importance, tensors)
        table = importance
    else:
        table = importance_without_data(
            candidates, importance, latencies=latencies, input_shapes=input_shapes
        )
    blocks = [
        (block.input.name or "", block.output.name or "")
        for block in (inverted_residuals(graph) if method == "depthshrinker" else ())
    ]
    frontier = solve(
        join(latencies, table),
        cuts.layout,
        method,
        compat=None if compat is None else Floor(compat),
        blocks=blocks,
    )
    unchanged = sum(row.value for row in latencies.rows if row.unchanged)
    return Planning(candidates, cuts, latencies, table, frontier, unchanged + latencies.rest)


def importance_without_data(
    candidates: Candidates,
    kind: DataFree,
    *,
    latencies: LatencyTable | None = None,
    input_shapes: Mapping[str, Sequence[int]] | None = None,
) -> ImportanceTable:
    """Importances of candidates by what they remove; see `graphfold.importance`.

    Args:
        candidates: of a graph.
        kind: what is counted.
        latencies: only what this table has a row for; all by default.
        input_shapes: sizes that the model leaves open.

    Raises:
        UsageError: MACs depend on sizes that are not known.
    """
    losses = Losses(candidates, input_shapes)
    pairs = list(_changing(candidates))
    if latencies is not None:
        keys = {_short_key(row) for row in latencies.rows if not row.unchanged}
        pairs = [pair for pair in pairs if _short_key(choice_row(*pair)) in keys]
    changes = [losses.change(candidate, choice) for candidate, choice in pairs]
    values = data_free(kind, changes, losses.whole())
    rows = tuple(
        ImportanceRow(**_fields(candidate, choice), value=value)
        for (candidate, choice), value in zip(pairs, values, strict=True)
    )
    header = ImportanceHeader(created_by=f"graphfold {__version__}", method=kind)
    return ImportanceTable(header=header, no_change=0.0, rows=rows)


def _changing(candidates: Candidates) -> Iterator[tuple[Candidate, Choice]]:
    for candidate in candidates.found:
        for choice in candidate.choices:
            if not is_no_change(candidate, choice):
                yield candidate, choice


def _short_key(row: Row) -> tuple[object, ...]:
    """What tells the choices of one graph apart."""
    return row.input, row.output, row.kernel, row.family


def _fields(candidate: Candidate, choice: Choice) -> dict[str, Any]:
    row = choice_row(candidate, choice)
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

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
from graphfold.cost import analyze
from graphfold.cuts import CutLayout, choice_row, cut_layout, is_no_change
from graphfold.errors import BudgetError, UsageError
from graphfold.graph import Graph
from graphfold.importance import Change, DataFree, Whole, data_free
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
            raise BudgetError(
                f"the fastest plan takes {fastest.latency:.3f} ms, {fastest.speedup:.2f} times the "
                f"speed of the model as it is; {budget:.3f} ms was asked for",
                hint="ask for less; `graphfold plan --frontier` lists what there is",
            ) from None

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
    sizes = _Sizes(candidates, input_shapes)
    pairs = list(_changing(candidates))
    if latencies is not None:
        keys = {_short_key(row) for row in latencies.rows if not row.unchanged}
        pairs = [pair for pair in pairs if _short_key(choice_row(*pair)) in keys]
    changes = [sizes.change(candidate, choice) for candidate, choice in pairs]
    values = data_free(kind, changes, sizes.whole())
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


class _Sizes:
    """MACs and l1 norms of convolutions, counted once."""

    def __init__(
        self, candidates: Candidates, input_shapes: Mapping[str, Sequence[int]] | None
    ) -> None:
        self.candidates = candidates
        graph = candidates.graph
        cost = analyze(graph, input_shapes=input_shapes)
        macs = {node.output: node.macs for node in cost.nodes}
        self._macs: dict[str, int] = {}
        for site in candidates.sites.convs:
            known = macs.get(site.name)
            if known is None:
                raise UsageError(
                    f"the multiply-adds of {site.name!r} depend on sizes that are not known",
                    hint="give --input-shape",
                )
            self._macs[site.name] = known
        self._l1 = {site.name: _l1(graph, site.conv.inputs[1]) for site in candidates.sites.convs}

    def whole(self) -> Whole:
        sites = self.candidates.sites
        return Whole(
            activations=len(sites.activations),
            convs=len(sites.convs),
            macs=sum(self._macs.values()),
            l1=sum(self._l1.values()),
        )

    def change(self, candidate: Candidate, choice: Choice) -> Change:
        last = candidate.convs[-1]
        # MACs per output pixel are a convolution's weights.
        weights = last.out_channels * (last.in_channels // last.groups) * int(np.prod(last.kernel))
        pixels = self._macs[last.name] // max(1, weights)
        width = 1 if choice.family == "depthwise" else candidate.convs[0].in_channels
        after = pixels * last.out_channels * width * int(np.prod(choice.kernel))
        return Change(
            activations=len(candidate.activations),
            convs=len(choice.removed_convs),
            macs_before=sum(self._macs[site.name] for site in candidate.convs),
            macs_after=after,
            l1_removed=sum(self._l1[name] for name in choice.removed_convs),
        )


def _l1(graph: Graph, value: Any) -> float:
    weight = graph.constant(value)
    assert weight is not None
    return float(np.abs(weight).sum(dtype=np.float64))


def spread_over(points: Sequence[Point], count: int) -> list[Point]:
    """About `count` of a frontier's points, evenly over the speedups they reach, for people."""
    if len(points) <= count:
        return list(points)
    ordered = sorted(points, key=lambda point: point.speedup)
    low, high = ordered[0].speedup, ordered[-1].speedup
    wanted = np.linspace(low, high, count)
    chosen = {min(range(len(ordered)), key=lambda at: abs(ordered[at].speedup - x)) for x in wanted}
    return [ordered[at] for at in sorted(chosen)]

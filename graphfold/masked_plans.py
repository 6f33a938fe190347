"""What masks that are off save, by a latency table, and the plan that they mean.

Activations that are gone leave linear runs; which of them become one convolution is the table's
choice: the fastest way through. What merging does not pay for stays as it is, its activations
gone (a loose removal), so that plan and masks always mean the same network.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from graphfold.assembly import assemble_plan
from graphfold.candidates import Candidates
from graphfold.cuts import cut_layout
from graphfold.errors import PlanError
from graphfold.graph import Graph
from graphfold.identity import model_reference
from graphfold.masking import Mask
from graphfold.measures import Candidate, LatencyTable, check_names
from graphfold.methods import Pieces, solve
from graphfold.plan import Plan, Segment
from graphfold.reference import build_reference
from graphfold.resolve import resolve_plan
from graphfold.rewrite import select_passes
from graphfold.solver import Solution

if TYPE_CHECKING:
    from graphfold.model import Model

BoundaryChoice = Literal["auto", "exact", "hoist"]


class Predictions:
    """Latencies of a network without some of its activations.

    Args:
        candidates: of the graph.
        masks: what may go.
        table: of the device.

    Attributes:
        original: milliseconds of the network as it is.
        savings: of each mask, in milliseconds: the mean of going first and of going last, since
            what one activation saves depends on what else is gone.

    Raises:
        MeasuresError: a table of another model.
    """

    def __init__(self, candidates: Candidates, masks: Sequence[Mask], table: LatencyTable) -> None:
        check_names(table, {name for name in candidates.graph.values() if name})
        self.table = table
        self.layout = cut_layout(candidates).layout
        self._masks = masks
        self._steps = [Candidate(row, row.value, 0.0) for row in table.rows if row.unchanged]
        self._merges = self._mergeable(candidates)
        self._known: dict[frozenset[int], Solution[Pieces]] = {}
        self.original = table.rest + sum(step.latency for step in self._steps)
        every = frozenset(range(len(masks)))
        none_gone, all_gone = self.latency(frozenset()), self.latency(every)
        self.savings = tuple(
            (none_gone - self.latency(frozenset({at})) + self.latency(every - {at}) - all_gone) / 2
            for at in range(len(masks))
        )

    def _mergeable(self, candidates: Candidates) -> list[tuple[Candidate, frozenset[int]]]:
        """Merges that only drop masked activations, each with the masks it needs to be off."""
        owner = {name: number for number, mask in enumerate(self._masks) for name in mask.sites}
        inside = {
            (each.input.name, each.output.name): each.activations for each in candidates.found
        }
        # A mask of a whole block is for that block: others of its activations stay behind it.
        blocks = {
            (
                self.layout.cut(mask.block.input.name or ""),
                self.layout.cut(mask.block.output.name or ""),
            )
            for mask in self._masks
            if mask.block is not None
        }
        found = []
        for row in self.table.rows:
            merges = not (row.unchanged or row.removed_convs or row.is_fitted)
            activations = inside.get((row.input, row.output), ())
            if not merges or row.family == "identity" or not activations:
                continue
            ends = (self.layout.cut(row.input), self.layout.cut(row.output))
            if (not blocks or ends in blocks) and all(s.name in owner for s in activations):
                needed = frozenset(owner[site.name] for site in activations)
                found.append((Candidate(row, row.value, 0.0), needed))
        return found

    def solution(self, removed: frozenset[int]) -> Solution[Pieces]:
        """The fastest way through the network without the activations of these masks."""
        found = self._known.get(removed)
        if found is None:
            merges = [merge for merge, needed in self._merges if needed <= removed]
            found = solve([*self._steps, *merges], self.layout).fastest
            self._known[removed] = found
        return found

    def latency(self, removed: frozenset[int]) -> float:
        """Milliseconds of the whole network."""
        return self.solution(removed).latency + self.table.rest


def masked_plan(
    model: Model,
    masks: Sequence[Mask],
    removed: frozenset[int],
    predictions: Predictions | None,
    *,
    boundary: BoundaryChoice = "auto",
    objective: dict[str, Any] | None = None,
) -> Plan:
    """The plan that removes the activations of some masks, and merges what that makes linear.

    Without latencies a block becomes one convolution wherever it can, as in the paper, and single
    activations go without a merge being stated: `optimize` merges by multiply-adds.

    Args:
        model: to apply it to.
        masks: all of them.
        removed: numbers of those that go.
        predictions: of the device.
        boundary: where padding stands in merged segments; auto hoists it where no merge is exact.
        objective: what the plan was made for.
    """
    sites = [name for at in sorted(removed) for name in masks[at].sites]
    stated: list[Segment] = []
    if predictions is not None:
        merged = assemble_plan(predictions.solution(removed), predictions.layout)
        stated = merged.segments
    else:
        blocks = [block for at in sorted(removed) if (block := masks[at].block) is not None]
        stated = [
            Segment(input=block.input.name or "", output=block.output.name or "", boundary="exact")
            for block in blocks
            if block.pays
        ]
    plan = Plan(
        graphfold_plan=1,
        model=model_reference(model),
        segments=stated,
        objective=objective,
    )
    hoisted = range(len(stated)) if boundary == "hoist" else ()
    return _accepted(model, plan, sites, dict.fromkeys(hoisted, True), boundary)


def _accepted(
    model: Model,
    plan: Plan,
    sites: Sequence[str],
    changes: dict[int, bool],
    boundary: BoundaryChoice,
) -> Plan:
    """The plan with padding hoisted where it must be; what cannot be merged stays unmerged."""
    graph = Graph(model)
    while True:
        plan = _changed(graph, plan, sites, changes)
        try:
            build_reference(model, plan, select_passes())
        except PlanError as error:
            changes = {}
            for problem in error.problems:
                match = re.match(r"segments\[(\d+)\]", problem.path)
                if match is None:
                    raise
                can_hoist = boundary == "auto" and "hoist would work" in (problem.hint or "")
                changes[int(match[1])] = can_hoist
        else:
            return plan


def _changed(graph: Graph, plan: Plan, sites: Sequence[str], changes: dict[int, bool]) -> Plan:
    """A plan with some segments hoisted (True) or left out (False).

    What no segment removes goes by itself.
    """
    segments = [
        segment.model_copy(update={"boundary": "hoist"}) if changes.get(at) else segment
        for at, segment in enumerate(plan.segments)
        if changes.get(at, True)
    ]
    plan = plan.model_copy(update={"segments": segments, "remove_activations": []})
    resolved = resolve_plan(graph, plan)
    held = {site.name for segment in resolved.segments for site in segment.activations}
    loose = [name for name in sites if name not in held]
    return plan.model_copy(update={"remove_activations": loose})

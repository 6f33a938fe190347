"""From the segments found on a graph to the positions that the solver walks, and their steps.

Cuts are the tensors at which candidate segments begin or end. Between two neighbouring cuts of a
chain stands either a step, the model's own operators as they are, or branches with chains of their
own and what joins them. The nodes of all steps are disjoint, so their latencies add up; what no
step holds (the stem's pool, the head) is the rest of the network.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import onnx_ir as ir

from graphfold.candidates import Candidate, Candidates
from graphfold.choices import Choice
from graphfold.flow import FlowChain
from graphfold.layout import Chain, Layout
from graphfold.measures import Row
from graphfold.plan import Norm
from graphfold.reasons import nothing_to_plan

# Where a network has several chains side by side, they hang between these two.
_BEGIN, _END = "(begin)", "(end)"


@dataclass(frozen=True)
class Step:
    """What stands unchanged between two neighbouring cuts.

    Attributes:
        input, output: as rows of tables name it, behind and before the activations there.
        nodes: in execution order, the activation behind `output` included.
        joins: whether it joins branches.
    """

    input: str
    output: str
    nodes: tuple[ir.Node, ...]
    joins: bool = False

    def row(self) -> Row:
        """Its key in tables."""
        return Row(input=self.input, output=self.output, unchanged=True)


@dataclass(frozen=True)
class CutLayout:
    """Positions of all cuts, and the steps between them."""

    layout: Layout
    steps: tuple[Step, ...]


def cut_layout(candidates: Candidates) -> CutLayout:
    """The positions and steps that a graph's candidates need.

    Raises:
        UsageError: there is no candidate: nothing in the model can be planned.
    """
    if not candidates.found:
        raise nothing_to_plan(candidates)
    builder = _Builder(candidates)
    roots = [
        chain
        for number, flow in enumerate(candidates.chains)
        if flow.parent is None
        for chain in builder.chains(number)
    ]
    whole = roots[0] if len(roots) == 1 else Chain((_BEGIN, _END), {0: tuple(roots)})
    layout = Layout(whole, builder.activations, builder.places(), builder.norms())
    return CutLayout(layout, tuple(builder.steps))


def choice_row(candidate: Candidate, choice: Choice) -> Row:
    """The key in tables of one choice of a segment."""
    return Row(
        input=candidate.input.name or "",
        output=candidate.output.name or "",
        kernel=choice.kernel,
        stride=choice.stride,
        family=choice.family,
        removed_convs=choice.removed_convs,
    )


def is_no_change(candidate: Candidate, choice: Choice) -> bool:
    """Whether a choice leaves one convolution as it is: the unchanged step says that already."""
    alone = len(candidate.convs) == 1 and not candidate.adds and not candidate.activations
    return alone and not choice.removed_convs


class _Builder:
    def __init__(self, candidates: Candidates) -> None:
        self._candidates = candidates
        self.flows = candidates.chains
        self.steps: list[Step] = []
        self.activations: dict[str, str] = {}
        self._active = {site.output: site for site in candidates.sites.activations}
        self._activated = candidates.activated
        self._inside: dict[int, list[int]] = {}
        for number, flow in enumerate(self.flows):
            if flow.parent is not None:
                self._inside.setdefault(flow.parent[0], []).append(number)
        self._ends = [(each.input, each.output) for each in candidates.found]

    def places(self) -> dict[str, str]:
        """Where activations behind ends of branches stand, and which there are."""
        found: dict[str, str] = {}
        for _, output in self._ends:
            place = self._candidates.activation_place(output)
            name = place.name or ""
            if place is not output:
                found[output.name or ""] = name
            site = self._activated.get(place)
            if site is not None:
                self.activations.setdefault(name, site.name)
        return found

    def norms(self) -> dict[tuple[str, str], Norm]:
        """What becomes of the normalisations by groups in segments."""
        return {
            (self._before(each.input).name or "", self._before(each.output).name or ""): each.norm
            for each in self._candidates.found
            if each.norm is not None
        }

    def chains(self, number: int) -> Iterator[Chain]:
        """A flow chain as a chain of cuts, and the chains inside it that lie between none."""
        flow = self.flows[number]
        cuts = self._cuts(flow)
        first, last = (cuts[0][1], cuts[-1][0]) if len(cuts) > 1 else (0, 0)
        for inside in self._inside.get(number, ()):
            if not first <= (self.flows[inside].parent or (0, -1))[1] < last:
                yield from self.chains(inside)
        if len(cuts) < 2:
            return
        branches: dict[int, tuple[Chain, ...]] = {}
        for _, behind in cuts:
            self._name(flow.points[behind].value)
        names = [self._name(flow.points[before].value) for before, _ in cuts]
        for index, ((_, start), (before, behind)) in enumerate(pairwise(cuts)):
            nodes = [node for step in flow.steps[start:behind] for node in step]
            inner = [
                chain
                for other in self._inside.get(number, ())
                if start <= (self.flows[other].parent or (0, -1))[1] < before
                for chain in self.chains(other)
            ]
            source = flow.points[start].value.name or ""
            if inner:
                branches[index] = tuple(inner)
                taken = {node for step in self.steps for node in step.nodes}
                nodes = [node for node in nodes if node not in taken]
                source = inner[-1].tensors[-1]
            self.steps.append(Step(source, names[index + 1], tuple(nodes), bool(inner)))
        yield Chain(tuple(names), branches)

    def _cuts(self, flow: FlowChain) -> list[tuple[int, int]]:
        """Positions on a chain where segments begin or end: before and behind the activation."""
        values = {point.value: index for index, point in enumerate(flow.points)}
        cuts: dict[int, int] = {}
        for source, target in self._ends:
            if source not in values or target not in values:
                continue
            for index in (values[source], values[target]):
                before = values.get(self._before(flow.points[index].value), index)
                site = self._activated.get(flow.points[before].value)
                cuts[before] = before if site is None else values.get(site.output, before)
        return sorted(cuts.items())

    def _before(self, value: ir.Value) -> ir.Value:
        """The tensor before the activation that made this one and alone reads that."""
        site = self._active.get(value)
        return value if site is None else site.input

    def _name(self, value: ir.Value) -> str:
        """How tables call a cut: by the tensor before its activation, wherever that lies."""
        before = self._before(value).name or ""
        if before != value.name:
            self.activations[before] = value.name or ""
        return before

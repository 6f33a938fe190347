"""Merge branches that are summed: a linear branch plus its skip is one convolution.

y = W * x + b + x has the Dirac kernel added to W: +1 at the tap that reads the pixel itself
(stride 1, equal channels). Branches of the same input are sums of kernels aligned by padding: a
1x1 branch is one tap, a normalised skip a scaled Dirac (see graphfold.affine). A segment of a plan
that holds whole branches becomes one convolution; loose sums are merged where cost falls.

Refused: branches with different strides, broadcasts, or output sizes; and what merge_convs
refuses within a branch.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from graphfold.errors import NotExactError
from graphfold.graph import is_op
from graphfold.linear import OPERATORS, is_join, variable_inputs
from graphfold.merge import (
    MergeCandidate,
    current_region,
    has_join,
    merge_region,
    merged_geometry,
    segment_nodes,
    segment_regions,
)
from graphfold.regions import Region, find_region
from graphfold.rewrite import Fold, Pass, Phase, Work
from graphfold.runs import NOMINAL_SIZE, RunCost, best_split, chains, growth, merged_cost

_LARGEST_REGION = 64


@dataclass(frozen=True)
class MergeResidual(Pass):
    """One convolution for each sum of linear branches."""

    name: ClassVar[str] = "merge_residual"
    phase: ClassVar[Phase] = Phase.FOLD
    order: ClassVar[int] = 0

    def find(self, work: Work) -> Iterable[MergeCandidate]:
        """Segments with a join, then loose sums whose branches are linear."""
        found = [each for each in segment_regions(work) if has_join(work, each.region)]
        if found:
            return found
        owned = segment_nodes(work)
        order = {node: index for index, node in enumerate(work.graph.ir)}
        for node in work.graph.nodes():
            if node in owned or not is_op(node, "Add", "Sum") or not is_join(work.graph, node):
                continue
            region = _region_of_sum(work, node, order, owned)
            if region is not None:
                found.append(MergeCandidate(region))
        # A sum around others first: what it merges, they need not.
        return found[::-1]

    def label(self, candidate: MergeCandidate) -> str:
        """The output tensor of the merge."""
        return candidate.region.output.name or ""

    def check(self, work: Work, candidate: MergeCandidate) -> str | None:
        """Refuse loose sums that no convolution equals, or that would cost more merged."""
        if candidate.segment is not None:
            return None
        if any(node.graph is None for node in candidate.region.nodes):
            return "it was merged with a sum around it"
        region = current_region(work, candidate.region)
        try:
            geometry = merged_geometry(work, region)
            sizes = work.graph.sizes(region.entry) or (None,) * geometry.rank
            nominal = tuple(NOMINAL_SIZE if size is None else size for size in sizes)
            merged = merged_cost(work, geometry, sizes, nominal)
        except NotExactError as error:
            return error.what
        present = _present_cost(work, region)
        if merged > present and not work.allow_growth:
            return f"merging raises cost: {growth(present, merged)}"
        return None

    def rewrite(self, work: Work, candidate: MergeCandidate) -> Fold:
        """Replace the branches and their sum by one convolution."""
        region = current_region(work, candidate.region)
        return merge_region(work, MergeCandidate(region, candidate.segment), self.name)


def _region_of_sum(
    work: Work, join: ir.Node, order: dict[ir.Node, int], owned: set[ir.Node]
) -> Region | None:
    """From a sum back to the one tensor that all its branches read, through linear operators."""
    graph = work.graph
    frontier = set(variable_inputs(graph, join))
    visited = 0
    while len(frontier) > 1:
        latest = max(frontier, key=lambda value: order.get(value.producer(), -1))  # type: ignore[arg-type]
        producer = latest.producer()
        visited += 1
        if producer is None or producer in owned or visited > _LARGEST_REGION:
            return None
        if not (is_op(producer, *OPERATORS) or is_join(graph, producer)):
            return None
        frontier.remove(latest)
        frontier.update(variable_inputs(graph, producer))
    try:
        return find_region(graph, frontier.pop(), join.outputs[0], order)
    except NotExactError:
        return None


def _present_cost(work: Work, region: Region) -> RunCost:
    """What a region costs with its chains merged where that is cheaper, and its sums."""
    inside = set(region.nodes)
    total = RunCost()
    counted: set[ir.Node] = set()
    for chain in chains(work):
        nodes = [link.node for link in chain.links]
        if inside.issuperset(nodes):
            total = total + best_split(work, chain).cost
            counted.update(nodes)
    sizes = {node: work.graph.sizes(node.outputs[0]) for node in region.nodes}
    for node in region.nodes:
        if node not in counted:
            known = sizes[node] or ()
            pixels = 1
            for size in known:
                pixels *= NOMINAL_SIZE if size is None else size
            channels = work.graph.channels(node.outputs[0]) or 1
            total = total + RunCost(pixels * channels, 0, 1)
    return total

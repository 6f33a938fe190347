"""Merge parallel convolutions whose results are concatenated: one wider convolution.

concat(W1 * x + b1, W2 * x + b2) over channels is [W1; W2] * x + [b1; b2]: the kernels, aligned by
padding, stacked over output channels. Normalisation and constants per channel within a branch
fold in, as do whole linear chains. Nothing is added: with equal kernels, strides, dilations and
padding the multiply-accumulates stay what they were, the input is read once and nothing is
copied.

Refused: branches with different strides, dilations that no common window holds, or output sizes;
branches whose results something else reads; and merges that raise cost, as of a small kernel
beside a large one or of grouped convolutions, whose zeros would be computed.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from graphfold.branches import region_of_join, why_apart
from graphfold.graph import attribute, is_op
from graphfold.linear import is_join
from graphfold.merge import (
    MergeCandidate,
    current_region,
    merge_region,
    merged_geometry,
    segment_nodes,
)
from graphfold.regions import Region, region_macs
from graphfold.rewrite import Fold, Pass, Phase, Work
from graphfold.runs import NOMINAL_SIZE


@dataclass(frozen=True)
class MergeBranches(Pass):
    """One convolution for each concatenation of parallel convolutions."""

    name: ClassVar[str] = "merge_branches"
    phase: ClassVar[Phase] = Phase.FOLD
    order: ClassVar[int] = -1

    def find(self, work: Work) -> Iterable[MergeCandidate]:
        """Loose concatenations over channels of two or more convolutions of one tensor."""
        owned = segment_nodes(work)
        order = {node: index for index, node in enumerate(work.graph.ir)}
        found = []
        for node in work.graph.nodes():
            if node in owned or not is_op(node, "Concat") or not is_join(work.graph, node):
                continue
            # A negative axis is looked at where the rank is known.
            if attribute(node, "axis", 1) > 1:
                continue
            region = region_of_join(work, node, order, owned)
            if region is not None and sum(is_op(each, "Conv") for each in region.nodes) > 1:
                found.append(MergeCandidate(region))
        # A concatenation around others first: what it merges, they need not.
        return found[::-1]

    def label(self, candidate: MergeCandidate) -> str:
        """The output tensor of the merge."""
        return candidate.region.output.name or ""

    def check(self, work: Work, candidate: MergeCandidate) -> str | None:
        """Refuse branches that no convolution equals, or that would cost more merged."""
        reason = why_apart(work, candidate.region)
        return reason if reason is not None else _more_macs(work, candidate.region)

    def rewrite(self, work: Work, candidate: MergeCandidate) -> Fold:
        """Replace the branches and their concatenation by one convolution."""
        region = current_region(work, candidate.region)
        return merge_region(work, MergeCandidate(region), self.name)


def _more_macs(work: Work, region: Region) -> str | None:
    """Copies that are saved do not pay for multiply-accumulates."""
    region = current_region(work, region)
    geometry = merged_geometry(work, region)
    sizes = work.graph.sizes(region.entry) or (None,) * geometry.rank
    nominal = tuple(NOMINAL_SIZE if size is None else size for size in sizes)
    before, after = region_macs(work.graph, region, nominal), geometry.macs(nominal)
    if after > before and not work.allow_growth:
        return f"merging raises cost: {before:,} to {after:,} operations per image"
    return None

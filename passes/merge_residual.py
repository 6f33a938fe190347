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

from graphfold.branches import region_of_join, why_apart
from graphfold.graph import is_op
from graphfold.linear import is_join
from graphfold.merge import (
    MergeCandidate,
    current_region,
    has_join,
    merge_region,
    segment_nodes,
    segment_regions,
)
from graphfold.rewrite import Fold, Pass, Phase, Work


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
            region = region_of_join(work, node, order, owned)
            if region is not None:
                found.append(MergeCandidate(region))
        # A sum around others first: what it merges, they need not.
        return found[::-1]

    def label(self, candidate: MergeCandidate) -> str:
        """The output tensor of the merge."""
        return candidate.region.output.name or ""

    def check(self, work: Work, candidate: MergeCandidate) -> str | None:
        """Refuse loose sums that no convolution equals, or that would cost more merged."""
        return None if candidate.segment is not None else why_apart(work, candidate.region)

    def rewrite(self, work: Work, candidate: MergeCandidate) -> Fold:
        """Replace the branches and their sum by one convolution."""
        region = current_region(work, candidate.region)
        return merge_region(work, MergeCandidate(region, candidate.segment), self.name)

"""Merge chains of convolutions into one: segments of a plan, and loose runs where cost falls.

y = W2 * (W1 * x + b1) + b2 with nothing between is one convolution: kernels compose over the
middle channels, offsets are {a*d1 + b*d2*s1}, strides multiply, padding of the second counts s1
times (see graphfold.affine). BatchNormalization, per-channel constants and zero Pads in the chain
fold in, those that lead to its first convolution too.

In a segment of a plan vectors may be added to all pixels between the convolutions: behind the
merged one they are added as what the convolutions after them make of them (graphfold.vectors).

Where the second convolution zero-pads, its padding is zero and not b1; the bias is then carried
by a border kernel and repaired exactly (graphfold.emit). Refused: a window larger than one whose
output is zero-padded again (3x3 then padded 3x3), since no single convolution is equal at the
border; and, for loose runs, merges that raise cost.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

from graphfold.graph import is_op, only_consumer
from graphfold.merge import MergeCandidate, current_region, has_join, merge_region, segment_regions
from graphfold.rewrite import METADATA_PREFIX, Fold, Pass, Phase, Refused, Work
from graphfold.runs import Chain, best_split, mergeable_chains, why_separate


@dataclass(frozen=True)
class MergeConvs(Pass):
    """One convolution for each chain."""

    name: ClassVar[str] = "merge_convs"
    phase: ClassVar[Phase] = Phase.FOLD
    order: ClassVar[int] = 1

    def find(self, work: Work) -> Iterable[MergeCandidate | Refused]:
        """Segments that are chains, then the pieces of loose chains that are worth merging."""
        found: list[MergeCandidate | Refused] = [
            each for each in segment_regions(work) if not has_join(work, each.region)
        ]
        if found:
            # Their nodes are a barrier to loose runs: those are looked for in the next sweep.
            return found
        for chain in mergeable_chains(work):
            found += _loose(work, chain)
        return found + list(_behind_repairs(work))

    def label(self, candidate: MergeCandidate | Refused) -> str:
        """The output tensor of the merge."""
        if isinstance(candidate, Refused):
            return candidate.output
        return candidate.region.output.name or ""

    def check(self, work: Work, candidate: MergeCandidate | Refused) -> str | None:
        """Refuse what is not equal or not cheaper."""
        del work
        return candidate.reason if isinstance(candidate, Refused) else None

    def rewrite(self, work: Work, candidate: MergeCandidate | Refused) -> Fold:
        """Replace the chain by its convolution."""
        assert isinstance(candidate, MergeCandidate)
        region = current_region(work, candidate.region)
        return merge_region(work, MergeCandidate(region, candidate.segment), self.name)


def _loose(work: Work, chain: Chain) -> Iterable[MergeCandidate | Refused]:
    """The pieces of the best split; where there are none left, why the convolutions stay apart."""
    pieces = best_split(work, chain).pieces
    for start, end in pieces:
        yield MergeCandidate(chain.region(start, end))
    if pieces:
        return
    convs = [position for position, link in enumerate(chain.links) if link.is_conv]
    if convs[0] > 0:
        name = chain.links[convs[0]].node.outputs[0].name or ""
        yield Refused(name, why_separate(work, chain, 0, convs[0]))
    for first, second in pairwise(convs):
        name = chain.links[second].node.outputs[0].name or ""
        yield Refused(name, why_separate(work, chain, first, second))


def _behind_repairs(work: Work) -> Iterator[Refused]:
    """Convolutions that read a merge whose repaired border ends the run."""
    for node in work.graph.nodes():
        source = node.inputs[0] if is_op(node, "Conv") else None
        repair = None if source is None else source.producer()
        if source is None or repair is None or only_consumer(source) is not node:
            continue
        made_by_pass = f"{METADATA_PREFIX}pass" in repair.metadata_props
        if made_by_pass and is_op(repair, "Add") and not {node, repair} & work.barrier:
            reason = f"the merge into {source.name!r} ends in the repair of its border"
            yield Refused(node.outputs[0].name or "", reason)

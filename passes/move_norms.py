"""Move the normalisation by groups of a plan's segment behind it, or leave it out.

This is the plan's meaning, not an equality: it builds the reference network. A GroupNormalization
is not linear, so a run that holds one is no convolution. With `norm: after` its trained scale,
shift and epsilon normalise the run's result instead; of several, the last one (LayerMerge, appendix
A). With `norm: drop` none is left. The free activation, where there is one, stands behind it. What
leaves keeps the segment's name; the tensor before the normalisation is `<name>/graphfold.N`.

Refused: a result of other channels than the normalisation has, or that its groups do not divide,
and a normalisation that would leave a branch of a sum.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from graphfold.norms import NormSite, norm_steps
from graphfold.resolve import ResolvedSegment
from graphfold.rewrite import Pass, Phase, Work
from graphfold.steps import insert_behind


@dataclass(frozen=True)
class MoveNorms(Pass):
    """Do with the normalisations in segments what the plan says."""

    name: ClassVar[str] = "move_norms"
    phase: ClassVar[Phase] = Phase.PLAN
    order: ClassVar[int] = 1

    def find(self, work: Work) -> Iterable[ResolvedSegment]:
        """Segments that still hold normalisations."""
        return [segment for segment in work.plan.segments if segment.norms]

    def label(self, candidate: ResolvedSegment) -> str:
        """The segment's JSON path."""
        return candidate.path

    def rewrite(self, work: Work, candidate: ResolvedSegment) -> None:
        """Bypass them all, and put the last one behind the segment where it stays."""
        norms, candidate.norms = candidate.norms, ()
        steps = norm_steps(work.graph, norms[-1])
        for site in norms:
            _bypass(work, site)
        if candidate.spec.norm != "after":
            return
        value = candidate.output
        result = insert_behind(work.graph, value, steps)
        for segment in work.plan.segments:
            segment.input = result if segment.input is value else segment.input
        for added in work.plan.added:
            added.value = result if added.value is value else added.value


def _bypass(work: Work, site: NormSite) -> None:
    # What it reads may itself have been bypassed since the site was found.
    source = site.nodes[0].inputs[0]
    assert source is not None
    work.bypass(site.output, source)
    work.graph.remove_dead(site.nodes)

"""Remove the activation sites that a plan names: y = act(x) becomes y = x.

This is the plan's meaning, not an equality: it builds the reference network. Every reader of the
site's output reads its input instead; the site's nodes and their constants go. Sites of several
nodes (SiLU, hard-swish, decomposed PReLU) go as one. Padding does not move.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from graphfold.graph import only_consumer
from graphfold.rewrite import Pass, Phase, Work
from graphfold.sites import ActivationSite


@dataclass(frozen=True)
class RemoveActivations(Pass):
    """Bypass the plan's activation sites."""

    name: ClassVar[str] = "remove_activations"
    phase: ClassVar[Phase] = Phase.PLAN
    order: ClassVar[int] = 0

    def find(self, work: Work) -> Iterable[ActivationSite]:
        """Sites of segments and loose sites that are still in the graph."""
        named = [site for segment in work.plan.segments for site in segment.activations]
        # A short form and a list beside it may name a site twice.
        sites = dict.fromkeys((*named, *work.plan.activations))
        return [site for site in sites if site.nodes[-1].graph is not None]

    def label(self, candidate: ActivationSite) -> str:
        """The site's output tensor."""
        return candidate.name

    def rewrite(self, work: Work, candidate: ActivationSite) -> None:
        """Let readers of the site's output read its input."""
        # What the site reads may itself have been bypassed since the site was found.
        source = next(
            value
            for value in candidate.nodes[0].inputs
            if value is not None and not work.graph.is_constant(value)
        )
        standing = work.bypass(candidate.output, source)
        work.graph.remove_dead(candidate.nodes)
        carrier = standing.producer()
        if carrier is not None and carrier is only_consumer(source) and source.producer():
            # The site's own nodes were the other readers that an output's name had to spare.
            work.bypass(standing, source)
            work.graph.remove_dead([carrier])

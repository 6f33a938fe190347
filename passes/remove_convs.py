"""Remove the conv sites that a plan names: the Conv, its normalisation and its Pad become y = x.

This is the plan's meaning, not an equality: it builds the reference network. Only a site whose
input and output have the same shape may go. Where all convolutions of a residual branch are gone
and nothing else is left in it, the Add of the branch means x, not 2x (LayerMerge's public code
yields 2x).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from graphfold.graph import consumers, is_op
from graphfold.rewrite import Pass, Phase, Work
from graphfold.sites import ConvSite


@dataclass(frozen=True)
class RemoveConvs(Pass):
    """Bypass the plan's conv sites."""

    name: ClassVar[str] = "remove_convs"
    phase: ClassVar[Phase] = Phase.PLAN
    order: ClassVar[int] = 1

    def find(self, work: Work) -> Iterable[ConvSite]:
        """Sites of segments and loose sites that are still in the graph."""
        named = [site for segment in work.plan.segments for site in segment.convs]
        sites = dict.fromkeys((*named, *work.plan.convs))
        return [site for site in sites if site.conv.graph is not None]

    def label(self, candidate: ConvSite) -> str:
        """The Conv's output tensor."""
        return candidate.name

    def rewrite(self, work: Work, candidate: ConvSite) -> None:
        """Let readers of the site's output read its input; an emptied residual branch means x."""
        source = candidate.nodes[0].inputs[0]
        assert source is not None
        sums = [node for node in consumers(candidate.output) if not _doubles(node)]
        work.bypass(candidate.output, source)
        work.graph.remove_dead([*candidate.nodes])
        for node in sums:
            added = node.inputs[0]
            if node.graph is not None and added is not None and _doubles(node):
                work.bypass(node.outputs[0], added)
                work.graph.remove_dead([node])


def _doubles(node: ir.Node) -> bool:
    return is_op(node, "Add") and node.inputs[0] is node.inputs[1]

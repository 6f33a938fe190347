"""Fold a BatchNormalization, or per-channel constants, into the convolution before it.

gamma * (W * x + b - mean) / sqrt(var + eps) + beta is a convolution with row o of W scaled by
gamma_o / sqrt(var_o + eps) and bias (b - mean) * scale + beta. The node's own epsilon counts.
Exact everywhere, borders included, since nothing pads in between.

Refused: training mode, statistics that are not constant, and a convolution whose result is also
read elsewhere or is an output of the graph.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from graphfold.errors import NotExactError
from graphfold.graph import Graph, consumers, is_op, node_label
from graphfold.linear import PER_CHANNEL, variable_inputs
from graphfold.merge import MergeCandidate, current_region, merge_region, merged_geometry
from graphfold.regions import Region
from graphfold.rewrite import Fold, Pass, Phase, Work


@dataclass(frozen=True)
class FoldBatchnorm(Pass):
    """One convolution for each Conv-BatchNormalization pair."""

    name: ClassVar[str] = "fold_batchnorm"
    phase: ClassVar[Phase] = Phase.FOLD
    order: ClassVar[int] = 2

    def find(self, work: Work) -> Iterable[Region]:
        """Every BatchNormalization or constant per channel that reads a convolution's result."""
        found = []
        for node in work.graph.nodes():
            conv = _conv_before(work.graph, node)
            if conv is None or conv.inputs[0] is None:
                continue
            region = Region(conv.inputs[0], node.outputs[0], (conv, node))
            if is_op(node, "BatchNormalization") or _is_linear(work, region):
                found.append(region)
        return found

    def label(self, candidate: Region) -> str:
        """The normalisation's output tensor."""
        return candidate.output.name or ""

    def check(self, work: Work, candidate: Region) -> str | None:
        """Refuse a result that is needed elsewhere, and what is not linear."""
        conv, norm = candidate.nodes
        value = conv.outputs[0]
        if value.is_graph_output():
            return f"{value.name!r} is an output of the graph"
        others = [reader for reader in consumers(value) if reader is not norm]
        if others:
            return f"{value.name!r} is also read by {node_label(others[0])!r}"
        try:
            merged_geometry(work, current_region(work, candidate))
        except NotExactError as error:
            return error.what
        return None

    def rewrite(self, work: Work, candidate: Region) -> Fold:
        """Replace both by one convolution."""
        region = current_region(work, candidate)
        return merge_region(work, MergeCandidate(region), self.name)


def _conv_before(graph: Graph, node: ir.Node) -> ir.Node | None:
    if not is_op(node, *PER_CHANNEL):
        return None
    sources = variable_inputs(graph, node)
    if not sources or (len(sources) > 1 and not is_op(node, "BatchNormalization")):
        return None
    producer = sources[0].producer()
    return producer if is_op(producer, "Conv") else None


def _is_linear(work: Work, region: Region) -> bool:
    """Other arithmetic with constants (a map, a row) is nobody's candidate."""
    try:
        merged_geometry(work, region)
    except NotExactError:
        return False
    return True

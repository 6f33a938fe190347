"""Normalisations over groups of channels: not linear, but a plan may move them behind a run.

`GroupNormalization`, `InstanceNormalization`, and the way exporters spell the first before
opset 18: Reshape to groups, InstanceNormalization, Reshape back, then scale and shift per channel.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import onnx_ir as ir

from graphfold.graph import Graph, is_op, only_consumer
from graphfold.linear import variable_inputs


@dataclass(frozen=True)
class NormSite:
    """One normalisation of a feature map by its own statistics.

    Attributes:
        input, output: what enters and leaves, of the same shape.
        nodes: in execution order.
        channels: of both.
    """

    input: ir.Value
    output: ir.Value
    nodes: tuple[ir.Node, ...]
    channels: int

    @property
    def name(self) -> str:
        """The site's name: its last output tensor."""
        return self.output.name or ""


def find_norms(graph: Graph) -> list[NormSite]:
    """All such normalisations of the main graph, in execution order.

    One whose channels are not known, or whose scale is computed, is left out.
    """
    return list(_norms(graph))


def _norms(graph: Graph) -> Iterator[NormSite]:
    for node in graph.ir:
        if is_op(node, "GroupNormalization", "InstanceNormalization"):
            if len(variable_inputs(graph, node)) != 1:
                continue
            site = _grouped_by_reshape(graph, node) or _alone(graph, node)
            if site is not None:
                yield site


def _alone(graph: Graph, node: ir.Node) -> NormSite | None:
    source, output = node.inputs[0], node.outputs[0]
    channels = graph.channels(source)
    if source is None or channels is None or not graph.sizes(source):
        return None
    return NormSite(source, output, (node,), channels)


def _grouped_by_reshape(graph: Graph, node: ir.Node) -> NormSite | None:
    inner = node.inputs[0]
    before = None if inner is None else inner.producer()
    after = only_consumer(node.outputs[0])
    if inner is None or before is None or after is None or not is_op(node, "InstanceNormalization"):
        return None
    if not is_op(before, "Reshape") or not is_op(after, "Reshape"):
        return None
    source, output = before.inputs[0], after.outputs[0]
    channels = graph.channels(source)
    if source is None or channels is None or only_consumer(inner) is not node:
        return None
    if graph.shape(source) != graph.shape(output):
        return None
    nodes = [before, node, after]
    for op_type in ("Mul", "Add"):
        follower = only_consumer(output)
        if follower is None or not is_op(follower, op_type) or follower.graph is not graph.ir:
            break
        if len(variable_inputs(graph, follower)) != 1:
            break
        nodes.append(follower)
        output = follower.outputs[0]
    return NormSite(source, output, tuple(nodes), channels)

"""Normalisations over groups of channels: not linear, but a plan may move them behind a run.

`GroupNormalization`, `InstanceNormalization`, and the way exporters spell the first before
opset 21: Reshape to groups, InstanceNormalization, Reshape back, then scale and shift per channel.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from graphfold.graph import Graph, attribute, consumers, is_op, only_consumer
from graphfold.linear import variable_inputs
from graphfold.steps import Step


@dataclass(frozen=True)
class NormSite:
    """One normalisation of a feature map by its own statistics.

    Attributes:
        input, output: what enters and leaves, of the same shape.
        nodes: in execution order.
        channels: of both.
        groups: of channels that share statistics.
    """

    input: ir.Value
    output: ir.Value
    nodes: tuple[ir.Node, ...]
    channels: int
    groups: int

    @property
    def name(self) -> str:
        """The site's name: its last output tensor."""
        return self.output.name or ""

    def why_not_on(self, channels: int | None) -> str | None:
        """Why it cannot normalise a tensor of so many channels, or None."""
        if channels != self.channels:
            return (
                f"{self.name!r} normalises {self.channels} channels and the result has {channels}"
            )
        if channels % self.groups:
            return f"the {self.groups} groups of {self.name!r} do not divide {channels} channels"
        return None


def find_norms(graph: Graph) -> list[NormSite]:
    """All such normalisations of the main graph, in execution order.

    One whose channels are not known, or whose scale is computed, is left out.
    """
    return list(_norms(graph))


def only_normalised(value: ir.Value, norms: list[NormSite]) -> bool:
    """Whether one of these normalisations is all that reads a tensor's values."""
    readers = [node for node in consumers(value) if not is_op(node, "Shape")]
    if value.is_graph_output():
        return False
    return any(site.input is value and set(readers) <= set(site.nodes) for site in norms)


def norm_steps(graph: Graph, site: NormSite) -> list[Step]:
    """What a normalisation computes, parameters and epsilon included, for any tensor's size."""
    kernel = _kernel(site)
    parameters = tuple(graph.constant(value) for value in kernel.inputs[1:])
    if len(site.nodes) == 1:
        return [(kernel.op_type, ("x", *parameters), dict(kernel.attributes))]
    by_group = np.array([0, site.groups, -1])
    steps: list[Step] = [
        ("Reshape", ("x", by_group), {}),
        (kernel.op_type, (0, *parameters), dict(kernel.attributes)),
        ("Shape", ("x",), {}),
        ("Reshape", (1, 2), {}),
    ]
    for node in site.nodes[3:]:
        steps.append((node.op_type, (len(steps) - 1, _constant(graph, node)), {}))
    return steps


def _kernel(site: NormSite) -> ir.Node:
    return site.nodes[0] if len(site.nodes) == 1 else site.nodes[1]


def _constant(graph: Graph, node: ir.Node) -> NDArray[np.generic]:
    found = [graph.constant(value) for value in node.inputs if graph.is_constant(value)]
    (constant,) = (each for each in found if each is not None)
    return constant


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
    groups = node.attributes["num_groups"].as_int() if "num_groups" in node.attributes else channels
    return NormSite(source, output, (node,), channels, groups)


def _grouped_by_reshape(graph: Graph, node: ir.Node) -> NormSite | None:
    inner = node.inputs[0]
    before = None if inner is None else inner.producer()
    after = only_consumer(node.outputs[0])
    if inner is None or before is None or after is None or not is_op(node, "InstanceNormalization"):
        return None
    if not is_op(before, "Reshape") or not is_op(after, "Reshape"):
        return None
    source, output = before.inputs[0], after.outputs[0]
    channels, groups = graph.channels(source), graph.channels(inner)
    if source is None or channels is None or groups is None or only_consumer(inner) is not node:
        return None
    if not _keeps_batch(graph, before) or not _has_shape_of(graph, after, source):
        return None
    nodes = [before, node, after]
    for op_type in ("Mul", "Add"):
        follower = only_consumer(output)
        if follower is None or not is_op(follower, op_type) or follower.graph is not graph.ir:
            break
        if not _is_per_channel(graph, follower, channels, len(graph.shape(source) or ())):
            break
        nodes.append(follower)
        output = follower.outputs[0]
    return NormSite(source, output, tuple(nodes), channels, groups)


def _keeps_batch(graph: Graph, reshape: ir.Node) -> bool:
    target = graph.constant(reshape.inputs[1])
    if target is not None and target.size and target[0] == 0:
        return True
    shapes = graph.shape(reshape.inputs[0]), graph.shape(reshape.outputs[0])
    return bool(shapes[0] and shapes[1]) and shapes[0][0] == shapes[1][0]  # type: ignore[index]


def _has_shape_of(graph: Graph, reshape: ir.Node, source: ir.Value) -> bool:
    """Whether a Reshape gives a tensor the shape of another."""
    target = reshape.inputs[1]
    asked = None if target is None else target.producer()
    if asked is not None and is_op(asked, "Shape") and asked.inputs[0] is source:
        return attribute(asked, "start", 0) == 0 and "end" not in asked.attributes
    shape = graph.shape(source)
    return shape is not None and shape == graph.shape(reshape.outputs[0])


def _is_per_channel(graph: Graph, node: ir.Node, channels: int, rank: int) -> bool:
    """Whether its constant, which leaves the tensor's shape as it is, is one or one per channel."""
    if len(variable_inputs(graph, node)) != 1 or len(node.inputs) != 2:
        return False
    constant = _constant(graph, node)
    if constant.size == 1 or constant.ndim > rank:
        return constant.ndim <= rank
    axis = constant.ndim - rank + 1
    return axis >= 0 and constant.size == constant.shape[axis] == channels

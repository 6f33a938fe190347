"""Vectors that enter a linear region from the side: what they become behind it.

A vector t [N, C, 1, ..., 1] that is added to all pixels of a map alike (a diffusion network's time
embedding) goes through the linear operators behind as a vector, as long as none of them pads: with
W the one convolution that they are, W * (x + t) = W * x + V t, where V sums W over its taps. At a
zero-padded border W reads less of t than inside, so there no vector is equal: refused, and moving
all padding before the sum (boundary: hoist) is what makes it equal.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from graphfold.affine import AffineConv
from graphfold.errors import NotExactError
from graphfold.geometry import Axis
from graphfold.graph import Graph, is_op
from graphfold.linear import variable_inputs
from graphfold.regions import Region, region_affine, region_geometry


@dataclass(frozen=True)
class AddedVector:
    """A vector that a region adds, and the part of the region that makes something of it."""

    value: ir.Value
    tail: Region

    @property
    def is_changed(self) -> bool:
        """Whether anything stands behind the sum."""
        return len(self.tail.nodes) > 1

    def affine(self, graph: Graph) -> AffineConv:
        """The 1x1 convolution, without a bias, that makes of it what is added behind the region."""
        whole = region_affine(graph, self.tail)
        rank = len(whole.axes)
        weight = whole.weight.sum(axis=tuple(range(2, 2 + rank)), keepdims=True)
        bias = np.zeros(weight.shape[0])
        return AffineConv(weight, bias, (Axis(),) * rank, whole.groups)


def added_vectors(graph: Graph, region: Region) -> list[AddedVector]:
    """What a region adds from the side.

    Raises:
        NotExactError: an operator behind a sum pads, or is not linear.
    """
    found = list(_added(graph, region))
    for each in found:
        geometry = region_geometry(graph, each.tail)
        if any(axis.begin > 0 or axis.end > 0 for axis in geometry.axes):
            raise NotExactError(
                f"{each.value.name!r} is added to all pixels alike, and behind it zeros are padded",
                boundary_that_works="hoist",
            )
    return found


def _added(graph: Graph, region: Region) -> Iterator[AddedVector]:
    waiting = set(region.aside)
    for number, node in enumerate(region.nodes):
        for value in variable_inputs(graph, node):
            if value in waiting:
                waiting.remove(value)
                yield AddedVector(value, _tail(graph, region, number, value))


def _tail(graph: Graph, region: Region, number: int, value: ir.Value) -> Region:
    """From where a vector is first added to the region's output, what else enters left out."""
    behind = {value}
    nodes: list[ir.Node] = []
    others: set[ir.Value] = set()
    for node in region.nodes[number:]:
        sources = variable_inputs(graph, node)
        if nodes and behind.isdisjoint(sources):
            continue
        outside = {source for source in sources if source not in behind}
        if outside and is_op(node, "Concat"):
            raise NotExactError(
                f"{value.name!r} is added in one of the branches that {node.outputs[0].name!r} "
                f"concatenates"
            )
        nodes.append(node)
        others |= outside
        behind.update(node.outputs)
    # The vector stands for a map of the same size as what it is added to, which may be any.
    sizes = (None,) * len(graph.sizes(value) or ())
    return replace(region, entry=value, nodes=tuple(nodes), aside=frozenset(others), sizes=sizes)

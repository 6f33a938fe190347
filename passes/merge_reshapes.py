"""Two changes of shape in a row are one Reshape.

Reshape, Flatten, Squeeze and Unsqueeze keep the order of all values, so what the first one does
cannot be told from the second one's result, except through its sizes: one Reshape of x to the last
shape is the same, bit for bit. Its target is the second Reshape's own, where each 0 (the size at
the same place) is that size where it is fixed, or stays 0 where the first one keeps the axis; for
the others it is the resulting shape, with -1 for one size that is not fixed.

Refused: a first one that is read elsewhere or is an output of the graph, targets that are not
constant, and more than one size that is not fixed. Before opset 5, where a target is an attribute,
and before IR version 4, where a new constant would be a node of its own, nothing is done.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from graphfold.cleanup import Pair, pairs
from graphfold.graph import Graph, attribute, is_op
from graphfold.rewrite import Pass, Phase, Work, provenance

_INPUT_TARGET_OPSET = 5
_KINDS = ("Reshape", "Flatten", "Squeeze", "Unsqueeze")


@dataclass(frozen=True)
class MergeReshapes(Pass):
    """One Reshape for two changes of shape."""

    name: ClassVar[str] = "merge_reshapes"
    phase: ClassVar[Phase] = Phase.FOLD
    order: ClassVar[int] = 5

    def find(self, work: Work) -> Iterable[Pair]:
        """Every change of shape that reads one."""
        graph = work.graph
        if graph.opset < _INPUT_TARGET_OPSET or not graph.holds_initializers:
            return []
        return pairs(work, *_KINDS)

    def label(self, candidate: Pair) -> str:
        """The second one's output tensor."""
        return candidate.output

    def check(self, work: Work, candidate: Pair) -> str | None:
        """Refuse what is needed elsewhere, and shapes that are not known well enough."""
        first, second = candidate.first, candidate.second
        reason = candidate.why_apart()
        if reason is not None:
            return reason
        if _target(work.graph, first, second) is None:
            return f"the shape of {second.outputs[0].name!r} is not known well enough"
        return None

    def rewrite(self, work: Work, candidate: Pair) -> None:
        """Put a Reshape in the place of both."""
        graph = work.graph
        first, second = candidate.first, candidate.second
        target = _target(graph, first, second)
        name = candidate.output
        constant = graph.add_initializer(name, np.asarray(target, np.int64))
        metadata = provenance((first, second), self.name)
        inputs = [first.inputs[0], constant]
        node = ir.Node("", "Reshape", inputs, name=second.name, metadata_props=metadata)
        graph.ir.insert_before(second, node)
        graph.take_over(second.outputs[0], node.outputs[0])
        graph.remove_dead([second])


def _target(graph: Graph, first: ir.Node, second: ir.Node) -> list[int] | None:
    """Target of a Reshape from the first one's input to the second one's output."""
    if is_op(second, "Reshape"):
        found = _own_target(graph, first, second)
        if found is not None:
            return found
    shape = graph.shape(second.outputs[0])
    if shape is None:
        return None
    target = [size if isinstance(size, int) else -1 for size in shape]
    return None if target.count(-1) > 1 or 0 in target else target


def _own_target(graph: Graph, first: ir.Node, second: ir.Node) -> list[int] | None:
    """The second one's target, as it would be for the first one's input."""
    wanted = _constant_target(graph, second)
    if wanted is None:
        return None
    middle = graph.shape(first.outputs[0])
    target = []
    for place, size in enumerate(wanted):
        if size != 0 or _keeps(graph, first, place):
            target.append(size)
            continue
        known = None if middle is None or place >= len(middle) else middle[place]
        if not isinstance(known, int) or known == 0:
            return None
        target.append(known)
    return target


def _constant_target(graph: Graph, node: ir.Node) -> list[int] | None:
    """A Reshape's target where it is constant and 0 means the size at the same place."""
    if attribute(node, "allowzero", 0):
        return None
    found = graph.constant(node.inputs[1])
    return None if found is None else [int(size) for size in found]


def _keeps(graph: Graph, node: ir.Node, place: int) -> bool:
    """Whether this axis of the output certainly is the same axis of the input."""
    if is_op(node, "Flatten"):
        return place == 0 and attribute(node, "axis", 1) == 1
    if is_op(node, "Reshape"):
        target = _constant_target(graph, node)
        return target is not None and place < len(target) and target[place] == 0
    axes = attribute(node, "axes")
    if len(node.inputs) > 1:
        constant = graph.constant(node.inputs[1])
        axes = None if constant is None else constant.tolist()
    return axes is not None and all(axis > place for axis in axes)

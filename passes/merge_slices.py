"""Two slices in a row are one.

Along different axes they do not touch each other: one Slice takes both. Along the same axis of n
values, the second takes some of the range that the first takes of 0..n-1, which is a range again;
that needs n, since starts and ends are clamped to it. Only data moves, so every bit is kept.

Refused: slices that are not constant, a first slice that is read elsewhere or is an output of the
graph, the same axis where its size is not fixed, and slices that take nothing. Before IR version 4,
where a new constant would be a node of its own, nothing is done from opset 10 on.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from graphfold.cleanup import Pair, pairs
from graphfold.graph import Graph, attribute
from graphfold.rewrite import Pass, Phase, Work, provenance

_INPUTS_OPSET = 10
_BEFORE_THE_FIRST = -(2**31)

# Start, end and step by axis, as the Slice has them; axes are not negative.
Slices = dict[int, tuple[int, int, int]]


@dataclass(frozen=True)
class MergeSlices(Pass):
    """One Slice for two in a row."""

    name: ClassVar[str] = "merge_slices"
    phase: ClassVar[Phase] = Phase.FOLD
    order: ClassVar[int] = 5

    def find(self, work: Work) -> Iterable[Pair]:
        """Every Slice that reads one."""
        graph = work.graph
        if graph.opset >= _INPUTS_OPSET and not graph.holds_initializers:
            return []
        return pairs(work, "Slice")

    def label(self, candidate: Pair) -> str:
        """The second one's output tensor."""
        return candidate.output

    def check(self, work: Work, candidate: Pair) -> str | None:
        """Refuse what is not constant, or needed elsewhere."""
        first, second = candidate.first, candidate.second
        reason = candidate.why_apart()
        if reason is not None:
            return reason
        merged = _merged(work.graph, first, second)
        return merged if isinstance(merged, str) else None

    def rewrite(self, work: Work, candidate: Pair) -> None:
        """Put a Slice in the place of both."""
        graph = work.graph
        first, second = candidate.first, candidate.second
        merged = _merged(graph, first, second)
        assert not isinstance(merged, str)
        node = _node(graph, first.inputs[0], second, merged)
        node.metadata_props.update(provenance((first, second), self.name))
        graph.ir.insert_before(second, node)
        graph.take_over(second.outputs[0], node.outputs[0])
        graph.remove_dead([second])


def _name(node: ir.Node) -> str | None:
    return None if node.inputs[0] is None else node.inputs[0].name


def _merged(graph: Graph, first: ir.Node, second: ir.Node) -> Slices | str:
    one, two = _slices(graph, first), _slices(graph, second)
    if one is None or two is None:
        return f"what {second.outputs[0].name!r} takes is not constant"
    shape = graph.shape(first.inputs[0])
    both = one | two
    for axis in one.keys() & two.keys():
        size = None if shape is None else shape[axis]
        if not isinstance(size, int):
            return f"the size of {_name(first)!r} along axis {axis} is not fixed"
        taken = range(size)[slice(*one[axis])][slice(*two[axis])]
        if not taken:
            return f"{second.outputs[0].name!r} is empty"
        stop = taken.stop if taken.stop >= 0 else _BEFORE_THE_FIRST
        both[axis] = (taken.start, stop, taken.step)
    return dict(sorted(both.items()))


def _slices(graph: Graph, node: ir.Node) -> Slices | None:
    """What a Slice takes, None where it is not known."""
    names = ("starts", "ends", "axes", "steps")
    if graph.opset < _INPUTS_OPSET:
        found = [attribute(node, name) for name in names]
    else:
        values = [*node.inputs[1:], None, None, None, None][:4]
        arrays = [graph.constant(value) for value in values]
        if any(a is None for a, value in zip(arrays, values, strict=True) if value is not None):
            return None
        found = [None if array is None else array.tolist() for array in arrays]
    starts, ends, axes, steps = found
    if starts is None or ends is None:
        return None
    shape = graph.shape(node.inputs[0])
    axes = list(range(len(starts))) if axes is None else axes
    if shape is None and any(axis < 0 for axis in axes):
        return None
    axes = [axis if axis >= 0 else axis + len(shape or ()) for axis in axes]
    steps = [1] * len(starts) if steps is None else steps
    return dict(zip(axes, zip(starts, ends, steps, strict=True), strict=True))


def _node(graph: Graph, source: ir.Value | None, like: ir.Node, slices: Slices) -> ir.Node:
    """A Slice under the name of another."""
    name = like.outputs[0].name or ""
    starts, ends, steps = (list(each) for each in zip(*slices.values(), strict=True))
    columns = {"starts": starts, "ends": ends, "axes": list(slices)}
    if graph.opset < _INPUTS_OPSET:
        attributes = [ir.AttrInt64s(key, value) for key, value in columns.items()]
        return ir.Node("", "Slice", [source], attributes, name=like.name)
    if any(step != 1 for step in steps):
        columns["steps"] = steps
    inputs = [
        graph.add_initializer(name, np.asarray(value, np.int64)) for value in columns.values()
    ]
    return ir.Node("", "Slice", [source, *inputs], name=like.name)

"""Move all padding of a plan's `hoist` segments to their first convolutions.

This is the plan's meaning, not an equality: it builds the reference network. Walking backwards
from the segment's output, a convolution of stride s and padding p whose output must carry a margin
m (extra pixels per side) without padding of its own needs its input with margin p + s*m. A
convolution that reads the segment's input has no margin to read, so it pads by that amount; all
others pad nothing. The output's size is the original's, since nested floors agree. On a residual
connection, the segment's input is zero-padded by the margin that the Add needs, and a tensor that
carries more margin than one of its readers needs is cropped on that edge.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from graphfold.errors import NotExactError
from graphfold.graph import is_op, node_label
from graphfold.linear import conv_axes, zero_padding
from graphfold.regions import entry_rank_and_channels, find_region
from graphfold.resolve import ResolvedSegment
from graphfold.rewrite import Pass, Phase, Work
from graphfold.shapes import TensorShape

Margin = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class HoistPadding(Pass):
    """Leave padding only where a hoisted segment begins."""

    name: ClassVar[str] = "hoist_padding"
    phase: ClassVar[Phase] = Phase.PLAN
    order: ClassVar[int] = 2

    def find(self, work: Work) -> Iterable[ResolvedSegment]:
        """Segments of boundary `hoist` with some padding behind their first convolutions."""
        order = {node: index for index, node in enumerate(work.graph.ir)}
        found = []
        for segment in work.plan.segments:
            if segment.spec.boundary != "hoist" or segment.input is segment.output:
                continue
            hoist = _Hoist(work, segment, order)
            if hoist.plan() is not None or hoist.changes():
                found.append(segment)
        return found

    def label(self, candidate: ResolvedSegment) -> str:
        """The segment's JSON path."""
        return candidate.path

    def check(self, work: Work, candidate: ResolvedSegment) -> str | None:
        """Refuse segments that are not single-entry, or whose padding is not a known zero."""
        order = {node: index for index, node in enumerate(work.graph.ir)}
        return _Hoist(work, candidate, order).plan()

    def rewrite(self, work: Work, candidate: ResolvedSegment) -> None:
        """Apply the margins."""
        order = {node: index for index, node in enumerate(work.graph.ir)}
        hoist = _Hoist(work, candidate, order)
        hoist.plan()
        hoist.apply()


class _Hoist:
    """Margins of one segment: computed by `plan`, written into the graph by `apply`."""

    def __init__(self, work: Work, segment: ResolvedSegment, order: dict[ir.Node, int]) -> None:
        self.work = work
        self.graph = work.graph
        self.entry = segment.input
        self.output = segment.output
        self.order = order
        self.pads: dict[ir.Node, Margin] = {}
        self.present: dict[ir.Node, Margin] = {}
        self.edges: dict[tuple[ir.Node, int], Margin] = {}
        self.margins: dict[ir.Value, Margin] = {}
        self.nodes: tuple[ir.Node, ...] = ()
        # Vectors added to all pixels have no margin.
        self.aside: frozenset[ir.Value] = frozenset()
        self.rank = 0

    def plan(self) -> str | None:
        """Compute all margins; returns why that is not possible, or None."""
        try:
            region = find_region(self.graph, self.entry, self.output, self.order, vectors=True)
            self.aside = region.aside
            self.nodes = region.nodes
            self.rank, _ = entry_rank_and_channels(self.graph, region)
            for node in reversed(region.nodes):
                self._visit(node)
        except NotExactError as error:
            return error.what
        return None

    def changes(self) -> bool:
        """Whether applying the margins changes anything."""
        inserted = any(not is_op(node, "Pad") for node, _ in self._deficits())
        return inserted or any(self._amounts(node) != self.present[node] for node in self.pads)

    def _amounts(self, node: ir.Node) -> Margin:
        """What a window or Pad node is to pad; a Pad node takes up its edge's deficit too."""
        deficit = self._deficits().get((node, 0)) if is_op(node, "Pad") else None
        return self.pads[node] if deficit is None else _sum(self.pads[node], deficit)

    def _visit(self, node: ir.Node) -> None:
        margin = self.margins.get(node.outputs[0], ((0, 0),) * self.rank)
        sources = [
            index
            for index, value in enumerate(node.inputs)
            if value is not None and not self.graph.is_constant(value) and value not in self.aside
        ]
        needed = margin
        if is_op(node, "Conv", "AveragePool"):
            needed = self._through_window(node, margin)
        elif is_op(node, "Pad"):
            needed = self._through_pad(node, margin)
        for index in sources:
            self._need(node, index, needed)

    def _through_window(self, node: ir.Node, margin: Margin) -> Margin:
        kernel = self._kernel(node)
        source = node.inputs[0]
        sizes = self.graph.sizes(source) or (None,) * len(kernel)
        axes = conv_axes(node, kernel, sizes)
        needed = tuple(
            (axis.begin + axis.stride * begin, axis.end + axis.stride * end)
            for axis, (begin, end) in zip(axes, margin, strict=True)
        )
        self.present[node] = tuple((axis.begin, axis.end) for axis in axes)
        if source is self.entry:
            self.pads[node] = needed
            return ((0, 0),) * len(kernel)
        self.pads[node] = ((0, 0),) * len(kernel)
        return needed

    def _kernel(self, node: ir.Node) -> tuple[int, ...]:
        if is_op(node, "AveragePool"):
            return tuple(node.attributes["kernel_shape"].as_ints())
        shape = self.graph.shape(node.inputs[1])
        if shape is None:
            raise NotExactError(f"the weight of {node_label(node)!r} has no known shape")
        return tuple(size for size in shape[2:] if isinstance(size, int))

    def _through_pad(self, node: ir.Node, margin: Margin) -> Margin:
        present = tuple(zero_padding(node, self.graph, len(margin) + 2))
        needed = _sum(margin, present)
        self.present[node] = present
        if node.inputs[0] is self.entry:
            self.pads[node] = needed
            return ((0, 0),) * len(margin)
        self.pads[node] = ((0, 0),) * len(margin)
        return needed

    def _need(self, node: ir.Node, index: int, needed: Margin) -> None:
        value = node.inputs[index]
        assert value is not None
        self.edges[node, index] = needed
        if value is self.entry:
            return
        earlier = self.margins.get(value, needed)
        self.margins[value] = tuple(
            (max(one[0], two[0]), max(one[1], two[1]))
            for one, two in zip(earlier, needed, strict=True)
        )

    def _deficits(self) -> dict[tuple[ir.Node, int], Margin]:
        """What edges lack (or have too much of) whose reader needs another margin than it gets."""
        found = {}
        nothing = ((0, 0),) * self.rank
        for (node, index), needed in self.edges.items():
            value = node.inputs[index]
            assert value is not None
            carried = nothing if value is self.entry else self.margins.get(value, nothing)
            if carried != needed:
                found[node, index] = _sum(needed, carried, -1)
        return found

    def apply(self) -> None:
        """Write paddings and crops into the graph; sizes inside are no longer known."""
        amounts = {node: self._amounts(node) for node in self.pads}
        for (node, index), deficit in self._deficits().items():
            if not is_op(node, "Pad"):
                self._insert_pad(node, index, deficit)
        for node, pads in amounts.items():
            if is_op(node, "Pad"):
                self._set_pad_node(node, pads)
            else:
                self._set_window_pads(node, pads)
        for node in self.nodes:
            for value in node.outputs:
                if value is not self.output and value.name is not None:
                    value.shape = None
                    self._forget_sizes(value.name, self.graph.shapes.pop(value.name, None))

    def _set_window_pads(self, node: ir.Node, pads: Margin) -> None:
        if any(begin < 0 or end < 0 for begin, end in pads):
            # A window cannot crop what it reads.
            self._insert_pad(node, 0, pads)
            pads = ((0, 0),) * self.rank
        amounts = [begin for begin, _ in pads] + [end for _, end in pads]
        node.attributes.pop("auto_pad", None)
        node.attributes["pads"] = ir.AttrInt64s("pads", amounts)

    def _set_pad_node(self, node: ir.Node, pads: Margin) -> None:
        source = node.inputs[0]
        assert source is not None
        replacement = source
        if any(begin or end for begin, end in pads):
            replacement = self._pad_node(source, node, pads)
        if node.outputs[0] is self.output:
            self.output = self.work.bypass(node.outputs[0], replacement)
        else:
            self.graph.bypass(node.outputs[0], replacement)
        self.graph.remove_dead([node])

    def _insert_pad(self, node: ir.Node, index: int, amounts: Margin) -> None:
        source = node.inputs[index]
        assert source is not None
        node.replace_input_with(index, self._pad_node(source, node, amounts))

    def _pad_node(self, source: ir.Value, before: ir.Node, amounts: Margin) -> ir.Value:
        """A zero Pad (a crop where negative) of `source`, spelled as the model's opset wants."""
        flat = [0, 0, *[begin for begin, _ in amounts], 0, 0, *[end for _, end in amounts]]
        base = self.output.name or "pad"
        if self.graph.opset >= 11:
            pads = self.graph.add_initializer(base, np.asarray(flat, dtype=np.int64))
            node = ir.Node("", "Pad", [source, pads])
        else:
            node = ir.Node("", "Pad", [source], [ir.AttrInt64s("pads", flat)])
        self.graph.ir.insert_before(before, node)
        name = node.outputs[0].name = self.graph.fresh_name(base)
        self._forget_sizes(name, self.graph.shape(source))
        return node.outputs[0]

    def _forget_sizes(self, name: str, shape: TensorShape | None) -> None:
        if shape is not None:
            self.graph.shapes[name] = (*shape[:2], *[None] * self.rank)


def _sum(one: Margin, two: Margin, factor: int = 1) -> Margin:
    return tuple(
        (a[0] + factor * b[0], a[1] + factor * b[1]) for a, b in zip(one, two, strict=True)
    )

"""A concatenation that only another reads along the same axis becomes part of it.

Concat(a, Concat(b, c), d) = Concat(a, b, c, d): only data moves, so every bit is kept. Refused: an
inner concatenation that is read elsewhere or is an output of the graph. Along another axis there is
no such equation.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from graphfold.cleanup import free_nodes
from graphfold.graph import Graph, attribute, only_consumer
from graphfold.rewrite import Pass, Phase, Work, provenance


@dataclass(frozen=True)
class _Nested:
    """A concatenation and one that it reads."""

    inner: ir.Node
    outer: ir.Node


@dataclass(frozen=True)
class MergeConcats(Pass):
    """One Concat for nested ones."""

    name: ClassVar[str] = "merge_concats"
    phase: ClassVar[Phase] = Phase.FOLD
    order: ClassVar[int] = 5

    def find(self, work: Work) -> Iterable[_Nested]:
        """Every Concat that one along the same axis reads, the first of each row first."""
        nodes = list(free_nodes(work, "Concat"))
        known = set(nodes)
        return [
            _Nested(inner, outer)
            for outer in nodes
            for inner in dict.fromkeys(
                value.producer() for value in outer.inputs if value is not None
            )
            if inner is not None and inner in known and _same_axis(work.graph, inner, outer)
        ]

    def label(self, candidate: _Nested) -> str:
        """The inner one's output tensor."""
        return candidate.inner.outputs[0].name or ""

    def check(self, work: Work, candidate: _Nested) -> str | None:
        """Refuse an inner one that is needed elsewhere."""
        del work
        if only_consumer(candidate.inner.outputs[0]) is None:
            return f"{candidate.inner.outputs[0].name!r} is needed elsewhere too"
        return None

    def rewrite(self, work: Work, candidate: _Nested) -> None:
        """Put a Concat of all parts in the place of the outer one."""
        inner, outer = candidate.inner, candidate.outer
        middle = inner.outputs[0]
        parts: list[ir.Value | None] = []
        for value in outer.inputs:
            parts += inner.inputs if value is middle else [value]
        metadata = provenance((inner, outer), self.name)
        outer.resize_inputs(len(parts))
        for index, value in enumerate(parts):
            outer.replace_input_with(index, value)
        outer.metadata_props.update(metadata)
        work.graph.remove_dead([inner])


def _same_axis(graph: Graph, inner: ir.Node, outer: ir.Node) -> bool:
    one, two = attribute(inner, "axis"), attribute(outer, "axis")
    if one is None or two is None or one == two:
        return one is not None and one == two
    shape = graph.shape(inner.outputs[0]) or graph.shape(outer.outputs[0])
    return shape is not None and one % len(shape) == two % len(shape)

"""Two clamps in a row are one: Clip(Clip(x, a, b), c, d) = Clip(x, max(a, c), min(b, d)).

Relu is Clip with a = 0 and no upper bound. The equation holds where both intervals and their
intersection hold a number, and for NaN, which clamps hand on; numbers are only chosen among bounds
and inputs, never computed, so nothing is rounded. Where the second clamp
takes nothing away (Relu of Relu, Relu of Clip from 0 up), its readers read the first. Otherwise the
second reads x with both bounds, and the first goes.

Refused: bounds that are not constant, NaN, or disjoint. A first clamp that is read elsewhere, or is
an output of the graph, stays, and so does the second unless it takes nothing away. Before opset 6
Clip is another operator.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from graphfold.cleanup import bypass, element_type, free_nodes, why_not_bypassed
from graphfold.graph import Graph, attribute, is_op, only_consumer
from graphfold.rewrite import Pass, Phase, Work, provenance

_INPUT_BOUNDS_OPSET = 11
_CLIP_OPSET = 6

Bound = NDArray[Any] | None


@dataclass(frozen=True)
class _Clamp:
    """The bounds of a Relu or Clip, None where there is none."""

    low: Bound
    high: Bound

    def and_then(self, other: _Clamp) -> _Clamp | None:
        """Both as one, None where they share no number."""
        both = _Clamp(_further(self.low, other.low, 1), _further(self.high, other.high, -1))
        if any(each.is_empty() for each in (self, other, both)):
            return None
        return both

    def is_empty(self) -> bool:
        return self.low is not None and self.high is not None and bool(self.low > self.high)

    def same(self, other: _Clamp) -> bool:
        pairs = ((self.low, other.low), (self.high, other.high))
        return all(
            one is two or (one is not None and two is not None and bool(one == two))
            for one, two in pairs
        )


@dataclass(frozen=True)
class SimplifyActivations(Pass):
    """One clamp for two in a row."""

    name: ClassVar[str] = "simplify_activations"
    phase: ClassVar[Phase] = Phase.FOLD
    order: ClassVar[int] = 3

    def find(self, work: Work) -> Iterable[ir.Node]:
        """Every Relu or Clip that reads one."""
        clamps = [node for node in free_nodes(work) if is_op(node, "Relu", "Clip")]
        known = set(clamps)
        return [node for node in clamps if _before(node) in known]

    def label(self, candidate: ir.Node) -> str:
        """The second one's output tensor."""
        return candidate.outputs[0].name or ""

    def check(self, work: Work, candidate: ir.Node) -> str | None:
        """Refuse bounds that are not certain, and a first clamp that is needed elsewhere."""
        before = _before(candidate)
        assert before is not None
        middle = before.outputs[0]
        first, second = _clamp(work.graph, before), _clamp(work.graph, candidate)
        if isinstance(first, str) or isinstance(second, str):
            return first if isinstance(first, str) else str(second)
        both = first.and_then(second)
        if both is None:
            return "their bounds share no number"
        if both.same(first):
            return why_not_bypassed(work, candidate.outputs[0], middle)
        if only_consumer(middle) is None:
            return f"{middle.name!r} is needed elsewhere too"
        return None

    def rewrite(self, work: Work, candidate: ir.Node) -> None:
        """Leave out the second, or the first, or put one in the place of both."""
        graph = work.graph
        # Of a row of clamps, the one before may be what a rewrite has put there.
        first, second = _before(candidate), candidate
        assert first is not None
        one, two = _clamp(graph, first), _clamp(graph, second)
        assert isinstance(one, _Clamp)
        assert isinstance(two, _Clamp)
        both = one.and_then(two)
        assert both is not None
        if both.same(one):
            bypass(work, second.outputs[0], first.outputs[0])
            return
        metadata = provenance((first, second), self.name)
        if both.same(two):
            second.replace_input_with(0, first.inputs[0])
            second.metadata_props.update(metadata)
            graph.remove_dead([first])
            return
        node = _node(graph, first.inputs[0], second, both)
        node.metadata_props.update(metadata)
        graph.ir.insert_before(second, node)
        graph.take_over(second.outputs[0], node.outputs[0])
        graph.remove_dead([second])


def _before(node: ir.Node) -> ir.Node | None:
    source = node.inputs[0]
    return None if source is None else source.producer()


def _further(one: Bound, other: Bound, sign: int) -> Bound:
    """The larger bound, the smaller one for sign -1; None is no bound."""
    if one is None or other is None:
        return other if one is None else one
    return other if bool(sign * other > sign * one) else one


def _clamp(graph: Graph, node: ir.Node) -> _Clamp | str:
    """The bounds of a Relu or Clip, or why they are not known."""
    output = node.outputs[0]
    dtype = element_type(graph, output) or _bounds_type(graph, node)
    if dtype is None:
        return f"the element type of {output.name!r} is not known"
    if is_op(node, "Relu"):
        return _Clamp(np.zeros((), dtype.numpy()), None)
    if graph.opset < _CLIP_OPSET:
        return f"Clip of opset {graph.opset} is another operator"
    bounds: list[Bound] = []
    for index, name in enumerate(("min", "max"), 1):
        if graph.opset < _INPUT_BOUNDS_OPSET:
            widest = np.finfo(np.float32)
            default = widest.min if name == "min" else widest.max
            bounds.append(np.asarray(attribute(node, name, default), np.float32))
            continue
        value = node.inputs[index] if index < len(node.inputs) else None
        data = graph.constant(value)
        if value is not None and (data is None or data.size != 1):
            return f"the bounds of {output.name!r} are not constants"
        bounds.append(None if data is None else data.reshape(()))
    if any(bound is not None and bool(bound != bound) for bound in bounds):
        return f"a bound of {output.name!r} is not a number"
    return _Clamp(*bounds)


def _bounds_type(graph: Graph, node: ir.Node) -> ir.DataType | None:
    known = (element_type(graph, value) for value in node.inputs if value is not None)
    return next((dtype for dtype in known if dtype is not None), None)


def _node(graph: Graph, source: ir.Value | None, like: ir.Node, clamp: _Clamp) -> ir.Node:
    """A Clip with these bounds under the name of another node."""
    name = like.outputs[0].name or ""
    bounds = {"min": clamp.low, "max": clamp.high}
    if graph.opset < _INPUT_BOUNDS_OPSET:
        attributes = [
            ir.AttrFloat32(key, float(bound)) for key, bound in bounds.items() if bound is not None
        ]
        return ir.Node("", "Clip", [source], attributes, name=like.name)
    values = [
        None if bound is None else graph.add_initializer(name, bound) for bound in bounds.values()
    ]
    return ir.Node("", "Clip", [source, *values], name=like.name)

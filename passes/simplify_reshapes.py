"""A Reshape whose target is computed from sizes gets a constant one.

Exporters spell a view that keeps the batch as Reshape(x, Concat(Gather(Shape(x), 0), ...)). In a
constant target, 0 means the size of x at the same place, and one -1 what is left over. So a piece
that is the size of x along its own axis becomes 0, fixed sizes become numbers, and one piece that
is neither becomes -1 where all others are numbers: the numbers of values agree, so it is the only
size left. For the first axis, sizes of tensors that x is computed from by operators that keep the
batch count as x's own. Every bit is kept.

Refused: more than one piece of unknown size, an unknown one beside a 0 (with an empty batch it
could not be told), and `allowzero`. Before opset 5 and IR version 4 nothing is done.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from graphfold.cleanup import free_nodes
from graphfold.graph import Graph, attribute, is_op
from graphfold.rewrite import Pass, Phase, Work, provenance

_INPUT_TARGET_OPSET = 5
# Operators whose output has as many images as their first input.
_KEEP_BATCH = (
    *("Conv", "ConvTranspose", "BatchNormalization", "InstanceNormalization", "LRN", "Dropout"),
    *("MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool", "Identity", "Cast", "PRelu"),
    *("Relu", "LeakyRelu", "Clip", "Sigmoid", "Tanh", "HardSigmoid", "HardSwish", "Elu", "Softmax"),
)
_FURTHEST = 64


@dataclass(frozen=True)
class _Size:
    """The size of a tensor along an axis that is not negative."""

    tensor: ir.Value
    axis: int


# A fixed number, a tensor's size, or nothing that is known.
_Piece = int | _Size | None


@dataclass(frozen=True)
class SimplifyReshapes(Pass):
    """Constant targets."""

    name: ClassVar[str] = "simplify_reshapes"
    phase: ClassVar[Phase] = Phase.FOLD
    order: ClassVar[int] = -2

    def find(self, work: Work) -> Iterable[ir.Node]:
        """Every Reshape by a target that is put together from pieces."""
        graph = work.graph
        if graph.opset < _INPUT_TARGET_OPSET or not graph.holds_initializers:
            return []
        return [
            node
            for node in free_nodes(work, "Reshape")
            if not graph.is_constant(node.inputs[1]) and _pieces(graph, node.inputs[1]) is not None
        ]

    def label(self, candidate: ir.Node) -> str:
        """The Reshape's output tensor."""
        return candidate.outputs[0].name or ""

    def check(self, work: Work, candidate: ir.Node) -> str | None:
        """Refuse targets that no constant can mean."""
        target = _target(work.graph, candidate)
        return target if isinstance(target, str) else None

    def rewrite(self, work: Work, candidate: ir.Node) -> None:
        """Give the node a constant target; what computed the old one goes."""
        graph = work.graph
        target = _target(graph, candidate)
        assert not isinstance(target, str)
        computed = candidate.inputs[1]
        name = candidate.outputs[0].name or ""
        candidate.replace_input_with(1, graph.add_initializer(name, np.asarray(target, np.int64)))
        candidate.metadata_props.update(provenance([candidate], self.name))
        made = None if computed is None else computed.producer()
        if made is not None:
            graph.remove_dead([made])
        graph.shapes_may_grow = True


def _target(graph: Graph, node: ir.Node) -> list[int] | str:
    pieces = _pieces(graph, node.inputs[1])
    source = node.inputs[0]
    assert pieces is not None
    assert source is not None
    if attribute(node, "allowzero", 0):
        return f"a 0 in the target of {node.outputs[0].name!r} means no values"
    target = [_entry(piece, place, source) for place, piece in enumerate(pieces)]
    unknown = target.count(None)
    if unknown > 1 or (unknown and -1 in target):
        return f"more than one size of {node.outputs[0].name!r} is not known"
    if unknown and 0 in target:
        return f"one size of {node.outputs[0].name!r} is not known, and others are not fixed"
    return [-1 if entry is None else entry for entry in target]


def _entry(piece: _Piece, place: int, source: ir.Value) -> int | None:
    """What a piece is in a constant target; None where it must be what is left over."""
    if isinstance(piece, int) or piece is None:
        return piece
    if piece.axis != place:
        return None
    same = piece.tensor is source
    same |= place == 0 and _batch_of(piece.tensor) is _batch_of(source)
    return 0 if same else None


def _batch_of(value: ir.Value) -> ir.Value:
    """The furthest tensor that has as many images by the operators between."""
    for _ in range(_FURTHEST):
        producer = value.producer()
        if not is_op(producer, *_KEEP_BATCH) or producer is None or producer.inputs[0] is None:
            break
        value = producer.inputs[0]
    return value


def _pieces(graph: Graph, value: ir.Value | None) -> list[_Piece] | None:
    """What a vector of sizes (or one size, as a list of one) is made of; None if not known."""
    if value is None:
        return None
    if graph.is_constant(value):
        shape = graph.shape(value)
        found = graph.constant(value) if shape is None or len(shape) <= 1 else None
        return None if found is None else [int(size) for size in found.reshape(-1)]
    producer = value.producer()
    if is_op(producer, "Concat") and producer is not None:
        parts = [_pieces(graph, part) for part in producer.inputs]
        known = [part for part in parts if part is not None]
        return [piece for part in known for piece in part] if len(known) == len(parts) else None
    if is_op(producer, "Identity", "Cast", "Unsqueeze", "Squeeze") and producer is not None:
        inner = _pieces(graph, producer.inputs[0])
        if inner is not None and (len(inner) == 1 or is_op(producer, "Identity", "Cast")):
            return inner
    elif is_op(producer, "Shape") and producer is not None:
        return _sizes(graph, producer)
    elif is_op(producer, "Gather", "Slice") and producer is not None:
        chosen = _chosen(graph, producer)
        if chosen is not None:
            return chosen
    return [None] if graph.shape(value) in ((), (1,)) else None


def _sizes(graph: Graph, node: ir.Node) -> list[_Piece] | None:
    source = node.inputs[0]
    shape = graph.shape(source)
    if source is None or shape is None:
        return None
    every: list[_Piece] = [
        size if isinstance(size, int) else _Size(source, axis) for axis, size in enumerate(shape)
    ]
    return every[attribute(node, "start", 0) : attribute(node, "end")]


def _chosen(graph: Graph, node: ir.Node) -> list[_Piece] | None:
    """Some of the pieces of a vector, by constant places."""
    every = _pieces(graph, node.inputs[0])
    numbers = [graph.constant(value) for value in node.inputs[1:]]
    if every is None or not numbers or any(found is None for found in numbers):
        return None
    lists = [found.reshape(-1).tolist() for found in numbers if found is not None]
    if is_op(node, "Gather"):
        places = lists[0]
        if any(not -len(every) <= place < len(every) for place in places):
            return None
        return [every[place] for place in places]
    if len(lists) < 2 or any(len(each) != 1 for each in lists):
        return None
    step = lists[3][0] if len(lists) > 3 else 1
    return every[lists[0][0] : lists[1][0] : step]

"""Remove nodes that hand on their input as it is: y = x, bit for bit.

Identity; Dropout at inference; Cast to the type that the tensor has; Reshape, Flatten, Squeeze,
Unsqueeze and Expand to the shape that the tensor has; a Transpose that moves nothing, or moves back
what the Transpose before it moved; pools with a window of one, stride 1 and no padding; Pad by
nothing; Concat, Sum, Max, Min and Mean of one tensor; x * 1, x / 1, x - 0 and, where no bit can
change, x + 0. A floating x + 0.0 stays: it turns -0.0 into 0.0.

Readers of y read x instead. Where y is an output of the graph, x takes its name. Refused: shapes
and types that are not certain, Dropout that may run in training mode, and where names of the
interface would be lost: y is an output, and x an input, a constant, or an output itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from graphfold.cleanup import bypass, element_type, free_nodes, why_not_bypassed
from graphfold.graph import Graph, attribute, is_op, node_label
from graphfold.rewrite import Pass, Phase, Work

_INPUT_PADS_OPSET = 11
_INFERENCE_OPSET = 7


@dataclass(frozen=True)
class _Noop:
    """A node whose first output equals `source`, or nearly did."""

    node: ir.Node
    source: ir.Value
    reason: str | None = None


@dataclass(frozen=True)
class RemoveNoops(Pass):
    """Readers of y = x read x."""

    name: ClassVar[str] = "remove_noops"
    phase: ClassVar[Phase] = Phase.FOLD
    order: ClassVar[int] = -3

    def find(self, work: Work) -> Iterable[_Noop]:
        """Every node that hands on one of its inputs."""
        found = []
        for node in free_nodes(work):
            test = _TESTS.get(node.op_type)
            if test is None or any(_is_read(output) for output in node.outputs[1:]):
                continue
            result = test(work.graph, node)
            if isinstance(result, str):
                found.append(_Noop(node, node.outputs[0], result))
            elif result is not None:
                found.append(_Noop(node, result))
        return found

    def label(self, candidate: _Noop) -> str:
        """The node's output tensor."""
        return candidate.node.outputs[0].name or ""

    def check(self, work: Work, candidate: _Noop) -> str | None:
        """Refuse where a name of the interface would be lost."""
        if candidate.reason is not None:
            return candidate.reason
        source = work.graph.current(candidate.source)
        return why_not_bypassed(work, candidate.node.outputs[0], source)

    def rewrite(self, work: Work, candidate: _Noop) -> None:
        """Take the node out."""
        bypass(work, candidate.node.outputs[0], work.graph.current(candidate.source))


def _is_read(value: ir.Value) -> bool:
    return bool(value.uses()) or value.is_graph_output()


# What a test returns: the tensor that equals the node's output, a near miss as a sentence, or None.
_Answer = ir.Value | str | None


def _input(node: ir.Node, index: int = 0) -> ir.Value | None:
    return node.inputs[index] if index < len(node.inputs) else None


def _identity(graph: Graph, node: ir.Node) -> _Answer:
    del graph
    return _input(node)


def _single(graph: Graph, node: ir.Node) -> _Answer:
    del graph
    return _input(node) if len(node.inputs) == 1 else None


def _dropout(graph: Graph, node: ir.Node) -> _Answer:
    trains = f"{node_label(node)!r} may run in training mode"
    if graph.opset < _INFERENCE_OPSET and not attribute(node, "is_test", 0):
        return trains
    mode = _input(node, 2)
    if mode is not None:
        training = graph.constant(mode)
        if training is None or np.any(training):
            return trains
    return _input(node)


def _cast(graph: Graph, node: ir.Node) -> _Answer:
    source = _input(node)
    to = attribute(node, "to")
    if source is None or not isinstance(to, int):
        return None
    return source if element_type(graph, source) == ir.DataType(to) else None


def _same_shape(graph: Graph, node: ir.Node) -> _Answer:
    source = _input(node)
    before, after = graph.shape(source), graph.shape(node.outputs[0])
    if before is None or source is None:
        return None
    if before == after and all(isinstance(size, int) for size in before):
        return source
    if is_op(node, "Reshape") and _keeps(graph, node, before):
        return source
    if is_op(node, "Flatten") and len(before) == 2 and attribute(node, "axis", 1) in (1, -1):
        return source
    return None


def _keeps(graph: Graph, node: ir.Node, shape: Sequence[Any]) -> bool:
    """Whether a Reshape's target means the input's own shape, with at most one -1."""
    constant = graph.constant(_input(node, 1))
    target = attribute(node, "shape") if len(node.inputs) < 2 else constant
    if target is None or len(target) != len(shape) or attribute(node, "allowzero", 0):
        return False
    pairs = list(zip(target, shape, strict=True))
    free = [size for wanted, size in pairs if wanted == -1]
    return len(free) <= 1 and all(wanted in (0, -1) or wanted == size for wanted, size in pairs)


def _transpose(graph: Graph, node: ir.Node) -> _Answer:
    source = _input(node)
    if source is None:
        return None
    perm = attribute(node, "perm")
    shape = graph.shape(source)
    if perm is None and shape is not None:
        perm = list(range(len(shape)))[::-1]
    if perm is not None and list(perm) == list(range(len(perm))):
        return source
    before = source.producer()
    if before is None or not is_op(before, "Transpose") or before.graph is not node.graph:
        return None
    first = attribute(before, "perm")
    if first is None and perm is not None:
        first = list(range(len(perm)))[::-1]
    if first is None and perm is None:
        return _input(before)
    if first is None or perm is None or len(first) != len(perm):
        return None
    return _input(before) if [first[axis] for axis in perm] == list(range(len(perm))) else None


def _pool(graph: Graph, node: ir.Node) -> _Answer:
    del graph
    ones = ("kernel_shape", "strides")
    kernel = attribute(node, "kernel_shape")
    if kernel is None or any(attribute(node, "pads", ())):
        return None
    still = all(size == 1 for name in ones for size in attribute(node, name, ()))
    return _input(node) if still else None


def _pad(graph: Graph, node: ir.Node) -> _Answer:
    if graph.opset < _INPUT_PADS_OPSET:
        amounts = attribute(node, "pads")
    else:
        amounts = graph.constant(_input(node, 1))
    return _input(node) if amounts is not None and not np.any(amounts) else None


def _neutral(graph: Graph, node: ir.Node) -> _Answer:
    if len(node.inputs) != 2:
        return None
    for index in (1, 0) if is_op(node, "Mul", "Add") else (1,):
        value, source = node.inputs[index], node.inputs[1 - index]
        if value is None or source is None or not graph.is_constant(value):
            continue
        # Shapes first: nobody reads large weights for this.
        shape, rank = graph.shape(value), graph.shape(source)
        if shape is None or any(size != 1 for size in shape):
            continue
        if shape and (rank is None or len(rank) < len(shape)):
            continue
        data = graph.constant(value)
        if data is not None and data.size == 1 and _is_neutral(node, data.reshape(())):
            return source
    return None


def _is_neutral(node: ir.Node, data: NDArray[Any]) -> bool:
    if is_op(node, "Mul", "Div"):
        return bool(data == 1)
    if data != 0:
        return False
    # x - 0.0 and x + -0.0 keep every x, x + 0.0 and x - -0.0 do not keep -0.0.
    if not np.issubdtype(data.dtype, np.integer):
        return bool(np.signbit(data.astype(np.float64))) == is_op(node, "Add")
    return True


_TESTS: dict[str, Callable[[Graph, ir.Node], _Answer]] = {
    "Identity": _identity,
    "Dropout": _dropout,
    "Cast": _cast,
    **dict.fromkeys(("Reshape", "Flatten", "Squeeze", "Unsqueeze", "Expand"), _same_shape),
    "Transpose": _transpose,
    **dict.fromkeys(("MaxPool", "AveragePool"), _pool),
    "Pad": _pad,
    **dict.fromkeys(("Concat", "Sum", "Max", "Min", "Mean"), _single),
    **dict.fromkeys(("Add", "Sub", "Mul", "Div"), _neutral),
}

"""Compute what depends on constants only, and sizes that are known: f(c) becomes a constant.

A node whose inputs are all constants gives the same result on every run; onnxruntime computes it
here with the model's own operator and types, so the bits are those that the model would compute.
Shape and Size of a tensor whose sizes are fixed are constants too, and so is a Gather or Slice that
takes only fixed sizes of a Shape. Constant nodes become initializers. Tensors keep their names.

Only a fixed list of deterministic operators is computed: arithmetic, comparison, and what moves
data. Quantised weights stay quantised. Refused: results that are larger than their inputs by more
than four times and a million values, ConstantOfShape of more than a thousand (a file would grow),
integer divisions without a result, and conditions of If and Loop. Outputs of the graph stay results
of nodes. Before IR version 4, where every initializer is an input of the graph, and in functions,
which have none, a Constant node takes the place of what is computed; a Constant or ConstantOfShape
alone stays.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from graphfold import constants
from graphfold.cleanup import evaluate, free_nodes
from graphfold.graph import Graph, attribute, is_op
from graphfold.rewrite import Pass, Phase, Work, provenance
from graphfold.shapes import TensorShape

Array = NDArray[Any]

_LARGEST = 1 << 20
_LARGEST_FILL = 1 << 10
# Of a Constant node: the initializer that it is computed from stays, as it is an input.
_LARGEST_NODE = 1 << 12
_GROWTH = 4
_MOVES = frozenset({"Identity", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten"})
_COMPUTED = _MOVES | {
    *("Cast", "Concat", "ConstantOfShape", "Expand", "Gather", "GatherElements", "GatherND", "Pad"),
    *("Range", "ScatterElements", "ScatterND", "Slice", "Split", "Tile", "Trilu", "Where"),
    *("Abs", "Add", "Ceil", "Clip", "Cos", "Div", "Exp", "Floor", "Log", "Max", "Min", "Mod"),
    *("Mul", "Neg", "Pow", "Reciprocal", "Relu", "Round", "Sigmoid", "Sign", "Sin", "Sqrt", "Sub"),
    *("Sum", "Tanh", "And", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Not"),
    *("Or", "Xor", "NonZero", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd", "ReduceSum"),
    *("MatMul", "Shape", "Size"),
}


@dataclass(frozen=True)
class _Known:
    """A node and the values of its outputs, or why they are not computed."""

    node: ir.Node
    values: tuple[Array | ir.TensorProtocol, ...]
    reason: str | None = None


@dataclass(frozen=True)
class FoldConstants(Pass):
    """Initializers in the place of what computes them."""

    name: ClassVar[str] = "fold_constants"
    phase: ClassVar[Phase] = Phase.FOLD
    order: ClassVar[int] = -2

    def find(self, work: Work) -> Iterable[_Known]:
        """Nodes whose results are known, in execution order: each may use those before it."""
        as_nodes = not work.graph.holds_initializers
        if work.graph.shapes_may_grow:
            work.graph.refine_shapes()
            work.graph.shapes_may_grow = False
        found: list[_Known] = []
        known: dict[ir.Value, Array] = {}
        for node in free_nodes(work):
            if any(output.is_graph_output() for output in node.outputs):
                continue
            if not any(output.uses() for output in node.outputs) or _decides(node):
                continue
            result = _result(work.graph, node, known)
            if result is None:
                continue
            if not as_nodes or not is_op(node, "Constant", "ConstantOfShape"):
                found.append(result)
            for output, value in zip(node.outputs, result.values, strict=False):
                known[output] = value if isinstance(value, np.ndarray) else value.numpy()
        return found

    def label(self, candidate: _Known) -> str:
        """The node's output tensor."""
        return candidate.node.outputs[0].name or ""

    def check(self, work: Work, candidate: _Known) -> str | None:
        """Refuse what would grow, or has no result."""
        del work
        return candidate.reason

    def rewrite(self, work: Work, candidate: _Known) -> None:
        """Put initializers in the place of the node's outputs."""
        graph = work.graph
        for output, value in zip(candidate.node.outputs, candidate.values, strict=True):
            name = output.name
            if not name or not output.uses():
                continue
            data = value if isinstance(value, np.ndarray) else value.numpy()
            dtype = None if isinstance(value, np.ndarray) else value.dtype
            tensor = ir.tensor(np.ascontiguousarray(data).reshape(data.shape), dtype, name=name)
            graph.shapes[name] = tuple(int(size) for size in data.shape)
            if not graph.holds_initializers:
                metadata = provenance([candidate.node], self.name)
                attributes = [ir.AttrTensor("value", tensor)]
                node = ir.Node("", "Constant", [], attributes, metadata_props=metadata)
                graph.ir.insert_before(candidate.node, node)
                graph.take_over(output, node.outputs[0])
                continue
            constant = ir.Value(name=name, const_value=tensor)
            graph.take_over(output, constant)
            constant.shape, constant.type = ir.Shape(data.shape), ir.TensorType(tensor.dtype)
            graph.ir.register_initializer(constant)
        graph.remove_dead([candidate.node])
        graph.shapes_may_grow |= not is_op(candidate.node, "Constant")


def _decides(node: ir.Node) -> bool:
    """Whether an If or Loop asks for the result as its condition.

    Runtimes put a branch in the place of an If whose condition is constant, and may then refuse
    what they accepted inside.
    """
    return any(is_op(usage.node, "If", "Loop") for o in node.outputs for usage in o.uses())


def _result(graph: Graph, node: ir.Node, known: Mapping[ir.Value, Array]) -> _Known | None:
    if is_op(node, "Constant"):
        tensor = _constant(node)
        return None if tensor is None else _Known(node, (tensor,))
    if not is_op(node, *_COMPUTED) or not node.inputs:
        return None
    sizes = _sizes(graph, node, known)
    if sizes is not None:
        return _Known(node, (sizes,))
    inputs = [None if value is None else _value(graph, value, known) for value in node.inputs]
    if any(data is None for data, value in zip(inputs, node.inputs, strict=True) if value):
        return None
    arrays = [None if data is None else data() for data in inputs]
    reason = _too_large(graph, node, arrays) or _undefined(node, arrays)
    if reason is not None:
        return _Known(node, (), reason)
    if node.op_type in _MOVES:
        moved = constants.evaluate(node, arrays)
        return None if moved is None else _Known(node, (moved,))
    values = evaluate(graph, node, arrays)
    return None if values is None else _Known(node, tuple(values))


def _constant(node: ir.Node) -> Array | ir.TensorProtocol | None:
    """A Constant node's value, except strings, sparse tensors and data in other files."""
    for name in ("value_float", "value_floats"):
        if name in node.attributes:
            return np.asarray(attribute(node, name), np.float32)
    for name in ("value_int", "value_ints"):
        if name in node.attributes:
            return np.asarray(attribute(node, name), np.int64)
    tensor = attribute(node, "value")
    plain = isinstance(tensor, ir.TensorProtocol) and not isinstance(tensor, ir.ExternalTensor)
    return tensor if plain and tensor.dtype != ir.DataType.STRING else None


def _value(graph: Graph, value: ir.Value, known: Mapping[ir.Value, Array]) -> Any:
    """What gives a constant's data, or None. Not what graphs merely read as constants."""
    if value in known:
        return lambda: known[value]
    if not value.is_initializer() or not graph.is_constant(value):
        return None
    dtype = None if value.const_value is None else value.const_value.dtype
    return None if dtype == ir.DataType.STRING else lambda: graph.constant(value)


def _sizes(graph: Graph, node: ir.Node, known: Mapping[ir.Value, Array]) -> Array | None:
    """Sizes that are fixed, of a Shape or Size or what takes some of a Shape."""
    source = node.inputs[0]
    if is_op(node, "Shape", "Size"):
        shape = graph.shape(source)
        if shape is not None and is_op(node, "Shape"):
            shape = shape[attribute(node, "start", 0) : attribute(node, "end")]
        sizes = _fixed(shape)
        if sizes is not None and is_op(node, "Size"):
            return np.asarray(np.prod(sizes, dtype=np.int64))
        return sizes
    if source is None or not is_op(source.producer(), "Shape"):
        return None
    producer = source.producer()
    assert producer is not None
    shape = graph.shape(producer.inputs[0])
    if shape is None or "start" in producer.attributes or "end" in producer.attributes:
        return None
    if is_op(node, "Gather"):
        return _gathered(graph, node, shape, known)
    return _sliced(graph, node, shape, known) if is_op(node, "Slice") else None


def _fixed(shape: Iterable[Any] | None) -> Array | None:
    if shape is None:
        return None
    sizes = list(shape)
    return np.asarray(sizes, np.int64) if all(isinstance(size, int) for size in sizes) else None


def _gathered(
    graph: Graph, node: ir.Node, shape: TensorShape, known: Mapping[ir.Value, Array]
) -> Array | None:
    indices = _read(graph, node, 1, known)
    if indices is None or attribute(node, "axis", 0) not in (0, -1):
        return None
    if np.any(indices >= len(shape)) or np.any(indices < -len(shape)):
        return None
    sizes = _fixed(shape[index] for index in indices.reshape(-1).tolist())
    return None if sizes is None else sizes.reshape(indices.shape)


def _sliced(
    graph: Graph, node: ir.Node, shape: TensorShape, known: Mapping[ir.Value, Array]
) -> Array | None:
    if len(node.inputs) < 3:
        return None
    start, end = _read(graph, node, 1, known), _read(graph, node, 2, known)
    step = _read(graph, node, 4, known) if len(node.inputs) > 4 else np.ones(1, np.int64)
    if start is None or end is None or step is None:
        return None
    if start.size != 1 or end.size != 1 or step.size != 1 or step.item() < 1:
        return None
    return _fixed(shape[start.item() : end.item() : step.item()])


def _read(graph: Graph, node: ir.Node, index: int, known: Mapping[ir.Value, Array]) -> Array | None:
    value = node.inputs[index]
    if value is None:
        return None
    data = _value(graph, value, known)
    found: Array | None = None if data is None else data()
    return found


def _too_large(graph: Graph, node: ir.Node, arrays: list[Array | None]) -> str | None:
    given = sum(array.size for array in arrays if array is not None)
    largest = max(_LARGEST, _GROWTH * given)
    if is_op(node, "ConstantOfShape"):
        largest = _LARGEST_FILL
    elif not graph.holds_initializers:
        largest = _LARGEST_NODE
    held = max(_count(graph, output, node, arrays) for output in node.outputs)
    return f"it would hold {held} values" if held > largest else None


def _count(graph: Graph, output: ir.Value, node: ir.Node, arrays: list[Array | None]) -> int:
    """Number of values of an output, as far as it is known before it is computed."""
    first, second = (*arrays, None, None)[:2]
    if is_op(node, "ConstantOfShape") and first is not None:
        return int(np.prod(first, dtype=object))
    if is_op(node, "Expand", "Tile") and first is not None and second is not None:
        return int(np.prod(second, dtype=object)) * first.size
    if is_op(node, "Range"):
        start, limit, delta = (float(array.item()) for array in arrays if array is not None)
        return int(abs((limit - start) / delta)) if delta else 0
    shape = _fixed(graph.shape(output))
    return 0 if shape is None else int(np.prod(shape, dtype=object))


def _undefined(node: ir.Node, arrays: list[Array | None]) -> str | None:
    """Integer divisions that a runtime may answer with a crash."""
    if not is_op(node, "Div", "Mod") or arrays[0] is None or arrays[1] is None:
        return None
    dividend, divisor = arrays[0], arrays[1]
    if not np.issubdtype(divisor.dtype, np.integer):
        return None
    smallest = np.iinfo(divisor.dtype).min
    overflows = smallest < 0 and np.any(divisor == -1) and np.any(dividend == smallest)
    return "it divides by zero or overflows" if np.any(divisor == 0) or overflows else None

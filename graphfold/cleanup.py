"""What the clean-up passes share: which nodes and tensors they may touch, and types of tensors.

Clean-ups keep away from what they do not understand: custom domains, attributes of an enclosing
function, tensors that a subgraph captures. Tensors that a plan's segment names, and the operators
that segments became, stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from graphfold import guard
from graphfold.graph import (
    DEFAULT_DOMAINS,
    Graph,
    attribute,
    has_reference_attributes,
    is_op,
    only_consumer,
)
from graphfold.rewrite import Work

_SUBGRAPHS = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
# Operators whose first output has the element type of their first input.
_SAME_TYPE = (
    *("Identity", "Relu", "LeakyRelu", "PRelu", "Clip", "Sigmoid", "Tanh", "HardSigmoid"),
    *("HardSwish", "Elu", "Softmax", "Add", "Sub", "Mul", "Div", "Sum", "Max", "Min", "Concat"),
    *("Conv", "ConvTranspose", "Gemm", "MatMul", "BatchNormalization", "Dropout", "Pad"),
    *("MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool", "ReduceMean"),
    *("Reshape", "Flatten", "Squeeze", "Unsqueeze", "Expand", "Transpose", "Slice", "Gather"),
    *("Split", "Resize", "Upsample", "DepthToSpace", "SpaceToDepth"),
)
_FURTHEST = 64
# What numpy itself has: bool, integers, floats. bfloat16 and the like onnxruntime hands out cast.
_NUMPY_KINDS = "biuf"
_IR_VERSION = 8


def understood(node: ir.Node) -> bool:
    """An operator of the default domain whose attributes are all known, without subgraphs."""
    if node.domain not in DEFAULT_DOMAINS:
        return False
    return not node.attributes or not (has_reference_attributes(node) or _has_subgraph(node))


def is_captured(graph: Graph, value: ir.Value) -> bool:
    """Whether some subgraph reads this tensor of the main graph."""
    return any(usage.node.graph is not graph.ir for usage in value.uses())


def fixed_names(work: Work) -> set[str]:
    """Names of tensors that a plan's segments begin and end with."""
    return {name for segment in work.segments for name in (segment.input, segment.output)}


def free_nodes(work: Work, *op_types: str) -> Iterator[ir.Node]:
    """Nodes (of some types, or all) that a clean-up may rewrite, in execution order.

    They come from a list that stays valid while the graph is edited.
    """
    names = fixed_names(work)
    # What no subgraph can capture need not be asked for.
    scopes = any(_has_subgraph(node) for node in work.graph.ir)
    for node in work.graph.nodes():
        if op_types and node.op_type not in op_types:
            continue
        if node in work.barrier or not understood(node):
            continue
        if names and any(value.name in names for value in node.outputs):
            continue
        if scopes and any(is_captured(work.graph, value) for value in node.outputs):
            continue
        yield node


def _has_subgraph(node: ir.Node) -> bool:
    return any(attr.type in _SUBGRAPHS for attr in node.attributes.data.values())


@dataclass(frozen=True)
class Pair:
    """Two operators of a kind in a row: the second reads the first's result."""

    second: ir.Node

    @property
    def first(self) -> ir.Node:
        """What the second reads now: an earlier merge may have put another in its place."""
        before = _before(self.second)
        assert before is not None
        return before

    @property
    def output(self) -> str:
        """The second one's output tensor."""
        return self.second.outputs[0].name or ""

    def why_apart(self) -> str | None:
        """Why the first one's result must stay, or None."""
        between = self.first.outputs[0]
        needed = only_consumer(between) is None
        return f"{between.name!r} is needed elsewhere too" if needed else None


def pairs(work: Work, *op_types: str) -> list[Pair]:
    """Every operator of these kinds that reads one of them as its data, in execution order."""
    nodes = list(free_nodes(work, *op_types))
    known = set(nodes)
    return [Pair(node) for node in nodes if _before(node) in known]


def _before(node: ir.Node) -> ir.Node | None:
    source = node.inputs[0]
    return None if source is None else source.producer()


def why_not_bypassed(work: Work, output: ir.Value, source: ir.Value) -> str | None:
    """Why `source` cannot take the place, and where needed the name, of `output`; or None."""
    if not output.is_graph_output():
        return None
    what = f"{output.name!r} is an output of the graph"
    if source.producer() is None:
        return f"{what}, and {source.name!r} is not the result of a node"
    if source.is_graph_output():
        return f"{what}, and so is {source.name!r}"
    if source.name in fixed_names(work):
        return f"{what}, and {source.name!r} is named by the plan"
    if is_captured(work.graph, source):
        return f"{what}, and a subgraph reads {source.name!r}"
    return None


def bypass(work: Work, output: ir.Value, source: ir.Value) -> None:
    """Let readers of `output` read `source`, which inherits what is known of `output`'s shape.

    What made `output` is removed. The caller asked `why_not_bypassed` before.
    """
    graph = work.graph
    made = output.producer()
    shape = graph.shape(output)
    if shape is not None and source.producer() is not None and graph.shape(source) is None:
        # Where only the declaration knew it (behind a custom operator), it must not be lost.
        source.shape, source.type = output.shape, source.type or output.type
        graph.shapes[source.name or ""] = shape
    graph.bypass(output, source, shared=True)
    if made is not None:
        graph.remove_dead([made])


def element_type(graph: Graph, value: ir.Value | None) -> ir.DataType | None:
    """Element type of a tensor where declarations, or operators that keep it, prove it."""
    for _ in range(_FURTHEST):
        if value is None:
            return None
        if value.dtype not in (None, ir.DataType.UNDEFINED):
            return value.dtype
        if value.const_value is not None:
            return value.const_value.dtype
        producer = value.producer()
        if producer is None or value is not producer.outputs[0]:
            return None
        if is_op(producer, "Cast"):
            to = attribute(producer, "to")
            return None if to is None else ir.DataType(to)
        if is_op(producer, "Shape", "Size"):
            return ir.DataType.INT64
        if is_op(producer, "Constant", "ConstantOfShape"):
            return graph.dtype(value)
        if not is_op(producer, *_SAME_TYPE) or not producer.inputs:
            return None
        value = producer.inputs[0]
    return None


def evaluate(
    graph: Graph, node: ir.Node, inputs: Sequence[NDArray[Any] | None]
) -> list[NDArray[Any]] | None:
    """What onnxruntime computes for one node of the default domain; None where it cannot."""
    import onnx

    from graphfold.runtime import RunError, Runnable, Session

    if guard.avoided(guard.CONSTANTS) is not None:
        return None
    types = [data.dtype for data in inputs if data is not None]
    if is_op(node, "Cast"):
        types.append(np.dtype(ir.DataType(attribute(node, "to")).numpy()))
    if any(dtype.kind not in _NUMPY_KINDS for dtype in types):
        return None
    proto = ir.to_proto(node)
    del proto.input[:]
    names = ["" if data is None else f"input{index}" for index, data in enumerate(inputs)]
    proto.input.extend(names)
    proto.domain = ""
    tensors = [
        ir.to_proto(ir.tensor(np.ascontiguousarray(data).reshape(data.shape), name=name))
        for name, data in zip(names, inputs, strict=True)
        if data is not None
    ]
    outputs = [onnx.ValueInfoProto(name=name) for name in proto.output if name]
    if len(outputs) < len(proto.output):
        return None
    body = onnx.helper.make_graph([proto], "constants", [], outputs, tensors)
    opsets = [onnx.helper.make_opsetid("", graph.opset)]
    model = onnx.helper.make_model(body, opset_imports=opsets, ir_version=_IR_VERSION)
    try:
        with guard.step(guard.CONSTANTS), Runnable(model.SerializeToString()) as runnable:
            results = Session(runnable, optimize=False, threads=1).run({})
    except RunError:
        return None
    return [results[name] for name in proto.output] if set(proto.output) == set(results) else None

"""The tensors and values of an onnx-ir model, found without looking at their data."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

import onnx_ir

from graphfold.origins import SPARSE

SMALL_TENSOR_BYTES = 1024
"""Tensors up to this size stay inside the model file and are part of payload-free protos."""


def values_by_name(graph: onnx_ir.Graph) -> dict[str, onnx_ir.Value]:
    """All named values that `graph` itself defines: inputs, initializers, node outputs."""
    found: dict[str, onnx_ir.Value] = {}
    for value in _values(graph):
        if value.name:
            found[value.name] = value
    return found


def _values(graph: onnx_ir.Graph) -> Iterable[onnx_ir.Value]:
    yield from graph.inputs
    yield from graph.initializers.values()
    for node in graph:
        yield from node.outputs


def tensors(model: onnx_ir.Model) -> Iterator[onnx_ir.TensorProtocol]:
    """Every tensor of the model: initializers and attributes, in graphs, subgraphs, functions."""
    for graph in (model.graph, *(function.graph for function in model.functions.values())):
        yield from graph_tensors(graph)


def graph_tensors(graph: onnx_ir.Graph) -> Iterator[onnx_ir.TensorProtocol]:
    """Every tensor of one graph and of the subgraphs in it, in the order they are written."""
    for value in graph.initializers.values():
        if value.const_value is not None:
            yield value.const_value
    for node in graph:
        for attr in node.attributes.values():
            if attr.is_ref():
                continue
            if attr.type == onnx_ir.AttributeType.TENSOR:
                yield attr.value
            elif attr.type == onnx_ir.AttributeType.TENSORS:
                yield from attr.value
            elif attr.type == onnx_ir.AttributeType.GRAPH:
                yield from graph_tensors(attr.value)
            elif attr.type == onnx_ir.AttributeType.GRAPHS:
                for sub in attr.value:
                    yield from graph_tensors(sub)


def is_sparse(tensor: onnx_ir.TensorProtocol) -> bool:
    """Whether `tensor` is the dense view of a sparse initializer, written back as that."""
    return isinstance(tensor, onnx_ir.LazyTensor) and SPARSE in tensor.meta


def payload_bytes(tensor: onnx_ir.TensorProtocol) -> int:
    """The number of bytes of the tensor's elements (strings: of their characters)."""
    if tensor.dtype == onnx_ir.DataType.STRING:
        return sum(len(item) for item in strings(tensor))
    if isinstance(tensor, onnx_ir.serde.TensorProtoTensor):
        dims: Sequence[int] = tensor.raw.dims
    else:
        dims = tensor.shape.numpy()
    return math.ceil(math.prod(dims) * tensor.dtype.bitwidth / 8)


def strings(tensor: onnx_ir.TensorProtocol) -> Sequence[bytes]:
    """The elements of a string tensor, as bytes."""
    if isinstance(tensor, onnx_ir.StringTensor):
        return tensor.string_data()
    flat = tensor.numpy().reshape(-1)
    return [item if isinstance(item, bytes) else str(item).encode() for item in flat]


def first_bytes(tensor: onnx_ir.TensorProtocol, count: int) -> bytes:
    """The bytes of the tensor's first `count` elements; data on disk is read no further."""
    return bytes(tensor.numpy().reshape(-1)[:count].tobytes())

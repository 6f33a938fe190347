"""A model's proto without its weights, for the checker and for shape inference.

Made straight from the proto that was read: messages are copied as a whole, and only initializers
are looked at one by one.
"""

from __future__ import annotations

import math

import onnx

from graphfold.origins import without
from graphfold.tensors import SMALL_TENSOR_BYTES

_LISTS = ("initializer", "sparse_initializer")


class Outline:
    """The proto of a model whose large initializers are stubs of no elements.

    Attributes:
        proto: for the checker, which may change interface and domains to its liking.
    """

    def __init__(self, source: onnx.ModelProto) -> None:
        self._source = source
        self.proto = without(source, "graph", "training_info")
        self.proto.graph.CopyFrom(without(source.graph, *_LISTS))
        self._stubs: list[tuple[onnx.TensorProto, onnx.TensorProto]] = []
        for tensor in source.graph.initializer:
            copy = self.proto.graph.initializer.add()
            if _is_small(tensor):
                copy.CopyFrom(tensor)
                continue
            copy.name, copy.data_type = tensor.name, tensor.data_type
            copy.dims.append(0)
            self._stubs.append((copy, tensor))

    def with_shapes(self) -> onnx.ModelProto:
        """The same proto with the true interface and shapes of initializers, for inference."""
        for copy, tensor in self._stubs:
            copy.dims[:] = tensor.dims
        for target, infos in (
            (self.proto.graph.input, self._source.graph.input),
            (self.proto.graph.output, self._source.graph.output),
        ):
            del target[:]
            target.extend(infos)
        return self.proto


def _is_small(tensor: onnx.TensorProto) -> bool:
    """A tensor of few elements, whose data counts: shapes and axes are such."""
    if tensor.data_location == onnx.TensorProto.EXTERNAL:
        return False
    if tensor.data_type == onnx.TensorProto.STRING:
        return False
    return bool(8 * math.prod(tensor.dims) <= SMALL_TENSOR_BYTES)


def can_be_outlined(source: onnx.ModelProto) -> bool:
    """Whether all that is large in a model are the main graph's initializers."""
    if source.functions or source.graph.sparse_initializer:
        return False
    return not any(_holds_tensors(attr) for node in source.graph.node for attr in node.attribute)


def _holds_tensors(attribute: onnx.AttributeProto) -> bool:
    kind = attribute.type
    if kind == onnx.AttributeProto.TENSOR:
        return not _is_small(attribute.t)
    return bool(kind in _NESTED)


_NESTED = frozenset(
    {onnx.AttributeProto.TENSORS, onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS}
    | {onnx.AttributeProto.SPARSE_TENSOR, onnx.AttributeProto.SPARSE_TENSORS}
)

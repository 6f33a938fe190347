"""Shapes of tensors: as a model declares them, and as onnx infers them."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from graphfold import guard

if TYPE_CHECKING:
    import onnx

    from graphfold.model import Model

Dim = int | str | None
TensorShape = tuple[Dim, ...]

# Where a subgraph keeps the shapes that the inference of the model found in it.
SHAPES_KEY = "graphfold.shapes"
_GRAPH_TYPES = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)


def declared_shape(value: ir.Value) -> TensorShape | None:
    """The shape that stands with a tensor, None where there is none."""
    if value.shape is None:
        return None
    return tuple(_plain_dim(dim) for dim in value.shape)


def _plain_dim(dim: int | ir.SymbolicDim) -> Dim:
    if isinstance(dim, int):
        return dim
    return dim.value


def infer_shapes(model: Model) -> dict[str, TensorShape]:
    """Shapes of all tensors of the main graph, by name, from onnx's own shape inference.

    Runs on a copy without weight payloads; the model's own value_info is not touched. Tensors
    whose rank stays unknown are absent. Models that onnx cannot infer keep declared shapes only.
    What is found in subgraphs is kept with each, under `SHAPES_KEY`.
    """
    from graphfold.model import to_proto

    return _inferred(model, to_proto(model, data=False))


def shapes_as_read(model: Model) -> dict[str, TensorShape]:
    """The same for a model that nothing edited since it was loaded, with less copying."""
    return _inferred(model, model.take_outline())


def _inferred(model: Model, proto: onnx.ModelProto) -> dict[str, TensorShape]:
    import onnx

    from graphfold.check import shorten_default_domain

    shorten_default_domain(proto)
    _show_shapes_to_onnx(proto.graph)
    inferred = proto
    if guard.avoided(guard.INFERENCE) is None:
        # onnx raises several kinds of errors; declared shapes remain.
        with contextlib.suppress(Exception), guard.inference(len(proto.graph.node)):
            inferred = onnx.shape_inference.infer_shapes(proto, data_prop=True)
    _keep_subgraph_shapes(inferred.graph, model.ir.graph)
    return _proto_shapes(inferred.graph)


def _show_shapes_to_onnx(graph: Any) -> None:
    """Put an Identity where a result has its input's shape and onnx cannot tell, in a copy."""
    for node in graph.node:
        if node.op_type == "GroupNormalization" and not node.domain:
            node.op_type = "Identity"
            del node.input[1:]
            del node.attribute[:]


def _proto_shapes(graph: Any) -> dict[str, TensorShape]:
    shapes: dict[str, TensorShape] = {}
    for info in (*graph.input, *graph.value_info, *graph.output):
        if info.type.WhichOneof("value") == "tensor_type" and info.type.tensor_type.HasField(
            "shape"
        ):
            shapes[info.name] = tuple(_proto_dim(dim) for dim in info.type.tensor_type.shape.dim)
    for tensor in graph.initializer:
        shapes[tensor.name] = tuple(tensor.dims)
    return shapes


def _keep_subgraph_shapes(proto: Any, graph: ir.Graph) -> None:
    """Hand each subgraph the shapes that were found in it."""
    for index, node in enumerate(graph):
        for attr in node.attributes.values():
            if attr.type not in _GRAPH_TYPES or attr.is_ref():
                continue
            one = attr.type == ir.AttributeType.GRAPH
            bodies = [attr.as_graph()] if one else list(attr.as_graphs())
            written = next(item for item in proto.node[index].attribute if item.name == attr.name)
            for body, found in zip(bodies, [written.g] if one else written.graphs, strict=True):
                body.meta[SHAPES_KEY] = _proto_shapes(found)
                _keep_subgraph_shapes(found, body)


def _proto_dim(dim: Any) -> Dim:
    kind = dim.WhichOneof("value")
    if kind == "dim_value":
        return int(dim.dim_value)
    return str(dim.dim_param) if kind == "dim_param" else None

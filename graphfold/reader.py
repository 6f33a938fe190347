"""From ONNX protos to onnx-ir without loss.

onnx-ir keeps what a model means but not always how it was written: it drops sparse tensors and map
types, duplicates the metadata of initializers, sorts metadata, adds value_info to initializers and
forgets the difference between an empty and an absent field. So each message of the source is
compared with what onnx-ir would write for it, and both forms of those that differ are kept beside
the object they belong to, in its `meta` store, which `onnx_ir.Model.clone` carries along.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx
import onnx_ir
from google.protobuf.message import Message
from numpy.typing import NDArray
from onnx import numpy_helper
from onnx_ir import serde

from graphfold.errors import ModelError
from graphfold.origins import (
    KEY,
    SPARSE,
    VALUE_FIELDS,
    AnyGraph,
    AttributeType,
    GraphOrigin,
    Header,
    NodeOrigin,
    NodeSource,
    Origin,
    copied,
    origin_of,
    without,
)
from graphfold.tensors import values_by_name
from graphfold.writer import (
    write_attribute_header,
    write_function_header,
    write_graph_header,
    write_model_header,
    write_node_header,
    write_tensor_header,
)

_SCALARS = (("i", AttributeType.INT), ("f", AttributeType.FLOAT), ("s", AttributeType.STRING))
# Attributes that onnx-ir holds as they are, references to them included; texts where it can.
_NUMBERS = frozenset(
    {onnx_ir.AttributeType.INT, onnx_ir.AttributeType.INTS}
    | {onnx_ir.AttributeType.FLOAT, onnx_ir.AttributeType.FLOATS}
)
_TEXTS = frozenset({onnx_ir.AttributeType.STRING, onnx_ir.AttributeType.STRINGS})
# What onnx-ir notices is told in this program's own words, or not at all.
logging.getLogger("onnx_ir").addHandler(logging.NullHandler())


def read(original: onnx.ModelProto) -> tuple[onnx_ir.Model, Header]:
    """Return the onnx-ir model of `original` with what onnx-ir would lose kept in `meta` stores.

    The tensors of the result refer to `original`, which must not change afterwards.
    The graph must be well formed (see `graphfold.check`), otherwise onnx-ir raises its own errors.
    """
    _refuse_references(original.graph)
    plain = _representable(original)
    try:
        model = serde.deserialize_model(plain)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        # Fields of types that no exporter writes; onnx-ir has no error of its own for them.
        raise ModelError(f"cannot be understood: {error}", hint="export the model again") from error
    _remember_graph(original.graph, model.graph)
    for proto, function in zip(original.functions, model.functions.values(), strict=True):
        _remember_function(proto, function)
    canonical = onnx.ModelProto()
    write_model_header(canonical, model)
    return model, Header(origin_of(canonical, without(original, "graph", "functions")))


def _refuse_references(graph: onnx.GraphProto) -> None:
    """Outside functions an attribute cannot refer to one of the function that encloses it."""
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.ref_attr_name:
                raise ModelError(
                    f"the attribute {attribute.name!r} of {node.name or node.op_type!r} refers to "
                    f"{attribute.ref_attr_name!r} of a function, and is in none",
                    hint="export the model again",
                )
        for sub in _subgraphs(node):
            _refuse_references(sub)


def _representable(original: onnx.ModelProto) -> onnx.ModelProto:
    """Return `original`, or a copy in which placeholders stand for what onnx-ir cannot hold."""
    if not any(_lossy_graph(graph) for graph in _top_graphs(original)):
        return original
    copy = onnx.ModelProto()
    copy.CopyFrom(original)
    for graph in _top_graphs(copy):
        _make_representable(graph)
    return copy


def _top_graphs(model: onnx.ModelProto) -> list[AnyGraph]:
    return [model.graph, *model.functions]


def _subgraphs(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def _infos(graph: AnyGraph) -> Iterator[onnx.ValueInfoProto]:
    yield from graph.value_info
    if isinstance(graph, onnx.GraphProto):
        yield from graph.input
        yield from graph.output


def _lossy_graph(graph: AnyGraph) -> bool:
    if isinstance(graph, onnx.GraphProto) and graph.sparse_initializer:
        return True
    return (
        any(_lossy_type(info.type) for info in _infos(graph))
        or any(_lossy_attribute(item) for node in graph.node for item in node.attribute)
        or any(_lossy_graph(sub) for node in graph.node for sub in _subgraphs(node))
    )


def _lossy_type(proto: onnx.TypeProto) -> bool:
    kind = proto.WhichOneof("value")
    if kind in ("sequence_type", "optional_type"):
        element = getattr(proto, kind).elem_type
        return element.WhichOneof("value") is None or _lossy_type(element)
    return kind in ("map_type", "opaque_type")


def _lossy_attribute(attribute: onnx.AttributeProto) -> bool:
    if attribute.ref_attr_name:
        return False
    kind = attribute.type
    for name, stated in _SCALARS:
        if kind != stated and kind != AttributeType.UNDEFINED and attribute.HasField(name):
            raise ModelError(
                f"the attribute {attribute.name!r} has a value that contradicts its type",
                hint="export the model again",
            )
    if kind == AttributeType.STRING:
        return not _is_utf8(attribute.s)
    if kind == AttributeType.STRINGS:
        return not all(_is_utf8(text) for text in attribute.strings)
    if kind == AttributeType.TYPE_PROTO:
        return _lossy_type(attribute.tp)
    if kind == AttributeType.TYPE_PROTOS:
        return any(_lossy_type(item) for item in attribute.type_protos)
    return kind in (
        AttributeType.UNDEFINED,
        AttributeType.SPARSE_TENSOR,
        AttributeType.SPARSE_TENSORS,
    )


def _is_utf8(text: bytes) -> bool:
    try:
        text.decode()
    except UnicodeDecodeError:
        return False
    return True


def _make_representable(graph: AnyGraph) -> None:
    for info in _infos(graph):
        if _lossy_type(info.type):
            info.ClearField("type")
    for node in graph.node:
        for attribute in node.attribute:
            if _lossy_attribute(attribute):
                _make_attribute_representable(attribute)
        for sub in _subgraphs(node):
            _make_representable(sub)
    if isinstance(graph, onnx.GraphProto):
        for sparse in graph.sparse_initializer:
            graph.initializer.add(
                name=sparse.values.name, data_type=sparse.values.data_type, dims=sparse.dims
            )


def _make_attribute_representable(attribute: onnx.AttributeProto) -> None:
    """Give an untyped attribute (allowed in IR version 1) its type, or put a placeholder.

    `_opaque_attribute` replaces the placeholder once onnx-ir has read the rest of the node.
    """
    if attribute.type == AttributeType.UNDEFINED:
        for name, kind in VALUE_FIELDS.items():
            if name in {set_field.name for set_field, _ in attribute.ListFields()}:
                attribute.type = kind
                break
        if not _lossy_attribute(attribute):
            return
    name = attribute.name
    attribute.Clear()
    attribute.name = name
    attribute.type = AttributeType.STRING
    attribute.s = b""


def _remember_graph(proto: onnx.GraphProto, graph: onnx_ir.Graph) -> None:
    for sparse in proto.sparse_initializer:
        graph.initializers[sparse.values.name].const_value = _dense(sparse)
    for tensor in proto.initializer:
        value = graph.initializers.get(tensor.name)
        if value is not None and value.const_value is not None:
            _remember_tensor(tensor, value.const_value)
    for kind, infos, values in (
        ("input", proto.input, graph.inputs),
        ("output", proto.output, graph.outputs),
    ):
        for index, (info, value) in enumerate(zip(infos, values, strict=True)):
            _remember_info(info, value, f"{kind} {index}")
    canonical = onnx.GraphProto()
    write_graph_header(canonical, graph)
    children = ("node", "initializer", "sparse_initializer", "input", "output")
    lists = ("value_info", "quantization_annotation")
    header = origin_of(canonical, without(proto, *children, *lists))
    _remember_body(proto, graph, header)


def _remember_function(proto: onnx.FunctionProto, function: onnx_ir.Function) -> None:
    canonical = onnx.FunctionProto()
    write_function_header(canonical, function)
    header = origin_of(canonical, without(proto, "node", "value_info"))
    _remember_body(proto, function.graph, header)


def _remember_body(proto: AnyGraph, graph: onnx_ir.Graph, header: Origin | None) -> None:
    values = values_by_name(graph)
    listed: list[str | onnx.ValueInfoProto] = []
    for info in proto.value_info:
        value = values.get(info.name)
        if value is None:
            listed.append(copied(info))
        else:
            listed.append(info.name)
            _remember_info(info, value, "info")
    quantization = proto.quantization_annotation if isinstance(proto, onnx.GraphProto) else ()
    graph.meta[KEY] = GraphOrigin(
        header, frozenset(values), tuple(listed), tuple(copied(item) for item in quantization)
    )
    for node_proto, node in zip(proto.node, graph, strict=True):
        _remember_node(node_proto, node)


def _remember_info(info: onnx.ValueInfoProto, value: onnx_ir.Value, role: str) -> None:
    canonical = onnx.ValueInfoProto()
    serde.serialize_value_into(canonical, value)
    if canonical != info:
        value.meta.setdefault(KEY, {})[role] = Origin(canonical, copied(info))


def _opaque_attribute(proto: onnx.AttributeProto) -> onnx_ir.Attr | None:
    """Return an attribute that onnx-ir would refuse, its value being bytes or protos."""
    if not _lossy_attribute(proto) or proto.type == AttributeType.UNDEFINED:
        return None
    value: Any = getattr(
        proto, next(key for key, kind in VALUE_FIELDS.items() if kind == proto.type)
    )
    if isinstance(value, Message):
        value = copied(value)
    elif not isinstance(value, bytes):
        value = tuple(copied(item) if isinstance(item, Message) else item for item in value)
    kind = onnx_ir.AttributeType(proto.type)
    return onnx_ir.Attr(proto.name, kind, value, doc_string=proto.doc_string or None)


def _remember_node(proto: onnx.NodeProto, node: onnx_ir.Node) -> None:
    attributes = tuple(node.attributes.data.values())
    if _is_plain(proto, attributes):
        node.meta[KEY] = NodeSource(proto, attributes)
        return
    for attribute in proto.attribute:
        opaque = _opaque_attribute(attribute)
        if opaque is not None:
            node.attributes[attribute.name] = opaque
    canonical = onnx.NodeProto()
    write_node_header(canonical, node)
    origin = NodeOrigin(origin_of(canonical, without(proto, "attribute")))
    for attribute in proto.attribute:
        attr = node.attributes.get(attribute.name)
        if attr is not None:
            _remember_attribute(attribute, attr, origin)
    if origin.header is not None or origin.attributes:
        node.meta[KEY] = origin


def _is_plain(proto: onnx.NodeProto, attributes: tuple[onnx_ir.Attr, ...]) -> bool:
    """Whether a node holds neither tensors nor graphs, nor anything that onnx-ir would lose."""
    if proto.device_configurations:
        return False
    if all(attr.type in _NUMBERS for attr in attributes):
        return True
    if any(attr.type not in _NUMBERS and attr.type not in _TEXTS for attr in attributes):
        return False
    return not any(_lossy_attribute(attribute) for attribute in proto.attribute)


def _remember_attribute(proto: onnx.AttributeProto, attr: onnx_ir.Attr, origin: NodeOrigin) -> None:
    canonical = onnx.AttributeProto()
    write_attribute_header(canonical, attr)
    found = origin_of(canonical, without(proto, "t", "tensors", "g", "graphs"))
    if found is not None:
        origin.attributes[proto.name] = found
    if attr.is_ref():
        return
    if attr.type == onnx_ir.AttributeType.TENSOR:
        _remember_tensor(proto.t, attr.value)
    elif attr.type == onnx_ir.AttributeType.TENSORS:
        for tensor_proto, tensor in zip(proto.tensors, attr.value, strict=True):
            _remember_tensor(tensor_proto, tensor)
    elif attr.type == onnx_ir.AttributeType.GRAPH:
        _remember_graph(proto.g, attr.value)
    elif attr.type == onnx_ir.AttributeType.GRAPHS:
        for graph_proto, graph in zip(proto.graphs, attr.value, strict=True):
            _remember_graph(graph_proto, graph)


def _remember_tensor(proto: onnx.TensorProto, tensor: onnx_ir.TensorProtocol) -> None:
    if isinstance(tensor, serde.TensorProtoTensor):
        return  # holds the proto itself
    canonical = onnx.TensorProto()
    write_tensor_header(canonical, tensor)
    original = without(proto, "string_data", "external_data", "data_location")
    origin = origin_of(canonical, original)
    if origin is not None:
        tensor.meta[KEY] = origin


def _dense(sparse: onnx.SparseTensorProto) -> onnx_ir.LazyTensor:
    """Return a tensor with the dense values of `sparse`, made when asked for."""
    kept = copied(sparse)

    def values() -> onnx_ir.Tensor[Any]:
        flat = numpy_helper.to_array(kept.values)
        indices = numpy_helper.to_array(kept.indices)
        dims = tuple(kept.dims)
        out: NDArray[Any] = np.zeros(dims, dtype=flat.dtype)
        if indices.ndim == 1:
            out.reshape(-1)[indices] = flat
        else:
            out[tuple(indices.T)] = flat
        return onnx_ir.Tensor(out, name=kept.values.name)

    tensor = onnx_ir.LazyTensor(
        values,
        dtype=onnx_ir.DataType(kept.values.data_type),
        shape=onnx_ir.Shape(kept.dims),
        name=kept.values.name,
    )
    tensor.meta[SPARSE] = kept
    return tensor

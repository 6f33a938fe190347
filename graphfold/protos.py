"""Between ONNX protos and onnx-ir without loss.

Every field that no pass rewrote comes out as it was.

onnx-ir keeps what a model means but not always how it was written: it drops sparse tensors and map
types, duplicates the metadata of initializers, sorts metadata, adds value_info to initializers and
forgets the difference between an empty and an absent field. So `read` compares each message of the
source with what onnx-ir would write for it, and keeps both forms of those that differ beside the
object they belong to (in its `meta` store, which `onnx_ir.Model.clone` carries along). `write` then
gives back the original form, field by field, wherever the object still says what it said then: what
a pass changed stays changed, what it removed stays removed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, NamedTuple, TypeVar

import numpy as np
import onnx
import onnx_ir
from google.protobuf.message import Message
from numpy.typing import NDArray
from onnx import numpy_helper
from onnx_ir import serde

SMALL_TENSOR_BYTES = 1024
"""Tensors up to this size stay inside the model file and are part of payload-free protos."""

_KEY = "graphfold.origin"
_SPARSE = "graphfold.sparse_initializer"
_QUANTIZATION = "quant_parameter_tensor_names"  # where onnx-ir keeps a value's annotation
_FUNCTION_VALUE_INFO_IR_VERSION = 10

_AttributeType = onnx.AttributeProto
_VALUE_FIELDS = {
    "f": _AttributeType.FLOAT,
    "i": _AttributeType.INT,
    "s": _AttributeType.STRING,
    "t": _AttributeType.TENSOR,
    "g": _AttributeType.GRAPH,
    "sparse_tensor": _AttributeType.SPARSE_TENSOR,
    "tp": _AttributeType.TYPE_PROTO,
    "floats": _AttributeType.FLOATS,
    "ints": _AttributeType.INTS,
    "strings": _AttributeType.STRINGS,
    "tensors": _AttributeType.TENSORS,
    "graphs": _AttributeType.GRAPHS,
    "sparse_tensors": _AttributeType.SPARSE_TENSORS,
    "type_protos": _AttributeType.TYPE_PROTOS,
}
# Attribute types whose content is written apart from the attribute's own fields.
_NESTED = {
    onnx_ir.AttributeType.TENSOR,
    onnx_ir.AttributeType.TENSORS,
    onnx_ir.AttributeType.GRAPH,
    onnx_ir.AttributeType.GRAPHS,
}


class Payload(Enum):
    """What `write` does with the data of tensors above `SMALL_TENSOR_BYTES`."""

    INLINE = "inline"  # raw bytes in the proto
    OMIT = "omit"  # type and dims only: shape inference needs no more
    STUB = "stub"  # as omit but with dims [0], which the checker accepts


class Location(NamedTuple):
    """Where a tensor's bytes lie: a file name relative to the model, offset and length in bytes."""

    file: str
    offset: int
    length: int


class _Origin(NamedTuple):
    """A message as the source had it, and as onnx-ir writes it when nothing changed."""

    canonical: Message
    original: Message


@dataclass
class _NodeOrigin:
    header: _Origin | None
    attributes: dict[str, _Origin] = field(default_factory=dict)


@dataclass(frozen=True)
class _GraphOrigin:
    """What a graph or function listed, in its order, when it was read."""

    header: _Origin | None
    names: frozenset[str]
    value_info: tuple[str | onnx.ValueInfoProto, ...]  # a name, or an entry for no value at all
    quantization: tuple[onnx.TensorAnnotation, ...]


@dataclass(frozen=True)
class Header:
    """The model's own fields (all but graph and functions), as read and as onnx-ir writes them."""

    origin: _Origin | None = None


# --------------------------------------------------------------------------- reading


def read(original: onnx.ModelProto) -> tuple[onnx_ir.Model, Header]:
    """Return the onnx-ir model of `original` with what onnx-ir would lose kept in `meta` stores.

    The tensors of the result refer to `original`, which must not change afterwards.
    The graph must be well formed (see `graphfold.check`), otherwise onnx-ir raises its own errors.
    """
    plain = _representable(original)
    model = serde.deserialize_model(plain)
    _remember_graph(original.graph, model.graph)
    for proto, function in zip(original.functions, model.functions.values(), strict=True):
        _remember_function(proto, function)
    canonical = onnx.ModelProto()
    _write_model_header(canonical, model)
    return model, Header(_origin(canonical, _without(original, "graph", "functions")))


def _representable(original: onnx.ModelProto) -> onnx.ModelProto:
    """Return `original`, or a copy in which placeholders stand for what onnx-ir cannot hold."""
    if not any(_lossy_graph(graph) for graph in _top_graphs(original)):
        return original
    copy = onnx.ModelProto()
    copy.CopyFrom(original)
    for graph in _top_graphs(copy):
        _make_representable(graph)
    return copy


_AnyGraph = onnx.GraphProto | onnx.FunctionProto


def _top_graphs(model: onnx.ModelProto) -> list[_AnyGraph]:
    return [model.graph, *model.functions]


def _subgraphs(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def _infos(graph: _AnyGraph) -> Iterator[onnx.ValueInfoProto]:
    yield from graph.value_info
    if isinstance(graph, onnx.GraphProto):
        yield from graph.input
        yield from graph.output


def _lossy_graph(graph: _AnyGraph) -> bool:
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
    if kind == _AttributeType.STRING:
        return not _is_utf8(attribute.s)
    if kind == _AttributeType.STRINGS:
        return not all(_is_utf8(text) for text in attribute.strings)
    if kind == _AttributeType.TYPE_PROTO:
        return _lossy_type(attribute.tp)
    if kind == _AttributeType.TYPE_PROTOS:
        return any(_lossy_type(item) for item in attribute.type_protos)
    return kind in (
        _AttributeType.UNDEFINED,
        _AttributeType.SPARSE_TENSOR,
        _AttributeType.SPARSE_TENSORS,
    )


def _is_utf8(text: bytes) -> bool:
    try:
        text.decode()
    except UnicodeDecodeError:
        return False
    return True


def _make_representable(graph: _AnyGraph) -> None:
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
    if attribute.type == _AttributeType.UNDEFINED:
        for name, kind in _VALUE_FIELDS.items():
            if name in {set_field.name for set_field, _ in attribute.ListFields()}:
                attribute.type = kind
                break
        if not _lossy_attribute(attribute):
            return
    name = attribute.name
    attribute.Clear()
    attribute.name = name
    attribute.type = _AttributeType.STRING
    attribute.s = b""


# --------------------------------------------------------------------------- remembering


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
    _write_graph_header(canonical, graph)
    children = ("node", "initializer", "sparse_initializer", "input", "output")
    lists = ("value_info", "quantization_annotation")
    header = _origin(canonical, _without(proto, *children, *lists))
    _remember_body(proto, graph, header)


def _remember_function(proto: onnx.FunctionProto, function: onnx_ir.Function) -> None:
    canonical = onnx.FunctionProto()
    _write_function_header(canonical, function)
    header = _origin(canonical, _without(proto, "node", "value_info"))
    _remember_body(proto, function.graph, header)


def _remember_body(proto: _AnyGraph, graph: onnx_ir.Graph, header: _Origin | None) -> None:
    values = values_by_name(graph)
    listed: list[str | onnx.ValueInfoProto] = []
    for info in proto.value_info:
        value = values.get(info.name)
        if value is None:
            listed.append(_copy(info))
        else:
            listed.append(info.name)
            _remember_info(info, value, "info")
    quantization = proto.quantization_annotation if isinstance(proto, onnx.GraphProto) else ()
    graph.meta[_KEY] = _GraphOrigin(
        header, frozenset(values), tuple(listed), tuple(_copy(item) for item in quantization)
    )
    for node_proto, node in zip(proto.node, graph, strict=True):
        _remember_node(node_proto, node)


def _remember_info(info: onnx.ValueInfoProto, value: onnx_ir.Value, role: str) -> None:
    canonical = onnx.ValueInfoProto()
    serde.serialize_value_into(canonical, value)
    if canonical != info:
        value.meta.setdefault(_KEY, {})[role] = _Origin(canonical, _copy(info))


def _opaque_attribute(proto: onnx.AttributeProto) -> onnx_ir.Attr | None:
    """Return an attribute that onnx-ir would refuse, its value being bytes or protos."""
    if not _lossy_attribute(proto) or proto.type == _AttributeType.UNDEFINED:
        return None
    value: Any = getattr(
        proto, next(key for key, kind in _VALUE_FIELDS.items() if kind == proto.type)
    )
    if isinstance(value, Message):
        value = _copy(value)
    elif not isinstance(value, bytes):
        value = tuple(_copy(item) if isinstance(item, Message) else item for item in value)
    kind = onnx_ir.AttributeType(proto.type)
    return onnx_ir.Attr(proto.name, kind, value, doc_string=proto.doc_string or None)


def _remember_node(proto: onnx.NodeProto, node: onnx_ir.Node) -> None:
    for attribute in proto.attribute:
        opaque = _opaque_attribute(attribute)
        if opaque is not None:
            node.attributes[attribute.name] = opaque
    nested = any(attr.type in _NESTED for attr in node.attributes.values() if not attr.is_ref())
    if not nested:
        # The common case, in one comparison.
        canonical = onnx.NodeProto()
        _write_node(canonical, node, _Writer(Payload.OMIT))
        if canonical == proto:
            return
    canonical = onnx.NodeProto()
    _write_node_header(canonical, node)
    origin = _NodeOrigin(_origin(canonical, _without(proto, "attribute")))
    for attribute in proto.attribute:
        attr = node.attributes.get(attribute.name)
        if attr is not None:
            _remember_attribute(attribute, attr, origin)
    if origin.header is not None or origin.attributes:
        node.meta[_KEY] = origin


def _remember_attribute(
    proto: onnx.AttributeProto, attr: onnx_ir.Attr, origin: _NodeOrigin
) -> None:
    canonical = onnx.AttributeProto()
    _write_attribute_header(canonical, attr)
    found = _origin(canonical, _without(proto, "t", "tensors", "g", "graphs"))
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
    _write_tensor_header(canonical, tensor)
    original = _without(proto, "string_data", "external_data", "data_location")
    origin = _origin(canonical, original)
    if origin is not None:
        tensor.meta[_KEY] = origin


def _dense(sparse: onnx.SparseTensorProto) -> onnx_ir.LazyTensor:
    """Return a tensor with the dense values of `sparse`, made when asked for."""
    kept = _copy(sparse)

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
    tensor.meta[_SPARSE] = kept
    return tensor


# --------------------------------------------------------------------------- writing


class _Writer:
    """Carries the choice of where payloads go through the recursion over subgraphs."""

    def __init__(
        self, payload: Payload, locations: Mapping[int, Location] | None = None, ir_version: int = 0
    ) -> None:
        self.payload = payload
        self.locations = locations or {}
        self.ir_version = ir_version


def write(
    model: onnx_ir.Model,
    header: Header,
    *,
    payload: Payload = Payload.INLINE,
    locations: Mapping[int, Location] | None = None,
) -> onnx.ModelProto:
    """Return the proto of `model`; the inverse of `read`.

    Args:
        model: the onnx-ir model, unchanged by this.
        header: what `read` returned with it; `Header()` for a model made otherwise.
        payload: what happens to large tensors.
        locations: by `id` of the tensor, those whose bytes lie in a data file already.
    """
    proto = onnx.ModelProto()
    writer = _Writer(payload, locations, model.ir_version)
    _write_model_header(proto, model)
    _restore(proto, header.origin)
    _write_graph(proto.graph, model.graph, writer)
    for function in model.functions.values():
        _write_function(proto.functions.add(), function, writer)
    return proto


def _write_model_header(proto: onnx.ModelProto, model: onnx_ir.Model) -> None:
    proto.ir_version = model.ir_version
    for name in ("producer_name", "producer_version", "domain", "model_version", "doc_string"):
        if value := getattr(model, name):
            setattr(proto, name, value)
    _write_opsets(proto.opset_import, model.opset_imports)
    _write_metadata(proto.metadata_props, model.metadata_props)
    for configuration in model.device_configurations:
        proto.configuration.append(serde.serialize_model_configuration(configuration))


def _write_opsets(target: Any, opsets: Mapping[str, int]) -> None:
    for domain, version in opsets.items():
        target.add(domain=domain, version=version)


def _write_metadata(target: Any, metadata: Mapping[str, str]) -> None:
    for key in sorted(metadata):
        target.add(key=key, value=metadata[key])


def _write_graph_header(proto: onnx.GraphProto, graph: onnx_ir.Graph) -> None:
    if graph.name:
        proto.name = graph.name
    if graph.doc_string:
        proto.doc_string = graph.doc_string
    _write_metadata(proto.metadata_props, graph.metadata_props)


def _write_graph(proto: onnx.GraphProto, graph: onnx_ir.Graph, writer: _Writer) -> None:
    origin: _GraphOrigin | None = graph.meta.get(_KEY)
    _write_graph_header(proto, graph)
    _restore(proto, origin.header if origin else None)
    for index, value in enumerate(graph.inputs):
        _write_info(proto.input.add(), value, f"input {index}")
    for value in graph.initializers.values():
        _write_initializer(proto, value, writer)
    for node in graph:
        _write_node(proto.node.add(), node, writer)
    for index, value in enumerate(graph.outputs):
        _write_info(proto.output.add(), value, f"output {index}")
    values = values_by_name(graph)
    _write_value_info(proto, graph, values, origin)
    _write_quantization(proto, values, origin)


def _write_function_header(proto: onnx.FunctionProto, function: onnx_ir.Function) -> None:
    for name in ("name", "domain", "overload", "doc_string"):
        if value := getattr(function, name):
            setattr(proto, name, value)
    _write_opsets(proto.opset_import, function.opset_imports)
    _write_metadata(proto.metadata_props, function.metadata_props)
    proto.input.extend(_name(value) for value in function.inputs)
    proto.output.extend(_name(value) for value in function.outputs)
    for attr in function.attributes.values():
        if attr.value is None:
            proto.attribute.append(attr.name)
        else:
            serde.serialize_attribute_into(proto.attribute_proto.add(), attr)


def _write_function(proto: onnx.FunctionProto, function: onnx_ir.Function, writer: _Writer) -> None:
    origin: _GraphOrigin | None = function.graph.meta.get(_KEY)
    _write_function_header(proto, function)
    _restore(proto, origin.header if origin else None)
    for node in function:
        _write_node(proto.node.add(), node, writer)
    if origin is not None or writer.ir_version >= _FUNCTION_VALUE_INFO_IR_VERSION:
        values = values_by_name(function.graph)
        _write_value_info(proto, function.graph, values, origin)


def function_proto(function: onnx_ir.Function) -> onnx.FunctionProto:
    """Return the proto of one function."""
    proto = onnx.FunctionProto()
    _write_function(proto, function, _Writer(Payload.INLINE))
    return proto


def _write_info(proto: onnx.ValueInfoProto, value: onnx_ir.Value, role: str) -> None:
    serde.serialize_value_into(proto, value)
    origins: dict[str, _Origin] | None = value.meta.get(_KEY)
    if origins:
        _restore(proto, origins.get(role))


def _write_value_info(
    proto: _AnyGraph,
    graph: onnx_ir.Graph,
    values: Mapping[str, onnx_ir.Value],
    origin: _GraphOrigin | None,
) -> None:
    """List what was listed and still exists, in its order, then the tensors that are new."""
    known = origin.names if origin else frozenset()
    listed = {name for name in origin.value_info if isinstance(name, str)} if origin else set()
    for entry in origin.value_info if origin else ():
        if isinstance(entry, onnx.ValueInfoProto):
            proto.value_info.append(entry)
        elif entry in values:
            _write_info(proto.value_info.add(), values[entry], "info")
    apart = {id(value) for value in (*graph.inputs, *graph.outputs)}
    for name, value in values.items():
        if name in listed or id(value) in apart:
            continue
        typed = value.type is not None and name not in known and not value.is_initializer()
        if typed or value.doc_string or value.metadata_props:
            _write_info(proto.value_info.add(), value, "info")


def _write_quantization(
    proto: onnx.GraphProto, values: Mapping[str, onnx_ir.Value], origin: _GraphOrigin | None
) -> None:
    """Annotations in their order, without those that name a tensor which a pass removed."""
    known = origin.names if origin else frozenset()
    gone = known - values.keys()
    written = set()
    for entry in origin.quantization if origin else ():
        if entry.tensor_name in gone:
            continue
        target = proto.quantization_annotation.add()
        target.CopyFrom(entry)
        written.add(entry.tensor_name)
        kept = [pair for pair in entry.quant_parameter_tensor_names if pair.value not in gone]
        if len(kept) != len(entry.quant_parameter_tensor_names):
            target.ClearField("quant_parameter_tensor_names")
            target.quant_parameter_tensor_names.extend(kept)
    for name, value in values.items():
        parameters: dict[str, str] | None = value.meta.get(_QUANTIZATION)
        if parameters and name not in written:
            target = proto.quantization_annotation.add(tensor_name=name)
            _write_metadata(
                target.quant_parameter_tensor_names,
                {key: other for key, other in parameters.items() if other not in gone},
            )


def _write_node_header(proto: onnx.NodeProto, node: onnx_ir.Node) -> None:
    proto.op_type = node.op_type
    for name in ("domain", "name", "overload", "doc_string"):
        if value := getattr(node, name):
            setattr(proto, name, value)
    if node.metadata_props:
        _write_metadata(proto.metadata_props, node.metadata_props)
    proto.input.extend("" if value is None else _name(value) for value in node.inputs)
    outputs = [_name(value) for value in node.outputs]
    while outputs and not outputs[-1]:
        outputs.pop()
    proto.output.extend(outputs)
    for configuration in node.device_configurations:
        proto.device_configurations.append(serde.serialize_node_device_configuration(configuration))


def _write_node(proto: onnx.NodeProto, node: onnx_ir.Node, writer: _Writer) -> None:
    _write_node_header(proto, node)
    origin: _NodeOrigin | None = node.meta.get(_KEY)
    if origin is not None:
        _restore(proto, origin.header)
    for attr in node.attributes.values():
        target = proto.attribute.add()
        _write_attribute_header(target, attr)
        if origin is not None:
            _restore(target, origin.attributes.get(attr.name))
        _write_attribute_content(target, attr, writer)


def _write_attribute_header(proto: onnx.AttributeProto, attr: onnx_ir.Attr) -> None:
    if attr.is_ref():
        serde.serialize_reference_attribute_into(proto, attr)
    elif attr.type in _NESTED:
        proto.name = attr.name
        proto.type = _AttributeType.AttributeType.ValueType(attr.type.value)
        if attr.doc_string:
            proto.doc_string = attr.doc_string
    elif _is_opaque(attr.value):
        proto.name = attr.name
        proto.type = _AttributeType.AttributeType.ValueType(attr.type.value)
        if attr.doc_string:
            proto.doc_string = attr.doc_string
        _write_opaque(proto, attr.value)
    else:
        serde.serialize_attribute_into(proto, attr)


def _is_opaque(value: Any) -> bool:
    """Whether it is a value of `_opaque_attribute`."""
    first = value[0] if isinstance(value, tuple) and value else value
    return isinstance(first, bytes | Message)


def _write_opaque(proto: onnx.AttributeProto, value: Any) -> None:
    name = next(key for key, kind in _VALUE_FIELDS.items() if kind == proto.type)
    if isinstance(value, bytes):
        setattr(proto, name, value)
    elif isinstance(value, Message):
        getattr(proto, name).CopyFrom(value)
    else:
        getattr(proto, name).extend(
            item if isinstance(item, Message) else _bytes(item) for item in value
        )


def _bytes(text: str | bytes) -> bytes:
    return text if isinstance(text, bytes) else text.encode()


def _write_attribute_content(
    proto: onnx.AttributeProto, attr: onnx_ir.Attr, writer: _Writer
) -> None:
    if attr.is_ref():
        return
    if attr.type == onnx_ir.AttributeType.TENSOR:
        _write_tensor(proto.t, attr.value, writer)
    elif attr.type == onnx_ir.AttributeType.TENSORS:
        for tensor in attr.value:
            _write_tensor(proto.tensors.add(), tensor, writer)
    elif attr.type == onnx_ir.AttributeType.GRAPH:
        _write_graph(proto.g, attr.value, writer)
    elif attr.type == onnx_ir.AttributeType.GRAPHS:
        for graph in attr.value:
            _write_graph(proto.graphs.add(), graph, writer)


def _write_initializer(proto: onnx.GraphProto, value: onnx_ir.Value, writer: _Writer) -> None:
    tensor = value.const_value
    if tensor is None:
        return
    sparse: onnx.SparseTensorProto | None = tensor.meta.get(_SPARSE)
    if sparse is not None:
        target = proto.sparse_initializer.add()
        target.CopyFrom(sparse)
        target.values.name = _name(value)
        return
    dense = proto.initializer.add()
    _write_tensor(dense, tensor, writer)
    # Tensors may be shared between clones of a model, so the name comes from the value.
    dense.name = _name(value)


def _write_tensor(proto: onnx.TensorProto, tensor: onnx_ir.TensorProtocol, writer: _Writer) -> None:
    location = writer.locations.get(id(tensor))
    if location is not None:
        _write_tensor_header(proto, tensor)
        _write_location(proto, location)
        return
    if writer.payload is not Payload.INLINE and payload_bytes(tensor) > SMALL_TENSOR_BYTES:
        _write_tensor_header(proto, tensor)
        if writer.payload is Payload.STUB:
            proto.dims[:] = [0]
        return
    if isinstance(tensor, serde.TensorProtoTensor):
        proto.CopyFrom(tensor.raw)
        _write_tensor_metadata(proto, tensor)
        return
    _write_tensor_header(proto, tensor)
    if tensor.dtype == onnx_ir.DataType.STRING:
        proto.string_data.extend(_strings(tensor))
    else:
        # onnx-ir cannot map an empty range of a file.
        proto.raw_data = tensor.tobytes() if payload_bytes(tensor) else b""


def _strings(tensor: onnx_ir.TensorProtocol) -> Sequence[bytes]:
    if isinstance(tensor, onnx_ir.StringTensor):
        return tensor.string_data()
    flat = tensor.numpy().reshape(-1)
    return [item if isinstance(item, bytes) else str(item).encode() for item in flat]


def _write_location(proto: onnx.TensorProto, location: Location) -> None:
    proto.data_location = onnx.TensorProto.EXTERNAL
    proto.external_data.add(key="location", value=location.file)
    proto.external_data.add(key="offset", value=str(location.offset))
    proto.external_data.add(key="length", value=str(location.length))


def _write_tensor_header(proto: onnx.TensorProto, tensor: onnx_ir.TensorProtocol) -> None:
    """Everything but the payload and where it lies."""
    if isinstance(tensor, serde.TensorProtoTensor):
        raw = tensor.raw
        for name in ("name", "doc_string", "data_type"):
            if raw.HasField(name):
                setattr(proto, name, getattr(raw, name))
        if raw.HasField("segment"):
            proto.segment.CopyFrom(raw.segment)
        proto.dims.extend(raw.dims)
        proto.metadata_props.extend(raw.metadata_props)
        _write_tensor_metadata(proto, tensor)
        return
    if tensor.name:
        proto.name = tensor.name
    if tensor.doc_string:
        proto.doc_string = tensor.doc_string
    proto.data_type = tensor.dtype.value
    proto.dims.extend(tensor.shape.numpy())
    _write_metadata(proto.metadata_props, tensor.metadata_props)
    _restore(proto, tensor.meta.get(_KEY))


def _write_tensor_metadata(proto: onnx.TensorProto, tensor: onnx_ir.TensorProtocol) -> None:
    if tensor.metadata_props != {item.key: item.value for item in proto.metadata_props}:
        proto.ClearField("metadata_props")
        _write_metadata(proto.metadata_props, tensor.metadata_props)


# --------------------------------------------------------------------------- helpers


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
    return _SPARSE in tensor.meta


def payload_bytes(tensor: onnx_ir.TensorProtocol) -> int:
    """The number of bytes of the tensor's elements (strings: of their characters)."""
    if tensor.dtype == onnx_ir.DataType.STRING:
        return sum(len(item) for item in _strings(tensor))
    return math.ceil(math.prod(tensor.shape.numpy()) * tensor.dtype.bitwidth / 8)


_M = TypeVar("_M", bound=Message)


def _copy(message: _M) -> _M:
    copy: _M = type(message)()
    copy.CopyFrom(message)
    return copy


def _without(message: _M, *fields: str) -> _M:
    """A copy without some fields, made without copying these."""
    copy: _M = type(message)()
    for descriptor in message.DESCRIPTOR.fields:
        if descriptor.name not in fields:
            _copy_field(message, copy, descriptor)
    return copy


def _origin(canonical: Message, original: Message) -> _Origin | None:
    return None if canonical == original else _Origin(canonical, original)


def _restore(message: Message, origin: _Origin | None) -> None:
    """Give each field that still has its canonical form the form it had in the source."""
    if origin is None:
        return
    for descriptor in message.DESCRIPTOR.fields:
        if _same_field(message, origin.canonical, descriptor) and not _same_field(
            origin.canonical, origin.original, descriptor
        ):
            message.ClearField(descriptor.name)
            _copy_field(origin.original, message, descriptor)


def _same_field(one: Message, other: Message, descriptor: Any) -> bool:
    name = descriptor.name
    if descriptor.is_repeated:
        return bool(getattr(one, name) == getattr(other, name))
    has = one.HasField(name)
    return has == other.HasField(name) and (not has or getattr(one, name) == getattr(other, name))


def _copy_field(source: Message, target: Message, descriptor: Any) -> None:
    name = descriptor.name
    if descriptor.is_repeated:
        getattr(target, name).extend(getattr(source, name))
    elif source.HasField(name):
        if descriptor.message_type is not None:
            getattr(target, name).CopyFrom(getattr(source, name))
        else:
            setattr(target, name, getattr(source, name))


def _name(value: onnx_ir.Value) -> str:
    return value.name or ""

"""From onnx-ir to ONNX protos; the inverse of `graphfold.reader`.

Each message gets back its original form, field by field, wherever the object still says what it
said when it was read: what a pass changed stays changed, what it removed stays removed.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from enum import Enum
from typing import Any, NamedTuple

import onnx
import onnx_ir
from google.protobuf.message import Message
from onnx_ir import serde

from graphfold.origins import (
    KEY,
    NESTED,
    SPARSE,
    VALUE_FIELDS,
    AnyGraph,
    AttributeType,
    GraphOrigin,
    Header,
    NodeOrigin,
    NodeSource,
    Origin,
    origin_of,
    restore,
    without,
)
from graphfold.tensors import (
    SMALL_TENSOR_BYTES,
    is_sparse,
    payload_bytes,
    strings,
    values_by_name,
)

_QUANTIZATION = "quant_parameter_tensor_names"  # where onnx-ir keeps a value's annotation
_FUNCTION_VALUE_INFO_IR_VERSION = 10


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


class Writer:
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
    writer = Writer(payload, locations, model.ir_version)
    write_model_header(proto, model)
    restore(proto, header.origin)
    _write_graph(proto.graph, model.graph, writer)
    for function in model.functions.values():
        _write_function(proto.functions.add(), function, writer)
    return proto


def write_model_header(proto: onnx.ModelProto, model: onnx_ir.Model) -> None:
    """Everything of the model but its graph and functions."""
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


def write_graph_header(proto: onnx.GraphProto, graph: onnx_ir.Graph) -> None:
    """The fields of a graph that are not lists of other messages."""
    if graph.name:
        proto.name = graph.name
    if graph.doc_string:
        proto.doc_string = graph.doc_string
    _write_metadata(proto.metadata_props, graph.metadata_props)


def _write_graph(proto: onnx.GraphProto, graph: onnx_ir.Graph, writer: Writer) -> None:
    origin: GraphOrigin | None = graph.meta.get(KEY)
    write_graph_header(proto, graph)
    restore(proto, origin.header if origin else None)
    for index, value in enumerate(graph.inputs):
        _write_info(proto.input.add(), value, f"input {index}")
    for value in graph.initializers.values():
        _write_initializer(proto, value, writer)
    for node in graph:
        write_node(proto.node.add(), node, writer)
    for index, value in enumerate(graph.outputs):
        _write_info(proto.output.add(), value, f"output {index}")
    values = values_by_name(graph)
    _write_value_info(proto, graph, values, origin)
    _write_quantization(proto, values, origin)


def write_function_header(proto: onnx.FunctionProto, function: onnx_ir.Function) -> None:
    """Everything of a function but its nodes and value_info."""
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


def _write_function(proto: onnx.FunctionProto, function: onnx_ir.Function, writer: Writer) -> None:
    origin: GraphOrigin | None = function.graph.meta.get(KEY)
    write_function_header(proto, function)
    restore(proto, origin.header if origin else None)
    for node in function:
        write_node(proto.node.add(), node, writer)
    if origin is not None or writer.ir_version >= _FUNCTION_VALUE_INFO_IR_VERSION:
        values = values_by_name(function.graph)
        _write_value_info(proto, function.graph, values, origin)


def _write_info(proto: onnx.ValueInfoProto, value: onnx_ir.Value, role: str) -> None:
    serde.serialize_value_into(proto, value)
    origins: dict[str, Origin] | None = value.meta.get(KEY)
    if origins:
        restore(proto, origins.get(role))


def _write_value_info(
    proto: AnyGraph,
    graph: onnx_ir.Graph,
    values: Mapping[str, onnx_ir.Value],
    origin: GraphOrigin | None,
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
        # What was not listed when it was read had nothing to say.
        if name in listed or name in known or id(value) in apart:
            continue
        typed = value.type is not None and not value.is_initializer()
        if typed or value.doc_string or value.metadata_props:
            _write_info(proto.value_info.add(), value, "info")


def _write_quantization(
    proto: onnx.GraphProto, values: Mapping[str, onnx_ir.Value], origin: GraphOrigin | None
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
    if origin is not None and not origin.quantization:
        return
    for name, value in values.items():
        parameters: dict[str, str] | None = value.meta.get(_QUANTIZATION)
        if parameters and name not in written:
            target = proto.quantization_annotation.add(tensor_name=name)
            _write_metadata(
                target.quant_parameter_tensor_names,
                {key: other for key, other in parameters.items() if other not in gone},
            )


def write_node_header(proto: onnx.NodeProto, node: onnx_ir.Node) -> None:
    """Everything of a node but its attributes."""
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


def write_node(proto: onnx.NodeProto, node: onnx_ir.Node, writer: Writer) -> None:
    """A node with its attributes and the subgraphs in them."""
    source: NodeOrigin | NodeSource | None = node.meta.data.get(KEY)
    if isinstance(source, NodeSource):
        if _is_unchanged(node, source):
            proto.CopyFrom(source.proto)
            return
        origin: NodeOrigin | None = _origin_of_node(source)
    else:
        origin = source
    write_node_header(proto, node)
    if origin is not None:
        restore(proto, origin.header)
    for attr in node.attributes.values():
        target = proto.attribute.add()
        write_attribute_header(target, attr)
        if origin is not None:
            restore(target, origin.attributes.get(attr.name))
        _write_attribute_content(target, attr, writer)


def _is_unchanged(node: onnx_ir.Node, source: NodeSource) -> bool:
    """Whether a node still says what its source said."""
    proto = source.proto
    attributes = node.attributes.data
    return (
        [value.name if value is not None else "" for value in node.inputs] == proto.input
        and [value.name or "" for value in node.outputs] == proto.output
        and node.op_type == proto.op_type
        and node.domain == proto.domain
        and (node.name or "") == proto.name
        and (node.doc_string or "") == proto.doc_string
        and node.overload == proto.overload
        and len(attributes) == len(source.attributes)
        and all(map(operator.is_, attributes.values(), source.attributes))
        and _same_metadata(node, proto)
    )


def _same_metadata(node: onnx_ir.Node, proto: onnx.NodeProto) -> bool:
    if not node.metadata_props and not proto.metadata_props:
        return True
    return node.metadata_props == {item.key: item.value for item in proto.metadata_props}


def _origin_of_node(source: NodeSource) -> NodeOrigin:
    """Both forms of a node of plain attributes; asked for only where a pass changed the node."""
    proto = source.proto
    node = onnx_ir.Node(
        proto.domain,
        proto.op_type,
        [onnx_ir.Value(name=name) if name else None for name in proto.input],
        source.attributes,
        overload=proto.overload,
        outputs=[onnx_ir.Value(name=name) for name in proto.output],
        name=proto.name,
        doc_string=proto.doc_string or None,
        metadata_props={item.key: item.value for item in proto.metadata_props},
    )
    canonical = onnx.NodeProto()
    write_node_header(canonical, node)
    origin = NodeOrigin(origin_of(canonical, without(proto, "attribute")))
    for attribute in proto.attribute:
        written = onnx.AttributeProto()
        write_attribute_header(written, node.attributes[attribute.name])
        found = origin_of(written, attribute)
        if found is not None:
            origin.attributes[attribute.name] = found
    return origin


def write_attribute_header(proto: onnx.AttributeProto, attr: onnx_ir.Attr) -> None:
    """Everything of an attribute but tensors and graphs."""
    if attr.is_ref():
        serde.serialize_reference_attribute_into(proto, attr)
    elif attr.type in NESTED:
        proto.name = attr.name
        proto.type = AttributeType.AttributeType.ValueType(attr.type.value)
        if attr.doc_string:
            proto.doc_string = attr.doc_string
    elif _is_opaque(attr.value):
        proto.name = attr.name
        proto.type = AttributeType.AttributeType.ValueType(attr.type.value)
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
    name = next(key for key, kind in VALUE_FIELDS.items() if kind == proto.type)
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
    proto: onnx.AttributeProto, attr: onnx_ir.Attr, writer: Writer
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


def _write_initializer(proto: onnx.GraphProto, value: onnx_ir.Value, writer: Writer) -> None:
    tensor = value.const_value
    if tensor is None:
        return
    if is_sparse(tensor):
        target = proto.sparse_initializer.add()
        target.CopyFrom(tensor.meta[SPARSE])
        target.values.name = _name(value)
        return
    dense = proto.initializer.add()
    _write_tensor(dense, tensor, writer)
    # Tensors may be shared between clones of a model, so the name comes from the value.
    dense.name = _name(value)


def _write_tensor(proto: onnx.TensorProto, tensor: onnx_ir.TensorProtocol, writer: Writer) -> None:
    location = writer.locations.get(id(tensor))
    if location is not None:
        write_tensor_header(proto, tensor)
        _write_location(proto, location)
        return
    if writer.payload is not Payload.INLINE and payload_bytes(tensor) > SMALL_TENSOR_BYTES:
        write_tensor_header(proto, tensor)
        if writer.payload is Payload.STUB:
            proto.dims[:] = [0]
        return
    if isinstance(tensor, serde.TensorProtoTensor):
        proto.CopyFrom(tensor.raw)
        _write_tensor_metadata(proto, tensor)
        return
    write_tensor_header(proto, tensor)
    if tensor.dtype == onnx_ir.DataType.STRING:
        proto.string_data.extend(strings(tensor))
    else:
        # onnx-ir cannot map an empty range of a file.
        proto.raw_data = tensor.tobytes() if payload_bytes(tensor) else b""


def _write_location(proto: onnx.TensorProto, location: Location) -> None:
    proto.data_location = onnx.TensorProto.EXTERNAL
    proto.external_data.add(key="location", value=location.file)
    proto.external_data.add(key="offset", value=str(location.offset))
    proto.external_data.add(key="length", value=str(location.length))


def write_tensor_header(proto: onnx.TensorProto, tensor: onnx_ir.TensorProtocol) -> None:
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
    restore(proto, tensor.meta.get(KEY))


def _write_tensor_metadata(proto: onnx.TensorProto, tensor: onnx_ir.TensorProtocol) -> None:
    if tensor.metadata_props != {item.key: item.value for item in proto.metadata_props}:
        proto.ClearField("metadata_props")
        _write_metadata(proto.metadata_props, tensor.metadata_props)


def _name(value: onnx_ir.Value) -> str:
    return value.name or ""

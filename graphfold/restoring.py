"""What onnx-graphsurgeon drops of a model, given back where its nodes and tensors still exist."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import onnx

_SKIPPED = (
    onnx.AttributeProto.SPARSE_TENSOR,
    onnx.AttributeProto.SPARSE_TENSORS,
    onnx.AttributeProto.TYPE_PROTO,
    onnx.AttributeProto.TYPE_PROTOS,
    onnx.AttributeProto.TENSORS,
    onnx.AttributeProto.GRAPHS,
)
_LISTS = (onnx.AttributeProto.INTS, onnx.AttributeProto.FLOATS, onnx.AttributeProto.STRINGS)


def restore_dropped(exported: onnx.ModelProto, original: onnx.ModelProto) -> onnx.ModelProto:
    """Return `exported` with what onnx-graphsurgeon dropped from `original`; changes neither.

    Nodes are recognised by their operator and outputs, tensors by their names. Restored are
    metadata, doc strings, denotations, overloads, quantization annotations, training information,
    device configurations, inputs with default values, initializers that nothing read in
    `original` either, attributes of types that graphsurgeon skips, and value types it cannot hold.
    """
    proto = onnx.ModelProto()
    proto.CopyFrom(exported)
    _fill(
        proto,
        original,
        ("producer_name", "producer_version", "domain", "model_version", "doc_string"),
        ("metadata_props", "training_info", "configuration"),
    )
    if [(item.domain, item.version) for item in proto.opset_import] == [
        (item.domain, item.version) for item in original.opset_import
    ]:
        # The default domain may be written as "" or left out.
        proto.ClearField("opset_import")
        proto.opset_import.extend(original.opset_import)
    _restore_graph(proto.graph, original.graph)
    _restore_functions(proto, original)
    return proto


def _fill(target: Any, source: Any, single: Sequence[str], repeated: Sequence[str]) -> None:
    """Copy fields that are absent or empty in `target`."""
    for name in single:
        if not getattr(target, name):
            target.ClearField(name)
            if source.HasField(name):
                setattr(target, name, getattr(source, name))
    for name in repeated:
        if not getattr(target, name):
            getattr(target, name).extend(getattr(source, name))


def _restore_graph(graph: onnx.GraphProto, original: onnx.GraphProto) -> None:
    _fill(graph, original, ("doc_string",), ("metadata_props",))
    _restore_initializers(graph, original)
    _restore_inputs(graph, original)
    _restore_nodes(graph.node, original.node)
    infos = {info.name: info for info in original.output}
    for info in graph.output:
        _restore_info(info, infos.get(info.name))
    defined = set(_defined(graph))
    _restore_value_info(graph, original, defined)
    present = {item.tensor_name for item in graph.quantization_annotation}
    graph.quantization_annotation.extend(
        item
        for item in original.quantization_annotation
        if item.tensor_name in defined
        and item.tensor_name not in present
        and all(pair.value in defined for pair in item.quant_parameter_tensor_names)
    )


def _defined(graph: onnx.GraphProto) -> Iterator[str]:
    yield from (info.name for info in graph.input)
    yield from (tensor.name for tensor in graph.initializer)
    yield from (sparse.values.name for sparse in graph.sparse_initializer)
    for node in graph.node:
        yield from node.output


def _restore_initializers(graph: onnx.GraphProto, original: onnx.GraphProto) -> None:
    """Bring back those that no node read: graphsurgeon does not see them."""
    used = _read_anywhere(original) | {info.name for info in original.output}
    defined = set(_defined(graph))
    graph.initializer.extend(
        tensor
        for tensor in original.initializer
        if tensor.name not in used and tensor.name not in defined
    )


def _read_anywhere(graph: onnx.GraphProto) -> set[str]:
    found: set[str] = set()
    for node in graph.node:
        found.update(node.input)
        for attribute in node.attribute:
            for sub in (attribute.g, *attribute.graphs):
                found |= _read_anywhere(sub)
    return found


def _restore_inputs(graph: onnx.GraphProto, original: onnx.GraphProto) -> None:
    """Put inputs with default values back in their place, and describe all as they were."""
    initializers = {tensor.name for tensor in graph.initializer}
    initializers |= {sparse.values.name for sparse in graph.sparse_initializer}
    present = {info.name: info for info in graph.input}
    original_names = {info.name for info in original.input}
    inputs = []
    for info in original.input:
        if info.name in present:
            _restore_info(present[info.name], info)
            inputs.append(present[info.name])
        elif info.name in initializers:
            inputs.append(info)
    if [info.name for info in graph.input if info.name in original_names] != [
        info.name for info in inputs if info.name in present
    ]:
        # The caller put the inputs in another order: what was dropped goes to the end.
        inputs = [info for info in graph.input if info.name in original_names] + [
            info for info in inputs if info.name not in present
        ]
    inputs += [info for info in graph.input if info.name not in original_names]
    copies = onnx.GraphProto(input=inputs)
    graph.ClearField("input")
    graph.input.extend(copies.input)


def _restore_info(info: onnx.ValueInfoProto, original: onnx.ValueInfoProto | None) -> None:
    if original is None:
        return
    _fill(info, original, ("doc_string",), ("metadata_props",))
    if info.type.WhichOneof("value") is None or _bare_type(info.type) == _bare_type(original.type):
        info.type.CopyFrom(original.type)


def _bare_type(proto: onnx.TypeProto) -> onnx.TypeProto:
    """A copy without what graphsurgeon forgets: denotations, shapes of other than plain tensors."""
    bare = onnx.TypeProto()
    bare.CopyFrom(proto)
    element = bare
    while (kind := element.WhichOneof("value")) in ("sequence_type", "optional_type"):
        element.ClearField("denotation")
        element = getattr(element, kind).elem_type
    element.ClearField("denotation")
    if kind in ("tensor_type", "sparse_tensor_type"):
        shape = getattr(element, kind).shape
        for dim in shape.dim:
            dim.ClearField("denotation")
            if dim.HasField("dim_value") and dim.dim_value < 0:
                dim.ClearField("dim_value")  # some exporters write unknown dims as -1
        if element is not bare or kind == "sparse_tensor_type":
            getattr(element, kind).ClearField("shape")
    return bare


def _restore_value_info(
    graph: onnx.GraphProto, original: onnx.GraphProto, defined: set[str]
) -> None:
    infos = {info.name: info for info in original.value_info}
    for info in graph.value_info:
        _restore_info(info, infos.pop(info.name, None))
    graph.value_info.extend(info for name, info in infos.items() if name in defined)


def _restore_nodes(nodes: Iterable[onnx.NodeProto], originals: Iterable[onnx.NodeProto]) -> None:
    known: Mapping[tuple[str, ...], onnx.NodeProto] = {_key(node): node for node in originals}
    for node in nodes:
        original = known.get(_key(node))
        if original is not None:
            _fill(
                node,
                original,
                ("doc_string", "overload", "name"),
                ("metadata_props", "device_configurations"),
            )
            _restore_attributes(node, original)


def _key(node: onnx.NodeProto) -> tuple[str, ...]:
    return (node.domain, node.op_type, *(name for name in node.output if name))


def _restore_attributes(node: onnx.NodeProto, original: onnx.NodeProto) -> None:
    present = {attribute.name: attribute for attribute in node.attribute}
    for attribute in original.attribute:
        found = present.get(attribute.name)
        if found is None or (attribute.type in _SKIPPED and found.type != attribute.type):
            if attribute.type in _SKIPPED:
                if found is not None:
                    node.attribute.remove(found)
                node.attribute.append(attribute)
            continue
        _fill(found, attribute, ("doc_string",), ())
        if attribute.type == onnx.AttributeProto.GRAPH:
            _restore_graph(found.g, attribute.g)
        elif attribute.type == onnx.AttributeProto.TENSOR:
            _fill(found.t, attribute.t, ("doc_string",), ("metadata_props",))
        else:
            _retype_empty(found, attribute)


def _retype_empty(found: onnx.AttributeProto, original: onnx.AttributeProto) -> None:
    """An empty list has the type that it had."""
    both = (found, original)
    if all(item.type in _LISTS for item in both) and not any(
        item.ints or item.floats or item.strings for item in both
    ):
        found.type = original.type


def _restore_functions(proto: onnx.ModelProto, original: onnx.ModelProto) -> None:
    """Pair functions of one name in their order: graphsurgeon knows no overloads."""
    waiting: dict[tuple[str, str], list[onnx.FunctionProto]] = {}
    for function in original.functions:
        waiting.setdefault((function.domain, function.name), []).append(function)
    for function in proto.functions:
        candidates = waiting.get((function.domain, function.name))
        if not candidates:
            continue
        source = candidates.pop(0)
        _fill(function, source, ("doc_string", "overload"), ("metadata_props", "value_info"))
        _restore_nodes(function.node, source.node)

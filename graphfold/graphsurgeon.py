"""In and out as `onnx_graphsurgeon.Graph`, for toolchains built on it.

onnx-graphsurgeon keeps about half of an ONNX model's fields, and its own export renames tensors in
the proto that the graph came from, gives one float8 type another's name, refuses int4 and string
values once they were looked at, and copies constants of the outer graph into subgraphs. So graphs
are written here by an exporter that changes nothing, and `restore_dropped` gives back what the
import had dropped, as far as the nodes and tensors that it belonged to are still there.
"""

from __future__ import annotations

import numbers
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import onnx
import onnx_ir
from onnx import helper

from graphfold.errors import ModelError, UsageError
from graphfold.model import Model, adopt, to_proto

if TYPE_CHECKING:
    import onnx_graphsurgeon as gs

_ORIGINAL = "_graphfold_original"
_DEFAULT_DOMAINS = ("", "ai.onnx")
# Initializers that are no inputs exist since IR version 4, functions since 8.
_OLDEST_IR_VERSION = 4
_FUNCTION_IR_VERSION = 8


def from_graphsurgeon(graph: gs.Graph, original: onnx.ModelProto | None = None) -> Model:
    """Return the model of a graph, which stays as it is.

    Args:
        graph: the graph. A missing `ir_version` becomes the lowest that its opset allows, which
            is what the widest range of runtimes loads.
        original: the proto that the graph was imported from. What the import dropped is taken
            from it; graphs that `to_graphsurgeon` made remember it themselves.

    Raises:
        ModelError: the graph is not valid, or holds a value that ONNX has no form for.
    """
    _require()
    proto = _Exporter().model(graph)
    if original is None:
        original = graph.__dict__.get(_ORIGINAL)
    if original is not None:
        proto = restore_dropped(proto, original)
    for info in proto.graph.input:
        if info.type.WhichOneof("value") is None:
            raise ModelError(f"the graph input {info.name!r} has no dtype", hint="set its dtype")
    return adopt(proto)


def to_graphsurgeon(model: Model) -> gs.Graph:
    """Return a graph of its own for the model, external data included.

    What graphs cannot hold (metadata, quantization annotations, inputs with default values, ...)
    comes back when the graph, or what was made of it in place, passes `from_graphsurgeon`; after
    `onnx_graphsurgeon.export_onnx`, call `restore_dropped`.

    Raises:
        ModelError: the model uses something onnx-graphsurgeon cannot import, or exceeds 2 GB.
    """
    gs = _require()
    proto = to_proto(model)
    try:
        graph = gs.import_onnx(proto)
    except Exception as error:
        reason = str(error).strip() or type(error).__name__
        raise ModelError(
            f"onnx-graphsurgeon cannot import the model: {reason.splitlines()[0]}",
            hint="pass the model as a ModelProto",
        ) from error
    # The graph's constants refer to this proto, so keeping it costs nothing.
    setattr(graph, _ORIGINAL, proto)
    return graph


def _require() -> Any:
    try:
        import onnx_graphsurgeon
    except ImportError:
        raise UsageError(
            "onnx-graphsurgeon is not installed", hint="pip install onnx-graphsurgeon"
        ) from None
    return onnx_graphsurgeon


# --------------------------------------------------------------------------- export


class _Exporter:
    """Writes one graph as protos without touching it; remembers the tensors of outer graphs."""

    def __init__(self) -> None:
        self._gs = _require()
        self._outer: set[int] = set()

    def model(self, graph: gs.Graph) -> onnx.ModelProto:
        opsets = _opsets(graph, graph.functions)
        proto = onnx.ModelProto(
            ir_version=graph.ir_version or _ir_version(opsets, bool(graph.functions)),
            graph=self.graph(graph),
        )
        if graph.producer_name:
            proto.producer_name = graph.producer_name
        if graph.producer_version:
            proto.producer_version = graph.producer_version
        proto.opset_import.extend(opsets)
        proto.functions.extend(self.function(function) for function in graph.functions)
        return proto

    def graph(self, graph: gs.Graph) -> onnx.GraphProto:
        proto = onnx.GraphProto(name=graph.name)
        if graph.doc_string:
            proto.doc_string = graph.doc_string
        proto.input.extend(self.info(tensor) for tensor in graph.inputs)
        proto.output.extend(self.info(tensor) for tensor in graph.outputs)
        apart = {id(tensor) for tensor in (*graph.inputs, *graph.outputs)}
        tensors = [tensor for tensor in _tensors(graph) if id(tensor) not in self._outer]
        for tensor in tensors:
            if isinstance(tensor, self._gs.Constant):
                self._initializer(proto, tensor)
            elif id(tensor) not in apart and (tensor.dtype is not None or tensor.shape is not None):
                proto.value_info.append(self.info(tensor))
        new = {id(tensor) for tensor in tensors}
        self._outer |= new
        proto.node.extend(self.node(node) for node in graph.nodes)
        self._outer -= new
        return proto

    def _initializer(self, proto: onnx.GraphProto, tensor: gs.Constant) -> None:
        if isinstance(tensor._values, self._gs.ir.tensor.SparseValues):
            sparse = proto.sparse_initializer.add()
            sparse.CopyFrom(tensor._values.tensor)
            sparse.values.name = tensor.name
        else:
            proto.initializer.append(self.tensor(tensor))

    def function(self, function: Any) -> onnx.FunctionProto:
        """Functions have no initializers: constants become Constant nodes."""
        proto = onnx.FunctionProto(name=function.name, domain=function.domain or "")
        if function.doc_string:
            proto.doc_string = function.doc_string
        proto.input.extend(tensor.name for tensor in function.inputs)
        proto.output.extend(tensor.name for tensor in function.outputs)
        proto.opset_import.extend(_opsets(function, ()))
        for tensor in _tensors(function):
            if isinstance(tensor, self._gs.Constant):
                value = self.tensor(tensor)
                proto.node.append(helper.make_node("Constant", [], [tensor.name], value=value))
        proto.node.extend(self.node(node) for node in function.nodes)
        for name, default in function.attrs.items():
            if default is None:
                proto.attribute.append(name)
            else:
                proto.attribute_proto.append(self.attribute(name, default, f"{function.name}"))
        return proto

    def info(self, tensor: gs.Tensor) -> onnx.ValueInfoProto:
        proto = onnx.ValueInfoProto(name=tensor.name)
        kind = getattr(tensor, "type", "tensor_type")
        # Type 0 is what the import makes of sequences of maps.
        if tensor.dtype is None or tensor.dtype == onnx.TensorProto.UNDEFINED:
            return proto
        element = proto.type
        if kind == "sequence_type":
            element = proto.type.sequence_type.elem_type
        elif kind not in ("tensor_type", "sparse_tensor_type"):
            return proto  # graphs hold no more of optional and map types than that they are there
        leaf = element.sparse_tensor_type if kind == "sparse_tensor_type" else element.tensor_type
        leaf.elem_type = _data_type(tensor.dtype)
        if tensor.shape is not None:
            _write_dims(leaf.shape, tensor.shape)
        return proto

    def node(self, node: gs.Node) -> onnx.NodeProto:
        proto = onnx.NodeProto(op_type=node.op)
        if node.name:
            proto.name = node.name
        if node.domain is not None:
            proto.domain = node.domain
        proto.input.extend(tensor.name for tensor in node.inputs)
        proto.output.extend(tensor.name for tensor in node.outputs)
        what = f"{node.name!r} ({node.op})" if node.name else node.op
        for name, value in node.attrs.items():
            if isinstance(value, (list, tuple)) and not value:
                proto.attribute.append(_empty_attribute(proto, name))
            else:
                proto.attribute.append(self.attribute(name, value, what))
        return proto

    def attribute(self, name: str, value: Any, owner: str) -> onnx.AttributeProto:
        if isinstance(value, self._gs.Node.AttributeRef):
            kind = self._gs.util.misc.convert_to_onnx_attr_type(value.type)
            return onnx.AttributeProto(name=name, type=kind, ref_attr_name=value.name)
        if isinstance(value, self._gs.Graph):
            graph = onnx.AttributeProto(name=name, type=onnx.AttributeProto.GRAPH)
            graph.g.CopyFrom(self.graph(value))
            return graph
        if isinstance(value, self._gs.Constant):
            value = self.tensor(value)
        elif isinstance(value, type | np.dtype):
            value = _data_type(value)
        try:
            return helper.make_attribute(name, value)
        except (TypeError, ValueError) as error:
            raise ModelError(
                f"the attribute {name!r} of {owner} has no form in ONNX: {error}"
            ) from None

    def tensor(self, tensor: gs.Constant) -> onnx.TensorProto:
        values = tensor._values
        if isinstance(values, self._gs.ir.tensor.LazyValues):
            proto = onnx.TensorProto()
            proto.CopyFrom(values.tensor)
        else:
            proto = _tensor_proto(np.asarray(values), tensor.export_dtype, tensor.name)
        # Tensors of attributes need no name, and had none if it is empty.
        if tensor.name:
            proto.name = tensor.name
        return proto


def _tensors(graph: gs.Graph) -> Iterator[gs.Tensor]:
    """Tensors that the nodes and outputs of `graph` itself mention, each once, in their order."""
    seen: set[int] = set()
    for node in graph.nodes:
        for tensor in (*node.inputs, *node.outputs):
            if tensor.name and id(tensor) not in seen:
                seen.add(id(tensor))
                yield tensor
    for tensor in graph.outputs:
        if id(tensor) not in seen:
            seen.add(id(tensor))
            yield tensor


def _tensor_proto(values: np.ndarray[Any, Any], export_dtype: Any, name: str) -> onnx.TensorProto:
    if values.dtype.kind in "OSU":
        texts = [item if isinstance(item, bytes) else str(item).encode() for item in values.flat]
        return onnx.TensorProto(
            data_type=onnx.TensorProto.STRING, dims=values.shape, string_data=texts
        )
    try:
        target = onnx_ir.DataType(_data_type(export_dtype))
        if onnx_ir.DataType.from_numpy(values.dtype) != target:
            values = values.astype(target.numpy())
        tensor = onnx_ir.Tensor(np.ascontiguousarray(values).reshape(values.shape), dtype=target)
        return onnx_ir.serde.serialize_tensor(tensor)
    except (TypeError, ValueError) as error:
        raise ModelError(f"the constant {name!r} has no form in ONNX: {error}") from None


def _data_type(dtype: Any) -> int:
    """The ONNX element type of a numpy type; numbers are ONNX types already."""
    if isinstance(dtype, numbers.Integral):
        return int(dtype)
    if np.dtype(dtype).kind in "OSU":
        return int(onnx.TensorProto.STRING)
    try:
        return onnx_ir.DataType.from_numpy(np.dtype(dtype)).value
    except TypeError:
        raise ModelError(f"the type {dtype} has no form in ONNX") from None


def _write_dims(proto: onnx.TensorShapeProto, dims: Iterable[Any]) -> None:
    proto.SetInParent()
    for dim in dims:
        target = proto.dim.add()
        if isinstance(dim, str):
            target.dim_param = dim
        elif dim is not None and int(dim) >= 0:
            target.dim_value = int(dim)


def _empty_attribute(node: onnx.NodeProto, name: str) -> onnx.AttributeProto:
    """An empty list does not say of what; the operator's schema does, integers are most common."""
    kind: Any = onnx.AttributeProto.INTS
    if node.domain in _DEFAULT_DOMAINS and onnx.defs.has(node.op_type):
        known = onnx.defs.get_schema(node.op_type).attributes.get(name)
        if known is not None:
            kind = int(cast(Any, known.type))
    return onnx.AttributeProto(name=name, type=kind)


def _opsets(graph: gs.Graph, functions: Sequence[Any]) -> list[onnx.OperatorSetIdProto]:
    """What the graph imports, and version 1 of domains that its nodes use without an import."""
    if graph.import_domains is None:
        found = {"": int(graph.opset)}
    else:
        found = {item.domain: item.version for item in graph.import_domains}
    used = [node.domain for node in graph.nodes]
    for sub in graph.subgraphs(recursive=True):
        used += [node.domain for node in sub.nodes]
    used += [function.domain for function in functions]
    for domain in used:
        if domain is not None and (domain not in _DEFAULT_DOMAINS or not found):
            found.setdefault(domain, 1)
    return [helper.make_opsetid(domain, version) for domain, version in found.items()]


def _ir_version(opsets: Sequence[onnx.OperatorSetIdProto], has_functions: bool) -> int:
    needed = helper.find_min_ir_version_for(list(opsets), ignore_unknown=True)
    return max(needed, _FUNCTION_IR_VERSION if has_functions else _OLDEST_IR_VERSION)


# --------------------------------------------------------------------------- restoring


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


_SKIPPED = (
    onnx.AttributeProto.SPARSE_TENSOR,
    onnx.AttributeProto.SPARSE_TENSORS,
    onnx.AttributeProto.TYPE_PROTO,
    onnx.AttributeProto.TYPE_PROTOS,
    onnx.AttributeProto.TENSORS,
    onnx.AttributeProto.GRAPHS,
)


_LISTS = (onnx.AttributeProto.INTS, onnx.AttributeProto.FLOATS, onnx.AttributeProto.STRINGS)


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

"""In and out as `onnx_graphsurgeon.Graph`, for toolchains built on it.

onnx-graphsurgeon keeps about half of an ONNX model's fields, and its own export renames tensors in
the proto that the graph came from, gives one float8 type another's name, refuses int4 and string
values once they were looked at, and copies constants of the outer graph into subgraphs. So graphs
are written here by an exporter that changes nothing, and `restore_dropped` gives back what the
import had dropped, as far as the nodes and tensors that it belonged to are still there.
"""

from __future__ import annotations

import numbers
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import onnx
import onnx_ir
from onnx import helper

from graphfold.errors import ModelError, UsageError
from graphfold.model import Model, adopt, to_proto
from graphfold.restoring import restore_dropped

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
    `onnx_graphsurgeon.export_onnx`, call `graphfold.restoring.restore_dropped`.

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

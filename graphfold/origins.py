"""How messages were written in the source, kept beside the onnx-ir objects made of them.

onnx-ir forgets, for one, whether an empty field was set and in which order metadata stood. An
`Origin` holds a message in both forms, as it was and as onnx-ir writes it while nothing changed;
`restore` exchanges one for the other field by field.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import onnx
import onnx_ir
from google.protobuf.message import Message

AnyGraph = onnx.GraphProto | onnx.FunctionProto
KEY = "graphfold.origin"
SPARSE = "graphfold.sparse_initializer"

AttributeType = onnx.AttributeProto
VALUE_FIELDS = {
    "f": AttributeType.FLOAT,
    "i": AttributeType.INT,
    "s": AttributeType.STRING,
    "t": AttributeType.TENSOR,
    "g": AttributeType.GRAPH,
    "sparse_tensor": AttributeType.SPARSE_TENSOR,
    "tp": AttributeType.TYPE_PROTO,
    "floats": AttributeType.FLOATS,
    "ints": AttributeType.INTS,
    "strings": AttributeType.STRINGS,
    "tensors": AttributeType.TENSORS,
    "graphs": AttributeType.GRAPHS,
    "sparse_tensors": AttributeType.SPARSE_TENSORS,
    "type_protos": AttributeType.TYPE_PROTOS,
}
# Attribute types whose content is written apart from the attribute's own fields.
NESTED = {
    onnx_ir.AttributeType.TENSOR,
    onnx_ir.AttributeType.TENSORS,
    onnx_ir.AttributeType.GRAPH,
    onnx_ir.AttributeType.GRAPHS,
}


class Origin(NamedTuple):
    """A message as the source had it, and as onnx-ir writes it when nothing changed."""

    canonical: Message
    original: Message


@dataclass
class NodeOrigin:
    """What a node had beside its canonical form: its own fields, attributes by name."""

    header: Origin | None
    attributes: dict[str, Origin] = field(default_factory=dict)


class NodeSource(NamedTuple):
    """A node of plain attributes as the source had it; a node that nothing changed is written so.

    Attributes:
        proto: the source's message, which must not change.
        attributes: what onnx-ir made of its attributes, in order.
    """

    proto: onnx.NodeProto
    attributes: tuple[onnx_ir.Attr, ...]


@dataclass(frozen=True)
class GraphOrigin:
    """What a graph or function listed, in its order, when it was read."""

    header: Origin | None
    names: frozenset[str]
    value_info: tuple[str | onnx.ValueInfoProto, ...]  # a name, or an entry for no value at all
    quantization: tuple[onnx.TensorAnnotation, ...]


@dataclass(frozen=True)
class Header:
    """The model's own fields (all but graph and functions), as read and as onnx-ir writes them."""

    origin: Origin | None = None


_M = TypeVar("_M", bound=Message)


def copied(message: _M) -> _M:
    """A copy of a message."""
    copy: _M = type(message)()
    copy.CopyFrom(message)
    return copy


def without(message: _M, *fields: str) -> _M:
    """A copy without some fields, made without copying these."""
    copy: _M = type(message)()
    for descriptor in message.DESCRIPTOR.fields:
        if descriptor.name not in fields:
            _copy_field(message, copy, descriptor)
    return copy


def origin_of(canonical: Message, original: Message) -> Origin | None:
    """Both forms, or None where they are the same."""
    return None if canonical == original else Origin(canonical, original)


def restore(message: Message, origin: Origin | None) -> None:
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

"""Keep one of nodes that compute the same, and one of initializers that hold the same.

Two nodes of one operator with the same inputs, attributes and number of outputs give the same
results: f(x) and f(x) become one. Walking in execution order, equal inputs become one tensor first,
so whole equal branches merge. Two initializers of the same type and shape whose bytes are equal are
one constant; only those that share type and shape with another are read at all.

Before IR version 4, where initializers are inputs that nobody can replace and constants are nodes,
equal inputs stay and one of them is read, and equal Constant nodes become one.

Kept apart: operators that draw random numbers; tensors that the interface names (two outputs keep
two nodes) and initializers that callers may replace; what a subgraph reads; and paddings and
per-channel arithmetic that only one convolution reads, which fold into it.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import onnx_ir as ir

from graphfold.cleanup import bypass, free_nodes, is_captured, why_not_bypassed
from graphfold.graph import is_op, only_consumer
from graphfold.linear import PER_CHANNEL
from graphfold.origins import SPARSE
from graphfold.rewrite import Pass, Phase, Work

_RANDOM = frozenset(
    {"RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike"}
    | {"Bernoulli", "Multinomial", "Dropout"}
)

_IR_VERSION = 4


@dataclass(frozen=True)
class _Same:
    """Tensors that equal earlier ones, in pairs."""

    later: tuple[ir.Value, ...]
    earlier: tuple[ir.Value, ...]


@dataclass(frozen=True)
class MergeDuplicates(Pass):
    """Each value computed, and each constant stored, once."""

    name: ClassVar[str] = "merge_duplicates"
    phase: ClassVar[Phase] = Phase.FOLD
    order: ClassVar[int] = -1

    def find(self, work: Work) -> Iterable[_Same]:
        """Equal initializers, then equal nodes in execution order."""
        constants = list(_initializers(work))
        same = {each.later[0]: each.earlier[0] for each in constants}
        return [*constants, *_nodes(work, same)]

    def label(self, candidate: _Same) -> str:
        """The tensor that would go."""
        return candidate.later[0].name or ""

    def check(self, work: Work, candidate: _Same) -> str | None:
        """Refuse where a name of the interface would be lost."""
        for later, earlier in zip(candidate.later, candidate.earlier, strict=True):
            reason = why_not_bypassed(work, later, work.graph.current(earlier))
            if reason is not None:
                return reason
        return None

    def rewrite(self, work: Work, candidate: _Same) -> None:
        """Let readers of the later read the earlier."""
        graph = work.graph
        if candidate.later[0].is_initializer():
            (value,) = candidate.later
            value.replace_all_uses_with(candidate.earlier[0])
            if not value.is_graph_input():
                graph.ir.initializers.pop(value.name or "")
            return
        for later, earlier in zip(candidate.later, candidate.earlier, strict=True):
            bypass(work, later, graph.current(earlier))


def _initializers(work: Work) -> Iterator[_Same]:
    graph = work.graph
    groups: dict[Hashable, list[ir.Value]] = defaultdict(list)
    for value in graph.ir.initializers.values():
        tensor = value.const_value
        if tensor is None or SPARSE in tensor.meta or tensor.dtype == ir.DataType.STRING:
            continue
        if graph.is_overridable(value) or value.is_graph_output() or not value.uses():
            continue
        if not is_captured(graph, value):
            groups[tensor.dtype, tuple(tensor.shape.numpy())].append(value)
    annotated = graph.model.annotation_names()
    for group in groups.values():
        first: dict[str, ir.Value] = {}
        for value in group if len(group) > 1 else ():
            assert value.const_value is not None
            digest = hashlib.sha256(value.const_value.tobytes()).hexdigest()
            earlier = first.setdefault(digest, value)
            if earlier is not value and value.name not in annotated:
                yield _Same((value,), (earlier,))


def _nodes(work: Work, same: dict[ir.Value, ir.Value]) -> Iterator[_Same]:
    """Equal nodes; `same` maps tensors to those that stand for them, and grows."""
    first: dict[Hashable, ir.Node] = {}
    old = (work.graph.model.ir.ir_version or 0) < _IR_VERSION
    for node in free_nodes(work):
        if is_op(node, *_RANDOM) or _folds_into_conv(node):
            continue
        # From IR version 4 on these become initializers.
        if not node.inputs and not (is_op(node, "Constant") and old):
            continue
        earlier = first.setdefault(_key(node, same), node)
        if earlier is node or not any(o.uses() or o.is_graph_output() for o in node.outputs):
            continue
        # Equal they are even where the interface keeps both.
        same.update(zip(node.outputs, earlier.outputs, strict=True))
        yield _Same(tuple(node.outputs), tuple(earlier.outputs))


def _folds_into_conv(node: ir.Node) -> bool:
    """Whether only one convolution reads it, and none before it would take it in."""
    source = node.inputs[0] if node.inputs else None
    before = None if source is None else source.producer()
    if is_op(node, *PER_CHANNEL) and is_op(before, "Conv", *PER_CHANNEL):
        return False
    return is_op(node, "Pad", *PER_CHANNEL) and is_op(only_consumer(node.outputs[0]), "Conv")


def _key(node: ir.Node, same: dict[ir.Value, ir.Value]) -> Hashable:
    inputs = tuple(None if value is None else same.get(value, value) for value in node.inputs)
    attributes = tuple(
        (name, attr.type, _plain(attr.value)) for name, attr in sorted(node.attributes.items())
    )
    # Which optional outputs there are may change what an operator does.
    outputs = tuple(bool(value.name) for value in node.outputs)
    return node.op_type, node.overload, inputs, attributes, outputs


def _plain(value: Any) -> Hashable:
    """An attribute's value as something that is equal only where the bits are."""
    if isinstance(value, float):
        return value.hex()
    if isinstance(value, (int, str, bytes)):
        return value
    if isinstance(value, (list, tuple)):
        return tuple(_plain(item) for item in value)
    # Last: being a tensor is a protocol, and asking for that is slow.
    if not isinstance(value, ir.TensorProtocol) or value.dtype == ir.DataType.STRING:
        return id(value)
    digest = hashlib.sha256(value.tobytes()).hexdigest()
    return value.dtype, tuple(value.shape.numpy()), digest

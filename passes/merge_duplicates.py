"""Keep one of nodes that compute the same, and one of initializers that hold the same.

Two nodes of one operator with the same inputs, attributes and number of outputs give the same
results: f(x) and f(x) become one. Walking in execution order, equal inputs become one tensor first,
so whole equal branches merge. Two initializers of the same type and shape whose bytes are equal are
one constant; only those that share type, shape and first values with another are read in full.

Before IR version 4, where initializers are inputs that nobody can replace and constants are nodes,
equal inputs stay and one of them is read, and equal Constant nodes become one.

Kept apart: operators that draw random numbers; tensors that the interface names (two outputs keep
two nodes) and initializers that callers may replace; what a subgraph reads; and paddings and
per-channel arithmetic that only one convolution reads, which fold into it.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from graphfold.cleanup import bypass, free_nodes, is_captured, why_not_bypassed
from graphfold.graph import is_op, only_consumer
from graphfold.linear import PER_CHANNEL
from graphfold.rewrite import Pass, Phase, Work
from graphfold.spill import let_go
from graphfold.tensors import first_bytes, is_sparse

# Most tensors of one shape differ in these elements already, and need not be read to the end.
_BEGINNING = 64
_RANDOM = frozenset(
    {"RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike"}
    | {"Bernoulli", "Multinomial", "Dropout"}
)
_DISCRETE = frozenset(
    {ir.AttributeType.INT, ir.AttributeType.INTS}
    | {ir.AttributeType.STRING, ir.AttributeType.STRINGS}
)


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
        # Training may tell equal ones apart.
        constants = [] if work.graph.model.has_training_info else list(_initializers(work))
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
        if tensor is None or is_sparse(tensor) or tensor.dtype == ir.DataType.STRING:
            continue
        if graph.is_overridable(value) or value.is_graph_output() or not value.uses():
            continue
        if not is_captured(graph, value):
            groups[tensor.dtype, tuple(tensor.shape.numpy())].append(value)
    annotated = graph.model.annotation_names(graph.ir)
    for group in groups.values():
        for alike in _grouped(group, _beginning):
            for first, *others in _grouped(alike, _digest):
                for value in others:
                    if value.name not in annotated:
                        yield _Same((value,), (first,))


def _grouped(
    values: Sequence[ir.Value], key: Callable[[ir.TensorProtocol], Hashable]
) -> Iterator[list[ir.Value]]:
    """Those of several initializers that agree in something, in their order."""
    groups: dict[Hashable, list[ir.Value]] = defaultdict(list)
    for value in values if len(values) > 1 else ():
        assert value.const_value is not None
        groups[key(value.const_value)].append(value)
        let_go(value.const_value)
    yield from (group for group in groups.values() if len(group) > 1)


def _beginning(tensor: ir.TensorProtocol) -> bytes:
    return first_bytes(tensor, _BEGINNING)


def _digest(tensor: ir.TensorProtocol) -> str:
    return hashlib.sha256(tensor.tobytes()).hexdigest()


def _nodes(work: Work, same: dict[ir.Value, ir.Value]) -> Iterator[_Same]:
    """Equal nodes; `same` maps tensors to those that stand for them, and grows."""
    first: dict[Hashable, ir.Node] = {}
    nodes_stay = not work.graph.holds_initializers
    for node in free_nodes(work):
        if is_op(node, *_RANDOM) or _folds_into_conv(node):
            continue
        # Elsewhere these become initializers.
        if not node.inputs and not (is_op(node, "Constant") and nodes_stay):
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
        (name, attr.type, _plain(attr)) for name, attr in sorted(node.attributes.items())
    )
    # Which optional outputs there are may change what an operator does.
    outputs = tuple(bool(value.name) for value in node.outputs)
    return node.op_type, node.overload, inputs, attributes, outputs


def _plain(attr: ir.Attr) -> Hashable:
    """An attribute's value as something that is equal only where the bits are."""
    value = attr.value
    if attr.type in _DISCRETE:
        return tuple(value) if isinstance(value, (list, tuple)) else value
    if attr.type is ir.AttributeType.FLOAT:
        return float(value).hex()
    if attr.type is ir.AttributeType.FLOATS:
        return tuple(float(item).hex() for item in value)
    if attr.type is ir.AttributeType.TENSOR and value.dtype is not ir.DataType.STRING:
        digest = hashlib.sha256(value.tobytes()).hexdigest()
        return value.dtype, tuple(value.shape.numpy()), digest
    return id(value)

"""Which call of a torch module a node of its exported graph is.

Convolutions and dense layers are found by their weights: by the name of the parameter, else by its
contents, else by its contents with the normalisation behind it folded in, as exporters do. What
has no weights is found by the weighted layers around it: those that its inputs come from, those
that read it, and its place in the order where several stand between the same ones. Scopes that the
exporter has written decide where that leaves a doubt.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from graphfold.calibration.module_calls import ACTIVATIONS, ADDS, Event
from graphfold.graph import Graph, attribute, consumers, is_op
from graphfold.linear import is_join, variable_inputs
from graphfold.sites import ActivationSite, Sites

_WEIGHTED_NODES = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_FOLDED = 1e-4  # of the largest weight: what folding a normalisation may round away

T = TypeVar("T")
Marks = tuple[frozenset[int], frozenset[int]]


@dataclass(frozen=True)
class Weighted:
    """A weighted node and the call that it is.

    Attributes:
        norm: the normalisation that follows the call, if any.
        is_folded: whether the node holds that normalisation.
    """

    node: ir.Node
    event: Event
    norm: Event | None
    is_folded: bool


@dataclass(frozen=True)
class Match:
    """Nodes of a graph and calls of a module.

    Attributes:
        weighted: by node.
        activations: by site.
        adds: by node.
        unmatched: weighted nodes that no call was found for.
    """

    weighted: dict[ir.Node, Weighted]
    activations: dict[ActivationSite, Event]
    adds: dict[ir.Node, Event]
    unmatched: tuple[ir.Node, ...]


def match(graph: Graph, sites: Sites, events: Sequence[Event]) -> Match:
    """Find the calls that a graph's nodes are."""
    nodes = [
        node
        for node in graph.ir
        if is_op(node, *_WEIGHTED_NODES) and graph.is_constant(node.inputs[1])
    ]
    readers = _readers(events)
    found = _match_weighted(graph, nodes, [e for e in events if e.weight is not None], readers)
    numbers = {node: number for number, node in enumerate(found)}
    of_event = {pair.event: numbers[node] for node, pair in found.items()}
    node_marks = _NodeMarks(graph, numbers)
    event_marks = _EventMarks(readers, of_event)
    activations = _pair_up(
        sites.activations,
        [event for event in events if event.kind in ACTIVATIONS],
        lambda site: node_marks.of(site.input, site.output),
        event_marks.of,
        lambda site: _scope(site.nodes[0]),
    )
    joins = [node for node in graph.ir if is_op(node, "Add", "Sum") and is_join(graph, node)]
    adds = _pair_up(
        joins,
        [e for e in events if e.kind in ADDS and len(e.sources) == 2],
        lambda node: node_marks.of(None, node.outputs[0]),
        event_marks.of,
        _scope,
    )
    missing = tuple(node for node in nodes if node not in found)
    return Match(found, activations, adds, missing)


def operand(graph: Graph, match_: Match, node: ir.Node, index: int) -> int | None:
    """The number of the argument of an addition that an input of its node is."""
    event = match_.adds[node]
    numbers = {each: number for number, each in enumerate(match_.weighted)}
    of_event = {pair.event: numbers[each] for each, pair in match_.weighted.items()}
    wanted = _NodeMarks(graph, numbers).above(node.inputs[index])
    marks = _EventMarks({}, of_event)
    fitting = [
        number for number, source in enumerate(event.sources) if marks.above(source) == wanted
    ]
    return fitting[0] if len(fitting) == 1 else None


def _readers(events: Iterable[Event]) -> dict[Event, list[Event]]:
    found: dict[Event, list[Event]] = {}
    for event in events:
        for source in event.sources:
            if source is not None:
                found.setdefault(source, []).append(event)
    return found


# --- weights ----------------------------------------------------------------------------------


def _match_weighted(
    graph: Graph,
    nodes: Sequence[ir.Node],
    events: Sequence[Event],
    readers: Mapping[Event, list[Event]],
) -> dict[ir.Node, Weighted]:
    norms = {event: _norm_behind(event, readers) for event in events}
    values = {event: event.weight[1].cpu().numpy() for event in events if event.weight}
    folded = {event: _with_norm(values[event], norm) for event, norm in norms.items() if norm}
    arrays = {node: graph.constant(node.inputs[1]) for node in nodes}
    found: dict[ir.Node, Event] = {}

    def named(node: ir.Node, event: Event) -> bool:
        name = "" if event.weight is None else event.weight[0]
        return bool(name) and _source_name(node.inputs[1]) == name

    def same(node: ir.Node, event: Event) -> bool:
        array, value = arrays[node], values[event]
        if array is None:
            return False
        turned = value.ndim == 2 and np.array_equal(array, value.T)
        return turned or np.array_equal(array, value)

    def same_folded(node: ir.Node, event: Event) -> bool:
        array, value = arrays[node], folded.get(event)
        return (
            array is not None
            and value is not None
            and array.shape == value.shape
            and bool(np.abs(array - value).max() <= _FOLDED * np.abs(value).max())
        )

    def same_scope(node: ir.Node, event: Event) -> bool:
        norm = norms[event]
        return _scope(node) in (event.path, event.path if norm is None else norm.path)

    for fits in (named, same, same_folded, same_scope):
        _assign(found, nodes, events, fits)
    return {
        node: Weighted(node, found[node], norms[found[node]], not _norm_node_behind(node))
        for node in nodes
        if node in found
    }


def _assign(
    found: dict[ir.Node, Event],
    nodes: Sequence[ir.Node],
    events: Sequence[Event],
    fits: Callable[[ir.Node, Event], bool],
) -> None:
    """Pair what fits nothing else; where as many nodes as calls fit, in their order."""
    taken = set(found.values())
    choices = {
        node: tuple(event for event in events if event not in taken and fits(node, event))
        for node in nodes
        if node not in found
    }
    groups: dict[tuple[Event, ...], list[ir.Node]] = {}
    for node, fitting in choices.items():
        if fitting:
            groups.setdefault(fitting, []).append(node)
    for fitting, members in groups.items():
        if len(fitting) == len(members):
            found.update(zip(members, fitting, strict=True))


def _norm_behind(event: Event, readers: Mapping[Event, list[Event]]) -> Event | None:
    after = readers.get(event, [])
    return after[0] if len(after) == 1 and after[0].kind == "batch_norm" else None


def _norm_node_behind(node: ir.Node) -> bool:
    return any(is_op(reader, "BatchNormalization") for reader in consumers(node.outputs[0]))


def _with_norm(weight: NDArray[Any], norm: Event) -> NDArray[Any]:
    """A kernel with the normalisation behind it folded in."""
    names = ("input", "running_mean", "running_var", "weight", "bias", "training")
    given = dict(zip((*names, "momentum", "eps"), norm.arguments, strict=False)) | dict(
        norm.options
    )
    variance = given["running_var"].cpu().numpy()
    scale = 1 / np.sqrt(variance + given.get("eps", 1e-5))
    if given.get("weight") is not None:
        scale = scale * given["weight"].detach().cpu().numpy()
    return np.asarray(weight * scale.reshape(-1, *[1] * (weight.ndim - 1)))


def _source_name(value: ir.Value | None) -> str | None:
    """The name that a constant has in the file, behind copies of it."""
    while value is not None and is_op(value.producer(), "Identity", "Transpose"):
        node = value.producer()
        value = None if node is None else node.inputs[0]
    return None if value is None else value.name


def _scope(node: ir.Node) -> str | None:
    """The path of the module that a node was exported from, where the exporter has told."""
    told = node.metadata_props.get("pkg.torch.onnx.name_scopes")
    if told:
        try:
            scopes = [str(item) for item in ast.literal_eval(told)]
        except (ValueError, SyntaxError):
            return None
        return scopes[-2] if len(scopes) > 1 else None
    parts = (node.name or "").strip("/").split("/")[:-1]
    if not parts or not (node.name or "").startswith("/"):
        return None
    path: list[str] = []
    before = ""
    for part in parts:
        # Items of a list repeat its name: blocks, blocks.0, expand is blocks.0.expand.
        path.append(part.removeprefix(f"{before}."))
        before = part
    return ".".join(path)


# --- what stands between weights --------------------------------------------------------------


class _NodeMarks:
    """Numbers of the weighted nodes next to a tensor, upstream and downstream."""

    def __init__(self, graph: Graph, numbers: Mapping[ir.Node, int]) -> None:
        self._graph = graph
        self._numbers = numbers

    def of(self, source: ir.Value | None, result: ir.Value) -> Marks:
        """Above what is read (by default what makes the result) and below the result."""
        start = source if source is not None else result
        above = self.above(start)
        found: set[int] = set()
        waiting, seen = [result], set()
        while waiting:
            for reader in consumers(waiting.pop()):
                if reader in self._numbers:
                    found.add(self._numbers[reader])
                elif reader not in seen:
                    seen.add(reader)
                    waiting.extend(reader.outputs)
        return above, frozenset(found)

    def above(self, value: ir.Value | None) -> frozenset[int]:
        """Nearest weighted nodes that a tensor is computed from; -1 stands for an input."""
        found: set[int] = set()
        waiting, seen = [value], set()
        while waiting:
            at = waiting.pop()
            node = None if at is None else at.producer()
            if node is None:
                found.add(-1)
            elif node in self._numbers:
                found.add(self._numbers[node])
            elif node not in seen:
                seen.add(node)
                waiting.extend(variable_inputs(self._graph, node))
        return frozenset(found)


class _EventMarks:
    """The same for calls."""

    def __init__(self, readers: Mapping[Event, list[Event]], numbers: Mapping[Event, int]) -> None:
        self._readers = readers
        self._numbers = numbers

    def of(self, event: Event) -> Marks:
        """Above and below a call that has no weight."""
        above = frozenset(mark for source in event.sources for mark in self.above(source))
        found: set[int] = set()
        waiting, seen = [event], set()
        while waiting:
            for reader in self._readers.get(waiting.pop(), ()):
                if reader in self._numbers:
                    found.add(self._numbers[reader])
                elif reader not in seen:
                    seen.add(reader)
                    waiting.append(reader)
        return above, frozenset(found)

    def above(self, event: Event | None) -> frozenset[int]:
        """Nearest weighted calls that a result is computed from; -1 stands for an input."""
        found: set[int] = set()
        waiting, seen = [event], set()
        while waiting:
            at = waiting.pop()
            if at is None:
                found.add(-1)
            elif at in self._numbers:
                found.add(self._numbers[at])
            elif at not in seen:
                seen.add(at)
                waiting.extend(at.sources)
        return frozenset(found)


def _pair_up(
    items: Sequence[T],
    events: Sequence[Event],
    item_marks: Callable[[T], Marks],
    event_marks: Callable[[Event], Marks],
    scope: Callable[[T], str | None],
) -> dict[T, Event]:
    """Items and calls between the same weights, in their order; else by scope."""
    groups: dict[Marks, tuple[list[T], list[Event]]] = {}
    for item in items:
        groups.setdefault(item_marks(item), ([], []))[0].append(item)
    for event in events:
        groups.setdefault(event_marks(event), ([], []))[1].append(event)
    found: dict[T, Event] = {}
    for members, calls in groups.values():
        if len(members) == len(calls):
            found.update(zip(members, calls, strict=True))
            continue
        for item in members:
            fitting = [event for event in calls if event.path == scope(item)]
            if len(fitting) == 1:
                found[item] = fitting[0]
    return found


def pads_of(node: ir.Node, rank: int) -> tuple[tuple[int, int], ...]:
    """A window's padding, (begin, end) of each spatial axis."""
    flat = list(attribute(node, "pads", [0] * (2 * rank)))
    return tuple(zip(flat[:rank], flat[rank:], strict=True))

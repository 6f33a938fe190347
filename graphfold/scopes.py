"""Folding everywhere in a model: the main graph, bodies of If, Loop and Scan, local functions.

A rewrite replaces nodes by others that compute the same from the same tensors, so it holds in any
body as it does in the main graph, however often the body runs, as long as no node crosses its
border. Passes walk from tensors to the nodes that make them; so while a body is folded, stand-ins
without a maker take the place of the tensors that it captures from outside. What is constant
outside is constant inside: its stand-in is an initializer of the body for that time.

A function's body has no initializers: new constants are Constant nodes there. Operators whose
attributes are only known where the function is called are hidden from passes.

Bodies may read the last of a weight, and the main graph may make more of them constant, so all
take turns until none changes. Shapes come from the one inference of the whole model.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import onnx_ir as ir

from graphfold.graph import Graph, has_reference_attributes, node_label
from graphfold.progress import Progress
from graphfold.rewrite import Pass, PassStatistics, Phase, Work, run_passes
from graphfold.shapes import SHAPES_KEY

_HIDDEN_DOMAIN = "graphfold.known_by_the_caller"
_MOST_ROUNDS = 1_000


@dataclass(frozen=True)
class _Body:
    """A graph inside the model that is not the main one.

    Attributes:
        graph: edited in place.
        label: how reports call it.
        outer: the graphs around it, innermost last; none around a function.
    """

    graph: Graph
    label: str
    outer: tuple[Graph, ...] = ()


def fold_everywhere(
    passes: Sequence[Pass], work: Work, progress: Progress | None = None
) -> list[PassStatistics]:
    """Run the FOLD passes on the main graph and on every body until nothing changes.

    Returns:
        Statistics per pass, over all graphs; folds outside the main graph carry their scope.
    """
    main = run_passes(passes, Phase.FOLD, work, progress)
    total = _Total(main)
    for _ in range(_MOST_ROUNDS):
        changed = False
        left: list[list[PassStatistics]] = []
        for body in _bodies(work.graph):
            found = _fold_body(passes, work, body)
            total.add(found, body.label)
            left.append(found)
            changed |= any(each.applied for each in found)
        if not changed:
            return total.finished([main, *left])
        main = run_passes(passes, Phase.FOLD, work)
        total.add(main)
    raise RuntimeError("the passes do not settle between the main graph and its bodies")


class _Total:
    """Statistics of several graphs, summed by pass."""

    def __init__(self, first: Sequence[PassStatistics]) -> None:
        self.statistics = [replace(each, folds=list(each.folds)) for each in first]

    def add(self, found: Sequence[PassStatistics], scope: str | None = None) -> None:
        """Add what one graph's run did."""
        for total, each in zip(self.statistics, found, strict=True):
            total.applied += each.applied
            total.seconds += each.seconds
            total.folds += [replace(fold, scope=scope) for fold in each.folds]

    def finished(self, last: Iterable[Sequence[PassStatistics]]) -> list[PassStatistics]:
        """The sums, with what the last run on each graph left as it is."""
        by_pass = zip(*last, strict=True)
        for total, runs in zip(self.statistics, by_pass, strict=True):
            total.skipped = [skip for each in runs for skip in each.skipped]
            total.found = total.applied + len(total.skipped)
        return self.statistics


# --- finding bodies ---------------------------------------------------------------------------


def _bodies(main: Graph) -> Iterator[_Body]:
    """Every body, outer ones first; found while they are folded, so each is as it is by then."""
    yield from _subgraphs(main, ())
    for function in main.model.ir.functions.values():
        graph = Graph(
            main.model,
            _shapes(function.graph),
            body=function.graph,
            opsets=function.opset_imports,
            in_function=True,
        )
        label = f"function {function.domain}::{function.name}"
        yield _Body(graph, label)
        yield from _subgraphs(graph, (), f"{label}, ")


def _subgraphs(owner: Graph, outer: tuple[Graph, ...], prefix: str = "") -> Iterator[_Body]:
    around = (*outer, owner)
    for node in owner.nodes():
        for name, body in node_bodies(node):
            graph = Graph(
                owner.model,
                _shapes(body),
                body=body,
                opsets=owner.opsets,
                names=owner.names,
                in_function=owner.in_function,
            )
            label = f"{prefix}{name} of {node_label(node)}"
            yield _Body(graph, label, around)
            yield from _subgraphs(graph, around, f"{label}, ")


def node_bodies(node: ir.Node) -> Iterator[tuple[str, ir.Graph]]:
    """The graphs that a node holds, by attribute."""
    for name, attr in node.attributes.items():
        if attr.is_ref():
            continue
        if attr.type == ir.AttributeType.GRAPH:
            yield name, attr.as_graph()
        elif attr.type == ir.AttributeType.GRAPHS:
            for number, graph in enumerate(attr.as_graphs()):
                yield f"{name}[{number}]", graph


def _shapes(body: ir.Graph) -> dict[str, tuple[int | str | None, ...]]:
    """What the model's inference found in a body: one dictionary for all turns on this model."""
    shapes = dict(body.meta.get(SHAPES_KEY) or {})
    body.meta[SHAPES_KEY] = shapes
    return shapes


# --- folding one ------------------------------------------------------------------------------


def _fold_body(passes: Sequence[Pass], work: Work, body: _Body) -> list[PassStatistics]:
    graph = body.graph
    inner = Work(graph, allow_growth=work.allow_growth, repair=work.repair)
    with _without_references(graph), _without_captures(body):
        statistics = run_passes(passes, Phase.FOLD, inner)
    work.graph.shapes_may_grow |= graph.shapes_may_grow
    return statistics


@contextmanager
def _without_references(graph: Graph) -> Iterator[None]:
    """Give nodes with attributes of the enclosing function a domain that no pass looks at."""
    hidden: list[tuple[ir.Node, str]] = []
    if graph.in_function:
        hidden = [(node, node.domain) for node in graph.ir if has_reference_attributes(node)]
    for node, _ in hidden:
        node.domain = _HIDDEN_DOMAIN
    try:
        yield
    finally:
        for node, domain in hidden:
            node.domain = domain


@contextmanager
def _without_captures(body: _Body) -> Iterator[None]:
    """Put stand-ins in the place of the tensors that a body captures, and back afterwards."""
    stand_ins: dict[ir.Value, ir.Value] = {}
    owners = {graph.ir: graph for graph in body.outer}
    own = _own_values(body.graph.ir)
    for node in body.graph.ir:
        for index, value in enumerate(node.inputs):
            if value is None or value in own:
                continue
            if value not in stand_ins:
                stand_ins[value] = _stand_in(body.graph, value, _owner(owners, body, value))
            node.replace_input_with(index, stand_ins[value])
    try:
        yield
    finally:
        for value, stand_in in stand_ins.items():
            read = bool(stand_in.uses())
            body.graph.ir.initializers.pop(value.name or "", None)
            stand_in.replace_all_uses_with(value)
            if not read:
                _owner(owners, body, value).drop_if_unused(value)


def _own_values(graph: ir.Graph) -> set[ir.Value]:
    own = {*graph.inputs, *graph.initializers.values()}
    for node in graph:
        own.update(node.outputs)
    return own


def _owner(owners: dict[ir.Graph, Graph], body: _Body, value: ir.Value) -> Graph:
    producer = value.producer()
    graph = value.graph if producer is None else producer.graph
    return owners.get(graph, body.outer[-1]) if isinstance(graph, ir.Graph) else body.outer[-1]


def _stand_in(graph: Graph, value: ir.Value, owner: Graph) -> ir.Value:
    """A tensor of the same name, type and shape that nothing makes, constant where it is one."""
    dtype = owner.dtype(value)
    kind = value.type or (None if dtype is None else ir.TensorType(dtype))
    stand_in = ir.Value(name=value.name, type=kind, shape=value.shape)
    shape = owner.shape(value)
    if shape is not None and value.name:
        graph.shapes[value.name] = shape
    tensor = owner.constant_tensor(value)
    if tensor is not None:
        stand_in.const_value = tensor
        graph.ir.register_initializer(stand_in)
    return stand_in

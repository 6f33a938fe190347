"""Single-entry single-exit chains of a graph, by dominance on its data flow.

Vertices are tensors, and one more for each use of a tensor that is read more than once, so that a
branch has a beginning of its own. A tensor's next cut is its immediate post-dominator where it
dominates that in turn: what lies between the two has one entry and one exit. These steps form
chains, and chains nest: a residual block is one step of the chain around it, and its branches are
chains inside.

One thing enters a chain from the side: a vector added to all pixels alike that other inputs of the
model alone determine (a diffusion network's time embedding). It carries none of the flow, and the
convolution behind it maps it to another vector.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import onnx_ir as ir

from graphfold.graph import Graph, is_op
from graphfold.linear import is_vector, variable_inputs

# Asking for a tensor's shape lets none of its values flow.
_SHAPE_ONLY = ("Shape", "Size")
_SIDE_JOINS = ("Add", "Sum")


@dataclass(frozen=True)
class Point:
    """A tensor in the data flow, or one use of it where it has several."""

    value: ir.Value
    reader: ir.Node | None = None


@dataclass(frozen=True)
class FlowChain:
    """Points in execution order; what lies between two enters at one and leaves at the other.

    Attributes:
        points: at least two.
        steps: the nodes between each point and the next, in execution order.
        parent: index of the chain whose step holds this one, and of that step; None at the top.
    """

    points: tuple[Point, ...]
    steps: tuple[tuple[ir.Node, ...], ...]
    parent: tuple[int, int] | None = None

    def nodes(self, start: int, end: int) -> tuple[ir.Node, ...]:
        """The nodes between the points number `start` and `end`."""
        return tuple(node for step in self.steps[start:end] for node in step)


@dataclass(frozen=True)
class Flow:
    """A graph's chains, and what enters them from the side.

    Attributes:
        chains: all maximal ones, outer ones before those inside them.
        side_inputs: by node, the vectors it adds that are no part of any chain through it.
        dominators: by tensor, the nearest other that all ways to it lead through; none where they
            begin at several inputs.
    """

    chains: tuple[FlowChain, ...]
    side_inputs: dict[ir.Node, frozenset[ir.Value]]
    dominators: dict[ir.Value, ir.Value]


def find_flow(graph: Graph) -> Flow:
    """The chains of the main graph.

    Takes time in proportion to the graph's size and the depth of its nesting.
    """
    flow = _Flow(graph)
    dominators = _immediate_dominators(flow.sources)
    post = _immediate_dominators(_reversed(flow.sources))
    last = len(flow.sources) - 1
    following: dict[int, int] = {}
    for vertex in range(1, last):
        after = last - post[last - vertex]
        if after != last and _dominates(vertex, after, dominators):
            following[vertex] = after
    return Flow(tuple(_nested(flow, following)), flow.side_inputs, _by_tensor(flow, dominators))


def flow_chains(graph: Graph) -> list[FlowChain]:
    """All maximal chains of the main graph, outer ones before those inside them."""
    return list(find_flow(graph).chains)


class _Flow:
    """The data flow as numbered vertices, 0 before all inputs and the last behind all outputs.

    Attributes:
        points: by vertex; None at both ends.
        sources: by vertex, the vertices that flow into it; all smaller.
        order: the nodes through which something flows, numbered in execution order.
        side_inputs: by node, the vectors it adds that do not flow through it.
    """

    def __init__(self, graph: Graph) -> None:
        self.points: list[Point | None] = [None]
        self.sources: list[list[int]] = [[]]
        self.order: dict[ir.Node, int] = {}
        self.side_inputs: dict[ir.Node, frozenset[ir.Value]] = {}
        self._graph = graph
        self._idle = _idle(graph)
        self._vertex: dict[tuple[ir.Value, ir.Node | None], int] = {}
        # The model's inputs that a tensor is computed from, one bit each.
        self._origins: dict[ir.Value, int] = {}
        for number, value in enumerate(graph.ir.inputs):
            if not graph.is_constant(value):
                self._origins[value] = 1 << number
                self._add_tensor(value, [0])
        for index, node in enumerate(graph.ir):
            if node in self._idle:
                continue
            read = [value for value in variable_inputs(graph, node) if self._knows(value)]
            if not read:
                continue
            self.order[node] = index
            self._add_node(node, read)
        ends = [self._vertex[value, None] for value in graph.ir.outputs if self._knows(value)]
        self.points.append(None)
        self.sources.append(sorted(set(ends)) or [0])

    def _add_node(self, node: ir.Node, read: Sequence[ir.Value]) -> None:
        aside = self._side_inputs(node, read)
        if aside:
            self.side_inputs[node] = aside
        through = [value for value in dict.fromkeys(read) if value not in aside]
        entering = [self._entering(value, node) for value in through]
        origins = 0
        for value in through:
            origins |= self._origins[value]
        for output in node.outputs:
            if self._leads_on(output):
                self._origins[output] = origins
                self._add_tensor(output, entering)

    def _side_inputs(self, node: ir.Node, read: Sequence[ir.Value]) -> frozenset[ir.Value]:
        if len(set(read)) < 2 or not is_op(node, *_SIDE_JOINS):
            return frozenset()
        vectors = [value for value in read if is_vector(self._graph, value)]
        maps = [value for value in read if value not in vectors]
        origins = 0
        for value in maps:
            origins |= self._origins[value]
        aside = [value for value in vectors if not self._origins[value] & origins]
        return frozenset(aside if maps else ())

    def _leads_on(self, value: ir.Value) -> bool:
        if value.is_graph_output():
            return True
        return any(usage.node not in self._idle for usage in value.uses())

    def _knows(self, value: ir.Value) -> bool:
        return (value, None) in self._vertex

    def _add(self, point: Point, sources: Sequence[int]) -> int:
        self.points.append(point)
        self.sources.append(list(sources))
        vertex = len(self.points) - 1
        self._vertex[point.value, point.reader] = vertex
        return vertex

    def _add_tensor(self, value: ir.Value, sources: Sequence[int]) -> None:
        vertex = self._add(Point(value), sources)
        readers = list(dict.fromkeys(usage.node for usage in value.uses()))
        readers = [node for node in readers if node not in self._idle]
        if len(readers) + value.is_graph_output() > 1:
            for reader in readers:
                self._add(Point(value, reader), [vertex])

    def _entering(self, value: ir.Value, node: ir.Node) -> int:
        return self._vertex.get((value, node), self._vertex[value, None])


def _idle(graph: Graph) -> set[ir.Node]:
    """Nodes that lead none of their inputs' values to an output."""
    idle: set[ir.Node] = set()
    for node in reversed(graph.nodes()):
        used = any(
            value.is_graph_output() or any(usage.node not in idle for usage in value.uses())
            for value in node.outputs
        )
        if is_op(node, *_SHAPE_ONLY) or not used:
            idle.add(node)
    return idle


def _reversed(sources: Sequence[Sequence[int]]) -> list[list[int]]:
    """The same flow read backwards, its vertices numbered from the other end."""
    last = len(sources) - 1
    targets: list[list[int]] = [[] for _ in sources]
    for vertex, before in enumerate(sources):
        for source in before:
            targets[last - source].append(last - vertex)
    # What leads nowhere is taken to lead to the end.
    for vertex in range(1, last + 1):
        if not targets[vertex]:
            targets[vertex] = [0]
    return targets


def _immediate_dominators(sources: Sequence[Sequence[int]]) -> list[int]:
    """Immediate dominator of every vertex of an acyclic flow numbered in topological order.

    (Cooper, Harvey and Kennedy, A simple, fast dominance algorithm, 2001; one sweep suffices
    without cycles.)
    """
    found = [0] * len(sources)
    for vertex in range(1, len(sources)):
        common = sources[vertex][0]
        for other in sources[vertex][1:]:
            while common != other:
                if common > other:
                    common = found[common]
                else:
                    other = found[other]
        found[vertex] = common
    return found


def _dominates(one: int, other: int, dominators: Sequence[int]) -> bool:
    while other > one:
        other = dominators[other]
    return other == one


def _by_tensor(flow: _Flow, dominators: Sequence[int]) -> dict[ir.Value, ir.Value]:
    found: dict[ir.Value, ir.Value] = {}
    for vertex, point in enumerate(flow.points):
        before = flow.points[dominators[vertex]]
        if point is not None and point.reader is None and before is not None:
            found[point.value] = before.value
    return found


def _nested(flow: _Flow, following: dict[int, int]) -> list[FlowChain]:
    """Maximal chains, each with the step of another that holds it."""
    followed = set(following.values())
    starts = sorted(vertex for vertex in following if vertex not in followed)
    rows = []
    for start in starts:
        row = [start]
        while row[-1] in following:
            row.append(following[row[-1]])
        rows.append(row)
    # An outer chain's step starts no later than what it holds, and ends later.
    rows.sort(key=lambda row: (row[0], -row[-1]))
    chains: list[FlowChain] = []
    holder: dict[ir.Node, tuple[int, int]] = {}
    for row in rows:
        points = tuple(_point(flow, vertex) for vertex in row)
        steps = tuple(_between(flow, one, other) for one, other in pairwise(points))
        number = len(chains)
        parents = [holder[node] for node in steps[0] if node in holder] if steps else []
        chains.append(FlowChain(points, steps, parents[0] if parents else None))
        for index, step in enumerate(steps):
            holder.update(dict.fromkeys(step, (number, index)))
    return chains


def _point(flow: _Flow, vertex: int) -> Point:
    point = flow.points[vertex]
    assert point is not None
    return point


def _between(flow: _Flow, start: Point, end: Point) -> tuple[ir.Node, ...]:
    """The nodes that make the second point's tensor of the first's; none where it is the same."""
    if end.value is start.value:
        return ()
    found: set[ir.Node] = set()
    stack: list[ir.Value] = [end.value]
    while stack:
        value = stack.pop()
        node = value.producer()
        if value is start.value or node is None or node in found or node not in flow.order:
            continue
        found.add(node)
        aside = flow.side_inputs.get(node, frozenset())
        stack.extend(value for value in node.inputs if value is not None and value not in aside)
    return tuple(sorted(found, key=flow.order.__getitem__))

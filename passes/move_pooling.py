"""Average first, then convolve: pooling moves in front of pointwise linear operators.

The mean of W x + b over a window is W (mean of x) + b, as every weight of a mean is the same for
all channels and they sum to one. So a 1x1 convolution of stride 1 without padding, a
BatchNormalization or constants per channel run on the pooled pixels alone: 1 in place of h * w
behind a GlobalAveragePool, a quarter behind a 2x2 AveragePool of stride 2. The operators keep
their weights bit for bit; what stands behind the pool can then merge with what follows.

Global pools are GlobalAveragePool and ReduceMean over exactly the spatial axes. An AveragePool may
pad, where it averages over pixels of the image alone. The pool moves to where the
multiply-accumulates are fewest, those of pooling and of elementwise operators included; nothing
moves where a normalisation folds into its convolution at no cost.

Refused: larger kernels, strides and padding, whose windows are not single pixels; results that are
also read elsewhere or are outputs of the graph; an AveragePool that counts its padding, as zeros
have no bias; and moves that raise cost, as of a wide tensor behind a narrow convolution.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from graphfold.emit import Emitter
from graphfold.errors import NotExactError
from graphfold.graph import Graph, attribute, is_op, node_label, only_consumer
from graphfold.linear import (
    FLOAT_TYPES,
    PER_CHANNEL,
    Context,
    LinearOperator,
    linear_operator,
    variable_inputs,
)
from graphfold.maps import Steps
from graphfold.merge import put_in_place, segment_nodes
from graphfold.rewrite import Fold, Pass, Phase, Work, provenance, replaced_labels
from graphfold.runs import NOMINAL_SIZE
from graphfold.shapes import Dim

# What may stand in front of a pool: one tensor in, each pixel by itself.
_POINTWISE = ("Conv", *PER_CHANNEL, "Neg")
# A normalisation behind these becomes part of them.
_ABSORBING = ("Conv", "ConvTranspose")


@dataclass(frozen=True)
class _Step:
    """A pointwise linear operator in front of a pool."""

    node: ir.Node
    source: ir.Value
    operator: LinearOperator
    # Whether it becomes part of the convolution before it at no cost.
    folds: bool

    def cost(self, pixels: int) -> int:
        """Multiply-accumulates on so many pixels."""
        geometry = self.operator.geometry
        if is_op(self.node, "Conv"):
            return pixels * geometry.out_channels * geometry.in_channels // geometry.groups
        return pixels * geometry.out_channels


@dataclass(frozen=True)
class _Site:
    """A pool and the operators that go behind it, or why none does."""

    pool: ir.Node
    steps: tuple[_Step, ...]
    reason: str | None = None
    macs: tuple[int, int] | None = None


@dataclass(frozen=True)
class _Room:
    """Pixels per image before and behind a pool, and elements in its window."""

    before: int
    behind: int
    window: int


@dataclass(frozen=True)
class MovePooling(Pass):
    """Pools in front of the pointwise linear operators that they follow."""

    name: ClassVar[str] = "move_pooling"
    phase: ClassVar[Phase] = Phase.FOLD
    order: ClassVar[int] = 0

    def find(self, work: Work) -> Iterable[_Site]:
        """Every averaging pool that reads a convolution, normalisation or constants."""
        owned = segment_nodes(work)
        found = []
        for node in work.graph.nodes():
            if node not in owned and _averages(work.graph, node):
                site = _site(work.graph, node, owned)
                if site is not None:
                    found.append(site)
        return found

    def label(self, candidate: _Site) -> str:
        """The pool's output tensor."""
        return candidate.pool.outputs[0].name or ""

    def check(self, work: Work, candidate: _Site) -> str | None:
        """Refuse what is not equal or not cheaper."""
        del work
        return candidate.reason

    def rewrite(self, work: Work, candidate: _Site) -> Fold:
        """Pool what the first operator read, and run the operators on that."""
        graph, pool, steps = work.graph, candidate.pool, candidate.steps
        nodes = (*(step.node for step in steps), pool)
        metadata = provenance(nodes, self.name)
        emitter = Emitter(graph, pool, self.label(candidate), metadata)
        sizes = _sizes_behind(graph, pool)
        pooled = _copy(emitter, pool, pool.inputs[0], graph.current(steps[0].source), sizes)
        value = pooled
        for step in steps:
            value = _copy(emitter, step.node, graph.current(step.source), value, sizes)
        if not attribute(pool, "keepdims", 1):
            made = pooled.producer()
            assert made is not None
            made.attributes["keepdims"] = ir.AttrInt64("keepdims", 1)
            value = emitter.node("Flatten", [value], axis=1)
        rank = len(steps[0].operator.geometry.axes)
        fold = Fold(
            output=self.label(candidate),
            replaces=replaced_labels(metadata),
            kernel=(1,) * rank,
            strides=(1,) * rank,
            groups=steps[-1].operator.geometry.groups if len(steps) == 1 else 1,
            boundary="exact",
            repair=None,
            reach=((0, 0),) * rank if attribute(pool, "keepdims", 1) else (),
            pass_name=self.name,
            macs=candidate.macs,
            input=pooled.name,
        )
        affine = Steps(tuple(step.operator.build() for step in steps))
        return put_in_place(work, nodes, pool.outputs[0], value, fold, affine)


# --- finding ----------------------------------------------------------------------------------


def _averages(graph: Graph, node: ir.Node) -> bool:
    """Whether a node is an average over windows, or over exactly the spatial axes."""
    if is_op(node, "GlobalAveragePool", "AveragePool"):
        return True
    if not is_op(node, "ReduceMean"):
        return False
    shape = graph.shape(node.inputs[0])
    axes = attribute(node, "axes")
    if len(node.inputs) > 1 and node.inputs[1] is not None:
        axes = graph.constant(node.inputs[1])
    if shape is None or axes is None:
        return False
    rank = len(shape)
    spatial = list(range(2, rank))
    return rank > 2 and sorted(int(axis) % rank for axis in axes) == spatial


def _site(graph: Graph, pool: ir.Node, owned: set[ir.Node]) -> _Site | None:
    """Where a pool moves to; None where nothing before it is of interest."""
    value = pool.inputs[0]
    if value is None or graph.dtype(value) not in FLOAT_TYPES:
        return None
    steps, reason = _steps_before(graph, pool, owned)
    if not steps:
        asks = is_op(value.producer(), "Conv") and reason is not None
        return _Site(pool, (), reason) if asks else None
    counted = _counts_padding(pool)
    if counted is not None:
        return _Site(pool, (), counted)
    room = _room(graph, pool, steps[0].operator.geometry.rank)
    if room is None:
        return None
    costs = [_cost(steps, start, room) for start in range(len(steps) + 1)]
    # Of equal ones the last: what need not move stays.
    start = max(range(len(costs)), key=lambda at: (-costs[at], at))
    if start == len(steps):
        if not any(is_op(step.node, "Conv") for step in steps):
            return None
        figures = f"{costs[-1]:,} to {min(costs[:-1]):,} operations per image"
        return _Site(pool, (), f"moving the pool raises cost: {figures}")
    moved = [step for step in steps[start:] if is_op(step.node, "Conv")]
    macs = None
    if _is_fixed(graph, steps[start].source) and _is_fixed(graph, pool.outputs[0]):
        before, behind = (sum(s.cost(n) for s in moved) for n in (room.before, room.behind))
        macs = before, behind
    return _Site(pool, tuple(steps[start:]), None, macs)


def _steps_before(
    graph: Graph, pool: ir.Node, owned: set[ir.Node]
) -> tuple[list[_Step], str | None]:
    """The operators that lead to a pool alone, in execution order, and what ends them."""
    nodes: list[tuple[ir.Node, ir.Value, LinearOperator]] = []
    reader, reason = pool, None
    value: ir.Value | None = pool.inputs[0]
    while value is not None:
        node = value.producer()
        if node is None or node in owned or not is_op(node, *_POINTWISE):
            break
        if only_consumer(value) is not reader or reader.graph is not node.graph:
            reason = f"{value.name!r} is also read elsewhere"
            if value.is_graph_output():
                reason = f"{value.name!r} is an output of the graph"
            break
        try:
            source, operator = _pointwise(graph, node)
        except NotExactError as error:
            reason = error.what
            break
        nodes.append((node, source, operator))
        reader, value = node, source
    before = None if value is None else value.producer()
    absorbs = is_op(before, *_ABSORBING) and only_consumer(value) is reader if value else False
    steps = []
    for node, source, operator in nodes[::-1]:
        folds = absorbs and is_op(node, *PER_CHANNEL)
        absorbs = folds or is_op(node, "Conv")
        steps.append(_Step(node, source, operator, folds))
    return steps, reason


def _pointwise(graph: Graph, node: ir.Node) -> tuple[ir.Value, LinearOperator]:
    """What an operator reads, and its meaning; raises NotExactError where it is not pointwise."""
    sources = variable_inputs(graph, node)
    shape = graph.shape(sources[0]) if len(sources) == 1 else None
    if shape is None or len(shape) < 3 or not isinstance(shape[1], int):
        raise NotExactError(f"{node_label(node)!r} does not read one tensor of known channels")
    context = Context(graph, len(shape) - 2, shape[1], graph.sizes(sources[0]) or ())
    operator = linear_operator(node, context)
    for axis in operator.geometry.axes:
        if axis.kernel > 1:
            raise NotExactError(f"the windows of {node_label(node)!r} are larger than a pixel")
        if axis.stride > 1 or axis.begin or axis.end:
            raise NotExactError(f"{node_label(node)!r} has strides or padding")
    return sources[0], operator


def _counts_padding(pool: ir.Node) -> str | None:
    """Why some windows may average over zeros that no pixel holds, None where none does."""
    if not is_op(pool, "AveragePool") or not attribute(pool, "count_include_pad", 0):
        return None
    pads = any(attribute(pool, "pads") or ()) or "SAME" in attribute(pool, "auto_pad", "NOTSET")
    if pads or attribute(pool, "ceil_mode", 0):
        return f"{node_label(pool)!r} counts its padding, which has no bias"
    return None


# --- cost -------------------------------------------------------------------------------------


def _cost(steps: Sequence[_Step], start: int, room: _Room) -> int:
    """Operations of all steps with the pool in front of number `start`."""
    channels = [steps[0].operator.geometry.in_channels]
    channels += [step.operator.geometry.out_channels for step in steps]
    total = channels[start] * room.behind * room.window
    for number, step in enumerate(steps):
        # In front of the pool's place it folds no more.
        if not step.folds or number == start:
            total += step.cost(room.before if number < start else room.behind)
    return total


def _room(graph: Graph, pool: ir.Node, rank: int) -> _Room | None:
    """Pixels that a pool reads and makes; nominal ones where sizes are not fixed."""
    sizes = [NOMINAL_SIZE if n is None else n for n in graph.sizes(pool.inputs[0]) or ()]
    if len(sizes) != rank:
        return None
    before = math.prod(sizes)
    if not is_op(pool, "AveragePool"):
        return _Room(before, 1, before)
    kernel = attribute(pool, "kernel_shape")
    behind = graph.sizes(pool.outputs[0])
    if behind is None or None in behind:
        strides = attribute(pool, "strides") or (1,) * rank
        pairs = zip(sizes, kernel, strides, strict=True)
        behind = tuple(max(1, (size - window) // stride + 1) for size, window, stride in pairs)
    known = [size for size in behind if size is not None]
    return _Room(before, math.prod(known), math.prod(kernel))


def _is_fixed(graph: Graph, value: ir.Value) -> bool:
    shape = graph.shape(value)
    return shape is not None and all(isinstance(size, int) for size in shape[2:])


# --- emitting ---------------------------------------------------------------------------------


def _sizes_behind(graph: Graph, pool: ir.Node) -> tuple[Dim, ...] | None:
    """Spatial sizes behind a pool where its axes are kept."""
    shape = graph.shape(pool.inputs[0])
    if shape is not None and not is_op(pool, "AveragePool"):
        return (1,) * (len(shape) - 2)
    behind = graph.shape(pool.outputs[0])
    return None if behind is None else behind[2:]


def _copy(
    emitter: Emitter,
    node: ir.Node,
    source: ir.Value | None,
    instead: ir.Value,
    sizes: tuple[Dim, ...] | None,
) -> ir.Value:
    """The same operator on another tensor, which has the spatial sizes of the result."""
    graph = emitter.graph
    inputs = [instead if value is source else value for value in node.inputs]
    result = emitter.node(node.op_type, inputs)
    made = result.producer()
    assert made is not None
    made.attributes.update(node.attributes)
    shape = graph.shape(instead)
    channels = graph.channels(node.outputs[0] if is_op(node, "Conv") else instead)
    if shape is not None and sizes is not None and result.name is not None:
        graph.shapes[result.name] = (shape[0], channels, *sizes)
    return result

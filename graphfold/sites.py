"""Activation sites, gates and convolution sites, recognised by structure alone.

An activation site is the smallest single-input single-output elementwise subgraph that is an
activation: one node, or several that join again (SiLU, hard-swish, decomposed PReLU). What it
computes is read off its values, so every spelling of a function has one name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from graphfold.errors import NotExactError
from graphfold.graph import (
    Graph,
    attribute,
    consumers,
    is_op,
    node_label,
    only_consumer,
    topological_between,
)
from graphfold.linear import (
    PER_CHANNEL,
    Context,
    conv_axes,
    linear_operator,
    variable_inputs,
    zero_padding,
)

ACTIVATIONS = frozenset(
    {
        "Relu", "LeakyRelu", "PRelu", "Clip", "Sigmoid", "HardSigmoid", "HardSwish", "Tanh",
        "Elu", "Selu", "Celu", "Softplus", "Softsign", "ThresholdedRelu", "Mish", "Gelu", "Swish",
    }
)  # fmt: skip
_CURVED = frozenset({"Abs", "Exp", "Log", "Sqrt", "Pow", "Erf", "Min", "Max", "Reciprocal"})
_ARITHMETIC = frozenset({"Add", "Sub", "Mul", "Div", "Neg", "Identity"})
_ELEMENTWISE = ACTIVATIONS | _CURVED | _ARITHMETIC
_JOINING = frozenset({"Add", "Sub", "Mul", "Div", "Min", "Max"})
_GLOBAL_POOLS = frozenset({"GlobalAveragePool", "GlobalMaxPool", "ReduceMean", "ReduceMax"})
# The longest activation in use (tanh-GELU) has nine nodes.
_LONGEST_ACTIVATION = 16


@dataclass(frozen=True)
class ActivationSite:
    """One activation: the tensor it reads, the tensor it is named by, what it computes."""

    input: ir.Value
    output: ir.Value
    kind: str
    nodes: tuple[ir.Node, ...]

    @property
    def name(self) -> str:
        """The site's name: its last output tensor."""
        return self.output.name or ""


@dataclass(frozen=True)
class Gate:
    """A multiplication by something computed from the pooled tensor (squeeze-and-excite)."""

    output: ir.Value
    nodes: tuple[ir.Node, ...]


@dataclass(frozen=True)
class ConvSite:
    """A Conv with the normalisation that only it feeds and the Pad that only it reads.

    Attributes:
        conv: the Conv node; its output tensor names the site.
        input, output: what enters and leaves the whole site.
        nodes: Pad, Conv, BatchNormalization and constants, in execution order.
        removable: input and output have the same shape, so y = x may replace it.
        reason: why it is not removable, None where it is.
    """

    conv: ir.Node
    input: ir.Value
    output: ir.Value
    nodes: tuple[ir.Node, ...]
    removable: bool
    reason: str | None
    kernel: tuple[int, ...]
    groups: int
    in_channels: int
    out_channels: int

    @property
    def name(self) -> str:
        """The site's name: the Conv's output tensor."""
        return self.conv.outputs[0].name or ""

    @property
    def pointwise(self) -> bool:
        """A dense convolution of kernel 1."""
        return self.groups == 1 and all(size == 1 for size in self.kernel)

    @property
    def depthwise(self) -> bool:
        """One filter per channel."""
        return self.groups == self.in_channels == self.out_channels and self.groups > 1


@dataclass(frozen=True)
class Sites:
    """All sites of a graph, and which nodes they own."""

    activations: tuple[ActivationSite, ...]
    gates: tuple[Gate, ...]
    convs: tuple[ConvSite, ...]
    order: dict[ir.Node, int]

    def activation_after(self, value: ir.Value) -> ActivationSite | None:
        """The activation site that reads this tensor, if it is the tensor's only reader."""
        for site in self.activations:
            if site.input is value:
                return site
        return None


def find_sites(graph: Graph) -> Sites:
    """Find every activation site, gate and conv site of the main graph, in execution order."""
    order = {node: index for index, node in enumerate(graph.ir)}
    gates = tuple(_find_gates(graph, order))
    gated = {node for gate in gates for node in gate.nodes}
    activations = _find_activations(graph, order, gated)
    owned = {node for site in activations for node in site.nodes}
    convs = tuple(
        _conv_site(graph, node, owned)
        for node in graph.ir
        if is_op(node, "Conv") and _has_kernel(graph, node.inputs[1])
    )
    return Sites(tuple(activations), gates, convs, order)


def _has_kernel(graph: Graph, weight: ir.Value | None) -> bool:
    shape = graph.shape(weight)
    if shape is None or len(shape) < 3 or not all(isinstance(size, int) for size in shape):
        return False
    return graph.is_constant(weight)


# --- activations ------------------------------------------------------------------------------


def _find_activations(
    graph: Graph, order: dict[ir.Node, int], gated: set[ir.Node]
) -> list[ActivationSite]:
    owner: dict[ir.Node, tuple[ir.Value, tuple[ir.Node, ...]]] = {}
    for node in order:
        if node in gated:
            continue
        found = _joined_activation(graph, node, order)
        if found is None and is_op(node, *ACTIVATIONS) and len(variable_inputs(graph, node)) == 1:
            found = (variable_inputs(graph, node)[0], (node,))
        if found is None or any(member in gated for member in found[1]):
            continue
        # A later join that holds earlier sites is the larger activation they are parts of.
        for member in found[1]:
            owner[member] = found
    unique = dict.fromkeys(owner.values())
    sites = [
        ActivationSite(source, nodes[-1].outputs[0], activation_kind(graph, source, nodes), nodes)
        for source, nodes in unique
        if all(owner[member] == (source, nodes) for member in nodes)
    ]
    return sorted(sites, key=lambda site: order[site.nodes[0]])


def _joined_activation(
    graph: Graph, join: ir.Node, order: dict[ir.Node, int]
) -> tuple[ir.Value, tuple[ir.Node, ...]] | None:
    """The elementwise subgraph that ends in `join` and starts at one tensor, if there is one."""
    if not is_op(join, *_JOINING) or len(variable_inputs(graph, join)) < 2:
        return None
    members = {join}
    frontier = set(variable_inputs(graph, join))
    while len(frontier) > 1:
        latest = max(frontier, key=lambda value: _position(value, order))
        producer = latest.producer()
        if producer is None or not is_op(producer, *_ELEMENTWISE):
            return None
        members.add(producer)
        if len(members) > _LONGEST_ACTIVATION:
            return None
        frontier.remove(latest)
        frontier.update(variable_inputs(graph, producer))
    (source,) = frontier
    nodes = tuple(sorted(members, key=order.__getitem__))
    if not _is_closed(nodes) or not _is_curved(graph, nodes):
        return None
    return source, _with_normalising_scale(graph, source, nodes)


def _position(value: ir.Value, order: dict[ir.Node, int]) -> int:
    producer = value.producer()
    return -1 if producer is None else order.get(producer, -1)


def _is_closed(nodes: Sequence[ir.Node]) -> bool:
    """Nothing but the last node's output leaves."""
    inside = set(nodes)
    for node in nodes[:-1]:
        value = node.outputs[0]
        if value.is_graph_output() or any(reader not in inside for reader in consumers(value)):
            return False
    return True


def _is_curved(graph: Graph, nodes: Iterable[ir.Node]) -> bool:
    return any(
        is_op(node, *ACTIVATIONS, *_CURVED)
        or (is_op(node, "Mul", "Div") and len(variable_inputs(graph, node)) > 1)
        for node in nodes
    )


def _with_normalising_scale(
    graph: Graph, source: ir.Value, nodes: tuple[ir.Node, ...]
) -> tuple[ir.Node, ...]:
    """Include the scalar factor behind a gate that makes its slope at infinity one.

    x * clip(x + 3, 0, 6) is hard-swish only after the division by 6; removing the site must
    leave x, not x / 6.
    """
    follower = only_consumer(nodes[-1].outputs[0])
    if follower is None or follower.graph is not graph.ir or not is_op(follower, "Mul", "Div"):
        return nodes
    constants = [graph.constant(value) for value in follower.inputs]
    if not any(constant is not None and constant.size == 1 for constant in constants):
        return nodes
    longer = (*nodes, follower)
    before, after = _slope(graph, source, nodes), _slope(graph, source, longer)
    if before is None or after is None or abs(before - 1) < 1e-2 or abs(after - 1) > 1e-2:
        return nodes
    return longer


def _slope(graph: Graph, source: ir.Value, nodes: Sequence[ir.Node]) -> float | None:
    far = 1e3
    values = evaluate_activation(graph, source, nodes, np.array([far]))
    return None if values is None else float(np.mean(values)) / far


_POINTS = np.linspace(-8.0, 8.0, 161)


def _sigmoid(x: NDArray[Any]) -> NDArray[Any]:
    return np.asarray(1.0 / (1.0 + np.exp(-x)))


def _erf(x: NDArray[Any]) -> NDArray[Any]:
    from scipy.special import erf

    values: NDArray[Any] = erf(x)
    return values


_KNOWN: dict[str, Callable[[Any], Any]] = {
    "Relu": lambda x: np.maximum(x, 0),
    "Relu6": lambda x: np.clip(x, 0, 6),
    "SiLU": lambda x: x * _sigmoid(x),
    "HardSwish": lambda x: x * np.clip(x + 3, 0, 6) / 6,
    "Mish": lambda x: x * np.tanh(np.log1p(np.exp(x))),
    "GELU": lambda x: 0.5 * x * (1 + _erf(x / np.sqrt(2))),
    "Sigmoid": _sigmoid,
}


def activation_kind(graph: Graph, source: ir.Value, nodes: Sequence[ir.Node]) -> str:
    """The common name of what a site computes, from its values; else its operators' names."""
    spelled = "+".join(node.op_type for node in nodes)
    values = evaluate_activation(graph, source, nodes, _POINTS)
    if values is not None and values.shape == _POINTS.shape:
        for name, function in _KNOWN.items():
            if np.allclose(values, function(_POINTS), atol=1e-3):
                return name
    if len(nodes) > 1 and "Relu" in spelled and _is_two_lines(graph, source, nodes):
        return "PReLU"
    return spelled


def _is_two_lines(graph: Graph, source: ir.Value, nodes: Sequence[ir.Node]) -> bool:
    """Linear on each side of zero, slope one on the right: a PReLU however spelled."""
    ends = [evaluate_activation(graph, source, nodes, np.array([at])) for at in (-2.0, -1.0, 3.0)]
    if any(end is None for end in ends):
        return False
    two, one, right = (np.asarray(end) for end in ends)
    return bool(np.allclose(two, 2 * one, atol=1e-5) and np.allclose(right, 3.0, atol=1e-5))


def _clip(node: ir.Node, x: NDArray[Any], args: list[NDArray[Any] | None]) -> NDArray[Any] | None:
    low = args[1] if len(args) > 1 else attribute(node, "min")
    high = args[2] if len(args) > 2 else attribute(node, "max")
    if any(np.size(bound) > 1 for bound in (low, high) if bound is not None):
        return None
    return np.asarray(np.clip(x, -np.inf if low is None else low, np.inf if high is None else high))


_UNARY: dict[str, Callable[[Any], Any]] = {
    "Relu": lambda x: np.maximum(x, 0),
    "Sigmoid": _sigmoid,
    "Tanh": np.tanh,
    "Exp": np.exp,
    "Log": np.log,
    "Sqrt": np.sqrt,
    "Abs": np.abs,
    "Neg": np.negative,
    "Erf": _erf,
    "Identity": lambda x: x,
    "Reciprocal": np.reciprocal,
    "Softplus": lambda x: np.logaddexp(x, 0),
    "HardSwish": _KNOWN["HardSwish"],
    "Mish": _KNOWN["Mish"],
}
_BINARY: dict[str, Callable[[Any, Any], Any]] = {
    "Add": np.add,
    "Sub": np.subtract,
    "Mul": np.multiply,
    "Div": np.divide,
    "Pow": np.power,
    "Min": np.minimum,
    "Max": np.maximum,
}


def evaluate_activation(
    graph: Graph, source: ir.Value, nodes: Sequence[ir.Node], points: NDArray[Any]
) -> NDArray[Any] | None:
    """Values of a site at these points, in float64; None where an operator has no rule here."""
    values: dict[ir.Value, Any] = {source: points.astype(np.float64)}
    with np.errstate(all="ignore"):
        for node in nodes:
            args = [
                None if value is None else values.get(value, graph.constant(value))
                for value in node.inputs
            ]
            result = _evaluate_node(node, args)
            if result is None:
                return None
            values[node.outputs[0]] = result
    last: NDArray[Any] = values[nodes[-1].outputs[0]]
    return last


def _evaluate_node(node: ir.Node, args: list[Any]) -> NDArray[Any] | None:
    if args[0] is None:
        return None
    if node.op_type in _UNARY:
        return np.asarray(_UNARY[node.op_type](args[0]))
    if node.op_type in _BINARY and len(args) == 2 and args[1] is not None:
        return _evaluate_binary(node, args)
    if node.op_type == "Clip":
        return _clip(node, args[0], args)
    if node.op_type == "HardSigmoid":
        alpha, beta = attribute(node, "alpha", 0.2), attribute(node, "beta", 0.5)
        return np.asarray(np.clip(alpha * args[0] + beta, 0, 1))
    return None


def _evaluate_binary(node: ir.Node, args: list[Any]) -> NDArray[Any] | None:
    try:
        return np.asarray(_BINARY[node.op_type](*args))
    except ValueError:
        # Per-channel constants do not broadcast with many points at once.
        return None


# --- gates ------------------------------------------------------------------------------------


def _find_gates(graph: Graph, order: dict[ir.Node, int]) -> Iterable[Gate]:
    """Mul(x, g) where g is computed from x through a global pool."""
    pooled = _depends_on_pool(graph, order)
    for node in order:
        if not is_op(node, "Mul"):
            continue
        sources = variable_inputs(graph, node)
        if len(sources) != 2:
            continue
        for scaled, gate in (sources, sources[::-1]):
            if gate in pooled and pooled[gate] is scaled:
                members = topological_between(scaled, node.outputs[0], order)
                yield Gate(node.outputs[0], tuple(members))


def _depends_on_pool(graph: Graph, order: dict[ir.Node, int]) -> dict[ir.Value, ir.Value]:
    """Tensors computed from one global pool alone, with the tensor that was pooled."""
    origin: dict[ir.Value, ir.Value] = {}
    for node in order:
        sources = variable_inputs(graph, node)
        if not sources or not node.outputs:
            continue
        if is_op(node, *_GLOBAL_POOLS) and sources[0] not in origin:
            origin[node.outputs[0]] = sources[0]
            continue
        origins = {origin.get(source) for source in sources}
        if len(origins) == 1 and (common := origins.pop()) is not None:
            origin[node.outputs[0]] = common
    return origin


# --- convolutions -----------------------------------------------------------------------------


def _conv_site(graph: Graph, conv: ir.Node, owned: set[ir.Node]) -> ConvSite:
    nodes = [conv]
    source = conv.inputs[0]
    assert source is not None
    pads: list[tuple[int, int]] | None = None
    pad = source.producer()
    kernel, width = _weight_shape(graph, conv)
    if is_op(pad, "Pad") and pad is not None and only_consumer(source) is conv:
        try:
            pads = zero_padding(pad, graph, len(kernel) + 2)
        except NotExactError:
            pads = None
        if pads is not None and pad.inputs[0] is not None:
            nodes.insert(0, pad)
            source = pad.inputs[0]
    groups = attribute(conv, "group", 1)
    out_channels = _out_channels(graph, conv)
    output = _extend_with_constants(graph, conv, nodes, out_channels, owned)
    reason = _why_not_removable(graph, conv, kernel, pads, width * groups, out_channels)
    return ConvSite(
        conv, source, output, tuple(nodes), reason is None, reason,
        tuple(kernel), groups, width * groups, out_channels,
    )  # fmt: skip


def _weight_shape(graph: Graph, conv: ir.Node) -> tuple[tuple[int, ...], int]:
    shape = graph.shape(conv.inputs[1])
    assert shape is not None
    sizes = tuple(int(size) for size in shape if isinstance(size, int))
    return sizes[2:], sizes[1]


def _out_channels(graph: Graph, conv: ir.Node) -> int:
    shape = graph.shape(conv.inputs[1])
    assert shape is not None
    assert isinstance(shape[0], int)
    return shape[0]


def _extend_with_constants(
    graph: Graph, conv: ir.Node, nodes: list[ir.Node], channels: int, owned: set[ir.Node]
) -> ir.Value:
    """Follow BatchNormalization and per-channel constants that only this conv feeds."""
    output = conv.outputs[0]
    rank = len(_weight_shape(graph, conv)[0])
    while True:
        follower = only_consumer(output)
        if follower is None or follower in owned or follower.graph is not graph.ir:
            return output
        if not is_op(follower, *PER_CHANNEL):
            return output
        if len(variable_inputs(graph, follower)) != 1:
            return output
        try:
            linear_operator(follower, Context(graph, rank, channels, (None,) * rank))
        except NotExactError:
            return output
        nodes.append(follower)
        output = follower.outputs[0]


def _why_not_removable(
    graph: Graph,
    conv: ir.Node,
    kernel: Sequence[int],
    pads: list[tuple[int, int]] | None,
    in_channels: int,
    out_channels: int,
) -> str | None:
    if in_channels != out_channels:
        return f"it maps {in_channels} to {out_channels} channels"
    try:
        axes = conv_axes(conv, kernel, graph.sizes(conv.inputs[0]) or (None,) * len(kernel))
    except NotExactError as error:
        return error.what
    for axis, (begin, end) in zip(axes, pads or [(0, 0)] * len(kernel), strict=True):
        if axis.stride != 1:
            return f"its stride is {axis.stride}"
        if axis.begin + axis.end + begin + end != axis.extent - 1:
            return f"its output is smaller or larger than its input ({node_label(conv)})"
    return None

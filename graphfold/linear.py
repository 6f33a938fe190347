"""From graph nodes to affine convolutions: which operators are linear, and what each means.

One table, `OPERATORS`, maps an ONNX operator to its linear semantics; a new linear operator is
one function there. A `LinearOperator` knows its geometry at once and builds its numbers only when
asked, so that costs and refusals need no weights. `graphfold.regions` evaluates whole regions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from graphfold.affine import AffineConv, identity, scale_shift, stack, zero_pad
from graphfold.errors import NotExactError
from graphfold.geometry import Axis, Geometry
from graphfold.graph import (
    Graph,
    attribute,
    consumers,
    has_reference_attributes,
    is_op,
    node_label,
)

FLOAT_TYPES = frozenset(
    {ir.DataType.FLOAT, ir.DataType.DOUBLE, ir.DataType.FLOAT16, ir.DataType.BFLOAT16}
)
DEFAULT_EPSILON = 1e-5
OVERFLOWING = 1e30
# No network has it; the algebra looks at padding row by row.
_LARGEST_WINDOW = 1 << 14
# Operators that fold into the convolution before them where their constants are per channel.
PER_CHANNEL = ("BatchNormalization", "Add", "Sub", "Mul", "Div", "Neg")


@dataclass(frozen=True)
class LinearOperator:
    """One single-input linear node: its geometry, and its numbers when asked for."""

    geometry: Geometry
    build: Callable[[], AffineConv]


@dataclass(frozen=True)
class Context:
    """What an operator may need to know of the tensor it reads."""

    graph: Graph
    rank: int
    channels: int
    sizes: tuple[int | None, ...]


Handler = Callable[[ir.Node, Context], LinearOperator]


def linear_operator(node: ir.Node, context: Context) -> LinearOperator:
    """The linear meaning of a node that reads one tensor that is not constant.

    Raises:
        NotExactError: the node is not linear, or not in a way that is supported; says why.
    """
    handler = OPERATORS.get(node.op_type) if is_op(node, node.op_type) else None
    if handler is None:
        raise NotExactError(f"{node.op_type} {node_label(node)!r} is not a linear operator")
    if has_reference_attributes(node):
        raise NotExactError(f"{node_label(node)!r} has attributes of its enclosing function")
    operator = handler(node, context)
    if any(axis.is_beyond(_LARGEST_WINDOW) for axis in operator.geometry.axes):
        raise NotExactError(f"the window or padding of {node_label(node)!r} is absurdly large")
    return operator


def check_read_once(value: ir.Value, reader: ir.Node) -> None:
    """Raise NotExactError where something besides `reader` needs a tensor."""
    if value.is_graph_output():
        raise NotExactError(f"{value.name!r} is an output of the graph")
    others = [other for other in consumers(value) if other is not reader]
    if others:
        raise NotExactError(f"{value.name!r} is also read by {node_label(others[0])!r}")


def variable_inputs(graph: Graph, node: ir.Node) -> list[ir.Value]:
    """The inputs of a node that are not constants, in order, repeated ones repeated."""
    return [value for value in node.inputs if value is not None and not graph.is_constant(value)]


# --- single-input operators -------------------------------------------------------------------


def _conv(node: ir.Node, context: Context) -> LinearOperator:
    graph = context.graph
    weight_value = node.inputs[1]
    weight_shape = conv_weight_shape(node, graph)
    axes = conv_axes(node, weight_shape[2:], context.sizes)
    groups = attribute(node, "group", 1)
    bias = _optional_vector(node, 2, graph, weight_shape[0])
    geometry = Geometry(
        axes, weight_shape[1] * groups, weight_shape[0], groups, biased=bool(np.any(bias))
    )

    def build() -> AffineConv:
        return AffineConv(_float64(graph, weight_value, node), bias, axes, groups)

    return LinearOperator(geometry, build)


def conv_weight_shape(node: ir.Node, graph: Graph) -> tuple[int, ...]:
    """Shape [O, I / groups, *kernel] of a Conv's weight.

    Raises:
        NotExactError: it is not a constant, or does not fit the node's attributes.
    """
    if not graph.is_constant(node.inputs[1]):
        raise NotExactError(f"the weight of {node_label(node)!r} is not a constant")
    shape = constant_shape(graph, node.inputs[1])
    groups = attribute(node, "group", 1)
    if len(shape) < 3:
        raise NotExactError(f"the weight of {node_label(node)!r} has {len(shape)} axes")
    if groups < 1 or shape[0] % groups or shape[1] < 1:
        raise NotExactError(f"{node_label(node)!r} has {groups} groups, which its weights have not")
    check_window(node, shape[2:])
    return shape


def check_window(node: ir.Node, kernel: Sequence[int]) -> None:
    """Raise NotExactError where a node's strides, dilations or pads are not those of its kernel."""
    rank = len(kernel)
    strides = attribute(node, "strides") or [1] * rank
    dilations = attribute(node, "dilations") or [1] * rank
    pads = attribute(node, "pads") or [0] * (2 * rank)
    counts = (len(strides), len(dilations), len(pads))
    if counts != (rank, rank, 2 * rank) or min(*kernel, *strides, *dilations) < 1:
        raise NotExactError(f"the window of {node_label(node)!r} is not one of {rank} axes")
    stated = attribute(node, "kernel_shape")
    if stated is not None and tuple(stated) != tuple(kernel):
        raise NotExactError(f"the kernel_shape of {node_label(node)!r} is not that of its weights")


def conv_axes(
    node: ir.Node, kernel: Sequence[int], sizes: Sequence[int | None]
) -> tuple[Axis, ...]:
    """Stride, dilation and padding of a Conv or pool, `auto_pad` resolved.

    Raises:
        NotExactError: "same" padding depends on a size that is not fixed.
    """
    rank = len(kernel)
    strides = attribute(node, "strides") or [1] * rank
    dilations = attribute(node, "dilations") or [1] * rank
    pads = attribute(node, "pads") or [0] * (2 * rank)
    auto_pad = attribute(node, "auto_pad", "NOTSET")
    check_window(node, kernel)
    axes = []
    for number in range(rank):
        axis = Axis(kernel[number], strides[number], dilations[number])
        begin, end = pads[number], pads[number + rank]
        if auto_pad in ("SAME_UPPER", "SAME_LOWER"):
            begin, end = _same_padding(axis, sizes[number], auto_pad, node)
        elif auto_pad == "VALID":
            begin, end = 0, 0
        axes.append(Axis(axis.kernel, axis.stride, axis.dilation, begin, end))
    return tuple(axes)


def _same_padding(axis: Axis, size: int | None, auto_pad: str, node: ir.Node) -> tuple[int, int]:
    if axis.stride == 1:
        total = axis.extent - 1
    elif size is None:
        raise NotExactError(
            f"{auto_pad} of {node_label(node)!r} with stride {axis.stride} depends on a size "
            "that is not fixed"
        )
    else:
        outputs = -(-size // axis.stride)
        total = max(0, (outputs - 1) * axis.stride + axis.extent - size)
    small, large = total // 2, total - total // 2
    return (small, large) if auto_pad == "SAME_UPPER" else (large, small)


def _batch_normalization(node: ir.Node, context: Context) -> LinearOperator:
    # Before opset 14 the mere presence of further outputs selects training mode.
    trains = attribute(node, "training_mode", 0) or any(output.name for output in node.outputs[1:])
    if trains or _trains_by_default(node, context):
        raise NotExactError(f"{node_label(node)!r} normalises in training mode")
    if attribute(node, "spatial", 1) != 1:
        raise NotExactError(f"{node_label(node)!r} normalises per pixel (spatial=0)")
    vectors = [_vector(node, index, context.graph, context.channels) for index in range(1, 5)]
    gamma, beta, mean, variance = vectors
    scale = gamma / np.sqrt(variance + attribute(node, "epsilon", DEFAULT_EPSILON))
    return _per_channel(scale, beta - mean * scale, context)


def _trains_by_default(node: ir.Node, context: Context) -> bool:
    """Before opset 7 BatchNormalization and Dropout train unless `is_test` is set."""
    return context.graph.opset < 7 and not attribute(node, "is_test", 0)


def _add(node: ir.Node, context: Context) -> LinearOperator:
    shift = _channel_constant(node, _constant_index(node, context), context)
    return _per_channel(np.ones(context.channels), shift, context)


def _sub(node: ir.Node, context: Context) -> LinearOperator:
    index = _constant_index(node, context)
    constant = _channel_constant(node, index, context)
    sign = 1.0 if index == 1 else -1.0
    return _per_channel(np.full(context.channels, sign), -sign * constant, context)


def _mul(node: ir.Node, context: Context) -> LinearOperator:
    scale = _channel_constant(node, _constant_index(node, context), context)
    return _per_channel(scale, np.zeros(context.channels), context)


def _div(node: ir.Node, context: Context) -> LinearOperator:
    if _constant_index(node, context) != 1:
        raise NotExactError(f"{node_label(node)!r} divides a constant by a tensor")
    divisor = _channel_constant(node, 1, context)
    if not np.all(divisor):
        raise NotExactError(f"{node_label(node)!r} divides by zero")
    return _per_channel(1.0 / divisor, np.zeros(context.channels), context)


def _neg(node: ir.Node, context: Context) -> LinearOperator:
    del node
    return _per_channel(-np.ones(context.channels), np.zeros(context.channels), context)


def _identity(node: ir.Node, context: Context) -> LinearOperator:
    del node
    return _known(identity(context.channels, context.rank))


def _dropout(node: ir.Node, context: Context) -> LinearOperator:
    if any(output.uses() or output.is_graph_output() for output in node.outputs[1:]):
        raise NotExactError(f"the mask of {node_label(node)!r} is used")
    if _trains_by_default(node, context):
        raise NotExactError(f"{node_label(node)!r} may run in training mode")
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        training = context.graph.constant(node.inputs[2])
        if training is None or bool(np.any(training)):
            raise NotExactError(f"{node_label(node)!r} may run in training mode")
    return _identity(node, context)


def _pad(node: ir.Node, context: Context) -> LinearOperator:
    pads = zero_padding(node, context.graph, context.rank + 2)
    return _known(zero_pad(context.channels, pads))


def zero_padding(node: ir.Node, graph: Graph, rank: int) -> list[tuple[int, int]]:
    """Begin and end padding per spatial axis of a Pad node on a tensor of `rank` dimensions.

    Raises:
        NotExactError: the padding is not zero, not spatial, or not a constant.
    """
    label = node_label(node)
    if attribute(node, "mode", "constant") != "constant":
        raise NotExactError(
            f"Pad {label!r} does not pad with zeros ({node.attributes['mode'].value})"
        )
    value = _pad_value(node, graph)
    if value is None or np.any(np.asarray(value)):
        raise NotExactError(f"Pad {label!r} pads with a value other than zero")
    amounts = _pad_amounts(node, graph)
    if amounts is None:
        raise NotExactError(f"the amounts of Pad {label!r} are not constant")
    axes = _pad_axes(node, graph, rank)
    if len(amounts) != 2 * len(axes):
        raise NotExactError(f"Pad {label!r} has {len(amounts)} amounts for {len(axes)} axes")
    begins, ends = [0] * rank, [0] * rank
    for position, axis in enumerate(axes):
        begins[axis], ends[axis] = amounts[position], amounts[position + len(axes)]
    if any(begins[:2]) or any(ends[:2]):
        raise NotExactError(f"Pad {label!r} pads batch or channels")
    return list(zip(begins[2:], ends[2:], strict=True))


def _pad_value(node: ir.Node, graph: Graph) -> NDArray[Any] | float | None:
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        return graph.constant(node.inputs[2])
    return float(attribute(node, "value", 0.0))


def _pad_amounts(node: ir.Node, graph: Graph) -> list[int] | None:
    if len(node.inputs) > 1 and node.inputs[1] is not None:
        constant = graph.constant(node.inputs[1])
        return None if constant is None else [int(amount) for amount in constant]
    amounts = attribute(node, "pads")
    return None if amounts is None else list(amounts)


def _pad_axes(node: ir.Node, graph: Graph, rank: int) -> list[int]:
    if len(node.inputs) > 3 and node.inputs[3] is not None:
        axes = graph.constant(node.inputs[3])
        if axes is None:
            raise NotExactError(f"the axes of Pad {node_label(node)!r} are not constant")
        return [int(axis) % rank for axis in axes]
    return list(range(rank))


def _average_pool(node: ir.Node, context: Context) -> LinearOperator:
    kernel = attribute(node, "kernel_shape")
    axes = conv_axes(node, kernel, context.sizes)
    if attribute(node, "ceil_mode", 0):
        raise NotExactError(f"AveragePool {node_label(node)!r} rounds its size up")
    padded = any(axis.begin or axis.end for axis in axes)
    if padded and not attribute(node, "count_include_pad", 0):
        raise NotExactError(
            f"AveragePool {node_label(node)!r} does not count padding: its weights differ at "
            "the border"
        )
    taps = int(np.prod(kernel))
    weight = np.full((context.channels, 1, *kernel), 1.0 / taps)
    return _known(AffineConv(weight, np.zeros(context.channels), axes, context.channels))


OPERATORS: dict[str, Handler] = {
    "Conv": _conv,
    "BatchNormalization": _batch_normalization,
    "Add": _add,
    "Sub": _sub,
    "Mul": _mul,
    "Div": _div,
    "Neg": _neg,
    "Identity": _identity,
    "Dropout": _dropout,
    "Pad": _pad,
    "AveragePool": _average_pool,
}


# --- operators that join several tensors ------------------------------------------------------


Join = Callable[[ir.Node, list[Any], Any], Any]
JOINS = frozenset({"Add", "Sub", "Sum", "Concat"})
# Operators whose further inputs are parameters of the first.


def is_join(graph: Graph, node: ir.Node) -> bool:
    """Whether a node sums or concatenates several tensors that are not constant."""
    if not is_op(node, *JOINS) or len(variable_inputs(graph, node)) < 2:
        return False
    return len(variable_inputs(graph, node)) == len(node.inputs)


def is_vector(graph: Graph, value: ir.Value) -> bool:
    """Whether a tensor is known to be [N, C, 1, ..., 1]: added to a map, it is so to all pixels."""
    sizes = graph.sizes(value)
    return bool(sizes) and all(size == 1 for size in sizes or ())


def join_geometries(
    node: ir.Node, parts: Sequence[Geometry], sizes: tuple[int | None, ...]
) -> Geometry:
    """Geometry of a sum or concatenation of branches; raises NotExactError with the reason."""
    if is_op(node, "Concat"):
        if attribute(node, "axis") not in (1, 1 - (parts[0].rank + 2)):
            raise NotExactError(f"Concat {node_label(node)!r} is not over channels")
        total = sum(part.out_channels for part in parts)
        parts = [_widened(part, total) for part in parts]
    merged = parts[0]
    for part in parts[1:]:
        merged = merged.plus(part, sizes)
    return merged


def _widened(part: Geometry, total: int) -> Geometry:
    return Geometry(part.axes, part.in_channels, total, 1, part.biased, part.bordered)


def join_affines(
    node: ir.Node, parts: Sequence[AffineConv], sizes: tuple[int | None, ...]
) -> AffineConv:
    """The sum or concatenation of branches; raises NotExactError with the reason."""
    if is_op(node, "Concat"):
        return stack(parts, sizes)
    merged = parts[0]
    for part in parts[1:]:
        if is_op(node, "Sub"):
            part = part.then(_known_scale(-1.0, part))
        merged = merged.plus(part, sizes)
    return merged


def _known_scale(factor: float, part: AffineConv) -> AffineConv:
    channels = part.weight.shape[0]
    return scale_shift(np.full(channels, factor), np.zeros(channels), len(part.axes))


# --- constants --------------------------------------------------------------------------------


def _per_channel(
    scale: NDArray[np.float64], shift: NDArray[np.float64], context: Context
) -> LinearOperator:
    _require_finite(scale)
    _require_finite(shift)
    return _known(scale_shift(scale, shift, context.rank))


def _require_finite(values: NDArray[np.float64]) -> None:
    """Raise `NotExactError` for constants with which a network overflows, merged or not.

    Where it does depends on the order of operations, which a merge changes.
    """
    if not np.all(np.abs(values) < OVERFLOWING):
        raise NotExactError("its constants are not finite, or so large that results overflow")


def _known(affine: AffineConv) -> LinearOperator:
    return LinearOperator(affine.geometry, lambda: affine)


def constant_shape(graph: Graph, value: ir.Value | None) -> tuple[int, ...]:
    """Shape of a constant tensor, without reading its data where possible."""
    if value is not None and value.const_value is not None:
        return tuple(size for size in value.const_value.shape if isinstance(size, int))
    constant = graph.constant(value)
    assert constant is not None
    return constant.shape


def _float64(graph: Graph, value: ir.Value | None, node: ir.Node) -> NDArray[np.float64]:
    constant = graph.constant(value)
    if constant is None:
        raise NotExactError(f"{node_label(node)!r} reads a weight that is not a constant")
    return constant.astype(np.float64)


def _vector(node: ir.Node, index: int, graph: Graph, channels: int) -> NDArray[np.float64]:
    vector = _float64(graph, node.inputs[index], node)
    if vector.shape != (channels,):
        raise NotExactError(
            f"{node_label(node)!r} has {vector.shape} values for {channels} channels"
        )
    return vector


def _optional_vector(node: ir.Node, index: int, graph: Graph, channels: int) -> NDArray[np.float64]:
    if len(node.inputs) <= index or node.inputs[index] is None:
        return np.zeros(channels)
    vector = _vector(node, index, graph, channels)
    _require_finite(vector)
    return vector


def _constant_index(node: ir.Node, context: Context) -> int:
    if len(node.inputs) != 2:
        raise NotExactError(f"{node.op_type} {node_label(node)!r} has {len(node.inputs)} inputs")
    for index in (1, 0):
        if context.graph.is_constant(node.inputs[index]):
            return index
    raise NotExactError(f"{node.op_type} {node_label(node)!r} combines two tensors")


def _channel_constant(node: ir.Node, index: int, context: Context) -> NDArray[np.float64]:
    """A constant that broadcasts truly per channel, as a vector [C].

    Raises:
        NotExactError: it varies along batch or space, or would widen the tensor.
    """
    constant = _float64(context.graph, node.inputs[index], node)
    rank, channels = context.rank + 2, context.channels
    if constant.ndim > rank:
        raise NotExactError(f"the constant of {node_label(node)!r} has more axes than its input")
    # Before opset 7 an attribute says where the constant's first axis lies.
    leading = attribute(node, "axis", rank - constant.ndim) % rank if constant.ndim else 0
    trailing = max(0, rank - constant.ndim - leading)
    aligned = constant.reshape((1,) * leading + constant.shape + (1,) * trailing)
    across = aligned.shape[1] if aligned.ndim > 1 else 0
    if across not in (1, channels) or aligned.size != across:
        raise NotExactError(
            f"the constant of {node_label(node)!r} has shape {list(constant.shape)}, which is "
            "not per channel"
        )
    return np.broadcast_to(aligned.reshape(-1), (channels,)).astype(np.float64)

"""Inner channels: those that one linear operator reads and nothing else does.

A convolution or a dense layer (the consumer) reads channels that other ones (the producers) made;
between them stand only operators that keep channels apart: activations, normalisations, depthwise
convolutions, pools. Where nothing else reads any of these tensors, each channel can go by itself:
its filter in the producers, its parameters between, its columns in the consumer. What the network
computes otherwise is not touched, so the consumer alone can make up for what is missing
(`graphfold.calibration.narrow`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from graphfold.errors import GraphfoldError
from graphfold.graph import Graph, attribute, consumers, is_op
from graphfold.sites import Sites, find_sites

# They compute every channel from itself alone, with no parameter per channel.
_CHANNELWISE = frozenset(
    {
        "AveragePool", "Celu", "Clip", "Dropout", "Elu", "Erf", "Gelu", "GlobalAveragePool",
        "GlobalMaxPool", "HardSigmoid", "HardSwish", "Identity", "LeakyRelu", "MaxPool", "Mish",
        "Neg", "Abs", "Relu", "Selu", "Sigmoid", "Softplus", "Softsign", "Sqrt", "Swish", "Tanh",
        "ThresholdedRelu",
    }
)  # fmt: skip
_SPATIAL_PADDING = ("constant", "reflect", "edge")
_ELEMENTWISE = frozenset({"Add", "Sub", "Mul", "Div", "Max", "Min", "PRelu"})


class NotInnerError(GraphfoldError):
    """Why the channels that an operator reads cannot go by themselves."""


@dataclass(frozen=True)
class Cut:
    """A parameter with one entry per channel along an axis: `node.inputs[index]`."""

    node: ir.Node
    index: int
    axis: int


@dataclass(frozen=True)
class Inner:
    """The channels between producers and their only consumer.

    Attributes:
        input: what the producers read.
        output: the consumer's result, normalisation behind it included: as segments end.
        read: the tensor that the consumer reads.
        consumer: a Conv of one group, a Gemm or a MatMul.
        channels: their number.
        columns: of the consumer per channel and tap; more than one behind a Flatten.
        cuts: every parameter that goes by channels, except the consumer's.
        depthwise: convolutions whose group count follows.
        nodes: producers, consumer and what stands between.
    """

    input: ir.Value
    output: ir.Value
    read: ir.Value
    consumer: ir.Node
    channels: int
    columns: int
    cuts: tuple[Cut, ...]
    depthwise: tuple[ir.Node, ...]
    nodes: tuple[ir.Node, ...] = field(repr=False)

    @property
    def key(self) -> tuple[str, str]:
        """Its ends, as plans name them."""
        return self.input.name or "", self.output.name or ""


def find_inner(graph: Graph, sites: Sites | None = None) -> list[Inner]:
    """All inner channels of a graph, in execution order of their consumers."""
    sites = sites or find_sites(graph)
    outputs = {site.conv: site.output for site in sites.convs}
    found = []
    for node in graph.ir:
        if _weight(graph, node) is not None:
            try:
                found.append(inner_of(graph, node, outputs.get(node, node.outputs[0])))
            except NotInnerError:
                continue
    return found


def inner_of(graph: Graph, consumer: ir.Node, output: ir.Value | None = None) -> Inner:
    """The channels that an operator reads, if nothing else reads them.

    Raises:
        NotInnerError: they cannot go by themselves; the reason.
    """
    weight = _weight(graph, consumer)
    if weight is None or attribute(consumer, "group", 1) != 1:
        raise NotInnerError("is no convolution of one group or dense layer with constant weights")
    search = _Search(graph, consumer)
    read = consumer.inputs[0]
    assert read is not None
    search.follow(read)
    search.check_readers()
    inputs = {node.inputs[0] for node in search.producers}
    if len(inputs) != 1:
        raise NotInnerError("its channels are made from different tensors")
    (source,) = inputs
    assert source is not None
    width = _inputs_of(consumer, weight)
    if search.channels is None or width % search.channels:
        raise NotInnerError("the number of its channels is not known")
    order = {node: number for number, node in enumerate(graph.ir)}
    nodes = sorted({*search.nodes, *search.producers, consumer}, key=order.__getitem__)
    return Inner(
        source,
        output or consumer.outputs[0],
        read,
        consumer,
        search.channels,
        width // search.channels,
        tuple(search.cuts),
        tuple(search.depthwise),
        tuple(nodes),
    )


class _Search:
    """Walks from the consumer's input up to the producers."""

    def __init__(self, graph: Graph, consumer: ir.Node) -> None:
        self.graph = graph
        self.consumer = consumer
        self.channels: int | None = None
        self.cuts: list[Cut] = []
        self.depthwise: list[ir.Node] = []
        self.nodes: list[ir.Node] = []
        self.producers: list[ir.Node] = []
        self._seen: set[ir.Value] = set()
        self._spread = False

    def follow(self, value: ir.Value) -> None:
        if value in self._seen:
            return
        self._seen.add(value)
        node = value.producer()
        if node is None or value.is_graph_output():
            raise NotInnerError(f"{value.name!r} is part of the model's interface")
        if node.domain not in ("", "ai.onnx") or value is not node.outputs[0]:
            raise NotInnerError(f"{node.op_type} {value.name!r} may mix channels")
        if _weight(self.graph, node) is not None:
            self._weighted(node)
        elif is_op(node, "BatchNormalization"):
            self._parameters(node, (1, 2, 3, 4))
        elif is_op(node, *_ELEMENTWISE):
            self._elementwise(node)
        elif node.op_type in _CHANNELWISE or self._is_spatial(node):
            self._through(node, node.inputs[0])
        elif is_op(node, "Flatten", "Reshape", "Squeeze"):
            self._flattened(node)
        else:
            raise NotInnerError(f"{node.op_type} {value.name!r} may mix channels")

    def _through(self, node: ir.Node, value: ir.Value | None) -> None:
        self.nodes.append(node)
        assert value is not None
        self.follow(value)

    def _weighted(self, node: ir.Node) -> None:
        weight = _weight(self.graph, node)
        assert weight is not None
        groups = attribute(node, "group", 1)
        if groups == 1:
            self._know(_outputs_of(node, weight))
            self.producers.append(node)
            self.cuts.append(Cut(node, 1, _output_axis(node)))
            self._bias(node)
            return
        if groups != weight.shape[0] or weight.shape[1] != 1:
            raise NotInnerError(f"{node.outputs[0].name!r} is a grouped convolution")
        self._know(groups)
        self.cuts.append(Cut(node, 1, 0))
        self._bias(node)
        self.depthwise.append(node)
        self._through(node, node.inputs[0])

    def _bias(self, node: ir.Node) -> None:
        if len(node.inputs) > 2 and node.inputs[2] is not None:
            constant = self._constant(node.inputs[2], node)
            if constant.size > 1:
                self.cuts.append(Cut(node, 2, constant.ndim - 1))

    def _parameters(self, node: ir.Node, indices: Sequence[int]) -> None:
        for index in indices:
            value = node.inputs[index]
            assert value is not None
            self._know(self._constant(value, node).size)
            self.cuts.append(Cut(node, index, 0))
        self._through(node, node.inputs[0])

    def _elementwise(self, node: ir.Node) -> None:
        self.nodes.append(node)
        result = self.graph.shape(node.outputs[0])
        for index, value in enumerate(node.inputs):
            assert value is not None
            constant = self.graph.constant(value)
            if constant is None:
                shape = self.graph.shape(value)
                if shape is None or result is None or len(shape) != len(result):
                    raise NotInnerError(f"the shape of {value.name!r} is not known")
                self.follow(value)
            elif constant.size > 1:
                axis = self._channel_axis(node, constant, result)
                if constant.shape[axis] > 1:
                    self.cuts.append(Cut(node, index, axis))

    def _channel_axis(
        self, node: ir.Node, constant: NDArray[Any], shape: Sequence[Any] | None
    ) -> int:
        """Of a constant that is broadcast from the right; the unidirectional slope of PRelu too."""
        if shape is None:
            raise NotInnerError(f"the shape of {node.outputs[0].name!r} is not known")
        axis = 1 - (len(shape) - constant.ndim)
        if axis < 0:
            raise NotInnerError(f"{node.outputs[0].name!r} has no constant per channel")
        return axis

    def _flattened(self, node: ir.Node) -> None:
        source = node.inputs[0]
        before, after = self.graph.shape(source), self.graph.shape(node.outputs[0])
        if before is None or after is None or len(after) < 2 or len(before) < 2:
            raise NotInnerError(f"the shape of {node.outputs[0].name!r} is not known")
        channels = before[1]
        rest = [size for size in before[2:] if isinstance(size, int)]
        if not isinstance(channels, int) or len(rest) < len(before) - 2:
            raise NotInnerError(f"the size of {source.name if source else None!r} is open")
        if after[1] != channels * math.prod(rest):
            raise NotInnerError(f"{node.op_type} {node.outputs[0].name!r} may mix channels")
        if any(size != 1 for size in after[2:]):
            raise NotInnerError(f"{node.op_type} {node.outputs[0].name!r} may mix channels")
        if is_op(node, "Reshape"):
            self._check_reshape(node)
        if after[1] != channels:
            if self.channels is not None:
                raise NotInnerError("its channels are spread before they are weighted")
            self._spread = True
        self._through(node, source)

    def _check_reshape(self, node: ir.Node) -> None:
        """A stated size would be wrong as soon as a channel goes; -1 takes what there is."""
        target = self.graph.constant(node.inputs[1])
        if target is None or target.size < 2 or int(target[1]) != -1:
            raise NotInnerError(f"Reshape {node.outputs[0].name!r} states its size")

    def _is_spatial(self, node: ir.Node) -> bool:
        if is_op(node, "Pad"):
            amounts = self.graph.constant(node.inputs[1]) if len(node.inputs) > 1 else None
            mode = attribute(node, "mode", "constant")
            if amounts is None or len(node.inputs) > 3 or mode not in _SPATIAL_PADDING:
                return False
            half = amounts.size // 2
            return not (amounts[:2].any() or amounts[half : half + 2].any())
        if is_op(node, "ReduceMean"):
            return self._reduces_space(node)
        return False

    def _reduces_space(self, node: ir.Node) -> bool:
        axes: Any = attribute(node, "axes")
        if axes is None and len(node.inputs) > 1:
            axes = self.graph.constant(node.inputs[1])
        shape = self.graph.shape(node.inputs[0])
        if axes is None or shape is None:
            return False
        return {int(axis) % len(shape) for axis in np.ravel(axes)} == set(range(2, len(shape)))

    def _know(self, channels: int) -> None:
        if self.channels not in (None, channels):
            raise NotInnerError("its channels are joined from different numbers of them")
        self.channels = channels

    def _constant(self, value: ir.Value, node: ir.Node) -> NDArray[Any]:
        found = self.graph.constant(value)
        if found is None:
            raise NotInnerError(f"a parameter of {node.outputs[0].name!r} is computed")
        return found

    def check_readers(self) -> None:
        """Everything made of these channels must end at the consumer."""
        known = {*self.nodes, self.consumer}
        for value in self._seen:
            for node in consumers(value):
                if node not in known:
                    raise NotInnerError(f"{value.name!r} is read elsewhere")
        for value in self._seen:
            others = [usage for usage in value.uses() if usage.node is self.consumer]
            if any(usage.idx != 0 for usage in others):
                raise NotInnerError(f"{value.name!r} is read twice")


def _weight(graph: Graph, node: ir.Node) -> NDArray[Any] | None:
    """The constant weight of a Conv, Gemm or MatMul of rank 2."""
    if not is_op(node, "Conv", "Gemm", "MatMul") or len(node.inputs) < 2:
        return None
    if node.op_type == "Gemm" and attribute(node, "transA", 0):
        return None
    weight = graph.constant(node.inputs[1])
    if weight is None or weight.dtype.kind != "f":
        return None
    if node.op_type == "MatMul":
        shape = graph.shape(node.inputs[0])
        if weight.ndim != 2 or shape is None or len(shape) != 2:
            return None
    return weight


def _output_axis(node: ir.Node) -> int:
    if node.op_type == "Conv":
        return 0
    return 0 if node.op_type == "Gemm" and attribute(node, "transB", 0) else 1


def _outputs_of(node: ir.Node, weight: NDArray[Any]) -> int:
    return int(weight.shape[_output_axis(node)])


def _inputs_of(node: ir.Node, weight: NDArray[Any]) -> int:
    return int(weight.shape[1 - _output_axis(node)])


def weight_matrix(graph: Graph, node: ir.Node) -> NDArray[np.float64]:
    """A consumer's weights as [outputs, channels * columns or taps], in float64.

    The columns of one channel stand together.
    """
    weight = _weight(graph, node)
    assert weight is not None
    matrix = np.asarray(weight, np.float64)
    if node.op_type != "Conv" and _output_axis(node) == 1:
        matrix = matrix.T
    scale = attribute(node, "alpha", 1.0) if node.op_type == "Gemm" else 1.0
    return scale * matrix.reshape(len(matrix), -1)


def bias_vector(graph: Graph, node: ir.Node, outputs: int) -> NDArray[np.float64]:
    """A consumer's bias, zeros where it has none."""
    if len(node.inputs) < 3 or node.inputs[2] is None:
        return np.zeros(outputs)
    found = graph.constant(node.inputs[2])
    if found is None:
        raise NotInnerError(f"the bias of {node.outputs[0].name!r} is computed")
    scale = attribute(node, "beta", 1.0) if node.op_type == "Gemm" else 1.0
    return np.broadcast_to(scale * found.astype(np.float64).ravel(), (outputs,)).copy()


def cut_channels(
    graph: Graph,
    inner: Inner,
    kept: NDArray[np.intp],
    weight: NDArray[np.float64],
    bias: NDArray[np.float64],
) -> None:
    """Keep only some inner channels, the consumer with new weights.

    Args:
        graph: edited in place; `inner` must be of it.
        inner: the channels.
        kept: ascending indices of those that stay.
        weight: the consumer's, [outputs, len(kept) * columns or taps].
        bias: the consumer's, [outputs].
    """
    for cut in inner.cuts:
        value = cut.node.inputs[cut.index]
        assert value is not None
        constant = graph.constant(value)
        assert constant is not None
        _replace(graph, cut.node, cut.index, np.take(constant, kept, axis=cut.axis))
    for node in inner.depthwise:
        node.attributes["group"] = ir.AttrInt64("group", len(kept))
    _reshape(graph, inner, len(kept))
    set_weights(graph, inner.consumer, weight, bias)


def _reshape(graph: Graph, inner: Inner, width: int) -> None:
    """Tell the tensors that hold the channels how many of them are left."""
    for node in inner.nodes:
        if node is inner.consumer:
            continue
        for value in node.outputs:
            shape = graph.shape(value)
            if shape is None or len(shape) < 2 or not isinstance(shape[1], int):
                continue
            new = (shape[0], shape[1] // inner.channels * width, *shape[2:])
            graph.shapes[value.name or ""] = new
            if value.shape is not None:
                value.shape = ir.Shape(new)


def set_weights(
    graph: Graph, node: ir.Node, weight: NDArray[np.float64], bias: NDArray[np.float64]
) -> None:
    """Give a Conv, Gemm or MatMul other weights, of any number of inputs, and a bias.

    Args:
        graph: edited in place.
        node: of it.
        weight: [outputs, inputs * taps].
        bias: [outputs].
    """
    old = graph.constant(node.inputs[1])
    assert old is not None
    if node.op_type == "Conv":
        shaped = weight.reshape(len(weight), -1, *old.shape[2:])
    else:
        shaped = weight.T if _output_axis(node) == 1 else weight
    for name in ("alpha", "beta"):
        node.attributes.pop(name, None)
    _replace(graph, node, 1, shaped.astype(old.dtype))
    if node.op_type == "MatMul":
        _add_bias(graph, node, bias.astype(old.dtype))
    elif len(node.inputs) > 2:
        _replace(graph, node, 2, bias.astype(old.dtype))
    else:
        value = graph.add_initializer(node.outputs[0].name or "bias", bias.astype(old.dtype))
        node.resize_inputs(3)
        node.replace_input_with(2, value)


def _add_bias(graph: Graph, node: ir.Node, bias: NDArray[Any]) -> None:
    """MatMul has none of its own; nothing is added where there is nothing to add."""
    if not bias.any():
        return
    result = node.outputs[0]
    readers = list(result.uses())
    name = result.name or "matmul"
    added = ir.Node("", "Add", [result, graph.add_initializer(name, bias)])
    graph.ir.insert_after(node, added)
    value = added.outputs[0]
    value.type, value.shape = result.type, result.shape
    for usage in readers:
        usage.node.replace_input_with(usage.idx, value)
    inner_name = graph.fresh_name(name)
    if result.is_graph_output():
        graph.ir.outputs[list(graph.ir.outputs).index(result)] = value
    result.name = inner_name
    value.name = name


def _replace(graph: Graph, node: ir.Node, index: int, array: NDArray[Any]) -> None:
    old = node.inputs[index]
    assert old is not None
    new = graph.add_initializer(old.name or "w", array)
    node.replace_input_with(index, new)
    graph.drop_if_unused(old)


def widths(inner: Inner, step: int) -> Iterator[int]:
    """Numbers of channels below the present one that are multiples of `step`, falling."""
    yield from range((inner.channels - 1) // step * step, 0, -step)

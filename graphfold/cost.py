"""What a network costs, counted in one linear walk: MACs, weights, activations, memory traffic.

All figures are for one image: the batch counts as one. Two conventions for MACs:

- `macs`: multiply-accumulates of convolutions and fully connected layers, nothing else;
- `macs_fvcore`: those, plus 5 per output element of every BatchNormalization and one per input
  element of every global pool. This is what fvcore counts on a torch model in train() mode, and
  what DepthShrinker's tables quote. In a graph whose BatchNormalizations were folded, the
  convolutions that each stand for one convolution of the original count in their place.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from graphfold.graph import attribute, is_op, node_label
from graphfold.sizes import resolved_shapes

if TYPE_CHECKING:
    import onnx_ir as ir

    from graphfold.graph import Graph
    from graphfold.shapes import TensorShape

IsNormalized = Callable[[str], bool] | Collection[str]

# Input index of the weight, and whether its MACs are counted at the input (transposed) instead.
_CONVOLUTIONS = {
    "Conv": 1,
    "FusedConv": 1,
    "ConvInteger": 1,
    "QLinearConv": 3,
}
_MATRIX_PRODUCTS = {
    "Gemm": 1,
    "MatMul": 1,
    "FusedMatMul": 1,
    "MatMulInteger": 1,
    "QLinearMatMul": 3,
}
_VIEWS = frozenset({"Identity", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Dropout"})
_GLOBAL_POOLS = frozenset({"GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool"})
# Operands that steer an operator (shapes, axes, indices) are no parameters of the model.
_NO_PARAMETERS = frozenset({"INT64", "BOOL", "STRING"})


@dataclass(frozen=True)
class NodeCost:
    """One node's cost for one image; None where it depends on sizes that are not known.

    Attributes:
        label: the node's name, else its first output.
        output: its first output tensor.
        op_type: its operator.
        macs: multiply-accumulates, 0 for everything but convolutions and matrix products.
        extra_fvcore: what `macs_fvcore` counts in addition.
        params: elements of the constants it reads.
        weight_bytes: bytes of the constants it reads.
        input_bytes, output_bytes: of the tensors that are computed at run time.
        live_bytes: activations that are alive while it runs, its own included.
    """

    label: str
    output: str
    op_type: str
    macs: int | None
    extra_fvcore: int | None
    params: int
    weight_bytes: int
    input_bytes: int | None
    output_bytes: int | None
    live_bytes: int | None

    @property
    def traffic_bytes(self) -> int | None:
        """Bytes read and written: activations in, activations out, weights."""
        if self.input_bytes is None or self.output_bytes is None:
            return None
        return self.input_bytes + self.output_bytes + self.weight_bytes


@dataclass(frozen=True)
class Totals:
    """Sums over some nodes; a constant that several of them read counts once.

    `peak_bytes` is the largest sum of activation bytes that are alive at once.
    """

    macs: int | None
    macs_fvcore: int | None
    params: int
    weight_bytes: int
    activation_bytes: int | None
    traffic_bytes: int | None
    peak_bytes: int | None

    def to_json(self) -> dict[str, int | None]:
        """As a JSON object."""
        return {
            "macs": self.macs,
            "macs_fvcore": self.macs_fvcore,
            "params": self.params,
            "weight_bytes": self.weight_bytes,
            "activation_bytes": self.activation_bytes,
            "traffic_bytes": self.traffic_bytes,
            "peak_activation_bytes": self.peak_bytes,
        }


@dataclass(frozen=True)
class _Constant:
    key: int
    elements: int
    bytes: int
    is_parameter: bool


@dataclass(frozen=True)
class Cost:
    """Cost of a whole network.

    Attributes:
        nodes: per node, in execution order.
        ops: number of nodes per operator.
        total: sums over all nodes.
        unknown: why figures are None: the tensors whose sizes are not known.
    """

    nodes: tuple[NodeCost, ...]
    ops: dict[str, int]
    total: Totals
    unknown: tuple[str, ...]
    _constants: dict[str, tuple[_Constant, ...]]

    @property
    def macs(self) -> int | None:
        """Multiply-accumulates of convolutions and fully connected layers."""
        return self.total.macs

    @property
    def macs_fvcore(self) -> int | None:
        """Multiply-accumulates in fvcore's convention for models in train() mode."""
        return self.total.macs_fvcore

    @property
    def params(self) -> int:
        """Elements of all constants that are read, shared ones once."""
        return self.total.params

    @property
    def weight_bytes(self) -> int:
        """Bytes of all constants that are read, shared ones once."""
        return self.total.weight_bytes

    @property
    def traffic_bytes(self) -> int | None:
        """Bytes read and written by all nodes."""
        return self.total.traffic_bytes

    @property
    def peak_bytes(self) -> int | None:
        """Largest sum of activation bytes that are alive at once."""
        return self.total.peak_bytes

    def subtotal(self, outputs: Collection[str]) -> Totals:
        """Sums over the nodes whose first output is in `outputs`."""
        chosen = set(outputs)
        return _totals([node for node in self.nodes if node.output in chosen], self._constants)

    def subtotals(self, groups: Sequence[Collection[str]]) -> list[Totals]:
        """Like `subtotal` for many disjoint groups, in one walk."""
        by_output = {node.output: node for node in self.nodes}
        return [
            _totals([by_output[name] for name in group if name in by_output], self._constants)
            for group in groups
        ]


def analyze(
    graph: Graph,
    shapes: Mapping[str, TensorShape] | None = None,
    *,
    input_shapes: Mapping[str, Sequence[int]] | None = None,
    normalized: IsNormalized = (),
) -> Cost:
    """Count a network's cost for one image.

    Args:
        graph: the network.
        shapes: tensor shapes by name; None to take the graph's, with unknown batches as one
            and other unknown sizes as `input_shapes` says.
        input_shapes: sizes of the graph inputs by name ("" for the only input).
        normalized: outputs of convolutions (or a predicate on them) that count as followed by
            a BatchNormalization in `macs_fvcore`.

    Returns:
        The cost; figures that depend on unknown sizes are None and `unknown` names them.
    """
    if shapes is None:
        shapes = resolved_shapes(graph, input_shapes)
    counter = _Counter(graph, shapes, _predicate(normalized), _batch(graph, shapes))
    live = _live_bytes(graph, counter)
    nodes = [counter.node(node, live.get(node)) for node in graph.ir]
    return Cost(
        nodes=tuple(nodes),
        ops=dict(Counter(node.op_type for node in nodes)),
        total=_totals(nodes, counter.constants),
        unknown=tuple(dict.fromkeys(counter.unknown)),
        _constants=counter.constants,
    )


def _predicate(normalized: IsNormalized) -> Callable[[str], bool]:
    if callable(normalized):
        return normalized
    names = frozenset(normalized)
    return names.__contains__


def _batch(graph: Graph, shapes: Mapping[str, TensorShape]) -> int:
    """The fixed batch size that figures are divided by: first axis of inputs and outputs."""
    first = [
        shape[0]
        for value in (*graph.ir.inputs, *graph.ir.outputs)
        if not value.is_initializer() and (shape := shapes.get(value.name or ""))
    ]
    sizes = {size for size in first if isinstance(size, int)}
    return sizes.pop() if len(sizes) == 1 and min(sizes, default=0) > 0 else 1


class _Counter:
    """The walk's state: shapes, constants read so far, and what could not be counted."""

    def __init__(
        self,
        graph: Graph,
        shapes: Mapping[str, TensorShape],
        is_normalized: Callable[[str], bool],
        batch: int,
    ) -> None:
        self.graph = graph
        self.shapes = shapes
        self.is_normalized = is_normalized
        self.batch = batch
        self.constants: dict[str, tuple[_Constant, ...]] = {}
        self.unknown: list[str] = []

    def node(self, node: ir.Node, live_bytes: int | None) -> NodeCost:
        inputs = [value for value in node.inputs if value is not None]
        constants = tuple(found for value in inputs if (found := self._constant(value)) is not None)
        output = next((value.name for value in node.outputs if value.name), "")
        self.constants[output] = constants
        variable = [value for value in inputs if not self.graph.is_constant(value)]
        has_body = any(attr.type.name in ("GRAPH", "GRAPHS") for attr in node.attributes.values())
        if has_body:
            self.unknown.append(f"{node.op_type} {output!r}: what its subgraphs cost")
        return NodeCost(
            label=node_label(node),
            output=output,
            op_type=node.op_type,
            macs=None if has_body else self._per_image(self._macs(node)),
            extra_fvcore=self._per_image(self._extra(node)),
            params=sum(constant.elements for constant in constants if constant.is_parameter),
            weight_bytes=sum(constant.bytes for constant in constants),
            input_bytes=self.sum_bytes(dict.fromkeys(variable)),
            output_bytes=self.sum_bytes(node.outputs),
            live_bytes=live_bytes,
        )

    def _constant(self, value: ir.Value) -> _Constant | None:
        source = value
        while not source.is_initializer():
            producer = source.producer()
            if producer is None:
                return None
            if is_op(producer, "Constant"):
                break
            if not is_op(producer, "Identity") or producer.inputs[0] is None:
                return None
            source = producer.inputs[0]
        tensor: Any = source.const_value
        producer = source.producer()
        if tensor is None and producer is not None and "value" in producer.attributes:
            tensor = producer.attributes["value"].as_tensor()
        if tensor is None:
            return None
        parameter = tensor.dtype.name not in _NO_PARAMETERS
        return _Constant(id(source), int(tensor.size), int(tensor.nbytes), parameter)

    def elements(self, value: ir.Value | None) -> int | None:
        """Elements of a tensor as it is declared, batch included."""
        if value is None:
            return 0
        shape = self.shapes.get(value.name or "") or self.graph.shape(value)
        if shape is None:
            self.unknown.append(f"shape of tensor {value.name!r}")
            return None
        sizes = [size for size in shape if isinstance(size, int) and size >= 0]
        if len(sizes) != len(shape):
            written = ", ".join(str(size) if size is not None else "?" for size in shape)
            self.unknown.append(f"sizes of tensor {value.name!r} [{written}]")
            return None
        return math.prod(sizes)

    def bytes(self, value: ir.Value) -> int | None:
        """Bytes of an activation for one image; 0 for constants."""
        if self.graph.is_constant(value):
            return 0
        elements = self.elements(value)
        if elements is None:
            return None
        dtype = self.graph.dtype(value)
        itemsize = dtype.itemsize if dtype is not None and dtype.name != "STRING" else 4
        return math.ceil(elements * itemsize / self.batch)

    def sum_bytes(self, values: Iterable[ir.Value]) -> int | None:
        """Bytes of several activations."""
        return _sum(self.bytes(value) for value in values if value.name)

    def _per_image(self, count: int | None) -> int | None:
        return count if count is None else count // self.batch

    def _macs(self, node: ir.Node) -> int | None:
        if node.op_type in _CONVOLUTIONS:
            return self._product(node.outputs[0], self._weight_shape(node)[1:])
        if node.op_type == "ConvTranspose":
            return self._product(node.inputs[0], self._weight_shape(node)[1:])
        if node.op_type in _MATRIX_PRODUCTS:
            weight = self._weight_shape(node)
            transposed = node.op_type == "Gemm" and attribute(node, "transB", 0)
            axis = -1 if transposed or len(weight) == 1 else -2
            return self._product(node.outputs[0], weight[axis:][:1])
        return 0

    def _weight_shape(self, node: ir.Node) -> TensorShape:
        index = _CONVOLUTIONS.get(node.op_type, _MATRIX_PRODUCTS.get(node.op_type, 1))
        value = node.inputs[index] if index < len(node.inputs) else None
        if value is None:
            return (None, None)
        shape = self.shapes.get(value.name or "") or self.graph.shape(value)
        return shape if shape else (None, None)

    def _product(self, value: ir.Value | None, sizes: TensorShape) -> int | None:
        elements = self.elements(value)
        if elements is None:
            return None
        known = [size for size in sizes if isinstance(size, int)]
        if len(known) != len(sizes):
            self.unknown.append("sizes of a weight that is computed at run time")
            return None
        return elements * math.prod(known)

    def _extra(self, node: ir.Node) -> int | None:
        output = node.outputs[0] if node.outputs else None
        if is_op(node, "BatchNormalization"):
            return self._times(5, output)
        if is_op(node, "Conv") and output is not None and self.is_normalized(output.name or ""):
            return self._times(5, output)
        if self._is_global_pool(node):
            return self.elements(node.inputs[0])
        return 0

    def _times(self, factor: int, value: ir.Value | None) -> int | None:
        elements = self.elements(value)
        return None if elements is None else factor * elements

    def _is_global_pool(self, node: ir.Node) -> bool:
        if is_op(node, *_GLOBAL_POOLS):
            return True
        if not is_op(node, "ReduceMean", "ReduceMax"):
            return False
        shape = self.shapes.get(node.inputs[0].name or "") if node.inputs[0] is not None else None
        rank = len(shape) if shape else 0
        axes = attribute(node, "axes")
        if axes is None and len(node.inputs) > 1:
            constant = self.graph.constant(node.inputs[1])
            axes = None if constant is None else constant.tolist()
        if axes is None or rank < 3:
            return False
        reduced = {axis % rank for axis in axes}
        # Channels first or last: both occur, the exporters of TensorFlow models keep them last.
        return reduced in (set(range(2, rank)), set(range(1, rank - 1)))


def _sum(values: Iterable[int | None]) -> int | None:
    total = 0
    for value in values:
        if value is None:
            return None
        total += value
    return total


def _totals(nodes: Sequence[NodeCost], constants: Mapping[str, tuple[_Constant, ...]]) -> Totals:
    read = {item.key: item for node in nodes for item in constants.get(node.output, ())}
    macs = _sum(node.macs for node in nodes)
    extra = _sum(node.extra_fvcore for node in nodes)
    return Totals(
        macs=macs,
        macs_fvcore=None if macs is None or extra is None else macs + extra,
        params=sum(item.elements for item in read.values() if item.is_parameter),
        weight_bytes=sum(item.bytes for item in read.values()),
        activation_bytes=_sum(node.output_bytes for node in nodes),
        traffic_bytes=_sum(node.traffic_bytes for node in nodes),
        peak_bytes=_largest(node.live_bytes for node in nodes),
    )


def _largest(values: Iterable[int | None]) -> int | None:
    found = 0
    for value in values:
        if value is None:
            return None
        found = max(found, value)
    return found


def _live_bytes(graph: Graph, counter: _Counter) -> dict[ir.Node, int]:
    """Bytes of live activations while each node runs; ends where a size is not known.

    Graph inputs live until their last use, graph outputs until the end; operators that only
    change the shape share their input's memory.
    """
    nodes = graph.nodes()
    storage = _shared_storage(nodes)
    expiring: dict[int, list[ir.Value]] = {}
    for value, index in _last_uses(graph, nodes, storage).items():
        expiring.setdefault(index, []).append(value)
    live = counter.sum_bytes(graph.ir.inputs)
    found: dict[ir.Node, int] = {}
    for index, node in enumerate(nodes):
        made = counter.sum_bytes(value for value in node.outputs if value not in storage)
        if live is None or made is None:
            break
        live += made
        found[node] = live
        live -= counter.sum_bytes(expiring.get(index, ())) or 0
    return found


def _shared_storage(nodes: Sequence[ir.Node]) -> dict[ir.Value, ir.Value]:
    """Outputs of shape-only operators, each with the tensor whose memory it shares."""
    storage: dict[ir.Value, ir.Value] = {}
    for node in nodes:
        if is_op(node, *_VIEWS) and node.inputs[0] is not None:
            storage[node.outputs[0]] = storage.get(node.inputs[0], node.inputs[0])
    return storage


def _last_uses(
    graph: Graph, nodes: Sequence[ir.Node], storage: Mapping[ir.Value, ir.Value]
) -> dict[ir.Value, int]:
    """Index of the node after which each tensor's memory is free."""
    last: dict[ir.Value, int] = {}
    for index, node in enumerate(nodes):
        for value in (*node.outputs, *node.inputs):
            if value is not None:
                last[storage.get(value, value)] = index
    for value in graph.ir.outputs:
        last[storage.get(value, value)] = len(nodes)
    return last

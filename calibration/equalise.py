"""Weight ranges per channel, and channels scaled so that they use the 8 bits they have.

Cross-layer equalisation (Nagel et al. 2019): between two convolutions with a Relu or nothing in
between, output channel c of the first may be divided by any s_c > 0 and input channel c of the
second multiplied by it, since Relu(x / s) = Relu(x) / s and padding is zero. The activation
between them shares one scale, and so do the input channels of each output channel of the second:
both lose what their smallest channels need. s_c = sqrt(r_c / q_c) gives channel c the range
sqrt(r_c q_c) on both sides, where r_c is its range in the first and q_c in the second.

Scales are rounded to powers of two, so the network computes the same numbers as before, bit by
bit. A Clip with an upper limit stays: it would cut each channel elsewhere, and ONNX's Clip has one
limit for all channels.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from graphfold.graph import Graph
from graphfold.model import adopt, to_proto
from graphfold.tables import Table, make_table

if TYPE_CHECKING:
    from graphfold.model import Model

# A channel with less than 1/16 of the largest one's range has 4 of 8 bits left.
DEMANDED_RATIO = 16.0
# Of the largest range: below it a channel is dead, as training leaves many, and counts as zeros.
_DEAD = 1e-4
_SWEEPS = 8


@dataclass(frozen=True)
class WeightRange:
    """How far the channels of one convolution are apart.

    Attributes:
        tensor: what it makes.
        outputs: largest over smallest range of an output channel's weights; channels of zeros, or
            nearly, do not count. With a scale per channel it costs nothing in the weights, but it
            shows what the activation behind, which has one scale, is like.
        inputs: the same over input channels, which share scales in any case; 1 in depthwise ones.
    """

    tensor: str
    outputs: float
    inputs: float


def weight_ranges(model: Model) -> list[WeightRange]:
    """The ranges of every convolution with constant weights, in execution order."""
    graph = Graph(model)
    found = []
    for node in graph.ir:
        value = node.inputs[1] if node.op_type == "Conv" and len(node.inputs) > 1 else None
        weight = None if value is None else graph.constant(value)
        if weight is None:
            continue
        group = node.attributes["group"].as_int() if "group" in node.attributes else 1
        columns = _input_ranges(weight, group)
        # Of channels in different groups no two share an output channel, hence no scale.
        ratio = max((_ratio(row) for row in columns.reshape(group, -1)), default=1.0)
        name = node.outputs[0].name or ""
        found.append(WeightRange(name, _ratio(_output_ranges(weight)), ratio))
    return found


def ranges_table(ranges: list[WeightRange]) -> Table:
    """Weight ranges for people, the widest first."""
    rows = [
        (item.tensor, f"{item.outputs:.1f}", f"{item.inputs:.1f}")
        for item in sorted(ranges, key=lambda item: -max(item.outputs, item.inputs))
    ]
    columns = ("convolution", "output channels", "input channels")
    note = "Largest over smallest range of a channel's weights."
    return make_table("Weight ranges", columns, rows, note=note)


def _output_ranges(weight: NDArray[Any]) -> NDArray[np.float64]:
    magnitude = np.abs(weight.astype(np.float64))
    return np.asarray(magnitude.reshape(len(weight), -1).max(axis=1, initial=0.0))


def _input_ranges(weight: NDArray[Any], group: int) -> NDArray[np.float64]:
    """Per input channel of the whole convolution."""
    grouped = np.abs(weight.astype(np.float64)).reshape(group, -1, *weight.shape[1:])
    return np.asarray(grouped.max(axis=(1, *range(3, grouped.ndim)), initial=0.0).reshape(-1))


def _ratio(ranges: NDArray[np.float64]) -> float:
    used = ranges[_is_alive(ranges)]
    return float(used.max() / used.min()) if used.size else 1.0


def _is_alive(ranges: NDArray[np.float64]) -> NDArray[np.bool_]:
    return np.asarray((ranges > 0) & (ranges >= _DEAD * ranges.max(initial=0.0)))


@dataclass(frozen=True)
class Equalised:
    """An equalised network.

    Attributes:
        model: the network; the input itself where nothing was changed.
        changed: tensors between two convolutions whose channels were scaled.
        skipped: tensors whose channels are far apart and were left, with the reason.
    """

    model: Model
    changed: tuple[str, ...]
    skipped: Mapping[str, str]


def equalise(model: Model, *, ratio: float = DEMANDED_RATIO) -> Equalised:
    """Scale channels between convolutions where their ranges are far apart.

    Args:
        model: a network with its normalisation folded; it is not modified.
        ratio: largest over smallest range of a channel, in either convolution, from which on it
            is done.
    """
    proto = onnx.ModelProto()
    proto.CopyFrom(to_proto(model))
    weights = _Weights(proto)
    skipped: dict[str, str] = {}
    pairs = []
    for pair in weights.pairs():
        if weights.ratio(pair) < ratio:
            continue
        reason = weights.reason_against(pair)
        if reason is None:
            pairs.append(pair)
        else:
            skipped[pair.tensor] = reason
    changed: dict[str, None] = {}
    for _ in range(_SWEEPS):
        scaled = [pair.tensor for pair in pairs if weights.scale(pair)]
        changed.update(dict.fromkeys(scaled))
        if not scaled:
            break
    if not changed:
        return Equalised(model, (), skipped)
    weights.store()
    return Equalised(adopt(proto, check=False), tuple(changed), skipped)


@dataclass(frozen=True)
class _Pair:
    """Two convolutions, and what stands between them."""

    first: onnx.NodeProto
    between: onnx.NodeProto | None
    second: onnx.NodeProto

    @property
    def tensor(self) -> str:
        return str(self.first.output[0])


class _Weights:
    """A network's convolutions, and their weights while they are changed."""

    def __init__(self, proto: onnx.ModelProto) -> None:
        self._graph = proto.graph
        self._initializers = {item.name: item for item in proto.graph.initializer}
        self._values: dict[str, NDArray[Any]] = {}
        self._readers: dict[str, list[onnx.NodeProto]] = {}
        for node in proto.graph.node:
            for name in node.input:
                self._readers.setdefault(name, []).append(node)
        self._open = {item.name for item in (*proto.graph.input, *proto.graph.output)}

    def pairs(self) -> Iterator[_Pair]:
        for node in self._graph.node:
            if node.op_type != "Conv" or not self._has_weights(node):
                continue
            between = None
            reader = self._only_reader(node.output[0])
            if reader is not None and reader.op_type in ("Relu", "Clip"):
                between, reader = reader, self._only_reader(reader.output[0])
            if reader is None or reader.op_type != "Conv" or not self._has_weights(reader):
                continue
            if reader.input[0] == (between or node).output[0]:
                yield _Pair(node, between, reader)

    def _only_reader(self, name: str) -> onnx.NodeProto | None:
        readers = self._readers.get(name, [])
        return readers[0] if len(readers) == 1 and name not in self._open else None

    def _has_weights(self, node: onnx.NodeProto) -> bool:
        return all(name in self._initializers for name in node.input[1:] if name)

    def reason_against(self, pair: _Pair) -> str | None:
        if pair.between is not None and pair.between.op_type == "Clip":
            return "a Clip cuts all channels at one limit"
        names = (*pair.first.input[1:], pair.second.input[1])
        if any(len(self._readers[name]) > 1 or name in self._open for name in names if name):
            return "its weights are shared"
        return None

    def ratio(self, pair: _Pair) -> float:
        rows, columns = self._ranges(pair)
        return max(_ratio(rows), _ratio(columns))

    def _ranges(self, pair: _Pair) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        second = self._value(pair.second.input[1])
        return (
            _output_ranges(self._value(pair.first.input[1])),
            _input_ranges(second, _group(pair.second)),
        )

    def scale(self, pair: _Pair) -> bool:
        """Divide and multiply; False where all channels are as they should be."""
        rows, columns = self._ranges(pair)
        used = _is_alive(rows) & _is_alive(columns)
        wanted = np.sqrt(np.where(used, rows, 1.0) / np.where(used, columns, 1.0))
        # One factor for all channels changes nothing: only what sets them apart counts.
        wanted /= np.exp(np.log(wanted[used]).mean()) if used.any() else 1.0
        scales = np.where(used, np.exp2(np.round(np.log2(wanted))), 1.0)
        if (scales == 1.0).all():
            return False
        first, second = self._value(pair.first.input[1]), self._value(pair.second.input[1])
        self._values[pair.first.input[1]] = first / _along(scales, 0, first.ndim)
        if len(pair.first.input) > 2 and pair.first.input[2]:
            self._values[pair.first.input[2]] = self._value(pair.first.input[2]) / scales
        group = _group(pair.second)
        grouped = second.reshape(group, -1, *second.shape[1:])
        factors = scales.reshape(group, 1, -1, *([1] * (second.ndim - 2)))
        self._values[pair.second.input[1]] = (grouped * factors).reshape(second.shape)
        return True

    def _value(self, name: str) -> NDArray[Any]:
        if name not in self._values:
            self._values[name] = numpy_helper.to_array(self._initializers[name])
        return self._values[name]

    def store(self) -> None:
        for name, value in self._values.items():
            item = self._initializers[name]
            dtype = numpy_helper.to_array(item).dtype
            item.CopyFrom(numpy_helper.from_array(value.astype(dtype), name))


def _group(node: onnx.NodeProto) -> int:
    return next((int(item.i) for item in node.attribute if item.name == "group"), 1)


def _along(values: NDArray[np.float64], axis: int, rank: int) -> NDArray[np.float64]:
    return values.reshape([-1 if index == axis else 1 for index in range(rank)])

"""Random graphs of the operators that graphfold knows; a seed makes the same graph each time.

Weights keep the magnitude of what passes through them, so a difference is not lost in overflow,
and shapes are followed while the graph grows, so every graph is one that onnxruntime runs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from corpus.cases import Case, Feed

_IR_VERSIONS = {9: 4, 10: 5, 11: 6, 19: 9, 20: 9, 21: 10}
_ELEMENTS = 1 << 16  # no tensor becomes larger than this


def generate(seed: int) -> Case:
    """The random graph of a seed, with feeds."""
    maker = _Maker(seed)
    model = maker.model()
    return Case(
        str(seed),
        "generated",
        model.SerializeToString(),
        maker.feeds(),
        allow_growth=bool(maker.rng.random() < 0.3),
    )


class _Maker:
    """A graph that grows by one operator, or one small motif, at a time."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng([seed, 20260])
        self.opset = int(self.rng.integers(9, 22))
        self.rank = int(self.rng.choice([1, 2, 2, 2, 2, 3]))
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.weights: dict[tuple[int, ...], str] = {}
        self.count = 0
        channels = int(self.rng.choice([1, 2, 3, 4, 6, 8]))
        side = {1: 14, 2: 9, 3: 6}[self.rank]
        sizes = tuple(int(size) for size in self.rng.integers(side - 2, side + 3, self.rank))
        self.shapes["x"] = (int(self.rng.integers(1, 3)), channels, *sizes)
        self.inputs = ["x"]
        self.dynamic_batch = self.chance(0.4)
        self.dynamic_sizes = self.chance(0.25)
        self.values = ["x"]

    # Small tools -----------------------------------------------------------------------------

    def chance(self, probability: float) -> bool:
        return bool(self.rng.random() < probability)

    def pick(self, options: Sequence[Any]) -> Any:
        return options[int(self.rng.integers(len(options)))]

    def name(self, stem: str) -> str:
        self.count += 1
        return f"{stem}{self.count}"

    def op(self, kind: str, inputs: Sequence[str], shape: Sequence[int], **attributes: Any) -> str:
        (out,) = self.several(kind, inputs, [shape], **attributes)
        return out

    def several(
        self,
        kind: str,
        inputs: Sequence[str],
        shapes: Sequence[Sequence[int]],
        **attributes: Any,
    ) -> list[str]:
        outputs = [self.name("t") for _ in shapes]
        name = self.pick(["", outputs[0] + "_node"])
        self.nodes.append(helper.make_node(kind, list(inputs), outputs, name, **attributes))
        for output, shape in zip(outputs, shapes, strict=True):
            self.shapes[output] = tuple(int(size) for size in shape)
        return outputs

    def value(self) -> str:
        """A tensor [N, C, ...] to go on from; mostly the newest."""
        return self.values[-1] if self.chance(0.75) else self.pick(self.values)

    # Constants -------------------------------------------------------------------------------

    def initializer(self, array: Any) -> str:
        name = self.name("c")
        self.initializers.append(numpy_helper.from_array(np.asarray(array), name))
        return name

    def integers(self, values: Sequence[int]) -> str:
        array = np.array(values, dtype=np.int64)
        if self.chance(0.3):
            return self.op("Constant", [], array.shape, value=numpy_helper.from_array(array))
        return self.initializer(array)

    def constant(self, array: Any) -> str:
        """A float constant, stored or computed in one of the ways that exports have."""
        array = np.asarray(array, dtype=np.float32)
        shape = array.shape
        way = int(self.rng.integers(12))
        if way == 0:
            return self.op("Constant", [], shape, value=numpy_helper.from_array(array))
        if way == 1:
            return self.op("Identity", [self.constant(array)], shape)
        if way == 2:
            flat = self.initializer(array.reshape(-1))
            return self.op("Reshape", [flat, self.integers(shape)], shape)
        if way == 3 and array.ndim > 1:
            order = self.rng.permutation(array.ndim)
            stored = self.initializer(np.ascontiguousarray(array.transpose(np.argsort(order))))
            return self.op("Transpose", [stored], shape, perm=[int(axis) for axis in order])
        if way == 4:
            wide = self.initializer(array.astype(np.float64))
            return self.op("Cast", [wide], shape, to=TensorProto.FLOAT)
        if way == 5 and array.size:
            filled = numpy_helper.from_array(array.reshape(-1)[:1])
            if np.all(array == array.reshape(-1)[0]):
                return self.op("ConstantOfShape", [self.integers(shape)], shape, value=filled)
        if way == 6:
            half = self.initializer(array / np.float32(2))
            return self.op("Add", [half, half], shape)
        return self.initializer(array)

    def numbers(self, *shape: int, scale: float = 1.0) -> Any:
        """Numbers of either sign in [0.2, 1] * scale; now and then special ones."""
        if self.chance(0.06):
            return np.full(shape, self.pick([0.0, 1.0, -1.0, 0.5]), dtype=np.float32)
        signs = self.rng.choice([-1.0, 1.0], shape)
        found = self.rng.uniform(0.2, 1.0, shape) * signs * scale
        return np.asarray(found, dtype=np.float32)

    def per_channel(self, source: str) -> str:
        """An operand for elementwise arithmetic: mostly per channel, sometimes something else."""
        _, channels, *sizes = self.shapes[source]
        ones = [1] * len(sizes)
        shapes = [
            *[(1, channels, *ones), (channels, *ones)] * 3,
            (),
            (1,),
            (1, 1, *ones),
            (channels, *sizes),
            (1, channels, *sizes),
            (*ones[:-1], sizes[-1]),
            (*sizes,),
        ]
        if self.dynamic_sizes:
            shapes = shapes[:9]
        return self.constant(self.numbers(*self.pick(shapes)))

    # Operators -------------------------------------------------------------------------------

    def window(self, sizes: Sequence[int]) -> tuple[list[int], list[int], list[int], list[int]]:
        """Kernel, strides, dilations and pads that fit."""
        kernel, strides, dilations, begins, ends = [], [], [], [], []
        uniform = self.chance(0.6)
        first = int(self.rng.choice([1, 1, 2, 3, 3, 5]))
        for size in sizes:
            taps = first if uniform else int(self.rng.choice([1, 1, 2, 3, 3, 5]))
            dilation = int(self.rng.choice([1, 1, 1, 1, 2]))
            reach = (taps - 1) * dilation
            same = self.chance(0.5)
            begin = reach // 2 if same else int(self.rng.integers(0, reach // 2 + 2))
            end = reach - reach // 2 if same else int(self.rng.integers(0, reach // 2 + 2))
            if size + begin + end <= reach:
                taps, dilation, begin, end = 1, 1, 0, 0
            kernel.append(taps)
            dilations.append(dilation)
            strides.append(int(self.rng.choice([1, 1, 1, 2])) if size > 3 else 1)
            begins.append(begin)
            ends.append(end)
        return kernel, strides, dilations, [*begins, *ends]

    def conv(
        self,
        source: str,
        out_channels: int | None = None,
        window: Any = None,
        groups: int | None = None,
    ) -> str:
        batch, channels, *sizes = self.shapes[source]
        kernel, strides, dilations, pads = window or self.window(sizes)
        if groups is None:
            divisors = [g for g in (1, 2, 3, 4, channels) if channels % g == 0]
            groups = self.pick([1, 1, self.pick(divisors), channels])
        if out_channels is None:
            out_channels = groups * int(self.rng.integers(1, max(2, 12 // groups + 1)))
        width = channels // groups
        scale = 1 / math.sqrt(width * math.prod(kernel))
        shape = (out_channels, width, *kernel)
        if shape in self.weights and self.chance(0.3):
            weight = self.weights[shape]
        else:
            weight = self.constant(self.numbers(*shape, scale=1.7 * scale))
            self.weights[shape] = weight
        inputs = [source, weight]
        if self.chance(0.6):
            inputs.append(self.constant(self.numbers(out_channels)))
        attributes: dict[str, Any] = {"strides": strides, "group": groups}
        if self.chance(0.8):
            attributes["kernel_shape"] = kernel
        if any(dilation > 1 for dilation in dilations) or self.chance(0.7):
            attributes["dilations"] = dilations
        auto_pad = self.pick(["", "", "", "", "", "SAME_UPPER", "SAME_LOWER", "VALID"])
        if auto_pad and window is None and max(dilations) == 1:
            attributes["auto_pad"] = auto_pad
            pads = _auto_pads(auto_pad, sizes, kernel, strides)
        elif any(pads) or self.chance(0.7):
            attributes["pads"] = pads
        out = _window_sizes(sizes, kernel, strides, dilations, pads)
        if min(out) < 1:
            return source
        return self.op("Conv", inputs, (batch, out_channels, *out), **attributes)

    def conv_transpose(self, source: str) -> str:
        batch, channels, *sizes = self.shapes[source]
        groups = self.pick([g for g in (1, 1, 2, channels) if channels % g == 0])
        width = int(self.rng.integers(1, 5))
        kernel = [int(self.rng.integers(1, 4)) for _ in sizes]
        strides = [int(self.rng.integers(1, 3)) for _ in sizes]
        extra = [int(self.rng.integers(0, stride)) for stride in strides]
        begins = [int(self.rng.integers(0, taps)) for taps in kernel]
        ends = [int(self.rng.integers(0, taps)) for taps in kernel]
        out = [
            (size - 1) * stride + taps + more - begin - end
            for size, stride, taps, more, begin, end in zip(
                sizes, strides, kernel, extra, begins, ends, strict=True
            )
        ]
        shape = (batch, width * groups, *out)
        if min(out) < 1 or math.prod(shape) > _ELEMENTS:
            return source
        scale = 1 / math.sqrt(channels // groups)
        inputs = [source, self.constant(self.numbers(channels, width, *kernel, scale=scale))]
        if self.chance(0.5):
            inputs.append(self.constant(self.numbers(width * groups)))
        attributes = {"strides": strides, "group": groups, "pads": [*begins, *ends]}
        return self.op("ConvTranspose", inputs, shape, output_padding=extra, **attributes)

    def norm(self, source: str) -> str:
        channels = self.shapes[source][1]
        parameters = [self.constant(self.numbers(channels)) for _ in range(3)]
        variance = self.rng.uniform(0.3, 2.0, channels)
        inputs = [source, *parameters, self.constant(variance)]
        return self.op(
            "BatchNormalization", inputs, self.shapes[source], epsilon=self.pick([1e-5, 1e-3, 0.1])
        )

    def arithmetic(self, source: str) -> str:
        kind = self.pick(["Add", "Add", "Mul", "Mul", "Sub", "Div"])
        operands = [source, self.per_channel(source)]
        if kind != "Div" and self.chance(0.3):
            operands.reverse()
        if kind == "Div":
            # A divisor of zero is another test.
            operands[1] = self.constant(self.rng.uniform(0.5, 2.0, ()))
        return self.op(kind, operands, self.shapes[source])

    def activation(self, source: str) -> str:
        shape = self.shapes[source]
        kind = self.pick(["Relu", "Relu", "Relu", "Clip", "Clip", "Sigmoid", "Tanh", "LeakyRelu"])
        if kind != "Clip":
            return self.op(kind, [source], shape)
        low, high = self.pick([(0.0, 6.0), (-1.0, 1.0), (0.0, None), (None, 0.5), (None, None)])
        if self.opset < 11:
            bounds = {"min": low, "max": high}
            return self.op(
                "Clip", [source], shape, **{k: v for k, v in bounds.items() if v is not None}
            )
        inputs = [source, *("" if end is None else self.constant(end) for end in (low, high))]
        while inputs[-1] == "":
            inputs.pop()
        return self.op("Clip", inputs, shape)

    def pad(self, source: str) -> str:
        batch, channels, *sizes = self.shapes[source]
        begins = [int(self.rng.integers(0, 3)) for _ in sizes]
        ends = [int(self.rng.integers(0, 3)) for _ in sizes]
        mode = self.pick(["constant"] * 5 + ["reflect", "edge"])
        if mode == "reflect" and min(sizes) < 3:
            mode = "edge"
        if mode == "constant" and min(sizes) > 3 and self.chance(0.1):
            begins[0] = -1
        shape = (
            batch,
            channels,
            *(size + b + e for size, b, e in zip(sizes, begins, ends, strict=True)),
        )
        filling = self.pick([0.0, 0.0, 0.0, 0.7])
        if self.opset < 11:
            pads = [0, 0, *begins, 0, 0, *ends]
            return self.op("Pad", [source], shape, pads=pads, mode=mode, value=filling)
        inputs = [source]
        axes = self.opset >= 18 and self.chance(0.5)
        inputs.append(self.integers([*begins, *ends] if axes else [0, 0, *begins, 0, 0, *ends]))
        if filling or self.chance(0.3):
            inputs.append(self.constant(filling))
        if axes:
            inputs += [""] * (3 - len(inputs)) + [self.integers(range(2, len(shape)))]
        return self.op("Pad", inputs, shape, mode=mode)

    def pool(self, source: str) -> str:
        batch, channels, *sizes = self.shapes[source]
        kernel, strides, _, pads = self.window(sizes)
        half = len(sizes)
        pads = [min(pad, taps - 1) for pad, taps in zip(pads, kernel * 2, strict=True)]
        out = _window_sizes(sizes, kernel, strides, [1] * half, pads)
        if min(out) < 1:
            return source
        kind = self.pick(["MaxPool", "AveragePool", "AveragePool"])
        attributes: dict[str, Any] = {"kernel_shape": kernel, "strides": strides, "pads": pads}
        if kind == "AveragePool":
            attributes["count_include_pad"] = int(self.rng.integers(2))
        return self.op(kind, [source], (batch, channels, *out), **attributes)

    def split(self, source: str) -> str:
        """Split over channels; a Concat brings the parts back, in some order."""
        batch, channels, *sizes = self.shapes[source]
        if channels < 2:
            return source
        cut = int(self.rng.integers(1, channels))
        parts = [(batch, cut, *sizes), (batch, channels - cut, *sizes)]
        lengths = [cut, channels - cut]
        if self.opset < 13:
            found = self.several("Split", [source], parts, axis=1, split=lengths)
        else:
            found = self.several("Split", [source, self.integers(lengths)], parts, axis=1)
        if self.chance(0.3):
            return self.pick(found)
        found = [self.linear(part) if self.chance(0.5) else part for part in found]
        if len({self.shapes[part][2:] for part in found}) > 1:
            return found[0]
        if self.chance(0.5):
            found.reverse()
        return self.concat(found)

    def concat(self, parts: Sequence[str]) -> str:
        batch, _, *sizes = self.shapes[parts[0]]
        channels = sum(self.shapes[part][1] for part in parts)
        return self.op("Concat", parts, (batch, channels, *sizes), axis=1)

    def slice(self, source: str) -> str:
        batch, channels, *sizes = self.shapes[source]
        begin = int(self.rng.integers(0, channels))
        end = int(self.rng.integers(begin + 1, channels + 1))
        step = int(self.pick([1, 1, 2]))
        shape = (batch, len(range(begin, end, step)), *sizes)
        if self.opset < 10:
            shape = (batch, end - begin, *sizes)
            return self.op("Slice", [source], shape, axes=[1], starts=[begin], ends=[end])
        inputs = [source, *(self.integers([each]) for each in (begin, end, 1, step))]
        return self.op("Slice", inputs, shape)

    def gather(self, source: str) -> str:
        batch, channels, *sizes = self.shapes[source]
        if self.chance(0.7):
            indices = self.rng.permutation(channels)
        else:
            indices = self.rng.integers(-channels, channels, int(self.rng.integers(1, 9)))
        shape = (batch, len(indices), *sizes)
        return self.op("Gather", [source, self.integers(indices.tolist())], shape, axis=1)

    def shuffle(self, source: str) -> str:
        """Reshape, Transpose, Reshape: channels of g groups interleaved."""
        batch, channels, *sizes = self.shapes[source]
        divisors = [g for g in range(1, channels + 1) if channels % g == 0]
        groups = self.pick(divisors)
        if self.dynamic_sizes:
            return source
        first = [0 if self.dynamic_batch else batch, groups, channels // groups, *sizes]
        wide = (batch, groups, channels // groups, *sizes)
        value = self.op("Reshape", [source, self.integers(first)], wide)
        perm = [0, 2, 1, *range(3, len(wide))]
        value = self.op("Transpose", [value], [wide[axis] for axis in perm], perm=perm)
        last = [0 if self.dynamic_batch else batch, channels, *sizes]
        if self.dynamic_batch and self.chance(0.5):
            last[0], last[1] = -1, channels
        return self.op("Reshape", [value, self.integers(last)], (batch, channels, *sizes))

    def noop(self, source: str) -> str:
        shape = self.shapes[source]
        kind = self.pick(["Identity", "Dropout", "Cast", "wide", "Neg", "Transpose", "Sum"])
        if kind == "Cast":
            return self.op("Cast", [source], shape, to=TensorProto.FLOAT)
        if kind == "wide":
            wide = self.op("Cast", [source], shape, to=TensorProto.DOUBLE)
            return self.op("Cast", [wide], shape, to=TensorProto.FLOAT)
        if kind == "Transpose":
            perm = [0, *range(2, len(shape)), 1]
            moved = self.op("Transpose", [source], [shape[axis] for axis in perm], perm=perm)
            if self.chance(0.4):
                moved = self.op("Relu", [moved], self.shapes[moved])
            back = [0, len(shape) - 1, *range(1, len(shape) - 1)]
            return self.op("Transpose", [moved], shape, perm=back)
        return self.op(kind, [source], shape)

    def linear(self, source: str) -> str:
        """A short run without activations."""
        value = source
        for _ in range(int(self.rng.integers(1, 4))):
            value = self.pick([self.conv, self.conv, self.norm, self.arithmetic])(value)
        return value

    # Motifs ----------------------------------------------------------------------------------

    def residual(self, source: str) -> str:
        """Two or three branches of one input and equal geometry, summed."""
        _, channels, *sizes = self.shapes[source]
        taps = int(self.pick([1, 3, 3, 5]))
        branches = [source] if self.chance(0.6) else []
        ones = [1] * len(sizes)
        for _ in range(int(self.rng.integers(1, 3))):
            kernel = int(self.pick([1, taps]))
            reach = kernel // 2
            window = ([kernel] * len(sizes), ones, ones, [reach] * 2 * len(sizes))
            groups = self.pick([1, channels])
            value = self.conv(source, channels, window, groups)
            if self.chance(0.5):
                value = self.norm(value)
            if self.chance(0.25):
                value = self.activation(value)
            branches.append(value)
        if len(branches) == 1:
            return branches[0]
        if len(branches) > 2 and self.chance(0.5):
            return self.op("Sum", branches, self.shapes[source])
        total = branches[0]
        for branch in branches[1:]:
            kind = self.pick(["Add", "Add", "Add", "Sub"])
            pair = [total, branch] if self.chance(0.5) else [branch, total]
            total = self.op(kind, pair, self.shapes[source])
        return total

    def inception(self, source: str) -> str:
        """Convolutions of one input and equal geometry, concatenated."""
        _, _, *sizes = self.shapes[source]
        window = self.window(sizes)
        parts = [self.conv(source, int(self.rng.integers(1, 5)), window, 1) for _ in range(2)]
        if self.shapes[parts[0]][2:] != self.shapes[parts[1]][2:]:
            return parts[0]
        parts = [self.norm(part) if self.chance(0.3) else part for part in parts]
        return self.concat(parts)

    def inverted(self, source: str) -> str:
        """Pointwise, depthwise, pointwise, with or without activations and skip."""
        _, channels, *sizes = self.shapes[source]
        ones, zeros = [1] * len(sizes), [0] * 2 * len(sizes)
        wide = channels * int(self.rng.integers(1, 4))
        pointwise = (ones, ones, ones, zeros)
        value = self.conv(source, wide, (ones, ones, ones, [int(self.chance(0.3))] * len(zeros)), 1)
        window = ([3] * len(sizes), ones, ones, [1] * len(zeros))
        if min(self.shapes[value][2:]) < 3:
            return value
        value = self.norm(value) if self.chance(0.5) else value
        value = self.conv(value, wide, window, wide)
        value = self.activation(value) if self.chance(0.3) else value
        value = self.conv(value, channels, pointwise, 1)
        if self.shapes[value] == self.shapes[source] and self.chance(0.7):
            return self.op("Add", [value, source], self.shapes[source])
        return value

    def twice(self, source: str) -> str:
        """The same node twice: a common subexpression."""
        out = self.conv(source)
        if out == source:
            return source
        node = onnx.NodeProto()
        node.CopyFrom(self.nodes[-1])
        node.output[0], node.name = self.name("t"), ""
        self.nodes.append(node)
        self.shapes[node.output[0]] = self.shapes[out]
        return self.op(self.pick(["Add", "Mul"]), [out, node.output[0]], self.shapes[out])

    def join(self, source: str) -> str:
        """A sum or product with an earlier tensor of the same shape."""
        others = [other for other in self.values if self.shapes[other] == self.shapes[source]]
        kind = self.pick(["Add", "Add", "Mul", "Sub", "Max"])
        return self.op(kind, [source, self.pick(others)], self.shapes[source])

    # Whole models ----------------------------------------------------------------------------

    _STEPS = (
        ("conv", 26),
        ("conv_transpose", 3),
        ("norm", 9),
        ("arithmetic", 11),
        ("activation", 9),
        ("pad", 5),
        ("pool", 4),
        ("split", 4),
        ("slice", 3),
        ("gather", 3),
        ("shuffle", 3),
        ("noop", 5),
        ("residual", 8),
        ("inception", 4),
        ("inverted", 4),
        ("twice", 2),
        ("join", 4),
    )

    def grow(self) -> None:
        """Add one step."""
        weights = np.array([weight for _, weight in self._STEPS], dtype=float)
        step = self._STEPS[int(self.rng.choice(len(weights), p=weights / weights.sum()))][0]
        result = getattr(self, step)(self.value())
        shape = self.shapes[result]
        if result not in self.values and math.prod(shape) <= _ELEMENTS and shape[1] <= 48:
            self.values.append(result)

    def head(self, source: str) -> str:
        """Pooling or flattening, then a chain of fully connected layers."""
        batch, channels, *sizes = self.shapes[source]
        ones = [1] * len(sizes)
        value, width = source, channels * math.prod(sizes)
        if self.dynamic_sizes or width > 400 or self.chance(0.7):
            value = self.op("GlobalAveragePool", [source], (batch, channels, *ones))
            if self.chance(0.3):
                window = (ones, ones, ones, [0] * 2 * len(sizes))
                value = self.conv(value, int(self.rng.integers(1, 9)), window, 1)
            width = self.shapes[value][1]
        value = self.op("Flatten", [value], (batch, width), axis=1)
        for _ in range(int(self.rng.integers(1, 4))):
            value = self.dense(value)
        return value

    def dense(self, source: str) -> str:
        batch, width = self.shapes[source]
        out = int(self.rng.integers(1, 12))
        scale = 1 / math.sqrt(width)
        if self.chance(0.15):
            return self.op("Relu", [source], (batch, width))
        if self.chance(0.15):
            return self.norm(source)
        if self.chance(0.4):
            weight = self.constant(self.numbers(width, out, scale=scale))
            value = self.op("MatMul", [source, weight], (batch, out))
            if self.chance(0.6):
                bias = self.constant(self.numbers(*self.pick([(out,), (1, out), (1,)])))
                value = self.op("Add", [value, bias], (batch, out))
            return value
        attributes: dict[str, Any] = {}
        transposed = self.chance(0.6)
        if transposed:
            attributes["transB"] = 1
        if self.chance(0.3):
            attributes["alpha"] = 0.5
        shape = (out, width) if transposed else (width, out)
        inputs = [source, self.constant(self.numbers(*shape, scale=scale))]
        if self.opset < 11 or self.chance(0.7):
            inputs.append(self.constant(self.numbers(*self.pick([(out,), (1, out), ()]))))
            if self.chance(0.3):
                attributes["beta"] = 2.0
        return self.op("Gemm", inputs, (batch, out), **attributes)

    def model(self) -> onnx.ModelProto:
        """The whole model."""
        for _ in range(int(self.rng.integers(2, 14))):
            self.grow()
        if len(self.values) == 1:
            self.values.append(self.conv("x", 2, None, 1))
        outputs = [self.head(self.values[-1]) if self.chance(0.35) else self.values[-1]]
        outputs += [
            value for value in self.values[1:-1] if not self._is_read(value) or self.chance(0.06)
        ]
        outputs = [name for name in dict.fromkeys(outputs) if name != "x"][:4]
        if not outputs:
            outputs = [self.op("Relu", ["x"], self.shapes["x"])]
        ir_version = _IR_VERSIONS.get(self.opset, 8)
        infos = [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, self._declared()),
            *self._defaults(),
        ]
        graph = helper.make_graph(
            self.nodes,
            "generated",
            infos,
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
            self.initializers,
        )
        opsets = [helper.make_opsetid("", self.opset)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=ir_version)
        inferred = onnx.shape_inference.infer_shapes(model)
        if self.chance(0.5):
            return inferred
        del model.graph.output[:]
        model.graph.output.extend(inferred.graph.output)
        return model

    def _is_read(self, value: str) -> bool:
        return any(value in node.input for node in self.nodes)

    def _declared(self) -> list[int | str]:
        batch, channels, *sizes = self.shapes["x"]
        return [
            "N" if self.dynamic_batch else batch,
            channels,
            *(f"S{axis}" if self.dynamic_sizes else size for axis, size in enumerate(sizes)),
        ]

    def _defaults(self) -> list[onnx.ValueInfoProto]:
        """Initializers that are inputs too: all, some, or none."""
        share = self.pick([0.0, 0.0, 0.0, 0.0, 0.1, 1.0])
        return [
            helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
            for tensor in self.initializers
            if self.rng.random() < share
        ]

    def feeds(self) -> list[Feed]:
        """One feed, or two where sizes are free."""
        shape = self.shapes["x"]
        shapes = [shape]
        if self.dynamic_batch:
            shapes.append((shape[0] + 1, *shape[1:]))
        if self.dynamic_sizes:
            shapes.append((*shapes[-1][:2], *(size + 3 for size in shape[2:])))
        return [{"x": self.rng.standard_normal(each).astype(np.float32)} for each in shapes]


def _window_sizes(
    sizes: Sequence[int],
    kernel: Sequence[int],
    strides: Sequence[int],
    dilations: Sequence[int],
    pads: Sequence[int],
) -> list[int]:
    half = len(sizes)
    return [
        (sizes[i] + pads[i] + pads[i + half] - (kernel[i] - 1) * dilations[i] - 1) // strides[i] + 1
        for i in range(half)
    ]


def _auto_pads(
    kind: str, sizes: Sequence[int], kernel: Sequence[int], strides: Sequence[int]
) -> list[int]:
    if kind == "VALID":
        return [0] * 2 * len(sizes)
    begins, ends = [], []
    for size, taps, stride in zip(sizes, kernel, strides, strict=True):
        total = max(0, (-(-size // stride) - 1) * stride + taps - size)
        small, large = total // 2, total - total // 2
        begins.append(small if kind == "SAME_UPPER" else large)
        ends.append(large if kind == "SAME_UPPER" else small)
    return [*begins, *ends]

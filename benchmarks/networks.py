"""Networks that the comparison of optimizers builds itself: seeded random weights, numpy alone.

Weights are scaled so that values neither die nor explode, batch normalisation has statistics of its
own, and nothing is zero: a fold that drops a bias cannot pass by luck.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

OPSET = 17
IR_VERSION = 8
# MobileNetV2: expansion, channels, repeats, stride (paper, table 2).
MOBILENET_V2 = (
    *((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2)),
    *((6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)),
)
# RepVGG-A0: channels and blocks per stage.
REPVGG_A0 = ((48, 1), (48, 2), (96, 4), (192, 14), (1280, 1))
VGG16 = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))
VGG19 = ((64, 2), (128, 2), (256, 4), (512, 4), (512, 4))
VGG11 = ((64, 1), (128, 1), (256, 2), (512, 2), (512, 2))


class Network:
    """A graph built node by node; every method returns the tensor that it made."""

    def __init__(self, size: int, seed: int = 0, channels: int = 3) -> None:
        self.rng = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []
        self.channels: dict[str, int] = {}
        self._counts: dict[str, int] = defaultdict(int)
        self.add_input("x", [1, channels, size, size])

    def add_input(self, name: str, shape: Sequence[int]) -> str:
        """One more input of the model."""
        self.inputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))
        self.channels[name] = shape[1]
        return name

    def op(self, op_type: str, *inputs: str, channels: int | None = None, **attributes: Any) -> str:
        """Any node; it has its first input's channels unless told otherwise."""
        self._counts[op_type] += 1
        out = f"{op_type.lower()}{self._counts[op_type]}"
        self.nodes.append(helper.make_node(op_type, list(inputs), [out], name=out, **attributes))
        self.channels[out] = self.channels[inputs[0]] if channels is None else channels
        return out

    def constant(self, name: str, value: Any) -> str:
        """An initializer; one of integers stays one."""
        array = np.asarray(value)
        array = array if array.dtype == np.int64 else array.astype(np.float32)
        self.initializers.append(numpy_helper.from_array(array, name))
        return name

    def shared(self, name: str, value: Any) -> str:
        """An initializer that is made where it is first asked for."""
        made = any(tensor.name == name for tensor in self.initializers)
        return name if made else self.constant(name, value)

    def conv(
        self,
        x: str,
        width: int,
        kernel: int,
        *,
        stride: int = 1,
        pad: int | None = None,
        groups: int = 1,
        bias: bool = False,
        gain: float = 2.0,
    ) -> str:
        """A convolution, padded to keep its size unless `pad` says otherwise."""
        inside = self.channels[x] // groups
        name = f"conv{self._counts['Conv'] + 1}"
        spread = np.sqrt(gain / (inside * kernel * kernel))
        data = self.rng.standard_normal((width, inside, kernel, kernel)) * spread
        inputs = [x, self.constant(f"{name}.weight", data)]
        if bias:
            inputs.append(self.constant(f"{name}.bias", self.rng.uniform(-0.1, 0.1, width)))
        return self.op(
            "Conv",
            *inputs,
            channels=width,
            kernel_shape=[kernel, kernel],
            strides=[stride, stride],
            pads=[(kernel - 1) // 2 if pad is None else pad] * 4,
            group=groups,
        )

    def norm(self, x: str, scale: float = 1.0) -> str:
        """A batch normalisation by statistics of its own."""
        width, name = self.channels[x], f"norm{self._counts['BatchNormalization'] + 1}"
        draw = self.rng.uniform
        parameters = {
            "scale": scale * draw(0.8, 1.2, width),
            "bias": draw(-0.2, 0.2, width),
            "mean": draw(-0.2, 0.2, width),
            "variance": draw(0.7, 1.3, width),
        }
        inputs = [self.constant(f"{name}.{key}", value) for key, value in parameters.items()]
        return self.op("BatchNormalization", x, *inputs, epsilon=1e-5)

    def conv_norm(self, x: str, width: int, kernel: int, **options: Any) -> str:
        """A convolution and its normalisation."""
        return self.norm(self.conv(x, width, kernel, **options))

    def relu6(self, x: str) -> str:
        """A clamp to 0..6 with bounds that all clamps share."""
        return self.op("Clip", x, self.shared("zero", 0.0), self.shared("six", 6.0))

    def linear(self, x: str, width: int) -> str:
        """A fully connected layer."""
        inside, name = self.channels[x], f"fc{self._counts['Gemm'] + 1}"
        weight = self.rng.standard_normal((width, inside)) * inside**-0.5
        bias = self.rng.uniform(-0.1, 0.1, width)
        names = (self.constant(f"{name}.weight", weight), self.constant(f"{name}.bias", bias))
        return self.op("Gemm", x, *names, channels=width, transB=1)

    def classify(self, x: str, classes: int = 1000) -> str:
        """Global pooling and one fully connected layer."""
        return self.linear(self.op("Flatten", self.op("GlobalAveragePool", x)), classes)

    def model(self, output: str) -> onnx.ModelProto:
        """The finished, checked model."""
        info = helper.make_tensor_value_info(output, TensorProto.FLOAT, None)
        graph = helper.make_graph(self.nodes, "net", self.inputs, [info], self.initializers)
        proto = helper.make_model(
            graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION
        )
        inferred = onnx.shape_inference.infer_shapes(proto, data_prop=True)
        graph.output[0].CopyFrom(inferred.graph.output[0])
        proto.graph.CopyFrom(graph)
        onnx.checker.check_model(proto)
        return proto


def open_batch(proto: onnx.ModelProto) -> onnx.ModelProto:
    """The model for any number of samples."""
    del proto.graph.value_info[:]
    for value in (*proto.graph.input, *proto.graph.output):
        value.type.tensor_type.shape.dim[0].dim_param = "N"
    return proto


def mobilenet_v2(size: int = 224, multiplier: float = 1.0) -> onnx.ModelProto:
    """MobileNetV2 with its normalisations."""
    net = Network(size)
    x = net.relu6(net.conv_norm("x", divisible(32 * multiplier), 3, stride=2))
    for expansion, channels, repeats, first in MOBILENET_V2:
        width = divisible(channels * multiplier)
        for index in range(repeats):
            stride, inside = (first if index == 0 else 1), net.channels[x]
            y = x
            if expansion > 1:
                y = net.relu6(net.conv_norm(y, inside * expansion, 1))
            wide = net.channels[y]
            y = net.relu6(net.conv_norm(y, wide, 3, stride=stride, groups=wide))
            y = net.conv_norm(y, width, 1, gain=1.0)
            x = net.op("Add", x, y) if stride == 1 and inside == width else y
    last = divisible(1280 * max(1.0, multiplier))
    return net.model(net.classify(net.relu6(net.conv_norm(x, last, 1))))


def divisible(width: float, divisor: int = 8) -> int:
    """MobileNet's rounding of widths: to a multiple of 8, and never down by more than a tenth."""
    rounded = max(divisor, int(width + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * width else rounded


def resnet18(size: int = 224) -> onnx.ModelProto:
    """ResNet-18 with its normalisations."""
    return _basic_resnet(size, (2, 2, 2, 2))


def resnet34(size: int = 224) -> onnx.ModelProto:
    """ResNet-34 with its normalisations."""
    return _basic_resnet(size, (3, 4, 6, 3))


def _basic_resnet(size: int, blocks: Sequence[int]) -> onnx.ModelProto:
    """Residual blocks of two 3x3 convolutions, in four stages."""
    net = Network(size)
    x = net.op("Relu", net.conv_norm("x", 64, 7, stride=2))
    x = net.op("MaxPool", x, kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])
    for stage, (width, repeats) in enumerate(zip((64, 128, 256, 512), blocks, strict=True)):
        for index in range(repeats):
            stride = 2 if index == 0 and stage else 1
            y = net.op("Relu", net.conv_norm(x, width, 3, stride=stride))
            y = net.norm(net.conv(y, width, 3), scale=0.2)
            if net.channels[x] != width:
                x = net.conv_norm(x, width, 1, stride=stride, gain=1.0)
            x = net.op("Relu", net.op("Add", x, y))
    return net.model(net.classify(x))


def vgg16(size: int = 224) -> onnx.ModelProto:
    """VGG-16's convolutions with their normalisations, and one fully connected layer."""
    return _vgg(size, VGG16)


def vgg19(size: int = 224) -> onnx.ModelProto:
    """VGG-19's convolutions with their normalisations, and one fully connected layer."""
    return _vgg(size, VGG19)


def _vgg(size: int, stages: Sequence[tuple[int, int]]) -> onnx.ModelProto:
    net = Network(size)
    x = "x"
    for width, convolutions in stages:
        for _ in range(convolutions):
            x = net.op("Relu", net.conv_norm(x, width, 3))
        x = net.op("MaxPool", x, kernel_shape=[2, 2], strides=[2, 2])
    return net.model(net.classify(x))


def resnet50(size: int = 224) -> onnx.ModelProto:
    """ResNet-50 with its normalisations."""
    net = Network(size)
    x = net.op("Relu", net.conv_norm("x", 64, 7, stride=2))
    x = net.op("MaxPool", x, kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])
    for width, repeats, first in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
        for index in range(repeats):
            stride = first if index == 0 else 1
            y = net.op("Relu", net.conv_norm(x, width, 1))
            y = net.op("Relu", net.conv_norm(y, width, 3, stride=stride))
            y = net.norm(net.conv(y, 4 * width, 1), scale=0.2)
            if index == 0:
                x = net.conv_norm(x, 4 * width, 1, stride=stride, gain=1.0)
            x = net.op("Relu", net.op("Add", x, y))
    return net.model(net.classify(x))


def segmentation_unet(size: int = 128, width: int = 16) -> onnx.ModelProto:
    """A U-Net of pairs of 3x3 convolutions, pooling and nearest-neighbour upsampling."""
    net = Network(size)

    def pair(x: str, channels: int) -> str:
        for _ in range(2):
            x = net.op("Relu", net.conv_norm(x, channels, 3))
        return x

    x, skips = "x", []
    for level in range(4):
        x = pair(x, width << level)
        skips.append(x)
        x = net.op("MaxPool", x, kernel_shape=[2, 2], strides=[2, 2])
    x = pair(x, width << 4)
    for level in reversed(range(4)):
        twice = net.shared("twice", [1.0, 1.0, 2.0, 2.0])
        x = net.conv(net.op("Resize", x, "", twice, mode="nearest"), width << level, 3, bias=True)
        skip = skips.pop()
        x = net.op("Concat", skip, x, channels=2 * net.channels[skip], axis=1)
        x = pair(x, width << level)
    return net.model(net.conv(x, 2, 1, bias=True))


def deep(nodes: int, width: int = 8, size: int = 8) -> onnx.ModelProto:
    """Conv, BatchNormalization, Relu, Add, over and over: what an optimizer's time grows with."""
    net = Network(size, channels=width)
    x = "x"
    blocks = nodes // 4
    for _ in range(blocks):
        y = net.op("Relu", net.norm(net.conv(x, width, 3, gain=1.0), scale=4 / blocks))
        x = net.op("Add", x, y)
    return net.model(x)


def repvgg(size: int = 224, stages: Sequence[tuple[int, int]] = REPVGG_A0) -> onnx.ModelProto:
    """RepVGG-A0 as it is trained: a 3x3, a 1x1 and, where shapes agree, an identity branch."""
    net = Network(size)
    x = "x"
    for width, blocks in stages:
        for index in range(blocks):
            stride = 2 if index == 0 else 1
            branches = [
                net.conv_norm(x, width, 3, stride=stride, gain=1.0),
                net.conv_norm(x, width, 1, stride=stride, pad=0, gain=0.5),
            ]
            if stride == 1 and net.channels[x] == width:
                branches.append(net.norm(x, scale=0.5))
            total = branches[0]
            for branch in branches[1:]:
                total = net.op("Add", total, branch)
            x = net.op("Relu", total)
    return net.model(net.classify(x))


def expanded_vgg(
    size: int = 224, stages: Sequence[tuple[int, int]] = VGG11, expansion: int = 6
) -> onnx.ModelProto:
    """A VGG-11 whose every convolution is a linear inverted residual block.

    The first pointwise convolution of a block carries the padding, the depthwise one none: a 3x3
    convolution equals the block at the border too.
    """
    net = Network(size)
    x = "x"
    for width, convolutions in stages:
        for _ in range(convolutions):
            inside = net.channels[x] * expansion
            y = net.conv(x, inside, 1, pad=1, gain=1.0)
            y = net.conv(y, inside, 3, pad=0, groups=inside, gain=1.0)
            x = net.op("Relu", net.conv(y, width, 1, bias=True))
        x = net.op("MaxPool", x, kernel_shape=[2, 2], strides=[2, 2])
    return net.model(net.classify(x))


def without_clips(proto: onnx.ModelProto) -> onnx.ModelProto:
    """The same network with every Clip's readers reading what it clips, and no bounds."""
    source = {node.output[0]: node.input[0] for node in proto.graph.node if node.op_type == "Clip"}
    others = [node for node in proto.graph.node if node.op_type != "Clip"]
    read = {name for node in others for name in node.input}
    kept = onnx.ModelProto()
    kept.CopyFrom(proto)
    del kept.graph.node[:]
    for node in others:
        if node.op_type == "Constant" and node.output[0] not in read:
            continue
        copy = kept.graph.node.add()
        copy.CopyFrom(node)
        copy.input[:] = [source.get(name, name) for name in node.input]
    onnx.checker.check_model(kept)
    return kept

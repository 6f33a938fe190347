"""What other optimizers got wrong, one small model each; the campaign asserts equal outputs.

tests/test_features.py asserts of some what must stay, or must fold, beside that.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
from builders import ModelBuilder, nonzero
from onnx import TensorProto, helper

HAZARDS: dict[str, Callable[[], onnx.ModelProto]] = {}


def _hazard(name: str) -> Callable[[Callable[[], onnx.ModelProto]], Callable[[], onnx.ModelProto]]:
    def register(make: Callable[[], onnx.ModelProto]) -> Callable[[], onnx.ModelProto]:
        HAZARDS[name] = make
        return make

    return register


def _builder(opset: int = 17, shape: tuple[int, ...] = (1, 4, 8, 8)) -> ModelBuilder:
    return ModelBuilder(list(shape), opset=opset)


def _times(op_type: str, *shape: int) -> Callable[[], onnx.ModelProto]:
    """Conv with 6 channels and 6 x 6 pixels, then a constant that only looks per channel."""

    def make() -> onnx.ModelProto:
        build = _builder()
        constant = build.constant(nonzero(build.rng, *shape))
        return build.model(build.op(op_type, build.conv("x", 6, 3), constant))

    return make


HAZARDS["Conv times a row as wide as it has channels"] = _times("Mul", 6)
HAZARDS["Conv plus a row as wide as it has channels"] = _times("Add", 6)
HAZARDS["Conv plus a column as high as it has channels"] = _times("Add", 6, 1)
HAZARDS["Conv times a map"] = _times("Mul", 1, 6, 6, 6)
HAZARDS["Conv plus one map for all channels"] = _times("Add", 1, 1, 6, 6)
HAZARDS["Conv plus a constant of rank 5"] = _times("Add", 1, 1, 6, 1, 1)
HAZARDS["Conv times a batch of constants"] = _times("Mul", 3, 6, 1, 1)


@_hazard("one channel broadcast to several")
def _widened() -> onnx.ModelProto:
    build = _builder()
    constant = build.constant(nonzero(build.rng, 6, 1, 1))
    return build.model(build.op("Mul", build.conv("x", 1, 3), constant))


@_hazard("one pixel broadcast to several")
def _spread() -> onnx.ModelProto:
    build = _builder(shape=(1, 4, 3, 3))
    constant = build.constant(nonzero(build.rng, 1, 1, 5, 5))
    return build.model(build.op("Add", build.conv("x", 6, 3), constant))


@_hazard("BatchNormalization in training mode")
def _training() -> onnx.ModelProto:
    build = _builder()
    outputs = ["y", "mean", "variance"]
    return build.model(build.norm(build.conv("x", 6, 3), outputs=outputs, training_mode=1))


@_hazard("BatchNormalization that trains by its outputs")
def _old_training() -> onnx.ModelProto:
    build = _builder(opset=9)
    outputs = ["y", "m", "v", "saved_mean", "saved_variance"]
    build.norm(build.conv("x", 6, 3), outputs=outputs)
    return build.model("y", shapes={"y": [1, 6, 6, 6]})


@_hazard("weight is a graph output")
def _weight_out() -> onnx.ModelProto:
    build = _builder()
    weight = build.constant(nonzero(build.rng, 6, 4, 3, 3), "w")
    y = build.norm(build.conv("x", 6, 3, weight=weight), out="y")
    return build.model(y, "w", shapes={"w": [6, 4, 3, 3]})


@_hazard("two convolutions share their weight")
def _shared() -> onnx.ModelProto:
    build = _builder()
    weight = build.constant(nonzero(build.rng, 4, 4, 3, 3) / 6)
    first = build.norm(build.conv("x", 4, 3, weight=weight))
    return build.model(build.norm(build.conv(build.op("Relu", first), 4, 3, weight=weight)))


@_hazard("weight that callers may replace")
def _overridable() -> onnx.ModelProto:
    build = _builder()
    weight = build.constant(nonzero(build.rng, 6, 4, 3, 3), "w")
    info = helper.make_tensor_value_info("w", TensorProto.FLOAT, [6, 4, 3, 3])
    y = build.norm(build.conv("x", 6, 3, weight=weight))
    return build.model(y, more_inputs=[info])


@_hazard("statistics that callers may replace")
def _overridable_mean() -> onnx.ModelProto:
    build = _builder()
    y = build.norm(build.conv("x", 6, 3))
    name = next(tensor.name for tensor in build.initializers if tensor.name.startswith("mean"))
    return build.model(y, more_inputs=[helper.make_tensor_value_info(name, TensorProto.FLOAT, [6])])


@_hazard("output without a shape")
def _shapeless() -> onnx.ModelProto:
    build = _builder()
    y = build.norm(build.conv("x", 6, 3), out="y")
    proto = build.model(y, build.op("Relu", y, out="z"))
    proto.graph.output[1].type.tensor_type.ClearField("shape")
    return proto


@_hazard("result that two read")
def _two_readers() -> onnx.ModelProto:
    build = _builder()
    conv = build.conv("x", 6, 3)
    return build.model(build.norm(conv, out="y"), build.op("Relu", conv, out="z"))


@_hazard("result that is an output too")
def _also_output() -> onnx.ModelProto:
    build = _builder()
    conv = build.conv("x", 6, 3, out="z")
    return build.model(build.norm(conv, out="y"), "z")


@_hazard("negative padding")
def _cropped() -> onnx.ModelProto:
    build = _builder()
    return build.model(build.conv(build.pad("x", (0, 0, -1, 0), (0, 0, 0, -2)), 6, 3))


@_hazard("padding of channels")
def _more_channels() -> onnx.ModelProto:
    build = _builder()
    padded = build.pad("x", (0, 1, 1, 0), (0, 1, 1, 0))
    build._channels[padded] = 6
    return build.model(build.conv(padded, 6, 3))


@_hazard("padding of the batch")
def _more_images() -> onnx.ModelProto:
    build = _builder()
    return build.model(build.conv(build.pad("x", (1, 0, 0, 0), (0, 0, 1, 1)), 6, 3))


@_hazard("padding with minus infinity before MaxPool")
def _max_pool() -> onnx.ModelProto:
    build = _builder()
    amounts = build.constant([0, 0, 1, 1, 0, 0, 1, 1], dtype=np.int64)
    padded = build.op("Pad", "x", amounts, build.constant(-np.inf))
    return build.model(build.op("MaxPool", padded, kernel_shape=[3, 3]))


@_hazard("padding with zero before MaxPool")
def _max_pool_zero() -> onnx.ModelProto:
    build = _builder()
    padded = build.pad("x", (0, 0, 1, 1), (0, 0, 1, 1))
    return build.model(build.op("MaxPool", padded, kernel_shape=[3, 3]))


def _average(include: int) -> Callable[[], onnx.ModelProto]:
    def make() -> onnx.ModelProto:
        build = _builder()
        padded = build.pad("x", (0, 0, 1, 1), (0, 0, 1, 1))
        attributes = {"kernel_shape": [3, 3], "pads": [1, 0, 0, 1], "count_include_pad": include}
        return build.model(build.conv(build.op("AveragePool", padded, **attributes), 6, 1))

    return make


HAZARDS["AveragePool that counts padding"] = _average(1)
HAZARDS["AveragePool that does not count padding"] = _average(0)


@_hazard("bias of a pointwise convolution at a padded border")
def _border() -> onnx.ModelProto:
    build = _builder()
    return build.model(build.conv(build.conv("x", 24, 1), 6, 3, pad=1))


@_hazard("Dropout in training mode")
def _dropout() -> onnx.ModelProto:
    build = _builder()
    ratio = build.constant(0.0)
    training = build.constant(True, dtype=np.bool_)
    return build.model(build.conv(build.op("Dropout", "x", ratio, training), 6, 3))


@_hazard("division of a constant")
def _reciprocal() -> onnx.ModelProto:
    build = _builder()
    conv = build.op("Relu", build.conv("x", 6, 3))
    shifted = build.op("Add", conv, build.constant(1.0))
    return build.model(build.op("Div", build.constant(2.0), shifted))


@_hazard("square of a convolution")
def _square() -> onnx.ModelProto:
    build = _builder()
    conv = build.conv("x", 6, 3)
    return build.model(build.op("Mul", conv, conv))


@_hazard("twice a convolution")
def _double() -> onnx.ModelProto:
    build = _builder()
    conv = build.conv("x", 6, 3)
    return build.model(build.op("Add", conv, conv))


@_hazard("output that is the input, and the same tensor twice")
def _pass_through() -> onnx.ModelProto:
    build = _builder()
    same = build.op("Identity", "x", out="same")
    return build.model(same, build.op("Identity", "x", out="again"), build.conv("x", 6, 3))


@_hazard("a branch folds, and reads what is outside")
def _branches() -> onnx.ModelProto:
    build = _builder()
    conv = build.norm(build.conv("x", 6, 3), out="z")
    flag = build.constant(True, dtype=np.bool_)
    bodies = {}
    for name, op_type in (("then_branch", "Relu"), ("else_branch", "Neg")):
        node = helper.make_node(op_type, ["z"], [f"{name}_y"])
        info = helper.make_tensor_value_info(f"{name}_y", TensorProto.FLOAT, None)
        bodies[name] = helper.make_graph([node], name, [], [info])
    y = build.op("If", flag, out="y", **bodies)
    return build.model(y, conv)


@_hazard("operator of another domain")
def _custom() -> onnx.ModelProto:
    build = _builder()
    conv = build.norm(build.conv("x", 6, 3), out="z")
    proto = build.model(conv)
    proto.graph.node.append(helper.make_node("Unheard", ["z"], ["y"], domain="org.example"))
    proto.graph.output[0].name = "y"
    proto.opset_import.append(helper.make_opsetid("org.example", 1))
    return proto


@_hazard("two nodes of one name")
def _same_names() -> onnx.ModelProto:
    build = _builder()
    proto = build.model(build.norm(build.conv(build.op("Relu", build.conv("x", 6, 3)), 4, 3)))
    for node in proto.graph.node:
        node.name = "node"
    return proto

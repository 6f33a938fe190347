"""The models that mutation starts from: small, and between them every kind of content."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import rich_model
import small_models as small
from builders import ModelBuilder
from onnx import TensorProto, helper

SHARED = Path(__file__).parents[2].parent / "shared" / "models"
SHARED_NAMES = (
    *("mtcnn_pnet", "mlperftiny_kws_dscnn", "mlperftiny_resnet8_int8", "fer_mini_xception"),
)
_FLOAT, _INT64, _BOOL = TensorProto.FLOAT, TensorProto.INT64, TensorProto.BOOL


def _residual() -> onnx.ModelProto:
    build = ModelBuilder([1, 4, 8, 8])
    value = build.conv(build.norm(build.conv("x", 8, kernel=1)), 8, kernel=3, pad=1, groups=8)
    value = build.conv(value, 4, kernel=1)
    return build.model(build.op("Relu", build.op("Add", value, "x")))


def _branches() -> onnx.ModelProto:
    build = ModelBuilder(["N", 4, 8, 8])
    three = build.norm(build.conv("x", 4, kernel=3, pad=1))
    one = build.norm(build.conv("x", 4, kernel=1))
    total = build.op("Sum", three, one, build.norm("x"))
    joined = build.op("Concat", build.op("Relu", total), build.conv("x", 2, kernel=1), axis=1)
    return build.model(joined)


def _reshaped() -> onnx.ModelProto:
    """Sizes computed at run time, padding, a shuffle, fully connected layers."""
    nodes = [
        helper.make_node("Pad", ["x", "pads"], ["padded"]),
        helper.make_node("Conv", ["padded", "w"], ["c"]),
        helper.make_node("Reshape", ["c", "five"], ["r"]),
        helper.make_node("Transpose", ["r"], ["t"], perm=[0, 2, 1, 3, 4]),
        helper.make_node("Reshape", ["t", "four"], ["s"]),
        helper.make_node("ConstantOfShape", ["one"], ["fill"], value=_tensor([2.0])),
        helper.make_node("Mul", ["s", "fill"], ["m"]),
        helper.make_node("Shape", ["m"], ["shape"]),
        helper.make_node("Gather", ["shape", "zero"], ["n"], axis=0),
        helper.make_node("Unsqueeze", ["n", "axes"], ["n1"]),
        helper.make_node("Concat", ["n1", "minus"], ["flat"], axis=0),
        helper.make_node("Reshape", ["m", "flat"], ["f"]),
        helper.make_node("MatMul", ["f", "g"], ["h"]),
        helper.make_node("Add", ["h", "b"], ["h2"]),
        helper.make_node("Gemm", ["h2", "g2", "b2"], ["y"], transB=1, alpha=0.5),
    ]
    constants = {
        "pads": np.array([0, 0, 1, 1, 0, 0, 1, 1]),
        "w": small.weight(4, 2, 3, 3),
        "five": np.array([-1, 2, 2, 4, 4]),
        "four": np.array([-1, 4, 4, 4]),
        "one": np.array([1]),
        "zero": np.array(0),
        "axes": np.array([0]),
        "minus": np.array([-1]),
        "g": small.weight(64, 6),
        "b": small.weight(6),
        "g2": small.weight(3, 6),
        "b2": small.weight(3),
    }
    return small.build(nodes, {"x": ["N", 2, 4, 4]}, ["y"], constants)


def _tensor(values: list[float]) -> onnx.TensorProto:
    return helper.make_tensor("value", _FLOAT, [len(values)], values)


def _info(name: str, kind: int, dims: list[int | str] | None) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, dims)


def _branch_graph(name: str) -> onnx.GraphProto:
    nodes = [
        helper.make_node("Conv", ["c", "w2"], [f"{name}_1"]),
        helper.make_node("BatchNormalization", [f"{name}_1", *"stmv"], [f"{name}_2"]),
    ]
    return helper.make_graph(nodes, name, [], [_info(f"{name}_2", _FLOAT, None)])


def _subgraphs() -> onnx.ModelProto:
    """If around convolutions that read the outer graph, Loop, and Scan."""
    body = helper.make_graph(
        [
            helper.make_node("Identity", ["cond_in"], ["cond_out"]),
            helper.make_node("Mul", ["state", "s4"], ["scaled"]),
            helper.make_node("Conv", ["scaled", "w2"], ["next"]),
        ],
        "body",
        [_info("i", _INT64, []), _info("cond_in", _BOOL, []), _info("state", _FLOAT, None)],
        [_info("cond_out", _BOOL, []), _info("next", _FLOAT, None)],
    )
    scan = helper.make_graph(
        [
            helper.make_node("Add", ["carry", "row"], ["sum"]),
            helper.make_node("Identity", ["sum"], ["scanned"]),
        ],
        "scan",
        [_info("carry", _FLOAT, [4, 6, 6]), _info("row", _FLOAT, [4, 6, 6])],
        [_info("sum", _FLOAT, [4, 6, 6]), _info("scanned", _FLOAT, [4, 6, 6])],
    )
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"]),
        helper.make_node("ReduceMax", ["c"], ["top"], keepdims=0),
        helper.make_node("Greater", ["top", "threshold"], ["flag"]),
        helper.make_node(
            "If",
            ["flag"],
            ["chosen"],
            then_branch=_branch_graph("then"),
            else_branch=_branch_graph("else"),
        ),
        helper.make_node("Loop", ["trips", "yes", "chosen"], ["looped"], body=body),
        helper.make_node("Scan", ["start", "looped"], ["last", "y"], body=scan, num_scan_inputs=1),
    ]
    constants = {
        "w": small.weight(4, 3, 3, 3),
        "w2": small.weight(4, 4, 1, 1),
        "s4": small.weight(1, 4, 1, 1),
        "threshold": np.float32(0.1),
        "trips": np.array(2),
        "yes": np.array(True),
        "start": np.zeros((4, 6, 6), np.float32),
        **{name: small.weight(4, seed=at) ** 2 + 0.5 for at, name in enumerate("stmv")},
    }
    return small.build(nodes, {"x": [2, 3, 8, 8]}, ["y", "last"], constants)


def _functions() -> onnx.ModelProto:
    """A function that calls another, with an attribute of the caller."""
    opset = [helper.make_opsetid("", 17), helper.make_opsetid("local", 1)]
    inner = helper.make_function(
        "local", "Scale", ["a", "w"], ["c"], [helper.make_node("Conv", ["a", "w"], ["c"])], opset
    )
    leaky = helper.make_node("LeakyRelu", ["s"], ["o"])
    leaky.attribute.add(name="alpha", ref_attr_name="slope", type=onnx.AttributeProto.FLOAT)
    outer = helper.make_function(
        "local",
        "Block",
        ["a", "w"],
        ["o"],
        [helper.make_node("Scale", ["a", "w"], ["s"], domain="local"), leaky],
        opset,
        ["slope"],
    )
    nodes = [
        helper.make_node("Block", ["x", "w"], ["b"], domain="local", slope=0.25),
        helper.make_node("Conv", ["b", "w"], ["c"]),
        helper.make_node("Mul", ["c", "s"], ["y"]),
    ]
    constants = {"w": small.weight(3, 3, 1, 1), "s": small.weight(3, 1, 1)}
    model = small.build(
        nodes, {"x": [1, 3, 6, 6]}, {"y": _FLOAT}, constants, extra_opsets=opset[1:]
    )
    model.functions.extend([inner, outer])
    return model


def _quantized() -> onnx.ModelProto:
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["xq"]),
        helper.make_node("DequantizeLinear", ["xq", "s", "z"], ["xd"]),
        helper.make_node("DequantizeLinear", ["wq", "ws", "wz"], ["wd"], axis=0),
        helper.make_node("Conv", ["xd", "wd"], ["c"]),
        helper.make_node("QuantizeLinear", ["c", "s", "z"], ["cq"]),
        helper.make_node("QLinearConv", ["cq", "s", "z", "vq", "s", "z8", "s", "z"], ["oq"]),
        helper.make_node("DequantizeLinear", ["oq", "s", "z"], ["y"]),
    ]
    constants = {
        "s": np.float32(0.05),
        "z": np.uint8(128),
        "z8": np.int8(0),
        "wq": (small.weight(4, 3, 1, 1) * 60).astype(np.int8),
        "ws": np.full(4, 0.02, np.float32),
        "wz": np.zeros(4, np.int8),
        "vq": (small.weight(2, 4, 1, 1) * 60).astype(np.int8),
    }
    return small.build(nodes, {"x": [1, 3, 5, 5]}, {"y": _FLOAT}, constants)


def _sequences() -> onnx.ModelProto:
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"]),
        helper.make_node("SplitToSequence", ["c", "one"], ["parts"], axis=1),
        helper.make_node("SequenceAt", ["parts", "index"], ["part"]),
        helper.make_node("SequenceConstruct", ["part", "part"], ["pair"]),
        helper.make_node("ConcatFromSequence", ["pair"], ["joined"], axis=1),
        helper.make_node("Optional", ["joined"], ["maybe"]),
        helper.make_node("OptionalGetElement", ["maybe"], ["got"]),
        helper.make_node("Conv", ["got", "v"], ["y"]),
    ]
    constants = {
        "w": small.weight(4, 3, 1, 1),
        "v": small.weight(3, 2, 1, 1),
        "one": np.array(1),
        "index": np.array(2),
    }
    return small.build(nodes, {"x": [1, 3, 5, 5]}, {"y": _FLOAT}, constants)


def _transposed() -> onnx.ModelProto:
    build = ModelBuilder([1, 4, 6, 6])
    weight = build.constant(small.weight(4, 3, 3, 3))
    value = build.op("ConvTranspose", "x", weight, channels=3, strides=[2, 2])
    value = build.op("Resize", build.norm(value), "", build.constant([1.0, 1.0, 2.0, 2.0]))
    value = build.op("Clip", value, build.constant(0.0), build.constant(6.0))
    return build.model(build.op("AveragePool", value, kernel_shape=[2, 2], strides=[2, 2]))


def _normalised() -> onnx.ModelProto:
    """Linear operators one after another, so that most rewrites have work."""
    build = ModelBuilder(["N", 3, "H", "W"])
    value = build.op("Sub", "x", build.constant(small.weight(1, 3, 1, 1)), channels=3)
    value = build.op("Div", value, build.constant(small.weight(1, 3, 1, 1) + 2), channels=3)
    value = build.norm(build.conv(value, 6, kernel=3))
    value = build.conv(value, 4, kernel=1)
    value = build.op("Identity", build.op("Mul", value, build.constant(0.5), channels=4))
    value = build.op("Relu", build.op("Relu", value))
    return build.model(build.op("GlobalAveragePool", value))


def _external() -> onnx.ModelProto:
    """Its larger tensors go into a data file, see `write`."""
    return small.conv_bn_relu(8, batch=1)


BUILT: dict[str, Callable[[], onnx.ModelProto]] = {
    "conv_bn_relu": small.conv_bn_relu,
    "pointwise_then_padded": small.pointwise_then_padded,
    "chain": lambda: small.chain(1.5, 0.5, 2.0),
    "custom_operator": small.custom_operator,
    "rich": rich_model.rich_model,
    "residual": _residual,
    "branches": _branches,
    "reshaped": _reshaped,
    "subgraphs": _subgraphs,
    "functions": _functions,
    "quantized": _quantized,
    "sequences": _sequences,
    "transposed": _transposed,
    "normalised": _normalised,
    "external": _external,
}
EXTERNAL = "external"


def base_models(*, with_shared: bool = True) -> dict[str, bytes]:
    """All base models by name, as bytes; the shared ones where they are there."""
    found = {name: make().SerializeToString(deterministic=True) for name, make in BUILT.items()}
    for name in SHARED_NAMES:
        path = SHARED / f"{name}.onnx"
        if with_shared and path.is_file():
            found[name] = path.read_bytes()
    return found

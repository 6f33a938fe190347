"""Small models for tests of everything that reads or runs whole models."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

RNG_SEED = 7


def build(
    nodes: list[onnx.NodeProto],
    inputs: dict[str, list],
    outputs: list[str] | dict[str, int],
    constants: dict[str, np.ndarray] | None = None,
    *,
    opset: int = 17,
    types: dict[str, int] | None = None,
    extra_opsets: list[onnx.OperatorSetIdProto] | None = None,
) -> onnx.ModelProto:
    """A model from nodes; inputs are float unless `types` says otherwise."""
    types = types or {}
    kinds = outputs if isinstance(outputs, dict) else dict.fromkeys(outputs, TensorProto.FLOAT)
    graph = helper.make_graph(
        nodes,
        "small",
        [
            helper.make_tensor_value_info(name, types.get(name, TensorProto.FLOAT), shape)
            for name, shape in inputs.items()
        ],
        [helper.make_tensor_value_info(name, kind, None) for name, kind in kinds.items()],
        [numpy_helper.from_array(value, name) for name, value in (constants or {}).items()],
    )
    imports = [helper.make_opsetid("", opset), *(extra_opsets or [])]
    model = helper.make_model(graph, opset_imports=imports, ir_version=8)
    if isinstance(outputs, list):
        model = onnx.shape_inference.infer_shapes(model)
    return model


def weight(*shape: int, seed: int = RNG_SEED) -> np.ndarray:
    """Random float32 weights of unit output scale."""
    fan_in = int(np.prod(shape[1:])) or 1
    values = np.random.default_rng([seed, *shape]).standard_normal(shape)
    return (values / np.sqrt(fan_in)).astype(np.float32)


def conv_bn_relu(size: object = 8, *, batch: object = "N") -> onnx.ModelProto:
    """x -> Conv 3x3 (3 to 4) -> BatchNormalization -> Relu -> GlobalAveragePool -> Gemm (5)."""
    nodes = [
        helper.make_node("Conv", ["x", "w", "b"], ["conv"], name="conv", pads=[1, 1, 1, 1]),
        helper.make_node("BatchNormalization", ["conv", "s", "t", "m", "v"], ["bn"], name="bn"),
        helper.make_node("Relu", ["bn"], ["relu"], name="relu"),
        helper.make_node("GlobalAveragePool", ["relu"], ["pool"], name="pool"),
        helper.make_node("Flatten", ["pool"], ["flat"], name="flat"),
        helper.make_node("Gemm", ["flat", "g", "h"], ["y"], name="fc", transB=1),
    ]
    constants = {
        "w": weight(4, 3, 3, 3),
        "b": weight(4),
        "s": weight(4) + 1,
        "t": weight(4),
        "m": weight(4),
        "v": weight(4) ** 2 + 0.5,
        "g": weight(5, 4),
        "h": weight(5),
    }
    return build(nodes, {"x": [batch, 3, size, size]}, ["y"], constants)


def pointwise_then_padded(*, merged: bool = False, scale: float = 1.0) -> onnx.ModelProto:
    """1x1 with bias, then a zero-padded 3x3; merged naively, its bias is wrong at the border."""
    first, bias, second = weight(6, 3, 1, 1), weight(6) + 1, weight(4, 6, 3, 3)
    if merged:
        kernel = np.einsum("omhw,mi->oihw", second, first[:, :, 0, 0]) * scale
        folded_bias = np.einsum("omhw,m->o", second, bias)
        nodes = [helper.make_node("Conv", ["x", "w", "b"], ["y"], pads=[1, 1, 1, 1])]
        constants = {"w": kernel.astype(np.float32), "b": folded_bias.astype(np.float32)}
        return build(nodes, {"x": ["N", 3, 8, 8]}, ["y"], constants)
    nodes = [
        helper.make_node("Conv", ["x", "w1", "b1"], ["z"], name="first"),
        helper.make_node("Conv", ["z", "w2"], ["y"], name="second", pads=[1, 1, 1, 1]),
    ]
    constants = {"w1": first, "b1": bias, "w2": second}
    return build(nodes, {"x": ["N", 3, 8, 8]}, ["y"], constants)


def chain(*factors: float) -> onnx.ModelProto:
    """x -> depthwise 1x1 by each factor -> ...: tensors t0, t1, ..., the last is the output."""
    nodes, constants, source = [], {}, "x"
    for index, factor in enumerate(factors):
        constants[f"w{index}"] = np.full((2, 1, 1, 1), factor, dtype=np.float32)
        nodes.append(helper.make_node("Conv", [source, f"w{index}"], [f"t{index}"], group=2))
        source = f"t{index}"
    return build(nodes, {"x": ["N", 2, 4, 4]}, [source], constants)


def custom_operator() -> onnx.ModelProto:
    """A valid model that onnxruntime cannot load."""
    nodes = [helper.make_node("Unheard", ["x"], ["y"], domain="org.example")]
    return build(
        nodes,
        {"x": [1, 3]},
        {"y": TensorProto.FLOAT},
        extra_opsets=[helper.make_opsetid("org.example", 1)],
    )

"""Every element type and quantised form: floats are folded in their type, the rest is untouched."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from builders import ModelBuilder, nonzero, op_types, random_input
from onnx import TensorProto, helper, numpy_helper
from onnxruntime import quantization
from survivors import assert_survives, optimized_twice, ran

from graphfold.model import save

FLOATS = {
    TensorProto.FLOAT16: 2e-2,
    TensorProto.BFLOAT16: 1e-1,
    TensorProto.FLOAT: 2e-5,
    TensorProto.DOUBLE: 1e-12,
}
SMALL = [
    *(TensorProto.FLOAT8E4M3FN, TensorProto.FLOAT8E4M3FNUZ),
    *(TensorProto.FLOAT8E5M2, TensorProto.FLOAT8E5M2FNUZ, TensorProto.FLOAT8E8M0),
    *(TensorProto.INT4, TensorProto.UINT4, TensorProto.FLOAT4E2M1),
    *(TensorProto.INT2, TensorProto.UINT2),
]
OTHERS = [
    *(TensorProto.BOOL, TensorProto.INT8, TensorProto.INT16, TensorProto.INT32, TensorProto.INT64),
    *(TensorProto.UINT8, TensorProto.UINT16, TensorProto.UINT32, TensorProto.UINT64),
    *(TensorProto.COMPLEX64, TensorProto.COMPLEX128, TensorProto.STRING),
]


def kind_name(kind: int) -> str:
    return TensorProto.DataType.Name(kind)


def tensor_of(name: str, kind: int, count: int = 8) -> onnx.TensorProto:
    if kind == TensorProto.STRING:
        return helper.make_tensor(name, kind, [count], [f"text {i}".encode() for i in range(count)])
    if kind == TensorProto.FLOAT8E8M0:
        return helper.make_tensor(name, kind, [count], bytes(range(120, 120 + count)), raw=True)
    values = [number % 2 for number in range(count)]
    return helper.make_tensor(name, kind, [count], values)


def as_type(model: onnx.ModelProto, kind: int) -> onnx.ModelProto:
    """A float model in another floating-point type."""
    for tensor in model.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT:
            values = numpy_helper.to_array(tensor).astype(helper.tensor_dtype_to_np_dtype(kind))
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    for info in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        info.type.tensor_type.elem_type = kind
    onnx.checker.check_model(model)
    return model


def conv_norm(opset: int = 22, size: int = 6) -> ModelBuilder:
    build = ModelBuilder([1, 4, size, size], opset=opset, ir_version=10)
    build.op("Relu", build.norm(build.conv("x", 4, 3, pad=1), out="normed"), out="y")
    return build


@pytest.mark.parametrize("kind", FLOATS, ids=kind_name)
def test_floating_point_models_are_folded_in_their_own_type(kind: int) -> None:
    model = as_type(conv_norm().model("y"), kind)
    result = optimized_twice(model)
    assert op_types(result.model) == ["Conv", "Relu"]
    assert {tensor.data_type for tensor in result.model.graph.initializer} == {kind}
    if kind in (TensorProto.FLOAT, TensorProto.FLOAT16):  # what this runtime convolves
        assert_survives(model, [random_input(model)], tolerance=FLOATS[kind])
    weight = numpy_helper.to_array(result.model.graph.initializer[0]).astype(np.float64)
    exact = optimized_twice(conv_norm().model("y")).model.graph.initializer[0]
    expected = numpy_helper.to_array(exact).astype(np.float64)
    scale = np.max(np.abs(expected))
    np.testing.assert_allclose(weight, expected, atol=scale * max(FLOATS[kind], 1e-6))


@pytest.mark.parametrize("kind", [*SMALL, *OTHERS], ids=kind_name)
def test_other_types_pass_through_beside_what_is_folded(kind: int, tmp_path: Path) -> None:
    build = conv_norm(opset=26)
    build.ir_version = 13
    model = build.model("y")
    model.graph.initializer.append(tensor_of("stored", kind))
    value = tensor_of("also", kind)
    model.graph.node.append(helper.make_node("Constant", [], ["made"], value=value, name="made"))
    custom = helper.make_node("Keep", ["stored", "made"], ["kept"], domain="custom", name="keep")
    model.graph.node.append(custom)
    model.graph.output.append(helper.make_tensor_value_info("kept", TensorProto.FLOAT, [1]))
    model.opset_import.append(helper.make_opsetid("custom", 1))
    result = optimized_twice(model)
    assert op_types(result.model)[:2] == ["Conv", "Relu"]
    verification = result.report.verification
    assert verification is not None
    assert verification.passed is None  # nobody here knows the operator
    kept = {tensor.name: tensor for tensor in result.model.graph.initializer}
    assert kept["stored"] == model.graph.initializer[-1]
    if "made" in kept:
        before = onnx.numpy_helper.to_array(value).tobytes()
        assert onnx.numpy_helper.to_array(kept["made"]).tobytes() == before
        assert kept["made"].data_type == kind
    out = tmp_path / "m.onnx"
    save(result.folded, out, external_data="always")
    onnx.checker.check_model(str(out))
    again = {tensor.name: tensor for tensor in onnx.load(out).graph.initializer}
    assert again["stored"] == model.graph.initializer[-1]


@pytest.mark.parametrize(
    "kind", [k for k in SMALL if k not in (TensorProto.FLOAT8E8M0,)], ids=kind_name
)
def test_quantised_weights_of_small_types_stay_quantised(kind: int) -> None:
    build = ModelBuilder([1, 4], opset=25, ir_version=13)
    count = 4 * 4
    values = tensor_of("codes", kind, count)
    values.dims[:] = [4, 4]
    build.initializers.append(values)
    scale = build.constant(np.full(4, 0.25))
    weight = build.op("DequantizeLinear", "codes", scale, axis=1)
    first = build.op("MatMul", "x", weight)
    build.op("Add", first, build.constant(nonzero(build.rng, 4)), out="y")
    model = build.model("y", shapes={"y": [1, 4]})
    result = optimized_twice(model)
    assert op_types(result.model).count("DequantizeLinear") == 1
    kept = {tensor.name: tensor for tensor in result.model.graph.initializer}
    assert kept["codes"] == values


def test_strings_go_through_a_model_that_runs() -> None:
    build = conv_norm()
    model = build.model("y")
    model.graph.initializer.append(tensor_of("words", TensorProto.STRING))
    model.graph.node.append(helper.make_node("Identity", ["words"], ["text"], name="text"))
    model.graph.output.append(helper.make_tensor_value_info("text", TensorProto.STRING, [8]))
    result = assert_survives(model, [random_input(model)])
    words = ran(result.model, random_input(model))[1]
    assert words.tolist() == [f"text {number}" for number in range(8)]


class Calibration(quantization.CalibrationDataReader):
    """A few random images."""

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        shape = (1, 4, 6, 6)
        self.left = [{"x": rng.standard_normal(shape).astype(np.float32)} for _ in range(4)]

    def get_next(self) -> dict[str, Any] | None:
        return self.left.pop() if self.left else None


@pytest.mark.parametrize("form", ["QDQ", "QOperator"])
@pytest.mark.parametrize("per_channel", [False, True])
def test_quantised_models_keep_every_step(form: str, per_channel: bool, tmp_path: Path) -> None:
    build = ModelBuilder([1, 4, 6, 6], opset=17)
    value = build.op("Relu", build.conv("x", 4, 3, pad=1))
    build.op("Add", build.conv(value, 4, 3, pad=1), value, out="y")
    source, target = tmp_path / "float.onnx", tmp_path / "quantised.onnx"
    onnx.save(build.model("y"), source)
    quantization.quantize_static(
        source,
        target,
        Calibration(),
        quant_format=quantization.QuantFormat[form],
        per_channel=per_channel,
        extra_options={"ActivationSymmetric": False},
    )
    model = onnx.load(target)
    feed = random_input(model)
    result = assert_survives(model, [feed], untouched_ok=True)
    quantised = [op for op in op_types(model) if "Linear" in op or op.startswith("Q")]
    assert [op for op in op_types(result.model) if op in quantised] == quantised
    for one, two in zip(ran(model, feed), ran(result.model, feed), strict=True):
        np.testing.assert_array_equal(two, one)


def test_dynamically_quantised_models_survive(tmp_path: Path) -> None:
    build = ModelBuilder([2, 8], opset=17)
    value = build.op("Relu", build.op("MatMul", "x", build.constant(nonzero(build.rng, 8, 8))))
    build.op("MatMul", value, build.constant(nonzero(build.rng, 8, 4)), out="y")
    source, target = tmp_path / "float.onnx", tmp_path / "quantised.onnx"
    onnx.save(build.model("y"), source)
    quantization.quantize_dynamic(source, target)
    model = onnx.load(target)
    result = assert_survives(model, [random_input(model)], untouched_ok=True)
    assert "MatMulInteger" in op_types(result.model)


@pytest.mark.needs_shared
def test_a_real_quantised_network_computes_the_same_bits(shared: Path) -> None:
    model = onnx.load(shared / "models" / "mlperftiny_resnet8_int8.onnx")
    rng = np.random.default_rng(0)
    info = model.graph.input[0]
    shape = [dim.dim_value or 1 for dim in info.type.tensor_type.shape.dim]
    kind = helper.tensor_dtype_to_np_dtype(info.type.tensor_type.elem_type)
    feed = {info.name: rng.uniform(-100, 100, shape).astype(kind)}
    result = assert_survives(model, [feed], untouched_ok=True)
    for one, two in zip(ran(model, feed), ran(result.model, feed), strict=True):
        np.testing.assert_array_equal(two, one)

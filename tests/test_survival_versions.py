"""Every operator set and IR version: folded where it can be, equal, and nothing else changed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from builders import ModelBuilder, nonzero, op_types, random_input
from onnx import TensorProto, helper
from survivors import assert_survives, optimized_twice, through_files

import graphfold
from graphfold.errors import ModelError

NEWEST = onnx.defs.onnx_opset_version()
# The newest operator sets and the IR versions that the installed onnxruntime loads.
RUNTIME_OPSET = 26
RUNTIME_IR = 13


def ints(build: ModelBuilder, *values: int) -> str:
    return build.constant(values, dtype=np.int64)


def ir_version(opset: int) -> int:
    return 4 if opset < 9 else 8 if opset < 20 else 10


def initializers_as_inputs(build: ModelBuilder) -> list[onnx.ValueInfoProto]:
    return [
        helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
        for tensor in build.initializers
    ]


def network(opset: int, version: int | None = None) -> onnx.ModelProto:
    """Operators whose form changed over the operator sets, each as this one writes it."""
    build = ModelBuilder([1, 3, 8, 8], opset=opset, ir_version=version or ir_version(opset))
    value = build.pad("x", (0, 0, 1, 1), (0, 0, 1, 1))
    value = (
        build.norm(build.conv(value, 4, 3), spatial=1)
        if opset < 9
        else build.norm(build.conv(value, 4, 3))
    )
    value = build.op("Relu", value)
    if opset < 11:
        value = build.op("Clip", value, min=0.0, max=6.0)
    else:
        value = build.op("Clip", value, build.constant(0.0), build.constant(6.0))
    if opset < 12:
        value = build.op("Dropout", value, ratio=0.4)
    else:
        value = build.op("Dropout", value, build.constant(0.4))
    if opset < 18:
        value = build.op("ReduceMean", value, axes=[2, 3], keepdims=1)
    else:
        value = build.op("ReduceMean", value, ints(build, 2, 3), keepdims=1)
    if opset < 13:
        value = build.op("Squeeze", build.op("Squeeze", value, axes=[3]), axes=[2])
        value = build.op("Unsqueeze", value, axes=[2, 3])
    else:
        value = build.op("Squeeze", value, ints(build, 3))
        value = build.op("Squeeze", value, ints(build, 2))
        value = build.op("Unsqueeze", value, ints(build, 2, 3))
    value = build.op("Flatten", value)
    for width in (5, 3):
        weight = build.constant(nonzero(build.rng, width, 4 if width == 5 else 5))
        value = build.op("Gemm", value, weight, build.constant(nonzero(build.rng, width)), transB=1)
    # Before IR version 4 every initializer had to be an input.
    return build.model(value, more_inputs=initializers_as_inputs(build) if version == 3 else ())


def assert_folded(model: onnx.ModelProto) -> None:
    found = op_types(model)
    assert found.count("Conv") == 1
    assert found.count("Gemm") == 1
    assert not {"BatchNormalization", "Pad", "Dropout", "Relu"} & set(found)


@pytest.mark.parametrize("opset", range(7, RUNTIME_OPSET + 1))
def test_operator_sets(opset: int) -> None:
    model = network(opset)
    result = assert_survives(model, [random_input(model)])
    assert_folded(result.model)
    assert result.model.opset_import[0].version == opset
    assert result.model.ir_version == model.ir_version


@pytest.mark.parametrize("opset", range(RUNTIME_OPSET + 1, NEWEST + 1))
def test_operator_sets_that_the_runtime_does_not_load_are_folded_unverified(
    opset: int, tmp_path: Path
) -> None:
    model = network(opset)
    result = optimized_twice(model)
    assert_folded(result.model)
    verification = result.report.verification
    assert verification is not None
    assert verification.passed is None
    assert verification.reason is not None
    assert "onnxruntime cannot load it" in verification.reason
    path = tmp_path / "m.onnx"
    onnx.save(model, path)
    out, document = through_files(path)
    assert document["verification"] is None
    assert "onnxruntime cannot load it" in document["reason"]
    assert_folded(onnx.load(out))


@pytest.mark.parametrize("version", range(4, onnx.IR_VERSION + 1))
def test_ir_versions(version: int) -> None:
    model = network(17, version)
    if version <= RUNTIME_IR:
        result = assert_survives(model, [random_input(model)])
    else:
        result = optimized_twice(model)
    assert_folded(result.model)
    assert result.model.ir_version == version


@pytest.mark.parametrize("opset", [7, 9, 13, 17])
def test_ir_version_3_where_every_initializer_is_an_input(opset: int) -> None:
    model = network(opset, 3)
    feed = random_input(model)
    result = assert_survives(model, [feed])
    found = op_types(result.model)
    assert found.count("Conv") == 1
    assert "BatchNormalization" not in found


def test_an_ir_version_from_the_future_is_a_clear_error() -> None:
    model = network(17)
    model.ir_version = onnx.IR_VERSION + 1
    with pytest.raises(ModelError, match="update the onnx package"):
        graphfold.optimize(model)


def old_norm(opset: int, **attributes: Any) -> onnx.ModelProto:
    build = ModelBuilder([1, 3, 6, 6], opset=opset, ir_version=3)
    old = {"consumed_inputs": [0, 0, 0, 1, 1]} if opset < 6 else {}
    value = build.norm(build.conv("x", 4, 3), **old, **attributes)
    return build.model(
        value, shapes={value: [1, 4, 4, 4]}, more_inputs=initializers_as_inputs(build)
    )


@pytest.mark.parametrize("opset", range(1, 7))
def test_operator_sets_before_7(opset: int) -> None:
    result = optimized_twice(old_norm(opset, is_test=1), verify=False)
    assert op_types(result.model).count("BatchNormalization") == 0
    trains = optimized_twice(old_norm(opset), verify=False)
    assert op_types(trains.model).count("BatchNormalization") == 1


@pytest.mark.parametrize(
    ("opset", "attributes", "extra", "folds"),
    [
        (7, {}, 0, True),
        (8, {"spatial": 0}, 0, False),
        (8, {}, 4, False),
        (9, {"momentum": 0.5}, 0, True),
        (13, {}, 4, False),
        (14, {"training_mode": 0}, 0, True),
        (14, {"training_mode": 1}, 2, False),
        (15, {"momentum": 0.1, "training_mode": 0}, 0, True),
        (15, {"training_mode": 1}, 2, False),
    ],
)
def test_forms_of_batch_normalization(
    opset: int, attributes: dict[str, Any], extra: int, folds: bool
) -> None:
    build = ModelBuilder([2, 3, 6, 6], opset=opset, ir_version=ir_version(opset))
    value = build.conv("x", 4, 3)
    names = ["y", *(f"extra_{number}" for number in range(extra))]
    build.norm(value, outputs=names, **attributes)
    model = build.model("y", shapes={"y": [2, 4, 4, 4]})
    result = optimized_twice(model)
    assert ("BatchNormalization" not in op_types(result.model)) == folds
    if folds:
        assert_survives(model, [random_input(model)])


@pytest.mark.parametrize("opset", [10, 11, 12, 17, 18, 21, 25])
@pytest.mark.parametrize("mode", ["constant", "reflect", "edge"])
def test_forms_of_pad(opset: int, mode: str) -> None:
    build = ModelBuilder([1, 3, 6, 6], opset=opset, ir_version=ir_version(opset))
    amounts = [0, 0, 1, 1, 0, 0, 1, 1]
    if opset < 11:
        value = build.op("Pad", "x", pads=amounts, mode=mode)
    elif opset < 18:
        value = build.op("Pad", "x", ints(build, *amounts), mode=mode)
    else:
        value = build.op("Pad", "x", ints(build, 1, 1, 1, 1), "", ints(build, 2, -1), mode=mode)
    model = build.model(build.conv(value, 4, 3))
    result = assert_survives(model, [random_input(model)], untouched_ok=True)
    assert ("Pad" in op_types(result.model)) == (mode != "constant")


@pytest.mark.parametrize("training", [None, "false", "true", "computed"])
def test_forms_of_dropout(training: str | None) -> None:
    build = ModelBuilder([1, 3, 6, 6], opset=13)
    ratio = build.constant(0.5)
    more: list[Any] = []
    if training is None:
        inputs = ["x", ratio]
    elif training == "computed":
        more = [helper.make_tensor_value_info("mode", TensorProto.BOOL, [])]
        inputs = ["x", ratio, "mode"]
    else:
        inputs = ["x", ratio, build.constant(training == "true", dtype=np.bool_)]
    value = build.op("Dropout", *inputs, channels=3)
    model = build.model(build.conv(value, 4, 3), more_inputs=more)
    feed = random_input(model) if training != "computed" else None
    if feed is None:
        feed = {"x": np.ones((1, 3, 6, 6), np.float32), "mode": np.asarray(False)}
    result = optimized_twice(model, inputs=[feed])
    assert ("Dropout" in op_types(result.model)) == (training in ("true", "computed"))


def test_newer_and_older_operator_sets_of_other_domains_are_kept() -> None:
    model = network(17)
    model.opset_import.append(helper.make_opsetid("ai.onnx.ml", 3))
    model.opset_import.append(helper.make_opsetid("com.example", 99))
    result = assert_survives(model, [random_input(model)])
    assert list(result.model.opset_import) == list(model.opset_import)


@pytest.mark.parametrize("where", ["imports", "nodes", "both"])
def test_the_default_domain_by_its_long_name(where: str) -> None:
    model = network(17)
    if where != "nodes":
        model.opset_import[0].domain = "ai.onnx"
    for node in model.graph.node if where != "imports" else ():
        node.domain = "ai.onnx"
    # onnx's own checker does not know the name; runtimes do.
    result = assert_survives(model, [random_input(model)], check=False)
    assert_folded(result.model)

"""Constants behind chains of reshapes, transposes, casts and fills are constants."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from builders import ModelBuilder, assert_same_function, nonzero, op_types
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator

import graphfold
from graphfold.graph import Graph
from graphfold.model import load

CASES: list[tuple[str, tuple[int, ...], Any, dict[str, Any]]] = [
    ("Identity", (2, 3), None, {}),
    ("Reshape", (2, 3), [3, 2], {}),
    ("Reshape", (2, 3), [0, -1, 1], {}),
    ("Transpose", (2, 3, 4), None, {"perm": [2, 0, 1]}),
    ("Transpose", (2, 3), None, {}),
    ("Unsqueeze", (2, 3), [0, 3], {}),
    ("Squeeze", (1, 3, 1), [0], {}),
    ("Squeeze", (1, 3, 1), None, {}),
    ("Flatten", (2, 3, 4), None, {"axis": 2}),
    ("Flatten", (2, 3, 4), None, {"axis": -1}),
    ("Cast", (2, 3), None, {"to": onnx.TensorProto.DOUBLE}),
]


@pytest.mark.parametrize(("op_type", "shape", "second", "attributes"), CASES)
def test_every_transparent_operator_has_the_runtimes_value(
    op_type: str, shape: tuple[int, ...], second: Any, attributes: dict[str, Any]
) -> None:
    data = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    inputs = ["data"] if second is None else ["data", "second"]
    initializers = [numpy_helper.from_array(data, "data")]
    if second is not None:
        initializers.append(numpy_helper.from_array(np.asarray(second, np.int64), "second"))
    node = helper.make_node(op_type, inputs, ["y"], **attributes)
    out = helper.make_empty_tensor_value_info("y")
    graph = helper.make_graph([node], "g", [], [out], initializers)
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    expected = ReferenceEvaluator(proto).run(None, {})[0]
    held = Graph(load(proto, check=False))
    found = held.constant(held.values()["y"])
    assert found is not None
    assert found.dtype == expected.dtype
    np.testing.assert_array_equal(found, expected)


def test_weights_filled_by_constant_of_shape_fold() -> None:
    build = ModelBuilder([1, 3, 8, 8], opset=13)
    shape = build.constant([4, 3, 3, 3], dtype=np.int64)
    fill = numpy_helper.from_array(np.array([0.25], np.float32))
    weight = build.op("ConstantOfShape", shape, value=fill)
    conv = build.op("Conv", "x", weight, channels=4, kernel_shape=[3, 3])
    model = build.model(build.norm(conv, out="y"))
    folded = graphfold.optimize(model).model
    assert op_types(folded) == ["Conv"]
    assert_same_function(model, folded)


def test_a_bias_reshaped_to_channels_folds_into_the_convolution() -> None:
    build = ModelBuilder([1, 3, 8, 8], opset=13)
    flat = build.constant(nonzero(build.rng, 4))
    target = build.constant([1, -1, 1, 1], dtype=np.int64)
    bias = build.op("Reshape", flat, target)
    model = build.model(build.op("Add", build.conv("x", 4, 3), bias, out="y"))
    folded = graphfold.optimize(model).model
    assert op_types(folded) == ["Conv"]
    assert_same_function(model, folded)


def test_what_depends_on_an_input_is_no_constant() -> None:
    build = ModelBuilder([1, 3, 8, 8], opset=13)
    target = build.constant([1, 3, 64], dtype=np.int64)
    reshaped = build.op("Reshape", "x", target, out="y")
    graph = Graph(load(build.model(reshaped)))
    assert graph.constant(graph.values()["y"]) is None

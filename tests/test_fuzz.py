"""A small part of the fuzzing campaign, and what it found before."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import small_models as small
from builders import ModelBuilder, fold, reasons
from fuzz.bases import base_models
from fuzz.mutate import make_case
from onnx import TensorProto, helper, numpy_helper

import graphfold
from graphfold.check import blaming
from graphfold.constants import LARGEST_FILL, can_be_filled
from graphfold.errors import ModelError, NotExactError, UsageError
from graphfold.graph import Graph
from graphfold.linear import Context, linear_operator
from graphfold.model import load
from graphfold.sites import find_sites

ROOT = Path(__file__).parents[1]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the runner forks")
def test_mutated_models_get_a_clean_answer():
    command = [sys.executable, "-m", "tests.fuzz", "--count", "120", "--seed", "100"]
    done = subprocess.run(
        [*command, "--no-shared", "--run-seconds", "1"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert "120 cases" in done.stdout
    assert "correct, verified, folded" in done.stdout


def test_a_seed_and_number_always_give_the_same_file():
    bases = base_models(with_shared=False)
    first = [make_case(bases, 3, number) for number in range(30)]
    again = [make_case(base_models(with_shared=False), 3, number) for number in range(30)]
    assert first == again
    assert len({case.data for case in first}) == 30


# What was found ---------------------------------------------------------------------------------


def refused(model: onnx.ModelProto | bytes, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        graphfold.optimize(model)


def test_text_that_is_not_utf8():
    data = small.chain(2.0).SerializeToString().replace(b"Conv", b"\xd2onv")
    refused(data, "utf-8")


def test_a_location_with_a_zero_byte(tmp_path):
    model = small.chain(2.0)
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="data.bin\0")
    path = tmp_path / "model.onnx"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(ModelError, match="names no data file"):
        graphfold.optimize(path)


@pytest.mark.parametrize("check", [True, False])
def test_a_function_that_calls_itself(check):
    model = small.chain(2.0)
    model.opset_import.add(domain="local", version=1)
    for name, called in (("Self", "Other"), ("Other", "Self")):
        node = helper.make_node(called, ["a"], ["b"], domain="local")
        model.functions.append(
            helper.make_function(
                "local", name, ["a"], ["b"], [node], [helper.make_opsetid("local", 1)]
            )
        )
    model.graph.node[0].op_type, model.graph.node[0].domain = "Self", "local"
    with pytest.raises(ModelError, match="calls itself"):
        load(model, check=check)


def test_functions_that_share_another_do_not_call_themselves():
    model = small.chain(2.0)
    for name in ("Top", "Left", "Right"):
        body = {"Top": ["Left", "Right"]}.get(name, ["Relu"])
        nodes = [
            helper.make_node(kind, ["a"], [f"b{at}"], domain="local" if kind != "Relu" else "")
            for at, kind in enumerate(body)
        ]
        imports = [helper.make_opsetid("local", 1), helper.make_opsetid("", 17)]
        model.functions.append(helper.make_function("local", name, ["a"], ["b0"], nodes, imports))
    model.opset_import.add(domain="local", version=1)
    assert load(model).ir.functions


def test_a_tensor_without_element_type():
    model = small.chain(2.0)
    model.graph.initializer[0].data_type = 0
    refused(model, "element type|data_type")


def test_a_tensor_of_negative_size():
    model = small.chain(2.0)
    model.graph.initializer[0].dims[0] = -2
    with pytest.raises(ModelError, match="has the shape"):
        graphfold.optimize(model)


def test_an_output_without_name():
    model = small.chain(2.0)
    model.graph.node[0].output.append("")
    model.graph.output.add()
    refused(model, "produced by nothing|is not a valid model")


@pytest.mark.parametrize(
    "attributes",
    [{"pads": [1, 1]}, {"strides": [-1, 1]}, {"dilations": [0, 1]}, {"group": -7}, {"group": 3}],
)
def test_windows_that_are_none(attributes):
    build = ModelBuilder([1, 2, 8, 8])
    value = build.op("Mul", "x", build.constant(small.weight(1, 2, 1, 1)), channels=2)
    proto = build.model(build.conv(value, 2, 3))
    for name, numbers in attributes.items():
        node = proto.graph.node[1]
        kept = [item for item in node.attribute if item.name != name]
        del node.attribute[:]
        node.attribute.extend([*kept, helper.make_attribute(name, numbers)])
    _, statistics = fold(proto)
    assert not any(each.folds for each in statistics.values())


def test_a_convolution_whose_weight_is_what_is_normalised():
    """Its image is a constant, its weight the output of another convolution."""
    build = ModelBuilder([1, 2, 3, 3])
    weight = build.conv("x", 2, 1)
    image = build.constant(small.weight(1, 2, 5, 5))
    value = build.op("Conv", image, weight, channels=1, kernel_shape=[3, 3])
    found = graphfold.optimize(build.model(build.norm(value, channels=1)))
    assert found.report.verification.passed


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan, 3e38])
def test_constants_that_overflow_are_not_merged(value):
    build = ModelBuilder([1, 2, 4, 4])
    factors = small.weight(1, 2, 1, 1)
    factors[0, 0] = value
    proto = build.model(build.op("Mul", build.conv("x", 2), build.constant(factors), channels=2))
    assert len(fold(proto)[0].graph.node) == 2
    graph = Graph(load(proto))
    with pytest.raises(NotExactError, match="results overflow"):
        linear_operator(graph.nodes()[1], Context(graph, 2, 2, (4, 4)))


def test_same_padding_of_an_unknown_size_behind_a_scaling():
    """A chain whose only convolution is not linear in a known way has no convolution."""
    build = ModelBuilder([1, 2, "H", "W"])
    value = build.op("Mul", "x", build.constant(small.weight(1, 2, 1, 1)), channels=2)
    proto = build.model(build.conv(value, 2, 3, stride=2, auto_pad="SAME_UPPER"))
    _, statistics = fold(proto)
    assert "merge_convs" not in reasons(statistics)
    assert not statistics["merge_convs"].folds


def test_a_weight_without_window():
    """onnxruntime loads such a model where it does not know the input's rank."""
    nodes = [
        helper.make_node("Reshape", ["x", "sizes"], ["r"]),
        helper.make_node("Conv", ["r", "w"], ["y"]),
    ]
    proto = small.build(
        nodes,
        {"x": [1, 2, 8, 8], "sizes": ["K"]},
        {"y": TensorProto.FLOAT},
        {"w": np.ones(2, np.float32)},
        types={"sizes": TensorProto.INT64},
    )
    assert graphfold.optimize(proto).report.verification.passed is None
    assert find_sites(Graph(load(proto))).convs == ()
    assert graphfold.inspect(proto).to_json()["blocks"]


def test_metadata_that_somebody_else_wrote():
    for text in ("{", "[1]", "null", "[" * 5000):
        model = small.conv_bn_relu(8, batch=1)
        model.graph.node[0].metadata_props.add(key="graphfold.replaces", value=text)
        found = graphfold.optimize(model)
        assert found.report.verification.passed
        assert len(found.model.graph.node) < len(model.graph.node)


def test_constants_that_would_fill_the_memory_are_none():
    sizes = np.array([1 << 14, 1 << 14], np.int64)
    assert not can_be_filled(sizes)
    assert not can_be_filled(np.array([-1, 2]))
    assert can_be_filled(np.array([LARGEST_FILL]))
    nodes = [
        helper.make_node("ConstantOfShape", ["shape"], ["w"]),
        helper.make_node("Conv", ["x", "w"], ["y"]),
    ]
    shape = np.array([1 << 14, 1 << 14, 1, 1], np.int64)
    model = small.build(nodes, {"x": [1, 2, 4, 4]}, {"y": TensorProto.FLOAT}, {"shape": shape})
    graph = Graph(load(model))
    value = graph.values()["w"]
    assert not graph.is_constant(value)
    assert graph.constant(value) is None


def test_sparse_constants_that_would_fill_the_memory_are_none():
    model = small.build(
        [helper.make_node("Identity", ["w"], ["y"])], {"x": [1]}, {"y": TensorProto.FLOAT}
    )
    values = helper.make_tensor("w", TensorProto.FLOAT, [1], [2.0])
    at = helper.make_tensor("", TensorProto.INT64, [1], [0])
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, at, [1 << 40]))
    graph = Graph(load(model, check=False))
    assert not graph.is_constant(graph.values()["w"])


def test_errors_of_invalid_models_are_theirs_and_others_stay():
    invalid = small.chain(2.0)
    invalid.graph.initializer[0].CopyFrom(
        numpy_helper.from_array(np.ones((2, 1, 1), np.float32), "w0")
    )
    with pytest.raises(ModelError, match="is not a valid model"), blaming(lambda: invalid):
        raise IndexError
    valid = small.chain(2.0)
    with pytest.raises(IndexError), blaming(lambda: valid):
        raise IndexError
    with pytest.raises(UsageError), blaming(lambda: invalid):
        raise UsageError("as it is")


def test_weights_with_which_results_overflow_stay():
    build = ModelBuilder([1, 2, 6, 6])
    weights = small.weight(2, 2, 1, 1)
    weights[0, 0] = 3e38
    value = build.conv("x", 2, weight=build.constant(weights))
    value = build.op("Mul", value, build.constant(np.full((1, 2, 1, 1), 0.5)), channels=2)
    value = build.op("Clip", value, build.constant(0.0), build.constant(6.0))
    found = graphfold.optimize(build.model(value)).report
    assert not found.folds
    assert any("overflow" in skip.reason for skip in found.skipped)

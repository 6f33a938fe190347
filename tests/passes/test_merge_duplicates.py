"""Equal nodes and equal initializers become one; the interface, and chance, keep their own."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from builders import ModelBuilder, fold, nonzero, op_types, random_input, reasons, run
from onnx import TensorProto, helper, numpy_helper


def merged(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Run the pass; results must be equal bit for bit, and a second run must change nothing."""
    folded, _ = fold(proto, "merge_duplicates")
    onnx.checker.check_model(folded)
    feeds = random_input(proto)
    for one, two in zip(run(proto, feeds), run(folded, feeds), strict=True):
        assert one.tobytes() == two.tobytes()
    again, statistics = fold(folded, "merge_duplicates")
    assert again == folded
    assert statistics["merge_duplicates"].applied == 0
    return folded


def names(proto: onnx.ModelProto) -> list[str]:
    return [tensor.name for tensor in proto.graph.initializer]


def test_equal_branches_merge_whole() -> None:
    build = ModelBuilder([1, 4, 6, 5])
    weight = nonzero(build.rng, 3, 4, 1, 1)
    ends = []
    for name in ("one", "two"):
        conv = build.conv("x", 3, 1, weight=build.constant(weight, name), bias=False)
        ends.append(build.op("Sigmoid", build.op("Relu", conv)))
    folded = merged(build.model(build.op("Mul", *ends)))
    assert op_types(folded) == ["Conv", "Relu", "Sigmoid", "Mul"]
    assert names(folded) == ["one"]


@pytest.mark.parametrize(
    "other",
    [
        {"op_type": "HardSigmoid", "alpha": 0.25},
        {"op_type": "HardSigmoid", "beta": 0.5},
        {"op_type": "Sigmoid"},
    ],
)
def test_other_operators_and_attributes_are_not_equal(other: dict[str, Any]) -> None:
    build = ModelBuilder([1, 4, 6, 5])
    first = build.op("HardSigmoid", "x")
    model = build.model(
        build.op("Add", first, build.op(inputs := other.pop("op_type"), "x", **other))
    )
    assert op_types(merged(model)) == ["HardSigmoid", inputs, "Add"]


def test_the_order_of_inputs_counts() -> None:
    build = ModelBuilder([1, 4, 6, 5])
    relu = build.op("Relu", "x")
    model = build.model(build.op("Mul", build.op("Sub", "x", relu), build.op("Sub", relu, "x")))
    assert op_types(merged(model)) == op_types(model)


@pytest.mark.parametrize(
    "other",
    [np.float32([[0.0]]), np.float32([-0.0]), np.int32([0]), np.float32([1.0])],
    ids=["shape", "sign of zero", "type", "value"],
)
def test_initializers_are_equal_only_to_the_bit(other: np.ndarray) -> None:
    build = ModelBuilder([1, 4, 6, 5])
    zero = build.constant([0.0], "zero")
    second = build.constant(other, "other", dtype=other.dtype)
    if other.dtype != np.float32:
        second = build.op("Cast", second, to=TensorProto.FLOAT)
    y = build.op("Add", build.op("Add", "x", zero), second)
    assert names(merged(build.model(y))) == ["zero", "other"]


def test_weights_that_callers_may_replace_are_kept_apart() -> None:
    build = ModelBuilder([1, 4, 6, 5])
    y = "x"
    for name in ("one", "two", "three"):
        y = build.op("Mul", y, build.constant([2.0], name))
    info = helper.make_tensor_value_info("one", TensorProto.FLOAT, [1])
    assert names(merged(build.model(y, more_inputs=[info]))) == ["one", "two"]


def test_outputs_of_the_graph_keep_their_names() -> None:
    build = ModelBuilder([1, 4, 6, 5])
    inner = build.op("Relu", "x", out="inner")
    outputs = [build.op("Relu", "x", out="a"), build.op("Relu", "x", out="b")]
    model = build.model(build.op("Neg", inner, out="c"), build.op("Neg", "a", out="d"), *outputs)
    folded, statistics = fold(model, "merge_duplicates")
    assert [info.name for info in folded.graph.output] == ["c", "d", "a", "b"]
    assert sorted(op_types(merged(model))) == ["Neg", "Neg", "Relu", "Relu"]
    assert "'b' is an output of the graph, and so is 'a'" in reasons(statistics)["b"]


def test_random_numbers_are_drawn_twice() -> None:
    build = ModelBuilder([1, 4, 6, 5])
    draws = [build.op("RandomNormalLike", "x") for _ in range(2)]
    model = build.model(build.op("Sub", *draws))
    assert op_types(fold(model, "merge_duplicates")[0]) == op_types(model)


def test_paddings_of_two_convolutions_stay_and_fold() -> None:
    build = ModelBuilder([1, 4, 6, 5])
    relu = build.op("Relu", "x")
    amounts = build.constant([0, 0, 1, 1, 0, 0, 1, 1], dtype=np.int64)
    convs = [build.conv(build.op("Pad", relu, amounts), 4, 3) for _ in range(2)]
    model = build.model(build.op("Mul", *convs))
    assert op_types(merged(model)) == op_types(model)
    assert "Pad" not in op_types(fold(model)[0])


def test_other_domains_and_captured_tensors_are_not_touched() -> None:
    build = ModelBuilder([1, 4, 6, 5])
    one, two = build.op("Relu", "x"), build.op("Relu", "x")
    branches = [
        helper.make_graph(
            [helper.make_node("Neg", [source], [name])],
            name,
            [],
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 4, 6, 5])],
        )
        for source, name in ((one, "then"), (two, "else"))
    ]
    condition = build.constant(True, dtype=bool)
    y = build.op("If", condition, then_branch=branches[0], else_branch=branches[1])
    assert op_types(merged(build.model(y))) == ["Relu", "Relu", "If"]
    build = ModelBuilder([1, 4, 6, 5])
    model = build.model(build.op("Relu", "x"))
    for name in ("z", "w"):
        model.graph.node.add(op_type="Act", domain="acme", input=["x"], output=[name])
    model.opset_import.add(domain="acme", version=1)
    assert op_types(fold(model, "merge_duplicates")[0]) == ["Relu", "Act", "Act"]


def test_nodes_of_several_outputs_merge_output_by_output() -> None:
    build = ModelBuilder([1, 4, 6, 5])
    sizes = build.constant([1, 3], dtype=np.int64)
    for names_ in (["a", "b"], ["c", "d"]):
        build.op("Split", "x", sizes, outputs=names_, axis=1)
    y = build.op("Mul", build.op("Add", "a", "d"), "b")
    folded = merged(build.model(y))
    assert op_types(folded) == ["Split", "Add", "Mul"]
    assert list(folded.graph.node[1].input) == ["a", "b"]


def test_what_folds_produce_merges_too() -> None:
    build = ModelBuilder([1, 4, 6, 5])
    zero, one = build.constant(np.zeros(4)), build.constant(np.ones(4))
    y = "x"
    for _ in range(2):
        conv = build.conv(y, 4, 3, bias=False)
        y = build.op("Relu", build.op("BatchNormalization", conv, one, one, zero, one))
    model = build.model(y)
    folded, _ = fold(model)
    assert len({node.input[2] for node in folded.graph.node if len(node.input) > 2}) == 1
    assert fold(folded)[0] == folded


def test_before_ir_version_4_equal_constants_merge_and_inputs_stay() -> None:
    build = ModelBuilder([1, 3, 4, 5], opset=8, ir_version=3)
    fills = [
        build.op("ConstantOfShape", build.constant([5], name, dtype=np.int64))
        for name in ("one", "two")
    ]
    tensor = numpy_helper.from_array(np.float32([2, 3, 4, 5, 6]))
    fills += [build.op("Constant", value=tensor) for _ in range(2)]
    value = "x"
    for fill in fills:
        value = build.op("Add", value, fill)
    listed = [
        helper.make_tensor_value_info(name, TensorProto.INT64, [1]) for name in ("one", "two")
    ]
    build.opset = 9
    model = build.model(value, more_inputs=listed)
    folded = merged(model)
    assert sorted(op_types(folded)) == ["Add"] * 4 + ["Constant", "ConstantOfShape"]
    assert folded.graph.input == model.graph.input
    assert names(folded) == ["one", "two"]

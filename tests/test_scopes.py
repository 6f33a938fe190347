"""Folding inside If, Loop and Scan bodies and local functions: equal, in place, nothing crosses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import pytest
from builders import nonzero
from onnx import TensorProto, helper, numpy_helper
from survivors import assert_survives, optimized_twice, ran

import graphfold

FLOAT = TensorProto.FLOAT


class Part:
    """Nodes and constants of one graph; bodies draw from the same random generator."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []

    def constant(self, name: str, value: Any, dtype: Any = np.float32) -> str:
        self.constants.append(numpy_helper.from_array(np.asarray(value, dtype), name))
        return name

    def weights(self, prefix: str, channels: int = 4) -> list[str]:
        """Weight, bias and statistics of a convolution and its normalisation."""
        return [
            self.constant(f"{prefix}_w", nonzero(self.rng, channels, channels, 3, 3) / 6),
            self.constant(f"{prefix}_b", nonzero(self.rng, channels)),
            self.constant(f"{prefix}_scale", nonzero(self.rng, channels)),
            self.constant(f"{prefix}_shift", nonzero(self.rng, channels)),
            self.constant(f"{prefix}_mean", nonzero(self.rng, channels)),
            self.constant(f"{prefix}_var", self.rng.uniform(0.05, 0.5, channels)),
        ]

    def node(self, op: str, inputs: Sequence[str], output: str, **attributes: Any) -> str:
        made = helper.make_node(op, inputs, [output], name=f"n_{output}", **attributes)
        self.nodes.append(made)
        return output

    def conv_norm(self, source: str, weights: Sequence[str], output: str) -> str:
        middle = f"{output}_conv"
        self.node("Conv", [source, *weights[:2]], middle, pads=[1, 1, 1, 1], kernel_shape=[3, 3])
        return self.node("BatchNormalization", [middle, *weights[2:]], output)

    def body(self, name: str, inputs: Sequence[Any], outputs: Sequence[Any]) -> onnx.GraphProto:
        return helper.make_graph(self.nodes, name, inputs, outputs, self.constants)


def info(name: str, shape: Sequence[int | str] | None, kind: int = FLOAT) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, shape)


def finished(
    main: Part,
    inputs: Sequence[Any],
    outputs: Sequence[Any],
    functions: Sequence[Any] = (),
    *,
    ir_version: int = 8,
    opset: int = 17,
) -> onnx.ModelProto:
    model = helper.make_model(
        main.body("main", inputs, outputs),
        opset_imports=[helper.make_opsetid("", opset), helper.make_opsetid("local", 1)],
        functions=list(functions),
        ir_version=ir_version,
    )
    onnx.checker.check_model(model)
    return model


IMAGE = [1, 4, 6, 6]
IMAGES: dict[str, Any] = {"x": np.random.default_rng(3).standard_normal(IMAGE).astype(np.float32)}


def choice(where: str, ir_version: int = 8) -> onnx.ModelProto:
    """An If whose branches hold convolutions with weights of their own or of the main graph."""
    rng = np.random.default_rng(0)
    main = Part(rng)
    branches = {}
    for name in ("then_branch", "else_branch"):
        part = Part(rng)
        weights = (part if where == "own" else main).weights(name)
        # Sibling branches may use the same names.
        part.node("Relu", [part.conv_norm("x", weights, "hidden")], "result")
        branches[name] = part.body(name, [], [info("result", IMAGE)])
    main.node("If", ["condition"], "chosen", **branches)
    main.node("Sigmoid", ["chosen"], "y")
    inputs = [info("x", IMAGE), info("condition", [], TensorProto.BOOL)]
    if ir_version < 4:
        inputs += [info(t.name, list(t.dims)) for t in main.constants]
    return finished(main, inputs, [info("y", IMAGE)], ir_version=ir_version)


def loop(where: str) -> onnx.ModelProto:
    """A Loop that runs a residual block three times and collects its results."""
    rng = np.random.default_rng(1)
    main, part = Part(rng), Part(rng)
    weights = (part if where == "own" else main).weights("step")
    out = part.conv_norm("state", weights, "hidden")
    part.node("Identity", [out], "same")
    part.node("Tanh", ["same"], "next")
    part.node("Identity", ["next"], "collected")
    part.node("Identity", ["go"], "go_on")
    body = part.body(
        "body",
        [info("i", [], TensorProto.INT64), info("go", [], TensorProto.BOOL), info("state", IMAGE)],
        [info("go_on", [], TensorProto.BOOL), info("next", IMAGE), info("collected", IMAGE)],
    )
    main.constant("times", 3, np.int64)
    main.constant("go_first", True, np.bool_)
    main.nodes.append(
        helper.make_node("Loop", ["times", "go_first", "x"], ["y", "all"], name="loop", body=body)
    )
    return finished(main, [info("x", IMAGE)], [info("y", IMAGE), info("all", [3, *IMAGE])])


def scan(where: str) -> onnx.ModelProto:
    """A Scan over a sequence of images."""
    rng = np.random.default_rng(2)
    main, part = Part(rng), Part(rng)
    weights = (part if where == "own" else main).weights("step")
    part.node("Add", ["state", part.conv_norm("image", weights, "hidden")], "next")
    part.node("Relu", ["next"], "kept")
    body = part.body(
        "body",
        [info("state", IMAGE), info("image", IMAGE)],
        [info("next", IMAGE), info("kept", IMAGE)],
    )
    main.nodes.append(
        helper.make_node(
            "Scan", ["x", "xs"], ["y", "all"], name="scan", body=body, num_scan_inputs=1
        )
    )
    inputs = [info("x", IMAGE), info("xs", [3, *IMAGE])]
    return finished(main, inputs, [info("y", IMAGE), info("all", [3, *IMAGE])])


def nested(where: str) -> onnx.ModelProto:
    """An If in an If in a Loop: weights two levels up, or beside the convolution."""
    rng = np.random.default_rng(4)
    main, outer = Part(rng), Part(rng)
    branches = {}
    for name in ("then_branch", "else_branch"):
        part = Part(rng)
        weights = (part if where == "own" else main).weights(f"inner_{name}")
        part.conv_norm("state", weights, "inner_result")
        branches[name] = part.body(name, [], [info("inner_result", IMAGE)])
    outer.node("If", ["condition"], "chosen", **branches)
    outer.node("Tanh", ["chosen"], "next")
    outer.node("Identity", ["go"], "go_on")
    body = outer.body(
        "body",
        [info("i", [], TensorProto.INT64), info("go", [], TensorProto.BOOL), info("state", IMAGE)],
        [info("go_on", [], TensorProto.BOOL), info("next", IMAGE)],
    )
    main.constant("times", 2, np.int64)
    main.constant("go_first", True, np.bool_)
    main.node("Loop", ["times", "go_first", "x"], "y", body=body)
    inputs = [info("x", IMAGE), info("condition", [], TensorProto.BOOL)]
    return finished(main, inputs, [info("y", IMAGE)])


BOTH = [IMAGES | {"condition": np.asarray(value)} for value in (True, False)]
SEQUENCE = [IMAGES | {"xs": np.random.default_rng(5).standard_normal([3, *IMAGE], np.float32)}]
CASES: dict[str, tuple[Any, list[dict[str, Any]], int]] = {
    "if": (choice, BOTH, 2),
    "loop": (loop, [IMAGES], 1),
    "scan": (scan, SEQUENCE, 1),
    "nested": (nested, BOTH, 2),
}


def every_node(graph: Any) -> list[onnx.NodeProto]:
    found = []
    for node in graph.node:
        found.append(node)
        for attribute in node.attribute:
            if attribute.HasField("g"):
                found += every_node(attribute.g)
    return found


def kinds(nodes: Sequence[onnx.NodeProto]) -> list[str]:
    return [node.op_type for node in nodes]


@pytest.mark.parametrize("where", ["own", "outer"])
@pytest.mark.parametrize("case", CASES)
def test_bodies_are_folded_and_equal(case: str, where: str) -> None:
    build, feeds, convs = CASES[case]
    model = build(where)
    result = assert_survives(model, feeds)
    nodes = kinds(every_node(result.model.graph))
    assert nodes.count("Conv") == convs
    assert "BatchNormalization" not in nodes
    # Nothing moved to another graph: the main one had no convolution and has none.
    assert "Conv" not in kinds(result.model.graph.node)
    # And what bodies alone had read is gone.
    assert len(result.model.graph.initializer) <= len(model.graph.initializer)
    names = {tensor.name for tensor in result.model.graph.initializer}
    assert not any(name.endswith(("_w", "_scale", "_mean")) for name in names)


def test_folds_of_bodies_are_reported_with_their_scope_and_not_compared_by_themselves() -> None:
    result = graphfold.optimize(choice("own"), inputs=BOTH)
    assert result.report.verification is not None
    assert result.report.verification.passed
    assert result.report.verification.folds == ()
    scopes = [fold.scope for fold in result.report.folds]
    assert scopes == ["else_branch of n_chosen", "then_branch of n_chosen"]
    listed = result.report.to_json()["folds"]
    assert [item["output"] for item in listed] == ["hidden", "hidden"]
    assert all(item["max_error"] is None for item in listed)
    counts = {item.name: item.applied for item in result.report.statistics}
    assert counts["fold_batchnorm"] == 2


def test_before_ir_version_4_bodies_are_folded_with_constant_nodes() -> None:
    result = assert_survives(choice("outer", ir_version=3), BOTH, untouched_ok=True)
    assert "BatchNormalization" not in kinds(every_node(result.model.graph))


def test_a_tensor_of_the_main_graph_is_not_folded_into_a_body() -> None:
    # The convolution runs outside, its normalisation in a branch: neither may move.
    rng = np.random.default_rng(6)
    main, then, other = Part(rng), Part(rng), Part(rng)
    weights = main.weights("outer")
    main.node("Conv", ["x", *weights[:2]], "conv", pads=[1, 1, 1, 1], kernel_shape=[3, 3])
    then.node("BatchNormalization", ["conv", *weights[2:]], "result")
    other.node("Identity", ["x"], "result")
    bodies = {
        "then_branch": then.body("then", [], [info("result", IMAGE)]),
        "else_branch": other.body("else", [], [info("result", IMAGE)]),
    }
    main.node("If", ["condition"], "y", **bodies)
    model = finished(
        main, [info("x", IMAGE), info("condition", [], TensorProto.BOOL)], [info("y", IMAGE)]
    )
    result = assert_survives(model, BOTH, untouched_ok=True)
    assert kinds(result.model.graph.node) == ["Conv", "If"]
    assert kinds(every_node(result.model.graph)).count("BatchNormalization") == 1


def test_an_outer_constant_that_callers_may_replace_is_not_folded_inside() -> None:
    model = choice("outer")
    for tensor in model.graph.initializer:
        if tensor.name == "then_branch_w":
            model.graph.input.append(info(tensor.name, list(tensor.dims)))
    result = assert_survives(model, BOTH)
    found = kinds(every_node(result.model.graph))
    assert found.count("BatchNormalization") == 1
    replaced = {"then_branch_w": np.ones((4, 4, 3, 3), np.float32)}
    expected, actual = (ran(each, BOTH[0] | replaced) for each in (model, result.model))
    np.testing.assert_allclose(actual[0], expected[0], atol=1e-5)


def test_a_weight_that_two_bodies_and_the_main_graph_read_stays_for_those_that_need_it() -> None:
    model = choice("outer")
    shared = {"else_branch_w": "then_branch_w"}
    for node in every_node(model.graph):
        node.input[:] = [shared.get(name, name) for name in node.input]
    weight = next(t for t in model.graph.initializer if t.name == "then_branch_w")
    model.graph.node.append(
        helper.make_node("Conv", ["y", weight.name], ["z"], pads=[1, 1, 1, 1], name="last")
    )
    model.graph.output.append(info("z", IMAGE))
    result = assert_survives(model, BOTH)
    assert "then_branch_w" in {tensor.name for tensor in result.model.graph.initializer}
    assert "BatchNormalization" not in kinds(every_node(result.model.graph))


# --- functions --------------------------------------------------------------------------------


def block(*, reference: bool = False, stored: bool = True) -> onnx.FunctionProto:
    """A local function: Conv, BatchNormalization and an activation with a parameter."""
    part = Part(np.random.default_rng(7))
    weights = part.weights("block")
    nodes = [
        helper.make_node("Constant", [], [tensor.name], value=tensor) for tensor in part.constants
    ]
    part.conv_norm("value", weights, "hidden")
    if reference:
        conv = next(node for node in part.nodes if node.op_type == "Conv")
        conv.attribute.add(name="group", ref_attr_name="group", type=onnx.AttributeProto.INT)
    activation = helper.make_node("LeakyRelu", ["hidden"], ["result"])
    activation.attribute.add(name="alpha", ref_attr_name="alpha", type=onnx.AttributeProto.FLOAT)
    inputs = ["value"] if stored else ["value", *weights]
    return helper.make_function(
        "local",
        "Block",
        inputs,
        ["result"],
        [*(nodes if stored else ()), *part.nodes, activation],
        [helper.make_opsetid("", 17)],
        attributes=["alpha", "group"],
    )


def caller(function: onnx.FunctionProto, **attributes: Any) -> onnx.ModelProto:
    main = Part(np.random.default_rng(7))
    weights = main.weights("block") if len(function.input) > 1 else []
    for source, target in (("x", "once"), ("once", "y")):
        main.nodes.append(
            helper.make_node("Block", [source, *weights], [target], domain="local", **attributes)
        )
    return finished(main, [info("x", IMAGE)], [info("y", IMAGE)], [function])


def test_function_bodies_are_folded_with_constant_nodes() -> None:
    result = assert_survives(caller(block(), alpha=0.3), [IMAGES])
    (function,) = result.model.functions
    assert kinds(function.node) == ["Constant", "Constant", "Conv", "LeakyRelu"]
    assert function.node[-1].attribute[0].ref_attr_name == "alpha"
    assert [fold.scope for fold in result.report.folds] == ["function local::Block"]


def test_attributes_that_the_caller_gives_are_not_taken_for_defaults() -> None:
    # The default group is 1: the weights say 4, which only the caller knows.
    function = block(reference=True)
    for node in function.node:
        if node.output[0] == "block_w":
            weight = numpy_helper.to_array(node.attribute[0].t)[:, :1]
            node.attribute[0].t.CopyFrom(numpy_helper.from_array(weight, "block_w"))
    model = caller(function, alpha=0.3, group=4)
    result = assert_survives(model, [IMAGES], untouched_ok=True)
    assert kinds(result.model.functions[0].node) == kinds(function.node)
    assert result.model.functions[0] == function


@pytest.mark.parametrize("op", ["Gemm", "Transpose"])
def test_every_operator_with_a_callers_attribute_is_left_alone(op: str) -> None:
    part = Part(np.random.default_rng(8))
    first, second = (nonzero(part.rng, 4, 4).astype(np.float32) for _ in range(2))
    nodes = [
        helper.make_node("Constant", [], [name], value=numpy_helper.from_array(value, name))
        for name, value in (("one", first), ("two", second))
    ]
    if op == "Gemm":
        chain = [
            helper.make_node("Gemm", ["value", "one"], ["middle"]),
            helper.make_node("Gemm", ["middle", "two"], ["result"]),
        ]
        flag = ("transB", onnx.AttributeProto.INT)
    else:
        chain = [
            helper.make_node("Transpose", ["value"], ["middle"]),
            helper.make_node("Transpose", ["middle"], ["turned"]),
            helper.make_node("MatMul", ["turned", "one"], ["result"]),
        ]
        flag = ("perm", onnx.AttributeProto.INTS)
    chain[0].attribute.add(name=flag[0], ref_attr_name=flag[0], type=flag[1])
    function = helper.make_function(
        "local", "Block", ["value"], ["result"], [*nodes, *chain],
        [helper.make_opsetid("", 17)], attributes=[flag[0]],
    )  # fmt: skip
    main = Part(part.rng)
    value: Any = 1 if op == "Gemm" else [0, 1]
    main.nodes.append(helper.make_node("Block", ["x"], ["y"], domain="local", **{flag[0]: value}))
    model = finished(main, [info("x", [4, 4])], [info("y", [4, 4])], [function])
    result = optimized_twice(model)
    feed = {"x": nonzero(part.rng, 4, 4).astype(np.float32)}
    np.testing.assert_allclose(ran(result.model, feed)[0], ran(model, feed)[0], rtol=1e-5)


def test_functions_whose_weights_are_inputs_stay() -> None:
    function = block(stored=False)
    result = assert_survives(caller(function, alpha=0.1), [IMAGES], untouched_ok=True)
    assert result.model.functions[0] == function


def test_a_function_with_a_branch_inside_is_folded_there_too() -> None:
    part = Part(np.random.default_rng(9))
    weights = part.weights("block")
    nodes = [
        helper.make_node("Constant", [], [tensor.name], value=tensor) for tensor in part.constants
    ]
    then, other = Part(part.rng), Part(part.rng)
    then.conv_norm("value", weights, "result")
    other.node("Relu", ["value"], "result")
    bodies = {
        "then_branch": then.body("then", [], [info("result", None)]),
        "else_branch": other.body("else", [], [info("result", None)]),
    }
    function = helper.make_function(
        "local", "Block", ["value", "flag"], ["chosen"],
        [*nodes, helper.make_node("If", ["flag"], ["chosen"], **bodies)],
        [helper.make_opsetid("", 17)],
    )  # fmt: skip
    main = Part(part.rng)
    main.nodes.append(helper.make_node("Block", ["x", "condition"], ["y"], domain="local"))
    model = finished(
        main,
        [info("x", IMAGE), info("condition", [], TensorProto.BOOL)],
        [info("y", IMAGE)],
        [function],
    )
    result = assert_survives(model, BOTH)
    found = kinds(every_node(result.model.functions[0]))
    assert found == ["If", "Relu", "Constant", "Constant", "Conv"]

"""Nodes that hand on their input go; bits, names of the interface and captured tensors stay."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import pytest
from builders import ModelBuilder, fold, op_types, random_input, reasons, run
from onnx import TensorProto, helper

import graphfold


def cleaned(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Run the pass; results must be equal bit for bit, and a second run must change nothing."""
    folded, _ = fold(proto, "remove_noops")
    onnx.checker.check_model(folded)
    feeds = random_input(proto, {"N": 2})
    for one, two in zip(run(proto, feeds), run(folded, feeds), strict=True):
        assert one.dtype == two.dtype
        assert one.tobytes() == two.tobytes()
    again, statistics = fold(folded, "remove_noops")
    assert again == folded
    assert statistics["remove_noops"].applied == 0
    return folded


Noop = Callable[[ModelBuilder, str], str]
NOOPS: dict[str, Noop] = {
    "identity": lambda b, x: b.op("Identity", x),
    "dropout": lambda b, x: b.op("Dropout", x),
    "dropout at inference": lambda b, x: b.op("Dropout", x, "", b.constant(False, dtype=bool)),
    "cast": lambda b, x: b.op("Cast", x, to=TensorProto.FLOAT),
    "reshape": lambda b, x: b.op("Reshape", x, b.constant([1, 4, -1, 5], dtype=np.int64)),
    "reshape by zeros": lambda b, x: b.op("Reshape", x, b.constant([0] * 4, dtype=np.int64)),
    "expand": lambda b, x: b.op("Expand", x, b.constant([4, 1, 1], dtype=np.int64)),
    "transpose": lambda b, x: b.op("Transpose", x, perm=[0, 1, 2, 3]),
    "transposes": lambda b, x: b.op(
        "Transpose", b.op("Transpose", x, perm=[0, 2, 3, 1]), perm=[0, 3, 1, 2]
    ),
    "reversals": lambda b, x: b.op("Transpose", b.op("Transpose", x)),
    "max pool": lambda b, x: b.op("MaxPool", x, kernel_shape=[1, 1]),
    "average pool": lambda b, x: b.op("AveragePool", x, kernel_shape=[1, 1], strides=[1, 1]),
    "pad": lambda b, x: b.pad(x, [0] * 4, [0] * 4),
    "concat": lambda b, x: b.op("Concat", x, axis=1),
    "sum": lambda b, x: b.op("Sum", x),
    "times one": lambda b, x: b.op("Mul", b.constant(1.0), x),
    "by one": lambda b, x: b.op("Div", x, b.constant([[1.0]])),
    "minus zero": lambda b, x: b.op("Sub", x, b.constant(0.0)),
    "plus negative zero": lambda b, x: b.op("Add", x, b.constant(-0.0)),
}


@pytest.mark.parametrize("noop", NOOPS.values(), ids=NOOPS)
def test_readers_read_what_was_handed_on(noop: Noop) -> None:
    build = ModelBuilder([1, 4, 6, 5])
    y = build.op("Relu", noop(build, build.op("Relu", "x")), out="y")
    assert op_types(cleaned(build.model(y))) == ["Relu", "Relu"]


@pytest.mark.parametrize("noop", NOOPS.values(), ids=NOOPS)
def test_an_output_of_the_graph_keeps_its_name(noop: Noop) -> None:
    build = ModelBuilder([1, 4, 6, 5])
    inner = build.op("Relu", "x")
    model = build.model(noop(build, inner), build.op("Neg", inner))
    folded = cleaned(model)
    assert sorted(op_types(folded)) == ["Neg", "Relu"]
    assert [info.name for info in folded.graph.output] == [info.name for info in model.graph.output]


KEPT: dict[str, Noop] = {
    "another type": lambda b, x: b.op(
        "Cast", b.op("Cast", x, to=TensorProto.INT32), to=TensorProto.FLOAT
    ),
    "another shape": lambda b, x: b.op("Reshape", x, b.constant([1, 4, 5, 6], dtype=np.int64)),
    "another order": lambda b, x: b.op("Transpose", x, perm=[0, 1, 3, 2]),
    "strided pool": lambda b, x: b.op("MaxPool", x, kernel_shape=[1, 1], strides=[2, 1]),
    "plus zero": lambda b, x: b.op("Add", x, b.constant(0.0)),
    "minus negative zero": lambda b, x: b.op("Sub", x, b.constant(-0.0)),
    "one divided": lambda b, x: b.op("Div", b.constant(1.0), x),
    "zero minus": lambda b, x: b.op("Sub", b.constant(0.0), x),
    "a rank more": lambda b, x: b.op("Mul", x, b.constant([[[[[1.0]]]]])),
    "a map of ones": lambda b, x: b.op("Mul", x, b.constant(np.ones((2, 4, 6, 5)))),
    "a type that shapes do not tell": lambda b, x: b.op(
        "Cast", b.op("Greater", x, b.constant(0.5)), to=TensorProto.FLOAT
    ),
}


@pytest.mark.parametrize("op", KEPT.values(), ids=KEPT)
def test_what_may_change_a_bit_a_type_or_a_shape_stays(op: Noop) -> None:
    build = ModelBuilder([1, 4, 6, 5])
    model = build.model(op(build, "x"))
    assert op_types(cleaned(model)) == op_types(model)


def test_open_dimensions_are_not_taken_for_equal() -> None:
    build = ModelBuilder(["N", 4, 6, 5])
    free = build.op("Reshape", "x", build.constant([-1, 4, 6, 5], dtype=np.int64))
    fixed = build.op("Reshape", build.op("Relu", free), build.constant([2, 4, 6, 5], dtype=int))
    model = build.model(build.op("Relu", fixed))
    assert op_types(cleaned(model)) == ["Relu", "Reshape", "Relu"]


@pytest.mark.parametrize("opset", [6, 7, 12])
def test_dropout_goes_only_where_it_cannot_train(opset: int) -> None:
    build = ModelBuilder([1, 4, 6, 5], opset=opset)
    inputs = ["x"]
    if opset == 12:
        inputs += ["", build.constant(True, dtype=bool)]
    y = build.op("Relu", build.op("Dropout", *inputs, out="d"))
    folded, statistics = fold(build.model(y), "remove_noops")
    assert op_types(folded) == (["Relu"] if opset == 7 else ["Dropout", "Relu"])
    assert ("d" in reasons(statistics)) == (opset != 7)


def test_a_mask_that_is_read_keeps_its_dropout() -> None:
    build = ModelBuilder([1, 4, 6, 5], opset=10)
    y = build.op("Dropout", "x", outputs=["y", "mask"])
    model = build.model(y)
    model.graph.output.append(helper.make_tensor_value_info("mask", TensorProto.BOOL, None))
    assert op_types(fold(model, "remove_noops")[0]) == ["Dropout"]


def test_names_of_the_interface_are_never_lost() -> None:
    build = ModelBuilder([1, 4, 6, 5])
    relu = build.op("Relu", "x", out="relu")
    model = build.model(
        build.op("Identity", "x", out="same"),
        relu,
        build.op("Identity", relu, out="twin"),
        build.op("Identity", build.constant([1.0], "weight"), out="fixed"),
    )
    folded, statistics = fold(model, "remove_noops")
    assert op_types(folded) == op_types(model)
    found = reasons(statistics)
    assert "'x' is not the result of a node" in found["same"]
    assert "and so is 'relu'" in found["twin"]
    assert "'weight' is not the result of a node" in found["fixed"]


def test_a_tensor_that_a_subgraph_captures_stays() -> None:
    build = ModelBuilder([1, 4, 6, 5])
    inner = build.op("Identity", build.op("Relu", "x"), out="inner")
    branches = [
        helper.make_graph(
            [helper.make_node(op, [inner], [name])],
            name,
            [],
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 4, 6, 5])],
        )
        for op, name in (("Relu", "then"), ("Neg", "else"))
    ]
    condition = build.constant(True, dtype=bool)
    y = build.op("If", condition, then_branch=branches[0], else_branch=branches[1])
    assert op_types(cleaned(build.model(y))) == ["Relu", "Identity", "If"]


def test_other_domains_stay() -> None:
    build = ModelBuilder([1, 4, 6, 5])
    model = build.model(build.op("Relu", "x"))
    model.graph.node.add(op_type="Identity", domain="acme", input=["x"], output=["z"])
    model.opset_import.add(domain="acme", version=1)
    assert op_types(fold(model, "remove_noops")[0]) == ["Relu", "Identity"]


def test_tensors_that_a_plan_names_stay() -> None:
    build = ModelBuilder([1, 4, 6, 5])
    inner = build.op("Identity", build.op("Relu", "x"), out="inner")
    end = build.conv(build.conv(inner, 4, 1), 4, 3, out="end")
    model = build.model(build.op("Relu", end))
    plan = {
        "graphfold_plan": 1,
        "segments": [{"input": "inner", "output": "end", "boundary": "exact"}],
    }
    result = graphfold.optimize(model, plan)
    assert op_types(result.model) == ["Relu", "Identity", "Conv", "Relu"]


def test_what_one_pass_makes_is_seen_by_those_before_it() -> None:
    build = ModelBuilder([1, 4, 6, 5])
    shape = build.op("Shape", "x")
    y = build.op("Relu", build.op("Reshape", build.op("Relu", "x"), shape))
    folded = graphfold.optimize(build.model(y)).model
    assert graphfold.optimize(folded).model == folded

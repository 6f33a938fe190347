"""What depends on constants and fixed sizes only is computed once, to the bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
from builders import ModelBuilder, fold, op_types, random_input, reasons, run
from onnx import TensorProto, helper, numpy_helper

import graphfold


def computed(proto: onnx.ModelProto, sizes: dict[str, int] | None = None) -> onnx.ModelProto:
    """Run the pass; results must be equal bit for bit, and a second run must change nothing."""
    folded, _ = fold(proto, "fold_constants")
    onnx.checker.check_model(folded)
    feeds = random_input(proto, sizes)
    for one, two in zip(run(proto, feeds), run(folded, feeds), strict=True):
        assert (one.dtype, one.shape) == (two.dtype, two.shape)
        assert one.tobytes() == two.tobytes()
    again, statistics = fold(folded, "fold_constants")
    assert again == folded
    assert statistics["fold_constants"].applied == 0
    return folded


def value_of(proto: onnx.ModelProto, name: str) -> np.ndarray:
    return numpy_helper.to_array(next(t for t in proto.graph.initializer if t.name == name))


def ints(build: ModelBuilder, *values: int) -> str:
    return build.constant(list(values), dtype=np.int64)


Make = Callable[[ModelBuilder], str]
COMPUTED: dict[str, Make] = {
    "arithmetic": lambda b: b.op("Exp", b.op("Div", b.constant([1.0, 2.0]), b.constant(3.0))),
    "a transposed weight": lambda b: b.op("Transpose", b.constant([[1.0], [2.0]]), perm=[1, 0]),
    "a cast": lambda b: b.op("Cast", b.constant([1, 2], dtype=np.float64), to=TensorProto.FLOAT),
    "a fill": lambda b: b.op("ConstantOfShape", ints(b, 2)),
    "a range": lambda b: b.op(
        "Cast",
        b.op("Range", *(b.constant(v, dtype=np.int64) for v in (0, 2, 1))),
        to=TensorProto.FLOAT,
    ),
    "pieces": lambda b: b.op(
        "Split", b.constant([1.0, 2.0, 3.0, 4.0]), ints(b, 2, 2), outputs=["p", "q"]
    ),
    "a clip with one bound": lambda b: b.op("Clip", b.constant([-1.0, 9.0]), "", b.constant(6.0)),
    "a Constant": lambda b: b.op("Constant", value_floats=[1.0, 2.0]),
    "a Constant tensor": lambda b: b.op(
        "Constant", value=numpy_helper.from_array(np.float32([1, 2]))
    ),
}


@pytest.mark.parametrize("make", COMPUTED.values(), ids=COMPUTED)
def test_results_of_constants_are_constants(make: Make) -> None:
    build = ModelBuilder([1, 3, 4, 2])
    name = make(build)
    folded = computed(build.model(build.op("Mul", "x", name, out="y")))
    assert op_types(folded) == ["Mul"]
    assert [t.name for t in folded.graph.initializer] == [name]


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_types_are_kept(dtype: Any) -> None:
    build = ModelBuilder([1, 3, 4, 2], dtype=dtype)
    third = build.op("Div", build.constant(1.0), build.constant(3.0), out="third")
    # Without comparing runs: onnxruntime's CPU multiplies by what it has not rounded to half yet.
    folded, _ = fold(build.model(build.op("Mul", "x", third)), "fold_constants")
    assert value_of(folded, "third") == dtype(1) / dtype(3)
    assert value_of(folded, "third").dtype == dtype


def flattened(build: ModelBuilder, *, batch: str = "x") -> onnx.ModelProto:
    """What torch exports for x.view(x.size(0), -1)."""
    size = build.op("Gather", build.op("Shape", batch), build.constant(0, dtype=np.int64), axis=0)
    size = build.op("Unsqueeze", size, ints(build, 0))
    target = build.op("Concat", size, ints(build, -1), axis=0, out="target")
    return build.model(build.op("Reshape", "x", target, out="y"))


def test_sizes_that_are_fixed_are_computed() -> None:
    folded = computed(flattened(ModelBuilder([2, 3, 4, 5])))
    assert op_types(folded) == ["Reshape"]
    assert value_of(folded, "target").tolist() == [2, -1]


def test_sizes_that_are_open_are_not() -> None:
    model = flattened(ModelBuilder(["N", 3, 4, 5]))
    assert op_types(computed(model, {"N": 2})) == op_types(model)


@pytest.mark.parametrize("index", [1, -1, [2, 3]])
def test_fixed_sizes_beside_open_ones_are_computed(index: int | list[int]) -> None:
    build = ModelBuilder(["N", 3, 4, 5])
    shape = build.op("Shape", "x")
    size = build.op("Gather", shape, build.constant(index, dtype=np.int64), axis=0, out="size")
    y = build.op("Add", size, shape) if isinstance(index, int) else build.op("Neg", size)
    y = build.op("Cast", y, to=TensorProto.FLOAT, out="y")
    folded = computed(build.model(y), {"N": 2})
    assert "Gather" not in op_types(folded)
    if isinstance(index, int):
        assert value_of(folded, "size") == [1, 3, 4, 5][index]
        assert "Shape" in op_types(folded)


def test_a_slice_of_fixed_sizes_is_computed() -> None:
    build = ModelBuilder(["N", 3, 4, 5])
    sliced = build.op("Slice", build.op("Shape", "x"), ints(build, 2), ints(build, 4), out="hw")
    whole = build.op("Concat", build.op("Mul", sliced, ints(build, 2)), ints(build, 1), axis=0)
    y = build.op("Add", build.op("Cast", whole, to=1, out="s"), build.op("ReduceMax", "x"))
    folded = computed(build.model(y), {"N": 2})
    assert op_types(folded) == ["ReduceMax", "Add"]
    assert value_of(folded, "s").tolist() == [8, 10, 1]


def test_part_of_a_shape_is_computed() -> None:
    build = ModelBuilder(["N", 3, 4, 5])
    part = build.op("Cast", build.op("Shape", "x", start=1, end=-1), to=TensorProto.FLOAT, out="s")
    y = build.op("Add", part, build.op("ReduceMax", "x"))
    folded = computed(build.model(y), {"N": 2})
    assert value_of(folded, "s").tolist() == [3, 4]


def test_random_numbers_and_quantised_weights_stay() -> None:
    build = ModelBuilder([1, 3, 4, 5])
    noise = build.op("RandomNormal", shape=[1], seed=1.0)
    weight = build.op(
        "DequantizeLinear", build.constant([3], dtype=np.int8), build.constant(0.5), "", out="w"
    )
    build.nodes[-1].input.pop()
    y = build.op("Add", build.op("Mul", "x", weight), noise)
    model = build.model(y)
    assert op_types(fold(model, "fold_constants")[0]) == op_types(model)


def test_an_output_of_the_graph_stays_the_result_of_a_node() -> None:
    build = ModelBuilder([1, 3, 4, 5])
    model = build.model(build.op("Neg", build.constant([1.0]), out="y"))
    assert op_types(computed(model)) == ["Neg"]


def test_weights_that_callers_may_replace_are_not_constants() -> None:
    build = ModelBuilder([1, 3, 4, 5])
    y = build.op("Mul", "x", build.op("Neg", build.constant([2.0], "scale")))
    info = helper.make_tensor_value_info("scale", TensorProto.FLOAT, [1])
    assert op_types(computed(build.model(y, more_inputs=[info]))) == ["Neg", "Mul"]


def test_a_constant_that_another_node_reads_stays_for_it() -> None:
    build = ModelBuilder([1, 3, 4, 5])
    shared = build.constant([2.0], "shared")
    y = build.op("Mul", build.op("Add", "x", shared), build.op("Neg", shared, out="n"))
    folded = computed(build.model(y))
    assert {t.name for t in folded.graph.initializer} == {"shared", "n"}


@pytest.mark.parametrize("op_type", ["ConstantOfShape", "Expand", "Tile"])
def test_files_do_not_grow(op_type: str) -> None:
    build = ModelBuilder([1, 3, 1100, 1100])
    inputs = [ints(build, 1100, 1100)]
    if op_type != "ConstantOfShape":
        inputs.insert(0, build.constant([[2.0]]))
    model = build.model(build.op("Add", "x", build.op(op_type, *inputs, out="big")))
    folded, statistics = fold(model, "fold_constants")
    assert op_types(folded) == [op_type, "Add"]
    assert reasons(statistics)["big"] == "it would hold 1210000 values"


def test_divisions_without_a_result_stay() -> None:
    build = ModelBuilder([1, 3, 4, 5])
    none = build.op("Div", ints(build, 1), ints(build, 0), out="none")
    y = build.op("Add", "x", build.op("Cast", none, to=TensorProto.FLOAT))
    folded, statistics = fold(build.model(y), "fold_constants")
    assert op_types(folded) == ["Div", "Cast", "Add"]
    assert reasons(statistics)["none"] == "it divides by zero or overflows"


def old_model(make: Make) -> onnx.ModelProto:
    """A model before IR version 4: all its constants are inputs too."""
    build = ModelBuilder([1, 3, 4, 5], opset=8, ir_version=3)
    output = build.op("Add", "x", make(build), out="y")
    listed = [
        helper.make_tensor_value_info(t.name, t.data_type, list(t.dims)) for t in build.initializers
    ]
    return build.model(output, more_inputs=listed)


OLD: dict[str, tuple[Make, list[str]]] = {
    "a constant": (
        lambda b: b.op("Constant", value=numpy_helper.from_array(np.float32([1]))),
        ["Constant", "Add"],
    ),
    "what is computed": (
        lambda b: b.op("Unsqueeze", b.op("Exp", b.constant([1.0, 2.0, 3.0, 4.0, 5.0])), axes=[0]),
        ["Constant", "Add"],
    ),
    "too much": (
        lambda b: b.op(
            "ReduceMean", b.op("Exp", b.constant(np.ones((3, 4097)))), axes=[0, 1], keepdims=0
        ),
        ["Exp", "ReduceMean", "Add"],
    ),
}


@pytest.mark.parametrize("case", OLD)
def test_before_ir_version_4_constants_are_nodes(case: str) -> None:
    make, expected = OLD[case]
    model = old_model(make)
    folded = computed(model)
    assert op_types(folded) == expected
    assert folded.graph.input == model.graph.input
    assert folded.graph.initializer == model.graph.initializer


def test_the_source_keeps_its_tensors_and_names() -> None:
    build = ModelBuilder([1, 3, 4, 5])
    tensor = numpy_helper.from_array(np.float32([2]), "its own name")
    model = build.model(build.op("Add", "x", build.op("Constant", value=tensor, out="two")))
    before = model.SerializeToString()
    result = graphfold.optimize(model)
    assert model.SerializeToString() == before
    assert result.reference.ir.graph[0].attributes["value"].as_tensor().name == "its own name"
    assert value_of(result.model, "two") == [2]


def test_shapes_that_constants_tell_are_known_afterwards() -> None:
    build = ModelBuilder(["N", 3, 4, 5])
    half = build.op("Mul", ints(build, 30), ints(build, 2))
    flat = build.op("Reshape", "x", build.op("Concat", ints(build, -1), half, axis=0))
    product = build.op("MatMul", flat, build.constant(build.rng.normal(size=(60, 2))))
    model = build.model(build.op("Add", product, build.constant([1.0, 2.0])))
    folded, _ = fold(model)
    assert op_types(folded) == ["Reshape", "Gemm"]
    assert fold(folded)[0] == folded


def test_the_condition_of_an_if_stays_computed():
    branches = []
    for name, op_type in (("then", "Relu"), ("else", "Neg")):
        node = helper.make_node(op_type, ["x"], [f"{name}_y"])
        info = helper.make_tensor_value_info(f"{name}_y", TensorProto.FLOAT, [2, 3])
        branches.append(helper.make_graph([node], name, [], [info]))
    model = helper.make_model(
        helper.make_graph(
            [
                helper.make_node("Equal", ["a", "b"], ["same"]),
                helper.make_node(
                    "If", ["same"], ["y"], then_branch=branches[0], else_branch=branches[1]
                ),
            ],
            "condition",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 3])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, 3])],
            [
                numpy_helper.from_array(np.array(value), name)
                for name, value in (("a", 1), ("b", 1))
            ],
        ),
        opset_imports=[helper.make_opsetid("", 17)],
        ir_version=8,
    )
    folded, _ = fold(model, "fold_constants")
    assert op_types(folded) == ["Equal", "If"]

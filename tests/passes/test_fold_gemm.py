"""Fully connected layers with normalisation, constants and one another become one layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
from builders import (
    ModelBuilder,
    assert_same,
    attributes_of,
    fold,
    nonzero,
    op_types,
    random_input,
    reasons,
    run,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper

import graphfold
from graphfold.rewrite import recorded_folds


def matmul(build: ModelBuilder, source: str, width: int, out: str | None = None) -> str:
    """A MatMul with random weights; the builder keeps the features as channels."""
    shape = (build._channels[source], width)
    weight = build.constant(nonzero(build.rng, *shape) / shape[0] ** 0.5, build.name("weight"))
    return build.op("MatMul", source, weight, channels=width, out=out)


def gemm(
    build: ModelBuilder,
    source: str,
    width: int,
    *,
    bias: tuple[int, ...] | None = (-1,),
    out: str | None = None,
    **attributes: Any,
) -> str:
    """A Gemm with random weights and a bias of this shape, -1 for its width."""
    shape = (build._channels[source], width)
    data = nonzero(build.rng, *shape) / shape[0] ** 0.5
    data = data.T if attributes.get("transB") else data
    inputs = [source, build.constant(data, build.name("weight"))]
    if bias is not None:
        sizes = [width if size == -1 else size for size in bias]
        inputs.append(build.constant(nonzero(build.rng, *sizes), build.name("bias")))
    return build.op("Gemm", *inputs, channels=width, out=out, **attributes)


def builder(*shape: int | str, **options: Any) -> ModelBuilder:
    """A builder whose input x has its features last."""
    build = ModelBuilder(shape, **options)
    assert isinstance(shape[-1], int)
    build._channels["x"] = shape[-1]
    return build


def folded_alone(
    proto: onnx.ModelProto, sizes: dict[str, int] | None = None, **options: Any
) -> onnx.ModelProto:
    folded, _ = fold(proto, "fold_gemm", **options)
    onnx.checker.check_model(folded)
    feeds = random_input(proto, sizes)
    for one, two in zip(run(proto, feeds), run(folded, feeds), strict=True):
        assert_same(one[..., None], two[..., None], reach=0)
    return folded


def left_alone(proto: onnx.ModelProto) -> dict[str, str]:
    folded, statistics = fold(proto, "fold_gemm")
    assert op_types(folded) == op_types(proto)
    return reasons(statistics)


@pytest.mark.parametrize("transposed", [0, 1])
def test_columns_are_scaled_and_the_bias_shifted(transposed: int):
    build = builder("N", 5)
    value = gemm(build, "x", 4, transB=transposed, alpha=0.5, beta=-2.0)
    model = build.model(build.norm(value, epsilon=1e-2, out="y"))
    before = {
        t.name.split("_")[0]: numpy_helper.to_array(t).astype(float) for t in build.initializers
    }
    folded = folded_alone(model, {"N": 3})
    (node,) = folded.graph.node
    after = {t.name: numpy_helper.to_array(t) for t in folded.graph.initializer}
    scale = before["gamma"] / np.sqrt(before["variance"] + 1e-2)
    shift = before["beta"] - before["mean"] * scale
    weight = before["weight"].T if transposed else before["weight"]
    found = after[node.input[1]].T if transposed else after[node.input[1]]
    np.testing.assert_allclose(found, 0.5 * weight * scale, rtol=1e-6)
    expected = -2.0 * before["bias"] * scale + shift
    np.testing.assert_allclose(after[node.input[2]], expected, rtol=1e-5)
    assert (node.op_type, node.output[0]) == ("Gemm", "y")
    assert attributes_of(node)["transB"] == transposed


@pytest.mark.parametrize("bias", [None, (), (1,), (-1,), (1, -1), (1, 1)])
def test_every_form_of_bias_folds(bias: tuple[int, ...] | None):
    build = builder(3, 5)
    model = build.model(build.norm(gemm(build, "x", 4, bias=bias)))
    assert op_types(folded_alone(model)) == ["Gemm"]


@pytest.mark.parametrize("opset", [7, 9, 11, 13, 20])
def test_every_opset_folds(opset: int):
    build = builder(3, 5, opset=opset)
    value = gemm(build, "x", 4)
    value = build.op("Mul", value, build.constant(nonzero(build.rng, 4)))
    assert op_types(folded_alone(build.model(gemm(build, value, 3)))) == ["Gemm"]


@pytest.mark.parametrize(
    ("op_type", "first"),
    [
        *[(kind, False) for kind in ("Add", "Sub", "Mul", "Div")],
        *[(kind, True) for kind in ("Add", "Sub", "Mul")],
    ],
)
@pytest.mark.parametrize("rank", [2, 3])
@pytest.mark.parametrize("shape", [(), (4,), (1, 4)])
def test_constants_per_feature_fold(op_type: str, shape: tuple[int, ...], rank: int, first: bool):
    build = builder(*(2, 3)[: rank - 1], 5)
    operands = [matmul(build, "x", 4), build.constant(nonzero(build.rng, *shape))]
    model = build.model(build.op(op_type, *(operands[::-1] if first else operands)))
    shifted = op_type in ("Add", "Sub")
    if rank == 3 and shifted:
        assert left_alone(model) == {}
    else:
        assert op_types(folded_alone(model)) == ["Gemm" if shifted else "MatMul"]


def test_layers_on_higher_ranks_become_one_product_and_one_sum():
    build = builder("N", "S", 4)
    value = build.op("Add", matmul(build, "x", 6), build.constant(nonzero(build.rng, 6)))
    value = build.op("Sub", build.constant(nonzero(build.rng, 1, 1, 6)), value)
    value = build.op("Div", value, build.constant(nonzero(build.rng, 6)))
    value = build.op("Add", matmul(build, value, 3), build.constant(nonzero(build.rng, 3)), out="y")
    model = build.model(value)
    folded = folded_alone(model, {"N": 2, "S": 3})
    assert op_types(folded) == ["MatMul", "Add"]
    again, _ = fold(folded, "fold_gemm")
    assert again == folded


@pytest.mark.parametrize(
    ("kinds", "expected"),
    [("gg", "Gemm"), ("mm", "MatMul"), ("mg", "Gemm"), ("gm", "Gemm"), ("mmm", "MatMul")],
)
def test_layers_without_anything_between_become_one(kinds: str, expected: str):
    build = builder(3, 5)
    value = "x"
    for kind in kinds:
        value = gemm(build, value, 6) if kind == "g" else matmul(build, value, 6)
    folded = folded_alone(build.model(value))
    assert op_types(folded) == [expected]


def test_a_bias_goes_through_the_second_layer():
    build = builder(2, 3)
    model = build.model(gemm(build, gemm(build, "x", 4), 2, beta=0.5))
    first, bias1, second, bias2 = (numpy_helper.to_array(t) for t in build.initializers)
    folded = folded_alone(model)
    weight, bias = (numpy_helper.to_array(t) for t in folded.graph.initializer)
    np.testing.assert_allclose(weight, first @ second, rtol=1e-6)
    np.testing.assert_allclose(bias, bias1 @ second + 0.5 * bias2, rtol=1e-5)


def test_a_bottleneck_stays_unless_growth_is_allowed():
    build = builder(2, 8)
    model = build.model(matmul(build, matmul(build, "x", 2), 8, out="y"))
    assert left_alone(model) == {"y": "merging raises cost: 32 to 64 operations per row"}
    assert op_types(folded_alone(model, allow_growth=True)) == ["MatMul"]


def test_of_a_long_run_the_cheapest_split_is_merged():
    build = builder(2, 8)
    value = "x"
    for width in (9, 2, 12, 8):
        value = matmul(build, value, width)
    folded, statistics = fold(build.model(value), "fold_gemm")
    assert op_types(folded) == ["MatMul", "MatMul"]
    assert [list(t.dims) for t in folded.graph.initializer] == [[8, 2], [2, 8]]
    assert list(reasons(statistics).values()) == [
        "merging raises cost: 32 to 64 operations per row"
    ]


def test_normalisation_folds_into_each_side_of_a_bottleneck():
    build = builder(2, 8)
    value = build.norm(gemm(build, build.norm(gemm(build, "x", 2)), 8))
    assert op_types(folded_alone(build.model(value))) == ["Gemm", "Gemm"]


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_other_types_fold_in_double_and_keep_their_type(dtype: Any):
    build = builder(3, 5, dtype=dtype)
    value = build.op("Mul", matmul(build, "x", 4), build.constant(nonzero(build.rng, 4)))
    (tensor,) = folded_alone(build.model(value)).graph.initializer
    assert numpy_helper.to_array(tensor).dtype == dtype


def test_the_job_verifies_records_and_reports_it():
    build = builder("N", 6)
    value = build.norm(gemm(build, "x", 6, out="a"), out="b")
    value = gemm(build, value, 4, out="y")
    result = graphfold.optimize(build.model(value))
    assert op_types(result.model) == ["Gemm"]
    (found,) = recorded_folds(result.folded.ir.graph)
    assert found == result.report.folds[0]
    assert (found.replaces, found.macs) == (("n_a", "n_b", "n_y"), (60, 24))
    assert result.report.verification is not None
    assert result.report.verification.folds[0].passed
    assert "y" in str(result.report)
    assert result.report.to_json()["folds"][0]["kernel"] == []
    assert graphfold.inspect(build.model(value)).to_json()["folds"]
    assert graphfold.optimize(result.model).model == result.model


def training(build: ModelBuilder) -> tuple[onnx.ModelProto, str]:
    outputs = ["y", "running_mean", "running_variance"]
    return build.model(
        build.norm(gemm(build, "x", 4), outputs=outputs, training_mode=1)
    ), "training mode"


def read_twice(build: ModelBuilder) -> tuple[onnx.ModelProto, str]:
    value = gemm(build, "x", 4, out="v")
    y, other = build.norm(value, out="y"), build.op("Relu", value, out="other")
    return build.model(y, other), "'v' is also read by 'n_other'"


def also_output(build: ModelBuilder) -> tuple[onnx.ModelProto, str]:
    value = gemm(build, "x", 4, out="v")
    return build.model(gemm(build, value, 4, out="y"), value), "'v' is an output of the graph"


def overridable(name: str, shape: list[int], reason: str) -> Any:
    def make(build: ModelBuilder) -> tuple[onnx.ModelProto, str]:
        y = build.norm(gemm(build, "x", 5, out="v"), out="y")
        known = {t.name.split("_")[0]: t.name for t in build.initializers}
        info = helper.make_tensor_value_info(known[name], 1, shape)
        return build.model(y, more_inputs=[info]), reason

    return make


def transposed_input(build: ModelBuilder) -> tuple[onnx.ModelProto, str]:
    weight = build.constant(nonzero(build.rng, 3, 4))
    value = build.op("Gemm", "x", weight, channels=4, transA=1)
    return build.model(build.norm(value, out="y")), "transposes its input"


def bias_per_row(build: ModelBuilder) -> tuple[onnx.ModelProto, str]:
    y = build.norm(gemm(build, "x", 4, bias=(3, 1)), out="y")
    return build.model(y), "has shape [3, 1], which is not per feature"


def constant_per_row(build: ModelBuilder) -> tuple[onnx.ModelProto, str]:
    constant = build.constant(nonzero(build.rng, 3, 1))
    return build.model(build.op("Mul", gemm(build, "x", 4), constant, out="y")), "not per channel"


def zero_divisor(build: ModelBuilder) -> tuple[onnx.ModelProto, str]:
    y = build.op("Div", gemm(build, "x", 4), build.constant(0.0), out="y")
    return build.model(y), "divides by zero"


@pytest.mark.parametrize(
    "make",
    [
        training,
        read_twice,
        also_output,
        overridable("weight", [5, 5], "the weight of 'n_v' is not a constant"),
        overridable("bias", [5], "the bias of 'n_v' is not a constant"),
        overridable("mean", [5], "which is not a constant"),
        transposed_input,
        bias_per_row,
        constant_per_row,
        zero_divisor,
    ],
)
def test_hazards_are_left_with_the_reason(
    make: Callable[[ModelBuilder], tuple[onnx.ModelProto, str]],
):
    model, reason = make(builder(3, 5))
    assert reason in left_alone(model)["y"]


def wide_constant(build: ModelBuilder) -> tuple[str, str]:
    constant = build.constant(nonzero(build.rng, 3, 1))
    return build.op("Mul", matmul(build, "x", 3), constant, out="y"), "not per feature"


def widening(build: ModelBuilder) -> tuple[str, str]:
    constant = build.constant(nonzero(build.rng, 7))
    return build.op("Add", matmul(build, "x", 1), constant, out="y"), "not per feature"


def norm_of_rows(build: ModelBuilder) -> tuple[str, str]:
    return build.norm(matmul(build, "x", 3), out="y"), "an axis that is not the features"


@pytest.mark.parametrize("make", [wide_constant, widening, norm_of_rows])
def test_hazards_of_higher_ranks(make: Callable[[ModelBuilder], tuple[str, str]]):
    build = builder(2, 3, 5)
    y, reason = make(build)
    assert reason in left_alone(build.model(y))["y"]


def test_products_of_two_tensors_are_no_site():
    build = builder(3, 3)
    value = build.op("MatMul", "x", build.op("Relu", "x"))
    model = build.model(build.op("Mul", value, build.constant(2.0)))
    assert left_alone(model) == {}


def test_a_product_that_reads_the_layer_as_its_second_factor_is_no_site():
    build = builder(4, 4)
    model = build.model(
        build.op("MatMul", build.constant(nonzero(build.rng, 4, 4)), matmul(build, "x", 4))
    )
    assert left_alone(model) == {}


@settings(derandomize=True, deadline=None, max_examples=30, database=None)
@given(st.data())
def test_any_run_of_layers_folds_exactly(data: st.DataObject):
    rank = data.draw(st.integers(2, 4))
    build = builder(*(2, 3, 2)[: rank - 1], 4, seed=data.draw(st.integers(0, 99)))
    value = "x"
    kinds = ["matmul", "Add", "Sub", "Mul", "Div", *(["gemm", "norm"] if rank == 2 else [])]
    for kind in ["matmul", *data.draw(st.lists(st.sampled_from(kinds), min_size=1, max_size=5))]:
        width = data.draw(st.integers(3, 6))
        if kind == "matmul":
            value = matmul(build, value, width)
        elif kind == "gemm":
            value = gemm(build, value, width, transB=data.draw(st.integers(0, 1)), alpha=0.5)
        elif kind == "norm":
            value = build.norm(value)
        else:
            value = build.op(
                kind, value, build.constant(nonzero(build.rng, build._channels[value]))
            )
    folded = folded_alone(build.model(value), allow_growth=True)
    assert len(folded.graph.node) <= (1 if rank == 2 else 2)

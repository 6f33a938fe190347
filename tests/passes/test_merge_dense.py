"""Linear operators before a flattened tensor become part of the fully connected layer behind."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
from builders import (
    Array,
    ModelBuilder,
    assert_same_function,
    fold,
    nonzero,
    op_types,
    random_affine,
    reasons,
)
from hypothesis import given, settings
from hypothesis import strategies as st

import graphfold
from graphfold.affine import AffineConv
from graphfold.geometry import Axis
from graphfold.maps import Dense
from graphfold.passes.merge_dense import flattened_behind
from graphfold.rewrite import recorded_folds


def layer(
    build: ModelBuilder,
    source: str,
    inputs: int,
    features: int,
    *,
    op_type: str = "Gemm",
    **options: Any,
) -> str:
    """A fully connected layer y of what `source` flattens."""
    weight = nonzero(build.rng, inputs, features) / math.sqrt(inputs)
    if op_type == "MatMul":
        return build.op("MatMul", source, build.constant(weight), out="y")
    weight = weight.T if options.get("transB") else weight
    bias = build.constant(nonzero(build.rng, features))
    return build.op("Gemm", source, build.constant(weight), bias, out="y", **options)


def folded_alone(
    proto: onnx.ModelProto, sizes: dict[str, int] | None = None, **options: Any
) -> onnx.ModelProto:
    folded, _ = fold(proto, "merge_dense", **options)
    assert_same_function(proto, folded, sizes)
    again, statistics = fold(folded, "merge_dense", **options)
    assert statistics["merge_dense"].applied == 0
    assert again.SerializeToString() == folded.SerializeToString()
    return folded


def left_alone(proto: onnx.ModelProto) -> dict[str, str]:
    folded, statistics = fold(proto, "merge_dense")
    assert op_types(folded) == op_types(proto)
    return reasons(statistics)


@st.composite
def cases(draw: st.DrawFn) -> tuple[AffineConv, tuple[int, ...], Array]:
    rank = draw(st.integers(1, 2))
    axes = tuple(
        Axis(
            draw(st.integers(1, 3)),
            draw(st.integers(1, 3)),
            draw(st.integers(1, 2)),
            draw(st.integers(-1, 2)),
            draw(st.integers(-1, 2)),
        )
        for _ in range(rank)
    )
    groups = draw(st.sampled_from([1, 2]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    border = draw(st.booleans()) and all(axis.begin >= 0 and axis.end >= 0 for axis in axes)
    affine = random_affine(rng, axes, 4, 6, groups, border=border)
    sizes = tuple(draw(st.integers(7, 9)) for _ in range(rank))
    return affine, sizes, rng.normal(size=(2, 4, *sizes))


@settings(max_examples=200, deadline=None, derandomize=True)
@given(cases())
def test_the_layer_on_x_is_the_layer_behind_the_map(
    case: tuple[AffineConv, tuple[int, ...], Array],
) -> None:
    affine, sizes, x = case
    rng = np.random.default_rng(1)
    result = affine.apply(x)
    behind = Dense(nonzero(rng, result[0].size, 3), nonzero(rng, 3), flattens=True)
    merged = flattened_behind(affine, sizes, behind)
    np.testing.assert_allclose(merged.apply(x), behind.apply(result), rtol=1e-10, atol=1e-10)


VIEWS: dict[str, Callable[[ModelBuilder, str, int], str]] = {
    "flatten": lambda b, v, k: b.op("Flatten", v, axis=1),
    "reshape": lambda b, v, k: b.op("Reshape", v, b.constant([-1, k], dtype=np.int64)),
    "keep": lambda b, v, k: b.op("Reshape", v, b.constant([0, -1], dtype=np.int64)),
    "two": lambda b, v, k: b.op(
        "Flatten", b.op("Reshape", v, b.constant([0, 0, -1], dtype=np.int64))
    ),
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("transposed", [0, 1])
def test_a_convolution_with_many_channels_becomes_part_of_the_layer(view: str, transposed: int):
    build = ModelBuilder(["N", 3, 6, 5])
    conv = build.conv("x", 16, 3, pad=1)
    proto = build.model(layer(build, VIEWS[view](build, conv, 480), 480, 4, transB=transposed))
    folded = folded_alone(proto, {"N": 3})
    assert op_types(folded) == ["Flatten", "Gemm"]
    assert folded.graph.node[-1].output[0] == "y"


@pytest.mark.parametrize(
    "options",
    [
        {"kernel": 3, "stride": 2, "pad": 1, "groups": 2},
        {"kernel": [3, 2], "stride": [1, 2], "pad": [0, 1, 2, 0]},
        {"kernel": 2, "dilation": 2, "bias": False},
        {"kernel": 1},
    ],
    ids=str,
)
@pytest.mark.parametrize("op_type", ["Gemm", "MatMul"])
def test_any_geometry(options: dict[str, Any], op_type: str):
    build = ModelBuilder([2, 4, 7, 6])
    conv = build.conv("x", 32, **options)
    height, width = (
        dim.dim_value for dim in build.model(conv).graph.output[0].type.tensor_type.shape.dim[2:]
    )
    inputs = 32 * height * width
    flat = build.op("Flatten", conv)
    folded = folded_alone(build.model(layer(build, flat, inputs, 3, op_type=op_type)))
    kept = op_type == "MatMul" and not options.get("bias", True)
    assert op_types(folded) == ["Flatten", "MatMul" if kept else "Gemm"]


@pytest.mark.parametrize("rank", [1, 3])
def test_other_ranks(rank: int):
    build = ModelBuilder([2, 2, *[4] * rank])
    flat = build.op("Flatten", build.conv("x", 16, 3, pad=1))
    folded = folded_alone(build.model(layer(build, flat, 16 * 4**rank, 3)))
    assert op_types(folded) == ["Flatten", "Gemm"]


def test_normalisation_and_constants_fold_over_all_pixels():
    build = ModelBuilder([2, 4, 3, 5])
    value = build.norm("x", epsilon=1e-2)
    value = build.op("Mul", value, build.constant(nonzero(build.rng, 4, 1, 1)))
    flat = build.op(
        "Flatten", build.op("Add", value, build.constant(nonzero(build.rng, 1, 4, 1, 1)))
    )
    folded = folded_alone(build.model(layer(build, flat, 60, 7)))
    assert op_types(folded) == ["Flatten", "Gemm"]


def test_two_padded_windows_that_are_no_single_convolution_are_one_layer():
    build = ModelBuilder([1, 2, 6, 6])
    value = build.conv(build.conv("x", 12, 3, pad=1), 24, 3, pad=1)
    flat = build.op("Flatten", value)
    folded = folded_alone(build.model(layer(build, flat, 864, 3)))
    assert op_types(folded) == ["Flatten", "Gemm"]


def test_a_pool_in_between_goes_with_its_convolution():
    build = ModelBuilder([1, 2, 8, 8])
    value = build.op(
        "AveragePool", build.conv("x", 24, 3, pad=1), kernel_shape=[2, 2], strides=[2, 2]
    )
    flat = build.op("Flatten", value)
    folded = folded_alone(build.model(layer(build, flat, 384, 3)))
    assert op_types(folded) == ["Flatten", "Gemm"]


def test_a_global_pool_then_pointwise_convolution_then_layer_is_pool_and_layer():
    build = ModelBuilder(["N", 8, 7, 7])
    pooled = build.op("GlobalAveragePool", build.norm(build.conv("x", 24)))
    proto = build.model(layer(build, build.op("Flatten", pooled), 24, 5))
    result = graphfold.optimize(proto)
    kinds = [node.op_type for node in result.folded.ir.graph]
    assert kinds == ["GlobalAveragePool", "Flatten", "Gemm"]


def test_a_reshape_that_keeps_rows_between_layers_is_no_obstacle():
    build = ModelBuilder(["N", 8])
    weights = [build.constant(nonzero(build.rng, *shape)) for shape in ((8, 9), (9, 5))]
    inner = build.op("Gemm", "x", weights[0])
    rows = build.op("Reshape", inner, build.constant([-1, 9], dtype=np.int64))
    proto = build.model(build.op("Gemm", build.op("Flatten", rows), weights[1], out="y"))
    folded, _ = fold(proto)
    assert_same_function(proto, folded, {"N": 3})
    assert op_types(folded) == ["Gemm"]


def test_more_operations_are_refused_and_done_with_allow_growth():
    build = ModelBuilder([1, 8, 6, 6])
    flat = build.op("Flatten", build.conv("x", 2, 3, pad=1))
    proto = build.model(layer(build, flat, 72, 40))
    reason = "merging raises cost: 8,064 to 11,520 operations per image"
    assert left_alone(proto) == {"y": reason}
    assert op_types(folded_alone(proto, allow_growth=True)) == ["Flatten", "Gemm"]


def test_sizes_that_are_not_fixed_are_left_alone():
    build = ModelBuilder([1, 2, "H", 6])
    flat = build.op("Flatten", build.conv("x", 16, 3, pad=1))
    proto = build.model(layer(build, flat, 16 * 36, 3))
    assert left_alone(proto) == {}


def test_results_that_are_needed_elsewhere_are_left_alone():
    build = ModelBuilder([1, 2, 6, 6])
    conv = build.conv("x", 16, 3, pad=1)
    y = layer(build, build.op("Flatten", conv), 576, 3)
    assert left_alone(build.model(y, conv)) == {}


def test_activations_stay_in_between():
    build = ModelBuilder([1, 2, 6, 6])
    active = build.op("Relu", build.conv("x", 16, 3, pad=1))
    assert left_alone(build.model(layer(build, build.op("Flatten", active), 576, 3))) == {}


def test_provenance_and_bound():
    build = ModelBuilder([1, 3, 6, 6])
    conv = build.conv("x", 16, 3, pad=1, out="c")
    flat = build.op("Flatten", conv, out="f")
    result = graphfold.optimize(build.model(layer(build, flat, 576, 4)))
    (record,) = result.report.to_json()["folds"]
    assert 0 < record["rounding"] <= record["bound"]
    (recorded,) = recorded_folds(result.folded.ir.graph)
    assert recorded.replaces == ("n_c", "n_f", "n_y")
    assert recorded.pass_name == "merge_dense"
    assert recorded.macs == (36 * 16 * 27 + 576 * 4, 108 * 4)
    assert recorded.coefficients is not None
    assert recorded.coefficients.terms == 109

"""Parallel convolutions that are concatenated become one wider convolution."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
from builders import (
    ModelBuilder,
    assert_same_function,
    attributes_of,
    fold,
    nonzero,
    op_types,
    reasons,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper

import graphfold
from graphfold.rewrite import recorded_folds


def concat(build: ModelBuilder, *sources: str, out: str | None = None, axis: int = 1) -> str:
    total = sum(build._channels[source] for source in sources)
    return build.op("Concat", *sources, axis=axis, channels=total, out=out)


def folded_alone(proto: onnx.ModelProto, sizes: Any = None, **options: Any) -> onnx.ModelProto:
    folded, _ = fold(proto, "merge_branches", **options)
    assert_same_function(proto, folded, sizes)
    return folded


def left_alone(proto: onnx.ModelProto) -> dict[str, str]:
    folded, statistics = fold(proto, "merge_branches")
    assert op_types(folded) == op_types(proto)
    return reasons(statistics)


def test_kernels_and_biases_are_stacked_in_order():
    build = ModelBuilder([1, 3, 6, 5])
    model = build.model(concat(build, build.conv("x", 4, 3, pad=1), build.conv("x", 2, 3, pad=1)))
    first, bias1, second, bias2 = (numpy_helper.to_array(t) for t in build.initializers)
    folded = folded_alone(model)
    assert op_types(folded) == ["Conv"]
    weight, bias = (numpy_helper.to_array(t) for t in folded.graph.initializer)
    np.testing.assert_array_equal(weight, np.concatenate([first, second]))
    np.testing.assert_array_equal(bias, np.concatenate([bias1, bias2]))


@pytest.mark.parametrize("axis", [1, -3])
@pytest.mark.parametrize("size", [7, "S"])
def test_strided_dilated_padded_branches_of_any_size_merge(axis: int, size: int | str):
    build = ModelBuilder(["N", 2, size, size])
    options: dict[str, Any] = {"stride": 2, "dilation": [2, 1], "pad": [1, 0, 2, 1]}
    branches = [build.conv("x", count, 3, bias=count > 1, **options) for count in (1, 2, 3)]
    folded = folded_alone(build.model(concat(build, *branches, axis=axis)), {"N": 2, "S": 7})
    assert op_types(folded) == ["Conv"]
    assert attributes_of(folded.graph.node[0])["strides"] == [2, 2]


@pytest.mark.parametrize("rank", [1, 3])
def test_other_ranks_merge(rank: int):
    build = ModelBuilder([1, 2, *(7, 5, 6)[:rank]])
    branches = [build.conv("x", 2, 3, pad=1), build.conv("x", 3, 3, pad=1)]
    assert op_types(folded_alone(build.model(concat(build, *branches)))) == ["Conv"]


def test_normalisation_and_constants_of_a_branch_fold_in():
    build = ModelBuilder([1, 3, 6, 5])
    one = build.norm(build.conv("x", 4, 3, pad=1))
    two = build.op("Mul", build.conv("x", 2, 3, pad=1), build.constant(nonzero(build.rng, 2, 1, 1)))
    three = build.op("Sub", build.constant(0.7), build.conv("x", 2, 3, pad=1))
    folded = folded_alone(build.model(concat(build, one, two, three)))
    assert op_types(folded) == ["Conv"]


def test_concatenations_within_one_another_merge_at_once():
    build = ModelBuilder([1, 3, 6, 5])
    inner = concat(build, build.conv("x", 4), build.conv("x", 2))
    model = build.model(concat(build, build.conv("x", 3), inner))
    folded, statistics = fold(model, "merge_branches")
    assert_same_function(model, folded)
    assert op_types(folded) == ["Conv"]
    assert statistics["merge_branches"].applied == 1


def test_what_follows_folds_too_and_the_job_verifies_and_records_it():
    build = ModelBuilder(["N", 3, 6, 5])
    branches = [build.conv("x", count, 3, pad=1, out=f"b{count}") for count in (4, 2)]
    y = build.op("Relu", build.norm(concat(build, *branches, out="c"), out="n"), out="y")
    result = graphfold.optimize(build.model(y))
    assert op_types(result.model) == ["Conv", "Relu"]
    (found,) = recorded_folds(result.folded.ir.graph)
    assert found.replaces == ("n_b4", "n_b2", "n_c", "n_n")
    assert graphfold.optimize(result.model).model == result.model


def test_a_sum_of_concatenations_is_left_to_the_sums():
    build = ModelBuilder([1, 3, 6, 5])
    left = concat(build, build.conv("x", 4), build.conv("x", 2))
    model = build.model(build.op("Add", left, build.conv("x", 6), out="y"))
    result = graphfold.optimize(model)
    assert op_types(result.model) == ["Conv"]
    assert result.report.folds[0].pass_name == "merge_residual"


def small_beside_large(build: ModelBuilder) -> tuple[list[str], str]:
    return [build.conv("x", 2, 1), build.conv("x", 2, 3, pad=1)], "merging raises cost"


def grouped(build: ModelBuilder) -> tuple[list[str], str]:
    return [build.depthwise("x", pad=1), build.depthwise("x", pad=1)], "merging raises cost"


def skip_beside(build: ModelBuilder) -> tuple[list[str], str]:
    branches = [build.conv("x", 2, 3, pad=1), build.conv("x", 2, 3, pad=1), "x"]
    return branches, "merging raises cost"


@pytest.mark.parametrize("make", [small_beside_large, grouped, skip_beside])
def test_what_costs_more_stays_unless_growth_is_allowed(
    make: Callable[[ModelBuilder], tuple[list[str], str]],
):
    build = ModelBuilder([1, 4, 6, 5])
    branches, reason = make(build)
    model = build.model(concat(build, *branches, out="y"))
    assert reason in left_alone(model)["y"]
    assert op_types(folded_alone(model, allow_growth=True)) == ["Conv"]


def test_different_strides_are_refused():
    build = ModelBuilder([1, 2, 3, 3])
    branches = [build.conv("x", 2, 3, stride=2, pad=1), build.conv("x", 2, 2)]
    assert "stride" in left_alone(build.model(concat(build, *branches, out="y")))["y"]


def test_branches_that_are_read_elsewhere_stay():
    build = ModelBuilder([1, 2, 6, 5])
    one, two = build.conv("x", 2), build.conv("x", 2)
    model = build.model(concat(build, one, two), build.op("Relu", one))
    assert left_alone(model) == {}
    build = ModelBuilder([1, 2, 6, 5])
    one, two = build.conv("x", 2), build.conv("x", 2)
    assert left_alone(build.model(concat(build, one, two), one)) == {}


def test_branches_of_different_tensors_and_other_axes_are_no_site():
    build = ModelBuilder([1, 2, 6, 5])
    model = build.model(concat(build, build.conv("x", 2), build.conv(build.op("Relu", "x"), 2)))
    assert left_alone(model) == {}
    build = ModelBuilder([1, 2, 6, 5])
    branches = [build.conv("x", 2), build.conv("x", 2)]
    assert left_alone(build.model(concat(build, *branches, axis=2))) == {}


@settings(derandomize=True, deadline=None, max_examples=30, database=None)
@given(st.data())
def test_any_branches_of_equal_geometry_merge_exactly(data: st.DataObject):
    rank = data.draw(st.integers(1, 3))

    def draw(low: int, high: int, count: int = rank) -> list[int]:
        return [data.draw(st.integers(low, high)) for _ in range(count)]

    build = ModelBuilder([1, 3, *draw(5, 7)], seed=data.draw(st.integers(0, 99)))
    kernel = draw(1, 3)
    options: dict[str, Any] = {
        "stride": draw(1, 2),
        "dilation": draw(1, 2),
        "pad": draw(0, 2, 2 * rank),
    }
    branches = []
    for count in draw(1, 4, data.draw(st.integers(2, 4))):
        branch = build.conv("x", count, kernel, bias=data.draw(st.booleans()), **options)
        branches.append(build.norm(branch) if data.draw(st.booleans()) else branch)
    folded = folded_alone(build.model(concat(build, *branches)))
    assert op_types(folded) == ["Conv"]

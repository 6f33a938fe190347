"""Sums of linear branches: what becomes one convolution, and what must not."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import onnx
import pytest
from builders import (
    ModelBuilder,
    assert_same_function,
    attributes_of,
    fold,
    node_making,
    nonzero,
    op_types,
    reasons,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper

import graphfold


def merged(proto: onnx.ModelProto, *names: str, **options: Any) -> onnx.ModelProto:
    """The model after merging sums; must be one convolution of the same function."""
    folded, statistics = fold(proto, *(names or ("merge_residual",)), **options)
    assert_same_function(proto, folded, {"h": 7, "w": 8})
    assert op_types(folded) == ["Conv"], reasons(statistics)
    return folded


def left_alone(proto: onnx.ModelProto, **options: Any) -> dict[str, str]:
    """Reasons by tensor, where nothing was done."""
    folded, statistics = fold(proto, "merge_residual", **options)
    assert op_types(folded) == op_types(proto)
    return reasons(statistics)


# --- sums that merge ------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("swapped", [False, True])
def test_identity_residual_becomes_a_dirac_kernel(rank: int, swapped: bool):
    build = ModelBuilder([1, 4, *(6, 5, 7)[:rank]])
    conv = build.conv("x", 4, 3, pad=1)
    inputs = ("x", conv) if swapped else (conv, "x")
    folded = merged(build.model(build.op("Add", *inputs, out="y")))
    weights = {t.name: numpy_helper.to_array(t) for t in folded.graph.initializer}
    original = numpy_helper.to_array(build.initializers[0])
    expected = original.copy()
    expected[(range(4), range(4), *[1] * rank)] += 1
    found = weights[node_making(folded, "y").input[1]]
    np.testing.assert_allclose(found, expected, atol=1e-7)


def test_open_sizes_merge_too():
    build = ModelBuilder(["n", 4, "h", "w"])
    model = build.model(build.op("Add", build.conv("x", 4, 3, pad=1), "x"))
    folded, _ = fold(model, "merge_residual")
    assert op_types(folded) == ["Conv"]
    for sizes in ({"n": 1, "h": 6, "w": 7}, {"n": 2, "h": 9, "w": 4}):
        assert_same_function(model, folded, sizes)


@pytest.mark.parametrize("left_first", [False, True])
def test_a_repvgg_block_becomes_its_deployed_convolution(left_first: bool):
    build = ModelBuilder([1, 6, 7, 8])
    three = build.norm(build.conv("x", 6, 3, pad=1, bias=False))
    one = build.norm(build.conv("x", 6, 1, bias=False))
    skip = build.norm("x")
    if left_first:
        y = build.op("Add", build.op("Add", three, one), skip)
    else:
        y = build.op("Add", three, build.op("Add", skip, one))
    folded = merged(build.model(y))
    assert attributes_of(folded.graph.node[0])["kernel_shape"] == [3, 3]


def test_a_sum_of_three_in_one_node():
    build = ModelBuilder([1, 4, 6, 7])
    y = build.op("Sum", build.conv("x", 4, 3, pad=1), build.norm(build.conv("x", 4, 1)), "x")
    merged(build.model(y))


def test_a_strided_residual_with_its_projection():
    build = ModelBuilder([1, 4, 9, 8])
    branch = build.norm(build.conv("x", 6, 3, stride=2, pad=1))
    projection = build.norm(build.conv("x", 6, 1, stride=2))
    folded = merged(build.model(build.op("Add", branch, projection)))
    assert attributes_of(folded.graph.node[0])["strides"] == [2, 2]


def test_asymmetric_branches_of_3x1_and_1x3_beside_3x3():
    build = ModelBuilder([1, 4, 6, 7])
    square = build.conv("x", 4, 3, pad=1)
    tall = build.conv("x", 4, (3, 1), pad=[1, 0, 1, 0])
    wide = build.conv("x", 4, (1, 3), pad=[0, 1, 0, 1])
    merged(build.model(build.op("Add", build.op("Add", square, tall), wide)))


def test_a_depthwise_residual_stays_depthwise():
    build = ModelBuilder([1, 8, 6, 7])
    y = build.op("Add", build.depthwise("x", 3, pad=1), build.depthwise("x", 1))
    assert attributes_of(merged(build.model(y)).graph.node[0])["group"] == 8


@pytest.mark.parametrize("repair", [None, "map", "table", "ones", "channel"])
def test_an_inverted_residual_with_its_skip_is_exact_at_the_border(repair: str | None):
    build = ModelBuilder([1, 4, 8, 7])
    value = build.norm(build.conv("x", 64, 1))
    value = build.norm(build.depthwise(value, 3, pad=1))
    y = build.op("Add", build.norm(build.conv(value, 4, 1)), "x", out="y")
    model = build.model(y)
    folded, statistics = fold(model, "merge_residual", repair=repair)
    assert_same_function(model, folded)
    (record,) = statistics["merge_residual"].folds
    assert record.repair == (repair or "map")
    assert record.output == "y"


def test_blocks_in_a_row_merge_each():
    build = ModelBuilder([1, 4, 8, 7])
    value = "x"
    for number in range(3):
        value = build.op("Add", build.conv(value, 4, 3, pad=1), value, out=f"block_{number}")
    model = build.model(value)
    folded, statistics = fold(model)
    assert_same_function(model, folded, reach=3)
    assert op_types(folded) == ["Conv"] * 3
    assert [record.output for record in statistics["merge_residual"].folds][::-1] == [
        f"block_{number}" for number in range(3)
    ] or len(statistics["merge_residual"].folds) == 3


def test_a_sum_within_a_branch_of_a_sum():
    """The outer sum holds the inner one; whichever is merged first, one convolution remains."""
    build = ModelBuilder([1, 4, 6, 7])
    inner = build.op("Add", build.conv("x", 4, 1), "x")
    outer = build.op(
        "Add", build.conv(inner, 4, 3, pad=0, auto_pad="NOTSET"), build.conv("x", 4, 3)
    )
    merged(build.model(outer))


def test_a_tensor_added_to_itself_is_twice_not_once():
    build = ModelBuilder([1, 4, 6, 7])
    conv = build.conv("x", 4, 1)
    model = build.model(build.op("Add", conv, build.conv("x", 4, 1), out="y"))
    merged(model)
    build = ModelBuilder([1, 4, 6, 7])
    conv = build.conv("x", 4, 1)
    model = build.model(build.op("Add", conv, conv))
    folded, _ = fold(model)
    assert_same_function(model, folded)


def test_provenance_lists_every_branch():
    build = ModelBuilder([1, 4, 6, 7])
    conv = build.conv("x", 4, 3, pad=1, out="a")
    skip = build.norm("x", out="b")
    folded = merged(build.model(build.op("Add", conv, skip, out="y")))
    metadata = {prop.key: prop.value for prop in folded.graph.node[0].metadata_props}
    assert sorted(json.loads(metadata["graphfold.replaces"])) == ["n_a", "n_b", "n_y"]
    assert metadata["graphfold.pass"] == "merge_residual"


# --- sums that do not -----------------------------------------------------------------------------


def test_a_sum_that_would_cost_more_is_left_with_the_figures():
    build = ModelBuilder([1, 16, 8, 8])
    thin = build.conv(build.conv("x", 2, 1), 16, 1)
    model = build.model(build.op("Add", thin, build.depthwise("x", 5, pad=2), out="y"))
    assert "merging raises cost:" in left_alone(model)["y"]
    folded, _ = fold(model, "merge_residual", allow_growth=True)
    assert op_types(folded) == ["Conv"]
    assert_same_function(model, folded, reach=3)


def test_a_branch_of_padded_3x3_pairs_is_refused_with_the_reason():
    build = ModelBuilder([1, 4, 8, 8])
    branch = build.conv(build.conv("x", 4, 3, pad=1), 4, 3, pad=1)
    model = build.model(build.op("Add", branch, "x", out="y"))
    assert "at the border no single convolution is equal" in left_alone(model)["y"]


def test_branches_of_different_strides_are_refused():
    """Equal output sizes by padding alone: 5 -> 3 by stride 2 and by an unpadded 3x3."""
    build = ModelBuilder([1, 4, 5, 5])
    one, two = build.conv("x", 4, 3, stride=2, pad=1), build.conv("x", 4, 3)
    reason = left_alone(build.model(build.op("Add", one, two, out="y")))["y"]
    assert reason == "parallel branches of stride (2, 2) and (1, 1)"


def test_a_sum_by_broadcasting_is_refused():
    build = ModelBuilder([1, 4, 5, 5])
    model = build.model(build.op("Add", build.conv("x", 4, 1), build.conv("x", 1, 1), out="y"))
    assert "by broadcasting" in left_alone(model)["y"]
    build = ModelBuilder([1, 4, 5, 5])
    model = build.model(build.op("Add", build.conv("x", 4, 1), build.conv("x", 4, 5), out="y"))
    assert "different sizes" in left_alone(model)["y"]


def test_an_activation_in_the_branch_keeps_the_sum():
    build = ModelBuilder([1, 4, 6, 7])
    branch = build.conv(build.op("Relu", build.conv("x", 4, 1)), 4, 1)
    assert left_alone(build.model(build.op("Add", branch, "x"))) == {}


def test_a_branch_that_is_also_an_output_or_read_elsewhere_keeps_the_sum():
    build = ModelBuilder([1, 4, 6, 7])
    branch = build.conv("x", 4, 1)
    left_alone(build.model(build.op("Add", branch, "x"), branch))
    build = ModelBuilder([1, 4, 6, 7])
    branch = build.conv("x", 4, 1)
    left_alone(build.model(build.op("Add", branch, "x"), build.op("Relu", branch)))


def test_two_inputs_of_the_graph_are_not_branches_of_one():
    build = ModelBuilder([1, 4, 6, 7])
    build.inputs.append(helper.make_tensor_value_info("other", 1, [1, 4, 6, 7]))
    assert left_alone(build.model(build.op("Add", build.conv("x", 4, 1), "other"))) == {}


def test_weights_that_callers_may_override_are_not_folded():
    build = ModelBuilder([1, 4, 6, 7])
    weight = build.constant(nonzero(build.rng, 4, 4, 1, 1), "weight")
    info = helper.make_tensor_value_info(weight, 1, [4, 4, 1, 1])
    y = build.op("Add", build.conv("x", 4, 1, weight=weight), "x")
    left_alone(build.model(y, more_inputs=[info]))


def test_normalisation_in_training_mode_keeps_the_sum():
    build = ModelBuilder([1, 4, 6, 7])
    branch = build.norm(build.conv("x", 4, 1), outputs=["b", "m", "v"], training_mode=1)
    reason = left_alone(build.model(build.op("Add", branch, "x", out="y")))["y"]
    assert "training mode" in reason


@pytest.mark.parametrize("repair", ["map", "table"])
def test_a_forced_constant_repair_skips_sums_whose_sizes_are_open(repair: str):
    build = ModelBuilder([1, 4, "h", "w"])
    branch = build.depthwise(build.conv("x", 4, 1), 3, pad=1)
    model = build.model(build.op("Add", branch, "x", out="y"))
    assert "needs sizes that are fixed" in left_alone(model, repair=repair)["y"]


# --- stability ------------------------------------------------------------------------------------


def test_a_second_run_changes_nothing_and_the_job_verifies():
    build = ModelBuilder([1, 6, 9, 8])
    value = "x"
    for _ in range(2):
        value = build.op("Add", build.norm(build.conv(value, 6, 3, pad=1)), build.norm(value))
        value = build.op("Relu", value)
    first = graphfold.optimize(build.model(value), None, require_verify=True)
    assert op_types(first.model) == ["Conv", "Relu"] * 2
    second = graphfold.optimize(first.model, None)
    assert second.model.SerializeToString(deterministic=True) == first.model.SerializeToString(
        deterministic=True
    )


@settings(derandomize=True, deadline=None, max_examples=30, database=None)
@given(st.data())
def test_any_sum_keeps_its_function(data: st.DataObject):
    rank = data.draw(st.integers(1, 3))
    sizes = [data.draw(st.integers(5, 7)) for _ in range(rank)]
    stride = data.draw(st.integers(1, 2))
    build = ModelBuilder([1, 4, *sizes], seed=data.draw(st.integers(0, 99)))
    branches = []
    for _ in range(data.draw(st.integers(2, 4))):
        kind = data.draw(st.sampled_from(["conv", "pair", "skip"] if stride == 1 else ["conv"]))
        groups = data.draw(st.sampled_from([1, 2, 4]))
        if kind == "skip":
            branches.append(build.norm("x") if data.draw(st.booleans()) else "x")
            continue
        source = build.conv("x", 4, 1) if kind == "pair" else "x"
        half = [data.draw(st.integers(0, 1)) for _ in range(rank)]
        dilation = [data.draw(st.integers(1, 2)) for _ in range(rank)]
        kernel = [1 + 2 * each for each in half]
        pads = [each * step for each, step in zip(half, dilation, strict=True)] * 2
        branch = build.conv(
            source, 4, kernel, pad=pads, dilation=dilation, stride=stride, groups=groups
        )
        branches.append(build.norm(branch) if data.draw(st.booleans()) else branch)
    value = branches[0]
    for branch in branches[1:]:
        value = build.op("Add", value, branch)
    model = build.model(value)
    folded, _ = fold(model, allow_growth=data.draw(st.booleans()))
    assert_same_function(model, folded)


def test_matrices_have_no_axes_for_a_convolution():
    build = ModelBuilder([5, 4])
    build.op("Add", "x", "x", out="y")
    assert left_alone(build.model("y"), allow_growth=True) == {"y": "'x' has no spatial axes"}

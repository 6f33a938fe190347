"""Chains of convolutions: what merges, what stays apart and why, and that nothing is lost."""

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
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from onnx import helper

import graphfold


def conv_count(proto: onnx.ModelProto) -> int:
    return op_types(proto).count("Conv")


def assert_left_alone(proto: onnx.ModelProto, **options: Any) -> dict[str, str]:
    """Nothing is merged; returns the reasons by tensor."""
    folded, statistics = fold(proto, "merge_convs", **options)
    assert op_types(folded) == op_types(proto)
    assert statistics["merge_convs"].applied == 0
    return reasons(statistics)


def assert_merges(
    proto: onnx.ModelProto, convs: int, *, reach: int = 2, **options: Any
) -> onnx.ModelProto:
    """Merging leaves this many convolutions and the same function."""
    folded, _ = fold(proto, "merge_convs", **options)
    assert conv_count(folded) == convs
    sizes = {"h": 9, "w": 8, "n": 2}
    assert_same_function(proto, folded, sizes, reach=reach)
    return folded


# --- merges that pay ------------------------------------------------------------------------------


def test_expand_then_reduce_pointwise_convolutions_merge():
    build = ModelBuilder([1, 4, 6, 5])
    y = build.conv(build.conv("x", 24, 1), 6, 1, out="y")
    folded = assert_merges(build.model(y), 1)
    assert op_types(folded) == ["Conv"]
    assert node_making(folded, "y").op_type == "Conv"


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("sizes", [(8, 8), (9, 7)])
@pytest.mark.parametrize("open_sizes", [False, True])
def test_an_inverted_residual_without_activations_is_exact_at_its_border(
    stride: int, sizes: tuple[int, int], open_sizes: bool
):
    build = ModelBuilder([1, 4, "h", "w"] if open_sizes else [1, 4, *sizes])
    value = build.norm(build.conv("x", 64, 1, bias=False))
    value = build.norm(build.depthwise(value, 3, pad=1, stride=stride, bias=False))
    value = build.norm(build.conv(value, 4, 1, bias=False))
    model = build.model(value)
    folded, _ = fold(model, "merge_convs")
    for size in ({"h": 9, "w": 8}, {"h": 6, "w": 7}):
        assert_same_function(model, folded, size)
    assert "BatchNormalization" not in op_types(folded)
    main = [node for node in folded.graph.node if "x" in node.input and node.op_type == "Conv"]
    assert attributes_of(main[0])["kernel_shape"] == [3, 3]
    assert attributes_of(main[0])["strides"] == [stride] * 2


@pytest.mark.parametrize("repair", ["map", "table", "ones", "channel"])
def test_a_forced_repair_is_the_one_that_is_used(repair: str):
    build = ModelBuilder([1, 4, 8, 7])
    y = build.depthwise(build.conv("x", 64, 1), 3, pad=1)
    model = build.model(build.conv(y, 4, 1))
    folded, statistics = fold(model, "merge_convs", repair=repair)
    assert_same_function(model, folded)
    assert [each.repair for each in statistics["merge_convs"].folds] == [repair]


def test_two_repaired_merges_in_a_row_stay_apart_with_a_reason():
    build = ModelBuilder([1, 4, 8, 7])
    value = "x"
    for name in ("first", "second"):
        value = build.depthwise(build.conv(value, 64, 1, out=f"{name}_in"), 3, pad=1)
        value = build.conv(value, 4, 1, out=name)
    model = build.model(value)
    folded, statistics = fold(model, "merge_convs")
    assert_same_function(model, folded, reach=3)
    assert op_types(folded) == ["Conv", "Add"] * 2
    assert list(reasons(statistics).values()) == [
        "the merge into 'first' ends in the repair of its border"
    ]


@pytest.mark.parametrize("rank", [1, 3])
def test_other_ranks_merge(rank: int):
    build = ModelBuilder([1, 3, *(7, 6, 8)[:rank]])
    y = build.conv(build.conv("x", 30, 1), 3, 3, pad=1, stride=2)
    assert_merges(build.model(y), 1)


def test_half_precision_merges():
    build = ModelBuilder([1, 4, 6, 5], dtype=np.float16)
    y = build.conv(build.conv("x", 24, 1), 6, 1)
    folded = assert_merges(build.model(y), 1)
    assert {tensor.data_type for tensor in folded.graph.initializer} == {onnx.TensorProto.FLOAT16}


@pytest.mark.parametrize("opset", [8, 11, 13, 17, 20])
def test_merges_in_every_opset(opset: int):
    build = ModelBuilder([1, 4, 8, 7], opset=opset)
    value = build.norm(build.conv("x", 64, 1))
    value = build.conv(build.depthwise(value, 3, pad=1), 4, 1)
    folded, _ = fold(model := build.model(value), "merge_convs")
    assert_same_function(model, folded)
    assert folded.opset_import[0].version == opset


def test_padding_before_the_first_convolution_joins_it():
    build = ModelBuilder([1, 3, 7, 6])
    padded = build.pad("x", [0, 0, 0, 1], [0, 0, 2, 1])
    y = build.conv(build.conv(padded, 16, 3), 3, 1)
    folded = assert_merges(build.model(y), 1)
    assert op_types(folded) == ["Conv"]
    assert attributes_of(folded.graph.node[0])["pads"] == [0, 1, 2, 1]


def test_a_padding_that_is_not_zero_stays_before_the_merge():
    build = ModelBuilder([1, 3, 7, 6])
    padded = build.pad("x", [0, 0, 1, 1], [0, 0, 1, 1], mode="reflect")
    y = build.conv(build.conv(padded, 24, 1), 3, 1)
    folded = assert_merges(build.model(y), 1)
    assert op_types(folded) == ["Pad", "Conv"]


def test_cropping_between_convolutions_is_counted_at_what_it_costs():
    """Cropping by n grows the window by n taps: one step pays, twelve do not."""
    for crop, convs in ((1, 1), (12, 2)):
        build = ModelBuilder([1, 8, 40, 40])
        value = build.pad(build.conv("x", 32, 1), [0, 0, -crop, 0], [0, 0, 0, 0])
        model = build.model(build.conv(value, 8, 1))
        folded, _ = fold(model, "merge_convs")
        assert conv_count(folded) == convs, crop
        assert_same_function(model, folded)


# --- merges that would not ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "channels", "layers"),
    [
        ("two 3x3", 4, [(3, 4, 1), (3, 4, 1)]),
        ("3x3, 1x1, 3x3", 8, [(3, 8, 1), (1, 8, 1), (3, 8, 1)]),
        ("depthwise, pointwise at expansion 1", 8, [(3, 8, 8), (1, 4, 1)]),
        ("inverted residual of 5x5", 8, [(1, 24, 1), (5, 24, 24), (1, 8, 1)]),
        ("reduce then expand", 16, [(1, 2, 1), (1, 16, 1)]),
    ],
)
def test_merges_that_raise_cost_are_left_with_the_figures(
    name: str, channels: int, layers: list[tuple[int, int, int]]
):
    build = ModelBuilder([1, channels, 12, 12])
    value = "x"
    for kernel, out, groups in layers:
        value = build.conv(value, out, kernel, groups=groups)
    model = build.model(value)
    if name == "3x3, 1x1, 3x3":
        folded, statistics = fold(model, "merge_convs")
        assert conv_count(folded) == 2
        assert_same_function(model, folded)
        found = reasons(statistics)
    else:
        found = assert_left_alone(model)
    assert found
    assert all("merging raises cost:" in reason for reason in found.values()), found
    for reason in found.values():
        before, after = reason.split(": ")[1].removesuffix(" operations per image").split(" to ")
        assert int(before.replace(",", "")) < int(after.replace(",", ""))


@pytest.mark.parametrize("kind", ["BatchNormalization", "Mul"])
def test_what_folds_into_a_convolution_counts_nothing_for_or_against_a_merge(kind: str):
    """4 -> 2 -> 5 costs 18 products and merged 20, however much normalisation stands between."""
    build = ModelBuilder([1, 4, 12, 12])
    value = "x"
    for out in (2, 5):
        value = build.conv(value, out, 1)
        if kind == "Mul":
            value = build.op("Mul", value, build.constant(nonzero(build.rng, out, 1, 1)))
        else:
            value = build.norm(value)
    model = build.model(value)
    found = assert_left_alone(model)
    assert "merging raises cost: 2,592 to 2,880 operations per image" in found.values()
    folded, _ = fold(model)
    assert op_types(folded) == ["Conv", "Conv"]
    assert_same_function(model, folded)


def test_growth_is_allowed_on_demand():
    build = ModelBuilder([1, 4, 12, 12])
    model = build.model(build.conv(build.conv("x", 4, 3, pad=1), 4, 3))
    assert assert_left_alone(model)
    folded = assert_merges(model, 1, allow_growth=True, reach=3)
    assert attributes_of(folded.graph.node[0])["kernel_shape"] == [5, 5]
    assert attributes_of(folded.graph.node[0])["pads"] == [1, 1, 1, 1]


def test_a_chain_splits_where_it_costs_least():
    """64 -> 256 -> 64 pays; the 3x3 behind it joins since its input stays as narrow."""
    build = ModelBuilder([1, 16, 8, 8])
    wide = build.conv("x", 64, 1, out="wide")
    narrow = build.conv(wide, 16, 1, out="narrow")
    folded = assert_merges(build.model(build.conv(narrow, 16, 3, pad=1, out="y")), 1)
    assert attributes_of(node_making(folded, "y") if conv_count(folded) == 0 else next(
        node for node in folded.graph.node if node.op_type == "Conv"
    ))["kernel_shape"] == [3, 3]  # fmt: skip


def test_the_best_split_of_four_is_two_pairs():
    """Each pair passes through many channels; between the pairs there are few."""
    build = ModelBuilder([1, 12, 8, 8])
    one = build.conv("x", 48, 1, out="one")
    two = build.conv(one, 2, 1, out="two")
    three = build.conv(two, 48, 1, out="three")
    model = build.model(build.conv(three, 12, 1, out="four"))
    folded, statistics = fold(model, "merge_convs")
    assert conv_count(folded) == 2
    assert_same_function(model, folded)
    assert {name for node in folded.graph.node for name in node.output} == {"two", "four"}
    assert set(reasons(statistics)) == {"four"}
    assert "merging raises cost" in reasons(statistics)["four"]


def test_a_reason_is_true_where_the_pair_alone_would_be_cheaper():
    """b then c would pay, but a and b pay more: nobody is told that it raises cost."""
    build = ModelBuilder([1, 800, 40, 40])
    a = build.conv("x", 64, 3, out="a")
    b = build.conv(a, 48, 1, out="b")
    model = build.model(build.conv(b, 20, 3, out="c"))
    folded, statistics = fold(model, "merge_convs")
    assert {name for node in folded.graph.node for name in node.output} == {"b", "c"}
    (reason,) = reasons(statistics).values()
    before, after = reason.split(": ")[1].removesuffix(" operations per image").split(" to ")
    assert int(before.replace(",", "")) < int(after.replace(",", ""))


def test_normalisations_do_not_hide_a_refusal():
    """Both pieces end with a normalisation; that they stay apart is still reported."""
    build = ModelBuilder([1, 12, 8, 8])
    value = build.norm(build.conv(build.norm(build.conv("x", 48, 1)), 2, 1))
    value = build.norm(build.conv(value, 48, 1))
    value = build.norm(build.conv(value, 12, 1, out="last"))
    folded, statistics = fold(build.model(value), "merge_convs")
    assert conv_count(folded) == 2
    assert len(reasons(statistics)) == 1


def test_padded_3x3_after_padded_3x3_is_refused_with_the_reason():
    build = ModelBuilder([1, 4, 8, 8])
    first = build.conv("x", 64, 3, pad=1)
    model = build.model(build.conv(first, 2, 3, pad=1, out="second"))
    found = assert_left_alone(model, allow_growth=True)
    assert list(found) == ["second"]
    assert "at the border no single convolution is equal" in found["second"]


# --- what must not merge --------------------------------------------------------------------------


def two_pointwise(build: ModelBuilder) -> tuple[str, str]:
    hidden = build.conv("x", 24, 1, out="hidden")
    return hidden, build.conv(hidden, 4, 1, out="y")


def test_a_result_that_is_also_an_output_stays():
    build = ModelBuilder([1, 4, 6, 5])
    hidden, y = two_pointwise(build)
    assert_left_alone(build.model(y, hidden))


def test_a_result_that_something_else_reads_stays():
    build = ModelBuilder([1, 4, 6, 5])
    hidden, y = two_pointwise(build)
    assert_left_alone(build.model(y, build.op("Relu", hidden)))


def test_a_result_that_a_subgraph_reads_stays():
    """The second convolution runs in a branch of an If; nothing may move across its boundary."""
    build = ModelBuilder([1, 4, 6, 5])
    hidden = build.conv("x", 24, 1, out="hidden")
    weight = build.constant(nonzero(build.rng, 4, 24, 1, 1))
    info = helper.make_tensor_value_info("inner", 1, [1, 4, 6, 5])
    branches = []
    for name in ("then", "else"):
        conv = helper.make_node("Conv", [hidden, weight], [f"{name}_inner"], name=name)
        info = helper.make_tensor_value_info(f"{name}_inner", 1, [1, 4, 6, 5])
        branches.append(helper.make_graph([conv], name, [], [info]))
        if name == "then":
            single = branches[0]
    build.inputs.append(helper.make_tensor_value_info("flag", 9, []))
    relu = helper.make_node("Identity", ["x"], ["else_inner"])
    info = helper.make_tensor_value_info("else_inner", 1, None)
    other = helper.make_graph([relu], "else", [], [info])
    y = build.op("If", "flag", then_branch=single, else_branch=other, channels=4)
    model = build.model(y)
    folded, _ = fold(model)
    assert conv_count(folded) == 1
    onnx.checker.check_model(folded)
    assert op_types(folded) == op_types(model)


def test_an_activation_between_keeps_convolutions_apart():
    build = ModelBuilder([1, 4, 6, 5])
    hidden = build.op("Relu", build.conv("x", 24, 1))
    assert assert_left_alone(build.model(build.conv(hidden, 4, 1))) == {}


def test_normalisation_in_training_mode_keeps_convolutions_apart():
    build = ModelBuilder([1, 4, 6, 5])
    hidden = build.norm(
        build.conv("x", 24, 1), outputs=["normal", "running_mean", "running_variance"],
        training_mode=1,
    )  # fmt: skip
    assert_left_alone(build.model(build.conv(hidden, 4, 1)))


def test_weights_that_callers_may_override_are_not_folded():
    build = ModelBuilder([1, 4, 6, 5])
    _, y = two_pointwise(build)
    for tensor in list(build.initializers):
        info = helper.make_tensor_value_info(tensor.name, 1, list(tensor.dims))
        assert_left_alone(build.model(y, more_inputs=[info]))


def test_weights_that_are_inputs_by_rule_of_old_ir_are_folded():
    build = ModelBuilder([1, 4, 6, 5], opset=8, ir_version=3)
    _, y = two_pointwise(build)
    infos = [
        helper.make_tensor_value_info(tensor.name, 1, list(tensor.dims))
        for tensor in build.initializers
    ]
    model = build.model(y, more_inputs=infos)
    folded, _ = fold(model, "merge_convs")
    assert conv_count(folded) == 1
    assert_same_function(model, folded)


def test_an_unused_mask_output_of_dropout_is_no_obstacle_but_a_used_one_is():
    for used in (False, True):
        build = ModelBuilder([1, 4, 6, 5])
        hidden = build.conv("x", 24, 1)
        dropped = build.op("Dropout", hidden, outputs=["dropped", "mask"])
        y = build.conv(dropped, 4, 1, out="y")
        model = build.model(y)
        if used:
            model.graph.output.append(helper.make_tensor_value_info("mask", 9, None))
            assert_left_alone(model)
        else:
            assert_merges(model, 1)


# --- nothing is lost ------------------------------------------------------------------------------


def test_a_weight_that_two_convolutions_share_serves_both():
    build = ModelBuilder([1, 4, 6, 5])
    shared = build.constant(nonzero(build.rng, 4, 24, 1, 1), "shared")
    first = build.conv(build.conv("x", 24, 1), 4, 1, weight=shared)
    active = build.op("Relu", first)
    hidden = build.op("Relu", build.conv(active, 24, 1))
    folded = assert_merges(build.model(build.conv(hidden, 4, 1, weight=shared)), 3)
    assert "shared" in {tensor.name for tensor in folded.graph.initializer}


def test_a_chain_that_uses_one_weight_twice_merges():
    build = ModelBuilder([1, 4, 6, 5])
    shared = build.constant(nonzero(build.rng, 4, 4, 1, 1), "shared")
    y = build.conv(build.conv("x", 4, 1, weight=shared), 4, 1, weight=shared)
    folded = assert_merges(build.model(y), 1)
    assert "shared" not in {tensor.name for tensor in folded.graph.initializer}


def test_weights_that_are_outputs_of_the_graph_remain():
    build = ModelBuilder([1, 4, 6, 5])
    _, y = two_pointwise(build)
    weight = build.initializers[0].name
    model = build.model(y)
    dims = list(build.initializers[0].dims)
    model.graph.output.append(helper.make_tensor_value_info(weight, 1, dims))
    folded, _ = fold(model, "merge_convs")
    assert conv_count(folded) == 1
    assert_same_function(model, folded)


def test_dead_initializers_go_and_those_that_were_unused_stay():
    build = ModelBuilder([1, 4, 6, 5])
    _, y = two_pointwise(build)
    dead = {tensor.name for tensor in build.initializers}
    build.constant([1.0, 2.0], "unused")
    folded = assert_merges(build.model(y), 1)
    names = {tensor.name for tensor in folded.graph.initializer}
    assert "unused" in names
    assert not names & dead


def test_new_tensors_do_not_take_names_that_exist():
    build = ModelBuilder([1, 4, 6, 5])
    _, y = two_pointwise(build)
    build.constant([1.0], "y/graphfold.0")
    build.op("Identity", "x", out="y/graphfold.1")
    model = build.model(y, "y/graphfold.1")
    folded, _ = fold(model, "merge_convs")
    assert_same_function(model, folded)


def test_provenance_lists_the_original_nodes_through_repeated_merges():
    build = ModelBuilder([1, 4, 6, 5])
    hidden = build.conv("x", 24, 1, out="hidden")
    model = build.model(build.norm(build.conv(hidden, 4, 1, out="second"), out="y"))
    result = graphfold.optimize(model, None)
    (conv,) = result.model.graph.node
    metadata = {prop.key: prop.value for prop in conv.metadata_props}
    assert json.loads(metadata["graphfold.replaces"]) == ["n_hidden", "n_second", "n_y"]
    assert metadata["graphfold.pass"] == "merge_convs"


def test_the_fold_record_says_what_became_what():
    build = ModelBuilder([1, 4, 8, 7])
    value = build.depthwise(build.conv("x", 64, 1, out="a"), 3, pad=1, stride=2, out="b")
    _, statistics = fold(build.model(build.conv(value, 4, 1, out="y")), "merge_convs")
    (record,) = statistics["merge_convs"].folds
    assert record.output == "y"
    assert record.replaces == ("n_a", "n_b", "n_y")
    assert (record.kernel, record.strides, record.groups) == ((3, 3), (2, 2), 1)
    assert (record.boundary, record.segment) == ("exact", None)
    assert record.repair == "map"
    assert record.reach == ((1, 1), (1, 1))


def test_a_second_run_changes_nothing():
    build = ModelBuilder([1, 4, 9, 8])
    value = build.norm(build.conv("x", 64, 1))
    value = build.conv(build.norm(build.depthwise(value, 3, pad=1)), 4, 1)
    value = build.conv(build.op("Relu", value), 4, 3, pad=1)
    model = build.model(build.conv(value, 4, 3, pad=1))
    once, _ = fold(model)
    twice, statistics = fold(once)
    assert all(each.applied == 0 for each in statistics.values())
    assert once.SerializeToString(deterministic=True) == twice.SerializeToString(deterministic=True)


def test_the_same_model_gives_the_same_bytes():
    def make() -> bytes:
        build = ModelBuilder([1, 4, 9, 8])
        value = build.norm(build.conv("x", 64, 1))
        value = build.conv(build.norm(build.depthwise(value, 3, pad=1)), 4, 1)
        model = graphfold.optimize(build.model(value), None).model
        return model.SerializeToString(deterministic=True)

    assert make() == make()


def test_the_whole_job_verifies_and_reports():
    build = ModelBuilder([1, 4, 9, 8])
    value = build.norm(build.conv("x", 64, 1))
    value = build.conv(build.norm(build.depthwise(value, 3, pad=1)), 4, 1)
    value = build.conv(build.op("Relu", value), 8, 3, pad=1)
    model = build.model(build.conv(value, 8, 3, pad=1, out="y"))
    result = graphfold.optimize(model, None, require_verify=True)
    assert_same_function(model, result.model)
    assert len(result.report.folds) == 1
    assert {skip.site for skip in result.report.skipped} >= {"y"}
    assert result.report.verification is not None
    assert result.report.verification.passed


# --- sizes that are open --------------------------------------------------------------------------


@pytest.mark.parametrize("repair", ["map", "table"])
def test_a_forced_constant_repair_skips_runs_whose_sizes_are_open(repair: str):
    build = ModelBuilder([1, 4, "h", "w"])
    hidden = build.conv("x", 64, 1)
    model = build.model(build.conv(hidden, 4, 3, pad=1, out="y"))
    found = assert_left_alone(model, repair=repair)
    assert f"border repair '{repair}' needs sizes that are fixed" in found["y"]


def test_open_sizes_before_opset_9_are_skipped_with_the_reason():
    build = ModelBuilder([1, 4, "h", "w"], opset=8)
    hidden = build.conv("x", 64, 1)
    model = build.model(build.conv(hidden, 4, 3, pad=1, out="y"))
    found = assert_left_alone(model)
    assert "needs opset 9 or later" in found["y"]


# --- any chain ------------------------------------------------------------------------------------


@settings(derandomize=True, deadline=None, max_examples=40, database=None)
@given(st.data())
def test_any_chain_keeps_its_function(data: st.DataObject):
    rank = data.draw(st.integers(1, 3))
    sizes = [data.draw(st.integers(7, 9)) for _ in range(rank)]
    channels = data.draw(st.sampled_from([2, 4]))
    build = ModelBuilder([1, channels, *sizes], seed=data.draw(st.integers(0, 99)))
    value, left = "x", list(sizes)
    for _ in range(data.draw(st.integers(2, 4))):
        kernel = [data.draw(st.sampled_from([1, 1, 2, 3])) for _ in range(rank)]
        stride = [data.draw(st.sampled_from([1, 1, 2])) for _ in range(rank)]
        dilation = [data.draw(st.sampled_from([1, 1, 2])) for _ in range(rank)]
        pads = [data.draw(st.sampled_from([0, 0, 1, 2])) for _ in range(2 * rank)]
        for axis in range(rank):
            extent = (kernel[axis] - 1) * dilation[axis] + 1
            left[axis] += pads[axis] + pads[axis + rank] - extent
            left[axis] = left[axis] // stride[axis] + 1
        assume(min(left) > 0)
        value = build.conv(
            value, data.draw(st.sampled_from([2, 4])), kernel, stride=stride, dilation=dilation,
            pad=pads, groups=data.draw(st.sampled_from([1, 2])), bias=data.draw(st.booleans()),
        )  # fmt: skip
        if data.draw(st.booleans()):
            value = build.norm(value)
    model = build.model(value)
    folded, _ = fold(model, allow_growth=data.draw(st.booleans()))
    assert_same_function(model, folded, reach=3)


# --- what leads to a convolution ------------------------------------------------------------------


@pytest.mark.parametrize("op_type", ["Mul", "Div", "Add", "Sub"])
@pytest.mark.parametrize("shape", [(), (1, 6, 1, 1), (6, 1, 1)])
def test_constants_before_an_unpadded_convolution_fold_into_it(
    op_type: str, shape: tuple[int, ...]
):
    build = ModelBuilder([1, 6, 9, 8])
    value = build.op(op_type, "x", build.constant(nonzero(build.rng, *shape)))
    model = build.model(build.conv(value, 6, 3, out="y"))
    assert op_types(assert_merges(model, 1)) == ["Conv"]


def test_a_normalisation_before_an_unpadded_convolution_folds_into_it():
    build = ModelBuilder([1, 6, 9, 8])
    model = build.model(build.conv(build.norm("x"), 4, 3, stride=2, out="y"))
    assert op_types(assert_merges(model, 1)) == ["Conv"]


def test_a_normalisation_before_a_padded_convolution_is_repaired_where_that_is_cheaper():
    build = ModelBuilder([1, 16, 9, 8])
    narrow = build.model(build.conv(build.norm("x"), 4, 3, pad=1, out="y"))
    folded = assert_merges(narrow, 1)
    assert "BatchNormalization" not in op_types(folded)
    build = ModelBuilder([1, 4, 9, 8])
    wide = build.model(build.conv(build.norm("x"), 16, 3, pad=1, out="y"))
    assert "raises cost" in assert_left_alone(wide)["y"]


def test_a_zero_pad_and_constants_in_any_order_fold_into_the_convolution_behind():
    build = ModelBuilder([1, 5, 9, 8])
    value = build.pad("x", [0, 0, 1, 2], [0, 0, 0, 1])
    value = build.op("Neg", build.op("Mul", value, build.constant(nonzero(build.rng, 5, 1, 1))))
    folded = assert_merges(build.model(build.conv(value, 7, 3, out="y")), 1)
    assert attributes_of(node_making(folded, "y"))["pads"] == [1, 2, 0, 1]
    assert op_types(folded) == ["Conv"]


def test_a_constant_on_a_tensor_that_others_read_stays():
    build = ModelBuilder([1, 5, 9, 8])
    scaled = build.op("Mul", "x", build.constant(nonzero(build.rng, 5, 1, 1)), out="scaled")
    first, second = build.conv(scaled, 7, 3), build.conv(scaled, 7, 3)
    assert_left_alone(build.model(first, second))


def test_a_row_of_constants_as_long_as_there_are_channels_stays():
    build = ModelBuilder([1, 8, 9, 8])
    scaled = build.op("Mul", "x", build.constant(nonzero(build.rng, 8)))
    assert_left_alone(build.model(build.conv(scaled, 4, 3)))


def test_what_leads_to_a_convolution_ends_at_an_operator_that_is_not_per_channel():
    build = ModelBuilder([1, 4, 5, 6])
    value = build.op("Mul", build.norm("x"), build.constant(nonzero(build.rng, 6)))
    model = build.model(build.conv(build.norm(value), 3, 1, out="y"))
    folded, _ = fold(model)
    assert op_types(folded) == ["BatchNormalization", "Mul", "Conv"]
    assert_same_function(model, folded)

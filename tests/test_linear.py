"""What each linear operator means, regions of several, and why others are refused."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
import pytest
from builders import ModelBuilder, assert_same, nonzero, random_input, run, slow_conv
from onnx import helper

from graphfold.affine import AffineConv
from graphfold.errors import NotExactError
from graphfold.graph import Graph
from graphfold.linear import is_join
from graphfold.model import load
from graphfold.regions import find_region, region_affine, region_geometry


def affine_of(proto: onnx.ModelProto, entry: str = "x", output: str | None = None) -> AffineConv:
    """The region between two tensors as an affine convolution; its geometry must agree."""
    graph = Graph(load(proto))
    values = graph.values()
    order = {node: index for index, node in enumerate(graph.ir)}
    region = find_region(graph, values[entry], values[output or proto.graph.output[0].name], order)
    geometry = region_geometry(graph, region)
    affine = region_affine(graph, region)
    assert geometry.axes == affine.axes
    assert geometry.groups == affine.groups
    assert geometry.in_channels == affine.weight.shape[1] * affine.groups
    assert geometry.out_channels == affine.weight.shape[0]
    assert geometry.bordered or affine.border is None
    assert geometry.biased or not np.any(affine.bias)
    return affine


def assert_means(proto: onnx.ModelProto) -> AffineConv:
    """A model from x to its output is, run by onnxruntime, the affine convolution it stands for."""
    affine = affine_of(proto)
    feeds = random_input(proto)
    (expected,) = run(proto, feeds)
    actual = slow_conv(feeds["x"][0].astype(np.float64), affine)[None]
    assert_same(expected, actual.astype(np.float32), tolerance=5e-6)
    return affine


def refusal_of(proto: onnx.ModelProto, entry: str = "x", output: str | None = None) -> str:
    with pytest.raises(NotExactError) as refusal:
        affine_of(proto, entry, output)
    return refusal.value.what


# --- Conv -------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_conv_with_asymmetric_padding_stride_and_dilation(groups: int, bias: bool):
    build = ModelBuilder([1, 4, 9, 8], seed=groups)
    y = build.conv(
        "x", 8, (3, 2), stride=(2, 1), dilation=(1, 2), pad=[1, 0, 2, 3], groups=groups, bias=bias
    )
    affine = assert_means(build.model(y))
    assert np.any(affine.bias) == bias


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_conv_of_any_rank(rank: int):
    build = ModelBuilder([1, 2, *(7, 6, 5)[:rank]])
    assert_means(build.model(build.conv("x", 3, 3, pad=1, stride=2)))


def test_conv_without_any_attribute_takes_them_from_the_weight():
    build = ModelBuilder([1, 2, 6, 6])
    weight = build.constant(nonzero(build.rng, 3, 2, 3, 3))
    assert_means(build.model(build.op("Conv", "x", weight)))


@pytest.mark.parametrize("auto_pad", ["SAME_UPPER", "SAME_LOWER", "VALID"])
@pytest.mark.parametrize("size", [7, 8])
@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (3, 2), (2, 1), (4, 3), (1, 2), (5, 2)])
def test_conv_resolves_auto_pad_as_onnxruntime_does(
    auto_pad: str, size: int, kernel: int, stride: int
):
    build = ModelBuilder([1, 2, size, 9])
    y = build.conv("x", 2, kernel, stride=stride, auto_pad=auto_pad)
    assert_means(build.model(y))


def test_same_padding_without_stride_needs_no_size():
    build = ModelBuilder([1, 2, "h", "w"])
    y = build.conv("x", 2, (3, 4), auto_pad="SAME_UPPER")
    affine = affine_of(build.model(y))
    assert [(axis.begin, axis.end) for axis in affine.axes] == [(1, 1), (1, 2)]


def test_same_padding_with_stride_of_an_open_size_is_refused():
    build = ModelBuilder([1, 2, "h", "w"])
    y = build.conv("x", 2, 3, stride=2, auto_pad="SAME_UPPER")
    reason = refusal_of(build.model(y))
    assert "SAME_UPPER of 'n_conv_3' with stride 2 depends on a size that is not fixed" in reason


def test_conv_with_computed_weights_is_refused():
    build = ModelBuilder([1, 2, 6, 6])
    weight = build.constant(nonzero(build.rng, 2, 2, 3, 3))
    build.inputs.append(helper.make_tensor_value_info("scale", 1, [1]))
    scaled = build.op("Mul", weight, "scale")
    y = build.op("Conv", "x", scaled, channels=2)
    assert f"not single-entry: {scaled!r} enters at 'n_{y}'" in refusal_of(build.model(y))


# --- BatchNormalization -----------------------------------------------------------------------


@pytest.mark.parametrize("epsilon", [1e-3, 1e-5, None])
def test_batch_normalization_uses_its_own_epsilon(epsilon: float | None):
    build = ModelBuilder([1, 3, 4, 5])
    affine = assert_means(build.model(build.norm("x", epsilon=epsilon)))
    values = {t.name: onnx.numpy_helper.to_array(t) for t in build.initializers}
    gamma = next(value for name, value in values.items() if name.startswith("gamma"))
    variance = next(value for name, value in values.items() if name.startswith("variance"))
    expected = gamma / np.sqrt(variance.astype(np.float64) + (1e-5 if epsilon is None else epsilon))
    np.testing.assert_allclose(affine.weight[:, 0, 0, 0], expected, rtol=1e-7)


def test_batch_normalization_in_training_mode_is_refused():
    build = ModelBuilder([1, 3, 4, 5])
    y = build.norm("x", outputs=["y", "running_mean", "running_variance"], training_mode=1)
    assert "'n_y' normalises in training mode" in refusal_of(build.model(y))


def test_batch_normalization_with_more_outputs_trains_in_old_opsets():
    build = ModelBuilder([1, 3, 4, 5], opset=9)
    y = build.norm("x", outputs=["y", "m", "v", "sm", "sv"])
    assert "'n_y' normalises in training mode" in refusal_of(build.model(y))


def test_batch_normalization_trains_by_default_before_opset_7():
    for is_test, trains in ((None, True), (0, True), (1, False)):
        build = ModelBuilder([1, 3, 4, 5], opset=6)
        options = {} if is_test is None else {"is_test": is_test}
        model = build.model(build.norm("x", **options))
        if trains:
            assert "training mode" in refusal_of(model)
        else:
            affine_of(model)


def test_batch_normalization_per_pixel_is_refused():
    build = ModelBuilder([1, 3, 4, 5], opset=7)
    y = build.norm("x", spatial=0)
    assert "normalises per pixel (spatial=0)" in refusal_of(build.model(y))


def test_batch_normalization_with_statistics_from_outside_is_refused():
    build = ModelBuilder([1, 3, 4, 5])
    vectors = [build.constant(nonzero(build.rng, 3)) for _ in range(3)]
    build.inputs.append(helper.make_tensor_value_info("variance", 1, [3]))
    y = build.op("BatchNormalization", "x", *vectors, "variance")
    assert "not single-entry: 'variance' enters" in refusal_of(build.model(y))


# --- per-channel constants --------------------------------------------------------------------


@pytest.mark.parametrize("op_type", ["Add", "Sub", "Mul", "Div"])
@pytest.mark.parametrize("shape", [(), (1,), (3, 1, 1), (1, 3, 1, 1), (1, 1, 1, 1), (1, 1)])
@pytest.mark.parametrize("on_left", [False, True])
def test_constants_per_channel(op_type: str, shape: tuple[int, ...], on_left: bool):
    build = ModelBuilder([1, 3, 4, 5])
    constant = build.constant(nonzero(build.rng, *shape))
    inputs = (constant, "x") if on_left else ("x", constant)
    model = build.model(build.op(op_type, *inputs))
    if op_type == "Div" and on_left:
        assert "divides a constant by a tensor" in refusal_of(model)
    else:
        assert_means(model)


@pytest.mark.parametrize("rank", [1, 3])
def test_constants_per_channel_of_other_ranks(rank: int):
    build = ModelBuilder([1, 3, *(4, 5, 6)[:rank]])
    assert_means(
        build.model(build.op("Mul", "x", build.constant(nonzero(build.rng, 3, *[1] * rank))))
    )


@pytest.mark.parametrize("op_type", ["Add", "Sub", "Mul", "Div"])
@pytest.mark.parametrize("shape", [(4,), (1, 4), (4, 1), (1, 1, 1, 4), (1, 1, 4, 1), (4, 4)])
def test_constants_along_height_or_width_are_refused_even_where_the_size_is_that_of_channels(
    op_type: str, shape: tuple[int, ...]
):
    build = ModelBuilder([1, 4, 4, 4])
    model = build.model(build.op(op_type, "x", build.constant(nonzero(build.rng, *shape))))
    assert f"has shape {list(shape)}, which is not per channel" in refusal_of(model)


def test_constants_along_batch_are_refused():
    build = ModelBuilder([4, 4, 2, 2])
    model = build.model(build.op("Add", "x", build.constant(nonzero(build.rng, 4, 1, 1, 1))))
    assert "which is not per channel" in refusal_of(model)


def test_constants_that_add_channels_or_axes_are_refused():
    build = ModelBuilder([1, 1, 4, 4])
    model = build.model(build.op("Add", "x", build.constant(nonzero(build.rng, 3, 1, 1))))
    assert "which is not per channel" in refusal_of(model)
    build = ModelBuilder([1, 3, 4, 4])
    model = build.model(build.op("Add", "x", build.constant(nonzero(build.rng, 1, 1, 3, 1, 1))))
    assert "has more axes than its input" in refusal_of(model)


def test_division_by_zero_is_refused():
    build = ModelBuilder([1, 2, 3, 3])
    model = build.model(build.op("Div", "x", build.constant([[[1.0]], [[0.0]]])))
    assert "divides by zero" in refusal_of(model)


def test_constants_from_nodes_count_as_constants():
    build = ModelBuilder([1, 3, 4, 5])
    tensor = onnx.numpy_helper.from_array(nonzero(build.rng, 3, 1, 1).astype(np.float32))
    constant = build.op("Identity", build.op("Constant", value=tensor))
    scalar = build.op("Constant", value_float=0.75)
    assert_means(build.model(build.op("Mul", build.op("Add", "x", constant), scalar)))


def test_initializers_that_callers_may_override_are_not_constants():
    build = ModelBuilder([1, 3, 4, 5])
    constant = build.constant(nonzero(build.rng, 3, 1, 1), "shift")
    info = helper.make_tensor_value_info(constant, 1, [3, 1, 1])
    reason = refusal_of(build.model(build.op("Add", "x", constant), more_inputs=[info]))
    assert "not single-entry: 'shift' enters" in reason


def test_neg_and_identity():
    build = ModelBuilder([1, 3, 4, 5])
    assert_means(build.model(build.op("Identity", build.op("Neg", "x"))))


@pytest.mark.parametrize(("axis", "shape"), [(1, (3,)), (1, (3, 1)), (1, (3, 1, 1))])
def test_constants_before_opset_7_lie_where_their_axis_says(axis: int, shape: tuple[int, ...]):
    build = ModelBuilder([3, 3, 3, 3], opset=6)
    shift = nonzero(build.rng, *shape)
    model = build.model(build.op("Add", "x", build.constant(shift), axis=axis, broadcast=1))
    np.testing.assert_allclose(affine_of(model).bias, shift.reshape(-1), rtol=1e-6)


@pytest.mark.parametrize(("axis", "shape"), [(0, (3, 1, 1)), (2, (3,)), (3, (3,)), (0, (3,))])
def test_constants_before_opset_7_along_another_axis_are_refused(axis: int, shape: tuple[int, ...]):
    build = ModelBuilder([3, 3, 3, 3], opset=6)
    constant = build.constant(nonzero(build.rng, *shape))
    model = build.model(build.op("Add", "x", constant, axis=axis, broadcast=1))
    assert "which is not per channel" in refusal_of(model)


@pytest.mark.parametrize("opset", [7, 12, 17])
def test_dropout_at_inference_is_identity(opset: int):
    build = ModelBuilder([1, 3, 4, 5], opset=opset)
    assert_means(build.model(build.op("Dropout", "x")))


def test_dropout_that_may_train_is_refused():
    build = ModelBuilder([1, 3, 4, 5])
    ratio, training = build.constant(0.5), build.constant(True, dtype=bool)
    model = build.model(build.op("Dropout", "x", ratio, training))
    assert "may run in training mode" in refusal_of(model)
    build = ModelBuilder([1, 3, 4, 5])
    build = ModelBuilder([1, 3, 4, 5], opset=6)
    assert "may run in training mode" in refusal_of(build.model(build.op("Dropout", "x")))
    build = ModelBuilder([1, 3, 4, 5])
    build.inputs.append(helper.make_tensor_value_info("training", 9, []))
    model = build.model(build.op("Dropout", "x", build.constant(0.5), "training"))
    assert "'training' enters" in refusal_of(model)


def test_dropout_whose_mask_is_used_is_refused():
    build = ModelBuilder([1, 3, 4, 5])
    dropped = build.op("Dropout", "x", outputs=["dropped", "mask"])
    mask = build.op("Cast", "mask", to=1)
    model = build.model(build.op("Add", dropped, mask))
    with pytest.raises(NotExactError, match="mask"):
        affine_of(model, output="dropped")


# --- Pad --------------------------------------------------------------------------------------


@pytest.mark.parametrize("opset", [8, 11, 17, 19])
def test_pad_with_zeros_in_attribute_and_input_form(opset: int):
    build = ModelBuilder([1, 3, 6, 5], opset=opset)
    affine = assert_means(build.model(build.pad("x", [0, 0, 1, 2], [0, 0, 0, 3])))
    assert [(axis.begin, axis.end) for axis in affine.axes] == [(1, 0), (2, 3)]


def test_pad_that_crops():
    build = ModelBuilder([1, 3, 6, 5])
    assert_means(build.model(build.pad("x", [0, 0, -1, 2], [0, 0, -2, -1])))


@pytest.mark.parametrize("axes", [[2, 3], [3, 2], [-1, -2], [3]])
def test_pad_over_chosen_axes(axes: list[int]):
    build = ModelBuilder([1, 3, 6, 5], opset=18)
    amounts = list(range(1, 2 * len(axes) + 1))
    pads = build.constant(amounts, dtype=np.int64)
    zero = build.constant(0.0)
    chosen = build.constant(axes, dtype=np.int64)
    assert_means(build.model(build.op("Pad", "x", pads, zero, chosen)))


@pytest.mark.parametrize("mode", ["reflect", "edge"])
def test_pad_with_other_values_than_zero_is_refused(mode: str):
    build = ModelBuilder([1, 3, 6, 5])
    model = build.model(build.pad("x", [0, 0, 1, 1], [0, 0, 1, 1], mode=mode))
    assert f"does not pad with zeros ({mode})" in refusal_of(model)


def test_pad_with_a_constant_other_than_zero_is_refused():
    build = ModelBuilder([1, 3, 6, 5])
    pads = build.constant([0, 0, 1, 1] * 2, dtype=np.int64)
    model = build.model(build.op("Pad", "x", pads, build.constant(1.5)))
    assert "pads with a value other than zero" in refusal_of(model)
    build = ModelBuilder([1, 3, 6, 5], opset=8)
    model = build.model(build.pad("x", [0, 0, 1, 1], [0, 0, 1, 1], value=1.5))
    assert "pads with a value other than zero" in refusal_of(model)


def test_pad_of_channels_or_batch_is_refused():
    for begins in ([0, 1, 0, 0], [1, 0, 0, 0]):
        build = ModelBuilder([1, 3, 6, 5])
        model = build.model(build.pad("x", begins, [0, 0, 1, 1]))
        assert "pads batch or channels" in refusal_of(model)


def test_pad_by_amounts_that_are_computed_is_refused():
    build = ModelBuilder([1, 3, 6, 5])
    build.inputs.append(helper.make_tensor_value_info("pads", 7, [8]))
    reason = refusal_of(build.model(build.op("Pad", "x", "pads")))
    assert "'pads' enters" in reason


# --- AveragePool ------------------------------------------------------------------------------


@pytest.mark.parametrize("pad", [0, 1])
@pytest.mark.parametrize("stride", [1, 2])
def test_average_pool_that_counts_padding(pad: int, stride: int):
    build = ModelBuilder([1, 3, 7, 8])
    y = build.op(
        "AveragePool", "x", kernel_shape=[3, 2], strides=[stride] * 2, pads=[pad] * 4,
        count_include_pad=1,
    )  # fmt: skip
    assert assert_means(build.model(y)).groups == 3


def test_average_pool_that_does_not_count_padding_is_refused_only_where_it_pads():
    build = ModelBuilder([1, 3, 7, 8])
    assert_means(build.model(build.op("AveragePool", "x", kernel_shape=[3, 3])))
    build = ModelBuilder([1, 3, 7, 8])
    y = build.op("AveragePool", "x", kernel_shape=[3, 3], pads=[1, 1, 1, 1])
    assert "does not count padding: its weights differ at the border" in refusal_of(build.model(y))


def test_average_pool_that_rounds_up_is_refused():
    build = ModelBuilder([1, 3, 7, 8])
    y = build.op("AveragePool", "x", kernel_shape=[2, 2], strides=[2, 2], ceil_mode=1)
    assert "rounds its size up" in refusal_of(build.model(y))


# --- joins ------------------------------------------------------------------------------------


@pytest.mark.parametrize("axis", [1, -3])
def test_concat_over_channels_stacks_its_branches(axis: int):
    build = ModelBuilder([1, 3, 6, 5])
    branches = [build.conv("x", 2, 3, pad=1), build.conv("x", 4, 1), "x"]
    build._channels["x"] = 9
    joined = build.op("Concat", *branches, axis=axis, channels=9)
    assert_means(build.model(build.conv(joined, 2, 1)))


def test_concat_over_space_is_refused():
    build = ModelBuilder([1, 3, 6, 5])
    branches = [build.conv("x", 2, 1), build.conv("x", 2, 1)]
    model = build.model(build.op("Concat", *branches, axis=2))
    assert "is not over channels" in refusal_of(model)


@pytest.mark.parametrize("op_type", ["Add", "Sub", "Sum"])
def test_sums_and_differences_of_branches(op_type: str):
    build = ModelBuilder([1, 4, 6, 5])
    left = build.norm(build.conv("x", 4, 3, pad=1))
    right = build.op("Neg", build.depthwise("x", 3, pad=1))
    more = ["x"] if op_type == "Sum" else []
    assert_means(build.model(build.op(op_type, left, right, *more)))


def test_a_tensor_added_to_itself_counts_twice():
    build = ModelBuilder([1, 2, 4, 4])
    conv = build.conv("x", 2, 1)
    assert_means(build.model(build.op("Add", conv, conv)))


def test_branches_of_different_channels_are_refused():
    build = ModelBuilder([1, 3, 6, 5])
    model = build.model(build.op("Add", build.conv("x", 4, 1), build.conv("x", 1, 1)))
    assert "channels are added by broadcasting" in refusal_of(model)


def test_a_product_of_two_tensors_is_refused():
    build = ModelBuilder([1, 3, 6, 5])
    model = build.model(build.op("Mul", build.conv("x", 3, 1), "x"))
    assert "combines two tensors" in refusal_of(model)


def test_an_activation_is_refused_by_name():
    build = ModelBuilder([1, 3, 6, 5])
    model = build.model(build.op("Relu", build.conv("x", 3, 1), out="active"))
    assert "Relu 'n_active' is not a linear operator" in refusal_of(model)


def test_an_operator_of_another_domain_is_not_linear():
    build = ModelBuilder([1, 3, 6, 5])
    conv = build.conv("x", 3, 1)
    y = build.op("Conv", conv, build.constant(nonzero(build.rng, 3, 3, 1, 1)), domain="other")
    graph = helper.make_graph(
        build.nodes, "test", build.inputs, [helper.make_tensor_value_info(y, 1, None)],
        build.initializers,
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("other", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
    assert "is not a linear operator" in refusal_of(model)


def test_only_sums_and_concatenations_of_variable_tensors_join():
    build = ModelBuilder([1, 3, 6, 5])
    conv = build.conv("x", 3, 1)
    build.op("Add", conv, "x", out="join")
    build.op("Add", conv, build.constant(1.0), out="shift")
    build.op("Mul", conv, "x", out="product")
    build.op("Sum", conv, out="lone")
    graph = Graph(load(build.model("join", "shift", "product", "lone")))
    joins = {node.outputs[0].name for node in graph.ir if is_join(graph, node)}
    assert joins == {"join"}


# --- regions ----------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [(6, 7), (7, 6)])
@pytest.mark.parametrize("stride", [1, 2])
def test_a_whole_inverted_residual_with_its_skip_is_one_convolution(
    sizes: Sequence[int], stride: int
):
    build = ModelBuilder([1, 4, *sizes])
    value = build.norm(build.conv("x", 8, 1))
    value = build.norm(build.depthwise(value, 3, pad=1, stride=stride))
    value = build.norm(build.conv(value, 4, 1), epsilon=1e-5)
    if stride == 1:
        value = build.op("Add", "x", value)
    affine = assert_means(build.model(value))
    assert affine.weight.shape == (4, 4, 3, 3)
    assert affine.border is not None


def test_a_region_that_something_else_enters_is_refused_with_its_name():
    build = ModelBuilder([1, 3, 6, 5])
    first = build.conv("x", 3, 1, out="first")
    second = build.conv(first, 3, 1)
    model = build.model(build.op("Add", second, "x", out="sum"))
    reason = refusal_of(model, "first", "sum")
    assert reason == "it is not single-entry: 'x' enters at 'n_sum'"


def test_a_region_that_something_else_leaves_is_refused_with_its_name():
    build = ModelBuilder([1, 3, 6, 5])
    first = build.conv("x", 3, 1, out="first")
    second = build.conv(first, 3, 1, out="second")
    side = build.op("Relu", first, out="side")
    model = build.model(second, side)
    reason = refusal_of(model, "x", "second")
    assert reason == "it is not single-exit: 'first' is also read by 'n_side'"
    build = ModelBuilder([1, 3, 6, 5])
    first = build.conv("x", 3, 1, out="first")
    model = build.model(build.conv(first, 3, 1, out="second"), "first")
    reason = refusal_of(model, "x", "second")
    assert reason == "it is not single-exit: 'first' is an output of the graph"


def test_tensors_that_do_not_depend_on_each_other_are_refused():
    build = ModelBuilder([1, 3, 6, 5])
    model = build.model(build.conv("x", 3, 1, out="one"), build.conv("x", 3, 1, out="two"))
    reason = refusal_of(model, "one", "two")
    assert "'x' enters" in reason or "does not depend on 'one'" in reason


def test_a_region_whose_entry_has_no_shape_takes_it_from_its_weights():
    build = ModelBuilder([1, 4, 6, 5])
    y = build.conv("x", 4, 3, groups=2, pad=1)
    model = build.model(y)
    expected = affine_of(model)
    model.graph.input[0].type.tensor_type.ClearField("shape")
    model.graph.output[0].type.tensor_type.ClearField("shape")
    np.testing.assert_array_equal(affine_of(model).weight, expected.weight)


def test_a_region_without_shape_or_weights_is_refused():
    build = ModelBuilder([1, 4, 6, 5])
    model = build.model(build.op("Neg", "x"))
    model.graph.input[0].type.tensor_type.ClearField("shape")
    model.graph.output[0].type.tensor_type.ClearField("shape")
    assert "the shape of 'x' is unknown" in refusal_of(model)


def test_weights_are_read_in_double_precision():
    """A chain of scales that single precision would round is exact."""
    build = ModelBuilder([1, 1, 2, 2])
    value = "x"
    for factor in (1e-4, 3.0, 7e3):
        value = build.op("Mul", value, build.constant(factor))
    factors = [float(np.float32(factor)) for factor in (1e-4, 3.0, 7e3)]
    assert affine_of(build.model(value)).weight.item() == factors[0] * factors[1] * factors[2]

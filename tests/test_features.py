"""What folds, row by row: everything that a known optimizer folds, and what none of them does.

Each case is a tiny model through `graphfold.optimize` with its verification: the operators left,
and the outputs of both in onnxruntime with its optimizations off.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from builders import (
    ModelBuilder,
    assert_same_function,
    attributes_of,
    nonzero,
    op_types,
    random_input,
    run,
)
from corpus.hazards import HAZARDS
from onnx import TensorProto

import graphfold
from graphfold.errors import ModelError
from graphfold.model import save

Make = Callable[[ModelBuilder], str]


def optimized(proto: onnx.ModelProto, **options: Any) -> onnx.ModelProto:
    """The optimized model, checked against the input."""
    result = graphfold.optimize(proto, **options)
    assert_same_function(proto, result.model)
    return result.model


def transposed(build: ModelBuilder, groups: int) -> str:
    weight = build.constant(nonzero(build.rng, 4, 6 // groups, 3, 3))
    bias = build.constant(nonzero(build.rng, 6))
    return build.op("ConvTranspose", "x", weight, bias, group=groups, channels=6)


def dense(build: ModelBuilder, source: str, wide: int, *, bias: bool = True) -> str:
    """A Gemm, or a MatMul where it has no bias."""
    narrow = build._channels[source]
    weight = build.constant(nonzero(build.rng, narrow, wide))
    if not bias:
        return build.op("MatMul", source, weight, channels=wide)
    offset = build.constant(nonzero(build.rng, wide))
    return build.op("Gemm", source, weight, offset, channels=wide)


def with_constant(op_type: str, shape: tuple[int, ...], *, first: bool = False) -> Make:
    """Conv, then arithmetic with a constant of this shape."""

    def make(build: ModelBuilder) -> str:
        operands = [build.conv("x", 6, 3), build.constant(nonzero(build.rng, *shape))]
        return build.op(op_type, *(reversed(operands) if first else operands))

    return make


def before_conv(op_type: str, shape: tuple[int, ...], *, first: bool = False) -> Make:
    """Arithmetic with a constant of this shape, then Conv."""

    def make(build: ModelBuilder) -> str:
        operands = ["x", build.constant(nonzero(build.rng, *shape))]
        value = build.op(op_type, *(reversed(operands) if first else operands), channels=4)
        return build.conv(value, 6, 3)

    return make


def with_pad(
    begins: tuple[int, int],
    ends: tuple[int, int],
    *,
    axes: bool = False,
    value: float | None = None,
    mode: str = "constant",
    **conv: Any,
) -> Make:
    """Pad of the two spatial axes, then Conv."""

    def make(build: ModelBuilder) -> str:
        amounts = [*begins, *ends] if axes else [0, 0, *begins, 0, 0, *ends]
        inputs = ["x", build.constant(amounts, dtype=np.int64)]
        if value is not None or axes:
            inputs.append("" if value is None else build.constant(value))
        if axes:
            inputs.append(build.constant([2, 3], dtype=np.int64))
        return build.conv(build.op("Pad", *inputs, mode=mode, channels=4), 6, 3, **conv)

    return make


def repvgg(build: ModelBuilder, source: str = "x") -> str:
    three = build.norm(build.conv(source, 4, 3, pad=1, bias=False))
    one = build.norm(build.conv(source, 4, 1, bias=False))
    return build.op("Add", build.op("Add", three, one), build.norm(source))


def inverted(build: ModelBuilder) -> str:
    """An inverted residual block without activations: padding in the middle."""
    value = build.norm(build.conv("x", 24, 1, bias=False))
    value = build.norm(build.depthwise(value, 3, pad=1, bias=False))
    value = build.norm(build.conv(value, 4, 1, bias=False))
    return build.op("Add", value, "x")


def twice(build: ModelBuilder) -> str:
    weight = build.constant(nonzero(build.rng, 4, 4, 3, 3))
    one, two = (build.conv("x", 4, 3, weight=weight, bias=False) for _ in range(2))
    return build.op("Mul", one, build.op("Sigmoid", two))


def clipped(build: ModelBuilder, source: str, low: float | None, high: float | None) -> str:
    ends = ["" if end is None else build.constant(end) for end in (low, high)]
    return build.op("Clip", source, *ends)


# name: (opset, shape of x, model, operators left)
ROWS: dict[str, tuple[int, list[int], Make, list[str]]] = {
    # a normalisation behind
    "Conv+BN": (17, [1, 4, 7, 6], lambda b: b.norm(b.conv("x", 6, 3, bias=False)), ["Conv"]),
    "Conv+bias+BN": (17, [1, 4, 7, 6], lambda b: b.norm(b.conv("x", 6, 3, pad=1)), ["Conv"]),
    "depthwise+BN": (17, [1, 4, 7, 6], lambda b: b.norm(b.depthwise("x", 3)), ["Conv"]),
    "Conv 1d+BN": (17, [1, 4, 9], lambda b: b.norm(b.conv("x", 6, 3)), ["Conv"]),
    "Conv 3d+BN": (17, [1, 4, 5, 4, 5], lambda b: b.norm(b.conv("x", 6, 3)), ["Conv"]),
    "ConvTranspose+BN": (17, [1, 4, 5, 4], lambda b: b.norm(transposed(b, 1)), ["ConvTranspose"]),
    "ConvTranspose g=2+BN": (
        *(17, [1, 4, 5, 4]),
        *(lambda b: b.norm(transposed(b, 2)), ["ConvTranspose"]),
    ),
    "Gemm+BN": (17, [3, 4], lambda b: b.norm(dense(b, "x", 6)), ["Gemm"]),
    # a normalisation in front
    "BN+Conv": (17, [1, 4, 7, 6], lambda b: b.conv(b.norm("x"), 6, 3), ["Conv"]),
    "BN+BN+Conv": (17, [1, 4, 7, 6], lambda b: b.conv(b.norm(b.norm("x")), 6, 3), ["Conv"]),
    # arithmetic behind
    "Conv*channel": (17, [1, 4, 7, 6], with_constant("Mul", (1, 6, 1, 1)), ["Conv"]),
    "channel*Conv": (17, [1, 4, 7, 6], with_constant("Mul", (6, 1, 1), first=True), ["Conv"]),
    "Conv*scalar": (17, [1, 4, 7, 6], with_constant("Mul", ()), ["Conv"]),
    "Conv/scalar": (17, [1, 4, 7, 6], with_constant("Div", ()), ["Conv"]),
    "Conv/channel": (17, [1, 4, 7, 6], with_constant("Div", (6, 1, 1)), ["Conv"]),
    "Conv-const": (17, [1, 4, 7, 6], with_constant("Sub", (1, 6, 1, 1)), ["Conv"]),
    "const-Conv": (17, [1, 4, 7, 6], with_constant("Sub", (1, 6, 1, 1), first=True), ["Conv"]),
    "Conv+channel": (17, [1, 4, 7, 6], with_constant("Add", (1, 6, 1, 1)), ["Conv"]),
    "Conv+scalar": (17, [1, 4, 7, 6], with_constant("Add", (1,)), ["Conv"]),
    "-Conv": (17, [1, 4, 7, 6], lambda b: b.op("Neg", b.conv("x", 6, 3)), ["Conv"]),
    # arithmetic in front
    "channel*x, Conv": (17, [1, 4, 7, 6], before_conv("Mul", (1, 4, 1, 1), first=True), ["Conv"]),
    "x*scalar, Conv": (17, [1, 4, 7, 6], before_conv("Mul", ()), ["Conv"]),
    "x/channel, Conv": (17, [1, 4, 7, 6], before_conv("Div", (4, 1, 1)), ["Conv"]),
    "x+channel, Conv": (17, [1, 4, 7, 6], before_conv("Add", (1, 4, 1, 1)), ["Conv"]),
    "const-x, Conv": (17, [1, 4, 7, 6], before_conv("Sub", (4, 1, 1), first=True), ["Conv"]),
    # padding
    "Pad+Conv": (17, [1, 4, 7, 6], with_pad((1, 1), (1, 1)), ["Conv"]),
    "Pad asymmetric+Conv": (17, [1, 4, 7, 6], with_pad((0, 1), (2, 0)), ["Conv"]),
    "Pad axes+Conv": (18, [1, 4, 7, 6], with_pad((1, 0), (1, 2), axes=True), ["Conv"]),
    "Pad+padded Conv": (17, [1, 4, 7, 6], with_pad((1, 1), (0, 1), pad=1), ["Conv"]),
    "Pad+Conv VALID": (17, [1, 4, 7, 6], with_pad((1, 1), (1, 1), auto_pad="VALID"), ["Conv"]),
    "Pad+Conv SAME_UPPER": (
        *(17, [1, 4, 7, 6]),
        *(with_pad((1, 1), (1, 1), auto_pad="SAME_UPPER"), ["Conv"]),
    ),
    "Pad+Conv SAME_LOWER, stride 2": (
        *(17, [1, 4, 7, 6]),
        *(with_pad((1, 0), (1, 1), auto_pad="SAME_LOWER", stride=2), ["Conv"]),
    ),
    # activations and no-ops
    "Relu, Relu": (17, [1, 4, 7, 6], lambda b: b.op("Relu", b.op("Relu", "x")), ["Relu"]),
    "Relu, Relu6": (
        *(17, [1, 4, 7, 6]),
        *(lambda b: clipped(b, b.op("Relu", "x"), 0.0, 6.0), ["Clip"]),
    ),
    "Clip without bounds": (
        *(17, [1, 4, 7, 6]),
        *(lambda b: b.op("Clip", b.op("Relu", "x")), ["Relu"]),
    ),
    "MaxPool 1x1": (
        *(17, [1, 4, 7, 6]),
        *(lambda b: b.op("MaxPool", b.op("Relu", "x"), kernel_shape=[1, 1]), ["Relu"]),
    ),
    # the same twice
    "duplicate Convs": (17, [1, 4, 7, 6], twice, ["Conv", "Sigmoid", "Mul"]),
    # chains of convolutions
    "1x1, 3x3": (17, [1, 4, 7, 6], lambda b: b.conv(b.conv("x", 24, 1), 6, 3), ["Conv"]),
    "1x1, padded 3x3": (
        *(17, [1, 4, 14, 14]),
        *(lambda b: b.conv(b.conv("x", 24, 1, bias=False), 6, 3, pad=1), ["Conv"]),
    ),
    "3x3, 1x1": (17, [1, 4, 7, 6], lambda b: b.conv(b.conv("x", 24, 3, pad=1), 6, 1), ["Conv"]),
    "1x1, 1x1": (17, [1, 4, 7, 6], lambda b: b.conv(b.conv("x", 24, 1), 6, 1), ["Conv"]),
    "Gemm, Gemm": (17, [3, 4], lambda b: dense(b, dense(b, "x", 24), 6), ["Gemm"]),
    "MatMul, MatMul": (
        *(17, [3, 4]),
        *(lambda b: dense(b, dense(b, "x", 24, bias=False), 6, bias=False), ["MatMul"]),
    ),
    # branches
    "RepVGG": (17, [1, 4, 7, 6], repvgg, ["Conv"]),
    "3x3 + 3x3": (
        *(17, [1, 4, 7, 6]),
        *(lambda b: b.op("Add", b.conv("x", 6, 3, pad=1), b.conv("x", 6, 3, pad=1)), ["Conv"]),
    ),
    "1x1 | 1x1": (
        *(17, [1, 4, 7, 6]),
        *(lambda b: b.op("Concat", b.conv("x", 2, 1), b.conv("x", 4, 1), axis=1), ["Conv"]),
    ),
    "Conv(x) + x": (
        *(17, [1, 4, 7, 6]),
        *(lambda b: b.op("Add", b.conv("x", 4, 3, pad=1), "x"), ["Conv"]),
    ),
}


@pytest.mark.parametrize("row", ROWS)
def test_folds(row: str):
    opset, shape, make, left = ROWS[row]
    build = ModelBuilder(shape, opset=opset)
    proto = build.model(make(build))
    assert op_types(optimized(proto)) == left


COSTLIER: dict[str, tuple[list[int], Make]] = {
    "3x3, 3x3 unpadded": ([1, 4, 20, 20], lambda b: b.conv(b.conv("x", 4, 3), 4, 3)),
    "padded 3x3, 3x3": ([1, 4, 9, 8], lambda b: b.conv(b.conv("x", 4, 3, pad=1), 4, 3)),
    "1x1, 3x3 narrow in the middle": (
        [1, 8, 7, 6],
        lambda b: b.conv(b.conv("x", 2, 1), 8, 3),
    ),
    "1x1, 1x1 narrow in the middle": ([1, 8, 7, 6], lambda b: b.conv(b.conv("x", 2, 1), 8, 1)),
    "depthwise, pointwise": ([1, 4, 7, 6], lambda b: b.conv(b.depthwise("x", 3), 8, 1)),
}


@pytest.mark.parametrize("row", COSTLIER)
def test_merges_that_raise_cost_wait_for_allow_growth(row: str):
    shape, make = COSTLIER[row]
    build = ModelBuilder(shape)
    proto = build.model(make(build))
    by_default = graphfold.optimize(proto)
    assert op_types(by_default.model) == ["Conv", "Conv"]
    assert any(
        "raise" in skip.reason or "cost" in skip.reason for skip in by_default.report.skipped
    )
    assert op_types(optimized(proto, allow_growth=True)) == ["Conv"]


def test_gemms_with_a_narrow_middle_wait_for_allow_growth():
    build = ModelBuilder([3, 8])
    proto = build.model(dense(build, dense(build, "x", 2), 8))
    assert op_types(optimized(proto)) == ["Gemm", "Gemm"]
    assert op_types(optimized(proto, allow_growth=True)) == ["Gemm"]


def test_a_block_without_activations_is_one_convolution_and_its_border():
    build = ModelBuilder([1, 4, 14, 14])
    proto = build.model(inverted(build))
    for growth in (False, True):
        left = op_types(optimized(proto, allow_growth=growth))
        assert left.count("Conv") == 1
        assert "BatchNormalization" not in left


def test_a_normalisation_in_front_of_a_padded_convolution_folds_where_cost_falls():
    """The border's repair is as large as the output: here smaller than the input."""
    build = ModelBuilder([1, 16, 14, 14])
    proto = build.model(build.conv(build.norm("x"), 2, 3, pad=1, stride=2))
    assert op_types(optimized(proto)) == ["Conv", "Add"]


def test_a_normalisation_in_front_of_a_padded_convolution_stays_where_its_repair_costs_more():
    build = ModelBuilder([1, 8, 14, 14])
    result = graphfold.optimize(build.model(build.conv(build.norm("x"), 8, 3, pad=1, out="y")))
    assert op_types(result.model) == ["BatchNormalization", "Conv"]
    (skip,) = [skip for skip in result.report.skipped if skip.site == "y"]
    assert "cost" in skip.reason


def test_normalisation_alone_stays():
    build = ModelBuilder([1, 4, 5, 6])
    assert op_types(optimized(build.model(build.norm("x")))) == ["BatchNormalization"]


def test_a_second_padding_behind_a_window_is_refused_with_its_reason():
    build = ModelBuilder([1, 4, 9, 8])
    proto = build.model(build.conv(build.conv("x", 4, 3, pad=1), 4, 3, pad=1, out="y"))
    for growth in (False, True):
        result = graphfold.optimize(proto, allow_growth=growth)
        assert op_types(result.model) == ["Conv", "Conv"]
        (skip,) = [skip for skip in result.report.skipped if skip.site == "y"]
        assert "pad" in skip.reason


@pytest.mark.parametrize(
    "make",
    [
        with_pad((1, 1), (1, 1), mode="reflect"),
        with_pad((1, 1), (1, 1), mode="edge"),
        with_pad((1, 1), (1, 1), value=0.5),
        with_pad((-1, 0), (0, 0)),
    ],
)
def test_other_paddings_stay(make: Make):
    build = ModelBuilder([1, 4, 7, 6])
    assert op_types(optimized(build.model(make(build)))) == ["Pad", "Conv"]


def test_equal_initializers_are_stored_once():
    build = ModelBuilder([1, 4, 7, 6])
    weight = nonzero(build.rng, 4, 4, 3, 3)
    first = build.conv("x", 4, 3, weight=build.constant(weight), bias=False)
    second = build.conv(build.op("Relu", first), 4, 3, weight=build.constant(weight), bias=False)
    result = optimized(build.model(second))
    assert len(result.graph.initializer) == 1


def test_a_negated_result_folds_like_any_scale():
    build = ModelBuilder([3, 4])
    assert op_types(optimized(build.model(build.op("Neg", dense(build, "x", 6))))) == ["Gemm"]
    build = ModelBuilder([1, 4, 5, 4])
    proto = build.model(build.op("Neg", transposed(build, 2)))
    assert op_types(optimized(proto)) == ["ConvTranspose"]


# --- hazards --------------------------------------------------------------------------------------


# What onnxruntime does not load.
NOT_LOADED = ("operator of another domain", "two nodes of one name")


def runnable(proto: onnx.ModelProto) -> onnx.ModelProto:
    """A copy that onnxruntime loads: without names of nodes, and without custom operators."""
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    for node in list(copy.graph.node):
        node.name = ""
        if node.domain:
            copy.graph.output[0].name = node.input[0]
            copy.graph.node.remove(node)
    return copy


@pytest.mark.parametrize("name", HAZARDS)
def test_hazards_keep_their_function(name: str):
    proto = HAZARDS[name]()
    result = graphfold.optimize(proto)
    assert result.report.verification is not None
    assert list(result.model.graph.output) == list(proto.graph.output)
    assert result.report.verification.passed is (None if name in NOT_LOADED else True)
    before, after = runnable(proto), runnable(result.model)
    feeds = random_input(before)
    for one, two in zip(run(before, feeds), run(after, feeds), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-5 * np.abs(one).max())


def test_a_constant_along_the_width_is_not_per_channel():
    proto = HAZARDS["Conv times a row as wide as it has channels"]()
    assert op_types(graphfold.optimize(proto).model) == ["Conv", "Mul"]


def test_normalisation_in_training_mode_stays():
    proto = HAZARDS["BatchNormalization in training mode"]()
    assert op_types(graphfold.optimize(proto).model) == ["Conv", "BatchNormalization"]


def test_a_weight_that_is_an_output_keeps_its_values():
    proto = HAZARDS["weight is a graph output"]()
    result = graphfold.optimize(proto).model
    assert op_types(result) == ["Conv"]
    feeds = random_input(proto)
    np.testing.assert_array_equal(run(proto, feeds)[1], run(result, feeds)[1])


def test_convolutions_that_share_weights_fold_each_with_its_own():
    proto = HAZARDS["two convolutions share their weight"]()
    assert op_types(graphfold.optimize(proto).model).count("BatchNormalization") == 0


def test_callers_can_still_replace_a_weight():
    proto = HAZARDS["weight that callers may replace"]()
    result = graphfold.optimize(proto).model
    assert list(result.graph.input) == list(proto.graph.input)
    feeds = random_input(proto)
    feeds["w"] = np.random.default_rng(9).standard_normal((6, 4, 3, 3)).astype(np.float32)
    assert not np.allclose(run(proto, feeds)[0], run(proto, random_input(proto))[0])
    np.testing.assert_allclose(run(proto, feeds)[0], run(result, feeds)[0], rtol=1e-4, atol=1e-5)


def test_an_output_without_a_shape_is_no_obstacle():
    proto = HAZARDS["output without a shape"]()
    assert not proto.graph.output[1].type.tensor_type.HasField("shape")
    assert op_types(graphfold.optimize(proto).model) == ["Conv", "Relu"]


def test_a_dangling_input_is_an_error_and_no_file(tmp_path: Path):
    build = ModelBuilder([1, 4, 7, 6])
    proto = build.model(build.norm(build.conv("x", 6, 3)))
    proto.graph.node[1].input[0] = "nowhere"
    with pytest.raises(ModelError, match="nowhere"):
        graphfold.optimize(proto)
    path, out = tmp_path / "in.onnx", tmp_path / "out.onnx"
    path.write_bytes(proto.SerializeToString())
    with pytest.raises(ModelError, match="nowhere"):
        save(graphfold.optimize(path).folded, out)
    assert not out.exists()


def test_padding_keeps_its_attributes_in_the_convolution():
    """Padding becomes the convolution's own, in the right place of begins and ends."""
    build = ModelBuilder([1, 4, 7, 6], opset=18)
    proto = build.model(with_pad((1, 0), (0, 2), axes=True)(build))
    (conv,) = optimized(proto).graph.node
    assert attributes_of(conv)["pads"] == [1, 0, 0, 2]


def test_custom_operators_and_what_is_around_them_survive():
    proto = HAZARDS["operator of another domain"]()
    result = graphfold.optimize(proto)
    assert op_types(result.model) == ["Conv", "Unheard"]
    assert result.report.verification.passed is None
    assert result.model.graph.input[0].type.tensor_type.elem_type == TensorProto.FLOAT

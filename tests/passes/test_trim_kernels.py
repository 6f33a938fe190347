"""Outer taps of zeros go, and with them shifts that all channels share; asymmetric branches."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from builders import (
    Array,
    ModelBuilder,
    assert_same_function,
    attributes_of,
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
from graphfold.passes.trim_kernels import trim
from graphfold.rewrite import recorded_folds


def shift(build: ModelBuilder, source: str, *taps: tuple[int, int], pad: int = 1) -> str:
    """A depthwise 3x3 whose channel c holds a 1 at taps[c], or all at the only tap."""
    channels = build._channels[source]
    weight = np.zeros((channels, 1, 3, 3))
    for channel in range(channels):
        weight[(channel, 0, *taps[channel % len(taps)])] = 1
    return build.depthwise(source, pad=pad, bias=False, weight=build.constant(weight))


def folded_alone(proto: onnx.ModelProto) -> onnx.ModelProto:
    folded, _ = fold(proto, "trim_kernels")
    assert_same_function(proto, folded)
    again, statistics = fold(folded, "trim_kernels")
    assert statistics["trim_kernels"].applied == 0
    assert again.SerializeToString() == folded.SerializeToString()
    return folded


def shape_of(proto: onnx.ModelProto, index: int = 0) -> tuple[list[int], list[int]]:
    found = attributes_of(proto.graph.node[index])
    return list(found["kernel_shape"]), list(found["pads"])


@st.composite
def cases(draw: st.DrawFn) -> tuple[AffineConv, Array]:
    axes = tuple(
        Axis(
            draw(st.integers(1, 5)),
            draw(st.integers(1, 2)),
            draw(st.integers(1, 2)),
            draw(st.integers(0, 4)),
            draw(st.integers(0, 4)),
        )
        for _ in range(2)
    )
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    affine = random_affine(rng, axes, 4, 4, draw(st.sampled_from([1, 4])))
    first = [draw(st.integers(0, axis.kernel - 1)) for axis in axes]
    last = [draw(st.integers(at, axis.kernel - 1)) for at, axis in zip(first, axes, strict=True)]
    mask = np.zeros(affine.weight.shape[2:])
    mask[tuple(slice(a, b + 1) for a, b in zip(first, last, strict=True))] = 1
    weight = affine.weight * mask
    return AffineConv(weight, affine.bias, axes, affine.groups), rng.normal(size=(1, 4, 9, 10))


@settings(max_examples=200, deadline=None, derandomize=True)
@given(cases())
def test_the_trimmed_kernel_is_the_same_map(case: tuple[AffineConv, Array]) -> None:
    affine, x = case
    trimmed = trim(affine)
    np.testing.assert_allclose(trimmed.apply(x), affine.apply(x), rtol=1e-12, atol=1e-12)
    assert min(min(axis.begin, axis.end) for axis in trimmed.axes) >= 0
    assert trim(trimmed).axes == trimmed.axes


@pytest.mark.parametrize(
    ("tap", "kernel", "pads"),
    [
        ((1, 1), [1, 1], [0, 0, 0, 0]),
        ((1, 2), [1, 2], [0, 0, 0, 1]),
        ((1, 0), [1, 2], [0, 1, 0, 0]),
        ((0, 2), [2, 2], [1, 0, 0, 1]),
    ],
)
def test_a_shift_keeps_the_taps_that_it_needs(
    tap: tuple[int, int], kernel: list[int], pads: list[int]
):
    build = ModelBuilder([1, 4, 6, 7])
    folded = folded_alone(build.model(shift(build, "x", tap)))
    assert shape_of(folded) == (kernel, pads)
    assert attributes_of(folded.graph.node[0])["group"] == 4


def test_a_shift_that_is_padding_alone_joins_the_convolution_behind():
    """Tap (1, 1) of a 3x3 with padding 2 is padding by 1; merged with 3x3, a padded 3x3."""
    build = ModelBuilder([1, 4, 6, 7])
    proto = build.model(build.conv(shift(build, "x", (1, 1), pad=2), 5, 3, out="y"))
    folded, _ = fold(proto)
    assert_same_function(proto, folded)
    assert op_types(folded) == ["Conv"]
    assert shape_of(folded) == ([3, 3], [1, 1, 1, 1])


def test_a_merged_kernel_is_minimal():
    """Two opposite shifts of a larger padding cancel: no zero rows are left of the 5x5."""
    build = ModelBuilder([1, 4, 8, 8])
    value = shift(build, shift(build, "x", (1, 2), pad=2), (1, 0), pad=0)
    proto = build.model(build.conv(value, 3, 1, out="y"))
    folded, _ = fold(proto, allow_growth=True)
    assert_same_function(proto, folded)
    assert op_types(folded) == ["Conv"]
    assert shape_of(folded) == ([1, 1], [0, 0, 0, 0])


def test_channels_that_shift_differently_keep_what_any_of_them_needs():
    build = ModelBuilder([1, 4, 6, 7])
    folded = folded_alone(build.model(shift(build, "x", (1, 0), (1, 2))))
    assert shape_of(folded) == ([1, 3], [0, 1, 0, 1])


def test_what_lies_over_pixels_stays():
    build = ModelBuilder([1, 4, 6, 7])
    proto = build.model(shift(build, "x", (0, 0), pad=0))
    folded, statistics = fold(proto, "trim_kernels")
    assert folded.graph.node[0] == proto.graph.node[0]
    assert statistics["trim_kernels"].found == 0


def test_same_padding_that_attributes_state_is_trimmed_too():
    build = ModelBuilder([1, 4, 6, 7])
    weight = np.zeros((4, 1, 3, 3))
    weight[:, :, 1] = nonzero(build.rng, 4, 1, 3)
    name = build.constant(weight)
    folded = folded_alone(build.model(build.depthwise("x", weight=name, auto_pad="SAME_UPPER")))
    assert shape_of(folded) == ([1, 3], [0, 1, 0, 1])


def test_provenance_and_bound():
    build = ModelBuilder([1, 4, 6, 7])
    result = graphfold.optimize(build.model(shift(build, build.op("Relu", "x"), (1, 2))))
    (recorded,) = recorded_folds(result.folded.ir.graph)
    assert recorded.pass_name == "trim_kernels"
    assert recorded.macs == (4 * 9 * 42, 4 * 2 * 42)
    assert recorded.coefficients is not None


def branch(build: ModelBuilder, kernel: list[int]) -> str:
    pads = [size // 2 for size in kernel] * 2
    return build.norm(build.conv("x", 6, kernel, pad=pads, bias=False))


def test_three_by_three_beside_its_row_and_column_is_one_convolution():
    build = ModelBuilder([1, 4, 8, 7])
    square, row, column = (branch(build, kernel) for kernel in ([3, 3], [1, 3], [3, 1]))
    proto = build.model(build.op("Add", build.op("Add", square, row), column, out="y"))
    folded, _ = fold(proto)
    assert_same_function(proto, folded)
    assert op_types(folded) == ["Conv"]
    assert shape_of(folded) == ([3, 3], [1, 1, 1, 1])


def row_and_column_behind(pad: int) -> onnx.ModelProto:
    build = ModelBuilder([1, 4, 12, 12])
    square = build.conv("x", 4, 3, pad=pad)
    row = build.conv(square, 4, [1, 3], pad=[0, pad, 0, pad], out="row")
    return build.model(build.conv(row, 4, [3, 1], pad=[pad, 0, pad, 0], out="y"))


def test_row_and_column_behind_a_square_merge_with_allow_growth_only():
    proto = row_and_column_behind(0)
    folded, statistics = fold(proto)
    assert op_types(folded) == ["Conv", "Conv", "Conv"]
    assert reasons(statistics) == {
        "row": "merging raises cost: 18,240 to 19,200 operations per image",
        "y": "merging raises cost: 6,912 to 9,216 operations per image",
    }
    grown, _ = fold(proto, allow_growth=True)
    assert_same_function(proto, grown)
    assert shape_of(grown) == ([5, 5], [0, 0, 0, 0])
    assert op_types(grown) == ["Conv"]


@pytest.mark.parametrize("allow_growth", [False, True])
def test_padded_rows_behind_a_padded_square_are_refused(allow_growth: bool):
    proto = row_and_column_behind(1)
    folded, statistics = fold(proto, allow_growth=allow_growth)
    assert op_types(folded) == ["Conv", "Conv", "Conv"]
    assert "at the border no single convolution is equal" in reasons(statistics)["row"]

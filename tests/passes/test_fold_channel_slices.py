"""Slices and Splits of channels fold into the convolution beside them."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from builders import ModelBuilder, assert_same_function, fold, node_making, op_types, reasons
from onnx import numpy_helper

import graphfold
from graphfold.rewrite import recorded_folds


def sliced(
    build: ModelBuilder,
    source: str,
    start: int,
    end: int,
    step: int = 1,
    *,
    out: str = "s",
    axis: int = 1,
) -> str:
    """A Slice as the opset has it; the builder counts what is left."""
    channels = len(range(build._channels[source])[start:end:step])
    if build.opset < 10:
        assert step == 1
        amounts: dict[str, Any] = {"starts": [start], "ends": [end], "axes": [axis]}
        return build.op("Slice", source, out=out, channels=channels, **amounts)
    inputs = [build.constant([number], dtype=np.int64) for number in (start, end, axis, step)]
    return build.op("Slice", source, *inputs, out=out, channels=channels)


def split(build: ModelBuilder, source: str, widths: list[int]) -> list[str]:
    """A Split over channels as the opset has it, named s0, s1, ..."""
    names = [f"s{number}" for number in range(len(widths))]
    if build.opset < 13:
        build.op("Split", source, outputs=names, axis=1, split=widths)
    else:
        build.op("Split", source, build.constant(widths, dtype=np.int64), outputs=names, axis=1)
    build._channels.update(zip(names, widths, strict=True))
    return names


def folded_alone(proto: onnx.ModelProto, **options: Any) -> onnx.ModelProto:
    folded, _ = fold(proto, "fold_channel_permutation", **options)
    assert_same_function(proto, folded)
    again, statistics = fold(folded, "fold_channel_permutation", **options)
    assert statistics["fold_channel_permutation"].applied == 0
    assert again.SerializeToString() == folded.SerializeToString()
    return folded


def left_alone(proto: onnx.ModelProto) -> dict[str, str]:
    folded, statistics = fold(proto, "fold_channel_permutation")
    assert op_types(folded) == op_types(proto)
    return reasons(statistics)


def weight_of(folded: onnx.ModelProto, output: str) -> Any:
    kept = {t.name: numpy_helper.to_array(t) for t in folded.graph.initializer}
    return kept[node_making(folded, output).input[1]]


@pytest.mark.parametrize(
    ("opset", "start", "end", "step"),
    [
        (9, 1, 4, 1),
        (9, -4, -1, 1),
        (17, 0, 2**31, 2),
        (17, -1, -(2**62), -1),
        (17, 4, 0, -2),
        (17, -100, 3, 1),
        (13, 2, 3, 1),
    ],
)
@pytest.mark.parametrize("axis", [1, -3])
def test_rows_are_taken_before_a_slice(opset: int, start: int, end: int, step: int, axis: int):
    build = ModelBuilder([1, 3, 6, 5], opset=opset)
    conv = build.conv("x", 6, 3, pad=1)
    proto = build.model(build.op("Tanh", sliced(build, conv, start, end, step, axis=axis)))
    folded = folded_alone(proto)
    assert op_types(folded) == ["Conv", "Tanh"]
    weight = numpy_helper.to_array(build.initializers[0])
    np.testing.assert_array_equal(weight_of(folded, "s"), weight[start:end:step])


def test_columns_are_put_back_behind_a_slice_that_keeps_all_channels():
    build = ModelBuilder([1, 4, 6, 5])
    value = sliced(build, "x", -1, -(2**62), -1)
    folded = folded_alone(build.model(build.conv(value, 3, 3, pad=1, out="y")))
    assert op_types(folded) == ["Conv"]
    weight = numpy_helper.to_array(build.initializers[4])
    np.testing.assert_array_equal(weight_of(folded, "y"), weight[:, ::-1])


def test_columns_of_zeros_are_refused_and_made_with_allow_growth():
    build = ModelBuilder([1, 4, 6, 5])
    proto = build.model(build.conv(sliced(build, "x", 1, 3), 3, 3, pad=1))
    reason = "merging raises cost: 'n_s' takes 2 channels to 4"
    assert left_alone(proto) == {"s": reason}
    assert op_types(folded_alone(proto, allow_growth=True)) == ["Conv"]


@pytest.mark.parametrize("axis", [0, 2, 3])
def test_slices_of_other_axes_are_no_site(axis: int):
    build = ModelBuilder([2, 4, 6, 5])
    value = sliced(build, build.conv("x", 4), 1, 2, axis=axis)
    assert left_alone(build.model(value)) == {}


def test_slices_of_several_axes_are_no_site():
    build = ModelBuilder([2, 4, 6, 5])
    amounts = [build.constant(n, dtype=np.int64) for n in ([0, 1], [2, 3], [1, 2])]
    assert left_alone(build.model(build.op("Slice", build.conv("x", 4), *amounts))) == {}


def test_slices_by_computed_amounts_are_no_site():
    build = ModelBuilder([2, 4, 6, 5])
    amounts = [build.op("Abs", build.constant([n], dtype=np.int64)) for n in (0, 2, 1)]
    assert left_alone(build.model(build.op("Slice", build.conv("x", 4), *amounts))) == {}


def test_a_slice_that_leaves_groups_out_is_refused():
    build = ModelBuilder([1, 4, 6, 5])
    proto = build.model(sliced(build, build.depthwise("x", out="c"), 0, 2))
    assert left_alone(proto) == {"s": "it would undo the grouping of 'n_c'"}


@pytest.mark.parametrize("opset", [11, 13, 17])
def test_results_of_a_split_that_nothing_reads_are_not_computed(opset: int):
    build = ModelBuilder([1, 3, 6, 5], opset=opset)
    names = split(build, build.norm(build.conv("x", 6, 3, pad=1)), [1, 3, 2])
    folded = folded_alone(build.model(build.op("Relu", names[1]), names[2]))
    assert "Split" not in op_types(folded)
    assert weight_of(folded, "s1").shape[0] == 3
    assert weight_of(folded, "s2").shape[0] == 2


def test_a_split_in_full_use_becomes_convolutions_with_allow_growth_only():
    build = ModelBuilder([1, 3, 6, 5])
    names = split(build, build.conv("x", 6, 3, pad=1), [4, 2])
    gate = build.op("Sigmoid", build.conv(names[1], 4))
    proto = build.model(build.op("Mul", build.op("Relu", names[0]), gate))
    reason = "a convolution for each result of 'n_s0' may be slower"
    assert left_alone(proto) == {"s0": reason, "s1": reason}
    folded = folded_alone(proto, allow_growth=True)
    assert sorted(op_types(folded)) == ["Conv", "Conv", "Conv", "Mul", "Relu", "Sigmoid"]


def test_a_split_of_a_tensor_that_is_read_elsewhere_is_refused():
    build = ModelBuilder([1, 3, 6, 5])
    conv = build.conv("x", 6, out="c")
    names = split(build, conv, [4, 2])
    proto = build.model(names[0], build.op("Relu", conv, out="r"))
    assert left_alone(proto) == {"s0": "'c' is also read by 'n_r'"}


def test_provenance_and_bound():
    build = ModelBuilder([1, 3, 6, 5])
    value = sliced(build, build.conv("x", 6, 3, pad=1, out="c"), 1, 4)
    result = graphfold.optimize(build.model(build.op("Relu", value, out="y")))
    (record,) = result.report.to_json()["folds"]
    assert 0 < record["rounding"] <= record["bound"]
    (recorded,) = recorded_folds(result.folded.ir.graph)
    assert recorded.replaces == ("n_c", "n_s")
    assert recorded.macs == (30 * 6 * 27, 30 * 3 * 27)

"""Pools move in front of pointwise convolutions, normalisation and constants per channel."""

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
    random_affine,
    reasons,
)
from onnx import numpy_helper

import graphfold
from graphfold.geometry import Axis
from graphfold.rewrite import recorded_folds


def folded_alone(proto: onnx.ModelProto, sizes: dict[str, int] | None = None) -> onnx.ModelProto:
    folded, _ = fold(proto, "move_pooling")
    assert_same_function(proto, folded, sizes)
    again, statistics = fold(folded, "move_pooling")
    assert again.SerializeToString() == folded.SerializeToString()
    assert statistics["move_pooling"].applied == 0
    return folded


def left_alone(proto: onnx.ModelProto) -> dict[str, str]:
    folded, statistics = fold(proto, "move_pooling")
    assert op_types(folded) == op_types(proto)
    return reasons(statistics)


def mean(build: ModelBuilder, source: str, **options: Any) -> str:
    """A ReduceMean over the spatial axes, counted from the end, as the opset has it."""
    axes = [-1 - axis for axis in range(build.rank)]
    if build.opset < 18:
        return build.op("ReduceMean", source, axes=axes, **options)
    return build.op("ReduceMean", source, build.constant(axes, dtype=np.int64), **options)


POOLS: dict[str, Callable[[ModelBuilder, str], str]] = {
    "global": lambda b, v: b.op("GlobalAveragePool", v, out="y"),
    "mean": lambda b, v: mean(b, v, out="y"),
    "mean without axes": lambda b, v: mean(b, v, keepdims=0, out="y"),
    "window": lambda b, v: b.op(
        "AveragePool", v, kernel_shape=[2] * b.rank, strides=[2] * b.rank, out="y"
    ),
}


def test_the_mean_of_a_convolution_is_the_convolution_of_the_mean():
    rng = np.random.default_rng(0)
    conv = random_affine(rng, (Axis(), Axis()), 6, 4, 2)
    x = rng.normal(size=(2, 6, 5, 7))
    mean_after = conv.apply(x).mean(axis=(2, 3), keepdims=True)
    np.testing.assert_allclose(conv.apply(x.mean(axis=(2, 3), keepdims=True)), mean_after)


@pytest.mark.parametrize("opset", [13, 17, 18])
@pytest.mark.parametrize("sizes", [(6,), (6, 5), (4, 5, 3)])
@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("groups", [1, 2])
def test_a_pointwise_convolution_runs_behind_the_pool(
    pool: str, sizes: tuple[int, ...], groups: int, opset: int
):
    build = ModelBuilder([2, 4, *sizes], opset=opset)
    proto = build.model(POOLS[pool](build, build.conv("x", 6, groups=groups)))
    folded = folded_alone(proto)
    flat = ["Flatten"] if pool == "mean without axes" else []
    assert op_types(folded) == [proto.graph.node[1].op_type, "Conv", *flat]
    assert folded.graph.node[-1].output[0] == "y"
    kept = {t.name: numpy_helper.to_array(t) for t in folded.graph.initializer}
    for tensor in build.initializers[:2]:
        np.testing.assert_array_equal(kept[tensor.name], numpy_helper.to_array(tensor))


@pytest.mark.parametrize("pool", POOLS)
def test_chains_with_normalisation_and_constants_go_as_one(pool: str):
    build = ModelBuilder(["N", 3, "H", "W"])
    value = build.norm(build.conv("x", 8), epsilon=1e-2)
    value = build.op("Mul", value, build.constant(nonzero(build.rng, 8, 1, 1)))
    value = build.op("Sub", build.constant(nonzero(build.rng, 1, 8, 1, 1)), value)
    value = build.op("Neg", build.conv(value, 4, bias=False))
    folded = folded_alone(build.model(POOLS[pool](build, value)), {"N": 2, "H": 6, "W": 4})
    assert op_types(folded)[1:7] == ["Conv", "BatchNormalization", "Mul", "Sub", "Conv", "Neg"]


def test_half_precision_moves_too():
    build = ModelBuilder([1, 4, 6, 6], dtype=np.float16)
    folded = folded_alone(build.model(build.op("GlobalAveragePool", build.conv("x", 6))))
    assert op_types(folded) == ["GlobalAveragePool", "Conv"]


def test_pools_behind_one_another_move_in_one_run():
    build = ModelBuilder([1, 4, 12, 12])
    options = {"kernel_shape": [2, 2], "strides": [2, 2]}
    inner = build.op("AveragePool", build.conv("x", 6), **options)
    proto = build.model(build.op("GlobalAveragePool", build.conv(inner, 8), out="y"))
    folded = folded_alone(proto)
    assert op_types(folded) == ["AveragePool", "GlobalAveragePool", "Conv", "Conv"]


@pytest.mark.parametrize(
    "padding",
    [
        {"pads": [1, 0, 0, 1]},
        {"auto_pad": "SAME_UPPER"},
        {"ceil_mode": 1},
        {"count_include_pad": 1},
    ],
    ids=str,
)
def test_windows_that_average_over_pixels_alone_move(padding: dict[str, Any]):
    build = ModelBuilder([1, 4, 7, 7])
    options = {"kernel_shape": [3, 3], "strides": [2, 2], **padding}
    folded = folded_alone(build.model(build.op("AveragePool", build.conv("x", 6), **options)))
    assert op_types(folded) == ["AveragePool", "Conv"]
    assert attributes_of(folded.graph.node[0])["kernel_shape"] == [3, 3]


@pytest.mark.parametrize("padding", [{"pads": [1, 0, 0, 1]}, {"auto_pad": "SAME_UPPER"}])
def test_counted_padding_is_refused(padding: dict[str, Any]):
    build = ModelBuilder([1, 4, 7, 7])
    options = {"kernel_shape": [3, 3], "strides": [2, 2], "count_include_pad": 1, **padding}
    y = build.op("AveragePool", build.conv("x", 6), out="y", **options)
    assert left_alone(build.model(y)) == {"y": "'n_y' counts its padding, which has no bias"}


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"kernel": 3}, "the windows of 'n_c' are larger than a pixel"),
        ({"stride": 2}, "'n_c' has strides or padding"),
        ({"pad": 1}, "'n_c' has strides or padding"),
    ],
)
def test_windows_that_are_not_single_pixels_are_refused(options: dict[str, Any], reason: str):
    build = ModelBuilder([1, 4, 7, 7])
    y = build.op("GlobalAveragePool", build.conv("x", 6, out="c", **options), out="y")
    assert left_alone(build.model(y)) == {"y": reason}


def test_results_that_are_read_elsewhere_are_refused():
    build = ModelBuilder([1, 4, 7, 7])
    conv = build.conv("x", 6, out="c")
    pooled = build.op("GlobalAveragePool", conv, out="p")
    y = build.op("Add", pooled, conv)
    assert left_alone(build.model(y)) == {"p": "'c' is also read elsewhere"}


def test_outputs_of_the_graph_are_refused():
    build = ModelBuilder([1, 4, 7, 7])
    conv = build.conv("x", 6, out="c")
    pooled = build.op("GlobalAveragePool", conv, out="p")
    assert left_alone(build.model(pooled, conv)) == {"p": "'c' is an output of the graph"}


def test_activations_stay_in_front():
    build = ModelBuilder([1, 4, 7, 7])
    active = build.op("Relu", build.conv("x", 6))
    assert left_alone(build.model(build.op("GlobalAveragePool", active))) == {}


@pytest.mark.parametrize("axes", [[2], [1, 2, 3], [0, 2, 3]])
def test_means_over_other_axes_stay(axes: list[int]):
    build = ModelBuilder([2, 4, 7, 7])
    left_alone(build.model(build.op("ReduceMean", build.conv("x", 6), axes=axes)))


def test_a_map_of_constants_stays_in_front():
    build = ModelBuilder([1, 4, 5, 5])
    shifted = build.op("Add", build.conv("x", 6), build.constant(nonzero(build.rng, 1, 6, 5, 5)))
    left_alone(build.model(build.op("GlobalAveragePool", shifted)))


def test_a_normalisation_that_folds_at_no_cost_stays_beside_its_convolution():
    build = ModelBuilder([1, 4, 8, 8])
    value = build.norm(build.conv("x", 6, 3))
    assert left_alone(build.model(build.op("GlobalAveragePool", value))) == {}


def test_a_wide_tensor_behind_a_narrow_convolution_is_refused():
    """A depthwise pool of 3x3 over 64 channels costs more than what two channels' conv saves."""
    build = ModelBuilder([1, 64, 8, 8])
    conv = build.conv("x", 1)
    options = {"kernel_shape": [3, 3], "strides": [1, 1]}
    y = build.op("AveragePool", conv, out="y", **options)
    figures = "4,420 to 23,040"
    assert left_alone(build.model(y)) == {
        "y": f"moving the pool raises cost: {figures} operations per image"
    }


def test_behind_the_pool_the_convolution_merges_with_the_next():
    build = ModelBuilder([1, 32, 8, 8])
    value = build.op("GlobalAveragePool", build.norm(build.conv("x", 64)))
    proto = build.model(build.conv(value, 16, out="y"))
    result = graphfold.optimize(proto)
    assert [node.op_type for node in result.folded.ir.graph] == ["GlobalAveragePool", "Conv"]


def test_provenance_and_bound():
    build = ModelBuilder([1, 8, 7, 7])
    narrow = build.conv(build.conv("x", 2, out="narrow"), 16, out="c")
    y = build.op("ReduceMean", narrow, axes=[2, 3], keepdims=0, out="y")
    result = graphfold.optimize(build.model(y))
    record = result.report.to_json()["folds"][0]
    assert record["output"] == "y"
    assert 0 < record["rounding"] <= record["bound"]
    (recorded,) = recorded_folds(result.folded.ir.graph)
    assert recorded.replaces == ("n_narrow", "n_c", "n_y")
    assert recorded.pass_name == "move_pooling"
    assert recorded.macs == (49 * 48, 48)
    assert recorded.coefficients is not None

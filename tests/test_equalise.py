"""Equalisation keeps every number, narrows ranges, and refuses what would change the function."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from builders import ModelBuilder, run
from numpy.typing import NDArray
from onnx import numpy_helper

from graphfold.calibration.equalise import equalise, ranges_table, weight_ranges
from graphfold.calibration.judge import Judge, outputs_of
from graphfold.calibration.quantize import quantize
from graphfold.model import load, to_proto


def uneven(between: str | None = "Relu", *, depthwise: bool = True) -> onnx.ModelProto:
    """Pointwise, depthwise, pointwise; the first one's channels are up to 4096 apart."""
    build = ModelBuilder((2, 4, 9, 9))

    def active(value: str) -> str:
        if between == "Clip":
            return build.op("Clip", value, build.constant(0.0), build.constant(6.0))
        return value if between is None else build.op(between, value)

    scale = np.exp2(np.linspace(-6, 6, 8))
    weight = build.rng.standard_normal((8, 4, 1, 1)) * scale[:, None, None, None]
    x = build.conv("x", 8, weight=build.constant(weight), out="first")
    x = active(x)
    if depthwise:
        x = active(build.depthwise(x, 3, pad=1, out="middle"))
    weight = build.rng.standard_normal((4, 8, 1, 1)) / scale[:, None, None]
    return build.model(build.conv(x, 4, weight=build.constant(weight), out="y"))


def feed(seed: int = 0) -> dict[str, NDArray[Any]]:
    return {"x": np.random.default_rng(seed).standard_normal((2, 4, 9, 9)).astype(np.float32)}


@pytest.mark.parametrize("depthwise", [False, True])
@pytest.mark.parametrize("between", [None, "Relu"])
def test_not_one_bit_changes(between: str | None, depthwise: bool) -> None:
    proto = uneven(between, depthwise=depthwise)
    found = equalise(load(proto))
    assert found.changed[0] == "first"
    assert not found.skipped
    (expected,), (actual,) = run(proto, feed()), run(to_proto(found.model), feed())
    np.testing.assert_array_equal(actual, expected)


def test_ranges_are_narrower_and_quantize_better() -> None:
    model = load(uneven())
    found = equalise(model).model
    before, after = weight_ranges(model), weight_ranges(found)
    assert before[0].outputs > 1000
    assert before[-1].inputs > 1000
    assert all(max(item.outputs, item.inputs) < 16 for item in after)
    images = [feed(seed) for seed in range(8)]
    judge = [feed(100)]
    errors = [
        Judge(outputs_of(model, judge)).verdict(outputs_of(quantize(each, images), judge)).damage
        for each in (model, found)
    ]
    assert errors[1] < errors[0] / 4


def test_grouped_convolutions_are_scaled_by_input_channel() -> None:
    build = ModelBuilder((1, 4, 6, 6))
    weight = build.rng.standard_normal((8, 4, 1, 1)) * np.exp2(np.arange(8))[:, None, None, None]
    x = build.op("Relu", build.conv("x", 8, weight=build.constant(weight)))
    proto = build.model(build.conv(x, 6, 3, pad=1, groups=2, out="y"))
    found = equalise(load(proto))
    assert found.changed
    one = {"x": feed()["x"][:1, :, :6, :6]}
    np.testing.assert_array_equal(run(to_proto(found.model), one)[0], run(proto, one)[0])


def test_a_clip_is_refused_with_the_reason() -> None:
    model = load(uneven("Clip"))
    found = equalise(model)
    assert found.model is model
    assert found.changed == ()
    assert found.skipped["first"] == "a Clip cuts all channels at one limit"


def test_what_two_read_stays() -> None:
    proto = uneven(depthwise=False)
    proto.graph.output.append(onnx.helper.make_tensor_value_info("first", 1, None))
    found = equalise(load(proto))
    assert found.changed == ()


def test_shared_weights_are_refused_with_the_reason() -> None:
    build = ModelBuilder((1, 4, 6, 6))
    weight = build.constant(
        build.rng.standard_normal((4, 4, 1, 1)) * np.exp2(2.0 * np.arange(4))[:, None, None, None]
    )
    x = build.op("Relu", build.conv("x", 4, weight=weight, out="first"))
    found = equalise(load(build.model(build.conv(x, 4, weight=weight, out="y"))))
    assert found.skipped == {"first": "its weights are shared"}


def test_even_networks_are_left_alone() -> None:
    build = ModelBuilder((1, 4, 6, 6))
    weight = build.constant(np.ones((4, 4, 1, 1)))
    other = build.constant(np.ones((4, 4, 1, 1)))
    x = build.op("Relu", build.conv("x", 4, weight=weight))
    model = load(build.model(build.conv(x, 4, weight=other, out="y")))
    assert equalise(model).model is model
    assert [(item.outputs, item.inputs) for item in weight_ranges(model)] == [(1, 1), (1, 1)]


def test_channels_of_zeros_do_not_count() -> None:
    proto = uneven()
    item = proto.graph.initializer[0]
    weight = numpy_helper.to_array(item).copy()
    weight[3] = 0
    item.CopyFrom(numpy_helper.from_array(weight, item.name))
    found = equalise(load(proto))
    np.testing.assert_array_equal(run(to_proto(found.model), feed())[0], run(proto, feed())[0])
    ranges = weight_ranges(load(proto))
    assert np.isfinite(ranges[0].outputs)
    assert ranges_table(ranges).rows[0][0] in ("first", "y")

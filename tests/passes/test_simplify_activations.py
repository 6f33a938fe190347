"""Clamps in a row become one clamp; NaN, types and names are kept."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from builders import ModelBuilder, attributes_of, fold, op_types, reasons, run
from onnx import numpy_helper

Limits = tuple[float | None, float | None]
RELU: Limits = (0.0, None)


def clamp(build: ModelBuilder, source: str, limits: Limits, out: str | None = None) -> str:
    if limits == RELU:
        return build.op("Relu", source, out=out)
    if build.opset < 11:
        found = {
            name: value
            for name, value in zip(("min", "max"), limits, strict=True)
            if value is not None
        }
        return build.op("Clip", source, out=out, **found)
    bounds = ["" if value is None else build.constant(value) for value in limits]
    return build.op("Clip", source, *bounds, out=out)


def chain(*limits: Limits, opset: int = 17, dtype: Any = np.float32) -> onnx.ModelProto:
    build = ModelBuilder([1, 2, 4, 8], opset=opset, dtype=dtype)
    value = "x"
    for index, each in enumerate(limits):
        value = clamp(build, value, each, out=f"y{index}")
    return build.model(value)


def simplified(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Run the pass; values (NaN and infinities too) must be equal, and a second run idle."""
    folded, _ = fold(proto, "simplify_activations")
    onnx.checker.check_model(folded)
    special = [np.nan, np.inf, -np.inf, -0.0, 0.0, 1e30, -1e30, 3.0]
    dtype = np.float64 if proto.graph.input[0].type.tensor_type.elem_type == 11 else np.float32
    feed = np.random.default_rng(0).normal(size=(1, 2, 4, 8)) * 4
    feed[0, 0, 0] = special
    feeds = {"x": feed.astype(dtype)}
    for one, two in zip(run(proto, feeds), run(folded, feeds), strict=True):
        assert one.dtype == two.dtype
        np.testing.assert_array_equal(one, two)
    again, statistics = fold(folded, "simplify_activations")
    assert again == folded
    assert statistics["simplify_activations"].applied == 0
    return folded


@pytest.mark.parametrize("opset", [9, 17])
@pytest.mark.parametrize(
    ("first", "second", "left"),
    [
        (RELU, RELU, "Relu"),
        (RELU, (0.0, 6.0), "Clip"),
        (RELU, (1.0, 6.0), "Clip"),
        (RELU, (-1.0, 6.0), "Clip"),
        ((0.0, 6.0), RELU, "Clip"),
        ((1.0, 6.0), RELU, "Clip"),
        ((-2.0, 6.0), RELU, "Clip"),
        ((-2.0, 3.0), (-1.0, 6.0), "Clip"),
        ((0.0, 6.0), (0.0, 6.0), "Clip"),
        ((None, 3.0), (-1.0, None), "Clip"),
    ],
)
def test_two_are_one(first: Limits, second: Limits, left: str, opset: int) -> None:
    folded = simplified(chain(first, second, opset=opset))
    assert op_types(folded) == [left]
    assert folded.graph.node[0].output[0] == "y1"


def test_the_new_bounds_are_the_tighter_ones() -> None:
    folded = simplified(chain((-2.0, 3.0), (-1.0, 6.0)))
    values = {t.name: numpy_helper.to_array(t) for t in folded.graph.initializer}
    node = folded.graph.node[0]
    assert [values[name].item() for name in node.input[1:]] == [-1.0, 3.0]
    assert attributes_of(node) == {}
    assert {p.key for p in node.metadata_props} == {"graphfold.replaces", "graphfold.pass"}


def test_a_row_of_many_becomes_one() -> None:
    folded = simplified(chain(RELU, (-1.0, 6.0), RELU, (0.0, 4.0), (-3.0, 5.0)))
    assert op_types(folded) == ["Clip"]


def test_double_precision_keeps_its_type() -> None:
    folded = simplified(chain((-2.0, 3.0), RELU, dtype=np.float64))
    assert op_types(folded) == ["Clip"]
    assert {t.data_type for t in folded.graph.initializer} == {onnx.TensorProto.DOUBLE}


@pytest.mark.parametrize(
    ("first", "second"),
    [((2.0, 3.0), (4.0, 5.0)), ((None, -1.0), RELU), ((3.0, 2.0), RELU), (RELU, (None, -1.0))],
)
def test_bounds_that_share_no_number_stay(first: Limits, second: Limits) -> None:
    folded, statistics = fold(chain(first, second), "simplify_activations")
    assert len(folded.graph.node) == 2
    assert reasons(statistics)["y1"] == "their bounds share no number"


def test_bounds_that_are_not_constant_or_no_number_stay() -> None:
    build = ModelBuilder([1, 2, 4, 8])
    high = build.op("ReduceMax", "x", keepdims=0)
    a = build.op("Relu", build.op("Clip", "x", "", high, out="c"), out="a")
    b = build.op("Relu", build.op("Clip", "x", "", build.constant(np.nan), out="n"), out="b")
    folded, statistics = fold(build.model(a, b), "simplify_activations")
    assert len(folded.graph.node) == 5
    assert reasons(statistics)["a"] == "the bounds of 'c' are not constants"
    assert reasons(statistics)["b"] == "a bound of 'n' is not a number"


def test_a_first_clamp_that_is_read_elsewhere_stays() -> None:
    build = ModelBuilder([1, 2, 4, 8])
    first = build.op("Relu", "x", out="first")
    six = clamp(build, first, (0.0, 6.0), out="six")
    again = build.op("Relu", first, out="again")
    model = build.model(build.op("Mul", build.op("Add", six, again), first))
    folded, statistics = fold(model, "simplify_activations")
    assert op_types(folded) == ["Relu", "Clip", "Add", "Mul"]
    assert reasons(statistics)["six"] == "'first' is needed elsewhere too"


def test_a_first_clamp_that_is_an_output_stays() -> None:
    build = ModelBuilder([1, 2, 4, 8])
    first = build.op("Relu", "x", out="first")
    model = build.model(first, clamp(build, first, (0.0, 6.0)), build.op("Relu", first))
    assert op_types(simplified(model)) == ["Relu", "Clip", "Relu"]


def test_other_activations_stay() -> None:
    build = ModelBuilder([1, 2, 4, 8])
    model = build.model(build.op("Relu", build.op("LeakyRelu", "x")))
    assert op_types(simplified(model)) == ["LeakyRelu", "Relu"]

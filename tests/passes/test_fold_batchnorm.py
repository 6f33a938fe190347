"""Normalisation and constants behind a convolution become part of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
from builders import (
    ModelBuilder,
    assert_same_function,
    fold,
    nonzero,
    op_types,
    reasons,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper


def folded_alone(proto: onnx.ModelProto) -> onnx.ModelProto:
    folded, _ = fold(proto, "fold_batchnorm")
    assert_same_function(proto, folded)
    return folded


def left_alone(proto: onnx.ModelProto) -> dict[str, str]:
    folded, statistics = fold(proto, "fold_batchnorm")
    assert op_types(folded) == op_types(proto)
    return reasons(statistics)


@pytest.mark.parametrize("epsilon", [1e-3, 1e-5, 0.1])
def test_the_weights_are_scaled_and_the_bias_shifted_as_the_algebra_says(epsilon: float):
    build = ModelBuilder([1, 3, 6, 5])
    model = build.model(build.norm(build.conv("x", 4, 3, pad=1), epsilon=epsilon, out="y"))
    before = {
        t.name.split("_")[0]: numpy_helper.to_array(t).astype(float) for t in build.initializers
    }
    folded = folded_alone(model)
    (conv,) = folded.graph.node
    after = {t.name: numpy_helper.to_array(t) for t in folded.graph.initializer}
    scale = before["gamma"] / np.sqrt(before["variance"] + epsilon)
    np.testing.assert_allclose(
        after[conv.input[1]], before["weight"] * scale[:, None, None, None], rtol=1e-6
    )
    np.testing.assert_allclose(
        after[conv.input[2]], (before["bias"] - before["mean"]) * scale + before["beta"], rtol=1e-5
    )
    assert conv.output[0] == "y"


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_padded_strided_grouped_convolutions_fold(groups: int, bias: bool):
    build = ModelBuilder([1, 4, 7, 6])
    conv = build.conv("x", 8, 3, stride=2, pad=[0, 1, 1, 2], groups=groups, bias=bias)
    assert op_types(folded_alone(build.model(build.norm(conv)))) == ["Conv"]


@pytest.mark.parametrize("rank", [1, 3])
def test_other_ranks_fold(rank: int):
    build = ModelBuilder([1, 2, *(7, 5, 6)[:rank]])
    assert op_types(folded_alone(build.model(build.norm(build.conv("x", 3, 3, pad=1))))) == ["Conv"]


@pytest.mark.parametrize("opset", [8, 9, 14, 15, 20])
def test_every_opset_folds(opset: int):
    build = ModelBuilder([1, 2, 5, 6], opset=opset)
    assert op_types(folded_alone(build.model(build.norm(build.conv("x", 3, 3, pad=1))))) == ["Conv"]


def test_half_precision_folds_in_double_and_rounds_once():
    build = ModelBuilder([1, 2, 5, 6], dtype=np.float16)
    folded = folded_alone(build.model(build.norm(build.conv("x", 3, 3, pad=1))))
    assert {t.data_type for t in folded.graph.initializer} == {onnx.TensorProto.FLOAT16}


@pytest.mark.parametrize("op_type", ["Add", "Sub", "Mul", "Div"])
@pytest.mark.parametrize("shape", [(), (4, 1, 1), (1, 4, 1, 1)])
def test_constants_per_channel_fold(op_type: str, shape: tuple[int, ...]):
    build = ModelBuilder([1, 2, 5, 4])
    conv = build.conv("x", 4, 3, pad=1)
    y = build.op(op_type, conv, build.constant(nonzero(build.rng, *shape)), out="y")
    assert op_types(folded_alone(build.model(y))) == ["Conv"]


@pytest.mark.parametrize("shape", [(4,), (1, 1, 5, 4), (1, 4, 5, 4)])
def test_constants_per_pixel_stay_and_are_no_site(shape: tuple[int, ...]):
    build = ModelBuilder([1, 2, 5, 4])
    conv = build.conv("x", 4, 3, pad=1)
    y = build.op("Add", conv, build.constant(nonzero(build.rng, *shape)))
    assert left_alone(build.model(y)) == {}


def test_a_series_of_normalisations_and_constants_folds_into_one_convolution():
    build = ModelBuilder([1, 2, 5, 6])
    value = build.norm(build.conv("x", 4, 3, pad=1, out="c"), out="n")
    value = build.op("Mul", value, build.constant(nonzero(build.rng, 4, 1, 1)), out="m")
    value = build.norm(value, out="y")
    folded = folded_alone(build.model(value))
    assert op_types(folded) == ["Conv"]
    metadata = {prop.key: prop.value for prop in folded.graph.node[0].metadata_props}
    assert json.loads(metadata["graphfold.replaces"]) == ["n_c", "n_n", "n_m", "n_y"]


def test_statistics_that_two_normalisations_share_serve_both():
    build = ModelBuilder([1, 4, 5, 6])
    first = build.norm(build.conv("x", 4, 1))
    node = build.nodes[-1]
    second = build.conv(build.op("Relu", first), 4, 1)
    y = build.op("BatchNormalization", second, *node.input[1:], epsilon=1e-2)
    folded = folded_alone(build.model(y))
    assert op_types(folded) == ["Conv", "Relu", "Conv"]
    assert not {t.name for t in folded.graph.initializer} & set(node.input[1:])


def test_a_weight_that_two_convolutions_share_is_scaled_for_one_alone():
    build = ModelBuilder([1, 4, 5, 6])
    shared = build.constant(nonzero(build.rng, 4, 4, 1, 1), "shared")
    first = build.norm(build.conv("x", 4, 1, weight=shared))
    y = build.conv(build.op("Relu", first), 4, 1, weight=shared)
    folded = folded_alone(build.model(y))
    assert "shared" in {t.name for t in folded.graph.initializer}


def training(build: ModelBuilder) -> tuple[onnx.ModelProto, str]:
    conv = build.conv("x", 4, 1)
    y = build.norm(conv, outputs=["y", "running_mean", "running_variance"], training_mode=1)
    return build.model(y), "training mode"


def read_twice(build: ModelBuilder) -> tuple[onnx.ModelProto, str]:
    conv = build.conv("x", 4, 1, out="conv")
    y, other = build.norm(conv, out="y"), build.op("Relu", conv, out="other")
    return build.model(y, other), "'conv' is also read by 'n_other'"


def also_output(build: ModelBuilder) -> tuple[onnx.ModelProto, str]:
    conv = build.conv("x", 4, 1, out="conv")
    return build.model(build.norm(conv, out="y"), conv), "'conv' is an output of the graph"


def overridable(build: ModelBuilder) -> tuple[onnx.ModelProto, str]:
    y = build.norm(build.conv("x", 4, 1), out="y")
    mean = next(t.name for t in build.initializers if t.name.startswith("mean"))
    info = helper.make_tensor_value_info(mean, 1, [4])
    return build.model(y, more_inputs=[info]), "which is not a constant"


def wrong_length(build: ModelBuilder) -> tuple[onnx.ModelProto, str]:
    """A model the checker accepts and no runtime runs."""
    model = build.model(build.norm(build.conv("x", 4, 1), out="y"))
    for tensor in model.graph.initializer:
        if tensor.name in model.graph.node[-1].input:
            data = numpy_helper.to_array(tensor)[:3]
            tensor.CopyFrom(numpy_helper.from_array(data, tensor.name))
    return model, "has (3,) values for 4 channels"


@pytest.mark.parametrize("make", [training, read_twice, also_output, overridable, wrong_length])
def test_hazards_are_left_with_the_reason(
    make: Callable[[ModelBuilder], tuple[onnx.ModelProto, str]],
):
    model, reason = make(ModelBuilder([1, 4, 5, 6]))
    assert reason in left_alone(model)["y"]


def test_a_convolution_read_twice_keeps_its_constants_too():
    build = ModelBuilder([1, 4, 5, 6])
    conv = build.conv("x", 4, 1, out="conv")
    shifted = build.op("Add", conv, build.constant(3.0), out="shifted")
    clipped = build.op("Relu", shifted)
    model = build.model(build.op("Mul", conv, clipped))
    assert "'conv' is also read by" in left_alone(model)["shifted"]


def test_a_normalisation_of_anything_else_is_no_site():
    build = ModelBuilder([1, 4, 5, 6])
    assert left_alone(build.model(build.norm(build.op("Relu", "x")))) == {}


def test_integer_convolutions_are_refused_by_type():
    build = ModelBuilder([1, 4, 5, 6])
    y = build.norm(build.conv("x", 4, 1), out="y")
    model = build.model(y)
    for tensor in model.graph.initializer:
        if tensor.name.startswith("weight"):
            data = numpy_helper.to_array(tensor).astype(np.int32)
            tensor.CopyFrom(numpy_helper.from_array(data, tensor.name))
    assert "its weights are INT32" in left_alone(model)["y"]


@settings(derandomize=True, deadline=None, max_examples=30, database=None)
@given(st.data())
def test_any_convolution_folds_exactly(data: st.DataObject):
    rank = data.draw(st.integers(1, 3))

    def draw(low: int, high: int) -> list[int]:
        return [data.draw(st.integers(low, high)) for _ in range(rank)]

    build = ModelBuilder([1, 4, *draw(5, 7)], seed=data.draw(st.integers(0, 99)))
    options: dict[str, Any] = {
        "stride": draw(1, 2),
        "dilation": draw(1, 2),
        "pad": [*draw(0, 2), *draw(0, 2)],
        "groups": data.draw(st.sampled_from([1, 2, 4])),
        "bias": data.draw(st.booleans()),
    }
    conv = build.conv("x", 8, draw(1, 3), **options)
    model = build.model(build.norm(conv, epsilon=data.draw(st.sampled_from([1e-3, 1e-5]))))
    assert op_types(folded_alone(model)) == ["Conv"]

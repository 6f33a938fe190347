"""Why a model has nothing to plan for: the true reason, and what to do about it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from builders import ModelBuilder

import graphfold
from graphfold.candidates import find_candidates
from graphfold.errors import UsageError
from graphfold.graph import Graph
from graphfold.model import load
from graphfold.reasons import nothing_to_plan, why_nothing_changes


def reason_of(model: onnx.ModelProto) -> str:
    return str(nothing_to_plan(find_candidates(Graph(load(model)))))


def dequantized(build: ModelBuilder, width: int, inside: int) -> str:
    stored = np.random.default_rng(0).integers(-100, 100, (width, inside, 3, 3)).astype(np.int8)
    return build.op("DequantizeLinear", build.constant(stored), build.constant(0.02))


def test_weights_that_callers_may_override_are_named_with_the_remedy():
    build = ModelBuilder([1, 3, 8, 8])
    model = build.model(build.conv("x", 4, 3, out="y"))
    weight = model.graph.initializer[0]
    info = onnx.helper.make_tensor_value_info(weight.name, weight.data_type, weight.dims)
    model.graph.input.append(info)
    text = reason_of(model)
    assert "of all 1 convolutions the weights are inputs of the model" in text
    assert "remove_initializer_from_input" in text


def test_quantized_weights_are_named():
    build = ModelBuilder([1, 3, 8, 8])
    text = reason_of(build.model(build.op("Conv", "x", dequantized(build, 4, 3), out="y")))
    assert "of all 1 convolutions the weights are quantized" in text
    assert "plan for the float model" in text


def test_weights_that_are_computed_are_named():
    build = ModelBuilder([1, 3, 8, 8])
    scale = build.op("ReduceMean", "x", axes=[0, 1, 2, 3], keepdims=0)
    weight = build.op("Mul", build.constant(np.ones((4, 3, 3, 3), np.float32)), scale)
    text = reason_of(build.model(build.op("Conv", "x", weight, out="y")))
    assert "the weights are computed when the model runs" in text


def test_without_convolutions_that_is_the_reason():
    build = ModelBuilder([1, 3, 8, 8])
    assert "no convolutions" in reason_of(build.model(build.op("Relu", "x", out="y")))


def test_some_quantized_weights_are_why_nothing_merges():
    build = ModelBuilder([1, 3, 8, 8])
    y = build.op("Relu", build.conv("x", 4, 3))
    y = build.op("Conv", y, dequantized(build, 4, 4), out="quantized", channels=4)
    model = build.model(build.op("Relu", y, out="y"))
    found = why_nothing_changes(find_candidates(Graph(load(model))))
    assert found == "of 1 convolutions the weights are quantized"


@pytest.mark.needs_shared
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("ultraface_version-RFB-320", "of all 52 convolutions the weights are inputs"),
        ("mlperftiny_resnet8_int8", "of all 9 convolutions the weights are quantized"),
    ],
)
def test_real_models_are_refused_with_their_reason(shared: Path, name: str, message: str):
    with pytest.raises(UsageError, match=message):
        graphfold.profile(shared / "models" / f"{name}.onnx")

"""Dense layers and transposed convolutions in float64, and the bounds of what folds into them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
from builders import Array, ModelBuilder, nonzero, random_input, run

import graphfold
from graphfold.bounds import coefficients, rounding_error
from graphfold.maps import AffineMap, Dense, Steps, TransposedConv
from graphfold.rewrite import recorded_folds


def spread(rng: np.random.Generator, *shape: int) -> Array:
    """Magnitudes from 1e-4 to 1e4, of either sign: cancellation is what bounds are for."""
    magnitudes: Array = 10.0 ** rng.uniform(-4, 4, shape)
    return magnitudes * rng.choice([-1.0, 1.0], shape)


def gemm_model(layer: Dense, rows: int, dtype: Any) -> onnx.ModelProto:
    build = ModelBuilder([rows, *layer.weight.shape[:1]], dtype=dtype)
    weight, bias = build.constant(layer.weight), build.constant(layer.bias)
    return build.model(build.op("Gemm", "x", weight, bias))


CASES: list[dict[str, Any]] = [
    {},
    {"strides": [2, 3], "pads": [1, 0, 0, 2], "output_padding": [1, 2]},
    {"strides": [2, 2], "dilations": [2, 1], "pads": [3, 2, 2, 1]},
    {"strides": [2, 2], "output_shape": [9, 11]},
    {"strides": [2, 2], "output_shape": [9, 11], "auto_pad": "SAME_UPPER"},
    {"strides": [2, 1], "auto_pad": "SAME_UPPER"},
    {"strides": [2, 2], "auto_pad": "SAME_LOWER", "output_padding": [1, 0]},
    {"strides": [3, 2], "auto_pad": "VALID"},
    {"strides": [3, 3], "output_padding": [2, 2]},
]


def transposed_map(rng: np.random.Generator, groups: int, attributes: dict[str, Any]) -> Any:
    weight = spread(rng, 4, 6 // groups, 3, 4)
    known = {key: tuple(value) for key, value in attributes.items() if key != "auto_pad"}
    defaults: dict[str, Any] = {
        "strides": (1, 1), "dilations": (1, 1), "output_padding": (0, 0), "pads": (0, 0, 0, 0),
        "auto_pad": attributes.get("auto_pad", "NOTSET"),
    }  # fmt: skip
    return TransposedConv(weight, spread(rng, 6), groups, **{**defaults, **known})


def transposed_model(
    conv: TransposedConv, attributes: dict[str, Any], dtype: Any
) -> onnx.ModelProto:
    build = ModelBuilder([2, 4, 5, 6], dtype=dtype)
    inputs = ["x", build.constant(conv.weight), build.constant(conv.bias)]
    return build.model(
        build.op("ConvTranspose", *inputs, channels=6, group=conv.groups, **attributes)
    )


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("attributes", CASES, ids=str)
def test_a_transposed_convolution_is_onnxruntimes(attributes: dict[str, Any], groups: int):
    """Integers below 2 ** 24 are exact in float32."""
    rng = np.random.default_rng(0)
    conv = transposed_map(rng, groups, attributes)
    whole = TransposedConv(
        rng.integers(-9, 9, conv.weight.shape).astype(float), rng.integers(-9, 9, 6).astype(float),
        groups, conv.strides, conv.dilations, conv.output_padding, conv.pads, conv.auto_pad,
        conv.output_shape,
    )  # fmt: skip
    proto = transposed_model(whole, attributes, np.float32)
    x = rng.integers(-9, 9, (2, 4, 5, 6)).astype(np.float32)
    (expected,) = run(proto, {"x": x})
    np.testing.assert_array_equal(whole.apply(x.astype(float)), expected)


@pytest.mark.parametrize("attributes", CASES, ids=str)
def test_the_error_of_transposed_convolutions_is_within_the_bound(attributes: dict[str, Any]):
    for seed in range(20):
        rng = np.random.default_rng(seed)
        conv = transposed_map(rng, (1, 2)[seed % 2], attributes)
        proto = transposed_model(conv, attributes, np.float32)
        feed = random_input(proto, seed=seed)
        found = rounding_error(conv, feed["x"], run(proto, feed)[0])
        assert found is not None
        assert found.holds
        assert 0 < found.measured <= found.bound


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_the_error_of_dense_layers_is_within_the_bound(dtype: Any):
    for seed in range(100):
        rng = np.random.default_rng(seed)
        inputs, features = (int(size) for size in rng.integers(1, 40, 2))
        largest = 1e4 if dtype is np.float32 else 1.0
        layer = Dense(
            spread(rng, inputs, features) * largest / 1e4, spread(rng, features) * largest / 1e4
        )
        proto = gemm_model(layer, 3, dtype)
        feed = random_input(proto, seed=seed)
        found = rounding_error(layer, feed["x"], run(proto, feed)[0])
        assert found is not None
        assert found.holds
        assert found.measured <= found.bound


def test_a_wrong_weight_exceeds_the_bound():
    rng = np.random.default_rng(1)
    layer = Dense(nonzero(rng, 8, 5), nonzero(rng, 5))
    wrong = gemm_model(Dense(layer.weight * (1 + 1e-4), layer.bias), 3, np.float32)
    feed = random_input(wrong)
    found = rounding_error(layer, feed["x"], run(wrong, feed)[0])
    assert found is not None
    assert not found.holds


def maps(rng: np.random.Generator) -> dict[str, tuple[AffineMap, tuple[int, ...]]]:
    first, second = (Dense(nonzero(rng, 6, 6), nonzero(rng, 6)) for _ in range(2))
    return {
        "dense": (first, (50, 6)),
        "flattened": (Dense(nonzero(rng, 12, 4), nonzero(rng, 4), flattens=True), (50, 3, 2, 2)),
        "transposed": (transposed_map(rng, 2, CASES[1]), (3, 4, 5, 6)),
        "steps": (Steps((first, second)), (50, 6)),
    }


@pytest.mark.parametrize("kind", ["dense", "flattened", "transposed", "steps"])
def test_coefficients_bound_the_output_for_any_input(kind: str):
    rng = np.random.default_rng(2)
    affine, shape = maps(rng)[kind]
    known = coefficients(affine)
    x = rng.uniform(-2, 2, shape)
    assert np.abs(affine.apply(x)).max() <= known.gain * 2 + known.offset
    assert known.offset > 0


def test_steps_are_bounded_where_each_is_rounded():
    for seed in range(50):
        rng = np.random.default_rng(seed)
        first, second = (
            Dense(spread(rng, 9, 7), spread(rng, 7)),
            Dense(spread(rng, 7, 5), spread(rng, 5)),
        )
        build = ModelBuilder([3, 9])
        value = "x"
        for layer in (first, second):
            value = build.op(
                "Gemm", value, build.constant(layer.weight), build.constant(layer.bias)
            )
        proto = build.model(value)
        feed = random_input(proto, seed=seed)
        found = rounding_error(Steps((first, second)), feed["x"], run(proto, feed)[0])
        assert found is not None
        assert found.holds


def two_layers(build: ModelBuilder) -> str:
    weights = [build.constant(nonzero(build.rng, *shape)) for shape in ((8, 9), (9, 5))]
    biases = [build.constant(nonzero(build.rng, width)) for width in (9, 5)]
    inner = build.op("Gemm", "x", weights[0], biases[0])
    return build.op("Gemm", inner, weights[1], biases[1], out="y")


def layer_of_rank_3(build: ModelBuilder) -> str:
    weight = build.constant(nonzero(build.rng, 8, 5))
    shifted = build.op(
        "Add", build.op("MatMul", "x", weight), build.constant(nonzero(build.rng, 5))
    )
    return build.op("Mul", shifted, build.constant(nonzero(build.rng, 5)), out="y")


def normalised_transposed(build: ModelBuilder) -> str:
    weight = build.constant(nonzero(build.rng, 8, 3, 3, 3))
    conv = build.op("ConvTranspose", "x", weight, channels=6, group=2, strides=[2, 2])
    return build.norm(conv, out="y")


@pytest.mark.parametrize(
    ("shape", "make"),
    [([2, 8], two_layers), ([2, 3, 8], layer_of_rank_3), ([2, 8, 5, 5], normalised_transposed)],
)
def test_these_folds_carry_a_bound_that_holds(
    shape: list[int], make: Callable[[ModelBuilder], str]
):
    build = ModelBuilder(shape)
    result = graphfold.optimize(build.model(make(build)))
    (fold,) = result.report.to_json()["folds"]
    assert fold["output"] == "y"
    assert 0 < fold["rounding"] <= fold["bound"]
    assert fold["estimate"] < fold["bound"]
    (recorded,) = recorded_folds(result.folded.ir.graph)
    assert recorded.coefficients is not None
    assert recorded.coefficients.gain > 0

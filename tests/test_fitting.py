"""Plans with `weights: regress`: every family is fitted and put in place, or told why not."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import pytest
from builders import ModelBuilder, op_types, run

import graphfold
from graphfold.calibration.fitting import fit_plan, sketch_plan
from graphfold.errors import PlanError, UsageError, VerificationError
from graphfold.model import load, to_proto
from graphfold.optimizer import optimize_model
from graphfold.plan import read_plan


def network() -> onnx.ModelProto:
    """A stem, a residual block, a strided block and a head; normalisation everywhere."""
    build = ModelBuilder(("N", 3, 12, 12))
    x = build.op("Relu", build.norm(build.conv("x", 16, 3, pad=1)), out="stem")
    inner = build.op("Relu", build.norm(build.conv(x, 32, 1)))
    inner = build.op("Relu", build.norm(build.depthwise(inner, 3, pad=1)))
    inner = build.norm(build.conv(inner, 16, 1), out="inside")
    x = build.op("Relu", build.op("Add", inner, x, out="block"), out="behind")
    x = build.op("Relu", build.norm(build.conv(x, 24, 3, stride=2, pad=1)))
    x = build.norm(build.conv(x, 16, 1), out="reduced")
    x = build.op("GlobalAveragePool", build.op("Relu", x))
    return build.model(build.op("Flatten", x, out="y"))


def data(batches: int = 6, seed: int = 0) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(seed)
    return [{"x": rng.normal(size=(10, 3, 12, 12)).astype(np.float32)} for _ in range(batches)]


def plan(*segments: dict[str, Any]) -> dict[str, Any]:
    return {
        "graphfold_plan": 1,
        "segments": [{"weights": "regress", **segment} for segment in segments],
    }


def error(proto: onnx.ModelProto, other: onnx.ModelProto) -> float:
    """Relative, on inputs that nothing was fitted on."""
    (x,) = data(1, seed=99)
    one, two = run(proto, x)[0], run(other, x)[0]
    return float(((one - two) ** 2).mean() / one.var())


BLOCK = {"input": "stem", "output": "block"}
STRIDED = {"input": "behind", "output": "reduced"}
FAMILIES: dict[str, tuple[dict[str, Any], int]] = {
    "dense 3x3": (BLOCK | {"family": "dense", "kernel": [3, 3]}, 4),
    "dense 1x1": (BLOCK | {"family": "dense", "kernel": [1, 1]}, 4),
    "pointwise": (BLOCK | {"family": "pointwise"}, 4),
    "depthwise": (BLOCK | {"family": "depthwise", "kernel": [3, 3]}, 4),
    "low rank": (BLOCK | {"family": "low_rank", "kernel": [3, 3], "rank": 8}, 5),
    "strided": (STRIDED | {"family": "dense", "kernel": [3, 3]}, 5),
    "strided pointwise": (STRIDED | {"family": "pointwise"}, 5),
    "strided low rank": (STRIDED | {"family": "low_rank", "kernel": [3, 3], "rank": 4}, 6),
    "narrow": ({"input": "stem", "output": "inside", "family": "narrow", "width": 16}, 6),
    "narrow, strided": (STRIDED | {"family": "narrow", "width": 8}, 6),
}


@pytest.mark.parametrize(("segment", "convs"), FAMILIES.values(), ids=FAMILIES.keys())
def test_every_family_is_fitted_folded_and_verified(segment, convs):
    proto = network()
    result = graphfold.optimize(proto, plan(segment), data=data())
    assert op_types(result.model).count("Conv") == convs
    assert "BatchNormalization" not in op_types(result.model)
    report = result.report.to_json()
    assert report["verification"] is not None
    (fit,) = report["fits"]
    assert (fit["input"], fit["output"]) == (segment["input"], segment["output"])
    assert 0 < fit["error"] < 1
    # Far better than what arbitrary weights do, on inputs that were not fitted on.
    arbitrary = optimize_model(load(proto), plan(segment), fit=sketch_plan, verify=False)
    other = graphfold.optimize(arbitrary.folded).model
    assert op_types(other) == op_types(result.model)
    assert error(proto, result.model) < 0.7 * error(proto, other)


def test_several_families_at_once_and_one_that_is_dropped():
    proto = network()
    several = plan(
        BLOCK | {"family": "pointwise"},
        STRIDED | {"family": "narrow", "width": 16},
    )
    result = graphfold.optimize(proto, several, data=data())
    assert op_types(result.model).count("Conv") == 4
    dropped = plan(STRIDED | {"family": "narrow", "width": 16})
    dropped["segments"].append(BLOCK | {"family": "identity"})
    result = graphfold.optimize(proto, dropped, data=data())
    assert op_types(result.model).count("Conv") == 3


def test_a_fit_that_breaks_the_network_is_no_fault_of_the_input_model():
    def breaking(model, asked):
        fitted = sketch_plan(model, asked)
        proto = to_proto(fitted.model)
        weight = next(item for item in proto.graph.initializer if len(item.dims) == 4)
        array = onnx.numpy_helper.to_array(weight)[:-1]
        weight.CopyFrom(onnx.numpy_helper.from_array(array, weight.name))
        return replace(fitted, model=load(proto))

    asked = plan(BLOCK | {"family": "pointwise"})
    with pytest.raises(VerificationError, match="reference network"):
        optimize_model(load(network()), asked, fit=breaking)


def test_the_same_data_give_the_same_bytes():
    proto = network()
    chosen = plan(
        BLOCK | {"family": "low_rank", "kernel": [3, 3], "rank": 8},
        STRIDED | {"family": "narrow", "width": 8},
    )
    models = [graphfold.optimize(proto, chosen, data=data()).model for _ in range(2)]
    assert models[0].SerializeToString() == models[1].SerializeToString()
    other = graphfold.optimize(proto, chosen, data=data(seed=1)).model
    assert other.SerializeToString() != models[0].SerializeToString()


def test_wider_and_larger_is_never_worse_on_the_data_themselves():
    model = load(network())
    errors = {}
    for width in (8, 16, 24):
        stated = plan({"input": "stem", "output": "inside", "family": "narrow", "width": width})
        (fit,) = fit_plan(model, read_plan(stated), data()).fits
        errors[width] = fit.error
    assert errors[8] > errors[16] > errors[24] > 0
    kernels = {}
    for size in (1, 3):
        stated = plan(BLOCK | {"family": "dense", "kernel": [size, size]})
        (fit,) = fit_plan(model, read_plan(stated), data()).fits
        kernels[size] = fit.error
    assert kernels[1] > kernels[3]


# What cannot be fitted --------------------------------------------------------------------------

UNFIT: dict[str, tuple[dict[str, Any], str, str]] = {
    "no such segment": (
        {"input": "stem", "output": "blok", "family": "pointwise"},
        "segments[0]",
        "block",
    ),
    "no such channels": (
        {"input": "x", "output": "inside", "family": "narrow", "width": 8},
        "segments[0]",
        "there is one from 'stem' to 'inside'",
    ),
    "too wide": (
        {"input": "stem", "output": "inside", "family": "narrow", "width": 32},
        "segments[0].width",
        "there are 32 channels",
    ),
    "axes": (
        BLOCK | {"family": "dense", "kernel": [3]},
        "segments[0].kernel",
        "2 sizes",
    ),
    "not depthwise": (
        {"input": "x", "output": "stem", "family": "depthwise", "kernel": [3, 3]},
        "segments[0]",
        "no segment",
    ),
}


@pytest.mark.parametrize(("segment", "path", "text"), UNFIT.values(), ids=UNFIT.keys())
def test_what_cannot_be_fitted_is_told_with_its_path(segment, path, text):
    with pytest.raises(PlanError) as caught:
        graphfold.optimize(network(), plan(segment), data=data())
    (problem,) = caught.value.problems
    assert problem.path == path
    assert text in f"{problem.what} {problem.hint}"


def test_all_problems_are_told_at_once():
    stated = plan(
        {"input": "stem", "output": "blok", "family": "pointwise"},
        STRIDED | {"family": "narrow", "width": 99},
    )
    with pytest.raises(PlanError) as caught:
        graphfold.optimize(network(), stated, data=data())
    paths = [problem.path for problem in caught.value.problems]
    assert paths == ["segments[0]", "segments[1].width"]


def test_a_kernel_that_does_not_reach_from_end_to_end_is_refused():
    build = ModelBuilder(("N", 3, 12, 12))
    hidden = build.op("Relu", build.conv("x", 8, 3))
    proto = build.model(build.conv(hidden, 8, 3, out="y"))
    small = plan({"input": "x", "output": "y", "family": "dense", "kernel": [3, 3]})
    with pytest.raises(PlanError, match="does not turn 12x12 into 8x8"):
        graphfold.optimize(proto, small, data=data())
    whole = plan({"input": "x", "output": "y", "family": "dense", "kernel": [5, 5]})
    assert op_types(graphfold.optimize(proto, whole, data=data()).model) == ["Conv"]


def test_fitted_plans_need_data():
    with pytest.raises(UsageError, match="need data"):
        graphfold.optimize(network(), plan(BLOCK | {"family": "pointwise"}))

"""A normalisation takes in the arithmetic per channel behind it."""

from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np
import onnx
import pytest
from builders import (
    ModelBuilder,
    assert_same_function,
    fold,
    node_making,
    nonzero,
    op_types,
    reasons,
)
from onnx import numpy_helper

Step = Callable[[ModelBuilder, str], str]


def column(build: ModelBuilder, channels: int = 3) -> str:
    return build.constant(nonzero(build.rng, 1, channels, 1, 1))


FOLLOWERS: dict[str, Step] = {
    "Mul": lambda b, x: b.op("Mul", x, column(b), out="y"),
    "Mul by a scalar": lambda b, x: b.op("Mul", b.constant(-1.5), x, out="y"),
    "Div": lambda b, x: b.op("Div", x, column(b), out="y"),
    "Add": lambda b, x: b.op("Add", column(b), x, out="y"),
    "Sub": lambda b, x: b.op("Sub", x, column(b), out="y"),
    "constant - y": lambda b, x: b.op("Sub", column(b), x, out="y"),
    "another normalisation": lambda b, x: b.norm(x, out="y"),
}


@pytest.mark.parametrize("case", FOLLOWERS)
def test_one_normalisation_is_left(case: str) -> None:
    build = ModelBuilder(["N", 3, "H", "W"])
    proto = build.model(FOLLOWERS[case](build, build.norm("x", out="norm")))
    folded, statistics = fold(proto)
    assert op_types(folded) == ["BatchNormalization"]
    assert_same_function(proto, folded, {"N": 2, "H": 5, "W": 6})
    metadata = {each.key: each.value for each in node_making(folded, "y").metadata_props}
    assert json.loads(metadata["graphfold.replaces"]) == ["n_norm", "n_y"]
    (merge,) = statistics["merge_norms"].folds
    assert (merge.output, merge.input, merge.groups) == ("y", "x", 3)


def test_the_parameters_are_those_of_the_algebra() -> None:
    build = ModelBuilder([1, 3, 4, 5])
    norm = build.norm("x")
    scale, shift = nonzero(build.rng, 1, 3, 1, 1), nonzero(build.rng, 1, 3, 1, 1)
    scaled = build.op("Mul", norm, build.constant(scale))
    proto = build.model(build.op("Add", scaled, build.constant(shift), out="y"))
    before = {t.name: numpy_helper.to_array(t) for t in proto.graph.initializer}
    gamma, beta = (before[name] for name in proto.graph.node[0].input[1:3])
    folded, _ = fold(proto)
    after = {t.name: numpy_helper.to_array(t) for t in folded.graph.initializer}
    (node,) = folded.graph.node
    factor, offset = scale.reshape(3), shift.reshape(3)
    np.testing.assert_allclose(after[node.input[1]], gamma * factor, rtol=1e-6)
    np.testing.assert_allclose(after[node.input[2]], beta * factor + offset, rtol=1e-6)
    assert list(node.input[3:]) == list(proto.graph.node[0].input[3:])


def test_a_normalisation_behind_a_convolution_folds_there() -> None:
    build = ModelBuilder([1, 3, 6, 5])
    scaled = build.op("Mul", build.norm(build.conv("x", 4)), column(build, 4))
    assert op_types(fold(build.model(scaled))[0]) == ["Conv"]


def training(build: ModelBuilder, out: str) -> str:
    outputs = [out, build.name("mean"), build.name("var")]
    return build.norm("x", outputs=outputs, training_mode=1)


REFUSED: dict[str, tuple[Step, Step, str]] = {
    "a row": (
        lambda b, x: b.norm(x, out="norm"),
        lambda b, x: b.op("Mul", x, b.constant(nonzero(b.rng, 3)), out="y"),
        "which is not per channel",
    ),
    "read elsewhere": (
        lambda b, x: b.norm(x, out="norm"),
        lambda b, x: b.op("Add", b.op("Mul", x, column(b), out="y"), b.op("Tanh", x)),
        "'norm' is needed elsewhere too",
    ),
    "training": (
        lambda b, x: training(b, "norm"),
        lambda b, x: b.op("Mul", x, column(b), out="y"),
        "training mode",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case: str) -> None:
    first, second, reason = REFUSED[case]
    build = ModelBuilder([2, 3, 4, 3])
    proto = build.model(second(build, first(build, "x")))
    folded, statistics = fold(proto, "merge_norms")
    assert op_types(folded) == op_types(proto)
    assert reason in reasons(statistics)["y"]
    onnx.checker.check_model(folded)

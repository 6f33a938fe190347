"""Changes of shape in a row become one, and computed targets constant; every bit is kept."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
from builders import ModelBuilder, fold, node_making, op_types, random_input, reasons, run
from onnx import numpy_helper

SIZES = {"N": 2, "H": 6, "W": 8}
DYNAMIC = ("N", 4, "H", "W")
Make = Callable[[ModelBuilder], str | list[str]]


def build_and_fold(
    make: Make, *names: str, shape: Any = DYNAMIC, **options: Any
) -> tuple[onnx.ModelProto, dict[str, Any]]:
    """Run passes; results must be equal bit for bit at two sizes; a second run changes nothing."""
    build = ModelBuilder(list(shape), **options)
    outputs = make(build)
    proto = build.model(*([outputs] if isinstance(outputs, str) else outputs))
    folded, statistics = fold(proto, *names)
    onnx.checker.check_model(folded, full_check=True)
    for sizes in (SIZES, {"N": 3, "H": 2, "W": 4}):
        feeds = random_input(proto, sizes)
        for one, two in zip(run(proto, feeds), run(folded, feeds), strict=True):
            assert one.size > 0
            np.testing.assert_array_equal(one, two, strict=True)
    again, _ = fold(folded, *names)
    assert again == folded
    return folded, statistics


def ints(build: ModelBuilder, *values: int) -> str:
    return build.constant(list(values), dtype=np.int64)


def target_of(proto: onnx.ModelProto, output: str = "y") -> list[int]:
    name = node_making(proto, output).input[1]
    found = next(t for t in proto.graph.initializer if t.name == name)
    return [int(size) for size in numpy_helper.to_array(found)]


# --- two in a row -------------------------------------------------------------------------------

STEPS: dict[str, tuple[Callable[[ModelBuilder, str], str], Callable[[ModelBuilder, str], str]]] = {
    "reshape, reshape": (
        lambda b, x: b.op("Reshape", x, ints(b, 0, 2, -1)),
        lambda b, x: b.op("Reshape", x, ints(b, 0, -1), out="y"),
    ),
    "flatten, reshape": (
        lambda b, x: b.op("Flatten", x),
        lambda b, x: b.op("Reshape", x, ints(b, 0, 2, -1), out="y"),
    ),
    "unsqueeze, reshape": (
        lambda b, x: b.op("Unsqueeze", x, ints(b, 4)),
        lambda b, x: b.op("Reshape", x, ints(b, 0, 0, -1), out="y"),
    ),
}


@pytest.mark.parametrize("case", STEPS)
def test_open_sizes_are_kept(case: str) -> None:
    first, second = STEPS[case]
    folded, _ = build_and_fold(lambda b: second(b, first(b, "x")), "merge_reshapes")
    (node,) = folded.graph.node
    assert node.op_type == "Reshape"
    metadata = {each.key: each.value for each in node.metadata_props}
    assert json.loads(metadata["graphfold.replaces"])[-1] == "n_y"


def test_fixed_sizes_stand_for_axes_that_moved() -> None:
    def make(build: ModelBuilder) -> str:
        inner = build.op("Reshape", "x", ints(build, 2, 4, 48))
        return build.op("Reshape", inner, ints(build, -1, 0, 0), out="y")

    shape = (2, 4, 6, 8)
    assert target_of(build_and_fold(make, "merge_reshapes", shape=shape)[0]) == [-1, 4, 48]


@pytest.mark.parametrize("last", ["Flatten", "Squeeze", "Unsqueeze"])
def test_other_second_steps_become_a_reshape(last: str) -> None:
    def make(build: ModelBuilder) -> str:
        inner = build.op("Reshape", "x", ints(build, -1, 1, 4, 48))
        axes = [] if last == "Flatten" else [ints(build, 1)]
        return build.op(last, inner, *axes, out="y")

    folded, _ = build_and_fold(make, "merge_reshapes", shape=("N", 4, 6, 8))
    expected = {"Flatten": [-1, 192], "Squeeze": [-1, 4, 48], "Unsqueeze": [-1, 1, 1, 4, 48]}
    assert target_of(folded) == expected[last]


def test_a_zero_for_an_axis_that_moved_and_is_open_is_refused() -> None:
    def make(build: ModelBuilder) -> str:
        inner = build.op("Reshape", "x", ints(build, 0, -1, 2))
        return build.op("Reshape", inner, ints(build, 2, 0, -1), out="y")

    folded, statistics = build_and_fold(make, "merge_reshapes")
    assert op_types(folded) == ["Reshape", "Reshape"]
    assert reasons(statistics) == {"y": "the shape of 'y' is not known well enough"}


def test_a_shape_that_is_read_elsewhere_stays() -> None:
    def make(build: ModelBuilder) -> list[str]:
        inner = build.op("Flatten", "x", out="inner")
        return [build.op("Reshape", inner, ints(build, -1), out="y"), inner]

    folded, statistics = build_and_fold(make, "merge_reshapes")
    assert op_types(folded) == ["Flatten", "Reshape"]
    assert reasons(statistics) == {"y": "'inner' is needed elsewhere too"}


# --- computed targets ---------------------------------------------------------------------------


def size(build: ModelBuilder, tensor: str, axis: int) -> str:
    """The size of a tensor along an axis, as a vector of one."""
    scalar = build.op("Gather", build.op("Shape", tensor), build.constant(axis, dtype=np.int64))
    return build.op("Unsqueeze", scalar, ints(build, 0))


def view(build: ModelBuilder, tensor: str, *pieces: str | int) -> str:
    parts = [ints(build, piece) if isinstance(piece, int) else piece for piece in pieces]
    return build.op("Reshape", tensor, build.op("Concat", *parts, axis=0), out="y")


TARGETS: dict[str, tuple[Make, list[int]]] = {
    "the batch": (lambda b: view(b, "x", size(b, "x", 0), -1), [0, -1]),
    "negative axes": (lambda b: view(b, "x", size(b, "x", -4), size(b, "x", 1), -1), [0, 4, -1]),
    "one size left": (
        lambda b: view(b, b.op("GlobalMaxPool", "x"), 2, 2, size(b, "x", 0)),
        [2, 2, -1],
    ),
    "the batch of what x comes from": (
        lambda b: view(b, b.op("Relu", b.conv("x", 4)), size(b, "x", 0), -1),
        [0, -1],
    ),
    "a slice of the sizes": (
        lambda b: view(
            b, "x", b.op("Slice", b.op("Shape", "x"), ints(b, 0), ints(b, 2), ints(b, 0)), -1
        ),
        [0, 4, -1],
    ),
    "a size that was cast": (
        lambda b: view(b, "x", b.op("Cast", size(b, "x", 0), to=7), -1),
        [0, -1],
    ),
}


@pytest.mark.parametrize("case", TARGETS)
def test_sizes_in_a_target_become_numbers(case: str) -> None:
    make, expected = TARGETS[case]
    folded, _ = build_and_fold(make, "simplify_reshapes")
    assert target_of(folded) == expected
    assert not {"Shape", "Concat", "Gather"} & set(op_types(folded))


REFUSED: dict[str, tuple[Make, str]] = {
    "two unknown sizes": (
        lambda b: view(
            b,
            b.op("GlobalMaxPool", "x"),
            2,
            size(b, "x", 0),
            b.op("Div", size(b, "x", 0), size(b, "x", 0)),
            2,
        ),
        "more than one size of 'y' is not known",
    ),
    "an unknown size beside one left over": (
        lambda b: view(b, "x", 4, size(b, "x", 0), -1),
        "more than one size of 'y' is not known",
    ),
    "an unknown size beside a kept one": (
        lambda b: view(b, "x", size(b, "x", 0), 4, b.op("Mul", size(b, "x", 2), size(b, "x", 3))),
        "one size of 'y' is not known, and others are not fixed",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_targets_that_no_constant_means_stay(case: str) -> None:
    make, reason = REFUSED[case]
    folded, statistics = build_and_fold(make, "simplify_reshapes")
    assert "Concat" in op_types(folded)
    assert reasons(statistics) == {"y": reason}


def test_an_explicit_zero_is_refused() -> None:
    def make(build: ModelBuilder) -> str:
        target = build.op("Concat", size(build, "x", 0), ints(build, -1), axis=0)
        return build.op("Reshape", "x", target, out="y", allowzero=1)

    _, statistics = build_and_fold(make, "simplify_reshapes")
    assert reasons(statistics) == {"y": "a 0 in the target of 'y' means no values"}


@pytest.mark.parametrize("name", ["merge_reshapes", "simplify_reshapes"])
def test_before_ir_version_4_nothing_is_done(name: str) -> None:
    build = ModelBuilder([2, 4, 6, 8], opset=8, ir_version=3)
    shape = build.op("Constant", value=numpy_helper.from_array(np.int64([2, 4, 48])))
    inner = build.op("Reshape", "x", shape)
    proto = build.model(build.op("Flatten", inner, out="y"))
    assert fold(proto, name)[0] == proto

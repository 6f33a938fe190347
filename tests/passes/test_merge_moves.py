"""Transposes, concatenations and slices in a row become one; every bit is kept."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
from builders import ModelBuilder, attributes_of, fold, op_types, random_input, reasons, run

Make = Callable[[ModelBuilder], Any]


def build_and_fold(
    make: Make,
    name: str,
    shape: Any = (2, 4, 6, 8),
    sizes: dict[str, int] | None = None,
    **options: Any,
) -> tuple[onnx.ModelProto, dict[str, Any]]:
    """Run one pass; results must be equal bit for bit, and a second run must change nothing."""
    build = ModelBuilder(list(shape), **options)
    outputs = make(build)
    proto = build.model(*([outputs] if isinstance(outputs, str) else outputs))
    folded, statistics = fold(proto, name)
    onnx.checker.check_model(folded, full_check=True)
    feeds = random_input(proto, sizes)
    for one, two in zip(run(proto, feeds), run(folded, feeds), strict=True):
        assert one.size > 0
        np.testing.assert_array_equal(one, two, strict=True)
    again, counts = fold(folded, name)
    assert again == folded
    assert counts[name].applied == 0
    return folded, statistics


def ints(build: ModelBuilder, *values: int) -> str:
    return build.constant(list(values), dtype=np.int64)


def take(build: ModelBuilder, source: str, *slices: tuple[int, ...], out: str | None = None) -> str:
    """A Slice by (axis, start, end) or (axis, start, end, step)."""
    axes, starts, ends = (list(each) for each in zip(*(s[:3] for s in slices), strict=True))
    if build.opset < 10:
        return build.op("Slice", source, out=out, axes=axes, starts=starts, ends=ends)
    inputs = [ints(build, *values) for values in (starts, ends, axes)]
    if any(len(each) > 3 for each in slices):
        inputs.append(ints(build, *(each[3] if len(each) > 3 else 1 for each in slices)))
    return build.op("Slice", source, *inputs, out=out)


# --- transposes ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ([0, 2, 3, 1], [0, 2, 3, 1], [0, 3, 1, 2]),
        ([1, 0, 3, 2], [3, 0, 2, 1], [2, 1, 3, 0]),
        (None, [0, 2, 1, 3], [3, 1, 2, 0]),
    ],
)
def test_transposes_compose(
    first: list[int] | None, second: list[int], expected: list[int]
) -> None:
    def make(build: ModelBuilder) -> str:
        inner = build.op("Transpose", "x", **({} if first is None else {"perm": first}))
        return build.op("Transpose", inner, perm=second, out="y")

    folded, _ = build_and_fold(make, "merge_transposes")
    (node,) = folded.graph.node
    assert attributes_of(node)["perm"] == expected
    metadata = {each.key: each.value for each in node.metadata_props}
    assert json.loads(metadata["graphfold.replaces"]) == ["n_transpose_1", "n_y"]


def test_three_transposes_become_one() -> None:
    def make(build: ModelBuilder) -> str:
        value = "x"
        for _ in range(3):
            value = build.op("Transpose", value, perm=[1, 2, 3, 0])
        return value

    assert op_types(build_and_fold(make, "merge_transposes")[0]) == ["Transpose"]


def test_a_transpose_that_is_read_elsewhere_stays() -> None:
    def make(build: ModelBuilder) -> list[str]:
        inner = build.op("Transpose", "x", perm=[0, 2, 3, 1], out="inner")
        return [build.op("Transpose", inner, perm=[0, 2, 3, 1], out="y"), inner]

    folded, statistics = build_and_fold(make, "merge_transposes")
    assert len(folded.graph.node) == 2
    assert reasons(statistics) == {"y": "'inner' is needed elsewhere too"}


# --- concatenations -----------------------------------------------------------------------------


def test_nested_concatenations_become_one() -> None:
    def make(build: ModelBuilder) -> str:
        one, two = build.op("Relu", "x"), build.op("Neg", "x")
        inner = build.op("Concat", one, "x", axis=1)
        deeper = build.op("Concat", inner, two, axis=1)
        return build.op("Concat", "x", deeper, one, deeper, axis=1)

    folded, _ = build_and_fold(make, "merge_concats")
    assert op_types(folded).count("Concat") == 1
    assert len(folded.graph.node[-1].input) == 8


def test_axes_of_either_sign_are_the_same() -> None:
    def make(build: ModelBuilder) -> str:
        return build.op("Concat", build.op("Concat", "x", "x", axis=-3), "x", axis=1)

    assert op_types(build_and_fold(make, "merge_concats")[0]) == ["Concat"]


def test_other_axes_and_other_readers_keep_a_concatenation() -> None:
    def make(build: ModelBuilder) -> list[str]:
        other = build.op("Concat", "x", "x", axis=2)
        shared = build.op("Concat", other, other, axis=1, out="shared")
        return [build.op("Concat", shared, other, axis=1), shared]

    folded, statistics = build_and_fold(make, "merge_concats")
    assert op_types(folded) == ["Concat"] * 3
    assert reasons(statistics) == {"shared": "'shared' is needed elsewhere too"}


# --- slices -------------------------------------------------------------------------------------

LAST = 2**63 - 1
SLICES: dict[str, tuple[list[tuple[int, ...]], list[tuple[int, ...]]]] = {
    "other axes": ([(2, 0, LAST, 2)], [(3, 1, 7, 2)]),
    "one axis": ([(2, 1, 5)], [(2, 1, 3)]),
    "steps": ([(3, 1, LAST, 2)], [(3, 1, LAST, 2)]),
    "from the end": ([(3, -6, -1)], [(-1, -3, LAST)]),
    "backwards": ([(3, LAST, -LAST, -1)], [(3, 0, 3)]),
    "backwards to the first": ([(3, 4, -LAST, -2)], [(3, 0, LAST)]),
    "there and back": ([(3, LAST, -LAST, -1)], [(3, LAST, -LAST, -1)]),
    "some of both": ([(1, 1, 4), (3, 0, 6)], [(3, 2, 9), (0, 1, 2)]),
}


@pytest.mark.parametrize("case", SLICES)
def test_slices_become_one(case: str) -> None:
    first, second = SLICES[case]

    def make(build: ModelBuilder) -> str:
        return take(build, take(build, "x", *first, out="inner"), *second, out="y")

    folded, _ = build_and_fold(make, "merge_slices")
    (node,) = folded.graph.node
    metadata = {each.key: each.value for each in node.metadata_props}
    assert json.loads(metadata["graphfold.replaces"]) == ["n_inner", "n_y"]


def test_slices_before_opset_10_keep_their_numbers_in_attributes() -> None:
    def make(build: ModelBuilder) -> str:
        return take(build, take(build, "x", (2, 1, 5)), (3, 2, 6), out="y")

    folded, _ = build_and_fold(make, "merge_slices", opset=9)
    (node,) = folded.graph.node
    assert attributes_of(node) == {"axes": [2, 3], "starts": [1, 2], "ends": [5, 6]}


def test_axes_of_unknown_size_merge_unless_they_are_the_same() -> None:
    def make(build: ModelBuilder) -> list[str]:
        apart = take(build, take(build, "x", (2, 1, 5)), (3, 1, 4), out="apart")
        same = take(build, take(build, "x", (2, 1, 5)), (2, 1, 4), out="same")
        return [apart, same]

    shape = (2, 4, "H", "W")
    folded, statistics = build_and_fold(make, "merge_slices", shape, {"H": 6, "W": 8})
    assert op_types(folded) == ["Slice"] * 3
    assert reasons(statistics) == {"same": "the size of 'x' along axis 2 is not fixed"}


def test_a_slice_by_computed_numbers_stays() -> None:
    def make(build: ModelBuilder) -> str:
        first = take(build, "x", (2, 1, 5))
        sizes = build.op("Shape", build.op("Relu", "x"), channels=4)
        end = build.op("Slice", sizes, ints(build, 0), ints(build, 1))
        return build.op("Slice", first, ints(build, 0), end, ints(build, 3), out="y")

    _, statistics = build_and_fold(make, "merge_slices", ("N", 4, 6, 8), {"N": 2})
    assert reasons(statistics) == {"y": "what 'y' takes is not constant"}


def test_a_slice_that_is_read_elsewhere_stays() -> None:
    def make(build: ModelBuilder) -> list[str]:
        inner = take(build, "x", (2, 1, 5), out="inner")
        return [take(build, inner, (3, 1, 5), out="y"), inner]

    _, statistics = build_and_fold(make, "merge_slices")
    assert reasons(statistics) == {"y": "'inner' is needed elsewhere too"}

"""Reorderings of channels become part of the convolution before or after them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
    reasons,
)
from onnx import numpy_helper

import graphfold
from graphfold.rewrite import recorded_folds


def gather(
    build: ModelBuilder, source: str, indices: Sequence[int], out: str | None = None, axis: int = 1
) -> str:
    constant = build.constant(indices, dtype=np.int64)
    return build.op("Gather", source, constant, axis=axis, channels=len(indices), out=out)


def shuffle(
    build: ModelBuilder, source: str, groups: int, sizes: Sequence[int], out: str | None = None
) -> str:
    channels = build._channels[source]
    split = build.constant([0, groups, channels // groups, *sizes], dtype=np.int64)
    value = build.op("Reshape", source, split)
    value = build.op("Transpose", value, perm=[0, 2, 1, *range(3, 3 + len(sizes))])
    back = build.constant([-1, channels, *sizes], dtype=np.int64)
    return build.op("Reshape", value, back, out=out, channels=channels)


def folded_alone(proto: onnx.ModelProto, sizes: Any = None, **options: Any) -> onnx.ModelProto:
    folded, _ = fold(proto, "fold_channel_permutation", **options)
    assert_same_function(proto, folded, sizes)
    return folded


def left_alone(proto: onnx.ModelProto) -> dict[str, str]:
    folded, statistics = fold(proto, "fold_channel_permutation")
    assert op_types(folded) == op_types(proto)
    return reasons(statistics)


def test_rows_and_biases_before_it_are_reordered():
    build = ModelBuilder([1, 3, 6, 5])
    order = [2, 0, 3, 1]
    folded = folded_alone(build.model(gather(build, build.conv("x", 4, 3, pad=1), order)))
    weight, bias = (numpy_helper.to_array(t) for t in build.initializers[:2])
    found = [numpy_helper.to_array(t) for t in folded.graph.initializer]
    assert op_types(folded) == ["Conv"]
    np.testing.assert_array_equal(found[0], weight[order])
    np.testing.assert_array_equal(found[1], bias[order])


def test_columns_after_it_are_put_back():
    build = ModelBuilder([1, 4, 6, 5])
    order = [2, 0, -1, 1]
    folded = folded_alone(build.model(build.conv(gather(build, "x", order), 3, 3, pad=1)))
    weight = numpy_helper.to_array(build.initializers[1])
    assert op_types(folded) == ["Conv"]
    found = numpy_helper.to_array(folded.graph.initializer[0])
    np.testing.assert_array_equal(found[:, [2, 0, 3, 1]], weight)


@pytest.mark.parametrize("groups", [2, 3])
@pytest.mark.parametrize("side", ["before", "after"])
@pytest.mark.parametrize("sizes", [(7,), (6, 5), (4, 3, 5)])
def test_a_channel_shuffle_folds(groups: int, side: str, sizes: tuple[int, ...]):
    build = ModelBuilder(["N", 6, *sizes])
    if side == "before":
        model = build.model(shuffle(build, build.conv("x", 6, 3, pad=1), groups, sizes))
    else:
        shuffled = shuffle(build, build.op("Relu", "x"), groups, sizes)
        model = build.model(build.conv(shuffled, 4, 3, stride=2, pad=1))
    folded = folded_alone(model, {"N": 2})
    assert op_types(folded) == (["Conv"] if side == "before" else ["Relu", "Conv"])


def test_normalisation_and_constants_in_between_are_reordered_too():
    build = ModelBuilder([1, 3, 6, 5])
    value = build.norm(build.conv("x", 4, 3, pad=1))
    value = build.op("Sub", build.constant(nonzero(build.rng, 4, 1, 1)), value)
    folded = folded_alone(build.model(gather(build, value, [3, 1, 0, 2])))
    assert op_types(folded) == ["Conv"]


@pytest.mark.parametrize("side", ["before", "after"])
def test_within_the_groups_of_a_convolution_it_folds_and_they_stay(side: str):
    build = ModelBuilder([1, 6, 6, 5])
    order = [2, 0, 1, 4, 3, 5]
    if side == "before":
        model = build.model(gather(build, build.conv("x", 6, 3, groups=2), order))
    else:
        model = build.model(build.conv(gather(build, "x", order), 4, 3, groups=2))
    (conv,) = folded_alone(model).graph.node
    assert attributes_of(conv)["group"] == 2


def test_a_shuffle_of_grouped_convolutions_folds_into_the_dense_one():
    build = ModelBuilder([1, 6, 5, 4])
    grouped = build.conv("x", 6, 1, groups=2)
    model = build.model(build.conv(shuffle(build, grouped, 2, (5, 4)), 4, 1))
    folded = folded_alone(model)
    assert [attributes_of(node)["group"] for node in folded.graph.node] == [2, 1]


def test_channels_that_are_left_out_or_repeated_fold_where_that_is_cheaper():
    build = ModelBuilder([1, 3, 6, 5])
    folded = folded_alone(build.model(gather(build, build.conv("x", 6, 3), [5, 0, 0])))
    assert op_types(folded) == ["Conv"]
    build = ModelBuilder([1, 3, 6, 5])
    folded = folded_alone(build.model(build.conv(gather(build, "x", [0, 2, 2, 1, 0]), 4, 3)))
    assert op_types(folded) == ["Conv"]


def test_reorderings_on_both_sides_and_behind_one_another_fold():
    build = ModelBuilder([1, 4, 6, 5])
    value = gather(build, gather(build, "x", [1, 0, 3, 2]), [3, 2, 0, 1])
    value = build.conv(value, 4, 3, pad=1)
    value = gather(build, gather(build, value, [1, 0, 3, 2]), [2, 1, 0, 3])
    assert op_types(folded_alone(build.model(build.op("Relu", value)))) == ["Conv", "Relu"]


def test_the_job_merges_what_it_separated_verifies_and_records():
    build = ModelBuilder(["N", 4, 6, 5])
    value = build.norm(build.conv("x", 4, 3, pad=1, out="a"), out="b")
    value = build.conv(shuffle(build, value, 2, (6, 5), out="s"), 4, 1, out="c")
    result = graphfold.optimize(build.model(build.op("Relu", value, out="y")))
    assert op_types(result.model) == ["Conv", "Relu"]
    (found,) = recorded_folds(result.folded.ir.graph)
    assert (found.output, found.replaces[-1], found.pass_name) == ("c", "n_c", "merge_convs")
    assert len(found.replaces) == 6
    assert graphfold.optimize(result.model).model == result.model


def undoes_rows(build: ModelBuilder) -> tuple[list[str], str]:
    y = gather(build, build.conv("x", 4, 3, groups=2, out="c"), [0, 2, 1, 3], out="y")
    return [y], "it would undo the grouping of 'n_c'"


def undoes_columns(build: ModelBuilder) -> tuple[list[str], str]:
    value = gather(build, "x", [1, 0, 3, 2], out="y")
    return [build.depthwise(value, out="c")], "it would undo the grouping of 'n_c'"


def read_twice(build: ModelBuilder) -> tuple[list[str], str]:
    conv = build.conv("x", 4, out="c")
    outputs = [gather(build, conv, [1, 0, 3, 2], out="y"), build.op("Relu", conv, out="r")]
    return outputs, "'c' is also read by 'n_r'"


def also_output(build: ModelBuilder) -> tuple[list[str], str]:
    value = gather(build, "x", [1, 0, 3, 2], out="y")
    return [build.conv(value, 4), value], "'y' is an output of the graph"


def repeats(build: ModelBuilder) -> tuple[list[str], str]:
    y = gather(build, build.conv("x", 2), [0, 1, 1, 0], out="y")
    return [y], "merging raises cost: 'n_y' takes 2 channels to 4"


def leaves_out(build: ModelBuilder) -> tuple[list[str], str]:
    return [build.conv(gather(build, "x", [3], out="y"), 4)], "merging raises cost"


def computed_weight(build: ModelBuilder) -> tuple[list[str], str]:
    weight = build.op("Abs", build.constant(nonzero(build.rng, 3, 4, 1, 1)))
    conv = build.op("Conv", gather(build, "x", [1, 0, 3, 2], out="y"), weight, channels=3, out="c")
    return [conv], "not a constant"


@pytest.mark.parametrize(
    "make",
    [
        undoes_rows,
        undoes_columns,
        read_twice,
        also_output,
        repeats,
        leaves_out,
        computed_weight,
    ],
)
def test_hazards_are_left_with_the_reason(make: Callable[[ModelBuilder], tuple[list[str], str]]):
    build = ModelBuilder([1, 4, 6, 5])
    outputs, reason = make(build)
    assert reason in left_alone(build.model(*outputs))["y"]


def test_other_axes_other_transposes_and_other_neighbours_are_no_site():
    build = ModelBuilder([1, 4, 4, 4])
    assert left_alone(build.model(gather(build, build.conv("x", 4), [1, 0, 3, 2], axis=2))) == {}
    build = ModelBuilder([1, 4, 4, 4])
    value = build.op("Relu", gather(build, build.op("Relu", "x"), [1, 0, 3, 2]))
    assert left_alone(build.model(value)) == {}
    build = ModelBuilder([1, 4, 4, 4])
    split = build.constant([0, 2, 2, 4, 4], dtype=np.int64)
    value = build.op("Reshape", build.conv("x", 4), split)
    value = build.op("Transpose", value, perm=[0, 2, 1, 4, 3])
    value = build.op("Reshape", value, build.constant([0, 4, 4, 4], dtype=np.int64))
    assert left_alone(build.model(value)) == {}


def test_a_split_that_mixes_channels_and_pixels_is_no_site():
    build = ModelBuilder([1, 4, 4, 2])
    value = build.op("Reshape", build.conv("x", 4), build.constant([1, 2, 4, 2, 2], dtype=np.int64))
    value = build.op("Transpose", value, perm=[0, 2, 1, 3, 4])
    value = build.op("Reshape", value, build.constant([1, 4, 4, 2], dtype=np.int64))
    assert left_alone(build.model(value)) == {}

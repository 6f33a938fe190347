"""What choices take from a network's layers, in multiply-adds."""

from __future__ import annotations

import onnx
import pytest
from builders import ModelBuilder

from graphfold.candidates import Candidate, Candidates, find_candidates
from graphfold.choices import Choice
from graphfold.errors import UsageError
from graphfold.graph import Graph
from graphfold.importance import data_free
from graphfold.losses import Losses
from graphfold.model import load


def found_in(model: onnx.ModelProto) -> Candidates:
    return find_candidates(Graph(load(model)))


def between(candidates: Candidates, source: str, target: str) -> Candidate:
    return next(
        each for each in candidates.found if (each.input.name, each.output.name) == (source, target)
    )


def keeping_all(candidate: Candidate) -> Choice:
    return next(choice for choice in candidate.choices if not choice.removed_convs)


def two_convolutions(pad: int = 1) -> onnx.ModelProto:
    """Two 3x3 on 8x8 pixels, 4 channels: 9216 multiply-adds each where padded."""
    build = ModelBuilder([1, 4, 8, 8])
    y = build.op("Relu", build.conv("x", 4, 3, pad=1, out="first"))
    return build.model(build.op("Relu", build.conv(y, 4, 3, pad=pad, out="second"), out="y"))


def test_half_of_a_layer_is_its_activation():
    candidates = found_in(two_convolutions(pad=0))
    merge = between(candidates, "x", "second")
    change = Losses(candidates).change(merge, keeping_all(merge))
    # 9216 multiply-adds of its own, 7200 of the average layer.
    assert (change.macs.linear, change.macs.removed, change.macs.moved) == (8208, 0, 0)
    assert change.macs.size == 4104
    assert (change.activations, change.convs) == (1, 0)


def test_a_layer_that_goes_counts_whole_and_more_than_one_that_merges():
    candidates = found_in(two_convolutions())
    losses = Losses(candidates)
    merge = between(candidates, "x", "second")
    sizes = {choice.kernel: losses.change(merge, choice).macs for choice in merge.choices}
    assert sizes[3, 3].size == 9216
    assert sizes[3, 3].moved == 0
    assert sizes[5, 5].size < sizes[3, 3].size


def test_padding_that_moves_counts_where_it_is_seen():
    candidates = found_in(two_convolutions())
    merge = between(candidates, "x", "second")
    change = Losses(candidates).change(merge, keeping_all(merge))
    # A ring of 28 of the 64 pixels, reckoned as what lies outside 6 of 8 rows and columns.
    assert change.macs.moved == pytest.approx(9216 * 28 / 64)


def test_padding_behind_a_pointwise_convolution_is_exact():
    build = ModelBuilder([1, 4, 8, 8])
    y = build.op("Relu", build.conv("x", 8, 1))
    candidates = found_in(build.model(build.conv(y, 4, 3, pad=1, out="y")))
    merge = between(candidates, "x", "y")
    assert Losses(candidates).change(merge, keeping_all(merge)).macs.moved == 0


def test_parallel_branches_that_merge_lose_nothing():
    build = ModelBuilder([1, 4, 8, 8])
    x = build.op("Relu", build.conv("x", 4, 3, pad=1), out="entry")
    y = build.op("Add", build.conv(x, 4, 3, pad=1), build.conv(x, 4, 1), out="sum", channels=4)
    candidates = found_in(build.model(build.op("Relu", y, out="y")))
    merge = between(candidates, "entry", "sum")
    losses = Losses(candidates)
    change = losses.change(merge, keeping_all(merge))
    assert data_free("macs", [change], losses.whole()) == [0.0]


def test_an_activation_behind_a_sum_belongs_to_the_largest_branch():
    build = ModelBuilder([1, 4, 8, 8])
    branches = build.conv("x", 4, 3, pad=1), build.conv("x", 4, 1)
    y = build.op("Relu", build.op("Add", *branches, channels=4))
    candidates = found_in(build.model(build.conv(y, 4, 1, out="y")))
    merge = between(candidates, "x", "y")
    mean = (9216 + 1024 + 1024) / 3
    linear = Losses(candidates).change(merge, keeping_all(merge)).macs.linear
    assert linear == pytest.approx((9216 + mean) / 2)


def test_a_depthwise_convolution_is_a_layer_too():
    build = ModelBuilder([1, 16, 8, 8])
    y = build.conv(build.op("Relu", build.depthwise("x", 3, pad=1), out="spatial"), 16, 1)
    candidates = found_in(build.model(build.op("Relu", y, out="y")))
    losses = Losses(candidates)
    alone = next(each for each in candidates.found if len(each.convs) == 2)
    dropped = next(choice for choice in alone.choices if choice.kernel == (1, 1))
    share = losses.change(alone, dropped).macs.removed / losses.whole().macs
    assert share == pytest.approx((9 / 25 + 1 / 2) / 2)


def test_what_removes_more_never_counts_less():
    build = ModelBuilder([1, 4, 16, 16])
    y = "x"
    for kernel in (3, 1, 3, 3):
        y = build.op("Relu", build.conv(y, 4, kernel, pad=kernel // 2))
    candidates = found_in(build.model(build.conv(y, 4, 3, pad=1, out="y")))
    losses = Losses(candidates)
    for each in candidates.found:
        for larger in candidates.found:
            if set(each.convs) < set(larger.convs):
                sizes = (losses.change(one, keeping_all(one)).macs.size for one in (each, larger))
                assert next(sizes) < next(sizes)


def test_sizes_that_are_not_known_are_asked_for():
    build = ModelBuilder([1, 4, "h", "w"])
    candidates = found_in(build.model(build.conv("x", 4, 3, out="y")))
    with pytest.raises(UsageError, match="--input-shape"):
        Losses(candidates)
    assert Losses(candidates, {"x": (1, 4, 5, 5)}).whole().macs == 9 * 9 * 16

"""Removed convolutions: y = x in their place, and an emptied residual branch means x, not 2x."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from builders import ModelBuilder, op_types, random_input, run
from references import build, close, constants, reference, statistics

import graphfold


def rewired(proto: onnx.ModelProto, **inputs: str) -> onnx.ModelProto:
    """The same with readers of some tensors reading others."""
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    for node in copy.graph.node:
        for index, name in enumerate(node.input):
            node.input[index] = inputs.get(name, name)
    return copy


@pytest.mark.parametrize("opset", [10, 17])
def test_a_conv_goes_with_its_padding_and_normalisation(opset: int):
    b = ModelBuilder([1, 4, 7, 7], opset=opset)
    before = b.op("Relu", b.conv("x", 4, 3, out="before"), out="act")
    padded = b.pad(before, [0, 0, 1, 1], [0, 0, 1, 1], out="padded")
    norm = b.norm(b.depthwise(padded, 3, out="removed"), out="norm")
    scaled = b.op("Mul", norm, b.constant(np.full((1, 4, 1, 1), 0.7)), out="scaled")
    proto = b.model(b.conv(scaled, 5, 1, out="y"))
    removed = reference(proto, remove_convs=["removed"])
    assert op_types(removed) == ["Conv", "Relu", "Conv"]
    assert len(constants(removed)) == 4
    feeds = random_input(proto)
    close(run(removed, feeds)[0], run(rewired(proto, scaled="act"), feeds)[0], 1e-12)


def test_a_conv_with_its_own_padding():
    b = ModelBuilder(["N", 4, "H", "W"])
    middle = b.conv(b.conv("x", 4, 1, out="first"), 4, (5, 3), pad=(2, 1, 2, 1), out="removed")
    proto = b.model(b.conv(middle, 5, 1, out="y"))
    removed = reference(proto, remove_convs=["removed"])
    assert op_types(removed) == ["Conv", "Conv"]
    feeds = random_input(proto, {"N": 1, "H": 6, "W": 5})
    close(run(removed, feeds)[0], run(rewired(proto, removed="first"), feeds)[0], 1e-12)


def test_a_conv_at_a_graph_output_leaves_the_name():
    b = ModelBuilder([1, 4, 6, 6])
    act = b.op("Relu", b.conv("x", 4, 3, pad=1, out="first"), out="act")
    proto = b.model(b.norm(b.conv(act, 4, 3, pad=1, out="removed"), out="y"))
    removed = reference(proto, remove_convs=["removed"])
    assert op_types(removed) == ["Conv", "Relu"]
    assert [info.name for info in removed.graph.output] == ["y"]


def test_convs_in_a_row():
    b = ModelBuilder([1, 4, 6, 6])
    value = b.conv("x", 4, 1, out="c0")
    for number in range(1, 4):
        value = b.norm(b.conv(value, 4, 3, pad=1, out=f"c{number}"), out=f"n{number}")
    proto = b.model(b.conv(value, 3, 1, out="y"))
    removed = reference(proto, remove_convs=["c3", "c1", "c2"])
    assert op_types(removed) == ["Conv", "Conv"]
    feeds = random_input(proto)
    close(run(removed, feeds)[0], run(rewired(proto, n3="c0"), feeds)[0], 1e-12)


def residual(final: bool = True) -> onnx.ModelProto:
    """x -> stem -> [conv relu conv] + skip -> end."""
    b = ModelBuilder([1, 4, 6, 6])
    stem = b.op("Relu", b.conv("x", 4, 3, pad=1, out="stem"), out="stem_act")
    inner = b.op("Relu", b.norm(b.conv(stem, 4, 3, pad=1, out="c1"), out="n1"), out="r1")
    branch = b.norm(b.conv(inner, 4, 3, pad=1, out="c2"), out="n2")
    joined = b.op("Add", branch, stem, out="sum")
    return b.model(b.conv(joined, 3, 1, out="y") if final else joined)


@pytest.mark.parametrize("order", [["c1", "c2"], ["c2", "c1"]])
@pytest.mark.parametrize("how", ["loose", "segment"])
def test_an_emptied_residual_branch_is_the_skip_alone(order: list[str], how: str):
    proto = residual()
    if how == "loose":
        plan: dict[str, Any] = {"remove_convs": order, "remove_activations": ["r1"]}
    else:
        # with the convolution in front, which is all that stays of it
        plan = {
            "segments": [
                {"input": "x", "output": "sum", "boundary": "hoist", "remove_convs": order}
            ]
        }
        proto = rewired(proto)
    removed = reference(proto, **plan)
    feeds = random_input(proto)
    source = "stem_act" if how == "loose" else "stem"
    assert "Add" not in op_types(removed)
    close(run(removed, feeds)[0], run(rewired(proto, sum=source), feeds)[0], 1e-12)
    folded = graphfold.optimize(proto, {"graphfold_plan": 1, **plan}).model
    close(run(folded, feeds)[0], run(removed, feeds)[0])


def test_an_emptied_branch_at_a_graph_output():
    proto = residual(final=False)
    removed = reference(proto, remove_convs=["c1", "c2"], remove_activations=["r1"])
    assert op_types(removed) == ["Conv", "Relu"]
    assert [info.name for info in removed.graph.output] == ["sum"]


def test_a_branch_that_keeps_its_activation_is_still_added():
    proto = residual()
    removed = reference(proto, remove_convs=["c1", "c2"])
    assert op_types(removed) == ["Conv", "Relu", "Relu", "Add", "Conv"]
    feeds = random_input(proto)
    close(run(removed, feeds)[0], run(rewired(proto, n1="stem_act", n2="r1"), feeds)[0], 1e-12)


def test_a_branch_with_one_convolution_left_is_still_added():
    proto = residual()
    removed = reference(proto, remove_convs=["c2"], remove_activations=["r1"])
    assert op_types(removed).count("Add") == 1
    feeds = random_input(proto)
    close(run(removed, feeds)[0], run(rewired(proto, n2="n1", r1="n1"), feeds)[0], 1e-12)


def test_a_doubling_of_the_model_itself_stays():
    # y = 2 * conv(x): nothing here is a residual branch
    b = ModelBuilder([1, 4, 6, 6])
    act = b.op("Relu", b.conv("x", 4, 3, pad=1, out="first"), out="act")
    value = b.conv(act, 4, 3, pad=1, out="removed")
    proto = b.model(b.op("Add", value, value, out="y"))
    removed = reference(proto, remove_convs=["removed"])
    assert op_types(removed) == ["Conv", "Relu", "Add"]
    feeds = random_input(proto)
    close(run(removed, feeds)[0], run(rewired(proto, removed="act"), feeds)[0], 1e-12)


def test_two_emptied_branches_in_a_row():
    b = ModelBuilder([1, 4, 6, 6])
    act = b.op("Relu", b.conv("x", 4, 3, pad=1, out="first"), out="act")
    one = b.op("Add", act, b.conv(act, 4, 3, pad=1, out="c1"), out="s1")
    two = b.op("Add", b.conv(one, 4, 1, out="c2"), one, out="s2")
    proto = b.model(b.conv(two, 3, 1, out="y"))
    removed = reference(proto, remove_convs=["c1", "c2"])
    assert op_types(removed) == ["Conv", "Relu", "Conv"]
    feeds = random_input(proto)
    close(run(removed, feeds)[0], run(rewired(proto, s2="act"), feeds)[0], 1e-12)


def test_sites_of_segments_and_loose_ones_are_each_removed_once():
    b = ModelBuilder([1, 4, 6, 6])
    value = b.conv(b.conv("x", 4, 1, out="c1"), 4, 1, out="c2")
    value = b.op("Relu", b.conv(value, 4, 1, out="c3"), out="act")
    proto = b.model(b.conv(value, 4, 1, out="y"))
    segment = {"input": "x", "output": "c3", "boundary": "exact", "remove_convs": ["c2"]}
    found = build(proto, segments=[segment], remove_convs=["y"])
    assert statistics(found, "remove_convs").applied == 2

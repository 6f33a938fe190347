"""Removed activations: the network without them, their names, and nothing left behind."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import pytest
from builders import ModelBuilder, op_types, random_input, run
from references import build, close, constants, reference, statistics

from graphfold.errors import PlanError

Spelling = Callable[[ModelBuilder, str], str]


def relu6(b: ModelBuilder, x: str) -> str:
    return b.op("Clip", x, b.constant(0.0), b.constant(6.0), out="act")


def silu(b: ModelBuilder, x: str) -> str:
    return b.op("Mul", b.op("Sigmoid", x), x, out="act")


def hard_swish(b: ModelBuilder, x: str) -> str:
    return b.op("Mul", x, b.op("HardSigmoid", x, alpha=1 / 6, beta=0.5), out="act")


def hard_swish_decomposed(b: ModelBuilder, x: str) -> str:
    shifted = b.op("Add", x, b.constant(3.0))
    clipped = b.op("Clip", shifted, b.constant(0.0), b.constant(6.0))
    return b.op("Div", b.op("Mul", x, clipped), b.constant(6.0), out="act")


def prelu(b: ModelBuilder, x: str) -> str:
    return b.op("PRelu", x, b.constant(np.full((4, 1, 1), 0.3)), out="act")


def prelu_decomposed(b: ModelBuilder, x: str) -> str:
    """relu(x) + a * (x - |x|) / 2, as older Keras exporters write it."""
    negative = b.op("Sub", x, b.op("Abs", x))
    scaled = b.op(
        "Mul", b.op("Mul", negative, b.constant(np.full((4, 1, 1), 0.3))), b.constant(0.5)
    )
    return b.op("Add", b.op("Relu", x), scaled, out="act")


def gelu(b: ModelBuilder, x: str) -> str:
    erf = b.op("Erf", b.op("Div", x, b.constant(2.0**0.5)))
    half = b.op("Mul", x, b.op("Add", erf, b.constant(1.0)))
    return b.op("Mul", half, b.constant(0.5), out="act")


SPELLINGS = [relu6, silu, hard_swish, hard_swish_decomposed, prelu, prelu_decomposed, gelu]


def between_convolutions(spell: Spelling | None, **options: int) -> onnx.ModelProto:
    b = ModelBuilder([2, 3, 6, 6], **options)
    first = b.conv("x", 4, 3, pad=1, out="first")
    middle = first if spell is None else spell(b, first)
    b._channels[middle] = 4
    return b.model(b.conv(middle, 5, 3, pad=1, out="y"))


@pytest.mark.parametrize("spell", SPELLINGS, ids=lambda f: f.__name__)
def test_a_site_of_any_number_of_nodes_goes_as_one(spell: Spelling):
    proto = between_convolutions(spell)
    removed = reference(proto, remove_activations=["act"])
    assert op_types(removed) == ["Conv", "Conv"]
    assert len(constants(removed)) == 4  # two weights, two biases: no bound or slope stays
    feeds = random_input(proto)
    # the same weights: they are drawn before and after the activation alike
    expected = onnx.ModelProto()
    expected.CopyFrom(proto)
    last = expected.graph.node[-1]
    last.input[0] = "first"
    close(run(removed, feeds)[0], run(expected, feeds)[0], 1e-12)
    assert np.abs(run(removed, feeds)[0] - run(proto, feeds)[0]).max() > 1e-2


@pytest.mark.parametrize("spell", SPELLINGS, ids=lambda f: f.__name__)
def test_a_site_in_front_of_a_graph_output_leaves_its_name(spell: Spelling):
    b = ModelBuilder(["N", 3, 6, 6])
    first = b.conv("x", 4, 3, pad=1, out="first")
    proto = b.model(spell(b, first))
    removed = reference(proto, remove_activations=["act"])
    assert op_types(removed) == ["Conv"]
    assert [info.name for info in removed.graph.output] == ["act"]
    assert removed.graph.output[0].type == proto.graph.output[0].type
    expected = onnx.ModelProto()
    expected.CopyFrom(proto)
    expected.graph.output[0].name = "first"
    feeds = random_input(proto, {"N": 2})
    close(run(removed, feeds)[0], run(expected, feeds)[0], 1e-12)


@pytest.mark.parametrize("spell", SPELLINGS, ids=lambda f: f.__name__)
def test_a_site_behind_a_graph_input(spell: Spelling):
    b = ModelBuilder([2, 4, 6, 6])
    middle = spell(b, "x")
    b._channels[middle] = 4
    proto = b.model(b.conv(middle, 5, 3, out="y"))
    removed = reference(proto, remove_activations=["act"])
    assert op_types(removed) == ["Conv"]
    assert removed.graph.node[0].input[0] == "x"
    assert [info.name for info in removed.graph.input] == ["x"]


def test_a_site_between_a_graph_input_and_a_graph_output():
    b = ModelBuilder([2, 4])
    proto = b.model(b.op("Relu", "x", out="y"))
    removed = reference(proto, remove_activations=["y"])
    assert op_types(removed) == ["Identity"]
    feeds = random_input(proto)
    assert np.array_equal(run(removed, feeds)[0], feeds["x"])


def test_a_tensor_that_is_an_output_before_and_after_its_activation():
    b = ModelBuilder([1, 3, 6, 6])
    first = b.conv("x", 4, 3, out="first")
    proto = b.model(first, b.op("Relu", first, out="act"))
    removed = reference(proto, remove_activations=["act"])
    assert [info.name for info in removed.graph.output] == ["first", "act"]
    one, two = run(removed, random_input(proto))
    assert np.array_equal(one, two)
    assert one.min() < 0


def test_a_graph_output_that_the_network_goes_on_from():
    b = ModelBuilder([1, 3, 6, 6])
    act = b.op("Relu", b.conv("x", 4, 3, out="first"), out="act")
    proto = b.model(act, b.conv(act, 5, 1, out="y"))
    removed = reference(proto, remove_activations=["act"])
    assert [info.name for info in removed.graph.output] == ["act", "y"]
    assert op_types(removed) == ["Conv", "Conv"]
    middle, _ = run(removed, random_input(proto))
    assert middle.min() < 0


def test_removals_in_a_row():
    b = ModelBuilder([1, 3, 6, 6])
    value = b.op("Relu", b.conv("x", 4, 3, out="first"), out="r1")
    value = b.op("Sigmoid", value, out="r2")
    value = b.op("Mul", value, b.op("Sigmoid", value, out="gate"), out="r3")
    proto = b.model(b.op("Tanh", value, out="r4"))
    for removed, left in (
        (["r1", "r2", "r3", "r4"], ["Conv"]),
        (["r4", "r2", "r1"], ["Conv", "Sigmoid", "Mul"]),
        (["r2", "r3"], ["Conv", "Relu", "Tanh"]),
    ):
        found = reference(proto, remove_activations=removed)
        assert op_types(found) == left
        assert [info.name for info in found.graph.output] == ["r4"]
    feeds = random_input(proto)
    (first,) = run(reference(proto, remove_activations=["r1", "r2", "r3", "r4"]), feeds)
    (second,) = run(reference(proto, remove_activations=["r2", "r3"]), feeds)
    close(second, np.tanh(np.maximum(first.astype(np.float64), 0)))


def test_shared_constants_stay_while_something_reads_them():
    b = ModelBuilder([1, 3, 6, 6])
    low, high = b.constant(0.0, "low"), b.constant(6.0, "high")
    first = b.op("Clip", b.conv("x", 4, 3, out="first"), low, high, out="r1")
    proto = b.model(b.op("Clip", b.conv(first, 4, 3, out="second"), low, high, out="r2"))
    assert {"low", "high"} <= set(constants(reference(proto, remove_activations=["r1"])))
    both = reference(proto, remove_activations=["r1", "r2"])
    assert not {"low", "high"} & set(constants(both))


def test_padding_does_not_move():
    proto = between_convolutions(relu6)
    pads = [list(a.ints) for n in proto.graph.node for a in n.attribute if a.name == "pads"]
    removed = reference(proto, remove_activations=["act"])
    assert [
        list(a.ints) for n in removed.graph.node for a in n.attribute if a.name == "pads"
    ] == pads


def test_activations_of_a_segment_and_loose_ones_are_counted_once():
    b = ModelBuilder([1, 3, 6, 6])
    first = b.op("Relu", b.conv("x", 4, 1, out="first"), out="r1")
    second = b.op("Relu", b.conv(first, 4, 1, out="second"), out="r2")
    proto = b.model(b.op("Relu", b.conv(second, 4, 1, out="third"), out="r3"))
    segment = {"input": "x", "output": "second", "boundary": "exact"}
    found = build(proto, segments=[segment], remove_activations=["r3"])
    assert statistics(found, "remove_activations").applied == 2


def test_gates_are_not_removed():
    b = ModelBuilder([1, 4, 6, 6])
    first = b.conv("x", 4, 1, out="first")
    pooled = b.op("GlobalAveragePool", first, out="pooled")
    gate = b.op("Sigmoid", b.conv(pooled, 4, 1, out="excite"), out="gate")
    proto = b.model(b.op("Mul", first, gate, out="y"))
    for name in ("gate", "y"):
        with pytest.raises(PlanError, match="is not the output of an activation site"):
            reference(proto, remove_activations=[name])

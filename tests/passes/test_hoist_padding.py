"""Padding moves to the first convolution: against the same network written in torch by hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import pytest
from builders import ModelBuilder, op_types, random_input, run
from references import attributes, build, close, constants, reference, statistics

import graphfold
from graphfold.errors import PlanError

torch = pytest.importorskip("torch")
F = torch.nn.functional


class Layers:
    """The model's own convolutions and normalisations as float64 torch functions, by tensor."""

    def __init__(self, proto: onnx.ModelProto) -> None:
        values = {k: torch.from_numpy(v.astype(np.float64)) for k, v in _floats(proto).items()}
        self.nodes = {node.output[0]: node for node in proto.graph.node}
        self.values = values

    def conv(self, name: str, x: Any, pad: int | Sequence[int] = 0) -> Any:
        """The convolution `name` with other padding: one number, or left, right, top, bottom."""
        node = self.nodes[name]
        found = attributes(node)
        sides = [pad] * 4 if isinstance(pad, int) else list(pad)
        weight, bias = self.values[node.input[1]], self.values[node.input[2]]
        return F.conv2d(
            F.pad(x, sides), weight, bias, found["strides"], 0, found["dilations"], found["group"]
        )

    def norm(self, name: str, x: Any) -> Any:
        gamma, beta, mean, variance = (self.values[k] for k in self.nodes[name].input[1:5])
        epsilon = attributes(self.nodes[name])["epsilon"]
        return F.batch_norm(x, mean, variance, gamma, beta, eps=epsilon)


def _floats(proto: onnx.ModelProto) -> dict[str, Any]:
    return {k: v for k, v in constants(proto).items() if v.dtype.kind == "f"}


def check(
    proto: onnx.ModelProto, network: Any, output: str, *, source: str = "x", fold: bool = True
) -> onnx.ModelProto:
    """The hoisted reference is `network(layers, x)`; so is the folded model, in one Conv."""
    segment = {"input": source, "output": output, "boundary": "hoist"}
    hoisted = reference(proto, segments=[segment])
    feeds = random_input(proto)
    expected = network(Layers(proto), torch.from_numpy(feeds["x"].astype(np.float64))).numpy()
    (original,), (actual,) = run(proto, feeds), run(hoisted, feeds)
    assert actual.shape == original.shape
    close(actual, expected)
    assert np.abs(original - expected).max() > 1e-2 * np.abs(expected).max()  # it does matter
    if fold:
        plan = {"graphfold_plan": 1, "segments": [segment]}
        folded = graphfold.optimize(proto, plan).model
        assert [kind for kind in op_types(folded) if kind != "Relu"] == ["Conv"]
        close(run(folded, feeds)[0], expected, 1e-5)
    return hoisted


def test_two_padded_convolutions():
    b = ModelBuilder([2, 3, 9, 11])
    first = b.conv("x", 4, 3, pad=1, out="first")
    proto = b.model(b.conv(first, 5, 3, pad=1, out="y"))
    hoisted = check(proto, lambda n, x: n.conv("y", n.conv("first", x, 2)), "y")
    assert op_types(hoisted) == ["Conv", "Conv"]
    assert [attributes(node)["pads"] for node in hoisted.graph.node] == [[2] * 4, [0] * 4]


@pytest.mark.parametrize("size", [(8, 8), (9, 7), (15, 10)])
@pytest.mark.parametrize("strides", [(2, 1, 1), (1, 2, 1), (2, 2, 1), (1, 2, 2), (2, 3, 2)])
def test_sizes_stay_the_originals_through_strides(strides: tuple[int, ...], size: tuple[int, int]):
    b = ModelBuilder([1, 2, *size])
    source = "x"
    for number, stride in enumerate(strides):
        source = b.conv(source, 3, 3, stride=stride, pad=1, out=f"c{number}")
    proto = b.model(source)
    # each padding counts the strides before it
    total = 1 + strides[0] + strides[0] * strides[1]

    def network(n: Layers, x: Any) -> Any:
        return n.conv("c2", n.conv("c1", n.conv("c0", x, total)))

    hoisted = check(proto, network, "c2")
    assert attributes(hoisted.graph.node[0])["pads"] == [total] * 4


def test_uneven_pads_stay_on_their_sides():
    b = ModelBuilder([1, 2, 8, 9])
    first = b.conv("x", 3, 3, stride=2, pad=(0, 1, 1, 0), out="first")  # top left bottom right
    proto = b.model(b.conv(first, 2, (3, 5), pad=(2, 0, 0, 4), out="y"))
    # top 0 + 2*2, left 1, bottom 1, right 2*4
    hoisted = check(proto, lambda n, x: n.conv("y", n.conv("first", x, (1, 8, 4, 1))), "y")
    assert attributes(hoisted.graph.node[0])["pads"] == [4, 1, 1, 8]


def test_bias_and_normalisation_reach_the_border():
    b = ModelBuilder([1, 3, 8, 8])
    wide = b.norm(b.conv("x", 6, 1, out="expand"), out="expanded")
    deep = b.norm(b.depthwise(wide, 3, pad=1, out="depthwise"), out="filtered")
    proto = b.model(b.norm(b.conv(deep, 4, 1, out="project"), out="y"))

    def network(n: Layers, x: Any) -> Any:
        y = n.norm("expanded", n.conv("expand", x, 1))
        y = n.norm("filtered", n.conv("depthwise", y))
        return n.norm("y", n.conv("project", y))

    check(proto, network, "y")


def two_residual_blocks() -> onnx.ModelProto:
    b = ModelBuilder([1, 4, 9, 9])
    first = b.conv(b.conv("x", 4, 3, pad=1, out="a1"), 4, 3, pad=1, out="a2")
    middle = b.op("Add", first, "x", out="a")
    second = b.conv(b.conv(middle, 4, 3, pad=1, out="b1"), 4, 3, pad=1, out="b2")
    return b.model(b.op("Add", middle, second, out="y"))


def test_two_residual_blocks_pad_the_first_skip_and_crop_the_second():
    def network(n: Layers, x: Any) -> Any:
        # the second block reads two pixels on each side beyond the output
        a = n.conv("a2", n.conv("a1", x, 4)) + F.pad(x, [2] * 4)
        return n.conv("b2", n.conv("b1", a)) + a[:, :, 2:-2, 2:-2]

    hoisted = check(two_residual_blocks(), network, "y")
    assert sorted(op_types(hoisted)) == ["Add", "Add", *["Conv"] * 4, "Pad", "Pad"]
    amounts = [constants(hoisted)[n.input[1]] for n in hoisted.graph.node if n.op_type == "Pad"]
    assert sorted(int(each[2]) for each in amounts) == [-2, 2]


def test_hoisting_twice_changes_nothing_more():
    # A crop and a padded skip look like paddings to move: the pass must see that it is done.
    segment = {"input": "x", "output": "y", "boundary": "hoist"}
    found = build(two_residual_blocks(), segments=[segment])
    assert statistics(found, "hoist_padding").applied == 1
    again = reference(two_residual_blocks(), segments=[segment])
    hoisted_again = reference(again, segments=[segment])
    assert op_types(hoisted_again) == op_types(again)
    feeds = random_input(again)
    assert np.array_equal(run(again, feeds)[0], run(hoisted_again, feeds)[0])


@pytest.mark.parametrize("opset", [8, 10, 17])
def test_projection_shortcut_with_stride(opset: int):
    b = ModelBuilder([1, 3, 10, 10], opset=opset)
    main = b.conv(b.conv("x", 5, 3, stride=2, pad=1, out="m1"), 5, 3, pad=1, out="m2")
    joined = b.op("Add", main, b.conv("x", 5, 1, stride=2, out="shortcut"), out="sum")
    proto = b.model(b.conv(joined, 4, 3, pad=1, out="y"))

    def network(n: Layers, x: Any) -> Any:
        # y needs one pixel of the sum, m2 another one; each is two of x
        main = n.conv("m2", n.conv("m1", x, 1 + 2 * 2))
        return n.conv("y", main + n.conv("shortcut", x, 2))

    hoisted = check(proto, network, "y")
    assert "Pad" not in op_types(hoisted)


@pytest.mark.parametrize("opset", [10, 13, 18])
def test_pad_nodes_move_to_the_front(opset: int):
    b = ModelBuilder([1, 3, 8, 8], opset=opset)
    padded = b.pad("x", [0, 0, 0, 1], [0, 0, 1, 0], out="p1")
    first = b.conv(padded, 4, 3, stride=2, out="first")
    again = b.pad(first, [0, 0, 1, 1], [0, 0, 1, 1], out="p2")
    proto = b.model(b.conv(again, 5, 3, out="y"))

    def network(n: Layers, x: Any) -> Any:
        return n.conv("y", n.conv("first", x, (1 + 2, 2, 2, 1 + 2)))

    hoisted = check(proto, network, "y")
    assert op_types(hoisted) == ["Pad", "Conv", "Conv"]


def test_pad_node_behind_the_first_convolution_alone():
    b = ModelBuilder([1, 3, 8, 8])
    first = b.conv("x", 4, 1, out="first")
    proto = b.model(b.conv(b.pad(first, [0, 0, 1, 2], [0, 0, 2, 1]), 5, (4, 4), out="y"))
    hoisted = check(proto, lambda n, x: n.conv("y", n.conv("first", x, (2, 1, 1, 2))), "y")
    assert op_types(hoisted) == ["Conv", "Conv"]


def test_cropping_pad_node_in_the_segment():
    b = ModelBuilder([1, 3, 9, 9])
    first = b.conv("x", 4, 3, pad=1, out="first")
    cropped = b.pad(first, [0, 0, -1, -1], [0, 0, -1, -1], out="cropped")
    proto = b.model(b.conv(cropped, 5, 3, pad=1, out="y"))

    def network(n: Layers, x: Any) -> Any:
        return n.conv("y", n.conv("first", x, 1 + 1 - 1))

    check(proto, network, "y")


def test_a_window_that_would_crop_its_input_is_given_a_crop():
    b = ModelBuilder([1, 3, 9, 9])
    first = b.conv("x", 4, 1, out="first")
    cropped = b.pad(first, [0, 0, -2, -2], [0, 0, -2, -2], out="cropped")
    proto = b.model(b.conv(cropped, 5, 3, pad=1, out="y"))

    def network(n: Layers, x: Any) -> Any:
        return n.conv("y", n.conv("first", x[:, :, 1:-1, 1:-1]))

    hoisted = check(proto, network, "y")
    assert op_types(hoisted) == ["Pad", "Conv", "Conv"]


@pytest.mark.parametrize(("mode", "sides"), [("SAME_UPPER", (0, 1)), ("SAME_LOWER", (1, 0))])
def test_same_padding_is_resolved_where_the_size_is_known(mode: str, sides: tuple[int, int]):
    b = ModelBuilder([1, 3, 8, 8])
    first = b.conv("x", 4, 3, stride=2, auto_pad=mode, out="first")
    proto = b.model(b.conv(first, 5, 3, auto_pad=mode, out="y"))
    begin, end = sides

    def network(n: Layers, x: Any) -> Any:
        return n.conv("y", n.conv("first", x, (begin + 2, end + 2, begin + 2, end + 2)))

    hoisted = check(proto, network, "y")
    assert all("auto_pad" not in attributes(node) for node in hoisted.graph.node)


def test_same_padding_of_an_open_size_is_refused():
    b = ModelBuilder(["N", 3, "H", "W"])
    first = b.conv("x", 4, 3, stride=2, auto_pad="SAME_UPPER", out="first")
    proto = b.model(b.conv(first, 5, 3, pad=1, out="y"))
    with pytest.raises(PlanError) as caught:
        reference(proto, segments=[{"input": "x", "output": "y", "boundary": "hoist"}])
    (problem,) = caught.value.problems
    assert problem.path == "segments[0]"
    assert "SAME_UPPER of 'n_first' with stride 2 depends on a size" in problem.what


def test_open_sizes_are_hoisted_where_padding_is_explicit():
    b = ModelBuilder(["N", 3, "H", "W"])
    first = b.conv("x", 3, 3, pad=1, out="first")
    joined = b.op("Add", b.conv(first, 3, 3, pad=1, out="second"), "x", out="y")
    proto = b.model(joined)
    segment = {"input": "x", "output": "y", "boundary": "hoist"}
    hoisted = reference(proto, segments=[segment])
    layers = Layers(proto)
    for shape in ((1, 3, 8, 8), (3, 3, 7, 5)):
        x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
        wide = torch.from_numpy(x.astype(np.float64))
        expected = (layers.conv("second", layers.conv("first", wide, 2)) + wide).numpy()
        close(run(hoisted, {"x": x})[0], expected)


def test_a_pad_of_another_value_is_refused():
    b = ModelBuilder([1, 3, 8, 8])
    first = b.conv("x", 4, 1, out="first")
    one = b.constant(1.0)
    pads = b.constant([0, 0, 1, 1, 0, 0, 1, 1], dtype=np.int64)
    proto = b.model(b.conv(b.op("Pad", first, pads, one), 5, 3, out="y"))
    with pytest.raises(PlanError, match="pads with a value other than zero"):
        reference(proto, segments=[{"input": "x", "output": "y", "boundary": "hoist"}])


def test_segments_whose_padding_is_first_stay_as_they_are():
    b = ModelBuilder([1, 3, 8, 8])
    first = b.conv("x", 4, 3, pad=1, out="first")
    proto = b.model(b.conv(first, 5, 1, out="y"))
    found = build(proto, segments=[{"input": "x", "output": "y", "boundary": "hoist"}])
    assert statistics(found, "hoist_padding").applied == 0


def test_exact_segments_and_what_lies_outside_keep_their_padding():
    b = ModelBuilder([1, 3, 8, 8])
    before = b.op("Relu", b.conv("x", 4, 3, pad=1, out="before"), out="r1")
    wide = b.conv(before, 8, 1, out="wide")
    inner = b.op("Relu", b.depthwise(wide, 3, pad=1, out="deep"), out="r2")
    after = b.op("Relu", b.conv(inner, 4, 1, out="narrow"), out="r3")
    proto = b.model(b.conv(b.conv(after, 4, 3, pad=1, out="c"), 4, 3, pad=1, out="y"))
    hoisted = reference(
        proto,
        segments=[
            {"input": "r1", "output": "narrow", "boundary": "exact"},
            {"input": "r3", "output": "y", "boundary": "hoist"},
        ],
    )
    pads = {
        n.output[0]: attributes(n)["pads"][0] for n in hoisted.graph.node if "Conv" in n.op_type
    }
    assert pads == {"before": 1, "wide": 0, "deep": 1, "narrow": 0, "c": 2, "y": 0}


def test_average_pools_and_one_axis():
    b = ModelBuilder([1, 3, 12])
    first = b.conv("x", 4, 3, pad=1, out="first")
    pooled = b.op("AveragePool", first, kernel_shape=[2], strides=[2], out="pooled")
    proto = b.model(b.conv(pooled, 5, 3, pad=1, out="y"))
    segment = {"input": "x", "output": "y", "boundary": "hoist"}
    hoisted = reference(proto, segments=[segment])
    n = {node.output[0]: node for node in proto.graph.node}
    values = {k: torch.from_numpy(v.astype(np.float64)) for k, v in _floats(proto).items()}
    x = random_input(proto)["x"]
    y = F.conv1d(
        F.pad(torch.from_numpy(x.astype(np.float64)), [3, 3]),
        values[n["first"].input[1]],
        values[n["first"].input[2]],
    )
    y = F.conv1d(F.avg_pool1d(y, 2), values[n["y"].input[1]], values[n["y"].input[2]])
    close(run(hoisted, {"x": x})[0], y.numpy())


def test_a_segment_without_a_convolution():
    b = ModelBuilder([1, 3, 8, 8])
    pooled = b.op("AveragePool", "x", kernel_shape=[2, 2], strides=[2, 2], out="pooled")
    b.norm(pooled, out="y")
    proto = b.model("y")
    found = build(proto, segments=[{"input": "x", "output": "y", "boundary": "hoist"}])
    assert statistics(found, "hoist_padding").applied == 0

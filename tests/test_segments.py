"""Blocks, branches and numbered convolutions, found from the data flow alone."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import onnx
import pytest
from builders import ModelBuilder

from graphfold.graph import Graph
from graphfold.model import load
from graphfold.segments import (
    InvertedResidual,
    activation_sites,
    blocks,
    conv_sites,
    inverted_residuals,
    main_path_convs,
    whole_branch_end,
)
from graphfold.sites import find_sites


def graph_of(proto: onnx.ModelProto) -> Graph:
    return Graph(load(proto))


def inverted_residual(
    b: ModelBuilder,
    x: str,
    tag: str,
    wide: int,
    out: int,
    *,
    stride: int = 1,
    norm: bool = True,
    acts: Sequence[int] = (1, 1),
    kernel: int = 3,
) -> str:
    """A block with names ending in `tag`; wide 0 leaves the expansion out."""

    def layer(value: str, name: str, active: int) -> str:
        value = b.norm(value, out=f"{name}_bn_{tag}") if norm else value
        return b.op("Relu", value, out=f"{name}_act_{tag}") if active else value

    value = x
    if wide:
        value = layer(b.conv(value, wide, 1, out=f"expand_{tag}"), "expand", acts[0])
    value = b.depthwise(value, kernel, stride=stride, pad=kernel // 2, out=f"depthwise_{tag}")
    value = layer(value, "depthwise", acts[1])
    value = layer(b.conv(value, out, 1, out=f"project_{tag}"), "project", 0)
    if stride == 1 and b._channels[x] == out:
        value = b.op("Add", x, value, out=f"add_{tag}")
    return value


def mobile(norm: bool = True) -> onnx.ModelProto:
    """Stem, a t=1 block, a strided block, a residual block, head, classifier."""
    b = ModelBuilder(["N", 3, 16, 16])
    stem = b.conv("x", 8, 3, stride=2, pad=1, out="stem")
    value = b.op("Relu", b.norm(stem, out="stem_bn") if norm else stem, out="stem_act")
    value = inverted_residual(b, value, "1", 0, 4, norm=norm)
    value = inverted_residual(b, value, "2", 16, 6, stride=2, norm=norm)
    value = inverted_residual(b, value, "3", 24, 6, norm=norm)
    value = b.op("Relu", b.conv(value, 12, 1, out="head"), out="head_act")
    flat = b.op("Flatten", b.op("GlobalAveragePool", value, out="pool"), out="flat")
    return b.model(b.op("Gemm", flat, b.constant([[0.5] * 5] * 12), out="y"))


def names(block: InvertedResidual) -> tuple[str | None, str | None, list[str]]:
    return block.input.name, block.output.name, [site.name for site in block.activations]


# --- Inverted residuals ---------------------------------------------------------------------------


def test_inverted_residuals_are_found_in_order():
    first, strided, residual = inverted_residuals(graph_of(mobile()))
    assert names(first) == ("stem_act", "project_bn_1", ["depthwise_act_1"])
    assert first.expand is None
    assert names(strided) == ("project_bn_1", "project_bn_2", ["expand_act_2", "depthwise_act_2"])
    assert not strided.residual
    assert names(residual) == ("project_bn_2", "add_3", ["expand_act_3", "depthwise_act_3"])
    assert residual.residual
    assert residual.expand is not None
    assert residual.expand.name == "expand_3"
    assert (residual.depthwise.name, residual.project.name) == ("depthwise_3", "project_3")


def test_normalisation_may_be_fused():
    found = inverted_residuals(graph_of(mobile(norm=False)))
    assert [names(block)[:2] for block in found] == [
        ("stem_act", "project_1"),
        ("project_1", "project_2"),
        ("project_2", "add_3"),
    ]


@pytest.mark.parametrize("acts", [(0, 0), (1, 0), (0, 1), (1, 1)])
def test_blocks_are_found_with_activations_already_removed(acts: tuple[int, int]):
    b = ModelBuilder([1, 3, 8, 8])
    stem = b.op("Relu", b.conv("x", 4, 3, pad=1), out="stem_act")
    value = inverted_residual(b, stem, "1", 16, 4, acts=acts)
    (block,) = inverted_residuals(graph_of(b.model(b.op("Relu", value, out="y"))))
    assert (block.input.name, block.output.name) == ("stem_act", "add_1")
    assert len(block.activations) == sum(acts)


def test_activations_of_several_nodes_belong_to_their_block():
    b = ModelBuilder([1, 4, 8, 8])
    wide = b.conv("x", 16, 1, out="expand")
    first = b.op("Mul", wide, b.op("Sigmoid", wide), out="silu_1")
    deep = b.depthwise(first, 5, pad=2, out="depthwise")
    second = b.op("Mul", b.op("Sigmoid", deep), deep, out="silu_2")
    (block,) = inverted_residuals(graph_of(b.model(b.conv(second, 6, 1, out="y"))))
    assert names(block) == ("x", "y", ["silu_1", "silu_2"])


def test_squeeze_and_excite_between_is_no_plain_block():
    b = ModelBuilder([1, 4, 8, 8])
    wide = b.op("Relu", b.conv("x", 16, 1), out="r1")
    deep = b.op("Relu", b.depthwise(wide, 3, pad=1), out="r2")
    pooled = b.op("GlobalAveragePool", deep)
    gated = b.op("Mul", deep, b.op("Sigmoid", b.conv(pooled, 16, 1)), out="gated")
    b._channels[gated] = 16
    assert inverted_residuals(graph_of(b.model(b.conv(gated, 4, 1, out="y")))) == []


def test_what_looks_similar_is_none():
    b = ModelBuilder([1, 4, 8, 8])
    # a plain bottleneck, a depthwise convolution in front of a 3x3, and one with an active end
    bottleneck = b.conv(b.conv(b.conv("x", 8, 1), 8, 3, pad=1), 4, 1)
    separable = b.conv(b.depthwise(bottleneck, 3, pad=1), 4, 3, pad=1)
    active = b.op("Relu", b.conv(b.depthwise(separable, 3, pad=1), 4, 1), out="act")
    assert inverted_residuals(graph_of(b.model(b.conv(active, 4, 1, out="y")))) == []


# --- Branches -------------------------------------------------------------------------------------


def basic_blocks() -> onnx.ModelProto:
    """Two residual blocks of ResNet: one plain, one with a strided 1x1 shortcut."""
    b = ModelBuilder([1, 4, 8, 8])
    inner = b.op("Relu", b.conv("x", 4, 3, pad=1, out="a1"), out="ra1")
    value = b.op("Add", b.conv(inner, 4, 3, pad=1, out="a2"), "x", out="sa")
    value = b.op("Relu", value, out="ra2")
    inner = b.op("Relu", b.conv(value, 6, 3, stride=2, pad=1, out="b1"), out="rb1")
    main = b.conv(inner, 6, 3, pad=1, out="b2")
    shortcut = b.norm(b.conv(value, 6, 1, stride=2, out="short"), out="short_bn")
    return b.model(b.op("Relu", b.op("Add", main, shortcut, out="sb"), out="y"))


@pytest.mark.parametrize(
    ("source", "output", "end"),
    [
        ("x", "a2", "sa"),  # holds the branch and its skip
        ("ra1", "a2", "a2"),  # starts inside: ends inside
        ("ra2", "b2", "sb"),  # the shortcut comes from the same tensor
        ("rb1", "b2", "b2"),
    ],
)
def test_a_segment_that_holds_a_whole_branch_ends_behind_its_add(
    source: str, output: str, end: str
):
    graph = graph_of(basic_blocks())
    values, sites = graph.values(), find_sites(graph)
    assert whole_branch_end(graph, values[source], values[output], sites).name == end


def test_adds_in_a_row_are_followed():
    b = ModelBuilder([1, 4, 8, 8])
    inner = b.op("Add", b.conv("x", 4, 1, out="c1"), "x", out="s1")
    b.op("Add", inner, "x", out="s2")
    graph = graph_of(b.model("s2"))
    values = graph.values()
    end = whole_branch_end(graph, values["x"], values["c1"], find_sites(graph))
    assert end.name == "s2"


def test_shortcut_convolutions_are_not_numbered():
    graph = graph_of(basic_blocks())
    found = [site.name for site in main_path_convs(graph, find_sites(graph))]
    assert found == ["a1", "a2", "b1", "b2"]
    assert [site.name for site in conv_sites(graph)] == ["a1", "a2", "b1", "b2", "short"]


def test_branches_of_equal_length_are_both_numbered():
    b = ModelBuilder([1, 4, 8, 8])
    one = b.conv("x", 4, 3, pad=1, out="one")
    proto = b.model(b.op("Add", one, b.conv("x", 4, 1, out="two"), out="y"))
    graph = graph_of(proto)
    assert [site.name for site in main_path_convs(graph, find_sites(graph))] == ["one", "two"]


def test_an_activation_of_several_nodes_does_not_shorten_a_branch():
    build = ModelBuilder([1, 3, 12, 12])
    down = build.conv("x", 4, 3, stride=2, out="down")
    one = build.conv(down, 8, 3, pad=1, out="one")
    silu = build.op("Mul", one, build.op("Sigmoid", one))
    two = build.conv(silu, 8, 3, pad=1, out="two")
    added = build.op("Add", build.conv(down, 8, 1, out="shortcut"), two)
    graph = Graph(load(build.model(build.op("Relu", added))))
    found = [site.name for site in main_path_convs(graph, find_sites(graph))]
    assert found == ["down", "one", "two"]


def test_activation_sites_come_in_order():
    assert [site.name for site in activation_sites(graph_of(basic_blocks()))] == [
        *("ra1", "ra2", "rb1", "y"),
    ]


# --- Blocks for reading ---------------------------------------------------------------------------


@pytest.mark.parametrize("norm", [True, False])
def test_blocks_are_a_partition_in_order(norm: bool):
    graph = graph_of(mobile(norm))
    found = blocks(graph)
    assert [node for block in found for node in block.nodes] == graph.nodes()
    kinds = [block.kind for block in found]
    assert kinds[0] == "conv"
    assert kinds[1:4] == ["inverted residual"] * 3
    assert kinds[-1] == "gemm"


def test_residual_blocks_stay_whole():
    found = blocks(graph_of(basic_blocks()))
    assert [block.kind for block in found] == ["residual", "residual"]
    assert [block.output.name for block in found if block.output] == ["ra2", "y"]
    assert [block.input.name for block in found if block.input] == ["x", "ra2"]


# --- The example networks -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "keep_bn", "count", "numbered"),
    [
        ("mobilenet_v2_1.0", True, 17, 52),
        ("mobilenet_v2_1.0", False, 17, 52),
        ("efficientnet_lite0", True, 16, 49),
        ("resnet18", True, 0, 17),
    ],
)
def test_example_networks(name: str, keep_bn: bool, count: int, numbered: int):
    pytest.importorskip("torch")
    sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
    from zoo import exported

    graph = graph_of(exported(name, exporter="torchscript", opset=17, keep_bn=keep_bn))
    sites = find_sites(graph)
    found = inverted_residuals(graph, sites)
    assert len(found) == count
    if count:
        assert found[0].expand is None
        assert all(block.expand is not None for block in found[1:])
        assert all(len(block.activations) == 2 for block in found[1:])
    assert len(main_path_convs(graph, sites)) == numbered

"""Chains of single-entry single-exit segments, against examples and a slow definition."""

from __future__ import annotations

import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
import pytest
from builders import ModelBuilder
from onnx import TensorProto, helper

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import networks

from graphfold.flow import FlowChain, Point, find_flow, flow_chains
from graphfold.graph import Graph
from graphfold.model import load

Vertex = tuple[str, str | None]


def label(point: Point) -> str:
    """A point's tensor, with what the reader writes where it is one use of it."""
    name = point.value.name or ""
    return name if point.reader is None else f"{name}>{point.reader.outputs[0].name}"


def chains_of(proto: onnx.ModelProto) -> list[list[str]]:
    return [[label(point) for point in chain.points] for chain in found(proto)]


def found(proto: onnx.ModelProto) -> list[FlowChain]:
    return flow_chains(Graph(load(proto)))


def outputs(step: tuple) -> list[str]:
    return [node.outputs[0].name for node in step]


def test_a_series_is_one_chain() -> None:
    build = ModelBuilder([1, 4, 5, 5])
    y = build.op("Relu", build.conv("x", 4, 3, out="c"), out="r")
    (chain,) = found(build.model(build.conv(y, 4, 3, out="y")))
    assert [label(point) for point in chain.points] == ["x", "c", "r", "y"]
    assert [outputs(step) for step in chain.steps] == [["c"], ["r"], ["y"]]
    assert outputs(chain.nodes(1, 3)) == ["r", "y"]
    assert chain.parent is None


def test_a_residual_block_is_one_step_and_its_branch_a_chain_inside() -> None:
    build = ModelBuilder([1, 4, 5, 5])
    head = build.op("Relu", "x", out="h")
    y = build.conv(build.conv(head, 4, 1, out="a"), 4, 1, out="b")
    proto = build.model(build.op("Neg", build.op("Add", y, head, out="s"), out="y"))
    outer, inner = found(proto)
    assert [label(point) for point in outer.points] == ["x", "h", "s", "y"]
    assert outputs(outer.steps[1]) == ["a", "b", "s"]
    assert [label(point) for point in inner.points] == ["h>a", "a", "b"]
    assert inner.parent == (0, 1)


def test_a_skip_around_a_single_node_still_has_a_beginning_of_its_own() -> None:
    build = ModelBuilder([1, 4, 5, 5])
    (outer, branch) = found(build.model(build.op("Add", build.op("Relu", "x", out="r"), "x")))
    assert [label(point) for point in branch.points] == ["x>r", "r"]
    assert len(outer.points) == 2


def test_residuals_nest() -> None:
    build = ModelBuilder([1, 4, 5, 5])
    a = build.conv("x", 4, 1, out="a")
    b = build.op("Add", build.conv(a, 4, 1, out="c"), a, out="b")
    d = build.conv(b, 4, 1, out="d")
    chains = found(build.model(build.op("Add", d, "x", out="y")))
    assert [[label(point) for point in each.points] for each in chains] == [
        ["x", "y"],
        ["x>a", "a", "b", "d"],
        ["a>c", "c"],
    ]
    assert [each.parent for each in chains] == [None, (0, 0), (1, 1)]


def test_branches_that_concat_joins() -> None:
    build = ModelBuilder([1, 4, 5, 5])
    h = build.op("Relu", "x", out="h")
    one = build.conv(h, 2, 1, out="one")
    two = build.conv(
        build.op("Relu", build.conv(h, 3, 1, out="p"), out="q"), 4, 3, pad=1, out="two"
    )
    pool = build.op(
        "MaxPool", h, out="pool", kernel_shape=[3, 3], pads=[1, 1, 1, 1], strides=[1, 1]
    )
    y = build.op("Concat", one, two, pool, axis=1, channels=10, out="cat")
    assert chains_of(build.model(build.op("Relu", y, out="y"))) == [
        ["x", "h", "cat", "y"],
        ["h>one", "one"],
        ["h>p", "p", "q", "two"],
        ["h>pool", "pool"],
    ]


def test_heads_that_are_outputs_share_their_trunk() -> None:
    build = ModelBuilder([1, 4, 5, 5])
    trunk = build.op("Relu", "x", out="t")
    first = build.conv(build.conv(trunk, 4, 1, out="a"), 4, 1, out="b")
    second = build.conv(trunk, 4, 1, out="c")
    assert chains_of(build.model(first, second)) == [["x", "t"], ["t>a", "a", "b"], ["t>c", "c"]]


def test_an_output_in_the_middle_ends_a_chain() -> None:
    build = ModelBuilder([1, 4, 5, 5])
    a = build.conv("x", 4, 1, out="a")
    y = build.conv(build.op("Relu", a, out="r"), 4, 1, out="y")
    assert chains_of(build.model(a, y)) == [["x", "a"], ["a>r", "r", "y"]]


def test_the_skips_of_a_u_net_nest_its_levels() -> None:
    build = ModelBuilder([1, 4, 8, 8])
    one = build.conv("x", 4, 3, pad=1, out="one")
    two = build.conv(one, 4, 3, pad=1, stride=2, out="two")
    deep = build.conv(two, 4, 3, pad=1, stride=2, out="deep")
    up = build.constant([1, 1, 2, 2])
    wide = build.op("Resize", deep, "", up, out="wide", mode="nearest", channels=4)
    first = build.conv(build.op("Concat", wide, two, axis=1, channels=8, out="k"), 4, 1, out="f")
    wider = build.op("Resize", first, "", up, out="wider", mode="nearest", channels=4)
    y = build.op("Concat", wider, one, axis=1, channels=8, out="l")
    assert chains_of(build.model(build.conv(y, 2, 1, out="y"))) == [
        ["x", "one", "l", "y"],
        ["one>two", "two", "k", "f", "wider"],
        ["two>deep", "deep", "wide"],
    ]


def test_asking_for_a_shape_lets_nothing_flow() -> None:
    build = ModelBuilder([1, 4, 5, 5])
    a = build.conv("x", 4, 1, out="a")
    r = build.op("Relu", a, out="r")
    shape = build.op("Shape", a, out="shape")
    proto = build.model(build.op("Reshape", r, shape, out="y"), shapes={"y": [1, 4, 5, 5]})
    assert chains_of(proto) == [["x", "a", "r", "y"]]


def test_what_leads_to_no_output_does_not_count() -> None:
    build = ModelBuilder([1, 4, 5, 5])
    a = build.conv("x", 4, 1, out="a")
    build.op("Sigmoid", build.op("Neg", a))
    assert chains_of(build.model(build.op("Relu", a, out="y"))) == [["x", "a", "y"]]


def test_both_parts_of_a_split_are_branches() -> None:
    build = ModelBuilder([1, 4, 5, 5])
    build.op("Split", "x", outputs=["p", "q"], axis=1)
    build._channels |= {"p": 2, "q": 2}
    one = build.conv("p", 2, 1, out="one")
    proto = build.model(build.op("Concat", one, "q", axis=1, out="y"))
    # Neither part dominates the joint: the whole is a step, the parts begin within it.
    assert chains_of(proto) == [["x", "y"], ["p", "one"]]


def test_a_part_of_a_split_that_nobody_reads_is_left_out() -> None:
    build = ModelBuilder([1, 4, 5, 5])
    build.op("Split", "x", outputs=["p", "q"], axis=1)
    assert chains_of(build.model(build.op("Relu", "p", out="y"))) == [["x", "p", "y"]]


def vectors(kind: str = "other") -> onnx.ModelProto:
    """x + a vector, between two convolutions; the vector of another input, or of x itself."""
    build = ModelBuilder([1, 4, 5, 5])
    shape = [1, 4, 1, 1] if kind != "map" else [1, 4, 5, 5]
    more = helper.make_tensor_value_info("t", TensorProto.FLOAT, shape)
    build._channels["t"] = 4
    a = build.conv("x", 4, 3, pad=1, out="a")
    source = build.op("GlobalAveragePool", a, out="g") if kind == "own" else "t"
    shift = build.conv(source, 4, 1, out="shift")
    y = build.conv(build.op("Add", a, shift, out="s"), 4, 3, out="y")
    return build.model(y, more_inputs=[] if kind == "own" else [more])


def test_a_vector_of_another_input_comes_from_the_side() -> None:
    flow = find_flow(Graph(load(vectors())))
    assert [[label(point) for point in each.points] for each in flow.chains] == [
        ["x", "a", "s", "y"],
        ["t", "shift"],
    ]
    assert outputs(flow.chains[0].steps[1]) == ["s"]
    ((node, aside),) = flow.side_inputs.items()
    assert node.outputs[0].name == "s"
    assert [value.name for value in aside] == ["shift"]


def test_a_map_of_another_input_joins() -> None:
    assert chains_of(vectors("map")) == [["x", "a"], ["t", "shift"], ["s", "y"]]


def test_a_vector_of_the_same_input_joins() -> None:
    flow = find_flow(Graph(load(vectors("own"))))
    assert not flow.side_inputs
    assert [label(point) for point in flow.chains[0].points] == ["x", "a", "s", "y"]
    assert outputs(flow.chains[0].steps[1]) == ["g", "shift", "s"]


# --- against the definition -----------------------------------------------------------------------


def random_graph(seed: int) -> onnx.ModelProto:
    """Up to three inputs and 14 nodes that read any of the tensors before them."""
    rng = np.random.default_rng(seed)
    build = ModelBuilder([1, 2])
    names = ["x"]
    more = []
    for number in range(rng.integers(0, 3)):
        names.append(f"x{number}")
        more.append(helper.make_tensor_value_info(names[-1], TensorProto.FLOAT, [1, 2]))
    for number in range(rng.integers(2, 15)):
        # Recent tensors are read more often, so that there are chains to find.
        picks = len(names) - 1 - np.minimum(rng.geometric(0.4, 3) - 1, len(names) - 1)
        sources = [names[pick] for pick in picks]
        kind = rng.choice(["Relu", "Relu", "Relu", "Add", "Max", "Split", "Shape"])
        out = f"v{number}"
        if kind == "Split":
            build.op("Split", sources[0], outputs=[out, f"{out}b"], axis=0, num_outputs=2)
            names += [out, f"{out}b"]
        elif kind == "Shape":
            build.op("Shape", sources[0], out=out)
        else:
            arity = {"Relu": 1, "Add": 2, "Max": 3}[kind]
            names.append(build.op(kind, *sources[:arity], out=out))
    ends = sorted({names[-1], names[rng.integers(len(names))]} - {"x"} - {i.name for i in more})
    graph = helper.make_graph(
        build.nodes,
        "random",
        [*build.inputs, *more],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ends],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)


def slow_steps(proto: onnx.ModelProto) -> set[tuple[str, str]]:
    """Every point with the next that all ways out lead through and that itself all ways in pass."""
    graph = proto.graph
    ends = {info.name for info in graph.output}
    leading = set(ends)
    nodes = []
    for node in reversed(graph.node):
        if node.op_type != "Shape" and leading.intersection(node.output):
            leading.update(node.input)
            nodes.insert(0, node)
    edges: dict[str, set[str]] = {"<": {info.name for info in graph.input}, ">": set()}
    for name in [*edges["<"], *(out for node in nodes for out in node.output)]:
        if name not in leading and name not in edges["<"]:
            continue
        readers = [node for node in nodes if name in node.input]
        targets = [{out for out in node.output if out in leading} for node in readers]
        several = len(readers) + (name in ends) > 1
        uses = [f"{name}>{node.output[0]}" for node in readers] if several else []
        edges[name] = set(uses) if several else set().union(*targets)
        edges.update(zip(uses, targets, strict=False))
        if name in ends or not edges[name]:
            edges[name].add(">")

    def reached(start: str, without: str | None = None) -> set[str]:
        stack, seen = [start], set()
        while stack:
            vertex = stack.pop()
            if vertex not in seen and vertex != without:
                seen.add(vertex)
                stack += edges[vertex]
        return seen

    steps = set()
    for vertex in set(edges) - {"<", ">"}:
        behind = {w for w in reached(vertex) - {vertex} if ">" not in reached(vertex, w)}
        # The nearest of them is the one from which all others are reached.
        nearest = next((w for w in behind if behind <= reached(w)), ">")
        if nearest != ">" and nearest not in reached("<", vertex):
            steps.add((vertex, nearest))
    return steps


@pytest.mark.parametrize("seed", range(150))
def test_random_graphs_have_the_steps_of_the_definition(seed: int) -> None:
    proto = random_graph(seed)
    steps = [pair for chain in chains_of(proto) for pair in pairwise(chain)]
    assert len(steps) == len(set(steps))
    assert set(steps) == slow_steps(proto)


def test_the_random_graphs_hold_what_they_test() -> None:
    chains = [chain for seed in range(150) for chain in found(random_graph(seed))]
    assert sum(len(chain.points) > 2 for chain in chains) > 100
    assert sum(chain.parent is not None for chain in chains) > 30


@pytest.mark.parametrize("seed", range(150))
def test_what_lies_between_reads_and_writes_nothing_else(seed: int) -> None:
    proto = random_graph(seed)
    graph = Graph(load(proto))
    for chain in flow_chains(graph):
        for (start, end), step in zip(pairwise(chain.points), chain.steps, strict=True):
            made = {value for node in step for value in node.outputs}
            read = {value for node in step for value in node.inputs if value is not None}
            assert read - made <= {start.value}
            for value in made - {end.value}:
                assert not value.is_graph_output()
            if chain.parent is not None:
                number, place = chain.parent
                assert set(step) <= set(flow_chains(graph)[number].steps[place]) or not step


def test_five_thousand_nodes() -> None:
    proto = networks.deep(5000)
    (trunk, *branches) = found(proto)
    assert len(trunk.points) == 1251
    assert len(branches) == 1250
    assert all(branch.parent is not None for branch in branches)

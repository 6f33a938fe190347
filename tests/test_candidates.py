"""Which segments one convolution may replace, by which kernels, and why others are left out."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
from builders import ModelBuilder
from onnx import TensorProto, helper

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import networks

from graphfold.candidates import LARGEST_KERNEL, MOST_CONVS, Candidate, Candidates, find_candidates
from graphfold.graph import Graph
from graphfold.model import load
from graphfold.sites import ConvSite


def candidates(proto: onnx.ModelProto, **options: object) -> Candidates:
    return find_candidates(Graph(load(proto)), **options)  # type: ignore[arg-type]


def ends(found: Candidates) -> list[tuple[str, str]]:
    return [(each.input.name or "", each.output.name or "") for each in found.found]


def at(found: Candidates, source: str, target: str) -> Candidate:
    return found.found[ends(found).index((source, target))]


def kernels(candidate: Candidate) -> list[tuple[tuple[int, ...], str, tuple[str, ...]]]:
    return [(each.kernel, each.family, each.removed_convs) for each in candidate.choices]


def reasons(found: Candidates) -> dict[tuple[str, str], str]:
    return {(each.input, each.output): each.reason for each in found.excluded}


def two(build: ModelBuilder, between: Sequence[str] = (), **second: object) -> onnx.ModelProto:
    """Two convolutions, from x to c, r and y, with operators between them."""
    value = build.conv("x", 4, 3, pad=1, out="c")
    for op_type in between:
        value = build.op(op_type, value)
    options = {"kernel": 3, "pad": 1, "out": "y"} | second
    return build.model(build.conv(value, 6, **options))  # type: ignore[arg-type]


# --- segments -------------------------------------------------------------------------------------


def test_activations_inside_go_and_segments_end_before_the_next() -> None:
    build = ModelBuilder([1, 4, 9, 9])
    r = build.op("Relu", build.norm(build.conv("x", 4, 3, pad=1, out="c"), out="n"), out="r")
    y = build.op("Relu", build.conv(r, 6, 3, pad=1, out="d"), out="y")
    found = candidates(build.model(y))
    # Behind the normalisation that belongs to the first, and never behind an activation.
    assert ends(found) == [("x", "n"), ("x", "d"), ("r", "d")]
    both = at(found, "x", "d")
    assert [site.name for site in both.convs] == ["c", "d"]
    assert [site.name for site in both.activations] == ["r"]
    assert not both.adds


def test_an_activation_of_several_nodes_in_a_row_is_taken_whole() -> None:
    build = ModelBuilder([1, 4, 9, 9])
    c = build.conv("x", 4, 3, pad=1, out="c")
    gate = build.op("Clip", build.op("Add", c, build.constant(3.0)), build.constant(0.0),
                    build.constant(6.0))  # fmt: skip
    h = build.op("Div", build.op("Mul", c, gate), build.constant(6.0), out="h")
    found = candidates(build.model(build.conv(h, 6, 3, pad=1, out="y")))
    assert ends(found) == [("x", "c"), ("x", "y"), ("h", "y")]
    (site,) = at(found, "x", "y").activations
    assert (site.name, site.kind) == ("h", "HardSwish")


def test_a_branch_is_held_whole_or_not_at_all() -> None:
    build = ModelBuilder([1, 4, 9, 9])
    h = build.conv("x", 4, 1, out="h")
    r = build.op("Relu", build.conv(h, 8, 1, out="a"), out="r")
    s = build.op("Add", build.conv(r, 4, 3, pad=1, out="b"), h, out="s")
    found = candidates(build.model(build.conv(s, 4, 1, out="y")))
    assert set(ends(found)) == {
        *(("x", "h"), ("x", "s"), ("x", "y")),
        *(("h", "a"), ("r", "b"), ("h", "s"), ("h", "y"), ("s", "y")),
    }
    # From h, b is the whole branch: the segment with its Add stands for it.
    assert at(found, "h", "s").adds
    assert not at(found, "r", "b").adds


def test_a_branch_whose_join_is_no_candidate_is_one_itself() -> None:
    build = ModelBuilder([1, 4, 9, 9])
    h = build.op("Relu", build.conv("x", 4, 1, out="c"), out="h")
    b = build.conv(build.conv(h, 4, 1, out="a"), 4, 3, pad=1, out="b")
    s = build.op("Add", b, build.op("Sigmoid", build.op("MaxPool", h, kernel_shape=[1, 1])))
    found = candidates(build.model(s))
    assert ("h", "b") in ends(found)
    assert "MaxPool" in reasons(found)["h", s]


def test_a_branch_that_begins_with_something_else_begins_no_segment() -> None:
    build = ModelBuilder([1, 4, 9, 9])
    h = build.op("Relu", "x", out="h")
    one = build.conv(h, 4, 3, pad=1, out="one")
    other = build.conv(build.op("MaxPool", h, out="m", kernel_shape=[1, 1]), 4, 1, out="other")
    found = candidates(build.model(build.op("Concat", one, other, axis=1, out="y")))
    assert ends(found) == [("h", "one"), ("m", "other")]
    assert list(reasons(found)) == [("h", "y")]


def test_concat_joins_like_an_add() -> None:
    build = ModelBuilder([1, 4, 9, 9])
    h = build.op("Relu", "x", out="h")
    one, more = build.conv(h, 2, 1, out="one"), build.conv(h, 3, 5, pad=2, out="more")
    y = build.op("Concat", one, more, axis=1, channels=5, out="cat")
    found = candidates(build.model(build.conv(y, 4, 3, pad=1, out="y")))
    # The branches alone are left out: the segment with their join stands for each.
    assert ends(found) == [("h", "cat"), ("h", "y"), ("cat", "y")]
    assert at(found, "h", "y").choices[0].kernel == (7, 7)


def test_what_is_added_from_the_side_is_no_end_and_no_obstacle() -> None:
    build = ModelBuilder([1, 4, 5, 5])
    more = helper.make_tensor_value_info("t", TensorProto.FLOAT, [1, 4, 1, 1])
    r = build.op("Relu", build.op("Add", build.conv("x", 4, 3, pad=1, out="c"), "t"), out="r")
    found = candidates(build.model(build.conv(r, 6, 3, pad=1, out="y"), more_inputs=[more]))
    assert ends(found) == [("x", "c"), ("x", "y"), ("r", "y")]
    assert not at(found, "x", "y").adds


def test_the_same_from_the_other_input_in_full_size_is_an_obstacle() -> None:
    build = ModelBuilder([1, 4, 5, 5])
    more = helper.make_tensor_value_info("t", TensorProto.FLOAT, [1, 4, 5, 5])
    r = build.op("Relu", build.op("Add", build.conv("x", 4, 3, pad=1, out="c"), "t"), out="r")
    found = candidates(build.model(build.conv(r, 6, 3, pad=1, out="y"), more_inputs=[more]))
    assert ends(found) == [("x", "c"), ("r", "y")]


def test_what_no_input_determines_is_an_obstacle() -> None:
    build = ModelBuilder([1, 4, 5, 5])
    noise = build.op("RandomNormal", shape=[1, 4, 5, 5], out="noise")
    s = build.op("Add", build.conv("x", 4, 3, pad=1, out="c"), noise, out="s")
    found = candidates(build.model(build.conv(s, 6, 3, pad=1, out="y")))
    assert ends(found) == [("x", "c"), ("s", "y")]
    assert reasons(found)["x", "s"] == "Add at 's' also reads 'noise'"


# --- exclusions -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("between", "attributes", "reason"),
    [
        ("MaxPool", {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}, "MaxPool at 'z' is not linear"),
        ("Softmax", {"axis": 1}, "Softmax at 'z' is not linear"),
        ("GlobalAveragePool", {}, "GlobalAveragePool at 'z' is not linear"),
        ("Transpose", {"perm": [0, 1, 3, 2]}, "Transpose at 'z' is not linear"),
    ],
)
def test_operators_that_are_not_linear(between: str, attributes: dict, reason: str) -> None:
    build = ModelBuilder([1, 4, 9, 9])
    z = build.op(between, build.conv("x", 4, 3, pad=1, out="c"), out="z", **attributes)
    found = candidates(build.model(build.conv(z, 6, 1, out="y")))
    assert ends(found) == [("x", "c"), ("z", "y")]
    assert reasons(found) == {("x", "z"): reason}


def test_a_gate_is_named() -> None:
    build = ModelBuilder([1, 4, 9, 9])
    c = build.conv("x", 4, 3, pad=1, out="c")
    pooled = build.conv(build.op("GlobalAveragePool", c, out="g"), 4, 1, out="e")
    gated = build.op("Mul", c, build.op("Sigmoid", pooled), out="gated")
    found = candidates(build.model(build.conv(gated, 6, 1, out="y")))
    assert ends(found) == [("x", "c"), ("g", "e"), ("gated", "y")]
    assert reasons(found)["x", "gated"] == "'gated' is gated by what is pooled of it"


def test_a_kernel_behind_a_stride_and_a_pointwise_one() -> None:
    build = ModelBuilder([1, 4, 9, 9])
    a = build.conv("x", 4, 3, pad=1, stride=2, out="a")
    b = build.conv(a, 4, 1, out="b")
    found = candidates(build.model(build.conv(b, 4, 3, pad=1, out="y")))
    assert ends(found) == [("x", "a"), ("x", "b"), ("a", "b"), ("b", "y")]
    assert reasons(found) == {
        ("x", "b"): "the resolution changes before it",
        ("a", "b"): "the resolution changes before it",
    }
    assert (at(found, "x", "b").choices[0].kernel, at(found, "x", "b").choices[0].stride) == (
        (3, 3),
        (2, 2),
    )
    strict = candidates(build.model(b), compat="layermerge")
    assert ends(strict) == [("x", "a"), ("a", "b")]


def test_a_kernel_behind_a_pool_with_a_stride() -> None:
    build = ModelBuilder([1, 4, 9, 9])
    pooled = build.op("AveragePool", build.conv("x", 4, 3, pad=1, out="c"), out="p",
                      kernel_shape=[2, 2], strides=[2, 2])  # fmt: skip
    found = candidates(build.model(build.conv(pooled, 6, 3, out="y")))
    assert ("x", "y") not in ends(found)
    assert reasons(found)["x", "y"].startswith("the kernel [3, 3] of 'y' stands behind stride")


def test_branches_of_different_strides() -> None:
    build = ModelBuilder([1, 4, 8, 8])
    h = build.op("Relu", "x", out="h")
    one = build.conv(h, 4, 1, stride=2, out="one")
    other = build.conv(h, 4, 5, out="other")  # of the same size, by luck
    y = build.op("Add", one, other, out="y")
    found = candidates(build.model(build.op("Relu", y)))
    assert reasons(found)["h", "y"] == "branches of different strides meet at 'y'"


def test_long_runs_end() -> None:
    build = ModelBuilder([1, 2, 9, 9])
    value = "x"
    for _ in range(20):
        value = build.conv(value, 2, 3, pad=1)
    found = candidates(build.model(value))
    assert max(each.choices[0].kernel[0] for each in found.found) == LARGEST_KERNEL
    assert any(reason == "its kernel would have 33 taps" for reason in reasons(found).values())
    build = ModelBuilder([1, 2, 9, 9])
    value = "x"
    for _ in range(MOST_CONVS + 2):
        value = build.conv(value, 2, 1)
    found = candidates(build.model(value))
    assert max(len(each.convs) for each in found.found) == MOST_CONVS
    assert any("more than 64" in reason for reason in reasons(found).values())


# --- kernels --------------------------------------------------------------------------------------


def test_every_number_of_removable_convolutions_gives_a_kernel() -> None:
    build = ModelBuilder([1, 4, 9, 9])
    value = build.conv("x", 4, 3, pad=1, out="a")
    value = build.conv(value, 4, 3, pad=1, out="b")
    found = candidates(build.model(build.conv(value, 6, 3, pad=1, out="y")))
    assert [each[0] for each in kernels(at(found, "x", "y"))] == [(7, 7), (5, 5), (3, 3)]
    # Where all may go, one stays.
    assert [each[0] for each in kernels(at(found, "x", "b"))] == [(5, 5), (3, 3)]
    assert kernels(at(found, "b", "y")) == [((3, 3), "dense", ())]


def test_of_equal_kernels_the_one_that_keeps_the_larger_norm_stays() -> None:
    build = ModelBuilder([1, 4, 9, 9])
    for name, scale in (("small", 0.1), ("large", 2.0), ("middle", 1.0)):
        build.constant(scale * build.rng.uniform(0.5, 1.0, (4, 4, 3, 3)), name)
    value = "x"
    for name in ("middle", "small", "large"):
        value = build.conv(value, 4, 3, pad=1, weight=name, out=f"{name}_out")
    (segment,) = [each for each in candidates(build.model(value)).found if len(each.convs) == 3]
    removed = {each.kernel: set(each.removed_convs) for each in segment.choices}
    assert removed == {
        (7, 7): set(),
        (5, 5): {"small_out"},
        (3, 3): {"middle_out", "small_out"},
    }
    kept = {each.kernel: each.kept_l1 for each in segment.choices}
    large = next(tensor for tensor in build.initializers if tensor.name == "large")
    assert kept[3, 3] == pytest.approx(np.abs(onnx.numpy_helper.to_array(large)).sum(), rel=1e-6)


def test_depthwise_and_dense_kernels_are_kinds_of_their_own() -> None:
    build = ModelBuilder([1, 4, 9, 9])
    value = build.depthwise("x", 3, pad=1, out="d")
    value = build.conv(value, 4, 1, out="p")
    found = candidates(build.model(build.depthwise(value, 5, pad=2, out="y")))
    assert set(kernels(at(found, "x", "y"))) == {
        ((7, 7), "dense", ()),
        ((7, 7), "depthwise", ("p",)),
        ((5, 5), "dense", ("d",)),
        ((5, 5), "depthwise", ("d", "p")),
        ((3, 3), "dense", ("y",)),
        ((3, 3), "depthwise", ("p", "y")),
        ((1, 1), "dense", ("d", "y")),
    }


def test_grouped_convolutions_merge_to_a_dense_one() -> None:
    build = ModelBuilder([1, 4, 9, 9])
    proto = build.model(build.conv(build.conv("x", 4, 3, pad=1, groups=2), 4, 3, groups=2, out="y"))
    assert at(candidates(proto), "x", "y").choices[0].family == "dense"


def test_dilation_spreads_taps() -> None:
    build = ModelBuilder([1, 4, 19, 19])
    found = candidates(two(build, kernel=3, pad=2, dilation=2))
    assert [each[0] for each in kernels(at(found, "x", "y"))] == [(7, 7), (5, 5)]


def test_asymmetric_kernels_add_per_axis() -> None:
    build = ModelBuilder([1, 4, 9, 9])
    value = build.conv("x", 4, (1, 7), pad=(0, 3, 0, 3), out="row")
    found = candidates(build.model(build.conv(value, 4, (3, 1), pad=(1, 0, 1, 0), out="y")))
    assert {each[0] for each in kernels(at(found, "x", "y"))} == {(3, 7), (1, 7), (3, 1)}


def test_an_average_pool_inside_adds_its_window() -> None:
    build = ModelBuilder([1, 4, 9, 9])
    pooled = build.op("AveragePool", build.conv("x", 4, 3, pad=1, out="c"), out="p",
                      kernel_shape=[2, 3], strides=[2, 1])  # fmt: skip
    found = candidates(build.model(build.conv(pooled, 6, 1, out="y")))
    choice, less = at(found, "x", "y").choices
    assert (choice.kernel, choice.stride) == ((4, 5), (2, 1))
    assert (less.kernel, less.removed_convs) == ((2, 3), ("c",))


def test_one_and_three_dimensions() -> None:
    build = ModelBuilder([1, 4, 9])
    assert at(candidates(two(build, ["Relu"])), "x", "y").choices[0].kernel == (5,)
    build = ModelBuilder([1, 4, 5, 5, 5])
    assert at(candidates(two(build, ["Relu"])), "x", "y").choices[0].kernel == (5, 5, 5)


def test_the_longest_of_several_branches_counts() -> None:
    build = ModelBuilder([1, 4, 9, 9])
    h = build.op("Relu", "x", out="h")
    one = build.conv(build.conv(h, 4, 3, pad=1, out="a"), 4, 3, pad=1, out="b")
    s = build.op("Sum", one, build.conv(h, 4, 3, pad=1, out="c"), h, out="s")
    segment = at(candidates(build.model(s)), "h", "s")
    assert [each.kernel for each in segment.choices] == [(5, 5), (3, 3)]


def test_a_lone_convolution_behind_no_activation_may_go_by_itself() -> None:
    def resized(*between: str) -> Candidates:
        build = ModelBuilder([1, 4, 4, 4])
        scales = build.constant([1, 1, 2, 2])
        value = build.op("Resize", "x", "", scales, mode="nearest", out="up", channels=4)
        for op_type in between:
            value = build.op(op_type, value, out="r")
        c = build.conv(value, 4, 3, pad=1, out="c")
        return candidates(build.model(build.op("MaxPool", c, kernel_shape=[2, 2])))

    dense, nothing = at(resized(), "up", "c").choices
    assert dense.kernel == (3, 3)
    assert (nothing.family, nothing.kernel, nothing.removed_convs) == ("identity", (1, 1), ("c",))
    assert len(at(resized("Relu"), "r", "c").choices) == 1


# --- normalisations by groups ---------------------------------------------------------------------


def normalised(channels: int = 4, skip: bool = False, spelling: str = "reshape") -> onnx.ModelProto:
    build = ModelBuilder([1, 4, 6, 6], opset=21 if spelling == "operator" else 17)
    c = build.conv("x", 4, 3, pad=1, out="c")
    scale, shift = build.constant(np.full(4, 0.7)), build.constant(np.full(4, 0.3))
    if spelling == "operator":
        n = build.op("GroupNormalization", c, scale, shift, num_groups=2, out="n")
    else:
        grouped = build.op("Reshape", c, build.constant([0, 2, -1], dtype=np.int64))
        ones, zeros = build.constant(np.ones(2)), build.constant(np.zeros(2))
        y = build.op("InstanceNormalization", grouped, ones, zeros)
        y = build.op("Reshape", y, build.constant([1, 4, 6, 6], dtype=np.int64))
        y = build.op("Mul", y, build.constant(np.full((4, 1, 1), 0.7)))
        n = build.op("Add", y, build.constant(np.full((4, 1, 1), 0.3)), out="n", channels=4)
    y = build.conv(build.op("Relu", n, out="r"), channels, 3, pad=1, out="d")
    y = build.op("Add", y, "x", out="s") if skip else y
    return build.model(y, shapes={y: [1, channels, 6, 6]})


@pytest.mark.parametrize("spelling", ["reshape", "operator"])
def test_a_normalisation_by_groups_moves_unless_it_is_to_stay(spelling: str) -> None:
    proto = normalised(spelling=spelling)
    stays = candidates(proto, move_norms=False)
    assert ends(stays) == [("x", "c"), ("r", "d")]
    assert any("normalises by statistics" in reason for reason in reasons(stays).values())
    moves = candidates(proto)
    assert ends(moves) == [("x", "c"), ("x", "d"), ("r", "d")]
    (norm,) = at(moves, "x", "d").norms
    assert (norm.name, norm.channels, norm.groups) == ("n", 4, 2)
    assert at(moves, "x", "d").norm == "after"
    assert not at(moves, "x", "c").norms


def test_a_normalisation_of_other_channels_does_not_move() -> None:
    found = candidates(normalised(channels=6))
    assert ends(found) == [("x", "c"), ("r", "d")]
    assert reasons(found)["x", "d"] == "'n' normalises 4 channels and the result has 6"


def test_a_normalisation_does_not_move_out_of_its_branch() -> None:
    found = candidates(normalised(skip=True))
    assert ends(found) == [("x", "c"), ("x", "d"), ("r", "d")]
    assert reasons(found)["x", "s"] == "'n' would leave its branch at 's'"


# --- against the definition -----------------------------------------------------------------------


def random_segment(seed: int) -> onnx.ModelProto:
    """A chain of convolutions of all kinds with branches between them."""
    rng = np.random.default_rng(seed)
    build = ModelBuilder([1, 4, 24, 24], seed=seed)
    value = build.op("Relu", "x", out="h")
    for _ in range(rng.integers(1, 4)):
        parts = [_branch(build, rng, value) for _ in range(rng.integers(1, 4))]
        if rng.random() < 0.4:
            parts.append(value)
        value = parts[0] if len(parts) == 1 else build.op("Sum", *parts)
    return build.model(build.op("Sigmoid", value))


def _branch(build: ModelBuilder, rng: np.random.Generator, value: str) -> str:
    for _ in range(rng.integers(1, 3)):
        kernel, dilation = int(rng.choice([1, 3, 5])), int(rng.integers(1, 3))
        pad = kernel // 2 * dilation
        groups = int(rng.choice([1, 2, 4]))
        value = build.conv(value, 4, kernel, pad=pad, dilation=dilation, groups=groups)
        if rng.random() < 0.5:
            value = build.op("Relu", value)
    return value


def slow_choices(candidate: Candidate) -> dict[tuple[tuple[int, ...], str], float]:
    """The largest norm per kernel and family over every subset that equation 3 allows."""
    removable = [site for site in candidate.convs if site.removable]
    best: dict[tuple[tuple[int, ...], str], float] = {}
    for size in range(len(removable) + 1):
        for gone in itertools.combinations(removable, size):
            kept = [site for site in candidate.convs if site not in gone]
            if kept:
                family = "depthwise" if all(site.depthwise for site in kept) else "dense"
                key = slow_kernel(candidate, kept), family
                best[key] = max(best.get(key, 0.0), sum(map(norm, kept)))
    return best


def slow_kernel(candidate: Candidate, kept: Sequence[ConvSite]) -> tuple[int, ...]:
    """1 + the most that any way from input to output adds, one way at a time."""
    added = {}
    for site in kept:
        dilation = site.conv.attributes["dilations"].as_ints()[0]
        added[site.conv] = (site.kernel[0] - 1) * dilation

    def most(value: object) -> int:
        if value is candidate.input:
            return 0
        node = value.producer()  # type: ignore[attr-defined]
        read = node.inputs[:1] if node.op_type in ("Conv", "Relu") else node.inputs
        return added.get(node, 0) + max(most(each) for each in read)

    size = 1 + most(candidate.output)
    return size, size


def norm(site: ConvSite) -> float:
    return float(np.abs(site.conv.inputs[1].const_value.numpy().astype(np.float64)).sum())


@pytest.mark.parametrize("seed", range(60))
def test_kernels_are_those_of_all_subsets(seed: int) -> None:
    found = candidates(random_segment(seed))
    assert found.found
    for each in found.found:
        slow = slow_choices(each)
        fast = {(choice.kernel, choice.family): choice.kept_l1 for choice in each.choices}
        assert set(fast) <= set(slow)
        # Beside one another, convolutions of a kind that go by norm alone may miss a mixture.
        assert all(fast[key] <= slow[key] * (1 + 1e-9) for key in fast)
        assert max(fast.values()) == pytest.approx(max(slow.values()))
        if not each.adds:
            assert fast == pytest.approx(slow)


def test_the_random_segments_hold_what_they_test() -> None:
    every = [each for seed in range(60) for each in candidates(random_segment(seed)).found]
    assert sum(each.adds for each in every) > 50
    assert sum(len(each.choices) > 3 for each in every) > 50


def test_five_thousand_nodes() -> None:
    graph = Graph(load(networks.deep(5000)))
    found = find_candidates(graph)
    # From the start of every block over up to fifteen, and none from within a branch.
    blocks, most = 1250, (LARGEST_KERNEL - 1) // 2
    assert len(found.found) >= most * (blocks - most)
    assert len(found.found) <= (most + 1) * blocks

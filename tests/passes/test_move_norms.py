"""Normalisations by groups in segments, and vectors that enter them from the side."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from builders import (
    ModelBuilder,
    assert_same_function,
    node_making,
    nonzero,
    op_types,
    random_input,
    run,
)
from numpy.typing import NDArray
from references import attributes, close, constants, reference
from references import build as build_reference

import graphfold
from graphfold.errors import PlanError, Problem
from graphfold.graph import Graph
from graphfold.model import load, to_proto
from graphfold.norms import NormSite, find_norms

Array = NDArray[np.float64]
SPELLINGS = {"groups": 21, "by group": 18, "reshape": 17, "shape of": 17, "instance": 17}
EPSILON = 0.03


class Block:
    """Two convolutions, a vector added between them, a normalisation and an activation.

    The first is 3x3 from 4 channels to 6; `second` is the other's kernel and padding.
    """

    def __init__(
        self,
        spelling: str = "reshape",
        *,
        second: tuple[int, int] = (3, 1),
        out: int = 6,
        first: tuple[int, int] = (3, 1),
        batch: int | str = 2,
        vector: bool = True,
    ) -> None:
        self.build = ModelBuilder([batch, 4, 9, 8], opset=SPELLINGS.get(spelling, 17))
        build = self.build
        self.spelling, self.pads = spelling, (first[1], second[1])
        value = build.conv("x", 6, first[0], pad=first[1], out="c")
        if vector:
            extra_input(build, "t", [batch, 5])
            dense = build.op("Gemm", "t", build.constant(nonzero(build.rng, 5, 6)), out="dense")
            axes = build.constant(np.array([2, 3]), dtype=np.int64)
            vector_name = build.op("Unsqueeze", dense, axes, out="vector", channels=6)
            value = build.op("Add", value, vector_name, out="added", channels=6)
        self.scale, self.shift = nonzero(build.rng, 6), nonzero(build.rng, 6)
        value = build.op("Relu", self.norm(value, "n"), out="r", channels=6)
        build.conv(value, out, second[0], pad=second[1], out="y")

    def norm(self, value: str, out: str) -> str:
        """One normalisation: of 2 groups, or of all channels alone."""
        build = self.build
        if self.spelling in ("groups", "by group"):
            step = 1 if self.spelling == "groups" else 3
            if step == 3:  # before opset 21, one scale and one shift per group
                self.scale, self.shift = np.repeat(self.scale[:2], 3), np.repeat(self.shift[:2], 3)
            parameters = [build.constant(array[::step]) for array in (self.scale, self.shift)]
            options = {"num_groups": 2, "epsilon": EPSILON, "channels": 6}
            return build.op("GroupNormalization", value, *parameters, out=out, **options)
        if self.spelling == "instance":
            parameters = [build.constant(array) for array in (self.scale, self.shift)]
            return build.op("InstanceNormalization", value, *parameters, epsilon=EPSILON, out=out)
        y = _normalised_groups(build, value)
        if self.spelling == "shape of":
            shape = build.op("Shape", value, start=0)
        else:
            shape = build.constant([2, 6, 9, 8], dtype=np.int64)
        y = build.op("Reshape", y, shape)
        y = build.op("Mul", y, build.constant(self.scale.reshape(6, 1, 1)))
        return build.op("Add", y, build.constant(self.shift.reshape(6, 1, 1)), out=out, channels=6)

    def model(self, output: str = "y") -> onnx.ModelProto:
        return finished(self.build, output)

    def hoisted(self, feeds: dict[str, Any], norm: bool = True) -> Array:
        """What the segment means with all padding at the first convolution, in float64."""
        values = constants(self.model())
        nodes = {node.output[0]: node for node in self.model().graph.node}
        x = np.pad(feeds["x"].astype(np.float64), [(0, 0), (0, 0), *[(sum(self.pads),) * 2] * 2])
        y = _conv(x, *(values[name] for name in nodes["c"].input[1:]))
        if "t" in feeds:
            y = (
                y
                + (feeds["t"].astype(np.float64) @ values[nodes["dense"].input[1]])[
                    :, :, None, None
                ]
            )
        y = _conv(y, *(values[name] for name in nodes["y"].input[1:]))
        return self.normalised(y) if norm else y

    def normalised(self, y: Array) -> Array:
        groups = y.shape[1] if self.spelling == "instance" else 2
        flat = y.reshape(y.shape[0], groups, -1)
        mean, variance = flat.mean(axis=2, keepdims=True), flat.var(axis=2, keepdims=True)
        normed = ((flat - mean) / np.sqrt(variance + EPSILON)).reshape(y.shape)
        scale, shift = (array[None, :, None, None] for array in (self.scale, self.shift))
        return np.asarray(normed * scale + shift)


def _normalised_groups(build: ModelBuilder, value: str) -> str:
    grouped = build.op("Reshape", value, build.constant([0, 2, -1], dtype=np.int64))
    ones, zeros = build.constant(np.ones(2)), build.constant(np.zeros(2))
    return build.op("InstanceNormalization", grouped, ones, zeros, epsilon=EPSILON)


def finished(build: ModelBuilder, output: str) -> onnx.ModelProto:
    """With a shape of unknown sizes for the output: onnx infers none behind GroupNormalization."""
    return build.model(output, shapes={output: ["n", "c", "h", "w"]})


def extra_input(build: ModelBuilder, name: str, shape: list[int | str]) -> None:
    info = onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape)
    build.inputs.append(info)


def _conv(x: Array, weight: NDArray[Any], bias: NDArray[Any]) -> Array:
    size = weight.shape[2]
    windows = np.lib.stride_tricks.sliding_window_view(x, (size, size), axis=(2, 3))
    y = np.einsum("nihwab,oiab->nohw", windows, weight.astype(np.float64))
    return np.asarray(y + bias.astype(np.float64)[None, :, None, None])


SEGMENT = {"input": "x", "output": "y", "boundary": "hoist", "norm": "after"}


def folded(proto: onnx.ModelProto, *segments: dict[str, Any], **plan: Any) -> onnx.ModelProto:
    found = graphfold.optimize(proto, {"graphfold_plan": 1, "segments": list(segments), **plan})
    assert found.report.verification is not None
    assert found.report.verification.passed
    assert_same_function(to_proto(found.reference), found.model)
    return found.model


def problem(proto: onnx.ModelProto, **changes: Any) -> Problem:
    stated = {**SEGMENT, **changes}
    segment = {key: value for key, value in stated.items() if value is not None}
    with pytest.raises(PlanError) as caught:
        build_reference(proto, segments=[segment])
    (found,) = caught.value.problems
    return found


# --- the meaning ----------------------------------------------------------------------------------


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_the_last_normalisation_stands_behind_the_result(
    spelling: str, monkeypatch: pytest.MonkeyPatch
):
    if spelling == "by group":
        # Opset 18's operator is deprecated for opset 21's; exported models have it all the same.
        monkeypatch.setattr(onnx.checker, "check_model", lambda *_, **__: None)
    block = Block(spelling)
    proto = block.model()
    feeds = random_input(proto)
    expected = block.hoisted(feeds)
    moved = reference(proto, segments=[SEGMENT])
    close(run(moved, feeds)[0], expected, 2e-5)
    result = folded(proto, SEGMENT)
    close(run(result, feeds)[0], expected, 2e-5)
    kinds = op_types(result)
    assert kinds.count("Conv") == 2  # one of the map, one of the vector
    norm = "GroupNormalization" if "group" in spelling else "InstanceNormalization"
    assert kinds.count(norm) == 1
    assert "Relu" not in kinds
    sizes = [array.shape[2:] for array in constants(result).values() if array.ndim == 4]
    assert sorted(sizes) == [(1, 1), (5, 5)]


@pytest.mark.parametrize("spelling", ["groups", "reshape"])
def test_parameters_and_epsilon_are_the_trained_ones(spelling: str):
    block = Block(spelling)
    moved = reference(block.model(), segments=[SEGMENT])
    (kernel,) = [node for node in moved.graph.node if "Normalization" in node.op_type]
    assert attributes(kernel)["epsilon"] == pytest.approx(EPSILON)
    held = [array.ravel() for array in constants(moved).values() if array.size == 6]
    for wanted in (block.scale, block.shift):
        assert any(np.array_equal(array, wanted.astype(np.float32)) for array in held)


def test_what_leaves_keeps_its_name_and_a_free_activation_stands_behind_it():
    block = Block("groups")
    z = block.build.conv("y", 3, 1, out="z")
    moved = reference(block.model(z), segments=[{**SEGMENT, "activation": "Relu"}])
    assert node_making(moved, "y").op_type == "Relu"
    assert node_making(moved, "z").input[0] == "y"
    assert node_making(moved, node_making(moved, "y").input[0]).op_type == "GroupNormalization"


def test_a_segment_behind_reads_the_normalised_result():
    block = Block("groups")
    block.build.conv(block.build.op("Relu", block.build.conv("y", 6, 1, out="a")), 5, 1, out="z")
    behind = {"input": "y", "output": "z", "boundary": "exact"}
    proto = block.model("z")
    feeds = random_input(proto)
    result = folded(proto, SEGMENT, behind)
    assert op_types(result).count("Conv") == 3
    y = block.hoisted(feeds)
    values = constants(proto)
    for name in ("a", "z"):
        y = _conv(y, *(values[each] for each in node_making(proto, name).input[1:]))
    close(run(result, feeds)[0], y, 2e-5)


@pytest.mark.parametrize("spelling", ["groups", "shape of"])
def test_a_dropped_normalisation_leaves_nothing_behind(spelling: str):
    block = Block(spelling)
    proto = block.model()
    feeds = random_input(proto)
    result = folded(proto, {**SEGMENT, "norm": "drop"})
    assert not any("Normalization" in kind for kind in op_types(result))
    close(run(result, feeds)[0], block.hoisted(feeds, norm=False), 2e-5)


def test_of_several_only_the_last_one_stays():
    build = ModelBuilder([1, 4, 7, 7], opset=21)
    value = "x"
    for number in range(3):
        value = build.conv(value, 4, 1, out=f"c{number}")
        scale = build.constant(np.full(4, number + 2.0), name=f"scale{number}")
        shift = build.constant(np.ones(4))
        if number < 2:
            options = {"num_groups": number + 1, "channels": 4}
            value = build.op("GroupNormalization", value, scale, shift, **options)
    result = folded(finished(build, value), {**SEGMENT, "output": "c2", "boundary": "exact"})
    assert op_types(result) == ["Conv", "GroupNormalization"]
    norm = result.graph.node[-1]
    assert attributes(norm)["num_groups"] == 2
    assert constants(result)[norm.input[1]].tolist() == [3.0] * 4


def test_a_segment_may_end_behind_its_last_normalisation():
    build = ModelBuilder([1, 4, 7, 7], opset=21)
    ones, scale = build.constant(np.ones(4)), build.constant(nonzero(build.rng, 4))
    value = build.conv("x", 4, 3, pad=1, out="c")
    value = build.op("GroupNormalization", value, ones, ones, num_groups=1, channels=4)
    value = build.conv(build.op("Relu", value, channels=4), 4, 3, pad=1, out="d")
    value = build.op("GroupNormalization", value, scale, ones, num_groups=2, out="n", channels=4)
    proto = finished(build, build.op("Relu", value, out="y"))
    result = folded(proto, {**SEGMENT, "output": "n"})
    assert op_types(result) == ["Conv", "GroupNormalization", "Relu"]
    inner = folded(proto, {**SEGMENT, "output": "d", "norm": "drop"})
    feeds = random_input(proto)
    close(run(inner, feeds)[0], run(result, feeds)[0], 2e-5)


def test_open_sizes_stay_open():
    build = ModelBuilder(["N", 4, "H", "W"])
    value = build.conv("x", 4, 3, pad=1, stride=2)
    y = build.op("Reshape", _normalised_groups(build, value), build.op("Shape", value))
    build.conv(build.op("Relu", y, channels=4), 4, 3, stride=2, pad=1, out="y")
    proto = build.model("y")
    found = graphfold.optimize(proto, {"graphfold_plan": 1, "segments": [SEGMENT]})
    assert op_types(found.model).count("Conv") == 1
    sizes = {"N": 2, "H": 17, "W": 14}
    assert_same_function(to_proto(found.reference), found.model, sizes)


# --- vectors --------------------------------------------------------------------------------------


def test_a_vector_goes_through_a_convolution_that_pads_nothing():
    """Exact, padding and all: the network that is meant has the sum where it was."""
    block = Block("groups", second=(1, 0))
    proto = block.model()
    feeds = random_input(proto)
    result = folded(proto, {**SEGMENT, "boundary": "exact"})
    close(run(result, feeds)[0], block.hoisted(feeds), 2e-5)
    reads = node_making(reference(proto, segments=[{**SEGMENT, "boundary": "exact"}]), "added")
    assert set(reads.input) == {"c", "vector"}


def test_a_vector_without_anything_behind_it_is_added_as_it_is():
    block = Block("groups")
    segment = {**SEGMENT, "boundary": "exact", "remove_convs": ["y"]}
    result = folded(block.model(), segment)
    kinds = op_types(result)
    assert kinds.count("Conv") == 1
    assert kinds.count("Add") == 1


def test_vectors_of_a_branch_reach_the_sum_of_branches():
    build = ModelBuilder([2, 4, 9, 8])
    extra_input(build, "t", [2, 4, 1, 1])
    value = build.op("Add", "t", build.conv("x", 4, 3, pad=1), channels=4)
    value = build.conv(build.op("Relu", value, channels=4), 4, 3, pad=1)
    value = build.op("Sum", value, "x", "t", channels=4, out="y")
    proto = build.model(value)
    segment = {"input": "x", "output": "y", "boundary": "hoist"}
    with pytest.raises(PlanError, match="different sizes"):
        folded(proto, segment)  # t as it is, and what it becomes behind a convolution
    node_making(proto, "y").input.remove("t")
    result = folded(proto, segment)
    assert sorted(op_types(result)) == ["Add", "Conv", "Conv"]


@pytest.mark.parametrize("seed", range(12))
def test_vectors_at_random_places(seed: int):
    """Strides, groups, kernels and pads of all kinds behind sums with several vectors."""
    rng = np.random.default_rng(seed)
    build = ModelBuilder([2, 4, 19, 17], seed=seed)
    value = build.conv("x", 4, int(rng.integers(1, 4)), pad=1)
    for number in range(int(rng.integers(1, 4))):
        extra_input(build, f"t{number}", [int(rng.choice([1, 2])), 4, 1, 1])
        value = build.op(str(rng.choice(["Add", "Sum"])), value, f"t{number}", channels=4)
        for _ in range(int(rng.integers(1, 3))):
            value = build.op("Relu", value, channels=4) if rng.random() < 0.5 else value
            kernel, groups = int(rng.integers(1, 4)), int(rng.choice([1, 2, 4]))
            stride, pad = int(rng.choice([1, 1, 2])), int(rng.integers(0, 2))
            options = {"stride": stride, "groups": groups, "bias": bool(rng.integers(2))}
            value = build.conv(value, 4, kernel, pad=pad, **options)
            value = build.norm(value) if rng.random() < 0.5 else value
    result = folded(build.model(value), {"input": "x", "output": value, "boundary": "hoist"})
    maps = [node for node in result.graph.node if node.op_type == "Conv" and "x" in node.input]
    assert len(maps) == 1
    assert "Relu" not in op_types(result)


def test_loose_sums_with_a_vector_stay():
    build = ModelBuilder([1, 4, 9, 8])
    extra_input(build, "t", [1, 4, 1, 1])
    value = build.op("Add", "t", build.conv("x", 4, 1), channels=4)
    proto = build.model(build.conv(value, 4, 1, out="y"))
    assert op_types(graphfold.optimize(proto).model) == ["Conv", "Add", "Conv"]


# --- refusals -------------------------------------------------------------------------------------


def test_a_vector_before_padding_is_refused_with_the_boundary_that_works():
    found = problem(Block(first=(1, 0)).model(), boundary="exact")
    assert "'vector' is added to all pixels alike, and behind it zeros are padded" in found.what
    assert found.hint == "boundary: hoist would work"


def test_other_channels_are_refused():
    found = problem(Block(out=8).model())
    assert found.path == "segments[0].norm"
    assert found.what == "'n' normalises 6 channels and the result has 8"
    assert found.hint == "norm: drop leaves it out"


def test_groups_that_do_not_divide_are_refused():
    (site,) = find_norms(Graph(load(Block("groups").model())))
    assert site.why_not_on(6) is None
    other = NormSite(site.input, site.output, site.nodes, site.channels, groups=4)
    assert other.why_not_on(6) == "the 4 groups of 'n' do not divide 6 channels"


def test_a_normalisation_stays_in_its_branch():
    block = Block("groups", out=4)
    block.build.op("Add", "y", "x", out="z", channels=4)
    found = problem(block.model("z"), output="z")
    assert found.what == "'n' would leave its branch at 'z'"


def test_a_plan_says_what_becomes_of_a_normalisation():
    found = problem(Block().model(), norm=None)
    assert found.path == "segments[0].norm"
    assert found.what == "the segment holds 'n', which normalises by groups"
    assert found.hint is not None
    assert "norm: after" in found.hint


def test_a_segment_without_a_normalisation_has_none_to_move():
    found = problem(Block().model(), output="c", boundary="exact")
    assert found.what == "the segment holds no normalisation by groups"


def test_a_map_from_the_side_is_refused():
    block = Block(vector=False)
    extra_input(block.build, "m", [2, 6, 9, 8])
    proto = block.model()
    index = next(n for n, node in enumerate(proto.graph.node) if node.op_type == "Reshape")
    added = onnx.helper.make_node("Add", ["c", "m"], ["sum"])
    proto.graph.node[index].input[0] = "sum"
    proto.graph.node.insert(index, added)
    assert "'m' enters" in (problem(proto).hint or "")


# --- what is recognised ---------------------------------------------------------------------------


def test_a_scale_of_every_pixel_is_no_part_of_a_normalisation():
    proto = Block().model()
    (site,) = find_norms(Graph(load(proto)))
    assert (site.name, site.channels, site.groups, len(site.nodes)) == ("n", 6, 2, 5)
    mul = next(node for node in proto.graph.node if node.op_type == "Mul")
    for tensor in proto.graph.initializer:
        if tensor.name == mul.input[1]:
            tensor.CopyFrom(
                onnx.numpy_helper.from_array(np.ones((6, 9, 8), np.float32), tensor.name)
            )
    (site,) = find_norms(Graph(load(proto)))
    assert len(site.nodes) == 3

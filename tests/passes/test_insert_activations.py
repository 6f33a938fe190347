"""Free activations: each function at each opset, names and outputs kept, copies of others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
from builders import ModelBuilder, op_types, random_input, run
from numpy.typing import NDArray
from onnx import helper
from references import build, close, constants, reference, tensors
from scipy.special import erf

import graphfold
from graphfold.errors import PlanError

Array = NDArray[Any]


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


FUNCTIONS: dict[str, Callable[[Array], Array]] = {
    "Relu": lambda x: np.maximum(x, 0),
    "Relu6": lambda x: np.clip(x, 0, 6),
    "HardSwish": lambda x: x * np.clip(x + 3, 0, 6) / 6,
    "SiLU": lambda x: x * sigmoid(x),
    "Sigmoid": sigmoid,
    "Tanh": np.tanh,
    "GELU": lambda x: x * (1 + erf(x / np.sqrt(2))) / 2,
    "Mish": lambda x: x * np.tanh(np.log1p(np.exp(x))),
}
OPSETS = (8, 9, 11, 13, 14, 18, 20)


def wide_inputs(proto: onnx.ModelProto) -> dict[str, Array]:
    """Values far on both sides of every bend."""
    return {name: 4 * value for name, value in random_input(proto).items()}


def chain(opset: int = 17, dtype: Any = np.float32) -> onnx.ModelProto:
    b = ModelBuilder([2, 3, 6, 6], opset=opset, dtype=dtype)
    middle = b.conv("x", 4, 3, out="middle")
    return b.model(b.conv(middle, 5, 1, out="y"))


@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_at_opsets(name: str, opset: int):
    proto = chain(opset)
    plan = {"add_activations": [{"tensor": "middle", "activation": name}]}
    if name == "GELU" and opset < 9:
        with pytest.raises(PlanError) as caught:
            reference(proto, **plan)
        (problem,) = caught.value.problems
        assert problem.path == "add_activations[0].activation"
        assert problem.what == "GELU needs opset 9, the model has 8"
        return
    inserted = reference(proto, **plan)
    assert inserted.opset_import[0].version == opset
    feeds = wide_inputs(proto)
    (before,) = tensors(proto, ["middle"], feeds)
    (after,) = tensors(inserted, ["middle"], feeds)
    assert before.min() < -4
    assert before.max() > 7
    close(after, FUNCTIONS[name](before.astype(np.float64)), 1e-6)
    newest = {"HardSwish": 14, "Mish": 18, "GELU": 20}
    if opset >= newest.get(name, opset) and name != "SiLU":
        assert len(inserted.graph.node) == 3  # one operator where there is one


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
@pytest.mark.parametrize("name", ["Relu6", "SiLU", "GELU"])
def test_constants_have_the_tensors_type(name: str, dtype: Any):
    plan = {"add_activations": [{"tensor": "middle", "activation": name}]}
    inserted = reference(chain(13, dtype), **plan)
    assert {value.dtype for value in constants(inserted).values()} == {np.dtype(dtype)}


def test_the_tensor_keeps_its_name_behind_the_activation():
    plan = {"add_activations": [{"tensor": "middle", "activation": "Relu"}]}
    inserted = reference(chain(), **plan)
    conv, relu, last = inserted.graph.node
    assert relu.op_type == "Relu"
    assert conv.output[0] == relu.input[0] == "middle/graphfold.0"
    assert relu.output[0] == last.input[0] == "middle"


def test_a_graph_output_is_activated_under_its_name():
    proto = chain()
    inserted = reference(proto, add_activations=[{"tensor": "y", "activation": "Relu6"}])
    assert inserted.graph.output[0] == proto.graph.output[0]
    feeds = wide_inputs(proto)
    close(run(inserted, feeds)[0], np.clip(run(proto, feeds)[0], 0, 6), 1e-12)


def test_every_reader_sees_the_activation():
    b = ModelBuilder([1, 3, 6, 6])
    middle = b.conv("x", 4, 1, out="middle")
    joined = b.op("Add", b.conv(middle, 4, 1, out="branch"), middle, out="sum")
    proto = b.model(joined, middle)
    inserted = reference(proto, add_activations=[{"tensor": "middle", "activation": "Relu"}])
    feeds = wide_inputs(proto)
    both = run(inserted, feeds)
    (plain,) = tensors(proto, ["middle"], feeds)
    assert np.array_equal(both[1], np.maximum(plain, 0))
    branch, skip = tensors(inserted, ["branch", "middle"], feeds)
    assert np.array_equal(skip, both[1])
    close(both[0], branch.astype(np.float64) + skip)


def test_the_activation_stands_behind_the_add_of_a_segment():
    b = ModelBuilder([1, 4, 6, 6])
    act = b.op("Relu", b.conv("x", 4, 3, pad=1, out="first"), out="act")
    wide = b.op("Relu", b.conv(act, 8, 1, out="expand"), out="inner")
    joined = b.op("Add", b.conv(wide, 4, 1, out="project"), act, out="sum")
    proto = b.model(b.conv(joined, 3, 1, out="y"))
    segment = {"input": "act", "output": "sum", "boundary": "exact", "activation": "Relu6"}
    inserted = reference(proto, segments=[segment])
    assert op_types(inserted) == ["Conv", "Relu", "Conv", "Conv", "Add", "Clip", "Conv"]
    folded = graphfold.optimize(proto, {"graphfold_plan": 1, "segments": [segment]}).model
    assert op_types(folded) == ["Conv", "Relu", "Conv", "Clip", "Conv"]
    feeds = wide_inputs(proto)
    close(run(folded, feeds)[0], run(inserted, feeds)[0], 1e-5)
    far = {"x": 10 * feeds["x"]}
    for network in (inserted, folded):
        (value,) = tensors(network, ["sum"], far)
        assert value.min() == 0
        assert value.max() == 6


def test_neighbouring_segments_share_an_activated_tensor():
    b = ModelBuilder([1, 3, 6, 6])
    value = "x"
    for number in range(4):
        value = b.conv(value, 3, 1, out=f"c{number}")
    proto = b.model(value)
    segments = [
        {"input": "x", "output": "c1", "boundary": "exact", "activation": "Relu"},
        {"input": "c1", "output": "c3", "boundary": "exact", "activation": "Tanh"},
    ]
    folded = graphfold.optimize(proto, {"graphfold_plan": 1, "segments": segments}).model
    assert op_types(folded) == ["Conv", "Relu", "Conv", "Tanh"]
    assert [node.output[0] for node in folded.graph.node][1::2] == ["c1", "c3"]


def test_a_graph_input_keeps_its_name():
    proto = chain()
    inserted = reference(proto, add_activations=[{"tensor": "x", "activation": "Relu"}])
    assert [info.name for info in inserted.graph.input] == ["x"]
    assert inserted.graph.node[0].input[0] == "x"
    feeds = wide_inputs(proto)
    expected = run(proto, {"x": np.maximum(feeds["x"], 0)})[0]
    close(run(inserted, feeds)[0], expected, 1e-12)


def test_a_constant_takes_no_activation():
    proto = chain()
    weight = proto.graph.node[0].input[1]
    with pytest.raises(PlanError, match="is a constant"):
        reference(proto, add_activations=[{"tensor": weight, "activation": "Relu"}])


# --- Like an activation of the model --------------------------------------------------------------


def with_prelu(channels: int = 4) -> onnx.ModelProto:
    b = ModelBuilder([1, 3, 6, 6])
    slopes = b.constant(np.linspace(0.1, 0.9, 4).reshape(4, 1, 1), "slopes")
    first = b.op("PRelu", b.conv("x", 4, 3, pad=1, out="first"), slopes, out="act")
    wide = b.conv(first, channels, 1, out="second")
    return b.model(b.conv(wide, 3, 1, out="y"))


def prelu_of(proto: onnx.ModelProto, x: Array) -> Array:
    slopes = constants(proto)["slopes"].astype(np.float64)
    return np.where(x > 0, x, slopes * x)


@pytest.mark.parametrize("removed", [False, True])
def test_like_copies_the_parameters_even_of_a_removed_site(removed: bool):
    proto = with_prelu()
    plan: dict[str, Any] = {
        "add_activations": [{"tensor": "second", "activation": {"like": "act"}}],
        "remove_activations": ["act"] if removed else [],
    }
    inserted = reference(proto, **plan)
    assert op_types(inserted).count("PRelu") == (1 if removed else 2)
    feeds = wide_inputs(proto)
    name = next(n.input[0] for n in inserted.graph.node if n.output[0] == "second")
    before, after = tensors(inserted, [name, "second"], feeds)
    close(after, prelu_of(proto, before.astype(np.float64)), 1e-6)


def test_like_of_a_segments_own_activation_stands_behind_it():
    proto = with_prelu()
    segment = {
        "input": "x",
        "output": "second",
        "boundary": "exact",
        "activation": {"like": "act"},
    }
    result = graphfold.optimize(proto, {"graphfold_plan": 1, "segments": [segment]})
    assert op_types(result.model) == ["Conv", "PRelu", "Conv"]


def test_like_several_nodes_and_attributes():
    b = ModelBuilder([1, 3, 6, 6])
    first = b.conv("x", 4, 3, pad=1, out="first")
    gate = b.op("HardSigmoid", first, alpha=0.25, beta=0.4, out="gate")
    act = b.op("Mul", first, gate, out="act")
    proto = b.model(b.conv(act, 3, 1, out="y"))
    plan = {"add_activations": [{"tensor": "y", "activation": {"like": "act"}}]}
    inserted = reference(proto, **plan)
    feeds = wide_inputs(proto)
    plain = run(proto, feeds)[0].astype(np.float64)
    close(run(inserted, feeds)[0], plain * np.clip(0.25 * plain + 0.4, 0, 1), 1e-6)


def test_like_bounds_that_nodes_make():
    b = ModelBuilder([1, 3, 6, 6])
    bounds = []
    for name, value in (("low", -1.0), ("high", 2.0)):
        tensor = helper.make_tensor("value", onnx.TensorProto.FLOAT, [], [value])
        b.nodes.append(helper.make_node("Constant", [], [name], value=tensor))
        bounds.append(name)
    act = b.op("Clip", b.conv("x", 4, 3, out="first"), *bounds, out="act")
    b._channels[act] = 4
    proto = b.model(b.conv(act, 3, 1, out="y"))
    plan: dict[str, Any] = {
        "remove_activations": ["act"],
        "add_activations": [{"tensor": "y", "activation": {"like": "act"}}],
    }
    (value,) = run(reference(proto, **plan), wide_inputs(proto))
    assert (value.min(), value.max()) == (-1, 2)


def test_like_parameters_for_other_channels_are_refused():
    with pytest.raises(PlanError) as caught:
        build(
            with_prelu(channels=5),
            add_activations=[{"tensor": "second", "activation": {"like": "act"}}],
        )
    (problem,) = caught.value.problems
    assert problem.path == "add_activations[0].activation.like"
    assert problem.what == "the parameters of 'act' are for 4 channels, and 'second' has 5"

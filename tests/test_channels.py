"""Inner channels: which there are, why others are not, and what is left when some go."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from builders import ModelBuilder, nonzero, random_input, run
from hypothesis import given, settings
from hypothesis import strategies as st

from graphfold.calibration.capture import choose_places, patches, window_of
from graphfold.calibration.channels import (
    NotInnerError,
    bias_vector,
    cut_channels,
    find_inner,
    inner_of,
    weight_matrix,
)
from graphfold.graph import Graph
from graphfold.model import load, to_proto


def cut(proto: onnx.ModelProto, kept: list[int], number: int = 0) -> onnx.ModelProto:
    """Remove channels, the consumer's other weights as they are."""
    graph = Graph(load(proto))
    inner = find_inner(graph)[number]
    weight = weight_matrix(graph, inner.consumer)
    columns = weight.shape[1] // inner.channels
    index = (np.array(kept)[:, None] * columns + np.arange(columns)).ravel()
    bias = bias_vector(graph, inner.consumer, len(weight))
    cut_channels(graph, inner, np.array(kept), weight[:, index], bias)
    found = to_proto(graph.model)
    onnx.checker.check_model(found, full_check=True)
    return found


def silence(proto: onnx.ModelProto, gone: list[int], weight: str, taps: int) -> onnx.ModelProto:
    """The same network with the consumer's columns of some channels zero."""
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    for item in copy.graph.initializer:
        if item.name == weight:
            array = onnx.numpy_helper.to_array(item).copy()
            if taps > 1:
                array.reshape(len(array), -1, taps)[:, gone] = 0
            else:
                array[:, gone] = 0
            item.CopyFrom(onnx.numpy_helper.from_array(array, item.name))
    return copy


def check(proto: onnx.ModelProto, gone: list[int], channels: int, taps: int = 1) -> None:
    """Cutting channels is silencing them: nothing else changes."""
    graph = Graph(load(proto))
    (inner,) = (each for each in find_inner(graph) if each.channels == channels)
    number = find_inner(graph).index(inner)
    name = inner.consumer.inputs[1].name
    kept = [each for each in range(channels) if each not in gone]
    found, expected = cut(proto, kept, number), silence(proto, gone, name, taps)
    x = random_input(proto, np.random.default_rng(0))
    for one, two in zip(run(found, x), run(expected, x), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-5)


def residual_block(**options):
    """Expansion, depthwise, projection, with normalisations and a residual Add."""
    net = ModelBuilder((2, 4, 9, 9), **options)
    y = net.op("Clip", net.norm(net.conv("x", 12, 1)), net.constant(0.0), net.constant(6.0))
    y = net.op("HardSwish", net.norm(net.depthwise(y, 3, pad=1)))
    y = net.norm(net.conv(y, 4, 1, out="projected"), out="normed")
    return net.model(net.op("Add", "x", y, out="y"))


def test_channels_of_a_residual_block_can_go():
    proto = residual_block()
    (inner,) = find_inner(Graph(load(proto)))
    assert inner.key == ("x", "normed")
    assert inner.channels == 12
    check(proto, [0, 3, 11], 12)


def test_every_parameter_between_is_cut():
    net = ModelBuilder((2, 3, 8, 8))
    y = net.op("PRelu", net.conv("x", 10, 3, pad=1), net.constant(nonzero(net.rng, 10, 1, 1)))
    y = net.op("Mul", y, net.constant(nonzero(net.rng, 1, 10, 1, 1)))
    y = net.op("Add", net.constant(nonzero(net.rng, 10, 1, 1)), y)
    y = net.op("MaxPool", y, kernel_shape=[2, 2], strides=[2, 2])
    y = net.pad(y, [0, 0, 1, 0], [0, 0, 0, 1])
    proto = net.model(net.conv(y, 5, 3, out="y"))
    check(proto, [1, 4, 9], 10, taps=9)


def test_two_branches_of_one_source_are_cut_together():
    net = ModelBuilder((1, 3, 6, 6))
    gate = net.op("Sigmoid", net.conv("x", 8, 1))
    y = net.op("Mul", net.op("Relu", net.conv("x", 8, 3, pad=1)), gate, channels=8)
    proto = net.model(net.conv(y, 2, 1, out="y"))
    check(proto, [2, 5], 8)


@pytest.mark.parametrize("transposed", [0, 1])
def test_dense_layers(transposed):
    net = ModelBuilder((2, 5))
    shape = (7, 5) if transposed else (5, 7)
    weight = net.constant(nonzero(net.rng, *shape))
    hidden = net.op("Gemm", "x", weight, net.constant(nonzero(net.rng, 7)), transB=transposed)
    shape = (3, 7) if transposed else (7, 3)
    y = net.op(
        "Gemm",
        net.op("Relu", hidden),
        net.constant(nonzero(net.rng, *shape)),
        net.constant(nonzero(net.rng, 3)),
        out="y",
        transB=transposed,
        alpha=0.5,
        beta=2.0,
    )
    proto = net.model(y)
    kept = [0, 2, 3, 6]
    found = cut(proto, kept)
    x = random_input(proto, np.random.default_rng(1))
    arrays = {item.name: onnx.numpy_helper.to_array(item) for item in proto.graph.initializer}
    w1, b1, w2, b2 = arrays.values()
    w1, w2 = (w1.T, w2.T) if transposed else (w1, w2)
    z = np.maximum(x["x"] @ w1 + b1, 0)
    expected = 0.5 * z[:, kept] @ w2[kept] + 2.0 * b2
    np.testing.assert_allclose(run(found, x)[0], expected, rtol=1e-4, atol=1e-5)


def test_matmul_gets_its_bias_behind_it():
    net = ModelBuilder((2, 5))
    hidden = net.op("Tanh", net.op("MatMul", "x", net.constant(nonzero(net.rng, 5, 6))))
    proto = net.model(net.op("MatMul", hidden, net.constant(nonzero(net.rng, 6, 3)), out="y"))
    graph = Graph(load(proto))
    (inner,) = find_inner(graph)
    weight = weight_matrix(graph, inner.consumer)
    kept = np.array([1, 2, 5])
    bias = np.array([1.0, -2.0, 3.0])
    cut_channels(graph, inner, kept, weight[:, kept], bias)
    found = to_proto(graph.model)
    onnx.checker.check_model(found, full_check=True)
    x = random_input(proto, np.random.default_rng(2))
    w1, w2 = (onnx.numpy_helper.to_array(item) for item in proto.graph.initializer)
    expected = np.tanh(x["x"] @ w1)[:, kept] @ w2[kept] + bias
    np.testing.assert_allclose(run(found, x)[0], expected, rtol=1e-4, atol=1e-5)


def test_flattened_channels_own_several_columns():
    net = ModelBuilder((2, 3, 4, 4))
    y = net.op("Flatten", net.op("Relu", net.conv("x", 6, 1, pad=0)))
    y = net.op("Gemm", y, net.constant(nonzero(net.rng, 96, 5)), out="y", channels=5)
    proto = net.model(y)
    (inner,) = find_inner(Graph(load(proto)))
    assert (inner.channels, inner.columns) == (6, 16)
    kept = [0, 2, 5]
    found = cut(proto, kept)
    x = random_input(proto, np.random.default_rng(3))
    silent = onnx.ModelProto()
    silent.CopyFrom(proto)
    item = silent.graph.initializer[-1]
    array = onnx.numpy_helper.to_array(item).copy().reshape(6, 16, 5)
    array[[1, 3, 4]] = 0
    item.CopyFrom(onnx.numpy_helper.from_array(array.reshape(96, 5), item.name))
    np.testing.assert_allclose(run(found, x)[0], run(silent, x)[0], rtol=1e-4, atol=1e-5)


def refused(build) -> str:
    net = ModelBuilder((2, 4, 6, 6))
    proto = net.model(*build(net))
    graph = Graph(load(proto))
    consumer = next(node for node in graph.ir if node.outputs[0].name == "y")
    with pytest.raises(NotInnerError) as error:
        inner_of(graph, consumer)
    return str(error.value)


def read_elsewhere(net):
    z = net.conv("x", 6)
    return net.conv(net.op("Relu", z), 2, out="y"), net.op("Relu", z, out="other")


def read_twice(net):
    z = net.op("Relu", net.conv("x", 6))
    return net.conv(z, 2, out="y"), net.conv(z, 2, out="other")


def grouped(net):
    z = net.conv("x", 8, groups=2)
    return (net.conv(z, 2, out="y"),)


def grouped_consumer(net):
    z = net.conv("x", 8)
    return (net.conv(z, 2, groups=2, out="y"),)


def mixed(net):
    z = net.op("Softmax", net.conv("x", 8), axis=1)
    return (net.conv(z, 2, out="y"),)


def from_the_input(net):
    return (net.conv(net.op("Relu", "x"), 2, out="y"),)


def different_sources(net):
    z = net.op("Add", net.conv("x", 6), net.conv(net.op("Relu", "x"), 6))
    return (net.conv(z, 2, out="y"),)


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (read_elsewhere, "is read elsewhere"),
        (read_twice, "is read elsewhere"),
        (grouped, "is a grouped convolution"),
        (grouped_consumer, "no convolution of one group"),
        (mixed, "may mix channels"),
        (from_the_input, "part of the model's interface"),
        (different_sources, "made from different tensors"),
    ],
)
def test_what_cannot_go_by_itself(build, reason):
    assert reason in refused(build)


@given(
    rank=st.integers(1, 3),
    kernel=st.integers(1, 3),
    stride=st.integers(1, 2),
    dilation=st.integers(1, 2),
    begin=st.integers(0, 2),
    end=st.integers(0, 2),
    seed=st.integers(0, 99),
)
@settings(max_examples=40, deadline=None)
def test_patches_times_weights_are_the_convolution(
    rank, kernel, stride, dilation, begin, end, seed
):
    sizes = [7, 6, 5][:rank]
    net = ModelBuilder((2, 3, *sizes), seed=seed)
    y = net.conv(
        "x",
        4,
        kernel,
        stride=stride,
        dilation=dilation,
        pad=[begin] * rank + [end] * rank,
        out="y",
    )
    proto = net.model(y)
    graph = Graph(load(proto))
    (node,) = (each for each in graph.ir if each.op_type == "Conv")
    feed = random_input(proto, np.random.default_rng(seed))
    expected = run(proto, feed)[0]
    window = window_of(graph, node, sizes)
    places = choose_places(2, expected.shape[2:], 10, first=seed)
    rows = patches(feed["x"], window, places)
    weight = weight_matrix(graph, node)
    found = rows @ weight.T + bias_vector(graph, node, 4)
    index = (places[:, 0], slice(None), *places[:, 1:].T)
    np.testing.assert_allclose(found, expected[index], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", ["SAME_UPPER", "SAME_LOWER", "VALID"])
def test_patches_know_automatic_padding(mode):
    net = ModelBuilder((1, 2, 7, 6))
    proto = net.model(net.conv("x", 3, 4, stride=2, auto_pad=mode, out="y"))
    graph = Graph(load(proto))
    (node,) = (each for each in graph.ir if each.op_type == "Conv")
    feed = random_input(proto, np.random.default_rng(0))
    expected = run(proto, feed)[0]
    places = choose_places(1, expected.shape[2:], 99, first=0)
    rows = patches(feed["x"], window_of(graph, node, (7, 6)), places)
    found = rows @ weight_matrix(graph, node).T + bias_vector(graph, node, 3)
    index = (places[:, 0], slice(None), *places[:, 1:].T)
    np.testing.assert_allclose(found, expected[index], rtol=1e-4, atol=1e-5)

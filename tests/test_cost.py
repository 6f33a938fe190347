"""Costs against numbers counted by hand, and against published ones."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import small_models as small
from onnx import TensorProto, helper

from graphfold.cost import analyze
from graphfold.graph import Graph
from graphfold.model import load
from graphfold.segments import blocks


def cost(model: onnx.ModelProto, **options):
    return analyze(Graph(load(model)), **options)


def conv(shape: tuple[int, ...], *, size=8, channels=3, batch="N", **attributes):
    nodes = [helper.make_node("Conv", ["x", "w"], ["y"], **attributes)]
    return small.build(
        nodes, {"x": [batch, channels, size, size]}, ["y"], {"w": small.weight(*shape)}
    )


@pytest.mark.parametrize(
    ("shape", "attributes", "macs"),
    [
        ((4, 3, 3, 3), {"pads": [1, 1, 1, 1]}, 8 * 8 * 4 * 3 * 9),
        ((4, 3, 3, 3), {}, 6 * 6 * 4 * 3 * 9),
        ((4, 3, 3, 3), {"pads": [1, 1, 1, 1], "strides": [2, 2]}, 4 * 4 * 4 * 3 * 9),
        ((4, 3, 3, 3), {"dilations": [2, 2]}, 4 * 4 * 4 * 3 * 9),
        ((6, 1, 3, 3), {"group": 3, "pads": [1, 1, 1, 1]}, 8 * 8 * 6 * 9),
    ],
)
def test_macs_of_convolutions(shape, attributes, macs):
    found = cost(conv(shape, **attributes))
    assert found.macs == macs
    assert found.macs_fvcore == macs
    assert found.params == np.prod(shape)


def test_macs_of_transposed_convolutions_are_counted_at_the_input():
    nodes = [helper.make_node("ConvTranspose", ["x", "w"], ["y"], strides=[2, 2])]
    model = small.build(nodes, {"x": [1, 3, 5, 5]}, ["y"], {"w": small.weight(3, 4, 2, 2)})
    assert cost(model).macs == 5 * 5 * 3 * 4 * 2 * 2


@pytest.mark.parametrize("transposed", [0, 1])
def test_macs_of_gemm(transposed):
    shape = (5, 7) if transposed else (7, 5)
    nodes = [helper.make_node("Gemm", ["x", "w"], ["y"], transB=transposed)]
    model = small.build(nodes, {"x": ["N", 7]}, ["y"], {"w": small.weight(*shape)})
    assert cost(model).macs == 35


def test_macs_of_matmul_between_activations():
    nodes = [helper.make_node("MatMul", ["q", "k"], ["y"])]
    model = small.build(nodes, {"q": ["N", 4, 6], "k": ["N", 6, 9]}, ["y"])
    assert cost(model).macs == 4 * 6 * 9


def test_the_second_convention_adds_normalisation_and_global_pooling():
    found = cost(small.conv_bn_relu())
    conv_macs, fc = 8 * 8 * 4 * 3 * 9, 4 * 5
    assert found.macs == conv_macs + fc
    assert found.macs_fvcore == conv_macs + fc + 5 * 8 * 8 * 4 + 8 * 8 * 4


def test_a_folded_convolution_counts_as_normalised_where_told():
    model = conv((4, 3, 3, 3))
    extra = 5 * 6 * 6 * 4
    assert cost(model, normalized={"y"}).macs_fvcore == cost(model).macs + extra
    assert cost(model, normalized=lambda name: name == "y").macs_fvcore == cost(model).macs + extra


@pytest.mark.parametrize(
    ("axes", "counted"), [([2, 3], True), ([-1, -2], True), ([1], False), ([1, 2], True)]
)
def test_reduce_mean_over_space_is_a_global_pool(axes, counted):
    nodes = [helper.make_node("ReduceMean", ["x"], ["y"], axes=axes)]
    model = small.build(nodes, {"x": ["N", 3, 4, 4]}, ["y"])
    assert cost(model).macs_fvcore == (48 if counted else 0)


def test_reduce_mean_axes_may_be_an_input():
    nodes = [helper.make_node("ReduceMean", ["x", "axes"], ["y"])]
    constants = {"axes": np.array([2, 3])}
    model = small.build(nodes, {"x": ["N", 3, 4, 4]}, ["y"], constants, opset=18)
    assert cost(model).macs_fvcore == 48
    assert cost(model).params == 0


@pytest.mark.parametrize("batch", ["N", 1, 4])
def test_the_batch_counts_as_one(batch):
    found = cost(small.conv_bn_relu(batch=batch))
    assert found.macs == 8 * 8 * 4 * 3 * 9 + 20
    assert found.peak_bytes == 4 * 2 * 8 * 8 * 4


def test_a_shared_weight_counts_once_in_the_total():
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["z"]),
        helper.make_node("Conv", ["z", "w"], ["y"]),
    ]
    model = small.build(nodes, {"x": ["N", 3, 8, 8]}, ["y"], {"w": small.weight(3, 3, 1, 1)})
    found = cost(model)
    assert [node.params for node in found.nodes] == [9, 9]
    assert found.params == 9
    assert found.weight_bytes == 36


def test_constants_in_nodes_are_weights_too_and_shapes_are_not():
    tensor = onnx.numpy_helper.from_array(small.weight(4, 3, 1, 1))
    nodes = [
        helper.make_node("Constant", [], ["w"], value=tensor),
        helper.make_node("Conv", ["x", "w"], ["z"]),
        helper.make_node("Reshape", ["z", "shape"], ["y"]),
    ]
    constants = {"shape": np.array([1, -1])}
    found = cost(small.build(nodes, {"x": [1, 3, 8, 8]}, ["y"], constants))
    assert found.params == 12
    assert found.weight_bytes == 48 + 16


def test_weight_bytes_follow_the_type():
    nodes = [helper.make_node("Conv", ["x", "w"], ["y"])]
    model = small.build(
        nodes,
        {"x": [1, 3, 8, 8]},
        {"y": TensorProto.FLOAT16},
        {"w": small.weight(4, 3, 1, 1).astype(np.float16)},
        types={"x": TensorProto.FLOAT16},
    )
    found = cost(model)
    assert found.weight_bytes == 24


def test_traffic_is_what_is_read_and_written():
    found = cost(conv((4, 3, 1, 1)))
    assert found.traffic_bytes == 4 * (3 * 64 + 4 * 64 + 12)


def test_peak_memory_of_a_residual_branch_holds_the_shortcut():
    nodes = [
        helper.make_node("Conv", ["x", "up"], ["a"]),
        helper.make_node("Conv", ["a", "down"], ["b"]),
        helper.make_node("Add", ["x", "b"], ["y"]),
    ]
    constants = {"up": small.weight(12, 2, 1, 1), "down": small.weight(2, 12, 1, 1)}
    model = small.build(nodes, {"x": ["N", 2, 4, 4]}, ["y"], constants)
    # While `down` runs: x (2 channels), a (12) and b (2), 16 pixels of 4 bytes each.
    assert cost(model).peak_bytes == (2 + 12 + 2) * 16 * 4


def test_memory_of_a_tensor_is_free_after_its_last_reader():
    nodes = [helper.make_node("Relu", [f"t{i}"], [f"t{i + 1}"]) for i in range(6)]
    model = small.build(nodes, {"t0": ["N", 2, 4, 4]}, ["t6"])
    assert cost(model).peak_bytes == 2 * 2 * 16 * 4


def test_reshaping_takes_no_memory():
    nodes = [
        helper.make_node("Flatten", ["x"], ["f"]),
        helper.make_node("Flatten", ["f"], ["y"]),
    ]
    model = small.build(nodes, {"x": ["N", 2, 4, 4]}, ["y"])
    assert cost(model).peak_bytes == 2 * 16 * 4


def test_unknown_sizes_give_no_figure_but_a_reason():
    nodes = [helper.make_node("Conv", ["x", "w"], ["y"])]
    model = small.build(nodes, {"x": ["N", 3, "H", "W"]}, ["y"], {"w": small.weight(4, 3, 1, 1)})
    found = cost(model)
    assert found.macs is None
    assert found.peak_bytes is None
    assert found.params == 12
    assert any("'x'" in reason for reason in found.unknown)


@pytest.mark.parametrize("name", ["", "x"])
def test_given_sizes_make_them_known(name):
    nodes = [helper.make_node("Conv", ["x", "w"], ["y"])]
    model = small.build(nodes, {"x": ["N", 3, "H", "W"]}, ["y"], {"w": small.weight(4, 3, 1, 1)})
    found = cost(model, input_shapes={name: (1, 3, 10, 20)})
    assert found.macs == 10 * 20 * 12
    assert found.unknown == ()


def test_sizes_that_onnx_cannot_infer_are_taken_from_a_run():
    nodes = [
        helper.make_node("Shape", ["x"], ["s"]),
        helper.make_node("Gather", ["s", "zero"], ["n"]),
        helper.make_node("Unsqueeze", ["n", "axis"], ["n1"]),
        helper.make_node("Concat", ["n1", "minus"], ["target"], axis=0),
        helper.make_node("Abs", ["target"], ["positive"]),
        helper.make_node("Mul", ["positive", "sign"], ["shape"]),
        helper.make_node("Reshape", ["x", "shape"], ["flat"]),
        helper.make_node("MatMul", ["flat", "w"], ["y"]),
    ]
    constants = {
        "zero": np.array(0),
        "axis": np.array([0]),
        "minus": np.array([-1]),
        "sign": np.array([1, -1]),
        "w": small.weight(12, 5),
    }
    model = small.build(nodes, {"x": ["N", 3, 2, 2]}, ["y"], constants)
    assert cost(model).macs == 60


def test_subgraphs_are_named_as_not_counted():
    branch = helper.make_graph(
        [helper.make_node("Relu", ["x"], ["z"])],
        "branch",
        [],
        [helper.make_tensor_value_info("z", TensorProto.FLOAT, None)],
    )
    nodes = [helper.make_node("If", ["c"], ["y"], then_branch=branch, else_branch=branch)]
    model = small.build(
        nodes, {"x": [1, 3], "c": []}, {"y": TensorProto.FLOAT}, types={"c": TensorProto.BOOL}
    )
    found = cost(model)
    assert found.macs is None
    assert any("subgraph" in reason for reason in found.unknown)


def test_blocks_sum_to_the_whole():
    graph = Graph(load(small.conv_bn_relu()))
    whole = analyze(graph)
    groups = [[node.outputs[0].name for node in block.nodes] for block in blocks(graph)]
    parts = whole.subtotals(groups)
    assert sum(part.macs for part in parts) == whole.macs
    assert sum(part.params for part in parts) == whole.params
    assert max(part.peak_bytes for part in parts) == whole.peak_bytes
    assert whole.subtotal(groups[0]) == parts[0]


def test_counting_is_linear_in_graph_size():
    import time

    def seconds(length: int) -> float:
        nodes = [helper.make_node("Relu", [f"t{i}"], [f"t{i + 1}"]) for i in range(length)]
        graph = Graph(load(small.build(nodes, {"t0": [1, 2, 4, 4]}, [f"t{length}"])))
        begin = time.perf_counter()
        analyze(graph)
        return time.perf_counter() - begin

    seconds(100)
    assert seconds(4000) < 40 * max(seconds(400), 1e-3)


@pytest.mark.needs_shared
def test_mobilenet_v2_has_its_published_cost(shared):
    found = analyze(Graph(load(shared / "models" / "mobilenetv2_tv_bn.onnx")))
    assert round(found.macs / 1e6, 2) == 300.77
    assert round(found.macs_fvcore / 1e6, 2) == 334.23
    # The published number, running means and variances of 52 normalisations, 35 ReLU6 bounds.
    assert found.params == 3_504_872 + 2 * 17_056 + 2 * 35
    assert found.unknown == ()


@pytest.mark.needs_shared
@pytest.mark.parametrize(
    ("name", "fvcore"), [("efficientnet_lite0_bn.onnx", 418.94), ("cifar10_resnet20_bn.onnx", 41.5)]
)
def test_other_networks_have_theirs(shared, name, fvcore):
    found = analyze(Graph(load(shared / "models" / name)))
    assert found.macs_fvcore / 1e6 == pytest.approx(fvcore, abs=0.01)

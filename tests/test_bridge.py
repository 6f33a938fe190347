"""ONNX graphs as torch modules: parameters, parts of graphs, gradients, and the way back."""

from __future__ import annotations

import copy
import subprocess
import sys

import numpy as np
import onnx
import pytest
from builders import ModelBuilder, nonzero, random_input, run
from onnx import TensorProto, helper, numpy_helper

torch = pytest.importorskip("torch")

from graphfold.calibration.bridge import BridgeError, bridge  # noqa: E402 - needs torch
from graphfold.errors import DataError, UsageError  # noqa: E402
from graphfold.model import compare_interfaces, load, save, to_proto  # noqa: E402


def feeds_of(arrays, dtype=None):
    return {name: torch.from_numpy(array).to(dtype) for name, array in arrays.items()}


def scale_of(array):
    # A probability's scale is one, also where it is nearly zero: onnxruntime's own sigmoid
    # differs by 5e-8 with its optimizations on and off.
    return max(1.0, float(np.abs(array).max()))


def assert_like_onnxruntime(module, proto, arrays):
    expected = run(proto, arrays)
    with torch.no_grad():
        got = module(feeds_of(arrays))
    for info, want in zip(proto.graph.output, expected, strict=True):
        have = got[info.name].numpy()
        assert have.shape == want.shape
        assert np.abs(have - want).max() <= 1e-5 * scale_of(want)


def block(opset=17):
    """A convolution with BN and a branch, whose bias also serves elsewhere."""
    build = ModelBuilder([2, 3, 6, 5], opset=opset)
    shared = build.constant(nonzero(build.rng, 4), "shared.bias")
    weight = build.constant(nonzero(build.rng, 4, 3, 3, 3), "features.0.weight")
    build.op("Conv", "x", weight, shared, out="conv", channels=4, pads=[1] * 4)
    build.norm("conv", out="norm")
    low, high = build.constant(0.0, "low"), build.constant(6.0, "high")
    build.op("Clip", "norm", low, high, out="active")
    build.op("GlobalAveragePool", "active", out="mean")
    build.op("Flatten", "mean", out="flat")
    build.op("Add", "flat", shared, out="moved")
    build.op("Mul", "moved", build.constant(0.5, "half"), out="y")
    return build.model("y")


def test_parameters_are_the_tensors_of_the_file():
    module = bridge(load(block()))
    assert module.input_names == ("x",)
    assert module.output_names == ("y",)
    names = {"shared.bias", "features.0.weight", "gamma_1", "beta_2"}
    assert module.weights.keys() == names
    assert {id(item) for item in module.parameters()} == {
        id(item) for item in module.weights.values()
    }
    # Statistics and the factor of the formula are not trained, and bounds are plain numbers.
    assert module.fixed.keys() == {"mean_3", "variance_4", "half"}


def test_a_shared_tensor_gets_the_gradient_of_all_its_readers():
    module = bridge(load(block())).double()
    x = torch.randn(2, 3, 6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    bias = module.weights["shared.bias"]
    (gradient,) = torch.autograd.grad(module(x)["y"].sum(), bias)
    step = 1e-6
    for channel in range(4):
        found = []
        for sign in (1, -1):
            with torch.no_grad():
                bias[channel] += sign * step
                found.append(module(x)["y"].sum().item())
                bias[channel] -= sign * step
        assert gradient[channel].item() == pytest.approx((found[0] - found[1]) / (2 * step), 1e-6)


def test_equal_statistics_and_biases_stored_once_are_not_trained():
    build = ModelBuilder([1, 4, 3, 3])
    zeros = build.constant(np.zeros(4), "zeros")
    scale, variance = build.constant(nonzero(build.rng, 4)), build.constant(np.ones(4))
    build.op("BatchNormalization", "x", scale, zeros, zeros, variance, out="y")
    module = bridge(load(build.model("y")))
    assert "zeros" in module.fixed


def test_constant_nodes_are_weights_too():
    build = ModelBuilder([1, 2, 4, 4])
    weight = numpy_helper.from_array(nonzero(build.rng, 2, 2, 1, 1).astype(np.float32))
    build.op("Constant", out="w", value=weight)
    build.op("Constant", out="b", value_floats=[0.5, -0.5])
    build.op("Conv", "x", "w", "b", out="y", channels=2)
    model = load(build.model("y"))
    module = bridge(model)
    assert module.weights.keys() == {"w", "b"}
    with torch.no_grad():
        for item in module.weights.values():
            item *= 2
    trained = module.to_model()
    x = random_input(to_proto(model))
    (before,), (after,) = run(to_proto(model), x), run(to_proto(trained), x)
    np.testing.assert_allclose(after, 2 * before, rtol=1e-5)
    assert [node.op_type for node in to_proto(trained).graph.node] == ["Constant"] * 2 + ["Conv"]


def test_what_was_not_trained_is_the_file_that_came_in(tmp_path):
    model = load(block())
    save(model, tmp_path / "before.onnx")
    save(bridge(model).to_model(), tmp_path / "after.onnx")
    assert (tmp_path / "before.onnx").read_bytes() == (tmp_path / "after.onnx").read_bytes()


def test_trained_values_come_back_in_the_same_graph():
    model = load(block())
    before = to_proto(model)
    module = bridge(model)
    x = random_input(before)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = (module(feeds_of(x))["y"] - 1).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    trained = module.to_model()
    assert compare_interfaces(model, trained) == []
    after = to_proto(trained)
    assert list(after.graph.node) == list(before.graph.node)
    assert [item.name for item in after.graph.initializer] == [
        item.name for item in before.graph.initializer
    ]
    assert_like_onnxruntime(module, after, x)
    # The model itself was not touched, and later steps do not reach what was taken out.
    assert to_proto(model) == before
    with torch.no_grad():
        module.weights["features.0.weight"].zero_()
    assert to_proto(trained) == after


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_precision_of_training_does_not_change_the_types_of_the_file(dtype):
    model = load(block())
    module = bridge(model).to(dtype)
    with torch.no_grad():
        module.weights["shared.bias"] += 1
    stored = {item.name: item.data_type for item in to_proto(module.to_model()).graph.initializer}
    assert set(stored.values()) == {TensorProto.FLOAT}


def test_a_part_between_inner_tensors():
    model = load(block())
    whole = bridge(model, outputs=["conv", "active", "y"])
    x = feeds_of(random_input(to_proto(model)))
    features = whole(x)
    assert list(features) == ["conv", "active", "y"]
    part = bridge(model, inputs=["conv"], outputs=["active"])
    assert part.weights.keys() == {"gamma_1", "beta_2"}
    torch.testing.assert_close(part(features["conv"])["active"], features["active"])
    rest = bridge(model, inputs=["active"])
    torch.testing.assert_close(rest({"active": features["active"]})["y"], features["y"])
    with torch.no_grad():
        part.weights["beta_2"] += 1
    changed = {
        item.name
        for item, other in zip(
            to_proto(part.to_model()).graph.initializer,
            to_proto(model).graph.initializer,
            strict=True,
        )
        if item != other
    }
    assert changed == {"beta_2"}


def test_a_second_output_that_nothing_reads_can_be_asked_for():
    build = ModelBuilder([2, 4])
    scale = build.constant(nonzero(build.rng, 4))
    build.op("LayerNormalization", "x", scale, outputs=["y", "mean"])
    module = bridge(load(build.model("y")), outputs=["mean"])
    x = torch.randn(2, 4)
    torch.testing.assert_close(module(x)["mean"], x.mean(1, keepdim=True))


def test_what_is_fed_stays_as_fed():
    build = ModelBuilder([2, 4])
    build.op("Split", "x", outputs=["a", "b"], axis=1)
    build.op("Sub", "a", "b", out="y")
    module = bridge(load(build.model("y")), inputs=["x", "a"])
    x, a = torch.randn(2, 4), torch.randn(2, 2)
    torch.testing.assert_close(module(x, a)["y"], a - x[:, 2:])


def test_wrong_names():
    model = load(block())
    with pytest.raises(UsageError, match="no such tensor in the graph: nowhere"):
        bridge(model, outputs=["nowhere"])
    with pytest.raises(UsageError, match=r"active cannot be computed from flat alone: x is read"):
        bridge(model, inputs=["flat"], outputs=["active"])
    module = bridge(model)
    with pytest.raises(DataError, match="missing: x; unknown: image"):
        module({"image": torch.zeros(2, 3, 6, 5)})
    with pytest.raises(DataError, match="2 inputs given where tensors for x are wanted"):
        module(torch.zeros(1), torch.zeros(1))


def test_an_initializer_that_is_an_input_may_be_fed():
    build = ModelBuilder([2, 3])
    factor = build.constant(nonzero(build.rng, 3), "factor")
    build.op("Mul", "x", factor, out="y")
    info = helper.make_tensor_value_info("factor", TensorProto.FLOAT, [3])
    module = bridge(load(build.model("y", more_inputs=[info])))
    assert module.input_names == ("x",)
    x = torch.randn(2, 3)
    torch.testing.assert_close(module(x)["y"], x * module.weights["factor"])
    torch.testing.assert_close(module({"x": x, "factor": torch.ones(3)})["y"], x)


def test_everything_unsupported_is_listed_at_once():
    build = ModelBuilder([2, 3])
    scale, zero = build.constant(0.1), build.constant(0, dtype=np.uint8)
    for index in range(2):
        build.op("QuantizeLinear", "x", scale, zero, out=f"q{index}")
        build.op("DequantizeLinear", f"q{index}", scale, zero, out=f"d{index}")
    build.nodes.append(helper.make_node("Fancy", ["d0"], ["f"], name="own", domain="my.domain"))
    body = helper.make_graph(
        [helper.make_node("Identity", ["f"], ["inner"])],
        "body",
        [],
        [helper.make_tensor_value_info("inner", TensorProto.FLOAT, [2, 3])],
    )
    condition = build.constant(True, dtype=bool)
    build.op("If", condition, out="chosen", then_branch=body, else_branch=body)
    build.op("Add", "chosen", "d1", out="y")
    infos = [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, 3])]
    graph = helper.make_graph(build.nodes, "test", build.inputs, infos, build.initializers)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("my.domain", 1)]
    model = load(helper.make_model(graph, opset_imports=opsets, ir_version=8))
    with pytest.raises(BridgeError) as caught:
        bridge(model)
    text = str(caught.value)
    assert "If: not supported: n_chosen" in text
    assert "DequantizeLinear: not supported: n_d1" in text
    # What only the If's bodies read is not looked into, but can be asked for by itself.
    with pytest.raises(BridgeError, match=r"my\.domain\.Fancy: not supported: own"):
        bridge(model, outputs=["f"])
    assert bridge(model, inputs=["chosen", "d1"]).output_names == ("y",)


def test_types_that_torch_does_not_have_here_are_refused():
    build = ModelBuilder([2, 3])
    value = helper.make_tensor("value", TensorProto.BFLOAT16, [1], [1.0])
    build.op("ConstantOfShape", build.op("Shape", "x"), out="filled", value=value)
    weight = helper.make_tensor("weight", TensorProto.UINT16, [3], [1, 2, 3])
    build.initializers.append(weight)
    build.op("Cast", "weight", out="cast", to=TensorProto.FLOAT)
    build.op("Add", "x", "cast", out="y")
    model = load(build.model("y"))
    with pytest.raises(BridgeError, match="weight: element type uint16"):
        bridge(model)
    with pytest.raises(BridgeError, match="ConstantOfShape: element type bfloat16"):
        bridge(model, outputs=["filled"])


def test_old_opsets_are_refused():
    build = ModelBuilder([2, 3], opset=6)
    build.op("Relu", "x", out="y")
    with pytest.raises(BridgeError, match="opset: 6 is older than 7"):
        bridge(load(build.model("y")))


def test_running_statistics():
    model = load(block())
    x = feeds_of(random_input(to_proto(model)))
    still = bridge(model).train()
    before = {name: item.clone() for name, item in still.fixed.items()}
    still(x)
    assert all(torch.equal(item, before[name]) for name, item in still.fixed.items())
    moving = bridge(model, update_statistics=True)
    torch.testing.assert_close(moving.eval()(x)["y"], still(x)["y"])
    conv = bridge(model, outputs=["conv"])(x)["conv"]
    moving.train()(x)
    wanted = 0.9 * before["mean_3"] + 0.1 * conv.mean((0, 2, 3))
    torch.testing.assert_close(moving.fixed["mean_3"], wanted)
    stored = {item.name: item for item in to_proto(moving.to_model()).graph.initializer}
    torch.testing.assert_close(
        torch.from_numpy(numpy_helper.to_array(stored["mean_3"]).copy()), wanted
    )


def test_copies_are_independent_and_states_can_be_loaded():
    module = bridge(load(block()))
    x = torch.randn(2, 3, 6, 5)
    other = copy.deepcopy(module)
    with torch.no_grad():
        other.weights["shared.bias"] += 1
    assert not torch.equal(module.weights["shared.bias"], other.weights["shared.bias"])
    module.load_state_dict(other.state_dict())
    torch.testing.assert_close(module(x), other(x))


@pytest.mark.parametrize(
    "options",
    [
        {"op": "Conv", "pads": [0, 2, 1, 0], "strides": [2, 1]},
        {"op": "ConvTranspose", "pads": [0, 1, 1, 0], "strides": [2, 2]},
        {"op": "BatchNormalization"},
        {"op": "Resize"},
        {"op": "AveragePool"},
    ],
    ids=lambda options: options["op"],
)
def test_gradients(options):
    options = dict(options)
    op_type = options.pop("op")
    build = ModelBuilder([2, 2, 4, 3], dtype=np.float64)
    if op_type == "BatchNormalization":
        build._channels["x"] = 2
        y = build.norm("x")
    elif op_type == "Resize":
        scales = build.constant([1, 1, 1.7, 0.6], dtype=np.float32)
        y = build.op("Resize", "x", "", scales, mode="cubic")
    elif op_type == "AveragePool":
        pads = [1, 0, 1, 1]
        y = build.op("AveragePool", "x", kernel_shape=[2, 2], pads=pads, ceil_mode=1)
    else:
        weight = build.constant(nonzero(build.rng, 2, 2, 3, 2))
        y = build.op(op_type, "x", weight, build.constant(nonzero(build.rng, 2)), **options)
    module = bridge(load(build.model(y)))
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(2, 2, 4, 3, dtype=torch.float64, generator=generator, requires_grad=True)
    weights = module.weights
    names = list(weights)

    def function(x, *values):
        return torch.func.functional_call(
            module, {module._weight_keys[n]: v for n, v in zip(names, values, strict=True)}, x
        )[y]

    values = [weights[name].detach().requires_grad_() for name in names]
    assert torch.autograd.gradcheck(function, (x, *values))


def test_torch_is_imported_only_by_what_needs_it():
    code = (
        "import sys, graphfold, graphfold.cli, graphfold.calibration.planning;"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_without_torch_the_message_says_what_to_install():
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from graphfold.errors import UsageError\n"
        "try:\n    import graphfold.calibration.bridge\n"
        "except UsageError as error:\n    print(error)\n"
    )
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert "torch is not installed" in found.stdout
    assert "graphfold[torch]" in found.stdout


# --- real networks ----------------------------------------------------------------------------

QUANTIZED = {"mlperftiny_kws_dscnn", "mlperftiny_resnet8_int8"}
NETWORKS = {
    "blazeface-back": [1, 256, 256, 3],
    "ch_ppocr_mobile_v2.0_cls_infer": [2, 3, 48, 192],
    "cifar10_resnet20_bn": [2, 3, 32, 32],
    "cifar10_resnet56_bn": [2, 3, 32, 32],
    "efficientnet_lite0_bn": [2, 3, 224, 224],
    "emotion": [2, 64, 64, 1],
    "esrgan_slim_x2": [2, 24, 20, 3],
    "facemesh": [2, 192, 192, 3],
    "fer_mini_xception": [2, 64, 64, 1],
    "mlperftiny_resnet8_cifar10": [2, 32, 32, 3],
    "mlperftiny_vww_mobilenetv1_025": [2, 3, 96, 96],
    "mobilenetv2_tv_bn": [2, 3, 224, 224],
    "mtcnn_onet": [2, 3, 48, 48],
    "mtcnn_pnet": [2, 3, 31, 26],
    "realesr_animevideov3_x2": [1, 3, 24, 20],
    "ultraface_version-RFB-320": [1, 3, 240, 320],
}


@pytest.mark.needs_shared
def test_every_network_is_compared(shared):
    found = {path.stem for path in (shared / "models").glob("*.onnx")}
    assert found == NETWORKS.keys() | QUANTIZED


@pytest.mark.needs_shared
@pytest.mark.parametrize("name", sorted(NETWORKS))
def test_networks_like_onnxruntime(shared, name):
    path = shared / "models" / f"{name}.onnx"
    proto = onnx.load(path)
    module = bridge(load(path))
    initialized = {item.name for item in proto.graph.initializer}
    (entry,) = [info.name for info in proto.graph.input if info.name not in initialized]
    image = np.random.default_rng(0).uniform(0, 1, NETWORKS[name]).astype(np.float32)
    assert_like_onnxruntime(module, proto, {entry: image})
    assert to_proto(module.to_model()).graph.initializer == proto.graph.initializer


@pytest.mark.needs_shared
@pytest.mark.parametrize("name", sorted(QUANTIZED))
def test_quantized_networks_are_refused(shared, name):
    with pytest.raises(BridgeError, match="DequantizeLinear: not supported: "):
        bridge(load(shared / "models" / f"{name}.onnx"))

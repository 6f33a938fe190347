"""The example networks are what they claim to be, and export cleanly either way."""

import json
import math
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import shape_inference

pytest.importorskip("torch")

EXAMPLES = Path(__file__).parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))  # they import each other as scripts do

import export  # noqa: E402
import plans  # noqa: E402
import torch  # noqa: E402
from efficientnet_lite import efficientnet_lite  # noqa: E402
from layers import make_divisible, same_pads  # noqa: E402
from mobilenet_v2 import mobilenet_v2  # noqa: E402
from weights import smooth_images  # noqa: E402
from zoo import exported, network  # noqa: E402

SHARED = EXAMPLES.parents[1] / "shared"


def operators(model: onnx.ModelProto) -> Counter[str]:
    return Counter(node.op_type for node in model.graph.node)


def session(model: onnx.ModelProto) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 2
    return ort.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])


def images(count: int, height: int, width: int | None = None) -> torch.Tensor:
    generator = torch.Generator().manual_seed(7)
    square = smooth_images(count, max(height, width or height), generator)
    return square[:, :, :height, : width or height].contiguous()


def assert_same(model: onnx.ModelProto, module: torch.nn.Module, x: torch.Tensor) -> None:
    """onnxruntime's logits are torch's, within 1e-5 of the largest."""
    with torch.no_grad():
        expected = module(x).numpy()
    (actual,) = session(model).run(None, {export.INPUT: x.numpy()})
    assert actual.shape == expected.shape
    assert np.abs(actual - expected).max() <= 1e-5 * np.abs(expected).max()


def independent_macs(model: onnx.ModelProto, size: int) -> int:
    """Output values times filter size for convolutions, weights for the linear layer."""
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
    inferred = shape_inference.infer_shapes(model, strict_mode=True).graph
    weights = {tensor.name: tensor.dims for tensor in model.graph.initializer}
    dims = {
        info.name: [d.dim_value for d in info.type.tensor_type.shape.dim]
        for info in inferred.value_info
    }
    assert [d.dim_value for d in inferred.input[0].type.tensor_type.shape.dim][2:] == [size, size]
    total = 0
    for node in inferred.node:
        if node.op_type == "Conv":
            total += math.prod(dims[node.output[0]]) * math.prod(weights[node.input[1]][1:])
        elif node.op_type == "Gemm":
            total += math.prod(weights[node.input[1]])
    return total


# --- The architectures ---------------------------------------------------------------------------


def test_channels_are_rounded_to_eights_and_never_lose_a_tenth():
    scaled = [make_divisible(c * 1.4) for c in (32, 16, 24, 32, 64, 96, 160, 320, 1280)]
    assert scaled == [48, 24, 32, 48, 88, 136, 224, 448, 1792]
    assert make_divisible(11) == 16  # 8 would lose more than 10 %


def test_same_pads_put_the_odd_zero_at_the_end():
    assert same_pads(224, 3, 2) == (0, 1)
    assert same_pads(56, 5, 2) == (1, 2)
    assert same_pads(15, 5, 2) == (2, 2)
    assert same_pads(14, 5, 1) == (2, 2)


def test_mobilenet_v2_has_the_published_number_of_parameters():
    assert sum(p.numel() for p in network("mobilenet_v2_1.0").parameters()) == 3_504_872


@pytest.mark.parametrize(
    ("build", "size", "millions"),
    [
        pytest.param(lambda: mobilenet_v2(1.0), 224, 300.77, id="mobilenet_v2_1.0"),
        pytest.param(lambda: mobilenet_v2(1.4), 224, 582.20, id="mobilenet_v2_1.4"),
        pytest.param(lambda: efficientnet_lite(0), 224, 385.19, id="lite0"),
        pytest.param(lambda: efficientnet_lite(1), 240, 600.19, id="lite1"),
        pytest.param(lambda: efficientnet_lite(2), 260, 859.74, id="lite2"),
    ],
)
def test_macs_are_the_published_ones(build, size, millions):
    model = export.export(build(), exporter="torchscript", opset=17, keep_bn=False, size=size)
    assert independent_macs(model, size) / 1e6 == pytest.approx(millions, abs=0.005)
    assert export.macs(model, size) == independent_macs(model, size)


def test_random_weights_are_lived_in():
    module = network("mobilenet_v2_1.0")
    for norm in (m for m in module.modules() if isinstance(m, torch.nn.BatchNorm2d)):
        for values in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
            assert values.std() > 0.01
        assert norm.bias.abs().mean() > 0.1
        assert norm.running_mean.abs().mean() > 0.01


def _activation_shares(module: torch.nn.Module, x: torch.Tensor) -> list[tuple[float, float]]:
    """For each ReLU6, the shares of its input below 0 and above 6; and runs the network."""
    shares: list[tuple[float, float]] = []

    def look(_module, inputs, _output):
        below, above = (inputs[0] < 0).float().mean(), (inputs[0] > 6).float().mean()
        shares.append((float(below), float(above)))

    acts = [m for m in module.modules() if isinstance(m, torch.nn.ReLU6)]
    handles = [act.register_forward_hook(look) for act in acts]
    with torch.no_grad():
        module(x)
    for handle in handles:
        handle.remove()
    return shares


def test_activations_of_random_weights_clip_some_and_pass_most():
    shares = _activation_shares(network("mobilenet_v2_1.0"), images(2, 224))
    assert len(shares) == 35
    for below, above in shares:
        assert 0.005 < below < 0.3
        assert 0.0005 < above < 0.3


@pytest.mark.parametrize("name", ["mobilenet_v2_1.0", "efficientnet_lite3"])
def test_random_weights_stay_finite_with_every_activation_removed(name, monkeypatch):
    module, x = network(name), images(2, 128)
    with torch.no_grad():
        with_activations = module(x).abs().max()
        monkeypatch.setattr(torch.nn.ReLU6, "forward", lambda self, x: x)
        without = module(x).abs().max()
    assert 0.5 < with_activations < 20
    assert 0.5 < without < 100


def test_weights_follow_from_the_seed():
    first, same, other = (mobilenet_v2(seed=seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[key], same[key]) for key in first)
    assert not torch.equal(first["stem.conv.weight"], other["stem.conv.weight"])


@pytest.mark.needs_shared
def test_lite0_is_the_published_network():
    path = SHARED / "models" / "efficientnet_lite0_bn.onnx"
    if not path.exists():
        pytest.skip("the shared folder is not beside the repository")
    x = images(2, 224)
    with torch.no_grad():
        expected = network("efficientnet_lite0")(x).numpy()
    (actual,) = session(onnx.load(path)).run(None, {"input": x.numpy()})
    assert np.abs(actual - expected).max() < 1e-4


# --- Exports -------------------------------------------------------------------------------------

TORCHSCRIPT = [(opset, keep_bn) for opset in (13, 17, 20) for keep_bn in (True, False)]


@pytest.mark.parametrize(("opset", "keep_bn"), TORCHSCRIPT)
@pytest.mark.parametrize(
    ("name", "convolutions"), [("mobilenet_v2_1.0", 52), ("efficientnet_lite0", 49)]
)
def test_torchscript_exports(name, convolutions, opset, keep_bn):
    model = exported(name, exporter="torchscript", opset=opset, keep_bn=keep_bn)
    counts = operators(model)
    assert model.opset_import[0].version == opset
    assert counts["Conv"] == convolutions
    assert counts["BatchNormalization"] == (convolutions if keep_bn else 0)
    assert counts["Pad"] == 0
    assert_same(model, network(name), images(3, 224))


def check_dynamo(name: str, convolutions: int, opset: int | None, keep_bn: bool) -> None:
    model = exported(name, opset=opset, keep_bn=keep_bn)
    counts = operators(model)
    assert model.opset_import[0].version == (opset or 20)
    assert counts["Conv"] == convolutions
    assert counts["BatchNormalization"] == (convolutions if keep_bn else 0)
    assert set(counts) <= {
        *("Conv", "BatchNormalization", "Clip", "Add", "ReduceMean", "Gemm"),
        *("Shape", "Squeeze", "Concat", "Reshape", "Constant"),  # of flatten, batch unknown
    }
    assert_same(model, network(name), images(3, 224))


@pytest.mark.parametrize("keep_bn", [True, False])
def test_dynamo_exports(keep_bn):
    check_dynamo("efficientnet_lite0", 49, None, keep_bn)


@pytest.mark.slow
@pytest.mark.parametrize("opset", [18, None, export.NEWEST_OPSET])
@pytest.mark.parametrize("keep_bn", [True, False])
@pytest.mark.parametrize(
    ("name", "convolutions"),
    [("mobilenet_v2_1.4", 52), ("efficientnet_lite0", 49), ("efficientnet_lite3", 73)],
)
def test_dynamo_exports_at_every_opset(name, convolutions, opset, keep_bn):
    check_dynamo(name, convolutions, opset, keep_bn)


@pytest.mark.parametrize(
    "exporter", ["torchscript", pytest.param("dynamo", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("name", ["efficientnet_lite0", "mobilenet_v2_1.0", "resnet18"])
def test_one_export_serves_every_size(name, exporter):
    model = exported(name, exporter=exporter, dynamic_size=True)
    for x in (images(1, 224), images(3, 160, 192)):
        assert_same(model, network(name), x)


@pytest.mark.parametrize("depth", [18, 34, pytest.param(50, marks=pytest.mark.slow)])
def test_resnet_exports(depth):
    model = exported(f"resnet{depth}", exporter="torchscript", opset=17)
    assert operators(model)["Conv"] == operators(model)["BatchNormalization"]
    assert_same(model, network(f"resnet{depth}"), images(2, 224))


def conv_pads(model: onnx.ModelProto) -> Counter[tuple[int, ...]]:
    """Pads of the strided convolutions."""
    convs = [
        {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        for node in model.graph.node
        if node.op_type == "Conv"
    ]
    return Counter(tuple(conv["pads"]) for conv in convs if conv["strides"] == [2, 2])


@pytest.mark.parametrize(
    ("exporter", "keep_bn"), [("torchscript", True), ("dynamo", True), ("dynamo", False)]
)
def test_lite_pads_at_the_end(exporter, keep_bn):
    opset = 17 if exporter == "torchscript" else None
    model = exported("efficientnet_lite0", exporter=exporter, opset=opset, keep_bn=keep_bn)
    assert conv_pads(model) == {(0, 0, 1, 1): 3, (1, 1, 2, 2): 2}


def test_pad_nodes_can_stay():
    model = exported("efficientnet_lite0", exporter="torchscript", opset=17, keep_pads=True)
    assert operators(model)["Pad"] == 5
    assert conv_pads(model) == {(0, 0, 0, 0): 5}
    assert_same(model, network("efficientnet_lite0"), images(1, 224))


def test_each_call_returns_its_own_copy():
    first = exported("mobilenet_v2_1.0", exporter="torchscript", opset=17)
    first.graph.node.pop()
    second = exported("mobilenet_v2_1.0", exporter="torchscript", opset=17)
    assert second.graph.node[-1].op_type == "Gemm"


# --- Plans and commands --------------------------------------------------------------------------


def test_plan_files_are_what_plans_writes():
    written = {path.stem: path.read_text(encoding="utf-8") for path in plans.PLANS.glob("*.json")}
    assert written == {name: plans.to_json(plan) for name, plan in plans.all_plans().items()}
    assert len(written) == 19
    for name, text in written.items():
        assert json.loads(text) == plans.all_plans()[name]


@pytest.mark.parametrize("name", sorted(plans.DEPTHSHRINKER))
def test_masks_have_one_entry_per_block(name):
    blocks = len(network(name).blocks)
    for mask in plans.DEPTHSHRINKER[name]:
        assert len(plans.keep_blocks(name, mask)["keep_blocks"]) == blocks


def test_command_line_saves_and_prints(tmp_path):
    path = tmp_path / "m.onnx"
    command = [EXAMPLES / "mobilenet_v2.py", "--width", "1.0", "--exporter", "torchscript"]
    options = ["--opset", "17", "--no-bn", "-o", path]
    result = subprocess.run(
        [sys.executable, *map(str, command + options)], capture_output=True, text=True, check=True
    )
    assert operators(onnx.load(path))["BatchNormalization"] == 0
    assert "300.77 M" in result.stdout
    assert result.stderr == ""

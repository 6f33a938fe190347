"""Repair of folded networks: what is matched, what is kept, and what the report says."""

from __future__ import annotations

import json

import numpy as np
import onnx
import pytest
from builders import ModelBuilder, nonzero, run

torch = pytest.importorskip("torch")

from test_distill import classifier, damaged, images  # noqa: E402 - needs torch

import graphfold  # noqa: E402
from graphfold.calibration import repair as module  # noqa: E402
from graphfold.calibration.bridge import bridge  # noqa: E402
from graphfold.calibration.distill import distill  # noqa: E402
from graphfold.calibration.repair import common_features, repair  # noqa: E402
from graphfold.calibration.torch_depthwise import depthwise  # noqa: E402
from graphfold.cli import main  # noqa: E402
from graphfold.errors import UsageError  # noqa: E402
from graphfold.model import load, to_proto  # noqa: E402


def mended(network, original, data=None, **options):
    options = {"minutes": 10, "steps": 80, "step_size": 5e-3, **options}
    return repair(network, original, images() if data is None else data, **options)


def test_a_network_learns_its_original_s_answers():
    original = load(classifier())
    network = damaged(classifier())
    stored = to_proto(network)
    told = []
    found = mended(network, original, progress=lambda *args: told.append(args), threads=1)
    assert found.kept
    assert found.after.damage < 0.3 * found.before.damage
    assert (found.trained, found.judged, found.steps) == (80, 20, 80)
    assert found.features == ("first", "active", "second", "features", "mean", "flat")
    assert list(to_proto(found.model).graph.node) == list(stored.graph.node)
    assert to_proto(network) == stored
    assert len(told) == 80
    assert {total for _, _, total in told} == {100}


def test_verdicts_are_of_the_held_back_samples():
    original, network = load(classifier()), damaged(classifier())
    found = mended(network, original, steps=8)
    batch = np.concatenate([item["x"] for item in images()])[4::5]
    for model, verdict in ((network, found.before), (found.model, found.after)):
        logs = []
        for each in (original, model):
            (logits,) = run(to_proto(each), {"x": batch})
            wide = logits.astype(np.float64)
            logs.append(wide - np.log(np.exp(wide).sum(1, keepdims=True)))
        damage = (np.exp(logs[0]) * (logs[0] - logs[1])).sum(1).mean()
        assert verdict.damage == pytest.approx(damage, rel=1e-4)
        same = (logs[0].argmax(1) == logs[1].argmax(1)).mean()
        assert verdict.agreement == pytest.approx(same)


def test_what_is_not_confirmed_is_not_kept():
    original, network = load(classifier()), damaged(classifier(), 0.01)
    found = mended(network, original, step_size=20.0)
    assert not found.kept
    assert to_proto(found.model) == to_proto(network)
    assert "Not kept" in str(found.table().note)


def test_the_same_seed_gives_the_same_model():
    original, network = load(classifier()), damaged(classifier())
    first, second, other = (mended(network, original, steps=8, seed=n) for n in (3, 3, 4))
    assert to_proto(first.model) == to_proto(second.model)
    assert first.after == second.after
    assert first.after != other.after


def test_a_fixed_batch_and_values_instead_of_classes():
    build = ModelBuilder([3, 3, 8, 8])
    build.conv("x", 4, 3, pad=1, out="first")
    build.op("Relu", "first", out="active")
    build.conv("active", 2, 3, pad=1, out="y")
    original = build.model("y")
    batch = [{"x": item["x"][:, :, :8, :8]} for item in images()]
    found = mended(damaged(original), load(original), batch)
    assert found.kept
    assert found.judged == 18  # 20 in threes
    assert found.before.agreement is None
    assert [row[0] for row in found.table().rows] == ["damage", "PSNR"]


def test_features_are_those_that_still_mean_the_same():
    original = classifier()
    other = ModelBuilder(["N", 3, 12, 12])
    other.conv("x", 6, 3, pad=1, out="first")  # fewer channels
    other.op("Relu", "first", out="active")
    other.conv("active", 8, 3, stride=2, out="second")
    other.op("Relu", "second", out="features")
    other.op("GlobalAveragePool", "features", out="mean")
    other.op("Flatten", "mean", out="flat")
    weight = other.constant(nonzero(other.rng, 5, 8))
    other.op("Gemm", "flat", weight, transB=1, out="logits")
    strange = load(other.model("logits"))
    assert common_features(strange, load(original), images()[0]) == []  # all are unrelated
    near = damaged(original)
    assert "second" in common_features(near, load(original), images()[0])


def test_features_are_the_narrow_tensors_of_the_original_where_there_are_enough():
    build = ModelBuilder(["N", 3, 8, 8])
    x = build.conv("x", 6, 3, pad=1, out="stem")
    for number in range(4):
        wide = build.op("Relu", build.conv(x, 12, 1), out=f"wide{number}")
        x = build.conv(wide, 6, 1, out=f"narrow{number}")
    build.op("Flatten", build.op("GlobalAveragePool", x, out="mean"), out="y")
    original = build.model("y")
    feed = {"x": images()[0]["x"][:, :, :8, :8]}
    found = common_features(damaged(original, 0.01), load(original), feed)
    # Not narrow3: what comes behind it is smaller still.
    assert found == ["stem", "narrow0", "narrow1", "narrow2", "mean"]


# --- gradients of depthwise layers ------------------------------------------------------------


@pytest.mark.parametrize(("stride", "padding"), [(1, 2), (2, 0), (2, 1)])
def test_all_of_the_batch_gives_the_gradient_itself(stride, padding):
    x, weight, bias = _layer()
    own = depthwise(x, weight, bias, (stride,) * 2, (padding,) * 2, 1.0)
    other = torch.nn.functional.conv2d(x, weight, bias, stride, padding, 1, 6)
    torch.testing.assert_close(own, other)
    down = torch.randn(own.shape, generator=torch.Generator().manual_seed(1), dtype=x.dtype)
    gradients = [torch.autograd.grad(y, (x, weight, bias), down) for y in (own, other)]
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected)


def test_a_part_of_the_batch_stands_for_the_whole():
    x, weight, bias = _layer()
    same = x[:1].detach().expand(8, -1, -1, -1).clone().requires_grad_()
    gradients = []
    for share in (0.25, 1.0):
        y = depthwise(same, weight, bias, (1, 1), (1, 1), share)
        gradients.append(torch.autograd.grad(y.square().sum(), (same, weight, bias)))
    for found, expected in zip(*gradients, strict=True):  # equal images: equal gradients
        torch.testing.assert_close(found, expected)
    down = torch.zeros(8, 6, 9, 9, dtype=x.dtype)
    down[2:] = 1.0
    y = depthwise(x, weight, bias, (1, 1), (1, 1), 0.25)
    (of_weight,) = torch.autograd.grad(y, (weight,), down)
    assert not of_weight.any()  # only the first two images count


def test_bfloat16_is_near():
    x, weight, bias = (item.float().detach().requires_grad_() for item in _layer())
    gradients = []
    for enabled in (True, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            y = depthwise(x, weight, bias, (2, 2), (1, 1), 1.0)
        assert y.dtype == (torch.bfloat16 if enabled else torch.float32)
        gradients.append(torch.autograd.grad(y.float().square().sum(), (x, weight, bias)))
    for found, expected in zip(*gradients, strict=True):
        assert found.dtype == torch.float32
        assert (found - expected).norm() < 0.02 * expected.norm()


def test_a_bridged_network_takes_gradients_of_a_part():
    build = ModelBuilder(["N", 3, 9, 9])
    build.conv("x", 6, 1, out="wide")
    build.conv("wide", 6, 3, groups=6, pad=1, out="y")
    module = bridge(load(build.model("y")))
    rng = torch.Generator().manual_seed(0)
    batch = torch.randn(8, 3, 9, 9, generator=rng)
    (name,) = (name for name, item in module.weights.items() if tuple(item.shape[1:]) == (1, 3, 3))
    found = []
    for share in (1.0, 0.5):
        module.depthwise_share = share
        (y,) = module(batch).values()
        found.append(torch.autograd.grad(y.square().sum(), module.weights[name])[0])
    module.depthwise_share = 1.0
    half = module(batch[:4])["y"]
    (expected,) = torch.autograd.grad(half.square().sum(), module.weights[name])
    torch.testing.assert_close(found[1], 2 * expected)
    assert not torch.allclose(found[0], found[1])


def _layer():
    rng = torch.Generator().manual_seed(0)
    shapes = ((8, 6, 9, 9), (6, 1, 3, 3), (6,))
    made = (torch.randn(shape, generator=rng, dtype=torch.float64) for shape in shapes)
    return [item.requires_grad_() for item in made]


# --- the command ------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path):
    paths = {name: tmp_path / name for name in ("model.onnx", "plan.json", "images.npz")}
    onnx.save(classifier(), paths["model.onnx"])
    paths["plan.json"].write_text('{"graphfold_plan": 1, "remove_activations": ["active"]}')
    np.savez(paths["images.npz"], x=np.concatenate([item["x"] for item in images()]))
    return paths


def test_the_command_reports_what_came_of_it(files, tmp_path, capfd, monkeypatch):
    def counted(*models, **options):
        options |= {"steps": 40, "minutes": 10, "step_size": 5e-3}
        return distill(*models, **options)

    monkeypatch.setattr(module, "distill", counted)  # the command's process is a copy of this one
    model, plan, data = files.values()
    out, page = tmp_path / "out.onnx", tmp_path / "report.html"
    given = ["--plan", plan, "--data", data, "--distill", "0.05", "-o", out, "--report", page]
    assert main(["optimize", str(model), *map(str, given), "--json"]) == 0
    document = json.loads(capfd.readouterr().out)
    assert document["verification"]["passed"] is True
    found = document["distilled"]
    assert found["kept"]
    assert found["after"]["damage"] < found["before"]["damage"]
    assert (found["trained_on"], found["judged_on"]) == (92, 8)  # every tenth batch of 8
    assert "against the original" in page.read_text()
    metadata = {item.key: item.value for item in onnx.load(out).metadata_props}
    assert metadata["graphfold.distilled"] == str(found["steps"]) == "40"


@pytest.mark.parametrize(
    ("left_out", "message"),
    [("--data", "distill needs data to train on"), ("--plan", "there is nothing to distill")],
)
def test_what_is_missing_is_said(files, left_out, message, tmp_path, capfd):
    model, plan, data = files.values()
    given = {"--plan": plan, "--data": data}
    del given[left_out]
    out = tmp_path / "out.onnx"
    pairs = [str(item) for pair in given.items() for item in pair]
    assert main(["optimize", str(model), *pairs, "--distill", "1", "-o", str(out)]) == 2
    (line,) = capfd.readouterr().err.strip().splitlines()
    assert message in line
    assert not out.exists()


def test_the_function_refuses_the_same():
    with pytest.raises(UsageError, match="nothing to distill"):
        graphfold.optimize(classifier(), data=images(), distill=1)

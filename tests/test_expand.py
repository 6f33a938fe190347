"""Expanded convolutions: what they start as, what they fold back to, what is refused."""

from __future__ import annotations

import json

import numpy as np
import onnx
import pytest
from builders import ModelBuilder, assert_same_function, attributes_of, nonzero, random_input, run
from onnx import numpy_helper

import graphfold
from graphfold.calibration.expandable import ExpansionError, Rules
from graphfold.calibration.factors import exact_factors, hidden_for_exactness, random_factors
from graphfold.cli import main
from graphfold.cost import analyze
from graphfold.errors import ModelError, UsageError
from graphfold.free import with_free_activations
from graphfold.graph import Graph
from graphfold.model import load

SIZES = {"N": 2}


def vgg(*, norm=True, bias=True, seed=0):
    """Four 3x3 convolutions, the third with a stride and one-sided padding, and classes."""
    net = ModelBuilder(("N", 3, 9, 9), seed=seed)
    y = "x"
    for number, (width, options) in enumerate(
        [
            (4, {"pad": 1}),
            (6, {"pad": 1}),
            (5, {"pad": [0, 1, 1, 0], "stride": 2}),
            (7, {"pad": 2, "dilation": 2}),
        ]
    ):
        y = net.conv(y, width, 3, bias=bias, out=f"conv{number}", **options)
        y = net.norm(y) if norm else y
        y = net.op("Relu", y, out=f"act{number}")
    y = net.op("Flatten", net.op("GlobalAveragePool", y))
    weight = net.constant(nonzero(net.rng, 3, 7))
    return net.model(net.op("Gemm", y, weight, transB=1, out="y", channels=3))


def mobile():
    """Three inverted-residual blocks, the second residual; Relu6."""
    net = ModelBuilder(("N", 3, 8, 8))
    zero, six = net.constant(0.0), net.constant(6.0)

    def act(x, out):
        return net.op("Clip", x, zero, six, out=out)

    y = act(net.norm(net.conv("x", 4, 3, pad=1, out="stem")), "stem_act")
    for number, width in enumerate((6, 6, 8)):
        z = act(net.norm(net.conv(y, 12, 1, out=f"expand{number}")), f"wide{number}")
        z = act(net.norm(net.depthwise(z, 3, pad=1, out=f"deep{number}")), f"deep_act{number}")
        z = net.norm(net.conv(z, width, 1, out=f"project{number}"), out=f"narrow{number}")
        y = net.op("Add", y, z, out=f"block{number}") if number == 1 else z
    return net.model(y)


def trained(proto, seed=5):
    """The same network with numbers as a training leaves them: every array moved, no variance 1."""
    moved = onnx.ModelProto()
    moved.CopyFrom(proto)
    rng = np.random.default_rng(seed)
    variances = {n.input[4] for n in moved.graph.node if n.op_type == "BatchNormalization"}
    for tensor in moved.graph.initializer:
        array = numpy_helper.to_array(tensor)
        if array.dtype.kind != "f" or array.ndim == 0:
            continue
        if tensor.name in variances:
            array = rng.uniform(0.3, 2.0, array.shape)
        else:
            array = array + 0.3 * nonzero(rng, *array.shape)
        tensor.CopyFrom(numpy_helper.from_array(array.astype(np.float32), tensor.name))
    return moved


def structure(proto):
    """Every node with what it reads, the shapes of its constants and its settings."""
    shapes = {tensor.name: tuple(tensor.dims) for tensor in proto.graph.initializer}
    plain = {"dilations": [1, 1], "group": 1, "auto_pad": b"NOTSET"}
    return [
        (
            node.op_type,
            [shapes.get(name, name) for name in node.input],
            list(node.output),
            plain | attributes_of(node) if node.op_type == "Conv" else attributes_of(node),
        )
        for node in proto.graph.node
    ]


def macs(proto):
    return analyze(Graph(load(proto))).macs


def kinds(proto):
    return [node.op_type for node in proto.graph.node]


# --- factors ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape", [(4, 3, 3, 3), (3, 5, 3, 3), (4, 4, 1, 1), (6, 2, 5), (2, 3, 1, 3, 2)]
)
@pytest.mark.parametrize("more", [0, 7])
def test_factors_are_the_convolution(shape, more):
    rng = np.random.default_rng(0)
    weight = rng.standard_normal(shape) * 0.1
    found = exact_factors(weight, hidden_for_exactness(shape) + more, rng)
    np.testing.assert_allclose(found.merged().reshape(shape), weight, atol=1e-15)
    # Well conditioned: nothing large cancels, and both ends are of one size.
    norms = [np.linalg.norm(each) for each in (found.expansion, found.projection)]
    assert max(norms) < 8 * np.sqrt(np.linalg.norm(weight)) * np.sqrt(min(shape[:2]) + more)
    assert all(np.abs(row).max() > 0 for row in found.expansion)


def test_factors_of_nothing_are_numbers():
    found = exact_factors(np.zeros((3, 2, 3, 3)), 18, np.random.default_rng(0))
    assert np.isfinite(found.expansion).all()
    assert not found.merged().any()


def test_random_factors_keep_the_scale_behind_rectifiers():
    rng = np.random.default_rng(0)
    found = random_factors((64, 32, 3, 3), 192, rng)
    y = np.maximum(found.expansion @ np.maximum(rng.standard_normal((32, 4000)), 0), 0)
    assert 0.3 < np.mean((found.projection @ y) ** 2) < 3


# --- the blocks -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["inverted", "linear"])
@pytest.mark.parametrize("norm", [True, False])
def test_what_was_trained_folds_back_exactly(kind, norm):
    original = vgg(norm=norm)
    found = graphfold.expand(original, ["k3"], skip_first=1, kind=kind)
    assert [each.conv for each in found.convs] == ["conv1", "conv2", "conv3"]
    wide = trained(found.model)
    result = graphfold.optimize(wide, found.plan, verify=True)
    plain = graphfold.optimize(original).model
    assert structure(result.model) == structure(plain)
    assert macs(result.model) == macs(plain) == found.macs[0] == found.macs[2]
    # The trained network with its new activations taken out by hand.
    names = {name for each in found.convs for name in each.activations}
    bare = onnx.ModelProto()
    bare.CopyFrom(wide)
    for node in bare.graph.node:
        if node.output[0] in names:
            assert node.op_type == "Relu"
            node.op_type = "Identity"
    assert len(names) == (6 if kind == "inverted" else 0)
    assert_same_function(bare, result.model, SIZES, tolerance=1e-5)
    if names:
        feeds = random_input(wide, SIZES)
        before, after = run(wide, feeds)[0], run(bare, feeds)[0]
        assert np.abs(before - after).max() > 1e-3 * np.abs(before).max()


def test_borders_of_biased_blocks_are_exact():
    net = ModelBuilder(("N", 3, 6, 6))
    original = net.model(net.op("Relu", net.conv("x", 4, 3, pad=1, out="c"), out="y"))
    found = graphfold.expand(original, ["c"])
    wide = trained(found.model)
    folded = graphfold.optimize(wide, found.plan).model
    assert kinds(folded) == ["Conv", "Relu"]
    reference = graphfold.optimize(wide, found.plan).reference
    assert_same_function(graphfold.model.to_proto(reference), folded, SIZES, reach=1)


@pytest.mark.parametrize("shape", [(3, 9), (3, 9, 8), (3, 5, 6, 7)])
def test_any_number_of_axes(shape):
    net = ModelBuilder(("N", *shape), seed=2)
    y = net.op("Relu", net.norm(net.conv("x", 4, 3, pad=1, stride=2, out="c")), out="r")
    original = net.model(net.conv(y, 2, 2, pad=1, out="y"))
    for kind in ("inverted", "linear"):
        found = graphfold.expand(original, ["k3", "k2"], kind=kind, ratio=2)
        assert [each.kernel for each in found.convs] == [(3,) * (len(shape) - 1), (2,) * (
            len(shape) - 1
        )]  # fmt: skip
        wide = trained(found.model)
        result = graphfold.optimize(wide, found.plan)
        assert kinds(result.model) == kinds(graphfold.optimize(original).model)
        assert result.report.verification.passed


@pytest.mark.parametrize("make", [vgg, mobile])
def test_linear_blocks_begin_with_the_function(make):
    original = make()
    found = graphfold.expand(original, ["k3", "k1"], kind="linear", ratio=2)
    assert len(found.convs) > 3
    assert all(each.error < 1e-6 for each in found.convs)
    assert_same_function(original, found.model, SIZES, tolerance=1e-5)
    assert kinds(found.model).count("Conv") == kinds(original).count("Conv") + 2 * len(found.convs)
    # Not enough hidden channels for the function are made enough, and that is said.
    first = found.convs[0]
    assert first.hidden == min(first.in_channels, first.out_channels) * 9 > 2 * first.in_channels


def test_expansions_of_inverted_residuals():
    original = mobile()
    found = graphfold.expand(original, ["expansions"], every=2)
    assert [each.conv for each in found.convs] == ["expand0", "expand2"]
    assert [each.hidden for each in found.convs] == [24, 36]
    assert found.function == "Relu6"
    block = [node for node in found.model.graph.node if node.output[0].startswith("expand0")]
    assert [node.op_type for node in block] == [
        *("Conv", "BatchNormalization", "Clip") * 2,
        "Conv",
    ]
    assert attributes_of(block[3])["group"] == 24
    assert attributes_of(block[3])["kernel_shape"] == [1, 1]
    wide = trained(found.model)
    folded = graphfold.optimize(wide, found.plan).model
    assert structure(folded) == structure(graphfold.optimize(original).model)


def test_strided_pointwise_blocks_take_the_stride_first():
    net = ModelBuilder(("N", 3, 8, 8))
    original = net.model(net.op("Relu", net.conv("x", 4, 1, stride=2, out="c"), out="y"))
    found = graphfold.expand(original, ["c"])
    convs = [attributes_of(n)["strides"] for n in found.model.graph.node if n.op_type == "Conv"]
    assert convs == [[2, 2], [1, 1], [1, 1]]
    wide = trained(found.model)
    assert structure(graphfold.optimize(wide, found.plan).model) == structure(original)


def test_same_padding_and_pads_in_front():
    net = ModelBuilder(("N", 3, 8, 8))
    y = net.op("Relu", net.conv("x", 4, 3, auto_pad="SAME_UPPER", stride=2, out="a"))
    y = net.pad(y, [0, 0, 1, 0], [0, 0, 1, 2])
    original = net.model(net.conv(y, 4, 3, out="y"))
    found = graphfold.expand(original, ["k3"])
    wide = trained(found.model)
    folded = graphfold.optimize(wide, found.plan)
    assert kinds(folded.model) == ["Conv", "Relu", "Conv"]
    assert macs(folded.model) == macs(original)
    assert folded.report.verification.passed


def test_convolutions_in_a_row_fold_apart():
    net = ModelBuilder(("N", 3, 8, 8))
    y = net.conv(net.conv("x", 8, 3, pad=1, out="a"), 8, 3, pad=1, out="b")
    original = net.model(net.op("Relu", y, out="y"))
    found = graphfold.expand(original, ["k3"])
    assert [(each.input, each.output) for each in found.convs] == [("x", "a"), ("a", "b")]
    assert kinds(graphfold.optimize(found.model, found.plan).model) == ["Conv", "Conv", "Relu"]


def test_half_precision_keeps_its_type():
    net = ModelBuilder((1, 3, 6, 6), dtype=np.float16)
    original = net.model(net.conv("x", 4, 3, pad=1, out="y"))
    found = graphfold.expand(original, ["y"], kind="linear")
    assert_same_function(original, found.model)


def test_no_activation_is_added_behind_a_block():
    net = ModelBuilder(("N", 3, 8, 8))
    first = net.op("Relu", net.conv("x", 4, 3, pad=1), out="first")
    original = net.model(net.conv(first, 4, 3, pad=1, out="y"))
    found = graphfold.expand(original, ["y"])
    assert with_free_activations(Graph(found.expanded), found.plan)[1] == 0
    written = json.loads(found.plan.model_dump_json(exclude_unset=True))
    assert with_free_activations(Graph(found.expanded), graphfold.plan.read_plan(written))[1] == 0
    del written["segments"][0]["activation"]
    assert with_free_activations(Graph(found.expanded), graphfold.plan.read_plan(written))[1] == 1


def test_the_statement():
    found = graphfold.expand(vgg(norm=False, bias=False), ["conv1"], activation="SiLU", ratio=4)
    document = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert document["activation"] == "SiLU"
    assert document["convs"][0]["channels"] == [4, 16, 6]
    assert document["convs"][0]["new_bias"] is True
    assert document["macs"]["original"] == document["macs"]["folded"] < document["macs"]["expanded"]
    assert document["params"]["folded"] == document["params"]["original"] + 6
    folded = graphfold.optimize(trained(found.model), found.plan).folded
    assert document["params"]["folded"] == analyze(Graph(folded)).params
    assert document["plan"]["segments"][0]["activation"] is None
    assert "conv1" in str(found.tables()[0].rows)
    assert graphfold.expand(vgg(norm=False), ["conv1"]).convs[0].new_bias is False


def test_seeds_and_the_original():
    original = vgg()
    before = original.SerializeToString()
    one, two, three = (graphfold.expand(original, ["k3"], seed=seed).model for seed in (1, 1, 2))
    assert original.SerializeToString() == before
    assert one.SerializeToString() == two.SerializeToString() != three.SerializeToString()


# --- refusals ---------------------------------------------------------------------------------


def mixed():
    """A grouped, an unknown-weight and a plain convolution."""
    net = ModelBuilder(("N", 4, "H", "W"))
    y = net.conv("x", 4, 3, pad=1, groups=2, out="grouped")
    y = net.op("Relu", net.conv(y, 4, 3, stride=2, auto_pad="SAME_UPPER", out="same"))
    weight = net.op("Mul", net.constant(nonzero(net.rng, 4, 4, 3, 3)), net.op("ReduceMean", "x"))
    y = net.op("Conv", y, weight, out="computed", channels=4)
    return net.model(net.op("Relu", net.conv(y, 4, 3, out="plain"), out="y"))


def test_what_cannot_be_expanded_is_said_at_once():
    with pytest.raises(ExpansionError) as caught:
        graphfold.expand(mixed(), ["grouped", "same", "computed", "plane", "y", "plain"])
    reasons = {each.path: str(each) for each in caught.value.problems}
    assert "2 groups" in reasons["grouped"]
    assert "not fixed" in reasons["same"]
    assert "no constants" in reasons["computed"]
    assert "did you mean 'plain'" in reasons["plane"]
    assert "not the output of a convolution" in reasons["y"]
    assert "plain" not in reasons
    with pytest.raises(ExpansionError, match="neither a rule"):
        graphfold.expand(mixed(), ["k3"], leave=["everything"])


def test_rules_leave_what_they_cannot_expand_and_say_so():
    found = graphfold.expand(mixed(), ["k3"])
    assert [each.conv for each in found.convs] == ["plain"]
    assert [each.conv for each in found.left] == ["same"]
    assert "not fixed" in found.tables()[1].rows[0][1]
    assert graphfold.expand(mixed(), ["k3"], leave=["same"]).left == ()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"convs": ["k7"]}, "0 convolutions match k7"),
        ({"convs": ["k3"], "skip_first": 3, "skip_last": 2}, "nothing to expand"),
        ({"convs": ["expansions"]}, "nothing to expand"),
        ({"convs": []}, "which convolutions"),
        ({"convs": ["k3"], "every": 0}, "every 0"),
        ({"convs": ["k3"], "ratio": 0}, "expansion by 0"),
        ({"convs": ["k3"], "kind": "linear", "activation": "Relu"}, "no activations"),
    ],
)
def test_wrong_choices_are_refused(options, text):
    with pytest.raises(UsageError, match=text):
        graphfold.expand(vgg(), **options)


def test_convolutions_that_folding_merges_anyway_are_refused():
    net = ModelBuilder(("N", 8, 8, 8))
    narrow = net.conv(net.conv("x", 32, 1, out="a"), 8, 1, out="b")
    original = net.model(net.op("Relu", narrow, out="y"))
    assert kinds(graphfold.optimize(original).model) == ["Conv", "Relu"]
    with pytest.raises(ModelError, match="does not restore"):
        graphfold.expand(original, ["a"])


def test_rules_have_numbers_that_mean_something():
    assert Rules(("k3",), every=2).every == 2
    with pytest.raises(UsageError, match="skip 0 and -1"):
        Rules(("k3",), skip_last=-1)


# --- the command ------------------------------------------------------------------------------


def test_the_command_writes_network_and_plan(tmp_path, capfd):
    onnx.save(vgg(), tmp_path / "net.onnx")
    assert main(["expand", str(tmp_path / "net.onnx"), "--convs", "k3", "--json"]) == 0
    document = json.loads(capfd.readouterr().out)
    wide, plan = tmp_path / "net.expanded.onnx", tmp_path / "net.expanded.plan.json"
    assert json.loads(plan.read_text()) == document["plan"]
    assert main(["optimize", str(wide), "--plan", str(plan), "-o", str(tmp_path / "f.onnx")]) == 0
    plain = graphfold.optimize(vgg()).model
    assert structure(onnx.load(tmp_path / "f.onnx")) == structure(plain)


@pytest.mark.parametrize(
    ("more", "text"),
    [
        ((), "expand which convolutions?"),
        (("--convs", "k3", "--block", "wide"), "--block 'wide' is not known"),
        (("--convs", "k3", "--activation", "Cos"), "--activation 'Cos' is not known"),
        (("--convs", "k3", "-o", "-"), "go to files"),
        (("--convs", "k3", "-o", "{0}/a", "--plan-out", "{0}/a"), "the same file"),
        (("--convs", "k9"), "nothing to expand"),
    ],
)
def test_wrong_options_write_nothing(tmp_path, more, text, capfd):
    path = tmp_path / "net.onnx"
    onnx.save(vgg(), path)
    assert main(["expand", str(path), *(item.format(tmp_path) for item in more)]) == 2
    assert text in capfd.readouterr().err
    assert list(tmp_path.iterdir()) == [path]

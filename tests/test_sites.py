"""Activation sites in every spelling, gates that are none, and conv sites."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import pytest
from builders import ModelBuilder, nonzero, random_input, run
from onnx import helper

from graphfold.graph import Graph
from graphfold.model import load
from graphfold.sites import Sites, evaluate_activation, find_sites

Spelling = Callable[[ModelBuilder, str], str]


def sites_of(proto: onnx.ModelProto) -> Sites:
    return find_sites(Graph(load(proto)))


def const(build: ModelBuilder, value: float) -> str:
    return build.constant(value)


# --- spellings ------------------------------------------------------------------------------------


def relu(build: ModelBuilder, x: str) -> str:
    return build.op("Relu", x)


def relu6_inputs(build: ModelBuilder, x: str) -> str:
    return build.op("Clip", x, const(build, 0.0), const(build, 6.0))


def silu(build: ModelBuilder, x: str) -> str:
    return build.op("Mul", x, build.op("Sigmoid", x))


def silu_gate_first(build: ModelBuilder, x: str) -> str:
    return build.op("Mul", build.op("Sigmoid", x), x)


def hard_swish_node(build: ModelBuilder, x: str) -> str:
    return build.op("HardSwish", x)


def hard_swish_hard_sigmoid(build: ModelBuilder, x: str) -> str:
    return build.op("Mul", x, build.op("HardSigmoid", x, alpha=1 / 6, beta=0.5))


def hard_swish_mul_then_div(build: ModelBuilder, x: str) -> str:
    clipped = relu6_inputs(build, build.op("Add", x, const(build, 3.0)))
    return build.op("Div", build.op("Mul", x, clipped), const(build, 6.0))


def hard_swish_div_then_mul(build: ModelBuilder, x: str) -> str:
    clipped = relu6_inputs(build, build.op("Add", x, const(build, 3.0)))
    return build.op("Mul", x, build.op("Div", clipped, const(build, 6.0)))


def hard_swish_mul_by_a_sixth(build: ModelBuilder, x: str) -> str:
    clipped = relu6_inputs(build, build.op("Add", const(build, 3.0), x))
    return build.op("Mul", build.op("Mul", clipped, x), const(build, 1 / 6))


def prelu_node(build: ModelBuilder, x: str) -> str:
    return build.op("PRelu", x, build.constant(abs(nonzero(build.rng, 4, 1, 1))))


def prelu_relu_sub_mul_add(build: ModelBuilder, x: str) -> str:
    positive = build.op("Relu", x)
    negative = build.op("Sub", x, positive)
    slope = build.constant(nonzero(build.rng, 4, 1, 1))
    return build.op("Add", positive, build.op("Mul", negative, slope))


def prelu_of_negated(build: ModelBuilder, x: str) -> str:
    negative = build.op("Relu", build.op("Neg", x))
    scaled = build.op("Mul", negative, const(build, -0.25))
    return build.op("Add", build.op("Relu", x), scaled)


def gelu_erf(build: ModelBuilder, x: str) -> str:
    erf = build.op("Erf", build.op("Div", x, const(build, 2**0.5)))
    product = build.op("Mul", x, build.op("Add", erf, const(build, 1.0)))
    return build.op("Mul", product, const(build, 0.5))


def gelu_erf_half_first(build: ModelBuilder, x: str) -> str:
    erf = build.op("Erf", build.op("Mul", x, const(build, 0.5**0.5)))
    half = build.op("Mul", x, const(build, 0.5))
    return build.op("Mul", half, build.op("Add", erf, const(build, 1.0)))


def gelu_tanh(build: ModelBuilder, x: str) -> str:
    cube = build.op("Mul", build.op("Pow", x, const(build, 3.0)), const(build, 0.044715))
    inner = build.op("Mul", build.op("Add", x, cube), const(build, (2 / np.pi) ** 0.5))
    gate = build.op("Add", build.op("Tanh", inner), const(build, 1.0))
    return build.op("Mul", build.op("Mul", x, const(build, 0.5)), gate)


def mish_softplus(build: ModelBuilder, x: str) -> str:
    return build.op("Mul", x, build.op("Tanh", build.op("Softplus", x)))


def mish_log_exp(build: ModelBuilder, x: str) -> str:
    exponential = build.op("Add", build.op("Exp", x), const(build, 1.0))
    return build.op("Mul", x, build.op("Tanh", build.op("Log", exponential)))


SPELLINGS: list[tuple[Spelling, str, int]] = [
    (relu, "Relu", 1),
    (relu6_inputs, "Relu6", 1),
    (silu, "SiLU", 2),
    (silu_gate_first, "SiLU", 2),
    (hard_swish_node, "HardSwish", 1),
    (hard_swish_hard_sigmoid, "HardSwish", 2),
    (hard_swish_mul_then_div, "HardSwish", 4),
    (hard_swish_div_then_mul, "HardSwish", 4),
    (hard_swish_mul_by_a_sixth, "HardSwish", 4),
    (prelu_node, "PRelu", 1),
    (prelu_relu_sub_mul_add, "PReLU", 4),
    (prelu_of_negated, "PReLU", 5),
    (gelu_erf, "GELU", 5),
    (gelu_erf_half_first, "GELU", 5),
    (gelu_tanh, "GELU", 8),
    (mish_softplus, "Mish", 3),
    (mish_log_exp, "Mish", 5),
]
by_spelling = pytest.mark.parametrize(
    ("spell", "kind", "count"), SPELLINGS, ids=[spell.__name__ for spell, _, _ in SPELLINGS]
)


@by_spelling
def test_one_site_holds_the_whole_activation_and_is_named_by_its_last_output(
    spell: Spelling, kind: str, count: int
):
    build = ModelBuilder([1, 4, 5, 6])
    before = build.conv("x", 4, 1, out="before")
    last = spell(build, before)
    (site,) = sites_of(build.model(build.conv(last, 4, 1))).activations
    assert site.kind == kind
    assert site.name == last
    assert site.input.name == "before"
    assert len(site.nodes) == count


@by_spelling
def test_two_in_sequence_are_two_sites(spell: Spelling, kind: str, count: int):
    build = ModelBuilder([1, 4, 5, 6])
    first = spell(build, "x")
    second = spell(build, first)
    sites = sites_of(build.model(build.conv(second, 4, 1))).activations
    assert [(site.input.name, site.name) for site in sites] == [("x", first), (first, second)]
    assert [site.kind for site in sites] == [kind, kind]


@by_spelling
def test_a_site_followed_by_a_residual_sum_does_not_take_it(spell: Spelling, kind: str, count: int):
    build = ModelBuilder([1, 4, 5, 6])
    last = spell(build, build.conv("x", 4, 1))
    y = build.op("Add", build.conv(last, 4, 1), "x")
    (site,) = sites_of(build.model(y)).activations
    assert (site.name, site.kind, len(site.nodes)) == (last, kind, count)


@pytest.mark.parametrize(
    "spell",
    [spell for spell, _, _ in SPELLINGS if spell is not prelu_node],
    ids=lambda s: s.__name__,
)
def test_values_read_off_a_site_are_those_that_onnxruntime_computes(spell: Spelling):
    build = ModelBuilder([1, 4, 5, 6], opset=17)
    model = build.model(spell(build, "x"))
    graph = Graph(load(model))
    (site,) = find_sites(graph).activations
    feeds = random_input(model)
    (expected,) = run(model, feeds)
    values = evaluate_activation(graph, site.input, site.nodes, feeds["x"])
    assert values is not None
    np.testing.assert_allclose(values, expected, atol=2e-5)


@pytest.mark.parametrize("opset", [6, 10])
def test_relu6_as_attributes(opset: int):
    build = ModelBuilder([1, 4, 5, 6], opset=opset)
    (site,) = sites_of(build.model(build.op("Clip", "x", min=0.0, max=6.0))).activations
    assert site.kind == "Relu6"


def test_a_clip_without_lower_bound():
    build = ModelBuilder([1, 4, 5, 6])
    (site,) = sites_of(build.model(build.op("Clip", "x", "", const(build, 6.0)))).activations
    assert site.kind == "Clip"


def test_constants_may_come_from_nodes():
    build = ModelBuilder([1, 4, 5, 6])
    low, high = (build.op("Constant", value_float=value) for value in (0.0, 6.0))
    (site,) = sites_of(build.model(build.op("Clip", "x", low, high))).activations
    assert site.kind == "Relu6"


def test_a_bound_that_is_computed_makes_no_site():
    build = ModelBuilder([1, 4, 5, 6])
    build.inputs.append(helper.make_tensor_value_info("high", 1, []))
    assert sites_of(build.model(build.op("Clip", "x", const(build, 0.0), "high"))).activations == ()


def test_a_scale_that_is_not_the_activations_own_is_left_out():
    """SiLU has slope one already; a factor behind it belongs to what follows."""
    build = ModelBuilder([1, 4, 5, 6])
    last = silu(build, "x")
    (site,) = sites_of(build.model(build.op("Mul", last, const(build, 1 / 6)))).activations
    assert site.name == last
    assert site.kind == "SiLU"


def test_a_gate_that_is_read_elsewhere_is_no_silu():
    build = ModelBuilder([1, 4, 5, 6])
    gate = build.op("Sigmoid", "x", out="gate")
    y = build.op("Mul", "x", gate, out="product")
    sites = sites_of(build.model(y, build.conv(gate, 4, 1))).activations
    assert [site.name for site in sites] == ["gate"]
    build = ModelBuilder([1, 4, 5, 6])
    gate = build.op("Sigmoid", "x", out="gate")
    sites = sites_of(build.model(build.op("Mul", "x", gate), gate)).activations
    assert [site.name for site in sites] == ["gate"]


# --- what is no activation ------------------------------------------------------------------------


def test_a_residual_sum_is_never_a_site():
    build = ModelBuilder([1, 4, 5, 6])
    value = build.conv("x", 4, 1)
    value = build.op("Add", value, "x")
    value = build.op("Add", build.norm(build.conv(value, 4, 1)), value)
    assert sites_of(build.model(value)).activations == ()


def test_arithmetic_with_constants_is_no_site():
    build = ModelBuilder([1, 4, 5, 6])
    value = build.op("Add", build.op("Mul", "x", const(build, 2.0)), "x")
    value = build.op("Sub", value, build.op("Div", value, const(build, 3.0)))
    assert sites_of(build.model(value)).activations == ()


def squeeze_and_excite(
    build: ModelBuilder, x: str, inner: Spelling, outer: Spelling, *, gate_first: bool = False
) -> str:
    pooled = build.op("GlobalAveragePool", x)
    squeezed = inner(build, build.conv(pooled, 4, 1))
    gate = outer(build, build.conv(squeezed, 4, 1))
    return build.op("Mul", gate, x, out="gated") if gate_first else build.op(
        "Mul", x, gate, out="gated"
    )  # fmt: skip


@pytest.mark.parametrize("inner", [relu, silu, hard_swish_div_then_mul])
@pytest.mark.parametrize("gate_first", [False, True])
def test_a_squeeze_and_excite_gate_is_reported_apart_and_holds_no_sites(
    inner: Spelling, gate_first: bool
):
    build = ModelBuilder([1, 4, 5, 6])
    before = silu(build, build.conv("x", 4, 1))

    def outer(build: ModelBuilder, x: str) -> str:
        return build.op("Sigmoid", x)

    gated = squeeze_and_excite(build, before, inner, outer, gate_first=gate_first)
    sites = sites_of(build.model(relu(build, build.conv(gated, 4, 1))))
    (gate,) = sites.gates
    assert gate.output.name == "gated"
    assert [site.kind for site in sites.activations] == ["SiLU", "Relu"]
    assert sites.activations[0].name == before


def test_a_gate_by_mean_over_space_is_a_gate_too():
    build = ModelBuilder([1, 4, 5, 6])
    pooled = build.op("ReduceMean", "x", axes=[2, 3])
    gate = build.op("HardSigmoid", build.conv(pooled, 4, 1))
    sites = sites_of(build.model(build.op("Mul", "x", gate)))
    assert len(sites.gates) == 1
    assert sites.activations == ()


# --- conv sites -----------------------------------------------------------------------------------


def test_a_conv_site_holds_its_padding_normalisation_and_constants():
    build = ModelBuilder([1, 4, 5, 6])
    padded = build.pad("x", [0, 0, 1, 1], [0, 0, 1, 1], out="padded")
    conv = build.conv(padded, 4, 3, out="conv")
    value = build.norm(conv)
    value = build.op("Mul", value, build.constant(nonzero(build.rng, 4, 1, 1)))
    value = build.op("Add", value, const(build, 0.5), out="shifted")
    (site,) = sites_of(build.model(relu(build, value))).convs
    assert (site.name, site.input.name, site.output.name) == ("conv", "x", "shifted")
    assert [node.op_type for node in site.nodes] == [
        "Pad", "Conv", "BatchNormalization", "Mul", "Add",
    ]  # fmt: skip
    assert site.removable
    assert (site.kernel, site.groups, site.pointwise, site.depthwise) == ((3, 3), 1, False, False)


def test_kinds_of_convolutions():
    build = ModelBuilder([1, 4, 5, 6])
    value = build.depthwise(build.conv("x", 4, 1), 3, pad=1)
    pointwise, depthwise = sites_of(build.model(value)).convs
    assert (pointwise.pointwise, pointwise.depthwise) == (True, False)
    assert (depthwise.pointwise, depthwise.depthwise) == (False, True)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"out_channels": 5, "kernel": 1}, "it maps 4 to 5 channels"),
        ({"out_channels": 4, "kernel": 1, "stride": 2}, "stride"),
        ({"out_channels": 4, "kernel": 3}, "smaller or larger"),
    ],
)
def test_a_conv_that_changes_the_shape_is_not_removable(options: dict[str, int], reason: str):
    build = ModelBuilder([1, 4, 5, 6])
    (site,) = sites_of(build.model(build.conv("x", **options))).convs
    assert not site.removable
    assert site.reason is not None
    assert reason in site.reason


def test_a_padding_of_other_values_or_that_others_read_is_not_part_of_the_site():
    build = ModelBuilder([1, 4, 5, 6])
    padded = build.pad("x", [0, 0, 1, 1], [0, 0, 1, 1], mode="reflect")
    (site,) = sites_of(build.model(build.conv(padded, 4, 3))).convs
    assert [node.op_type for node in site.nodes] == ["Conv"]
    build = ModelBuilder([1, 4, 5, 6])
    padded = build.pad("x", [0, 0, 1, 1], [0, 0, 1, 1])
    sites = sites_of(build.model(build.conv(padded, 4, 3), build.conv(padded, 4, 3))).convs
    assert [len(site.nodes) for site in sites] == [1, 1]


def test_an_addend_of_an_activation_is_not_the_convs():
    """The + 3 of a hard-swish belongs to the activation, not to the convolution before it."""
    build = ModelBuilder([1, 4, 5, 6])
    conv = build.conv("x", 4, 1, out="conv")
    sites = sites_of(build.model(hard_swish_div_then_mul(build, conv)))
    assert sites.convs[0].output.name == "conv"
    assert sites.activation_after(sites.convs[0].output) is sites.activations[0]


def test_a_conv_with_computed_weights_is_no_site():
    build = ModelBuilder([1, 4, 5, 6])
    build.inputs.append(helper.make_tensor_value_info("w", 1, [4, 4, 1, 1]))
    assert sites_of(build.model(build.op("Conv", "x", "w"))).convs == ()


def test_a_normalisation_inside_a_branch_of_an_if_is_not_part_of_the_site():
    build = ModelBuilder([1, 4, 5, 6])
    conv = build.conv("x", 4, 1, out="conv")
    build.inputs.append(helper.make_tensor_value_info("flag", 9, []))
    shift = const(build, 1.5)
    inner = helper.make_node("Add", [conv, shift], ["then_out"])
    then = helper.make_graph(
        [inner], "then", [], [helper.make_tensor_value_info("then_out", 1, None)]
    )
    other = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["else_out"])], "else", [],
        [helper.make_tensor_value_info("else_out", 1, None)],
    )  # fmt: skip
    y = build.op("If", "flag", then_branch=then, else_branch=other, channels=4)
    (site,) = sites_of(build.model(y)).convs
    assert [node.op_type for node in site.nodes] == ["Conv"]


def test_a_scale_inside_a_branch_of_an_if_is_not_part_of_the_activation():
    build = ModelBuilder([1, 4, 5, 6])
    clipped = relu6_inputs(build, build.op("Add", "x", const(build, 3.0)))
    product = build.op("Mul", "x", clipped, out="product")
    build.inputs.append(helper.make_tensor_value_info("flag", 9, []))
    inner = helper.make_node("Div", [product, const(build, 6.0)], ["then_out"])
    info = helper.make_tensor_value_info("then_out", 1, None)
    then = helper.make_graph([inner], "then", [], [info])
    identity = helper.make_node("Identity", ["x"], ["else_out"])
    info = helper.make_tensor_value_info("else_out", 1, None)
    other = helper.make_graph([identity], "else", [], [info])
    y = build.op("If", "flag", then_branch=then, else_branch=other, channels=4)
    (site,) = sites_of(build.model(y)).activations
    assert site.name == "product"


def test_sites_come_in_execution_order():
    build = ModelBuilder([1, 4, 5, 6])
    names = []
    value = "x"
    for spell in (silu, relu, hard_swish_mul_then_div, mish_softplus):
        value = spell(build, build.conv(value, 4, 1))
        names.append(value)
    sites = sites_of(build.model(value))
    assert [site.name for site in sites.activations] == names
    assert len(sites.convs) == 4

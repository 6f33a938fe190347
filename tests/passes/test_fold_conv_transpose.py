"""Normalisation and constants behind a transposed convolution become part of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
from builders import (
    ModelBuilder,
    assert_same_function,
    attributes_of,
    fold,
    nonzero,
    op_types,
    reasons,
)
from onnx import helper, numpy_helper

import graphfold
from graphfold.rewrite import recorded_folds


def transposed(
    build: ModelBuilder,
    out_channels: int,
    kernel: int = 3,
    *,
    groups: int = 1,
    bias: bool = True,
    out: str | None = None,
    **attributes: Any,
) -> str:
    """A ConvTranspose of x with random weights [I, O / groups, *kernel]."""
    shape = [build._channels["x"], out_channels // groups, *[kernel] * build.rank]
    inputs = ["x", build.constant(nonzero(build.rng, *shape), "weight")]
    if bias:
        inputs.append(build.constant(nonzero(build.rng, out_channels), "bias"))
    return build.op(
        "ConvTranspose", *inputs, channels=out_channels, group=groups, out=out, **attributes
    )


def folded_alone(proto: onnx.ModelProto) -> onnx.ModelProto:
    folded, _ = fold(proto, "fold_conv_transpose")
    assert_same_function(proto, folded)
    return folded


def left_alone(proto: onnx.ModelProto) -> dict[str, str]:
    folded, statistics = fold(proto, "fold_conv_transpose")
    assert op_types(folded) == op_types(proto)
    return reasons(statistics)


def test_what_writes_a_channel_is_scaled_and_the_bias_shifted():
    build = ModelBuilder([1, 4, 5, 6])
    model = build.model(build.norm(transposed(build, 6, groups=2), epsilon=1e-2, out="y"))
    before = {
        t.name.split("_")[0]: numpy_helper.to_array(t).astype(float) for t in build.initializers
    }
    folded = folded_alone(model)
    (conv,) = folded.graph.node
    after = {t.name: numpy_helper.to_array(t) for t in folded.graph.initializer}
    scale = before["gamma"] / np.sqrt(before["variance"] + 1e-2)
    for source in range(4):
        for column in range(3):
            expected = before["weight"][source, column] * scale[source // 2 * 3 + column]
            found = after[conv.input[1]][source, column]
            np.testing.assert_allclose(found, expected, rtol=1e-6)
    np.testing.assert_allclose(
        after[conv.input[2]], (before["bias"] - before["mean"]) * scale + before["beta"], rtol=1e-5
    )
    assert conv.output[0] == "y"


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_padded_strided_grouped_ones_keep_their_attributes(groups: int, bias: bool):
    build = ModelBuilder([1, 4, 5, 6])
    options = {"strides": [2, 3], "pads": [1, 0, 0, 2], "output_padding": [1, 2]}
    conv = transposed(build, 8, groups=groups, bias=bias, dilations=[1, 2], **options)
    folded = folded_alone(build.model(build.norm(conv)))
    assert op_types(folded) == ["ConvTranspose"]
    found = attributes_of(folded.graph.node[0])
    assert {key: found[key] for key in options} == options


@pytest.mark.parametrize("extra", [{"output_shape": [11, 13]}, {"auto_pad": "SAME_UPPER"}])
def test_sizes_that_attributes_fix_stay(extra: dict[str, Any]):
    build = ModelBuilder([1, 3, 5, 6])
    model = build.model(build.norm(transposed(build, 4, strides=[2, 2], **extra)))
    assert op_types(folded_alone(model)) == ["ConvTranspose"]


@pytest.mark.parametrize("rank", [1, 3])
def test_other_ranks_fold(rank: int):
    build = ModelBuilder([1, 2, *(7, 5, 6)[:rank]])
    model = build.model(build.norm(transposed(build, 4, groups=2, strides=[2] * rank)))
    assert op_types(folded_alone(model)) == ["ConvTranspose"]


@pytest.mark.parametrize(
    ("op_type", "first"),
    [
        *[(kind, False) for kind in ("Add", "Sub", "Mul", "Div")],
        *[(kind, True) for kind in ("Add", "Sub", "Mul")],
    ],
)
@pytest.mark.parametrize("shape", [(), (4, 1, 1), (1, 4, 1, 1)])
def test_constants_per_channel_fold(op_type: str, shape: tuple[int, ...], first: bool):
    build = ModelBuilder([1, 2, 5, 4])
    operands = [transposed(build, 4), build.constant(nonzero(build.rng, *shape))]
    y = build.op(op_type, *(operands[::-1] if first else operands), out="y")
    assert op_types(folded_alone(build.model(y))) == ["ConvTranspose"]


def test_half_precision_folds_in_double_and_rounds_once():
    build = ModelBuilder([1, 2, 5, 6], dtype=np.float16)
    folded = folded_alone(build.model(build.norm(transposed(build, 4))))
    assert {t.data_type for t in folded.graph.initializer} == {onnx.TensorProto.FLOAT16}


def test_a_series_folds_into_one_and_the_job_verifies_and_records_it():
    build = ModelBuilder(["N", 4, 5, 6])
    value = build.norm(transposed(build, 4, groups=2, out="c"), out="n")
    value = build.op("Mul", value, build.constant(nonzero(build.rng, 4, 1, 1)), out="y")
    result = graphfold.optimize(build.model(value))
    assert op_types(result.model) == ["ConvTranspose"]
    (found,) = recorded_folds(result.folded.ir.graph)
    assert found == result.report.folds[-1]
    assert found.replaces == ("n_c", "n_n", "n_y")
    assert found.macs == (4 * 2 * 9 * 30,) * 2
    assert graphfold.optimize(result.model).model == result.model


def test_a_weight_that_two_share_is_scaled_for_one_alone():
    build = ModelBuilder([1, 4, 5, 6])
    first = build.norm(transposed(build, 4))
    y = build.op("ConvTranspose", build.op("Relu", first), "weight", out="y")
    assert "weight" in {t.name for t in folded_alone(build.model(y)).graph.initializer}


def training(build: ModelBuilder) -> tuple[onnx.ModelProto, str]:
    outputs = ["y", "running_mean", "running_variance"]
    y = build.norm(transposed(build, 4), outputs=outputs, training_mode=1)
    return build.model(y), "training mode"


def read_twice(build: ModelBuilder) -> tuple[onnx.ModelProto, str]:
    conv = transposed(build, 4, out="conv")
    y, other = build.norm(conv, out="y"), build.op("Relu", conv, out="other")
    return build.model(y, other), "'conv' is also read by 'n_other'"


def also_output(build: ModelBuilder) -> tuple[onnx.ModelProto, str]:
    conv = transposed(build, 4, out="conv")
    return build.model(build.norm(conv, out="y"), conv), "'conv' is an output of the graph"


def overridable(name: str, shape: list[int], reason: str) -> Any:
    def make(build: ModelBuilder) -> tuple[onnx.ModelProto, str]:
        y = build.norm(transposed(build, 4, out="conv"), out="y")
        known = {t.name.split("_")[0]: t.name for t in build.initializers}
        info = helper.make_tensor_value_info(known[name], 1, shape)
        return build.model(y, more_inputs=[info]), reason

    return make


def per_column(build: ModelBuilder) -> tuple[onnx.ModelProto, str]:
    """As many columns as channels: the constant looks per channel and is not."""
    conv = transposed(build, 4, kernel=1)
    constant = build.constant(nonzero(build.rng, 4))
    return build.model(build.op("Mul", conv, constant, out="y")), "is not per channel"


def zero_divisor(build: ModelBuilder) -> tuple[onnx.ModelProto, str]:
    y = build.op("Div", transposed(build, 4), build.constant(0.0), out="y")
    return build.model(y), "divides by zero"


@pytest.mark.parametrize(
    "make",
    [
        training,
        read_twice,
        also_output,
        overridable("weight", [4, 4, 3, 3], "the weight of 'n_conv' is not a constant"),
        overridable("bias", [4], "the bias of 'n_conv' is not a constant"),
        overridable("mean", [4], "which is not a constant"),
        per_column,
        zero_divisor,
    ],
)
def test_hazards_are_left_with_the_reason(
    make: Callable[[ModelBuilder], tuple[onnx.ModelProto, str]],
):
    model, reason = make(ModelBuilder([1, 4, 5, 4]))
    assert reason in left_alone(model)["y"]


def test_a_constant_divided_by_the_result_is_not_linear():
    build = ModelBuilder([1, 4, 5, 6])
    y = build.op("Div", build.constant(2.0), transposed(build, 4, kernel=1), out="y")
    assert "divides a constant by a tensor" in left_alone(build.model(y))["y"]


def test_sums_with_other_tensors_are_no_site():
    build = ModelBuilder([1, 4, 5, 6])
    conv = transposed(build, 4, kernel=1)
    assert left_alone(build.model(build.op("Add", conv, "x"))) == {}

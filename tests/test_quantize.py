"""INT8 through onnxruntime's tools: what comes out runs, is near, and is what was asked for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx
import pytest
from builders import ModelBuilder, run
from numpy.typing import NDArray
from onnx import numpy_helper

from graphfold.calibration.judge import Judge, outputs_of
from graphfold.calibration.quantize import Scheme, quantize
from graphfold.calibration.ranges import Calibration, Statistics
from graphfold.errors import DataError, ModelError, PlanError, UsageError
from graphfold.model import Model, load, to_proto

Feed = dict[str, NDArray[Any]]


def network(**options: Any) -> onnx.ModelProto:
    """Convolutions with normalisation, a residual block, a Clip, and classes in the end."""
    build = ModelBuilder(("N", 3, 8, 8), **options)
    x = build.op("Relu", build.norm(build.conv("x", 8, 3, pad=1, out="stem")), out="begin")
    inner = build.op("Relu", build.norm(build.depthwise(x, 3, pad=1)), out="inside")
    x = build.op("Add", build.conv(inner, 8, out="last"), x, out="sum")
    x = build.op("Flatten", build.op("GlobalAveragePool", x, out="pooled"))
    weight = build.constant(build.rng.standard_normal((8, 5)))
    return build.model(build.op("Gemm", x, weight, build.constant(np.zeros(5)), out="y"))


def feeds(count: int = 8, seed: int = 0) -> Iterator[Feed]:
    rng = np.random.default_rng(seed)
    for _ in range(count):
        yield {"x": rng.standard_normal((2, 3, 8, 8)).astype(np.float32)}


def counts(model: Model) -> Counter[str]:
    return Counter(node.op_type for node in to_proto(model).graph.node)


def error(model: Model, found: Model) -> float:
    judge = list(feeds(seed=1))
    return Judge(outputs_of(model, judge)).verdict(outputs_of(found, judge)).damage


@pytest.mark.parametrize("calibration", ["minmax", "percentile", "entropy"])
def test_every_calibration_is_near_the_float_network(calibration: Any) -> None:
    model = load(network())
    found = quantize(model, feeds(), calibration=calibration)
    assert 0 < error(model, found) < 0.02
    onnx.checker.check_model(to_proto(found))


def test_normalisation_is_folded_and_weights_have_a_scale_per_channel() -> None:
    model = load(network())
    proto = to_proto(quantize(model, feeds()))
    assert "BatchNormalization" not in {node.op_type for node in proto.graph.node}
    shapes = {item.name: tuple(item.dims) for item in proto.graph.initializer}
    kinds = {item.name: item.data_type for item in proto.graph.initializer}
    weights = {
        node.input[1]: shapes[node.input[1]]
        for node in proto.graph.node
        if node.op_type == "DequantizeLinear" and kinds.get(node.input[0]) == onnx.TensorProto.INT8
    }
    assert (8,) in weights.values()
    alone = to_proto(quantize(model, feeds(), per_channel=False))
    scales = {
        tuple(item.dims)
        for node in alone.graph.node
        if node.op_type == "DequantizeLinear"
        for item in alone.graph.initializer
        if item.name == node.input[1]
    }
    assert scales <= {(), (1,)}


def test_the_model_given_is_as_before_and_the_interface_the_same() -> None:
    model = load(network())
    before = to_proto(model).SerializeToString(deterministic=True)
    found = to_proto(quantize(model, feeds()))
    assert to_proto(model).SerializeToString(deterministic=True) == before
    proto = to_proto(model)
    assert list(found.graph.input) == list(proto.graph.input)
    assert list(found.graph.output) == list(proto.graph.output)
    assert not [item for item in found.metadata_props if item.key == "onnx.infer"]


def test_what_stays_in_float_computes_in_float() -> None:
    model = load(network())
    plain = quantize(model, feeds())
    found = quantize(model, feeds(), keep_float=["last"])
    proto = to_proto(found)
    made = {name: node for node in proto.graph.node for name in node.output}
    weights = {item.name: item.data_type for item in proto.graph.initializer}
    (conv,) = [node for node in proto.graph.node if node.op_type == "Conv" and "last" in node.name]
    assert weights[conv.input[1]] == onnx.TensorProto.FLOAT
    assert made[conv.input[0]].op_type == "DequantizeLinear"
    assert counts(found)["DequantizeLinear"] < counts(plain)["DequantizeLinear"]


def test_the_name_of_an_activation_means_the_operator_before_too() -> None:
    found = to_proto(quantize(load(network()), feeds(), keep_float=["begin"]))
    floats = {
        item.name: tuple(item.dims)
        for item in found.graph.initializer
        if item.data_type == onnx.TensorProto.FLOAT
    }
    convs = [node for node in found.graph.node if node.op_type == "Conv"]
    assert [floats[node.input[1]] for node in convs if node.input[1] in floats] == [(8, 3, 3, 3)]


def test_unknown_tensors_are_all_named_with_the_nearest() -> None:
    with pytest.raises(PlanError) as caught:
        quantize(load(network()), feeds(), keep_float=["lastt", "nothing"])
    text = str(caught.value)
    assert "quantize.keep_float[0]" in text
    assert "did you mean 'last'?" in text
    assert "quantize.keep_float[1]" in text


def test_scores_are_not_rounded() -> None:
    proto = to_proto(quantize(load(network()), feeds()))
    made = {name: node for node in proto.graph.node for name in node.output}
    assert made["y"].op_type == "Gemm"


def test_a_clip_that_leaves_zero_out_is_still_a_clip() -> None:
    build = ModelBuilder((1, 3, 8, 8))
    x = build.conv("x", 8, 3, pad=1)
    x = build.op("Clip", x, build.constant(0.5), build.constant(1.0))
    model = load(build.model(build.conv(x, 4, out="y")))
    images = [{"x": feed["x"][:1]} for feed in feeds()]
    found = quantize(model, images)
    assert counts(found)["Clip"] == 1
    judge = [{"x": feed["x"][:1]} for feed in feeds(seed=1)]
    assert Judge(outputs_of(model, judge)).verdict(outputs_of(found, judge)).damage < 0.02


def test_a_clip_at_six_goes_into_the_scale() -> None:
    build = ModelBuilder((1, 3, 8, 8))
    x = build.op("Clip", build.conv("x", 8, 3, pad=1), build.constant(0.0), build.constant(6.0))
    model = load(build.model(build.conv(x, 4, out="y")))
    found = quantize(model, [{"x": feed["x"][:1]} for feed in feeds()])
    assert counts(found)["Clip"] == 0


def test_an_old_operator_set_is_brought_up_to_date() -> None:
    model = load(network(opset=11))
    found = quantize(model, feeds())
    assert to_proto(found).opset_import[0].version == 13
    assert error(model, found) < 0.02


def test_old_models_whose_weights_are_inputs_lose_these_alone() -> None:
    proto = network(opset=11)
    proto.ir_version = 3
    for item in proto.graph.initializer:
        info = onnx.helper.make_tensor_value_info(item.name, item.data_type, item.dims)
        proto.graph.input.append(info)
    model = load(proto)
    found = quantize(model, feeds())
    assert [item.name for item in to_proto(found).graph.input] == ["x"]
    assert error(model, found) < 0.02


def test_weights_that_callers_may_replace_are_refused() -> None:
    build = ModelBuilder((2, 3, 8, 8))
    weight = build.constant(build.rng.standard_normal((4, 3, 1, 1)), "weight")
    proto = build.model(build.conv("x", 4, weight=weight, out="y"))
    proto.graph.input.append(onnx.helper.make_tensor_value_info("weight", 1, [4, 3, 1, 1]))
    with pytest.raises(ModelError, match="inputs or outputs"):
        quantize(load(proto), feeds())


def test_twice_the_same() -> None:
    first, second = (
        to_proto(quantize(load(network()), feeds(), calibration="entropy")) for _ in range(2)
    )
    assert first.SerializeToString(deterministic=True) == second.SerializeToString(
        deterministic=True
    )


def test_what_cannot_be_quantized_is_said() -> None:
    build = ModelBuilder((1, 3, 8, 8))
    nothing = load(build.model(build.op("Relu", "x", out="y")))
    with pytest.raises(ModelError, match="no convolution or product"):
        quantize(nothing, feeds())
    with pytest.raises(DataError, match="no images"):
        quantize(load(network()), [])
    with pytest.raises(UsageError, match="'maximum' is not known"):
        quantize(load(network()), feeds(), calibration="maximum")
    broken = {"x": np.full((2, 3, 8, 8), np.nan, np.float32)}
    with pytest.raises(DataError, match="not finite"):
        quantize(load(network()), [broken])


def test_ranges_are_onnxruntimes_own() -> None:
    """One feed at a time gives what its calibrators find with all of them in memory."""
    model = load(network())
    proto = to_proto(model)
    statistics = Statistics(proto, ["begin", "sum"], ["percentile"])
    images = list(feeds())
    for feed in images:
        statistics.add(feed)
    seen = np.stack([_tensor(proto, "begin", feed) for feed in images])
    low, high = statistics.ranges(Calibration())["begin"]
    assert (low, high) == (seen.min(), seen.max())
    _, cut = statistics.ranges(Calibration("percentile", 99.0))["begin"]
    assert np.mean(seen > cut) == pytest.approx(0.005, abs=0.004)


def _tensor(proto: onnx.ModelProto, name: str, feed: Feed) -> NDArray[Any]:
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    copy.graph.output.append(onnx.ValueInfoProto(name=name))
    return run(copy, feed)[-1]


def test_constants_spelled_in_few_bytes_are_written_out() -> None:
    """As a merge's border repair spells its map: gathered from 3 rows and 3 columns."""
    build = ModelBuilder((2, 3, 8, 8))
    place = build.constant([0, 1, 1, 1, 1, 1, 1, 2], dtype=np.int64)
    small = build.constant(build.rng.standard_normal((1, 4, 3, 3)))
    border = build.op("Gather", build.op("Gather", small, place, axis=2), place, axis=3)
    model = load(build.model(build.op("Add", build.conv("x", 4, 3, pad=1), border, out="y")))
    found = quantize(model, feeds())
    assert "Gather" not in counts(found)
    assert error(model, found) < 0.01


def test_schemes_are_plain_values() -> None:
    assert Scheme() == Scheme(Calibration("minmax"), per_channel=True, keep_float=())
    assert str(Calibration("percentile", 99.9)) == "percentile 99.9"


def test_weights_in_constant_nodes_are_quantized_too() -> None:
    proto = network()
    for item in list(proto.graph.initializer):
        node = onnx.helper.make_node("Constant", [], [item.name], value=item)
        proto.graph.node.insert(0, node)
        proto.graph.initializer.remove(item)
    proto = to_proto(quantize(load(proto), feeds()))
    kinds = [numpy_helper.to_array(item).dtype for item in proto.graph.initializer]
    assert kinds.count(np.dtype(np.int8)) >= 4

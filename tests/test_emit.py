"""Emitted convolutions and border repairs, run by onnxruntime, against the algebra."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import pytest
from builders import (
    ModelBuilder,
    assert_same,
    attributes_of,
    nonzero,
    op_types,
    random_affine,
    run,
    slow_conv,
)
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from graphfold.affine import AffineConv
from graphfold.emit import (
    REPAIRS,
    Emitter,
    choose_repair,
    emit_affine,
    repair_cost,
    without_cropping,
)
from graphfold.errors import NotExactError
from graphfold.geometry import Axis, Geometry
from graphfold.graph import Graph
from graphfold.model import load, to_proto

SAME = Axis(3, 1, 1, 1, 1)


def emitted(
    affine: AffineConv,
    repair: str | None,
    shape: Sequence[int | str],
    *,
    opset: int = 17,
    dtype: Any = np.float32,
) -> onnx.ModelProto:
    """A model that computes an affine convolution of x."""
    build = ModelBuilder(shape, opset=opset, dtype=dtype)
    model = build.model(build.op("Identity", "x", out="y"))
    for dim in model.graph.output[0].type.tensor_type.shape.dim:
        dim.Clear()
    graph = Graph(load(model))
    output = graph.ir.outputs[0]
    producer = output.producer()
    assert producer is not None
    emitter = Emitter(graph, producer, "y", {"made.by": "test"})
    result = emit_affine(emitter, graph.ir.inputs[0], affine, np.dtype(dtype), repair)
    graph.take_over(output, result)
    graph.remove_dead([producer])
    proto = to_proto(graph.model)
    onnx.checker.check_model(proto, full_check=True)
    return proto


def assert_emits(
    affine: AffineConv,
    repair: str | None,
    sizes: Sequence[int],
    *,
    shape: Sequence[int | str] | None = None,
    batch: int = 1,
    model: onnx.ModelProto | None = None,
    **options: Any,
) -> onnx.ModelProto:
    """The emitted model gives what the affine convolution is, at the border and inside."""
    channels = affine.weight.shape[1] * affine.groups
    model = model or emitted(affine, repair, shape or [batch, channels, *sizes], **options)
    x = nonzero(np.random.default_rng(4), batch, channels, *sizes)
    dtype = options.get("dtype", np.float32)
    (actual,) = run(model, {"x": x.astype(dtype)})
    expected = np.stack([slow_conv(image, affine) for image in x.astype(dtype).astype(float)])
    assert_same(expected.astype(dtype), actual, reach=2)
    return model


def bordered(
    axes: Sequence[Axis], groups: int = 1, in_channels: int = 2, out_channels: int = 3
) -> AffineConv:
    rng = np.random.default_rng(8)
    return random_affine(rng, axes, in_channels, out_channels, groups, border=True)


# --- each repair ------------------------------------------------------------------------------


@pytest.mark.parametrize("repair", REPAIRS)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("sizes", [(6, 7), (9, 8)])
def test_repairs_are_exact_at_either_stride_on_even_and_odd_sizes(
    repair: str, stride: int, sizes: tuple[int, int]
):
    assert_emits(bordered([replace(SAME, stride=stride)] * 2), repair, sizes)


@pytest.mark.parametrize("repair", REPAIRS)
def test_repairs_are_exact_with_asymmetric_padding_and_dilation(repair: str):
    axes = (Axis(3, 2, 2, 1, 4), Axis(4, 1, 1, 0, 2))
    assert_emits(bordered(axes), repair, (9, 7))


@pytest.mark.parametrize("repair", REPAIRS)
@pytest.mark.parametrize("rank", [1, 3])
def test_repairs_are_exact_in_other_ranks(repair: str, rank: int):
    assert_emits(bordered([SAME] * rank), repair, (5, 4, 6)[:rank])


@pytest.mark.parametrize("repair", REPAIRS)
def test_repairs_are_exact_for_grouped_convolutions(repair: str):
    assert_emits(bordered([SAME] * 2, 4, 4, 4), repair, (5, 6))


@pytest.mark.parametrize("repair", REPAIRS)
def test_repairs_are_exact_for_a_batch(repair: str):
    assert_emits(bordered([SAME] * 2), repair, (5, 6), batch=3)


@pytest.mark.parametrize("repair", REPAIRS)
def test_repairs_are_exact_where_every_pixel_is_border(repair: str):
    assert_emits(bordered([Axis(5, 1, 1, 2, 2)] * 2), repair, (2, 3))


@pytest.mark.parametrize("repair", ["ones", "channel"])
def test_open_sizes_and_batch_are_exact_for_whatever_comes(repair: str):
    affine = bordered([SAME, replace(SAME, stride=2)])
    model = None
    for sizes, batch in (((5, 6), 1), ((8, 7), 2), ((1, 1), 3)):
        model = assert_emits(
            affine, repair, sizes, batch=batch, shape=["n", 2, "h", "w"], model=model
        )


@pytest.mark.parametrize("repair", ["map", "table"])
def test_constant_repairs_allow_an_open_batch(repair: str):
    affine = bordered([SAME] * 2)
    model = assert_emits(affine, repair, (5, 6), batch=2, shape=["n", 2, 5, 6])
    assert_emits(affine, repair, (5, 6), batch=1, model=model)


@pytest.mark.parametrize("repair", [None, *REPAIRS])
@pytest.mark.parametrize("opset", [8, 9, 11, 13, 16, 18, 20])
def test_emitted_nodes_are_valid_in_every_opset(repair: str | None, opset: int):
    affine = bordered([SAME] * 2)
    affine = affine if repair else replace(affine, border=None)
    if opset < 9 and repair in ("ones", "channel"):
        with pytest.raises(NotExactError, match="needs opset 9 or later"):
            choose_repair(affine.geometry, (5, 6), repair, opset=opset)
    else:
        assert_emits(affine, repair, (5, 6), opset=opset)


@pytest.mark.parametrize("repair", REPAIRS)
def test_half_precision_weights_are_cast_once_at_the_end(repair: str):
    affine = bordered([SAME] * 2)
    model = assert_emits(affine, repair, (5, 6), dtype=np.float16)
    floats = [t for t in model.graph.initializer if t.data_type != onnx.TensorProto.INT64]
    assert {t.data_type for t in floats} == {onnx.TensorProto.FLOAT16}
    weight = onnx.numpy_helper.to_array(floats[0])
    np.testing.assert_array_equal(weight[:, :2], affine.weight.astype(np.float16))


def test_each_repair_takes_the_form_it_is_named_for():
    affine = bordered([SAME] * 2)
    shape = [1, 2, 5, 6]
    assert op_types(emitted(affine, "map", shape)) == ["Conv", "Add"]
    assert op_types(emitted(affine, "table", shape)) == ["Conv", "Gather", "Gather", "Add"]
    assert op_types(emitted(affine, "ones", shape)).count("Conv") == 2
    channel = emitted(affine, "channel", shape)
    (conv,) = [node for node in channel.graph.node if node.op_type == "Conv"]
    weight = next(t for t in channel.graph.initializer if t.name == conv.input[1])
    assert weight.dims[1] == 3


def test_the_table_stays_small_where_the_map_grows():
    affine = bordered([SAME] * 2)
    constants = {
        repair: sum(
            int(np.prod(tensor.dims))
            for tensor in emitted(affine, repair, [1, 2, 40, 40]).graph.initializer
            if tensor.data_type == onnx.TensorProto.FLOAT
        )
        - affine.weight.size
        for repair in ("map", "table")
    }
    assert constants == {"map": 3 * 40 * 40, "table": 3 * 3 * 3}


def test_a_repair_is_needed_at_the_border_and_nowhere_else():
    affine = bordered([SAME] * 2)
    x = nonzero(np.random.default_rng(1), 1, 2, 6, 6).astype(np.float32)
    (naive,) = run(emitted(affine.without_border(), None, [1, 2, 6, 6]), {"x": x})
    (exact,) = run(emitted(affine, "map", [1, 2, 6, 6]), {"x": x})
    error = np.abs(naive - exact)
    assert error[:, :, 1:-1, 1:-1].max() < 1e-5
    assert error[:, :, 0].min() > 1e-2


def test_nodes_are_named_after_the_merge_and_say_who_made_them():
    model = emitted(bordered([SAME] * 2), "table", [1, 2, 5, 6])
    assert model.graph.node[-1].output[0] == "y"
    for node in model.graph.node:
        assert {prop.key: prop.value for prop in node.metadata_props} == {"made.by": "test"}
    made = [name for node in model.graph.node[:-1] for name in node.output]
    assert all(name.startswith("y/graphfold.") for name in made)
    assert len(set(made)) == len(made)


# --- cropping ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "axis",
    [
        Axis(3, 1, 1, -1, 0),
        Axis(3, 1, 1, 0, -2),
        Axis(1, 1, 1, -1, -1),
        Axis(1, 2, 1, -2, -1),
        Axis(3, 2, 1, -1, 2),
        Axis(3, 1, 2, 2, -1),
        Axis(2, 1, 3, -2, -4),
    ],
)
def test_cropping_becomes_zero_taps(axis: Axis):
    affine = bordered([axis, SAME])
    grown = without_cropping(affine)
    assert all(each.begin >= 0 and each.end >= 0 for each in grown.axes)
    x = nonzero(np.random.default_rng(3), 2, 12, 5)
    np.testing.assert_allclose(slow_conv(x, grown), slow_conv(x, affine), atol=1e-12)
    assert_emits(affine, "map", (12, 5))


@pytest.mark.parametrize(
    "axis",
    [SAME, Axis(3, 1, 2, 1, 1), Axis(2, 1, 3, 1, 1), Axis(3, 2, 2, 0, 0), Axis(3, 1, 1, 9, 9)],
)
def test_without_cropping_nothing_changes(axis: Axis):
    affine = bordered([axis, Axis(3, 1, 1, 2, 0)])
    assert without_cropping(affine) is affine


def test_cropping_one_axis_leaves_the_others_alone():
    affine = bordered([Axis(3, 1, 2, 1, 1), Axis(1, 1, 1, -1, 0)])
    assert without_cropping(affine).axes == (Axis(3, 1, 2, 1, 1), Axis(2, 1, 1, 0, 0))


def test_cropping_a_dilated_window_keeps_its_dilation():
    for axis in (Axis(3, 1, 2, -1, -3), Axis(3, 1, 2, -3, -1)):
        assert without_cropping(bordered([axis])).axes == (Axis(6, 1, 2, 1, 1),)


@settings(derandomize=True, deadline=None, max_examples=100, database=None)
@given(st.data())
def test_any_cropping_is_equal(data: st.DataObject):
    axis = Axis(
        data.draw(st.integers(1, 3)),
        data.draw(st.integers(1, 3)),
        data.draw(st.integers(1, 3)),
        data.draw(st.integers(-3, 2)),
        data.draw(st.integers(-3, 2)),
    )
    size = data.draw(st.integers(5, 14))
    assume(size + axis.begin + axis.end >= axis.extent)
    affine = bordered([axis])
    grown = without_cropping(affine)
    assert grown.axes[0].begin >= 0
    assert grown.axes[0].end >= 0
    x = nonzero(np.random.default_rng(3), 2, size)
    np.testing.assert_allclose(slow_conv(x, grown), slow_conv(x, affine), atol=1e-12)


# --- plain convolutions -------------------------------------------------------------------------


def test_a_convolution_without_border_is_one_node_with_all_its_attributes():
    rng = np.random.default_rng(2)
    affine = random_affine(rng, (Axis(3, 2, 2, 1, 3), Axis(2, 1, 1, 0, 1)), 4, 6, 2)
    model = assert_emits(affine, None, (9, 7))
    (conv,) = model.graph.node
    assert attributes_of(conv) == {
        "dilations": [2, 1],
        "group": 2,
        "kernel_shape": [3, 2],
        "pads": [1, 0, 3, 1],
        "strides": [2, 1],
    }
    assert len(conv.input) == 3


def test_a_bias_of_zeros_is_left_out():
    rng = np.random.default_rng(2)
    model = assert_emits(random_affine(rng, [SAME] * 2, 2, 3, bias=False), None, (5, 6))
    assert len(model.graph.node[0].input) == 2


# --- choosing -----------------------------------------------------------------------------------


def test_the_choice_follows_from_border_and_sizes():
    geometry = bordered([SAME] * 2).geometry
    assert choose_repair(replace(geometry, bordered=False), (5, 6), opset=17) is None
    assert choose_repair(geometry, (5, 6), opset=17) == "map"
    assert choose_repair(geometry, (500, 600), opset=17) == "table"
    assert choose_repair(geometry, (5, None), opset=17) == "ones"
    assert choose_repair(geometry, None, opset=17) == "ones"
    assert choose_repair(geometry, (5, 6), "channel", opset=17) == "channel"
    assert choose_repair(replace(geometry, bordered=False), None, "map", opset=17) is None


@pytest.mark.parametrize("repair", ["map", "table"])
def test_a_constant_repair_of_open_sizes_is_refused(repair: str):
    geometry = bordered([SAME] * 2).geometry
    with pytest.raises(NotExactError, match=f"border repair '{repair}' needs sizes that are fixed"):
        choose_repair(geometry, (5, None), repair, opset=17)


def test_costs_of_repairs_are_operations_and_constants():
    geometry = bordered([SAME] * 2).geometry
    pixels = 3 * 10 * 20
    assert repair_cost(geometry, (10, 20), None) == (0, 0)
    assert repair_cost(geometry, (10, 20), "map") == (pixels, pixels)
    assert repair_cost(geometry, (10, 20), "table") == (pixels, 3 * 9)
    assert repair_cost(geometry, (10, 20), "ones") == (pixels * 10, 3 * 9)
    assert repair_cost(geometry, (10, 20), "channel") == (pixels * 9, 3 * 9)


def test_before_opset_7_borders_are_not_repaired():
    bordered = Geometry((Axis(3, 1, 1, 1, 1),) * 2, 2, 2, 1, biased=True, bordered=True)
    with pytest.raises(NotExactError, match="needs opset 7"):
        choose_repair(bordered, (8, 8), opset=6)
    assert choose_repair(bordered, (8, 8), opset=7) == "map"

"""What passes ask of a graph, and that editing it loses nothing."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from builders import ModelBuilder, assert_same_function, nonzero, op_types
from onnx import helper

import graphfold
from graphfold.graph import (
    Graph,
    attribute,
    consumers,
    is_op,
    node_label,
    only_consumer,
    topological_between,
)
from graphfold.model import load, to_proto


def graph_of(proto: onnx.ModelProto) -> Graph:
    return Graph(load(proto))


def if_node(build: ModelBuilder, outer: str) -> str:
    """An If whose branches read `outer`."""
    build.inputs.append(helper.make_tensor_value_info("flag", 9, []))
    branches = {}
    for name in ("then", "else"):
        node = helper.make_node("Neg", [outer], [f"{name}_out"], name=f"{name}_neg")
        info = helper.make_tensor_value_info(f"{name}_out", 1, None)
        branches[f"{name}_branch"] = helper.make_graph([node], name, [], [info])
    return build.op("If", "flag", channels=2, **branches)


# --- questions ------------------------------------------------------------------------------------


def test_consumers_count_each_reader_once_and_those_in_subgraphs():
    build = ModelBuilder([1, 2, 3, 3])
    hidden = build.op("Neg", "x", out="hidden")
    twice = build.op("Add", hidden, hidden)
    graph = graph_of(build.model(twice, if_node(build, hidden)))
    value = graph.values().get("hidden")
    assert value is not None
    labels = {node_label(node) for node in consumers(value)}
    assert labels == {f"n_{twice}", "then_neg", "else_neg"}
    assert only_consumer(value) is None


def test_the_only_consumer_excludes_outputs_of_the_graph():
    build = ModelBuilder([1, 2, 3, 3])
    hidden = build.op("Neg", "x", out="hidden")
    y = build.op("Relu", hidden)
    value = graph_of(build.model(y)).values().get("hidden")
    assert value is not None
    assert is_op(only_consumer(value), "Relu")
    value = graph_of(build.model(y, hidden)).values().get("hidden")
    assert value is not None
    assert only_consumer(value) is None


def test_shapes_are_inferred_and_open_sizes_are_none():
    build = ModelBuilder(["n", 2, "h", 8])
    y = build.conv("x", 5, 3, stride=2, pad=1, out="y")
    graph = graph_of(build.model(y))
    x, value = graph.values().get("x"), graph.values().get("y")
    assert graph.sizes(x) == (None, 8)
    assert graph.channels(x) == 2
    assert graph.channels(value) == 5
    assert graph.sizes(value) == (None, 4)
    assert graph.shape(None) is None
    assert graph.sizes(None) is None


@pytest.mark.parametrize("ir_version", [3, 8])
def test_an_initializer_that_is_an_input_is_constant_in_old_ir_alone(ir_version: int):
    build = ModelBuilder([1, 2, 3, 3], opset=8, ir_version=ir_version)
    shift = build.constant([1.5], "shift")
    info = helper.make_tensor_value_info(shift, 1, [1])
    graph = graph_of(build.model(build.op("Add", "x", shift), more_inputs=[info]))
    value = graph.values().get("shift")
    assert value is not None
    assert graph.is_constant(value) == (ir_version == 3)
    assert (graph.constant(value) is None) == (ir_version == 8)
    assert graph.is_overridable(value) == (ir_version == 8)


@pytest.mark.parametrize(
    ("attributes", "expected"),
    [
        ({"value_float": 0.5}, np.float32(0.5)),
        ({"value_floats": [0.5, 2.0]}, np.array([0.5, 2.0], np.float32)),
        ({"value_int": 3}, np.int64(3)),
        ({"value_ints": [3, 4]}, np.array([3, 4])),
        ({"value": onnx.numpy_helper.from_array(np.ones((2, 1), np.float16))}, np.ones((2, 1))),
    ],
)
def test_constant_nodes_of_every_form_are_constants_through_identities(
    attributes: dict[str, Any], expected: Any
):
    build = ModelBuilder([1, 2, 3, 3])
    build.op("Identity", build.op("Constant", **attributes), out="constant")
    graph = graph_of(build.model(build.op("Identity", "x")))
    value = graph.values().get("constant")
    assert graph.is_constant(value)
    np.testing.assert_array_equal(graph.constant(value), expected)


def test_computed_tensors_and_inputs_are_no_constants():
    build = ModelBuilder([1, 2, 3, 3])
    y = build.op("Neg", build.constant([1.0]), out="computed")
    graph = graph_of(build.model(build.op("Add", "x", y)))
    for name in ("computed", "x"):
        assert not graph.is_constant(graph.values().get(name))
        assert graph.constant(graph.values().get(name)) is None


def test_operators_of_other_domains_are_not_meant():
    node = ir.Node("other", "Conv", [])
    assert not is_op(node, "Conv")
    assert is_op(ir.Node("", "Conv", []), "Relu", "Conv")
    assert is_op(ir.Node("ai.onnx", "Conv", []), "Conv")
    assert not is_op(None, "Conv")


def test_attributes_have_defaults():
    node = ir.Node("", "Conv", [], [ir.AttrInt64("group", 4)])
    assert attribute(node, "group", 1) == 4
    assert attribute(node, "auto_pad", "NOTSET") == "NOTSET"


def test_a_node_without_name_is_called_by_its_output():
    build = ModelBuilder([1, 2, 3, 3])
    model = build.model(build.op("Neg", "x", out="y"))
    model.graph.node[0].name = ""
    (node,) = graph_of(model).nodes()
    assert node_label(node) == "y"


def test_nodes_between_two_tensors_come_in_execution_order():
    build = ModelBuilder([1, 2, 3, 3])
    a = build.op("Neg", "x", out="a")
    b = build.op("Relu", a, out="b")
    build.op("Neg", a, out="side")
    c = build.op("Add", b, a, out="c")
    graph = graph_of(build.model(c, "side"))
    order = {node: index for index, node in enumerate(graph.ir)}
    values = graph.values()
    between = topological_between(values["a"], values["c"], order)
    assert [node.outputs[0].name for node in between] == ["b", "c"]


def test_fresh_names_avoid_every_name_subgraphs_included():
    build = ModelBuilder([1, 2, 3, 3])
    y = if_node(build, "x")
    model = build.model(y)
    model.graph.node[0].attribute[0].g.node[0].output[0] = "y/graphfold.0"
    model.graph.node[0].attribute[0].g.output[0].name = "y/graphfold.0"
    graph = graph_of(model)
    assert graph.fresh_name("y") == "y/graphfold.1"
    assert graph.fresh_name("y") == "y/graphfold.2"


# --- edits ----------------------------------------------------------------------------------------


def test_bypass_of_an_inner_tensor_leads_its_readers_to_the_source():
    build = ModelBuilder([1, 2, 3, 3])
    hidden = build.op("Relu", build.op("Neg", "x", out="source"), out="hidden")
    graph = graph_of(build.model(build.conv(hidden, 2, 1, out="y")))
    values = graph.values()
    producer = values["hidden"].producer()
    assert producer is not None
    follows = graph.bypass(values["hidden"], values["source"])
    graph.remove_dead([producer])
    assert follows is values["source"]
    assert graph.current(values["hidden"]) is values["source"]
    assert op_types(to_proto(graph.model)) == ["Neg", "Conv"]


def test_bypass_of_an_output_moves_its_name_to_the_source():
    build = ModelBuilder([1, 2, 3, 3])
    model = build.model(build.op("Relu", build.op("Neg", "x", out="source"), out="y"))
    graph = graph_of(model)
    values = graph.values()
    producer = values["y"].producer()
    assert producer is not None
    graph.bypass(values["y"], values["source"])
    graph.remove_dead([producer])
    proto = to_proto(graph.model)
    onnx.checker.check_model(proto, full_check=True)
    assert [(node.op_type, node.output[0]) for node in proto.graph.node] == [("Neg", "y")]


@pytest.mark.parametrize("why", ["input", "output", "read elsewhere"])
def test_bypass_of_an_output_keeps_a_source_that_must_keep_its_name(why: str):
    build = ModelBuilder([1, 2, 3, 3])
    source = "x" if why == "input" else build.op("Neg", "x", out="source")
    y = build.op("Relu", source, out="y")
    outputs = [y]
    if why == "output":
        outputs.append(source)
    if why == "read elsewhere":
        outputs.append(build.op("Exp", source))
    model = build.model(*outputs)
    graph = graph_of(model)
    values = graph.values()
    producer = values["y"].producer()
    assert producer is not None
    graph.bypass(values["y"], values[source])
    graph.remove_dead([producer])
    proto = to_proto(graph.model)
    onnx.checker.check_model(proto, full_check=True)
    assert [info.name for info in proto.graph.output] == outputs
    made = {node.output[0]: node.op_type for node in proto.graph.node}
    assert made["y"] == "Identity"
    if why != "input":
        assert made["source"] == "Neg"


def test_taking_over_moves_name_shape_readers_and_output():
    build = ModelBuilder([1, 2, 3, 3])
    model = build.model(build.op("Relu", build.op("Neg", "x", out="old"), out="y"), "old")
    graph = graph_of(model)
    old = graph.values().get("old")
    assert old is not None
    producer = old.producer()
    assert producer is not None
    replacement = ir.Node("", "Abs", [graph.ir.inputs[0]])
    graph.ir.insert_before(producer, replacement)
    graph.take_over(old, replacement.outputs[0])
    graph.remove_dead([producer])
    proto = to_proto(graph.model)
    onnx.checker.check_model(proto, full_check=True)
    assert [(node.op_type, *node.output) for node in proto.graph.node] == [
        ("Abs", "old"),
        ("Relu", "y"),
    ]
    assert graph.current(old) is replacement.outputs[0]


def test_removing_dead_nodes_takes_what_only_fed_them_and_nothing_else():
    build = ModelBuilder([1, 2, 3, 3])
    shared = build.constant(nonzero(build.rng, 2, 2, 1, 1), "shared")
    own = build.constant(nonzero(build.rng, 2, 2, 1, 1), "own")
    build.constant([1.0], "unused")
    build.op("Neg", "x", out="dangling")
    build.op("Constant", value_float=1.0, out="scalar")
    dead = build.conv(build.op("Mul", "x", "scalar"), 2, 1, weight=own, bias=False)
    dead = build.conv(dead, 2, 1, weight=shared, bias=False, out="dead")
    model = build.model(build.conv("x", 2, 1, weight=shared, bias=False, out="y"))
    graph = graph_of(model)
    value = graph.values().get("dead")
    assert value is not None
    producer = value.producer()
    assert producer is not None
    removed = graph.remove_dead([producer])
    assert len(removed) == 4
    proto = to_proto(graph.model)
    assert {tensor.name for tensor in proto.graph.initializer} == {"shared", "unused"}
    assert {node.output[0] for node in proto.graph.node} == {"dangling", "y"}
    assert_same_function(model, proto)


def test_live_nodes_are_not_removed():
    build = ModelBuilder([1, 2, 3, 3])
    model = build.model(build.op("Neg", build.op("Relu", "x"), out="y"))
    graph = graph_of(model)
    assert graph.remove_dead(graph.nodes()) == []
    assert op_types(to_proto(graph.model)) == ["Relu", "Neg"]


def test_new_initializers_are_named_after_the_tensor_and_known_by_shape():
    build = ModelBuilder([1, 2, 3, 3])
    graph = graph_of(build.model(build.op("Neg", "x", out="y")))
    value = graph.add_initializer("y", np.ones((3, 1), np.float32))
    assert value.name == "y/graphfold.0"
    assert graph.shape(value) == (3, 1)
    assert graph.dtype(value) == ir.DataType.FLOAT
    np.testing.assert_array_equal(graph.constant(value), np.ones((3, 1)))


def test_a_shape_says_nothing_of_the_type_of_what_is_filled_with_it():
    build = ModelBuilder(["n", 3, 4, 5], dtype=np.float16)
    filled = build.op("ConstantOfShape", build.op("Shape", build.op("Identity", "x")), out="f")
    y = build.op("Cast", filled, to=onnx.TensorProto.FLOAT16, out="y")
    proto = build.model(y)
    del proto.graph.value_info[:]
    graph = graph_of(proto)
    value = next(each for node in graph.ir for each in node.outputs if each.name == "f")
    assert graph.dtype(value) == ir.DataType.FLOAT
    assert "Cast" in op_types(graphfold.optimize(proto).model)


def test_sizes_and_comparisons_have_types_of_their_own():
    build = ModelBuilder([2, 3, 4, 5])
    size = build.op("Shape", build.op("Neg", "x"), out="size")
    row = build.op("Slice", size, *(build.constant([n], dtype=np.int64) for n in (0, 2)), out="row")
    above = build.op("Greater", "x", build.constant(0.5), out="above")
    length = build.op("Cast", build.op("Gather", row, build.constant(0, dtype=np.int64)), to=1)
    proto = build.model(build.op("Mul", build.op("Cast", above, to=1), length, out="y"))
    graph = graph_of(proto)
    found = {each.name: graph.dtype(each) for node in graph.ir for each in node.outputs}
    assert found["size"] == found["row"] == ir.DataType.INT64
    assert found["above"] == ir.DataType.BOOL

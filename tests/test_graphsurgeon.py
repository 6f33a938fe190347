"""Graphs of onnx-graphsurgeon, in and out."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from rich_model import OPSET, every_dtype, rich_model

from graphfold import graphsurgeon, model
from graphfold.errors import ModelError
from graphfold.restoring import restore_dropped

gs = pytest.importorskip("onnx_graphsurgeon")
ort = pytest.importorskip("onnxruntime")


def built_graph(opset: int = 17) -> gs.Graph:
    x = gs.Variable("x", np.float32, ["N", 3])
    w = gs.Constant("w", np.arange(6, dtype=np.float32).reshape(3, 2))
    h = gs.Variable("h")
    y = gs.Variable("y", np.float32, ["N", 2])
    nodes = [gs.Node("MatMul", inputs=[x, w], outputs=[h]), gs.Node("Relu", "r", {}, [h], [y])]
    return gs.Graph(nodes, [x], [y], opset=opset)


def decodable() -> onnx.ModelProto:
    """The rich model without attributes that are not text, which graphsurgeon cannot import."""
    proto = rich_model()
    node = proto.graph.node[6]
    kept = [item for item in node.attribute if item.name not in ("bytes", "byte_strings")]
    node.ClearField("attribute")
    node.attribute.extend(kept)
    return proto


def comparable(proto: onnx.ModelProto) -> bytes:
    """Without what names no tensor, and without the order of lists that have no order."""
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    graphs = [copy.graph]
    while graphs:
        graph = graphs.pop()
        for field in ("initializer", "value_info", "quantization_annotation"):
            items = [
                item
                for item in getattr(graph, field)
                if getattr(item, "name", "") != "stale"
                and getattr(item, "tensor_name", "") != "nowhere"
            ]
            graph.ClearField(field)
            getattr(graph, field).extend(sorted(items, key=str))
        for node in graph.node:
            graphs += [item.g for item in node.attribute if item.HasField("g")]
    return copy.SerializeToString(deterministic=True)


def test_a_graph_becomes_a_model_that_runs() -> None:
    graph = built_graph()
    proto = model.to_proto(graphsurgeon.from_graphsurgeon(graph))
    onnx.checker.check_model(proto, full_check=True)
    assert (proto.ir_version, proto.opset_import[0].version) == (8, 17)
    session = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {"x": np.ones((1, 3), np.float32)})
    np.testing.assert_array_equal(y, [[6, 9]])


@pytest.mark.parametrize(("opset", "ir_version"), [(7, 4), (11, 6), (20, 9), (24, 12), (26, 13)])
def test_the_ir_version_is_the_lowest_for_the_opset(opset: int, ir_version: int) -> None:
    loaded = graphsurgeon.from_graphsurgeon(built_graph(opset))
    assert loaded.ir.ir_version == ir_version
    graph = built_graph(opset)
    graph.ir_version = 13
    assert graphsurgeon.from_graphsurgeon(graph).ir.ir_version == 13


def test_neither_the_graph_nor_its_proto_is_changed() -> None:
    source = rich_model()
    strip = decodable()
    before = strip.SerializeToString(deterministic=True)
    graph = gs.import_onnx(strip)
    constant = graph.tensors()["w"]
    constant.name = "renamed"
    graph.nodes[0].domain = "new.domain"
    domains = len(graph.import_domains)
    graphsurgeon.from_graphsurgeon(graph, original=source)
    assert strip.SerializeToString(deterministic=True) == before
    assert len(graph.import_domains) == domains
    assert not isinstance(constant._values, np.ndarray)


def test_a_model_keeps_all_fields_through_a_graph() -> None:
    loaded = model.load(decodable())
    graph = graphsurgeon.to_graphsurgeon(loaded)
    again = graphsurgeon.from_graphsurgeon(graph)
    assert comparable(model.to_proto(again)) == comparable(decodable())
    assert model.compare_interfaces(loaded, again) == []


def test_dropped_fields_come_back_to_graphsurgeons_own_export() -> None:
    loaded = model.load(small_with_metadata())
    graph = graphsurgeon.to_graphsurgeon(loaded)
    exported = gs.export_onnx(graph)
    assert comparable(exported) != comparable(small_with_metadata())
    kept = exported.SerializeToString(deterministic=True)
    restored = restore_dropped(exported, small_with_metadata())
    assert comparable(restored) == comparable(small_with_metadata())
    assert exported.SerializeToString(deterministic=True) == kept


def small_with_metadata() -> onnx.ModelProto:
    proto = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["" : 17]>
        small (float[N, 2] x, float[2] bias) => (float[N, 2] y)
        <float[2] bias = {1, 2}, float[2] scale = {3, 4}, float[2] unused = {5, 6}>
        { h = Mul(x, scale)
          y = Add(h, bias) }"""
    )
    for message in (proto, proto.graph, *proto.graph.node, *proto.graph.input):
        message.doc_string = "text"
        message.metadata_props.add(key="key", value="value")
    proto.graph.input[0].type.denotation = "IMAGE"
    proto.graph.input[0].type.tensor_type.shape.dim[0].denotation = "DATA_BATCH"
    annotation = proto.graph.quantization_annotation.add(tensor_name="h")
    annotation.quant_parameter_tensor_names.add(key="SCALE_TENSOR", value="unused")
    return proto


def test_what_a_user_removed_does_not_come_back() -> None:
    graph = graphsurgeon.to_graphsurgeon(model.load(small_with_metadata()))
    add = graph.nodes[1]
    graph.outputs = [add.inputs[0]]
    graph.outputs[0].dtype = np.float32
    graph.nodes.remove(add)
    proto = model.to_proto(graphsurgeon.from_graphsurgeon(graph))
    assert [node.op_type for node in proto.graph.node] == ["Mul"]
    assert [tensor.name for tensor in proto.graph.initializer] == ["scale", "unused"]
    assert [info.name for info in proto.graph.input] == ["x"]
    assert proto.graph.node[0].metadata_props[0].value == "value"


def test_a_changed_input_keeps_its_new_type_and_its_metadata() -> None:
    graph = graphsurgeon.to_graphsurgeon(model.load(small_with_metadata()))
    graph.inputs[0].shape = [8, 2]
    info = model.to_proto(graphsurgeon.from_graphsurgeon(graph)).graph.input[0]
    assert [dim.dim_value for dim in info.type.tensor_type.shape.dim] == [8, 2]
    assert info.metadata_props[0].value == "value"


def every_dtype_model() -> onnx.ModelProto:
    tensors = every_dtype()
    nodes = [helper.make_node("Identity", [t.name], [f"{t.name}_out"]) for t in tensors]
    text = helper.make_tensor("text", TensorProto.STRING, [1], [b"a"])
    nodes.append(helper.make_node("Identity", ["text"], ["text_out"]))
    outputs = [
        helper.make_tensor_value_info(f"{t.name}_out", t.data_type, list(t.dims))
        for t in (*tensors, text)
    ]
    graph = helper.make_graph(nodes, "dtypes", [], outputs, [*tensors, text])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 25)], ir_version=13)


@pytest.mark.parametrize("touched", [False, True])
def test_every_dtype_keeps_its_values(touched: bool) -> None:
    graph = graphsurgeon.to_graphsurgeon(model.load(every_dtype_model()))
    if touched:
        for tensor in graph.tensors().values():
            if isinstance(tensor, gs.Constant):
                assert tensor.values is not None
    proto = model.to_proto(graphsurgeon.from_graphsurgeon(graph))
    found = {tensor.name: tensor for tensor in proto.graph.initializer}
    for tensor in every_dtype_model().graph.initializer:
        again = found[tensor.name]
        assert again.data_type == tensor.data_type, tensor.name
        assert numpy_helper.to_array(again).tobytes() == numpy_helper.to_array(tensor).tobytes()


def test_export_dtypes_convert() -> None:
    graph = built_graph(OPSET)
    values = np.float32([[1, 2], [3, 4], [5, 6]])
    graph.nodes[0].inputs[1] = gs.Constant("b", values, export_dtype=TensorProto.BFLOAT16)
    graph.inputs[0].dtype = TensorProto.BFLOAT16
    graph.outputs[0].dtype = TensorProto.BFLOAT16
    (tensor,) = model.to_proto(graphsurgeon.from_graphsurgeon(graph)).graph.initializer
    assert tensor.data_type == TensorProto.BFLOAT16
    np.testing.assert_array_equal(numpy_helper.to_array(tensor), values.astype(ml_dtypes.bfloat16))


def test_subgraphs_do_not_repeat_constants_of_the_outer_graph() -> None:
    proto = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["" : 17]>
        outer (float[2] x, bool flag) => (float[2] y) <float[2] w = {1, 2}>
        { h = Mul(x, w)
          y = If(flag) <
            then_branch = left () => (float[2] a) { a = Mul(h, w) },
            else_branch = right () => (float[2] b) <float[2] v = {3, 4}> { b = Mul(h, v) }> }"""
    )
    graph = graphsurgeon.to_graphsurgeon(model.load(proto))
    again = model.to_proto(graphsurgeon.from_graphsurgeon(graph))
    branches = [item.g for item in again.graph.node[1].attribute]
    assert [[t.name for t in branch.initializer] for branch in branches] == [[], ["v"]]


def test_attributes_of_every_kind() -> None:
    graph = built_graph()
    graph.nodes[1].op = "Custom"
    graph.nodes[1].domain = "custom"
    graph.nodes[1].attrs = {
        "int": 1,
        "float": 0.5,
        "text": "a",
        "ints": [1, 2],
        "none": [],
        "type": np.float16,
        "tensor": gs.Constant("", np.int64([1])),
    }
    node = model.to_proto(graphsurgeon.from_graphsurgeon(graph)).graph.node[1]
    found = {item.name: helper.get_attribute_value(item) for item in node.attribute}
    assert found["type"] == TensorProto.FLOAT16
    assert numpy_helper.to_array(found.pop("tensor")).tolist() == [1]
    assert (found["int"], found["float"], found["text"]) == (1, 0.5, b"a")
    assert (list(found["ints"]), list(found["none"])) == ([1, 2], [])
    graph.nodes[1].attrs["odd"] = object()
    with pytest.raises(ModelError, match="the attribute 'odd' of 'r' \\(Custom\\)"):
        graphsurgeon.from_graphsurgeon(graph)


def test_graphs_that_are_no_models() -> None:
    graph = built_graph()
    graph.inputs[0].dtype = None
    with pytest.raises(ModelError, match="the graph input 'x' has no dtype"):
        graphsurgeon.from_graphsurgeon(graph)
    graph = built_graph()
    graph.nodes.pop(0)
    with pytest.raises(ModelError, match="reads the tensor 'h', which nothing produces"):
        graphsurgeon.from_graphsurgeon(graph)
    graph = built_graph()
    graph.nodes[0].inputs[1] = gs.Constant("w", np.array([1 + 2j], dtype=np.clongdouble))
    with pytest.raises(ModelError, match="no form in ONNX"):
        graphsurgeon.from_graphsurgeon(graph)


def test_models_that_graphsurgeon_cannot_hold() -> None:
    with pytest.raises(ModelError, match="onnx-graphsurgeon cannot import the model"):
        graphsurgeon.to_graphsurgeon(model.load(rich_model()))

"""A model that uses every field of the ONNX format, written in unusual but legal ways."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper

OPSET = 21


def rich_model(ir_version: int = 11) -> onnx.ModelProto:
    """Build the model; every call returns a new, equal one."""
    model = onnx.ModelProto(
        ir_version=ir_version,
        producer_name="somebody",
        producer_version="1.2",
        domain="org.example",
        model_version=7,
        doc_string="the model",
    )
    model.opset_import.add(domain="", version=OPSET)
    model.opset_import.add(domain="custom.domain", version=3)
    model.opset_import.add(domain="local", version=1)
    _metadata(model, b="2", a="1")  # not sorted
    model.graph.CopyFrom(_graph())
    model.functions.append(_function(""))
    model.functions.append(_function("second"))
    if ir_version >= 11:
        configuration = model.configuration.add(name="two", num_devices=2)
        configuration.device.extend(["CPU:0", "CPU:1"])
    training = model.training_info.add()
    training.algorithm.name = "algorithm"
    training.algorithm.node.append(helper.make_node("Identity", ["w"], ["w_next"]))
    training.algorithm.output.append(helper.make_tensor_value_info("w_next", 1, [2, 2]))
    training.update_binding.add(key="w", value="w_next")
    return model


def _metadata(message, **pairs: str) -> None:
    for key, value in pairs.items():
        message.metadata_props.add(key=key, value=value)


def _info(name: str, dims, elem_type: int = TensorProto.FLOAT) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, elem_type, dims)


def _graph() -> onnx.GraphProto:
    graph = onnx.GraphProto(name="rich", doc_string="the graph")
    _metadata(graph, z="graph", y="metadata")
    _inputs(graph)
    _initializers(graph)
    _nodes(graph)
    _outputs(graph)
    _value_info(graph)
    annotation = graph.quantization_annotation.add(tensor_name="h")
    annotation.quant_parameter_tensor_names.add(key="ZERO_POINT_TENSOR", value="zero_point")
    annotation.quant_parameter_tensor_names.add(key="SCALE_TENSOR", value="scale")
    annotation = graph.quantization_annotation.add(tensor_name="w")
    annotation.quant_parameter_tensor_names.add(key="SCALE_TENSOR", value="scale")
    annotation = graph.quantization_annotation.add(tensor_name="nowhere")
    annotation.quant_parameter_tensor_names.add(key="SCALE_TENSOR", value="scale")
    return graph


def _inputs(graph: onnx.GraphProto) -> None:
    x = _info("x", ["N", 2])
    x.doc_string = "the input"
    _metadata(x, unit="volt", kind="signal")
    x.type.denotation = "IMAGE"
    x.type.tensor_type.shape.dim[0].denotation = "DATA_BATCH"
    x.type.tensor_type.shape.dim.add()  # neither value nor name
    del x.type.tensor_type.shape.dim[2]
    maybe = helper.make_value_info(
        "maybe", helper.make_optional_type_proto(helper.make_tensor_type_proto(1, [2]))
    )
    several = helper.make_value_info(
        "several", helper.make_sequence_type_proto(helper.make_tensor_type_proto(1, ["k", None]))
    )
    mapping = onnx.ValueInfoProto(name="mapping", doc_string="from text to tensor")
    mapping.type.CopyFrom(
        helper.make_map_type_proto(TensorProto.STRING, helper.make_tensor_type_proto(1, [1]))
    )
    sparse = helper.make_value_info("sparse_input", helper.make_sparse_tensor_type_proto(1, [2, 2]))
    scalar = _info("scalar", [])
    flag = _info("flag", [], TensorProto.BOOL)
    overridable = _info("overridable", [2])
    graph.input.extend([x, maybe, several, mapping, sparse, scalar, flag, overridable])


def _initializers(graph: onnx.GraphProto) -> None:
    w = helper.make_tensor("w", TensorProto.FLOAT, [2, 2], [1.0, 2.0, 3.0, 4.0])
    w.doc_string = "typed field"
    _metadata(w, second="2", first="1")
    raw = onnx.numpy_helper.from_array(np.arange(600, dtype=np.float32).reshape(300, 2), "raw")
    scale = onnx.numpy_helper.from_array(np.float32(0.5), "scale")
    zero_point = onnx.numpy_helper.from_array(np.uint8(3), "zero_point")
    overridable = helper.make_tensor("overridable", TensorProto.FLOAT, [2], [0.5, 0.25])
    text = helper.make_tensor("text", TensorProto.STRING, [2], [b"a", b"\xff\x00"])
    text.doc_string = "bytes"
    _metadata(text, b="1", a="2")
    empty = helper.make_tensor("empty", TensorProto.FLOAT, [0, 3], [])
    graph.initializer.extend([w, raw, scale, zero_point, overridable, text, empty])
    graph.initializer.extend(every_dtype())
    values = helper.make_tensor("sparse_flat", TensorProto.FLOAT, [2], [5.0, 6.0])
    flat = helper.make_tensor("", TensorProto.INT64, [2], [0, 3])
    graph.sparse_initializer.append(helper.make_sparse_tensor(values, flat, [2, 2]))
    values = helper.make_tensor("sparse_pairs", TensorProto.FLOAT, [2], [7.0, 8.0])
    pairs = helper.make_tensor("", TensorProto.INT64, [2, 2], [0, 1, 1, 0])
    graph.sparse_initializer.append(helper.make_sparse_tensor(values, pairs, [2, 2]))


def every_dtype() -> list[onnx.TensorProto]:
    """One tensor of 2 x 2 elements per element type, in typed fields and as raw data."""
    tensors = []
    for dtype in sorted(TensorProto.DataType.values()):
        if dtype in (TensorProto.UNDEFINED, TensorProto.STRING):
            continue
        name = TensorProto.DataType.Name(dtype).lower()
        if "6E" in name.upper():
            continue  # packed three in four bytes; the helper has no typed form of it
        typed = helper.make_tensor(f"typed_{name}", dtype, [2, 2], [0, 1, 1, 0])
        raw = onnx.TensorProto(name=f"raw_{name}", data_type=dtype, dims=[2, 2])
        bits = _bits(dtype)
        raw.raw_data = (
            bytes(range(1, 4 * bits // 8 + 1)) if dtype != TensorProto.BOOL else b"\1\0" * 2
        )
        tensors += [typed, raw]
    return tensors


def _bits(dtype: int) -> int:
    import onnx_ir

    return onnx_ir.DataType(dtype).bitwidth


def _nodes(graph: onnx.GraphProto) -> None:
    gemm = helper.make_node("MatMul", ["x", "w"], ["h"], name="", doc_string="a node")
    gemm.name = ""  # set and empty
    gemm.domain = ""
    _metadata(gemm, scope="layer", namespace="model/layer")
    if_node = helper.make_node(
        "If", ["flag"], ["branch"], then_branch=_branch("then"), else_branch=_branch("else")
    )
    dropout = onnx.NodeProto(op_type="Dropout", input=["branch", "", ""], output=["dropped", ""])
    constant = helper.make_node(
        "Constant", [], ["constant"], value=helper.make_tensor("c", TensorProto.FLOAT, [1], [1.0])
    )
    constant.attribute[0].doc_string = "an attribute"
    sparse = helper.make_node("Constant", [], ["sparse_constant"])
    sparse.attribute.add(name="sparse_value", type=onnx.AttributeProto.SPARSE_TENSOR)
    sparse.attribute[0].sparse_tensor.CopyFrom(
        helper.make_sparse_tensor(
            helper.make_tensor("", TensorProto.FLOAT, [1], [2.0]),
            helper.make_tensor("", TensorProto.INT64, [1], [0]),
            [2],
        )
    )
    local = helper.make_node("Scale", ["dropped"], ["scaled"], domain="local", overload="second")
    custom = _custom_node()
    add_sparse = helper.make_node("Add", ["sparse_flat", "sparse_pairs"], ["sparse_sum"])
    sharded = helper.make_node("Relu", ["scaled"], ["y"], name="last")
    device = sharded.device_configurations.add(configuration_id="two", pipeline_stage=1)
    spec = device.sharding_spec.add(tensor_name="y")
    spec.device.extend([0, 1])
    spec.sharded_dim.add(axis=0).simple_sharding.add(num_shards=2, dim_param="N")
    graph.node.extend(
        [gemm, if_node, dropout, constant, sparse, local, custom, add_sparse, sharded]
    )


def _branch(name: str) -> onnx.GraphProto:
    """A subgraph that reads the outer graph and has initializers, sparse ones too, of its own."""
    graph = onnx.GraphProto(name=name, doc_string=f"the {name} branch")
    _metadata(graph, b=name, a=name)
    graph.initializer.append(
        helper.make_tensor(f"{name}_w", TensorProto.FLOAT, [2, 2], [1.0, 0.0, 0.0, 1.0])
    )
    values = helper.make_tensor(f"{name}_sparse", TensorProto.FLOAT, [1], [9.0])
    indices = helper.make_tensor("", TensorProto.INT64, [1], [2])
    graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, [2, 2]))
    graph.node.append(helper.make_node("MatMul", ["h", f"{name}_w"], [f"{name}_1"]))
    graph.node.append(helper.make_node("MatMul", [f"{name}_1", f"{name}_sparse"], [f"{name}_2"]))
    graph.output.append(_info(f"{name}_2", ["N", 2]))
    graph.value_info.append(_info(f"{name}_1", ["N", 2]))
    graph.quantization_annotation.add(tensor_name=f"{name}_w")
    return graph


def _custom_node() -> onnx.NodeProto:
    """Every type of attribute, in no order."""
    node = helper.make_node("Custom", ["x", "mapping"], ["z", "z_map"], domain="custom.domain")
    add = node.attribute.add
    kind = onnx.AttributeProto
    add(name="zz_int", type=kind.INT, i=-3)
    add(name="float", type=kind.FLOAT, f=0.1)
    add(name="nan", type=kind.FLOAT, f=float("nan"))
    add(name="text", type=kind.STRING, s="é".encode())
    add(name="bytes", type=kind.STRING, s=b"\xff\xfe")
    add(name="ints", type=kind.INTS, ints=[1, 2])
    add(name="no_ints", type=kind.INTS)
    add(name="floats", type=kind.FLOATS, floats=[0.5, 0.25])
    add(name="strings", type=kind.STRINGS, strings=[b"a", b"b"])
    add(name="byte_strings", type=kind.STRINGS, strings=[b"\xff"])
    add(name="tensors", type=kind.TENSORS).tensors.extend(
        [
            helper.make_tensor("t", TensorProto.FLOAT, [1], [1.0]),
            helper.make_tensor("", TensorProto.STRING, [1], [b"s"]),
        ]
    )
    add(name="graphs", type=kind.GRAPHS).graphs.extend([_branch("one"), _branch("two")])
    tensor_type = helper.make_tensor_type_proto(TensorProto.FLOAT, ["N", None, 3])
    add(name="type", type=kind.TYPE_PROTO).tp.CopyFrom(tensor_type)
    add(name="types", type=kind.TYPE_PROTOS).type_protos.append(tensor_type)
    add(name="map_type", type=kind.TYPE_PROTO).tp.CopyFrom(
        helper.make_map_type_proto(TensorProto.INT64, tensor_type)
    )
    return node


def _outputs(graph: onnx.GraphProto) -> None:
    y = _info("y", ["N", 2])
    y.doc_string = "the output"
    _metadata(y, unit="volt", kind="signal")
    z_map = onnx.ValueInfoProto(name="z_map")
    z_map.type.sequence_type.elem_type.CopyFrom(
        helper.make_map_type_proto(TensorProto.INT64, helper.make_tensor_type_proto(1, []))
    )
    raw = _info("raw", [300, 2])  # an initializer that is an output
    graph.output.extend([y, z_map, raw, _info("scalar", []), _info("sparse_sum", [2, 2])])


def _value_info(graph: onnx.GraphProto) -> None:
    """In no order; of an initializer, of an output, of nothing at all, and with unknown dims."""
    dropped = _info("dropped", ["N", 2])
    dropped.doc_string = ""  # set and empty
    h = _info("h", [None, 2])
    h.doc_string = "hidden"
    _metadata(h, b="1", a="2")
    untyped = onnx.ValueInfoProto(name="branch")
    graph.value_info.extend(
        [dropped, _info("y", ["N", 2]), _info("w", [2, 2]), h, untyped, _info("stale", [1])]
    )


def _function(overload: str) -> onnx.FunctionProto:
    function = helper.make_function(
        "local",
        "Scale",
        ["a"],
        ["c"],
        [
            helper.make_node("Constant", [], ["factor"], value_float=2.0),
            helper.make_node("Mul", ["a", "factor"], ["b"]),
            helper.make_node("LeakyRelu", ["b"], ["c"]),
        ],
        [helper.make_opsetid("", OPSET)],
        attributes=["required"],
        attribute_protos=[helper.make_attribute("alpha", 0.5)],
    )
    reference = function.node[2].attribute.add(name="alpha", type=onnx.AttributeProto.FLOAT)
    reference.ref_attr_name = "alpha"
    function.doc_string = "a function"
    function.overload = overload
    _metadata(function, b="1", a="2")
    function.value_info.extend([_info("c", ["N", 2]), _info("b", ["N", 2])])
    _metadata(function.node[1], why="test")
    return function

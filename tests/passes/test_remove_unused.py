"""What nobody reads goes; what a subgraph, an annotation or the interface reads stays."""

from __future__ import annotations

import numpy as np
import onnx
from builders import ModelBuilder, assert_same_function, fold, op_types
from onnx import TensorProto, helper


def cleaned(proto: onnx.ModelProto) -> onnx.ModelProto:
    folded, _ = fold(proto, "remove_unused")
    assert_same_function(proto, folded)
    again, statistics = fold(folded, "remove_unused")
    assert again == folded
    assert statistics["remove_unused"].applied == 0
    return folded


def names(proto: onnx.ModelProto) -> set[str]:
    return {tensor.name for tensor in proto.graph.initializer}


def test_a_branch_that_leads_nowhere_goes_with_its_weights() -> None:
    build = ModelBuilder([1, 2, 6, 5])
    y = build.conv("x", 2, 3, out="y")
    build.op("Relu", build.conv(build.op("Neg", y), 4, 3))
    build.constant([1.0], "loose")
    folded = cleaned(build.model(y))
    assert op_types(folded) == ["Conv"]
    assert names(folded) == set(folded.graph.node[0].input[1:])


def test_one_output_of_several_that_is_read_is_enough() -> None:
    build = ModelBuilder([1, 2, 6, 5])
    build.op("Split", "x", build.constant([1, 1], dtype=np.int64), outputs=["a", "b"], axis=1)
    assert op_types(cleaned(build.model(build.op("Relu", "b")))) == ["Split", "Relu"]


def test_weights_that_callers_may_replace_stay() -> None:
    build = ModelBuilder([1, 2, 6, 5])
    y = build.op("Relu", "x")
    build.constant([1.0], "default")
    info = helper.make_tensor_value_info("default", TensorProto.FLOAT, [1])
    assert names(cleaned(build.model(y, more_inputs=[info]))) == {"default"}


def test_what_a_subgraph_reads_stays() -> None:
    build = ModelBuilder([1, 2, 6, 5])
    inner, weight = build.op("Neg", "x"), build.constant(2.0)
    branches = [
        helper.make_graph(
            [helper.make_node(op, [inner, weight], [name])],
            name,
            [],
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 2, 6, 5])],
        )
        for op, name in (("Mul", "then"), ("Add", "else"))
    ]
    condition = build.constant(True, dtype=bool)
    y = build.op("If", condition, then_branch=branches[0], else_branch=branches[1])
    folded = cleaned(build.model(y))
    assert op_types(folded) == ["Neg", "If"]
    assert names(folded) == {weight, condition}


def test_operators_of_other_domains_may_have_effects() -> None:
    build = ModelBuilder([1, 2, 6, 5])
    model = build.model(build.op("Relu", "x"))
    model.graph.node.add(op_type="Print", domain="acme", input=["x"], output=["z"])
    model.opset_import.add(domain="acme", version=1)
    assert op_types(fold(model, "remove_unused")[0]) == ["Relu", "Print"]


def test_parameters_that_an_annotation_names_stay() -> None:
    build = ModelBuilder([1, 2, 6, 5])
    y = build.op("Relu", "x", out="y")
    build.constant(0.5, "scale")
    model = build.model(y)
    entry = model.graph.quantization_annotation.add(tensor_name="y")
    entry.quant_parameter_tensor_names.add(key="SCALE_TENSOR", value="scale")
    assert names(cleaned(model)) == {"scale"}


def test_training_information_keeps_all_weights() -> None:
    build = ModelBuilder([1, 2, 6, 5])
    y = build.op("Relu", "x", out="y")
    build.constant(0.5, "momentum")
    model = build.model(y)
    model.training_info.add().update_binding.add(key="momentum", value="y")
    assert names(fold(model, "remove_unused")[0]) == {"momentum"}

"""Every shape that a model can have is survived: fields, interfaces, storage, odd but legal forms.

Versions and element types have files of their own, and so have subgraphs (test_scopes).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from builders import ModelBuilder, nonzero, op_types, random_input
from onnx import TensorProto, helper, numpy_helper
from survivors import (
    assert_same_fields,
    assert_survives,
    optimized_twice,
    ran,
    serialized,
    through_files,
)

import graphfold
from graphfold.errors import ModelError

FLOAT = TensorProto.FLOAT


def builder(**options: Any) -> ModelBuilder:
    """A builder that holds Conv-BatchNormalization from `x` to `normed`."""
    build = ModelBuilder([1, 4, 6, 6], **options)
    build.norm(build.conv("x", 4, 3, pad=1, out="convolved"), out="normed")
    return build


def model_of(build: ModelBuilder, *outputs: str, **options: Any) -> onnx.ModelProto:
    return build.model(*(outputs or ("normed",)), **options)


def info(name: str, shape: Any, kind: int = FLOAT) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, shape)


def initializers(model: onnx.ModelProto) -> dict[str, onnx.TensorProto]:
    return {tensor.name: tensor for tensor in model.graph.initializer}


def survives(model: onnx.ModelProto, **options: Any) -> onnx.ModelProto:
    proto: onnx.ModelProto = assert_survives(model, [random_input(model)], **options).model
    return proto


# --- operators of others ------------------------------------------------------------------------


def test_operators_of_unknown_domains_stay_between_folded_ones(tmp_path: Path) -> None:
    build = builder()
    middle = build.op("Mystery", "normed", domain="vendor", level=3, table=[1.0, 2.0])
    build.norm(build.conv(middle, 4, 1), out="y")
    build.ir_version = 8
    graph = helper.make_graph(build.nodes, "g", build.inputs, [info("y", None)], build.initializers)
    model = helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid("", 17), helper.make_opsetid("vendor", 2)],
        ir_version=8,
    )
    mystery = next(node for node in model.graph.node if node.domain == "vendor")
    result = optimized_twice(model)
    assert op_types(result.model) == ["Conv", "Mystery", "Conv"]
    kept = next(node for node in result.model.graph.node if node.domain == "vendor")
    assert kept == mystery
    path = tmp_path / "m.onnx"
    onnx.save(model, path)
    out, document = through_files(path)
    assert op_types(onnx.load(out)) == ["Conv", "Mystery", "Conv"]
    assert document["verification"] is None
    assert "vendor" in document["reason"] or "Mystery" in document["reason"]


# --- storage ------------------------------------------------------------------------------------


def with_sparse(linear_indices: bool) -> onnx.ModelProto:
    """A model whose first weight is stored sparse."""
    model = model_of(builder())
    tensor = model.graph.initializer[0]
    dense = numpy_helper.to_array(tensor)
    dense = np.where(np.abs(dense) > np.median(np.abs(dense)), dense, 0).astype(np.float32)
    places = np.nonzero(dense.reshape(-1))[0] if linear_indices else np.argwhere(dense)
    values = dense[dense != 0]
    sparse = onnx.SparseTensorProto(dims=dense.shape)
    sparse.values.CopyFrom(numpy_helper.from_array(values, tensor.name))
    sparse.indices.CopyFrom(numpy_helper.from_array(places.astype(np.int64), "indices"))
    del model.graph.initializer[0]
    model.graph.sparse_initializer.append(sparse)
    return model


@pytest.mark.parametrize("linear_indices", [True, False])
def test_sparse_initializers_are_folded(linear_indices: bool) -> None:
    model = with_sparse(linear_indices)
    result = optimized_twice(model)
    assert op_types(result.model) == ["Conv"]
    if linear_indices:  # the other form this runtime reads for two axes only
        assert_survives(model, [random_input(model)])


def test_a_sparse_initializer_that_nothing_folds_stays_sparse() -> None:
    model = with_sparse(True)
    name = model.graph.sparse_initializer[0].values.name
    model.graph.node.append(helper.make_node("Sigmoid", [name], ["kept"], name="kept"))
    model.graph.output.append(info("kept", [4, 4, 3, 3]))
    found = survives(model)
    assert list(found.graph.sparse_initializer) == list(model.graph.sparse_initializer)


def external(model: onnx.ModelProto, path: Path, location: str) -> onnx.ModelProto:
    """Save with every initializer in a data file, at odd offsets; returns what was in memory."""
    memory = onnx.ModelProto()
    memory.CopyFrom(model)
    data = path.parent / location
    data.parent.mkdir(parents=True, exist_ok=True)
    with data.open("wb") as file:
        file.write(b"left in front")
        for tensor in model.graph.initializer:
            raw = numpy_helper.to_array(tensor).tobytes()
            offset = file.tell()
            file.write(raw + b"gap")
            for field in ("raw_data", "float_data", "int64_data"):
                tensor.ClearField(field)
            tensor.data_location = TensorProto.EXTERNAL
            tensor.external_data.add(key="location", value=location)
            tensor.external_data.add(key="offset", value=str(offset))
            tensor.external_data.add(key="length", value=str(len(raw)))
    path.write_bytes(model.SerializeToString())
    return memory


@pytest.mark.parametrize("location", ["weights.bin", "sub/folder/weights.bin"])
def test_external_data_at_any_place_of_the_folder(tmp_path: Path, location: str) -> None:
    path = tmp_path / "m.onnx"
    memory = external(model_of(builder()), path, location)
    out, document = through_files(path)
    assert document["verification"]["passed"]
    feed = random_input(memory)
    np.testing.assert_allclose(ran(out, feed)[0], ran(memory, feed)[0], atol=1e-4)
    assert op_types(onnx.load(out)) == ["Conv"]
    first = {p.name: p.read_bytes() for p in tmp_path.glob("m.out*")}
    through_files(path)
    assert {p.name: p.read_bytes() for p in tmp_path.glob("m.out*")} == first
    optimized_twice(path)


def test_one_external_range_that_two_initializers_share(tmp_path: Path) -> None:
    build = builder()
    build.conv("normed", 4, 1, weight=build.constant(nonzero(build.rng, 4, 4, 1, 1), "one"))
    build.op("Relu", build.nodes[-1].output[0], out="between")
    build.conv("between", 4, 1, weight=build.constant(np.zeros((4, 4, 1, 1)), "two"), out="y")
    model = model_of(build, "y")
    path = tmp_path / "m.onnx"
    external(model, path, "w.bin")
    for tensor in model.graph.initializer:
        if tensor.name == "two":
            one = next(other for other in model.graph.initializer if other.name == "one")
            del tensor.external_data[:]
            tensor.external_data.extend(one.external_data)
    path.write_bytes(model.SerializeToString())
    out, document = through_files(path)
    assert document["verification"]["passed"]
    feed = random_input(onnx.load(path))
    np.testing.assert_allclose(ran(out, feed)[0], ran(path, feed)[0], atol=1e-4)


# --- initializers -------------------------------------------------------------------------------


def test_an_initializer_that_two_convolutions_share() -> None:
    build = builder()
    weight = build.nodes[0].input[1]
    build.op("Relu", "normed", out="active")
    build.conv("active", 4, 3, pad=1, weight=weight, out="y")
    found = survives(model_of(build, "y"))
    assert op_types(found) == ["Conv", "Relu", "Conv"]
    assert weight in initializers(found)


@pytest.mark.parametrize("roles", ["input", "output", "both"])
def test_an_initializer_that_is_part_of_the_interface(roles: str) -> None:
    build = builder()
    build.op("Relu", "normed", out="active")
    build.norm(build.conv("active", 4, 1), out="y")
    model = model_of(build, "y")
    weight = model.graph.node[0].input[1]
    shape = list(initializers(model)[weight].dims)
    if roles != "output":
        model.graph.input.append(info(weight, shape))
    if roles != "input":
        model.graph.output.append(info(weight, shape))
    found = survives(model)
    assert weight in initializers(found)
    # What callers may replace is no constant; what they may read only stays.
    assert op_types(found).count("BatchNormalization") == (0 if roles == "output" else 1)
    if roles != "output":
        feed = random_input(model) | {weight: np.ones(shape, np.float32)}
        np.testing.assert_allclose(ran(found, feed)[0], ran(model, feed)[0], atol=1e-4)


def test_an_output_that_is_an_input() -> None:
    model = model_of(builder())
    model.graph.output.append(info("x", [1, 4, 6, 6]))
    assert op_types(survives(model)) == ["Conv"]


def test_a_model_without_nodes() -> None:
    graph = helper.make_graph([], "g", [info("x", [2])], [info("x", [2])])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    assert serialized(survives(model, untouched_ok=True)) == serialized(model)


def test_inputs_and_outputs_that_nothing_needs_stay() -> None:
    model = model_of(builder(), more_inputs=[info("spare", ["any", 3])])
    feed = random_input(model, {"any": 2})
    found = assert_survives(model, [feed]).model
    assert [item.name for item in found.graph.input] == ["x", "spare"]


# --- names --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["", "same"])
def test_nodes_without_names_and_with_the_same_name(name: str) -> None:
    build = builder()
    build.op("Relu", "normed", out="active")
    build.norm(build.conv("active", 4, 3), out="y")
    model = model_of(build, "y")
    for node in model.graph.node:
        node.name = name
    # This runtime loads no network with a name twice: it is folded all the same.
    result = optimized_twice(model)
    assert op_types(result.model) == ["Conv", "Relu", "Conv"]
    assert result.model.graph.node[1] == model.graph.node[2]
    assert result.report.verification is not None
    assert result.report.verification.passed is (True if name == "" else None)


def test_nodes_out_of_order_are_sorted(tmp_path: Path) -> None:
    model = model_of(builder())
    nodes = list(model.graph.node)[::-1]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    result = graphfold.optimize(model)
    assert result.report.verification is not None
    assert result.report.verification.passed
    assert op_types(result.model) == ["Conv"]
    path = tmp_path / "m.onnx"
    path.write_bytes(model.SerializeToString())
    out, _ = through_files(path)
    onnx.checker.check_model(onnx.load(out))


def test_a_cycle_is_a_clear_error() -> None:
    model = model_of(builder())
    model.graph.node[0].input[0] = "normed"
    with pytest.raises(ModelError, match="cycle"):
        graphfold.optimize(model)


# --- shapes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape", [["N", 4, "H", "W"], [None, 4, None, None], ["N", 4, 6, 6], [1, "C", 6, 6]]
)
def test_open_sizes(shape: list[Any]) -> None:
    build = ModelBuilder(shape)
    build._channels["x"] = 4
    build.norm(build.conv("x", 4, 3, pad=1), out="normed")
    model = model_of(build)
    feeds = [{"x": np.ones((n, 4, s, s), np.float32)} for n, s in ((1, 6), (3, 6))]
    if shape[0] == 1:
        feeds = feeds[:1]
    assert op_types(assert_survives(model, feeds).model) == ["Conv"]


def test_a_batch_of_none() -> None:
    build = ModelBuilder(["N", 4, 6, 6])
    build.norm(build.conv("x", 4, 3, pad=1), out="normed")
    model = model_of(build)
    empty = {"x": np.zeros((0, 4, 6, 6), np.float32)}
    found = assert_survives(model, [random_input(model, {"N": 2}), empty]).model
    assert ran(found, empty)[0].shape == (0, 4, 6, 6)


def test_a_size_of_zero_in_the_model() -> None:
    build = ModelBuilder([0, 4, 6, 6])
    build.norm(build.conv("x", 4, 3, pad=1), out="normed")
    empty = build.constant(np.zeros((0, 4, 6, 6)), "empty")
    build.op("Concat", "normed", empty, axis=0, out="y")
    feed = {"x": np.zeros((0, 4, 6, 6), np.float32)}
    assert op_types(assert_survives(model_of(build, "y"), [feed]).model)[0] == "Conv"


def test_scalars() -> None:
    build = builder()
    build.op("Mul", "normed", build.constant(0.5), out="halved")
    total = build.op("ReduceSum", "halved", keepdims=0)
    build.op("Add", total, build.constant(2.0), out="y")
    found = survives(model_of(build, "y"))
    assert op_types(found) == ["Conv", "ReduceSum", "Add"]


def test_a_tensor_of_unknown_rank() -> None:
    model = model_of(builder())
    model.graph.input[0].type.tensor_type.ClearField("shape")
    del model.graph.value_info[:]
    model.graph.output[0].type.tensor_type.ClearField("shape")
    feed = {"x": np.ones((1, 4, 6, 6), np.float32)}
    result = assert_survives(model, [feed], untouched_ok=True, check=False)
    assert op_types(result.model) == ["Conv"]


# --- types that are no tensors ------------------------------------------------------------------


def test_sequences() -> None:
    build = builder()
    build.op("SequenceConstruct", "normed", "x", out="pair")
    build.op("SequenceAt", "pair", build.constant(0, dtype=np.int64), out="first")
    build.op("Relu", "first", out="y")
    graph = helper.make_graph(
        build.nodes,
        "g",
        build.inputs,
        [
            info("y", [1, 4, 6, 6]),
            helper.make_tensor_sequence_value_info("pair", FLOAT, [1, 4, 6, 6]),
        ],
        build.initializers,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    assert "BatchNormalization" not in op_types(survives(model))


def test_optional_inputs_and_sequences_of_inputs() -> None:
    build = builder()
    tensor = helper.make_tensor_type_proto(FLOAT, [1, 4, 6, 6])
    optional = helper.make_optional_type_proto(tensor)
    sequence = helper.make_sequence_type_proto(tensor)
    build.op("OptionalHasElement", "maybe", out="given")
    build.op("SequenceLength", "several", out="count")
    graph = helper.make_graph(
        build.nodes,
        "g",
        [
            *build.inputs,
            helper.make_value_info("maybe", optional),
            helper.make_value_info("several", sequence),
        ],
        [
            info("normed", [1, 4, 6, 6]),
            info("given", [], TensorProto.BOOL),
            info("count", [], TensorProto.INT64),
        ],
        build.initializers,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    result = optimized_twice(model)
    assert op_types(result.model)[0] == "Conv"
    assert "BatchNormalization" not in op_types(result.model)
    verification = result.report.verification
    assert verification is not None
    assert verification.reason is not None
    assert "no inputs can be made" in verification.reason


def test_empty_optional_inputs_and_outputs() -> None:
    build = builder()
    build.op("Clip", "normed", "", build.constant(0.5), out="capped")
    sizes = build.constant([1, 4, 12, 12], dtype=np.int64)
    build.op("Resize", "capped", "", "", sizes, mode="nearest", out="larger")
    build.op("Dropout", "larger", outputs=["dropped", ""])
    build.op("Conv", "dropped", build.constant(nonzero(build.rng, 2, 4, 1, 1)), "", out="y")
    found = survives(model_of(build, "y"))
    assert op_types(found) == ["Conv", "Clip", "Resize", "Conv"]
    clip = found.graph.node[1]
    assert clip.input[1] == ""


# --- fields -------------------------------------------------------------------------------------


def annotated() -> onnx.ModelProto:
    """Documentation, metadata, denotations and annotations at every place that has them."""
    build = builder()
    build.op("Relu", "normed", out="active")
    build.op("Sigmoid", "active", out="y")
    model = model_of(build, "y")
    graph, node = model.graph, model.graph.node[-1]
    model.producer_name, model.producer_version, model.domain = "maker", "1.0", "org.example"
    model.model_version, model.doc_string, graph.doc_string = 7, "the model", "the graph"
    node.doc_string = "the activation"
    for holder in (model, graph, node, graph.input[0], graph.output[0]):
        holder.metadata_props.add(key="origin", value="somewhere")
    graph.input[0].doc_string, graph.output[0].doc_string = "an image", "a map"
    graph.input[0].type.denotation = "IMAGE"
    graph.input[0].type.tensor_type.shape.dim[1].denotation = "DATA_CHANNEL"
    graph.value_info.add().CopyFrom(info("active", [1, 4, 6, 6]))
    graph.value_info[-1].doc_string = "after the first"
    annotation = graph.quantization_annotation.add(tensor_name="active")
    annotation.quant_parameter_tensor_names.add(key="SCALE_TENSOR", value="scale")
    graph.initializer.append(numpy_helper.from_array(np.float32(0.1), "scale"))
    return model


def test_every_field_of_what_remains_is_kept() -> None:
    model = annotated()
    found = survives(model)
    assert op_types(found) == ["Conv", "Relu", "Sigmoid"]
    assert found.graph.node[-1] == model.graph.node[-1]
    assert list(found.graph.quantization_annotation) == list(model.graph.quantization_annotation)
    assert "scale" in initializers(found)
    assert model.graph.value_info[-1] in list(found.graph.value_info)


def test_training_information_keeps_what_it_names() -> None:
    model = model_of(builder())
    weight = model.graph.node[0].input[1]
    training = model.training_info.add()
    training.algorithm.name = "algorithm"
    training.algorithm.node.append(helper.make_node("Identity", [weight], ["next"]))
    training.algorithm.output.append(info("next", list(initializers(model)[weight].dims)))
    training.update_binding.add(key=weight, value="next")
    result = optimized_twice(model)
    assert list(result.model.training_info) == list(model.training_info)
    assert set(initializers(model)) <= set(initializers(result.model))
    assert_same_fields(model, result.model)


CHANGES: dict[str, Callable[[onnx.ModelProto], object]] = {
    "no producer": lambda model: model.ClearField("producer_name"),
    "no graph name": lambda model: model.graph.ClearField("name"),
    "no output shape": lambda m: m.graph.output[0].type.tensor_type.ClearField("shape"),
    "no output type": lambda model: model.graph.output[0].ClearField("type"),
    "unused opset": lambda model: model.opset_import.add(domain="ai.onnx.ml", version=3),
    "value_info of nothing": lambda m: m.graph.value_info.add().CopyFrom(info("ghost", [1])),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_runtimes_do_not_ask_for_is_not_asked_for(change: str) -> None:
    model = model_of(builder())
    CHANGES[change](model)
    found = survives(model, check=False)
    assert op_types(found) == ["Conv"]

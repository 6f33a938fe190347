"""Times of blocks: which nodes belong together in several models, and what is counted for each."""

from __future__ import annotations

import json

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import small_models as small
from builders import ModelBuilder

import graphfold
from graphfold.block_spans import block_spans
from graphfold.calibration import blocks
from graphfold.cli import main
from graphfold.errors import UsageError
from graphfold.graph import Graph
from graphfold.model import load


def network() -> onnx.ModelProto:
    """A stem, a residual block, two convolutions with an activation each, and a head."""
    build = ModelBuilder(("N", 3, 16, 16))
    x = build.op("Relu", build.norm(build.conv("x", 8, 3, pad=1)), out="stem")
    inner = build.op("Relu", build.conv(x, 8, 3, pad=1))
    x = build.op("Add", build.conv(inner, 8, 3, pad=1), x, out="joined")
    x = build.op("Relu", build.conv(x, 8, 3, pad=1, out="a_in"), out="a")
    x = build.op("Relu", build.conv(x, 8, 3, pad=1, out="b_in"), out="b")
    return build.model(build.conv(x, 4, 1, out="y"))


def merged() -> onnx.ModelProto:
    """The same network with the activation between the two convolutions removed, and folded."""
    plan = {"graphfold_plan": 1, "segments": [{"input": "joined", "output": "b_in"}]}
    plan["segments"][0]["boundary"] = "hoist"
    return graphfold.optimize(network(), plan).model


def spans(*protos: onnx.ModelProto):
    names = [f"m{number}" for number in range(len(protos))]
    return block_spans([Graph(load(proto)) for proto in protos], names)


def test_the_blocks_of_one_model_hold_every_node_once():
    proto = network()
    found = spans(proto)
    assert [(each.input, each.output) for each in found] == [
        (None, "stem"),
        ("stem", "joined"),
        ("joined", "a"),
        ("a", "b"),
        ("b", "y"),
    ]
    assert [each.kinds for each in found[:2]] == [("conv",), ("residual",)]
    inside = [name for each in found for name in each.nodes[0]]
    assert sorted(inside) == sorted(node.output[0] for node in proto.graph.node)
    assert {"joined"} <= found[1].nodes[0]


def test_what_a_fold_merged_is_one_block():
    found = spans(network(), merged())
    assert [(each.output, len(each.kinds)) for each in found] == [
        ("stem", 1),
        ("joined", 1),
        ("b", 2),
        ("y", 1),
    ]
    assert found[2].nodes[0] == {"a_in", "a", "b_in", "b"}
    assert {"b_in", "b"} <= found[2].nodes[1]
    assert "a" not in found[2].nodes[1]


def test_a_boundary_behind_an_activation_that_went_is_the_tensor_before_it():
    plan = {"graphfold_plan": 1, "remove_activations": ["a"]}
    found = spans(network(), graphfold.optimize(network(), plan).model)
    assert [each.output for each in found] == ["stem", "joined", "a", "b", "y"]
    assert "a_in" in found[2].nodes[1]


def test_large_blocks_are_read_by_their_steps():
    """A skip around everything, as in a U-Net: nothing else is one block."""
    build = ModelBuilder(("N", 8, 8, 8))
    first = x = build.op("Relu", build.conv("x", 8, 3, pad=1), out="first")
    for number in range(10):
        x = build.op("Relu", build.conv(x, 8, 3, pad=1), out=f"step{number}")
    build.op("Concat", x, first, axis=1, out="both", channels=16)
    found = spans(build.model(build.conv("both", 4, 1, out="y")))
    assert {f"step{number}" for number in range(8)} <= {each.output for each in found}
    assert found[3].kinds == ("step",)


def test_models_without_a_tensor_in_common_are_an_error():
    other = ModelBuilder(("N", 3, 16, 16))
    x = other.op("Relu", other.conv("x", 4, 3, pad=1), out="stam")
    with pytest.raises(UsageError, match=r"m0 is computed in m1.*'stem', did you mean 'stam'"):
        spans(network(), other.model(other.conv(x, 4, 1, out="y")))


def test_renaming_changes_no_result():
    proto = small_loop()
    model = load(proto)
    renamed = blocks.named_by_block(model, spans(proto), 0)
    feed = {"x": np.random.default_rng(0).standard_normal((1, 3, 8, 8)).astype(np.float32)}
    results = [
        ort.InferenceSession(data, providers=[blocks.CPU]).run(None, feed)[0]
        for data in (proto.SerializeToString(), renamed)
    ]
    np.testing.assert_array_equal(*results)
    names = {node.name for node in onnx.load_from_string(renamed).graph.node}
    assert all(name.startswith("graphfold.block") for name in names)


def small_loop() -> onnx.ModelProto:
    """A branch reads a tensor of the graph around it."""
    helper = onnx.helper
    out = helper.make_tensor_value_info("then_y", onnx.TensorProto.FLOAT, None)
    other = helper.make_tensor_value_info("else_y", onnx.TensorProto.FLOAT, None)
    then = helper.make_graph([helper.make_node("Relu", ["c"], ["then_y"])], "then", [], [out])
    least = helper.make_graph([helper.make_node("Neg", ["c"], ["else_y"])], "else", [], [other])
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"]),
        helper.make_node("ReduceSum", ["c"], ["s"], keepdims=0),
        helper.make_node("Greater", ["s", "zero"], ["is"]),
        helper.make_node("If", ["is"], ["y"], then_branch=then, else_branch=least),
    ]
    constants = {"w": small.weight(4, 3, 3, 3), "zero": np.float32(0)}
    return small.build(nodes, {"x": [1, 3, 8, 8]}, ["y"], constants)


def event(name: str, start: int, duration: int, operator: str = "Conv") -> dict:
    args = {"op_name": operator}
    return {"name": f"{name}_kernel_time", "ts": start, "dur": duration, "args": args}


def test_kernels_are_counted_for_their_blocks():
    first, second = "graphfold.block0/node1", "graphfold.block1/t_nchwc"
    events = [
        event("reorder", 0, 1000, "ReorderInput"),
        event(first, 1000, 4000),
        event("reorder_2", 5000, 500, "ReorderOutput"),
        event("made_by_the_runtime", 5500, 250, "Transpose"),
        event(second, 6000, 8000, "If"),
        event("inside", 6500, 7000, "Relu"),
    ]
    found = blocks.times_of_run(events)
    assert found == {0: pytest.approx(5.5, abs=0.002), 1: pytest.approx(8.25, abs=0.002)}


def test_ratios_are_those_of_the_same_round():
    span = spans(network())[0]
    # The machine was half as fast in the second half.
    found = blocks._block_time(span, [[4.0, 4.0, 8.0, 8.0], [2.0, 2.0, 4.0, 4.0], [0.0] * 4])
    assert found.speedups == (1.0, 2.0, None)
    assert found.speedup_spreads == (0.0, 0.0, None)
    assert found.medians == (6.0, 3.0, 0.0)


def test_every_block_of_both_models_is_timed():
    options = {"names": ["now", "then"], "rounds": 3, "seconds": 0.1, "blocks": True}
    stages = []
    found = graphfold.bench(
        [network(), merged()], **options, progress=lambda *call: stages.append(call[0])
    )
    times = found.blocks
    assert [block.output for block in times.blocks] == ["stem", "joined", "b", "y"]
    assert all(median > 0 for block in times.blocks for median in block.medians)
    total = sum(block.medians[0] for block in times.blocks)
    assert total == pytest.approx(times.whole.medians[0], rel=0.5)
    assert "measuring blocks" in stages
    table = found.tables()[-1]
    assert table.columns[3] == "now, ms"
    assert [row[0] for row in table.rows] == ["stem", "joined", "b", "y", "all kernels"]
    assert table.rows[2][1] == "2 x conv"
    document = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert document["blocks"]["blocks"][2]["blocks"] == 2


def test_blocks_on_the_command_line(tmp_path, capfd):
    path = tmp_path / "m.onnx"
    onnx.save(network(), path)
    arguments = ["bench", str(path), "--blocks", "--json", "--seconds", "0.1", "--rounds", "3"]
    assert main(arguments) == 0
    document = json.loads(capfd.readouterr().out)
    assert [each["output"] for each in document["blocks"]["blocks"]][:2] == ["stem", "joined"]
    other = tmp_path / "other.onnx"
    onnx.save(small.conv_bn_relu(16), other)
    assert main(["bench", str(path), str(other), "--blocks"]) == 2
    assert "matched by tensor names" in capfd.readouterr().err


def test_other_providers_are_refused_before_anything_is_measured():
    with pytest.raises(UsageError, match="CPUExecutionProvider"):
        graphfold.bench([network()], provider="CUDAExecutionProvider", blocks=True)


def test_models_over_two_gigabytes_are_refused(monkeypatch):
    monkeypatch.setattr(blocks, "LARGEST_IN_MEMORY", 100)
    with pytest.raises(UsageError, match="big is over 2 GB"):
        graphfold.bench([network()], names=["big"], blocks=True)

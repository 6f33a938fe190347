"""The main job through the public API, on a small network built here."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from builders import ModelBuilder

import graphfold
from graphfold.affine import AffineConv
from graphfold.errors import PlanError, UsageError, VerificationError
from graphfold.model import to_proto
from graphfold.rewrite import FOLD_KEY, Phase, available_passes, recorded_folds

DOCS = Path(__file__).resolve().parent.parent / "docs"


def block(build: ModelBuilder, source: str, out: int, kernel: int, stride: int, prefix: str) -> str:
    """An inverted-residual block with Relu6 as Clip, residual where shapes allow."""
    width = build._channels[source]
    low, high = build.constant(0.0), build.constant(6.0)
    expanded = build.norm(build.conv(source, 4 * width, 1, bias=False))
    first = build.op("Clip", expanded, low, high, out=f"{prefix}_act1")
    middle = build.norm(build.depthwise(first, kernel, stride=stride, pad=kernel // 2, bias=False))
    second = build.op("Clip", middle, low, high, out=f"{prefix}_act2")
    end = build.norm(build.conv(second, out, 1, bias=False), out=f"{prefix}_linear")
    if stride == 1 and out == width:
        return build.op("Add", end, source, out=f"{prefix}_add")
    return end


def network(size: int | str = 14, batch: int | str = "N") -> onnx.ModelProto:
    """Stem with Relu, three blocks (residual; strided; 5x5 residual), head."""
    build = ModelBuilder([batch, 3, size, size])
    stem = build.op("Relu", build.norm(build.conv("x", 8, 3, pad=1)), out="stem_act")
    one = block(build, stem, 8, 3, 1, "b1")
    two = block(build, one, 16, 3, 2, "b2")
    three = block(build, two, 16, 5, 1, "b3")
    head = build.op("Relu", build.conv(three, 24, 1), out="head_act")
    return build.model(build.op("GlobalAveragePool", head, out="y"))


PLAN: dict[str, Any] = {
    "graphfold_plan": 1,
    "segments": [
        {"input": "stem_act", "output": "b1_add", "boundary": "exact", "kernel": [3, 3]},
        {"input": "b1_add", "output": "b2_linear", "boundary": "hoist", "activation": "Relu6"},
    ],
}


def ops(model: onnx.ModelProto) -> dict[str, int]:
    counts: dict[str, int] = {}
    for node in model.graph.node:
        counts[node.op_type] = counts.get(node.op_type, 0) + 1
    return counts


def run(model: onnx.ModelProto, feed: np.ndarray) -> np.ndarray:
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"x": feed})[0])


def test_segments_become_one_convolution_each_and_keep_their_names() -> None:
    result = graphfold.optimize(network(), PLAN)
    model = result.model
    # stem, two segments, three of the kept block, head
    assert ops(model)["Conv"] == 7
    assert "BatchNormalization" not in ops(model)
    tensors = {name for node in model.graph.node for name in node.output}
    assert {"b1_add", "b2_linear", "b3_add", "y"} <= tensors
    producer = next(node for node in model.graph.node if "b2_linear" in node.output)
    assert producer.op_type == "Clip"
    assert producer.input[0].startswith("b2_linear/graphfold.")
    assert result.report.verification is not None
    assert result.report.verification.passed


def test_the_folded_network_equals_the_reference_network_that_was_written() -> None:
    result = graphfold.optimize(network(), PLAN)
    feed = np.random.default_rng(0).normal(size=(3, 3, 14, 14)).astype(np.float32)
    expected, found = run(to_proto(result.reference), feed), run(result.model, feed)
    assert np.abs(expected - found).max() < 1e-5 * np.abs(expected).max()
    original = run(network(), feed)
    assert np.abs(expected - original).max() > 1e-3 * np.abs(original).max()


@pytest.mark.parametrize("repair", ["map", "table", "ones", "channel"])
def test_every_border_repair_passes_verification(repair: str) -> None:
    result = graphfold.optimize(network(), PLAN, border_repair=repair)
    fold = next(fold for fold in result.report.folds if fold.output == "b1_add")
    assert fold.repair == repair


def test_dynamic_sizes_are_folded_and_equal_at_sizes_that_were_not_verified() -> None:
    result = graphfold.optimize(network(size="S"), PLAN, input_shapes={"x": (1, 3, 20, 20)})
    rng = np.random.default_rng(1)
    for shape in ((2, 3, 17, 23), (1, 3, 8, 9)):
        feed = rng.normal(size=shape).astype(np.float32)
        expected, found = run(to_proto(result.reference), feed), run(result.model, feed)
        assert np.abs(expected - found).max() < 1e-5 * np.abs(expected).max()


def test_without_a_plan_nothing_but_cheaper_equals_is_done() -> None:
    source = network()
    result = graphfold.optimize(source)
    assert ops(result.model)["Conv"] == ops(source)["Conv"]
    assert "BatchNormalization" not in ops(result.model)
    again = graphfold.optimize(result.model)
    assert again.model == result.model


def test_the_same_input_gives_the_same_bytes() -> None:
    first, second = (graphfold.optimize(network(), PLAN).model for _ in range(2))
    assert first.SerializeToString(deterministic=True) == second.SerializeToString(
        deterministic=True
    )


def test_metadata_tells_what_was_merged_and_can_be_stripped() -> None:
    result = graphfold.optimize(network(), PLAN)
    folds = recorded_folds(result.folded.ir.graph)
    assert [fold.output for fold in folds] == [fold.output for fold in result.report.folds]
    assert folds == list(result.report.folds)
    replaced = next(fold for fold in folds if fold.output == "b1_add").replaces
    assert len(replaced) == 7
    assert set(replaced) <= {node.name for node in network().graph.node}
    keys = {item.key: item.value for item in result.model.metadata_props}
    assert keys["graphfold.version"] == graphfold.__version__
    assert len(keys["graphfold.plan"]) == 64
    stripped = graphfold.optimize(network(), PLAN, strip_metadata=True).model
    assert not stripped.metadata_props
    assert not any(node.metadata_props for node in stripped.graph.node)


def test_verify_compares_a_folded_network_with_what_the_plan_means() -> None:
    source = network()
    folded = graphfold.optimize(source, PLAN).model
    assert graphfold.verify(source, folded).passed is False
    found = graphfold.verify(source, folded, plan=PLAN)
    assert found.passed
    assert {item.fold.output for item in found.folds} >= {"b1_add"}
    assert all(item.max_abs is not None for item in found.folds)


def test_a_segment_that_costs_more_merged_is_warned_about() -> None:
    plan = {"graphfold_plan": 1, "keep_blocks": [1, 1, 0]}
    report = graphfold.optimize(network(), plan).report
    assert any("keep_blocks[2] costs more merged" in text for text in report.warnings)


def test_merge_cheaper_means_the_same_network_and_merges_only_where_that_pays() -> None:
    always = graphfold.optimize(network(), {"graphfold_plan": 1, "keep_blocks": [0, 0, 0]})
    plan = {"graphfold_plan": 1, "keep_blocks": [0, 0, 0], "merge": "cheaper"}
    cheaper = graphfold.optimize(network(), plan)
    assert not cheaper.report.warnings
    assert ops(always.model)["Conv"] < ops(cheaper.model)["Conv"] < ops(network())["Conv"]
    assert graphfold.verify(always.model, cheaper.model, tolerance=1e-5).passed
    assert any("raises cost" in skip.reason for skip in cheaper.report.skipped)


def test_a_wrong_fold_is_refused_and_the_first_one_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import graphfold.merge as merge

    right = merge.region_affine
    calls: list[str] = []

    def wrong(graph: Any, region: Any) -> AffineConv:
        affine = right(graph, region)
        calls.append(region.output.name)
        # b1_add is the first fold of a segment in execution order
        if region.output.name not in ("b1_add", "b2_linear/graphfold.0"):
            return affine
        return replace(affine, bias=affine.bias + 0.1 * np.abs(affine.bias).max())

    monkeypatch.setattr(merge, "region_affine", wrong)
    with pytest.raises(VerificationError) as caught:
        graphfold.optimize(network(), PLAN)
    message = str(caught.value)
    assert {"b1_add", "b2_linear/graphfold.0"} <= set(calls)
    assert "'b1_add'" in message
    assert "segments[0]" in message
    assert "--skip-pass merge_residual" in message


def test_the_input_is_never_changed() -> None:
    source = network()
    before = source.SerializeToString(deterministic=True)
    graphfold.optimize(source, PLAN)
    graphfold.inspect(source)
    assert source.SerializeToString(deterministic=True) == before
    held = ir.from_proto(source)
    graphfold.optimize(held, PLAN)
    assert ir.to_proto(held).SerializeToString(deterministic=True) == ir.to_proto(
        ir.from_proto(source)
    ).SerializeToString(deterministic=True)


def test_graphsurgeon_graphs_go_in_and_come_out() -> None:
    gs = pytest.importorskip("onnx_graphsurgeon")
    graph = graphfold.optimize(gs.import_onnx(network()), PLAN).graphsurgeon
    assert isinstance(graph, gs.Graph)
    assert sum(node.op == "Conv" for node in graph.nodes) == 7


def test_passes_are_chosen_by_name() -> None:
    only = graphfold.optimize(network(), passes=["merge_convs"])
    assert ops(only.model)["BatchNormalization"] > 0
    with pytest.raises(UsageError, match="did you mean 'fold_batchnorm'"):
        graphfold.optimize(network(), passes=["fold_batchnrm"])
    with pytest.raises(UsageError, match="is what the plan means"):
        graphfold.optimize(network(), skip_passes=["hoist_padding"])


def test_every_pass_is_a_file_of_its_name_with_a_theorem() -> None:
    found = available_passes()
    folder = Path(graphfold.__file__).parent / "passes"
    files = {path.stem for path in folder.glob("*.py")} - {"__init__"}
    assert files == set(found)
    for name, cls in found.items():
        assert cls.name == name
        assert len(sys.modules[cls.__module__].__doc__ or "") > 200
    phases = [cls.phase for cls in found.values()]
    assert phases == sorted(phases)
    assert Phase.PLAN in phases


def test_a_plan_error_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(json.dumps({"graphfold_plan": 1, "remove_activations": ["stem_at"]}))
    with pytest.raises(PlanError, match=r"plan\.json: remove_activations\[0\].*stem_act"):
        graphfold.optimize(network(), path)


def test_inspect_shows_what_would_fold_without_a_plan() -> None:
    found = graphfold.inspect(network())
    document = found.to_json()
    assert [block["kind"] for block in document["blocks"]].count("inverted residual") == 3
    assert len(document["activations"]) == 8
    assert document["folds"]


def test_the_generated_documents_are_up_to_date() -> None:
    command = [sys.executable, str(DOCS / "generate.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_record_of_a_fold_is_on_one_node_of_each_merge() -> None:
    model = graphfold.optimize(network(), PLAN).model
    marked = [
        node
        for node in model.graph.node
        if any(item.key == FOLD_KEY for item in node.metadata_props)
    ]
    # the head has nothing to fold
    assert len(marked) == 6


def test_before_ir_version_4_new_weights_do_not_become_inputs() -> None:
    build = ModelBuilder([1, 3, 8, 8], opset=8, ir_version=3)
    end = build.norm(build.conv("x", 4, 3))
    weights = [
        onnx.helper.make_tensor_value_info(item.name, item.data_type, item.dims)
        for item in build.initializers
    ]
    source = build.model(end, more_inputs=weights)
    result = graphfold.optimize(source)
    assert ops(result.model) == {"Conv": 1, "Constant": 2}
    assert [item.name for item in result.model.graph.input] == [
        item.name for item in source.graph.input
    ]
    onnx.checker.check_model(result.model)


def test_behind_a_free_activation_sizes_are_still_known() -> None:
    plan = {"graphfold_plan": 1, "keep_blocks": [0, 0, 0], "activation": "Relu6"}
    folds = graphfold.optimize(network(), plan).report.folds
    assert {fold.repair for fold in folds if fold.segment} == {"map"}


def test_a_tensor_that_two_passes_fold_is_reported_once_and_compared_on_all_feeds() -> None:
    build = ModelBuilder(["N", 6, 9, 8])
    normalised = build.conv(build.norm("x"), 4, 3, bias=False)
    shifted = build.op("Add", normalised, build.constant(np.full((4, 1, 1), 0.7)), out="y")
    report = graphfold.optimize(build.model(shifted)).report
    outputs = [fold.output for fold in report.folds]
    assert outputs == ["y"]
    assert report.verification is not None
    assert report.verification.passed
    assert len(report.verification.shapes) == 2

"""What a plan's names mean on a model, and every way in which they do not fit it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest
from builders import ModelBuilder, op_types, random_input, run
from references import build, close, reference

import graphfold
from graphfold.errors import PlanError, Problem
from graphfold.graph import Graph
from graphfold.model import digest, load
from graphfold.plan import read_plan
from graphfold.resolve import ResolvedPlan, resolve_plan


def network() -> onnx.ModelProto:
    """Stem, a residual bottleneck with activations inside, a strided end; all tensors named."""
    b = ModelBuilder([1, 3, 8, 8])
    stem = b.op("Relu", b.conv("x", 4, 3, pad=1, out="stem"), out="stem_act")
    wide = b.op("Relu", b.conv(stem, 8, 1, out="expand"), out="expand_act")
    deep = b.norm(b.depthwise(wide, 3, pad=1, out="depthwise"), out="depthwise_norm")
    deep = b.op("Mul", deep, b.op("Sigmoid", deep, out="gate"), out="depthwise_act")
    narrow = b.norm(b.conv(deep, 4, 1, out="project"), out="project_norm")
    joined = b.op("Add", stem, narrow, out="block")
    end = b.op("Relu", b.conv(joined, 4, 3, stride=2, pad=1, out="end"), out="end_act")
    return b.model(b.conv(end, 5, 3, out="y"))


BLOCK = {"input": "stem_act", "output": "block", "boundary": "exact"}


def problems(proto: onnx.ModelProto | None = None, **plan: Any) -> list[Problem]:
    with pytest.raises(PlanError) as caught:
        build(network() if proto is None else proto, **plan)
    return list(caught.value.problems)


def resolved(**plan: Any) -> ResolvedPlan:
    return resolve_plan(Graph(load(network())), read_plan({"graphfold_plan": 1, **plan}))


# --- What is found --------------------------------------------------------------------------------


def test_a_segment_holds_its_nodes_and_all_activations_inside():
    (segment,) = resolved(segments=[BLOCK]).segments
    assert [site.name for site in segment.activations] == ["expand_act", "depthwise_act"]
    assert {node.outputs[0].name for node in segment.nodes} == {
        *("expand", "expand_act", "depthwise", "depthwise_norm", "gate", "depthwise_act"),
        *("project", "project_norm", "block"),
    }
    assert segment.convs == ()


def test_loose_sites_and_additions_are_found():
    found = resolved(
        remove_activations=["end_act", "depthwise_act"],
        remove_convs=["depthwise"],
        add_activations=[{"tensor": "block", "activation": {"like": "depthwise_act"}}],
    )
    assert [len(site.nodes) for site in found.activations] == [1, 2]
    assert [site.name for site in found.convs] == ["depthwise"]
    (added,) = found.added
    assert added.value.name == "block"
    assert added.steps == (("Sigmoid", ("x",), {}), ("Mul", ("x", 0), {}))


def test_a_segments_free_activation_stands_at_its_output():
    (added,) = resolved(segments=[{**BLOCK, "activation": "Relu6"}]).added
    assert (added.value.name, added.activation) == ("block", "Relu6")
    assert added.path == "segments[0].activation"


# --- Names ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("plan", "path", "what", "hint"),
    [
        (
            {"segments": [{**BLOCK, "input": "stem_akt"}]},
            "segments[0].input",
            "the model has no tensor 'stem_akt'",
            "did you mean 'stem_act'?",
        ),
        (
            {"segments": [{**BLOCK, "output": "qqq"}]},
            "segments[0].output",
            "the model has no tensor 'qqq'",
            None,
        ),
        (
            {"remove_activations": ["end_act", "ende_act"]},
            "remove_activations[1]",
            "the model has no tensor 'ende_act'",
            "did you mean 'end_act'?",
        ),
        (
            {"remove_activations": ["gate"]},
            "remove_activations[0]",
            "tensor 'gate' is not the output of an activation site",
            "the site it belongs to is named 'depthwise_act'",
        ),
        (
            {"remove_activations": ["project"]},
            "remove_activations[0]",
            "tensor 'project' is not the output of an activation site",
            None,
        ),
        (
            {"remove_convs": ["depthwise_norm"]},
            "remove_convs[0]",
            "tensor 'depthwise_norm' is not the output of a conv site",
            "the site it belongs to is named 'depthwise'",
        ),
        (
            {"segments": [{**BLOCK, "remove_convs": ["depthwice"]}]},
            "segments[0].remove_convs[0]",
            "the model has no tensor 'depthwice'",
            "did you mean 'depthwise'?",
        ),
        (
            {"segments": [{**BLOCK, "activation": {"like": "stem"}}]},
            "segments[0].activation.like",
            "tensor 'stem' is not the output of an activation site",
            "did you mean 'stem_act'?",
        ),
        (
            {"add_activations": [{"tensor": "blok", "activation": "Relu"}]},
            "add_activations[0].tensor",
            "the model has no tensor 'blok'",
            "did you mean 'block'?",
        ),
    ],
)
def test_names(plan: dict[str, Any], path: str, what: str, hint: str | None):
    (problem,) = problems(**plan)
    assert problem == Problem(path, what, hint)


def test_all_problems_come_at_once():
    found = problems(
        segments=[{**BLOCK, "input": "stm_act"}, {**BLOCK, "input": "end_act", "output": "stem"}],
        remove_activations=["gate", "nothing"],
        remove_convs=["end"],
        add_activations=[{"tensor": "stem", "activation": "Relu"}],
    )
    assert [problem.path for problem in found] == [
        "segments[0].input",
        "segments[1]",
        "remove_activations[0]",
        "remove_activations[1]",
        "remove_convs[0]",
        "add_activations[0].activation",
    ]


# --- Segments -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "output", "reason"),
    [
        ("stem_act", "project_norm", None),
        ("expand_act", "block", "it is not single-entry: 'stem_act' enters at 'n_block'"),
        ("stem", "block", None),
        ("x", "expand", "it is not single-exit: 'stem_act' is also read by 'n_block'"),
        ("end_act", "stem", "'stem' does not depend on 'end_act'"),
    ],
)
def test_single_entry_and_single_exit(source: str, output: str, reason: str | None):
    segment = {"input": source, "output": output, "boundary": "hoist"}
    if reason is None:
        assert resolved(segments=[segment]).segments[0].output.name == output
        return
    (problem,) = problems(segments=[segment])
    assert problem.path == "segments[0]"
    assert problem.what == f"is not a segment from {source!r} to {output!r}"
    assert problem.hint == reason


def test_a_graph_output_inside_is_an_exit():
    b = ModelBuilder([1, 3, 8, 8])
    first = b.conv("x", 4, 1, out="first")
    proto = b.model(b.conv(first, 4, 1, out="y"), first)
    (problem,) = problems(proto, segments=[{"input": "x", "output": "y", "boundary": "exact"}])
    assert problem.hint == "it is not single-exit: 'first' is an output of the graph"


def test_a_kept_activation_inside_is_refused():
    (problem,) = problems(segments=[{**BLOCK, "remove_activations": ["expand_act"]}])
    assert problem.path == "segments[0].remove_activations"
    assert problem.what == "keeps the activation 'depthwise_act', so the segment is not linear"
    assert problem.hint == "name it, or end the segment before"


def test_sites_outside_the_segment_are_refused():
    found = problems(
        segments=[
            {
                **BLOCK,
                "remove_activations": ["expand_act", "depthwise_act", "end_act"],
                "remove_convs": ["depthwise"],
            },
            {
                "input": "end_act",
                "output": "y",
                "boundary": "exact",
                "remove_convs": ["depthwise"],
            },
        ]
    )
    assert [(each.path, each.what) for each in found] == [
        ("segments[0].remove_activations[2]", "'end_act' is not inside the segment"),
        ("segments[1].remove_convs[0]", "'depthwise' is not inside the segment"),
    ]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("stem", "it maps 3 to 4 channels"),
        ("end", "its stride is 2"),
        ("expand", "it maps 4 to 8 channels"),
    ],
)
def test_a_conv_that_changes_the_shape_is_not_removable(name: str, reason: str):
    (problem,) = problems(remove_convs=["depthwise", name])
    assert problem.path == "remove_convs[1]"
    assert problem.what == f"conv {name!r} cannot be removed: {reason}"


def test_overlapping_segments_are_refused_once_a_pair():
    found = problems(
        segments=[
            {"input": "stem_act", "output": "project_norm", "boundary": "exact"},
            {"input": "depthwise_act", "output": "project_norm", "boundary": "exact"},
            {"input": "end_act", "output": "y", "boundary": "exact"},
        ]
    )
    (problem,) = found
    assert problem.path == "segments[1]"
    assert problem.what.startswith("overlaps segments[0] at 'n_project")


def test_neighbouring_segments_do_not_overlap():
    first = {"input": "stem_act", "output": "depthwise_norm", "boundary": "exact"}
    second = {"input": "depthwise_act", "output": "project_norm", "boundary": "exact"}
    assert len(resolved(segments=[first, second]).segments) == 2


def test_loose_removals_inside_a_segment_are_refused():
    found = problems(
        segments=[BLOCK],
        remove_activations=["end_act", "gate", "expand_act"],
        remove_convs=["depthwise"],
    )
    assert [(each.path, each.what, each.hint) for each in found[1:]] == [
        (
            "remove_activations[2]",
            "'expand_act' lies in segments[0]",
            "the segment removes it already",
        ),
        (
            "remove_convs[0]",
            "'depthwise' lies in segments[0]",
            "say it in segments[0].remove_convs",
        ),
    ]


# --- Free activations -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("plan", "path", "tensor"),
    [
        (
            {
                "segments": [
                    {"input": "x", "output": "stem", "boundary": "exact", "activation": "Relu"}
                ]
            },
            "segments[0].activation",
            "stem",
        ),
        (
            {"add_activations": [{"tensor": "end", "activation": "Relu6"}]},
            "add_activations[0].activation",
            "end",
        ),
        (
            {"add_activations": [{"tensor": "depthwise_norm", "activation": {"like": "end_act"}}]},
            "add_activations[0].activation",
            "depthwise_norm",
        ),
    ],
)
def test_no_activation_where_the_model_has_one(plan: dict[str, Any], path: str, tensor: str):
    (problem,) = problems(**plan)
    assert problem.path == path
    assert problem.what == f"the model already has an activation after {tensor!r}"
    assert problem.hint == "use null"


def test_an_activation_where_the_models_own_is_removed_replaces_it():
    plan = {
        "remove_activations": ["end_act"],
        "add_activations": [{"tensor": "end", "activation": "Tanh"}],
    }
    changed = reference(network(), **plan)
    assert op_types(changed).count("Tanh") == 1
    feeds = random_input(changed)
    original = network()
    for node in original.graph.node:
        if node.output[0] == "end_act":
            node.op_type = "Tanh"
    close(run(changed, feeds)[0], run(original, feeds)[0])


def test_two_activations_at_one_tensor_are_refused():
    segment = {**BLOCK, "activation": "Relu"}
    added = {"tensor": "block", "activation": "Relu6"}
    (problem,) = problems(segments=[segment], add_activations=[added])
    assert problem.path == "add_activations[0].activation"
    assert problem.what == "segments[0].activation adds one after 'block' already"


# --- What the merge would give --------------------------------------------------------------------


def two_windows() -> onnx.ModelProto:
    b = ModelBuilder([1, 3, 9, 9])
    first = b.op("Relu", b.conv("x", 4, 3, pad=1, out="first"), out="act")
    return b.model(b.conv(first, 5, 3, pad=1, out="y"))


def test_a_segment_that_no_convolution_equals_says_why_and_what_would_work():
    (problem,) = problems(
        two_windows(), segments=[{"input": "x", "output": "y", "boundary": "exact"}]
    )
    assert problem.path == "segments[0]"
    assert problem.what.startswith("cannot become one convolution: ")
    assert "pad" in problem.what
    assert problem.hint == "boundary: hoist would work"
    # and it does
    plan = {"graphfold_plan": 1, "segments": [{"input": "x", "output": "y", "boundary": "hoist"}]}
    assert op_types(graphfold.optimize(two_windows(), plan).model) == ["Conv"]


@pytest.mark.parametrize(
    ("fields", "what"),
    [
        ({"kernel": [3, 3]}, "states kernel [3, 3], and the merge gives [5, 5]"),
        ({"kernel": [5]}, "states kernel [5], and the merge gives [5, 5]"),
        ({"family": "depthwise"}, "states family depthwise, and the merge gives dense"),
        ({"family": "pointwise"}, "states family pointwise, and the merge gives dense"),
    ],
)
def test_a_stated_kernel_and_family_are_checked(fields: dict[str, Any], what: str):
    segment = {"input": "x", "output": "y", "boundary": "hoist"}
    (problem,) = problems(two_windows(), segments=[{**segment, **fields}])
    assert (problem.path, problem.what) == ("segments[0]", what)
    right = {**segment, "kernel": [5, 5], "family": "dense"}
    assert op_types(reference(two_windows(), segments=[right])) == ["Conv", "Conv"]


def test_a_segment_with_a_nonlinear_operator_is_refused():
    b = ModelBuilder([1, 3, 8, 8])
    first = b.conv("x", 4, 3, pad=1, out="first")
    pooled = b.op("MaxPool", first, kernel_shape=[2, 2], strides=[2, 2], out="pooled")
    proto = b.model(b.conv(pooled, 5, 3, pad=1, out="y"))
    for boundary in ("exact", "hoist"):
        (problem,) = problems(proto, segments=[{"input": "x", "output": "y", "boundary": boundary}])
        assert problem.path == "segments[0]"
        assert "MaxPool 'n_pooled' is not a linear operator" in problem.what
        assert problem.hint is None


# --- Segments that are dropped --------------------------------------------------------------------


def test_identity_drops_a_segment_and_keeps_the_skip():
    segment = {"input": "stem_act", "output": "block", "family": "identity"}
    dropped = reference(network(), segments=[segment])
    assert op_types(dropped) == ["Conv", "Relu", "Conv", "Relu", "Conv"]
    feeds = random_input(dropped)
    expected = network()
    for node in expected.graph.node:
        for index, name in enumerate(node.input):
            if name == "block":
                node.input[index] = "stem_act"
    close(run(dropped, feeds)[0], run(expected, feeds)[0])


def test_identity_with_a_free_activation_leaves_the_activation():
    segment = {
        "input": "stem_act",
        "output": "block",
        "family": "identity",
        "activation": "Sigmoid",
    }
    dropped = reference(network(), segments=[segment])
    assert op_types(dropped) == ["Conv", "Relu", "Sigmoid", "Conv", "Relu", "Conv"]
    (sigmoid,) = [node for node in dropped.graph.node if node.op_type == "Sigmoid"]
    assert (sigmoid.input[0], sigmoid.output[0]) == ("stem_act", "block")


@pytest.mark.parametrize(
    ("source", "output", "what"),
    [
        ("stem_act", "expand", "[1, 4, 8, 8] and 'expand' is [1, 8, 8, 8]"),
        ("block", "end", "[1, 4, 8, 8] and 'end' is [1, 4, 4, 4]"),
    ],
)
def test_identity_needs_equal_shapes(source: str, output: str, what: str):
    (problem,) = problems(segments=[{"input": source, "output": output, "family": "identity"}])
    assert problem.path == "segments[0]"
    assert what in problem.what


# --- The model that a plan was made for -----------------------------------------------------------


def test_another_models_plan_is_refused_unless_allowed(tmp_path: Path):
    path = tmp_path / "model.onnx"
    onnx.save(network(), path)
    plan = {"graphfold_plan": 1, "model": {"sha256": digest(path)}, "segments": [BLOCK]}
    before = graphfold.optimize(path, plan).report.warnings

    other = network()
    other.doc_string = "another file"
    onnx.save(other, path)
    with pytest.raises(PlanError, match="was made for another model: sha256") as caught:
        graphfold.optimize(path, plan)
    (problem,) = caught.value.problems
    assert problem.path == "model.sha256"
    assert problem.hint == "--allow-other-model applies it anyway"
    warnings = graphfold.optimize(path, plan, allow_other_model=True).report.warnings
    (warning,) = set(warnings) - set(before)
    assert digest(path)[:12] in warning
    # what the plan names must be there all the same
    renamed = {**plan, "segments": [{**BLOCK, "output": "blocc"}]}
    with pytest.raises(PlanError, match="did you mean 'block'"):
        graphfold.optimize(path, renamed, allow_other_model=True)


def test_without_a_digest_none_is_checked():
    assert build(network(), model={"name": "other.onnx"}, segments=[BLOCK]).warnings == ()


def test_errors_of_a_plan_file_name_it(tmp_path: Path):
    path = tmp_path / "plan.json"
    path.write_text('{"graphfold_plan": 1, "remove_convs": ["stemm"]}', encoding="utf-8")
    with pytest.raises(PlanError) as caught:
        graphfold.optimize(network(), path)
    assert str(caught.value) == (
        f"{path}: remove_convs[0]: the model has no tensor 'stemm' (did you mean 'stem'?)"
    )

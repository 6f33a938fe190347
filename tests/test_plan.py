"""Reading a plan: its form, everything that is wrong with it at once, its published schema."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from graphfold.cli import main
from graphfold.errors import PlanError, Problem
from graphfold.plan import Plan, json_path, json_schema, nearest, read_plan

PLANS = sorted((Path(__file__).parents[1] / "examples" / "plans").glob("*.json"))
SEGMENT = {"input": "a", "output": "b", "boundary": "exact"}
FITTED = {"input": "a", "output": "b", "weights": "regress"}


def problems(plan: Any) -> list[Problem]:
    with pytest.raises(PlanError) as caught:
        read_plan(plan)
    assert caught.value.exit_code == 2
    return list(caught.value.problems)


def only_problem(**fields: Any) -> Problem:
    (problem,) = problems({"graphfold_plan": 1, **fields})
    return problem


# --- What is read ---------------------------------------------------------------------------------


def test_a_plan_is_read_from_a_file_a_mapping_and_itself(tmp_path: Path):
    data = {"graphfold_plan": 1, "segments": [SEGMENT], "remove_activations": ["r"]}
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(data), encoding="utf-8")
    plan = read_plan(path)
    assert plan.segments[0].boundary == "exact"
    assert plan.segments[0].weights == "merge"
    assert plan.segments[0].remove_activations is None  # all inside
    assert plan == read_plan(str(path)) == read_plan(data)
    assert read_plan(plan) is plan


def test_every_field_of_a_full_plan_is_kept():
    segment = {
        **SEGMENT,
        "weights": "merge",
        "family": "dense",
        "kernel": [3, 5],
        "activation": {"like": "r"},
        "remove_activations": [],
        "remove_convs": ["c"],
    }
    data = {
        "graphfold_plan": 1,
        "model": {"name": "m.onnx", "sha256": "0" * 64},
        "segments": [segment],
        "remove_activations": ["r1", "r2"],
        "remove_convs": ["c2"],
        "add_activations": [{"tensor": "t", "activation": "HardSwish"}],
        "objective": {"seed": 3, "device": {"name": "cpu"}},
    }
    assert read_plan(data).model_dump(mode="json", exclude_unset=True) == data


def test_the_digest_is_of_the_content():
    first = read_plan({"graphfold_plan": 1, "segments": [SEGMENT], "remove_convs": ["c"]})
    turned = dict(reversed(list(SEGMENT.items())))
    same = read_plan({"remove_convs": ["c"], "segments": [turned], "graphfold_plan": 1})
    other = read_plan({"graphfold_plan": 1, "segments": [SEGMENT], "remove_convs": ["d"]})
    assert first.digest == same.digest != other.digest
    # It stands in the metadata of folded models: it must not change between versions.
    assert read_plan({"graphfold_plan": 1, "keep_blocks": [1, 0]}).digest == (
        "9e2b34018ee5e97d1889fe7954d15ea62db6d665db01a19b3d174e2f9f1954cc"
    )


def test_a_plan_cannot_be_changed():
    plan = read_plan({"graphfold_plan": 1})
    with pytest.raises(ValueError, match="frozen"):
        plan.boundary = "hoist"  # type: ignore[misc]


# --- Files that are none --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not JSON: Expecting value at line 1, column 1"),
        (b'{"graphfold_plan": 1,\n}', "not JSON: .* at line [12], column"),
        (b"\xff\xfe", "cannot be read"),
        (b"[1]", r"\$: a plan is a JSON object"),
        (b"3", r"\$: a plan is a JSON object"),
        (b"[" * 200_000, "nested too deeply"),
    ],
)
def test_files_that_are_no_plan(tmp_path: Path, content: bytes, message: str):
    path = tmp_path / "plan.json"
    path.write_bytes(content)
    with pytest.raises(PlanError, match=message) as caught:
        read_plan(path)
    assert str(caught.value).startswith(f"{path}: ")


def test_missing_files_and_folders(tmp_path: Path):
    with pytest.raises(PlanError, match="no such file"):
        read_plan(tmp_path / "absent.json")
    with pytest.raises(PlanError, match="is a directory, not a plan file"):
        read_plan(tmp_path)


# --- Form -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("plan", "path", "what", "hint"),
    [
        ({}, "graphfold_plan", "is required", None),
        ({"graphfold_plan": 2}, "graphfold_plan", "version 2 is not supported", "reads version 1"),
        ({"graphfold_plan": "1"}, "graphfold_plan", "version '1' is not supported", "version 1"),
        ({"graphfold_plan": True}, "graphfold_plan", "version True is not supported", "version 1"),
        ({"segment": []}, "segment", "unknown key", "did you mean 'segments'?"),
        ({"segments": {}}, "segments", "should be a valid list, not {}", None),
        ({"segments": [3]}, "segments[0]", "not 3", None),
        ({"segments": [{"output": "b", "boundary": "exact"}]}, "segments[0].input", "is req", None),
        ({"segments": [{**SEGMENT, "input": ""}]}, "segments[0].input", "at least 1 char", None),
        ({"segments": [{**SEGMENT, "input": 7}]}, "segments[0].input", "valid string, not 7", None),
        (
            {"segments": [{**SEGMENT, "boundary": "hoisted"}]},
            "segments[0].boundary",
            "'hoisted' is not valid",
            "did you mean 'hoist'?",
        ),
        (
            {"segments": [{**SEGMENT, "boundary": 1}]},
            "segments[0].boundary",
            "1 is not valid",
            "one of 'exact' or 'hoist'",
        ),
        (
            {"segments": [{**SEGMENT, "boundry": "exact"}]},
            "segments[0].boundry",
            "unknown key",
            "did you mean 'boundary'?",
        ),
        ({"segments": [{**SEGMENT, "kernel": 3}]}, "segments[0].kernel", "valid list", None),
        ({"segments": [{**SEGMENT, "kernel": [0]}]}, "segments[0].kernel[0]", "equal to 1", None),
        (
            {"segments": [{**SEGMENT, "family": "depth"}]},
            "segments[0].family",
            "'depth' is not valid",
            "did you mean 'depthwise'?",
        ),
        (
            {"segments": [{**SEGMENT, "activation": "Rleu6"}]},
            "segments[0].activation",
            "'Rleu6' is not valid",
            "did you mean 'Relu6'?",
        ),
        (
            {"segments": [{**SEGMENT, "activation": {"lik": "r"}}]},
            "segments[0].activation.lik",
            "unknown key",
            "did you mean 'like'?",
        ),
        ({"keep_blocks": [1, 2]}, "keep_blocks[1]", "less than or equal to 1, not 2", None),
        ({"keep_blocks": [True]}, "keep_blocks[0]", "valid integer, not True", None),
        ({"keep_blocks": "101"}, "keep_blocks", "valid list", None),
        ({"act_ind": [-1], "conv_ind": []}, "act_ind[0]", "equal to 0, not -1", None),
        ({"remove_activations": "r"}, "remove_activations", "valid list", None),
        ({"model": {"sha25": "0"}}, "model.sha25", "unknown key", "did you mean 'sha256'?"),
        (
            {"add_activations": [{"tensor": "t"}]},
            "add_activations[0].activation",
            "is required",
            None,
        ),
    ],
)
def test_form(plan: dict[str, Any], path: str, what: str, hint: str | None):
    found = {each.path: each for each in problems({"graphfold_plan": 1, **plan} if plan else {})}
    assert path in found
    assert what in found[path].what
    if hint is None:
        assert found[path].hint is None
    else:
        assert hint in (found[path].hint or "")


def test_all_problems_come_at_once():
    plan = {
        "graphfold_plan": 1,
        "segmnts": [],
        "segments": [{"input": "a"}, {**SEGMENT, "family": "wide"}, {**SEGMENT, "rnk": 1}],
        "keep_blocks": [0, 3],
    }
    with pytest.raises(PlanError) as caught:
        read_plan(plan)
    paths = [problem.path for problem in caught.value.problems]
    assert sorted(paths) == [
        "keep_blocks[1]",
        "segments[0].output",
        "segments[1].family",
        "segments[2].rnk",
        "segmnts",
    ]
    text = str(caught.value)
    assert text.startswith("5 problems in the plan:\n  ")
    assert "segmnts: unknown key (did you mean 'segments'?)" in text
    assert text.count("\n") == 5


# --- Contradictions -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "path", "what"),
    [
        ({"segments": [{"input": "a", "output": "b"}]}, "segments[0].boundary", "is required"),
        ({"segments": [{**SEGMENT, "output": "a"}]}, "segments[0]", "the same tensor 'a'"),
        (
            {"segments": [{**SEGMENT, "weights": "regress", "family": "pointwise"}]},
            "segments[0].boundary",
            "belongs to weights: merge",
        ),
        ({"segments": [{**FITTED, "family": "dense"}]}, "segments[0].kernel", "is required"),
        ({"segments": [{**FITTED, "family": "narrow"}]}, "segments[0].width", "is required"),
        ({"segments": [{**FITTED, "family": "identity"}]}, "segments[0].weights", "no weights"),
        (
            {"segments": [{**FITTED, "family": "low_rank", "kernel": [1, 1]}]},
            "segments[0].rank",
            "is required",
        ),
        (
            {"segments": [{**FITTED, "family": "narrow", "width": 8, "kernel": [3, 3]}]},
            "segments[0].kernel",
            "narrow keeps",
        ),
        (
            {"segments": [{**SEGMENT, "family": "low_rank", "rank": 4}]},
            "segments[0].weights",
            "say regress",
        ),
        (
            {"segments": [{**SEGMENT, "family": "identity", "norm": "after"}]},
            "segments[0].norm",
            "what is dropped has no normalisation",
        ),
        ({"segments": [{**SEGMENT, "rank": 2}]}, "segments[0].rank", "family: low_rank"),
        ({"segments": [{**SEGMENT, "width": 2}]}, "segments[0].width", "family: narrow"),
        (
            {"segments": [{**SEGMENT, "remove_convs": ["c", "d", "c"]}]},
            "segments[0].remove_convs[2]",
            "'c' is named twice",
        ),
        ({"remove_activations": ["r", "r"]}, "remove_activations[1]", "'r' is named twice"),
        ({"act_ind": [3]}, "act_ind", "act_ind and conv_ind belong together"),
        ({"conv_ind": [3]}, "act_ind", "act_ind and conv_ind belong together"),
        (
            {"keep_blocks": [1], "act_ind": [1], "conv_ind": [1]},
            "keep_blocks",
            "contradicts act_ind",
        ),
        ({"keep_blocks": [1], "segments": [SEGMENT]}, "segments", "states all segments itself"),
        ({"boundary": "hoist"}, "boundary", "belongs to the short forms"),
        ({"activation": "Relu"}, "activation", "belongs to the short forms"),
        ({"quantize": {"percentile": 99}}, "quantize.percentile", "belongs to calibration"),
        ({"quantize": {"keep_float": ["a", "a"]}}, "quantize.keep_float[1]", "named twice"),
        ({"merge": "cheaper"}, "merge", "belongs to keep_blocks"),
        ({"keep_blocks": [1], "merge": "cheaper", "boundary": "hoist"}, "merge", "boundary exact"),
    ],
)
def test_contradictions(fields: dict[str, Any], path: str, what: str):
    problem = only_problem(**fields)
    assert problem.path == path
    assert what in problem.what


def test_contradictions_come_at_once_too():
    found = problems(
        {
            "graphfold_plan": 1,
            "segments": [{"input": "a", "output": "b"}, {**SEGMENT, "rank": 1}],
            "conv_ind": [1],
            "boundary": "exact",
        }
    )
    assert {each.path for each in found} == {
        "segments[0].boundary",
        "segments[1].rank",
        "act_ind",
        "boundary",
    }


def test_a_segment_that_drops_its_nodes_needs_no_boundary():
    segment = {"input": "a", "output": "b", "family": "identity"}
    assert read_plan({"graphfold_plan": 1, "segments": [segment]}).segments[0].boundary is None


# --- Helpers --------------------------------------------------------------------------------------


def test_json_paths():
    assert json_path(("segments", 2, "boundary")) == "segments[2].boundary"
    assert json_path(("keep_blocks", 0)) == "keep_blocks[0]"
    assert json_path(()) == "$"


def test_nearest_names():
    assert nearest("blok_1", ["block_1", "stem"]) == "did you mean 'block_1'?"
    assert nearest("x", ["block_1", "stem"]) is None


# --- The published schema -------------------------------------------------------------------------


def violations(value: Any, schema: Mapping[str, Any], root: Mapping[str, Any]) -> list[str]:
    """What is wrong with a value, by the part of JSON Schema that the plan's schema uses."""
    if "$ref" in schema:
        return violations(value, root["$defs"][schema["$ref"].rsplit("/", 1)[1]], root)
    unknown = set(schema) - {
        *("$defs", "title", "description", "default", "type", "properties", "required"),
        *("additionalProperties", "items", "enum", "const", "anyOf", "minimum", "maximum"),
        "minLength",
    }
    assert not unknown, f"this check does not know {unknown}"
    if "anyOf" in schema:
        options = [violations(value, option, root) for option in schema["anyOf"]]
        return [] if any(not found for found in options) else ["fits no option"]
    kinds = {"object": dict, "array": list, "string": str, "integer": int, "null": type(None)}
    kinds |= {"boolean": bool}
    if "type" in schema and type(value) is not kinds[schema["type"]]:
        return [f"not {schema['type']}"]
    found = []
    if value not in schema.get("enum", [value]) or value != schema.get("const", value):
        found.append("not one of the values")
    in_range = isinstance(value, int) and value in range(
        schema.get("minimum", value), schema.get("maximum", value) + 1
    )
    if isinstance(value, int) and not in_range:
        found.append("out of range")
    if isinstance(value, str) and len(value) < schema.get("minLength", 0):
        found.append("too short")
    if isinstance(value, list):
        for item in value:
            found += violations(item, schema.get("items", {}), root)
    if isinstance(value, dict):
        found += [f"{key} is missing" for key in schema.get("required", []) if key not in value]
        for key, item in value.items():
            if key in schema.get("properties", {}):
                found += violations(item, schema["properties"][key], root)
            elif schema.get("additionalProperties") is False:
                found.append(f"{key} is unknown")
    return found


@pytest.mark.parametrize("path", PLANS, ids=lambda path: path.stem)
def test_example_plans_follow_the_schema(path: Path):
    data = json.loads(path.read_text(encoding="utf-8"))
    assert violations(data, json_schema(), json_schema()) == []
    assert isinstance(read_plan(path), Plan)


def test_there_are_example_plans():
    assert len(PLANS) == 19


@pytest.mark.parametrize(
    "plan",
    [
        {},
        {"graphfold_plan": 2},
        {"graphfold_plan": 1, "segmnts": []},
        {"graphfold_plan": 1, "keep_blocks": [2]},
        {"graphfold_plan": 1, "keep_blocks": ["1"]},
        {"graphfold_plan": 1, "segments": [{"input": "a"}]},
        {"graphfold_plan": 1, "segments": [{**SEGMENT, "boundary": "both"}]},
        {"graphfold_plan": 1, "segments": [{**SEGMENT, "activation": {"lik": "r"}}]},
        {"graphfold_plan": 1, "segments": [{**SEGMENT, "kernel": [0]}]},
        {"graphfold_plan": 1, "segments": [{**SEGMENT, "input": ""}]},
    ],
)
def test_the_schema_refuses_what_reading_refuses(plan: dict[str, Any]):
    assert violations(plan, json_schema(), json_schema())
    assert problems(plan)


def test_the_schema_accepts_every_form_of_an_activation():
    for activation in (None, "Relu6", {"like": "r"}):
        plan = {"graphfold_plan": 1, "segments": [{**SEGMENT, "activation": activation}]}
        assert violations(plan, json_schema(), json_schema()) == []
        read_plan(plan)


def test_the_command_line_prints_the_schema(capfd: pytest.CaptureFixture[str]):
    assert main(["plan", "--schema"]) == 0
    printed = capfd.readouterr().out
    assert json.loads(printed) == json_schema()
    assert json.loads(printed)["properties"]["segments"]["items"] == {"$ref": "#/$defs/Segment"}


def test_every_field_of_the_schema_says_what_it_is():
    schema = json_schema()
    described = {
        name
        for holder in (schema, *schema["$defs"].values())
        for name, field in holder["properties"].items()
        if "description" in field
    }
    assert {"graphfold_plan", "boundary", "input", "output", "keep_blocks", "like"} <= described

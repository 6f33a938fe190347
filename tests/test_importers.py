"""The papers' short forms, written out as segments in a model's own names."""

from __future__ import annotations

from typing import Any

import onnx
import pytest
from builders import ModelBuilder, op_types
from references import reference
from test_segments import basic_blocks, graph_of, inverted_residual, mobile

import graphfold
from graphfold.errors import PlanError, Problem
from graphfold.importers import expand_short_forms
from graphfold.plan import Plan, read_plan
from graphfold.sites import find_sites


def expanded(proto: onnx.ModelProto, **plan: Any) -> dict[str, Any]:
    """The written-out plan as JSON without what is empty."""
    graph = graph_of(proto)
    written = expand_short_forms(graph, find_sites(graph), read_plan({"graphfold_plan": 1, **plan}))
    found = written.plan
    assert len(written.paths) == len(found.segments)
    assert found.keep_blocks is None
    assert found.act_ind is None
    assert read_plan(found.model_dump(mode="json", exclude_defaults=True)) == Plan(
        **found.model_dump(exclude_defaults=True)
    )
    data = found.model_dump(mode="json", exclude_defaults=True)
    return {key: value for key, value in data.items() if key != "graphfold_plan"}


def problem(proto: onnx.ModelProto, **plan: Any) -> Problem:
    with pytest.raises(PlanError) as caught:
        expanded(proto, **plan)
    (found,) = caught.value.problems
    return found


# --- keep_blocks ----------------------------------------------------------------------------------

SECOND = {"input": "project_bn_1", "output": "project_bn_2", "boundary": "exact"}
THIRD = {"input": "project_bn_2", "output": "add_3", "boundary": "exact"}


def test_removed_blocks_become_segments_and_a_first_block_loses_its_activation():
    assert expanded(mobile(), keep_blocks=[1, 0, 1]) == {"segments": [SECOND]}
    assert expanded(mobile(), keep_blocks=[1, 1, 0]) == {"segments": [THIRD]}
    assert expanded(mobile(), keep_blocks=[0, 1, 1]) == {"remove_activations": ["depthwise_act_1"]}
    assert expanded(mobile(), keep_blocks=[1, 1, 1]) == {}


def test_boundary_and_activation_are_those_of_every_segment():
    found = expanded(mobile(), keep_blocks=[0, 0, 0], boundary="hoist", activation="Relu6")
    change = {"boundary": "hoist", "activation": "Relu6"}
    assert found["segments"] == [{**SECOND, **change}, {**THIRD, **change}]
    assert found["remove_activations"] == ["depthwise_act_1"]  # no free one there


def test_no_free_activation_where_the_model_has_one():
    b = ModelBuilder([1, 4, 8, 8])
    value = inverted_residual(b, b.op("Relu", "x", out="act"), "1", 16, 4)
    value = b.op("Relu", value, out="after")
    proto = b.model(inverted_residual(b, value, "2", 16, 4))
    found = expanded(proto, keep_blocks=[0, 0], activation="Relu6")
    assert [segment.get("activation") for segment in found["segments"]] == [None, "Relu6"]


@pytest.mark.parametrize(
    ("states", "loose"),
    [
        ([1, 1, 0, 1, 1], []),
        ([0, 1, 0, 1, 1], ["stem_act"]),
        ([1, 1, 0, 1, 0], ["head_act"]),
        ([0, 0, 0, 1, 0], ["stem_act", "head_act", "depthwise_act_1"]),
    ],
)
def test_stem_and_head_may_stand_at_the_ends(states: list[int], loose: list[str]):
    found = expanded(mobile(), keep_blocks=states)
    assert found["segments"] == [SECOND]
    assert found.get("remove_activations", []) == loose


@pytest.mark.parametrize("norm", [True, False])
def test_stem_and_head_are_removed_in_the_reference_network(norm: bool):
    kept = op_types(reference(mobile(norm), keep_blocks=[1, 1, 1, 1, 1])).count("Relu")
    assert kept == 1 + 1 + 2 + 2 + 1
    removed = reference(mobile(norm), keep_blocks=[0, 0, 0, 0, 0])
    assert "Relu" not in op_types(removed)


def test_lists_beside_a_short_form_are_kept():
    found = expanded(
        mobile(),
        keep_blocks=[0, 1, 1],
        remove_activations=["head_act"],
        add_activations=[{"tensor": "project_bn_1", "activation": "Relu"}],
        objective={"seed": 1},
    )
    assert found == {
        "remove_activations": ["head_act", "depthwise_act_1"],
        "add_activations": [{"tensor": "project_bn_1", "activation": "Relu"}],
        "objective": {"seed": 1},
    }


def test_merged_only_where_cheaper():
    found = expanded(mobile(), keep_blocks=[0, 0, 1], merge="cheaper", activation="Relu6")
    assert found == {
        "remove_activations": ["depthwise_act_1", "expand_act_2", "depthwise_act_2"],
        "add_activations": [{"tensor": "project_bn_2", "activation": "Relu6"}],
    }


@pytest.mark.parametrize("count", [0, 1, 2, 4, 6])
def test_a_list_of_another_length_is_refused(count: int):
    found = problem(mobile(), keep_blocks=[1] * count)
    assert found.path == "keep_blocks"
    assert found.what == f"has {count} entries, and the model has 3 inverted-residual blocks"
    assert found.hint == "give 3 entries, or 5 with stem and head"


def test_a_model_without_such_blocks_is_refused():
    for count in (0, 2):
        found = problem(basic_blocks(), keep_blocks=[1] * count)
        assert "the model has 0 inverted-residual blocks" in found.what
        assert found.hint == "name segments instead"


@pytest.mark.parametrize(
    ("states", "index", "end"), [([0, 1, 1], 0, "stem"), ([1, 1, 0], 2, "head")]
)
def test_a_stem_or_head_that_is_not_there_is_refused(states: list[int], index: int, end: str):
    b = ModelBuilder([1, 4, 8, 8])
    proto = b.model(inverted_residual(b, "x", "1", 16, 6))
    found = problem(proto, keep_blocks=states)
    assert found.path == f"keep_blocks[{index}]"
    assert found.what == f"the model has no activation at its {end}"


# --- act_ind and conv_ind -------------------------------------------------------------------------

# mobile(): 0 stem | 1 2 first block | 3 4 5 strided | 6 7 8 residual | 9 head
EVERY = list(range(10))


def test_single_convolutions_stay_as_they_are():
    assert expanded(mobile(), act_ind=EVERY, conv_ind=EVERY) == {}


def test_runs_between_ends_become_segments():
    found = expanded(mobile(), act_ind=[0, 2, 5, 6, 7, 8], conv_ind=EVERY)
    assert found["segments"] == [
        {"input": "stem_act", "output": "project_bn_1", "boundary": "hoist"},
        {"input": "project_bn_1", "output": "project_bn_2", "boundary": "hoist"},
    ]


def test_a_run_over_a_whole_branch_ends_behind_its_add():
    found = expanded(mobile(), act_ind=[0, 1, 2, 8], conv_ind=EVERY, boundary="exact")
    assert found["segments"] == [
        {"input": "project_bn_1", "output": "add_3", "boundary": "exact"},
    ]


def test_convolutions_that_are_not_listed_are_removed():
    kept = [index for index in EVERY if index not in (1, 7)]
    found = expanded(mobile(), act_ind=[0, 1, 2, 3, 4, 5, 8], conv_ind=kept)
    assert found["segments"] == [
        {
            "input": "project_bn_2",
            "output": "add_3",
            "boundary": "hoist",
            "remove_convs": ["depthwise_3"],
        }
    ]
    assert found["remove_convs"] == ["depthwise_1"]  # alone between two ends: loose


def test_what_lies_behind_the_last_end_stays():
    assert expanded(mobile(), act_ind=[0, 1], conv_ind=[]) == {"remove_convs": ["depthwise_1"]}


def test_free_activations_of_the_sets():
    ends = [0, 2, 5, 7, 8]
    found = expanded(mobile(), act_ind=ends, conv_ind=EVERY, activation="Relu6")
    segments = [(each["output"], each.get("activation")) for each in found["segments"]]
    # 7 is followed by the model's own; the others end linearly
    assert segments == [
        ("project_bn_1", "Relu6"),
        ("project_bn_2", "Relu6"),
        ("depthwise_bn_3", None),
    ]


def test_a_segment_that_ends_inside_a_branch_is_activated_behind_the_add():
    found = expanded(mobile(), act_ind=[*range(7), 8], conv_ind=EVERY, activation="Relu6")
    (segment,) = found["segments"]
    assert (segment["input"], segment["output"]) == ("expand_act_3", "project_bn_3")
    assert "activation" not in segment
    assert found["add_activations"] == [{"tensor": "add_3", "activation": "Relu6"}]


def test_sets_are_read_as_sets():
    once = expanded(mobile(), act_ind=[0, 2, 8], conv_ind=EVERY)
    assert expanded(mobile(), act_ind=[8, 2, 2], conv_ind=EVERY[::-1]) == once


def test_indices_out_of_range_come_at_once():
    with pytest.raises(PlanError) as caught:
        expanded(mobile(), act_ind=[0, 3, 10], conv_ind=[1, 99, 12])
    assert [(each.path, each.what) for each in caught.value.problems] == [
        ("act_ind[2]", "10 is no convolution: the model has 0 to 9"),
        ("conv_ind[1]", "99 is no convolution: the model has 0 to 9"),
        ("conv_ind[2]", "12 is no convolution: the model has 0 to 9"),
    ]


@pytest.mark.parametrize("ends", [[], [0]])
def test_sets_without_an_end_are_refused(ends: list[int]):
    found = problem(mobile(), act_ind=ends, conv_ind=EVERY)
    assert (found.path, found.what) == ("act_ind", "ends no segment")


def test_a_conv_that_must_stay_is_refused_with_its_reason():
    kept = [index for index in EVERY if index != 4]
    with pytest.raises(PlanError) as caught:
        reference(mobile(), act_ind=[0, 2, 5, 8], conv_ind=kept)
    (found,) = caught.value.problems
    assert found.what == "conv 'depthwise_2' cannot be removed: its stride is 2"


def test_shortcuts_are_not_counted():
    found = expanded(basic_blocks(), act_ind=[0, 1, 3], conv_ind=[0, 1, 2, 3])
    assert found["segments"] == [{"input": "ra2", "output": "sb", "boundary": "hoist"}]
    assert problem(basic_blocks(), act_ind=[4], conv_ind=[0]).what.endswith("the model has 0 to 3")


def test_errors_name_the_entry_of_the_short_form():
    b = ModelBuilder(["N", 4, "H", "W"])
    value = inverted_residual(b, b.op("Relu", "x", out="act"), "1", 16, 4)
    wide = b.op("Relu", b.conv(value, 16, 1, out="expand_2"), out="act_2")
    deep = b.depthwise(wide, 3, stride=2, auto_pad="SAME_UPPER", out="depthwise_2")
    proto = b.model(b.conv(deep, 6, 1, out="y"))
    for plan, path in (
        ({"keep_blocks": [1, 0]}, "keep_blocks[1]"),
        ({"keep_blocks": [1, 1, 0, 1]}, "keep_blocks[2]"),
        ({"act_ind": [0, 5, 1, 2], "conv_ind": [0, 1, 2, 3, 4, 5]}, "act_ind[1]"),
    ):
        with pytest.raises(PlanError, match="depends on a size that is not fixed") as caught:
            reference(proto, **plan)
        assert [each.path for each in caught.value.problems] == [path]


def test_what_a_removed_block_removes_need_not_be_said():
    with pytest.raises(PlanError) as caught:
        reference(mobile(), keep_blocks=[1, 0, 1], remove_activations=["expand_act_2"])
    (found,) = caught.value.problems
    assert str(found) == (
        "remove_activations[0]: 'expand_act_2' lies in keep_blocks[1] "
        "(the segment removes it already)"
    )


def test_both_forms_give_verified_networks():
    for plan in (
        {"keep_blocks": [0, 0, 0]},
        {"keep_blocks": [0, 0, 0], "boundary": "hoist", "activation": "Relu6"},
        {"act_ind": [0, 5, 8], "conv_ind": [0, 2, 3, 4, 5, 6, 8], "activation": "Relu"},
    ):
        result = graphfold.optimize(mobile(), {"graphfold_plan": 1, **plan})
        assert result.report.verification is not None
        assert result.report.verification.passed


def test_a_normalisation_by_groups_moves_behind_its_segment():
    b = ModelBuilder([1, 4, 8, 8], opset=21)
    value = "x"
    for number in range(4):
        value = b.conv(value, 4, 3, pad=1, out=f"c{number}")
        if number == 2:
            ones = b.constant([1.0, 2.0, 3.0, 4.0])
            value = b.op("GroupNormalization", value, ones, ones, num_groups=2, channels=4)
    proto = b.model(value, shapes={value: [1, 4, 8, 8]})
    found = expanded(proto, act_ind=[1, 3], conv_ind=[0, 1, 2, 3])
    assert [segment.get("norm") for segment in found["segments"]] == ["after"]
    plan = {"graphfold_plan": 1, "act_ind": [1, 3], "conv_ind": [0, 1, 2, 3]}
    folded = graphfold.optimize(proto, plan)
    assert op_types(folded.model)[-2:] == ["Conv", "GroupNormalization"]

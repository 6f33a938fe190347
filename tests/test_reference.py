"""The reference network: the plan's semantics on a copy, nothing merged, nothing lost."""

from __future__ import annotations

from typing import Any

import onnx
import pytest
from builders import assert_same_function, op_types, random_input, run
from references import close, tensors
from test_segments import mobile

from graphfold.errors import PlanError
from graphfold.model import load, to_proto
from graphfold.plan import read_plan
from graphfold.reference import build_reference
from graphfold.rewrite import select_passes


def build(proto: onnx.ModelProto, plan: dict[str, Any] | None) -> tuple[bytes, Any]:
    """The model's bytes before and after, and what was built."""
    model = load(proto)
    parsed = None if plan is None else read_plan({"graphfold_plan": 1, **plan})
    before = to_proto(model).SerializeToString()
    found = build_reference(model, parsed, select_passes())
    assert to_proto(model).SerializeToString() == before  # the input is never touched
    return before, found


def test_without_a_plan_it_is_the_model():
    before, found = build(mobile(), None)
    assert to_proto(found.model).SerializeToString() == before
    assert found.segments == ()
    assert found.statistics == ()


def test_an_empty_plan_changes_nothing():
    before, found = build(mobile(), {})
    assert to_proto(found.model).SerializeToString() == before


def test_nothing_is_merged():
    _, found = build(mobile(), {"keep_blocks": [0, 0, 0]})
    changed = to_proto(found.model)
    kinds = op_types(mobile())
    assert op_types(changed) == [
        kind for index, kind in enumerate(kinds) if kind != "Relu" or index in (2, len(kinds) - 4)
    ]
    assert [each.name for each in found.statistics] == [
        *("remove_activations", "move_norms", "remove_convs"),
        *("hoist_padding", "insert_activations"),
    ]
    assert [each.applied for each in found.statistics] == [5, 0, 0, 0, 0]


def test_exact_is_the_network_with_its_activations_bypassed():
    _, found = build(mobile(), {"keep_blocks": [0, 0, 0]})
    by_hand = mobile()
    removed = {f"{kind}_act_{n}" for kind in ("expand", "depthwise") for n in (1, 2, 3)}
    for node in [node for node in by_hand.graph.node if node.output[0] in removed]:
        for reader in by_hand.graph.node:
            for index, name in enumerate(reader.input):
                if name == node.output[0]:
                    reader.input[index] = node.input[0]
        by_hand.graph.node.remove(node)
    assert_same_function(by_hand, to_proto(found.model), {"N": 2}, tolerance=1e-12)


def test_segments_carry_what_the_plan_states():
    segment = {
        "input": "project_bn_2",
        "output": "add_3",
        "boundary": "hoist",
        "kernel": [3, 3],
        "family": "dense",
    }
    _, found = build(mobile(), {"segments": [segment]})
    (names,) = found.segments
    assert (names.path, names.input, names.output) == ("segments[0]", "project_bn_2", "add_3")
    assert (names.boundary, names.kernel, names.family) == ("hoist", (3, 3), "dense")


def test_segments_keep_their_ends_when_neighbours_change():
    # The activation in front is removed, and each end gets a free one.
    segments = [
        {"input": "stem_act", "output": "project_bn_1", "boundary": "exact", "activation": "Relu6"},
        {"input": "project_bn_1", "output": "project_bn_2", "boundary": "hoist"},
    ]
    _, found = build(mobile(), {"segments": segments, "remove_activations": ["stem_act"]})
    first, second = found.segments
    assert first.input == "stem_bn"
    assert first.output == "project_bn_1/graphfold.0"
    assert second.input == "project_bn_1"
    values = found.graph.values()
    assert all(name in values for each in found.segments for name in (each.input, each.output))


def test_a_segment_that_vanishes_is_no_segment_to_fold():
    plan = {
        "segments": [
            {
                "input": "expand_act_3",
                "output": "depthwise_bn_3",
                "boundary": "exact",
                "remove_convs": ["depthwise_3"],
            }
        ]
    }
    _, found = build(mobile(), plan)
    assert found.segments == ()
    feeds = random_input(mobile(), {"N": 1})
    before, after = tensors(to_proto(found.model), ["expand_act_3", "depthwise_act_3"], feeds)
    close(after, before)  # a Relu of what a Relu gave


def test_dropped_segments_are_no_segments_to_fold():
    segment = {"input": "project_bn_2", "output": "add_3", "family": "identity"}
    _, found = build(mobile(), {"segments": [segment]})
    assert found.segments == ()
    changed = to_proto(found.model)
    assert "Add" not in op_types(changed)
    feeds = random_input(changed, {"N": 1})
    expected = mobile()
    head = next(node for node in expected.graph.node if node.output[0] == "head")
    head.input[0] = "project_bn_2"
    close(run(changed, feeds)[0], run(expected, feeds)[0], 1e-12)


def test_all_segments_that_cannot_be_folded_come_at_once():
    segments = [
        {"input": "x", "output": "project_bn_1", "boundary": "exact"},
        {"input": "project_bn_1", "output": "add_3", "boundary": "exact"},
    ]
    with pytest.raises(PlanError) as caught:
        build(mobile(), {"segments": segments})
    found = caught.value.problems
    assert [each.path for each in found] == ["segments[0]", "segments[1]"]
    assert {each.hint for each in found} == {"boundary: hoist would work"}
    assert all(each.what.startswith("cannot become one convolution") for each in found)


def test_interface_and_metadata_survive():
    proto = mobile()
    proto.doc_string = "kept"
    entry = proto.metadata_props.add()
    entry.key, entry.value = "author", "someone"
    proto.graph.node[0].doc_string = "stem"
    _, found = build(proto, {"keep_blocks": [0, 0, 0], "boundary": "hoist"})
    changed = to_proto(found.model)
    assert list(changed.graph.input) == list(proto.graph.input)
    assert list(changed.graph.output) == list(proto.graph.output)
    assert list(changed.metadata_props) == list(proto.metadata_props)
    assert list(changed.opset_import) == list(proto.opset_import)
    assert changed.doc_string == "kept"
    assert changed.graph.node[0].doc_string == "stem"

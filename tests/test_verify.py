"""Verification: what passes, what fails, what is blamed, and on which inputs."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import onnx
import pytest
import small_models as small
from onnx import TensorProto, helper

from graphfold import runtime
from graphfold.comparison import (
    absolute_error,
    agreement,
    border_split,
    difference,
    tolerance_for,
)
from graphfold.errors import DataError, UsageError
from graphfold.model import load
from graphfold.rewrite import Fold
from graphfold.verifier import verify


def fold(output: str, *, reach=((1, 1), (1, 1)), segment=None, pass_name="merge_convs") -> Fold:
    return Fold(
        output=output,
        replaces=("a", "b"),
        kernel=(3, 3),
        strides=(1, 1),
        groups=1,
        boundary="exact",
        repair=None,
        reach=reach,
        pass_name=pass_name,
        segment=segment,
    )


def run(reference: onnx.ModelProto, candidate: onnx.ModelProto, **options):
    return verify(load(reference), load(candidate), **options)


# Passing and failing --------------------------------------------------------------------------


def test_a_model_equals_itself():
    model = small.conv_bn_relu()
    found = run(model, model)
    assert found.passed is True
    assert found.max_abs == 0
    assert found.failure() is None


def test_a_network_with_another_function_fails_and_its_output_is_named():
    found = run(small.chain(1.0), small.chain(1.01))
    assert found.passed is False
    assert "'t0'" in found.failure()
    assert found.max_rel == pytest.approx(0.01, rel=1e-3)


def test_errors_within_the_tolerance_pass():
    assert run(small.chain(1.0), small.chain(1.00005)).passed is True
    assert run(small.chain(1.0), small.chain(1.0005)).passed is False
    assert run(small.chain(1.0), small.chain(1.0005), tolerance=1e-3).passed is True


def test_the_worst_output_is_the_one_with_the_largest_relative_error():
    def two_outputs(small_factor: float) -> onnx.ModelProto:
        nodes = [
            helper.make_node("Mul", ["x", "big"], ["big_output"]),
            helper.make_node("Mul", ["x", "small"], ["small_output"]),
        ]
        constants = {
            "big": np.float32(1000.001 if small_factor > 1 else 1000.0).reshape(1),
            "small": np.float32(small_factor).reshape(1),
        }
        return small.build(nodes, {"x": [1, 4]}, ["big_output", "small_output"], constants)

    found = run(two_outputs(1.0), two_outputs(1.0001))
    assert found.worst.name == "small_output"


def test_a_missing_output_fails():
    model = small.chain(1.0, 1.0)
    other = load(model)
    del other.ir.graph.outputs[:]
    other.ir.graph.outputs.append(next(iter(other.ir.graph)).outputs[0])
    found = verify(load(model), other)
    assert found.passed is False
    assert "no output 't1'; it has 't0'" in found.failure()


def test_the_same_nan_on_both_sides_is_no_difference():
    nodes = [helper.make_node("Log", ["x"], ["y"])]
    model = small.build(nodes, {"x": [1, 50]}, ["y"])
    found = run(model, model)
    assert found.passed is True
    assert any("finite" in text for text in found.warnings)


def test_nan_in_the_candidate_only_fails():
    good = small.build([helper.make_node("Abs", ["x"], ["y"])], {"x": [1, 50]}, ["y"])
    bad = small.build([helper.make_node("Sqrt", ["x"], ["y"])], {"x": [1, 50]}, ["y"])
    found = run(good, bad)
    assert found.passed is False
    assert found.to_json()["max_abs"] is None


def test_a_candidate_that_does_not_load_fails_with_the_reason():
    good = small.build([helper.make_node("Abs", ["x"], ["y"])], {"x": [1, 3]}, ["y"])
    found = run(good, small.custom_operator())
    assert found.passed is False
    assert "candidate network" in found.failure()


# Folds ------------------------------------------------------------------------------------------


def test_a_naive_bias_is_wrong_at_the_border_only():
    found = run(
        small.pointwise_then_padded(),
        small.pointwise_then_padded(merged=True),
        folds=[fold("y")],
    )
    assert found.passed is False
    (item,) = found.folds
    assert item.interior_abs < 1e-5
    assert item.border_abs > 0.1
    assert "border" in found.failure()


def test_a_wrong_kernel_is_wrong_inside_too():
    found = run(
        small.pointwise_then_padded(),
        small.pointwise_then_padded(merged=True, scale=1.1),
        folds=[fold("y")],
    )
    assert found.folds[0].interior_abs > 0.01


def test_the_first_deviating_fold_is_blamed_with_its_plan_line_and_pass():
    folds = [
        fold("t3", segment="$.segments[1]"),
        fold("t1", segment="$.segments[0]"),
        fold("t0"),
    ]
    found = run(small.chain(1, 1, 2, 1), small.chain(1, 1.5, 2, 1), folds=folds)
    assert [item.fold.output for item in found.folds] == ["t0", "t1", "t3"]
    assert found.first_failing_fold.fold.output == "t1"
    assert "$.segments[0]" in found.failure()
    assert "--skip-pass merge_convs" in found.failure()


def test_fold_errors_are_relative_to_the_tensors_own_scale():
    found = run(small.chain(1000), small.chain(1001), folds=[fold("t0", reach=((0, 0), (0, 0)))])
    (item,) = found.folds
    assert item.relative(item.max_abs) == pytest.approx(1e-3, rel=1e-2)
    assert item.border_abs is None


def test_a_missing_fold_tensor_is_a_warning():
    found = run(small.chain(1, 1), small.chain(1, 1), folds=[fold("nowhere"), fold("t0")])
    assert found.passed is True
    assert any("nowhere" in text for text in found.warnings)
    assert found.folds[-1].max_abs is None or found.folds[0].max_abs is None


# Inputs -----------------------------------------------------------------------------------------


def test_unknown_sizes_are_tried_and_named():
    nodes = [helper.make_node("Relu", ["x"], ["y"])]
    model = small.build(nodes, {"x": ["N", 3, "H", "W"]}, ["y"])
    found = run(model, model)
    assert found.shapes[0]["x"] == (2, 3, 224, 224)
    assert found.shapes[1]["x"] == (1, 3, 160, 160)
    assert "[2, 3, 224, 224]" in found.inputs


def test_smaller_sizes_are_tried_where_the_model_refuses_224():
    nodes = [
        helper.make_node("Reshape", ["x", "shape"], ["flat"]),
        helper.make_node("MatMul", ["flat", "w"], ["y"]),
    ]
    constants = {"shape": np.array([-1, 64 * 64]), "w": small.weight(64 * 64, 3)}
    model = small.build(nodes, {"x": ["N", 1, "H", "W"]}, ["y"], constants)
    # At 224 the Reshape has no whole number of rows: 2 * 224 * 224 / 4096 = 24.5.
    assert run(model, model).shapes[0]["x"] == (2, 1, 64, 64)


def test_a_model_that_runs_at_no_size_is_not_verified_and_says_what_was_tried():
    nodes = [
        helper.make_node("Reshape", ["x", "shape"], ["flat"]),
        helper.make_node("MatMul", ["flat", "w"], ["y"]),
    ]
    constants = {"shape": np.array([-1, 77]), "w": small.weight(77, 3)}
    model = small.build(nodes, {"x": ["N", 1, "H", "W"]}, ["y"], constants)
    found = run(model, model)
    assert found.passed is None
    assert "[2, 1, 224, 224]" in found.reason
    assert "[2, 1, 32, 32]" in found.reason


def test_a_model_that_onnxruntime_cannot_load_is_not_verified():
    found = run(small.custom_operator(), small.custom_operator())
    assert found.passed is None
    assert "Unheard" in found.reason


@pytest.mark.parametrize("name", ["", "x"])
def test_given_sizes_override_the_tried_ones(name):
    model = small.build([helper.make_node("Relu", ["x"], ["y"])], {"x": ["N", 3, "H", "W"]}, ["y"])
    found = run(model, model, input_shapes={name: (1, 3, 17, 19)})
    assert [shape["x"] for shape in found.shapes] == [(1, 3, 17, 19)] * 2


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"z": (1, 3, 8, 8)}, "no input"),
        ({"x": (3, 8, 8)}, "3 axes"),
        ({"x": (1, 4, 8, 8)}, "does not fit"),
        ({"x": (0, 3, 8, 8)}, "start at 1"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(shapes, message):
    model = small.conv_bn_relu()
    with pytest.raises(UsageError, match=message):
        run(model, model, input_shapes=shapes)


def test_given_inputs_are_used_and_labels_ignored():
    model = small.conv_bn_relu()
    feed = {"x": np.ones((3, 3, 8, 8), np.float32), "labels": np.zeros(3)}
    found = run(model, model, inputs=iter([feed, feed]))
    assert found.passed is True
    assert found.inputs == "2 given"
    assert found.outputs[0].off.total == 2 * 3 * 5


@pytest.mark.parametrize(
    ("feed", "message"),
    [
        ({}, "no array for input 'x'"),
        ({"x": np.ones((1, 3, 8, 8)), "z": np.ones(1)}, "'z' is no input"),
        ({"x": np.ones((1, 4, 8, 8))}, "the model wants"),
        ({"x": np.ones((3, 8, 8))}, "the model wants"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(feed, message):
    model = small.conv_bn_relu()
    with pytest.raises(DataError, match=message):
        run(model, model, inputs=[feed])


def test_no_inputs_at_all_are_refused():
    model = small.conv_bn_relu()
    with pytest.raises(DataError, match="empty"):
        run(model, model, inputs=[])


def test_floats_are_no_integers():
    nodes = [helper.make_node("Gather", ["table", "ids"], ["y"])]
    model = small.build(
        nodes,
        {"ids": ["N", 4]},
        {"y": TensorProto.FLOAT},
        {"table": small.weight(3, 5)},
        types={"ids": TensorProto.INT64},
    )
    with pytest.raises(DataError, match="int64"):
        run(model, model, inputs=[{"ids": np.ones((1, 4), np.float32)}])
    # Random token ids: 9 is out of this table's range, so smaller ones are tried.
    assert run(model, model).passed is True


def test_sizes_as_an_input_get_a_value_that_runs():
    nodes = [helper.make_node("Expand", ["x", "shape"], ["y"])]
    model = small.build(
        nodes,
        {"x": [1, 1], "shape": [2]},
        {"y": TensorProto.FLOAT},
        types={"shape": TensorProto.INT64},
    )
    assert run(model, model).passed is True


def test_8_bit_inputs_take_their_full_range():
    nodes = [helper.make_node("Cast", ["x"], ["y"], to=TensorProto.FLOAT)]
    model = small.build(nodes, {"x": [1, 3, 50, 50]}, ["y"], types={"x": TensorProto.UINT8})
    assert run(model, model).outputs[0].off.scale > 200


def test_the_seed_decides_the_inputs():
    model, other = small.chain(1.0), small.chain(1.01)
    first, again, different = (run(model, other, seed=seed).max_abs for seed in (0, 0, 1))
    assert first == again != different


# Types and nondeterminism -----------------------------------------------------------------------


def test_outputs_that_differ_from_run_to_run_are_not_compared():
    nodes = [
        helper.make_node("RandomNormalLike", ["x"], ["noise"]),
        helper.make_node("Relu", ["x"], ["y"]),
    ]
    model = small.build(nodes, {"x": [1, 8]}, ["noise", "y"])
    found = run(model, model)
    assert found.passed is True
    assert found.not_compared == ("noise",)
    assert [item.name for item in found.outputs] == ["y"]


def test_nothing_is_claimed_where_every_output_is_random():
    nodes = [helper.make_node("RandomNormalLike", ["x"], ["noise"])]
    model = small.build(nodes, {"x": [1, 8]}, ["noise"])
    assert run(model, model).passed is None


def arg_max(*, flipped: bool = False) -> onnx.ModelProto:
    nodes = [
        helper.make_node("Neg" if flipped else "Identity", ["x"], ["z"]),
        helper.make_node("ArgMax", ["z"], ["y"], axis=1, keepdims=0),
    ]
    return small.build(nodes, {"x": [16, 8]}, {"y": TensorProto.INT64})


def test_integer_outputs_must_not_differ_more_than_the_reference_does_itself():
    assert run(arg_max(), arg_max()).passed is True
    found = run(arg_max(), arg_max(flipped=True))
    assert found.passed is False
    assert "values" in found.failure()


def half(kind: int, factor: float) -> onnx.ModelProto:
    nodes = [
        helper.make_node("Mul", ["x", "w"], ["z"]),
        helper.make_node("Cast", ["z"], ["y"], to=kind),
    ]
    constants = {"w": np.array([factor], np.float32)}
    return small.build(nodes, {"x": [1, 64]}, {"y": kind}, constants)


@pytest.mark.parametrize(
    ("kind", "within", "beyond"),
    [(TensorProto.FLOAT16, 1.008, 1.03), (TensorProto.BFLOAT16, 1.03, 1.3)],
)
def test_half_precision_has_a_wider_tolerance_but_not_any(kind, within, beyond):
    assert run(half(kind, 1.0), half(kind, within)).passed is True
    assert run(half(kind, 1.0), half(kind, beyond)).passed is False


def test_tolerance_per_type():
    assert tolerance_for("float32") == 1e-4
    assert 1e-4 < tolerance_for("float16") < tolerance_for("bfloat16") < 0.2
    assert tolerance_for("float16", 1e-3) == 1e-3


# Resources --------------------------------------------------------------------------------------


def test_models_over_the_size_limit_go_through_files(monkeypatch, tmp_path):
    monkeypatch.setattr(runtime, "LARGEST_IN_MEMORY", 0)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    model = small.conv_bn_relu()
    assert run(model, model, folds=[fold("conv")]).passed is True
    assert list(tmp_path.iterdir()) == []


def test_one_session_at_a_time(monkeypatch):
    alive: list[weakref.ref] = []
    most = 0
    plain = runtime._open

    def counting(*arguments):
        nonlocal most
        session = plain(*arguments)
        gc.collect()
        alive.append(weakref.ref(session))
        most = max(most, sum(item() is not None for item in alive))
        return session

    monkeypatch.setattr(runtime, "_open", counting)
    model = small.conv_bn_relu()
    run(model, model)
    assert len(alive) == 5
    assert most == 1


def test_progress_is_told():
    calls = []
    model = small.chain(1.0)
    run(model, model, progress=lambda *call: calls.append(call))
    assert [done for _, done, _ in calls] == sorted(done for _, done, _ in calls)
    assert calls


def test_nothing_is_printed(capfd):
    run(small.custom_operator(), small.custom_operator())
    run(small.chain(1.0), small.chain(2.0))
    assert capfd.readouterr() == ("", "")


@pytest.mark.needs_shared
@pytest.mark.parametrize("name", ["facemesh.onnx", "mlperftiny_resnet8_int8.onnx"])
def test_a_models_own_difference_between_off_and_on_is_not_blamed_on_a_fold(shared, name):
    model = load(shared / "models" / name)
    found = verify(model, model.clone())
    assert found.passed is True
    for item in found.outputs:
        assert item.limit_on >= item.reference_off_on.max_abs or not item.is_float


# The measures -----------------------------------------------------------------------------------


def test_border_and_interior_are_told_apart_per_side():
    expected = np.zeros((1, 2, 6, 7))
    actual = expected.copy()
    actual[0, 0, 0, 3] = 1.0
    actual[0, 1, 3, 3] = 0.5
    assert border_split(expected, actual, ((1, 0), (0, 2))) == (0.5, 1.0)
    assert border_split(expected, actual, ((0, 1), (0, 2))) == (1.0, 0.0)
    assert border_split(expected, actual, ((0, 0), (0, 0))) == (1.0, None)


def test_where_all_is_border_there_is_no_interior():
    expected = np.zeros((1, 1, 2, 2))
    assert border_split(expected, expected + 1, ((1, 1), (1, 1))) == (None, 1.0)
    assert border_split(expected, expected + 1, ((5, 5), (0, 0))) == (None, 1.0)


@pytest.mark.parametrize("rank", [1, 3])
def test_borders_exist_in_one_and_three_dimensions(rank):
    expected = np.zeros((1, 1, *[5] * rank))
    actual = expected.copy()
    actual[(0, 0, *[0] * rank)] = 1.0
    assert border_split(expected, actual, ((1, 1),) * rank) == (0.0, 1.0)


def test_agreement_and_divergence_of_logits_and_probabilities():
    logits = np.array([[2.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    other = np.array([[2.0, 0.0, 0.0], [2.0, 1.0, 0.0]])
    found = agreement([logits], [other])
    p = np.exp(logits[1]) / np.exp(logits[1]).sum()
    q = np.exp(other[1]) / np.exp(other[1]).sum()
    assert found.top1 == 0.5
    assert found.kl == pytest.approx((p * np.log(p / q)).sum() / 2)
    from_probabilities = agreement([p[None]], [q[None]])
    assert from_probabilities.kl == pytest.approx((p * np.log(p / q)).sum())


def test_feature_maps_have_no_agreement():
    assert agreement([np.zeros((1, 3, 2, 2))], [np.zeros((1, 3, 2, 2))]) is None


def test_differences_of_shape_and_infinity_are_infinite():
    assert difference([np.zeros(3)], [np.zeros(4)]).max_abs == np.inf
    assert difference([np.zeros(3)], []).max_abs == np.inf
    error = absolute_error(np.array([np.inf, np.nan, 1.0]), np.array([np.inf, np.nan, np.inf]))
    assert error.tolist() == [0.0, 0.0, np.inf]


def test_inputs_that_no_numbers_are_made_for_leave_the_result_unverified():
    sequence = helper.make_value_info(
        "x", helper.make_sequence_type_proto(helper.make_tensor_type_proto(TensorProto.FLOAT, [2]))
    )
    result = helper.make_tensor_value_info("y", TensorProto.INT64, [])
    graph = helper.make_graph(
        [helper.make_node("SequenceLength", ["x"], ["y"])], "g", [sequence], [result]
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    found = verify(load(proto), load(proto))
    assert found.passed is None
    assert "no inputs can be made for it" in found.reason

"""Every method from a model file to a verified fold: what profiling offers it, what it chooses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
from builders import ModelBuilder, run
from fake_timer import WHOLE, FakeTimer

import graphfold
from graphfold.calibration.profile import profile_model
from graphfold.candidates import find_candidates
from graphfold.cuts import cut_layout
from graphfold.depth_table import Ends, depth_rows
from graphfold.drops import find_drops, with_whole_blocks
from graphfold.errors import BudgetError, UsageError
from graphfold.graph import Graph
from graphfold.measures import (
    ImportanceHeader,
    ImportanceRow,
    ImportanceTable,
    LatencyRow,
    LatencyTable,
    write_table,
)
from graphfold.model import load
from graphfold.planner import Planning, additions, importance_without_data, prepare

SHAPE = (1, 3, 16, 16)


def inverted() -> onnx.ModelProto:
    """Two inverted residual blocks, the first residual, between two convolutions."""
    build = ModelBuilder(SHAPE)
    x = build.op("Clip", build.norm(build.conv("x", 8, 3, pad=1)), *limits(build))
    skip = x
    for out in ("added", None):
        y = build.op("Clip", build.norm(build.conv(x, 48)), *limits(build))
        y = build.op("Clip", build.norm(build.depthwise(y, 3, pad=1)), *limits(build))
        y = build.norm(build.conv(y, 8))
        x = build.op("Add", y, skip, out=out) if out else y
    x = build.op("Clip", build.conv(x, 16), *limits(build))
    return build.model(build.op("GlobalAveragePool", x, out="y"))


def limits(build: ModelBuilder) -> tuple[str, str]:
    return build.constant(0.0), build.constant(6.0)


def residual() -> onnx.ModelProto:
    """A block whose merge pays, and one of two convolutions that keep the shape."""
    build = ModelBuilder(SHAPE)
    x = build.op("Relu", build.norm(build.conv("x", 8, 3, pad=1)), out="stem")
    for width, kernel in ((32, 1), (8, 3)):
        y = build.op("Relu", build.norm(build.conv(x, width, kernel, pad=kernel // 2)))
        y = build.norm(build.conv(y, 8, 3, pad=1))
        x = build.op("Relu", build.op("Add", y, x))
    return build.model(build.conv(x, 4, out="y"))


def plain() -> onnx.ModelProto:
    """Convolutions one behind the other, and pools."""
    build = ModelBuilder(SHAPE)
    x = build.op("Relu", build.conv("x", 8, 3, pad=1))
    x = build.op("Relu", build.conv(x, 32))
    x = build.op("Relu", build.conv(x, 8, 3, pad=1))
    x = build.op("MaxPool", x, kernel_shape=[2, 2], strides=[2, 2], channels=8)
    x = build.op("Relu", build.conv(x, 8, 3, pad=1))
    x = build.op("Relu", build.conv(x, 8, 3, pad=1))
    return build.model(build.conv(x, 4, out="y"))


class Quick(FakeTimer):
    """The fastest network takes a fifth of the time."""

    def compare(self, other: Any) -> tuple[float, float]:
        del other
        return WHOLE, 0.2


def profiled(model: onnx.ModelProto) -> LatencyTable:
    return profile_model(load(model), make_timer=Quick).table


def planned(model: onnx.ModelProto, method: Any, kind: Any = "macs") -> Planning:
    return prepare(load(model), profiled(model), kind, method=method)


NETWORKS = {"inverted": inverted, "residual": residual, "plain": plain}
WORK = [
    (name, method)
    for name in NETWORKS
    for method in ("layermerge", "depth", "layer-only", "sequential", "depthshrinker")
    if (name, method) != ("plain", "depthshrinker")
]


@pytest.mark.parametrize("kind", ["uniform", "macs", "l1"])
@pytest.mark.parametrize(("name", "method"), WORK)
def test_every_method_leads_from_a_model_to_a_verified_fold(
    name: str, method: str, kind: str
) -> None:
    model = NETWORKS[name]()
    found = graphfold.make_plan(
        model, latency=profiled(model), importance=kind, speedup=1.05, method=method
    )
    assert found.plan is not None
    assert found.point is not None
    assert 0 < found.point.latency <= found.planning.original / 1.05 * (1 + 1e-9)
    segments = found.plan.segments
    assert segments
    drops = [segment for segment in segments if segment.family == "identity"]
    if method in ("depth", "depthshrinker"):
        assert not drops
        assert not any(segment.remove_convs for segment in segments)
    if method == "layer-only":
        assert drops == segments
    result = graphfold.optimize(model, found.plan.model_dump(exclude_none=True))
    assert result.report.verification is not None
    assert result.report.verification.passed


@pytest.mark.parametrize("method", ["depth", "layer-only", "sequential", "depthshrinker"])
def test_the_network_as_it_is_is_always_a_choice(method: str) -> None:
    model = inverted()
    table = profiled(model)
    # Nothing else is as fast: neither a drop nor a merge of what is linear as it is.
    rows = tuple(row if row.unchanged else slower(row) for row in table.rows)
    table = table.model_copy(update={"rows": rows})
    planning = prepare(load(model), table, "macs", method=method)  # type: ignore[arg-type]
    (only,) = planning.points()
    assert (only.importance, only.segments) == (0, 0)
    assert only.latency == pytest.approx(planning.original)


def slower(row: LatencyRow) -> LatencyRow:
    return row.model_copy(update={"value": 1e3})


# What is dropped --------------------------------------------------------------------------------


def test_convolutions_that_go_alone_are_the_removable_ones() -> None:
    for make in NETWORKS.values():
        candidates = find_candidates(Graph(load(make())))
        single = [each for each in find_drops(candidates) if len(each.candidate.convs) == 1]
        assert tuple(each.candidate.convs[0] for each in single) == candidates.removable


def test_only_an_activation_that_still_works_takes_time() -> None:
    build = ModelBuilder(SHAPE)
    x = build.op("Relu", build.conv("x", 8, 3, pad=1))
    x = build.op("Relu", build.conv(x, 8, 3, pad=1, out="repeats"))
    x = build.op("Clip", build.conv(x, 8, 3, pad=1, out="clips"), *limits(build))
    x = build.op("Relu", build.conv(x, 8, 3, pad=1, out="within"))
    x = build.op("HardSwish", build.conv(x, 8, 3, pad=1, out="other"))
    x = build.op("HardSwish", build.conv(x, 8, 3, pad=1, out="twice"))
    model = build.model(build.conv(x, 8, 3, pad=1, out="bare"))
    table = profiled(model)
    value = {
        row.output: row.value
        for row in table.rows
        if row.family == "identity" and len(row.removed_convs or ()) == 1
    }
    free = {"repeats", "within", "bare"}
    assert {name for name, time in value.items() if time == 0} == free
    assert value.keys() - free == {"clips", "other", "twice"}


def test_a_block_that_lost_all_its_convolutions_goes_whole() -> None:
    model = residual()
    planning = planned(model, "layer-only")
    fastest = planning.frontier.fastest
    plan = planning.plan(fastest)
    # The second block's two convolutions; the first one's change the number of channels.
    (segment,) = plan.segments
    assert segment.family == "identity"
    folded = graphfold.optimize(model, plan).model
    ops = [node.op_type for node in folded.graph.node]
    assert ops.count("Add") + ops.count("Sum") <= 1
    feeds = {"x": np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)}
    inside = onnx.helper.make_tensor_value_info(segment.input, onnx.TensorProto.FLOAT, None)
    seen = onnx.ModelProto()
    seen.CopyFrom(model)
    seen.graph.output.append(inside)
    block_input = run(seen, feeds)[1]
    weight, bias = (onnx.numpy_helper.to_array(item) for item in model.graph.initializer[-2:])
    head = np.einsum("oi,nihw->nohw", weight[:, :, 0, 0], block_input) + bias[:, None, None]
    np.testing.assert_allclose(run(folded, feeds)[0], head, rtol=1e-4, atol=1e-4)


def test_a_block_with_a_convolution_left_stays() -> None:
    candidates = find_candidates(Graph(load(residual())))
    drops = find_drops(candidates)
    single = [each.row for each in drops if len(each.candidate.convs) == 1]
    assert len(single) == 2
    assert with_whole_blocks(single[:1], drops) == {}
    assert sorted(map(bool, with_whole_blocks(single, drops).values())) == [False, True]


def test_where_nothing_can_be_dropped_that_is_told() -> None:
    build = ModelBuilder(SHAPE)
    model = build.model(build.conv(build.op("Relu", build.conv("x", 8, 3)), 4, 3, out="y"))
    with pytest.raises(UsageError, match="no convolution of this model may be dropped"):
        planned(model, "layer-only")
    older = profiled(residual())
    kept = tuple(row for row in older.rows if row.family != "identity")
    older = older.model_copy(update={"rows": kept})
    with pytest.raises(UsageError, match="latency table has no row of a convolution dropped"):
        prepare(load(residual()), older, "macs", method="layer-only")
    prepare(load(residual()), older, "macs", method="layermerge")


def test_an_importance_table_of_another_method_serves_where_it_tells_enough() -> None:
    model = residual()
    latencies = profiled(model)
    candidates = find_candidates(Graph(load(model)))
    merges = importance_without_data(candidates, "macs", latencies=latencies)
    assert len(prepare(load(model), latencies, merges).frontier) > 1
    with pytest.raises(UsageError, match="importance table has no row of a convolution dropped"):
        prepare(load(model), latencies, merges, method="layer-only")
    both = importance_without_data(candidates, "macs", method="sequential", latencies=latencies)
    planning = prepare(load(model), latencies, both, method="sequential")
    assert any(
        row.family == "identity" for pieces in planning.frontier.fastest.choices for row in pieces
    )


# Activation states ------------------------------------------------------------------------------


def test_states_are_told_apart_between_convolutions_without_an_activation() -> None:
    candidates = find_candidates(Graph(load(inverted())))
    names = [value.name for value in Ends(candidates).free]
    assert len(names) == 2
    assert names[0] == "added"
    assert additions(profiled(inverted())).keys() == set(names)
    layout = cut_layout(candidates).layout
    ends_of_branch = [row for row in depth_rows(candidates) if layout.place(row.output) == "added"]
    assert {row.end_active for row in ends_of_branch} == {True, False}
    assert {row.output for row in ends_of_branch} > {"added"}


def test_a_state_at_a_branchs_end_is_the_one_behind_the_join() -> None:
    model = inverted()
    candidates = find_candidates(Graph(load(model)))
    latencies = profiled(model)
    free = importance_without_data(candidates, "uniform", method="depth", latencies=latencies)
    # An activation behind the Add is worth most, and only both sides of it together state it.
    layout = cut_layout(candidates).layout
    rows = tuple(
        row.model_copy(update={"value": 1.0 if _is_at(layout, row, "added") else row.value})
        for row in free.rows
    )
    table = ImportanceTable(header=ImportanceHeader(created_by="t"), no_change=0.0, rows=rows)
    planning = prepare(load(model), latencies, table, method="depth")
    best = planning.frontier.best
    states = [
        (layout.place(row.output) == "added", row.end_active, row.start_active)
        for pieces in best.choices
        for row in pieces
        if "added" in (layout.place(row.output), layout.cut(row.input))
    ]
    assert all(end if behind else start for behind, end, start in states)
    plan = planning.plan(best, boundary="hoist")
    added = [item.tensor for item in plan.add_activations]
    added += [item.output for item in plan.segments if item.activation is not None]
    assert added.count("added") == 1
    folded = graphfold.optimize(model, plan)
    assert folded.report.verification is not None
    assert folded.report.verification.passed
    unadded = planning.latencies.rest + sum(row.value for row in latencies.rows if row.unchanged)
    assert planning.point(best).latency <= unadded + sum(additions(latencies).values())


def _is_at(layout: Any, row: ImportanceRow, place: str) -> bool:
    ends = layout.place(row.output) == place and row.end_active is True
    return ends or (layout.cut(row.input) == place and row.start_active is True)


def test_an_added_activation_is_paid_for() -> None:
    model = inverted()
    candidates = find_candidates(Graph(load(model)))
    table = profiled(model)
    rows = importance_without_data(candidates, "uniform", method="depth", latencies=table).rows
    wanted = tuple(
        row.model_copy(update={"value": 5.0 if row.unchanged and row.end_active else row.value})
        for row in rows
    )
    worth = ImportanceTable(header=ImportanceHeader(created_by="t"), no_change=0.0, rows=wanted)
    planning = prepare(load(model), table, worth, method="depth")
    paid = planning.point(planning.frontier.best).latency - planning.original
    assert paid == pytest.approx(sum(additions(table).values()))
    assert paid > 0


def test_no_activation_is_put_at_the_models_output_or_where_all_have_parameters() -> None:
    build = ModelBuilder(SHAPE)
    x = build.conv(build.op("Relu", build.conv("x", 8, 3, pad=1)), 8, 3, pad=1, out="linear")
    candidates = find_candidates(Graph(load(build.model(build.conv(x, 4, out="y")))))
    assert [value.name for value in Ends(candidates).free] == ["linear"]
    assert all(row.end_active is None for row in depth_rows(candidates) if row.output == "y")
    build = ModelBuilder(SHAPE)
    slopes = build.constant(np.full((8, 1, 1), 0.1))
    x = build.op("PRelu", build.conv("x", 8, 3, pad=1), slopes)
    candidates = find_candidates(
        Graph(load(build.model(build.conv(build.conv(x, 8, 3), 4, out="y"))))
    )
    assert Ends(candidates).usual is None
    assert Ends(candidates).free == ()


def test_a_row_of_linear_convolutions_may_stay_as_it_is() -> None:
    build = ModelBuilder(SHAPE)
    x = build.op("Relu", build.conv("x", 8, 3, pad=1))
    for _ in range(3):
        x = build.conv(x, 8, 3, pad=1)
    planning = planned(build.model(build.conv(build.op("Relu", x), 4, out="y")), "depth")
    best = planning.frontier.best
    assert best.importance == 0
    assert planning.point(best).latency <= planning.original
    plan = planning.plan(best)
    assert not plan.add_activations
    assert not any(segment.activation for segment in plan.segments)


# The other methods' limits ----------------------------------------------------------------------


def test_without_blocks_there_is_nothing_for_depthshrinker() -> None:
    with pytest.raises(UsageError, match="no inverted-residual or residual blocks"):
        planned(plain(), "depthshrinker")


def test_residual_blocks_serve_where_none_is_inverted() -> None:
    planning = planned(residual(), "depthshrinker")
    plan = planning.plan(planning.frontier.fastest, boundary="hoist")
    # The pointwise and the 3x3 convolution with their Add become one 3x3.
    assert [segment.kernel for segment in plan.segments] == [[3, 3], [5, 5]]
    assert not any(segment.remove_convs for segment in plan.segments)


@pytest.mark.parametrize("make", [inverted, residual])
def test_sequential_is_at_least_as_good_as_its_parts(make: Callable[[], Any]) -> None:
    both, depth = (planned(make(), method, "uniform") for method in ("sequential", "depth"))
    for solution in depth.frontier:
        assert both.frontier.within(solution.latency).importance >= solution.importance - 1e-12
    assert len(both.frontier) >= len(depth.frontier)


def test_where_nothing_is_faster_the_method_is_named() -> None:
    model = residual()
    table = profiled(model)
    rows = tuple(row if row.unchanged else slower(row) for row in table.rows)
    table = table.model_copy(update={"rows": rows})
    with pytest.raises(BudgetError, match="nothing that depth may choose is faster"):
        graphfold.make_plan(model, latency=table, importance="macs", speedup=1.2, method="depth")


def test_the_command_knows_every_method(tmp_path: Any, capfd: pytest.CaptureFixture[str]) -> None:
    from graphfold.cli import main

    onnx.save(inverted(), tmp_path / "m.onnx")
    write_table(profiled(inverted()), tmp_path / "t.json")
    for method in ("layermerge", "depth", "layer-only", "sequential", "depthshrinker"):
        out = tmp_path / f"{method}.json"
        arguments = [
            *("plan", str(tmp_path / "m.onnx"), "--latency", str(tmp_path / "t.json"), "-q"),
            *("--importance", "l1", "--speedup", "1.05", "--method", method, "-o", str(out)),
        ]
        assert main(arguments) == 0, capfd.readouterr().err
        assert out.exists()

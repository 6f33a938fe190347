"""From tables to plans: cuts, importances without data, the frontier, confirmation, the command."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from builders import ModelBuilder

import graphfold
from graphfold.calibration import planning as planning_module
from graphfold.candidates import find_candidates
from graphfold.cli import main
from graphfold.cuts import choice_row, cut_layout, is_no_change
from graphfold.errors import BudgetError, UsageError
from graphfold.graph import Graph
from graphfold.measures import LatencyHeader, LatencyRow, LatencyTable, write_table
from graphfold.model import load
from graphfold.planner import importance_without_data, prepare, spread_over
from graphfold.plot import Series, scatter


def network() -> onnx.ModelProto:
    """A plain convolution, a residual inverted block, a pool, a convolution, a head."""
    build = ModelBuilder([1, 3, 16, 16])
    x = build.op("Relu", build.norm(build.conv("x", 8, 3, pad=1)), out="stem")
    y = build.op("Relu", build.norm(build.conv(x, 24, 1)))
    y = build.op("Relu", build.norm(build.conv(y, 24, 3, pad=1, groups=24)))
    y = build.norm(build.conv(y, 8, 1), out="projected")
    y = build.op("Add", y, x, out="added", channels=8)
    y = build.op("MaxPool", y, kernel_shape=[2, 2], strides=[2, 2], out="pooled", channels=8)
    y = build.op("Relu", build.conv(y, 8, 3, pad=1))
    y = build.conv(y, 8, 3, pad=1, out="last")
    return build.model(build.op("GlobalAveragePool", y, out="y"))


def latencies(model: onnx.ModelProto, *, gain: float = 0.5) -> LatencyTable:
    """One millisecond for every convolution as it is, `gain` of what it replaces for a merge."""
    candidates = find_candidates(Graph(load(model)))
    rows = []
    for step in cut_layout(candidates).steps:
        count = sum(node.op_type == "Conv" for node in step.nodes)
        rows.append(LatencyRow(**step.row().model_dump(exclude_unset=True), value=float(count)))
    for candidate in candidates.found:
        for choice in candidate.choices:
            if not is_no_change(candidate, choice):
                value = gain * len(candidate.convs)
                row = choice_row(candidate, choice).model_dump(exclude_unset=True)
                rows.append(LatencyRow(**row, value=value))
    return LatencyTable(header=LatencyHeader(created_by="test"), rest=1.0, rows=tuple(rows))


def test_the_steps_are_disjoint_and_every_candidate_has_a_place():
    candidates = find_candidates(Graph(load(network())))
    cuts = cut_layout(candidates)
    nodes = [node for step in cuts.steps for node in step.nodes]
    assert len(nodes) == len(set(nodes))
    convs = [node for node in nodes if node.op_type == "Conv"]
    assert len(convs) == len(candidates.sites.convs)
    for each in candidates.found:
        assert isinstance(cuts.layout.span(each.input.name or "", each.output.name or ""), tuple)


def test_two_parts_side_by_side_have_their_own_chains():
    build = ModelBuilder([1, 3, 8, 8])
    x = build.op("Relu", build.conv("x", 4, 1, out="shared"), out="read")
    heads = [build.conv(build.op("Relu", build.conv(x, 4, 3, pad=1)), 2, 1) for _ in range(2)]
    model = build.model(*heads)
    cuts = cut_layout(find_candidates(Graph(load(model))))
    assert sum("Conv" in {node.op_type for node in step.nodes} for step in cuts.steps) >= 4


def test_a_model_without_convolutions_has_nothing_to_plan():
    build = ModelBuilder([1, 3, 8, 8])
    model = build.model(build.op("Relu", "x", out="y"))
    with pytest.raises(UsageError, match="no convolutions"):
        cut_layout(find_candidates(Graph(load(model))))


@pytest.mark.parametrize("kind", ["uniform", "macs", "l1"])
def test_importances_without_data_are_damages(kind: Any):
    table = importance_without_data(find_candidates(Graph(load(network()))), kind)
    values = [row.value for row in table.rows]
    assert table.no_change == 0.0
    assert max(values) < 0.0
    assert min(values) >= -1.1


def test_the_frontier_starts_at_the_model_as_it_is():
    model = network()
    planning = prepare(load(model), latencies(model), "uniform")
    points = planning.points()
    slowest = max(points, key=lambda point: point.latency)
    assert slowest.latency == planning.original == 7.0
    assert slowest.speedup == 1.0
    assert slowest.segments == 0
    ordered = sorted(points, key=lambda point: point.latency)
    assert all(a.importance < b.importance for a, b in pairwise(ordered))


def test_a_plan_keeps_its_budget_and_folds():
    model = network()
    found = graphfold.make_plan(model, latency=latencies(model), importance="uniform", speedup=1.3)
    assert found.plan is not None
    assert found.point is not None
    assert found.point.latency <= found.planning.original / 1.3 * (1 + 1e-9)
    result = graphfold.optimize(model, found.plan.model_dump(exclude_none=True))
    assert result.report.verification is not None
    assert result.report.verification.passed
    convs = [node.op_type for node in result.model.graph.node].count("Conv")
    assert convs < 6


def test_what_no_plan_reaches_is_told_with_what_one_does():
    model = network()
    with pytest.raises(BudgetError, match="the fastest plan takes"):
        graphfold.make_plan(model, latency=latencies(model), importance="macs", speedup=50.0)


class Device:
    """Stands for measuring: a folded network is as fast as the tables say, times a factor."""

    def __init__(self, factor: float, *spreads: float) -> None:
        self.factor = factor
        self.spreads = list(spreads)
        self.measured: list[float] = []

    def __call__(self, models: Any, **options: Any) -> Any:
        del options
        before, after = (
            sum(node.op_type == "Conv" for node in model.ir.graph) + 1.0 for model in models
        )
        self.measured.append(before / after * self.factor)
        spread = self.spreads.pop(0) if self.spreads else 0.0
        found = SimpleNamespace(speedup=self.measured[-1], speedup_spread=spread)
        return SimpleNamespace(models=[None, found])


def test_a_plan_that_is_slower_than_predicted_is_chosen_again(monkeypatch: pytest.MonkeyPatch):
    model = network()
    device = Device(0.85)
    monkeypatch.setattr(planning_module, "compare", device)
    found = graphfold.make_plan(
        model, latency=latencies(model, gain=0.4), importance="uniform", speedup=1.2, confirm=True
    )
    assert found.measured is not None
    assert found.measured >= 1.2
    assert found.measured in device.measured


def test_unsteady_measurements_are_repeated_and_told(monkeypatch: pytest.MonkeyPatch):
    model = network()
    options = {"latency": latencies(model), "importance": "uniform", "speedup": 1.2}
    device = Device(1.0, 0.3, 0.05)
    monkeypatch.setattr(planning_module, "compare", device)
    found = graphfold.make_plan(model, confirm=True, **options)
    assert len(device.measured) >= 2
    assert not any("quieter" in text for text in found.warnings)
    monkeypatch.setattr(planning_module, "compare", Device(1.0, *[0.3] * 99))
    found = graphfold.make_plan(model, confirm=True, **options)
    assert sum("quieter" in text for text in found.warnings) == 1


def test_where_nothing_measured_is_fast_enough_there_is_no_plan(monkeypatch: pytest.MonkeyPatch):
    model = network()
    monkeypatch.setattr(planning_module, "compare", Device(0.2))
    with pytest.raises(BudgetError, match="folded and measured"):
        graphfold.make_plan(
            model, latency=latencies(model), importance="uniform", speedup=1.3, confirm=True
        )


def test_of_plans_that_are_fast_enough_the_finest_is_looked_for(monkeypatch: pytest.MonkeyPatch):
    model = network()
    device = Device(1.5)
    monkeypatch.setattr(planning_module, "compare", device)
    found = graphfold.make_plan(
        model, latency=latencies(model, gain=0.4), importance="uniform", speedup=1.51, confirm=True
    )
    assert found.measured == min(each for each in device.measured if each >= 1.51)
    assert found.measured > 1.51 * planning_module.LARGEST_EXCESS
    assert any("no finer plan" in text for text in found.warnings)


def test_where_no_replacement_pays_nothing_can_be_gained():
    model = network()
    with pytest.raises(BudgetError, match=r"none of the .* is faster than what it replaces"):
        graphfold.make_plan(
            model, latency=latencies(model, gain=2.0), importance="macs", speedup=1.3
        )


def test_where_every_convolution_stands_alone_the_reason_is_told():
    build = ModelBuilder([1, 3, 16, 16])
    y = build.op("MaxPool", build.conv("x", 8, 3), kernel_shape=[2, 2], out="pooled", channels=8)
    model = build.model(build.conv(y, 4, 3, out="y"))
    with pytest.raises(BudgetError, match="segments end where MaxPool is not linear"):
        graphfold.make_plan(model, latency=latencies(model), importance="macs", speedup=1.3)


def test_the_sizes_that_latencies_were_measured_at_hold_for_the_plan():
    build = ModelBuilder(["n", 3, "h", "w"])
    y = build.op("Relu", build.conv("x", 8, 3, pad=1))
    model = build.model(build.conv(y, 8, 3, pad=1, out="y"))
    table = latencies(model)
    with pytest.raises(UsageError, match="--input-shape"):
        graphfold.make_plan(model, latency=table, importance="macs", speedup=1.1)
    header = table.header.model_copy(update={"inputs": {"x": (1, 3, 32, 32)}})
    measured = table.model_copy(update={"header": header})
    assert graphfold.make_plan(model, latency=measured, importance="macs", speedup=1.1).plan


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"speedup": 1.2}, "worth"),
        ({"importance": "macs"}, "how fast"),
        ({"importance": "macs", "speedup": 1.2, "budget": 3.0}, "contradict"),
        ({"importance": "macs", "speedup": 1.2, "method": "best"}, "not known"),
        ({"importance": "macs", "speedup": 1.2, "boundary": "near"}, "not known"),
        ({"importance": "macs", "budget": 0.0}, "more than zero"),
    ],
)
def test_wrong_arguments_are_named(options: dict[str, Any], message: str):
    with pytest.raises(UsageError, match=message):
        graphfold.make_plan(network(), latency=latencies(network()), **options)


def test_the_command_writes_a_plan_a_picture_and_json(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    model = network()
    onnx.save(model, tmp_path / "m.onnx")
    write_table(latencies(model), tmp_path / "t.json")
    arguments = [
        *("plan", str(tmp_path / "m.onnx"), "--latency", str(tmp_path / "t.json")),
        *("--importance", "uniform", "--speedup", "1.2", "-o", str(tmp_path / "p.json")),
        *("--plot", str(tmp_path / "f.svg"), "--json"),
    ]
    assert main(arguments) == 0
    document = json.loads(capfd.readouterr().out)
    assert document["predicted"]["speedup"] >= 1.2
    plan = json.loads((tmp_path / "p.json").read_text())
    assert plan["graphfold_plan"] == 1
    assert plan["objective"]["predicted_ms"] == document["predicted"]["latency"]
    assert (tmp_path / "f.svg").read_text().startswith("<svg")
    optimize = ["optimize", str(tmp_path / "m.onnx"), "--plan", str(tmp_path / "p.json"), "-q"]
    assert main([*optimize, "-o", str(tmp_path / "o.onnx")]) == 0


def test_a_table_of_another_model_is_an_error(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    build = ModelBuilder([1, 3, 8, 8])
    other = build.model(build.conv(build.op("Relu", build.conv("x", 4, 3)), 4, 3, out="z"))
    onnx.save(network(), tmp_path / "m.onnx")
    write_table(latencies(other), tmp_path / "t.json")
    arguments = ["plan", str(tmp_path / "m.onnx"), "--latency", str(tmp_path / "t.json")]
    assert main([*arguments, "--importance", "macs", "--speedup", "1.1"]) == 2
    assert "the model has no tensor" in capfd.readouterr().err


def test_points_are_spread_over_the_speedups():
    planning = prepare(load(network()), latencies(network()), "uniform")
    points = planning.points()
    assert spread_over(points, len(points)) == points
    shown = spread_over(points, 3)
    assert len(shown) <= 3
    assert max(p.speedup for p in shown) == max(p.speedup for p in points)


def test_a_plot_holds_every_point_inside_its_frame():
    rng = np.random.default_rng(0)
    drawn = scatter(
        [Series("a & b", [(x, y) for x, y in rng.uniform(-3, 9, (20, 2))], "line")], "x", "y"
    )
    assert drawn.count("<circle") == 21
    assert "a &amp; b" in drawn
    assert "nan" not in drawn

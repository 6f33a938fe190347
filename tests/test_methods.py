"""The papers' methods on one solver, layouts of branches, plans out of choices."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builders import ModelBuilder, run

import graphfold
from graphfold.assembly import assemble_plan, objective
from graphfold.errors import BudgetError, MeasuresError, UsageError
from graphfold.importance import Change, Lost, Whole, data_free
from graphfold.layout import Chain, Join, Layout
from graphfold.measures import (
    Candidate,
    ImportanceHeader,
    ImportanceTable,
    LatencyHeader,
    LatencyTable,
    Row,
)
from graphfold.methods import Method, solve
from graphfold.plan import ModelReference
from graphfold.solver import Floor, Frontier

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import solver as benchmark


def unchanged(source: str, target: str, latency: float, importance: float = 0.0) -> Candidate:
    return Candidate(Row(input=source, output=target, unchanged=True), latency, importance)


def change(source: str, target: str, latency: float, importance: float, **row: Any) -> Candidate:
    return Candidate(Row(input=source, output=target, **row), latency, importance)


def chosen(found: Frontier[tuple[Row, ...]], budget: float) -> list[tuple[str, str]]:
    pieces = itertools.chain.from_iterable(found.within(budget).choices)
    return [(row.input, row.output) for row in pieces]


METHODS: tuple[Method, ...] = ("layermerge", "depth", "layer-only")
LINE = Layout(Chain(("a", "b", "c", "d", "e")))
KEPT = [unchanged(s, t, 2.0) for s, t in itertools.pairwise("abcde")]


def test_layer_merge_may_choose_everything() -> None:
    candidates = [
        *KEPT,
        change("a", "c", 1.5, -0.3, family="dense", removed_convs=()),
        change("a", "c", 0.5, -0.7, family="pointwise", removed_convs=("c2",)),
        change("b", "d", 0.9, -0.1, removed_convs=()),
    ]
    found = solve(candidates, LINE)
    figures = [(s.latency, s.importance) for s in found]
    np.testing.assert_allclose(figures, [(4.5, -0.7), (4.9, -0.1), (8.0, 0.0)], atol=1e-12)
    assert chosen(found, 5.0) == [("a", "b"), ("b", "d"), ("d", "e")]


def test_layer_only_is_a_knapsack() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        latency, worth = rng.uniform(0.5, 2.0, 4), rng.uniform(0.1, 1.0, 4)
        steps = list(itertools.pairwise("abcde"))
        candidates = [unchanged(s, t, latency[i], worth[i]) for i, (s, t) in enumerate(steps)]
        # The second layer must stay; the merge is another method's.
        candidates += [
            change(s, t, 0.0, 0.0, family="identity", removed_convs=(t,))
            for s, t in steps
            if s != "b"
        ]
        candidates.append(change("a", "e", 0.0, 99.0))
        found = solve(candidates, LINE, "layer-only")
        budget = float(rng.uniform(latency[1], latency.sum()))
        best = max(
            worth[list(kept)].sum()
            for size in range(1, 5)
            for kept in itertools.combinations(range(4), size)
            if 1 in kept and latency[list(kept)].sum() <= budget
        )
        assert found.within(budget).importance == pytest.approx(best)


def test_depth_shrinker_takes_whole_blocks() -> None:
    candidates = [
        *KEPT,
        change("a", "c", 1.0, -0.2, removed_convs=()),
        change("a", "c", 0.1, -0.1, removed_convs=("c2",)),
        change("b", "d", 0.1, 0.0, removed_convs=()),
        change("c", "e", 1.0, -0.3, removed_convs=()),
    ]
    found = solve(candidates, LINE, "depthshrinker", blocks=[("a", "c"), ("c", "e")])
    figures = [(s.latency, s.importance) for s in found]
    np.testing.assert_allclose(figures, [(2.0, -0.5), (5.0, -0.2), (8.0, 0.0)], atol=1e-12)
    with pytest.raises(UsageError, match="there are none"):
        solve(candidates, LINE, "depthshrinker")


def states(source: str, target: str, latency: float, **worth: float) -> list[Candidate]:
    """Candidates by their states: `on_off=-1.0` is active at its start, not at its end."""
    return [
        change(
            source, target, latency, value,
            unchanged=ord(target) == ord(source) + 1,
            start_active=name.startswith("on"), end_active=name.endswith("on"),
        )
        for name, value in worth.items()
    ]  # fmt: skip


DEPTH = [
    *states("a", "b", 1.0, on_on=0.0, on_off=-0.1),
    *states("b", "c", 1.0, on_on=0.0, off_on=-0.1),
    *states("c", "d", 1.0, on_on=0.0),
    *states("d", "e", 1.0, on_on=0.0),
    *states("a", "c", 9.0, on_on=-5.0),
    *states("c", "e", 0.5, on_on=-1.0),
]


def test_depth_removes_an_activation_and_merges_apart() -> None:
    worth = {("b", "c"): 3.0}
    candidates = [
        Candidate(c.row, c.latency, worth.get((c.row.input, c.row.output), c.importance))
        if c.row.start_active is False
        else c
        for c in DEPTH
    ]
    best = solve(candidates, LINE, "depth").best
    first = best.choices[0]
    assert [(row.input, row.output, row.end_active) for row in first] == [
        ("a", "b", False),
        ("b", "c", True),
    ]
    assert best.importance == pytest.approx(2.9)


def test_states_must_agree_in_every_method() -> None:
    torn = [*states("a", "b", 1.0, on_off=0.0), *states("b", "c", 1.0, on_on=0.0)]
    layout = Layout(Chain(("a", "b", "c")))
    for method in METHODS:
        with pytest.raises(UsageError, match="leads on from 'b'"):
            solve(torn, layout, method)


def test_depth_wants_one_latency_per_segment() -> None:
    twice = [*KEPT, change("a", "c", 1.0, -1.0), change("a", "c", 2.0, -2.0, kernel=(3, 3))]
    with pytest.raises(MeasuresError, match="has several latencies"):
        solve(twice, LINE, "depth")


def test_sequential_drops_layers_of_what_depth_left() -> None:
    drops = [
        change("c", "e", 0.0, -1.2, family="identity"),
        change("a", "b", 0.0, -0.4, family="identity", removed_convs=("b",)),
        change("d", "e", 0.0, 0.0, family="identity"),  # depth did not leave this one
    ]
    found = solve([*DEPTH, *drops], LINE, "sequential", first_budget=2.6)
    points = [(s.latency, s.importance) for s in found]
    np.testing.assert_allclose(
        points, [(1.0, -1.6), (1.5, -1.4), (2.0, -1.2), (2.5, -1.0)], atol=1e-12
    )
    with pytest.raises(BudgetError):
        solve(DEPTH, LINE, "sequential", first_budget=1.0)


def test_sequential_without_a_first_budget_is_the_best_of_all() -> None:
    rng = np.random.default_rng(0)
    tensors = "abcdefg"
    steps = list(itertools.pairwise(tensors))
    for _ in range(5):
        candidates = [unchanged(s, t, rng.uniform(1, 2)) for s, t in steps]
        candidates += [
            change(s, t, 0.0, -rng.uniform(0.2, 1.0), family="identity") for s, t in steps
        ]
        for start, end in itertools.combinations(range(len(tensors)), 2):
            if end > start + 1:
                ends = tensors[start], tensors[end]
                damage = (end - start - 1) * rng.uniform(0.05, 0.4)
                candidates.append(change(*ends, rng.uniform(0.5, 1.5), -damage))
                candidates.append(change(*ends, 0.0, -damage - 1.0, family="identity"))
        layout = Layout(Chain(tuple(tensors)))
        depth = solve(candidates, layout, "depth")
        every = [
            solve(candidates, layout, "sequential", first_budget=first.latency) for first in depth
        ]
        best = solve(candidates, layout, "sequential")
        for budget in np.linspace(0.0, depth.best.latency, 9):
            parts = [each.within(budget).importance for each in every if each.latency[0] <= budget]
            assert best.within(budget).importance == pytest.approx(max(parts))


def test_a_run_that_changes_nothing_leaves_its_steps_to_be_dropped() -> None:
    # No merge: a to c in one run of two convolutions is as fast and as good as step by step.
    candidates = [
        *states("a", "b", 1.0, on_on=0.0, on_off=0.0),
        *states("b", "c", 1.0, on_on=0.0, off_on=0.0),
        *states("c", "d", 1.0, on_on=0.0),
        *states("d", "e", 1.0, on_on=0.0),
        *states("a", "c", 9.0, on_on=-5.0),
        change("b", "c", 0.0, -0.1, family="identity"),
    ]
    assert [len(pieces) for pieces in solve(candidates, LINE, "depth").best.choices] == [2, 1, 1]
    found = solve(candidates, LINE, "sequential")
    assert [(s.latency, s.importance) for s in found] == [(3.0, -0.1), (4.0, 0.0)]


def test_the_state_behind_a_join_is_one_for_a_branch_and_what_follows() -> None:
    # The branch's last segment may have an activation behind the join, and q to y must know.
    chain = Chain(("x", "q", "y"), {0: (Chain(("x", "a1", "a2")),)})
    layout = Layout(chain, {"a1": "r1"}, places={"a2": "q"})
    assert (layout.place("a2"), layout.place("a1")) == ("q", "a1")
    candidates = [
        change("x", "a1", 1.0, 0.0, start_active=True, end_active=True, unchanged=True),
        change("a1", "a2", 1.0, 5.0, start_active=True, end_active=True, unchanged=True),
        change("a1", "a2", 1.0, 0.0, start_active=True, end_active=False, unchanged=True),
        change("q", "y", 1.0, 0.0, start_active=True, unchanged=True),
        change("q", "y", 1.0, 7.0, start_active=False, unchanged=True),
    ]
    for method in METHODS:
        assert solve(candidates, layout, method).best.importance == 7.0
    costs = solve(candidates, layout, "depth", additions={"q": 0.5})
    assert costs.best.latency == 3.0
    added = solve(candidates[:2] + candidates[3:4], layout, "depth", additions={"q": 0.5}).best
    assert added.latency == 3.5
    plan = assemble_plan(added, layout, activation="Relu")
    assert [(item.tensor, item.activation) for item in plan.add_activations] == [("q", "Relu")]


def test_the_published_discretisation_reaches_every_method() -> None:
    # Two layers of 0.19 ms are three steps of 0.1 ms within 0.3 ms... as published: 0.38 > 0.3.
    candidates = [unchanged("a", "b", 0.19), unchanged("b", "c", 0.19)]
    layout = Layout(Chain(("a", "b", "c")))
    assert solve(candidates, layout, compat=Floor(10)).within(0.3).latency > 0.3
    with pytest.raises(BudgetError):
        solve(candidates, layout).within(0.3)


# --- branches ---------------------------------------------------------------------------------


def residual() -> Chain:
    main = Chain(("p", "a1", "a2"))
    projection = Chain(("p", "b1"))
    return Chain(("x", "p", "q", "y"), {1: (main, projection)})


def test_branches_are_laid_out_one_behind_the_other() -> None:
    layout = Layout(residual())
    assert layout.positions == 7
    spans = [layout.span(*ends) for ends in (("x", "p"), ("p", "a1"), ("a1", "a2"), ("p", "b1"))]
    assert spans == [(0, 1), (1, 2), (2, 3), (3, 4)]
    assert layout.joins == [Join(4, 5, "q")]
    assert layout.span("p", "q") == (1, 5)
    assert layout.span("x", "y") == (0, 6)
    assert [layout.name_at(position) for position in (0, 2, 5)] == ["x", "a1", "q"]


def test_segments_do_not_leave_their_branch() -> None:
    layout = Layout(residual())
    candidates = [change("a1", "q", 1.0, 0.0), change("b1", "a2", 1.0, 0.0),
                  change("q", "p", 1.0, 0.0), change("p", "a22", 1.0, 0.0)]  # fmt: skip
    with pytest.raises(MeasuresError) as caught:
        solve(candidates, layout)
    assert [str(problem) for problem in caught.value.problems] == [
        "a1: no chain of segments holds both 'a1' and 'q'",
        "b1: no chain of segments holds both 'b1' and 'a2'",
        "q: 'q' does not come before 'p'",
        "a22: 'a22' is no tensor at which segments end (did you mean 'a2'?)",
    ]


def test_a_block_is_replaced_whole_or_inside_its_branches() -> None:
    layout = Layout(residual())
    (join,) = layout.joins
    candidates = [
        unchanged("x", "p", 1.0), unchanged("p", "a1", 1.0), unchanged("a1", "a2", 1.0),
        unchanged("p", "b1", 1.0), unchanged("q", "y", 1.0),
        change("p", "a2", 0.5, -0.2), change("p", "q", 0.9, -1.0),
    ]  # fmt: skip
    assert solve(candidates, layout).best.latency == 5.0  # a join without a price is free
    add = Candidate(Row(input="b1", output="q", unchanged=True), 0.25, 0.0)
    assert layout.span("b1", "q") == (join.start, join.end)
    found = solve([*candidates, add], layout)
    figures = [(s.latency, s.importance) for s in found]
    np.testing.assert_allclose(figures, [(2.9, -1.0), (3.75, -0.2), (5.25, 0.0)], atol=1e-12)


def test_the_state_at_a_split_is_one_for_all_branches() -> None:
    layout = Layout(Chain(("x", "p", "q"), {1: (Chain(("p", "a")), Chain(("p", "b")))}))
    candidates = [
        *states("x", "p", 1.0, on_on=0.0, on_off=0.0),
        change("p", "a", 1.0, -1.0, start_active=True),
        change("p", "a", 1.0, -0.1, start_active=False),
        change("p", "b", 1.0, -1.0, start_active=True),
        change("p", "b", 1.0, -3.0, start_active=False),
    ]
    for method in METHODS:
        assert solve(candidates, layout, method).best.importance == -2.0


@pytest.mark.parametrize(
    ("tensors", "branches"),
    [(("a",), {}), (("a", "a"), {}), (("a", "b"), {1: (Chain(("b", "c")),)})],
)  # fmt: skip
def test_chains_that_are_none(tensors: tuple[str, ...], branches: Any) -> None:
    with pytest.raises(ValueError, match=r"chain|no tensors"):
        Chain(tensors, branches)


# --- plans ------------------------------------------------------------------------------------


def plain_network() -> tuple[Any, Layout]:
    """Four convolutions with a Relu between the first three, none after them."""
    b = ModelBuilder((1, 4, 9, 9))
    cuts = ["x"]
    activations = {}
    tensor = "x"
    for number in range(4):
        tensor = b.conv(tensor, 4, 3 if number < 2 else 1, pads=int(number < 2))
        cuts.append(tensor)
        if number < 2:
            activations[tensor] = tensor = b.op("Relu", tensor)
    return b.model(tensor), Layout(Chain(tuple(cuts)), activations)


def solved(layout: Layout, rows: list[Row]) -> Any:
    candidates = [Candidate(row, 1.0, 0.0) for row in rows]
    return solve(candidates, layout).best


def test_a_choice_becomes_a_plan_that_applies() -> None:
    model, layout = plain_network()
    x, c1, c2, c3, c4 = (layout.name_at(position) for position in range(5))
    relu1, relu2 = layout.activations.values()
    rows = [
        Row(input=x, output=c2, kernel=(5, 5), family="dense"),
        Row(input=c2, output=c3, unchanged=True),
        # Named behind the activation or before it, a cut is the same.
        Row(input=c3, output=c4, family="identity", removed_convs=(c4,)),
    ]
    plan = assemble_plan(solved(layout, rows), layout, boundary="hoist")
    assert plan.model_dump(exclude_unset=True) == {
        "graphfold_plan": 1,
        "segments": [
            {"input": x, "output": c2, "boundary": "hoist", "family": "dense", "kernel": [5, 5]},
            {"input": c3, "output": c4, "family": "identity"},
        ],
    }
    folded = graphfold.optimize(model, plan).model
    assert [node.op_type for node in folded.graph.node] == ["Conv", "Relu", "Conv"]
    again = [Row(input=relu1, output=relu2, unchanged=True)]
    assert layout.span(again[0].input, again[0].output) == layout.span(c1, c2)


def test_activations_at_ends_go_and_come() -> None:
    model, layout = plain_network()
    x, c1, c2, c3, c4 = (layout.name_at(position) for position in range(5))
    _relu1, relu2 = layout.activations.values()
    rows = [
        Row(input=x, output=c1, unchanged=True, end_active=True),
        Row(input=c1, output=c2, unchanged=True, start_active=True, end_active=False),
        Row(input=c2, output=c3, unchanged=True, start_active=False, end_active=True),
        Row(input=c3, output=c4, unchanged=True, start_active=True),
    ]
    plan = assemble_plan(solved(layout, rows), layout, activation="Relu6")
    assert plan.model_dump(exclude_unset=True) == {
        "graphfold_plan": 1,
        "remove_activations": [relu2],
        "add_activations": [{"tensor": c3, "activation": "Relu6"}],
    }
    graphfold.optimize(model, plan)
    with pytest.raises(UsageError, match="say which one to add"):
        assemble_plan(solved(layout, rows), layout)


def test_merging_apart_keeps_two_segments() -> None:
    model, layout = plain_network()
    x, _, c2, _c3, c4 = (layout.name_at(position) for position in range(5))
    _, relu2 = layout.activations.values()
    rows = [
        Row(input=x, output=c2, kernel=(5, 5), end_active=False),
        Row(input=c2, output=c4, kernel=(1, 1), start_active=False, end_active=True),
    ]
    plan = assemble_plan(solved(layout, rows), layout, boundary="hoist", activation="Relu")
    assert plan.model_dump(exclude_unset=True) == {
        "graphfold_plan": 1,
        "segments": [
            {"input": x, "output": c2, "boundary": "hoist", "kernel": [5, 5]},
            {"input": relu2, "output": c4, "boundary": "hoist", "kernel": [1, 1],
             "activation": "Relu"},
        ],
        "remove_activations": [relu2],
    }  # fmt: skip
    folded = graphfold.optimize(model, plan).model
    assert [node.op_type for node in folded.graph.node] == ["Conv", "Conv", "Relu"]
    feeds = {"x": np.random.default_rng(0).normal(size=(1, 4, 9, 9)).astype(np.float32)}
    assert run(folded, feeds)[0].min() == 0


def test_the_objective_tells_what_a_plan_was_made_for() -> None:
    times = LatencyTable(header=LatencyHeader(created_by="t", threads=1), rest=0.5, rows=())
    worths = ImportanceTable(header=ImportanceHeader(created_by="t"), rows=())
    layout = Layout(Chain(("a", "b")))
    solution = solved(layout, [Row(input="a", output="b", unchanged=True)])
    stated = objective(solution, times, worths, budget=2.0)
    assert stated == {
        "budget_ms": 2.0, "predicted_ms": 1.5, "predicted_importance": 0.0,
        "latency_table": times.digest, "importance_table": worths.digest,
        "device": {"created_by": "t", "threads": 1},
    }  # fmt: skip
    reference = ModelReference(name="m.onnx", sha256="ab")
    plan = assemble_plan(solution, layout, model=reference, objective=stated)
    assert plan.objective == stated
    assert plan.model == reference


# --- importances without data -----------------------------------------------------------------

WHOLE = Whole(activations=6, convs=4, macs=1000, l1=50.0)


def test_importances_without_data_are_shares_of_what_is_lost() -> None:
    changes = [
        Change(),
        Change(activations=2, macs=Lost(linear=300)),
        Change(activations=1, macs=Lost(linear=100, moved=40)),
        Change(convs=1, activations=1, macs=Lost(removed=100, linear=100), l1=Lost(removed=5.0)),
    ]
    assert data_free("uniform", changes, WHOLE) == [0.0, -0.2, -0.1, -0.2]
    assert data_free("macs", changes, WHOLE) == pytest.approx([0, -0.15, -0.07, -0.1], abs=1e-6)
    assert data_free("l1", changes, WHOLE) == pytest.approx([0.0, 0.0, 0.0, -0.05], abs=1e-6)
    for model in ("macs", "l1"):
        no_change, *others = data_free(model, changes, WHOLE)  # type: ignore[arg-type]
        assert no_change == 0
        assert all(value < 0 for value in others)


def test_a_network_without_weights_has_no_l1() -> None:
    with pytest.raises(UsageError, match="nothing to count for the importance 'l1'"):
        data_free("l1", [], Whole(activations=1, convs=0, macs=0, l1=0.0))


# --- speed ------------------------------------------------------------------------------------


def test_the_frontier_is_fast_enough_to_ask_again() -> None:
    entries = benchmark.mobilenet()
    assert len(entries) == 391
    assert benchmark.milliseconds(entries, 51)[0] < 100


@pytest.mark.slow
def test_large_tables_take_seconds() -> None:
    milliseconds, points = benchmark.milliseconds(benchmark.synthetic(200, 20_000), 201, rounds=1)
    assert milliseconds < 5000
    assert points > 1000

"""The exact solver against brute force, scipy's MILP and its own promises."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from scipy import optimize, sparse

from graphfold.errors import BudgetError, MeasuresError, UsageError
from graphfold.solver import Entry, Floor, GapError, frontier

Path = tuple[Entry[int], ...]


def all_paths(entries: Sequence[Entry[int]], positions: int) -> Iterator[Path]:
    """Every path whose entries agree, by plain recursion."""

    def extend(position: int, path: Path, options: dict[Any, Any]) -> Iterator[Path]:
        if position == positions - 1:
            yield path
        for entry in entries:
            if entry.start == position and all(
                options.get(group, option) == option for group, option in entry.agree
            ):
                yield from extend(entry.end, (*path, entry), options | dict(entry.agree))

    return extend(0, (), {})


def figures(path: Path) -> tuple[float, float]:
    return math.fsum(e.latency for e in path), math.fsum(e.importance for e in path)


def pareto(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    best: list[tuple[float, float]] = []
    for latency, importance in sorted(points, key=lambda point: (point[0], -point[1])):
        if not best or importance > best[-1][1]:
            best.append((latency, importance))
    return best


def instance(seed: int) -> tuple[list[Entry[int]], int]:
    """A small network: real or whole numbers (so that sums tie), with or without groups."""
    rng = np.random.default_rng(seed)
    positions = int(rng.integers(2, 7))
    whole, grouped = rng.random(2) < 0.5
    entries = []
    for number in range(int(rng.integers(positions - 1, 15))):
        # The first ones make a chain, so that most instances have solutions.
        start = number if number < positions - 1 else int(rng.integers(0, positions - 1))
        end = start + 1 if number < positions - 1 else int(rng.integers(start + 1, positions))
        latency, importance = rng.integers(0, 6, 2) if whole else rng.exponential(1.0, 2)
        agree = tuple(
            (f"g{group}", int(rng.integers(0, 2)))
            for group in range(3)
            if grouped and rng.random() < 0.4
        )
        sign = rng.choice([-1, 1])
        entry = Entry(start, end, float(latency), float(sign * importance), number, agree)
        entries.append(entry)
    order = rng.permutation(len(entries))
    return [entries[index] for index in order], positions


def test_brute_force_on_five_thousand_instances() -> None:
    rng = np.random.default_rng(0)
    solvable = grouped = 0
    for seed in range(5000):
        entries, positions = instance(seed)
        points = [figures(path) for path in all_paths(entries, positions)]
        if not points:
            with pytest.raises(GapError):
                frontier(entries, positions)
            continue
        solvable += 1
        grouped += any(entry.agree for entry in entries)
        expected = pareto(points)
        found = frontier(entries, positions)
        assert len(found) == len(expected)
        reached = [(solution.latency, solution.importance) for solution in found]
        np.testing.assert_allclose(reached, expected, rtol=1e-12, atol=1e-12)
        budget = float(rng.uniform(0, 1.2) * max(point[0] for point in points) + 1e-9)
        affordable = [point[1] for point in points if point[0] <= budget]
        if not affordable:
            with pytest.raises(BudgetError):
                found.within(budget)
            continue
        chosen = found.within(budget)
        assert math.isclose(chosen.importance, max(affordable), rel_tol=1e-12, abs_tol=1e-12)
        assert chosen.latency <= budget
    assert solvable > 4000
    assert grouped > 1500


def test_a_solution_is_a_path_that_agrees() -> None:
    for seed in range(300):
        entries, positions = instance(seed)
        legal = set(all_paths(entries, positions))
        if legal:
            assert all(solution.entries in legal for solution in frontier(entries, positions))


def test_floor_mode_is_the_discretised_optimum() -> None:
    over = 0
    for seed in range(500):
        entries, positions = instance(seed)
        grid = 3.0
        paths = list(all_paths(entries, positions))
        if not paths:
            continue
        found = frontier(entries, positions, compat=Floor(grid))
        steps = [sum(math.floor(entry.latency * grid) for entry in path) for path in paths]
        budget = float(np.median([figures(path)[0] for path in paths]))
        allowed = [i for i, step in enumerate(steps) if step <= math.floor(budget * grid)]
        # Whatever is within the real budget is within the floored one.
        best = max(round(figures(paths[i])[1], 7) for i in allowed)
        fewest = min(steps[i] for i in allowed if round(figures(paths[i])[1], 7) == best)
        chosen = found.within(budget)
        assert (round(chosen.importance, 7), chosen.steps) == (best, fewest)
        over += chosen.latency > budget
    assert over > 0  # as published: the floored sum fits, the real one need not


def large_instance(seed: int, positions: int, count: int, groups: int) -> list[Entry[int]]:
    rng = np.random.default_rng(seed)
    chain = [(i, i + 1) for i in range(positions - 1)] * 2
    starts = rng.integers(0, positions - 1, count - len(chain))
    spans = chain + [(int(i), int(min(positions - 1, i + rng.integers(1, 9)))) for i in starts]
    entries = []
    for number, (start, end) in enumerate(spans):
        length = end - start
        # A group's entries lie near each other, as the parts of a block do.
        group = start // 4
        agree = ((group, int(rng.integers(0, 2))),) if group < groups and number % 3 else ()
        latency = float(rng.uniform(0.3, 1.5) * length**0.7)
        importance = float(-rng.exponential(0.1) * length)
        entries.append(Entry(start, end, latency, importance, number, agree))
    return entries


def solve_as_milp(entries: Sequence[Entry[int]], positions: int, budget: float) -> float:
    """Best importance within the budget: a flow of one unit, and one option per group."""
    count = len(entries)
    options = sorted({item for entry in entries for item in entry.agree})
    flow = sparse.lil_array((positions, count + len(options)))
    for column, entry in enumerate(entries):
        flow[entry.start, column] -= 1
        flow[entry.end, column] += 1
    ends = np.zeros(positions)
    ends[0], ends[-1] = -1, 1
    latency = np.array([[entry.latency for entry in entries] + [0.0] * len(options)])
    constraints = [
        optimize.LinearConstraint(flow.tocsc(), ends, ends),
        optimize.LinearConstraint(latency, -np.inf, budget),
    ]
    for group in sorted({group for group, _ in options}):
        one = [[0.0] * count + [float(item[0] == group) for item in options]]
        constraints.append(optimize.LinearConstraint(np.array(one), 1, 1))
    linked = [(column, item) for column, entry in enumerate(entries) for item in entry.agree]
    if linked:
        link = sparse.lil_array((len(linked), count + len(options)))
        for row, (column, item) in enumerate(linked):
            link[row, column] = 1
            link[row, count + options.index(item)] = -1
        constraints.append(optimize.LinearConstraint(link.tocsc(), -np.inf, 0))
    cost = np.array([-entry.importance for entry in entries] + [0.0] * len(options))
    result = optimize.milp(
        cost,
        constraints=constraints,
        bounds=optimize.Bounds(0, 1),
        integrality=np.ones(len(cost)),
        options={"mip_rel_gap": 0},
    )
    assert result.success, result.message
    return float(-result.fun)


@pytest.mark.parametrize(
    ("positions", "count", "groups"), [(30, 200, 0), (30, 200, 7), (60, 600, 0), (60, 500, 15)]
)
def test_larger_instances_equal_a_milp(positions: int, count: int, groups: int) -> None:
    entries = large_instance(positions + groups, positions, count, groups)
    found = frontier(entries, positions)
    fastest, slowest = found.fastest.latency, found.best.latency
    for share in (0.1, 0.4, 0.8):
        budget = fastest + share * (slowest - fastest)
        chosen = found.within(budget)
        assert chosen.latency <= budget
        expected = solve_as_milp(entries, positions, budget)
        assert chosen.importance == pytest.approx(expected, abs=1e-6)


def test_every_point_is_found_at_its_own_latency() -> None:
    found = frontier(large_instance(3, 40, 300, 0), 40)
    assert len(found) > 50
    for solution in found:
        assert found.within(solution.latency) == solution
        below = np.nextafter(solution.latency, 0)
        if solution != found.fastest:
            assert found.within(below).latency <= below


def test_groups_agree_across_the_whole_network_and_are_forgotten_behind_it() -> None:
    # Both halves of a block are fast only if they agree to be; the cheap way out is to mix.
    entries = [
        Entry(0, 1, 1.0, -1.0, "fast", (("block", "merged"),)),
        Entry(0, 1, 5.0, 0.0, "slow", (("block", "kept"),)),
        Entry(1, 2, 1.0, -9.0, "fast", (("block", "merged"),)),
        Entry(1, 2, 5.0, 0.0, "slow", (("block", "kept"),)),
        Entry(2, 3, 1.0, 0.0, "rest"),
    ]
    found = frontier(entries, 4)
    assert [(s.latency, s.choices[:2]) for s in found] == [
        (3.0, ("fast", "fast")),
        (11.0, ("slow", "slow")),
    ]


def test_ties_keep_the_earliest_start_then_the_first_entry() -> None:
    entries = [
        Entry(1, 2, 1.0, 0.0, "second half"),
        Entry(0, 1, 1.0, 0.0, "a"),
        Entry(0, 1, 1.0, 0.0, "b"),
        Entry(0, 2, 2.0, 0.0, "whole"),
    ]
    assert [s.choices for s in frontier(entries, 3)] == [("whole",)]
    assert [s.choices for s in frontier(entries[:3], 3)] == [("a", "second half")]


def test_all_malformed_entries_are_listed() -> None:
    entries = [
        Entry(0, 1, 1.0, 0.0, None),
        Entry(1, 1, 1.0, 0.0, None),
        Entry(0, 3, -1.0, 0.0, None),
        Entry(0, 2, 1.0, math.nan, None),
    ]
    with pytest.raises(MeasuresError) as caught:
        frontier(entries, 3)
    assert [p.path for p in caught.value.problems] == [
        "entries[1]", "entries[2]", "entries[2]", "entries[3]"
    ]  # fmt: skip


def test_a_gap_is_named() -> None:
    with pytest.raises(GapError, match="no entry leads on from position 1") as caught:
        frontier([Entry(0, 1, 1.0, 0.0, None), Entry(2, 3, 1.0, 0.0, None)], 4)
    assert caught.value.position == 1
    torn = [Entry(0, 1, 1.0, 0.0, None, (("g", 0),)), Entry(1, 2, 1.0, 0.0, None, (("g", 1),))]
    with pytest.raises(GapError, match="no entries that agree"):
        frontier(torn, 3)


def test_a_budget_below_the_fastest_names_it() -> None:
    found = frontier([Entry(0, 1, 2.5, 0.0, None)], 2)
    with pytest.raises(BudgetError, match=r"the fastest takes 2\.5 ms") as caught:
        found.within(2.0)
    assert caught.value.exit_code == 1
    with pytest.raises(UsageError, match="not nan"):
        found.within(math.nan)


def test_infinite_budgets_and_single_positions() -> None:
    entries = [Entry(0, 1, 2.0, 0.0, "kept"), Entry(0, 1, 1.0, -1.0, "merged")]
    for compat in (None, Floor(10)):
        assert frontier(entries, 2, compat=compat).within(math.inf).choices == ("kept",)
    with pytest.raises(UsageError, match="nothing to choose"):
        frontier([], 1)
    with pytest.raises(UsageError, match="positive number of steps"):
        Floor(0)


def test_groups_do_not_multiply_states_once_they_are_closed() -> None:
    # Forty blocks of two halves that agree: 2^40 assignments if none were forgotten.
    entries = [
        Entry(2 * block + half, 2 * block + half + 1, 1.0 + option, -float(option == 0) * 2**-block,
              (block, option), ((block, option),))
        for block, half, option in itertools.product(range(40), (0, 1), (0, 1))
    ]  # fmt: skip
    found = frontier(entries, 81)
    assert found.fastest.latency == 80
    assert found.best.importance == 0
    # Two halves of the first block cost most, so with room for one block it is the one kept.
    assert found.within(82).choices[0] == (0, 1)

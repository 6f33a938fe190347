"""Two-stage depth compression against the published tables and solutions."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from graphfold.depth import (
    Ends,
    Span,
    depth_frontier,
    extended,
    kept_activations,
    merge_ends,
    normalised,
    optimal_splits,
)
from graphfold.errors import UsageError
from graphfold.measures import LatencyTable
from graphfold.published_tables import read_latency_csv
from graphfold.solver import Floor

TABLES = Path(__file__).parent / "data" / "published_tables"
ROWS = {"mbv2_1.0": 171, "mbv2_1.4": 171, "vgg19_no_trt": 36}
POSITIONS = {"mbv2_1.0": 51, "mbv2_1.4": 51, "vgg19_no_trt": 17}
GRID = {"mbv2_1.0": 20, "mbv2_1.4": 20, "vgg19_no_trt": 10}


@cache
def table(name: str, kind: str = "time") -> LatencyTable:
    return read_latency_csv(TABLES / f"{name}_{kind}.csv")


def times(name: str) -> dict[Span, float]:
    return {(int(row.input), int(row.output)): row.value for row in table(name).rows}


def depths(name: str) -> dict[Ends, float]:
    """Every removed activation counts the same, and activations at segment ends stay."""
    return {(start, end, True, True): -float(end - start - 1) for start, end in times(name)}


def test_the_published_optimal_times_are_reproduced() -> None:
    compared = 0
    for name, count in ROWS.items():
        splits = optimal_splits(times(name))
        published = table(name, "opt_time").rows
        assert len(published) == len(splits) == count
        for row in published:
            split = splits[int(row.input), int(row.output)]
            assert split.latency == pytest.approx(row.value, rel=1e-12)
            assert tuple(map(str, split.breaks)) == row.splits
            compared += 1
    assert compared == 378


@pytest.mark.parametrize(
    ("name", "latency", "breaks"),
    [
        ("mbv2_1.0", 6.4666, (0, 1, 5, 11, 20, 41, 50)),
        ("mbv2_1.4", 10.2784, (0, 1, 5, 11, 17, 20, 41, 50)),
        ("vgg19_no_trt", 155.9905, (0, 2, 3, 4, 6, 8, 10, 12, 13, 15, 16)),
    ],
)
def test_the_published_fastest_networks(name: str, latency: float, breaks: tuple[int, ...]) -> None:
    fastest = depth_frontier(times(name), depths(name), POSITIONS[name]).fastest
    assert fastest.latency == pytest.approx(latency, abs=5e-5)
    assert (0, *sorted(merge_ends(fastest))) == breaks


def test_the_sums_of_single_layers() -> None:
    for name, total in (("mbv2_1.0", 33.670), ("mbv2_1.4", 43.201), ("vgg19_no_trt", 193.084)):
        best = depth_frontier(times(name), depths(name), POSITIONS[name]).best
        assert best.importance == 0
        assert best.latency == pytest.approx(total, abs=5e-4)


# Table, budget, activations that go, importance, whole steps, real milliseconds.
GOLDEN = [
    ("vgg19_no_trt", 185, [1], -1, 1726, 173.0239),
    ("vgg19_no_trt", 175, [1], -1, 1726, 173.0239),
    ("vgg19_no_trt", 165, [1, 5, 7], -3, 1616, 161.9698),
    ("vgg19_no_trt", 160, [1, 5, 7, 9], -4, 1593, 159.6940),
    ("mbv2_1.0", 25.0, [3, 4, 6, 7, 9, 10], -6, 491, 25.7123),
    ("mbv2_1.0", 22.1, [3, 4, 6, 7, 9, 10, 33, 34, 36, 37], -10, 439, 23.0351),
    (
        "mbv2_1.0", 20.0,
        [3, 4, 6, 7, 9, 10, 12, 13, 15, 16, 33, 34, 36, 37], -14, 389, 20.4323,
    ),
    (
        "mbv2_1.0", 18.0,
        [3, 4, 6, 7, 9, 10, 12, 13, 15, 16, 18, 33, 34, 36, 37, 39, 40], -17, 357, 18.7406,
    ),
    ("mbv2_1.4", 27.0, [3, 4, 6, 7, 9, 10, 12, 13, 33, 34, 36, 37], -12, 535, 27.7893),
    ("mbv2_1.4", 26.0, [3, 4, 6, 7, 9, 10, 12, 13, 33, 34, 36, 37, 39, 40], -14, 508, 26.4038),
    (
        "mbv2_1.4", 23.0,
        [3, 4, 6, 7, 9, 10, 12, 13, 15, 16, 18, 19, 33, 34, 36, 37, 39, 40], -18, 457, 23.6327,
    ),
    (
        "mbv2_1.4", 20.0,
        [2, 3, 4, 6, 7, 9, 10, 12, 13, 15, 16, 18, 19, 27, 28, 30, 31, 33, 34, 36, 37, 39, 40],
        -23, 398, 20.5512,
    ),
]  # fmt: skip


@pytest.mark.parametrize(("name", "budget", "gone", "importance", "steps", "latency"), GOLDEN)
def test_the_published_solver_is_reproduced(
    name: str, budget: float, gone: list[int], importance: int, steps: int, latency: float
) -> None:
    count = POSITIONS[name]
    found = depth_frontier(times(name), depths(name), count, compat=Floor(GRID[name]))
    chosen = found.within(budget)
    assert (chosen.importance, chosen.steps) == (importance, steps)
    assert chosen.latency == pytest.approx(latency, abs=5e-5)
    assert kept_activations(chosen) == set(range(1, count)) - set(gone)
    assert merge_ends(chosen) == kept_activations(chosen)


@pytest.mark.parametrize(("name", "budget"), [row[:2] for row in GOLDEN])
def test_exact_mode_stays_within_the_same_budgets(name: str, budget: float) -> None:
    exact = depth_frontier(times(name), depths(name), POSITIONS[name]).within(budget)
    assert exact.latency <= budget
    # Floored sums allow more, never less.
    floored = depth_frontier(times(name), depths(name), POSITIONS[name], compat=Floor(GRID[name]))
    assert exact.importance <= floored.within(budget).importance


# --- against the definitions ------------------------------------------------------------------


def compositions(start: int, end: int) -> Iterator[tuple[int, ...]]:
    """Every increasing row of positions from start to end."""
    yield (start, end)
    for middle in range(start + 1, end):
        for rest in compositions(middle, end):
            yield (start, *rest)


def random_tables(seed: int, positions: int) -> tuple[dict[Span, float], dict[Ends, float]]:
    rng = np.random.default_rng(seed)
    spans = [(i, j) for i in range(positions) for j in range(i + 1, positions)]
    kept = [span for span in spans if span[1] == span[0] + 1 or rng.random() < 0.7]
    latencies = {span: float(rng.uniform(0.2, 2.0)) for span in kept}
    importances = {
        (*span, before, after): float(-rng.exponential(1.0))
        for span in kept
        for before in (False, True)
        for after in (False, True)
        if (before and after and span[1] == span[0] + 1) or rng.random() < 0.6
    }
    return latencies, importances


@pytest.mark.parametrize("seed", range(60))
def test_both_tables_follow_their_definitions(seed: int) -> None:
    latencies, importances = random_tables(seed, 6)
    for (start, end), split in optimal_splits(latencies).items():
        sums = [
            math.fsum(latencies[span] for span in itertools.pairwise(row))
            for row in compositions(start, end)
            # Splits are found one merge at a time from the left, each prefix a span itself.
            if all((start, stop) in latencies for stop in row[1:])
            and all(span in latencies for span in itertools.pairwise(row))
        ]
        assert split.latency == pytest.approx(min(sums))
        assert split.latency == pytest.approx(math.fsum(latencies[span] for span in split.spans))
    found = extended(importances, latencies)
    for (start, end, before, after), value in found.items():
        prefixes = {(i, j) for i, j, *_ in importances} | set(latencies)
        sums = []
        for row in compositions(start, end):
            steps = list(itertools.pairwise(row))
            ends = [
                (i, j, before if i == start else False, after if j == end else False)
                for i, j in steps
            ]
            if all(step in importances for step in ends) and all(
                (start, stop) in prefixes for stop in row[1:]
            ):
                sums.append(math.fsum(importances[step] for step in ends))
        assert value == pytest.approx(max(sums))


@pytest.mark.parametrize("seed", range(60))
def test_the_second_stage_is_the_best_of_all_patterns(seed: int) -> None:
    positions = 6
    latencies, importances = random_tables(seed, positions)
    splits, gains = optimal_splits(latencies), extended(importances, latencies)
    points = []
    for row in compositions(0, positions - 1):
        for pattern in range(2 ** (len(row) - 1)):
            states = [True, *(bool(pattern >> bit & 1) for bit in range(len(row) - 1))]
            runs = list(zip(row, row[1:], states, states[1:], strict=False))
            if all((i, j) in splits and (i, j, a, b) in gains for i, j, a, b in runs):
                latency = math.fsum(splits[i, j].latency for i, j, _, _ in runs)
                points.append((latency, math.fsum(gains[run] for run in runs)))
    found = depth_frontier(latencies, importances, positions)
    for budget in np.linspace(found.fastest.latency, found.best.latency, 7):
        chosen = found.within(float(budget))
        assert chosen.latency <= budget
        assert chosen.importance == pytest.approx(
            max(value for latency, value in points if latency <= budget + 1e-12)
        )


def test_normalising_subtracts_the_mean_of_single_layers() -> None:
    importances = {(0, 1, True, True): -1.0, (1, 2, True, True): -3.0, (0, 2, True, True): -5.0}
    shifted = normalised(importances, 1.5)
    assert shifted == {ends: value + 3.0 for ends, value in importances.items()}
    with pytest.raises(UsageError, match="no single-layer importance"):
        normalised({(0, 2, True, True): -5.0}, 1.0)


def test_a_removed_activation_at_an_end_is_kept_apart_from_merging() -> None:
    # Removing the middle activation is free, but the merge is slow: two convolutions stay.
    latencies = {(0, 1): 1.0, (1, 2): 1.0, (0, 2): 9.0}
    importances = {
        (0, 1, True, True): 0.0, (1, 2, True, True): 0.0,
        (0, 1, True, False): 0.0, (1, 2, False, True): 2.0,
    }  # fmt: skip
    best = depth_frontier(latencies, importances, 3).best
    assert best.importance == 2.0
    assert kept_activations(best) == {2}
    assert merge_ends(best) == {1, 2}


def test_a_run_is_split_only_where_that_is_faster() -> None:
    assert optimal_splits({(0, 1): 1.0, (1, 2): 1.0, (0, 2): 2.0})[0, 2].breaks == (0, 2)

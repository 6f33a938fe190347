"""The exact solver: every budget at once, from one pass over an order of cut tensors.

A network is an order of positions 0..n-1. An entry is one way to realise everything between two
positions, with a latency and an importance; both add up. A solution is a path of entries from
the first position to the last. Best-under-a-budget paths for all budgets are the Pareto set of
(latency, importance) at the last position, and Bellman's principle gives it position by position:
a partial path that another one beats in both can be part of no better whole.

Some choices must agree wherever they are made: whether the activation between two segments stays,
or how all parts of a residual block are realised. An entry states them in `agree`, and the Pareto
sets are kept apart for each assignment of the groups that a later entry still mentions.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from graphfold.errors import BudgetError, MeasuresError, Problem, UsageError

Choice = TypeVar("Choice")
Agreement = tuple[tuple[Hashable, Hashable], ...]
_Floats = NDArray[np.float64]
_Indices = NDArray[np.intp]

# Importances of the published solvers are compared after rounding to this many digits.
_PUBLISHED_DIGITS = 7
# Sums in another order differ by rounding; a budget that equals a sum must still find it.
_ROUNDING = 1e-12


class GapError(UsageError):
    """No path of entries leads from the first position to the last.

    `position` is the furthest one that a path reaches.
    """

    def __init__(self, what: str, position: int) -> None:
        self.position = position
        super().__init__(what)


@dataclass(frozen=True, slots=True)
class Entry(Generic[Choice]):
    """One way to realise everything between two positions.

    Attributes:
        start, end: positions, start < end.
        latency: in milliseconds.
        importance: what the choice is worth; sums are maximised, damages are negative.
        choice: what the caller wants back.
        agree: (group, option) pairs; in one solution a group has one option.
    """

    start: int
    end: int
    latency: float
    importance: float
    choice: Choice
    agree: Agreement = ()


@dataclass(frozen=True)
class Floor:
    """The published discretisation: `grid` steps per millisecond, rounded down.

    Sums of floored latencies stay within the floored budget, so real sums may exceed it.
    """

    grid: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.grid) and self.grid > 0):
            raise UsageError(f"a grid has a positive number of steps per ms, not {self.grid}")

    def steps(self, milliseconds: _Floats) -> _Floats:
        """Whole steps, as floats."""
        return np.floor(milliseconds * self.grid)


@dataclass(frozen=True)
class Solution(Generic[Choice]):
    """A path of entries from the first position to the last.

    Attributes:
        latency: correctly rounded sum of the entries' latencies, in milliseconds.
        importance: correctly rounded sum of their importances.
        entries: in order of position.
        steps: sum of floored latencies in the published discretisation, else None.
    """

    latency: float
    importance: float
    entries: tuple[Entry[Choice], ...]
    steps: int | None = None

    @property
    def choices(self) -> tuple[Choice, ...]:
        """The choices of its entries."""
        return tuple(entry.choice for entry in self.entries)

    @property
    def ends(self) -> tuple[int, ...]:
        """The positions at which its entries end."""
        return tuple(entry.end for entry in self.entries)


@dataclass(frozen=True)
class _Front:
    """A Pareto set at one position, by ascending cost, and how each of its points was reached.

    Attributes:
        cost: what the budget limits: milliseconds, or steps.
        latency: milliseconds.
        importance: strictly ascending.
        entry: index of the last entry; parent, point: the front and its point before that entry.
    """

    cost: _Floats
    latency: _Floats
    importance: _Floats
    entry: _Indices
    parent: _Indices
    point: _Indices


class Frontier(Generic[Choice]):
    """The Pareto set of whole solutions, by ascending latency and importance.

    Attributes:
        latency, importance: one value per point. In the published discretisation latencies are
            the real ones, and points are ordered by steps.
    """

    def __init__(
        self,
        entries: Sequence[Entry[Choice]],
        fronts: Sequence[_Front],
        last: _Front,
        compat: Floor | None,
    ) -> None:
        self._entries = entries
        self._fronts = fronts
        self._last = last
        self._compat = compat
        self.latency = last.latency
        self.importance = last.importance

    def __len__(self) -> int:
        return len(self.latency)

    def __iter__(self) -> Iterator[Solution[Choice]]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> Solution[Choice]:
        """The solution at one point, with its entries."""
        front, point = self._last, range(len(self))[index]
        steps = None if self._compat is None else int(front.cost[point])
        path: list[Entry[Choice]] = []
        while front.entry[point] >= 0:
            path.append(self._entries[front.entry[point]])
            front, point = self._fronts[front.parent[point]], int(front.point[point])
        path.reverse()
        latency = math.fsum(entry.latency for entry in path)
        importance = math.fsum(entry.importance for entry in path)
        return Solution(latency, importance, tuple(path), steps)

    @property
    def fastest(self) -> Solution[Choice]:
        """The solution of the smallest latency."""
        return self[0]

    @property
    def best(self) -> Solution[Choice]:
        """The solution of the greatest importance, whatever it takes."""
        return self[-1]

    def within(self, budget: float) -> Solution[Choice]:
        """The most important solution within this many milliseconds.

        The sum of its latencies is at most the budget, except in the published discretisation,
        where only the floored sum is.

        Raises:
            BudgetError: even the fastest solution takes longer.
        """
        if math.isnan(budget):
            raise UsageError("a budget is a number of milliseconds, not nan")
        for index in range(self._points_within(budget) - 1, -1, -1):
            solution = self[index]
            if self._compat is not None or solution.latency <= budget:
                return solution
        raise BudgetError(
            f"no choice of segments takes at most {budget:g} ms",
            hint=f"the fastest takes {self.fastest.latency:.6g} ms",
        )

    def _points_within(self, budget: float) -> int:
        if self._compat is not None:
            limit = float(self._compat.steps(np.asarray(budget)))
        else:
            limit = budget + abs(budget) * _ROUNDING
        return int(np.searchsorted(self._last.cost, limit, side="right"))


def frontier(
    entries: Sequence[Entry[Choice]], positions: int, *, compat: Floor | None = None
) -> Frontier[Choice]:
    """All Pareto-optimal paths of entries from position 0 to the last one.

    Among solutions of equal latency and importance, the one whose last entry starts earliest is
    kept, then the one whose entry was given first.

    Args:
        entries: in any order.
        positions: their number, at least 2.
        compat: the published discretisation instead of real latencies.

    Raises:
        MeasuresError: entries that are malformed, all of them listed.
        GapError: no path of entries leads from the first position to the last.
    """
    _check(entries, positions)
    search = _Search(entries, positions, compat)
    last = search.run()
    return Frontier(entries, search.fronts, last, compat)


def _check(entries: Sequence[Entry[Any]], positions: int) -> None:
    if positions < 2:
        raise UsageError(f"there is nothing to choose between {positions} positions")
    problems: list[Problem] = []
    for number, entry in enumerate(entries):
        path = f"entries[{number}]"
        if not 0 <= entry.start < entry.end < positions:
            what = f"leads from position {entry.start} to {entry.end}"
            problems.append(Problem(path, what, f"positions are 0 to {positions - 1}, ascending"))
        if not (math.isfinite(entry.latency) and entry.latency >= 0):
            problems.append(Problem(path, f"a latency of {entry.latency} ms"))
        if not math.isfinite(entry.importance):
            problems.append(Problem(path, f"an importance of {entry.importance}"))
    if problems:
        raise MeasuresError(problems)


class _Search:
    """The pass over the positions; fronts are numbered in the order they are found."""

    def __init__(self, entries: Sequence[Entry[Any]], positions: int, compat: Floor | None) -> None:
        self.fronts: list[_Front] = []
        self._positions = positions
        self._digits = None if compat is None else _PUBLISHED_DIGITS
        self._latency = np.array([entry.latency for entry in entries], dtype=np.float64)
        self._importance = np.array([entry.importance for entry in entries], dtype=np.float64)
        self._cost = self._latency if compat is None else compat.steps(self._latency)
        self._incoming = _incoming(entries, positions)
        self._last_start = _last_starts(entries)
        # Per position, the front's number under each assignment of the groups still needed.
        self._states: list[dict[Agreement, int]] = [{} for _ in range(positions)]

    def run(self) -> _Front:
        zero, none = np.zeros(1), np.full(1, -1, dtype=np.intp)
        self._states[0][()] = self._add(_Front(zero, zero, zero, none, none, none))
        for position in range(1, self._positions):
            for state, sources in self._candidates(position).items():
                self._states[position][state] = self._add(self._pareto(sources))
        if not self._states[-1]:
            raise _gap(self._states, self._incoming)
        # No group is needed behind the last position, so there is one state.
        (last,) = self._states[-1].values()
        return self.fronts[last]

    def _add(self, front: _Front) -> int:
        self.fronts.append(front)
        return len(self.fronts) - 1

    def _candidates(self, position: int) -> dict[Agreement, list[tuple[int, _Indices]]]:
        """Per assignment at this position: fronts before, each with the entries from there."""
        found: dict[Agreement, list[tuple[int, _Indices]]] = {}
        for (start, agree), indices in self._incoming[position].items():
            for state, number in self._states[start].items():
                assignment = _agreed(state, agree)
                if assignment is not None:
                    needed = self._needed(assignment, position)
                    found.setdefault(needed, []).append((number, indices))
        return found

    def _needed(self, assignment: Mapping[Hashable, Hashable], position: int) -> Agreement:
        kept = [item for item in assignment.items() if self._last_start[item[0]] >= position]
        return tuple(sorted(kept, key=repr))

    def _pareto(self, sources: Sequence[tuple[int, _Indices]]) -> _Front:
        fronts = [self.fronts[number] for number, _ in sources]
        costs = [
            (front.cost + self._cost[indices, None]).ravel()
            for front, (_, indices) in zip(fronts, sources, strict=True)
        ]
        importances = [
            (front.importance + self._importance[indices, None]).ravel()
            for front, (_, indices) in zip(fronts, sources, strict=True)
        ]
        cost, importance = np.concatenate(costs), np.concatenate(importances)
        kept = _undominated(cost, importance, self._digits)
        offsets = np.cumsum([0] + [len(part) for part in costs])
        return self._trace(sources, cost[kept], importance[kept], kept, offsets)

    def _trace(
        self,
        sources: Sequence[tuple[int, _Indices]],
        cost: _Floats,
        importance: _Floats,
        kept: _Indices,
        offsets: NDArray[np.intp],
    ) -> _Front:
        """Where each kept point came from, out of its place among all candidates."""
        part = np.searchsorted(offsets, kept, side="right") - 1
        within = kept - offsets[part]
        numbers = np.array([number for number, _ in sources], dtype=np.intp)
        sizes = np.array([len(self.fronts[number].cost) for number in numbers], dtype=np.intp)
        firsts = np.cumsum([0] + [len(indices) for _, indices in sources])
        every = np.concatenate([indices for _, indices in sources])
        entry = every[firsts[part] + within // sizes[part]]
        parent, point = numbers[part], within % sizes[part]
        latency = cost if self._digits is None else self._latencies(entry, parent, point)
        return _Front(cost, latency, importance, entry, parent, point)

    def _latencies(self, entry: _Indices, parent: _Indices, point: _Indices) -> _Floats:
        before = [
            self.fronts[front].latency[index] for front, index in zip(parent, point, strict=True)
        ]
        return np.array(before) + self._latency[entry]


def _incoming(
    entries: Sequence[Entry[Any]], positions: int
) -> list[dict[tuple[int, Agreement], _Indices]]:
    """Per end position, the entries by start and agreement, ordered by start."""
    found: list[dict[tuple[int, Agreement], list[int]]] = [{} for _ in range(positions)]
    for index, entry in enumerate(entries):
        found[entry.end].setdefault((entry.start, entry.agree), []).append(index)
    return [
        {
            key: np.array(indices, dtype=np.intp)
            for key, indices in sorted(group.items(), key=lambda item: item[0][0])
        }
        for group in found
    ]


def _last_starts(entries: Sequence[Entry[Any]]) -> dict[Hashable, int]:
    """Per group, the last position from which an entry that mentions it starts."""
    last: dict[Hashable, int] = {}
    for entry in entries:
        for group, _ in entry.agree:
            last[group] = max(last.get(group, 0), entry.start)
    return last


def _agreed(state: Agreement, agree: Agreement) -> dict[Hashable, Hashable] | None:
    """Both assignments together, None where they contradict each other."""
    assignment = dict(state)
    for group, option in agree:
        if assignment.setdefault(group, option) != option:
            return None
    return assignment


def _undominated(cost: _Floats, importance: _Floats, digits: int | None) -> _Indices:
    """Indices of the points that no other point beats, by cost; the first among equals."""
    order = np.argsort(cost, kind="stable")
    cost = cost[order]
    value = importance[order] if digits is None else np.round(importance[order], digits)
    best = np.maximum.accumulate(value)
    kept = np.ones(len(value), dtype=bool)
    kept[1:] = value[1:] > best[:-1]
    improving = order[kept]
    cost = cost[kept]
    # Of equal costs the last improvement is the most important one.
    final = np.ones(len(cost), dtype=bool)
    final[:-1] = cost[1:] > cost[:-1]
    return improving[final]


def _gap(
    states: Sequence[Mapping[Agreement, int]],
    incoming: Sequence[Mapping[tuple[int, Agreement], _Indices]],
) -> GapError:
    reached = max(position for position, found in enumerate(states) if found)
    if any(start == reached for group in incoming for start, _ in group):
        return GapError(f"no entries that agree lead on from position {reached}", reached)
    return GapError(f"no entry leads on from position {reached}", reached)

"""Two-stage depth compression (Kim et al. 2023): which activations stay, then where to merge.

Latency T(i, j) is that of one convolution merged from everything between positions i and j;
importance I(i, j, a, b) is that of removing the activations strictly between them, with the
activations at i and j on or off. A run without activations need not become one convolution:

    T_opt(i, j) = min(T(i, j), min_m T_opt(i, m) + T(m, j))
    I_ext(i, j, a, b) = max(I(i, j, a, b), max_m I_ext(i, m, a, 0) + I(m, j, 0, b))

The second stage chooses segments (i, j, a, b) whose activation states agree where they meet.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass

from graphfold.errors import UsageError
from graphfold.solver import Entry, Floor, Frontier, Solution, frontier

Span = tuple[int, int]
Ends = tuple[int, int, bool, bool]


@dataclass(frozen=True)
class Split:
    """The fastest way through a run without activations.

    Attributes:
        latency: in milliseconds.
        breaks: positions between its convolutions, both ends included.
    """

    latency: float
    breaks: tuple[int, ...]

    @property
    def spans(self) -> tuple[Span, ...]:
        """What each of its convolutions is merged from."""
        return tuple(zip(self.breaks, self.breaks[1:], strict=False))


@dataclass(frozen=True)
class Run:
    """What is chosen between two kept activations, or activation states.

    Attributes:
        split: the convolutions that it becomes.
        start_active, end_active: whether the activations at its ends stay.
    """

    split: Split
    start_active: bool
    end_active: bool

    @property
    def removed(self) -> range:
        """The positions strictly inside, whose activations go."""
        return range(self.split.breaks[0] + 1, self.split.breaks[-1])


def optimal_splits(latencies: Mapping[Span, float]) -> dict[Span, Split]:
    """T_opt: the fastest split of every span, the unsplit one where nothing is faster."""
    found: dict[Span, Split] = {}
    before: dict[int, list[int]] = {}
    for start, end in latencies:
        before.setdefault(end, []).append(start)
    for start, end in sorted(latencies, key=lambda span: (span[1] - span[0], span)):
        best = Split(latencies[start, end], (start, end))
        for middle in sorted(before[end]):
            first = found.get((start, middle))
            if first is None or middle <= start:
                continue
            total = first.latency + latencies[middle, end]
            if total < best.latency:
                best = Split(total, (*first.breaks, end))
        found[start, end] = best
    return found


def normalised(importances: Mapping[Ends, float], alpha: float) -> dict[Ends, float]:
    """Importances less `alpha` times the mean of the single-layer ones.

    A sum over many segments is worth less than its parts measured one at a time; the published
    alphas are 1.6 (MobileNetV2-1.0), 1.2 (1.4) and 1.4 (VGG19).
    """
    single = [value for (start, end, *_), value in importances.items() if end == start + 1]
    if not single:
        raise UsageError("no single-layer importance to normalise by")
    shift = alpha * math.fsum(single) / len(single)
    return {ends: value - shift for ends, value in importances.items()}


def extended(importances: Mapping[Ends, float], spans: Iterable[Span] = ()) -> dict[Ends, float]:
    """I_ext: the best of removing inner activations at once, or step by step.

    `spans` are those wanted beside the ones measured; a span that no steps make up is left out.
    """
    found: dict[Ends, float] = {}
    last_steps: dict[tuple[int, bool], list[tuple[int, float]]] = {}
    for (middle, end, start_active, end_active), value in importances.items():
        if not start_active:
            last_steps.setdefault((end, end_active), []).append((middle, value))
    wanted = {(start, end) for start, end, _, _ in importances} | set(spans)
    states = [(before, after) for before in (False, True) for after in (False, True)]
    by_length = sorted(wanted, key=lambda span: (span[1] - span[0], span))
    for (start, end), (start_active, end_active) in itertools.product(by_length, states):
        best = importances.get((start, end, start_active, end_active), -math.inf)
        for middle, last in last_steps.get((end, end_active), ()):
            if start < middle < end:
                first = found.get((start, middle, start_active, False), -math.inf)
                best = max(best, first + last)
        if best > -math.inf:
            found[start, end, start_active, end_active] = best
    return found


def depth_entries(
    latencies: Mapping[Span, float],
    importances: Mapping[Ends, float],
    *,
    alpha: float = 0.0,
    labels: Mapping[Span, tuple[Hashable, Hashable]] | None = None,
) -> list[Entry[Run]]:
    """The second stage's entries: runs whose activation states must agree where they meet.

    The activation at position 0 stays. A run is possible where both tables (the importances in
    their extended form) have it.

    Args:
        latencies: T, by positions.
        importances: I, by positions and activation states.
        alpha: normalises importances where it is not 0.
        labels: what the activations at a span's ends are called; their positions by default.
    """
    if alpha:
        importances = normalised(importances, alpha)
    splits = optimal_splits(latencies)
    entries: list[Entry[Run]] = []
    for (start, end, before, after), value in sorted(extended(importances, splits).items()):
        split = splits.get((start, end))
        if split is None or (start == 0 and not before):
            continue
        first, last = labels[start, end] if labels else (start, end)
        agree = ((first, before), (last, after))
        run = Run(split, before, after)
        entries.append(Entry(start, end, split.latency, value, run, agree))
    return entries


def depth_frontier(
    latencies: Mapping[Span, float],
    importances: Mapping[Ends, float],
    positions: int,
    *,
    alpha: float = 0.0,
    compat: Floor | None = None,
) -> Frontier[Run]:
    """Every budget's best choice of activations and merges, by the two-stage method.

    Raises:
        GapError: no choice of runs covers the network.
    """
    return frontier(depth_entries(latencies, importances, alpha=alpha), positions, compat=compat)


def kept_activations(solution: Solution[Run]) -> frozenset[int]:
    """A: positions, the first one left out, whose activations stay."""
    return frozenset(run.split.breaks[-1] for run in solution.choices if run.end_active)


def merge_ends(solution: Solution[Run]) -> frozenset[int]:
    """S: positions, the first one left out, at which a convolution ends; contains A."""
    return frozenset(end for run in solution.choices for end in run.split.breaks[1:])

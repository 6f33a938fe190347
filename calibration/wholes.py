"""Latencies that were measured one by one, set right by whole networks.

One by one, operators compete for the caches with others than in the network, and what is left of
a smaller network has more of the caches for itself: what is gone no longer displaces its weights.
To the first order all of this is in proportion to what goes. So one folded network, the fastest
that the table knows, is measured as a whole, and all latencies are scaled by one factor so that
both ends of the frontier come out as measured; the original is exact by what `rest` is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from graphfold.assembly import assemble_plan
from graphfold.cuts import CutLayout
from graphfold.errors import GraphfoldError
from graphfold.measures import Candidate, Row
from graphfold.methods import solve
from graphfold.model import Model
from graphfold.optimizer import optimize_model
from graphfold.plan import Plan


@dataclass(frozen=True)
class Fastest:
    """The fastest network that a table knows.

    Attributes:
        plan: what makes it of the original.
        covered: the sum of its rows' latencies.
    """

    plan: Plan
    covered: float


def find_fastest(rows: Sequence[tuple[Row, float]], cuts: CutLayout) -> Fastest | None:
    """The choice of rows with the smallest sum; None where nothing is faster than no change."""
    candidates = [Candidate(row, latency, 0.0) for row, latency in rows]
    solution = solve(candidates, cuts.layout).fastest
    changes = any(not row.unchanged for pieces in solution.choices for row in pieces)
    original = math.fsum(latency for row, latency in rows if row.unchanged)
    if not changes or solution.latency >= original:
        return None
    plan = assemble_plan(solution, cuts.layout, boundary="hoist")
    return Fastest(plan, solution.latency)


def fold_fastest(model: Model, fastest: Fastest) -> Model | str:
    """The folded network, or why it cannot be had."""
    try:
        return optimize_model(model.clone(), fastest.plan, verify=False).folded
    except GraphfoldError as error:
        return str(error).splitlines()[0]


def scale_of(covered: float, fast: float, ratio: float) -> float:
    """The factor that makes a table predict the fastest network's measured latency.

    Args:
        covered: what the original's steps take one by one, as a share of the whole network.
        fast: what the fastest network's rows take.
        ratio: that network's latency as measured, its rest included.
    """
    scale = (1 - ratio) / (covered - fast)
    # No more than makes the rest nothing: a rest takes some time.
    return min(max(scale, 0.0), 1 / covered)

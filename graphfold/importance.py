"""Importances that need no data: what a change removes, as a share of the whole network.

They order changes by size, not by damage: good enough to run the whole path from a model to a
folded model before any data is there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from graphfold.errors import UsageError

DataFree = Literal["uniform", "macs", "l1"]


@dataclass(frozen=True)
class Change:
    """What replacing a segment removes from the network.

    Attributes:
        activations: number of activation sites removed, or added: a change as well.
        convs: number of conv sites removed.
        macs_before, macs_after: multiply-adds of the segment and of its replacement.
        l1_removed: sum of the absolute weights of the removed conv sites, before folding.
    """

    activations: int = 0
    convs: int = 0
    macs_before: int = 0
    macs_after: int = 0
    l1_removed: float = 0.0


@dataclass(frozen=True)
class Whole:
    """The same quantities of the whole network."""

    activations: int
    convs: int
    macs: int
    l1: float


def data_free(model: DataFree, changes: Sequence[Change], whole: Whole) -> list[float]:
    """Importance of each change, 0 for no change and negative for any other.

    - uniform: minus the share of activation and conv sites removed, or added.
    - macs: minus the share of the multiply-adds removed. A replacement with more of them than
      the segment had removes none.
    - l1: minus the share of the convolutions' l1 norm removed.

    Merging alone may remove neither multiply-adds nor weights, and still every removed site
    counts: with a millionth of its uniform importance, so that of equal choices the one that
    removes less is taken.

    Raises:
        UsageError: the network has nothing of what is counted.
    """
    sites = whole.activations + whole.convs
    totals = {"uniform": float(sites), "macs": float(whole.macs), "l1": whole.l1}
    if not (totals[model] > 0 and math.isfinite(totals[model]) and sites > 0):
        raise UsageError(f"the network has nothing to count for the importance {model!r}")
    return [_importance(model, change, totals[model], sites) for change in changes]


def _importance(model: DataFree, change: Change, total: float, sites: int) -> float:
    count = (change.activations + change.convs) / sites
    if model == "uniform":
        return -count
    if model == "macs":
        removed: float = max(change.macs_before - change.macs_after, 0)
    else:
        removed = change.l1_removed
    return -removed / total - 1e-6 * count

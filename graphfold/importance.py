"""Importances that need no data: what a change takes from the network, as a share of all of it.

A convolution and the activation behind it are one layer, of two halves: without the convolution
one half is gone, without the activation the other, since the convolution is then one with its
neighbour. So a layer counts half of its size for each half that goes, and what removes more never
counts less. A merge that has more multiply-adds than what it replaces is no gain for that, and one
that saves many without removing an activation, as of parallel branches, is no loss.

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
class Lost:
    """What a change takes from the layers inside, in one measure of their size.

    Attributes:
        removed: size of the conv sites that go.
        linear: of those whose activation goes.
        moved: of those whose padding moves to the segment's beginning, each times the share of
            its outputs that padding reaches: there the change is not exact.
    """

    removed: float = 0.0
    linear: float = 0.0
    moved: float = 0.0

    @property
    def size(self) -> float:
        """Half a layer's size for each half that it loses."""
        return (self.removed + self.linear + self.moved) / 2


@dataclass(frozen=True)
class Change:
    """What replacing a segment takes from the network.

    Attributes:
        activations: number of activation sites removed, or added: a change as well.
        convs: number of conv sites removed.
        macs: what is lost, in multiply-adds.
        l1: what is lost, in absolute weights before folding.
    """

    activations: int = 0
    convs: int = 0
    macs: Lost = Lost()
    l1: Lost = Lost()


@dataclass(frozen=True)
class Whole:
    """The same quantities of the whole network."""

    activations: int
    convs: int
    macs: float
    l1: float


def data_free(model: DataFree, changes: Sequence[Change], whole: Whole) -> list[float]:
    """Importance of each change, 0 for no change, and negative where anything is lost.

    - uniform: minus the share of activation and conv sites removed, or added.
    - macs: minus the share of the multiply-adds lost, see `Lost`.
    - l1: minus the share of the convolutions' l1 norm lost.

    An activation may stand behind no convolution, and still every removed site counts: with a
    millionth of its uniform importance, so that of equal choices the one that removes less is
    taken.

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
    lost = change.macs if model == "macs" else change.l1
    return -lost.size / total - 1e-6 * count

"""Segments whose weights come from data: what the engine is handed of them.

How they are fitted is a matter of calibration; here is only what comes out of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from graphfold.plan import Plan
from graphfold.tables import Table, make_table

if TYPE_CHECKING:
    from graphfold.model import Model


@dataclass(frozen=True)
class SegmentFit:
    """One fitted segment.

    Attributes:
        input, output: its ends.
        became: what stands there now, for people.
        error: share of the result's variance that the fit leaves unexplained, on the data.
        in_turn: whether it was fitted on what the network before it had become.
    """

    input: str
    output: str
    became: str
    error: float
    in_turn: bool = False


@dataclass(frozen=True)
class Fitted:
    """A model with a plan's fitted segments in place.

    Attributes:
        model: with them.
        plan: what is left to apply to it.
        fits: one for every fitted segment.
    """

    model: Model
    plan: Plan
    fits: tuple[SegmentFit, ...]


Fit = Callable[["Model", Plan], Fitted]


def fits_json(fits: tuple[SegmentFit, ...]) -> list[dict[str, Any]]:
    """As a list of JSON objects."""
    return [dict(vars(each)) for each in fits]


def fits_table(fits: tuple[SegmentFit, ...]) -> Table:
    """For people."""
    rows = [(each.output, each.became, f"{100 * each.error:.1f} %") for each in fits]
    columns = ("ends at", "became", "unexplained")
    note = "on the calibration data"
    if any(each.in_turn for each in fits):
        note += "; fitted in turn, for held-back inputs are answered better so"
    return make_table("Fitted segments", columns, rows, note=note)

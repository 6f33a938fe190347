"""What can be chosen where two tables of one model do not hold the same choices.

Published importances leave the stem and the head out, and a latency table the replacements that are
too large ever to pay. A choice that either table lacks cannot be made; what stays as it is needs no
choice. For tables of different models there is no such reading: their rows must all fit.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import TypeVar

from graphfold.drops import is_drop
from graphfold.measures import ImportanceRow, ImportanceTable, LatencyTable, Row

_AnyRow = TypeVar("_AnyRow", bound=Row)
# With less in common, one of the tables is about something else, and `join` tells what.
_LEAST_SHARE = 0.5


def shared_choices(
    latencies: LatencyTable, importances: ImportanceTable
) -> tuple[LatencyTable, ImportanceTable, str | None]:
    """Both tables without the choices that the other one lacks, and a warning that tells of them.

    They come back as they are where their headers do not name the same model, or where they have
    less than half of the choices in common; measured damages are of some choices only, as asked.
    """
    headers = latencies.header.model, importances.header.model
    if headers[0] is None or headers[1] is None or headers[0].sha256 != headers[1].sha256:
        return latencies, importances, None
    by_ends: defaultdict[tuple[str, str], list[ImportanceRow]] = defaultdict(list)
    for row in importances.rows:
        by_ends[row.input, row.output].append(row)
    timed = [row for row in latencies.rows if _is_optional(row) or _fits(row, by_ends)]
    timed_ends: defaultdict[tuple[str, str], list[Row]] = defaultdict(list)
    for latency in timed:
        timed_ends[latency.input, latency.output].append(latency)
    worth = [row for row in importances.rows if row.unchanged or _fits(row, timed_ends)]
    gone = len(latencies.rows) - len(timed), len(importances.rows) - len(worth)
    kept = sum(not row.unchanged for row in worth)
    is_partial = importances.header.method == "regress" and kept > 0
    if gone == (0, 0) or (not is_partial and kept < _LEAST_SHARE * (kept + max(gone))):
        return latencies, importances, None
    return (
        latencies.model_copy(update={"rows": tuple(timed)}),
        importances.model_copy(update={"rows": tuple(worth)}),
        f"{gone[0]} replacements without an importance and {gone[1]} without a latency cannot be "
        f"chosen; {kept} can",
    )


def _is_optional(row: Row) -> bool:
    """Rows that a latency table has for every method, and an importance table for few."""
    return row.unchanged or row.input == row.output or is_drop(row)


def _fits(row: Row, others: defaultdict[tuple[str, str], list[_AnyRow]]) -> bool:
    same: Iterable[Row] = others[row.input, row.output]
    return any(row.common(other) is not None for other in same)

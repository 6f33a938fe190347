"""Padding moves to the front of a segment only where no exact merge is possible."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from graphfold.errors import PlanError, Problem
from graphfold.plan import Plan
from graphfold.reference import build_reference
from graphfold.rewrite import select_passes

if TYPE_CHECKING:
    from graphfold.model import Model


def hoist_where_needed(model: Model, plan: Plan) -> Plan:
    """The plan, with `boundary: hoist` for those merged segments that `exact` does not allow.

    Raises:
        PlanError: a segment cannot be merged either way.
    """
    try:
        build_reference(model, plan, select_passes())
    except PlanError as error:
        found = {_hoistable(problem) for problem in error.problems}
        if None in found:
            raise
        segments = [
            segment.model_copy(update={"boundary": "hoist"}) if number in found else segment
            for number, segment in enumerate(plan.segments)
        ]
        return plan.model_copy(update={"segments": segments})
    return plan


def _hoistable(problem: Problem) -> int | None:
    """The number of the segment that a problem of a plan would be solved for by hoisting."""
    match = re.fullmatch(r"segments\[(\d+)\]", problem.path)
    return int(match[1]) if match and "hoist would work" in (problem.hint or "") else None

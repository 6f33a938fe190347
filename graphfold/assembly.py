"""From chosen segments to the plan that states them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from graphfold.errors import UsageError
from graphfold.layout import Layout
from graphfold.measures import ImportanceTable, LatencyTable, Row
from graphfold.methods import Pieces
from graphfold.plan import Boundary, ModelReference, Plan, read_plan
from graphfold.solver import Solution

ActivationJson = str | dict[str, str]


def assemble_plan(
    solution: Solution[Pieces],
    layout: Layout,
    *,
    boundary: Boundary = "exact",
    activation: ActivationJson | None = None,
    model: ModelReference | None = None,
    objective: Mapping[str, Any] | None = None,
) -> Plan:
    """The plan that makes a model what a solution chose.

    Unchanged segments are not named in it. Where a segment ends without an activation of the
    model and its choice wants one there, `activation` is added; where one goes that no segment
    holds, it is a loose removal.

    Raises:
        UsageError: the choice adds an activation and none is given.
    """
    rows = [row for pieces in solution.choices for row in pieces]
    data: dict[str, Any] = {"graphfold_plan": 1}
    if model is not None:
        data["model"] = model.model_dump(exclude_none=True)
    data["segments"] = [
        _segment(row, layout, boundary, activation) for row in rows if not row.unchanged
    ]
    data["remove_activations"] = list(dict.fromkeys(_removed_at_ends(rows, layout)))
    added = {
        layout.place(row.output): _free(row, activation)
        for row in rows
        if _gains_activation(row, layout) and not _states_activation(row, layout)
    }
    data["add_activations"] = [
        {"tensor": tensor, "activation": free} for tensor, free in added.items()
    ]
    data = {key: value for key, value in data.items() if value != []}
    if objective is not None:
        data["objective"] = dict(objective)
    return read_plan(data)


def changes_anything(pieces: Pieces, layout: Layout) -> bool:
    """Whether a choice makes anything else of its part of the network than it is."""
    return (
        any(not row.unchanged or _gains_activation(row, layout) for row in pieces)
        or next(_removed_at_ends(pieces, layout), None) is not None
    )


def _segment(
    row: Row, layout: Layout, boundary: Boundary, activation: ActivationJson | None
) -> dict[str, Any]:
    # A convolution reads behind the activation at a cut, and a segment ends before it; plans
    # name tensors of the model as it was, so this holds where that activation goes, too.
    cut = layout.cut(row.input)
    segment: dict[str, Any] = {
        "input": layout.activations.get(cut, cut),
        "output": layout.cut(row.output),
    }
    if row.family is not None:
        segment["family"] = row.family
    if row.is_fitted:
        return segment | _fitted(row)
    if row.family != "identity":
        segment["boundary"] = boundary
        norm = layout.norms.get((cut, layout.cut(row.output)))
        if norm is not None:
            segment["norm"] = norm
        if row.kernel is not None:
            segment["kernel"] = list(row.kernel)
        if row.removed_convs:
            segment["remove_convs"] = list(row.removed_convs)
    if _gains_activation(row, layout) and _states_activation(row, layout):
        segment["activation"] = _free(row, activation)
    return segment


def _fitted(row: Row) -> dict[str, Any]:
    found: dict[str, Any] = {"weights": "regress"}
    if row.kernel is not None:
        found["kernel"] = list(row.kernel)
    sizes = {"width": row.width, "rank": row.rank}
    return found | {name: size for name, size in sizes.items() if size is not None}


def _gains_activation(row: Row, layout: Layout) -> bool:
    return row.end_active is True and layout.place(row.output) not in layout.activations


def _states_activation(row: Row, layout: Layout) -> bool:
    """Whether a segment is named in the plan, and what follows it is its own activation."""
    return not row.unchanged and layout.place(row.output) == layout.cut(row.output)


def _free(row: Row, activation: ActivationJson | None) -> ActivationJson:
    if activation is None:
        raise UsageError(
            f"the choice adds an activation behind {row.output!r}", hint="say which one to add"
        )
    return activation


def _removed_at_ends(rows: Iterable[Row], layout: Layout) -> Iterator[str]:
    for row in rows:
        ends = (
            (layout.cut(row.input), row.start_active),
            (layout.place(row.output), row.end_active),
        )
        for place, active in ends:
            site = layout.activations.get(place)
            if active is False and site is not None:
                yield site


def objective(
    solution: Solution[Pieces],
    latencies: LatencyTable,
    importances: ImportanceTable,
    *,
    budget: float | None = None,
) -> dict[str, Any]:
    """What a plan was made for: figures predicted for the whole network, and its tables."""
    found: dict[str, Any] = {
        "predicted_ms": solution.latency + latencies.rest,
        "predicted_importance": solution.importance,
        "latency_table": latencies.digest,
        "importance_table": importances.digest,
        "device": latencies.header.model_dump(mode="json", exclude_none=True),
    }
    return found if budget is None else {"budget_ms": budget} | found

"""From a model and a plan to the reference network: the plan's semantics with nothing merged."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from graphfold.errors import PlanError, Problem
from graphfold.graph import Graph
from graphfold.merge import segment_problems
from graphfold.model import Model, digest
from graphfold.plan import Plan
from graphfold.progress import Progress
from graphfold.resolve import ResolvedPlan, resolve_plan
from graphfold.rewrite import (
    Pass,
    PassStatistics,
    Phase,
    SegmentNames,
    Work,
    run_passes,
)
from graphfold.shapes import shapes_as_read


@dataclass(frozen=True)
class Reference:
    """The reference network, the segments that must be folded in it, and how it came about."""

    model: Model
    graph: Graph
    segments: tuple[SegmentNames, ...]
    statistics: tuple[PassStatistics, ...]
    warnings: tuple[str, ...] = ()


# Gives the reference network other weights: (reference, the model as it came) to the same graph.
RetrainFunction = Callable[[Reference, Model], Model]


def build_reference(
    model: Model,
    plan: Plan | None,
    passes: Sequence[Pass],
    *,
    allow_other_model: bool = False,
    progress: Progress | None = None,
) -> Reference:
    """Apply a plan's semantics to a copy of a model; without a plan it is the model itself.

    Raises:
        PlanError: the plan does not fit the model, or a segment cannot become one convolution;
            all problems at once.
    """
    shapes = shapes_as_read(model)
    if plan is None:
        return Reference(model, Graph(model, shapes), (), ())
    copy = model.clone()
    graph = Graph(copy, shapes)
    warnings = tuple(check_digest(model, plan, allow_other_model))
    resolved = resolve_plan(graph, plan)
    dropped = [segment for segment in resolved.segments if segment.spec.family == "identity"]
    work = Work(graph, resolved)
    statistics = run_passes(passes, Phase.PLAN, work, progress)
    refused = [skip for each in statistics for skip in each.skipped]
    if refused:
        raise PlanError([Problem(skip.site, skip.reason) for skip in refused])
    for segment in dropped:
        work.bypass(segment.output, segment.input)
        work.graph.remove_dead(segment.nodes)
    graph.ir.sort()
    segments = _names(resolved)
    problems = segment_problems(Work(graph, segments=segments))
    if problems:
        raise PlanError([Problem(segment.path, what, hint) for segment, what, hint in problems])
    return Reference(copy, graph, segments, tuple(statistics), warnings)


def _names(resolved: ResolvedPlan) -> tuple[SegmentNames, ...]:
    return tuple(
        SegmentNames(
            segment.path,
            segment.input.name or "",
            segment.output.name or "",
            segment.spec.boundary or "exact",
            None if segment.spec.kernel is None else tuple(segment.spec.kernel),
            segment.spec.family,
        )
        for segment in resolved.segments
        if segment.spec.family != "identity" and segment.input is not segment.output
    )


def check_digest(model: Model, plan: Plan, allow_other_model: bool) -> Sequence[str]:
    """Warnings about a plan that was made for another model.

    Raises:
        PlanError: it was, and that is not allowed.
    """
    stated = plan.model.sha256 if plan.model is not None else None
    if stated is None:
        return ()
    source: Model | Path = model.path if model.path is not None else model
    actual = digest(source)
    if actual == stated:
        return ()
    what = (
        f"the plan was made for another model: sha256 {stated[:12]}..., "
        f"this one's is {actual[:12]}..."
    )
    if not allow_other_model:
        raise PlanError([Problem("model.sha256", what, "--allow-other-model applies it anyway")])
    return (what,)

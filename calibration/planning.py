"""Plans for a device: tables measured where they are missing, choices confirmed by measurement.

What the tables predict is checked where the device is at hand: the chosen plan is folded, both
networks are timed in turns, and where the result is slower than asked the budget is made smaller by
what is missing; where it is much faster, larger. So what comes out is as fast as asked, and not
more is given up for it than needed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast, get_args

from graphfold.calibration.latency import LARGEST_SPREAD, ModelLatency, compare
from graphfold.calibration.timing import as_timed
from graphfold.errors import BudgetError, UsageError
from graphfold.hoisting import hoist_where_needed
from graphfold.identity import model_reference
from graphfold.importance import DataFree
from graphfold.measures import ImportanceTable, LatencyTable, read_importance, read_latency
from graphfold.methods import Method, Pieces
from graphfold.plan import Plan
from graphfold.planner import Planning, Point, is_measured, prepare, spread_over
from graphfold.plot import Series, scatter
from graphfold.progress import Progress, no_progress
from graphfold.reference import build_reference
from graphfold.rewrite import select_passes
from graphfold.shared_choices import shared_choices
from graphfold.solver import Solution
from graphfold.tables import Table, make_table

if TYPE_CHECKING:
    from graphfold.model import Model

# Of what was asked: a plan may be so much faster before a slower one is looked for.
LARGEST_EXCESS = 1.15
_MOST_TRIES = 8
_MEASURE_SECONDS = 4.0
_MEASUREMENTS = 3
# A plan predicted to be so much too slow is still measured: it may be fast enough.
_NEARLY = 1.05
_ROUNDING = 1e-6
_SHOWN_POINTS = 20


@dataclass(frozen=True)
class PlanResult:
    """A plan and what it was chosen from.

    Attributes:
        planning: the frontier and its tables.
        plan: what was chosen; None where only the frontier was asked for.
        point: its prediction.
        asked: speedup asked for.
        measured: speedup that was measured, None where it was not.
        frontier: whether the whole frontier is to be shown.
        warnings: for the user.
    """

    planning: Planning
    plan: Plan | None
    point: Point | None
    asked: float | None
    measured: float | None
    frontier: bool
    warnings: tuple[str, ...] = field(default=())

    def write(self, plan: str | None, plot: str | None) -> list[str]:
        """Write the plan and the picture where names are given; returns what was written."""
        from graphfold.files import atomic_file

        written = []
        if plan is not None and self.plan is not None:
            content = self.plan.model_dump_json(exclude_defaults=True, indent=1)
            with atomic_file(plan) as file:
                file.write(with_version(content).encode())
            written.append(plan)
        if plot is not None:
            with atomic_file(plot) as file:
                file.write(self.picture().encode())
            written.append(plot)
        return written

    def picture(self) -> str:
        """The frontier as an SVG: latency against importance, what was chosen marked."""
        points = self.planning.points()
        series = [
            Series("plans", [(point.latency, point.importance) for point in points], "line"),
            Series("the model as it is", [(self.planning.original, _best(points))], "dot"),
        ]
        if self.point is not None:
            series.append(Series("chosen", [(self.point.latency, self.point.importance)], "ring"))
        method = self.planning.importances.header.method or "table"
        return scatter(series, "latency, ms", f"importance ({method})")

    def to_json(self) -> dict[str, Any]:
        """The JSON document of `plan --json`."""
        plan = None if self.plan is None else self.plan.model_dump(mode="json", exclude_none=True)
        return {
            "plan": plan,
            "original_ms": self.planning.original,
            "predicted": None if self.point is None else vars(self.point),
            "asked_speedup": self.asked,
            "measured_speedup": self.measured,
            "frontier": [vars(point) for point in self.planning.points()],
            "warnings": list(self.warnings),
        }

    def tables(self) -> list[Table]:
        """The choice, and the frontier where it was asked for."""
        found = []
        if self.point is not None:
            rows = [
                ("predicted latency", f"{self.point.latency:.3f} ms"),
                ("of the model as it is", f"{self.planning.original:.3f} ms"),
                ("predicted speedup", f"{self.point.speedup:.2f}x"),
                ("segments that change", str(self.point.segments)),
                ("importance", f"{self.point.importance:.4g}"),
            ]
            if self.measured is not None:
                rows.insert(3, ("measured speedup", f"{self.measured:.2f}x"))
            found.append(make_table("Plan", ("", ""), rows))
        if self.frontier:
            points = self.planning.points()
            shown = spread_over(points, _SHOWN_POINTS)
            columns = ("latency ms", "speedup", "importance", "segments", "")
            rows_of = [
                (
                    f"{point.latency:.3f}",
                    f"{point.speedup:.2f}x",
                    f"{point.importance:.4g}",
                    str(point.segments),
                    "chosen" if point == self.point else "",
                )
                for point in shown
            ]
            note = f"{len(shown)} of {len(points)} plans on the frontier"
            found.append(make_table("Frontier", columns, rows_of, note=note))
        return found


def _best(points: Sequence[Point]) -> float:
    return max(point.importance for point in points)


def with_version(content: str) -> str:
    """The format's version is a default, and must still be said."""
    if '"graphfold_plan"' in content:
        return content + "\n"
    return content.replace("{", '{\n "graphfold_plan": 1,', 1) + "\n"


def make_plan(
    model: Model,
    *,
    latency: str | Path | LatencyTable | None = None,
    importance: str | Path | ImportanceTable | None = None,
    speedup: float | None = None,
    budget: float | None = None,
    frontier: bool = False,
    method: str = "layermerge",
    boundary: str = "auto",
    compat: float | None = None,
    confirm: bool | None = None,
    input_shapes: Mapping[str, Sequence[int]] | None = None,
    progress: Progress | None = None,
) -> PlanResult:
    """Choose what to merge and to drop.

    Args:
        model: the model to plan for.
        latency: a latency table; None measures this device.
        importance: a table, or `uniform`, `macs` or `l1`.
        speedup: wanted over the model as it is.
        budget: wanted latency of the whole network, in milliseconds.
        frontier: only list what there is, where neither is given.
        method: `layermerge`, `depth`, `layer-only`, `sequential` or `depthshrinker`.
        boundary: where padding stands in merged segments: `exact`, `hoist`, or `auto`: hoisted
            where no merge would be exact.
        compat: steps per millisecond of the published discretisation.
        confirm: measure the folded network here; by default where the device was measured here.
        input_shapes: sizes that the model leaves open.
        progress: called with (stage, done, total).

    Raises:
        UsageError: contradictory or missing arguments, nothing to plan for.
        MeasuresError: tables that cannot be read or do not fit.
        BudgetError: no plan is as fast as asked.
    """
    _check_arguments(importance, speedup, budget, frontier, method, boundary)
    report = progress or no_progress
    warnings: list[str] = []
    worth = _importance(importance)
    if latency is None:
        from graphfold.calibration.profile import profile_model

        fitted = isinstance(worth, ImportanceTable) and is_measured(worth)
        profiled = profile_model(model, input_shapes=input_shapes, fitted=fitted, progress=report)
        latencies, here = profiled.table, True
        warnings += profiled.warnings
    else:
        latencies = latency if isinstance(latency, LatencyTable) else read_latency(latency)
        here = False
    # Without sizes given, those that the latencies were measured at.
    shapes = input_shapes or latencies.header.inputs
    report("solving", 0, 0)
    if isinstance(worth, ImportanceTable):
        latencies, worth, left_out = shared_choices(latencies, worth)
        warnings += [left_out] if left_out else []
    planning = prepare(
        model,
        latencies,
        worth,
        method=cast(Method, method),
        compat=compat,
        input_shapes=shapes,
    )
    if speedup is None and budget is None:
        return PlanResult(planning, None, None, None, None, frontier, tuple(warnings))
    asked = speedup if speedup is not None else planning.original / cast(float, budget)
    chooser = _Chooser(model, planning, boundary, latencies, shapes, report)
    confirmed = here if confirm is None else confirm
    solution, plan, measured = chooser.confirmed(asked) if confirmed else chooser.predicted(asked)
    point = planning.point(solution)
    warnings += chooser.warnings
    return PlanResult(planning, plan, point, asked, measured, frontier, tuple(warnings))


def _check_arguments(
    importance: object,
    speedup: float | None,
    budget: float | None,
    frontier: bool,
    method: str,
    boundary: str,
) -> None:
    if importance is None:
        raise UsageError(
            "what is each part of the network worth?",
            hint="--importance macs needs no data; --importance FILE reads a table",
        )
    if speedup is not None and budget is not None:
        raise UsageError("--speedup and --budget contradict each other", hint="give one of them")
    if speedup is None and budget is None and not frontier:
        raise UsageError("how fast?", hint="--speedup X, --budget MS, or --frontier to see")
    if (speedup is not None and speedup <= 0) or (budget is not None and budget <= 0):
        raise UsageError("a speedup or a budget is more than zero")
    methods = get_args(Method)
    if method not in methods:
        raise UsageError(f"--method {method!r} is not known", hint="one of " + ", ".join(methods))
    if boundary not in ("auto", "exact", "hoist"):
        raise UsageError(f"--boundary {boundary!r} is not known", hint="auto, exact or hoist")


def _importance(given: str | Path | ImportanceTable | None) -> ImportanceTable | DataFree:
    if isinstance(given, ImportanceTable):
        return given
    if given in get_args(DataFree):
        return cast(DataFree, given)
    assert given is not None
    return read_importance(given)


_Chosen = tuple[Solution[Pieces], Plan, float | None]


class _Chooser:
    """Choices of one planning, folded and measured where that is wanted."""

    def __init__(
        self,
        model: Model,
        planning: Planning,
        boundary: str,
        latencies: LatencyTable,
        input_shapes: Mapping[str, Sequence[int]] | None,
        progress: Progress,
    ) -> None:
        self.model = model
        self.planning = planning
        self.boundary = boundary
        self.latencies = latencies
        self.input_shapes = input_shapes
        self.progress = progress
        self.warnings: list[str] = []
        self.reference = model_reference(model)

    def predicted(self, speedup: float) -> _Chosen:
        """What the tables say is fast enough."""
        budget = self.planning.original / speedup
        solution = self.planning.within(budget)
        return solution, self._plan(solution, budget), None

    def confirmed(self, speedup: float) -> _Chosen:
        """The least important part given up that makes the network as fast as asked, measured."""
        solution = self.planning.within(self._reachable(speedup))
        # Predicted latencies that were measured to be fast enough, and too slow.
        fast, slow = 0.0, float("inf")
        best: _Chosen | None = None
        reached = 0.0
        for attempt in range(_MOST_TRIES):
            self.progress("folding and measuring plans", attempt, _MOST_TRIES)
            latency = self.planning.point(solution).latency
            plan = self._plan(solution, self.planning.original / speedup)
            measured = self._measure(plan)
            reached = max(reached, measured)
            if measured >= speedup:
                fast, best = latency, (solution, plan, measured)
                if measured <= speedup * LARGEST_EXCESS:
                    return best
            else:
                slow = latency
            following = self._between(latency * measured / speedup, fast, slow)
            if following is None:
                break
            solution = following
        if best is None:
            raise BudgetError(
                f"no plan that was folded and measured is {speedup:.2f} times as fast; the fastest "
                f"of them is {reached:.2f} times",
                hint="ask for less; `graphfold plan --frontier` lists what is predicted",
            )
        excess = f"measured {best[2]:.2f} times as fast, {speedup:.2f} was asked for: "
        if following is None:
            self.warnings.append(excess + "no finer plan lies between it and one that is too slow")
        else:
            self.warnings.append(excess + f"nothing finer was found in {_MOST_TRIES} tries")
        return best

    def _reachable(self, speedup: float) -> float:
        """The budget of a speedup; of one slightly beyond all predictions, the fastest plan's.

        Raises:
            BudgetError: no plan comes near it.
        """
        budget = self.planning.original / speedup
        fastest = self.planning.point(self.planning.frontier.fastest)
        is_near = fastest.segments > 0 and budget < fastest.latency <= budget * _NEARLY
        return fastest.latency if is_near else budget

    def _between(self, wanted: float, fast: float, slow: float) -> Solution[Pieces] | None:
        """A plan predicted between what is fast enough and what is too slow; None without one.

        As much faster or slower as was missing, where that lies between the two.
        """
        highest = slow * (1 - _ROUNDING)
        budgets = [wanted] if fast < wanted < slow else []
        budgets += [(fast + slow) / 2, highest] if slow < float("inf") and fast > 0 else []
        budgets += [self.planning.point(self.planning.frontier.fastest).latency] if not fast else []
        for budget in budgets:
            try:
                solution = self.planning.within(budget)
            except BudgetError:
                continue
            if fast < self.planning.point(solution).latency < highest:
                return solution
        return None

    def _plan(self, solution: Solution[Pieces], budget: float) -> Plan:
        """The plan of a solution; segments that no exact merge allows have their padding hoisted.

        Raises:
            PlanError: a segment cannot be merged with the boundary that was asked for.
        """
        boundary = "exact" if self.boundary == "auto" else self.boundary
        plan = self.planning.plan(solution, budget=budget, boundary=boundary, model=self.reference)
        if plan.is_fitted:
            # A table of measured damages has no merges; what was measured could be put in place.
            return plan
        if self.boundary == "auto":
            return hoist_where_needed(self.model, plan)
        build_reference(self.model, plan, select_passes())
        return plan

    def _measure(self, plan: Plan) -> float:
        """Speedup of the folded network over the model, measured in turns.

        The steadiest of several measurements, where the first spreads too much to decide anything.
        """
        from graphfold.calibration.fitting import sketch_plan
        from graphfold.optimizer import optimize_model

        header = self.latencies.header
        folded = optimize_model(self.model, plan, fit=sketch_plan, verify=False).folded
        batch = header.batch or 1
        models = as_timed([self.model, folded], header.dtype or "float32", self.input_shapes, batch)
        best: ModelLatency | None = None
        for _ in range(_MEASUREMENTS):
            found = compare(
                models,
                names=["model", "folded"],
                input_shapes=self.input_shapes,
                threads=header.threads or 1,
                batch=batch,
                provider=header.provider or "CPUExecutionProvider",
                seconds=_MEASURE_SECONDS,
            ).models[1]
            if best is None or found.speedup_spread < best.speedup_spread:
                best = found
            if best.speedup_spread <= LARGEST_SPREAD:
                return best.speedup
        assert best is not None
        text = "measured speedups spread by more than 10 %: confirm the plan on a quieter machine"
        if text not in self.warnings:
            self.warnings.append(text)
        return best.speedup

"""Everything in one run: what is fastest at how much damage, on this device, with these inputs.

The model is folded losslessly, inner channels and blocks are fitted on most of the calibration
inputs, and from there searches walk towards faster networks (`graphfold.calibration.context`),
in float and, where it is asked for, with the latencies that the network has in INT8. What is left
of the inputs judges every step. The network that is chosen is built once more by `optimize`, from
the plan that says what it is, with all inputs: so the plan file alone makes it again. Where it is
trained after that, neither fits nor training see the inputs that judge.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from graphfold.calibration.explore import Exploration, Option, Route, plan_of
from graphfold.calibration.judge import Verdict
from graphfold.calibration.planning import with_version
from graphfold.errors import BudgetError, ModelError, UsageError
from graphfold.model import to_proto
from graphfold.plan import Plan
from graphfold.plot import Series, scatter
from graphfold.progress import Progress
from graphfold.tables import Table, make_table

if TYPE_CHECKING:
    from graphfold.calibration.dataset import Dataset
    from graphfold.model import Model
    from graphfold.optimizer import Result

Dtype = Literal["float32", "int8", "auto"]

_LARGEST_SPEEDUP = 4.0
# A frontier need not be followed to where little more than chance is left: of agreement, or of
# values' variance.
_USELESS = 0.5


@dataclass(frozen=True)
class Found:
    """What a search found.

    Attributes:
        plan: the chosen network's; None where only the frontier was asked for.
        chosen: the option it makes, its speedup measured; None likewise.
        options: everything on the way, float first, the model itself the first.
        asked: for people.
        settings: device, threads, data.
        seconds: per stage.
        warnings: for the user.
    """

    plan: Plan | None
    chosen: Option | None
    options: tuple[Option, ...]
    asked: str
    settings: Mapping[str, Any]
    seconds: Mapping[str, float]
    warnings: tuple[str, ...] = field(default=())

    def to_json(self) -> dict[str, Any]:
        """The JSON document of `plan --data --json`, and the most of `auto --json`."""
        return {
            "asked": self.asked,
            "plan": None if self.plan is None else json.loads(self.plan_text()),
            "chosen": None if self.chosen is None else _option_json(self.chosen),
            "frontier": [_option_json(each) for each in self.options],
            "settings": dict(self.settings),
            "seconds": dict(self.seconds),
            "warnings": list(self.warnings),
        }

    def plan_text(self) -> str:
        """The plan file's content; empty where there is none."""
        if self.plan is None:
            return ""
        return with_version(self.plan.model_dump_json(exclude_defaults=True, indent=1))

    def tables(self) -> list[Table]:
        """What to decide on."""
        rows = []
        for each in self.options:
            verdict = each.verdict
            rows.append(
                (
                    each.dtype,
                    f"{each.speedup:.2f}x" + ("" if each.measured else " *"),
                    _percent(verdict.agreement),
                    _percent(verdict.accuracy),
                    f"{verdict.damage:.4f}",
                    None if verdict.psnr is None else f"{verdict.psnr:.1f} dB",
                    str(sum(r.family == "narrow" for r in each.state.values())),
                    str(sum(r.family == "identity" for r in each.state.values())),
                    "chosen" if self.chosen is not None and _same(each, self.chosen) else "",
                )
            )
        columns = (
            "dtype", "speedup", "agreement", "accuracy", "damage", "PSNR", "narrowed", "dropped",
            "",
        )  # fmt: skip
        note = "On inputs that nothing was fitted on. * predicted from kernels' times."
        return [make_table("Frontier", columns, rows, note=note), *self._summary()]

    def _summary(self) -> list[Table]:
        if self.chosen is None:
            return []
        verdict = self.chosen.verdict
        rows = [
            ("asked for", self.asked),
            ("speedup, measured", f"{self.chosen.speedup:.2f}x"),
            ("computes in", self.chosen.dtype),
            ("judged by", _judged_by(self.settings["judged_by"])),
        ]
        if verdict.agreement is not None:
            rows.append(("agreement, held back", f"{100 * verdict.agreement:.1f} %"))
        if verdict.worst_agreement is not None:
            rows.append(("of the worst class", f"{100 * verdict.worst_agreement:.1f} %"))
        if verdict.psnr is not None:
            rows.append(("PSNR, held back", f"{verdict.psnr:.1f} dB"))
        rows.append(("largest error, of scale", f"{verdict.max_error:.3g}"))
        rows += [(f"seconds: {name}", f"{value:.0f}") for name, value in self.seconds.items()]
        return [make_table("Result", ("", ""), rows)]

    def picture(self) -> str:
        """The frontier as an SVG: latency share against agreement (or damage)."""
        return _picture(self.options, self.chosen)


@dataclass(frozen=True)
class AutoResult:
    """A search, and the network that it chose.

    Attributes:
        found: the search.
        result: what `optimize` made of its plan.
        final: the written network against the model, on the held-back inputs; by then those were
            fitted on, too. Where it was trained, on inputs that were reserved for that.
    """

    found: Found
    result: Result
    final: Verdict

    def to_json(self) -> dict[str, Any]:
        """The JSON document of `auto --json`."""
        return {**self.found.to_json(), "final": self.final.to_json()}


def _picture(options: Sequence[Option], chosen: Option | None) -> str:
    is_classifier = options[0].verdict.agreement is not None

    def place(option: Option) -> tuple[float, float]:
        verdict = option.verdict
        height = verdict.agreement if is_classifier else -verdict.damage
        return 1 / option.speedup, height or 0.0

    series = []
    for dtype, name in (("float32", "float"), ("int8", "INT8")):
        points = [place(each) for each in options if each.dtype == dtype]
        if points:
            series.append(Series(name, points, "line"))
    series.append(Series("the model", [place(options[0])], "dot"))
    plain = [each for each in options if each.dtype == "int8" and not each.state]
    if plain:
        series.append(Series("plain INT8", [place(plain[0])], "dot"))
    if chosen is not None:
        series.append(Series("chosen", [place(chosen)], "ring"))
    label = "agreement with the model" if is_classifier else "minus damage"
    return scatter(series, "latency, of the model's", label)


def _judged_by(kinds: Mapping[str, str]) -> str:
    """What was looked at, for people."""
    classes = [name for name, kind in kinds.items() if kind != "values"]
    values = [name for name, kind in kinds.items() if kind == "values"]
    parts = [("classes", classes), ("values", values)]
    return "; ".join(f"{what} of {', '.join(names)}" for what, names in parts if names)


def _same(one: Option, other: Option) -> bool:
    return one.dtype == other.dtype and one.state == other.state


def _percent(value: float | None) -> str | None:
    return None if value is None else f"{100 * value:.1f} %"


def _option_json(option: Option) -> dict[str, Any]:
    found: dict[str, Any] = {
        "dtype": option.dtype,
        "speedup": option.speedup,
        "measured": option.measured,
        **option.verdict.to_json(),
        "predicted_damage": option.predicted_damage,
        "narrowed": sum(each.family == "narrow" for each in option.state.values()),
        "dropped": sum(each.family == "identity" for each in option.state.values()),
    }
    if option.quantize is not None:
        found["quantize"] = option.quantize.model_dump(mode="json", exclude_none=True)
    return found


def find_plan(
    model: Model,
    data: Dataset,
    *,
    speedup: float | None = None,
    min_agreement: float | None = None,
    frontier: bool = False,
    dtype: Dtype = "float32",
    threads: int = 1,
    provider: str = "CPUExecutionProvider",
    families: Sequence[str] = ("narrow", "identity"),
    time_budget: float | None = None,
    progress: Progress | None = None,
) -> Found:
    """Find a network that is as fast, or as good, as asked, and the plan that states it.

    Args:
        model: the model; it is not modified.
        data: calibration inputs, labelled or not.
        speedup: over the model as onnxruntime runs it in float.
        min_agreement: share of held-back inputs whose class must stay the same.
        frontier: where neither is given, list what there is, up to four times the speed.
        dtype: what the result computes in; auto takes what is better.
        threads: intra-op threads that latency is measured with.
        provider: execution provider.
        families: what the search may choose: narrow, identity.
        time_budget: seconds that the search may take, for each of float and INT8.
        progress: called with (stage, done, total).

    Raises:
        UsageError: contradictory or missing goals.
        DataError: too little data, or none that fits.
        BudgetError: nothing is as fast, or as good, as asked.
        ModelError, RunError: onnxruntime cannot run or quantize the model.
    """
    goal = _goal(speedup, min_agreement, frontier, dtype)
    explored = Exploration(
        model, data, threads=threads, provider=provider, families=families, progress=progress
    )
    return _Run(explored, goal, time_budget).find(dtype)


def auto(
    model: Model,
    data: Dataset,
    *,
    speedup: float | None = None,
    min_agreement: float | None = None,
    dtype: Dtype = "float32",
    threads: int = 1,
    provider: str = "CPUExecutionProvider",
    families: Sequence[str] = ("narrow", "identity"),
    time_budget: float | None = None,
    distill: float | None = None,
    progress: Progress | None = None,
) -> AutoResult:
    """Find a network that is as fast, or as good, as asked, build and verify it.

    Arguments and errors are those of `find_plan`; `distill` is the minutes that the built network
    is trained by the model's own answers, see `graphfold.calibration.repair`.
    """
    goal = _goal(speedup, min_agreement, False, dtype)
    explored = Exploration(
        model,
        data,
        threads=threads,
        provider=provider,
        families=families,
        for_repair=distill is not None,
        progress=progress,
    )
    run = _Run(explored, goal, time_budget)
    return run.built(run.find(dtype), distill)


def _goal(speedup: float | None, min_agreement: float | None, frontier: bool, dtype: str) -> _Goal:
    if speedup is not None and min_agreement is not None:
        raise UsageError("--speedup and --min-agreement contradict each other", hint="give one")
    if speedup is None and min_agreement is None and not frontier:
        raise UsageError("how fast, or how good?", hint="one of --speedup X and --min-agreement A")
    if speedup is not None and speedup <= 1:
        raise UsageError(f"a speedup of {speedup:g} is none", hint="more than 1, for example 1.3")
    if min_agreement is not None and not 0 < min_agreement <= 1:
        raise UsageError("an agreement is a share above 0 and at most 1", hint="for example 0.95")
    if dtype not in ("float32", "int8", "auto"):
        raise UsageError(f"--dtype {dtype!r} is not known", hint="float32, int8 or auto")
    return _Goal(speedup, min_agreement)


@dataclass(frozen=True)
class _Goal:
    """What was asked for: one of the two, or only what there is."""

    speedup: float | None
    min_agreement: float | None

    def __str__(self) -> str:
        if self.speedup is not None:
            return f"{self.speedup:g} times as fast"
        if self.min_agreement is None:
            return "the frontier"
        return f"at least {100 * (self.min_agreement or 0):g} % agreement"

    def is_met(self, option: Option) -> bool:
        """Whether an option is good and fast enough."""
        if self.speedup is not None:
            return option.measured and option.speedup >= self.speedup
        verdict = option.verdict
        if self.min_agreement is None:
            is_useful = verdict.agreement is None or verdict.agreement > _USELESS
            return is_useful and (verdict.psnr is None or verdict.damage < _USELESS)
        return (verdict.agreement or 0.0) >= self.min_agreement

    def best(self, options: Sequence[Option]) -> Option | None:
        """The least damaged that is fast enough; the fastest that is good enough."""
        met = [each for each in options if each.measured and self.is_met(each)]
        if not met:
            return None
        if self.speedup is not None:
            # Never less agreement than INT8 alone has, where that is fast enough.
            plain = [each for each in met if each.dtype == "int8" and not each.state]
            floor = max((each.verdict.agreement or 0.0 for each in plain), default=0.0)
            enough = [each for each in met if (each.verdict.agreement or 0.0) >= floor]
            return min(enough, key=lambda each: (each.verdict.damage, -each.speedup))
        return max(met, key=lambda each: each.speedup)


class _Run:
    """One run of `auto`."""

    def __init__(self, exploration: Exploration, goal: _Goal, time_budget: float | None) -> None:
        self._exploration = exploration
        self._goal = goal
        self._time_budget = time_budget
        self._warnings: list[str] = []

    def find(self, dtype: Dtype) -> Found:
        """The whole run."""
        explored, goal = self._exploration, self._goal
        if goal.min_agreement is not None and not explored.context.judge.is_classifier:
            raise UsageError(
                "the model's outputs are no classes, so there is no agreement",
                hint="--speedup, and look at the PSNR",
            )
        explored.fit()
        can_change = self._look_ahead()
        options = [explored.original()]
        if dtype in ("float32", "auto") and can_change:
            options += self._walked(explored.float_route())[1:]
            explored.stage("searching in float")
        if dtype in ("int8", "auto"):
            options += [each for each in self._in_int8() if each.measured]
            explored.stage("searching in INT8")
        chosen = None
        if goal.speedup is not None or goal.min_agreement is not None:
            wanted = [each for each in options if dtype != "int8" or each.dtype == "int8"]
            chosen = goal.best(wanted)
            if chosen is None:
                hint = "; ".join([_hint(goal, options), *self._warnings])
                raise BudgetError(f"no network that was found is {goal}", hint=hint)
        return Found(
            None if chosen is None else plan_of(chosen, explored.model),
            chosen,
            tuple(options),
            str(goal),
            explored.settings,
            explored.seconds,
            tuple(self._warnings),
        )

    def _look_ahead(self) -> bool:
        """Warn of what makes a frontier poor, or says little; whether anything can be changed."""
        explored = self._exploration
        obstacle = explored.obstacle()
        if obstacle is not None:
            self._warnings.append(f"nothing in the model can be narrowed or dropped: {obstacle}")
        judge = explored.context.judge
        if judge.is_classifier and all(len(set(row)) == 1 for row in judge.wanted):
            self._warnings.append(
                "the model finds the same class in all held-back inputs, so agreement says little: "
                "look at the damage, or give data of several classes"
            )
        return obstacle is None

    def _in_int8(self) -> list[Option]:
        try:
            route = self._exploration.int8_route(time_budget=self._time_budget)
        except ModelError as error:
            self._warnings.append(f"no INT8: the model {error.what}")
            return []
        options = self._walked(route)
        plain = self._exploration.plain_int8
        return options if plain is None or plain in options else [plain, *options]

    def _walked(self, route: Route) -> list[Option]:
        goal = self._goal
        deadline = None if self._time_budget is None else time.monotonic() + self._time_budget
        if goal.speedup is not None:
            route.reach(goal.speedup, deadline)
        else:
            route.walk_while(goal.is_met, _LARGEST_SPEEDUP, deadline)
        if deadline is not None and time.monotonic() > deadline:
            self._warnings.append("the time budget ended a search before its goal")
        return route.options

    def built(self, found: Found, distill: float | None) -> AutoResult:
        """The chosen network, made by `optimize` from its plan and the inputs."""
        import graphfold

        explored = self._exploration
        explored.progress("building the network", 0, 0)
        result = graphfold.optimize(
            explored.model,
            found.plan,
            data=explored.feeds,
            distill=distill,
            progress=explored.progress,
        )
        final = explored.judged_at_last(to_proto(result.folded))
        explored.stage("building and verifying")
        return AutoResult(found, result, final)


def _hint(goal: _Goal, options: Sequence[Option]) -> str:
    measured = [each for each in options if each.measured]
    if goal.speedup is not None:
        best = max(measured, key=lambda each: each.speedup)
        return f"the fastest that was measured is {best.speedup:.2f} times as fast"
    good = max(options, key=lambda each: each.verdict.agreement or 0.0)
    return f"the best has {100 * (good.verdict.agreement or 0):.1f} %"

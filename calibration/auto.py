"""Everything in one run: what is fastest at how much damage, on this device, with these inputs.

The model is folded losslessly, inner channels and blocks are fitted on most of the calibration
inputs, and from there the search walks towards faster networks (`graphfold.calibration.context`),
in float and, where it is asked for, with the latencies that the network has in INT8. What is left
of the inputs judges every step. The network that is chosen is built once more by `optimize`, from
the plan that says what it is, with all inputs: so the plan file alone makes it again.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import onnx

from graphfold.calibration.capture import run_part
from graphfold.calibration.choosing import QuantizationChoice, choose_quantization
from graphfold.calibration.context import Context, Point, Search
from graphfold.calibration.judge import Verdict
from graphfold.calibration.latency import compare
from graphfold.calibration.nodetimes import NodeTimes, measure_nodes
from graphfold.calibration.planned import scheme_of
from graphfold.calibration.planning import with_version
from graphfold.calibration.quantize import Quantizer, roughly_quantized
from graphfold.calibration.split import at_most, one_sample, read_split, samples_of
from graphfold.calibration.workbench import Key, Replacement, State, Workbench, names_of
from graphfold.errors import BudgetError, ModelError, UsageError
from graphfold.model import adopt, digest, to_proto
from graphfold.plan import ModelReference, Plan, Quantize, read_plan
from graphfold.plot import Series, scatter
from graphfold.tables import Table, make_table

if TYPE_CHECKING:
    from graphfold.calibration.dataset import Dataset
    from graphfold.model import Model
    from graphfold.optimizer import Result

Progress = Callable[[str, int, int], None]
Dtype = Literal["float32", "int8", "auto"]

_MEASURE_SECONDS = 4.0
_QUANTIZED_ON = 128
# A network found in context is measured whole; so often the walk goes on where it is too slow.
_MOST_CORRECTIONS = 4
_LARGEST_SPEEDUP = 4.0


@dataclass(frozen=True)
class Option:
    """One network of the frontier.

    Attributes:
        dtype: what it computes in.
        state: its replacements.
        speedup: over the model as onnxruntime runs it in float; predicted, measured if known.
        verdict: against the model, on inputs that were not fitted on.
        predicted_damage: what the step before it summed up to.
        quantize: how it is quantized, for INT8.
        measured: whether `speedup` was measured.
    """

    dtype: str
    state: State
    speedup: float
    verdict: Verdict
    predicted_damage: float | None = None
    quantize: Quantize | None = None
    measured: bool = False


@dataclass(frozen=True)
class AutoResult:
    """What a run found.

    Attributes:
        plan: the chosen network's.
        result: what `optimize` made of it.
        chosen: the chosen option, its speedup measured.
        final: against the model on the held-back inputs, as it was written; by then those
            were fitted on, too.
        options: everything on the way, float first, the model itself the first.
        asked: for people.
        settings: device, threads, data.
        seconds: per stage.
        warnings: for the user.
    """

    plan: Plan
    result: Result
    chosen: Option
    final: Verdict
    options: tuple[Option, ...]
    asked: str
    settings: Mapping[str, Any]
    seconds: Mapping[str, float]
    warnings: tuple[str, ...] = field(default=())

    def to_json(self) -> dict[str, Any]:
        """The JSON document of `auto --json`."""
        return {
            "asked": self.asked,
            "plan": json.loads(self.plan_text()),
            "chosen": _option_json(self.chosen),
            "final": self.final.to_json(),
            "frontier": [_option_json(each) for each in self.options],
            "settings": dict(self.settings),
            "seconds": dict(self.seconds),
            "warnings": list(self.warnings),
        }

    def plan_text(self) -> str:
        """The plan file's content."""
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
                    "chosen" if _same(each, self.chosen) else "",
                )
            )
        columns = (
            "dtype", "speedup", "agreement", "accuracy", "damage", "PSNR", "narrowed", "dropped",
            "",
        )  # fmt: skip
        note = "On inputs that nothing was fitted on. * predicted from kernels' times."
        frontier = make_table("Frontier", columns, rows, note=note)
        summary = make_table("Result", ("", ""), list(self._summary()))
        return [frontier, summary]

    def _summary(self) -> Sequence[tuple[str, str]]:
        verdict = self.chosen.verdict
        rows = [
            ("asked for", self.asked),
            ("speedup, measured", f"{self.chosen.speedup:.2f}x"),
            ("computes in", self.chosen.dtype),
        ]
        if verdict.agreement is not None:
            rows.append(("agreement, held back", f"{100 * verdict.agreement:.1f} %"))
        if verdict.worst_agreement is not None:
            rows.append(("of the worst class", f"{100 * verdict.worst_agreement:.1f} %"))
        if verdict.psnr is not None:
            rows.append(("PSNR, held back", f"{verdict.psnr:.1f} dB"))
        rows.append(("largest error, of scale", f"{verdict.max_error:.3g}"))
        rows += [(f"seconds: {name}", f"{value:.0f}") for name, value in self.seconds.items()]
        return rows

    def picture(self) -> str:
        """The frontier as an SVG: latency share against agreement (or damage)."""
        return _picture(self.options, self.chosen)


def _picture(options: Sequence[Option], chosen: Option) -> str:
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
    series.append(Series("chosen", [place(chosen)], "ring"))
    label = "agreement with the model" if is_classifier else "minus damage"
    return scatter(series, "latency, of the model's", label)


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
    progress: Progress | None = None,
) -> AutoResult:
    """Find, build and verify a network that is as fast, or as good, as asked.

    Args:
        model: the model; it is not modified.
        data: calibration inputs, labelled or not.
        speedup: over the model as onnxruntime runs it in float.
        min_agreement: share of held-back inputs whose class must stay the same.
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
    _check(speedup, min_agreement, dtype)
    run = _Run(model, data, threads, provider, families, time_budget, progress or _no_progress)
    goal = _Goal(speedup, min_agreement)
    return run.find(goal, dtype)


def _no_progress(stage: str, done: int, total: int) -> None:
    del stage, done, total


def _check(speedup: float | None, min_agreement: float | None, dtype: str) -> None:
    if (speedup is None) == (min_agreement is None):
        raise UsageError("how fast, or how good?", hint="one of --speedup X and --min-agreement A")
    if speedup is not None and speedup <= 1:
        raise UsageError(f"a speedup of {speedup:g} is none", hint="more than 1, for example 1.3")
    if min_agreement is not None and not 0 < min_agreement <= 1:
        raise UsageError("an agreement is a share above 0 and at most 1", hint="for example 0.95")
    if dtype not in ("float32", "int8", "auto"):
        raise UsageError(f"--dtype {dtype!r} is not known", hint="float32, int8 or auto")


@dataclass(frozen=True)
class _Goal:
    """What was asked for: one of the two."""

    speedup: float | None
    min_agreement: float | None

    def __str__(self) -> str:
        if self.speedup is not None:
            return f"{self.speedup:g} times as fast"
        return f"at least {100 * (self.min_agreement or 0):g} % agreement"

    def is_met(self, option: Option) -> bool:
        """Whether an option is good and fast enough."""
        if self.speedup is not None:
            return option.speedup >= self.speedup
        return (option.verdict.agreement or 0.0) >= (self.min_agreement or 0.0)

    def best(self, options: Sequence[Option]) -> Option | None:
        """The least damaged that is fast enough; the fastest that is good enough."""
        met = [each for each in options if self.is_met(each)]
        if not met:
            return None
        if self.speedup is not None:
            return min(met, key=lambda each: (each.verdict.damage, -each.speedup))
        return max(met, key=lambda each: each.speedup)


class _Run:
    """One run: inputs, workbench, and what was measured."""

    def __init__(
        self,
        model: Model,
        data: Dataset,
        threads: int,
        provider: str,
        families: Sequence[str],
        time_budget: float | None,
        progress: Progress,
    ) -> None:
        from graphfold.optimizer import optimize_model

        self.model = model
        self.threads = threads
        self.provider = provider
        self.families = families
        self.time_budget = time_budget
        self.progress = progress
        self.seconds: dict[str, float] = {}
        self.warnings: list[str] = []
        self._clock = time.monotonic()
        progress("reading data", 0, 0)
        split = read_split(data)
        self.feeds, self.fitted_on, self.held = split.feeds, split.fitted, split.held
        progress("folding", 0, 0)
        self.folded = optimize_model(model, None, verify=False).folded
        self.bench = Workbench(self.folded, names_of(model))
        self.context = Context(self.bench, self.held, split.labels)
        self.timed = one_sample(self.feeds[0], model)
        self.settings = {
            "threads": threads,
            "provider": provider,
            "samples": sum(map(samples_of, self.feeds)),
            "judged_on": sum(map(samples_of, self.held)),
            "data": data.name,
        }
        self._stage("reading and folding")

    def _stage(self, name: str) -> None:
        now = time.monotonic()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._clock
        self._clock = now

    def find(self, goal: _Goal, dtype: Dtype) -> AutoResult:
        """The whole run."""
        if goal.min_agreement is not None and not self.context.judge.is_classifier:
            raise UsageError(
                "the model's outputs are no classes, so there is no agreement",
                hint="--speedup, and look at the PSNR",
            )
        self._fit()
        original = Option("float32", {}, 1.0, self.context.verdict({}), measured=True)
        options = [original]
        if dtype in ("float32", "auto"):
            options += self._float_options(goal)
        if dtype in ("int8", "auto"):
            options += self._int8_options(goal)
        candidates = options if dtype != "int8" else [o for o in options if o.dtype == "int8"]
        chosen = goal.best(candidates)
        if chosen is None:
            raise BudgetError(
                f"no network that was found is {goal}",
                hint=_best_hint(goal, options),
            )
        return self._finish(goal, chosen, options)

    def _fit(self) -> None:
        self.bench.collect(self.fitted_on, progress=self.progress)
        self.bench.prepare(self.progress)
        self._stage("fitting")

    # Float ----------------------------------------------------------------------------------

    def _float_options(self, goal: _Goal) -> list[Option]:
        times = self._times(None)
        search = Search(self.context, times, self.families)
        found = self._walk(search, goal, 1.0, lambda point: self._as_float(point))
        self._stage("searching in float")
        return found

    def _as_float(self, point: Point) -> Option:
        return Option("float32", point.state, point.speedup, point.verdict, point.predicted_damage)

    def _times(self, convert: Callable[[onnx.ModelProto], onnx.ModelProto] | None) -> NodeTimes:
        return measure_nodes(
            self.bench,
            self.timed,
            threads=self.threads,
            provider=self.provider,
            convert=convert,
            progress=self.progress,
        )

    def _walk(
        self, search: Search, goal: _Goal, start: float, option: Callable[[Point], Option]
    ) -> list[Option]:
        """Steps until the goal is met (or missed), the last one measured and corrected.

        `start` is the speedup of the walk's own beginning over the model.
        """
        found: list[Option] = []
        wanted = (goal.speedup or _LARGEST_SPEEDUP) / start
        deadline = None if self.time_budget is None else time.monotonic() + self.time_budget
        corrections = 0
        while True:
            if deadline is not None and time.monotonic() > deadline:
                self.warnings.append("the time budget ended the search before its goal")
                break
            if search.present.speedup >= wanted * (1 - 1e-9):
                measured = self._measured(found[-1]) if found else None
                if measured is None or goal.speedup is None:
                    break
                found[-1] = measured
                if measured.speedup >= goal.speedup or corrections == _MOST_CORRECTIONS:
                    break
                # As much further as is missing, as predicted and measured speedups go.
                corrections += 1
                wanted *= min(1.1, goal.speedup / measured.speedup * 1.005)
            if not search.step(search.times.whole / wanted, self.progress):
                break
            found.append(option(search.present))
            if goal.min_agreement is not None and not goal.is_met(found[-1]):
                break
        if goal.speedup is not None:
            self._step_back(found, goal.speedup)
        if goal.min_agreement is not None:
            # From here to the best that is good enough, measured.
            found = [self._measured(each) if goal.is_met(each) else each for each in found]
        return found

    def _step_back(self, found: list[Option], speedup: float) -> None:
        """Measure what comes before the first that is fast enough: kernels alone may mislead."""
        for number in range(len(found) - 1, 0, -1):
            if not (found[number].measured and found[number].speedup >= speedup):
                return
            found[number - 1] = self._measured(found[number - 1])

    # INT8 -----------------------------------------------------------------------------------

    def _int8_options(self, goal: _Goal) -> list[Option]:
        try:
            plain = self._quantized({}, None)
        except ModelError as error:
            self.warnings.append(f"no INT8: the model {error.what}")
            return []
        found = [self._measured(plain)]
        if goal.speedup is not None and found[0].speedup >= goal.speedup:
            self._stage("INT8")
            return found
        times = self._times(self._roughly)
        search = Search(self.context, times, self.families)
        start = found[0].speedup
        scheme = plain.quantize

        def option(point: Point) -> Option:
            quantized = self._quantized(point.state, scheme)
            return Option(
                "int8",
                point.state,
                start * point.speedup,
                quantized.verdict,
                point.predicted_damage,
                scheme,
            )

        if goal.min_agreement is None or goal.is_met(found[0]):
            found += self._walk(search, goal, start, option)
        self._stage("INT8")
        return found

    def _roughly(self, proto: onnx.ModelProto) -> onnx.ModelProto:
        return to_proto(roughly_quantized(adopt(proto, check=False), self.timed))

    def _quantized(self, state: State, settings: Quantize | None) -> Option:
        """A network in INT8, judged against the model; its speedup still unknown."""
        folded = adopt(self.bench.build(state), check=False)
        sizes = [samples_of(feed) for feed in self.fitted_on]
        feeds = at_most(self.fitted_on, sizes, _QUANTIZED_ON)
        if settings is None:
            self.progress("choosing how to quantize", 0, 0)
            choice = choose_quantization(
                folded, feeds, self.held, progress=self.progress, time_budget=self.time_budget
            )
            settings, network = _settings(choice), choice.model
        else:
            self.progress("quantizing", 0, 0)
            quantizer = Quantizer(folded, feeds, [settings.calibration])
            network = quantizer.quantized(scheme_of(settings))
        verdict = self._judge(to_proto(network))
        return Option("int8", state, 1.0, verdict, quantize=settings)

    def _judge(self, proto: onnx.ModelProto) -> Verdict:
        run = run_part(proto, 0)
        return self.context.judge.verdict([run(feed) for feed in self.held])

    # Measuring, and the end -----------------------------------------------------------------

    def _measured(self, option: Option) -> Option:
        """The option with its measured speedup over the model."""
        self.progress("measuring speedup", 0, 0)
        proto = self.bench.build(option.state)
        if option.quantize is not None:
            proto = self._quantized_for_timing(proto, option.quantize)
        found = compare(
            [self.model, proto.SerializeToString()],
            names=["model", "candidate"],
            inputs=[self.timed],
            threads=self.threads,
            provider=self.provider,
            seconds=_MEASURE_SECONDS,
        )
        return Option(
            option.dtype,
            option.state,
            found.models[1].speedup,
            option.verdict,
            option.predicted_damage,
            option.quantize,
            measured=True,
        )

    def _quantized_for_timing(self, proto: onnx.ModelProto, settings: Quantize) -> onnx.ModelProto:
        """With the ranges of one feed: latency does not depend on them."""
        quantizer = Quantizer(adopt(proto, check=False), [self.timed], ["minmax"])
        quick = settings.model_copy(update={"calibration": "minmax", "percentile": None})
        return to_proto(quantizer.quantized(scheme_of(quick)))

    def _finish(self, goal: _Goal, chosen: Option, options: Sequence[Option]) -> AutoResult:
        import graphfold

        if not chosen.measured:
            measured = self._measured(chosen)
            options = [measured if each is chosen else each for each in options]
            chosen = measured
        plan = plan_of(chosen, self.model)
        self.progress("building the network", 0, 0)
        result = graphfold.optimize(self.model, plan, data=self.feeds, progress=self.progress)
        final = self._judge(to_proto(result.folded))
        self._stage("building and verifying")
        return AutoResult(
            plan,
            result,
            chosen,
            final,
            tuple(options),
            str(goal),
            self.settings,
            self.seconds,
            tuple(self.warnings),
        )


def plan_of(option: Option, model: Model) -> Plan:
    """The plan that states a network."""
    segments = [_segment(key, each) for key, each in option.state.items()]
    data: dict[str, Any] = {
        "graphfold_plan": 1,
        "model": {
            "name": None if model.path is None else model.path.name,
            "sha256": digest(model.path if model.path is not None else model),
        },
        "segments": segments,
        "objective": {
            "speedup": option.speedup,
            **{f"held_back_{name}": value for name, value in option.verdict.to_json().items()},
        },
    }
    if option.quantize is not None:
        data["quantize"] = option.quantize.model_dump(mode="json", exclude_none=True)
    data["model"] = ModelReference(**data["model"]).model_dump(exclude_none=True)
    return read_plan(data)


def _segment(key: Key, replacement: Replacement) -> dict[str, Any]:
    found: dict[str, Any] = {"input": key[0], "output": key[1], "family": replacement.family}
    if replacement.family != "identity":
        found["weights"] = "regress"
    if replacement.width is not None:
        found["width"] = replacement.width
    if replacement.kernel is not None:
        found["kernel"] = list(replacement.kernel)
    if replacement.rank is not None:
        found["rank"] = replacement.rank
    return found


def _settings(choice: QuantizationChoice) -> Quantize:
    return choice.settings


def _best_hint(goal: _Goal, options: Sequence[Option]) -> str:
    if goal.speedup is not None:
        best = max(options, key=lambda each: each.speedup)
        return f"the fastest is {best.speedup:.2f} times as fast"
    good = max(options, key=lambda each: each.verdict.agreement or 0.0)
    return f"the best has {100 * (good.verdict.agreement or 0):.1f} %"

"""One model, one device, some inputs: faster networks on request, each measured and judged.

The inputs are split: most are fitted on, every fifth batch is held back and judges. Routes lead
from the model to ever faster networks, in float or in INT8; the further end of a route is walked
only when something faster is asked for.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx

from graphfold.calibration.capture import run_part
from graphfold.calibration.choosing import QuantizationChoice, choose_quantization, settings_of
from graphfold.calibration.context import Context, smallest_drops
from graphfold.calibration.judge import Judge, Verdict
from graphfold.calibration.latency import compare
from graphfold.calibration.nodetimes import NodeTimes, measure_nodes
from graphfold.calibration.places import Key
from graphfold.calibration.planned import quantized_as
from graphfold.calibration.split import (
    at_most,
    one_sample,
    portions_of,
    read_split,
    samples_of,
)
from graphfold.calibration.walk import Point, Search
from graphfold.calibration.workbench import Replacement, State, Workbench, names_of
from graphfold.candidates import find_candidates
from graphfold.model import adopt, digest, to_proto
from graphfold.plan import ModelReference, Plan, Quantize, read_plan
from graphfold.progress import Progress, no_progress
from graphfold.reasons import why_nothing_goes

if TYPE_CHECKING:
    from graphfold.calibration.dataset import Dataset
    from graphfold.model import Model


_MEASURE_SECONDS = 4.0
_QUANTIZED_ON = 128
# Of what was asked for: the least by which the next try goes further.
_FURTHER = 1.005
# More than this beyond what was asked is worth another try: it is paid for in agreement.
_NEAR = 1.01
# Damage for all of the latency, at the rate of first steps that are cheap.
_FIRST_PRICE = 0.2
# Networks of a frontier that are measured, the furthest among them.
_MOST_MEASURED = 6


@dataclass(frozen=True)
class Option:
    """One network of the frontier.

    Attributes:
        dtype: what it computes in.
        state: its replacements.
        speedup: over the model as onnxruntime runs it in float; predicted, measured if known.
        verdict: against the model, on inputs that were not fitted on; of a network for INT8 that
            was not measured yet, in float.
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


class Exploration:
    """A model on this device, and what may take its place.

    Args:
        model: not modified.
        data: calibration inputs, labelled or not.
        threads: intra-op threads that latency is measured with.
        provider: execution provider.
        families: what may be chosen: narrow, identity.
        for_repair: reserve inputs that neither fits nor searches see, for `repair` to judge on.
        progress: called with (stage, done, total).

    Attributes:
        feeds: all inputs.
        held: those that judge.
        reserved: those that are kept for repair; none, where none were asked for or to spare.
        bench, context: of `graphfold.calibration`.
        seconds: per stage.
        plain_int8: the model in INT8 with nothing left in float, by the best calibration; None
            until it was asked for a route in INT8.

    Raises:
        DataError: too little data, too much, or none that fits.
        RunError: onnxruntime cannot run the model.
    """

    def __init__(
        self,
        model: Model,
        data: Dataset,
        *,
        threads: int = 1,
        provider: str = "CPUExecutionProvider",
        families: Sequence[str] = ("narrow", "identity"),
        for_repair: bool = False,
        progress: Progress | None = None,
    ) -> None:
        from graphfold.optimizer import optimize_model

        self.model = model
        self.threads = threads
        self.provider = provider
        self.families = families
        self.progress = progress or no_progress
        self.seconds: dict[str, float] = {}
        self.plain_int8: Option | None = None
        self._nothing_in_float: Quantize | None = None
        self._clock = time.monotonic()
        self.progress("reading data", 0, 0)
        split = read_split(data, portions_of(model, data), for_repair=for_repair)
        self.feeds, self.fitted_on, self.held = split.feeds, split.fitted, split.held
        self.reserved = split.reserved
        self.progress("folding", 0, 0)
        self.folded = optimize_model(model, None, verify=False).folded
        self.bench = Workbench(self.folded, names_of(model))
        self.context = Context(self.bench, self.held, split.labels)
        self.timed = one_sample(self.feeds[0], model)
        self.settings = {
            "threads": threads,
            "provider": provider,
            "samples": sum(map(samples_of, self.feeds)),
            "judged_on": sum(map(samples_of, self.held)),
            "judged_by": dict(self.context.judge.kinds),
            "data": data.name,
        }
        self.stage("reading and folding")

    def stage(self, name: str) -> None:
        """The time since the last stage ended belongs to this one."""
        now = time.monotonic()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._clock
        self._clock = now

    def fit(self, *, everything: bool = False) -> None:
        """Fit all places on the inputs that are not held back, or on all but the reserved."""
        reserved = {id(feed) for feed in self.reserved}
        unreserved = [feed for feed in self.feeds if id(feed) not in reserved]
        feeds = unreserved if everything else self.fitted_on
        self.bench.forget()
        self.bench.collect(feeds, progress=self.progress)
        self.bench.prepare(self.progress)
        self.stage("fitting")

    def obstacle(self) -> str | None:
        """Why nothing can be narrowed or dropped, after fitting; None where something can."""
        bench = self.bench
        narrows = "narrow" in self.families and any(map(bench.has_moments, bench.inner))
        if narrows or ("identity" in self.families and smallest_drops(bench)):
            return None
        return why_nothing_goes(find_candidates(bench.graph))

    def original(self) -> Option:
        """The model as it is."""
        return Option("float32", {}, 1.0, self.context.verdict({}), measured=True)

    def float_route(self) -> Route:
        """From the model to faster networks in float."""
        search = Search(self.context, self._times(None), self.families)

        def option(point: Point) -> Option:
            found = Option("float32", point.state, point.speedup, point.verdict)
            return replace(found, predicted_damage=point.predicted_damage)

        return Route(self, search, self.original(), option)

    def int8_route(self, *, time_budget: float | None = None) -> Route:
        """From the model in INT8, as well quantized as is found, to faster networks in INT8.

        Raises:
            ModelError: the model cannot be quantized.
        """
        plain = self.with_speedup(self.quantized({}, None, time_budget))
        if self._nothing_in_float != plain.quantize:
            self.plain_int8 = self.with_speedup(self.quantized({}, self._nothing_in_float))
        else:
            self.plain_int8 = plain
        start = self._cheaper(plain)
        settings = start.quantize
        assert settings is not None
        times = self._times(lambda proto: self._quantized_for_timing(proto, settings))
        search = Search(self.context, times, self.families)

        def option(point: Point) -> Option:
            found = Option("int8", point.state, start.speedup * point.speedup, point.verdict)
            return replace(found, predicted_damage=point.predicted_damage, quantize=settings)

        route = Route(self, search, start, option)
        if start is not plain:
            route.options.insert(0, plain)
        return route

    def _cheaper(self, option: Option) -> Option:
        """The network in INT8 without what costs more in float than a first step would win.

        What was left in float last saves least, and may be in the way of every network to come.
        """
        settings = option.quantize
        assert settings is not None
        for left in range(len(settings.keep_float) - 2, -2, -2):
            kept = settings.keep_float[: max(0, left)]
            fewer = settings.model_copy(update={"keep_float": kept})
            found = self.with_speedup(self.quantized(option.state, fewer))
            saved = 1 / option.speedup - 1 / found.speedup
            added = found.verdict.damage - option.verdict.damage
            if saved <= 0 or added > _FIRST_PRICE * saved * option.speedup:
                break
            option = found
        return option

    def _times(self, convert: Callable[[onnx.ModelProto], onnx.ModelProto] | None) -> NodeTimes:
        return measure_nodes(
            self.bench,
            self.timed,
            threads=self.threads,
            provider=self.provider,
            convert=convert,
            progress=self.progress,
        )

    def quantized(
        self, state: State, settings: Quantize | None, time_budget: float | None = None
    ) -> Option:
        """A network in INT8, judged against the model; its speedup still unknown.

        Args:
            state: its replacements.
            settings: how to quantize; None finds out by measuring.
            time_budget: seconds for that.
        """
        folded = adopt(self.bench.build(state), check=False)
        feeds = at_most(self.fitted_on, map(samples_of, self.fitted_on), _QUANTIZED_ON)
        if settings is None:
            self.progress("choosing how to quantize", 0, 0)
            choice: QuantizationChoice = choose_quantization(
                folded, feeds, self.held, progress=self.progress, time_budget=time_budget
            )
            settings, network = choice.settings, choice.model
            self._nothing_in_float = settings_of(choice.plain.scheme)
        else:
            self.progress("quantizing", 0, 0)
            settings = _still_there(settings, folded)
            network = quantized_as(folded, feeds, settings)
        return Option("int8", state, 1.0, self.judged(to_proto(network)), quantize=settings)

    def judged(self, proto: onnx.ModelProto) -> Verdict:
        """Any network against the model, on the inputs that are held back."""
        run = run_part(proto, 0)
        return self.context.judge.verdict([run(feed) for feed in self.held])

    def judged_at_last(self, proto: onnx.ModelProto) -> Verdict:
        """A finished network, on what was reserved, where something was."""
        if not self.reserved:
            return self.judged(proto)
        original, run = run_part(to_proto(self.model), 0), run_part(proto, 0)
        judge = Judge([original(feed) for feed in self.reserved])
        return judge.verdict([run(feed) for feed in self.reserved])

    def measured(self, option: Option) -> Option:
        """The option with its speedup over the model measured, in INT8 judged as such, too.

        Quantizing looks at many inputs, so on the way a network is judged in float.
        """
        if option.quantize is not None and not option.measured:
            option = replace(
                self.quantized(option.state, option.quantize),
                predicted_damage=option.predicted_damage,
                speedup=option.speedup,
            )
        return self.with_speedup(option)

    def with_speedup(self, option: Option) -> Option:
        """The option, judged already, with its speedup over the model measured."""
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
        return replace(option, speedup=found.models[1].speedup, measured=True)

    def _quantized_for_timing(self, proto: onnx.ModelProto, settings: Quantize) -> onnx.ModelProto:
        """With the ranges of one feed: latency depends neither on them nor on channels' scales."""
        plain = {"calibration": "minmax", "percentile": None, "equalise": False}
        network = adopt(proto, check=False)
        quick = _still_there(settings, network).model_copy(update=plain)
        return to_proto(quantized_as(network, [self.timed], quick))


def _still_there(settings: Quantize, network: Model) -> Quantize:
    """The settings without tensors to keep in float that are gone with a segment."""
    made = {value.name for node in network.ir.graph for value in node.outputs}
    kept = [name for name in settings.keep_float if name in made]
    return settings.model_copy(update={"keep_float": kept})


class Route:
    """A walk that goes on when something faster is asked for.

    Args:
        exploration: what networks are measured with.
        search: where the walk is.
        start: its beginning, measured.
        option: what a point of the walk is.

    Attributes:
        options: all that was found, the beginning first.
    """

    def __init__(
        self,
        exploration: Exploration,
        search: Search,
        start: Option,
        option: Callable[[Point], Option],
    ) -> None:
        self._exploration = exploration
        self._search = search
        self._start = start.speedup
        self._option = option
        # Measured over predicted speedup, as it was last seen.
        self._factor = 1.0
        self.options = [start]

    def reach(self, speedup: float, deadline: float | None = None) -> Option | None:
        """The first option that is measured to be as fast; None where the walk ends before.

        Args:
            speedup: over the model in float.
            deadline: of `time.monotonic()`; the walk ends there.
        """
        tried, may_return = 0.0, True
        while not self._first(speedup):
            if deadline is not None and time.monotonic() > deadline:
                return None
            wanted = max(speedup / (self._start * self._factor), tried * _FURTHER)
            if self._search.present.speedup < wanted * (1 - 1e-9):
                if not self._step(wanted):
                    return self._last_chance(speedup)
                continue
            tried = self._search.present.speedup
            self._measure(len(self.options) - 1)
            if may_return and self._is_far(speedup):
                # Kernels' times alone led too far; what was just measured says by how much.
                self._search.step_back()
                self.options.pop()
                tried = 0.0
            may_return = False
        self._step_back(speedup)
        return self._first(speedup)

    def _is_far(self, speedup: float) -> bool:
        """Whether the last step, by what was measured, led much further than was asked."""
        points = self._search.points
        wanted = speedup / (self._start * self._factor)
        return (
            self.options[-1].speedup > _NEAR * speedup
            and len(points) > 1
            and points[-2].speedup < wanted
        )

    def walk_while(
        self, is_good: Callable[[Option], bool], largest: float, deadline: float | None = None
    ) -> None:
        """Go on as long as options are good; the good ones are measured."""
        while is_good(self.options[-1]) and self._search.present.speedup < largest:
            if deadline is not None and time.monotonic() > deadline:
                break
            if not self._step(largest):
                break
        good = [number for number, option in enumerate(self.options) if is_good(option)]
        for place in sorted(set(np.linspace(0, len(good) - 1, _MOST_MEASURED).round().astype(int))):
            self._measure(good[int(place)])

    def _first(self, speedup: float) -> Option | None:
        return next(
            (each for each in self.options if each.measured and each.speedup >= speedup), None
        )

    def _step(self, wanted: float) -> bool:
        search = self._search
        if not search.step(search.times.whole / wanted, self._exploration.progress):
            return False
        self.options.append(self._option(search.present))
        return True

    def _measure(self, number: int) -> None:
        option = self.options[number]
        if not option.measured:
            found = self._exploration.measured(option)
            self._factor *= found.speedup / (option.speedup * self._factor)
            self.options[number] = found

    def _last_chance(self, speedup: float) -> Option | None:
        self._measure(len(self.options) - 1)
        return self._first(speedup)

    def _step_back(self, speedup: float) -> None:
        """Measure what comes before the first that is fast enough: kernels alone may mislead."""
        first = self._first(speedup)
        assert first is not None
        for number in range(self.options.index(first) - 1, 0, -1):
            if self.options[number].measured:
                return
            self._measure(number)
            if self.options[number].speedup < speedup:
                return


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

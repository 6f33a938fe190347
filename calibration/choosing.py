"""How to quantize a network, found out by measuring: which calibration, what to leave in float.

Every scheme is judged by what it does to the outputs on images that were not calibrated on. First
the calibrations are compared; where ranges of channels are far apart, also with these equalised
(`graphfold.calibration.equalise`). Under the best one, runs of neighbouring operators are left in
float in turn, then, where that helps most, single operators and pairs of neighbours (a tensor is in
float only where both who makes and who reads it are). Those that help are kept in float one after
the other, each only if the damage measured with all before it falls by a good part, and
as long as they are few: float operators are what INT8 was to be quicker than.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from graphfold.calibration.equalise import equalise
from graphfold.calibration.judge import Judge, Verdict, outputs_of
from graphfold.calibration.quantize import Quantizer, Scheme
from graphfold.calibration.ranges import Calibration, Feed
from graphfold.cost import analyze
from graphfold.graph import Graph
from graphfold.plan import Quantize
from graphfold.progress import Progress, no_progress
from graphfold.tables import Table, make_table

if TYPE_CHECKING:
    from graphfold.model import Model

PERCENTILES = (99.9, 99.99, 99.999)
DEFAULT_CALIBRATIONS = (
    Calibration("minmax"),
    *(Calibration("percentile", percentile) for percentile in PERCENTILES),
    Calibration("entropy"),
)
# Of the damage without any operator in float: what leaving one more has to save. What it costs is
# not weighed: multiply-adds say too little (a layer of three channels is as quick in float).
_WORTHWHILE = 0.05
# Of the network's multiply-adds: what may stay in float.
DEFAULT_FLOAT_SHARE = 0.1
# Groups whose members are measured one by one and in pairs.
_SPLIT_GROUPS = 2
# These only move codes about: in float or not, they round nothing.
_MOVING = frozenset(
    {
        *("Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Slice", "Split", "Pad"),
        *("Gather", "GatherElements", "MaxPool", "Resize"),
    }
)


@dataclass(frozen=True)
class Trial:
    """A scheme that was measured.

    Attributes:
        scheme: what was quantized how.
        verdict: on the images to judge on.
        float_share: of the multiply-adds, what stays in float.
    """

    scheme: Scheme
    verdict: Verdict
    float_share: float


@dataclass(frozen=True)
class QuantizationChoice:
    """A scheme, and what it was chosen from.

    Attributes:
        model: the network in INT8.
        trial: the scheme that was chosen, and its damage.
        trials: all that was measured, in order.
        images: feeds to judge on.
        complete: whether there was time for everything.
    """

    model: Model
    trial: Trial
    trials: tuple[Trial, ...]
    images: int
    complete: bool

    @property
    def plain(self) -> Trial:
        """The best with nothing left in float."""
        return _least_damaged([trial for trial in self.trials if not trial.scheme.keep_float])

    @property
    def settings(self) -> Quantize:
        """The choice as a plan states it."""
        return settings_of(self.trial.scheme)

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        return {
            "chosen": _trial_json(self.trial),
            "trials": [_trial_json(trial) for trial in self.trials],
            "images": self.images,
            "complete": self.complete,
        }

    def tables(self) -> list[Table]:
        """The calibrations, and what was left in float."""
        rows = [
            (
                str(trial.scheme.calibration) + (", equalised" if trial.scheme.equalise else ""),
                ", ".join(trial.scheme.keep_float) or "none",
                f"{trial.verdict.damage:.4g}",
                _percent(trial.verdict.agreement),
                f"{100 * trial.float_share:.1f} %",
                "chosen" if trial == self.trial else "",
            )
            for trial in self.trials
            if set(trial.scheme.keep_float) <= set(self.trial.scheme.keep_float)
        ]
        columns = ("calibration", "in float", "damage", "agreement", "MACs in float", "")
        note = f"Against the float network, on {self.images} feeds that were not calibrated on."
        return [make_table("INT8", columns, rows, text_columns=2, note=note)]


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"


def settings_of(scheme: Scheme) -> Quantize:
    """A scheme as a plan states it."""
    method = scheme.calibration.method
    return Quantize(
        calibration=method,
        percentile=scheme.calibration.percentile if method == "percentile" else None,
        per_channel=scheme.per_channel,
        equalise=scheme.equalise,
        keep_float=list(scheme.keep_float),
    )


def _least_damaged(trials: Sequence[Trial]) -> Trial:
    """Of trials that agree no less than the best one without any operator in float."""
    floor = _plain_agreement(trials)
    enough = [trial for trial in trials if (trial.verdict.agreement or 0.0) >= floor]
    return min(enough, key=lambda trial: trial.verdict.damage)


def _plain_agreement(trials: Sequence[Trial]) -> float:
    """Of the best without any operator in float; 0 where outputs are no classes."""
    plain = [trial for trial in trials if not trial.scheme.keep_float]
    return max(trial.verdict.agreement or 0.0 for trial in plain)


def _trial_json(trial: Trial) -> dict[str, Any]:
    scheme = trial.scheme
    return {
        "calibration": scheme.calibration.method,
        "percentile": scheme.calibration.percentile,
        "per_channel": scheme.per_channel,
        "equalise": scheme.equalise,
        "keep_float": list(scheme.keep_float),
        "float_share": trial.float_share,
        **trial.verdict.to_json(),
    }


def choose_quantization(
    model: Model,
    calibration_batches: Iterable[Feed],
    judge_batches: Iterable[Feed],
    *,
    calibrations: Sequence[Calibration] = DEFAULT_CALIBRATIONS,
    per_channel: bool = True,
    float_share: float = DEFAULT_FLOAT_SHARE,
    time_budget: float | None = None,
    progress: Progress | None = None,
) -> QuantizationChoice:
    """Find the calibration, and the few operators to leave in float, with the least damage.

    The same images give the same choice, unless the time budget ends the search.

    Args:
        model: the network in float; it is not modified.
        calibration_batches: feeds to calibrate on; held in memory.
        judge_batches: other feeds, to measure damage on; held in memory.
        calibrations: what to try.
        per_channel: a scale per output channel of each weight.
        float_share: of the multiply-adds, how much may stay in float; 0 tries calibrations only.
        time_budget: seconds after calibrating, after which the best found so far is taken.
        progress: called with (stage, done, total).

    Raises:
        ModelError: the network cannot be quantized. DataError: no feeds, or none that fit.
    """
    report = progress or no_progress
    report("calibrating", 0, 0)
    methods = tuple(dict.fromkeys(each.method for each in calibrations))
    calibrated_on = list(calibration_batches)
    quantizer = Quantizer(model, calibrated_on, methods)
    feeds = list(judge_batches)
    search = _Search(quantizer, feeds, float_share, time_budget, report)
    for calibration in calibrations:
        search.measure(Scheme(calibration, per_channel))
    if equalise(quantizer.model).changed and not search.is_late:
        report("calibrating", 0, 0)
        search.equalised = Quantizer(quantizer.model, calibrated_on, methods, equalise=True)
        for calibration in calibrations:
            search.measure(Scheme(calibration, per_channel, equalise=True))
    if float_share > 0:
        search.leave_in_float()
    best, complete = search.settled, not search.is_late
    return QuantizationChoice(
        search.quantized(best.scheme),
        best,
        tuple(search.trials.values()),
        len(feeds),
        complete,
    )


class _Search:
    """Schemes that are measured one after the other."""

    def __init__(
        self,
        quantizer: Quantizer,
        feeds: Sequence[Feed],
        float_share: float,
        time_budget: float | None,
        report: Callable[[str, int, int], None],
    ) -> None:
        self._quantizer = quantizer
        self.equalised: Quantizer | None = None
        self._feeds = feeds
        self._judge = Judge(outputs_of(quantizer.model, feeds))
        self._largest_share = float_share
        self._deadline = math.inf if time_budget is None else time.monotonic() + time_budget
        self._report = report
        self._kept: tuple[str, ...] = ()
        self.trials: dict[Scheme, Trial] = {}
        shapes = {name: array.shape for name, array in (feeds[0] if feeds else {}).items()}
        cost = analyze(Graph(quantizer.model), input_shapes=shapes)
        self._macs = {node.output: node.macs or 0 for node in cost.nodes}
        self._total = sum(self._macs.values())

    @property
    def is_late(self) -> bool:
        return time.monotonic() > self._deadline

    @property
    def chosen(self) -> Trial:
        """The least damage with exactly those operators in float that are worth it."""
        found = [trial for trial in self.trials.values() if trial.scheme.keep_float == self._kept]
        return min(found, key=lambda trial: trial.verdict.damage)

    @property
    def settled(self) -> Trial:
        """What is chosen, or another where that agrees less than with nothing in float."""
        trials = [each for each in self.trials.values() if each.float_share <= self._largest_share]
        best = self.chosen
        agrees = (best.verdict.agreement or 0.0) >= _plain_agreement(trials)
        return best if agrees else _least_damaged(trials)

    def measure(self, scheme: Scheme) -> Trial:
        if scheme not in self.trials:
            found = self.quantized(scheme)
            verdict = self._judge.verdict(outputs_of(found, self._feeds))
            self.trials[scheme] = Trial(scheme, verdict, self._share(scheme.keep_float))
            self._report("measuring INT8", len(self.trials), 0)
        return self.trials[scheme]

    def quantized(self, scheme: Scheme) -> Model:
        """The network as a scheme says."""
        quantizer = self.equalised if scheme.equalise else self._quantizer
        assert quantizer is not None
        return quantizer.quantized(scheme)

    def leave_in_float(self) -> None:
        """Look for the operators that are worth being left in float, and keep them there."""
        base = self.chosen
        found: list[tuple[float, int, tuple[str, ...]]] = []
        for number, names in enumerate(self._promising(base)):
            if self.is_late:
                break
            trial = self.measure(replace(base.scheme, keep_float=names))
            if trial.verdict.damage < base.verdict.damage:
                found.append((trial.verdict.damage, number, names))
        current = base
        for _, _, names in sorted(found):
            kept = tuple(dict.fromkeys((*current.scheme.keep_float, *names)))
            scheme = replace(base.scheme, keep_float=kept)
            is_known = scheme in self.trials  # costs no more time
            if self._share(kept) > self._largest_share or (self.is_late and not is_known):
                continue
            trial = self.measure(scheme)
            saved = current.verdict.damage - trial.verdict.damage
            if saved >= _WORTHWHILE * base.verdict.damage:
                current = trial
                self._kept = scheme.keep_float
        if current is not base:
            self._settle(current)

    def _promising(self, base: Trial) -> list[tuple[str, ...]]:
        """Operators by the tensors they make: of the runs that cost most, each and in pairs."""
        names = [
            node.output[0] for node in self._quantizer.operators() if node.op_type not in _MOVING
        ]
        size = max(1, round(math.sqrt(len(names))))
        measured = []
        for start in range(0, len(names), size):
            if self.is_late:
                break
            group = tuple(names[start : start + size])
            trial = self.measure(replace(base.scheme, keep_float=group))
            measured.append((trial.verdict.damage, start))
        worst = [start for _, start in sorted(measured)[:_SPLIT_GROUPS]]
        places = [place for start in worst for place in range(start, start + size)]
        singles = [(name,) for place in places for name in names[place : place + 1]]
        # The last of a run with the first of the next one, too.
        begins = sorted({max(0, place - 1) for place in places} | {*places})
        pairs = [tuple(names[begin : begin + 2]) for begin in begins if begin < len(names)]
        # Pairs first: where time ends the search, they are what helps more.
        return list(dict.fromkeys([*pairs, *singles]))

    def _settle(self, current: Trial) -> None:
        """What is left in float may make another calibration the best."""
        plain = [trial.scheme for trial in self.trials.values() if not trial.scheme.keep_float]
        for scheme in plain:
            if not self.is_late:
                self.measure(replace(scheme, keep_float=current.scheme.keep_float))

    def _share(self, keep_float: Iterable[str]) -> float:
        return sum(self._macs.get(name, 0) for name in keep_float) / max(self._total, 1)

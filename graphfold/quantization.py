"""What a plan's `quantize` asks for, as far as the engine knows: who does it is handed in.

Quantizing looks at data, so it is no part of the engine; `graphfold.calibration.planned` makes
the function that `optimize` calls last.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from graphfold import tables
from graphfold.errors import UsageError
from graphfold.tables import Table, make_table

if TYPE_CHECKING:
    from graphfold.calibration.judge import Verdict
    from graphfold.model import Model
    from graphfold.plan import Plan, Quantize


@dataclass(frozen=True)
class Quantized:
    """A network in INT8, and how it compares with the one in float.

    Attributes:
        model: the network.
        settings: what the plan asked for.
        verdict: against the float network.
        calibrated, judged: numbers of images.
        apart: whether no image was both calibrated on and judged on.
        weight_bytes: of the constants before and after.
    """

    model: Model
    settings: Quantize
    verdict: Verdict
    calibrated: int
    judged: int
    apart: bool
    weight_bytes: tuple[int, int]

    def to_json(self) -> dict[str, Any]:
        """Part of the JSON document of `optimize --json`."""
        return {
            **self.settings.model_dump(mode="json", exclude_none=True),
            **self.verdict.to_json(),
            "calibrated_on": self.calibrated,
            "judged_on": self.judged,
            "judged_apart": self.apart,
            "weight_bytes": {"before": self.weight_bytes[0], "after": self.weight_bytes[1]},
        }

    def table(self) -> Table:
        """What it costs, in figures for people."""
        settings = self.settings
        how: str = settings.calibration
        if settings.percentile is not None:
            how += f" {settings.percentile:g}"
        share = self.verdict.agreement
        rows = [
            ("calibration", f"{how}, {self.calibrated} images"),
            ("weights", "a scale per channel" if settings.per_channel else "one scale each"),
            ("left in float", str(len(settings.keep_float))),
            ("agreement with float", None if share is None else f"{100 * share:.1f} %"),
            ("damage against float", tables.error(self.verdict.damage)),
            ("weights and constants before", tables.size(self.weight_bytes[0])),
            ("after", tables.size(self.weight_bytes[1])),
        ]
        note = f"Judged on {self.judged} images"
        note += "." if self.apart else ", the ones that were calibrated on: too few to set apart."
        return make_table("INT8", ("", ""), rows, note=note)


QuantizeFunction = Callable[["Model", "Quantize"], Quantized]


def check_can_quantize(plan: Plan | None, quantize: QuantizeFunction | None) -> None:
    """Raise UsageError where a plan quantizes and there is nothing to calibrate on."""
    if plan is not None and plan.quantize is not None and quantize is None:
        raise UsageError(
            "the plan quantizes, which needs images to calibrate on", hint="give --data"
        )

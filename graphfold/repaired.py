"""A network that was trained to answer as its original does: what the engine is handed of it.

How it is trained is a matter of calibration; here is only what comes out of it.
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


@dataclass(frozen=True)
class Repaired:
    """What repair made of a network.

    Attributes:
        model: the repaired network; the network as it was where that is not better.
        candidate: the best state that training came to, kept or not.
        kept: whether held-back samples confirmed the repair.
        before, after: of the network as it was and of the repaired one, kept or not, against the
            original on the held-back samples.
        trained, judged: numbers of samples.
        steps: of training.
        features: inner tensors that were matched.
    """

    model: Model
    candidate: Model
    kept: bool
    before: Verdict
    after: Verdict
    trained: int
    judged: int
    steps: int
    features: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Part of the JSON document of `optimize --json`."""
        return {
            "kept": self.kept,
            "before": self.before.to_json(),
            "after": self.after.to_json(),
            "trained_on": self.trained,
            "judged_on": self.judged,
            "steps": self.steps,
            "features": list(self.features),
        }

    def table(self) -> Table:
        """Before and after, for people."""
        both = (self.before, self.after)
        rows = [
            ("damage", *(tables.error(each.damage) for each in both)),
            ("agreement", *(_percent(each.agreement) for each in both)),
            ("PSNR", *(None if each.psnr is None else f"{each.psnr:.1f} dB" for each in both)),
        ]
        rows = [row for row in rows if row[1] is not None]
        note = f"{self.steps} steps on {self.trained} samples, judged on {self.judged} others. "
        note += "Kept." if self.kept else "Not kept: no better within what chance explains."
        return make_table("Repair", ("against the original", "before", "after"), rows, note=note)


RepairFunction = Callable[["Model", "Model"], Repaired]


def check_can_repair(plan: object | None, data: object | None) -> None:
    """Raise UsageError where there is nothing to repair, or nothing to learn from."""
    if plan is None:
        raise UsageError(
            "there is nothing to distill: without a plan the result answers as the model does",
            hint="--plan gives a plan",
        )
    if data is None:
        raise UsageError("distill needs data to train on", hint="--data gives calibration inputs")


def _percent(share: float | None) -> str | None:
    return None if share is None else f"{100 * share:.1f} %"

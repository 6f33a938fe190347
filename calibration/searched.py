"""What searches found: plans, importances and curves, as files, tables and a picture."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graphfold.calibration.masks import MaskEpoch, stable_since
from graphfold.calibration.planning import with_version
from graphfold.files import atomic_file
from graphfold.plot import Line, Panel, panels
from graphfold.tables import Table, make_table

if TYPE_CHECKING:
    from graphfold.calibration.objective import Evaluation
    from graphfold.calibration.recipe import Recipe
    from graphfold.calibration.training import Trained
    from graphfold.masking import Budget, Mask
    from graphfold.plan import Plan

REPORT, PICTURE = "search.json", "search.svg"


@dataclass(frozen=True)
class Run:
    """One search: a budget, a strength of the decay, and what came of them.

    Attributes:
        label: of the two; its plan's file name.
        budget, decay: as asked.
        course: the masks before the search and after each epoch.
        trained: losses over time.
        plan: what goes.
        latency: predicted for it, in milliseconds; None without a latency table.
    """

    label: str
    budget: Budget
    decay: float
    course: tuple[MaskEpoch, ...]
    trained: Trained
    plan: Plan
    latency: float | None

    @property
    def last(self) -> MaskEpoch:
        """Where the masks ended."""
        return self.course[-1]

    @property
    def stable_since(self) -> int:
        """The epoch since whose end the same masks were on."""
        return stable_since(self.course)

    def to_json(self) -> dict[str, Any]:
        """Part of the report."""
        held_out = self.trained.last.held_out
        return {
            "label": self.label,
            "budget": self.budget.to_json(),
            "decay": self.decay,
            "kept": [int(on) for on in self.last.kept],
            "importance": list(self.last.importance),
            "stable_since_epoch": self.stable_since,
            "predicted_ms": self.latency,
            "held_out": None if held_out is None else held_out.to_json(),
            "steps": self.trained.steps,
            "continued": self.trained.continued,
            "epochs": [
                {**loss.to_json(), **masks.to_json()}
                for loss, masks in zip(self.trained.epochs, self.course, strict=True)
            ],
            "plan": self.plan.model_dump(mode="json", exclude_none=True, exclude_defaults=True),
        }


@dataclass(frozen=True)
class Searched:
    """All searches of one model.

    Attributes:
        masks: what could go.
        savings: milliseconds that each mask's removal saves; None without a latency table.
        original: milliseconds of the model as it is; None without a latency table.
        recipe: how it was trained.
        runs: one for every budget and strength.
        teacher: how the original does on the held-out samples, where they have labels.
        warnings: for the user.
    """

    masks: tuple[Mask, ...]
    savings: tuple[float, ...] | None
    original: float | None
    recipe: Recipe
    runs: tuple[Run, ...]
    teacher: Evaluation | None
    warnings: tuple[str, ...] = field(default=())

    def to_json(self) -> dict[str, Any]:
        """The report: search.json, and the document of `graphfold search --json`."""
        return {
            "graphfold_search": 1,
            "masks": [
                {
                    "name": mask.name,
                    "activations": list(mask.sites),
                    "saves_ms": None if self.savings is None else self.savings[number],
                }
                for number, mask in enumerate(self.masks)
            ],
            "original_ms": self.original,
            "teacher": None if self.teacher is None else self.teacher.to_json(),
            "recipe": self.recipe.to_json(),
            "runs": [run.to_json() for run in self.runs],
            "warnings": list(self.warnings),
        }

    def tables(self) -> list[Table]:
        """The plans, then what each mask is worth."""
        return [self._plans(), self._masks()]

    def _plans(self) -> Table:
        columns = ("plan", "kept", "stable since", "predicted ms", "speedup", "loss", "accuracy")
        rows = [
            (
                run.label,
                f"{sum(run.last.kept)} of {len(self.masks)}",
                f"epoch {run.stable_since}",
                None if run.latency is None else f"{run.latency:.3f}",
                None
                if run.latency is None or self.original is None
                else f"{self.original / run.latency:.2f}x",
                *_figures(run.trained.last.held_out),
            )
            for run in self.runs
        ]
        note = "Loss and accuracy on held-out samples at the search's end, before fine-tuning."
        return make_table(f"Search, {self.recipe.epochs} epochs", columns, rows, note=note)

    def _masks(self) -> Table:
        columns = ("activations of", "saves ms", *(run.label for run in self.runs))
        rows = []
        for number, mask in enumerate(self.masks):
            worth = [
                f"{run.last.importance[number]:.3f}{'' if run.last.kept[number] else ' off'}"
                for run in self.runs
            ]
            saving = None if self.savings is None else f"{self.savings[number]:.3f}"
            rows.append((mask.name, saving, *worth))
        return make_table("Importance", columns, rows)

    def picture(self) -> str:
        """Importances, loss and changes over time, a row of panels for every run, as SVG."""
        return panels([self._panels(run) for run in self.runs])

    def _panels(self, run: Run) -> list[Panel]:
        importances = [
            Line(
                mask.name,
                [(each.number, each.importance[at]) for each in run.course],
                run.last.kept[at],
            )
            for at, mask in enumerate(self.masks)
        ]
        # Before training the statistics of a network without some activations fit nothing.
        epochs = run.trained.epochs[1:]
        losses = [
            Line("search", [(e.number, e.loss) for e in epochs if e.loss is not None], True),
            Line(
                "held out",
                [(e.number, e.held_out.loss) for e in epochs if e.held_out is not None],
                False,
            ),
        ]
        changes = [Line("changes", [(each.number, each.changes) for each in run.course[1:]], True)]
        return [
            Panel(f"{run.label}: importance", "epoch", importances),
            Panel("loss", "epoch", [line for line in losses if line.points]),
            Panel("masks switched", "epoch", changes),
        ]

    def write(self, folder: Path) -> list[Path]:
        """Write plans, report and picture into a folder; returns their paths."""
        contents = {
            f"{run.label}.json": with_version(
                run.plan.model_dump_json(exclude_defaults=True, indent=1)
            )
            for run in self.runs
        }
        contents[REPORT] = json.dumps(self.to_json(), indent=1, allow_nan=False) + "\n"
        contents[PICTURE] = self.picture()
        for name, content in contents.items():
            with atomic_file(folder / name) as file:
                file.write(content.encode())
        return [folder / name for name in contents]


def _figures(found: Evaluation | None) -> tuple[str | None, str | None]:
    if found is None:
        return None, None
    share = found.agreement if found.accuracy is None else found.accuracy
    return f"{found.loss:.4f}", None if share is None else f"{100 * share:.2f} %"

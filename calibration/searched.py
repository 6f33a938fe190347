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
    from graphfold.calibration.searching import Found
    from graphfold.calibration.sets import SetChoice
    from graphfold.masking import Budget, Mask
    from graphfold.plan import Plan

REPORT, PICTURE = "search.json", "search.svg"


@dataclass(frozen=True)
class Run:
    """One search: a budget, a strength of the decay, and what came of them.

    Attributes:
        label: of the two; its plan's file name.
        budget, decay: as asked.
        found: masks and losses over time.
        plan: what goes.
        latency: predicted for it, in milliseconds; None without a latency table.
    """

    label: str
    budget: Budget
    decay: float
    found: Found
    plan: Plan
    latency: float | None

    @property
    def last(self) -> MaskEpoch:
        """Where the masks ended."""
        return self.found.last

    @property
    def stable_since(self) -> int | None:
        """The epoch since whose end the same masks were on; None where none are, in training."""
        return None if self.found.sets else stable_since(self.found.course)

    @property
    def held_out(self) -> Evaluation | None:
        """On held-out samples, of weights and masks at the end; None where they were not judged."""
        return self.found.trained.last.held_out

    def to_json(self) -> dict[str, Any]:
        """Part of the report."""
        found, masks = self.found, {each.number: each.to_json() for each in self.found.course}
        return {
            "label": self.label,
            "budget": self.budget.to_json(),
            "decay": self.decay,
            "kept": [int(on) for on in self.last.kept],
            "importance": list(self.last.importance),
            "stable_since_epoch": self.stable_since,
            "predicted_ms": self.latency,
            "held_out": None if self.held_out is None else self.held_out.to_json(),
            "sets": None if found.sets is None else found.sets.to_json(),
            "steps": found.trained.steps,
            "continued": found.trained.continued,
            "epochs": [
                {**each.to_json(), **masks.get(each.number, {})} for each in found.trained.epochs
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
        if self.runs[0].found.sets is None:
            more, columns = _trained, ("stable since", "loss", "accuracy")
            note = "Loss and accuracy on held-out samples at the search's end, before fine-tuning."
        else:
            more, columns = _judged, ("loss", "of any set", "explained")
            note = (
                "Loss with the weights of the search, which were trained for any set: of the "
                "masks that were chosen, and the mean of sets that were drawn; explained: share of "
                "the differences between sets that the importances below explain."
            )
        rows = [
            (
                run.label,
                f"{sum(run.last.kept)} of {len(self.masks)}",
                None if run.latency is None else f"{run.latency:.3f}",
                None
                if run.latency is None or self.original is None
                else f"{self.original / run.latency:.2f}x",
                *more(run),
            )
            for run in self.runs
        ]
        title = f"Search, {self.recipe.epochs} epochs"
        return make_table(
            title, ("plan", "kept", "predicted ms", "speedup", *columns), rows, note=note
        )

    def _masks(self) -> Table:
        columns = ("activations of", "saves ms", *(run.label for run in self.runs))
        rows = []
        for number, mask in enumerate(self.masks):
            worth = [
                f"{run.last.importance[number]:.4f}{'' if run.last.kept[number] else ' off'}"
                for run in self.runs
            ]
            saving = None if self.savings is None else f"{self.savings[number]:.3f}"
            rows.append((mask.name, saving, *worth))
        return make_table("Importance", columns, rows)

    def picture(self) -> str:
        """Importances, loss and changes over time, a row of panels for every run, as SVG."""
        return panels([self._panels(run) for run in self.runs])

    def _panels(self, run: Run) -> list[Panel]:
        # Before training the statistics of a network without some activations fit nothing.
        epochs = run.found.trained.epochs[1:]
        losses = [
            Line("search", [(e.number, e.loss) for e in epochs if e.loss is not None], True),
            Line(
                "held out",
                [(e.number, e.held_out.loss) for e in epochs if e.held_out is not None],
                False,
            ),
        ]
        loss = Panel("loss", "epoch", [line for line in losses if line.points])
        if run.found.sets is not None:
            return [_sets(f"{run.label}: loss of sets", run.found.sets), loss]
        course = run.found.course
        importances = [
            Line(
                mask.name,
                [(each.number, each.importance[at]) for each in course],
                run.last.kept[at],
            )
            for at, mask in enumerate(self.masks)
        ]
        changes = [Line("changes", [(each.number, each.changes) for each in course[1:]], True)]
        return [
            Panel(f"{run.label}: importance", "epoch", importances),
            loss,
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


def _trained(run: Run) -> tuple[str | None, ...]:
    """Columns of a search in which masks learned."""
    stable, found = f"epoch {run.stable_since}", run.held_out
    if found is None:
        return stable, None, None
    share = found.agreement if found.accuracy is None else found.accuracy
    return stable, f"{found.loss:.4f}", None if share is None else f"{100 * share:.2f} %"


def _judged(run: Run) -> tuple[str | None, ...]:
    """Columns of a search that compared sets."""
    sets = run.found.sets
    assert sets is not None
    return f"{sets.loss:.4f}", f"{sets.mean:.4f}", f"{100 * sets.explained:.0f} %"


def _sets(title: str, sets: SetChoice) -> Panel:
    """Losses of sets that were drawn, lowest first, and of the one that was chosen."""
    losses = list(enumerate(sorted(loss for _, loss in sets.judged), start=1))
    chosen = [(1, sets.loss), (len(losses), sets.loss)]
    return Panel(title, "sets", [Line("drawn", losses, False), Line("chosen", chosen, True)])

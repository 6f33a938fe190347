"""The search for activations that may go: weights are trained with some of them masked.

By loss: with any masks that fit the budget, drawn for each step, and then sets of masks are
compared by their losses (`sets`); costs are added to these. By gradient, DepthShrinker's way
(section 4.2): one number m for each block or activation, the largest are on in the forward,
gradients pass straight to all of them, and a decay weighted by latency lowers those of costly ones
(`masks`); every budget and strength of the decay is a search of its own then (appendix E).

Either way the recipe is that of fine-tuning, which starts from the model's own weights again.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from graphfold.calibration import bridge  # noqa: F401 - says what to install without torch
from graphfold.calibration.finetune import read_training
from graphfold.calibration.parallel import Group
from graphfold.calibration.profile import profile_model
from graphfold.calibration.recipe import Recipe
from graphfold.calibration.samples import Samples
from graphfold.calibration.searched import Run, Searched
from graphfold.calibration.searching import Asked, ByGradient, ByLoss, Setting
from graphfold.candidates import find_candidates
from graphfold.errors import UsageError
from graphfold.graph import Graph
from graphfold.masked_plans import BoundaryChoice, Predictions, masked_plan
from graphfold.masking import Budget, Chooser, Mask, Per, find_masks
from graphfold.measures import LatencyTable, read_latency
from graphfold.model import digest
from graphfold.progress import Progress

from torch import nn  # isort: skip

if TYPE_CHECKING:
    from graphfold.calibration.dataset import Dataset
    from graphfold.model import Model

By = Literal["loss", "gradient"]
# Of the published searches, in units of the mean saving of a mask: their 1e-4 times 30.
DECAY = 3e-3
MEASURED = "latency.json"


def search(
    model: Model,
    samples: Samples,
    budgets: Sequence[Budget],
    *,
    by: By = "loss",
    decays: Sequence[float] = (DECAY,),
    per: Per = "block",
    ends: bool = False,
    latency: LatencyTable | str | Path | None = None,
    boundary: BoundaryChoice = "auto",
    held_out: Samples | None = None,
    teacher: Model | nn.Module | None = None,
    recipe: Recipe | None = None,
    alpha: float = 0.7,
    temperature: float = 1.0,
    smoothing: float | None = None,
    input_shapes: Mapping[str, Sequence[int]] | None = None,
    folder: Path | None = None,
    header: Mapping[str, Any] | None = None,
    group: Group | None = None,
    progress: Progress | None = None,
) -> Searched:
    """Find the activations that a network can do without, for several budgets.

    Args:
        model: the original, in float32; not changed.
        samples: to train on; labels are not needed where there is a teacher.
        budgets: one plan for each, with each strength of the decay.
        by: what tells masks apart: the loss of sets of them, or the gradients of each.
        decays: strengths, for masks whose saving is the mean one; 0 has none.
        per: a mask for each block, or for each activation that lies between convolutions.
        ends: masks for the network's first and last activation, too.
        latency: a latency table; where it is None and a decay or a budget of time needs one, this
            device is measured.
        boundary: where padding stands in merged segments.
        held_out: samples to judge on; by loss sets of masks are, otherwise by some to train on.
        teacher: to learn from; by default the original. With `alpha` 0 there is none.
        recipe: how to train, as in fine-tuning.
        alpha: the teacher's part of the loss where there are labels; 1 where there are none.
        temperature: of the teacher's part.
        smoothing: of the labels; by default 0.1 without a teacher and none with one.
        input_shapes: sizes that the model leaves open, for measuring.
        folder: what an interrupted search is continued from; its files stay there.
        header: what else tells this search from others.
        group: the processes that train together.
        progress: called with (stage, done, total).

    Raises:
        UsageError: nothing to choose among, or a budget that keeps all or nothing.
        BudgetError: no plan is as fast as asked. MeasuresError: a table that does not fit.
        BridgeError: the network does not run in torch. DataError: too few samples.
    """
    recipe, group = recipe or Recipe(), group or Group()
    _check(budgets, decays, by)
    candidates = find_candidates(Graph(model))
    masks = find_masks(candidates, per, ends=ends)
    predictions = None
    if latency is not None or any(decays) or any(each.unit != "keep" for each in budgets):
        table = _table(model, latency, folder, input_shapes, group, progress)
        predictions = Predictions(candidates, masks, table)
    setting = Setting(
        model=model,
        masks=masks,
        weights=_weights(masks, predictions),
        samples=samples,
        held_out=held_out,
        teacher=None if alpha == 0 else model if teacher is None else teacher,
        recipe=recipe,
        loss=(alpha, temperature, smoothing),
        folder=folder,
        about={"per": per, "ends": ends, "by": by, **(header or {})},
        group=group,
        progress=progress,
    )
    way = ByLoss(setting) if by == "loss" else ByGradient(setting)
    plans = [(budget, decay) for budget in budgets for decay in decays]
    choosers = {budget: _chooser(budget, masks, predictions) for budget in budgets}
    runs = []
    for number, (budget, decay) in enumerate(plans):
        label = _label(budget, decay if len(decays) > 1 else None)
        stage = f"{label} ({number + 1} of {len(plans)})" if len(plans) > 1 else label
        found = way.run(Asked(label, budget, decay, choosers[budget], stage))
        removed = frozenset(at for at, on in enumerate(found.last.kept) if not on)
        latency_ms = None if predictions is None else predictions.latency(removed)
        plan = masked_plan(
            model,
            masks,
            removed,
            predictions,
            boundary=boundary,
            objective=_objective(budget, decay, latency_ms, predictions),
        )
        runs.append(Run(label, budget, decay, found, plan, latency_ms))
    return Searched(
        tuple(masks),
        None if predictions is None else predictions.savings,
        None if predictions is None else predictions.original,
        recipe,
        tuple(runs),
        way.judged,
        tuple(_warnings(masks, predictions, runs, recipe)),
    )


def search_on(
    model: Model,
    data: Dataset,
    budgets: Sequence[Budget],
    validation: Dataset | None,
    teacher: Any,
    *,
    by: By = "loss",
    use_labels: bool = True,
    **options: Any,
) -> Searched:
    """Search on data sets; by gradient a tenth of the data is held back where none is to judge on.

    Raises:
        as `search`.
    """
    samples, held_out, master = read_training(
        data, validation, teacher, use_labels, hold_back=by == "gradient"
    )
    return search(model, samples, budgets, by=by, held_out=held_out, teacher=master, **options)


def _check(budgets: Sequence[Budget], decays: Sequence[float], by: str) -> None:
    if by not in get_args(By):
        raise UsageError(f"--by {by!r} is not known", hint="loss or gradient")
    if not budgets:
        raise UsageError("how much is to be kept?", hint="--keep K, --speedup X or --budget MS")
    if not decays or not all(math.isfinite(decay) and decay >= 0 for decay in decays):
        raise UsageError("the decay's strength is 0 or more")
    for what, items in (("budgets", budgets), ("decays", decays)):
        if len(set(items)) < len(items):
            raise UsageError(f"the same twice among the {what}")


def _table(
    model: Model,
    given: LatencyTable | str | Path | None,
    folder: Path | None,
    input_shapes: Mapping[str, Sequence[int]] | None,
    group: Group,
    progress: Progress | None,
) -> LatencyTable:
    """The latency table: as given, as measured here before, or measured now."""
    if given is not None:
        return given if isinstance(given, LatencyTable) else read_latency(given)

    def measured() -> LatencyTable:
        path = None if folder is None else folder / MEASURED
        if path is not None and path.exists():
            table = read_latency(path)
            stated = table.header.model
            if stated is not None and stated.sha256 == _digest(model):
                return table
        found = profile_model(model, path, input_shapes=input_shapes, progress=progress)
        return found.table

    table: LatencyTable = group.same(measured() if group.leads else None)
    return table


def _chooser(budget: Budget, masks: Sequence[Mask], predictions: Predictions | None) -> Chooser:
    if predictions is None:
        return Chooser(budget, [0.0] * len(masks))
    return Chooser(budget, predictions.savings, predictions.latency, predictions.original)


def _weights(masks: Sequence[Mask], predictions: Predictions | None) -> list[float]:
    """Of each mask in the decay: what its removal saves, over the mean of all."""
    if predictions is None:
        return [0.0] * len(masks)
    savings = [max(0.0, saving) for saving in predictions.savings]
    mean = sum(savings) / len(savings)
    return [saving / mean if mean > 0 else 0.0 for saving in savings]


def _warnings(
    masks: Sequence[Mask], predictions: Predictions | None, runs: Sequence[Run], recipe: Recipe
) -> Iterator[str]:
    savings = () if predictions is None else predictions.savings
    idle = [mask.name for mask, saving in zip(masks, savings, strict=False) if saving <= 0]
    if idle:
        yield (
            f"{len(idle)} of {len(masks)} masks save no time on the device of the latency table, "
            f"{idle[0]!r} for one: the decay leaves them alone"
        )
    unsettled = [run.label for run in runs if run.stable_since == recipe.epochs]
    if unsettled:
        yield (
            f"masks were still switched after the last epoch ({', '.join(unsettled)}): "
            "search for more epochs"
        )


def _objective(
    budget: Budget, decay: float, latency: float | None, predictions: Predictions | None
) -> dict[str, Any]:
    found: dict[str, Any] = {"search": {**budget.to_json(), "decay": decay}}
    if predictions is not None:
        found |= {"predicted_ms": latency, "latency_table": predictions.table.digest}
    return found


def _label(budget: Budget, decay: float | None) -> str:
    return budget.label if decay is None else f"{budget.label}-decay-{decay:g}"


def _digest(model: Model) -> str:
    return digest(model.path if model.path is not None else model)

"""Fine-tuning of what a plan makes of a network, and folding of the result.

What trains is the plan's reference network: activations removed, padding as the plan says, free
activations added, nothing merged. Its trained weights go back into the same ONNX graph, which is
then folded, so that folding stays exact whatever was learned (DepthShrinker, section 4.3).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from graphfold.calibration import bridge  # noqa: F401 - says what to install without torch
from graphfold.calibration.capture import run_part
from graphfold.calibration.objective import Answers, Evaluation
from graphfold.calibration.pairs import pair_up
from graphfold.calibration.parallel import Group
from graphfold.calibration.recipe import Recipe
from graphfold.calibration.samples import Samples
from graphfold.calibration.training import Hooks, Told, Trained, train
from graphfold.calibration.untie import untie
from graphfold.free import with_free_activations
from graphfold.graph import Graph
from graphfold.model import digest, to_proto
from graphfold.optimizer import Result, load_any, optimize_model
from graphfold.plan import Plan, PlanSource, read_plan
from graphfold.progress import Progress
from graphfold.tables import Table, make_table

import torch  # isort: skip
from torch import nn  # isort: skip

if TYPE_CHECKING:
    from graphfold.calibration.dataset import Dataset
    from graphfold.model import Model
    from graphfold.reference import Reference

_FITTED_ON = 1000  # samples
_COMPARED = 10_000  # samples
_COMPARED_TOGETHER = 100
_VERIFIED_ON = 32  # samples
_HELD_BACK = 10  # one sample of so many


@dataclass(frozen=True)
class Folding:
    """The trained reference network and the folded one on held-out samples, in onnxruntime.

    Attributes:
        samples: that were compared.
        error: largest difference of an output over the largest value of it.
        other_class: samples whose class is another one; None where no output is classes.
    """

    samples: int
    error: float
    other_class: int | None

    def to_json(self) -> dict[str, Any]:
        """Part of a JSON document."""
        return {
            "samples": self.samples,
            "error": self.error,
            "other_class": self.other_class,
        }


@dataclass(frozen=True)
class Finetuned:
    """What fine-tuning made.

    Attributes:
        result: the folded network, the trained reference network, and the report on folding.
        plan: what was applied, with its free activations; None where there was none.
        free_activations: how many of them the plan had not stated.
        recipe, objective: how it was trained.
        trained: the course of the training.
        teacher: how the teacher does on the held-out samples, where they have labels.
        folding: what folding changed on them; None without held-out samples.
    """

    result: Result
    plan: Plan | None
    free_activations: int
    recipe: Recipe
    objective: Answers
    trained: Trained
    teacher: Evaluation | None
    folding: Folding | None

    def to_json(self) -> dict[str, Any]:
        """The document of `graphfold finetune --json`."""
        return {
            "plan": None
            if self.plan is None
            else self.plan.model_dump(mode="json", exclude_unset=True),
            "recipe": self.recipe.to_json(),
            "alpha": self.objective.alpha,
            "temperature": self.objective.temperature,
            "label_smoothing": self.objective.smoothing,
            "free_activations": self.free_activations,
            "epochs": [epoch.to_json() for epoch in self.trained.epochs],
            "kept_epoch": self.trained.kept,
            "steps": self.trained.steps,
            "continued": self.trained.continued,
            "teacher": None if self.teacher is None else self.teacher.to_json(),
            "folding": None if self.folding is None else self.folding.to_json(),
            "report": self.result.report.to_json(),
        }

    def tables(self) -> list[Table]:
        """The same for people: the training, then the folding."""
        return [self._course(), *self.result.report.tables()]

    def _course(self) -> Table:
        columns = ("epoch", "loss", "held out: loss", "accuracy", "worst class", "as the teacher")
        rows: list[tuple[str | None, ...]] = []
        if self.teacher is not None:
            rows.append(("teacher", None, *_figures(self.teacher)[:3], None))
        for epoch in self.trained.epochs:
            loss = None if epoch.loss is None else f"{epoch.loss:.4f}"
            kept = " (kept)" if epoch.number == self.trained.kept else ""
            rows.append((f"{epoch.number}{kept}", loss, *_figures(epoch.held_out)))
        note = f"{self.trained.steps} steps."
        if self.free_activations:
            note += f" {self.free_activations} free activations were added."
        if self.folding is not None:
            note += f" Folding: largest difference {self.folding.error:.1e} of the scale"
            if self.folding.other_class is not None:
                note += f", another class for {self.folding.other_class}"
            note += f" of {self.folding.samples} samples." if self.folding.samples else "."
        return make_table("Fine-tuning", columns, rows, note=note)


def finetune(
    model: Model,
    samples: Samples,
    plan: PlanSource | None = None,
    *,
    held_out: Samples | None = None,
    teacher: Model | nn.Module | None = None,
    recipe: Recipe | None = None,
    alpha: float = 0.7,
    temperature: float = 1.0,
    smoothing: float | None = None,
    free_activations: bool = True,
    allow_other_model: bool = False,
    hooks: Hooks | None = None,
    checkpoint: Path | None = None,
    header: Mapping[str, Any] | None = None,
    group: Group | None = None,
    progress: Progress | None = None,
) -> Finetuned:
    """Train what a plan makes of a network, and fold it.

    Args:
        model: the original, in float32; not changed.
        samples: to train on; labels are not needed where there is a teacher.
        plan: what is removed and merged; segments with `weights: regress` are fitted on the first
            samples before the training. None trains the model as it is.
        held_out: to judge on, and to compare the folded network on.
        teacher: to learn from; by default the original. A module takes the samples' arrays in
            order, those that the model has no input for, too (what was hidden from the model,
            say), and gives what the model's outputs are, by name or in order. With `alpha` 0
            there is none.
        recipe: how to train.
        alpha: the teacher's part of the loss where there are labels; 1 where there are none.
        temperature: of the teacher's part.
        smoothing: of the labels; by default 0.1 without a teacher and none with one.
        free_activations: add the network's own activation behind merged segments that end without
            one, see `graphfold.free`.
        allow_other_model: accept a plan made for another file.
        hooks: what else happens in the training.
        checkpoint: a file that an interrupted run is continued from.
        header: what else tells this run from others.
        group: the processes that train together.
        progress: called with (stage, done, total).

    Raises:
        PlanError: the plan does not fit. BridgeError: the network does not run in torch.
        UsageError: nothing to learn from, a teacher of another interface, or a checkpoint of
            another run. DataError: too few samples, or labels that the network has no class for.
        ModelError: weights that are not float32. VerificationError: folding changed the network.
    """
    recipe, group = recipe or Recipe(), group or Group()
    stated = None if plan is None else read_plan(plan)
    added = 0
    if stated is not None and free_activations:
        stated, added = with_free_activations(Graph(model), stated)
    made: list[tuple[Answers, Trained, Evaluation | None]] = []
    about = {
        "model": _digest(model),
        "plan": None if stated is None else stated.digest,
        "alpha": alpha,
        "temperature": temperature,
        "smoothing": smoothing,
        **(header or {}),
    }

    def retrain(reference: Reference, original: Model) -> Model:
        student = untie(reference.model)
        master = None if alpha == 0 else original if teacher is None else teacher
        pair = pair_up(student, master, samples, held_out, alpha, temperature, smoothing)
        if isinstance(master, nn.Module):
            about["teacher"] = "a module"
        elif master is not None:
            about["teacher"] = _digest(master)
        found = train(
            pair.student,
            pair.teacher,
            samples,
            recipe,
            objective=pair.objective,
            held_out=held_out,
            hooks=hooks,
            checkpoint=checkpoint,
            header=about,
            group=group,
            progress=None if progress is None else _told(progress),
        )
        made.append((pair.objective, found, pair.judge_teacher(held_out, group)))
        return pair.student.to(torch.device("cpu")).to_model()

    result = optimize_model(
        model,
        stated,
        allow_other_model=allow_other_model,
        inputs=_feeds(held_out or samples, _VERIFIED_ON, model),
        retrain=retrain,
        progress=progress,
        **_needs_of(stated, model, samples, allow_other_model, progress),
    )
    objective, found, judged = made[0]
    folding = None if held_out is None else compare(result, held_out)
    return Finetuned(result, stated, added, recipe, objective, found, judged, folding)


def finetune_on(
    model: Model,
    data: Dataset,
    plan: PlanSource | None,
    validation: Dataset | None,
    teacher: Any,
    *,
    use_labels: bool = True,
    **options: Any,
) -> Finetuned:
    """Fine-tune on data sets; without one to judge on, a tenth of the data is held back.

    Raises:
        as `finetune`.
    """
    samples, held_out, master = read_training(data, validation, teacher, use_labels)
    return finetune(model, samples, plan, held_out=held_out, teacher=master, **options)


def read_training(
    data: Dataset,
    validation: Dataset | None,
    teacher: Any,
    use_labels: bool,
    *,
    hold_back: bool = True,
) -> tuple[Samples, Samples | None, Model | nn.Module | None]:
    """Samples to train on and to judge on, and the teacher.

    Without others to judge on a tenth is held back, or there are none.

    Raises:
        DataError: what is read does not fit the model. ModelError: the teacher cannot be read.
    """
    samples = Samples.of_dataset(data)
    held_out = None if validation is None else Samples.of_dataset(validation)
    if held_out is None and hold_back:
        samples, held_out = samples.split(max(1, len(samples) // _HELD_BACK))
    if not use_labels:
        samples = samples.without_labels()
    master = teacher if teacher is None or isinstance(teacher, nn.Module) else load_any(teacher)
    return samples, held_out, master


def _needs_of(
    plan: Plan | None,
    model: Model,
    samples: Samples,
    allow_other_model: bool,
    progress: Progress | None,
) -> dict[str, Any]:
    """What a plan's fitted segments and its quantization need of the samples."""
    if plan is None or (not plan.is_fitted and plan.quantize is None):
        return {}
    from graphfold.calibration.fitting import fit_plan
    from graphfold.calibration.planned import quantizing
    from graphfold.fitted import Fitted

    feeds = _feeds(samples, _FITTED_ON, model)

    def fit(source: Model, given: Plan) -> Fitted:
        return fit_plan(
            source, given, feeds, allow_other_model=allow_other_model, progress=progress
        )

    return {"fit": fit, "quantize": quantizing(feeds)}


def _feeds(samples: Samples, most: int, model: Model) -> list[dict[str, Any]]:
    some = samples.subset(range(min(most, len(samples))))
    names = {value.name for value in model.ir.graph.inputs}
    return [
        {
            name: tensor.cpu().numpy()
            for name, tensor in samples.take(positions)[0].items()
            if name in names
        }
        for positions in some.in_order(_COMPARED_TOGETHER)
    ]


def compare(result: Result, held_out: Samples) -> Folding:
    """What folding changed on held-out samples, in onnxruntime."""
    runs = [run_part(to_proto(model), 0) for model in (result.reference, result.folded)]
    names = [value.name or "" for value in result.reference.ir.graph.outputs]
    errors, scales = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0)
    other, count, is_classes = 0, 0, False
    for feed in _feeds(held_out, _COMPARED, result.reference):
        before, after = (run(feed) for run in runs)
        count += len(next(iter(feed.values())))
        for name in names:
            apart = np.abs(after[name] - before[name]).max()
            errors[name] = float(np.maximum(errors[name], apart))  # no number stays none
            scales[name] = max(scales[name], float(np.abs(before[name]).max()))
        if before[names[0]].ndim == 2:
            is_classes = True
            other += int((before[names[0]].argmax(1) != after[names[0]].argmax(1)).sum())
    worst = max(errors[name] / max(scales[name], 1e-30) for name in names)
    return Folding(count, worst, other if is_classes else None)


def _digest(model: Model) -> str:
    return digest(model.path if model.path is not None else model)


def _told(progress: Progress) -> Callable[[Told], None]:
    def tell(made: Told) -> None:
        moment, held_out = made.moment, made.last.held_out
        text = f"epoch {moment.epoch + 1}/{moment.epochs}, loss {made.loss:.4f}"
        if held_out is not None and held_out.accuracy is not None:
            text += f", held out {100 * held_out.accuracy:.1f} %"
        elif held_out is not None:
            text += f", held out {held_out.loss:.4f}"
        progress(text, moment.done + 1, moment.total)

    return tell


def _figures(found: Evaluation | None) -> tuple[str | None, ...]:
    if found is None:
        return (None,) * 4
    shares = (found.accuracy, found.worst_class, found.agreement)
    return (f"{found.loss:.4f}", *(None if s is None else f"{100 * s:.2f} %" for s in shares))

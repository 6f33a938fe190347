"""The trainings of a search: with masks that learn, or with masks that are drawn."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graphfold.calibration.masks import MaskedModule, MaskEpoch, MaskHooks, with_masks
from graphfold.calibration.pairs import Pair, pair_up
from graphfold.calibration.sets import DrawnMasks, SetChoice, SetLoss, choose_set
from graphfold.calibration.training import Hooks, Told, Trained, train
from graphfold.calibration.untie import untie
from graphfold.model import digest

from torch import nn  # isort: skip

if TYPE_CHECKING:
    from graphfold.calibration.objective import Evaluation
    from graphfold.calibration.parallel import Group
    from graphfold.calibration.recipe import Recipe
    from graphfold.calibration.samples import Samples
    from graphfold.masking import Budget, Chooser, Mask
    from graphfold.model import Model
    from graphfold.progress import Progress


@dataclass(frozen=True)
class Setting:
    """What all searches of a model have in common.

    Attributes:
        model: the original.
        masks: to choose among.
        weights: of each in the decay.
        samples: to train on.
        held_out: to judge on.
        teacher: to learn from, None for labels alone.
        recipe: how to train.
        loss: the teacher's part, its temperature, smoothing of labels.
        folder: for checkpoints.
        about: what else tells these searches from others.
        group: the processes that train together.
        progress: called with (stage, done, total).
    """

    model: Model
    masks: Sequence[Mask]
    weights: Sequence[float]
    samples: Samples
    held_out: Samples | None
    teacher: Model | nn.Module | None
    recipe: Recipe
    loss: tuple[float, float, float | None]
    folder: Path | None
    about: Mapping[str, Any]
    group: Group
    progress: Progress | None


@dataclass(frozen=True)
class Asked:
    """One search.

    Attributes:
        label: of budget and decay.
        budget, decay: as asked.
        chooser: for the budget.
        stage: what progress is told.
    """

    label: str
    budget: Budget
    decay: float
    chooser: Chooser
    stage: str


@dataclass(frozen=True)
class Found:
    """Where masks and weights ended.

    Attributes:
        course: the masks before the search and after each epoch; after the last one alone where
            they do not learn.
        trained: losses over time.
        checkpoint: its file's name.
        sets: the losses that were compared, if they were.
    """

    course: tuple[MaskEpoch, ...]
    trained: Trained
    checkpoint: str
    sets: SetChoice | None = None

    @property
    def last(self) -> MaskEpoch:
        """Where the masks ended."""
        return self.course[-1]


class Way(ABC):
    """Searches of one model, from its own weights each.

    Attributes:
        judged: how the teacher does on the held-out samples, where they have labels.
    """

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.judged: Evaluation | None = None

    @abstractmethod
    def run(self, asked: Asked) -> Found:
        """One search."""

    def prepare(self, chooser: Chooser) -> tuple[Pair, MaskedModule]:
        """Student and teacher, and the student with masks."""
        setting = self.setting
        student, names = with_masks(untie(setting.model), setting.masks)
        samples, held_out = setting.samples, setting.held_out
        pair = pair_up(student, setting.teacher, samples, held_out, *setting.loss)
        if self.judged is None:
            self.judged = pair.judge_teacher(held_out, setting.group)
        return pair, MaskedModule(pair.student, names, chooser).to(setting.group.device)

    def train(
        self,
        pair: Pair,
        module: MaskedModule,
        hooks: Hooks,
        held_out: Samples | None,
        asked: Asked,
        checkpoint: str,
        about: Mapping[str, Any] | None = None,
    ) -> Trained:
        """Train what was prepared."""
        setting, progress = self.setting, self.setting.progress
        return train(
            module,
            pair.teacher,
            setting.samples,
            setting.recipe,
            objective=pair.objective,
            held_out=held_out,
            hooks=hooks,
            checkpoint=None if setting.folder is None else setting.folder / checkpoint,
            header={
                "model": digest(setting.model.path or setting.model),
                "masks": [list(mask.sites) for mask in setting.masks],
                "weights": list(setting.weights),
                "budget": str(asked.budget),
                "teacher": self._named_teacher(),
                "loss": list(setting.loss),
                **(about or {}),
                **setting.about,
            },
            group=setting.group,
            progress=None if progress is None else _told(progress, asked.stage, module),
        )

    def _named_teacher(self) -> str | None:
        teacher = self.setting.teacher
        if teacher is None or isinstance(teacher, nn.Module):
            return None if teacher is None else "a module"
        return digest(teacher.path or teacher)


class ByGradient(Way):
    """DepthShrinker's: masks learn with the weights."""

    def run(self, asked: Asked) -> Found:
        """One search."""
        pair, module = self.prepare(asked.chooser)
        setting, checkpoint = self.setting, f"{asked.label}.partial"
        hooks = MaskHooks(module, setting.weights, asked.decay)
        about = {"decay": asked.decay}
        trained = self.train(pair, module, hooks, setting.held_out, asked, checkpoint, about)
        return Found(tuple(hooks.course), trained, checkpoint)


class ByLoss(Way):
    """Weights for any masks first, then the masks; the weights serve all strengths of the decay."""

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self._last: tuple[Budget, Trained, SetLoss] | None = None

    def run(self, asked: Asked) -> Found:
        """One search."""
        setting, group = self.setting, self.setting.group
        checkpoint = f"{asked.budget.label}.partial"
        if self._last is None or self._last[0] != asked.budget:
            self._last = asked.budget, *self._weights(asked, checkpoint)
        _, trained, loss = self._last
        costs = [asked.decay * weight for weight in setting.weights]
        seed, told = setting.recipe.seed, self._told(asked.stage)
        sets: SetChoice = group.same(
            choose_set(loss, asked.chooser, costs, seed, told) if group.leads else None
        )
        end = MaskEpoch(setting.recipe.epochs, sets.importance, sets.kept, 0)
        return Found((end,), trained, checkpoint, sets)

    def _weights(self, asked: Asked, checkpoint: str) -> tuple[Trained, SetLoss]:
        setting = self.setting
        pair, module = self.prepare(asked.chooser)
        hooks = DrawnMasks(module, asked.chooser, setting.recipe.seed)
        # Running statistics are of all sets together: there is nothing to judge held-out by.
        trained = self.train(pair, module, hooks, None, asked, checkpoint)
        given = (self._judges(), setting.recipe, setting.group.device)
        return trained, SetLoss(module, pair.teacher, pair.objective, *given)

    def _judges(self) -> Samples:
        """Held-out samples that can tell as much as those to train on, else these."""
        samples, held_out = self.setting.samples, self.setting.held_out
        if held_out is None or (held_out.labels is None and samples.labels is not None):
            return samples
        return held_out

    def _told(self, stage: str) -> Callable[[int, int], None] | None:
        progress = self.setting.progress
        if progress is None:
            return None
        return lambda done, total: progress(f"{stage}: sets of masks", done, total)


def _told(progress: Progress, stage: str, module: MaskedModule) -> Callable[[Told], None]:
    def tell(made: Told) -> None:
        moment = made.moment
        on = "".join("1" if each else "0" for each in module.kept)
        text = f"{stage}: epoch {moment.epoch + 1}/{moment.epochs}, loss {made.loss:.4f}, on {on}"
        progress(text, moment.done + 1, moment.total)

    return tell

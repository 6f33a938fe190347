"""Training of a network: the loop that fine-tuning, search and importance share.

A step is a function of the seed, the epoch and its number: which samples it sees, how they are
changed, what is drawn inside the network. With the checkpoints, a training that was killed ends in
the same bits on a CPU as one that was not. Several processes (`parallel`) train as one: each takes
its share of every batch, and gradients and running statistics are averaged.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from graphfold.calibration.checkpoints import Checkpoint
from graphfold.calibration.evaluating import (
    answers,
    by_channel,
    evaluate,
    gpus,
    last_channels,
    products,
)
from graphfold.calibration.objective import Evaluation, Objective
from graphfold.calibration.parallel import Group
from graphfold.calibration.recipe import Moment, Recipe
from graphfold.calibration.samples import Samples, augment, draw, random_seed
from graphfold.errors import DataError

_SAVED_EVERY = 30.0  # seconds
_TOLD_EVERY = 0.2  # seconds


@dataclass(frozen=True)
class Epoch:
    """What an epoch brought; number 0 is the network before training.

    Attributes:
        number: of the epoch.
        loss: mean over its steps, None before training.
        held_out: on the held-out samples, None where there are none.
    """

    number: int
    loss: float | None
    held_out: Evaluation | None

    def to_json(self) -> dict[str, Any]:
        """Part of a JSON document."""
        held_out = None if self.held_out is None else self.held_out.to_json()
        return {"epoch": self.number, "loss": self.loss, "held_out": held_out}

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Epoch:
        """What `to_json` made."""
        held_out = document["held_out"]
        judged = None if held_out is None else Evaluation.from_json(held_out)
        return cls(document["epoch"], document["loss"], judged)


@dataclass(frozen=True)
class Told:
    """What progress is told.

    Attributes:
        moment: the step that was just made.
        loss: of it.
        last: the last epoch that is over.
    """

    moment: Moment
    loss: float
    last: Epoch


class Hooks:
    """What else happens in a training; a subclass overrides what it needs."""

    def groups(self, module: nn.Module, recipe: Recipe) -> list[dict[str, Any]]:
        """Parameter groups for the optimizer: `params`, `weight_decay`, and `scale` of the rate."""
        trained = [weight for weight in module.parameters() if weight.requires_grad]
        decayed = [weight for weight in trained if weight.ndim > 1]
        others = [weight for weight in trained if weight.ndim <= 1]
        groups = [
            {"params": decayed, "weight_decay": recipe.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]
        return [group for group in groups if group["params"]]

    def before_step(self, moment: Moment) -> None:
        """Called before the network runs."""

    def loss(self, own: Mapping[str, Tensor]) -> Tensor | None:
        """What is added to the loss of these outputs of the student."""
        del own
        return None

    def after_step(self, moment: Moment) -> None:
        """Called after the weights moved."""

    def after_epoch(self, epoch: Epoch) -> bool:
        """Called after each epoch; True ends the training."""
        del epoch
        return False

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of it, besides the module's own parameters and buffers."""
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` gave."""


@dataclass(frozen=True)
class Trained:
    """What came of a training; the module itself holds the state that is kept.

    Attributes:
        epochs: the network before training, and after each epoch.
        kept: number of the epoch whose state the module has.
        steps: how many were made.
        continued: steps that an earlier run had made.
    """

    epochs: tuple[Epoch, ...]
    kept: int
    steps: int
    continued: int

    @property
    def last(self) -> Epoch:
        """The state that the module has."""
        return next(epoch for epoch in self.epochs if epoch.number == self.kept)


def train(
    module: nn.Module,
    teacher: nn.Module | None,
    samples: Samples,
    recipe: Recipe,
    *,
    objective: Objective,
    held_out: Samples | None = None,
    hooks: Hooks | None = None,
    checkpoint: Path | None = None,
    header: Mapping[str, Any] | None = None,
    group: Group | None = None,
    progress: Callable[[Told], None] | None = None,
) -> Trained:
    """Train a network in place.

    Args:
        module: takes tensors by input name, gives tensors by output name: `bridge` with
            `update_statistics=True`, or what wraps one. It ends in evaluation mode.
        teacher: the same, for the objective to compare with; it is not trained.
        samples: to train on.
        recipe: how.
        objective: the loss and what is judged, see `objective.answers`.
        held_out: samples that are judged on before training and after every epoch.
        hooks: what else happens.
        checkpoint: a file that the training can go on from; it stays when the training is over.
        header: what tells this training from others, besides recipe and numbers of samples; a
            checkpoint of another one is refused.
        group: the processes that train together; by default this one, on the CPU.
        progress: called after steps, not more often than a few times a second.

    Raises:
        DataError: too few samples, or the loss is no number any more.
        UsageError: the checkpoint is of another training.
        OutputError: the checkpoint cannot be written.
    """
    run = _Run(
        module, teacher, samples, recipe, objective, held_out, hooks or Hooks(), group or Group()
    )
    about = {
        "recipe": recipe.to_json(),
        "samples": len(samples),
        "held_out": 0 if held_out is None else len(held_out),
        "processes": run.group.size,
        **(header or {}),
    }
    with torch.random.fork_rng(devices=gpus(run.group.device)):
        return run.complete(Checkpoint(checkpoint, about), progress)


class _Run:
    """A training under way."""

    def __init__(
        self,
        module: nn.Module,
        teacher: nn.Module | None,
        samples: Samples,
        recipe: Recipe,
        objective: Objective,
        held_out: Samples | None,
        hooks: Hooks,
        group: Group,
    ) -> None:
        self.module, self.teacher = module.to(group.device), teacher
        if teacher is not None:
            teacher.to(group.device).eval()
        self.samples, self.held_out = samples, held_out
        self.recipe, self.objective, self.hooks, self.group = recipe, objective, hooks, group
        self.batch = samples.batch_size(recipe.batch_size, group.size)
        self.steps = len(samples) // self.batch
        self.mixed = _is_mixed(recipe, group.device)
        for each in (module, teacher):
            for weight in () if each is None else each.parameters():
                weight.data = last_channels(weight.data)
        self.optimizer = _optimizer(hooks.groups(module, recipe), recipe)
        self.history: list[Epoch] = []
        self.taught: dict[int, dict[str, Tensor]] = {}
        self.best: dict[str, Any] | None = None
        self.kept = 0
        self.place = (0, 0)  # epoch and step that come next
        self.sum = torch.zeros((), dtype=torch.float64, device=group.device)  # of losses in it

    def complete(self, checkpoint: Checkpoint, progress: Callable[[Told], None] | None) -> Trained:
        """Make all steps that are left."""
        continued = self._continue(checkpoint)
        if not self.history:
            self._judge(Epoch(0, None, self._held_out()))
        saved = told = time.monotonic()
        while self.place[0] < self.recipe.epochs:
            epoch, first = self.place
            order = self.samples.order(self.batch, self.recipe.seed, epoch)
            for step in range(first, self.steps):
                moment = self._moment(epoch, step)
                loss = self._step(moment, order[step])
                self.place = (epoch, step + 1)
                now = time.monotonic()
                if progress is not None and now - told >= _TOLD_EVERY:
                    progress(Told(moment, float(loss), self.history[-1]))
                    told = now
                # The statistics of several processes are one only at the end of an epoch.
                if now - saved >= _SAVED_EVERY and self.group.size == 1:
                    checkpoint.save(self._state())
                    saved = now
            is_over = self._end_epoch(epoch)
            self.place = (self.recipe.epochs if is_over else epoch + 1, 0)
            if self.group.leads:
                checkpoint.save(self._state())
            saved = time.monotonic()
        if self.recipe.keep == "best" and self.best is not None:
            self.module.load_state_dict(self.best)
        else:
            self.kept = self.history[-1].number
        self.module.eval()
        made = self.history[-1].number * self.steps
        return Trained(tuple(self.history), self.kept, made, continued)

    def _moment(self, epoch: int, step: int) -> Moment:
        rate = self.recipe.rate(epoch * self.steps + step, self.steps, self.batch)
        return Moment(epoch, step, self.steps, self.recipe.epochs, rate)

    def _step(self, moment: Moment, positions: Sequence[int]) -> Tensor:
        """One step down; the loss of this process's share of the batch."""
        keys = (self.recipe.seed, moment.epoch, moment.step)
        torch.manual_seed(random_seed(*keys, self.group.rank))
        drawn = draw(len(positions), *keys)
        rank, processes = self.group.share
        own, numbers = positions[rank::processes], drawn[rank::processes]
        size = self.samples.fixed or len(own)
        self.module.train()
        self.hooks.before_step(moment)
        self.optimizer.zero_grad()
        losses = []
        for start in range(0, len(own), size):
            loss = self._loss(own[start : start + size], numbers[start : start + size])
            part = loss * (size / len(own))
            part.backward()  # type: ignore[no-untyped-call]
            losses.append(part.detach())
        self._descend(moment.rate)
        self.hooks.after_step(moment)
        total = torch.stack(losses).sum()
        self.sum += total
        return total

    def _loss(self, positions: Sequence[int], drawn: Tensor) -> Tensor:
        batch, labels = self.samples.take(positions, self.group.device)
        if self.recipe.augment:
            batch = {name: augment(tensor, drawn) for name, tensor in batch.items()}
        with products(self.group.device, self.mixed):
            own, other = answers(self.module, self.teacher, by_channel(batch))
        loss = self.objective.loss(own, other, labels)
        extra = self.hooks.loss(own)
        return loss if extra is None else loss + extra

    def _descend(self, rate: float) -> None:
        weights = [weight for group in self.optimizer.param_groups for weight in group["params"]]
        self.group.average(weight.grad for weight in weights if weight.grad is not None)
        if self.recipe.clip is not None:
            nn.utils.clip_grad_norm_(weights, self.recipe.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group.get("scale", 1.0)
        self.optimizer.step()

    def _end_epoch(self, epoch: int) -> bool:
        """Judge, and remember; whether the training is over before its time."""
        self.group.average(buffer for buffer in self.module.buffers() if buffer.is_floating_point())
        loss = float(self.group.total(self.sum)) / (self.steps * self.group.size)
        if not math.isfinite(loss):
            raise DataError(
                f"the loss of epoch {epoch + 1} is no number any more",
                hint="a smaller learning rate, or some epochs of warm-up",
            )
        self.sum.zero_()
        found = Epoch(epoch + 1, loss, self._held_out())
        self._judge(found)
        return self.hooks.after_epoch(found)

    def _held_out(self) -> Evaluation | None:
        if self.held_out is None:
            return None
        return evaluate(
            self.module,
            self.teacher,
            self.held_out,
            self.objective,
            mixed=self.mixed,
            group=self.group,
            taught=self.taught,
        )

    def _judge(self, epoch: Epoch) -> None:
        self.history.append(epoch)
        if self.recipe.keep == "last" or epoch.held_out is None:
            return
        scores = [each.held_out.score for each in self.history if each.held_out is not None]
        if epoch.held_out.score > max(scores[:-1], default=-math.inf):
            self.kept = epoch.number
            self.best = {
                name: tensor.detach().clone() for name, tensor in self.module.state_dict().items()
            }

    def _state(self) -> dict[str, Any]:
        return {
            "module": self.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "place": list(self.place),
            "sum": self.sum,
            "history": [epoch.to_json() for epoch in self.history],
            "best": self.best,
            "kept": self.kept,
            "hooks": self.hooks.state(),
        }

    def _continue(self, checkpoint: Checkpoint) -> int:
        """Go on from the checkpoint, if there is one; the steps that were made before."""
        state = self.group.same(checkpoint.load() if self.group.leads else None)
        if state is None:
            return 0
        self.module.load_state_dict(state["module"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.place = (state["place"][0], state["place"][1])
        self.sum.copy_(state["sum"])
        self.history = [Epoch.from_json(item) for item in state["history"]]
        self.best, self.kept = state["best"], state["kept"]
        self.hooks.restore(state["hooks"])
        return self.place[0] * self.steps + self.place[1]


def _optimizer(groups: list[dict[str, Any]], recipe: Recipe) -> torch.optim.Optimizer:
    if recipe.optimizer == "adam":
        return torch.optim.Adam(groups, lr=recipe.learning_rate)
    nesterov = recipe.momentum > 0
    return torch.optim.SGD(
        groups, lr=recipe.learning_rate, momentum=recipe.momentum, nesterov=nesterov
    )


def _is_mixed(recipe: Recipe, device: str) -> bool:
    if recipe.mixed is None:
        return device.startswith("cuda") and torch.cuda.is_bf16_supported()
    return recipe.mixed

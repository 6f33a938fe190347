"""Masks chosen by the loss of whole sets, with weights that were trained for any of them.

The gradient of a mask that is on says what a little more or less of an activation would do, not
what the network is without it, so a search by gradients alone (`masks`) hardly tells masks apart.
Here every step of the training has other masks on, drawn from all sets that fit the budget; the
loss of a set can then be looked at without training it, as one-shot architecture search does (Guo
et al., ECCV 2020: single paths, drawn uniformly). Shared weights say little about one set and more
about a mask in many: a linear fit to the losses of sets says what each mask is worth.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from graphfold.calibration.evaluating import training_loss
from graphfold.calibration.recipe import Moment, Recipe
from graphfold.calibration.training import Hooks

from torch import nn  # isort: skip

if TYPE_CHECKING:
    from graphfold.calibration.masks import MaskedModule
    from graphfold.calibration.objective import Objective
    from graphfold.calibration.samples import Samples
    from graphfold.masking import Chooser, Kept

# Sets that a training draws from: what fits a budget of time takes time to tell.
_POOL = 256
_SAMPLES = 512  # that sets are judged by
_SETS = 64  # that the fit is made to, at least
_SETS_PER_MASK = 4


@dataclass(frozen=True)
class SetChoice:
    """The masks that were chosen, and by what.

    Attributes:
        kept: the masks that are on.
        importance: by what the loss is higher without each mask, by a linear fit to the sets that
            were judged; as all of them fit the budget, without it is with another one.
        loss: of the set that was chosen.
        judged: sets that were drawn, and their losses.
        explained: share of the variance of these losses that the fit explains.
    """

    kept: Kept
    importance: tuple[float, ...]
    loss: float
    judged: tuple[tuple[Kept, float], ...]
    explained: float

    @property
    def mean(self) -> float:
        """Loss of a set that is drawn."""
        return float(np.mean([loss for _, loss in self.judged]))

    def to_json(self) -> dict[str, Any]:
        """Part of the report."""
        return {
            "loss": self.loss,
            "mean_loss": self.mean,
            "explained_by_fit": self.explained,
            "judged": [
                {"kept": [int(on) for on in kept], "loss": loss} for kept, loss in self.judged
            ],
        }


class DrawnMasks(Hooks):
    """A training in which each step has other masks on.

    Args:
        module: that is trained; its importances are not.
        chooser: from any order of the masks to a set that fits the budget.
        seed: of the drawing, which is the same in all processes.
    """

    def __init__(self, module: MaskedModule, chooser: Chooser, seed: int) -> None:
        self._module, self._chooser, self._seed = module, chooser, seed
        module.importance.requires_grad_(False)

    def groups(self, module: nn.Module, recipe: Recipe) -> list[dict[str, Any]]:
        """Those of the network."""
        del module
        return super().groups(self._module.inner, recipe)

    def before_step(self, moment: Moment) -> None:
        """Draw the masks of this step."""
        keys = (self._seed, moment.epoch, moment.step)
        number = int(np.random.default_rng(keys).integers(_POOL))
        self._module.show(_drawn_set(self._chooser, np.random.default_rng((self._seed, number))))


class SetLoss:
    """The loss of a masked network for any set of masks, each looked at once.

    Args:
        module: the network.
        teacher: to learn from, where there is one.
        objective: the loss.
        samples: of which some are taken.
        recipe: of the training: its batch and its seed.
        device: where the network is.
    """

    def __init__(
        self,
        module: MaskedModule,
        teacher: nn.Module | None,
        objective: Objective,
        samples: Samples,
        recipe: Recipe,
        device: str,
    ) -> None:
        chosen = np.random.default_rng(recipe.seed).permutation(len(samples))[:_SAMPLES]
        self._samples = samples.subset(sorted(chosen.tolist()))
        self._module, self._teacher, self._objective = module, teacher, objective
        self._batch, self._seed = self._samples.batch_size(recipe.batch_size), recipe.seed
        self._device = device
        self._known: dict[Kept, float] = {}

    def __call__(self, kept: Kept) -> float:
        """Mean over the samples with these masks on, the module left as it was."""
        if kept not in self._known:
            before = self._module.kept
            self._module.show(kept)
            self._known[kept] = training_loss(
                self._module,
                self._teacher,
                self._samples,
                self._objective,
                batch=self._batch,
                device=self._device,
                seed=self._seed,
            )
            self._module.show(before)
        return self._known[kept]


def choose_set(
    loss: Callable[[Kept], float],
    chooser: Chooser,
    costs: Sequence[float],
    seed: int,
    told: Callable[[int, int], None] | None = None,
) -> SetChoice:
    """The masks that are worth most, less their costs, by the losses of sets that are drawn.

    Args:
        loss: of a set.
        chooser: from importances to a set that fits the budget.
        costs: what each mask that is on adds to the loss.
        seed: of the sets that are drawn.
        told: called with (sets judged, most that will be).
    """
    judged: dict[Kept, float] = {}
    rng, wanted = np.random.default_rng(seed), max(_SETS, _SETS_PER_MASK * len(costs))
    for _ in range(4 * wanted):  # where there are few sets, not so many are different
        kept = _drawn_set(chooser, rng)
        if kept not in judged:
            judged[kept] = loss(kept)
            if told is not None:
                told(len(judged), wanted + 1)
        if len(judged) == wanted:
            break
    worth, explained = _fit(list(judged), list(judged.values()))
    net = [each - cost for each, cost in zip(worth, costs, strict=True)]
    # Within a budget of time the masks that are worth most need not be the set that is.
    kept = max([chooser(net), *judged], key=lambda kept: _sum(net, kept))
    chosen = judged[kept] if kept in judged else loss(kept)
    if told is not None:
        told(wanted + 1, wanted + 1)
    return SetChoice(kept, tuple(worth), chosen, tuple(judged.items()), explained)


def _sum(net: Sequence[float], kept: Kept) -> float:
    return sum(each for each, on in zip(net, kept, strict=True) if on)


def _fit(sets: Sequence[Kept], losses: Sequence[float]) -> tuple[list[float], float]:
    """By how much the loss is higher without each mask, and how much of it that explains."""
    masks = np.array(sets, np.float64)
    masks -= masks.mean(0)
    rest = np.array(losses) - np.mean(losses)
    # Sets of one size have columns that sum to a constant; the ridge settles what that leaves
    # open, and counts as one set more.
    ridge = np.eye(masks.shape[1]) * masks.var(0).mean()
    slopes = np.linalg.lstsq(masks.T @ masks + ridge, masks.T @ rest, rcond=None)[0]
    total = float(rest @ rest)
    left = float(np.sum((rest - masks @ slopes) ** 2))
    return [-float(slope) for slope in slopes], 1 - left / total if total else 1.0


def _drawn_set(chooser: Chooser, rng: np.random.Generator) -> Kept:
    """A set that fits the budget: the masks in any order, as many as it holds."""
    return chooser(_ranks(rng.permutation(chooser.masks).tolist()))


def _ranks(order: Sequence[int]) -> list[float]:
    """Importances that have this order."""
    found = [0.0] * len(order)
    for rank, at in enumerate(order):
        found[at] = float(-rank)
    return found

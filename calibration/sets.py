"""Masks chosen by the loss of whole sets, with weights that were trained for any of them.

The gradient of a mask that is on says what a little more or less of an activation would do, not
what the network is without it, so a search by gradients alone (`masks`) hardly tells masks apart.
Here every step of the training has other masks on, drawn from all sets that fit the budget; the
loss of a set can then be looked at without training it, as one-shot architecture search does (Guo
et al., ECCV 2020: single paths, drawn uniformly). A linear fit to the losses of some sets says what
each mask is worth among the others, and the choice goes on from there to sets with a lower loss,
one mask exchanged for another at a time, since masks stand in for each other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
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
_DRAWN = 32  # sets that the fit is made to, at least
_DRAWN_PER_MASK = 3
_EXCHANGED = 2  # sets that are judged after these, for each of them


@dataclass(frozen=True)
class SetChoice:
    """The masks that were chosen, and by what.

    Attributes:
        kept: the masks that are on.
        importance: by what the loss is higher without each mask, mean over the sets that were
            drawn; as all of them fit the budget, without it is with another one.
        judged: sets in the order of judging, and their losses.
        drawn: how many of them, at the beginning, were drawn.
    """

    kept: Kept
    importance: tuple[float, ...]
    judged: tuple[tuple[Kept, float], ...]
    drawn: int

    @property
    def loss(self) -> float:
        """Of the set that was chosen."""
        return dict(self.judged)[self.kept]

    @property
    def mean(self) -> float:
        """Loss of a set that is drawn."""
        return float(np.mean([loss for _, loss in self.judged[: self.drawn]]))

    def to_json(self) -> dict[str, Any]:
        """Part of the report."""
        return {
            "drawn": self.drawn,
            "loss": self.loss,
            "mean_loss_of_drawn": self.mean,
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
    """The set of masks with the lowest loss and costs that is found.

    Args:
        loss: of a set.
        chooser: from importances to a set that fits the budget.
        costs: what each mask that is on adds to the loss.
        seed: of the sets that are drawn.
        told: called with (sets judged, most that will be).
    """
    search = _SetSearch(loss, chooser, costs, told)
    search.draw(np.random.default_rng(seed))
    worth = search.fit()
    drawn = len(search.judged)
    net = [each - cost for each, cost in zip(worth, costs, strict=True)]
    search.judge(chooser(net))
    search.exchange(net)
    return SetChoice(search.lowest, tuple(worth), tuple(search.judged.items()), drawn)


class _SetSearch:
    """Sets that have been judged, and the lowest among them."""

    def __init__(
        self,
        loss: Callable[[Kept], float],
        chooser: Chooser,
        costs: Sequence[float],
        told: Callable[[int, int], None] | None,
    ) -> None:
        self._loss, self._chooser, self._costs, self._told = loss, chooser, costs, told
        self._wanted = max(_DRAWN, _DRAWN_PER_MASK * len(costs))
        self._most = self._wanted * (1 + _EXCHANGED)
        self.judged: dict[Kept, float] = {}
        self.lowest: Kept = ()

    def judge(self, kept: Kept) -> bool:
        """Look at a set; whether it is the lowest by now."""
        if kept in self.judged:
            return False
        self.judged[kept] = self._loss(kept)
        if self._told is not None:
            self._told(len(self.judged), self._most)
        if self.lowest and self._total(kept) >= self._total(self.lowest):
            return False
        self.lowest = kept
        return True

    def _total(self, kept: Kept) -> float:
        paid = sum(cost for cost, on in zip(self._costs, kept, strict=True) if on)
        return self.judged[kept] + paid

    def draw(self, rng: np.random.Generator) -> None:
        """Judge sets that fit the budget, as many as are wanted or as there seem to be."""
        for _ in range(4 * self._wanted):
            if len(self.judged) == self._wanted:
                return
            self.judge(_drawn_set(self._chooser, rng))

    def fit(self) -> list[float]:
        """By how much the loss is higher without each mask: a linear fit, shrunk a little."""
        masks = np.array(list(self.judged), np.float64)
        losses = np.array(list(self.judged.values()))
        masks -= masks.mean(0)
        # Sets of one size have columns that sum to a constant; the ridge settles what that leaves
        # open, and counts as one set more.
        ridge = np.eye(masks.shape[1]) * masks.var(0).mean()
        slopes = np.linalg.lstsq(
            masks.T @ masks + ridge, masks.T @ (losses - losses.mean()), rcond=None
        )[0]
        return [-float(slope) for slope in slopes]

    def exchange(self, worth: Sequence[float]) -> None:
        """From the lowest set to lower ones nearby, by the fit's order, until there are none."""
        waiting = self._neighbours(worth)
        while len(self.judged) < self._most and (kept := next(waiting, None)) is not None:
            if self.judge(kept):
                waiting = self._neighbours(worth)

    def _neighbours(self, worth: Sequence[float]) -> Iterator[Kept]:
        """The lowest set with one mask off and another one on."""
        on = [at for at, each in enumerate(self.lowest) if each]
        off = [at for at, each in enumerate(self.lowest) if not each]
        on.sort(key=lambda at: -worth[at])
        off.sort(key=lambda at: -worth[at])
        pairs = sorted(
            ((out, into) for out in on for into in off), key=lambda p: worth[p[0]] - worth[p[1]]
        )
        for out, into in pairs:
            order = [into, *(at for at in on if at != out), *(at for at in off if at != into), out]
            yield self._chooser(_ranks(order))


def _drawn_set(chooser: Chooser, rng: np.random.Generator) -> Kept:
    """A set that fits the budget: the masks in any order, as many as it holds."""
    return chooser(_ranks(rng.permutation(chooser.masks).tolist()))


def _ranks(order: Sequence[int]) -> list[float]:
    """Importances that have this order."""
    found = [0.0] * len(order)
    for rank, at in enumerate(order):
        found[at] = float(-rank)
    return found

"""Masks that stand in for each other: exchanged where the loss with the other one is lower.

An importance is what a mask is worth among all sets that were drawn, so of two masks that do the
same both seem worth it, or neither. Once weights have been trained with many sets, the loss of any
set can be looked at without training it (as one-shot architecture searches do; Guo et al., 2020):
importances of masks that are on and off change places, those that lie nearest first, and stay so
where the set that follows has a lower loss.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

if TYPE_CHECKING:
    from graphfold.calibration.masks import MaskedModule
    from graphfold.calibration.objective import Objective
    from graphfold.calibration.parallel import Group
    from graphfold.calibration.samples import Samples

_SETS = 64  # that are judged
_SAMPLES = 512  # by which
_BATCH = 128


class SetLoss:
    """The loss of a masked network as it is, on some of the samples.

    Normalisations take the statistics of the batch, since the running ones are of many sets; they
    are left as they were.

    Args:
        module: the network.
        teacher: to learn from, where there is one.
        objective: the loss.
        samples: of which some are taken.
        group: the processes that train together; one of them judges.
        seed: which samples are taken.
    """

    def __init__(
        self,
        module: MaskedModule,
        teacher: nn.Module | None,
        objective: Objective,
        samples: Samples,
        group: Group,
        seed: int,
    ) -> None:
        chosen = np.random.default_rng(seed).permutation(len(samples))[:_SAMPLES]
        self._samples = samples.subset(sorted(chosen.tolist()))
        self._module, self._teacher, self._objective = module, teacher, objective
        self._group = group

    def __call__(self) -> float:
        """Mean over the samples."""
        found: float = self._group.same(self._judge() if self._group.leads else None)
        return found

    @torch.no_grad()
    def _judge(self) -> float:
        statistics = {name: tensor.clone() for name, tensor in self._module.named_buffers()}
        self._module.train()
        losses = []
        for positions in self._samples.in_order(_BATCH):
            batch, labels = self._samples.take(positions, self._group.device)
            own = self._module(batch)
            other = None if self._teacher is None else self._teacher(batch)
            loss = self._objective.loss(own, other, labels)
            losses.append(float(loss) * len(positions))
        for name, tensor in self._module.named_buffers():
            tensor.copy_(statistics[name])
        return sum(losses) / len(self._samples)


def exchange(
    module: MaskedModule, loss: Callable[[], float], told: Callable[[int, int], None] | None = None
) -> int:
    """Let importances change places while that lowers the loss; how often they did.

    Args:
        module: with importances that have been learned, and the masks that they choose.
        loss: of the module with the masks that are on, and what these cost.
        told: called with (sets judged, most that will be).
    """
    judged = {module.kept: loss()}
    lowest, changes = judged[module.kept], 0
    waiting = _pairs(module.worth, module.kept)
    while (pair := next(waiting, None)) is not None and len(judged) < _SETS:
        before = module.importance.detach().clone()
        with torch.no_grad():
            module.importance[list(pair)] = before[[pair[1], pair[0]]]
        module.decide()
        if module.kept not in judged:
            judged[module.kept] = loss()
            if told is not None:
                told(len(judged), _SETS)
            if judged[module.kept] < lowest:
                lowest, changes = judged[module.kept], changes + 1
                waiting = _pairs(module.worth, module.kept)
                continue
        with torch.no_grad():
            module.importance.copy_(before)
        module.decide()
    return changes


def _pairs(worth: Sequence[float], kept: Sequence[bool]) -> Iterator[tuple[int, int]]:
    """Masks that are on and off, the most equal first."""
    on = [at for at, each in enumerate(kept) if each]
    off = [at for at, each in enumerate(kept) if not each]
    return iter(sorted(((a, b) for a in on for b in off), key=lambda p: worth[p[0]] - worth[p[1]]))

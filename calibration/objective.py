"""What a network is trained for: labels, a teacher's answers, or both; and how well it does.

With a teacher the loss is alpha T^2 KL(teacher || student) at temperature T, plus 1 - alpha times
the cross entropy of the labels (Hinton et al. 2015; DepthShrinker, section 4.3); without labels
the teacher's part is all of it. Outputs that are no classes are matched by their squared error over
the variance of the teacher's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - the usual name

from graphfold.calibration.matching import Target, divergences, find_targets
from graphfold.errors import UsageError

if TYPE_CHECKING:
    from graphfold.model import Model

_SMOOTHING_WITHOUT_TEACHER = 0.1  # as in the papers; a teacher's answers are smooth already

Outputs = Mapping[str, Tensor]


@dataclass(frozen=True)
class Evaluation:
    """How a network does on some samples.

    Attributes:
        samples: their number.
        loss: mean over them, without label smoothing.
        accuracy, worst_class: share of correct classes, of all samples and of the class where it
            is least; None without labels.
        agreement: share of samples that get the teacher's class; None without a teacher.
    """

    samples: int
    loss: float
    accuracy: float | None = None
    worst_class: float | None = None
    agreement: float | None = None

    @property
    def score(self) -> float:
        """What is better is larger: accuracy, else the loss with its sign turned."""
        return -self.loss if self.accuracy is None else self.accuracy

    def to_json(self) -> dict[str, Any]:
        """Part of a JSON document."""
        return {
            "samples": self.samples,
            "loss": self.loss,
            "accuracy": self.accuracy,
            "worst_class": self.worst_class,
            "agreement": self.agreement,
        }

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Evaluation:
        """What `to_json` made."""
        return cls(**document)


class Objective(Protocol):
    """A loss, and sums over samples from which an evaluation is made."""

    def loss(self, own: Outputs, other: Outputs | None, labels: Tensor | None) -> Tensor:
        """Mean over a batch, to be minimised: student's outputs, teacher's outputs, classes."""

    def sums(self, own: Outputs, other: Outputs | None, labels: Tensor | None) -> Tensor:
        """Sums over a batch, in double precision; those of several batches are added."""

    def evaluation(self, sums: Tensor) -> Evaluation:
        """What the sums mean."""


@dataclass(frozen=True)
class Answers:
    """The usual objective: classes, a teacher's answers, or both.

    Attributes:
        targets: outputs that are compared with a teacher's.
        labelled: the output that has the logits of the labels' classes, None without labels.
        classes: their number, 0 without labels.
        alpha: the teacher's part of the loss; 0 without a teacher, 1 without labels.
        temperature: that softens both networks' classes.
        smoothing: of the labels.
    """

    targets: tuple[Target, ...]
    labelled: str | None
    classes: int
    alpha: float
    temperature: float
    smoothing: float

    @property
    def outputs(self) -> list[str]:
        """Tensors that the student has to give."""
        names = [target.student for target in self.targets]
        return list(dict.fromkeys([*names, *([self.labelled] if self.labelled else [])]))

    @property
    def teacher_outputs(self) -> list[str]:
        """Tensors that the teacher has to give."""
        return list(dict.fromkeys(target.teacher for target in self.targets))

    def loss(self, own: Outputs, other: Outputs | None, labels: Tensor | None) -> Tensor:
        """Mean over a batch."""
        parts = []
        if other is not None and self.alpha > 0:
            parts.append(self.alpha * self._divergence(own, other).mean())
        if labels is not None and self.labelled is not None and self.alpha < 1:
            logits = own[self.labelled]
            entropy = F.cross_entropy(logits, labels, label_smoothing=self.smoothing)
            parts.append((1 - self.alpha) * entropy)
        return torch.stack(parts).sum()

    def _divergence(self, own: Outputs, other: Outputs) -> Tensor:
        """For each sample, at a scale of gradients that the temperature does not change."""
        parts = [
            divergences(own[target.student], other[target.teacher], target, self.temperature)
            for target in self.targets
        ]
        return torch.stack(parts).mean(0)

    def sums(self, own: Outputs, other: Outputs | None, labels: Tensor | None) -> Tensor:
        """Samples, loss, agreements, and for each class: correct ones, all."""
        count = len(next(iter(own.values())))
        found = torch.zeros(4 + 2 * self.classes, dtype=torch.float64)
        found[0] = count
        if other is not None:
            found[1] += self.alpha * float(self._divergence(own, other).double().sum())
            logits = next((target for target in self.targets if target.is_logits), None)
            if logits is not None:
                same = own[logits.student].argmax(-1) == other[logits.teacher].argmax(-1)
                found[2], found[3] = float(same.sum()), count
        if labels is not None and self.labelled is not None:
            scores = own[self.labelled]
            if self.alpha < 1:
                entropy = F.cross_entropy(scores.double(), labels, reduction="sum")
                found[1] += (1 - self.alpha) * float(entropy)
            known = labels.cpu()
            right = known[(scores.argmax(-1) == labels).cpu()]
            found[4 : 4 + self.classes] = torch.bincount(right, minlength=self.classes)
            found[4 + self.classes :] = torch.bincount(known, minlength=self.classes)
        return found

    def evaluation(self, sums: Tensor) -> Evaluation:
        """What the sums mean."""
        count, loss, same, compared = sums[:4].tolist()
        right, known = sums[4:].reshape(2, self.classes)
        total = float(known.sum())
        shares = right[known > 0] / known[known > 0]
        return Evaluation(
            samples=int(count),
            loss=loss / max(count, 1),
            accuracy=float(right.sum()) / total if total else None,
            worst_class=float(shares.min()) if total else None,
            agreement=same / compared if compared else None,
        )


def answers(
    student: Model,
    teacher: Model | None,
    *,
    classes: int,
    learns_labels: bool = True,
    alpha: float = 0.7,
    temperature: float = 1.0,
    smoothing: float | None = None,
) -> Answers:
    """The objective of a student.

    Args:
        student: the network that is trained.
        teacher: the network it learns from, None for labels alone.
        classes: number of the labels' classes, 0 where none are known.
        learns_labels: whether it is trained on them, or only judged by them.
        alpha: the teacher's part of the loss where there are labels, too.
        temperature: of the teacher's part.
        smoothing: of labels; by default 0.1 without a teacher and none with one.

    Raises:
        UsageError: neither teacher nor labels, other outputs than the teacher's, or labels and no
            output of classes.
    """
    learns_labels = learns_labels and classes > 0
    if teacher is None and not learns_labels:
        raise UsageError(
            "nothing to learn: there are neither labels nor a teacher",
            hint="give a teacher, or data with labels",
        )
    if not 0 <= alpha <= 1 or not (temperature > 0 and math.isfinite(temperature)):
        raise UsageError(
            f"alpha {alpha} and temperature {temperature}",
            hint="alpha is from 0 to 1, temperature above 0",
        )
    targets = find_targets(student, student if teacher is None else teacher)
    labelled = _labelled(student, targets) if classes else None
    if smoothing is None:
        smoothing = _SMOOTHING_WITHOUT_TEACHER if teacher is None else 0.0
    part = 0.0 if teacher is None else alpha if learns_labels else 1.0
    return Answers(tuple(targets), labelled, classes, part, temperature, smoothing)


def _labelled(student: Model, targets: Sequence[Target]) -> str:
    """The output that labels belong to: logits, else the only output of two axes."""
    logits = [target.student for target in targets if target.is_logits]
    if logits:
        return logits[0]
    flat = [
        value.name or ""
        for value in student.ir.graph.outputs
        if value.shape is not None and len(value.shape) == 2
    ]
    if len(flat) != 1:
        raise UsageError(
            "the data have labels, but no output of the network is one score for each class",
            hint="leave the labels out to learn from the teacher alone",
        )
    return flat[0]

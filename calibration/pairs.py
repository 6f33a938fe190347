"""A student and its teacher in torch, checked against each other and the samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from graphfold.calibration.bridge import OnnxModule, bridge
from graphfold.calibration.evaluating import evaluate
from graphfold.calibration.matching import Target
from graphfold.calibration.objective import Answers, Evaluation, answers
from graphfold.calibration.parallel import Group
from graphfold.calibration.samples import Samples
from graphfold.errors import DataError, ModelError, UsageError
from graphfold.graph import Graph

if TYPE_CHECKING:
    from graphfold.model import Model

# Batches below this say too little about a channel's mean and variance to normalise by.
_SMALLEST_NORMED_BATCH = 8


@dataclass(frozen=True)
class Pair:
    """A student in torch, its teacher, and what the student is trained for."""

    student: OnnxModule
    teacher: nn.Module | None
    objective: Answers

    def judge_teacher(self, held_out: Samples | None, group: Group) -> Evaluation | None:
        """How the teacher does on samples with labels."""
        if self.teacher is None or held_out is None or held_out.labels is None:
            return None
        names = {target.teacher: target.student for target in self.objective.targets}
        stand_in = _Renamed(self.teacher, {}, names)
        alone = replace(self.objective, alpha=0.0)
        return evaluate(stand_in, None, held_out, alone, group=group)


def pair_up(
    student: Model,
    teacher: Model | nn.Module | None,
    samples: Samples,
    held_out: Samples | None,
    alpha: float,
    temperature: float,
    smoothing: float | None,
) -> Pair:
    """Student and teacher in torch, checked against each other and the samples.

    Args:
        student: to train, in float32.
        teacher: a network with the same outputs, None for labels alone. A module takes tensors by
            the order of the samples' arrays, and gives what the student's outputs are; arrays that
            the student has no input for are for the teacher alone.
        samples: to train on.
        held_out: to judge on.
        alpha: the teacher's part of the loss, see `objective.answers`.
        temperature: of the teacher's part.
        smoothing: of the labels.

    Raises:
        UsageError: nothing to learn from, or a teacher of another interface.
        DataError: labels that the network has no class for. ModelError: weights not in float32.
        BridgeError: a network does not run in torch.
    """
    classes = max(samples.classes, 0 if held_out is None else held_out.classes)
    options: dict[str, Any] = {
        "classes": classes,
        "learns_labels": samples.labels is not None,
        "alpha": alpha,
        "temperature": temperature,
        "smoothing": smoothing,
    }
    master: nn.Module | None
    if isinstance(teacher, nn.Module):
        objective = answers(student, student, **options)
        objective = replace(objective, targets=_as_given(student, objective.targets))
        master = _Named(teacher, [value.name or "" for value in student.ir.graph.outputs])
    else:
        alias, names = (None, {}) if teacher is None else _aliases(student, teacher)
        objective = answers(student, alias, **options)
        master = None
        if alias is not None:
            inner = bridge(alias, outputs=objective.teacher_outputs)
            master = _Renamed(inner, names, {})
    # The batch of a network that insists on a small one says nothing of statistics.
    normed = samples.fixed is None or samples.fixed >= _SMALLEST_NORMED_BATCH
    module = bridge(student, outputs=objective.outputs, update_statistics=normed)
    module.takes_more = isinstance(teacher, nn.Module)
    wrong = [name for name, weight in module.weights.items() if weight.dtype != torch.float32]
    if wrong:
        raise ModelError(
            f"weights that are not float32 are not trained: {', '.join(wrong[:5])}",
            hint="train the float32 file",
        )
    pair = Pair(module, master, objective)
    _check(pair, samples)
    return pair


def _check(pair: Pair, samples: Samples) -> None:
    """Run one batch, to refuse outputs that do not fit before any training."""
    batch, _ = samples.take(range(samples.fixed or 1))
    pair.student.eval()
    with torch.no_grad():
        own = pair.student(batch)
        other = {} if pair.teacher is None else pair.teacher.eval()(batch)
    for target in pair.objective.targets if pair.teacher is not None else ():
        shapes = [tuple(own[target.student].shape), tuple(other[target.teacher].shape)]
        if shapes[0] != shapes[1]:
            raise UsageError(
                f"the teacher's {target.teacher} is {shapes[1]}, the network's is {shapes[0]}",
                hint="a teacher has the same outputs as its student",
            )
    name = pair.objective.labelled
    if name is not None and own[name].shape[-1] < pair.objective.classes:
        raise DataError(
            f"labels up to {pair.objective.classes - 1}, and the network has "
            f"{own[name].shape[-1]} classes",
            hint="classes are counted from 0",
        )


# --- teachers ---------------------------------------------------------------------------------


class _Renamed(nn.Module):
    """A network under other names of its inputs and outputs."""

    def __init__(
        self, inner: nn.Module, inputs: Mapping[str, str], outputs: Mapping[str, str]
    ) -> None:
        super().__init__()
        self.inner = inner
        self._inputs, self._outputs = dict(inputs), dict(outputs)

    def forward(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run it."""
        given = {self._inputs.get(name, name): tensor for name, tensor in batch.items()}
        found: dict[str, Tensor] = self.inner(given)
        return {self._outputs.get(name, name): tensor for name, tensor in found.items()}


class _Named(nn.Module):
    """A user's module, its outputs by name."""

    def __init__(self, inner: nn.Module, outputs: Sequence[str]) -> None:
        super().__init__()
        self.inner = inner
        self._outputs = list(outputs)

    def forward(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run it."""
        found = self.inner(*batch.values())
        if isinstance(found, Mapping):
            return dict(found)
        given = [found] if isinstance(found, Tensor) else list(found)
        if len(given) != len(self._outputs):
            raise UsageError(
                f"the teacher gives {len(given)} outputs where {', '.join(self._outputs)} are "
                "wanted"
            )
        return dict(zip(self._outputs, given, strict=True))


def _as_given(student: Model, targets: Sequence[Target]) -> tuple[Target, ...]:
    """A module gives the outputs themselves, not the logits behind them."""
    names = [value.name or "" for value in student.ir.graph.outputs]
    return tuple(
        target if target.student == name else Target(name, name, False)
        for target, name in zip(targets, names, strict=True)
    )


def _aliases(student: Model, teacher: Model) -> tuple[Model, dict[str, str]]:
    """A teacher whose only output has the student's name, and its names of the inputs.

    Raises:
        UsageError: several inputs or outputs of other names.
    """
    wanted, given = _inputs(student), _inputs(teacher)
    if set(wanted) != set(given) and (len(wanted), len(given)) != (1, 1):
        raise UsageError(
            f"the teacher's inputs are {', '.join(given)}, the network's are {', '.join(wanted)}",
            hint="a teacher takes the same inputs as its student",
        )
    inputs = {} if set(wanted) == set(given) else dict(zip(wanted, given, strict=True))
    outputs = [list(each.ir.graph.outputs) for each in (student, teacher)]
    names = [[value.name or "" for value in each] for each in outputs]
    if sorted(names[0]) != sorted(names[1]) and len(names[0]) == len(names[1]) == 1:
        teacher = teacher.clone()
        graph = Graph(teacher)
        if names[0][0] in graph.values():
            graph.values()[names[0][0]].name = graph.fresh_name(names[0][0])
        teacher.ir.graph.outputs[0].name = names[0][0]
    return teacher, inputs


def _inputs(model: Model) -> list[str]:
    return [item.name or "" for item in model.ir.graph.inputs if not item.is_initializer()]

"""What a student network is compared with its teacher by: outputs, and how far apart they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - the usual name

from graphfold.errors import UsageError
from graphfold.graph import is_op
from graphfold.tensors import values_by_name

if TYPE_CHECKING:
    from graphfold.model import Model

_TINY = 1e-12
_PASSES_LOGITS_ON = ("Identity", "Reshape", "Flatten", "Squeeze", "Add")


@dataclass(frozen=True)
class Target:
    """One output to match: the tensor's name in each model, and whether it holds logits."""

    student: str
    teacher: str
    is_logits: bool


def find_targets(student: Model, teacher: Model) -> list[Target]:
    """The outputs of two models, by name, in the student's order.

    Raises:
        UsageError: they do not have the same outputs.
    """
    found = []
    outputs = [
        [value.name or "" for value in model.ir.graph.outputs] for model in (student, teacher)
    ]
    if sorted(outputs[0]) != sorted(outputs[1]):
        raise UsageError(
            f"the student's outputs are {', '.join(outputs[0])}, the teacher's are "
            f"{', '.join(outputs[1])}",
            hint="a teacher has the same outputs as its student",
        )
    for name in outputs[0]:
        own, own_is_logits = _logits(student, name)
        other, other_is_logits = _logits(teacher, name)
        both = own_is_logits and other_is_logits
        found.append(Target(own, other, True) if both else Target(name, name, False))
    return found


def _logits(model: Model, name: str) -> tuple[str, bool]:
    """The tensor of logits behind an output, and whether there is one.

    Classes are what a Softmax makes over the last of two axes, and what a fully connected layer
    gives at the end.
    """
    value = values_by_name(model.ir.graph)[name]
    rank = None if value.shape is None else len(value.shape)
    node = value.producer()
    if is_op(node, "Identity") and node is not None and node.inputs[0] is not None:
        value, node = node.inputs[0], node.inputs[0].producer()
    if rank != 2 or node is None:
        return name, False
    if is_op(node, "Softmax", "LogSoftmax") and node.inputs[0] is not None:
        return node.inputs[0].name or "", True
    while node is not None and is_op(node, *_PASSES_LOGITS_ON):
        makers = [item.producer() for item in node.inputs if item is not None]
        node = next((n for n in makers if n is not None and not is_op(n, "Constant")), None)
    return value.name or "", is_op(node, "Gemm", "MatMul")


def divergences(
    student: Tensor, teacher: Tensor, target: Target, temperature: float = 1.0
) -> Tensor:
    """How far apart they are, for each image: of classes, the Kullback-Leibler divergence.

    At a scale of gradients that the temperature does not change.
    """
    if target.is_logits:
        own = F.log_softmax(student / temperature, -1)
        other = F.log_softmax(teacher / temperature, -1)
        apart = F.kl_div(own, other, reduction="none", log_target=True).sum(-1)
        return temperature**2 * apart
    return normalised_errors(student, teacher)


def normalised_errors(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared error for each image, over the variance of the teacher's tensor."""
    squares = (student - teacher).square().reshape(len(teacher), -1).mean(1)
    return squares / (teacher.var(correction=0) + _TINY)

"""Insert the free activations that a plan adds: y becomes act(y) under y's own name.

This is the plan's meaning, not an equality: it builds the reference network. The activation
stands behind the segment, after the residual Add when the segment holds one (DepthShrinker 4.3,
LayerMerge appendix A). What leaves keeps the tensor's name; the tensor before the activation is
`<name>/graphfold.N`. Each function is spelled as one operator where the model's opset has it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from graphfold.resolve import AddedAt
from graphfold.rewrite import Pass, Phase, Work
from graphfold.steps import Step, insert_behind

_SINCE = {"GELU": 9}  # opsets without the operators that a function is made of


@dataclass(frozen=True)
class InsertActivations(Pass):
    """Add the plan's free activations."""

    name: ClassVar[str] = "insert_activations"
    phase: ClassVar[Phase] = Phase.PLAN
    order: ClassVar[int] = 3

    def find(self, work: Work) -> Iterable[AddedAt]:
        """Additions that are not in the graph yet."""
        return list(work.plan.added)

    def label(self, candidate: AddedAt) -> str:
        """The activation's JSON path."""
        return candidate.path

    def check(self, work: Work, candidate: AddedAt) -> str | None:
        """Refuse functions that the model's opset has no operators for."""
        needed = _SINCE.get(str(candidate.activation), 1)
        if candidate.steps is None and work.graph.opset < needed:
            return f"{candidate.activation} needs opset {needed}, the model has {work.graph.opset}"
        return None

    def rewrite(self, work: Work, candidate: AddedAt) -> None:
        """Build the activation behind the tensor and let it take the tensor's name."""
        graph, value = work.graph, candidate.value
        work.plan.added = [added for added in work.plan.added if added is not candidate]
        steps: Sequence[Step] = candidate.steps or _spelling(str(candidate.activation), graph.opset)
        result = insert_behind(graph, value, steps)
        for segment in work.plan.segments:
            if segment.input is value:
                segment.input = result


def _spelling(activation: str, opset: int) -> list[Step]:
    """Steps that compute a function at an opset; floats are constants."""
    if activation == "Relu6":
        if opset >= 11:
            return [("Clip", ("x", 0.0, 6.0), {})]
        return [("Clip", ("x",), {"min": 0.0, "max": 6.0})]
    if activation == "SiLU":
        return [("Sigmoid", ("x",), {}), ("Mul", ("x", 0), {})]
    if activation == "HardSwish":
        if opset >= 14:
            return [("HardSwish", ("x",), {})]
        gate: Step = ("HardSigmoid", ("x",), {"alpha": 1.0 / 6.0, "beta": 0.5})
        return [gate, ("Mul", ("x", 0), {})]
    if activation == "Mish" and opset < 18:
        return [("Softplus", ("x",), {}), ("Tanh", (0,), {}), ("Mul", ("x", 1), {})]
    if activation == "GELU":
        if opset >= 20:
            return [("Gelu", ("x",), {})]
        half: list[Step] = [("Mul", ("x", float(np.sqrt(0.5))), {}), ("Erf", (0,), {})]
        return [*half, ("Add", (1, 1.0), {}), ("Mul", ("x", 2), {}), ("Mul", (3, 0.5), {})]
    return [(activation, ("x",), {})]

"""Activations that a plan removes, faded out while the network trains.

What trains is the plan's reference network, with the activations put back between their tensors
at first: x becomes a act(x) + (1 - a) x, and the schedule moves a from one to zero. At zero nothing
is left of them, so that what is trained in the end is the reference network itself and folds
exactly. A network that loses its activations at once loses what it has learned; this one adapts on
the way.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from graphfold.calibration.bridge import OnnxModule, bridge
from graphfold.calibration.training import Hooks
from graphfold.errors import Problem, ProblemsError, UsageError
from graphfold.graph import Graph, consumers
from graphfold.plan import PlanSource, read_plan
from graphfold.resolve import resolve_plan
from graphfold.sites import ActivationSite

if TYPE_CHECKING:
    from graphfold.calibration.recipe import Moment, Recipe
    from graphfold.model import Model


class AnnealingError(ProblemsError):
    """Activations that cannot be faded out; all of them at once."""

    subject = "plan for annealing"


class Annealing(Hooks):
    """Fades out what a plan removes; give it to `finetune` beside the plan.

    Args:
        model: the model that the plan is for.
        plan: its activations are removed one by one or within segments.
        start, stop: shares of the training between which they fade, linearly.

    Raises:
        PlanError: the plan does not fit. UsageError: shares out of order.
        AnnealingError: activations whose input something else reads, too.
    """

    def __init__(
        self, model: Model, plan: PlanSource, start: float = 0.1, stop: float = 0.5
    ) -> None:
        if not 0 <= start < stop <= 1:
            raise UsageError(
                f"activations that fade from {start} to {stop} of the training",
                hint="the first is smaller, both are between 0 and 1",
            )
        self.start, self.stop = start, stop
        self.share = 1.0
        graph = Graph(model)
        resolved = resolve_plan(graph, read_plan(plan))
        sites = [site for segment in resolved.segments for site in segment.activations]
        found = dict.fromkeys((*sites, *resolved.activations))
        problems = [Problem(site.name, why) for site in found if (why := _why_not(site))]
        if not found:
            raise UsageError("the plan removes no activations that could fade")
        if problems:
            raise AnnealingError(problems)
        self._model = model
        self._sites = tuple(found)

    def groups(self, module: nn.Module, recipe: Recipe) -> list[dict[str, Any]]:
        """Puts the activations into the module; parameters are as ever."""
        if recipe.keep != "last":
            raise UsageError(
                "the best epoch may have activations that the plan removes", hint="keep the last"
            )
        assert isinstance(module, OnnxModule)
        problems = [
            Problem(site.name, "the plan leaves nothing where it stood")
            for site in self._sites
            if not _is_there(module, site)
        ]
        if problems:
            raise AnnealingError(problems)
        groups = super().groups(module, recipe)
        device = next(module.parameters()).device
        for site in self._sites:
            source, output = site.input.name or "", site.name
            part = bridge(self._model, inputs=[source], outputs=[output])
            part.to(device).eval().requires_grad_(False)
            module.changes[source] = self._faded(part, output)
        return groups

    def _faded(self, activation: OnnxModule, output: str) -> Callable[[Tensor], Tensor]:
        def change(tensor: Tensor) -> Tensor:
            if self.share <= 0:
                return tensor
            active: Tensor = activation(tensor)[output]
            if self.share >= 1:
                return active
            # Where products are made in bfloat16, a spelled-out function may come out wider.
            return torch.lerp(tensor, active.to(tensor.dtype), self.share)

        return change

    def before_step(self, moment: Moment) -> None:
        """The share that a step is made with."""
        self.share = self.at(moment.done / moment.total)

    def after_step(self, moment: Moment) -> None:
        """The share that the network is judged with, and kept with at the end."""
        self.share = self.at((moment.done + 1) / moment.total)

    def at(self, done: float) -> float:
        """What is left of the activations when a share of the training is done."""
        left = (self.stop - done) / (self.stop - self.start)
        return 0.0 if math.isclose(left, 0, abs_tol=1e-9) else min(max(left, 0.0), 1.0)

    def state(self) -> dict[str, Any]:
        """What is left of the activations."""
        return {"share": self.share}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on with what was left."""
        self.share = state["share"]


def _why_not(site: ActivationSite) -> str | None:
    others = [node for node in consumers(site.input) if node not in site.nodes]
    if others or site.input.is_graph_output():
        return f"something else reads {site.input.name!r}, which it reads"
    return "it reads an input" if site.input.producer() is None else None


def _is_there(module: OnnxModule, site: ActivationSite) -> bool:
    """Whether the tensor that the activation reads is still made as it was."""
    before, call = site.input.producer(), module.maker(site.input.name or "")
    return before is not None and call is not None and call.op_type == before.op_type

"""Masks on activations in torch: binary in the forward, their gradient passed straight through.

As in DepthShrinker, section 4.2: an activation is on or off, by whether its mask is among those
that are kept, and the gradient of the binary mask is the gradient of the number m behind it, with
no clamp, so that m learns wherever it stands. The decay is latency-weighted: strength * w |m|, with
w the time that goes with the activation, so that costly ones lose importance.

Which masks are on is chosen anew after every epoch, not after every step. A mask that is off is
wanted back until the weights have learned to do without it, and the order of the importances does
not depend on the size of the steps: chosen at every step, the masks at the border take turns to the
end, and the weights fit no set of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, nn

from graphfold.calibration.torch_table import Call, operator
from graphfold.calibration.training import Epoch, Hooks
from graphfold.graph import Graph
from graphfold.masking import Kept, Mask
from graphfold.sites import find_sites

if TYPE_CHECKING:
    from graphfold.calibration.recipe import Recipe
    from graphfold.model import Model

# Where every m starts: equal, and on the side where the decay lowers it.
START = 1.0
_OPERATOR = "GraphfoldMask"


class _Masked(torch.autograd.Function):
    """active where the mask is on, plain where it is off; the mask's gradient is of both."""

    @staticmethod
    def forward(ctx: Any, active: Tensor, plain: Tensor, keep: Tensor) -> Tensor:
        ctx.save_for_backward(active, plain)
        ctx.kept = bool(keep > 0.5)
        chosen = active if ctx.kept else plain
        return chosen.view_as(chosen)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        active, plain = ctx.saved_tensors
        own = None
        if ctx.needs_input_grad[2]:
            own = (gradient.float() * (active.float() - plain.float())).sum()
        return (gradient, None, own) if ctx.kept else (None, gradient, own)


@operator(_OPERATOR, settings=(2,))
def _mask(call: Call, active: Tensor, plain: Tensor, keep: Tensor) -> Tensor:
    del call
    found: Tensor = _Masked.apply(active, plain, keep)  # type: ignore[no-untyped-call]
    return found


def with_masks(model: Model, masks: Sequence[Mask]) -> tuple[Model, tuple[str, ...]]:
    """A copy of a model for `bridge`, each activation of a mask with its input at hand.

    Returns:
        the copy, and the names of the tensors that say which masks are on; all are.
    """
    copy = model.clone()
    graph = Graph(copy)
    sites = {site.name: site for site in find_sites(graph).activations}
    names: list[str] = []
    instead: dict[ir.Value, ir.Value] = {}
    for number, mask in enumerate(masks):
        keep = graph.add_initializer(f"mask_{number}", np.ones((), np.float32))
        names.append(keep.name or "")
        for name in mask.sites:
            site = sites[name]
            plain = instead.get(site.input, site.input)
            node = ir.Node("", _OPERATOR, [site.output, plain, keep])
            node.outputs[0].name = graph.fresh_name(f"{name}_masked")
            for usage in list(site.output.uses()):
                if usage.node is not node:
                    usage.node.replace_input_with(usage.idx, node.outputs[0])
            graph.ir.insert_after(site.nodes[-1], node)
            instead[site.output] = node.outputs[0]
    return copy, tuple(names)


class MaskedModule(nn.Module):
    """A network and the importances of its masks, which choose what is on in every run.

    Args:
        inner: takes tensors by input name, those of `names` among them.
        names: of the tensors that say which masks are on.
        choose: from importances to masks.
    """

    def __init__(
        self, inner: nn.Module, names: Sequence[str], choose: Callable[[Sequence[float]], Kept]
    ) -> None:
        super().__init__()
        self.inner = inner
        self.importance = nn.Parameter(torch.full((len(names),), START))
        self.register_buffer("binary", torch.ones(len(names)))
        self.binary: Tensor
        self._names, self._choose = tuple(names), choose
        self.decide()

    @property
    def worth(self) -> tuple[float, ...]:
        """The importances as numbers."""
        return tuple(self.importance.tolist())

    @property
    def kept(self) -> Kept:
        """The masks that are on."""
        return tuple(bool(on) for on in self.binary.tolist())

    def decide(self) -> None:
        """Choose anew, by the importances as they are now."""
        self.show(self._choose(self.worth))

    def show(self, kept: Kept) -> None:
        """Have these masks on until others are chosen."""
        self.binary.copy_(torch.tensor(kept, dtype=torch.float32))

    def forward(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run it; the gradient of each binary mask is that of its importance."""
        through = self.binary + (self.importance - self.importance.detach())
        feeds = {**batch, **dict(zip(self._names, through.unbind(), strict=True))}
        found: dict[str, Tensor] = self.inner(feeds)
        return found


@dataclass(frozen=True)
class MaskEpoch:
    """Where the masks stand after an epoch; number 0 is before the first.

    Attributes:
        number: of the epoch.
        importance: m of every mask.
        kept: which are on from then on.
        changes: masks that were switched at its end.
    """

    number: int
    importance: tuple[float, ...]
    kept: Kept
    changes: int

    def to_json(self) -> dict[str, Any]:
        """Part of a JSON document."""
        return {
            "epoch": self.number,
            "importance": list(self.importance),
            "kept": [int(on) for on in self.kept],
            "changes": self.changes,
        }

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> MaskEpoch:
        """What `to_json` made."""
        kept = tuple(bool(on) for on in document["kept"])
        return cls(document["epoch"], tuple(document["importance"]), kept, document["changes"])


class MaskHooks(Hooks):
    """Importances in the optimizer, the decay in the loss, and the course of both.

    Args:
        module: that is trained.
        weights: of each mask in the decay, in proportion to what its removal saves.
        strength: of the decay.

    Attributes:
        course: the masks before the search, and after each epoch.
    """

    def __init__(self, module: MaskedModule, weights: Sequence[float], strength: float) -> None:
        self._module, self._strength = module, strength
        self._weights = torch.tensor(weights, dtype=torch.float32)
        self.course = [MaskEpoch(0, module.worth, module.kept, 0)]

    def groups(self, module: nn.Module, recipe: Recipe) -> list[dict[str, Any]]:
        """Those of the network, and the importances, which only this decay lowers."""
        del module
        own = {"params": [self._module.importance], "weight_decay": 0.0}
        return [*super().groups(self._module.inner, recipe), own]

    def loss(self, own: Mapping[str, Tensor]) -> Tensor | None:
        """The decay: strength * sum of w |m|."""
        del own
        importance = self._module.importance
        weights = self._weights.to(importance.device)
        return self._strength * (weights * importance.abs()).sum()

    def after_epoch(self, epoch: Epoch) -> bool:
        """Choose what is on in the next epoch, and remember where the masks stand."""
        before = self._module.kept
        self._module.decide()
        kept = self._module.kept
        changes = sum(a != b for a, b in zip(before, kept, strict=True))
        self.course.append(MaskEpoch(epoch.number, self._module.worth, kept, changes))
        return False

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"course": [each.to_json() for each in self.course]}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
        self.course = [MaskEpoch.from_json(item) for item in state["course"]]


def stable_since(course: Sequence[MaskEpoch]) -> int:
    """The epoch since whose end the same masks were on, 0 where they never changed."""
    return max((each.number for each in course if each.changes), default=0)

"""What a search may mask, and which masks stay on: sites of activations, budgets, the choice.

DepthShrinker (section 4.2) gives every block, or every activation, one number that says how
important it is; those with the largest numbers are kept. How many follows from the budget.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import onnx_ir as ir

from graphfold.candidates import Candidates
from graphfold.errors import BudgetError, UsageError
from graphfold.segments import inverted_residuals
from graphfold.sites import ActivationSite

Per = Literal["block", "activation"]
Unit = Literal["keep", "speedup", "ms"]
Kept = tuple[bool, ...]
# Whole latency in milliseconds without the activations of these masks.
Latency = Callable[[frozenset[int]], float]


@dataclass(frozen=True)
class Block:
    """A block that may become one convolution, with the activations inside.

    Attributes:
        input, output: what its first convolution reads, and its last tensor.
        activations: in execution order.
        pays: false where one convolution is sure to cost more: a block that does not expand.
    """

    input: ir.Value
    output: ir.Value
    activations: tuple[ActivationSite, ...]
    pays: bool = True


@dataclass(frozen=True)
class Mask:
    """Activations that are kept or removed together.

    Attributes:
        name: the block's output, or the activation's name.
        sites: names of the activations.
        block: the block that they are of, None for single activations.
    """

    name: str
    sites: tuple[str, ...]
    block: Block | None = None


@dataclass(frozen=True)
class Budget:
    """What a choice of masks must fit.

    Attributes:
        unit: masks that are kept, speedup over the model as it is, or milliseconds.
        value: of it.
    """

    unit: Unit
    value: float

    def __str__(self) -> str:
        return f"{self.unit} {self.value:g}"

    @property
    def label(self) -> str:
        """Of files."""
        return f"{self.unit}-{self.value:g}"

    def to_json(self) -> dict[str, float]:
        """Part of a JSON document."""
        return {self.unit: int(self.value) if self.unit == "keep" else self.value}


def find_blocks(candidates: Candidates) -> list[Block]:
    """Blocks to choose among: inverted residuals, in a network without any the residual ones."""
    inverted = [
        Block(block.input, block.output, block.activations, block.expand is not None)
        for block in inverted_residuals(candidates.graph, candidates.sites)
    ]
    return inverted or list(_residual_blocks(candidates))


def _residual_blocks(candidates: Candidates) -> Iterator[Block]:
    """Segments over a join that hold no other such segment."""
    joining = [each for each in candidates.found if each.adds]
    for each in joining:
        nodes = set(each.nodes)
        if not any(nodes > set(other.nodes) for other in joining):
            yield Block(each.input, each.output, each.activations)


def find_masks(candidates: Candidates, per: Per = "block", *, ends: bool = False) -> list[Mask]:
    """The masks of a graph, in execution order.

    Args:
        candidates: of the graph.
        per: a mask for each block, or for each activation that a segment can hold inside.
        ends: masks for the network's first and last activation, too.

    Raises:
        UsageError: there is nothing to choose from.
    """
    if per not in get_args(Per):
        raise UsageError(f"--per {per!r} is not known", hint="block or activation")
    first_and_last = [site for site in _ends(candidates) if not site.output.is_graph_output()]
    if per == "activation":
        inside = {site for each in candidates.found for site in each.activations}
        chosen = inside - set(first_and_last) | set(first_and_last if ends else ())
        masks = [Mask(site.name, (site.name,)) for site in candidates.sites.activations]
        masks = [
            mask
            for mask, site in zip(masks, candidates.sites.activations, strict=True)
            if site in chosen
        ]
    else:
        masks = [
            Mask(block.output.name or "", tuple(site.name for site in block.activations), block)
            for block in find_blocks(candidates)
            if block.activations
        ]
        taken = {name for mask in masks for name in mask.sites}
        loose = [Mask(s.name, (s.name,)) for s in first_and_last if ends and s.name not in taken]
        order = {site.name: number for number, site in enumerate(candidates.sites.activations)}
        masks = sorted([*masks, *loose], key=lambda mask: order[mask.sites[0]])
    if len(masks) > 1:
        return masks
    what = "blocks" if per == "block" else "activations between convolutions"
    raise UsageError(
        f"the model has {len(masks) or 'no'} {what} that could be merged: nothing to choose among",
        hint="--per activation" if per == "block" else "graphfold inspect --segments says why",
    )


def _ends(candidates: Candidates) -> Sequence[ActivationSite]:
    sites = candidates.sites.activations
    return [sites[0], sites[-1]] if len(sites) > 1 else list(sites)


# --- the choice -------------------------------------------------------------------------------


class Chooser:
    """From importances to the masks that stay on; equal importances have an order, too.

    Of equally important masks those that save less are kept, then those that come first.

    Args:
        budget: what the choice must fit.
        savings: milliseconds that each mask's removal saves, 0 where it is not known.
        latency: for budgets of time.
        original: milliseconds of the model as it is, for speedups.

    Raises:
        UsageError: a budget that keeps all or nothing. BudgetError: none that can be met.
    """

    def __init__(
        self,
        budget: Budget,
        savings: Sequence[float],
        latency: Latency | None = None,
        original: float | None = None,
    ) -> None:
        self._savings = tuple(savings)
        self._latency = latency
        self._limit = 0.0
        self._known: dict[tuple[int, ...], Kept] = {}
        count = len(savings)
        self._count = int(budget.value) if budget.unit == "keep" else None
        if self._count is not None:
            if not 0 < self._count < count or self._count != budget.value:
                raise UsageError(
                    f"{budget.value:g} of {count} masks cannot be kept",
                    hint=f"--keep takes 1 to {count - 1}",
                )
            return
        if latency is None or original is None or budget.value <= 0:
            raise UsageError(f"{budget}: a budget of time is above 0 and needs latencies")
        self._limit = original / budget.value if budget.unit == "speedup" else budget.value
        fastest = latency(frozenset(range(count)))
        if fastest >= latency(frozenset()):
            raise BudgetError(
                f"{budget}: without any of the {count} masks the network is no faster, since no "
                "merge that this allows is faster than what it replaces on the device of the "
                "latency table",
                hint="--keep chooses by number",
            )
        if fastest > self._limit * (1 + 1e-9):
            raise BudgetError(
                f"without any of the {count} masks the network takes {fastest:.3f} ms, "
                f"{original / fastest:.2f} times the speed of the model as it is; {budget} was "
                "asked for",
                hint="ask for less",
            )
        if latency(frozenset()) <= self._limit:
            raise UsageError(
                f"{budget}: nothing has to go for that", hint="ask for more, or use --keep"
            )

    @property
    def masks(self) -> int:
        """Their number."""
        return len(self._savings)

    def __call__(self, importance: Sequence[float]) -> Kept:
        """The masks that stay on, largest importance first until the budget is full."""
        order = sorted(
            range(len(importance)), key=lambda at: (-importance[at], self._savings[at], at)
        )
        if self._count is not None:
            kept = set(order[: self._count])
            return tuple(at in kept for at in range(len(order)))
        found = self._known.get(tuple(order))
        if found is None:
            found = self._known[tuple(order)] = self._within(order)
        return found

    def _within(self, order: Sequence[int]) -> Kept:
        """The least important go until the rest fits; what need not have gone comes back."""
        assert self._latency is not None
        limit = self._limit * (1 + 1e-9)
        low, high = 0, len(order)  # the latency falls with every mask that goes
        while low < high:
            middle = (low + high) // 2
            if self._latency(frozenset(order[len(order) - middle :])) <= limit:
                high = middle
            else:
                low = middle + 1
        removed = set(order[len(order) - high :])
        for at in [mask for mask in order if mask in removed]:
            if self._latency(frozenset(removed - {at})) <= limit:
                removed.discard(at)
        return tuple(at not in removed for at in range(len(order)))

r"""Positions for the cut tensors of a nested graph, in one order that the solver can walk.

A chain is a row of cut tensors; between two of them there may be branches, each a chain of its
own, that join again (a residual block, parallel convolutions). Latencies and importances of
branches add up like those of steps in a row, so branches are laid out one behind the other:

    p -a1- a2 -\
     \           join - q     becomes     p  a1  a2|p'  b1  b2  q
      -b1- b2 -/

An entry from p to q, or further, replaces the whole block; one inside a branch stays inside it,
since both its tensors are of that branch. The join (an Add, a Concat) is the step from the last
branch's end to q; a row names it by the end of any of the branches and q.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from graphfold.errors import Problem
from graphfold.plan import Norm, nearest

Span = tuple[int, int]


@dataclass(frozen=True)
class Chain:
    """Cut tensors in order, and what lies between them.

    Attributes:
        tensors: at least two, in execution order. A branch starts at the tensor where it splits
            off and ends at the tensor that joins the others.
        branches: by the number of the tensor they start at; a branch without cut tensors (a skip)
            is left out.
    """

    tensors: tuple[str, ...]
    branches: Mapping[int, tuple[Chain, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if len(self.tensors) < 2 or len(set(self.tensors)) < len(self.tensors):
            raise ValueError(f"a chain has two or more different tensors, not {self.tensors}")
        for number in self.branches:
            if not 0 <= number < len(self.tensors) - 1:
                raise ValueError(f"no tensors {number} and {number + 1} for branches between them")


@dataclass(frozen=True)
class Join:
    """The step from the end of a block's last branch to where the branches are one tensor."""

    start: int
    end: int
    output: str


class Layout:
    """Every cut tensor's position in every chain that holds it.

    An activation at a cut belongs to it: segments end before it and start behind it, so a cut
    has two names there.

    Args:
        chain: the network's cut tensors, each before its activation.
        activations: by cut tensor, the output of the activation that alone reads it.
        places: by the cut tensor at a branch's end, the tensor behind the joins, where its
            activation stands or would stand; left out where it is the cut itself.
        norms: of segments that hold normalisations by groups, by the cuts at their ends: what a
            plan makes of these.

    Attributes:
        activations, norms: as given.
        positions: their number.
        joins: one for every block of branches.
    """

    def __init__(
        self,
        chain: Chain,
        activations: Mapping[str, str] | None = None,
        places: Mapping[str, str] | None = None,
        norms: Mapping[tuple[str, str], Norm] | None = None,
    ) -> None:
        self.activations = dict(activations or {})
        self.norms = dict(norms or {})
        self._places = dict(places or {})
        self._cuts = {behind: before for before, behind in self.activations.items()}
        self._chains: list[dict[str, int]] = []
        self._of_tensor: dict[str, list[int]] = {}
        self._join_of: dict[tuple[str, str], Span] = {}
        self.joins: list[Join] = []
        self.positions = self._place(chain, 0) + 1

    def _place(self, chain: Chain, position: int) -> int:
        """Lay out a chain from a position on; the position it ends at."""
        places: dict[str, int] = {}
        self._chains.append(places)
        number = len(self._chains) - 1
        for index, tensor in enumerate(chain.tensors):
            places[tensor] = position
            self._of_tensor.setdefault(tensor, []).append(number)
            if index == len(chain.tensors) - 1:
                return position
            branches = chain.branches.get(index, ())
            for branch in branches:
                position = self._place(branch, position)
            if branches:
                joined = chain.tensors[index + 1]
                self.joins.append(Join(position, position + 1, joined))
                for branch in branches:
                    self._join_of[branch.tensors[-1], joined] = (position, position + 1)
            position += 1
        raise AssertionError("a chain has a last tensor")

    def cut(self, tensor: str) -> str:
        """The name before its activation of the cut that a tensor is at."""
        return self._cuts.get(tensor, tensor)

    def place(self, tensor: str) -> str:
        """The tensor before the activation that stands behind a segment ending here."""
        cut = self.cut(tensor)
        return self._places.get(cut, cut)

    def name_at(self, position: int) -> str:
        """A cut tensor at this position."""
        return next(
            name for places in self._chains for name, at in places.items() if at == position
        )

    def span(self, source: str, target: str) -> Span | Problem:
        """The positions of a segment's ends, or why it has none."""
        source, target = self.cut(source), self.cut(target)
        for tensor in (source, target):
            if tensor not in self._of_tensor:
                what = f"{tensor!r} is no tensor at which segments end"
                return Problem(tensor, what, nearest(tensor, self._of_tensor))
        if (source, target) in self._join_of:
            return self._join_of[source, target]
        common = set(self._of_tensor[source]) & set(self._of_tensor[target])
        if not common:
            return Problem(source, f"no chain of segments holds both {source!r} and {target!r}")
        places = self._chains[min(common)]
        if places[source] >= places[target]:
            return Problem(source, f"{source!r} does not come before {target!r}")
        return places[source], places[target]

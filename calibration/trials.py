"""What an importance table by fine-tuning measures: one changed network for each of its rows.

LayerMerge (equation 4) measures every segment with every kernel that it may become; of the
convolutions inside, those with the largest l1 norm for that kernel stay (equation 3, see
`graphfold.choices`). Depth (Kim et al.) merges segments whole and measures activation states at
their ends; LayerOnly drops one convolution at a time.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import onnx_ir as ir

from graphfold.assembly import assemble_plan
from graphfold.candidates import Candidates
from graphfold.cuts import CutLayout, choice_row, is_no_change
from graphfold.depth_table import Ends, depth_rows
from graphfold.drops import find_drops, with_whole_blocks
from graphfold.measures import Row
from graphfold.plan import AddedActivation, LikeActivation, Plan
from graphfold.solver import Entry, Solution

Scheme = Literal["depth", "layer-only", "layermerge"]


@dataclass(frozen=True)
class Trial:
    """A network to train for a while, and what its result is the importance of.

    Attributes:
        row: of the table; None for the original.
        plan: what becomes of the network; None leaves it as it is.
        gains_activation: the network's own activation is added behind a merged segment that ends
            without one, see `graphfold.free`.
        reset: conv sites that start from random weights.
    """

    row: Row | None
    plan: Plan | None = None
    gains_activation: bool = False
    reset: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """What tells it from all others of its network."""
        return "original" if self.row is None else self.row.model_dump_json(exclude_defaults=True)

    @property
    def is_no_change(self) -> bool:
        """Whether there is nothing to train: the network is the original."""
        return self.plan is None and not self.reset

    def seed(self, seed: int) -> int:
        """A seed of its own, whatever else is measured and in which order."""
        text = f"{seed} {self.name}".encode()
        return int.from_bytes(hashlib.sha256(text).digest()[:4], "big")


def find_trials(
    candidates: Candidates, cuts: CutLayout, scheme: Scheme, *, compat: bool = False
) -> list[Trial]:
    """The changed networks of a scheme, in the order of the candidates.

    Args:
        candidates: of the network.
        cuts: of the candidates.
        scheme: whose choices.
        compat: single convolutions that stay are trained anew from random weights, as the
            published codes do; otherwise what stays is worth what no change is.
    """
    listing = _Listing(candidates, cuts, compat)
    if scheme == "depth":
        return list(listing.depth())
    return list(listing.drops() if scheme == "layer-only" else listing.merges())


class _Listing:
    def __init__(self, candidates: Candidates, cuts: CutLayout, compat: bool) -> None:
        self._candidates = candidates
        self._cuts = cuts
        self._compat = compat
        self._ends = Ends(candidates)
        usual = self._ends.usual
        self._usual = None if usual is None else usual.name

    def merges(self) -> Iterator[Trial]:
        """LayerMerge: segments with every kernel."""
        for candidate in self._candidates.found:
            for choice in candidate.choices:
                row = choice_row(candidate, choice)
                if not is_no_change(candidate, choice):
                    yield Trial(row, self._plan(row), gains_activation=True)
                elif self._compat:
                    stays = Row(input=row.input, output=row.output, unchanged=True)
                    yield Trial(stays, reset=(candidate.convs[0].name,))

    def drops(self) -> Iterator[Trial]:
        """LayerOnly: single steps that go; a block's only convolution takes its Add along."""
        drops = find_drops(self._candidates)
        for drop in drops:
            row = drop.row
            span = self._cuts.layout.span(row.input, row.output)
            if isinstance(span, tuple) and span[1] == span[0] + 1:
                gone = with_whole_blocks([row], drops).get(row, row)
                yield Trial(row, self._plan(gone or row))

    def depth(self) -> Iterator[Trial]:
        """Kim et al.: whole merges with activation states, and what stays with such states."""
        found = {(each.input.name, each.output.name): each for each in self._candidates.found}
        steps = {(step.input, step.output) for step in self._cuts.steps}
        for row in depth_rows(self._candidates):
            candidate = found[row.input, row.output]
            if row.unchanged:
                # The published codes measure no state of a layer that stays but a layer anew.
                reset = (candidate.convs[0].name,) if self._compat else ()
                yield Trial(row, self._with_states(row, candidate.input), reset=reset)
                continue
            yield Trial(row, self._with_states(row, candidate.input))
            if (row.input, row.output) in steps:
                kept = Row(
                    input=row.input,
                    output=row.output,
                    unchanged=True,
                    start_active=row.start_active,
                    end_active=row.end_active,
                )
                yield Trial(kept, self._with_states(kept, candidate.input))

    def _with_states(self, row: Row, start: ir.Value) -> Plan | None:
        """The plan of a row, with the activation that it wants where it starts."""
        plan = self._plan(row)
        place = self._cuts.layout.cut(row.input)
        is_free = self._ends.may_start_without(start) and place not in self._cuts.layout.activations
        if row.start_active is True and is_free and self._usual is not None:
            free = AddedActivation(tensor=place, activation=LikeActivation(like=self._usual))
            plan = plan.model_copy(update={"add_activations": [*plan.add_activations, free]})
        is_empty = not (plan.segments or plan.remove_activations or plan.add_activations)
        return None if is_empty else plan

    def _plan(self, row: Row) -> Plan:
        entries: tuple[Entry[tuple[Row, ...]], ...] = (Entry(0, 1, 0.0, 0.0, (row,)),)
        activation = None if self._usual is None else {"like": self._usual}
        solution = Solution(0.0, 0.0, entries)
        return assemble_plan(solution, self._cuts.layout, activation=activation)

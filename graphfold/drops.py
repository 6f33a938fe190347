"""What may go with no convolution in its place: y = x instead of a layer, or of a segment.

LayerOnly drops single convolutions, and the activations around them stay. What a first method has
merged may be dropped by a second one, so every segment between tensors of one shape has a drop.
Where a residual block has lost all its convolutions one by one, x + f(x) has become 2x, or nearly:
there the whole block is dropped, its Add included.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from graphfold.candidates import Candidate, Candidates
from graphfold.choices import Choice
from graphfold.cuts import choice_row
from graphfold.measures import Row
from graphfold.sites import ActivationSite, evaluate_activation

# Numbers at which a function is looked at: small and large, of both signs.
_POINTS = np.concatenate([np.linspace(-20, 20, 401), [-1e3, 1e3]])


@dataclass(frozen=True)
class Drop:
    """A segment and the identity in its place.

    Attributes:
        candidate: the segment.
        choice: the identity.
        left: the activation behind the segment, where dropping leaves it with work to do: none
            where the one before the segment does the same already.
    """

    candidate: Candidate
    choice: Choice
    left: ActivationSite | None

    @property
    def row(self) -> Row:
        """Its key in tables."""
        return choice_row(self.candidate, self.choice)


def find_drops(candidates: Candidates) -> tuple[Drop, ...]:
    """All segments that may be dropped, in the order of the candidates."""
    before = {site.output: site for site in candidates.sites.activations}
    return tuple(
        Drop(each, _identity(each), _left(candidates, each, before.get(each.input)))
        for each in candidates.found
        if _keeps_shape(candidates, each)
    )


def is_drop(row: Row) -> bool:
    """Whether a row of a table has nothing in a segment's place."""
    return row.family == "identity"


def _identity(candidate: Candidate) -> Choice:
    ones = (1,) * len(candidate.choices[0].kernel)
    return Choice(ones, ones, "identity", tuple(site.name for site in candidate.convs), 0.0)


def _keeps_shape(candidates: Candidates, candidate: Candidate) -> bool:
    if candidate.norms or candidate.aside:
        return False
    if len(candidate.convs) == 1 and not candidate.adds:
        return candidate.convs[0].removable
    source, target = (candidates.graph.shape(end) for end in (candidate.input, candidate.output))
    return source is not None and source == target and None not in source


def _left(
    candidates: Candidates, candidate: Candidate, before: ActivationSite | None
) -> ActivationSite | None:
    """The activation behind a segment, unless it only repeats the one before."""
    behind = candidates.activated.get(candidate.output)
    if behind is None or before is None:
        return behind
    once = evaluate_activation(candidates.graph, before.input, before.nodes, _POINTS)
    if once is None or once.shape != _POINTS.shape:
        return behind
    twice = evaluate_activation(candidates.graph, behind.input, behind.nodes, once)
    return None if twice is not None and np.array_equal(once, twice) else behind


def with_whole_blocks(rows: Sequence[Row], drops: Sequence[Drop]) -> dict[Row, Row | None]:
    """What takes the place of rows that together drop all convolutions of a residual block.

    Returns:
        by row: the block's drop for the first of them, None for the others.
    """
    blocks = sorted((each for each in drops if each.candidate.adds), key=_size)
    found: dict[Row, Row | None] = {}
    for block in blocks:
        names = set(block.choice.removed_convs)
        inside = [row for row in _parts(rows, names) if row not in found]
        if inside and names == {name for row in inside for name in row.removed_convs or ()}:
            found |= dict.fromkeys(inside, None)
            found[inside[0]] = block.row
    return found


def _parts(rows: Sequence[Row], names: set[str]) -> Iterator[Row]:
    for row in rows:
        if is_drop(row) and row.removed_convs and names.issuperset(row.removed_convs):
            yield row


def _size(drop: Drop) -> int:
    return len(drop.candidate.convs)

"""The rows of an importance table in the scheme of Kim et al.: merges and activation states.

A segment is merged whole, and an activation that the network does not have may be put at its start
or behind its end. States are told apart only where there is a choice: between two convolutions
where no activation stands, at the ends of linear bottlenecks. And not all four of them: a segment
with a choice at its start counts as followed by an activation, one with a choice at its end alone
as preceded by one, and one at the start of all that is planned as between two. A convolution that
stays as it is may do so with the states of the model, too, where this scheme leaves them out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cached_property

import onnx_ir as ir

from graphfold.candidates import Candidate, Candidates
from graphfold.cuts import is_no_change
from graphfold.measures import Row
from graphfold.sites import ActivationSite

_States = tuple[bool, bool | None]


def depth_rows(candidates: Candidates, found: Sequence[Candidate] | None = None) -> tuple[Row, ...]:
    """One row per segment and measured pair of activation states, in order of the segments.

    A segment inside a residual branch that ends where the branch does has its end's state behind
    the join, where the published networks have it. An end where no activation can be has none.

    Args:
        candidates: of the whole network.
        found: those of them that are planned; all of them where left out.
    """
    ends = Ends(candidates)
    planned = candidates.found if found is None else found
    return tuple(row for each in planned for row in _rows(ends, each, planned[0].input))


class Ends:
    """Where a network has activations between its convolutions, and where it may get one.

    Args:
        candidates: of the whole network.
    """

    def __init__(self, candidates: Candidates) -> None:
        self._candidates = candidates
        self._starts = {each.input for each in candidates.found}

    @cached_property
    def usual(self) -> ActivationSite | None:
        """The activation that is put where there is none: the network's most frequent one.

        None where all have parameters of their own for every channel.
        """
        graph = self._candidates.graph
        sites = [
            site
            for site in self._candidates.sites.activations
            if all(
                _is_scalar(graph.constant(value)) for node in site.nodes for value in node.inputs
            )
        ]
        if not sites:
            return None
        ((kind, _),) = Counter(site.kind for site in sites).most_common(1)
        return next(site for site in sites if site.kind == kind)

    @cached_property
    def free(self) -> tuple[ir.Value, ...]:
        """Tensors between two convolutions that have no activation and may get one."""
        if self.usual is None:
            return ()
        places = (self._candidates.activation_place(each.output) for each in self._candidates.found)
        return tuple(dict.fromkeys(place for place in places if self._is_free(place)))

    def _is_free(self, place: ir.Value) -> bool:
        return place not in self._candidates.activated and place in self._starts

    def may_start_without(self, value: ir.Value) -> bool:
        """Whether the activation at a segment's start is a choice."""
        return value in self.free

    def at_end(self, value: ir.Value) -> bool | None:
        """Whether there may be an activation behind a segment; None where there can be none."""
        place = self._candidates.activation_place(value)
        return True if place in self._candidates.activated or place in self.free else None

    def may_end_without(self, value: ir.Value) -> bool:
        """Whether the activation behind a segment is a choice."""
        return self._candidates.activation_place(value) in self.free


def _is_scalar(constant: object) -> bool:
    return getattr(constant, "size", 1) == 1


def _rows(ends: Ends, candidate: Candidate, first: ir.Value) -> Iterator[Row]:
    merge = next(choice for choice in candidate.choices if not choice.removed_convs)
    unchanged = is_no_change(candidate, merge)
    behind = ends.at_end(candidate.output)
    states: list[_States] = [(True, behind)]
    if candidate.input is first:
        pass
    elif ends.may_start_without(candidate.input):
        states.append((False, behind))
    elif ends.may_end_without(candidate.output):
        states.append((True, False))
    if unchanged:
        states.append(_as_it_is(ends, candidate, behind))
    for start, end in dict.fromkeys(states):
        yield Row(
            input=candidate.input.name or "",
            output=candidate.output.name or "",
            kernel=merge.kernel,
            stride=merge.stride,
            family=merge.family,
            start_active=start,
            end_active=end,
            unchanged=unchanged,
        )


def _as_it_is(ends: Ends, candidate: Candidate, behind: bool | None) -> _States:
    end = False if ends.may_end_without(candidate.output) else behind
    return not ends.may_start_without(candidate.input), end

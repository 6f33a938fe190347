"""The rows of an importance table in the scheme of Kim et al.: merges and activation states.

A segment is merged whole, and an activation that the network does not have may be put at its start
or behind its end. States are told apart only where there is a choice: where no activation stands,
at the ends of linear bottlenecks. And not all four of them: a segment with a choice at its start
counts as followed by an activation, one with a choice at its end alone as preceded by one, and one
at the start of all that is planned as between two.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import onnx_ir as ir

from graphfold.candidates import Candidate, Candidates
from graphfold.graph import only_consumer
from graphfold.linear import is_join
from graphfold.measures import Row


def depth_rows(candidates: Candidates, found: Sequence[Candidate] | None = None) -> tuple[Row, ...]:
    """One row per segment and measured pair of activation states, in order of the segments.

    A segment inside a residual branch that ends where the branch does has its end's state behind
    the join, where the published networks have it.

    Args:
        candidates: of the whole network.
        found: those of them that are planned; all of them where left out.
    """
    ends = _Ends(candidates)
    planned = candidates.found if found is None else found
    return tuple(row for each in planned for row in _rows(ends, each, planned[0].input))


class _Ends:
    """Where a network has activations, and where it may get one."""

    def __init__(self, candidates: Candidates) -> None:
        self.graph = candidates.graph
        self.activated = {site.input for site in candidates.sites.activations}
        self.conv_outputs = {site.output for site in candidates.sites.convs}

    def may_start_without(self, value: ir.Value) -> bool:
        """Whether a tensor ends a convolution or a join directly: its activation is a choice."""
        producer = value.producer()
        return value in self.conv_outputs or (
            producer is not None and is_join(self.graph, producer)
        )

    def may_end_without(self, value: ir.Value) -> bool:
        """Whether no activation follows, behind the joins that this tensor alone leads to."""
        while value not in self.activated:
            reader = only_consumer(value)
            if reader is None or not is_join(self.graph, reader):
                return True
            value = reader.outputs[0]
        return False


def _rows(ends: _Ends, candidate: Candidate, first: ir.Value) -> Iterator[Row]:
    merge = next(choice for choice in candidate.choices if not choice.removed_convs)
    if candidate.input is first:
        states = [(True, True)]
    elif ends.may_start_without(candidate.input):
        states = [(True, True), (False, True)]
    elif ends.may_end_without(candidate.output):
        states = [(True, True), (True, False)]
    else:
        states = [(True, True)]
    for start, end in states:
        yield Row(
            input=candidate.input.name or "",
            output=candidate.output.name or "",
            kernel=merge.kernel,
            stride=merge.stride,
            family=merge.family,
            start_active=start,
            end_active=end,
        )

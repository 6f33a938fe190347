"""Two transpositions in a row are one: axis i of T_q(T_p(x)) is axis p[q[i]] of x.

Only data moves, so every bit is kept. Two that undo each other are `remove_noops`' business.
Refused: a first transposition that is read elsewhere or is an output of the graph, and
permutations of unknown rank.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from graphfold.cleanup import Pair, pairs
from graphfold.graph import Graph, attribute
from graphfold.rewrite import Pass, Phase, Work, provenance


@dataclass(frozen=True)
class MergeTransposes(Pass):
    """One Transpose for two in a row."""

    name: ClassVar[str] = "merge_transposes"
    phase: ClassVar[Phase] = Phase.FOLD
    order: ClassVar[int] = 5

    def find(self, work: Work) -> Iterable[Pair]:
        """Every Transpose that reads one."""
        return pairs(work, "Transpose")

    def label(self, candidate: Pair) -> str:
        """The second one's output tensor."""
        return candidate.output

    def check(self, work: Work, candidate: Pair) -> str | None:
        """Refuse a first one that is needed elsewhere, and unknown ranks."""
        first, second = candidate.first, candidate.second
        reason = candidate.why_apart()
        if reason is not None:
            return reason
        if _composed(work.graph, first, second) is None:
            return f"the rank of {first.outputs[0].name!r} is not known"
        return None

    def rewrite(self, work: Work, candidate: Pair) -> None:
        """Let the second read what the first read, and move as both did."""
        first, second = candidate.first, candidate.second
        composed = _composed(work.graph, first, second)
        assert composed is not None
        second.attributes["perm"] = ir.AttrInt64s("perm", composed)
        second.replace_input_with(0, first.inputs[0])
        second.metadata_props.update(provenance((first, second), self.name))
        work.graph.remove_dead([first])


def _composed(graph: Graph, first: ir.Node, second: ir.Node) -> list[int] | None:
    inner, outer = _permutation(graph, first), _permutation(graph, second)
    if inner is None or outer is None or len(inner) != len(outer):
        return None
    return [inner[axis] for axis in outer]


def _permutation(graph: Graph, node: ir.Node) -> list[int] | None:
    found = attribute(node, "perm")
    if found is not None:
        return list(found)
    shape = graph.shape(node.inputs[0])
    return None if shape is None else list(range(len(shape)))[::-1]

"""Remove nodes whose results nobody reads, and initializers that nobody reads.

What no reader and no output of the graph depends on cannot change any output. A node that goes may
have been the last reader of another: what only fed it goes with it, in one walk from the last node
to the first. What a subgraph reads counts as read.

Kept: graph inputs, and initializers that are inputs or outputs too; operators of other domains and
those with subgraphs, whose effects are not known; and initializers that a quantisation annotation
names. Models with training information keep all their initializers.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from graphfold.cleanup import understood
from graphfold.rewrite import Pass, Phase, Work


@dataclass(frozen=True)
class RemoveUnused(Pass):
    """Nothing that nobody reads."""

    name: ClassVar[str] = "remove_unused"
    phase: ClassVar[Phase] = Phase.FOLD
    order: ClassVar[int] = 9

    def find(self, work: Work) -> Iterable[ir.Node | ir.Value]:
        """Unread nodes, last first so that readers go before what they read; then constants."""
        gone: set[ir.Node] = set()
        for node in reversed(work.graph.nodes()):
            if node in work.barrier or not understood(node):
                continue
            if all(_unread(output, gone) for output in node.outputs):
                gone.add(node)
        nodes = [node for node in reversed(work.graph.nodes()) if node in gone]
        return [*nodes, *self._constants(work, gone)]

    def _constants(self, work: Work, gone: set[ir.Node]) -> Iterable[ir.Value]:
        if work.graph.model.has_training_info:
            return
        named = work.graph.model.annotation_names(work.graph.ir)
        for value in work.graph.ir.initializers.values():
            if not value.is_graph_input() and value.name not in named and _unread(value, gone):
                yield value

    def label(self, candidate: ir.Node | ir.Value) -> str:
        """The tensor's name, the first output's for a node."""
        value = candidate.outputs[0] if isinstance(candidate, ir.Node) else candidate
        return value.name or ""

    def rewrite(self, work: Work, candidate: ir.Node | ir.Value) -> None:
        """Take it out."""
        if isinstance(candidate, ir.Node):
            work.graph.ir.remove(candidate, safe=True)
        elif candidate.name is not None:
            work.graph.ir.initializers.pop(candidate.name, None)


def _unread(value: ir.Value, gone: set[ir.Node]) -> bool:
    if value.is_graph_output():
        return False
    return all(usage.node in gone for usage in value.uses())

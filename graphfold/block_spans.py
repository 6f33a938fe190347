"""The same blocks in several models: what lies between tensors that all of them compute.

The blocks are those that people read a network by (`graphfold.segments.blocks`): residual blocks
whole, elsewhere one weighted operator each. Where everything flows through one tensor, what
contributes to it is what stands before it, in any model that computes it. So a node belongs to the
first such tensor that it contributes to; what a fold merged across a boundary is one wider block.
A boundary behind an activation is, where a plan removed that, the tensor before it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import onnx_ir as ir

from graphfold.candidates import find_candidates
from graphfold.cuts import cut_layout
from graphfold.errors import UsageError
from graphfold.graph import Graph
from graphfold.linear import variable_inputs
from graphfold.plan import nearest
from graphfold.segments import Block, blocks
from graphfold.sites import Sites, find_sites

# A block of more is read step by step: a U-Net between its outermost skips, a detector's heads.
_MOST_CONVS = 8
_STEP = "step"


@dataclass(frozen=True)
class BlockSpan:
    """A block, or several in a row that some model has merged.

    Attributes:
        input: the tensor it begins at, None for the model's inputs.
        output: the tensor it ends at, None for what contributes to no common tensor.
        kinds: of the first model's blocks in it, in order; empty where it holds none of them.
        nodes: by model, names of the first outputs of its nodes.
    """

    input: str | None
    output: str | None
    kinds: tuple[str, ...]
    nodes: tuple[frozenset[str], ...]


@dataclass(frozen=True)
class _Cut:
    """A tensor between two blocks of the first model, by its names; the first one is the best."""

    names: tuple[str, ...]
    kind: str


def block_spans(graphs: Sequence[Graph], names: Sequence[str]) -> list[BlockSpan]:
    """The first graph's blocks, and what stands in their places in the others.

    Args:
        graphs: the first is the one whose blocks these are.
        names: of the models, for messages.

    Raises:
        UsageError: another model has no inner tensor of the first one.
    """
    first = graphs[0]
    cuts = list(_cuts(first))
    computed = [{value.name for node in graph.ir for value in node.outputs} for graph in graphs]
    for label, tensors in zip(names[1:], computed[1:], strict=True):
        if cuts and not any(name in tensors for cut in cuts for name in cut.names):
            raise _nothing_in_common(cuts, names[0], label, tensors)
    return _spans(graphs, cuts, computed)


def _nothing_in_common(
    cuts: Sequence[_Cut], first: str, other: str, tensors: set[str | None]
) -> UsageError:
    missing = cuts[0].names[0]
    near = nearest(missing, [name for name in tensors if name])
    what = f"no tensor between blocks of {first} is computed in {other}: it has no {missing!r}"
    return UsageError(
        f"{what}, {near}" if near else what,
        hint="blocks are matched by tensor names: compare a model with what it was folded into",
    )


def _spans(
    graphs: Sequence[Graph], cuts: Sequence[_Cut], computed: Sequence[set[str | None]]
) -> list[BlockSpan]:
    claims = [_Claims(graph) for graph in graphs]
    spans: list[BlockSpan] = []
    source: str | None = None
    kinds: list[str] = []
    for cut in cuts:
        kinds.append(cut.kind)
        found = [next((n for n in cut.names if n in tensors), None) for tensors in computed]
        if None in found:
            continue
        nodes = [each.claim(name or "") for each, name in zip(claims, found, strict=True)]
        spans.append(BlockSpan(source, cut.names[0], tuple(kinds), tuple(nodes)))
        source, kinds = cut.names[0], []
    graph = graphs[0]
    kinds += [_kind(block, find_sites(graph)) for block in blocks(graph)[-1:]]
    behind = tuple(each.claim_outputs() for each in claims)
    if any(behind):
        spans.append(BlockSpan(source, graph.ir.outputs[0].name, tuple(kinds), behind))
    rest = tuple(each.unclaimed() for each in claims)
    return [*spans, BlockSpan(None, None, (), rest)] if any(rest) else spans


def _cuts(graph: Graph) -> Iterator[_Cut]:
    """Tensors between blocks, in execution order."""
    sites = find_sites(graph)
    found = blocks(graph)
    order = {node: number for number, node in enumerate(graph.ir)}
    seen: set[ir.Value] = set()
    steps = _Steps(graph, sites) if any(_is_large(block, sites) for block in found) else None
    for block, following in pairwise([*found, None]):
        assert block is not None
        if steps is not None and _is_large(block, sites):
            for value in steps.inside(block):
                if value not in seen:
                    seen.add(value)
                    yield _cut(value, _STEP, sites)
        entry = None if following is None else _entry(graph, following, order)
        if entry is not None and entry not in seen:
            seen.add(entry)
            yield _cut(entry, _kind(block, sites), sites)


def _kind(block: Block, sites: Sites) -> str:
    """What it is; of a large block only the last step is left."""
    return _STEP if _is_large(block, sites) else block.kind


def _is_large(block: Block, sites: Sites) -> bool:
    inside = set(block.nodes)
    return sum(site.conv in inside for site in sites.convs) > _MOST_CONVS


class _Steps:
    """The steps that a plan may change: what large blocks are read by."""

    def __init__(self, graph: Graph, sites: Sites) -> None:
        candidates = find_candidates(graph, sites)
        self._steps = cut_layout(candidates).steps if candidates.found else ()
        self._order = {node: number for number, node in enumerate(graph.ir)}

    def inside(self, block: Block) -> list[ir.Value]:
        """The tensors at which its steps end, in execution order, but the last."""
        inside = set(block.nodes) - {block.nodes[-1]}
        ends = [step.nodes[-1] for step in self._steps if step.nodes and step.nodes[-1] in inside]
        return [node.outputs[0] for node in sorted(ends, key=self._order.__getitem__)]


def _entry(graph: Graph, block: Block, order: Mapping[ir.Node, int]) -> ir.Value | None:
    """The tensor that a block begins at; of several, as for a shape, the one computed last."""
    inside = set(block.nodes)
    entries = [
        value
        for node in block.nodes
        for value in variable_inputs(graph, node)
        if (producer := value.producer()) is not None and producer not in inside
    ]
    return max(entries, key=lambda value: order.get(value.producer(), -1), default=None)  # type: ignore[arg-type]


def _cut(value: ir.Value, kind: str, sites: Sites) -> _Cut:
    before = [site.input.name for site in sites.activations if site.output is value]
    return _Cut(tuple(name for name in (value.name, *before) if name), kind)


class _Claims:
    """The nodes of one model, each claimed once by the first tensor it contributes to."""

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._values = graph.values()
        self._free = set(graph.ir)

    def claim(self, name: str) -> frozenset[str]:
        """Nodes, free so far, that contribute to this tensor; by their first outputs' names."""
        return self._take([self._values[name]])

    def claim_outputs(self) -> frozenset[str]:
        """What is left of the nodes that the model's outputs are computed by."""
        return self._take(list(self._graph.ir.outputs))

    def unclaimed(self) -> frozenset[str]:
        """What contributes to nothing."""
        return _labels(self._free)

    def _take(self, values: list[ir.Value]) -> frozenset[str]:
        found: list[ir.Node] = []
        while values:
            node = values.pop().producer()
            if node is None or node not in self._free:
                continue
            self._free.remove(node)
            found.append(node)
            values += [value for value in _read(node) if value is not None]
        return _labels(found)


def _read(node: ir.Node) -> Iterator[ir.Value | None]:
    """Inputs of a node, those that its subgraphs read from outside included."""
    yield from node.inputs
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            for inner in attribute.as_graph().all_nodes():
                yield from inner.inputs


def _labels(nodes: Sequence[ir.Node] | set[ir.Node]) -> frozenset[str]:
    return frozenset(name for node in nodes if (name := node.outputs[0].name))

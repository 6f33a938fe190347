"""Cut tensors, blocks and numbered convolutions: the coordinates that plans are written in.

Everything is found from the data flow: nothing here knows an architecture or a node's name.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from graphfold.errors import NotExactError
from graphfold.flow import Flow, find_flow
from graphfold.graph import Graph, consumers, is_op, only_consumer, topological_between
from graphfold.linear import is_join, variable_inputs
from graphfold.regions import find_region
from graphfold.sites import ActivationSite, ConvSite, Sites, find_sites

_WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")


@dataclass(frozen=True)
class InvertedResidual:
    """A depthwise convolution between pointwise ones, linear at its end.

    Attributes:
        input: what its first convolution reads.
        output: after its last normalisation, and after the Add when it is residual.
        expand: the pointwise expansion; None in a block of expansion 1 (t=1).
        depthwise, project: the other two conv sites.
        activations: the sites between them, at most two.
        residual: whether the block's input is added to its result.
    """

    input: ir.Value
    output: ir.Value
    expand: ConvSite | None
    depthwise: ConvSite
    project: ConvSite
    activations: tuple[ActivationSite, ...]
    residual: bool


@dataclass(frozen=True)
class Block:
    """A piece of the network between two tensors, for people to read a network by."""

    name: str
    kind: str
    input: ir.Value | None
    output: ir.Value | None
    nodes: tuple[ir.Node, ...]


def activation_sites(graph: Graph) -> list[ActivationSite]:
    """All activation sites in execution order."""
    return list(find_sites(graph).activations)


def conv_sites(graph: Graph) -> list[ConvSite]:
    """All convolution sites in execution order."""
    return list(find_sites(graph).convs)


def inverted_residuals(graph: Graph, sites: Sites | None = None) -> list[InvertedResidual]:
    """Inverted-residual blocks, t=1 blocks included, in execution order."""
    found = sites or find_sites(graph)
    index = _SiteIndex(found)
    blocks = (_inverted_residual_at(graph, site, index) for site in found.convs if site.depthwise)
    return [block for block in blocks if block is not None]


class _SiteIndex:
    """Sites by the tensors they read and write."""

    def __init__(self, sites: Sites) -> None:
        self.activation_reading = {site.input: site for site in sites.activations}
        self.activation_writing = {site.output: site for site in sites.activations}
        self.conv_reading = {site.input: site for site in sites.convs}
        self.conv_writing = {site.output: site for site in sites.convs}


def _inverted_residual_at(
    graph: Graph, depthwise: ConvSite, index: _SiteIndex
) -> InvertedResidual | None:
    inner = index.activation_reading.get(depthwise.output)
    middle = inner.output if inner else depthwise.output
    project = index.conv_reading.get(middle)
    if project is None or not project.pointwise or not _feeds_only(middle, project.nodes):
        return None
    if project.output in index.activation_reading:
        return None
    outer, expand = _expansion_before(depthwise, index)
    source = expand.input if expand else depthwise.input
    output, residual = _after_residual_add(graph, project.output, source)
    activations = tuple(site for site in (outer, inner) if site is not None)
    return InvertedResidual(source, output, expand, depthwise, project, activations, residual)


def _expansion_before(
    depthwise: ConvSite, index: _SiteIndex
) -> tuple[ActivationSite | None, ConvSite | None]:
    """The pointwise convolution that widens the depthwise one's input, and what lies between."""
    outer = index.activation_writing.get(depthwise.input)
    before = outer.input if outer else depthwise.input
    expand = index.conv_writing.get(before)
    widens = (
        expand is not None
        and expand.pointwise
        and expand.out_channels > expand.in_channels
        and _feeds_only(depthwise.input, depthwise.nodes)
    )
    return (outer, expand) if widens else (None, None)


def _feeds_only(value: ir.Value, nodes: Sequence[ir.Node]) -> bool:
    reader = only_consumer(value)
    return reader is not None and reader in nodes


def _after_residual_add(graph: Graph, output: ir.Value, source: ir.Value) -> tuple[ir.Value, bool]:
    reader = only_consumer(output)
    if reader is None or not is_op(reader, "Add") or not is_join(graph, reader):
        return output, False
    holds = any(value is source for value in reader.inputs)
    return (reader.outputs[0], True) if holds else (output, False)


def whole_branch_end(graph: Graph, source: ir.Value, output: ir.Value, sites: Sites) -> ir.Value:
    """Follow residual Adds behind `output` while the segment from `source` holds them whole."""
    while True:
        reader = only_consumer(output)
        if reader is None or not is_join(graph, reader) or not is_op(reader, "Add"):
            return output
        try:
            find_region(graph, source, reader.outputs[0], sites.order)
        except NotExactError:
            return output
        output = reader.outputs[0]


def main_path_convs(graph: Graph, sites: Sites) -> list[ConvSite]:
    """Convolutions in execution order without those on the shorter side of a residual Add.

    The numbering of Kim et al. and LayerMerge: projection shortcuts are not counted.
    """
    shortcuts: set[ir.Node] = set()
    flow = find_flow(graph)
    convs = {site.conv for site in sites.convs}
    for node in sites.order:
        is_add = is_op(node, "Add") and is_join(graph, node)
        # What comes from several inputs of the model was never one tensor: no skip of another.
        if is_add and node.outputs[0] in flow.dominators:
            aside = flow.side_inputs.get(node, frozenset())
            branches = [value for value in variable_inputs(graph, node) if value not in aside]
            own = [_convs_since_fork(value, node, flow, convs) for value in branches]
            own.sort(key=len)
            if len(own[0]) < len(own[-1]):
                shortcuts.update(own[0])
    return [site for site in sites.convs if site.conv not in shortcuts]


def _convs_since_fork(
    value: ir.Value, join: ir.Node, flow: Flow, convs: set[ir.Node]
) -> list[ir.Node]:
    """Convolutions that every way leads through from where branches fork to one of their ends."""
    fork = flow.dominators[join.outputs[0]]
    found: list[ir.Node] = []
    at: ir.Value | None = value
    while at is not None and at is not fork:
        producer = at.producer()
        if producer in convs and producer is not None:
            found.append(producer)
        at = flow.dominators.get(at)
    return found


# --- blocks for reading ------------------------------------------------------------------------


def blocks(graph: Graph) -> list[Block]:
    """A partition of all nodes, in execution order, at tensors through which everything flows.

    Inverted-residual and residual blocks stay whole; elsewhere a block starts at each weighted
    operator. Linear in graph size.
    """
    sites = find_sites(graph)
    inverted = _owned_by_inverted(graph, sites)
    pieces: list[list[ir.Node]] = []
    boundary = True
    for node, is_cut in _cuts(graph):
        starts = boundary and (_is_weighted(node) or _splits(graph, node))
        same_block = (
            bool(pieces)
            and inverted.get(node) is not None
            and (inverted.get(node) is inverted.get(pieces[-1][-1]))
        )
        if not pieces or (starts and not same_block):
            pieces.append([])
        pieces[-1].append(node)
        boundary = is_cut
    return [_block(graph, piece, inverted) for piece in pieces]


def _owned_by_inverted(graph: Graph, sites: Sites) -> dict[ir.Node, InvertedResidual]:
    owned: dict[ir.Node, InvertedResidual] = {}
    for block in inverted_residuals(graph, sites):
        for node in topological_between(block.input, block.output, sites.order):
            owned[node] = block
    return owned


def _cuts(graph: Graph) -> Iterator[tuple[ir.Node, bool]]:
    """Every node with whether, after it, exactly one tensor is alive (liveness in order)."""
    remaining: dict[ir.Value, int] = {}
    for entry in graph.ir.inputs:
        if not entry.is_initializer() and entry.uses():
            remaining[entry] = _data_uses(entry)
    for node in graph.ir:
        for value in node.inputs:
            if value is not None and value in remaining and not is_op(node, "Shape"):
                remaining[value] -= 1
                if remaining[value] == 0 and not value.is_graph_output():
                    del remaining[value]
        for value in node.outputs:
            if not graph.is_constant(value) and (value.uses() or value.is_graph_output()):
                remaining[value] = _data_uses(value)
        yield node, len(remaining) <= 1


def _data_uses(value: ir.Value) -> int:
    """Uses of a tensor's values; asking for its shape keeps nothing alive."""
    return sum(not is_op(usage.node, "Shape") for usage in value.uses())


def _is_weighted(node: ir.Node) -> bool:
    return is_op(node, *_WEIGHTED) or (
        is_op(node, "Pad") and is_op(only_consumer(node.outputs[0]), *_WEIGHTED)
    )


def _splits(graph: Graph, node: ir.Node) -> bool:
    """A node after a cut that does not simply continue it: pooling, resizing, reshaping."""
    return any(len(consumers(value)) > 1 for value in variable_inputs(graph, node))


def _block(graph: Graph, nodes: list[ir.Node], inverted: dict[ir.Node, InvertedResidual]) -> Block:
    inside = set(nodes)
    entries = [
        value
        for node in nodes
        for value in variable_inputs(graph, node)
        if value.producer() not in inside
    ]
    output = next((value for value in reversed(nodes[-1].outputs) if value.name), None)
    return Block(
        name=(output.name if output is not None else None) or nodes[-1].op_type,
        kind=_block_kind(graph, nodes, inverted),
        input=entries[0] if entries else None,
        output=output,
        nodes=tuple(nodes),
    )


def _block_kind(
    graph: Graph, nodes: list[ir.Node], inverted: dict[ir.Node, InvertedResidual]
) -> str:
    if any(node in inverted for node in nodes):
        return "inverted residual"
    if any(is_op(node, "Add", "Sum") and is_join(graph, node) for node in nodes):
        return "residual"
    if any(is_op(node, "Concat") for node in nodes):
        return "branches"
    weighted = [node.op_type for node in nodes if is_op(node, *_WEIGHTED)]
    return weighted[0].lower() if weighted else "other"

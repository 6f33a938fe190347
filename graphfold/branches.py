"""Branches of one tensor that meet again in a sum or a concatenation: where, and at what cost.

What passes that merge branches share: from the joining node back to the one tensor that all
branches read, and whether one convolution is equal to the branches and no dearer.
"""

from __future__ import annotations

import onnx_ir as ir

from graphfold.errors import NotExactError
from graphfold.geometry import Geometry
from graphfold.graph import is_op
from graphfold.linear import OPERATORS, is_join, variable_inputs
from graphfold.merge import current_region, merged_geometry
from graphfold.regions import Region, find_region
from graphfold.rewrite import Work
from graphfold.runs import NOMINAL_SIZE, RunCost, best_split, chains, growth, merged_cost

_LARGEST_REGION = 64


def why_apart(work: Work, region: Region) -> str | None:
    """Why loose branches stay: no convolution equals them, or it would cost more; None if not."""
    if any(node.graph is None for node in region.nodes):
        return "it was merged with what is around it"
    region = current_region(work, region)
    try:
        geometry = merged_geometry(work, region)
        sizes = work.graph.sizes(region.entry) or (None,) * geometry.rank
        nominal = tuple(NOMINAL_SIZE if size is None else size for size in sizes)
        merged = merged_cost(work, geometry, sizes, nominal)
    except NotExactError as error:
        return error.what
    slower = _measured(work, region, geometry)
    if slower is not None:
        return slower or None
    present = _present_cost(work, region)
    if merged > present and not work.allow_growth:
        return f"merging raises cost: {growth(present, merged)}"
    return None


def _measured(work: Work, region: Region, geometry: Geometry) -> str | None:
    """What a latency table says of a merge: why not, "" where it is faster, None for nothing."""
    if work.prices is None or work.allow_growth:
        return None
    entry, output = region.entry.name or "", region.output.name or ""
    inside = {value.name or "" for node in region.nodes for value in node.outputs}
    convs = sum(is_op(node, "Conv") for node in region.nodes)
    present = work.prices.present(entry, inside, convs)
    merged = work.prices.merged(entry, output, geometry.kernel)
    if present is None or merged is None:
        return None
    if merged < present:
        return ""
    return f"merging is slower where it was measured: {present:.3f} ms to {merged:.3f} ms"


def region_of_join(
    work: Work, join: ir.Node, order: dict[ir.Node, int], owned: set[ir.Node]
) -> Region | None:
    """From a join back to the one tensor that all its branches read, through linear operators."""
    graph = work.graph
    frontier = set(variable_inputs(graph, join))
    visited = 0
    while len(frontier) > 1:
        latest = max(frontier, key=lambda value: order.get(value.producer(), -1))  # type: ignore[arg-type]
        producer = latest.producer()
        visited += 1
        if producer is None or producer in owned or visited > _LARGEST_REGION:
            return None
        if not (is_op(producer, *OPERATORS) or is_join(graph, producer)):
            return None
        frontier.remove(latest)
        frontier.update(variable_inputs(graph, producer))
    try:
        return find_region(graph, frontier.pop(), join.outputs[0], order)
    except NotExactError:
        return None


def _present_cost(work: Work, region: Region) -> RunCost:
    """What a region costs with its chains merged where that is cheaper, and its sums."""
    inside = set(region.nodes)
    total = RunCost()
    counted: set[ir.Node] = set()
    for chain in chains(work, region.nodes):
        nodes = [link.node for link in chain.links]
        if inside.issuperset(nodes):
            total = total + best_split(work, chain).cost
            counted.update(nodes)
    sizes = {node: work.graph.sizes(node.outputs[0]) for node in region.nodes}
    for node in region.nodes:
        if node not in counted:
            known = sizes[node] or ()
            pixels = 1
            for size in known:
                pixels *= NOMINAL_SIZE if size is None else size
            channels = work.graph.channels(node.outputs[0]) or 1
            total = total + RunCost(pixels * channels, 0, 1)
    return total

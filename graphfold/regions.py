"""Linear regions: single-entry single-exit subgraphs, and the one convolution that equals each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from graphfold.affine import AffineConv, identity
from graphfold.errors import NotExactError
from graphfold.geometry import Axis, Geometry
from graphfold.graph import Graph, attribute, consumers, is_op, node_label, topological_between
from graphfold.linear import (
    Context,
    Join,
    LinearOperator,
    constant_shape,
    is_join,
    join_affines,
    join_geometries,
    linear_operator,
    variable_inputs,
)

_WEIGHTED = frozenset({"Conv", "BatchNormalization", "Pad", "Dropout"})


@dataclass(frozen=True)
class Region:
    """A single-entry single-exit subgraph, its nodes in execution order."""

    entry: ir.Value
    output: ir.Value
    nodes: tuple[ir.Node, ...]


def find_region(
    graph: Graph, entry: ir.Value, output: ir.Value, order: dict[ir.Node, int]
) -> Region:
    """The subgraph between two tensors.

    Raises:
        NotExactError: something other than `entry` enters or something other than `output`
            leaves; names it.
    """
    nodes = [
        node
        for node in topological_between(entry, output, order)
        if not all(graph.is_constant(value) for value in node.outputs)
    ]
    _check_single_entry(graph, nodes, entry, output)
    inside = set(nodes)
    _check_single_exit(nodes, inside, output)
    return Region(entry, output, tuple(nodes))


def _check_single_entry(
    graph: Graph, nodes: Iterable[ir.Node], entry: ir.Value, output: ir.Value
) -> None:
    """Every tensor that nodes behind `entry` read must come from it, or be constant."""
    behind = {entry}
    for node in nodes:
        if not behind.isdisjoint(node.inputs):
            behind.update(node.outputs)
    if output not in behind:
        raise NotExactError(f"{output.name!r} does not depend on {entry.name!r}")
    for node in nodes:
        if behind.isdisjoint(node.outputs):
            continue
        for value in variable_inputs(graph, node):
            if value not in behind:
                raise NotExactError(
                    f"it is not single-entry: {value.name!r} enters at {node_label(node)!r}"
                )


def _check_single_exit(nodes: Iterable[ir.Node], inside: set[ir.Node], output: ir.Value) -> None:
    for node in nodes:
        for value in node.outputs:
            if value is output:
                continue
            if value.is_graph_output():
                raise NotExactError(
                    f"it is not single-exit: {value.name!r} is an output of the graph"
                )
            for reader in consumers(value):
                if reader not in inside:
                    raise NotExactError(
                        f"it is not single-exit: {value.name!r} is also read by "
                        f"{node_label(reader)!r}"
                    )


def region_geometry(graph: Graph, region: Region) -> Geometry:
    """Shape of the one convolution that equals a region; raises NotExactError with the reason."""
    geometry: Geometry = _walk(
        graph,
        region,
        build=lambda operator: operator.geometry,
        compose=lambda first, second, sizes: first.then(second, sizes),
        join=join_geometries,
        start=lambda channels, rank: identity(channels, rank).geometry,
    )
    return geometry


def region_affine(graph: Graph, region: Region) -> AffineConv:
    """The one affine convolution that equals a region; raises NotExactError with the reason."""
    affine: AffineConv = _walk(
        graph,
        region,
        build=lambda operator: operator.build(),
        compose=lambda first, second, sizes: first.then(second, sizes),
        join=join_affines,
        start=identity,
    )
    return affine


def region_macs(graph: Graph, region: Region, sizes: Sequence[int]) -> int:
    """Multiply-accumulates per image of a region's convolutions, for spatial sizes of its entry.

    Raises:
        NotExactError: the region is not linear.
    """
    rank, channels = entry_rank_and_channels(graph, region)
    known = {region.entry: (channels, tuple(sizes))}
    total = 0
    for node in region.nodes:
        sources = variable_inputs(graph, node)
        if is_join(graph, node):
            joined = sum(known[source][0] for source in sources)
            width = joined if is_op(node, "Concat") else known[sources[0]][0]
            known[node.outputs[0]] = (width, known[sources[0]][1])
            continue
        before = known[sources[0]]
        geometry = linear_operator(node, Context(graph, rank, *before)).geometry
        if is_op(node, "Conv"):
            total += geometry.macs(before[1])
        known[node.outputs[0]] = (geometry.out_channels, geometry.output_sizes(before[1]))
    return total


def _walk(
    graph: Graph,
    region: Region,
    *,
    build: Callable[[LinearOperator], Any],
    compose: Callable[[Any, Any, tuple[int | None, ...] | None], Any],
    join: Join,
    start: Callable[[int, int], Any],
) -> Any:
    """Evaluate a region forward; geometries and affine convolutions walk the same way."""
    rank, channels = entry_rank_and_channels(graph, region)
    sizes = graph.sizes(region.entry) or (None,) * rank
    if len(sizes) != rank:
        raise NotExactError(f"{region.entry.name!r} has {len(sizes)} spatial axes, not {rank}")
    # A tensor is its last operator after what came before: normalisation folds into the operator
    # first, which is far smaller than the composed kernel.
    values: dict[ir.Value, tuple[Any, Any]] = {}
    known: dict[ir.Value, tuple[int, tuple[int | None, ...]]] = {region.entry: (channels, sizes)}

    def whole(value: ir.Value) -> Any:
        before, last = values.get(value, (None, None))
        if last is None:
            return start(channels, rank)
        if before is not None:
            values[value] = (None, compose(before, last, sizes))
        return values[value][1]

    for node in region.nodes:
        output = node.outputs[0]
        sources = variable_inputs(graph, node)
        if is_join(graph, node):
            joined = join(node, [whole(source) for source in sources], sizes)
            values[output] = (None, joined)
            known[output] = _known_after(joined, sizes)
            continue
        if len(sources) != 1:
            raise NotExactError(_why_not_single_input(node, sources))
        source = sources[0]
        if source not in known:
            raise NotExactError(f"{node_label(node)!r} does not read {region.entry.name!r}")
        part = build(linear_operator(node, Context(graph, rank, *known[source])))
        known[output] = _known_after(part, known[source][1])
        if source not in values:
            values[output] = (None, part)
        elif _is_per_channel(part):
            before, last = values[source]
            values[output] = (before, compose(last, part, None))
        else:
            values[output] = (whole(source), part)
    return whole(region.output)


def _why_not_single_input(node: ir.Node, sources: Sequence[ir.Value]) -> str:
    weights = [value for value in sources if value is not node.inputs[0]]
    if weights and is_op(node, *_WEIGHTED):
        return f"{node_label(node)!r} reads {weights[0].name!r}, which is not a constant"
    return f"{node.op_type} {node_label(node)!r} combines two tensors"


def _is_per_channel(value: Geometry | AffineConv) -> bool:
    geometry = value if isinstance(value, Geometry) else value.geometry
    return geometry.groups == geometry.out_channels and all(
        axis == Axis() for axis in geometry.axes
    )


def _known_after(
    value: Geometry | AffineConv, sizes: tuple[int | None, ...]
) -> tuple[int, tuple[int | None, ...]]:
    """Channels and sizes of what `value` makes of a tensor of these sizes."""
    width = value.out_channels if isinstance(value, Geometry) else value.weight.shape[0]
    if len(value.axes) != len(sizes):
        raise NotExactError(f"a window of {len(value.axes)} axes reads {len(sizes)} spatial axes")
    outputs = tuple(
        None if size is None else axis.output_size(size)
        for axis, size in zip(value.axes, sizes, strict=True)
    )
    return width, outputs


def entry_rank_and_channels(graph: Graph, region: Region) -> tuple[int, int]:
    """Spatial rank and channels of a region's entry: from its shape, else from its weights.

    Raises:
        NotExactError: neither says, or there are no spatial axes for a convolution.
    """
    shape = graph.shape(region.entry)
    if shape is not None and len(shape) < 3:
        raise NotExactError(f"{region.entry.name!r} has no spatial axes")
    if shape is not None and isinstance(shape[1], int):
        return len(shape) - 2, shape[1]
    for node in region.nodes:
        if is_op(node, "Conv") and graph.is_constant(node.inputs[1]):
            weight = constant_shape(graph, node.inputs[1])
            return len(weight) - 2, weight[1] * attribute(node, "group", 1)
    raise NotExactError(f"the shape of {region.entry.name!r} is unknown")

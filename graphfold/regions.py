"""Linear regions: single-entry single-exit subgraphs, and the one convolution that equals each."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
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
    is_vector,
    join_affines,
    join_geometries,
    linear_operator,
    variable_inputs,
)

_WEIGHTED = frozenset({"Conv", "BatchNormalization", "Pad", "Dropout"})


@dataclass(frozen=True)
class Region:
    """A single-entry single-exit subgraph.

    Attributes:
        entry, output: where it begins and ends.
        nodes: in execution order.
        aside: what else its sums add, which is no part of what the region makes of its entry.
        sizes: of the entry's spatial axes, where its own shape does not say.
    """

    entry: ir.Value
    output: ir.Value
    nodes: tuple[ir.Node, ...]
    aside: frozenset[ir.Value] = frozenset()
    sizes: tuple[int | None, ...] | None = None

    def sources(self, graph: Graph, node: ir.Node) -> list[ir.Value]:
        """What a node in it reads of what comes from the entry."""
        return [value for value in variable_inputs(graph, node) if value not in self.aside]


def find_region(
    graph: Graph,
    entry: ir.Value,
    output: ir.Value,
    order: dict[ir.Node, int],
    *,
    vectors: bool = False,
) -> Region:
    """The subgraph between two tensors.

    With `vectors`, what is added to all pixels alike may enter from elsewhere.

    Raises:
        NotExactError: something other than `entry` enters or something other than `output`
            leaves; names it.
    """
    nodes = [
        node
        for node in topological_between(entry, output, order)
        if not all(graph.is_constant(value) for value in node.outputs)
    ]
    behind = _behind(nodes, entry)
    if output not in behind:
        raise NotExactError(f"{output.name!r} does not depend on {entry.name!r}")
    nodes = [node for node in nodes if not behind.isdisjoint(node.outputs)]
    aside = frozenset(_added_vectors(graph, nodes, behind)) if vectors else frozenset()
    _check_single_entry(graph, nodes, behind | aside)
    inside = set(nodes)
    _check_single_exit(nodes, inside, output)
    return Region(entry, output, tuple(nodes), aside)


def _behind(nodes: Iterable[ir.Node], entry: ir.Value) -> set[ir.Value]:
    """The entry, and everything that nodes in execution order make of it."""
    behind = {entry}
    for node in nodes:
        if not behind.isdisjoint(node.inputs):
            behind.update(node.outputs)
    return behind


def _added_vectors(
    graph: Graph, nodes: Iterable[ir.Node], behind: Collection[ir.Value]
) -> Iterator[ir.Value]:
    """Vectors of as many channels as what they are added to, computed elsewhere."""
    for node in nodes:
        sources = variable_inputs(graph, node)
        channels = {graph.channels(value) for value in sources if value in behind}
        if is_op(node, "Add", "Sum") and len(channels) == 1:
            known = channels - {None}
            outside = [value for value in sources if value not in behind]
            yield from (
                value
                for value in outside
                if is_vector(graph, value) and graph.channels(value) in known
            )


def _check_single_entry(
    graph: Graph, nodes: Iterable[ir.Node], allowed: Collection[ir.Value]
) -> None:
    """Every tensor that nodes behind the entry read must be allowed, or constant."""
    for node in nodes:
        for value in variable_inputs(graph, node):
            if value not in allowed:
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
        sources = region.sources(graph, node)
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
    sizes = region.sizes or graph.sizes(region.entry) or (None,) * rank
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
        sources = region.sources(graph, node)
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

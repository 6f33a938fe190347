"""Merge what is linear in front of a flattened tensor into the fully connected layer behind it.

A layer reads the flattened result of a linear operator, row n as z_n = sum over channels o and
pixels p of G[o, p, n] * (W * x + B * 1 + b)[o, p]. That is a layer on the flattened x itself: its
weights G'[i, q, n] = sum over o and taps t, with q = p * stride - begin + t * dilation, of
W[o, i, t] * G[o, p, n], the adjoint of the operator applied to each column of G seen as a map;
what the constants b and B of the operator make of each pixel contracts with G into the bias.
Exact everywhere, borders included, for convolutions of any kernel, stride, padding and grouping,
normalisation and constants per channel, pools and zero padding, alone or one after another.

What lies in between only views the tensor: Flatten, Reshape, Squeeze, Unsqueeze, Identity. Merged
is what makes multiply-accumulates fewest, elementwise operators counted as one per element, and
then constants; with `--allow-growth` what leaves the fewest operators.

Refused: sizes that are not fixed, results in between that are also read elsewhere or are outputs
of the graph, weights that are not constant, and merges that raise cost.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from graphfold.affine import AffineConv
from graphfold.dense import Layer, emit_dense, layer_bias, layer_weight, read_layer
from graphfold.emit import Emitter
from graphfold.errors import NotExactError
from graphfold.graph import Graph, is_op, only_consumer
from graphfold.linear import (
    FLOAT_TYPES,
    OPERATORS,
    Context,
    LinearOperator,
    linear_operator,
    variable_inputs,
)
from graphfold.maps import Dense
from graphfold.merge import put_in_place, segment_nodes
from graphfold.rewrite import Fold, Pass, Phase, Work, provenance, replaced_labels
from graphfold.runs import RunCost, growth

_VIEWS = ("Flatten", "Reshape", "Squeeze", "Unsqueeze", "Identity")
# How far back a merge may reach.
_MOST_OPERATORS = 24


@dataclass(frozen=True)
class _Operator:
    """A linear operator with the sizes of what it reads."""

    node: ir.Node
    source: ir.Value
    sizes: tuple[int, ...]
    linear: LinearOperator

    @property
    def macs(self) -> int:
        """Multiply-accumulates per image, those of a convolution only."""
        return self.linear.geometry.macs(self.sizes) if is_op(self.node, "Conv") else 0

    def cost(self) -> RunCost:
        """Cost per image, elementwise operations counted as one each."""
        geometry = self.linear.geometry
        if is_op(self.node, "Conv"):
            return RunCost(self.macs, geometry.params, 1)
        pixels = math.prod(geometry.output_sizes(self.sizes)) * math.prod(geometry.kernel)
        return RunCost(pixels * geometry.out_channels, 0, 1)


@dataclass(frozen=True)
class _Site:
    """A layer, the views that flatten what it reads, and the operators before, in that order."""

    operators: tuple[_Operator, ...]
    views: tuple[ir.Node, ...]
    layer: Layer

    @property
    def nodes(self) -> tuple[ir.Node, ...]:
        """All that one layer is to replace, in execution order."""
        return (*(each.node for each in self.operators), *self.views, self.layer.product)

    @property
    def source(self) -> ir.Value:
        """What the first operator reads."""
        return self.operators[0].source

    @property
    def output(self) -> ir.Value:
        """What the layer makes."""
        return self.layer.product.outputs[0]

    @property
    def inputs(self) -> int:
        """Elements per image of what the first operator reads."""
        first = self.operators[0]
        return first.linear.geometry.in_channels * math.prod(first.sizes)

    @property
    def macs(self) -> tuple[int, int]:
        """Multiply-accumulates per image before and after."""
        before = sum(each.macs for each in self.operators)
        features = self.layer.features
        return before + self.layer.inputs * features, self.inputs * features

    def present(self) -> RunCost:
        """Cost per image as it is."""
        features = self.layer.features
        products = self.layer.inputs * features
        start = RunCost(products, products + features, 1 + len(self.views))
        return sum((each.cost() for each in self.operators), start=start)

    def merged(self) -> RunCost:
        """Cost per image as one layer."""
        features = self.layer.features
        products = self.inputs * features
        return RunCost(products, products + features, 2)


@dataclass(frozen=True)
class MergeDense(Pass):
    """One fully connected layer for a linear region, its flattening and the layer behind."""

    name: ClassVar[str] = "merge_dense"
    phase: ClassVar[Phase] = Phase.FOLD
    order: ClassVar[int] = 3

    def find(self, work: Work) -> Iterable[_Site]:
        """For every layer behind a flattened tensor, the region that is best merged into it."""
        owned = segment_nodes(work)
        found = []
        for node in work.graph.nodes():
            if node in owned or not is_op(node, "Gemm", "MatMul"):
                continue
            sites = list(_sites(work, node, owned))
            if sites:
                found.append(min(sites, key=lambda site: _order(work, site, sites[-1])))
        return found

    def label(self, candidate: _Site) -> str:
        """The layer's output tensor."""
        return candidate.output.name or ""

    def check(self, work: Work, candidate: _Site) -> str | None:
        """Refuse what is not cheaper."""
        present, merged = candidate.present(), candidate.merged()
        if merged >= present and not work.allow_growth:
            return f"merging raises cost: {growth(present, merged)}"
        return None

    def rewrite(self, work: Work, candidate: _Site) -> Fold:
        """Flatten what the region reads, and run one layer on that."""
        graph, layer = work.graph, candidate.layer
        entry = graph.current(candidate.source)
        dense = _merged(graph, candidate)
        metadata = provenance(candidate.nodes, self.name)
        emitter = Emitter(graph, layer.product, self.label(candidate), metadata)
        flat = emitter.node("Flatten", [entry], axis=1)
        shape = graph.shape(entry)
        if shape is not None and flat.name is not None:
            graph.shapes[flat.name] = (shape[0], dense.weight.shape[0])
        result = emit_dense(emitter, flat, dense, [layer.product], rank=2)
        fold = Fold(
            output=self.label(candidate),
            replaces=replaced_labels(metadata),
            kernel=(),
            strides=(),
            groups=1,
            boundary="exact",
            repair=None,
            reach=(),
            pass_name=self.name,
            macs=candidate.macs,
            input=entry.name,
        )
        return put_in_place(work, candidate.nodes, candidate.output, result, fold, dense)


# --- finding ----------------------------------------------------------------------------------


def _sites(work: Work, product: ir.Node, owned: set[ir.Node]) -> Iterator[_Site]:
    """All ways to merge what is before a layer, one operator more each."""
    graph = work.graph
    try:
        layer = read_layer(graph, product)
    except NotExactError:
        return
    views, value = _views_before(graph, product, owned)
    shape = graph.shape(product.inputs[0])
    if value is None or not views or (is_op(product, "MatMul") and len(shape or ()) != 2):
        return
    reader: ir.Node = views[0]
    operators: tuple[_Operator, ...] = ()
    elements = layer.inputs
    while len(operators) < _MOST_OPERATORS:
        operator = _operator(graph, value, reader)
        if operator is None or operator.node in owned:
            return
        geometry = operator.linear.geometry
        outputs = geometry.output_sizes(operator.sizes)
        if math.prod(outputs) * geometry.out_channels != elements:
            return
        operators = (operator, *operators)
        yield _Site(operators, views, layer)
        reader, value = operator.node, operator.source
        elements = math.prod(operator.sizes) * geometry.in_channels


def _views_before(
    graph: Graph, product: ir.Node, owned: set[ir.Node]
) -> tuple[tuple[ir.Node, ...], ir.Value | None]:
    """What views a tensor in front of a layer, in execution order, and that tensor."""
    views: tuple[ir.Node, ...] = ()
    reader, value = product, product.inputs[0]
    while value is not None:
        node = value.producer()
        if node is None or not is_op(node, *_VIEWS) or node in owned:
            break
        if only_consumer(value) is not reader or node.graph is not reader.graph:
            return (), None
        if len(variable_inputs(graph, node)) != 1:
            return (), None
        views = (node, *views)
        reader, value = node, node.inputs[0]
    return views, value


def _operator(graph: Graph, value: ir.Value, reader: ir.Node) -> _Operator | None:
    """The linear operator that makes a tensor for one reader alone; None where it is none."""
    node = value.producer()
    if node is None or not is_op(node, *OPERATORS) or only_consumer(value) is not reader:
        return None
    sources = variable_inputs(graph, node)
    shape = graph.shape(sources[0]) if len(sources) == 1 else None
    if shape is None or len(shape) < 3 or reader.graph is not node.graph:
        return None
    known = [size for size in shape[1:] if isinstance(size, int)]
    if len(known) < len(shape) - 1 or graph.dtype(sources[0]) not in FLOAT_TYPES:
        return None
    channels, sizes = known[0], tuple(known[1:])
    try:
        linear = linear_operator(node, Context(graph, len(sizes), channels, sizes))
    except NotExactError:
        return None
    return _Operator(node, sources[0], sizes, linear)


def _order(work: Work, site: _Site, longest: _Site) -> tuple[int, ...]:
    """Rank of a way to merge: by the cost of all operators, merged or not."""
    apart = longest.operators[: len(longest.operators) - len(site.operators)]
    cost = sum((each.cost() for each in apart), start=site.merged())
    if work.allow_growth:
        return cost.operators, cost.macs, cost.params
    return cost.macs, cost.params, cost.operators


# --- algebra ----------------------------------------------------------------------------------


def _merged(graph: Graph, site: _Site) -> Dense:
    """The one layer that a site is, in float64."""
    product = site.layer.product
    weight = layer_weight(graph, product)
    bias = layer_bias(graph, product, site.layer.features)
    dense = Dense(weight, bias, flattens=True)
    for operator in site.operators[::-1]:
        dense = flattened_behind(operator.linear.build(), operator.sizes, dense)
    return dense


def flattened_behind(affine: AffineConv, sizes: Sequence[int], dense: Dense) -> Dense:
    """The layer on the flattened x that equals a layer on the flattened result of a map of x.

    Args:
        affine: the map.
        sizes: spatial sizes of x.
        dense: the layer on the map's result, rows [O, *output sizes] flattened.
    """
    outputs = affine.geometry.output_sizes(sizes)
    features = dense.weight.shape[1]
    maps = dense.weight.T.reshape(features, affine.weight.shape[0], *outputs)
    weight = affine.adjoint(maps, sizes).reshape(features, -1).T
    constant = affine.constant_map(sizes).reshape(-1)
    return Dense(weight, constant @ dense.weight + dense.bias, flattens=True)

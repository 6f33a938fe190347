"""Fold runs of fully connected layers into one: normalisation, constants per feature, layers.

Rows x of length K become x W + b; a Gemm has W = alpha * B (or its transpose) and b = beta * C, a
MatMul has b = 0. Scale and shift per feature give x (W diag(s)) + (s * b + t), with
s = gamma / sqrt(var + eps) and t = beta - s * mean for a normalisation. Two layers give
x (W1 W2) + (b1 W2 + b2). All of it is exact for any number of rows and any leading axes of a
MatMul's input. Layers merge where K * N does not exceed what they cost apart, K * M + M * N
multiply-accumulates per row, then in parameters; the split of a run is the cheapest one. On
tensors of rank 2 a bias makes the result a Gemm, on higher ranks an Add behind the MatMul.

Refused: transposed inputs, weights, biases or statistics that are not constant, training mode,
constants that are not truly per feature, a BatchNormalization of a higher rank (its channels are
not the features), a result in between that is also read elsewhere or is an output of the graph,
and layers that cost more as one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from graphfold.affine import Array
from graphfold.dense import check_per_feature, emit_dense, layer_bias, layer_weight, read_layer
from graphfold.emit import Emitter
from graphfold.errors import NotExactError
from graphfold.graph import Graph, consumers, is_op, node_label
from graphfold.linear import (
    PER_CHANNEL,
    Context,
    check_read_once,
    constant_shape,
    linear_operator,
    variable_inputs,
)
from graphfold.maps import Dense
from graphfold.merge import put_in_place, segment_nodes
from graphfold.rewrite import Fold, Pass, Phase, Refused, Work, provenance, replaced_labels
from graphfold.runs import RunCost


@dataclass(frozen=True)
class _Layer:
    """A Gemm or MatMul [K, N] and what scales and shifts its features."""

    product: ir.Node
    scaling: tuple[ir.Node, ...]
    inputs: int
    features: int

    @property
    def nodes(self) -> tuple[ir.Node, ...]:
        return (self.product, *self.scaling)


@dataclass(frozen=True)
class _Run:
    """Neighbouring layers that read tensors of one rank; each reads only the one before."""

    layers: tuple[_Layer, ...]
    rank: int

    @property
    def nodes(self) -> tuple[ir.Node, ...]:
        return tuple(node for layer in self.layers for node in layer.nodes)

    @property
    def source(self) -> ir.Value:
        source = self.layers[0].product.inputs[0]
        assert source is not None
        return source

    @property
    def output(self) -> ir.Value:
        return self.nodes[-1].outputs[0]


@dataclass(frozen=True)
class FoldGemm(Pass):
    """One Gemm or MatMul for each run of layers."""

    name: ClassVar[str] = "fold_gemm"
    phase: ClassVar[Phase] = Phase.FOLD
    order: ClassVar[int] = 2

    def find(self, work: Work) -> Iterable[_Run | Refused]:
        """The pieces of each run that become one layer; what stays apart, with the reason."""
        owned = segment_nodes(work)
        taken: set[ir.Node] = set()
        found: list[_Run | Refused] = []
        for node in work.graph.nodes():
            if node in taken or node in owned or not is_op(node, "Gemm", "MatMul"):
                continue
            run, refused = _run_from(work.graph, node, owned)
            if run is not None:
                taken.update(run.nodes)
                found += _pieces(work, run)
            if refused is not None:
                found.append(refused)
        return found

    def label(self, candidate: _Run | Refused) -> str:
        """The output tensor of the last operator."""
        if isinstance(candidate, Refused):
            return candidate.output
        return candidate.output.name or ""

    def check(self, work: Work, candidate: _Run | Refused) -> str | None:
        """Refuse what is not equal or not cheaper."""
        del work
        return candidate.reason if isinstance(candidate, Refused) else None

    def rewrite(self, work: Work, candidate: _Run | Refused) -> Fold:
        """Replace the run by its one layer."""
        assert isinstance(candidate, _Run)
        graph, nodes = work.graph, candidate.nodes
        weight, bias = _composed(graph, candidate)
        macs = _macs(graph, candidate)
        metadata = provenance(nodes, self.name)
        emitter = Emitter(graph, nodes[-1], self.label(candidate), metadata)
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
            macs=macs,
            input=candidate.source.name,
        )
        dense = Dense(weight, bias)
        products = [layer.product for layer in candidate.layers]
        shape = graph.shape(candidate.output)
        result = emit_dense(emitter, candidate.source, dense, products, candidate.rank, shape)
        return put_in_place(work, nodes, candidate.output, result, fold, dense)


# --- finding ----------------------------------------------------------------------------------


def _run_from(
    graph: Graph, first: ir.Node, owned: set[ir.Node]
) -> tuple[_Run | None, Refused | None]:
    """The longest run from a product on, and what ends it where that looks like more of it."""
    try:
        layer = _layer(graph, first)
        rank = _rank_of(graph, first)
    except NotExactError as error:
        return None, _refusal_behind(graph, first, error.what)
    layers = [layer]
    while True:
        value = layers[-1].nodes[-1].outputs[0]
        follower = _follower(graph, value, owned)
        if follower is None:
            return _Run(tuple(layers), rank), None
        try:
            check_read_once(value, follower)
            if is_op(follower, "Gemm", "MatMul"):
                after = _layer(graph, follower)
                if after.inputs != layers[-1].features:
                    raise NotExactError(f"the sizes of {node_label(follower)!r} do not fit")
                layers.append(after)
            else:
                last = layers[-1]
                _scale_and_shift(graph, follower, rank, last.features)
                scaling = (*last.scaling, follower)
                layers[-1] = _Layer(last.product, scaling, last.inputs, last.features)
        except NotExactError as error:
            refused = Refused(follower.outputs[0].name or "", error.what)
            return _Run(tuple(layers), rank), refused


def _layer(graph: Graph, product: ir.Node) -> _Layer:
    """A product with nothing behind it yet; raises NotExactError with the reason."""
    found = read_layer(graph, product)
    return _Layer(product, (), found.inputs, found.features)


def _rank_of(graph: Graph, product: ir.Node) -> int:
    """Number of axes of what a product reads and makes."""
    if is_op(product, "Gemm"):
        return 2
    shape = graph.shape(product.inputs[0])
    if shape is None or len(shape) < 2:
        raise NotExactError(f"the rank of what {node_label(product)!r} reads is not at least 2")
    return len(shape)


def _follower(graph: Graph, value: ir.Value, owned: set[ir.Node]) -> ir.Node | None:
    """The first reader that might fold: with one variable input, or a BatchNormalization."""
    for reader in consumers(value):
        if reader in owned or reader.graph is not graph.ir:
            continue
        if is_op(reader, "BatchNormalization", "Gemm") and reader.inputs[0] is value:
            return reader
        alone = variable_inputs(graph, reader) == [value]
        if is_op(reader, "MatMul") and reader.inputs[0] is value and alone:
            return reader
        if is_op(reader, *PER_CHANNEL) and alone:
            return reader
    return None


def _refusal_behind(graph: Graph, product: ir.Node, reason: str) -> Refused | None:
    """A reason to report where a normalisation or constants stand behind a Gemm."""
    weight = product.inputs[1]
    stored = weight is not None and weight.producer() is None and weight.is_initializer()
    follower = _follower(graph, product.outputs[0], set())
    if follower is None or not (stored or is_op(product, "Gemm")):
        return None
    return Refused(follower.outputs[0].name or "", reason)


# --- splitting --------------------------------------------------------------------------------


def _pieces(work: Work, run: _Run) -> Iterator[_Run | Refused]:
    """What of a run becomes one layer each: its cheapest split, and why the rest stays apart."""
    layers = run.layers
    best: list[tuple[RunCost, tuple[int, ...]]] = [(RunCost(), (0,))]
    for end in range(1, len(layers) + 1):
        options = [
            (best[start][0] + _cost(layers[start:end], run.rank), (*best[start][1], end))
            for start in range(end)
        ]
        best.append(min(options, key=lambda option: _order(work, option[0])))
    cuts = best[-1][1]
    for start, end in pairwise(cuts):
        piece = _Run(layers[start:end], run.rank)
        if len(piece.nodes) > _cost(piece.layers, piece.rank).operators:
            yield piece
    for cut in cuts[1:-1]:
        first, second = layers[cut - 1], layers[cut]
        apart = first.inputs * first.features + second.inputs * second.features
        merged = first.inputs * second.features
        reason = f"merging raises cost: {apart:,} to {merged:,} operations per row"
        yield Refused(second.nodes[-1].outputs[0].name or "", reason)


def _order(work: Work, cost: RunCost) -> tuple[int, ...]:
    if work.allow_growth:
        return cost.operators, cost.macs, cost.params
    return cost.macs, cost.params, cost.operators


def _cost(layers: Sequence[_Layer], rank: int) -> RunCost:
    """Cost of these layers as one, per row."""
    biased = any(_adds(node) for layer in layers for node in layer.nodes)
    macs = layers[0].inputs * layers[-1].features
    params = macs + (layers[-1].features if biased else 0)
    return RunCost(macs, params, 2 if biased and rank > 2 else 1)


def _adds(node: ir.Node) -> bool:
    if is_op(node, "Gemm"):
        return len(node.inputs) > 2 and node.inputs[2] is not None
    return is_op(node, "BatchNormalization", "Add", "Sub")


# --- algebra ----------------------------------------------------------------------------------


def _composed(graph: Graph, run: _Run) -> tuple[Array, Array]:
    """Weight [K, N] and bias [N] of a run, in float64."""
    weight: Array | None = None
    bias = np.zeros(())
    for layer in run.layers:
        after = layer_weight(graph, layer.product)
        own = layer_bias(graph, layer.product, layer.features)
        bias = own if weight is None else bias @ after + own
        weight = after if weight is None else weight @ after
        for node in layer.scaling:
            scale, shift = _scale_and_shift(graph, node, run.rank, layer.features)
            weight, bias = weight * scale, bias * scale + shift
    assert weight is not None
    return weight, bias


def _scale_and_shift(graph: Graph, node: ir.Node, rank: int, features: int) -> tuple[Array, Array]:
    """Scale and shift per feature; raises NotExactError with the reason."""
    sources = variable_inputs(graph, node)
    if len(sources) > 1:
        raise NotExactError(
            f"{node_label(node)!r} reads {sources[1].name!r}, which is not a constant"
        )
    if rank == 2:
        affine = linear_operator(node, Context(graph, 0, features, ())).build()
        return affine.weight.reshape(features), affine.bias
    if is_op(node, "BatchNormalization"):
        raise NotExactError(f"{node_label(node)!r} normalises an axis that is not the features")
    index = next(at for at, value in enumerate(node.inputs) if graph.is_constant(value))
    check_per_feature(constant_shape(graph, node.inputs[index]), rank, features, node)
    if "axis" in node.attributes:
        raise NotExactError(f"{node_label(node)!r} broadcasts along an axis of its own")
    constant = graph.constant(node.inputs[index])
    assert constant is not None
    vector = np.broadcast_to(constant.astype(np.float64).reshape(-1), (features,))
    if is_op(node, "Mul"):
        return vector, np.zeros(features)
    if is_op(node, "Div"):
        if index == 0 or not np.all(vector):
            what = "divides a constant by a tensor" if index == 0 else "divides by zero"
            raise NotExactError(f"{node_label(node)!r} {what}")
        return 1.0 / vector, np.zeros(features)
    if is_op(node, "Add"):
        return np.ones(features), vector
    sign = 1.0 if index == 1 else -1.0
    return np.full(features, sign), -sign * vector


# --- cost -------------------------------------------------------------------------------------


def _macs(graph: Graph, run: _Run) -> tuple[int, int] | None:
    """Multiply-accumulates per image before and after; the first axis counts images."""
    shape = graph.shape(run.source)
    rows = [size for size in (shape or ())[1:-1] if isinstance(size, int)]
    if len(rows) != run.rank - 2:
        return None
    before = sum(layer.inputs * layer.features for layer in run.layers)
    after = run.layers[0].inputs * run.layers[-1].features
    return before * math.prod(rows), after * math.prod(rows)

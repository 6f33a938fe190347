"""Loose linear runs: where they are, and their cheapest split into single convolutions.

A chain of linear operators may become one convolution, stay as it is, or be split anywhere in
between. The best split is a shortest path over the tensors of the chain; the cost of a piece is
known from geometry alone, before any weight is read.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from graphfold.emit import choose_repair, repair_cost
from graphfold.errors import NotExactError
from graphfold.geometry import Geometry
from graphfold.graph import attribute, is_op, node_label, only_consumer
from graphfold.linear import (
    FLOAT_TYPES,
    OPERATORS,
    PER_CHANNEL,
    Context,
    LinearOperator,
    linear_operator,
    variable_inputs,
    zero_padding,
)
from graphfold.prices import Prices
from graphfold.regions import Region
from graphfold.rewrite import Work

# Stands for sizes that are not fixed: costs are compared with one another, so any size that
# leaves room for borders ranks them alike.
NOMINAL_SIZE = 64
# Operators that may lead to a convolution: one tensor in, the same channels out.
_LEADING = (*PER_CHANNEL, "Pad", "Identity", "Dropout")
# How far ahead a piece may reach; kernels of longer merges grow beyond any use.
_LONGEST_PIECE = 24
# Where a step of a priced chain ends, its milliseconds, and what it merges.
_Way = tuple[int, float, tuple[tuple[int, int], ...]]


@dataclass(frozen=True, order=True)
class RunCost:
    """What a run costs per image, compared in this order.

    Attributes:
        macs: multiply-accumulates, elementwise operations counted as one each.
        params: constant elements read.
        operators: number of nodes.
    """

    macs: int = 0
    params: int = 0
    operators: int = 0

    def __add__(self, other: RunCost) -> RunCost:
        return RunCost(
            self.macs + other.macs, self.params + other.params, self.operators + other.operators
        )


@dataclass(frozen=True)
class Link:
    """One operator of a chain with the fixed and the nominal sizes of what it reads."""

    node: ir.Node
    source: ir.Value
    operator: LinearOperator
    sizes: tuple[int | None, ...]
    nominal: tuple[int, ...]
    folds_into_previous: bool

    @property
    def is_conv(self) -> bool:
        """Whether this operator has a dense or grouped kernel of its own."""
        return is_op(self.node, "Conv")

    @property
    def is_conv_or_folded(self) -> bool:
        """Whether a normalisation behind this operator folds into a convolution."""
        return self.is_conv or self.folds_into_previous

    def cost(self) -> RunCost:
        """Cost of the operator on its own; normalisation behind a convolution folds into it."""
        if self.folds_into_previous:
            return RunCost()
        geometry = self.operator.geometry
        if self.is_conv:
            return RunCost(geometry.macs(self.nominal), geometry.params, 1)
        pixels = math.prod(geometry.output_sizes(self.nominal)) * geometry.out_channels
        return RunCost(pixels * math.prod(geometry.kernel), 0, 1)


@dataclass(frozen=True)
class Chain:
    """A maximal run of linear operators, each reading only the one before."""

    links: tuple[Link, ...]

    def region(self, start: int, end: int) -> Region:
        """The nodes start..end-1 as a region."""
        nodes = tuple(link.node for link in self.links[start:end])
        return Region(self.links[start].source, nodes[-1].outputs[0], nodes)

    @property
    def convs(self) -> int:
        """Number of convolutions in the chain."""
        return sum(link.is_conv for link in self.links)


@dataclass(frozen=True)
class Split:
    """The cheapest way to run a chain: its cost, and the pieces that become one convolution."""

    cost: RunCost
    pieces: tuple[tuple[int, int], ...]


def chains(work: Work, nodes: Iterable[ir.Node]) -> Iterator[Chain]:
    """Maximal chains around the convolutions among these nodes that no segment owns, in order."""
    taken: set[ir.Node] = set()
    for node in nodes:
        if node in taken or node in work.barrier or not is_op(node, "Conv"):
            continue
        chain = _chain_from(work, node)
        if chain is not None:
            taken.update(link.node for link in chain.links)
            yield chain


def mergeable_chains(work: Work) -> Iterator[Chain]:
    """The graph's chains of two convolutions or more, or with operators that lead to the first."""
    candidates = [node for node in work.graph.nodes() if _has_company(work, node)]
    for chain in chains(work, candidates):
        if chain.convs > 1 or not chain.links[0].is_conv:
            yield chain


def _has_company(work: Work, conv: ir.Node) -> bool:
    """Whether operators' names alone allow a chain around this convolution; reads no numbers."""
    if not is_op(conv, "Conv"):
        return False
    source = conv.inputs[0]
    before = None if source is None else source.producer()
    if before is not None and is_op(before, "Conv", *_LEADING):
        sources = variable_inputs(work.graph, before)
        if len(sources) == 1:
            return True
    node = only_consumer(conv.outputs[0])
    while is_op(node, *OPERATORS) and node not in work.barrier:
        assert node is not None
        if is_op(node, "Conv"):
            return True
        node = only_consumer(node.outputs[0])
    return False


def _first_before(work: Work, conv: ir.Node) -> ir.Node:
    """The first of the linear operators that lead to this convolution and to nothing else."""
    weight = work.graph.shape(conv.inputs[1])
    first = conv
    while weight is not None:
        sources = variable_inputs(work.graph, first)
        before = sources[0].producer() if len(sources) == 1 else None
        if before is None or before in work.barrier or before.graph is not work.graph.ir:
            break
        if not is_op(before, *_LEADING) or only_consumer(before.outputs[0]) is not first:
            break
        if is_op(before, "Pad") and not _pads_with_zeros(work, before, len(weight)):
            break
        if len(variable_inputs(work.graph, before)) != 1:
            break
        first = before
    return first


def _pads_with_zeros(work: Work, pad: ir.Node, rank: int) -> bool:
    try:
        zero_padding(pad, work.graph, rank)
    except NotExactError:
        return False
    return True


def _chain_from(work: Work, conv: ir.Node) -> Chain | None:
    """The chain around a convolution; what leads to it keeps the number of channels."""
    graph = work.graph
    weight = graph.shape(conv.inputs[1])
    if conv.inputs[1] is None or weight is None or len(weight) < 3:
        return None
    if not graph.is_constant(conv.inputs[1]):
        return None
    if graph.dtype(conv.inputs[1]) not in FLOAT_TYPES:
        return None
    first = _first_before(work, conv)
    rank = len(weight) - 2
    groups = attribute(conv, "group", 1)
    channels = (weight[1] if isinstance(weight[1], int) else 0) * groups
    while True:
        links = _links_from(work, first, rank, channels)
        if any(link.node is conv for link in links):
            return Chain(links)
        # An operator in front that is not linear ends what leads to the convolution.
        blocked = only_consumer(links[-1].node.outputs[0]) if links else first
        behind = None if blocked is None or blocked is conv else only_consumer(blocked.outputs[0])
        if behind is None:
            return None
        first = behind


def _links_from(work: Work, first: ir.Node, rank: int, channels: int) -> tuple[Link, ...]:
    """The linear operators from `first` on, each reading only the one before."""
    graph = work.graph
    sources = variable_inputs(graph, first)
    sizes = graph.sizes(sources[0] if sources else None) or (None,) * rank
    nominal = tuple(NOMINAL_SIZE if size is None else size for size in sizes)
    links: list[Link] = []
    node: ir.Node | None = first
    # A reader may sit in a branch of an If: what is outside must stay outside.
    while node is not None and node not in work.barrier and node.graph is graph.ir:
        sources = variable_inputs(graph, node)
        if len(sources) != 1 or len(sizes) != rank:
            break
        try:
            operator = linear_operator(node, Context(graph, rank, channels, sizes))
        except NotExactError:
            break
        folds = bool(links) and links[-1].is_conv_or_folded and is_op(node, *PER_CHANNEL)
        links.append(Link(node, sources[0], operator, sizes, nominal, folds))
        geometry = operator.geometry
        channels = geometry.out_channels
        sizes = tuple(
            None if size is None else axis.output_size(size)
            for axis, size in zip(geometry.axes, sizes, strict=True)
        )
        nominal = geometry.output_sizes(nominal)
        node = only_consumer(node.outputs[0])
    return tuple(links)


def best_split(work: Work, chain: Chain) -> Split:
    """The cheapest split of a chain (a shortest path over its tensors).

    With `work.allow_growth`, fewer operators come before cost; where a latency table knows the
    whole chain, it alone decides.
    """
    if work.prices is not None and not work.allow_growth:
        priced = _priced_split(work, work.prices, chain)
        if priced is not None:
            return priced
    links = chain.links
    best: list[Split] = [Split(RunCost(), ())]
    for end in range(1, len(links) + 1):
        alone = best[end - 1]
        best.append(Split(alone.cost + links[end - 1].cost(), alone.pieces))
    # Forward relaxation: from each start, one geometry grows operator by operator.
    for start in range(len(links)):
        for end, cost, _ in _piece_costs(work, links, start):
            through = Split(best[start].cost + cost, (*best[start].pieces, (start, end)))
            if _rank(work, through) < _rank(work, best[end]):
                best[end] = through
        if start + 1 <= len(links):
            step = best[start]
            alone = Split(step.cost + links[start].cost(), step.pieces)
            if _rank(work, alone) < _rank(work, best[start + 1]):
                best[start + 1] = alone
    return best[-1]


def _priced_split(work: Work, prices: Prices, chain: Chain) -> Split | None:
    """The fastest split by a latency table; None where it does not know a way through."""
    links = chain.links
    names = [links[0].source.name or "", *(link.node.outputs[0].name or "" for link in links)]
    position = {name: index for index, name in enumerate(names)}
    best: list[tuple[float, tuple[tuple[int, int], ...]] | None] = [None] * len(names)
    best[0] = (0.0, ())
    for start in range(len(links)):
        reached = best[start]
        if reached is None:
            continue
        ways: list[_Way] = [
            (position[target], value, ())
            for target, value in prices.steps_from(names[start])
            if position.get(target, -1) > start
        ]
        ways += _priced_merges(work, prices, links, names, start)
        for end, value, pieces in ways:
            total = (reached[0] + value, (*reached[1], *pieces))
            held = best[end]
            if held is None or total[0] < held[0]:
                best[end] = total
    found = best[-1]
    return None if found is None else Split(RunCost(operators=len(found[1])), found[1])


def _priced_merges(
    work: Work, prices: Prices, links: Sequence[Link], names: Sequence[str], start: int
) -> Iterator[_Way]:
    """Ends, milliseconds and pieces of what the table knows as one convolution from `start`."""
    kernel = links[start].operator.geometry.kernel
    already = prices.merged(names[start], names[start + 1], kernel)
    if already is not None:
        yield start + 1, already, ()
    for end, _, geometry in _piece_costs(work, links, start):
        value = prices.merged(names[start], names[end], geometry.kernel)
        if value is not None:
            yield end, value, ((start, end),)


def _rank(work: Work, split: Split) -> tuple[int, ...]:
    cost = split.cost
    if work.allow_growth:
        return cost.operators, cost.macs, cost.params
    return cost.macs, cost.params, cost.operators


def _piece_costs(
    work: Work, links: Sequence[Link], start: int
) -> Iterator[tuple[int, RunCost, Geometry]]:
    """Ends, costs and geometries of the pieces from `start` that one convolution equals."""
    first = links[start]
    merged: Geometry = first.operator.geometry
    convs = int(first.is_conv)
    for end in range(start + 2, min(len(links), start + _LONGEST_PIECE) + 1):
        link = links[end - 1]
        try:
            merged = merged.then(link.operator.geometry, first.sizes)
        except NotExactError:
            return
        convs += link.is_conv
        # What stands behind a convolution folds into it at no cost (fold_batchnorm).
        if convs > 1 or (convs == 1 and not first.is_conv):
            with suppress(NotExactError):
                yield end, merged_cost(work, merged, first.sizes, first.nominal), merged


def merged_cost(
    work: Work, geometry: Geometry, sizes: tuple[int | None, ...], nominal: tuple[int, ...]
) -> RunCost:
    """Cost of one convolution with its border repair.

    Raises:
        NotExactError: no repair of its border is possible.
    """
    repair = choose_repair(geometry, sizes, work.repair, opset=work.graph.opset)
    geometry = geometry.without_cropping()
    macs, params = repair_cost(geometry, nominal, repair)
    return RunCost(
        geometry.macs(nominal) + macs, geometry.params + params, 1 if repair is None else 2
    )


@dataclass(frozen=True)
class Alternative:
    """A loose run that stays as it is, and one convolution that would equal it.

    Attributes:
        input, output: tensors.
        convs: output tensors of its convolutions, in execution order.
        kernel: of the merged convolution, per axis.
        present, merged: costs per image; sizes that are not fixed count as `NOMINAL_SIZE`.
    """

    input: str
    output: str
    convs: tuple[str, ...]
    kernel: tuple[int, ...]
    present: RunCost
    merged: RunCost

    def to_json(self) -> dict[str, Any]:
        """As a JSON object; pairs are now and merged."""
        return {
            "input": self.input,
            "output": self.output,
            "convs": list(self.convs),
            "kernel": list(self.kernel),
            "operations": [self.present.macs, self.merged.macs],
            "params": [self.present.params, self.merged.params],
        }


def alternatives(work: Work) -> Iterator[Alternative]:
    """The longest merges in each loose run whose cheapest split merges nothing."""
    for chain in mergeable_chains(work):
        if chain.convs > 1 and not best_split(work, chain).pieces:
            yield from _longest_merges(work, chain)


def _longest_merges(work: Work, chain: Chain) -> Iterator[Alternative]:
    links, reached = chain.links, 0
    for start in (index for index, link in enumerate(links) if link.is_conv):
        pieces = {end: cost for end, cost, _ in _piece_costs(work, links, start)}
        end = max(pieces, default=0)
        convs = [link.node for link in links[start:end] if link.is_conv]
        if end <= reached or len(convs) < 2:
            continue
        reached = end
        merged, present = links[start].operator.geometry, links[start].cost()
        for link in links[start + 1 : end]:
            merged = merged.then(link.operator.geometry, links[start].sizes)
            present = present + link.cost()
        yield Alternative(
            input=links[start].source.name or "",
            output=links[end - 1].node.outputs[0].name or "",
            convs=tuple(node.outputs[0].name or "" for node in convs),
            kernel=tuple(merged.kernel),
            present=present,
            merged=pieces[end],
        )


def why_separate(work: Work, chain: Chain, first: int, second: int) -> str:
    """Why the operators first..second stay apart where the best split merges nothing.

    Not equal, or not cheaper: were the pair cheaper merged, so would be the whole split.
    """
    links = chain.links
    merged = links[first].operator.geometry
    present = links[first].cost()
    for link in links[first + 1 : second + 1]:
        try:
            merged = merged.then(link.operator.geometry, links[first].sizes)
        except NotExactError as error:
            return f"{error.what} ({node_label(link.node)})"
        present = present + link.cost()
    try:
        cost = merged_cost(work, merged, links[first].sizes, links[first].nominal)
    except NotExactError as error:
        return error.what
    return f"merging raises cost: {growth(present, cost)}"


def growth(present: RunCost, merged: RunCost) -> str:
    """The figures behind a refusal, for people."""
    if present.macs != merged.macs:
        return f"{present.macs:,} to {merged.macs:,} operations per image"
    return f"{present.params:,} to {merged.params:,} constants"

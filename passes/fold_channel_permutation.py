"""Fold a reordering of channels into the convolution before or after it.

z[j] = (W * x + b)[p(j)] is the convolution with rows W[p(j)], b[p(j)]; normalisation and constants
per channel in between are reordered with it. W * x[p] is the convolution of x itself in which
column j of W stands at column p(j); columns that p repeats are summed. Padding is the same zero
in every channel, so borders are exact. A reordering is a Gather of axis 1 with constant indices,
a Slice of it, one result of a Split of it, or a channel shuffle: Reshape [N, C, ...] to
[N, g, C / g, ...], Transpose of these two, Reshape back: p(j) = (j mod g) * C / g + j div g.

A Split whose results are all in use becomes one convolution for each with `--allow-growth` only:
they cost the same operations and save a copy, but each reads the input again, and measured they
are between 5 % slower and 25 % faster. Where a result is unused its rows are saved.

Refused: what would undo the grouping of a convolution (each group must keep its own channels),
indices that repeat or leave out channels where that raises cost, and tensors in between that
are also read elsewhere or are outputs of the graph.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from graphfold.affine import AffineConv
from graphfold.errors import NotExactError
from graphfold.geometry import Geometry
from graphfold.graph import Graph, attribute, consumers, is_op, node_label, only_consumer
from graphfold.linear import PER_CHANNEL, check_read_once, variable_inputs
from graphfold.merge import MergeCandidate, merged_geometry, replace_region, segment_nodes
from graphfold.regions import Region, region_affine, region_macs
from graphfold.rewrite import Fold, Pass, Phase, Work

_SLICE_INPUTS = ("starts", "ends", "axes", "steps")


@dataclass(frozen=True)
class _Reordering:
    """Nodes that make channel `indices[j]` of `channels` channel j of their result."""

    nodes: tuple[ir.Node, ...]
    indices: NDArray[np.int64]
    channels: int
    output: ir.Value

    @property
    def source(self) -> ir.Value:
        source = self.nodes[0].inputs[0]
        assert source is not None
        return source

    def keeps(self, groups: int) -> bool:
        """Whether each of so many equal groups holds channels of its own only."""
        if len(self.indices) % groups or self.channels % groups:
            return False
        owners = self.indices // (self.channels // groups)
        return bool(np.all(owners == np.repeat(np.arange(groups), len(owners) // groups)))


@dataclass(frozen=True)
class FoldChannelPermutation(Pass):
    """No node for a reordering of channels beside a convolution."""

    name: ClassVar[str] = "fold_channel_permutation"
    phase: ClassVar[Phase] = Phase.FOLD
    order: ClassVar[int] = 0

    def find(self, work: Work) -> Iterable[_Reordering]:
        """Every reordering of channels that reads a convolution or that one reads."""
        owned = segment_nodes(work)
        found = []
        for node in work.graph.nodes():
            for site in _reorderings(work.graph, node):
                if owned.intersection(site.nodes):
                    continue
                before, after = _conv_before(work.graph, site)[-1], _conv_after(site)
                if (before is not None and before not in owned) or (
                    after is not None and after not in owned
                ):
                    found.append(site)
        return found

    def label(self, candidate: _Reordering) -> str:
        """The output tensor of the reordering."""
        return candidate.output.name or ""

    def check(self, work: Work, candidate: _Reordering) -> str | None:
        """Refuse where neither neighbour can take the reordering over."""
        reasons = []
        for side in (_region_before, _region_after):
            try:
                side(work, candidate)
            except NotExactError as error:
                reasons.append(error.what)
            else:
                return None
        return "; ".join(dict.fromkeys(reason for reason in reasons if reason))

    def rewrite(self, work: Work, candidate: _Reordering) -> Fold:
        """Replace the reordering and its neighbour by one convolution."""
        graph = work.graph
        try:
            inner = _region_before(work, candidate)
            nodes = (*inner.nodes, *candidate.nodes)
            region = Region(inner.entry, candidate.output, nodes)
            affine = region_affine(graph, inner).take(candidate.indices.tolist())
        except NotExactError:
            inner = _region_after(work, candidate)
            nodes = (*candidate.nodes, *inner.nodes)
            region = Region(candidate.source, inner.output, nodes)
            affine = _with_columns_at(region_affine(graph, inner), candidate)
        sizes = graph.sizes(inner.entry)
        macs = None
        if sizes is not None and None not in sizes:
            known = [size for size in sizes if size is not None]
            macs = region_macs(graph, inner, known), affine.geometry.macs(known)
        return replace_region(work, MergeCandidate(region), affine, self.name, macs=macs)


# --- finding ----------------------------------------------------------------------------------


def _reorderings(graph: Graph, node: ir.Node) -> list[_Reordering]:
    """What a node, and those behind it, does to channels; one entry for each of its results."""
    if is_op(node, "Split"):
        return _split(graph, node)
    known = {"Gather": _gather, "Slice": _slice, "Reshape": _shuffle}
    read = known.get(node.op_type)
    site = None if read is None else read(graph, node)
    return [] if site is None else [site]


def _gather(graph: Graph, node: ir.Node) -> _Reordering | None:
    if not is_op(node, "Gather") or graph.is_constant(node.inputs[0]):
        return None
    shape, channels = graph.shape(node.inputs[0]), graph.channels(node.inputs[0])
    indices = graph.constant(node.inputs[1])
    if shape is None or channels is None or indices is None or indices.ndim != 1:
        return None
    if attribute(node, "axis", 0) not in (1, 1 - len(shape)) or len(indices) == 0:
        return None
    chosen = indices.astype(np.int64) % channels
    return _Reordering((node,), chosen, channels, node.outputs[0])


def _slice(graph: Graph, node: ir.Node) -> _Reordering | None:
    """A Slice of channels alone; before opset 10 its amounts are attributes."""
    shape = graph.shape(node.inputs[0])
    channels = graph.channels(node.inputs[0])
    if not is_op(node, "Slice") or shape is None or channels is None:
        return None
    starts, ends, axes, steps = (_amounts(graph, node, name) for name in _SLICE_INPUTS)
    if starts is None or ends is None or graph.is_constant(node.inputs[0]):
        return None
    given = len(node.inputs) > 3 and node.inputs[3] is not None
    if (given and axes is None) or (len(node.inputs) > 4 and steps is None):
        return None
    axes = [axis % len(shape) for axis in axes or range(len(starts))]
    if axes != [1]:
        return None
    chosen = range(*slice(starts[0], ends[0], (steps or [1])[0]).indices(channels))
    indices = np.asarray(chosen, dtype=np.int64)
    return _Reordering((node,), indices, channels, node.outputs[0]) if len(indices) else None


def _amounts(graph: Graph, node: ir.Node, name: str) -> list[int] | None:
    """One of a Slice's lists of numbers, from its input or attribute; None where unknown."""
    index = _SLICE_INPUTS.index(name) + 1
    found = attribute(node, name)
    if index < len(node.inputs):
        found = graph.constant(node.inputs[index])
    return None if found is None else [int(number) for number in found]


def _split(graph: Graph, node: ir.Node) -> list[_Reordering]:
    """The results of a Split of channels that something reads."""
    shape, channels = graph.shape(node.inputs[0]), graph.channels(node.inputs[0])
    if shape is None or channels is None or graph.is_constant(node.inputs[0]):
        return []
    widths = [graph.channels(value) for value in node.outputs]
    if attribute(node, "axis", 0) not in (1, 1 - len(shape)) or None in widths:
        return []
    known = [width for width in widths if width]
    if sum(known) != channels or len(known) != len(widths):
        return []
    starts = np.cumsum([0, *known])
    return [
        _Reordering((node,), np.arange(start, start + width), channels, value)
        for start, width, value in zip(starts, known, node.outputs, strict=False)
        if _is_used(value)
    ]


def _is_used(value: ir.Value) -> bool:
    return bool(value.uses()) or value.is_graph_output()


def _shuffle(graph: Graph, node: ir.Node) -> _Reordering | None:
    """Reshape, Transpose, Reshape as a channel shuffle; shapes tell, so they must be known."""
    if not is_op(node, "Reshape") or graph.is_constant(node.inputs[0]):
        return None
    swap = only_consumer(node.outputs[0])
    back = only_consumer(swap.outputs[0]) if swap is not None and is_op(swap, "Transpose") else None
    if swap is None or back is None or not is_op(back, "Reshape") or back.graph is not graph.ir:
        return None
    before, split = graph.shape(node.inputs[0]), graph.shape(node.outputs[0])
    after = graph.shape(back.outputs[0])
    if before is None or split is None or after is None or len(before) < 3:
        return None
    rank = len(before)
    channels, groups, width = before[1], split[1], split[2] if len(split) > 2 else None
    if not isinstance(channels, int) or not isinstance(groups, int) or not isinstance(width, int):
        return None
    if len(split) != rank + 1 or len(after) != rank or after[1] != channels:
        return None
    same = before[2:] == split[3:] == after[2:] and None not in before[2:]
    swaps = list(attribute(swap, "perm") or ()) == [0, 2, 1, *range(3, rank + 1)]
    if not same or not swaps or groups * width != channels or back.inputs[0] is not swap.outputs[0]:
        return None
    indices = np.arange(channels, dtype=np.int64).reshape(groups, width).T.reshape(-1)
    return _Reordering((node, swap, back), indices, channels, back.outputs[0])


def _conv_before(graph: Graph, site: _Reordering) -> list[ir.Node | None]:
    """What scales and shifts channels before a reordering, then the convolution or None."""
    found: list[ir.Node | None] = []
    value = site.source
    while True:
        producer = value.producer()
        if is_op(producer, "Conv"):
            return [*found, producer]
        sources = [] if producer is None else variable_inputs(graph, producer)
        if producer is None or not is_op(producer, *PER_CHANNEL) or len(sources) != 1:
            return [*found, None]
        found.append(producer)
        value = sources[0]


def _conv_after(site: _Reordering) -> ir.Node | None:
    readers = consumers(site.output)
    return next(
        (each for each in readers if is_op(each, "Conv") and each.inputs[0] is site.output), None
    )


# --- checking ---------------------------------------------------------------------------------


def _region_before(work: Work, site: _Reordering) -> Region:
    """The convolution before a reordering; raises NotExactError where it cannot take it over."""
    *scaling, conv = _conv_before(work.graph, site)
    if conv is None:
        raise NotExactError("")
    nodes = tuple(node for node in (conv, *scaling[::-1]) if node is not None)
    for node, reader in zip(nodes, (*nodes[1:], site.nodes[0]), strict=True):
        check_read_once(node.outputs[0], reader)
    entry = conv.inputs[0]
    assert entry is not None
    region = Region(entry, site.source, nodes)
    geometry = _geometry(work, region)
    _check_grouping(site, geometry.groups, conv)
    results = site.nodes[-1].outputs
    if len(results) > 1 and all(map(_is_used, results)) and not work.allow_growth:
        label = node_label(site.nodes[0])
        raise NotExactError(f"a convolution for each result of {label!r} may be slower")
    if len(site.indices) > site.channels and not work.allow_growth:
        raise NotExactError(_growth(site, site.channels, len(site.indices)))
    return region


def _region_after(work: Work, site: _Reordering) -> Region:
    """The convolution after a reordering; raises NotExactError where it cannot take it over."""
    conv = _conv_after(site)
    # Further results of a Split would stay, and the convolution would only cost more.
    if conv is None or len(site.nodes[-1].outputs) > 1:
        raise NotExactError("")
    check_read_once(site.output, conv)
    region = Region(site.output, conv.outputs[0], (conv,))
    geometry = _geometry(work, region)
    _check_grouping(site, geometry.groups, conv)
    if len(site.indices) < site.channels and not work.allow_growth:
        raise NotExactError(_growth(site, len(site.indices), site.channels))
    return region


def _geometry(work: Work, region: Region) -> Geometry:
    if segment_nodes(work).intersection(region.nodes):
        raise NotExactError(f"{node_label(region.nodes[0])!r} belongs to a segment")
    return merged_geometry(work, region)


def _check_grouping(site: _Reordering, groups: int, conv: ir.Node) -> None:
    if not site.keeps(groups):
        raise NotExactError(f"it would undo the grouping of {node_label(conv)!r}")


def _growth(site: _Reordering, present: int, merged: int) -> str:
    return (
        f"merging raises cost: {node_label(site.nodes[0])!r} takes {present} channels to {merged}"
    )


# --- algebra ----------------------------------------------------------------------------------


def _with_columns_at(conv: AffineConv, site: _Reordering) -> AffineConv:
    """A convolution of the reordered tensor as one of the tensor before."""
    groups, (out, width, *kernel) = conv.groups, conv.weight.shape
    columns = site.indices.reshape(groups, width) % (site.channels // groups)
    blocks = conv.weight.reshape(groups, out // groups, width, *kernel)
    weight = np.zeros((groups, out // groups, site.channels // groups, *kernel))
    for group, targets in enumerate(columns):
        for position, column in enumerate(targets):
            weight[group, :, column] += blocks[group, :, position]
    return replace(conv, weight=weight.reshape(out, -1, *kernel))

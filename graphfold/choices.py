"""The single convolutions that a linear segment may become: their kernels, and what they drop.

A convolution's taps reach (k - 1) * dilation further, times the strides before it; along branches
the longest counts, so a kernel is 1 + the largest sum over all ways through. Only convolutions of
stride 1 may be dropped, so what one adds does not depend on which others stay.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from graphfold.graph import Graph, attribute, is_op
from graphfold.linear import variable_inputs
from graphfold.plan import Family
from graphfold.sites import ConvSite

Sizes = tuple[int, ...]


class MisfitError(Exception):
    """No single convolution has the window of these nodes; the reason, for people."""


@dataclass(frozen=True)
class Choice:
    """One convolution that a segment may become.

    Attributes:
        kernel, stride: of the convolution, one entry per spatial axis.
        family: dense or depthwise; pointwise counts as dense of kernel 1. Identity where nothing
            stays.
        removed_convs: conv sites inside that go, by name, in execution order.
        kept_l1: l1 norm of the weights of those that stay.
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    family: Family
    removed_convs: tuple[str, ...]
    kept_l1: float


@dataclass(frozen=True)
class _Growth:
    """One convolution or pool by what it adds to a window, or a join of several windows."""

    sources: tuple[int, ...]
    node: ir.Node | None = None
    added: Sizes = ()


class Window:
    """Kernel and stride of a segment from a tensor on, as it grows.

    Padding is left out: it decides where a merge is exact, not how large it is.

    Args:
        graph: not changed.
        source: the tensor the segment begins at.
        rank: spatial axes.
        kernels: of the convolutions.

    Attributes:
        added: by convolution, the taps it adds per axis.
    """

    def __init__(
        self, graph: Graph, source: ir.Value, rank: int, kernels: Mapping[ir.Node, Sizes]
    ) -> None:
        self._graph = graph
        self._kernels = kernels
        self.added: dict[ir.Node, Sizes] = {}
        # Tensors whose windows are always equal share one of these.
        self._growths = [_Growth(())]
        self._extents: list[Sizes] = [(1,) * rank]
        self._at: dict[ir.Value, int] = {source: 0}
        self._strides: dict[ir.Value, Sizes] = {source: (1,) * rank}
        self._last = source
        self._is_straight = True

    @property
    def kernel(self) -> Sizes:
        """Taps per axis with nothing removed."""
        return self._extents[self._at[self._last]]

    @property
    def stride(self) -> Sizes:
        """Stride per axis."""
        return self._strides[self._last]

    def extend(self, nodes: Iterable[ir.Node]) -> None:
        """Take in more nodes, in execution order.

        Raises:
            MisfitError: no single convolution has their window.
        """
        for node in nodes:
            inside = [value for value in variable_inputs(self._graph, node) if value in self._at]
            if not inside:
                continue
            strides = {self._strides[value] for value in inside}
            if len(strides) > 1:
                raise MisfitError(f"branches of different strides meet at {_name(node)!r}")
            stride = strides.pop()
            place = self._joined(dict.fromkeys(self._at[value] for value in inside))
            if is_op(node, "Conv", "AveragePool"):
                place, stride = self._grown(node, place, stride)
            self._last = node.outputs[0]
            for value in node.outputs:
                self._at[value], self._strides[value] = place, stride

    def without(self, removed: Collection[ir.Node]) -> Sizes:
        """Taps per axis without some of the convolutions."""
        if self._is_straight:
            lost = [self.added[node] for node in removed]
            return tuple(size - sum(axis) for size, *axis in zip(self.kernel, *lost, strict=True))
        extents: list[Sizes] = [self._extents[0]]
        for growth in self._growths[1:]:
            found = _largest(extents[place] for place in growth.sources)
            if growth.node is not None and growth.node not in removed:
                found = _sum(found, growth.added)
            extents.append(found)
        return extents[self._at[self._last]]

    def _joined(self, places: Collection[int]) -> int:
        """Where several windows are one: at the largest, if it always is, as over a skip."""
        latest = max(places)
        if all(place == latest or self._leads_to(place, latest) for place in places):
            return latest
        self._is_straight = False
        found = _largest(self._extents[place] for place in places)
        return self._append(_Growth(tuple(places)), found)

    def _leads_to(self, place: int, other: int) -> bool:
        while other > place and len(self._growths[other].sources) == 1:
            other = self._growths[other].sources[0]
        return other == place

    def _append(self, growth: _Growth, extent: Sizes) -> int:
        self._growths.append(growth)
        self._extents.append(extent)
        return len(self._extents) - 1

    def _grown(self, node: ir.Node, place: int, stride: Sizes) -> tuple[int, Sizes]:
        rank = len(stride)
        kernel = self._kernels.get(node) or tuple(attribute(node, "kernel_shape"))
        dilations = attribute(node, "dilations") or [1] * rank
        strides = attribute(node, "strides") or [1] * rank
        if not len(kernel) == len(dilations) == len(strides) == rank:
            raise MisfitError(f"the window of {_name(node)!r} is not one of {rank} axes")
        if any(taps > 1 and step > 1 for taps, step in zip(kernel, stride, strict=True)):
            raise MisfitError(
                f"the kernel {list(kernel)} of {_name(node)!r} stands behind stride {list(stride)}"
            )
        added = tuple(
            (taps - 1) * dilation * step
            for taps, dilation, step in zip(kernel, dilations, stride, strict=True)
        )
        self.added[node] = added
        if any(added):
            extent = _sum(self._extents[place], added)
            place = self._append(_Growth((place,), node, added), extent)
        return place, tuple(one * other for one, other in zip(stride, strides, strict=True))


def choices(
    window: Window, convs: Sequence[ConvSite], l1: Callable[[ConvSite], float]
) -> list[Choice]:
    """One choice per kernel and family, the largest kernels first.

    Of each kind of convolution (taps added, depthwise or not) those of the smallest norm go first:
    in a segment without branches that is LayerMerge's equation 3 over all subsets.

    Args:
        window: of the whole segment.
        convs: all its conv sites, in execution order.
        l1: the norm of a site's weights.
    """
    kinds: dict[tuple[Sizes, bool], list[ConvSite]] = defaultdict(list)
    for site in convs:
        if site.removable:
            kinds[window.added[site.conv], site.depthwise].append(site)
    for sites in kinds.values():
        sites.sort(key=l1)
    total = sum(map(l1, convs))
    dense = sum(not site.depthwise for site in convs)
    best: dict[tuple[Sizes, Family], tuple[float, list[ConvSite]]] = {}
    for gone in _subsets(window, list(kinds.values())):
        if len(gone) == len(convs):
            continue
        kept = total - sum(map(l1, gone))
        is_depthwise = dense == sum(not site.depthwise for site in gone)
        key = window.without([site.conv for site in gone]), _family(is_depthwise)
        if key not in best or kept > best[key][0]:
            best[key] = kept, gone
    found = [
        Choice(kernel, window.stride, family, _names(convs, gone), kept)
        for (kernel, family), (kept, gone) in best.items()
    ]
    return sorted(found, key=lambda each: (-math.prod(each.kernel), each.family))


def _subsets(window: Window, kinds: Sequence[Sequence[ConvSite]]) -> Iterator[list[ConvSite]]:
    """What may go, by the number of each kind; all or none of those that add no taps."""
    counts = [
        range(len(sites) + 1) if any(window.added[sites[0].conv]) else (0, len(sites))
        for sites in kinds
    ]
    for numbers in itertools.product(*counts):
        gone: list[ConvSite] = []
        for number, sites in zip(numbers, kinds, strict=True):
            gone += sites[:number]
        yield gone


def _family(is_depthwise: bool) -> Family:
    return "depthwise" if is_depthwise else "dense"


def _names(convs: Sequence[ConvSite], gone: Sequence[ConvSite]) -> tuple[str, ...]:
    names = {site.name for site in gone}
    return tuple(site.name for site in convs if site.name in names)


def _name(node: ir.Node) -> str:
    return node.outputs[0].name or ""


def _sum(one: Sizes, other: Sizes) -> Sizes:
    return tuple(a + b for a, b in zip(one, other, strict=True))


def _largest(extents: Iterable[Sizes]) -> Sizes:
    return tuple(max(axis) for axis in zip(*extents, strict=True))

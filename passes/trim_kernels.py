"""Cut rows and columns of zeros off a convolution's kernel.

A tap that is zero for all channels adds nothing. Where the outermost taps of an axis are such, the
kernel without them computes the same with as much less padding, since the windows begin or end
later by the taps' distance: pad - c * d for c taps of dilation d. Outputs stay where they were,
borders included. So a shift of all channels alike, a depthwise convolution whose kernels hold one
1 at the same place, keeps the taps that its shift needs; where that 1 lies in its middle it is no
more than padding, and joins the convolution behind it.

Taps that stand over the image's first or last pixel stay, zeros or not: padding cannot be
negative. So does one tap of a kernel of zeros.
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
from graphfold.geometry import Axis
from graphfold.graph import attribute, is_op
from graphfold.merge import (
    MergeCandidate,
    current_region,
    merged_geometry,
    replace_region,
    segment_nodes,
)
from graphfold.regions import Region, region_affine
from graphfold.rewrite import Fold, Pass, Phase, Work


@dataclass(frozen=True)
class TrimKernels(Pass):
    """Kernels without outer taps that are zero."""

    name: ClassVar[str] = "trim_kernels"
    phase: ClassVar[Phase] = Phase.FOLD
    order: ClassVar[int] = 0

    def find(self, work: Work) -> Iterable[Region]:
        """Every padded convolution whose outermost taps are zero."""
        owned = segment_nodes(work)
        return [
            Region(node.inputs[0], node.outputs[0], (node,))
            for node in work.graph.nodes()
            if node not in owned and node.inputs and node.inputs[0] is not None
            if is_op(node, "Conv") and _may_shrink(work, node)
        ]

    def label(self, candidate: Region) -> str:
        """The convolution's output tensor."""
        return candidate.output.name or ""

    def rewrite(self, work: Work, candidate: Region) -> Fold:
        """Replace the convolution by the one without the zeros."""
        region = current_region(work, candidate)
        affine = region_affine(work.graph, region)
        trimmed = trim(affine)
        sizes = work.graph.sizes(region.entry)
        macs = None
        if sizes is not None and None not in sizes:
            known = [size for size in sizes if size is not None]
            macs = affine.geometry.macs(known), trimmed.geometry.macs(known)
        return replace_region(work, MergeCandidate(region), trimmed, self.name, macs=macs)


def _may_shrink(work: Work, conv: ir.Node) -> bool:
    if not any(attribute(conv, "pads") or ()) and attribute(conv, "auto_pad", "NOTSET") == "NOTSET":
        return False
    source, weight = conv.inputs[0], work.graph.constant(conv.inputs[1])
    # One channel's kernel tells almost always, without a walk over all weights.
    if source is None or weight is None or weight.ndim < 3:
        return False
    if not _has_zero_edge(weight[:1, :1]):
        return False
    try:
        axes = merged_geometry(work, Region(source, conv.outputs[0], (conv,))).axes
    except NotExactError:
        return False
    return any(map(any, _zeros(weight, axes)))


def _has_zero_edge(weight: NDArray[np.generic]) -> bool:
    """Whether the first or last taps of an axis are zero."""
    edges = [weight.take(at, axis) for axis in range(2, weight.ndim) for at in (0, -1)]
    return not all(np.any(edge != 0) for edge in edges)


def trim(affine: AffineConv) -> AffineConv:
    """The same map without outer taps that are zero, as far as padding allows."""
    cuts = _zeros(affine.weight, affine.axes)
    axes = tuple(
        replace(
            axis,
            kernel=axis.kernel - before - after,
            begin=axis.begin - before * axis.dilation,
            end=axis.end - after * axis.dilation,
        )
        for axis, (before, after) in zip(affine.axes, cuts, strict=True)
    )
    kept = tuple(
        slice(before, axis.kernel - after)
        for axis, (before, after) in zip(affine.axes, cuts, strict=True)
    )
    weight = affine.weight[(slice(None), slice(None), *kept)]
    return AffineConv(weight, affine.bias, axes, affine.groups)


def _zeros(weight: NDArray[np.generic], axes: tuple[Axis, ...]) -> list[tuple[int, int]]:
    """Outer taps at the start and end of each axis that are zero and lie over padding."""
    cuts = []
    for number, axis in enumerate(axes):
        others = tuple(at for at in range(weight.ndim) if at != number + 2)
        used = np.flatnonzero(np.any(weight != 0, axis=others))
        first, last = (used[0], used[-1]) if len(used) else (0, 0)
        before = min(int(first), max(0, axis.begin) // axis.dilation)
        after = min(axis.kernel - 1 - int(last), max(0, axis.end) // axis.dilation)
        cuts.append((before, after))
    return cuts

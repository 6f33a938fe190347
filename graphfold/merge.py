"""Merging one region into one convolution: what merge passes share.

A region's nodes are replaced by the convolution that equals it, its border repaired where the
region's biases were zero-padded, under the name that its output had.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from graphfold.affine import AffineConv
from graphfold.bounds import coefficients
from graphfold.emit import Emitter, choose_repair, emit_affine, without_cropping
from graphfold.errors import NotExactError
from graphfold.geometry import Axis, Geometry
from graphfold.graph import is_op, nodes_between
from graphfold.linear import FLOAT_TYPES, OVERFLOWING
from graphfold.maps import AffineMap
from graphfold.regions import Region, find_region, region_affine, region_geometry, region_macs
from graphfold.rewrite import (
    FOLD_KEY,
    Fold,
    SegmentNames,
    Work,
    fold_record,
    provenance,
    replaced_labels,
)
from graphfold.vectors import added_vectors


@dataclass(frozen=True)
class MergeCandidate:
    """A region that is to become one convolution, and the plan's segment that says so, if any."""

    region: Region
    segment: SegmentNames | None = None


def segment_regions(work: Work) -> list[MergeCandidate]:
    """Regions of the plan's segments that are not one operator yet."""
    if not work.segments:
        return []
    values = work.graph.values()
    order = {node: index for index, node in enumerate(work.graph.ir)}
    found = []
    for segment in work.segments:
        source, output = values.get(segment.input), values.get(segment.output)
        if source is None or output is None or source is output:
            continue
        producer = output.producer()
        if producer in work.barrier:
            continue
        region = find_region(work.graph, source, output, order, vectors=True)
        found.append(MergeCandidate(region, segment))
    return found


def segment_nodes(work: Work) -> set[ir.Node]:
    """The nodes that belong to the plan's segments, merged already or not."""
    owned = set(work.barrier)
    for candidate in segment_regions(work):
        owned.update(candidate.region.nodes)
    return owned


def has_join(work: Work, region: Region) -> bool:
    """Whether a region is more than a chain: some tensor in it is read twice or summed."""
    from graphfold.linear import is_join

    return any(
        is_join(work.graph, node) and len(region.sources(work.graph, node)) > 1
        for node in region.nodes
    )


def merged_geometry(work: Work, region: Region) -> Geometry:
    """Geometry of a region's convolution; raises NotExactError where none is equal."""
    dtype = region_dtype(work, region)
    if dtype not in FLOAT_TYPES:
        raise NotExactError(f"its weights are {dtype.name if dtype else 'of unknown type'}")
    geometry = region_geometry(work.graph, region)
    added_vectors(work.graph, region)
    return geometry


def current_region(work: Work, region: Region) -> Region:
    """The same region after merges before it: its entry may have been replaced since."""
    current = work.graph.current
    aside = frozenset(map(current, region.aside))
    return replace(region, entry=current(region.entry), aside=aside)


def region_dtype(work: Work, region: Region) -> ir.DataType | None:
    """Element type of a region: that of its first weights."""
    for node in region.nodes:
        if is_op(node, "Conv"):
            return work.graph.dtype(node.inputs[1]) if node.inputs[1] is not None else None
    return work.graph.dtype(region.entry)


def merge_region(work: Work, candidate: MergeCandidate, pass_name: str) -> Fold:
    """Replace a region by its convolution.

    Raises:
        NotExactError: no single convolution is equal; the graph is unchanged.
    """
    graph, region = work.graph, candidate.region
    geometry = merged_geometry(work, region)
    sizes = graph.sizes(region.entry)
    repair = choose_repair(geometry, sizes, work.repair, opset=graph.opset)
    macs = _macs(work, region, geometry, sizes)
    affine = region_affine(graph, region)
    dtype = region_dtype(work, region)
    assert dtype is not None
    with np.errstate(over="ignore"):
        check_finite(affine.weight.astype(_numpy(dtype)), affine.bias.astype(_numpy(dtype)))
    return replace_region(work, candidate, affine, pass_name, repair=repair, macs=macs)


def replace_region(
    work: Work,
    candidate: MergeCandidate,
    affine: AffineConv,
    pass_name: str,
    *,
    repair: str | None = None,
    macs: tuple[int, int] | None = None,
) -> Fold:
    """Replace a region by an affine convolution that is known to equal it."""
    graph, region, segment = work.graph, candidate.region, candidate.segment
    if affine.border is None:
        repair = None
    metadata = provenance(region.nodes, pass_name)
    output = region.output
    producer = output.producer()
    assert producer is not None
    dtype = region_dtype(work, region)
    assert dtype is not None
    emitter = Emitter(graph, producer, output.name or "merged", metadata)
    result = emit_affine(emitter, region.entry, affine, _numpy(dtype), repair)
    merged = nodes_between(region.entry, result)
    for added in added_vectors(graph, region):
        vector = added.value
        if added.is_changed:
            vector = emit_affine(emitter, vector, added.affine(graph), _numpy(dtype), None)
        result = emitter.node("Add", [result, vector])
        merged |= {node for node in (result.producer(),) if node is not None}
    final = without_cropping(affine)
    fold = Fold(
        output=output.name or "",
        replaces=replaced_labels(metadata),
        kernel=tuple(axis.kernel for axis in final.axes),
        strides=tuple(axis.stride for axis in final.axes),
        groups=final.groups,
        boundary=segment.boundary if segment else "exact",
        repair=repair,
        reach=reach_of(final.axes),
        pass_name=pass_name,
        segment=segment.path if segment else None,
        macs=macs,
        input=region.entry.name,
    )
    # With vectors from the side, the output is no longer what the convolution makes of its input.
    fold = put_in_place(work, region.nodes, output, result, fold, None if region.aside else final)
    if segment is not None:
        work.barrier.update(merged)
    return fold


def check_finite(*weights: NDArray[Any]) -> None:
    """Raise NotExactError for weights with which results overflow, or that are none.

    Where a network overflows depends on the order of operations, which a merge changes.
    """
    for weight in weights:
        extremes = (float(weight.max(initial=0)), float(weight.min(initial=0)))
        if not all(abs(extreme) < OVERFLOWING for extreme in extremes):
            raise NotExactError("its weights are not finite, or so large that results overflow")


def put_in_place(
    work: Work,
    nodes: Sequence[ir.Node],
    output: ir.Value,
    result: ir.Value,
    fold: Fold,
    affine: AffineMap | None = None,
) -> Fold:
    """Let `result` stand for `output`, remove what only that needed, and record the fold.

    Returns:
        the fold with the coefficients of its rounding bound, from `affine` in float64 where given
        and the fold has none yet.
    """
    if affine is not None:
        if fold.coefficients is None:
            fold = replace(fold, coefficients=coefficients(affine))
        work.remember(fold.output, affine)
    made = result.producer()
    assert made is not None
    work.graph.take_over(output, result)
    work.graph.remove_dead(nodes)
    made.metadata_props[FOLD_KEY] = fold_record(fold)
    return fold


def _macs(
    work: Work, region: Region, geometry: Geometry, sizes: tuple[int | None, ...] | None
) -> tuple[int, int] | None:
    known = [size for size in sizes or () if size is not None]
    if len(known) < geometry.rank:
        return None
    return region_macs(work.graph, region, known), geometry.macs(known)


def _numpy(dtype: ir.DataType) -> np.dtype[np.generic]:
    return np.dtype(dtype.numpy())


def reach_of(axes: Sequence[Axis]) -> tuple[tuple[int, int], ...]:
    """Output rows per side of each axis whose window may reach into padding."""
    return tuple(
        (-(-max(0, axis.begin) // axis.stride), -(-max(0, axis.end) // axis.stride))
        for axis in axes
    )


def segment_problems(work: Work) -> Sequence[tuple[SegmentNames, str, str | None]]:
    """Segments that no single convolution equals or that contradict what the plan states.

    Returns:
        (segment, reason, hint) for each.
    """
    problems: list[tuple[SegmentNames, str, str | None]] = []
    for candidate in segment_regions(work):
        segment = candidate.segment
        assert segment is not None
        try:
            geometry = merged_geometry(work, candidate.region)
        except NotExactError as error:
            works = error.boundary_that_works if segment.boundary == "exact" else None
            hint = f"boundary: {works} would work" if works else None
            problems.append((segment, f"cannot become one convolution: {error.what}", hint))
            continue
        problems += [(segment, what, hint) for what, hint in _mismatches(segment, geometry)]
    return problems


def _mismatches(segment: SegmentNames, geometry: Geometry) -> list[tuple[str, str | None]]:
    found: list[tuple[str, str | None]] = []
    if segment.kernel is not None and segment.kernel != geometry.kernel:
        what = f"states kernel {list(segment.kernel)}, and the merge gives {list(geometry.kernel)}"
        found.append((what, None))
    family = family_of(geometry)
    # A dense convolution may have kernel 1: candidates are counted by kernel, not named by it.
    fits = (family, "dense") if family == "pointwise" else (family,)
    if segment.family is not None and segment.family not in fits:
        found.append((f"states family {segment.family}, and the merge gives {family}", None))
    return found


def family_of(geometry: Geometry) -> str:
    """`pointwise`, `depthwise` or `dense` (grouped counts as dense)."""
    if geometry.groups == geometry.in_channels > 1:
        return "depthwise"
    return "pointwise" if all(size == 1 for size in geometry.kernel) else "dense"

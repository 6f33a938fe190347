"""From an affine convolution back to graph nodes: one Conv, and the repair of its border.

The border kernel of an affine convolution (a bias that a later convolution zero-padded) is made
exact in one of four ways:

=============  ==================================================================================
map            a constant [1, O, ...] of full size is added; sizes must be fixed
table          the same from its distinct rows, [1, O, k, ...], gathered along each axis: small
               in the file, folded to the full map when a runtime loads it; sizes must be fixed
ones           the border kernel is convolved with an image of ones [1, 1, ...] made at run time,
               and added: any size, 1 / I of the convolution's work
channel        an input channel of ones is appended; any size, but it changes the channel count
=============  ==================================================================================

Choosing: `benchmarks/border_repair.py` measures them; see docs/border.md for its result.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from graphfold.affine import AffineConv
from graphfold.errors import NotExactError
from graphfold.geometry import Axis, Geometry
from graphfold.graph import Graph

REPAIRS = ("map", "table", "ones", "channel")
# Below this a full map is as small in the file as its table with index vectors.
_SMALL_MAP_ELEMENTS = 4096
# ConstantOfShape, which makes an image of ones, exists since then.
_ONES_OPSET = 9
# Add broadcasts without being told to since then.
_BROADCASTING_OPSET = 7


def choose_repair(
    geometry: Geometry,
    sizes: tuple[int | None, ...] | None,
    forced: str | None = None,
    *,
    opset: int,
) -> str | None:
    """The cheapest repair that is possible, or None where the border needs none.

    Raises:
        NotExactError: a forced repair needs sizes that are not fixed, or the only possible one
            needs a later opset.
    """
    repair = _cheapest_repair(geometry, sizes, forced)
    if repair is not None and opset < _BROADCASTING_OPSET:
        raise NotExactError(f"border repair {repair!r} needs opset {_BROADCASTING_OPSET} or later")
    if repair in ("ones", "channel") and opset < _ONES_OPSET:
        raise NotExactError(f"border repair {repair!r} needs opset {_ONES_OPSET} or later")
    return repair


def _cheapest_repair(
    geometry: Geometry, sizes: tuple[int | None, ...] | None, forced: str | None
) -> str | None:
    if not geometry.bordered:
        return None
    fixed = sizes is not None and all(size is not None for size in sizes)
    if forced is not None:
        if forced in ("map", "table") and not fixed:
            raise NotExactError(f"border repair {forced!r} needs sizes that are fixed")
        return forced
    if not fixed or sizes is None:
        return "ones"
    known = [size for size in sizes if size is not None]
    elements = geometry.out_channels * int(np.prod(geometry.output_sizes(known)))
    return "map" if elements <= _SMALL_MAP_ELEMENTS else "table"


def repair_cost(geometry: Geometry, sizes: tuple[int, ...], repair: str | None) -> tuple[int, int]:
    """Operations and constant elements that a repair adds to one image."""
    pixels = int(np.prod(geometry.output_sizes(sizes)))
    taps = int(np.prod(geometry.kernel))
    added = geometry.out_channels * pixels
    if repair is None:
        return 0, 0
    if repair == "ones":
        return added * (1 + taps), geometry.out_channels * taps
    if repair == "channel":
        return added * taps, geometry.out_channels * taps
    return added, geometry.out_channels * (pixels if repair == "map" else taps)


class Emitter:
    """Builds the nodes of one merge in front of the node that they replace."""

    def __init__(
        self, graph: Graph, before: ir.Node, base: str, metadata: Mapping[str, str]
    ) -> None:
        self.graph = graph
        self.before = before
        self.base = base
        self.metadata = metadata

    def node(self, op_type: str, inputs: Iterable[ir.Value | None], **attributes: Any) -> ir.Value:
        """Insert a node; returns its output, named after the merge."""
        attrs = [_attribute(key, value) for key, value in attributes.items()]
        node = ir.Node("", op_type, inputs, attrs, metadata_props=dict(self.metadata))
        self.graph.ir.insert_before(self.before, node)
        output = node.outputs[0]
        output.name = self.graph.fresh_name(self.base)
        node.name = output.name
        return output

    def constant(self, data: NDArray[Any]) -> ir.Value:
        """Register a constant named after the merge."""
        return self.graph.add_initializer(self.base, data)


def _attribute(name: str, value: Any) -> ir.Attr:
    """An attribute of an emitted node; onnx-ir's own conversion takes longer than a small fold."""
    if isinstance(value, int):
        return ir.AttrInt64(name, value)
    if isinstance(value, list):
        return ir.AttrInt64s(name, value)
    return ir.convenience.convert_attribute(name, value)


def emit_affine(
    emitter: Emitter,
    source: ir.Value,
    affine: AffineConv,
    dtype: np.dtype[Any],
    repair: str | None,
) -> ir.Value:
    """Emit the nodes that compute an affine convolution of `source`; returns the result.

    Weights are cast from float64 to `dtype` here and nowhere else.
    """
    affine = without_cropping(affine)
    if repair in ("map", "table"):
        return _with_constant_map(emitter, source, affine, dtype, repair)
    if repair == "ones":
        return _with_ones_image(emitter, source, affine, dtype)
    if repair == "channel":
        return _with_ones_channel(emitter, source, affine, dtype)
    assert affine.border is None
    return _conv(emitter, source, affine.weight, affine.bias, affine, dtype)


def without_cropping(affine: AffineConv) -> AffineConv:
    """The same map with no negative padding: the window grows by zero taps instead."""
    grown = [axis.without_cropping() for axis in affine.axes]
    axes = tuple(axis for axis, _, _ in grown)
    if axes == affine.axes:
        return affine
    taps = [(before, after) for _, before, after in grown]
    border = None if affine.border is None else np.pad(affine.border, [(0, 0), *taps])
    weight = np.pad(affine.weight, [(0, 0), (0, 0), *taps])
    return AffineConv(weight, affine.bias, axes, affine.groups, border)


def _conv(
    emitter: Emitter,
    source: ir.Value,
    weight: NDArray[np.float64],
    bias: NDArray[np.float64] | None,
    like: AffineConv,
    dtype: np.dtype[Any],
) -> ir.Value:
    inputs = [source, emitter.constant(weight.astype(dtype))]
    if bias is not None and np.any(bias):
        inputs.append(emitter.constant(bias.astype(dtype)))
    return emitter.node("Conv", inputs, **_conv_attributes(like.axes, weight, like.groups))


def _conv_attributes(
    axes: tuple[Axis, ...], weight: NDArray[np.float64], groups: int
) -> dict[str, Any]:
    return {
        "dilations": [axis.dilation for axis in axes],
        "group": groups,
        "kernel_shape": list(weight.shape[2:]),
        "pads": [axis.begin for axis in axes] + [axis.end for axis in axes],
        "strides": [axis.stride for axis in axes],
    }


def _with_constant_map(
    emitter: Emitter, source: ir.Value, affine: AffineConv, dtype: np.dtype[Any], repair: str
) -> ir.Value:
    sizes = [size for size in emitter.graph.sizes(source) or () if size is not None]
    result = _conv(emitter, source, affine.weight, None, affine, dtype)
    if repair == "map":
        correction = emitter.constant(affine.border_map(sizes)[None].astype(dtype))
        return emitter.node("Add", [result, correction])
    table, indices = affine.border_table(sizes)
    correction = emitter.constant(table[None].astype(dtype))
    for number, index in enumerate(indices):
        rows = emitter.constant(index)
        correction = emitter.node("Gather", [correction, rows], axis=2 + number)
    return emitter.node("Add", [result, correction])


def _with_ones_image(
    emitter: Emitter, source: ir.Value, affine: AffineConv, dtype: np.dtype[Any]
) -> ir.Value:
    assert affine.border is not None
    result = _conv(emitter, source, affine.weight, affine.bias, affine, dtype)
    ones = _ones(emitter, source, affine, dtype, like_batch=False)
    kernel = emitter.constant(affine.border[:, None].astype(dtype))
    attributes = _conv_attributes(affine.axes, affine.border[:, None], 1)
    correction = emitter.node("Conv", [ones, kernel], **attributes)
    return emitter.node("Add", [result, correction])


def _with_ones_channel(
    emitter: Emitter, source: ir.Value, affine: AffineConv, dtype: np.dtype[Any]
) -> ir.Value:
    assert affine.border is not None
    dense = affine.with_groups(1)
    weight = np.concatenate([dense.weight, affine.border[:, None]], axis=1)
    ones = _ones(emitter, source, affine, dtype, like_batch=True)
    widened = emitter.node("Concat", [source, ones], axis=1)
    return _conv(emitter, widened, weight, dense.bias, dense, dtype)


def _ones(
    emitter: Emitter,
    source: ir.Value,
    affine: AffineConv,
    dtype: np.dtype[Any],
    *,
    like_batch: bool,
) -> ir.Value:
    """An image of ones [1 or N, 1, ...] of the source's spatial size, made at run time."""
    rank = len(affine.axes)
    shape = emitter.node("Shape", [source])
    spatial = emitter.node(
        "Gather", [shape, emitter.constant(np.arange(2, 2 + rank, dtype=np.int64))], axis=0
    )
    one = np.ones(1, dtype=np.int64)
    if like_batch:
        batch = emitter.node("Gather", [shape, emitter.constant(np.zeros(1, np.int64))], axis=0)
        leading = [batch, emitter.constant(one)]
    else:
        leading = [emitter.constant(np.ones(2, dtype=np.int64))]
    target = emitter.node("Concat", [*leading, spatial], axis=0)
    return emitter.node("ConstantOfShape", [target], value=ir.tensor(np.ones(1, dtype=dtype)))

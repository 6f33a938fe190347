"""Fold BatchNormalizations, and per-channel constants, into the convolution before them.

gamma * (W * x + b - mean) / sqrt(var + eps) + beta is a convolution with row o of W scaled by
gamma_o / sqrt(var_o + eps) and bias (b - mean) * scale + beta; what is scaled and shifted again
folds likewise. The node's own epsilon counts. Exact everywhere, borders included, since nothing
pads in between: stride, dilation, groups and padding stay what they are.

Refused: training mode, statistics that are not constant, and a convolution whose result is also
read elsewhere or is an output of the graph.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from graphfold.affine import AffineConv, Array
from graphfold.bounds import Coefficients
from graphfold.emit import Emitter
from graphfold.errors import NotExactError
from graphfold.geometry import Axis
from graphfold.graph import Graph, attribute, consumers, is_op, node_label
from graphfold.linear import (
    FLOAT_TYPES,
    PER_CHANNEL,
    Context,
    check_read_once,
    conv_axes,
    conv_weight_shape,
    linear_operator,
    variable_inputs,
)
from graphfold.merge import check_finite, put_in_place, reach_of
from graphfold.rewrite import Fold, Pass, Phase, Refused, Work, provenance, replaced_labels

# No sum of weights below this holds one that float16 could not.
_SURELY_FINITE = 6e4


@dataclass(frozen=True)
class _Series:
    """A convolution and what scales and shifts its result, one after the other."""

    conv: ir.Node
    scaling: tuple[ir.Node, ...]
    scale: Array
    shift: Array

    @property
    def output(self) -> ir.Value:
        return self.scaling[-1].outputs[0]


@dataclass(frozen=True)
class FoldBatchnorm(Pass):
    """One convolution for each convolution and what scales and shifts its result."""

    name: ClassVar[str] = "fold_batchnorm"
    phase: ClassVar[Phase] = Phase.FOLD
    order: ClassVar[int] = 2

    def find(self, work: Work) -> Iterable[_Series | Refused]:
        """Every convolution with what behind it folds; normalisations that do not, and why."""
        found: list[_Series | Refused] = []
        for node in work.graph.nodes():
            # A segment's convolution is what the plan says it is.
            if is_op(node, "Conv") and node not in work.barrier:
                found += _series(work.graph, node)
        return found

    def label(self, candidate: _Series | Refused) -> str:
        """The last normalisation's output tensor."""
        if isinstance(candidate, Refused):
            return candidate.output
        return candidate.output.name or ""

    def check(self, work: Work, candidate: _Series | Refused) -> str | None:
        """Refuse a result that is needed elsewhere, and what is not linear."""
        del work
        return candidate.reason if isinstance(candidate, Refused) else None

    def rewrite(self, work: Work, candidate: _Series | Refused) -> Fold:
        """Scale and shift the convolution's weights and bias."""
        assert isinstance(candidate, _Series)
        graph, conv = work.graph, candidate.conv
        weight, dtype = graph.constant(conv.inputs[1]), graph.dtype(conv.inputs[1])  # type: ignore[arg-type]
        assert weight is not None
        assert dtype is not None
        bias = _bias(graph, conv, weight.shape[0]) * candidate.scale + candidate.shift
        known = _coefficients(weight, candidate.scale, bias)
        with np.errstate(over="ignore"):
            scaled_weight = _scaled(weight, candidate.scale)
            if not known.gain + known.offset < _SURELY_FINITE:
                check_finite(weight, scaled_weight, bias.astype(dtype.numpy()))
        metadata = provenance((conv, *candidate.scaling), self.name)
        emitter = Emitter(graph, candidate.scaling[-1], self.label(candidate), metadata)
        inputs = [conv.inputs[0], emitter.constant(scaled_weight)]
        if np.any(bias):
            inputs.append(emitter.constant(bias.astype(dtype.numpy())))
        result = emitter.node("Conv", inputs)
        made = result.producer()
        assert made is not None
        made.attributes.update(conv.attributes)
        fold = _record(graph, candidate, weight.shape, known, metadata, self.name)
        axes = _axes(graph, conv, weight.shape[2:])
        affine = None
        if work.affines is not None and axes is not None:
            rows = candidate.scale.reshape(-1, *[1] * (weight.ndim - 1))
            scaled = weight.astype(np.float64) * rows
            affine = AffineConv(scaled, bias, axes, fold.groups)
        return put_in_place(
            work, (conv, *candidate.scaling), candidate.output, result, fold, affine
        )


# --- finding ----------------------------------------------------------------------------------


def _series(graph: Graph, conv: ir.Node) -> Iterable[_Series | Refused]:
    """What folds into one convolution, and the first that does not though it might."""
    scaling: list[ir.Node] = []
    refused: list[Refused] = []
    scale = shift = np.zeros(0)
    value = conv.outputs[0]
    while True:
        readers = [node for node in consumers(value) if _reads_as_data(graph, node, value)]
        if not readers:
            break
        try:
            factor, term = _scale_and_shift(graph, conv, readers[0])
            check_read_once(value, readers[0])
        except NotExactError as error:
            refused = list(_refusals(readers, error.what))
            break
        scale = factor if not scaling else factor * scale
        shift = term if not scaling else factor * shift + term
        scaling.append(readers[0])
        value = readers[0].outputs[0]
    return [*([_Series(conv, tuple(scaling), scale, shift)] if scaling else []), *refused]


def _reads_as_data(graph: Graph, node: ir.Node, value: ir.Value) -> bool:
    if not is_op(node, *PER_CHANNEL) or node.graph is not graph.ir:
        return False
    if is_op(node, "BatchNormalization"):
        return node.inputs[0] is value
    return len(variable_inputs(graph, node)) == 1


def _refusals(readers: Iterable[ir.Node], reason: str) -> Iterable[Refused]:
    """Other arithmetic with constants (a map, a row) is nobody's candidate."""
    for node in readers:
        if is_op(node, "BatchNormalization") or "is not per channel" not in reason:
            yield Refused(node.outputs[0].name or "", reason)


def _scale_and_shift(graph: Graph, conv: ir.Node, node: ir.Node) -> tuple[Array, Array]:
    """Scale and shift per output channel; raises NotExactError with the reason."""
    shape = conv_weight_shape(conv, graph)
    weight = conv.inputs[1]
    assert weight is not None
    dtype = graph.dtype(weight)
    if dtype not in FLOAT_TYPES:
        raise NotExactError(f"its weights are {dtype.name if dtype else 'of unknown type'}")
    _bias(graph, conv, shape[0])
    others = [each for each in variable_inputs(graph, node) if each is not node.inputs[0]]
    if is_op(node, "BatchNormalization") and others:
        raise NotExactError(
            f"{node_label(node)!r} reads {others[0].name!r}, which is not a constant"
        )
    rank, channels = len(shape) - 2, shape[0]
    affine = linear_operator(node, Context(graph, rank, channels, (None,) * rank)).build()
    return affine.weight.reshape(channels), affine.bias


# --- algebra ----------------------------------------------------------------------------------


def _scaled(weight: NDArray[Any], scale: Array) -> NDArray[Any]:
    """Rows of a weight scaled in float64, each product rounded once to the weight's type."""
    rows = scale.reshape(-1, *[1] * (weight.ndim - 1))
    if weight.dtype not in (np.float32, np.float16):
        return np.asarray((weight.astype(np.float64) * rows).astype(weight.dtype))
    # Computed in float64 block by block: no copy of the whole weight in float64 is made.
    result = np.empty(weight.shape, weight.dtype)
    np.multiply(weight, rows, out=result, dtype=np.float64, casting="same_kind")
    return result


def _bias(graph: Graph, conv: ir.Node, channels: int) -> Array:
    """The bias [O]; raises NotExactError where it is not a constant of that shape."""
    value = conv.inputs[2] if len(conv.inputs) > 2 else None
    if value is None:
        return np.zeros(channels)
    bias = graph.constant(value)
    if bias is None:
        raise NotExactError(f"the bias of {node_label(conv)!r} is not a constant")
    if bias.shape != (channels,):
        raise NotExactError(f"{node_label(conv)!r} has {bias.shape} biases, not {channels}")
    return bias.astype(np.float64)


def _axes(graph: Graph, conv: ir.Node, kernel: tuple[int, ...]) -> tuple[Axis, ...] | None:
    """Padding, stride and dilation; None where they depend on sizes that are not fixed."""
    try:
        return conv_axes(conv, kernel, graph.sizes(conv.inputs[0]) or (None,) * len(kernel))
    except NotExactError:
        return None


def _record(
    graph: Graph,
    series: _Series,
    shape: tuple[int, ...],
    coefficients: Coefficients,
    metadata: dict[str, str],
    name: str,
) -> Fold:
    conv, kernel = series.conv, tuple(shape[2:])
    axes = _axes(graph, conv, kernel)
    groups = attribute(conv, "group", 1)
    sizes = [size for size in graph.sizes(conv.inputs[0]) or () if size is not None]
    macs = None
    if axes is not None and len(sizes) == len(axes):
        pixels = [axis.output_size(size) for axis, size in zip(axes, sizes, strict=True)]
        macs = math.prod(shape) * math.prod(pixels)
    return Fold(
        output=series.output.name or "",
        replaces=replaced_labels(metadata),
        kernel=kernel,
        strides=tuple(attribute(conv, "strides") or (1,) * len(kernel)),
        groups=groups,
        boundary="exact",
        repair=None,
        # Of unknown padding as much as a kernel can reach.
        reach=reach_of(axes or tuple(Axis(size, 1, 1, size - 1, size - 1) for size in kernel)),
        pass_name=name,
        macs=None if macs is None else (macs, macs),
        input=None if conv.inputs[0] is None else conv.inputs[0].name,
        coefficients=coefficients,
    )


def _coefficients(weight: NDArray[Any], scale: Array, bias: Array) -> Coefficients:
    rows = np.abs(weight).sum(axis=tuple(range(1, weight.ndim)), dtype=np.float64)
    return Coefficients(
        terms=math.prod(weight.shape[1:]) + 1,
        # A row that is not finite must not vanish behind a scale of zero.
        gain=float((rows * np.abs(scale)).max(initial=0.0)) + 0.0 * float(rows.max(initial=0.0)),
        offset=float(np.abs(bias).max(initial=0.0)),
    )

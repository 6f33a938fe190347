"""Fold a BatchNormalization, or per-channel constants, into the ConvTranspose before it.

s_o * (W^T x + b)_o + t_o is a transposed convolution with every weight that writes output channel
o scaled by s_o and bias s * b + t. Weights lie as [I, O / groups, *kernel]: input channel i of
group g writes the channels g * O / groups + j, so the row W[i, j] is scaled by s at that channel.
For a normalisation s = gamma / sqrt(var + eps) and t = beta - s * mean. Exact everywhere, since
output padding and pixels that no window writes hold the bias as all others do.

Refused: training mode, weights or statistics that are not constant, constants that are not truly
per channel, and a result that is also read elsewhere or is an output of the graph.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from graphfold.affine import Array
from graphfold.emit import Emitter
from graphfold.errors import NotExactError
from graphfold.graph import Graph, attribute, is_op, node_label
from graphfold.linear import (
    FLOAT_TYPES,
    PER_CHANNEL,
    Context,
    check_read_once,
    constant_shape,
    linear_operator,
    variable_inputs,
)
from graphfold.maps import TransposedConv
from graphfold.merge import put_in_place, segment_nodes
from graphfold.rewrite import Fold, Pass, Phase, Work, provenance, replaced_labels


@dataclass(frozen=True)
class _Pair:
    """A transposed convolution and what scales and shifts its result."""

    conv: ir.Node
    norm: ir.Node

    @property
    def output(self) -> ir.Value:
        return self.norm.outputs[0]


@dataclass(frozen=True)
class FoldConvTranspose(Pass):
    """One ConvTranspose for each ConvTranspose-BatchNormalization pair."""

    name: ClassVar[str] = "fold_conv_transpose"
    phase: ClassVar[Phase] = Phase.FOLD
    order: ClassVar[int] = 2

    def find(self, work: Work) -> Iterable[_Pair]:
        """Every BatchNormalization or constant that reads a transposed convolution's result."""
        owned = segment_nodes(work)
        found = []
        for node in work.graph.nodes():
            conv = _conv_before(work.graph, node)
            if conv is not None and not {conv, node} & owned:
                found.append(_Pair(conv, node))
        return found

    def label(self, candidate: _Pair) -> str:
        """The normalisation's output tensor."""
        return candidate.output.name or ""

    def check(self, work: Work, candidate: _Pair) -> str | None:
        """Refuse a result that is needed elsewhere, and what is not constant per channel."""
        try:
            check_read_once(candidate.conv.outputs[0], candidate.norm)
            _scale_and_shift(work.graph, candidate)
            _bias(work.graph, candidate.conv)
        except NotExactError as error:
            return error.what
        return None

    def rewrite(self, work: Work, candidate: _Pair) -> Fold:
        """Replace both by one transposed convolution."""
        graph, conv = work.graph, candidate.conv
        weight = graph.constant(conv.inputs[1])
        dtype = graph.dtype(conv.inputs[1])  # type: ignore[arg-type]
        assert weight is not None
        assert dtype is not None
        groups = attribute(conv, "group", 1)
        scale, shift = _scale_and_shift(graph, candidate)
        scaled = _scale_outputs(weight.astype(np.float64), groups, scale)
        bias = scale * _bias(graph, conv) + shift
        metadata = provenance((conv, candidate.norm), self.name)
        emitter = Emitter(graph, candidate.norm, self.label(candidate), metadata)
        inputs = [conv.inputs[0], emitter.constant(scaled.astype(dtype.numpy()))]
        if np.any(bias):
            inputs.append(emitter.constant(bias.astype(dtype.numpy())))
        result = emitter.node("ConvTranspose", inputs)
        made = result.producer()
        assert made is not None
        made.attributes.update(conv.attributes)
        rank = weight.ndim - 2
        macs = _macs(graph, conv, weight.shape)
        fold = Fold(
            output=self.label(candidate),
            replaces=replaced_labels(metadata),
            kernel=weight.shape[2:],
            strides=tuple(attribute(conv, "strides") or (1,) * rank),
            groups=groups,
            boundary="exact",
            repair=None,
            reach=((0, 0),) * rank,
            pass_name=self.name,
            macs=None if macs is None else (macs, macs),
            input=None if conv.inputs[0] is None else conv.inputs[0].name,
        )
        nodes = (conv, candidate.norm)
        affine = _affine(conv, scaled, bias)
        return put_in_place(work, nodes, candidate.output, result, fold, affine)


def _conv_before(graph: Graph, node: ir.Node) -> ir.Node | None:
    if not is_op(node, *PER_CHANNEL):
        return None
    sources = variable_inputs(graph, node)
    if not sources or (len(sources) > 1 and not is_op(node, "BatchNormalization")):
        return None
    producer = sources[0].producer()
    return producer if is_op(producer, "ConvTranspose") else None


def _weight_shape(graph: Graph, conv: ir.Node) -> tuple[int, ...]:
    weight = conv.inputs[1]
    if weight is None or not graph.is_constant(weight):
        raise NotExactError(f"the weight of {node_label(conv)!r} is not a constant")
    dtype = graph.dtype(weight)
    if dtype not in FLOAT_TYPES:
        raise NotExactError(f"its weights are {dtype.name if dtype else 'of unknown type'}")
    return constant_shape(graph, weight)


def _scale_and_shift(graph: Graph, pair: _Pair) -> tuple[Array, Array]:
    """Scale and shift per output channel; raises NotExactError with the reason."""
    shape = _weight_shape(graph, pair.conv)
    channels, rank = shape[1] * attribute(pair.conv, "group", 1), len(shape) - 2
    sources = variable_inputs(graph, pair.norm)
    if len(sources) > 1:
        raise NotExactError(
            f"{node_label(pair.norm)!r} reads {sources[1].name!r}, which is not a constant"
        )
    context = Context(graph, rank, channels, (None,) * rank)
    affine = linear_operator(pair.norm, context).build()
    return affine.weight.reshape(channels), affine.bias


def _bias(graph: Graph, conv: ir.Node) -> Array:
    """The bias [O]; raises NotExactError where it is not a constant."""
    shape = _weight_shape(graph, conv)
    if len(conv.inputs) < 3 or conv.inputs[2] is None:
        return np.zeros(shape[1] * attribute(conv, "group", 1))
    bias = graph.constant(conv.inputs[2])
    if bias is None:
        raise NotExactError(f"the bias of {node_label(conv)!r} is not a constant")
    return bias.astype(np.float64)


def _scale_outputs(weight: Array, groups: int, scale: Array) -> Array:
    """Weights [I, O / groups, *kernel] with what writes output channel o scaled by scale[o]."""
    inputs, width, *kernel = weight.shape
    blocks = weight.reshape(groups, inputs // groups, width, -1)
    scaled: Array = blocks * scale.reshape(groups, 1, width, 1)
    return scaled.reshape(inputs, width, *kernel)


def _affine(conv: ir.Node, weight: Array, bias: Array) -> TransposedConv:
    """The transposed convolution of a node's attributes with these weights."""
    rank = weight.ndim - 2
    stated = attribute(conv, "output_shape")
    return TransposedConv(
        weight=weight,
        bias=bias,
        groups=attribute(conv, "group", 1),
        strides=tuple(attribute(conv, "strides") or (1,) * rank),
        dilations=tuple(attribute(conv, "dilations") or (1,) * rank),
        output_padding=tuple(attribute(conv, "output_padding") or (0,) * rank),
        pads=tuple(attribute(conv, "pads") or (0,) * (2 * rank)),
        auto_pad=attribute(conv, "auto_pad", "NOTSET"),
        # Older operator sets allow it with batch and channels in front.
        output_shape=None if stated is None else tuple(stated[-rank:]),
    )


def _macs(graph: Graph, conv: ir.Node, weight: tuple[int, ...]) -> int | None:
    """Multiply-accumulates per image: every input pixel meets every weight of its channel."""
    sizes = [size for size in graph.sizes(conv.inputs[0]) or () if size is not None]
    return math.prod(weight) * math.prod(sizes) if len(sizes) == len(weight) - 2 else None

"""Arithmetic per channel behind a BatchNormalization becomes part of it.

A BatchNormalization that no convolution takes in computes gamma * n(x) + beta, with n(x) the
normalised input. What follows it, s * y + t with one s and t per channel (another normalisation, or
Mul, Div, Add, Sub by constants), gives (s * gamma) * n(x) + (s * beta + t): the same node with
other parameters; mean, variance and epsilon stay. Computed in float64 and cast once.

Refused: training mode, parameters that are not constant or not one per channel, and a normalisation
whose result is read elsewhere or is an output of the graph.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from graphfold.cleanup import element_type, free_nodes
from graphfold.errors import NotExactError
from graphfold.graph import Graph, is_op, only_consumer
from graphfold.linear import FLOAT_TYPES, PER_CHANNEL, Context, linear_operator, variable_inputs
from graphfold.merge import put_in_place
from graphfold.rewrite import Fold, Pass, Phase, Work, provenance, replaced_labels

Array = NDArray[np.float64]


@dataclass(frozen=True)
class _Pair:
    """A normalisation and what reads it."""

    norm: ir.Node
    follower: ir.Node


@dataclass(frozen=True)
class MergeNorms(Pass):
    """One BatchNormalization for it and the arithmetic behind it."""

    name: ClassVar[str] = "merge_norms"
    phase: ClassVar[Phase] = Phase.FOLD
    order: ClassVar[int] = 4

    def find(self, work: Work) -> Iterable[_Pair]:
        """Every BatchNormalization that arithmetic with constants reads."""
        nodes = list(free_nodes(work, *PER_CHANNEL))
        known = set(nodes)
        found = []
        for node in nodes:
            sources = variable_inputs(work.graph, node)
            norm = sources[0].producer() if len(sources) == 1 else None
            if norm in known and is_op(norm, "BatchNormalization"):
                assert norm is not None
                found.append(_Pair(norm, node))
        return found

    def label(self, candidate: _Pair) -> str:
        """The tensor of the arithmetic behind."""
        return candidate.follower.outputs[0].name or ""

    def check(self, work: Work, candidate: _Pair) -> str | None:
        """Refuse what is needed elsewhere, and what is not per channel."""
        middle = candidate.norm.outputs[0]
        if only_consumer(middle) is None:
            return f"{middle.name!r} is needed elsewhere too"
        try:
            _parameters(work.graph, candidate)
        except NotExactError as error:
            return error.what
        return None

    def rewrite(self, work: Work, candidate: _Pair) -> Fold:
        """Give the normalisation the parameters of both, and the last tensor's name."""
        graph, norm, follower = work.graph, candidate.norm, candidate.follower
        name = self.label(candidate)
        parameters = _parameters(graph, candidate)
        metadata = provenance((norm, follower), self.name)
        dtype = element_type(graph, norm.inputs[1])
        assert dtype is not None
        own = [graph.add_initializer(name, each.astype(dtype.numpy())) for each in parameters]
        source = norm.inputs[0]
        inputs = [source, *own, *norm.inputs[3:]]
        node = ir.Node("", "BatchNormalization", inputs, name=norm.name, metadata_props=metadata)
        node.attributes.update(norm.attributes)
        graph.ir.insert_before(follower, node)
        rank = len(graph.shape(follower.outputs[0]) or (0, 0)) - 2
        fold = Fold(
            output=name,
            replaces=replaced_labels(metadata),
            kernel=(1,) * rank,
            strides=(1,) * rank,
            groups=len(parameters[0]),
            boundary="exact",
            repair=None,
            reach=((0, 0),) * rank,
            pass_name=self.name,
            input=None if source is None else source.name,
        )
        return put_in_place(work, (follower,), follower.outputs[0], node.outputs[0], fold)


def _parameters(graph: Graph, pair: _Pair) -> tuple[Array, Array]:
    """Scale and bias of the normalisation that does both; raises NotExactError with the reason."""
    value = pair.norm.outputs[0]
    shape, channels = graph.shape(value), graph.channels(value)
    if shape is None or channels is None:
        raise NotExactError(f"the channels of {value.name!r} are not known")
    if element_type(graph, pair.norm.inputs[1]) not in FLOAT_TYPES:
        raise NotExactError(f"the type of {value.name!r} is not known")
    if len(variable_inputs(graph, pair.norm)) > 1:
        raise NotExactError(f"the parameters of {value.name!r} are not constants")
    rank = len(shape) - 2
    context = Context(graph, rank, channels, (None,) * rank)
    linear_operator(pair.norm, context)
    after = linear_operator(pair.follower, context).build()
    scale, shift = after.weight.reshape(channels), after.bias
    gamma, beta = (graph.constant(each) for each in pair.norm.inputs[1:3])
    assert gamma is not None
    assert beta is not None
    return gamma.astype(np.float64) * scale, beta.astype(np.float64) * scale + shift

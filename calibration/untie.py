"""Layers with numbers of their own: exporters store equal arrays once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from graphfold.graph import Graph, is_op
from graphfold.tensors import values_by_name

if TYPE_CHECKING:
    from graphfold.model import Model

_WITH_BIAS = ("Conv", "ConvTranspose", "Gemm")


def untie(model: Model) -> Model:
    """The same network, each layer with its own bias, scale and statistics.

    Where two normalisations read one tensor, or copies of one, training would move the statistics
    of one by the input of the other, and an array that is both a scale and a variance would not be
    trained at all. Biases are untied where the weights are not shared, too.
    """
    copy = model.clone()
    graph = copy.ir.graph
    constants = Graph(copy)
    taken = set(values_by_name(graph))
    for node in graph:
        for index in _own_numbers(node):
            value = node.inputs[index]
            array = constants.constant(value)
            if value is None or array is None:
                continue
            if value.is_initializer() and len(value.uses()) == 1:
                continue
            name = f"{value.name}_of_{node.outputs[0].name}_{index}"
            while name in taken:
                name += "_"
            taken.add(name)
            own = ir.Value(
                name=name,
                shape=ir.Shape(array.shape),
                type=ir.TensorType(ir.DataType.from_numpy(array.dtype)),
                const_value=ir.Tensor(np.array(array), name=name),
            )
            graph.register_initializer(own)
            node.replace_input_with(index, own)
    return copy


def _own_numbers(node: ir.Node) -> Iterator[int]:
    """The inputs that are nobody else's by what they mean."""
    if is_op(node, "BatchNormalization"):
        yield from range(1, len(node.inputs))
    elif is_op(node, *_WITH_BIAS) and len(node.inputs) > 2:
        weight = node.inputs[1]
        if weight is not None and len(weight.uses()) == 1:
            yield 2

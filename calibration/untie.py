"""Normalisations with numbers of their own: exporters store equal arrays once."""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx_ir as ir

from graphfold.graph import is_op
from graphfold.tensors import values_by_name

if TYPE_CHECKING:
    from graphfold.model import Model


def untie_norms(model: Model) -> Model:
    """The same network, each BatchNormalization with its own scale, bias and statistics.

    Where two share a tensor, training would move one's statistics by the other's input, and an
    array that is both a scale and a variance could not be trained at all.
    """
    copy = model.clone()
    graph = copy.ir.graph
    taken = set(values_by_name(graph))
    for node in graph:
        if not is_op(node, "BatchNormalization"):
            continue
        for index, value in enumerate(node.inputs):
            if index == 0 or value is None or len(value.uses()) < 2:
                continue
            tensor = value.const_value
            if tensor is None:
                continue
            name = f"{value.name}_of_{node.outputs[0].name}_{index}"
            while name in taken:
                name += "_"
            taken.add(name)
            own = ir.Value(
                name=name,
                shape=value.shape,
                type=value.type,
                const_value=ir.Tensor(tensor.numpy(), name=name),
            )
            graph.register_initializer(own)
            node.replace_input_with(index, own)
    return copy

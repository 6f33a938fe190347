"""A few operators written down as steps, and what puts them behind a tensor of a graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from graphfold.graph import Graph

# Operator, arguments ("x" is what the first one reads, integers are earlier steps, arrays and
# floats are constants, None is left out), attributes.
Step = tuple[str, tuple[Any, ...], Mapping[str, Any]]


def insert_behind(graph: Graph, value: ir.Value, steps: Sequence[Step]) -> ir.Value:
    """Put steps behind a tensor: whoever read it reads their result, under the tensor's name.

    What the steps read is then called `<name>/graphfold.N`; an input of the graph keeps its name.

    Returns:
        the result.
    """
    readers, name = list(value.uses()), value.name or ""
    is_input = value.is_graph_input()
    shape = graph.shape(value)
    if not is_input:
        graph.rename(value, graph.fresh_name(name))
    result = _Builder(graph, value, name).build(steps)
    result.type, result.shape = value.type, value.shape
    for usage in readers:
        usage.node.replace_input_with(usage.idx, result)
    if not is_input:
        # An input of the graph keeps its name; all others leave theirs to what follows them.
        if value.is_graph_output():
            outputs = graph.ir.outputs
            outputs[list(outputs).index(value)] = result
        result.metadata_props.update(value.metadata_props)
        graph.rename(result, name)
    if shape is not None:
        graph.shapes[result.name or ""] = shape
    return result


class _Builder:
    """Appends nodes behind a tensor."""

    def __init__(self, graph: Graph, value: ir.Value, base: str) -> None:
        self.graph = graph
        self.value = value
        self.base = base
        producer = value.producer()
        self.after = producer
        dtype = graph.dtype(value) or ir.DataType.FLOAT
        self.dtype = dtype.numpy()

    def build(self, steps: Sequence[Step]) -> ir.Value:
        """Add the nodes; returns what the last one computes."""
        results: list[ir.Value] = []
        for op_type, arguments, attributes in steps:
            inputs = [self._argument(argument, results) for argument in arguments]
            results.append(self._node(op_type, inputs, attributes))
        return results[-1]

    def _argument(self, argument: Any, results: Sequence[ir.Value]) -> ir.Value | None:
        if argument is None:
            return None
        if isinstance(argument, str):
            return self.value
        if isinstance(argument, int):
            return results[argument]
        if isinstance(argument, float):
            argument = np.asarray(argument, dtype=self.dtype)
        return self.graph.add_initializer(self.base, argument)

    def _node(
        self, op_type: str, inputs: list[ir.Value | None], attributes: Mapping[str, Any]
    ) -> ir.Value:
        attrs = [
            value if isinstance(value, ir.Attr) else ir.convenience.convert_attribute(key, value)
            for key, value in attributes.items()
        ]
        node = ir.Node("", op_type, inputs, attrs)
        if self.after is None:
            first = next(iter(self.graph.ir), None)
            assert first is not None
            self.graph.ir.insert_before(first, node)
        else:
            self.graph.ir.insert_after(self.after, node)
        self.after = node
        node.outputs[0].name = self.graph.fresh_name(self.base)
        node.name = node.outputs[0].name
        return node.outputs[0]

"""Insert the free activations that a plan adds: y becomes act(y) under y's own name.

This is the plan's meaning, not an equality: it builds the reference network. The activation
stands behind the segment, after the residual Add when the segment holds one (DepthShrinker 4.3,
LayerMerge appendix A). What leaves keeps the tensor's name; the tensor before the activation is
`<name>/graphfold.N`. Each function is spelled as one operator where the model's opset has it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from graphfold.graph import Graph
from graphfold.resolve import AddedAt
from graphfold.rewrite import Pass, Phase, Work
from graphfold.sites import ActivationSite

Step = tuple[str, tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class InsertActivations(Pass):
    """Add the plan's free activations."""

    name: ClassVar[str] = "insert_activations"
    phase: ClassVar[Phase] = Phase.PLAN
    order: ClassVar[int] = 3

    def find(self, work: Work) -> Iterable[AddedAt]:
        """Additions that are not in the graph yet."""
        return list(work.plan.added)

    def label(self, candidate: AddedAt) -> str:
        """The tensor that the activation follows."""
        return candidate.value.name or candidate.path

    def rewrite(self, work: Work, candidate: AddedAt) -> None:
        """Build the activation behind the tensor and let it take the tensor's name."""
        graph, value = work.graph, candidate.value
        work.plan.added = [added for added in work.plan.added if added is not candidate]
        readers, name = list(value.uses()), value.name or ""
        is_output = value.is_graph_output()
        graph.rename(value, graph.fresh_name(name))
        builder = _Builder(graph, value, name)
        if candidate.template is not None:
            result = builder.copy(candidate.template)
        else:
            result = builder.build(str(candidate.activation))
        result.type, result.shape = value.type, value.shape
        for usage in readers:
            usage.node.replace_input_with(usage.idx, result)
        if is_output:
            outputs = graph.ir.outputs
            outputs[list(outputs).index(value)] = result
        result.metadata_props.update(value.metadata_props)
        graph.rename(result, name)
        if (shape := graph.shapes.get(value.name or "")) is not None:
            graph.shapes[name] = shape
        for segment in work.plan.segments:
            if segment.input is value:
                segment.input = result


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

    def build(self, activation: str) -> ir.Value:
        """The named function; 'x' stands for its input, integers for earlier steps."""
        results: list[ir.Value] = []
        for op_type, arguments, attributes in _spelling(activation, self.graph.opset):
            inputs: list[ir.Value | None] = [
                self.value
                if argument == "x"
                else results[argument]
                if isinstance(argument, int)
                else self._constant(argument)
                for argument in arguments
            ]
            results.append(self._node(op_type, inputs, attributes))
        return results[-1]

    def copy(self, template: ActivationSite) -> ir.Value:
        """The same nodes as a site of the model, reading this tensor; constants are shared."""
        values: dict[ir.Value, ir.Value] = {template.input: self.value}
        result = self.value
        for node in template.nodes:
            inputs = [None if value is None else values.get(value, value) for value in node.inputs]
            result = self._node(node.op_type, inputs, dict(node.attributes))
            values[node.outputs[0]] = result
        return result

    def _constant(self, number: float) -> ir.Value:
        return self.graph.add_initializer(self.base, np.asarray(number, dtype=self.dtype))

    def _node(
        self, op_type: str, inputs: list[ir.Value | None], attributes: dict[str, Any]
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


def _spelling(activation: str, opset: int) -> list[Step]:
    """Steps that compute a function at an opset; floats are constants."""
    if activation == "Relu6":
        if opset >= 11:
            return [("Clip", ("x", 0.0, 6.0), {})]
        return [("Clip", ("x",), {"min": 0.0, "max": 6.0})]
    if activation == "SiLU":
        return [("Sigmoid", ("x",), {}), ("Mul", ("x", 0), {})]
    if activation == "HardSwish":
        if opset >= 14:
            return [("HardSwish", ("x",), {})]
        gate: Step = ("HardSigmoid", ("x",), {"alpha": 1.0 / 6.0, "beta": 0.5})
        return [gate, ("Mul", ("x", 0), {})]
    if activation == "Mish" and opset < 18:
        return [("Softplus", ("x",), {}), ("Tanh", (0,), {}), ("Mul", ("x", 1), {})]
    if activation == "GELU":
        if opset >= 20:
            return [("Gelu", ("x",), {})]
        half: list[Step] = [("Mul", ("x", float(np.sqrt(0.5))), {}), ("Erf", (0,), {})]
        return [*half, ("Add", (1, 1.0), {}), ("Mul", ("x", 2), {}), ("Mul", (3, 0.5), {})]
    return [(activation, ("x",), {})]

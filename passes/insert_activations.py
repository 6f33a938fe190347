"""Insert the free activations that a plan adds: y becomes act(y) under y's own name.

This is the plan's meaning, not an equality: it builds the reference network. The activation
stands behind the segment, after the residual Add when the segment holds one (DepthShrinker 4.3,
LayerMerge appendix A). What leaves keeps the tensor's name; the tensor before the activation is
`<name>/graphfold.N`. Each function is spelled as one operator where the model's opset has it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from graphfold.graph import Graph
from graphfold.resolve import AddedAt, Step
from graphfold.rewrite import Pass, Phase, Work

_SINCE = {"GELU": 9}  # opsets without the operators that a function is made of


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
        """The activation's JSON path."""
        return candidate.path

    def check(self, work: Work, candidate: AddedAt) -> str | None:
        """Refuse functions that the model's opset has no operators for."""
        needed = _SINCE.get(str(candidate.activation), 1)
        if candidate.steps is None and work.graph.opset < needed:
            return f"{candidate.activation} needs opset {needed}, the model has {work.graph.opset}"
        return None

    def rewrite(self, work: Work, candidate: AddedAt) -> None:
        """Build the activation behind the tensor and let it take the tensor's name."""
        graph, value = work.graph, candidate.value
        work.plan.added = [added for added in work.plan.added if added is not candidate]
        readers, name = list(value.uses()), value.name or ""
        is_input = value.is_graph_input()
        shape = graph.shape(value)
        if not is_input:
            graph.rename(value, graph.fresh_name(name))
        steps: Sequence[Step] = candidate.steps or _spelling(str(candidate.activation), graph.opset)
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

    def build(self, steps: Sequence[Step]) -> ir.Value:
        """Add the nodes of an activation; returns what it computes."""
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

"""One Gemm for a matrix product and the constant that is added: x W + b = Gemm(x, W, b).

Gemm(A, B, C) is A B + C with C broadcast to the rows, which is what Add does with a vector of one
value per column. Both round each sum of products; a runtime may order its additions differently, so
results are equal up to rounding.

Only for floats, a constant matrix, a constant [N] or [1, N], and x that surely has two axes: MatMul
takes more, Gemm does not. Refused: a product that is read elsewhere or is an output of the graph,
and x whose rank is not known.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from graphfold.cleanup import element_type, free_nodes
from graphfold.graph import Graph, is_op, only_consumer
from graphfold.rewrite import Pass, Phase, Work, provenance

# Before, Gemm broadcasts only where an attribute says so.
_BROADCAST_OPSET = 7
_TYPES = (ir.DataType.FLOAT, ir.DataType.DOUBLE, ir.DataType.FLOAT16)


@dataclass(frozen=True)
class _Affine:
    """A MatMul, the Add behind it, and the constant that this adds."""

    product: ir.Node
    add: ir.Node
    bias: ir.Value


@dataclass(frozen=True)
class FuseGemm(Pass):
    """One Gemm for each MatMul and Add."""

    name: ClassVar[str] = "fuse_gemm"
    phase: ClassVar[Phase] = Phase.FOLD
    order: ClassVar[int] = 4

    def find(self, work: Work) -> Iterable[_Affine]:
        """Every Add of one constant per column to a product with a constant matrix."""
        if work.graph.opset < _BROADCAST_OPSET:
            return []
        nodes = list(free_nodes(work))
        known = set(nodes)
        return [
            each
            for node in nodes
            if is_op(node, "Add") and (each := _affine(work.graph, node, known)) is not None
        ]

    def label(self, candidate: _Affine) -> str:
        """The sum's tensor."""
        return candidate.add.outputs[0].name or ""

    def check(self, work: Work, candidate: _Affine) -> str | None:
        """Refuse a product that is needed elsewhere, and inputs of unknown rank."""
        source, product = candidate.product.inputs[0], candidate.product.outputs[0]
        shape = work.graph.shape(source)
        if shape is None:
            return f"the rank of {source.name if source else ''!r} is not known"
        if only_consumer(product) is None:
            return f"{product.name!r} is needed elsewhere too"
        return None

    def rewrite(self, work: Work, candidate: _Affine) -> None:
        """Put a Gemm in the place of both."""
        product, add = candidate.product, candidate.add
        metadata = provenance((product, add), self.name)
        inputs = [*product.inputs, candidate.bias]
        node = ir.Node("", "Gemm", inputs, name=add.name, metadata_props=metadata)
        work.graph.ir.insert_before(add, node)
        work.graph.take_over(add.outputs[0], node.outputs[0])
        work.graph.remove_dead([add])


def _affine(graph: Graph, add: ir.Node, known: set[ir.Node]) -> _Affine | None:
    for index in (0, 1):
        value, bias = add.inputs[index], add.inputs[1 - index]
        product = None if value is None else value.producer()
        if product is None or bias is None or product not in known or not is_op(product, "MatMul"):
            continue
        source, weight = product.inputs
        if not graph.is_constant(weight) or not graph.is_constant(bias):
            continue
        if element_type(graph, weight) not in _TYPES:
            continue
        matrix, vector, rows = graph.shape(weight), graph.shape(bias), graph.shape(source)
        if matrix is None or len(matrix) != 2 or vector not in ((matrix[1],), (1, matrix[1])):
            continue
        if rows is None or len(rows) == 2:
            return _Affine(product, add, bias)
    return None

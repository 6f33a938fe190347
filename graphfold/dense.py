"""Fully connected layers in a graph: what a Gemm or MatMul computes, and back to nodes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from graphfold.affine import Array
from graphfold.emit import Emitter
from graphfold.errors import NotExactError
from graphfold.graph import Graph, attribute, is_op, node_label
from graphfold.linear import FLOAT_TYPES, constant_shape
from graphfold.maps import Dense
from graphfold.shapes import TensorShape

# Before these opsets a Gemm must have a bias, and broadcasts it only where an attribute says so.
_OPTIONAL_BIAS_OPSET = 11
_BROADCASTING_OPSET = 7


@dataclass(frozen=True)
class Layer:
    """A Gemm or MatMul with constant weights [K, N]."""

    product: ir.Node
    inputs: int
    features: int


def read_layer(graph: Graph, node: ir.Node) -> Layer:
    """A product with constant weights; raises NotExactError with the reason."""
    label = node_label(node)
    if is_op(node, "Gemm") and attribute(node, "transA", 0):
        raise NotExactError(f"{label!r} transposes its input")
    if not graph.is_constant(node.inputs[1]):
        raise NotExactError(f"the weight of {label!r} is not a constant")
    assert node.inputs[1] is not None
    dtype = graph.dtype(node.inputs[1])
    if dtype not in FLOAT_TYPES:
        raise NotExactError(f"its weights are {dtype.name if dtype else 'of unknown type'}")
    shape = constant_shape(graph, node.inputs[1])
    if len(shape) != 2:
        raise NotExactError(f"the weight of {label!r} has {len(shape)} axes, not 2")
    if is_op(node, "Gemm"):
        inputs, features = shape[::-1] if attribute(node, "transB", 0) else shape
        if len(node.inputs) > 2 and node.inputs[2] is not None:
            if not graph.is_constant(node.inputs[2]):
                raise NotExactError(f"the bias of {label!r} is not a constant")
            check_per_feature(constant_shape(graph, node.inputs[2]), 2, features, node)
        return Layer(node, inputs, features)
    return Layer(node, *shape)


def layer_weight(graph: Graph, product: ir.Node) -> Array:
    """The weight [K, N] of a product, in float64."""
    constant = graph.constant(product.inputs[1])
    assert constant is not None
    weight: Array = constant.astype(np.float64)
    if is_op(product, "MatMul"):
        return weight
    weight = weight.T if attribute(product, "transB", 0) else weight
    return weight * float(attribute(product, "alpha", 1.0))


def layer_bias(graph: Graph, product: ir.Node, features: int) -> Array:
    """The bias [N] of a product, in float64; zeros where it has none."""
    if is_op(product, "MatMul") or len(product.inputs) < 3 or product.inputs[2] is None:
        return np.zeros(features)
    constant = graph.constant(product.inputs[2])
    assert constant is not None
    bias = constant.astype(np.float64).reshape(-1) * float(attribute(product, "beta", 1.0))
    return np.array(np.broadcast_to(bias, (features,)))


def check_per_feature(shape: Sequence[int], rank: int, features: int, node: ir.Node) -> None:
    """Refuse a constant that differs along rows or would widen the tensor."""
    last = shape[-1] if shape else 1
    if len(shape) > rank or last not in (1, features) or math.prod(shape) != last:
        raise NotExactError(
            f"the constant of {node_label(node)!r} has shape {list(shape)}, which is not per "
            "feature"
        )


def emit_dense(
    emitter: Emitter,
    source: ir.Value,
    dense: Dense,
    products: Sequence[ir.Node],
    rank: int,
    shape: TensorShape | None = None,
) -> ir.Value:
    """A Gemm where one is replaced or rank 2 needs a bias, else a MatMul and its Add.

    Args:
        emitter: builds the nodes.
        source: what the layer reads, [..., K].
        dense: its weights and biases.
        products: what it stands for; they tell the element type and the layout of weights.
        rank: number of axes of `source`.
        shape: of the result.
    """
    graph, weight, bias = emitter.graph, dense.weight, dense.bias
    value = graph.dtype(products[0].inputs[1])  # type: ignore[arg-type]
    assert value is not None
    dtype = value.numpy()
    has_gemm = any(is_op(product, "Gemm") for product in products)
    if has_gemm or (rank == 2 and np.any(bias)):
        transposed = any(attribute(product, "transB", 0) for product in products)
        inputs = [source, emitter.constant((weight.T if transposed else weight).astype(dtype))]
        if np.any(bias) or graph.opset < _OPTIONAL_BIAS_OPSET:
            inputs.append(emitter.constant(bias.astype(dtype)))
        more = {"broadcast": 1} if graph.opset < _BROADCASTING_OPSET else {}
        return emitter.node("Gemm", inputs, transB=int(transposed), **more)
    result = emitter.node("MatMul", [source, emitter.constant(weight.astype(dtype))])
    if not np.any(bias):
        return result
    if shape is not None and result.name is not None:
        graph.shapes[result.name] = shape
    more = {"broadcast": 1} if graph.opset < _BROADCASTING_OPSET else {}
    return emitter.node("Add", [result, emitter.constant(bias.astype(dtype))], **more)

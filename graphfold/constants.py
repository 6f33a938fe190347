"""Constants that exporters spell as small computations: reshaped, transposed, cast or filled.

Real exports have weights behind such chains (paddle2onnx reshapes every bias; the "light" models
of the onnx package fill theirs). Only operators that move or fill values are followed; arithmetic
is left to a constant folder.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

Array = NDArray[Any]

TRANSPARENT = frozenset(
    {"Identity", "Cast", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten"}
    | {"ConstantOfShape"}
)


# A constant that a model spells in a few bytes must not fill the memory: VGG's largest has 1e8.
LARGEST_FILL = 1 << 27


def can_be_filled(sizes: Array | None) -> bool:
    """Whether these are sizes, of a tensor that is not absurdly large for one without data."""
    if sizes is None or sizes.ndim != 1 or np.any(sizes < 0):
        return False
    return bool(math.prod(sizes.tolist()) <= LARGEST_FILL)


def node_value(node: ir.Node) -> Array | None:
    """What a Constant node holds, None where it is no number."""
    for name, attr in node.attributes.items():
        if name == "value":
            array: Array = attr.as_tensor().numpy()
            return array
        if name in ("value_float", "value_floats"):
            return np.asarray(attr.value, dtype=np.float32)
        if name in ("value_int", "value_ints"):
            return np.asarray(attr.value, dtype=np.int64)
    return None


def evaluate(node: ir.Node, inputs: Sequence[Array | None]) -> Array | None:
    """The value of a transparent operator on constants; None where it cannot be told."""
    if not inputs or inputs[0] is None:
        return None
    data = inputs[0]
    second = inputs[1] if len(inputs) > 1 else None
    if node.op_type == "Identity":
        return data
    if node.op_type == "Cast":
        return data.astype(ir.DataType(_attribute(node, "to")).numpy())
    if node.op_type == "Reshape":
        return _reshape(node, data, second)
    if node.op_type == "Transpose":
        return np.transpose(data, _attribute(node, "perm"))
    if node.op_type == "Flatten":
        axis = _attribute(node, "axis", 1)
        axis += data.ndim if axis < 0 else 0
        return data.reshape(int(np.prod(data.shape[:axis])), -1)
    if node.op_type == "ConstantOfShape":
        fill = _attribute(node, "value")
        value = np.zeros(1, np.float32) if fill is None else fill.numpy()
        if not can_be_filled(data):
            return None
        return np.full(tuple(int(size) for size in data), value.reshape(-1)[0], value.dtype)
    return _change_axes(node, data, second)


def _reshape(node: ir.Node, data: Array, second: Array | None) -> Array | None:
    target = _attribute(node, "shape") if second is None else second.tolist()
    if target is None:
        return None
    if not _attribute(node, "allowzero", 0):
        target = [data.shape[at] if size == 0 else size for at, size in enumerate(target)]
    return data.reshape(target)


def _change_axes(node: ir.Node, data: Array, second: Array | None) -> Array:
    axes = _attribute(node, "axes") if second is None else second.tolist()
    if node.op_type == "Unsqueeze":
        return np.expand_dims(data, tuple(axes))
    return np.squeeze(data, None if axes is None else tuple(axes))


def _attribute(node: ir.Node, name: str, default: Any = None) -> Any:
    found = node.attributes.get(name)
    return default if found is None else found.value

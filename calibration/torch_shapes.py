"""ONNX operators in torch that move elements, compute shapes, or change types."""

from __future__ import annotations

import math
from typing import Any

import onnx
import torch
from torch import Tensor

from graphfold.calibration.torch_table import Call, index_tensor, operator, together

_TYPES = {
    onnx.TensorProto.FLOAT: torch.float32,
    onnx.TensorProto.DOUBLE: torch.float64,
    onnx.TensorProto.FLOAT16: torch.float16,
    onnx.TensorProto.BFLOAT16: torch.bfloat16,
    onnx.TensorProto.INT8: torch.int8,
    onnx.TensorProto.UINT8: torch.uint8,
    onnx.TensorProto.INT16: torch.int16,
    onnx.TensorProto.INT32: torch.int32,
    onnx.TensorProto.INT64: torch.int64,
    onnx.TensorProto.BOOL: torch.bool,
}


@operator("Shape")
def _shape(call: Call, x: Tensor) -> Tensor:
    sizes = list(x.shape)[slice(call.get("start", 0), call.get("end"))]
    return torch.tensor(sizes, dtype=torch.int64)


@operator("Size")
def _size(_: Call, x: Tensor) -> Tensor:
    return torch.tensor(x.numel(), dtype=torch.int64)


@operator("Reshape", settings=(1,))
def _reshape(call: Call, x: Tensor, shape: Tensor) -> Tensor:
    sizes = [int(size) for size in shape.tolist()]
    if not call.get("allowzero", 0):
        sizes = [size or x.shape[axis] for axis, size in enumerate(sizes)]
    return x.reshape(sizes)


@operator("Flatten")
def _flatten(call: Call, x: Tensor) -> Tensor:
    axis = call.get("axis", 1)
    axis = axis + x.ndim if axis < 0 else axis
    return x.reshape(math.prod(x.shape[:axis]), math.prod(x.shape[axis:]))


@operator("Transpose")
def _transpose(call: Call, x: Tensor) -> Tensor:
    return x.permute(call.ints("perm") or tuple(reversed(range(x.ndim))))


@operator("Squeeze", settings=(1,))
def _squeeze(call: Call, x: Tensor, given: Tensor | None = None) -> Tensor:
    axes = call.ints("axes", given)
    return x.squeeze() if axes is None else x.squeeze(axes)


@operator("Unsqueeze", settings=(1,))
def _unsqueeze(call: Call, x: Tensor, given: Tensor | None = None) -> Tensor:
    axes = call.ints("axes", given) or []
    rank = x.ndim + len(axes)
    for axis in sorted(axis % rank for axis in axes):
        x = x.unsqueeze(axis)
    return x


@operator("Concat")
def _concat(call: Call, *inputs: Tensor) -> Tensor:
    return torch.cat(list(together(inputs)), call.get("axis"))


@operator("Split", settings=(1,))
def _split(call: Call, x: Tensor, given: Tensor | None = None) -> tuple[Tensor, ...]:
    axis = call.get("axis", 0)
    parts = call.ints("split", given)
    if parts is None:
        return torch.split(x, math.ceil(x.shape[axis] / len(call.outputs)), axis)
    return torch.split(x, parts, axis)


@operator("Slice", settings=(1, 2, 3, 4))
def _slice(call: Call, x: Tensor, *given: Tensor | None) -> Tensor:
    inputs = [*given, None, None, None, None]
    starts = call.ints("starts", inputs[0]) or []
    ends = call.ints("ends", inputs[1]) or []
    axes = call.ints("axes", inputs[2]) or list(range(len(starts)))
    steps = call.ints("steps", inputs[3]) or [1] * len(starts)
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        length = x.shape[axis]
        if step > 0:
            part: list[Any] = [slice(None)] * x.ndim
            part[axis] = slice(start, end, step)
            x = x[tuple(part)]
            continue
        # Before the first element is -1 in a range, which a slice would count from the end.
        first, stop, _ = slice(start, end if end >= -length else None, step).indices(length)
        x = x.index_select(axis, index_tensor(list(range(first, stop, step)), x))
    return x


@operator("Gather", settings=(1,))
def _gather(call: Call, x: Tensor, indices: Tensor) -> Tensor:
    axis = call.get("axis", 0) % x.ndim
    index = index_tensor(indices, x) % x.shape[axis]
    taken = x.index_select(axis, index.reshape(-1))
    return taken.reshape((*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :]))


@operator("GatherElements", settings=(1,))
def _gather_elements(call: Call, x: Tensor, indices: Tensor) -> Tensor:
    axis = call.get("axis", 0)
    return torch.gather(x, axis, index_tensor(indices, x) % x.shape[axis])


@operator("Expand", settings=(1,))
def _expand(_: Call, x: Tensor, shape: Tensor) -> Tensor:
    sizes = shape.tolist()
    rank = max(x.ndim, len(sizes))
    own = [1] * (rank - x.ndim) + list(x.shape)
    wanted = [1] * (rank - len(sizes)) + sizes
    # A size of one asks for nothing.
    return x.expand([have if want == 1 else want for have, want in zip(own, wanted, strict=True)])


@operator("Tile", settings=(1,))
def _tile(_: Call, x: Tensor, repeats: Tensor) -> Tensor:
    return x.repeat(repeats.tolist()) if x.ndim else x


def _refuse_unknown_type(call: Call) -> str | None:
    known = call.get("to") in _TYPES
    return None if known else f"element type {call.get('to')} is not supported"


@operator("Cast", refuses=_refuse_unknown_type)
def _cast(call: Call, x: Tensor) -> Tensor:
    return x.to(_TYPES[call.get("to")])


@operator("CastLike")
def _cast_like(_: Call, x: Tensor, other: Tensor) -> Tensor:
    return x.to(other.dtype)


def _refuse_unknown_filling(call: Call) -> str | None:
    value = call.get("value")
    known = value is None or isinstance(value, Tensor)
    return None if known else f"element type {value.dtype} is not supported"


@operator("ConstantOfShape", settings=(0,), refuses=_refuse_unknown_filling)
def _constant_of_shape(call: Call, shape: Tensor) -> Tensor:
    value = call.get("value")
    value = torch.zeros(1) if value is None else value
    filled: Tensor = torch.full(shape.tolist(), value.item(), dtype=value.dtype)
    return filled


@operator("Range", settings=(0, 1, 2))
def _range(_: Call, start: Tensor, limit: Tensor, delta: Tensor) -> Tensor:
    # Whole steps, since sums of steps round differently.
    count = max(0, math.ceil((limit.item() - start.item()) / delta.item()))
    return start + torch.arange(count, dtype=start.dtype) * delta


@operator("DepthToSpace")
def _depth_to_space(call: Call, x: Tensor) -> Tensor:
    size = call.get("blocksize")
    batch, channels, height, width = x.shape
    rest = channels // size**2
    if call.get("mode", "DCR") == "DCR":
        parts = x.reshape(batch, size, size, rest, height, width).permute(0, 3, 4, 1, 5, 2)
    else:
        parts = x.reshape(batch, rest, size, size, height, width).permute(0, 1, 4, 2, 5, 3)
    return parts.reshape(batch, rest, height * size, width * size)


@operator("SpaceToDepth")
def _space_to_depth(call: Call, x: Tensor) -> Tensor:
    size = call.get("blocksize")
    batch, channels, height, width = x.shape
    parts = x.reshape(batch, channels, height // size, size, width // size, size)
    blocks_first = call.get("mode", "DCR") == "DCR"
    parts = parts.permute((0, 3, 5, 1, 2, 4) if blocks_first else (0, 1, 3, 5, 2, 4))
    return parts.reshape(batch, channels * size**2, height // size, width // size)

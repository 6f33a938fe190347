"""An ONNX network in float64: what its float32 results are measured against.

onnxruntime has no float64 convolution, so onnx's own reference evaluator runs the network, its
constants widened, with torch's convolution in place of its slow one, and with a normalisation of
its own: before opset 14 the evaluator's takes the mere presence of `momentum` for training.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

Array = NDArray[np.float64]


class Conv(OpRun):
    """A convolution over two image axes, zero-padded on each side on its own."""

    def _run(
        self, x: Array, weight: Array, bias: Array | None = None, **attributes: Any
    ) -> tuple[Array]:
        if attributes.get("auto_pad") not in (None, "NOTSET"):
            raise NotImplementedError("auto_pad")
        top, left, bottom, right = attributes.get("pads") or [0] * 4
        padded = torch.nn.functional.pad(torch.from_numpy(x), (left, right, top, bottom))
        result = torch.nn.functional.conv2d(
            padded,
            torch.from_numpy(np.array(weight)),
            None if bias is None else torch.from_numpy(np.array(bias)),
            attributes.get("strides") or 1,
            0,
            attributes.get("dilations") or 1,
            attributes.get("group") or 1,
        )
        return (result.numpy(),)


class BatchNormalization(OpRun):
    """Normalisation by stored statistics."""

    def _run(
        self,
        x: Array,
        scale: Array,
        bias: Array,
        mean: Array,
        variance: Array,
        **attributes: Any,
    ) -> tuple[Array]:
        factor = scale / np.sqrt(variance + attributes.get("epsilon", 1e-5))
        shape = (1, -1, 1, 1)
        return (x * factor.reshape(shape) + (bias - mean * factor).reshape(shape),)


def widened(proto: onnx.ModelProto) -> onnx.ModelProto:
    """A copy whose float32 constants, inputs and outputs are float64."""
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    del copy.graph.value_info[:]
    for info in (*copy.graph.input, *copy.graph.output):
        if info.type.tensor_type.elem_type == onnx.TensorProto.FLOAT:
            info.type.tensor_type.elem_type = onnx.TensorProto.DOUBLE
    tensors = list(copy.graph.initializer)
    tensors += [a.t for node in copy.graph.node for a in node.attribute if a.HasField("t")]
    for tensor in tensors:
        if tensor.data_type == onnx.TensorProto.FLOAT:
            wide = numpy_helper.to_array(tensor).astype(np.float64)
            tensor.CopyFrom(numpy_helper.from_array(wide, tensor.name))
    return copy


def evaluate(proto: onnx.ModelProto, x: NDArray[Any], names: Sequence[str]) -> dict[str, Array]:
    """These tensors of a network with one input, computed in float64."""
    wide = widened(proto)
    del wide.graph.output[:]
    double = onnx.TensorProto.DOUBLE
    wide.graph.output.extend(
        onnx.helper.make_tensor_value_info(name, double, None) for name in names
    )
    evaluator = ReferenceEvaluator(wide, new_ops=[Conv, BatchNormalization])
    values: Any = evaluator.run(None, {proto.graph.input[0].name: x.astype(np.float64)})
    found = dict(zip(names, values, strict=True))
    assert all(value.dtype == np.float64 for value in found.values())
    return found

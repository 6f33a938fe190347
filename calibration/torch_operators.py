"""ONNX operators in torch: arithmetic, activations, reductions, normalisation.

Shapes are in `torch_shapes`; convolutions, pooling, padding and resizing in `torch_windows`.
Semantics are those of ONNX as onnxruntime has them, for every opset from 7 on.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - the name that everyone knows it by

from graphfold.calibration.torch_table import Call, operator, together

# --- elementwise ------------------------------------------------------------------------------


_UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    "Abs": torch.abs,
    "Ceil": torch.ceil,
    "Cos": torch.cos,
    "Erf": torch.erf,
    "Exp": torch.exp,
    "Floor": torch.floor,
    "HardSwish": F.hardswish,
    "Identity": lambda x: x,
    "Log": torch.log,
    "Mish": F.mish,
    "Neg": torch.neg,
    "Not": torch.logical_not,
    "Reciprocal": torch.reciprocal,
    "Relu": torch.relu,
    "Round": torch.round,
    "Sigmoid": torch.sigmoid,
    "Sign": torch.sign,
    "Sin": torch.sin,
    "Softplus": F.softplus,
    "Softsign": F.softsign,
    "Sqrt": torch.sqrt,
    "Tanh": torch.tanh,
}


@operator(*_UNARY)
def _unary(call: Call, x: Tensor) -> Tensor:
    return _UNARY[call.op_type](x)


def _divide(a: Tensor, b: Tensor) -> Tensor:
    return torch.div(a, b, rounding_mode=None if a.is_floating_point() else "trunc")


def _power(base: Tensor, exponent: Tensor) -> Tensor:
    return torch.pow(base, exponent).to(base.dtype)


def _fold(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    return lambda *inputs: functools.reduce(function, inputs)


def _mean(*inputs: Tensor) -> Tensor:
    return functools.reduce(torch.add, inputs) / len(inputs)


_ARITHMETIC: dict[str, Callable[..., Tensor]] = {
    "Add": torch.add,
    "And": torch.logical_and,
    "Div": _divide,
    "Equal": torch.eq,
    "Greater": torch.gt,
    "GreaterOrEqual": torch.ge,
    "Less": torch.lt,
    "LessOrEqual": torch.le,
    "Max": _fold(torch.maximum),
    "Mean": _mean,
    "Min": _fold(torch.minimum),
    "Mul": torch.mul,
    "Or": torch.logical_or,
    "Pow": _power,
    "Sub": torch.sub,
    "Sum": _fold(torch.add),
    "Where": torch.where,
    "Xor": torch.logical_xor,
}


@operator(*_ARITHMETIC, keeps_scalars=True)
def _arithmetic(call: Call, *inputs: Tensor) -> Tensor:
    return _ARITHMETIC[call.op_type](*together(inputs))


@operator("Mod", keeps_scalars=True)
def _mod(call: Call, a: Tensor, b: Tensor) -> Tensor:
    a, b = together((a, b))
    return torch.fmod(a, b) if call.get("fmod", 0) else torch.remainder(a, b)


@operator("Clip", settings=(1, 2))
def _clip(call: Call, x: Tensor, least: Tensor | None = None, most: Tensor | None = None) -> Tensor:
    low = call.get("min") if least is None else least.item()
    high = call.get("max") if most is None else most.item()
    if low is None and high is None:
        return x
    if low is not None and high is not None and low <= high and x.is_floating_point():
        return F.hardtanh(x, low, high)  # the same in less time, forward and backward
    return torch.clamp(x, low, high)


@operator("LeakyRelu")
def _leaky_relu(call: Call, x: Tensor) -> Tensor:
    return F.leaky_relu(x, call.get("alpha", 0.01))


@operator("ThresholdedRelu")
def _thresholded_relu(call: Call, x: Tensor) -> Tensor:
    return F.threshold(x, call.get("alpha", 1.0), 0.0)


@operator("PRelu")
def _prelu(_: Call, x: Tensor, slope: Tensor) -> Tensor:
    x, slope = together((x, slope))
    per_channel = slope.ndim == x.ndim - 1 > 0 and slope.numel() == len(slope) == x.shape[1]
    if per_channel or slope.numel() == 1:
        return F.prelu(x, slope.reshape(-1))
    return torch.where(x < 0, slope * x, x)


@operator("Elu")
def _elu(call: Call, x: Tensor) -> Tensor:
    return F.elu(x, call.get("alpha", 1.0))


@operator("Celu")
def _celu(call: Call, x: Tensor) -> Tensor:
    return F.celu(x, call.get("alpha", 1.0))


@operator("Selu")
def _selu(call: Call, x: Tensor) -> Tensor:
    alpha: float = call.get("alpha", 1.67326319217681884765625)
    gamma: float = call.get("gamma", 1.05070102214813232421875)
    return gamma * F.elu(x, alpha)


@operator("HardSigmoid")
def _hard_sigmoid(call: Call, x: Tensor) -> Tensor:
    return torch.clamp(call.get("alpha", 0.2) * x + call.get("beta", 0.5), 0.0, 1.0)


@operator("Gelu")
def _gelu(call: Call, x: Tensor) -> Tensor:
    return F.gelu(x, approximate=call.get("approximate", "none"))


@operator("Swish")
def _swish(call: Call, x: Tensor) -> Tensor:
    return x * torch.sigmoid(call.get("alpha", 1.0) * x)


@operator("Softmax", "LogSoftmax")
def _softmax(call: Call, x: Tensor) -> Tensor:
    function: Callable[..., Tensor] = (
        torch.softmax if call.op_type == "Softmax" else torch.log_softmax
    )
    if call.opset >= 13:
        return function(x, call.get("axis", -1))
    # Before, all axes from this one on were one.
    axis = call.get("axis", 1) % max(1, x.ndim)
    return function(x.reshape(math.prod(x.shape[:axis]), -1), 1).reshape(x.shape)


def _refuse_training_dropout(call: Call) -> str | None:
    third = len(call.present) > 2 and call.present[2]
    return "training_mode is not supported" if third else None


@operator("Dropout", settings=(1, 2), refuses=_refuse_training_dropout)
def _dropout(call: Call, x: Tensor, _ratio: Tensor | None = None) -> tuple[Tensor, ...]:
    if not call.extra_outputs:
        return (x,)
    return x, torch.ones_like(x, dtype=torch.bool if call.opset >= 10 else x.dtype)


# --- products ---------------------------------------------------------------------------------


@operator("MatMul")
def _matmul(_: Call, a: Tensor, b: Tensor) -> Tensor:
    a, b = together((a, b))
    return torch.matmul(a, b)


@operator("Gemm")
def _gemm(call: Call, a: Tensor, b: Tensor, c: Tensor | None = None) -> Tensor:
    alpha, beta = call.get("alpha", 1.0), call.get("beta", 1.0)
    product = (a.T if call.get("transA", 0) else a) @ (b.T if call.get("transB", 0) else b)
    product = product if alpha == 1 else alpha * product
    if c is None:
        return product
    return product + (c if beta == 1 else beta * c)


@operator("Einsum")
def _einsum(call: Call, *inputs: Tensor) -> Tensor:
    result: Tensor = torch.einsum(call.get("equation"), *together(inputs))
    return result


# --- reductions -------------------------------------------------------------------------------


def _product(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    for axis in sorted((axis % x.ndim for axis in axes), reverse=True):
        x = torch.prod(x, axis, keepdim=keep, dtype=x.dtype)
    return x


_REDUCTIONS: dict[str, Callable[[Tensor, list[int], bool], Tensor]] = {
    "ReduceL1": lambda x, axes, keep: x.abs().sum(axes, keep),
    "ReduceL2": lambda x, axes, keep: torch.linalg.vector_norm(x, 2, axes, keep),
    "ReduceLogSum": lambda x, axes, keep: x.sum(axes, keep).log(),
    "ReduceLogSumExp": lambda x, axes, keep: torch.logsumexp(x, axes, keep),
    "ReduceMax": torch.amax,
    "ReduceMean": lambda x, axes, keep: x.mean(axes, keep),
    "ReduceMin": torch.amin,
    "ReduceProd": _product,
    "ReduceSum": lambda x, axes, keep: x.sum(axes, keep, dtype=x.dtype),
    "ReduceSumSquare": lambda x, axes, keep: x.square().sum(axes, keep, dtype=x.dtype),
}


@operator(*_REDUCTIONS, settings=(1,))
def _reduce(call: Call, x: Tensor, given: Tensor | None = None) -> Tensor:
    axes = call.ints("axes", given)
    if not axes:
        if call.get("noop_with_empty_axes", 0):
            return _reduce_nothing(call.op_type, x)
        axes = list(range(x.ndim))
    if not axes:
        return _reduce_nothing(call.op_type, x)
    return _REDUCTIONS[call.op_type](x, axes, bool(call.get("keepdims", 1)))


def _reduce_nothing(op_type: str, x: Tensor) -> Tensor:
    """The reduction of each element by itself."""
    return _REDUCTIONS[op_type](x.unsqueeze(-1), [x.ndim], False)


@operator("ArgMax", "ArgMin")
def _extreme_index(call: Call, x: Tensor) -> Tensor:
    axis: int = call.get("axis", 0)
    keep = bool(call.get("keepdims", 1))
    function: Callable[..., Tensor] = torch.argmax if call.op_type == "ArgMax" else torch.argmin
    if not call.get("select_last_index", 0):
        return function(x, axis, keep)
    behind: Tensor = function(x.flip(axis), axis, keep)
    last: int = x.shape[axis] - 1
    return last - behind


@operator("TopK", settings=(1,))
def _top_k(call: Call, x: Tensor, count: Tensor | None = None) -> tuple[Tensor, ...]:
    number = call.get("k") if count is None else int(count.item())
    largest = bool(call.get("largest", 1))
    axis = call.get("axis", -1)
    # Of equal elements the first ones: topk itself takes any.
    found = torch.sort(x, dim=axis, descending=largest, stable=True)
    return found.values.narrow(axis, 0, number), found.indices.narrow(axis, 0, number)


# --- normalisation ----------------------------------------------------------------------------


def _per_channel(parameter: Tensor, x: Tensor) -> Tensor:
    return parameter.reshape(-1, *[1] * (x.ndim - 2))


def _refuse_batch_norm(call: Call) -> str | None:
    if call.get("training_mode", 0) or call.extra_outputs:
        return "only inference mode is supported, with one output"
    return None if call.get("spatial", 1) else "spatial=0 is not supported"


@operator("BatchNormalization", statistics=(3, 4), refuses=_refuse_batch_norm)
def _batch_norm(
    call: Call, x: Tensor, scale: Tensor, bias: Tensor, mean: Tensor, variance: Tensor
) -> Tensor:
    update = call.state.batch_statistics
    # ONNX says how much of the old statistics stays, torch how much of the new ones comes in.
    momentum = 1.0 - call.get("momentum", 0.9)
    epsilon = call.get("epsilon", 1e-5)
    return F.batch_norm(x, mean, variance, scale, bias, update, momentum, epsilon)


@operator("InstanceNormalization")
def _instance_norm(call: Call, x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    return torch.group_norm(x, x.shape[1], scale, bias, call.get("epsilon", 1e-5))


@operator("GroupNormalization")
def _group_norm(call: Call, x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    groups = call.get("num_groups")
    if call.opset < 21:  # one number for each group
        width = x.shape[1] // groups
        scale, bias = scale.repeat_interleave(width), bias.repeat_interleave(width)
    return torch.group_norm(x, groups, scale, bias, call.get("epsilon", 1e-5))


@operator("LayerNormalization")
def _layer_norm(
    call: Call, x: Tensor, scale: Tensor, bias: Tensor | None = None
) -> tuple[Tensor, ...]:
    axis, epsilon = call.get("axis", -1) % x.ndim, call.get("epsilon", 1e-5)
    result = F.layer_norm(x, x.shape[axis:], None, None, epsilon) * scale
    result = result if bias is None else result + bias
    if not call.extra_outputs:
        return (result,)
    axes = list(range(axis, x.ndim))
    variance = x.var(axes, correction=0, keepdim=True)
    return result, x.mean(axes, keepdim=True), torch.rsqrt(variance + epsilon)


@operator("RMSNormalization")
def _rms_norm(call: Call, x: Tensor, scale: Tensor) -> Tensor:
    axes = list(range(call.get("axis", -1) % x.ndim, x.ndim))
    square = x.square().mean(axes, keepdim=True)
    return x * torch.rsqrt(square + call.get("epsilon", 1e-5)) * scale


@operator("LpNormalization")
def _lp_norm(call: Call, x: Tensor) -> Tensor:
    return F.normalize(x, float(call.get("p", 2)), call.get("axis", -1))


@operator("LRN")
def _local_response_norm(call: Call, x: Tensor) -> Tensor:
    size = call.get("size")
    before = (size - 1) // 2
    squares = F.pad(x.square(), (0, 0) * (x.ndim - 2) + (before, size - 1 - before))
    total = squares.unfold(1, size, 1).sum(-1)
    scale: Tensor = call.get("bias", 1.0) + call.get("alpha", 1e-4) / size * total
    return x / scale.pow(call.get("beta", 0.75))

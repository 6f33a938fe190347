"""Depthwise convolution for training on a CPU, where its gradient costs more than all the rest.

The gradient of a depthwise layer's weights has as many numbers as a handful of pixels, and is
gathered from every pixel of every image: it takes ten to thirty times the time of the layer itself
and knows hardly more from a whole batch than from a part of it. So it is taken from the first
images of each batch only, scaled up to the whole: an estimate without bias where their order is
random. What is passed on to earlier layers is exact. Both are computed in float32 where the
processor's kernels for bfloat16 are slower.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - the usual name

_backward = torch.ops.aten.convolution_backward


def depthwise(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    strides: tuple[int, ...],
    padding: tuple[int, ...],
    share: float,
) -> Tensor:
    """`torch.nn.functional.conv2d` of one group per channel.

    Args:
        x: images in any floating type; the result has the same.
        weight: [channels, 1, kernel, kernel].
        bias: of each channel.
        strides: per axis.
        padding: per axis, the same at both ends.
        share: part of the batch that the weights' gradient is taken of, at least one image.
    """
    if torch.is_autocast_enabled("cpu") and x.device.type == "cpu":
        x = x.to(torch.get_autocast_dtype("cpu"))
    run: Callable[..., Tensor] = _Depthwise.apply
    return run(x, weight, bias, strides, padding, share)


class _Depthwise(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        strides: tuple[int, ...],
        padding: tuple[int, ...],
        share: float,
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.strides, ctx.padding, ctx.share = strides, padding, share
        own = None if bias is None else bias.to(x.dtype)
        return F.conv2d(x, weight.to(x.dtype), own, strides, padding, 1, x.shape[1])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        (gradient,) = gradients
        for_x = for_weight = for_bias = None
        if ctx.needs_input_grad[0]:
            # Strided layers: bfloat16 takes twice the time of float32.
            is_slow = x.dtype == torch.bfloat16 and max(ctx.strides) > 1
            dtype = torch.float32 if is_slow else x.dtype
            for_x = _gradients(ctx, gradient.to(dtype), x.to(dtype), weight.to(dtype), 0)
            for_x = for_x.to(x.dtype)
        if ctx.needs_input_grad[1]:
            count = max(1, round(len(x) * ctx.share))
            first, own = (item[:count].to(weight.dtype) for item in (gradient, x))
            for_weight = _gradients(ctx, first, own, weight, 1) * (len(x) / count)
        if ctx.needs_input_grad[2]:
            for_bias = gradient.sum((0, 2, 3), dtype=weight.dtype)
        return for_x, for_weight, for_bias, None, None, None


def _gradients(ctx: Any, gradient: Tensor, x: Tensor, weight: Tensor, which: int) -> Tensor:
    """The gradient with respect to x (0) or to the weights (1)."""
    wanted = [which == 0, which == 1, False]
    geometry = (list(ctx.strides), list(ctx.padding), [1, 1], False, [0, 0], x.shape[1])
    found: Tensor = _backward(gradient, x, weight, None, *geometry, wanted)[which]
    return found

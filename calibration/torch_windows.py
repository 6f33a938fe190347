"""ONNX operators in torch that slide a window or place pixels: Conv, pooling, Pad, Resize.

Padding may differ at the two ends of an axis, which torch's own layers do not know: then it is
added in front of them. `auto_pad` and `ceil_mode` are resolved to explicit numbers first.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - the name that everyone knows it by

from graphfold.calibration.torch_depthwise import depthwise
from graphfold.calibration.torch_table import Call, index_tensor, operator

_CONVOLUTIONS: tuple[Callable[..., Tensor], ...] = (F.conv1d, F.conv2d, F.conv3d)
_TRANSPOSED: tuple[Callable[..., Tensor], ...] = (
    F.conv_transpose1d,
    F.conv_transpose2d,
    F.conv_transpose3d,
)
_MAX_POOLS: tuple[Callable[..., Tensor], ...] = (F.max_pool1d, F.max_pool2d, F.max_pool3d)
_AVERAGE_POOLS: tuple[Callable[..., Tensor], ...] = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)


@dataclass(frozen=True)
class _Window:
    """A window over the spatial axes with all its numbers."""

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    begins: tuple[int, ...]
    ends: tuple[int, ...]

    @property
    def is_symmetric(self) -> bool:
        return self.begins == self.ends

    @property
    def reach(self) -> tuple[int, ...]:
        """Pixels from the first tap to the last, both included."""
        return tuple((k - 1) * d + 1 for k, d in zip(self.kernel, self.dilations, strict=True))


def _window(call: Call, sizes: Sequence[int], kernel: Sequence[int]) -> _Window:
    rank = len(kernel)
    strides = tuple(call.ints("strides") or [1] * rank)
    dilations = tuple(call.ints("dilations") or [1] * rank)
    pads = call.ints("pads") or [0] * (2 * rank)
    plain = _Window(tuple(kernel), strides, dilations, tuple(pads[:rank]), tuple(pads[rank:]))
    mode = call.get("auto_pad", "NOTSET")
    if mode in ("NOTSET", ""):
        return plain
    totals = [0] * rank
    if mode != "VALID":
        totals = [
            max(0, (math.ceil(size / stride) - 1) * stride + reach - size)
            for size, stride, reach in zip(sizes, strides, plain.reach, strict=True)
        ]
    begins, ends = _split_padding(totals, upper=mode == "SAME_UPPER")
    return _Window(plain.kernel, strides, dilations, begins, ends)


def _split_padding(
    totals: Sequence[int], *, upper: bool
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Half of the padding at each end, an odd pixel at the end (upper) or at the beginning."""
    less = tuple(total // 2 for total in totals)
    more = tuple(total - half for total, half in zip(totals, less, strict=True))
    return (less, more) if upper else (more, less)


def _pad_spatial(
    x: Tensor, begins: Sequence[int], ends: Sequence[int], value: float = 0.0
) -> Tensor:
    """Pad the last axes; negative amounts crop."""
    if not any(begins) and not any(ends):
        return x
    pairs = zip(reversed(begins), reversed(ends), strict=True)
    return F.pad(x, list(itertools.chain.from_iterable(pairs)), value=value)


@operator("Conv")
def _conv(call: Call, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    window = _window(call, x.shape[2:], weight.shape[2:])
    padding = window.begins
    if not window.is_symmetric:
        x, padding = _pad_spatial(x, window.begins, window.ends), (0,) * len(padding)
    groups = call.get("group", 1)
    share = call.state.depthwise_share
    is_depthwise = len(padding) == 2 and groups == x.shape[1] == len(weight)
    if share < 1.0 and is_depthwise and set(window.dilations) == {1}:
        return depthwise(x, weight, bias, window.strides, padding, share)
    run = _CONVOLUTIONS[len(padding) - 1]
    return run(x, weight, bias, window.strides, padding, window.dilations, groups)


@operator("ConvTranspose")
def _conv_transpose(call: Call, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    rank = weight.ndim - 2
    window = _window(call, x.shape[2:], weight.shape[2:])
    more = call.ints("output_padding") or [0] * rank
    mode = call.get("auto_pad", "NOTSET")
    wanted = call.ints("output_shape")
    if wanted is None and mode.startswith("SAME"):
        wanted = [n * stride for n, stride in zip(x.shape[2:], window.strides, strict=True)]
    run = _TRANSPOSED[rank - 1]
    groups = call.get("group", 1)
    whole = run(x, weight, None, window.strides, 0, 0, groups, window.dilations)
    begins, ends = window.begins, window.ends
    if wanted is not None:
        have = zip(whole.shape[2:], more, wanted[-rank:], strict=True)
        totals = [size + extra - target for size, extra, target in have]
        begins, ends = _split_padding(totals, upper=mode == "SAME_UPPER")
    grown = [extra - end for extra, end in zip(more, ends, strict=True)]
    result = _pad_spatial(whole, [-begin for begin in begins], grown)
    return result if bias is None else result + bias.reshape(-1, *[1] * rank)


# --- pooling ----------------------------------------------------------------------------------


def _pool_window(call: Call, x: Tensor) -> tuple[_Window, tuple[int, ...]]:
    """The window, and what padding at the ends `ceil_mode` adds to it."""
    window = _window(call, x.shape[2:], call.ints("kernel_shape") or [])
    extra = [0] * len(window.kernel)
    if call.get("ceil_mode", 0):
        axes = zip(
            x.shape[2:], window.begins, window.ends, window.reach, window.strides, strict=True
        )
        for axis, (size, begin, end, reach, stride) in enumerate(axes):
            count = math.ceil((size + begin + end - reach) / stride) + 1
            # A last window that would begin behind the image is left out.
            count -= (count - 1) * stride >= size + begin
            extra[axis] = max(0, (count - 1) * stride + reach - (size + begin + end))
    return window, tuple(extra)


def _fits_torch(window: _Window, extra: Sequence[int]) -> bool:
    """Whether torch's own pooling knows such padding."""
    half = all(2 * pad <= k for pad, k in zip(window.begins, window.kernel, strict=True))
    return window.is_symmetric and half and not any(extra)


def _refuse_indices(call: Call) -> str | None:
    return "its output of indices is not supported" if call.extra_outputs else None


@operator("MaxPool", refuses=_refuse_indices)
def _max_pool(call: Call, x: Tensor) -> Tensor:
    window, extra = _pool_window(call, x)
    padding = window.begins
    if not _fits_torch(window, extra):
        ends = [end + more for end, more in zip(window.ends, extra, strict=True)]
        x, padding = _pad_spatial(x, padding, ends, -math.inf), (0,) * len(padding)
    run = _MAX_POOLS[len(padding) - 1]
    return run(x, window.kernel, window.strides, padding, window.dilations)


@operator("AveragePool")
def _average_pool(call: Call, x: Tensor) -> Tensor:
    window, extra = _pool_window(call, x)
    count_padding = bool(call.get("count_include_pad", 0))
    dilated = any(dilation != 1 for dilation in window.dilations)
    if _fits_torch(window, extra) and not dilated:
        run = _AVERAGE_POOLS[len(window.kernel) - 1]
        return run(x, window.kernel, window.strides, window.begins, False, count_padding)
    ends = [end + more for end, more in zip(window.ends, extra, strict=True)]
    ones = torch.ones((1, 1, *x.shape[2:]), dtype=x.dtype, device=x.device)
    if count_padding:
        # What ceil_mode adds behind the padding counts for nothing.
        ones = _pad_spatial(ones, window.begins, window.ends, 1.0)
        ones = _pad_spatial(ones, [0] * len(extra), extra)
    else:
        ones = _pad_spatial(ones, window.begins, ends)
    sums = _window_sums(_pad_spatial(x, window.begins, ends), window)
    return sums / _window_sums(ones, window)


def _window_sums(x: Tensor, window: _Window) -> Tensor:
    """Sums of a padded tensor over each window, channel by channel."""
    rank = len(window.kernel)
    taps = torch.ones((1, 1, *window.kernel), dtype=x.dtype, device=x.device)
    planes = x.reshape(-1, 1, *x.shape[2:])
    run = _CONVOLUTIONS[rank - 1]
    sums = run(planes, taps, None, window.strides, 0, window.dilations)
    return sums.reshape(*x.shape[:2], *sums.shape[2:])


@operator("GlobalAveragePool")
def _global_average_pool(_: Call, x: Tensor) -> Tensor:
    return x.mean(list(range(2, x.ndim)), keepdim=True)


@operator("GlobalMaxPool")
def _global_max_pool(_: Call, x: Tensor) -> Tensor:
    return x.amax(list(range(2, x.ndim)), keepdim=True)


# --- Pad --------------------------------------------------------------------------------------


@operator("Pad", settings=(1, 2, 3))
def _pad(
    call: Call,
    x: Tensor,
    given: Tensor | None = None,
    value: Tensor | None = None,
    given_axes: Tensor | None = None,
) -> Tensor:
    amounts = call.ints("pads", given) or []
    half = len(amounts) // 2
    axes = list(range(x.ndim)) if given_axes is None else given_axes.tolist()
    begins, ends = [0] * x.ndim, [0] * x.ndim
    for axis, begin, end in zip(axes, amounts[:half], amounts[half:], strict=True):
        begins[axis], ends[axis] = begin, end
    mode = call.get("mode", "constant")
    if mode == "constant":
        fill = call.get("value", 0.0) if value is None else value.item()
        return _pad_spatial(x, begins, ends, fill)
    for axis, (begin, end) in enumerate(zip(begins, ends, strict=True)):
        if begin or end:
            kept = np.arange(x.shape[axis])[max(0, -begin) : x.shape[axis] - max(0, -end)]
            indices = np.pad(kept, (max(0, begin), max(0, end)), mode)
            x = x.index_select(axis, index_tensor(indices, x))
    return x


# --- Resize -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Sampling:
    """How an axis is resampled."""

    mode: str = "nearest"
    coordinates: str = "half_pixel"
    nearest: str = "round_prefer_floor"
    cubic: float = -0.75
    exclude_outside: bool = False


def _refuse_resize(call: Call) -> str | None:
    if call.get("antialias", 0):
        return "antialias is not supported"
    if call.get("coordinate_transformation_mode") == "tf_crop_and_resize":
        return "tf_crop_and_resize is not supported"
    return None


@operator("Upsample", settings=(1,))
def _upsample(call: Call, x: Tensor, scales: Tensor | None = None) -> Tensor:
    factors = call.get("scales") if scales is None else scales.tolist()
    mode = {"bilinear": "linear"}.get(found := call.get("mode", "nearest"), found)
    return _resample(x, _scaled(x, factors), factors, _Sampling(mode, "asymmetric", "floor"))


@operator("Resize", settings=(1, 2, 3), refuses=_refuse_resize)
def _resize(call: Call, x: Tensor, *given: Tensor | None) -> Tensor:
    if call.opset < 11:
        assert given[0] is not None
        factors = given[0].tolist()
        sampling = _Sampling(call.get("mode", "nearest"), "asymmetric", "simple")
        return _resample(x, _scaled(x, factors), factors, sampling)
    inputs = [*given, None, None, None]
    sampling = _Sampling(
        call.get("mode", "nearest"),
        call.get("coordinate_transformation_mode", "half_pixel"),
        call.get("nearest_mode", "round_prefer_floor"),
        call.get("cubic_coeff_a", -0.75),
        bool(call.get("exclude_outside", 0)),
    )
    axes = [axis % x.ndim for axis in call.ints("axes") or range(x.ndim)]
    sizes, factors = list(x.shape), [1.0] * x.ndim
    if inputs[2] is not None and inputs[2].numel():
        policy = call.get("keep_aspect_ratio_policy", "stretch")
        _set_sizes(sizes, factors, axes, inputs[2].tolist(), policy)
    elif inputs[1] is not None:
        for axis, factor in zip(axes, inputs[1].tolist(), strict=True):
            factors[axis] = factor
        sizes = _scaled(x, factors)
    return _resample(x, sizes, factors, sampling)


def _scaled(x: Tensor, factors: Sequence[float]) -> list[int]:
    return [math.floor(size * factor) for size, factor in zip(x.shape, factors, strict=True)]


def _set_sizes(
    sizes: list[int], factors: list[float], axes: list[int], wanted: list[int], policy: str
) -> None:
    """Write the sizes asked for, and the factors that they mean, into both lists."""
    ratios = [target / sizes[axis] for axis, target in zip(axes, wanted, strict=True)]
    if policy != "stretch":
        one = min(ratios) if policy == "not_larger" else max(ratios)
        ratios = [one] * len(axes)
        # Halves go up, where Python's own rounding takes the even number.
        wanted = [math.floor(sizes[axis] * one + 0.5) for axis in axes]
    for axis, target, ratio in zip(axes, wanted, ratios, strict=True):
        sizes[axis], factors[axis] = target, ratio


def _resample(
    x: Tensor, sizes: Sequence[int], factors: Sequence[float], sampling: _Sampling
) -> Tensor:
    for axis, (size, factor) in enumerate(zip(sizes, factors, strict=True)):
        if size == x.shape[axis] and factor == 1.0:
            continue
        indices, weights = _taps(x.shape[axis], size, factor, sampling)
        shape = [-1 if other == axis else 1 for other in range(x.ndim)]
        parts = [x.index_select(axis, index_tensor(row, x)) for row in indices]
        if weights is not None:
            rows = torch.from_numpy(weights).to(x.device, x.dtype)
            parts = [part * row.reshape(shape) for part, row in zip(parts, rows, strict=True)]
        x = functools.reduce(torch.add, parts)
    return x


@functools.lru_cache(maxsize=256)
def _taps(
    size: int, result: int, factor: float, sampling: _Sampling
) -> tuple[NDArray[np.int64], NDArray[Any] | None]:
    """Which elements make each new one, and with what weights.

    Returns:
        Indices and weights, [taps, result] each; None for weights of one.
    """
    at = _coordinates(size, result, factor, sampling.coordinates)
    if sampling.mode == "nearest":
        rounded = _ROUNDINGS[sampling.nearest](at, factor < 1)
        return np.clip(rounded, 0, size - 1).astype(np.int64)[None], None
    if sampling.mode == "linear":
        at = np.clip(at, 0, size - 1)
        below = np.floor(at)
        indices = np.stack([below, np.minimum(below + 1, size - 1)]).astype(np.int64)
        return indices, np.stack([1 - (at - below), at - below])
    below = np.floor(at)
    indices = np.stack([below + offset for offset in (-1, 0, 1, 2)]).astype(np.int64)
    weights = _cubic_weights(np.abs(at - indices), sampling.cubic)
    if sampling.exclude_outside:
        weights = np.where((indices >= 0) & (indices < size), weights, 0)
        weights = weights / weights.sum(axis=0)
    return np.clip(indices, 0, size - 1), weights


# As onnxruntime does it: before opset 11, enlarging took the element below, shrinking the above.
_ROUNDINGS: dict[str, Callable[[NDArray[Any], bool], NDArray[Any]]] = {
    "round_prefer_floor": lambda at, _: np.ceil(at - np.float32(0.5)),
    "round_prefer_ceil": lambda at, _: np.floor(at + np.float32(0.5)),
    "floor": lambda at, _: np.floor(at),
    "ceil": lambda at, _: np.ceil(at),
    "simple": lambda at, shrinks: np.ceil(at) if shrinks else np.trunc(at),
}


def _coordinates(size: int, result: int, factor: float, mode: str) -> NDArray[Any]:
    """Where in the old axis each new element lies, in single precision like onnxruntime."""
    new, scale, half = np.arange(result, dtype=np.float32), np.float32(factor), np.float32(0.5)
    if mode == "asymmetric":
        return new / scale
    if mode == "align_corners":
        return new * np.float32(size - 1) / np.float32(max(1, result - 1))
    if mode == "tf_half_pixel_for_nn":
        return (new + half) / scale
    if mode == "pytorch_half_pixel" and result == 1:
        return np.zeros_like(new)
    centred = (new + half) / scale - half
    if mode == "half_pixel_symmetric":
        adjustment = np.float32(result) / (scale * np.float32(size))
        centred = np.float32(size / 2) * (1 - adjustment) + centred
    return centred


def _cubic_weights(distance: NDArray[Any], a: float) -> NDArray[Any]:
    """Keys' cubic kernel."""
    near = ((a + 2) * distance - (a + 3)) * distance * distance + 1
    far = ((a * distance - 5 * a) * distance + 8 * a) * distance - 4 * a
    return np.where(distance <= 1, near, np.where(distance < 2, far, 0))

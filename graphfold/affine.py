"""The algebra of affine convolutions: the value type that the whole merge is built on.

An affine convolution maps x to ``W * x + border * 1 + bias``, where ``1`` is the indicator of
x's own domain: one inside, zero in the padding. Without ``border`` it is an ordinary
convolution. The border kernel is what makes composition closed and exact: a bias that a later
convolution zero-pads is constant only inside, and that is precisely a convolution of the
indicator. Everything is float64; nothing here knows ONNX.

`graphfold.geometry` has the shape of a composition without weights, so that costs and refusals are
known before any array is touched.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from graphfold.geometry import Axis, Geometry, Sizes

Array = NDArray[np.float64]


@dataclass(frozen=True)
class AffineConv:
    """y = weight * x + border * 1 + bias, in float64.

    Attributes:
        weight: [O, I / groups, *kernel].
        bias: [O].
        axes: stride, dilation and padding per spatial axis; kernels agree with `weight`.
        groups: as in ONNX Conv.
        border: [O, *kernel], the kernel on the indicator of x's domain, or None.
    """

    weight: Array
    bias: Array
    axes: tuple[Axis, ...]
    groups: int = 1
    border: Array | None = None

    def __post_init__(self) -> None:
        assert self.weight.shape[2:] == tuple(axis.kernel for axis in self.axes)

    @property
    def geometry(self) -> Geometry:
        """The shape of this convolution."""
        return Geometry(
            axes=self.axes,
            in_channels=self.weight.shape[1] * self.groups,
            out_channels=self.weight.shape[0],
            groups=self.groups,
            biased=bool(np.any(self.bias)),
            bordered=self.border is not None,
        )

    @property
    def nbytes(self) -> int:
        """Memory that the weights take."""
        return self.weight.nbytes

    def then(self, second: AffineConv, sizes: Sizes = None) -> AffineConv:
        """The single affine convolution equal to `second` after `self`, borders included.

        W[o, i, u] = sum over mid m and a*d1 + b*d2*s1 = u of W2[o, m, b] * W1[m, i, a].

        Args:
            second: what reads the output of `self`.
            sizes: spatial sizes of x where they are fixed; sharpens the border test.

        Raises:
            NotExactError: no single convolution is equal everywhere; says why.
        """
        first, after = self.geometry, second.geometry
        merged = first.then(after, sizes)
        weight = _compose_weights(self, second, merged)
        bias = second.bias + _total(second, self.bias)
        border = self._compose_border(second, merged, sizes)
        if first.carries_bias_into(after, sizes):
            # The bias of `self` is in the border kernel now, not in the constant.
            bias = second.bias.copy()
        composed = AffineConv(weight, bias, merged.axes, merged.groups, border)
        return composed if merged.padded else composed.without_border()

    def _compose_border(self, second: AffineConv, merged: Geometry, sizes: Sizes) -> Array | None:
        first, after = self.geometry, second.geometry
        carries_bias = first.carries_bias_into(after, sizes)
        if self.border is None and not carries_bias and second.border is None:
            return None
        border = np.zeros((after.out_channels, *merged.kernel))
        if self.border is not None:
            shadow = AffineConv(self.border[:, None], np.zeros_like(self.bias), self.axes)
            dense = second.with_groups(1)
            border += _compose_weights(shadow, dense, replace(merged, groups=1, in_channels=1))[
                :, 0
            ]
        if carries_bias or second.border is not None:
            taps = first.domain_taps(after, sizes)
            kernel = np.zeros_like(second.weight[:, 0]) if second.border is None else second.border
            if carries_bias:
                kernel = kernel + _per_tap(second, self.bias)
            border[_placement(self.axes, second.axes, merged.axes, taps)] += kernel
        return border

    def without_border(self) -> AffineConv:
        """The same map where no window reaches into padding: the border kernel is a constant."""
        if self.border is None:
            return self
        total = self.border.sum(axis=tuple(range(1, self.border.ndim)))
        return replace(self, bias=self.bias + total, border=None)

    def plus(self, other: AffineConv, sizes: Sizes = None) -> AffineConv:
        """The sum of two branches that read the same x: kernels aligned by padding and added.

        Raises:
            NotExactError: strides, channels or output sizes differ.
        """
        merged = self.geometry.plus(other.geometry, sizes)
        parts = [_embed(part.with_groups(merged.groups), merged) for part in (self, other)]
        borders = [part.border for part in parts if part.border is not None]
        return AffineConv(
            parts[0].weight + parts[1].weight,
            self.bias + other.bias,
            merged.axes,
            merged.groups,
            sum(borders[1:], start=borders[0]) if borders else None,
        )

    def take(self, channels: Sequence[int]) -> AffineConv:
        """The convolution of these output channels alone, in this order (Slice, Gather)."""
        rows = np.asarray(channels, dtype=np.int64)
        groups = _groups_after_take(self, rows)
        dense = self.with_groups(groups)
        border = None if self.border is None else self.border[rows]
        return replace(dense, weight=dense.weight[rows], bias=self.bias[rows], border=border)

    def with_groups(self, groups: int) -> AffineConv:
        """The same map written with fewer groups (a divisor of the present number)."""
        if groups == self.groups:
            return self
        merge = self.groups // groups
        out, width, *kernel = self.weight.shape
        blocks = self.weight.reshape(groups, merge, out // self.groups, width, *kernel)
        dense = np.zeros((groups, merge, out // self.groups, merge, width, *kernel))
        diagonal = np.arange(merge)
        dense[:, diagonal, :, diagonal] = np.moveaxis(blocks, 1, 0)
        return replace(self, weight=dense.reshape(out, merge * width, *kernel), groups=groups)

    def apply(self, x: Array) -> Array:
        """The map's values on an input, in float64: one matrix product per tap.

        Args:
            x: [N, I, *sizes].

        Returns:
            [N, O, *output sizes].
        """
        sizes = x.shape[2:]
        outputs = tuple(axis.output_size(size) for axis, size in zip(self.axes, sizes, strict=True))
        batch, out = x.shape[0], self.weight.shape[0]
        padded = _padded(x, self.axes)
        total = np.zeros((batch, self.groups, out // self.groups, math.prod(outputs)))
        for tap in np.ndindex(*self.weight.shape[2:]):
            window = tuple(
                slice(
                    t * axis.dilation,
                    t * axis.dilation + (count - 1) * axis.stride + 1,
                    axis.stride,
                )
                for t, axis, count in zip(tap, self.axes, outputs, strict=True)
            )
            seen = padded[(slice(None), slice(None), *window)]
            seen = seen.reshape(batch, self.groups, -1, math.prod(outputs))
            taps = self.weight[(slice(None), slice(None), *tap)]
            total += _block_product(taps.reshape(self.groups, out // self.groups, -1), seen)
        result = total.reshape(batch, out, *outputs) + self.bias.reshape(-1, *[1] * len(outputs))
        if self.border is not None:
            result += self.border_map(sizes) - self.bias.reshape(-1, *[1] * len(outputs))
        return np.asarray(result)

    def adjoint(self, y: Array, sizes: Sequence[int]) -> Array:
        """The transpose of the linear part: each output's values spread over what it read.

        Args:
            y: [R, O, *output sizes].
            sizes: spatial sizes of x.

        Returns:
            [R, I, *sizes].
        """
        rows, out, *outputs = y.shape
        width = self.weight.shape[1]
        room = [
            max(size + axis.begin, (count - 1) * axis.stride + axis.extent)
            for axis, size, count in zip(self.axes, sizes, outputs, strict=True)
        ]
        begins = [max(0, -axis.begin) for axis in self.axes]
        spread = np.zeros(
            (rows, self.groups, width, *(b + n for b, n in zip(begins, room, strict=True)))
        )
        seen = y.reshape(rows, self.groups, out // self.groups, -1)
        blocks = self.weight.reshape(self.groups, out // self.groups, *self.weight.shape[1:])
        for tap in np.ndindex(*self.weight.shape[2:]):
            taps = blocks[(slice(None), slice(None), slice(None), *tap)].swapaxes(1, 2)
            start = [
                t * axis.dilation + begin
                for t, axis, begin in zip(tap, self.axes, begins, strict=True)
            ]
            window = tuple(
                slice(at, at + (count - 1) * axis.stride + 1, axis.stride)
                for at, axis, count in zip(start, self.axes, outputs, strict=True)
            )
            product = (taps @ seen).reshape(rows, self.groups, width, *outputs)
            spread[(slice(None), slice(None), slice(None), *window)] += product
        places = tuple(
            slice(begin + axis.begin, begin + axis.begin + size)
            for begin, axis, size in zip(begins, self.axes, sizes, strict=True)
        )
        whole = spread.reshape(rows, -1, *spread.shape[3:])
        return np.asarray(whole[(slice(None), slice(None), *places)])

    def constant_map(self, sizes: Sequence[int]) -> Array:
        """What the map makes of zeros: [O, *output sizes], for spatial sizes of x."""
        zeros = np.zeros((1, self.weight.shape[1] * self.groups, *sizes))
        return np.asarray(self.apply(zeros)[0])

    def absolute(self) -> AffineConv:
        """The map with the magnitudes of its weights, biases and border kernel."""
        border = None if self.border is None else np.abs(self.border)
        return replace(self, weight=np.abs(self.weight), bias=np.abs(self.bias), border=border)

    @property
    def terms(self) -> int:
        """Products and additions per output."""
        per_output = math.prod(self.weight.shape[1:]) + 1
        return per_output + (0 if self.border is None else math.prod(self.border.shape[1:]))

    @property
    def gain(self) -> float:
        """Largest row sum of |W|."""
        return float(np.abs(self.weight).sum(axis=tuple(range(1, self.weight.ndim))).max())

    @property
    def offset(self) -> float:
        """Largest constant part, |B| and |b| together."""
        offset = np.abs(self.bias)
        if self.border is not None:
            offset = offset + np.abs(self.border).sum(axis=tuple(range(1, self.border.ndim)))
        return float(offset.max())

    def border_table(self, sizes: Sequence[int]) -> tuple[Array, tuple[NDArray[np.int64], ...]]:
        """The constant map (bias and border) compressed to its distinct rows per axis.

        Args:
            sizes: spatial sizes of x.

        Returns:
            table [O, n1, ...] and one index vector per axis: the full map is the table
            gathered along every axis by them.
        """
        assert self.border is not None
        table = self.border
        indices = []
        for number, (axis, size) in enumerate(zip(self.axes, sizes, strict=True)):
            valid = _valid_taps(axis, size)
            distinct, index = np.unique(valid, axis=1, return_inverse=True)
            table = np.moveaxis(np.tensordot(table, distinct, axes=(1 + number, 0)), -1, 1 + number)
            indices.append(np.asarray(index, dtype=np.int64).reshape(-1))
        return table + self.bias.reshape(-1, *[1] * len(self.axes)), tuple(indices)

    def border_map(self, sizes: Sequence[int]) -> Array:
        """The whole constant map [O, *output sizes] for spatial sizes of x."""
        table, indices = self.border_table(sizes)
        for axis, index in enumerate(indices):
            table = np.take(table, index, axis=1 + axis)
        return table


def identity(channels: int, rank: int) -> AffineConv:
    """The map y = x, as a depthwise convolution of kernel 1."""
    return scale_shift(np.ones(channels), np.zeros(channels), rank)


def scale_shift(scale: Array, shift: Array, rank: int) -> AffineConv:
    """The map y = scale * x + shift per channel, as a depthwise convolution of kernel 1."""
    channels = scale.shape[0]
    weight = np.asarray(scale, dtype=np.float64).reshape(channels, 1, *[1] * rank)
    return AffineConv(weight, np.asarray(shift, dtype=np.float64), (Axis(),) * rank, channels)


def zero_pad(channels: int, pads: Iterable[tuple[int, int]]) -> AffineConv:
    """Zero padding (or cropping, where negative) of the spatial axes."""
    axes = tuple(Axis(begin=begin, end=end) for begin, end in pads)
    return replace(identity(channels, len(axes)), axes=axes)


def stack(branches: Sequence[AffineConv], sizes: Sizes = None) -> AffineConv:
    """Concat over channels of branches that read the same x.

    Raises:
        NotExactError: strides or output sizes differ.
    """
    total = sum(branch.weight.shape[0] for branch in branches)
    start, parts = 0, []
    for branch in branches:
        count = branch.weight.shape[0]
        rows = slice(start, start + count)
        dense = branch.with_groups(1)
        weight = np.zeros((total, *dense.weight.shape[1:]))
        weight[rows] = dense.weight
        bias = np.zeros(total)
        bias[rows] = branch.bias
        border = None
        if branch.border is not None:
            border = np.zeros((total, *branch.border.shape[1:]))
            border[rows] = branch.border
        parts.append(AffineConv(weight, bias, branch.axes, 1, border))
        start += count
    merged = parts[0]
    for part in parts[1:]:
        merged = merged.plus(part, sizes)
    return merged


def _compose_weights(first: AffineConv, second: AffineConv, merged: Geometry) -> Array:
    """Grouped product of kernels; one matrix product per tap of `second`, no channel loop."""
    groups = merged.groups
    if first.groups % groups == 0 and groups != second.groups and groups != first.groups:
        second = second.with_groups(groups)
    out, mid = second.weight.shape[0], first.weight.shape[0]
    kernel1 = first.weight.shape[2:]
    width1, width2 = first.weight.shape[1], second.weight.shape[1]
    merged_width = merged.in_channels // groups
    weight = np.zeros((out, merged_width, *merged.kernel))
    first_is_finer = second.groups == groups
    inner = (first.groups if first_is_finer else second.groups) // groups
    left = first.weight.reshape(groups, inner, mid // groups // inner, -1)
    for tap in np.ndindex(*second.weight.shape[2:]):
        taps2 = second.weight[(slice(None), slice(None), *tap)]
        if first_is_finer:
            right = taps2.reshape(groups, out // groups, inner, width2 // inner)
            product = _block_product(right.transpose(0, 2, 1, 3), left)
            product = product.reshape(groups, inner, out // groups, width1, *kernel1)
            product = product.swapaxes(1, 2)
        else:
            right = taps2.reshape(groups, inner, out // groups // inner, width2)
            product = _block_product(right, left)
        product = product.reshape(out, merged_width, *kernel1)
        if product.shape == weight.shape:
            return product
        place = _placement(second.axes, first.axes, merged.axes, tap, stepped_by_first=True)
        weight[(slice(None), *place)] += product
    return weight


def _block_product(right: Array, left: Array) -> Array:
    """Matrix product per block; with one mid channel a plain product, which is far cheaper."""
    if right.shape[-1] == 1:
        return np.asarray(right * left)
    return np.asarray(right @ left)


def _placement(
    moving: tuple[Axis, ...],
    resting: tuple[Axis, ...],
    merged: tuple[Axis, ...],
    taps: Sequence[int],
    *,
    stepped_by_first: bool = False,
) -> tuple[slice, ...]:
    """Where the kernel of `resting` lies in the merged kernel when `moving` stands at `taps`.

    With `stepped_by_first`, `moving` is the second convolution, whose taps are one stride of
    `resting` apart; otherwise `moving` is the first and `resting`'s taps are stretched.
    """
    place: list[slice] = [slice(None)]
    for move, rest, whole, tap in zip(moving, resting, merged, taps, strict=True):
        if stepped_by_first:
            start, step = tap * move.dilation * rest.stride, rest.dilation
        else:
            start, step = tap * move.dilation, rest.dilation * move.stride
        begin, stride = start // whole.dilation, max(1, step // whole.dilation)
        place.append(slice(begin, begin + (rest.kernel - 1) * stride + 1, stride))
    return tuple(place)


def _per_tap(second: AffineConv, values: Array) -> Array:
    """Sum over mid channels of W2[o, m, b] * values[m], for every tap b: [O, *kernel]."""
    groups = second.groups
    out, width, *kernel = second.weight.shape
    blocks = second.weight.reshape(groups, out // groups, width, -1)
    product = np.einsum("gomk,gm->gok", blocks, values.reshape(groups, width))
    per_tap: Array = product.reshape(out, *kernel)
    return per_tap


def _total(second: AffineConv, values: Array) -> Array:
    per_tap = _per_tap(second, values)
    total: Array = per_tap.sum(axis=tuple(range(1, per_tap.ndim)))
    return total


def _embed(part: AffineConv, merged: Geometry) -> AffineConv:
    """The same map with its kernel laid into the merged, larger window."""
    place = []
    for axis, whole in zip(part.axes, merged.axes, strict=True):
        begin = (whole.begin - axis.begin) // whole.dilation
        stride = max(1, axis.dilation // whole.dilation) if axis.kernel > 1 else 1
        place.append(slice(begin, begin + (axis.kernel - 1) * stride + 1, stride))
    weight = np.zeros((*part.weight.shape[:2], *merged.kernel))
    weight[(slice(None), slice(None), *place)] = part.weight
    border = None
    if part.border is not None:
        border = np.zeros((part.weight.shape[0], *merged.kernel))
        border[(slice(None), *place)] = part.border
    return AffineConv(weight, part.bias, merged.axes, part.groups, border)


def _groups_after_take(conv: AffineConv, rows: NDArray[np.int64]) -> int:
    """Grouping survives only where every group keeps equally many rows, in order."""
    per_group = conv.weight.shape[0] // conv.groups
    owners = rows // per_group
    if len(rows) % conv.groups == 0:
        expected = np.repeat(np.arange(conv.groups), len(rows) // conv.groups)
        if np.array_equal(owners, expected):
            return conv.groups
    return 1


def _padded(x: Array, axes: tuple[Axis, ...]) -> Array:
    """X zero-padded, or cropped where padding is negative, along its spatial axes."""
    amounts = [(max(0, axis.begin), max(0, axis.end)) for axis in axes]
    padded = np.pad(x, [(0, 0), (0, 0), *amounts])
    crops = tuple(
        slice(max(0, -axis.begin), size - max(0, -axis.end))
        for axis, size in zip(axes, padded.shape[2:], strict=True)
    )
    return padded[(slice(None), slice(None), *crops)]


def _valid_taps(axis: Axis, size: int) -> Array:
    """[kernel, outputs]: 1 where that tap of that output pixel lies inside the domain."""
    positions = np.arange(axis.output_size(size)) * axis.stride - axis.begin
    offsets = positions[None, :] + (np.arange(axis.kernel) * axis.dilation)[:, None]
    return ((offsets >= 0) & (offsets < size)).astype(np.float64)

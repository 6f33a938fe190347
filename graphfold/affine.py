"""The algebra of affine convolutions: the value type that the whole merge is built on.

An affine convolution maps x to ``W * x + border * 1 + bias``, where ``1`` is the indicator of
x's own domain: one inside, zero in the padding. Without ``border`` it is an ordinary
convolution. The border kernel is what makes composition closed and exact: a bias that a later
convolution zero-pads is constant only inside, and that is precisely a convolution of the
indicator. Everything is float64; nothing here knows ONNX.

`Axis` and `Geometry` carry the shape of a composition without weights, so that costs and
refusals are known before any array is touched.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from graphfold.errors import NotExactError

Array = NDArray[np.float64]
Sizes = Sequence[int | None] | None


@dataclass(frozen=True)
class Axis:
    """The window of a convolution along one spatial axis; negative padding crops."""

    kernel: int = 1
    stride: int = 1
    dilation: int = 1
    begin: int = 0
    end: int = 0

    @property
    def extent(self) -> int:
        """Input pixels that the window spans."""
        return (self.kernel - 1) * self.dilation + 1

    def output_size(self, size: int) -> int:
        """Number of output pixels for `size` input pixels."""
        return (size + self.begin + self.end - self.extent) // self.stride + 1

    def then(self, second: Axis, size: int | None = None) -> Axis:
        """The axis of `second` after `self`, both linear.

        Offsets of the result are {a*d1 + b*d2*s1}; the padding of `second` counts s1 times.

        Raises:
            NotExactError: `second` pads with zeros where `self` would not be zero.
        """
        self._check_padding(second, size)
        steps = [self.dilation] if self.kernel > 1 else []
        steps += [second.dilation * self.stride] if second.kernel > 1 else []
        dilation = math.gcd(*steps) if steps else 1
        extent = (self.kernel - 1) * self.dilation
        extent += (second.kernel - 1) * second.dilation * self.stride
        return Axis(
            kernel=extent // dilation + 1,
            stride=self.stride * second.stride,
            dilation=dilation,
            begin=self.begin + second.begin * self.stride,
            end=self.end + second.end * self.stride,
        )

    def reads(self, position: int, outputs: int | None = None) -> bool:
        """Whether one of the first `outputs` windows, or of any number, has a tap there."""
        starts = (position + self.begin - tap * self.dilation for tap in range(self.kernel))
        return any(
            start >= 0
            and start % self.stride == 0
            and (outputs is None or start // self.stride < outputs)
            for start in starts
        )

    def padding_read(self, size: int | None) -> list[int]:
        """Positions outside an input of `size` that some tap reads, from first to last.

        Where the size is unknown only those before the input are listed.
        """
        if size is None:
            return [at for at in range(-self.begin, 0) if self.reads(at)]
        outputs = self.output_size(size)
        outside = (*range(-self.begin, 0), *range(size, size + self.end))
        return [at for at in outside if self.reads(at, outputs)]

    def reads_padding(self, size: int | None) -> bool:
        """Whether padding matters for an input of `size`: strides may never reach it."""
        return bool(self.padding_read(size)) or (size is None and self.end > 0)

    def _check_padding(self, second: Axis, size: int | None) -> None:
        """Every window of `self` at a position that `second` pads must see padding alone."""
        if size is None:
            is_exact = second.end <= 0 or self.end + 1 >= self.extent
            before = second.padding_read(None)
            is_exact &= not before or self._tap_position(self.kernel - 1, before[-1]) < 0
        else:
            is_exact = not any(
                self._tap_position(tap, at) in range(size)
                for at in second.padding_read(self.output_size(size))
                for tap in range(self.kernel)
            )
        if not is_exact:
            raise NotExactError(
                f"a window of {self.extent} (stride {self.stride}, padding {self.begin} and "
                f"{self.end}) is followed by one of {second.extent} that pads {second.begin} "
                f"and {second.end}: at the border no single convolution is equal",
                boundary_that_works="hoist",
            )

    def _tap_position(self, tap: int, output: int) -> int:
        """The input position that a tap reads for an output, which need not exist."""
        return output * self.stride - self.begin + tap * self.dilation

    def without_cropping(self) -> tuple[Axis, int, int]:
        """The same window with zero taps where it cropped, and their number before and after.

        Whole steps of the dilation are added: what they reach too far is padding.
        """
        dilation = self.dilation if self.kernel > 1 else 1
        before, after = max(0, -(self.begin // dilation)), max(0, -(self.end // dilation))
        if not before and not after:
            return self, 0, 0
        grown = Axis(
            kernel=self.kernel + before + after,
            stride=self.stride,
            dilation=dilation,
            begin=self.begin + before * dilation,
            end=self.end + after * dilation,
        )
        return grown, before, after

    def domain_tap(self, second: Axis, size: int | None = None) -> int | None:
        """The tap of `self` that is inside x's domain exactly where `second` reads no padding.

        The bias of `self` is zero where `second` pads, so it must be carried by such a tap.
        None where there is no such tap.
        """
        for tap in range(self.kernel):
            if size is None:
                follows = self._follows_domain_of_any_size(tap, second)
            else:
                follows = self._follows_domain(tap, second, size)
            if follows:
                return tap
        return None

    def _follows_domain_of_any_size(self, tap: int, second: Axis) -> bool:
        offset = self._tap_position(tap, 0)
        before = second.padding_read(None)
        starts_with_domain = offset >= 0 and (not before or self._tap_position(tap, before[-1]) < 0)
        # The last window ends from 0 to stride - 1 pixels before the padding does.
        last = self.extent - 1 - self.end - self.begin
        return starts_with_domain and (offset == last if second.end > 0 else offset <= last)

    def _follows_domain(self, tap: int, second: Axis, size: int) -> bool:
        count = self.output_size(size)
        outputs = second.output_size(count)
        first = next((at for at in range(count) if second.reads(at, outputs)), 0)
        last = next((at for at in reversed(range(count)) if second.reads(at, outputs)), 0)
        domain = range(size)
        return (
            self._tap_position(tap, first) in domain
            and self._tap_position(tap, last) in domain
            and not any(self._tap_position(tap, at) in domain for at in second.padding_read(count))
        )


@dataclass(frozen=True)
class Geometry:
    """Shape of an affine convolution without its numbers.

    Attributes:
        axes: one per spatial axis (1 to 3).
        in_channels, out_channels, groups: as in ONNX Conv.
        biased: the constant part may differ from zero.
        bordered: there is a border kernel.
    """

    axes: tuple[Axis, ...]
    in_channels: int
    out_channels: int
    groups: int = 1
    biased: bool = True
    bordered: bool = False

    @property
    def rank(self) -> int:
        """Number of spatial axes."""
        return len(self.axes)

    @property
    def kernel(self) -> tuple[int, ...]:
        """Kernel size per axis."""
        return tuple(axis.kernel for axis in self.axes)

    @property
    def strides(self) -> tuple[int, ...]:
        """Stride per axis."""
        return tuple(axis.stride for axis in self.axes)

    @property
    def padded(self) -> bool:
        """Whether any side of any axis is zero-padded."""
        return any(axis.begin > 0 or axis.end > 0 for axis in self.axes)

    @property
    def params(self) -> int:
        """Weights and biases of one convolution of this geometry, without a border repair."""
        taps = math.prod(self.kernel)
        return self.out_channels * (self.in_channels // self.groups * taps + 1)

    def output_sizes(self, sizes: Sequence[int]) -> tuple[int, ...]:
        """Spatial output sizes for spatial input sizes."""
        return tuple(axis.output_size(size) for axis, size in zip(self.axes, sizes, strict=True))

    def macs(self, sizes: Sequence[int]) -> int:
        """Multiply-accumulates of one image of these spatial input sizes."""
        pixels = math.prod(self.output_sizes(sizes))
        return pixels * self.out_channels * self.in_channels // self.groups * math.prod(self.kernel)

    def then(self, second: Geometry, sizes: Sizes = None) -> Geometry:
        """Geometry of `second` after `self`; raises NotExactError with the reason."""
        self._check_channels(second)
        known = _sizes_or_unknown(sizes, self.rank)
        axes = tuple(
            one.then(two, size)
            for one, two, size in zip(self.axes, second.axes, known, strict=True)
        )
        needs_border = self.carries_bias_into(second, sizes) or second.bordered
        if needs_border:
            self.domain_taps(second, sizes)
        merged = Geometry(
            axes=axes,
            in_channels=self.in_channels,
            out_channels=second.out_channels,
            groups=math.gcd(self.groups, second.groups),
            biased=self.biased or second.biased or second.bordered,
            bordered=self.bordered or needs_border,
        )
        return merged if merged.padded else replace(merged, bordered=False)

    def without_cropping(self) -> Geometry:
        """The same map with zero taps in place of negative padding, as it must be emitted."""
        return replace(self, axes=tuple(axis.without_cropping()[0] for axis in self.axes))

    def carries_bias_into(self, second: Geometry, sizes: Sizes = None) -> bool:
        """Whether `second` reads zeros in its padding where the bias of `self` would stand."""
        known = _sizes_or_unknown(sizes, self.rank)
        return self.biased and any(
            two.reads_padding(None if size is None else one.output_size(size))
            for one, two, size in zip(self.axes, second.axes, known, strict=True)
        )

    def _check_channels(self, second: Geometry) -> None:
        if self.rank != second.rank:
            raise NotExactError(f"{self.rank} spatial axes are followed by {second.rank}")
        if self.out_channels != second.in_channels:
            raise NotExactError(
                f"{self.out_channels} channels are followed by {second.in_channels}"
            )

    def domain_taps(self, second: Geometry, sizes: Sizes = None) -> tuple[int, ...]:
        """One tap per axis that is inside exactly where `second` reads no padding.

        Raises:
            NotExactError: the bias of `self` has no such tap.
        """
        known = _sizes_or_unknown(sizes, self.rank)
        taps = [
            one.domain_tap(two, size)
            for one, two, size in zip(self.axes, second.axes, known, strict=True)
        ]
        found = tuple(tap for tap in taps if tap is not None)
        if len(found) < self.rank:
            raise NotExactError(
                "a bias is followed by zero padding that no tap of the merged kernel can follow",
                boundary_that_works="hoist",
            )
        return found

    def plus(self, other: Geometry, sizes: Sizes = None) -> Geometry:
        """Geometry of the sum of two branches of the same input; raises NotExactError."""
        _check_branches(self, other)
        known = _sizes_or_unknown(sizes, self.rank)
        axes = tuple(
            _union(one, two, size)
            for one, two, size in zip(self.axes, other.axes, known, strict=True)
        )
        return Geometry(
            axes=axes,
            in_channels=self.in_channels,
            out_channels=self.out_channels,
            groups=math.gcd(self.groups, other.groups),
            biased=self.biased or other.biased,
            bordered=self.bordered or other.bordered,
        )


def _sizes_or_unknown(sizes: Sizes, rank: int) -> Sequence[int | None]:
    return (None,) * rank if sizes is None else sizes


def _check_branches(one: Geometry, two: Geometry) -> None:
    if one.rank != two.rank or one.in_channels != two.in_channels:
        raise NotExactError("parallel branches read different inputs")
    if one.out_channels != two.out_channels:
        raise NotExactError(
            f"parallel branches of {one.out_channels} and {two.out_channels} channels are "
            "added by broadcasting"
        )
    if one.strides != two.strides:
        raise NotExactError(f"parallel branches of stride {one.strides} and {two.strides}")


def _union(one: Axis, two: Axis, size: int | None) -> Axis:
    """The smallest window that holds both windows, aligned by padding."""
    begin = max(one.begin, two.begin)
    right = max(one.extent - one.begin, two.extent - two.begin)
    steps = [axis.dilation for axis in (one, two) if axis.kernel > 1]
    steps += [abs(one.begin - two.begin)] if one.begin != two.begin else []
    dilation = math.gcd(*steps) if steps else 1
    extent = right + begin
    slack = one.begin + one.end - one.extent
    if slack != two.begin + two.end - two.extent and (
        size is None or one.output_size(size) != two.output_size(size)
    ):
        raise NotExactError("parallel branches give outputs of different sizes")
    return Axis(
        kernel=(extent - 1) // dilation + 1,
        stride=one.stride,
        dilation=dilation,
        begin=begin,
        end=slack + extent - begin,
    )


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


def _valid_taps(axis: Axis, size: int) -> Array:
    """[kernel, outputs]: 1 where that tap of that output pixel lies inside the domain."""
    positions = np.arange(axis.output_size(size)) * axis.stride - axis.begin
    offsets = positions[None, :] + (np.arange(axis.kernel) * axis.dilation)[:, None]
    return ((offsets >= 0) & (offsets < size)).astype(np.float64)

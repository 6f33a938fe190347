"""The shape of affine convolutions without their numbers: windows, channels, composition, costs.

Whether two convolutions have an exact single equal, and what it costs, follows from geometry
alone; `graphfold.affine` adds the weights.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from graphfold.errors import NotExactError

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

    def is_beyond(self, limit: int) -> bool:
        """Whether a size of the window, its step or its padding is more than a limit."""
        sizes = (self.extent, self.stride, abs(self.begin), abs(self.end))
        return any(size > limit for size in sizes)

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
        """The tap of `self` that is inside x's domain wherever `second` reads no padding.

        The bias of `self` is zero where `second` pads, so it must be carried by such a tap; where
        `then` is exact every tap is outside there. None where there is no such tap.
        """
        inside = (tap for tap in range(self.kernel) if self._stays_inside(tap, second, size))
        return next(inside, None)

    def _stays_inside(self, tap: int, second: Axis, size: int | None) -> bool:
        if size is None:
            # For some size the last window ends where the padding does.
            return 0 <= self._tap_position(tap, 0) <= self.extent - 1 - self.end - self.begin
        count = self.output_size(size)
        outputs = second.output_size(count)
        first = next((at for at in range(count) if second.reads(at, outputs)), 0)
        last = next((at for at in reversed(range(count)) if second.reads(at, outputs)), 0)
        return all(self._tap_position(tap, at) in range(size) for at in (first, last))


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

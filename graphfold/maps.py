"""Affine maps that rounding bounds are made for: dense layers, transposed convolutions, chains.

`graphfold.affine` has the third, convolutions, and what it takes to compose them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Protocol, Self

import numpy as np

from graphfold.affine import Array


class AffineMap(Protocol):
    """y = W x + b with weights and offsets known in float64."""

    def apply(self, x: Array) -> Array:
        """The map's values on an input, in float64."""
        ...

    def absolute(self) -> Self:
        """The map with the magnitudes of its weights and offsets."""
        ...

    @property
    def terms(self) -> int:
        """Products and additions per output, at most."""
        ...

    @property
    def gain(self) -> float:
        """Largest row sum of |W|."""
        ...

    @property
    def offset(self) -> float:
        """Largest |b|."""
        ...

    @property
    def nbytes(self) -> int:
        """Memory that its weights take."""
        ...


@dataclass(frozen=True)
class Dense:
    """y = x W + b on the last axis, in float64.

    Attributes:
        weight: [K, N].
        bias: [N].
        flattens: whether x is [rows, ...] with K elements per row.
    """

    weight: Array
    bias: Array
    flattens: bool = False

    def apply(self, x: Array) -> Array:
        """The map's values on an input [..., K], in float64: [..., N]."""
        rows = x.reshape(x.shape[0], -1) if self.flattens else x
        return np.asarray(rows @ self.weight + self.bias)

    def absolute(self) -> Self:
        """The map with the magnitudes of its weights and biases."""
        return replace(self, weight=np.abs(self.weight), bias=np.abs(self.bias))

    @property
    def terms(self) -> int:
        """Products and additions per output."""
        return len(self.weight) + 1

    @property
    def gain(self) -> float:
        """Largest sum of |W| over the inputs of one output."""
        return float(np.abs(self.weight).sum(axis=0).max(initial=0.0))

    @property
    def offset(self) -> float:
        """Largest |b|."""
        return float(np.abs(self.bias).max(initial=0.0))

    @property
    def nbytes(self) -> int:
        """Memory that the weights take."""
        return self.weight.nbytes


@dataclass(frozen=True)
class TransposedConv:
    """A transposed convolution with a bias, in float64; fields as in ONNX ConvTranspose.

    Attributes:
        weight: [I, O / groups, *kernel].
        bias: [O].
        strides, dilations, output_padding: one per spatial axis.
        pads: begins, then ends; None where `output_shape` or `auto_pad` decides.
        output_shape: spatial output sizes where the operator states them.
    """

    weight: Array
    bias: Array
    groups: int
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    output_padding: tuple[int, ...]
    pads: tuple[int, ...]
    auto_pad: str = "NOTSET"
    output_shape: tuple[int, ...] | None = None

    def apply(self, x: Array) -> Array:
        """The map's values on an input [N, I, *sizes], in float64: [N, O, *output sizes]."""
        batch, inputs, *sizes = x.shape
        width, *kernel = self.weight.shape[1:]
        extents = [(k - 1) * d + 1 for k, d in zip(kernel, self.dilations, strict=True)]
        whole = [(n - 1) * s + e for n, s, e in zip(sizes, self.strides, extents, strict=True)]
        begins, outputs = self._window(sizes, whole)
        room = [max(w, b + n) for w, b, n in zip(whole, begins, outputs, strict=True)]
        written = np.zeros((batch, self.groups, width, *room))
        seen = x.reshape(batch, self.groups, inputs // self.groups, -1)
        blocks = self.weight.reshape(self.groups, inputs // self.groups, width, *kernel)
        for tap in np.ndindex(*kernel):
            place = tuple(
                slice(t * d, t * d + (n - 1) * s + 1, s)
                for t, d, n, s in zip(tap, self.dilations, sizes, self.strides, strict=True)
            )
            taps = blocks[(slice(None), slice(None), slice(None), *tap)].swapaxes(1, 2)
            product = (taps @ seen).reshape(batch, self.groups, width, *sizes)
            written[(slice(None), slice(None), slice(None), *place)] += product
        window = tuple(slice(b, b + n) for b, n in zip(begins, outputs, strict=True))
        kept = written.reshape(batch, -1, *room)[(slice(None), slice(None), *window)]
        return np.asarray(kept + self.bias.reshape(-1, *[1] * len(sizes)))

    def _window(self, sizes: list[int], whole: list[int]) -> tuple[list[int], list[int]]:
        """What is cut off at the start of each axis, and the sizes of what is left."""
        rank = len(sizes)
        padded = [size + more for size, more in zip(whole, self.output_padding, strict=True)]
        stated = self.output_shape
        if stated is None and self.auto_pad.startswith("SAME"):
            stated = tuple(n * s for n, s in zip(sizes, self.strides, strict=True))
        if stated is None:
            begins, ends = self.pads[:rank], self.pads[rank:]
            kept = [n - b - e for n, b, e in zip(padded, begins, ends, strict=True)]
            return list(begins), kept
        cut = [max(0, size - wanted) for size, wanted in zip(padded, stated, strict=True)]
        upper = self.auto_pad == "SAME_UPPER"
        return [each // 2 if upper else each - each // 2 for each in cut], list(stated)

    def absolute(self) -> Self:
        """The map with the magnitudes of its weights and biases."""
        return replace(self, weight=np.abs(self.weight), bias=np.abs(self.bias))

    @property
    def terms(self) -> int:
        """Products and additions per output where all taps meet: where strides are 1."""
        return self.weight[:, 0].size // self.groups + 1

    @property
    def gain(self) -> float:
        """Largest sum of |W| over what may write one output."""
        inputs, width, *_ = self.weight.shape
        blocks = np.abs(self.weight).reshape(self.groups, inputs // self.groups, width, -1)
        return float(blocks.sum(axis=(1, 3)).max(initial=0.0))

    @property
    def offset(self) -> float:
        """Largest |b|."""
        return float(np.abs(self.bias).max(initial=0.0))

    @property
    def nbytes(self) -> int:
        """Memory that the weights take."""
        return self.weight.nbytes


@dataclass(frozen=True)
class Steps:
    """Affine maps one after another, each rounded on its own."""

    parts: tuple[AffineMap, ...]

    def apply(self, x: Array) -> Array:
        """The values of the last map, in float64."""
        for part in self.parts:
            x = part.apply(x)
        return x

    def absolute(self) -> Self:
        """The maps with the magnitudes of their weights and offsets."""
        return replace(self, parts=tuple(part.absolute() for part in self.parts))

    @property
    def terms(self) -> int:
        """Products and additions on the way to one output."""
        # Between two maps a cast of weights and a rounding of the result are due, as at the end.
        return sum(part.terms + 2 for part in self.parts) - 2

    @property
    def gain(self) -> float:
        """Bound of the largest row sum of |W|: what the maps gain together."""
        return math.prod(part.gain for part in self.parts)

    @property
    def offset(self) -> float:
        """Bound of the largest |b|: what comes before is gained by what follows."""
        total = 0.0
        for part in self.parts:
            total = total * part.gain + part.offset
        return total

    @property
    def nbytes(self) -> int:
        """Memory that the weights take."""
        return sum(part.nbytes for part in self.parts)

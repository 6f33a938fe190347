"""Networks of the right sizes with arbitrary weights: what can be timed before there are data.

How long a convolution takes does not depend on its weights, nor on which of a layer's channels
stay. So latencies of fitted networks need no fit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from graphfold.calibration.channels import bias_vector, weight_matrix
from graphfold.calibration.places import Key
from graphfold.calibration.regression import Matrix
from graphfold.calibration.workbench import Replacement, Workbench

if TYPE_CHECKING:
    from graphfold.calibration.places import Segment


class Sketch(Workbench):
    """A workbench that makes arbitrary weights up instead of fitting them."""

    def has_moments(self, key: Key) -> bool:
        """Nothing has to be gathered."""
        del key
        return True

    def _fit(self, key: Key, replacement: Replacement) -> tuple[NDArray[np.float32], ...]:
        self.errors[key, replacement] = 0.0
        if replacement.family != "narrow":
            rng = np.random.default_rng(0)
            shapes = _shapes(self.segments[key], replacement)
            return tuple(_random(rng, shape) for shape in shapes)
        consumer = self.inner[key].consumer
        weight = weight_matrix(self.graph, consumer)
        bias = bias_vector(self.graph, consumer, len(weight))
        kept, *arrays = self.narrowed(key, replacement.width or 0, weight, bias)
        return kept.astype(np.float32), *(each.astype(np.float32) for each in arrays)

    def narrow_error(self, key: Key, width: int) -> float:
        """Not known."""
        del key, width
        return 0.0

    def narrowed(
        self, key: Key, width: int, weight: Matrix, bias: Matrix
    ) -> tuple[NDArray[np.intp], Matrix, Matrix]:
        """The first channels, with the weights that they have."""
        columns = weight.shape[1] // self.inner[key].channels
        return np.arange(width), weight[:, : width * columns], bias


def _shapes(place: Segment, replacement: Replacement) -> Iterator[tuple[int, ...]]:
    """Of the arrays that `Workbench.convolution` would return."""
    kernel = replacement.kernel or ()
    before, after = place.channels
    if replacement.family == "low_rank":
        rank = replacement.rank or 1
        yield rank, before, *kernel
        yield after, rank, *((1,) * len(kernel))
    else:
        yield after, 1 if replacement.family == "depthwise" else before, *kernel
    yield (after,)


def _random(rng: np.random.Generator, shape: tuple[int, ...]) -> NDArray[np.float32]:
    scale = 1 / math.sqrt(max(1, math.prod(shape[1:])))
    return scale * rng.standard_normal(shape, dtype=np.float32)

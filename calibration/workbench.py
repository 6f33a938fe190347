"""A network and everything that may stand in its place, fitted once: what searches work on.

Places are where something can be replaced: inner channels (`narrow`), and segments, which a single
convolution or nothing at all may replace. Moments of all of them are gathered while calibration
inputs run through the network once (or a few times, where memory does not hold all at once).
Then any combination of replacements is built in a moment.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray

from graphfold.calibration.capture import (
    Feeds,
    Window,
    captured,
    sizes_of,
    window_of,
)
from graphfold.calibration.channels import (
    Inner,
    bias_vector,
    cut_channels,
    find_inner,
    inner_of,
    weight_matrix,
)
from graphfold.calibration.gathering import Job, in_parts
from graphfold.calibration.narrow import Narrowing, narrow, weights_for
from graphfold.calibration.places import Key, Segment, find_places, fixed_sizes
from graphfold.calibration.regression import (
    Fit,
    Matrix,
    Moments,
    fit_groups,
    fit_linear,
    fit_low_rank,
)
from graphfold.errors import DataError
from graphfold.graph import Graph
from graphfold.model import to_proto
from graphfold.plan import Family
from graphfold.progress import Progress

if TYPE_CHECKING:
    from graphfold.model import Model

Arrays = tuple[NDArray[np.float32], ...]

RIDGE = 1e-3
_MEMORY = 2 << 30
LARGEST_FEATURES = 5000


@dataclass(frozen=True)
class Replacement:
    """What stands in a place instead of the network's own operators.

    Attributes:
        family: narrow keeps the operators and fewer channels; identity is nothing at all.
        width: channels left, for narrow.
        kernel: of the convolution, one entry per spatial axis.
        rank: for low_rank.
    """

    family: Family
    width: int | None = None
    kernel: tuple[int, ...] | None = None
    rank: int | None = None

    def __str__(self) -> str:
        if self.family == "narrow":
            return f"narrow to {self.width}"
        if self.family == "identity":
            return "dropped"
        size = "x".join(map(str, self.kernel or ()))
        rank = "" if self.rank is None else f" of rank {self.rank}"
        return f"{self.family} {size}{rank}"


State = Mapping[Key, Replacement]


class Workbench:
    """A network, its places, and what was fitted for them.

    Args:
        model: folded losslessly; not changed.
        named: ends that plans may name; others are left out. All by default.

    Attributes:
        graph: of the model.
        inner: inner channels by their ends.
        segments: segments by their ends.
    """

    def __init__(self, model: Model, named: Callable[[Key], bool] | None = None) -> None:
        self.model = model
        self.graph = Graph(model)
        self._named = named or (lambda _: True)
        self.inner = {each.key: each for each in find_inner(self.graph) if self._named(each.key)}
        self.segments = {
            each.key: each for each in find_places(self.graph) if self._named(each.key)
        }
        # A segment and the channels inside it may have the same ends.
        self._moments: dict[Key, Moments] = {}
        self._segment_moments: dict[Key, Moments] = {}
        self._largest: dict[Key, tuple[int, ...]] = {}
        self._narrowings: dict[Key, Narrowing] = {}
        self._fits: dict[tuple[Key, Replacement], Arrays] = {}
        self._last: tuple[Key, tuple[int, ...], Moments, Callable[[], Fit]] | None = None
        self.errors: dict[tuple[Key, Replacement], float] = {}

    # Moments ------------------------------------------------------------------------------

    def collect(
        self,
        feeds: Feeds,
        *,
        inner: Iterable[Key] | None = None,
        segments: Mapping[Key, tuple[int, ...]] | None = None,
        threads: int = 0,
        memory: int = _MEMORY,
        progress: Progress | None = None,
    ) -> None:
        """Gather moments of places on calibration inputs.

        Args:
            feeds: the inputs; walked through once for every part that memory holds.
            inner: inner channels, all by default.
            segments: segments, with the largest kernel that is to be fitted; none by default.
            threads: of onnxruntime.
            memory: bytes that moments and captured tensors may take together.
            progress: called with (stage, done, total).

        Raises:
            DataError: no inputs.
            RunError: onnxruntime cannot run the model.
        """
        if not len(feeds):
            raise DataError("there are no inputs to fit on", hint="give more data")
        jobs = [
            self._inner_job(self.inner[key]) for key in (self.inner if inner is None else inner)
        ]
        self._largest.update(segments or {})
        jobs += [self._segment_job(self.segments[key], k) for key, k in (segments or {}).items()]
        jobs = [job for job in jobs if job.features <= LARGEST_FEATURES]
        parts = list(in_parts(jobs, memory // 2, sizes_of(self.model, feeds[0])))
        for number, part in enumerate(parts):
            stage = "gathering moments" + (f" {number + 1}/{len(parts)}" if len(parts) > 1 else "")
            self._collect(part, feeds, threads, stage, progress)

    def collect_segment(
        self,
        key: Key,
        kernel: tuple[int, ...],
        batches: Iterable[tuple[NDArray[Any], NDArray[Any]]],
    ) -> None:
        """Gather the moments of one segment on given inputs and outputs, instead of its own."""
        job = self._segment_job(self.segments[key], kernel)
        known = list(batches)
        samples = sum(len(x) for x, _ in known)
        moments, first = Moments(job.features, job.targets), 0
        for x, y in known:
            job.add_to(moments, {job.read: x, job.target: y}, samples, first)
            first += len(x)
        self._segment_moments[key], self._largest[key], self._last = moments, kernel, None
        self._fits = {at: arrays for at, arrays in self._fits.items() if at[0] != key}

    def bytes_of(self, key: Key, kernel: tuple[int, ...] | None) -> int:
        """Of a place's moments: a segment's with a kernel, inner channels' without."""
        if kernel is None:
            return self._inner_job(self.inner[key]).bytes
        return self._segment_job(self.segments[key], kernel).bytes

    def _inner_job(self, place: Inner) -> Job:
        shape = self.graph.shape(place.read) or ()
        weight = weight_matrix(self.graph, place.consumer)
        window = window_of(self.graph, place.consumer, fixed_sizes(shape[2:]))
        return Job(place.key, place.read.name or "", window, weight.shape[1])

    def _segment_job(self, place: Segment, kernel: tuple[int, ...]) -> Job:
        window = place.window(kernel)
        features = place.channels[0] * max(1, window.taps)
        target = place.output.name or ""
        return Job(place.key, place.input.name or "", window, features, target, place.channels[1])

    def _collect(
        self,
        jobs: Sequence[Job],
        feeds: Feeds,
        threads: int,
        stage: str,
        progress: Progress | None,
    ) -> None:
        moments = [Moments(job.features, job.targets) for job in jobs]
        names = list(dict.fromkeys(name for job in jobs for name in (job.read, job.target) if name))
        samples = sum(len(next(iter(feed.values()))) for feed in feeds)
        first = 0
        for number, tensors in enumerate(captured(self.model, names, feeds, threads=threads)):
            if progress is not None:
                progress(stage, number, len(feeds))
            for job, own in zip(jobs, moments, strict=True):
                job.add_to(own, tensors, samples, first)
            first += len(next(iter(feeds[number].values())))
        self._last = None
        for job, own in zip(jobs, moments, strict=True):
            (self._segment_moments if job.target else self._moments)[job.key] = own

    # Fits ---------------------------------------------------------------------------------

    def narrowing(self, key: Key) -> Narrowing:
        """The order in which inner channels go."""
        if key not in self._narrowings:
            place = self.inner[key]
            weight = weight_matrix(self.graph, place.consumer)
            columns = weight.shape[1] // place.channels
            self._narrowings[key] = narrow(self._moments[key].gram, weight, columns)
        return self._narrowings[key]

    def prepare(self, progress: Progress | None = None) -> None:
        """Order the channels of every place whose moments are there."""
        keys = [key for key in self.inner if key in self._moments]
        for number, key in enumerate(keys):
            if progress is not None:
                progress("ordering channels", number, len(keys))
            self.narrowing(key)

    def forget(self) -> None:
        """Drop everything that was fitted."""
        self._last = None
        self._moments.clear()
        self._segment_moments.clear()
        self._narrowings.clear()
        self._fits.clear()
        self.errors.clear()

    def has_moments(self, key: Key) -> bool:
        """Whether inner channels can go, with a fit of what reads them."""
        return key in self._moments

    def can_fit(self, key: Key, replacement: Replacement) -> bool:
        """Whether what is needed for a replacement was gathered."""
        if replacement.family == "identity":
            return True
        known = self._moments if replacement.family == "narrow" else self._segment_moments
        return key in known

    def narrow_error(self, key: Key, width: int) -> float:
        """Share of the result's variance that is lost at a width."""
        return self.narrowing(key).error(width)

    def narrowed(
        self, key: Key, width: int, weight: Matrix, bias: Matrix
    ) -> tuple[NDArray[np.intp], Matrix, Matrix]:
        """Channels that stay and new weights for a consumer with these weights.

        The layer may be the network's own before its normalisation was folded: rows that are
        scaled have solutions that are scaled alike.
        """
        kept = self.narrowing(key).kept(width)
        columns = weight.shape[1] // self.inner[key].channels
        gram = self._moments[key].gram
        return kept, *weights_for(gram, weight, bias, kept, columns, ridge=RIDGE)

    def arrays(self, key: Key, replacement: Replacement) -> Arrays:
        """What stands in a place, fitted where it is not yet: all that `build` needs of it."""
        return () if replacement.family == "identity" else self._fit(key, replacement)

    def take(self, key: Key, replacement: Replacement, arrays: Arrays) -> None:
        """Use arrays that another workbench of the same network fitted."""
        self._fits[key, replacement] = arrays

    def _fit(self, key: Key, replacement: Replacement) -> Arrays:
        """Arrays of a replacement in the network's precision, kept once computed."""
        known = self._fits.get((key, replacement))
        if known is not None:
            return known
        if replacement.family == "narrow":
            place, width = self.inner[key], replacement.width or 0
            weight = weight_matrix(self.graph, place.consumer)
            bias = bias_vector(self.graph, place.consumer, len(weight))
            kept, *arrays = self.narrowed(key, width, weight, bias)
            found = (kept.astype(np.float32), *(each.astype(np.float32) for each in arrays))
            self.errors[key, replacement] = self.narrow_error(key, width)
        else:
            arrays, error = self.convolution(key, replacement)
            found = tuple(each.astype(np.float32) for each in arrays)
            self.errors[key, replacement] = error
        self._fits[key, replacement] = found
        return found

    def convolution(self, key: Key, replacement: Replacement) -> tuple[list[Matrix], float]:
        """The arrays of a fitted convolution, and its relative error.

        Returns:
            weight [out, in / groups, *kernel] and bias [out]; for low_rank the first weight, the
            second [out, rank, 1...] and the bias.
        """
        place = self.segments[key]
        kernel = replacement.kernel or ()
        moments, linear = self._linear(key, kernel)
        shape = (place.channels[1], -1, *kernel)
        if replacement.family == "low_rank":
            second, fit = fit_low_rank(moments, replacement.rank or 1, linear())
            ones = (1,) * len(kernel)
            first = fit.weight.reshape(len(fit.weight), -1, *kernel)
            return [first, second.reshape(*second.shape, *ones), fit.bias], fit.error
        if replacement.family == "depthwise":
            fit = fit_groups(moments, place.channels[0], RIDGE)
        else:
            fit = linear()
        return [fit.weight.reshape(shape), fit.bias], fit.error

    def _linear(self, key: Key, kernel: tuple[int, ...]) -> tuple[Moments, Callable[[], Fit]]:
        """A kernel's moments, and its fit of full rank, which those of low rank begin with."""
        if self._last is None or self._last[:2] != (key, kernel):
            taps = _sub_taps(self.segments[key], self._largest[key], kernel)
            moments = self._segment_moments[key].part(taps)
            self._last = (key, kernel, moments, cache(lambda: fit_linear(moments, RIDGE)))
        return self._last[2:]

    # Networks -----------------------------------------------------------------------------

    def build(self, state: State) -> onnx.ModelProto:
        """The network with replacements, without shapes of inner tensors."""
        model = self.model.clone()
        graph = Graph(model, dict(self.graph.shapes))
        self.apply(graph, state, own=True)
        proto = to_proto(model)
        del proto.graph.value_info[:]
        return proto

    def apply(self, graph: Graph, state: State, *, own: bool = False) -> None:
        """Put replacements in their places.

        Args:
            graph: of the network, or of the model it was folded from: edited in place.
            state: what to put where.
            own: the graph is a copy of the network's own, so what was fitted once is used again.
        """
        values = graph.values()
        for key, replacement in state.items():
            if replacement.family != "narrow":
                arrays = self.arrays(key, replacement)
                # What was replaced before may stand at this one's ends.
                source, output = (graph.current(values[name]) for name in key)
                replace_segment(graph, source, output, self.segments[key], replacement, arrays)
        narrowed = {key for key, each in state.items() if each.family == "narrow"}
        if not narrowed:
            return
        # In execution order: a layer's rows may be cut only after its columns were fitted.
        for found in find_inner(graph):
            if found.key in narrowed and found.channels == self.inner[found.key].channels:
                # Anew: the place before may have given this one's producer a bias.
                place = inner_of(graph, found.consumer, found.output)
                kept, weight, bias = self._narrowed_in(graph, place, state[place.key], own)
                cut_channels(graph, place, kept, weight, bias)

    def _narrowed_in(
        self, graph: Graph, place: Inner, replacement: Replacement, own: bool
    ) -> tuple[NDArray[np.intp], Matrix, Matrix]:
        if own:
            kept, weight, bias = self._fit(place.key, replacement)
            return kept.astype(np.intp), weight.astype(np.float64), bias.astype(np.float64)
        matrix = weight_matrix(graph, place.consumer)
        vector = bias_vector(graph, place.consumer, len(matrix))
        width = replacement.width or 0
        self.errors[place.key, replacement] = self.narrow_error(place.key, width)
        return self.narrowed(place.key, width, matrix, vector)


def names_of(model: Model) -> Callable[[Key], bool]:
    """Whether a model has both tensors of a key: plans name its own, not those of folding."""
    known = Graph(model).values()
    return lambda key: key[0] in known and key[1] in known


def replace_segment(
    graph: Graph,
    source: ir.Value,
    output: ir.Value,
    place: Segment,
    replacement: Replacement,
    arrays: Sequence[NDArray[Any]],
) -> None:
    """Put a convolution, two of them, or nothing between two tensors."""
    old = output.producer()
    assert old is not None
    if replacement.family == "identity":
        # The name stays: the network is looked into under its own names.
        identity = ir.node("Identity", [source])
        graph.ir.insert_before(old, identity)
        graph.take_over(output, identity.outputs[0])
        graph.remove_dead([old])
        return
    dtype = graph.dtype(source)
    assert dtype is not None
    typed = [each.astype(dtype.numpy()) for each in arrays]
    window = place.window(replacement.kernel or ())
    name = output.name or "segment"
    value = source
    if replacement.family == "low_rank":
        first, second, bias = typed
        value = _insert_conv(graph, old, value, name, first, None, window, 1)
        value = _insert_conv(graph, old, value, name, second, bias, None, 1)
    else:
        weight, bias = typed
        groups = place.channels[0] if replacement.family == "depthwise" else 1
        value = _insert_conv(graph, old, value, name, weight, bias, window, groups)
    graph.take_over(output, value)
    graph.remove_dead([old])
    graph.ir.sort()


def _insert_conv(
    graph: Graph,
    before: ir.Node,
    source: ir.Value,
    name: str,
    weight: NDArray[Any],
    bias: NDArray[Any] | None,
    window: Window | None,
    groups: int,
) -> ir.Value:
    inputs = [source, graph.add_initializer(name, weight)]
    if bias is not None:
        inputs.append(graph.add_initializer(name, bias))
    rank = weight.ndim - 2
    attributes: dict[str, Any] = {"kernel_shape": list(weight.shape[2:]), "group": groups}
    if window is not None:
        attributes |= {
            "strides": list(window.strides),
            "pads": [*window.begins, *window.ends],
            "dilations": [1] * rank,
        }
    node = ir.node("Conv", inputs, attributes)
    graph.ir.insert_before(before, node)
    node.outputs[0].name = graph.fresh_name(name)
    return node.outputs[0]


def _sub_taps(place: Segment, largest: Sequence[int], kernel: Sequence[int]) -> NDArray[np.intp]:
    """Which features of the largest kernel a smaller one has: those that it reads as well."""
    channels = place.channels[0]
    index = np.arange(channels * math.prod(largest)).reshape(channels, *largest)
    outer, inner = place.window(largest).begins, place.window(kernel).begins
    for axis, (begin, own, small) in enumerate(zip(outer, inner, kernel, strict=True)):
        start = begin - own
        index = np.take(index, np.arange(start, start + small), axis=axis + 1)
    return index.ravel()

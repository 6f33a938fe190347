"""Ranges of activations over calibration images: what their 8-bit scales are made of.

onnxruntime's own calibrators keep every activation of every image until the last one; here its
collectors are handed one feed at a time, so memory holds one feed's activations and a histogram
per tensor. One pass over the images serves every calibration that is asked for later.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from graphfold.errors import DataError, UsageError
from graphfold.runtime import Runnable, Session

if TYPE_CHECKING:
    import onnx

Method = Literal["minmax", "percentile", "entropy"]
METHODS: tuple[Method, ...] = get_args(Method)
DEFAULT_PERCENTILE = 99.99
Feed = Mapping[str, NDArray[Any]]

# As in onnxruntime's calibrators: the search for the least entropy is quadratic in the bins.
_BINS = {"percentile": 2048, "entropy": 128}


@dataclass(frozen=True)
class Calibration:
    """How ranges follow from what was seen.

    Attributes:
        method: `minmax`; `percentile`, which cuts off what lies outside; or `entropy`, the range
            whose 8-bit histogram is nearest to the one seen.
        percentile: share of values inside, in percent; of `percentile` alone.
    """

    method: Method = "minmax"
    percentile: float = DEFAULT_PERCENTILE

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise UsageError(
                f"calibration {self.method!r} is not known", hint="one of " + ", ".join(METHODS)
            )
        if not 50 < self.percentile <= 100:
            raise UsageError(f"percentile {self.percentile:g} is not between 50 and 100")

    def __str__(self) -> str:
        return f"percentile {self.percentile:g}" if self.method == "percentile" else self.method


class Statistics:
    """What was seen of some tensors of a model.

    Args:
        proto: the model.
        names: its tensors to watch, inputs among them.
        methods: the calibrations that will be asked for.

    Raises:
        RunError: onnxruntime cannot load the model.
    """

    def __init__(
        self, proto: onnx.ModelProto, names: Iterable[str], methods: Iterable[Method]
    ) -> None:
        self._names = tuple(names)
        with Runnable(proto.SerializeToString()) as runnable:
            # Unoptimized: otherwise a tensor may be another than the one that is quantized.
            self._session = Session(runnable, optimize=False, extra_outputs=self._names)
        self._limits: dict[str, tuple[Any, Any]] = {}
        self._collectors = {method: _collector(method) for method in methods if method != "minmax"}
        self._found: dict[Calibration, dict[str, tuple[Any, Any]]] = {}
        self.feeds = 0

    def add(self, feed: Feed) -> None:
        """Look at one feed.

        Raises:
            DataError: a value that is not a number or infinite.
            RunError: onnxruntime cannot run it.
        """
        found = {**feed, **self._session.run(feed)}
        seen = {name: found[name] for name in self._names if name in found}
        for name, array in seen.items():
            self._limits[name] = _wider(self._limits.get(name), _limits(name, array))
        with _silence():
            for collector in self._collectors.values():
                collector.collect({name: [array] for name, array in seen.items()})
        self.feeds += 1
        self._found.clear()

    def ranges(self, calibration: Calibration) -> dict[str, tuple[Any, Any]]:
        """The lowest and the highest value of each tensor that get a code of their own.

        Raises:
            DataError: no feed was seen.
        """
        if not self.feeds:
            raise DataError("no images to calibrate on")
        if calibration.method == "minmax":
            return dict(self._limits)
        if calibration not in self._found:
            collector = self._collectors[calibration.method]
            collector.percentile = calibration.percentile
            with _silence(), np.errstate(all="ignore"):
                found = collector.compute_collection_result()
            self._found[calibration] = {name: (each[0], each[1]) for name, each in found.items()}
        return dict(self._found[calibration])


def _collector(method: Method) -> Any:
    from onnxruntime.quantization.calibrate import HistogramCollector

    return HistogramCollector(
        method=method,
        symmetric=False,
        num_bins=_BINS[method],
        num_quantized_bins=128,
        percentile=DEFAULT_PERCENTILE,
        scenario="same",
    )


def _limits(name: str, array: NDArray[Any]) -> tuple[Any, Any]:
    low, high = array.min(initial=np.inf), array.max(initial=-np.inf)
    if not (np.isfinite(low) and np.isfinite(high)):
        raise DataError(
            f"tensor {name!r} is not finite on a calibration image",
            hint="values that the model was not made for? check the preprocessing",
        )
    return np.asarray(low), np.asarray(high)


def _wider(known: tuple[Any, Any] | None, new: tuple[Any, Any]) -> tuple[Any, Any]:
    if known is None:
        return new
    return np.minimum(known[0], new[0]), np.maximum(known[1], new[1])


def _silence() -> contextlib.redirect_stdout[io.StringIO]:
    """The collectors print what they do; stdout is the command's own."""
    return contextlib.redirect_stdout(io.StringIO())


def collect(
    proto: onnx.ModelProto,
    names: Iterable[str],
    batches: Iterable[Feed],
    methods: Sequence[Method],
) -> Statistics:
    """Statistics over all feeds, see `Statistics`.

    Raises:
        DataError: no feeds, or values that are not finite. RunError: the model does not run.
    """
    found = Statistics(proto, names, methods)
    for feed in batches:
        found.add(feed)
    if not found.feeds:
        raise DataError("no images to calibrate on")
    return found

"""The quantization that a plan states, with the images that are at hand.

Every fourth feed is set apart to judge on; of the others, enough to fill the calibration are
taken, spread evenly: more images make ranges no better, and histograms slow.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from graphfold.calibration.judge import Judge, outputs_of
from graphfold.calibration.quantize import Quantizer, Scheme
from graphfold.calibration.ranges import DEFAULT_PERCENTILE, Calibration, Feed
from graphfold.errors import DataError
from graphfold.quantization import Quantized, QuantizeFunction
from graphfold.runtime import weight_bytes

if TYPE_CHECKING:
    from graphfold.model import Model
    from graphfold.plan import Quantize

_JUDGED_EVERY = 4
_MOST_CALIBRATED = 128
_MOST_JUDGED = 512


def quantizing(feeds: Iterable[Feed]) -> QuantizeFunction:
    """What `optimize` calls to quantize, for these feeds; they are read when it is called."""

    def quantize(model: Model, settings: Quantize) -> Quantized:
        return quantize_as_planned(model, settings, list(feeds))

    return quantize


def scheme_of(settings: Quantize) -> Scheme:
    """A plan's settings as the quantizer takes them."""
    percentile = DEFAULT_PERCENTILE if settings.percentile is None else settings.percentile
    calibration = Calibration(settings.calibration, percentile)
    return Scheme(calibration, settings.per_channel, tuple(settings.keep_float))


def quantize_as_planned(model: Model, settings: Quantize, feeds: Sequence[Feed]) -> Quantized:
    """The network in INT8 and what that does to its outputs.

    Raises:
        PlanError: a tensor to keep in float that no operator makes.
        ModelError: the network cannot be quantized. DataError: no feeds, or none that fit.
    """
    if not feeds:
        raise DataError("no images to calibrate on")
    calibrate, judge = split(feeds)
    quantizer = Quantizer(model, calibrate, [settings.calibration])
    found = quantizer.quantized(scheme_of(settings))
    return Quantized(
        model=found,
        settings=settings,
        verdict=Judge(outputs_of(model, judge)).verdict(outputs_of(found, judge)),
        calibrated=_images(calibrate),
        judged=_images(judge),
        apart=len(feeds) >= _JUDGED_EVERY,
        weight_bytes=(weight_bytes(model), weight_bytes(found)),
    )


def split(feeds: Sequence[Feed]) -> tuple[list[Feed], list[Feed]]:
    """Feeds to calibrate on and feeds to judge on; the same where there are too few."""
    judge = list(feeds[_JUDGED_EVERY - 1 :: _JUDGED_EVERY])
    rest = [feed for number, feed in enumerate(feeds) if (number + 1) % _JUDGED_EVERY]
    if not judge:
        judge = rest
    return _spread(rest, _MOST_CALIBRATED), _spread(judge, _MOST_JUDGED)


def _spread(feeds: Sequence[Feed], most: int) -> list[Feed]:
    """So many images at most, evenly spread over the feeds."""
    count = max(1, len(feeds) * most // max(_images(feeds), 1))
    if count >= len(feeds):
        return list(feeds)
    return [feeds[index] for index in np.linspace(0, len(feeds) - 1, count).round().astype(int)]


def _images(feeds: Sequence[Feed]) -> int:
    """Samples along the first axis of each feed's first array."""
    first = (next(iter(feed.values()), None) for feed in feeds)
    return sum(1 if array is None or array.ndim == 0 else len(array) for array in first)

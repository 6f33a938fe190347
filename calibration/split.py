"""Calibration inputs in two parts: most of them to fit on, the rest to judge on.

Damage that is measured on what was fitted on looks several times smaller than it is, so no input is
ever in both. Every fifth batch is held back, not the last ones: data often come in some order.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from graphfold.calibration.capture import sizes_of
from graphfold.calibration.dataset import BATCH
from graphfold.errors import DataError

if TYPE_CHECKING:
    from graphfold.calibration.dataset import Batch, Dataset
    from graphfold.model import Model

HELD_EVERY = 5
# Of what is held back, every second batch is for repair, where that follows a search: a search
# picks what the inputs that it looks at like best, so they would call every change of it a loss.
_REPAIR_EVERY = 2 * HELD_EVERY
# More samples make a verdict no finer than searches need.
MOST_JUDGED = 200
# All inputs are in memory: they are run more than once.
_MOST_BYTES = 2 << 30

Feed = dict[str, NDArray[Any]]
# What all tensors of the network may take for one batch, and the outputs that judge.
_MOST_AT_ONCE = 1 << 29
_FEWEST_JUDGED = 8
_Any = TypeVar("_Any")


@dataclass(frozen=True)
class Split:
    """Inputs in memory, batch by batch.

    Attributes:
        feeds: all of them, in order.
        fitted: those to fit on.
        held: those to judge on.
        labels: of the samples in `held`, in order; None where they are not all known.
        reserved: those that neither fits nor searches see; `repair` judges on them.
    """

    feeds: list[Feed]
    fitted: list[Feed]
    held: list[Feed]
    labels: NDArray[np.int64] | None
    reserved: list[Feed] = field(default_factory=list)

    @property
    def digest(self) -> str:
        """sha256 of all inputs and of the labels that count."""
        found = hashlib.sha256()
        for feed in self.feeds:
            for name, array in sorted(feed.items()):
                found.update(f"{name} {array.dtype} {array.shape}".encode())
                found.update(np.ascontiguousarray(array).tobytes())
        if self.labels is not None:
            found.update(self.labels.tobytes())
        return found.hexdigest()


@dataclass(frozen=True)
class Portions:
    """How much of the data goes through a network at once, and how much judges.

    Attributes:
        batch: samples; None is as many as usual.
        judged: samples at most.
    """

    batch: int | None = None
    judged: int = MOST_JUDGED


def portions_of(model: Model, data: Dataset) -> Portions:
    """As memory has it: of large pictures few are taken at once, and fewer judge.

    Raises:
        DataError: what is read does not fit the model.
    """
    first = next(data.batches(1))
    sizes = sizes_of(model, first.feed)
    outputs = [value.name for value in model.ir.graph.outputs]
    all_of_one = sum(sizes.values()) / first.samples
    judged_of_one = sum(sizes.get(name or "", 0) for name in outputs) / first.samples
    batch = None if all_of_one * BATCH <= _MOST_AT_ONCE else max(1, _MOST_AT_ONCE // all_of_one)
    judged = max(_FEWEST_JUDGED, int(_MOST_AT_ONCE / max(judged_of_one, 1)))
    return Portions(None if batch is None else int(batch), min(MOST_JUDGED, judged))


def read_split(
    data: Dataset, portions: Portions | None = None, *, for_repair: bool = False
) -> Split:
    """Read all inputs and hold every fifth batch back.

    Args:
        data: the inputs.
        portions: how much at once, and how much to judge on; as usual by default.
        for_repair: reserve what `repair` judges on, if there are batches enough.

    Raises:
        DataError: what is read does not fit the model, or there is not enough of it.
    """
    portions = portions or Portions()
    batches: list[Batch] = []
    size = 0
    for batch in data.batches(portions.batch):
        size += sum(array.nbytes for array in batch.feed.values())
        if size > _MOST_BYTES:
            raise DataError(
                f"more than {_MOST_BYTES >> 30} GiB of inputs",
                where=data.name,
                hint=f"--samples {sum(each.samples for each in batches)} takes the first of them",
            )
        batches.append(batch)
    held = batches[HELD_EVERY - 1 :: HELD_EVERY]
    if not held:
        samples = sum(batch.samples for batch in batches)
        raise DataError(
            f"{samples} inputs are too few to fit on some and judge on others",
            where=data.name,
            hint="a few hundred are better",
        )
    feeds = [dict(batch.feed) for batch in batches]
    fitted = [feed for number, feed in enumerate(feeds) if number % HELD_EVERY != HELD_EVERY - 1]
    reserved = []
    if for_repair and len(batches) >= _REPAIR_EVERY:
        reserved = feeds[_REPAIR_EVERY - 1 :: _REPAIR_EVERY]
        held = held[::2]
    judged = at_most(held, [batch.samples for batch in held], portions.judged)
    known = [batch.labels for batch in judged if batch.labels is not None]
    labels = np.concatenate(known) if len(known) == len(judged) else None
    return Split(feeds, fitted, [dict(batch.feed) for batch in judged], labels, reserved)


def held_samples(lengths: Sequence[int]) -> NDArray[np.bool_]:
    """Which samples repair holds back, of batches of these lengths: every tenth batch.

    Of fewer than ten batches every fifth is, of fewer than five every fifth sample.
    """
    batches = np.repeat(np.arange(len(lengths)), lengths)
    counted = batches if len(lengths) >= HELD_EVERY else np.arange(len(batches))
    every = _REPAIR_EVERY if len(lengths) >= _REPAIR_EVERY else HELD_EVERY
    return np.asarray(counted % every == every - 1)


def fitted_part(feeds: Sequence[Mapping[str, NDArray[Any]]]) -> list[Feed]:
    """Feeds without the samples that repair holds back."""
    lengths = [samples_of(feed) for feed in feeds]
    parts = np.split(~held_samples(lengths), np.cumsum(lengths)[:-1])
    found = []
    for feed, length, chosen in zip(feeds, lengths, parts, strict=True):
        if chosen.all():
            found.append(dict(feed))
        elif chosen.any():
            found.append({name: _rows(array, length, chosen) for name, array in feed.items()})
    return found


def _rows(array: NDArray[Any], length: int, chosen: NDArray[np.bool_]) -> NDArray[Any]:
    return array[chosen] if array.ndim and len(array) == length else array


def samples_of(feed: Mapping[str, NDArray[Any]]) -> int:
    """Number of samples in a feed."""
    return next((len(array) for array in feed.values() if array.ndim), 1)


def at_most(items: Sequence[_Any], sizes: Iterable[int], samples: int) -> list[_Any]:
    """As many items, from the first on, as it takes to have so many samples."""
    before = itertools.accumulate(sizes, initial=0)
    return [item for item, count in zip(items, before, strict=False) if count < samples]


def one_sample(feed: Mapping[str, NDArray[Any]], model: Model) -> Feed:
    """What latency is measured on: one sample, unless the model states its batch."""
    from graphfold.specs import model_inputs

    fixed = {
        spec.name
        for spec in model_inputs(model)
        if not spec.shape or isinstance(spec.shape[0], int)
    }
    return {name: array if name in fixed else array[:1] for name, array in feed.items()}

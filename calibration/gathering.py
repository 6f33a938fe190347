"""Moments of many places at once: what is read of which tensor, and how much of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from graphfold.calibration.capture import Window, choose_places, patches
from graphfold.calibration.places import Key
from graphfold.calibration.regression import Moments

# Positions of every image that enter the moments: more of one image tell little that is new.
PER_IMAGE = 48
# Rows per feature beyond which more positions do not help.
_ROWS_PER_FEATURE = 16


@dataclass(frozen=True)
class Job:
    """Moments to be gathered for one place.

    Attributes:
        key: of the place.
        read, window: the tensor that features are read of, and where around a position.
        features: of a row.
        target, targets: the tensor to be matched and its channels, where there is one.
    """

    key: Key
    read: str
    window: Window
    features: int
    target: str = ""
    targets: int = 0

    @property
    def bytes(self) -> int:
        """That the moments take."""
        return 8 * (self.features + 1) * (self.features + 1 + self.targets)

    def add_to(
        self,
        moments: Moments,
        tensors: Mapping[str, NDArray[Any]],
        samples: int,
        first: int,
    ) -> None:
        """Add the rows of a batch, whose first image is the `first` of all `samples`."""
        x = tensors[self.read]
        y = tensors.get(self.target) if self.target else None
        window = self.window
        sizes = [
            (size + begin + end - (taps - 1) * dilation - 1) // stride + 1
            for size, begin, end, taps, dilation, stride in zip(
                x.shape[2:] if window.kernel else (),
                window.begins,
                window.ends,
                window.kernel,
                window.dilations,
                window.strides,
                strict=True,
            )
        ]
        enough = -(-_ROWS_PER_FEATURE * self.features // samples)
        places = choose_places(len(x), sizes, max(8, min(PER_IMAGE, enough)), first)
        targets = None
        if y is not None:
            index = (places[:, 0], slice(None), *places[:, 1:].T)
            targets = y[index]
        moments.add(patches(x, window, places), targets)


def in_parts(jobs: Sequence[Job], limit: int, sizes: Mapping[str, int]) -> Iterator[list[Job]]:
    """Jobs whose moments, and whose tensors for one feed, both keep to the limit."""
    part: list[Job] = []
    size = captured_size = 0
    names: set[str] = set()
    for job in jobs:
        new = {job.read, job.target} - names
        more = sum(sizes.get(name, 0) for name in new)
        if part and (size + job.bytes > limit or captured_size + more > limit):
            yield part
            part, size, captured_size, names = [], 0, 0, set()
            new = {job.read, job.target}
            more = sum(sizes.get(name, 0) for name in new)
        part.append(job)
        size += job.bytes
        captured_size += more
        names |= new
    if part:
        yield part

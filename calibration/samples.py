"""Samples to train on: any of them at any time, and the batches of every epoch.

Which samples a step sees, and how they are changed at random, follows from the seed, the epoch and
the step alone, so that a training that was killed goes on as if it had not been, and several
processes cut the same batch into shares.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - the usual name

from graphfold.errors import DataError

if TYPE_CHECKING:
    from graphfold.calibration.dataset import Dataset

_READERS = 8  # threads that decode pictures
_LARGEST_SMALL = 64  # pixels: pictures up to this size are shifted, larger ones are cropped
_SHIFT = 1 / 8  # of a small picture's size: 4 pixels of 32
# Of a larger picture's area. Pictures come cut to the network's size, so that much is gone already.
_SMALLEST_CROP = 0.25
_LARGEST_RATIO = 4 / 3
_DRAWN = 5  # random numbers for each sample

Read = Callable[[Sequence[int]], dict[str, Tensor]]


@dataclass(frozen=True)
class Samples:
    """Inputs of a network, and their classes where they are known.

    Attributes:
        rows: numbers of the samples in their source.
        labels: one class for each of `rows`, or None.
        fixed: the batch size that the network insists on, if it does.
    """

    rows: tuple[int, ...]
    labels: Tensor | None
    fixed: int | None
    _read: Read = field(repr=False)

    @classmethod
    def of(
        cls,
        arrays: Mapping[str, NDArray[Any] | Tensor],
        labels: NDArray[Any] | Tensor | None = None,
        *,
        fixed: int | None = None,
        device: str | torch.device = "cpu",
    ) -> Samples:
        """Samples from arrays by input name; they lie on a device from the beginning.

        Raises:
            DataError: no samples, or arrays and labels of unequal lengths.
        """
        tensors = {name: torch.as_tensor(array).to(device) for name, array in arrays.items()}
        classes = None if labels is None else torch.as_tensor(labels).to("cpu", torch.int64)
        lengths = {len(tensor) for tensor in tensors.values()}
        if classes is not None:
            lengths.add(len(classes))
        if len(lengths) != 1 or lengths == {0}:
            raise DataError(f"arrays and labels of lengths {sorted(lengths)} to train on")

        def read(rows: Sequence[int]) -> dict[str, Tensor]:
            places = torch.tensor(rows, device=device)
            return {name: tensor[places] for name, tensor in tensors.items()}

        return cls(tuple(range(lengths.pop())), classes, fixed, read)

    @classmethod
    def of_feeds(
        cls,
        feeds: Iterable[Mapping[str, NDArray[Any]]],
        labels: NDArray[Any] | None = None,
        *,
        fixed: int | None = None,
    ) -> Samples:
        """Samples from batches by input name.

        Raises:
            DataError: no samples, or arrays of unequal lengths.
        """
        batches = list(feeds)
        if not batches:
            raise DataError("no samples to train on")
        arrays = {name: np.concatenate([each[name] for each in batches]) for name in batches[0]}
        return cls.of(arrays, labels, fixed=fixed)

    @classmethod
    def of_dataset(cls, data: Dataset) -> Samples:
        """Samples of a data set: pictures are read when they are wanted, arrays at once.

        Raises:
            DataError: what is read does not fit the model.
        """
        if data.item is None or data.samples is None:
            batches = list(data.batches())
            classes = [batch.labels for batch in batches if batch.labels is not None]
            labels = np.concatenate(classes) if len(classes) == len(batches) else None
            feeds = [batch.feed for batch in batches]
            return cls.of_feeds(feeds, labels, fixed=data.fixed_batch)
        pool = ThreadPoolExecutor(_READERS)

        def read(rows: Sequence[int]) -> dict[str, Tensor]:
            items = list(pool.map(data.at, rows))
            return {
                name: torch.from_numpy(np.concatenate([item[name] for item in items]))
                for name in items[0]
            }

        known = None if data.labels is None else torch.from_numpy(data.labels)
        return cls(tuple(range(data.samples)), known, data.fixed_batch, read)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def classes(self) -> int:
        """One more than the largest label; 0 without labels."""
        return 0 if self.labels is None else int(self.labels.max()) + 1

    def subset(self, positions: Sequence[int]) -> Samples:
        """Some of the samples, by their positions among these."""
        labels = None if self.labels is None else self.labels[list(positions)]
        return replace(self, rows=tuple(self.rows[p] for p in positions), labels=labels)

    def without_labels(self) -> Samples:
        """The same samples of unknown classes."""
        return replace(self, labels=None)

    def split(self, held_back: int, seed: int = 0) -> tuple[Samples, Samples]:
        """Most of the samples to train on, and so many others, drawn at random, to judge by.

        Raises:
            DataError: nothing is left for one of the two.
        """
        if not 0 < held_back < len(self):
            raise DataError(f"{held_back} of {len(self)} samples cannot be held back")
        order = torch.randperm(len(self), generator=_generator(seed, 0)).tolist()
        return self.subset(sorted(order[held_back:])), self.subset(sorted(order[:held_back]))

    def batch_size(self, wanted: int, processes: int = 1) -> int:
        """Samples in a step of all processes together, as near to what is wanted as they allow.

        Raises:
            DataError: too few samples for one step.
        """
        unit = (self.fixed or 1) * processes
        if len(self) < unit:
            raise DataError(
                f"{len(self)} samples do not fill one batch of {self.fixed or 1} for each of "
                f"{processes} processes"
            )
        return max(min(wanted, len(self)) // unit, 1) * unit

    def order(self, batch: int, seed: int, epoch: int) -> list[list[int]]:
        """Positions of the samples of each step of an epoch.

        Every epoch has another order; what does not fill a batch at the end is left out of it.
        """
        found = torch.randperm(len(self), generator=_generator(seed, epoch)).tolist()
        return [found[start : start + batch] for start in range(0, len(self) - batch + 1, batch)]

    def in_order(self, batch: int, share: tuple[int, int] = (0, 1)) -> list[list[int]]:
        """Positions of all samples in batches, once and unchanged.

        Args:
            batch: samples in each; a network's fixed batch goes before it.
            share: (rank, processes): only the batches that are this process's.
        """
        size = self.fixed or batch
        stop = len(self) - len(self) % size if self.fixed else len(self)
        found = [list(range(start, min(start + size, stop))) for start in range(0, stop, size)]
        return found[share[0] :: share[1]]

    def take(
        self, positions: Sequence[int], device: str | torch.device = "cpu"
    ) -> tuple[dict[str, Tensor], Tensor | None]:
        """These samples as they are, and their labels."""
        found = self._read([self.rows[position] for position in positions])
        labels = None if self.labels is None else self.labels[list(positions)].to(device)
        return {name: tensor.to(device) for name, tensor in found.items()}, labels


def draw(count: int, seed: int, epoch: int, step: int) -> Tensor:
    """The random numbers that change the samples of one step, a row for each."""
    return torch.rand(count, _DRAWN, generator=_generator(seed, epoch, step))


def random_seed(*keys: int) -> int:
    """A seed that follows from some numbers."""
    return int(np.random.SeedSequence(keys).generate_state(1, np.uint64)[0] >> np.uint64(1))


def _generator(*keys: int) -> torch.Generator:
    return torch.Generator().manual_seed(random_seed(*keys))


# --- changes ----------------------------------------------------------------------------------


def augment(images: Tensor, drawn: Tensor) -> Tensor:
    """The standard changes: shift small pictures, crop and scale larger ones, mirror half of them.

    Args:
        images: a batch of pictures, channels first or last; anything else comes back as it is.
        drawn: what `draw` gives, a row for each picture.
    """
    if images.ndim != 4 or not images.is_floating_point():
        return images
    channels_last = images.shape[1] > 4 and images.shape[3] <= 4
    planes = images.movedim(-1, 1) if channels_last else images
    small = max(planes.shape[2:]) <= _LARGEST_SMALL
    planes = (_shifted if small else _cropped)(planes, drawn)
    return planes.movedim(1, -1) if channels_last else planes


def _shifted(planes: Tensor, drawn: Tensor) -> Tensor:
    """Padded with zeros, cut out at random, mirrored: pixels stay what they are."""
    height, width = planes.shape[2:]
    pads = [round(size * _SHIFT) for size in (height, width)]
    padded = F.pad(planes, (pads[1], pads[1], pads[0], pads[0]))
    drawn = drawn.to(planes.device)
    rows = (drawn[:, 0] * (2 * pads[0] + 1)).long()[:, None] + _steps(height, planes)
    columns = _steps(width, planes).expand(len(planes), width)
    columns = torch.where(drawn[:, 2, None] < 0.5, columns.flip(1), columns)
    columns = columns + (drawn[:, 1] * (2 * pads[1] + 1)).long()[:, None]
    every, channels = _steps(len(planes), planes), _steps(planes.shape[1], planes)
    return padded[
        every[:, None, None, None],
        channels[None, :, None, None],
        rows[:, None, :, None],
        columns[:, None, None, :],
    ]


def _steps(count: int, like: Tensor) -> Tensor:
    return torch.arange(count, device=like.device)


def _cropped(planes: Tensor, drawn: Tensor) -> Tensor:
    """A part of random size, shape and place, scaled to the whole, mirrored."""
    drawn = drawn.to(planes.device, planes.dtype)
    area = _SMALLEST_CROP + (1 - _SMALLEST_CROP) * drawn[:, 3]
    ratio = torch.exp((2 * drawn[:, 4] - 1) * math.log(_LARGEST_RATIO))
    sizes = [(area * ratio).sqrt().clamp(max=1), (area / ratio).sqrt().clamp(max=1)]
    mirror = torch.where(drawn[:, 2] < 0.5, -1.0, 1.0).to(planes.dtype)
    transform = torch.zeros(len(planes), 2, 3, dtype=planes.dtype, device=planes.device)
    for axis, size in enumerate(sizes):
        transform[:, axis, axis] = size * mirror if axis == 0 else size
        transform[:, axis, 2] = (2 * drawn[:, axis] - 1) * (1 - size)
    grid = F.affine_grid(transform, list(planes.shape), align_corners=False)
    return F.grid_sample(planes, grid, padding_mode="border", align_corners=False)

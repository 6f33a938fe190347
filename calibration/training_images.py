"""Images to train on and images to judge by: batches of them, changed at random.

Those are held back that fits hold back, too (`graphfold.calibration.split`): what was fitted on
would look better than it is. The others come in a random order, all before any comes again, each
mirrored at random and zoomed into, and often blended with another one or pasted into it: a teacher
answers for any image, so there are as many as it takes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - the usual name

from graphfold.calibration.capture import Feeds
from graphfold.calibration.split import HELD_EVERY, held_samples
from graphfold.errors import DataError
from graphfold.specs import Arrays

if TYPE_CHECKING:
    from graphfold.model import Model

_BATCH = 16
_FEWEST = 2 * HELD_EVERY
# Shares of the batches whose images are blended, and pasted into each other.
_BLENDED, _PASTED = 0.35, 0.25
_LEAST_PASTED, _MOST_PASTED = 0.1, 0.6  # of an image's area
_LEAST_SHOWN = 0.6  # of an image's area, by zooming: what is judged later is shown whole


class Images:
    """Rows of the batches that were given, without a copy of them.

    Attributes:
        size: of the batches that are made of them.
        step: images of each training step, so many batches as come near the usual number.
        training, held_back: numbers of the images for each purpose.
    """

    def __init__(self, batches: Feeds, names: Sequence[str], fixed: int | None) -> None:
        self._batches = batches
        self._names = names
        self._places = []
        samples = []
        for number, batch in enumerate(batches):
            missing = [name for name in names if name not in batch]
            if missing:
                raise DataError(f"batch {number} has no {', '.join(missing)}")
            lengths = {len(batch[name]) for name in names}
            if len(lengths) != 1:
                raise DataError(f"batch {number} has arrays of unequal lengths")
            samples.append(lengths.pop())
            self._places += [(number, row) for row in range(samples[-1])]
        if len(self._places) < max(_FEWEST, HELD_EVERY * (fixed or 1)):
            raise DataError(
                f"{len(self._places)} images are too few to train on some and judge by others",
                hint="give some hundreds",
            )
        held = held_samples(samples)
        self.held_back = np.flatnonzero(held).tolist()
        self.training = np.flatnonzero(~held).tolist()
        self.size = fixed or min(_BATCH, len(self.training))
        self.step = self.size * math.ceil(min(_BATCH, len(self.training)) / self.size)
        self._rest = len(self.held_back) % fixed if fixed else 0

    def judged(self) -> list[list[int]]:
        """The held-back images in batches; of a fixed size, what does not fill one is left out."""
        last = len(self.held_back) - self._rest
        return [
            self.held_back[start : min(start + self.size, last)]
            for start in range(0, last, self.size)
        ]

    def shuffled(self, generator: torch.Generator) -> Iterator[list[list[int]]]:
        """The training images of each step in batches: all of them before any comes again."""
        order: list[int] = []
        while True:
            while len(order) < self.step:
                picks = torch.randperm(len(self.training), generator=generator).tolist()
                order += [self.training[pick] for pick in picks]
            yield [order[start : start + self.size] for start in range(0, self.step, self.size)]
            order = order[self.step :]

    def arrays(self, rows: Sequence[int]) -> Arrays:
        """These images as they are."""
        places = [self._places[row] for row in rows]
        return {
            name: np.stack([self._batches[number][name][row] for number, row in places])
            for name in self._names
        }

    def batch(
        self, rows: Sequence[int], device: str, generator: torch.Generator | None
    ) -> dict[str, Tensor]:
        """These images, changed and mixed at random where a generator is given."""
        made = {name: torch.from_numpy(array) for name, array in self.arrays(rows).items()}
        if generator is not None:
            made = mixed({n: augment(item, generator) for n, item in made.items()}, generator)
        return {name: item.to(device) for name, item in made.items()}


def fixed_batch(model: Model) -> int | None:
    """The batch size that the model's inputs insist on."""
    for value in model.ir.graph.inputs:
        if not value.is_initializer() and value.shape is not None and len(value.shape):
            size = value.shape[0]
            if isinstance(size, int) and size > 0:
                return size
    return None


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Mirror and zoom into each image at random; what is no batch of images stays."""
    if not _are_images(images):
        return images
    channels_last = _has_channels_last(images)
    planes = images.movedim(-1, 1) if channels_last else images
    count = len(planes)
    drawn = torch.rand(count, 4, generator=generator, dtype=planes.dtype)
    zoom = (_LEAST_SHOWN + (1 - _LEAST_SHOWN) * drawn[:, 0]).sqrt()
    mirror = torch.where(drawn[:, 1] < 0.5, -1.0, 1.0)
    shift = (2 * drawn[:, 2:] - 1) * (1 - zoom)[:, None]
    transform = torch.zeros(count, 2, 3, dtype=planes.dtype)
    transform[:, 0, 0], transform[:, 1, 1], transform[:, :, 2] = zoom * mirror, zoom, shift
    grid = F.affine_grid(transform, list(planes.shape), align_corners=False)
    planes = F.grid_sample(planes, grid, padding_mode="border", align_corners=False)
    return planes.movedim(1, -1) if channels_last else planes


def mixed(batch: Mapping[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
    """Blend each image with another of the batch, or paste a part of another into it, or neither.

    All of a batch are changed in the same way; what is no batch of images stays.
    """
    count = min(map(len, batch.values()))
    if count < 2 or not all(map(_are_images, batch.values())):
        return dict(batch)
    others = torch.randperm(count, generator=generator)
    drawn = torch.rand(4 + count, generator=generator)
    if drawn[0] < _BLENDED:
        return {name: _blended(item, item[others], drawn[4:]) for name, item in batch.items()}
    if drawn[0] < _BLENDED + _PASTED:
        return {name: _pasted(item, item[others], drawn[1:4]) for name, item in batch.items()}
    return dict(batch)


def _blended(images: Tensor, others: Tensor, parts: Tensor) -> Tensor:
    return torch.lerp(images, others, parts[:, None, None, None].to(images.dtype))


def _pasted(images: Tensor, others: Tensor, drawn: Tensor) -> Tensor:
    """With a rectangle of the others, the same in each; `drawn` has its area and place."""
    side = math.sqrt(_LEAST_PASTED + (_MOST_PASTED - _LEAST_PASTED) * float(drawn[0]))
    axes = (1, 2) if _has_channels_last(images) else (2, 3)
    inside = torch.ones((), dtype=torch.bool)
    for axis, place in zip(axes, drawn[1:].tolist(), strict=True):
        size = images.shape[axis]
        taken = round(side * size)
        start = round(place * (size - taken))
        index = torch.arange(size)
        shape = [-1 if other == axis else 1 for other in range(4)]
        inside = inside & ((index >= start) & (index < start + taken)).reshape(shape)
    return torch.where(inside, others, images)


def _are_images(tensor: Tensor) -> bool:
    return tensor.ndim == 4 and tensor.is_floating_point()


def _has_channels_last(images: Tensor) -> bool:
    return images.shape[1] > 4 and images.shape[3] <= 4

"""Several processes that train one network: gradients are averaged, one of them writes.

`torchrun` starts the processes and tells each its number. They talk by NCCL where each has a GPU
and by Gloo otherwise. One process alone is a group of one, and nothing is sent.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed


@dataclass(frozen=True)
class Group:
    """The processes of one training.

    Attributes:
        rank: this process's number.
        size: how many there are.
        device: where this process computes.
    """

    rank: int = 0
    size: int = 1
    device: str = "cpu"

    @property
    def leads(self) -> bool:
        """Whether this process writes what is written."""
        return self.rank == 0

    @property
    def share(self) -> tuple[int, int]:
        """(rank, processes)."""
        return self.rank, self.size

    def average(self, tensors: Iterable[Tensor]) -> None:
        """Give all processes the mean of each tensor, in place."""
        if self.size == 1:
            return
        parts = list(tensors)
        if not parts:
            return
        flat = torch.cat([part.reshape(-1) for part in parts])
        distributed.all_reduce(flat)
        flat /= self.size
        means = torch.split(flat, [part.numel() for part in parts])
        for part, mean in zip(parts, means, strict=True):
            part.copy_(mean.view(part.shape))

    def total(self, tensor: Tensor) -> Tensor:
        """The sum of a tensor over all processes, on the CPU."""
        if self.size == 1:
            return tensor.cpu()
        there = tensor.to(self.device)
        distributed.all_reduce(there)
        return there.cpu()

    def same(self, value: Any) -> Any:
        """What the leading process has, for all."""
        if self.size == 1:
            return value
        box = [value]
        distributed.broadcast_object_list(box, src=0)
        return box[0]


@contextlib.contextmanager
def joined(device: str | None = None) -> Iterator[Group]:
    """The group that `torchrun` started this process in, or a group of one.

    Args:
        device: where to compute; by default the GPU of this process's number, or the CPU.
    """
    size, local = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("LOCAL_RANK", 0))
    if device is None:
        device = f"cuda:{local}" if torch.cuda.is_available() else "cpu"
    if size == 1:
        yield Group(device=device)
        return
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
    distributed.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    try:
        yield Group(distributed.get_rank(), size, device)
    finally:
        distributed.destroy_process_group()

"""Running networks in torch: answers of student and teacher, and how good a student is."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from graphfold.calibration.objective import Evaluation, Objective
from graphfold.calibration.parallel import Group
from graphfold.calibration.samples import Samples

_JUDGED_TOGETHER = 256  # samples
_SMALL_OUTPUT = 4096  # numbers for one sample


def evaluate(
    module: nn.Module,
    teacher: nn.Module | None,
    samples: Samples,
    objective: Objective,
    *,
    mixed: bool = False,
    group: Group | None = None,
    taught: dict[int, dict[str, Tensor]] | None = None,
) -> Evaluation:
    """How a network does on samples, as they are; all processes together.

    Args:
        module: the network; it keeps its mode.
        teacher: to be compared with, in evaluation mode.
        samples: to judge on.
        objective: what is judged.
        mixed: multiply in bfloat16.
        group: the processes, which share the samples.
        taught: the teacher's outputs by batch, kept from call to call where they are small.
    """
    group = group or Group()
    was_training = module.training
    module.eval()
    total: Tensor | None = None
    with torch.no_grad(), products(group.device, mixed):
        for number, positions in enumerate(samples.in_order(_JUDGED_TOGETHER, group.share)):
            batch, labels = samples.take(positions, group.device)
            known = None if taught is None else taught.get(number)
            own, other = answers(module, None if known else teacher, by_channel(batch))
            other = known or other
            if taught is not None and other is not None and _is_small(other):
                taught[number] = other
            found = objective.sums(own, other, labels)
            total = found if total is None else total + found
    module.train(was_training)
    if total is None:  # fewer batches than processes
        batch, labels = samples.take(samples.in_order(1)[0], group.device)
        with torch.no_grad():
            total = torch.zeros_like(objective.sums(*answers(module, teacher, batch), labels))
    return objective.evaluation(group.total(total))


def training_loss(
    module: nn.Module,
    teacher: nn.Module | None,
    samples: Samples,
    objective: Objective,
    *,
    batch: int,
    device: str = "cpu",
    seed: int = 0,
) -> float:
    """Mean loss as training sees it: normalisations by the statistics of each batch.

    For weights that many networks share, of none of which running statistics are. The module keeps
    its own, and its mode; what is drawn inside is the same in every call.

    Args:
        module: the network.
        teacher: to learn from, in evaluation mode.
        samples: to judge on, as they are; what does not fill a batch is left out.
        objective: the loss.
        batch: samples in each, where the network does not insist on a number.
        device: where the networks are.
        seed: of what is drawn inside the network.
    """
    was_training = module.training
    kept = [(buffer, buffer.clone()) for buffer in module.buffers()]
    module.train()
    losses = []
    size = samples.fixed or batch
    with torch.random.fork_rng(devices=gpus(device)), torch.no_grad():
        torch.manual_seed(seed)
        for positions in samples.in_order(size)[: len(samples) // size]:
            inputs, labels = samples.take(positions, device)
            own, other = answers(module, teacher, by_channel(inputs))
            losses.append(objective.loss(own, other, labels))
        for buffer, before in kept:
            buffer.copy_(before)
    module.train(was_training)
    return float(torch.stack(losses).double().mean())


def answers(
    module: nn.Module, teacher: nn.Module | None, batch: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor] | None]:
    """Of student and teacher, in float32 at least; the teacher learns nothing."""
    own = _wide(module(batch))
    if teacher is None:
        return own, None
    with torch.no_grad():
        return own, _wide(teacher(batch))


def _is_small(outputs: Mapping[str, Tensor]) -> bool:
    return all(tensor[0].numel() <= _SMALL_OUTPUT for tensor in outputs.values())


def _wide(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    narrow = (torch.bfloat16, torch.float16)
    return {name: t.float() if t.dtype in narrow else t for name, t in tensors.items()}


def by_channel(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors, those of pictures with channels last in memory."""
    return {name: last_channels(tensor) for name, tensor in batch.items()}


def last_channels(tensor: Tensor) -> Tensor:
    """Channels last in memory, which convolutions are faster with."""
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.ndim == 4 else tensor


@contextlib.contextmanager
def products(device: str, mixed: bool) -> Iterator[None]:
    """Matrix products and convolutions in bfloat16 where `mixed`."""
    with torch.autocast(device.partition(":")[0], torch.bfloat16, enabled=mixed):
        yield


def gpus(device: str) -> list[int]:
    """The GPU whose random numbers a device draws, if it is one."""
    return [torch.device(device).index or 0] if device.startswith("cuda") else []

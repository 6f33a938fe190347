"""Random weights that behave like trained ones, for networks whose weights are not at hand.

Freshly initialised batch normalisation is the identity, which hides most folding mistakes. Here
every scale, shift, mean and variance is its own, activations clip some values and pass most, and
the signal neither dies nor explodes, with the activations in place or taken out.
"""

from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layers import ConvBn

Module = TypeVar("Module", bound=nn.Module)


def smooth_images(count: int, size: int, generator: torch.Generator) -> Tensor:
    """Random images [count, 3, size, size] that differ in colour, contrast and layout."""
    coarse = torch.randn(count, 3, 6, 6, generator=generator)
    images = F.interpolate(coarse, size=(size, size), mode="bicubic", align_corners=False)
    images += 0.6 * torch.randn(count, 3, 1, 1, generator=generator)
    images += 0.2 * torch.randn(count, 3, size, size, generator=generator)
    return images


def randomize(module: Module, *, seed: int = 0, size: int = 96, batch: int = 16) -> Module:
    """Fill `module` with seeded random weights and calibrated statistics; returns it, in eval mode.

    The statistics are those of random images of `size`, then disturbed a little, as the ones of a
    trained network never fit an input exactly.
    """
    generator = torch.Generator().manual_seed(seed)
    _fill(module, generator)
    _calibrate(module, smooth_images(batch, size, generator))
    for norm in _norms(module):
        _disturb(norm, generator)
    module.eval()
    _centre(module, smooth_images(batch, size, generator))
    return module


def _norms(module: nn.Module) -> list[nn.BatchNorm2d]:
    return [m for m in module.modules() if isinstance(m, nn.BatchNorm2d)]


def _activated(module: nn.Module) -> set[nn.Module]:
    """The normalisations that an activation follows in their own layer."""
    return {
        m.get_submodule("bn")
        for m in module.modules()
        if isinstance(m, ConvBn) and hasattr(m, "act")
    }


@torch.no_grad()
def _fill(module: nn.Module, generator: torch.Generator) -> None:
    activated = _activated(module)
    for child in module.modules():
        if isinstance(child, nn.Conv2d | nn.Linear):
            fan_in = child.weight[0].numel()
            child.weight.normal_(0, fan_in**-0.5, generator=generator)
        elif isinstance(child, nn.BatchNorm2d):
            # Most of the mass between 0 and 6: an activation taken out then changes the next
            # layer's input by little, which is what keeps a network without any from exploding.
            centre, spread = (2.5, 1.5) if child in activated else (0.0, 0.9)
            child.weight.uniform_(0.8 * spread, 1.2 * spread, generator=generator)
            child.bias.normal_(centre, 0.5, generator=generator)


@torch.no_grad()
def _calibrate(module: nn.Module, images: Tensor) -> None:
    module.train()
    for norm in _norms(module):
        norm.momentum = 1.0
    module(images)
    for norm in _norms(module):
        norm.momentum = 0.1


@torch.no_grad()
def _disturb(norm: nn.BatchNorm2d, generator: torch.Generator) -> None:
    mean, var = norm.running_mean, norm.running_var
    assert mean is not None
    assert var is not None
    shift = 0.1 * torch.randn(mean.shape, generator=generator)
    mean += shift * var.sqrt()
    var *= torch.empty_like(var).uniform_(0.8, 1.25, generator=generator)


@torch.no_grad()
def _centre(module: nn.Module, images: Tensor) -> None:
    """Shift the logits' mean to about zero, so that a relative tolerance is one of the signal."""
    linear = [m for m in module.modules() if isinstance(m, nn.Linear)][-1]
    linear.bias.zero_()
    linear.bias.sub_(module(images).mean(0))

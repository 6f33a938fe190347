"""A small diffusion U-Net in torch, for tests that export it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class Residual(nn.Module):
    """Two 3x3 convolutions, each behind a GroupNorm and SiLU, with a vector between them."""

    def __init__(self, inside: int, outside: int, time: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(4, inside, eps=1e-6)
        self.conv1 = nn.Conv2d(inside, outside, 3, padding=1)
        self.time = nn.Linear(time, outside)
        self.norm2 = nn.GroupNorm(4, outside, eps=1e-6)
        self.conv2 = nn.Conv2d(outside, outside, 3, padding=1)
        self.skip = nn.Identity() if inside == outside else nn.Conv2d(inside, outside, 1)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        y = self.conv1(functional.silu(self.norm1(x)))
        y = y + self.time(time)[:, :, None, None]
        return self.skip(x) + self.conv2(functional.silu(self.norm2(y)))


class Attention(nn.Module):
    """All pixels look at all others."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(4, width)
        self.query, self.key, self.value, self.out = (nn.Conv2d(width, width, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        query, key, value = (each(y).flatten(2) for each in (self.query, self.key, self.value))
        weights = torch.softmax(query.transpose(1, 2) @ key / x.shape[1] ** 0.5, dim=-1)
        return x + self.out((value @ weights.transpose(1, 2)).reshape(x.shape))


class UNet(nn.Module):
    """Down once, up once; what was there before comes back concatenated."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.embed = nn.Linear(1, 16)
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.first = Residual(width, width, 16)
        self.down = nn.Conv2d(width, width, 3, stride=2, padding=1)
        self.middle = Residual(width, 2 * width, 16)
        self.attention = Attention(2 * width)
        self.up = nn.Conv2d(2 * width, 2 * width, 3, padding=1)
        self.last = Residual(3 * width, width, 16)
        self.norm = nn.GroupNorm(4, width)
        self.head = nn.Conv2d(width, 3, 3, padding=1)
        for module in self.modules():
            if isinstance(module, nn.GroupNorm):
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.uniform_(module.bias, -0.5, 0.5)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        time = functional.silu(self.embed(t))
        skip = self.first(self.stem(x), time)
        y = self.attention(self.middle(self.down(skip), time))
        y = self.up(functional.interpolate(y, scale_factor=2.0, mode="nearest"))
        y = self.last(torch.cat([y, skip], dim=1), time)
        return self.head(functional.silu(self.norm(y)))

"""The U-Net of denoising diffusion (Ho et al., 2020) for small images, with seeded random weights.

Residual blocks of two 3x3 convolutions, each behind a GroupNorm and SiLU, with a vector for the
time step added between them; attention at one resolution, on the way down and up; strided
convolutions down, nearest-neighbour upsampling and a convolution up; and every tensor of the way
down concatenated on the way up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from networks import Network


@dataclass(frozen=True)
class Layout:
    """Sizes of the network; the defaults are those for CIFAR-10."""

    size: int = 32
    width: int = 128
    multipliers: Sequence[int] = (1, 2, 2, 2)
    blocks: int = 2
    attention: Sequence[int] = (16,)
    groups: int = 32


def ddpm_unet(layout: Layout | None = None) -> onnx.ModelProto:
    """Inputs x [1, 3, size, size] and the time step t [1, 1]; the output has x's shape."""
    return _UNet(layout or Layout()).model()


class _UNet:
    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.net = Network(layout.size)
        self.time = self._time()

    def model(self) -> onnx.ModelProto:
        """The whole network."""
        layout, net = self.layout, self.net
        x, size = net.conv("x", layout.width, 3, bias=True), layout.size
        skips = [x]
        for level, multiplier in enumerate(layout.multipliers):
            for _ in range(layout.blocks):
                x = self._block(x, layout.width * multiplier, size)
                skips.append(x)
            if level + 1 < len(layout.multipliers):
                x, size = self._down(x), size // 2
                skips.append(x)
        x = self._attention(self._residual(x, net.channels[x]), size)
        x = self._residual(x, net.channels[x])
        for level, multiplier in reversed(list(enumerate(layout.multipliers))):
            for _ in range(layout.blocks + 1):
                skip = skips.pop()
                width = net.channels[x] + net.channels[skip]
                x = net.op("Concat", x, skip, channels=width, axis=1)
                x = self._block(x, layout.width * multiplier, size)
            if level:
                x, size = self._up(x), size * 2
        return net.model(net.conv(self._silu(self._norm(x)), 3, 3, bias=True))

    def _time(self) -> str:
        """Sines and cosines of the time step, and two layers behind them."""
        net, width = self.net, self.layout.width
        frequencies = np.exp(-np.log(1e4) * np.arange(width // 2) / (width // 2 - 1))
        angles = net.op("Mul", net.add_input("t", [1, 1]), net.constant("frequencies", frequencies))
        waves = net.op(
            "Concat", net.op("Sin", angles), net.op("Cos", angles), channels=width, axis=1
        )
        return self._silu(net.linear(self._silu(net.linear(waves, 4 * width)), 4 * width))

    def _block(self, x: str, width: int, size: int) -> str:
        x = self._residual(x, width)
        return self._attention(x, size) if size in self.layout.attention else x

    def _residual(self, x: str, width: int) -> str:
        net = self.net
        y = net.conv(self._silu(self._norm(x)), width, 3, bias=True)
        axes = net.shared("spatial", np.array([2, 3]))
        y = net.op("Add", y, net.op("Unsqueeze", net.linear(self.time, width), axes))
        y = net.conv(self._silu(self._norm(y)), width, 3, bias=True, gain=0.2)
        if net.channels[x] != width:
            x = net.conv(x, width, 1, bias=True, gain=1.0)
        return net.op("Add", x, y)

    def _attention(self, x: str, size: int) -> str:
        net, width = self.net, self.net.channels[x]
        row = net.shared(f"row{size}", np.array([0, width, size * size]))
        square = net.shared(f"square{size}", np.array([0, width, size, size]))
        y = self._norm(x)
        query, key, value = (
            net.op("Reshape", net.conv(y, width, 1, bias=True), row) for _ in range(3)
        )
        scores = net.op("MatMul", net.op("Transpose", query, perm=[0, 2, 1]), key)
        scores = net.op("Mul", scores, net.shared(f"scale{size}", width**-0.5))
        weights = net.op("Transpose", net.op("Softmax", scores, axis=2), perm=[0, 2, 1])
        y = net.op("Reshape", net.op("MatMul", value, weights), square)
        return net.op("Add", x, net.conv(y, width, 1, bias=True, gain=0.2))

    def _down(self, x: str) -> str:
        """Padded below and to the right only, as the reference network is."""
        net = self.net
        padding = net.shared("below_and_right", np.array([0, 0, 0, 0, 0, 0, 1, 1]))
        return net.conv(net.op("Pad", x, padding), net.channels[x], 3, stride=2, pad=0, bias=True)

    def _up(self, x: str) -> str:
        net = self.net
        x = net.op("Resize", x, "", net.shared("twice", [1.0, 1.0, 2.0, 2.0]), mode="nearest")
        return net.conv(x, net.channels[x], 3, bias=True)

    def _silu(self, x: str) -> str:
        return self.net.op("Mul", x, self.net.op("Sigmoid", x))

    def _norm(self, x: str) -> str:
        """A GroupNorm as exporters spell it before opset 18."""
        net, width, groups = self.net, self.net.channels[x], self.layout.groups
        grouped = net.op("Reshape", x, net.shared("grouped", np.array([0, groups, -1])))
        ones, zeros = net.shared("ones", np.ones(groups)), net.shared("zeros", np.zeros(groups))
        y = net.op("InstanceNormalization", grouped, ones, zeros, epsilon=1e-6)
        y = net.op("Reshape", y, net.op("Shape", x))
        draw = net.rng.uniform
        scale = net.constant(f"{y}.scale", draw(0.8, 1.2, (width, 1, 1)))
        shift = net.constant(f"{y}.shift", draw(-0.2, 0.2, (width, 1, 1)))
        return net.op("Add", net.op("Mul", y, scale), shift)

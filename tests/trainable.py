"""A small classifier with BatchNormalization and pictures that it can learn, for training tests."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from builders import ModelBuilder
from numpy.typing import NDArray

CLASSES = 4


def network(seed: int = 0, *, batch: Any = "N", norm: bool = True) -> onnx.ModelProto:
    """Stem, two residual blocks of expansion, depthwise and projection, and classes."""
    net = ModelBuilder((batch, 3, 8, 8), seed=seed)

    def normed(source: str, out: str | None = None) -> str:
        return net.norm(source, out=out) if norm else source

    y = net.op("Relu", normed(net.conv("x", 8, 3, pad=1, stride=2)), out="stem")
    for number in range(2):
        wide = normed(net.conv(y, 16, 1))
        z = net.op("Relu", wide, out=f"wide{number}")
        z = net.op("Relu", normed(net.depthwise(z, 3, pad=1)), out=f"deep{number}")
        z = normed(net.conv(z, 8, 1))
        y = net.op("Add", y, z, out=f"block{number}")
    y = net.op("Flatten", net.op("GlobalAveragePool", y))
    weight, bias = net.constant(net.rng.normal(size=(CLASSES, 8))), net.constant(np.zeros(CLASSES))
    return net.model(net.op("Gemm", y, weight, bias, transB=1, out="y", channels=CLASSES))


def pictures(
    count: int = 64, seed: int = 0, noise: float = 0.7
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Noise over a pattern for each class, which shifting and mirroring leave what it is."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % CLASSES
    colours = np.array([[1, 0, 0], [0, 1, 0], [0, 0, 1], [-1, -1, 0]], dtype=np.float32)
    images = colours[labels][:, :, None, None] + noise * rng.standard_normal((count, 3, 8, 8))
    return images.astype(np.float32), labels.astype(np.int64)

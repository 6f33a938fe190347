"""A small network with something to narrow and to drop, and latencies that no device decides."""

from __future__ import annotations

from typing import Any

import numpy as np
from builders import ModelBuilder

from graphfold.calibration.nodetimes import NodeTimes
from graphfold.calibration.workbench import Workbench


def network(seed: int = 0) -> Any:
    """Two residual blocks of expansion, depthwise and projection, a head of classes."""
    net = ModelBuilder((None, 3, 12, 12), seed=seed)
    y = net.op("Relu", net.conv("x", 8, 3, pad=1, stride=2))
    for number in range(2):
        z = net.op("Relu", net.conv(y, 32, 1))
        z = net.op("Relu", net.depthwise(z, 3, pad=1))
        y = net.op("Add", y, net.conv(z, 8, 1, out=f"projected{number}"), out=f"block{number}")
    y = net.op("Relu", net.conv(y, 48, 1))
    y = net.op("Flatten", net.op("GlobalAveragePool", y))
    weight = net.constant(net.rng.normal(size=(48, 6)))
    return net.model(net.op("Gemm", y, weight, out="y", channels=6))


def feeds(count: int, seed: int) -> list[dict[str, Any]]:
    rng = np.random.default_rng(seed)
    return [{"x": rng.normal(size=(4, 3, 12, 12)).astype(np.float32)} for _ in range(count)]


def by_macs(bench: Workbench) -> NodeTimes:
    """Latencies that are multiply-adds: no device is asked."""
    times = NodeTimes(bench, rest=1.0)
    weights = {}
    for key, place in bench.inner.items():
        for cut in place.cuts:
            if cut.index == 1:
                weights.setdefault(cut.node, []).append(key)
        weights.setdefault(place.consumer, []).append(key)
    for node, keys in weights.items():
        size = float(bench.graph.constant(node.inputs[1]).size)
        times.samples[node] = [(0.0, 0.0), (1.0, size)]
        times.scales[node] = keys
    times.inside = {key: frozenset(each.nodes) for key, each in bench.segments.items()}
    return times

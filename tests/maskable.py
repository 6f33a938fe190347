"""A small chain of inverted-residual blocks to mask, and latencies that no device decides."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
from builders import ModelBuilder

from graphfold.candidates import find_candidates
from graphfold.cuts import choice_row, cut_layout, is_no_change
from graphfold.graph import Graph
from graphfold.measures import LatencyHeader, LatencyRow, LatencyTable
from graphfold.model import Model


def chain(depth: int) -> onnx.ModelProto:
    """A stem, so many inverted-residual blocks, an activation at the head, and classes."""
    net = ModelBuilder(("N", 3, 8, 8))
    y = net.op("Relu", net.norm(net.conv("x", 8, 3, pad=1, stride=2)), out="stem")
    for number in range(depth):
        wide = net.op("Relu", net.norm(net.conv(y, 16, 1)), out=f"wide{number}")
        deep = net.op("Relu", net.norm(net.depthwise(wide, 3, pad=1)), out=f"deep{number}")
        y = net.op("Add", y, net.norm(net.conv(deep, 8, 1)), out=f"block{number}")
    y = net.op("Flatten", net.op("GlobalAveragePool", net.op("Relu", y, out="head")))
    weight, bias = net.constant(net.rng.normal(size=(4, 8))), net.constant(np.zeros(4))
    return net.model(net.op("Gemm", y, weight, bias, transB=1, out="y", channels=4))


def table_of(model: Model, merged: Mapping[str, float]) -> LatencyTable:
    """Latencies that no device decides: 1 ms a step, and so much for a merged block's output."""
    candidates = find_candidates(Graph(model))
    rows = [
        LatencyRow(**step.row().model_dump(exclude_none=True), value=1.0)
        for step in cut_layout(candidates).steps
    ]
    for each in candidates.found:
        for choice in each.choices:
            if choice.removed_convs or is_no_change(each, choice):
                continue
            row = choice_row(each, choice).model_dump(exclude_none=True)
            value = merged.get(each.output.name, 50.0) if len(each.convs) == 3 else 50.0
            rows.append(LatencyRow(**row, value=value))
    return LatencyTable(header=LatencyHeader(created_by="a test"), rest=1.0, rows=tuple(rows))

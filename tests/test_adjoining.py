"""Narrowed segments that share a convolution: the end of one is the beginning of the next."""

from __future__ import annotations

import numpy as np
import pytest
from builders import ModelBuilder

import graphfold
from graphfold.errors import PlanError
from graphfold.graph import Graph
from graphfold.model import load, to_proto
from graphfold.plan import read_plan
from graphfold.resolve import resolve_plan


def plain():
    """Convolutions without a bias, normalised, one after the other."""
    net = ModelBuilder(("N", 3, 8, 8))
    y = "x"
    for number in range(4):
        y = net.norm(net.conv(y, 8, 3, pad=1), out=f"norm{number}")
        y = net.op("Relu", y, out=f"act{number}")
    y = net.op("Flatten", net.op("GlobalAveragePool", y))
    weight, bias = net.constant(net.rng.normal(size=(4, 8))), net.constant(np.zeros(4))
    return load(net.model(net.op("Gemm", y, weight, bias, transB=1, out="y", channels=4)))


def plan(*ends):
    segments = [
        {"input": i, "output": o, "family": "narrow", "width": width, "weights": "regress"}
        for i, o, width in ends
    ]
    return {"graphfold_plan": 1, "segments": segments}


# In either order: the plan's is not that of execution.
ENDS = [("act1", "norm3", 5), ("act0", "norm2", 6)]


@pytest.mark.parametrize("ends", [ENDS, ENDS[::-1]])
def test_both_are_narrowed(ends):
    model = plain()
    feeds = [{"x": np.random.default_rng(0).normal(size=(32, 3, 8, 8)).astype(np.float32)}]
    assert len(resolve_plan(Graph(model), read_plan(plan(*ends))).segments) == 2
    result = graphfold.optimize(model, plan(*ends), data=feeds)
    assert result.report.verification.passed
    shapes = [
        list(item.dims) for item in to_proto(result.folded).graph.initializer if len(item.dims) == 4
    ]
    assert shapes == [[8, 3, 3, 3], [6, 8, 3, 3], [5, 6, 3, 3], [8, 5, 3, 3]]


def test_both_are_trained():
    pytest.importorskip("torch")
    from trainable import pictures

    from graphfold.calibration.finetune import finetune
    from graphfold.calibration.recipe import Recipe
    from graphfold.calibration.samples import Samples

    images, labels = pictures(64)
    data = Samples.of({"x": images}, labels)
    recipe = Recipe(epochs=1, batch_size=16, augment=False)
    tuned = finetune(plain(), data, plan(*ENDS), held_out=data, recipe=recipe)
    assert tuned.folding.error < 1e-5


@pytest.mark.parametrize("second", [("act0", "norm2", 5), ("act0", "norm3", 5)])
def test_one_place_is_not_narrowed_twice(second):
    with pytest.raises(PlanError, match="overlaps"):
        resolve_plan(Graph(plain()), read_plan(plan(("act0", "norm2", 6), second)))

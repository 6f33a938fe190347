"""Segments fitted in turn: what each one reads, when that is done, and that it helps."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import onnx
import pytest
from builders import ModelBuilder, run

import graphfold
from graphfold.calibration import fitting
from graphfold.calibration.fitting import fit_plan
from graphfold.model import load, to_proto
from graphfold.plan import read_plan

BLOCKS = 6


def network() -> onnx.ModelProto:
    """Blocks with skips: the error of one is an input of all that follow."""
    build = ModelBuilder(("N", 6, 8, 8), seed=3)
    x = build.op("Relu", build.conv("x", 12, 3, pad=1), out="start")
    for number in range(BLOCKS):
        inner = build.op("Relu", build.conv(x, 24, 3, pad=1))
        x = build.op("Add", x, build.conv(inner, 12, 1), out=f"end{number}")
    return build.model(build.op("Relu", x, out="y"))


def plan() -> Any:
    ends = ["start", *(f"end{number}" for number in range(BLOCKS))]
    segments = [
        {"input": a, "output": b, "family": "dense", "kernel": [1, 1], "weights": "regress"}
        for a, b in itertools.pairwise(ends)
    ]
    return read_plan({"graphfold_plan": 1, "segments": segments})


def data(batches: int = 10, seed: int = 0) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(seed)
    return [{"x": rng.normal(size=(8, 6, 8, 8)).astype(np.float32)} for _ in range(batches)]


def error(fitted: Any) -> float:
    (x,) = data(1, seed=99)
    one, two = run(network(), x)[0], run(to_proto(fitted.model), x)[0]
    return float(((one - two) ** 2).mean() / one.var())


def test_what_is_fitted_in_turn_answers_better(monkeypatch):
    model = load(network())
    fitted = fit_plan(model, plan(), data())
    assert [fit.in_turn for fit in fitted.fits] == [True] * BLOCKS
    monkeypatch.setattr(fitting, "is_better_in_turn", lambda *_, **__: False)
    alone = fit_plan(model, plan(), data())
    assert [fit.in_turn for fit in alone.fits] == [False] * BLOCKS
    assert error(fitted) < error(alone)
    # The first has the same inputs either way.
    assert fitted.fits[0].error == pytest.approx(alone.fits[0].error, rel=1e-6)


def test_held_back_inputs_decide(monkeypatch):
    # Where fits in turn are spoiled, they are not taken.
    original = fitting.fit_in_turn
    from graphfold.calibration import in_turn

    def spoiled(bench: Any, state: Any, feeds: Any, **options: Any) -> None:
        original(bench, state, [{"x": 0 * feed["x"]} for feed in feeds], **options)

    monkeypatch.setattr(in_turn, "fit_in_turn", spoiled)
    fitted = fit_plan(load(network()), plan(), data())
    assert [fit.in_turn for fit in fitted.fits] == [False] * BLOCKS


def test_too_little_to_hold_back_is_fitted_alone():
    fitted = fit_plan(load(network()), plan(), data(3))
    assert [fit.in_turn for fit in fitted.fits] == [False] * BLOCKS


def test_the_report_says_so():
    report = graphfold.optimize(network(), plan(), data=data()).report
    assert all(fit["in_turn"] for fit in report.to_json()["fits"])
    notes = [table.note for table in report.tables() if table.title == "Fitted segments"]
    assert len(notes) == 1
    assert "in turn" in notes[0]

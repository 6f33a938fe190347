"""Schemes chosen by measured damage: the best of what was measured, and the same every time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx
import pytest
from builders import ModelBuilder
from numpy.typing import NDArray

from graphfold.calibration import choosing
from graphfold.calibration.choosing import QuantizationChoice, choose_quantization
from graphfold.calibration.judge import Judge, outputs_of
from graphfold.calibration.planned import scheme_of
from graphfold.calibration.ranges import Calibration
from graphfold.errors import DataError
from graphfold.model import load

FEW = (Calibration("minmax"), Calibration("percentile", 99.0))


def fragile() -> onnx.ModelProto:
    """A chain whose second convolution's output holds one channel 3,000 times as large."""
    build = ModelBuilder((1, 3, 12, 12))
    x = build.op("Relu", build.conv("x", 16, 3, pad=1, out="first"))
    scale = np.ones(16)
    scale[0] = 3000.0
    weight = build.rng.standard_normal((16, 16, 1, 1)) * scale[:, None, None, None] / 4
    x = build.op("Relu", build.conv(x, 16, weight=build.constant(weight), out="wide"))
    weight = build.rng.standard_normal((16, 16, 3, 3)) / scale[:, None, None] / 12
    x = build.op("Relu", build.conv(x, 16, 3, weight=build.constant(weight), out="narrow", pad=1))
    x = build.op("Relu", build.conv(x, 32, 3, pad=1, out="large"))
    return build.model(build.conv(x, 6, out="y"))


def feeds(count: int, seed: int) -> Iterator[dict[str, NDArray[Any]]]:
    rng = np.random.default_rng(seed)
    for _ in range(count):
        yield {"x": rng.standard_normal((1, 3, 12, 12)).astype(np.float32)}


def choose(**options: Any) -> QuantizationChoice:
    options = {"calibrations": FEW, "float_share": 0.6, **options}
    return choose_quantization(load(fragile()), feeds(12, 0), feeds(40, 1), **options)


def test_the_operator_that_hurts_is_left_in_float() -> None:
    found = choose()
    assert found.complete
    assert {"wide", "narrow"} <= set(found.trial.scheme.keep_float)
    assert "large" not in found.trial.scheme.keep_float
    assert found.trial.verdict.damage < 0.5 * found.plain.verdict.damage
    assert found.trial.float_share <= 0.6


def test_the_model_is_the_one_that_was_measured() -> None:
    found = choose()
    judge = list(feeds(40, 1))
    verdict = Judge(outputs_of(load(fragile()), judge)).verdict(outputs_of(found.model, judge))
    assert verdict == found.trial.verdict
    assert scheme_of(found.settings).keep_float == found.trial.scheme.keep_float
    assert scheme_of(found.settings).calibration == Calibration("minmax")


def test_twice_the_same() -> None:
    assert choose().trials == choose().trials


def test_nothing_stays_in_float_where_nothing_may() -> None:
    found = choose(float_share=0.0)
    assert len(found.trials) == len(FEW)
    assert found.trial == found.plain
    assert found.trial.verdict.damage == min(trial.verdict.damage for trial in found.trials)


def test_no_more_than_the_share_stays_in_float() -> None:
    found = choose(float_share=0.02)
    assert found.trial.float_share <= 0.02


def test_a_time_budget_ends_the_search_with_the_best_so_far() -> None:
    found = choose(time_budget=0.0)
    assert not found.complete
    assert len(found.trials) == len(FEW)


def test_what_was_measured_in_time_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(1000))
    monkeypatch.setattr(choosing.time, "monotonic", lambda: float(next(clock)))
    found = choose(time_budget=5.0)
    assert not found.complete
    assert set(found.trial.scheme.keep_float) == {"wide", "narrow"}


def test_a_report_shows_what_was_measured() -> None:
    found = choose()
    document = found.to_json()
    assert document["chosen"] in document["trials"]
    assert {trial["calibration"] for trial in document["trials"]} == {"minmax", "percentile"}
    (table,) = found.tables()
    assert [row[-1] for row in table.rows].count("chosen") == 1


def test_classes_are_judged_by_divergence_others_by_error() -> None:
    assert choose(float_share=0.0).trial.verdict.agreement is None
    build = ModelBuilder((1, 3, 12, 12))
    x = build.op("Flatten", build.op("Relu", build.conv("x", 4, 3, out="only")))
    weight = build.constant(build.rng.standard_normal((400, 6)) / 5)
    model = load(build.model(build.op("MatMul", x, weight, out="y")))
    verdict = choose_quantization(model, feeds(4, 0), feeds(20, 1), calibrations=FEW).trial.verdict
    assert verdict.agreement is not None
    assert 0 < verdict.damage < 0.1
    assert verdict.agreement > 0.8


def test_images_are_needed() -> None:
    with pytest.raises(DataError, match="calibrate"):
        choose_quantization(load(fragile()), [], feeds(1, 1), calibrations=FEW)
    with pytest.raises(DataError, match="judge"):
        choose_quantization(load(fragile()), feeds(1, 0), [], calibrations=FEW)

"""A plan's `quantize`: folded and verified in float, then quantized, with one clear message."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from test_quantize import counts, feeds, network

import graphfold
from graphfold.calibration.planned import split
from graphfold.cli import main
from graphfold.errors import UsageError
from graphfold.model import load

PLAN: dict[str, Any] = {"graphfold_plan": 1, "quantize": {"calibration": "percentile"}}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model.onnx"
    onnx.save(network(), path)
    return path


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "images.npz"
    np.savez(path, x=np.concatenate([feed["x"] for feed in feeds(40)]))
    return path


def written(tmp_path: Path, **quantize: Any) -> Path:
    path = tmp_path / "plan.json"
    path.write_text(json.dumps({**PLAN, "quantize": quantize}))
    return path


def test_the_command_folds_quantizes_and_reports(
    model: Path, data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    plan, out = written(tmp_path, calibration="minmax", keep_float=["last"]), tmp_path / "out.onnx"
    page = tmp_path / "report.html"
    arguments = ["--plan", plan, "--data", data, "-o", out, "--report", page, "--json"]
    assert main(["optimize", str(model), *map(str, arguments)]) == 0
    document = json.loads(capfd.readouterr().out)
    assert document["verification"]["passed"] is True
    found = document["quantized"]
    assert found["calibration"] == "minmax"
    assert found["keep_float"] == ["last"]
    assert found["agreement"] > 0.8
    assert 0 < found["damage"] < 0.05
    assert (found["calibrated_on"], found["judged_on"], found["judged_apart"]) == (64, 16, True)
    assert found["weight_bytes"]["after"] < found["weight_bytes"]["before"]
    assert counts(load(out))["QuantizeLinear"]
    assert "agreement with float" in page.read_text()
    # Figures of the network are of what was folded: INT8 neither adds nor merges operators.
    assert "QuantizeLinear" not in document["ops"]


def test_no_more_samples_are_used_than_asked_for(
    model: Path, data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = ["optimize", str(model), "--samples", "32", "--dry-run", "--json"]
    plan = written(tmp_path, calibration="minmax")
    assert main([*arguments, "--data", str(data), "--plan", str(plan)]) == 0
    found = json.loads(capfd.readouterr().out)["quantized"]
    assert found["calibrated_on"] + found["judged_on"] == 32
    assert main([*arguments, "--data", str(data)]) == 0
    assert json.loads(capfd.readouterr().out)["verification"]["passed"] is True
    assert main(arguments) == 2
    assert "there is no --data" in json.loads(capfd.readouterr().out)["error"]["message"]


@pytest.mark.parametrize(
    ("quantize", "with_data", "message"),
    [
        ({}, False, "the plan quantizes, which needs images to calibrate on (give --data)"),
        ({"calibration": "best"}, True, "quantize.calibration: 'best' is not valid"),
        ({"percentile": 99.9}, True, "quantize.percentile: belongs to calibration: percentile"),
        ({"keep_float": ["lasst"]}, True, "did you mean 'last'?"),
    ],
)
def test_what_cannot_be_is_one_message_and_nothing_written(
    quantize: dict[str, Any],
    with_data: bool,
    message: str,
    model: Path,
    data: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    plan, out = written(tmp_path, **quantize), tmp_path / "out.onnx"
    given = ["--data", str(data)] if with_data else []
    assert main(["optimize", str(model), "--plan", str(plan), "-o", str(out), *given]) == 2
    (line,) = capfd.readouterr().err.strip().splitlines()
    assert message in line
    assert not out.exists()


def test_the_function_takes_feeds_once() -> None:
    result = graphfold.optimize(network(), PLAN, data=feeds())
    assert counts(result.folded)["QuantizeLinear"]
    assert "BatchNormalization" in counts(result.reference)
    quantized = result.report.quantized
    assert quantized is not None
    assert quantized.model is result.folded
    with pytest.raises(UsageError, match="images to calibrate"):
        graphfold.optimize(network(), PLAN)


def test_few_images_serve_both() -> None:
    result = graphfold.optimize(network(), PLAN, data=feeds(2))
    quantized = result.report.quantized
    assert quantized is not None
    assert not quantized.apart
    assert quantized.calibrated == quantized.judged == 4
    assert "too few to set apart" in str(quantized.table().note)


def test_images_are_bounded_spread_and_set_apart() -> None:
    every = [{"x": np.full((8, 1), number)} for number in range(200)]
    calibrate, judge = split(every)
    numbers = [[int(feed["x"][0, 0]) for feed in each] for each in (calibrate, judge)]
    assert not set(numbers[0]) & set(numbers[1])
    assert len(numbers[0]) == 16
    assert numbers[0][0] == 0
    assert numbers[0][-1] == 198
    assert len(numbers[1]) == 50

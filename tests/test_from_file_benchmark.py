"""The benchmark from a model file alone judges what came out, and keeps what it has."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import onnx
import pytest
from builders import ModelBuilder

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import common
import from_file


def result(measured: float, confirmed: float, *warnings: str) -> dict[str, Any]:
    return {"measured": measured, "confirmed": confirmed, "warnings": list(warnings)}


@pytest.mark.parametrize(
    ("found", "outcome"),
    [
        (result(1.29, 1.31), "as asked"),
        (result(1.20, 1.31), "too slow"),
        (result(1.60, 1.62), "overshoots"),
        (result(1.60, 1.62, "1.62 times: no finer plan lies between"), "as fast as asked"),
    ],
)
def test_what_came_out_is_judged(found: dict[str, Any], outcome: str):
    assert from_file.outcome(found) == outcome


@pytest.mark.slow
def test_one_model_is_measured_and_another_one_refused(tmp_path: Path):
    build = ModelBuilder([1, 8, 32, 32])
    y = "x"
    for _ in range(4):
        y = build.op("Relu", build.conv(y, 8, 3, pad=1))
    file = tmp_path / "model.onnx"
    onnx.save(build.model(y), file)
    found = from_file.examine("model", file, tmp_path, 1.0)
    assert found["outcome"] in ("as asked", "as fast as asked", "too slow"), found
    assert found["segments"] > 0
    build = ModelBuilder([1, 8])
    onnx.save(build.model(build.op("Relu", "x", out="y")), file)
    refused = from_file.examine("model", file, tmp_path, 1.0)
    assert refused["outcome"] == "refused"
    assert "no convolutions" in refused["reason"]


def test_results_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    assert from_file.kept() == {}
    refused = {"model": "m", "outcome": "refused", "reason": "no convolutions", "seconds": 1.0}
    from_file.report([refused])
    assert from_file.kept() == {"m": refused}
    assert json.loads((tmp_path / "from_file.json").read_text())["environment"]
    assert "- m: no convolutions" in (tmp_path / "from_file.md").read_text()

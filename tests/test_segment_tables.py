"""What `inspect` tells of segments, and of the merges that cost forbids."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import onnx
import pytest
from builders import ModelBuilder

import graphfold
from graphfold.cost import analyze
from graphfold.graph import Graph
from graphfold.inspection import Inspection
from graphfold.model import load


def block(batch: int | str = 1) -> onnx.ModelProto:
    """An inverted residual: 4 channels to 24, a depthwise 3x3, and back."""
    build = ModelBuilder([batch, 4, 10, 12])
    wide = build.op("Relu", build.conv("x", 24, 1, out="a"), out="ra")
    wide = build.op("Relu", build.depthwise(wide, 3, pad=1, out="b"), out="rb")
    return build.model(build.op("Add", build.conv(wide, 4, 1, out="c"), "x", out="y"))


def chain(length: int) -> onnx.ModelProto:
    build = ModelBuilder([1, 4, 20, 20])
    value = "x"
    for _ in range(length):
        value = build.op("Relu", build.conv(value, 4, 3, pad=1))
    return build.model(value)


def segments(found: Inspection) -> dict[tuple[str, str], dict[str, Any]]:
    document = found.to_json()["segments"]
    return {(item["input"], item["output"]): item for item in document}


def titles(found: Inspection, **options: bool) -> dict[str, Any]:
    return {table.title.split(" (")[0]: table for table in found.tables(**options)}


def test_a_segment_tells_its_cost_now_and_merged() -> None:
    whole = segments(graphfold.inspect(block()))["x", "y"]
    pixels = 10 * 12
    assert whole["convs"] == ["a", "b", "c"]
    assert whole["activations"] == ["ra", "rb"]
    assert whole["joins"]
    assert whole["macs"] == pixels * (4 * 24 + 24 * 9 + 24 * 4)
    assert [(each["kernel"], each["macs"]) for each in whole["choices"]] == [
        ([3, 3], pixels * 4 * 4 * 9),
        ([1, 1], pixels * 4 * 4),
    ]
    assert whole["choices"][1]["removed_convs"] == ["b"]


def test_a_depthwise_result_costs_one_filter_per_channel() -> None:
    alone = segments(graphfold.inspect(block()))["ra", "b"]
    (choice,) = alone["choices"]
    assert choice["family"] == "depthwise"
    assert choice["macs"] == alone["macs"] == 10 * 12 * 24 * 9


def test_figures_agree_with_a_merge_that_a_plan_does() -> None:
    model = block()
    whole = segments(graphfold.inspect(model))["x", "y"]
    plan = {
        "graphfold_plan": 1,
        "segments": [{"input": "x", "output": "y", "boundary": "hoist"}],
    }
    folded = graphfold.optimize(model, plan, verify=False).model
    assert analyze(Graph(load(folded))).macs == whole["choices"][0]["macs"]


def test_sizes_that_are_not_known_leave_figures_out() -> None:
    build = ModelBuilder([1, 4, "h", "w"])
    model = build.model(build.conv(build.op("Relu", build.conv("x", 4, 3, pad=1)), 4, 3, out="y"))
    for item in segments(graphfold.inspect(model)).values():
        assert item["macs"] is None
        assert {each["macs"] for each in item["choices"]} == {None}
    known = graphfold.inspect(model, input_shapes={"x": (1, 4, 9, 9)})
    assert segments(known)["x", "y"]["choices"][0]["macs"] == 7 * 7 * 16 * 25


def test_the_batch_does_not_count() -> None:
    one, many = (segments(graphfold.inspect(block(batch))) for batch in (1, 8))
    assert one == many


def test_long_tables_are_shortened_and_say_so() -> None:
    found = graphfold.inspect(chain(12))
    short = titles(found)["Segments that one convolution may replace"]
    long = titles(found, all_segments=True)["Segments that one convolution may replace"]
    assert len(short.rows) == 15
    assert len(long.rows) == len(found.segments) == 12 * 13 // 2
    assert short.note is not None
    assert "--segments" in short.note
    assert long.note is None


def test_reasons_are_counted() -> None:
    build = ModelBuilder([1, 4, 9, 9])
    value = "x"
    for _ in range(3):
        value = build.op("Softmax", build.conv(value, 4, 1), axis=1)
    found = graphfold.inspect(build.model(value))
    (row,) = titles(found)["Segments that reach no further"].rows
    assert "is not linear" in row[0]
    assert row[2] == "3"
    assert len(found.to_json()["excluded_segments"]) == 3


def narrow(activation: bool = False) -> onnx.ModelProto:
    """8 channels to 2 and back: two convolutions that are cheaper than their product."""
    build = ModelBuilder([1, 8, 6, 6])
    value = build.conv("x", 2, 1, out="a")
    value = build.op("Relu", value) if activation else value
    return build.model(build.conv(value, 8, 1, out="y"))


def test_a_merge_that_cost_forbids_has_its_cost_told() -> None:
    found = graphfold.inspect(narrow())
    (item,) = found.to_json()["alternatives"]
    assert (item["input"], item["output"], item["convs"]) == ("x", "y", ["a", "y"])
    assert item["kernel"] == [1, 1]
    assert item["operations"] == [36 * 32, 36 * 64]
    grown = graphfold.optimize(narrow(), allow_growth=True, verify=False).model
    assert analyze(Graph(load(grown))).macs == item["operations"][1]
    assert "Linear runs that stay" in titles(found)


def test_runs_that_merge_or_are_not_linear_have_no_alternative() -> None:
    assert not graphfold.inspect(narrow(activation=True)).alternatives
    build = ModelBuilder([1, 4, 6, 6])
    wide = build.model(build.conv(build.conv("x", 32, 1), 4, 1))
    assert not graphfold.inspect(wide).alternatives
    assert "Linear runs that stay" not in titles(graphfold.inspect(wide))


@pytest.mark.parametrize("arguments", [[], ["--segments"]])
def test_the_command_prints_segments(tmp_path: Path, arguments: list[str]) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(chain(12), path)
    shown = inspect(path, *arguments)
    assert "Segments that one convolution may replace" in shown
    assert ("--segments shows all" in shown) == (not arguments)
    assert len(json.loads(inspect(path, "--json", *arguments))["segments"]) == 78


def inspect(path: Path, *arguments: str) -> str:
    command = [sys.executable, "-m", "graphfold", "inspect", str(path), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout

"""Measured latencies decide on loose merges that they know; multiply-adds on the others."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
from builders import ModelBuilder, assert_same_function

import graphfold
from graphfold.cli import main
from graphfold.errors import MeasuresError
from graphfold.measures import LatencyHeader, LatencyRow, LatencyTable, write_table


def chain() -> onnx.ModelProto:
    """3x3 then 1x1 to half the channels: fewer multiply-adds merged; then a 3x3, more merged."""
    build = ModelBuilder([1, 4, 12, 12])
    a = build.conv("x", 8, 3, out="a")
    b = build.conv(a, 4, 1, out="b")
    c = build.conv(b, 16, 3, out="c")
    return build.model(c)


def residual() -> onnx.ModelProto:
    build = ModelBuilder([1, 4, 12, 12])
    x = build.op("Relu", "x", out="read", channels=4)
    a = build.conv(x, 4, 3, pad=1, out="a")
    return build.model(build.op("Add", a, x, out="sum", channels=4))


def table(**values: float) -> LatencyTable:
    """Rows by `input_output` for steps, and by `input_output_kernel` for merges."""
    rows = []
    for key, value in values.items():
        source, target, *kernel = key.split("_")
        if kernel:
            size = int(kernel[0])
            rows.append(
                LatencyRow(
                    input=source, output=target, kernel=(size, size), family="dense",
                    removed_convs=(), value=value,
                )
            )  # fmt: skip
        else:
            rows.append(LatencyRow(input=source, output=target, unchanged=True, value=value))
    return LatencyTable(header=LatencyHeader(created_by="test"), rows=tuple(rows))


def convs(model: onnx.ModelProto, latency: LatencyTable | None) -> list[str]:
    result = graphfold.optimize(model, latency=latency)
    assert_same_function(model, result.model)
    return [node.output[0] for node in result.model.graph.node if node.op_type == "Conv"]


def test_without_a_table_multiply_adds_decide():
    assert convs(chain(), None) == ["b", "c"]


@pytest.mark.parametrize(
    ("values", "kept"),
    [
        ({"x_b_3": 1.0, "a_c_3": 5.0, "x_c_5": 9.0}, ["b", "c"]),
        ({"x_b_3": 9.0, "a_c_3": 1.0, "x_c_5": 9.0}, ["a", "c"]),
        ({"x_b_3": 9.0, "a_c_3": 9.0, "x_c_5": 1.0}, ["c"]),
        ({"x_b_3": 9.0, "a_c_3": 9.0, "x_c_5": 9.0}, ["a", "b", "c"]),
        ({}, ["a", "b", "c"]),
    ],
)
def test_the_fastest_split_of_a_chain_is_taken(values: dict[str, float], kept: list[str]):
    latency = table(x_a=1.0, a_b=1.0, b_c=1.0, **values)
    assert convs(chain(), latency) == kept


def test_a_chain_that_the_table_does_not_know_is_split_by_multiply_adds():
    assert convs(chain(), table(x_a=1.0, x_b_3=9.0)) == ["b", "c"]


@pytest.mark.parametrize(("merged", "nodes"), [(0.5, 2), (5.0, 3)])
def test_a_sum_merges_where_that_is_faster(merged: float, nodes: int):
    latency = table(read_a=1.0, a_sum=0.1, read_sum_3=merged)
    result = graphfold.optimize(residual(), latency=latency)
    assert len(result.model.graph.node) == nodes
    if nodes == 3:
        assert any("slower where it was measured" in each.reason for each in result.report.skipped)


def test_growth_that_is_asked_for_comes_first():
    latency = table(x_a=1.0, a_b=1.0, b_c=1.0, x_c_5=9.0)
    result = graphfold.optimize(chain(), latency=latency, allow_growth=True)
    assert len(result.model.graph.node) == 1


def test_a_table_of_another_model_is_an_error():
    with pytest.raises(MeasuresError, match="the model has no tensor"):
        graphfold.optimize(chain(), latency=table(x_other=1.0))


def test_the_command_takes_a_table(tmp_path: Path):
    onnx.save(chain(), tmp_path / "m.onnx")
    write_table(table(x_a=1.0, a_b=1.0, b_c=1.0, x_c_5=0.5), tmp_path / "t.json")
    arguments = ["optimize", str(tmp_path / "m.onnx"), "--latency", str(tmp_path / "t.json")]
    assert main([*arguments, "-o", str(tmp_path / "o.onnx"), "-q"]) == 0
    assert len(onnx.load(tmp_path / "o.onnx").graph.node) == 1


def test_of_very_many_problems_the_first_are_shown():
    rows = {f"u{n}_v{n}": 1.0 for n in range(30)}
    with pytest.raises(MeasuresError, match=r"60 problems(?s:.*)and 40 more") as caught:
        graphfold.optimize(chain(), latency=table(**rows))
    assert len(caught.value.problems) == 60

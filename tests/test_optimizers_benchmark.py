"""The comparison with other optimizers counts all nodes, and sees what is wrong."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from builders import ModelBuilder, run
from onnx import TensorProto, helper

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import networks
import tool_runs


def pair(tmp_path: Path, one: onnx.ModelProto, two: onnx.ModelProto) -> dict[str, Any]:
    paths = tmp_path / "one.onnx", tmp_path / "two.onnx"
    for proto, path in zip((one, two), paths, strict=True):
        onnx.save(proto, path)
    return tool_runs.compare(*paths)


def small(scale: float = 1.0, name: str = "y") -> onnx.ModelProto:
    build = ModelBuilder([1, 3, 4, 5])
    return build.model(build.op("Mul", "x", build.constant(scale), out=name))


def test_equal_models_are_right(tmp_path: Path) -> None:
    assert pair(tmp_path, small(), small(1 + 1e-5))["equal"]


def test_other_values_are_wrong(tmp_path: Path) -> None:
    found = pair(tmp_path, small(), small(1 + 1e-3))
    assert not found["equal"]
    assert 5 < found["largest"] < 11


def test_other_names_are_wrong(tmp_path: Path) -> None:
    found = pair(tmp_path, small(), small(name="z"))
    assert (found["equal"], found["reason"]) == (False, "outputs: 1 missing, 1 new (y)")


@pytest.mark.parametrize(("ir_version", "equal"), [(3, True), (4, False)])
def test_inputs_with_defaults_count_from_ir_version_4_on(
    tmp_path: Path, ir_version: int, equal: bool
) -> None:
    build = ModelBuilder([1, 3], opset=8, ir_version=ir_version)
    listed = helper.make_tensor_value_info(build.constant([2.0], "two"), TensorProto.FLOAT, [1])
    one = build.model(build.op("Mul", "x", "two", out="y"), more_inputs=[listed])
    two = onnx.ModelProto()
    two.CopyFrom(one)
    two.ir_version = 4
    del two.graph.input[1]
    assert pair(tmp_path, one, two)["equal"] is equal


def test_a_model_that_the_checker_refuses_is_wrong(tmp_path: Path) -> None:
    broken = small()
    broken.graph.node[0].attribute.append(helper.make_attribute("nonsense", 1))
    assert "the checker refuses it" in pair(tmp_path, small(), broken)["reason"]


def test_nodes_of_branches_count() -> None:
    branches = {
        key: helper.make_graph(
            [helper.make_node("Relu", ["x"], [key])],
            key,
            [],
            [helper.make_tensor_value_info(key, TensorProto.FLOAT, None)],
        )
        for key in ("then_branch", "else_branch")
    }
    build = ModelBuilder([1, 3])
    flag = build.constant(np.True_, dtype=bool)
    proto = build.model(build.op("If", flag, **branches))
    assert tool_runs.operators(proto) == {"If": 1, "Relu": 2}


def test_one_run_prints_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, target = tmp_path / "in.onnx", tmp_path / "out.onnx"
    onnx.save(small(), source)
    tool_runs.main("optimize", "graphfold", str(source), str(target))
    found = json.loads(capsys.readouterr().out)
    assert found["seconds"] > 0
    assert 10 < found["peak_mib"] < 10_000
    assert tool_runs.operators(onnx.load(target)) == {"Mul": 1}


def test_the_networks_say_something() -> None:
    deep = networks.deep(40)
    assert len(deep.graph.node) == 40
    x = np.random.default_rng(0).standard_normal((1, 8, 8, 8)).astype(np.float32)
    (y,) = run(deep, {"x": x})
    assert 0.01 < np.abs(y - x).max() < 100


def test_clips_go_with_their_bounds() -> None:
    build = ModelBuilder([1, 3])
    low = build.op("Constant", value_float=0.0)
    value = build.op("Clip", build.op("Neg", "x"), low)
    found = networks.without_clips(build.model(build.op("Exp", value, out="y")))
    assert [(n.op_type, list(n.input)) for n in found.graph.node][-1] == ("Exp", ["neg_2"])
    assert len(found.graph.node) == 2

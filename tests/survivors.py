"""What every model must survive: optimizing, as a whole and through files, without losing a field.

`assert_survives` is the whole promise; tests of kinds that no runtime here can run use
`optimized_twice` alone.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray

import graphfold
from graphfold.optimizer import Result

Feeds = Sequence[Mapping[str, NDArray[Any]]]


def ran(model: onnx.ModelProto | Path, feed: Mapping[str, Any]) -> list[Any]:
    """Outputs through onnxruntime with its own optimizations off."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    source = str(model) if isinstance(model, Path) else model.SerializeToString()
    session = ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    results: list[Any] = session.run(None, dict(feed))
    return results


def assert_equal(expected: Any, actual: Any, tolerance: float) -> None:
    """Equal values, or near ones where they are floating point; sequences item by item."""
    if isinstance(expected, list):
        assert len(expected) == len(actual)
        for one, two in zip(expected, actual, strict=True):
            assert_equal(one, two, tolerance)
    elif isinstance(expected, np.ndarray) and expected.dtype.kind == "f":
        assert (expected.shape, expected.dtype) == (actual.shape, actual.dtype)
        if expected.size:
            scale = float(np.max(np.abs(expected.astype(np.float64))))
            np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * scale)
    else:
        np.testing.assert_array_equal(actual, expected)


def optimized_twice(model: onnx.ModelProto | Path, **options: Any) -> Result:
    """Optimize: interface and input kept, the same bytes each time, and at rest afterwards."""
    original = onnx.load(model, load_external_data=False) if isinstance(model, Path) else model
    before = original.SerializeToString(deterministic=True)
    result = graphfold.optimize(model, **options)
    proto = result.model
    assert original.SerializeToString(deterministic=True) == before
    assert_same_fields(original, proto)
    again = graphfold.optimize(model, **options)
    assert serialized(again.model) == serialized(proto)
    rested = graphfold.optimize(result.folded, **options)
    changes = {each.name: each.applied for each in rested.report.statistics if each.applied}
    assert changes == {}
    assert serialized(rested.model) == serialized(proto)
    return result


def serialized(model: onnx.ModelProto) -> bytes:
    data: bytes = model.SerializeToString(deterministic=True)
    return data


def assert_same_fields(before: onnx.ModelProto, after: onnx.ModelProto) -> None:
    """Interface, versions and every field that is about the model as a whole."""
    assert list(after.graph.input) == list(before.graph.input)
    assert list(after.graph.output) == list(before.graph.output)
    for one, two in ((before, after), (before.graph, after.graph)):
        for field, value in one.ListFields():
            if field.name not in ("graph", "functions", "metadata_props", *_CONTENT):
                assert getattr(two, field.name) == value, field.name
        metadata = {item.key: item.value for item in two.metadata_props}
        assert {item.key: item.value for item in one.metadata_props}.items() <= metadata.items()
    assert [f.name for f in after.functions] == [f.name for f in before.functions]


_CONTENT = (
    *("node", "initializer", "sparse_initializer", "value_info"),
    "quantization_annotation",
)


def assert_survives(
    model: onnx.ModelProto,
    feeds: Feeds,
    *,
    tolerance: float = 2e-5,
    untouched_ok: bool = False,
    check: bool = True,
    **options: Any,
) -> Result:
    """Fields, determinism and rest as `optimized_twice`; and onnxruntime's results are equal."""
    result = optimized_twice(model, inputs=feeds, **options)
    verification = result.report.verification
    assert verification is not None
    assert verification.passed, verification.failure() or verification.reason
    if check:
        onnx.checker.check_model(result.model)
    for feed in feeds:
        for one, two in zip(ran(model, feed), ran(result.model, feed), strict=True):
            assert_equal(one, two, tolerance)
    if not untouched_ok:
        assert result.report.folds, "nothing was folded"
    return result


def through_files(path: Path, *arguments: str) -> tuple[Path, dict[str, Any]]:
    """Run the command on a file; returns the file written and its JSON document."""
    out = path.with_name(f"{path.stem}.out.onnx")
    command = [sys.executable, "-m", "graphfold", "optimize", str(path), "-o", str(out), "--json"]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    document: dict[str, Any] = json.loads(done.stdout)
    return out, document

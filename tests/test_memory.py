"""Large models pass through without being held, and one runtime session is open at a time."""

from __future__ import annotations

import gc
import sys
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from builders import ModelBuilder, op_types, random_input, run

import graphfold
from graphfold import runtime, spill
from graphfold.model import save

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import memory


def network() -> onnx.ModelProto:
    build = ModelBuilder([1, 64, 6, 6])
    value = "x"
    for _ in range(3):
        value = build.op("Relu", build.norm(build.conv(value, 64, 3, pad=1)))
    return build.model(value)


def test_peak_memory_of_a_whole_run_stays_below_the_model(tmp_path: Path) -> None:
    # Every weight is rewritten: holding the results alone would take the accepted memory.
    found = memory.measure(tmp_path, 8, "--no-verify")
    assert found["model_bytes"] > spill.SPILL_BYTES
    assert found["peak_bytes"] < memory.FACTOR * found["model_bytes"] + memory.ROOM
    folded = onnx.load(tmp_path / "out.onnx", load_external_data=False)
    assert "BatchNormalization" not in op_types(folded)
    assert op_types(folded).count("Conv") == 8


def test_spilled_weights_give_the_same_file_as_those_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = network()
    held = graphfold.optimize(model, verify=False)
    monkeypatch.setattr(spill, "SPILL_BYTES", 1 << 16)
    spilled = graphfold.optimize(model)
    on_disk = [
        value.const_value
        for value in spilled.folded.ir.graph.initializers.values()
        if isinstance(value.const_value, ir.ExternalTensor)
    ]
    assert len(on_disk) == 3
    for name, result in (("held", held), ("spilled", spilled)):
        save(result.folded, tmp_path / f"{name}.onnx")
    assert (tmp_path / "held.onnx").read_bytes() == (tmp_path / "spilled.onnx").read_bytes()
    assert held.model == spilled.model


def test_spilled_weights_live_as_long_as_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spill, "SPILL_BYTES", 1 << 16)
    model = network()
    folded = graphfold.optimize(model, verify=False).folded
    folders = {
        Path(value.const_value.base_dir)
        for value in folded.ir.graph.initializers.values()
        if isinstance(value.const_value, ir.ExternalTensor)
    }
    assert all(folder.is_dir() for folder in folders)
    feed = random_input(model)
    again = graphfold.optimize(folded, verify=False)
    np.testing.assert_allclose(run(again.model, feed)[0], run(model, feed)[0], atol=1e-4)
    del folded, again
    gc.collect()
    assert folders
    assert not any(folder.exists() for folder in folders)


def test_a_full_temporary_folder_keeps_weights_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spill, "SPILL_BYTES", 1 << 16)

    def full(path: Path, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    result = graphfold.optimize(network())
    assert result.report.verification is not None
    assert result.report.verification.passed


def test_one_session_is_open_at_a_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import onnxruntime

    alive: weakref.WeakSet[Any] = weakref.WeakSet()
    most = 0

    class Counted(onnxruntime.InferenceSession):
        def __init__(self, *args: Any, **options: Any) -> None:
            nonlocal most
            alive.add(self)
            most = max(most, len(alive))
            super().__init__(*args, **options)

    monkeypatch.setattr(onnxruntime, "InferenceSession", Counted)
    # As models over 2 GB go: through files.
    monkeypatch.setattr(runtime, "LARGEST_IN_MEMORY", 1 << 16)
    path = tmp_path / "m.onnx"
    onnx.save(network(), path)
    result = graphfold.optimize(path)
    assert result.report.verification is not None
    assert result.report.verification.passed
    assert most == 1

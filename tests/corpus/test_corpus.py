"""A part of the campaign that every change has to pass; `make corpus` runs all of it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from builders import ModelBuilder

import graphfold
from corpus import cases
from corpus.campaign import COLUMNS, counts, main
from corpus.cases import Case
from corpus.examine import examine, interface_differences
from corpus.worker import Worker

SLICES = 4
SMALL_NETWORKS = ("light_squeezenet", "light_shufflenet")
TRAINED = ("mlperftiny_kws_dscnn", "mtcnn_pnet", "mlperftiny_resnet8_int8")


def assert_passes(sample: Sequence[Case]) -> None:
    """All of them, and all that failed in one message."""
    assert sample, "there is nothing to check"
    with Worker() as worker:
        outcomes = [worker.examine(case) for case in sample]
    problems = [
        f"{each.part}/{each.name}: {problem}" for each in outcomes for problem in each.problems
    ]
    assert not problems, "\n".join(problems)
    assert sum(bool(each.compared) for each in outcomes) > len(outcomes) // 2


def every(part: str, step: int, number: int) -> list[Case]:
    """Each `step * SLICES`-th case of a part, another sample for each number."""
    found: Iterator[Case] = cases.PARTS[part](0)
    return list(itertools.islice(found, number * step, None, step * SLICES))


@pytest.mark.parametrize("number", range(SLICES))
def test_operators_of_the_standard(number: int):
    assert_passes(every("backend", 8, number))


@pytest.mark.parametrize("number", range(SLICES))
def test_generated_graphs(number: int):
    assert_passes(list(itertools.islice(cases.generated(1_000_000 + 15 * number), 15)))


def test_exported_layers():
    assert_passes([*every("simple", 2, 0), *every("simple", 2, 1)])


@pytest.mark.parametrize("name", SMALL_NETWORKS)
def test_classic_networks(name: str):
    assert_passes([case for case in cases.light(0) if case.name == name])


@pytest.mark.needs_shared
@pytest.mark.parametrize("name", TRAINED)
def test_trained_networks(name: str, shared: Path):
    assert_passes([case for case in cases.shared(0) if case.name == name])


# --- the campaign itself --------------------------------------------------------------------------


def test_a_seed_makes_the_same_graph():
    one, two = (next(cases.generated(7)) for _ in range(2))
    assert one.model == two.model
    assert one.model != next(cases.generated(8)).model
    np.testing.assert_array_equal(one.feeds[0]["x"], two.feeds[0]["x"])


def small() -> onnx.ModelProto:
    build = ModelBuilder([1, 4, 6, 5])
    return build.model(build.norm(build.conv("x", 6, 3), out="y"))


def test_a_wrong_fold_is_found(monkeypatch: pytest.MonkeyPatch):
    """The real optimizer's result, with a bias that is not its own."""
    real = graphfold.optimize

    def wrong(*arguments: Any, **options: Any) -> Any:
        result = real(*arguments, **{**options, "verify": False})
        for value in result.folded.ir.graph.initializers.values():
            tensor = value.const_value.numpy()
            value.const_value = ir.tensor(tensor * np.float32(1.01), name=value.name)
        return result

    monkeypatch.setattr(graphfold, "optimize", wrong)
    outcome = examine(Case("wrong", "backend", small().SerializeToString()), lambda stage: None)
    assert any("'y' differs" in problem for problem in outcome.problems)


def test_a_changed_interface_is_found():
    before, after = small(), small()
    assert interface_differences(before, after) == []
    after.graph.output[0].type.tensor_type.shape.dim[0].dim_param = "N"
    after.opset_import[0].version = 18
    assert interface_differences(before, after) == [
        "types of outputs differ",
        "opset_import differs",
    ]


def test_a_process_that_dies_is_a_finding_and_another_takes_over(tmp_path: Path):
    good = Case("good", "backend", small().SerializeToString())
    with Worker(seconds=60) as worker:
        first = worker.examine(good)
        process = worker._process
        process.kill()
        process.join()
        second = worker.examine(good)
    assert first.problems == second.problems == []
    assert second.compared == "onnxruntime"


def test_a_model_that_takes_too_long_is_a_finding():
    with Worker(seconds=0.0) as worker:
        outcome = worker.examine(Case("slow", "backend", small().SerializeToString()))
    assert "died or hung" in outcome.problems[0]


def test_the_campaign_counts_and_fails(capsys: pytest.CaptureFixture[str]):
    assert main(["--part", "hazards", "--limit", "2"]) == 0
    assert "onnxruntime" in capsys.readouterr().out
    wrong = examine(Case("odd", "backend", small().SerializeToString()), lambda stage: None)
    wrong.problems.append("something")
    row = dict(zip(COLUMNS, counts([wrong])[0], strict=True))
    assert (row["models"], row["fewer nodes"], row["failed"]) == ("1", "1", "1")

"""Importance by measured damage: rows, figures, resuming, and plans made of them."""

from __future__ import annotations

import json
import multiprocessing
import os
from pathlib import Path

import numpy as np
import onnx
import pytest
from builders import ModelBuilder, op_types, run
from fake_timer import faked, network

import graphfold
from graphfold.calibration import fitted_rows, score, workers
from graphfold.calibration.dataset import read_dataset
from graphfold.calibration.families import FAMILIES, check_families
from graphfold.calibration.judge import Judge
from graphfold.calibration.nodetimes import NodeTimes, measure_nodes
from graphfold.calibration.planning import make_plan
from graphfold.calibration.quantize import roughly_quantized
from graphfold.calibration.score import Score, score_model
from graphfold.calibration.split import read_split
from graphfold.calibration.workbench import Replacement, Workbench
from graphfold.cli import main
from graphfold.errors import DataError, GraphfoldError, UsageError
from graphfold.measures import ImportanceRow, read_importance, read_latency, write_table
from graphfold.model import adopt, load, to_proto
from graphfold.specs import model_inputs

SAMPLES = 100


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    path = tmp_path / "inputs.npz"
    np.savez(path, x=rng.normal(size=(SAMPLES, 3, 16, 16)).astype(np.float32))
    return path


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model.onnx"
    onnx.save(network(), path)
    return path


def scored(model: Path, inputs: Path, output: Path | None = None, **options) -> Score:
    loaded = load(model)
    return score_model(loaded, read_dataset(str(inputs), model_inputs(loaded)), output, **options)


def without_dates(path: Path) -> dict:
    document = json.loads(path.read_text())
    del document["header"]["created"]
    return document


def check_same(rows, others) -> None:
    """Equal but for rounding: which tensors are captured decides what onnxruntime fuses."""
    assert [row.key for row in rows] == [row.key for row in others]
    for one, two in zip(rows, others, strict=True):
        assert one.value == pytest.approx(two.value, rel=1e-3)
        assert (one.unexplained is None) == (two.unexplained is None)
        assert one.unexplained is None or one.unexplained == pytest.approx(two.unexplained, 1e-3)


def by_family(rows, family: str) -> list[ImportanceRow]:
    return [row for row in rows if row.family == family]


# Rows and figures -----------------------------------------------------------------------------


def test_every_family_has_rows_of_its_own(model, inputs):
    found = scored(model, inputs)
    rows = found.table.rows
    assert {row.family for row in rows} == set(FAMILIES) - {"low_rank"}
    assert all(row.weights == "regress" for row in rows if row.family != "identity")
    assert all(row.value <= 0 for row in rows)
    assert found.table.no_change == 0
    assert found.table.header.method == "regress"
    narrow = by_family(rows, "narrow")
    assert {row.width for row in narrow} == {8}
    assert all(row.kernel is None for row in narrow)
    assert (found.fitted_on, found.judged_on) == (84, 16)
    assert all(row.psnr is not None and row.agreement is None for row in rows)


def test_a_value_is_the_damage_of_the_network_with_that_change_alone(model, inputs):
    found = scored(model, inputs, families=("narrow", "dense", "identity"))
    loaded = load(model)
    split = read_split(read_dataset(str(inputs), model_inputs(loaded)))
    bench = Workbench(graphfold.optimize(loaded).folded)
    originals = [{"y": run(network(), feed)[0]} for feed in split.held]
    judge = Judge(originals)
    for family in ("narrow", "dense", "identity"):
        row = by_family(found.table.rows, family)[0]
        key = (row.input, row.output)
        replacement = Replacement(row.family, row.width, row.kernel)
        if family == "narrow":
            bench.collect(split.fitted, inner=[key])
        elif family == "dense":
            bench.collect(split.fitted, inner=[], segments={key: row.kernel})
        else:
            replacement = Replacement("identity")
        proto = bench.build({key: replacement})
        verdict = judge.verdict([{"y": run(proto, feed)[0]} for feed in split.held])
        assert row.value == pytest.approx(-verdict.damage, rel=1e-3)
        assert row.psnr == pytest.approx(verdict.psnr, rel=1e-3)
        assert verdict.damage > 1e-7


def test_classes_are_told_with_agreement_and_accuracy(tmp_path):
    def classifier(shift: np.ndarray) -> onnx.ModelProto:
        build = ModelBuilder(("N", 3, 8, 8))
        x = build.op("Relu", build.norm(build.conv("x", 16, 3, pad=1)))
        x = build.op("Relu", build.norm(build.conv(x, 16, 3, pad=1)))
        x = build.op("Flatten", build.op("GlobalAveragePool", build.conv(x, 4, 1)))
        return build.model(build.op("Sub", x, build.constant(shift), out="y"))

    rng = np.random.default_rng(0)
    images = rng.normal(size=(SAMPLES, 3, 8, 8)).astype(np.float32)
    # All classes are to be among the answers.
    logits = run(classifier(np.zeros((1, 4))), {"x": images})[0]
    proto = classifier(logits.mean(axis=0, keepdims=True))
    labels = run(proto, {"x": images})[0].argmax(axis=1)
    np.savez(tmp_path / "i.npz", x=images, labels=labels)
    onnx.save(proto, tmp_path / "m.onnx")
    found = scored(tmp_path / "m.onnx", tmp_path / "i.npz")
    for row in found.table.rows:
        # The labels are the model's own answers here.
        assert row.agreement == row.accuracy
        assert row.psnr is None
    assert len({row.agreement for row in found.table.rows}) > 1
    texts = "\n".join(str(row) for table in found.tables() for row in table.rows)
    assert "narrow to 8" in texts


def test_families_and_length_bound_what_is_tried(model, inputs):
    only = scored(model, inputs, families=("identity",))
    assert {row.family for row in only.table.rows} == {"identity"}
    short = scored(model, inputs, families=("dense",), longest=2)
    longer = scored(model, inputs, families=("dense",), longest=4)
    assert set(short.table.rows) < set(longer.table.rows)


def test_no_input_is_both_fitted_and_judged_on(inputs):
    loaded = load(network())
    split = read_split(read_dataset(str(inputs), model_inputs(loaded)))
    held = {feed["x"].tobytes() for feed in split.held}
    assert len(split.feeds) == len(split.fitted) + len(split.held)
    assert not any(feed["x"].tobytes() in held for feed in split.fitted)


def test_too_few_inputs_are_told(tmp_path, model):
    np.savez(tmp_path / "few.npz", x=np.zeros((12, 3, 16, 16), np.float32))
    with pytest.raises(DataError, match="too few to fit on some and judge on others"):
        scored(model, tmp_path / "few.npz")


def test_unknown_families_are_told():
    assert check_families(["identity", "dense"]) == ("dense", "identity")
    with pytest.raises(UsageError, match="'narow' is not known"):
        check_families(["narow"])
    with pytest.raises(UsageError, match="names none"):
        check_families([])


# Resuming -------------------------------------------------------------------------------------


class Killed(Exception):  # noqa: N818 - stands for a signal
    pass


def test_a_killed_run_continues_and_comes_to_the_same_table(model, inputs, tmp_path, monkeypatch):
    monkeypatch.setattr(score, "_BATCH", 3)
    whole, parts = tmp_path / "whole.json", tmp_path / "parts.json"
    scored(model, inputs, whole)

    seen = []

    def kill(stage, done, total):
        del total
        if stage == "measuring damage":
            seen.append(done)
        if len(seen) == 4:
            raise Killed

    with pytest.raises(Killed):
        scored(model, inputs, parts, progress=kill)
    assert not parts.exists()
    assert Path(f"{parts}.partial").exists()
    found = scored(model, inputs, parts)
    assert found.continued == 9
    assert not Path(f"{parts}.partial").exists()
    check_same(read_importance(parts).rows, read_importance(whole).rows)


def test_little_memory_makes_no_other_table(model, inputs, monkeypatch):
    whole = scored(model, inputs).table.rows
    passes = []
    monkeypatch.setattr(score, "_MOST_BYTES", 1)
    monkeypatch.setattr(
        Workbench, "forget", lambda self, own=Workbench.forget: (passes.append(1), own(self))
    )
    check_same(scored(model, inputs).table.rows, whole)
    assert len(passes) > 3


def test_a_run_on_other_data_is_not_continued(model, inputs, tmp_path):
    output = tmp_path / "table.json"

    def kill(stage, done, total):
        del total
        if stage == "measuring damage" and done:
            raise Killed

    with pytest.raises(Killed):
        scored(model, inputs, output, progress=kill)
    with np.load(inputs) as file:
        np.savez(inputs, x=file["x"] + 1)
    with pytest.raises(UsageError, match="begun otherwise: inputs"):
        scored(model, inputs, output)


def test_the_same_data_give_the_same_table(model, inputs, tmp_path):
    paths = [tmp_path / "one.json", tmp_path / "two.json"]
    for path in paths:
        scored(model, inputs, path)
    assert without_dates(paths[0]) == without_dates(paths[1])
    assert len(read_importance(paths[0]).rows) > 10


# Several processes ----------------------------------------------------------------------------


def test_any_number_of_processes_makes_the_same_table(model, inputs, tmp_path, monkeypatch):
    monkeypatch.setattr(score, "_BATCH", 3)
    paths = [tmp_path / "one.json", tmp_path / "two.json"]
    scored(model, inputs, paths[0])
    data = read_dataset(str(inputs), model_inputs(load(model)))
    found = graphfold.score(str(model), data, paths[1], jobs=2)
    assert without_dates(paths[0]) == without_dates(paths[1])
    assert read_importance(paths[1]) == found.table
    assert not multiprocessing.active_children()


def test_what_several_processes_measured_is_continued_by_one(model, inputs, tmp_path, monkeypatch):
    monkeypatch.setattr(score, "_BATCH", 3)
    whole, parts = tmp_path / "whole.json", tmp_path / "parts.json"
    scored(model, inputs, whole)

    def kill(stage, done, total):
        del total
        if stage == "measuring damage" and done >= 6:
            raise Killed

    with pytest.raises(Killed):
        scored(model, inputs, parts, jobs=2, progress=kill)
    assert not multiprocessing.active_children()
    found = scored(model, inputs, parts)
    assert found.continued >= 6
    check_same(read_importance(parts).rows, read_importance(whole).rows)


def die(task):
    os._exit(1)


def test_a_worker_that_dies_is_told(model, inputs, monkeypatch):
    monkeypatch.setattr(workers, "_measure", die)
    with pytest.raises(GraphfoldError, match="a worker process ended"):
        scored(model, inputs, families=("identity",), jobs=2)


# Plans ----------------------------------------------------------------------------------------


@pytest.fixture
def times(monkeypatch):
    """Widths that win in proportion, so that nothing depends on this machine."""

    def measured(bench, feed, **options):
        del feed, options
        found = NodeTimes(bench)
        monkeypatch.setattr(
            found.__class__,
            "predict",
            lambda self, state: 1 - sum(0.1 * (1 - each.width / 16) for each in state.values()),
        )
        return found

    monkeypatch.setattr(fitted_rows, "measure_nodes", measured)


def test_a_profile_has_rows_of_what_only_fits_allow(times, tmp_path):
    plain, found = faked(), faked(tmp_path / "latency.json", fitted=True)
    assert plain.fits == 0
    assert found.fits == len(found.table.rows) - len(plain.table.rows) > 0
    narrow = [row for row in found.table.rows if row.family == "narrow"]
    assert narrow
    for row in narrow:
        steps = [r for r in found.table.rows if r.unchanged and r.value > 0]
        assert 0 <= row.value < sum(step.value for step in steps)
    assert read_latency(tmp_path / "latency.json") == found.table


@pytest.mark.parametrize("families", [("narrow",), ("dense", "pointwise"), ("identity",), FAMILIES])
def test_plans_of_measured_damages_are_fitted_and_folded(times, model, inputs, tmp_path, families):
    latencies = faked(fitted=True).table
    importances = scored(model, inputs, families=families).table
    found = make_plan(load(model), latency=latencies, importance=importances, frontier=True)
    points = found.planning.points()
    assert len(points) > 1
    best = max(point.speedup for point in points)
    assert best > 1
    chosen = make_plan(load(model), latency=latencies, importance=importances, speedup=best)
    assert chosen.plan is not None
    for segment in chosen.plan.segments:
        assert segment.family in (*families, "dense")
        assert segment.is_fitted or segment.family == "identity"
    chosen.write(str(tmp_path / "plan.json"), None)
    arguments = ["optimize", str(model), "--plan", str(tmp_path / "plan.json")]
    code = main([*arguments, "--data", str(inputs), "-o", str(tmp_path / "out.onnx"), "-q"])
    assert code == 0
    out = onnx.load(tmp_path / "out.onnx")
    assert "BatchNormalization" not in op_types(out)
    before, after = (sum(np.prod(i.dims) for i in p.graph.initializer) for p in (network(), out))
    assert after < before


def test_a_table_of_fits_still_serves_importances_without_data(times, model):
    latencies = faked(fitted=True).table
    plain = make_plan(load(model), latency=faked().table, importance="macs", frontier=True)
    found = make_plan(load(model), latency=latencies, importance="macs", frontier=True)
    assert len(found.planning.points()) == len(plain.planning.points())


def test_measured_damages_are_for_one_method(times, model, inputs):
    importances = scored(model, inputs, families=("identity",)).table
    with pytest.raises(UsageError, match="about merged weights"):
        make_plan(
            load(model),
            latency=faked(fitted=True).table,
            importance=importances,
            speedup=1.1,
            method="depthshrinker",
        )


def test_widths_and_ranks_are_part_of_a_rows_key():
    base = ImportanceRow(input="a", output="b", family="narrow", weights="regress", value=0.0)
    eight = base.model_copy(update={"width": 8})
    assert eight.common(base.model_copy(update={"width": 16})) is None
    assert eight.common(eight) == 3
    assert eight.common(base) == 2
    low = ImportanceRow(input="a", output="b", family="low_rank", rank=4, value=0.0)
    assert low.common(low.model_copy(update={"rank": 8})) is None
    assert low.key != low.model_copy(update={"rank": 8}).key


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_kernels_of_narrowed_convolutions_are_known_by_name(dtype):
    """In INT8 too, where the runtime renames them: else no width would win anything."""
    bench = fitted_rows.sketch(load(network()))
    feed = {"x": np.random.default_rng(0).normal(size=(1, 3, 16, 16)).astype(np.float32)}

    def quantized(proto):
        return to_proto(roughly_quantized(adopt(proto, check=False), feed))

    times = measure_nodes(bench, feed, convert=quantized if dtype == "int8" else None)
    convs = {node for place in bench.inner.values() for node in place.nodes}
    known = {node for node in convs if node.op_type == "Conv"}
    assert len(known) >= 3
    assert known <= set(times.samples)


# The command ----------------------------------------------------------------------------------


def test_the_command_writes_a_table(model, inputs, tmp_path, capfd):
    out = tmp_path / "importance.json"
    arguments = ["score", str(model), "--data", str(inputs), "-o", str(out)]
    assert main([*arguments, "--families", "narrow,identity", "--samples", "60", "--json"]) == 0
    document = json.loads(capfd.readouterr().out)
    assert set(document["families"]) == {"narrow", "identity"}
    table = read_importance(out)
    assert len(table.rows) == document["rows"]
    write_table(table, tmp_path / "again.json")
    assert read_importance(tmp_path / "again.json") == table


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["m.onnx"], "score what?"),
        (["m.onnx", "--data", "d.npz", "--method", "taylor"], "'taylor' is not known"),
        (["m.onnx", "--data", "d.npz", "--import", "f.csv"], "contradict each other"),
        (["m.onnx", "--data", "d.npz", "--baseline", "1"], "belongs to --import"),
        (["m.onnx", "--data", "d.npz"], "where to write the table?"),
    ],
)
def test_misuse_is_told(arguments, text, capsys):
    assert main(["score", *arguments]) == 2
    assert text in " ".join(capsys.readouterr().err.split())

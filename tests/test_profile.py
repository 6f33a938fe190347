"""Latency tables: what is measured, what rows mean, and that a killed run continues."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import onnx
import pytest
from builders import ModelBuilder
from fake_timer import WHOLE, FakeTimer, faked, network

import graphfold
from graphfold.calibration import kernels, measuring, timing
from graphfold.calibration.journal import Journal
from graphfold.calibration.kernels import (
    Batch,
    Profiled,
    kernels_of_runs,
    own_kernels,
    undisturbed,
)
from graphfold.calibration.profile import profile_model
from graphfold.calibration.snippets import Snippets, is_hopeless
from graphfold.calibration.timing import DeviceTimer, Settings
from graphfold.calibration.wholes import scale_of
from graphfold.candidates import find_candidates
from graphfold.cli import main
from graphfold.cuts import cut_layout
from graphfold.depth_table import Ends
from graphfold.drops import find_drops
from graphfold.errors import UsageError
from graphfold.graph import Graph
from graphfold.measures import read_latency
from graphfold.model import load
from graphfold.sizes import resolved_shapes


@pytest.fixture(autouse=True)
def _batches(monkeypatch):
    monkeypatch.setattr(measuring, "_MOST_IN_A_BATCH", measuring._MOST_IN_A_BATCH)


def parts_of(proto: onnx.ModelProto):
    """Candidates, the snippets of all steps, and the factory that made them."""
    graph = Graph(load(proto))
    candidates = find_candidates(graph)
    snippets = Snippets(graph, candidates.sites, resolved_shapes(graph))
    steps = [snippets.unchanged(step) for step in cut_layout(candidates).steps]
    return candidates, steps, snippets


def ops(snippet) -> list[str]:
    return [node.op_type for node in snippet.nodes]


def one_run(batch: Batch) -> dict[int, float]:
    proto = batch.proto.SerializeToString()
    with Profiled(proto, threads=1, provider="CPUExecutionProvider") as profiled:
        profiled.session.run(batch.feed())
        (events,) = profiled.runs()
    return own_kernels(events)


def without_times(path: Path) -> dict:
    document = json.loads(path.read_text())
    del document["header"], document["rest"]
    for row in document["rows"]:
        del row["value"], row["spread"]
    return document


# What is measured -----------------------------------------------------------------------------


def test_steps_are_measured_folded_and_with_their_activation():
    _, steps, _ = parts_of(network())
    assert [ops(step) for step in steps] == [
        ["Conv", "Relu"],
        ["Conv", "Relu"],
        ["Conv", "Relu"],
        ["Conv"],
        ["Add"],
        ["Conv", "Relu"],
        ["Conv"],
    ]


def test_a_choice_is_one_convolution_with_the_activation_behind_the_segment():
    candidates, _, snippets = parts_of(network())
    for candidate in candidates.found:
        for choice in candidate.choices:
            found = snippets.chosen(candidate, choice)
            conv = onnx.helper.get_attribute_value
            attributes = {item.name: conv(item) for item in found.nodes[0].attribute}
            assert tuple(attributes["kernel_shape"]) == choice.kernel
            behind = [usage.node.op_type for usage in candidate.output.uses()]
            assert ops(found) == (["Conv", "Relu"] if behind == ["Relu"] else ["Conv"])


def test_every_snippet_runs_and_has_the_shape_it_says():
    candidates, steps, snippets = parts_of(network())
    chosen = [snippets.chosen(each, choice) for each in candidates.found for choice in each.choices]
    every = [part for each in (*steps, *chosen) for part in each.measured_parts()]
    batch = Batch(every, snippets.opsets)
    onnx.checker.check_model(batch.proto, full_check=True)
    assert sorted(one_run(batch)) == list(range(len(every)))


def test_the_runtime_does_not_take_two_snippets_for_one():
    _, steps, snippets = parts_of(network())
    makers = steps[4].measured_parts()[1:]
    found = one_run(Batch([*makers, *steps, *makers], snippets.opsets))
    assert len(found) == len(steps) + 2 * len(makers)


def test_equal_operators_at_equal_shapes_are_measured_once():
    build = ModelBuilder((1, 8, 8, 8))
    x = "x"
    for _ in range(3):
        x = build.op("Relu", build.norm(build.conv(x, 8, 3, pad=1)))
    _, steps, _ = parts_of(build.model(build.conv(x, 8, 1, out="y")))
    first, second, third, last = (step.digest for step in steps)
    # The first reads the network's input, in the layout in which it comes.
    assert second == third
    assert len({first, second, last}) == 3


def test_what_the_runtime_fuses_is_measured_with_what_makes_its_input():
    _, steps, _ = parts_of(network())
    fused = [len(step.measured_parts()) for step in steps]
    assert fused == [1, 1, 1, 1, 3, 1, 1]


@pytest.mark.parametrize(("convs", "hopeless"), [(2, False), (12, True)])
def test_a_replacement_that_is_far_too_large_is_hopeless(convs, hopeless):
    build = ModelBuilder((1, 32, 32, 32))
    x = "x"
    for _ in range(convs):
        x = build.op("Relu", build.conv(x, 32, 3, pad=1))
    candidates, steps, snippets = parts_of(build.model(x))
    longest = max(candidates.found, key=lambda each: len(each.nodes))
    found = snippets.chosen(longest, longest.choices[0])
    assert is_hopeless(found, steps) == hopeless


def event(name: str, ts: int, dur: int, op_name: str = "Conv") -> dict:
    return {
        "cat": "Node",
        "name": f"{name}_kernel_time",
        "ts": ts,
        "dur": dur,
        "args": {"op_name": op_name},
    }


def test_changes_of_layout_count_where_they_are_caused():
    run = [
        event("part0/front/in0_nchwc", 0, 100),
        event("ReorderOutput_1", 1, 7, "ReorderOutput"),
        event("part0/own/node0", 2, 50),
        event("ReorderInput_1", 3, 9, "ReorderInput"),
        event("part0/back/out_nchwc", 4, 100, "GlobalAveragePool"),
        event("ReorderOutput_2", 5, 1000, "ReorderOutput"),
        event("part1/front/in0_nchwc", 6, 100),
        event("part1/own/y_nchwc", 7, 20),
        event("part1/back/out_nchwc", 8, 100, "GlobalAveragePool"),
        event("ReorderOutput_3", 9, 1000, "ReorderOutput"),
    ]
    (events,) = kernels_of_runs([*reversed(run), {"name": "model_run"}])
    # Durations are cut to microseconds: half a one more for each kernel.
    assert own_kernels(events) == pytest.approx({0: 0.0675, 1: 0.0205})


def test_a_network_is_the_sum_of_its_kernels_undisturbed():
    # Something else ran in every run, each time beside another kernel.
    runs = [[event(f"k{i}", i, 1000 if i == disturbed else 99) for i in range(4)]
            for disturbed in range(4)]  # fmt: skip
    assert kernels.all_kernels(runs) == pytest.approx(4 * 0.0995)


def test_disturbed_rounds_do_not_count():
    quiet = [1.0, 1.02, 0.98] * 4
    assert undisturbed([*quiet, 5.0, 9.0, 7.0]) == pytest.approx(1.0, rel=0.03)
    assert undisturbed([3.0]) == 3.0


@pytest.mark.parametrize("by_kernels", [True, False])
def test_the_device_measures_larger_operators_as_slower(by_kernels):
    _, steps, snippets = parts_of(network())
    timer = DeviceTimer(load(network()), Settings(), kernels=by_kernels)
    assert timer.input_shapes == {"x": (1, 3, 16, 16)}
    build = ModelBuilder((1, 64, 64, 64))
    x = build.op("Relu", build.conv("x", 64, 3, pad=1))
    _, large, _ = parts_of(build.model(build.conv(x, 64, 3, pad=1, out="y")))
    small, larger = timer.measure([steps[1], large[1]], snippets.opsets, 6, 10.0)
    assert larger.ratio > 5 * small.ratio
    whole, share = timer.compare(load(network()))
    assert whole > 0
    assert share == pytest.approx(1.0, rel=0.5)
    assert timer.compare(None)[1] == 1.0


# Tables ---------------------------------------------------------------------------------------


def test_a_table_has_a_row_for_every_step_and_choice_and_adds_up(tmp_path):
    found = faked(tmp_path / "latency.json")
    table = read_latency(tmp_path / "latency.json")
    assert table == found.table
    candidates, steps, _ = parts_of(network())
    unchanged = [row for row in table.rows if row.unchanged]
    assert len(unchanged) == len(steps) == found.steps
    alone = sum(len(each.convs) == 1 for each in candidates.found)
    changed = len(table.rows) - len(unchanged) - found.drops - found.additions
    assert changed + found.left_out == candidates.entries - alone
    assert found.drops == len(find_drops(candidates)) > 0
    assert found.additions == len(Ends(candidates).free) > 0
    assert sum(row.value for row in unchanged) + table.rest == pytest.approx(WHOLE)
    assert table.header.model.sha256
    assert not (tmp_path / "latency.json.partial").exists()


def test_two_machines_tables_differ_in_header_and_times_only(tmp_path):
    class Other(FakeTimer):
        device = "phone"

        def measure(self, *arguments):
            samples = super().measure(*arguments)
            return [timing.Sample(3e-3 / (1 + each.ratio), 0.0) for each in samples]

    faked(tmp_path / "a.json")
    faked(tmp_path / "b.json", Other)
    a, b = (read_latency(tmp_path / name) for name in ("a.json", "b.json"))
    assert [row.value for row in a.rows] != [row.value for row in b.rows]
    assert without_times(tmp_path / "a.json") == without_times(tmp_path / "b.json")


def test_the_scale_makes_both_ends_exact():
    scale = scale_of(0.8, 0.3, 0.45)
    rest = 1 - scale * 0.8
    assert rest + scale * 0.3 == pytest.approx(0.45)
    assert 1 - scale_of(0.99, 0.2, 0.1) * 0.99 == pytest.approx(0.0)


def test_spread_above_ten_percent_is_measured_again_and_told():
    class Wild(FakeTimer):
        def measure(self, parts, *arguments):
            samples = super().measure(parts, *arguments)
            return [timing.Sample(each.ratio, 0.3) for each in samples]

    timers = []

    def make(model, settings):
        timers.append(Wild(model, settings))
        return timers[0]

    warnings = faked(timer=make).warnings
    assert any("quieter machine" in text for text in warnings)
    assert len(timers[0].seen) == 3 * len(set(timers[0].seen))


def test_long_runs_are_compared_in_few_rounds(monkeypatch):
    timer = DeviceTimer(load(network()), Settings())
    runs = []
    monkeypatch.setattr(timer, "_whole", lambda: runs.append(1))
    monkeypatch.setattr(timer, "_seconds", 2 * timing._SHORT_SECONDS)
    monkeypatch.setattr(timing, "_COMPARED_SECONDS", 0.0)
    monkeypatch.setattr(timing, "_LONGEST_COMPARISON", 0.0)
    assert timer.compare(None)[1] == 1
    assert len(runs) == timing._WARM_UP_RUNS + timing._FEWEST_ROUNDS


def test_long_rounds_are_few(monkeypatch):
    timer = DeviceTimer(load(network()), Settings())
    assert timer._alternate(lambda: None, lambda: None, 20, 0.0) == timing._FEWEST_ROUNDS
    monkeypatch.setattr(timing, "_LONG_SECONDS", 0.0)
    assert timer._alternate(lambda: None, lambda: None, 20, 0.0) == timing._FEWEST_LONG_ROUNDS


def test_a_table_tells_the_sizes_that_it_was_measured_at():
    assert faked().table.header.inputs == {"x": (1, 3, 16, 16)}


def test_a_time_budget_is_shared_out(monkeypatch):
    clock = [1000.0]
    monkeypatch.setattr(measuring.time, "monotonic", lambda: clock[0])
    given = []

    class Watched(FakeTimer):
        def measure(self, parts, opsets, rounds, seconds):
            given.append(seconds)
            clock[0] += seconds
            return super().measure(parts, opsets, rounds, seconds)

    faked(timer=Watched, time_budget=20.0)
    assert all(seconds > 0 for seconds in given)
    assert sum(given) == pytest.approx(20.0)


# Interruptions --------------------------------------------------------------------------------


def test_a_killed_run_continues_where_it_was(tmp_path):
    output = tmp_path / "latency.json"
    partial = tmp_path / "latency.json.partial"
    command = [sys.executable, str(Path(__file__).parent / "fake_timer.py"), str(output)]
    process = subprocess.Popen(command)
    deadline = time.monotonic() + 60
    while not partial.exists() or partial.read_bytes().count(b"\n") < 4:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert not output.exists()
    lines = partial.read_text().splitlines()[1:]
    done = {key for line in lines for key in json.loads(line)}
    timers = []

    def make(model, settings):
        timers.append(FakeTimer(model, settings))
        return timers[0]

    found = faked(output, make)
    assert found.continued == len(done) >= 3
    assert not done & set(timers[0].seen)
    assert len(done) + len(timers[0].seen) == found.distinct
    assert found.table.rows == faked().table.rows
    assert not partial.exists()


@pytest.mark.parametrize("cut", [1, 20, 60])
def test_a_line_that_was_cut_off_does_not_count(tmp_path, cut):
    path = tmp_path / "journal"
    with Journal(path, {"what": "a"}) as journal:
        journal.add({"one": 1})
        journal.add({"two": [2.5, "a long value that is cut off somewhere in its middle, or at"]})
    path.write_bytes(path.read_bytes()[:-cut])
    with Journal(path, {"what": "a"}) as journal:
        assert journal.entries == {"one": 1}
        journal.add({"three": 3})
    with Journal(path, {"what": "a"}) as journal:
        assert journal.entries == {"one": 1, "three": 3}


def test_a_journal_of_another_model_or_settings_is_not_continued(tmp_path):
    path = tmp_path / "journal"
    with Journal(path, {"threads": 1}) as journal:
        journal.add({"one": 1})
    before = path.read_bytes()
    with pytest.raises(UsageError, match="threads 1, now 4"):
        Journal(path, {"threads": 4})
    assert path.read_bytes() == before
    path.write_bytes(b"something else\n")
    with pytest.raises(UsageError, match="no journal"):
        Journal(path, {"threads": 1})


def test_two_profiles_do_not_write_one_journal(tmp_path):
    pytest.importorskip("fcntl")
    with (
        Journal(tmp_path / "journal", {}),
        pytest.raises(UsageError, match="another run"),
    ):
        Journal(tmp_path / "journal", {})


# The command ----------------------------------------------------------------------------------


@pytest.fixture
def run(capfd):
    def call(*arguments: object) -> tuple[int, str, str]:
        code = main([str(argument) for argument in arguments])
        found = capfd.readouterr()
        return code, found.out, found.err

    return call


@pytest.fixture
def model(tmp_path) -> Path:
    path = tmp_path / "model.onnx"
    onnx.save(network(), path)
    return path


def test_the_command_writes_a_table(run, model, tmp_path):
    out = tmp_path / "latency.json"
    shape = ("--input-shape", "1,3,16,16")
    code, stdout, _ = run("profile", model, "-o", out, "--json", "--time-budget", 5, *shape)
    assert code == 0
    document = json.loads(stdout)
    table = read_latency(out)
    assert document["rows"] == len(table.rows)
    assert document["header"]["provider"] == "CPUExecutionProvider"
    assert document["header"]["model"]["name"] == "model.onnx"
    assert all(row.value >= 0 for row in table.rows)


@pytest.mark.parametrize("profiled", [True, False])
def test_int8_times_quantized_kernels(monkeypatch, profiled):
    opened = []

    class Watched(timing.Session):
        def __init__(self, runnable, **options):
            super().__init__(runnable, **options)
            opened.append({node.op_type for node in runnable.proto.graph.node})

    model = load(network())
    settings = Settings(dtype="int8", input_shapes={"": (1, 3, 16, 16)})
    timer = DeviceTimer(model, settings, kernels=profiled)
    monkeypatch.setattr(timing, "Session", Watched)
    monkeypatch.setattr(kernels, "Session", Watched)
    found = profile_model(model, dtype="int8", time_budget=1.0, make_timer=lambda *_: timer)
    assert found.table.header.dtype == "int8"
    assert "dtype int8" in found.tables()[0].note
    assert len(opened) > 2
    assert all("QuantizeLinear" in operators for operators in opened)
    assert all(row.value >= 0 for row in found.table.rows)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--provider", "NoProvider"), "no provider 'NoProvider'"),
        (("--dtype", "int4"), "dtype 'int4'"),
        (("--threads", 0), "threads"),
    ],
)
def test_what_cannot_be_profiled_is_one_message(run, model, tmp_path, options, message):
    out = tmp_path / "latency.json"
    code, _, stderr = run("profile", model, "-o", out, *options)
    assert code == 2
    assert len(stderr.strip().splitlines()) == 1
    assert message in stderr
    assert list(tmp_path.iterdir()) == [model]


def test_outputs_that_cannot_be_are_refused_at_once(run, model, tmp_path):
    for out, message in (
        ("-", "stdout"),
        (model, "is the input itself"),
        (tmp_path / "absent" / "latency.json", "no such folder"),
    ):
        code, _, stderr = run("profile", model, "-o", out)
        assert code == 2
        assert message in stderr


def test_a_model_without_convolutions_says_so(tmp_path):
    build = ModelBuilder((1, 4))
    proto = build.model(build.op("Relu", "x", out="y"))
    with pytest.raises(UsageError, match="no convolutions"):
        graphfold.profile(proto, tmp_path / "latency.json")


@pytest.mark.slow
@pytest.mark.needs_shared
def test_a_real_network_adds_up(shared):
    found = graphfold.profile(shared / "models" / "mlperftiny_resnet8_cifar10.onnx", time_budget=5)
    unchanged = sum(row.value for row in found.table.rows if row.unchanged)
    assert unchanged + found.table.rest == pytest.approx(found.whole)
    assert found.table.rest < 0.5 * found.whole

"""Networks with normalisations by groups, the whole way: segments, plan, fold, verified."""

from __future__ import annotations

import io
import json
import sys
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import onnx
import pytest
from builders import ModelBuilder, attributes_of, node_making, nonzero, op_types
from test_planning import latencies
from test_profile import one_run, ops, parts_of

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import unet

import graphfold
from graphfold.calibration.kernels import Batch
from graphfold.calibration.wholes import find_fastest, fold_fastest
from graphfold.candidates import find_candidates
from graphfold.cli import main
from graphfold.cuts import cut_layout
from graphfold.errors import BudgetError
from graphfold.graph import Graph
from graphfold.measures import write_table
from graphfold.model import Model, load, to_proto
from graphfold.plan import Plan
from graphfold.sites import ConvSite, find_sites

Segment = dict[str, Any]


def small(multipliers: tuple[int, ...] = (1, 2), blocks: int = 1, size: int = 16):
    """The diffusion U-Net with few channels; attention at half the resolution."""
    layout = unet.Layout(size, 8, multipliers, blocks, (size // 2,), groups=4)
    return unet.ddpm_unet(layout)


def kernels(proto: onnx.ModelProto) -> dict[str, list[int]]:
    """By output tensor, of all convolutions."""
    convs = [node for node in proto.graph.node if node.op_type == "Conv"]
    return {node.output[0]: attributes_of(node)["kernel_shape"] for node in convs}


# --- as published ---------------------------------------------------------------------------------


def published(convs: list[ConvSite]) -> dict[str, Segment]:
    """LayerMerge's plan of the CIFAR-10 network at 38 ms, by its numbers of convolutions."""
    first_of_pairs = (2, 4, 7, 39, 41, 43, 46, 48, 50)
    removed = (2, 5, 31, 38, 40, 42, 44, 45, 47, 49, 51)
    found = {}
    for number in first_of_pairs:
        pair = {number: convs[number - 1], number + 1: convs[number]}
        found[f"merge {number}"] = {
            "input": pair[number].input.name,
            "output": pair[number + 1].output.name,
            "boundary": "hoist",
            "norm": "after",
            "remove_convs": [site.name for key, site in pair.items() if key in removed],
        }
    for number in (31, 38, 45):
        site = convs[number - 1]
        ends = {"input": site.input.name, "output": site.output.name}
        found[f"drop {number}"] = {**ends, "family": "identity"}
    return found


def test_the_published_plan_gives_the_published_structure():
    proto = small((1, 2, 2, 2), 2)
    sites = find_sites(Graph(load(proto)))
    convs = [site for site in sites.convs if not site.pointwise]
    assert len(convs) == 52
    segments = published(convs)
    plan = {"graphfold_plan": 1, "segments": list(segments.values())}
    found = graphfold.optimize(proto, plan)
    assert found.report.verification.passed
    merged = [fold for fold in found.report.folds if fold.segment is not None]
    assert Counter(fold.kernel for fold in merged) == {(3, 3): 8, (5, 5): 1}
    (wide,) = [fold for fold in merged if fold.kernel == (5, 5)]
    assert wide.output.startswith(f"{segments['merge 7']['output']}/")
    before, after = kernels(proto), kernels(found.model)
    squares = Counter(map(tuple, after.values()))
    # Nine of 52 convolutions are merged away, three dropped; vectors have one of their own where
    # the second convolution of a pair is left: two of nine.
    assert squares[3, 3] + squares[5, 5] == 52 - 9 - 3
    pointwise = sum(kernel == [1, 1] for kernel in before.values())
    assert squares[1, 1] == pointwise + 2
    norms = Counter(op_types(proto))["InstanceNormalization"]
    assert Counter(op_types(found.model))["InstanceNormalization"] == norms
    reference = op_types(to_proto(found.reference))
    assert Counter(reference)["Sigmoid"] == Counter(op_types(proto))["Sigmoid"] - 9


# --- from a model to a folded model ---------------------------------------------------------------


def run(*arguments: str | Path) -> int:
    return main([str(each) for each in arguments])


def whole_way(
    proto: onnx.ModelProto, folder: Path, capfd: pytest.CaptureFixture[str], *, gain: float = 0.5
) -> tuple[Plan, onnx.ModelProto]:
    """Inspect, plan by a made-up table, optimize: all by the commands."""
    model, table, plan, out = (folder / name for name in ("m.onnx", "t", "p", "o.onnx"))
    onnx.save(proto, model)
    write_table(latencies(proto, gain=gain), table)
    assert run("inspect", model, "--json") == 0
    listed = json.loads(capfd.readouterr().out)["segments"]
    offered = {(each["input"], each["output"]): each["norm"] for each in listed}
    planning = ("plan", model, "--latency", table, "--importance", "l1", "--no-confirm")
    assert run(*planning, "--speedup", "1.2", "-o", plan) == 0
    assert run("optimize", model, "--plan", plan, "-o", out, "--require-verify") == 0
    assert "verified" in capfd.readouterr().err
    stated = Plan.model_validate_json(plan.read_text())
    for segment in stated.segments:
        if segment.family != "identity":
            assert segment.norm == offered[segment.input, segment.output]
    return stated, onnx.load(out)


def test_a_diffusion_network_from_its_file_to_a_folded_file(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    proto = small()
    plan, folded = whole_way(proto, tmp_path, capfd)
    moved = [segment for segment in plan.segments if segment.norm == "after"]
    assert moved
    for segment in moved:
        assert node_making(folded, segment.output).op_type == "Add"  # the norm's shift
    assert len(kernels(folded)) < len(kernels(proto))


def test_a_network_that_torch_wrote(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    torch = pytest.importorskip("torch")
    from small_unet import UNet

    torch.manual_seed(0)
    written = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            UNet().eval(),
            (torch.randn(1, 3, 16, 16), torch.rand(1, 1)),
            written,
            input_names=["x", "t"],
            output_names=["y"],
            opset_version=17,
            dynamo=False,
        )
    proto = onnx.load_from_string(written.getvalue())
    kinds = op_types(proto)
    assert kinds.count("InstanceNormalization") == 8
    plan, folded = whole_way(proto, tmp_path, capfd, gain=0.3)
    assert {segment.norm for segment in plan.segments} >= {"after"}
    assert op_types(folded).count("InstanceNormalization") == 8  # moved, not lost
    assert op_types(folded).count("Sigmoid") < kinds.count("Sigmoid")


# --- segments that the planner finds --------------------------------------------------------------


def test_what_is_normalised_anyway_needs_no_second_normalisation():
    """In a network that normalises behind each convolution, the last one of a run is enough."""
    build = ModelBuilder([1, 4, 8, 8], opset=21)
    value = "x"
    for number in range(2):
        value = build.conv(value, 4, 3, pad=1, out=f"c{number}")
        scale, shift = (build.constant(nonzero(build.rng, 4)) for _ in range(2))
        options: dict[str, Any] = {"num_groups": 2, "channels": 4, "out": f"n{number}"}
        value = build.op("GroupNormalization", value, scale, shift, **options)
        value = build.op("Relu", value, channels=4)
    proto = build.model(value, shapes={value: [1, 4, 8, 8]})
    result = graphfold.make_plan(
        proto, latency=latencies(proto), importance="macs", speedup=1.2, confirm=False
    )
    assert result.plan is not None
    (segment,) = result.plan.segments
    assert (segment.output, segment.norm) == ("c1", "drop")
    folded = graphfold.optimize(proto, result.plan)
    assert op_types(folded.model) == ["Conv", "GroupNormalization", "Relu"]


def test_where_no_normalisation_can_move_the_plan_says_why():
    build = ModelBuilder([1, 4, 8, 8], opset=21)
    value = build.conv("x", 4, 3, pad=1, out="c")
    ones = build.constant(nonzero(build.rng, 4))
    value = build.op("GroupNormalization", value, ones, ones, num_groups=2, channels=4)
    value = build.op("Relu", value, channels=4)
    value = build.conv(value, 6, 3, stride=2, pad=1, out="y")
    proto = build.model(value, shapes={value: [1, 6, 4, 4]})
    with pytest.raises(BudgetError, match="normalises 4 channels and the result has 6"):
        graphfold.make_plan(
            proto, latency=latencies(proto), importance="macs", speedup=2, confirm=False
        )


def test_what_stays_behind_a_merge_is_measured_with_it():
    candidates, _, snippets = parts_of(small())
    held = [each for each in candidates.found if each.norm == "after" and each.aside]
    assert held
    found = [snippets.chosen(each, each.choices[0]) for each in held]
    for each in found:
        assert ops(each)[:3] == ["Conv", "Add", "Reshape"]
        assert ops(each).count("InstanceNormalization") == 1
        assert each.inputs[1].shape[2:] == (1, 1)
    batch = Batch(found, snippets.opsets)
    onnx.checker.check_model(batch.proto, full_check=True)
    assert sorted(one_run(batch)) == list(range(len(found)))


def test_the_fastest_network_that_a_table_knows_can_be_folded():
    model = load(small())
    rows = [(row, row.value) for row in latencies(to_proto(model)).rows]
    fastest = find_fastest(rows, cut_layout(find_candidates(Graph(model))))
    assert fastest is not None
    assert any(segment.norm == "after" for segment in fastest.plan.segments)
    assert isinstance(fold_fastest(model, fastest), Model)


def test_a_trial_has_the_last_normalisation_where_the_plan_puts_it():
    pytest.importorskip("torch")
    from graphfold.calibration.trial_training import changed_network
    from graphfold.calibration.trials import find_trials

    model = load(small())
    candidates = find_candidates(Graph(model))
    after = {
        (each.input.name, each.output.name) for each in candidates.found if each.norm == "after"
    }
    trials = find_trials(candidates, cut_layout(candidates), "layermerge")
    merging = [trial for trial in trials if (trial.row.input, trial.row.output) in after]
    assert merging
    assert all(each.norm == "after" for trial in merging for each in trial.plan.segments)
    whole = op_types(to_proto(model)).count("InstanceNormalization")
    changed = to_proto(changed_network(model, merging[0], 0))
    assert op_types(changed).count("InstanceNormalization") == whole

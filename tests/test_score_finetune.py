"""Importance by fine-tuning: rows, values, resuming, processes, clusters, and plans made of it."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from builders import ModelBuilder
from trainable import network, pictures

torch = pytest.importorskip("torch")

import graphfold  # noqa: E402
from graphfold.calibration import trial_training  # noqa: E402 - needs torch
from graphfold.calibration.dataset import read_dataset  # noqa: E402
from graphfold.calibration.finetune import finetune  # noqa: E402
from graphfold.calibration.pairs import pair_up  # noqa: E402
from graphfold.calibration.planning import make_plan  # noqa: E402
from graphfold.calibration.recipe import Recipe  # noqa: E402
from graphfold.calibration.samples import Samples  # noqa: E402
from graphfold.calibration.score_finetune import FinetuneScore, Sizes  # noqa: E402
from graphfold.calibration.training import train  # noqa: E402
from graphfold.calibration.trial_training import changed_network  # noqa: E402
from graphfold.calibration.trials import Trial, find_trials  # noqa: E402
from graphfold.candidates import find_candidates  # noqa: E402
from graphfold.cli import main  # noqa: E402
from graphfold.cuts import choice_row, cut_layout, is_no_change  # noqa: E402
from graphfold.drops import find_drops  # noqa: E402
from graphfold.errors import DataError, UsageError  # noqa: E402
from graphfold.free import with_free_activations  # noqa: E402
from graphfold.graph import Graph  # noqa: E402
from graphfold.hoisting import hoist_where_needed  # noqa: E402
from graphfold.measures import (  # noqa: E402
    LatencyHeader,
    LatencyRow,
    LatencyTable,
    read_importance,
)
from graphfold.model import load, save, to_proto  # noqa: E402
from graphfold.planner import importance_without_data  # noqa: E402
from graphfold.specs import model_inputs  # noqa: E402

FEW = {"epochs": 2, "subset": 48, "batch_size": 16, "learning_rate": 0.4}
SCHEMES = ("layermerge", "depth", "layer-only")


@pytest.fixture(scope="module")
def original():
    """The small classifier, trained."""
    images, labels = pictures(64)
    samples = Samples.of({"x": images}, labels)
    pair = pair_up(load(network()), None, samples, None, 0.0, 1.0, None)
    recipe = Recipe(epochs=8, batch_size=16, learning_rate=0.8, augment=False)
    train(pair.student, None, samples, recipe, objective=pair.objective)
    return pair.student.to_model()


@pytest.fixture
def files(tmp_path, original):
    save(original, tmp_path / "model.onnx")
    images, labels = pictures(128, seed=1)
    np.savez(tmp_path / "data.npz", x=images, labels=labels)
    np.savez(tmp_path / "plain.npz", x=images)
    return tmp_path


def scored(files, output=None, *, data="data.npz", **options) -> FinetuneScore:
    model = load(files / "model.onnx")
    found = graphfold.score(
        model,
        read_dataset(str(files / data), model_inputs(model)),
        output,
        method="finetune",
        **{"jobs": 1, **FEW, **options},
    )
    assert isinstance(found, FinetuneScore)
    return found


def listed(model, scheme, **options) -> list[Trial]:
    candidates = find_candidates(Graph(model))
    return find_trials(candidates, cut_layout(candidates), scheme, **options)


def convs(model) -> int:
    return sum(node.op_type == "Conv" for node in to_proto(model).graph.node)


def without_dates(path: Path) -> dict:
    document = json.loads(path.read_text())
    del document["header"]["created"]
    return document


# What is trained ------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_scheme_has_the_rows_that_the_planner_chooses_among(original, scheme):
    candidates = find_candidates(Graph(original))
    planned = importance_without_data(candidates, "macs", method=scheme).rows
    found = listed(original, scheme)
    keys = {row.key for row in planned if not row.unchanged}
    if scheme == "layer-only":
        # Drops of whole segments are for a second method, after merges.
        keys = {row.key for row in planned if len(row.removed_convs) == 1}
        assert [trial.row.removed_convs[0] for trial in found] == [
            site.name for site in candidates.removable
        ]
    assert {trial.row.key for trial in found if not trial.row.unchanged} == keys
    assert len({trial.name for trial in found}) == len(found) >= 2
    assert len({trial.seed(0) for trial in found}) == len(found)
    assert all(trial.seed(0) != trial.seed(1) for trial in found)


def test_the_changed_network_keeps_the_convolutions_of_the_row(original):
    graph = Graph(original)
    whole = convs(original)
    for trial in listed(original, "layermerge"):
        made = changed_network(original, trial, 0)
        assert convs(made) == whole - len(trial.row.removed_convs or ())
        plan, _ = with_free_activations(graph, trial.plan)
        result = graphfold.optimize(original, hoist_where_needed(original, plan), verify=False)
        assert convs(result.folded) < whole
    (dropped, *_) = listed(original, "layer-only")
    assert convs(changed_network(original, dropped, 0)) == whole - 1


def test_depth_measures_the_states_of_the_activations(original):
    found = {
        (trial.row.output, trial.row.start_active, trial.row.end_active): trial
        for trial in listed(original, "depth")
        if trial.row.input == "stem" and trial.row.output in ("block0", "block1")
    }
    counts = {
        key: sum(
            node.op_type == "Relu"
            for node in to_proto(changed_network(original, trial, 0)).graph.node
        )
        for key, trial in found.items()
    }
    # Five in all; the block has two, and there may be one behind each block's Add.
    assert counts["block0", True, False] == 3
    assert counts["block0", True, True] == 4
    as_it_is = [trial for trial in listed(original, "depth") if trial.is_no_change]
    assert as_it_is
    assert all(trial.row.unchanged for trial in as_it_is)


def test_layers_that_stay_are_trained_anew_where_the_codes_do(original):
    plain, compat = (listed(original, "layermerge", compat=given) for given in (False, True))
    anew = [trial for trial in compat if trial.reset]
    assert len(compat) == len(plain) + len(anew)
    assert not any(trial.reset for trial in plain)
    for trial in anew[:2]:
        made = Graph(changed_network(original, trial, 7))
        again = Graph(changed_network(original, trial, 7))
        before = Graph(original)
        for site in find_candidates(before).sites.convs:
            weights = [
                graph.constant(graph.values()[site.name].producer().inputs[1])
                for graph in (before, made, again)
            ]
            np.testing.assert_array_equal(weights[1], weights[2])
            assert np.array_equal(weights[0], weights[1]) == (site.name not in trial.reset)
            norm = made.values()[site.output.name].producer()
            if site.name in trial.reset:
                statistics = [made.constant(value) for value in norm.inputs[1:5]]
                assert [set(each.tolist()) for each in statistics] == [{1}, {0}, {0}, {1}]
                bound = 1 / math.sqrt(weights[1][0].size)
                assert 0.5 * bound < np.abs(weights[1]).max() <= bound


# Values ---------------------------------------------------------------------------------------


def test_a_value_is_what_fine_tuning_makes_of_the_change(files, original):
    found = scored(files)
    assert found.table.no_change == 1.0
    assert found.table.header.method == "finetune"
    assert found.left_out == found.diverged == 0
    assert found.original.accuracy > 0.8
    images, labels = pictures(128, seed=1)
    order = np.random.default_rng(0).permutation(128)
    parts = [
        Samples.of({"x": images[rows]}, labels[rows])
        for rows in (np.sort(order[:48]), np.sort(order[48:96]))
    ]
    trials = {trial.row.key: trial for trial in listed(original, "layermerge")}
    rows = [row for row in found.table.rows if not row.unchanged]
    assert len(rows) == len(trials)
    for row in rows:
        change = row.accuracy - found.original.accuracy
        assert row.value == pytest.approx(math.exp(change), rel=1e-12)
    assert len({row.value for row in rows}) > 2
    worst = min(rows, key=lambda row: row.value)
    trial = trials[worst.key]
    recipe = Recipe(
        epochs=2,
        batch_size=16,
        learning_rate=0.4,
        weight_decay=1e-5,
        augment=False,
        seed=trial.seed(0),
    )
    plan = hoist_where_needed(original, with_free_activations(Graph(original), trial.plan)[0])
    tuned = finetune(
        load(files / "model.onnx"),
        parts[0],
        plan,
        held_out=parts[1],
        recipe=recipe,
        alpha=0.0,
        smoothing=0.0,
    )
    assert tuned.trained.last.held_out.accuracy == pytest.approx(worst.accuracy, abs=0.03)
    joins = [row for row in found.table.rows if row.unchanged]
    assert joins
    assert all(row.value == 0.0 for row in joins)


def test_other_values_and_no_labels(files):
    points = scored(files, scheme="layer-only", value="accuracy")
    assert points.table.no_change == 0.0
    exponents = scored(files, scheme="layer-only")
    for one, other in zip(points.table.rows, exponents.table.rows, strict=False):
        assert other.value == pytest.approx(math.exp(one.value / 100))
    losses = scored(files, scheme="layer-only", value="exp-loss")
    assert all(row.value > 0 for row in losses.table.rows if not row.unchanged)
    unlabelled = scored(files, scheme="layer-only", data="plain.npz")
    assert unlabelled.original.agreement == 1.0
    for row in unlabelled.table.rows:
        assert row.accuracy is None
        if not row.unchanged:
            assert row.value == pytest.approx(math.exp(row.agreement - 1))


def test_outputs_that_are_no_classes_are_judged_by_their_loss(tmp_path):
    net = ModelBuilder(("N", 3, 8, 8))
    x = net.op("Relu", net.conv("x", 6, 3, pad=1))
    x = net.op("Relu", net.depthwise(x, 3, pad=1))
    save(load(net.model(net.conv(x, 3, out="y"))), tmp_path / "model.onnx")
    np.savez(tmp_path / "data.npz", x=pictures(96)[0])
    found = scored(tmp_path)
    assert found.value == "exp-loss"
    rows = [row for row in found.table.rows if not row.unchanged]
    assert all(0 < row.value < 1 for row in rows)
    with pytest.raises(UsageError, match="no classes"):
        scored(tmp_path, value="accuracy")


def test_what_diverges_is_worth_nothing_right(files, monkeypatch):
    def diverging(*args, **options):
        raise DataError("the loss of epoch 1 is no number any more")

    monkeypatch.setattr(trial_training, "train", diverging)
    found = scored(files, scheme="layer-only")
    assert found.diverged == sum(not row.unchanged for row in found.table.rows)
    values = {row.value for row in found.table.rows if not row.unchanged}
    assert values == {math.exp(-found.original.accuracy)}


def test_sizes_are_those_of_the_papers():
    sizes = Sizes(None, None, None)
    assert [sizes.count(n) for n in (1_281_167, 50_000, 800, 40)] == [51_247, 500, 400, 20]
    many, few = (sizes.recipe(n, 0.1, 0) for n in (1_281_167, 50_000))
    assert (many.epochs, many.batch_size) == (1, 256)
    assert (few.epochs, few.batch_size) == (50, 128)
    assert not many.augment
    with pytest.raises(DataError, match="30 samples are too few to train on 16"):
        sizes.count(30)
    with pytest.raises(DataError, match="smaller --subset"):
        Sizes(60, None, None).count(100)


# Resuming and spreading -----------------------------------------------------------------------


class Killed(Exception):  # noqa: N818 - stands for a signal
    pass


def test_processes_and_interruptions_do_not_change_the_table(files):
    whole, parts = files / "whole.json", files / "parts.json"
    scored(files, whole)

    def kill(stage, done, total):
        if stage == "training changed networks" and done >= 5:
            raise Killed

    with pytest.raises(Killed):
        scored(files, parts, progress=kill)
    assert not parts.exists()
    with pytest.raises(UsageError, match="begun otherwise: work"):
        scored(files, parts, **{**FEW, "epochs": 3})
    with pytest.raises(UsageError, match="begun otherwise: scheme"):
        scored(files, parts, scheme="depth")
    found = scored(files, parts, jobs=2)
    assert found.continued == 5
    assert not Path(f"{parts}.partial").exists()
    assert without_dates(parts) == without_dates(whole)
    assert read_importance(parts) == found.table


@contextmanager
def cluster(workers):
    """A scheduler here, and so many workers in processes of their own."""
    distributed = pytest.importorskip("distributed")
    with distributed.LocalCluster(n_workers=0, dashboard_address=None) as made:
        command = [sys.executable, "-m", "distributed.cli.dask_worker", made.scheduler_address]
        command += ["--no-nanny", "--no-dashboard", "--nthreads", "1"]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
        processes = [
            subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
            for _ in range(workers)
        ]
        try:
            with distributed.Client(made, set_as_default=False) as client:
                client.wait_for_workers(workers, timeout=60)
            yield "dask://" + made.scheduler_address.removeprefix("tcp://")
        finally:
            for process in processes:
                process.kill()
                process.wait()


def test_a_dask_cluster_makes_the_same_table(files):
    whole, spread_out = files / "whole.json", files / "spread.json"
    scored(files, whole, scheme="layer-only")
    with cluster(2) as executor:
        scored(files, spread_out, scheme="layer-only", executor=executor)
    assert without_dates(spread_out) == without_dates(whole)


def test_executors_that_are_not_there_are_told(files, monkeypatch):
    monkeypatch.setattr("graphfold.calibration.spread._CONNECT_SECONDS", 0.5)
    with pytest.raises(UsageError, match=r"no Dask scheduler answers at 127\.0\.0\.1:9"):
        scored(files, scheme="layer-only", executor="dask://127.0.0.1:9")
    with pytest.raises(UsageError, match=r"'ray' is not known \(dask://host:port"):
        scored(files, executor="ray")
    monkeypatch.setattr("graphfold.calibration.spread.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"joblib is not installed.*graphfold\[torch\]"):
        scored(files)


# The command, and plans -----------------------------------------------------------------------


def latencies(model) -> LatencyTable:
    """One millisecond for every convolution as it is, half of what it replaces for a merge."""
    candidates = find_candidates(Graph(model))
    rows = []
    for step in cut_layout(candidates).steps:
        count = sum(node.op_type == "Conv" for node in step.nodes)
        rows.append(LatencyRow(**step.row().model_dump(exclude_unset=True), value=float(count)))
    for candidate in candidates.found:
        for choice in candidate.choices:
            if not is_no_change(candidate, choice):
                row = choice_row(candidate, choice).model_dump(exclude_unset=True)
                rows.append(LatencyRow(**row, value=0.5 * len(candidate.convs)))
    drops = [drop.row.model_dump(exclude_unset=True) for drop in find_drops(candidates)]
    rows += [LatencyRow(**drop, value=0.0) for drop in drops]
    return LatencyTable(header=LatencyHeader(created_by="test"), rest=1.0, rows=tuple(rows))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_plans_are_made_of_the_table_and_folded(files, scheme, capfd):
    arguments = ["score", str(files / "model.onnx"), "--method", "finetune", "--scheme", scheme]
    arguments += ["--data", str(files / "data.npz"), "--subset", "32", "--epochs", "1"]
    arguments += ["--jobs", "1", "-o", str(files / "table.json"), "--json"]
    assert main(arguments) == 0
    document = json.loads(capfd.readouterr().out)
    assert document["scheme"] == scheme
    assert document["recipe"]["epochs"] == 1
    assert document["trained_on"] == document["judged_on"] == 32
    model = load(files / "model.onnx")
    found = make_plan(
        model,
        latency=latencies(model),
        importance=files / "table.json",
        method=scheme,
        speedup=1.2,
        confirm=False,
    )
    assert found.plan is not None
    assert found.point.speedup >= 1.2
    folded = graphfold.optimize(model, found.plan, verify=False).folded
    assert convs(folded) < convs(model)


@pytest.mark.parametrize(
    ("more", "text"),
    [
        (["--method", "finetune", "--scheme", "depths"], "--scheme 'depths' is not known"),
        (["--method", "finetune", "--value", "exp"], "the score 'exp' is not known"),
        (["--method", "finetune", "--scheme", "layer-only", "--compat"], "leave it out"),
        (["--method", "guess"], "--method 'guess' is not known"),
        (["--epochs", "3", "--compat"], "--epochs, --compat belong to --method finetune"),
        (["--value", "accuracy"], "--value belongs to --method finetune and --import"),
        (["--seed", "1"], "--seed belongs to --method finetune"),
        (["--method", "finetune", "--subset", "100"], "128 samples are too few to train on 100"),
    ],
)
def test_wrong_options_are_refused(files, more, text, capfd):
    arguments = ["score", str(files / "model.onnx"), "--data", str(files / "data.npz")]
    assert main([*arguments, "-o", str(files / "table.json"), *more]) == 2
    assert text in " ".join(capfd.readouterr().err.split())

"""Activations that fade out in training: the schedule, its end, the way from expand to verify."""

from __future__ import annotations

import json

import numpy as np
import onnx
import pytest
from builders import ModelBuilder, run
from trainable import network, pictures

torch = pytest.importorskip("torch")

import graphfold  # noqa: E402
from graphfold.calibration import training  # noqa: E402 - needs torch
from graphfold.calibration.anneal import Annealing, AnnealingError  # noqa: E402
from graphfold.calibration.bridge import bridge  # noqa: E402
from graphfold.calibration.finetune import finetune  # noqa: E402
from graphfold.calibration.recipe import Moment, Recipe  # noqa: E402
from graphfold.calibration.samples import Samples  # noqa: E402
from graphfold.cli import main  # noqa: E402
from graphfold.errors import UsageError  # noqa: E402
from graphfold.model import load, to_proto  # noqa: E402

RECIPE = Recipe(epochs=4, batch_size=16, learning_rate=0.4, augment=False)


def samples(count=64, seed=0):
    images, labels = pictures(count, seed)
    return Samples.of({"x": images}, labels)


@pytest.fixture(scope="module")
def expanded():
    return graphfold.expand(network(), ["expansions"], ratio=3)


def test_the_schedule(expanded):
    hook = Annealing(expanded.expanded, expanded.plan, 0.25, 0.75)
    assert [hook.at(done) for done in (0, 0.25, 0.5, 0.75, 1)] == [1, 1, 0.5, 0, 0]
    hook.before_step(Moment(epoch=1, step=0, steps=4, epochs=2, rate=0.1))
    assert hook.share == 0.5
    hook.after_step(Moment(epoch=1, step=0, steps=4, epochs=2, rate=0.1))
    assert hook.share == 0.25


@pytest.mark.parametrize("share", [1.0, 0.25, 0.0])
def test_what_the_network_computes_on_the_way(share):
    net = ModelBuilder(("N", 3, 6, 6))
    y = net.op("Relu", net.conv("x", 4, 3, out="before"), out="after")
    original = load(net.model(net.conv(y, 2, 1, out="y")))
    plan = {"graphfold_plan": 1, "remove_activations": ["after"]}
    reference = graphfold.optimize(original, plan).reference
    hook = Annealing(original, plan)
    module = bridge(reference)
    hook.groups(module, RECIPE)
    hook.share = share
    images = torch.from_numpy(np.random.default_rng(0).normal(size=(2, 3, 6, 6)).astype("f"))
    parts = bridge(original, outputs=["before"]), bridge(original, inputs=["after"])
    inner = parts[0](images)["before"]
    mixed = share * inner.clamp(min=0) + (1 - share) * inner
    torch.testing.assert_close(module(images)["y"], parts[1](mixed)["y"])
    assert (module(images)["y"] != bridge(original)(images)["y"]).any() == (share < 1)
    # What reaches the weights below is the gradient of the mixture.
    module(images)["y"].sum().backward()
    parts[1](mixed)["y"].sum().backward()
    name = to_proto(original).graph.node[0].input[1]
    torch.testing.assert_close(module.weights[name].grad, parts[0].weights[name].grad)


def test_nothing_is_left_in_the_end(expanded):
    hook = Annealing(expanded.expanded, expanded.plan, 0.25, 0.75)
    shares = []
    hook.after_epoch = lambda epoch: shares.append(hook.share)
    found = finetune(
        expanded.expanded,
        samples(),
        expanded.plan,
        held_out=samples(96, seed=1),
        recipe=RECIPE,
        hooks=hook,
    )
    assert shares == [1.0, 0.5, 0.0, 0.0]
    # It begins as the network with its activations, which the teacher is.
    first = found.trained.epochs[0].held_out
    assert first.loss == pytest.approx(0.3 * found.teacher.loss, rel=1e-6)
    assert found.free_activations == 0
    assert found.folding.error < 1e-5
    images, labels = pictures(96, seed=1)
    folded = to_proto(found.result.folded)
    right = float(np.mean(run(folded, {"x": images})[0].argmax(1) == labels))
    assert right == found.trained.last.held_out.accuracy
    plain = graphfold.optimize(network()).model
    assert [node.op_type for node in folded.graph.node] == [n.op_type for n in plain.graph.node]


def test_plans_that_move_padding_and_add_activations_anneal_too():
    plan = {
        "graphfold_plan": 1,
        "segments": [
            {"input": "stem", "output": "block0", "boundary": "hoist"},
            {"input": "block0", "output": "block1", "boundary": "exact"},
        ],
    }
    model = load(network())
    recipe = Recipe(epochs=2, batch_size=16, learning_rate=0.4, augment=False)
    hook = Annealing(model, plan)
    found = finetune(
        model, samples(), plan, held_out=samples(32, seed=1), recipe=recipe, hooks=hook
    )
    assert found.free_activations == 2
    assert hook.share == 0
    assert found.folding.error < 1e-5


def test_wrong_schedules_are_refused(expanded):
    model, plan = expanded.expanded, expanded.plan
    for start, stop in ((0.5, 0.5), (-0.1, 0.5), (0.5, 1.1), (0.9, 0.5)):
        with pytest.raises(UsageError, match="fade from"):
            Annealing(model, plan, start, stop)
    with pytest.raises(UsageError, match="removes no activations"):
        Annealing(model, {"graphfold_plan": 1})
    with pytest.raises(UsageError, match="keep the last"):
        finetune(model, samples(), plan, recipe=Recipe(keep="best"), hooks=Annealing(model, plan))


def test_activations_that_cannot_fade_are_refused():
    net = ModelBuilder(("N", 3, 6, 6))
    both = net.conv("x", 4, 1, out="both")
    y = net.op("Add", net.conv(net.op("Relu", both, out="act"), 4), net.conv(both, 4))
    first = net.op("Relu", "x", out="first")
    model = load(net.model(net.op("Add", net.conv(first, 4), y, out="y")))
    with pytest.raises(AnnealingError) as caught:
        Annealing(model, {"graphfold_plan": 1, "remove_activations": ["act", "first"]})
    reasons = {each.path: each.what for each in caught.value.problems}
    assert "something else reads 'both'" in reasons["act"]
    assert reasons["first"] == "something else reads 'x', which it reads"
    net = ModelBuilder(("N", 3, 6, 6))
    alone = load(net.model(net.conv(net.op("Relu", "x", out="first"), 4, out="y")))
    with pytest.raises(AnnealingError, match="reads an input"):
        Annealing(alone, {"graphfold_plan": 1, "remove_activations": ["first"]})


def test_activations_that_go_with_their_place_are_refused():
    model = load(network())
    plan = {
        "graphfold_plan": 1,
        "segments": [{"input": "stem", "output": "block0", "family": "identity"}],
    }
    with pytest.raises(AnnealingError, match="leaves nothing"):
        finetune(model, samples(), plan, recipe=RECIPE, hooks=Annealing(model, plan))


# --- the commands -----------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path, capfd):
    onnx.save(network(), tmp_path / "net.onnx")
    for name, seed in (("train", 0), ("test", 1)):
        images, labels = pictures(64, seed)
        np.savez(tmp_path / f"{name}.npz", x=images, labels=labels)
    options = ("--convs", "expansions", "--ratio", "3", "-o", str(tmp_path / "wide.onnx"))
    assert main(["expand", str(tmp_path / "net.onnx"), *options]) == 0
    assert "wide.plan.json" in capfd.readouterr().err
    return tmp_path


def tune(files, *more, out):
    return [
        *("finetune", str(files / "wide.onnx"), "--data", str(files / "train.npz")),
        *("--validation", str(files / "test.npz"), "--alpha", "0", "--epochs", "2"),
        *("--batch-size", "16", "-q", "-o", str(files / out), *more),
    ]


def operators(path):
    return [node.op_type for node in onnx.load(path).graph.node]


def test_expand_finetune_optimize_verify(files):
    """Trained with the activations, then folded without: what the plan means, verified."""
    names = {name: str(files / name) for name in ("trained.onnx", "plain.onnx", "folded.onnx")}
    plan = str(files / "wide.plan.json")
    assert main(tune(files, "--reference-out", names["trained.onnx"], out="unused.onnx")) == 0
    wide = onnx.load(files / "wide.onnx")
    assert operators(names["trained.onnx"]) == [node.op_type for node in wide.graph.node]
    optimize = ("optimize", names["trained.onnx"], "--plan", plan, "-o", names["folded.onnx"])
    assert main([*optimize, "--require-verify"]) == 0
    assert main(["verify", names["trained.onnx"], names["folded.onnx"], "--plan", plan]) == 0
    assert main(["optimize", str(files / "net.onnx"), "-o", names["plain.onnx"]]) == 0
    assert operators(names["folded.onnx"]) == operators(names["plain.onnx"])
    # Without the plan's meaning it is another function: training has moved the activations.
    assert main(["verify", names["trained.onnx"], names["folded.onnx"]]) == 1


def test_annealed_on_the_command_line_and_continued(files, monkeypatch, capfd):
    anneal = ("--plan", str(files / "wide.plan.json"), "--anneal", "0.25:0.75")
    assert main([*tune(files, *anneal, out="tuned.onnx"), "--json"]) == 0
    document = json.loads(capfd.readouterr().out)
    assert document["folding"]["error"] < 1e-5
    assert document["folding"]["other_class"] == 0
    plain = graphfold.optimize(network()).model
    assert operators(files / "tuned.onnx") == [node.op_type for node in plain.graph.node]

    monkeypatch.setattr(training, "_SAVED_EVERY", 0.0)
    step = training._Run._step

    def killed(self, moment, positions):
        if moment.done == 5:
            raise KeyboardInterrupt
        return step(self, moment, positions)

    with monkeypatch.context() as patch:
        patch.setattr(training._Run, "_step", killed)
        assert main(tune(files, *anneal, out="again.onnx")) == 130
    other = ("--plan", str(files / "wide.plan.json"), "--anneal", "0.5:0.75")
    assert main(tune(files, *other, out="again.onnx")) == 2
    assert "anneal '0.25:0.75', now '0.5:0.75'" in capfd.readouterr().err
    assert main(tune(files, *anneal, out="again.onnx")) == 0
    assert (files / "again.onnx").read_bytes() == (files / "tuned.onnx").read_bytes()


@pytest.mark.parametrize("text", ["0.5", "a:b", "0.9:0.5"])
def test_wrong_shares_are_refused(files, text, capfd):
    anneal = ("--plan", str(files / "wide.plan.json"), "--anneal", text)
    assert main(tune(files, *anneal, out="tuned.onnx")) == 2
    err = capfd.readouterr().err
    assert "START:STOP" in err or "fade from" in err
    assert not (files / "tuned.onnx").exists()


def test_annealing_without_a_plan_is_refused(files, capfd):
    assert main(tune(files, "--anneal", "0.5:0.9", out="tuned.onnx")) == 2
    assert "--plan gives it" in capfd.readouterr().err

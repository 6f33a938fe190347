"""The search: masks that learn straight through, budgets, plans that fold, and resumption."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import onnx_ir as ir
import pytest
from builders import ModelBuilder
from maskable import chain, table_of
from trainable import pictures

torch = pytest.importorskip("torch")

from together import two_processes  # noqa: E402

import graphfold  # noqa: E402
from graphfold.calibration import search as searching  # noqa: E402 - needs torch
from graphfold.calibration import training  # noqa: E402
from graphfold.calibration.masks import (  # noqa: E402
    MaskedModule,
    MaskHooks,
    stable_since,
    with_masks,
)
from graphfold.calibration.pairs import pair_up  # noqa: E402
from graphfold.calibration.recipe import Recipe  # noqa: E402
from graphfold.calibration.samples import Samples  # noqa: E402
from graphfold.calibration.search import search  # noqa: E402
from graphfold.calibration.sets import SetLoss  # noqa: E402
from graphfold.calibration.training import train  # noqa: E402
from graphfold.calibration.untie import untie  # noqa: E402
from graphfold.candidates import find_candidates  # noqa: E402
from graphfold.cli import main  # noqa: E402
from graphfold.graph import Graph  # noqa: E402
from graphfold.masking import Budget, find_masks  # noqa: E402
from graphfold.measures import read_latency, write_table  # noqa: E402
from graphfold.model import digest, load, save, to_proto  # noqa: E402
from graphfold.plan import ModelReference, read_plan  # noqa: E402
from graphfold.sites import find_sites  # noqa: E402

RECIPE = Recipe(epochs=2, batch_size=16, learning_rate=0.4, augment=False)


def samples(count=64, seed=0):
    images, labels = pictures(count, seed)
    return Samples.of({"x": images}, labels)


def prepared(proto, choose, per="block"):
    model = load(proto)
    masks = find_masks(find_candidates(Graph(model)), per)
    student, names = with_masks(untie(model), masks)
    pair = pair_up(student, None, samples(), None, 0.0, 1.0, None)
    return MaskedModule(pair.student, names, choose), pair.objective, masks


def first(count):
    return lambda importance: tuple(at < count for at in range(len(importance)))


# --- the masks --------------------------------------------------------------------------------


def test_a_mask_that_is_off_is_the_identity_and_one_that_is_on_changes_nothing():
    module, _, masks = prepared(chain(2), first(1))
    assert [mask.sites for mask in masks] == [("wide0", "deep0"), ("wide1", "deep1")]
    batch = {"x": torch.from_numpy(pictures(8)[0])}
    with torch.no_grad():
        ours = module.eval()(batch)["y"]
    plan = {"graphfold_plan": 1, "remove_activations": ["wide1", "deep1"]}
    plain = graphfold.optimize(chain(2), plan, passes=[], verify=False).reference
    whole = pair_up(plain, None, samples(), None, 0.0, 1.0, None).student.eval()
    with torch.no_grad():
        assert torch.equal(ours, whole(batch)["y"])


def test_the_gradient_of_the_binary_mask_is_that_of_the_importance():
    # By differences: with b between the two, act(x) b + x (1 - b).
    module, objective, masks = prepared(chain(2), first(1))
    data = samples(16)
    batch, labels = data.take(range(16))
    module.eval()
    objective.loss(module(batch), None, labels).backward()
    found = module.importance.grad.clone()
    assert (found != 0).all()  # at the start, whether on or off
    for at, mask in enumerate(masks):
        expected = 0.0
        for name in mask.sites:
            alone = _slope(chain(2), masks, name, batch, objective, labels)
            expected += alone
        assert float(found[at]) == pytest.approx(expected, rel=2e-2, abs=2e-3)


def _slope(proto, masks, name, batch, objective, labels):
    """d loss / d b of one activation, by central differences around its state."""
    off = {site for mask in masks[1:] for site in mask.sites}
    losses = []
    for step in (-1e-2, 1e-2):
        net = load(proto)
        graph = Graph(net)
        for site in find_sites(graph).activations:
            if site.name not in off and site.name != name:
                continue
            share = (0.0 if site.name in off else 1.0) + (step if site.name == name else 0.0)
            readers = list(site.output.uses())
            b = graph.add_initializer("b", np.float32(share).reshape(()))
            c = graph.add_initializer("c", np.float32(1 - share).reshape(()))
            one = ir.Node("", "Mul", [site.output, b])
            two = ir.Node("", "Mul", [site.input, c])
            both = ir.Node("", "Add", [one.outputs[0], two.outputs[0]])
            for usage in readers:
                usage.node.replace_input_with(usage.idx, both.outputs[0])
            graph.ir.insert_after(site.nodes[-1], [one, two, both])
        module = pair_up(net, None, samples(), None, 0.0, 1.0, None).student.eval()
        with torch.no_grad():
            losses.append(float(objective.loss(module(batch), None, labels)))
    return (losses[1] - losses[0]) / 2e-2


def test_the_decay_lowers_the_costliest_first():
    module, _, _ = prepared(chain(3), first(2))
    hooks = MaskHooks(module, [0.5, 2.0, 1.0], 0.01)
    hooks.loss({}).backward()
    gradients = module.importance.grad.tolist()
    assert gradients == pytest.approx([0.005, 0.02, 0.01])
    # A step down from equal importances leaves the costliest one the least important.
    optimizer = torch.optim.SGD([module.importance], lr=0.1)
    optimizer.step()
    assert module.importance.argmin() == 1
    assert module.importance.argmax() == 0


@pytest.mark.parametrize("by", ["loss", "gradient"])
def test_with_the_decay_alone_the_costliest_blocks_go(by):
    model = load(chain(4))
    merged = {"block0": 2.5, "block1": 0.5, "block2": 1.5, "block3": 2.0}
    budgets = [Budget("keep", count) for count in (1, 2, 3)]
    # So strong that nothing else counts; weights and importances hardly move.
    recipe = Recipe(epochs=1, batch_size=16, learning_rate=1e-4, augment=False, clip=None)
    options = {"latency": table_of(model, merged), "decays": (1e3,), "recipe": recipe}
    found = search(model, samples(32), budgets, by=by, **options)
    # 4 ms as it is (expansion, depthwise, projection, Add): block 1 saves the most.
    assert found.savings == pytest.approx([1.5, 3.5, 2.5, 2.0])
    assert [run.last.kept for run in found.runs] == [
        (True, False, False, False),
        (True, False, False, True),
        (True, False, True, True),
    ]
    for run in found.runs if by == "gradient" else ():
        lost = [1.0 - worth for worth in run.last.importance]
        assert lost == pytest.approx([lost[1] * saved / 3.5 for saved in found.savings], rel=1e-2)
        assert 0.01 < lost[1] < 1


@pytest.mark.parametrize("by", ["loss", "gradient"])
def test_what_matters_to_the_task_is_kept(by):
    # Labels are told by |x| alone: only the block whose activation sees that can tell them.
    net = ModelBuilder(("N", 2, 4, 4))
    y = "x"
    for number in range(3):
        signs = np.array([[1, 0], [0, 1], [-1, 0], [0, -1]], np.float32)
        expand = net.constant(signs.reshape(4, 2, 1, 1) if number == 2 else _spread(net, 4, 2))
        wide = net.op("Conv", y, expand, channels=4, out=f"wide_in{number}")
        wide = net.op("Relu", wide, out=f"wide{number}")
        deep = net.depthwise(wide, 1, out=f"deep{number}")
        project = net.constant(_spread(net, 2, 4))
        y = net.op("Add", y, net.op("Conv", deep, project, channels=2), out=f"block{number}")
    flat = net.op("Flatten", net.op("GlobalAveragePool", y))
    weight = net.constant(net.rng.normal(size=(2, 2)))
    model = load(net.model(net.op("Gemm", flat, weight, transB=1, out="y", channels=2)))
    rng = np.random.default_rng(0)
    labels = np.arange(128) % 2
    images = rng.choice([-1.0, 1.0], (128, 2, 4, 4)) * (0.1 + labels[:, None, None, None])
    data = Samples.of({"x": images.astype(np.float32)}, labels)
    recipe = Recipe(epochs=8, batch_size=32, learning_rate=0.4, augment=False)
    options = {"by": by, "decays": (0.0,), "alpha": 0.0}
    found = search(model, data, [Budget("keep", 1)], recipe=recipe, **options)
    (run,) = found.runs
    assert run.last.kept == (False, False, True)
    assert run.last.importance[2] == max(run.last.importance)
    assert found.warnings == ()
    if by == "loss":
        assert run.stable_since is None
        losses = sorted(loss for _, loss in run.found.sets.judged)
        assert losses[1] - losses[0] > 10 * (losses[2] - losses[1])
        return
    # It was not on at the start, so one epoch is too few.
    assert run.found.course[0].kept == (True, False, False)
    recipe = Recipe(epochs=1, batch_size=32, learning_rate=0.4, augment=False)
    found = search(model, data, [Budget("keep", 1)], recipe=recipe, **options)
    assert found.runs[0].stable_since == 1
    assert found.warnings[0].endswith("(keep-1): search for more epochs")


def _spread(net, *shape):
    return 0.05 * net.rng.normal(size=(*shape, 1, 1)).astype(np.float32)


# --- plans ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("per", "kept"), [("block", 1), ("activation", 2)])
@pytest.mark.parametrize("measured", [True, False])
def test_plans_mean_what_the_masks_do_and_fold(per, kept, measured):
    model = load(chain(3))
    merged = {"block0": 0.5, "block1": 1.0, "block2": 9.0}
    options = {"latency": table_of(model, merged)} if measured else {"decays": (0.0,)}
    budgets = [Budget("keep", kept)]
    found = search(model, samples(), budgets, per=per, recipe=RECIPE, **options)
    (run,) = found.runs
    gone = {
        name
        for mask, on in zip(found.masks, run.last.kept, strict=True)
        if not on
        for name in mask.sites
    }
    result = graphfold.optimize(to_proto(model), run.plan)
    assert result.report.verification.passed
    left = {out for node in result.reference.ir.graph for out in (v.name for v in node.outputs)}
    assert not gone & left
    relus = [node for node in result.model.graph.node if node.op_type == "Relu"]
    assert len(relus) == 2 + 6 - len(gone)
    if measured:
        # A block that is cheaper in parts stays in parts.
        assert not any(segment.output == "block2" for segment in run.plan.segments)
        assert run.latency == pytest.approx(run.plan.objective["predicted_ms"])


def test_padding_is_hoisted_only_where_it_may_be():
    net = ModelBuilder(("N", 3, 8, 8))
    y = net.op("Relu", net.norm(net.conv("x", 8, 3, pad=1)), out="stem")
    for number in range(2):
        z = net.op("Relu", net.norm(net.conv(y, 8, 3, pad=1)), out=f"inner{number}")
        z = net.op("Add", y, net.norm(net.conv(z, 8, 3, pad=1)), out=f"block{number}")
        y = net.op("Relu", z, out=f"end{number}")
    flat = net.op("Flatten", net.op("GlobalAveragePool", y))
    weight = net.constant(net.rng.normal(size=(4, 8)))
    model = load(net.model(net.op("Gemm", flat, weight, transB=1, out="y", channels=4)))
    budgets, options = [Budget("keep", 1)], {"decays": (0.0,), "recipe": RECIPE}
    plans = {
        boundary: search(model, samples(32), budgets, boundary=boundary, **options).runs[0].plan
        for boundary in ("auto", "exact", "hoist")
    }
    for boundary in ("auto", "hoist"):
        assert [segment.boundary for segment in plans[boundary].segments] == ["hoist"]
        assert plans[boundary].remove_activations == []
    assert plans["exact"].segments == []
    assert len(plans["exact"].remove_activations) == 1


# --- over time --------------------------------------------------------------------------------


def test_the_report_has_curves_and_when_the_set_was_stable(tmp_path):
    model = load(chain(3))
    budgets = [Budget("keep", 1), Budget("speedup", 1.2)]
    found = search(
        model,
        samples(),
        budgets,
        by="gradient",
        decays=(0.0, 0.01),
        latency=table_of(model, {"block0": 0.5, "block1": 1.0, "block2": 9.0}),
        held_out=samples(32, seed=1),
        recipe=RECIPE,
    )
    labels = ["keep-1-decay-0", "keep-1-decay-0.01"]
    labels += ["speedup-1.2-decay-0", "speedup-1.2-decay-0.01"]
    assert [run.label for run in found.runs] == labels
    assert found.savings == pytest.approx([3.5, 3.0, 0.0])
    assert "1 of 3 masks save no time" in found.warnings[0]
    for run in found.runs[2:]:
        assert found.original / run.latency >= 1.2 * (1 - 1e-9)
    written = found.write(tmp_path)
    assert [path.name for path in written] == [
        *(f"{label}.json" for label in labels),
        "search.json",
        "search.svg",
    ]
    report = json.loads((tmp_path / "search.json").read_text())
    for run, told in zip(found.runs, report["runs"], strict=True):
        changed = [each["epoch"] for each in told["epochs"] if each["changes"]]
        assert (
            told["stable_since_epoch"] == max(changed, default=0) == stable_since(run.found.course)
        )
        assert [each["epoch"] for each in told["epochs"]] == [0, 1, 2]
        assert told["epochs"][0]["importance"] == [1.0, 1.0, 1.0]
        assert told["epochs"][-1]["kept"] == told["kept"]
        assert told["epochs"][-1]["held_out"] == told["held_out"]
        again = read_plan(tmp_path / f"{told['label']}.json")
        assert again.digest == read_plan(told["plan"]).digest
    drawn = (tmp_path / "search.svg").read_text()
    # For every run three importances, two losses, one line of changes.
    assert drawn.count("<polyline") == 4 * 6
    assert len(found.tables()[0].rows) == 4
    assert len(found.tables()[1].rows) == 3


def test_the_report_has_the_losses_of_sets(tmp_path):
    model = load(chain(3))
    table = table_of(model, {"block0": 0.5, "block1": 1.0, "block2": 9.0})
    options = {"latency": table, "held_out": samples(32, seed=1), "recipe": RECIPE}
    trained = []
    found = search(
        model,
        samples(),
        [Budget("keep", 1), Budget("speedup", 1.2)],
        decays=(0.0, 1e3),
        progress=lambda stage, done, total: trained.append(stage),
        **options,
    )
    labels = ["keep-1-decay-0", "keep-1-decay-1000"]
    labels += ["speedup-1.2-decay-0", "speedup-1.2-decay-1000"]
    assert [run.label for run in found.runs] == labels
    # The strengths share the weights of a budget.
    assert found.runs[0].found.trained is found.runs[1].found.trained
    assert found.runs[1].found.trained is not found.runs[2].found.trained
    assert trained[-1] == "speedup-1.2-decay-1000 (4 of 4): sets of masks"
    # Keeping the third mask costs nothing.
    assert found.runs[1].last.kept == (False, False, True)
    for run in found.runs[2:]:
        assert found.original / run.latency >= 1.2 * (1 - 1e-9)
    found.write(tmp_path)
    report = json.loads((tmp_path / "search.json").read_text())
    for told in report["runs"]:
        assert [each["epoch"] for each in told["epochs"]] == [0, 1, 2]
        assert told["stable_since_epoch"] is None
        assert told["held_out"] is None
        judged = {tuple(each["kept"]): each["loss"] for each in told["sets"]["judged"]}
        assert judged[tuple(told["kept"])] == told["sets"]["loss"]
        assert told["sets"]["mean_loss"] == pytest.approx(np.mean(list(judged.values())))
    # All sets of one were judged, and each of them once.
    assert len(report["runs"][0]["sets"]["judged"]) == 3
    assert report["runs"][0]["sets"]["judged"] == report["runs"][1]["sets"]["judged"]
    picture = (tmp_path / "search.svg").read_text()
    # For every run the losses of sets that were drawn, of the one that was chosen, of training.
    assert picture.count("<polyline") == 4 * 3
    plans, masks = found.tables()
    assert plans.columns[-3:] == ("loss", "of any set", "explained")
    assert len(masks.rows) == 3


def test_sets_are_judged_by_held_out_samples_that_tell_as_much(monkeypatch):
    model, data, others = load(chain(2)), samples(48), samples(32, seed=1)
    judges = []

    class Seen(SetLoss):
        def __init__(self, module, teacher, objective, given, *more):
            judges.append(given)
            super().__init__(module, teacher, objective, given, *more)

    monkeypatch.setattr("graphfold.calibration.searching.SetLoss", Seen)
    for given, held_out, expected in (
        (data, None, data),
        (data, others, others),
        (data, others.without_labels(), data),
        (data.without_labels(), others.without_labels(), None),
    ):
        options = {"held_out": held_out, "recipe": RECIPE, "decays": (0.0,)}
        search(model, given, [Budget("keep", 1)], **options)
        assert judges[-1] is (expected or held_out)


def test_what_is_on_is_chosen_anew_after_each_epoch():
    chosen = []

    def choose(importance):
        chosen.append(list(importance))
        return (len(chosen) < 3, True, len(chosen) >= 3)

    module, objective, _ = prepared(chain(3), choose)
    hooks = MaskHooks(module, [0.0] * 3, 0.0)
    recipe = Recipe(epochs=3, batch_size=16, augment=False)
    found = train(module, None, samples(), recipe, objective=objective, hooks=hooks)
    assert found.steps == 12
    assert [each.changes for each in hooks.course] == [0, 0, 2, 0]
    assert [each.kept[0] for each in hooks.course] == [True, True, False, False]
    assert len(chosen) == 4
    assert stable_since(hooks.course) == 2


def test_the_device_is_measured_once(tmp_path, monkeypatch):
    model, other = load(chain(3)), load(chain(2))
    measured = []

    def measure(given, path, **_):
        measured.append(given)
        table = table_of(given, {"block0": 0.5, "block1": 1.0})
        stated = table.header.model_copy(update={"model": ModelReference(sha256=digest(given))})
        table = table.model_copy(update={"header": stated})
        write_table(table, path)
        return SimpleNamespace(table=table)

    monkeypatch.setattr(searching, "profile_model", measure)
    options = {"folder": tmp_path, "recipe": Recipe(epochs=1, batch_size=16)}
    for given in (model, model):
        found = search(given, samples(16), [Budget("speedup", 1.1)], **options)
        assert found.runs[0].latency < found.original / 1.1
        (tmp_path / "speedup-1.1.partial").unlink()
    assert measured == [model]
    search(other, samples(16), [Budget("keep", 1)], **options)
    assert measured == [model, other]
    assert read_latency(tmp_path / "latency.json").header.model.sha256 == digest(other)
    # Without a decay and without a budget of time none is needed.
    (tmp_path / "latency.json").unlink()
    (tmp_path / "keep-1.partial").unlink()
    found = search(model, samples(16), [Budget("keep", 1)], decays=(0.0,), **options)
    assert found.savings is None
    assert len(measured) == 2


# --- the command ------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path):
    model = load(chain(3))
    save(model, tmp_path / "model.onnx")
    for name, seed in (("train", 0), ("test", 1)):
        images, labels = pictures(64, seed)
        np.savez(tmp_path / f"{name}.npz", x=images, labels=labels)
    table = table_of(model, {"block0": 0.5, "block1": 1.0, "block2": 2.0})
    write_table(table, tmp_path / "latency.json")
    return tmp_path


def command(files, *more, out="found"):
    return [
        *("search", str(files / "model.onnx"), "--data", str(files / "train.npz")),
        *("--validation", str(files / "test.npz"), "--latency", str(files / "latency.json")),
        *("--epochs", "2", "--batch-size", "16", "-o", str(files / out), *more),
    ]


@pytest.mark.parametrize("by", ["loss", "gradient"])
def test_a_killed_search_goes_on_to_the_same_bytes(files, monkeypatch, capfd, by):
    asked = ("--keep", "1,2", "--decay", "0.01", "--by", by)
    assert main(command(files, *asked, "--json")) == 0
    document = json.loads(capfd.readouterr().out)
    names = ["keep-1.json", "keep-2.json", "search.json", "search.svg"]
    assert sorted(path.name for path in (files / "found").iterdir()) == names
    assert json.loads((files / "found" / "search.json").read_text()) == document

    monkeypatch.setattr(training, "_SAVED_EVERY", 0.0)
    step = training._Run._step
    made = []

    def killed(self, moment, positions):
        made.append(moment)
        if len(made) == 14:
            raise KeyboardInterrupt
        return step(self, moment, positions)

    with monkeypatch.context() as patch:
        patch.setattr(training._Run, "_step", killed)
        assert main(command(files, *asked, "-q", out="again")) == 130
    found = sorted(path.name for path in (files / "again").iterdir())
    assert found == ["keep-1.partial", "keep-2.partial"]
    if by == "gradient":  # in the other way the decay only chooses
        other = (*asked[:3], "0.02", *asked[4:])
        assert main(command(files, *other, "-q", out="again")) == 2
        assert "decay 0.01, now 0.02" in capfd.readouterr().err
    way = {"loss": "gradient", "gradient": "loss"}[by]
    assert main(command(files, *asked[:4], "--by", way, "-q", out="again")) == 2
    assert f"by {by!r}, now {way!r}" in capfd.readouterr().err
    assert main(command(files, *asked, out="again")) == 0
    assert "continued: 13 steps" in capfd.readouterr().err
    assert sorted(path.name for path in (files / "again").iterdir()) == names
    for name in names:
        ours, theirs = ((files / out / name).read_text() for out in ("again", "found"))
        if name == "search.json":
            ours = json.loads(ours)
            for run in ours["runs"]:
                run["continued"] = 0
            theirs = json.loads(theirs)
        assert ours == theirs


def test_two_processes_search_as_one(files, capfd):
    asked = ("--keep", "1", "--decay", "0,100", "--device", "cpu", "--json")
    assert two_processes(command(files, *asked)) == [0, 0]
    document = json.loads(capfd.readouterr().out)  # of one of them
    costly, cheap = document["runs"]
    for run in (costly, cheap):
        assert len(run["sets"]["judged"]) == 3
        assert run["steps"] == 8
    assert cheap["kept"] == [0, 0, 1]  # what saves the least
    assert costly["sets"]["judged"] == cheap["sets"]["judged"]
    assert not list((files / "found").glob("*.partial"))


def test_plans_of_the_command_are_fine_tuned_and_folded(files, capfd):
    assert main(command(files, "--speedup", "1.3", "--no-labels", "-q")) == 0
    plan = files / "found" / "speedup-1.3.json"
    assert main(["optimize", str(files / "model.onnx"), "--plan", str(plan), "-q"]) == 0
    tuned = ["finetune", str(files / "model.onnx"), "--plan", str(plan), "--epochs", "1"]
    tuned += ["--data", str(files / "train.npz"), "-o", str(files / "tuned.onnx"), "--json"]
    capfd.readouterr()
    assert main(tuned) == 0
    assert json.loads(capfd.readouterr().out)["folding"]["error"] < 1e-5


@pytest.mark.parametrize(
    ("more", "match"),
    [
        ((), "how much is to be kept?"),
        (("--keep", "two"), "--keep 'two' is no list of numbers"),
        (("--keep", "3"), "3 of 3 masks cannot be kept"),
        (("--keep", "1.5"), "1.5 of 3 masks cannot be kept"),
        (("--keep", "1,1"), "the same twice among the budgets"),
        (("--keep", "1", "--decay", "-1"), "the decay's strength is 0 or more"),
        (("--speedup", "9"), "without any of the 3 masks the network takes"),
        (("--keep", "1", "--per", "layer"), "--per 'layer' is not known"),
        (("--keep", "1", "--by", "chance"), "--by 'chance' is not known"),
        (("--keep", "1", "-o", "-"), "the result goes to a folder"),
    ],
)
def test_what_cannot_be_searched_is_refused(files, capfd, more, match):
    assert main(command(files, *more)) in (1, 2)
    assert match in capfd.readouterr().err


@pytest.mark.parametrize(("by", "steps"), [("loss", 8), ("gradient", 6)])
def test_samples_are_held_back_where_they_are_needed(files, capfd, by, steps):
    given = command(files, "--keep", "1", "--by", by, "--decay", "0", "--json")
    at = given.index("--validation")
    assert main(given[:at] + given[at + 2 :]) == 0
    (run,) = json.loads(capfd.readouterr().out)["runs"]
    assert run["steps"] == steps  # 64 samples, or 58, in batches of 16, for two epochs
    assert (run["held_out"] is None) == (by == "loss")


def test_a_folder_that_nothing_came_into_goes(files, capfd):
    given = command(files, "--keep", "1")
    given[given.index(str(files / "model.onnx"))] = str(files / "absent.onnx")
    there = set(files.iterdir())
    assert main(given) == 2
    assert "absent.onnx: no such file" in capfd.readouterr().err
    assert set(files.iterdir()) == there

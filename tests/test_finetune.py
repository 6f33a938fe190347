"""Fine-tuning: what a plan means is trained, folded exactly, and continued after a kill."""

from __future__ import annotations

import json

import numpy as np
import onnx
import pytest
from builders import ModelBuilder, nonzero, run
from onnx import numpy_helper
from trainable import CLASSES, network, pictures

torch = pytest.importorskip("torch")

from together import two_processes  # noqa: E402

import graphfold  # noqa: E402
from graphfold.calibration import training  # noqa: E402 - needs torch
from graphfold.calibration.bridge import bridge  # noqa: E402
from graphfold.calibration.dataset import read_dataset  # noqa: E402
from graphfold.calibration.finetune import finetune  # noqa: E402
from graphfold.calibration.pairs import pair_up  # noqa: E402
from graphfold.calibration.recipe import Recipe  # noqa: E402
from graphfold.calibration.samples import Samples  # noqa: E402
from graphfold.calibration.training import train  # noqa: E402
from graphfold.calibration.untie import untie  # noqa: E402
from graphfold.cli import main  # noqa: E402
from graphfold.errors import DataError, ModelError, UsageError  # noqa: E402
from graphfold.free import with_free_activations  # noqa: E402
from graphfold.graph import Graph  # noqa: E402
from graphfold.model import load, save, to_proto  # noqa: E402
from graphfold.plan import read_plan  # noqa: E402
from graphfold.specs import model_inputs  # noqa: E402

PLAN = {
    "graphfold_plan": 1,
    "segments": [
        {"input": "stem", "output": "block0", "boundary": "hoist"},
        {"input": "block0", "output": "block1", "boundary": "exact"},
    ],
}
RECIPE = Recipe(epochs=3, batch_size=16, learning_rate=0.4, augment=False)


def samples(count=64, seed=0, **options):
    images, labels = pictures(count, seed)
    return Samples.of({"x": images}, labels, **options)


@pytest.fixture(scope="module")
def original():
    """The small classifier, trained."""
    pair = pair_up(load(network()), None, samples(), None, 0.0, 1.0, None)
    recipe = Recipe(epochs=8, batch_size=16, learning_rate=0.8, augment=False)
    train(pair.student, None, samples(), recipe, objective=pair.objective)
    return pair.student.to_model()


def accuracy(model, count=96, seed=1):
    images, labels = pictures(count, seed)
    return float(np.mean(run(to_proto(model), {"x": images})[0].argmax(1) == labels))


# --- what is made -----------------------------------------------------------------------------


@pytest.mark.parametrize("labels", [True, False])
def test_the_trained_network_is_folded_exactly(original, labels):
    data = samples() if labels else samples().without_labels()
    recipe = Recipe(epochs=6, batch_size=16, learning_rate=0.8, augment=False)
    found = finetune(original, data, PLAN, held_out=samples(96, seed=1), recipe=recipe)
    assert found.objective.alpha == (0.7 if labels else 1.0)
    assert found.free_activations == 2
    before, after = found.trained.epochs[0].held_out, found.trained.last.held_out
    assert found.teacher.accuracy > 0.95
    assert before.accuracy < 0.6 < 0.9 < after.accuracy == accuracy(found.result.folded)
    assert before.agreement < 0.6 < 0.9 < after.agreement
    assert found.folding.error < 1e-5
    assert found.folding.other_class == 0
    kinds = [node.op_type for node in to_proto(found.result.folded).graph.node]
    assert kinds.count("Conv") == 3
    assert kinds.count("Relu") == 3
    assert "BatchNormalization" not in kinds
    # The reference that torch trained is the one that was folded.
    images = pictures(96, seed=1)[0]
    module = bridge(found.result.reference)
    with torch.no_grad():
        ours = module(torch.from_numpy(images))["y"].numpy()
    (theirs,) = run(to_proto(found.result.folded), {"x": images})
    assert np.abs(ours - theirs).max() < 1e-5 * np.abs(ours).max()
    json.dumps(found.to_json(), allow_nan=False)
    assert len(found.tables()[0].rows) == 8


def test_without_a_plan_the_model_itself_is_trained(original):
    found = finetune(original, samples(), held_out=samples(32, seed=1), recipe=RECIPE)
    assert found.plan is None
    assert found.folding.error < 1e-5
    assert found.trained.last.held_out.accuracy > 0.9


def test_another_teacher_and_its_names(original):
    data, held_out = samples().without_labels(), samples(32, seed=1).without_labels()
    proto = to_proto(original)
    renamed = onnx.ModelProto()
    renamed.CopyFrom(proto)
    for node in renamed.graph.node:
        for names in (node.input, node.output):
            names[:] = [{"x": "picture", "y": "scores"}.get(name, name) for name in names]
    renamed.graph.input[0].name, renamed.graph.output[0].name = "picture", "scores"
    module = bridge(original)

    class Plain(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = module

        def forward(self, images):
            return self.inner(images)["y"]

    student = load(network(seed=3))
    options = {"held_out": held_out, "recipe": RECIPE}
    found = [
        finetune(student, data, teacher=teacher, **options).trained.epochs
        for teacher in (original, load(renamed), Plain())
    ]
    assert found[0] == found[1] == found[2]
    own = finetune(student, data, **options).trained.epochs
    assert own[0].held_out.agreement == 1.0


def test_a_module_may_know_what_the_network_is_not_shown(original):
    """As the noise that a denoising network is to tell."""
    images, _ = pictures(32, 5)
    rng = np.random.default_rng(2)
    wanted = rng.normal(size=(32, CLASSES)).astype(np.float32)

    class Told(torch.nn.Module):
        def forward(self, *arrays):
            return arrays[1]

    data = Samples.of({"x": images, "wanted": wanted})
    found = finetune(
        load(network(seed=3)), data, PLAN, held_out=data, teacher=Told(), recipe=RECIPE
    )
    epochs = found.trained.epochs
    assert epochs[-1].held_out.loss < epochs[0].held_out.loss
    answered = torch.tensor(run(to_proto(found.result.reference), {"x": images})[0])
    apart = torch.nn.functional.kl_div(
        answered.log_softmax(1),
        torch.tensor(wanted).log_softmax(1),
        log_target=True,
        reduction="none",
    )
    assert epochs[-1].held_out.loss == pytest.approx(float(apart.sum(1).mean()), rel=1e-4)
    assert found.folding.error < 1e-5


def test_fitted_segments_are_where_the_training_starts(original):
    merged = PLAN["segments"][0]
    fitted = {"input": "block0", "output": "block1", "weights": "regress", "kernel": [3, 3]}
    plan = {"graphfold_plan": 1, "segments": [merged, fitted]}
    held_out = samples(96, seed=1)
    found = finetune(original, samples(128), plan, held_out=held_out, recipe=RECIPE)
    assert found.free_activations == 1
    assert found.folding.error < 1e-5
    start = [e.trained.epochs[0].held_out.loss for e in (found, _merged(original, held_out))]
    assert start[0] < start[1]


def _merged(original, held_out):
    return finetune(original, samples(128), PLAN, held_out=held_out, recipe=RECIPE)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"labels": 9}, DataError, "labels up to 9, and the network has 4 classes"),
        ({"teacher": network(seed=1, batch=1)}, None, None),
        ({"teacher": "other"}, UsageError, "the teacher's y is"),
        ({"half": True}, ModelError, "not float32"),
        ({"alpha": 2.0}, UsageError, "alpha is from 0 to 1"),
    ],
)
def test_what_cannot_be_trained_is_refused(original, change, error, match):
    images, labels = pictures(32)
    model, teacher = original, None
    if "labels" in change:
        labels = labels.copy()
        labels[0] = change["labels"]
    if change.get("teacher") == "other":
        net = ModelBuilder(("N", 3, 8, 8))
        flat = net.op("Flatten", net.op("GlobalAveragePool", net.conv("x", 7)))
        matrix = net.constant(nonzero(net.rng, 7, 5))
        teacher = load(net.model(net.op("Gemm", flat, matrix, out="y")))
    elif "teacher" in change:
        teacher = load(change["teacher"])
    if "half" in change:
        net = ModelBuilder(("N", 3, 8, 8), dtype=np.float16)
        model = load(net.model(net.op("Relu", net.conv("x", 4), out="y")))
        images, labels = images.astype(np.float16), None
    data = Samples.of({"x": images}, labels)
    recipe = Recipe(epochs=1, batch_size=32, augment=False)
    options = {"teacher": teacher, "alpha": change.get("alpha", 0.7), "recipe": recipe}
    if error is None:
        finetune(model, data, **options)
        return
    with pytest.raises(error, match=match):
        finetune(model, data, **options)


# --- free activations -------------------------------------------------------------------------


def free(model, plan):
    return with_free_activations(Graph(model), read_plan(plan))


def test_free_activations_are_the_networks_own(original):
    found, count = free(original, PLAN)
    assert count == 2
    assert [segment.activation.like for segment in found.segments] == ["deep0", "deep1"]
    again, more = with_free_activations(Graph(original), found)
    assert again is found
    assert more == 0


def test_a_free_activation_inside_a_branch_stands_behind_the_add(original):
    inner = Graph(original).values()["block0"].producer().inputs[1].name
    plan = {
        "graphfold_plan": 1,
        "segments": [{"input": "stem", "output": inner, "boundary": "hoist"}],
    }
    found, count = free(original, plan)
    assert count == 1
    assert found.segments[0].activation is None
    assert [(item.tensor, item.activation.like) for item in found.add_activations] == [
        ("block0", "deep0")
    ]


def test_short_forms_stay_short_and_say_what_is_added(original):
    found, count = free(original, {"graphfold_plan": 1, "keep_blocks": [0, 1]})
    assert count == 1
    assert found.activation.like == "stem"
    stated = {"graphfold_plan": 1, "keep_blocks": [0, 1], "activation": "HardSwish"}
    same, none = free(original, stated)
    assert none == 0
    assert same.activation == "HardSwish"


def test_an_activation_that_is_there_is_not_doubled():
    net = ModelBuilder(("N", 3, 8, 8))
    inner = net.op("Relu", net.conv("x", 4, 1), out="inner")
    net.op("Relu", net.conv(inner, 4, 1, out="second"), out="y")
    plan = {
        "graphfold_plan": 1,
        "segments": [{"input": "x", "output": "second", "boundary": "exact"}],
    }
    assert free(load(net.model("y")), plan)[1] == 0


def test_parameters_per_channel_are_not_put_where_they_do_not_fit():
    net = ModelBuilder(("N", 3, 8, 8))
    usual = net.op("Relu", net.conv("x", 6, 1), out="usual")
    slope = net.constant(np.full((8, 1, 1), 0.1))
    inner = net.op("PRelu", net.conv(usual, 8, 1), slope, out="inner")
    net.conv(inner, 5, 1, out="y")
    plan = {
        "graphfold_plan": 1,
        "segments": [{"input": "usual", "output": "y", "boundary": "exact"}],
    }
    found, count = free(load(net.model("y")), plan)
    assert count == 1
    assert found.segments[0].activation.like == "usual"


def test_norms_that_share_numbers_get_their_own():
    net = ModelBuilder(("N", 3, 8, 8))
    ones, zeros = net.constant(np.ones(4), "ones"), net.constant(np.zeros(4), "zeros")
    first = net.op("BatchNormalization", net.conv("x", 4), ones, zeros, zeros, ones, channels=4)
    copied = net.op("Identity", zeros)
    net.op("BatchNormalization", net.conv(first, 4), ones, zeros, copied, ones, out="y")
    proto = net.model("y")
    assert not {"ones", "zeros"} & set(bridge(load(proto)).weights)
    untied = untie(load(proto))
    images = pictures(2)[0]
    np.testing.assert_array_equal(
        run(proto, {"x": images})[0], run(to_proto(untied), {"x": images})[0]
    )
    module = bridge(untied, update_statistics=True)
    assert len(module.weights) == 8
    assert len(module.fixed) == 4
    module.train()(torch.from_numpy(images))
    means = [value for value in module.fixed.values() if value.abs().max() < 0.5]
    assert len({tuple(mean.tolist()) for mean in means}) == len(means)


# --- the command ------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path, original):
    save(original, tmp_path / "model.onnx")
    for name, seed in (("train", 0), ("test", 1)):
        images, labels = pictures(64, seed)
        np.savez(tmp_path / f"{name}.npz", x=images, labels=labels)
    (tmp_path / "plan.json").write_text(json.dumps(PLAN))
    return tmp_path


def command(files, *more, out="tuned.onnx"):
    return [
        *("finetune", str(files / "model.onnx"), "--plan", str(files / "plan.json")),
        *("--data", str(files / "train.npz"), "--validation", str(files / "test.npz")),
        *("--epochs", "2", "--batch-size", "16", "-o", str(files / out), *more),
    ]


def weights(path):
    proto = onnx.load(path)
    return {item.name: numpy_helper.to_array(item) for item in proto.graph.initializer}


def test_a_killed_command_goes_on_to_the_same_bytes(files, monkeypatch, capfd):
    assert main(command(files, "--json", "--reference-out", str(files / "reference.onnx"))) == 0
    document = json.loads(capfd.readouterr().out)
    assert [epoch["epoch"] for epoch in document["epochs"]] == [0, 1, 2]
    assert document["folding"]["other_class"] == 0
    assert [segment["activation"]["like"] for segment in document["plan"]["segments"]] == [
        "deep0",
        "deep1",
    ]
    assert not (files / "tuned.onnx.partial").exists()
    assert sum(n.op_type == "Conv" for n in onnx.load(files / "reference.onnx").graph.node) == 7

    monkeypatch.setattr(training, "_SAVED_EVERY", 0.0)
    step = training._Run._step

    def killed(self, moment, positions):
        if moment.done == 5:
            raise KeyboardInterrupt
        return step(self, moment, positions)

    with monkeypatch.context() as patch:
        patch.setattr(training._Run, "_step", killed)
        assert main(command(files, "-q", out="again.onnx")) == 130
    assert (files / "again.onnx.partial").exists()
    assert not (files / "again.onnx").exists()
    assert main(command(files, "-q", "--alpha", "0.5", out="again.onnx")) == 2
    assert "alpha 0.7, now 0.5" in capfd.readouterr().err
    assert main(command(files, out="again.onnx")) == 0
    assert "continued: 5 steps" in capfd.readouterr().err
    assert (files / "again.onnx").read_bytes() == (files / "tuned.onnx").read_bytes()


def test_two_processes_train_as_one(files, capfd):
    # Without norms a batch in two shares is the same batch.
    save(load(network(norm=False)), files / "model.onnx")
    more = ("--learning-rate", "0.5", "--device", "cpu")
    assert main(command(files, *more, "-q", out="one.onnx")) == 0
    assert two_processes(command(files, *more, out="two.onnx")) == [0, 0]
    assert "Fine-tuning" in capfd.readouterr().out
    assert not (files / "two.onnx.partial").exists()
    one, two = weights(files / "one.onnx"), weights(files / "two.onnx")
    assert one.keys() == two.keys()
    start = weights(files / "model.onnx")
    for name, value in one.items():
        np.testing.assert_allclose(two[name], value, rtol=1e-3, atol=1e-5)
        assert name not in start or not np.allclose(start[name], value, rtol=1e-3, atol=1e-5)


def test_pictures_are_read_when_they_are_wanted(tmp_path, original):
    image_module = pytest.importorskip("PIL.Image")
    images, labels = pictures(8)
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        folder = tmp_path / str(label)
        folder.mkdir(exist_ok=True)
        pixels = np.clip(image * 40 + 128, 0, 255).astype(np.uint8).transpose(1, 2, 0)
        image_module.fromarray(pixels).save(folder / f"{number}.png")
    data = read_dataset(str(tmp_path), model_inputs(original), "unit")
    lazy = Samples.of_dataset(data)
    whole = next(iter(data.batches(8)))
    found, known = lazy.take([5, 2])
    np.testing.assert_array_equal(found["x"].numpy(), whole.feed["x"][[5, 2]])
    assert known.tolist() == whole.labels[[5, 2]].tolist()
    tuned = graphfold.finetune(original, data, recipe=Recipe(epochs=1, augment=True))
    assert tuned.folding.samples == 1


@pytest.mark.parametrize(
    ("more", "text"),
    [
        (("--optimizer", "rmsprop"), "--optimizer 'rmsprop' is not known (sgd or adam)"),
        (("-o", "-"), "the result goes to a file"),
        (("--temperature", "0"), "temperature above 0"),
        (("--alpha", "0", "--no-labels"), "neither labels nor a teacher"),
        (("--warmup", "5"), "warmup 5"),
    ],
)
def test_wrong_options_are_refused(files, more, text, capfd):
    assert main([*command(files), *more]) == 2
    assert text in capfd.readouterr().err

"""The training core: steps that repeat themselves, statistics, losses, checkpoints."""

from __future__ import annotations

import math

import numpy as np
import pytest
from builders import assert_same, run
from onnx import numpy_helper
from trainable import CLASSES, network, pictures

torch = pytest.importorskip("torch")

from graphfold.calibration import training  # noqa: E402 - needs torch
from graphfold.calibration.bridge import bridge  # noqa: E402
from graphfold.calibration.checkpoints import Checkpoint  # noqa: E402
from graphfold.calibration.evaluating import evaluate  # noqa: E402
from graphfold.calibration.objective import answers  # noqa: E402
from graphfold.calibration.recipe import Recipe  # noqa: E402
from graphfold.calibration.samples import Samples, augment, draw  # noqa: E402
from graphfold.calibration.training import Hooks, train  # noqa: E402
from graphfold.errors import DataError, UsageError  # noqa: E402
from graphfold.model import load, to_proto  # noqa: E402

RECIPE = Recipe(epochs=3, batch_size=16, learning_rate=0.8, augment=False)


def samples(count=64, seed=0, **options):
    images, labels = pictures(count, seed)
    return Samples.of({"x": images}, labels, **options)


def prepared(proto=None, teacher=None, *, classes=CLASSES, **options):
    model = load(network() if proto is None else proto)
    objective = answers(model, teacher, classes=classes, **options)
    return bridge(model, outputs=objective.outputs, update_statistics=True), objective


def trained(recipe=RECIPE, data=None, **options):
    module, objective = prepared()
    found = train(
        module,
        None,
        samples() if data is None else data,
        recipe,
        objective=objective,
        held_out=samples(48, seed=1),
        **options,
    )
    return module, found


def states_equal(first, second):
    ours, theirs = first.state_dict(), second.state_dict()
    assert ours.keys() == theirs.keys()
    return all(torch.equal(ours[name], theirs[name]) for name in ours)


# --- learning ---------------------------------------------------------------------------------


def test_labels_are_learned_and_statistics_go_back_into_the_file():
    module, found = trained(Recipe(epochs=6, batch_size=16, learning_rate=0.8))
    before, after = found.epochs[0].held_out, found.last.held_out
    assert before.accuracy < 0.6 < 0.9 < after.accuracy
    assert after.worst_class <= after.accuracy
    assert [epoch.number for epoch in found.epochs] == list(range(7))
    assert found.kept == 6
    assert found.steps == 24
    proto = to_proto(module.to_model())
    images, labels = pictures(48, seed=1)
    (scores,) = run(proto, {"x": images})
    with torch.no_grad():
        assert_same(scores, module(torch.from_numpy(images))["y"].numpy())
    assert np.mean(scores.argmax(1) == labels) == after.accuracy
    assert min(
        np.mean(scores[labels == kind].argmax(1) == kind) for kind in range(CLASSES)
    ) == pytest.approx(after.worst_class)
    stored = {item.name: numpy_helper.to_array(item) for item in network().graph.initializer}
    norms = [node for node in proto.graph.node if node.op_type == "BatchNormalization"]
    now = {item.name: numpy_helper.to_array(item) for item in proto.graph.initializer}
    for node in norms:
        assert all(not np.array_equal(now[name], stored[name]) for name in node.input[3:5])


def test_batch_statistics_move_as_the_file_says():
    # One step at a rate of 0: only the running statistics move.
    module, objective = prepared()
    images, labels = pictures(16)
    data = Samples.of({"x": images}, labels)
    recipe = Recipe(epochs=1, batch_size=16, learning_rate=0.0, weight_decay=0.0, augment=False)
    proto = network()
    norm = next(node for node in proto.graph.node if node.op_type == "BatchNormalization")
    stored = {item.name: numpy_helper.to_array(item) for item in proto.graph.initializer}
    tap = bridge(load(proto), outputs=[norm.input[0]])(torch.from_numpy(images))
    values = tap[norm.input[0]].detach().numpy()
    train(module, None, data, recipe, objective=objective)
    mean = 0.9 * stored[norm.input[3]] + 0.1 * values.mean((0, 2, 3))
    variance = 0.9 * stored[norm.input[4]] + 0.1 * values.var((0, 2, 3), ddof=1)
    np.testing.assert_allclose(module.fixed[norm.input[3]].numpy(), mean, rtol=1e-5)
    np.testing.assert_allclose(module.fixed[norm.input[4]].numpy(), variance, rtol=1e-5)
    for name, weight in module.weights.items():
        assert np.array_equal(weight.detach().numpy(), stored[name])


def test_a_teacher_teaches_without_labels():
    teacher = load(network(seed=1))
    module, objective = prepared(teacher=teacher, classes=0)
    assert objective.alpha == 1.0
    original = bridge(teacher, outputs=objective.teacher_outputs)
    found = train(
        module,
        original,
        samples().without_labels(),
        Recipe(epochs=8, batch_size=16, learning_rate=0.5, augment=False),
        objective=objective,
        held_out=samples(48, seed=1).without_labels(),
    )
    before, after = found.epochs[0].held_out, found.last.held_out
    assert after.accuracy is None
    assert after.agreement > max(before.agreement, 0.8)
    assert after.loss < 0.3 * before.loss


def test_a_teacher_answers_once_to_what_is_only_judged():
    teacher = load(network(seed=1))
    module, objective = prepared(teacher=teacher)
    original = bridge(teacher, outputs=objective.teacher_outputs).eval()
    data, taught = samples(48, seed=1), {}
    first = evaluate(module, original, data, objective, taught=taught)
    assert list(taught) == [0]

    class Silent(torch.nn.Module):
        def forward(self, batch):
            raise AssertionError

    assert evaluate(module, Silent(), data, objective, taught=taught) == first


def test_the_loss_is_the_papers():
    teacher = load(network(seed=1))
    _, objective = prepared(teacher=teacher, alpha=0.7, temperature=2.0)
    generator = torch.Generator().manual_seed(0)
    own = torch.randn(5, CLASSES, generator=generator, dtype=torch.float64)
    other = torch.randn(5, CLASSES, generator=generator, dtype=torch.float64)
    labels = torch.tensor([0, 1, 2, 3, 0])
    soft, hard = torch.softmax(other / 2, 1), torch.softmax(own, 1)
    divergence = (soft * (soft.log() - torch.softmax(own / 2, 1).log())).sum(1).mean()
    entropy = -hard[range(5), labels].log().mean()
    expected = 0.7 * 4 * divergence + 0.3 * entropy
    found = objective.loss({"y": own}, {"y": other}, labels)
    assert float(found) == pytest.approx(float(expected))
    judged = objective.evaluation(objective.sums({"y": own}, {"y": other}, labels))
    assert judged.loss == pytest.approx(float(expected))
    assert judged.agreement == float((own.argmax(1) == other.argmax(1)).double().mean())


def test_labels_alone_are_smoothed_and_nothing_to_learn_is_an_error():
    _, objective = prepared()
    logits, labels = torch.randn(3, CLASSES), torch.tensor([0, 1, 2])
    expected = torch.nn.functional.cross_entropy(logits, labels, label_smoothing=0.1)
    assert torch.equal(objective.loss({"y": logits}, None, labels), expected)
    with pytest.raises(UsageError, match="neither labels nor a teacher"):
        prepared(classes=0)


def test_a_loss_that_is_no_number_ends_the_training():
    data = samples()
    images = data.take(range(64))[0]["x"].clone()
    images[3] = math.nan
    module, objective = prepared()
    broken = Samples.of({"x": images}, data.labels)
    with pytest.raises(DataError, match="no number any more"):
        train(module, None, broken, RECIPE, objective=objective)


def test_the_best_state_is_kept_where_that_is_asked_for():
    module, found = trained(Recipe(**{**RECIPE.to_json(), "epochs": 4, "keep": "best"}))
    scores = [epoch.held_out.score for epoch in found.epochs]
    assert found.kept == scores.index(max(scores))
    _, objective = prepared()
    again = evaluate(module, None, samples(48, seed=1), objective)
    assert again == found.last.held_out


def test_a_fixed_small_batch_is_summed_up():
    results = []
    for batch in ("N", 4):
        module, objective = prepared(network(norm=False, batch=batch))
        data = samples(fixed=None if batch == "N" else 4)
        train(module, None, data, RECIPE, objective=objective)
        results.append(module.weights)
    for name, weight in results[0].items():
        torch.testing.assert_close(weight, results[1][name], rtol=1e-4, atol=1e-5)


# --- recipe and samples -----------------------------------------------------------------------


def test_the_rate_rises_and_falls():
    recipe = Recipe(epochs=10, learning_rate=0.5, warmup=2)
    rates = [recipe.rate(done, 4, 128) for done in range(40)]
    assert rates[:8] == sorted(rates[:8])
    assert rates[8] == max(rates) == 0.25
    assert rates[8:] == sorted(rates[8:], reverse=True)
    assert rates[24] == pytest.approx(0.125)
    assert 0 < rates[-1] < 0.01
    assert Recipe(optimizer="adam", learning_rate=1e-3).rate(0, 4, 64) == 1e-3


@pytest.mark.parametrize("wrong", [{"epochs": 0}, {"momentum": 1.0}, {"warmup": 30}])
def test_impossible_recipes_are_refused(wrong):
    with pytest.raises(UsageError, match=next(iter(wrong))):
        Recipe(**wrong)


def test_every_epoch_has_its_own_order_of_all_samples():
    data = samples(70)
    first, second = data.order(16, 0, 0), data.order(16, 0, 1)
    assert first == data.order(16, 0, 0)
    assert first != second
    assert [len(batch) for batch in first] == [16] * 4
    assert len({row for batch in first for row in batch}) == 64
    assert data.batch_size(16, processes=3) == 15
    assert sum(map(len, data.in_order(16, (1, 2)))) == 32


def test_samples_are_split_and_picked():
    data = samples(20)
    train_part, held_back = data.split(5)
    assert sorted([*train_part.rows, *held_back.rows]) == list(range(20))
    images, labels = held_back.take([4, 0])
    expected, known = data.take([held_back.rows[4], held_back.rows[0]])
    assert torch.equal(images["x"], expected["x"])
    assert torch.equal(labels, known)
    with pytest.raises(DataError, match="cannot be held back"):
        data.split(20)


def test_small_pictures_are_shifted_and_mirrored_to_the_pixel():
    images = torch.arange(1, 2 * 3 * 16 * 16 + 1, dtype=torch.float32).reshape(2, 3, 16, 16)
    drawn = torch.tensor([[0.99, 0.0, 0.9, 0, 0], [0.5, 0.5, 0.1, 0, 0]])
    moved = augment(images, drawn)
    # The first is cut out two down and two to the left, the second is mirrored where it is.
    assert torch.equal(moved[0, :, :14, 2:], images[0, :, 2:, :14])
    assert not moved[0, :, 14:].any()
    assert not moved[0, :, :, :2].any()
    assert torch.equal(moved[1], images[1].flip(2))
    last = augment(images.movedim(1, -1), drawn)
    assert torch.equal(last.movedim(-1, 1), moved)


def test_large_pictures_are_cropped_within_their_values():
    images = torch.linspace(-1, 1, 96).expand(40, 3, 96, 96)
    changed = augment(images, draw(40, 0, 0, 0))
    assert changed.shape == images.shape
    assert changed.min() >= -1
    assert changed.max() <= 1
    slopes = (changed[:, 0, 0, -1] - changed[:, 0, 0, 0]) / 2
    assert (slopes < 0).any()
    assert (slopes > 0).any()
    assert (slopes.abs() < 0.9).float().mean() > 0.5
    assert (slopes.abs() > 0.4).all()
    tokens = torch.arange(6)
    assert augment(tokens, draw(6, 0, 0, 0)) is tokens


# --- checkpoints ------------------------------------------------------------------------------


class _KilledError(Exception):
    pass


class _Counting(Hooks):
    """Ends the process, so to speak, after some steps; its own count goes on."""

    def __init__(self, killed_at=None):
        self.killed_at, self.count, self.seen = killed_at, 0, []

    def before_step(self, moment):
        if moment.done == self.killed_at:
            raise _KilledError

    def after_step(self, moment):
        self.count += 1
        self.seen.append(moment.done)

    def state(self):
        return {"count": self.count}

    def restore(self, state):
        self.count = state["count"]


@pytest.mark.parametrize("killed_at", [2, 4, 7])
def test_a_killed_training_goes_on_to_the_same_bits(killed_at, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "_SAVED_EVERY", 0.0)
    recipe = Recipe(**{**RECIPE.to_json(), "augment": True, "keep": "best"})
    whole, found = trained(recipe, hooks=_Counting())
    path = tmp_path / "state"
    with pytest.raises(_KilledError):
        trained(recipe, hooks=_Counting(killed_at), checkpoint=path)
    hooks = _Counting()
    again, continued = trained(recipe, hooks=hooks, checkpoint=path)
    assert states_equal(whole, again)
    assert continued.epochs == found.epochs
    assert continued.continued == killed_at
    assert hooks.count == 12
    assert hooks.seen == list(range(killed_at, 12))
    # Once more, nothing is left to do.
    hooks = _Counting()
    over, _ = trained(recipe, hooks=hooks, checkpoint=path)
    assert hooks.seen == []
    assert states_equal(whole, over)


def test_a_checkpoint_of_something_else_is_refused(tmp_path):
    path = tmp_path / "state"
    trained(checkpoint=path, header={"model": "a"})
    other = Recipe(**{**RECIPE.to_json(), "learning_rate": 0.1})
    with pytest.raises(UsageError, match=r"recipe.learning_rate 0.8, now 0.1"):
        trained(other, checkpoint=path, header={"model": "a"})
    with pytest.raises(UsageError, match=r"model 'a', now 'b'"):
        trained(checkpoint=path, header={"model": "b"})
    path.write_bytes(b"something")
    with pytest.raises(UsageError, match="is no checkpoint"):
        trained(checkpoint=path)
    assert Checkpoint(None, {}).load() is None


def test_hooks_add_to_the_loss_and_end_the_training():
    class Shrinking(Hooks):
        def loss(self, own):
            return own["y"].square().mean()

        def after_epoch(self, epoch):
            return epoch.number == 2

    recipe = Recipe(**{**RECIPE.to_json(), "learning_rate": 0.1, "epochs": 9})
    plain, _ = trained(Recipe(**{**recipe.to_json(), "epochs": 2}))
    shrunk, found = trained(recipe, hooks=Shrinking())
    assert found.steps == 8
    images = torch.from_numpy(pictures(48, seed=1)[0])
    with torch.no_grad():
        assert shrunk(images)["y"].square().mean() < plain(images)["y"].square().mean()


def test_progress_tells_of_steps(monkeypatch):
    monkeypatch.setattr(training, "_TOLD_EVERY", 0.0)
    told = []
    trained(progress=told.append)
    assert [item.moment.done for item in told] == list(range(12))
    assert [item.last.number for item in told] == [0] * 4 + [1] * 4 + [2] * 4
    assert all(math.isfinite(item.loss) for item in told)

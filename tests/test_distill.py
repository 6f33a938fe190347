"""Self-distillation: it repairs, it refuses what images do not confirm, it repeats itself."""

from __future__ import annotations

import itertools

import numpy as np
import onnx
import pytest
from builders import ModelBuilder, nonzero, run
from onnx import numpy_helper

torch = pytest.importorskip("torch")

from graphfold.calibration import distill as module  # noqa: E402 - needs torch
from graphfold.calibration import matching  # noqa: E402
from graphfold.calibration.distill import distill  # noqa: E402
from graphfold.calibration.training_images import Images, augment, mixed  # noqa: E402
from graphfold.errors import DataError, UsageError  # noqa: E402
from graphfold.model import compare_interfaces, load, to_proto  # noqa: E402


def classifier(*, softmax=False, batch="N"):
    """Two convolutions, a pool and a fully connected layer over five classes."""
    build = ModelBuilder([batch, 3, 12, 12])
    build.conv("x", 8, 3, pad=1, out="first")
    build.op("Relu", "first", out="active")
    build.conv("active", 8, 3, stride=2, out="second")
    build.op("Relu", "second", out="features")
    build.op("GlobalAveragePool", "features", out="mean")
    build.op("Flatten", "mean", out="flat")
    weight, bias = build.constant(4 * nonzero(build.rng, 5, 8)), build.constant(np.zeros(5))
    build.op("Gemm", "flat", weight, bias, transB=1, out="logits")
    if softmax:
        build.op("Softmax", "logits", out="classes")
        return build.model("classes")
    return build.model("logits")


def damaged(proto, size=0.15):
    """The same network with noise on its weights."""
    changed = onnx.ModelProto()
    changed.CopyFrom(proto)
    rng = np.random.default_rng(5)
    for item in changed.graph.initializer:
        array = numpy_helper.to_array(item)
        noise = rng.standard_normal(array.shape) * array.std() * size
        item.CopyFrom(numpy_helper.from_array((array + noise).astype(array.dtype), item.name))
    return load(changed)


def images(count=100, batch=25):
    rng = np.random.default_rng(9)
    smooth = rng.standard_normal((count, 3, 4, 4)).repeat(3, axis=2).repeat(3, axis=3)
    array = (smooth + 0.3 * rng.standard_normal((count, 3, 12, 12))).astype(np.float32)
    return [{"x": array[start : start + batch]} for start in range(0, count, batch)]


def repair(student, teacher, data=None, **options):
    options = {"minutes": 10, "steps": 80, "step_size": 5e-3, **options}
    return distill(student, teacher, images() if data is None else data, **options)


@pytest.mark.parametrize("softmax", [False, True])
def test_damage_is_repaired(softmax):
    teacher = classifier(softmax=softmax)
    student = damaged(teacher)
    stored = to_proto(student)
    shown = []
    found = repair(student, load(teacher), features=["features"], progress=shown.append)
    assert found.is_kept
    assert found.after < 0.3 * found.before
    assert found.steps == 80
    assert [step for step, _ in found.curve] == list(range(0, 90, 10))
    assert min(value for _, value in found.curve) == found.after
    assert [item.step for item in shown] == list(range(1, 81))
    assert compare_interfaces(student, found.model) == []
    assert list(to_proto(found.model).graph.node) == list(stored.graph.node)
    assert to_proto(student) == stored
    # What is returned is the best state: judged again, it has the divergence that was told.
    again = repair(found.model, load(teacher), steps=1, step_size=0.0)
    assert again.before == pytest.approx(found.after, rel=1e-5)


def test_the_divergence_is_that_of_classes():
    teacher = load(classifier())
    student = damaged(classifier())
    found = repair(student, teacher, steps=1, step_size=0.0)
    batch = np.concatenate([item["x"] for item in images()])[4::5]
    probabilities = []
    for model in (student, teacher):
        (logits,) = run(to_proto(model), {"x": batch})
        values = np.exp(logits.astype(np.float64) - logits.max(1, keepdims=True))
        probabilities.append(values / values.sum(1, keepdims=True))
    own, other = probabilities
    divergence = (other * np.log(other / own)).sum(1).mean()
    assert found.before == pytest.approx(divergence, rel=1e-4)


def test_what_is_learned_is_softened_in_the_same_units():
    rng = torch.Generator().manual_seed(0)
    own, other = (torch.randn(4, 6, generator=rng, dtype=torch.float64) for _ in range(2))
    target = matching.Target("y", "y", True)
    soft = matching.divergences(own, other, target, 3.0)
    first, second = ((each / 3).softmax(-1) for each in (own, other))
    expected = 9 * (second * (second / first).log()).sum(-1)
    torch.testing.assert_close(soft, expected)
    # Far up only differences of logits count: half their variance over the classes.
    far = matching.divergences(own, other, target, 1e3)
    torch.testing.assert_close(far, (own - other).var(-1, correction=0) / 2, rtol=1e-2, atol=0)


def test_outputs_that_are_no_classes_are_compared_by_their_variance():
    build = ModelBuilder(["N", 3, 8, 8])
    build.conv("x", 4, 3, pad=1, out="first")
    build.op("Relu", "first", out="active")
    build.conv("active", 2, 3, pad=1, out="y")
    teacher = build.model("y")
    batch = [{"x": item["x"][:, :, :8, :8]} for item in images()]
    found = repair(damaged(teacher), load(teacher), batch)
    assert found.is_kept
    assert found.before < 0.5
    assert found.after < 0.3 * found.before


def test_what_held_back_images_do_not_confirm_is_not_kept():
    teacher = classifier()
    student = damaged(teacher, 0.01)
    worse = repair(student, load(teacher), step_size=20.0)
    assert not worse.is_kept
    assert to_proto(worse.model) == to_proto(student)
    same = repair(load(teacher), load(teacher), steps=8)
    assert not same.is_kept
    assert same.before == pytest.approx(0, abs=1e-6)


def test_the_same_seed_gives_the_same_model():
    teacher = classifier()
    student = damaged(teacher)
    first, second, other = (
        repair(student, load(teacher), steps=16, seed=seed) for seed in (3, 3, 4)
    )
    assert to_proto(first.model) == to_proto(second.model)
    assert first.curve == second.curve
    assert first.curve != other.curve


def test_held_back_images_are_never_trained_on():
    data = images()
    found = Images(data, ["x"], None)
    assert not set(found.training) & set(found.held_back)
    steps = itertools.islice(found.shuffled(torch.Generator().manual_seed(0)), 9)
    drawn = [row for batches in steps for rows in batches for row in rows]
    assert not set(drawn) & set(found.held_back)
    assert sorted(drawn[:80]) == found.training  # each once before any comes again
    (row,) = found.batch([26], "cpu", None)["x"]
    np.testing.assert_array_equal(row.numpy(), data[1]["x"][1])


def test_a_fixed_batch_is_kept_to():
    teacher = classifier(batch=3)
    assert repair(damaged(teacher), load(teacher)).is_kept


def test_time_decides_how_many_steps_are_made(monkeypatch):
    clock = itertools.count()
    monkeypatch.setattr(module, "_now", lambda: float(next(clock)))
    teacher = classifier()
    student = damaged(teacher)
    shown = []
    found = repair(student, load(teacher), minutes=1, steps=None, progress=shown.append)
    assert 40 < found.steps < 60  # the clock goes on by a second with each look
    assert [item.part for item in shown] == sorted(item.part for item in shown)
    assert 0.9 < shown[-1].part < 1.0
    assert len(found.curve) == 9
    # More steps than time allows: the training ends all the same.
    assert repair(student, load(teacher), minutes=1, steps=1000).steps < 60
    with pytest.raises(UsageError, match="no time is left for training"):
        repair(student, load(teacher), minutes=0.01)


def test_images_are_mirrored_and_zoomed_into():
    planes = torch.linspace(-1, 1, 16).expand(64, 3, 16, 16).contiguous()
    changed = augment(planes, torch.Generator().manual_seed(0))
    assert changed.shape == planes.shape
    slopes = (changed[:, 0, 8, 10] - changed[:, 0, 8, 5]) / (
        planes[0, 0, 8, 10] - planes[0, 0, 8, 5]
    )
    assert (slopes > 0).any()
    assert (slopes < 0).any()
    assert 0.77 < slopes.abs().min() < 0.83
    assert slopes.abs().max() < 1.01
    assert changed.abs().max() <= 1
    last = augment(planes.movedim(1, -1), torch.Generator().manual_seed(0))
    torch.testing.assert_close(last.movedim(-1, 1), changed)
    vectors = torch.zeros(4, 7)
    assert augment(vectors, torch.Generator()) is vectors


def test_images_are_blended_or_pasted_or_left():
    ramp = torch.linspace(0, 1, 8)[:, None, None, None].expand(8, 3, 12, 10).contiguous()
    kinds = {"left": 0, "blended": 0, "pasted": 0}
    for seed in range(60):
        changed = mixed({"x": ramp}, torch.Generator().manual_seed(seed))["x"]
        again = mixed({"x": ramp.movedim(1, -1)}, torch.Generator().manual_seed(seed))["x"]
        torch.testing.assert_close(again.movedim(-1, 1), changed)
        assert 0 <= changed.min() <= changed.max() <= 1
        other = (changed - ramp).abs() > 1e-6
        if torch.equal(changed, ramp):
            kinds["left"] += 1
        elif (changed.amin((1, 2, 3)) == changed.amax((1, 2, 3))).all():
            kinds["blended"] += 1
        else:
            kinds["pasted"] += 1
            area = other.any(0)[0].float().mean()
            assert 0.05 < area < 0.65
            assert torch.isin(changed, ramp).all()
    assert min(kinds.values()) >= 8
    single, vectors = {"x": ramp[:1]}, {"x": ramp, "v": torch.zeros(8, 5)}
    for batch in (single, vectors):
        for seed in range(5):
            found = mixed(batch, torch.Generator().manual_seed(seed))
            assert all(found[name] is item for name, item in batch.items())


def test_steps_are_scaled_by_output_channel():
    build = ModelBuilder([1, 2, 4, 4])
    weight = nonzero(build.rng, 3, 2, 1, 1)
    weight[1] *= 100
    build.conv("x", 3, weight=build.constant(weight, "weight"), out="y")
    student = module.bridge(load(build.model("y")))
    optimizer = module._ScaledAdam(student, 0.01)
    before = {name: item.detach().clone() for name, item in student.weights.items()}
    optimizer.step(student(torch.randn(1, 2, 4, 4))["y"].square().sum(), 1.0)
    moved = (student.weights["weight"] - before["weight"]).detach().flatten(1).norm(dim=1)
    torch.testing.assert_close(moved, 0.01 * before["weight"].flatten(1).norm(dim=1))


def test_wrong_data_and_models():
    teacher = load(classifier())
    student = damaged(classifier())
    with pytest.raises(DataError, match="8 images are too few"):
        repair(student, teacher, images(8, 8))
    with pytest.raises(DataError, match="batch 0 has no x"):
        repair(student, teacher, [{"image": np.zeros((20, 3, 12, 12), np.float32)}])
    with pytest.raises(UsageError, match="outputs are logits, the teacher's are classes"):
        repair(student, load(classifier(softmax=True)))
    with pytest.raises(UsageError, match="no such tensor in the graph: nowhere"):
        repair(student, teacher, features=["nowhere"])


def test_small_fixed_batches_add_up_to_a_step():
    alone = Images(images(), ["x"], 1)
    (step,) = itertools.islice(alone.shuffled(torch.Generator().manual_seed(0)), 1)
    assert [len(rows) for rows in step] == [1] * 16
    threes = Images(images(), ["x"], 3)
    (step,) = itertools.islice(threes.shuffled(torch.Generator().manual_seed(0)), 1)
    assert [len(rows) for rows in step] == [3] * 6
    teacher = classifier(batch=1)
    assert repair(damaged(teacher), load(teacher)).is_kept


@pytest.mark.parametrize("size", [0.002, 0.15, 2.0])
def test_steps_are_as_long_as_the_damage_is_large(size, monkeypatch):
    lengths = []
    original = module._ScaledAdam

    def noted(student, step_size):
        lengths.append(step_size)
        return original(student, step_size)

    monkeypatch.setattr(module, "_ScaledAdam", noted)
    found = repair(damaged(classifier(), size), load(classifier()), steps=1, step_size=None)
    assert lengths == [pytest.approx(min(max(3e-3 * found.before, 1e-3), 3e-3))]

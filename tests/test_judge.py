"""Damage: what is said about networks whose answers differ, against figures worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from graphfold.calibration.judge import Judge, Tally
from graphfold.errors import DataError


def softmax(x: np.ndarray) -> np.ndarray:
    found = np.exp(x - x.max(axis=1, keepdims=True))
    return found / found.sum(axis=1, keepdims=True)


def divergence(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    return (p * np.log(p / q)).sum(axis=1)


def logits(seed: int, samples: int = 6, classes: int = 4) -> np.ndarray:
    return 3 * np.random.default_rng(seed).normal(size=(samples, classes)).astype(np.float32)


def test_logits_are_judged_by_divergence():
    one, two = logits(0), logits(1)
    judge = Judge([{"y": one}])
    assert judge.kinds == {"y": "logits"}
    found = judge.damages(0, {"y": two})
    np.testing.assert_allclose(found, divergence(softmax(one), softmax(two)), rtol=1e-5)
    # Adding the same to all logits is no change.
    np.testing.assert_allclose(judge.damages(0, {"y": one + 7}), 0, atol=1e-6)


def test_probabilities_are_taken_as_they_are():
    one, two = softmax(logits(0)), softmax(logits(1))
    judge = Judge([{"y": one}])
    assert judge.kinds == {"y": "probabilities"}
    np.testing.assert_allclose(judge.damages(0, {"y": two}), divergence(one, two), rtol=1e-4)


def test_other_outputs_are_judged_by_their_share_of_variance():
    rng = np.random.default_rng(3)
    original = rng.normal(size=(50, 2, 5, 5)).astype(np.float32)
    judge = Judge([{"y": original}])
    assert judge.kinds == {"y": "values"}
    assert not judge.is_classifier
    # The mean of every position explains nothing: all of the variance is lost.
    mean = np.broadcast_to(original.mean(axis=0), original.shape)
    assert judge.damages(0, {"y": mean}).mean() == pytest.approx(1.0, rel=1e-5)
    verdict = judge.verdict([{"y": original + 0.1}])
    span = float(original.max() - original.min())
    assert verdict.psnr == pytest.approx(20 * np.log10(span / 0.1), rel=1e-4)
    assert verdict.max_error == pytest.approx(0.1 / np.abs(original).max(), rel=1e-4)
    assert verdict.agreement is None


def test_several_outputs_count_alike():
    one = {"a": logits(0), "b": logits(2)}
    judge = Judge([one])
    changed = {"a": logits(1), "b": one["b"]}
    alone = Judge([{"a": one["a"]}]).damages(0, {"a": changed["a"]})
    np.testing.assert_allclose(judge.damages(0, changed), alone / 2)


def test_agreement_worst_class_and_accuracy():
    classes = np.repeat([0, 1, 2], [10, 5, 4])
    original = np.eye(3, dtype=np.float32)[classes] * 9
    given = classes.copy()
    given[:2] = 1  # 8 of 10 left
    given[10:13] = 2  # 2 of 5 left
    given[15:] = 0  # none left, but of too few to tell
    labels = given.copy()
    labels[0] = 0
    judge = Judge([{"y": original}], labels)
    verdict = judge.verdict([{"y": np.eye(3, dtype=np.float32)[given] * 9}])
    assert verdict.agreement == pytest.approx(10 / 19)
    assert verdict.worst_agreement == pytest.approx(0.4)
    assert verdict.accuracy == pytest.approx(18 / 19)


def test_a_tally_says_feed_by_feed_what_all_results_say_together():
    originals = [{"y": logits(seed, 6)} for seed in range(3)]
    results = [{"y": logits(seed, 6)} for seed in range(5, 8)]
    labels = np.arange(18) % 4
    judge = Judge(originals, labels)
    tally = Tally(judge)
    for each in results:
        tally.add(each)
    assert tally.verdict() == judge.verdict(results)
    whole = Judge([{"y": np.concatenate([each["y"] for each in originals])}], labels)
    joined = whole.verdict([{"y": np.concatenate([each["y"] for each in results])}])
    assert tally.verdict().damage == pytest.approx(joined.damage)
    assert tally.verdict().agreement == joined.agreement
    assert tally.verdict().accuracy == joined.accuracy


def test_what_is_no_number_is_infinitely_bad():
    original = logits(0)
    broken = np.full_like(original, np.nan)
    assert np.isinf(Judge([{"y": original}]).damages(0, {"y": broken})).all()
    image = np.random.default_rng(0).normal(size=(4, 1, 3, 3)).astype(np.float32)
    assert np.isinf(Judge([{"y": image}]).damages(0, {"y": np.full_like(image, np.nan)})).all()


def test_nothing_to_judge_is_told():
    with pytest.raises(DataError, match="no inputs to judge on"):
        Judge([])
    with pytest.raises(DataError, match="no output of floating point"):
        Judge([{"y": np.zeros((3, 2), np.int64)}])

"""What is left of a network's answers."""

from __future__ import annotations

import numpy as np
import pytest

from graphfold.calibration.judge import Judge, Tally
from graphfold.errors import DataError


def softmax(z):
    e = np.exp(z - z.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def logits(seed, count=20, classes=5, scale=2.0):
    return scale * np.random.default_rng(seed).normal(size=(count, classes)).astype(np.float32)


def test_divergence_of_logits_and_of_probabilities_is_the_same():
    one, two = logits(0), logits(1)
    p, q = softmax(one.astype(np.float64)), softmax(two.astype(np.float64))
    expected = (p * np.log(p / q)).sum(axis=1)
    raw = Judge([{"y": one}])
    np.testing.assert_allclose(raw.damages(0, {"y": two}), expected, rtol=1e-5)
    soft = Judge([{"y": softmax(one)}])
    assert soft.kinds == {"y": "probabilities"}
    np.testing.assert_allclose(soft.damages(0, {"y": softmax(two)}), expected, rtol=1e-4)


def test_a_shift_of_all_logits_is_no_damage():
    one = logits(2)
    assert Judge([{"y": one}]).damages(0, {"y": one + 7}).max() < 1e-9


def test_values_are_measured_against_their_variance():
    rng = np.random.default_rng(3)
    images = rng.normal(size=(6, 3, 4, 4)).astype(np.float32)
    judge = Judge([{"y": images[:3]}, {"y": images[3:]}])
    assert not judge.is_classifier
    variance = images.astype(np.float64).var(axis=0).mean()
    found = judge.damages(0, {"y": images[:3] + 0.5})
    np.testing.assert_allclose(found, 0.25 / variance, rtol=1e-5)
    verdict = judge.verdict([{"y": images[:3] + 0.5}, {"y": images[3:] + 0.5}])
    assert verdict.agreement is None
    span = images.max() - images.min()
    assert verdict.psnr == pytest.approx(10 * np.log10(span**2 / 0.25), rel=1e-4)
    assert verdict.max_error == pytest.approx(0.5 / np.abs(images).max(), rel=1e-4)


def test_agreement_accuracy_and_the_worst_class():
    one = np.eye(3, dtype=np.float32)[[0] * 5 + [1] * 6 + [2] * 2] * 9
    two = one.copy()
    two[:2] = np.eye(3)[1] * 9
    two[11:] = np.eye(3)[0] * 9
    labels = np.array([0] * 5 + [1] * 6 + [2] * 2)
    labels[0] = 1
    verdict = Judge([{"y": one[:7]}, {"y": one[7:]}], labels).verdict(
        [{"y": two[:7]}, {"y": two[7:]}]
    )
    assert verdict.agreement == pytest.approx(9 / 13)
    # Class 2 has but two samples: too few to say anything.
    assert verdict.worst_agreement == pytest.approx(3 / 5)
    assert verdict.accuracy == pytest.approx(10 / 13)


def test_answers_that_are_no_numbers_are_the_worst():
    one = logits(4)
    broken = one.copy()
    broken[3] = np.nan
    assert Judge([{"y": one}]).damages(0, {"y": broken})[3] == np.inf


def test_of_several_outputs_the_mean_counts():
    one, two = logits(5), logits(6)
    both = Judge([{"a": one, "b": one, "count": np.array([1])}])
    assert both.outputs == ["a", "b"]
    found = both.damages(0, {"a": two, "b": one})
    np.testing.assert_allclose(found, Judge([{"a": one}]).damages(0, {"a": two}) / 2)


def test_nothing_to_judge():
    with pytest.raises(DataError, match="no inputs"):
        Judge([])
    with pytest.raises(DataError, match="no output of numbers"):
        Judge([{"y": np.array(["cat", "dog"])}])


def test_a_tally_says_feed_by_feed_what_all_results_say_together():
    originals = [{"y": logits(seed, 6)} for seed in range(3)]
    results = [{"y": logits(seed, 6)} for seed in range(5, 8)]
    labels = np.arange(18) % 4
    judge = Judge(originals, labels)
    tally = Tally(judge)
    for each in results:
        tally.add(each)
    whole = Judge([{"y": np.concatenate([each["y"] for each in originals])}], labels)
    joined = whole.verdict([{"y": np.concatenate([each["y"] for each in results])}])
    assert tally.verdict().damage == pytest.approx(joined.damage)
    assert tally.damage == tally.verdict().damage > 0
    assert tally.verdict().agreement == joined.agreement
    assert tally.verdict().accuracy == joined.accuracy
    assert tally.verdict().max_error == pytest.approx(joined.max_error)


def test_integers_are_judged_where_there_is_nothing_else():
    one = np.array([[1, 2, 3, 4], [5, 6, 7, 8]])
    two = np.array([[1, 2, 3, 0], [5, 6, 7, 8]])
    judge = Judge([{"y": one}])
    assert judge.kinds == {"y": "integers"}
    verdict = judge.verdict([{"y": two}])
    assert verdict.damage == 1 / 8
    assert verdict.agreement is None
    assert verdict.psnr is None
    assert Judge([{"y": one, "z": one.astype(np.float32)}]).outputs == ["z"]


def test_what_is_not_finite_is_left_out_of_a_document():
    values = np.random.default_rng(0).normal(size=(2, 3, 4)).astype(np.float32)
    verdict = Judge([{"y": values}]).verdict([{"y": values}])
    assert verdict.psnr == np.inf
    assert verdict.to_json() == {"damage": 0.0, "max_error": 0.0}

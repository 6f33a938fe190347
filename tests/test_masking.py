"""Which activations may be masked, which of them stay on within a budget, and what that saves."""

from __future__ import annotations

import pytest
from builders import ModelBuilder
from maskable import chain, table_of

from graphfold.candidates import find_candidates
from graphfold.errors import BudgetError, MeasuresError, UsageError
from graphfold.graph import Graph
from graphfold.masked_plans import Predictions
from graphfold.masking import Budget, Chooser, find_masks
from graphfold.model import load


def test_ties_are_broken_by_savings_and_then_by_place():
    keep_two = Chooser(Budget("keep", 2), [0.0, 3.0, 1.0, 1.0])
    assert keep_two([1.0, 1.0, 1.0, 1.0]) == (True, False, True, False)
    assert keep_two([1.0, 1.5, 1.0, 1.0]) == (True, True, False, False)
    assert keep_two([-3.0, -2.0, -1.0, -4.0]) == (False, True, True, False)


def test_a_budget_of_time_removes_the_least_important_and_no_more():
    saved = (4.0, 1.0, 2.0, 0.0)

    def latency(removed):
        return 10.0 - sum(saved[at] for at in removed)

    def kept(ms, importance):
        return Chooser(Budget("ms", ms), saved, latency, 10.0)(importance)

    assert kept(9.0, [4.0, 1.0, 3.0, 2.0]) == (True, False, True, True)
    # What saves nothing comes back, and what another one made unneeded.
    assert kept(9.0, [4.0, 2.0, 3.0, 1.0]) == (True, False, True, True)
    assert kept(8.0, [4.0, 1.0, 2.0, 3.0]) == (True, True, False, True)
    assert kept(3.0, [1.0, 2.0, 3.0, 4.0]) == (False, False, False, True)
    faster = Chooser(Budget("speedup", 1.25), saved, latency, 10.0)
    assert faster([4.0, 1.0, 2.0, 3.0]) == (True, True, False, True)
    with pytest.raises(BudgetError, match=r"takes 3\.000 ms, 3\.33 times"):
        Chooser(Budget("ms", 2.0), saved, latency, 10.0)
    with pytest.raises(BudgetError, match="the network is no faster"):
        Chooser(Budget("ms", 8.0), saved, lambda _: 10.0, 10.0)
    with pytest.raises(UsageError, match="nothing has to go"):
        Chooser(Budget("speedup", 1.0), saved, latency, 10.0)
    with pytest.raises(UsageError, match="4 of 4 masks cannot be kept"):
        Chooser(Budget("keep", 4), saved)


def test_masks_of_blocks_of_activations_and_of_the_ends():
    candidates = find_candidates(Graph(load(chain(2))))
    assert [mask.name for mask in find_masks(candidates)] == ["block0", "block1"]
    names = [mask.name for mask in find_masks(candidates, "activation")]
    assert names == ["wide0", "deep0", "wide1", "deep1"]
    names = [mask.name for mask in find_masks(candidates, ends=True)]
    assert names == ["stem", "block0", "block1", "head"]
    net = ModelBuilder(("N", 3, 8, 8))
    single = net.model(net.op("Relu", net.conv("x", 4, 1), out="y"))
    with pytest.raises(UsageError, match="no blocks that could be merged"):
        find_masks(find_candidates(Graph(load(single))))


def test_what_one_activation_saves_counts_with_and_without_the_others():
    model = load(chain(2))
    candidates = find_candidates(Graph(model))
    masks = find_masks(candidates, "activation")
    found = Predictions(candidates, masks, table_of(model, {"block0": 1.0, "block1": 2.0}))
    # Alone none saves anything; of a pair each counts half.
    assert found.latency(frozenset({0})) == found.original
    assert found.original - found.latency(frozenset({0, 1})) == pytest.approx(3.0)
    assert found.savings == pytest.approx([1.5, 1.5, 1.0, 1.0])
    other = table_of(load(chain(1)), {})
    with pytest.raises(MeasuresError, match="no tensor"):
        Predictions(find_candidates(Graph(load(_renamed()))), masks, other)


def _renamed():
    net = ModelBuilder(("N", 3, 8, 8))
    return net.model(net.conv(net.op("Relu", net.conv("x", 4), out="other"), 4, out="y"))

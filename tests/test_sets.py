"""Sets of masks: what is drawn, judged and exchanged."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from maskable import chain
from trainable import pictures

torch = pytest.importorskip("torch")

from graphfold.calibration.masks import MaskedModule, with_masks  # noqa: E402 - needs torch
from graphfold.calibration.pairs import pair_up  # noqa: E402
from graphfold.calibration.recipe import Moment, Recipe  # noqa: E402
from graphfold.calibration.samples import Samples  # noqa: E402
from graphfold.calibration.sets import DrawnMasks, SetLoss, choose_set  # noqa: E402
from graphfold.calibration.training import train  # noqa: E402
from graphfold.calibration.untie import untie  # noqa: E402
from graphfold.candidates import find_candidates  # noqa: E402
from graphfold.graph import Graph  # noqa: E402
from graphfold.masking import Budget, Chooser, find_masks  # noqa: E402
from graphfold.model import load  # noqa: E402

RECIPE = Recipe(epochs=2, batch_size=16, learning_rate=0.4, augment=False)


def on(kept):
    return {at for at, each in enumerate(kept) if each}


def keep(count, masks):
    return Chooser(Budget("keep", count), [0.0] * masks)


def prepared(blocks, count):
    model = load(chain(blocks))
    masks = find_masks(find_candidates(Graph(model)))
    student, names = with_masks(untie(model), masks)
    images, labels = pictures(200, 0)
    data = Samples.of({"x": images}, labels)
    pair = pair_up(student, None, data, None, 0.0, 1.0, None)
    chooser = keep(count, blocks)
    return MaskedModule(pair.student, names, chooser), pair.objective, data, chooser


# --- the choice -------------------------------------------------------------------------------


def test_where_masks_add_up_the_best_are_chosen_and_their_worth_is_told():
    worth = np.random.default_rng(0).normal(size=12)
    found = choose_set(lambda kept: -sum(worth[at] for at in on(kept)), keep(5, 12), [0.0] * 12, 0)
    assert on(found.kept) == set(np.argsort(-worth)[:5].tolist())
    assert len(found.judged) == 64
    # As each set has five masks, importances are against the others'.
    centred = worth - worth.mean()
    assert np.corrcoef(found.importance, centred)[0, 1] > 0.999
    assert np.asarray(found.importance) == pytest.approx(centred, abs=0.1 * np.ptp(worth))
    assert found.explained > 0.99
    assert found.loss < found.mean
    assert found.loss == pytest.approx(-np.sort(worth)[-5:].sum())


def test_sets_are_judged_once_and_all_where_they_are_few():
    losses = {frozenset(each): 1.0 for each in itertools.combinations(range(5), 2)}
    losses[frozenset({1, 2})] = 0.5
    asked, told = [], []

    def loss(kept):
        asked.append(frozenset(on(kept)))
        return losses[asked[-1]]

    found = choose_set(loss, keep(2, 5), [0.0] * 5, 3, lambda done, most: told.append((done, most)))
    assert sorted(map(sorted, asked)) == sorted(map(sorted, losses))
    assert told == [*((done, 65) for done in range(1, 11)), (65, 65)]
    assert on(found.kept) == {1, 2}
    assert (found.loss, found.mean) == (0.5, 0.95)
    # 1 and 2 are worth something only together.
    assert 0.2 < found.explained < 0.8


def test_where_all_sets_are_equal_the_first_masks_stay():
    found = choose_set(lambda kept: 0.25, keep(2, 4), [0.0] * 4, 0)
    assert on(found.kept) == {0, 1}
    assert found.explained == 1.0


def test_costs_count_as_loss_does():
    def loss(kept):
        return float(on(kept) != {0})

    assert on(choose_set(loss, keep(1, 3), [0.0] * 3, 0).kept) == {0}
    assert on(choose_set(loss, keep(1, 3), [0.5, 0.0, 0.2], 0).kept) == {0}
    found = choose_set(loss, keep(1, 3), [1.1, 0.0, 0.5], 0)
    assert on(found.kept) == {1}
    assert found.loss == 1.0  # without the costs


def test_sets_fit_a_budget_of_time():
    saves = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    worth = [1.0, 5.0, 2.0, 8.0, 3.0, 9.0]

    def latency(removed):
        return 30.0 - sum(saves[at] for at in removed)

    chooser = Chooser(Budget("ms", 20.0), saves, latency, 30.0)
    found = choose_set(lambda kept: -sum(worth[at] for at in on(kept)), chooser, [0.0] * 6, 0)
    every = [set(each) for size in range(7) for each in itertools.combinations(range(6), size)]
    fit = [each for each in every if latency(set(range(6)) - each) <= 20.0]
    for kept, _ in found.judged:
        assert on(kept) in fit
    best = max(fit, key=lambda each: sum(worth[at] for at in each))
    assert on(found.kept) == best


# --- the training -----------------------------------------------------------------------------


def test_each_step_has_masks_of_its_own():
    module, objective, data, chooser = prepared(4, 2)
    drawn = []

    class Seen(DrawnMasks):
        def before_step(self, moment):
            super().before_step(moment)
            drawn.append(module.kept)

    found = train(module, None, data, RECIPE, objective=objective, hooks=Seen(module, chooser, 0))
    assert len(drawn) == found.steps == 24
    assert all(sum(kept) == 2 for kept in drawn)
    assert len(set(drawn)) > 3
    assert module.worth == (1.0, 1.0, 1.0, 1.0)
    # The same in every process and after a kill, other ones with another seed.
    again = DrawnMasks(module, chooser, 0)
    other = DrawnMasks(module, chooser, 1)
    for hooks, same in ((again, True), (other, False)):
        shown = []
        for step in range(12):
            hooks.before_step(Moment(1, step, 12, 2, 0.1))
            shown.append(module.kept)
        assert (shown == drawn[12:]) is same


def test_the_loss_of_a_set_leaves_the_network_alone():
    module, objective, data, chooser = prepared(3, 1)
    train(module, None, data, RECIPE, objective=objective, hooks=DrawnMasks(module, chooser, 0))
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}

    def losses():
        loss = SetLoss(module, None, objective, data, RECIPE, "cpu")
        return [loss(kept) for kept in ((True, False, False), (False, False, True))]

    first = losses()
    assert first[0] != first[1]
    assert losses() == first
    assert not module.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    # Statistics are of the batch: what the running ones say does not matter.
    for name, tensor in module.named_buffers():
        if name != "binary" and tensor.ndim:
            tensor.add_(1.0)
    assert losses() == first

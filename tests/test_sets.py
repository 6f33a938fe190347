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
    assert found.drawn == 36
    assert len(found.judged) <= 3 * 36
    # As each set has five masks, importances are against the others'.
    centred = worth - worth.mean()
    assert np.corrcoef(found.importance, centred)[0, 1] > 0.999
    assert np.asarray(found.importance) == pytest.approx(centred, abs=0.1 * np.ptp(worth))
    assert found.loss < found.mean
    assert found.loss == pytest.approx(-np.sort(worth)[-5:].sum())


def test_masks_that_stand_in_for_each_other_are_exchanged():
    # Ten pairs that do the same: a set is as good as the number of pairs that it has one of.
    rng = np.random.default_rng(1)
    values = np.sort(rng.uniform(1, 2, 10))

    def loss(kept):
        asked.append(kept)
        return -sum(values[pair] for pair in {at // 2 for at in on(kept)})

    asked = []
    told = []
    chooser = keep(4, 20)
    found = choose_set(loss, chooser, [0.0] * 20, 0, lambda done, most: told.append((done, most)))
    assert {at // 2 for at in on(found.kept)} == {6, 7, 8, 9}
    # The fit alone sees both of a pair as worth it.
    assert len({at // 2 for at in on(chooser(found.importance))}) < 4
    assert len(set(asked)) == len(asked) == told[-1][0] <= told[-1][1] == 180


def test_every_set_is_judged_where_they_are_few():
    losses = {frozenset(each): 1.0 for each in itertools.combinations(range(4), 2)}
    losses[frozenset({1, 2})] = 0.5
    found = choose_set(lambda kept: losses[frozenset(on(kept))], keep(2, 4), [0.0] * 4, 3)
    assert {frozenset(on(kept)) for kept, _ in found.judged} == set(losses)
    assert on(found.kept) == {1, 2}


def test_costs_count_as_loss_does():
    def loss(kept):
        return float(on(kept) != {0})

    assert on(choose_set(loss, keep(1, 3), [0.0] * 3, 0).kept) == {0}
    assert on(choose_set(loss, keep(1, 3), [0.9, 0.0, 0.5], 0).kept) == {0}
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
    assert sum(worth[at] for at in on(found.kept)) == sum(worth[at] for at in best)


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

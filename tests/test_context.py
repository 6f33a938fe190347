"""Searches in context: damages with and without shortcuts, choices against brute force."""

from __future__ import annotations

import itertools

import numpy as np
import onnx
import pytest
from builders import ModelBuilder
from hypothesis import given, settings
from hypothesis import strategies as st
from searchable import by_macs, feeds, network

from graphfold.calibration import walk as module
from graphfold.calibration.context import Context, changed_state, smallest_drops, touched
from graphfold.calibration.walk import Move, Point, Search, cheapest
from graphfold.calibration.workbench import Replacement, Workbench
from graphfold.model import load


@pytest.fixture(scope="module")
def bench() -> Workbench:
    found = Workbench(load(network()))
    found.collect(feeds(12, 0), threads=1)
    found.prepare()
    return found


def walked(search: Search, speedup: float) -> Point:
    """Where a walk ends that goes on until it is as fast, or nothing is left."""
    while search.present.speedup < speedup * (1 - 1e-9):
        if not search.step(search.times.whole / speedup):
            break
    return search.present


def test_what_there_is_to_change(bench):
    assert sorted(place.channels for place in bench.inner.values()) == [32, 32, 48]
    drops = smallest_drops(bench)
    assert [key[1] for key in drops] == ["block0", "block1"]


def test_a_damage_is_the_same_from_the_start_and_from_its_place_on(bench, monkeypatch):
    context = Context(bench, feeds(3, 1), threads=1)
    inner, drops = list(bench.inner), smallest_drops(bench)
    state = {inner[0]: Replacement("narrow", 24)}
    moves = [
        (inner[0], Replacement("narrow", 16)),
        (inner[1], Replacement("narrow", 8)),
        (inner[2], Replacement("narrow", 32)),
        (drops[1], Replacement("identity")),
    ]
    others = [{**state, key: each} for key, each in moves]
    expected = [context.verdict(each).damage for each in others]
    assert min(expected) > 0
    found = context.damages(state, others)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-7)
    # With memory for one feed at a time, too.
    monkeypatch.setattr(context, "_memory", 1)
    np.testing.assert_allclose(context.damages(state, others), expected, rtol=1e-3, atol=1e-7)


def test_no_change_does_no_damage(bench):
    context = Context(bench, feeds(2, 2), threads=1)
    verdict = context.verdict({})
    assert verdict.damage == pytest.approx(0, abs=1e-9)
    assert verdict.agreement == 1.0


def test_several_blocks_can_go_whatever_their_order(bench):
    context = Context(bench, feeds(2, 3), threads=1)
    drops = smallest_drops(bench)
    one = context.verdict({key: Replacement("identity") for key in drops})
    other = context.verdict({key: Replacement("identity") for key in reversed(drops)})
    assert one == other
    assert one.damage > 0


def test_a_walk_gets_faster_step_by_step_and_says_what_it_measured(bench):
    context = Context(bench, feeds(4, 4), threads=1)
    search = Search(context, by_macs(bench))
    last = walked(search, 1.8)
    assert last.speedup >= 1.8
    speeds = [point.speedup for point in search.points]
    assert speeds == sorted(speeds)
    assert len(speeds) > 4
    for point in search.points:
        assert context.verdict(point.state).damage == pytest.approx(point.verdict.damage)
        dropped = [key for key, each in point.state.items() if each.family == "identity"]
        gone = {inner for key in dropped for inner in touched(bench, key)}
        assert not gone & point.state.keys()


def test_one_change_at_a_time_is_predicted_exactly(bench, monkeypatch):
    monkeypatch.setattr(module, "_STEP", 1e-6)
    context = Context(bench, feeds(3, 5), threads=1)
    search = Search(context, by_macs(bench), ["narrow"])
    for _ in range(3):
        search.step(0.0)
        assert search.present.predicted_damage == pytest.approx(
            search.present.verdict.damage, rel=1e-3
        )


def test_a_step_takes_the_cheapest_change(bench, monkeypatch):
    monkeypatch.setattr(module, "_STEP", 1e-6)
    context = Context(bench, feeds(3, 6), threads=1)
    search = Search(context, by_macs(bench))
    moves = search._moves({})
    damages = context.damages({}, [{move.key: move.replacement} for move in moves])
    search.step(0.0)
    assert search.present.verdict.damage == pytest.approx(min(damages), rel=1e-3, abs=1e-9)


def test_a_walk_ends_where_nothing_is_left(bench):
    context = Context(bench, feeds(2, 7), threads=1)
    search = Search(context, by_macs(bench), ["narrow"])
    last = walked(search, 1e6)
    assert {each.width for each in last.state.values()} <= {8, 16}
    assert not search.step(0.0)


def test_families_limit_what_is_chosen(bench):
    context = Context(bench, feeds(2, 8), threads=1)
    dropping = Search(context, by_macs(bench), ["identity"])
    walked(dropping, 1e6)
    assert {each.family for each in dropping.present.state.values()} == {"identity"}


@given(
    groups=st.lists(
        st.lists(
            st.tuples(st.floats(-1, 10), st.floats(0.1, 5)),
            min_size=1,
            max_size=3,
        ),
        min_size=1,
        max_size=4,
    ),
    wanted=st.floats(0.1, 12),
)
@settings(max_examples=200, deadline=None)
def test_the_cheapest_set_is_that_of_brute_force(groups, wanted):
    moves = [
        [Move(("a", str(number)), Replacement("identity"), gain, damage) for damage, gain in group]
        for number, group in enumerate(groups)
    ]
    best = None
    for chosen in itertools.product(*([None, *group] for group in moves)):
        taken = [each for each in chosen if each is not None]
        gain, damage = sum(each.gain for each in taken), sum(each.damage for each in taken)
        if gain >= wanted * (1 - 1e-9) and (best is None or damage < best):
            best = damage
    found = cheapest(moves, wanted)
    assert len({each.key for each in found}) == len(found)
    gain = sum(each.gain for each in found)
    if best is None:
        largest = sum(max(each.gain for each in group) for group in moves)
        assert gain == pytest.approx(largest)
    else:
        assert gain >= wanted * (1 - 1e-6)
        assert sum(each.damage for each in found) == pytest.approx(best, abs=1e-9)


def test_predicted_times_follow_widths_and_drops(bench):
    times = by_macs(bench)
    whole = times.whole
    key = next(iter(bench.inner))
    half = times.predict({key: Replacement("narrow", bench.inner[key].channels // 2)})
    place = bench.inner[key]
    nodes = {cut.node for cut in place.cuts if cut.index == 1} | {place.consumer}
    touched = sum(times.samples[node][1][1] for node in nodes)
    assert half == pytest.approx(whole - touched / 2)
    drop = smallest_drops(bench)[0]
    inside = [node for node in times.samples if node in bench.segments[drop].nodes]
    gone = sum(times.samples[node][1][1] for node in inside)
    assert gone > 0
    assert times.predict({drop: Replacement("identity")}) == pytest.approx(whole - gone)


def plain_chain() -> onnx.ModelProto:
    """No shortcuts: depthwise and pointwise in turns, and a second output from the middle."""
    net = ModelBuilder((None, 3, 8, 8), seed=5)
    y = net.op("Relu", net.conv("x", 16, 3, pad=1))
    for number in range(4):
        y = net.op("Relu", net.depthwise(y, 3, pad=1), out=f"deep{number}")
        y = net.op("Relu", net.conv(y, 16, 1), out=f"wide{number}")
    side = net.conv(net.op("Relu", net.conv("wide1", 16, 3, pad=1)), 4, 1, out="side")
    model = net.model(net.conv(y, 3, 1, out="y"))
    model.graph.output.append(onnx.ValueInfoProto(name=side))
    return onnx.shape_inference.infer_shapes(model)


@pytest.fixture(scope="module")
def chain() -> Workbench:
    found = Workbench(load(plain_chain()))
    inputs = [{"x": feed["x"][:, :, :8, :8]} for feed in feeds(12, 0)]
    found.collect(inputs, threads=1)
    found.prepare()
    return found


def test_places_that_share_operators_exclude_each_other(chain):
    inputs = [{"x": feed["x"][:, :, :8, :8]} for feed in feeds(3, 1)]
    context = Context(chain, inputs, threads=1)
    drops = smallest_drops(chain)
    crossing = [(drop, place) for drop in drops for place in touched(chain, drop)]
    assert crossing
    for drop, place in crossing:
        state = {place: Replacement("narrow", 8)}
        found = changed_state(chain, state, drop, Replacement("identity"))
        assert found == {drop: Replacement("identity")}
        expected = context.verdict(found).damage
        (damage,) = context.damages(state, [found])
        assert damage == pytest.approx(expected, rel=1e-3)


def test_a_chain_without_shortcuts_is_walked_to_its_end(chain):
    inputs = [{"x": feed["x"][:, :, :8, :8]} for feed in feeds(3, 1)]
    search = Search(Context(chain, inputs, threads=1), by_macs(chain))
    while search.step(0.0):
        state = search.present.state
        gone = [key for key, each in state.items() if each.family == "identity"]
        nodes = [node for key in gone for node in chain.segments[key].nodes]
        assert len(nodes) == len(set(nodes))
        assert not any(place in state for key in gone for place in touched(chain, key))
    assert search.present.speedup > 1.5


def test_outputs_that_a_change_does_not_reach_stay(chain):
    inputs = [{"x": feed["x"][:, :, :8, :8]} for feed in feeds(3, 1)]
    context = Context(chain, inputs, threads=1)
    behind = [key for key in chain.inner if key[1] == "side"]
    assert behind
    assert context._border(tuple(behind)).outputs == ["side"]
    move = (behind[0], Replacement("narrow", 8))
    expected = context.verdict(dict([move])).damage
    assert expected > 0
    np.testing.assert_allclose(context.damages({}, [dict([move])]), expected, rtol=1e-3)

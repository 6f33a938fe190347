"""Walks from a network as it is towards faster ones, by small steps that are measured.

Small steps add up where large ones do not. So the search walks: from the present network it
measures what every next change would cost, takes the cheapest set of changes that wins the next few
per cent of latency (an exact choice of one alternative for each place), and goes on from the
network that results. Every step is one point of the frontier, measured as a whole.

What was far too dear in one round is not looked at in the next ones: costs grow slowly, so
little is missed, and most of the time is saved.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import onnx_ir as ir

from graphfold.calibration.context import Context, changed_state, smallest_drops, touched
from graphfold.calibration.judge import Verdict
from graphfold.calibration.nodetimes import NodeTimes, step_of
from graphfold.calibration.places import Key
from graphfold.calibration.workbench import Replacement, State
from graphfold.progress import Progress

# Share of the latency that one step wins, and of a place's channels that one change takes.
_STEP = 0.06
_CHANNELS = 0.08
# A change that cost so many times what was paid per millisecond is passed over for some rounds.
_DEAR = 3.0
_PASSED_OVER = 3
# Samples that changes are compared on, and pictures: every value of one has an error of its own.
_SAMPLES = 96
_PICTURES = 32
_MOST_POINTS = 2000


@dataclass(frozen=True)
class Point:
    """One network on the way.

    Attributes:
        state: its replacements.
        latency: predicted, in milliseconds.
        speedup: predicted, over the network as it is.
        verdict: measured on images that were not fitted on.
        predicted_damage: of the step before it, summed.
    """

    state: State
    latency: float
    speedup: float
    verdict: Verdict
    predicted_damage: float


@dataclass(frozen=True)
class Move:
    """One change of the present network.

    Attributes:
        key: the place.
        replacement: what stands there after it.
        gain: milliseconds.
        damage: what it adds.
    """

    key: Key
    replacement: Replacement
    gain: float
    damage: float = 0.0


class Search:
    """Walks from the network as it is towards faster ones.

    Args:
        context: what networks are judged with.
        times: what they are timed with.
        families: what may be chosen: narrow, identity.
    """

    def __init__(
        self, context: Context, times: NodeTimes, families: Sequence[str] = ("narrow", "identity")
    ) -> None:
        self.context = context
        self.bench = context.bench
        self.times = times
        self._drops = smallest_drops(self.bench) if "identity" in families else []
        self._touched = {key: touched(self.bench, key) for key in self._drops}
        self._narrows = "narrow" in families
        self._dear: dict[tuple[Key, Replacement], int] = {}
        self._round = 0
        self.points = [Point({}, times.whole, 1.0, context.verdict({}), 0.0)]

    @property
    def present(self) -> Point:
        """Where the walk has come to."""
        return self.points[-1]

    def step_back(self) -> None:
        """Forget the last step."""
        self.points.pop()

    def step(self, latency: float, progress: Progress | None = None) -> bool:
        """Go on to a network of at most this latency, if it is not more than one step away.

        Returns:
            whether there was anything to change.
        """
        present = self.present
        wanted = present.latency - max(latency, present.latency * (1 - _STEP))
        moves = self._moves(present.state)
        if self._most(moves) < wanted and self._dear:
            # What was passed over is needed after all.
            self._dear.clear()
            moves = self._moves(present.state)
        if not moves:
            return False
        moves = self._measured(present.state, moves, progress)
        chosen = self._compatible(cheapest(self._alternatives(moves), wanted))
        self._remember(moves, chosen)
        self.points.append(self._point(present, chosen))
        self._round += 1
        return bool(chosen)

    def _point(self, before: Point, chosen: Sequence[Move]) -> Point:
        state = before.state
        for move in chosen:
            state = changed_state(self.bench, state, move.key, move.replacement)
        verdict = self.context.verdict(state)
        latency = self.times.predict(state)
        predicted = before.verdict.damage + sum(move.damage for move in chosen)
        return Point(state, latency, self.times.whole / latency, verdict, predicted)

    def _measured(
        self, state: State, moves: Sequence[Move], progress: Progress | None
    ) -> list[Move]:
        """The moves with what they add to the damage."""
        added = self.context.added_damages(
            state,
            [changed_state(self.bench, state, each.key, each.replacement) for each in moves],
            progress,
            _PICTURES if self.context.makes_pictures else _SAMPLES,
        )
        return [replace(move, damage=each) for move, each in zip(moves, added, strict=True)]

    def _most(self, moves: Sequence[Move]) -> float:
        """What all moves together win."""
        return sum(max(move.gain for move in group) for group in self._alternatives(moves))

    def _moves(self, state: State) -> list[Move]:
        dropped = [key for key, each in state.items() if each.family == "identity"]
        gone = {inner for key in dropped for inner in self._touched[key]}
        nodes = {node for key in dropped for node in self.bench.segments[key].nodes}
        drops = [key for key in self._drops if nodes.isdisjoint(self.bench.segments[key].nodes)]
        found = []
        latency = self.present.latency
        for key, replacement in itertools.chain(
            self._narrower(state, gone) if self._narrows else (),
            ((key, Replacement("identity")) for key in drops),
        ):
            if self._dear.get((key, replacement), -1) > self._round:
                continue
            changed = changed_state(self.bench, state, key, replacement)
            gain = latency - self.times.predict(changed)
            if gain > 0:
                found.append(Move(key, replacement, gain))
        return found

    def _narrower(self, state: State, gone: set[Key]) -> Iterable[tuple[Key, Replacement]]:
        for key, place in self.bench.inner.items():
            if key in gone or not self.bench.has_moments(key):
                continue
            present = state.get(key)
            width = place.channels if present is None else present.width or 0
            step = step_of(place.channels)
            amount = max(1, round(place.channels * _CHANNELS / step)) * step
            for factor in (1, 2):
                target = (width - factor * amount + step - 1) // step * step
                if target >= step:
                    yield key, Replacement("narrow", target)

    def _compatible(self, moves: Sequence[Move]) -> list[Move]:
        """Of moves that share operators with a segment that is dropped, the one that wins most.

        What alternatives by place leave over: a place may begin in one segment and end in the next.
        """
        found: list[Move] = []
        taken: set[ir.Node] = set()
        for move in sorted(moves, key=lambda each: -each.gain):
            drops = move.replacement.family == "identity"
            nodes = set((self.bench.segments if drops else self.bench.inner)[move.key].nodes)
            if not nodes.isdisjoint(taken):
                continue
            others = {each.key for each in found if each.replacement.family == "narrow"}
            if drops and not others.isdisjoint(self._touched[move.key]):
                continue
            if drops:
                taken |= nodes
            found.append(move)
        return found

    def _alternatives(self, moves: Sequence[Move]) -> list[list[Move]]:
        """Moves by place; a segment and the channels inside it exclude each other."""
        owner: dict[Key, Key] = {}
        for key in self._drops:
            for inner in self._touched[key]:
                owner[inner] = key
        groups: dict[Key, list[Move]] = {}
        for move in moves:
            groups.setdefault(owner.get(move.key, move.key), []).append(move)
        return list(groups.values())

    def _remember(self, moves: Sequence[Move], chosen: Sequence[Move]) -> None:
        """Pass over what was far dearer, per millisecond, than the dearest that was chosen."""
        if not chosen:
            return
        price = max(move.damage / move.gain for move in chosen)
        for move in moves:
            if move.damage / move.gain > _DEAR * max(price, 0.0):
                self._dear[move.key, move.replacement] = self._round + _PASSED_OVER


def cheapest(groups: Iterable[Sequence[Move]], wanted: float) -> list[Move]:
    """At most one move of every group, winning at least `wanted` at the least damage.

    All of them that win most, where nothing wins as much.
    """
    front: list[tuple[float, float, tuple[Move, ...]]] = [(0.0, 0.0, ())]
    for group in groups:
        grown = list(front)
        for damage, gain, moves in front:
            grown.extend((damage + move.damage, gain + move.gain, (*moves, move)) for move in group)
        front = _pareto(grown)
    enough = [each for each in front if each[1] >= wanted * (1 - 1e-9)]
    if enough:
        return list(min(enough, key=lambda each: (each[0], -each[1]))[2])
    return list(max(front, key=lambda each: (each[1], -each[0]))[2])


def _pareto(
    entries: list[tuple[float, float, tuple[Move, ...]]],
) -> list[tuple[float, float, tuple[Move, ...]]]:
    """Of entries by damage and gain those that no other beats."""
    entries.sort(key=lambda each: (-each[1], each[0]))
    found = []
    best = float("inf")
    for entry in entries:
        if entry[0] < best:
            found.append(entry)
            best = entry[0]
    if len(found) > _MOST_POINTS:
        # Neighbours of nearly the same gain stand for one another.
        keep = max(1, len(found) // _MOST_POINTS + 1)
        found = found[:1] + found[1:-1:keep] + found[-1:]
    return found

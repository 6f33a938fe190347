r"""Plans found in context: what each change costs in the network as it has become by then.

Damages of changes alone do not add up: neighbours interact, and beyond a few of them the whole is
two to four times the sum. Small steps do add up. So the search walks: from the present network it
measures what every next change would cost (on images that nothing was fitted on, running only
what lies behind the change), takes the cheapest set of changes that wins the next few per cent
of latency (an exact choice of one alternative for each place), and goes on from the network that
results. Every step is one point of the frontier, measured as a whole.

What was far too dear in one round is not looked at in the next ones: costs grow slowly, so
little is missed, and most of the time is saved.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray

from graphfold.calibration.capture import Feeds, extract, run_part, tensor_types
from graphfold.calibration.judge import Judge, Tally, Verdict
from graphfold.calibration.nodetimes import NodeTimes, step_of
from graphfold.calibration.workbench import Key, Replacement, State, Workbench
from graphfold.graph import consumers
from graphfold.model import to_proto
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
_VALUES_OF_A_PICTURE = 4096
_MEMORY = 1 << 30
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
class _Move:
    """One change of the present network."""

    key: Key
    replacement: Replacement
    gain: float
    damage: float = 0.0


class Context:
    """Networks judged on held-back inputs, from any place on.

    Args:
        bench: the network and what was fitted.
        feeds: inputs that nothing was fitted on.
        labels: of their samples, where known.
        threads: of onnxruntime.
        memory: bytes of captured tensors that are kept.
    """

    def __init__(
        self,
        bench: Workbench,
        feeds: Feeds,
        labels: NDArray[Any] | None = None,
        *,
        threads: int = 0,
        memory: int = _MEMORY,
    ) -> None:
        self.bench = bench
        self.feeds = feeds
        self.threads = threads
        self._memory = memory
        self._types = tensor_types(bench.graph)
        run = run_part(to_proto(bench.model), threads)
        self.judge = Judge([run(feed) for feed in feeds], labels)
        self._borders: dict[tuple[Key, ...], _Border] = {}

    def verdict(self, state: State) -> Verdict:
        """A network as a whole."""
        run = run_part(self.bench.build(state), self.threads)
        return self.judge.verdict([run(feed) for feed in self.feeds])

    @property
    def makes_pictures(self) -> bool:
        """Whether outputs are many values for each sample, none of them classes."""
        first = self.judge.originals[0]
        values = sum(first[name].size for name in self.judge.outputs)
        samples = len(next(iter(self.feeds[0].values())))
        return not self.judge.is_classifier and values >= _VALUES_OF_A_PICTURE * samples

    def border(self, *keys: Key) -> list[str]:
        """Tensors that everything behind places is computed from, the places included."""
        return self._border(keys).inputs

    def _border(self, keys: tuple[Key, ...]) -> _Border:
        if keys not in self._borders:
            self._borders[keys] = _border(self.bench, keys, self.judge.outputs)
        return self._borders[keys]

    def damages(
        self,
        state: State,
        moves: Sequence[tuple[Key, Replacement]],
        progress: Progress | None = None,
        *,
        feeds: int | None = None,
    ) -> list[float]:
        """Mean damage of networks that differ from `state` in one place each.

        Args:
            state: the present network.
            moves: one change for each network.
            progress: called with (stage, done, total).
            feeds: judge on so many of them; on all by default.
        """
        found, _ = self._tallies(state, moves, progress, feeds)
        return [tally.damage for tally in found]

    def added_damages(
        self,
        state: State,
        moves: Sequence[tuple[Key, Replacement]],
        progress: Progress | None,
        samples: int,
    ) -> list[float]:
        """What each move adds to the damage of `state`, on as many feeds as hold so many samples.

        Differences on the same inputs need fewer of them than a damage itself.
        """
        counts = np.cumsum([len(next(iter(feed.values()))) for feed in self.feeds])
        feeds = min(len(self.feeds), int(np.searchsorted(counts, samples)) + 1)
        found, present = self._tallies(state, moves, progress, feeds)
        return [tally.damage - present.damage for tally in found]

    def tallies(
        self, state: State, moves: Sequence[tuple[Key, Replacement]], progress: Progress | None
    ) -> list[Tally]:
        """Answers of networks that differ from `state` in one place each, to all feeds."""
        return self._tallies(state, moves, progress, None)[0]

    def _tallies(
        self,
        state: State,
        moves: Sequence[tuple[Key, Replacement]],
        progress: Progress | None,
        feeds: int | None,
    ) -> tuple[list[Tally], Tally]:
        """Answers of changed networks and of the present one; only what lies behind is run."""
        tallies = [Tally(self.judge) for _ in moves]
        present = Tally(self.judge)
        borders = [self._border((move[0], *undone(self.bench, state, *move))) for move in moves]
        names = sorted({name for border in borders for name in border.inputs})
        whole = self.bench.build(state)
        run = run_part(_with_outputs(whole, [*names, *self.judge.outputs]), self.threads)
        done = 0
        for captured in self._chunks(run, [*names, *self.judge.outputs], feeds):
            for index, (key, replacement) in enumerate(moves):
                if progress is not None:
                    progress("measuring damage", done, 0)
                done += 1
                changed = self.bench.build(changed_state(self.bench, state, key, replacement))
                border = borders[index]
                part = extract(changed, border.inputs, border.outputs, self._types)
                behind = run_part(part, self.threads)
                for tensors in captured:
                    # Outputs that the change does not reach are as they were.
                    tallies[index].add({**tensors, **behind(tensors)})
            for tensors in captured:
                present.add(tensors)
        return tallies, present

    def _chunks(
        self, run: Any, names: Sequence[str], feeds: int | None
    ) -> Iterable[list[dict[str, NDArray[Any]]]]:
        """Captured tensors of as many feeds as memory holds, in order."""
        chunk: list[dict[str, NDArray[Any]]] = []
        size = 0
        for feed in self.feeds[:feeds]:
            tensors = run(feed)
            kept = {name: tensors[name] if name in tensors else feed[name] for name in names}
            bytes_of = sum(each.nbytes for each in kept.values())
            if chunk and size + bytes_of > self._memory:
                yield chunk
                chunk, size = [], 0
            chunk.append(kept)
            size += bytes_of
        if chunk:
            yield chunk


def _with_outputs(proto: onnx.ModelProto, names: Sequence[str]) -> onnx.ModelProto:
    present = {item.name for item in (*proto.graph.output, *proto.graph.input)}
    proto.graph.output.extend(
        onnx.ValueInfoProto(name=name) for name in names if name not in present
    )
    return proto


def undone(bench: Workbench, state: State, key: Key, replacement: Replacement) -> list[Key]:
    """Narrowed places that are no longer there once a segment is replaced: they share operators."""
    if replacement.family == "narrow":
        return []
    inside = touched(bench, key)
    return [name for name, each in state.items() if each.family == "narrow" and name in inside]


def changed_state(
    bench: Workbench, state: State, key: Key, replacement: Replacement
) -> dict[Key, Replacement]:
    """A state with one change more."""
    gone = undone(bench, state, key, replacement)
    return {**{name: each for name, each in state.items() if name not in gone}, key: replacement}


def touched(bench: Workbench, key: Key) -> list[Key]:
    """Inner channels that a segment holds, or that begin or end in it."""
    nodes = set(bench.segments[key].nodes)
    return [each for each, place in bench.inner.items() if not nodes.isdisjoint(place.nodes)]


@dataclass(frozen=True)
class _Border:
    """What lies behind places.

    Attributes:
        inputs: tensors that it is computed from, sorted.
        outputs: of the network, those that it makes.
    """

    inputs: list[str]
    outputs: list[str]


def _border(bench: Workbench, keys: Iterable[Key], outputs: Sequence[str]) -> _Border:
    reached: set[ir.Node] = set()
    waiting: list[ir.Node] = []
    for key in keys:
        if key in bench.inner:
            place = bench.inner[key]
            waiting += [cut.node for cut in place.cuts if cut.node in place.nodes]
            waiting.append(place.consumer)
        if key in bench.segments:
            waiting += bench.segments[key].nodes
    while waiting:
        node = waiting.pop()
        if node not in reached:
            reached.add(node)
            waiting.extend(reader for value in node.outputs for reader in consumers(value))
    inputs = {
        value.name or ""
        for node in reached
        for value in node.inputs
        if value is not None
        and value.producer() not in reached
        and not bench.graph.is_constant(value)
    }
    made = {value.name for node in reached for value in node.outputs}
    return _Border(sorted(inputs), [name for name in outputs if name in made])


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
        self._price: float | None = None
        verdict = context.verdict({})
        whole = times.whole
        self.points = [Point({}, whole, 1.0, verdict, 0.0)]

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
        state, present = self.present.state, self.present
        wanted = present.latency - max(latency, present.latency * (1 - _STEP))
        moves = self._moves(state)
        if self._most(moves) < wanted and self._dear:
            # What was passed over is needed after all.
            self._dear.clear()
            moves = self._moves(state)
        if not moves:
            return False
        added = self.context.added_damages(
            state,
            [(move.key, move.replacement) for move in moves],
            progress,
            _PICTURES if self.context.makes_pictures else _SAMPLES,
        )
        moves = [
            _Move(move.key, move.replacement, move.gain, damage)
            for move, damage in zip(moves, added, strict=True)
        ]
        chosen = self._compatible(cheapest(self._alternatives(moves), wanted))
        self._remember(moves, chosen)
        found = dict(state)
        for move in chosen:
            found = changed_state(self.bench, found, move.key, move.replacement)
        verdict = self.context.verdict(found)
        after = self.times.predict(found)
        predicted = present.verdict.damage + sum(move.damage for move in chosen)
        self.points.append(Point(found, after, self.times.whole / after, verdict, predicted))
        self._round += 1
        return bool(chosen)

    def _most(self, moves: Sequence[_Move]) -> float:
        """What all moves together win."""
        return sum(max(move.gain for move in group) for group in self._alternatives(moves))

    def _moves(self, state: State) -> list[_Move]:
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
                found.append(_Move(key, replacement, gain))
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

    def _compatible(self, moves: Sequence[_Move]) -> list[_Move]:
        """Of moves that share operators with a segment that is dropped, the one that wins most.

        What alternatives by place leave over: a place may begin in one segment and end in the next.
        """
        found: list[_Move] = []
        taken: set[ir.Node] = set()
        for move in sorted(moves, key=lambda each: -each.gain):
            drops = move.replacement.family == "identity"
            if drops:
                nodes = set(self.bench.segments[move.key].nodes)
            else:
                nodes = set(self.bench.inner[move.key].nodes)
            if not nodes.isdisjoint(taken):
                continue
            others = {each.key for each in found if each.replacement.family == "narrow"}
            if drops and not others.isdisjoint(self._touched[move.key]):
                continue
            if drops:
                taken |= nodes
            found.append(move)
        return found

    def _alternatives(self, moves: Sequence[_Move]) -> list[list[_Move]]:
        """Moves by place; a segment and the channels inside it exclude each other."""
        owner: dict[Key, Key] = {}
        for key in self._drops:
            for inner in self._touched[key]:
                owner[inner] = key
        groups: dict[Key, list[_Move]] = {}
        for move in moves:
            groups.setdefault(owner.get(move.key, move.key), []).append(move)
        return list(groups.values())

    def _remember(self, moves: Sequence[_Move], chosen: Sequence[_Move]) -> None:
        """Pass over what was far dearer, per millisecond, than the dearest that was chosen."""
        if not chosen:
            return
        price = max(move.damage / move.gain for move in chosen)
        for move in moves:
            if move.damage / move.gain > _DEAR * max(price, 0.0):
                self._dear[move.key, move.replacement] = self._round + _PASSED_OVER

    def walk(
        self,
        speedup: float,
        *,
        seconds: float | None = None,
        progress: Progress | None = None,
    ) -> Point:
        """Walk until the predicted speedup is reached, nothing is left, or time is up."""
        started = time.monotonic()
        goal = self.times.whole / speedup
        while self.present.latency > goal * (1 + 1e-9):
            if seconds is not None and time.monotonic() - started > seconds:
                break
            if not self.step(goal, progress):
                break
        return self.present


def smallest_drops(bench: Workbench) -> list[Key]:
    """Segments that may be dropped and hold no other such segment."""
    same = {key: set(each.nodes) for key, each in bench.segments.items() if each.same}
    return [
        key
        for key, nodes in same.items()
        if not any(other < nodes for name, other in same.items() if name != key)
    ]


def cheapest(groups: Iterable[Sequence[_Move]], wanted: float) -> list[_Move]:
    """At most one move of every group, winning at least `wanted` at the least damage.

    All of them that win most, where nothing wins as much.
    """
    front: list[tuple[float, float, tuple[_Move, ...]]] = [(0.0, 0.0, ())]
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
    entries: list[tuple[float, float, tuple[_Move, ...]]],
) -> list[tuple[float, float, tuple[_Move, ...]]]:
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


def as_json(state: Mapping[Key, Replacement]) -> list[dict[str, Any]]:
    """Replacements for reports, in order."""
    return [
        {
            "input": key[0],
            "output": key[1],
            **{name: value for name, value in vars(each).items() if value is not None},
        }
        for key, each in state.items()
    ]

"""Networks judged in context: what each change costs in the network as it has become by then.

Damages of changes alone do not add up: neighbours interact, and beyond a few of them the whole is
two to four times the sum. So changes are measured in the network that they would change, on images
that nothing was fitted on; only what lies behind the change is run.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray

from graphfold.calibration.capture import Feeds, extract, run_part, tensor_types
from graphfold.calibration.judge import Judge, Tally, Verdict
from graphfold.calibration.places import Key
from graphfold.calibration.workbench import Replacement, State, Workbench
from graphfold.graph import consumers
from graphfold.model import to_proto
from graphfold.progress import Progress

_VALUES_OF_A_PICTURE = 4096
_MEMORY = 1 << 30


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
        others: Sequence[State],
        progress: Progress | None = None,
        *,
        feeds: int | None = None,
    ) -> list[float]:
        """Mean damage of other networks; the fewer places they differ in, the faster.

        Args:
            state: the present network.
            others: what to measure.
            progress: called with (stage, done, total).
            feeds: judge on so many of them; on all by default.
        """
        found, _ = self._tallies(state, others, progress, feeds)
        return [tally.damage for tally in found]

    def added_damages(
        self,
        state: State,
        others: Sequence[State],
        progress: Progress | None,
        samples: int,
    ) -> list[float]:
        """What each network adds to the damage of `state`, on feeds that hold so many samples.

        Differences on the same inputs need fewer of them than a damage itself.
        """
        counts = np.cumsum([len(next(iter(feed.values()))) for feed in self.feeds])
        feeds = min(len(self.feeds), int(np.searchsorted(counts, samples)) + 1)
        found, present = self._tallies(state, others, progress, feeds)
        return [tally.damage - present.damage for tally in found]

    def tallies(
        self, state: State, others: Sequence[State], progress: Progress | None
    ) -> list[Tally]:
        """Answers of other networks to all feeds."""
        return self._tallies(state, others, progress, None)[0]

    def _tallies(
        self,
        state: State,
        others: Sequence[State],
        progress: Progress | None,
        feeds: int | None,
    ) -> tuple[list[Tally], Tally]:
        """Answers of other networks and of the present one; only what lies behind is run."""
        tallies = [Tally(self.judge) for _ in others]
        present = Tally(self.judge)
        borders = [self._border(difference(state, other)) for other in others]
        names = sorted({name for border in borders for name in border.inputs})
        whole = self.bench.build(state)
        run = run_part(_with_outputs(whole, [*names, *self.judge.outputs]), self.threads)
        done = 0
        for captured in self._chunks(run, [*names, *self.judge.outputs], feeds):
            for index, other in enumerate(others):
                if progress is not None:
                    progress("measuring damage", done, 0)
                done += 1
                border = borders[index]
                part = extract(self.bench.build(other), border.inputs, border.outputs, self._types)
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


def difference(one: State, other: State) -> tuple[Key, ...]:
    """Places where two networks are not the same."""
    return tuple(key for key in dict.fromkeys([*one, *other]) if one.get(key) != other.get(key))


def changed_state(
    bench: Workbench, state: State, key: Key, replacement: Replacement
) -> dict[Key, Replacement]:
    """A state with one change more; what was narrowed in a segment that is replaced is gone."""
    gone = set() if replacement.family == "narrow" else set(touched(bench, key))
    kept = {
        name: each for name, each in state.items() if not (each.family == "narrow" and name in gone)
    }
    return {**kept, key: replacement}


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


def smallest_drops(bench: Workbench) -> list[Key]:
    """Segments that may be dropped and hold no other such segment."""
    same = {key: set(each.nodes) for key, each in bench.segments.items() if each.same}
    return [
        key
        for key, nodes in same.items()
        if not any(other < nodes for name, other in same.items() if name != key)
    ]

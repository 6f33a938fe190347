"""Times of blocks, before and after: the runtime's times per kernel, added up by block.

Every node and tensor is named after its block before the runtime sees the model, and what it fuses
keeps one of the names: so a kernel tells its block, whatever the runtime made of it. A change of
layout that it put in belongs to the block that reads the changed tensor (to the one that made it,
where the change is back). Models run in turns, round by round; a ratio is the median over rounds of
the ratio in the same round.
"""

from __future__ import annotations

import contextlib
import re
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx

from graphfold import specs
from graphfold.block_spans import BlockSpan, block_spans
from graphfold.calibration.kernels import Profiled, interquartile_range, milliseconds
from graphfold.errors import UsageError
from graphfold.graph import Graph
from graphfold.progress import Progress
from graphfold.runtime import LARGEST_IN_MEMORY, weight_bytes
from graphfold.tables import Table, make_table

if TYPE_CHECKING:
    from graphfold.model import Model

CPU = "CPUExecutionProvider"
_OWN = re.compile(r"graphfold\.block(\d+)/")
_WARM_UP_RUNS = 3
# The runtime keeps a million events of a session and drops what comes later.
_MOST_EVENTS = 500_000
_SMALLEST_ROUNDS = 3


@dataclass(frozen=True)
class BlockTime:
    """One block in all models, in milliseconds per run; one entry per model.

    Attributes:
        input, output: tensors that it lies between, None at the model's inputs and for the rest.
        kind: what the first model's block is; several in a row, where a model merged them, are
            told with their number.
        blocks: how many of the first model's blocks it is.
        medians: over rounds.
        spreads: interquartile range over rounds over the median, None where the median is 0.
        speedups: median over rounds of the first model's time over this one's, None where this
            one takes none.
        speedup_spreads: interquartile range of these ratios over their median.
    """

    input: str | None
    output: str | None
    kind: str
    blocks: int
    medians: tuple[float, ...]
    spreads: tuple[float | None, ...]
    speedups: tuple[float | None, ...]
    speedup_spreads: tuple[float | None, ...]

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        return {
            "input": self.input,
            "output": self.output,
            "kind": self.kind,
            "blocks": self.blocks,
            "median_ms": list(self.medians),
            "spread": list(self.spreads),
            "speedup": list(self.speedups),
            "speedup_spread": list(self.speedup_spreads),
        }


@dataclass(frozen=True)
class BlockTimes:
    """Times of all blocks.

    Attributes:
        models: their names, in the order of each block's entries.
        blocks: in execution order.
        whole: all kernels together.
    """

    models: tuple[str, ...]
    blocks: tuple[BlockTime, ...]
    whole: BlockTime

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        return {
            "models": list(self.models),
            "blocks": [block.to_json() for block in self.blocks],
            "whole": self.whole.to_json(),
        }

    def table(self) -> Table:
        """One row per block; the share is of the first model's kernels."""
        columns = ["block, by its output", "kind", "share"]
        for number, name in enumerate(_short(self.models)):
            columns += [f"{name}, ms", "spread"]
            columns += ["speedup", "its spread"] if number else []
        rows = [self._row(block) for block in (*self.blocks, self.whole)]
        note = (
            "Time in kernels, measured apart with the profiler on; the share is of the first "
            "model's. Speedups are over the first model."
        )
        return make_table(f"Blocks ({len(self.blocks)})", columns, rows, text_columns=2, note=note)

    def _row(self, block: BlockTime) -> tuple[str | None, ...]:
        whole = self.whole.medians[0]
        cells: list[str | None] = [
            block.output or ("all kernels" if block is self.whole else "rest"),
            block.kind,
            _percent(block.medians[0] / whole if whole else None),
        ]
        for number, median in enumerate(block.medians):
            cells += [f"{median:.3f}", _percent(block.spreads[number])]
            if number:
                speedup = block.speedups[number]
                cells.append(None if speedup is None else f"{speedup:.2f}x")
                cells.append(_percent(block.speedup_spreads[number]))
        return tuple(cells)


def _short(names: Sequence[str]) -> list[str]:
    """File names, where they tell the models apart."""
    short = [Path(name).name for name in names]
    return short if len(set(short)) == len(short) else list(names)


def _percent(share: float | None) -> str | None:
    return None if share is None else f"{100 * share:.1f} %"


def match_blocks(
    models: Sequence[Model], names: Sequence[str], provider: str
) -> tuple[BlockSpan, ...]:
    """The first model's blocks in all models: what `measure_blocks` is to measure.

    Raises:
        UsageError: models without a tensor in common or over 2 GB, or any provider but the CPU's:
            others only queue work while the profiler watches.
    """
    if provider != CPU:
        raise UsageError(
            f"times of blocks need {CPU}: {provider} only queues work while the profiler watches",
            hint="leave --blocks out, or --provider",
        )
    for model, name in zip(models, names, strict=True):
        if weight_bytes(model) > LARGEST_IN_MEMORY:
            raise UsageError(f"{name} is over 2 GB: its blocks cannot be timed apart")
    return tuple(block_spans([Graph(model) for model in models], names))


def measure_blocks(
    models: Sequence[Model],
    names: Sequence[str],
    spans: Sequence[BlockSpan],
    feed: specs.Arrays,
    *,
    threads: int,
    rounds: int,
    seconds: float,
    progress: Progress,
) -> BlockTimes:
    """Times of blocks in all models.

    Args:
        models: what to measure.
        names: of the models.
        spans: the blocks, see `match_blocks`.
        feed: what all of them run on.
        threads: intra-op threads.
        rounds: of all models in turn; fewer where the runtime's profiler would overflow.
        seconds: to measure, all models together.
        progress: called with (stage, done, total).

    Raises:
        RunError: onnxruntime cannot run one of them.
    """
    with contextlib.ExitStack() as stack:
        profiled = [
            stack.enter_context(
                Profiled(named_by_block(model, spans, index), threads=threads, provider=CPU)
            )
            for index, model in enumerate(models)
        ]
        runs = [each.session.prepared(feed) for each in profiled]
        repeats, rounds = _repeats(runs, models, rounds, seconds)
        for number in range(rounds):
            progress("measuring blocks", number, rounds)
            for offset in range(len(runs)):
                index = (number + offset) % len(runs)  # nobody is always first
                for _ in range(1 + repeats[index]):
                    runs[index]()
        progress("reading the profile", 0, 0)
        events = [each.runs() for each in profiled]
    times = [
        _rounds(each[_WARM_UP_RUNS:], count, len(spans))
        for each, count in zip(events, repeats, strict=True)
    ]
    blocks = tuple(
        _block_time(span, [[each[number] for each in own] for own in times])
        for number, span in enumerate(spans)
    )
    whole = _block_time(
        BlockSpan(None, None, (), ()), [[sum(each) for each in own] for own in times]
    )
    return BlockTimes(tuple(names), blocks, whole)


def named_by_block(model: Model, spans: Sequence[BlockSpan], index: int) -> bytes:
    """A model whose nodes and tensors are named after their blocks; nothing else changes.

    The runtime calls some of what it makes by a node's name and some by a tensor's.
    """
    from graphfold.model import to_proto

    number_of = {name: number for number, span in enumerate(spans) for name in span.nodes[index]}
    proto = onnx.ModelProto()
    proto.CopyFrom(to_proto(model))
    names: dict[str, str] = {}
    for count, node in enumerate(proto.graph.node):
        number = number_of.get(node.output[0]) if node.output else None
        if number is not None:
            node.name = f"graphfold.block{number}/node{count}"
            names |= {name: f"graphfold.block{number}/{name}" for name in node.output if name}
    _rename(proto.graph, names)
    data: bytes = proto.SerializeToString()
    return data


def _rename(graph: onnx.GraphProto, names: Mapping[str, str]) -> None:
    """Rename tensors where they are made and wherever they are read, in subgraphs too."""
    del graph.value_info[:]
    for value in graph.output:
        value.name = names.get(value.name, value.name)
    for node in graph.node:
        for read in (node.input, node.output):
            for position, name in enumerate(read):
                read[position] = names.get(name, name)
        for attribute in node.attribute:
            single = [attribute.g] if attribute.HasField("g") else []
            for inner in (*single, *attribute.graphs):
                _rename(inner, names)


def _repeats(
    runs: Sequence[Callable[[], object]], models: Sequence[Model], rounds: int, seconds: float
) -> tuple[list[int], int]:
    """Counted runs of each model in a round, behind one that warms the caches; and rounds."""
    repeats = []
    for run, model in zip(runs, models, strict=True):
        durations = []
        for _ in range(_WARM_UP_RUNS):
            begin = time.perf_counter()
            run()
            durations.append(time.perf_counter() - begin)
        wanted = round(seconds / (rounds * len(runs) * max(min(durations), 1e-6)))
        # Two events per node: the kernel and what is around it.
        room = _MOST_EVENTS // (2 * len(model.ir.graph) + 2)
        rounds = max(_SMALLEST_ROUNDS, min(rounds, room // 2))
        repeats.append(max(1, min(wanted, room // rounds - 1)))
    return repeats, rounds


def _rounds(
    runs: Sequence[Sequence[Mapping[str, Any]]], repeats: int, blocks: int
) -> list[list[float]]:
    """By round, milliseconds of every block: medians over the round's counted runs."""
    found = []
    for start in range(0, len(runs) - repeats, 1 + repeats):
        counted = [times_of_run(events) for events in runs[start + 1 : start + 1 + repeats]]
        found.append(
            [
                statistics.median(times.get(number, 0.0) for times in counted)
                for number in range(blocks)
            ]
        )
    return found


def times_of_run(events: Sequence[Mapping[str, Any]]) -> dict[int, float]:
    """Milliseconds of the blocks in one run's kernels, which are given in order of time.

    What runs inside another kernel (the body of a loop) is that kernel's time already.
    """
    outer = list(_not_nested(events))
    numbers = [_number(event) for event in outer]
    times: defaultdict[int, float] = defaultdict(float)
    for index, event in enumerate(outer):
        number = numbers[index]
        if number is None:
            before = _nearest(numbers[index - 1 :: -1] if index else [])
            behind = _nearest(numbers[index + 1 :])
            is_back = event["args"].get("op_name") == "ReorderOutput"
            first, second = (before, behind) if is_back else (behind, before)
            number = second if first is None else first
        if number is not None:
            times[number] += milliseconds(event)
    return dict(times)


def _not_nested(events: Sequence[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    end = float("-inf")
    # Of two that begin in the same microsecond the longer one is around the other.
    for event in sorted(events, key=lambda item: (item["ts"], -item["dur"])):
        stop = event["ts"] + event["dur"]
        if stop > end or event["dur"] == 0:
            yield event
            end = max(end, stop)


def _number(event: Mapping[str, Any]) -> int | None:
    match = _OWN.search(str(event["name"]))
    return None if match is None else int(match[1])


def _nearest(numbers: Sequence[int | None]) -> int | None:
    return next((number for number in numbers if number is not None), None)


def _block_time(span: BlockSpan, times: Sequence[Sequence[float]]) -> BlockTime:
    """The figures of one block from its milliseconds by model and round."""
    ratios = [
        [base / own for base, own in zip(times[0], other, strict=True) if own] for other in times
    ]
    return BlockTime(
        input=span.input,
        output=span.output,
        kind=_kind(span.kinds),
        blocks=len(span.kinds),
        medians=tuple(statistics.median(own) for own in times),
        spreads=tuple(_spread(own) for own in times),
        speedups=tuple(statistics.median(own) if own else None for own in ratios),
        speedup_spreads=tuple(_spread(own) if own else None for own in ratios),
    )


def _spread(values: Sequence[float]) -> float | None:
    median = statistics.median(values)
    return interquartile_range(values) / median if median else None


def _kind(kinds: Sequence[str]) -> str:
    if len(kinds) < 2:
        return kinds[0] if kinds else ""
    same = kinds[0] if len(set(kinds)) == 1 else "blocks"
    return f"{len(kinds)} {same}" if same == "blocks" else f"{len(kinds)} x {same}"

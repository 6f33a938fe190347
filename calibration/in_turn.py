"""Segments fitted one after the other, each on what the network before it has become.

A convolution that stands for a whole block makes an error, and the next one, fitted on the
original's tensors, never saw such inputs: after a few of them little is left of the answers. Fitted
in turn, from the inputs that it will get towards the outputs of the original, each one takes back
some of the error before it. Where single changes are small the same correction fits noise instead;
so both ways are tried on a part of the data, and what is held back decides.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from graphfold.calibration.capture import Feeds, extract, run_part, tensor_types
from graphfold.calibration.judge import Judge
from graphfold.calibration.places import Key
from graphfold.calibration.split import HELD_EVERY
from graphfold.calibration.workbench import State, Workbench
from graphfold.model import to_proto
from graphfold.progress import Progress

if TYPE_CHECKING:
    import onnx

Collect = Callable[[Feeds], None]


def fit_in_turn(
    bench: Workbench,
    state: State,
    feeds: Feeds,
    *,
    threads: int = 0,
    progress: Progress | None = None,
) -> None:
    """Fit the segments of a state in the order of the network.

    Args:
        bench: with the moments of the state's narrowed places.
        state: what is to be fitted; segments' moments and fits of the bench are made anew.
        feeds: calibration inputs.
        threads: of onnxruntime.
        progress: called with (stage, done, total).

    Raises:
        RunError: onnxruntime cannot run the network.
    """
    keys = convolutions(bench, state)
    original = to_proto(bench.model)
    known = {key: each for key, each in state.items() if key not in keys}
    for number, key in enumerate(keys):
        if progress is not None:
            progress("fitting in turn", number, len(keys))
        values = _tensors(bench, bench.build(known), key[0], feeds, threads)
        targets = _tensors(bench, original, key[1], feeds, threads)
        bench.collect_segment(key, state[key].kernel or (), zip(values, targets, strict=True))
        known[key] = state[key]


def is_better_in_turn(
    bench: Workbench,
    state: State,
    feeds: Feeds,
    collect: Collect,
    *,
    threads: int = 0,
    progress: Progress | None = None,
) -> bool:
    """Whether inputs that are held back are answered better by what is fitted in turn.

    Args:
        bench: the network; what was fitted is forgotten.
        state: what is to be fitted.
        feeds: calibration inputs; every fifth is held back.
        collect: gathers the state's moments on some of them.
        threads: of onnxruntime.
        progress: called with (stage, done, total).
    """
    held = [feeds[number] for number in range(HELD_EVERY - 1, len(feeds), HELD_EVERY)]
    fitted = [feeds[number] for number in range(len(feeds)) if (number + 1) % HELD_EVERY]
    if len(convolutions(bench, state)) < 2 or not held:
        return False
    judge = Judge(_answers(to_proto(bench.model), held, threads))
    collect(fitted)
    alone = judge.verdict(_answers(bench.build(state), held, threads))
    fit_in_turn(bench, state, fitted, threads=threads, progress=progress)
    in_turn = judge.verdict(_answers(bench.build(state), held, threads))
    bench.forget()
    return in_turn.damage < alone.damage


def convolutions(bench: Workbench, state: State) -> list[Key]:
    """The segments of a state that convolutions stand for, in the order of the network."""
    places = {node: number for number, node in enumerate(bench.graph.ir)}
    keys = [key for key, each in state.items() if each.family not in ("narrow", "identity")]
    return sorted(keys, key=lambda key: max(places[node] for node in bench.segments[key].nodes))


def _tensors(
    bench: Workbench, proto: onnx.ModelProto, name: str, feeds: Feeds, threads: int
) -> Sequence[NDArray[Any]]:
    """One tensor of a network, feed by feed; only what it comes from is run."""
    if name in feeds[0]:
        return [feed[name] for feed in feeds]
    inputs = [item.name for item in proto.graph.input]
    run = run_part(extract(proto, inputs, [name], tensor_types(bench.graph)), threads)
    return [run(feed)[name] for feed in feeds]


def _answers(
    proto: onnx.ModelProto, feeds: Sequence[Any], threads: int
) -> list[dict[str, NDArray[Any]]]:
    run = run_part(proto, threads)
    return [run(feed) for feed in feeds]

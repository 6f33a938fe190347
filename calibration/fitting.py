"""Fitted segments of a plan: what `weights: regress` means on a model with calibration data.

The model is folded losslessly first, fits are made there, and what they say is put into the model
itself, where the rest of the plan is applied as ever. Same data, same plan: same weights.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from graphfold.calibration.capture import Feeds
from graphfold.calibration.channels import find_inner
from graphfold.calibration.in_turn import fit_in_turn, is_better_in_turn
from graphfold.calibration.places import Key
from graphfold.calibration.sketch import Sketch
from graphfold.calibration.workbench import Replacement, State, Workbench
from graphfold.errors import PlanError, Problem
from graphfold.fitted import Fitted, SegmentFit
from graphfold.graph import Graph
from graphfold.plan import Plan, Segment, nearest
from graphfold.progress import Progress
from graphfold.reference import check_digest

if TYPE_CHECKING:
    from graphfold.model import Model


def fit_plan(
    model: Model,
    plan: Plan,
    feeds: Feeds,
    *,
    allow_other_model: bool = False,
    threads: int = 0,
    progress: Progress | None = None,
) -> Fitted:
    """Fit a plan's segments on calibration inputs.

    Args:
        model: the model that the plan is for; not changed.
        plan: with fitted segments.
        feeds: calibration inputs.
        allow_other_model: accept a plan made for another file.
        threads: of onnxruntime.
        progress: called with (stage, done, total).

    Raises:
        DataError: there are no inputs.
        PlanError: segments that cannot be fitted; all of them.
        RunError: onnxruntime cannot run the model.
    """
    check_digest(model, plan, allow_other_model)

    def fit(bench: Workbench, state: State) -> bool:
        narrow = [key for key, each in state.items() if each.family == "narrow"]
        kernels = {key: each.kernel or () for key, each in state.items() if each.family != "narrow"}

        def collect(some: Feeds) -> None:
            bench.collect(some, inner=narrow, segments=kernels, threads=threads, progress=progress)

        in_turn = is_better_in_turn(
            bench, state, feeds, collect, threads=threads, progress=progress
        )
        collect(feeds)
        if in_turn:
            fit_in_turn(bench, state, feeds, threads=threads, progress=progress)
        return in_turn

    return _in_place(model, plan, Workbench, fit)


def sketch_plan(model: Model, plan: Plan) -> Fitted:
    """A plan's fitted segments with arbitrary weights: what can be timed without data.

    Raises:
        PlanError: segments that cannot be fitted; all of them.
    """
    return _in_place(model, plan, Sketch)


def _in_place(
    model: Model,
    plan: Plan,
    make: Callable[[Model], Workbench],
    fit: Callable[[Workbench, State], bool] | None = None,
) -> Fitted:
    from graphfold.optimizer import optimize_model

    bench = make(optimize_model(model, None, verify=False).folded)
    copy = model.clone()
    graph = Graph(copy)
    state = _state(bench, graph, plan)
    in_turn = fit is not None and fit(bench, state)
    bench.apply(graph, state)
    fits = tuple(
        SegmentFit(*key, str(each), bench.errors[key, each], in_turn and each.family != "narrow")
        for key, each in state.items()
    )
    segments = [segment for segment in plan.segments if not segment.is_fitted]
    rest = plan.model_copy(update={"segments": segments, "model": None})
    return Fitted(copy, rest, fits)


def _state(bench: Workbench, graph: Graph, plan: Plan) -> dict[Key, Replacement]:
    own = {place.key: place.channels for place in find_inner(graph)}
    problems: list[Problem] = []
    state: dict[Key, Replacement] = {}
    for number, segment in enumerate(plan.segments):
        if not segment.is_fitted:
            continue
        key = (segment.input, segment.output)
        path = f"segments[{number}]"
        found = (
            _narrow(bench, own, path, key, segment)
            if segment.family == "narrow"
            else _convolution(bench, path, key, segment)
        )
        if key in state:
            found = Problem(path, f"another segment goes from {key[0]!r} to {key[1]!r}, too")
        if isinstance(found, Problem):
            problems.append(found)
        else:
            state[key] = found
    if problems:
        raise PlanError(problems)
    return state


def _narrow(
    bench: Workbench, own: Mapping[Key, int], path: str, key: Key, segment: Segment
) -> Replacement | Problem:
    if key not in bench.inner or own.get(key) != bench.inner[key].channels:
        what = f"there are no inner channels from {key[0]!r} to {key[1]!r}"
        return Problem(path, what, _nearest_key(key, list(bench.inner)))
    channels = bench.inner[key].channels
    width = segment.width
    if width is None:
        return Problem(f"{path}.width", f"is required: fewer than {channels} channels")
    if width >= channels:
        return Problem(f"{path}.width", f"there are {channels} channels, {width} are not fewer")
    return Replacement("narrow", width)


def _convolution(bench: Workbench, path: str, key: Key, segment: Segment) -> Replacement | Problem:
    place = bench.segments.get(key)
    if place is None:
        what = f"no segment of fixed sizes goes from {key[0]!r} to {key[1]!r}"
        return Problem(path, what, _nearest_key(key, list(bench.segments)))
    family = segment.family or "dense"
    rank = len(place.stride)
    kernel = (1,) * rank if family == "pointwise" else tuple(segment.kernel or ())
    if len(kernel) != rank:
        return Problem(f"{path}.kernel", f"is required: {rank} sizes")
    if not place.takes(kernel):
        size = "x".join(map(str, kernel))
        what = f"a kernel of {size} does not turn {_sizes(place.sizes[0])} into "
        return Problem(f"{path}.kernel", what + _sizes(place.sizes[1]), "a larger one does")
    if family == "depthwise" and place.channels[0] != place.channels[1]:
        what = f"{place.channels[0]} channels become {place.channels[1]}: not depthwise"
        return Problem(f"{path}.family", what)
    if family == "low_rank" and segment.rank is None:
        return Problem(f"{path}.rank", "is required for family: low_rank")
    return Replacement(family, kernel=kernel, rank=segment.rank)


def _sizes(sizes: Sequence[int]) -> str:
    return "x".join(map(str, sizes))


def _nearest_key(key: Key, known: Sequence[Key]) -> str | None:
    """The place with one of these ends whose other end is named most alike."""
    for end, other in ((1, 0), (0, 1)):
        ends = [each for each in known if each[end] == key[end]]
        if ends:
            (close,) = difflib.get_close_matches(key[other], [e[other] for e in ends], 1, 0.0)
            source, target = next(each for each in ends if each[other] == close)
            return f"there is one from {source!r} to {target!r}"
    return nearest(key[1], [each[1] for each in known])

"""Repair of a folded network: it learns its original's answers from unlabelled samples.

The network is trained as a whole (`distill`) to give the original's outputs and its inner tensors,
where both have the same ones. A part of the samples is held back; what they do not confirm is not
kept. Structure, names and types of the network stay what they are.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from graphfold.calibration.capture import Feeds, captured, run_part
from graphfold.calibration.distill import Progress as Step
from graphfold.calibration.distill import distill
from graphfold.calibration.judge import Judge
from graphfold.calibration.training_images import Images, fixed_batch
from graphfold.flow import find_flow
from graphfold.graph import Graph
from graphfold.model import to_proto
from graphfold.progress import Progress
from graphfold.repaired import Repaired
from graphfold.specs import Arrays

import torch  # isort: skip # after distill, which says what to install where it is missing

if TYPE_CHECKING:
    from graphfold.model import Model

_FEWEST_FEATURES, _MOST_FEATURES = 4, 16
# Share of a tensor's variance beyond which it is not the original's tensor any more.
_UNRELATED = 1.0


def repair(
    network: Model,
    original: Model,
    batches: Feeds,
    *,
    minutes: float,
    features: Sequence[str] | None = None,
    steps: int | None = None,
    step_size: float | None = None,
    seed: int = 0,
    threads: int = 0,
    progress: Progress | None = None,
) -> Repaired:
    """Train a network to answer as its original does.

    Args:
        network: to repair, in float; not changed.
        original: with the same inputs and outputs.
        batches: samples by input name, along the first axis; no labels.
        minutes: of training, wall time; judging before and after comes on top.
        features: inner tensors of the same name and shape in both that are matched as well;
            chosen by default: up to sixteen along the network.
        steps: make so many, as far as time allows; two runs of the same number are equal.
        step_size: length of a step as a part of the size of the weights of an output channel; by
            default in proportion to the damage.
        seed: of the order of the samples and of what is done to them.
        threads: of torch and onnxruntime; 0 leaves it to them.
        progress: called with (stage, done, total).

    Raises:
        UsageError: torch is missing, the models' interfaces differ, or no time is left.
        DataError: fewer than 10 samples. BridgeError: a model does not run in torch.
        RunError: onnxruntime cannot run a model.
    """
    images = Images(batches, _input_names(network), fixed_batch(network))
    if features is None:
        first = images.arrays(images.training[: images.size])
        features = common_features(network, original, first, threads=threads)
    with _threads(threads):
        found = distill(
            network,
            original,
            batches,
            minutes=minutes,
            features=features,
            steps=steps,
            step_size=step_size,
            seed=seed,
            progress=None if progress is None else _told(progress),
        )
    judge = Judge(_outputs(original, images, threads))
    before = judge.verdict(_outputs(network, images, threads))
    after = judge.verdict(_outputs(found.trained, images, threads))
    kept = found.is_kept and after.damage < before.damage
    return Repaired(
        model=found.model if kept else network.clone(),
        candidate=found.trained,
        kept=kept,
        before=before,
        after=after,
        trained=len(images.training),
        judged=sum(map(len, images.judged())),
        steps=found.steps,
        features=tuple(features),
    )


def common_features(
    network: Model, original: Model, feed: Mapping[str, NDArray[Any]], *, threads: int = 0
) -> list[str]:
    """Tensors that everything flows through in both models and that still mean the same.

    At most sixteen, spread along the network: those smaller than what is around them, where there
    are enough, since they say as much and are cheaper to compare. None where the models have no
    names in common.
    """
    graph, other = Graph(network), Graph(original)
    shapes = {value.name or "": other.shape(value) for value in _waists(other)}
    names = [
        value.name or ""
        for value in _waists(graph)
        if value.name in shapes and graph.shape(value) == shapes[value.name] is not None
    ]
    errors = _errors(network, original, names, feed, threads)
    names = [name for name in names if errors[name] < _UNRELATED]
    narrow = _narrow({name: _size(shape) for name, shape in shapes.items() if shape is not None})
    if len(narrow & set(names)) >= _FEWEST_FEATURES:
        names = [name for name in names if name in narrow]
    if len(names) <= _MOST_FEATURES:
        return names
    chosen = np.linspace(0, len(names) - 1, _MOST_FEATURES + 2).round().astype(int)[1:-1]
    return [names[index] for index in chosen]


def _narrow(sizes: Mapping[str, int]) -> set[str]:
    """Tensors whose run of equal sizes lies between larger ones."""
    runs = [(size, list(run)) for size, run in itertools.groupby(sizes, key=sizes.__getitem__)]
    around = [math.inf, *(size for size, _ in runs), math.inf]
    found = [run for i, (size, run) in enumerate(runs) if size < min(around[i], around[i + 2])]
    return set(itertools.chain.from_iterable(found))


def _size(shape: Sequence[object]) -> int:
    """Numbers of one sample; sizes that are left open count one."""
    return math.prod(size for size in shape[1:] if isinstance(size, int))


def _waists(graph: Graph) -> Iterator[Any]:
    """Tensors of the main chains, neither inputs nor outputs."""
    for chain in find_flow(graph).chains:
        if chain.parent is None:
            for value in dict.fromkeys(point.value for point in chain.points):
                if value.producer() is not None and not value.is_graph_output():
                    yield value


def _errors(
    network: Model,
    original: Model,
    names: Sequence[str],
    feed: Mapping[str, NDArray[Any]],
    threads: int,
) -> dict[str, float]:
    """Squared error of tensors over the variance that the original's have."""
    if not names:
        return {}
    own = next(iter(captured(network, names, [feed], threads=threads)))
    other = next(iter(captured(original, names, [feed], threads=threads)))
    return {name: _error(own[name], other[name]) for name in names}


def _error(own: NDArray[Any], other: NDArray[Any]) -> float:
    if own.shape != other.shape or own.dtype.kind != "f":
        return np.inf
    variance = float(np.var(other, dtype=np.float64))
    return float(np.square(own.astype(np.float64) - other).mean()) / max(variance, 1e-12)


def _told(progress: Progress) -> Callable[[Step], None]:
    def step(made: Step) -> None:
        progress(f"distilling, held-back damage {made.held_back:.4f}", int(100 * made.part), 100)

    return step


def _input_names(model: Model) -> list[str]:
    return [item.name or "" for item in model.ir.graph.inputs if not item.is_initializer()]


def _outputs(model: Model, images: Images, threads: int) -> list[Arrays]:
    """Of the held-back samples."""
    run = run_part(to_proto(model), threads)
    return [run(images.arrays(rows)) for rows in images.judged()]


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)

"""A few steps of training for one changed network, and how it does on samples that it never saw.

What comes of a trial depends on the trial, the samples and the recipe, not on the process that
makes it: it has one thread on a CPU and random numbers of its own. So any number of processes, on
any machines of one kind, makes the same table, and so does a run that was killed and continued.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from graphfold.calibration import bridge  # noqa: F401 - says what to install without torch
from graphfold.calibration.evaluating import evaluate
from graphfold.calibration.objective import Evaluation
from graphfold.calibration.pairs import Pair, pair_up
from graphfold.calibration.parallel import Group
from graphfold.calibration.recipe import Recipe
from graphfold.calibration.samples import Samples
from graphfold.calibration.training import train
from graphfold.calibration.trials import Trial
from graphfold.calibration.untie import untie
from graphfold.errors import DataError, GraphfoldError, PlanError
from graphfold.free import with_free_activations
from graphfold.graph import Graph, is_op
from graphfold.hoisting import hoist_where_needed
from graphfold.model import load
from graphfold.reference import build_reference
from graphfold.rewrite import select_passes
from graphfold.sites import find_sites

import torch  # isort: skip

if TYPE_CHECKING:
    from graphfold.model import Model

Array = NDArray[Any]


@dataclass(frozen=True)
class Part:
    """Samples as plain arrays, which go to other processes.

    Attributes:
        arrays: by input name.
        labels: their classes, or None.
    """

    arrays: Mapping[str, Array]
    labels: Array | None

    @classmethod
    def of(cls, samples: Samples) -> Part:
        """All of these samples, read now."""
        batches = [samples.take(positions)[0] for positions in samples.in_order(256)]
        arrays = {name: torch.cat([each[name] for each in batches]).numpy() for name in batches[0]}
        labels = None if samples.labels is None else samples.labels[: _length(arrays)].numpy()
        return cls(arrays, labels)

    def __len__(self) -> int:
        return _length(self.arrays)

    def samples(self, fixed: int | None) -> Samples:
        """To train or to judge on."""
        # A copy, for what another process shares cannot be written to.
        arrays = {name: np.array(array) for name, array in self.arrays.items()}
        return Samples.of(arrays, self.labels, fixed=fixed)


def _length(arrays: Mapping[str, Array]) -> int:
    return len(next(iter(arrays.values())))


@dataclass(frozen=True)
class Work:
    """What all trials of a table have in common.

    Attributes:
        key: tells it from other work.
        model: the original, as bytes.
        train, held_out: samples, of which none are in both.
        fixed: the batch size that the network insists on, if it does.
        recipe: of the training; its seed is the table's.
        alpha: the original's part of the loss where there are labels.
        device: where to compute; None takes a GPU if there is one.
    """

    key: str
    model: Array
    train: Part
    held_out: Part
    fixed: int | None
    recipe: Recipe
    alpha: float
    device: str | None


@dataclass(frozen=True)
class Outcome:
    """What came of a trial.

    Attributes:
        held_out: how the trained network does; None where it cannot be made, or its numbers ended.
        diverged: its numbers ended.
        failure: what went wrong and concerns all trials, else None.
    """

    held_out: Evaluation | None = None
    diverged: bool = False
    failure: str | None = None

    def to_json(self) -> dict[str, Any]:
        """An entry of the journal."""
        held_out = None if self.held_out is None else self.held_out.to_json()
        return {"held_out": held_out, "diverged": self.diverged}

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Outcome:
        """What `to_json` made."""
        found = document["held_out"]
        return cls(None if found is None else Evaluation.from_json(found), document["diverged"])


def run_trial(work: Work, trial: Trial) -> tuple[str, Outcome]:
    """Make one network, train it, judge it; its name and what came of it."""
    try:
        with _one_thread():
            return trial.name, _outcome(_bench_of(work), trial)
    except GraphfoldError as error:
        # Not all of these survive the way from another process.
        return trial.name, Outcome(failure=str(error))


def check_work(work: Work) -> None:
    """Refuse networks and samples that no trial could be made of.

    Raises:
        BridgeError, ModelError, DataError, UsageError: as `finetune`.
    """
    bench = _bench_of(work)
    bench.train.batch_size(work.recipe.batch_size)
    bench.pair(untie(bench.model))


@dataclass(frozen=True)
class _Bench:
    """Work, made ready in this process."""

    work: Work
    model: Model
    train: Samples
    held_out: Samples
    group: Group

    def pair(self, student: Model) -> Pair:
        has_labels = self.train.labels is not None
        teacher = None if has_labels and self.work.alpha == 0 else self.model
        return pair_up(
            student, teacher, self.train, self.held_out, self.work.alpha, 1.0, smoothing=0.0
        )


_ready: list[_Bench] = []
# Workers of a cluster may have several threads.
_making_ready = threading.Lock()


def _bench_of(work: Work) -> _Bench:
    """Ready from an earlier trial, or made now; one at a time is kept."""
    with _making_ready:
        if not _ready or _ready[0].work.key != work.key:
            model = load(work.model.tobytes())
            device = work.device or ("cuda" if torch.cuda.is_available() else "cpu")
            train, held_out = (part.samples(work.fixed) for part in (work.train, work.held_out))
            _ready[:] = [_Bench(work, model, train, held_out, Group(device=device))]
        return _ready[0]


def forget() -> None:
    """Free what this process keeps from trial to trial."""
    _ready.clear()


@contextmanager
def _one_thread() -> Iterator[None]:
    """Sums depend on how many threads made them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _outcome(bench: _Bench, trial: Trial) -> Outcome:
    recipe = replace(bench.work.recipe, seed=trial.seed(bench.work.recipe.seed))
    try:
        student = changed_network(bench.model, trial, recipe.seed)
    except PlanError:
        return Outcome()
    pair = bench.pair(student)
    if trial.row is not None:
        try:
            train(
                pair.student,
                pair.teacher,
                bench.train,
                recipe,
                objective=pair.objective,
                group=bench.group,
            )
        except DataError:
            # Samples that fit the original fit this one: the loss is no number any more.
            return Outcome(diverged=True)
    found = evaluate(
        pair.student.to(bench.group.device),
        None if pair.teacher is None else pair.teacher.to(bench.group.device).eval(),
        bench.held_out,
        pair.objective,
        group=bench.group,
    )
    return Outcome(found) if math.isfinite(found.loss) else Outcome(diverged=True)


# --- networks ---------------------------------------------------------------------------------


def changed_network(model: Model, trial: Trial, seed: int) -> Model:
    """The reference network of a trial, with nothing merged, ready to be trained.

    Args:
        model: the original; not changed.
        trial: what becomes of it.
        seed: of random weights.

    Raises:
        PlanError: the change cannot be folded.
    """
    plan = trial.plan
    if plan is None:
        student = untie(model)
    else:
        if trial.gains_activation:
            plan, _ = with_free_activations(Graph(model), plan)
        plan = hoist_where_needed(model, plan)
        student = untie(build_reference(model, plan, select_passes()).model)
    if trial.reset:
        _reset(student, trial.reset, np.random.default_rng(seed))
    return student


def _reset(model: Model, names: tuple[str, ...], rng: np.random.Generator) -> None:
    """Give convolutions and their normalisations the weights that torch begins with."""
    graph = Graph(model)
    for site in find_sites(graph).convs:
        if site.name not in names:
            continue
        weight = graph.constant(site.conv.inputs[1])
        assert weight is not None
        bound = 1 / math.sqrt(weight[0].size)
        for index in range(1, len(site.conv.inputs)):
            drawn = rng.uniform(-bound, bound, _old(graph, site.conv, index).shape)
            _replace(graph, site.conv, index, drawn)
        for node in site.nodes:
            if is_op(node, "BatchNormalization"):
                for index, number in ((1, 1.0), (2, 0.0), (3, 0.0), (4, 1.0)):
                    _replace(graph, node, index, np.full_like(_old(graph, node, index), number))


def _old(graph: Graph, node: ir.Node, index: int) -> Array:
    found = graph.constant(node.inputs[index])
    assert found is not None
    return found


def _replace(graph: Graph, node: ir.Node, index: int, content: Array) -> None:
    name = graph.fresh_name(f"{node.outputs[0].name}_anew_{index}")
    array = content.astype(_old(graph, node, index).dtype)
    own = ir.Value(
        name=name,
        shape=ir.Shape(array.shape),
        type=ir.TensorType(ir.DataType.from_numpy(array.dtype)),
        const_value=ir.Tensor(array, name=name),
    )
    graph.ir.register_initializer(own)
    node.replace_input_with(index, own)

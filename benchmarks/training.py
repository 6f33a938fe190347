"""What training reaches on CIFAR-10: accuracy against measured latency, all methods side by side.

    python benchmarks/training.py                      # what two cores do in an hour or two
    python benchmarks/training.py --network resnet20   # with the weights of ../shared
    python benchmarks/training.py --size full          # for a GPU

A MobileNetV2 for pictures of 32 x 32 (or a small VGG) is trained from first weights, a ResNet-20
has been trained already; then every method makes it faster, for three budgets of latency, and
trains what it made by one recipe: random masks, DepthShrinker's search by gradients, the search by
the loss of sets, Depth, LayerOnly, one after
the other, LayerMerge, the blocks that the search removes dropped whole, networks that are narrower
from the beginning (with and without the original as teacher), and what `auto` finds, fitted before
it is trained. `--part search` has the search beside as many random masks; `--part recovery` trains
merged and fitted networks for a ninth to all of the epochs; `--part ablation` is the papers'
comparison for one mask; `--part labels` trains it with labels, with a teacher, and with a teacher
alone. What was measured is kept: an interrupted run goes on, `--again` begins anew (with `--only`,
those methods alone).

Latency is measured in onnxruntime, one thread, in turns with the original. Accuracy is that of the
folded network on test pictures that nothing was trained or chosen on.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import common
import numpy as np
import onnx
import shared_data
import torch
from networks import Network, divisible, open_batch

import graphfold
from graphfold.calibration.auto import find_plan
from graphfold.calibration.dataset import Dataset, read_dataset
from graphfold.calibration.finetune import Finetuned, finetune
from graphfold.calibration.latency import compare
from graphfold.calibration.parallel import Group
from graphfold.calibration.recipe import Recipe
from graphfold.calibration.samples import Samples
from graphfold.calibration.search import By, search
from graphfold.calibration.searched import Run
from graphfold.candidates import find_candidates
from graphfold.errors import BudgetError
from graphfold.graph import Graph
from graphfold.masked_plans import Predictions, masked_plan
from graphfold.masking import Budget, Chooser, find_masks
from graphfold.measures import LatencyTable, read_importance, read_latency
from graphfold.model import Model, load, save, to_proto
from graphfold.plan import Plan, read_plan
from graphfold.specs import model_inputs

COMMAND = "python benchmarks/training.py"
# Expansion, channels, repeats, first stride: MobileNetV2's stages for pictures of 32 x 32.
STAGES = ((1, 16, 1, 1), (6, 24, 3, 1), (6, 32, 3, 2), (6, 64, 3, 2))
_TIMED_SECONDS = 4.0


@dataclass(frozen=True)
class Size:
    """How much is trained.

    Attributes:
        train, test: pictures.
        width: multiplier of the network's channels.
        first: epochs from first weights.
        epochs: of every training after that.
        searched: epochs of searches.
        kept: shares of the masks that are kept where the search is compared by numbers.
        rate: learning rate of both.
        speedups: budgets.
        masks: random masks for each budget.
        searches: seeds of searches.
        seeds: of the trainings with and without labels.
        scored: pictures of one training of LayerMerge's importance.
        scored_epochs: times that they are seen.
        calibrated: pictures that fits see.
        recovery: epochs of the longest training of which shares are compared.
        narrowed: budgets at which narrower networks are trained from first weights, which takes
            longest.
    """

    train: int
    test: int
    width: float
    first: int
    epochs: int
    searched: int
    kept: tuple[float, ...]
    rate: float
    speedups: tuple[float, ...]
    masks: int
    searches: int
    seeds: int
    scored: int
    scored_epochs: int
    calibrated: int
    recovery: int
    narrowed: tuple[float, ...]


SIZES = {
    "tiny": Size(400, 200, 0.5, 1, 1, 2, (0.5,), 0.1, (1.15,), 1, 1, 1, 32, 1, 80, 2, (1.15,)),
    "small": Size(
        10_000, 2_000, 0.5, 15, 2, 10, (0.6, 0.4), 0.1, (1.15, 1.3, 1.5), 5, 3, 2, 250, 2, 1_000, 6,
        (1.3,)
    ),
    "short": Size(
        5_000, 2_000, 0.5, 15, 2, 6, (0.45,), 0.1, (1.15, 1.3, 1.5), 5, 3, 3, 250, 1, 1_000, 6,
        (1.3,),
    ),
    "full": Size(
        50_000, 10_000, 1.0, 60, 18, 20, (0.6, 0.4), 0.1, (1.2, 1.5, 1.8), 5, 3, 3, 2_000, 20,
        2_000, 18, (1.2, 1.5, 1.8),
    ),
}  # fmt: skip


def mobilenet(width: float, seed: int = 0) -> onnx.ModelProto:
    """The network with its first weights, its batch open."""
    net = Network(32, seed)
    x = net.relu6(net.conv_norm("x", divisible(32 * width), 3, stride=2))
    for expansion, channels, repeats, first in STAGES:
        wanted = divisible(channels * width)
        for index in range(repeats):
            stride, inside = (first if index == 0 else 1), net.channels[x]
            y = net.relu6(net.conv_norm(x, inside * expansion, 1)) if expansion > 1 else x
            wide = net.channels[y]
            y = net.relu6(net.conv_norm(y, wide, 3, stride=stride, groups=wide))
            y = net.conv_norm(y, wanted, 1, gain=1.0)
            x = net.op("Add", x, y) if stride == 1 and inside == wanted else y
    x = net.relu6(net.conv_norm(x, divisible(320 * width), 1))
    return open_batch(net.model(net.classify(x, 10)))


def resnet(blocks: int, width: float, seed: int = 0) -> onnx.ModelProto:
    """ResNet of three stages of so many blocks with its first weights, its batch open."""
    net = Network(32, seed)
    x = net.op("Relu", net.conv_norm("x", round(16 * width), 3))
    for stage in range(3):
        for index in range(blocks):
            stride, wanted = (2 if stage and not index else 1), round(16 * 2**stage * width)
            y = net.op("Relu", net.conv_norm(x, wanted, 3, stride=stride))
            y = net.conv_norm(y, wanted, 3, gain=1.0)
            if stride > 1:
                x = net.conv_norm(x, wanted, 1, stride=stride, gain=1.0)
            x = net.op("Relu", net.op("Add", x, y))
    return open_batch(net.model(net.classify(x, 10)))


def vgg(width: float, seed: int = 0) -> onnx.ModelProto:
    """Eight 3x3 convolutions in four stages, a plain network, with its first weights."""
    net = Network(32, seed)
    x = "x"
    for stage in range(4):
        for index in range(2):
            stride = 2 if stage and not index else 1
            wanted = divisible(32 * 2**stage * width)
            x = net.op("Relu", net.conv_norm(x, wanted, 3, stride=stride))
    return open_batch(net.model(net.classify(x, 10)))


@dataclass(frozen=True)
class Kind:
    """A network that can be asked for.

    Attributes:
        make: it, of a width and with first weights of a seed.
        trained: a file of ../shared that has been trained, taken as it is.
    """

    make: Callable[[float, int], onnx.ModelProto]
    trained: str | None = None

    def width(self, size: Size) -> float:
        """Of the original."""
        return 1.0 if self.trained else size.width


NETWORKS = {
    "mobilenetv2": Kind(mobilenet),
    "resnet20": Kind(partial(resnet, 3), "cifar10_resnet20_bn"),
    "resnet56": Kind(partial(resnet, 9), "cifar10_resnet56_bn"),
    "vgg": Kind(vgg),
}


@dataclass(frozen=True)
class Pictures:
    """Data in every form that is asked for.

    Attributes:
        train, test: to train and to judge on.
        file: the pictures to train on, for what reads data sets.
    """

    train: Samples
    test: Samples
    file: Path

    @classmethod
    def read(cls, size: Size, name: str, folder: Path, device: str) -> Pictures:
        """The first pictures of each part."""
        parts = {part: _cifar(part, getattr(size, part)) for part in ("train", "test")}
        samples = [Samples.of({name: x}, y, device=device) for x, y in parts.values()]
        file = folder / "train.npz"
        np.savez(file, **{name: parts["train"][0], "labels": parts["train"][1]})
        return cls(*samples, file)

    def dataset(self, model: Model, limit: int | None = None) -> Dataset:
        """The first pictures to train on."""
        return read_dataset(str(self.file), model_inputs(model), limit=limit)


def _cifar(part: str, limit: int) -> tuple[Any, Any]:
    found = []
    for sample in shared_data.cifar(part):
        found.append((sample["input"], sample["labels"]))
        if len(found) == limit:
            break
    return np.concatenate([x for x, _ in found]), np.concatenate([y for _, y in found])


class Bench:
    """The original, its tables, and trainings by one recipe.

    Args:
        kind: the network.
        size: how much is trained.
        folder: for the original and its tables; what lies there is used again.
        device: of torch.
    """

    def __init__(self, kind: Kind, size: Size, folder: Path, device: str) -> None:
        self.kind, self.size, self.folder = kind, size, folder
        self.group = Group(device=device)
        folder.mkdir(parents=True, exist_ok=True)
        first = self._first()
        self.input = next(iter(model_inputs(first))).name
        self.pictures = Pictures.read(size, self.input, folder, self.group.device)
        path = folder / "original.onnx"
        if kind.trained is None and not path.exists():
            recipe = Recipe(epochs=size.first, learning_rate=size.rate, warmup=_warmup(size.first))
            save(self.trained(first, None, recipe).result.reference, path)
        self.original = load(path) if kind.trained is None else first
        self.candidates = find_candidates(Graph(self.original))
        self.masks = find_masks(self.candidates)
        self.seconds: dict[str, float] = {}

    def _first(self) -> Model:
        if self.kind.trained is not None:
            return load(shared_data.SHARED / "models" / f"{self.kind.trained}.onnx")
        return self.make(self.size.width)

    def make(self, width: float, seed: int = 0) -> Model:
        """The network with first weights, its input named as the original's."""
        proto = self.kind.make(width, seed)
        named = "x" if self.kind.trained is None else self.input
        for node in proto.graph.node:
            node.input[:] = [named if name == "x" else name for name in node.input]
        proto.graph.input[0].name = named
        return load(proto)

    def table(self, name: str, make: Callable[[Path], Any]) -> Path:
        """A latency or importance table, made where it is not there yet."""
        path = self.folder / f"{name}.json"
        if not path.exists():
            started = time.monotonic()
            make(path)
            self.seconds[name] = time.monotonic() - started
        return path

    @property
    def latency(self) -> LatencyTable:
        """Of this device."""
        return read_latency(self.table("latency", self._profile))

    def _profile(self, path: Path) -> None:
        graphfold.profile(self.original, path)

    def importance(self, scheme: str) -> Any:
        """By fine-tuning, as the papers' planners take it."""

        def make(path: Path) -> None:
            graphfold.score(
                self.original,
                self.pictures.dataset(self.original),
                path,
                method="finetune",
                scheme=scheme,
                subset=self.size.scored,
                epochs=self.size.scored_epochs,
                device=self.group.device,
            )

        return read_importance(self.table(f"importance_{scheme}", make))

    def trained(
        self, model: Model, plan: Any, recipe: Recipe, teacher: Model | None = None, **more: Any
    ) -> Finetuned:
        options: dict[str, Any] = {"alpha": 0.7} if teacher is not None else {"alpha": 0.0}
        return finetune(
            model,
            self.pictures.train,
            plan,
            held_out=self.pictures.test,
            teacher=teacher,
            recipe=recipe,
            group=self.group,
            **{**options, **more},
        )

    def train(
        self,
        plan: Plan | None,
        *,
        model: Model | None = None,
        epochs: int | None = None,
        seed: int = 0,
        teach: bool = True,
        **more: Any,
    ) -> dict[str, Any]:
        """Train what a plan makes, fold it, judge and time it."""
        epochs = epochs or self.size.epochs
        recipe = Recipe(
            epochs=epochs, learning_rate=self.size.rate, warmup=_warmup(epochs), seed=seed
        )
        teacher = self.original if teach else None
        started = time.monotonic()
        found = self.trained(model or self.original, plan, recipe, teacher, **more)
        held_out = found.trained.last.held_out
        assert held_out is not None
        assert found.folding is not None
        return {
            "accuracy": held_out.accuracy,
            "worst_class": held_out.worst_class,
            "before": found.trained.epochs[0].held_out.accuracy,
            "curve": [epoch.held_out.accuracy for epoch in found.trained.epochs if epoch.held_out],
            "speedup": self.speedup(found.result.folded),
            "folding_error": found.folding.error,
            "other_class": found.folding.other_class,
            "seconds": time.monotonic() - started,
            "epochs": epochs,
            "seed": seed,
        }

    def speedup(self, network: Model) -> float:
        """Over the original, both optimized by onnxruntime, one thread, in turns."""
        feed = {name: x.numpy() for name, x in self.pictures.test.take([0])[0].items()}
        found = compare(
            [to_proto(each).SerializeToString() for each in (self.original, network)],
            names=["original", "network"],
            inputs=[feed],
            threads=1,
            provider="CPUExecutionProvider",
            seconds=_TIMED_SECONDS,
        )
        return found.models[1].speedup


def _warmup(epochs: int) -> float:
    return min(1.0, epochs / 4)


# Methods ----------------------------------------------------------------------------------------


class Methods:
    """A plan, or a network, for each method and budget."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self._searched: dict[tuple[Budget, int, By], Run] = {}
        self._found: dict[float, Plan] = {}

    def plan(self, method: str, speedup: float) -> Plan:
        """Of one of the published planners, by the importance of its own paper."""
        scheme = method if method != "sequential" else "layermerge"
        result = graphfold.make_plan(
            self.bench.original,
            latency=self.bench.latency,
            importance=self.bench.importance(scheme),
            speedup=speedup,
            method=method,
            confirm=False,
        )
        assert result.plan is not None
        return result.plan

    def planned(self, method: str, speedup: float, seed: int = 0) -> dict[str, Any]:
        """The plan of a published planner, trained."""
        return self.bench.train(self.plan(method, speedup), seed=seed)

    def one_after_the_other(self, speedup: float, seed: int = 0) -> dict[str, Any]:
        """Depth, then LayerOnly on what it made, half of the epochs each."""
        bench, half = self.bench, max(1, self.bench.size.epochs // 2)
        plan = self.plan("sequential", speedup)
        dropped = [segment for segment in plan.segments if segment.family == "identity"]
        merged = [segment for segment in plan.segments if segment.family != "identity"]
        depth = plan.model_copy(update={"segments": merged})
        recipe = Recipe(epochs=half, learning_rate=bench.size.rate, seed=seed)
        first = bench.trained(bench.original, depth, recipe, bench.original)
        both = plan.model_copy(update={"segments": [*merged, *dropped], "model": None})
        network = _with_weights(bench.original, first.result.reference)
        return bench.train(both, model=network, epochs=half, seed=seed)

    def search(self, budget: Budget, seed: int = 0, by: By = "loss") -> Run:
        """The search, or DepthShrinker's."""
        if (budget, seed, by) not in self._searched:
            size = self.bench.size
            found = search(
                self.bench.original,
                self.bench.pictures.train,
                [budget],
                by=by,
                latency=self.bench.latency,
                recipe=Recipe(epochs=size.searched, learning_rate=size.rate, seed=seed),
                group=self.bench.group,
            )
            self._searched[budget, seed, by] = found.runs[0]
        return self._searched[budget, seed, by]

    def search_plan(self, speedup: float, seed: int = 0) -> Plan:
        """The plan of a search for a speedup."""
        return self.search(Budget("speedup", speedup), seed).plan

    def searched(self, budget: Budget, by: By, seed: int = 0) -> dict[str, Any]:
        """A search, and its plan trained."""
        run = self.search(budget, seed, by)
        return self.bench.train(run.plan, seed=seed) | _chosen(run.last.kept, run.latency)

    def random(self, budget: Budget, seed: int = 0) -> dict[str, Any]:
        """Masks in any order, as many on as fit the budget, merged by the same table."""
        bench, count = self.bench, len(self.bench.masks)
        predictions = Predictions(bench.candidates, bench.masks, bench.latency)
        savings, latency, original = (
            predictions.savings, predictions.latency, predictions.original
        )  # fmt: skip
        rng = np.random.default_rng([seed, round(100 * budget.value)])
        kept = Chooser(budget, savings, latency, original)(rng.permutation(count).tolist())
        gone = frozenset(at for at, on in enumerate(kept) if not on)
        plan = masked_plan(bench.original, bench.masks, gone, predictions)
        return bench.train(plan, seed=seed) | _chosen(kept, predictions.latency(gone))

    def dropped(self, speedup: float, seed: int = 0) -> dict[str, Any]:
        """The very blocks that the search removes, dropped whole where shapes allow."""
        document = self.search_plan(speedup, seed).model_dump(mode="json", exclude_unset=True)
        graph = Graph(self.bench.original)
        shapes = {name: graph.shape(value) for name, value in graph.values().items()}
        document["segments"] = [
            {"input": each["input"], "output": each["output"], "family": "identity"}
            for each in document["segments"]
            if shapes[each["input"]] == shapes[each["output"]]
        ]
        return self.bench.train(read_plan(document), seed=seed)

    def narrower(self, speedup: float, seed: int = 0, teach: bool = False) -> dict[str, Any]:
        """A network of fewer channels that is as fast, from first weights, for all the epochs."""
        bench = self.bench
        width = bench.kind.width(bench.size)
        while True:
            width -= 1 / 32
            network = bench.make(width, seed)
            if bench.speedup(network) >= speedup or width < 0.2:
                break
        epochs = bench.size.first + bench.size.epochs
        return bench.train(None, model=network, epochs=epochs, seed=seed, teach=teach)

    def fitted(self, speedup: float, seed: int = 0, epochs: int | None = None) -> dict[str, Any]:
        """What `auto` finds: fitted to the pictures first."""
        if speedup not in self._found:
            original = self.bench.original
            data = self.bench.pictures.dataset(original, self.bench.size.calibrated)
            self._found[speedup] = find_plan(original, data, speedup=speedup).plan
        return self.bench.train(self._found[speedup], seed=seed, epochs=epochs)


def refitted(plan: Plan) -> Plan:
    """The merged segments of a plan with fitted weights."""
    document = plan.model_dump(mode="json", exclude_unset=True)
    stays = ("input", "output", "family", "kernel")
    document["segments"] = [
        each
        if each.get("family") == "identity"
        else {**{key: each[key] for key in stays if key in each}, "weights": "regress"}
        for each in document["segments"]
    ]
    return read_plan(document)


def _chosen(kept: Sequence[bool], latency: float | None) -> dict[str, Any]:
    """Which masks a network has on, and what the table says of it."""
    return {"kept": [int(on) for on in kept], "predicted_ms": latency}


def _with_weights(model: Model, trained: Model) -> Model:
    """The model with the weights of a changed one where they have the same name and shape."""
    proto = to_proto(model)
    known = {item.name: item for item in to_proto(trained).graph.initializer}
    for item in proto.graph.initializer:
        other = known.get(item.name)
        if other is not None and list(other.dims) == list(item.dims):
            item.CopyFrom(other)
    return load(proto)


def table_runs(bench: Bench) -> dict[str, Callable[[], dict[str, Any]]]:
    """Everything that the main table compares, by its name in the results."""
    methods, size = Methods(bench), bench.size
    runs: dict[str, Callable[[], dict[str, Any]]] = {}

    for speedup in size.speedups:

        def add(
            name: str,
            count: int,
            run: Callable[..., dict[str, Any]],
            speedup: float = speedup,
        ) -> None:
            for seed in range(count):
                runs[f"{name}|{speedup:g}|{seed}"] = partial(run, seed=seed)

        budget = Budget("speedup", speedup)
        for by, name in SEARCHES.items():
            add(name, size.searches, partial(methods.searched, budget, by))
        add("random masks", size.masks, partial(methods.random, budget))
        add("the search's blocks dropped", 1, partial(methods.dropped, speedup))
        for method, name in METHODS.items():
            add(name, 1, partial(methods.planned, method, speedup))
        add("Depth, then LayerOnly", 1, partial(methods.one_after_the_other, speedup))
        add("fitted, then trained", 1, partial(methods.fitted, speedup))
        if speedup in size.narrowed:
            add("narrower, from first weights", 1, partial(methods.narrower, speedup))
            add("narrower, with the teacher", 1, partial(methods.narrower, speedup, teach=True))
    return runs


def search_runs(bench: Bench) -> dict[str, Callable[[], dict[str, Any]]]:
    """The search beside random masks, for so many masks that are kept."""
    methods = Methods(bench)
    runs: dict[str, Callable[[], dict[str, Any]]] = {}
    for share in bench.size.kept:
        budget = Budget("keep", round(share * len(bench.masks)))
        ways = [
            (name, partial(methods.searched, budget, by), bench.size.searches)
            for by, name in SEARCHES.items()
        ]
        ways.append(("random masks", partial(methods.random, budget), bench.size.masks))
        for name, run, seeds in ways:
            for seed in range(seeds):
                runs[f"{name}|{budget.value:g}|{seed}"] = partial(run, seed=seed)
    return runs


def recovery_runs(bench: Bench) -> dict[str, Callable[[], dict[str, Any]]]:
    """Shorter trainings of networks that are equally fast: LayerMerge's at the middle budget."""
    methods, size = Methods(bench), bench.size
    speedup = size.speedups[len(size.speedups) // 2]

    def merged(epochs: int) -> dict[str, Any]:
        return bench.train(methods.plan("layermerge", speedup), epochs=epochs)

    @cache
    def measured() -> float:
        plan = methods.plan("layermerge", speedup)
        return bench.speedup(graphfold.optimize(bench.original, plan, verify=False).folded)

    def fitted(epochs: int) -> dict[str, Any]:
        return methods.fitted(measured(), epochs=epochs)

    def fitted_plan(epochs: int) -> dict[str, Any]:
        original = bench.original
        plan = refitted(methods.plan("layermerge", speedup))
        data = bench.pictures.dataset(original, size.calibrated)
        feeds = [dict(batch.feed) for batch in data.batches(50)]
        network = graphfold.optimize(original, plan, data=feeds, verify=False).folded
        return bench.train(None, model=network, epochs=epochs)

    ways = {"LayerMerge": merged, "LayerMerge's plan, fitted": fitted_plan, "fitted": fitted}
    lengths = [max(1, round(size.recovery * share)) for share in (1 / 9, 1 / 6, 1 / 3, 1 / 2, 1)]
    return {
        f"{name}|{epochs}|0": partial(run, epochs)
        for epochs in dict.fromkeys(lengths)
        for name, run in ways.items()
    }


def ablation_runs(bench: Bench) -> dict[str, Callable[[], dict[str, Any]]]:
    """One mask, from pretrained and from first weights, with and without free activations."""
    methods, size = Methods(bench), bench.size
    speedup = size.speedups[len(size.speedups) // 2]

    def pretrained(free: bool) -> dict[str, Any]:
        return bench.train(methods.search_plan(speedup), free_activations=free)

    def scratch(epochs: int) -> dict[str, Any]:
        plan = methods.search_plan(speedup).model_copy(update={"model": None})
        network = bench.make(bench.kind.width(size), seed=1)
        return bench.train(plan, model=network, epochs=epochs, teach=False)

    return {
        "from pretrained weights|1|0": partial(pretrained, True),
        "without free activations|1|0": partial(pretrained, False),
        "from first weights|1|0": partial(scratch, size.epochs),
        "from first weights, twice the training|2|0": partial(scratch, 2 * size.epochs),
    }


def label_runs(bench: Bench) -> dict[str, Callable[[], dict[str, Any]]]:
    """What labels and the teacher bring, for the search's mask."""
    methods, size = Methods(bench), bench.size
    speedup = size.speedups[len(size.speedups) // 2]

    def run(seed: int, options: dict[str, Any]) -> dict[str, Any]:
        return bench.train(methods.search_plan(speedup), seed=seed, **options)

    ways: dict[str, dict[str, Any]] = {
        "labels alone": {"teach": False},
        "labels and teacher": {},
        "teacher alone": {"alpha": 1.0},
    }
    return {
        f"{name}|{speedup:g}|{seed}": partial(run, seed, options)
        for seed in range(size.seeds)
        for name, options in ways.items()
    }


SEARCHES: dict[By, str] = {"loss": "the search", "gradient": "DepthShrinker's search"}
METHODS = {"depth": "Depth", "layer-only": "LayerOnly", "layermerge": "LayerMerge"}
TITLES = {
    "table": "accuracy against measured latency",
    "search": "searched against random masks",
    "recovery": "shares of the training",
    "ablation": "one mask, from pretrained and from first weights",
    "labels": "what labels and the teacher bring",
}
PARTS = {
    "table": table_runs,
    "search": search_runs,
    "recovery": recovery_runs,
    "ablation": ablation_runs,
    "labels": label_runs,
}


# Results ----------------------------------------------------------------------------------------


def rows_of(found: dict[str, Any]) -> list[list[str]]:
    """Means over seeds, with their spread."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for key, row in found.items():
        name, budget, _ = key.split("|")
        groups.setdefault((budget, name), []).append(row)
    rows = []
    for (budget, name), every in sorted(groups.items(), key=lambda item: float(item[0][0])):
        known = [row for row in every if "accuracy" in row]
        if not known:
            rows.append([budget, name, *["-"] * 6, every[0].get("reason", "")])
            continue
        accuracy = [100 * row["accuracy"] for row in known]
        spread = f" ± {statistics.stdev(accuracy):.1f}" if len(accuracy) > 1 else ""
        rows.append(
            [
                budget,
                name,
                f"{statistics.mean(row['speedup'] for row in known):.2f}x",
                f"{statistics.mean(accuracy):.1f} %{spread}",
                f"{100 * statistics.mean(row['worst_class'] for row in known):.1f} %",
                f"{100 * statistics.mean(row['before'] for row in known):.1f} %",
                f"{max(row['folding_error'] for row in known):.0e}",
                str(sum(row["other_class"] for row in known)),
                str(len(known)),
            ]
        )
    return rows


def results_name(options: argparse.Namespace, part: str) -> str:
    """Of the files of results."""
    return f"training_{options.network}_{options.size}" + ("" if part == "table" else f"_{part}")


def report(options: argparse.Namespace, part: str, known: dict[str, Any]) -> None:
    """Write everything that is known of a part."""
    network, name = options.network, options.size
    columns = [
        "budget", "method", "speedup", "accuracy", "worst class", "before training",
        "folding error", "other class", "trainings",
    ]  # fmt: skip
    body = [f"{network}, size `{name}`: {SIZES[name]}.", ""]
    body += [f"The original: {100 * known['original']:.1f} %.", ""]
    if known["seconds"]:
        body += [f"Tables, seconds: {known['seconds']}.", ""]
    body.append(common.markdown(columns, rows_of(known["runs"])))
    title = f"Training on CIFAR-10: {TITLES[part]}"
    command = f"{COMMAND} --network {network} --size {name} --part {part}"
    common.write(results_name(options, part), title, command, "\n".join(body), known)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--network", choices=list(NETWORKS), default="mobilenetv2")
    parser.add_argument("--size", choices=list(SIZES), default="small")
    parser.add_argument("--part", choices=list(PARTS), nargs="+", default=["table"])
    parser.add_argument("--only", nargs="*", help="methods, by the beginning of their names")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--folder", type=Path, default=common.ROOT / "build" / "training")
    parser.add_argument("--again", action="store_true", help="forget what was measured before")
    options = parser.parse_args()
    folder = options.folder / f"{options.network}_{options.size}"
    kind, size = NETWORKS[options.network], SIZES[options.size]
    bench = Bench(kind, size, folder, options.device)
    for part in options.part:
        run_part(bench, part, options)


def run_part(bench: Bench, part: str, options: argparse.Namespace) -> None:
    """Everything of a part that is not known yet."""
    path = common.RESULTS / f"{results_name(options, part)}.json"
    known: dict[str, Any] = {"runs": {}, "seconds": {}}
    if path.exists() and not (options.again and options.only is None):
        known = json.loads(path.read_text())
    if options.again:
        known["runs"] = {
            key: run for key, run in known["runs"].items() if not _wanted(key, options.only)
        }
    if "original" not in known:
        known["original"] = bench.train(None, epochs=1, teach=False)["before"]
    for key, run in PARTS[part](bench).items():
        if key in known["runs"] or not _wanted(key, options.only):
            continue
        try:
            known["runs"][key] = run()
        except BudgetError as error:
            known["runs"][key] = {"reason": str(error)}
        known["seconds"] |= bench.seconds
        print(key, {k: v for k, v in known["runs"][key].items() if k != "curve"}, flush=True)
        report(options, part, known)


def _wanted(key: str, only: Sequence[str] | None) -> bool:
    return not only or any(key.startswith(name) for name in only)


if __name__ == "__main__":
    main()

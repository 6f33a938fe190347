"""What `training.py` trains: networks for CIFAR-10, pictures, sizes; one recipe for all."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import shared_data
from networks import Network, divisible, open_batch

import graphfold
from graphfold.calibration.dataset import Dataset, read_dataset
from graphfold.calibration.finetune import Finetuned, finetune
from graphfold.calibration.latency import compare
from graphfold.calibration.parallel import Group
from graphfold.calibration.recipe import Recipe
from graphfold.calibration.samples import Samples
from graphfold.candidates import find_candidates
from graphfold.graph import Graph
from graphfold.masking import Per, find_masks
from graphfold.measures import LatencyTable, read_importance, read_latency
from graphfold.model import Model, load, save, to_proto
from graphfold.plan import Plan
from graphfold.specs import model_inputs

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
        searches: seeds of searches, of what planners choose, and of shares of the training.
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
        10_000, 2_000, 0.5, 15, 2, 10, (0.4,), 0.1, (1.15, 1.3, 1.5), 5, 3, 2, 250, 2, 1_000, 6,
        (1.3,)
    ),
    "short": Size(
        5_000, 2_000, 0.5, 15, 2, 6, (0.45, 0.2), 0.1, (1.15, 1.3, 1.5), 5, 3, 3, 250, 1, 1_000, 6,
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
        per: what masks are of; plain networks have no blocks.
        ends: whether the first and the last activation may go, too; what a plain network can win
            by merging is all at its beginning.
    """

    make: Callable[[float, int], onnx.ModelProto]
    trained: str | None = None
    per: Per = "block"
    ends: bool = False

    def width(self, size: Size) -> float:
        """Of the original."""
        return 1.0 if self.trained else size.width


NETWORKS = {
    "mobilenetv2": Kind(mobilenet),
    "resnet20": Kind(partial(resnet, 3), "cifar10_resnet20_bn"),
    "resnet56": Kind(partial(resnet, 9), "cifar10_resnet56_bn"),
    "vgg": Kind(vgg, per="activation", ends=True),
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
            recipe = Recipe(epochs=size.first, learning_rate=size.rate, warmup=warmup(size.first))
            save(self.trained(first, None, recipe).result.reference, path)
        self.original = load(path) if kind.trained is None else first
        self.candidates = find_candidates(Graph(self.original))
        self.masks = find_masks(self.candidates, kind.per, ends=kind.ends)
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
            epochs=epochs, learning_rate=self.size.rate, warmup=warmup(epochs), seed=seed
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


def warmup(epochs: int) -> float:
    """Epochs of it in a training of so many."""
    return min(1.0, epochs / 4)

"""The methods that `training.py` compares: a plan, or a network, for each and for each budget."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from training_bench import Bench

import graphfold
from graphfold.calibration.auto import find_plan
from graphfold.calibration.recipe import Recipe
from graphfold.calibration.search import By, search
from graphfold.calibration.searched import Run
from graphfold.graph import Graph
from graphfold.masked_plans import Predictions, masked_plan
from graphfold.masking import Budget, Chooser
from graphfold.model import Model, load, to_proto
from graphfold.plan import Plan, read_plan


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
                per=self.bench.kind.per,
                ends=self.bench.kind.ends,
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
        if not document["segments"]:
            return {"reason": "nothing that the search merges has the shape of what it reads"}
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

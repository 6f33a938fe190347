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
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import common
import torch
from training_bench import NETWORKS, SIZES, Bench
from training_methods import Methods, refitted

import graphfold
from graphfold.calibration.search import By
from graphfold.errors import BudgetError
from graphfold.masking import Budget

COMMAND = "python benchmarks/training.py"


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
            add(name, size.searches, partial(methods.planned, method, speedup))
        add("Depth, then LayerOnly", size.searches, partial(methods.one_after_the_other, speedup))
        add("fitted, then trained", size.searches, partial(methods.fitted, speedup))
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

    def merged(epochs: int, seed: int) -> dict[str, Any]:
        return bench.train(methods.plan("layermerge", speedup), epochs=epochs, seed=seed)

    @cache
    def measured() -> float:
        plan = methods.plan("layermerge", speedup)
        return bench.speedup(graphfold.optimize(bench.original, plan, verify=False).folded)

    def fitted(epochs: int, seed: int) -> dict[str, Any]:
        return methods.fitted(measured(), epochs=epochs, seed=seed)

    def fitted_plan(epochs: int, seed: int) -> dict[str, Any]:
        original = bench.original
        plan = refitted(methods.plan("layermerge", speedup))
        data = bench.pictures.dataset(original, size.calibrated)
        feeds = [dict(batch.feed) for batch in data.batches(50)]
        network = graphfold.optimize(original, plan, data=feeds, verify=False).folded
        return bench.train(None, model=network, epochs=epochs, seed=seed)

    ways = {"LayerMerge": merged, "LayerMerge's plan, fitted": fitted_plan, "fitted": fitted}
    lengths = [max(1, round(size.recovery * share)) for share in (1 / 9, 1 / 6, 1 / 3, 1 / 2, 1)]
    return {
        f"{name}|{epochs}|{seed}": partial(run, epochs, seed)
        for seed in range(size.searches)
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
    runs = PARTS[part](bench)
    for key, run in runs.items():
        if key in known["runs"] or not _wanted(key, options.only):
            continue
        try:
            known["runs"][key] = run()
        except BudgetError as error:
            known["runs"][key] = {"reason": str(error)}
        known["runs"] = {each: known["runs"][each] for each in runs if each in known["runs"]}
        known["seconds"] |= bench.seconds
        print(key, {k: v for k, v in known["runs"][key].items() if k != "curve"}, flush=True)
        report(options, part, known)


def _wanted(key: str, only: Sequence[str] | None) -> bool:
    return not only or any(key.startswith(name) for name in only)


if __name__ == "__main__":
    main()

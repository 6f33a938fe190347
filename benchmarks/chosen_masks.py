"""How good the masks are that searches choose, in networks so small that all can be tried.

    python benchmarks/chosen_masks.py

Chains of eight inverted-residual blocks of different strength, random weights, random pictures, the
network itself as teacher: every set of three blocks that keep their activations is trained for half
as long as a search, and its loss compared with that of the set that a search chooses. 0 is the
best set of all 56, 1 as good as the mean of all: what drawing one at random comes to.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from typing import Any, get_args

import numpy as np
import onnx
import torch
from common import command_line, markdown, write
from networks import Network, open_batch

from graphfold.calibration.finetune import finetune
from graphfold.calibration.recipe import Recipe
from graphfold.calibration.samples import Samples
from graphfold.calibration.search import By, search
from graphfold.candidates import find_candidates
from graphfold.graph import Graph
from graphfold.masked_plans import masked_plan
from graphfold.masking import Budget, find_masks
from graphfold.model import Model, load

COMMAND = "python benchmarks/chosen_masks.py"
BLOCKS, KEPT = 8, 3


def chain(seed: int) -> onnx.ModelProto:
    """Blocks whose branches are scaled by 0.1 to 1.5 behind their normalisation."""
    net = Network(8, seed)
    x = net.op("Relu", net.conv_norm("x", 8, 3, stride=2))
    for scale in np.random.default_rng(seed).uniform(0.1, 1.5, BLOCKS):
        y = net.op("Relu", net.conv_norm(x, 16, 1))
        y = net.op("Relu", net.conv_norm(y, 16, 3, groups=16))
        x = net.op("Add", x, net.conv_norm(y, 8, 1, gain=float(scale)))
    return open_batch(net.model(net.classify(net.op("Relu", x), 4)))


def pictures(count: int, seed: int) -> Samples:
    """Normal numbers, smooth over neighbours."""
    noise = np.random.default_rng(seed).standard_normal((count, 3, 9, 9))
    smooth = noise[:, :, 1:, 1:] + noise[:, :, :-1, 1:] + noise[:, :, 1:, :-1]
    return Samples.of({"x": smooth.astype(np.float32)})


def recipe(epochs: int, seed: int) -> Recipe:
    """Of searches and of trainings."""
    return Recipe(epochs=epochs, batch_size=32, learning_rate=0.1, augment=False, seed=seed)


def losses(model: Model, data: Samples, epochs: int) -> dict[tuple[bool, ...], float]:
    """What each set of masks comes to, trained from the model's own weights."""
    masks = find_masks(find_candidates(Graph(model)))
    found = {}
    for on in itertools.combinations(range(BLOCKS), KEPT):
        gone = frozenset(range(BLOCKS)) - set(on)
        plan = masked_plan(model, masks, gone, None)
        tuned = finetune(
            model, data, plan, held_out=data, recipe=recipe(epochs, 0), free_activations=False
        )
        held_out = tuned.trained.last.held_out
        assert held_out is not None
        found[tuple(at in on for at in range(BLOCKS))] = held_out.loss
    return found


def row(seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """One network: all sets, and what the searches choose."""
    started = time.monotonic()
    model, data = load(chain(seed)), pictures(options.pictures, seed)
    known = losses(model, data, options.epochs // 2)
    best, mean = min(known.values()), statistics.mean(known.values())
    searches: dict[str, list[float]] = {by: [] for by in get_args(By)}
    for by, found in searches.items():
        for search_seed in range(options.searches):
            how = {"by": by, "recipe": recipe(options.epochs, search_seed), "decays": (0.0,)}
            run = search(model, data, [Budget("keep", KEPT)], **how).runs[0]
            found.append((known[run.last.kept] - best) / (mean - best))
    return {
        "network": seed,
        "best": best,
        "mean": mean,
        "worst": max(known.values()),
        "searches": searches,
        "seconds": time.monotonic() - started,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--networks", type=int, default=4)
    parser.add_argument("--searches", type=int, default=3, help="on each network")
    parser.add_argument("--pictures", type=int, default=512)
    parser.add_argument("--epochs", type=int, default=8, help="of a search")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for seed in range(options.networks):
        rows.append(row(seed, options))
        print(rows[-1], flush=True)
    shown = [
        [
            str(each["network"]),
            *(f"{each[name]:.4f}" for name in ("best", "mean", "worst")),
            *(", ".join(f"{chosen:.2f}" for chosen in each["searches"][by]) for by in get_args(By)),
        ]
        for each in rows
    ]
    means = [
        f"{statistics.mean(chosen for each in rows for chosen in each['searches'][by]):.2f}"
        for by in get_args(By)
    ]
    columns = ["network", "best loss", "mean", "worst", *(f"--by {by}" for by in get_args(By))]
    body = markdown(columns, [*shown, ["mean", "", "", "", *means]])
    command = command_line(COMMAND, parser, options, ())
    write("chosen_masks", "Masks that searches choose", command, body, {"networks": rows})


if __name__ == "__main__":
    main()

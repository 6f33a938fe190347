"""What merging costs a denoising network on CIFAR-10: noise-prediction loss and sample quality.

    python benchmarks/denoising.py

A small U-Net of denoising diffusion (Ho et al., 2020) is trained to tell the noise in pictures, and
made faster for several budgets of latency: LayerMerge's planner on importances by fine-tuning (of
the loss), normalisations behind merged convolutions (`norm: after`). What is merged is trained for
as many epochs as a copy of the original that is trained on.

No weights of the Inception network are at hand, so samples are judged by a stand-in, not comparable
with published distances: Fréchet's distance of the features that the ResNet-56 of ../shared has of
drawn pictures, to those of pictures of CIFAR-10 (deterministic sampling, Song et al., 2021).
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import common
import numpy as np
import shared_data
from networks import open_batch
from numpy.typing import NDArray
from scipy import linalg
from torch import Tensor, nn
from unet import Layout, ddpm_unet

import graphfold
from graphfold.calibration.capture import run_part, run_with_inner
from graphfold.calibration.dataset import read_dataset
from graphfold.calibration.finetune import finetune
from graphfold.calibration.latency import compare
from graphfold.calibration.recipe import Recipe
from graphfold.calibration.samples import Samples
from graphfold.errors import BudgetError
from graphfold.measures import read_importance, read_latency
from graphfold.model import Model, load, save, to_proto
from graphfold.plan import Plan
from graphfold.specs import model_inputs

COMMAND = "python benchmarks/denoising.py"
MEAN = np.array([0.485, 0.456, 0.406], np.float32)[:, None, None]
DEVIATION = np.array([0.229, 0.224, 0.225], np.float32)[:, None, None]
LAYOUT = Layout(size=32, width=16, multipliers=(1, 2, 2), blocks=1, attention=(), groups=4)
STEPS = 1000
FEATURES = "cifar10_resnet56_bn"
_TIMED_SECONDS = 6.0


def kept() -> NDArray[np.float64]:
    """The share of a picture's variance that is left after each step (Ho et al., section 4)."""
    return np.cumprod(1.0 - np.linspace(1e-4, 0.02, STEPS))


def noisy(count: int, part: str, seed: int) -> dict[str, NDArray[np.float32]]:
    """Pictures in [-1, 1] with noise of random strength: x, its step t, and the noise."""
    rng = np.random.default_rng(seed)
    clean = pictures(part, count)
    steps = rng.integers(0, STEPS, count)
    share = kept()[steps, None, None, None]
    noise = rng.standard_normal(clean.shape)
    mixed = np.sqrt(share) * clean + np.sqrt(1 - share) * noise
    return {
        "x": mixed.astype(np.float32),
        "t": steps.astype(np.float32)[:, None],
        "noise": noise.astype(np.float32),
    }


def pictures(part: str, count: int) -> NDArray[np.float32]:
    """CIFAR-10's first pictures in [-1, 1]."""
    found = []
    for sample in shared_data.cifar(part):
        found.append(sample["input"])
        if len(found) == count:
            break
    normalised = np.concatenate(found)
    return (normalised * DEVIATION + MEAN) * 2 - 1


class Noise(nn.Module):
    """A teacher that gives the noise that was added."""

    def forward(self, *inputs: Tensor) -> Tensor:
        _, _, noise = inputs
        return noise


# Sample quality ---------------------------------------------------------------------------------


def drawn(network: Model, count: int, steps: int, seed: int = 0) -> NDArray[np.float32]:
    """Pictures from noise, in [-1, 1], without randomness on the way (Song et al., 2021)."""
    run, share = run_part(to_proto(network), 0), kept()
    output = network.ir.graph.outputs[0].name or ""
    rng = np.random.default_rng(seed)
    times = np.linspace(STEPS - 1, 0, steps).round().astype(int)
    batches = []
    for begin in range(0, count, 100):
        shape = (min(100, count - begin), 3, LAYOUT.size, LAYOUT.size)
        x = rng.standard_normal(shape).astype(np.float32)
        clean = x
        for now, after in zip(times, [*times[1:], None], strict=True):
            noise = run({"x": x, "t": np.full((len(x), 1), now, np.float32)})[output]
            clean = (x - np.sqrt(1 - share[now]) * noise) / np.sqrt(share[now])
            clean = np.clip(clean, -1, 1)
            noise = (x - np.sqrt(share[now]) * clean) / np.sqrt(1 - share[now])
            if after is not None:
                x = np.sqrt(share[after]) * clean + np.sqrt(1 - share[after]) * noise
                x = x.astype(np.float32)
        batches.append(clean)
    return np.concatenate(batches).astype(np.float32)


class Features:
    """What a trained classifier sees in pictures: their mean and covariance."""

    def __init__(self) -> None:
        model = load(shared_data.SHARED / "models" / f"{FEATURES}.onnx")
        self.input = model_inputs(model)[0].name
        (last,) = [node for node in model.ir.graph if node.op_type in ("Gemm", "MatMul")]
        assert last.inputs[0] is not None
        self.name = last.inputs[0].name or ""
        self.run = run_with_inner(model, [self.name], 0)

    def moments(self, shown: NDArray[np.float32]) -> tuple[NDArray[Any], NDArray[Any]]:
        """Of pictures in [-1, 1]."""
        found = []
        for begin in range(0, len(shown), 500):
            normalised = ((shown[begin : begin + 500] + 1) / 2 - MEAN) / DEVIATION
            found.append(self.run({self.input: normalised.astype(np.float32)})[self.name])
        features = np.concatenate(found).reshape(len(shown), -1).astype(np.float64)
        return features.mean(axis=0), np.cov(features, rowvar=False)


def distance(one: tuple[Any, Any], other: tuple[Any, Any]) -> float:
    """Frechet's distance of two normal distributions."""
    root = linalg.sqrtm(one[1] @ other[1]).real
    apart = np.square(one[0] - other[0]).sum()
    return float(apart + np.trace(one[1] + other[1] - 2 * root))


# The benchmark ----------------------------------------------------------------------------------


class Bench:
    """The original, and trainings of what is made of it.

    Args:
        options: of the command line.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        options.folder.mkdir(parents=True, exist_ok=True)
        parts = {"train": options.pictures, "test": options.judged}
        arrays = {part: noisy(count, part, 1) for part, count in parts.items()}
        self.train, self.test = (Samples.of(each) for each in arrays.values())
        self.file = options.folder / "noisy.npz"
        np.savez(self.file, x=arrays["train"]["x"], t=arrays["train"]["t"])
        self.features = Features()
        self.real = self.features.moments(pictures("test", options.drawn))
        path = options.folder / "original.onnx"
        if not path.exists():
            first = load(open_batch(ddpm_unet(LAYOUT)))
            save(self.tuned(first, None, options.first)[0].result.reference, path)
        self.original = load(path)

    def tuned(self, model: Model, plan: Plan | None, epochs: int) -> tuple[Any, float]:
        """Trained to tell the noise, and the seconds that it took."""
        started = time.monotonic()
        rate = self.options.rate
        recipe = Recipe(
            epochs=epochs, optimizer="adam", learning_rate=rate, batch_size=64, augment=False
        )
        found = finetune(
            model, self.train, plan, held_out=self.test, teacher=Noise(), recipe=recipe
        )
        return found, time.monotonic() - started

    def plan(self, speedup: float) -> Plan:
        """LayerMerge's, from tables that are made where they are not there yet."""
        latency, importance = (
            self.options.folder / f"{name}.json" for name in ("latency", "importance")
        )
        if not latency.exists():
            graphfold.profile(self.original, latency)
        if not importance.exists():
            data = read_dataset(str(self.file), model_inputs(self.original))
            options = {"subset": self.options.scored, "epochs": 1, "batch_size": 32}
            graphfold.score(self.original, data, importance, method="finetune", **options)
        found = graphfold.make_plan(
            self.original,
            latency=read_latency(latency),
            importance=read_importance(importance),
            speedup=speedup,
            method="layermerge",
            confirm=False,
        )
        assert found.plan is not None
        return found.plan

    def row(self, name: str, plan: Plan | None) -> dict[str, Any]:
        """Train, fold, time, and judge."""
        found, seconds = self.tuned(self.original, plan, self.options.epochs)
        first, last = (found.trained.epochs[0].held_out, found.trained.last.held_out)
        folded = found.result.folded
        feed = {name: array[:1] for name, array in noisy(1, "test", 2).items() if name != "noise"}
        timed = compare(
            [to_proto(each).SerializeToString() for each in (self.original, folded)],
            names=["original", "network"],
            inputs=[feed],
            threads=1,
            seconds=_TIMED_SECONDS,
        )
        shown = drawn(folded, self.options.drawn, self.options.steps)
        return {
            "network": name,
            "segments": 0 if plan is None else len(plan.segments),
            "speedup": timed.models[1].speedup,
            "loss_before": first.loss,
            "loss": last.loss,
            "distance": distance(self.features.moments(shown), self.real),
            "folding_error": found.folding.error,
            "seconds": seconds,
        }


def report(rows: list[dict[str, Any]], floor: float, command: str) -> None:
    """Write what there is so far."""
    columns = ["network", "segments", "speedup", "loss before training", "after", "distance",
               "folding error"]  # fmt: skip
    shown = [
        [
            row["network"],
            str(row["segments"]),
            f"{row['speedup']:.2f}x",
            f"{row['loss_before']:.4f}",
            f"{row['loss']:.4f}",
            f"{row['distance']:.1f}",
            f"{row['folding_error']:.0e}",
        ]
        for row in rows
    ]
    body = common.markdown(columns, shown)
    body += (
        "\n\nThe loss is the mean squared error of the noise, over its "
        "variance, on test pictures. The distance of other real pictures: "
        f"{floor:.1f}."
    )
    title = "A denoising network made faster: loss and sample quality"
    common.write("denoising", title, command, body, {"rows": rows})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--speedups", type=float, nargs="+", default=(1.2, 1.4, 1.6))
    parser.add_argument("--pictures", type=int, default=3_000, help="to train on")
    parser.add_argument("--judged", type=int, default=500)
    parser.add_argument("--drawn", type=int, default=500, help="samples for the distance")
    parser.add_argument("--steps", type=int, default=25, help="of drawing a sample")
    parser.add_argument("--first", type=int, default=6, help="epochs from first weights")
    parser.add_argument("--epochs", type=int, default=2, help="of every training after that")
    parser.add_argument("--scored", type=int, default=200, help="pictures of a row of importance")
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--folder", type=Path, default=common.ROOT / "build" / "denoising")
    parser.add_argument("--again", action="store_true", help="forget what was measured before")
    options = parser.parse_args()
    command = common.command_line(COMMAND, parser, options, ("folder", "again"))
    path = common.RESULTS / "denoising.json"
    rows: list[dict[str, Any]] = []
    if path.exists() and not options.again:
        known = json.loads(path.read_text())
        rows = known["rows"] if known["command"] == command else []
    bench = Bench(options)
    others = bench.features.moments(pictures("train", options.drawn))
    floor = distance(others, bench.real)
    plans: list[tuple[str, float | None]] = [("trained further", None)]
    plans += [(f"{speedup:g}x", speedup) for speedup in options.speedups]
    for name, speedup in plans:
        if any(row["network"] == name for row in rows):
            continue
        try:
            plan = None if speedup is None else bench.plan(speedup)
        except BudgetError as error:
            print(f"{name}: {error}")
            continue
        rows.append(bench.row(name, plan))
        print(rows[-1], flush=True)
        report(rows, floor, command)


if __name__ == "__main__":
    main()

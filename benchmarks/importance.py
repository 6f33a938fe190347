"""Importance tables of a MobileNetV2 for 32x32: by fine-tuning, by regression, and without data.

The network is trained on CIFAR-10 for a few minutes. Then every row of LayerMerge's table is
measured by training the changed network for a while (`score --method finetune`), fitted
replacements by what they do to the outputs (`score`), and both are compared by rank.

    python benchmarks/importance.py --folder work     # all; goes on from `work` where interrupted
    python benchmarks/importance.py --estimate 12     # a few rows, and how long all would take

Sized for two cores: the table of all rows takes less than an hour there.
"""

import argparse
import itertools
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common  # finds the example networks
import numpy as np
import shared_data
import torch
from layers import Classifier, ConvBn, InvertedResidual, make_divisible
from scipy import stats
from torch import Tensor, nn

import graphfold
from graphfold.calibration.capture import cores
from graphfold.calibration.dataset import read_dataset
from graphfold.calibration.modules import export
from graphfold.calibration.recipe import Recipe
from graphfold.calibration.score_finetune import FinetuneScore
from graphfold.candidates import find_candidates
from graphfold.graph import Graph
from graphfold.measures import ImportanceRow, ImportanceTable, Row, read_importance
from graphfold.model import Model, load, save
from graphfold.planner import importance_without_data
from graphfold.specs import model_inputs

COMMAND = "python benchmarks/importance.py"
# Expansion, channels, repeats, stride of the first: as for ImageNet; the stem keeps the resolution.
STAGES = (
    *((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2)),
    *((6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)),
)
HEAD = 1280
CLASSES = 10
IMAGES = 10_000
FITTED_ON = 1000


class MobileNetV2(nn.Module):
    """Seventeen inverted residual blocks; images [N, 3, 32, 32]."""

    def __init__(self, width: float) -> None:
        super().__init__()
        channels = make_divisible(32 * width)
        head = make_divisible(HEAD * width)
        self.stem = ConvBn(3, channels, 3, 1)
        blocks: list[nn.Module] = []
        for expansion, base, repeats, stride in STAGES:
            out = make_divisible(base * width)
            for repeat in range(repeats):
                step = stride if repeat == 0 else 1
                blocks.append(
                    InvertedResidual(channels, out, expansion=expansion, kernel=3, stride=step)
                )
                channels = out
        self.blocks = nn.Sequential(*blocks)
        self.head = ConvBn(channels, head, 1)
        self.classifier = Classifier(head, CLASSES, dropout=0.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.head(self.blocks(self.stem(x))))


@dataclass(frozen=True)
class Settings:
    """How much is done."""

    width: float
    subset: int
    epochs: int
    batch_size: int
    learning_rate: float
    training_epochs: int
    jobs: int

    @property
    def trial(self) -> dict[str, Any]:
        """Of each changed network."""
        return {
            "subset": self.subset,
            "epochs": self.epochs,
            "batch_size": self.batch_size,
            "learning_rate": self.learning_rate,
        }


def images(folder: Path) -> Path:
    """CIFAR-10's first training images and their labels, as a file of arrays."""
    path = folder / "train.npz"
    if not path.exists():
        found = list(itertools.islice(shared_data.cifar10_train(), IMAGES))
        pixels = np.concatenate([sample["input"].reshape(1, 3, 32, 32) for sample in found])
        np.savez(path, input=pixels, labels=np.concatenate([sample["labels"] for sample in found]))
    return path


def original(folder: Path, data: Path, settings: Settings) -> Model:
    """The network, trained; from the folder where it is known."""
    path = folder / f"mobilenet_v2_{settings.width:g}.onnx"
    if not path.exists():
        torch.manual_seed(0)
        net = MobileNetV2(settings.width).eval()
        example = torch.zeros(2, 3, 32, 32)
        made = export(net, example)
        recipe = Recipe(epochs=settings.training_epochs, batch_size=128, learning_rate=0.2)
        began = time.perf_counter()
        done = graphfold.finetune(made, dataset(data, made), recipe=recipe, alpha=0.0)
        save(done.result.reference, path)
        held_out = done.trained.last.held_out
        print(f"trained in {time.perf_counter() - began:.0f} s: {held_out}")
    return load(path)


def dataset(data: Path, model: Model, limit: int | None = None) -> Any:
    return read_dataset(str(data), model_inputs(model), None, limit)


def estimate(model: Model, data: Path, settings: Settings, count: int) -> str:
    """Time some rows, spread over the table, in this process."""
    from graphfold.calibration import score_finetune, trial_training, trials
    from graphfold.cuts import cut_layout

    candidates = find_candidates(Graph(model))
    listed = trials.find_trials(candidates, cut_layout(candidates), "layermerge")
    chosen = [listed[round(at)] for at in np.linspace(0, len(listed) - 1, count)]
    sizes = score_finetune.Sizes(settings.subset, settings.epochs, settings.batch_size)
    work = score_finetune.make_work(
        model, dataset(data, model), sizes, settings.learning_rate, 0.0, 0, None
    )
    seconds = []
    for trial in chosen:
        began = time.process_time()
        _, outcome = trial_training.run_trial(work, trial)
        seconds.append(time.process_time() - began)
        print(f"{seconds[-1]:6.1f} s  {outcome.held_out}  {trial.row}")
    mean = float(np.mean(seconds))
    hours = mean * len(listed) / settings.jobs / 3600
    return (
        f"{len(listed)} rows, {mean:.1f} s of a core for each: {60 * hours:.0f} minutes with "
        f"{settings.jobs} processes"
    )


def finetuned(
    folder: Path, model: Model, data: Path, settings: Settings
) -> tuple[ImportanceTable, float]:
    """The table by fine-tuning, and the seconds that it took, continued runs included."""
    path, spent = folder / "finetune.json", folder / "finetune.seconds"
    before = float(spent.read_text()) if spent.exists() else 0.0
    if path.exists():
        return read_importance(path), before
    began = time.perf_counter()

    def tell(stage: str, done: int, total: int) -> None:
        seconds = time.perf_counter() - began
        spent.write_text(f"{before + seconds}")
        if total and done % 20 == 0:
            print(f"{stage}: {done} of {total}, {seconds:.0f} s", flush=True)

    found = graphfold.score(
        model,
        dataset(data, model),
        path,
        method="finetune",
        jobs=settings.jobs,
        progress=tell,
        **settings.trial,
    )
    assert isinstance(found, FinetuneScore)
    print(f"the original: {found.original}; {found.left_out} left out, {found.diverged} diverged")
    return found.table, before + time.perf_counter() - began


def regressed(folder: Path, model: Model, data: Path) -> tuple[ImportanceTable, float]:
    """The table of fitted replacements, and the seconds that it took."""
    began = time.perf_counter()
    found = graphfold.score(model, dataset(data, model, FITTED_ON), folder / "regress.json")
    return found.table, time.perf_counter() - began


def shared_values(
    one: Sequence[ImportanceRow], other: Sequence[ImportanceRow]
) -> tuple[list[float], list[float]]:
    """Values of the rows that both tables have."""
    known = {_key(row): row.value for row in other if not row.unchanged}
    pairs = [(row.value, known[_key(row)]) for row in one if _key(row) in known]
    return [pair[0] for pair in pairs], [pair[1] for pair in pairs]


def _key(row: Row) -> tuple[Any, ...]:
    """A segment and its convolution; a pointwise one is dense, of kernel 1."""
    family = "dense" if row.family == "pointwise" else row.family
    return row.input, row.output, row.kernel, family


def compare(
    model: Model, tables: dict[str, tuple[ImportanceTable, float]], settings: Settings
) -> tuple[str, dict[str, Any]]:
    """Rank correlations with the table by fine-tuning, and what each table cost."""
    (first, spent), *_ = tables.values()
    candidates = find_candidates(Graph(model))
    others = {name: found for name, found in tables.items() if found[0] is not first}
    for kind in ("macs", "l1"):
        others[f"without data, {kind}"] = importance_without_data(candidates, kind), 0.0
    count = sum(not row.unchanged for row in first.rows)
    rows = [["by fine-tuning", str(count), f"{spent / 60:.1f} min", "", ""]]
    results: dict[str, Any] = {"finetune": {"rows": count, "seconds": spent}}
    for name, (table, seconds) in others.items():
        pair = shared_values(first.rows, table.rows)
        rank = float(stats.spearmanr(*pair).statistic)
        cost = f"{seconds / 60:.1f} min" if seconds else ""
        rows.append([name, str(len(table.rows)), cost, str(len(pair[0])), f"{rank:.3f}"])
        results[name] = {
            "rows": len(table.rows),
            "seconds": seconds,
            "shared": len(pair[0]),
            "spearman": rank,
        }
    columns = ["importance", "rows", "time", "rows in common", "rank correlation"]
    body = common.markdown(columns, rows)
    note = (
        f"\n\nWidth {settings.width:g}, {settings.epochs} times {settings.subset} samples in "
        f"batches of {settings.batch_size}, {settings.jobs} processes. Rank correlation: "
        "Spearman's, of the rows in common with the first table."
    )
    return body + note, results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, help="keeps what was made; default: a new one")
    parser.add_argument("--estimate", type=int, metavar="N", help="only time N rows")
    parser.add_argument("--width", type=float, default=1.0)
    parser.add_argument("--subset", type=int, default=512)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=0.1)
    parser.add_argument("--training-epochs", type=int, default=6)
    parser.add_argument("--jobs", type=int, default=cores())
    options = parser.parse_args()
    given = dict(vars(options))
    folder, count = given.pop("folder"), given.pop("estimate")
    settings = Settings(**given)
    with tempfile.TemporaryDirectory() as temporary:
        folder = folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        data = images(folder)
        model = original(folder, data, settings)
        if count:
            print(estimate(model, data, settings, count))
            return
        tables = {
            "by fine-tuning": finetuned(folder, model, data, settings),
            "by regression": regressed(folder, model, data),
        }
        body, results = compare(model, tables, settings)
    title = "Importance tables of a MobileNetV2 for 32x32"
    command = common.command_line(COMMAND, parser, options, ("folder", "estimate"))
    common.write("importance", title, command, body, {"settings": vars(settings), **results})


if __name__ == "__main__":
    main()

"""Importance by fine-tuning: each change alone, after a few steps of training (LayerMerge, eq. 4).

    I[i, j, k] = exp(accuracy of the changed network, trained for a while - the original's)

Training sees one small part of the data, and accuracy is measured on another part of the same size.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np

from graphfold import __version__
from graphfold.calibration.capture import cores
from graphfold.calibration.journal import Journal
from graphfold.calibration.recipe import Recipe
from graphfold.calibration.spread import check_executor, spread
from graphfold.calibration.trials import Scheme, Trial, find_trials
from graphfold.candidates import Candidates, find_candidates
from graphfold.cuts import cut_layout
from graphfold.errors import DataError, GraphfoldError, UsageError
from graphfold.graph import Graph
from graphfold.identity import model_reference
from graphfold.measures import ImportanceHeader, ImportanceRow, ImportanceTable, write_table
from graphfold.model import digest, to_proto
from graphfold.progress import Progress, no_progress
from graphfold.published_segments import check_score, join_rows
from graphfold.published_tables import Score as Value
from graphfold.tables import Table, make_table

if TYPE_CHECKING:
    from graphfold.calibration.dataset import Dataset
    from graphfold.calibration.objective import Evaluation
    from graphfold.calibration.trial_training import Outcome, Work
    from graphfold.model import Model


# LayerMerge, appendix C: of ImageNet 4 % to train on and as many to judge on, once through; of
# CIFAR-10 1 % each, 50 times through. Both are about 200 steps.
_MANY_SAMPLES = 500_000
_SHARE_OF_MANY, _SHARE_OF_FEW = 0.04, 0.01
_LEAST_SUBSET = 500
_EPOCHS_OF_MANY, _EPOCHS_OF_FEW = 1, 50
_BATCH_OF_MANY, _BATCH_OF_FEW = 256, 128
_FEWEST = 16
_SHOWN = 12
_ORIGINAL = Trial(None)


@dataclass(frozen=True)
class FinetuneScore:
    """An importance table, and what is to be said about it.

    Attributes:
        table: a row for every change that could be made.
        scheme: whose choices.
        value: what importances are.
        recipe: of the training.
        original: how the original does on the held-out samples.
        trained_on, judged_on: numbers of samples.
        continued: networks that an interrupted run had trained before.
        left_out: changes that cannot be folded.
        diverged: networks whose numbers ended.
    """

    table: ImportanceTable
    scheme: Scheme
    value: Value
    recipe: Recipe
    original: Evaluation
    trained_on: int
    judged_on: int
    continued: int
    left_out: int
    diverged: int

    def to_json(self) -> dict[str, Any]:
        """The JSON document of `score --method finetune --json`."""
        return {
            "header": self.table.header.model_dump(mode="json", exclude_none=True),
            "scheme": self.scheme,
            "value": self.value,
            "rows": len(self.table.rows),
            "no_change": self.table.no_change,
            "recipe": self.recipe.to_json(),
            "original": self.original.to_json(),
            "trained_on": self.trained_on,
            "judged_on": self.judged_on,
            "continued": self.continued,
            "left_out": self.left_out,
            "diverged": self.diverged,
        }

    def tables(self) -> list[Table]:
        """For people: what was done, and the changes that the network bears best."""
        steps = f"{self.recipe.epochs} times {self.trained_on} samples"
        rows: list[tuple[str, str | None]] = [
            ("rows", str(len(self.table.rows))),
            ("scheme", self.scheme),
            ("each trained on", steps),
            ("other samples, judged on", str(self.judged_on)),
            ("accuracy of the original", _percent(self.original.accuracy)),
            ("its loss", f"{self.original.loss:.4g}"),
            ("left out, cannot be folded", str(self.left_out)),
            ("diverged", str(self.diverged)),
        ]
        best = sorted(
            (row for row in self.table.rows if not row.unchanged), key=lambda row: -row.value
        )
        shown = [
            (row.output, _became(row), f"{row.value:.4g}", _percent(_share(row)))
            for row in best[:_SHOWN]
        ]
        columns = ("ends at", "becomes", f"importance ({self.value})", "accuracy")
        return [
            make_table("Importance table", ("", ""), rows),
            make_table("Least damage", columns, shown),
        ]


def score_by_finetuning(
    model: Model,
    data: Dataset,
    output: Path | None = None,
    *,
    scheme: str = "layermerge",
    value: str | None = None,
    subset: int | None = None,
    epochs: int | None = None,
    batch_size: int | None = None,
    learning_rate: float = 0.1,
    alpha: float = 0.0,
    seed: int = 0,
    compat: bool = False,
    jobs: int | None = None,
    executor: str | None = None,
    device: str | None = None,
    progress: Progress | None = None,
) -> FinetuneScore:
    """Measure the importance table of a model by training each changed network for a while.

    Args:
        model: in float32, with its normalisations; it is not modified.
        data: samples to train and to judge on. Without labels, the original is the teacher and
            what counts is how often its class is found.
        output: where to write the table; beside it lies a journal (`.partial`) until it is
            complete, from which an interrupted run continues. None writes nothing.
        scheme: `layermerge`, `depth` or `layer-only`: the rows that the planner's method of that
            name chooses among.
        value: `accuracy`, its change in points; `exp-accuracy`, exp(change / 100); `exp-loss`,
            exp(-change / the original's). By default what the scheme's paper uses.
        subset: samples to train on, and as many others to judge on; by default 4 % of a large
            data set, else 1 % but no fewer than 500, and never more than half.
        epochs: times that they are seen; by default once of a large data set, else 50 times.
        batch_size: samples in a step; by default 256 of a large data set, else 128.
        learning_rate: at its highest, of a batch of 256; see `recipe.Recipe`.
        alpha: the original's part of the loss where there are labels.
        seed: of the choice of samples, and with each row's name of its training.
        compat: train layers that stay anew from random weights, as the published codes do.
        jobs: processes; by default one for each core, or one with a GPU. The table is the same
            for any number.
        executor: `dask://host:port` of a cluster that does the work instead.
        device: where to compute; by default a GPU if torch has one.
        progress: called with (stage, done, total).

    Raises:
        UsageError: nothing to score, wrong options, or a journal of another run.
        DataError: too few samples, or none that fit. BridgeError, ModelError: the network does
            not run in torch, or is not float32. OutputError: something cannot be written.
    """
    check_executor(executor)
    chosen = _scheme(scheme, compat)
    kind = None if value is None else check_score(value)
    report = progress or no_progress
    report("reading data", 0, 0)
    sizes = Sizes(subset, epochs, batch_size)
    report("looking for candidates", 0, 0)
    candidates = find_candidates(Graph(model))
    found = find_trials(candidates, cut_layout(candidates), chosen, compat=compat)
    if not found:
        raise UsageError(
            "the model has no convolution that may go by itself", hint="--scheme layermerge"
        )
    work = make_work(model, data, sizes, learning_rate, alpha, seed, device)
    header = ImportanceHeader(
        created_by=f"graphfold {__version__}",
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        model=model_reference(model),
        method="finetune",
        data=data.name,
    )
    path = None if output is None else output.with_name(f"{output.name}.partial")
    about = {
        "graphfold_score_finetune": 1,
        **header.model_dump(mode="json", exclude={"created": True, "model": {"name"}}),
        "scheme": chosen,
        "compat": compat,
        "work": work.key,
    }
    with Journal(path, about) as journal:
        continued = len(journal.entries)
        outcomes = _outcomes(work, found, journal, jobs or _jobs(device), executor, report)
        figures = _Figures(outcomes, kind or _usual(chosen, outcomes))
        table = _table(candidates, header, found, figures)
        if output is not None:
            write_table(table, output)
        journal.remove()
    return FinetuneScore(
        table,
        chosen,
        figures.kind,
        work.recipe,
        figures.original,
        len(work.train),
        len(work.held_out),
        continued,
        sum(each.held_out is None and not each.diverged for each in outcomes.values()),
        sum(each.diverged for each in outcomes.values()),
    )


def _scheme(given: str, compat: bool) -> Scheme:
    for known in get_args(Scheme):
        if given == known:
            if compat and given == "layer-only":
                raise UsageError(
                    "--compat is about layers that stay, and layer-only measures none",
                    hint="leave it out",
                )
            return known  # type: ignore[no-any-return]
    raise UsageError(f"--scheme {given!r} is not known", hint="layermerge, depth or layer-only")


def _jobs(device: str | None) -> int:
    import torch

    return 1 if (device or "cuda") != "cpu" and torch.cuda.is_available() else cores()


# --- samples ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sizes:
    """How much is trained, where it was said; else as in the papers."""

    subset: int | None
    epochs: int | None
    batch_size: int | None

    def count(self, samples: int) -> int:
        """Samples to train on, and as many to judge on.

        Raises:
            DataError: there are too few.
        """
        share = _SHARE_OF_MANY if samples >= _MANY_SAMPLES else _SHARE_OF_FEW
        usual = min(max(round(share * samples), _LEAST_SUBSET), samples // 2)
        wanted = self.subset or usual
        if wanted < _FEWEST or 2 * wanted > samples:
            raise DataError(
                f"{samples} samples are too few to train on {max(wanted, _FEWEST)} and to judge "
                "on as many others",
                hint="give more of them, or a smaller --subset",
            )
        return wanted

    def recipe(self, samples: int, learning_rate: float, seed: int) -> Recipe:
        """SGD as in the papers' codes, without augmentation."""
        many = samples >= _MANY_SAMPLES
        return Recipe(
            epochs=self.epochs or (_EPOCHS_OF_MANY if many else _EPOCHS_OF_FEW),
            batch_size=self.batch_size or (_BATCH_OF_MANY if many else _BATCH_OF_FEW),
            learning_rate=learning_rate,
            weight_decay=1e-5,
            augment=False,
            seed=seed,
        )


def make_work(
    model: Model,
    data: Dataset,
    sizes: Sizes,
    learning_rate: float,
    alpha: float,
    seed: int,
    device: str | None,
) -> Work:
    """The samples of all trials, drawn by the seed, and how they are trained.

    Raises:
        as `score_by_finetuning`.
    """
    from graphfold.calibration.samples import Samples
    from graphfold.calibration.trial_training import Part, Work, check_work

    samples = Samples.of_dataset(data)
    count = sizes.count(len(samples))
    recipe = sizes.recipe(len(samples), learning_rate, seed)
    order = np.random.default_rng(seed).permutation(len(samples)).tolist()
    places = order[:count], order[count : 2 * count]
    train, held_out = (Part.of(samples.subset(sorted(rows))) for rows in places)
    content = to_proto(model).SerializeToString(deterministic=True)
    stated = [recipe.to_json(), alpha, device, [samples.fixed, digest(model)]]
    key = hashlib.sha256(repr(stated).encode())
    for part in (train, held_out):
        for array in (*part.arrays.values(), *([] if part.labels is None else [part.labels])):
            key.update(np.ascontiguousarray(array).data)
    work = Work(
        key.hexdigest(),
        np.frombuffer(content, np.uint8),
        train,
        held_out,
        samples.fixed,
        recipe,
        alpha,
        device,
    )
    check_work(work)
    return work


# --- trials and rows --------------------------------------------------------------------------


def _outcomes(
    work: Work,
    found: Sequence[Trial],
    journal: Journal,
    jobs: int,
    executor: str | None,
    progress: Progress,
) -> dict[str, Outcome]:
    """What came of the original and of each trial, by name; all of it is in the journal."""
    from graphfold.calibration.trial_training import Outcome, forget, run_trial

    measured = [_ORIGINAL, *(trial for trial in found if not trial.is_no_change)]
    missing = [trial for trial in measured if trial.name not in journal.entries]
    stage = "training changed networks"
    progress(stage, len(journal.entries), len(measured))
    try:
        for name, outcome in spread(run_trial, work, missing, jobs=jobs, executor=executor):
            if outcome.failure is not None:
                raise GraphfoldError(outcome.failure)
            journal.add({name: outcome.to_json()})
            progress(stage, len(journal.entries), len(measured))
    finally:
        forget()
    return {trial.name: Outcome.from_json(journal.entries[trial.name]) for trial in measured}


def _usual(scheme: Scheme, outcomes: Mapping[str, Outcome]) -> Value:
    """What the scheme's paper uses; for outputs that are no classes, their loss."""
    original = outcomes[_ORIGINAL.name].held_out
    if original is not None and _hits(original) is None:
        return "exp-loss"
    return "accuracy" if scheme == "depth" else "exp-accuracy"


def _hits(found: Evaluation) -> float | None:
    """Share of samples with the labelled class, or without labels with the original's."""
    return found.agreement if found.accuracy is None else found.accuracy


class _Figures:
    """From evaluations to importances."""

    def __init__(self, outcomes: Mapping[str, Outcome], value: Value) -> None:
        original = outcomes[_ORIGINAL.name].held_out
        if original is None:
            raise DataError("the model's own outputs on these samples are no numbers")
        if value != "exp-loss" and _hits(original) is None:
            raise UsageError("the outputs are no classes", hint="--value exp-loss")
        self.kind = value
        self.original = original
        self._outcomes = outcomes
        # The teacher's own loss is 0: losses of such answers are in units of their own.
        self._scale = original.loss if original.accuracy is not None else 1.0

    @property
    def no_change(self) -> float:
        """What a step is worth that stays."""
        return 0.0 if self.kind == "accuracy" else 1.0

    def row(self, trial: Trial) -> ImportanceRow | None:
        """A row of the table; None where the network cannot be made."""
        assert trial.row is not None
        fields = trial.row.model_dump(exclude_defaults=True)
        if trial.is_no_change:
            return ImportanceRow(**fields, value=self.no_change)
        outcome = self._outcomes[trial.name]
        found = outcome.held_out
        if found is None:
            return ImportanceRow(**fields, value=self._value(None)) if outcome.diverged else None
        return ImportanceRow(
            **fields,
            value=self._value(found),
            accuracy=found.accuracy,
            agreement=found.agreement,
        )

    def _value(self, found: Evaluation | None) -> float:
        if self.kind == "exp-loss":
            if found is None:
                return 0.0
            return math.exp((self.original.loss - found.loss) / max(self._scale, 1e-12))
        hits = 0.0 if found is None else _hits(found)
        change = (hits or 0.0) - (_hits(self.original) or 0.0)
        return 100 * change if self.kind == "accuracy" else math.exp(change)


def _table(
    candidates: Candidates, header: ImportanceHeader, found: Sequence[Trial], figures: _Figures
) -> ImportanceTable:
    rows = [row for trial in found if (row := figures.row(trial)) is not None]
    pairs = {(row.input, row.output) for row in rows if row.unchanged}
    if figures.no_change:
        rows += join_rows(candidates, pairs)
    return ImportanceTable(header=header, no_change=figures.no_change, rows=tuple(rows))


def _percent(share: float | None) -> str | None:
    return None if share is None else f"{100 * share:.1f} %"


def _share(row: ImportanceRow) -> float | None:
    return row.agreement if row.accuracy is None else row.accuracy


def _became(row: ImportanceRow) -> str:
    if row.family == "identity":
        return "dropped"
    size = "x".join(map(str, row.kernel or ()))
    gone = len(row.removed_convs or ())
    return f"{row.family} {size}" + (f", {gone} dropped" if gone else "")

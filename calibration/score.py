"""Importance by measured damage: every change alone in the network, judged on unseen inputs.

Every alternative is fitted on most of the calibration inputs and put into the losslessly folded
network alone. What it does to the outputs is measured on the rest of them; only what lies behind
the change is run again. Importance is minus the damage, so no change is worth 0.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graphfold import __version__
from graphfold.calibration.context import Context
from graphfold.calibration.families import (
    FAMILIES,
    MOST_CONVS,
    Alternative,
    Alternatives,
    largest_kernels,
)
from graphfold.calibration.journal import Journal
from graphfold.calibration.judge import Verdict
from graphfold.calibration.places import Key
from graphfold.calibration.snippets import Snippets, amounts
from graphfold.calibration.split import Split, one_sample, read_split, samples_of
from graphfold.calibration.workbench import Workbench, names_of
from graphfold.calibration.workers import Alone, Judges, Workers
from graphfold.candidates import find_candidates
from graphfold.cuts import cut_layout
from graphfold.errors import UsageError
from graphfold.graph import Graph
from graphfold.identity import model_reference
from graphfold.measures import ImportanceHeader, ImportanceRow, ImportanceTable, write_table
from graphfold.plan import Family
from graphfold.progress import Progress, no_progress
from graphfold.sizes import resolved_shapes
from graphfold.tables import Table, make_table

if TYPE_CHECKING:
    from graphfold.calibration.dataset import Dataset
    from graphfold.model import Model

# Networks that are cut, judged and written down together: tensors before them are captured once.
_BATCH = 16
# Of moments that are kept at a time.
_MOST_BYTES = 1 << 30
# Of an infinite PSNR, for JSON has no such number: no error at all.
_LARGEST_PSNR = 999.0
# A network whose outputs are no numbers any more: JSON has no infinity either.
_LARGEST_DAMAGE = 1e9
_SHOWN = 12


@dataclass(frozen=True)
class Score:
    """An importance table, and what is to be said about it.

    Attributes:
        table: a row for every alternative that was fitted.
        judged_on: samples that damage was measured on.
        fitted_on: samples that weights were fitted on.
        continued: rows that an interrupted run had measured before.
        left_out: alternatives that are too large to be fitted.
    """

    table: ImportanceTable
    judged_on: int
    fitted_on: int
    continued: int
    left_out: int

    def to_json(self) -> dict[str, Any]:
        """The JSON document of `score --json`."""
        return {
            "header": self.table.header.model_dump(mode="json", exclude_none=True),
            "rows": len(self.table.rows),
            "families": self._counts(),
            "fitted_on": self.fitted_on,
            "judged_on": self.judged_on,
            "continued": self.continued,
            "left_out": self.left_out,
        }

    def _counts(self) -> dict[str, int]:
        families = [row.family or "" for row in self.table.rows]
        return {name: families.count(name) for name in dict.fromkeys(families)}

    def tables(self) -> list[Table]:
        """For people: what there is, and what costs least in each family."""
        rows = [
            ("rows", str(len(self.table.rows))),
            *((f"of family {name}", str(count)) for name, count in self._counts().items()),
            ("samples that weights were fitted on", str(self.fitted_on)),
            ("other samples, judged on", str(self.judged_on)),
            ("left out, too large to fit", str(self.left_out)),
        ]
        best = sorted(self.table.rows, key=lambda row: -row.value)[:_SHOWN]
        least = [(row.output, _became(row), f"{-row.value:.4g}", _share(row)) for row in best]
        return [
            make_table("Importance table", ("", ""), rows),
            make_table("Least damage", ("ends at", "becomes", "damage", "agreement"), least),
        ]


def _became(row: ImportanceRow) -> str:
    if row.family == "narrow":
        return f"narrow to {row.width}"
    if row.family == "identity":
        return "dropped"
    size = "x".join(map(str, row.kernel or ()))
    return f"{row.family} {size}" + ("" if row.rank is None else f" of rank {row.rank}")


def _share(row: ImportanceRow) -> str | None:
    return None if row.agreement is None else f"{100 * row.agreement:.1f} %"


def score_model(
    model: Model,
    data: Dataset,
    output: Path | None = None,
    *,
    families: Sequence[Family] = FAMILIES,
    longest: int = MOST_CONVS,
    jobs: int = 1,
    threads: int = 0,
    progress: Progress | None = None,
) -> Score:
    """Measure the importance table of a model.

    Args:
        model: the model; it is not modified.
        data: calibration inputs, labelled or not.
        output: where to write the table; beside it lies a journal (`.partial`) until it is
            complete, from which an interrupted run continues. None writes nothing.
        families: what may stand in the places of the network.
        longest: convolutions that a segment may hold.
        jobs: processes that measure damage at a time; the table is the same for any number. Where
            there are several, a program's own file must do nothing when it is imported
            (`if __name__ == "__main__"`).
        threads: of onnxruntime, all processes together; 0 for all cores.
        progress: called with (stage, done, total).

    Raises:
        UsageError: nothing to score, or a journal of another model, data or other settings.
        DataError: too little data, or none that fits.
        RunError: onnxruntime cannot run the model.
        OutputError: the table or its journal cannot be written.
    """
    report = progress or no_progress
    report("reading data", 0, 0)
    split = read_split(data)
    report("looking for candidates", 0, 0)
    bench, found = _alternatives(model, split, families, longest)
    header = ImportanceHeader(
        created_by=f"graphfold {__version__}",
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        model=model_reference(model),
        method="regress",
        data=data.name,
    )
    path = None if output is None else output.with_name(f"{output.name}.partial")
    with Journal(path, _journal_header(header, split, found)) as journal:
        continued = len(journal.entries)
        with _judges(bench, split, jobs, threads) as judges:
            _measure(bench, split, found, journal, judges, threads, report)
        rows = [
            ImportanceRow(**each.row.model_dump(exclude_none=True), **entry)
            for each in found
            if (entry := journal.entries[each.name]) is not None
        ]
        table = ImportanceTable(header=header, no_change=0.0, rows=tuple(rows))
        if output is not None:
            write_table(table, output)
        journal.remove()
    counts = [sum(map(samples_of, feeds)) for feeds in (split.held, split.fitted)]
    return Score(table, counts[0], counts[1], continued, len(found) - len(rows))


def _alternatives(
    model: Model, split: Split, families: Sequence[Family], longest: int
) -> tuple[Workbench, list[Alternative]]:
    from graphfold.optimizer import optimize_model

    bench = Workbench(optimize_model(model, None, verify=False).folded, names_of(model))
    graph = Graph(model)
    candidates = find_candidates(graph)
    cuts = cut_layout(candidates)
    sample = one_sample(split.feeds[0], model)
    shapes = {name: array.shape for name, array in sample.items()}
    snippets = Snippets(
        graph,
        candidates.sites,
        resolved_shapes(graph, shapes),
        amounts(graph, cuts.steps, shapes),
    )
    listed = Alternatives(candidates, cuts, bench, snippets)
    found = list(listed.found(families, longest))
    if not found:
        raise UsageError(
            "the model has nothing of these families to fit: " + ", ".join(families),
            hint="--families names others; sizes of tensors must be fixed, but for the batch",
        )
    return bench, found


def _journal_header(
    header: ImportanceHeader, split: Split, found: Sequence[Alternative]
) -> dict[str, Any]:
    """What must be the same for measurements to be continued; a file's name need not be."""
    stated = header.model_dump(mode="json", exclude={"created": True, "model": {"name"}})
    return {
        "graphfold_score": 1,
        **stated,
        "inputs": split.digest,
        "rows": len(found),
    }


def _judges(
    bench: Workbench, split: Split, jobs: int, threads: int
) -> nullcontext[Alone] | Workers:
    if jobs > 1:
        return Workers(bench, split.held, split.labels, jobs, threads)
    return nullcontext(Alone(Context(bench, split.held, split.labels, threads=threads)))


def _measure(
    bench: Workbench,
    split: Split,
    found: Sequence[Alternative],
    journal: Journal,
    judges: Judges,
    threads: int,
    progress: Progress,
) -> None:
    """Fit and judge what the journal does not hold yet; each batch is in it when it is done."""
    missing = [each for each in found if each.name not in journal.entries]
    if not missing:
        return
    # Of all alternatives, measured before or not: moments must be the same as in one run.
    kernels = largest_kernels(found)
    for group in _groups(bench, missing, kernels):
        narrow = dict.fromkeys(e.key for e in group if e.replacement.family == "narrow")
        segments = {e.key: kernels[e.key] for e in group if e.replacement.kernel is not None}
        bench.collect(
            split.fitted, inner=narrow, segments=segments, threads=threads, progress=progress
        )
        for batch in _batches(group):
            progress("measuring damage", len(journal.entries), len(found))
            _submit(bench, judges, batch, journal)
        bench.forget()
    progress("measuring damage", len(journal.entries), len(found))
    judges.finish()


def _groups(
    bench: Workbench, items: Sequence[Alternative], kernels: Mapping[Key, tuple[int, ...]]
) -> Iterator[list[Alternative]]:
    """Alternatives in order, as many at a time as have moments that memory holds."""
    group: list[Alternative] = []
    size = 0
    known: set[tuple[Key, bool]] = set()
    for each in items:
        place = each.key, each.replacement.family == "narrow"
        if place not in known and each.replacement.family != "identity":
            needed = bench.bytes_of(each.key, None if place[1] else kernels[each.key])
            if group and size + needed > _MOST_BYTES:
                yield group
                group, size, known = [], 0, set()
            known.add(place)
            size += needed
        group.append(each)
    yield group


def _submit(
    bench: Workbench, judges: Judges, batch: Sequence[Alternative], journal: Journal
) -> None:
    """Have a batch measured and its figures written down; None for what is too large to fit."""
    fitted = [each for each in batch if bench.can_fit(each.key, each.replacement)]
    for each in fitted:
        bench.arrays(each.key, each.replacement)
    # Fits are forgotten before the last of them are judged.
    errors = [bench.errors.get((each.key, each.replacement)) for each in fitted]

    def done(verdicts: Sequence[Verdict]) -> None:
        entries: dict[str, Any] = dict.fromkeys(each.name for each in batch)
        for each, verdict, error in zip(fitted, verdicts, errors, strict=True):
            entries[each.name] = _entry(verdict, error)
        journal.add(entries)

    judges.submit([(each.key, each.replacement) for each in fitted], done)


def _batches(items: Sequence[Alternative]) -> Iterator[Sequence[Alternative]]:
    for start in range(0, len(items), _BATCH):
        yield items[start : start + _BATCH]


def _entry(verdict: Verdict, unexplained: float | None) -> Mapping[str, Any]:
    """The figures of a row."""
    fields = {
        "value": -min(verdict.damage, _LARGEST_DAMAGE),
        "agreement": verdict.agreement,
        "worst_agreement": verdict.worst_agreement,
        "accuracy": verdict.accuracy,
        "psnr": None if verdict.psnr is None else min(verdict.psnr, _LARGEST_PSNR),
        "unexplained": unexplained,
    }
    return {
        name: value for name, value in fields.items() if value is not None and math.isfinite(value)
    }

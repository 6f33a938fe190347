"""Published importance tables for a model at hand: positions become its tensors.

The published codes number a network's convolutions without projection shortcuts, from the stem (0)
or, where the whole network is planned, from 1; a segment (st, end) holds those numbered st + 1 to
end. Which of a model's segments that is, is found on its graph, so that a table's rows get the keys
that a latency table of the same model has.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from graphfold import __version__
from graphfold.candidates import Candidate, Candidates, find_candidates
from graphfold.choices import Choice
from graphfold.cuts import choice_row, cut_layout
from graphfold.errors import UsageError
from graphfold.graph import Graph
from graphfold.measures import ImportanceHeader, ImportanceRow, ImportanceTable
from graphfold.model import digest
from graphfold.plan import ModelReference, nearest
from graphfold.published_tables import (
    Names,
    Score,
    layer_merge_form,
    read_importance_csv,
    spans,
)
from graphfold.segments import main_path_convs
from graphfold.tables import Table, make_table

if TYPE_CHECKING:
    from graphfold.model import Model

Span = tuple[int, int]
SCORES: tuple[str, ...] = get_args(Score)
# Which number the first convolution has: the papers leave the stem out, or plan everything.
_FIRST_NUMBERS = (0, 1)


@dataclass(frozen=True)
class Imported:
    """An importance table made of a published one.

    Attributes:
        table: ours.
        source: the file it was made of.
        score: what its values are.
        first: the number that the model's first convolution has there; None without a model.
        covered: of the model's segments, how many have a row, and how many there are.
    """

    table: ImportanceTable
    source: str
    score: Score
    first: int | None = None
    covered: tuple[int, int] | None = None

    def to_json(self) -> dict[str, Any]:
        """The JSON document of `score --import --json`."""
        return {
            "header": self.table.header.model_dump(mode="json", exclude_none=True),
            "source": self.source,
            "score": self.score,
            "rows": len(self.table.rows),
            "no_change": self.table.no_change,
            "first_convolution": self.first,
            "segments": None
            if self.covered is None
            else {"with_rows": self.covered[0], "of_model": self.covered[1]},
        }

    def tables(self) -> list[Table]:
        """What was imported, in figures for people."""
        values = [row.value for row in self.table.rows]
        rows: list[tuple[str, str]] = [
            ("rows", str(len(values))),
            ("values", f"{self.score}, from {min(values):.4g} to {max(values):.4g}"),
            ("importance of a step without a row", f"{self.table.no_change:g}"),
        ]
        if self.covered is not None:
            rows += [
                ("number of the model's first convolution there", str(self.first)),
                ("segments of the model with rows", "{} of {}".format(*self.covered)),
            ]
        return [make_table("Importance table", ("", ""), rows)]


def import_importance(
    path: str | Path,
    model: Model | None = None,
    *,
    baseline: float,
    score: str | None = None,
) -> Imported:
    """Read a published importance table, for a model where one is given.

    Args:
        path: the CSV file, in one of the forms of `graphfold.published_tables`.
        model: whose tensors the rows are to name; without one they name positions.
        baseline: the unchanged network's figure: accuracy in percent, or loss; 0 for a file that
            holds differences.
        score: see `graphfold.published_tables.read_importance_csv`; by default what the published
            codes use: accuracy, or exp-accuracy in LayerMerge's form.

    Raises:
        MeasuresError: the file is no such table, or not one of this model; all problems at once.
        UsageError: an unknown score.
    """
    if score is None:
        score = "exp-accuracy" if layer_merge_form(path) else "accuracy"
    chosen: Score = check_score(score)
    no_change = 0.0 if chosen == "accuracy" else 1.0
    header = ImportanceHeader(created_by=f"graphfold {__version__}", method=f"import {chosen}")
    if model is None:
        table = read_importance_csv(path, baseline=baseline, score=chosen, header=header)
        table = table.model_copy(update={"no_change": no_change})
        return Imported(table, str(path), chosen)
    candidates = find_candidates(Graph(model))
    names = _names(candidates, spans(path))
    reference = ModelReference(
        name=None if model.path is None else model.path.name,
        sha256=digest(model if model.path is None else model.path),
    )
    table = read_importance_csv(
        path,
        baseline=baseline,
        score=chosen,
        names=names,
        header=header.model_copy(update={"model": reference}),
    )
    pairs = {(row.input, row.output) for row in table.rows}
    rows = (*table.rows, *(join_rows(candidates, pairs) if no_change else ()))
    table = table.model_copy(update={"no_change": no_change, "rows": rows})
    return Imported(table, str(path), chosen, names.first, (len(pairs), len(names.segments)))


def check_score(score: str) -> Score:
    """What importances are, by its name; UsageError where there is no such thing."""
    for known in get_args(Score):
        if score == known:
            return known  # type: ignore[no-any-return]
    near = nearest(score, SCORES) or f"one of {', '.join(SCORES)}"
    raise UsageError(f"the score {score!r} is not known", hint=near)


def join_rows(candidates: Candidates, pairs: set[tuple[str, str]]) -> list[ImportanceRow]:
    """Joins of branches are worth nothing by themselves: the published sums do not count them."""
    rows = [step.row() for step in cut_layout(candidates).steps if step.joins]
    return [
        ImportanceRow(input=row.input, output=row.output, unchanged=True, value=0.0)
        for row in rows
        if (row.input, row.output) not in pairs
    ]


@dataclass(frozen=True)
class ModelNames(Names):
    """Positions and convolutions of a published table, in a model.

    Attributes:
        segments: the model's, by positions.
        first: the number of the first convolution.
    """

    segments: Mapping[Span, Candidate] = field(default_factory=dict)
    first: int = 0

    def conv(self, number: int) -> str:
        """The conv site of this number; ValueError where there is none."""
        return super().conv(number - self.first) if number >= self.first else super().conv(-1)

    def input(self, start: int, end: int) -> str:
        """The tensor that a segment begins at; ValueError where the model has no such segment."""
        found = self.segments.get((start, end))
        if found is None and start < end:
            raise ValueError(self._missing(start, end))
        return "" if found is None else found.input.name or ""

    def output(self, start: int, end: int) -> str:
        """The tensor that it ends at; what is wrong with it, `input` tells."""
        found = self.segments.get((start, end))
        return "" if found is None else found.output.name or ""

    def result(self, start: int, end: int, stated: Mapping[str, Any]) -> Mapping[str, Any]:
        """The fields of the choice that is meant; ValueError where there is none.

        A segment of one convolution that stays is no choice, and nothing is stated of it.
        """
        found = self.segments.get((start, end))
        if found is None:
            return {}
        is_identity = stated.get("family") == "identity"
        if end == start + 1 and not is_identity:
            return {}
        for choice in found.choices:
            if _is_meant(choice, stated):
                row = choice_row(found, choice)
                return {"kernel": row.kernel, "stride": row.stride, "family": row.family}
        known = ", ".join(_described(choice) for choice in found.choices)
        raise ValueError(f"the segment from {start} to {end} becomes {known} in this model")

    def _missing(self, start: int, end: int) -> str:
        ends = sorted(last for first, last in self.segments if first == start)
        if not ends:
            starts = [first for first, _ in self.segments]
            return (
                f"no segment of the model begins at {start}: they begin at {min(starts)} to "
                f"{max(starts)}"
            )
        listed = ", ".join(map(str, ends))
        return f"no segment of the model leads from {start} to {end}: from {start} to {listed}"


def _is_meant(choice: Choice, stated: Mapping[str, Any]) -> bool:
    if stated.get("family") == "identity" or choice.family == "identity":
        return stated.get("family") == choice.family
    depthwise = (stated["family"] == "depthwise") == (choice.family == "depthwise")
    return depthwise and all(size == stated["kernel"][0] for size in choice.kernel)


def _described(choice: Choice) -> str:
    if choice.family == "identity":
        return "the identity (kernel 0)"
    return f"{choice.family} {'x'.join(map(str, choice.kernel))}"


def _names(candidates: Candidates, wanted: set[Span]) -> ModelNames:
    """The model's names, numbered so that most of the table's segments are the model's."""
    numbered = main_path_convs(candidates.graph, candidates.sites)
    convs = [site.name for site in numbered]
    number_of = {site: number for number, site in enumerate(numbered)}
    found: dict[Span, Candidate] = {}
    for candidate in candidates.found:
        inside = sorted(number_of[site] for site in candidate.convs if site in number_of)
        if inside and inside == list(range(inside[0], inside[-1] + 1)):
            found[inside[0] - 1, inside[-1]] = candidate
    if not found:
        raise UsageError("the model has no segments", hint="`graphfold inspect` tells why")
    options = [
        ModelNames(
            convs=convs,
            segments={(start + first, end + first): each for (start, end), each in found.items()},
            first=first,
        )
        for first in _FIRST_NUMBERS
    ]
    return max(options, key=lambda names: len(wanted & names.segments.keys()))

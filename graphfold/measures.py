"""Tables of what segments cost and what they are worth: files that machines exchange.

A latency table is measured on a device, an importance table on data (or on nothing, see
`graphfold.importance`); planning joins them by key. Each row names its segment by tensors of the
model, and what becomes of it. A field that is left out says nothing about it and fits any value:
a row of Kim et al.'s latency table has no kernel, since a segment has only one there.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from graphfold.errors import MeasuresError, Problem
from graphfold.files import atomic_file
from graphfold.plan import Family, ModelReference, TensorName, json_path, nearest

Size = Annotated[int, Field(ge=1)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Milliseconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Header(_Strict):
    """Where a table comes from; informative, except for the model."""

    created_by: str = Field(description="tool and version")
    created: str | None = Field(default=None, description="date, ISO 8601")
    model: ModelReference | None = Field(default=None, description="the model it was made for")


class LatencyHeader(Header):
    """The device and settings that latencies were measured with."""

    device: str | None = Field(default=None, description="the machine, for people")
    processor: str | None = Field(default=None, description="CPU or GPU")
    runtime: str | None = Field(default=None, description="runtime and version")
    provider: str | None = Field(default=None, description="execution provider")
    threads: Size | None = None
    batch: Size | None = None
    dtype: str | None = None
    inputs: dict[str, tuple[int, ...]] | None = Field(
        default=None, description="sizes of the model's inputs"
    )


class ImportanceHeader(Header):
    """How importances were found."""

    method: str | None = Field(default=None, description="regress, finetune, macs, ...")
    data: str | None = Field(default=None, description="the data they were measured on")


class Row(_Strict):
    """A segment and what becomes of it.

    `splits` is no part of the key: it tells where the published tables of optimal times split.
    """

    KEY: ClassVar[tuple[str, ...]] = (
        "kernel",
        "stride",
        "family",
        "weights",
        "width",
        "rank",
        "removed_convs",
        "removed_activations",
        "start_active",
        "end_active",
    )

    input: TensorName = Field(description="tensor that the segment reads")
    output: TensorName = Field(description="tensor that it ends at")
    kernel: tuple[Size, ...] | None = Field(default=None, description="of the result, per axis")
    stride: tuple[Size, ...] | None = Field(default=None, description="of the result, per axis")
    family: Family | None = Field(default=None, description="of the result")
    weights: Literal["merge", "regress"] | None = Field(
        default=None, description="whether the result is merged or fitted on data"
    )
    width: Size | None = Field(default=None, description="inner channels left, for family: narrow")
    rank: Size | None = Field(default=None, description="for family: low_rank")
    removed_convs: tuple[TensorName, ...] | None = Field(
        default=None, description="conv sites inside that are removed"
    )
    removed_activations: tuple[TensorName, ...] | None = Field(
        default=None, description="activation sites inside that are removed"
    )
    start_active: bool | None = Field(
        default=None, description="whether there is an activation at its input"
    )
    end_active: bool | None = Field(
        default=None, description="whether there is an activation at its output"
    )
    unchanged: bool = Field(default=False, description="the model as it is between the two")

    @property
    def is_fitted(self) -> bool:
        """Whether the result's weights come from data."""
        return self.weights == "regress"

    @property
    def key(self) -> tuple[Any, ...]:
        """What identifies the row in its table."""
        fields = (getattr(self, name) for name in self.KEY)
        return (self.input, self.output, self.unchanged, *fields)

    def common(self, other: Row) -> int | None:
        """The number of key fields that both state alike; None where they contradict."""
        if (self.input, self.output, self.unchanged) != (
            other.input,
            other.output,
            other.unchanged,
        ):
            return None
        alike = 0
        for name in self.KEY:
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine is None or theirs is None:
                continue
            if _comparable(mine) != _comparable(theirs):
                return None
            alike += 1
        return alike

    def __str__(self) -> str:
        stated = {name: getattr(self, name) for name in self.KEY if name in self.model_fields_set}
        details = "".join(f", {name} {_shown(value)}" for name, value in stated.items())
        return f"{self.input!r} to {self.output!r}{details}"


def _comparable(value: Any) -> Any:
    """Names of removed sites are sets; sizes are sequences."""
    names = isinstance(value, tuple) and all(isinstance(item, str) for item in value)
    return frozenset(value) if names else value


def _shown(value: Any) -> str:
    return "x".join(map(str, value)) if isinstance(value, tuple) else str(value)


class LatencyRow(Row):
    """Latency of a segment's replacement, at its real input shape."""

    value: Milliseconds = Field(description="milliseconds per run")
    spread: Milliseconds | None = Field(default=None, description="of the runs, in milliseconds")
    splits: tuple[TensorName, ...] | None = Field(
        default=None, description="tensors at which the fastest way through is split"
    )


class ImportanceRow(Row):
    """What the network is worth with this change alone; greater is better.

    All but `value` is for people: what was measured on inputs that nothing was fitted on.
    """

    value: Finite = Field(description="importance; additive over a network's segments")
    agreement: Finite | None = Field(
        default=None, description="share of samples with the original's class"
    )
    worst_agreement: Finite | None = Field(
        default=None, description="of the class that suffers most"
    )
    accuracy: Finite | None = Field(
        default=None, description="share of samples with the labelled class"
    )
    psnr: Finite | None = Field(
        default=None, description="decibels of the outputs' error, where they are no classes"
    )
    unexplained: Finite | None = Field(
        default=None, description="share of the result's variance that the fit leaves"
    )


class _Table(_Strict):
    graphfold_table: Literal[1] = Field(default=1, description="version of the format")

    @property
    def digest(self) -> str:
        """sha256 of the table's canonical JSON."""
        content = self.model_dump(mode="json", exclude_defaults=True)
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


class LatencyTable(_Table):
    """Latencies of segments on one device."""

    measures: Literal["latency"] = "latency"
    header: LatencyHeader
    rest: Milliseconds = Field(
        default=0.0, description="milliseconds of everything that no row covers"
    )
    rows: tuple[LatencyRow, ...]


class ImportanceTable(_Table):
    """Importances of segments."""

    measures: Literal["importance"] = "importance"
    header: ImportanceHeader
    no_change: Finite | None = Field(
        default=None,
        description="importance of a segment that stays as it is, for those without a row: 0 where "
        "importances are differences, 1 where they are exponentials of them",
    )
    rows: tuple[ImportanceRow, ...]


Table = LatencyTable | ImportanceTable
_Any = TypeVar("_Any", LatencyTable, ImportanceTable)
_EITHER: TypeAdapter[Table] = TypeAdapter(Annotated[Table, Field(discriminator="measures")])


def read_latency(path: str | Path) -> LatencyTable:
    """Read a latency table.

    Raises:
        MeasuresError: the file cannot be read or is no valid table; all problems are listed.
    """
    return _read(Path(path), LatencyTable)


def read_importance(path: str | Path) -> ImportanceTable:
    """Read an importance table; raises as `read_latency` does."""
    return _read(Path(path), ImportanceTable)


def write_table(table: Table, path: str | Path) -> None:
    """Write a table, whole or not at all; fields that say nothing are left out."""
    content = table.model_dump(mode="json", exclude_none=True)
    for row in content["rows"]:
        if not row["unchanged"]:
            del row["unchanged"]
    rows = ",\n".join("  " + json.dumps(row) for row in content.pop("rows"))
    head = json.dumps(content, indent=1).removesuffix("\n}")
    with atomic_file(path) as file:
        file.write(f'{head},\n "rows": [\n{rows}\n ]\n}}\n'.encode())


def _read(path: Path, kind: type[_Any]) -> _Any:
    where = str(path)
    try:
        text = path.read_bytes()
    except OSError as error:
        what = f"cannot be read: {(error.strerror or str(error)).lower()}"
        raise MeasuresError([Problem("table", what)], where=where) from None
    try:
        table = _EITHER.validate_json(text)
    except ValidationError as error:
        raise MeasuresError(_problems(error, kind), where=where) from None
    if not isinstance(table, kind):
        wanted = kind.model_fields["measures"].default
        what = f"is a table of {table.measures}, not of {wanted}"
        raise MeasuresError([Problem("measures", what)], where=where)
    problems = list(repeated_keys(table.rows))
    if "graphfold_table" not in table.model_fields_set:
        problems.insert(0, Problem("graphfold_table", "is required", "the format's version: 1"))
    if problems:
        raise MeasuresError(problems, where=where)
    return table


def _problems(error: ValidationError, kind: type[Table]) -> list[Problem]:
    return [_problem(dict(detail), kind) for detail in error.errors()]


def _problem(detail: dict[str, Any], kind: type[Table]) -> Problem:
    # The discriminator's value comes first in the location of everything below it.
    location = tuple(part for part in detail["loc"] if part not in ("latency", "importance"))
    path, given = json_path(location), detail["input"]
    match detail["type"]:
        case "json_invalid":
            return Problem("table", f"not JSON: {detail['ctx']['error']}")
        case "union_tag_not_found":
            return Problem("measures", "is required", "latency or importance")
        case "union_tag_invalid":
            tag, kinds = str(detail["ctx"]["tag"]), ("latency", "importance")
            meant = nearest(tag, kinds) or "latency or importance"
            return Problem("measures", f"{tag!r} is not valid", meant)
        case "extra_forbidden":
            hint = nearest(str(location[-1]), _fields_at(location, kind))
            return Problem(path, "unknown key", hint)
        case "missing":
            return Problem(path, "is required")
        case "literal_error" if location == ("graphfold_table",):
            return Problem(path, f"version {given!r} is not supported", "this tool reads version 1")
        case "literal_error":
            expected = detail["ctx"]["expected"]
            names = [name.strip(" '") for name in expected.replace(" or ", ", ").split(",")]
            return Problem(
                path, f"{given!r} is not valid", nearest(str(given), names) or f"one of {expected}"
            )
    return Problem(path, f"{detail['msg']}, not {given!r}")


def _fields_at(location: Sequence[str | int], kind: type[Table]) -> list[str]:
    latency = kind is LatencyTable
    if "rows" in location[:-1]:
        return list((LatencyRow if latency else ImportanceRow).model_fields)
    if "model" in location[:-1]:
        return list(ModelReference.model_fields)
    if "header" in location[:-1]:
        return list((LatencyHeader if latency else ImportanceHeader).model_fields)
    return list(kind.model_fields)


def repeated_keys(rows: Iterable[Row]) -> Iterator[Problem]:
    """A problem for every row whose key an earlier one has."""
    first: dict[Any, int] = {}
    for number, row in enumerate(rows):
        earlier = first.setdefault(tuple(map(_comparable, row.key)), number)
        if earlier != number:
            yield Problem(f"rows[{number}]", f"repeats the key of rows[{earlier}]: {row}")


def check_names(table: Table, tensors: Collection[str], *, where: str | None = None) -> None:
    """Check that every tensor a table names is among a model's tensors.

    Raises:
        MeasuresError: unknown names, all of them, each with the nearest valid one.
    """

    @cache
    def hint(name: str) -> str | None:
        return nearest(name, tensors)

    problems = [
        Problem(f"rows[{number}].{field}", f"the model has no tensor {name!r}", hint(name))
        for number, row in enumerate(table.rows)
        for field, name in _names(row)
        if name not in tensors
    ]
    if problems:
        raise MeasuresError(problems, where=where)


def _names(row: Row) -> Iterator[tuple[str, str]]:
    yield "input", row.input
    yield "output", row.output
    for field in ("removed_convs", "removed_activations"):
        for number, name in enumerate(getattr(row, field) or ()):
            yield f"{field}[{number}]", name


# --- joining ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Candidate:
    """A segment's replacement with both its figures.

    Attributes:
        row: the segment and what becomes of it: everything that either table states.
        latency: in milliseconds.
        importance: additive; greater is better.
    """

    row: Row
    latency: float
    importance: float


def join(latencies: LatencyTable, importances: ImportanceTable) -> tuple[Candidate, ...]:
    """Candidates of two tables, by key; the order of rows plays no part.

    Every importance gets the latency whose key has the most in common with its own, and all
    latencies must be used: one table about other segments than the other is an error, not a
    smaller problem. An unchanged segment needs no importance where the table says what no change
    is worth. Candidates come in the order of the importances, unchanged ones without one last.

    Raises:
        MeasuresError: rows that fit none or several alike, models that differ; all of them.
    """
    problems = list(_other_models(latencies.header, importances.header))
    by_ends: defaultdict[tuple[str, str], list[int]] = defaultdict(list)
    for number, row in enumerate(latencies.rows):
        by_ends[row.input, row.output].append(number)
    used: set[int] = set()
    found: list[Candidate] = []
    for number, importance in enumerate(importances.rows):
        ends = importance.input, importance.output
        matches = _best_matches(importance, latencies.rows, by_ends[ends])
        if len(matches) != 1:
            path = f"importance rows[{number}]"
            problems.append(_without_one_match(path, importance, matches))
            continue
        used.add(matches[0])
        found.append(_candidate(latencies.rows[matches[0]], importance))
    for number, latency in enumerate(latencies.rows):
        if number in used:
            continue
        if latency.unchanged and importances.no_change is not None:
            found.append(Candidate(_plain(latency), latency.value, importances.no_change))
        else:
            problems.append(Problem(f"latency rows[{number}]", f"has no importance: {latency}"))
    if problems:
        raise MeasuresError(problems)
    return tuple(found)


def _other_models(first: Header, second: Header) -> Iterator[Problem]:
    digests = {header.model.sha256 for header in (first, second) if header.model is not None}
    if len(digests - {None}) > 1:
        yield Problem("header.model.sha256", "the two tables were made for different models")


def _best_matches(row: Row, rows: Sequence[Row], numbers: Sequence[int]) -> list[int]:
    alike = {number: row.common(rows[number]) for number in numbers}
    best = max((count for count in alike.values() if count is not None), default=math.inf)
    return [number for number, count in alike.items() if count == best]


def _without_one_match(path: str, row: Row, matches: Sequence[int]) -> Problem:
    if not matches:
        return Problem(path, f"has no latency: {row}")
    named = " and ".join(f"rows[{number}]" for number in matches)
    return Problem(path, f"fits latency {named} alike: {row}")


def _candidate(latency: LatencyRow, importance: ImportanceRow) -> Candidate:
    stated = _plain(latency).model_dump(exclude_none=True)
    stated |= _plain(importance).model_dump(exclude_none=True)
    return Candidate(Row(**stated), latency.value, importance.value)


def _plain(row: Row) -> Row:
    return Row(**{name: getattr(row, name) for name in Row.model_fields})

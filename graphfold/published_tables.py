"""Tables of the published codes (Kim et al., LayerMerge) read into ours.

Both count positions: `st` and `end` are the numbers of the convolutions after which a segment
starts and ends, 0 being the stem, and the convolutions inside are those numbered st+1 to end.

    Kim et al., times:        id,st,end,time,stdev[,breaks]
    Kim et al., importances:  id,st,end,st_act,end_act,train_loss,train_acc,val_loss,val_acc
    LayerMerge, times:        id,st,end,ker,str,is_dw,time,stdev
    LayerMerge, importances:  id,st,end,ker,str,is_dw,conv_comb,train_loss,...,val_acc

Columns are found by name and lines by their content; `id` and the order of lines mean nothing.
"""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from graphfold.errors import MeasuresError, Problem, UsageError
from graphfold.measures import (
    ImportanceHeader,
    ImportanceRow,
    ImportanceTable,
    LatencyHeader,
    LatencyRow,
    LatencyTable,
    repeated_keys,
)
from graphfold.plan import nearest

Score = Literal["accuracy", "exp-accuracy", "exp-loss"]
_SCORE_COLUMN = {"accuracy": "val_acc", "exp-accuracy": "val_acc", "exp-loss": "val_loss"}
_SPAN = ("st", "end")
_LAYER_MERGE = ("ker", "str", "is_dw")
_Value = TypeVar("_Value")


@dataclass(frozen=True)
class Names:
    """What positions and convolutions are called in a model.

    Attributes:
        tensors: the cut tensor after each convolution, by its number; without them the numbers
            themselves are the names.
        convs: conv sites by their number; without them as above.
    """

    tensors: Sequence[str] | None = None
    convs: Sequence[str] | None = None

    def tensor(self, position: int) -> str:
        """The cut tensor at a position; ValueError where there is none."""
        return _named(position, self.tensors, "position")

    def input(self, start: int, end: int) -> str:
        """The tensor that the segment between two positions begins at; ValueError as `tensor`."""
        del end
        return self.tensor(start)

    def output(self, start: int, end: int) -> str:
        """The tensor that it ends at; ValueError as `tensor`."""
        del start
        return self.tensor(end)

    def result(self, start: int, end: int, stated: Mapping[str, Any]) -> Mapping[str, Any]:
        """What it becomes, from kernel, stride and family as the table states them."""
        del start, end
        return stated

    def conv(self, number: int) -> str:
        """The conv site of this number; ValueError where there is none."""
        return _named(number, self.convs, "convolution")


def _named(number: int, names: Sequence[str] | None, what: str) -> str:
    if names is None:
        return str(number)
    if not 0 <= number < len(names):
        raise ValueError(f"there is no {what} {number}: the model has {len(names)}")
    return names[number]


def read_latency_csv(
    path: str | Path, *, names: Names | None = None, header: LatencyHeader | None = None
) -> LatencyTable:
    """Read a published table of times.

    Raises:
        MeasuresError: the file cannot be read or is no such table; all problems are listed.
    """
    lines = _Lines(Path(path), [*_SPAN, "time"], ("stdev", "breaks", *_LAYER_MERGE))
    rows: list[LatencyRow] = []
    for line in lines:
        key = _key(line, names or Names())
        value = line.get("time", _not_negative)
        spread = line.get("stdev", _not_negative) if "stdev" in line else None
        breaks = line.get("breaks", _breaks(names or Names())) if "breaks" in line else None
        if not line.problems:
            rows.append(LatencyRow(**key, value=value, spread=spread, splits=breaks))
    lines.finish(rows)
    return LatencyTable(header=header or LatencyHeader(created_by="import"), rows=tuple(rows))


def read_importance_csv(
    path: str | Path,
    *,
    baseline: float,
    score: Score = "accuracy",
    names: Names | None = None,
    header: ImportanceHeader | None = None,
) -> ImportanceTable:
    """Read a published table of importances.

    Args:
        path: the CSV file.
        baseline: the unchanged network's figure in the same unit: accuracy in percent, or loss;
            0 for a file that holds differences.
        score: the accuracy's change in percentage points (Kim et al.), exp(change / 100)
            (LayerMerge on classifiers), or exp(-change of the loss / baseline) (on diffusion).
        names: of positions and convolutions.
        header: of the table.

    Raises:
        MeasuresError: as `read_latency_csv`.
    """
    if score == "exp-loss" and not baseline > 0:
        raise UsageError("exp-loss is relative to the baseline, which must be positive")
    column = _SCORE_COLUMN[score]
    lines = _Lines(Path(path), [*_SPAN, column], ("st_act", "end_act", "conv_comb", *_LAYER_MERGE))
    rows: list[ImportanceRow] = []
    for line in lines:
        key = _key(line, names or Names())
        for given, ours in (("st_act", "start_active"), ("end_act", "end_active")):
            if given in line:
                key[ours] = line.get(given, _flag)
        if "conv_comb" in line:
            key["removed_convs"] = line.get("conv_comb", _removed(line, names or Names()))
        measured = line.get(column, _finite)
        if not line.problems:
            rows.append(ImportanceRow(**key, value=_score(measured, baseline, score)))
    lines.finish(rows)
    return ImportanceTable(
        header=header or ImportanceHeader(created_by="import", method=score), rows=tuple(rows)
    )


def layer_merge_form(path: str | Path) -> bool:
    """Whether a file's columns are those of LayerMerge's tables.

    Raises:
        MeasuresError: the file cannot be read or has none of the columns of a published table.
    """
    return any("ker" in line for line in _Lines(Path(path), _SPAN, _LAYER_MERGE))


def spans(path: str | Path) -> set[tuple[int, int]]:
    """The positions between which a table's segments lie; lines that tell none are left out.

    Raises:
        MeasuresError: as `layer_merge_form`.
    """
    found = {
        (line.get("st", _whole), line.get("end", _whole)) for line in _Lines(Path(path), _SPAN)
    }
    return {span for span in found if None not in span}


def _score(measured: float, baseline: float, score: Score) -> float:
    change = measured - baseline
    if score == "accuracy":
        return change
    return math.exp(change / 100 if score == "exp-accuracy" else -change / baseline)


@dataclass
class _Line:
    """One line of a table, by column; what is wrong with it is collected."""

    number: int
    cells: Mapping[str, str]
    problems: list[Problem] = field(default_factory=list)

    def __contains__(self, column: str) -> bool:
        return column in self.cells

    def get(self, column: str, convert: Callable[[str], _Value]) -> _Value | Any:
        """The cell's value; None, and a problem, where it is none."""
        try:
            return convert(self.cells[column])
        except (ValueError, OverflowError) as error:
            self.problems.append(Problem(f"line {self.number}, {column}", str(error)))
            return None


class _Lines:
    """The lines of a CSV file, and the problems found in them."""

    def __init__(self, path: Path, required: Sequence[str], optional: Sequence[str] = ()) -> None:
        self._where = str(path)
        self._problems: list[Problem] = []
        try:
            with path.open(newline="", encoding="utf-8-sig") as file:
                reader = csv.DictReader(file)
                columns = [name.strip() for name in reader.fieldnames or []]
                reader.fieldnames = columns
                records = [(reader.line_num, record) for record in reader]
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            what = f"cannot be read: {error}"
            raise MeasuresError([Problem("table", what)], where=self._where) from None
        wanted = {*required, *optional}
        unused = [name for name in columns if name not in wanted]
        missing = [name for name in required if name not in columns]
        if 0 < len(set(_LAYER_MERGE) & set(columns)) < len(_LAYER_MERGE):
            missing += [name for name in _LAYER_MERGE if name not in columns]
        if missing:
            problems = [
                Problem("line 1", f"there is no column {name!r}", nearest(name, unused))
                for name in missing
            ]
            raise MeasuresError(problems, where=self._where)
        self._lines = [self._line(number, record, wanted) for number, record in records]

    def _line(self, number: int, record: Mapping[Any, Any], wanted: set[str]) -> _Line:
        cells = {name: value or "" for name, value in record.items() if name in wanted}
        return _Line(number, {name: value.strip() for name, value in cells.items()})

    def __iter__(self) -> Iterator[_Line]:
        return iter(self._lines)

    def finish(self, rows: Sequence[LatencyRow] | Sequence[ImportanceRow]) -> None:
        problems = [problem for line in self._lines for problem in line.problems]
        if not self._lines:
            problems.append(Problem("table", "has no lines"))
        if not problems:
            problems = list(repeated_keys(rows))
        if problems:
            raise MeasuresError(problems, where=self._where)


def _key(line: _Line, names: Names) -> dict[str, Any]:
    start, end = line.get("st", _whole), line.get("end", _whole)
    if line.problems:
        return {}
    key: dict[str, Any] = {
        "input": line.get("st", lambda _: names.input(start, end)),
        "output": line.get("end", lambda _: names.output(start, end)),
    }
    if start >= end:
        line.problems.append(Problem(f"line {line.number}", f"leads from {start} to {end}"))
    result = _result(line) if "ker" in line else {}
    key["unchanged"] = end == start + 1 and result.get("family") != "identity"
    if result and not line.problems:
        key |= line.get("ker", lambda _: names.result(start, end, result)) or {}
    return key


def _result(line: _Line) -> dict[str, Any]:
    """Kernel, stride and family of what a segment becomes; kernel 0 stands for y = x."""
    kernel, stride = line.get("ker", _whole), line.get("str", _whole)
    depthwise = line.get("is_dw", _flag)
    if line.problems:
        return {}
    if kernel == 0:
        return {"family": "identity"}
    if stride < 1:
        line.problems.append(Problem(f"line {line.number}, str", f"a stride of {stride}"))
    family = "depthwise" if depthwise else "pointwise" if kernel == 1 else "dense"
    return {"kernel": (kernel, kernel), "stride": (stride, stride), "family": family}


def _whole(text: str) -> int:
    if not re.fullmatch(r"\d+(\.0*)?", text):
        raise ValueError(f"{text!r} is no whole number")
    return int(text.split(".")[0])


def _finite(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise ValueError(f"{text!r} is no number") from None
    if not math.isfinite(value):
        raise ValueError(f"{text!r} is no finite number")
    return value


def _not_negative(text: str) -> float:
    value = _finite(text)
    if value < 0:
        raise ValueError(f"{text!r} is negative")
    return value


def _flag(text: str) -> bool:
    values = {"0": False, "1": True, "false": False, "true": True}
    if text.lower() not in values:
        raise ValueError(f"{text!r} is neither 0 nor 1")
    return values[text.lower()]


def _breaks(names: Names) -> Callable[[str], tuple[str, ...]]:
    return lambda text: tuple(names.tensor(_whole(part.strip())) for part in text.split(","))


def _removed(line: _Line, names: Names) -> Callable[[str], tuple[str, ...]]:
    """The convolutions of a segment that its `conv_comb`, a tuple of those kept, leaves out."""

    def convert(text: str) -> tuple[str, ...]:
        if not re.fullmatch(r"[(\[][\d,\s]*[)\]]", text):
            raise ValueError(f"{text!r} is no tuple of convolutions")
        if line.problems:
            return ()
        inside = range(_whole(line.cells["st"]) + 1, _whole(line.cells["end"]) + 1)
        kept = {int(number) for number in re.findall(r"\d+", text)}
        if not kept <= set(inside):
            raise ValueError(f"{text!r} names convolutions outside the segment")
        return tuple(names.conv(number) for number in inside if number not in kept)

    return convert

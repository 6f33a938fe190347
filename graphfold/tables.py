"""Tables as values, drawn in a terminal or as HTML: both show the same figures."""

from __future__ import annotations

import html
import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from rich.console import Console

Cell = str | None

# Tensor names in the first column keep at least this much room on narrow terminals.
_NAME_WIDTH = 24


@dataclass(frozen=True)
class Table:
    """One table.

    Attributes:
        title: what it shows.
        columns: headings.
        rows: cells as text; None prints as a dash.
        numeric: indices of the columns that are aligned to the right.
        note: one sentence below the table.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    numeric: frozenset[int] = frozenset()
    note: str | None = None


def make_table(
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[Cell]],
    *,
    text_columns: int = 1,
    note: str | None = None,
) -> Table:
    """A table whose first `text_columns` columns are text and whose others are numbers."""
    return Table(
        title=title,
        columns=tuple(columns),
        rows=tuple(tuple(row) for row in rows),
        numeric=frozenset(range(text_columns, len(columns))),
        note=note,
    )


def print_table(table: Table, console: Console) -> None:
    """Draw a table with rich; names are never read as markup and never cut."""
    import rich.box
    import rich.table
    import rich.text

    drawn = rich.table.Table(
        title=rich.text.Text(table.title),
        title_justify="left",
        title_style="bold",
        box=rich.box.SIMPLE_HEAD,
        pad_edge=False,
    )
    is_summary = not table.columns[0]
    for index, column in enumerate(table.columns):
        is_numeric = index in table.numeric
        drawn.add_column(
            rich.text.Text(column),
            justify="right" if is_numeric else "left",
            overflow="fold",
            no_wrap=is_numeric,
            min_width=_NAME_WIDTH if index == 0 and not is_numeric and not is_summary else None,
        )
    for row in table.rows:
        drawn.add_row(*(rich.text.Text(cell if cell is not None else "-") for cell in row))
    console.print(drawn)
    if table.note:
        console.print(rich.text.Text(table.note))


def html_table(table: Table) -> str:
    """A table as an HTML section."""
    head = "".join(
        f"<th{_align(index, table)}>{html.escape(column)}</th>"
        for index, column in enumerate(table.columns)
    )
    body = "\n".join(
        "<tr>"
        + "".join(
            f"<td{_align(index, table)}>{html.escape(cell) if cell is not None else '&ndash;'}</td>"
            for index, cell in enumerate(row)
        )
        + "</tr>"
        for row in table.rows
    )
    note = f"<p>{html.escape(table.note)}</p>" if table.note else ""
    return (
        f"<section><h2>{html.escape(table.title)}</h2><div class='scroll'><table>"
        f"<thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table></div>{note}</section>"
    )


def _align(index: int, table: Table) -> str:
    return " class='n'" if index in table.numeric else ""


def count(value: int | None) -> str | None:
    """`1,234` below a million, `300.8 M` and `1.23 G` above."""
    if value is None:
        return None
    if value < 1_000_000:
        return f"{value:,}"
    if value < 1_000_000_000:
        return f"{value / 1e6:.1f} M"
    return f"{value / 1e9:.2f} G"


def size(value: int | None) -> str | None:
    """Bytes in binary units: `512 B`, `13.5 MiB`."""
    if value is None:
        return None
    number = float(value)
    for unit in ("B", "KiB", "MiB"):
        if number < 1024:
            return f"{value} B" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1024
    return f"{number:.2f} GiB"


def error(value: float | None) -> str | None:
    """An error in scientific notation; `0` when there is none, `inf` beyond measure."""
    if value is None:
        return None
    if math.isinf(value) or math.isnan(value):
        return "inf"
    return "0" if value == 0 else f"{value:.1e}"


def change(before: float | None, after: float | None) -> str | None:
    """Relative change in percent, None where it means nothing."""
    if before is None or after is None or before == 0 or before == after:
        return None
    return f"{100 * (after - before) / before:+.1f} %"


def kernel(sizes: Sequence[int]) -> str:
    """A kernel as `3x3`."""
    return "x".join(str(item) for item in sizes)


def grouped(pairs: Iterable[tuple[str, str]]) -> list[tuple[str, list[str]]]:
    """Names by reason, most frequent first; reasons that differ only in numbers are one.

    Args:
        pairs: (reason, name) in order.
    """
    groups: dict[str, tuple[set[str], list[str], str]] = {}
    for reason, name in pairs:
        key = re.sub(r"\d+", "#", reason)
        wordings, names, _ = groups.setdefault(key, (set(), [], reason))
        wordings.add(reason)
        names.append(name)
    found = [
        (first if len(wordings) == 1 else f"{first} (and alike)", names)
        for wordings, names, first in groups.values()
    ]
    return sorted(found, key=lambda item: -len(item[1]))


def first_names(names: Sequence[str], most: int = 3) -> str:
    """The first few names, and how many more there are."""
    text = ", ".join(names[:most])
    return f"{text}, ... ({len(names) - most} more)" if len(names) > most else text

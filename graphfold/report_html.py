"""The report as one HTML page: nothing is loaded from anywhere, light and dark both work."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import TYPE_CHECKING

from graphfold import tables

if TYPE_CHECKING:
    from graphfold.report import BlockChange, Report

_STYLE = """
:root { color-scheme: light dark; --ink: #1c2330; --soft: #5b6474; --line: #d9dde4;
  --paper: #fff; --before: #9aa7bd; --after: #2f6fde; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ef; --soft: #9aa3b2; --line: #343b47;
  --paper: #14181f; --before: #5d6a80; --after: #6ea1ff; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 70rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; overflow-wrap: anywhere; } h2 { font-size: 1.1rem; margin-top: 2rem; }
p { color: var(--soft); } .scroll { overflow-x: auto; }
table { border-collapse: collapse; min-width: 30rem; }
th, td { text-align: left; padding: .25rem .9rem .25rem 0; border-bottom: 1px solid var(--line);
  vertical-align: top; overflow-wrap: anywhere; }
th { color: var(--soft); font-weight: 600; } .n { text-align: right; white-space: nowrap;
  font-variant-numeric: tabular-nums; }
svg text { fill: var(--ink); font: 12px system-ui, sans-serif; }
svg .soft { fill: var(--soft); } svg .before { fill: var(--before); }
svg .after { fill: var(--after); }
"""

_WIDTH = 960
_NAMES = 330
_ROW = 26
_BAR = 9
_LONGEST_NAME = 46


def page(report: Report) -> str:
    """The whole page."""
    title = f"graphfold: {report.model or 'model'}"
    parts = [
        f"<h1>{html.escape(title)}</h1>",
        f"<p>{html.escape(_subtitle(report))}</p>",
        *(f"<p>Warning: {html.escape(text)}</p>" for text in report.warnings),
        *(_section(*picture) for picture in _pictures(report)),
        *(tables.html_table(table) for table in report.tables()),
    ]
    return (
        "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body></html>\n"
    )


def _subtitle(report: Report) -> str:
    found = [f"graphfold {report.version}"]
    found.append(f"plan {report.plan}" if report.plan else "without a plan")
    if report.output:
        found.append(f"output {report.output}")
    if report.verification is None:
        found.append("not verified")
    elif report.verification.passed is None:
        found.append(f"not verified: {report.verification.reason}")
    else:
        found.append("verified" if report.verification.passed else "verification failed")
    return "; ".join(found)


def _section(title: str, svg: str) -> str:
    return f"<section><h2>{html.escape(title)}</h2><div class='scroll'>{svg}</div></section>"


def _pictures(report: Report) -> list[tuple[str, str]]:
    """One picture: MACs per block, or memory traffic where no block has any."""
    changes = report.block_changes
    macs = [item for item in changes if any(item.macs)]
    if macs and all(None not in item.macs for item in changes):
        return [("MACs per block", _bars(macs, [item.macs for item in macs], tables.count))]
    traffic = [item for item in changes if None not in item.traffic]
    if not traffic or len(traffic) != len(changes):
        return []
    values = [item.traffic for item in traffic]
    return [("Memory traffic per block", _bars(traffic, values, tables.size))]


def _bars(
    changes: Sequence[BlockChange],
    values: Sequence[tuple[int | None, int | None]],
    write: object,
) -> str:
    assert callable(write)
    largest = max((value or 0 for pair in values for value in pair), default=0) or 1
    room = _WIDTH - _NAMES - 90
    rows = [_legend()]
    for index, (change, pair) in enumerate(zip(changes, values, strict=True)):
        top = 30 + index * _ROW
        rows.append(
            f"<text x='{_NAMES - 10}' y='{top + 13}' text-anchor='end'>"
            f"<title>{html.escape(change.name)}</title>{html.escape(_short(change.name))}</text>"
        )
        for offset, (kind, value) in enumerate(zip(("before", "after"), pair, strict=True)):
            width = room * (value or 0) / largest
            y = top + offset * (_BAR + 1)
            label = f"{change.name}, {kind}: {write(value)}"
            rows.append(
                f"<rect class='{kind}' x='{_NAMES}' y='{y}' width='{width:.1f}' height='{_BAR}'>"
                f"<title>{html.escape(label)}</title></rect>"
            )
        after = html.escape(str(write(pair[1])))
        end = _NAMES + room * max(value or 0 for value in pair) / largest + 6
        rows.append(f"<text class='soft' x='{end:.1f}' y='{top + 14}'>{after}</text>")
    height = 36 + len(changes) * _ROW
    return (
        f"<svg viewBox='0 0 {_WIDTH} {height}' width='{_WIDTH}'"
        f" role='img' aria-label='cost per block before and after'>{''.join(rows)}</svg>"
    )


def _legend() -> str:
    return (
        f"<rect class='before' x='{_NAMES}' y='6' width='12' height='{_BAR}'/>"
        f"<text x='{_NAMES + 18}' y='15'>before</text>"
        f"<rect class='after' x='{_NAMES + 80}' y='6' width='12' height='{_BAR}'/>"
        f"<text x='{_NAMES + 98}' y='15'>after</text>"
    )


def _short(name: str) -> str:
    if len(name) <= _LONGEST_NAME:
        return name
    half = (_LONGEST_NAME - 3) // 2
    return f"{name[:half]}...{name[-half:]}"

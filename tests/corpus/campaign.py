"""The long run: every part, with a progress bar, a table of counts, and what failed."""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

import graphfold
from corpus.cases import PARTS, ROOT, Case, files
from corpus.examine import Outcome
from corpus.worker import Worker

GENERATED = 2000
COLUMNS = (
    "part",
    "models",
    "onnxruntime",
    "reference",
    "not run",
    "refused",
    "fewer nodes",
    "failed",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the campaign; 1 where anything failed."""
    options = _options(argv)
    outcomes: list[Outcome] = []
    # An interrupted run tells what it has seen so far.
    with suppress(KeyboardInterrupt), Worker() as worker:
        for part in options.part or PARTS:
            outcomes += _run(part, PARTS[part](options.seed), options.limit, worker)
        if options.models is not None:
            outcomes += _run("files", files(options.models), options.limit, worker)
    rows = counts(outcomes)
    _show(rows, outcomes)
    if options.record:
        _record(rows, outcomes, options)
    return int(any(outcome.problems for outcome in outcomes))


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.corpus", description=__doc__)
    parser.add_argument("--part", action="append", choices=PARTS, help="only these parts")
    parser.add_argument("--limit", type=int, help="at most this many models per part")
    parser.add_argument("--seed", type=int, default=0, help="first seed of the generated graphs")
    parser.add_argument("--models", type=Path, help="a folder of further ONNX files")
    parser.add_argument("--record", action="store_true", help="write benchmarks/results/corpus.*")
    return parser.parse_args(argv)


def _run(part: str, source: Iterator[Case], limit: int | None, worker: Worker) -> Iterator[Outcome]:
    if part == "generated":
        total = limit or GENERATED
        cases: Iterable[Case] = itertools.islice(source, total)
    else:
        cases = list(itertools.islice(source, limit))
        total = len(cases)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    console = Console(stderr=True)
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        for case in progress.track(cases, total, description=part):
            outcome = worker.examine(case)
            for problem in outcome.problems:
                progress.console.print(f"{part}/{case.name}: {problem}", markup=False)
            yield outcome


def counts(outcomes: Sequence[Outcome]) -> list[list[str]]:
    """One row per part, and their sum; columns as `COLUMNS`."""
    parts = list(dict.fromkeys(outcome.part for outcome in outcomes))
    groups = [(part, [each for each in outcomes if each.part == part]) for part in parts]
    return [_row(name, group) for name, group in (*groups, ("all", list(outcomes)))]


def _row(name: str, group: Sequence[Outcome]) -> list[str]:
    figures = [
        len(group),
        sum(each.compared == "onnxruntime" for each in group),
        sum(each.compared == "reference" for each in group),
        sum(not each.compared and not each.refused and not each.problems for each in group),
        sum(bool(each.refused) for each in group),
        sum(0 < each.after < each.before for each in group),
        sum(bool(each.problems) for each in group),
    ]
    return [name, *(f"{figure:,}" for figure in figures)]


def _show(rows: list[list[str]], outcomes: Sequence[Outcome]) -> None:
    table = Table(box=None)
    for number, column in enumerate(COLUMNS):
        table.add_column(column, justify="right" if number else "left")
    for row in rows:
        table.add_row(*row)
    Console(width=110).print(table)
    sys.stdout.write(f"graphfold of {Path(graphfold.__file__).parent}\n")
    for outcome in outcomes:
        for problem in outcome.problems:
            sys.stdout.write(f"{outcome.part}/{outcome.name}: {problem}\n")


def _record(
    rows: list[list[str]], outcomes: Sequence[Outcome], options: argparse.Namespace
) -> None:
    """The table of counts and the nodes of each real model, as a benchmark's result."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from common import markdown, write

    networks = [each for each in outcomes if each.part in ("light", "shared", "packages", "files")]
    body = [markdown(list(COLUMNS), rows)]
    if networks:
        nodes = [[each.name, f"{each.before:,}", f"{each.after:,}"] for each in networks]
        body += ["", markdown(["network", "nodes before", "nodes after"], nodes)]
    data = {
        "counts": [dict(zip(COLUMNS, row, strict=True)) for row in rows],
        "nodes": {each.name: [each.before, each.after] for each in networks},
        "failed": {f"{each.part}/{each.name}": each.problems for each in outcomes if each.problems},
    }
    command = "python -m tests.corpus --record"
    command += "".join(f" --part {part}" for part in options.part or ())
    command += f" --limit {options.limit}" if options.limit else ""
    command += f" --seed {options.seed}" if options.seed else ""
    command += " --models FOLDER" if options.models else ""
    write("corpus", "Corpus", command, "\n".join(body), data)

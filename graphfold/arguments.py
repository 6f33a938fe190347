"""What commands make of their arguments: sources, sizes, inputs, and the terminal to answer on."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from graphfold.errors import UsageError
from graphfold.terminal import STDIO, Terminal, read_stdin, reserved_stdout

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from graphfold.calibration.dataset import Dataset
    from graphfold.model import Model


def source(model: str) -> Path | bytes:
    """Where a model comes from: a file, or the bytes of stdin."""
    return read_stdin() if model == STDIO else Path(model)


def at_most_one_stdin(models: Sequence[str]) -> None:
    """Raise UsageError where stdin is to be several models."""
    if sum(name == STDIO for name in models) > 1:
        raise UsageError("only one model can come from stdin")


def names(text: str) -> list[str]:
    """The items of a comma-separated list."""
    return [name.strip() for name in text.split(",") if name.strip()]


def shapes(items: Sequence[str] | None) -> dict[str, tuple[int, ...]] | None:
    """`name:1,3,224,224` or `1,3,224,224`, by input name ("" without one).

    Names may hold colons, as TensorFlow's do: the sizes come after the last one.
    """
    if not items:
        return None
    found: dict[str, tuple[int, ...]] = {}
    for item in items:
        name, _, sizes = item.rpartition(":")
        try:
            shape = tuple(int(size) for size in sizes.replace("x", ",").split(","))
        except ValueError:
            raise UsageError(
                f"--input-shape {item!r} is no shape", hint="for example input:1,3,224,224"
            ) from None
        if name in found:
            raise UsageError(f"--input-shape gives {name or 'the input'!r} twice")
        found[name] = shape
    return found


def inputs(
    data: str | None,
    preprocess: str | None,
    model: Model,
    terminal: Terminal,
    limit: int | None = None,
) -> Iterator[dict[str, NDArray[Any]]] | None:
    """What `--data` names, as feeds; None without it. Doubts about the first feed are warnings."""
    if data is None:
        if preprocess is not None:
            raise UsageError("--preprocess says how --data is prepared, and there is no --data")
        if limit is not None:
            raise UsageError("--samples says how much of --data is used, and there is no --data")
        return None
    if limit is not None:
        batches = dataset(data, preprocess, model, terminal, limit).batches()
        return (dict(batch.feed) for batch in batches)
    from graphfold.calibration.data_checks import doubt_values
    from graphfold.calibration.dataset import read_inputs
    from graphfold.specs import model_inputs

    feeds = read_inputs(data, model_inputs(model), preprocess=preprocess)
    first = next(feeds, None)
    if first is None:
        return iter(())
    for text in doubt_values(model, first):
        terminal.warn(text)
    return itertools.chain([first], feeds)


def dataset(
    data: str,
    preprocess: str | None,
    model: Model,
    terminal: Terminal,
    limit: int | None = None,
) -> Dataset:
    """What `--data` names, to be read as often as needed; doubts about its values are warnings."""
    from graphfold.calibration.data_checks import doubt_values
    from graphfold.calibration.dataset import read_dataset
    from graphfold.specs import model_inputs

    found = read_dataset(data, model_inputs(model), preprocess, limit)
    for text in doubt_values(model, next(found.batches()).feed):
        terminal.warn(text)
    return found


def plan_data(
    plan: str | None,
    data: str | None,
    preprocess: str | None,
    model: Model,
    terminal: Terminal,
    *,
    trains: bool,
    limit: int | None = None,
) -> list[dict[str, NDArray[Any]]] | None:
    """`--data` up to a limit, where training or a plan needs it; None where nothing does."""
    from graphfold.plan import read_plan

    if plan is None or data is None:
        return None
    stated = read_plan(plan)
    if stated.quantize is None and not stated.is_fitted and not trains:
        return None
    found = dataset(data, preprocess, model, terminal, limit)
    return [dict(batch.feed) for batch in found.batches()]


@contextlib.contextmanager
def open_terminal(
    as_json: bool, quiet: bool, *, tables_to_stderr: bool = False
) -> Iterator[Terminal]:
    """The terminal of a command, closed in the end; a reader that left is no error."""
    try:
        with reserved_stdout() as stdout:
            terminal = Terminal(
                stdout, as_json=as_json, quiet=quiet, tables_to_stderr=tables_to_stderr
            )
            try:
                yield terminal
            finally:
                terminal.close()
    except BrokenPipeError:
        # Whoever read the tables has seen enough; nothing may be flushed to it any more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        raise typer.Exit from None

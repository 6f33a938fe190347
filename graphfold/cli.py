"""The `graphfold` command: arguments in, calls to the API, tables and exit codes out.

Imports nothing heavy at the top: `graphfold --help` answers at once.
"""

from __future__ import annotations

import contextlib
import json
import sys
import traceback
from typing import TYPE_CHECKING, Annotated, Any

import typer

from graphfold import (
    __version__,
    cli_auto,
    cli_expand,
    cli_finetune,
    cli_inspect,
    cli_optimize,
    cli_plan,
    cli_score,
    cli_search,
    commands,
    guard,
)
from graphfold.errors import GraphfoldError, ModelError
from graphfold.terminal import INTERRUPTED, interruptible

if TYPE_CHECKING:
    from collections.abc import Sequence

BAD_INPUT = 2
INTERNAL = 3

ISSUES = "please report it with the command, the model's origin and `graphfold --version`"

app = typer.Typer(
    name="graphfold",
    cls=commands.Commands,
    add_completion=False,
    no_args_is_help=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)

for each in (
    cli_optimize,
    cli_inspect,
    cli_plan,
    cli_score,
    cli_auto,
    cli_finetune,
    cli_search,
    cli_expand,
):
    each.register()


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"graphfold {__version__}")
        raise typer.Exit


@app.callback(
    epilog="Exit codes: 0 done; 1 the result is not acceptable, nothing written; 2 bad input or "
    "usage, nothing written; 3 an internal error; 130 interrupted.\n\n"
    "Example: graphfold optimize model.onnx -o folded.onnx"
)
def _root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    """Make exported CNN ONNX models shallower, and prove the result equal."""
    del version


# Running ----------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    As a process of its own (no arguments), the command is isolated: see `graphfold.guard`.
    """
    if argv is not None:
        return _run(list(argv))
    given = sys.argv[1:]
    return guard.contained(lambda: _run(given), lambda text: _fail(ModelError(text), given))


def _run(argv: Sequence[str]) -> int:
    try:
        with interruptible():
            code = app(args=list(argv), prog_name="graphfold", standalone_mode=False)
            sys.stdout.flush()
    except KeyboardInterrupt:
        print("graphfold: interrupted", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:  # noqa: BLE001 - the border: every error becomes an exit code
        return _fail(error, argv)
    return code if isinstance(code, int) else 0


def _fail(error: Exception, argv: Sequence[str]) -> int:
    code, message = _describe(error)
    if code == INTERNAL:
        print(f"graphfold: internal error: {message}", file=sys.stderr)
        hint = "" if "--debug" in argv else " (--debug shows the traceback)"
        print(f"graphfold: this is a bug: {ISSUES}{hint}", file=sys.stderr)
    else:
        print(f"graphfold: error: {message}", file=sys.stderr)
    if "--debug" in argv:
        traceback.print_exception(error)
    if "--json" in argv:
        with contextlib.suppress(OSError):
            print(json.dumps({"error": {"exit_code": code, "message": message}}), flush=True)
    return code


def _describe(error: Exception) -> tuple[int, str]:
    if isinstance(error, GraphfoldError):
        return error.exit_code, str(error)
    if hasattr(error, "format_message"):
        return BAD_INPUT, _usage_message(error)
    if isinstance(error, MemoryError):
        return BAD_INPUT, "out of memory"
    if isinstance(error, OSError) and error.filename is not None:
        return BAD_INPUT, f"{error.filename}: {error.strerror}"
    return INTERNAL, f"{type(error).__name__}: {error}"


def _usage_message(error: Any) -> str:
    """A parser error as one line that names the nearest thing that exists."""
    text = " ".join(str(error.format_message()).split())
    name = getattr(error, "option_name", None)
    if name is not None and hasattr(error, "possibilities"):
        near = error.possibilities or _near_options(error, name)
        hint = f"did you mean {near[0]}?" if near else "--help lists them"
        return f"no such option {name} ({hint})"
    if text.startswith("Missing command"):
        return "which command? (graphfold --help lists them)"
    text = text.removesuffix(".")
    return text[:1].lower() + text[1:]


def _near_options(error: Any, name: str) -> list[str]:
    import difflib

    command = getattr(getattr(error, "ctx", None), "command", None)
    known = [option for item in getattr(command, "params", ()) for option in item.opts]
    return difflib.get_close_matches(name, known, n=1)

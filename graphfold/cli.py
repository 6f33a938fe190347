"""The `graphfold` command: arguments in, calls to the API, tables and exit codes out.

Imports nothing heavy at the top: `graphfold --help` answers at once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from graphfold import __version__, arguments, cli_auto, cli_finetune, cli_plan, cli_score, guard
from graphfold.errors import GraphfoldError, ModelError, UsageError
from graphfold.options import (
    DataOption,
    DebugOption,
    DistillOption,
    JsonOption,
    ModelArgument,
    PreprocessOption,
    QuietOption,
    SamplesOption,
    ShapeOption,
    ToleranceOption,
)
from graphfold.targets import Targets
from graphfold.terminal import (
    INTERRUPTED,
    STDIO,
    Terminal,
    interruptible,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from graphfold.report import Report

FAILED = 1
BAD_INPUT = 2
INTERNAL = 3

ISSUES = "please report it with the command, the model's origin and `graphfold --version`"

app = typer.Typer(
    name="graphfold",
    add_completion=False,
    no_args_is_help=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)


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


@app.command(
    "optimize",
    epilog="Examples:\n\n"
    "graphfold optimize model.onnx\n\n"
    "graphfold optimize model.onnx --plan plan.json -o folded.onnx --report report.html\n\n"
    "graphfold optimize model.onnx --dry-run --json | jq .macs\n\n"
    "cat model.onnx | graphfold optimize - -o - | my-runtime",
)
def _optimize(
    model: ModelArgument,
    plan: Annotated[
        str | None,
        typer.Option(
            "--plan",
            "-p",
            metavar="P",
            help="What to remove and merge. Without a plan only exact merges that lower the "
            "cost are done.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        str | None,
        typer.Option(
            "--output",
            "-o",
            metavar="OUT",
            help="Where to write; - for stdout. Default: MODEL with .folded.onnx.",
            show_default=False,
        ),
    ] = None,
    in_place: Annotated[
        bool, typer.Option("--in-place", help="Replace MODEL, whole or not at all.")
    ] = False,
    reference_out: Annotated[
        str | None,
        typer.Option(
            "--reference-out",
            metavar="R",
            help="Also write the network that the plan describes, with nothing merged.",
            show_default=False,
        ),
    ] = None,
    report_out: Annotated[
        str | None,
        typer.Option("--report", metavar="HTML", help="Also write a report.", show_default=False),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Do everything but write.")] = False,
    no_verify: Annotated[
        bool, typer.Option("--no-verify", help="Skip the comparison with the reference.")
    ] = False,
    require_verify: Annotated[
        bool,
        typer.Option("--require-verify", help="Fail where the model cannot be run to compare."),
    ] = False,
    tolerance: ToleranceOption = None,
    data: DataOption = None,
    preprocess: PreprocessOption = None,
    samples: SamplesOption = None,
    distill: DistillOption = None,
    input_shape: ShapeOption = None,
    allow_other_model: Annotated[
        bool,
        typer.Option("--allow-other-model", help="Use a plan that was made for another file."),
    ] = False,
    allow_growth: Annotated[
        bool, typer.Option("--allow-growth", help="Merge loose runs even where cost rises.")
    ] = False,
    latency: Annotated[
        str | None,
        typer.Option(
            "--latency",
            metavar="T",
            help="A latency table (graphfold profile): measured times decide which loose runs are "
            "merged, instead of multiply-adds.",
            show_default=False,
        ),
    ] = None,
    passes: Annotated[
        str | None,
        typer.Option(
            "--passes", metavar="A,B", help="Run only these rewrites.", show_default=False
        ),
    ] = None,
    skip_pass: Annotated[
        list[str] | None,
        typer.Option(
            "--skip-pass", metavar="A", help="Leave out a rewrite. Repeatable.", show_default=False
        ),
    ] = None,
    strip_metadata: Annotated[
        bool,
        typer.Option(
            "--strip-metadata",
            help="Remove provenance and exporters' stack traces, which hold local paths.",
        ),
    ] = False,
    external_data: Annotated[
        str,
        typer.Option(
            "--external-data",
            metavar="auto|always|never",
            help="Weights in a file of their own; auto: as the input, always above 2 GB.",
        ),
    ] = "auto",
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Apply a plan, merge what became linear, verify, and write the folded model."""
    del debug
    targets = Targets(
        model=model,
        given=out,
        in_place=in_place,
        reference=None if reference_out is None else Path(reference_out),
        report=None if report_out is None else Path(report_out),
        external_data=external_data,
        dry_run=dry_run,
    )
    if as_json and targets.to_stdout:
        raise UsageError("--json and -o - both want stdout", hint="write the model to a file")
    if no_verify and require_verify:
        raise UsageError("--no-verify contradicts --require-verify")
    targets.check()
    with arguments.open_terminal(as_json, quiet, tables_to_stderr=targets.to_stdout) as terminal:
        import graphfold
        from graphfold.model import load

        started = time.perf_counter()
        loaded = load(arguments.source(model))
        load_seconds = time.perf_counter() - started
        feeds = arguments.plan_data(
            plan, data, preprocess, loaded, terminal, trains=distill is not None, limit=samples
        )
        inputs = (
            feeds[:1] if feeds else arguments.inputs(data, preprocess, loaded, terminal, samples)
        )
        result = graphfold.optimize(
            loaded,
            plan,
            passes=None if passes is None else arguments.names(passes),
            skip_passes=[name for item in skip_pass or () for name in arguments.names(item)],
            allow_other_model=allow_other_model,
            allow_growth=allow_growth,
            latency=latency,
            input_shapes=arguments.shapes(input_shape),
            inputs=inputs,
            data=feeds,
            distill=distill,
            tolerance=tolerance,
            verify=not no_verify,
            require_verify=require_verify,
            strip_metadata=strip_metadata,
            progress=terminal.progress,
        )
        terminal.progress("writing", 0, 0)
        started = time.perf_counter()
        report = dataclasses.replace(
            result.report, model=model, output=targets.written_name, plan=plan
        )
        targets.write(result.folded, result.reference, report, terminal)
        report.seconds["load"] = load_seconds
        report.seconds["write"] = time.perf_counter() - started
        terminal.close()
        _warn(report, terminal, no_verify=no_verify)
        terminal.show(report.to_json, report.tables())
        if targets.written_name not in (None, STDIO):
            terminal.note(f"wrote {targets.written_name}")


def _warn(report: Report, terminal: Terminal, *, no_verify: bool) -> None:
    for text in report.warnings:
        terminal.warn(text)
    found = report.verification
    if found is not None and found.passed is None:
        terminal.warn(f"not verified: {found.reason}")
    elif found is not None and found.random_inputs:
        terminal.note(f"verified on {found.inputs}")
    elif found is None and not no_verify:
        terminal.warn("not verified")


@app.command(
    "inspect",
    epilog="Examples:\n\ngraphfold inspect model.onnx\n\n"
    "graphfold inspect model.onnx --json | jq '.blocks[] | {name, macs}'",
)
def _inspect(
    model: ModelArgument,
    input_shape: ShapeOption = None,
    segments: Annotated[
        bool,
        typer.Option("--segments", help="List every segment, and every reason against one."),
    ] = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Show blocks, sites, what they cost, and the segments that a plan may merge."""
    del debug
    with arguments.open_terminal(as_json, quiet) as terminal:
        import graphfold
        from graphfold.model import load

        found = graphfold.inspect(
            load(arguments.source(model)), input_shapes=arguments.shapes(input_shape)
        )
        found = dataclasses.replace(found, model=model)
        terminal.show(found.to_json, found.tables(all_segments=segments))


@app.command(
    "verify",
    epilog="Exit code 1 when they differ by more than the tolerance.\n\n"
    "Examples:\n\ngraphfold verify model.onnx model.folded.onnx\n\n"
    "graphfold verify model.onnx model.folded.onnx --plan plan.json\n\n"
    "graphfold verify a.onnx b.onnx --data images.npz --tolerance 1e-3 --json",
)
def _verify(
    a: Annotated[str, typer.Argument(metavar="A", help="The model that is right, or -.")],
    b: Annotated[str, typer.Argument(metavar="B", help="The model to check, or -.")],
    plan: Annotated[
        str | None,
        typer.Option(
            "--plan",
            "-p",
            metavar="P",
            help="Compare B with what this plan means on A: the network that B was folded from.",
            show_default=False,
        ),
    ] = None,
    allow_other_model: Annotated[
        bool,
        typer.Option("--allow-other-model", help="Use a plan that was made for another file."),
    ] = False,
    data: DataOption = None,
    preprocess: PreprocessOption = None,
    input_shape: ShapeOption = None,
    tolerance: ToleranceOption = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Compare two models' outputs: errors, top-1 agreement, KL divergence."""
    del debug
    arguments.at_most_one_stdin([a, b])
    with arguments.open_terminal(as_json, quiet) as terminal:
        import graphfold
        from graphfold.model import load
        from graphfold.report import fold_comparison_table, verification_table

        first, second = load(arguments.source(a)), load(arguments.source(b))
        found = graphfold.verify(
            first,
            second,
            plan=plan,
            allow_other_model=allow_other_model,
            inputs=arguments.inputs(data, preprocess, first, terminal),
            input_shapes=arguments.shapes(input_shape),
            tolerance=tolerance,
            progress=terminal.progress,
        )
        terminal.close()
        for text in found.warnings:
            terminal.warn(text)
        if found.passed is None:
            raise ModelError(f"cannot be compared: {found.reason}", where=a)
        shown = [verification_table(found), fold_comparison_table(found)]
        terminal.show(found.to_json, [table for table in shown if table.rows])
        if not found.passed:
            print(f"graphfold: error: {b}: {found.failure()}", file=sys.stderr)
            raise typer.Exit(FAILED)


@app.command(
    "bench",
    epilog="Rounds of all models alternate, so that what disturbs one disturbs all. Ratios are "
    "medians over rounds, relative to A.\n\n"
    "Examples:\n\ngraphfold bench model.onnx model.folded.onnx\n\n"
    "graphfold bench model.onnx --threads 4 --operators\n\n"
    "graphfold bench model.onnx model.folded.onnx --blocks",
)
def _bench(
    models: Annotated[list[str], typer.Argument(metavar="A [B ...]", help="ONNX files.")],
    threads: Annotated[
        int, typer.Option("--threads", min=1, help="Intra-op threads of each session.")
    ] = 1,
    provider: Annotated[
        str, typer.Option("--provider", help="onnxruntime execution provider.")
    ] = "CPUExecutionProvider",
    rounds: Annotated[int, typer.Option("--rounds", min=3, help="Alternating rounds.")] = 20,
    seconds: Annotated[
        float, typer.Option("--seconds", min=0.1, help="Time to measure, all models together.")
    ] = 10.0,
    operators: Annotated[
        bool, typer.Option("--operators", help="Also time each operator (onnxruntime's profiler).")
    ] = False,
    blocks: Annotated[
        bool,
        typer.Option(
            "--blocks",
            help="Also time the blocks of A (those of `graphfold inspect`), and what stands in "
            "their places in B: where a speedup comes from, and where it does not. Blocks are "
            "matched by tensor names, which folding keeps; what B merged across is one row. "
            "Takes as long again.",
        ),
    ] = False,
    data: DataOption = None,
    preprocess: PreprocessOption = None,
    input_shape: ShapeOption = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Measure latency: interleaved, with spread and ratios."""
    del debug
    arguments.at_most_one_stdin(models)
    with arguments.open_terminal(as_json, quiet) as terminal:
        import graphfold
        from graphfold.model import load

        loaded = [load(arguments.source(name)) for name in models]
        found = graphfold.bench(
            loaded,
            names=models,
            inputs=arguments.inputs(data, preprocess, loaded[0], terminal),
            input_shapes=arguments.shapes(input_shape),
            threads=threads,
            provider=provider,
            rounds=rounds,
            seconds=seconds,
            operators=operators,
            blocks=blocks,
            progress=terminal.progress,
        )
        terminal.close()
        for text in found.warnings:
            terminal.warn(text)
        terminal.show(found.to_json, found.tables())


cli_plan.register(app)
cli_score.register(app)
cli_auto.register(app)
cli_finetune.register(app)


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

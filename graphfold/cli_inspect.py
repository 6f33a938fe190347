"""Commands that look at models and change none: `inspect`, `verify`, `bench`."""

from __future__ import annotations

import dataclasses
import sys
from typing import Annotated

import typer

from graphfold import arguments, commands
from graphfold.errors import ModelError
from graphfold.options import (
    DataOption,
    DebugOption,
    JsonOption,
    ModelArgument,
    PreprocessOption,
    QuietOption,
    ShapeOption,
    ToleranceOption,
)

FAILED = 1

_INSPECT_EPILOG = (
    "Examples:\n\ngraphfold inspect model.onnx\n\n"
    "graphfold inspect model.onnx --json | jq '.blocks[] | {name, macs}'"
)

_VERIFY_EPILOG = (
    "Exit code 1 when they differ by more than the tolerance.\n\n"
    "Examples:\n\ngraphfold verify model.onnx model.folded.onnx\n\n"
    "graphfold verify model.onnx model.folded.onnx --plan plan.json\n\n"
    "graphfold verify a.onnx b.onnx --data images.npz --tolerance 1e-3 --json"
)

_BENCH_EPILOG = (
    "Rounds of all models alternate, so that what disturbs one disturbs all. Ratios are "
    "medians over rounds, relative to A.\n\n"
    "Examples:\n\ngraphfold bench model.onnx model.folded.onnx\n\n"
    "graphfold bench model.onnx --threads 4 --operators\n\n"
    "graphfold bench model.onnx model.folded.onnx --blocks"
)


def register() -> None:
    """Add the commands to the command line."""
    commands.add("inspect", _inspect, epilog=_INSPECT_EPILOG)
    commands.add("verify", _verify, epilog=_VERIFY_EPILOG)
    commands.add("bench", _bench, epilog=_BENCH_EPILOG)


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

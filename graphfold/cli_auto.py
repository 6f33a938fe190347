"""The command that does it all: `auto`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from graphfold import arguments, commands
from graphfold.errors import UsageError
from graphfold.options import (
    DataOption,
    DebugOption,
    DistillOption,
    DtypeOption,
    JsonOption,
    MinAgreementOption,
    ModelArgument,
    PlotOption,
    PreprocessOption,
    QuietOption,
    SamplesOption,
    SearchTimeOption,
)
from graphfold.targets import Targets
from graphfold.terminal import STDIO, check_output

if TYPE_CHECKING:
    from graphfold.calibration.auto import AutoResult, Found
    from graphfold.terminal import Terminal

_EXAMPLES = (
    "Examples:\n\ngraphfold auto model.onnx --data photos/ --preprocess imagenet --speedup 1.5 "
    "-o fast.onnx\n\n"
    "graphfold auto model.onnx --data calibration.npz --min-agreement 0.95 --dtype auto "
    "--plan-out plan.json --plot frontier.svg\n\n"
    "The plan makes the same network again: graphfold optimize model.onnx --plan plan.json "
    "--data photos/ --preprocess imagenet"
)


def register() -> None:
    """Add the command to the command line."""
    commands.add("auto", _auto, epilog=_EXAMPLES)


def _auto(
    model: ModelArgument,
    data: DataOption = None,
    preprocess: PreprocessOption = None,
    speedup: Annotated[
        float | None,
        typer.Option(
            "--speedup",
            metavar="X",
            help="X times as fast as the model in float: the least damaged such network.",
            show_default=False,
        ),
    ] = None,
    min_agreement: MinAgreementOption = None,
    dtype: DtypeOption = "float32",
    out: Annotated[
        str | None,
        typer.Option(
            "--output",
            "-o",
            metavar="OUT",
            help="Where to write. Default: MODEL with .folded.onnx.",
            show_default=False,
        ),
    ] = None,
    plan_out: Annotated[
        str | None,
        typer.Option("--plan-out", metavar="P", help="Also write the plan.", show_default=False),
    ] = None,
    plot: PlotOption = None,
    samples: SamplesOption = None,
    threads: Annotated[
        int,
        typer.Option("--threads", min=1, help="Intra-op threads that are timed."),
    ] = 1,
    provider: Annotated[
        str, typer.Option("--provider", help="onnxruntime execution provider.")
    ] = "CPUExecutionProvider",
    time_budget: SearchTimeOption = None,
    distill: DistillOption = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Find a faster network with a few hundred inputs: fit, choose, fold, quantize, verify."""
    del debug
    if data is None:
        raise UsageError(
            "auto needs inputs to calibrate on",
            hint="--data with a few hundred; labels are not needed",
        )
    targets = Targets(model=model, given=out)
    if as_json and targets.to_stdout:
        raise UsageError("--json and -o - both want stdout", hint="write the model to a file")
    targets.check()
    for name, option in ((plan_out, "--plan-out"), (plot, "--plot")):
        if name is not None:
            inputs = [] if model == STDIO else [Path(model)]
            check_output(Path(name), inputs=inputs, option=option)
    with arguments.open_terminal(as_json, quiet, tables_to_stderr=targets.to_stdout) as terminal:
        import graphfold
        from graphfold.model import load

        loaded = load(arguments.source(model))
        found = graphfold.auto(
            loaded,
            arguments.dataset(data, preprocess, loaded, terminal, samples),
            speedup=speedup,
            min_agreement=min_agreement,
            dtype=dtype,
            threads=threads,
            provider=provider,
            time_budget=None if time_budget is None else 60 * time_budget,
            distill=distill,
            progress=terminal.progress,
        )
        _write(found, targets, plan_out, plot, terminal)


def _write(
    done: AutoResult, targets: Targets, plan_out: str | None, plot: str | None, terminal: Terminal
) -> None:
    result = done.result
    targets.write(result.folded, result.reference, result.report, terminal)
    written = [targets.written_name, *write_found(done.found, plan_out, plot)]
    terminal.close()
    for text in (*done.found.warnings, *result.report.warnings):
        terminal.warn(text)
    terminal.show(done.to_json, done.found.tables())
    for name in written:
        if name not in (None, STDIO):
            terminal.note(f"wrote {name}")


def write_found(found: Found, plan: str | None, plot: str | None) -> list[str]:
    """Write a search's plan and picture where names are given; what was written."""
    from graphfold.files import atomic_file

    written = []
    for name, content in ((plan, found.plan_text), (plot, found.picture)):
        if name is not None and (name is not plan or found.plan is not None):
            with atomic_file(name) as file:
                file.write(content().encode())
            written.append(name)
    return written

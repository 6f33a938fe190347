"""`graphfold optimize`: a model and a plan in, a folded model out."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from graphfold import arguments, commands
from graphfold.errors import UsageError
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
from graphfold.terminal import STDIO, Terminal

if TYPE_CHECKING:
    from graphfold.report import Report

_OPTIMIZE_EPILOG = (
    "Examples:\n\n"
    "graphfold optimize model.onnx\n\n"
    "graphfold optimize model.onnx --plan plan.json -o folded.onnx --report report.html\n\n"
    "graphfold optimize model.onnx --dry-run --json | jq .macs\n\n"
    "cat model.onnx | graphfold optimize - -o - | my-runtime"
)


def register() -> None:
    """Add the commands to the command line."""
    commands.add("optimize", _optimize, epilog=_OPTIMIZE_EPILOG)


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

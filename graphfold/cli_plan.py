"""The commands that make plans: `profile` and `plan`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from graphfold import arguments, commands
from graphfold.errors import UsageError
from graphfold.options import (
    DataOption,
    DebugOption,
    DtypeOption,
    JsonOption,
    MinAgreementOption,
    ModelArgument,
    PlotOption,
    PreprocessOption,
    QuietOption,
    SamplesOption,
    SearchTimeOption,
    ShapeOption,
)
from graphfold.terminal import STDIO, check_output

if TYPE_CHECKING:
    from graphfold.calibration.auto import Dtype
    from graphfold.terminal import Terminal

_PROFILE_EXAMPLES = (
    "Interrupt it at any time: with the same arguments it continues from OUT.partial.\n\n"
    "Examples:\n\ngraphfold profile model.onnx -o latency.json\n\n"
    "graphfold profile model.onnx -o latency.json --threads 4 --time-budget 120"
)
_PLAN_EXAMPLES = (
    "Examples:\n\ngraphfold plan model.onnx --latency latency.json --importance macs "
    "--speedup 1.3 -o plan.json\n\n"
    "graphfold plan model.onnx --latency latency.json --importance macs --frontier\n\n"
    "graphfold plan model.onnx --data photos/ --preprocess imagenet --min-agreement 0.95 "
    "-o plan.json\n\n"
    "graphfold plan --schema > plan.schema.json"
)


def register() -> None:
    """Add the commands to the command line."""
    commands.add("profile", _profile, epilog=_PROFILE_EXAMPLES)
    commands.add("plan", _plan, epilog=_PLAN_EXAMPLES)


def _profile(
    model: ModelArgument,
    out: Annotated[
        str,
        typer.Option(
            "--output", "-o", metavar="OUT", help="Where to write the table.", show_default=False
        ),
    ],
    provider: Annotated[
        str, typer.Option("--provider", help="onnxruntime execution provider.")
    ] = "CPUExecutionProvider",
    threads: Annotated[
        int, typer.Option("--threads", min=1, help="Intra-op threads of each session.")
    ] = 1,
    batch: Annotated[
        int, typer.Option("--batch", min=1, help="Images at once, where the model leaves it open.")
    ] = 1,
    dtype: Annotated[
        str, typer.Option("--dtype", help="In which convolutions are computed: float32 or int8.")
    ] = "float32",
    time_budget: Annotated[
        float | None,
        typer.Option(
            "--time-budget",
            metavar="SECONDS",
            min=1.0,
            help="Time that measuring operators may take; fewer rounds where it is short.",
            show_default=False,
        ),
    ] = None,
    fitted: Annotated[
        bool,
        typer.Option(
            "--fitted",
            help="Also measure what only weights fitted on data allow (graphfold score --data): "
            "fewer inner channels, depthwise convolutions, maps of low rank.",
        ),
    ] = False,
    input_shape: ShapeOption = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Measure the latency table of a model on this device; resumable."""
    del debug
    output = Path(out)
    inputs = [] if model == STDIO else [Path(model)]
    if out == STDIO:
        raise UsageError("the table cannot go to stdout", hint="give a file: -o latency.json")
    check_output(output, inputs=inputs, option="--output")
    with arguments.open_terminal(as_json, quiet) as terminal:
        import graphfold
        from graphfold.model import load

        found = graphfold.profile(
            load(arguments.source(model)),
            output,
            provider=provider,
            threads=threads,
            batch=batch,
            dtype=dtype,
            time_budget=time_budget,
            fitted=fitted,
            input_shapes=arguments.shapes(input_shape),
            progress=terminal.progress,
        )
        terminal.close()
        for text in found.warnings:
            terminal.warn(text)
        if found.continued:
            terminal.note(f"continued: {found.continued} operators were measured before")
        terminal.show(found.to_json, found.tables())
        terminal.note(f"wrote {out}")


def _plan(
    model: Annotated[
        str | None,
        typer.Argument(metavar="MODEL", help="An ONNX file, or - for stdin.", show_default=False),
    ] = None,
    out: Annotated[
        str | None,
        typer.Option(
            "--output", "-o", metavar="OUT", help="Where to write the plan.", show_default=False
        ),
    ] = None,
    latency: Annotated[
        str | None,
        typer.Option(
            "--latency",
            metavar="T",
            help="The device's latency table (graphfold profile). Without it, this device is "
            "measured, and the plan is confirmed on it.",
            show_default=False,
        ),
    ] = None,
    importance: Annotated[
        str | None,
        typer.Option(
            "--importance",
            metavar="FILE|uniform|macs|l1",
            help="An importance table, or what counts as one without data: sites, multiply-adds "
            "or weights removed.",
            show_default=False,
        ),
    ] = None,
    speedup: Annotated[
        float | None,
        typer.Option(
            "--speedup", metavar="X", min=0.0, help="X times as fast.", show_default=False
        ),
    ] = None,
    budget: Annotated[
        float | None,
        typer.Option(
            "--budget", metavar="MS", min=0.0, help="At most so long a run.", show_default=False
        ),
    ] = None,
    data: DataOption = None,
    preprocess: PreprocessOption = None,
    samples: SamplesOption = None,
    min_agreement: MinAgreementOption = None,
    dtype: DtypeOption = "float32",
    time_budget: SearchTimeOption = None,
    frontier: Annotated[
        bool, typer.Option("--frontier", help="List what there is to choose from.")
    ] = False,
    plot: PlotOption = None,
    method: Annotated[
        str,
        typer.Option(
            "--method",
            metavar="layermerge|depth|layer-only|sequential|depthshrinker",
            help="What may be chosen.",
        ),
    ] = "layermerge",
    boundary: Annotated[
        str,
        typer.Option(
            "--boundary",
            metavar="auto|exact|hoist",
            help="Where padding stands in merged segments; auto: hoisted where no merge is exact.",
        ),
    ] = "auto",
    compat: Annotated[
        str | None,
        typer.Option(
            "--compat", metavar="floor", help="Round latencies down as published.", hidden=True
        ),
    ] = None,
    grid: Annotated[
        float, typer.Option("--grid", metavar="P", help="Steps per ms of --compat.", hidden=True)
    ] = 10.0,
    confirm: Annotated[
        bool | None,
        typer.Option(
            "--confirm/--no-confirm",
            help="Fold the model and measure it here; choose again where it is not as fast as "
            "asked. By default where this device was measured.",
            show_default=False,
        ),
    ] = None,
    input_shape: ShapeOption = None,
    schema: Annotated[
        bool, typer.Option("--schema", help="Print the JSON Schema of plan files.")
    ] = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Choose what to merge and to drop for a speedup or a budget, and write the plan."""
    del debug
    if schema:
        with arguments.open_terminal(as_json=True, quiet=False) as terminal:
            from graphfold.plan import json_schema

            terminal.show(json_schema, [])
        return
    if model is None:
        raise UsageError("which model?", hint="graphfold plan MODEL --speedup 1.3 -o plan.json")
    if compat not in (None, "floor"):
        raise UsageError(f"--compat {compat!r} is not known", hint="floor is")
    given = [Path(name) for name in (model, latency) if name not in (None, STDIO)]
    for name, option in ((out, "--output"), (plot, "--plot")):
        if name is not None:
            check_output(Path(name), inputs=given, option=option)
    if data is not None and importance is None:
        if budget is not None or latency is not None:
            raise UsageError("--data measures this device", hint="--speedup or --min-agreement")
        with arguments.open_terminal(as_json, quiet) as terminal:
            _plan_with_data(
                terminal,
                model,
                (data, preprocess, samples),
                (out, plot),
                speedup=speedup,
                min_agreement=min_agreement,
                frontier=frontier or plot is not None,
                dtype=cast("Dtype", dtype),
                time_budget=None if time_budget is None else 60 * time_budget,
            )
        return
    if min_agreement is not None:
        raise UsageError("--min-agreement needs inputs to judge on", hint="give --data")
    with arguments.open_terminal(as_json, quiet) as terminal:
        import graphfold
        from graphfold.model import load

        found = graphfold.make_plan(
            load(arguments.source(model)),
            latency=latency,
            importance=importance,
            speedup=speedup,
            budget=budget,
            frontier=frontier or plot is not None,
            method=method,
            boundary=boundary,
            compat=grid if compat else None,
            confirm=confirm,
            input_shapes=arguments.shapes(input_shape),
            progress=terminal.progress,
        )
        terminal.close()
        for text in found.warnings:
            terminal.warn(text)
        written = found.write(out, plot)
        terminal.show(found.to_json, found.tables())
        for name in written:
            terminal.note(f"wrote {name}")


def _plan_with_data(
    terminal: Terminal,
    model: str,
    source: tuple[str, str | None, int | None],
    outputs: tuple[str | None, str | None],
    *,
    speedup: float | None,
    min_agreement: float | None,
    frontier: bool,
    dtype: Dtype,
    time_budget: float | None,
) -> None:
    """Search in context, with fitted replacements; this device is measured."""
    from graphfold.calibration.auto import find_plan
    from graphfold.cli_auto import write_found
    from graphfold.model import load

    loaded = load(arguments.source(model))
    data, preprocess, samples = source
    found = find_plan(
        loaded,
        arguments.dataset(data, preprocess, loaded, terminal, samples),
        speedup=speedup,
        min_agreement=min_agreement,
        frontier=frontier,
        dtype=dtype,
        time_budget=time_budget,
        progress=terminal.progress,
    )
    written = write_found(found, *outputs)
    terminal.close()
    for text in found.warnings:
        terminal.warn(text)
    terminal.show(found.to_json, found.tables())
    for name in written:
        terminal.note(f"wrote {name}")

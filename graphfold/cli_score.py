"""The command that makes importance tables: `score`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from graphfold import arguments
from graphfold.errors import UsageError
from graphfold.options import (
    DataOption,
    DebugOption,
    JobsOption,
    JsonOption,
    PreprocessOption,
    QuietOption,
    SamplesOption,
)
from graphfold.terminal import STDIO, check_output

_EXAMPLES = (
    "Examples:\n\ngraphfold score model.onnx --data photos/ --preprocess imagenet "
    "-o importance.json\n\ngraphfold score model.onnx --import importance.csv --baseline 71.9 "
    "-o importance.json\n\n"
    "graphfold plan model.onnx --importance importance.json --speedup 1.3 -o plan.json\n\n"
    "With --data, interrupt it at any time: with the same arguments it continues from OUT.partial."
)


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command("score", epilog=_EXAMPLES)(_score)


def _score(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="[MODEL]",
            help="An ONNX file, or - for stdin: rows then name its tensors, else positions.",
            show_default=False,
        ),
    ] = None,
    source: Annotated[
        str | None,
        typer.Option(
            "--import",
            metavar="FILE.csv",
            help="A published table: columns st, end and val_acc or val_loss, with st_act and "
            "end_act (Kim et al.) or ker, str, is_dw and conv_comb (LayerMerge).",
            show_default=False,
        ),
    ] = None,
    baseline: Annotated[
        float | None,
        typer.Option(
            "--baseline",
            metavar="B",
            help="The unchanged network's accuracy in percent, or its loss; 0 for a file that "
            "holds differences.",
            show_default=False,
        ),
    ] = None,
    value: Annotated[
        str | None,
        typer.Option(
            "--value",
            metavar="accuracy|exp-accuracy|exp-loss",
            help="What counts: the accuracy's change in points, exp(change / 100), or "
            "exp(-change of the loss / baseline). Default: as published, accuracy for Kim et "
            "al.'s form and exp-accuracy for LayerMerge's.",
            show_default=False,
        ),
    ] = None,
    data: DataOption = None,
    preprocess: PreprocessOption = None,
    samples: SamplesOption = None,
    method: Annotated[
        str,
        typer.Option(
            "--method",
            metavar="regress",
            help="With --data: fit each change on four fifths of the inputs, and measure what it "
            "does to the outputs on the others.",
        ),
    ] = "regress",
    families: Annotated[
        str,
        typer.Option(
            "--families",
            metavar="A,B",
            help="With --data: what may stand in the places of the network.",
        ),
    ] = "dense,depthwise,pointwise,low_rank,narrow,identity",
    longest: Annotated[
        int,
        typer.Option(
            "--longest",
            metavar="N",
            min=1,
            help="With --data: convolutions that a segment may hold to be replaced as one.",
        ),
    ] = 4,
    jobs: JobsOption = 1,
    out: Annotated[
        str | None,
        typer.Option(
            "--output", "-o", metavar="OUT", help="Where to write the table.", show_default=False
        ),
    ] = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Make the importance table of a model: what each change is worth; with --data resumable."""
    del debug
    if source is None:
        _check_published(baseline, value)
        source_of_inputs = (data, preprocess, samples)
        options = {"longest": longest, "jobs": jobs}
        _measure(model, source_of_inputs, method, families, options, out, as_json, quiet)
        return
    if data is not None:
        raise UsageError("--import and --data contradict each other", hint="give one of them")
    if baseline is None:
        raise UsageError(
            "--import needs --baseline",
            hint="the unchanged network's accuracy in percent, or its loss; 0 for differences",
        )
    output = _output(out, [name for name in (model, source) if name not in (None, STDIO)])
    with arguments.open_terminal(as_json, quiet) as terminal:
        from graphfold.measures import write_table
        from graphfold.model import load
        from graphfold.published_segments import import_importance

        found = import_importance(
            source,
            None if model is None else load(arguments.source(model)),
            baseline=baseline,
            score=value,
        )
        write_table(found.table, output)
        terminal.show(found.to_json, found.tables())
        terminal.note(f"wrote {output}")


def _check_published(baseline: float | None, value: str | None) -> None:
    for name, given in (("--baseline", baseline), ("--value", value)):
        if given is not None:
            raise UsageError(f"{name} belongs to --import")


def _measure(
    model: str | None,
    source: tuple[str | None, str | None, int | None],
    method: str,
    families: str,
    options: Mapping[str, int],
    out: str | None,
    as_json: bool,
    quiet: bool,
) -> None:
    data, preprocess, samples = source
    if data is None or model is None:
        raise UsageError(
            "score what?",
            hint="MODEL with --data measures damage on inputs; --import FILE.csv reads a "
            "published importance table",
        )
    if method != "regress":
        raise UsageError(f"--method {method!r} is not known", hint="regress")
    output = _output(out, [model] if model != STDIO else [])
    with arguments.open_terminal(as_json, quiet) as terminal:
        from graphfold.calibration.families import check_families
        from graphfold.calibration.score import score_model
        from graphfold.model import load

        chosen = check_families(arguments.names(families))
        loaded = load(arguments.source(model))
        found = score_model(
            loaded,
            arguments.dataset(data, preprocess, loaded, terminal, samples),
            output,
            families=chosen,
            **options,
            progress=terminal.progress,
        )
        terminal.close()
        if found.continued:
            terminal.note(f"continued: {found.continued} rows were measured before")
        terminal.show(found.to_json, found.tables())
        terminal.note(f"wrote {output}")


def _output(out: str | None, inputs: list[str | None]) -> Path:
    """Where the table goes, checked before any work."""
    if out is None:
        raise UsageError("where to write the table?", hint="give a file: -o importance.json")
    if out == STDIO:
        raise UsageError("the table cannot go to stdout", hint="give a file: -o importance.json")
    path = Path(out)
    check_output(path, inputs=[Path(name) for name in inputs if name], option="--output")
    return path

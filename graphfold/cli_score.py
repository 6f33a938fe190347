"""The command that makes importance tables: `score`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from graphfold import arguments, commands
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
    "-o importance.json\n\ngraphfold score model.onnx --method finetune --data train.npz "
    "-o importance.json\n\n"
    "graphfold score model.onnx --method finetune --scheme depth --data my.data:train "
    "--subset 5000 --epochs 1 --executor dask://10.0.0.1:8786 -o importance.json\n\n"
    "graphfold score model.onnx --import importance.csv --baseline 71.9 -o importance.json\n\n"
    "graphfold plan model.onnx --importance importance.json --speedup 1.3 -o plan.json\n\n"
    "regress needs no training and no labels: minutes, and what `plan` then chooses is fitted, not "
    "merged. finetune is LayerMerge's equation 4: hours, for plans that are merged and fine-tuned "
    "(`graphfold finetune`); each changed network is trained for a while on --subset samples, and "
    "its accuracy measured on as many others. Start with fewer --epochs: each row costs subset x "
    "epochs samples of training.\n\n"
    "With --data, interrupt it at any time: with the same arguments it continues from OUT.partial."
)
_FINETUNE = "With --method finetune"


def register() -> None:
    """Add the command to the command line."""
    commands.add("score", _score, epilog=_EXAMPLES)


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
            help="With --import and finetune, what counts: the accuracy's change in points, "
            "exp(change / 100), or exp(-change of the loss / baseline). Default: as published, "
            "accuracy for Kim et al.'s form and --scheme depth, else exp-accuracy.",
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
            metavar="regress|finetune",
            help="With --data: fit each change on four fifths of the inputs and measure what it "
            "does to the outputs on the others; or train each changed network for a while.",
        ),
    ] = "regress",
    families: Annotated[
        str | None,
        typer.Option(
            "--families",
            metavar="A,B",
            help="With regress: what may stand in the places of the network. Default: "
            "dense,depthwise,pointwise,low_rank,narrow,identity.",
            show_default=False,
        ),
    ] = None,
    longest: Annotated[
        int | None,
        typer.Option(
            "--longest",
            metavar="N",
            min=1,
            help="With regress: convolutions that a segment may hold to be replaced as one. "
            "Default: 4.",
            show_default=False,
        ),
    ] = None,
    scheme: Annotated[
        str | None,
        typer.Option(
            "--scheme",
            metavar="layermerge|depth|layer-only",
            help="Which changes: for `plan --method` of the same name. layermerge: every kernel of "
            "every segment; depth: whole merges with activation states; layer-only: single layers "
            "dropped. Default: layermerge.",
            show_default=False,
            rich_help_panel=_FINETUNE,
        ),
    ] = None,
    subset: Annotated[
        int | None,
        typer.Option(
            "--subset",
            metavar="N",
            min=1,
            help="Samples to train on, and as many others to judge on. Default: 4 % of 500,000 "
            "samples and more, else 1 % but at least 500.",
            show_default=False,
            rich_help_panel=_FINETUNE,
        ),
    ] = None,
    epochs: Annotated[
        int | None,
        typer.Option(
            "--epochs",
            metavar="N",
            min=1,
            help="Times that they are seen. Default: 1 with 500,000 samples and more, else 50.",
            show_default=False,
            rich_help_panel=_FINETUNE,
        ),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(
            "--batch-size",
            metavar="N",
            min=1,
            help="Default: 256 with 500,000 samples and more, else 128.",
            show_default=False,
            rich_help_panel=_FINETUNE,
        ),
    ] = None,
    learning_rate: Annotated[
        float | None,
        typer.Option(
            "--learning-rate",
            metavar="R",
            min=0.0,
            help="At its highest, of a batch of 256; in proportion for others. Default: 0.1.",
            show_default=False,
            rich_help_panel=_FINETUNE,
        ),
    ] = None,
    alpha: Annotated[
        float | None,
        typer.Option(
            "--alpha",
            metavar="A",
            min=0.0,
            max=1.0,
            help="The model's own answers' part of the loss. Default: 0, and 1 without labels.",
            show_default=False,
            rich_help_panel=_FINETUNE,
        ),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(
            "--seed",
            metavar="S",
            min=0,
            help="Of samples and trainings. Default: 0.",
            show_default=False,
            rich_help_panel=_FINETUNE,
        ),
    ] = None,
    compat: Annotated[
        bool,
        typer.Option(
            "--compat",
            help="Train layers that stay anew from random weights, as the published codes do; "
            "without it, what stays is worth what no change is.",
            rich_help_panel=_FINETUNE,
        ),
    ] = False,
    executor: Annotated[
        str | None,
        typer.Option(
            "--executor",
            metavar="dask://HOST:PORT",
            help="Spread the work over a Dask cluster instead of --jobs.",
            show_default=False,
            rich_help_panel=_FINETUNE,
        ),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(
            "--device",
            metavar="cpu|cuda",
            help="Default: a GPU if torch has one.",
            show_default=False,
            rich_help_panel=_FINETUNE,
        ),
    ] = None,
    jobs: JobsOption = None,
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
    fitted = _given(families=families, longest=longest)
    trained = _given(
        scheme=scheme,
        value=value,
        subset=subset,
        epochs=epochs,
        batch_size=batch_size,
        learning_rate=learning_rate,
        alpha=alpha,
        seed=seed,
        compat=compat or None,
        executor=executor,
        device=device,
    )
    if source is None:
        if baseline is not None:
            raise UsageError("--baseline belongs to --import")
        _check_method(method, fitted, trained)
        options = (
            {"jobs": jobs or 1, **fitted} if method == "regress" else {"jobs": jobs, **trained}
        )
        _measure(model, (data, preprocess, samples), method, options, out, as_json, quiet)
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


def _given(**options: Any) -> dict[str, Any]:
    """Options that the user gave."""
    return {name: value for name, value in options.items() if value is not None}


def _check_method(method: str, fitted: Mapping[str, Any], trained: Mapping[str, Any]) -> None:
    if method not in ("regress", "finetune"):
        raise UsageError(f"--method {method!r} is not known", hint="regress or finetune")
    other, belongs = (trained, "finetune") if method == "regress" else (fitted, "regress")
    names = ["--" + name.replace("_", "-") for name in other]
    if names:
        verb = "belongs" if len(names) == 1 else "belong"
        where = " and --import" if names == ["--value"] else ""
        raise UsageError(f"{', '.join(names)} {verb} to --method {belongs}{where}")


def _measure(
    model: str | None,
    source: tuple[str | None, str | None, int | None],
    method: str,
    options: Mapping[str, Any],
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
    output = _output(out, [model] if model != STDIO else [])
    with arguments.open_terminal(as_json, quiet) as terminal:
        import graphfold
        from graphfold.calibration.families import check_families
        from graphfold.model import load

        given = dict(options)
        if "families" in given:
            given["families"] = check_families(arguments.names(given["families"]))
        loaded = load(arguments.source(model))
        found = graphfold.score(
            loaded,
            arguments.dataset(data, preprocess, loaded, terminal, samples),
            output,
            method=method,
            **given,
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

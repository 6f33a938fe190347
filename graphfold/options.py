"""Arguments and options that several commands share."""

from __future__ import annotations

from typing import Annotated

import typer

ModelArgument = Annotated[
    str, typer.Argument(metavar="MODEL", help="An ONNX file, or - for stdin.", show_default=False)
]
JsonOption = Annotated[
    bool, typer.Option("--json", help="Print exactly one JSON document to stdout.")
]
QuietOption = Annotated[
    bool, typer.Option("--quiet", "-q", help="No tables, no progress: errors and warnings only.")
]
DebugOption = Annotated[bool, typer.Option("--debug", help="Show tracebacks.")]
ShapeOption = Annotated[
    list[str] | None,
    typer.Option(
        "--input-shape",
        metavar="[NAME:]1,3,224,224",
        help="Sizes of an input that the model leaves open. Repeatable; the name may be left "
        "out with one input. Without it, unknown batches are tried as 2 and other unknown sizes "
        "as 224, 64, 32: the first that the model runs.",
        show_default=False,
    ),
]
DataOption = Annotated[
    str | None,
    typer.Option(
        "--data",
        metavar="D",
        help="Inputs: a folder of pictures (with --preprocess), an .npz keyed by input name, an "
        ".npy for the only input, or package.module:callable that yields dicts of numpy arrays.",
        show_default=False,
    ),
]
PreprocessOption = Annotated[
    str | None,
    typer.Option(
        "--preprocess",
        metavar="NAME|FILE.json",
        help="How pictures of --data are prepared: imagenet (x/255, mean .485 .456 .406, std .229 "
        ".224 .225), lite ((x-127)/128), unit (x/255), symmetric (x/127.5-1), raw, or a JSON file.",
        show_default=False,
    ),
]
DistillOption = Annotated[
    float | None,
    typer.Option(
        "--distill",
        metavar="MINUTES",
        min=0.0,
        help="Train the folded network by the model's own answers to --data, without labels; kept "
        "only where held-back data confirms it. Needs torch.",
        show_default=False,
    ),
]
SamplesOption = Annotated[
    int | None,
    typer.Option(
        "--samples",
        metavar="N",
        min=1,
        help="Use the first N inputs of --data.",
        show_default=False,
    ),
]
JobsOption = Annotated[
    int | None,
    typer.Option(
        "--jobs",
        metavar="N",
        min=1,
        help="With --data: processes that measure at a time; the result is the same for any N. "
        "Default: 1 for regress; for finetune one per core, or one with a GPU.",
        show_default=False,
    ),
]
DtypeOption = Annotated[
    str,
    typer.Option(
        "--dtype",
        metavar="float32|int8|auto",
        help="With --data: what the result computes in; auto takes the better of float and INT8.",
    ),
]
MinAgreementOption = Annotated[
    float | None,
    typer.Option(
        "--min-agreement",
        metavar="A",
        help="With --data: the fastest network that gives the model's own class for a share A of "
        "held-back inputs.",
        show_default=False,
    ),
]
SearchTimeOption = Annotated[
    float | None,
    typer.Option(
        "--time-budget",
        metavar="MINUTES",
        min=0.0,
        help="With --data: the search ends after so long, in float and in INT8 each.",
        show_default=False,
    ),
]
PlotOption = Annotated[
    str | None,
    typer.Option("--plot", metavar="F.svg", help="Draw the frontier.", show_default=False),
]
ToleranceOption = Annotated[
    float | None,
    typer.Option(
        "--tolerance",
        metavar="T",
        min=0.0,
        help="Largest accepted error relative to max|y|. Default: 1e-4 for float32 outputs, 32 "
        "unit roundoffs for float16 and bfloat16.",
        show_default=False,
    ),
]
TeacherOption = Annotated[
    str | None,
    typer.Option(
        "--teacher",
        metavar="T",
        help="An ONNX file to learn from, with the same inputs and outputs. Default: MODEL.",
        show_default=False,
    ),
]
AlphaOption = Annotated[
    float,
    typer.Option(
        "--alpha",
        metavar="A",
        min=0.0,
        max=1.0,
        help="The teacher's part of the loss where there are labels; 0 learns from labels alone.",
    ),
]
TemperatureOption = Annotated[
    float, typer.Option("--temperature", metavar="T", help="Of the teacher's classes.")
]
NoLabelsOption = Annotated[bool, typer.Option("--no-labels", help="Learn from the teacher alone.")]

"""The command that makes convolutions wider for their training: `expand`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, get_args

import typer

from graphfold import arguments, commands
from graphfold.errors import UsageError
from graphfold.options import DebugOption, JsonOption, ModelArgument, QuietOption, ShapeOption
from graphfold.terminal import STDIO, check_output

if TYPE_CHECKING:
    from graphfold.calibration.expand import Expanded

_KINDS = ("inverted", "linear")

_EXAMPLES = (
    "Examples:\n\n"
    "graphfold expand vgg.onnx --convs k3 --skip-first 2 --skip-last 1 -o wide.onnx\n\n"
    "graphfold finetune wide.onnx --plan wide.plan.json --anneal 0.1:0.5 --data train.npz "
    "-o trained.onnx\n\n"
    "graphfold expand mobilenet.onnx --convs expansions --every 2\n\n"
    "graphfold expand model.onnx --convs k3 --block linear"
)


def register() -> None:
    """Add the command to the command line."""
    commands.add("expand", _expand, epilog=_EXAMPLES)


def _expand(
    model: ModelArgument,
    convs: Annotated[
        str | None,
        typer.Option(
            "--convs",
            metavar="RULE,...",
            help="What to expand: k3 (dense convolutions of kernel 3 on every axis; k3x1: a size "
            "for each), expansions (the pointwise convolutions that inverted-residual blocks begin "
            "with), or convolutions by their output tensors.",
            show_default=False,
        ),
    ] = None,
    every: Annotated[
        int,
        typer.Option(
            "--every", metavar="N", min=1, help="Of what rules match, the first of N in a row."
        ),
    ] = 1,
    skip_first: Annotated[
        int,
        typer.Option("--skip-first", metavar="N", min=0, help="Leave the first N that match."),
    ] = 0,
    skip_last: Annotated[
        int, typer.Option("--skip-last", metavar="N", min=0, help="Leave the last N that match.")
    ] = 0,
    leave: Annotated[
        str | None,
        typer.Option(
            "--except", metavar="A,B", help="Leave these convolutions.", show_default=False
        ),
    ] = None,
    block: Annotated[
        str,
        typer.Option(
            "--block",
            metavar="inverted|linear",
            help="inverted: with normalisations and activations, from random weights; linear: "
            "with neither, from the function that the convolution has.",
        ),
    ] = "inverted",
    ratio: Annotated[
        float,
        typer.Option(
            "--ratio",
            metavar="R",
            help="Hidden channels for each input channel. A linear block takes as many more as it "
            "needs to begin with the function of its convolution.",
        ),
    ] = 6.0,
    activation: Annotated[
        str | None,
        typer.Option(
            "--activation",
            metavar="NAME",
            help="Inside the blocks. Default: the one that the network has most of, else Relu.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        str | None,
        typer.Option(
            "--output",
            "-o",
            metavar="OUT",
            help="Where to write. Default: MODEL with .expanded.onnx.",
            show_default=False,
        ),
    ] = None,
    plan_out: Annotated[
        str | None,
        typer.Option(
            "--plan-out",
            metavar="P",
            help="Where to write the plan that folds it back. Default: OUT with .plan.json.",
            show_default=False,
        ),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", metavar="S", min=0)] = 0,
    input_shape: ShapeOption = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Make convolutions wider for their training, and write the plan that folds them back."""
    del debug
    if convs is None:
        raise UsageError(
            "expand which convolutions?", hint="--convs k3, --convs expansions, or their names"
        )
    if block not in _KINDS:
        raise UsageError(f"--block {block!r} is not known", hint=" or ".join(_KINDS))
    output, plan = _outputs(model, out, plan_out)
    with arguments.open_terminal(as_json, quiet) as terminal:
        import graphfold
        from graphfold.model import load
        from graphfold.plan import ActivationName

        known = get_args(ActivationName)
        if activation is not None and activation not in known:
            raise UsageError(f"--activation {activation!r} is not known", hint=", ".join(known))
        found = graphfold.expand(
            load(arguments.source(model)),
            arguments.names(convs),
            every=every,
            skip_first=skip_first,
            skip_last=skip_last,
            leave=arguments.names(leave or ""),
            kind=block,
            ratio=ratio,
            activation=activation,
            seed=seed,
            input_shapes=arguments.shapes(input_shape),
        )
        _write(found, output, plan)
        terminal.show(found.to_json, found.tables())
        for path in (output, plan):
            terminal.note(f"wrote {path}")


def _outputs(model: str, out: str | None, plan_out: str | None) -> tuple[Path, Path]:
    """Where network and plan go, checked before any work."""
    if STDIO in (out, plan_out):
        raise UsageError("network and plan go to files", hint="-o wide.onnx")
    if model == STDIO and out is None:
        raise UsageError("MODEL is -: where to write?", hint="give -o FILE")
    source = Path(model)
    output = source.with_name(f"{source.stem}.expanded.onnx") if out is None else Path(out)
    plan = output.with_name(f"{output.stem}.plan.json") if plan_out is None else Path(plan_out)
    inputs = [] if model == STDIO else [source]
    check_output(output, inputs=inputs, option="--output")
    check_output(plan, inputs=inputs, option="--plan-out")
    if output.resolve() == plan.resolve():
        raise UsageError("--output and --plan-out are the same file", where=str(plan))
    return output, plan


def _write(found: Expanded, output: Path, plan: Path) -> None:
    """The plan, then the network; no plan without its network."""
    from graphfold.model import save
    from graphfold.terminal import write_text

    is_new = not plan.exists()
    write_text(plan, found.plan.model_dump_json(exclude_unset=True, indent=1) + "\n")
    try:
        save(found.expanded, output)
    except BaseException:
        if is_new:
            plan.unlink(missing_ok=True)
        raise

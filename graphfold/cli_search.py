"""The command that finds the activations a network can do without: `search`."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from graphfold import arguments, commands
from graphfold.errors import OutputError, UsageError
from graphfold.options import (
    AlphaOption,
    DataOption,
    DebugOption,
    JsonOption,
    ModelArgument,
    NoLabelsOption,
    PreprocessOption,
    QuietOption,
    SamplesOption,
    ShapeOption,
    TeacherOption,
    TemperatureOption,
)
from graphfold.terminal import STDIO, check_output

if TYPE_CHECKING:
    from graphfold.calibration.searched import Searched
    from graphfold.masking import Budget
    from graphfold.terminal import Terminal

_EXAMPLES = (
    "Examples:\n\n"
    "graphfold search model.onnx --data train.npz --latency latency.json --keep 8,10 -o found\n\n"
    "graphfold search model.onnx --data photos/ --preprocess imagenet --speedup 1.2,1.4 "
    "--decay 0.001,0.003,0.01\n\n"
    "graphfold finetune model.onnx --plan found/keep-8.json --data train.npz -o tuned.onnx\n\n"
    "OUT gets a plan for every budget (and every --decay, if there are several), search.json with "
    "importances and curves, and search.svg that draws them.\n\n"
    "Interrupt it at any time: with the same arguments it continues from OUT/*.partial."
)


def register() -> None:
    """Add the command to the command line."""
    commands.add("search", _search, epilog=_EXAMPLES)


def _search(
    model: ModelArgument,
    data: DataOption = None,
    preprocess: PreprocessOption = None,
    samples: SamplesOption = None,
    validation: Annotated[
        str | None,
        typer.Option(
            "--validation",
            metavar="D",
            help="Inputs to judge on, as --data. Default: some of --data; --by gradient holds a "
            "tenth of it back.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        str | None,
        typer.Option(
            "--output",
            "-o",
            metavar="OUT",
            help="Folder for plans and report. Default: MODEL with .search.",
            show_default=False,
        ),
    ] = None,
    keep: Annotated[
        str | None,
        typer.Option(
            "--keep",
            metavar="K,...",
            help="So many blocks (or activations) keep theirs; a plan for each number.",
            show_default=False,
        ),
    ] = None,
    speedup: Annotated[
        str | None,
        typer.Option(
            "--speedup",
            metavar="X,...",
            help="Predicted to be X times as fast; a plan for each.",
            show_default=False,
        ),
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(
            "--budget",
            metavar="MS,...",
            help="Predicted to take at most so long; a plan for each.",
            show_default=False,
        ),
    ] = None,
    by: Annotated[
        str,
        typer.Option(
            "--by",
            metavar="loss|gradient",
            help="loss: train for any set of masks that fits, then compare sets. gradient: "
            "DepthShrinker's search, in which masks learn with the weights.",
        ),
    ] = "loss",
    per: Annotated[
        str,
        typer.Option(
            "--per",
            metavar="block|activation",
            help="What is kept or removed as one: the activations of an inverted-residual or "
            "residual block, or each activation that lies between convolutions.",
        ),
    ] = "block",
    ends: Annotated[
        bool,
        typer.Option("--ends", help="The network's first and last activation may go, too."),
    ] = False,
    decay: Annotated[
        str | None,
        typer.Option(
            "--decay",
            metavar="S,...",
            help="How strongly costly blocks lose importance: what is added to the loss in "
            "proportion to the time that each saves; 0 for none. A plan for each with each budget. "
            "Default: 0.003.",
            show_default=False,
        ),
    ] = None,
    latency: Annotated[
        str | None,
        typer.Option(
            "--latency",
            metavar="T",
            help="The device's latency table (graphfold profile). Without it this device is "
            "measured, into OUT/latency.json, unless only --keep and --decay 0 are given.",
            show_default=False,
        ),
    ] = None,
    boundary: Annotated[
        str,
        typer.Option(
            "--boundary",
            metavar="auto|exact|hoist",
            help="Where padding stands in merged segments; auto: hoisted where no merge is exact.",
        ),
    ] = "auto",
    teacher: TeacherOption = None,
    alpha: AlphaOption = 0.7,
    temperature: TemperatureOption = 1.0,
    no_labels: NoLabelsOption = False,
    epochs: Annotated[int, typer.Option("--epochs", metavar="N", min=1)] = 20,
    batch_size: Annotated[
        int,
        typer.Option(
            "--batch-size", metavar="N", min=1, help="Samples in a step, of all processes."
        ),
    ] = 128,
    learning_rate: Annotated[
        float,
        typer.Option(
            "--learning-rate",
            metavar="R",
            min=0.0,
            help="At its highest, of a batch of 256, in proportion for others.",
        ),
    ] = 0.05,
    no_augment: Annotated[
        bool, typer.Option("--no-augment", help="Show all pictures as they are.")
    ] = False,
    seed: Annotated[int, typer.Option("--seed", metavar="S", min=0)] = 0,
    device: Annotated[
        str | None,
        typer.Option(
            "--device",
            metavar="cpu|cuda",
            help="Default: a GPU if torch has one.",
            show_default=False,
        ),
    ] = None,
    input_shape: ShapeOption = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Find the activations that a model can do without, by training with masks on them."""
    del debug
    if data is None:
        raise UsageError("search needs samples to train on", hint="--data gives them")
    if model == STDIO and teacher == STDIO:
        raise UsageError("only one model can come from stdin")
    _check_choice("--boundary", boundary, ("auto", "exact", "hoist"))
    _check_choice("--by", by, ("loss", "gradient"))
    _check_choice("--per", per, ("block", "activation"))
    budgets = _budgets(keep, speedup, budget)
    decays = None if decay is None else _numbers("--decay", decay)
    leads = int(os.environ.get("RANK", 0)) == 0
    with (
        _folder(out, model) as folder,
        arguments.open_terminal(as_json and leads, quiet or not leads) as terminal,
    ):
        import graphfold
        from graphfold.calibration.bridge import bridge  # noqa: F401 - says if torch is missing
        from graphfold.calibration.parallel import joined
        from graphfold.calibration.recipe import Recipe
        from graphfold.calibration.search import DECAY
        from graphfold.model import load

        recipe = Recipe(
            epochs=epochs,
            batch_size=batch_size,
            learning_rate=learning_rate,
            augment=not no_augment,
            seed=seed,
        )
        loaded = load(arguments.source(model))
        with joined(device) as group:
            found = graphfold.search(
                loaded,
                arguments.dataset(data, preprocess, loaded, terminal, samples),
                budgets,
                validation=arguments.judged(validation, preprocess, loaded, terminal),
                teacher=None if teacher is None else arguments.source(teacher),
                use_labels=not no_labels,
                by=by,
                decays=decays or [DECAY],
                per=per,
                ends=ends,
                latency=latency,
                boundary=boundary,
                recipe=recipe,
                alpha=alpha,
                temperature=temperature,
                input_shapes=arguments.shapes(input_shape),
                folder=folder,
                header={"data": data, "validation": validation, "labels": not no_labels},
                group=group,
                progress=terminal.progress,
            )
        if leads:
            _write(found, folder, terminal)


def _check_choice(option: str, given: str, known: tuple[str, ...]) -> None:
    if given not in known:
        raise UsageError(f"{option} {given!r} is not known", hint=" or ".join(known))


def _numbers(option: str, text: str) -> list[float]:
    """The numbers of a comma-separated list."""
    try:
        found = [float(item) for item in arguments.names(text)]
    except ValueError:
        found = []
    if not found:
        raise UsageError(f"{option} {text!r} is no list of numbers", hint=f"{option} 1,2")
    return found


def _budgets(keep: str | None, speedup: str | None, budget: str | None) -> list[Budget]:
    """A budget for every number of the three options."""
    from graphfold.masking import Budget

    found = [Budget("keep", n) for n in ([] if keep is None else _numbers("--keep", keep))]
    found += [
        Budget("speedup", x) for x in ([] if speedup is None else _numbers("--speedup", speedup))
    ]
    found += [Budget("ms", t) for t in ([] if budget is None else _numbers("--budget", budget))]
    if not found:
        raise UsageError(
            "how much is to be kept?", hint="--keep K, --speedup X or --budget MS, several of each"
        )
    return found


@contextlib.contextmanager
def _folder(out: str | None, model: str) -> Iterator[Path]:
    """Where everything goes, made if need be and checked at once; gone if it stays empty."""
    if out is None and model == STDIO:
        raise UsageError("MODEL is -: where to write?", hint="give a folder: -o found")
    if out == STDIO:
        raise UsageError("the result goes to a folder", hint="-o found")
    folder = Path(out) if out is not None else Path(model).with_suffix(".search")
    if folder.exists() and not folder.is_dir():
        raise OutputError("is a file, not a folder", where=str(folder), hint="see --output")
    made = not folder.exists()
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot be made: {error.strerror}", where=str(folder)) from None
    try:
        check_output(folder / "search.json", inputs=[], option="--output")
        yield folder
    finally:
        if made:
            with contextlib.suppress(OSError):  # what a search has begun stays
                folder.rmdir()


def _write(found: Searched, folder: Path, terminal: Terminal) -> None:
    written = found.write(folder)
    for run in found.runs:
        (folder / run.found.checkpoint).unlink(missing_ok=True)
    terminal.close()
    for text in found.warnings:
        terminal.warn(text)
    continued = sum(
        {run.found.checkpoint: run.found.trained.continued for run in found.runs}.values()
    )
    if continued:
        terminal.note(f"continued: {continued} steps were made before")
    terminal.show(found.to_json, found.tables())
    for path in written:
        terminal.note(f"wrote {path}")

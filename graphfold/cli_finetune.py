"""The command that trains what a plan means, and folds it: `finetune`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from graphfold import arguments, commands
from graphfold.errors import UsageError
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
    TeacherOption,
    TemperatureOption,
)
from graphfold.targets import Targets
from graphfold.terminal import STDIO

if TYPE_CHECKING:
    from graphfold.calibration.anneal import Annealing
    from graphfold.calibration.finetune import Finetuned
    from graphfold.model import Model
    from graphfold.terminal import Terminal

_EXAMPLES = (
    "Examples:\n\ngraphfold finetune model.onnx --plan plan.json --data train.npz "
    "--validation test.npz --epochs 20 -o tuned.onnx\n\n"
    "graphfold finetune model.onnx --plan plan.json --data photos/ --preprocess imagenet "
    "--no-labels\n\n"
    "torchrun --nproc-per-node 4 -m graphfold finetune model.onnx --plan plan.json --data "
    "my.data:train --validation my.data:test -o tuned.onnx\n\n"
    "Interrupt it at any time: with the same arguments it continues from OUT.partial."
)


def register() -> None:
    """Add the command to the command line."""
    commands.add("finetune", _finetune, epilog=_EXAMPLES)


def _finetune(
    model: ModelArgument,
    plan: Annotated[
        str | None,
        typer.Option(
            "--plan",
            "-p",
            metavar="P",
            help="What to remove and merge; without one the model is trained as it is.",
            show_default=False,
        ),
    ] = None,
    data: DataOption = None,
    preprocess: PreprocessOption = None,
    samples: SamplesOption = None,
    validation: Annotated[
        str | None,
        typer.Option(
            "--validation",
            metavar="D",
            help="Inputs to judge on, as --data. Default: a tenth of --data is held back.",
            show_default=False,
        ),
    ] = None,
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
    reference_out: Annotated[
        str | None,
        typer.Option(
            "--reference-out",
            metavar="R",
            help="Also write the trained network with nothing merged.",
            show_default=False,
        ),
    ] = None,
    teacher: TeacherOption = None,
    alpha: AlphaOption = 0.7,
    temperature: TemperatureOption = 1.0,
    no_labels: NoLabelsOption = False,
    label_smoothing: Annotated[
        float | None,
        typer.Option(
            "--label-smoothing",
            metavar="S",
            min=0.0,
            max=1.0,
            help="Default: 0.1 with --alpha 0, else none.",
            show_default=False,
        ),
    ] = None,
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
            help="At its highest; of a batch of 256 for sgd, in proportion for others.",
        ),
    ] = 0.05,
    optimizer: Annotated[str, typer.Option("--optimizer", metavar="sgd|adam")] = "sgd",
    momentum: Annotated[float, typer.Option("--momentum", metavar="M", help="Of sgd.")] = 0.9,
    weight_decay: Annotated[float, typer.Option("--weight-decay", metavar="D")] = 1e-4,
    warmup: Annotated[
        float, typer.Option("--warmup", metavar="N", help="Epochs in which the rate rises.")
    ] = 0.0,
    no_augment: Annotated[
        bool, typer.Option("--no-augment", help="Show all pictures as they are.")
    ] = False,
    keep: Annotated[
        str,
        typer.Option(
            "--keep", metavar="last|best", help="The last state, or the best held-out one."
        ),
    ] = "last",
    seed: Annotated[int, typer.Option("--seed", metavar="S", min=0)] = 0,
    no_free_activations: Annotated[
        bool,
        typer.Option(
            "--no-free-activations",
            help="Add no activations behind merged segments but those that the plan states.",
        ),
    ] = False,
    anneal: Annotated[
        str | None,
        typer.Option(
            "--anneal",
            metavar="START:STOP",
            help="Fade out the activations that the plan removes between these shares of the "
            "training, as 0.1:0.5; without it they are gone from the beginning.",
            show_default=False,
        ),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(
            "--device",
            metavar="cpu|cuda",
            help="Default: a GPU if torch has one.",
            show_default=False,
        ),
    ] = None,
    allow_other_model: Annotated[
        bool,
        typer.Option("--allow-other-model", help="Use a plan that was made for another file."),
    ] = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Train what a plan makes of a model, by labels or the model's own answers, and fold it."""
    del debug
    if data is None:
        raise UsageError("finetune needs samples to train on", hint="--data gives them")
    _check_choice("--optimizer", optimizer, ("sgd", "adam"))
    _check_choice("--keep", keep, ("last", "best"))
    if model == STDIO and teacher == STDIO:
        raise UsageError("only one model can come from stdin")
    reference = None if reference_out is None else Path(reference_out)
    targets = Targets(model=model, given=out, reference=reference)
    if targets.to_stdout:
        raise UsageError("the result goes to a file", hint="-o tuned.onnx")
    targets.check()
    leads = int(os.environ.get("RANK", 0)) == 0
    with arguments.open_terminal(as_json and leads, quiet or not leads) as terminal:
        import graphfold
        from graphfold.calibration.bridge import bridge  # noqa: F401 - says if torch is missing
        from graphfold.calibration.parallel import joined
        from graphfold.calibration.recipe import Recipe
        from graphfold.model import load

        recipe = Recipe(
            epochs=epochs,
            batch_size=batch_size,
            learning_rate=learning_rate,
            optimizer="adam" if optimizer == "adam" else "sgd",
            momentum=momentum,
            weight_decay=weight_decay,
            warmup=warmup,
            augment=not no_augment,
            seed=seed,
            keep="best" if keep == "best" else "last",
        )
        loaded = load(arguments.source(model))
        partial = Path(f"{targets.written_name}.partial")
        with joined(device) as group:
            done = graphfold.finetune(
                loaded,
                arguments.dataset(data, preprocess, loaded, terminal, samples),
                plan,
                validation=arguments.judged(validation, preprocess, loaded, terminal),
                teacher=None if teacher is None else arguments.source(teacher),
                use_labels=not no_labels,
                recipe=recipe,
                alpha=alpha,
                temperature=temperature,
                smoothing=label_smoothing,
                free_activations=not no_free_activations,
                allow_other_model=allow_other_model,
                checkpoint=partial,
                header={
                    "data": data,
                    "validation": validation,
                    "labels": not no_labels,
                    "anneal": anneal,
                },
                hooks=None if anneal is None else _annealing(anneal, loaded, plan),
                group=group,
                progress=terminal.progress,
            )
        if leads:
            _write(done, targets, partial, terminal)


def _check_choice(option: str, given: str, known: tuple[str, ...]) -> None:
    if given not in known:
        raise UsageError(f"{option} {given!r} is not known", hint=" or ".join(known))


def _annealing(text: str, model: Model, plan: str | None) -> Annealing:
    from graphfold.calibration.anneal import Annealing

    if plan is None:
        raise UsageError("--anneal fades out what a plan removes", hint="--plan gives it")
    try:
        start, stop = (float(part) for part in text.split(":"))
    except ValueError:
        raise UsageError(f"--anneal {text!r} is not START:STOP", hint="as 0.1:0.5") from None
    return Annealing(model, plan, start, stop)


def _write(done: Finetuned, targets: Targets, partial: Path, terminal: Terminal) -> None:
    result: Any = done.result
    targets.write(result.folded, result.reference, result.report, terminal)
    partial.unlink(missing_ok=True)
    terminal.close()
    for text in result.report.warnings:
        terminal.warn(text)
    if done.trained.continued:
        terminal.note(f"continued: {done.trained.continued} steps were made before")
    terminal.show(done.to_json, done.tables())
    for name in (targets.written_name, targets.reference):
        if name is not None:
            terminal.note(f"wrote {name}")

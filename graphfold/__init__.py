"""graphfold: make exported CNNs shallower and faster after training.

The public API, thin and typed; `graphfold --help` is the same on the command line.
"""

from __future__ import annotations

__version__ = "0.1.0"

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import os

    from numpy.typing import NDArray

    from graphfold.calibration.auto import AutoResult
    from graphfold.calibration.choosing import QuantizationChoice
    from graphfold.calibration.dataset import Dataset
    from graphfold.calibration.expand import Expanded
    from graphfold.calibration.finetune import Finetuned
    from graphfold.calibration.latency import LatencyComparison
    from graphfold.calibration.planning import PlanResult
    from graphfold.calibration.profile import Profile
    from graphfold.calibration.score import Score
    from graphfold.calibration.score_finetune import FinetuneScore
    from graphfold.calibration.searched import Searched
    from graphfold.fitted import Fit, Fitted
    from graphfold.inspection import Inspection
    from graphfold.masking import Budget
    from graphfold.measures import LatencyTable
    from graphfold.model import Model
    from graphfold.optimizer import Result
    from graphfold.plan import Plan, PlanSource
    from graphfold.progress import Progress
    from graphfold.repaired import Repaired, RepairFunction
    from graphfold.verification import Verification

__all__ = [
    "auto",
    "bench",
    "choose_quantization",
    "expand",
    "finetune",
    "inspect",
    "make_plan",
    "optimize",
    "profile",
    "quantize",
    "score",
    "search",
    "verify",
]


def optimize(
    model: Any,
    plan: PlanSource | None = None,
    *,
    passes: Sequence[str] | None = None,
    skip_passes: Sequence[str] = (),
    allow_other_model: bool = False,
    allow_growth: bool = False,
    border_repair: str | None = None,
    latency: str | os.PathLike[str] | LatencyTable | None = None,
    input_shapes: Mapping[str, Sequence[int]] | None = None,
    inputs: Iterable[Mapping[str, NDArray[Any]]] | None = None,
    data: Sequence[Mapping[str, NDArray[Any]]] | None = None,
    distill: float | None = None,
    tolerance: float | None = None,
    verify: bool = True,
    require_verify: bool = False,
    strip_metadata: bool = False,
    progress: Progress | None = None,
) -> Result:
    """Apply a plan to a model, merge every run that became linear, verify the result.

    Args:
        model: path, bytes, onnx.ModelProto, onnx_ir.Model, graphfold Model, or an
            onnx_graphsurgeon Graph. It is not modified.
        plan: path of a plan file, a mapping, or a Plan; None folds only what is exact and
            lowers the cost.
        passes: rewrites to run, by name; all by default.
        skip_passes: rewrites to leave out, by name.
        allow_other_model: accept a plan made for another file where its tensors exist.
        allow_growth: merge loose runs even where cost rises.
        border_repair: force one repair of merged borders (`graphfold.emit.REPAIRS`); by default
            the cheapest is chosen.
        latency: a latency table (see `profile`); it alone decides on loose merges it knows.
        input_shapes: sizes of inputs that the model leaves open, by name ("" for the only one).
        inputs: feeds by input name to verify on; random ones by default.
        data: feeds by input name that segments with `weights: regress` are fitted on, and that a
            plan's `quantize` is calibrated and judged on; without labels.
        distill: minutes of training the folded network by the model's own answers to `data`,
            before it is quantized; kept only where the fifth of the data confirms it that neither
            fits nor training see.
        tolerance: largest accepted error relative to max|y|.
        verify: compare the folded network with the plan's reference network.
        require_verify: fail where onnxruntime cannot run the model.
        strip_metadata: remove provenance and exporters' stack traces.
        progress: called with (stage, done, total).

    Returns:
        the folded network (`.model` as a ModelProto, `.folded`), the reference network and a
        report; `.graphsurgeon` is the folded network as an onnx_graphsurgeon Graph.

    Raises:
        PlanError: the plan is malformed or does not fit; all problems at once.
        VerificationError: the folded network differs from the reference.
        ModelError, UsageError: bad input.
    """
    from graphfold.optimizer import load_any, no_collection, optimize_model
    from graphfold.repaired import check_can_repair

    quantize = repair = None
    fitted_on = data
    if distill is not None:
        check_can_repair(plan, data)
        from graphfold.calibration.split import fitted_part

        repair = _repair_on(data or [], distill, progress)
        fitted_on = fitted_part(data or [])
    if data is not None:
        from graphfold.calibration.planned import quantizing

        quantize = quantizing(data)
    with no_collection():
        return optimize_model(
            load_any(model),
            plan,
            passes=passes,
            skip_passes=skip_passes,
            allow_other_model=allow_other_model,
            allow_growth=allow_growth,
            border_repair=border_repair,
            latency=latency,
            input_shapes=input_shapes,
            inputs=inputs,
            fit=None if fitted_on is None else _fit_on(fitted_on, allow_other_model, progress),
            tolerance=tolerance,
            verify=verify,
            require_verify=require_verify,
            strip_metadata=strip_metadata,
            quantize=quantize,
            repair=repair,
            progress=progress,
        )


def _fit_on(
    data: Sequence[Mapping[str, NDArray[Any]]], allow_other_model: bool, progress: Progress | None
) -> Fit:
    from graphfold.calibration.fitting import fit_plan

    def fit(model: Model, plan: Plan) -> Fitted:
        return fit_plan(model, plan, data, allow_other_model=allow_other_model, progress=progress)

    return fit


def _repair_on(
    data: Sequence[Mapping[str, NDArray[Any]]], minutes: float, progress: Progress | None
) -> RepairFunction:
    from graphfold.calibration.repair import repair

    def run(network: Model, original: Model) -> Repaired:
        return repair(network, original, data, minutes=minutes, progress=progress)

    return run


def inspect(model: Any, *, input_shapes: Mapping[str, Sequence[int]] | None = None) -> Inspection:
    """Sites, blocks and costs of a model, and what would fold without a plan.

    Raises:
        ModelError, UsageError: bad input.
    """
    from graphfold.check import blaming
    from graphfold.graph import Graph
    from graphfold.inspection import build_inspection
    from graphfold.model import to_proto
    from graphfold.optimizer import load_any
    from graphfold.rewrite import Work, select_passes
    from graphfold.runs import alternatives
    from graphfold.scopes import fold_everywhere

    loaded = load_any(model)
    with blaming(lambda: to_proto(loaded)):
        graph = Graph(loaded)
        trial = Graph(loaded.clone(), dict(graph.shapes))
        statistics = fold_everywhere(select_passes(), Work(trial))
        stay = list(alternatives(Work(trial)))
        return build_inspection(
            graph,
            model=None if loaded.path is None else str(loaded.path),
            input_shapes=input_shapes,
            folded=trial,
            folds=[fold for each in statistics for fold in each.folds],
            skipped=[skip for each in statistics for skip in each.skipped],
            alternatives=stay,
        )


def verify(
    a: Any,
    b: Any,
    *,
    plan: PlanSource | None = None,
    allow_other_model: bool = False,
    inputs: Iterable[Mapping[str, NDArray[Any]]] | None = None,
    input_shapes: Mapping[str, Sequence[int]] | None = None,
    tolerance: float | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Verification:
    """Compare the outputs of two models; `a` is the one that is right.

    Args:
        a: the original, in any form that `optimize` takes.
        b: the model to check.
        plan: compare `b` with what this plan means on `a`, instead of with `a` itself.
        allow_other_model: accept a plan made for another file.
        inputs: feeds by input name; random ones by default.
        input_shapes: sizes of inputs that the models leave open.
        tolerance: largest accepted error relative to max|y|.
        seed: of random inputs.
        progress: called with (stage, done, total).

    Raises:
        ModelError, PlanError, DataError, UsageError: bad input.
    """
    from graphfold.optimizer import load_any, verify_models

    return verify_models(
        load_any(a),
        load_any(b),
        plan,
        allow_other_model,
        inputs=inputs,
        input_shapes=input_shapes,
        tolerance=tolerance,
        seed=seed,
        progress=progress,
    )


def bench(models: Sequence[Any], **options: Any) -> LatencyComparison:
    """Interleaved latency of models in onnxruntime, see `graphfold.calibration.latency.compare`.

    Raises:
        ModelError, DataError, UsageError: bad input.
    """
    from graphfold.calibration.latency import compare
    from graphfold.optimizer import load_any

    return compare([load_any(model) for model in models], **options)


def profile(model: Any, output: str | os.PathLike[str] | None = None, **options: Any) -> Profile:
    """Measure a model's latency table, see `graphfold.calibration.profile.profile_model`.

    Args:
        model: in any form that `optimize` takes.
        output: where to write the table; an interrupted run continues from the journal beside it.
        options: provider, threads, batch, dtype, input_shapes, time_budget, progress.

    Raises:
        ModelError, UsageError, OutputError: bad input, or an output that cannot be written.
    """
    from pathlib import Path

    from graphfold.calibration.profile import profile_model
    from graphfold.optimizer import load_any

    return profile_model(load_any(model), None if output is None else Path(output), **options)


def score(
    model: Any,
    data: Dataset,
    output: str | os.PathLike[str] | None = None,
    *,
    method: str = "regress",
    **options: Any,
) -> Score | FinetuneScore:
    """Measure a model's importance table, see `graphfold.calibration.score.score_model`.

    Args:
        model: in any form that `optimize` takes.
        data: calibration inputs (`graphfold.calibration.dataset.read_dataset`).
        output: where to write the table; an interrupted run continues from the journal beside it.
        method: `regress` measures fitted replacements; `finetune` trains each changed network for
            a while, see `graphfold.calibration.score_finetune.score_by_finetuning`.
        options: families, longest, jobs, threads, progress; with `finetune` jobs, progress, scheme,
            value, subset, epochs, batch_size, learning_rate, alpha, seed, compat, executor, device.

    Raises:
        ModelError, DataError, UsageError, OutputError: bad input, or an output that cannot be
            written.
    """
    from pathlib import Path

    from graphfold.errors import UsageError
    from graphfold.optimizer import load_any

    loaded, path = load_any(model), None if output is None else Path(output)
    if method == "finetune":
        from graphfold.calibration.score_finetune import score_by_finetuning

        return score_by_finetuning(loaded, data, path, **options)
    if method != "regress":
        raise UsageError(f"the method {method!r} is not known", hint="regress or finetune")
    from graphfold.calibration.score import score_model

    return score_model(loaded, data, path, **options)


def auto(model: Any, data: Dataset, **options: Any) -> AutoResult:
    """A faster network in one run, see `graphfold.calibration.auto.auto`.

    Args:
        model: in any form that `optimize` takes.
        data: calibration inputs (`graphfold.calibration.dataset.read_dataset`).
        options: speedup or min_agreement, dtype, threads, provider, families, time_budget,
            distill, progress.

    Raises:
        ModelError, DataError, UsageError: bad input. BudgetError: nothing is what was asked for.
    """
    from graphfold.calibration.auto import auto as run
    from graphfold.optimizer import load_any

    return run(load_any(model), data, **options)


def expand(
    model: Any,
    convs: Sequence[str],
    *,
    every: int = 1,
    skip_first: int = 0,
    skip_last: int = 0,
    leave: Sequence[str] = (),
    **options: Any,
) -> Expanded:
    """Convolutions as wider blocks to train, see `graphfold.calibration.expand`.

    Args:
        model: in any form that `optimize` takes.
        convs: rules (`k3`, `k3x1`, `expansions`) and names of convolutions.
        every: of what rules match, the first of so many in a row.
        skip_first: so many of the first that match are left.
        skip_last: so many of the last.
        leave: names of convolutions that stay as they are.
        options: kind (inverted or linear), ratio, activation, seed, input_shapes.

    Raises:
        ModelError, UsageError: bad input, or nothing that can be expanded.
    """
    from graphfold.calibration.expand import expand as run
    from graphfold.calibration.expandable import Rules
    from graphfold.optimizer import load_any

    rules = Rules(tuple(convs), every, skip_first, skip_last, tuple(leave))
    return run(load_any(model), rules, **options)


def finetune(
    model: Any,
    data: Dataset,
    plan: PlanSource | None = None,
    *,
    validation: Dataset | None = None,
    teacher: Any = None,
    **options: Any,
) -> Finetuned:
    """Train what a plan makes of a model and fold it, see `graphfold.calibration.finetune`.

    Args:
        model: in any form that `optimize` takes.
        data: samples to train on, with labels or without (`calibration.dataset.read_dataset`).
        plan: what is removed and merged; None trains the model as it is.
        validation: samples to judge on; by default some of `data`, see `calibration.search`.
        teacher: to learn from, a model in any of these forms or a torch module; by default the
            model itself.
        options: recipe, alpha, temperature, smoothing, free_activations, allow_other_model,
            checkpoint, header, group, progress.

    Raises:
        ModelError, DataError, UsageError, PlanError: bad input.
        VerificationError: the folded network differs from the trained one.
    """
    from graphfold.calibration.finetune import finetune_on
    from graphfold.optimizer import load_any

    return finetune_on(load_any(model), data, plan, validation, teacher, **options)


def search(
    model: Any,
    data: Dataset,
    budgets: Sequence[Budget],
    *,
    validation: Dataset | None = None,
    teacher: Any = None,
    **options: Any,
) -> Searched:
    """Find the activations that a model can do without, see `graphfold.calibration.search`.

    Args:
        model: in any form that `optimize` takes.
        data: samples to train on, with labels or without (`calibration.dataset.read_dataset`).
        budgets: a plan is found for each: `masking.Budget("keep", 8)`, "speedup" or "ms".
        validation: samples to judge on; by default some of `data`, see `calibration.search`.
        teacher: to learn from, a model in any of these forms or a torch module; by default the
            model itself.
        options: by, use_labels, decays, per, ends, latency, boundary, recipe, alpha, temperature,
            smoothing, input_shapes, folder, header, group, progress.

    Raises:
        ModelError, DataError, UsageError, MeasuresError: bad input.
        BudgetError: no plan is as fast as asked.
    """
    from graphfold.calibration.search import search_on
    from graphfold.optimizer import load_any

    return search_on(load_any(model), data, budgets, validation, teacher, **options)


def make_plan(model: Any, **options: Any) -> PlanResult:
    """Choose a plan for a speedup or a budget, see `graphfold.calibration.planning.make_plan`.

    Args:
        model: in any form that `optimize` takes.
        options: latency, importance, speedup, budget, frontier, method, boundary, compat, confirm,
            input_shapes, progress.

    Raises:
        UsageError, MeasuresError: bad input. BudgetError: no plan is as fast as asked.
    """
    from graphfold.calibration.planning import make_plan as choose
    from graphfold.optimizer import load_any

    return choose(load_any(model), **options)


def quantize(model: Any, batches: Iterable[Mapping[str, NDArray[Any]]], **options: Any) -> Model:
    """A network in INT8, see `graphfold.calibration.quantize.quantize`.

    Args:
        model: in any form that `optimize` takes; folded, if it is to be.
        batches: feeds to calibrate on, by input name.
        options: calibration, percentile, per_channel, keep_float, progress.

    Raises:
        ModelError, DataError, UsageError, PlanError: bad input.
    """
    from graphfold.calibration.quantize import quantize as in_int8
    from graphfold.optimizer import load_any

    return in_int8(load_any(model), batches, **options)


def choose_quantization(
    model: Any,
    calibration_batches: Iterable[Mapping[str, NDArray[Any]]],
    judge_batches: Iterable[Mapping[str, NDArray[Any]]],
    **options: Any,
) -> QuantizationChoice:
    """The calibration, and what to leave in float, with the least measured damage.

    Args:
        model: in any form that `optimize` takes; folded, if it is to be.
        calibration_batches: feeds to calibrate on, by input name.
        judge_batches: other feeds, to measure damage on.
        options: calibrations, per_channel, float_share, time_budget, progress; see
            `graphfold.calibration.choosing.choose_quantization`.

    Raises:
        ModelError, DataError: bad input.
    """
    from graphfold.calibration.choosing import choose_quantization as choose
    from graphfold.optimizer import load_any

    return choose(load_any(model), calibration_batches, judge_batches, **options)

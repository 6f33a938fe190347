"""The main job: a model and a plan in, a folded and verified network out."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graphfold import __version__
from graphfold.check import blaming
from graphfold.errors import PlanError, UsageError, VerificationError
from graphfold.fitted import Fit, Fitted, SegmentFit
from graphfold.graph import Graph
from graphfold.measures import LatencyTable, check_names, read_latency
from graphfold.model import Model, compare_interfaces, load, to_proto
from graphfold.plan import Plan, PlanSource, read_plan
from graphfold.prices import Prices
from graphfold.progress import Progress
from graphfold.quantization import Quantized, QuantizeFunction, check_can_quantize
from graphfold.reference import Reference, RetrainFunction, build_reference
from graphfold.repaired import Repaired, RepairFunction
from graphfold.report import Report, build_report, snapshot
from graphfold.rewrite import (
    METADATA_PREFIX,
    Pass,
    PassStatistics,
    Work,
    recorded_folds,
    select_passes,
)
from graphfold.scopes import fold_everywhere

if TYPE_CHECKING:
    import onnx
    import onnx_graphsurgeon as gs
    from numpy.typing import NDArray

    from graphfold.verification import Verification


@dataclass(frozen=True)
class Result:
    """What `optimize` returns.

    Attributes:
        folded: the folded network, in INT8 where the plan says so.
        reference: the plan's semantics with nothing merged; the input where there is no plan.
    """

    folded: Model
    reference: Model
    _gather: Callable[[], Report] = field(repr=False)

    @cached_property
    def report(self) -> Report:
        """What was done, what it won, and how it was checked; gathered when first asked for."""
        return self._gather()

    @property
    def model(self) -> onnx.ModelProto:
        """The folded network as an onnx.ModelProto."""
        return to_proto(self.folded)

    @property
    def graphsurgeon(self) -> gs.Graph:
        """The folded network as an onnx_graphsurgeon.Graph."""
        from graphfold.graphsurgeon import to_graphsurgeon

        return to_graphsurgeon(self.folded)


@dataclass
class _Clock:
    """Seconds per stage."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str, progress: Progress | None) -> Iterator[None]:
        if progress is not None:
            progress(name, 0, 0)
        started = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - started


@contextmanager
def no_collection() -> Iterator[None]:
    """Keep Python's garbage collector from walking graphs, which it cannot shrink, while they grow.

    Reading and folding a large graph takes a third less time; what is freed meanwhile is freed by
    reference counts as ever.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def optimize_model(
    source: Model,
    plan: PlanSource | None,
    *,
    passes: Sequence[str] | None = None,
    skip_passes: Sequence[str] = (),
    allow_other_model: bool = False,
    allow_growth: bool = False,
    border_repair: str | None = None,
    latency: str | os.PathLike[str] | LatencyTable | None = None,
    input_shapes: Mapping[str, Sequence[int]] | None = None,
    inputs: Iterable[Mapping[str, NDArray[Any]]] | None = None,
    fit: Fit | None = None,
    tolerance: float | None = None,
    verify: bool = True,
    require_verify: bool = False,
    strip_metadata: bool = False,
    retrain: RetrainFunction | None = None,
    quantize: QuantizeFunction | None = None,
    repair: RepairFunction | None = None,
    progress: Progress | None = None,
) -> Result:
    """Apply a plan to a loaded model, fold, verify; see `graphfold.optimize`.

    `fit` fits a plan's segments on data, where it has such; `retrain` trains the reference network
    before it is folded, `repair` the folded network before it is quantized.
    """
    if require_verify and not verify:
        raise UsageError("verify=False contradicts require_verify")
    with blaming(lambda: to_proto(source)):
        return _optimize(
            source,
            plan,
            passes=passes,
            skip_passes=skip_passes,
            allow_other_model=allow_other_model,
            allow_growth=allow_growth,
            border_repair=border_repair,
            latency=latency,
            input_shapes=input_shapes,
            inputs=inputs,
            fit=fit,
            tolerance=tolerance,
            verify=verify,
            require_verify=require_verify,
            strip_metadata=strip_metadata,
            retrain=retrain,
            quantize=quantize,
            repair=repair,
            progress=progress,
        )


def _optimize(
    source: Model,
    plan: PlanSource | None,
    *,
    passes: Sequence[str] | None,
    skip_passes: Sequence[str],
    allow_other_model: bool,
    allow_growth: bool,
    border_repair: str | None,
    latency: str | os.PathLike[str] | LatencyTable | None,
    input_shapes: Mapping[str, Sequence[int]] | None,
    inputs: Iterable[Mapping[str, NDArray[Any]]] | None,
    fit: Fit | None,
    tolerance: float | None,
    verify: bool,
    require_verify: bool,
    strip_metadata: bool,
    retrain: RetrainFunction | None,
    quantize: QuantizeFunction | None,
    repair: RepairFunction | None,
    progress: Progress | None,
) -> Result:
    clock = _Clock()
    chosen = select_passes(passes, skip_passes)
    stated = None if plan is None else read_plan(plan)
    parsed, original = stated, source
    fits: tuple[SegmentFit, ...] = ()
    check_can_quantize(stated, quantize)
    if stated is not None and stated.is_fitted:
        with clock.stage("fit", progress):
            fitted = _fitted(source, stated, plan, fit)
        source, parsed, fits = fitted.model, fitted.plan, fitted.fits
    with clock.stage("reference", progress):
        reference = _located(plan, source, parsed, chosen, allow_other_model, progress)
    if retrain is not None:
        with clock.stage("train", progress):
            trained = retrain(reference, original)
        shapes = dict(reference.graph.shapes)
        reference = replace(reference, model=trained, graph=Graph(trained, shapes))
    with clock.stage("fold", progress):
        work = Work(
            _fold_graph(reference),
            segments=reference.segments,
            allow_growth=allow_growth,
            repair=border_repair,
            prices=None if latency is None else _prices(latency, reference),
            affines={} if verify else None,
        )
        statistics = fold_everywhere(chosen, work, progress)
    folded = work.graph.model
    applied = any(each.applied for each in statistics)
    changed = parsed is not None or retrain is not None or applied
    _finish(folded, parsed if changed else None, changed, strip_metadata)
    verification = None
    if verify:
        with clock.stage("verify", progress):
            verification = _verify(
                original,
                reference,
                work,
                statistics,
                inputs=inputs,
                input_shapes=input_shapes,
                tolerance=tolerance,
                progress=progress,
                unlimited=require_verify,
            )
        _refuse_failure(verification, require_verify)
    repaired = None
    if repair is not None:
        with clock.stage("distill", progress):
            repaired = repair(folded, original)
        folded = repaired.model
        if repaired.kept and not strip_metadata:
            folded.ir.metadata_props[f"{METADATA_PREFIX}distilled"] = str(repaired.steps)
    quantized = None
    if parsed is not None and parsed.quantize is not None and quantize is not None:
        with clock.stage("quantize", progress), _naming(plan):
            quantized = quantize(folded, parsed.quantize)

    def gather() -> Report:
        with (
            clock.stage("report", progress),
            no_collection(),
            blaming(lambda: to_proto(source)),
        ):
            return _report(
                original,
                reference,
                folded,
                plan,
                stated,
                statistics,
                verification,
                quantized,
                repaired,
                clock,
                input_shapes,
                fits,
            )

    result = folded if quantized is None else quantized.model
    return Result(result, reference.model, gather)


def _fitted(source: Model, plan: Plan, given: PlanSource | None, fit: Fit | None) -> Fitted:
    """The model with the plan's fitted segments in place.

    Raises:
        UsageError: there is no data to fit on.
        PlanError: segments that cannot be fitted.
    """
    if fit is None:
        raise UsageError(
            "the plan has fitted segments (weights: regress), which need data",
            hint="--data gives calibration inputs",
        )
    with _naming(given):
        return fit(source, plan)


def _prices(latency: str | os.PathLike[str] | LatencyTable, reference: Reference) -> Prices:
    """The table's latencies, as far as its tensors are still there under the plan.

    Raises:
        MeasuresError: it cannot be read, or is of another model.
    """
    table = latency if isinstance(latency, LatencyTable) else read_latency(Path(latency))
    if not reference.segments and not reference.statistics:
        check_names(table, reference.graph.values())
    return Prices(table)


def _located(
    plan: PlanSource | None,
    source: Model,
    parsed: Plan | None,
    chosen: Sequence[Pass],
    allow_other_model: bool,
    progress: Progress | None,
) -> Reference:
    """Build the reference network; errors of a plan file name the file."""
    with _naming(plan):
        return build_reference(
            source, parsed, chosen, allow_other_model=allow_other_model, progress=progress
        )


@contextmanager
def _naming(plan: PlanSource | None) -> Iterator[None]:
    """Let errors of a plan file name the file."""
    try:
        yield
    except PlanError as error:
        if isinstance(plan, (str, os.PathLike)):
            raise PlanError(error.problems, where=str(plan)) from None
        raise


def _fold_graph(reference: Reference) -> Graph:
    """A copy to fold; shapes carry over by name, nothing is inferred again."""
    return Graph(reference.model.clone(), dict(reference.graph.shapes))


def _finish(folded: Model, plan: Plan | None, changed: bool, strip_metadata: bool) -> None:
    metadata = folded.ir.metadata_props
    if changed and not strip_metadata:
        metadata[f"{METADATA_PREFIX}version"] = __version__
        if plan is not None:
            metadata[f"{METADATA_PREFIX}plan"] = plan.digest
    if strip_metadata:
        _strip(folded)


def _strip(model: Model) -> None:
    """Remove provenance and exporters' stack traces, which hold local paths."""
    graphs = [model.ir.graph, *model.ir.graph.subgraphs()]
    holders: list[dict[str, str]] = [model.ir.metadata_props]
    for function in model.ir.functions.values():
        holders.append(function.metadata_props)
        holders += [node.metadata_props for node in function]
    for graph in graphs:
        holders.append(graph.metadata_props)
        for node in graph:
            holders.append(node.metadata_props)
            if node.doc_string and ".py" in node.doc_string:
                node.doc_string = None
    for metadata in holders:
        for key in list(metadata):
            if key.startswith(METADATA_PREFIX) or key.endswith("stack_trace"):
                del metadata[key]


def _verify(
    original: Model,
    reference: Reference,
    work: Work,
    statistics: Sequence[PassStatistics],
    **options: Any,
) -> Verification:
    from graphfold.verifier import verify as compare

    folded = work.graph.model
    differences = compare_interfaces(original, folded)
    if differences:
        raise VerificationError(
            "the folded network's interface differs: " + "; ".join(differences),
            hint="this is a bug in a rewrite; --passes and --skip-pass narrow it down",
        )
    return compare(
        reference.model,
        folded,
        folds=[fold for fold in _ordered_folds(folded, statistics) if fold.scope is None],
        original=original,
        affines=work.affines,
        **options,
    )


def _ordered_folds(folded: Model, statistics: Sequence[PassStatistics]) -> list[Any]:
    """Folds in execution order, so that the first that deviates is named first; bodies last."""
    position = {
        value.name: index for index, node in enumerate(folded.ir.graph) for value in node.outputs
    }
    # A tensor that was folded twice is what the last fold made it.
    every = [fold for each in statistics for fold in each.folds]
    main = {fold.output: fold for fold in every if fold.scope is None and fold.output in position}
    inner = {(fold.scope, fold.output): fold for fold in every if fold.scope is not None}
    return [*sorted(main.values(), key=lambda fold: position[fold.output]), *inner.values()]


def _refuse_failure(verification: Verification, require_verify: bool) -> None:
    if verification.passed is False:
        raise VerificationError(f"verification failed: {verification.failure()}")
    if verification.passed is None and require_verify:
        raise VerificationError(f"could not be verified: {verification.reason}")


def _report(
    source: Model,
    reference: Reference,
    folded: Model,
    plan: PlanSource | None,
    parsed: Plan | None,
    statistics: Sequence[PassStatistics],
    verification: Verification | None,
    quantized: Quantized | None,
    repaired: Repaired | None,
    clock: _Clock,
    input_shapes: Mapping[str, Sequence[int]] | None,
    fits: tuple[SegmentFit, ...],
) -> Report:
    every = [*reference.statistics, *statistics]
    known = reference.graph if reference.model is source else source
    before = snapshot(known, input_shapes=input_shapes)
    return build_report(
        before,
        Graph(folded),
        _ordered_folds(folded, statistics),
        [skip for each in every for skip in each.skipped],
        every,
        verification,
        clock.seconds,
        quantized=quantized,
        repaired=repaired,
        model=None if source.path is None else str(source.path),
        plan=str(plan) if isinstance(plan, (str, Path)) else None,
        plan_digest=None if parsed is None else parsed.digest,
        version=__version__,
        input_shapes=input_shapes,
        warnings=(*reference.warnings, *_costlier_segments(statistics)),
        fits=fits,
    )


def _costlier_segments(statistics: Sequence[PassStatistics]) -> Iterator[str]:
    """Warnings for segments that the plan merges although that costs more."""
    for fold in (fold for each in statistics for fold in each.folds):
        if fold.segment is None or fold.macs is None or fold.macs[1] <= fold.macs[0]:
            continue
        before, after = (f"{count / 1e6:.1f} M" for count in fold.macs)
        yield (
            f"{fold.segment} costs more merged, {after} MACs instead of {before}: name its "
            "activations under remove_activations instead and it is merged only where that pays"
        )


def verify_models(
    a: Model, b: Model, plan: PlanSource | None, allow_other_model: bool, **options: Any
) -> Verification:
    """Compare B with A, or with the reference network of a plan on A; see `graphfold.verify`.

    Where B's metadata tells of folds that mean the same tensors in both, these are compared too.
    """
    from graphfold.verifier import verify as compare

    folds = recorded_folds(b.ir.graph)
    if plan is None:
        planned = f"{METADATA_PREFIX}plan" in b.ir.metadata_props
        return compare(a, b, folds=() if planned else folds, **options)
    parsed = read_plan(plan)
    if parsed.is_fitted:
        raise UsageError(
            "the plan has fitted segments: what they are depends on data, which is not here",
            hint="verify against what `optimize --reference-out` writes",
        )
    reference = _located(plan, a, parsed, select_passes(), allow_other_model, None)
    return compare(reference.model, b, folds=folds, original=a, **options)


def load_any(source: Any) -> Model:
    """A model from a path, bytes, ModelProto, onnx-ir model, or onnx_graphsurgeon graph."""
    if type(source).__module__.startswith("onnx_graphsurgeon"):
        from graphfold.graphsurgeon import from_graphsurgeon

        return from_graphsurgeon(source)
    return load(source)

"""Numeric proof that a folded network equals its reference network.

Two comparisons on the same inputs, see `verify`:

1. onnxruntime's optimizations off in both: within tolerance * max|y| + 1e-6;
2. optimizations on in both: within that plus the reference's own difference between off and on.

At each fold's output tensor the error is split into interior and border, so that a wrong border
repair is told apart from a wrong kernel. One onnxruntime session is open at a time.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from graphfold import comparison, guard, specs
from graphfold.bounds import RoundingError, rounding_error
from graphfold.comparison import ABSOLUTE_FLOOR, Difference, tolerance_for
from graphfold.errors import DataError, ModelError
from graphfold.feeds import as_float, describe_feed, first_that_runs, second_feed
from graphfold.progress import Progress, no_progress
from graphfold.runtime import OutOfMemoryError, RunError, Runnable, Session, weight_bytes
from graphfold.specs import Arrays
from graphfold.verification import FoldComparison, OutputComparison, Verification

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from graphfold.maps import AffineMap
    from graphfold.model import Model
    from graphfold.rewrite import Fold

__all__ = ["FoldComparison", "OutputComparison", "Verification", "verify"]


_COMPARISON_FACTOR = 20
_GIVE_SIZES = "; smaller sizes can be given as input shapes"

# Fold tensors are compared on as many feeds as fit into this; outputs on all of them.
_FOLD_TENSOR_BYTES = 2**30


def verify(
    reference: Model,
    candidate: Model,
    *,
    folds: Sequence[Fold] = (),
    inputs: Iterable[Mapping[str, NDArray[Any]]] | None = None,
    input_shapes: Mapping[str, Sequence[int]] | None = None,
    original: Model | None = None,
    affines: Mapping[str, AffineMap] | None = None,
    tolerance: float | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    unlimited: bool = False,
) -> Verification:
    """Compare `candidate` with `reference` on the same inputs.

    Float outputs must agree within `tolerance * max|y| + 1e-6` with onnxruntime's optimizations
    off, and within that plus the reference's own off/on difference with them on. Of integer
    outputs, no more values may differ than differ in the reference between off and on. Outputs
    that differ between two runs of `original` are not compared.

    Args:
        reference: the network that is right by definition.
        candidate: the network to check; same input and output names.
        folds: merges whose output tensors are compared one by one, border apart.
        inputs: feeds by input name; None for seeded random ones. Unknown sizes are then tried
            as batch 2 and 224, 64, 32: the first that `original` runs, and a second size where
            it runs that too.
        input_shapes: sizes for random inputs by input name ("" for the only input).
        original: the user's input model, `reference` by default.
        affines: folds in float64 by output tensor, whose own rounding is measured and bounded.
        tolerance: default 1e-4 for float32, 32 unit roundoffs for float16 and bfloat16.
        seed: of the random inputs.
        progress: called with (stage, done, total).
        unlimited: let the networks take any time and memory. Otherwise, on made-up inputs of
            made-up sizes, they may take so much as `graphfold.guard` says.

    Returns:
        A `Verification`; `passed` is None, with a `reason`, where onnxruntime cannot load the
        original or runs it at none of the sizes.

    Raises:
        DataError: `inputs` that do not fit the model.
        UsageError: `input_shapes` that do not fit the model.
    """
    job = _Job(
        reference=reference,
        candidate=candidate,
        original=reference if original is None else original,
        folds=tuple(folds),
        affines=affines or {},
        tolerance=tolerance,
        progress=progress or no_progress,
    )
    reason = guard.avoided(guard.RUN)
    if reason is not None:
        return job.refused(f"{reason}{_GIVE_SIZES}")
    is_limited = inputs is None and not input_shapes and not unlimited
    weights = weight_bytes(job.original)
    if not is_limited:
        return job.run(inputs, input_shapes, seed)
    job.seconds = guard.run_seconds(weights)
    try:
        with guard.memory(guard.run_bytes(weights)):
            return job.run(inputs, input_shapes, seed)
    except (MemoryError, OutOfMemoryError):
        megabytes = guard.run_bytes(weights) // 10**6
        return job.refused(f"running the model takes more than {megabytes} MB{_GIVE_SIZES}")


class _CannotVerifyError(Exception):
    """The original itself cannot be run here."""


@dataclass
class _Job:
    """One verification: what is compared, and what was found so far."""

    reference: Model
    candidate: Model
    original: Model
    folds: tuple[Fold, ...]
    affines: Mapping[str, AffineMap]
    tolerance: float | None
    progress: Progress
    seconds: float | None = None
    feeds: list[Arrays] = field(default_factory=list)
    described: str = ""
    random: bool = False
    warnings: list[str] = field(default_factory=list)
    not_compared: tuple[str, ...] = ()

    def run(
        self,
        inputs: Iterable[Mapping[str, NDArray[Any]]] | None,
        input_shapes: Mapping[str, Sequence[int]] | None,
        seed: int,
    ) -> Verification:
        started = time.perf_counter()
        try:
            with guard.step(guard.RUN, self.seconds):
                self._choose_inputs(inputs, input_shapes, seed)
        except _CannotVerifyError as error:
            return self._without_running(started, str(error))
        # What ran once runs again; a multiple only ends what never would.
        spent = time.perf_counter() - started
        limit = None if self.seconds is None else self.seconds + _COMPARISON_FACTOR * spent
        try:
            with guard.step(guard.RUN, limit):
                return self._compare(started)
        except _SideError as error:
            return self._result(started, passed=False, reason=str(error))
        except _CannotVerifyError as error:
            return self._result(started, passed=None, reason=str(error))

    def _without_running(self, started: float, reason: str) -> Verification:
        """What cannot be run must at least load wherever the input does."""
        for optimize in (False, True):
            if not self._loads(self.original, optimize):
                break
            if not self._loads(self.candidate, optimize):
                level = "on" if optimize else "off"
                what = f"onnxruntime loads the input and not the result (optimizations {level})"
                return self._result(started, passed=False, reason=what)
        return self._result(started, passed=None, reason=reason)

    def _loads(self, model: Model, optimize: bool) -> bool:
        try:
            with guard.step(guard.RUN, self.seconds), Runnable(model) as runnable:
                Session(runnable, optimize=optimize)
        except RunError:
            return False
        return True

    def refused(self, reason: str) -> Verification:
        """No comparison at all."""
        return self._result(time.perf_counter(), passed=None, reason=reason)

    # Inputs ---------------------------------------------------------------------------------

    def _choose_inputs(
        self,
        inputs: Iterable[Mapping[str, NDArray[Any]]] | None,
        input_shapes: Mapping[str, Sequence[int]] | None,
        seed: int,
    ) -> None:
        self.progress("inputs", 0, 5)
        with Runnable(self.original) as runnable:
            try:
                session = Session(runnable, optimize=False)
            except OutOfMemoryError:
                raise
            except RunError as error:
                raise _CannotVerifyError(error.what) from None
            first = (
                self._random_feeds(session, input_shapes, seed)
                if inputs is None
                else self._given_feeds(session, inputs)
            )
            again = session.run(self.feeds[0])
        self.not_compared = tuple(
            name for name in first if self._is_random(first[name], again.get(name))
        )

    def _is_random(self, first: NDArray[Any], again: NDArray[Any] | None) -> bool:
        if again is None:
            return True
        found = comparison.difference([first], [again])
        if not comparison.is_float(first):
            return found.differing > 0
        # A quarter: what reordered sums may cause is no reason to leave an output uncompared.
        return found.max_abs > self._limit(found, str(first.dtype)) / 4

    def _given_feeds(
        self, session: Session, inputs: Iterable[Mapping[str, NDArray[Any]]]
    ) -> Arrays:
        self.feeds = [specs.fit_inputs(session.inputs, feed) for feed in inputs]
        if not self.feeds:
            raise DataError("no inputs given: the data is empty")
        self.described = f"{len(self.feeds)} given"
        try:
            return session.run(self.feeds[0])
        except RunError as error:
            raise DataError(f"the model does not run on the given inputs: {error.what}") from None

    def _random_feeds(
        self, session: Session, input_shapes: Mapping[str, Sequence[int]] | None, seed: int
    ) -> Arrays:
        given = specs.check_input_shapes(session.inputs, input_shapes)
        self.random = True
        try:
            outputs, feed, size = first_that_runs(session, given, seed)
        except ModelError as error:
            # Also inputs of types that no random numbers are made for: sequences, float8.
            raise _CannotVerifyError(error.what) from None
        self.feeds = [feed]
        second = second_feed(session, given, size, seed, feed)
        if second is not None:
            self.feeds.append(second)
        guessed = size != 0
        shapes = dict.fromkeys(describe_feed(feed) for feed in self.feeds)
        self.described = f"{len(self.feeds)} random: " + " and ".join(shapes)
        if guessed:
            self.described += " (unknown sizes chosen)"
        if any(
            comparison.is_float(array) and not np.isfinite(as_float(array)).all()
            for array in outputs.values()
        ):
            self.warnings.append("some outputs of the input model are not finite on these inputs")
        return outputs

    # Comparisons ----------------------------------------------------------------------------

    def _compare(self, started: float) -> Verification:
        tensors = [fold.output for fold in self.folds]
        expected_off, expected_folds = self._outputs("reference", self.reference, False, tensors)
        read = [fold.input for fold in self.folds if fold.output in self.affines and fold.input]
        actual_off, actual_folds = self._outputs(
            "candidate", self.candidate, False, list(dict.fromkeys([*tensors, *read]))
        )
        missing = [name for name in expected_off if name not in actual_off]
        if missing:
            raise _SideError(
                f"the candidate network has no output {missing[0]!r}; it has "
                + ", ".join(repr(name) for name in actual_off)
            )
        folds = tuple(self._fold_comparisons(expected_folds, actual_folds))
        failed = [item.fold.output for item in folds if not item.passed]
        overflowing = {name for name in failed if not _all_finite(expected_folds[name])}
        del expected_folds, actual_folds
        expected_on, _ = self._outputs("reference", self.reference, True, ())
        actual_on, _ = self._outputs("candidate", self.candidate, True, ())
        outputs = tuple(
            self._output_comparison(name, expected_off, actual_off, expected_on, actual_on)
            for name in expected_off
            if name not in self.not_compared
        )
        passed: bool | None = all(output.passed for output in outputs)
        reason = None
        if overflowing:
            # Where the reference itself overflows depends on the order of its operations.
            self.warnings.append(f"{min(overflowing)!r} is not finite in the reference network")
        deviating = [name for name in failed if name not in overflowing]
        if deviating and self._rounds():
            self.warnings.append(
                f"{len(deviating)} fold tensors deviate, {deviating[0]!r} first, within what the "
                "network's own quantization rounds away"
            )
        elif deviating:
            # A saturating activation behind a fold can hide what the outputs do not show.
            passed = False
        if not outputs:
            passed, reason = None, "every output differs between two runs of the input model"
        return self._result(started, passed=passed, reason=reason, outputs=outputs, folds=folds)

    def _outputs(
        self, side: str, model: Model, optimize: bool, tensors: Sequence[str]
    ) -> tuple[dict[str, list[NDArray[Any]]], dict[str, list[NDArray[Any]]]]:
        """Graph outputs on all feeds, and the tensors on as many as their size allows."""
        stage = f"{side}, optimizations {'on' if optimize else 'off'}"
        done = (1 if side == "reference" else 2) + (2 if optimize else 0)
        self.progress(stage, done, 5)
        outputs: dict[str, list[NDArray[Any]]] = {}
        inner: dict[str, list[NDArray[Any]]] = {name: [] for name in tensors}
        with _blaming(side, stage, optimize), Runnable(model) as runnable:
            graph_outputs = [value.name for value in model.ir.graph.outputs]
            session = Session(runnable, optimize=optimize, extra_outputs=tensors)
            held = 0
            for feed in self.feeds:
                found = session.run(feed)
                keep = held < _FOLD_TENSOR_BYTES
                for name in tensors:
                    if keep and name in found:
                        inner[name].append(found[name])
                        held += found[name].nbytes
                for name, array in found.items():
                    if name.split("[")[0] in graph_outputs or name in graph_outputs:
                        outputs.setdefault(name, []).append(array)
        return outputs, inner

    def _rounds(self) -> bool:
        """Whether the network rounds inside, so that a last bit may become a whole step."""
        rounding = {"QuantizeLinear", "DynamicQuantizeLinear", "Round", "Floor", "Ceil", "Sign"}
        return any(node.op_type in rounding for node in self.reference.ir.graph)

    def _limit(self, found: Difference, dtype: str) -> float:
        return tolerance_for(dtype, self.tolerance) * found.scale + ABSOLUTE_FLOOR

    def _output_comparison(
        self,
        name: str,
        expected_off: dict[str, list[NDArray[Any]]],
        actual_off: dict[str, list[NDArray[Any]]],
        expected_on: dict[str, list[NDArray[Any]]],
        actual_on: dict[str, list[NDArray[Any]]],
    ) -> OutputComparison:
        reference = expected_off[name]
        off = comparison.difference(reference, actual_off.get(name, []))
        own = comparison.difference(reference, expected_on.get(name, []))
        on = comparison.difference(expected_on.get(name, []), actual_on.get(name, []))
        dtype = self._output_dtype(name, reference[0])
        agreement = comparison.agreement(reference, actual_off.get(name, []))
        is_float = comparison.is_float(reference[0])
        limit = self._limit(off, dtype)
        return OutputComparison(
            name=name,
            dtype=dtype,
            is_float=is_float,
            off=off,
            on=on,
            reference_off_on=own,
            limit=limit if is_float else float(own.differing),
            limit_on=limit + own.max_abs if is_float else float(own.differing),
            top1=agreement.top1 if agreement else None,
            kl=agreement.kl if agreement else None,
        )

    def _output_dtype(self, name: str, array: NDArray[Any]) -> str:
        """The coarsest float type that the output's values went through."""
        if not comparison.is_float(array):
            return str(array.dtype)
        declared = {
            value.name: value.dtype.name.lower()
            for value in self.reference.ir.graph.outputs
            if value.dtype is not None
        }.get(name, str(array.dtype))
        compute = _compute_type(self.reference)
        order = ("bfloat16", "float16")
        return next((kind for kind in order if kind in (declared, compute)), str(array.dtype))

    def _fold_comparisons(
        self, expected: dict[str, list[NDArray[Any]]], actual: dict[str, list[NDArray[Any]]]
    ) -> Iterator[FoldComparison]:
        """Folds in the candidate's execution order."""
        position = {
            value.name: index
            for index, node in enumerate(self.candidate.ir.graph)
            for value in node.outputs
        }
        last = len(position)
        for fold in sorted(self.folds, key=lambda fold: position.get(fold.output, last)):
            left, right = expected[fold.output], actual[fold.output]
            absent = [side for side, found in (("reference", left), ("folded", right)) if not found]
            if absent:
                networks = " and the ".join(absent)
                self.warnings.append(f"tensor {fold.output!r} is not in the {networks} network")
                yield FoldComparison.missing(fold)
            else:
                count = min(len(left), len(right))
                found = self._fold_comparison(fold, left[:count], right[:count])
                yield replace(found, rounding=self._rounding(fold, actual))

    def _rounding(self, fold: Fold, actual: dict[str, list[NDArray[Any]]]) -> RoundingError | None:
        """The fold's own rounding on the first image that it read."""
        affine = self.affines.get(fold.output)
        sources = actual.get(fold.input or "", [])
        results = actual[fold.output]
        if fold.input in self.feeds[0]:
            sources = [np.asarray(self.feeds[0][fold.input])]
        if affine is None or not sources or not results or not results[0].size:
            return None
        found = rounding_error(affine, sources[0][:1], results[0][:1])
        if found is not None and not found.holds:
            self.warnings.append(
                f"the error of {fold.output!r}, {found.measured:.3g}, exceeds its rounding bound"
            )
        return found

    def _fold_comparison(
        self, fold: Fold, expected: list[NDArray[Any]], actual: list[NDArray[Any]]
    ) -> FoldComparison:
        whole = comparison.difference(expected, actual)
        interior: float | None = None
        border: float | None = None
        for left, right in zip(expected, actual, strict=True):
            if left.shape == right.shape:
                inside, edge = comparison.border_split(left, right, fold.reach)
                interior, border = _larger(interior, inside), _larger(border, edge)
        dtype = self._output_dtype(fold.output, expected[0])
        return FoldComparison(
            fold=fold,
            scale=whole.scale,
            max_abs=whole.max_abs,
            interior_abs=interior,
            border_abs=border,
            limit=self._limit(whole, dtype),
        )

    def _result(
        self,
        started: float,
        *,
        passed: bool | None,
        reason: str | None,
        outputs: tuple[OutputComparison, ...] = (),
        folds: tuple[FoldComparison, ...] = (),
    ) -> Verification:
        return Verification(
            passed=passed,
            reason=reason,
            tolerance=tolerance_for("float32", self.tolerance),
            inputs=self.described,
            shapes=tuple({name: a.shape for name, a in feed.items()} for feed in self.feeds),
            random_inputs=self.random,
            outputs=outputs,
            folds=folds,
            not_compared=self.not_compared,
            warnings=tuple(dict.fromkeys(self.warnings)),
            seconds=time.perf_counter() - started,
        )


class _SideError(Exception):
    """One of the two networks cannot be run although the original can."""


@contextlib.contextmanager
def _blaming(side: str, stage: str, optimized: bool) -> Iterator[None]:
    try:
        yield
    except OutOfMemoryError:
        raise
    except RunError as error:
        what = f"{side} network ({stage}): {error.what}"
        if side == "reference" and optimized:
            # It ran as it is: what onnxruntime's optimizations do to it is no fold's fault.
            raise _CannotVerifyError(what) from None
        raise _SideError(what) from None


def _all_finite(arrays: Sequence[NDArray[Any]]) -> bool:
    return all(
        not comparison.is_float(array) or bool(np.isfinite(as_float(array)).all())
        for array in arrays
    )


def _larger(left: float | None, right: float | None) -> float | None:
    if left is None or right is None:
        return right if left is None else left
    return max(left, right)


def _compute_type(model: Model) -> str | None:
    """The coarsest half-precision type of weights that are used as they are, None if none is."""
    kinds = set()
    for value in model.ir.graph.initializers.values():
        if value.dtype is not None and value.dtype.name in ("FLOAT16", "BFLOAT16"):
            users = {usage.node.op_type for usage in value.uses()}
            if users - {"Cast", "DequantizeLinear"}:
                kinds.add(value.dtype.name.lower())
    return next((kind for kind in ("bfloat16", "float16") if kind in kinds), None)

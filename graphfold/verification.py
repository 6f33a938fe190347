"""What a verification found: values only, nothing here runs a model."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from graphfold.bounds import RoundingError
    from graphfold.comparison import Difference
    from graphfold.rewrite import Fold


@dataclass(frozen=True)
class OutputComparison:
    """One graph output in both networks.

    Attributes:
        name: of the output.
        dtype: element type that the tolerance was chosen for.
        is_float: compared by error; otherwise by the number of values that differ.
        off, on: candidate against reference, onnxruntime's optimizations off / on in both.
        reference_off_on: the reference against itself, optimizations off / on.
        limit, limit_on: largest accepted absolute error (number of differing values).
        top1, kl: for [N, classes] outputs, else None.
    """

    name: str
    dtype: str
    is_float: bool
    off: Difference
    on: Difference
    reference_off_on: Difference
    limit: float
    limit_on: float
    top1: float | None = None
    kl: float | None = None

    @property
    def passed_off(self) -> bool:
        """Whether the comparison without optimizations is within its limit."""
        return self._measure(self.off) <= self.limit

    @property
    def passed_on(self) -> bool:
        """Whether the comparison with optimizations is within its limit."""
        return self._measure(self.on) <= self.limit_on

    @property
    def passed(self) -> bool:
        """Whether both comparisons are within their limits."""
        return self.passed_off and self.passed_on

    def _measure(self, found: Difference) -> float:
        if self.is_float or math.isinf(found.max_abs):
            return found.max_abs
        return float(found.differing)

    def describe_failure(self) -> str:
        """What is out of tolerance, as one clause."""
        found, limit, mode = self.off, self.limit, "off"
        if self.passed_off:
            found, limit, mode = self.on, self.limit_on, "on"
        if math.isinf(found.max_abs):
            what = "differs in shape or in where it is not finite"
        elif self.is_float:
            what = f"differs by {found.max_abs:.3g}, accepted are {limit:.3g}"
        else:
            what = f"differs in {found.differing} of {found.total} values"
        return f"output {self.name!r} {what} (onnxruntime's optimizations {mode})"

    def to_json(self) -> dict[str, Any]:
        """As a JSON object; infinite errors are null."""
        found = {
            "name": self.name,
            "dtype": self.dtype,
            "passed": self.passed,
            "scale": number(self.off.scale),
            "max_abs": number(self.off.max_abs),
            "mean_abs": number(self.off.mean_abs),
            "max_rel": number(self.off.max_rel),
            "limit": number(self.limit),
            "optimized_max_abs": number(self.on.max_abs),
            "optimized_limit": number(self.limit_on),
            "reference_off_on": number(self.reference_off_on.max_abs),
        }
        if not self.is_float:
            found |= {"differing": self.off.differing, "values": self.off.total}
        if self.top1 is not None:
            found |= {"top1_agreement": self.top1, "kl": number(self.kl)}
        return found


@dataclass(frozen=True)
class FoldComparison:
    """One fold's output tensor in both networks, optimizations off; errors are absolute.

    `interior_abs` and `border_abs` are None where there is no such part; all errors are None
    where the tensor is missing in one of the networks.
    """

    fold: Fold
    scale: float | None
    max_abs: float | None
    interior_abs: float | None
    border_abs: float | None
    limit: float | None
    rounding: RoundingError | None = None

    @classmethod
    def missing(cls, fold: Fold) -> FoldComparison:
        """A fold whose output tensor one of the networks does not have."""
        return cls(fold, None, None, None, None, None)

    @property
    def passed(self) -> bool:
        """False where the error is over the limit; a missing tensor shows nothing."""
        return self.max_abs is None or self.limit is None or self.max_abs <= self.limit

    def relative(self, error: float | None) -> float | None:
        """An error over the tensor's own scale max|y|."""
        if error is None or self.scale is None:
            return None
        return error / self.scale if self.scale > 0 else error

    def to_json(self) -> dict[str, Any]:
        """Errors relative to the tensor's scale; infinite ones are null."""
        return {
            "output": self.fold.output,
            "passed": self.passed,
            "scale": number(self.scale),
            "max_error": number(self.relative(self.max_abs)),
            "interior_max": number(self.relative(self.interior_abs)),
            "border_max": number(self.relative(self.border_abs)),
            "bound": number(self.relative(self.rounding.bound)) if self.rounding else None,
            "estimate": number(self.relative(self.rounding.estimate)) if self.rounding else None,
            "rounding": number(self.relative(self.rounding.measured)) if self.rounding else None,
        }


@dataclass(frozen=True)
class Verification:
    """Outcome of `verify`.

    Attributes:
        passed: None where the original itself cannot be run here; `reason` then says why.
        reason: why there is no comparison, or why one of the networks could not be run.
        tolerance: the float32 tolerance in use, relative to max|y|.
        inputs: what the networks were run on, in words.
        shapes: input shapes of each feed.
        random_inputs: whether the inputs were made up.
        outputs: one comparison per compared graph output.
        folds: one comparison per fold, in execution order.
        not_compared: outputs that differ between two runs of the original.
        warnings: what was noticed and does not fail the verification.
        seconds: time spent.
    """

    passed: bool | None
    reason: str | None
    tolerance: float
    inputs: str
    shapes: tuple[dict[str, tuple[int, ...]], ...]
    random_inputs: bool
    outputs: tuple[OutputComparison, ...]
    folds: tuple[FoldComparison, ...]
    not_compared: tuple[str, ...]
    warnings: tuple[str, ...]
    seconds: float

    @property
    def worst(self) -> OutputComparison | None:
        """The output with the largest error relative to its scale."""
        return max(self.outputs, key=lambda item: item.off.max_rel, default=None)

    @property
    def max_abs(self) -> float | None:
        """Largest absolute error of all outputs, optimizations off."""
        return max((item.off.max_abs for item in self.outputs), default=None)

    @property
    def mean_abs(self) -> float | None:
        """Largest mean absolute error of all outputs."""
        return max((item.off.mean_abs for item in self.outputs), default=None)

    @property
    def max_rel(self) -> float | None:
        """Largest error relative to an output's own scale."""
        return self.worst.off.max_rel if self.worst else None

    @property
    def first_failing_fold(self) -> FoldComparison | None:
        """The first fold, in execution order, whose tensor deviates."""
        return next((item for item in self.folds if not item.passed), None)

    def failure(self) -> str | None:
        """What failed, the first fold to blame, and the line that avoids it; None if passed."""
        if self.passed is not False:
            return None
        failed = [item for item in self.outputs if not item.passed]
        blame = self.first_failing_fold
        if not failed and blame is not None:
            return f"the outputs agree, and a fold does not: {_describe_fold(blame)}"
        if not failed:
            return self.reason or "verification failed"
        worst = max(failed, key=lambda item: item.off.max_rel)
        text = worst.describe_failure()
        if len(failed) > 1:
            text += f"; {len(failed) - 1} more outputs are out of tolerance"
        if blame is not None:
            text += f"; first deviation: {_describe_fold(blame)}"
        elif self.folds:
            text += "; no fold's own tensor is out of tolerance"
        return text

    def to_json(self) -> dict[str, Any]:
        """As a JSON object: the four fields of the contract, and all that is known beside."""
        return {
            "passed": self.passed,
            "reason": self.reason,
            "max_abs": number(self.max_abs),
            "mean_abs": number(self.mean_abs),
            "max_rel": number(self.max_rel),
            "tolerance": self.tolerance,
            "inputs": self.inputs,
            "input_shapes": [{k: list(v) for k, v in feed.items()} for feed in self.shapes],
            "worst": self.worst.name if self.worst else None,
            "outputs": [item.to_json() for item in self.outputs],
            "folds": [item.to_json() for item in self.folds],
            "not_compared": list(self.not_compared),
            "warnings": list(self.warnings),
            "failure": self.failure(),
        }


def _describe_fold(item: FoldComparison) -> str:
    fold = item.fold
    assert item.max_abs is not None
    where = f"tensor {fold.output!r} (pass {fold.pass_name}"
    where += f", plan {fold.segment})" if fold.segment else ")"
    error = item.relative(item.max_abs)
    assert error is not None
    parts = f"{where} by {error:.3g} of its scale"
    if item.border_abs is not None and item.interior_abs is not None:
        parts += (
            f" (interior {item.relative(item.interior_abs):.3g},"
            f" border {item.relative(item.border_abs):.3g})"
        )
    remedy = f"--skip-pass {fold.pass_name}"
    if fold.segment:
        remedy = f"remove {fold.segment} from the plan or use {remedy}"
    return f"{parts}; to avoid it: {remedy}"


def number(value: float | None) -> float | None:
    """A float that JSON can carry: None for infinities and NaN."""
    if value is None or not math.isfinite(value):
        return None
    return value

"""What is asserted of one model of the campaign.

`optimize` through files and in memory; then, with nothing of graphfold but the random inputs: the
result loads, is valid and has the interface of the input, gives the same outputs, and optimizing
it again, or optimizing the input again, gives the same bytes.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort

import graphfold
from corpus.cases import Case, Feed
from graphfold import feeds as random_feeds
from graphfold.errors import DataError, GraphfoldError
from graphfold.model import load, save
from graphfold.runtime import RunError, Runnable, Session

Say = Callable[[str], None]

ABSOLUTE_FLOOR = 1e-6
# Unit roundoffs of the coarsest type that values pass through, times 32; 1e-4 for float32.
_TOLERANCES = {
    onnx.TensorProto.FLOAT16: 32 * 2.0**-11,
    onnx.TensorProto.BFLOAT16: 32 * 2.0**-8,
}


@dataclass
class Outcome:
    """What one model came to.

    Attributes:
        compared: "onnxruntime", "reference" (onnx's evaluator), or "" where neither runs it.
        problems: what is wrong; empty for a model that passes.
        before, after: nodes of the main graph.
        refused: the message where graphfold refuses a model that the checker refuses too.
        differs: largest difference of outputs, relative to the limit.
    """

    name: str
    part: str
    compared: str = ""
    problems: list[str] = field(default_factory=list)
    before: int = 0
    after: int = 0
    refused: str = ""
    differs: float = 0.0

    @property
    def changed(self) -> bool:
        return self.before != self.after


def examine(case: Case, say: Say, *, run: bool = True) -> Outcome:
    """Check one case; `say` hears the stage about to begin, so that a crash has a place.

    Args:
        case: the model and how to run it.
        say: called with "input" before the input model runs for the first time.
        run: False where running the input model ends the process.
    """
    outcome = Outcome(case.name, case.part)
    before = _proto(case)
    outcome.before = len(before.graph.node)
    valid = _checker(before)
    say("input")
    runner = _runner(case, before) if run else None
    say("optimize")
    with tempfile.TemporaryDirectory() as folder:
        try:
            written = _optimize(case, runner, Path(folder), outcome)
        except GraphfoldError as error:
            if valid is None:
                outcome.problems.append(f"{type(error).__name__}: {error}")
            else:
                outcome.refused = str(error)
            return outcome
    say("check")
    after = onnx.load_from_string(written)
    outcome.after = len(after.graph.node)
    if valid is None and (found := _checker(after)) is not None:
        outcome.problems.append(f"not valid: {found}")
    outcome.problems += interface_differences(before, after)
    if runner is not None:
        outcome.compared = runner.kind
        outcome.problems += runner.compare(before, after, outcome)
    return outcome


def _proto(case: Case) -> onnx.ModelProto:
    if isinstance(case.model, Path):
        return onnx.load(case.model)
    return onnx.load_from_string(case.model)


def _checker(model: onnx.ModelProto) -> str | None:
    """What the checker has against a model, in one line."""
    try:
        onnx.checker.check_model(model, full_check=True)
    except Exception as error:  # noqa: BLE001 - the checker raises several types
        return str(error).strip().splitlines()[0]
    return None


def _optimize(case: Case, runner: Runner | None, folder: Path, outcome: Outcome) -> bytes:
    """Bytes of the optimized model; what is not the same each time becomes a problem."""
    source = case.model
    if isinstance(source, bytes):
        source = folder / "in.onnx"
        source.write_bytes(case.model)  # type: ignore[arg-type]
    feeds = runner.tensor_feeds() if runner is not None else None

    def optimized(model: Any, name: str, verify: bool = False) -> bytes:
        options: dict[str, Any] = {"allow_growth": case.allow_growth, "verify": verify}
        try:
            result = graphfold.optimize(model, inputs=feeds if verify else None, **options)
        except DataError:
            # onnxruntime refuses to run the model on the inputs that come with it.
            result = graphfold.optimize(model, **options)
        save(result.folded, folder / name)
        return (folder / name).read_bytes()

    first = optimized(source, "first.onnx", verify=runner is not None)
    memory = source.read_bytes()
    if optimized(memory, "memory.onnx") != first:
        outcome.problems.append("not deterministic: other bytes in memory than through files")
    if optimized(folder / "first.onnx", "again.onnx") != first:
        outcome.problems.append("not idempotent: " + _what_changed(folder))
    return first


def _what_changed(folder: Path) -> str:
    first, again = (onnx.load(folder / f"{name}.onnx") for name in ("first", "again"))
    one, two = (" ".join(node.op_type for node in model.graph.node) for model in (first, again))
    return f"{one[:200]} -> {two[:200]}" if one != two else "same nodes, other fields"


def interface_differences(before: onnx.ModelProto, after: onnx.ModelProto) -> list[str]:
    """What a caller would see changed: inputs, outputs, versions, functions, metadata."""
    problems = []
    for kind in ("input", "output"):
        one, two = (list(getattr(model.graph, kind)) for model in (before, after))
        if [item.name for item in one] != [item.name for item in two]:
            problems.append(f"{kind}s are {[item.name for item in two]}")
        elif one != two:
            problems.append(f"types of {kind}s differ")
    fields = ("ir_version", "domain", "model_version", "doc_string", "producer_name")
    fields += ("opset_import", "functions", "training_info")
    problems += [
        f"{kind} differs" for kind in fields if getattr(before, kind) != getattr(after, kind)
    ]
    metadata = {item.key: item.value for item in after.metadata_props}
    if any(metadata.get(item.key) != item.value for item in before.metadata_props):
        problems.append("metadata is lost")
    return problems


# --- running ----------------------------------------------------------------------------------


class Runner:
    """Runs a model on fixed feeds; a model that it cannot run raises at once."""

    kind = ""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.feeds: list[Feed] = case.feeds

    def outputs(self, model: onnx.ModelProto, optimize: bool) -> list[list[Any]]:
        """Outputs per feed."""
        raise NotImplementedError

    def tensor_feeds(self) -> list[Feed] | None:
        """The feeds, where `optimize` can take them."""
        values = [value for feed in self.feeds for value in feed.values()]
        arrays = all(
            isinstance(value, np.ndarray) and value.dtype.type.__module__ == "numpy"
            for value in values
        )
        return self.feeds if values and arrays else None

    def compare(
        self, before: onnx.ModelProto, after: onnx.ModelProto, outcome: Outcome
    ) -> list[str]:
        """Differences of outputs beyond the tolerance."""
        tolerance = _tolerance(before)
        names = [item.name for item in before.graph.output]
        expected = self.outputs(before, False)
        again = self.outputs(before, False)
        try:
            actual = self.outputs(after, False)
        except Exception as error:  # noqa: BLE001 - any failure to run is a finding
            return [f"the result does not run: {_line(error)}"]
        slack = _random_outputs(expected, again)
        problems = _differences(names, expected, actual, tolerance, slack, outcome)
        if self.kind != "onnxruntime":
            return problems
        try:
            optimized = self.outputs(before, True)
        except Exception:  # noqa: BLE001 - the runtime's optimizations cannot take the input
            return problems
        own = {name: _largest(expected, optimized, index) for index, name in enumerate(names)}
        try:
            result = self.outputs(after, True)
        except Exception as error:  # noqa: BLE001 - any failure to run is a finding
            return [*problems, f"with onnxruntime's optimizations: {_line(error)}"]
        for problem in _differences(names, optimized, result, tolerance, slack, outcome, own):
            problems.append(f"with onnxruntime's optimizations: {problem}")
        return problems


class RuntimeRunner(Runner):
    """onnxruntime."""

    kind = "onnxruntime"

    def __init__(self, case: Case, model: onnx.ModelProto) -> None:
        super().__init__(case)
        if not self.feeds:
            self.feeds = _random(model)
        self.outputs(model, False)

    def outputs(self, model: onnx.ModelProto, optimize: bool) -> list[list[Any]]:
        session = _session(model, optimize)
        known = {item.name for item in session.get_inputs()}
        known |= {item.name for item in session.get_overridable_initializers()}
        return [
            session.run(None, {name: value for name, value in feed.items() if name in known})
            for feed in self.feeds
        ]


class EvaluatorRunner(Runner):
    """The reference evaluator of the onnx package."""

    kind = "reference"

    def __init__(self, case: Case, model: onnx.ModelProto) -> None:
        super().__init__(case)
        if not self.feeds:
            raise ValueError("no inputs are stored")
        self._wrong = set()
        for expected, actual in zip(case.expected, self.outputs(model, False), strict=True):
            for index, (one, two) in enumerate(zip(expected, actual, strict=False)):
                if _excess(one, two, case.tolerance) > 1:
                    self._wrong.add(index)

    def outputs(self, model: onnx.ModelProto, optimize: bool) -> list[list[Any]]:
        del optimize
        from onnx.reference import ReferenceEvaluator

        evaluator = ReferenceEvaluator(model)
        return [evaluator.run(None, feed) for feed in self.feeds]

    def compare(
        self, before: onnx.ModelProto, after: onnx.ModelProto, outcome: Outcome
    ) -> list[str]:
        problems = super().compare(before, after, outcome)
        if problems:
            return problems
        for expected, actual in zip(self.case.expected, self.outputs(after, False), strict=True):
            for index, (one, two) in enumerate(zip(expected, actual, strict=False)):
                if index not in self._wrong and _excess(one, two, self.case.tolerance) > 1:
                    problems.append(f"output {index} is not the stored one")
        return problems


def _runner(case: Case, model: onnx.ModelProto) -> Runner | None:
    """What can run the input model."""
    for kind in (RuntimeRunner, EvaluatorRunner):
        try:
            return kind(case, model)
        except Exception:  # noqa: BLE001 - each raises types of its own
            continue
    return None


def _session(model: onnx.ModelProto, optimize: bool) -> Any:
    options = ort.SessionOptions()
    level = ort.GraphOptimizationLevel
    options.graph_optimization_level = level.ORT_ENABLE_ALL if optimize else level.ORT_DISABLE_ALL
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4
    return ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def _random(model: onnx.ModelProto) -> list[Feed]:
    """Random inputs at one or two sizes that the model runs."""
    with Runnable(load(model.SerializeToString(), check=False)) as runnable:
        session = Session(runnable, optimize=False)
        try:
            _, feed, size = random_feeds.first_that_runs(session, {}, 0)
        except RunError as error:
            raise ValueError(error.what) from None
        second = random_feeds.second_feed(session, {}, size, 0, feed)
    return [dict(feed)] if second is None else [dict(feed), dict(second)]


# --- comparing --------------------------------------------------------------------------------


def _tolerance(model: onnx.ModelProto) -> float:
    """Accepted error relative to max|y|, by the coarsest type in the model."""
    kinds = {tensor.data_type for tensor in model.graph.initializer}
    for info in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        kinds.add(info.type.tensor_type.elem_type)
    for node in model.graph.node:
        kinds |= {item.i for item in node.attribute if item.name == "to"}
        kinds |= {item.t.data_type for item in node.attribute if item.HasField("t")}
    return max([1e-4, *(value for kind, value in _TOLERANCES.items() if kind in kinds)])


def _random_outputs(first: list[list[Any]], again: list[list[Any]]) -> set[int]:
    """Outputs that differ between two runs of the same model."""
    return {
        index
        for one, two in zip(first, again, strict=True)
        for index in range(len(one))
        if _excess(one[index], two[index], 1e-7) > 0.25
    }


def _largest(one: list[list[Any]], two: list[list[Any]], index: int) -> float:
    """Largest finite difference of an output: absolute for floats, a count for the others."""
    return max(_distance(a[index], b[index]) for a, b in zip(one, two, strict=True))


def _differences(
    names: Sequence[str],
    expected: list[list[Any]],
    actual: list[list[Any]],
    tolerance: float,
    skipped: set[int],
    outcome: Outcome,
    own: Mapping[str, float] | None = None,
) -> list[str]:
    problems = []
    for feed, (one, two) in enumerate(zip(expected, actual, strict=True)):
        for index, name in enumerate(names):
            if index in skipped:
                continue
            slack = 0.0 if own is None else own[name]
            excess = _excess(one[index], two[index], tolerance, slack)
            outcome.differs = max(outcome.differs, min(excess, 1e6))
            if excess > 1:
                problems.append(f"output {name!r} differs on feed {feed}: {excess:.3g} x the limit")
    return problems


def _leaves(value: Any) -> Iterator[np.ndarray | None]:
    """Arrays of a tensor, sequence, map or optional."""
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from _leaves(item)
    elif isinstance(value, dict):
        for key, item in value.items():
            yield np.asarray(key)
            yield from _leaves(item)
    else:
        yield None if value is None else np.asarray(value)


def _pairs(one: Any, two: Any) -> Iterator[tuple[np.ndarray, np.ndarray]] | None:
    left, right = list(_leaves(one)), list(_leaves(two))
    if len(left) != len(right):
        return None
    found = []
    for a, b in zip(left, right, strict=True):
        if (a is None) != (b is None):
            return None
        if a is None or b is None:
            continue
        if a.shape != b.shape or a.dtype != b.dtype:
            return None
        found.append((a, b))
    return iter(found)


def _is_float(array: np.ndarray) -> bool:
    return array.dtype.kind in "fc" or (array.dtype.kind == "V" and "float" in str(array.dtype))


def _distance(one: Any, two: Any) -> float:
    """Largest difference where both are finite; how many differ where they are no floats."""
    pairs = _pairs(one, two)
    if pairs is None:
        return np.inf
    largest = 0.0
    for a, b in pairs:
        if not _is_float(a):
            largest = max(largest, float(np.count_nonzero(a != b)))
            continue
        wide, other = _wide(a), _wide(b)
        finite = np.isfinite(wide) & np.isfinite(other)
        if finite.any():
            largest = max(largest, float(np.abs(wide[finite] - other[finite]).max()))
    return largest


def _wide(array: np.ndarray) -> np.ndarray:
    return array.astype(np.complex128 if array.dtype.kind == "c" else np.float64)


def _excess(one: Any, two: Any, tolerance: float, slack: float = 0.0) -> float:
    """Difference divided by what is allowed; infinite for another shape, type or special value."""
    pairs = _pairs(one, two)
    if pairs is None:
        return np.inf
    excess = 0.0
    for a, b in pairs:
        if not _is_float(a):
            differing = float(np.count_nonzero(a != b))
            if differing > slack:
                return np.inf
            continue
        wide, other = _wide(a), _wide(b)
        finite = np.isfinite(wide)
        special = np.array_equal(wide[~finite], other[~finite], equal_nan=True)
        if not special or not np.isfinite(other[finite]).all():
            return np.inf
        if finite.any():
            scale = float(np.abs(wide[finite]).max())
            error = float(np.abs(wide[finite] - other[finite]).max())
            excess = max(excess, error / (tolerance * scale + ABSOLUTE_FLOOR + slack))
    return excess


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]

"""The Pass protocol and the PassManager: order, fixed point, statistics, provenance."""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
import json
import pkgutil
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import IntEnum
from typing import Any, ClassVar

import onnx_ir as ir

from graphfold.bounds import Coefficients
from graphfold.errors import NotExactError, UsageError
from graphfold.graph import Graph, node_label
from graphfold.maps import AffineMap
from graphfold.plan import Boundary, nearest
from graphfold.prices import Prices
from graphfold.progress import Progress
from graphfold.resolve import ResolvedPlan

METADATA_PREFIX = "graphfold."
# The last node of a merge carries what it was under this key, for `graphfold verify`.
FOLD_KEY = f"{METADATA_PREFIX}fold"
# Far more than any graph needs: a pass that undoes another's work must not run for ever.
_MOST_SWEEPS = 10_000


class Phase(IntEnum):
    """When a pass runs: PLAN passes build the reference network, FOLD passes merge it."""

    PLAN = 0
    FOLD = 1


@dataclass(frozen=True)
class Fold:
    """One merge that was done: what it produced, from what, and how.

    Attributes:
        output: tensor that holds the merge's result; the reference network has it too.
        replaces: labels of the nodes that became one convolution.
        kernel, strides, groups: of the new convolution, one entry per spatial axis.
        boundary: where padding stood in the reference network.
        repair: how the border was made exact, None where nothing was needed.
        reach: rows at the begin and end of each axis, in output pixels, that padding touches.
        pass_name: the rewrite that did it.
        segment: JSON path of the plan's segment, None for a loose run.
        macs: multiply-accumulates per image of the convolutions before and after; None where
            sizes are not fixed.
        input: tensor that the merge reads.
        coefficients: the input-free part of its rounding bound, see `graphfold.bounds`.
        scope: the subgraph or function that it lies in, None for the main graph.
    """

    output: str
    replaces: tuple[str, ...]
    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    groups: int
    boundary: Boundary
    repair: str | None
    reach: tuple[tuple[int, int], ...]
    pass_name: str
    segment: str | None = None
    macs: tuple[int, int] | None = None
    input: str | None = None
    coefficients: Coefficients | None = None
    scope: str | None = None


@dataclass(frozen=True)
class Skip:
    """A site that a pass looked at and left as it is, with the reason."""

    site: str
    reason: str
    pass_name: str


@dataclass(frozen=True)
class Refused:
    """A candidate that a pass found while looking for others, and why it stays as it is."""

    output: str
    reason: str


@dataclass
class PassStatistics:
    """What one pass did: candidates found, rewritten and skipped, and the time it took."""

    name: str
    found: int = 0
    applied: int = 0
    skipped: list[Skip] = field(default_factory=list)
    folds: list[Fold] = field(default_factory=list)
    seconds: float = 0.0


@dataclass(frozen=True)
class SegmentNames:
    """A plan's segment in the reference network, by tensor names that survive copying."""

    path: str
    input: str
    output: str
    boundary: Boundary
    kernel: tuple[int, ...] | None = None
    family: str | None = None


@dataclass
class Work:
    """What passes work on: the graph, and what the plan says about it.

    Attributes:
        graph: edited in place.
        plan: what PLAN passes apply; values are kept up to date while they do.
        segments: what FOLD passes must turn into one operator each.
        allow_growth: merge loose runs even where cost rises.
        prices: measured latencies; where they know a loose run, they alone decide.
        repair: force one border repair (see `graphfold.emit`), None to choose by cost.
    """

    graph: Graph
    plan: ResolvedPlan = field(default_factory=ResolvedPlan)
    segments: Sequence[SegmentNames] = ()
    allow_growth: bool = False
    repair: str | None = None
    prices: Prices | None = None
    # The folds in float64 by output tensor, where their rounding is going to be measured.
    affines: dict[str, AffineMap] | None = None
    # Bytes of them that may still be held; folds beyond are not measured by themselves.
    affine_room: int = 1 << 30
    # Nodes of segments, and the convolutions they became: loose merges stop there.
    barrier: set[ir.Node] = field(default_factory=set)

    def remember(self, output: str, affine: AffineMap) -> None:
        """Keep a fold in float64 for the measurement of its rounding, where that is wanted."""
        if self.affines is not None and affine.nbytes <= self.affine_room:
            self.affines[output] = affine
            self.affine_room -= affine.nbytes

    def bypass(self, output: ir.Value, source: ir.Value) -> ir.Value:
        """Remove what lies between two tensors; returns the tensor that stands for `output`.

        The plan's tensors follow.
        """
        follows = self.graph.bypass(output, source)
        for segment in self.plan.segments:
            segment.input = follows if segment.input is output else segment.input
            segment.output = follows if segment.output is output else segment.output
        for added in self.plan.added:
            added.value = follows if added.value is output else added.value
        return follows


class Pass(ABC):
    """One rewrite: candidates, a reason to refuse each, and the rewriting itself.

    Subclasses are frozen dataclasses; their typed fields are the pass's options. The module's
    docstring is the theorem: what becomes what, why it is equal, when it is refused.
    """

    name: ClassVar[str]
    phase: ClassVar[Phase]
    # Position within the phase; passes of equal order run by name.
    order: ClassVar[int]

    @abstractmethod
    def find(self, work: Work) -> Iterable[Any]:
        """Candidates, as a list that stays valid while the graph is edited."""

    @abstractmethod
    def label(self, candidate: Any) -> str:
        """How reports call the candidate: a tensor name."""

    def check(self, work: Work, candidate: Any) -> str | None:
        """Why this candidate must be left alone, or None."""
        del work, candidate
        return None

    @abstractmethod
    def rewrite(self, work: Work, candidate: Any) -> Fold | None:
        """Rewrite one candidate that `check` accepted; a Fold where operators were merged.

        Raises:
            NotExactError: what only the numbers tell speaks against it; nothing was changed.
        """


def available_passes() -> dict[str, type[Pass]]:
    """All passes by name: the modules of graphfold.passes, then entry points of third parties."""
    import graphfold.passes as folder

    found: dict[str, type[Pass]] = {}
    for module in pkgutil.iter_modules(folder.__path__):
        loaded = importlib.import_module(f"graphfold.passes.{module.name}")
        found[module.name] = _pass_in(loaded, module.name)
    for entry in importlib.metadata.entry_points(group="graphfold.passes"):
        found[entry.name] = entry.load()
    return dict(sorted(found.items(), key=lambda item: (item[1].phase, item[1].order, item[0])))


def _pass_in(module: Any, name: str) -> type[Pass]:
    for _, member in inspect.getmembers(module, inspect.isclass):
        if issubclass(member, Pass) and getattr(member, "name", None) == name:
            return member
    raise ImportError(f"{module.__name__} defines no Pass named {name!r}")


def select_passes(only: Sequence[str] | None = None, skip: Sequence[str] = ()) -> list[Pass]:
    """Instances of the passes to run, in order.

    PLAN passes always run: they are what a plan means, and do nothing without one.

    Raises:
        UsageError: a name that is no pass, or one that belongs to the plan's meaning.
    """
    known = available_passes()
    problems = []
    for name in (*(only or ()), *skip):
        if name not in known:
            hint = nearest(name, known)
            problems.append(f"there is no pass {name!r}" + (f", {hint}" if hint else ""))
        elif name in skip and known[name].phase is Phase.PLAN:
            problems.append(f"{name} is what the plan means and cannot be skipped")
    if problems:
        raise UsageError("; ".join(problems), hint=f"passes: {', '.join(known)}")
    return [
        cls()
        for name, cls in known.items()
        if cls.phase is Phase.PLAN or (name not in skip and (only is None or name in only))
    ]


def run_passes(
    passes: Sequence[Pass], phase: Phase, work: Work, progress: Progress | None = None
) -> list[PassStatistics]:
    """Run the passes of one phase in order, each to its fixed point.

    What a FOLD pass left may be another's candidate: these run again until none finds anything.
    """
    chosen = [each for each in passes if each.phase is phase]
    statistics = [PassStatistics(each.name) for each in chosen]
    graph, rewrites = work.graph, 0
    # What each pass has seen: without new rewrites or shapes it would find nothing again.
    seen: list[tuple[int, int] | None] = [None] * len(chosen)
    for _ in range(_MOST_SWEEPS):
        before = (rewrites, graph.shapes_version)
        for number, (each, counts) in enumerate(zip(chosen, statistics, strict=True)):
            if seen[number] == (rewrites, graph.shapes_version):
                continue
            if progress is not None:
                progress(each.name, number, len(chosen))
            rewrites += _run_to_fixed_point(each, work, counts)
            seen[number] = (rewrites, graph.shapes_version)
        if phase is not Phase.FOLD:
            return statistics
        settled = before == (rewrites, graph.shapes_version)
        if settled and not (rewrites and graph.has_open_shapes() and graph.refine_shapes()):
            return statistics
    raise RuntimeError(f"the passes {', '.join(each.name for each in chosen)} do not settle")


def _run_to_fixed_point(each: Pass, work: Work, statistics: PassStatistics) -> int:
    """Run one pass, adding to its statistics; returns the number of rewrites."""
    started = time.perf_counter()
    before = statistics.applied
    for _ in range(_MOST_SWEEPS):
        if not _sweep(each, work, statistics):
            break
    else:
        raise RuntimeError(f"the pass {each.name} does not settle")
    statistics.found = statistics.applied + len(statistics.skipped)
    statistics.seconds += time.perf_counter() - started
    return statistics.applied - before


def _sweep(each: Pass, work: Work, statistics: PassStatistics) -> bool:
    """Rewrite every candidate that a pass finds now; whether there was one."""
    changed = False
    # Only the last sweep's skips hold: an earlier rewrite may have made room.
    statistics.skipped = []
    for candidate in each.find(work):
        reason = each.check(work, candidate)
        if reason is not None:
            statistics.skipped.append(Skip(each.label(candidate), reason, each.name))
            continue
        try:
            fold = each.rewrite(work, candidate)
        except NotExactError as error:
            statistics.skipped.append(Skip(each.label(candidate), error.what, each.name))
            continue
        changed = True
        statistics.applied += 1
        if fold is not None:
            statistics.folds.append(fold)
    return changed


def provenance(nodes: Iterable[ir.Node], pass_name: str) -> dict[str, str]:
    """Metadata of a produced node: the nodes it replaces, and the pass.

    Where a replaced node was itself produced by a merge, what that one replaced is listed.
    """
    replaced: dict[str, None] = {}
    for node in nodes:
        earlier = node.metadata_props.get(f"{METADATA_PREFIX}replaces")
        replaced.update(dict.fromkeys(_labels(earlier) or [node_label(node)]))
    return {
        f"{METADATA_PREFIX}replaces": json.dumps(list(replaced)),
        f"{METADATA_PREFIX}pass": pass_name,
    }


def _labels(text: str | None) -> list[str]:
    """The labels in metadata that `provenance` wrote; none in what somebody else wrote there."""
    try:
        found = json.loads(text or "[]")
    except (ValueError, RecursionError):
        return []
    return found if isinstance(found, list) and all(isinstance(x, str) for x in found) else []


def replaced_labels(metadata: Mapping[str, str]) -> tuple[str, ...]:
    """The labels that `provenance` wrote."""
    return tuple(_labels(metadata.get(f"{METADATA_PREFIX}replaces")))


_RECORDED = (
    *("input", "kernel", "strides", "groups", "boundary", "repair", "reach", "segment", "macs"),
)


def fold_record(fold: Fold) -> str:
    """A fold as the JSON that its last node carries under FOLD_KEY."""
    record = {name: getattr(fold, name) for name in _RECORDED}
    if fold.coefficients is not None:
        record["bound"] = asdict(fold.coefficients)
    return json.dumps(record)


def recorded_folds(graph: ir.Graph) -> list[Fold]:
    """The folds that a folded network's metadata tells of, in execution order."""
    folds = []
    for node in graph:
        record = node.metadata_props.get(FOLD_KEY)
        if record is None or not node.outputs[0].name:
            continue
        found = json.loads(record)
        folds.append(
            Fold(
                output=node.outputs[0].name,
                replaces=replaced_labels(node.metadata_props),
                kernel=tuple(found["kernel"]),
                strides=tuple(found["strides"]),
                groups=found["groups"],
                boundary=found["boundary"],
                repair=found["repair"],
                reach=tuple((begin, end) for begin, end in found["reach"]),
                pass_name=node.metadata_props[f"{METADATA_PREFIX}pass"],
                segment=found["segment"],
                macs=None if found["macs"] is None else tuple(found["macs"]),
                input=found["input"],
                coefficients=Coefficients(**found["bound"]) if "bound" in found else None,
            )
        )
    return folds

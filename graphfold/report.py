"""What `optimize` and `inspect` have to tell: values, JSON and tables.

`build_report` and `build_inspection` gather; `Report.to_json` is the command line's contract;
`Report.tables` feeds both the terminal (`print_report`) and the HTML page (`to_html`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from graphfold import tables
from graphfold.cost import Cost, Totals, analyze
from graphfold.fitted import SegmentFit, fits_json, fits_table
from graphfold.graph import Graph
from graphfold.tables import Table, make_table

if TYPE_CHECKING:
    from rich.console import Console

    from graphfold.model import Model
    from graphfold.quantization import Quantized
    from graphfold.repaired import Repaired
    from graphfold.rewrite import Fold, PassStatistics, Skip
    from graphfold.verification import FoldComparison, Verification


@dataclass(frozen=True)
class BlockCost:
    """One block of a network and what it costs."""

    name: str
    kind: str
    cost: Totals


@dataclass(frozen=True)
class Snapshot:
    """A network's figures at one moment; stays valid while the graph is edited on.

    Attributes:
        nodes: number of nodes of the main graph.
        ops: number of nodes per operator.
        activations: number of activation sites.
        cost: of the whole network.
        blocks: costs per block, in execution order.
        block_of: index of the block by tensor, for every named output of a node.
    """

    nodes: int
    ops: dict[str, int]
    activations: int
    cost: Cost
    blocks: tuple[BlockCost, ...] = ()
    block_of: dict[str, int] = field(default_factory=dict)


def snapshot(
    source: Graph | Model,
    *,
    input_shapes: Mapping[str, Sequence[int]] | None = None,
    normalized: Collection[str] = (),
) -> Snapshot:
    """Count what a network holds and costs, see `graphfold.cost.analyze`."""
    from graphfold.segments import activation_sites, blocks

    graph = source if isinstance(source, Graph) else Graph(source)
    cost = analyze(graph, input_shapes=input_shapes, normalized=normalized)
    found = blocks(graph)
    members = [[_first_output(node) for node in block.nodes] for block in found]
    totals = cost.subtotals(members)
    return Snapshot(
        nodes=len(cost.nodes),
        ops=cost.ops,
        activations=len(activation_sites(graph)),
        cost=cost,
        blocks=tuple(
            BlockCost(block.name, block.kind, total)
            for block, total in zip(found, totals, strict=True)
        ),
        block_of={
            value.name: index
            for index, block in enumerate(found)
            for node in block.nodes
            for value in node.outputs
            if value.name
        },
    )


def _first_output(node: Any) -> str:
    return next((value.name for value in node.outputs if value.name), "")


@dataclass(frozen=True)
class BlockChange:
    """One block's MACs and memory traffic before and after."""

    name: str
    macs: tuple[int | None, int | None]
    traffic: tuple[int | None, int | None]


@dataclass(frozen=True)
class Report:
    """Everything `optimize` has to tell.

    Attributes:
        model: path of the input, or None for a model from memory.
        output: path of what was written, None where nothing was.
        plan: path of the plan, None without one.
        plan_digest: sha256 of the plan.
        version: of graphfold.
        before: figures of the input.
        after: figures of the folded network.
        folds: the merges that were done.
        skipped: sites that were left as they are, with the reason.
        statistics: per pass.
        verification: outcome, None where it was not asked for.
        seconds: time per stage.
        quantized: INT8 as the last step, None where the plan does not ask for it.
        repaired: training by the original's answers, None where it was not asked for.
        block_changes: cost per block of the input, before and after.
        warnings: for the user, in order.
        fits: segments whose weights come from data.
    """

    model: str | None
    output: str | None
    plan: str | None
    plan_digest: str | None
    version: str
    before: Snapshot
    after: Snapshot
    folds: tuple[Fold, ...]
    skipped: tuple[Skip, ...]
    statistics: tuple[PassStatistics, ...]
    verification: Verification | None
    seconds: dict[str, float]
    quantized: Quantized | None = None
    repaired: Repaired | None = None
    block_changes: tuple[BlockChange, ...] = ()
    warnings: tuple[str, ...] = ()
    fits: tuple[SegmentFit, ...] = ()

    def op_counts(self) -> dict[str, tuple[int, int]]:
        """Nodes per operator, before and after, most frequent first."""
        both = Counter(self.before.ops)
        both.update(self.after.ops)
        return {
            name: (self.before.ops.get(name, 0), self.after.ops.get(name, 0))
            for name, _ in both.most_common()
        }

    def fold_errors(self) -> dict[str, FoldComparison]:
        """Measured errors by fold output."""
        if self.verification is None:
            return {}
        return {item.fold.output: item for item in self.verification.folds}

    def to_json(self) -> dict[str, Any]:
        """The JSON document of `optimize --json`."""
        before, after = self.before.cost, self.after.cost
        found: dict[str, Any] = {
            "model": self.model,
            "output": self.output,
            "plan": self.plan,
            "plan_digest": self.plan_digest,
            "graphfold": self.version,
            "nodes": _pair(self.before.nodes, self.after.nodes),
            "ops": {name: list(counts) for name, counts in self.op_counts().items()},
            "activations": _pair(self.before.activations, self.after.activations),
            "params": _pair(before.params, after.params),
            "macs": _pair(before.macs, after.macs),
            "macs_fvcore": _pair(before.macs_fvcore, after.macs_fvcore),
            "weight_bytes": _pair(before.weight_bytes, after.weight_bytes),
            "peak_activation_bytes": _pair(before.peak_bytes, after.peak_bytes),
            "traffic_bytes": _pair(before.traffic_bytes, after.traffic_bytes),
            "unknown_sizes": list(before.unknown),
            "fits": fits_json(self.fits),
            "folds": [self._fold_json(fold) for fold in self.folds],
            "skipped": [
                {"site": skip.site, "reason": skip.reason, "pass": skip.pass_name}
                for skip in self.skipped
            ],
            "passes": [_pass_json(item) for item in self.statistics],
            "warnings": list(self.warnings),
            "seconds": self.seconds,
            "distilled": None if self.repaired is None else self.repaired.to_json(),
            "quantized": None if self.quantized is None else self.quantized.to_json(),
        }
        return found | self._verification_json()

    def _fold_json(self, fold: Fold) -> dict[str, Any]:
        measured = self.fold_errors().get(fold.output) if fold.scope is None else None
        errors = measured.to_json() if measured else {}
        return {
            "output": fold.output,
            "replaces": list(fold.replaces),
            "kernel": list(fold.kernel),
            "strides": list(fold.strides),
            "groups": fold.groups,
            "boundary": fold.boundary,
            "repair": fold.repair,
            "pass": fold.pass_name,
            "segment": fold.segment,
            "scope": fold.scope,
            "bound": errors.get("bound"),
            "estimate": errors.get("estimate"),
            "rounding": errors.get("rounding"),
            "max_error": errors.get("max_error"),
            "interior_max": errors.get("interior_max"),
            "border_max": errors.get("border_max"),
        }

    def _verification_json(self) -> dict[str, Any]:
        if self.verification is None:
            return {"verification": None, "reason": "not asked for"}
        if self.verification.passed is None:
            return {"verification": None, "reason": self.verification.reason}
        return {"verification": self.verification.to_json()}

    def tables(self) -> list[Table]:
        """All tables of the report; those without rows are left out."""
        found = [self._summary(), fits_table(self.fits), self._folds(), self._skipped()]
        found.append(self._passes())
        if self.verification is not None and self.verification.outputs:
            found.append(verification_table(self.verification))
        if self.repaired is not None:
            found.append(self.repaired.table())
        if self.quantized is not None:
            found.append(self.quantized.table())
        return [table for table in found if table.rows]

    def _summary(self) -> Table:
        before, after = self.before.cost, self.after.cost
        rows = [
            _count_row("nodes", self.before.nodes, self.after.nodes),
            _count_row("activations", self.before.activations, self.after.activations),
        ]
        rows += [_count_row(name, *pair) for name, pair in self.op_counts().items()]
        rows += [
            _count_row("MACs (conv + fc)", before.macs, after.macs),
            _count_row("MACs (fvcore, train)", before.macs_fvcore, after.macs_fvcore),
            _count_row("parameters", before.params, after.params),
            _size_row("weights", before.weight_bytes, after.weight_bytes),
            _size_row("peak activations", before.peak_bytes, after.peak_bytes),
            _size_row("memory traffic", before.traffic_bytes, after.traffic_bytes),
        ]
        note = None
        if before.unknown:
            note = f"Not counted: {before.unknown[0]}. --input-shape fixes unknown sizes."
        return make_table("Network", ("", "before", "after", "change"), rows, note=note)

    def _folds(self) -> Table:
        measured = self.fold_errors()
        rows = []
        for fold in self.folds:
            item = measured.get(fold.output) if fold.scope is None else None
            rows.append(
                (
                    fold.output if fold.scope is None else f"{fold.output} ({fold.scope})",
                    fold.boundary,
                    fold.repair,
                    str(len(fold.replaces)),
                    tables.kernel(fold.kernel),
                    tables.error(item.relative(item.interior_abs)) if item else None,
                    tables.error(item.relative(item.border_abs)) if item else None,
                )
            )
        columns = ("tensor", "boundary", "repair", "nodes", "kernel", "interior", "border")
        note = "Errors are relative to the tensor's own scale max|y|." if measured else None
        return make_table(f"Folds ({len(self.folds)})", columns, rows, text_columns=3, note=note)

    def _skipped(self) -> Table:
        return skipped_table(self.skipped)

    def _passes(self) -> Table:
        rows = [
            (
                item.name,
                str(item.found),
                str(item.applied),
                str(len(item.skipped)),
                f"{item.seconds:.3f}",
            )
            for item in self.statistics
            if item.found or item.applied or item.skipped
        ]
        return make_table("Passes", ("pass", "found", "applied", "skipped", "seconds"), rows)

    def to_html(self) -> str:
        """The report as one HTML page without external resources."""
        from graphfold.report_html import page

        return page(self)


def _pair(before: int | None, after: int | None) -> dict[str, int | None]:
    return {"before": before, "after": after}


def _pass_json(item: PassStatistics) -> dict[str, Any]:
    return {
        "name": item.name,
        "found": item.found,
        "applied": item.applied,
        "skipped": len(item.skipped),
        "seconds": item.seconds,
    }


def _count_row(name: str, before: int | None, after: int | None) -> tuple[str | None, ...]:
    return (name, tables.count(before), tables.count(after), tables.change(before, after))


def _size_row(name: str, before: int | None, after: int | None) -> tuple[str | None, ...]:
    return (name, tables.size(before), tables.size(after), tables.change(before, after))


def skipped_table(skipped: Iterable[Skip]) -> Table:
    """What was left as it is: one row per reason with the first sites' names."""
    groups = tables.grouped((f"{skip.pass_name}: {skip.reason}", skip.site) for skip in skipped)
    rows = [
        (*reason.split(": ", 1)[::-1], tables.first_names(sites), str(len(sites)))
        for reason, sites in groups
    ]
    total = sum(len(sites) for _, sites in groups)
    columns = ("reason", "pass", "sites", "count")
    return make_table(f"Left as it is ({total})", columns, rows, text_columns=3)


def fold_comparison_table(verification: Verification) -> Table:
    """One row per fold whose tensor was compared, interior and border apart."""
    rows = [
        (
            item.fold.output,
            "ok" if item.passed else "FAILED",
            tables.error(item.relative(item.interior_abs)),
            tables.error(item.relative(item.border_abs)),
        )
        for item in verification.folds
    ]
    note = "Errors are relative to the tensor's own scale max|y|."
    return make_table(
        "Folds", ("tensor", "", "interior", "border"), rows, text_columns=2, note=note
    )


def verification_table(verification: Verification) -> Table:
    """One row per compared output."""
    rows = [
        (
            item.name,
            "ok" if item.passed else "FAILED",
            tables.error(item.off.max_abs) if item.is_float else f"{item.off.differing} differ",
            tables.error(item.off.mean_abs) if item.is_float else None,
            tables.error(item.off.max_rel) if item.is_float else None,
            tables.error(item.limit) if item.is_float else f"{item.limit:.0f}",
            tables.error(item.on.max_abs) if item.is_float else f"{item.on.differing} differ",
            tables.error(item.limit_on) if item.is_float else f"{item.limit_on:.0f}",
            None if item.top1 is None else f"{100 * item.top1:.1f} %",
            tables.error(item.kl),
        )
        for item in verification.outputs
    ]
    columns = (
        *("output", "", "max error", "mean error", "of scale", "accepted"),
        *("optimized", "accepted", "top-1", "KL"),
    )
    note = f"Inputs: {verification.inputs}."
    if verification.worst is not None and len(verification.outputs) > 1:
        note += f" Worst output: {verification.worst.name}."
    if verification.not_compared:
        names = ", ".join(verification.not_compared)
        note += f" Not compared, as they differ from run to run: {names}."
    return make_table("Verification", columns, rows, text_columns=2, note=note)


def build_report(
    before: Graph | Model | Snapshot,
    after: Graph | Model | Snapshot,
    folds: Sequence[Fold],
    skipped: Sequence[Skip],
    statistics: Sequence[PassStatistics],
    verification: Verification | None,
    seconds: Mapping[str, float],
    *,
    quantized: Quantized | None = None,
    repaired: Repaired | None = None,
    model: str | None = None,
    output: str | None = None,
    plan: str | None = None,
    plan_digest: str | None = None,
    version: str = "",
    input_shapes: Mapping[str, Sequence[int]] | None = None,
    warnings: Sequence[str] = (),
    fits: tuple[SegmentFit, ...] = (),
) -> Report:
    """Gather a report.

    Args:
        before: the input; take a `snapshot` of a graph that is going to be edited.
        after: the folded network.
        folds: merges, in order.
        skipped: what was left, in order.
        statistics: per pass.
        verification: None where it was not asked for.
        seconds: per stage.
        quantized: INT8 as the last step.
        repaired: training by the original's answers.
        model: path of the input as the user knows it.
        output: path of what was written.
        plan: path of the plan.
        plan_digest: sha256 of the plan.
        version: of graphfold.
        input_shapes: sizes for the cost figures where the model leaves them open.
        warnings: for the user; the verification's own are added.
        fits: segments whose weights come from data.
    """
    if not isinstance(before, Snapshot):
        before = snapshot(before, input_shapes=input_shapes)
    if not isinstance(after, Snapshot):
        names = _normalized_outputs(before, folds)
        after = snapshot(after, input_shapes=input_shapes, normalized=names)
    return Report(
        model=model,
        output=output,
        plan=plan,
        plan_digest=plan_digest,
        fits=fits,
        version=version,
        before=before,
        after=after,
        folds=tuple(folds),
        skipped=tuple(skipped),
        statistics=tuple(statistics),
        verification=verification,
        seconds=dict(seconds),
        quantized=quantized,
        repaired=repaired,
        block_changes=tuple(_block_changes(before, after)),
        warnings=(*warnings, *(verification.warnings if verification else ())),
    )


def _normalized_outputs(before: Snapshot, folds: Sequence[Fold]) -> set[str]:
    """Outputs of folds that stand for one convolution and its BatchNormalization."""
    kinds = {node.label: node.op_type for node in before.cost.nodes}
    found: set[str] = set()
    for fold in (fold for fold in folds if fold.scope is None):
        replaced = Counter(kinds.get(label) for label in fold.replaces)
        if replaced["Conv"] == 1 and replaced["BatchNormalization"]:
            found.add(fold.output)
    return found


def _block_changes(before: Snapshot, after: Snapshot) -> list[BlockChange]:
    """The folded network's nodes counted in the block of the input that they stand in."""
    members: list[list[str]] = [[] for _ in before.blocks]
    for node in after.cost.nodes:
        index = before.block_of.get(node.output)
        if index is None:
            index = before.block_of.get(node.output.rsplit("/graphfold.", 1)[0])
        if index is not None:
            members[index].append(node.output)
    totals = after.cost.subtotals(members)
    return [
        BlockChange(
            name=block.name,
            macs=(block.cost.macs, total.macs),
            traffic=(block.cost.traffic_bytes, total.traffic_bytes),
        )
        for block, total in zip(before.blocks, totals, strict=True)
    ]


def print_report(report: Report, console: Console) -> None:
    """Draw all tables of a report."""
    for table in report.tables():
        tables.print_table(table, console)

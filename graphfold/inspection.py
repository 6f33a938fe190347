"""What a model holds: interface, cost, blocks, activation sites and convolution sites."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from graphfold import tables
from graphfold.cost import Cost, Totals, analyze
from graphfold.graph import Graph
from graphfold.sizes import resolved_shapes
from graphfold.specs import describe_shape
from graphfold.tables import Table, make_table

if TYPE_CHECKING:
    import onnx_ir as ir

    from graphfold.candidates import Exclusion
    from graphfold.rewrite import Fold, Skip
    from graphfold.runs import Alternative
    from graphfold.segment_tables import InspectedSegment


class ActivationLike(Protocol):
    """What is read of an activation site."""

    @property
    def input(self) -> ir.Value: ...  # noqa: D102

    @property
    def output(self) -> ir.Value: ...  # noqa: D102

    @property
    def kind(self) -> str: ...  # noqa: D102

    @property
    def nodes(self) -> Sequence[ir.Node]: ...  # noqa: D102


class ConvLike(Protocol):
    """What is read of a convolution site."""

    @property
    def conv(self) -> ir.Node: ...  # noqa: D102

    @property
    def nodes(self) -> Sequence[ir.Node]: ...  # noqa: D102

    @property
    def removable(self) -> bool: ...  # noqa: D102

    @property
    def reason(self) -> str | None: ...  # noqa: D102


class BlockLike(Protocol):
    """What is read of a block."""

    @property
    def name(self) -> str: ...  # noqa: D102

    @property
    def kind(self) -> str: ...  # noqa: D102

    @property
    def input(self) -> ir.Value | None: ...  # noqa: D102

    @property
    def output(self) -> ir.Value | None: ...  # noqa: D102

    @property
    def nodes(self) -> Sequence[ir.Node]: ...  # noqa: D102


@dataclass(frozen=True)
class InspectedBlock:
    """One block: where it lies, what it holds, what it costs."""

    name: str
    kind: str
    input: str | None
    output: str | None
    nodes: int
    activations: int
    convs: int
    cost: Totals

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        return {
            "name": self.name,
            "kind": self.kind,
            "input": self.input,
            "output": self.output,
            "nodes": self.nodes,
            "activations": self.activations,
            "convs": self.convs,
        } | self.cost.to_json()


@dataclass(frozen=True)
class Inspection:
    """Everything `inspect` has to tell.

    Attributes:
        model: path, None for a model from memory.
        opset: version of the default operator set.
        ir_version: of the file.
        inputs: name, type and shape of each input.
        outputs: the same of each output.
        sites: activation sites, in execution order.
        conv_sites: convolution sites, in execution order.
        blocks: a partition of all nodes, in execution order.
        cost: of the whole network.
        folded_cost: of the network folded without a plan, None where that was not tried.
        folds: what would fold without a plan, None where that was not tried.
        skipped: what would not, and why.
        segments: what a plan may merge, single convolutions included.
        excluded: why segments reach no further.
        alternatives: what the merges that cost forbids would cost.
    """

    model: str | None
    opset: int
    ir_version: int | None
    inputs: tuple[tuple[str, str, str], ...]
    outputs: tuple[tuple[str, str, str], ...]
    sites: tuple[ActivationLike, ...]
    conv_sites: tuple[ConvLike, ...]
    blocks: tuple[InspectedBlock, ...]
    cost: Cost
    folded_cost: Cost | None = None
    folds: tuple[Fold, ...] | None = None
    skipped: tuple[Skip, ...] = ()
    segments: tuple[InspectedSegment, ...] = ()
    excluded: tuple[Exclusion, ...] = ()
    alternatives: tuple[Alternative, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The JSON document of `inspect --json`."""
        return {
            "model": self.model,
            "opset": self.opset,
            "ir_version": self.ir_version,
            "inputs": [_interface_json(item) for item in self.inputs],
            "outputs": [_interface_json(item) for item in self.outputs],
            "nodes": len(self.cost.nodes),
            "ops": self.cost.ops,
            **self.cost.total.to_json(),
            "unknown_sizes": list(self.cost.unknown),
            "activations": [
                {
                    "output": site.output.name,
                    "input": site.input.name,
                    "kind": site.kind,
                    "nodes": len(site.nodes),
                }
                for site in self.sites
            ],
            "convs": [
                {
                    "output": site.conv.outputs[0].name,
                    "nodes": len(site.nodes),
                    "removable": site.removable,
                    "reason": site.reason,
                }
                for site in self.conv_sites
            ],
            "blocks": [block.to_json() for block in self.blocks],
            "folded": None if self.folded_cost is None else self.folded_cost.total.to_json(),
            "folds": None if self.folds is None else [_fold_json(fold) for fold in self.folds],
            "skipped": [{"site": item.site, "reason": item.reason} for item in self.skipped],
            "alternatives": [item.to_json() for item in self.alternatives],
            "segments": [item.to_json() for item in self.segments],
            "excluded_segments": [
                {"input": item.input, "output": item.output, "reason": item.reason}
                for item in self.excluded
            ],
        }

    def tables(self, *, all_segments: bool = False) -> list[Table]:
        """All tables; those without rows are left out.

        Args:
            all_segments: every segment and every reason, where the short form has the first few.
        """
        from graphfold import segment_tables

        found = [
            self._interface(),
            self._totals(),
            self._blocks(),
            self._activations(),
            self._convs(),
            segment_tables.segment_table(self.segments, whole=all_segments),
            segment_tables.exclusion_table(self.excluded, whole=all_segments),
            *self._foldable(),
            segment_tables.alternatives_table(self.alternatives, whole=all_segments),
        ]
        return [table for table in found if table.rows]

    def _interface(self) -> Table:
        rows = [("input", *item) for item in self.inputs]
        rows += [("output", *item) for item in self.outputs]
        title = f"{self.model or 'model'}: opset {self.opset}, IR version {self.ir_version}"
        return make_table(title, ("", "name", "type", "shape"), rows, text_columns=4)

    def _totals(self) -> Table:
        cost, after = self.cost, self.folded_cost
        figures: list[tuple[str, Callable[[Cost], str | None]]] = [
            ("nodes", lambda each: tables.count(len(each.nodes))),
            ("convolutions", lambda each: tables.count(each.ops.get("Conv", 0))),
            ("MACs (conv + fc)", lambda each: tables.count(each.macs)),
            ("parameters", lambda each: tables.count(each.params)),
            ("weights", lambda each: tables.size(each.weight_bytes)),
            ("peak activations", lambda each: tables.size(each.peak_bytes)),
            ("memory traffic", lambda each: tables.size(each.traffic_bytes)),
        ]
        rows = [
            (name, figure(cost), None if after is None else figure(after))
            for name, figure in figures
        ]
        rows.insert(4, ("MACs (fvcore, train)", tables.count(cost.macs_fvcore), None))
        note = None
        if cost.unknown:
            note = f"Not counted: {cost.unknown[0]}. --input-shape fixes unknown sizes."
        columns = ("", "now", "folded without a plan")
        return make_table("Totals, one image", columns, rows, note=note)

    def _blocks(self) -> Table:
        rows = [
            (
                block.name,
                block.kind,
                str(block.nodes),
                str(block.activations),
                tables.count(block.cost.macs),
                tables.count(block.cost.params),
                tables.size(block.cost.weight_bytes),
                tables.size(block.cost.peak_bytes),
                tables.size(block.cost.traffic_bytes),
            )
            for block in self.blocks
        ]
        columns = (
            *("block, by its output", "kind", "nodes", "acts", "MACs", "params"),
            *("weights", "peak", "traffic"),
        )
        note = "A plan's segment names a block's input and output: --json has both."
        return make_table(f"Blocks ({len(rows)})", columns, rows, text_columns=2, note=note)

    def _activations(self) -> Table:
        groups = tables.grouped((site.kind, site.output.name or "") for site in self.sites)
        rows = [(kind, tables.first_names(names), str(len(names))) for kind, names in groups]
        title = f"Activation sites ({len(self.sites)})"
        return make_table(title, ("kind", "output tensors", "count"), rows, text_columns=2)

    def _convs(self) -> Table:
        groups = tables.grouped(
            (
                "possible" if site.removable else f"not possible: {site.reason}",
                site.conv.outputs[0].name or "",
            )
            for site in self.conv_sites
        )
        rows = [(reason, tables.first_names(names), str(len(names))) for reason, names in groups]
        title = f"Convolution sites ({len(self.conv_sites)})"
        return make_table(title, ("removing it", "output tensors", "count"), rows, text_columns=2)

    def _foldable(self) -> list[Table]:
        if self.folds is None:
            return []
        from graphfold.report import skipped_table

        rows = [
            (fold.output, fold.pass_name, str(len(fold.replaces)), tables.kernel(fold.kernel))
            for fold in self.folds
        ]
        columns = ("tensor", "pass", "nodes", "kernel")
        folds = make_table(f"Folds without a plan ({len(rows)})", columns, rows, text_columns=2)
        return [folds, skipped_table(self.skipped)]


def _interface_json(item: tuple[str, str, str]) -> dict[str, str]:
    name, kind, shape = item
    return {"name": name, "type": kind, "shape": shape}


def _fold_json(fold: Fold) -> dict[str, Any]:
    return {
        "output": fold.output,
        "replaces": list(fold.replaces),
        "kernel": list(fold.kernel),
        "pass": fold.pass_name,
    }


def build_inspection(
    graph: Graph,
    *,
    model: str | None = None,
    sites: Sequence[ActivationLike] | None = None,
    conv_sites: Sequence[ConvLike] | None = None,
    blocks: Sequence[BlockLike] | None = None,
    input_shapes: Mapping[str, Sequence[int]] | None = None,
    folded: Graph | None = None,
    folds: Sequence[Fold] | None = None,
    skipped: Sequence[Skip] = (),
    alternatives: Sequence[Alternative] = (),
) -> Inspection:
    """Gather an inspection; sites and blocks are found here where they are not given.

    Args:
        graph: the network; not changed.
        model: its path as the user knows it.
        sites: activation sites.
        conv_sites: convolution sites.
        blocks: a partition of all nodes.
        input_shapes: sizes for the cost figures where the model leaves them open.
        folded: the network folded without a plan, None where that was not tried.
        folds: what would fold without a plan, None where that was not tried.
        skipped: what would not, and why.
        alternatives: what the merges that cost forbids would cost.
    """
    from graphfold import segments
    from graphfold.candidates import find_candidates
    from graphfold.segment_tables import inspect_segments

    sites = segments.activation_sites(graph) if sites is None else sites
    conv_sites = segments.conv_sites(graph) if conv_sites is None else conv_sites
    blocks = segments.blocks(graph) if blocks is None else blocks
    shapes = resolved_shapes(graph, input_shapes)
    cost = analyze(graph, shapes)
    candidates = find_candidates(graph)
    return Inspection(
        model=model,
        opset=graph.opset,
        ir_version=graph.model.ir.ir_version,
        inputs=tuple(_interface(value) for value in graph.ir.inputs if not value.is_initializer()),
        outputs=tuple(_interface(value) for value in graph.ir.outputs),
        sites=tuple(sites),
        conv_sites=tuple(conv_sites),
        blocks=tuple(_inspected_blocks(blocks, sites, conv_sites, cost)),
        cost=cost,
        folded_cost=None if folded is None else analyze(folded, input_shapes=input_shapes),
        folds=None if folds is None else tuple(folds),
        skipped=tuple(skipped),
        segments=inspect_segments(candidates, cost, shapes),
        excluded=candidates.excluded,
        alternatives=tuple(alternatives),
    )


def _interface(value: ir.Value) -> tuple[str, str, str]:
    kind = "?" if value.dtype is None else value.dtype.name.lower()
    if value.shape is None:
        return value.name or "", kind, "?"
    sizes = [size if isinstance(size, int) else size.value for size in value.shape]
    return value.name or "", kind, describe_shape(sizes)


def _inspected_blocks(
    blocks: Sequence[BlockLike],
    sites: Sequence[ActivationLike],
    conv_sites: Sequence[ConvLike],
    cost: Cost,
) -> Iterable[InspectedBlock]:
    activations = {site.output.producer() for site in sites}
    convs = {site.conv for site in conv_sites}
    members = [
        [next((value.name for value in node.outputs if value.name), "") for node in block.nodes]
        for block in blocks
    ]
    for block, total in zip(blocks, cost.subtotals(members), strict=True):
        yield InspectedBlock(
            name=block.name,
            kind=block.kind,
            input=block.input.name if block.input is not None else None,
            output=block.output.name if block.output is not None else None,
            nodes=len(block.nodes),
            activations=sum(node in activations for node in block.nodes),
            convs=sum(node in convs for node in block.nodes),
            cost=total,
        )

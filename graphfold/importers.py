"""The papers' own plan forms, expanded on a graph into plain segments and removals.

`keep_blocks` is DepthShrinker's list (one state per inverted-residual block); `act_ind` and
`conv_ind` are LayerMerge's sets over convolutions numbered in execution order. Both come out as
an ordinary plan in the model's own tensor names: importers add no semantics.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import onnx_ir as ir

from graphfold.errors import PlanError, Problem
from graphfold.graph import Graph, is_op, nodes_between, only_consumer
from graphfold.linear import is_join
from graphfold.norms import find_norms
from graphfold.plan import Activation, AddedActivation, Boundary, Plan, Segment
from graphfold.segments import (
    InvertedResidual,
    inverted_residuals,
    main_path_convs,
    whole_branch_end,
)
from graphfold.sites import ActivationSite, ConvSite, Sites


@dataclass(frozen=True)
class Expanded:
    """A plan without short forms, and where each of its segments stands in the user's plan."""

    plan: Plan
    paths: tuple[str, ...]


def expand_short_forms(graph: Graph, sites: Sites, plan: Plan) -> Expanded:
    """The same plan with `keep_blocks` or `act_ind`/`conv_ind` written out as segments.

    Raises:
        PlanError: the list does not fit the blocks or convolutions found on the graph.
    """
    if plan.keep_blocks is not None:
        return _expand_keep_blocks(graph, sites, plan, plan.keep_blocks)
    if plan.act_ind is not None and plan.conv_ind is not None:
        return _expand_index_sets(graph, sites, plan, plan.act_ind, plan.conv_ind)
    return Expanded(plan, tuple(f"segments[{n}]" for n in range(len(plan.segments))))


def _written_out(
    plan: Plan,
    segments: dict[str, Segment],
    activations: Iterable[str] = (),
    convs: Iterable[str] = (),
    added: Iterable[AddedActivation] = (),
) -> Expanded:
    written = Plan(
        graphfold_plan=1,
        model=plan.model,
        segments=list(segments.values()),
        remove_activations=[*plan.remove_activations, *activations],
        remove_convs=[*plan.remove_convs, *convs],
        add_activations=[*plan.add_activations, *added],
        quantize=plan.quantize,
        objective=plan.objective,
    )
    return Expanded(written, tuple(segments))


# --- DepthShrinker ----------------------------------------------------------------------------


def _expand_keep_blocks(graph: Graph, sites: Sites, plan: Plan, states: Sequence[int]) -> Expanded:
    blocks = inverted_residuals(graph, sites)
    if len(states) not in (len(blocks), len(blocks) + 2) or not blocks:
        raise PlanError(
            [
                Problem(
                    "keep_blocks",
                    f"has {len(states)} entries, and the model has {len(blocks)} "
                    "inverted-residual blocks",
                    f"give {len(blocks)} entries, or {len(blocks) + 2} with stem and head"
                    if blocks
                    else "name segments instead",
                )
            ]
        )
    loose: list[str] = []
    first = 0
    if len(states) == len(blocks) + 2:
        first = 1
        loose += _removed_ends(sites, blocks, states)
        states = states[1:-1]
    boundary: Boundary = plan.boundary or "exact"
    segments: dict[str, Segment] = {}
    added: list[AddedActivation] = []
    for number, (block, state) in enumerate(zip(blocks, states, strict=True), first):
        if state:
            continue
        if plan.merge == "cheaper":
            loose += [site.name for site in block.activations]
            added += _free_activation(sites, block, plan.activation)
        elif block.expand is None:
            # Without expansion a merge would cost more than it saves; the paper's t=1 blocks
            # stay two convolutions.
            loose += [site.name for site in block.activations]
        else:
            has_one = sites.activation_after(block.output) is not None
            activation = None if has_one else plan.activation
            segments[f"keep_blocks[{number}]"] = _block_segment(block, boundary, activation)
    return _written_out(plan, segments, loose, added=added)


def _free_activation(
    sites: Sites, block: InvertedResidual, activation: Activation | None
) -> Iterable[AddedActivation]:
    if activation is None or block.expand is None or sites.activation_after(block.output):
        return ()
    return (AddedActivation(tensor=block.output.name or "", activation=activation),)


def _block_segment(
    block: InvertedResidual, boundary: Boundary, activation: Activation | None
) -> Segment:
    return Segment(
        input=block.input.name or "",
        output=block.output.name or "",
        boundary=boundary,
        activation=activation,
    )


def _removed_ends(
    sites: Sites, blocks: Sequence[InvertedResidual], states: Sequence[int]
) -> list[str]:
    """The stem's and the head's activation, where the list removes them."""
    removed = []
    for label, state, site in (
        ("stem", states[0], _activation_writing(sites, blocks[0].input)),
        ("head", states[-1], _activation_behind(sites, blocks[-1].output)),
    ):
        if state:
            continue
        if site is None:
            index = 0 if label == "stem" else len(states) - 1
            raise PlanError(
                [Problem(f"keep_blocks[{index}]", f"the model has no activation at its {label}")]
            )
        removed.append(site.name)
    return removed


def _activation_writing(sites: Sites, value: ir.Value) -> ActivationSite | None:
    return next((site for site in sites.activations if site.output is value), None)


def _activation_behind(sites: Sites, value: ir.Value) -> ActivationSite | None:
    """The activation of the convolution that reads this tensor."""
    conv = next((site for site in sites.convs if site.input is value), None)
    return None if conv is None else sites.activation_after(conv.output)


# --- LayerMerge -------------------------------------------------------------------------------


def _expand_index_sets(
    graph: Graph, sites: Sites, plan: Plan, act_ind: Sequence[int], conv_ind: Sequence[int]
) -> Expanded:
    convs = main_path_convs(graph, sites)
    _check_indices(convs, act_ind, conv_ind)
    ends = sorted({*act_ind, 0})
    kept = {*conv_ind, 0, *range(ends[-1] + 1, len(convs))}
    boundary: Boundary = plan.boundary or "hoist"
    segments: dict[str, Segment] = {}
    loose: list[str] = []
    added: list[AddedActivation] = []
    for start, end in pairwise(ends):
        inside = convs[start + 1 : end + 1]
        removed = [convs[index].name for index in range(start + 1, end + 1) if index not in kept]
        if len(inside) == 1:
            loose += removed
            continue
        segment, extra = _index_segment(graph, sites, plan, inside, removed, boundary)
        segments[f"act_ind[{act_ind.index(end)}]"] = segment
        added += extra
    return _written_out(plan, segments, convs=loose, added=added)


def _index_segment(
    graph: Graph,
    sites: Sites,
    plan: Plan,
    inside: Sequence[ConvSite],
    removed: list[str],
    boundary: Boundary,
) -> tuple[Segment, list[AddedActivation]]:
    source = inside[0].input
    output = whole_branch_end(graph, source, inside[-1].output, sites)
    activation, added = plan.activation, []
    if sites.activation_after(output) is not None:
        activation = None
    add = only_consumer(output)
    if activation is not None and is_op(add, "Add") and add is not None and is_join(graph, add):
        # The segment ends inside a residual branch: the activation stands behind the Add.
        if sites.activation_after(add.outputs[0]) is None:
            added = [AddedActivation(tensor=add.outputs[0].name or "", activation=activation)]
        activation = None
    segment = Segment(
        input=source.name or "",
        output=output.name or "",
        boundary=boundary,
        activation=activation,
        remove_convs=removed,
        norm="after" if _holds_norm(graph, source, output) else None,
    )
    return segment, added


def _holds_norm(graph: Graph, source: ir.Value, output: ir.Value) -> bool:
    """Whether a segment holds a normalisation by groups, which LayerMerge moves behind it."""
    inside = nodes_between(source, output)
    return any(inside.issuperset(site.nodes) for site in find_norms(graph))


def _check_indices(
    convs: Sequence[ConvSite], act_ind: Sequence[int], conv_ind: Sequence[int]
) -> None:
    problems = [
        Problem(
            f"{key}[{number}]", f"{index} is no convolution: the model has 0 to {len(convs) - 1}"
        )
        for key, indices in (("act_ind", act_ind), ("conv_ind", conv_ind))
        for number, index in enumerate(indices)
        if index >= len(convs)
    ]
    if not any(index > 0 for index in act_ind):
        problems.append(Problem("act_ind", "ends no segment", "list the last convolution at least"))
    if problems:
        raise PlanError(problems)

"""Free activations: what a merged network gains back for the activations that it lost.

One activation behind each merged segment, and behind the Add where the segment ends inside a
residual branch, costs next to nothing and makes the network train better (DepthShrinker, section
4.4; LayerMerge, section 3.2). It is the network's own one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import onnx_ir as ir

from graphfold.graph import Graph, is_op, only_consumer
from graphfold.linear import is_join
from graphfold.plan import AddedActivation, LikeActivation, Plan, Segment
from graphfold.resolve import ResolvedSegment, resolve_plan
from graphfold.sites import ActivationSite, find_sites

_PER_CHANNEL = ("PReLU", "PRelu")


def with_free_activations(graph: Graph, plan: Plan) -> tuple[Plan, int]:
    """A plan with an activation behind each of its merged segments; how many were added.

    Segments that state one, or that the model has one behind, keep it, and so do those that state
    `null`. Short forms are left short.

    Raises:
        PlanError: the plan does not fit the model.
    """
    sites = find_sites(graph)
    usual = most_common_activation(sites.activations)
    if plan.keep_blocks is not None or plan.act_ind is not None:
        if plan.activation is not None or usual is None:
            return plan, 0
        free = plan.model_copy(update={"activation": LikeActivation(like=usual.name)})
        counts = [len(resolve_plan(graph, each).added) for each in (free, plan)]
        return (free, counts[0] - counts[1]) if counts[0] > counts[1] else (plan, 0)
    resolved = resolve_plan(graph, plan)
    removed = set(resolved.activations)
    removed |= {site for segment in resolved.segments for site in segment.activations}
    taken = {item.tensor for item in plan.add_activations}
    segments: list[Segment] = []
    added: list[AddedActivation] = []
    for segment in resolved.segments:
        place = _place(graph, segment.output)
        present = sites.activation_after(place)
        chosen = _chosen(graph, segment, place, usual)
        if (
            not _gains_one(segment)
            or (present is not None and present not in removed)
            or place.name in taken
            or chosen is None
        ):
            segments.append(segment.spec)
            continue
        taken.add(place.name or "")
        free_one = LikeActivation(like=chosen.name)
        if place is segment.output:
            segments.append(segment.spec.model_copy(update={"activation": free_one}))
        else:
            segments.append(segment.spec)
            added.append(AddedActivation(tensor=place.name or "", activation=free_one))
    gained = sum(a is not b for a, b in zip(segments, plan.segments, strict=True)) + len(added)
    update = {"segments": segments, "add_activations": [*plan.add_activations, *added]}
    return (plan.model_copy(update=update) if gained else plan), gained


def _gains_one(segment: ResolvedSegment) -> bool:
    spec = segment.spec
    stated = "activation" in spec.model_fields_set
    return not spec.is_fitted and spec.family != "identity" and not stated


def _place(graph: Graph, output: ir.Value) -> ir.Value:
    """Where a segment's free activation stands: behind the Add that it is a branch of."""
    add = only_consumer(output)
    if add is not None and is_op(add, "Add") and is_join(graph, add):
        return add.outputs[0]
    return output


def _chosen(
    graph: Graph, segment: ResolvedSegment, place: ir.Value, usual: ActivationSite | None
) -> ActivationSite | None:
    """The last activation that the segment lost and that fits its end, else the usual one."""
    for site in reversed(segment.activations):
        if site.kind not in _PER_CHANNEL or graph.channels(site.input) == graph.channels(place):
            return site
    return usual


def most_common_activation(sites: Sequence[ActivationSite]) -> ActivationSite | None:
    """The network's own function: the first site of the one that most sites have.

    Functions with parameters per channel fit only some tensors and are not it.
    """
    plain = [site for site in sites if site.kind not in _PER_CHANNEL]
    if not plain:
        return None
    kind, _ = Counter(site.kind for site in plain).most_common(1)[0]
    return next(site for site in plain if site.kind == kind)

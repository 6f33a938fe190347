"""What a plan means on a given model: names become sites, segments become regions.

All problems are collected before anything is changed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import onnx_ir as ir

from graphfold.errors import NotExactError, PlanError, Problem
from graphfold.graph import Graph, node_label
from graphfold.importers import expand_short_forms
from graphfold.linear import is_join
from graphfold.norms import NormSite, find_norms
from graphfold.plan import Activation, LikeActivation, Plan, Segment, nearest
from graphfold.regions import Region, find_region
from graphfold.shapes import TensorShape
from graphfold.sites import ActivationSite, ConvSite, Sites, find_sites
from graphfold.specs import describe_shape
from graphfold.steps import Step

Site = TypeVar("Site", ActivationSite, ConvSite)


@dataclass
class ResolvedSegment:
    """A segment of the plan with the tensors, nodes and sites that it stands for."""

    path: str
    spec: Segment
    input: ir.Value
    output: ir.Value
    nodes: frozenset[ir.Node]
    activations: tuple[ActivationSite, ...] = ()
    convs: tuple[ConvSite, ...] = ()
    norms: tuple[NormSite, ...] = ()


@dataclass
class AddedAt:
    """A free activation and the tensor that it follows.

    `steps` is what an activation site of the model computes, where that is to be copied: the
    site itself may be removed before.
    """

    path: str
    value: ir.Value
    activation: Activation
    steps: tuple[Step, ...] | None = None


@dataclass
class ResolvedPlan:
    """A plan on one graph: everything it names, found."""

    segments: list[ResolvedSegment] = field(default_factory=list)
    activations: list[ActivationSite] = field(default_factory=list)
    convs: list[ConvSite] = field(default_factory=list)
    added: list[AddedAt] = field(default_factory=list)


def resolve_plan(graph: Graph, plan: Plan) -> ResolvedPlan:
    """Find everything a plan names on a graph.

    Raises:
        PlanError: unknown tensors, tensors that are no site, segments that are not
            single-entry single-exit or overlap, contradictions; all at once.
    """
    sites = find_sites(graph)
    expanded = expand_short_forms(graph, sites, plan)
    return _Resolver(graph, sites).resolve(expanded.plan, expanded.paths)


class _Resolver:
    """Looks names up and collects what is wrong with them."""

    def __init__(self, graph: Graph, sites: Sites) -> None:
        self.graph = graph
        self.sites = sites
        self.values = graph.values()
        self.activations = {site.name: site for site in sites.activations}
        self.convs = {site.name: site for site in sites.convs}
        self.norms = find_norms(graph)
        self.problems: list[Problem] = []

    def resolve(self, plan: Plan, paths: Sequence[str]) -> ResolvedPlan:
        resolved = ResolvedPlan()
        for path, spec in zip(paths, plan.segments, strict=True):
            segment = self.segment(path, spec)
            if segment is not None:
                resolved.segments.append(segment)
        self.check_overlaps(resolved.segments)
        resolved.activations = self.sites_named(
            "remove_activations", plan.remove_activations, self.activations, "an activation"
        )
        resolved.convs = self.removable("remove_convs", plan.remove_convs)
        self.check_loose(plan, resolved)
        resolved.added = list(self.additions(plan, resolved))
        if self.problems:
            raise PlanError(self.problems)
        return resolved

    def value(self, path: str, name: str) -> ir.Value | None:
        found = self.values.get(name)
        if found is None:
            hint = nearest(name, self.values)
            self.problems.append(Problem(path, f"the model has no tensor {name!r}", hint))
        return found

    def segment(self, path: str, spec: Segment) -> ResolvedSegment | None:
        source = self.value(f"{path}.input", spec.input)
        output = self.value(f"{path}.output", spec.output)
        if source is None or output is None:
            return None
        is_merged = not spec.is_fitted and spec.family != "identity"
        try:
            region = find_region(self.graph, source, output, self.sites.order, vectors=is_merged)
        except NotExactError as error:
            self.problems.append(
                Problem(
                    path, f"is not a segment from {spec.input!r} to {spec.output!r}", error.what
                )
            )
            return None
        nodes = frozenset(region.nodes)
        segment = ResolvedSegment(path, spec, source, output, nodes)
        segment.activations = tuple(self.segment_activations(segment))
        segment.convs = tuple(self.removable(f"{path}.remove_convs", spec.remove_convs))
        self.check_inside(f"{path}.remove_convs", spec.remove_convs, segment.convs, nodes)
        if spec.family == "identity":
            self.check_same_shape(segment)
        if is_merged:
            segment.norms = tuple(self.segment_norms(segment, region))
        return segment

    def segment_norms(self, segment: ResolvedSegment, region: Region) -> list[NormSite]:
        """The normalisations by groups inside, which the plan must say what becomes of."""
        path, stated = f"{segment.path}.norm", segment.spec.norm
        found = [site for site in self.norms if segment.nodes.issuperset(site.nodes)]
        if not found:
            if stated is not None:
                what = "the segment holds no normalisation by groups"
                self.problems.append(Problem(path, what, "leave norm out"))
        elif stated is None:
            what = f"the segment holds {found[-1].name!r}, which normalises by groups"
            hint = "norm: after puts it behind the result, norm: drop leaves it out"
            self.problems.append(Problem(path, what, hint))
        elif stated == "after":
            reason = self.why_not_after(segment, region, found[-1])
            if reason is not None:
                self.problems.append(Problem(path, reason, "norm: drop leaves it out"))
        return found

    def why_not_after(self, segment: ResolvedSegment, region: Region, norm: NormSite) -> str | None:
        """Why a normalisation cannot stand behind its segment, or None."""
        for node in region.nodes:
            if is_join(self.graph, node) and len(region.sources(self.graph, node)) > 1:
                return f"{norm.name!r} would leave its branch at {node.outputs[0].name!r}"
        return norm.why_not_on(self.graph.channels(segment.output))

    def check_same_shape(self, segment: ResolvedSegment) -> None:
        """What is dropped must leave a tensor of the shape that its readers expect."""
        source, output = self.graph.shape(segment.input), self.graph.shape(segment.output)
        if source is not None and output is not None and not _fit(source, output):
            shapes = [describe_shape(shape) for shape in (source, output)]
            what = (
                f"cannot be dropped: {segment.input.name!r} is {shapes[0]} and "
                f"{segment.output.name!r} is {shapes[1]}"
            )
            self.problems.append(Problem(segment.path, what))

    def segment_activations(self, segment: ResolvedSegment) -> Iterable[ActivationSite]:
        names, path = segment.spec.remove_activations, f"{segment.path}.remove_activations"
        inside = [site for site in self.sites.activations if segment.nodes.issuperset(site.nodes)]
        if names is None:
            return inside
        chosen = self.sites_named(path, names, self.activations, "an activation")
        self.check_inside(path, names, chosen, segment.nodes)
        if segment.spec.family != "identity":
            for site in inside:
                if site not in chosen:
                    what = f"keeps the activation {site.name!r}, so the segment is not linear"
                    self.problems.append(Problem(path, what, "name it, or end the segment before"))
        return chosen

    def check_inside(
        self,
        path: str,
        names: Sequence[str],
        sites: Iterable[ActivationSite | ConvSite],
        region: frozenset[ir.Node],
    ) -> None:
        for site in sites:
            if not region.issuperset(site.nodes):
                at = f"{path}[{names.index(site.name)}]"
                self.problems.append(Problem(at, f"{site.name!r} is not inside the segment"))

    def sites_named(
        self, path: str, names: Sequence[str], known: dict[str, Site], noun: str
    ) -> list[Site]:
        for number, name in enumerate(names):
            if name not in known:
                self.problems.append(self.unknown_site(f"{path}[{number}]", name, known, noun))
        return [known[name] for name in names if name in known]

    def unknown_site(self, path: str, name: str, known: dict[str, Site], noun: str) -> Problem:
        if name in self.values:
            what = f"tensor {name!r} is not the output of {noun} site"
            return Problem(path, what, self.owner(name, known))
        return Problem(path, f"the model has no tensor {name!r}", nearest(name, known))

    def owner(self, name: str, known: dict[str, Site]) -> str | None:
        """The site that the named tensor is an inner part of, else the nearest name."""
        producer = self.values[name].producer()
        for site in known.values():
            if producer is not None and producer in site.nodes:
                return f"the site it belongs to is named {site.name!r}"
        return nearest(name, known)

    def removable(self, path: str, names: Sequence[str]) -> list[ConvSite]:
        convs = self.sites_named(path, names, self.convs, "a conv")
        for site in convs:
            if not site.removable:
                what = f"conv {site.name!r} cannot be removed: {site.reason}"
                self.problems.append(Problem(f"{path}[{names.index(site.name)}]", what))
        return [site for site in convs if site.removable]

    def check_overlaps(self, segments: Sequence[ResolvedSegment]) -> None:
        """Narrowed segments may share the convolution that ends one and begins the next."""
        owner: dict[ir.Node, ResolvedSegment] = {}
        reported: set[tuple[str, str]] = set()
        for segment in segments:
            for node in segment.nodes:
                other = owner.setdefault(node, segment)
                if _adjoin(other, segment):
                    continue
                pair = (other.path, segment.path)
                if other is not segment and pair not in reported:
                    reported.add(pair)
                    what = f"overlaps {other.path} at {node_label(node)!r}"
                    self.problems.append(Problem(segment.path, what))

    def check_loose(self, plan: Plan, resolved: ResolvedPlan) -> None:
        """Loose removals must lie outside segments: a segment says itself what goes."""
        for key, names, sites in (
            ("remove_activations", plan.remove_activations, resolved.activations),
            ("remove_convs", plan.remove_convs, resolved.convs),
        ):
            for site in sites:
                for segment in resolved.segments:
                    if not segment.nodes.isdisjoint(site.nodes):
                        what = f"{site.name!r} lies in {segment.path}"
                        hint = f"say it in {segment.path}.{key}"
                        if site in segment.activations:
                            hint = "the segment removes it already"
                        at = f"{key}[{names.index(site.name)}]"
                        self.problems.append(Problem(at, what, hint))

    def additions(self, plan: Plan, resolved: ResolvedPlan) -> Iterable[AddedAt]:
        removed = [*resolved.activations, *(s for e in resolved.segments for s in e.activations)]
        taken: dict[ir.Value, str] = {}
        for path, value, activation in self.stated_additions(plan, resolved):
            present = self.sites.activation_after(value)
            if present is not None and present not in removed:
                what = f"the model already has an activation after {value.name!r}"
                self.problems.append(Problem(path, what, "use null"))
            elif value in taken:
                what = f"{taken[value]} adds one after {value.name!r} already"
                self.problems.append(Problem(path, what))
            elif value.producer() is None and not value.is_graph_input():
                self.problems.append(Problem(path, f"{value.name!r} is a constant"))
            elif isinstance(activation, LikeActivation):
                steps = self.steps_of(f"{path}.like", activation.like, value)
                if steps is not None:
                    yield AddedAt(path, value, activation, steps)
            else:
                yield AddedAt(path, value, activation)
            taken.setdefault(value, path)

    def stated_additions(
        self, plan: Plan, resolved: ResolvedPlan
    ) -> Iterable[tuple[str, ir.Value, Activation]]:
        for segment in resolved.segments:
            if segment.spec.activation is not None:
                yield f"{segment.path}.activation", segment.output, segment.spec.activation
        for number, extra in enumerate(plan.add_activations):
            path = f"add_activations[{number}]"
            value = self.value(f"{path}.tensor", extra.tensor)
            if value is not None:
                yield f"{path}.activation", value, extra.activation

    def steps_of(self, path: str, name: str, value: ir.Value) -> tuple[Step, ...] | None:
        """What the named site computes, if it can follow a tensor of the value's channels."""
        site = self.activations.get(name)
        if site is None:
            self.problems.append(self.unknown_site(path, name, self.activations, "an activation"))
            return None
        steps = tuple(_steps(self.graph, site))
        per_channel = any(getattr(arg, "size", 1) > 1 for _, args, _ in steps for arg in args)
        channels = [self.graph.channels(tensor) for tensor in (site.input, value)]
        if per_channel and channels[0] != channels[1]:
            what = (
                f"the parameters of {name!r} are for {channels[0]} channels, and {value.name!r} "
                f"has {channels[1]}"
            )
            self.problems.append(Problem(path, what))
            return None
        return steps


def _steps(graph: Graph, site: ActivationSite) -> Iterable[Step]:
    made: dict[ir.Value, int] = {}
    for number, node in enumerate(site.nodes):
        arguments = tuple(
            "x" if value is site.input else made[value] if value in made else graph.constant(value)
            for value in node.inputs
        )
        yield node.op_type, arguments, dict(node.attributes)
        made[node.outputs[0]] = number


def _fit(one: TensorShape, two: TensorShape) -> bool:
    """Whether two shapes can be equal; sizes that are not fixed fit any."""
    return len(one) == len(two) and all(
        a == b or not isinstance(a, int) or not isinstance(b, int)
        for a, b in zip(one, two, strict=True)
    )


def _adjoin(one: ResolvedSegment, other: ResolvedSegment) -> bool:
    """Whether both are narrowed, each in another place: no more than one convolution is shared."""
    shared = [node for node in one.nodes & other.nodes if node.op_type == "Conv"]
    return one.spec.family == other.spec.family == "narrow" and len(shared) == 1

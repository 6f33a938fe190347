"""What a plan may choose: for every two cut tensors, the single convolutions between them.

Segments lie on single-entry single-exit chains (`graphfold.flow`), so they nest inside residual
branches and hold a branch whole or not at all. A segment begins with what a convolution reads and
ends before the next activation or convolution; with the activations inside removed, everything in
it must be linear. Its convolutions that map a tensor to one of the same shape may go as well, and
each number kept of each kind (kernel, depthwise or not) gives one kernel: 1 + sum of (k - 1) along
the longest branch (LayerMerge, section 3.2). Of the subsets with the same kernel the one whose kept
weights have the largest l1 norm stands for all (its equation 3). A convolution that may go, that no
longer segment holds and that reads no activation may go by itself, as one behind upsampling.

Two things inside a segment are not linear and yet no obstacle. A vector that other inputs add to
all pixels goes through the convolutions behind it as a vector. And of several normalisations by
groups the last one may move behind the run, if the result has its channels.

Reasons are kept for what is excluded: the first operator that is not linear, or a kernel above one
behind a stride, where (k - 1) * stride + 1 taps are legal algebra and never pay.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

import numpy as np
import onnx_ir as ir

from graphfold.choices import Choice, MisfitError, Window, choices
from graphfold.flow import Flow, FlowChain, find_flow
from graphfold.graph import Graph, attribute, is_op, only_consumer
from graphfold.linear import OPERATORS, is_join, variable_inputs
from graphfold.norms import NormSite, find_norms, only_normalised
from graphfold.plan import Norm
from graphfold.sites import ActivationSite, ConvSite, Sites, find_sites

# Beyond this many taps along an axis no merge has ever paid. Both bound the work on long runs.
LARGEST_KERNEL = 31
MOST_CONVS = 64


@dataclass(frozen=True)
class Candidate:
    """Two cut tensors and the convolutions that may stand between them.

    Attributes:
        input, output: the tensors, as plans name them.
        convs: the conv sites inside, in execution order.
        activations: the activation sites inside, all of which go in a merge.
        nodes: all nodes inside.
        choices: by kernel, largest first.
        adds: whether the segment holds a residual Add or joins branches otherwise.
        norms: normalisations inside that the plan must move behind the segment or drop.
        norm: which of the two: the last one moves behind, unless the result is normalised anyway.
        aside: vectors from the side that it adds to all pixels.
    """

    input: ir.Value
    output: ir.Value
    convs: tuple[ConvSite, ...]
    activations: tuple[ActivationSite, ...]
    nodes: tuple[ir.Node, ...]
    choices: tuple[Choice, ...]
    adds: bool
    norms: tuple[NormSite, ...] = ()
    norm: Norm | None = None
    aside: tuple[ir.Value, ...] = ()


@dataclass(frozen=True)
class Exclusion:
    """Why a segment between two tensors is no candidate, and mostly none that reaches further."""

    input: str
    output: str
    reason: str


@dataclass(frozen=True)
class Candidates:
    """All candidates of a graph, and why there are no others."""

    graph: Graph
    sites: Sites
    chains: tuple[FlowChain, ...]
    found: tuple[Candidate, ...]
    excluded: tuple[Exclusion, ...]

    @property
    def entries(self) -> int:
        """Rows of a full table: all choices of all segments."""
        return sum(len(each.choices) for each in self.found)

    @property
    def removable(self) -> tuple[ConvSite, ...]:
        """Convolutions that may be dropped alone (LayerOnly), in execution order."""
        return tuple(site for site in self.sites.convs if site.removable)

    @cached_property
    def activated(self) -> dict[ir.Value, ActivationSite]:
        """Activation sites by the tensors they read."""
        return {site.input: site for site in self.sites.activations}

    def activation_place(self, end: ir.Value) -> ir.Value:
        """The tensor whose activation is the one behind a segment's end.

        That is the end itself, or at the end of a branch that has no activation of its own, what
        the joins make that alone read it.
        """
        place = end
        while place not in self.activated:
            reader = only_consumer(place)
            if reader is None or not is_join(self.graph, reader):
                return place
            place = reader.outputs[0]
        return place


def find_candidates(
    graph: Graph,
    sites: Sites | None = None,
    *,
    move_norms: bool = True,
    compat: Literal["layermerge"] | None = None,
) -> Candidates:
    """Every segment that one convolution may replace, in order of input and output.

    Args:
        graph: not changed.
        sites: its sites, where they are known already.
        move_norms: segments may hold normalisations by groups, which move behind them, or go
            where the result is normalised anyway.
        compat: layermerge ends segments at every strided convolution that is not depthwise,
            where ours may go on with a pointwise one behind it, and over the Add behind that.
    """
    sites = sites or find_sites(graph)
    flow = find_flow(graph)
    search = _Search(graph, sites, flow, move_norms, compat)
    found: list[Candidate] = []
    excluded: list[Exclusion] = []
    for chain in flow.chains:
        for start in range(len(chain.points) - 1):
            for result in search.from_point(chain, start):
                if isinstance(result, Candidate):
                    found.append(result)
                else:
                    excluded.append(result)
    joined = {(each.input, each.nodes[-1]) for each in found if each.adds}
    kept = [each for each in found if not _is_whole_branch(graph, each, joined)]
    order = sites.order
    kept.sort(key=lambda each: (order[each.nodes[0]], order[each.nodes[-1]]))
    return Candidates(graph, sites, flow.chains, tuple(_with_lone(kept, sites)), tuple(excluded))


def _with_lone(found: Sequence[Candidate], sites: Sites) -> Iterator[Candidate]:
    """Candidates, and the identity for convolutions that could not go otherwise."""
    activated = {site.output for site in sites.activations}
    in_company = {site for each in found if len(each.convs) > 1 for site in each.convs}
    for each in found:
        (site, *others) = each.convs
        is_lone = not others and not each.adds and site not in in_company
        if not is_lone or not site.removable or each.input in activated:
            yield each
            continue
        ones = (1,) * len(site.kernel)
        nothing = Choice(ones, ones, "identity", (site.name,), 0.0)
        yield replace(each, choices=(*each.choices, nothing))


@dataclass
class _Segment:
    """A segment that grows along its chain."""

    source: ir.Value
    window: Window
    nodes: list[ir.Node] = field(default_factory=list)
    convs: list[ConvSite] = field(default_factory=list)
    activations: dict[ActivationSite, None] = field(default_factory=dict)
    norms: dict[NormSite, None] = field(default_factory=dict)
    join: ir.Node | None = None
    inside: set[ir.Value] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.inside.add(self.source)


def _why_norm_leaves(segment: _Segment) -> str | None:
    """Why a normalisation cannot move behind a segment where branches join."""
    if not segment.norms or segment.join is None:
        return None
    *_, last = segment.norms
    return f"{last.name!r} would leave its branch at {segment.join.outputs[0].name!r}"


def _why_norm_misfits(segment: _Segment) -> str | None:
    if not segment.norms or not segment.convs:
        return None
    *_, last = segment.norms
    return last.why_not_on(segment.convs[-1].out_channels)


class _Search:
    """What is asked of a graph again and again while its segments are listed."""

    def __init__(
        self,
        graph: Graph,
        sites: Sites,
        flow: Flow,
        move_norms: bool,
        compat: str | None,
    ) -> None:
        self.graph = graph
        self.side_inputs = flow.side_inputs
        self.conv_of = {site.conv: site for site in sites.convs}
        self.kernels = {site.conv: site.kernel for site in sites.convs}
        self.site_of = {node: site for site in sites.convs for node in site.nodes}
        self.begins: dict[ir.Value, list[ConvSite]] = defaultdict(list)
        for site in sites.convs:
            self.begins[site.input].append(site)
        self.activation_of = {node: site for site in sites.activations for node in site.nodes}
        self.activated = {site.input: site for site in sites.activations}
        self.norms = find_norms(graph)
        self.norm_of = {node: site for site in self.norms for node in site.nodes}
        self.move_norms = move_norms
        self.gate_of = {node: gate for gate in sites.gates for node in gate.nodes}
        strided = [site for site in sites.convs if max(_strides(site.conv)) > 1]
        self.stops_at_strided = compat == "layermerge"
        self.stage_ends = {
            site.output if self.stops_at_strided and not site.depthwise else self._stage_end(site)
            for site in strided
        }

    def _stage_end(self, site: ConvSite) -> ir.Value:
        """The last tensor that a strided convolution merges into: behind a pointwise one."""
        behind = self.activated.get(site.output)
        following = self.begins.get(site.output if behind is None else behind.output, [])
        alone = following[0] if len(following) == 1 else None
        return alone.output if alone is not None and alone.pointwise else site.output

    def from_point(self, chain: FlowChain, start: int) -> Iterator[Candidate | Exclusion]:
        """Segments of a chain that begin at one of its points, growing."""
        source, reader = chain.points[start].value, chain.points[start].reader
        if source not in self.begins or (reader is not None and reader not in self.site_of):
            return
        rank = len(self.begins[source][0].kernel)
        segment = _Segment(source, Window(self.graph, source, rank, self.kernels))
        for end in range(start + 1, len(chain.points)):
            step, target = chain.steps[end - 1], chain.points[end].value
            reason = self._why_not_taken(segment, step, target)
            if reason is None and step and self._ends_at(chain, end):
                reason = _why_norm_leaves(segment)
                drops = only_normalised(target, self.norms)
                misfit = None if drops else _why_norm_misfits(segment)
                if reason is None and misfit is not None:
                    yield Exclusion(source.name or "", target.name or "", misfit)
                elif reason is None and segment.convs:
                    yield self._candidate(segment, target)
            if reason is None and target in self.stage_ends and end + 1 < len(chain.points):
                reason = "the resolution changes before it"
            if reason is not None:
                yield Exclusion(source.name or "", target.name or "", reason)
                return

    def _why_not_taken(
        self, segment: _Segment, step: Sequence[ir.Node], target: ir.Value
    ) -> str | None:
        """Take a step into a segment, or tell why no segment holds it."""
        segment.inside.update(value for node in step for value in node.outputs)
        reason = self._why_not_linear(step, segment.inside) or self._why_stopped(step, target)
        if reason is not None:
            return reason
        for node in step:
            segment.nodes.append(node)
            if node in self.conv_of:
                segment.convs.append(self.conv_of[node])
            if node in self.activation_of:
                segment.activations[self.activation_of[node]] = None
            if node in self.norm_of:
                segment.norms[self.norm_of[node]] = None
            if segment.join is None and self._joins(node):
                segment.join = node
        try:
            segment.window.extend(step)
        except MisfitError as error:
            return str(error)
        if max(segment.window.kernel) > LARGEST_KERNEL:
            return f"its kernel would have {max(segment.window.kernel)} taps"
        if len(segment.convs) > MOST_CONVS:
            return f"it would hold more than {MOST_CONVS} convolutions"
        return None

    def _ends_at(self, chain: FlowChain, end: int) -> bool:
        """A segment ends behind a conv site, or behind a join, not before its normalisation."""
        last = chain.steps[end - 1][-1]
        if last in self.activation_of or last in self.norm_of:
            return False
        site = self.site_of.get(last)
        if site is not None:
            return site.output is chain.points[end].value
        return self._joins(last)

    def _joins(self, node: ir.Node) -> bool:
        """Whether branches of the flow meet at a node; what comes from the side is none."""
        aside = self.side_inputs.get(node, frozenset())
        return is_join(self.graph, node) and len(variable_inputs(self.graph, node)) - len(aside) > 1

    def _why_not_linear(self, step: Sequence[ir.Node], inside: Collection[ir.Value]) -> str | None:
        for node in step:
            if node in self.activation_of or (node in self.norm_of and self.move_norms):
                continue
            if node in self.norm_of:
                return f"{self.norm_of[node].name!r} normalises by statistics of its input"
            gate = self.gate_of.get(node)
            if gate is not None and gate.output in inside:
                return f"{gate.output.name!r} is gated by what is pooled of it"
            sources = variable_inputs(self.graph, node)
            aside = self.side_inputs.get(node, frozenset())
            outside = [value for value in sources if value not in inside and value not in aside]
            if outside:
                return f"{node.op_type} at {node.outputs[0].name!r} also reads {outside[0].name!r}"
            if is_join(self.graph, node) or node in self.site_of:
                continue
            if is_op(node, *OPERATORS) and len(sources) == 1:
                continue
            return f"{node.op_type} at {node.outputs[0].name!r} is not linear"
        return None

    def _why_stopped(self, step: Sequence[ir.Node], target: ir.Value) -> str | None:
        outputs = {value for node in step for value in node.outputs} - {target}
        if self.stops_at_strided and not outputs.isdisjoint(self.stage_ends):
            return "a strided convolution stands inside it"
        return None

    def _candidate(self, segment: _Segment, target: ir.Value) -> Candidate:
        drops = only_normalised(target, self.norms)
        aside = {value for node in segment.nodes for value in self.side_inputs.get(node, ())}
        return Candidate(
            input=segment.source,
            output=target,
            convs=tuple(segment.convs),
            activations=tuple(segment.activations),
            nodes=tuple(segment.nodes),
            choices=tuple(choices(segment.window, segment.convs, self._l1)),
            adds=segment.join is not None,
            norms=tuple(segment.norms),
            norm=None if not segment.norms else "drop" if drops else "after",
            aside=tuple(value for node in segment.nodes for value in node.inputs if value in aside),
        )

    def _l1(self, site: ConvSite) -> float:
        found = self._l1_of.get(site.conv)
        if found is None:
            weight = self.graph.constant(site.conv.inputs[1])
            assert weight is not None
            found = self._l1_of[site.conv] = float(np.abs(weight).sum(dtype=np.float64))
        return found

    @cached_property
    def _l1_of(self) -> dict[ir.Node, float]:
        return {}


def _is_whole_branch(
    graph: Graph, candidate: Candidate, joined: Collection[tuple[ir.Value, ir.Node]]
) -> bool:
    """Whether a segment is all of a branch that another segment holds together with its join."""
    reader = only_consumer(candidate.output)
    return reader is not None and is_join(graph, reader) and (candidate.input, reader) in joined


def _strides(conv: ir.Node) -> Sequence[int]:
    return attribute(conv, "strides") or (1,)

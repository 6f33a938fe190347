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
all pixels goes through the convolutions behind it as a vector. And where it is asked for, a
normalisation by groups may move behind the run, if the result has its channels.

Reasons are kept for what is excluded: the first operator that is not linear, or a kernel above one
behind a stride, where (k - 1) * stride + 1 taps are legal algebra and never pay.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import numpy as np
import onnx_ir as ir

from graphfold.flow import Flow, FlowChain, find_flow
from graphfold.graph import Graph, attribute, is_op, only_consumer
from graphfold.linear import OPERATORS, is_join, variable_inputs
from graphfold.norms import NormSite, find_norms
from graphfold.plan import Family
from graphfold.sites import ActivationSite, ConvSite, Sites, find_sites

# Beyond this many taps along an axis no merge has ever paid; it bounds the work on long runs.
LARGEST_KERNEL = 31


@dataclass(frozen=True)
class Choice:
    """One convolution that a segment may become.

    Attributes:
        kernel, stride: of the convolution, one entry per spatial axis.
        family: dense or depthwise; pointwise counts as dense of kernel 1. Identity where nothing
            stays.
        removed_convs: conv sites inside that go, by name, in execution order.
        kept_l1: l1 norm of the weights of those that stay.
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    family: Family
    removed_convs: tuple[str, ...]
    kept_l1: float


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
    """

    input: ir.Value
    output: ir.Value
    convs: tuple[ConvSite, ...]
    activations: tuple[ActivationSite, ...]
    nodes: tuple[ir.Node, ...]
    choices: tuple[Choice, ...]
    adds: bool
    norms: tuple[NormSite, ...] = ()


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


def find_candidates(
    graph: Graph,
    sites: Sites | None = None,
    *,
    move_norms: bool = False,
    compat: Literal["layermerge"] | None = None,
) -> Candidates:
    """Every segment that one convolution may replace, in order of input and output.

    Args:
        graph: not changed.
        sites: its sites, where they are known already.
        move_norms: segments may hold normalisations by groups, which move behind them.
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
        self.site_of = {node: site for site in sites.convs for node in site.nodes}
        self.begins: dict[ir.Value, list[ConvSite]] = defaultdict(list)
        for site in sites.convs:
            self.begins[site.input].append(site)
        self.activation_of = {node: site for site in sites.activations for node in site.nodes}
        self.activated = {site.input: site for site in sites.activations}
        self.norm_of = {node: site for site in find_norms(graph) for node in site.nodes}
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
        source = chain.points[start].value
        if source not in self.begins:
            return
        nodes: list[ir.Node] = []
        inside = {source}
        for end in range(start + 1, len(chain.points)):
            step = chain.steps[end - 1]
            target = chain.points[end].value
            nodes += step
            inside.update(value for node in step for value in node.outputs)
            reason = self._why_not_linear(step, inside) or self._why_stopped(step, target)
            if reason is None and step and self._ends_at(chain, end):
                reason = self._why_no_kernel(source, nodes) or self._why_norm_leaves(nodes)
                misfit = self._why_norm_misfits(nodes)
                if reason is None and misfit is not None:
                    yield Exclusion(source.name or "", target.name or "", misfit)
                elif reason is None and any(node in self.conv_of for node in nodes):
                    yield self._candidate(source, target, nodes)
            if reason is None and target in self.stage_ends and end + 1 < len(chain.points):
                reason = "the resolution changes before it"
            if reason is not None:
                yield Exclusion(source.name or "", target.name or "", reason)
                return

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
            if gate is not None:
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

    def _norms(self, nodes: Sequence[ir.Node]) -> tuple[NormSite, ...]:
        found = dict.fromkeys(self.norm_of[node] for node in nodes if node in self.norm_of)
        return tuple(found)

    def _why_norm_leaves(self, nodes: Sequence[ir.Node]) -> str | None:
        """Why a normalisation cannot move behind a segment where branches join."""
        norms = self._norms(nodes)
        join = next((node for node in nodes if self._joins(node)), None)
        if not norms or join is None:
            return None
        return f"{norms[-1].name!r} would move out of a branch, behind {join.outputs[0].name!r}"

    def _why_norm_misfits(self, nodes: Sequence[ir.Node]) -> str | None:
        convs = [self.conv_of[node] for node in nodes if node in self.conv_of]
        for norm in self._norms(nodes):
            if norm.channels != convs[-1].out_channels:
                return (
                    f"{norm.name!r} normalises {norm.channels} channels and the result has "
                    f"{convs[-1].out_channels}"
                )
        return None

    def _candidate(self, source: ir.Value, target: ir.Value, nodes: Sequence[ir.Node]) -> Candidate:
        convs = tuple(self.conv_of[node] for node in nodes if node in self.conv_of)
        activations = dict.fromkeys(
            self.activation_of[node] for node in nodes if node in self.activation_of
        )
        return Candidate(
            input=source,
            output=target,
            convs=convs,
            activations=tuple(activations),
            nodes=tuple(nodes),
            choices=tuple(self._choices(source, nodes, convs)),
            adds=any(self._joins(node) for node in nodes),
            norms=self._norms(nodes),
        )

    def _why_no_kernel(self, source: ir.Value, nodes: Sequence[ir.Node]) -> str | None:
        try:
            extents, _ = self._window(source, nodes, frozenset())
        except _MisfitError as error:
            return str(error)
        if max(extents) > LARGEST_KERNEL:
            return f"its kernel would have {max(extents)} taps"
        return None

    def _window(
        self, source: ir.Value, nodes: Sequence[ir.Node], removed: frozenset[ir.Node]
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Kernel and stride of what these nodes become without some of their convolutions.

        Padding is left out: it decides where a merge is exact, not how large it is.
        """
        rank = next((len(self.conv_of[node].kernel) for node in nodes if node in self.conv_of), 0)
        known = {source: ((1,) * rank, (1,) * rank)}
        last = known[source]
        for node in nodes:
            parts = [known[value] for value in variable_inputs(self.graph, node) if value in known]
            if not parts:
                continue
            strides = {stride for _, stride in parts}
            if len(strides) > 1:
                raise _MisfitError(
                    f"branches of different strides meet at {node.outputs[0].name!r}"
                )
            extent = tuple(max(sizes) for sizes in zip(*(part[0] for part in parts), strict=True))
            last = (extent, strides.pop())
            if node not in removed:
                last = self._after(node, *last)
            known.update(dict.fromkeys(node.outputs, last))
        return last

    def _after(
        self, node: ir.Node, extent: tuple[int, ...], stride: tuple[int, ...]
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        if not is_op(node, "Conv", "AveragePool"):
            return extent, stride
        rank = len(extent)
        site = self.conv_of.get(node)
        kernel = site.kernel if site is not None else attribute(node, "kernel_shape")
        dilations = attribute(node, "dilations") or [1] * rank
        strides = attribute(node, "strides") or [1] * rank
        if any(size > 1 and step > 1 for size, step in zip(kernel, stride, strict=True)):
            raise _MisfitError(
                f"the kernel {list(kernel)} of {node.outputs[0].name!r} stands behind stride "
                f"{list(stride)}"
            )
        grown = tuple(
            size + (taps - 1) * dilation * step
            for size, taps, dilation, step in zip(extent, kernel, dilations, stride, strict=True)
        )
        return grown, tuple(one * other for one, other in zip(stride, strides, strict=True))

    def _choices(
        self, source: ir.Value, nodes: Sequence[ir.Node], convs: Sequence[ConvSite]
    ) -> list[Choice]:
        """One choice per kernel and family, the largest kernels first."""
        kinds: dict[tuple[tuple[int, ...], bool], list[ConvSite]] = defaultdict(list)
        for site in convs:
            if site.removable:
                kinds[site.kernel, site.depthwise].append(site)
        for sites in kinds.values():
            # Those of the smallest norm go first (equation 3, per kind of convolution).
            sites.sort(key=self._l1)
        best: dict[tuple[tuple[int, ...], Family], Choice] = {}
        for counts in itertools.product(*(range(len(sites) + 1) for sites in kinds.values())):
            gone = [
                site
                for count, sites in zip(counts, kinds.values(), strict=True)
                for site in sites[:count]
            ]
            if len(gone) == len(convs):
                continue
            choice = self._choice(source, nodes, convs, gone)
            held = best.get((choice.kernel, choice.family))
            if held is None or choice.kept_l1 > held.kept_l1:
                best[choice.kernel, choice.family] = choice
        return sorted(best.values(), key=lambda each: (-math.prod(each.kernel), each.family))

    def _choice(
        self,
        source: ir.Value,
        nodes: Sequence[ir.Node],
        convs: Sequence[ConvSite],
        gone: Sequence[ConvSite],
    ) -> Choice:
        names = {site.name for site in gone}
        kept = [site for site in convs if site.name not in names]
        kernel, stride = self._window(source, nodes, frozenset(site.conv for site in gone))
        return Choice(
            kernel=kernel,
            stride=stride,
            family="depthwise" if all(site.depthwise for site in kept) else "dense",
            removed_convs=tuple(site.name for site in convs if site.name in names),
            kept_l1=sum(self._l1(site) for site in kept),
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


class _MisfitError(Exception):
    """No single convolution has the window of these nodes."""

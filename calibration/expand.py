"""Convolutions that are wider and deeper while they train, and fold back to what they were.

DepthShrinker+ (DepthShrinker, section 4.5 and appendix D): a convolution becomes a block of 1x1
expansion, depthwise convolution with the kernel of the original, and 1x1 projection. An `inverted`
residual block has normalisations and activations inside, and these activations go before it is
folded; a `linear` one has neither, and computes from the start what the original does. All padding
stands at the expansion, before anything that adds an offset, so that the block without its
activations is one convolution with the geometry of the original, border included. The plan that
comes with the expanded network says so block by block; that it restores the original's structure is
checked here.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from graphfold.calibration.expandable import Left, Rules, choose
from graphfold.calibration.factors import (
    Factors,
    exact_factors,
    hidden_for_exactness,
    random_factors,
)
from graphfold.cost import analyze
from graphfold.errors import ModelError, NotExactError, UsageError
from graphfold.free import most_common_activation
from graphfold.graph import Graph, attribute, is_op
from graphfold.linear import conv_axes
from graphfold.model import to_proto
from graphfold.optimizer import optimize_model
from graphfold.plan import ActivationName, Plan, read_plan
from graphfold.reference import build_reference
from graphfold.rewrite import select_passes
from graphfold.sites import ConvSite, find_sites
from graphfold.tables import Table, count, kernel, make_table

if TYPE_CHECKING:
    import onnx

    from graphfold.model import Model

Kind = Literal["inverted", "linear"]

_WITHOUT_ACTIVATIONS: ActivationName = "Relu"
_MARK = "/graphfold."  # in names that folding gives


@dataclass(frozen=True)
class ExpandedConv:
    """One convolution and the block that stands for it.

    Attributes:
        conv: the convolution's output tensor, which names it.
        input, output: the tensors between which the plan folds the block.
        kernel: of the convolution.
        in_channels, hidden, out_channels: of the block.
        activations: tensors that the new activations give.
        new_bias: the folded convolution has a bias, and the original none.
        error: of a linear block: largest difference of its merged weights, as they are stored,
            from the original's, over the largest of these.
    """

    conv: str
    input: str
    output: str
    kernel: tuple[int, ...]
    in_channels: int
    hidden: int
    out_channels: int
    activations: tuple[str, ...]
    new_bias: bool
    error: float | None

    def to_json(self) -> dict[str, Any]:
        """Part of a JSON document."""
        return {
            "conv": self.conv,
            "input": self.input,
            "output": self.output,
            "kernel": list(self.kernel),
            "channels": [self.in_channels, self.hidden, self.out_channels],
            "activations": list(self.activations),
            "new_bias": self.new_bias,
            "error": self.error,
        }


@dataclass(frozen=True)
class Expanded:
    """An expanded network, and how it is folded back.

    Attributes:
        expanded: the network to train.
        plan: what folds it, or what it was trained to, to the original's structure.
        kind: of its blocks.
        ratio: hidden channels for each input channel that were asked for.
        function: of the new activations, None for linear blocks.
        convs: what was expanded, in execution order.
        left: what the rules matched beside them.
        macs: of the original, the expanded and the folded network; None where sizes are open.
        params: of the same.
    """

    expanded: Model
    plan: Plan
    kind: Kind
    ratio: float
    function: str | None
    convs: tuple[ExpandedConv, ...]
    left: tuple[Left, ...]
    macs: tuple[int | None, int | None, int | None]
    params: tuple[int, int, int]

    @property
    def model(self) -> onnx.ModelProto:
        """The expanded network as an onnx.ModelProto."""
        return to_proto(self.expanded)

    def to_json(self) -> dict[str, Any]:
        """The document of `graphfold expand --json`."""
        names = ("original", "expanded", "folded")
        return {
            "kind": self.kind,
            "ratio": self.ratio,
            "activation": self.function,
            "convs": [each.to_json() for each in self.convs],
            "left": [each.to_json() for each in self.left],
            "macs": dict(zip(names, self.macs, strict=True)),
            "params": dict(zip(names, self.params, strict=True)),
            "plan": self.plan.model_dump(mode="json", exclude_unset=True),
        }

    def tables(self) -> list[Table]:
        """The same for people."""
        inside = "nothing between" if self.function is None else f"{self.function} inside"
        rows = [
            (each.conv, kernel(each.kernel), str(each.in_channels), str(each.hidden),
             str(each.out_channels))
            for each in self.convs
        ]  # fmt: skip
        note = (
            f"{self.kind} blocks, {inside}. MACs {' -> '.join(str(count(n)) for n in self.macs)}, "
            f"parameters {' -> '.join(str(count(n)) for n in self.params)}: original, expanded, "
            "folded back."
        )
        columns = ("convolution", "kernel", "in", "hidden", "out")
        found = [make_table("Expanded", columns, rows, note=note)]
        if self.left:
            reasons = [(each.conv, each.reason) for each in self.left]
            found.append(make_table("Left", ("convolution", "reason"), reasons, text_columns=2))
        return found


def expand(
    model: Model,
    rules: Rules,
    *,
    kind: Kind = "inverted",
    ratio: float = 6.0,
    activation: ActivationName | None = None,
    seed: int = 0,
    input_shapes: Mapping[str, Sequence[int]] | None = None,
) -> Expanded:
    """Replace convolutions of a network by wider blocks that fold back to them.

    Args:
        model: the original; not changed.
        rules: which convolutions.
        kind: `inverted` blocks have normalisations and activations inside and begin with random
            weights; `linear` ones have neither and begin with the original's function, for which
            they may need more hidden channels than `ratio` gives them.
        ratio: hidden channels for each input channel.
        activation: of inverted blocks; by default the network's own, else Relu.
        seed: of the random weights.
        input_shapes: sizes that the model leaves open, for MAC counts.

    Raises:
        ExpansionError: convolutions that were named and cannot be expanded.
        UsageError: nothing to expand, or settings without a meaning.
        ModelError: folding back would not restore the structure of the original.
    """
    if kind == "linear" and activation is not None:
        raise UsageError("linear blocks have no activations", hint="leave the activation out")
    if not 0 < ratio < 1000:
        raise UsageError(f"an expansion by {ratio}", hint="a few times the input channels")
    copy = replace(model.clone(), path=None)
    graph = Graph(copy)
    usual = most_common_activation(find_sites(graph).activations)
    sites, left = choose(graph, rules)
    rng = np.random.default_rng(seed)
    done = [_Block(graph, site, kind).build(ratio, rng) for site in sites]
    graph.ir.sort()
    function = None
    if kind == "inverted":
        own = usual.name if usual is not None else None
        function = activation or (usual.kind if usual is not None else _WITHOUT_ACTIVATIONS)
        act: Any = {"like": own} if own and activation is None else function
        copy = _with_activations(copy, [name for each in done for name in each.activations], act)
    plan = _plan(done, kind, ratio)
    folded = [optimize_model(m, p, verify=False).folded for m, p in ((model, None), (copy, plan))]
    _check_structure(*folded)
    costs = [
        analyze(Graph(each), input_shapes=input_shapes).total
        for each in (folded[0], copy, folded[1])
    ]
    # Before the training a new bias is zero, and folding leaves it out.
    biases = sum(each.out_channels for each in done if each.new_bias)
    return Expanded(
        expanded=copy,
        plan=plan,
        kind=kind,
        ratio=ratio,
        function=function,
        convs=tuple(done),
        left=tuple(left),
        macs=(costs[0].macs, costs[1].macs, costs[2].macs),
        params=(costs[0].params, costs[1].params, costs[0].params + biases),
    )


def _with_activations(model: Model, tensors: Sequence[str], activation: Any) -> Model:
    """The same network with an activation behind each of these tensors, under their names."""
    added = [{"tensor": name, "activation": activation} for name in tensors]
    plan = read_plan({"graphfold_plan": 1, "add_activations": added})
    return build_reference(model, plan, select_passes()).model


def _plan(convs: Sequence[ExpandedConv], kind: Kind, ratio: float) -> Plan:
    segments = [
        {
            "input": each.input,
            "output": each.output,
            "boundary": "exact",
            "kernel": list(each.kernel),
            # Stated, so that nobody adds one: the original has none of its own there.
            "activation": None,
            "remove_activations": list(each.activations),
        }
        for each in convs
    ]
    objective = {"restores": [each.conv for each in convs], "block": kind, "ratio": ratio}
    return read_plan({"graphfold_plan": 1, "segments": segments, "objective": objective})


# --- one block --------------------------------------------------------------------------------


class _Block:
    """Puts a block in the place of one convolution."""

    def __init__(self, graph: Graph, site: ConvSite, kind: Kind) -> None:
        self.graph = graph
        self.site = site
        self.kind = kind
        self.conv = site.conv
        self.rank = len(site.kernel)
        weight = graph.constant(site.conv.inputs[1])
        assert weight is not None
        self.weight: NDArray[Any] = weight

    def build(self, ratio: float, rng: np.random.Generator) -> ExpandedConv:
        """Replace the convolution."""
        site, conv = self.site, self.conv
        hidden, factors = self._factors(ratio, rng)
        sizes = self.graph.sizes(conv.inputs[0]) or (None,) * self.rank
        axes = conv_axes(conv, site.kernel, sizes)
        ones = [1] * self.rank
        strides = [axis.stride for axis in axes]
        # A stride costs least where it comes first; only windows have to wait for theirs.
        first, second = (strides, ones) if site.kernel == tuple(ones) else (ones, strides)
        source, bias = conv.inputs[0], conv.inputs[2] if len(conv.inputs) > 2 else None
        has_norm = any(is_op(node, "BatchNormalization") for node in site.nodes)
        new_bias = self.kind == "inverted" and bias is None and len(self._behind()) == 0
        assert source is not None
        pads = [axis.begin for axis in axes] + [axis.end for axis in axes]
        y = self._conv("expansion", source, factors.expansion, ones, strides=first, pads=pads)
        inner = [y := self._norm("expansion", y)] if self.kind == "inverted" else []
        dilations = [axis.dilation for axis in axes]
        options: dict[str, Any] = {"strides": second, "dilations": dilations, "group": hidden}
        y = self._conv("depthwise", y, factors.depthwise, site.kernel, **options)
        if self.kind == "inverted":
            inner.append(y := self._norm("depthwise", y))
        y = self._conv("projection", y, factors.projection, ones, bias=bias)
        if self.kind == "inverted" and not has_norm:
            y = self._norm("projection", y)
        entry, name = self.graph.current(site.input).name or "", site.name
        output = y if site.output is conv.outputs[0] else site.output
        self.graph.take_over(conv.outputs[0], y)
        self.graph.remove_dead([conv])
        return ExpandedConv(
            conv=name,
            input=entry,
            output=output.name or "",
            kernel=site.kernel,
            in_channels=site.in_channels,
            hidden=hidden,
            out_channels=site.out_channels,
            activations=tuple(value.name or "" for value in inner),
            new_bias=new_bias,
            error=self._error(factors) if self.kind == "linear" else None,
        )

    def _behind(self) -> tuple[ir.Node, ...]:
        """What folding takes into the convolution, and its bias with it."""
        return self.site.nodes[self.site.nodes.index(self.conv) + 1 :]

    def _factors(self, ratio: float, rng: np.random.Generator) -> tuple[int, Factors]:
        hidden = max(1, round(ratio * self.site.in_channels))
        if self.kind == "inverted":
            return hidden, random_factors(self.weight.shape, hidden, rng)
        hidden = max(hidden, hidden_for_exactness(self.weight.shape))
        return hidden, exact_factors(self.weight, hidden, rng)

    def _error(self, factors: Factors) -> float:
        stored = Factors(
            *(
                array.astype(self.weight.dtype).astype(np.float64)
                for array in (factors.expansion, factors.depthwise, factors.projection)
            )
        )
        wide = self.weight.astype(np.float64)
        error = np.abs(stored.merged().reshape(wide.shape) - wide).max(initial=0.0)
        return float(error / max(float(np.abs(wide).max(initial=0.0)), 1e-30))

    def _conv(
        self,
        role: str,
        source: ir.Value,
        weight: NDArray[np.float64],
        sizes: Sequence[int],
        bias: ir.Value | None = None,
        **options: Any,
    ) -> ir.Value:
        wide = weight.reshape(len(weight), -1, *sizes)
        inputs = [source, self._constant(f"{role}.weight", wide)]
        inputs += [] if bias is None else [bias]
        ones = [1] * self.rank
        found = {"strides": ones, "dilations": ones, "pads": [0, 0] * self.rank, "group": 1}
        return self._node("Conv", role, inputs, found | options | {"kernel_shape": list(sizes)})

    def _norm(self, role: str, source: ir.Value) -> ir.Value:
        """A normalisation that does nothing until it has seen something."""
        shape = self.graph.shapes[source.name or ""]
        channels = shape[1]
        assert isinstance(channels, int)
        values = {"scale": 1.0, "bias": 0.0, "mean": 0.0, "variance": 1.0}
        inputs = [
            self._constant(f"{role}.norm.{key}", np.full(channels, value))
            for key, value in values.items()
        ]
        attributes = {"epsilon": 1e-5, "momentum": 0.9}
        return self._node(
            "BatchNormalization", f"{role}.norm", [source, *inputs], attributes, channels
        )

    def _node(
        self,
        op_type: str,
        role: str,
        inputs: Sequence[ir.Value],
        attributes: Mapping[str, Any],
        channels: int | None = None,
    ) -> ir.Value:
        attrs = [ir.convenience.convert_attribute(key, each) for key, each in attributes.items()]
        node = ir.Node("", op_type, inputs, attrs)
        self.graph.ir.insert_before(self.conv, node)
        value = node.outputs[0]
        value.name = node.name = self._name(role)
        width = channels or self.graph.shapes[inputs[1].name or ""][0]
        self.graph.shapes[value.name] = (None, width, *(None for _ in range(self.rank)))
        return value

    def _constant(self, role: str, data: NDArray[np.float64]) -> ir.Value:
        value = self.graph.add_initializer(self.site.name, data.astype(self.weight.dtype))
        self.graph.rename(value, self._name(role))
        return value

    def _name(self, role: str) -> str:
        name = f"{self.site.name}/{role}"
        while name in self.graph.names:
            name += "_"
        self.graph.names.add(name)
        return name


# --- the promise ------------------------------------------------------------------------------


def _check_structure(original: Model, folded: Model) -> None:
    """Refuse blocks that fold to something else than the original does.

    Raises:
        ModelError: says what only one of the two has.
    """
    before, after = (Counter(_operators(Graph(each))) for each in (original, folded))
    if before == after:
        return
    lost, gained = sorted(before - after), sorted(after - before)
    parts = [f"only the {who} has {what[0]}" for who, what in
             (("original", lost), ("expanded one", gained)) if what]  # fmt: skip
    raise ModelError(
        f"folding back does not restore the folded original: {', '.join(parts)}",
        hint="leave out convolutions that folding merges with their neighbours anyway",
    )


def _operators(graph: Graph) -> Iterator[str]:
    """Each node as a text: operator, shapes of constants, geometry, the tensor that it makes."""
    for node in graph.ir:
        # A bias more or less is no other structure.
        inputs = node.inputs[:2] if is_op(node, "Conv") else node.inputs
        shapes = [graph.shape(value) if graph.is_constant(value) else "" for value in inputs]
        names = [value.name or "" for value in node.outputs]
        made = ", ".join("" if _MARK in name else name for name in names)
        yield f"{node.op_type} {shapes} {_settings(graph, node)} {made}"


def _settings(graph: Graph, node: ir.Node) -> str:
    """A node's attributes; those of a convolution in one spelling, where they have one."""
    weight = graph.shape(node.inputs[1]) if is_op(node, "Conv") else None
    sizes = [size for size in (weight or ())[2:] if isinstance(size, int)]
    if sizes:
        known = graph.sizes(node.inputs[0]) or (None,) * len(sizes)
        with contextlib.suppress(NotExactError):
            axes = conv_axes(node, sizes, known)
            numbers = [(axis.stride, axis.dilation, axis.begin, axis.end) for axis in axes]
            return f"{numbers} {attribute(node, 'group', 1)} groups"
    return ", ".join(sorted(str(each) for each in node.attributes.values()))

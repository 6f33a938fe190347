"""Small pieces of a network as they would be run: what a latency table's rows are measured on.

A snippet is a few operators with the shapes of their inputs; its weights are random, since times
do not depend on them. It is described by a canonical text, so that what is the same operator at
the same shapes is measured once, wherever it stands.
"""

from __future__ import annotations

import hashlib
import json
import math
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from graphfold.calibration.behind import with_what_stays
from graphfold.candidates import Candidate
from graphfold.choices import Choice
from graphfold.cuts import Step
from graphfold.drops import Drop
from graphfold.errors import UsageError
from graphfold.graph import Graph
from graphfold.linear import variable_inputs
from graphfold.plan import Family
from graphfold.runtime import Runnable, Session
from graphfold.shapes import TensorShape
from graphfold.sites import ActivationSite, Sites
from graphfold.specs import Filling, random_inputs

Shape = tuple[int, ...]

# Small constants are settings (the limits of a Clip), except those of operators with weights.
_LARGEST_SETTING = 16
_WEIGHTED = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul", "BatchNormalization", "PRelu"})
# Elements that pass through memory in the time of one multiply-add, as a share of it.
_MACS_PER_ELEMENT = 32
_HOPELESS = 4
# Fewer channels than any blocked layout has in a block: the first convolution reads them as they
# come, with no change of layout before it.
_MOST_DRAWN = 1 << 16
_FEW_CHANNELS = 4
# Operators that begin with a kernel of their own, never fused into the one before.
_SEPARATE = frozenset(
    {"Conv", "ConvTranspose", "MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool"}
)


@dataclass(frozen=True)
class Tensor:
    """A tensor of known type and shape."""

    name: str
    dtype: int
    shape: Shape

    @property
    def is_image(self) -> bool:
        """Batch, channels and two spatial axes of floats: what blocked layouts are for."""
        return len(self.shape) == 4 and self.dtype == onnx.TensorProto.FLOAT


@dataclass(frozen=True)
class Snippet:
    """A few operators between tensors of known shapes.

    Attributes:
        nodes: in execution order; the names of tensors are local.
        inputs: tensors that come from the network around.
        output: the only tensor that goes on.
        settings: small constants, by name.
        weights: large ones, of which only type and shape are kept.
        at_input, at_output: the network begins or ends here, so it has no operator before or
            behind whose layout of memory it shares.
    """

    nodes: tuple[onnx.NodeProto, ...]
    inputs: tuple[Tensor, ...]
    output: Tensor
    settings: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    weights: tuple[Tensor, ...] = ()
    at_input: bool = False
    at_output: bool = False

    @cached_property
    def digest(self) -> str:
        """sha256 of everything that its latency depends on."""
        return hashlib.sha256(json.dumps(self._description()).encode()).hexdigest()[:24]

    def _description(self) -> list[Any]:
        numbers: dict[str, int] = {"": -1}

        def number(names: Iterable[str]) -> list[int]:
            return [numbers.setdefault(name, len(numbers)) for name in names]

        constants: dict[str, list[Any]] = {
            name: [str(value.dtype), list(value.shape), value.ravel().tolist()]
            for name, value in self.settings.items()
        }
        constants |= {item.name: [item.dtype, list(item.shape)] for item in self.weights}
        number(item.name for item in self.inputs)
        nodes = [
            [
                node.domain,
                node.op_type,
                number(node.input),
                number(node.output),
                sorted(str(attribute) for attribute in node.attribute),
                [constants.get(name) for name in node.input],
            ]
            for node in self.nodes
        ]
        inputs = [[item.dtype, list(item.shape)] for item in self.inputs]
        return [nodes, inputs, list(self.output.shape), self.at_input, self.at_output]

    @property
    def is_fusible(self) -> bool:
        """Whether the runtime may fuse it with the operator that makes its input."""
        if self.at_input or not all(item.is_image for item in self.inputs):
            return False
        names = {item.name for item in self.inputs}
        heads = [node for node in self.nodes if names & set(node.input)]
        return any(node.op_type not in _SEPARATE for node in heads)

    def measured_parts(self) -> tuple[Snippet, ...]:
        """What is measured for it: itself, and what made its inputs where that is fused with it."""
        makers = (maker(item) for item in self.inputs) if self.is_fusible else ()
        return (self, *makers)

    @cached_property
    def weight_bytes(self) -> int:
        """Of its weights in float32."""
        return sum(4 * math.prod(item.shape) for item in self.weights)

    @cached_property
    def cost(self) -> float:
        """Multiply-adds of its convolutions, and its traffic in units of multiply-adds."""
        shapes = {item.name: item.shape for item in self.weights}
        kernels = [
            shapes[node.input[1]]
            for node in self.nodes
            if node.op_type == "Conv" and node.input[1] in shapes
        ]
        positions = self.output.shape[0] * math.prod(self.output.shape[2:])
        macs = sum(math.prod(kernel) * positions for kernel in kernels)
        elements = sum(math.prod(item.shape) for item in (*self.inputs, self.output))
        return macs + _MACS_PER_ELEMENT * elements


def maker(tensor: Tensor) -> Snippet:
    """A cheap convolution that makes a tensor, laid out as the network's own would."""
    source = Tensor("few", tensor.dtype, (tensor.shape[0], _FEW_CHANNELS, *tensor.shape[2:]))
    output = Tensor("made", tensor.dtype, tensor.shape)
    weight = Tensor("w", tensor.dtype, (tensor.shape[1], _FEW_CHANNELS, 1, 1))
    node = helper.make_node("Conv", ["few", "w"], ["made"], kernel_shape=[1, 1])
    return Snippet((node,), (source,), output, weights=(weight,), at_input=True)


def random_weight(tensor: Tensor, name: str) -> NDArray[Any]:
    """Random numbers that keep activations near one: no overflow and no denormal numbers.

    Other numbers for every name, lest the runtime take equal operators for one.
    """
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    scale = 1 / math.sqrt(max(1, math.prod(tensor.shape[1:])))
    dtype = helper.tensor_dtype_to_np_dtype(tensor.dtype)
    # Of large tensors every block is the same: drawing numbers would take longer than measuring.
    size = math.prod(tensor.shape)
    block = scale * rng.standard_normal(min(size, _MOST_DRAWN), dtype=np.float32)
    return np.resize(block.astype(dtype), tensor.shape)


class Snippets:
    """Makes snippets of one network at one input shape.

    Args:
        graph: the network.
        sites: its activation and conv sites.
        shapes: of all its tensors, complete.
        values: of tensors that no data but the model itself decides (amounts to pad by), by name.
    """

    def __init__(
        self,
        graph: Graph,
        sites: Sites,
        shapes: Mapping[str, TensorShape],
        values: Mapping[str, NDArray[Any]] | None = None,
    ) -> None:
        self.graph = graph
        self._values = values or {}
        self._shapes = shapes
        self._after = {site.input: site for site in sites.activations}
        self._inputs = set(graph.ir.inputs)
        self._opsets = dict(graph.model.ir.opset_imports)

    @property
    def opsets(self) -> dict[str, int]:
        """The network's versions of operator sets."""
        return self._opsets

    def unchanged(self, step: Step) -> Snippet:
        """A step's own operators, its normalisation folded as `optimize` folds it."""
        nodes = step.nodes
        inside = {value for node in nodes for value in node.outputs}
        sources = dict.fromkeys(
            value
            for node in nodes
            for value in variable_inputs(self.graph, node)
            if value not in inside and value.name not in self._values
        )
        return self._snippet(tuple(sources), nodes, nodes[-1].outputs[0], fold=True)

    def chosen(self, candidate: Candidate, choice: Choice) -> Snippet:
        """The convolution that a segment becomes, and what stays behind it."""
        conv = self._conv(candidate, choice.family, choice.kernel, candidate.choices[0].stride)
        return self._followed(candidate, with_what_stays(self.graph, candidate, conv))

    def fitted(
        self, candidate: Candidate, family: Family, kernel: Shape, rank: int | None
    ) -> Snippet:
        """A convolution of any family in a segment's place; two of them for a low rank."""
        stride = candidate.choices[0].stride
        if rank is None:
            conv = self._conv(candidate, family, kernel, stride)
        else:
            conv = self._two_convs(candidate, kernel, stride, rank)
        return self._followed(candidate, conv)

    def _followed(self, candidate: Candidate, conv: Snippet) -> Snippet:
        """What stands in a segment's place, and the activation that stays behind it."""
        site = self._after.get(candidate.output)
        if site is None or not self._is_alone(site):
            return conv
        rest = self._snippet((site.input,), site.nodes, site.output, fold=False)
        return _joined(conv, rest)

    def left(self, drop: Drop) -> Snippet | None:
        """What of a segment's step stays when it is dropped; None where nothing takes time."""
        site = drop.left
        if site is None or not self._is_alone(site):
            return None
        return self._snippet((site.input,), site.nodes, site.output, fold=False)

    def activation(self, site: ActivationSite, place: ir.Value) -> Snippet:
        """An activation of the network behind another tensor than its own."""
        own = self._snippet((site.input,), site.nodes, site.output, fold=False)
        shape = self.tensor(place).shape
        (source,) = own.inputs
        return replace(
            own,
            inputs=(replace(source, shape=shape),),
            output=replace(own.output, shape=shape),
            at_input=False,
            at_output=False,
        )

    def _is_alone(self, site: ActivationSite) -> bool:
        """Whether nothing but an activation reads what it reads."""
        return {usage.node for usage in site.input.uses()} <= set(site.nodes)

    def _two_convs(self, candidate: Candidate, kernel: Shape, stride: Shape, rank: int) -> Snippet:
        """A convolution to a few channels, and a pointwise one from them."""
        whole = self._conv(candidate, "dense", kernel, stride)
        (source,), target = whole.inputs, whole.output
        narrow = Tensor("w", source.dtype, (rank, source.shape[1], *kernel))
        wide = Tensor("v", source.dtype, (target.shape[1], rank, *((1,) * len(kernel))))
        first = onnx.NodeProto()
        first.CopyFrom(whole.nodes[0])
        del first.input[2:]
        first.output[0] = "few"
        second = helper.make_node(
            "Conv",
            ["few", "v", "b"],
            [target.name],
            dilations=[1] * len(kernel),
            group=1,
            kernel_shape=[1] * len(kernel),
            pads=[0] * (2 * len(kernel)),
            strides=[1] * len(kernel),
        )
        bias = whole.weights[1]
        return replace(whole, nodes=(first, second), weights=(narrow, wide, bias))

    def _conv(self, candidate: Candidate, family: Family, kernel: Shape, strides: Shape) -> Snippet:
        source, target = self.tensor(candidate.input), self.tensor(candidate.output)
        channels = source.shape[1]
        group = channels if family == "depthwise" else 1
        weight = Tensor("w", source.dtype, (target.shape[1], channels // group, *kernel))
        bias = Tensor("b", source.dtype, (target.shape[1],))
        begins, ends = [], []
        for size, result, taps, stride in zip(
            source.shape[2:], target.shape[2:], kernel, strides, strict=True
        ):
            padding = max(0, (result - 1) * stride + taps - size)
            begins.append(padding // 2)
            ends.append(padding - padding // 2)
        node = helper.make_node(
            "Conv",
            [source.name, "w", "b"],
            [target.name],
            dilations=[1] * len(kernel),
            group=group,
            kernel_shape=kernel,
            pads=begins + ends,
            strides=strides,
        )
        return Snippet(
            (node,),
            (source,),
            target,
            weights=(weight, bias),
            at_input=candidate.input in self._inputs,
            at_output=candidate.output.is_graph_output(),
        )

    def _snippet(
        self,
        sources: Sequence[ir.Value],
        nodes: Sequence[ir.Node],
        target: ir.Value,
        *,
        fold: bool,
    ) -> Snippet:
        inputs = tuple(self.tensor(value) for value in sources)
        output = self.tensor(target)
        constants = {
            value.name or "": constant
            for node in nodes
            for value in node.inputs
            if value is not None and (constant := self._constant(value)) is not None
        }
        protos = [ir.to_proto(node) for node in nodes if not _is_constant(self.graph, node)]
        if fold:
            protos, constants = self._folded(protos, inputs, output, constants)
        weighted = {name for node in protos if node.op_type in _WEIGHTED for name in node.input}
        settings = {
            name: value
            for name, value in constants.items()
            if name not in weighted and (value.size <= _LARGEST_SETTING or value.dtype.kind != "f")
        }
        weights = tuple(
            Tensor(name, helper.np_dtype_to_tensor_dtype(value.dtype), value.shape)
            for name, value in constants.items()
            if name not in settings
        )
        return Snippet(
            tuple(_explicit(node, constants) for node in protos),
            inputs,
            output,
            settings,
            weights,
            at_input=any(value in self._inputs for value in sources),
            at_output=target.is_graph_output(),
        )

    def _constant(self, value: ir.Value) -> NDArray[Any] | None:
        found = self._values.get(value.name or "")
        return self.graph.constant(value) if found is None else found

    def _folded(
        self,
        nodes: Sequence[onnx.NodeProto],
        inputs: Sequence[Tensor],
        output: Tensor,
        constants: Mapping[str, NDArray[Any]],
    ) -> tuple[list[onnx.NodeProto], dict[str, NDArray[Any]]]:
        from graphfold.model import adopt, to_proto
        from graphfold.optimizer import optimize_model

        graph = helper.make_graph(
            list(nodes),
            "step",
            [_value_info(item) for item in inputs],
            [_value_info(output)],
            [numpy_helper.from_array(value, name) for name, value in constants.items()],
        )
        model = helper.make_model(
            graph, opset_imports=[helper.make_opsetid(*item) for item in self._opsets.items()]
        )
        # Functions that a model brings along stay out of it: what calls one is left as it is.
        model.ir_version = self.graph.model.ir.ir_version
        folded = to_proto(optimize_model(adopt(model, check=False), None, verify=False).folded)
        found = {item.name: numpy_helper.to_array(item) for item in folded.graph.initializer}
        return list(folded.graph.node), found

    def tensor(self, value: ir.Value) -> Tensor:
        """A tensor of the network with its shape.

        Raises:
            UsageError: its shape is not known.
        """
        name = value.name or ""
        shape = self._shapes.get(name)
        dtype = self.graph.dtype(value)
        sizes = tuple(size for size in shape or () if isinstance(size, int))
        if shape is None or dtype is None or len(sizes) < len(shape):
            raise UsageError(
                f"the size of tensor {name!r} is not known",
                hint="--input-shape fixes the sizes of inputs",
            )
        return Tensor(name, int(dtype), sizes)


def amounts(
    graph: Graph, steps: Sequence[Step], input_shapes: Mapping[str, Shape]
) -> dict[str, NDArray[Any]]:
    """Integers that steps are given by operators around them: sizes and positions, not data.

    Raises:
        RunError: onnxruntime cannot run the model.
    """
    names = [
        value.name
        for step in steps
        for node in step.nodes
        for value in variable_inputs(graph, node)
        if value.name and not _is_float(graph, value)
    ]
    if not names:
        return {}
    with Runnable(graph.model) as runnable:
        session = Session(runnable, optimize=False, extra_outputs=names)
    rng = np.random.default_rng(0)
    sizes = {name: tuple(shape) for name, shape in input_shapes.items()}
    found = session.run(random_inputs(session.inputs, sizes, Filling(), rng))
    return {name: found[name] for name in names if name in found}


def _is_float(graph: Graph, value: ir.Value) -> bool:
    dtype = graph.dtype(value)
    return dtype is None or dtype.is_floating_point()


def is_hopeless(snippet: Snippet, replaced: Sequence[Snippet]) -> bool:
    """Whether a replacement costs so much more than what it replaces that it need not be timed.

    It would never be chosen: it is worse in latency and not better in importance. The rule
    looks at sizes alone, so that every machine's table has the same rows.
    """
    return snippet.cost > _HOPELESS * sum(item.cost for item in replaced)


def _is_constant(graph: Graph, node: ir.Node) -> bool:
    return all(graph.is_constant(value) for value in node.outputs)


def _value_info(tensor: Tensor) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(tensor.name, tensor.dtype, tensor.shape)


def _explicit(node: onnx.NodeProto, constants: Mapping[str, NDArray[Any]]) -> onnx.NodeProto:
    """A node without names and notes, a Conv's attributes all stated: equals look equal."""
    found = onnx.NodeProto()
    found.CopyFrom(node)
    found.name, found.doc_string = "", ""
    del found.metadata_props[:]
    stated = {attribute.name for attribute in found.attribute}
    weight = constants.get(node.input[1]) if len(node.input) > 1 else None
    if node.op_type != "Conv" or "auto_pad" in stated or weight is None:
        return found
    rank = weight.ndim - 2
    defaults: dict[str, Any] = {
        "dilations": [1] * rank,
        "group": 1,
        "kernel_shape": list(weight.shape[2:]),
        "pads": [0] * (2 * rank),
        "strides": [1] * rank,
    }
    found.attribute.extend(
        helper.make_attribute(name, value) for name, value in defaults.items() if name not in stated
    )
    found.attribute.sort(key=lambda attribute: attribute.name)
    return found


def _joined(first: Snippet, second: Snippet) -> Snippet:
    """One snippet behind another that makes its only input."""
    return Snippet(
        (*first.nodes, *second.nodes),
        first.inputs,
        second.output,
        {**first.settings, **second.settings},
        (*first.weights, *second.weights),
        first.at_input,
        second.at_output,
    )

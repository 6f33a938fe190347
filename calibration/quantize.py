"""INT8 by onnxruntime's own tools: QDQ format, 8-bit activations, weights per output channel.

What a model has to bring along is seen to here: normalisation folded into convolutions, operator
set 13 or newer (scales per channel), constants as initializers, names for all nodes. Relu and Clip
go into the scale of the tensor they make, as onnxruntime does it, where their limits allow it.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
import onnx
from onnx import helper, numpy_helper

from graphfold.calibration.equalise import equalise as equalised
from graphfold.calibration.ranges import (
    DEFAULT_PERCENTILE,
    Calibration,
    Feed,
    Method,
    collect,
)
from graphfold.errors import ModelError, PlanError, Problem
from graphfold.model import adopt, to_proto
from graphfold.plan import nearest
from graphfold.progress import Progress

if TYPE_CHECKING:
    from graphfold.model import Model


_OLDEST_OPSET = 13
# IR versions: the first whose initializers are no inputs, and the one that operator set came with.
_INPUTS_APART = 4
_QUANTIZED_IR = 7
# onnxruntime's mark of a model whose shapes are inferred.
_INFERRED = ("onnx.infer", "onnxruntime.quant")
WEIGHTED = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
_ACTIVATIONS = frozenset({"Relu", "Clip"})
_MOVES = frozenset({"Gather", "Expand", "Tile", "Identity", "Reshape", "Transpose", "Slice"})
_FLOATS = frozenset({onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16})
# Their kernels hand out floats at no cost, so a network's scores need not be rounded.
_FLOAT_OUTPUT = frozenset({"Gemm", "MatMul"})


@dataclass(frozen=True)
class Scheme:
    """How a network is quantized.

    Attributes:
        calibration: how activations' ranges are found.
        per_channel: a scale per output channel of each weight, instead of one.
        keep_float: tensors whose operators stay in float, those that saved most first.
        equalise: whether channels are scaled first, see `graphfold.calibration.equalise`.
    """

    calibration: Calibration = field(default_factory=Calibration)
    per_channel: bool = True
    keep_float: tuple[str, ...] = ()
    equalise: bool = False


class Quantizer:
    """A network made ready, and what was seen of its activations.

    Args:
        model: the network; it is not modified.
        batches: feeds to calibrate on, run through once.
        methods: the calibrations that schemes will ask for.
        equalise: scale its channels first, where their ranges are far apart: for schemes that say
            so, as activations have other ranges then.

    Raises:
        ModelError: it has nothing that onnxruntime quantizes, or cannot be brought to a form
            that it does.
        DataError: no feeds, or none that fit.
    """

    def __init__(
        self,
        model: Model,
        batches: Iterable[Feed],
        methods: Sequence[Method],
        *,
        equalise: bool = False,
    ) -> None:
        self.equalise = equalise
        self.model = without_norms(model)
        if equalise:
            self.model = equalised(self.model).model
        self._proto = prepared(self.model)
        self._nodes = _quantizable(self._proto)
        if not any(node.op_type in WEIGHTED for node in self._nodes):
            raise ModelError("has no convolution or product that INT8 kernels compute")
        _check_weights(self._proto, self._nodes)
        self._odd = {node.name for node in self._nodes if _is_odd_clip(node, self._proto)}
        self._absorbed = _absorbed(self._proto, self._odd)
        names = _activations(self._proto, self._nodes) - self._absorbed.keys()
        self.statistics = collect(self._proto, sorted(names), batches, methods)

    def operators(self) -> tuple[onnx.NodeProto, ...]:
        """The nodes that are quantized where nothing is kept in float, activations left out."""
        return tuple(node for node in self._nodes if node.op_type not in _ACTIVATIONS)

    def quantized(self, scheme: Scheme) -> Model:
        """The network as a scheme says.

        Raises:
            PlanError: a tensor to keep in float that no operator makes.
            ModelError: onnxruntime cannot quantize it.
        """
        assert scheme.equalise == self.equalise
        from onnxruntime import quantization
        from onnxruntime.quantization.calibrate import TensorData

        ranges = self.statistics.ranges(scheme.calibration)
        ranges |= {name: ranges[taker] for name, taker in self._absorbed.items() if taker in ranges}
        proto = copy.deepcopy(self._proto)
        excluded = sorted(self._odd | self._kept(scheme.keep_float))
        try:
            quantizer = quantization.QDQQuantizer(
                proto,
                scheme.per_channel,
                False,
                quantization.QuantType.QInt8,
                quantization.QuantType.QUInt8,
                {
                    name: TensorData(lowest=low, highest=high)
                    for name, (low, high) in ranges.items()
                },
                [],
                excluded,
                sorted(_quantized_types()),
                {"OpTypesToExcludeOutputQuantization": _free_outputs(proto)},
            )
            found = quantizer.quantize_model()
        except Exception as error:
            text = " ".join(str(error).split()) or type(error).__name__
            raise ModelError(f"onnxruntime cannot quantize it: {text}") from error
        return _finished(self._proto, found)

    def _kept(self, tensors: Collection[str]) -> set[str]:
        """Names of the nodes that make tensors, and of those before an activation."""
        made = {name: node for node in self._proto.graph.node for name in node.output if name}
        problems = [
            Problem(
                f"quantize.keep_float[{number}]",
                f"no operator of the folded network makes {name!r}",
                nearest(name, made),
            )
            for number, name in enumerate(tensors)
            if name not in made
        ]
        if problems:
            raise PlanError(problems)
        found = set()
        for name in tensors:
            node = made[name]
            found.add(node.name)
            if node.op_type in _ACTIVATIONS and node.input[0] in made:
                found.add(made[node.input[0]].name)
        return found


def quantize(
    model: Model,
    batches: Iterable[Feed],
    *,
    calibration: Method = "minmax",
    percentile: float = DEFAULT_PERCENTILE,
    per_channel: bool = True,
    keep_float: Sequence[str] = (),
    progress: Progress | None = None,
) -> Model:
    """A network in INT8.

    Args:
        model: the network in float; it is not modified.
        batches: feeds to calibrate on, by input name.
        calibration: `minmax`, `percentile` or `entropy`.
        percentile: share of values inside the range, in percent; of `percentile` alone.
        per_channel: a scale per output channel of each weight, instead of one.
        keep_float: tensors whose operators stay in float.
        progress: called with (stage, done, total).

    Raises:
        UsageError: an unknown calibration.
        PlanError: a tensor to keep in float that no operator makes.
        ModelError: the network cannot be quantized. DataError: no feeds, or none that fit.
    """
    scheme = Scheme(Calibration(calibration, percentile), per_channel, tuple(keep_float))
    if progress is not None:
        progress("calibrating", 0, 0)
    return Quantizer(model, batches, [calibration]).quantized(scheme)


def roughly_quantized(model: Model, feed: Feed) -> Model:
    """In INT8 with ranges of one feed, random perhaps: as quick as any, of no other use.

    Raises:
        ModelError: the network cannot be quantized.
    """
    return Quantizer(model, [feed], ["minmax"]).quantized(Scheme())


# Making a model ready --------------------------------------------------------------------------


def without_norms(model: Model) -> Model:
    """The network with its normalisation folded, where it has any: alone it would be rounded."""
    if all(node.op_type != "BatchNormalization" for node in model.ir.graph):
        return model
    from graphfold.optimizer import optimize_model

    return optimize_model(model, None, verify=False).folded


def prepared(model: Model) -> onnx.ModelProto:
    """A copy as onnxruntime's quantizer wants it.

    Raises:
        ModelError: an operator set that cannot be brought up to date, or more than 2 GB.
    """
    proto = onnx.ModelProto()
    proto.CopyFrom(to_proto(model))
    _close_inputs(proto)
    if opset_of(proto) < _OLDEST_OPSET:
        try:
            proto = onnx.version_converter.convert_version(proto, _OLDEST_OPSET)
        except Exception as error:
            raise ModelError(
                f"has operator set {opset_of(proto)}, INT8 needs {_OLDEST_OPSET}, and it cannot "
                f"be converted: {' '.join(str(error).split())[:200]}",
                hint="export it with a newer operator set",
            ) from error
    _lift_constants(proto)
    _compute_constants(proto)
    _name_nodes(proto)
    try:
        proto = onnx.shape_inference.infer_shapes(proto)
    except ValueError as error:
        raise ModelError("is too large to be quantized (2 GB)") from error
    helper.set_model_props(
        proto, {item.key: item.value for item in proto.metadata_props} | dict([_INFERRED])
    )
    return proto


def _close_inputs(proto: onnx.ModelProto) -> None:
    """Before IR version 4 every initializer is an input too, which nobody means as one."""
    if proto.ir_version >= _INPUTS_APART:
        return
    constants = {item.name for item in proto.graph.initializer}
    inputs = [item for item in proto.graph.input if item.name not in constants]
    del proto.graph.input[:]
    proto.graph.input.extend(inputs)
    proto.ir_version = _QUANTIZED_IR


def opset_of(proto: onnx.ModelProto) -> int:
    """The version of the standard operator set."""
    return next((item.version for item in proto.opset_import if item.domain in ("", "ai.onnx")), 1)


def _lift_constants(proto: onnx.ModelProto) -> None:
    """Constant nodes become initializers, which are what is quantized as weights."""
    nodes = []
    for node in proto.graph.node:
        value = node.attribute[0].t if node.op_type == "Constant" else None
        if value is None or node.attribute[0].name != "value":
            nodes.append(node)
            continue
        constant = onnx.TensorProto()
        constant.CopyFrom(value)
        constant.name = node.output[0]
        proto.graph.initializer.append(constant)
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)


def _compute_constants(proto: onnx.ModelProto) -> None:
    """Constants that are spelled in few bytes (the border of a merged convolution) written out.

    onnxruntime computes them when it loads a float network. Behind a quantized constant it cannot,
    and would gather bytes on every run: up to a quarter of the whole network's time.
    """
    from onnx.reference import ReferenceEvaluator

    known = {item.name for item in proto.graph.initializer}
    values = {item.name: item for item in proto.graph.initializer}
    outputs = {item.name for item in proto.graph.output}
    nodes = []
    for node in proto.graph.node:
        names = [name for name in node.input if name]
        is_constant = node.op_type in _MOVES and names and known.issuperset(names)
        if not is_constant or outputs & set(node.output):
            nodes.append(node)
            continue
        feeds = {name: numpy_helper.to_array(values[name]) for name in names}
        (result,) = ReferenceEvaluator(node).run(None, feeds)
        constant = numpy_helper.from_array(np.asarray(result), node.output[0])
        proto.graph.initializer.append(constant)
        values[constant.name] = constant
        known.add(constant.name)
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)


def _name_nodes(proto: onnx.ModelProto) -> None:
    """Unique names: by them nodes are chosen."""
    taken: set[str] = set()
    for number, node in enumerate(proto.graph.node):
        if not node.name or node.name in taken:
            node.name = f"{node.op_type}/{number}"
        taken.add(node.name)


@cache
def _quantized_types() -> frozenset[str]:
    """Operators that onnxruntime quantizes by default."""
    from onnxruntime.quantization.registry import QDQRegistry, QLinearOpsRegistry

    return frozenset(QDQRegistry.keys() | QLinearOpsRegistry.keys())


def _quantizable(proto: onnx.ModelProto) -> list[onnx.NodeProto]:
    return [node for node in proto.graph.node if node.op_type in _quantized_types()]


def _check_weights(proto: onnx.ModelProto, nodes: Iterable[onnx.NodeProto]) -> None:
    """Weights in 8 bits are constants: nobody may override them.

    Raises:
        ModelError: some are inputs.
    """
    inputs = {item.name for item in proto.graph.input}
    open_weights = inputs & {item.name for item in proto.graph.initializer}
    if any(name in open_weights for node in nodes for name in node.input):
        raise ModelError(
            "has weights that are inputs, which callers may override",
            hint="`python -m onnxruntime.tools.remove_initializer_from_input` fixes them",
        )


def _activations(proto: onnx.ModelProto, nodes: Iterable[onnx.NodeProto]) -> set[str]:
    """Float tensors around the nodes that data decides."""
    constant = {item.name for item in proto.graph.initializer}
    graph = proto.graph
    infos = (*graph.value_info, *graph.output, *graph.input)
    floats = {info.name for info in infos if info.type.tensor_type.elem_type in _FLOATS}
    around = {name for node in nodes for name in (*node.input, *node.output) if name}
    return (around & floats) - constant


def _absorbed(proto: onnx.ModelProto, odd: Collection[str]) -> dict[str, str]:
    """Tensors that an activation alone reads, and what it makes of them.

    onnxruntime drops such an activation and gives the operator before it the activation's range.
    """
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in proto.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    outside = {item.name for item in (*proto.graph.output, *proto.graph.input)}
    found = {}
    for name, nodes in readers.items():
        node = nodes[0]
        is_alone = len(nodes) == 1 and node.op_type in _ACTIVATIONS and node.name not in odd
        if is_alone and name == node.input[0] and name not in outside:
            found[name] = node.output[0]
    return found


def _is_odd_clip(node: onnx.NodeProto, proto: onnx.ModelProto) -> bool:
    """Whether a Clip's limits are unknown or leave zero out, which every 8-bit range holds."""
    if node.op_type != "Clip":
        return False
    constants = {item.name: item for item in proto.graph.initializer}
    for name, sign in zip(node.input[1:], (1, -1), strict=False):
        if not name:
            continue
        if name not in constants:
            return True
        if sign * float(numpy_helper.to_array(constants[name]).reshape(-1)[0]) > 0:
            return True
    return False


def _free_outputs(proto: onnx.ModelProto) -> list[str]:
    """Types of operators that make nothing but outputs of the network, and these for free."""
    outputs = {item.name for item in proto.graph.output}
    inner = {node.op_type for node in proto.graph.node if not outputs & set(node.output)}
    return sorted(_FLOAT_OUTPUT - inner)


def _finished(before: onnx.ModelProto, proto: onnx.ModelProto) -> Model:
    kept = {item.key: item.value for item in proto.metadata_props if item.key != _INFERRED[0]}
    del proto.metadata_props[:]
    helper.set_model_props(proto, kept)
    if _interface(before) != _interface(proto):
        raise ModelError("onnxruntime's quantizer changes its inputs or outputs")
    return adopt(proto, check=False)


def _interface(proto: onnx.ModelProto) -> list[tuple[str, bytes]]:
    """Names and types of inputs and outputs."""
    values = (*proto.graph.input, *proto.graph.output)
    return [(item.name, item.type.SerializeToString()) for item in values]

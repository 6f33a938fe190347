"""Small ONNX models with random, non-zero numbers, and how tests run and compare them.

Everything is drawn from a seeded generator, so a test that fails fails again. Weights, biases
and statistics are kept away from zero: a fold that drops a bias must not pass by luck.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from graphfold.affine import AffineConv
from graphfold.geometry import Axis
from graphfold.graph import Graph
from graphfold.model import load, to_proto
from graphfold.rewrite import PassStatistics, Phase, Work, run_passes, select_passes

Array = NDArray[np.float64]
Dims = Sequence[int | str | None]

_ELEMENT_TYPES = {
    np.dtype(np.float16): TensorProto.FLOAT16,
    np.dtype(np.float32): TensorProto.FLOAT,
    np.dtype(np.float64): TensorProto.DOUBLE,
    np.dtype(np.int64): TensorProto.INT64,
}


def nonzero(rng: np.random.Generator, *shape: int) -> Array:
    """Random numbers of either sign with magnitudes in [0.2, 1]."""
    return rng.uniform(0.2, 1.0, shape) * rng.choice([-1.0, 1.0], shape)


class ModelBuilder:
    """Builds one model node by node; every method returns the name of the tensor it made."""

    def __init__(
        self,
        shape: Dims,
        *,
        seed: int = 0,
        opset: int = 17,
        ir_version: int | None = None,
        dtype: Any = np.float32,
    ) -> None:
        self.rng = np.random.default_rng(seed)
        self.dtype = np.dtype(dtype)
        self.opset = opset
        self.ir_version = ir_version if ir_version is not None else (8 if opset > 8 else 4)
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self.inputs = [helper.make_tensor_value_info("x", _ELEMENT_TYPES[self.dtype], shape)]
        self.rank = len(shape) - 2
        self._channels: dict[str, int] = {}
        if len(shape) > 1 and isinstance(shape[1], int):
            self._channels["x"] = shape[1]
        self._count = 0

    def name(self, stem: str) -> str:
        """A tensor name that is not in use."""
        self._count += 1
        return f"{stem}_{self._count}"

    def constant(self, value: Any, name: str | None = None, *, dtype: Any = None) -> str:
        """Add an initializer."""
        name = name or self.name("constant")
        array = np.asarray(value, dtype=dtype or self.dtype)
        self.initializers.append(numpy_helper.from_array(array, name))
        return name

    def op(
        self,
        op_type: str,
        *inputs: str,
        out: str | None = None,
        outputs: Sequence[str] | None = None,
        channels: int | None = None,
        **attributes: Any,
    ) -> str:
        """Add a node; its name is its first output with a leading `n_`."""
        names = list(outputs) if outputs is not None else [out or self.name(op_type.lower())]
        node = helper.make_node(op_type, list(inputs), names, name=f"n_{names[0]}", **attributes)
        self.nodes.append(node)
        known = [self._channels[name] for name in inputs if name in self._channels]
        if channels is not None or known:
            self._channels[names[0]] = channels if channels is not None else known[0]
        return names[0]

    def conv(
        self,
        source: str,
        out_channels: int,
        kernel: int | Sequence[int] = 1,
        *,
        stride: int | Sequence[int] = 1,
        pad: int | Sequence[int] = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
        bias: bool = True,
        weight: str | None = None,
        out: str | None = None,
        **attributes: Any,
    ) -> str:
        """A Conv with random weights; `pad` is one number, or begins followed by ends."""
        sizes = self._per_axis(kernel)
        width = self._channels[source] // groups
        if weight is None:
            scale = 1.0 / np.sqrt(width * np.prod(sizes))
            data = nonzero(self.rng, out_channels, width, *sizes) * scale
            weight = self.constant(data, self.name("weight"))
        inputs = [source, weight]
        if bias:
            inputs.append(self.constant(nonzero(self.rng, out_channels), self.name("bias")))
        if "auto_pad" not in attributes:
            attributes["pads"] = [pad] * (2 * self.rank) if isinstance(pad, int) else list(pad)
        return self.op(
            "Conv",
            *inputs,
            out=out,
            channels=out_channels,
            strides=self._per_axis(stride),
            dilations=self._per_axis(dilation),
            group=groups,
            kernel_shape=sizes,
            **attributes,
        )

    def depthwise(self, source: str, kernel: int | Sequence[int] = 3, **options: Any) -> str:
        """A depthwise Conv."""
        channels = self._channels[source]
        return self.conv(source, channels, kernel, groups=channels, **options)

    def norm(
        self,
        source: str,
        *,
        epsilon: float | None = 1e-3,
        out: str | None = None,
        outputs: Sequence[str] | None = None,
        **attributes: Any,
    ) -> str:
        """A BatchNormalization with random statistics; small variances make epsilon count."""
        channels = self._channels[source]
        parameters = [
            self.constant(nonzero(self.rng, channels), self.name("gamma")),
            self.constant(nonzero(self.rng, channels), self.name("beta")),
            self.constant(nonzero(self.rng, channels), self.name("mean")),
            self.constant(self.rng.uniform(0.05, 0.5, channels), self.name("variance")),
        ]
        if epsilon is not None:
            attributes["epsilon"] = epsilon
        return self.op(
            "BatchNormalization", source, *parameters, out=out, outputs=outputs, **attributes
        )

    def pad(self, source: str, begins: Sequence[int], ends: Sequence[int], **options: Any) -> str:
        """A Pad over all axes, in the form that the model's opset has."""
        amounts = [*begins, *ends]
        if self.opset < 11:
            return self.op("Pad", source, pads=amounts, **options)
        return self.op("Pad", source, self.constant(amounts, dtype=np.int64), **options)

    def model(
        self, *outputs: str, shapes: Mapping[str, Dims] | None = None, more_inputs: Any = ()
    ) -> onnx.ModelProto:
        """The finished model, checked."""
        infos = [
            helper.make_tensor_value_info(
                name, _ELEMENT_TYPES[self.dtype], None if shapes is None else shapes.get(name)
            )
            for name in outputs
        ]
        graph = helper.make_graph(
            self.nodes, "test", [*self.inputs, *more_inputs], infos, self.initializers
        )
        proto = helper.make_model(
            graph,
            opset_imports=[helper.make_opsetid("", self.opset)],
            ir_version=self.ir_version,
        )
        inferred = onnx.shape_inference.infer_shapes(proto)
        del proto.graph.output[:]
        proto.graph.output.extend(inferred.graph.output)
        for info in proto.graph.output:
            if not info.type.tensor_type.HasField("elem_type"):
                info.type.tensor_type.elem_type = _ELEMENT_TYPES[self.dtype]
        onnx.checker.check_model(proto)
        return proto

    def _per_axis(self, value: int | Sequence[int]) -> list[int]:
        return [value] * self.rank if isinstance(value, int) else list(value)


# --- running ----------------------------------------------------------------------------------


def run(proto: onnx.ModelProto, feeds: Mapping[str, NDArray[Any]]) -> list[NDArray[Any]]:
    """Outputs of a model through onnxruntime with graph optimizations off."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    session = ort.InferenceSession(
        proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    results: list[NDArray[Any]] = session.run(None, dict(feeds))
    return results


def random_input(
    proto: onnx.ModelProto, sizes: Mapping[str, int] | None = None, seed: int = 1
) -> dict[str, NDArray[Any]]:
    """A feed for each input that no initializer stands for; open dimensions from `sizes`."""
    rng = np.random.default_rng(seed)
    initialized = {tensor.name for tensor in proto.graph.initializer}
    feeds = {}
    for info in proto.graph.input:
        if info.name in initialized:
            continue
        kind = info.type.tensor_type
        shape = [dim.dim_value or (sizes or {})[dim.dim_param] for dim in kind.shape.dim]
        dtype = helper.tensor_dtype_to_np_dtype(kind.elem_type)
        feeds[info.name] = rng.standard_normal(shape).astype(dtype)
    return feeds


def border_mask(shape: Sequence[int], reach: int) -> NDArray[np.bool_]:
    """True within `reach` pixels of the spatial border of an [N, C, ...] tensor."""
    mask = np.ones(tuple(shape[2:]), dtype=bool)
    inner = tuple(slice(reach, max(reach, size - reach)) for size in shape[2:])
    mask[inner] = False
    return np.broadcast_to(mask, tuple(shape))


def assert_same(
    expected: NDArray[Any], actual: NDArray[Any], *, reach: int = 1, tolerance: float | None = None
) -> None:
    """Both tensors are equal up to rounding, the interior and the border each on its own."""
    assert expected.shape == actual.shape
    assert expected.dtype == actual.dtype
    if tolerance is None:
        tolerance = {2: 2e-2, 4: 2e-5, 8: 1e-12}[expected.dtype.itemsize]
    wide, other = expected.astype(np.float64), actual.astype(np.float64)
    scale = float(np.max(np.abs(wide)))
    assert scale > 1e-3, "a test on zeros proves nothing"
    error = np.abs(wide - other) / scale
    mask = border_mask(expected.shape, reach)
    for part, where in (("interior", ~mask), ("border", mask)):
        if where.any():
            assert error[where].max() <= tolerance, f"{part} differs by {error[where].max():.2e}"


def assert_same_function(
    before: onnx.ModelProto,
    after: onnx.ModelProto,
    sizes: Mapping[str, int] | None = None,
    *,
    reach: int = 2,
    tolerance: float | None = None,
) -> None:
    """Two models give the same outputs, interior and border compared separately."""
    onnx.checker.check_model(after)
    feeds = random_input(before, sizes)
    expected, actual = run(before, feeds), run(after, feeds)
    assert [info.name for info in before.graph.output] == [info.name for info in after.graph.output]
    for one, two in zip(expected, actual, strict=True):
        assert_same(one, two, reach=reach, tolerance=tolerance)


# --- folding ----------------------------------------------------------------------------------


def make_work(proto: onnx.ModelProto, **options: Any) -> Work:
    """What FOLD passes work on, for a model without a plan."""
    return Work(Graph(load(proto)), **options)


def fold(
    proto: onnx.ModelProto, *names: str, **options: Any
) -> tuple[onnx.ModelProto, dict[str, PassStatistics]]:
    """Run FOLD passes (all of them, or these) through the pass manager, without verification."""
    work = make_work(proto, **options)
    statistics = run_passes(select_passes(names or None), Phase.FOLD, work)
    return to_proto(work.graph.model), {each.name: each for each in statistics}


def op_types(proto: onnx.ModelProto) -> list[str]:
    """Operators of the main graph in execution order."""
    return [node.op_type for node in proto.graph.node]


def node_making(proto: onnx.ModelProto, tensor: str) -> onnx.NodeProto:
    """The node that writes this tensor."""
    return next(node for node in proto.graph.node if tensor in node.output)


def attributes_of(node: onnx.NodeProto) -> dict[str, Any]:
    """Attribute values by name."""
    return {attr.name: helper.get_attribute_value(attr) for attr in node.attribute}


def reasons(statistics: Mapping[str, PassStatistics]) -> dict[str, str]:
    """Reason of every site that was left as it is, by site."""
    return {skip.site: skip.reason for each in statistics.values() for skip in each.skipped}


# --- the algebra, slowly ----------------------------------------------------------------------


def slow_conv(x: Array, conv: AffineConv) -> Array:
    """What an affine convolution is, by its definition, one output pixel and tap at a time.

    y[o, p] = bias[o] + sum over taps t, with q = p * stride - begin + t * dilation inside x's
    domain, of border[o, t] + sum over i of weight[o, i, t] * x[i, q].

    Args:
        x: [I, *sizes].
    """
    out_channels, width = conv.weight.shape[:2]
    outputs = tuple(
        axis.output_size(size) for axis, size in zip(conv.axes, x.shape[1:], strict=True)
    )
    assert min(outputs) > 0
    y = np.zeros((out_channels, *outputs)) + conv.bias.reshape(-1, *[1] * len(outputs))
    rows = np.arange(out_channels).reshape(conv.groups, -1)
    columns = np.arange(width * conv.groups).reshape(conv.groups, -1)
    for place in np.ndindex(*outputs):
        for tap in np.ndindex(*conv.weight.shape[2:]):
            read = tuple(
                p * axis.stride - axis.begin + t * axis.dilation
                for p, t, axis in zip(place, tap, conv.axes, strict=True)
            )
            if any(q < 0 or q >= size for q, size in zip(read, x.shape[1:], strict=True)):
                continue
            for group_rows, group_columns in zip(rows, columns, strict=True):
                taps = conv.weight[(group_rows, slice(None), *tap)]
                y[(group_rows, *place)] += taps @ x[(group_columns, *read)]
            if conv.border is not None:
                y[(slice(None), *place)] += conv.border[(slice(None), *tap)]
    return y


def random_affine(
    rng: np.random.Generator,
    axes: Sequence[Axis],
    in_channels: int,
    out_channels: int,
    groups: int = 1,
    *,
    bias: bool = True,
    border: bool = False,
) -> AffineConv:
    """An affine convolution of these shapes with random, non-zero numbers."""
    kernel = [axis.kernel for axis in axes]
    return AffineConv(
        nonzero(rng, out_channels, in_channels // groups, *kernel),
        nonzero(rng, out_channels) if bias else np.zeros(out_channels),
        tuple(axes),
        groups,
        nonzero(rng, out_channels, *kernel) if border else None,
    )


def as_model(
    convs: Sequence[AffineConv], sizes: Sequence[int], *, dtype: Any = np.float32
) -> onnx.ModelProto:
    """A chain of affine convolutions without border kernels as an ONNX model."""
    in_channels = convs[0].weight.shape[1] * convs[0].groups
    build = ModelBuilder([1, in_channels, *sizes])
    value = "x"
    for conv in convs:
        assert conv.border is None
        weight, bias = build.constant(conv.weight), build.constant(conv.bias)
        value = build.op(
            "Conv",
            value,
            weight,
            bias,
            channels=conv.weight.shape[0],
            strides=[axis.stride for axis in conv.axes],
            dilations=[axis.dilation for axis in conv.axes],
            pads=[axis.begin for axis in conv.axes] + [axis.end for axis in conv.axes],
            group=conv.groups,
            kernel_shape=list(conv.weight.shape[2:]),
        )
    return build.model(value)

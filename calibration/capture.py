"""Tensors inside a network on real inputs, streamed: what fits are made from and judged on."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray
from onnx import helper

from graphfold.graph import Graph, attribute, is_op
from graphfold.model import to_proto
from graphfold.runtime import Runnable, Session

if TYPE_CHECKING:
    from graphfold.model import Model
    from graphfold.specs import Arrays

Feeds = Sequence[Mapping[str, NDArray[Any]]]

_SEED = 0


def extract(
    proto: onnx.ModelProto,
    inputs: Sequence[str],
    outputs: Sequence[str],
    types: Mapping[str, tuple[int, tuple[None, ...] | None]],
) -> onnx.ModelProto:
    """The part of a model between tensors; weights are shared with `proto` as far as protos can.

    Args:
        proto: a model without external data.
        inputs: tensors that are given from outside; those that nothing needs are left out.
        outputs: tensors that are wanted.
        types: element type and shape of tensors that become inputs.
    """
    makers = {name: node for node in proto.graph.node for name in node.output if name}
    given = set(inputs)
    wanted, needed, read = list(outputs), set(), set()
    while wanted:
        name = wanted.pop()
        if not name or name in read:
            continue
        read.add(name)
        node = makers.get(name)
        if name in given or node is None:
            continue
        needed.add(id(node))
        wanted.extend(node.input)
        for item in node.attribute:
            if item.type == onnx.AttributeProto.GRAPH:
                wanted.extend(_outer_names(item.g))
    found = onnx.ModelProto()
    found.ir_version = proto.ir_version
    found.opset_import.extend(proto.opset_import)
    found.functions.extend(proto.functions)
    graph = found.graph
    graph.name = proto.graph.name
    graph.node.extend(node for node in proto.graph.node if id(node) in needed)
    graph.initializer.extend(item for item in proto.graph.initializer if item.name in read)
    for item in proto.graph.input:
        if item.name in read and item.name not in given:
            graph.input.append(item)
    for name in dict.fromkeys(inputs):
        if name in read:
            dtype, shape = types[name]
            graph.input.append(helper.make_tensor_value_info(name, dtype, shape))
    known = {item.name: item for item in proto.graph.output}
    for name in dict.fromkeys(outputs):
        graph.output.append(known.get(name, onnx.ValueInfoProto(name=name)))
    return found


def _outer_names(graph: onnx.GraphProto) -> Iterator[str]:
    """Names that a body reads, its own among them: those do no harm."""
    for node in graph.node:
        yield from node.input
        for item in node.attribute:
            if item.type == onnx.AttributeProto.GRAPH:
                yield from _outer_names(item.g)
    yield from (output.name for output in graph.output)


def tensor_types(graph: Graph) -> dict[str, tuple[int, tuple[None, ...] | None]]:
    """Element types and ranks of a graph's tensors, all sizes open: channels may go."""
    found: dict[str, tuple[int, tuple[None, ...] | None]] = {}
    for name, value in graph.values().items():
        dtype = graph.dtype(value)
        if dtype is not None:
            shape = graph.shape(value)
            found[name] = (int(dtype), None if shape is None else (None,) * len(shape))
    return found


def sizes_of(model: Model, feed: Mapping[str, NDArray[Any]]) -> dict[str, int]:
    """Bytes of a model's tensors when it is given these inputs; those not known are left out."""
    proto = to_proto(model, data=False)
    del proto.graph.value_info[:]
    for info in proto.graph.input:
        if info.name in feed:
            dtype = info.type.tensor_type.elem_type
            info.CopyFrom(helper.make_tensor_value_info(info.name, dtype, feed[info.name].shape))
    for info in proto.graph.output:
        info.type.tensor_type.ClearField("shape")
    with contextlib.suppress(Exception):  # onnx raises several kinds of errors
        proto = onnx.shape_inference.infer_shapes(proto, data_prop=True)
    found = {}
    for info in (*proto.graph.value_info, *proto.graph.output):
        tensor = info.type.tensor_type
        dims = [dim.dim_value for dim in tensor.shape.dim]
        if tensor.HasField("shape") and tensor.elem_type and all(dims):
            item = helper.tensor_dtype_to_np_dtype(tensor.elem_type).itemsize
            found[info.name] = item * math.prod(dims)
    return found


def cores() -> int:
    """Processors that this process may use: onnxruntime's own default counts others."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_part(
    proto: onnx.ModelProto, threads: int, *, optimize: bool = True
) -> Callable[[Mapping[str, NDArray[Any]]], Arrays]:
    """A call that runs a model, as onnxruntime optimizes it."""
    with Runnable(proto.SerializeToString()) as runnable:
        session = Session(runnable, optimize=optimize, threads=threads or cores())
    names = [item.name for item in session.inputs]

    def run(feeds: Mapping[str, NDArray[Any]]) -> Arrays:
        return session.run({name: feeds[name] for name in names})

    return run


def captured(
    model: Model, names: Sequence[str], feeds: Feeds, *, threads: int = 0
) -> Iterator[Arrays]:
    """The model's outputs and inner tensors, feed by feed.

    Raises:
        RunError: onnxruntime cannot run the model.
    """
    run = run_with_inner(model, names, threads)
    for feed in feeds:
        yield run(feed)


def run_with_inner(
    model: Model, names: Sequence[str], threads: int
) -> Callable[[Mapping[str, NDArray[Any]]], Arrays]:
    """A call that gives the model's outputs and inner tensors.

    Raises:
        RunError: onnxruntime cannot run the model.
    """
    with Runnable(to_proto(model).SerializeToString()) as runnable:
        session = Session(runnable, optimize=True, extra_outputs=names, threads=threads or cores())

    def run(feed: Mapping[str, NDArray[Any]]) -> Arrays:
        return session.run(feed) | {name: feed[name] for name in names if name in feed}

    return run


@dataclass(frozen=True)
class Window:
    """Where a convolution reads: one entry per spatial axis; a dense layer has no axes.

    Attributes:
        kernel, strides, dilations: of the convolution.
        begins, ends: padding.
    """

    kernel: tuple[int, ...] = ()
    strides: tuple[int, ...] = ()
    dilations: tuple[int, ...] = ()
    begins: tuple[int, ...] = ()
    ends: tuple[int, ...] = ()

    @property
    def taps(self) -> int:
        """Positions that are read for one result."""
        return math.prod(self.kernel)


def window_of(graph: Graph, node: ir.Node, sizes: Sequence[int]) -> Window:
    """The window of a Conv or AveragePool whose input has these sizes; of a dense layer, none."""
    if not is_op(node, "Conv", "AveragePool"):
        return Window()
    kernel = tuple(attribute(node, "kernel_shape", ()))
    if is_op(node, "Conv"):
        weight = graph.constant(node.inputs[1])
        assert weight is not None
        kernel = weight.shape[2:]
    rank = len(kernel)
    strides = tuple(attribute(node, "strides", [1] * rank))
    dilations = tuple(attribute(node, "dilations", [1] * rank))
    mode = attribute(node, "auto_pad", "NOTSET")
    pads = list(attribute(node, "pads", [0] * (2 * rank)))
    if mode == "VALID":
        pads = [0] * (2 * rank)
    elif mode != "NOTSET":
        totals = [
            max(0, (-(-size // s) - 1) * s + (k - 1) * d + 1 - size)
            for size, s, k, d in zip(sizes, strides, kernel, dilations, strict=True)
        ]
        small = [total // 2 for total in totals]
        large = [total - total // 2 for total in totals]
        pads = small + large if mode == "SAME_UPPER" else large + small
    return Window(kernel, strides, dilations, tuple(pads[:rank]), tuple(pads[rank:]))


def patches(x: NDArray[Any], window: Window, places: NDArray[np.intp]) -> NDArray[Any]:
    """What a convolution reads at some places, [places, channels * taps], channels outermost.

    Args:
        x: [images, channels, *sizes].
        window: of the convolution.
        places: [places, 1 + axes]: image and position in the result.
    """
    if not window.kernel:
        return x[places[:, 0]].reshape(len(places), -1)
    padding = [(0, 0), (0, 0), *zip(window.begins, window.ends, strict=True)]
    padded = np.pad(x, padding) if any(map(any, padding)) else x
    rank = len(window.kernel)
    index: list[NDArray[np.intp]] = [places[:, 0].reshape(-1, *[1] * rank)]
    for axis, (taps, stride, dilation) in enumerate(
        zip(window.kernel, window.strides, window.dilations, strict=True)
    ):
        starts = places[:, 1 + axis].reshape(-1, *[1] * rank) * stride
        offsets = (np.arange(taps) * dilation).reshape(
            1, *[taps if other == axis else 1 for other in range(rank)]
        )
        index.append(starts + offsets)
    # [places, *taps, channels], for the channel axis is a slice between index arrays.
    chosen: tuple[Any, ...] = (index[0], slice(None), *index[1:])
    found: NDArray[Any] = padded[chosen]
    return np.moveaxis(found, -1, 1).reshape(len(places), -1)


def choose_places(
    images: int, sizes: Sequence[int], per_image: int, first: int = 0
) -> NDArray[np.intp]:
    """Random positions of every image, all of them where there are no more than wanted.

    Args:
        images: their number.
        sizes: of the result, per spatial axis.
        per_image: positions wanted.
        first: number of the first image among all: an image has the same positions whatever
            batch it comes in.
    """
    total = math.prod(sizes)
    if total <= per_image:
        flat = np.tile(np.arange(total), (images, 1))
    else:
        flat = np.stack(
            [
                np.random.default_rng([_SEED, number]).choice(total, per_image, replace=False)
                for number in range(first, first + images)
            ]
        )
    numbers = np.repeat(np.arange(images), flat.shape[1])
    return np.stack([numbers, *np.unravel_index(flat.ravel(), tuple(sizes) or (1,))], axis=1)[
        :, : 1 + len(sizes)
    ].astype(np.intp)

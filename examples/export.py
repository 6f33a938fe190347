"""Exports a torch module to ONNX, by either of torch's exporters, in the forms that users have.

`export` is what the other examples call. The forms differ in what a folding tool gets to see:

- `exporter="dynamo"`, torch's current one, or `"torchscript"`, the older one;
- `keep_bn`: batch normalisation as nodes of its own, or fused into the convolutions;
- `keep_pads`: uneven padding as `Pad` nodes (as the exporters write it) or on the convolutions;
- fixed or dynamic batch and image size, and the opset.
"""

import argparse
import contextlib
import io
import logging
import math
import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import onnxscript.optimizer
import torch
from onnx import numpy_helper, shape_inference
from onnx.reference import ReferenceEvaluator

Exporter = Literal["dynamo", "torchscript"]
INPUT, OUTPUT = "input", "logits"

# The newest opset that onnxruntime 1.31 loads. "dynamo" writes 18 and up (asked for less, it writes
# 18), "torchscript" up to 23.
NEWEST_OPSET = 26


def export(
    module: torch.nn.Module,
    path: str | os.PathLike[str] | None = None,
    *,
    exporter: Exporter = "dynamo",
    opset: int | None = None,
    keep_bn: bool = True,
    keep_pads: bool = False,
    dynamic_batch: bool = True,
    dynamic_size: bool = False,
    size: int = 224,
) -> onnx.ModelProto:
    """Export `module`, which maps images [N, 3, size, size] to logits [N, classes].

    Args:
        module: the network; exported as in evaluation, whatever mode it is in.
        path: where to save the model, in one file; not saved if None.
        exporter: "dynamo" or "torchscript".
        opset: the exporter's default if None.
        keep_bn: leave batch normalisation as nodes; otherwise it is fused into the convolutions.
        keep_pads: leave zero `Pad` nodes before convolutions; otherwise they become the
            convolution's own pads.
        dynamic_batch: name the batch axis "N" instead of fixing it to 1.
        dynamic_size: name the image axes "H" and "W" instead of fixing them to `size`.
        size: image size of the example input.

    Returns:
        The model, checked, with input "input" and output "logits".
    """
    training = module.training
    module.eval()
    # A batch of 2: torch.export would specialise a dimension that is 1.
    example = torch.zeros(2 if dynamic_batch else 1, 3, size, size)
    axes = ({0: "N"} if dynamic_batch else {}) | ({2: "H", 3: "W"} if dynamic_size else {})
    convert = _dynamo if exporter == "dynamo" else _torchscript
    try:
        with _quiet():
            model = convert(module, example, axes, opset, keep_bn)
    finally:
        module.train(training)
    if not keep_pads:
        fuse_pads(model)
    onnx.checker.check_model(model)
    if path is not None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        onnx.save(model, path)
    return model


def _dynamo(
    module: torch.nn.Module,
    example: torch.Tensor,
    axes: dict[int, str],
    opset: int | None,
    keep_bn: bool,
) -> onnx.ModelProto:
    dims = {axis: torch.export.Dim(name) for axis, name in axes.items()}
    program = torch.onnx.export(
        module,
        (example,),
        dynamo=True,
        opset_version=opset,
        optimize=not keep_bn,
        input_names=[INPUT],
        output_names=[OUTPUT],
        dynamic_shapes=(dims,) if dims else None,
        verbose=False,
    )
    assert program is not None
    if keep_bn:
        # The optimiser fuses batch normalisation, and without it every one is surrounded by shape
        # arithmetic. These two of its steps tidy up and leave the normalisation alone.
        onnxscript.optimizer.fold_constants(program.model)
        onnxscript.optimizer.remove_unused_nodes(program.model)
    return program.model_proto


def _torchscript(
    module: torch.nn.Module,
    example: torch.Tensor,
    axes: dict[int, str],
    opset: int | None,
    keep_bn: bool,
) -> onnx.ModelProto:
    file = io.BytesIO()
    mode = torch.onnx.TrainingMode.PRESERVE if keep_bn else torch.onnx.TrainingMode.EVAL
    batch = {0: axes[0]} if 0 in axes else {}
    torch.onnx.export(
        module,
        (example,),
        file,  # type: ignore[arg-type]  # the older exporter takes files too
        dynamo=False,
        opset_version=opset,
        training=mode,
        do_constant_folding=True,
        input_names=[INPUT],
        output_names=[OUTPUT],
        dynamic_axes={INPUT: axes, OUTPUT: batch} if axes else None,
    )
    return onnx.load_from_string(file.getvalue())


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporters' progress and deprecation notices off the console."""
    sink = io.StringIO()
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(sink),
            contextlib.redirect_stderr(sink),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def fuse_pads(model: onnx.ModelProto) -> None:
    """Give each zero `Pad` to the convolution behind it, in place.

    Only pads of the image axes by a constant amount of zeros, read by nothing but convolutions,
    are taken; both exporters write those for uneven padding, the older one with eleven nodes of
    arithmetic that compute the constant.
    """
    graph = model.graph
    producers = {name: node for node in graph.node for name in node.output}
    for pad in [node for node in graph.node if node.op_type == "Pad"]:
        readers = [node for node in graph.node if pad.output[0] in node.input]
        amounts = _zero_pads(pad, model, producers)
        if amounts is None or any(node.op_type != "Conv" for node in readers):
            continue
        for conv in readers:
            conv.input[0] = pad.input[0]
            _add_pads(conv, amounts)
    _remove_dead_nodes(graph)


def _zero_pads(
    pad: onnx.NodeProto, model: onnx.ModelProto, producers: dict[str, onnx.NodeProto]
) -> list[int] | None:
    """Begin and end amounts of the image axes, or None if `pad` does anything else."""
    mode = [a.s for a in pad.attribute if a.name == "mode"]
    amounts = _constant(pad.input[1], model, producers)
    fill = _constant(pad.input[2], model, producers) if len(pad.input) > 2 else None
    has_axes = len(pad.input) > 3 and pad.input[3]
    if mode not in ([], [b"constant"]) or amounts is None or has_axes:
        return None
    if fill is not None and np.any(fill):
        return None
    half = len(amounts) // 2
    begin, end = amounts[:half].tolist(), amounts[half:].tolist()
    if any(begin[:2] + end[:2]) or min(begin + end) < 0:
        return None
    return [*begin[2:], *end[2:]]


def _constant(
    name: str, model: onnx.ModelProto, producers: dict[str, onnx.NodeProto]
) -> np.ndarray[Any, Any] | None:
    """The value of a tensor that follows from constants alone, else None."""
    for initializer in model.graph.initializer:
        if initializer.name == name:
            return numpy_helper.to_array(initializer)
    wanted, ancestors = [name], set[str]()
    while wanted:
        node = producers.get(wanted.pop())
        if node is None:
            return None
        if node.output[0] not in ancestors:
            ancestors.add(node.output[0])
            wanted += [source for source in node.input if source]
    nodes = [node for node in model.graph.node if node.output[0] in ancestors]
    result = onnx.ValueInfoProto(name=name)
    graph = onnx.helper.make_graph(nodes, "constant", [], [result])
    part = onnx.helper.make_model(graph, opset_imports=model.opset_import)
    values: Any = ReferenceEvaluator(part).run(None, {})
    return np.asarray(values[0])


def _add_pads(conv: onnx.NodeProto, amounts: list[int]) -> None:
    for attribute in conv.attribute:
        if attribute.name == "pads":
            attribute.ints[:] = [a + b for a, b in zip(attribute.ints, amounts, strict=True)]
            return
    conv.attribute.append(onnx.helper.make_attribute("pads", amounts))


def _remove_dead_nodes(graph: onnx.GraphProto) -> None:
    used = {output.name for output in graph.output}
    for node in reversed(list(graph.node)):
        if used.isdisjoint(node.output):
            graph.node.remove(node)
        else:
            used.update(node.input)
    for container in (graph.initializer, graph.value_info):
        made = {name for node in graph.node for name in node.output}
        for entry in list(container):
            if entry.name not in used and entry.name not in made:
                container.remove(entry)


def macs(model: onnx.ModelProto, size: int = 224) -> int:
    """Multiply-accumulates of the convolutions and linear layers, for one image of `size`."""
    fixed = onnx.ModelProto()
    fixed.CopyFrom(model)
    del fixed.graph.value_info[:]
    for dim, value in zip(
        fixed.graph.input[0].type.tensor_type.shape.dim, (1, 3, size, size), strict=True
    ):
        dim.dim_value = value
    del fixed.graph.output[0].type.tensor_type.shape.dim[:]
    fixed.graph.output[0].type.tensor_type.ClearField("shape")
    inferred = shape_inference.infer_shapes(fixed, strict_mode=True, data_prop=True).graph
    shapes = {
        info.name: [dim.dim_value for dim in info.type.tensor_type.shape.dim]
        for info in inferred.value_info
    }
    weights = {tensor.name: list(tensor.dims) for tensor in inferred.initializer}
    total = 0
    for node in inferred.node:
        if node.op_type == "Conv":
            # one output value takes as many products as a filter has weights
            total += math.prod(shapes[node.output[0]]) * math.prod(weights[node.input[1]][1:])
        elif node.op_type in ("Gemm", "MatMul"):
            total += math.prod(weights[node.input[1]])
    return total


def summary(model: onnx.ModelProto, size: int = 224) -> str:
    """Opset, operators and MACs in three lines."""
    operators = Counter(node.op_type for node in model.graph.node)
    return "\n".join(
        (
            f"opset  {model.opset_import[0].version} (IR {model.ir_version})",
            "nodes  " + ", ".join(f"{count} {name}" for name, count in operators.most_common()),
            f"MACs   {macs(model, size) / 1e6:.2f} M at {size}x{size}",
        )
    )


def command_line(
    description: str | None,
    add_options: Callable[[argparse.ArgumentParser], None],
    *,
    build: Callable[[argparse.Namespace], torch.nn.Module],
    name: Callable[[argparse.Namespace], str],
    size: Callable[[argparse.Namespace], int] = lambda _: 224,
) -> None:
    """Run one example network's command: build it, export it, print what came out.

    Args:
        description: the example's docstring, shown by `--help`.
        add_options: adds the options of this network.
        build: the network, from the parsed options.
        name: its file name without suffix.
        size: its image size where `--size` is not given.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_options(parser)
    parser.add_argument("--exporter", choices=("dynamo", "torchscript"), default="dynamo")
    parser.add_argument("--opset", type=int, help="the exporter's default if left out")
    parser.add_argument("--no-bn", action="store_true", help="fuse batch normalisation")
    parser.add_argument("--keep-pads", action="store_true", help="leave Pad nodes as exported")
    parser.add_argument("--fixed-batch", action="store_true", help="batch of 1 instead of N")
    parser.add_argument("--dynamic-size", action="store_true", help="image size H x W")
    parser.add_argument("--size", type=int, help="image size")
    parser.add_argument("-o", "--output", type=Path, help="default: out/NAME.onnx")
    args = parser.parse_args()
    args.size = args.size or size(args)
    path = args.output or Path("out") / f"{name(args)}.onnx"
    model = export(
        build(args),
        path,
        exporter=args.exporter,
        opset=args.opset,
        keep_bn=not args.no_bn,
        keep_pads=args.keep_pads,
        dynamic_batch=not args.fixed_batch,
        dynamic_size=args.dynamic_size,
        size=args.size,
    )
    print(f"saved  {path}")
    print(summary(model, args.size))

"""Sizes of every tensor where the model leaves some open: inferred, else measured in one run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from graphfold import guard

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import onnx

    from graphfold.graph import Graph
    from graphfold.shapes import TensorShape


def resolved_shapes(
    graph: Graph, input_shapes: Mapping[str, Sequence[int]] | None = None
) -> Mapping[str, TensorShape]:
    """The graph's tensor shapes with unknown batches as 1 and other inputs as given.

    Runs onnx's shape inference on a copy without weights, and the model itself for shapes that
    this leaves open (padding or reshaping by computed amounts); the graph's own where all is
    known.
    """
    inputs = [value for value in graph.ir.inputs if not value.is_initializer()]
    declared = {value.name or "": graph.shape(value) for value in inputs}
    given = dict(input_shapes or {})
    if "" in given and len(inputs) == 1:
        given[inputs[0].name or ""] = given.pop("")
    fixed = {name: _fixed(s, given.get(name)) for name, s in declared.items() if s}
    shapes: Mapping[str, TensorShape] = graph.shapes
    if any(fixed.get(name) != shape for name, shape in declared.items() if shape):
        shapes = _infer(graph, fixed)
    is_fixed = len(fixed) == len(declared) and all(map(_is_known, fixed.values()))
    if is_fixed and not all(_is_known(shapes.get(name)) for name in _computed(graph)):
        return dict(shapes) | _measured(graph, fixed, unlimited=bool(input_shapes))
    return shapes


def _is_known(shape: TensorShape | None) -> bool:
    return shape is not None and all(isinstance(size, int) and size >= 0 for size in shape)


def _computed(graph: Graph) -> list[str]:
    return [value.name for node in graph.ir for value in node.outputs if value.name]


def _measured(
    graph: Graph, fixed: Mapping[str, TensorShape], *, unlimited: bool
) -> dict[str, TensorShape]:
    """Shapes of all tensors in one run of the model; none where onnxruntime does not run it."""
    import numpy as np

    from graphfold.errors import ModelError
    from graphfold.runtime import Runnable, Session, weight_bytes
    from graphfold.specs import Filling, random_inputs

    sizes = {
        name: tuple(size for size in shape if isinstance(size, int))
        for name, shape in fixed.items()
    }
    if guard.avoided(guard.MEASURE) or guard.avoided(guard.RUN):
        return {}
    weights = weight_bytes(graph.model)
    seconds = None if unlimited else guard.run_seconds(weights)
    try:
        with (
            guard.step(guard.MEASURE, seconds),
            guard.memory(guard.run_bytes(weights)),
            Runnable(graph.model) as runnable,
        ):
            session = Session(runnable, optimize=False, extra_outputs=_computed(graph))
            rng = np.random.default_rng(0)
            found = session.run(random_inputs(session.inputs, sizes, Filling(), rng))
    except (ModelError, MemoryError):
        return {}
    return {name: array.shape for name, array in found.items()}


def _fixed(shape: TensorShape, given: Sequence[int] | None) -> TensorShape:
    if given is not None and len(given) == len(shape):
        return tuple(given)
    first = shape[0] if isinstance(shape[0], int) and shape[0] > 0 else 1
    rest = tuple(size if not isinstance(size, int) or size > 0 else None for size in shape[1:])
    return (first, *rest)


def _infer(graph: Graph, fixed: Mapping[str, TensorShape]) -> Mapping[str, TensorShape]:
    import onnx

    from graphfold.check import shorten_default_domain
    from graphfold.model import to_proto

    proto = to_proto(graph.model, data=False)
    shorten_default_domain(proto)
    for item in proto.graph.input:
        if item.name in fixed:
            _set_shape(item, fixed[item.name])
    # Declared inner shapes carry the free sizes' names and would win over what is inferred.
    del proto.graph.value_info[:]
    for item in proto.graph.output:
        item.type.tensor_type.ClearField("shape")
    if guard.avoided(guard.INFERENCE) is not None:
        return graph.shapes
    try:
        with guard.inference(len(proto.graph.node)):
            inferred = onnx.shape_inference.infer_shapes(proto, data_prop=True)
    except Exception:  # noqa: BLE001 - onnx raises RuntimeError and its own InferenceError alike
        return graph.shapes
    names = _free_sizes(graph, fixed)
    found = {
        name: tuple(names.get(size, size) if isinstance(size, str) else size for size in shape)
        for name, shape in graph.shapes.items()
    }
    for item in (*inferred.graph.input, *inferred.graph.value_info, *inferred.graph.output):
        if item.type.tensor_type.HasField("shape"):
            shape = tuple(
                dim.dim_value if dim.HasField("dim_value") else dim.dim_param or None
                for dim in item.type.tensor_type.shape.dim
            )
            found[item.name] = _merged(shape, found.get(item.name))
    return found


def _free_sizes(graph: Graph, fixed: Mapping[str, TensorShape]) -> dict[str, int]:
    """What the named sizes of the graph's inputs are in `fixed`."""
    names: dict[str, int] = {}
    for value in graph.ir.inputs:
        declared = graph.shape(value) or ()
        for free, size in zip(declared, fixed.get(value.name or "", ()), strict=False):
            if isinstance(free, str) and isinstance(size, int):
                names.setdefault(free, size)
    return names


def _merged(inferred: TensorShape, declared: TensorShape | None) -> TensorShape:
    """Inferred sizes, and declared ones where inference found none."""
    if declared is None or len(declared) != len(inferred):
        return inferred
    return tuple(
        new if isinstance(new, int) or not isinstance(old, int) else old
        for new, old in zip(inferred, declared, strict=True)
    )


def _set_shape(item: onnx.ValueInfoProto, shape: TensorShape) -> None:
    for dim, size in zip(item.type.tensor_type.shape.dim, shape, strict=False):
        if isinstance(size, int):
            dim.dim_value = size

"""Mistakes in data, told with what shows them.

Axes in another order and a missing batch axis show in the shapes. That values are on another scale
than the model was trained on shows in its first normalisation: the statistics that it holds are
those of the training data behind the operators before it, and the same operators give other ones on
other data. A model without any shows it only where a convolution reads whole numbers up to 255.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from graphfold.errors import DataError
from graphfold.graph import Graph, attribute, consumers, is_op
from graphfold.runtime import RunError, Runnable, Session
from graphfold.specs import InputSpec, describe_shape

if TYPE_CHECKING:
    from graphfold.model import Model

_IMAGE_RANK = 4
# Deviations of single batches of pictures stay well within this factor, wrong scales far outside.
LARGEST_FACTOR = 3.0
_LARGEST_BYTE = 255
_CONVS = ("Conv", "ConvTranspose")
_ORDERS = (((0, 3, 1, 2), "NHWC", "NCHW"), ((0, 2, 3, 1), "NCHW", "NHWC"))
_NO_VALUES_CHANGE = ("Transpose", "Pad", "Cast", "Identity", "Reshape", "Unsqueeze")


def explain_shapes(inputs: Sequence[InputSpec], feed: Mapping[str, Any], where: str) -> None:
    """Refuse arrays whose axes are in another order, or that are one sample without a batch axis.

    Raises:
        DataError: names both shapes and what to do.
    """
    for spec in inputs:
        array = feed.get(spec.name)
        if array is None:
            continue
        shape, wanted = np.asarray(array).shape, spec.shape
        both = (
            f"array for input {spec.name!r} is {describe_shape(shape)}, the model wants "
            f"{describe_shape(wanted)}"
        )
        if len(shape) == len(wanted) == _IMAGE_RANK and not _fits(shape, wanted):
            for order, have, want in _ORDERS:
                if _fits([shape[axis] for axis in order], wanted):
                    raise DataError(
                        f"{both}: the data is {have}, the model {want}",
                        where=where,
                        hint=f"array.transpose{order}",
                    )
        if len(shape) + 1 == len(wanted) and _fits((0, *shape), wanted):
            raise DataError(f"{both}: the batch axis is missing", where=where, hint="array[None]")


def _fits(shape: Sequence[int], wanted: Sequence[int | str | None]) -> bool:
    """Whether all sizes but the batch are those that the model fixes."""
    return all(
        not isinstance(fixed, int) or fixed == size
        for size, fixed in zip(shape[1:], wanted[1:], strict=True)
    )


def doubt_values(model: Model, feed: Mapping[str, NDArray[Any]]) -> list[str]:
    """What speaks against data being on the scale that the model was trained on; for the user.

    Args:
        model: the model.
        feed: some samples; the more, the surer.
    """
    graph = Graph(model)
    found = []
    norm = _first_norm(graph)
    if norm is not None:
        doubt = _doubt_statistics(graph, model, norm, feed)
        return [doubt] if doubt else []
    for value in graph.ir.inputs:
        array = feed.get(value.name or "")
        if array is not None and _are_bytes(array) and _reaches_conv(value):
            found.append(
                f"input {value.name!r} gets whole numbers from {array.min():.0f} to "
                f"{array.max():.0f}, and a convolution reads them as they are: if the model was "
                "trained on normalised values, normalise them (for pictures: --preprocess NAME)"
            )
    return found


def _first_norm(graph: Graph) -> ir.Node | None:
    """The first BatchNormalization, if it has statistics and only convolutions before it."""
    for node in graph.ir:
        if is_op(node, "BatchNormalization"):
            known = all(graph.constant(value) is not None for value in node.inputs[1:5])
            return node if known and _only_convs_before(graph, node) else None
    return None


def _only_convs_before(graph: Graph, node: ir.Node) -> bool:
    value = node.inputs[0]
    while value is not None and (producer := value.producer()) is not None:
        if not is_op(producer, *_CONVS, *_NO_VALUES_CHANGE):
            return False
        value = producer.inputs[0]
    return value is not None and not graph.is_constant(value)


def _doubt_statistics(
    graph: Graph, model: Model, norm: ir.Node, feed: Mapping[str, NDArray[Any]]
) -> str | None:
    """How far the values that a normalisation gets are from those that it was trained on."""
    source = norm.inputs[0]
    values = _values_of(model, source.name or "", feed) if source is not None else None
    variance = graph.constant(norm.inputs[4])
    if values is None or variance is None or values.ndim < 2:
        return None
    expected = np.sqrt(variance.astype(np.float64) + (attribute(norm, "epsilon") or 1e-5))
    axes = (0, *range(2, values.ndim))
    real = values.astype(np.float64).std(axis=axes)
    alive = expected > 0.01 * expected.max()
    factor = float(np.median(real[alive] / expected[alive]))
    if 1 / LARGEST_FACTOR <= factor <= LARGEST_FACTOR:
        return None
    ranges = ", ".join(f"{name} {a.min():.3g} to {a.max():.3g}" for name, a in feed.items())
    return (
        "values seem to be on another scale than the model was trained on: its first "
        f"normalisation, of {source.name if source is not None else ''!r}, was trained on a "
        f"standard deviation of {np.median(expected[alive]):.3g} and gets "
        f"{np.median(real[alive]):.3g}, {factor:.3g} times as much (data: {ranges}); normalise "
        "as in training (for pictures: --preprocess NAME)"
    )


def _values_of(model: Model, name: str, feed: Mapping[str, NDArray[Any]]) -> NDArray[Any] | None:
    if name in feed:
        return feed[name]
    try:
        with Runnable(model) as runnable:
            return Session(runnable, optimize=False, extra_outputs=[name]).run(feed).get(name)
    except RunError:
        return None


def _are_bytes(array: NDArray[Any]) -> bool:
    """Whether an array looks like pictures as files hold them."""
    if array.ndim != _IMAGE_RANK or not array.size or array.dtype.kind not in "fiu":
        return False
    low, high = float(array.min()), float(array.max())
    in_range = low >= 0 and _LARGEST_BYTE / 2 < high <= _LARGEST_BYTE
    return in_range and bool(np.array_equal(array, np.round(array)))


def _reaches_conv(value: ir.Value) -> bool:
    """Whether a convolution reads a tensor, with nothing between that could normalise it."""
    return any(
        is_op(node, *_CONVS) or (is_op(node, *_NO_VALUES_CHANGE) and _reaches_conv(node.outputs[0]))
        for node in consumers(value)
    )

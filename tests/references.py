"""Reference networks of small models: what tests of PLAN passes build, run and look into."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
from builders import run
from numpy.typing import NDArray
from onnx import numpy_helper

from graphfold.model import load, to_proto
from graphfold.plan import read_plan
from graphfold.reference import Reference, build_reference
from graphfold.rewrite import PassStatistics, select_passes


def build(proto: onnx.ModelProto, **plan: Any) -> Reference:
    """The reference network of a plan, given by its fields."""
    return build_reference(load(proto), read_plan({"graphfold_plan": 1, **plan}), select_passes())


def reference(proto: onnx.ModelProto, **plan: Any) -> onnx.ModelProto:
    """The same as a checked ModelProto."""
    model = to_proto(build(proto, **plan).model)
    onnx.checker.check_model(model, full_check=True)
    return model


def statistics(found: Reference, name: str) -> PassStatistics:
    """What one pass did."""
    return next(each for each in found.statistics if each.name == name)


def tensors(
    proto: onnx.ModelProto, names: list[str], feeds: Mapping[str, NDArray[Any]]
) -> list[NDArray[Any]]:
    """Values of inner tensors."""
    shown = onnx.ModelProto()
    shown.CopyFrom(proto)
    del shown.graph.output[:]
    shown.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    return run(shown, feeds)


def constants(proto: onnx.ModelProto) -> dict[str, NDArray[Any]]:
    """Initializers by name."""
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}


def attributes(node: onnx.NodeProto) -> dict[str, Any]:
    """Attributes by name, as Python values."""
    return {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}


def close(actual: NDArray[Any], expected: Any, tolerance: float = 2e-6) -> None:
    """Equal up to float32 rounding, relative to the largest value."""
    wide = np.asarray(expected, dtype=np.float64)
    assert actual.shape == wide.shape
    scale = float(np.abs(wide).max())
    assert scale > 1e-2, "a test on zeros proves nothing"
    error = float(np.abs(actual - wide).max())
    assert error <= tolerance * scale, f"differs by {error / scale:.2e} of scale"

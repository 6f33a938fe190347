"""What a plan leaves behind a merged convolution, as it would be run: added vectors and norms."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray
from onnx import helper

from graphfold.norms import norm_steps

if TYPE_CHECKING:
    from graphfold.calibration.snippets import Snippet
    from graphfold.candidates import Candidate
    from graphfold.graph import Graph
    from graphfold.steps import Step


def with_what_stays(graph: Graph, candidate: Candidate, conv: Snippet) -> Snippet:
    """A segment's convolution, the vectors that are added behind it, and its normalisation."""
    found = conv
    for number in range(len(candidate.aside)):
        found = _with_vector(found, f"vector{number}")
    if candidate.norm == "after":
        found = _with_steps(found, norm_steps(graph, candidate.norms[-1]))
    return found


def _with_vector(first: Snippet, name: str) -> Snippet:
    output = first.output
    shape = (*output.shape[:2], *[1] * (len(output.shape) - 2))
    vector = replace(output, name=name, shape=shape)
    before = f"before {name}"
    node = helper.make_node("Add", [before, name], [output.name])
    nodes = (*_ending_in(first.nodes, output.name, before), node)
    return replace(first, nodes=nodes, inputs=(*first.inputs, vector))


def _with_steps(first: Snippet, steps: Sequence[Step]) -> Snippet:
    name = first.output.name
    nodes = _ending_in(first.nodes, name, "before norm")
    settings, weights = dict(first.settings), list(first.weights)
    for number, (op_type, arguments, attributes) in enumerate(steps):
        inputs = []
        for place, argument in enumerate(arguments):
            inputs.append(_read(argument, f"norm {number} {place}"))
            if isinstance(argument, np.ndarray):
                if argument.dtype.kind == "f":
                    weights.append(replace(first.output, name=inputs[-1], shape=argument.shape))
                else:
                    settings[inputs[-1]] = argument
        made = name if number == len(steps) - 1 else f"norm {number}"
        node = helper.make_node(op_type, inputs, [made])
        node.attribute.extend(_attributes(attributes.values()))
        nodes = (*nodes, node)
    return replace(first, nodes=nodes, settings=settings, weights=tuple(weights))


def _read(argument: Any | NDArray[Any], constant: str) -> str:
    if isinstance(argument, str):
        return "before norm"
    return f"norm {argument}" if isinstance(argument, int) else constant


def _attributes(values: Iterable[Any]) -> list[onnx.AttributeProto]:
    return [ir.to_proto(value) for value in values]


def _ending_in(
    nodes: Sequence[onnx.NodeProto], name: str, other: str
) -> tuple[onnx.NodeProto, ...]:
    """The same nodes with their result called otherwise."""
    last = onnx.NodeProto()
    last.CopyFrom(nodes[-1])
    assert list(last.output) == [name]
    last.output[0] = other
    return (*nodes[:-1], last)

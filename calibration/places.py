"""Segments that fitted weights may replace: where they read, and what fits between their ends."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir

from graphfold.calibration.capture import Window, window_of
from graphfold.candidates import Candidate, find_candidates
from graphfold.graph import Graph, attribute, is_op

# The tensors at both ends of a place, as plans name them.
Key = tuple[str, str]


@dataclass(frozen=True)
class Segment:
    """A part of the network with one tensor in and one out, that one convolution may replace.

    Attributes:
        input, output: its ends.
        nodes: inside.
        stride: of input over output, per axis; empty for tensors without spatial axes.
        reach: how far, per axis, the results of its own operators look before and behind the
            position that they stand at.
        same: whether both ends have the same shape.
    """

    input: ir.Value
    output: ir.Value
    nodes: tuple[ir.Node, ...] = field(repr=False)
    stride: tuple[int, ...]
    reach: tuple[tuple[int, int], ...]
    channels: tuple[int, int]
    sizes: tuple[tuple[int, ...], tuple[int, ...]]
    same: bool

    @property
    def key(self) -> Key:
        """Its ends, as plans name them."""
        return self.input.name or "", self.output.name or ""

    def window(self, kernel: Sequence[int]) -> Window:
        """Where a convolution of this kernel reads, in the middle of where its own operators do."""
        begins, ends = [], []
        for size, result, taps, stride, (before, behind) in zip(
            *self.sizes, kernel, self.stride, self.reach, strict=True
        ):
            begin = max(0, before - (before + behind + 1 - taps) // 2)
            begins.append(begin)
            ends.append(max(0, (result - 1) * stride + taps - size - begin))
        ones = (1,) * len(self.stride)
        return Window(tuple(kernel), self.stride, ones, tuple(begins), tuple(ends))

    def takes(self, kernel: Sequence[int]) -> bool:
        """Whether such a convolution has a result of the right size: padding cannot be negative."""
        window = self.window(kernel)
        found = tuple(
            (size + begin + end - taps) // stride + 1
            for size, taps, stride, begin, end in zip(
                self.sizes[0], kernel, self.stride, window.begins, window.ends, strict=True
            )
        )
        return found == self.sizes[1]


def find_places(graph: Graph) -> Iterator[Segment]:
    """Segments that something else may replace: with an activation inside, sizes fixed."""
    for candidate in find_candidates(graph, move_norms=False).found:
        if candidate.aside:
            continue  # what replaces it reads its input alone
        if candidate.activations or candidate.adds:
            found = _segment(graph, candidate)
            if found is not None:
                yield found


def _segment(graph: Graph, candidate: Candidate) -> Segment | None:
    before, after = graph.shape(candidate.input), graph.shape(candidate.output)
    if before is None or after is None or len(before) != len(after) or len(before) < 3:
        return None
    sizes = before[1:] + after[1:]
    if not all(isinstance(size, int) for size in sizes):
        return None
    spatial = (tuple(before[2:]), tuple(after[2:]))
    stride = candidate.choices[0].stride if candidate.choices else ()
    return Segment(
        candidate.input,
        candidate.output,
        candidate.nodes,
        tuple(stride),
        _reach(graph, candidate, len(stride)),
        (int(before[1] or 0), int(after[1] or 0)),
        spatial,  # type: ignore[arg-type]
        before[1:] == after[1:],
    )


def _reach(graph: Graph, candidate: Candidate, rank: int) -> tuple[tuple[int, int], ...]:
    """Positions before and behind its own that a result of the segment depends on, per axis."""
    nothing = ((0, 0),) * rank
    reaches: dict[ir.Value | None, tuple[tuple[int, int], ...]] = {candidate.input: nothing}
    strides = {candidate.input: (1,) * rank}
    for node in candidate.nodes:
        inside = [value for value in node.inputs if value in reaches]
        if not inside:
            continue
        found = [
            (max(one[0] for one in axis), max(one[1] for one in axis))
            for axis in zip(*(reaches[value] for value in inside), strict=True)
        ]
        stride = strides[inside[0]]  # type: ignore[index]
        if is_op(node, "Conv", "AveragePool"):
            shape = graph.shape(node.inputs[0]) or ()
            window = window_of(graph, node, fixed_sizes(shape[2:]))
            found = [
                (before + begin * step, behind + ((taps - 1) * dilation - begin) * step)
                for (before, behind), step, begin, taps, dilation in zip(
                    found, stride, window.begins, window.kernel, window.dilations, strict=True
                )
            ]
            stride = tuple(a * b for a, b in zip(stride, window.strides, strict=True))
        elif is_op(node, "Pad"):
            begins = _pad_begins(graph, node, rank)
            found = [
                (before + begin * step, behind - begin * step)
                for (before, behind), step, begin in zip(found, stride, begins, strict=True)
            ]
        for value in node.outputs:
            reaches[value], strides[value] = tuple(found), stride
    return reaches.get(candidate.output, nothing)


def _pad_begins(graph: Graph, node: ir.Node, rank: int) -> list[int]:
    amounts = graph.constant(node.inputs[1]) if len(node.inputs) > 1 else None
    if amounts is None:
        amounts = np.asarray(attribute(node, "pads", [0] * (2 * rank + 4)))
    if amounts.size != 2 * rank + 4:
        return [0] * rank
    return [int(amount) for amount in amounts[2 : 2 + rank]]


def fixed_sizes(sizes: Sequence[Any]) -> list[int]:
    """Spatial sizes, 0 where they are open."""
    return [size if isinstance(size, int) else 0 for size in sizes]

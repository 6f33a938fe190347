"""What the choices of a graph take from its layers: convolutions, activations, exact borders.

An activation belongs to the largest convolution that writes into it: through the Add of a residual
block those of all its branches do. A padded convolution behind another window can stand in a
segment only with its padding hoisted, which changes the outputs that the padding reaches; the bias
of a pointwise convolution in front of it is repaired exactly, so that costs nothing.

A layer counts by its own size and as one of many, in equal parts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from graphfold.candidates import Candidate, Candidates
from graphfold.choices import Choice
from graphfold.cost import analyze
from graphfold.errors import UsageError
from graphfold.graph import Graph, attribute
from graphfold.importance import Change, Lost, Whole
from graphfold.linear import variable_inputs
from graphfold.sites import ConvSite
from graphfold.sizes import resolved_shapes


class Losses:
    """Sizes of a graph's layers, counted once, and what choices take from them.

    Args:
        candidates: of the graph.
        input_shapes: sizes that the model leaves open.

    Raises:
        UsageError: MACs depend on sizes that are not known.
    """

    def __init__(
        self, candidates: Candidates, input_shapes: Mapping[str, Sequence[int]] | None = None
    ) -> None:
        graph = candidates.graph
        self._graph = graph
        self._sites = candidates.sites
        self._site_of = {site.conv: site for site in candidates.sites.convs}
        self._active = {site.output for site in candidates.sites.activations}
        shapes = resolved_shapes(graph, input_shapes)
        macs = {node.output: node.macs for node in analyze(graph, shapes).nodes}
        counted: dict[ConvSite, float] = {}
        for site in candidates.sites.convs:
            known = macs.get(site.name)
            if known is None:
                raise UsageError(
                    f"the multiply-adds of {site.name!r} depend on sizes that are not known",
                    hint="give --input-shape",
                )
            counted[site] = known
        self._macs = _evened(counted)
        self._l1 = _evened({site: _l1(graph, site.conv.inputs[1]) for site in counted})
        self._reached = {site: _reached(site, shapes) for site in candidates.sites.convs}

    def whole(self) -> Whole:
        """Everything there is to lose."""
        return Whole(
            activations=len(self._sites.activations),
            convs=len(self._sites.convs),
            macs=math.fsum(self._macs.values()),
            l1=math.fsum(self._l1.values()),
        )

    def change(self, candidate: Candidate, choice: Choice) -> Change:
        """What one choice takes."""
        names = set(choice.removed_convs)
        removed = [site for site in candidate.convs if site.name in names]
        linear = self._before_activations(candidate)
        moved = self._hoisted(candidate, removed)
        return Change(
            activations=len(candidate.activations),
            convs=len(choice.removed_convs),
            macs=self._lost(self._macs, removed, linear, moved),
            l1=self._lost(self._l1, removed, linear, moved),
        )

    def _lost(
        self,
        sizes: Mapping[ConvSite, float],
        removed: Sequence[ConvSite],
        linear: Sequence[ConvSite],
        moved: Sequence[ConvSite],
    ) -> Lost:
        return Lost(
            removed=math.fsum(sizes[site] for site in removed),
            linear=math.fsum(sizes[site] for site in linear),
            moved=math.fsum(sizes[site] * self._reached[site] for site in moved),
        )

    def _before_activations(self, candidate: Candidate) -> list[ConvSite]:
        """For each activation inside, the largest convolution that writes into it."""
        activations = {site.input: site for site in candidate.activations}
        writer: dict[ir.Value, ConvSite | None] = {candidate.input: None}
        for node in candidate.nodes:
            sources = [writer.get(value) for value in variable_inputs(self._graph, node)]
            largest = max(filter(None, sources), key=self._macs.__getitem__, default=None)
            for value in node.outputs:
                writer[value] = None if value in self._active else self._site_of.get(node, largest)
        found = [writer.get(value) for value in activations]
        return [site for site in found if site is not None]

    def _hoisted(self, candidate: Candidate, removed: Sequence[ConvSite]) -> list[ConvSite]:
        """Of the convolutions that stay, those with padding behind another window."""
        found: list[ConvSite] = []
        is_behind: dict[ir.Value, bool] = {candidate.input: False}
        for node in candidate.nodes:
            behind = any(is_behind.get(value) for value in variable_inputs(self._graph, node))
            site = self._site_of.get(node)
            if site is not None and site not in removed and max(site.kernel) > 1:
                if behind and self._reached[site] > 0:
                    found.append(site)
                behind = True
            for value in node.outputs:
                is_behind[value] = behind
        return found


def _evened(sizes: Mapping[ConvSite, float]) -> dict[ConvSite, float]:
    """Each layer's size and the average layer's, in equal parts; the sum is the same.

    By its own size alone a depthwise convolution, which mixes all of space with a hundredth of
    the network's multiply-adds, would be the first to go everywhere.
    """
    mean = math.fsum(sizes.values()) / max(1, len(sizes))
    return {site: (size + mean) / 2 for site, size in sizes.items()}


def _l1(graph: Graph, value: Any) -> float:
    weight = graph.constant(value)
    assert weight is not None
    return float(np.abs(weight).sum(dtype=np.float64))


def _reached(site: ConvSite, shapes: Mapping[str, Any]) -> float:
    """The share of a convolution's outputs that read padding, its Pad node's included."""
    rank = len(site.kernel)
    before = shapes.get(site.input.name or "", ())[-rank:]
    after = shapes.get(site.conv.outputs[0].name or "", ())[-rank:]
    strides = attribute(site.conv, "strides") or (1,) * rank
    dilations = attribute(site.conv, "dilations") or (1,) * rank
    inside = 1.0
    for kernel, stride, dilation, size, outputs in zip(
        site.kernel, strides, dilations, before, after, strict=False
    ):
        if not (isinstance(size, int) and isinstance(outputs, int) and outputs > 0):
            continue
        padding = (outputs - 1) * stride + (kernel - 1) * dilation + 1 - size
        inside *= 1 - min(1.0, max(0, padding) / (stride * outputs))
    return 1 - inside

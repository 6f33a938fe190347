"""Latency of a network with any replacements, from a few such networks measured kernel by kernel.

Networks that are narrowed everywhere at once are run under the runtime's profiler. A kernel's time
is then known at a few shares of its multiply-adds and interpolated between them, and a network with
any widths is the sum over its kernels. Kernels of replaced segments are taken out, those of
replacements come from networks that hold them. So a handful of runs stands for all combinations,
and every kernel was measured where it stands: with its neighbours, layouts and fusions.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray

from graphfold.calibration.kernels import Profiled, undisturbed
from graphfold.calibration.places import Key
from graphfold.calibration.workbench import Replacement, State, Workbench
from graphfold.graph import consumers
from graphfold.progress import Progress

# Widths at which whole networks are measured, as shares.
SHARES = (1.0, 0.75, 0.5, 0.25)
# Runs of the networks alternate in rounds, so that what disturbs one disturbs all.
_ROUNDS = 10
_RUNS = 6
_TOKEN = re.compile(r"_token_\d+$")
_SUFFIXES = ("_nchwc", "_quant", "_QuantizeLinear", "_DequantizeLinear")

Convert = Callable[[onnx.ModelProto], onnx.ModelProto]


@dataclass
class NodeTimes:
    """Predicts a network's latency in milliseconds.

    Attributes:
        rest: kernels that no place holds.
        samples: by node, shares of its multiply-adds and milliseconds.
        scales: by node, the places whose widths its multiply-adds go with.
        inside: by segment, its nodes.
        replaced: milliseconds of replacements of segments.
        whole: of the network as it is.
    """

    bench: Workbench
    rest: float = 0.0
    samples: dict[ir.Node, list[tuple[float, float]]] = field(default_factory=dict)
    scales: dict[ir.Node, list[Key]] = field(default_factory=dict)
    inside: dict[Key, frozenset[ir.Node]] = field(default_factory=dict)
    replaced: dict[tuple[Key, Replacement], float] = field(default_factory=dict)

    @property
    def whole(self) -> float:
        """The network as it is."""
        return self.predict({})

    def predict(self, state: State) -> float:
        """The network with replacements."""
        gone: set[ir.Node] = set()
        total = self.rest
        for key, replacement in state.items():
            if replacement.family != "narrow":
                gone |= self.inside.get(key, frozenset())
                total += self.replaced.get((key, replacement), 0.0)
        for node, samples in self.samples.items():
            if node not in gone:
                share = math.prod(self._share(key, state) for key in self.scales.get(node, ()))
                shares, milliseconds = zip(*samples, strict=True)
                total += float(np.interp(float(share), shares, milliseconds))
        return total

    def _share(self, key: Key, state: State) -> float:
        replacement = state.get(key)
        if replacement is None or replacement.family != "narrow":
            return 1.0
        return (replacement.width or 0) / self.bench.inner[key].channels


def measure_nodes(
    bench: Workbench,
    feed: Mapping[str, NDArray[Any]],
    *,
    threads: int = 1,
    provider: str = "CPUExecutionProvider",
    convert: Convert | None = None,
    progress: Progress | None = None,
) -> NodeTimes:
    """Measure what `NodeTimes` needs; moments must have been gathered.

    Args:
        bench: the network.
        feed: its inputs, as they are to be timed.
        threads: intra-op threads.
        provider: execution provider.
        convert: what becomes of a network before it is run (quantization).
        progress: called with (stage, done, total).

    Raises:
        RunError: onnxruntime cannot run one of the networks.
    """
    times = NodeTimes(bench, scales=_scales(bench))
    times.inside = {key: frozenset(each.nodes) for key, each in bench.segments.items()}
    states = [_narrowed(bench, share) for share in SHARES]
    protos = [bench.build(state) for state in states]
    if convert is not None:
        protos = [convert(proto) for proto in protos]
    every = _kernels(protos, feed, threads, provider, _names(bench), progress)
    times.rest = every[0].pop(None, 0.0)
    for state, measured in zip(states, every, strict=True):
        for node, milliseconds in measured.items():
            if node is not None:
                share = math.prod(times._share(key, state) for key in times.scales.get(node, ()))
                times.samples.setdefault(node, []).append((share, milliseconds))
    for samples in times.samples.values():
        # A node without channels takes no time; nodes of fixed size were measured often.
        moving = {share: [t for s, t in samples if s == share] for share, _ in samples}
        merged = sorted((share, float(np.median(values))) for share, values in moving.items())
        samples[:] = [(0.0, 0.0), *merged]
    return times


def step_of(channels: int) -> int:
    """By how many channels widths change: blocks of 16, as vector units take them, or of 8."""
    return 16 if channels >= 64 else 8


def _narrowed(bench: Workbench, share: float) -> dict[Key, Replacement]:
    found = {}
    for key, place in bench.inner.items():
        if share < 1 and bench.has_moments(key):
            step = step_of(place.channels)
            width = max(step, round(place.channels * share / step) * step)
            if width < place.channels:
                found[key] = Replacement("narrow", width)
    return found


def _scales(bench: Workbench) -> dict[ir.Node, list[Key]]:
    found: dict[ir.Node, list[Key]] = {}
    for key, place in bench.inner.items():
        weighted = [cut.node for cut in place.cuts if cut.index == 1 and len(cut.node.inputs) > 1]
        for node in dict.fromkeys([*weighted, place.consumer]):
            if node.op_type in ("Conv", "Gemm", "MatMul"):
                found.setdefault(node, []).append(key)
    return found


def _names(bench: Workbench) -> dict[str, ir.Node]:
    """Nodes by the names that the runtime may give their kernels: theirs, or a fused tensor's."""
    found: dict[str, ir.Node] = {}
    for node in bench.graph.ir:
        if node.name:
            found.setdefault(node.name, node)
        for value in node.outputs:
            if value.name:
                found[value.name] = node
    for node in bench.graph.ir:
        if node.op_type in ("Conv", "Gemm", "MatMul"):
            for name in _fused_names(node):
                found[name] = node
    return found


def _fused_names(node: ir.Node) -> list[str]:
    """Tensors behind a node that the runtime may compute with it."""
    names = [node.outputs[0].name or ""]
    value = node.outputs[0]
    while True:
        readers = consumers(value)
        if len(readers) != 1 or readers[0].op_type not in _FUSED:
            return names
        value = readers[0].outputs[0]
        names.append(value.name or "")


_FUSED = frozenset({"Relu", "Clip", "LeakyRelu", "Sigmoid", "Tanh", "HardSigmoid", "HardSwish"})


def _kernels(
    protos: Sequence[onnx.ModelProto],
    feed: Mapping[str, NDArray[Any]],
    threads: int,
    provider: str,
    names: Mapping[str, ir.Node],
    progress: Progress | None,
) -> list[dict[ir.Node | None, float]]:
    """Milliseconds by the network's node, kernels of no node under None; of each network."""
    with contextlib.ExitStack() as stack:
        sessions = [
            stack.enter_context(
                Profiled(proto.SerializeToString(), threads=threads, provider=provider)
            )
            for proto in protos
        ]
        calls = [each.session.prepared(feed) for each in sessions]
        for number in range(_ROUNDS + 1):
            if progress is not None:
                progress("measuring networks", number, _ROUNDS + 1)
            for call in calls:
                for _ in range(_RUNS):
                    call()
        return [_by_node(each.runs()[_RUNS:], names) for each in sessions]


def _by_node(
    runs: Sequence[Sequence[Mapping[str, Any]]], names: Mapping[str, ir.Node]
) -> dict[ir.Node | None, float]:
    durations: dict[tuple[ir.Node | None, int], list[float]] = {}
    for events in runs:
        for place, (node, milliseconds) in enumerate(_attributed(events, names)):
            durations.setdefault((node, place), []).append(milliseconds)
    found: dict[ir.Node | None, float] = {}
    for (node, _), values in durations.items():
        found[node] = found.get(node, 0.0) + undisturbed(values)
    return found


def _attributed(
    events: Sequence[Mapping[str, Any]], names: Mapping[str, ir.Node]
) -> list[tuple[ir.Node | None, float]]:
    """Kernels with the node each belongs to; changes of layout and type to what comes next."""
    found: list[tuple[ir.Node | None, float]] = []
    waiting: list[float] = []
    for event in events:
        milliseconds = float(event["dur"]) / 1000
        node = _node_of(str(event["name"]).removesuffix("_kernel_time"), names)
        if node is None:
            waiting.append(milliseconds)
            continue
        found.extend((node, each) for each in waiting)
        waiting = []
        found.append((node, milliseconds))
    found.extend((None, each) for each in waiting)
    return found


def _node_of(name: str, names: Mapping[str, ir.Node]) -> ir.Node | None:
    # What the runtime changes the layout of, as it does with quantized convolutions, is renamed.
    known = names.get(name)
    if known is None:
        name = _TOKEN.sub("", name)
        known = names.get(name)
    while known is None:
        shorter = next((name.removesuffix(end) for end in _SUFFIXES if name.endswith(end)), None)
        if shorter is None:
            return None
        name = shorter
        known = names.get(name)
    return known

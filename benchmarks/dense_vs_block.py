"""When one dense convolution is faster than what it replaces, on onnxruntime with one thread.

The profiling that DepthShrinker's and LayerMerge's papers begin with, on this processor:

- blocks: every shape of MobileNetV2's inverted residual blocks against one dense 3x3;
- depth: few wide layers against many narrow ones, with equal multiply-accumulates;
- merged: two and three 3x3 against one 5x5 and one 7x7, and against one 3x3 (the others dropped);
- growth: one convolution whose kernel grows;
- how well multiply-accumulates, and memory traffic beside them, tell the time of all of these.

Models of a case alternate round by round, so a ratio means something on a busy machine too.

Run it as `python benchmarks/dense_vs_block.py`; `--quick` takes a few cases and only prints.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import common
import numpy as np
import onnx
from networks import MOBILENET_V2, Network
from scatter import write_scatter

from graphfold.calibration.latency import compare
from graphfold.cost import analyze
from graphfold.graph import Graph
from graphfold.model import load

COMMAND = "python benchmarks/dense_vs_block.py"
ROUNDS = 15
SIZE = 224
EXPANSION = 6


@dataclass(frozen=True)
class Case:
    """Models that are measured together; the first is what the others are compared with."""

    study: str
    name: str
    models: Mapping[str, onnx.ModelProto]


@dataclass(frozen=True)
class Figure:
    """One model's figures, those of time relative to its case's first."""

    study: str
    case: str
    model: str
    macs: int
    traffic: int
    milliseconds: float
    speedup: float
    spread: float
    reliable: bool


# --- cases ----------------------------------------------------------------------------------------


def blocks() -> Iterator[Case]:
    """Each shape of MobileNetV2-1.0's inverted residual blocks once."""
    size, channels, seen = SIZE // 2, 32, set()
    for expansion, width, repeats, first in MOBILENET_V2:
        for index in range(repeats):
            stride = first if index == 0 else 1
            shape = (size, channels, width, stride)
            if expansion == EXPANSION and shape not in seen:
                seen.add(shape)
                models = {"block": block(*shape), "one 3x3": one_conv(*shape)}
                yield Case("blocks", f"{channels} to {width}, {size}x{size}, s{stride}", models)
            size, channels = size // stride, width


def block(size: int, channels: int, width: int, stride: int) -> onnx.ModelProto:
    """Pointwise, depthwise 3x3, pointwise, with Relu6 between and the input added."""
    net = Network(size, channels=channels)
    wide = EXPANSION * channels
    y = net.relu6(net.conv("x", wide, 1, bias=True))
    y = net.relu6(net.conv(y, wide, 3, stride=stride, groups=wide, bias=True))
    y = net.conv(y, width, 1, bias=True)
    return net.model(net.op("Add", "x", y) if stride == 1 and channels == width else y)


def one_conv(
    size: int, channels: int, width: int, stride: int = 1, kernel: int = 3
) -> onnx.ModelProto:
    """One dense convolution and the Relu6 that may follow it."""
    net = Network(size, channels=channels)
    return net.model(net.relu6(net.conv("x", width, kernel, stride=stride, bias=True)))


def depth() -> Iterator[Case]:
    """A quarter of the layers at twice the width, twice over, from the same input."""
    for size, width, layers in ((56, 16, 16), (28, 32, 16), (14, 64, 16)):
        models = {
            f"{layers // 4**step} of {width * 2**step}": stack(
                size, width * 2**step, layers // 4**step, channels=width
            )
            for step in range(3)
        }
        yield Case("depth", f"{size}x{size}", models)


def stack(
    size: int, width: int, layers: int, kernel: int = 3, channels: int | None = None
) -> onnx.ModelProto:
    """Dense convolutions of one width, each with a Relu; a pointwise one leads to that width."""
    net = Network(size, channels=channels or width)
    x = net.conv("x", width, 1, bias=True) if channels else "x"
    for _ in range(layers):
        x = net.op("Relu", net.conv(x, width, kernel, bias=True))
    return net.model(x)


def merged() -> Iterator[Case]:
    """Runs of 3x3 against the kernel they merge to, and against one that stays of them."""
    for size, width in ((56, 32), (56, 64), (28, 64), (28, 128), (14, 128), (14, 256)):
        for layers in (2, 3):
            kernel = 2 * layers + 1
            models = {
                f"{layers} of 3x3": stack(size, width, layers),
                f"one {kernel}x{kernel}": stack(size, width, 1, kernel),
                "one 3x3": stack(size, width, 1),
            }
            yield Case("merged", f"{layers} of {width}, {size}x{size}", models)


def growth() -> Iterator[Case]:
    """One kernel from 1x1 to 13x13."""
    for size, width in ((56, 32), (28, 64), (14, 128)):
        models = {f"{kernel}x{kernel}": stack(size, width, 1, kernel) for kernel in (3, 1)}
        models |= {f"{k}x{k}": stack(size, width, 1, k) for k in (5, 7, 9, 11, 13)}
        yield Case("growth", f"{width}, {size}x{size}", models)


# --- measuring ------------------------------------------------------------------------------------


def measure(case: Case, seconds: float) -> list[Figure]:
    """Latency, multiply-accumulates and traffic of a case's models, measured together."""
    found = compare(
        [proto.SerializeToString() for proto in case.models.values()],
        names=list(case.models),
        rounds=ROUNDS,
        seconds=seconds * len(case.models),
    )
    figures = []
    for proto, latency in zip(case.models.values(), found.models, strict=True):
        macs, traffic = costs(proto)
        figures.append(
            Figure(case.study, case.name, latency.name, macs, traffic, latency.median,
                   latency.speedup, latency.speedup_spread, latency.is_reliable)
        )  # fmt: skip
    return figures


def costs(proto: onnx.ModelProto) -> tuple[int, int]:
    """Multiply-accumulates, and bytes that convolutions and additions read and write.

    onnxruntime applies activations in the convolution before them: they move nothing.
    """
    nodes = analyze(Graph(load(proto))).nodes
    moving = [node for node in nodes if node.op_type in ("Conv", "Add")]
    return sum(node.macs or 0 for node in nodes), sum(node.traffic_bytes or 0 for node in moving)


def explained(figures: Sequence[Figure], *columns: str) -> tuple[list[float], float]:
    """Milliseconds per unit of each column, and how far off they tell a time, in the median.

    Non-negative least squares on relative errors, so that small models count as large ones.
    """
    from scipy.optimize import nnls

    times = np.array([each.milliseconds for each in figures])
    units = np.array([[getattr(each, column) for column in columns] for each in figures], float)
    weights, _ = nnls(units / times[:, None], np.ones(len(times)))
    return list(weights), float(np.median(np.abs(units @ weights / times - 1)))


# --- results --------------------------------------------------------------------------------------


def table(figures: Sequence[Figure]) -> str:
    """All figures of a study; a star marks what was disturbed."""
    rows = []
    for case in dict.fromkeys(each.case for each in figures):
        group = [each for each in figures if each.case == case]
        first = group[0]
        rows += [
            [
                case if each is first else "",
                each.model,
                f"{each.macs / 1e6:.1f}",
                f"{each.traffic / 2**20:.2f}",
                f"{each.milliseconds:.3f}",
                f"{each.macs / each.milliseconds / 1e6:.1f}",
                "" if each is first else f"{first.macs / each.macs:.2f}x",
                "" if each is first else f"{each.speedup:.2f}x{'' if each.reliable else '*'}",
                "" if each is first else f"{100 * each.spread:.0f} %",
            ]
            for each in group
        ]
    columns = ["shape", "model", "MMACs", "MiB moved", "ms", "GMAC/s"]
    return common.markdown([*columns, "fewer MACs", "speedup", "spread"], rows)


def summary(figures: Sequence[Figure]) -> str:
    """What the planner's defaults rest on."""
    lines = []
    for study, model in (("blocks", "one 3x3"), ("merged", "one 5x5"), ("merged", "one 7x7")):
        found = [each for each in figures if each.study == study and each.model == model]
        if found:
            faster = sum(each.speedup > 1 for each in found)
            speedups = [each.speedup for each in found]
            lines.append(
                f"- {study}, {model}: faster in {faster} of {len(found)}, "
                f"{min(speedups):.2f}x to {max(speedups):.2f}x."
            )
    (per_mac,), alone = explained(figures, "macs")
    (mac, byte), both = explained(figures, "macs", "traffic")
    lines.append(
        f"- Time from multiply-accumulates alone ({1e-6 / per_mac:.1f} GMAC/s): off by "
        f"{100 * alone:.0f} % in the median; with memory traffic "
        f"({_rate(1e-6, mac)} GMAC/s and {_rate(1e-6, byte)} GB/s): {100 * both:.0f} %."
    )
    return "\n".join(lines)


def _rate(scale: float, weight: float) -> str:
    return "unlimited" if weight == 0 else f"{scale / weight:.1f}"


def plot(figures: Sequence[Figure]) -> None:
    """Speedup against how many fewer multiply-accumulates, one point per replacement."""
    series: dict[str, list[tuple[float, float, str]]] = {}
    first: dict[tuple[str, str], Figure] = {}
    for each in figures:
        base = first.setdefault((each.study, each.case), each)
        if each is not base:
            point = (base.macs / each.macs, each.speedup, f"{each.case}: {each.model}")
            series.setdefault(each.study, []).append(point)
    path = common.RESULTS / "dense_vs_block.svg"
    write_scatter(path, series, "times fewer multiply-accumulates", "times faster", level=1.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="the first case of each study")
    parser.add_argument("--seconds", type=float, default=1.0, help="per model")
    options = parser.parse_args()
    studies = [list(make()) for make in (blocks, depth, merged, growth)]
    if options.quick:
        studies = [cases[:1] for cases in studies]
    figures: list[Figure] = []
    parts = []
    for cases in studies:
        found = [each for case in cases for each in measure(case, options.seconds)]
        figures += found
        parts.append(f"## {cases[0].study.capitalize()}\n\n{table(found)}")
    disturbed = sum(not each.reliable for each in figures)
    note = f"A star: disturbed or spread above 10 % ({disturbed} of {len(figures)} models)."
    body = "\n\n".join([summary(figures), *parts, note])
    if options.quick:
        print(body)
        return
    data: dict[str, Any] = {"figures": [vars(each) for each in figures]}
    common.write("dense_vs_block", "One dense convolution or a block", COMMAND, body, data)
    plot(figures)


if __name__ == "__main__":
    main()

"""Folds every published mask in every form an exporter writes, and compares with the reference.

For each of DepthShrinker's 18 masks: batch normalisation kept or fused, torch's current exporter at
its default and at the newest opset that onnxruntime loads, the older exporter at opsets 13, 17 and
20, fixed sizes and dynamic batch, height and width, padding hoisted or left exact. Checked are

- the folded network against the reference network, at every output and at every fold's own tensor,
  its border and its interior apart, within 1e-5 of that tensor's largest value;
- for `exact`, the reference network against one made without graphfold: the same ModelProto with
  the activations of the removed blocks taken out by hand.

Dynamic exports are run at two sizes and batches, one of them odd and not square. Where float32
itself is not that accurate, because nothing bounds the values of a network without activations,
both networks are also evaluated in float64 (see double.py), and must agree there.

    python benchmarks/matrix.py [--quick] [--models NAME ...] [--masks A ...]

Ends by printing a table, and writes benchmarks/results/matrix.* unless filtered.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import common  # finds the examples
import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

# isort: split
import export as exporters
import plans

import graphfold
from graphfold.model import to_proto

TOLERANCE = 1e-5
DOUBLE_TOLERANCE = 1e-9
EXPORTS = (
    ("dynamo", None),
    ("dynamo", exporters.NEWEST_OPSET),
    ("torchscript", 13),
    ("torchscript", 17),
    ("torchscript", 20),
)
BOUNDARIES = ("hoist", "exact")
# Batch, height, width of what dynamic exports are run on.
DYNAMIC_FEEDS = ((3, 96, 96), (1, 161, 129))
# Fixed sizes are small, but for one of the exports.
FIXED_SIZE, FULL_SIZE = 96, 224

Array = NDArray[Any]
Tensors = dict[str, Array]


@dataclass(frozen=True)
class Form:
    """One exported file: the network and how it was written."""

    network: str
    keep_bn: bool
    exporter: str
    opset: int | None
    dynamic: bool

    @property
    def size(self) -> int:
        """Image size that a fixed export is made for."""
        whole = self.exporter == "torchscript" and self.opset == 17
        return FULL_SIZE if whole else FIXED_SIZE

    def feeds(self) -> Sequence[tuple[int, int, int]]:
        """Batch, height and width of each input."""
        return DYNAMIC_FEEDS if self.dynamic else ((1, self.size, self.size),)


@dataclass(frozen=True)
class Cell:
    """What one mask in one form gave; errors are relative to the tensor's largest value.

    Attributes:
        output_error: at the network's output, onnxruntime's optimizations off and on.
        border_error, interior_error: the largest at any fold's own tensor.
        worst_tensor: where.
        largest_value: in any of these tensors.
        by_hand_error: of the reference against the network made by hand, at the output and these
            tensors; None for `hoist`.
        double_folded, double_reference: at the output and the worst tensor, each network in
            float32 against its own values in float64; None where float32 was within the tolerance.
        double_error: the folded network against the reference there, both made from the export
            with its constants in float64, and evaluated in it.
    """

    form: Form
    mask: str
    boundary: str
    feeds: tuple[tuple[int, int, int], ...]
    convolutions: tuple[int, int]
    output_error: float
    optimized_error: float
    interior_error: float
    border_error: float
    worst_tensor: str
    largest_value: float
    by_hand_error: float | None
    double_folded: float | None = None
    double_reference: float | None = None
    double_error: float | None = None

    @property
    def largest_error(self) -> float:
        """The largest of all comparisons with the reference network."""
        return max(self.output_error, self.optimized_error, self.interior_error, self.border_error)

    @property
    def within_tolerance(self) -> bool:
        """Whether float32 results agree everywhere."""
        return self.largest_error <= TOLERANCE

    @property
    def equal(self) -> bool:
        """Within the tolerance, in float64 where float32 is not that accurate; by hand too."""
        agrees = self.by_hand_error is None or self.by_hand_error <= TOLERANCE
        exact = self.double_error is not None and self.double_error <= DOUBLE_TOLERANCE
        return agrees and (self.within_tolerance or exact)


# --- One form -------------------------------------------------------------------------------------


def exported(form: Form, cache: Path | None) -> onnx.ModelProto:
    """The form's file, from the cache where it is there."""
    key = json.dumps([asdict(form), form.size, _sources_digest()], sort_keys=True)
    name = f"{form.network}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.onnx"
    if cache is not None and (cache / name).exists():
        return onnx.load(cache / name)
    from zoo import network

    return exporters.export(
        network(form.network),
        None if cache is None else cache / name,
        exporter=form.exporter,  # type: ignore[arg-type]
        opset=form.opset,
        keep_bn=form.keep_bn,
        dynamic_batch=form.dynamic,
        dynamic_size=form.dynamic,
        size=FIXED_SIZE if form.dynamic else form.size,
    )


@functools.cache
def _sources_digest() -> str:
    """What the exports depend on: the examples' sources and the exporters' versions."""
    digest = hashlib.sha256()
    for path in sorted((common.ROOT / "examples").glob("*.py")):
        digest.update(path.read_bytes())
    for package in ("torch", "onnx", "onnxscript"):
        digest.update(metadata.version(package).encode())
    return digest.hexdigest()


@functools.cache
def images(batch: int, height: int, width: int) -> Array:
    """Smooth random images."""
    import torch
    from weights import smooth_images

    square = smooth_images(batch, max(height, width), torch.Generator().manual_seed(11))
    return np.ascontiguousarray(square[:, :, :height, :width].numpy())


def run_form(
    form: Form, masks: Sequence[str], boundaries: Sequence[str], cache: Path | None
) -> Iterator[Cell]:
    """All cells of one exported file."""
    proto = exported(form, cache)
    for mask in masks:
        for boundary in boundaries:
            yield run_cell(proto, form, mask, boundary)


def run_cell(proto: onnx.ModelProto, form: Form, mask: str, boundary: str) -> Cell:
    """Fold one export by one mask and compare."""
    plan = plans.keep_blocks(form.network, mask) | {"boundary": boundary}
    result = graphfold.optimize(proto, plan, verify=False)
    reference, folded = to_proto(result.reference), result.model
    tensors = {fold.output: fold.reach for fold in result.report.folds}
    output = proto.graph.output[0].name
    worst = _Worst()
    output_error = optimized_error = by_hand_error = 0.0
    for feed in form.feeds():
        x = images(*feed)
        expected = run(reference, x, tensors)
        actual = run(folded, x, tensors)
        for name, reach in tensors.items():
            worst.add(name, expected[name], actual[name], reach)
        output_error = max(output_error, relative(expected[output], actual[output]))
        optimized = run(folded, x, optimize=True)[output]
        optimized_error = max(
            optimized_error, relative(run(reference, x, optimize=True)[output], optimized)
        )
        if boundary == "exact":
            by_hand = run(bypassed_by_hand(proto, form.network, mask), x, tensors)
            errors = [relative(by_hand[name], expected[name]) for name in by_hand]
            by_hand_error = max(by_hand_error, *errors)
    cell = Cell(
        form=form,
        mask=mask,
        boundary=boundary,
        feeds=tuple(form.feeds()),
        convolutions=(_convolutions(proto), _convolutions(folded)),
        output_error=output_error,
        optimized_error=optimized_error,
        interior_error=worst.interior,
        border_error=worst.border,
        worst_tensor=worst.tensor,
        largest_value=worst.scale,
        by_hand_error=by_hand_error if boundary == "exact" else None,
    )
    return cell if cell.within_tolerance else in_double(cell, proto, reference, folded)


def in_double(
    cell: Cell, proto: onnx.ModelProto, reference: onnx.ModelProto, folded: onnx.ModelProto
) -> Cell:
    """The same with float64 figures."""
    from double import evaluate, widened

    plan = plans.keep_blocks(cell.form.network, cell.mask) | {"boundary": cell.boundary}
    wide = graphfold.optimize(widened(proto), plan, verify=False)
    names = list(dict.fromkeys((cell.worst_tensor, proto.graph.output[0].name)))

    def largest(one: Tensors, two: Tensors) -> float:
        return max(relative(one[name], two[name]) for name in names)

    found: list[tuple[float, float, float]] = []
    for feed in cell.feeds:
        x = images(*feed)
        expected = evaluate(to_proto(wide.reference), x, names)
        found.append(
            (
                largest(evaluate(folded, x, names), run(folded, x, names)),
                largest(evaluate(reference, x, names), run(reference, x, names)),
                largest(expected, evaluate(wide.model, x, names)),
            )
        )
    own, reference_own, between = (max(figures) for figures in zip(*found, strict=True))
    return replace(cell, double_folded=own, double_reference=reference_own, double_error=between)


def _convolutions(proto: onnx.ModelProto) -> int:
    return sum(node.op_type == "Conv" for node in proto.graph.node)


class _Worst:
    """The largest errors at folds' tensors."""

    def __init__(self) -> None:
        self.interior = self.border = self.scale = 0.0
        self.tensor = ""

    def add(
        self, name: str, expected: Array, actual: Array, reach: Sequence[tuple[int, int]]
    ) -> None:
        self.scale = max(self.scale, scale_of(expected))
        error = difference(expected, actual) / scale_of(expected)
        inside = tuple(
            slice(begin, size - end)
            for (begin, end), size in zip(reach, error.shape[2:], strict=True)
        )
        border = np.ones(error.shape[2:], dtype=bool)
        border[inside] = False
        largest = float(error.max())
        if largest > max(self.interior, self.border):
            self.tensor = name
        if border.any():
            self.border = max(self.border, float(error[..., border].max()))
        if not border.all():
            self.interior = max(self.interior, float(error[..., ~border].max()))


def difference(expected: Array, actual: Array) -> NDArray[np.float64]:
    """Absolute differences; infinite where one of the two is not finite."""
    if expected.shape != actual.shape:
        raise ValueError(f"shapes differ: {expected.shape} and {actual.shape}")
    found = np.abs(expected.astype(np.float64) - actual)
    found[~np.isfinite(found)] = np.inf
    return found


def scale_of(values: NDArray[Any]) -> float:
    """The largest magnitude."""
    return float(np.abs(values).max())


def relative(expected: Array, actual: Array) -> float:
    """The largest difference over the largest value."""
    return float(difference(expected, actual).max()) / scale_of(expected)


def run(
    proto: onnx.ModelProto, x: Array, tensors: Iterable[str] = (), *, optimize: bool = False
) -> Tensors:
    """Outputs and inner tensors by name, through onnxruntime on one thread."""
    shown = onnx.ModelProto()
    shown.CopyFrom(proto)
    present = {info.name for info in proto.graph.output}
    extra = [name for name in dict.fromkeys(tensors) if name not in present]
    shown.graph.output.extend(onnx.ValueInfoProto(name=name) for name in extra)
    options = ort.SessionOptions()
    level = ort.GraphOptimizationLevel
    options.graph_optimization_level = level.ORT_ENABLE_ALL if optimize else level.ORT_DISABLE_ALL
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    session = ort.InferenceSession(shown.SerializeToString(), options, ["CPUExecutionProvider"])
    names = [info.name for info in session.get_outputs()]
    return dict(zip(names, session.run(names, {proto.graph.input[0].name: x}), strict=True))


# --- The same network without graphfold -----------------------------------------------------------


def bypassed_by_hand(proto: onnx.ModelProto, network: str, mask: str) -> onnx.ModelProto:
    """A copy without the activations of the removed blocks, padding where it is.

    In these networks every activation is one Clip: the stem's, one in the first block, two in
    each other block, and the head's.
    """
    digits = plans.DEPTHSHRINKER[network][mask]
    states = [1, int(digits[0]), *(int(digit) for digit in digits[1:] for _ in range(2)), 1]
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    clips = [node for node in copy.graph.node if node.op_type == "Clip"]
    if len(clips) != len(states):
        raise ValueError(f"{len(clips)} activations in {network}, expected {len(states)}")
    for clip, state in zip(clips, states, strict=True):
        if not state:
            _bypass(copy.graph, clip)
    return copy


def _bypass(graph: onnx.GraphProto, node: onnx.NodeProto) -> None:
    for reader in graph.node:
        for index, name in enumerate(reader.input):
            if name == node.output[0]:
                reader.input[index] = node.input[0]
    graph.node.remove(node)


# --- The whole matrix -----------------------------------------------------------------------------


def forms(networks: Sequence[str]) -> list[Form]:
    """All forms, those of one network together."""
    return [
        Form(network, keep_bn, exporter, opset, dynamic)
        for network in networks
        for keep_bn in (True, False)
        for exporter, opset in EXPORTS
        for dynamic in (False, True)
    ]


# A part that takes half a minute: each dimension of the matrix is in it.
QUICK = (
    (Form("mobilenet_v2_1.0", False, "torchscript", 13, False), "D"),
    (Form("mobilenet_v2_1.0", True, "torchscript", 20, True), "B"),
    (Form("efficientnet_lite0", True, "torchscript", 13, False), "A"),
    (Form("efficientnet_lite0", False, "torchscript", 20, True), "B"),
    (Form("mobilenet_v2_1.0", False, "dynamo", exporters.NEWEST_OPSET, True), "C"),
)
Job = tuple[Form, tuple[str, ...]]


def _work(job: Job, cache: Path | None) -> list[Cell]:
    import torch

    torch.set_num_threads(1)  # one job a core
    form, masks = job
    return list(run_form(form, masks, BOUNDARIES, cache))


def run_jobs(jobs: Sequence[Job], cache: Path | None, workers: int, console: Console) -> list[Cell]:
    """Run jobs in this process or several, with one progress bar; cells in the jobs' order."""
    found: dict[int, list[Cell]] = {}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        task = progress.add_task("matrix", total=sum(len(masks) for _, masks in jobs) * 2)
        for number, cells in _results(jobs, cache, workers):
            found[number] = cells
            progress.update(task, advance=len(cells), description=jobs[number][0].network)
    return [cell for number in sorted(found) for cell in found[number]]


def _results(
    jobs: Sequence[Job], cache: Path | None, workers: int
) -> Iterator[tuple[int, list[Cell]]]:
    if workers == 1:
        yield from ((number, _work(job, cache)) for number, job in enumerate(jobs))
        return
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        futures = {pool.submit(_work, job, cache): number for number, job in enumerate(jobs)}
        for future in as_completed(futures):
            yield futures[future], future.result()


# --- Results --------------------------------------------------------------------------------------


def summary(cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """The largest figures for each network, mask and boundary."""
    groups: dict[tuple[str, str, str], list[Cell]] = {}
    for cell in cells:
        groups.setdefault((cell.form.network, cell.mask, cell.boundary), []).append(cell)
    return [
        {
            "network": network,
            "mask": mask,
            "boundary": boundary,
            "forms": len(group),
            "within_tolerance": sum(cell.within_tolerance for cell in group),
            "output_error": max(cell.output_error for cell in group),
            "optimized_error": max(cell.optimized_error for cell in group),
            "interior_error": max(cell.interior_error for cell in group),
            "border_error": max(cell.border_error for cell in group),
            "largest_value": max(cell.largest_value for cell in group),
            "by_hand_error": _largest(cell.by_hand_error for cell in group),
            "double_folded": _largest(cell.double_folded for cell in group),
            "double_reference": _largest(cell.double_reference for cell in group),
            "double_error": _largest(cell.double_error for cell in group),
        }
        for (network, mask, boundary), group in groups.items()
    ]


def _largest(values: Iterable[float | None]) -> float | None:
    return max((value for value in values if value is not None), default=None)


_COLUMNS = {
    "network": "network",
    "mask": "mask",
    "boundary": "boundary",
    "forms": "forms",
    "within_tolerance": "within 1e-5",
    "output_error": "output",
    "optimized_error": "optimized",
    "interior_error": "fold, interior",
    "border_error": "fold, border",
    "largest_value": "largest value",
    "by_hand_error": "by hand",
}


def _text(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.1e}" if isinstance(value, float) else str(value)


def report(cells: Sequence[Cell]) -> str:
    """A page for people."""
    good = sum(cell.within_tolerance for cell in cells)
    rows = [[_text(row[key]) for key in _COLUMNS] for row in summary(cells)]
    lines = [
        f"{good} of {len(cells)} combinations are within {TOLERANCE:g} of scale in float32. "
        "Figures are the largest of all forms of a mask (batch normalisation kept or fused, five "
        "exports, fixed or dynamic sizes), each over the largest value of the tensor that it is "
        "measured at: the output with onnxruntime's optimizations off and on, and the tensors "
        "that folds produce, interior and border apart; the largest value is one of these. "
        "`by hand` compares the reference network with the same export whose activations were "
        "bypassed without graphfold, at the output and the same tensors. Where values explode "
        "(Lite0's mask D takes out all that bounds real weights), the head's ReLU6 is saturated "
        "and outputs cannot differ: there only the folds' tensors tell.",
        "",
        common.markdown(list(_COLUMNS.values()), rows),
        *_double_section([cell for cell in cells if not cell.within_tolerance]),
    ]
    return "\n".join(lines)


def _double_section(cells: Sequence[Cell]) -> list[str]:
    if not cells:
        return []
    keys = ("network", "mask", "boundary", "forms")
    figures = ("double_folded", "double_reference", "double_error")
    rows = [[_text(row[key]) for key in (*keys, *figures)] for row in summary(cells)]
    equal = sum(cell.equal for cell in cells)
    return [
        "",
        f"The other {len(cells)}: float32 itself is not that accurate there, in either network. "
        "Each against its own values in float64; and the folded network against the reference, "
        "both made from the export with float64 constants and evaluated in float64, where "
        f"{equal} of {len(cells)} are within {DOUBLE_TOLERANCE:g}:",
        "",
        common.markdown([*keys, "folded", "reference", "both in float64"], rows),
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the command line asks for; 1 where something is out of tolerance."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a part, in half a minute")
    parser.add_argument("--models", nargs="+", choices=sorted(plans.DEPTHSHRINKER))
    parser.add_argument("--masks", nargs="+", help="of each model, those that it has")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--cache", type=Path, default=common.ROOT / "out" / "matrix")
    args = parser.parse_args(arguments)
    jobs = _jobs(args)
    whole = not (args.quick or args.models or args.masks)
    started = time.perf_counter()
    cells = run_jobs(jobs, args.cache, args.workers, Console(stderr=True))
    seconds = round(time.perf_counter() - started)
    if whole:
        data = {
            "tolerance": TOLERANCE,
            "seconds": seconds,
            "workers": args.workers,
            "cells": [asdict(cell) for cell in cells],
        }
        title = "Every published mask, in every form an exporter writes"
        common.write("matrix", title, "python benchmarks/matrix.py", report(cells), data)
    else:
        print(report(cells))
    print(f"\n{sum(cell.equal for cell in cells)} of {len(cells)} are equal ({seconds} s)")
    return 0 if all(cell.equal for cell in cells) else 1


def _jobs(args: argparse.Namespace) -> list[Job]:
    if args.quick:
        return [(form, (mask,)) for form, mask in QUICK]
    networks = args.models or list(plans.DEPTHSHRINKER)
    chosen = [
        (form, tuple(m for m in plans.DEPTHSHRINKER[form.network] if m in (args.masks or m)))
        for form in forms(networks)
    ]
    return [(form, masks) for form, masks in chosen if masks]


if __name__ == "__main__":
    sys.exit(main())

"""Latencies of narrowed places, as rows beside those of convolutions.

A narrowed place spans several steps of the network, and what it wins is told by whole networks that
are narrowed everywhere (`graphfold.calibration.nodetimes`): their kernels' times at a few widths.
A row is what its steps take in the table less that share of the whole network.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx

from graphfold.calibration.families import widths_of
from graphfold.calibration.nodetimes import measure_nodes
from graphfold.calibration.quantize import roughly_quantized
from graphfold.calibration.sketch import Sketch
from graphfold.calibration.workbench import Replacement, names_of
from graphfold.cuts import CutLayout
from graphfold.errors import Problem
from graphfold.feeds import first_that_runs
from graphfold.measures import LatencyRow, LatencyTable, Row
from graphfold.model import adopt, to_proto
from graphfold.progress import Progress
from graphfold.runtime import Runnable, Session

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from graphfold.calibration.journal import Journal
    from graphfold.calibration.timing import Settings
    from graphfold.model import Model

_KEY = "narrow"


def sketch(model: Model) -> Sketch:
    """The model folded losslessly, to be given arbitrary weights; places that it names itself."""
    from graphfold.optimizer import optimize_model

    return Sketch(optimize_model(model, None, verify=False).folded, names_of(model))


def narrow_rows(
    bench: Sketch,
    table: LatencyTable,
    cuts: CutLayout,
    input_shapes: Mapping[str, Sequence[int]],
    settings: Settings,
    journal: Journal,
    progress: Progress,
) -> list[LatencyRow]:
    """A row for every width of every place that lies between two cuts.

    Args:
        bench: the model.
        table: its latencies, unchanged steps included.
        cuts: its steps.
        input_shapes: of all inputs.
        settings: how to measure.
        journal: where shares that an interrupted run has measured are, and new ones go.
        progress: called with (stage, done, total).

    Raises:
        RunError: onnxruntime cannot run a narrowed network.
    """
    steps = _steps(table, cuts)
    whole = math.fsum(steps.values()) + table.rest
    if _KEY not in journal.entries:
        journal.add({_KEY: _shares(bench, input_shapes, settings, progress)})
    shares = {(source, target, width): won for source, target, width, won in journal.entries[_KEY]}
    rows = []
    for key, place in bench.inner.items():
        span = cuts.layout.span(*key)
        if isinstance(span, Problem):
            continue
        covered = math.fsum(
            value for (start, end), value in steps.items() if span[0] <= start and end <= span[1]
        )
        for width in widths_of(place):
            value = max(0.0, covered - shares[(*key, width)] * whole)
            row = Row(input=key[0], output=key[1], family="narrow", weights="regress", width=width)
            rows.append(LatencyRow(**row.model_dump(exclude_none=True), value=value))
    return rows


def _steps(table: LatencyTable, cuts: CutLayout) -> dict[tuple[int, int], float]:
    """Milliseconds of unchanged steps by the positions that they lie between."""
    found: dict[tuple[int, int], float] = {}
    for row in table.rows:
        span = cuts.layout.span(row.input, row.output) if row.unchanged else None
        if isinstance(span, tuple):
            found[span] = row.value
    return found


def _shares(
    bench: Sketch,
    input_shapes: Mapping[str, Sequence[int]],
    settings: Settings,
    progress: Progress,
) -> list[tuple[str, str, int, float]]:
    """By place and width, the share of the whole network's time that narrowing wins."""
    feed = _feed(bench, input_shapes)

    def quantized(proto: onnx.ModelProto) -> onnx.ModelProto:
        return to_proto(roughly_quantized(adopt(proto, check=False), feed))

    times = measure_nodes(
        bench,
        feed,
        threads=settings.threads,
        provider=settings.provider,
        convert=quantized if settings.dtype == "int8" else None,
        progress=progress,
    )
    whole = times.whole
    return [
        (*key, width, 1 - times.predict({key: Replacement("narrow", width)}) / whole)
        for key, place in bench.inner.items()
        for width in widths_of(place)
    ]


def _feed(bench: Sketch, input_shapes: Mapping[str, Sequence[int]]) -> dict[str, NDArray[Any]]:
    with Runnable(to_proto(bench.model).SerializeToString()) as runnable:
        session = Session(runnable, optimize=True)
    given = {name: tuple(shape) for name, shape in input_shapes.items()}
    _, feed, _ = first_that_runs(session, given, 0)
    return {name: np.asarray(array) for name, array in feed.items()}

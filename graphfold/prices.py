"""Measured latencies for the decision whether a loose run is worth merging.

Where a latency table knows a run as it is and as one convolution, these figures alone decide;
elsewhere multiply-accumulates do (`graphfold.runs`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

from graphfold.measures import LatencyTable


class Prices:
    """A latency table, asked by tensors.

    Rows of removed convolutions are left out: a loose merge drops nothing.
    """

    def __init__(self, table: LatencyTable) -> None:
        self._steps: dict[str, list[tuple[str, float]]] = {}
        self._merges: dict[tuple[str, str, tuple[int, ...]], float] = {}
        for row in table.rows:
            if row.unchanged:
                self._steps.setdefault(row.input, []).append((row.output, row.value))
            elif not row.removed_convs and row.kernel is not None:
                key = row.input, row.output, tuple(row.kernel)
                self._merges[key] = min(row.value, self._merges.get(key, row.value))

    def merged(self, source: str, target: str, kernel: Sequence[int]) -> float | None:
        """Milliseconds of one convolution between two tensors, None where there is no row."""
        return self._merges.get((source, target, tuple(kernel)))

    def steps_from(self, source: str) -> Sequence[tuple[str, float]]:
        """Where unchanged steps from a tensor lead, and their milliseconds."""
        return self._steps.get(source, ())

    def present(self, source: str, inside: Collection[str], convs: int) -> float | None:
        """Milliseconds of a region as it is: its steps, where they hold all its convolutions.

        Args:
            source: the tensor that enters it.
            inside: names of the tensors that its nodes make.
            convs: number of its convolutions; every step of the table has at most one.
        """
        found = list(self._steps_inside(source, inside))
        return sum(found) if len(found) >= convs else None

    def _steps_inside(self, source: str, inside: Collection[str]) -> Iterator[float]:
        for start in (source, *inside):
            for target, value in self._steps.get(start, ()):
                if target in inside:
                    yield value

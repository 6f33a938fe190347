"""How long the whole frontier takes: every budget's best plan from one run of the solver.

Two tables: LayerMerge's 391 entries of MobileNetV2-1.0, counted by its rules on the published
pairs, with the published times scaled to each kernel; and a synthetic network of 200 layers and
20,000 entries with real-valued figures.

Run it as `python benchmarks/solver.py`.
"""

import statistics
import time

import common
import numpy as np

from graphfold.published_tables import read_latency_csv
from graphfold.solver import Entry, frontier

COMMAND = "python benchmarks/solver.py"
TABLE = common.ROOT / "tests" / "data" / "published_tables" / "mbv2_1.0_time.csv"
DEPTHWISE = range(1, 50, 3)
STRIDED = {4, 10, 19, 40}
ROUNDS = 9


def mobilenet() -> list[Entry[int]]:
    """LayerMerge's entries: per pair, every number of depthwise convolutions that may stay."""
    rng = np.random.default_rng(0)
    entries: list[Entry[int]] = []
    for row in read_latency_csv(TABLE).rows:
        start, end = int(row.input), int(row.output)
        inside = [conv for conv in DEPTHWISE if start < conv <= end]
        needed = sum(conv in STRIDED for conv in inside)
        # Where every convolution could go, none of them staying is no segment.
        fewest = 1 if len(inside) == end - start and not needed else needed
        for kept in range(fewest, len(inside) + 1):
            kernel, whole = 1 + 2 * kept, 1 + 2 * len(inside)
            latency = row.value * (0.3 + 0.7 * (kernel / whole) ** 2)
            importance = -rng.exponential(0.01) * (end - start - 1 + len(inside) - kept)
            entries.append(Entry(start, end, latency, importance, kernel))
    return entries


def synthetic(layers: int, count: int) -> list[Entry[int]]:
    """Layers that stay, and random faster replacements of up to twelve of them."""
    rng = np.random.default_rng(0)
    entries = [Entry(i, i + 1, rng.uniform(0.5, 2.0), 0.0, i) for i in range(layers)]
    while len(entries) < count:
        start = int(rng.integers(0, layers))
        length = int(rng.integers(1, min(12, layers - start) + 1))
        latency, importance = rng.uniform(0.3, 1.0) * length, -rng.exponential(0.05) * length
        entries.append(Entry(start, start + length, latency, importance, len(entries)))
    return entries


def milliseconds(
    entries: list[Entry[int]], positions: int, rounds: int = ROUNDS
) -> tuple[float, int]:
    """Median time of a frontier, in milliseconds of processor time, and its number of points."""
    taken: list[float] = []
    points = 0
    for _ in range(rounds):
        begin = time.process_time()
        points = len(frontier(entries, positions))
        taken.append(1e3 * (time.process_time() - begin))
    return statistics.median(taken), points


def main() -> None:
    cases = {
        "MobileNetV2-1.0": (mobilenet(), 51),
        "200 layers": (synthetic(200, 20_000), 201),
    }
    rows, data = [], []
    for name, (entries, positions) in cases.items():
        median, points = milliseconds(entries, positions)
        rows.append([name, f"{len(entries):,}", str(positions), f"{points:,}", f"{median:.1f}"])
        data.append(
            {"table": name, "entries": len(entries), "positions": positions, "points": points,
             "milliseconds": median}
        )  # fmt: skip
    columns = ["table", "entries", "positions", "points of the frontier", "ms"]
    body = common.markdown(columns, rows)
    body += f"\n\nProcessor time on one thread, median of {ROUNDS} runs; all budgets at once."
    common.write("solver", "The whole frontier", COMMAND, body, {"cases": data})


if __name__ == "__main__":
    main()

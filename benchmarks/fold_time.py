"""How long folding takes: MobileNetV2-1.4 with all 16 mergeable blocks merged.

Pass time in process (plan passes and fold passes), and the whole `graphfold optimize` with
verification as a process of its own. Median of several runs.

Run it as `python benchmarks/fold_time.py`.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import common
import onnx
from zoo import exported

import graphfold

COMMAND = "python benchmarks/fold_time.py"
PLAN = {"graphfold_plan": 1, "keep_blocks": [1] + [0] * 16}


def pass_seconds(path: Path, boundary: str) -> float:
    """Seconds that all passes took in one run in process."""
    result = graphfold.optimize(path, PLAN | {"boundary": boundary}, verify=False)
    return sum(each.seconds for each in result.report.statistics)


def command_seconds(path: Path, plan: Path, out: Path) -> float:
    """Seconds of one whole command."""
    command = [sys.executable, "-m", "graphfold", "optimize", str(path), "--plan", str(plan)]
    started = time.perf_counter()
    subprocess.run([*command, "-o", str(out), "--quiet"], check=True)
    return time.perf_counter() - started


def main() -> None:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=5)
    runs = parser.parse_args().runs
    rows, data = [], {}
    with tempfile.TemporaryDirectory() as folder:
        path, plan, out = (Path(folder) / name for name in ("m.onnx", "plan.json", "o.onnx"))
        onnx.save(exported("mobilenet_v2_1.4", exporter="torchscript", opset=17), path)
        for boundary in ("exact", "hoist"):
            plan.write_text(json.dumps(PLAN | {"boundary": boundary}))
            passes = [pass_seconds(path, boundary) for _ in range(runs)]
            whole = [command_seconds(path, plan, out) for _ in range(runs)]
            data[boundary] = {"passes": passes, "command": whole}
            rows.append(
                [
                    boundary,
                    f"{statistics.median(passes):.2f} s",
                    f"{statistics.median(whole):.2f} s",
                ]
            )
    columns = ["MobileNetV2-1.4, 16 blocks", "all passes, in process", "whole command, verified"]
    common.write("fold_time", "Time to fold", COMMAND, common.markdown(columns, rows), data)


if __name__ == "__main__":
    main()

"""One run of one optimizer, one comparison, or one latency measurement, in a process of its own.

What benchmarks/optimizers.py starts; prints one line of JSON.

    python benchmarks/tool_runs.py optimize TOOL INPUT OUTPUT
    python benchmarks/tool_runs.py compare INPUT OUTPUT
    python benchmarks/tool_runs.py latency SECONDS INPUT OUTPUT ...
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx

# Of the largest value of an output, and on top.
RELATIVE, ABSOLUTE = 1e-4, 1e-6
ROUNDS = 20
# From this IR version on, an initializer that is also an input is a default that callers replace.
_DEFAULTS_IR_VERSION = 4

Optimizer = Callable[[onnx.ModelProto], onnx.ModelProto]


def _graphfold() -> Optimizer:
    import graphfold.optimizer

    return lambda proto: graphfold.optimize(proto, verify=False).model


def _onnxsim() -> Optimizer:
    import onnxsim

    def run(proto: onnx.ModelProto) -> onnx.ModelProto:
        simplified, checked = onnxsim.simplify(proto)
        assert checked
        return simplified

    return run


def _onnxslim() -> Optimizer:
    import onnxslim

    return lambda proto: onnxslim.slim(proto)


def _onnxoptimizer() -> Optimizer:
    import onnxoptimizer

    return lambda proto: onnxoptimizer.optimize(proto)


def _onnxscript() -> Optimizer:
    import onnxscript.optimizer

    return lambda proto: onnxscript.optimizer.optimize(proto)


def _onnxruntime() -> Optimizer:
    import tempfile

    import onnxruntime

    def run(proto: onnx.ModelProto) -> onnx.ModelProto:
        with tempfile.TemporaryDirectory() as folder:
            options = onnxruntime.SessionOptions()
            options.log_severity_level = 3
            level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
            options.graph_optimization_level = level
            options.optimized_model_filepath = str(Path(folder) / "optimized.onnx")
            providers = ["CPUExecutionProvider"]
            onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=providers)
            return onnx.load(options.optimized_model_filepath)

    return run


# By the name of the package; what each returns has imported its tool.
TOOLS: dict[str, Callable[[], Optimizer]] = {
    "graphfold": _graphfold,
    "onnxsim": _onnxsim,
    "onnxslim": _onnxslim,
    "onnxoptimizer": _onnxoptimizer,
    "onnxscript": _onnxscript,
    "onnxruntime": _onnxruntime,
}


def operators(proto: onnx.ModelProto) -> dict[str, int]:
    """Nodes by operator, those of subgraphs and functions included."""
    counts: Counter[str] = Counter()
    pending = list(proto.graph.node)
    pending += [node for function in proto.functions for node in function.node]
    while pending:
        node = pending.pop()
        counts[node.op_type] += 1
        for attribute in node.attribute:
            pending += attribute.g.node
            pending += [inner for graph in attribute.graphs for inner in graph.node]
    return dict(sorted(counts.items()))


def optimize(tool: str, source: Path, target: Path) -> dict[str, float]:
    """Import a tool, load, optimize once, save; seconds and MiB of it."""
    begin = time.perf_counter()
    run = TOOLS[tool]()
    imported = time.perf_counter()
    proto = onnx.load(source)
    user, started = _user_seconds(), time.perf_counter()
    result = run(proto)
    seconds, used = time.perf_counter() - started, _user_seconds() - user
    onnx.save(result, target)
    return {
        "import_s": imported - begin,
        "seconds": seconds,
        "user_s": used,
        "peak_mib": peak_mib(),
    }


def _user_seconds() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_utime


def peak_mib() -> float:
    """Largest resident size so far, in MiB."""
    status = Path("/proc/self/status")
    if status.exists():
        # ru_maxrss begins with what the parent had resident when it started this process.
        lines = status.read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024
    unit = 1 << 20 if sys.platform == "darwin" else 1 << 10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def compare(source: Path, target: Path) -> dict[str, Any]:
    """Whether two models have one interface and give the same, onnxruntime's optimizations off."""
    from graphfold.feeds import first_that_runs
    from graphfold.model import load
    from graphfold.runtime import Runnable, Session

    difference = _interface(onnx.load(source), onnx.load(target)) or _invalid(target)
    if difference:
        return {"equal": False, "reason": difference}
    with Runnable(load(source)) as runnable:
        session = Session(runnable, optimize=False, threads=1)
        expected, feed, _ = first_that_runs(session, {}, seed=0)
        del session
    with Runnable(load(target)) as runnable:
        actual = Session(runnable, optimize=False, threads=1).run(feed)
    largest = 0.0
    for name, value in expected.items():
        if value.shape != actual[name].shape or value.dtype != actual[name].dtype:
            return {"equal": False, "reason": f"{name} has another shape or type"}
        one, two = value.astype(np.float64), actual[name].astype(np.float64)
        if not np.array_equal(np.isfinite(one), np.isfinite(two)):
            return {"equal": False, "reason": f"{name} is not finite in other places"}
        finite = np.isfinite(one)
        scale = float(np.max(np.abs(one[finite]), initial=0.0))
        error = float(np.max(np.abs(one - two)[finite], initial=0.0))
        largest = max(largest, error / (RELATIVE * scale + ABSOLUTE))
    reason = f"error {largest:.3g} times the tolerance"
    return {"equal": largest <= 1, "largest": largest, "reason": reason}


def _invalid(target: Path) -> str | None:
    """What onnx's checker has against a model."""
    try:
        onnx.checker.check_model(target)
    except onnx.checker.ValidationError as error:
        return f"the checker refuses it: {str(error).splitlines()[0]}"
    return None


def _interface(source: onnx.ModelProto, target: onnx.ModelProto) -> str | None:
    """What differs between the names, types and sizes of inputs and outputs."""
    # Before IR version 4, constants are listed among the inputs: callers do not see them.
    hidden = set()
    if source.ir_version < _DEFAULTS_IR_VERSION:
        hidden = {tensor.name for tensor in source.graph.initializer}
    for kind in ("input", "output"):
        before, after = (_described(getattr(p.graph, kind), hidden) for p in (source, target))
        missing, new = sorted(before.keys() - after.keys()), sorted(after.keys() - before.keys())
        if missing or new:
            changes = [f"{len(missing)} missing"] * bool(missing) + [f"{len(new)} new"] * bool(new)
            example = (missing or new)[0]
            return f"{kind}s: {', '.join(changes)} ({example})"
        for name, info in before.items():
            if info != after[name]:
                return f"{kind} {name!r} has another type"
    return None


def _described(infos: Iterable[onnx.ValueInfoProto], hidden: set[str]) -> dict[str, int]:
    return {i.name: i.type.tensor_type.elem_type for i in infos if i.name not in hidden}


def latency(seconds: float, paths: Sequence[Path]) -> dict[str, Any]:
    """Median over interleaved rounds of the first model's latency / each model's."""
    from graphfold.calibration.latency import compare as measure

    found = measure(paths, rounds=ROUNDS, seconds=seconds, threads=1)
    return {
        "ratios": [model.speedup for model in found.models],
        "median_ms": [model.median for model in found.models],
        "spread": max(model.speedup_spread for model in found.models),
    }


def main(action: str, *arguments: str) -> None:
    """Do one thing and print it."""
    result: dict[str, Any]
    if action == "optimize":
        tool, source, target = arguments
        result = optimize(tool, Path(source), Path(target))
    elif action == "compare":
        result = compare(*map(Path, arguments))
    else:
        result = latency(float(arguments[0]), [Path(each) for each in arguments[1:]])
    print(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])

"""graphfold beside the other ONNX optimizers: time, memory, nodes left, correctness, latency.

Every tool runs on every model in a process of its own, without a plan and with the options that it
has by default; graphfold does not verify, since no other tool does. A tool that crashes or takes
longer than the limit is shown as such. docs/benchmarks.md says what the columns mean.

    python benchmarks/optimizers.py [--quick] [--models NAME ...] [--tools NAME ...]

`make benchmark-peers` installs the other tools first. Writes benchmarks/results/optimizers.*
unless filtered.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import resources
from importlib.metadata import version
from pathlib import Path
from typing import Any

import common
import networks
import onnx
from tool_runs import TOOLS, operators

COMMAND = "make benchmark-peers"
SHARED = common.ROOT.parent / "shared" / "models"
WORKER = Path(__file__).with_name("tool_runs.py")
LIMIT_SECONDS = 120
REPEATS = 3
# Runs beyond this are not repeated.
LONG_SECONDS = 30
# Twenty rounds of seven large models, however short the time to measure.
LATENCY_LIMIT = 900
TOO_LONG = f"> {LIMIT_SECONDS} s"
SLOWEST_LATENCY = 0.98
DEEP = (2_500, 5_000, 10_000)
# Time in process is a bar for these: measured in several processes.
TIMED = ("mobilenet_v2", "resnet50", *(f"deep_{count}" for count in DEEP))
# Weights that are all equal, chains that no runtime is made for: latency would mean nothing.
NO_LATENCY = ("light_*", "deep_*")
COMPARED = ("onnxsim", "onnxslim")
QUICK = ("mtcnn_pnet", "fer_mini_xception", "light_squeezenet", "deep_2500")
# Why graphfold leaves more nodes than onnxsim or onnxslim, by pattern of models.
REASONS: tuple[tuple[str, str], ...] = (
    (
        "light_*",
        "written before IR version 4, where an initializer is an input of the graph: constants "
        "stay nodes, so that the inputs stay as they are, and large fills stay fills, so that the "
        "file stays small",
    ),
    (
        "ultraface*",
        "its weights are inputs that callers may replace (IR version 4): nothing may be folded "
        "into them, the others take these inputs away",
    ),
)

Outcome = dict[str, Any]
Results = dict[str, dict[str, Outcome]]


def models() -> dict[str, Callable[[], onnx.ModelProto]]:
    """What builds or loads each model, by name."""

    def loader(path: Path) -> Callable[[], onnx.ModelProto]:
        return lambda: onnx.load(path)

    light = Path(str(resources.files("onnx"))) / "backend" / "test" / "data" / "light"
    paths = [path for path in sorted(SHARED.glob("*.onnx")) if "int8" not in path.name]
    found = {path.stem: loader(path) for path in (*paths, *sorted(light.glob("*.onnx")))}
    found["mobilenet_v2"] = networks.mobilenet_v2
    found["resnet50"] = networks.resnet50
    found["repvgg_a0_training_form"] = networks.repvgg
    found["expanded_vgg11"] = networks.expanded_vgg
    lite0 = SHARED / "efficientnet_lite0_bn.onnx"
    if lite0.exists():
        found["lite0_without_activations"] = lambda: networks.without_clips(onnx.load(lite0))
    for count in DEEP:  # the longest runs last, each after the smaller ones
        found[f"deep_{count}"] = lambda count=count: networks.deep(count)
    return found


def in_process(*arguments: object, limit: float = LIMIT_SECONDS) -> Outcome:
    """What one run of tool_runs.py printed, with the seconds it took; or why there is nothing."""
    command = [sys.executable, str(WORKER), *map(str, arguments)]
    started = time.perf_counter()
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return {"error": f"> {limit:.0f} s"}
    whole = time.perf_counter() - started
    if run.returncode != 0:
        lines = run.stderr.strip().splitlines() or [f"exit code {run.returncode}"]
        return {"error": lines[-1][:200]}
    return {"whole_s": whole, **json.loads(run.stdout.strip().splitlines()[-1])}


def optimized(tool: str, source: Path, target: Path, repeats: int) -> Outcome:
    """One tool on one model: medians over processes, operators left, correctness."""
    runs = [in_process("optimize", tool, source, target)]
    repeats = 1 if runs[0].get("whole_s", LIMIT_SECONDS) > LONG_SECONDS else repeats
    while len(runs) < repeats:
        runs.append(in_process("optimize", tool, source, target))
    failed = next((run for run in runs if "error" in run), None)
    if failed is not None:
        return failed
    found: Outcome = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
    found["operators"] = operators(onnx.load(target))
    found["nodes"] = sum(found["operators"].values())
    return found | {"comparison": in_process("compare", source, target)}


def is_right(outcome: Outcome) -> bool:
    """Whether the tool's result is the input's function with the input's interface."""
    return bool(outcome.get("comparison", {}).get("equal", False))


def latencies(paths: Mapping[str, Path], seconds: float) -> list[Outcome]:
    """Input latency / output latency by tool; measured twice more where graphfold's is slow."""
    runs: list[Outcome] = []
    while len(runs) < 3:
        runs.append(in_process("latency", seconds, *paths.values(), limit=LATENCY_LIMIT))
        if "error" in runs[-1]:
            break
        ratios = dict(zip(paths, runs[-1].pop("ratios"), strict=True))
        runs[-1]["ratios"] = ratios
        if ratios.get("graphfold", 1.0) >= SLOWEST_LATENCY:
            break
    return runs


def measure(
    name: str, proto: onnx.ModelProto, tools: Sequence[str], args: Any, too_slow: set[str]
) -> Outcome:
    """Every tool on one model, in turn, then the latency of all results in one run.

    Tools in `too_slow` took too long on a smaller `deep` graph, and are not run on a larger one.
    """
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "input.onnx"
        onnx.save(proto, source)
        repeats = REPEATS if name in TIMED and not args.quick else 1
        found: dict[str, Outcome] = {}
        paths = {"input": source}
        for tool in tools:
            target = Path(folder) / f"{tool}.onnx"
            if tool in too_slow and name.startswith("deep_"):
                found[tool] = {"error": TOO_LONG}
                continue
            found[tool] = optimized(tool, source, target, repeats)
            if found[tool].get("error") == TOO_LONG:
                too_slow.add(tool)
            print(f"{name}: {tool}: {_line(found[tool])}", file=sys.stderr, flush=True)
            if is_right(found[tool]):
                paths[tool] = target
        timed = not any(fnmatch.fnmatch(name, pattern) for pattern in NO_LATENCY)
        runs = latencies(paths, args.seconds) if timed and len(paths) > 1 else []
    before = operators(proto)
    return {"operators": before, "nodes": sum(before.values()), "tools": found, "latency": runs}


def _line(outcome: Outcome) -> str:
    if "error" in outcome:
        return str(outcome["error"])
    right = "right" if is_right(outcome) else f"WRONG {outcome['comparison']}"
    return f"{outcome['nodes']} nodes, {outcome['seconds']:.2f} s, {right}"


def cell(outcome: Outcome, key: str, style: str) -> str:
    """One figure of one tool, or what it did instead."""
    if "error" in outcome:
        return outcome["error"] if outcome["error"].startswith(">") else "fails"
    text = format(outcome[key], style)
    return text if is_right(outcome) else f"{text} (wrong)"


def table(results: Results, tools: Sequence[str], key: str, style: str) -> str:
    """One figure for each model and tool."""
    rows = [
        [name, *(cell(found["tools"][tool], key, style) for tool in tools)]
        for name, found in results.items()
    ]
    return common.markdown(["model", *tools], rows)


def node_table(results: Results, tools: Sequence[str]) -> str:
    """Nodes of the input, and left by each tool."""
    rows = [
        [name, str(found["nodes"]), *(cell(found["tools"][t], "nodes", "d") for t in tools)]
        for name, found in results.items()
    ]
    return common.markdown(["model", "input", *tools], rows)


def latency_table(results: Results, tools: Sequence[str]) -> str:
    """Input latency / output latency; every measurement where there were several."""
    rows = []
    for name, found in results.items():
        for run in found["latency"]:
            ratios = run.get("ratios", {})
            texts = [f"{ratios[tool]:.2f}" if tool in ratios else "-" for tool in tools]
            rows.append([name, *texts, f"{100 * run['spread']:.0f} %" if ratios else "fails"])
    return common.markdown(["model", *tools, "spread"], rows)


def gaps(results: Results) -> list[list[str]]:
    """Where graphfold leaves more nodes than another: model, tool, nodes, operators, reason."""
    rows = []
    for name, found in results.items():
        own = found["tools"].get("graphfold", {})
        for tool in COMPARED:
            other = found["tools"].get(tool, {})
            if "nodes" not in own or "nodes" not in other or own["nodes"] <= other["nodes"]:
                continue
            kinds = sorted({*own["operators"], *other["operators"]})
            difference = {
                kind: own["operators"].get(kind, 0) - other["operators"].get(kind, 0)
                for kind in kinds
            }
            text = ", ".join(f"{kind} {count:+d}" for kind, count in difference.items() if count)
            rows.append([name, f"{tool}, {own['nodes']} : {other['nodes']}", text, _reason(name)])
    return rows


def _reason(name: str) -> str:
    found = (why for pattern, why in REASONS if fnmatch.fnmatch(name, pattern))
    return next(found, "not explained")


def faults(results: Results) -> Iterable[list[str]]:
    """What went wrong: tools that fail, and results that are not the input's function."""
    for name, found in results.items():
        for tool, outcome in found["tools"].items():
            if "error" in outcome:
                yield [name, tool, outcome["error"].replace("|", "/")]
            elif not is_right(outcome):
                comparison = outcome["comparison"]
                what = comparison.get("error") or comparison["reason"]
                yield [name, tool, str(what).replace("|", "/")]


def body(results: Results, tools: Sequence[str]) -> str:
    """All tables."""
    parts = [
        "What the columns mean: docs/benchmarks.md.",
        "## Nodes left\n\n" + node_table(results, tools),
    ]
    differences = gaps(results)
    if differences:
        columns = ["model", "tool, graphfold : tool", "graphfold - tool", "reason"]
        title = "## Where graphfold leaves more nodes than onnxsim or onnxslim"
        parts.append(f"{title}\n\n{common.markdown(columns, differences)}")
    wrong = list(faults(results))
    if wrong:
        parts.append("## Failures and wrong results\n\n")
        parts[-1] += common.markdown(["model", "tool", "what"], wrong)
    title = "## Latency in onnxruntime, input / output (above 1 is faster)"
    parts.append(f"{title}\n\n{latency_table(results, tools)}")
    for heading, key, style in (
        ("Time in process, s", "seconds", ".2f"),
        ("User CPU time in process, s", "user_s", ".2f"),
        ("Whole process, s", "whole_s", ".2f"),
        ("Peak memory, MiB", "peak_mib", ".0f"),
    ):
        parts.append(f"## {heading}\n\n{table(results, tools, key, style)}")
    return "\n\n".join(parts)


def main() -> None:
    """Measure, print and write the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    every = models()
    parser.add_argument("--models", nargs="+", metavar="NAME", help="names or patterns")
    parser.add_argument("--tools", nargs="+", choices=list(TOOLS), default=list(TOOLS))
    parser.add_argument("--quick", action="store_true", help="four small models, one run each")
    parser.add_argument("--seconds", type=float, default=10, help="of latency per model")
    args = parser.parse_args()
    patterns = args.models or (QUICK if args.quick else ("*",))
    chosen = [n for n in every if any(fnmatch.fnmatch(n, pattern) for pattern in patterns)]
    if not chosen:
        parser.error(f"no model matches; there are {', '.join(every)}")
    if not SHARED.is_dir():
        print(f"the models of {SHARED} are not there and left out", file=sys.stderr)
    too_slow: set[str] = set()
    results = {n: measure(n, every[n](), args.tools, args, too_slow) for n in chosen}
    if args.models or args.quick or args.tools != list(TOOLS):
        print(body(results, args.tools))
        return
    data = {"tools": {tool: version(tool) for tool in args.tools}, "models": results}
    text = body(results, args.tools)
    text += "\n\nTools: " + ", ".join(f"{t} {v}" for t, v in data["tools"].items()) + "."
    common.write("optimizers", "graphfold beside other optimizers", COMMAND, text, data)


if __name__ == "__main__":
    main()

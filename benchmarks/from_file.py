"""From a model file alone: profile, plan and optimize by the command line, as a user would.

For each model a latency table, a plan for a speedup with importance `macs`, confirmed by measuring,
and the folded model; then both models in one interleaved run. What comes out is as fast as asked
and at most 1.15 times as fast as that, unless no finer plan exists; where nothing can be gained,
the command says so, and why.

Run it as `python benchmarks/from_file.py` on a machine that does nothing else. Every model's result
is kept as it is done: `--only NAME` runs some again, `--missing` those that have none yet.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common
import networks
import onnx
import unet

COMMAND = "python benchmarks/from_file.py"
SPEEDUP = 1.3
LARGEST_EXCESS = 1.15
# Of what a measurement may differ from the one that confirmed the plan.
NOISE = 0.03
BUILT: dict[str, Callable[[], onnx.ModelProto]] = {
    "resnet18": networks.resnet18,
    "resnet34": networks.resnet34,
    "resnet50": networks.resnet50,
    "vgg16": networks.vgg16,
    "repvgg_a0_training_form": networks.repvgg,
    "segmentation_unet": networks.segmentation_unet,
    "ddpm_unet": unet.ddpm_unet,
}
# Files that are refused as they are, and how the message says to mend them.
MENDED = {"ultraface_version-RFB-320": "onnxruntime.tools.remove_initializer_from_input"}
# Sizes that files leave open, where the default of 224 is not what they are used at.
SHAPES = {
    "esrgan_slim_x2": "1,64,64,3",
    "mtcnn_pnet": "1,3,120,160",
    "realesr_animevideov3_x2": "1,3,64,64",
}
# Planned for without a table too: the command profiles the device itself.
WITHOUT_TABLE = ("cifar10_resnet20_bn", "mobilenetv2_tv_bn")
COLUMNS = ["model", "ms", "asked", "predicted", "measured", "segments", "outcome", "seconds"]


@dataclass(frozen=True)
class Answer:
    """What one command said."""

    code: int
    document: dict[str, Any]
    stderr: str
    seconds: float

    @property
    def message(self) -> str:
        """The error, or the last line where there is none of ours."""
        lines = [line for line in self.stderr.splitlines() if line.strip()]
        found = [line for line in lines if line.startswith("graphfold: error: ")]
        return (found or lines or ["no message"])[-1].removeprefix("graphfold: error: ")


def graphfold(*arguments: str) -> Answer:
    """Run the command line in a process of its own."""
    begin = time.perf_counter()
    path = os.pathsep.join(filter(None, [str(common.ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-m", "graphfold", *arguments, "--json"],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": path},
        check=False,
    )
    document = json.loads(done.stdout) if done.stdout.strip() else {}
    return Answer(done.returncode, document, done.stderr, time.perf_counter() - begin)


def examine(name: str, file: Path, folder: Path, seconds: float) -> dict[str, Any]:
    """The whole path of one model, with a table and, of some, without."""
    shape = ["--input-shape", SHAPES[name]] if name in SHAPES else []
    table = folder / "latency.json"
    begin = time.perf_counter()
    profiled = graphfold(
        "profile", str(file), "-o", str(table), "--time-budget", str(seconds), *shape
    )
    found: dict[str, Any] = {"model": name, "asked": SPEEDUP}
    if profiled.code:
        found |= {"outcome": "refused", "reason": profiled.message, "code": profiled.code}
    else:
        found |= {"whole_ms": profiled.document["whole_ms"], "rows": profiled.document["rows"]}
        found |= {"profile_seconds": profiled.seconds}
        found |= planned(file, folder, ["--latency", str(table)], shape)
    found["seconds"] = time.perf_counter() - begin
    if name in WITHOUT_TABLE:
        found["without_table"] = planned(file, folder, [], shape)
    return found


def planned(file: Path, folder: Path, table: Sequence[str], shape: Sequence[str]) -> dict[str, Any]:
    """Plan, optimize, and measure what comes out."""
    plan, folded = folder / "plan.json", folder / "folded.onnx"
    options = ["--importance", "macs", "--speedup", str(SPEEDUP), "--confirm", *table, *shape]
    chosen = graphfold("plan", str(file), "-o", str(plan), *options)
    found: dict[str, Any] = {"plan_seconds": chosen.seconds}
    if chosen.code:
        return found | {"outcome": "refused", "reason": chosen.message, "code": chosen.code}
    document = chosen.document
    found |= {
        "predicted": document["predicted"]["speedup"],
        "importance": document["predicted"]["importance"],
        "segments": document["predicted"]["segments"],
        "confirmed": document["measured_speedup"],
        "warnings": document["warnings"],
    }
    optimized = graphfold("optimize", str(file), "--plan", str(plan), "-o", str(folded), *shape)
    found |= {"optimize_seconds": optimized.seconds}
    if optimized.code:
        return found | {"outcome": "failed", "reason": optimized.message, "code": optimized.code}
    measured = graphfold("bench", str(file), str(folded), *shape)
    result = measured.document["models"][1]
    found |= {"measured": result["speedup"], "spread": result["speedup_spread"]}
    return found | {"outcome": outcome(found), "reason": finer(found)}


def outcome(found: dict[str, Any]) -> str:
    """Whether a folded model is what was asked for, within what two measurements differ by."""
    if found["measured"] < SPEEDUP * (1 - NOISE):
        return "too slow"
    if found["confirmed"] <= SPEEDUP * LARGEST_EXCESS:
        return "as asked"
    return "as fast as asked" if finer(found) else "overshoots"


def finer(found: dict[str, Any]) -> str | None:
    """What the command said where it gave more than asked: that there is no finer plan."""
    return next((text for text in found["warnings"] if "no finer plan" in text), None)


def report(results: Sequence[dict[str, Any]]) -> None:
    """Write the table of all results there are."""
    rows = [row(found["model"], found) for found in results]
    rows += [
        row(f"{found['model']}, no table", found["without_table"])
        for found in results
        if "without_table" in found
    ]
    reasons = [f"- {found['model']}: {found['reason']}" for found in results if found.get("reason")]
    body = [
        common.markdown(COLUMNS, rows),
        "\n".join(reasons),
        f"`profile --time-budget`, `plan --importance macs --speedup {SPEEDUP} --confirm`, "
        "`optimize --plan`, each in a process of its own; measured: both files by `bench`, "
        "one thread. Models without a file are built with random weights.",
    ]
    common.write(
        "from_file",
        "From a model file alone",
        COMMAND,
        "\n\n".join(part for part in body if part),
        {"results": list(results)},
    )


def row(name: str, found: dict[str, Any]) -> list[str]:
    """One model's line."""
    taken = sum(found.get(f"{step}_seconds", 0.0) for step in ("profile", "plan", "optimize"))

    def figure(key: str, text: str) -> str:
        return text.format(found[key]) if key in found else ""

    return [
        name,
        figure("whole_ms", "{:.3f}"),
        f"{SPEEDUP:.2f}x",
        figure("predicted", "{:.2f}x"),
        figure("measured", "{:.2f}x"),
        figure("segments", "{}"),
        found["outcome"],
        f"{taken:.0f}" if taken else f"{found.get('seconds', 0.0):.0f}",
    ]


def kept() -> dict[str, dict[str, Any]]:
    """Results of earlier runs, by model."""
    file = common.RESULTS / "from_file.json"
    if not file.exists():
        return {}
    return {found["model"]: found for found in json.loads(file.read_text())["results"]}


def model_file(name: str, files: Mapping[str, Path], folder: Path) -> Path:
    """The file of a model: one there is, one that is built, or one that a tool mends."""
    if name in files:
        return files[name]
    made = folder / "model.onnx"
    source = name.removesuffix(", mended")
    if source in MENDED:
        command = [sys.executable, "-m", MENDED[source], "--input", files[source]]
        subprocess.run([*command, "--output", made], check=True, capture_output=True)
    else:
        onnx.save(BUILT[name](), made)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", type=Path, default=common.ROOT.parent / "shared" / "models")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these models alone")
    parser.add_argument("--missing", action="store_true", help="models without a result")
    parser.add_argument("--time-budget", type=float, default=20.0)
    options = parser.parse_args()
    files = {file.stem: file for file in sorted(options.models.glob("*.onnx"))}
    names = [*BUILT, *files, *(f"{name}, mended" for name in MENDED)]
    unknown = sorted(set(options.only or ()) - set(names))
    if unknown:
        parser.error(f"no such model: {', '.join(unknown)}; there are {', '.join(names)}")
    results = kept()
    wanted = [name for name in (options.only or names) if not (options.missing and name in results)]
    for name in wanted:
        with tempfile.TemporaryDirectory(prefix="graphfold-from-file-") as folder:
            file = model_file(name, files, Path(folder))
            results[name] = examine(name, file, Path(folder), options.time_budget)
        report([results[each] for each in names if each in results])


if __name__ == "__main__":
    main()

"""What the benchmarks share: the example networks, and results with their environment."""

import argparse
import contextlib
import json
import platform
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
sys.path.insert(0, str(ROOT / "examples"))

PACKAGES = ("graphfold", "onnx", "onnx-ir", "onnxruntime", "numpy", "torch")


def environment() -> dict[str, str]:
    """Versions of installed packages, and the processor, that a figure was measured with."""
    found = {}
    for name in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    found["python"] = platform.python_version()
    found["processor"] = processor()
    return found


def processor() -> str:
    """The processor's name, and whether it has AVX-512 (onnxruntime's blocks differ)."""
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return platform.processor() or platform.machine()
    lines = info.read_text().splitlines()
    name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "")
    flags = next((line for line in lines if line.startswith("flags")), "")
    return f"{name}, {'AVX-512' if 'avx512f' in flags else 'no AVX-512'}"


def command_line(
    command: str, parser: argparse.ArgumentParser, options: argparse.Namespace, leave: Sequence[str]
) -> str:
    """The command that was given, with the options that are not the default.

    Args:
        command: without options.
        parser: of its line.
        options: what it parsed.
        leave: options that no result depends on.
    """
    parts = [command]
    for name, default in vars(parser.parse_args([])).items():
        value = getattr(options, name)
        several = isinstance(value, list | tuple)
        if name in leave or (tuple(value) == tuple(default) if several else value == default):
            continue
        shown = " ".join(
            f"{each:g}" if isinstance(each, float) else str(each)
            for each in (value if several else [value])
        )
        parts.append(f"--{name.replace('_', '-')} {shown}")
    return " ".join(parts)


def markdown(columns: list[str], rows: list[list[str]]) -> str:
    """A Markdown table; all but the first column are right-aligned."""
    lines = ["| " + " | ".join(columns) + " |"]
    lines.append("|" + "|".join(["---"] + ["--:"] * (len(columns) - 1)) + "|")
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines)


def write(name: str, title: str, command: str, body: str, data: dict[str, Any]) -> None:
    """Write a result as Markdown and JSON, with the command and the environment beside it."""
    found = environment()
    lines = [f"# {title}", "", f"Command: `{command}`", "", body, "", "Environment: "]
    lines[-1] += ", ".join(f"{key} {value}" for key, value in found.items()) + "."
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"{name}.md").write_text("\n".join(lines) + "\n")
    document = {"command": command, "environment": found, **data}
    (RESULTS / f"{name}.json").write_text(json.dumps(document, indent=1) + "\n")
    print(body)

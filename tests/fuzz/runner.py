"""Runs the command line on mutated models, each in a process of its own, and judges the answer.

A case passes when the command ends by itself within the time and memory allowed, with exit code 2,
one message and nothing written, or with exit code 0 and a model that was verified or whose input
onnxruntime cannot run. The process is forked after all imports, then runs what a command of its
own would run, isolation included.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import pkgutil
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from fuzz.bases import base_models
from fuzz.mutate import Case, make_case

# Starting Python and importing everything comes on top where a command is a process of its own,
# twice where a step is left out: ten seconds in all.
SECONDS = 8.5
PATIENCE = 90.0
BYTES = 2 << 30
_RUN_SECONDS = "FUZZ_RUN_SECONDS"
_QUOTED = re.compile(r"'[^']*'|\"[^\"]*\"|\([^()]*\)|\[[^\[\]]*\]")
_NUMBERS = re.compile(r"[-+]?\d[\w.+-]*")


@dataclass(frozen=True)
class Outcome:
    """What became of a case: `failure` names what must not happen, else None."""

    number: int
    kind: str
    failure: str | None
    seconds: float
    megabytes: int
    detail: str


def run_case(case: Case, folder: Path) -> Outcome:
    """Run one case below an empty folder."""
    model_folder = folder / "a" / "model"
    for name in ("a/model", "out", "tmp", "cwd"):
        (folder / name).mkdir(parents=True)
    (folder / "victim.bin").write_bytes(bytes(4096))
    path = case.write(model_folder)
    before = _snapshot(folder)
    command, *options = case.arguments
    arguments = [command, str(path), "--json", *options]
    if command == "optimize":
        arguments += ["-o", str(folder / "out" / "out.onnx")]
    started = time.monotonic()
    status, usage, killed = _wait(_start(arguments, folder), started)
    seconds = time.monotonic() - started
    out, err = ((folder / name).read_bytes().decode(errors="replace") for name in ("1", "2"))
    written = {item.name for item in (folder / "out").iterdir()}
    stray = _snapshot(folder) ^ before
    kind, failure = _judge(status, out, err, written)
    if killed:
        kind, failure = "hang", "hang"
    elif stray:
        failure = f"stray file: {sorted(stray)[0]}"
    elif usage.ru_utime + usage.ru_stime > SECONDS:
        failure = f"slow: {kind}"
    elif usage.ru_maxrss * 1024 > BYTES:
        failure = f"memory: {kind}"
    return Outcome(case.number, kind, failure, seconds, usage.ru_maxrss >> 10, err.strip()[-2000:])


def _start(arguments: list[str], folder: Path) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 99
    try:
        os.setsid()
        for number in (1, 2):
            os.dup2(os.open(folder / str(number), os.O_CREAT | os.O_WRONLY), number)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.environ["TMPDIR"] = str(folder / "tmp")
        tempfile.tempdir = None
        os.chdir(folder / "cwd")
        sys.argv = ["graphfold", *arguments, "--debug"]
        from graphfold.cli import main

        code = main()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def _wait(pid: int, started: float) -> tuple[int, object, bool]:
    killed = False
    while True:
        found, status, usage = os.wait4(pid, os.WNOHANG)
        if found:
            return status, usage, killed
        if time.monotonic() - started > PATIENCE and not killed:
            killed = True
            os.killpg(pid, signal.SIGKILL)
        time.sleep(0.002)


def _snapshot(folder: Path) -> set[tuple[str, int, int]]:
    """All files except what the command is meant to write, with their sizes and times."""
    found = set()
    for path in folder.rglob("*"):
        name = str(path.relative_to(folder))
        if name in ("1", "2") or name.startswith("out"):
            continue
        state = path.lstat()
        found.add((name, state.st_size, state.st_mtime_ns if path.is_file() else 0))
    return found


# The input itself runs at no sizes: nobody can tell what it computes.
_NEVER_RUNS = "onnxruntime loads the input and not the result"


def _judge(status: int, out: str, err: str, written: set[str]) -> tuple[str, str | None]:
    if not os.WIFEXITED(status):
        name = signal.Signals(os.WTERMSIG(status)).name
        return name, f"crash: {name}"
    code = os.WEXITSTATUS(status)
    if code == 0:
        return _judge_success(out)
    if written:
        return "written", f"exit {code}, and {sorted(written)} written"
    message = _without_traceback(err)
    if code == 2 and len(message) == 1 and message[0].startswith("graphfold: error: "):
        return "error: " + _general(message[0].split(": ", 2)[2]), None
    last = err.strip().splitlines()[-1] if err.strip() else "no message"
    if code == 1 and _NEVER_RUNS in last:
        return "error: an input that loads and never runs, refused", None
    what = {1: "wrong result", 3: "internal error"}.get(code, f"exit {code}")
    return what, f"{what}: {_general(last)[:120]}"


def _without_traceback(err: str) -> list[str]:
    """Lines of a message; --debug shows tracebacks after it, for those who look into failures."""
    lines: list[str] = []
    for line in err.strip().splitlines():
        if line.startswith(("Traceback", "graphfold.errors.", "  +")):
            break
        lines.append(line)
    return lines


def _judge_success(out: str) -> tuple[str, str | None]:
    try:
        document = json.loads(out)
    except ValueError:
        return "no JSON", "exit 0 without a JSON document"
    if "verification" not in document:
        return "inspected", None
    found = document["verification"]
    if found is not None:
        folds = "folded" if document["folds"] else "unchanged or tidied"
        return f"correct, verified, {folds}", None
    return "not verified: " + _general(str(document.get("reason"))), None


def _general(text: str) -> str:
    """A message without names, numbers and paths, to count messages of a kind."""
    text = re.sub(r"/\S*?model\.onnx: ", "", text)
    for _ in range(3):
        text = _QUOTED.sub("_", text)
    return _NUMBERS.sub("0", text)[:70].strip()


def run_cases(seed: int, numbers: Iterable[int], *, with_shared: bool) -> Iterator[Outcome]:
    """Outcomes in order; imports everything first, so that each case starts from there."""
    _import_everything()
    bases = base_models(with_shared=with_shared)
    for number in numbers:
        folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
        try:
            yield run_case(make_case(bases, seed, number), folder)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _import_everything() -> None:
    import onnxruntime

    import graphfold
    from graphfold import guard
    from graphfold.rewrite import available_passes

    available_passes()
    for module in pkgutil.iter_modules(graphfold.__path__):
        if module.name not in ("__main__", "graphsurgeon"):
            importlib.import_module(f"graphfold.{module.name}")
    guard.RUN_SECONDS = float(os.environ.get(_RUN_SECONDS, guard.RUN_SECONDS))
    onnxruntime.get_available_providers()


def main() -> int:
    """Run cases and print counts; exit code 1 when some failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--only", type=int, help="run one case and show what it printed")
    parser.add_argument("--no-shared", action="store_true", help="only models built here")
    parser.add_argument(
        "--run-seconds",
        type=float,
        help="let models run for so long, not what the command allows: a campaign is shorter",
    )
    parser.add_argument("--json", metavar="FILE", help="write all outcomes")
    options = parser.parse_args()
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    if options.run_seconds is not None:
        os.environ[_RUN_SECONDS] = str(options.run_seconds)
    if options.only is not None:
        return _show(options.seed, options.only, with_shared=not options.no_shared)
    numbers = range(options.first, options.first + options.count)
    counts: Counter[str] = Counter()
    failures: list[Outcome] = []
    slowest, largest, done = 0.0, 0, 0
    log = open(options.json, "w", encoding="utf-8") if options.json else None  # noqa: SIM115, PTH123
    started = time.monotonic()
    for outcome in _in_parallel(options, numbers):
        counts[outcome.kind] += 1
        done += 1
        slowest, largest = max(slowest, outcome.seconds), max(largest, outcome.megabytes)
        if outcome.failure is not None:
            failures.append(outcome)
            print(f"\ncase {outcome.number}: {outcome.failure}", flush=True)
        if log is not None:
            log.write(json.dumps(outcome.__dict__) + "\n")
            log.flush()
        if done % 20 == 0:
            text = f"{done}/{options.count}, {len(failures)} failures"
            print(f"\r{text}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    _print_counts(counts, failures)
    print(
        f"{done} cases in {time.monotonic() - started:.0f} s, {len(failures)} failures; "
        f"slowest {slowest:.1f} s, most memory {largest} MB"
    )
    return 1 if failures else 0


def _in_parallel(options: argparse.Namespace, numbers: range) -> Iterator[Outcome]:
    with_shared = not options.no_shared
    if options.jobs == 1:
        yield from run_cases(options.seed, numbers, with_shared=with_shared)
        return
    import multiprocessing

    context = multiprocessing.get_context("spawn")
    with context.Pool(options.jobs) as pool:
        parts = [
            (options.seed, list(numbers[at : at + 50]), with_shared)
            for at in range(0, len(numbers), 50)
        ]
        for outcomes in pool.imap_unordered(_run_part, parts):
            yield from outcomes


def _run_part(part: tuple[int, list[int], bool]) -> list[Outcome]:
    seed, numbers, with_shared = part
    return list(run_cases(seed, numbers, with_shared=with_shared))


def _show(seed: int, number: int, *, with_shared: bool) -> int:
    case = make_case(base_models(with_shared=with_shared), seed, number)
    folder = Path(tempfile.gettempdir()) / f"fuzz-{seed}-{number}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    _import_everything()
    outcome = run_case(case, folder)
    print(f"{case.base}: {', '.join(case.mutations)}; {' '.join(case.arguments)}; in {folder}")
    print(outcome.detail)
    print(f"{outcome.kind}; {outcome.failure}; {outcome.seconds:.1f} s, {outcome.megabytes} MB")
    return 1 if outcome.failure else 0


def _print_counts(counts: Counter[str], failures: list[Outcome]) -> None:
    groups: Counter[str] = Counter()
    for kind, count in counts.items():
        groups[kind.split(":")[0]] += count
    for kind, count in sorted(counts.items(), key=lambda item: (item[0].split(":")[0], -item[1])):
        print(f"{count:6} {kind}")
    print("in all:")
    for kind, count in groups.most_common():
        print(f"{count:6} {kind}")
    for outcome in failures:
        print(f"FAILED case {outcome.number}: {outcome.failure}")

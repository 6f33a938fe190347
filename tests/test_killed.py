"""Commands that train are killed by the system, and go on to what an undisturbed run gives."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from maskable import chain, table_of
from trainable import pictures

pytest.importorskip("torch")

from graphfold.measures import write_table
from graphfold.model import load, save

PLAN = {
    "graphfold_plan": 1,
    "segments": [{"input": "stem", "output": "block0", "boundary": "hoist"}],
}
EPOCHS = ("--epochs", "12", "--batch-size", "16")
# Arguments, what is written, and what lies there while the command runs.
COMMANDS = {
    "finetune": (("--plan", "plan.json", *EPOCHS, "--no-augment"), "out.onnx", "out.onnx.partial"),
    "search": (("--keep", "1", "--latency", "latency.json", *EPOCHS), "out", "out/keep-1.partial"),
    "score": (
        ("--method", "finetune", "--subset", "24", *EPOCHS, "--jobs", "1"),
        "out.json",
        "out.json.partial",
    ),
}
VARIABLE = ("created", "continued", "seconds")


def start(folder: Path, name: str) -> subprocess.Popen[bytes]:
    arguments, output, _ = COMMANDS[name]
    data = "train.npz" if name != "score" else "data.npz"
    command = [*(sys.executable, "-m", "graphfold", name, "model.onnx", "--data", data, "-q")]
    return subprocess.Popen(
        [*command, *arguments, "-o", output],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )


def written(folder: Path, name: str) -> object:
    path = folder / COMMANDS[name][1]
    if path.is_dir():
        path = path / "search.json"
    return path.read_bytes() if path.suffix == ".onnx" else without(json.loads(path.read_text()))


def without(document: object) -> object:
    """A document less what differs from run to run."""
    if isinstance(document, dict):
        return {key: without(item) for key, item in document.items() if key not in VARIABLE}
    return [without(item) for item in document] if isinstance(document, list) else document


@pytest.mark.parametrize("name", COMMANDS)
def test_what_was_killed_goes_on_to_the_same_result(name, tmp_path):
    for folder in (tmp_path / "whole", tmp_path / "parts"):
        folder.mkdir()
        model = load(chain(3))
        save(model, folder / "model.onnx")
        table = table_of(model, {"block0": 0.5, "block1": 1.0, "block2": 2.0})
        write_table(table, folder / "latency.json")
        images, labels = pictures(64)
        np.savez(folder / "train.npz", x=images, labels=labels)
        np.savez(folder / "data.npz", x=images, labels=labels)
        (folder / "plan.json").write_text(json.dumps(PLAN))
    assert start(tmp_path / "whole", name).wait(300) == 0
    parts = tmp_path / "parts"
    killed = start(parts, name)
    began = parts / COMMANDS[name][2]
    limit = time.monotonic() + 300
    while killed.poll() is None and not began.exists() and time.monotonic() < limit:
        time.sleep(0.002)
    os.killpg(killed.pid, signal.SIGKILL)
    assert killed.wait(60) == -signal.SIGKILL
    assert began.exists()
    assert start(parts, name).wait(300) == 0
    assert not began.exists()
    assert written(parts, name) == written(tmp_path / "whole", name)

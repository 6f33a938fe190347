"""Commands in a process of their own: crashes, hangs, memory, signals."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
import small_models as small

from graphfold import guard

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="nothing is isolated without fork")

TIMEOUT = 60
_HEAD = """
import os, signal, sys, time
from pathlib import Path
from graphfold import guard

def fail(text):
    print("failed:", text, flush=True)
    return 2
"""


def script(body: str) -> list[str]:
    return [sys.executable, "-c", _HEAD + textwrap.dedent(body)]


def run(body: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        script(body), capture_output=True, text=True, timeout=TIMEOUT, check=False
    )


@pytest.mark.parametrize(
    ("name", "what"),
    [("SIGSEGV", "segmentation fault"), ("SIGABRT", "aborted"), ("SIGKILL", "memory")],
)
def test_a_crash_is_one_message(name: str, what: str) -> None:
    done = run(
        f"""
        def work():
            os.kill(os.getpid(), signal.{name})
        sys.exit(guard.contained(work, fail))
        """
    )
    assert done.returncode == 2
    assert done.stdout.startswith("failed: the process ")
    assert what in done.stdout
    assert done.stderr == ""


def test_a_crash_in_a_step_that_can_be_left_out_costs_that_step() -> None:
    done = run(
        """
        def work():
            reasons = [guard.avoided(name) for name in (guard.INFERENCE, guard.RUN)]
            print(reasons, flush=True)
            for name, reason in zip((guard.INFERENCE, guard.RUN), reasons):
                if reason is None:
                    with guard.step(name):
                        os.kill(os.getpid(), signal.SIGSEGV)
            return 7
        sys.exit(guard.contained(work, fail))
        """
    )
    assert done.returncode == 7
    lines = done.stdout.splitlines()
    assert len(lines) == 3
    assert lines[0] == "[None, None]"
    assert "shape inference crashed (segmentation fault)" in lines[2]
    assert "running the model, crashed (segmentation fault)" in lines[2]


@pytest.mark.parametrize(
    "body",
    ["with guard.step(guard.CHECKER):", "guard.cannot_repeat()\n    with guard.step(guard.RUN):"],
)
def test_a_crash_in_the_checker_or_with_the_input_gone_is_an_error(body: str) -> None:
    code = f"def work():\n    {body}\n        os.kill(os.getpid(), signal.SIGSEGV)\n"
    code += "sys.exit(guard.contained(work, fail))"
    done = run(code)
    assert done.returncode == 2
    assert "crashed (segmentation fault) on this model" in done.stdout


def test_a_step_that_takes_too_long_is_ended_and_left_out() -> None:
    started = time.monotonic()
    done = run(
        """
        def work():
            if guard.avoided(guard.RUN) is None:
                with guard.step(guard.RUN, 0.3):
                    while True:
                        pass
            print(guard.avoided(guard.RUN))
            return 0
        sys.exit(guard.contained(work, fail))
        """
    )
    assert done.returncode == 0
    assert "took more than 0 seconds" in done.stdout
    assert time.monotonic() - started < 20


def test_a_step_that_waits_for_ever_is_ended_too() -> None:
    done = run(
        """
        def work():
            if guard.avoided(guard.RUN) is None:
                with guard.step(guard.RUN, 0.2):
                    time.sleep(50)
            return 6
        sys.exit(guard.contained(work, fail))
        """
    )
    assert done.returncode == 6


def test_time_outside_a_step_is_not_limited() -> None:
    done = run(
        """
        def work():
            with guard.step(guard.RUN, 0.2):
                pass
            until = time.process_time() + 0.6
            while time.process_time() < until:
                pass
            return 5
        sys.exit(guard.contained(work, fail))
        """
    )
    assert done.returncode == 5


@pytest.mark.skipif(sys.platform != "linux", reason="memory is limited on Linux only")
def test_memory_is_limited_inside_the_block_and_not_after_it() -> None:
    done = run(
        """
        def work():
            try:
                with guard.memory(1 << 28):
                    bytearray(1 << 29)
            except MemoryError:
                bytearray(1 << 29)
                return 0
            return 1
        sys.exit(guard.contained(work, fail))
        """
    )
    assert done.returncode == 0


def test_temporary_files_of_a_crash_are_removed(tmp_path: Path) -> None:
    done = run(
        f"""
        import tempfile
        tempfile.tempdir = {str(tmp_path)!r}
        def work():
            tempfile.mkdtemp(prefix=guard.temporary_prefix())
            os.kill(os.getpid(), signal.SIGSEGV)
        sys.exit(guard.contained(work, fail))
        """
    )
    assert done.returncode == 2
    assert list(tmp_path.iterdir()) == []


_WAITS = """
def work():
    print(os.getpid(), flush=True)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(50)
    return 0
sys.exit(guard.contained(work, fail))
"""


def _start_waiting() -> tuple[subprocess.Popen[str], int]:
    started = subprocess.Popen(script(_WAITS), stdout=subprocess.PIPE, text=True)
    assert started.stdout is not None
    child = int(started.stdout.readline())
    time.sleep(0.2)
    return started, child


def _is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] not in "ZX"
    except OSError:
        return False


def test_a_second_signal_ends_what_does_not_listen() -> None:
    started, child = _start_waiting()
    started.send_signal(signal.SIGTERM)
    time.sleep(2 * guard.SAME_SIGNAL_SECONDS)
    assert started.poll() is None
    started.send_signal(signal.SIGTERM)
    assert started.wait(TIMEOUT) == guard.INTERRUPTED
    assert not _is_running(child)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells the child")
def test_the_child_ends_with_its_parent() -> None:
    started, child = _start_waiting()
    started.kill()
    started.wait(TIMEOUT)
    deadline = time.monotonic() + TIMEOUT
    while _is_running(child):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_without_a_guard_steps_only_run_their_block() -> None:
    assert not guard.is_guarded()
    with guard.step(guard.RUN, 0.0), guard.memory(0):
        assert guard.avoided(guard.RUN) is None


def _endless(path: Path) -> None:
    """A model with a loop that never ends beside a convolution that folds."""
    model = small.conv_bn_relu(8, batch=1)
    info = onnx.helper.make_tensor_value_info
    body = onnx.helper.make_graph(
        [
            onnx.helper.make_node("Identity", ["go_on"], ["still"]),
            onnx.helper.make_node("Add", ["sum", "sum"], ["next"]),
        ],
        "forever",
        [info("i", 7, []), info("go_on", 9, []), info("sum", 1, [1])],
        [info("still", 9, []), info("next", 1, [1])],
    )
    model.graph.initializer.extend(
        [
            onnx.helper.make_tensor("trips", onnx.TensorProto.INT64, [], [2**62]),
            onnx.helper.make_tensor("yes", onnx.TensorProto.BOOL, [], [True]),
            onnx.helper.make_tensor("state", onnx.TensorProto.FLOAT, [1], [0.0]),
        ]
    )
    model.graph.node.append(
        onnx.helper.make_node("Loop", ["trips", "yes", "state"], ["forever"], body=body)
    )
    model.graph.output.append(info("forever", 1, [1]))
    onnx.save(model, path)


def test_a_model_that_never_ends_is_folded_and_not_verified(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    _endless(path)
    out = tmp_path / "out.onnx"
    done = subprocess.run(
        [sys.executable, "-m", "graphfold", "optimize", str(path), "-o", str(out)],
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "not verified: onnxruntime, running the model, took more than 6 seconds" in done.stderr
    assert "BatchNormalization" not in {node.op_type for node in onnx.load(out).graph.node}


def test_a_model_that_needs_too_much_memory_is_not_verified(tmp_path: Path) -> None:
    node = onnx.helper.make_node("Resize", ["x", "", "scales"], ["y"])
    scales = onnx.numpy_helper.from_array(np.array([1, 1, 3e4, 3e4], "float32"), "scales")
    info = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [node], "g", [info("x", 1, [1, 1, 8, 8])], [info("y", 1, None)], [scales]
    )
    path = tmp_path / "model.onnx"
    onnx.save(
        onnx.helper.make_model(
            graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8
        ),
        path,
    )
    # A process counts the memory that its parent had when it was started: this one may have much.
    between = (
        "import os, subprocess, sys\n"
        "child = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL)\n"
        "_, status, usage = os.wait4(child.pid, 0)\n"
        "print(os.WEXITSTATUS(status), usage.ru_maxrss)"
    )
    command = [sys.executable, "-m", "graphfold", "optimize", str(path), "--dry-run"]
    found = subprocess.run(
        [sys.executable, "-c", between, *command], capture_output=True, text=True, check=True
    )
    code, kilobytes = map(int, found.stdout.split())
    assert code == 0
    assert "not verified: " in found.stderr
    assert kilobytes < 1 << 20

"""A command in a process of its own, so that native code that crashes costs one message.

onnxruntime, onnx's checker, its shape inference and protobuf are native code: a hostile model can
make them end the process (segmentation fault, abort, exhausted stack), take all memory, or never
return. So the command runs in a child that is forked before anything heavy is imported, and
names the *step* it is in on a page that both see. When the child dies in a step that the result
does not depend on, a new child does the command again without that step; the step's user says
what is then missing (no verification, no inferred shapes, a constant that is not computed). When
it dies elsewhere, one message is printed.

Where a process cannot fork (Windows) or has threads, and for the Python API, nothing is isolated:
`step` then only runs its block.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import shutil
import signal
import struct
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

CHECKER = "onnx's checker"
INFERENCE = "onnx's shape inference"
CONSTANTS = "onnxruntime, computing constants,"
RUN = "onnxruntime, running the model,"
MEASURE = "onnxruntime, measuring the model's sizes,"

INTERRUPTED = 130
# What verification on made-up inputs may take of a small model, and more per byte of its weights.
RUN_SECONDS = 6.0
RUN_SECONDS_PER_BYTE = 1e-6
RUN_BYTES = 1 << 30
INFERENCE_SECONDS_PER_NODE = 0.01
INFERENCE_BYTES = 1 << 29
RUN_BYTES_PER_BYTE = 12

# When the step began (wall and processor time), its limit, whether to repeat, its name.
_PAGE = struct.Struct("=ddd?64p")
# Other processes may take the processor: a step that does not compute has so many times longer.
_PATIENCE = 10
_TICK_SECONDS = 0.1
# A key press reaches the child twice: from the terminal, and handed on by the parent.
SAME_SIGNAL_SECONDS = 0.3
_PR_SET_PDEATHSIG = 1
_WHAT_ENDED_IT = {
    "SIGSEGV": "crashed (segmentation fault)",
    "SIGBUS": "crashed (bus error)",
    "SIGFPE": "crashed (arithmetic error)",
    "SIGILL": "crashed (illegal instruction)",
    "SIGABRT": "aborted",
    "SIGKILL": "was killed, perhaps for lack of memory",
}


@dataclass
class _Guard:
    """What parent and child share: the page, and steps that ended an earlier child."""

    page: mmap.mmap
    avoided: dict[str, str] = field(default_factory=dict)
    can_repeat: bool = True

    def tell(self, name: str, seconds: float) -> None:
        times = time.monotonic(), time.process_time(), seconds
        self.page[: _PAGE.size] = _PAGE.pack(*times, self.can_repeat, name.encode())

    def told(self) -> tuple[float, float, float, bool, str]:
        *times, can_repeat, name = _PAGE.unpack(self.page[: _PAGE.size])
        return (*times, can_repeat, name.decode())


_guard: _Guard | None = None


def is_guarded() -> bool:
    """Whether this process is the child that a parent watches."""
    return _guard is not None


def avoided(name: str) -> str | None:
    """Why a step is to be left out, as a clause: it ended an earlier attempt. Else None."""
    return None if _guard is None else _guard.avoided.get(name)


@contextlib.contextmanager
def step(name: str, seconds: float | None = None) -> Iterator[None]:
    """Say that what follows may crash or never return.

    Args:
        name: CHECKER, INFERENCE, CONSTANTS, RUN or MEASURE.
        seconds: of processor time, and of wall time, after which the process is ended and the step
            left out; None for no limit.
    """
    if _guard is None:
        yield
        return
    before = _guard.page[: _PAGE.size]
    _guard.tell(name, 0.0 if seconds is None else seconds)
    try:
        yield
    finally:
        _guard.page[: _PAGE.size] = before


def cannot_repeat() -> None:
    """Say that the command cannot start again: what it reads, or wrote, is gone."""
    if _guard is not None:
        *times, _, name = _guard.told()
        _guard.can_repeat = False
        _guard.page[: _PAGE.size] = _PAGE.pack(*times, False, name.encode())


@contextlib.contextmanager
def memory(extra: int) -> Iterator[None]:
    """Let the guarded process allocate only so many bytes more; Linux only.

    Beyond that, allocations fail, which numpy and onnxruntime report as errors.
    """
    current = _data_bytes()
    if _guard is None or current is None:
        yield
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    limit = current + extra
    for known in (soft, hard):
        limit = limit if known == resource.RLIM_INFINITY else min(limit, known)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def _data_bytes() -> int | None:
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[5])
    except (OSError, IndexError, ValueError):
        return None
    return pages * mmap.PAGESIZE


@contextlib.contextmanager
def inference(nodes: int) -> Iterator[None]:
    """A step of onnx's shape inference, which may fill the memory with an absurd shape."""
    with step(INFERENCE, RUN_SECONDS + INFERENCE_SECONDS_PER_NODE * nodes), memory(INFERENCE_BYTES):
        yield


def run_seconds(weights: int) -> float:
    """How long a model with so many bytes of weights may run on made-up inputs."""
    return RUN_SECONDS + RUN_SECONDS_PER_BYTE * weights


def run_bytes(weights: int) -> int:
    """How much a model with so many bytes of weights may allocate to run on made-up inputs."""
    return RUN_BYTES + RUN_BYTES_PER_BYTE * weights


# The parent -----------------------------------------------------------------------------------


def contained(work: Callable[[], int], fail: Callable[[str], int]) -> int:
    """Run a command in a child and return its exit code.

    Args:
        work: the command; its exceptions are its own business.
        fail: prints what ended the child and returns the exit code for it.
    """
    if not hasattr(os, "fork") or threading.active_count() > 1:
        return work()
    guard = _Guard(mmap.mmap(-1, mmap.PAGESIZE))
    while True:
        guard.tell("", 0.0)
        child = _Child(guard, work)
        status = child.wait()
        if child.interrupted:
            return INTERRUPTED
        if os.WIFEXITED(status):
            return os.WEXITSTATUS(status)
        _remove_temporary_files(child.pid)
        name = signal.Signals(os.WTERMSIG(status)).name
        if name in ("SIGINT", "SIGTERM", "SIGHUP"):
            return INTERRUPTED
        *_, can_repeat, where = guard.told()
        reason = _WHAT_ENDED_IT.get(name, f"was ended by {name}")
        if child.too_slow is not None:
            reason = f"took more than {child.too_slow:.0f} seconds"
        text = f"{where or 'the process'} {reason}"
        if not where or where == CHECKER or where in guard.avoided:
            return fail(f"{text} on this model")
        if not can_repeat:
            return fail(f"{text} on this model; as a file, it would be done again without that")
        guard.avoided[where] = text


class _Child:
    """A forked child that does the work, and the parent's handling of signals for it."""

    def __init__(self, guard: _Guard, work: Callable[[], int]) -> None:
        self.guard = guard
        self.interrupted = False
        self.too_slow: float | None = None
        self._killed = False
        self._first_signal: float | None = None
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.flush()
        watched = {signal.SIGINT, signal.SIGTERM, signal.SIGALRM}
        parent = os.getpid()
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, watched)
        self.pid = os.fork()
        if self.pid == 0:
            _be_child(guard, work, parent, mask)
        self._previous: dict[int, Any] = {}
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._previous[number] = signal.signal(number, self._hand_on)
        self._previous[signal.SIGALRM] = signal.signal(signal.SIGALRM, self._look)
        signal.setitimer(signal.ITIMER_REAL, _TICK_SECONDS, _TICK_SECONDS)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    def wait(self) -> int:
        """The child's wait status."""
        try:
            return os.waitpid(self.pid, 0)[1]
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            for number, handler in self._previous.items():
                signal.signal(number, handler)

    def _hand_on(self, number: int, frame: object) -> None:
        del frame
        now = time.monotonic()
        if self._first_signal is None:
            self._first_signal = now
            self._kill(number)
        elif now - self._first_signal > SAME_SIGNAL_SECONDS:
            # The child may be inside native code, where its own handlers do not run.
            self.interrupted = True
            self._kill(signal.SIGKILL)

    def _look(self, number: int, frame: object) -> None:
        del number, frame
        began, processor, seconds, *_ = self.guard.told()
        elapsed = time.monotonic() - began
        if not seconds or elapsed <= seconds or self.too_slow is not None:
            return
        used = _processor_seconds(self.pid)
        if used is None or used - processor > seconds or elapsed > _PATIENCE * seconds:
            self.too_slow = seconds
            self._kill(signal.SIGKILL)

    def _kill(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)


def _processor_seconds(pid: int) -> float | None:
    """What a process has used so far, of all its threads; None where that is not known."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):
        return None


def _be_child(guard: _Guard, work: Callable[[], int], parent: int, mask: Any) -> None:
    """Do the work and leave without the cleaning up that is the parent's."""
    global _guard
    code = 3
    try:
        _guard = guard
        _die_with(parent)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        code = work()
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
    except KeyboardInterrupt:
        code = INTERRUPTED
    except BrokenPipeError:
        pass
    finally:
        os._exit(code)


def _die_with(parent: int) -> None:
    """End this process when the parent is killed; Linux only."""
    if sys.platform != "linux":
        return
    import ctypes

    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(INTERRUPTED)


def temporary_prefix() -> str:
    """How the names of this process's temporary folders begin."""
    return f"graphfold-{os.getpid()}-"


def _remove_temporary_files(pid: int) -> None:
    for path in Path(tempfile.gettempdir()).glob(f"graphfold-{pid}-*"):
        shutil.rmtree(path, ignore_errors=True)

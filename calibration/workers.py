"""Damage measured in several processes at a time, the same in each as in one alone.

Everything is fitted in the calling process, for a sum depends on how many threads made it. Workers
get the arrays that were fitted, put them into their own copy of the network and judge it: what
onnxruntime computes does not depend on its threads.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from numpy.typing import NDArray

from graphfold.calibration.capture import Feeds, cores
from graphfold.calibration.context import Context
from graphfold.calibration.judge import Verdict
from graphfold.calibration.places import Key
from graphfold.calibration.workbench import Arrays, Replacement, Workbench
from graphfold.errors import GraphfoldError
from graphfold.guard import temporary_prefix

Change = tuple[Key, Replacement]
Done = Callable[[Sequence[Verdict]], None]
_Task = list[tuple[Key, Replacement, Arrays]]


class Judges(Protocol):
    """Who measures what changes do to a network, each change alone."""

    def submit(self, changes: Sequence[Change], done: Done) -> None:
        """Measure, sooner or later, and call `done` in this thread."""

    def finish(self) -> None:
        """Return when everything was measured."""


class Alone:
    """Measures at once, in this process."""

    def __init__(self, context: Context) -> None:
        self._context = context

    def submit(self, changes: Sequence[Change], done: Done) -> None:
        """Measure now."""
        done(_verdicts(self._context, changes))

    def finish(self) -> None:
        """Nothing is left to do."""


class Workers:
    """Measures in other processes; a context manager.

    Args:
        bench: the network and what is fitted for it.
        feeds: inputs to judge on.
        labels: of their samples, where known.
        jobs: processes.
        threads: of onnxruntime, all processes together; 0 for all cores.
    """

    def __init__(
        self, bench: Workbench, feeds: Feeds, labels: NDArray[Any] | None, jobs: int, threads: int
    ) -> None:
        from graphfold.model import save

        self._bench = bench
        self._jobs = jobs
        self._waiting: dict[Future[list[Verdict]], Done] = {}
        self._folder = tempfile.TemporaryDirectory(prefix=temporary_prefix())
        path = Path(self._folder.name) / "network.onnx"
        save(bench.model, path)
        self._before = set(multiprocessing.active_children())
        self._pool = ProcessPoolExecutor(
            jobs,
            # A fork would copy onnxruntime's threads as they stand.
            multiprocessing.get_context("spawn"),
            _begin,
            (path, list(feeds), labels, max(1, (threads or cores()) // jobs)),
        )

    def submit(self, changes: Sequence[Change], done: Done) -> None:
        """Hand changes to a worker; `done` is called by a later call of this or of `finish`."""
        task = [(*change, self._bench.arrays(*change)) for change in changes]
        with _told_of_the_dead():
            self._waiting[self._pool.submit(_measure, task)] = done
        # One task more than workers: nobody waits for the next, and arrays do not pile up.
        self._collect(self._jobs + 1)

    def finish(self) -> None:
        """Wait for all workers."""
        self._collect(0)

    def _collect(self, most: int) -> None:
        """Take results until so many tasks are left at most."""
        while len(self._waiting) > most:
            finished, _ = wait(self._waiting, return_when=FIRST_COMPLETED)
            for future in finished:
                done = self._waiting.pop(future)
                with _told_of_the_dead():
                    verdicts = future.result()
                done(verdicts)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        if kind is not None:
            for child in set(multiprocessing.active_children()) - self._before:
                child.terminate()
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._folder.cleanup()


@contextmanager
def _told_of_the_dead() -> Iterator[None]:
    from concurrent.futures.process import BrokenProcessPool

    try:
        yield
    except BrokenProcessPool as error:
        raise GraphfoldError(
            "a worker process ended, perhaps for lack of memory", hint="take fewer --jobs"
        ) from error


_context: Context | None = None


def _begin(path: Path, feeds: Feeds, labels: NDArray[Any] | None, threads: int) -> None:
    """In a worker: make ready for tasks."""
    from graphfold.model import load

    # Ctrl-C goes to all processes of a terminal: the calling one ends the others.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_the_caller, daemon=True).start()
    global _context
    _context = Context(Workbench(load(path)), feeds, labels, threads=threads)


def _end_with_the_caller() -> None:
    caller = multiprocessing.parent_process()
    if caller is not None:
        caller.join()
        os._exit(1)


def _measure(task: _Task) -> list[Verdict]:
    assert _context is not None
    for key, replacement, arrays in task:
        _context.bench.take(key, replacement, arrays)
    found = _verdicts(_context, [(key, replacement) for key, replacement, _ in task])
    _context.bench.forget()
    return found


def _verdicts(context: Context, changes: Sequence[Change]) -> list[Verdict]:
    return [
        tally.verdict()
        for tally in context.tallies({}, [dict([change]) for change in changes], None)
    ]

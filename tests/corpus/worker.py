"""Cases run in a process of their own: one that dies or hangs is a finding, not the end."""

from __future__ import annotations

import multiprocessing
import signal
import traceback
from multiprocessing.connection import Connection
from typing import Any

from corpus.cases import Case

SECONDS = 300.0


def _serve(pipe: Connection) -> None:
    """In the process: examine what arrives until nothing more does."""
    from corpus.examine import Outcome, examine

    # Interrupts are the parent's to handle.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    while (task := pipe.recv()) is not None:
        case, run = task
        try:
            outcome = examine(case, lambda stage: pipe.send(("stage", stage)), run=run)
        except Exception:  # noqa: BLE001 - whatever a model causes is what is looked for
            outcome = Outcome(case.name, case.part)
            outcome.problems.append("exception: " + traceback.format_exc(limit=-8).strip())
        pipe.send(("outcome", outcome))


class Worker:
    """A process that examines cases, started again after it died."""

    def __init__(self, seconds: float = SECONDS) -> None:
        self._seconds = seconds
        self._context = multiprocessing.get_context("spawn")
        self._process: Any = None
        self._pipe: Any = None

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *error: object) -> None:
        self._stop()

    def examine(self, case: Case) -> Any:
        """The case's Outcome."""
        outcome, stage = self._attempt(case, run=True)
        if outcome is None and stage == "input":
            # The input model itself ends or blocks the runtime: that is not our doing.
            outcome, stage = self._attempt(case, run=False)
        if outcome is None:
            from corpus.examine import Outcome

            outcome = Outcome(case.name, case.part)
            outcome.problems.append(f"the process died or hung at stage {stage!r}")
        return outcome

    def _attempt(self, case: Case, *, run: bool) -> tuple[Any, str]:
        self._start()
        stage = "start"
        self._pipe.send((case, run))
        try:
            while self._pipe.poll(self._seconds):
                kind, value = self._pipe.recv()
                if kind == "outcome":
                    return value, stage
                stage = value
        except (EOFError, ConnectionError):
            pass
        self._stop(kill=True)
        return None, stage

    def _start(self) -> None:
        if self._process is None or not self._process.is_alive():
            self._pipe, other = self._context.Pipe()
            self._process = self._context.Process(target=_serve, args=(other,), daemon=True)
            self._process.start()
            other.close()

    def _stop(self, *, kill: bool = False) -> None:
        if self._process is None:
            return
        if kill:
            self._process.kill()
        else:
            self._pipe.send(None)
        self._process.join()
        self._pipe.close()
        self._process = None

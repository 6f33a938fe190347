"""What stands between a command and the world: stdout, stderr, signals, and output paths."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import stat
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from graphfold import guard
from graphfold.errors import OutputError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from types import FrameType

    from rich.console import Console

    from graphfold.tables import Table

STDIO = "-"
INTERRUPTED = guard.INTERRUPTED
# Tables that nobody looks at in a terminal are as wide as they need to be.
_PIPED_WIDTH = 10_000


@contextlib.contextmanager
def reserved_stdout() -> Iterator[BinaryIO]:
    """The real stdout, while everything else that is written to stdout goes to stderr.

    Keeps `--json` and `-o -` clean whatever user code and native libraries print.

    Raises:
        OutputError: stdout is closed or cannot be written (full disk).
    """
    sys.stdout.flush()
    try:
        saved = os.dup(1)
    except OSError:
        raise OutputError("is closed", where="stdout") from None
    try:
        with contextlib.suppress(OSError):  # stderr closed: nothing to redirect to
            os.dup2(2, 1)
        stream = os.fdopen(os.dup(saved), "wb")
        try:
            # Where sys.stdout is not file descriptor 1 (notebooks, test runners).
            with contextlib.redirect_stdout(sys.stderr):
                yield stream
        finally:
            with _writing():
                stream.close()
    finally:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        os.dup2(saved, 1)
        os.close(saved)


@contextlib.contextmanager
def _writing() -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OutputError(f"cannot be written: {error.strerror}", where="stdout") from None


class Terminal:
    """Where one command writes: documents and tables to stdout, the rest to stderr.

    Args:
        stdout: the real stdout.
        as_json: one JSON document instead of tables.
        quiet: neither tables nor progress nor notes.
        tables_to_stderr: stdout carries a model.
    """

    def __init__(
        self,
        stdout: BinaryIO,
        *,
        as_json: bool = False,
        quiet: bool = False,
        tables_to_stderr: bool = False,
    ) -> None:
        self.stdout = stdout
        self.as_json = as_json
        self.quiet = quiet
        self._tables_to_stderr = tables_to_stderr
        self._line_length = 0

    def show(self, document: Callable[[], dict[str, Any]], tables: Sequence[Table]) -> None:
        """The command's result: as JSON, or as tables unless quiet."""
        if self.as_json:
            self.write(json.dumps(document(), indent=2, allow_nan=False).encode() + b"\n")
        elif not self.quiet:
            from graphfold.tables import print_table

            with self._console() as console:
                for table in tables:
                    print_table(table, console)

    def write(self, data: bytes) -> None:
        """Bytes to stdout.

        Raises:
            OutputError: stdout cannot be written.
            BrokenPipeError: its reader is gone.
        """
        with _writing():
            self.stdout.write(data)
            self.stdout.flush()

    @contextlib.contextmanager
    def _console(self) -> Iterator[Console]:
        from rich.console import Console

        if self._tables_to_stderr:
            yield Console(stderr=True, width=None if sys.stderr.isatty() else _PIPED_WIDTH)
            return
        is_terminal = self.stdout.isatty()
        file = os.fdopen(os.dup(self.stdout.fileno()), "w", encoding="utf-8", errors="replace")
        with _writing(), file:
            yield Console(file=file, width=None if is_terminal else _PIPED_WIDTH)

    def note(self, text: str) -> None:
        """A line on stderr that `--quiet` silences."""
        if not self.quiet:
            self._end_progress()
            print(f"graphfold: {text}", file=sys.stderr)

    def warn(self, text: str) -> None:
        """A warning on stderr; `--quiet` leaves it."""
        self._end_progress()
        print(f"graphfold: warning: {text}", file=sys.stderr)

    def progress(self, stage: str, done: int, total: int) -> None:
        """One line that is rewritten, on a terminal only."""
        if self.quiet or not sys.stderr.isatty():
            return
        text = f"{stage} ({done}/{total})" if total else stage
        print(f"\r{text.ljust(self._line_length)}", end="", file=sys.stderr, flush=True)
        self._line_length = len(text)

    def _end_progress(self) -> None:
        if self._line_length:
            print(f"\r{' ' * self._line_length}\r", end="", file=sys.stderr, flush=True)
            self._line_length = 0

    def close(self) -> None:
        """Clear the progress line."""
        self._end_progress()


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Let SIGTERM interrupt like SIGINT; a second signal ends the process at once.

    Signals that the parent had ignored (`nohup`, background jobs) stay ignored; outside the main
    thread nothing changes.
    """
    first: float | None = None

    def interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal first
        del number, frame
        now = time.monotonic()
        if first is None:
            first = now
            raise KeyboardInterrupt
        if now - first > guard.SAME_SIGNAL_SECONDS:
            os._exit(INTERRUPTED)

    previous: dict[signal.Signals, Any] = {}
    if threading.current_thread() is threading.main_thread():
        for item in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(item) is not signal.SIG_IGN:
                previous[item] = signal.signal(item, interrupt)
    try:
        yield
    finally:
        for item, handler in previous.items():
            signal.signal(item, handler)


# Paths ----------------------------------------------------------------------------------------


def read_stdin() -> bytes:
    """The model on stdin.

    Raises:
        UsageError: stdin is a terminal.
    """
    if sys.stdin is None or sys.stdin.isatty():
        raise UsageError("MODEL is -, but stdin is a terminal", hint="pipe a model into it")
    guard.cannot_repeat()
    return sys.stdin.buffer.read()


def check_output(path: Path, *, inputs: Sequence[Path], option: str) -> None:
    """Refuse an output that cannot be written, before any work is done.

    Args:
        path: where the output is to go.
        inputs: files that must survive.
        option: what the user gave it with, for messages.

    Raises:
        OutputError: a folder, in no folder, or in one that cannot be written to.
        UsageError: the same file as an input.
    """
    if path.is_dir():
        raise OutputError("is a folder, not a file", where=str(path), hint=f"see {option}")
    for item in inputs:
        if path.exists() and item.exists() and path.samefile(item):
            raise UsageError(
                f"{option} is the input itself", where=str(path), hint="--in-place overwrites it"
            )
    if is_device(path):
        return
    folder = path.parent
    if not folder.is_dir():
        what = "is no folder" if folder.exists() else "no such folder"
        raise OutputError(what, where=str(folder), hint=f"see {option}")
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=f".{path.name[:40]}."):
            pass
    except OSError as error:
        raise OutputError(f"cannot be written: {error.strerror}", where=str(path)) from None


def is_device(path: Path) -> bool:
    """A device or pipe: written to as it is, never replaced by a file."""
    try:
        mode = path.stat().st_mode
    except OSError:
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all.

    Raises:
        OutputError: it cannot be written.
    """
    try:
        if is_device(path):
            path.write_text(text, encoding="utf-8")
            return
        with tempfile.NamedTemporaryFile(
            "w", dir=path.parent, prefix=f".{path.name[:40]}.", encoding="utf-8", delete=False
        ) as file:
            temporary = Path(file.name)
            try:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
                temporary.chmod(0o666 & ~_umask())
                temporary.replace(path)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise
    except OSError as error:
        raise OutputError(f"cannot be written: {error.strerror}", where=str(path)) from None


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask

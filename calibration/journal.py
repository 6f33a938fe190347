"""What has been measured so far, on disk after every step, so that a killed run continues.

One JSON document per line: first what is measured and how, then the measurements. A line is
complete or it does not count: the last one of a killed run is cut off.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Self

from graphfold.errors import UsageError
from graphfold.files import output_error


class Journal:
    """A file of measurements that grows line by line; a context manager.

    Args:
        path: where it is; None keeps nothing.
        header: what is measured and how; an earlier journal with another one is not continued.

    Attributes:
        entries: by key, those of an earlier run included.

    Raises:
        UsageError: the file is of another model, or of other settings.
        OutputError: the file cannot be written.
    """

    def __init__(self, path: Path | None, header: Mapping[str, Any]) -> None:
        self.path = path
        self.entries: dict[str, Any] = {}
        self._file: BinaryIO | None = None
        if path is None:
            return
        try:
            self._open(path, json.loads(json.dumps(header)))
        except OSError as error:
            raise output_error(error, path) from error

    def _open(self, path: Path, header: Mapping[str, Any]) -> None:
        self._file = path.open("a+b")
        _lock(self._file, path)
        self._file.seek(0)
        text = self._file.read()
        whole = text[: text.rfind(b"\n") + 1]
        self._file.truncate(len(whole))
        lines = list(_documents(whole, path))
        if not lines:
            self._write(header)
            return
        if lines[0] != header:
            self.close()
            raise _not_continued(path, lines[0], header)
        for line in lines[1:]:
            self.entries.update(line)

    def add(self, measurements: Mapping[str, Any]) -> None:
        """Keep measurements, by key; they are on disk together when this returns.

        Raises:
            OutputError: the file cannot be written.
        """
        self.entries.update(measurements)
        if self._file is None:
            return
        try:
            self._write(measurements)
        except OSError as error:
            raise output_error(error, self.path or "") from error

    def _write(self, document: Mapping[str, Any]) -> None:
        assert self._file is not None
        self._file.write(json.dumps(document).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def remove(self) -> None:
        """Delete the file: what was measured is in the table now."""
        self.close()
        if self.path is not None:
            self.path.unlink(missing_ok=True)

    def close(self) -> None:
        """Close the file; it stays."""
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()
            self._file = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _lock(file: BinaryIO, path: Path) -> None:
    """Keep others off the journal while this process lives, where the system can."""
    try:
        import fcntl
    except ImportError:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise UsageError(
            "another run is writing it", where=str(path), hint="wait for it, or stop it"
        ) from None


def _documents(text: bytes, path: Path) -> Iterator[dict[str, Any]]:
    for line in text.splitlines():
        try:
            document = json.loads(line)
        except ValueError:
            document = None
        if not isinstance(document, dict):
            raise UsageError("is no journal of measurements", where=str(path), hint="delete it")
        yield document


def _not_continued(path: Path, old: Mapping[str, Any], new: Mapping[str, Any]) -> UsageError:
    names = [name for name in new if old.get(name) != new[name]] or ["header"]
    details = ", ".join(f"{name} {old.get(name)!r}, now {new.get(name)!r}" for name in names)
    return UsageError(
        f"holds measurements that were begun otherwise: {details}",
        where=str(path),
        hint="go on with the same model and options, or delete it to begin anew",
    )

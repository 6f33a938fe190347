"""Files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from graphfold.errors import OutputError

CHUNK_BYTES = 1 << 22

_HINTS = {
    errno.ENOSPC: "free some space or write to another disk",
    errno.EDQUOT: "the disk quota is used up: write to another disk",
    errno.EACCES: "choose a folder you may write to",
    errno.EPERM: "choose a folder you may write to",
    errno.EROFS: "choose a folder you may write to",
    errno.ENOENT: "create the folder first",
    errno.ENOTDIR: "a part of the path is a file",
    errno.EISDIR: "give a file name",
    errno.ENAMETOOLONG: "choose a shorter name",
}


@contextlib.contextmanager
def atomic_file(path: str | Path) -> Iterator[BinaryIO]:
    """Open a new file that takes the place of `path` when the block ends without an exception.

    The bytes are on disk before the name changes (fsync of file and folder). Where the system can,
    the file has no name until then, so not even a killed process leaves anything behind;
    elsewhere it is a hidden file in the same folder, removed on any exception. A symbolic link is
    followed: what it points to is replaced. A replaced file's permissions are kept, a new file's
    follow the umask.

    Raises:
        OutputError: the file cannot be written; nothing is left and an old file is untouched.
    """
    try:
        pending = PendingFile(path)
        with pending:
            yield pending.file
            pending.publish(pending.target)
    except OSError as error:
        raise output_error(error, path) from error


def output_error(error: OSError, path: str | Path) -> OutputError:
    """Return the error to show for a failed write of `path`."""
    if error.errno == errno.ENOENT:
        what = f"cannot be written: there is no folder {Path(path).parent}"
    else:
        what = f"cannot be written: {(error.strerror or str(error)).lower()}"
    return OutputError(what, where=str(path), hint=_HINTS.get(error.errno or 0))


class PendingFile:
    """A file being written beside `path`, named only by `publish`; a context manager.

    Args:
        path: where the file is meant to go; its folder holds the temporary file.

    Attributes:
        target: `path` with symbolic links followed.
        file: the open binary file.

    Raises:
        OSError: as the system says; leaving the context always removes what is unpublished.
    """

    def __init__(self, path: str | Path) -> None:
        self.target = Path(os.path.realpath(path))
        if self.target.is_dir():
            raise IsADirectoryError(errno.EISDIR, "Is a directory", str(path))
        self._temporary: Path | None = None
        self.file: BinaryIO = os.fdopen(self._open(), "wb")

    def _open(self) -> int:
        with contextlib.suppress(OSError, AttributeError):
            descriptor = os.open(self.target.parent, os.O_TMPFILE | os.O_WRONLY, 0o666)
            if Path(f"/proc/self/fd/{descriptor}").exists():
                return descriptor
            os.close(descriptor)
        temporary = self._spare_name()
        descriptor = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
        self._temporary = temporary
        return descriptor

    def _spare_name(self) -> Path:
        return self.target.with_name(f".{self.target.name[:100]}.{secrets.token_hex(6)}.tmp")

    def __enter__(self) -> PendingFile:
        return self

    def __exit__(self, *_: object) -> None:
        # An error of close (a delayed ENOSPC) matters only before publish, which syncs first.
        with contextlib.suppress(OSError):
            self.file.close()
        if self._temporary is not None:
            self._temporary.unlink(missing_ok=True)

    def publish(self, target: Path) -> None:
        """Put the bytes on disk and give the file its name, replacing what had it."""
        self.file.flush()
        descriptor = self.file.fileno()
        with contextlib.suppress(FileNotFoundError):
            os.fchmod(descriptor, stat.S_IMODE(target.stat().st_mode))
        os.fsync(descriptor)
        if self._temporary is None:
            # An unnamed file can be linked to a free name only, so it takes one on its way.
            self._temporary = self._spare_name()
            # `src_dir_fd` means nothing beside an absolute path; it makes Python follow the link.
            source = f"/proc/self/fd/{descriptor}"
            os.link(source, self._temporary, src_dir_fd=descriptor, follow_symlinks=True)
        self._temporary.replace(target)
        self._temporary = None
        _sync_folder(target.parent)


def _sync_folder(folder: Path) -> None:
    """Make a rename durable; some file systems cannot sync folders and need not."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def update_with_file(hasher: hashlib._Hash, path: str | Path) -> None:
    """Add a file's bytes to a hash without holding them in memory."""
    with Path(path).open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            hasher.update(chunk)

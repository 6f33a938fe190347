"""Where a training stands, on disk: whole or not at all, and only continued as it was begun."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from graphfold.errors import UsageError
from graphfold.files import atomic_file

_FORMAT = "graphfold training 1"


class Checkpoint:
    """A file with the state of one training.

    Args:
        path: where it is; None keeps nothing.
        header: what is trained and how, as JSON; a file with another one is not continued.
    """

    def __init__(self, path: Path | None, header: Mapping[str, Any]) -> None:
        self.path = path
        self._header = json.loads(json.dumps(header))

    def save(self, state: Mapping[str, Any]) -> None:
        """Replace the file: tensors, numbers, texts, lists and mappings of them.

        Raises:
            OutputError: it cannot be written; the last one is untouched.
        """
        if self.path is None:
            return
        buffer = io.BytesIO()
        torch.save({"format": _FORMAT, "header": self._header, "state": dict(state)}, buffer)
        with atomic_file(self.path) as file:
            file.write(buffer.getbuffer())

    def load(self) -> dict[str, Any] | None:
        """The state that was saved last, None where there is no file.

        Raises:
            UsageError: the file is no checkpoint, or of a training that was begun otherwise.
        """
        if self.path is None or not self.path.exists():
            return None
        where = str(self.path)
        try:
            found = torch.load(self.path, map_location="cpu", weights_only=True)
            known = found["format"] == _FORMAT
        except Exception:  # noqa: BLE001 - torch raises many types on files that are not its own
            known = False
        if not known:
            raise UsageError("is no checkpoint of a training", where=where, hint="delete it")
        old: dict[str, Any] = found["header"]
        if old != self._header:
            details = ", ".join(_differences(old, self._header))
            raise UsageError(
                f"was begun otherwise: {details}",
                where=where,
                hint="go on with the same model, data and options, or delete it to begin anew",
            )
        state: dict[str, Any] = found["state"]
        return state

    def remove(self) -> None:
        """Delete the file: the training is over."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)


def _differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    found = []
    for name in dict.fromkeys([*old, *new]):
        before, after = old.get(name), new.get(name)
        if isinstance(before, dict) and isinstance(after, dict):
            found += _differences(before, after, f"{prefix}{name}.")
        elif before != after:
            found.append(f"{prefix}{name} {before!r}, now {after!r}")
    return found

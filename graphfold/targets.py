"""The files that `optimize` writes: refused early, written whole, the model last."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from graphfold.errors import ModelError, OutputError, UsageError
from graphfold.terminal import STDIO, Terminal, check_output, is_device, write_text

if TYPE_CHECKING:
    from graphfold.model import Model
    from graphfold.report import Report


@dataclass(frozen=True)
class Targets:
    """Where `optimize` writes, checked before the work and written after it.

    Attributes:
        model: the input as the user gave it, - for stdin.
        given: the output as the user gave it, - for stdout, None for the default.
        in_place: the output replaces the input.
        reference: where the reference network goes, if anywhere.
        report: where the HTML report goes, if anywhere.
        external_data: auto, always or never.
        dry_run: nothing is written.
    """

    model: str
    given: str | None
    in_place: bool = False
    reference: Path | None = None
    report: Path | None = None
    external_data: str = "auto"
    dry_run: bool = False

    @property
    def to_stdout(self) -> bool:
        """Whether the model goes to stdout."""
        return self.given == STDIO

    @property
    def path(self) -> Path:
        """The output file."""
        if self.in_place:
            return Path(self.model)
        if self.given is not None:
            return Path(self.given)
        source = Path(self.model)
        return source.with_name(f"{source.stem}.folded.onnx")

    @property
    def written_name(self) -> str | None:
        """What the report names as output."""
        if self.dry_run:
            return None
        return STDIO if self.to_stdout else str(self.path)

    def check(self) -> None:
        """Refuse contradictions and unwritable outputs.

        Raises:
            UsageError, OutputError: see `graphfold.terminal.check_output`.
        """
        if self.external_data not in ("auto", "always", "never"):
            raise UsageError(
                f"--external-data {self.external_data!r}", hint="one of auto, always, never"
            )
        if self.in_place and self.given is not None:
            raise UsageError("--in-place contradicts --output")
        if self.in_place and self.model == STDIO:
            raise UsageError("--in-place needs a file, MODEL is -")
        if self.model == STDIO and self.given is None and not self.dry_run:
            raise UsageError("MODEL is -: where to write?", hint="give -o FILE or -o -")
        if self.to_stdout and self.external_data == "always":
            raise UsageError("-o - cannot carry external data")
        if self.to_stdout and not self.dry_run and sys.stdout.isatty():
            raise UsageError("-o -: a model is nothing for a terminal", hint="pipe it somewhere")
        inputs = [] if self.model == STDIO else [Path(self.model)]
        for path in inputs:
            if not path.exists():
                raise ModelError("no such file", where=str(path))
            if path.is_dir():
                raise ModelError("is a directory, not a model", where=str(path))
        if not self.dry_run:
            self._check_paths(inputs)

    def _check_paths(self, inputs: list[Path]) -> None:
        wanted: list[tuple[Path, str]] = []
        if not self.to_stdout:
            wanted.append((self.path, "--output"))
        if self.reference is not None:
            wanted.append((self.reference, "--reference-out"))
        if self.report is not None:
            wanted.append((self.report, "--report"))
        seen: dict[Path, str] = {}
        for path, option in wanted:
            is_overwrite = self.in_place and option == "--output"
            check_output(path, inputs=[] if is_overwrite else inputs, option=option)
            if (other := seen.setdefault(path.resolve(), option)) != option and not is_device(path):
                raise UsageError(f"{other} and {option} are the same file", where=str(path))

    def write(self, folded: Model, reference: Model, report: Report, terminal: Terminal) -> None:
        """Write everything that was asked for, the model last; nothing in a dry run."""
        if self.dry_run:
            return
        written: list[Path] = []
        try:
            if self.report is not None:
                written += _new(self.report)
                write_text(self.report, report.to_html())
            if self.reference is not None:
                written += _new(self.reference)
                self._write_model(reference, self.reference)
            if self.to_stdout:
                terminal.write(_serialized(folded))
            else:
                self._write_model(folded, self.path)
        except BrokenPipeError:
            raise OutputError("was closed before the model was written", where="stdout") from None
        except BaseException:
            for path in written:
                path.unlink(missing_ok=True)
            raise

    def _write_model(self, model: Model, path: Path) -> None:
        from graphfold.model import save

        if is_device(path):
            try:
                path.write_bytes(_serialized(model))
            except OSError as error:
                what = f"cannot be written: {error.strerror}"
                raise OutputError(what, where=str(path)) from None
            return
        save(model, path, external_data=self.external_data)  # type: ignore[arg-type]


def _new(path: Path) -> list[Path]:
    """The path, where nothing stands there yet: what is to be removed again on failure."""
    return [] if path.exists() else [path]


def _serialized(model: Model) -> bytes:
    from graphfold.model import to_proto

    try:
        data: bytes = to_proto(model).SerializeToString(deterministic=True)
    except ValueError:
        raise OutputError(
            "a model over 2 GB cannot go through a pipe", hint="write it to a file"
        ) from None
    return data

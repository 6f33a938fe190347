"""One hierarchy of errors: each says what is wrong, where, and what to do about it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


class GraphfoldError(Exception):
    """A problem the user can act on; `exit_code` is what the command line returns for it.

    Args:
        what: the problem, as one sentence.
        where: the file, tensor or JSON path it concerns.
        hint: what to do about it.
    """

    exit_code = 2

    def __init__(self, what: str, *, where: str | None = None, hint: str | None = None) -> None:
        self.what = what
        self.where = where
        self.hint = hint
        super().__init__(str(self))

    def __str__(self) -> str:
        text = f"{self.where}: {self.what}" if self.where else self.what
        return f"{text} ({self.hint})" if self.hint else text


class UsageError(GraphfoldError):
    """Options that contradict each other or name something that does not exist."""


class ModelError(GraphfoldError):
    """A model that cannot be read, is not valid ONNX, or lacks what is asked of it."""


class OutputError(GraphfoldError):
    """An output that cannot be written: permission, full disk, or a path that is no file."""


class DataError(GraphfoldError):
    """Calibration or verification data that does not fit the model."""


# A table of another model is wrong in every row: more lines tell nothing more.
_SHOWN_PROBLEMS = 20


@dataclass(frozen=True)
class Problem:
    """One problem of a file: the path it stands at, what is wrong, what would be right."""

    path: str
    what: str
    hint: str | None = None

    def __str__(self) -> str:
        return f"{self.path}: {self.what}" + (f" ({self.hint})" if self.hint else "")


class ProblemsError(GraphfoldError):
    """Several problems of one input, listed at once, each with its path."""

    subject = "input"

    def __init__(self, problems: Sequence[Problem], *, where: str | None = None) -> None:
        self.problems = tuple(problems)
        if len(self.problems) == 1:
            what = str(self.problems[0])
        else:
            shown = self.problems[:_SHOWN_PROBLEMS]
            lines = [f"\n  {problem}" for problem in shown]
            if len(shown) < len(self.problems):
                lines.append(f"\n  and {len(self.problems) - len(shown)} more")
            what = f"{len(self.problems)} problems in the {self.subject}:{''.join(lines)}"
        super().__init__(what, where=where)


class PlanError(ProblemsError):
    """A plan that is malformed, does not fit the model, or asks for a merge that is not equal.

    All problems are listed at once, each with its JSON path.
    """

    subject = "plan"


class MeasuresError(ProblemsError):
    """A table of latencies or importances that is malformed or does not fit model or other table.

    All problems are listed at once, each with its row.
    """

    subject = "table"


class BudgetError(GraphfoldError):
    """A budget that no choice of segments meets."""

    exit_code = 1


class NotExactError(GraphfoldError):
    """Two affine convolutions that no single convolution equals; carries the reason.

    `boundary_that_works` is "hoist" where moving all padding to the first convolution would
    make a single convolution equal, otherwise None.
    """

    def __init__(self, what: str, *, boundary_that_works: str | None = None) -> None:
        self.boundary_that_works = boundary_that_works
        super().__init__(what)


class VerificationError(GraphfoldError):
    """The folded network differs from the reference network by more than the tolerance."""

    exit_code = 1

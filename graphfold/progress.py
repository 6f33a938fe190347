"""How callers are told where a long piece of work stands."""

from __future__ import annotations

from collections.abc import Callable

# Called with the stage, how much of it is done, and how much there is: 0 where nobody knows.
Progress = Callable[[str, int, int], None]


def no_progress(stage: str, done: int, total: int) -> None:
    """Nobody wants to be told."""
    del stage, done, total

"""The pass manager: what it counts, when it stops, and that it does stop."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import pytest
from builders import ModelBuilder, make_work

import graphfold.rewrite as rewrite
from graphfold.rewrite import Pass, Phase, Work, run_passes


@dataclass(frozen=True)
class Restless(Pass):
    """A pass that always finds something to do."""

    name: ClassVar[str] = "restless"
    phase: ClassVar[Phase] = Phase.FOLD
    order: ClassVar[int] = 0

    def find(self, work: Work) -> Iterable[str]:
        del work
        return ["y"]

    def label(self, candidate: str) -> str:
        return candidate

    def rewrite(self, work: Work, candidate: str) -> None:
        del work, candidate


@dataclass(frozen=True)
class Once(Restless):
    """A pass that refuses after its first rewrite."""

    name: ClassVar[str] = "once"
    done: ClassVar[list[str]] = []

    def check(self, work: Work, candidate: str) -> str | None:
        del work
        return "it was done" if candidate in self.done else None

    def rewrite(self, work: Work, candidate: str) -> None:
        del work
        self.done.append(candidate)


def work() -> Work:
    build = ModelBuilder([1, 2, 4, 4])
    return make_work(build.model(build.op("Relu", "x", out="y")))


def test_a_pass_that_never_settles_is_an_error_and_no_endless_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(rewrite, "_MOST_SWEEPS", 20)
    with pytest.raises(RuntimeError, match="the pass restless does not settle"):
        run_passes([Restless()], Phase.FOLD, work())


def test_a_pass_runs_to_its_fixed_point_and_keeps_the_reason_of_what_is_left() -> None:
    Once.done.clear()
    (found,) = run_passes([Once()], Phase.FOLD, work())
    assert (found.applied, found.found) == (1, 2)
    assert [(skip.site, skip.reason) for skip in found.skipped] == [("y", "it was done")]


def test_passes_of_the_other_phase_do_not_run() -> None:
    Once.done.clear()
    assert run_passes([Once()], Phase.PLAN, work()) == []
    assert not Once.done

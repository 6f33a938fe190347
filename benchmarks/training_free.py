"""Compression without training: agreement at given speedups, in float and in INT8.

Calibrated on imagenet_sample without its labels, judged on nips17_eval, which nothing is fitted on.
Speedups are over the float model as onnxruntime runs it, one thread, interleaved in one run with
it. Beside what `auto` finds: the same speedup by merging with activations merely removed (planned
with importance `macs`), and by dropping blocks alone.

Run it as `python benchmarks/training_free.py` on a machine that does nothing else, and with
`--study sizes ridge unseen` for what the defaults rest on; `--only MODEL` for one of the two.
"""

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import common
import numpy as np
import shared_data
from scipy import stats

import graphfold
from graphfold.calibration import workbench
from graphfold.calibration.capture import run_part
from graphfold.calibration.context import Context
from graphfold.calibration.dataset import Dataset, read_dataset
from graphfold.calibration.explore import Exploration, Option, Route
from graphfold.calibration.judge import Judge, Verdict
from graphfold.calibration.planned import quantized_as
from graphfold.calibration.workbench import State
from graphfold.errors import BudgetError
from graphfold.model import Model, adopt, load, to_proto
from graphfold.specs import model_inputs

COMMAND = "python benchmarks/training_free.py"
MODELS = {
    "efficientnet_lite0_bn": ("imagenet_lite", "nips_lite"),
    "mobilenetv2_tv_bn": ("imagenet_mobilenet", "nips_mobilenet"),
}
FLOAT = (1.1, 1.2, 1.3, 1.5, 2.0)
# Over plain INT8: 2.0x, 2.2x, 2.5x and 3.0x over float where plain INT8 reaches 1.85x.
INT8 = (1.08, 1.2, 1.35, 1.6)
_CALIBRATED_ON = 128
# Where the studies look: most of the network is still there, and there is something to lose.
STUDIED = 1.2


@dataclass
class Judged:
    """The photos that judge, and what the model says of them."""

    feeds: list[dict[str, Any]]
    judge: Judge

    def verdict(self, proto: Any) -> Verdict:
        """Of another network."""
        run = run_part(proto, 0)
        return self.judge.verdict([run(feed) for feed in self.feeds])


def data(name: str, model: Model, limit: int | None = None) -> Dataset:
    """One of the shared sets of photos, for a model."""
    return read_dataset(f"shared_data:{name}", model_inputs(model), limit=limit)


def judged(model: Model, name: str) -> Judged:
    """The photos that judge."""
    batches = list(data(name, model).batches(10))
    feeds = [dict(batch.feed) for batch in batches]
    labels = np.concatenate([batch.labels for batch in batches if batch.labels is not None])
    run = run_part(to_proto(model), 0)
    return Judged(feeds, Judge([run(feed) for feed in feeds], labels))


def built(explored: Exploration, option: Option) -> Any:
    """An option's network with everything that is fitted now."""
    proto = explored.bench.build(option.state)
    if option.quantize is None:
        return proto
    feeds = explored.feeds[:: max(1, 10 * len(explored.feeds) // _CALIBRATED_ON)]
    return to_proto(quantized_as(adopt(proto, check=False), feeds, option.quantize))


def reached(route: Route, targets: Sequence[float]) -> dict[float, Option | None]:
    """The option of a route for each target."""
    found = {}
    for target in targets:
        started = time.monotonic()
        found[target] = route.reach(target)
        print(f"{target:.2f}x: {_shown(found[target])}, {time.monotonic() - started:.0f} s")
    return found


def _shown(option: Option | None) -> str:
    if option is None:
        return "not reached"
    agreement = option.verdict.agreement or 0.0
    return f"{option.speedup:.2f}x at {100 * agreement:.1f} % of held-back images"


def merely_removed(model: Model, table: Any, speedup: float, photos: Judged) -> Verdict | None:
    """Merging with activations removed and nothing fitted, at a speedup."""
    try:
        plan = graphfold.make_plan(
            model, latency=table, importance="macs", speedup=speedup, confirm=True
        ).plan
    except BudgetError:
        return None
    return photos.verdict(to_proto(graphfold.optimize(model, plan, verify=False).folded))


def run(name: str, samples: int | None) -> dict[str, Any]:
    """All figures of one model."""
    calibration, judging = MODELS[name]
    model = load(shared_data.SHARED / "models" / f"{name}.onnx")
    photos = judged(model, judging)
    started = time.monotonic()
    explored = Exploration(model, data(calibration, model, samples))
    explored.fit()
    route = explored.float_route()
    floats = reached(route, FLOAT)
    float_seconds = time.monotonic() - started
    int8_route = explored.int8_route()
    plain = int8_route.options[0]
    print("plain INT8:", _shown(plain))
    int8s = reached(int8_route, [plain.speedup * factor for factor in INT8])
    seconds = time.monotonic() - started
    explored.families = ("identity",)
    dropped = reached(explored.float_route(), FLOAT)
    table = graphfold.profile(model).table
    prediction = predicted(explored, route)
    explored.fit(everything=True)
    original = photos.verdict(to_proto(model))
    rows = []
    for target, option in floats.items():
        rows.append(
            {
                "dtype": "float32",
                "asked": target,
                **_figures(explored, photos, option),
                "removed": _agreement(merely_removed(model, table, target, photos)),
                "dropped": _agreement(_judged(explored, photos, dropped[target])),
            }
        )
    rows.append({"dtype": "int8", "asked": plain.speedup, **_figures(explored, photos, plain)})
    for target, option in int8s.items():
        rows.append({"dtype": "int8", "asked": target, **_figures(explored, photos, option)})
    return {
        "model": name,
        "accuracy": original.accuracy,
        "samples": explored.settings["samples"],
        "seconds": {"float": float_seconds, "float and INT8": seconds, **explored.seconds},
        "quantize": plain.quantize.model_dump(mode="json") if plain.quantize else None,
        "rows": rows,
        "prediction": prediction,
    }


def _judged(explored: Exploration, photos: Judged, option: Option | None) -> Verdict | None:
    return None if option is None else photos.verdict(built(explored, option))


def _agreement(verdict: Verdict | None) -> float | None:
    return None if verdict is None else verdict.agreement


def _figures(explored: Exploration, photos: Judged, option: Option | None) -> dict[str, Any]:
    verdict = _judged(explored, photos, option)
    if option is None or verdict is None:
        return {}
    print(f"  {option.dtype} {option.speedup:.2f}x: {verdict.to_json()}")
    return {
        "speedup": option.speedup,
        "held_back": option.verdict.agreement,
        **verdict.to_json(),
        "narrowed": sum(each.family == "narrow" for each in option.state.values()),
        "blocks_dropped": sum(each.family == "identity" for each in option.state.values()),
    }


def predicted(explored: Exploration, route: Route) -> dict[str, Any]:
    """Damage of whole networks: what singles sum up to, what steps predicted, what was measured."""
    options = route.options[1:]
    changes = sorted({item for each in options for item in each.state.items()}, key=str)
    singles = dict(
        zip(changes, explored.context.damages({}, [dict([item]) for item in changes]), strict=True)
    )
    summed = [sum(singles[item] for item in each.state.items()) for each in options]
    steps = [each.predicted_damage or 0.0 for each in options]
    measured = [each.verdict.damage for each in options]
    return {
        "speedups": [each.speedup for each in options],
        "measured": measured,
        "summed": summed,
        "in_context": steps,
        "rank_correlation": {
            "summed": float(stats.spearmanr(summed, measured).statistic),
            "in_context": float(stats.spearmanr(steps, measured).statistic),
        },
        "ratio_at_the_end": {
            "summed": measured[-1] / summed[-1],
            "in_context": measured[-1] / steps[-1],
        },
    }


# Studies: what the defaults rest on ------------------------------------------------------------


def studies(name: str, kinds: Sequence[str]) -> dict[str, Any]:
    """The network that a search finds at 1.2x, fitted again in several ways."""
    calibration, judging = MODELS[name]
    model = load(shared_data.SHARED / "models" / f"{name}.onnx")
    photos = judged(model, judging)
    explored = Exploration(model, data(calibration, model))
    explored.fit()
    option = explored.float_route().reach(STUDIED)
    if option is None:
        raise SystemExit(f"{name} has no network of {STUDIED} times the speed to study")
    state = option.state
    found = {}
    if "sizes" in kinds:
        found["photos"] = {
            str(size): _fitted_row(
                Exploration(model, data(calibration, model, size)), state, photos
            )
            for size in (50, 100, 200, 500, 1000)
        }
    if "ridge" in kinds:
        present = workbench.RIDGE
        found["ridge"] = {}
        for ridge in (1e-5, 1e-4, 1e-3, 1e-2, 1e-1):
            workbench.RIDGE = ridge
            found["ridge"][f"{ridge:g}"] = _fitted_row(explored, state, photos)
        workbench.RIDGE = present
    if "unseen" in kinds:
        found["classes"] = _unseen(model, name, state)
    return found


def _fitted_row(explored: Exploration, state: State, photos: Judged) -> dict[str, Any]:
    explored.fit(everything=True)
    row = photos.verdict(explored.bench.build(state)).to_json()
    print(f"  {row}", flush=True)
    return row


def _unseen(model: Model, name: str, state: State) -> dict[str, Any]:
    """Fitted on one half of the classes, judged on the other and on the same, and the reverse."""
    preprocess = "lite" if "lite" in name else "imagenet"
    halves = []
    for split in (0, 1):
        photos = list(shared_data.photos("imagenet_sample", preprocess, split=split))
        halves.append(
            [
                {"input": np.concatenate([each["input"] for each in photos[start : start + 10]])}
                for start in range(0, len(photos), 10)
            ]
        )
    found = {}
    bench = workbench.Workbench(
        graphfold.optimize(model, verify=False).folded, workbench.names_of(model)
    )
    for fitted in (0, 1):
        bench.forget()
        bench.collect(halves[fitted][: len(halves[fitted]) * 4 // 5])
        for judging, what in ((fitted, "same classes"), (1 - fitted, "other classes")):
            context = Context(bench, halves[judging][len(halves[judging]) * 4 // 5 :])
            row = context.verdict(state).to_json()
            print(f"  {row}", flush=True)
            found[f"fitted on half {fitted}, {what}"] = row
    return found


# Results ---------------------------------------------------------------------------------------


def table(result: dict[str, Any]) -> str:
    """The rows of one model as Markdown."""
    columns = [
        "asked", "speedup", "agreement", "top-1", "worst class", "held back", "merely removed",
        "blocks dropped",
    ]  # fmt: skip
    rows = [
        [
            f"{row['dtype']} {row['asked']:.2f}x",
            f"{row['speedup']:.2f}x" if "speedup" in row else "-",
            *(
                _percent(row.get(key))
                for key in (
                    "agreement",
                    "accuracy",
                    "worst_agreement",
                    "held_back",
                    "removed",
                    "dropped",
                )
            ),
        ]
        for row in result["rows"]
    ]
    return common.markdown(columns, rows)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"


def written() -> dict[str, Any]:
    """What was measured before."""
    path = common.RESULTS / "training_free.json"
    return json.loads(path.read_text())["models"] if path.exists() else {}


def report(models: dict[str, Any]) -> None:
    """Write everything that is known."""
    parts = []
    for name, result in models.items():
        if "rows" in result:
            prediction = result["prediction"]
            correlation, ratio = prediction["rank_correlation"], prediction["ratio_at_the_end"]
            parts += [
                f"## {name}, top-1 {_percent(result['accuracy'])}",
                "",
                table(result),
                "",
                f"{result['samples']} photos to calibrate on. Search and fits took "
                f"{result['seconds']['float']:.0f} s in float and "
                f"{result['seconds']['float and INT8']:.0f} s with INT8.",
                "",
                "Predicted against measured damage of the networks on the way: rank correlation "
                f"{correlation['summed']:.3f} for sums of single damages, "
                f"{correlation['in_context']:.3f} step by step in context; at the far end the "
                f"measured damage is {ratio['summed']:.1f} times the sum and "
                f"{ratio['in_context']:.2f} times the step's prediction.",
                "",
            ]
        for kind, rows in result.get("studies", {}).items():
            columns = [kind, "agreement", "KL"]
            parts += [
                f"### {name} at {STUDIED}x: {kind}",
                "",
                common.markdown(
                    columns,
                    [
                        [key, _percent(row["agreement"]), f"{row['damage']:.4f}"]
                        for key, row in rows.items()
                    ],
                ),
                "",
            ]
    intro = (
        "Agreement with the float model's first class, and top-1, on nips17_eval (500 photos, "
        "nothing fitted on them); calibrated on imagenet_sample without labels. One thread."
    )
    body = "\n".join([intro, "", *parts]).rstrip()
    common.write("training_free", "Compression without training", COMMAND, body, {"models": models})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--samples", type=int, help="calibrate on the first of them")
    parser.add_argument("--study", nargs="+", choices=["sizes", "unseen", "ridge"])
    arguments = parser.parse_args()
    models = written()
    for name in arguments.only:
        known = models.setdefault(name, {"model": name})
        if arguments.study is not None:
            known.setdefault("studies", {}).update(studies(name, arguments.study))
        else:
            models[name] = {**known, **run(name, arguments.samples)}
        report(models)


if __name__ == "__main__":
    main()

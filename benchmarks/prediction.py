"""Whether a latency table tells the truth: predicted against measured speedup of folded networks.

For each network: its table by `graphfold profile`, ten plans across the frontier (importance:
the number of activations and convolutions that stay), and all folded networks measured against
the original in one interleaved run.

Run it as `python benchmarks/prediction.py` on a machine that does nothing else.
"""

import argparse
import statistics
from pathlib import Path

import common

from graphfold.assembly import assemble_plan
from graphfold.calibration.latency import compare
from graphfold.calibration.profile import Profile, profile_model
from graphfold.layout import Layout
from graphfold.methods import Pieces
from graphfold.model import Model, load
from graphfold.optimizer import optimize_model
from graphfold.planner import prepare
from graphfold.solver import Frontier, Solution

COMMAND = "python benchmarks/prediction.py"
MODELS = {
    "MobileNetV2-1.0": "mobilenetv2_tv_bn.onnx",
    "EfficientNet-Lite0": "efficientnet_lite0_bn.onnx",
}
PLANS = 10


def across(frontier: Frontier[Pieces], count: int) -> list[Solution[Pieces]]:
    """Solutions spread evenly in latency from the fastest up; the original is not among them."""
    low, high = float(frontier.latency[0]), float(frontier.latency[-1])
    targets = [low + (high - low) * index / count for index in range(count)]
    chosen = {min(range(len(frontier) - 1), key=lambda i: abs(frontier.latency[i] - t))
              for t in targets}  # fmt: skip
    return [frontier[index] for index in sorted(chosen)]


def folded(model: Model, solution: Solution[Pieces], layout: Layout) -> Model:
    plan = assemble_plan(solution, layout, boundary="hoist")
    return optimize_model(model, plan, verify=False).folded


def one_by_one(profile: Profile, latency: float) -> float:
    """The speedup that latencies predict without the factor from a whole folded network."""
    covered = (profile.whole - profile.table.rest) / profile.scale
    rest = max(0.0, profile.whole - covered)
    return (covered + rest) / (latency / profile.scale + rest)


def examine(model: Model, profile: Profile, seconds: float, rounds: int) -> list[dict[str, float]]:
    """Predicted and measured speedups of plans across the frontier."""
    latencies = profile.table
    planning = prepare(model, latencies, "uniform")
    solutions = across(planning.frontier, PLANS)
    networks = [folded(model, solution, planning.cuts.layout) for solution in solutions]
    measured = compare([model, *networks], rounds=rounds, seconds=seconds)
    found = []
    for solution, result in zip(solutions, measured.models[1:], strict=True):
        latency = solution.latency + latencies.rest
        predicted = profile.whole / latency
        found.append(
            {
                "segments": sum(not row.unchanged for rows in solution.choices for row in rows),
                "predicted_ms": latency,
                "predicted": predicted,
                "measured_ms": result.median,
                "measured": result.speedup,
                "measured_spread": result.speedup_spread,
                "error": predicted / result.speedup - 1,
                "error_one_by_one": one_by_one(profile, solution.latency) / result.speedup - 1,
            }
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", type=Path, default=common.ROOT.parent / "shared" / "models")
    parser.add_argument("--seconds", type=float, default=25.0)
    parser.add_argument("--rounds", type=int, default=25)
    options = parser.parse_args()
    parts, data = [], []
    for name, file in MODELS.items():
        model = load(options.models / file)
        profile = profile_model(model)
        found = examine(model, profile, options.seconds, options.rounds)
        errors = [abs(item["error"]) for item in found]
        rows = [
            [
                str(item["segments"]),
                f"{item['predicted_ms']:.2f}",
                f"{item['predicted']:.3f}x",
                f"{item['measured']:.3f}x",
                f"{100 * item['measured_spread']:.1f} %",
                f"{100 * item['error']:+.1f} %",
                f"{100 * item['error_one_by_one']:+.1f} %",
            ]
            for item in found
        ]
        columns = ["segments changed", "predicted ms", "predicted", "measured", "its spread",
                   "error", "without factor"]  # fmt: skip
        parts += [
            f"## {name}",
            f"{profile.whole:.2f} ms, {len(profile.table.rows)} rows, {profile.distinct} different "
            f"operators, factor {profile.scale:.3f}; error "
            f"{100 * statistics.median(errors):.1f} % in the median, "
            f"{100 * max(errors):.1f} % at worst.",
            common.markdown(columns, rows),
        ]
        data.append({"model": name, "whole_ms": profile.whole, "rest_ms": profile.table.rest,
                     "scale": profile.scale,
                     "warnings": profile.warnings, "plans": found})  # fmt: skip
    parts.append(
        "Speedups over the original, one thread, importance `uniform`, merges with hoisted "
        "padding. The original and all folded networks are measured in one interleaved run. "
        '"Without factor" is the error of the same latencies without the factor that one folded '
        "network sets."
    )
    common.write(
        "prediction",
        "Predicted and measured speedup",
        COMMAND,
        "\n\n".join(parts),
        {"models": data},
    )


if __name__ == "__main__":
    main()

"""What an exactly repaired border costs: the folded network under each repair, side by side.

Folds MobileNetV2-1.0 and EfficientNet-Lite0 with every block but the first merged and measures,
interleaved in one run at one thread: the original, `hoist` (nothing to repair), and `exact` under
each border repair. Also Lite0 with `merge: cheaper`, since its 5x5 blocks cost more merged.

Run it as `python benchmarks/border_repair.py`.
"""

import argparse
from typing import Any

import common
from zoo import exported

import graphfold
from graphfold.emit import REPAIRS
from graphfold.model import Model, load

NETWORKS = {"mobilenet_v2_1.0": 17, "efficientnet_lite0": 16}
COMMAND = "python benchmarks/border_repair.py"


def variants(name: str, blocks: int) -> dict[str, Model]:
    """The original and its folded forms."""
    # Static sizes: only then are all four repairs possible.
    source = exported(name, exporter="torchscript", opset=17)
    short: dict[str, Any] = {"graphfold_plan": 1, "keep_blocks": [1] + [0] * (blocks - 1)}
    found = {"original": load(source)}
    for activation in (None, "Relu6"):
        plan = short | {"activation": activation}
        label = "" if activation is None else f", {activation} after each"
        found[f"hoist{label}"] = fold(source, plan | {"boundary": "hoist"})
        for repair in REPAIRS:
            found[f"exact, {repair}{label}"] = fold(source, plan, border_repair=repair)
    found["exact, merge: cheaper"] = fold(source, short | {"merge": "cheaper"})
    return found


def fold(source: Any, plan: dict[str, Any], **options: Any) -> Model:
    """The verified folded network."""
    return graphfold.optimize(source, plan, **options).folded


def main() -> None:
    """Measure both networks and write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=60.0, help="per network")
    seconds = parser.parse_args().seconds
    rows, data = [], {}
    for name, blocks in NETWORKS.items():
        models = variants(name, blocks)
        measured = graphfold.bench(
            list(models.values()),
            names=list(models),
            input_shapes={"": (1, 3, 224, 224)},
            rounds=60,
            seconds=seconds,
        )
        data[name] = measured.to_json()
        speedups = {item.name: item.speedup for item in measured.models}
        for item in measured.models:
            hoist = "hoist, Relu6 after each" if "Relu6" in item.name else "hoist"
            extra = f"{100 * (speedups[hoist] / item.speedup - 1):+.1f} %"
            shown = extra if item.name.startswith("exact, ") and "cheaper" not in item.name else ""
            rows.append(
                [name, item.name, f"{item.speedup:.2f}x", f"{100 * item.spread:.0f} %", shown]
            )
    columns = ["network", "folded", "speedup", "spread", "time over hoist"]
    title = "Speedup of folded networks, and what border repairs cost"
    common.write("border_repair", title, COMMAND, common.markdown(columns, rows), data)


if __name__ == "__main__":
    main()

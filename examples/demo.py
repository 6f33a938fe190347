"""EfficientNet-Lite0 with its ImageNet weights, made shallower by a published plan, end to end.

Exports the network, folds it by DepthShrinker's mask A with `graphfold optimize`, and measures
the files with `graphfold bench`. Mask A also removes 5x5 blocks, which cost more as one dense
convolution; so it is folded twice, as published and with `merge: cheaper`, which means the same
network and leaves those blocks unmerged. Nothing is trained, so this shows speed, sizes and that
each fold is exact; the accuracy of mask A comes only with fine-tuning.

Run it as `python examples/demo.py`; it ends by printing the files.
"""

import argparse
import shlex
import subprocess
import sys
from pathlib import Path

from export import export, summary
from plans import PLANS, keep_blocks, to_json
from zoo import network

NETWORK, MASK = "efficientnet_lite0", "A"


def graphfold(*arguments: str | Path) -> None:
    """Echo a graphfold command, then run it; leaves with its exit code if it fails."""
    words = [str(argument) for argument in arguments]
    print(f"\n$ graphfold {shlex.join(words)}", flush=True)
    code = subprocess.run([sys.executable, "-m", "graphfold", *words], check=False).returncode
    if code:
        sys.exit(code)


def main() -> None:
    """Export, fold, measure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=Path("out"), help="where to write")
    folder: Path = parser.parse_args().folder
    original = folder / f"{NETWORK}.onnx"
    folded = folder / f"{NETWORK}.folded.onnx"
    cheaper = folder / f"{NETWORK}.cheaper.onnx"
    plan = PLANS / f"{NETWORK}_{MASK}.json"
    cheaper_plan = folder / f"{NETWORK}_{MASK}_cheaper.json"

    print(f"exporting {original} ...", flush=True)
    print(summary(export(network(NETWORK), original)), flush=True)
    graphfold("optimize", original, "--plan", _short(plan), "-o", folded)
    cheaper_plan.write_text(to_json(keep_blocks(NETWORK, MASK) | {"merge": "cheaper"}))
    graphfold("optimize", original, "--plan", cheaper_plan, "-o", cheaper)
    graphfold("bench", original, folded, cheaper)
    for path in (original, folded, cheaper):
        print(f"{path}  {path.stat().st_size / 1e6:.1f} MB")


def _short(path: Path) -> Path:
    """`path` as it is typed from the current folder, where it lies below it."""
    here = Path.cwd()
    return path.resolve().relative_to(here) if path.resolve().is_relative_to(here) else path


if __name__ == "__main__":
    main()

"""How far repair brings a compressed network back, per processor time.

    python benchmarks/repair.py compressed.onnx --original original.onnx --steps 600

trains on ../shared's calibration photos and judges on its other photos before, on the way and
after. Counts processor seconds beside wall time: ten minutes on two quiet cores are 1,200 of them.
"""

import argparse
import resource
import time
from pathlib import Path
from typing import Any

import numpy as np
import shared_data
from common import markdown, write
from numpy.typing import NDArray

from graphfold.calibration.capture import run_part
from graphfold.calibration.judge import Judge
from graphfold.calibration.repair import repair
from graphfold.model import Model, load, save, to_proto


def photos(source: str) -> tuple[NDArray[Any], NDArray[Any]]:
    """Images and labels of one of the shared data sets."""
    samples = list(getattr(shared_data, source)())
    images = np.stack([np.squeeze(each["input"]) for each in samples])
    return images, np.concatenate([each["labels"] for each in samples])


def answers(model: Model, images: NDArray[Any], threads: int) -> list[dict[str, NDArray[Any]]]:
    """Outputs of a model, image by image."""
    run = run_part(to_proto(model), threads)
    (name,) = (item.name for item in model.ir.graph.inputs if not item.is_initializer())
    return [run({name or "": image[None]}) for image in images]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("network", type=Path, nargs="+")
    parser.add_argument("--original", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--preprocess", choices=("lite", "mobilenet"), default="lite")
    parser.add_argument("--output", type=Path, help="folder for the repaired networks")
    parser.add_argument("--name", default="repair", help="of the results")
    options = parser.parse_args()
    original = load(options.original)
    train, _ = photos(f"imagenet_{options.preprocess}")
    images, labels = photos(f"nips_{options.preprocess}")
    judge = Judge(answers(original, images, options.threads), labels)
    (name,) = (item.name for item in original.ir.graph.inputs if not item.is_initializer())
    rows, data = [], []
    for path in options.network:
        network = load(path)
        started, processor = time.perf_counter(), time.process_time()
        found = repair(
            network,
            original,
            [{name or "": train}],
            minutes=options.minutes,
            steps=options.steps,
            threads=options.threads,
        )
        seconds = time.perf_counter() - started
        processor = time.process_time() - processor
        before, after = (
            judge.verdict(answers(each, images, options.threads)) for each in (network, found.model)
        )
        if options.output is not None:
            save(found.model, options.output / path.name)
        figures = [
            *(f"{100 * (each.agreement or 0):.1f} %" for each in (before, after)),
            *(f"{100 * (each.accuracy or 0):.1f} %" for each in (before, after)),
            *(f"{each.damage:.3f}" for each in (before, after)),
            *(f"{100 * (each.agreement or 0):.1f} %" for each in (found.before, found.after)),
            "yes" if found.kept else "no",
            str(found.steps),
            f"{processor:.0f}",
            f"{seconds:.0f}",
        ]
        rows.append([path.stem, *figures])
        data.append(
            {
                "network": path.stem,
                "before": before.to_json(),
                "after": after.to_json(),
                "repair": found.to_json(),
                "processor_seconds": processor,
                "seconds": seconds,
                "peak_kilobytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
            }
        )
        print(*rows[-1], flush=True)
    columns = [
        *("network", "agreement before", "after", "top-1 before", "after", "KL before", "after"),
        *("held back before", "after", "kept", "steps", "processor s", "wall s"),
    ]
    command = f"python benchmarks/repair.py NETWORK --original ORIGINAL --threads {options.threads}"
    command += f" --minutes {options.minutes:g}"
    command += "" if options.steps is None else f" --steps {options.steps}"
    title = "Repair by distillation: unlabelled calibration photos, judged on other photos"
    write(options.name, title, command, markdown(columns, rows), {"rows": data})


if __name__ == "__main__":
    main()

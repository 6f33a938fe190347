"""Peak memory of `graphfold optimize` on a model over 2 GB, in a process of its own.

The model is a chain of Conv-BatchNormalization-Relu with its weights in a data file; every weight
is folded, so the result is a data file of the same size. Accepted without verification: 1.3 times
the model and 300 MB. With `--verify` the same is measured with the comparison in onnxruntime.

Run it as `python benchmarks/memory.py`; it writes the model and its result to a temporary folder.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import common
import numpy as np
import onnx
from onnx import TensorProto, helper

COMMAND = "python benchmarks/memory.py"
CHANNELS = 1024
SIZE = 8
MB = 1e6
FACTOR, ROOM = 1.3, 300 * MB


def write_model(folder: Path, blocks: int) -> tuple[Path, int]:
    """Write a model of so many blocks, 38 MB each; returns its path and its bytes."""
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((CHANNELS, CHANNELS, 3, 3)) / np.sqrt(9 * CHANNELS)
    nodes, tensors, value, offset = [], [], "x", 0
    with (folder / "weights.bin").open("wb") as file:
        for number in range(blocks):
            arrays = {f"weight_{number}": weight + 1e-4 * number}
            for name in ("scale", "shift", "mean", "variance"):
                arrays[f"{name}_{number}"] = rng.uniform(0.5, 1.0, CHANNELS)
            for name, array in arrays.items():
                raw = array.astype(np.float32).tobytes()
                file.write(raw)
                tensor = onnx.TensorProto(name=name, data_type=TensorProto.FLOAT, dims=array.shape)
                tensor.data_location = TensorProto.EXTERNAL
                place = {"location": "weights.bin", "offset": offset, "length": len(raw)}
                for key, found in place.items():
                    tensor.external_data.add(key=key, value=str(found))
                tensors.append(tensor)
                offset += len(raw)
            first, *statistics = arrays
            conv, norm, out = (f"{kind}_{number}" for kind in ("conv", "norm", "out"))
            nodes.append(
                helper.make_node("Conv", [value, first], [conv], pads=[1] * 4, kernel_shape=[3, 3])
            )
            nodes.append(helper.make_node("BatchNormalization", [conv, *statistics], [norm]))
            nodes.append(helper.make_node("Relu", [norm], [out]))
            value = out
    shape = [1, CHANNELS, SIZE, SIZE]
    interface = (
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)] for name in ("x", value)
    )
    model = helper.make_model(
        helper.make_graph(nodes, "large", *interface, tensors),
        opset_imports=[helper.make_opsetid("", 17)],
        ir_version=8,
    )
    path = folder / "model.onnx"
    onnx.save(model, path)
    return path, offset


def peak_of(command: list[str]) -> tuple[int, float]:
    """Largest resident size in bytes, and seconds, of a command; it must succeed."""
    code = (
        "import json, resource, subprocess, sys\n"
        "subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL)\n"
        "print(json.dumps(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss))"
    )
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", code, *command], check=True, capture_output=True, text=True
    )
    unit = 1 if sys.platform == "darwin" else 1024
    return json.loads(done.stdout) * unit, time.perf_counter() - started


def measure(folder: Path, blocks: int, *options: str) -> dict[str, float]:
    """Peak memory of one run on a model of so many blocks."""
    path, size = write_model(folder, blocks)
    command = [sys.executable, "-m", "graphfold", "optimize", str(path), "--quiet"]
    peak, seconds = peak_of([*command, "-o", str(folder / "out.onnx"), *options])
    return {"model_bytes": size, "peak_bytes": peak, "ratio": peak / size, "seconds": seconds}


def main() -> None:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--blocks", type=int, default=64)
    parser.add_argument("--verify", action="store_true", help="measure with verification as well")
    arguments = parser.parse_args()
    runs = {"without verification": ["--no-verify"]}
    if arguments.verify:
        runs["with verification"] = []
    rows, data = [], {}
    for name, options in runs.items():
        with tempfile.TemporaryDirectory() as folder:
            found = measure(Path(folder), arguments.blocks, *options)
        accepted = FACTOR * found["model_bytes"] + ROOM
        data[name] = found
        rows.append(
            [
                name,
                f"{found['model_bytes'] / MB:,.0f} MB",
                f"{found['peak_bytes'] / MB:,.0f} MB",
                f"{found['ratio']:.2f}",
                f"{accepted / MB:,.0f} MB" if options else "",
                f"{found['seconds']:.0f} s",
            ]
        )
    columns = ["run", "model", "peak memory", "peak / model", "accepted", "time"]
    common.write("memory", "Peak memory", COMMAND, common.markdown(columns, rows), data)


if __name__ == "__main__":
    main()

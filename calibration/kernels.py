"""Times of operators as they are inside a network, from onnxruntime's profiler.

A session of one convolution alone is not what stands in a network: it pays for the change to the
blocked layout that its neighbours share, and its weights never leave the cache. So many snippets
are timed in one session, each behind a cheap convolution that hands it its input as a network
would and before a pool that takes its output, and only its own kernels are counted, with those
changes of layout that it causes itself. Kernels that the runtime fuses with the operator before
(the Add of a residual block, an activation) are counted as what they add to that operator.
"""

from __future__ import annotations

import json
import math
import re
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from graphfold.calibration.snippets import Snippet, Tensor, maker, random_weight
from graphfold.runtime import Runnable, Session

if TYPE_CHECKING:
    from graphfold.model import Model

_HALF_MICROSECOND = 0.0005
_OWN = re.compile(r"(?:^|/)part(\d+)/(own|front|back)/")


class Batch:
    """Several snippets in one model, to be run and profiled together.

    Args:
        snippets: what to time.
        opsets: versions of operator sets.
    """

    def __init__(self, snippets: Sequence[Snippet], opsets: Mapping[str, int]) -> None:
        self._snippets = snippets
        self._nodes: list[onnx.NodeProto] = []
        self._constants: list[onnx.TensorProto] = []
        self._inputs: dict[str, Tensor] = {}
        self._outputs: list[onnx.ValueInfoProto] = []
        for number, snippet in enumerate(snippets):
            self._add(f"part{number}", snippet)
        graph = helper.make_graph(
            self._nodes,
            "snippets",
            [_info(item) for item in self._inputs.values()],
            self._outputs,
            self._constants,
        )
        imports = [helper.make_opsetid(*item) for item in opsets.items()]
        self.proto = helper.make_model(graph, opset_imports=imports, ir_version=8)

    def feed(self) -> dict[str, NDArray[Any]]:
        """Random values for its inputs."""
        return {item.name: random_weight(item, item.name) for item in self._inputs.values()}

    def _add(self, part: str, snippet: Snippet) -> None:
        # Of what is fused with the operator before, the two are counted together.
        role = "own" if snippet.is_fusible else "front"
        names = {"": ""}
        for index, item in enumerate(snippet.inputs):
            names[item.name] = self._source(f"{part}/{role}/in{index}", item, snippet.at_input)
        for item in snippet.weights:
            name = f"{part}/{item.name}"
            names[item.name] = self._constant(name, random_weight(item, name))
        for name, value in snippet.settings.items():
            names[name] = self._constant(f"{part}/{name}", value)
        for index, node in enumerate(snippet.nodes):
            copy = onnx.NodeProto()
            copy.CopyFrom(node)
            copy.name = f"{part}/own/node{index}"
            del copy.input[:]
            del copy.output[:]
            copy.input.extend(names[name] for name in node.input)
            for name in node.output:
                names.setdefault(name, f"{part}/own/{name}" if name else "")
            copy.output.extend(names[name] for name in node.output)
            self._nodes.append(copy)
        self._take(part, names[snippet.output.name], snippet)

    def _constant(self, name: str, value: NDArray[Any]) -> str:
        self._constants.append(numpy_helper.from_array(value, name))
        return name

    def _source(self, name: str, tensor: Tensor, at_input: bool) -> str:
        """What a snippet reads: an input of the model, or made of one by a convolution."""
        if at_input or not tensor.is_image:
            return self._input(tensor)
        few = self._input(maker(tensor).inputs[0])
        weight = random_weight(maker(tensor).weights[0], name)
        constant = self._constant(f"{name}/w", weight)
        self._nodes.append(
            helper.make_node("Conv", [few, constant], [name], f"{name}/conv", kernel_shape=[1, 1])
        )
        return name

    def _input(self, tensor: Tensor) -> str:
        name = f"in{tensor.dtype}x" + "x".join(map(str, tensor.shape))
        self._inputs.setdefault(name, Tensor(name, tensor.dtype, tensor.shape))
        return name

    def _take(self, part: str, name: str, snippet: Snippet) -> None:
        tensor = snippet.output
        if snippet.at_output or not tensor.is_image:
            self._outputs.append(_info(Tensor(name, tensor.dtype, tensor.shape)))
            return
        pooled = f"{part}/back/out"
        self._nodes.append(
            helper.make_node("GlobalAveragePool", [name], [pooled], f"{part}/back/pool")
        )
        shape = (*tensor.shape[:2], 1, 1)
        self._outputs.append(_info(Tensor(pooled, tensor.dtype, shape)))


def _info(tensor: Tensor) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(tensor.name, tensor.dtype, tensor.shape)


class Profiled:
    """A session whose kernels the runtime times; a context manager.

    Args:
        model: what to run.
        threads: intra-op threads.
        provider: execution provider.

    Raises:
        RunError: onnxruntime cannot load it.
    """

    def __init__(self, model: Model | bytes, *, threads: int, provider: str) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="graphfold-")
        with Runnable(model) as runnable:
            self.session = Session(
                runnable,
                optimize=True,
                threads=threads,
                provider=provider,
                profile=str(Path(self._folder.name) / "profile"),
            )

    def runs(self) -> list[list[Mapping[str, Any]]]:
        """End it: the trace events of the kernels of every run."""
        events = json.loads(self.session.end_profiling().read_text(encoding="utf-8"))
        return list(kernels_of_runs(events))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._folder.cleanup()


def kernels_of_runs(
    events: Iterable[Mapping[str, Any]],
) -> Iterator[list[Mapping[str, Any]]]:
    """The kernels of every run in order of time, from onnxruntime's trace events."""
    found: list[Mapping[str, Any]] = []
    for event in events:
        if event.get("cat") == "Node" and str(event.get("name")).endswith("_kernel_time"):
            found.append(event)
        elif event.get("name") == "model_run":
            yield sorted(found, key=lambda item: item["ts"])
            found = []


def all_kernels(runs: Sequence[Sequence[Mapping[str, Any]]]) -> float:
    """Milliseconds of all kernels of a network, each in its own undisturbed runs.

    The sum of such times is what snippets' times, found in the same way, are to be compared
    with: on a machine that is never quiet for a whole run, a run's time is larger than the sum.
    """
    times: defaultdict[str, list[float]] = defaultdict(list)
    for run in runs:
        for event in run:
            times[str(event["name"])].append(milliseconds(event))
    return sum(undisturbed(values) for values in times.values())


def milliseconds(event: Mapping[str, Any]) -> float:
    """A kernel's duration, which comes cut to whole microseconds."""
    return float(event["dur"]) / 1000 + _HALF_MICROSECOND


def own_kernels(events: Sequence[Mapping[str, Any]]) -> dict[int, float]:
    """Milliseconds of every snippet's own kernels in one run of a batch, by number.

    A change of layout belongs to the snippet whose tensor it changes: of what was computed last,
    or what is computed next.
    """
    parts = [_OWN.search(str(event["name"])) for event in events]
    times: defaultdict[int, float] = defaultdict(float)
    for index, event in enumerate(events):
        part = parts[index]
        if part is None:
            # ReorderOutput follows what made the tensor, any other comes before what reads it.
            if event["args"].get("op_name") == "ReorderOutput":
                part, foreign = _nearest(parts, index, -1), "back"
            else:
                part, foreign = _nearest(parts, index, 1), "front"
        else:
            foreign = "" if part[2] == "own" else part[2]
        if part is not None and part[2] != foreign:
            times[int(part[1])] += milliseconds(event)
    return dict(times)


def _nearest(parts: Sequence[re.Match[str] | None], index: int, step: int) -> re.Match[str] | None:
    index += step
    while 0 <= index < len(parts):
        if parts[index] is not None:
            return parts[index]
        index += step
    return None


def undisturbed(values: Sequence[float]) -> float:
    """Mean of the quicker values, without the very quickest.

    What else the machine does only adds time, and to a long run more surely than to a short one,
    so a median over disturbed rounds would make short kernels look short beside a whole network.
    A mean is finer than the clock's ticks.
    """
    ordered = np.sort(np.asarray(values, dtype=np.float64))
    low, high = len(ordered) // 20, max(1, math.ceil(len(ordered) * 0.4))
    return float(ordered[low:high].mean())


def interquartile_range(values: Sequence[float]) -> float:
    """The difference of the quartiles."""
    low, high = np.percentile(values, [25, 75])
    return float(high - low)

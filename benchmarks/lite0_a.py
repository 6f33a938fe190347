"""DepthShrinker's EfficientNet-Lite0-A without training: how far fits alone bring it.

The paper's mask removes the activations of blocks 0, 1, 4, 6, 7, 9 and 10. Here a convolution
fitted on 500 unlabelled photos stands in the place of each, and what is judged are the 500 photos
of the other 500 classes, and the reverse.

    python benchmarks/lite0_a.py            # all ways
    python benchmarks/lite0_a.py --way best # one of them again, beside what is known

The ways build on one another: every fit by itself (`weights: regress`, what `optimize` does); each
fitted on what the network before it has become; the blocks that stay refitted as well, their last
layers or all of them; blocks 0 and 1, two linear ones in a row, as one convolution.
"""

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import shared_data
from common import RESULTS, ROOT, markdown, write
from numpy.typing import NDArray
from onnx import helper, numpy_helper

import graphfold
from graphfold.calibration.capture import (
    Window,
    choose_places,
    extract,
    patches,
    run_part,
    tensor_types,
    window_of,
)
from graphfold.calibration.judge import Judge
from graphfold.calibration.regression import Matrix, Moments, fit_linear
from graphfold.graph import Graph
from graphfold.model import load, to_proto

MODEL = shared_data.SHARED / "models" / "efficientnet_lite0_bn.onnx"
PLAN = ROOT / "examples" / "plans" / "efficientnet_lite0_A.json"
REMOVED = (0, 1, 4, 6, 7, 9, 10)
COMMAND = "python benchmarks/lite0_a.py"
THE_MODEL = "the model"
MERELY_REMOVED = "activations merely removed"
_BATCH = 10
_THREADS = 1
# Positions of every image: for dense convolutions, layers of one pixel, and filters of a channel.
_POSITIONS = {"dense": 98, "pointwise": 48, "depthwise": 16}
# Of a feature's power: what fits from few rows per feature need to hold on other images.
_DENSE_RIDGE = 0.3
_REFIT_RIDGE = 6.0
# A channel that can hardly be predicted is not blown up any further.
_LARGEST_SCALE = 3.0

Array = NDArray[np.float32]
Tensors = list[Array]


@dataclass(frozen=True)
class Way:
    """How the network is fitted.

    Attributes:
        what: for the table.
        kernels: of removed blocks, where not that of the block's own depthwise convolution.
        together: blocks 0 and 1 become one convolution.
        in_turn: fits see the network as it has become.
        refits: of the blocks that stay: none, last (layers) or all; and the head.
        restore: how far what is refitted gets the variance back that least squares takes, 0 to 1.
    """

    what: str
    kernels: dict[int, int] = field(default_factory=dict)
    together: bool = False
    in_turn: bool = True
    refits: str = "none"
    restore: float = 0.0


_SMALL = {4: 3, 9: 3, 10: 3}
WAYS = {
    "alone": Way("fitted, each by itself", in_turn=False),
    "turn": Way("fitted in turn", _SMALL),
    "last": Way("and last layers of other blocks refitted", _SMALL, refits="last"),
    "all": Way("and all their layers", _SMALL, refits="all"),
    "together": Way("and blocks 0, 1 as one 5x5", _SMALL | {1: 5}, True, refits="all"),
    "best": Way("and half the deviation restored", _SMALL | {1: 5}, True, True, "all", 0.5),
}


# The network ----------------------------------------------------------------------------------


def block_ends(proto: onnx.ModelProto) -> list[tuple[str, list[onnx.NodeProto]]]:
    """The tensor that each block ends at, and its convolutions in order."""
    found: dict[int, tuple[str, list[onnx.NodeProto]]] = {}
    for node in proto.graph.node:
        name = node.output[0]
        if name.startswith("/_blocks."):
            number = int(name.removeprefix("/_blocks.").split("/")[0])
            convs = found.get(number, ("", []))[1]
            found[number] = (name, [*convs, node] if node.op_type == "Conv" else convs)
    return [found[number] for number in sorted(found)]


class Network:
    """A network that is changed from front to back, beside the original.

    Args:
        original: folded losslessly.
        images: to fit on, in batches.
    """

    def __init__(self, original: onnx.ModelProto, images: Tensors, way: Way) -> None:
        self.way = way
        self.original = original
        self.proto = onnx.ModelProto()
        self.proto.CopyFrom(original)
        self.graph = Graph(load(original))
        self.types = tensor_types(self.graph)
        self.images = images
        self.errors: dict[str, float] = {}

    def behind(self, proto: onnx.ModelProto, source: str, values: Tensors, name: str) -> Tensors:
        """One tensor, computed from another."""
        if name == source:
            return values
        run = run_part(extract(proto, [source], [name], self.types), _THREADS)
        return [run({source: value})[name] for value in values]

    def fit(self) -> onnx.ModelProto:
        """Fit everything, from the first block to the head."""
        ends = block_ends(self.original)
        stem = ends[0][1][0].input[0]
        source = stem
        right = own = first = self.behind(self.original, "input", self.images, stem)
        for number, (output, convs) in enumerate(ends):
            wanted = self.behind(self.original, source, right, output)
            if self.way.together and number == 0:
                right, own, source = wanted, wanted, output
                continue
            together = self.way.together and number == 1
            if number in REMOVED:
                begin = stem if together else source
                values = first if together else own if self.way.in_turn else right
                self._replace(number, begin, output, convs, values, wanted)
            elif self.way.refits != "none":
                self._refit(source, output, convs, right, own, wanted)
            begin, values = (stem, first) if together else (source, own)
            own = self.behind(self.proto, begin, values, output)
            right, source = wanted, output
        if self.way.refits == "all":
            (head,) = (n for n in self.original.graph.node if source in n.input)
            wanted = self.behind(self.original, source, right, head.output[0])
            self._refit(source, head.output[0], [head], right, own, wanted)
        return self.proto

    # One block --------------------------------------------------------------------------------

    def _replace(
        self,
        number: int,
        source: str,
        output: str,
        convs: Sequence[onnx.NodeProto],
        values: Tensors,
        wanted: Tensors,
    ) -> None:
        """Put the convolution there that comes closest to what is wanted."""
        size = wanted[0].shape[2]
        stride = values[0].shape[2] // size
        own = self._window(convs[-2])
        kernel = self.way.kernels.get(number, own.kernel[0])
        begin = own.begins[0] + (kernel - own.kernel[0]) // 2
        end = (size - 1) * stride + kernel - values[0].shape[2] - begin
        window = Window((kernel,) * 2, (stride,) * 2, (1, 1), (begin,) * 2, (end,) * 2)
        channels = values[0].shape[1], wanted[0].shape[1]
        moments = Moments(channels[0] * window.taps, channels[1])
        for x, y, places in self._places(values, wanted, "dense"):
            moments.add(patches(x, window, places), _at(y, places))
        ridge = _DENSE_RIDGE * len(moments.gram) / moments.count
        start = None
        if "/Add_" in output:  # what is near nothing else is near the skip
            start = np.zeros((*channels, kernel, kernel))
            start[np.arange(channels[0]), np.arange(channels[0]), begin, begin] = 1.0
            start = start.reshape(channels[0], -1)
        found = fit_linear(moments, ridge, start)
        self.errors[output] = found.error
        weight = found.weight.reshape(channels[1], channels[0], kernel, kernel)
        attributes = {"strides": [stride] * 2, "pads": [begin, begin, end, end]}
        self._insert(source, output, weight, found.bias, attributes)

    def _insert(
        self, source: str, output: str, weight: Matrix, bias: Matrix, attributes: dict[str, Any]
    ) -> None:
        graph = self.proto.graph
        names = [f"{output}.weight", f"{output}.bias"]
        for name, array in zip(names, (weight, bias), strict=True):
            graph.initializer.append(numpy_helper.from_array(array.astype(np.float32), name))
        conv = helper.make_node("Conv", [source, *names], [output], **attributes)
        nodes = [conv if output in node.output else node for node in graph.node]
        del graph.node[:]
        graph.node.extend(nodes)

    def _refit(
        self,
        source: str,
        output: str,
        convs: Sequence[onnx.NodeProto],
        right: Tensors,
        own: Tensors,
        wanted: Tensors,
    ) -> None:
        """Weights of a block that stays, layer by layer, for the input it gets now."""
        for conv in convs if self.way.refits == "all" else convs[-1:]:
            reads, makes = conv.input[0], conv.output[0]
            if conv is convs[-1]:
                skip = "/Add_" in output
                targets = [y - x for x, y in zip(own, wanted, strict=True)] if skip else wanted
            else:
                targets = self.behind(self.original, source, right, makes)
            inputs = self.behind(self.proto, source, own, reads)
            weight = self._weight(conv)
            kind = "depthwise" if weight.shape[1] == 1 else "pointwise"
            fit = _fit_depthwise if kind == "depthwise" else _fit_pointwise
            window = self._window(conv)
            rows = (
                (patches(x, window, places), _at(y, places))
                for x, y, places in self._places(inputs, targets, kind)
            )
            solution = fit(rows, weight, self.way.restore)
            self._set(conv.input[1], solution[0].reshape(weight.shape))
            self._set(conv.input[2], solution[1])

    def _places(
        self, values: Tensors, wanted: Tensors, kind: str
    ) -> Iterator[tuple[Array, Array, Any]]:
        first = 0
        for x, y in zip(values, wanted, strict=True):
            yield x, y, choose_places(len(x), y.shape[2:], _POSITIONS[kind], first)
            first += len(x)

    def _window(self, conv: onnx.NodeProto) -> Window:
        node = self.graph.values()[conv.output[0]].producer()
        assert node is not None
        sizes = [int(size) for size in (self.graph.shape(node.inputs[0]) or ())[2:]]
        return window_of(self.graph, node, sizes)

    def _weight(self, conv: onnx.NodeProto) -> Matrix:
        known = {item.name: item for item in self.proto.graph.initializer}
        return numpy_helper.to_array(known[conv.input[1]]).astype(np.float64)

    def _set(self, name: str, array: Matrix) -> None:
        for item in self.proto.graph.initializer:
            if item.name == name:
                item.CopyFrom(numpy_helper.from_array(array.astype(np.float32), name))


def _at(y: Array, places: NDArray[np.intp]) -> Array:
    found: Array = y[(places[:, 0], slice(None), *places[:, 1:].T)]
    return found


# Refits ---------------------------------------------------------------------------------------


def _fit_pointwise(
    rows: Iterator[tuple[Array, Array]], weight: Matrix, restore: float
) -> tuple[Matrix, Matrix]:
    moments = Moments(weight.shape[1], len(weight))
    for x, y in rows:
        moments.add(x, y)
    ridge = _REFIT_RIDGE * len(moments.gram) / moments.count
    found = fit_linear(moments, ridge, weight.reshape(len(weight), -1))
    solution = np.vstack([found.weight.T, found.bias])
    predicted = np.einsum("ft,ft->t", solution, moments.gram @ solution)
    scale = _scales(moments.power, predicted, moments.cross[-1], moments.count) ** restore
    mean = moments.cross[-1] / moments.count
    weights = found.weight * scale[:, None]
    return weights, mean - weights @ moments.gram[:-1, -1] / moments.count


def _fit_depthwise(
    rows: Iterator[tuple[Array, Array]], weight: Matrix, restore: float
) -> tuple[Matrix, Matrix]:
    """One least-squares problem per channel, pulled towards its present filter."""
    channels, taps = len(weight), weight[0].size
    gram = np.zeros((channels, taps + 1, taps + 1))
    cross, power, count = np.zeros((channels, taps + 1)), np.zeros(channels), 0
    for x, y in rows:
        wide = np.ones((channels, taps + 1, len(x)))
        wide[:, :-1] = x.reshape(len(x), channels, taps).transpose(1, 2, 0)
        targets = y.T.astype(np.float64)
        gram += wide @ wide.transpose(0, 2, 1)
        cross += np.einsum("ctr,cr->ct", wide, targets)
        power += (targets**2).sum(axis=1)
        count += len(x)
    powers = np.einsum("cii->ci", gram)[:, :-1]
    # A channel that is never active keeps its filter.
    damping = _REFIT_RIDGE * (taps + 1) / count * powers + 1e-8 * powers.max() + 1e-12
    right = cross.copy()
    right[:, :-1] += damping * weight.reshape(channels, taps)
    damped = gram.copy()
    np.einsum("cii->ci", damped)[:, :-1] += damping
    solution = np.linalg.solve(damped, right[:, :, None])[:, :, 0]
    predicted = np.einsum("ct,ctu,cu->c", solution, gram, solution)
    scale = _scales(power, predicted, cross[:, -1], count) ** restore
    weights = solution[:, :-1] * scale[:, None]
    return weights, (cross[:, -1] - np.einsum("ct,ct->c", weights, gram[:, :-1, -1])) / count


def _scales(power: Matrix, predicted: Matrix, sums: Matrix, count: int) -> Matrix:
    """What brings the predictions' deviation to that of the targets, channel by channel."""
    mean = sums / count
    wanted = np.maximum(power / count - mean**2, 0.0)
    given = predicted / count - mean**2
    scale: Matrix = np.sqrt(wanted / np.maximum(given, 1e-9))
    return np.clip(scale, 1.0, _LARGEST_SCALE)


# The table ------------------------------------------------------------------------------------


def half(split: int) -> tuple[Tensors, NDArray[Any]]:
    """Photos of one half of the classes, in batches, and their labels."""
    samples = list(shared_data.photos("imagenet_sample", "lite", split=split))
    images = np.concatenate([each["input"].reshape(-1, 3, 224, 224) for each in samples])
    labels = np.concatenate([each["labels"] for each in samples])
    return [images[start : start + _BATCH] for start in range(0, len(images), _BATCH)], labels


def answers(proto: onnx.ModelProto, images: Tensors) -> list[dict[str, Any]]:
    """What a network says of photos."""
    run = run_part(proto, _THREADS)
    return [run({"input": batch}) for batch in images]


def read_known() -> dict[str, Any]:
    """What was measured before, by way and half; where several versions count, delete the file."""
    path = RESULTS / "lite0_a.json"
    return json.loads(path.read_text())["ways"] if path.exists() else {}


def write_table(found: dict[str, Any]) -> None:
    """All that is known, in the order of the ways."""
    rows = []
    for what in [THE_MODEL, MERELY_REMOVED, *(way.what for way in WAYS.values())]:
        known = [found.get(what, {}).get(f"fitted on half {split}") for split in (0, 1)]
        if any(known):
            rows.append([what, *_figures(known, "accuracy"), *_figures(known, "agreement")])
    columns = ["EfficientNet-Lite0-A", "top-1 on half 1", "top-1 on half 0", "mean"]
    columns += ["agreement on half 1", "on half 0", "mean"]
    title = "EfficientNet-Lite0 under DepthShrinker's mask A, without training"
    write("lite0_a", title, COMMAND, markdown(columns, rows), {"ways": found})


def _figures(known: Sequence[dict[str, Any] | None], name: str) -> list[str]:
    values = [None if each is None else each[name] for each in known]
    values.append(None if None in values else float(np.mean(values)))
    return ["-" if value is None else f"{100 * value:.1f} %" for value in values]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--way", choices=list(WAYS), action="append")
    parser.add_argument("--half", type=int, choices=(0, 1), action="append", help="to fit on")
    options = parser.parse_args()
    found = read_known()
    original = to_proto(graphfold.optimize(MODEL, verify=False).folded)
    halves = [half(split) for split in (0, 1)]
    judges = [Judge(answers(original, images), labels) for images, labels in halves]

    def note(what: str, split: int, proto: onnx.ModelProto, **more: Any) -> None:
        verdict = judges[1 - split].verdict(answers(proto, halves[1 - split][0]))
        known = found.setdefault(what, {})
        known[f"fitted on half {split}"] = {**verdict.to_json(), **more}
        write_table(found)

    for split in (0, 1):
        note(THE_MODEL, split, original)
        note(MERELY_REMOVED, split, graphfold.optimize(MODEL, PLAN, verify=False).model)
    for way in (WAYS[name] for name in options.way or WAYS):
        for split in options.half or (0, 1):
            started = time.process_time()
            network = Network(original, halves[split][0], way)
            proto = network.fit()
            seconds = time.process_time() - started
            note(way.what, split, proto, unexplained=network.errors, processor_seconds=seconds)


if __name__ == "__main__":
    main()

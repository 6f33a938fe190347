"""What training expanded convolutions gains: small networks on CIFAR-10, from scratch.

    python benchmarks/expand.py
    python benchmarks/expand.py --network mobilenetv2

trains the same network, from the same first weights and by the same recipe, as it is, with some
of its convolutions (VGG: the inner 3x3 ones; MobileNetV2: every second block's first) as inverted
residual blocks whose activations fade out, and with them as linear blocks. All are folded to one
structure, and judged as folded on CIFAR-10's test images.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import onnx
import shared_data
import torch
from common import command_line, markdown, write
from networks import Network
from training_bench import mobilenet

import graphfold
from graphfold.calibration.anneal import Annealing
from graphfold.calibration.capture import run_part
from graphfold.calibration.expand import Expanded
from graphfold.calibration.finetune import compare, finetune
from graphfold.calibration.recipe import Recipe
from graphfold.calibration.samples import Samples
from graphfold.cost import analyze
from graphfold.graph import Graph
from graphfold.model import Model, load, to_proto

# Width and number of the 3x3 convolutions before each pooling: VGG-11's, an eighth as wide.
STAGES = ((16, 1), (24, 1), (32, 2), (64, 2), (64, 2))
_WATCHED = 1000  # test images that the curves in the data are of
VARIANTS = ("plain", "inverted", "linear")


def vgg(seed: int) -> onnx.ModelProto:
    """The network with its first weights, its batch open."""
    net = Network(32, seed)
    x = "x"
    for width, convolutions in STAGES:
        for _ in range(convolutions):
            x = net.op("Relu", net.conv_norm(x, width, 3))
        x = net.op("MaxPool", x, kernel_shape=[2, 2], strides=[2, 2])
    proto = net.model(net.classify(x, 10))
    del proto.graph.value_info[:]
    for value in (*proto.graph.input, *proto.graph.output):
        value.type.tensor_type.shape.dim[0].dim_param = "N"
    return proto


# What is expanded is as in the paper: all 3x3 convolutions but the first two and the last, and
# the first pointwise convolution of every second inverted-residual block.
NETWORKS: dict[str, tuple[Callable[[int], onnx.ModelProto], dict[str, Any]]] = {
    "vgg": (vgg, {"convs": ["k3"], "skip_first": 2, "skip_last": 1}),
    "mobilenetv2": (partial(mobilenet, 0.5), {"convs": ["expansions"], "every": 2}),
}


def cifar(part: str, limit: int | None) -> Samples:
    """The first pictures of a part, and their classes."""
    found = []
    for sample in shared_data.cifar(part):
        if limit is not None and len(found) == limit:
            break
        found.append((sample["input"], sample["labels"]))
    images = np.concatenate([image for image, _ in found])
    return Samples.of({"x": images}, np.concatenate([label for _, label in found]))


def judge(model: Model, test: Samples) -> tuple[float, float]:
    """Share of right classes, of all and of the class where it is least, in onnxruntime."""
    run = run_part(to_proto(model), 1)
    right = []
    for positions in test.in_order(100):
        feed, labels = test.take(positions)
        assert labels is not None
        (scores,) = run({name: tensor.numpy() for name, tensor in feed.items()}).values()
        right.append(scores.argmax(1) == labels.numpy())
    hits = np.concatenate(right)
    assert test.labels is not None
    classes = test.labels.numpy()
    return float(hits.mean()), min(float(hits[classes == each].mean()) for each in set(classes))


def train(variant: str, seed: int, data: tuple[Samples, Samples], options: Any) -> dict[str, Any]:
    """One training, from first weights to the folded network's accuracy."""
    make, rules = NETWORKS[options.network]
    network = load(make(seed))
    plain = graphfold.optimize(network, verify=False)
    expanded: Expanded | None = None
    hooks = None
    if variant != "plain":
        expanded = graphfold.expand(network, kind=variant, ratio=options.ratio, seed=seed, **rules)
    if expanded is not None and variant == "inverted":
        hooks = Annealing(expanded.expanded, expanded.plan, *options.anneal)
    recipe = Recipe(
        epochs=options.epochs,
        learning_rate=options.learning_rate,
        weight_decay=options.weight_decay,
        warmup=1.0 if options.epochs > 1 else 0.0,
        seed=seed,
    )
    started, processor = time.perf_counter(), time.process_time()
    found = finetune(
        network if expanded is None else expanded.expanded,
        data[0],
        None if expanded is None else expanded.plan,
        held_out=data[1].subset(range(min(_WATCHED, len(data[1])))),
        alpha=0,
        recipe=recipe,
        hooks=hooks,
    )
    seconds, processor = time.perf_counter() - started, time.process_time() - processor
    accuracy, worst = judge(found.result.folded, data[1])
    folding = compare(found.result, data[1])
    costs = [analyze(Graph(each)).total for each in (plain.folded, found.result.folded)]
    operators = [[node.op_type for node in each.model.graph.node] for each in (plain, found.result)]
    return {
        "variant": variant,
        "seed": seed,
        "accuracy": accuracy,
        "worst_class": worst,
        "loss": found.trained.last.loss,
        "same_structure": operators[0] == operators[1] and costs[0] == costs[1],
        "other_class": folding.other_class,
        "folding_error": folding.error,
        "macs": costs[1].macs,
        "training_macs": costs[1].macs if expanded is None else expanded.macs[1],
        "seconds": seconds,
        "processor_seconds": processor,
        "epochs": [epoch.to_json() for epoch in found.trained.epochs],
    }


def table(runs: list[dict[str, Any]], seeds: int) -> str:
    """Means, spread over the seeds, and gains over plain training from the same first weights."""
    plain = {run["seed"]: run["accuracy"] for run in runs if run["variant"] == "plain"}
    rows = []
    for variant in dict.fromkeys(run["variant"] for run in runs):
        own = [run for run in runs if run["variant"] == variant]
        accuracies = [100 * run["accuracy"] for run in own]
        gains = [100 * (run["accuracy"] - plain[run["seed"]]) for run in own]
        spread = f" ± {statistics.stdev(accuracies):.2f}" if seeds > 1 else ""
        rows.append(
            [
                variant,
                f"{statistics.mean(accuracies):.2f} %{spread}",
                "" if variant == "plain" else f"{statistics.mean(gains):+.2f}",
                "" if variant == "plain" else ", ".join(f"{gain:+.2f}" for gain in gains),
                f"{100 * statistics.mean(run['worst_class'] for run in own):.1f} %",
                f"{own[0]['training_macs'] / 1e6:.1f} M",
                f"{own[0]['macs'] / 1e6:.1f} M",
                "yes" if all(run["same_structure"] for run in own) else "no",
                str(sum(run["other_class"] for run in own)),
                f"{statistics.mean(run['processor_seconds'] for run in own):.0f}",
            ]
        )
    columns = [
        *("training", "test accuracy", "gain", "by seed", "worst class", "MACs in training"),
        *("MACs folded", "same structure", "other class after folding", "processor s"),
    ]
    return markdown(columns, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--network", choices=list(NETWORKS), default="vgg")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS[1:], default=VARIANTS[1:])
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--samples", type=int, default=10_000, help="to train on")
    parser.add_argument("--test", type=int, default=10_000, help="to judge on")
    parser.add_argument("--ratio", type=float, default=6.0)
    parser.add_argument("--anneal", type=float, nargs=2, default=(0.1, 0.5))
    parser.add_argument("--learning-rate", type=float, default=0.1)
    parser.add_argument("--weight-decay", type=float, default=5e-4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--name", help="of the results")
    options = parser.parse_args()
    name = options.name or ("expand" if options.network == "vgg" else f"expand_{options.network}")
    torch.set_num_threads(options.threads)
    data = cifar("train", options.samples), cifar("test", options.test)
    runs = []
    for seed in range(options.seeds):
        for variant in [VARIANTS[0], *options.variants]:
            runs.append(train(variant, seed, data, options))
            last = runs[-1]
            print(seed, variant, f"{100 * last['accuracy']:.2f} %", f"{last['seconds']:.0f} s",
                  flush=True)  # fmt: skip
    command = command_line("python benchmarks/expand.py", parser, options, ("name",))
    title = f"Expanded convolutions on CIFAR-10: a small {options.network} from scratch, folded"
    write(name, title, command, table(runs, options.seeds), {"runs": runs})


if __name__ == "__main__":
    main()

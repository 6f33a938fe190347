"""The papers' own figures: operation counts of DepthShrinker, and LayerMerge's list of layers.

Only shapes count here, so the networks keep torch's initial weights, except where numbers are run.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest

pytest.importorskip("torch")

EXAMPLES = Path(__file__).parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))  # they import each other as scripts do

import export  # noqa: E402
import plans  # noqa: E402
import zoo  # noqa: E402
from efficientnet_lite import VARIANTS, EfficientNetLite  # noqa: E402
from mobilenet_v2 import MobileNetV2  # noqa: E402

import graphfold  # noqa: E402
from graphfold.cost import Cost, analyze  # noqa: E402
from graphfold.graph import Graph  # noqa: E402
from graphfold.model import load  # noqa: E402
from graphfold.optimizer import Result  # noqa: E402
from graphfold.segments import main_path_convs, whole_branch_end  # noqa: E402
from graphfold.sites import find_sites  # noqa: E402


def _lite(variant: int, size: int) -> EfficientNetLite:
    width, depth, _ = VARIANTS[variant]
    return EfficientNetLite(width, depth, size)


BUILD: dict[str, Callable[[int], Any]] = {
    "mobilenet_v2_1.4": lambda _: MobileNetV2(1.4),
    "mobilenet_v2_1.0": lambda _: MobileNetV2(1.0),
    **{
        f"efficientnet_lite{variant}": functools.partial(_lite, variant) for variant in (0, 1, 2, 3)
    },
}


@functools.cache
def exported(name: str, keep_bn: bool = True, size: int = 224) -> onnx.ModelProto:
    return export.export(
        BUILD[name](size), exporter="torchscript", opset=17, keep_bn=keep_bn, size=size
    )


def folded(name: str, plan: dict[str, Any] | None, keep_bn: bool, size: int = 224) -> Result:
    return graphfold.optimize(exported(name, keep_bn, size), plan, verify=False)


def attributes(node: onnx.NodeProto) -> dict[str, Any]:
    return {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}


def count(result: Result, original: onnx.ModelProto, size: int = 224) -> Cost:
    """Cost at batch 1; a Conv that stands for exactly one of the original counts as normalised."""
    labels = {node.name for node in original.graph.node if node.op_type == "Conv"}
    assert len(labels) > 40  # all named, or the next line would see nothing
    merged = {
        fold.output for fold in result.report.folds if len(labels.intersection(fold.replaces)) > 1
    }
    convs = {node.output[0] for node in result.model.graph.node if node.op_type == "Conv"}
    assert merged <= convs  # nothing follows a merged convolution: no border is repaired
    shapes = {export.INPUT: (1, 3, size, size)}
    return analyze(Graph(result.folded), input_shapes=shapes, normalized=convs - merged)


# --- DepthShrinker --------------------------------------------------------------------------------

# network, mask -> F of the published tables in M, and the MACs of convolutions and the linear layer
PUBLISHED = {
    ("mobilenet_v2_1.4", "A"): (519.44, 496.22),
    ("mobilenet_v2_1.4", "B"): (502.47, 481.87),
    ("mobilenet_v2_1.4", "C"): (492.57, 474.42),
    ("mobilenet_v2_1.4", "D"): (484.25, 466.55),
    ("mobilenet_v2_1.4", "E"): (474.36, 459.10),
    ("mobilenet_v2_1.4", "F"): (415.98, 407.93),
    ("mobilenet_v2_1.0", "A"): (287.16, 266.19),
    ("mobilenet_v2_1.0", "B"): (272.79, 256.71),
    ("mobilenet_v2_1.0", "C"): (261.17, 247.04),
    ("mobilenet_v2_1.0", "D"): (253.78, 241.57),
    ("efficientnet_lite3", "A"): (991.70, 969.13),
    ("efficientnet_lite3", "B"): (952.43, 927.54),
    ("efficientnet_lite3", "C"): (918.70, 890.85),
    ("efficientnet_lite3", "D"): (905.79, 875.21),
    ("efficientnet_lite0", "A"): (445.46, None),
    ("efficientnet_lite0", "B"): (414.20, None),
    ("efficientnet_lite0", "C"): (446.20, None),
    ("efficientnet_lite0", "D"): (508.86, None),
}
# The paper prints whole millions, cut off.
PRINTED = {
    "mobilenet_v2_1.4": [519, 502, 492, 484, 474, 415],
    "mobilenet_v2_1.0": [287, 272, 261, 253],
    "efficientnet_lite3": [991, 952, 918, 905],
}


def test_every_mask_has_a_figure():
    known = {(name, mask) for name, masks in plans.DEPTHSHRINKER.items() for mask in masks}
    assert set(PUBLISHED) == known
    for name, printed in PRINTED.items():
        assert [int(PUBLISHED[name, mask][0]) for mask in plans.DEPTHSHRINKER[name]] == printed


@pytest.mark.parametrize(
    "keep_bn", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["bn", "fused"]
)
@pytest.mark.parametrize(("name", "mask"), sorted(PUBLISHED))
def test_depthshrinker_operation_counts(name: str, mask: str, keep_bn: bool):
    formula, macs = PUBLISHED[name, mask]
    plan = plans.keep_blocks(name, mask) | {"boundary": "hoist"}
    result = folded(name, plan, keep_bn)
    cost = count(result, exported(name, keep_bn))
    assert cost.macs_fvcore is not None
    assert cost.macs_fvcore / 1e6 == pytest.approx(formula, abs=0.01)
    assert cost.macs == export.macs(result.model)
    if macs is not None:
        assert cost.macs / 1e6 == pytest.approx(macs, abs=0.01)


@pytest.mark.parametrize("keep_bn", [True, False], ids=["bn", "fused"])
@pytest.mark.parametrize(
    ("name", "size", "formula"),
    [
        ("mobilenet_v2_1.4", 224, 630.15),
        ("mobilenet_v2_1.0", 224, 334.23),
        ("efficientnet_lite0", 224, 418.94),
        ("efficientnet_lite1", 240, 650.98),
        ("efficientnet_lite2", 260, 924.31),
    ],
)
def test_operation_counts_of_the_originals(name: str, size: int, formula: float, keep_bn: bool):
    original = exported(name, keep_bn, size)
    cost = count(folded(name, None, keep_bn, size), original, size)
    assert cost.macs_fvcore is not None
    assert cost.macs_fvcore / 1e6 == pytest.approx(formula, abs=0.01)
    if keep_bn:  # the normalisations themselves, counted where they stand
        shapes = {export.INPUT: (1, 3, size, size)}
        assert analyze(Graph(load(original)), input_shapes=shapes).macs_fvcore == cost.macs_fvcore


@pytest.mark.parametrize("boundary", ["exact", "hoist"])
def test_removed_blocks_are_one_convolution_each_and_the_first_block_stays_two(boundary: str):
    plan = plans.keep_blocks("mobilenet_v2_1.4", "F") | {"boundary": boundary}
    result = folded("mobilenet_v2_1.4", plan, keep_bn=False)
    model = result.model
    segments = [fold for fold in result.report.folds if fold.segment is not None]
    assert len(segments) == 16
    assert {fold.kernel for fold in segments} == {(3, 3)}
    convs = [node for node in model.graph.node if node.op_type == "Conv"]
    # stem, the first block's two, sixteen merged blocks, head
    assert len(convs) == 1 + 2 + 16 + 1
    assert attributes(convs[1])["group"] == 48
    assert convs[2].input[0] == convs[1].output[0]


# --- LayerMerge -----------------------------------------------------------------------------------

Layer = tuple[int, int, int, int, bool, bool]  # in, out, kernel, stride, depthwise, activation


def _bottleneck(cin: int, wide: int, out: int, stride: int = 1) -> list[Layer]:
    return [
        (cin, wide, 1, 1, False, True),
        (wide, wide, 3, stride, True, True),
        (wide, out, 1, 1, False, False),
    ]


LAYERMERGE: list[Layer] = [
    (3, 32, 3, 2, False, True),
    (32, 24, 3, 2, False, True),
    (24, 24, 1, 1, False, True),
    (24, 32, 3, 2, False, True),
    (32, 32, 1, 1, False, True),
    (32, 32, 3, 1, False, True),
    *_bottleneck(32, 192, 64, stride=2),
    *_bottleneck(64, 384, 64) * 3,
    *_bottleneck(64, 384, 96),
    *_bottleneck(96, 576, 96),
    (96, 96, 1, 1, False, True),
    *_bottleneck(96, 576, 160, stride=2),
    *_bottleneck(160, 960, 160) * 2,
    *_bottleneck(160, 960, 320),
    (320, 1280, 1, 1, False, True),
]


@functools.cache
def layermerge_result() -> Result:
    path = EXAMPLES / "plans" / "layermerge_mobilenet_v2_1.0_13.4.json"
    model = zoo.exported("mobilenet_v2_1.0", exporter="torchscript", opset=17)
    return graphfold.optimize(model, path, input_shapes={export.INPUT: (1, 3, 224, 224)})


def layers(model: onnx.ModelProto) -> list[Layer]:
    weights = {tensor.name: list(tensor.dims) for tensor in model.graph.initializer}
    activated = {node.input[0] for node in model.graph.node if node.op_type == "Clip"}
    found = []
    for node in model.graph.node:
        if node.op_type == "Conv":
            out, width, kernel, same = weights[node.input[1]]
            values = attributes(node)
            assert kernel == same
            cin, stride = width * values["group"], values["strides"][0]
            depthwise = values["group"] > 1
            assert not depthwise or values["group"] == cin == out
            active = node.output[0] in activated
            found.append((cin, out, kernel, stride, depthwise, active))
    return found


def test_layermerge_solution_is_the_published_list():
    model = layermerge_result().model
    assert layers(model) == LAYERMERGE
    assert len(LAYERMERGE) == 38
    convs = [attributes(node) for node in model.graph.node if node.op_type == "Conv"]
    # Each of these networks' paddings keeps sizes, or halves them: half the kernel all round.
    assert [values["pads"] for values in convs] == [
        [kernel // 2] * 4 for _, _, kernel, *_ in LAYERMERGE
    ]
    assert sum(node.op_type == "Clip" for node in model.graph.node) == 28


def test_layermerge_solution_keeps_the_published_residual_adds():
    nodes = layermerge_result().model.graph.node
    adds = [node for node in nodes if node.op_type == "Add"]
    assert len(adds) == 3 + 1 + 2
    # around the whole bottlenecks alone: their last convolutions have no activation
    convs = [node.output[0] for node in nodes if node.op_type == "Conv"]
    positions = [max(convs.index(name) for name in add.input if name in convs) for add in adds]
    assert [LAYERMERGE[position][:2] for position in positions] == [
        *[(384, 64)] * 3,
        (576, 96),
        *[(960, 160)] * 2,
    ]


def test_layermerge_solution_has_the_published_operation_count():
    result = layermerge_result()
    cost = analyze(Graph(result.folded), input_shapes={export.INPUT: (1, 3, 224, 224)})
    convs = sum(node.macs or 0 for node in cost.nodes if node.op_type == "Conv")
    assert convs / 1e6 == pytest.approx(213.116, abs=0.0005)
    original = zoo.exported("mobilenet_v2_1.0", exporter="torchscript", opset=17)
    before = analyze(Graph(load(original)), input_shapes={export.INPUT: (1, 3, 224, 224)})
    convs = sum(node.macs or 0 for node in before.nodes if node.op_type == "Conv")
    assert convs / 1e6 == pytest.approx(299.494, abs=0.0005)


def test_layermerge_solution_equals_its_reference_network():
    verification = layermerge_result().report.verification
    assert verification is not None
    assert verification.passed
    assert verification.max_rel is not None
    assert verification.max_rel < 1e-5  # the public code's own check: 3e-7


# --- Kernels --------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["segment", "index sets"])
@pytest.mark.parametrize(
    ("start", "end", "kernel", "stride", "cin", "cout"),
    [
        (5, 11, 5, 2, 24, 32),
        (11, 20, 7, 2, 32, 64),
        (20, 41, 15, 2, 64, 160),
        (41, 50, 7, 1, 160, 320),
    ],
)
def test_kernels_grow_as_published(
    start: int, end: int, kernel: int, stride: int, cin: int, cout: int, form: str
):
    original = exported("mobilenet_v2_1.0")
    graph = Graph(load(original))
    sites = find_sites(graph)
    convs = main_path_convs(graph, sites)
    source = convs[start + 1].input
    output = whole_branch_end(graph, source, convs[end].output, sites)
    if form == "segment":
        segment = {"input": source.name, "output": output.name, "boundary": "hoist"}
        segment |= {"kernel": [kernel, kernel], "family": "dense"}
        plan: dict[str, Any] = {"graphfold_plan": 1, "segments": [segment]}
    else:
        ends = [index for index in range(51) if not start < index < end]
        plan = {"graphfold_plan": 1, "act_ind": ends, "conv_ind": list(range(51))}
    result = folded("mobilenet_v2_1.0", plan, True)
    (merged,) = [node for node in result.model.graph.node if output.name in node.output]
    assert merged.op_type == "Conv"
    values = attributes(merged)
    weights = {tensor.name: list(tensor.dims) for tensor in result.model.graph.initializer}
    assert weights[merged.input[1]] == [cout, cin, kernel, kernel]
    assert values["strides"] == [stride, stride]
    assert values["pads"] == [kernel // 2] * 4
    assert values["group"] == 1
    (fold,) = [fold for fold in result.report.folds if fold.segment is not None]
    assert fold.kernel == (kernel, kernel)
    convs_left = sum(node.op_type == "Conv" for node in result.model.graph.node)
    assert convs_left == 52 - (end - start) + 1

"""Each ONNX operator in torch against onnxruntime, with its attributes, over the opsets."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from builders import ModelBuilder, nonzero, random_input, run
from corpus.cases import node_cases
from onnx import TensorProto, helper

torch = pytest.importorskip("torch")

from graphfold.calibration.bridge import BridgeError, bridge  # noqa: E402 - needs torch
from graphfold.calibration.torch_table import OPERATORS  # noqa: E402
from graphfold.model import load  # noqa: E402

RNG = np.random.default_rng(7)
IMAGE = [2, 4, 9, 8]


def numbers(*shape):
    return nonzero(RNG, *shape).astype(np.float32)


def positive(*shape):
    return np.abs(numbers(*shape))


def scalar(value):
    return np.float32(value)


def ints(*values):
    return np.asarray(values, dtype=np.int64)


W = numbers(6, 2, 3, 3)
DEEP = numbers(6, 2, 2, 3, 3)
B = numbers(6)
PADS = {"pads": [2, 0, 1, 1]}

# Operator, opset, shape of the input, constant inputs (None is left out), attributes.
CASES = [
    # convolutions
    ("Conv", 9, IMAGE, [W, B], {"group": 2, **PADS}),
    ("Conv", 17, IMAGE, [W, B], {"group": 2, "strides": [2, 1], "dilations": [1, 2]}),
    ("Conv", 17, IMAGE, [W], {"group": 2, "auto_pad": "SAME_UPPER", "strides": [2, 2]}),
    ("Conv", 17, IMAGE, [W], {"group": 2, "auto_pad": "SAME_LOWER", "strides": [2, 3]}),
    ("Conv", 17, IMAGE, [W], {"group": 2, "auto_pad": "VALID"}),
    ("Conv", 17, [2, 4, 9], [numbers(6, 4, 3), B], {"pads": [2, 1]}),
    ("Conv", 17, [2, 4, 4, 5, 6], [DEEP, B], {"group": 2, "pads": [1, 0, 1, 0, 1, 1]}),
    ("ConvTranspose", 11, IMAGE, [numbers(4, 3, 3, 3), numbers(6)], {"group": 2, **PADS}),
    ("ConvTranspose", 11, IMAGE, [numbers(4, 3, 3, 2)], {"strides": [3, 2], "dilations": [2, 1]}),
    (
        "ConvTranspose",
        11,
        IMAGE,
        [numbers(4, 3, 3, 3), numbers(3)],
        {"strides": [2, 2], "output_padding": [1, 1], "pads": [1, 1, 1, 1]},
    ),
    (
        "ConvTranspose",
        11,
        IMAGE,
        [numbers(4, 3, 4, 4)],
        {"strides": [2, 2], "auto_pad": "SAME_UPPER"},
    ),
    (
        "ConvTranspose",
        11,
        IMAGE,
        [numbers(4, 3, 5, 4)],
        {"strides": [2, 2], "auto_pad": "SAME_LOWER"},
    ),
    (
        "ConvTranspose",
        11,
        IMAGE,
        [numbers(4, 3, 3, 3)],
        {"strides": [2, 2], "output_shape": [18, 16]},
    ),
    ("ConvTranspose", 17, [2, 4, 9], [numbers(4, 3, 3)], {"strides": [2]}),
    # pooling
    ("MaxPool", 8, IMAGE, [], {"kernel_shape": [3, 2], "strides": [2, 2], **PADS}),
    ("MaxPool", 17, IMAGE, [], {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}),
    ("MaxPool", 17, IMAGE, [], {"kernel_shape": [2, 3], "dilations": [2, 2]}),
    ("MaxPool", 17, IMAGE, [], {"kernel_shape": [3, 3], "strides": [2, 3], "ceil_mode": 1}),
    (
        "MaxPool",
        17,
        IMAGE,
        [],
        {"kernel_shape": [2, 2], "strides": [3, 3], "ceil_mode": 1, "pads": [1, 0, 1, 1]},
    ),
    (
        "MaxPool",
        17,
        IMAGE,
        [],
        {"kernel_shape": [3, 3], "auto_pad": "SAME_LOWER", "strides": [2, 2]},
    ),
    ("MaxPool", 17, [2, 4, 9], [], {"kernel_shape": [3], "pads": [0, 2]}),
    ("MaxPool", 17, [1, 2, 4, 5, 6], [], {"kernel_shape": [2, 3, 2], "strides": [1, 2, 2]}),
    ("AveragePool", 8, IMAGE, [], {"kernel_shape": [3, 3], **PADS}),
    ("AveragePool", 17, IMAGE, [], {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}),
    ("AveragePool", 17, IMAGE, [], {"kernel_shape": [3, 3], "count_include_pad": 1, **PADS}),
    (
        "AveragePool",
        17,
        IMAGE,
        [],
        {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1], "count_include_pad": 1, "strides": [2, 2]},
    ),
    ("AveragePool", 19, IMAGE, [], {"kernel_shape": [2, 3], "strides": [2, 3], "ceil_mode": 1}),
    (
        "AveragePool",
        19,
        IMAGE,
        [],
        {
            "kernel_shape": [3, 3],
            "strides": [3, 2],
            "ceil_mode": 1,
            "count_include_pad": 1,
            "pads": [1, 0, 1, 1],
        },
    ),
    (
        "AveragePool",
        17,
        IMAGE,
        [],
        {"kernel_shape": [3, 3], "auto_pad": "SAME_UPPER", "strides": [2, 2]},
    ),
    ("AveragePool", 19, IMAGE, [], {"kernel_shape": [2, 2], "dilations": [2, 3]}),
    ("AveragePool", 17, [2, 4, 9], [], {"kernel_shape": [2], "strides": [2]}),
    ("GlobalAveragePool", 17, IMAGE, [], {}),
    ("GlobalMaxPool", 17, IMAGE, [], {}),
    # padding
    ("Pad", 10, IMAGE, [], {"pads": [0, 1, 2, 0, 0, 0, 1, 3], "value": 0.5}),
    ("Pad", 13, IMAGE, [ints(0, 0, 1, 2, 0, 1, 0, 2), scalar(-0.5)], {}),
    ("Pad", 13, IMAGE, [ints(0, 0, 1, -2, 0, 0, -1, 2)], {}),
    ("Pad", 13, IMAGE, [ints(0, 0, 1, 2, 0, 0, 3, 1)], {"mode": "reflect"}),
    ("Pad", 13, IMAGE, [ints(0, 0, 1, 2, 0, 1, 3, 1)], {"mode": "edge"}),
    ("Pad", 19, IMAGE, [ints(0, 0, 1, 2, 0, 0, 3, 1)], {"mode": "wrap"}),
    ("Pad", 18, IMAGE, [ints(1, 2, 0, 1), None, ints(-1, 2)], {}),
    # resizing
    ("Upsample", 7, IMAGE, [], {"scales": [1.0, 1.0, 2.0, 2.5]}),
    ("Upsample", 9, IMAGE, [np.float32([1, 1, 2, 1.5])], {"mode": "linear"}),
    ("Resize", 10, IMAGE, [np.float32([1, 1, 2, 1.5])], {}),
    ("Resize", 10, IMAGE, [np.float32([1, 1, 0.5, 0.6])], {}),
    ("Resize", 10, IMAGE, [np.float32([1, 1, 2, 0.6])], {"mode": "linear"}),
    *[
        (
            "Resize",
            19,
            IMAGE,
            [None, np.float32([1, 1, *scales])],
            {"coordinate_transformation_mode": coordinates, "nearest_mode": nearest},
        )
        for coordinates in ("half_pixel", "asymmetric", "align_corners", "pytorch_half_pixel")
        for nearest in ("round_prefer_floor", "round_prefer_ceil", "floor", "ceil")
        for scales in ((2, 1.5), (0.7, 3))
    ],
    *[
        (
            "Resize",
            opset,
            IMAGE,
            [None, None, ints(2, 4, *sizes)],
            {"coordinate_transformation_mode": coordinates, "mode": mode},
        )
        for opset, coordinates in (
            (13, "half_pixel"),
            (13, "asymmetric"),
            (13, "align_corners"),
            (13, "pytorch_half_pixel"),
            (19, "half_pixel_symmetric"),
        )
        for mode in ("linear", "cubic")
        for sizes in ((18, 12), (5, 8))
    ],
    ("Resize", 13, IMAGE, [None, None, ints(2, 4, 1, 12)], {"mode": "linear"}),
    ("Resize", 11, IMAGE, [np.float32([]), np.float32([1, 1, 2, 2])], {"mode": "linear"}),
    (
        "Resize",
        13,
        IMAGE,
        [None, np.float32([1, 1, 2, 2])],
        {"mode": "cubic", "cubic_coeff_a": -0.5, "exclude_outside": 1},
    ),
    ("Resize", 18, IMAGE, [None, np.float32([1.5, 2])], {"axes": [3, 2]}),
    (
        "Resize",
        18,
        IMAGE,
        [None, None, ints(20, 20)],
        {"axes": [2, 3], "keep_aspect_ratio_policy": "not_larger"},
    ),
    (
        "Resize",
        18,
        IMAGE,
        [None, None, ints(20, 20)],
        {"axes": [2, 3], "keep_aspect_ratio_policy": "not_smaller"},
    ),
    ("DepthToSpace", 9, [2, 8, 3, 2], [], {"blocksize": 2}),
    ("DepthToSpace", 13, [2, 8, 3, 2], [], {"blocksize": 2, "mode": "CRD"}),
    ("SpaceToDepth", 13, [2, 3, 4, 6], [], {"blocksize": 2}),
    # normalisation
    *[
        (
            "BatchNormalization",
            opset,
            IMAGE,
            [numbers(4), numbers(4), numbers(4), positive(4)],
            {"epsilon": 0.01},
        )
        for opset in (7, 9, 14, 15)
    ],
    ("BatchNormalization", 15, [3, 4], [numbers(4), numbers(4), numbers(4), positive(4)], {}),
    ("InstanceNormalization", 17, IMAGE, [numbers(4), numbers(4)], {"epsilon": 0.01}),
    ("GroupNormalization", 18, IMAGE, [numbers(2), numbers(2)], {"num_groups": 2}),
    ("GroupNormalization", 21, IMAGE, [numbers(4), numbers(4)], {"num_groups": 2}),
    ("LayerNormalization", 17, IMAGE, [numbers(8), numbers(8)], {}),
    ("LayerNormalization", 17, IMAGE, [numbers(9, 8)], {"axis": 2, "epsilon": 0.1}),
    ("RMSNormalization", 23, IMAGE, [numbers(8)], {"epsilon": 0.1}),
    ("LpNormalization", 17, IMAGE, [], {"axis": 1, "p": 1}),
    ("LpNormalization", 17, IMAGE, [], {"axis": 1}),
    ("LRN", 13, [2, 7, 3, 2], [], {"size": 3, "alpha": 0.5, "beta": 0.6, "bias": 1.5}),
    ("LRN", 13, [2, 7, 3, 2], [], {"size": 5, "alpha": 0.5}),
    # activations
    *[
        (op_type, 18, IMAGE, [], {})
        for op_type in [
            "Abs",
            "Ceil",
            "Cos",
            "Elu",
            "Erf",
            "Exp",
            "Floor",
            "HardSigmoid",
            "HardSwish",
            "Identity",
            "LeakyRelu",
            "LogSoftmax",
            "Mish",
            "Neg",
            "Relu",
            "Round",
            "Selu",
            "Sigmoid",
            "Sign",
            "Sin",
            "Softmax",
            "Softplus",
            "Softsign",
            "Tanh",
            "ThresholdedRelu",
            "Celu",
            "Reciprocal",
            "Dropout",
        ]
    ],
    *[(op_type, 9, IMAGE, [], {}) for op_type in ("Softmax", "LogSoftmax", "Dropout", "Elu")],
    ("Softmax", 11, IMAGE, [], {"axis": 2}),
    ("Softmax", 13, IMAGE, [], {"axis": 1}),
    ("Elu", 17, IMAGE, [], {"alpha": 0.7}),
    ("Celu", 17, IMAGE, [], {"alpha": 0.7}),
    ("Selu", 17, IMAGE, [], {"alpha": 1.2, "gamma": 0.9}),
    ("LeakyRelu", 17, IMAGE, [], {"alpha": 0.3}),
    ("ThresholdedRelu", 17, IMAGE, [], {"alpha": 0.3}),
    ("HardSigmoid", 17, IMAGE, [], {"alpha": 0.9, "beta": 0.4}),
    ("Gelu", 20, IMAGE, [], {}),
    ("Gelu", 20, IMAGE, [], {"approximate": "tanh"}),
    ("Clip", 7, IMAGE, [], {"min": -0.3, "max": 0.4}),
    ("Clip", 10, IMAGE, [], {"max": 0.4}),
    ("Clip", 13, IMAGE, [scalar(-0.3), scalar(0.4)], {}),
    ("Clip", 13, IMAGE, [None, scalar(0.4)], {}),
    ("Clip", 13, IMAGE, [], {}),
    ("PRelu", 9, IMAGE, [numbers(4, 1, 1)], {}),
    ("PRelu", 17, IMAGE, [numbers(1)], {}),
    ("PRelu", 17, IMAGE, [numbers(8)], {}),
    # arithmetic
    *[
        (op_type, 17, IMAGE, [positive(4, 1, 1)], {})
        for op_type in ("Add", "Sub", "Mul", "Div", "Max", "Min", "Sum", "Mean")
    ],
    *[
        (op_type, 17, IMAGE, [numbers(4, 1, 1)], {})
        for op_type in ("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual")
    ],
    ("Max", 17, IMAGE, [numbers(4, 1, 1), numbers(8)], {}),
    ("Mean", 17, IMAGE, [numbers(4, 1, 1), numbers(8)], {}),
    ("Pow", 17, IMAGE, [scalar(2.0)], {}),
    ("Pow", 17, IMAGE, [np.int64(3)], {}),
    ("Mod", 17, IMAGE, [numbers(8)], {"fmod": 1}),
    # products
    ("MatMul", 17, IMAGE, [numbers(8, 5)], {}),
    ("Gemm", 9, [3, 4], [numbers(4, 5), numbers(5)], {}),
    ("Gemm", 17, [3, 4], [numbers(5, 4)], {"transB": 1, "alpha": 0.5}),
    (
        "Gemm",
        17,
        [4, 3],
        [numbers(5, 4), numbers(3, 1)],
        {"transA": 1, "transB": 1, "beta": 2.0},
    ),
    ("Einsum", 17, IMAGE, [numbers(4, 5)], {"equation": "bchw,cd->bdhw"}),
    # reductions
    *[
        (op_type, 13, [2, 2, 2, 3], [], {"axes": [1, -1], "keepdims": keep})
        for op_type in [
            "ReduceL1",
            "ReduceL2",
            "ReduceLogSumExp",
            "ReduceMax",
            "ReduceMean",
            "ReduceMin",
            "ReduceProd",
            "ReduceSumSquare",
        ]
        for keep in (0, 1)
    ],
    *[
        (op_type, 18, [2, 2, 2, 3], [ints(2, -1)], {"keepdims": 0})
        for op_type in [
            "ReduceL1",
            "ReduceL2",
            "ReduceLogSumExp",
            "ReduceMax",
            "ReduceMean",
            "ReduceMin",
            "ReduceProd",
            "ReduceSum",
            "ReduceSumSquare",
        ]
    ],
    ("ReduceSum", 11, IMAGE, [], {"axes": [1]}),
    ("ReduceMean", 13, IMAGE, [], {}),
    ("ReduceMean", 18, IMAGE, [], {"noop_with_empty_axes": 1}),
    ("ArgMax", 13, IMAGE, [], {"axis": 1}),
    ("ArgMin", 13, IMAGE, [], {"axis": -1, "keepdims": 0, "select_last_index": 1}),
    # shapes
    ("Shape", 13, IMAGE, [], {}),
    ("Shape", 15, IMAGE, [], {"start": 1, "end": -1}),
    ("Size", 13, IMAGE, [], {}),
    ("Reshape", 13, IMAGE, [ints(0, -1, 3)], {}),
    ("Flatten", 13, IMAGE, [], {}),
    ("Flatten", 13, IMAGE, [], {"axis": -1}),
    ("Flatten", 13, IMAGE, [], {"axis": 0}),
    ("Transpose", 13, IMAGE, [], {"perm": [0, 2, 3, 1]}),
    ("Transpose", 13, IMAGE, [], {}),
    ("Squeeze", 11, [1, 4, 1, 3], [], {"axes": [2]}),
    ("Squeeze", 13, [1, 4, 1, 3], [], {}),
    ("Squeeze", 13, [1, 4, 1, 3], [ints(0, -2)], {}),
    ("Unsqueeze", 11, IMAGE, [], {"axes": [0, 5]}),
    ("Unsqueeze", 13, IMAGE, [ints(-1, 2)], {}),
    ("Concat", 13, IMAGE, [numbers(2, 3, 9, 8)], {"axis": 1}),
    ("Slice", 9, IMAGE, [], {"starts": [1, -3], "ends": [9, -1], "axes": [1, 3]}),
    ("Slice", 13, IMAGE, [ints(1, 2), ints(2**62, -1), ints(1, 2), ints(1, 2)], {}),
    ("Slice", 13, IMAGE, [ints(-1), ints(-(2**62)), ints(3), ints(-1)], {}),
    ("Slice", 13, IMAGE, [ints(7), ints(1), ints(-1), ints(-2)], {}),
    ("Slice", 13, IMAGE, [ints(0, 1), ints(1, 3)], {}),
    ("Gather", 13, IMAGE, [ints(2, -1)], {"axis": 1}),
    ("Gather", 13, IMAGE, [np.asarray([[0, 1], [-2, 3]])], {"axis": -1}),
    ("Gather", 13, IMAGE, [np.int64(1)], {"axis": 2}),
    ("GatherElements", 13, [2, 3], [np.asarray([[0, -1], [1, 1]])], {"axis": 1}),
    ("Expand", 13, [2, 1, 3], [ints(4, 1, 5, 1)], {}),
    ("Tile", 13, [2, 3], [ints(2, 3)], {}),
    ("Cast", 13, IMAGE, [], {"to": TensorProto.INT32}),
    ("Cast", 13, IMAGE, [], {"to": TensorProto.BOOL}),
    ("CastLike", 19, IMAGE, [np.float64([1])], {}),
]


def finish(build, *outputs):
    """The model; types of outputs, which need not be floats here, are inferred."""
    infos = [helper.make_empty_tensor_value_info(name) for name in outputs]
    graph = helper.make_graph(build.nodes, "test", build.inputs, infos, build.initializers)
    opsets = [helper.make_opsetid("", build.opset)]
    proto = helper.make_model(graph, opset_imports=opsets, ir_version=build.ir_version)
    return onnx.shape_inference.infer_shapes(proto)


def compare(proto, tolerance=1e-5):
    feeds = random_input(proto)
    expected = run(proto, feeds)
    module = bridge(load(proto, check=False))  # some of the opsets are past
    got = module({name: torch.from_numpy(array) for name, array in feeds.items()})
    for info, want in zip(proto.graph.output, expected, strict=True):
        have = got[info.name].detach().numpy()
        assert have.shape == want.shape
        assert have.dtype == want.dtype
        if want.dtype.kind != "f":
            np.testing.assert_array_equal(have, want)
        else:
            scale = np.abs(want).max()
            assert scale > 1e-3
            assert np.abs(have - want).max() <= tolerance * scale


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}-{case[1]}")
def test_like_onnxruntime(case):
    op_type, opset, shape, constants, attributes = case
    build = ModelBuilder(shape, opset=opset)
    names = ["" if c is None else build.constant(c, dtype=np.asarray(c).dtype) for c in constants]
    compare(finish(build, build.op(op_type, "x", *names, **attributes)))


@pytest.mark.parametrize(
    ("opset", "sizes", "attributes"),
    [
        (11, None, {"split": [1, 3]}),
        (13, [3, 1], {}),
        (13, None, {}),
        (18, None, {"num_outputs": 3}),
    ],
)
def test_split(opset, sizes, attributes):
    build = ModelBuilder([2, 4, 5], opset=opset)
    names = [] if sizes is None else [build.constant(sizes, dtype=np.int64)]
    outputs = ["a", "b", "c"] if "num_outputs" in attributes else ["a", "b"]
    axis = 2 if "num_outputs" in attributes else 1
    build.op("Split", "x", *names, outputs=outputs, axis=axis, **attributes)
    compare(finish(build, *outputs))


@pytest.mark.parametrize(
    ("opset", "count", "attributes"),
    [(9, None, {"k": 3}), (11, 3, {"axis": 1, "largest": 0}), (17, 2, {"axis": 2, "sorted": 1})],
)
def test_top_k(opset, count, attributes):
    build = ModelBuilder(IMAGE, opset=opset)
    names = [] if count is None else [build.constant(ints(count), dtype=np.int64)]
    build.op("TopK", "x", *names, outputs=["values", "indices"], **attributes)
    compare(finish(build, "values", "indices"))


def test_positive_inputs():
    build = ModelBuilder([2, 5])
    x = build.op("Add", build.op("Abs", "x"), build.constant(0.1))
    outputs = [build.op(op_type, x) for op_type in ("Log", "Sqrt")]
    outputs.append(build.op("ReduceLogSum", x, axes=[1]))
    compare(finish(build, *outputs))


def test_booleans():
    build = ModelBuilder([2, 5])
    a = build.op("Greater", "x", build.constant(0.0))
    b = build.op("Less", "x", build.constant(0.5))
    outputs = [build.op(op_type, a, b) for op_type in ("And", "Or", "Xor")]
    outputs.append(build.op("Not", a))
    outputs.append(build.op("Where", a, "x", build.constant(nonzero(RNG, 5))))
    compare(finish(build, *outputs))


def test_integers():
    build = ModelBuilder([2, 5, 7])
    sizes = build.op("Shape", "x")
    three = build.constant([-3], dtype=np.int64)
    divided = build.op("Div", build.op("Neg", sizes), three)
    rest = build.op("Mod", sizes, three)
    zeros = build.op(
        "ConstantOfShape",
        sizes,
        value=helper.make_tensor("value", TensorProto.INT64, [1], [4]),
    )
    start, step = build.constant(1, dtype=np.int64), build.constant(2, dtype=np.int64)
    counted = build.op("Range", start, build.op("Size", "x"), step)
    compare(finish(build, divided, rest, zeros, counted))


def test_swish():
    # onnxruntime does not have it yet.
    build = ModelBuilder([2, 5], opset=24)
    y = build.op("Swish", "x", alpha=0.7)
    x = torch.randn(2, 5, generator=torch.Generator().manual_seed(1))
    module = bridge(load(finish(build, y)))
    assert torch.allclose(module(x)[y], x / (1 + torch.exp(-0.7 * x)))


def standard_operators():
    """Without those that searches add to a graph for themselves."""
    return {name for name in OPERATORS if not name.startswith("Graphfold")}


def test_every_operator_is_tested_here():
    tested = {case[0] for case in CASES}
    tested |= {
        "Split",
        "TopK",
        "Add",
        "Log",
        "Sqrt",
        "ReduceLogSum",
        "And",
        "Or",
        "Xor",
        "Not",
        "Where",
        "Div",
        "Mod",
        "ConstantOfShape",
        "Range",
        "Swish",
    }
    assert tested == standard_operators()


def test_every_operator_is_in_the_documentation():
    text = (Path(__file__).parent.parent / "docs" / "torch.md").read_text()
    listed = text.split("meaning they have in each opset:")[1].split(".")[0]
    assert {name.strip() for name in listed.split(",")} == standard_operators()


# onnxruntime divides by the rounded size here, the standard by the size before rounding.
RUNTIME_DIFFERS = {
    "test_resize_downsample_scales_linear_align_corners",
    "test_resize_downsample_scales_cubic_align_corners",
}


def runs_in_torch(case):
    return (
        case.name not in RUNTIME_DIFFERS
        and all(node.op_type in OPERATORS and not node.domain for node in case.model.graph.node)
        and all(
            isinstance(item, np.ndarray | np.generic) and item.dtype.char in "?bBhilqefd"
            for inputs, outputs in case.data_sets
            for item in (*inputs, *outputs)
        )
        and all(np.size(item) for inputs, _ in case.data_sets for item in inputs[:1])
    )


@pytest.mark.slow
def test_what_the_standard_prescribes():
    """The one-operator models of the onnx package, with their stored outputs."""
    compared = 0
    for case in filter(runs_in_torch, node_cases()):
        try:
            module = bridge(load(case.model, check=False))
        except BridgeError:
            continue
        for inputs, outputs in case.data_sets:
            feeds = {
                info.name: torch.from_numpy(np.array(item))
                for info, item in zip(case.model.graph.input, inputs, strict=True)
                if info.name in module.input_names
            }
            got = module(feeds)
            for info, want in zip(case.model.graph.output, outputs, strict=True):
                have = got[info.name].numpy()
                assert have.shape == want.shape, case.name
                assert have.dtype == want.dtype, case.name
                np.testing.assert_allclose(have, want, 1e-3, 1e-6, err_msg=case.name)
        compared += 1
    assert compared > 600


@pytest.mark.parametrize(
    ("op_type", "attributes", "outputs"),
    [
        ("Resize", {"antialias": 1, "mode": "linear"}, 1),
        ("Resize", {"coordinate_transformation_mode": "tf_crop_and_resize"}, 1),
        ("MaxPool", {"kernel_shape": [2, 2]}, 2),
        ("BatchNormalization", {"training_mode": 1}, 1),
    ],
)
def test_refused(op_type, attributes, outputs):
    build = ModelBuilder(IMAGE, opset=18)
    inputs = []
    if op_type == "Resize":
        roi = build.constant([0, 0, 0, 0, 1, 1, 1, 1])
        inputs = [roi, build.constant([1, 1, 2, 2])]
    if op_type == "BatchNormalization":
        inputs = [build.constant(positive(4)) for _ in range(4)]
    names = ["y", "indices"][:outputs]
    build.op(op_type, "x", *inputs, outputs=names, **attributes)
    with pytest.raises(BridgeError, match=f"{op_type}: .* supported.*: n_y"):
        bridge(load(finish(build, *names), check=False))

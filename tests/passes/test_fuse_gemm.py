"""A product with a matrix and the constant behind it become one Gemm."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import onnx
import pytest
from builders import ModelBuilder, fold, nonzero, op_types, random_input, reasons, run
from onnx import TensorProto, helper


def fused(proto: onnx.ModelProto, tolerance: float = 1e-6) -> onnx.ModelProto:
    folded, _ = fold(proto, "fuse_gemm")
    onnx.checker.check_model(folded)
    feeds = random_input(proto, {"N": 3})
    for one, two in zip(run(proto, feeds), run(folded, feeds), strict=True):
        assert (one.dtype, one.shape) == (two.dtype, two.shape)
        np.testing.assert_allclose(one, two, rtol=tolerance, atol=tolerance)
    again, statistics = fold(folded, "fuse_gemm")
    assert again == folded
    assert statistics["fuse_gemm"].applied == 0
    return folded


def affine(build: ModelBuilder, bias: tuple[int, ...], *, first: bool = False) -> str:
    product = build.op("MatMul", "x", build.constant(nonzero(build.rng, 5, 4), "w"), out="p")
    added = build.constant(nonzero(build.rng, *bias), "b")
    return build.op("Add", *((added, product) if first else (product, added)), out="y")


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("bias", [(4,), (1, 4)])
@pytest.mark.parametrize("batch", [3, "N"])
def test_they_become_one(bias: tuple[int, ...], first: bool, batch: int | str) -> None:
    build = ModelBuilder([batch, 5])
    folded = fused(build.model(affine(build, bias, first=first)))
    (node,) = folded.graph.node
    assert (node.op_type, list(node.input), list(node.output)) == ("Gemm", ["x", "w", "b"], ["y"])
    metadata = {prop.key: prop.value for prop in node.metadata_props}
    assert json.loads(metadata["graphfold.replaces"]) == ["n_p", "n_y"]


@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float64, 1e-12), (np.float16, 1e-2)])
def test_other_floats_do_too(dtype: Any, tolerance: float) -> None:
    build = ModelBuilder([3, 5], dtype=dtype)
    assert op_types(fused(build.model(affine(build, (4,))), tolerance)) == ["Gemm"]


@pytest.mark.parametrize("bias", [(), (1,), (3, 1), (3, 4), (1, 1, 4)])
def test_what_is_not_one_value_per_column_stays(bias: tuple[int, ...]) -> None:
    build = ModelBuilder([3, 5])
    assert op_types(fused(build.model(affine(build, bias)))) == ["MatMul", "Add"]


@pytest.mark.parametrize("shape", [[2, 3, 5], [5]])
def test_other_ranks_stay(shape: list[int]) -> None:
    build = ModelBuilder(shape)
    assert op_types(fused(build.model(affine(build, (4,))))) == ["MatMul", "Add"]


def test_integers_and_matrices_that_callers_may_replace_stay() -> None:
    build = ModelBuilder([3, 5], dtype=np.int64)
    product = build.op("MatMul", "x", build.constant(np.ones((5, 4))))
    model = build.model(build.op("Add", product, build.constant([1, 2, 3, 4])))
    assert op_types(fused(model)) == ["MatMul", "Add"]
    build = ModelBuilder([3, 5])
    info = helper.make_tensor_value_info("w", TensorProto.FLOAT, [5, 4])
    model = build.model(affine(build, (4,)), more_inputs=[info])
    assert op_types(fused(model)) == ["MatMul", "Add"]


def test_a_product_that_is_needed_elsewhere_stays() -> None:
    build = ModelBuilder([3, 5])
    model = build.model(affine(build, (4,)), "p")
    folded, statistics = fold(model, "fuse_gemm")
    assert op_types(folded) == ["MatMul", "Add"]
    assert reasons(statistics)["y"] == "'p' is needed elsewhere too"


def test_before_opset_7_gemm_is_another_operator() -> None:
    build = ModelBuilder([3, 5], opset=6)
    product = build.op("MatMul", "x", build.constant(nonzero(build.rng, 5, 4)))
    y = build.op("Add", product, build.constant(nonzero(build.rng, 4)), broadcast=1)
    assert op_types(fold(build.model(y), "fuse_gemm")[0]) == ["MatMul", "Add"]

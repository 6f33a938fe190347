"""Rounding bounds of single folds: never exceeded, and not far from what happens."""

from __future__ import annotations

import statistics
from dataclasses import replace

import numpy as np
import pytest
from builders import ModelBuilder
from hypothesis import given, settings
from hypothesis import strategies as st

import graphfold
from graphfold.affine import AffineConv
from graphfold.bounds import coefficients, rounding_error
from graphfold.errors import VerificationError
from graphfold.geometry import Axis
from graphfold.rewrite import recorded_folds


def computed_in(affine: AffineConv, x: np.ndarray, dtype: type) -> np.ndarray:
    """The fold as a runtime computes it: everything cast, products added one after another."""
    weight, bias = affine.weight.astype(dtype), affine.bias.astype(dtype)
    axes = affine.axes
    padded = np.pad(x.astype(dtype), [(0, 0), (0, 0), *[(a.begin, a.end) for a in axes]])
    sizes = [axis.output_size(size) for axis, size in zip(axes, x.shape[2:], strict=True)]
    out, width = weight.shape[:2]
    per_group = out // affine.groups
    result = np.zeros((x.shape[0], out, *sizes), dtype)
    for channel in range(out):
        first = channel // per_group * width
        for tap in np.ndindex(*weight.shape[2:]):
            window = tuple(
                slice(t * a.dilation, t * a.dilation + (n - 1) * a.stride + 1, a.stride)
                for t, a, n in zip(tap, axes, sizes, strict=True)
            )
            for source in range(width):
                seen = padded[(slice(None), first + source, *window)]
                result[:, channel] += weight[(channel, source, *tap)] * seen
    return result + bias.reshape(-1, *[1] * len(axes))


@st.composite
def folds(draw: st.DrawFn) -> tuple[AffineConv, np.ndarray]:
    rank = draw(st.integers(1, 2))
    axes = tuple(
        Axis(
            draw(st.integers(1, 3)),
            draw(st.integers(1, 2)),
            draw(st.integers(1, 2)),
            draw(st.integers(0, 2)),
            draw(st.integers(0, 2)),
        )
        for _ in range(rank)
    )
    groups = draw(st.sampled_from([1, 2, 4]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    # Magnitudes from 1e-4 to 1e4, of either sign: cancellation is what bounds are for.
    spread = 10.0 ** rng.uniform(-4, 4, (4, 4 // groups, *[axis.kernel for axis in axes]))
    weight = spread * rng.choice([-1.0, 1.0], spread.shape)
    affine = AffineConv(weight, rng.normal(size=4) * 100, axes, groups)
    x = rng.normal(size=(1, 4, *[7] * rank)) * 10.0 ** rng.uniform(-3, 3)
    return affine, x.astype(np.float32)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(folds())
def test_the_measured_error_never_exceeds_the_bound(case: tuple[AffineConv, np.ndarray]) -> None:
    affine, x = case
    found = rounding_error(affine, x, computed_in(affine, x, np.float32))
    assert found is not None
    assert found.holds
    assert found.measured <= found.bound


def test_the_bound_is_exceeded_by_a_wrong_weight() -> None:
    rng = np.random.default_rng(0)
    affine = AffineConv(rng.normal(size=(3, 3, 3)), rng.normal(size=3), (Axis(3, begin=1),))
    x = rng.normal(size=(1, 3, 9)).astype(np.float32)
    wrong = replace(affine, weight=affine.weight * (1 + 1e-4))
    found = rounding_error(affine, x, computed_in(wrong, x, np.float32))
    assert found is not None
    assert not found.holds


def test_apply_agrees_with_a_plain_loop() -> None:
    rng = np.random.default_rng(1)
    axes = (Axis(3, 2, 2, 1, 3), Axis(2, 1, 1, 0, 1))
    affine = AffineConv(rng.normal(size=(4, 2, 3, 2)), rng.normal(size=4), axes, 2)
    x = rng.normal(size=(2, 4, 9, 5))
    np.testing.assert_allclose(affine.apply(x), computed_in(affine, x, np.float64), atol=1e-12)


def test_apply_crops_where_padding_is_negative_and_adds_the_border() -> None:
    rng = np.random.default_rng(2)
    affine = AffineConv(
        rng.normal(size=(2, 2, 2)), rng.normal(size=2), (Axis(2, begin=-1, end=1),), 1,
        rng.normal(size=(2, 2)),
    )  # fmt: skip
    x = rng.normal(size=(1, 2, 6))
    plain = replace(affine, axes=(Axis(2, end=1),), border=None).apply(x[..., 1:])
    border = affine.border_map([6]) - affine.bias[:, None]
    np.testing.assert_allclose(affine.apply(x), plain + border, atol=1e-12)


def linear_block() -> ModelBuilder:
    build = ModelBuilder([1, 8, 12, 12])
    wide = build.norm(build.conv("x", 32, 1))
    middle = build.norm(build.depthwise(wide, 3, pad=1))
    build.op("Add", build.norm(build.conv(middle, 8, 1)), "x", out="sum")
    return build


def test_every_fold_of_a_model_carries_a_bound_that_holds() -> None:
    build = linear_block()
    result = graphfold.optimize(build.model(build.op("Relu", "sum", out="y")))
    fold = result.report.to_json()["folds"][0]
    assert 0 < fold["rounding"] < fold["bound"]
    assert fold["rounding"] < fold["estimate"] < fold["bound"]
    recorded = recorded_folds(result.folded.ir.graph)[0]
    assert recorded.coefficients == result.report.folds[0].coefficients
    assert recorded.coefficients is not None
    assert recorded.coefficients.terms == 8 * 9 + 1 + 9


def test_the_recorded_coefficients_bound_the_output_for_any_input() -> None:
    rng = np.random.default_rng(3)
    affine = AffineConv(rng.normal(size=(3, 2, 3)), rng.normal(size=3), (Axis(3, begin=1, end=1),))
    known = coefficients(affine)
    x = rng.uniform(-2, 2, size=(5, 2, 9))
    assert np.abs(affine.apply(x)).max() <= known.gain * 2 + known.offset


def test_the_estimate_is_within_a_hundred_times_the_error_in_the_median() -> None:
    ratios = []
    for seed in range(20):
        rng = np.random.default_rng(seed)
        affine = AffineConv(
            rng.normal(size=(4, 16, 3)), rng.normal(size=4), (Axis(3, begin=1, end=1),)
        )
        x = rng.normal(size=(1, 16, 20)).astype(np.float32)
        found = rounding_error(affine, x, computed_in(affine, x, np.float32))
        assert found is not None
        ratios.append(found.estimate / found.measured)
    assert 0.1 < statistics.median(ratios) < 100


def test_a_wrong_fold_behind_a_saturating_activation_is_still_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import graphfold.merge as merge

    build = linear_block()
    # y is 1 whatever the fold computes
    high = build.constant(1.0)
    shifted = build.op("Add", "sum", build.constant(1e6))
    model = build.model(build.op("Min", shifted, high, out="y"))
    right = merge.region_affine

    def wrong(graph: object, region: object) -> AffineConv:
        affine = right(graph, region)  # type: ignore[arg-type]
        return replace(affine, weight=affine.weight * 1.01)

    assert graphfold.optimize(model).report.folds
    monkeypatch.setattr(merge, "region_affine", wrong)
    with pytest.raises(VerificationError, match=r"outputs agree, and a fold does not.*'sum'"):
        graphfold.optimize(model)

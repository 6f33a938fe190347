"""A part of the matrix of masks and exports, and that its comparison can fail."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "examples")]

import matrix  # noqa: E402
import plans  # noqa: E402

import graphfold  # noqa: E402
from graphfold.model import to_proto  # noqa: E402


@pytest.mark.parametrize(
    ("form", "mask"),
    matrix.QUICK,
    ids=lambda item: item if isinstance(item, str) else f"{item.network}-{item.exporter}",
)
def test_folded_equals_reference(form: matrix.Form, mask: str):
    hoist, exact = matrix.run_form(form, [mask], matrix.BOUNDARIES, None)
    for cell in (hoist, exact):
        assert cell.equal, cell
        assert cell.largest_error > 0  # two networks, not one
        assert cell.worst_tensor
        removed = plans.DEPTHSHRINKER[form.network][mask][1:].count("0")
        original, folded = cell.convolutions
        # Where sizes are open, a border repair is a small convolution of its own.
        repairs = removed if form.dynamic and cell.boundary == "exact" else 0
        assert folded == original - 2 * removed + repairs
    assert exact.by_hand_error == 0  # the reference is the same network, operator by operator
    assert hoist.by_hand_error is None


def test_in_float64_folding_is_exact_to_float64():
    form, mask = matrix.QUICK[0]
    proto = matrix.exported(form, None)
    cell = matrix.run_cell(proto, form, mask, "exact")
    plan = plans.keep_blocks(form.network, mask)
    result = graphfold.optimize(proto, plan, verify=False)
    double = matrix.in_double(cell, proto, to_proto(result.reference), result.model)
    assert double.double_error is not None
    assert 0 < double.double_error < 1e-12
    assert double.double_folded is not None
    assert double.double_reference is not None
    assert 1e-8 < double.double_folded < matrix.TOLERANCE
    assert 1e-8 < double.double_reference < matrix.TOLERANCE


def test_every_dimension_is_in_the_quick_part():
    quick = [form for form, _ in matrix.QUICK]
    for field in ("keep_bn", "exporter", "dynamic"):
        assert {getattr(f, field) for f in quick} == {getattr(f, field) for f in ALL}


ALL = matrix.forms(list(plans.DEPTHSHRINKER))


def test_whole_matrix_holds_all_masks_and_forms():
    assert len(set(ALL)) == 4 * 2 * 5 * 2
    masks = sum(len(plans.DEPTHSHRINKER[form.network]) for form in ALL)
    assert masks * len(matrix.BOUNDARIES) == 18 * 2 * 5 * 2 * 2


def test_a_wrong_border_is_seen_and_told_apart():
    expected = np.ones((1, 2, 6, 6), dtype=np.float32)
    for place, border in ((0, True), (3, False)):
        actual = expected.copy()
        actual[0, 1, place, 3] += 0.5
        worst = matrix._Worst()
        worst.add("t", expected, actual, [(1, 1), (1, 1)])
        assert worst.tensor == "t"
        assert (worst.border, worst.interior) == ((0.5, 0.0) if border else (0.0, 0.5))


def test_what_is_not_finite_is_no_match():
    expected = np.ones((1, 1, 2, 2), dtype=np.float32)
    assert matrix.relative(expected, expected * np.float32("nan")) == np.inf


def test_another_mask_is_another_network():
    form, mask = matrix.QUICK[0]
    proto = matrix.exported(form, None)
    x = matrix.images(1, form.size, form.size)
    name = proto.graph.output[0].name
    right = matrix.run(matrix.bypassed_by_hand(proto, form.network, mask), x)[name]
    other = matrix.run(matrix.bypassed_by_hand(proto, form.network, "A"), x)[name]
    assert matrix.relative(right, other) > 1e-2

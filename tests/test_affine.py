"""The algebra of affine convolutions against its definition, in float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from builders import Array, as_model, assert_same, nonzero, random_affine, run, slow_conv
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

from graphfold.affine import AffineConv, identity, scale_shift, stack, zero_pad
from graphfold.errors import NotExactError
from graphfold.geometry import Axis, Geometry

# Most random pairs of windows are refused: discarding them is the point, not a mistake.
ci = settings(
    derandomize=True,
    deadline=None,
    max_examples=120,
    database=None,
    suppress_health_check=[HealthCheck.filter_too_much],
)


def rng_of(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def same(kernel: int, stride: int = 1, dilation: int = 1) -> Axis:
    """Padding that keeps the size at stride 1."""
    reach = (kernel - 1) * dilation
    return Axis(kernel, stride, dilation, reach // 2, reach - reach // 2)


def square(axis: Axis, rank: int = 2) -> tuple[Axis, ...]:
    return (axis,) * rank


def assert_composes(first: AffineConv, second: AffineConv, sizes: Sequence[int]) -> AffineConv:
    """`then` equals applying one after the other, at the border and inside."""
    channels = first.weight.shape[1] * first.groups
    x = nonzero(rng_of(9), channels, *sizes)
    expected = slow_conv(slow_conv(x, first), second)
    merged = first.then(second, sizes)
    actual = slow_conv(x, merged)
    scale = np.abs(expected).max()
    reach = max(axis.extent for axis in merged.axes)
    assert_same(expected[None] / scale, actual[None] / scale, reach=reach)
    return merged


# --- worked values ----------------------------------------------------------------------------


def test_two_3x3_become_one_5x5():
    rng = rng_of()
    first = random_affine(rng, square(Axis(3)), 2, 3)
    second = random_affine(rng, square(Axis(3)), 3, 4)
    merged = assert_composes(first, second, (8, 9))
    assert merged.geometry.kernel == (5, 5)
    assert merged.geometry.strides == (1, 1)


def test_3x3_stride_2_then_3x3_becomes_7x7_stride_2():
    rng = rng_of()
    first = random_affine(rng, square(Axis(3, 2)), 2, 3)
    second = random_affine(rng, square(Axis(3)), 3, 2)
    merged = assert_composes(first, second, (11, 12))
    assert merged.geometry.kernel == (7, 7)
    assert merged.geometry.strides == (2, 2)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [6, 7])
def test_pointwise_depthwise_pointwise_becomes_dense_with_a_border(stride: int, size: int):
    rng = rng_of(stride)
    expand = random_affine(rng, square(Axis()), 2, 6)
    spatial = random_affine(rng, square(same(3, stride)), 6, 6, groups=6)
    project = random_affine(rng, square(Axis()), 6, 4)
    merged = expand.then(spatial, (size, size)).then(project, (size, size))
    assert merged.weight.shape == (4, 2, 3, 3)
    assert merged.geometry.strides == (stride, stride)
    assert merged.axes[0].begin == merged.axes[0].end == 1
    assert merged.border is not None
    x = nonzero(rng, 2, size, size)
    expected = slow_conv(slow_conv(slow_conv(x, expand), spatial), project)
    np.testing.assert_allclose(slow_conv(x, merged), expected, atol=1e-12)


def test_dropping_the_border_kernel_is_wrong_at_the_border_only():
    rng = rng_of()
    expand = random_affine(rng, square(Axis()), 2, 6)
    spatial = random_affine(rng, square(same(3)), 6, 6, groups=6)
    merged = expand.then(spatial)
    x = nonzero(rng, 2, 7, 7)
    expected = slow_conv(x, merged)
    naive = slow_conv(x, merged.without_border())
    np.testing.assert_allclose(naive[:, 1:-1, 1:-1], expected[:, 1:-1, 1:-1], atol=1e-12)
    assert np.abs(naive - expected)[:, 0].min() > 1e-2


@pytest.mark.parametrize("kernels", [(3, 3, 3), (1, 5, 2, 3), (7, 3)])
def test_a_chain_of_stride_1_kernels_spans_one_plus_the_sum_of_reaches(kernels: tuple[int, ...]):
    geometry = Geometry((Axis(kernels[0]),), 2, 2)
    for kernel in kernels[1:]:
        geometry = geometry.then(Geometry((Axis(kernel),), 2, 2))
    assert geometry.kernel == (1 + sum(kernel - 1 for kernel in kernels),)


def hoisted(kernels: Sequence[tuple[int, int]], channels: Sequence[int]) -> Geometry:
    """A chain of convolutions whose padding all stands at the first one."""
    first = Axis(kernels[0][0], kernels[0][1])
    pad, step = 0, 1
    for kernel, stride in kernels:
        pad += (kernel - 1) // 2 * step
        step *= stride
    geometry = Geometry((replace(first, begin=pad, end=pad),) * 2, channels[0], channels[1])
    for (kernel, stride), width, out in zip(kernels[1:], channels[1:], channels[2:], strict=False):
        geometry = geometry.then(Geometry((Axis(kernel, stride),) * 2, width, out))
    return geometry


@pytest.mark.parametrize(
    ("depthwise_strides", "channels", "kernel", "stride", "pad"),
    [
        ([1, 1, 1, 1, 1, 1, 2], (64, 160), 15, 2, 7),
        ([1, 1, 2], (32, 64), 7, 2, 3),
        ([1, 1, 1], (160, 320), 7, 1, 3),
    ],
    ids=["(20, 41]", "(11, 20]", "(41, 50]"],
)
def test_hoisted_segments_of_mobilenet_v2_have_the_published_windows(
    depthwise_strides: list[int], channels: tuple[int, int], kernel: int, stride: int, pad: int
):
    """Each 3x3 stands between two pointwise convolutions."""
    kernels = [each for s in depthwise_strides for each in ((1, 1), (3, s), (1, 1))]
    widths = [channels[0], *[96] * (len(kernels) - 1), channels[1]]
    merged = hoisted(kernels, widths)
    assert (merged.kernel, merged.strides) == ((kernel,) * 2, (stride,) * 2)
    assert {(axis.begin, axis.end) for axis in merged.axes} == {(pad, pad)}
    assert (merged.in_channels, merged.out_channels, merged.groups) == (*channels, 1)


# --- dilation and groups ----------------------------------------------------------------------


@pytest.mark.parametrize("dilated_first", [True, False])
def test_1x1_beside_a_dilated_kernel_keeps_the_dilation(dilated_first: bool):
    rng = rng_of()
    dilated = random_affine(rng, square(Axis(3, 1, 2)), 3, 3)
    pointwise = random_affine(rng, square(Axis()), 3, 3)
    pair = (dilated, pointwise) if dilated_first else (pointwise, dilated)
    merged = assert_composes(*pair, (8, 8))
    assert merged.geometry.kernel == (3, 3)
    assert merged.axes[0].dilation == 2


def test_stride_before_a_kernel_becomes_its_dilation():
    rng = rng_of()
    strided = random_affine(rng, square(Axis(1, 2)), 2, 3)
    merged = assert_composes(strided, random_affine(rng, square(Axis(3)), 3, 2), (9, 8))
    assert merged.axes[0] == Axis(3, 2, 2, 0, 0)


def test_dilations_with_a_common_step_keep_that_step():
    one, two = Axis(3, 1, 4), Axis(2, 1, 6)
    assert one.then(two) == Axis(kernel=8, stride=1, dilation=2)


@pytest.mark.parametrize(
    ("first_groups", "second_groups", "groups"),
    [(12, 12, 12), (4, 4, 4), (12, 4, 4), (4, 12, 4), (4, 6, 2), (3, 4, 1), (1, 12, 1), (12, 1, 1)],
)
def test_grouping_is_the_greatest_that_both_share(
    first_groups: int, second_groups: int, groups: int
):
    rng = rng_of(first_groups * 13 + second_groups)
    first = random_affine(rng, square(same(3)), 12, 12, first_groups)
    second = random_affine(rng, square(Axis()), 12, 12, second_groups)
    merged = assert_composes(first, second, (4, 5))
    assert merged.groups == groups
    # Every block of the grouping is needed: no finer one would hold the numbers.
    blocks = np.abs(merged.with_groups(1).weight).sum(axis=(2, 3)) > 1e-9
    inside = np.kron(np.eye(groups), np.ones((12 // groups, 12 // groups))) > 0
    assert not np.any(blocks & ~inside)


def test_channel_multipliers_stay_grouped():
    rng = rng_of()
    widen = random_affine(rng, square(Axis(3)), 4, 8, groups=4)
    depthwise = random_affine(rng, square(Axis(2)), 8, 8, groups=8)
    narrow = random_affine(rng, square(Axis()), 8, 4, groups=4)
    merged = assert_composes(widen, depthwise, (7, 6))
    assert merged.groups == 4
    merged = assert_composes(merged, narrow, (7, 6))
    assert merged.groups == 4


def test_weights_of_a_depthwise_pair_are_never_spread_over_all_channels():
    channels = 4096
    rng = rng_of()
    first = random_affine(rng, square(Axis(3)), channels, channels, channels)
    second = random_affine(rng, square(Axis()), channels, channels, channels)
    merged = first.then(second)
    assert merged.weight.shape == (channels, 1, 3, 3)


@pytest.mark.parametrize("groups", [1, 2, 3])
def test_fewer_groups_hold_the_same_map(groups: int):
    rng = rng_of()
    conv = random_affine(rng, square(same(3)), 6, 12, groups=6, border=True)
    x = nonzero(rng, 6, 5, 4)
    dense = conv.with_groups(groups)
    assert dense.weight.shape[1] == 6 // groups
    np.testing.assert_allclose(slow_conv(x, dense), slow_conv(x, conv), atol=1e-12)


# --- every geometry that is not refused, and every one that is ----------------------------------


@st.composite
def axis_of(draw: st.DrawFn, *, kernels: int = 3, pads: tuple[int, int] = (0, 2)) -> Axis:
    return Axis(
        kernel=draw(st.integers(1, kernels)),
        stride=draw(st.integers(1, 3)),
        dilation=draw(st.integers(1, 2)),
        begin=draw(st.integers(*pads)),
        end=draw(st.integers(*pads)),
    )


@st.composite
def composable_axis_pair(draw: st.DrawFn) -> tuple[Axis, Axis]:
    """Pairs biased towards what `then` accepts: the first window must fit into its padding."""
    first, second = draw(axis_of(pads=(-1, 2))), draw(axis_of(pads=(-1, 2)))
    if draw(st.booleans()):
        first = replace(first, kernel=1)
    elif draw(st.booleans()):
        reach = first.extent - 1
        first = replace(first, begin=reach, end=reach)
    return first, second


@st.composite
def grouped_channels(draw: st.DrawFn) -> tuple[int, int, int, int, int]:
    """(in, mid, out, first groups, second groups)."""
    one, two = draw(st.sampled_from([1, 2, 4])), draw(st.sampled_from([1, 2, 4]))
    return one * draw(st.integers(1, 2)), 4, two * draw(st.integers(1, 2)), one, two


def sizes_allow(axes: Sequence[Axis], sizes: Sequence[int]) -> bool:
    return all(
        size + axis.begin + axis.end >= axis.extent and size + min(axis.begin, axis.end) > 0
        for axis, size in zip(axes, sizes, strict=True)
    )


def check_composition(
    rank: int,
    data: st.DataObject,
    *,
    smallest: int,
    largest: int,
    know_sizes: bool,
) -> None:
    pairs = [data.draw(composable_axis_pair()) for _ in range(rank)]
    channels = data.draw(grouped_channels())
    sizes = [data.draw(st.integers(smallest, largest)) for _ in range(rank)]
    rng = rng_of(data.draw(st.integers(0, 1000)))
    into, mid, out, one, two = channels
    firsts, seconds = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    assume(sizes_allow(firsts, sizes))
    mids = [axis.output_size(size) for axis, size in zip(firsts, sizes, strict=True)]
    assume(sizes_allow(seconds, mids))
    first = random_affine(
        rng, firsts, into, mid, one, bias=data.draw(st.booleans()), border=data.draw(st.booleans())
    )
    second = random_affine(
        rng, seconds, mid, out, two, bias=data.draw(st.booleans()), border=data.draw(st.booleans())
    )
    known = sizes if know_sizes else None
    try:
        merged = first.then(second, known)
    except NotExactError:
        assume(False)
    shape = first.geometry.then(second.geometry, known)
    assert merged.axes == shape.axes
    assert merged.groups == shape.groups
    assert shape.bordered or merged.border is None
    x = nonzero(rng, into, *sizes)
    expected = slow_conv(slow_conv(x, first), second)
    np.testing.assert_allclose(slow_conv(x, merged), expected, atol=1e-10)


@ci
@given(st.data(), st.booleans())
def test_composition_is_exact_in_1d(data: st.DataObject, know_sizes: bool):
    check_composition(1, data, smallest=1, largest=14, know_sizes=know_sizes)


@settings(ci, max_examples=60)
@given(st.data(), st.booleans())
def test_composition_is_exact_in_2d(data: st.DataObject, know_sizes: bool):
    check_composition(2, data, smallest=2, largest=8, know_sizes=know_sizes)


@settings(ci, max_examples=20)
@given(st.data(), st.booleans())
def test_composition_is_exact_in_3d(data: st.DataObject, know_sizes: bool):
    check_composition(3, data, smallest=3, largest=5, know_sizes=know_sizes)


def matrix_of(conv: AffineConv, size: int) -> Array:
    """The linear part of a convolution of one channel along one axis, [outputs, size]."""
    (axis,) = conv.axes
    matrix = np.zeros((axis.output_size(size), size))
    for output in range(len(matrix)):
        for tap in range(axis.kernel):
            position = output * axis.stride - axis.begin + tap * axis.dilation
            if 0 <= position < size:
                matrix[output, position] += conv.weight[0, 0, tap]
    return matrix


def some_convolution_has(matrix: Array, stride: int) -> bool:
    """Whether entries depend only on the input's position relative to the window."""
    taps: dict[int, float] = {}
    for output, row in enumerate(matrix):
        for position, value in enumerate(row):
            known = taps.setdefault(position - output * stride, value)
            if abs(known - value) > 1e-9:
                return False
    return True


def some_tap_follows_the_domain(one: Axis, two: Axis, size: int) -> bool:
    """Whether a tap of `one` is inside exactly where `two` reads no padding."""
    count = one.output_size(size)
    windows = np.arange(two.output_size(count))[:, None] * two.stride - two.begin
    read = np.unique(windows + np.arange(two.kernel) * two.dilation)
    inside = (read >= 0) & (read < count)
    positions = read[:, None] * one.stride - one.begin + np.arange(one.kernel) * one.dilation
    follows = ((positions >= 0) & (positions < size)) == inside[:, None]
    return bool(np.any(np.all(follows, axis=0)))


@settings(ci, max_examples=400)
@given(axis_of(), axis_of(), st.integers(40, 49))
@example(Axis(3, 1, 1, 1, 1), Axis(3, 1, 1, 1, 1), 40)
@example(Axis(3, 1, 1, 1, 1), Axis(1, 2, 1, 1, 0), 40)
def test_a_refusal_means_that_no_convolution_is_equal(one: Axis, two: Axis, size: int):
    rng = rng_of(one.kernel + 10 * two.kernel)
    first, second = random_affine(rng, [one], 1, 1), random_affine(rng, [two], 1, 1)
    try:
        first.then(second, [size])
    except NotExactError as error:
        refusal = error
    else:
        assume(False)
    if "at the border no single convolution is equal" in refusal.what:
        mid = one.output_size(size)
        matrix = matrix_of(second, mid) @ matrix_of(first, size)
        assert not some_convolution_has(matrix, one.stride * two.stride)
    else:
        assert "a bias is followed by zero padding" in refusal.what
        assert not some_tap_follows_the_domain(one, two, size)
    assert refusal.boundary_that_works == "hoist"


def test_padded_3x3_after_padded_3x3_is_refused_with_the_windows_and_what_would_work():
    with pytest.raises(NotExactError) as refusal:
        same(3).then(same(3))
    assert "a window of 3 (stride 1, padding 1 and 1) is followed by one of 3" in str(refusal.value)
    assert "pads 1 and 1: at the border no single convolution is equal" in str(refusal.value)
    assert refusal.value.boundary_that_works == "hoist"


def test_unpadded_3x3_after_padded_3x3_is_one_convolution():
    rng = rng_of()
    first = random_affine(rng, square(same(3)), 2, 2)
    second = random_affine(rng, square(Axis(3)), 2, 2)
    merged = assert_composes(first, second, (6, 7))
    assert merged.axes[0] == Axis(5, 1, 1, 1, 1)


def test_known_sizes_allow_what_unknown_sizes_do_not():
    """With stride 2 the last padded window reads a pixel for even sizes only."""
    first, second = Axis(3, 2, 1, 1, 1), Axis(3, 1, 1, 1, 1)
    assert first.then(second, 225).kernel == 7
    for size in (None, 224):
        with pytest.raises(NotExactError, match="at the border no single convolution"):
            first.then(second, size)
    rng = rng_of()
    one, two = random_affine(rng, square(first), 2, 3), random_affine(rng, square(second), 3, 2)
    assert assert_composes(one, two, (9, 11)).border is not None
    with pytest.raises(NotExactError, match="at the border"):
        one.then(two, (9, 10))


def test_a_bias_on_a_domain_that_padding_enlarged_is_refused():
    """1x1 with padding 1 writes its bias outside x's domain, where no tap reaches."""
    rng = rng_of()
    first = random_affine(rng, [Axis(1, 1, 1, 1, 1)], 1, 1)
    second = random_affine(rng, [same(3)], 1, 1)
    with pytest.raises(NotExactError, match="no tap of the merged kernel can follow"):
        first.then(second)
    unbiased = replace(first, bias=np.zeros(1))
    assert_composes(unbiased, second, (6,))


@pytest.mark.parametrize(
    ("first", "second", "reason"),
    [
        (Geometry(square(Axis()), 2, 3), Geometry(square(Axis()), 4, 4), "3 channels are followed"),
        (Geometry((Axis(),), 2, 2), Geometry(square(Axis()), 2, 2), "1 spatial axes are followed"),
    ],
)
def test_shapes_that_do_not_follow_each_other_are_refused(
    first: Geometry, second: Geometry, reason: str
):
    with pytest.raises(NotExactError, match=reason):
        first.then(second)


def test_a_merge_without_padding_has_no_border_kernel():
    rng = rng_of()
    padded = random_affine(rng, square(Axis()), 2, 2).then(
        random_affine(rng, square(same(3)), 2, 2)
    )
    assert padded.border is not None
    cropped = padded.then(zero_pad(2, [(-1, -1)] * 2))
    assert cropped.border is None
    assert not cropped.geometry.bordered
    x = nonzero(rng, 2, 6, 6)
    np.testing.assert_allclose(
        slow_conv(x, cropped), slow_conv(x, padded)[:, 1:-1, 1:-1], atol=1e-12
    )


@settings(ci, max_examples=40)
@given(st.data())
def test_a_chain_matches_onnxruntime(data: st.DataObject):
    rank = data.draw(st.integers(1, 3))
    sizes = [data.draw(st.integers(5, 8)) for _ in range(rank)]
    rng = rng_of(data.draw(st.integers(0, 1000)))
    groups = data.draw(st.sampled_from([1, 2]))
    spatial = [
        Axis(
            data.draw(st.integers(1, 3)),
            data.draw(st.integers(1, 2)),
            data.draw(st.integers(1, 2)),
            data.draw(st.integers(0, 2)),
            data.draw(st.integers(0, 2)),
        )
        for _ in range(rank)
    ]
    assume(sizes_allow(spatial, sizes))
    convs = [
        random_affine(rng, [Axis()] * rank, 4, 4, groups),
        random_affine(rng, spatial, 4, 6, groups),
        random_affine(rng, [Axis()] * rank, 6, 3),
    ]
    merged = convs[0].then(convs[1], sizes).then(convs[2], sizes)
    x = nonzero(rng, 4, *sizes)
    (expected,) = run(as_model(convs, sizes), {"x": x[None].astype(np.float32)})
    actual = slow_conv(x.astype(np.float32).astype(np.float64), merged)[None]
    assert_same(expected, actual.astype(np.float32), tolerance=2e-6)


# --- sums of branches ---------------------------------------------------------------------------


def assert_adds(one: AffineConv, two: AffineConv, sizes: Sequence[int]) -> AffineConv:
    x = nonzero(rng_of(5), one.weight.shape[1] * one.groups, *sizes)
    expected = slow_conv(x, one) + slow_conv(x, two)
    merged = one.plus(two, sizes)
    np.testing.assert_allclose(slow_conv(x, merged), expected, atol=1e-12)
    shape = one.geometry.plus(two.geometry, sizes)
    assert shape.axes == merged.axes
    assert shape.groups == merged.groups
    assert shape.bordered == (merged.border is not None)
    return merged


def test_identity_branch_is_a_dirac_kernel():
    rng = rng_of()
    conv = random_affine(rng, square(same(3)), 4, 4)
    merged = assert_adds(conv, identity(4, 2), (5, 6))
    assert merged.geometry.kernel == (3, 3)
    assert merged.groups == 1
    expected = conv.weight.copy()
    expected[range(4), range(4), 1, 1] += 1
    np.testing.assert_array_equal(merged.weight, expected)


def test_depthwise_plus_identity_stays_depthwise():
    conv = random_affine(rng_of(), square(same(3)), 4, 4, groups=4)
    assert assert_adds(conv, identity(4, 2), (5, 6)).groups == 4


def test_1x1_branch_is_one_tap():
    rng = rng_of()
    conv = random_affine(rng, square(same(3, 2)), 3, 5)
    projection = random_affine(rng, square(Axis(1, 2)), 3, 5)
    merged = assert_adds(conv, projection, (7, 8))
    assert merged.axes == conv.axes


def test_asymmetric_branches_are_aligned_by_their_padding():
    rng = rng_of()
    wide = random_affine(rng, (Axis(), same(3)), 2, 2)
    tall = random_affine(rng, (same(3), Axis()), 2, 2)
    merged = assert_adds(wide, tall, (5, 6))
    assert merged.geometry.kernel == (3, 3)
    assert np.all(merged.weight[:, :, 0, 0] == 0)


def test_branches_with_border_kernels_keep_them():
    rng = rng_of()
    bordered = random_affine(rng, square(same(5)), 2, 3, border=True)
    other = random_affine(rng, square(same(3)), 2, 3, border=True)
    plain = random_affine(rng, square(Axis()), 2, 3)
    assert assert_adds(bordered, other, (6, 7)).border is not None
    assert assert_adds(plain, bordered, (6, 7)).border is not None
    assert assert_adds(plain, plain, (6, 7)).border is None


@settings(ci, max_examples=100)
@given(st.data())
def test_sums_are_exact(data: st.DataObject):
    rank = data.draw(st.integers(1, 2))
    sizes = [data.draw(st.integers(4, 8)) for _ in range(rank)]
    pairs = []
    for size in sizes:
        one = data.draw(axis_of())
        two = replace(data.draw(axis_of()), stride=one.stride)
        assume(sizes_allow([one, two], [size, size]))
        assume(one.output_size(size) == two.output_size(size))
        pairs.append((one, two))
    groups = data.draw(st.sampled_from([1, 2, 4])), data.draw(st.sampled_from([1, 2, 4]))
    rng = rng_of(data.draw(st.integers(0, 1000)))
    parts = [
        random_affine(
            rng, [pair[number] for pair in pairs], 4, 4, groups[number],
            border=data.draw(st.booleans()),
        )
        for number in (0, 1)
    ]  # fmt: skip
    assert_adds(parts[0], parts[1], sizes)


@pytest.mark.parametrize(
    ("one", "two", "reason"),
    [
        (Geometry((Axis(3, 1, 1, 1, 1),), 2, 2), Geometry((Axis(1, 2),), 2, 2), "stride"),
        (Geometry((Axis(3),), 2, 2), Geometry((Axis(),), 2, 2), "different sizes"),
        (Geometry((Axis(),), 2, 2), Geometry((Axis(),), 2, 1), "by broadcasting"),
        (Geometry((Axis(),), 2, 2), Geometry((Axis(),), 3, 2), "read different inputs"),
    ],
)
def test_branches_that_cannot_be_summed_are_refused(one: Geometry, two: Geometry, reason: str):
    with pytest.raises(NotExactError, match=reason):
        one.plus(two)


def test_equal_output_sizes_may_depend_on_the_size():
    """Stride 2: padding (1, 1) and (1, 0) of a 3x3 agree on even sizes alone."""
    rng = rng_of()
    one = random_affine(rng, [Axis(3, 2, 1, 1, 1)], 2, 2)
    two = random_affine(rng, [Axis(3, 2, 1, 1, 0)], 2, 2)
    assert_adds(one, two, (8,))
    assert_adds(two, one, (8,))
    for sizes in (None, (9,)):
        with pytest.raises(NotExactError, match="different sizes"):
            one.plus(two, sizes)


# --- concatenation and selection ------------------------------------------------------------------


def test_stacked_branches_are_concatenated_over_channels():
    rng = rng_of()
    branches = [
        random_affine(rng, square(same(3)), 4, 2, border=True),
        random_affine(rng, square(Axis()), 4, 3),
        random_affine(rng, square(same(5)), 4, 4, groups=4),
    ]
    x = nonzero(rng, 4, 6, 5)
    expected = np.concatenate([slow_conv(x, branch) for branch in branches])
    np.testing.assert_allclose(slow_conv(x, stack(branches)), expected, atol=1e-12)


@pytest.mark.parametrize(
    ("channels", "groups"),
    [
        ([0, 1, 2, 3, 4, 5], 3),
        ([0, 2, 4], 3),
        ([1, 1, 2, 3, 5, 4], 3),
        ([5, 0], 1),
        ([2, 3, 0, 1, 4, 5], 1),
        ([0, 1, 2], 1),
    ],
)
def test_taken_channels_are_rows_and_keep_a_grouping_only_in_order(
    channels: list[int], groups: int
):
    rng = rng_of()
    conv = random_affine(rng, square(same(3)), 6, 6, groups=3, border=True)
    x = nonzero(rng, 6, 4, 5)
    taken = conv.take(channels)
    assert taken.groups == groups
    np.testing.assert_allclose(slow_conv(x, taken), slow_conv(x, conv)[channels], atol=1e-12)


# --- the constant map -----------------------------------------------------------------------------


@settings(ci, max_examples=60)
@given(st.lists(st.tuples(axis_of(), st.integers(3, 12)), min_size=1, max_size=3))
def test_the_border_map_is_the_convolution_of_ones(pairs: list[tuple[Axis, int]]):
    axes, sizes = [axis for axis, _ in pairs], [size for _, size in pairs]
    assume(sizes_allow(axes, sizes))
    conv = random_affine(rng_of(3), axes, 2, 2, border=True)
    silent = replace(conv, weight=np.zeros_like(conv.weight))
    expected = slow_conv(np.zeros((2, *sizes)), silent)
    np.testing.assert_allclose(conv.border_map(sizes), expected, atol=1e-12)
    table, indices = conv.border_table(sizes)
    full = table
    for number, index in enumerate(indices):
        full = np.take(full, index, axis=1 + number)
    np.testing.assert_allclose(full, expected, atol=1e-12)
    assert all(rows <= size for rows, size in zip(table.shape[1:], expected.shape[1:], strict=True))


def test_the_table_of_a_padded_3x3_has_three_rows_for_any_size():
    conv = random_affine(rng_of(), square(same(3)), 2, 2, border=True)
    table, _ = conv.border_table((224, 224))
    assert table.shape == (2, 3, 3)


def test_without_border_is_equal_where_no_window_reads_padding():
    rng = rng_of()
    conv = random_affine(rng, square(same(3)), 2, 2, border=True)
    plain = conv.without_border()
    assert plain.border is None
    x = nonzero(rng, 2, 6, 6)
    inner = (slice(None), slice(1, -1), slice(1, -1))
    np.testing.assert_allclose(slow_conv(x, plain)[inner], slow_conv(x, conv)[inner], atol=1e-12)
    assert plain.without_border() is plain


# --- small pieces ---------------------------------------------------------------------------------


def test_scale_shift_and_zero_pad_are_what_they_say():
    rng = rng_of()
    x = nonzero(rng, 3, 4, 5)
    scale, shift = nonzero(rng, 3), nonzero(rng, 3)
    expected = x * scale[:, None, None] + shift[:, None, None]
    np.testing.assert_allclose(slow_conv(x, scale_shift(scale, shift, 2)), expected)
    padded = slow_conv(x, zero_pad(3, [(1, 2), (-1, 0)]))
    np.testing.assert_array_equal(padded, np.pad(x[:, :, 1:], ((0, 0), (1, 2), (0, 0))))
    np.testing.assert_array_equal(slow_conv(x, identity(3, 2)), x)


@ci
@given(axis_of(pads=(-1, 2)), st.integers(1, 30))
def test_output_size_is_the_number_of_windows_that_fit(axis: Axis, size: int):
    padded = size + axis.begin + axis.end
    count = len(range(0, padded - axis.extent + 1, axis.stride))
    assume(count > 0)
    assert axis.output_size(size) == count


def test_costs_count_products_and_constants():
    geometry = Geometry((Axis(3, 2, 1, 1, 1), Axis(1)), 8, 12, groups=4)
    assert geometry.output_sizes((7, 5)) == (4, 5)
    assert geometry.macs((7, 5)) == 4 * 5 * 12 * 2 * 3
    assert geometry.params == 12 * (2 * 3 + 1)

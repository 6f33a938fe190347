"""What stands in a segment's place: least squares, at the border too, on any number of axes."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import onnx
import pytest
from builders import ModelBuilder, assert_same, op_types, run

from graphfold.calibration import gathering, workbench
from graphfold.calibration.sketch import Sketch
from graphfold.calibration.workbench import Replacement, Workbench
from graphfold.errors import DataError
from graphfold.model import load, to_proto

KEY = ("x", "y")


@pytest.fixture(autouse=True)
def _no_ridge(monkeypatch):
    """Plain least squares on all positions, so that it can be compared with."""
    monkeypatch.setattr(workbench, "RIDGE", 0.0)
    monkeypatch.setattr(gathering, "PER_IMAGE", 10_000)
    monkeypatch.setattr(gathering, "_ROWS_PER_FEATURE", 10_000)


class Net(ModelBuilder):
    """x -> convolution -> Relu -> pointwise convolution -> y."""

    def __init__(self, sizes: Sequence[int], channels: int = 3) -> None:
        super().__init__(("N", channels, *sizes))
        self.sizes = tuple(sizes)

    def always_positive(self, source: str) -> str:
        """A Relu that lets everything through: the segment is linear, though nobody can see it."""
        channels = self._channels[source]
        shift = self.constant(np.full((1, channels, *([1] * self.rank)), 50.0))
        return self.op("Relu", self.op("Add", source, shift))

    def feeds(self, images: int = 12, batches: int = 3) -> list[dict[str, np.ndarray]]:
        rng = np.random.default_rng(5)
        shape = (images, self._channels["x"], *self.sizes)
        return [{"x": rng.normal(size=shape).astype(np.float32)} for _ in range(batches)]


def bench_of(net: Net, proto: onnx.ModelProto, largest: Sequence[int]) -> Workbench:
    found = Workbench(load(proto))
    found.collect(net.feeds(), inner=[], segments={KEY: tuple(largest)})
    return found


def built(bench: Workbench, replacement: Replacement) -> onnx.ModelProto:
    proto = bench.build({KEY: replacement})
    onnx.checker.check_model(proto)
    return proto


LINEAR = {
    "one axis": ((11,), {"kernel": 3, "pad": 1}),
    "two axes": ((7, 10), {"kernel": 3, "pad": 1}),
    "three axes": ((4, 5, 6), {"kernel": 3, "pad": 1}),
    "asymmetric kernel": ((7, 9), {"kernel": (1, 5), "pad": (0, 2, 0, 2)}),
    "stride, even size": ((8, 12), {"kernel": 3, "pad": 1, "stride": 2}),
    "stride, padding behind": ((8, 8), {"kernel": 3, "pad": (0, 0, 1, 1), "stride": 2}),
    "stride, odd size": ((9, 7), {"kernel": 5, "pad": 2, "stride": 2}),
    "different strides": ((9, 8), {"kernel": 3, "pad": 1, "stride": (1, 2)}),
    "no padding": ((8, 8), {"kernel": 3}),
}


@pytest.mark.parametrize(("sizes", "options"), LINEAR.values(), ids=LINEAR.keys())
def test_a_linear_segment_is_found_again(sizes, options):
    net = Net(sizes)
    kernel = tuple(net._per_axis(options["kernel"]))
    y = net.conv(net.always_positive(net.conv("x", 6, **options)), 4, 1, out="y")
    proto = net.model(y)
    replaced = built(bench_of(net, proto, kernel), Replacement("dense", kernel=kernel))
    assert op_types(replaced) == ["Conv"]
    (x, *_) = net.feeds()
    assert_same(run(proto, x)[0], run(replaced, x)[0], reach=1, tolerance=1e-4)


def test_a_linear_segment_of_low_rank_is_found_again():
    net = Net((7, 6), channels=5)
    y = net.conv(net.always_positive(net.conv("x", 2, 3, pad=1)), 6, 1, out="y")
    proto = net.model(y)
    bench = bench_of(net, proto, (3, 3))
    low = built(bench, Replacement("low_rank", kernel=(3, 3), rank=2))
    assert op_types(low) == ["Conv", "Conv"]
    (x, *_) = net.feeds()
    assert_same(run(proto, x)[0], run(low, x)[0], tolerance=1e-4)
    lower = Replacement("low_rank", kernel=(3, 3), rank=1)
    assert np.abs(run(proto, x)[0] - run(built(bench, lower), x)[0]).max() > 0.1
    assert bench.errors[KEY, lower] > 0.05


def test_a_linear_depthwise_segment_is_found_again():
    net = Net((6, 9), channels=4)
    middle = net.always_positive(net.depthwise("x", 3, pad=1))
    proto = net.model(net.depthwise(middle, 1, out="y"))
    bench = bench_of(net, proto, (3, 3))
    replaced = built(bench, Replacement("depthwise", kernel=(3, 3)))
    weight = onnx.numpy_helper.to_array(replaced.graph.initializer[0])
    assert weight.shape == (4, 1, 3, 3)
    (x, *_) = net.feeds()
    assert_same(run(proto, x)[0], run(replaced, x)[0], tolerance=1e-4)


def read_places(x: np.ndarray, kernel, strides, begins, results) -> np.ndarray:
    """What a convolution reads for each result, one at a time: [results, channels * taps]."""
    margin = max(kernel)
    padded = np.pad(x, [(0, 0), (0, 0), *[(margin, margin)] * len(kernel)])
    rows = []
    for image in padded:
        for place in itertools.product(*map(range, results)):
            starts = [p * s - b + margin for p, s, b in zip(place, strides, begins, strict=True)]
            window = tuple(slice(a, a + k) for a, k in zip(starts, kernel, strict=True))
            rows.append(image[(slice(None), *window)].ravel())
    return np.array(rows, np.float64)


NONLINEAR = {
    "one axis": ((10,), (3,), 1, (1,)),
    "two axes": ((6, 7), (3, 3), 1, (1, 1)),
    "smaller kernel": ((6, 7), (1, 1), 1, (0, 0)),
    "stride, even size": ((8, 6), (3, 3), 2, (1, 1)),
    "stride, smaller kernel": ((8, 6), (1, 1), 2, (0, 0)),
    "three axes": ((4, 5, 4), (3, 3, 3), 1, (1, 1, 1)),
}


@pytest.mark.parametrize("family", ["dense", "depthwise"])
@pytest.mark.parametrize(
    ("sizes", "kernel", "stride", "begins"), NONLINEAR.values(), ids=NONLINEAR.keys()
)
def test_a_fit_is_the_least_squares_map(family, sizes, kernel, stride, begins):
    net = Net(sizes)
    hidden = net.op("Relu", net.conv("x", 6, 3, pad=1, stride=stride))
    proto = net.model(net.conv(hidden, 3, 1, out="y"))
    # Moments of the larger kernel serve the smaller one.
    bench = bench_of(net, proto, (3,) * len(sizes))
    replaced = built(bench, Replacement(family, kernel=kernel))

    x = np.concatenate([feed["x"] for feed in net.feeds()])
    y = run(proto, {"x": x})[0]
    rows = read_places(x, kernel, (stride,) * len(sizes), begins, y.shape[2:])
    targets = np.moveaxis(y, 1, -1).reshape(-1, 3).astype(np.float64)
    expected = np.empty_like(targets)
    taps = int(np.prod(kernel))
    for channel in range(3):
        own = slice(channel * taps, (channel + 1) * taps) if family == "depthwise" else slice(None)
        features = np.column_stack([rows[:, own], np.ones(len(rows))])
        solution, *_ = np.linalg.lstsq(features, targets[:, channel], rcond=None)
        expected[:, channel] = features @ solution
    found = np.moveaxis(run(replaced, {"x": x})[0], 1, -1).reshape(-1, 3)
    np.testing.assert_allclose(found, expected, atol=2e-4)
    residual = ((targets - expected) ** 2).sum() / ((targets - targets.mean(axis=0)) ** 2).sum()
    assert bench.errors[KEY, Replacement(family, kernel=kernel)] == pytest.approx(
        residual, abs=1e-5
    )
    assert residual > 0.02, "a test on a linear segment proves nothing about least squares"


def test_low_rank_is_the_best_map_of_that_rank():
    net = Net((6, 7), channels=4)
    hidden = net.op("Relu", net.conv("x", 8, 3, pad=1))
    proto = net.model(net.conv(hidden, 5, 1, out="y"))
    bench = bench_of(net, proto, (3, 3))
    replaced = built(bench, Replacement("low_rank", kernel=(3, 3), rank=2))

    x = np.concatenate([feed["x"] for feed in net.feeds()])
    y = run(proto, {"x": x})[0]
    rows = read_places(x, (3, 3), (1, 1), (1, 1), y.shape[2:])
    targets = np.moveaxis(y, 1, -1).reshape(-1, 5).astype(np.float64)
    features = np.column_stack([rows, np.ones(len(rows))])
    solution, *_ = np.linalg.lstsq(features, targets, rcond=None)
    full = features @ solution
    centre = full.mean(axis=0)
    left, sizes, right = np.linalg.svd(full - centre, full_matrices=False)
    expected = (left[:, :2] * sizes[:2]) @ right[:2] + centre
    found = np.moveaxis(run(replaced, {"x": x})[0], 1, -1).reshape(-1, 5)
    np.testing.assert_allclose(found, expected, atol=5e-4)


def test_a_segment_knows_which_kernels_fit_between_its_ends():
    net = Net((8, 8))
    proto = net.model(net.conv(net.op("Relu", net.conv("x", 6, 3)), 4, 3, out="y"))
    place = Workbench(load(proto)).segments[KEY]
    assert [place.takes((k, k)) for k in (1, 3, 5, 7)] == [False, False, True, True]
    padded = Net((8, 8))
    proto = padded.model(
        padded.conv(padded.op("Relu", padded.conv("x", 6, 3, pad=1)), 4, 3, pad=1, out="y")
    )
    place = Workbench(load(proto)).segments[KEY]
    assert all(place.takes((k, k)) for k in (1, 3, 5, 7))


def test_what_else_is_fitted_changes_nothing(monkeypatch):
    monkeypatch.setattr(gathering, "PER_IMAGE", 9)
    monkeypatch.setattr(gathering, "_ROWS_PER_FEATURE", 1)
    net = Net((9, 9), channels=8)
    first = net.op("Relu", net.conv("x", 8, 3, pad=1))
    second = net.op("Relu", net.conv(first, 8, 3, pad=1, out="z"))
    proto = net.model(net.conv(second, 8, 3, pad=1, out="y"))
    key = ("x", "z")
    alone, together = Workbench(load(proto)), Workbench(load(proto))
    alone.collect(net.feeds(), inner=[], segments={key: (3, 3)})
    together.collect(net.feeds(), segments={KEY: (3, 3), key: (3, 3)})
    chosen = {key: Replacement("dense", kernel=(3, 3))}
    assert alone.build(chosen) == together.build(chosen)


def test_the_network_itself_stays_as_it_is():
    net = Net((8, 8), channels=8)
    hidden = net.op("Relu", net.conv("x", 16, 3, pad=1))
    proto = net.model(net.conv(hidden, 8, 3, pad=1, out="y"))
    bench = Workbench(load(proto))
    bench.collect(net.feeds(), segments={KEY: (3, 3)})
    before = to_proto(bench.model).SerializeToString()
    for each in (
        Replacement("dense", kernel=(3, 3)),
        Replacement("narrow", 8),
        Replacement("identity"),
    ):
        changed = bench.build({KEY: each})
        assert len(changed.graph.node) < 3 or each.family == "narrow"
        assert to_proto(bench.model).SerializeToString() == before


def test_a_dropped_segment_is_nothing_at_all():
    net = Net((8, 8), channels=8)
    hidden = net.op("Relu", net.conv("x", 16, 3, pad=1))
    net.conv(hidden, 8, 3, pad=1, out="z")
    proto = net.model(net.op("Relu", "z", out="y"))
    bench = Workbench(load(proto))
    changed = bench.build({("x", "z"): Replacement("identity")})
    (x, *_) = net.feeds()
    np.testing.assert_array_equal(run(changed, x)[0], np.maximum(x["x"], 0))


def test_no_inputs_are_told():
    net = Net((8, 8))
    proto = net.model(net.conv(net.op("Relu", net.conv("x", 6, 3, pad=1)), 4, 1, out="y"))
    with pytest.raises(DataError, match="no inputs to fit on"):
        Workbench(load(proto)).collect([])


@pytest.mark.parametrize(
    ("replacement", "parts"),
    [
        (Replacement("narrow", 8), ["Conv", "Relu", "Conv"]),
        (Replacement("dense", kernel=(3, 3)), ["Conv"]),
        (Replacement("depthwise", kernel=(3, 3)), ["Conv"]),
        (Replacement("low_rank", kernel=(1, 1), rank=2), ["Conv", "Conv"]),
    ],
    ids=lambda value: getattr(value, "family", ""),
)
def test_a_sketch_has_the_sizes_of_a_fit(replacement, parts):
    net = Net((8, 8), channels=8)
    hidden = net.op("Relu", net.conv("x", 16, 3, pad=1))
    proto = net.model(net.conv(hidden, 8, 3, pad=1, out="y"))
    fitted, sketched = Workbench(load(proto)), Sketch(load(proto))
    fitted.collect(net.feeds(), segments={KEY: (3, 3)})
    protos = [bench.build({KEY: replacement}) for bench in (fitted, sketched)]
    assert op_types(protos[0]) == op_types(protos[1]) == parts
    shapes = [[tuple(item.dims) for item in proto.graph.initializer] for proto in protos]
    assert shapes[0] == shapes[1]
    (x, *_) = net.feeds()
    assert run(protos[1], x)[0].shape == run(proto, x)[0].shape

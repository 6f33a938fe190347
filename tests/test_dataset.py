"""Data sets: pictures and arrays in, batches out, and what is said about mistakes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import small_models as small
from builders import ModelBuilder

from graphfold.calibration import images
from graphfold.calibration.data_checks import doubt_values
from graphfold.calibration.dataset import read_dataset, read_inputs
from graphfold.calibration.preprocess import NAMED, Preparation, Preprocess, read_preprocess
from graphfold.cli import main
from graphfold.errors import DataError
from graphfold.model import load
from graphfold.specs import InputSpec

Image = pytest.importorskip("PIL.Image")

NCHW = (InputSpec("x", "tensor(float)", ("N", 3, 4, 4)),)
NHWC = (InputSpec("x", "tensor(float)", ("N", 4, 4, 3)),)
OPEN = (InputSpec("x", "tensor(float)", ("N", 3, "H", "W")),)
FIXED = (InputSpec("x", "tensor(float)", (2, 3)),)
ROWS = (InputSpec("x", "tensor(float)", ("N", 3)),)


def picture(path: Path, colour: tuple[int, ...], size: tuple[int, int] = (8, 8)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return path


@pytest.fixture
def classes(tmp_path: Path) -> Path:
    """Three pictures of cats, two of dogs; how red one is tells its number."""
    folder = tmp_path / "pets"
    for number in range(3):
        picture(folder / "cat" / f"{number}.png", (number, 0, 0))
    for number in range(2):
        picture(folder / "dog" / f"{number}.png", (100 + number, 0, 0))
    (folder / "notes.txt").write_text("no picture")
    (folder / "empty").mkdir()
    return folder


def reds(dataset) -> list[int]:
    return [int(x) for batch in dataset.batches(2) for x in batch.feed["x"][:, 0, 0, 0]]


# Folders ----------------------------------------------------------------------------------------


def test_classes_take_turns_and_give_labels(classes):
    dataset = read_dataset(str(classes), NCHW, "raw")
    assert reds(dataset) == [0, 100, 1, 101, 2]
    assert dataset.labels.tolist() == [0, 1, 0, 1, 0]
    assert dataset.samples == 5
    assert [batch.labels.tolist() for batch in dataset.batches(2)] == [[0, 1], [0, 1], [0]]
    assert reds(dataset) == [0, 100, 1, 101, 2]  # a second time
    assert [batch.samples for batch in dataset.batches()] == [5]


def test_a_limit_shows_all_classes(classes):
    dataset = read_dataset(str(classes), NCHW, "raw", limit=2)
    assert (dataset.samples, dataset.labels.tolist()) == (2, [0, 1])
    assert reds(dataset) == [0, 100]


def test_folders_named_by_numbers_are_those_classes(tmp_path):
    for name in ("10", "2"):
        picture(tmp_path / name / "a.png", (1, 1, 1))
    assert sorted(read_dataset(str(tmp_path), NCHW, "raw").labels.tolist()) == [2, 10]


def test_a_folder_without_classes_has_no_labels(tmp_path):
    picture(tmp_path / "b.jpg", (9, 9, 9))
    picture(tmp_path / "a.png", (5, 5, 5))
    dataset = read_dataset(str(tmp_path), NCHW, "raw")
    assert dataset.labels is None
    assert reds(dataset)[0] == 5
    (feed,) = read_inputs(str(tmp_path), NCHW, preprocess="raw")
    assert feed["x"].shape == (2, 3, 4, 4)


def test_the_digest_tells_data_and_preprocessing(classes):
    first = read_dataset(str(classes), NCHW, "raw").digest
    assert read_dataset(str(classes), NCHW, "raw").digest == first
    assert read_dataset(str(classes), NCHW, "unit").digest != first
    assert read_dataset(str(classes), NCHW, "raw", limit=3).digest != first
    picture(classes / "dog" / "1.png", (7, 7, 7))
    assert read_dataset(str(classes), NCHW, "raw").digest != first


def test_folders_that_are_no_data(classes, tmp_path):
    with pytest.raises(DataError, match=r"--preprocess with one of imagenet"):
        read_dataset(str(classes), NCHW)
    picture(classes / "beside.png", (1, 1, 1))
    with pytest.raises(DataError, match="1 pictures beside folders"):
        read_dataset(str(classes), NCHW, "raw")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"a\.png: is no picture"):
        list(read_dataset(str(tmp_path / "broken"), NCHW, "raw").batches())
    Image.fromarray(np.full((8, 8), 40000, np.uint16)).save(tmp_path / "broken" / "a.png")
    with pytest.raises(DataError, match="more than 8 bits"):
        list(read_dataset(str(tmp_path / "broken"), NCHW, "raw").batches())
    with pytest.raises(DataError, match="model has 2"):
        read_dataset(str(tmp_path / "broken"), (*NCHW, *ROWS), "raw")


def test_pillow_that_is_missing_is_named(classes, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(DataError, match=r"graphfold\[images\]"):
        images.require_pillow()
    with pytest.raises(DataError, match=r"graphfold\[images\]"):
        read_dataset(str(classes), NCHW, "raw")


# Preprocessing ----------------------------------------------------------------------------------


def prepared(preprocess: Preprocess | str, image, spec: InputSpec = NCHW[0]) -> np.ndarray:
    chosen = NAMED[preprocess] if isinstance(preprocess, str) else preprocess
    return Preparation(chosen, spec, "here")(image)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("raw", [255, 51, 0]),
        ("unit", [1, 0.2, 0]),
        ("symmetric", [1, -0.6, -1]),
        ("lite", [1, (51 - 127) / 128, -127 / 128]),
        ("imagenet", [(1 - 0.485) / 0.229, (0.2 - 0.456) / 0.224, -0.406 / 0.225]),
    ],
)
def test_named_preprocessing(name, expected):
    found = prepared(name, Image.new("RGB", (8, 8), (255, 51, 0)))
    assert found.shape == (1, 3, 4, 4)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found[0, :, 2, 1], expected, atol=1e-6)


def test_channels_and_layout_follow_model_and_preprocessing():
    image = Image.new("RGB", (8, 8), (1, 2, 3))
    assert prepared("raw", image, NHWC[0]).shape == (1, 4, 4, 3)
    assert prepared("raw", image, NHWC[0])[0, 0, 0].tolist() == [1, 2, 3]
    backwards = Preprocess(scale=1.0, channels="BGR", mean=(1.0, 0.0, 0.0))
    assert prepared(backwards, image)[0, :, 0, 0].tolist() == [2, 2, 1]
    grey = InputSpec("x", "tensor(float)", ("N", 1, 4, 4))
    assert prepared(Preprocess(channels="L"), image, grey).shape == (1, 1, 4, 4)
    assert prepared("raw", image, InputSpec("x", "tensor(uint8)", ("N", 3, 4, 4))).dtype == np.uint8


def left_and_right() -> object:
    """Black, then white in the middle half, then black."""
    pixels = np.zeros((16, 32, 3), np.uint8)
    pixels[:, 8:24] = 255
    return Image.fromarray(pixels)


def test_the_crop_is_in_the_centre():
    # The largest square of 32 x 16 is its middle half; a share of it lies inside that.
    assert prepared("raw", left_and_right()).min() == 255
    half = Preprocess(scale=1.0, crop_fraction=0.5)
    assert prepared(half, left_and_right()).min() == 255
    resized = Preprocess(scale=1.0, resize=8)  # 8 x 16, of which 4 x 4 are cut out
    assert prepared(resized, left_and_right()).min() == 255
    with pytest.raises(DataError, match="larger resize"):
        prepared(Preprocess(resize=2), left_and_right())


def test_sizes_come_from_model_then_preprocessing():
    image = Image.new("RGB", (8, 8))
    assert prepared("raw", image, OPEN[0]).shape == (1, 3, 224, 224)
    sized = Preprocess(size=(6, 5))
    assert prepared(sized, image, OPEN[0]).shape == (1, 3, 6, 5)
    with pytest.raises(DataError, match=r"size 6, but input 'x' is \[N, 3, 4, 4\]"):
        prepared(sized, image)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (InputSpec("x", "tensor(float)", ("N", 7)), "four axes"),
        (InputSpec("x", "tensor(float)", ("N", 1, 4, 4)), r'channels: "L"'),
        (InputSpec("x", "tensor(uint8)", ("N", 3, 4, 4)), "--preprocess raw"),
    ],
)
def test_inputs_that_take_no_such_pictures(spec, message):
    with pytest.raises(DataError, match=message):
        Preparation(NAMED["imagenet"], spec, "here")


def test_a_file_says_the_same_as_a_name(tmp_path):
    path = tmp_path / "p.json"
    fields = {"crop_fraction": 0.875, "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
    path.write_text(json.dumps(fields))
    assert read_preprocess(str(path)) == NAMED["imagenet"]
    path.write_text('{"size": [3, 4], "layout": "NHWC"}')
    assert read_preprocess(str(path)).size == (3, 4)


def test_all_problems_of_a_file_come_at_once(tmp_path):
    path = tmp_path / "p.json"
    path.write_text('{"maen": [1], "interpolation": "cubic", "size": 0, "scale": "x"}')
    with pytest.raises(DataError) as caught:
        read_preprocess(str(path))
    text = str(caught.value)
    assert "maen: unknown key (did you mean 'mean'?)" in text
    assert "interpolation: 'cubic' is not valid (one of 'bicubic' or 'bilinear')" in text
    assert "scale: " in text
    assert "size: " in text
    for content, message in (
        ("{", "not JSON"),
        ('{"resize": 8, "crop_fraction": 0.5}', "exclude each other"),
        ('{"mean": [1, 2]}', "mean has 2 values, RGB wants 1 or 3"),
        ('{"std": [0]}', "std must not be 0"),
    ):
        path.write_text(content)
        with pytest.raises(DataError, match=message):
            read_preprocess(str(path))
    for name, message in (("imagnet", "did you mean 'imagenet'"), ("none.json", "cannot be read")):
        with pytest.raises(DataError, match=message):
            read_preprocess(name)


# Arrays -----------------------------------------------------------------------------------------


def test_arrays_come_in_batches_of_any_size_with_labels(tmp_path):
    path = tmp_path / "data.npz"
    np.savez(path, x=np.arange(21).reshape(7, 3), labels=np.arange(7))
    dataset = read_dataset(str(path), ROWS, limit=5)
    assert (dataset.samples, dataset.labels.tolist()) == (5, [0, 1, 2, 3, 4])
    batches = list(dataset.batches(3))
    assert [batch.samples for batch in batches] == [3, 2]
    assert batches[1].labels.tolist() == [3, 4]
    assert batches[1].feed["x"].dtype == np.float32
    assert batches[1].feed["x"][0].tolist() == [9, 10, 11]
    assert dataset.describe() == {"data": str(path), "sha256": dataset.digest, "samples": 5}


def test_a_models_own_batch_is_kept(tmp_path):
    path = tmp_path / "data.npy"
    np.save(path, np.ones((5, 3), np.float32))
    assert [b.samples for b in read_dataset(str(path), FIXED).batches(4)] == [2, 2]
    np.save(path, np.ones((1, 3), np.float32))
    with pytest.raises(DataError, match="1 samples do not fill the model's batch of 2"):
        list(read_dataset(str(path), FIXED).batches())


def test_what_a_callable_yields_is_joined_and_read_again(tmp_path, monkeypatch):
    (tmp_path / "own_samples.py").write_text(
        "import numpy as np\n"
        "def some():\n"
        "    for n in range(5):\n"
        "        yield {'x': np.full((1 + n % 2, 3), n), 'labels': np.full(1 + n % 2, n)}\n"
        "def none():\n    return []\n"
        "def random():\n    yield {'x': np.random.default_rng().random((2, 3))}\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    dataset = read_dataset("own_samples:some", ROWS)
    assert (dataset.samples, dataset.labels) == (None, None)
    for _ in range(2):
        batches = list(dataset.batches(3))
        assert [batch.labels.tolist() for batch in batches] == [[0, 1, 1], [2, 3, 3], [4]]
        assert batches[1].feed["x"][:, 0].tolist() == [2, 3, 3]
    limited = read_dataset("own_samples:some", ROWS, limit=2)
    assert [batch.labels.tolist() for batch in limited.batches(3)] == [[0, 1]]
    with pytest.raises(DataError, match="holds no samples"):
        list(read_dataset("own_samples:none", ROWS).batches())
    other = read_dataset("own_samples:random", ROWS)
    assert len(list(other.batches())) == 1
    with pytest.raises(DataError, match="other values than when it was called before"):
        list(other.batches())
    sys.modules.pop("own_samples")


@pytest.mark.parametrize(
    ("inputs", "arrays", "message"),
    [
        (NCHW, {"x": np.ones((2, 4, 4, 3))}, r"the data is NHWC, the model NCHW .*\(0, 3, 1, 2\)"),
        (NHWC, {"x": np.ones((2, 3, 4, 4))}, r"the data is NCHW, the model NHWC .*\(0, 2, 3, 1\)"),
        (NCHW, {"x": np.ones((3, 4, 4))}, r"the batch axis is missing"),
        (NCHW, {"x": np.ones((2, 3, 5, 5))}, r"is \[2, 3, 5, 5\], the model wants"),
        (NCHW, {"y": np.ones((2, 3, 4, 4))}, r"no array for input 'x'.*'y' is no input"),
        (ROWS, {"x": np.ones((2, 3)), "labels": np.ones(3)}, "unequal length"),
        (ROWS, {"x": np.ones((2, 3)), "labels": np.array([0.5, 1])}, "labels are float64"),
        (ROWS, {"x": np.ones((2, 3)), "labels": np.array(["a", "b"])}, "labels are <U1"),
        ((InputSpec("x", "tensor(int64)", ("N", 3)),), {"x": np.ones((2, 3))}, "wants int64"),
    ],
)
def test_arrays_that_do_not_fit(tmp_path, inputs, arrays, message):
    path = tmp_path / "data.npz"
    np.savez(path, **arrays)
    with pytest.raises(DataError, match=message):
        list(read_dataset(str(path), inputs).batches())


def test_sources_that_are_none(tmp_path):
    np.save(tmp_path / "a.npy", np.ones((2, 3)))
    with pytest.raises(DataError, match="for folders of pictures"):
        read_dataset(str(tmp_path / "a.npy"), ROWS, "raw")
    with pytest.raises(DataError, match="limit of 0"):
        read_dataset(str(tmp_path / "a.npy"), ROWS, limit=0)
    with pytest.raises(DataError, match="no such file"):
        read_dataset("absent", ROWS)


# Evidence ---------------------------------------------------------------------------------------


def trained_on(pixels: np.ndarray) -> onnx.ModelProto:
    """A convolution and a normalisation with the statistics that these images give."""
    proto = small.conv_bn_relu()
    constants = {item.name: item for item in proto.graph.initializer}
    weight, bias = (onnx.numpy_helper.to_array(constants[name]) for name in ("w", "b"))
    padded = np.pad(pixels, ((0, 0), (0, 0), (1, 1), (1, 1)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(2, 3))
    values = np.einsum("nchwij,ocij->nohw", windows, weight) + bias[:, None, None]
    for name, value in (("m", values.mean((0, 2, 3))), ("v", values.var((0, 2, 3)))):
        array = onnx.numpy_helper.from_array(value.astype(np.float32), name)
        constants[name].CopyFrom(array)
    return proto


def test_another_scale_shows_in_the_first_normalisation():
    rng = np.random.default_rng(0)
    raw = rng.integers(0, 256, (8, 3, 8, 8)).astype(np.float32)
    normalised = (raw / 255 - 0.45) / 0.225
    model = load(trained_on(normalised))
    assert doubt_values(model, {"x": normalised}) == []
    assert doubt_values(model, {"x": 1.5 * normalised}) == []
    (doubt,) = doubt_values(model, {"x": raw})
    assert "first normalisation, of 'conv'" in doubt
    assert "x 0 to 255" in doubt
    (doubt,) = doubt_values(model, {"x": raw / 255})
    assert "0.2" in doubt
    assert doubt_values(load(trained_on(raw)), {"x": raw}) == []


def test_bytes_into_a_convolution_are_doubted_where_nothing_else_tells():
    raw = np.random.default_rng(0).integers(0, 256, (2, 3, 8, 8)).astype(np.float32)

    def network(scaled: bool):
        build = ModelBuilder(("N", 3, 8, 8))
        x = build.op("Mul", "x", build.constant(np.float32(1 / 255))) if scaled else "x"
        return load(build.model(build.op("Relu", build.conv(x, 4, 3), out="y")))

    (doubt,) = doubt_values(network(scaled=False), {"x": raw})
    assert "whole numbers from 0 to 255" in doubt
    assert doubt_values(network(scaled=True), {"x": raw}) == []
    assert doubt_values(network(scaled=False), {"x": raw / 255}) == []


def test_pictures_on_the_command_line(classes, tmp_path, capfd):
    path = tmp_path / "m.onnx"
    onnx.save(small.conv_bn_relu(), path)
    arguments = ["verify", str(path), str(path), "--data", str(classes)]
    assert main([*arguments, "--preprocess", "imagenet"]) == 0
    capfd.readouterr()
    assert main(arguments) == 2
    assert "how are the folder's pictures to be prepared" in capfd.readouterr().err
    assert main(["verify", str(path), str(path), "--preprocess", "raw"]) == 2
    assert "there is no --data" in capfd.readouterr().err


def test_doubts_are_warnings(tmp_path, capfd):
    raw = np.random.default_rng(0).integers(0, 256, (8, 3, 8, 8)).astype(np.float32)
    path, data = tmp_path / "m.onnx", tmp_path / "d.npy"
    onnx.save(trained_on((raw / 255 - 0.45) / 0.225), path)
    np.save(data, raw)
    assert main(["verify", str(path), str(path), "--data", str(data)]) == 0
    assert "warning: values seem to be on another scale" in capfd.readouterr().err


# Real models ------------------------------------------------------------------------------------


PHOTO = (InputSpec("input", "tensor(float)", ("N", 3, 224, 224)),)


@pytest.mark.needs_shared
@pytest.mark.parametrize(
    ("model", "source", "least"),
    [("efficientnet_lite0_bn", "nips_lite", 80), ("mobilenetv2_tv_bn", "nips_mobilenet", 75)],
)
def test_shared_photos(shared, monkeypatch, model, source, least):
    """The statements of the data's description hold, and wrong scales are noticed."""
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parent.parent / "benchmarks"))
    import shared_data

    assert shared_data.top1(model, source, 64) >= least
    loaded = load(shared / "models" / f"{model}.onnx")
    (batch,) = read_dataset(f"shared_data:{source}", PHOTO, limit=8).batches(8)
    assert doubt_values(loaded, batch.feed) == []
    for factor in (128, 0.25):
        assert doubt_values(loaded, {"input": batch.feed["input"] * np.float32(factor)})

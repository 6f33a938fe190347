"""The shared photos as data: each function yields dicts of one sample and its label.

Use as `--data benchmarks.shared_data:imagenet_lite` from the repository's root; `python
benchmarks/shared_data.py` prints the top-1 accuracies that the data's own description states.
"""

import io
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from graphfold.calibration.dataset import read_dataset
from graphfold.calibration.preprocess import NAMED, Preparation, Preprocess
from graphfold.runtime import Runnable, Session
from graphfold.specs import InputSpec

SHARED = Path(__file__).resolve().parent.parent.parent / "shared"
Sample = dict[str, NDArray[Any]]
# EfficientNet's margin: of an image of 256 pixels, 256 * r / (r + 32) are kept.
_MARGIN = 32
SIZE = 224


def imagenet_lite() -> Iterator[Sample]:
    """The 1,000 photos to calibrate on, as EfficientNet-Lite wants them."""
    return photos("imagenet_sample", "lite")


def imagenet_mobilenet() -> Iterator[Sample]:
    """The 1,000 photos to calibrate on, as torchvision's MobileNetV2 wants them."""
    return photos("imagenet_sample", "imagenet")


def nips_lite() -> Iterator[Sample]:
    """The 500 photos to judge on, never to fit on, as EfficientNet-Lite wants them."""
    return photos("nips17_eval", "lite")


def nips_mobilenet() -> Iterator[Sample]:
    """The 500 photos to judge on, never to fit on, as torchvision's MobileNetV2 wants them."""
    return photos("nips17_eval", "imagenet")


def cifar10_train() -> Iterator[Sample]:
    """CIFAR-10's 50,000 training images, with ImageNet's mean and deviation."""
    return cifar("train")


def cifar10_test() -> Iterator[Sample]:
    """CIFAR-10's 10,000 test images, with ImageNet's mean and deviation."""
    return cifar("test")


def ultraface() -> Iterator[Sample]:
    """Photos for the face detector UltraFace: 240 x 320, its margins cut off."""
    return prepared("input", (1, 3, 240, 320), Preprocess(scale=1.0, mean=(127.0,), std=(128.0,)))


def onet() -> Iterator[Sample]:
    """Middles of photos for MTCNN's last stage, which sees what may be a face."""
    middle = Preprocess(scale=1.0, mean=(127.5,), std=(128.0,), crop_fraction=0.6)
    return prepared("input", ("N", 3, 48, 48), middle)


def blazeface() -> Iterator[Sample]:
    """Photos for the face detector BlazeFace."""
    return prepared("input:0", (1, 256, 256, 3), NAMED["symmetric"])


def facemesh() -> Iterator[Sample]:
    """Photos for the points of a face: few hold one, so it shows what is lost, not how good."""
    return prepared("input_1", ("N", 192, 192, 3), NAMED["unit"])


def text_direction() -> Iterator[Sample]:
    """Strips of photos for the classifier that tells whether a line of text stands upside down."""
    return prepared("x", ("N", 3, 48, 192), NAMED["symmetric"])


def realesr() -> Iterator[Sample]:
    """Pieces of photos of 64 x 64, pixel by pixel, for super-resolution by Real-ESRGAN."""
    return prepared("data", ("N", 3, 64, 64), Preprocess(crop_fraction=0.25))


def esrgan() -> Iterator[Sample]:
    """Pieces of photos of 64 x 64, pixel by pixel, for super-resolution by ESRGAN."""
    return prepared("input", ("N", 64, 64, 3), Preprocess(crop_fraction=0.25))


def emotions() -> Iterator[Sample]:
    """Grey middles of photos for the classifier of facial expressions."""
    middle = Preprocess(channels="L", scale=1 / 127.5, mean=(1.0,), crop_fraction=0.6)
    return prepared("input", ("N", 64, 64, 1), middle)


def wake_words() -> Iterator[Sample]:
    """Photos for the tiny classifier that tells whether there is a person."""
    return prepared("input", ("N", 3, 96, 96), NAMED["unit"])


def prepared(
    name: str, shape: tuple[int | str | None, ...], preprocess: Preprocess
) -> Iterator[Sample]:
    """The 1,000 photos to calibrate on, without labels, for a model of another kind.

    Args:
        name: of the model's input.
        shape: of the input.
        preprocess: how the model wants them.
    """
    prepare = Preparation(preprocess, InputSpec(name, "tensor(float)", shape), "shared data")
    for image, _, _ in _labelled("imagenet_sample"):
        yield {name: prepare(image)}


def photos(
    name: str, preprocess: str, size: int = SIZE, split: int | None = None
) -> Iterator[Sample]:
    """Photos of one file, in its order.

    Args:
        name: of the file.
        preprocess: whose scale, mean and deviation; the crop is that of the data's description.
        size: height and width.
        split: only classes of this half (0 or 1), all where left out.
    """
    fraction = round(256 * size / (size + _MARGIN)) / 256
    chosen = NAMED[preprocess].model_copy(
        update={"crop_fraction": fraction, "interpolation": "bicubic"}
    )
    prepare = _preparation(chosen, size)
    for image, label, half in _labelled(name):
        if split is None or half == split:
            yield {"input": prepare(image), "labels": label}


def _labelled(name: str) -> Iterator[tuple[Image.Image, NDArray[Any], int | None]]:
    """Photos of one file with their label, as an array, and half."""
    with np.load(SHARED / "data" / f"{name}.npz", allow_pickle=False) as file:
        data = file["jpeg"].tobytes()
        offsets, labels, halves = (file[key] for key in ("offsets", "labels", "split"))
    for number, (start, stop) in enumerate(itertools.pairwise(offsets)):
        image = Image.open(io.BytesIO(data[start:stop]))
        yield image, labels[number : number + 1], halves[number]


def cifar(part: str) -> Iterator[Sample]:
    """CIFAR-10, `train` or `test`: one header for all JPEGs, and their bodies in a row."""
    prepare = _preparation(NAMED["imagenet"].model_copy(update={"crop_fraction": 1.0}), 32)
    with np.load(SHARED / "data" / "cifar10_jpeg.npz", allow_pickle=False) as file:
        header, bodies = file["header"].tobytes(), file[f"body_{part}"].tobytes()
        lengths, labels = file[f"len_{part}"], file[f"y_{part}"]
    start = 0
    for number, length in enumerate(lengths.tolist()):
        image = Image.open(io.BytesIO(header + bodies[start : start + length] + b"\xff\xd9"))
        start += length
        yield {"input": prepare(image), "labels": labels[number : number + 1]}


def _preparation(preprocess: Preprocess, size: int) -> Preparation:
    spec = InputSpec("input", "tensor(float)", ("N", 3, size, size))
    return Preparation(preprocess, spec, "shared data")


# Model, data, top-1 in percent as the data's description states it.
STATED = (
    ("efficientnet_lite0_bn", "imagenet_lite", 87.7),
    ("mobilenetv2_tv_bn", "imagenet_mobilenet", 83.1),
    ("efficientnet_lite0_bn", "nips_lite", 88.8),
    ("mobilenetv2_tv_bn", "nips_mobilenet", 82.4),
    ("cifar10_resnet20_bn", "cifar10_test", 81.0),
)


def top1(model: str, source: str, limit: int | None = None) -> float:
    """Top-1 accuracy in percent of a shared model on one of these data sets."""
    with Runnable(SHARED / "models" / f"{model}.onnx") as runnable:
        session = Session(runnable, optimize=True, threads=1)
    dataset = read_dataset(f"{__name__}:{source}", session.inputs, limit=limit)
    hits: list[NDArray[np.bool_]] = []
    for batch in dataset.batches(8):
        scores = next(iter(session.run(batch.feed).values()))
        hits.append(scores.argmax(1) == batch.labels)
    return 100 * float(np.concatenate(hits).mean())


def main() -> None:
    limit = int(sys.argv[1]) if len(sys.argv) > 1 else None
    for model, source, stated in STATED:
        print(f"{model:24} {source:20} {top1(model, source, limit):5.1f} % (stated: {stated} %)")


if __name__ == "__main__":
    main()
